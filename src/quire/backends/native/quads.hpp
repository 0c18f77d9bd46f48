// Exact sums of products of bytes: sixteen lanes, each of which takes four bytes and four integers of
// 16 bits at a time, on AVX-512-VNNI, AVX-512, AVX2 or a plain array.
//
// Bytes are unsigned: a number from -127 to 127 is stored with 128 added, and who sums knows by how
// much that is too much. Integers have no rounding: whatever the order, and whatever the variant, a sum
// is the same bits.
#pragma once

#include "simd.hpp"

namespace quire {
namespace {

constexpr int QUAD = 4;              // bytes of a lane
constexpr float MOST_16 = 32767.0f;  // the largest integer: 512 times it, times 127, is below 2^31

// Numbers of 16 bits that meet the bytes of four quads: words [4 quads][2], numbers 0 and 2 of a quad,
// then 1 and 3.
#if defined(__AVX2__) || defined(__AVX512F__)
inline void store_words(__m256i numbers, uint32_t* to) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(numbers, _mm256_broadcastsi128_si256(order)));
}
#else
inline void store_words(const uint16_t* numbers, uint32_t* to) {
    for (int i = 0; i < 16; i += QUAD, to += 2) {
        to[0] = uint32_t(numbers[i]) | uint32_t(numbers[i + 2]) << 16;
        to[1] = uint32_t(numbers[i + 1]) | uint32_t(numbers[i + 3]) << 16;
    }
}
#endif

// Sixteen integers from -32767 to 32767, as floats, become words.
inline void store_integers(F16 x, uint32_t* to) {
#if defined(__AVX512F__)
    store_words(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)), to);
#elif defined(__AVX2__)
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    store_words(_mm256_permute4x64_epi64(both, 0xd8), to);
#else
    float lane[16];
    uint16_t v[16];
    x.store(lane);
    for (int i = 0; i < 16; ++i)  // NaN has no integer
        v[i] = lane[i] == lane[i] ? uint16_t(int16_t(lane[i])) : 0;
    store_words(v, to);
#endif
}

// Sixteen floats become words of bf16.
inline void store_bf16_words(F16 x, uint32_t* to) {
    alignas(32) uint16_t v[16];
    store_rounded(x, v);
#if defined(__AVX2__) || defined(__AVX512F__)
    store_words(_mm256_load_si256(reinterpret_cast<const __m256i*>(v)), to);
#else
    store_words(v, to);
#endif
}

// Sixteen floats that are integers from 0 to 255, as bytes.
inline void store_bytes(F16 x, uint8_t* to) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
#else
    alignas(64) float wide[16];
    x.store(wide);
    for (int i = 0; i < 16; ++i) to[i] = uint8_t(int(wide[i]));
#endif
}

// Of sixteen quads of bytes (one line) numbers 0 and 2, or 1 and 3, as 16 bits: each half is loaded on
// its own, which takes fewer registers than both at once.
struct Half {
#if defined(__AVX512F__)
    __m512i v;
    static Half load(const uint8_t* p, bool second) {
        __m512i line = _mm512_loadu_si512(p);
        return {second ? _mm512_srli_epi16(line, 8)
                       : _mm512_and_si512(line, _mm512_set1_epi32(0x00ff00ff))};
    }
    static Half load_wide(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(void* to) const { _mm512_storeu_si512(to, v); }
#elif defined(__AVX2__)
    __m256i v[2];
    static Half load_wide(const uint16_t* p) {
        return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1)}};
    }
    void store(void* to) const {
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256(static_cast<__m256i*>(to) + i, v[i]);
    }
    static Half load(const uint8_t* p, bool second) {
        Half r;
        for (int i = 0; i < 2; ++i) {
            __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
            r.v[i] = second ? _mm256_srli_epi16(line, 8)
                            : _mm256_and_si256(line, _mm256_set1_epi32(0x00ff00ff));
        }
        return r;
    }
#else
    int16_t v[32];
    static Half load_wide(const uint16_t* p) {
        Half r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    void store(void* to) const { std::memcpy(to, v, sizeof v); }
    static Half load(const uint8_t* p, bool second) {
        Half r;
        for (int i = 0; i < 32; ++i) r.v[i] = p[2 * i + second];
        return r;
    }
#endif
};

// Fp8 (e4m3fn) numbers are those of bf16 whose exponent is 120 higher, but for multiples of 2^-9 below
// 2^-6: those are a table's, since AVX-512-BF16 takes a denormal bf16 for zero. NaN is never stored.
constexpr uint16_t EXPONENT = 120 << 7;
constexpr uint16_t SMALL[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};

// Of sixteen quads of fp8 numbers (one line) numbers 0 and 2, or 1 and 3, as pairs of bf16.
inline Pairs load_fp8(const uint8_t* p, bool second) {
#if defined(__AVX512F__)
    __m512i line = _mm512_loadu_si512(p), low = second ? _mm512_srli_epi16(line, 8) : line;
    __m512i high = second ? line : _mm512_slli_epi16(line, 8);
    __m512i y = _mm512_and_si512(_mm512_srli_epi16(high, 4), _mm512_set1_epi16(0x7f0));
    y = _mm512_add_epi16(y, _mm512_set1_epi16(EXPONENT));
    __m512i small = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(SMALL)));
    __mmask32 tiny = _mm512_testn_epi16_mask(high, _mm512_set1_epi16(0x7800));
    y = _mm512_mask_permutexvar_epi16(y, tiny, low, small);
    return {_mm512_ternarylogic_epi32(y, high, _mm512_set1_epi16(int16_t(0x8000)), 0xf8)};
