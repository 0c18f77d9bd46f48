// Sixteen float32 lanes, whatever the machine: AVX-512, two AVX2 registers, or four of four lanes.
//
// Every kernel is written once against F16 and Pairs and compiled once per variant with other
// flags, so that layouts and reduction orders are those of 16 lanes everywhere. Within a variant an
// operation gives the same bits wherever it is used; between variants they may differ (fused
// multiply-adds, AVX-512-BF16's own rounding).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace quire {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of bf16 are little-endian words");

constexpr int LANES = 16;

inline float bf16_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest, ties to even; NaN stays a (quiet) NaN. The rule of ml_dtypes.
inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Without branches, so that loops over it become vectors.
inline float fp16_to_float(uint16_t h) {
    // A product with 2^112 puts the exponent right, denormals included.
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    bits |= special | uint32_t(h & 0x8000) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_fp16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    uint32_t mag = bits & 0x7fffffffu;
    if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00 | ((mag >> 13) & 0x3ff));
    if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (mag < 0x38800000u) {  // denormal or zero: let the float unit round
        float scaled;
        std::memcpy(&scaled, &mag, 4);
        scaled += 0.5f;
        uint32_t out;
        std::memcpy(&out, &scaled, 4);
        return uint16_t(sign | (out - 0x3f000000u));
    }
    return uint16_t(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1)) >> 13));
}

#if defined(__AVX512F__)

struct F16 {
    __m512 v;
    static F16 zero() { return {_mm512_setzero_ps()}; }
    static F16 set(float x) { return {_mm512_set1_ps(x)}; }
    static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static F16 load_bf16(const uint16_t* p) {
        __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    static F16 load_fp16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 round_even(F16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n (here: for floor(n)); overflow goes to infinity, underflow to zero.
inline F16 scale_by_power(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// x - floor(x), 0 for infinities; and a * 2^floor(x).
inline F16 fraction(F16 x) {
    return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
inline F16 scale_by_floor(F16 a, F16 x) { return scale_by_power(a, x); }
// Lanes from `low` to `high - 1` of a, `other` elsewhere.
inline F16 keep(F16 a, int low, int high, F16 other) {
    uint32_t mask = (high >= 16 ? 0xffffu : (1u << (high > 0 ? high : 0)) - 1) &
                    ~((1u << (low < 0 ? 0 : low > 16 ? 16 : low)) - 1);
    return {_mm512_mask_blend_ps(__mmask16(mask), other.v, a.v)};
}
inline F16 load_some(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}
inline void store_some(F16 a, float* p, int n) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v);
}

#elif defined(__AVX2__)

struct F16 {
    __m256 a, b;
    static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static __m256 widen(const uint16_t* p) {
        __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    static F16 load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
    static F16 load_fp16(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
    }
    void store(float* p) const { _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b); }
};
#define QUIRE_BOTH(op) {op(x.a, y.a), op(x.b, y.b)}
inline F16 operator+(F16 x, F16 y) { return QUIRE_BOTH(_mm256_add_ps); }
inline F16 operator-(F16 x, F16 y) { return QUIRE_BOTH(_mm256_sub_ps); }
inline F16 operator*(F16 x, F16 y) { return QUIRE_BOTH(_mm256_mul_ps); }
inline F16 operator/(F16 x, F16 y) { return QUIRE_BOTH(_mm256_div_ps); }
inline F16 max(F16 x, F16 y) { return QUIRE_BOTH(_mm256_max_ps); }
inline F16 min(F16 x, F16 y) { return QUIRE_BOTH(_mm256_min_ps); }
#undef QUIRE_BOTH
inline F16 fma(F16 x, F16 y, F16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F16 round_even(F16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 half_scale(__m256 x, __m256 n) {  // in two steps, each within the exponent's range
    __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1);
    auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(first)), power(_mm256_sub_epi32(whole, first)));
}
inline F16 scale_by_power(F16 x, F16 n) { return {half_scale(x.a, n.a), half_scale(x.b, n.b)}; }
inline F16 floor(F16 x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
inline F16 fraction(F16 x) { return x - floor(x); }
inline F16 scale_by_floor(F16 a, F16 x) { return scale_by_power(a, floor(x)); }
inline __m256 lanes_between(int low, int high, int base) {
    __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane)));
}
inline F16 keep(F16 x, int low, int high, F16 other) {
    return {_mm256_blendv_ps(other.a, x.a, lanes_between(low, high, 0)),
            _mm256_blendv_ps(other.b, x.b, lanes_between(low, high, 8))};
}
inline F16 load_some(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(lanes_between(0, n, 0))),
            _mm256_maskload_ps(p + 8, _mm256_castps_si256(lanes_between(0, n, 8)))};
}
inline void store_some(F16 x, float* p, int n) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(lanes_between(0, n, 0)), x.a);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(lanes_between(0, n, 8)), x.b);
}

