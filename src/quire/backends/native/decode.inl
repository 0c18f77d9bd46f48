// Decode attention: one token of a sequence, all heads of a page together. A row's arithmetic is that
// of attention.inl.

namespace quire {
namespace {

// What one split of one token gives: of every query head the maximum, the sum of weights and the
// weighted sum of values.
struct Partial {
    float *best, *total, *mixed;
    Partial(const Attention& a, const DecodeItem& item, int64_t split)
        : best(item.partials + (split - item.first_split) * partial_size(a)),
          total(best + a.num_heads), mixed(total + a.num_heads) {}
};

constexpr int64_t BYTES_AHEAD = 32 << 10;  // asked for ahead of what is worked on

// A token's query heads of some KV heads as tiles, and room for their scores.
struct Heads {
    std::vector<Tile> tile;
    std::vector<int64_t> kv_head, query_head;
    std::vector<uint32_t> queries;

    Heads(const Attention& a, const DecodeItem& item) {
        int64_t share = a.num_heads / a.pool.heads, count = item.head_end - item.head;
        int64_t words = query_room(a.pool.key.dim);
        queries.resize(size_t(count * share * words));
        static thread_local std::vector<float> room;  // kept: clearing it would cost a pass
        size_t need = size_t(count * share * SPLIT) + 16;
        if (room.size() < need) room.resize(need);
        scores = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) &
                                          ~uintptr_t(63));
        for (int64_t h = item.head; h < item.head_end; ++h)
            for (int64_t r = 0; r < share; r += TILE) {
                int64_t done = (h - item.head) * share + r;
                tile.push_back(make_tile(a, item.sequence, h, r,
                                         int(share - r < TILE ? share - r : TILE),
                                         queries.data() + done * words));
                kv_head.push_back(h), query_head.push_back(h * share + r);
            }
        first = query_head[0];
    }
    float* scores_of(size_t t) const { return scores + (query_head[t] - first) * SPLIT; }

private:
    int64_t first;
    float* scores;
};

// The blocks of a span of one split, for every head: where the first head's lie, found once; the
// others lie beside them, but for blocks that have to be copied.
struct SplitBlocks {
    const Pages* pages;
    int64_t at, head, count;
    int64_t key_size, value_size;  // bytes of one head in a page
    Keys keys[SPLIT / BLOCK];
    Values values[SPLIT / BLOCK];
    bool copied_keys[SPLIT / BLOCK], copied_values[SPLIT / BLOCK];
    // Of packed numbers where the share of each block's stretch begins; null of what is copied.
    struct Shares {
        const char* begin[SPLIT / BLOCK];
        int64_t steps;  // of GROUP lines
    } key_shares, value_shares;

