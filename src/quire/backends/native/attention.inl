// Attention over pages.
//
// A query row's keys are taken in splits of SPLIT tokens aligned to position 0, whatever the page
// size, chunk or company. Within a split: all scores (keys.inl), their maximum, the weights, the
// weighted sum of values (values.inl); then splits are merged in order (flash-decoding's scheme, with a
// fixed order). A block of keys that a row cannot see adds exact zeros, so it does not matter which
// rows share a tile. Keys and values are read in the forms in which they are stored, chosen apart.
//
// Prefill works through a sequence head by head, for many rows at a time. Decode (decode.inl) walks
// pages, all heads of each, for the one row of each query head. A row's arithmetic is the same in both.

namespace quire {
namespace {

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

// The blocks of a split that positions [low, high) lie in: first and how many.
struct Span {
    int64_t first, count;
};
inline Span blocks_seen(int64_t low, int64_t high, int64_t split) {
    int64_t begin = split * SPLIT, end = high - begin < SPLIT ? high - begin : SPLIT;
    int64_t first = low > begin ? (low - begin) / BLOCK : 0, last = ceil_div(end, BLOCK);
    return {first, last > first ? last - first : 0};
}

// Keys and values of a span of one split and head, the forms in which they are read, and the scales of
// all those values.
struct Blocks {
    const Keys* keys;
    const Values* values;
    const uint16_t* scales;
    Form key_form, value_form;
};

// The second half of `attend_split` for packed values.
template <Form F>
inline void attend_packed(const Weights& w, const Mix& m) {
    NoLines ask;
    StretchWeights weights(weights_room(StretchWeights::size(TILE, m.dim)), w.tile.rows, m.dim);
    soften_packed_rows<F>(w, m.blocks, 0, weights, ask);
    mix_packed_rows<F>(0, w.tile.rows, {m.blocks, 0, m.count, weights, m.dim, false, m.mixed}, ask);
}

// One tile over one split: per row best[r], total[r], mixed[r].
void attend_split(const Attention& a, const Tile& tile, int64_t split, Blocks blocks, float* best,
                  float* total, float* mixed) {
    alignas(64) float scores[TILE * SPLIT];
    Span span = blocks_seen(tile.low[0], tile.high[tile.rows - 1], split);
    int64_t at = split * SPLIT + span.first * BLOCK, dim = a.pool.value.dim;
    NoLines ask;
    score_tile(blocks.key_form, tile, blocks.keys + span.first, span.count, at, a.pool.key.dim,
               scores, ask);
    Weights w{tile, scores, span.count, at, a.scale, blocks.scales + span.first * BLOCK, best, total};
    soften_rows(a.pool.value.form, w, 0, ask);
    Mix m{blocks.values + span.first, 0, span.count, scores, dim, false, true, mixed};
    by_read_form(blocks.value_form, [&](auto form) {
        if constexpr (PACKED<form()>) {
            attend_packed<form()>(w, m);
        } else {
            for (int64_t b = 0; b < span.count; ++b)
                if (is_wild<form()>(tile, m.blocks[b], at + b * BLOCK, dim))
                    return mix_apart<form()>(tile, m, at);
            mix_rows<form()>(0, tile.rows, m, ask);
        }
    });
}

// Rows [row, row + rows) of one sequence and KV head: their queries in the form that `score` reads
// (room for query_room words a row), and what they see.
Tile make_tile(const Attention& a, int64_t sequence, int64_t head, int64_t row, int rows,
               uint32_t* query) {
    int64_t share = a.num_heads / a.pool.heads, dim = a.pool.key.dim;
    Tile tile;
    tile.rows = rows, tile.query = query;
    for (int r = 0; r < rows; ++r) {
        int64_t at = row + r, token = a.query_indptr[sequence] + at / share;
        const float* from = a.query + (token * a.num_heads + head * share + at % share) * dim;
        by_form(a.pool.key.form, [&](auto form) { lay_query<form()>(from, dim, r, tile, query); });
        Sight seen = sight(a.part, a.positions[token], a.window, a.pool.page_size);
        tile.low[r] = seen.low, tile.high[r] = seen.high;
    }
    return tile;
}

// The pages of a part: nothing outside them is read, since it may be of the other kind.
inline Pages pages_of(const Attention& a, int64_t sequence) {
    const int64_t size = a.pool.page_size, first = a.first_page[sequence];
    const int64_t* ids = a.indices + a.indptr[sequence];
    int64_t held = a.indptr[sequence + 1] - a.indptr[sequence];
    int64_t end = (first + held - 1) * size + a.last_page_len[sequence];
    switch (a.part) {
        case Part::sink: return {a.pool, ids, 0, size};
        case Part::packed: {
            int64_t last = a.positions[a.query_indptr[sequence + 1] - 1], skip = first == 0;
            return {a.pool, ids + skip, (first + skip) * size, last / size * size};
        }
        case Part::own:
            return {a.pool, a.open_indices + a.open_indptr[sequence], a.open_first[sequence] * size, end};
        default: return {a.pool, ids, first * size, end};
    }
}

// The end: weighted sums divided by the sum of weights.
inline void write_row(const Attention& a, int64_t token, int64_t head, float total,
                      const float* mixed) {
    int64_t dim = a.pool.value.dim;
    float* to = a.out + (token * a.num_heads + head) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = mixed[d] / total;
}

// ---- many rows of one head -------------------------------------------------------------------------

// The blocks of one head that an item reads, split by split.
struct HeadBlocks {
    Keys keys[SPLIT / BLOCK];
    Values values[SPLIT / BLOCK];
    uint16_t scales[SPLIT];
    std::vector<Spare> spare{2 * SPLIT / BLOCK};  // blocks outside whole pages are copied
    Form key_form, value_form;                    // in which they are read
    Scratch wide;

