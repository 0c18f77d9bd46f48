// Attention over pages, for prefill and decode alike.
//
// A query row's keys are taken in splits of SPLIT tokens aligned to position 0, whatever the page
// size, chunk or company. Within a split: all scores, their maximum, the weights, the weighted sum of
// values; then splits are merged in order (flash-decoding's scheme, with a fixed order). A block of
// keys that a row cannot see adds exact zeros, so it does not matter which rows share a tile.

namespace quire {
namespace {

constexpr int TILE = 8;       // query rows that share loads of keys
constexpr int MIX_ROWS = 4;   // query rows that share loads of values
constexpr int MIX_WIDTH = 4;  // vectors of 16 value dimensions at a time
constexpr float NOTHING = -INFINITY;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the pages of one sequence are.
struct Pages {
    const Pool& pool;
    const int64_t* ids;
    int64_t start, end;  // stored positions

    int64_t page_of(int64_t position) const {
        return ids[(position - start) / pool.page_size];
    }
};

// Keys and values of 16 tokens in the form that the inner loops read: paired (bf16) key
// [dim / 2][16 tokens][2], value [8][dim][2]; plain (float) key [dim][16], value [16][dim].
template <bool PAIRED>
struct Block {
    using Number = std::conditional_t<PAIRED, uint16_t, float>;
    const Number* key;
    int64_t key_stride;  // numbers from one dim (pair of dims) to the next
    const Number* value;
};

inline float number(const void* base, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32) return static_cast<const float*>(base)[i];
    uint16_t x = static_cast<const uint16_t*>(base)[i];
    return dtype == Dtype::bf16 ? bf16_to_float(x) : fp16_to_float(x);
}

// Copies of one block in its canonical form; slots without a token are zero.
struct Spare {
    alignas(64) float key[MAX_HEAD * BLOCK];
    alignas(64) float value[MAX_HEAD * BLOCK];
};

template <bool PAIRED>
Block<PAIRED> copy_block(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Pool& pool = pages.pool;
    using Number = typename Block<PAIRED>::Number;
    Number* key = reinterpret_cast<Number*>(spare.key);
    Number* value = reinterpret_cast<Number*>(spare.value);
    std::memset(key, 0, sizeof(Number) * size_t(pool.key_dim * BLOCK));
    std::memset(value, 0, sizeof(Number) * size_t(pool.value_dim * BLOCK));
    for (int64_t t = 0; t < BLOCK; ++t) {
        int64_t position = at + t;
        if (position < pages.start || position >= pages.end) continue;
        int64_t offset = (position - pages.start) % pool.page_size;
        int64_t page = pages.page_of(position) * pool.heads + head;
        if constexpr (PAIRED) {
            int64_t size = pool.page_size, width = pool.value_dim;
            const uint16_t* k = static_cast<uint16_t*>(pool.key) + page * pool.key_dim * size;
            const uint16_t* v = static_cast<uint16_t*>(pool.value) + page * width * size;
            for (int64_t d = 0; d < pool.key_dim; ++d)
                key[(d / 2 * BLOCK + t) * 2 + d % 2] =
                    k[pool.interleaved ? (d / 2 * size + offset) * 2 + d % 2 : d * size + offset];
            for (int64_t d = 0; d < width; ++d)
                value[(t / 2 * width + d) * 2 + t % 2] =
                    v[pool.interleaved ? (offset / 2 * width + d) * 2 + offset % 2
                                       : offset * width + d];
        } else {
            int64_t k = page * pool.key_dim * pool.page_size;
            int64_t v = (page * pool.page_size + offset) * pool.value_dim;
            for (int64_t d = 0; d < pool.key_dim; ++d)
                key[d * BLOCK + t] = number(pool.key, pool.dtype, k + d * pool.page_size + offset);
            for (int64_t d = 0; d < pool.value_dim; ++d)
                value[t * pool.value_dim + d] = number(pool.value, pool.dtype, v + d);
        }
    }
    return {key, BLOCK * (PAIRED ? 2 : 1), value};
}

// The block of tokens [at, at + 16): in place if it lies whole inside one page, else a copy.
template <bool PAIRED>
inline Block<PAIRED> block_at(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Pool& pool = pages.pool;
    bool direct = PAIRED ? pool.interleaved
                         : pool.dtype == Dtype::f32 && pool.page_size % BLOCK == 0;
    if (!direct || at < pages.start || at + BLOCK > pages.end)
        return copy_block<PAIRED>(pages, head, at, spare);
    using Number = typename Block<PAIRED>::Number;
    int64_t offset = (at - pages.start) % pool.page_size, width = PAIRED ? 2 : 1;
    int64_t page = pages.page_of(at) * pool.heads + head;
    const Number* key = static_cast<const Number*>(pool.key) +
                        page * pool.key_dim * pool.page_size + offset * width;
    const Number* value = static_cast<const Number*>(pool.value) +
                          (page * pool.page_size + offset) * pool.value_dim;
    return {key, pool.page_size * width, value};
}

// Scores of R rows against a block: scores[r][0..15] = query[r] . key
template <bool PAIRED, int R>
inline void score(const Block<PAIRED>& block, const float* const* query, int64_t dim, float scale,
                  float* scores) {
    F16 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = F16::zero();
    for (int64_t d = 0; d < (PAIRED ? dim / 2 : dim); ++d) {
        if constexpr (PAIRED) {
            Pairs key = Pairs::load(block.key + d * block.key_stride);
            for (int r = 0; r < R; ++r) {
                uint32_t pair;
                std::memcpy(&pair, query[r] + d, 4);
                acc[r] = dot_pairs(acc[r], Pairs::set(pair), key);
            }
        } else {
            F16 key = F16::load(block.key + d * block.key_stride);
            for (int r = 0; r < R; ++r) acc[r] = fma(F16::set(query[r][d]), key, acc[r]);
        }
    }
    for (int r = 0; r < R; ++r) (acc[r] * F16::set(scale)).store(scores + r * SPLIT);
}

// mixed[r][0..16 W) += weights[r] . value over the blocks of a split, R rows at a time
template <bool PAIRED, int R, int W>
inline void mix(const Block<PAIRED>* blocks, int64_t count, const float* weights, int64_t dim,
                int64_t column, float* mixed) {
    F16 acc[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) acc[r][w] = F16::zero();
    int64_t left = dim - column;
    for (int64_t b = 0; b < count; ++b) {
        for (int64_t t = 0; t < (PAIRED ? BLOCK / 2 : BLOCK); ++t) {
            if constexpr (PAIRED) {
                const uint16_t* from = blocks[b].value + (t * dim + column) * 2;
                Pairs value[W];
                for (int w = 0; w < W; ++w) value[w] = Pairs::load(from + 32 * w);
                for (int r = 0; r < R; ++r) {
                    uint32_t pair;
                    const auto* row = reinterpret_cast<const uint16_t*>(weights + r * SPLIT);
                    std::memcpy(&pair, row + b * BLOCK + 2 * t, 4);
                    Pairs weight = Pairs::set(pair);
                    for (int w = 0; w < W; ++w) acc[r][w] = dot_pairs(acc[r][w], weight, value[w]);
                }
            } else {
                const float* from = blocks[b].value + t * dim + column;
                F16 value[W];
                for (int w = 0; w < W; ++w)
                    value[w] = left >= 16 * (w + 1) ? F16::load(from + 16 * w)
                                                    : load_some(from + 16 * w, int(left - 16 * w));
                for (int r = 0; r < R; ++r) {
                    F16 weight = F16::set(weights[r * SPLIT + b * BLOCK + t]);
                    for (int w = 0; w < W; ++w) acc[r][w] = fma(weight, value[w], acc[r][w]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) {
            float* to = mixed + r * dim + column + 16 * w;
            if (left >= 16 * (w + 1)) acc[r][w].store(to);
            else store_some(acc[r][w], to, int(left - 16 * w));
        }
}

template <bool PAIRED, int R>
inline void mix_rows(const Block<PAIRED>* blocks, int64_t count, const float* weights, int64_t dim,
                     float* mixed) {
    int64_t column = 0;
    for (; column + 16 * MIX_WIDTH <= dim; column += 16 * MIX_WIDTH)
        mix<PAIRED, R, MIX_WIDTH>(blocks, count, weights, dim, column, mixed);
    for (; column < dim; column += 16)
        mix<PAIRED, R, 1>(blocks, count, weights, dim, column, mixed);
}

// Weights from scores, in place: the row's maximum and the sum of its weights.
template <bool PAIRED>
inline void soften(float* scores, int64_t count, float& best, float& total) {
    F16 top = F16::set(NOTHING);
    for (int64_t b = 0; b < count; ++b) top = max(top, F16::load(scores + b * BLOCK));
    best = max(top);
    F16 peak = F16::set(best == NOTHING ? 0.0f : best), sums = F16::zero();
    for (int64_t b = 0; b < count; ++b) {
        F16 weights = exp(F16::load(scores + b * BLOCK) - peak);
        if constexpr (PAIRED) {
            // Bf16 weights overwrite the scores from the front. What is summed is what values will
            // be multiplied with, so that roundings of the weights largely cancel.
            alignas(64) float wide[16];
            weights.store(wide);
            auto* to = reinterpret_cast<uint16_t*>(scores) + b * BLOCK;
            store_bf16(wide, to);
            weights = F16::load_bf16(to);
        } else {
            weights.store(scores + b * BLOCK);
        }
        sums = sums + weights;
    }
    total = sum(sums);
}

// The running result of some query rows: maximum, sum of weights, weighted sum of values.
struct Partial {
    float* best;
    float* total;
    float* mixed;  // [rows][value_dim]
};

// Add a later split to an earlier result, for one row.
inline void merge_row(float& best, float& total, float* mixed, float best2, float total2,
                      const float* mixed2, int64_t dim) {
    if (best2 == NOTHING) return;
    if (best == NOTHING) {
        best = best2, total = total2;
        std::memcpy(mixed, mixed2, size_t(dim) * 4);
        return;
    }
    float top = best > best2 ? best : best2;
    alignas(64) float shrink[16] = {};
    shrink[0] = best - top, shrink[1] = best2 - top;
    exp(F16::load(shrink)).store(shrink);
    F16 a = F16::set(shrink[0]), b = F16::set(shrink[1]);
    best = top, total = total * shrink[0] + total2 * shrink[1];
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16)
        fma(F16::load(mixed2 + d), b, F16::load(mixed + d) * a).store(mixed + d);
    if (d < dim) {
        int n = int(dim - d);
        store_some(fma(load_some(mixed2 + d, n), b, load_some(mixed + d, n) * a), mixed + d, n);
    }
}

// What a tile of up to TILE rows needs to know: queries, and the positions that each row sees.
struct Tile {
    int rows;
    const float* query[TILE];
    int64_t low[TILE], high[TILE];
};

template <bool PAIRED, int R>
inline void score_tile(const Tile& tile, const Block<PAIRED>& block, int64_t at, int64_t dim,
                       float scale, float* scores) {
    if (tile.rows == R) {
        score<PAIRED, R>(block, tile.query, dim, scale, scores);
        for (int r = 0; r < R; ++r) {
            if (tile.low[r] <= at && tile.high[r] >= at + BLOCK) continue;
            float* row = scores + r * SPLIT;
            auto clamp = [](int64_t x) { return int(x < 0 ? 0 : x > 16 ? 16 : x); };
            keep(F16::load(row), clamp(tile.low[r] - at), clamp(tile.high[r] - at),
                 F16::set(NOTHING))
                .store(row);
        }
    } else if constexpr (R > 1) {
        score_tile<PAIRED, R - 1>(tile, block, at, dim, scale, scores);
    }
}

template <bool PAIRED, int R>
inline void mix_tile(int rows, const Block<PAIRED>* blocks, int64_t count, const float* weights,
                     int64_t dim, float* mixed) {
    if (rows == R) {
        mix_rows<PAIRED, R>(blocks, count, weights, dim, mixed);
    } else if constexpr (R > 1) {
        mix_tile<PAIRED, R - 1>(rows, blocks, count, weights, dim, mixed);
    }
}

// True if a token of the block that some row of the tile does not see has a value that is infinite
// or NaN: 0 * inf would carry it to that row.
template <bool PAIRED>
bool is_wild(const Tile& tile, const Block<PAIRED>& block, int64_t at, int64_t dim) {
    if (tile.low[tile.rows - 1] <= at && tile.high[0] >= at + BLOCK) return false;
    bool wild = false;
    for (int64_t i = 0; i < BLOCK * dim; ++i) {
        if constexpr (PAIRED) wild |= (block.value[i] & 0x7f80) == 0x7f80;
        else wild |= !std::isfinite(block.value[i]);
    }
    return wild;
}

// A copy of the block without the values of tokens that one row does not see.
template <bool PAIRED>
Block<PAIRED> seen_only(const Block<PAIRED>& block, int64_t low, int64_t high, int64_t at,
                        int64_t dim, Spare& spare) {
    using Number = typename Block<PAIRED>::Number;
    Number* value = reinterpret_cast<Number*>(spare.value);
    for (int64_t t = 0; t < BLOCK; ++t)
        for (int64_t d = 0; d < dim; ++d) {
            int64_t i = PAIRED ? (t / 2 * dim + d) * 2 + t % 2 : t * dim + d;
            value[i] = at + t >= low && at + t < high ? block.value[i] : Number(0);
        }
    return {block.key, block.key_stride, value};
}

// The weighted sum of values row by row, each over what that row sees.
template <bool PAIRED>
void mix_apart(const Tile& tile, const Block<PAIRED>* blocks, int64_t count, int64_t at,
               const float* weights, int64_t dim, float* mixed) {
    std::vector<Spare> spare(static_cast<size_t>(count));
    std::vector<Block<PAIRED>> seen(static_cast<size_t>(count));
    for (int r = 0; r < tile.rows; ++r) {
        for (int64_t b = 0; b < count; ++b)
            seen[size_t(b)] = seen_only<PAIRED>(blocks[b], tile.low[r], tile.high[r],
                                                at + b * BLOCK, dim, spare[size_t(b)]);
        mix_rows<PAIRED, 1>(seen.data(), count, weights + r * SPLIT, dim, mixed + r * dim);
    }
}

// Ask for what comes next: pages are scattered, so the hardware cannot guess it. Keys of the block
// after the next, and values of this block, which are used once all scores are there.
template <bool PAIRED>
inline void fetch(const Block<PAIRED>* blocks, int64_t b, int64_t count, int64_t key_dim,
                  int64_t value_dim) {
    constexpr int64_t LINE = 64 / sizeof(typename Block<PAIRED>::Number);
    for (int64_t i = 0; i < BLOCK * value_dim; i += LINE)
        __builtin_prefetch(blocks[b].value + i, 0, 2);
    if (b + 2 >= count) return;
    for (int64_t d = 0; d < (PAIRED ? key_dim / 2 : key_dim); ++d)
        __builtin_prefetch(blocks[b + 2].key + d * blocks[b + 2].key_stride, 0, 2);
}

// One tile over one split: per row best[r], total[r], mixed[r].
template <bool PAIRED>
void attend_split(const Attention& a, const Tile& tile, int64_t split, bool fresh,
                  const Block<PAIRED>* blocks, float* best, float* total, float* mixed) {
    alignas(64) float scores[TILE * SPLIT];
    int64_t low = tile.low[0], high = tile.high[tile.rows - 1];
    int64_t begin = split * SPLIT;
    int64_t first = low > begin ? (low - begin) / BLOCK : 0;
    int64_t last = high - begin < SPLIT ? ceil_div(high - begin, BLOCK) : SPLIT / BLOCK;
    int64_t count = last > first ? last - first : 0;
    for (int64_t b = 0; b < count; ++b) {
        if (fresh) fetch<PAIRED>(blocks + first, b, count, a.pool.key_dim, a.pool.value_dim);
        score_tile<PAIRED, TILE>(tile, blocks[first + b], begin + (first + b) * BLOCK,
                                 a.pool.key_dim, a.scale, scores + b * BLOCK);
    }
    for (int r = 0; r < tile.rows; ++r)
        soften<PAIRED>(scores + r * SPLIT, count, best[r], total[r]);
    for (int64_t b = 0; b < count; ++b) {
        int64_t at = begin + (first + b) * BLOCK;
        if (is_wild<PAIRED>(tile, blocks[first + b], at, a.pool.value_dim))
            return mix_apart<PAIRED>(tile, blocks + first, count, begin + first * BLOCK, scores,
                                     a.pool.value_dim, mixed);
    }
    for (int r = 0; r < tile.rows; r += MIX_ROWS)
        mix_tile<PAIRED, MIX_ROWS>(tile.rows - r < MIX_ROWS ? tile.rows - r : MIX_ROWS,
                                   blocks + first, count, scores + r * SPLIT, a.pool.value_dim,
                                   mixed + r * a.pool.value_dim);
}

// The rows of an item: their queries in the form that `score` reads, and what they see.
template <bool PAIRED>
void make_tile(const Attention& a, const AttentionItem& item, int64_t row, int rows, Tile& tile,
               float* queries) {
    int64_t share = a.num_heads / a.pool.heads, dim = a.pool.key_dim;
    tile.rows = rows;
    for (int r = 0; r < rows; ++r) {
        int64_t at = item.row + row + r;
        int64_t token = a.query_indptr[item.sequence] + at / share;
        const float* from = a.query + (token * a.num_heads + item.head * share + at % share) * dim;
        float* to = queries + r * MAX_HEAD;
        if constexpr (PAIRED) {
            auto* pairs = reinterpret_cast<uint16_t*>(to);
            for (int64_t d = 0; d < dim; ++d) pairs[d] = float_to_bf16(from[d]);
            tile.query[r] = to;
        } else {
            tile.query[r] = from;
        }
        tile.high[r] = a.positions[token] + 1;
        tile.low[r] = a.window && tile.high[r] > a.window ? tile.high[r] - a.window : 0;
    }
}

// The end: weighted sums divided by the sum of weights.
inline void write_rows(const Attention& a, const AttentionItem& item, const float* total,
                       const float* mixed) {
    int64_t share = a.num_heads / a.pool.heads, dim = a.pool.value_dim;
    for (int64_t r = 0; r < item.rows; ++r) {
        int64_t at = item.row + r, token = a.query_indptr[item.sequence] + at / share;
        float* to = a.out + (token * a.num_heads + item.head * share + at % share) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = mixed[r * dim + d] / total[r];
    }
}

template <bool PAIRED>
void attend_item(const Attention& a, const AttentionItem& item) {
    const Pool& pool = a.pool;
    int64_t s = item.sequence, dim = pool.value_dim;
    int64_t start = a.first_page[s] * pool.page_size;
    int64_t held = a.indptr[s + 1] - a.indptr[s];
    Pages pages{pool, a.indices + a.indptr[s], start,
                start + (held - 1) * pool.page_size + a.last_page_len[s]};
    int64_t tiles = ceil_div(item.rows, TILE);
    std::vector<float> queries(size_t(item.rows) * MAX_HEAD), state(size_t(item.rows) * (dim + 2));
    std::vector<Tile> tile(static_cast<size_t>(tiles));
    std::vector<float> mixed2(size_t(TILE * dim));
    float* total = state.data() + item.rows;
    float* mixed = total + item.rows;
    for (int64_t r = 0; r < item.rows; ++r) state[size_t(r)] = NOTHING;
    for (int64_t t = 0; t < tiles; ++t) {
        int rows = int(item.rows - t * TILE < TILE ? item.rows - t * TILE : TILE);
        make_tile<PAIRED>(a, item, t * TILE, rows, tile[size_t(t)],
                          queries.data() + t * TILE * MAX_HEAD);
    }
    // Blocks outside whole pages are copied: at most a split of them.
    static thread_local std::vector<Spare> spare(SPLIT / BLOCK);
    Block<PAIRED> blocks[SPLIT / BLOCK];
    int64_t low = tile[0].low[0], high = tile[size_t(tiles - 1)].high[tile[size_t(tiles - 1)].rows - 1];
    for (int64_t split = item.split; split < item.split_end; ++split) {
        int64_t begin = split * SPLIT;
        for (int64_t b = 0; b < SPLIT / BLOCK; ++b) {
            int64_t at = begin + b * BLOCK;
            if (at + BLOCK > low && at < high)
                blocks[b] = block_at<PAIRED>(pages, item.head, at, spare[size_t(b)]);
        }
        for (int64_t t = 0; t < tiles; ++t) {
            const Tile& now = tile[size_t(t)];
            if (now.low[0] >= begin + SPLIT || now.high[now.rows - 1] <= begin) continue;
            float best2[TILE], total2[TILE];
            attend_split<PAIRED>(a, now, split, t == 0, blocks, best2, total2, mixed2.data());
            for (int r = 0; r < now.rows; ++r) {
                int64_t row = t * TILE + r;
                merge_row(state[size_t(row)], total[row], mixed + row * dim, best2[r], total2[r],
                          mixed2.data() + r * dim, dim);
            }
        }
    }
    if (item.partial) {
        std::memcpy(item.partial, state.data(), state.size() * 4);
        return;
    }
    write_rows(a, item, total, mixed);
}

void merge_item(const Attention& a, const AttentionItem& item) {
    int64_t dim = a.pool.value_dim, size = item.rows * (dim + 2);
    float* first = item.partial;
    for (int64_t split = 1; split < item.split_end - item.split; ++split) {
        const float* next = item.partial + split * size;
        for (int64_t r = 0; r < item.rows; ++r)
            merge_row(first[r], first[item.rows + r], first + 2 * item.rows + r * dim, next[r],
                      next[item.rows + r], next + 2 * item.rows + r * dim, dim);
    }
    write_rows(a, item, first + item.rows, first + 2 * item.rows);
}

void attend(const Attention& a, const AttentionItem& item) {
    if (a.pool.paired) attend_item<true>(a, item);
    else attend_item<false>(a, item);
}

}  // namespace
}  // namespace quire