    SplitBlocks(const Pages& pages, const DecodeItem& item, const Tile& tile, int64_t split)
        : pages(&pages),
          head(item.head),
          key_size(size_of(pages.pool.key)),
          value_size(size_of(pages.pool.value)) {
        Span span = blocks_seen(tile.low[0], tile.high[0], split);
        at = split * SPLIT + span.first * BLOCK, count = span.count;
        for (int64_t b = 0; b < count; ++b) {
            copied_keys[b] = !pages.whole(pages.pool.key, at + b * BLOCK);
            copied_values[b] = !pages.whole(pages.pool.value, at + b * BLOCK);
            keys[b] = keys_in_place(pages, head, copied_keys[b] ? pages.start : at + b * BLOCK);
            values[b] = values_in_place(pages, head, copied_values[b] ? pages.start : at + b * BLOCK);
        }
        if (pages.pool.key.packed()) find_shares(pages.pool.key, copied_keys, key_shares);
        if (pages.pool.value.packed()) find_shares(pages.pool.value, copied_values, value_shares);
    }
    void find_shares(const Store& store, const bool* copied, Shares& shares) const {
        int64_t size = pages->pool.page_size, tokens = size < STRETCH ? size : STRETCH;
        int64_t share = store.head_bytes * tokens / size;
        shares.steps = ceil_div(share, 64 * GROUP);
        for (int64_t b = 0; b < count; ++b) {
            int64_t place = at + b * BLOCK;
            shares.begin[b] = copied[b] ? nullptr
                                        : packed_head(*pages, store, head, place) +
                                              pages->offset(place) / tokens * share;
        }
    }
    int64_t size_of(const Store& store) const {
        return store.packed() ? store.head_bytes : store.dim * width(store) * pages->pool.page_size;
    }
    const uint16_t* scale_of(const Store& store, const uint16_t* first, int64_t of_head) const {
        int64_t each = store.packed() ? store.head_bytes / 2 : pages->pool.page_size;
        return first ? first + (of_head - head) * each : nullptr;
    }
    Keys keys_of(int64_t of_head, int64_t b) const {
        return {keys[b].data + (of_head - head) * key_size, keys[b].stride,
                scale_of(pages->pool.key, keys[b].scale, of_head)};
    }
    Values values_of(int64_t of_head, int64_t b) const {
        return {values[b].data + (of_head - head) * value_size,
                scale_of(pages->pool.value, values[b].scale, of_head), values[b].stride};
    }
    // `n` blocks of a head from block b on; copies go to `spare`.
    void get(int64_t of_head, int64_t b, int64_t n, Spare* spare, Keys* to) const {
        for (int64_t i = 0; i < n; ++i)
            to[i] = copied_keys[b + i] ? keys_at(*pages, of_head, at + (b + i) * BLOCK, spare[i])
                                       : keys_of(of_head, b + i);
    }
    void get(int64_t of_head, int64_t b, int64_t n, Spare* spare, Values* to) const {
        for (int64_t i = 0; i < n; ++i)
            to[i] = copied_values[b + i] ? values_at(*pages, of_head, at + (b + i) * BLOCK, spare[i])
                                         : values_of(of_head, b + i);
    }
    // Scales of all values of a head.
    void get_scales(int64_t of_head, uint16_t* to) const {
        if (!pages->pool.value.scale) return;
        for (int64_t b = 0; b < count; ++b) {
            if (!copied_values[b]) {
                std::memcpy(to + b * BLOCK, values_of(of_head, b).scale, 2 * BLOCK);
                continue;
            }
            for (int64_t t = at + b * BLOCK; t < at + (b + 1) * BLOCK; ++t)
                to[t - at] = t >= pages->start && t < pages->end
                                 ? *pages->scale(pages->pool.value, t, of_head)
                                 : 0;
        }
    }
    // The keys or values of the group of blocks from block b on.
    Lines lines(int64_t of_head, int64_t b, bool of_keys) const {
        Lines lines;
        if ((of_keys ? pages->pool.key : pages->pool.value).packed())
            return packed_lines(of_head, b, of_keys);
        for (int64_t i = 0; i < GROUP; ++i) {
            int64_t n = b + i < count ? b + i : count - 1;
            lines.block[i] = of_keys ? keys[n].data + (of_head - head) * key_size
                                     : values[n].data + (of_head - head) * value_size;
        }
        // Words of keys that take less than a line, in pages that hold nothing else, are asked for by lines.
        int64_t page_size = pages->pool.page_size, stride = of_keys ? keys[0].stride : 64;
        int64_t size = (of_keys ? key_size : value_size) / page_size * BLOCK;
        lines.left = stride < 64 || !of_keys ? size / 64 : key_size / stride;
        lines.keys = of_keys, lines.stride = stride < 64 ? 64 : stride;
        lines.size = lines.left * lines.stride;
        return lines;
    }
    // Packed numbers are asked for a stretch of tokens at a time, each as its share of page and head, in
    // which minima and steps are: in pages of one stretch these are the lines that it needs.
    Lines packed_lines(int64_t of_head, int64_t b, bool of_keys) const {
        const Shares& shares = of_keys ? key_shares : value_shares;
        Lines lines;
        int64_t n = 0, end = b + GROUP < count ? b + GROUP : count;
        for (int64_t i = b; i < end; ++i)
            if (shares.begin[i] && (i == b || shares.begin[i] != shares.begin[i - 1]))
                lines.block[n++] = shares.begin[i] + (of_head - head) * (of_keys ? key_size : value_size);
        lines.keys = false, lines.stride = 64, lines.size = shares.steps * 64 * GROUP;
        lines.left = n * shares.steps;
        return lines;
    }
    // Asks for the scales of keys and values of the group, which are needed before its values are: each
    // line of the cache once, with the first head whose scales lie in it.
    void ask_scales(int64_t of_head, int64_t b) const {
        for (int64_t i = b; i < b + GROUP && i < count; ++i)
            for (auto [store, first] : {std::pair{&pages->pool.key, keys[i].scale},
                                        std::pair{&pages->pool.value, values[i].scale}}) {
                if (!first || store->packed()) continue;
                const uint16_t* scale = scale_of(*store, first, of_head);
                if (of_head == head || reinterpret_cast<uintptr_t>(scale) % 64 == 0)
                    __builtin_prefetch(scale, 0, 2);
            }
    }
};

