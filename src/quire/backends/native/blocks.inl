// Blocks of 16 tokens: where they lie in a pool, or copies of them.

namespace quire {
namespace {

// Copies of one block; slots without a token are zero.
struct Spare {
    alignas(64) float number[MAX_HEAD * BLOCK];
    uint16_t scale[BLOCK];
};

// Where the pages of one sequence are.
struct Pages {
    const Pool& pool;
    const int64_t* ids;
    int64_t start, end;  // stored positions

    int64_t head_of(int64_t position, int64_t head) const {  // among the heads of all pages
        return (ids[(position - start) / pool.page_size] - pool.first) * pool.heads + head;
    }
    int64_t offset(int64_t position) const { return (position - start) % pool.page_size; }

    // True if the tokens [at, at + 16) lie whole inside one page, in the form that is read.
    bool whole(const Store& store, int64_t at) const {
        bool plain = store.dtype == Dtype::f32 || store.form == Form::halves;
        bool form = store.beside > 1 || (plain && pool.page_size % BLOCK == 0);
        return form && at >= start && at + BLOCK <= end;
    }
    const uint16_t* scale(const Store& store, int64_t at, int64_t head) const {
        return store.scale ? store.scale + head_of(at, head) * pool.page_size + offset(at) : nullptr;
    }
};

template <Form F>
inline Number<F> number(const Store& store, int64_t i) {
    if constexpr (F == Form::floats) {
        if (store.dtype == Dtype::f32) return static_cast<const float*>(store.data)[i];
        return bf16_to_float(static_cast<const uint16_t*>(store.data)[i]);
    } else {
        return static_cast<const Number<F>*>(store.data)[i];
    }
}

template <Form F>
Keys copy_keys(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Pool& pool = pages.pool;
    const Store& store = pool.key;
    constexpr int N = BESIDE<F>;
    auto* to = reinterpret_cast<Number<F>*>(spare.number);
    std::memset(to, 0, sizeof(*to) * size_t(key_words<F>(store.dim) * N * BLOCK));
    for (int64_t t = 0; t < BLOCK; ++t) {
        spare.scale[t] = 0;
        if (at + t < pages.start || at + t >= pages.end) continue;
        int64_t page = pages.head_of(at + t, head), offset = pages.offset(at + t);
        int64_t from = page * store.dim * pool.page_size;
        for (int64_t d = 0; d < store.dim; ++d)
            to[(d / N * BLOCK + t) * N + d % N] = number<F>(store, from + pool.key_at(d, offset));
        if (SCALED<F>) spare.scale[t] = *pages.scale(store, at + t, head);
    }
    return {reinterpret_cast<const char*>(to), int64_t(sizeof(*to)) * BLOCK * N, spare.scale};
}

template <Form F>
Values copy_values(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    const Pool& pool = pages.pool;
    const Store& store = pool.value;
    constexpr int N = BESIDE<F>;
    const int64_t width = value_words<F>(store.dim);
    auto* to = reinterpret_cast<Number<F>*>(spare.number);
    std::memset(to, 0, sizeof(*to) * size_t(width * BLOCK));
    for (int64_t t = 0; t < BLOCK; ++t) {
        spare.scale[t] = 0;
        if (at + t < pages.start || at + t >= pages.end) continue;
        int64_t page = pages.head_of(at + t, head), offset = pages.offset(at + t);
        int64_t from = page * store.dim * pool.page_size;
        for (int64_t d = 0; d < store.dim; ++d)
            to[(t / N * width + d) * N + t % N] = number<F>(store, from + pool.value_at(d, offset));
        if (SCALED<F>) spare.scale[t] = *pages.scale(store, at + t, head);
    }
    return {reinterpret_cast<const char*>(to), spare.scale};
}

#include "packed_blocks.inl"

// Bytes of a number as it is stored.
inline int64_t width(const Store& store) {
    return store.dtype == Dtype::f32 ? 4 : store.scale ? 1 : 2;
}

inline Keys keys_in_place(const Pages& pages, int64_t head, int64_t at) {
    const Store& store = pages.pool.key;
    if (store.packed()) return packed_keys_in_place(pages, head, at);
    int64_t size = width(store), n = store.beside, page_size = pages.pool.page_size;
    const char* data = static_cast<const char*>(store.data) +
                       (pages.head_of(at, head) * store.dim * page_size + pages.offset(at) * n) * size;
    return {data, page_size * n * size, pages.scale(store, at, head)};
}

inline Values values_in_place(const Pages& pages, int64_t head, int64_t at) {
    const Store& store = pages.pool.value;
    if (store.packed()) return packed_values_in_place(pages, head, at);
    int64_t first = (pages.head_of(at, head) * pages.pool.page_size + pages.offset(at)) * store.dim;
    return {static_cast<const char*>(store.data) + first * width(store),
            pages.scale(store, at, head)};
}

// The block of tokens [at, at + 16): in place, or a copy.
inline Keys keys_at(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    if (pages.whole(pages.pool.key, at)) return keys_in_place(pages, head, at);
    return by_form(pages.pool.key.form,
                   [&](auto form) {
                       if constexpr (PACKED<form()>) return copy_packed_keys<form()>(pages, head, at, spare);
                       else return copy_keys<form()>(pages, head, at, spare);
                   });
}
inline Values values_at(const Pages& pages, int64_t head, int64_t at, Spare& spare) {
    if (pages.whole(pages.pool.value, at)) return values_in_place(pages, head, at);
    return by_form(pages.pool.value.form,
                   [&](auto form) {
                       if constexpr (PACKED<form()>) return copy_packed_values<form()>(pages, head, at, spare);
                       else return copy_values<form()>(pages, head, at, spare);
                   });
}

constexpr int GROUP = 4;  // blocks of one head that are worked on before the next head's

// Lines of a group of blocks that will be worked on later, asked for in the order in which they will be
// read: of keys side by side, of values block after block; GROUP lines a step.
struct Lines {
    const char* block[GROUP];
    bool keys;
    int64_t stride, size;  // bytes from a line to the next, and of all lines of a block
    int64_t left = 0, number = 0, at = 0;

    __attribute__((always_inline)) void step() {
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

}  // namespace
}  // namespace quire
