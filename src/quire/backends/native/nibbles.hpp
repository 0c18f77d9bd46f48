// Packed numbers as pairs of bf16: two bits or four of each half of a word become a number less the
// middle of all, n - 7.5 or n - 1.5, which bf16 holds exactly.
#pragma once

#include "quads.hpp"

namespace quire {
namespace {

constexpr float middle_of(int bits) { return bits == 4 ? 7.5f : 1.5f; }

// Numbers by their bits, and by those above them, which are not cleared before.
constexpr uint16_t NIBBLES[32] = {
    0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0x4020,
    0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0, 0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020,
    0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0};
constexpr uint16_t CRUMBS[32] = {
    0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0xbfc0, 0xbf00, 0x3f00,
    0x3fc0, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0xbfc0, 0xbf00,
    0x3f00, 0x3fc0, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0, 0xbfc0, 0xbf00, 0x3f00, 0x3fc0};

// The k-th pair of each of sixteen words (one line).
template <int BITS>
__attribute__((always_inline)) inline Pairs load_packed(const char* p, int k) {
    [[maybe_unused]] const uint16_t* table = BITS == 4 ? NIBBLES : CRUMBS;
#if defined(__AVX512F__)
    __m512i words = _mm512_srli_epi16(_mm512_loadu_si512(p), unsigned(BITS * k));
    return {_mm512_permutexvar_epi16(words, _mm512_loadu_si512(table))};
#elif defined(__AVX2__)
    // The table's bytes, low ones and high ones.
    const __m256i low = _mm256_broadcastsi128_si256(
        BITS == 4 ? _mm_setr_epi8(int8_t(0xf0), int8_t(0xd0), int8_t(0xb0), int8_t(0x90), 0x60, 0x20,
                                  int8_t(0xc0), 0, 0, int8_t(0xc0), 0x20, 0x60, int8_t(0x90),
                                  int8_t(0xb0), int8_t(0xd0), int8_t(0xf0))
                  : _mm_set1_epi32(int(0xc00000c0u)));
    const __m256i high = _mm256_broadcastsi128_si256(
        BITS == 4 ? _mm_setr_epi8(int8_t(0xc0), int8_t(0xc0), int8_t(0xc0), int8_t(0xc0), int8_t(0xc0),
                                  int8_t(0xc0), int8_t(0xbf), int8_t(0xbf), 0x3f, 0x3f, 0x40, 0x40,
                                  0x40, 0x40, 0x40, 0x40)
                  : _mm_set1_epi32(0x3f3fbfbf));
    Pairs r;
    for (int i = 0; i < 2; ++i) {
        __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
        __m256i at = _mm256_and_si256(_mm256_srli_epi16(words, BITS * k),
                                      _mm256_set1_epi16((1 << BITS) - 1));
        __m256i top = _mm256_shuffle_epi8(high, _mm256_slli_epi16(at, 8));
        // Where a byte of `at` is 0 the tables give a number too: those bytes are cleared.
        __m256i bottom = _mm256_and_si256(_mm256_shuffle_epi8(low, at), _mm256_set1_epi16(0xff));
        top = _mm256_and_si256(top, _mm256_set1_epi16(int16_t(0xff00)));
        (i ? r.b : r.a) = _mm256_or_si256(top, bottom);
    }
    return r;
#else
    uint16_t half[32];
    std::memcpy(half, p, sizeof half);
    for (uint16_t& x : half) x = table[x >> (BITS * k) & ((1 << BITS) - 1)];
    return Pairs::load(half);
#endif
}

// Thirty-two floats become bf16, in order.
inline void store_pairs(F16 a, F16 b, uint32_t* to) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
#else
    auto* half = reinterpret_cast<uint16_t*>(to);
    store_rounded(a, half), store_rounded(b, half + 16);
#endif
}

}  // namespace
}  // namespace quire