// What is asked for while an item is worked on. A unit is the keys or the values of a group of blocks
// and one head; a pass is some heads' keys of a split, head after head and group after group, then their
// values. The units asked for run BYTES_AHEAD ahead of the one in hand.
struct UnitsAhead {
    const Heads& heads;
    const std::vector<SplitBlocks>& splits;
    const size_t pass;  // heads of a pass
    size_t split = 0, first = 0, tile = 0;
    int64_t b = 0;
    bool keys = true;

    UnitsAhead(const Heads& heads, const std::vector<SplitBlocks>& splits, size_t pass)
        : heads(heads), splits(splits), pass(pass) {
        for (int64_t asked = 0; asked < BYTES_AHEAD && split < splits.size();) {
            Lines lines = next();
            asked += GROUP * 64 * lines.left;
            while (lines.left) lines.step();
        }
    }
    Lines next() {
        if (split == splits.size()) return {};
        Lines lines = splits[split].lines(heads.kv_head[tile], b, keys);
        if (keys) splits[split].ask_scales(heads.kv_head[tile], b);
        if (++tile == first + pass) tile = first, b += GROUP;
        if (b >= splits[split].count) {
            b = 0, keys = !keys;
            if (keys) tile = first += pass;
            if (first == heads.tile.size()) tile = first = 0, ++split;
        }
        return lines;
    }
};

// A page's heads lie side by side: walking some pages together, head after head, reads memory in as
// many long stretches. Every row's arithmetic is that of `attend_split`. Tiles [first, last).
void score_split(const Attention& a, const SplitBlocks& split, const Heads& heads, size_t first,
                 size_t last, UnitsAhead& ahead, std::vector<Spare>& spare) {
    Keys blocks[GROUP];
    for (int64_t b = 0; b < split.count; b += GROUP) {
        int64_t count = split.count - b < GROUP ? split.count - b : GROUP;
        for (size_t t = first; t < last; ++t) {
            Lines ask = ahead.next();
            split.get(heads.kv_head[t], b, count, spare.data(), blocks);
            score_tile(a.pool.key.form, heads.tile[t], blocks, count, split.at + b * BLOCK,
                       a.pool.key.dim, heads.scores_of(t) + b * BLOCK, ask);
        }
    }
}

// One group of blocks of packed values and one tile, whose groups follow each other.
template <class Ask>
void mix_packed_split(const Attention& a, const SplitBlocks& split, const Heads& heads, size_t t,
                      int64_t b, std::vector<Spare>& spare, const Partial& partial, Ask& ask) {
    const Tile& tile = heads.tile[t];
    int64_t head = heads.query_head[t], dim = a.pool.value.dim;
    StretchWeights weights(weights_room(StretchWeights::size(TILE, dim)), tile.rows, dim);
    Values blocks[SPLIT / BLOCK];
    by_form(a.pool.value.form, [&](auto form) {
        if constexpr (PACKED<form()>) {
            if (b == 0) {
                split.get(heads.kv_head[t], 0, split.count, spare.data(), blocks);
                soften_packed_rows<form()>({tile, heads.scores_of(t), split.count, split.at, a.scale,
                                            nullptr, partial.best + head, partial.total + head},
                                           blocks, 0, weights, ask);
            }
            int64_t count = split.count - b < GROUP ? split.count - b : GROUP;
            split.get(heads.kv_head[t], b, count, spare.data(), blocks);
            mix_packed_rows<form()>(0, tile.rows,
                                    {blocks, b, count, weights, dim, b > 0, partial.mixed + head * dim},
                                    ask);
        }
    });
}