#else

// Four registers of four lanes, which SSE2 and NEON have.
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));

inline Four pick(Words mask, Four a, Four b) { return Four((mask & Words(a)) | (~mask & Words(b))); }

struct F16 {
    Four v[4];
    static F16 zero() { return set(0.0f); }
    static F16 set(float x) {
        Four all = {x, x, x, x};
        return {{all, all, all, all}};
    }
    static F16 load(const float* p) {
        F16 r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    // Each of sixteen numbers of 16 bits in its lane.
    template <class Op>
    static F16 widen(const uint16_t* p, Op op) {
        Words w[4];
        for (int i = 0; i < 4; ++i) w[i] = Words{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
        return {{op(w[0]), op(w[1]), op(w[2]), op(w[3])}};
    }
    static F16 load_bf16(const uint16_t* p) {
        return widen(p, [](Words x) { return Four(x << 16); });
    }
    static F16 load_fp16(const uint16_t* p) {
        return widen(p, [](Words x) {  // as fp16_to_float
            Words bits = Words(Four((x & 0x7fff) << 13) * 0x1p112f);
            Words special = Words((x & 0x7c00) == 0x7c00) & 0x7f800000;
            return Four(bits | special | (x & 0x8000) << 16);
        });
    }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
};
template <class Op>
inline F16 each(F16 a, F16 b, Op op) {
    return {{op(a.v[0], b.v[0]), op(a.v[1], b.v[1]), op(a.v[2], b.v[2]), op(a.v[3], b.v[3])}};
}
inline Four greater(Four x, Four y) { return pick(Words(x > y), x, y); }
inline F16 operator+(F16 a, F16 b) { return each(a, b, [](Four x, Four y) { return x + y; }); }
inline F16 operator-(F16 a, F16 b) { return each(a, b, [](Four x, Four y) { return x - y; }); }
inline F16 operator*(F16 a, F16 b) { return each(a, b, [](Four x, Four y) { return x * y; }); }
inline F16 operator/(F16 a, F16 b) { return each(a, b, [](Four x, Four y) { return x / y; }); }
inline F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }  // two roundings: compiled uncontracted
inline F16 max(F16 a, F16 b) { return each(a, b, greater); }
inline F16 min(F16 a, F16 b) {
    return each(a, b, [](Four x, Four y) { return pick(Words(x < y), x, y); });
}
inline Four round_four(Four x) {  // adding 2^23 leaves no place behind the point
    Words sign = Words(x) & 0x80000000u;
    Four size = Four(Words(x) ^ sign), whole = (size + 0x1p23f) - 0x1p23f;
    return pick(Words(size < 0x1p23f), Four(Words(whole) | sign), x);
}
inline F16 round_even(F16 a) {
    return each(a, a, [](Four x, Four) { return round_four(x); });
}
inline F16 scale_by_power(F16 a, F16 n) {
    return each(a, n, [](Four x, Four n) {  // in two steps, each within the exponent's range
        Integers whole = __builtin_convertvector(n, Integers), first = whole >> 1;
        auto power = [](Integers e) { return Four((e + 127) << 23); };
        return x * power(first) * power(whole - first);
    });
}
inline F16 floor(F16 a) {
    return each(a, a, [](Four x, Four) {
        Four whole = round_four(x), one = {1.0f, 1.0f, 1.0f, 1.0f};
        return whole - Four(Words(whole > x) & Words(one));
    });
}
inline F16 fraction(F16 x) { return x - floor(x); }
inline F16 scale_by_floor(F16 a, F16 x) { return scale_by_power(a, floor(x)); }
inline F16 keep(F16 a, int low, int high, F16 other) {
    float lane[16], beyond[16];
    a.store(lane), other.store(beyond);
    for (int i = 0; i < 16; ++i)
        if (i < low || i >= high) lane[i] = beyond[i];
    return F16::load(lane);
}
inline F16 load_some(const float* p, int n) {
    float some[16] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return F16::load(some);
}
inline void store_some(F16 a, float* p, int n) {
    float lane[16];
    a.store(lane);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
}

#endif

// n numbers of fp16, zero in the other lanes.
inline F16 load_some_fp16(const uint16_t* p, int n) {
#if defined(__AVX512F__)
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p))};
#else
    uint16_t all[16] = {};
    std::memcpy(all, p, size_t(n) * 2);
    return F16::load_fp16(all);
