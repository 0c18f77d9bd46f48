// What the conformance core asks of the kernels, in the plainest terms: vectors in, vectors out. Only
// adapter.cpp knows the structs of kernels.hpp; when those change, nothing else here does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace core {

enum class Format { fp32, bf16, fp16 };

using Floats = std::vector<float>;
using Ints = std::vector<int64_t>;

// Numbers as they are stored, and the bits that `stored` makes of values a format can hold.
using Stored = std::vector<uint8_t>;
Stored stored(const Floats& values, Format format);

// One layer's pages: [pages * size] slots of `heads` keys and values. Full of NaN at first.
struct Pages {
    Format format;
    int64_t pages, size, heads, key_dim, value_dim;
    Stored key, value;

    Pages(Format format, int64_t pages, int64_t size, int64_t heads, int64_t key_dim,
          int64_t value_dim);
    // What a slot holds: [heads * key_dim] keys, then [heads * value_dim] values.
    Floats at(int64_t slot) const;
};

// Sequences side by side: query_indptr, positions and page tables as in quire.batch.
struct Batch {
    Ints positions, query_indptr{0}, indptr{0}, indices, last_page_len, first_page;
};

// One variant of the kernels.
class Variant {
public:
    // Those that were compiled and that this processor can run.
    static std::vector<Variant> all();

    std::string name() const;
    // y [m, n] = x [m, k] @ weight [n, k]^T + bias [n], bias may be empty; by the kernel for few rows
    // or the one for many, which agree on the bits.
    Floats linear(const Stored& weight, Format format, int64_t n, int64_t k, const Floats& x,
                  const Floats& bias, bool many) const;
    void append(Pages& pages, int64_t slot, const Floats& key, const Floats& value) const;
    // [tokens, num_heads, value_dim]. `apart`: as a decode is shared out, every split of the keys on
    // its own, then merged; else as a prefill. They agree on the bits.
    Floats attend(Pages& pages, const Batch& batch, const Floats& query, int64_t num_heads,
                  int64_t window, bool apart) const;
    Floats rms_norm(const Floats& x, const Floats& weight, float eps) const;
    Floats layer_norm(const Floats& x, const Floats& weight, const Floats& bias, float eps) const;
    Floats rope(const Floats& x, const Floats& cos, const Floats& sin) const;
    Floats activate(const Floats& x, int kind) const;  // silu, gelu by tanh, gelu, relu
    Floats multiply(const Floats& x, const Floats& z) const;
    Floats add(const Floats& x, const Floats& z) const;
    Floats widen(const Stored& x, Format format, int64_t n) const;

private:
    explicit Variant(const void* kernels) : kernels_(kernels) {}
    const void* kernels_;
};

}  // namespace core