    // The blocks as they are stored.
    void find(const Pages& pages, int64_t head, int64_t split, Span span) {
        for (int64_t b = span.first; b < span.first + span.count; ++b) {
            int64_t at = split * SPLIT + b * BLOCK;
            keys[b] = keys_at(pages, head, at, spare[size_t(2 * b)]);
            values[b] = values_at(pages, head, at, spare[size_t(2 * b + 1)]);
            if (pages.pool.value.scale) std::memcpy(scales + b * BLOCK, values[b].scale, 2 * BLOCK);
        }
        key_form = pages.pool.key.form, value_form = pages.pool.value.form;
    }
    // The blocks that were found, taken apart for many rows.
    void widen_found(const Pool& pool, Span span) {
        const int64_t key_size = widened_keys(pool.key), value_size = widened_values(pool.value);
        char* to = wide.of((key_size + value_size) * (SPLIT / BLOCK));
        for (int64_t b = span.first; b < span.first + span.count; ++b) {
            if (key_size)
                by_form(pool.key.form, [&](auto form) {
                    if constexpr (WIDE<form()> != form())
                        keys[b] = widen<form()>(keys[b], pool.key.dim, to + b * key_size);
                });
            if (value_size)
                by_form(pool.value.form, [&](auto form) {
                    if constexpr (WIDE<form()> != form())
                        values[b] = widen<form()>(values[b], pool.value.dim,
                                                  to + key_size * (SPLIT / BLOCK) + b * value_size);
                });
        }
        key_form = wide_of(pool.key.form), value_form = wide_of(pool.value.form);
    }
};

// What an item has so far, row by row: maxima, sums of weights, weighted sums.
struct State {
    std::vector<float> numbers;
    float *best, *total, *mixed;
    State(int64_t rows, int64_t dim) : numbers(size_t(rows * (dim + 2))) {
        best = numbers.data(), total = best + rows, mixed = total + rows;
        for (int64_t r = 0; r < rows; ++r) best[r] = NOTHING;
    }
};

// One part of what an item's rows see, merged split by split with what they saw before.
void prefill_part(const Attention& a, const PrefillItem& item, const State& state) {
    const Pool& pool = a.pool;
    int64_t dim = pool.value.dim, room = query_room(pool.key.dim);
    int64_t tiles = ceil_div(item.rows, TILE);
    std::vector<uint32_t> queries(size_t(item.rows * room));
    std::vector<Tile> tile(static_cast<size_t>(tiles));
    std::vector<float> mixed2(size_t(TILE * dim));
    for (int64_t t = 0; t < tiles; ++t) {
        int64_t from = t * TILE, rows = item.rows - from < TILE ? item.rows - from : TILE;
        tile[size_t(t)] = make_tile(a, item.sequence, item.head, item.row + from, int(rows),
                                    queries.data() + from * room);
    }
    static thread_local HeadBlocks blocks;
    const Tile &front = tile.front(), &back = tile.back();
    Pages pages = pages_of(a, item.sequence);
    int64_t low = front.low[0], high = back.high[back.rows - 1];
    for (int64_t split = low / SPLIT; low < high && split * SPLIT < high; ++split) {
        Span span = blocks_seen(low, high, split);
        blocks.find(pages, item.head, split, span);
        if (tiles > 1) blocks.widen_found(pool, span);
        for (int64_t t = 0; t < tiles; ++t) {
            const Tile& now = tile[size_t(t)];
            if (now.low[0] >= (split + 1) * SPLIT || now.high[now.rows - 1] <= split * SPLIT) continue;
            if (now.low[0] >= now.high[now.rows - 1]) continue;
            float best2[16], total2[16];  // merging loads whole vectors
            attend_split(a, now, split,
                         {blocks.keys, blocks.values, blocks.scales, blocks.key_form, blocks.value_form},
                         best2, total2, mixed2.data());
            int64_t row = t * TILE;
            merge_rows(now.rows, state.best + row, state.total + row, state.mixed + row * dim, best2,
                       total2, mixed2.data(), dim);
        }
    }
}

void prefill(const Attention* parts, int count, const PrefillItem& item) {
    const Attention& a = parts[0];
    int64_t dim = a.pool.value.dim, share = a.num_heads / a.pool.heads;
    State state(item.rows, dim);
    for (int part = 0; part < count; ++part) prefill_part(parts[part], item, state);
    for (int64_t r = 0; r < item.rows; ++r) {
        int64_t at = item.row + r, token = a.query_indptr[item.sequence] + at / share;
        write_row(a, token, item.head * share + at % share, state.total[r], state.mixed + r * dim);
    }
}

}  // namespace
}  // namespace quire
