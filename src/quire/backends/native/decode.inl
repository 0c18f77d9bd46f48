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

// A token's query heads of some KV heads as tiles, and room for their scores.
template <bool PAIRED>
struct Heads {
    std::vector<Tile> tile;
    std::vector<int64_t> kv_head, query_head;
    std::vector<uint32_t> queries;

    Heads(const Attention& a, const DecodeItem& item) {
        int64_t share = a.num_heads / a.pool.heads, count = item.head_end - item.head;
        queries.resize(size_t(count * share * a.pool.key_dim));
        static thread_local std::vector<float> room;  // kept: clearing it would cost a pass
        size_t need = size_t(count * share * SPLIT) + 16;
        if (room.size() < need) room.resize(need);
        scores = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) &
                                          ~uintptr_t(63));
        for (int64_t h = item.head; h < item.head_end; ++h)
            for (int64_t r = 0; r < share; r += TILE) {
                int64_t done = (h - item.head) * share + r;
                tile.push_back(make_tile<PAIRED>(a, item.sequence, h, r,
                                                 int(share - r < TILE ? share - r : TILE),
                                                 queries.data() + done * a.pool.key_dim));
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
template <bool PAIRED>
struct SplitBlocks {
    const Pages* pages;
    int64_t at, head, count;
    Block<PAIRED> first[SPLIT / BLOCK];
    bool copied[SPLIT / BLOCK];

    SplitBlocks(const Pages& pages, const DecodeItem& item, const Tile& tile, int64_t split)
        : pages(&pages), head(item.head) {
        Span span = blocks_seen(tile.low[0], tile.high[0], split);
        at = split * SPLIT + span.first * BLOCK, count = span.count;
        for (int64_t b = 0; b < count; ++b) {
            copied[b] = !lies_whole<PAIRED>(pages, at + b * BLOCK);
            first[b] = block_in_place<PAIRED>(pages, head, copied[b] ? pages.start : at + b * BLOCK);
        }
    }
    Block<PAIRED> in_place(int64_t of_head, int64_t b) const {
        const Pool& pool = pages->pool;
        int64_t key = (of_head - head) * pool.key_dim * pool.page_size;
        int64_t value = (of_head - head) * pool.value_dim * pool.page_size;
        return {first[b].key + key, first[b].key_stride, first[b].value + value};
    }
    // `count` blocks of a head from block b on; copies go to `spare`.
    void get(int64_t of_head, int64_t b, int64_t count, Spare* spare, Block<PAIRED>* blocks) const {
        for (int64_t i = 0; i < count; ++i)
            blocks[i] = copied[b + i]
                            ? copy_block<PAIRED>(*pages, of_head, at + (b + i) * BLOCK, spare[i])
                            : in_place(of_head, b + i);
    }
    // The keys or values of the group of blocks from block b on.
    Lines lines(int64_t of_head, int64_t b, bool keys) const {
        constexpr int64_t SIZE = sizeof(typename Block<PAIRED>::Number);
        Lines lines;
        for (int64_t i = 0; i < GROUP; ++i) {
            Block<PAIRED> block = in_place(of_head, b + i < count ? b + i : count - 1);
            lines.block[i] = reinterpret_cast<const char*>(keys ? block.key : block.value);
        }
        lines.left = (keys ? pages->pool.key_dim : pages->pool.value_dim) * BLOCK * SIZE / 64;
        lines.keys = keys, lines.stride = keys ? first[0].key_stride * SIZE : 64;
        lines.size = lines.left * lines.stride;
        return lines;
    }
};

// What is asked for while an item is worked on. A unit is the keys or the values of a group of blocks
// and one head; a split is its keys, head after head and group after group, then its values. The
// units asked for run BYTES_AHEAD ahead of the one in hand.
template <bool PAIRED>
struct UnitsAhead {
    const Heads<PAIRED>& heads;
    const std::vector<SplitBlocks<PAIRED>>& splits;
    size_t split = 0, tile = 0;
    int64_t b = 0;
    bool keys = true;

    UnitsAhead(const Heads<PAIRED>& heads, const std::vector<SplitBlocks<PAIRED>>& splits)
        : heads(heads), splits(splits) {
        for (int64_t asked = 0; asked < BYTES_AHEAD && split < splits.size();) {
            Lines lines = next();
            asked += GROUP * 64 * lines.left;
            while (lines.left) lines.step();
        }
    }
    Lines next() {
        if (split == splits.size()) return {};
        Lines lines = splits[split].lines(heads.kv_head[tile], b, keys);
        if (++tile == heads.tile.size()) tile = 0, b += GROUP;
        if (b >= splits[split].count) {
            b = 0, keys = !keys;
            if (keys) ++split;
        }
        return lines;
    }
};

// A page's heads lie side by side: walking some pages together, head after head, reads memory in as
// many long stretches. Every row's arithmetic is that of `attend_split`.
template <bool PAIRED>
void score_split(const Attention& a, const SplitBlocks<PAIRED>& split, const Heads<PAIRED>& heads,
                 UnitsAhead<PAIRED>& ahead, std::vector<Spare>& spare) {
    Block<PAIRED> blocks[GROUP];
    for (int64_t b = 0; b < split.count; b += GROUP) {
        int64_t count = split.count - b < GROUP ? split.count - b : GROUP;
        for (size_t t = 0; t < heads.tile.size(); ++t) {
            Lines ask = ahead.next();
            split.get(heads.kv_head[t], b, count, spare.data(), blocks);
            score_tile<PAIRED>(heads.tile[t], blocks, count, split.at + b * BLOCK, a.pool.key_dim,
                               heads.scores_of(t) + b * BLOCK, ask);
        }
    }
}

template <bool PAIRED>
void mix_split(const Attention& a, const SplitBlocks<PAIRED>& split, const Heads<PAIRED>& heads,
               UnitsAhead<PAIRED>& ahead, std::vector<Spare>& spare, const Partial& partial) {
    int64_t low = heads.tile[0].low[0], high = heads.tile[0].high[0], dim = a.pool.value_dim;
    Block<PAIRED> blocks[GROUP];
    for (int64_t b = 0; b < split.count; b += GROUP) {
        int64_t count = split.count - b < GROUP ? split.count - b : GROUP;
        for (size_t t = 0; t < heads.tile.size(); ++t) {
            const Tile& tile = heads.tile[t];
            int64_t head = heads.query_head[t];
            Lines ask = ahead.next();
            for (int r = 0; b == 0 && r < tile.rows; ++r)  // only now: memory is busy meanwhile
                soften<PAIRED>(heads.scores_of(t) + r * SPLIT, split.count, a.scale,
                               partial.best[head + r], partial.total[head + r], ask);
            split.get(heads.kv_head[t], b, count, spare.data(), blocks);
            for (int64_t i = 0; i < count; ++i) {
                int64_t at = split.at + (b + i) * BLOCK;
                if (is_wild<PAIRED>(tile, blocks[i], at, dim))
                    blocks[i] = seen_only<PAIRED>(blocks[i], low, high, at, dim, spare[size_t(i)]);
            }
            const auto* weights = reinterpret_cast<const float*>(
                reinterpret_cast<const char*>(heads.scores_of(t)) + b * BLOCK * (PAIRED ? 2 : 4));
            mix_rows<PAIRED>(tile.rows, blocks, count, weights, dim, b > 0,
                             partial.mixed + head * dim, ask);
        }
    }
}

template <bool PAIRED>
void decode_item(const Attention& a, const DecodeItem& item) {
    Heads<PAIRED> heads(a, item);
    const Pages pages = pages_of(a, item.sequence);
    std::vector<SplitBlocks<PAIRED>> splits;
    for (int64_t split = item.split; split < item.split_end; ++split)
        splits.emplace_back(pages, item, heads.tile[0], split);
    UnitsAhead<PAIRED> ahead(heads, splits);
    static thread_local std::vector<Spare> spare(GROUP);
    for (const SplitBlocks<PAIRED>& split : splits) {
        score_split<PAIRED>(a, split, heads, ahead, spare);
        mix_split<PAIRED>(a, split, heads, ahead, spare, Partial(a, item, split.at / SPLIT));
    }
}

// The splits of one token merged in order, for the query heads of some KV heads.
void decode_merge(const Attention& a, const DecodeItem& item) {
    int64_t dim = a.pool.value_dim, share = a.num_heads / a.pool.heads;
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

void decode(const Attention& a, const DecodeItem& item) {
    if (a.pool.paired) decode_item<true>(a, item);
    else decode_item<false>(a, item);
}

}  // namespace
}  // namespace quire
