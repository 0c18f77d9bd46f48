// The kernels of one variant: plain functions over raw memory, each doing one item of work.
//
// Nothing here allocates, locks or checks: module.cpp checks arguments and splits work over threads.
// Shapes are in the comments; all matrices are row-major.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace quire {

// f8: e4m3fn; i4 and i2: numbers packed into bytes, page by page
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, f8 = 4, i4 = 5, i2 = 6 };

constexpr int PANEL = 32;       // output columns that one item of a linear layer computes
constexpr int CHUNK = 1024;     // words along K whose lanes are summed before the next chunk's
constexpr int BLOCK = 16;       // tokens that fill a vector
constexpr int SPLIT = 256;      // tokens whose softmax is computed at a time, aligned to position 0
constexpr int ROW_BLOCK = 96;   // query rows of one item of prefill
constexpr int MAX_HEAD = 512;   // largest head dimension
constexpr int STRETCH = 32;     // packed numbers that share a minimum and a step

// Words of a row of k numbers: pairs of bf16 or floats, padded with zeros to whole vectors.
constexpr int64_t words_of(Dtype dtype, int64_t k) {
    return ((dtype == Dtype::bf16 ? (k + 1) / 2 : k) + 15) / 16 * 16;
}

// Words of one lane of a packed panel; the padding keeps lanes out of each other's cache sets.
constexpr int64_t lane_stride(int64_t steps) { return steps * PANEL + 16; }

// What many rows do with a result at once: nothing, other + result, or activation(other) * result.
enum class Join : int { none, add, gate };

// y [m, n] = x [m, k] @ weight [n, k]^T + bias [n]. x comes as words: pairs of bf16 for bf16 weights,
// else floats; row by row at `x_stride` words (off the powers of two that would put all rows into one
// set of the cache), made by `row_words` for few rows, by `lane_words` for many.
struct Linear {
    const void* weight;
    Dtype dtype;
    int64_t m, n, k;
    const uint32_t* x;
    int64_t x_stride;
    const float* bias;
    float* y;
    Join join = Join::none;        // many rows only
    const float* other = nullptr;  // [m, n]
    int activation = 0;
};

// How stored keys or values are multiplied: as floats, of which fp16 numbers (halves) become some in
// registers, as pairs of bf16, as bytes that have a scale for each token and head, or as packed numbers.
// The wide forms are never stored: bytes as registers hold them (widened.inl).
enum class Form : int { floats, halves, pairs, int8, fp8, wide_int8, wide_fp8, int4, int2 };

// Bits of a packed number; 0 of others.
constexpr int packed_bits(Dtype dtype) { return dtype == Dtype::i4 ? 4 : dtype == Dtype::i2 ? 2 : 0; }

// Keys, or values, of one layer's pages. Keys are dimension-major inside a page, so that scores of
// consecutive tokens fill a vector; `beside` numbers that are multiplied by the same word lie side by
// side (2 of bf16, 4 bytes, where a page holds whole blocks, else 1):
//   keys    [page, head, dim / beside, page_size, beside]
//   values  [page, head, page_size / beside, dim, beside]
// Int8 numbers are stored with 128 added.
//
// Packed numbers lie n = 32 / bits to a word of 32 bits, of dimensions 2i and 2i + 1 (values: tokens) in
// its halves, those of i = 0 lowest, and behind each page and head its minima and steps, bf16:
//   keys    [page, head]: words [dim / n, page_size], then [page_size / 32, minimum and step, dim]
//   values  [page, head]: words [page_size / n, dim], then [ceil(dim / 32), minimum and step, page_size]
// Where dim is no multiple of n (values: of 16), or a page of 16, a stream of bits takes the words' place:
// keys [dim, page_size], values [page_size, dim padded to whole bytes].
struct Store {
    void* data;
    uint16_t* scale;  // bf16 [page, head, page_size]; null of numbers that have none
    Dtype dtype;
    int64_t dim;
    Form form = Form::floats;
    int beside = 1;
    int64_t payload = 0, head_bytes = 0;  // packed, of a page and head: without, and with minima and steps

    bool packed() const { return packed_bits(dtype) != 0; }
};

struct Pool {
    Store key, value;
    int64_t num_pages, page_size, heads;
    int64_t first = 0;  // id of its first page

    int64_t key_at(int64_t d, int64_t token) const {  // within a page and head
        int64_t n = key.beside;
        return (d / n * page_size + token) * n + d % n;
    }
    int64_t value_at(int64_t d, int64_t token) const {
        int64_t n = value.beside;
        return (token / n * value.dim + d) * n + token % n;
    }
};

inline void settle_packed(Store& store, bool key, int64_t page_size) {
    int bits = packed_bits(store.dtype), beside = 32 / bits;
    bool words = page_size % BLOCK == 0 && store.dim % (key ? beside : BLOCK) == 0;
    store.form = bits == 4 ? Form::int4 : Form::int2;
    store.beside = words ? beside : 1;
    store.payload = key ? store.dim * page_size * bits / 8 : page_size * ((store.dim * bits + 7) / 8);
    int64_t stretches = key ? page_size / STRETCH * store.dim
                            : (store.dim + STRETCH - 1) / STRETCH * page_size;
    store.head_bytes = store.payload + 4 * stretches;
}

