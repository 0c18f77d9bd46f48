// Blocks of packed numbers: where they lie, or copies of them. Part of blocks.inl.

// Where a number is: a byte of its page and head, and how far up its bits lie in it.
struct Spot {
    int64_t byte;
    int shift;
};
// The field of a word that the i-th of the numbers in it has.
constexpr int field_of(int64_t i, int beside) { return int(i / 2 + i % 2 * (beside / 2)); }

inline Spot spot_of(const Store& store, bool key, int64_t page_size, int64_t d, int64_t token) {
    int bits = packed_bits(store.dtype), n = store.beside;
    if (n > 1) {
        int64_t word = key ? d / n * page_size + token : token / n * store.dim + d;
        int at = field_of(key ? d % n : token % n, n) * bits;
        return {4 * word + at / 8, at % 8};
    }
    int64_t at = key ? (d * page_size + token) * bits
                     : token * (ceil_div(store.dim * bits, 8) * 8) + d * bits;
    return {at / 8, int(at % 8)};
}

inline const char* packed_head(const Pages& pages, const Store& store, int64_t head, int64_t at) {
    return static_cast<const char*>(store.data) + pages.head_of(at, head) * store.head_bytes;
}

inline Keys packed_keys_in_place(const Pages& pages, int64_t head, int64_t at) {
    const Store& store = pages.pool.key;
    const char* from = packed_head(pages, store, head, at);
    int64_t offset = pages.offset(at);
    return {from + 4 * offset, 4 * pages.pool.page_size,
            reinterpret_cast<const uint16_t*>(from + store.payload) + offset / STRETCH * 2 * store.dim};
}

inline Values packed_values_in_place(const Pages& pages, int64_t head, int64_t at) {
    const Store& store = pages.pool.value;
    const char* from = packed_head(pages, store, head, at);
    int64_t offset = pages.offset(at);
    return {from + offset / store.beside * store.dim * 4,
            reinterpret_cast<const uint16_t*>(from + store.payload) + offset, pages.pool.page_size};
}

// Words of a block of 16 tokens, those of dimensions that there are not 0. Pages of packed keys are a
// multiple of 32 tokens, all stored: no block straddles two, and minima and steps are read in place.
template <Form F>
Keys copy_packed_keys(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Store& store = pages.pool.key;
    constexpr int N = BESIDE<F>;
    auto* to = reinterpret_cast<uint32_t*>(spare.number);
    std::memset(to, 0, size_t(key_words<F>(store.dim) * BLOCK) * 4);
    const char* from = packed_head(pages, store, head, at);
    for (int64_t d = 0; d < store.dim; ++d)
        for (int64_t t = 0; t < BLOCK; ++t) {
            Spot spot = spot_of(store, true, pages.pool.page_size, d, pages.offset(at) + t);
            uint32_t number = uint8_t(from[spot.byte]) >> spot.shift & ((1 << BITS<F>) - 1);
            to[d / N * BLOCK + t] |= number << (BITS<F> * field_of(d % N, N));
        }
    return {reinterpret_cast<const char*>(to), 4 * BLOCK, packed_keys_in_place(pages, head, at).scale};
}

template <Form F>
Values copy_packed_values(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Store& store = pages.pool.value;
    constexpr int N = BESIDE<F>;
    const int64_t width = value_words<F>(store.dim), rows = 2 * ceil_div(store.dim, STRETCH);
    auto* to = reinterpret_cast<uint32_t*>(spare.number);
    auto* scale = reinterpret_cast<uint16_t*>(spare.number + MAX_HEAD * BLOCK / 2);
    std::memset(to, 0, size_t(BLOCK / N * width) * 4);
    std::memset(scale, 0, size_t(rows * BLOCK) * 2);
    for (int64_t t = 0; t < BLOCK; ++t) {
        if (at + t < pages.start || at + t >= pages.end) continue;
        const char* from = packed_head(pages, store, head, at + t);
        const int64_t offset = pages.offset(at + t), page_size = pages.pool.page_size;
        for (int64_t d = 0; d < store.dim; ++d) {
            Spot spot = spot_of(store, false, page_size, d, offset);
            uint32_t number = uint8_t(from[spot.byte]) >> spot.shift & ((1 << BITS<F>) - 1);
            to[t / N * width + d] |= number << (BITS<F> * field_of(t % N, N));
        }
        for (int64_t i = 0; i < rows; ++i)  // at odd addresses in pages of odd sizes
            std::memcpy(scale + i * BLOCK + t, from + store.payload + 2 * (i * page_size + offset), 2);
    }
    return {reinterpret_cast<const char*>(to), scale, BLOCK};
}
