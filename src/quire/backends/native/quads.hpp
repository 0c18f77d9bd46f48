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

// Sixteen integers from -32767 to 32767, as floats; to [4 quads][2 words]: numbers 0 and 2 of a quad,
// then 1 and 3, as `Sums::add` multiplies them.
inline void store_quads(F16 x, uint32_t* to) {
#if defined(__AVX2__) || defined(__AVX512F__)
#if defined(__AVX512F__)
    __m256i numbers = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v));
#else
    __m256i numbers = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
#endif
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(numbers, _mm256_broadcastsi128_si256(order)));
#else
    for (int i = 0; i < 16; i += QUAD) {
        uint16_t v[QUAD];
        for (int j = 0; j < QUAD; ++j)  // NaN has no integer
            v[j] = x.v[i + j] == x.v[i + j] ? uint16_t(int16_t(x.v[i + j])) : 0;
        to[i / 2] = uint32_t(v[0]) | uint32_t(v[2]) << 16;
        to[i / 2 + 1] = uint32_t(v[1]) | uint32_t(v[3]) << 16;
    }
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
#elif defined(__AVX2__)
    __m256i v[2];
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
    uint8_t v[32];
    static Half load(const uint8_t* p, bool second) {
        Half r;
        for (int i = 0; i < 32; ++i) r.v[i] = p[2 * i + second];
        return r;
    }
#endif
};

// Sixteen sums of 32 bits, which wrap around: only what is taken out must fit.
struct Sums {
#if defined(__AVX512F__)
    __m512i all;
    static Sums set(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Sums from_bits(F16 x) { return {_mm512_castps_si512(x.v)}; }
    // `word`: of `store_quads`, the first for numbers 0 and 2 of a quad, else the second.
    void add(Half x, uint32_t word) {
        __m512i y = _mm512_set1_epi32(int(word));
#if defined(__AVX512VNNI__)
        all = _mm512_dpwssd_epi32(all, x.v, y);
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
        F16 r;
        for (int i = 0; i < 16; ++i) r.v[i] = float(int32_t(all[i]));
        return r;
    }
#endif
};

}  // namespace
}  // namespace quire
