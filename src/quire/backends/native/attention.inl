// Attention over pages.
//
// A query row's keys are taken in splits of SPLIT tokens aligned to position 0, whatever the page
// size, chunk or company. Within a split: all scores, their maximum, the weights, the weighted sum of
// values; then splits are merged in order (flash-decoding's scheme, with a fixed order). A block of
// keys that a row cannot see adds exact zeros, so it does not matter which rows share a tile.
//
// Prefill works through a sequence head by head, for many rows at a time. Decode (decode.inl) walks
// pages, all heads of each, for the one row of each query head. A row's arithmetic is the same in both.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int TILE = 12;     // query rows that share loads of keys
constexpr int MIX_ROWS = 6;  // query rows that share loads of values
#else
constexpr int TILE = 4;
constexpr int MIX_ROWS = 2;
#endif
constexpr int MIX_WIDTH = 4;  // vectors of 16 value dimensions at a time
constexpr int MOST_BLOCKS = 4;  // blocks of keys, on as many pages, that are read side by side

// Blocks of keys that share loads of R rows of queries: as many as there are accumulators for.
constexpr int blocks_at_a_time(int rows) { return rows * MOST_BLOCKS <= 2 * TILE ? MOST_BLOCKS : 2; }
constexpr int64_t BYTES_AHEAD = 32 << 10;  // asked for ahead of what decode works on
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

// True if the tokens [at, at + 16) lie whole inside one page, in the form that is read.
template <bool PAIRED>
inline bool lies_whole(const Pages& pages, int64_t at) {
    const Pool& pool = pages.pool;
    bool form = PAIRED ? pool.interleaved
                       : pool.dtype == Dtype::f32 && pool.page_size % BLOCK == 0;
    return form && at >= pages.start && at + BLOCK <= pages.end;
}

template <bool PAIRED>
inline Block<PAIRED> block_in_place(const Pages& pages, int64_t head, int64_t at) {
    const Pool& pool = pages.pool;
    using Number = typename Block<PAIRED>::Number;
    int64_t offset = (at - pages.start) % pool.page_size, width = PAIRED ? 2 : 1;
    int64_t page = pages.page_of(at) * pool.heads + head;
    const Number* key = static_cast<const Number*>(pool.key) +
                        page * pool.key_dim * pool.page_size + offset * width;
    const Number* value = static_cast<const Number*>(pool.value) +
                          (page * pool.page_size + offset) * pool.value_dim;
    return {key, pool.page_size * width, value};
}

// The block of tokens [at, at + 16): in place, or a copy.
template <bool PAIRED>
inline Block<PAIRED> block_at(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    return lies_whole<PAIRED>(pages, at) ? block_in_place<PAIRED>(pages, head, at)
                                         : copy_block<PAIRED>(pages, head, at, spare);
}

constexpr int GROUP = 4;  // blocks of one head that are worked on before the next head's

// Lines of a group of blocks that will be worked on later, asked for in the order in which they will be
// read: of keys side by side, of values block after block; GROUP lines a step.
struct Lines {
    const char* block[GROUP];
    bool keys;
    int64_t stride, size;  // bytes from a line to the next, and of all lines of a block
    int64_t left = 0, number = 0, at = 0;

    void step() {
        if (left == 0) return;
        --left;
        if (keys) {
#pragma GCC unroll 4
            for (int i = 0; i < GROUP; ++i) __builtin_prefetch(block[i] + at, 0, 2);
            at += stride;
        } else {
            const char* from = block[number] + at;
#pragma GCC unroll 4
            for (int i = 0; i < GROUP; ++i) __builtin_prefetch(from + 64 * i, 0, 2);
            at += 64 * GROUP;
            if (at >= size) at = 0, ++number;
        }
    }
};
struct NoLines {
    void step() {}
};

