// One variant of all kernels. Compiled several times, with QUIRE_VARIANT naming the result and the
// compiler flags choosing the instruction set.
#include "kernels.hpp"

#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd.hpp"

namespace quire {
namespace {
#if defined(__AVX512F__)
// Sixteen floats as bf16, rounded to nearest even.
inline __m256i rounded(__m512 x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
#endif

// Sixteen floats to bf16.
inline void store_bf16(const float* x, uint16_t* to) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(_mm512_loadu_ps(x)));
#else
    for (int i = 0; i < 16; ++i) to[i] = float_to_bf16(x[i]);
#endif
}

// The same from lanes; gives what was stored.
inline F16 store_rounded(F16 x, uint16_t* to) {
#if defined(__AVX512F__)
    __m256i h = rounded(x.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), h);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
#else
    alignas(64) float wide[16];
    x.store(wide);
    store_bf16(wide, to);
    return F16::load_bf16(to);
#endif
}
}  // namespace
}  // namespace quire

#include "nibbles.hpp"
#include "quads.hpp"
#include "rows.inl"
#include "append.inl"
#include "linear.inl"
#include "panels.inl"
#include "forms.inl"
#include "blocks.inl"
#include "widened.inl"
#include "keys.inl"
#include "packed.inl"
#include "values.inl"
#include "packed_mix.inl"
#include "attention.inl"
#include "decode.inl"
#include "seal.inl"
#include "select.inl"

#define QUIRE_TEXT_(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_(x)
#define QUIRE_JOIN_(a, b) a##b
#define QUIRE_JOIN(a, b) QUIRE_JOIN_(a, b)

namespace quire {
const Kernels* QUIRE_JOIN(QUIRE_VARIANT, _kernels)() {
    static const Kernels kernels{
        QUIRE_TEXT(QUIRE_VARIANT), linear_few, linear_many, row_words, lane_words,
        prefill, decode, decode_merge, append, seal, rms_norm, layer_norm, rope, hadamard, activate,
        multiply, add, widen, read, multiply_add, score_bounds, score_signatures};
    return &kernels;
}
}  // namespace quire
