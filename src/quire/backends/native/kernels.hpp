// The kernels of one variant: plain functions over raw memory, each doing one item of work.
//
// Nothing here allocates, locks or checks: module.cpp checks arguments and splits work over threads.
// Shapes are in the comments; all matrices are row-major.
#pragma once

#include <cstdint>

namespace quire {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int PANEL = 32;       // output columns that one item of a linear layer computes
constexpr int DEPTH = 256;      // weights of a panel are packed this many at a time along K
constexpr int BLOCK = 16;       // tokens that fill a vector
constexpr int SPLIT = 256;      // tokens whose softmax is computed at a time, aligned to position 0
constexpr int ROW_BLOCK = 64;   // query rows of one item of attention
constexpr int MAX_HEAD = 512;   // largest head dimension

// y [m, n] = x [m, k] @ weight [n, k]^T + bias [n]. For bf16 weights x comes rounded to bf16, in rows
// of `pairs_stride` elements padded with zeros (a multiple of 32, and off the powers of two that
// would put all rows into one set of the cache); else as float.
struct Linear {
    const void* weight;
    Dtype dtype;
    int64_t m, n, k;
    const float* x;
    const uint16_t* pairs;
    int64_t pairs_stride;
    const float* bias;
    float* y;
};

// One layer's pages. Keys are dimension-major inside a page, so that scores of consecutive tokens
// fill a vector; where a page holds whole blocks, bf16 numbers that are multiplied by the same pair
// lie side by side:
//   interleaved: key [page, head, key_dim / 2, page_size, 2]
//                value [page, head, page_size / 2, value_dim, 2]
//   plain:       key [page, head, key_dim, page_size]
//                value [page, head, page_size, value_dim]
// `paired` says how numbers are multiplied, whatever the page size: as pairs of bf16, or as floats.
struct Pool {
    void* key;
    void* value;
    Dtype dtype;
    bool paired, interleaved;
    int64_t num_pages, page_size, heads, key_dim, value_dim;
};

// Queries [tokens, num_heads, key_dim] of one step over the pages of a layer group.
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
    float scale;
};

// Rows [row, row + rows) of one sequence and KV head, over splits [split, split_end). A row is a
// (token, query head) pair, token-major. `partial` null: finish and write `out`; else store the
// partial results of the one split: per row the maximum, the sum, and value_dim numbers.
struct AttentionItem {
    int64_t sequence, head, row, rows, split, split_end;
    float* partial;
};

struct Kernels {
    const char* name;
    void (*linear)(const Linear&, int64_t panel, int64_t row, int64_t row_end);
    void (*to_pairs)(const float* x, uint16_t* out, int64_t k, int64_t stride);  // one row
    void (*attend)(const Attention&, const AttentionItem&);
    void (*merge)(const Attention&, const AttentionItem&);  // partials of splits, in order
    void (*append)(const Pool&, int64_t slot, const float* key, const float* value);  // one token
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                       float* y);
    void (*rope)(const float* x, const float* cos, const float* sin, int64_t half, float* y);
    void (*activate)(const float* x, int kind, int64_t n, float* y);
    void (*multiply)(const float* x, const float* z, int64_t n, float* y);
    void (*add)(const float* x, const float* z, int64_t n, float* y);
    void (*widen)(const void* x, Dtype dtype, int64_t n, float* y);
    // The machine's limits: read every byte; do `steps` rounds of multiply-adds in registers.
    float (*read)(const uint8_t* x, int64_t bytes);
    float (*multiply_add)(int64_t steps);
};

constexpr int PROBE_CHAINS = 24;  // independent multiply-adds of a round, of 16 pairs each

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

}  // namespace quire