// Scores of R rows, `query` [words][R], against B blocks: scores[r][16 b ..] = query[r] . key
template <bool PAIRED, int R, int B, class Ask>
inline void score(const Block<PAIRED>* blocks, const uint32_t* query, int64_t dim, float* scores,
                  Ask& asked) {
    Ask ask = asked;  // in registers
    F16 acc[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[r][b] = F16::zero();
    for (int64_t d = 0; d < (PAIRED ? dim / 2 : dim); ++d, query += R) {
        ask.step();
        if constexpr (PAIRED) {
            Pairs key[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) key[b] = Pairs::load(blocks[b].key + d * blocks[b].key_stride);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Pairs pair = Pairs::set(query[r]);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) acc[r][b] = dot_pairs(acc[r][b], pair, key[b]);
            }
        } else {
            F16 key[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) key[b] = F16::load(blocks[b].key + d * blocks[b].key_stride);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                float number;
                std::memcpy(&number, query + r, 4);
                F16 wide = F16::set(number);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) acc[r][b] = fma(wide, key[b], acc[r][b]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[r][b].store(scores + r * SPLIT + b * BLOCK);
    asked = ask;
}

// mixed[r][0..16 W) (+)= weights[r] . value over some blocks, R rows at a time
template <bool PAIRED, int R, int W, class Ask>
inline void mix(const Block<PAIRED>* blocks, int64_t count, const float* weights, int64_t dim,
                int64_t column, bool more, float* mixed, Ask& asked) {
    Ask ask = asked;
    F16 acc[R][W];
    // Only a single vector may be less than whole.
    bool whole = W > 1 || dim - column >= 16;
    int left = int(dim - column);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const float* from = mixed + r * dim + column + 16 * w;
            acc[r][w] = !more ? F16::zero() : whole ? F16::load(from) : load_some(from, left);
        }
    for (int64_t b = 0; b < count; ++b) {
        for (int64_t t = 0; t < (PAIRED ? BLOCK / 2 : BLOCK); ++t) {
            ask.step();
            if constexpr (PAIRED) {
                const uint16_t* from = blocks[b].value + (t * dim + column) * 2;
                Pairs value[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) value[w] = Pairs::load(from + 32 * w);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    uint32_t pair;
                    const auto* row = reinterpret_cast<const uint16_t*>(weights + r * SPLIT);
                    std::memcpy(&pair, row + b * BLOCK + 2 * t, 4);
                    Pairs weight = Pairs::set(pair);
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) acc[r][w] = dot_pairs(acc[r][w], weight, value[w]);
                }
            } else {
                const float* from = blocks[b].value + t * dim + column;
                F16 value[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w)
                    value[w] = whole ? F16::load(from + 16 * w) : load_some(from, left);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    F16 weight = F16::set(weights[r * SPLIT + b * BLOCK + t]);
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) acc[r][w] = fma(weight, value[w], acc[r][w]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            float* to = mixed + r * dim + column + 16 * w;
            if (whole) acc[r][w].store(to);
            else store_some(acc[r][w], to, left);
        }
    asked = ask;
}

template <bool PAIRED, int R, class Ask>
inline void mix_some(const Block<PAIRED>* blocks, int64_t count, const float* weights, int64_t dim,
                     bool more, float* mixed, Ask& ask) {
    int64_t column = 0;
    for (; column + 16 * MIX_WIDTH <= dim; column += 16 * MIX_WIDTH)
        mix<PAIRED, R, MIX_WIDTH>(blocks, count, weights, dim, column, more, mixed, ask);
    for (; column < dim; column += 16)
        mix<PAIRED, R, 1>(blocks, count, weights, dim, column, more, mixed, ask);
}

template <bool PAIRED, int R = MIX_ROWS, class Ask>
inline void mix_rows(int rows, const Block<PAIRED>* blocks, int64_t count, const float* weights,
                     int64_t dim, bool more, float* mixed, Ask& ask) {
    if (rows > R) {
        mix_some<PAIRED, R>(blocks, count, weights, dim, more, mixed, ask);
        mix_rows<PAIRED>(rows - R, blocks, count, weights + R * SPLIT, dim, more, mixed + R * dim,
                         ask);
    } else if (rows == R) {
        mix_some<PAIRED, R>(blocks, count, weights, dim, more, mixed, ask);
    } else if constexpr (R > 1) {
        mix_rows<PAIRED, R - 1>(rows, blocks, count, weights, dim, more, mixed, ask);
    }
}

