// The conformance core's calls in terms of kernels.hpp, split into items as module.cpp does.
#include "adapter.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace core {
namespace {

using quire::Dtype;
using quire::Kernels;

const Kernels& table(const void* kernels) { return *static_cast<const Kernels*>(kernels); }

Dtype dtype(Format format) {
    return format == Format::fp32 ? Dtype::f32 : format == Format::bf16 ? Dtype::bf16 : Dtype::f16;
}

size_t width(Format format) { return format == Format::fp32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

quire::Pool pool_of(Pages& pages) {
    return quire::settled({{pages.key.data(), nullptr, dtype(pages.format), pages.key_dim},
                           {pages.value.data(), nullptr, dtype(pages.format), pages.value_dim},
                           pages.pages, pages.size, pages.heads});
}

float number(const Stored& from, Format format, int64_t at) {
    const uint8_t* p = from.data() + size_t(at) * width(format);
    uint32_t bits = 0;
    std::memcpy(&bits, p, width(format));
    float x;
    if (format == Format::fp16) {
        float magnitude = bits & 0x7c00 ? std::ldexp(float((bits & 0x3ff) | 0x400), int((bits >> 10) & 31) - 25)
                                        : std::ldexp(float(bits & 0x3ff), -24);
        if ((bits & 0x7c00) == 0x7c00) magnitude = bits & 0x3ff ? NAN : INFINITY;
        return bits & 0x8000 ? -magnitude : magnitude;
    }
    if (format == Format::bf16) bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

#if defined(__x86_64__)
bool has_f16c() {  // not every Clang has __builtin_cpu_supports for it
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

}  // namespace

Stored stored(const Floats& values, Format format) {
    Stored out(values.size() * width(format));
    for (size_t i = 0; i < values.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &values[i], 4);
        if (format == Format::bf16) bits >>= 16;
        if (format == Format::fp16) {
            uint32_t sign = bits >> 16 & 0x8000;
            float x = std::fabs(values[i]);
            int e = x < 0x1p-14f ? -14 : std::ilogb(x);  // a denormal's exponent is that of 2^-14
            uint32_t man = uint32_t(std::ldexp(x, 10 - e));
            bits = std::isinf(x) ? sign | 0x7c00 : sign | (uint32_t(e + 14) * 1024 + man);
        }
        std::memcpy(out.data() + i * width(format), &bits, width(format));
    }
    return out;
}

Pages::Pages(Format format, int64_t pages, int64_t size, int64_t heads, int64_t key_dim,
             int64_t value_dim)
    : format(format), pages(pages), size(size), heads(heads), key_dim(key_dim), value_dim(value_dim),
      key(size_t(pages * size * heads * key_dim) * width(format), 0xff),
      value(size_t(pages * size * heads * value_dim) * width(format), 0xff) {}

Floats Pages::at(int64_t slot) const {
    quire::Pool pool = pool_of(const_cast<Pages&>(*this));
    int64_t first = slot / size * heads, token = slot % size;
    Floats out;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < key_dim; ++d)
            out.push_back(number(key, format, (first + h) * key_dim * size + pool.key_at(d, token)));
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < value_dim; ++d)
            out.push_back(
                number(value, format, (first + h) * value_dim * size + pool.value_at(d, token)));
    return out;
}

// What QUIRE_WITH_... says was compiled, as far as the processor has it; see Native::available.
std::vector<Variant> Variant::all() {
    std::vector<Variant> found;
#if defined(QUIRE_WITH_portable)
    found.push_back(Variant(quire::portable_kernels()));
#endif
#if defined(__x86_64__)
    [[maybe_unused]] bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    [[maybe_unused]] bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(QUIRE_WITH_avx2)
    if (avx2) found.push_back(Variant(quire::avx2_kernels()));
#endif
#if defined(QUIRE_WITH_avx512)
    if (avx512) found.push_back(Variant(quire::avx512_kernels()));
#endif
#if defined(QUIRE_WITH_avx512bf16)
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(Variant(quire::avx512bf16_kernels()));
#endif
#endif
    return found;
}

std::string Variant::name() const { return table(kernels_).name; }

