// The part of the backend that is about pages: tokens into them, sealing them, attention over them.
#include <cmath>

#include "native.hpp"

namespace quire {

void Native::check_slots(const PoolArrays& arrays, const Ints& slots) const {
    int64_t size = arrays.pool.page_size, low = arrays.first_taker() * size;
    int64_t high = arrays.all_pages() * size;
    for (size_t i = 0; i < slots.size(); ++i)
        REQUIRE(slots(i) >= low && slots(i) < high,
                "append: slot " + std::to_string(slots(i)) + " is outside the pool, or not open");
}

void Native::append(PoolArrays& arrays, Ints slots, Floats key, Floats value) {
    const Pool& pool = arrays.taker();
    size_t n = slots.size();
    REQUIRE(key.size() == n * size_t(pool.heads * pool.key.dim) &&
                value.size() == n * size_t(pool.heads * pool.value.dim),
            "append: keys and values do not have one row a slot");
    check_slots(arrays, slots);
    nb::gil_scoped_release released;
    spread(int64_t(n), pool.heads * pool.key.dim * 8, [&](int64_t t) {
        kernels_->append(pool, slots(size_t(t)), key.data() + t * pool.heads * pool.key.dim,
                         value.data() + t * pool.heads * pool.value.dim);
    });
}

void Native::check_seal(const PoolArrays& arrays, const Ints& source, const Ints& target) const {
    int64_t first = arrays.first_taker(), end = arrays.all_pages();
    REQUIRE(source.size() == target.size(), "seal: every page has one target");
    for (size_t i = 0; i < source.size(); ++i)
        REQUIRE(source(i) >= first && source(i) < end && target(i) >= 0 && target(i) < first,
                "seal: page " + std::to_string(source(i)) + " into " + std::to_string(target(i)) +
                    ", but ids of open pages are " + std::to_string(first) + " to " +
                    std::to_string(end - 1) + ", and of others lower");
}

void Native::run_seal(const PoolArrays& arrays, const Ints& source, const Ints& target) {
    const Pool& pool = arrays.pool;
    spread(int64_t(source.size()) * pool.heads, pool.page_size * (pool.key.dim + pool.value.dim) * 4,
           [&](int64_t i) {
               size_t page = size_t(i / pool.heads);
               kernels_->seal(arrays.taker(), source(page), pool, target(page), i % pool.heads);
           });
}

void Native::seal(PoolArrays& arrays, Ints source, Ints target) {
    check_seal(arrays, source, target);
    nb::gil_scoped_release released;
    run_seal(arrays, source, target);
}

Native::Parts Native::attention(const float* query, int64_t heads, const PoolArrays& arrays,
                                const Tables& tables, float* out) const {
    const Pool& pool = arrays.pool;
    REQUIRE(heads > 0 && heads % pool.heads == 0,
            "attend: query heads must be a multiple of KV heads");
    REQUIRE(tables.page_size == pool.page_size && tables.most < arrays.all_pages(),
            "attend: page id " + std::to_string(tables.most) + " is outside the pool of " +
                std::to_string(arrays.all_pages()) + " pages, or page sizes differ");
    constexpr double LOG2_E = 1.4426950408889634;
    Attention all{pool,
                  query,
                  out,
                  tables.places.data(),
                  tables.query_indptr.data(),
                  tables.indptr.data(),
                  tables.indices.data(),
                  tables.last_page_len.data(),
                  tables.first_page.data(),
                  heads,
                  tables.window,
                  float(LOG2_E / std::sqrt(double(pool.key.dim)))};
    if (!arrays.open) return {&arrays, 1, {all, all, all}};
    REQUIRE(tables.open.used() || tables.places.size() == 0,
            "attend: packed pages need the open pages that queries stand in");
    REQUIRE(tables.packed.within(0, pool.num_pages) &&
                tables.opened.within(pool.num_pages, arrays.all_pages()),
            "attend: page 0 and those that queries stand in must be open (ids " +
                std::to_string(pool.num_pages) + " to " + std::to_string(arrays.all_pages() - 1) +
                "), those between packed (lower ids)");
    all.open_indptr = tables.open.indptr.data(), all.open_indices = tables.open.indices.data();
    all.open_first = tables.open.first.data();
    Parts parts{&arrays, 3, {all, all, all}};
    for (int i : {0, 2}) parts.part[i].pool = arrays.open->pool;
    parts.part[0].part = Part::sink, parts.part[1].part = Part::packed, parts.part[2].part = Part::own;
    return parts;
}

void Native::attend(Floats query, PoolArrays& arrays, const Tables& tables, Output out) {
    const Pool& pool = arrays.pool;
    size_t tokens = tables.places.size();
    REQUIRE(query.ndim() == 3 && query.shape(0) == tokens && int64_t(query.shape(2)) == pool.key.dim,
            "attend: query must be [" + std::to_string(tokens) + ", heads, " +
                std::to_string(pool.key.dim) + "]");
    int64_t heads = int64_t(query.shape(1));
    Parts parts = attention(query.data(), heads, arrays, tables, out.data());
    REQUIRE(out.size() == tokens * size_t(heads * pool.value.dim), "attend: out has the wrong size");
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> one(mutex_);
    run_attention(parts, int64_t(tables.last_page_len.size()));
}

void Native::run_attention(const Parts& parts, int64_t sequences) {
    const Attention& a = parts.part[0];
    std::vector<PrefillItem> many;
    std::vector<DecodeItem> one, merges;
    int64_t share = a.num_heads / a.pool.heads, splits = 0;
    for (int64_t s = 0; s < sequences; ++s) {
        int64_t from = a.query_indptr[s], tokens = a.query_indptr[s + 1] - from;
        if (tokens == 1) {
            merges.push_back({s, 0, a.pool.heads, 0, 0, splits_of(parts, a.positions[from]), nullptr});
            splits += merges.back().split_end;
            continue;
        }
        // The dearest, late in a prompt, come first.
        for (int64_t row = (tokens * share - 1) / ROW_BLOCK * ROW_BLOCK; tokens && row >= 0;
             row -= ROW_BLOCK)
            for (int64_t head = 0; head < a.pool.heads; ++head)
                many.push_back({s, head, row,
                                tokens * share - row < ROW_BLOCK ? tokens * share - row : ROW_BLOCK});
    }
    float* partials = room(partials_, splits * partial_size(a));
    for (DecodeItem& merge : merges) {
        merge.partials = partials;
        share_decode(parts, merge, splits, one);
        partials += merge.split_end * partial_size(a);
    }
    threads_.run(int64_t(many.size()),
                 [&](int64_t i) { kernels_->prefill(parts.part, parts.count, many[size_t(i)]); });
    threads_.run(int64_t(one.size()), [&](int64_t i) {
        const DecodeItem& item = one[size_t(i)];
        kernels_->decode(parts.part[item.part], item);
    });
    spread(int64_t(merges.size()), splits * partial_size(a) / (int64_t(merges.size()) + 1),
           [&](int64_t i) { kernels_->decode_merge(a, merges[size_t(i)]); });
}

Native::Span Native::span_of(const Attention& a, int64_t place) const {
    Sight seen = sight(a.part, place, a.window, a.pool.page_size);
    if (seen.low >= seen.high) return {0, 0};
    return {seen.low / SPLIT, (seen.high - 1) / SPLIT + 1};
}

// Splits of all parts of what a query sees.
int64_t Native::splits_of(const Parts& parts, int64_t place) const {
    int64_t count = 0;
    for (int i = 0; i < parts.count; ++i) count += span_of(parts.part[i], place).count();
    return count;
}

// The items that a token's splits are shared out in, of `splits` of all tokens.
void Native::share_decode(const Parts& parts, const DecodeItem& merge, int64_t splits,
                          std::vector<DecodeItem>& items) const {
    // All heads of a page together are one long read; fewer where there is too little to share out.
    const int64_t all = parts.part[0].pool.heads, size = partial_size(parts.part[0]);
    int64_t heads = all;
    while (heads > 1 && splits * ceil_div(all, heads) < 8 * threads()) heads = (heads + 1) / 2;
    // Several splits an item where there are enough: queries are laid out once for them.
    int64_t each = splits / (8 * threads());
    each = each < 1 ? 1 : each > 8 ? 8 : each;
    float* partials = merge.partials;
    for (int part = 0; part < parts.count; ++part) {
        const Attention& a = parts.part[part];
        Span span = span_of(a, a.positions[a.query_indptr[merge.sequence]]);
        for (int64_t split = span.first; split < span.end; split += each)
            for (int64_t head = 0; head < all; head += heads)
                items.push_back({merge.sequence, head, head + heads < all ? head + heads : all,
                                 span.first, split, split + each < span.end ? split + each : span.end,
                                 partials, part});
        partials += span.count() * size;
    }
}

}  // namespace quire