// Weights from scores, in place: the row's maximum and the sum of its weights. `scale` has the
// factor log2(e) in it: weights are powers of two.
template <bool PAIRED, class Ask>
inline void soften(float* scores, int64_t count, float scale, float& best, float& total, Ask& ask) {
    F16 top = F16::set(NOTHING);
    for (int64_t b = 0; b < count; ++b) top = max(top, F16::load(scores + b * BLOCK));
    best = max(top);
    F16 factor = F16::set(scale), sums = F16::zero();
    F16 shift = F16::set(best == NOTHING ? 0.0f : -best * scale);
    for (int64_t b = 0; b < count; ++b) {
        ask.step();
        F16 power = fma(F16::load(scores + b * BLOCK), factor, shift), weights;
        if constexpr (PAIRED) {
            weights = exp2_coarse(power);
            // Bf16 weights overwrite the scores from the front. What is summed is what values will
            // be multiplied with, so that roundings of the weights largely cancel.
            weights = store_rounded(weights, reinterpret_cast<uint16_t*>(scores) + b * BLOCK);
        } else {
            weights = exp2(power);
            weights.store(scores + b * BLOCK);
        }
        sums = sums + weights;
    }
    best = best * scale;
    total = sum(sums);
}

// Add a later split to an earlier result, for up to 16 rows: maxima, sums of weights, weighted sums.
inline void merge_rows(int rows, float* best, float* total, float* mixed, const float* best2,
                       const float* total2, const float* mixed2, int64_t dim) {
    alignas(64) float top[16], keep1[16], keep2[16];
    F16 b1 = load_some(best, rows), b2 = load_some(best2, rows), most = max(b1, b2);
    most.store(top);
    exp2(b1 - most).store(keep1);
    exp2(b2 - most).store(keep2);
    for (int r = 0; r < rows; ++r, mixed += dim, mixed2 += dim) {
        if (best2[r] == NOTHING) continue;
        if (best[r] == NOTHING) {
            best[r] = best2[r], total[r] = total2[r];
            std::memcpy(mixed, mixed2, size_t(dim) * 4);
            continue;
        }
        F16 a = F16::set(keep1[r]), b = F16::set(keep2[r]);
        best[r] = top[r], total[r] = total[r] * keep1[r] + total2[r] * keep2[r];
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16)
            fma(F16::load(mixed2 + d), b, F16::load(mixed + d) * a).store(mixed + d);
        if (d < dim) {
            int n = int(dim - d);
            store_some(fma(load_some(mixed2 + d, n), b, load_some(mixed + d, n) * a), mixed + d, n);
        }
    }
}

// What a tile of up to TILE rows needs to know: queries, and the positions that each row sees.
struct Tile {
    int rows;
    const uint32_t* query;  // [words][rows]
    int64_t low[TILE], high[TILE];
};

template <bool PAIRED, int R = TILE, class Ask>
inline void score_rows(const Tile& tile, const Block<PAIRED>* blocks, int64_t count, int64_t dim,
                       float* scores, Ask& ask) {
    constexpr int B = blocks_at_a_time(R);
    if (tile.rows == R) {
        int64_t b = 0;
        for (; b + B <= count; b += B)
            score<PAIRED, R, B>(blocks + b, tile.query, dim, scores + b * BLOCK, ask);
        for (; b < count; ++b)
            score<PAIRED, R, 1>(blocks + b, tile.query, dim, scores + b * BLOCK, ask);
    } else if constexpr (R > 1) {
        score_rows<PAIRED, R - 1>(tile, blocks, count, dim, scores, ask);
    }
}