void mix_split(const Attention& a, const SplitBlocks& split, const Heads& heads, size_t first,
               size_t last, UnitsAhead& ahead, std::vector<Spare>& spare, const Partial& partial) {
    int64_t low = heads.tile[0].low[0], high = heads.tile[0].high[0], dim = a.pool.value.dim;
    const bool packed = a.pool.value.packed();
    Values blocks[GROUP];
    alignas(64) uint16_t scales[SPLIT];
    for (int64_t b = 0; b < split.count; b += GROUP) {
        int64_t count = split.count - b < GROUP ? split.count - b : GROUP;
        for (size_t t = first; t < last; ++t) {
            const Tile& tile = heads.tile[t];
            int64_t head = heads.query_head[t];
            float* scores = heads.scores_of(t);
            Lines ask = ahead.next();
            if (packed) {
                mix_packed_split(a, split, heads, t, b, spare, partial, ask);
                continue;
            }
            if (b == 0) {  // only now: memory is busy meanwhile
                split.get_scales(heads.kv_head[t], scales);
                soften_rows(a.pool.value.form, {tile, scores, split.count, split.at, a.scale, scales,
                                                partial.best + head, partial.total + head}, 0, ask);
            }
            split.get(heads.kv_head[t], b, count, spare.data(), blocks);
            by_form(a.pool.value.form, [&](auto form) {
                if constexpr (!PACKED<form()>) {
                    for (int64_t i = 0; i < count; ++i) {
                        int64_t at = split.at + (b + i) * BLOCK;
                        if (is_wild<form()>(tile, blocks[i], at, dim))
                            blocks[i] =
                                seen_only<form()>(blocks[i], low, high, at, dim, spare[size_t(i)]);
                    }
                    mix_rows<form()>(0, tile.rows,
                                     {blocks, b, count, scores, dim, b > 0, b + count == split.count,
                                      partial.mixed + head * dim}, ask);
                }
            });
        }
    }
}

void decode(const Attention& a, const DecodeItem& item) {
    Heads heads(a, item);
    const Pages pages = pages_of(a, item.sequence);
    std::vector<SplitBlocks> splits;
    for (int64_t split = item.split; split < item.split_end; ++split)
        splits.emplace_back(pages, item, heads.tile[0], split);
    // Packed pages are short reads anyway: head by head, scores and weights stay in the first cache.
    bool apart = a.pool.key.packed() || a.pool.value.packed();
    const size_t pass = apart ? 1 : heads.tile.size();
    UnitsAhead ahead(heads, splits, pass);
    static thread_local std::vector<Spare> spare(SPLIT / BLOCK);
    for (const SplitBlocks& split : splits) {
        for (size_t first = 0; first < heads.tile.size(); first += pass) {
            score_split(a, split, heads, first, first + pass, ahead, spare);
            mix_split(a, split, heads, first, first + pass, ahead, spare,
                      Partial(a, item, split.at / SPLIT));
        }
    }
}

// The splits of one token merged in order, for the query heads of some KV heads.
void decode_merge(const Attention& a, const DecodeItem& item) {
    int64_t dim = a.pool.value.dim, share = a.num_heads / a.pool.heads;
    Partial first(a, item, item.first_split);
    int64_t end = item.head_end * share;
    for (int64_t head = item.head * share; head < end; head += 16) {
        int rows = int(end - head < 16 ? end - head : 16);
        for (int64_t split = item.first_split + 1; split < item.split_end; ++split) {
            Partial next(a, item, split);
            merge_rows(rows, first.best + head, first.total + head, first.mixed + head * dim,
                       next.best + head, next.total + head, next.mixed + head * dim, dim);
        }
        for (int64_t h = head; h < head + rows; ++h)
            write_row(a, a.query_indptr[item.sequence], h, first.total[h], first.mixed + h * dim);
    }
}

}  // namespace
}  // namespace quire