Floats Variant::linear(const Stored& weight, Format format, int64_t n, int64_t k, const Floats& x,
                       const Floats& bias, bool many) const {
    const Kernels& kernels = table(kernels_);
    int64_t m = int64_t(x.size()) / k, words = quire::words_of(dtype(format), k);
    Floats y(size_t(m * n), NAN);
    quire::Linear a{weight.data(), dtype(format), m, n, k, nullptr, words + 16,
                    bias.empty() ? nullptr : bias.data(), y.data()};
    std::vector<uint32_t> room(size_t(m * a.x_stride));
    a.x = room.data();
    if (many) {
        for (int64_t row = 0; row < m; ++row)
            kernels.lane_words(x.data() + row * k, a.dtype, k, room.data() + row * a.x_stride);
        kernels.linear_many(a, 0, ceil_div(n, quire::PANEL), 0, m);
    } else {
        for (int64_t row = 0; row < m; ++row)
            kernels.row_words(x.data() + row * k, a.dtype, k, a.x_stride,
                              room.data() + row * a.x_stride);
        kernels.linear_few(a, 0, n, nullptr);
    }
    return y;
}

void Variant::append(Pages& pages, int64_t slot, const Floats& key, const Floats& value) const {
    table(kernels_).append(pool_of(pages), slot, key.data(), value.data());
}

Floats Variant::attend(Pages& pages, const Batch& batch, const Floats& query, int64_t num_heads,
                       int64_t window, bool apart) const {
    const Kernels& kernels = table(kernels_);
    Floats out(batch.positions.size() * size_t(num_heads * pages.value_dim), NAN);
    quire::Attention a{pool_of(pages),
                       query.data(),
                       out.data(),
                       batch.positions.data(),
                       batch.query_indptr.data(),
                       batch.indptr.data(),
                       batch.indices.data(),
                       batch.last_page_len.data(),
                       batch.first_page.data(),
                       num_heads,
                       window,
                       1.44269504088896341f / std::sqrt(float(pages.key_dim))};
    int64_t share = num_heads / pages.heads;
    for (int64_t s = 0; s + 1 < int64_t(batch.query_indptr.size()); ++s) {
        int64_t from = batch.query_indptr[size_t(s)];
        int64_t rows = (batch.query_indptr[size_t(s + 1)] - from) * share;
        if (apart && rows == share) {
            int64_t at = batch.positions[size_t(from)], last = at / quire::SPLIT;
            int64_t first = (window && at >= window ? at - window + 1 : 0) / quire::SPLIT;
            Floats partials(size_t((last + 1 - first) * quire::partial_size(a)), NAN);
            for (int64_t split = first; split <= last; ++split)
                kernels.decode(a, {s, 0, pages.heads, first, split, split + 1, partials.data()});
            kernels.decode_merge(a, {s, 0, pages.heads, first, first, last + 1, partials.data()});
            continue;
        }
        for (int64_t head = 0; head < pages.heads; ++head)
            for (int64_t row = 0; row < rows; row += quire::ROW_BLOCK)
                kernels.prefill(&a, 1, {s, head, row, std::min<int64_t>(rows - row, quire::ROW_BLOCK)});
    }
    return out;
}

Floats Variant::rms_norm(const Floats& x, const Floats& weight, float eps) const {
    Floats y(x.size(), NAN);
    table(kernels_).rms_norm(x.data(), weight.data(), eps, int64_t(x.size()), y.data());
    return y;
}

Floats Variant::layer_norm(const Floats& x, const Floats& weight, const Floats& bias,
                           float eps) const {
    Floats y(x.size(), NAN);
    table(kernels_).layer_norm(x.data(), weight.data(), bias.data(), eps, int64_t(x.size()),
                               y.data());
    return y;
}

Floats Variant::rope(const Floats& x, const Floats& cos, const Floats& sin) const {
    Floats y(x.size(), NAN);
    table(kernels_).rope(x.data(), cos.data(), sin.data(), int64_t(cos.size()), y.data());
    return y;
}

Floats Variant::activate(const Floats& x, int kind) const {
    Floats y(x.size(), NAN);
    table(kernels_).activate(x.data(), kind, int64_t(x.size()), y.data());
    return y;
}

Floats Variant::multiply(const Floats& x, const Floats& z) const {
    Floats y(x.size(), NAN);
    table(kernels_).multiply(x.data(), z.data(), int64_t(x.size()), y.data());
    return y;
}

Floats Variant::add(const Floats& x, const Floats& z) const {
    Floats y(x.size(), NAN);
    table(kernels_).add(x.data(), z.data(), int64_t(x.size()), y.data());
    return y;
}

Floats Variant::widen(const Stored& x, Format format, int64_t n) const {
    Floats y(size_t(n), NAN);
    table(kernels_).widen(x.data(), dtype(format), n, y.data());
    return y;
}

}  // namespace core