// Scores of a tile against `count` blocks from position `at` on; what a row does not see is -inf.
template <bool PAIRED, class Ask>
inline void score_tile(const Tile& tile, const Block<PAIRED>* blocks, int64_t count, int64_t at,
                       int64_t dim, float* scores, Ask& ask) {
    score_rows<PAIRED>(tile, blocks, count, dim, scores, ask);
    auto clamp = [](int64_t x) { return int(x < 0 ? 0 : x > BLOCK ? BLOCK : x); };
    for (int r = 0; r < tile.rows; ++r) {
        int64_t low = tile.low[r] - at, high = tile.high[r] - at;  // relative to the first block
        if (low <= 0 && high >= count * BLOCK) continue;
        for (int64_t b = 0; b < count; ++b) {
            if (low <= b * BLOCK && high >= (b + 1) * BLOCK) continue;
            float* row = scores + r * SPLIT + b * BLOCK;
            keep(F16::load(row), clamp(low - b * BLOCK), clamp(high - b * BLOCK), F16::set(NOTHING))
                .store(row);
        }
    }
}

// True if a token of the block that some row of the tile does not see has a value that is infinite
// or NaN: 0 * inf would carry it to that row.
template <bool PAIRED>
bool is_wild(const Tile& tile, const Block<PAIRED>& block, int64_t at, int64_t dim) {
    if (tile.low[tile.rows - 1] <= at && tile.high[0] >= at + BLOCK) return false;
    uint32_t most = 0;  // exponent, as bits of a bf16: a maximum compiles to vectors
    for (int64_t i = 0; i < BLOCK * dim; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, block.value + i, sizeof block.value[i]);
        uint32_t exponent = (PAIRED ? bits : bits >> 16) & 0x7f80;
        most = exponent > most ? exponent : most;
    }
    return most == 0x7f80;
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
    NoLines ask;
    for (int r = 0; r < tile.rows; ++r) {
        for (int64_t b = 0; b < count; ++b)
            seen[size_t(b)] = seen_only<PAIRED>(blocks[b], tile.low[r], tile.high[r],
                                                at + b * BLOCK, dim, spare[size_t(b)]);
        mix_rows<PAIRED, 1>(1, seen.data(), count, weights + r * SPLIT, dim, false, mixed + r * dim,
                            ask);
    }
}

// The blocks of a split that positions [low, high) lie in: first and how many.
struct Span {
    int64_t first, count;
};
inline Span blocks_seen(int64_t low, int64_t high, int64_t split) {
    int64_t begin = split * SPLIT, end = high - begin < SPLIT ? high - begin : SPLIT;
    int64_t first = low > begin ? (low - begin) / BLOCK : 0, last = ceil_div(end, BLOCK);
    return {first, last > first ? last - first : 0};
}

// One tile over one split: per row best[r], total[r], mixed[r].
template <bool PAIRED>
void attend_split(const Attention& a, const Tile& tile, int64_t split, const Block<PAIRED>* blocks,
                  float* best, float* total, float* mixed) {
    alignas(64) float scores[TILE * SPLIT];
    Span span = blocks_seen(tile.low[0], tile.high[tile.rows - 1], split);
    int64_t at = split * SPLIT + span.first * BLOCK, dim = a.pool.value_dim;
    blocks += span.first;
    NoLines ask;
    score_tile<PAIRED>(tile, blocks, span.count, at, a.pool.key_dim, scores, ask);
    for (int r = 0; r < tile.rows; ++r)
        soften<PAIRED>(scores + r * SPLIT, span.count, a.scale, best[r], total[r], ask);
    for (int64_t b = 0; b < span.count; ++b)
        if (is_wild<PAIRED>(tile, blocks[b], at + b * BLOCK, dim))
            return mix_apart<PAIRED>(tile, blocks, span.count, at, scores, dim, mixed);
    mix_rows<PAIRED>(tile.rows, blocks, span.count, scores, dim, false, mixed, ask);
}

// Rows [row, row + rows) of one sequence and KV head: their queries in the form that `score` reads
// (room for MAX_HEAD * rows words), and what they see.
template <bool PAIRED>
Tile make_tile(const Attention& a, int64_t sequence, int64_t head, int64_t row, int rows,
               uint32_t* query) {
    int64_t share = a.num_heads / a.pool.heads, dim = a.pool.key_dim;
    Tile tile;
    tile.rows = rows, tile.query = query;
    for (int r = 0; r < rows; ++r) {
        int64_t at = row + r, token = a.query_indptr[sequence] + at / share;
        const float* from = a.query + (token * a.num_heads + head * share + at % share) * dim;
        uint32_t words[MAX_HEAD + 2 * LANES];
        int64_t count = PAIRED ? dim / 2 : dim;
        row_words(from, PAIRED ? Dtype::bf16 : Dtype::f32, dim, count, words);
        for (int64_t d = 0; d < count; ++d) query[d * rows + r] = words[d];
        tile.high[r] = a.positions[token] + 1;
        tile.low[r] = a.window && tile.high[r] > a.window ? tile.high[r] - a.window : 0;
    }
    return tile;
}