#elif defined(__AVX2__)
    Pairs r;
    for (int i = 0; i < 2; ++i) {
        __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
        __m256i high = second ? line : _mm256_slli_epi16(line, 8);
        __m256i top = _mm256_and_si256(_mm256_srli_epi16(high, 4), _mm256_set1_epi16(0x7f0));
        __m256i y = _mm256_add_epi16(top, _mm256_set1_epi16(EXPONENT));
        // The table's bytes, low ones first: of number m those at m and m + 8.
        __m128i table = _mm_setr_epi8(0, 0, int8_t(0x80), int8_t(0xc0), 0, 0x20, 0x40, 0x60, 0, 0x3b,
                                      0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c);
        __m256i m = _mm256_srli_epi16(top, 4);
        __m256i at = _mm256_or_si256(_mm256_or_si256(m, _mm256_slli_epi16(m, 8)),
                                     _mm256_set1_epi16(0x0800));
        __m256i small = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), at);
        __m256i normal = _mm256_cmpgt_epi16(top, _mm256_set1_epi16(0x7f));
        y = _mm256_or_si256(_mm256_blendv_epi8(small, y, normal),
                            _mm256_and_si256(high, _mm256_set1_epi16(int16_t(0x8000))));
        (i ? r.b : r.a) = y;
    }
    return r;
#else
    uint16_t v[32];
    for (int i = 0; i < 32; ++i) {
        uint8_t x = p[2 * i + second];
        uint16_t size = x & 0x78 ? uint16_t(((x & 0x7f) << 4) + EXPONENT) : SMALL[x & 7];
        v[i] = uint16_t(size | (x & 0x80) << 8);
    }
    return Pairs::load(v);
#endif
}

// Rounded to nearest, ties to even; at most 448 in size.
inline uint8_t float_to_fp8(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffffu;
    if (size > 0x43e00000u) size = 0x43e00000u;  // 448
    if (size < 0x3c800000u) {                    // below 2^-6: multiples of 2^-9
        float small;
        std::memcpy(&small, &size, 4);
        return uint8_t(sign | uint32_t(std::nearbyint(small * 512.0f)));
    }
    return uint8_t(sign | (((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

// Sixteen sums of 32 bits, which wrap around: only what is taken out must fit.
struct Sums {
#if defined(__AVX512F__)
    __m512i all;
    static Sums set(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Sums from_bits(F16 x) { return {_mm512_castps_si512(x.v)}; }
    // `word`: the first of a quad for numbers 0 and 2 of a quad, else the second.
    void add(Half x, uint32_t word) {
        __m512i y = _mm512_set1_epi32(int(word));
#if defined(__AVX512VNNI__) && defined(__clang__)
        all = _mm512_dpwssd_epi32(all, x.v, y);
#elif defined(__AVX512VNNI__)
        // GCC 12 copies the sum for its intrinsic, and spills half of 24 sums.
        __asm__("vpdpwssd %2, %1, %0" : "+v"(all) : "v"(x.v), "v"(y));
#else
        all = _mm512_add_epi32(all, _mm512_madd_epi16(x.v, y));
#endif
    }
    F16 bits() const { return {_mm512_castsi512_ps(all)}; }
    F16 value() const { return {_mm512_cvtepi32_ps(all)}; }
#elif defined(__AVX2__)
    __m256i all[2];
    static Sums set(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
    static Sums from_bits(F16 x) { return {{_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}}; }
    void add(Half x, uint32_t word) {
        __m256i y = _mm256_set1_epi32(int(word));
        for (int i = 0; i < 2; ++i) all[i] = _mm256_add_epi32(all[i], _mm256_madd_epi16(x.v[i], y));
    }
    F16 bits() const { return {_mm256_castsi256_ps(all[0]), _mm256_castsi256_ps(all[1])}; }
    F16 value() const { return {_mm256_cvtepi32_ps(all[0]), _mm256_cvtepi32_ps(all[1])}; }
#else
    uint32_t all[16];
    static Sums set(int32_t x) {
        Sums r;
        for (uint32_t& lane : r.all) lane = uint32_t(x);
        return r;
    }
    static Sums from_bits(F16 x) {
        Sums r;
        std::memcpy(r.all, x.v, sizeof r.all);
        return r;
    }
    void add(Half x, uint32_t word) {
        int first = int16_t(word), second = int16_t(word >> 16);
        for (int i = 0; i < 16; ++i)
            all[i] += uint32_t(first * x.v[2 * i] + second * x.v[2 * i + 1]);
    }
    F16 bits() const {
        F16 r;
        std::memcpy(r.v, all, sizeof r.v);
        return r;
    }
    F16 value() const {
        float lane[16];
        for (int i = 0; i < 16; ++i) lane[i] = float(int32_t(all[i]));
        return F16::load(lane);
    }
#endif
};

}  // namespace
}  // namespace quire
