// Exact sums of products of bytes: sixteen lanes, each of which takes four bytes and four integers of
// up to 15 bits at a time, on AVX-512-VNNI, AVX-512, AVX2 or a plain array.
//
// Bytes are unsigned: a number from -127 to 127 is stored with 128 added, and who sums knows by how
// much that is too much. Integers have no rounding: whatever the order, and whatever the variant, a sum
// is the same bits.
#pragma once

#include "simd.hpp"

namespace quire {
namespace {

constexpr int QUAD = 4;             // bytes of a lane
constexpr float MOST_15 = 16256.0f;  // 127 * 128: the largest integer, so that both halves fit a byte

// Four integers become two words, which `Sums::add` multiplies with the bytes of a quad. With VNNI
// the bytes of v >> 7, then those of v & 127; else 16 bits each, numbers 0 and 2, then 1 and 3.
#if defined(__AVX512VNNI__)
constexpr char WORDS_OF_QUADS[16] = {1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14};
#else
constexpr char WORDS_OF_QUADS[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
#endif

// Sixteen integers, as floats: the words of four quads, to [4][2].
inline void store_quads(F16 x, uint32_t* to) {
#if defined(__AVX512F__)
    __m512i v = _mm512_cvtps_epi32(x.v);
#if defined(__AVX512VNNI__)
    v = _mm512_add_epi32(v, _mm512_and_si512(v, _mm512_set1_epi32(-128)));  // halves in two bytes
#endif
    __m256i order = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(WORDS_OF_QUADS)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), order));
#elif defined(__AVX2__)
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m256i order = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(WORDS_OF_QUADS)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(_mm256_permute4x64_epi64(both, 0xd8), order));
#else
    for (int i = 0; i < 16; i += QUAD) {
        uint16_t v[QUAD];
        for (int j = 0; j < QUAD; ++j) v[j] = uint16_t(int16_t(x.v[i + j]));
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

// Sixteen quads of bytes: one line.
struct Quads {
#if defined(__AVX512VNNI__)
    __m512i v;
    static Quads load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
#elif defined(__AVX512F__)
    __m512i even, odd;  // bytes 0 and 2, 1 and 3 of a lane, in 16 bits
    static Quads load(const uint8_t* p) {
        __m512i v = _mm512_loadu_si512(p);
        return {_mm512_and_si512(v, _mm512_set1_epi32(0x00ff00ff)), _mm512_srli_epi16(v, 8)};
    }
#elif defined(__AVX2__)
    __m256i even[2], odd[2];
    static Quads load(const uint8_t* p) {
        Quads r;
        for (int i = 0; i < 2; ++i) {
            __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
            r.even[i] = _mm256_and_si256(v, _mm256_set1_epi32(0x00ff00ff));
            r.odd[i] = _mm256_srli_epi16(v, 8);
        }
        return r;
    }
#else
    uint8_t v[64];
    static Quads load(const uint8_t* p) {
        Quads r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
#endif
};

// Sixteen sums of 32 bits, which wrap around: only what is taken out must fit.
struct Sums {
#if defined(__AVX512F__)
    __m512i all;
#if defined(__AVX512VNNI__)
    __m512i high;  // of the upper halves, still to be multiplied by 128
    static Sums of(__m512i x) { return {x, _mm512_setzero_si512()}; }
    void add(const Quads& x, const uint32_t* words) {
        high = _mm512_dpbusd_epi32(high, x.v, _mm512_set1_epi32(int(words[0])));
        all = _mm512_dpbusd_epi32(all, x.v, _mm512_set1_epi32(int(words[1])));
    }
    __m512i total() const { return _mm512_add_epi32(all, _mm512_slli_epi32(high, 7)); }
#else
    static Sums of(__m512i x) { return {x}; }
    void add(const Quads& x, const uint32_t* words) {
        __m512i even = _mm512_madd_epi16(x.even, _mm512_set1_epi32(int(words[0])));
        __m512i odd = _mm512_madd_epi16(x.odd, _mm512_set1_epi32(int(words[1])));
        all = _mm512_add_epi32(all, _mm512_add_epi32(even, odd));
    }
    __m512i total() const { return all; }
#endif
    static Sums set(int32_t x) { return of(_mm512_set1_epi32(x)); }
    static Sums from_bits(F16 x) { return of(_mm512_castps_si512(x.v)); }
    F16 bits() const { return {_mm512_castsi512_ps(total())}; }
    F16 value() const { return {_mm512_cvtepi32_ps(total())}; }
#elif defined(__AVX2__)
    __m256i all[2];
    static Sums set(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
    static Sums from_bits(F16 x) { return {{_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}}; }
    void add(const Quads& x, const uint32_t* words) {
        __m256i first = _mm256_set1_epi32(int(words[0])), second = _mm256_set1_epi32(int(words[1]));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
            all[i] = _mm256_add_epi32(all[i], _mm256_add_epi32(_mm256_madd_epi16(x.even[i], first),
                                                               _mm256_madd_epi16(x.odd[i], second)));
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
    void add(const Quads& x, const uint32_t* words) {
        for (int j = 0; j < QUAD; ++j) {
            int factor = int16_t(words[j % 2] >> (j / 2 * 16));
            for (int i = 0; i < 16; ++i) all[i] += uint32_t(factor * x.v[QUAD * i + j]);
        }
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