inline Pages pages_of(const Attention& a, int64_t sequence) {
    const Pool& pool = a.pool;
    int64_t start = a.first_page[sequence] * pool.page_size;
    int64_t held = a.indptr[sequence + 1] - a.indptr[sequence];
    return {pool, a.indices + a.indptr[sequence], start,
            start + (held - 1) * pool.page_size + a.last_page_len[sequence]};
}

// The end: weighted sums divided by the sum of weights.
inline void write_row(const Attention& a, int64_t token, int64_t head, float total,
                      const float* mixed) {
    int64_t dim = a.pool.value_dim;
    float* to = a.out + (token * a.num_heads + head) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = mixed[d] / total;
}

// ---- many rows of one head -------------------------------------------------------------------------

template <bool PAIRED>
void prefill_item(const Attention& a, const PrefillItem& item) {
    const Pool& pool = a.pool;
    int64_t dim = pool.value_dim, share = a.num_heads / pool.heads;
    Pages pages = pages_of(a, item.sequence);
    int64_t tiles = ceil_div(item.rows, TILE);
    std::vector<uint32_t> queries(size_t(item.rows * pool.key_dim));
    std::vector<float> state(size_t(item.rows * (dim + 2)));
    std::vector<Tile> tile(static_cast<size_t>(tiles));
    std::vector<float> mixed2(size_t(TILE * dim));
    float *best = state.data(), *total = best + item.rows, *mixed = total + item.rows;
    for (int64_t r = 0; r < item.rows; ++r) best[r] = NOTHING;
    for (int64_t t = 0; t < tiles; ++t) {
        int64_t from = t * TILE, rows = item.rows - from < TILE ? item.rows - from : TILE;
        tile[size_t(t)] = make_tile<PAIRED>(a, item.sequence, item.head, item.row + from, int(rows),
                                            queries.data() + from * pool.key_dim);
    }
    // Blocks outside whole pages are copied: at most a split of them.
    static thread_local std::vector<Spare> spare(SPLIT / BLOCK);
    Block<PAIRED> blocks[SPLIT / BLOCK];
    const Tile &front = tile.front(), &back = tile.back();
    int64_t low = front.low[0], high = back.high[back.rows - 1];
    for (int64_t split = low / SPLIT; split * SPLIT < high; ++split) {
        Span span = blocks_seen(low, high, split);
        for (int64_t b = span.first; b < span.first + span.count; ++b)
            blocks[b] = block_at<PAIRED>(pages, item.head, split * SPLIT + b * BLOCK, spare[size_t(b)]);
        for (int64_t t = 0; t < tiles; ++t) {
            const Tile& now = tile[size_t(t)];
            if (now.low[0] >= (split + 1) * SPLIT || now.high[now.rows - 1] <= split * SPLIT) continue;
            float best2[TILE], total2[TILE];
            attend_split<PAIRED>(a, now, split, blocks, best2, total2, mixed2.data());
            int64_t row = t * TILE;
            merge_rows(now.rows, best + row, total + row, mixed + row * dim, best2, total2,
                       mixed2.data(), dim);
        }
    }
    for (int64_t r = 0; r < item.rows; ++r) {
        int64_t at = item.row + r, token = a.query_indptr[item.sequence] + at / share;
        write_row(a, token, item.head * share + at % share, total[r], mixed + r * dim);
    }
}

void prefill(const Attention& a, const PrefillItem& item) {
    if (a.pool.paired) prefill_item<true>(a, item);
    else prefill_item<false>(a, item);
}

}  // namespace
}  // namespace quire