#endif
}

// Sum and maximum over the lanes, always in the same order: i with i + 8, then with i + 4, ...
#if defined(__AVX2__) || defined(__AVX512F__)
inline __m256 low_half(F16 a) {
#if defined(__AVX512F__)
    return _mm512_castps512_ps256(a.v);
#else
    return a.a;
#endif
}
inline __m256 high_half(F16 a) {
#if defined(__AVX512F__)
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
#else
    return a.b;
#endif
}
inline float sum(F16 a) {
    __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float max(F16 a) {
    __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#if defined(__AVX512F__)
// The sums of each of R vectors, every one in that order.
template <int R>
inline void store_sums(const F16 (&x)[R], float* to) {
    static_assert(R <= 16);
    auto halves = [](__m512 a, __m512 b) {  // of eight numbers each, of two vectors
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    auto quarters = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    __m512 four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12 in the quarters of a vector
        auto row = [&](int r) { return x[r < R ? r : 0].v; };
        if (R <= i) four[i] = four[0];
        else if (R <= i + 4) four[i] = halves(row(i), row(i)), four[i] = quarters(four[i], four[i]);
        else four[i] = quarters(halves(row(i), row(i + 4)), halves(row(i + 8), row(i + 12)));
    }
    auto twos = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    };
    __m512 a = twos(four[0], four[1]), b = twos(four[2], four[3]);
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    _mm512_mask_storeu_ps(to, __mmask16((1u << R) - 1), all);
}
#endif
#else
inline float sum(F16 a) {
    Four four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float max(F16 a) {
    Four four = greater(greater(a.v[0], a.v[2]), greater(a.v[1], a.v[3]));
    float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}
#endif

#if !defined(__AVX512F__)
template <int R>
inline void store_sums(const F16 (&x)[R], float* to) {
    for (int r = 0; r < R; ++r) to[r] = sum(x[r]);
}
#endif

// The greater, of numbers that are not negative; NaN is greater than all others.
inline F16 max_bits(F16 a, F16 b) {
#if defined(__AVX512F__)
    return {_mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
#elif defined(__AVX2__)
    auto half = [](__m256 x, __m256 y) {
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
    };
    return {half(a.a, b.a), half(a.b, b.b)};
#else
    return each(a, b, [](Four x, Four y) { return pick(Words((x != x) | (x > y)), x, y); });
#endif
}
inline float max_bits(F16 a) {
#if defined(__AVX512F__)
    return _mm_cvtss_f32(_mm_castsi128_ps(
        _mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a.v)))));
#else
    alignas(64) float lane[LANES];
    a.store(lane);
    float most = lane[0];
    for (float x : lane) most = most != most || most > x ? most : x;
    return most;
#endif
}