// The pool with forms and layouts that follow from its dtypes and sizes.
inline Pool settled(Pool pool) {
    bool pairs = pool.key.dim % 2 == 0 && pool.value.dim % BLOCK == 0;
    bool whole = pool.page_size % BLOCK == 0;
    for (Store* store : {&pool.key, &pool.value}) {
        if (store->packed()) {
            settle_packed(*store, store == &pool.key, pool.page_size);
            continue;
        }
        bool bytes = store->dtype == Dtype::i8 || store->dtype == Dtype::f8;
        store->form = store->dtype == Dtype::i8            ? Form::int8
                      : store->dtype == Dtype::f8          ? Form::fp8
                      : store->dtype == Dtype::f16         ? Form::halves
                      : pairs && store->dtype == Dtype::bf16 ? Form::pairs
                                                           : Form::floats;
        int64_t multiple = store == &pool.key ? 4 : BLOCK;
        store->beside = !whole                                 ? 1
                        : store->form == Form::pairs           ? 2
                        : bytes && store->dim % multiple == 0  ? 4
                                                               : 1;
    }
    return pool;
}

// What of its tokens a query sees in one pass: all; or, of pages of two kinds, page 0 (open), the packed
// pages between it and its own, or its own (open). Which these are depends on the query's place alone.
enum class Part : int { all, sink, packed, own };

struct Sight {
    int64_t low, high;
};
inline Sight sight(Part part, int64_t place, int64_t window, int64_t page_size) {
    int64_t low = window && place >= window ? place - window + 1 : 0;
    int64_t page = place / page_size * page_size;  // where its own begins
    switch (part) {
        case Part::sink: return {low, page ? page_size : 0};
        case Part::packed: return {low > page_size ? low : page_size, page};
        case Part::own: return {low > page ? low : page, place + 1};
        default: return {low, place + 1};
    }
}

// Queries [tokens, num_heads, key_dim] of one step over the pages of a layer group. Pages of two kinds
// take several, that differ in `part`, pool and page tables, and whose results are merged in order.
struct Attention {
    Pool pool;
    const float* query;
    float* out;                    // [tokens, num_heads, value_dim]
    const int64_t* positions;      // [tokens]
    const int64_t* query_indptr;   // [sequences + 1]
    const int64_t* indptr;         // [sequences + 1]
    const int64_t* indices;        // page ids
    const int64_t* last_page_len;  // [sequences]
    const int64_t* first_page;     // [sequences]
    int64_t num_heads, window;     // window 0: none
    float scale;                   // of scores, times log2(e)
    Part part = Part::all;
    const int64_t* open_indptr = nullptr;   // [sequences + 1]; of the part `own` only
    const int64_t* open_indices = nullptr;  // ids of the pages that queries stand in
    const int64_t* open_first = nullptr;    // [sequences] the number of the first of them
};
constexpr int MOST_PARTS = 3;

// Rows [row, row + rows) of one sequence and KV head. A row is a (token, query head) pair,
// token-major.
struct PrefillItem {
    int64_t sequence, head, row, rows;
};

// The one new token of a sequence and KV heads [head, head_end), over splits [split, split_end).
// What each split gives goes to `partials`, one `partial_size` after another from `first_split` on;
// merging reads them all.
struct DecodeItem {
    int64_t sequence, head, head_end, first_split, split, split_end;
    float* partials;
    int part = 0;
};

inline int64_t partial_size(const Attention& a) { return a.num_heads * (a.pool.value.dim + 2); }

// What is known of pages of a pool, and of one token's query (select.inl).
struct PageScores {
    const void *known, *query;
    const int64_t* pages;
    int64_t count, heads, share, size, words;  // size: numbers of bounds, or tokens of a page
    float* out;                                // [heads, count]
};

struct Kernels {
    const char* name;
    // Both give the same bits; few: outputs [column, column + columns) of all rows. `next`: rows of
    // weights, as long as these, that this thread will probably read next, or null.
    void (*linear_few)(const Linear&, int64_t column, int64_t columns, const void* next);
    void (*linear_many)(const Linear&, int64_t panel, int64_t panel_end, int64_t row,
                        int64_t row_end);
    void (*row_words)(const float* x, Dtype dtype, int64_t k, int64_t stride, uint32_t* out);
    void (*lane_words)(const float* x, Dtype dtype, int64_t k, uint32_t* out);
    void (*prefill)(const Attention* parts, int count, const PrefillItem&);
    void (*decode)(const Attention&, const DecodeItem&);
    void (*decode_merge)(const Attention&, const DecodeItem&);
    void (*append)(const Pool&, int64_t slot, const float* key, const float* value);  // one token
    // One head of an open page into a packed one: ids among the pages of each pool.
    void (*seal)(const Pool& open, int64_t from, const Pool& packed, int64_t to, int64_t head);
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                       float* y);
    void (*rope)(const float* x, const float* cos, const float* sin, int64_t half, float* y);
    void (*hadamard)(const float* x, int64_t n, float* y);  // of one head's n numbers
    void (*activate)(const float* x, int kind, int64_t n, float* y);
    void (*multiply)(const float* x, const float* z, int64_t n, float* y);
    void (*add)(const float* x, const float* z, int64_t n, float* y);
    void (*widen)(const void* x, Dtype dtype, int64_t n, float* y);
    // The machine's limits: read every byte; do `steps` rounds of multiply-adds in registers.
    float (*read)(const uint8_t* x, int64_t bytes);
    float (*multiply_add)(int64_t steps);
    // Scores of pages [first, end) of those asked for.
    void (*score_bounds)(const PageScores&, int64_t first, int64_t end);
    void (*score_signatures)(const PageScores&, int64_t first, int64_t end);
};

constexpr int PROBE_CHAINS = 24;  // independent multiply-adds of a round, of 16 pairs each

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

}  // namespace quire