// e^x with error below 2 ulp; -inf gives 0, NaN stays NaN (of a NaN, min and max give the second).
// Cephes' reduction and polynomial (Moshier, 1992).
inline F16 exp(F16 x) {
    x = min(F16::set(89.0f), max(F16::set(-104.0f), x));
    F16 n = round_even(x * F16::set(1.44269504088896341f));
    F16 r = fma(n, F16::set(-0.693359375f), x);
    r = fma(n, F16::set(2.12194440e-4f), r);
    F16 p = F16::set(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                    5.0000001201e-1f})
        p = fma(p, r, F16::set(c));
    p = fma(p, r * r, r + F16::set(1.0f));
    return scale_by_power(p, n);
}

// 2^x for x up to about 0; -inf gives 0, NaN stays NaN. Polynomials for 2^r on [0, 1], 1 at r = 0, of
// least greatest relative error: 2e-9, or 3e-6 where the result will be rounded to bf16 (2e-3).
template <size_t N>
inline F16 exp2(F16 x, const float (&coefficients)[N]) {
#if !defined(__AVX512F__)
    x = max(F16::set(-150.0f), x);  // -inf has no fraction
#endif
    F16 r = fraction(x), p = F16::set(coefficients[0]);
    for (size_t i = 1; i < N; ++i) p = fma(p, r, F16::set(coefficients[i]));
    return scale_by_floor(fma(p, r, F16::set(1.0f)), x);
}
inline F16 exp2(F16 x) {
    return exp2(x, {2.16128524e-4f, 1.24678627e-3f, 9.67545002e-3f, 5.54852813e-2f,
                    2.40229305e-1f, 6.93147044e-1f});
}
inline F16 exp2_coarse(F16 x) {
    return exp2(x, {1.342652e-2f, 5.224274e-2f, 2.4128008e-1f, 6.9304486e-1f});
}

// Sixteen pairs of bf16 numbers: one 64-byte line. Lane i holds the pair (2i, 2i + 1).
struct Pairs {
#if defined(__AVX512F__)
    __m512i v;
    static Pairs load(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
    static Pairs set(uint32_t pair) { return {_mm512_set1_epi32(int(pair))}; }
    void store(void* to) const { _mm512_storeu_si512(to, v); }
    F16 first() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))}; }
    F16 second() const {
        return {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))))};
    }
#elif defined(__AVX2__)
    __m256i a, b;
    static Pairs load(const uint16_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
    }
    static Pairs set(uint32_t pair) {
        return {_mm256_set1_epi32(int(pair)), _mm256_set1_epi32(int(pair))};
    }
    void store(void* to) const {
        _mm256_storeu_si256(static_cast<__m256i*>(to), a);
        _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, b);
    }
    F16 first() const {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    }
    F16 second() const {
        __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
        return {_mm256_castsi256_ps(_mm256_and_si256(a, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
    }
#else
    Words v[4];
    static Pairs load(const uint16_t* p) {
        Pairs r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static Pairs set(uint32_t pair) {
        Words all = {pair, pair, pair, pair};
        return {{all, all, all, all}};
    }
    void store(void* to) const { std::memcpy(to, v, sizeof v); }
    F16 first() const {
        return {{Four(v[0] << 16), Four(v[1] << 16), Four(v[2] << 16), Four(v[3] << 16)}};
    }
    F16 second() const {
        auto high = [](Words x) { return Four(x & 0xffff0000u); };
        return {{high(v[0]), high(v[1]), high(v[2]), high(v[3])}};
    }
#endif
};

// acc + x.first * y.first + x.second * y.second in each lane.
inline F16 dot_pairs(F16 acc, Pairs x, Pairs y) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)x.v, (__m512bh)y.v)};
#else
    return fma(x.second(), y.second(), fma(x.first(), y.first(), acc));
#endif
}

}  // namespace
}  // namespace quire
