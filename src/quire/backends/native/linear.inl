// Linear layers. Weights are read where they lie, row-major as in the checkpoint; a panel of 32
// output columns is turned column-major, DEPTH numbers at a time, in the cache of the core that uses
// it. Every output is then summed along K in order, whatever the number of rows or threads.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // 24 accumulators
#else
constexpr int ROWS = 2;
#endif

constexpr int AHEAD = 512;  // bytes of a row that are asked for before they are needed

// out[j][i] = rows[i][j] for 16 x 16 numbers of 32 bits.
inline void transpose(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
#if defined(__AVX512F__)
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[j * stride + i] = rows[i][j];
#endif
}

// One row's 16 words (pairs of bf16, or floats) from depth `k` on, zero beyond `k_end`.
template <Dtype D>
inline const uint32_t* words(const void* weight, int64_t row, int64_t stride, int64_t k,
                             int64_t k_end, uint32_t* spare) {
    constexpr int PER_WORD = D == Dtype::bf16 ? 2 : 1;
    int64_t count = k_end - k < 16 * PER_WORD ? k_end - k : 16 * PER_WORD;
    if constexpr (D == Dtype::f32) {
        const float* from = static_cast<const float*>(weight) + row * stride + k;
        if (count == 16) return reinterpret_cast<const uint32_t*>(from);
        std::memset(spare, 0, 64);
        std::memcpy(spare, from, size_t(count) * 4);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(weight) + row * stride + k;
        if constexpr (D == Dtype::bf16) {
            if (count == 32) return reinterpret_cast<const uint32_t*>(from);
            std::memset(spare, 0, 64);
            std::memcpy(spare, from, size_t(count) * 2);
        } else {
            uint16_t padded[16] = {};
            std::memcpy(padded, from, size_t(count) * 2);
            float wide[16];
            F16::load_fp16(padded).store(wide);
            std::memcpy(spare, wide, 64);
        }
    }
    return spare;
}

// packed[step][column] for the columns of a panel, `steps` words deep (a multiple of 16).
template <Dtype D>
void pack(const Linear& a, int64_t panel, int64_t k, int64_t k_end, uint32_t* packed) {
    constexpr int PER_WORD = D == Dtype::bf16 ? 2 : 1;
    static const uint32_t nothing[16] = {};
    uint32_t spare[16][16];
    for (int half = 0; half < PANEL; half += 16) {
        int64_t column = panel * PANEL + half;
        for (int64_t at = k; at < k_end; at += 16 * PER_WORD) {
            const uint32_t* rows[16];
            for (int i = 0; i < 16; ++i) {
                rows[i] = column + i < a.n
                              ? words<D>(a.weight, column + i, a.k, at, k_end, spare[i])
                              : nothing;
                // Sixteen rows are more streams than the hardware follows. A wrong address is no
                // fault: this only asks.
                __builtin_prefetch(reinterpret_cast<const char*>(rows[i]) + AHEAD, 0, 2);
            }
            transpose(rows, packed + (at - k) / PER_WORD * PANEL + half, PANEL);
        }
    }
}

// Accumulate R rows of x over the packed panel: y[r][0..31] += x[r] . packed
template <Dtype D, int R>
void multiply_rows(const Linear& a, const uint32_t* packed, int64_t steps, int64_t k, int64_t row,
                   int64_t column, bool first, bool last) {
    int64_t width = a.n - column < PANEL ? a.n - column : PANEL;
    int low = int(width < 16 ? width : 16), high = int(width - low);
    F16 acc[R][2];
    for (int r = 0; r < R; ++r) {
        const float* y = a.y + (row + r) * a.n + column;
        acc[r][0] = first ? F16::zero() : load_some(y, low);
        acc[r][1] = first ? F16::zero() : load_some(y + 16, high);
    }
    for (int64_t s = 0; s < steps; ++s) {
        if constexpr (D == Dtype::bf16) {
            Pairs w0 = Pairs::load(reinterpret_cast<const uint16_t*>(packed + s * PANEL));
            Pairs w1 = Pairs::load(reinterpret_cast<const uint16_t*>(packed + s * PANEL + 16));
            for (int r = 0; r < R; ++r) {
                uint32_t pair;
                std::memcpy(&pair, a.pairs + (row + r) * a.pairs_stride + k + 2 * s, 4);
                Pairs x = Pairs::set(pair);
                acc[r][0] = dot_pairs(acc[r][0], x, w0);
                acc[r][1] = dot_pairs(acc[r][1], x, w1);
            }
        } else {
            const float* w = reinterpret_cast<const float*>(packed + s * PANEL);
            F16 w0 = F16::load(w), w1 = F16::load(w + 16);
            for (int r = 0; r < R; ++r) {
                F16 x = F16::set(a.x[(row + r) * a.k + k + s]);
                acc[r][0] = fma(x, w0, acc[r][0]);
                acc[r][1] = fma(x, w1, acc[r][1]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        float* y = a.y + (row + r) * a.n + column;
        if (last && a.bias) {
            acc[r][0] = acc[r][0] + load_some(a.bias + column, low);
            acc[r][1] = acc[r][1] + load_some(a.bias + column + 16, high);
        }
        store_some(acc[r][0], y, low);
        store_some(acc[r][1], y + 16, high);
    }
}

template <Dtype D, int R>
void multiply_some(const Linear& a, const uint32_t* packed, int64_t steps, int64_t k, int64_t row,
                   int64_t rows, int64_t column, bool first, bool last) {
    if (rows == R) {
        multiply_rows<D, R>(a, packed, steps, k, row, column, first, last);
    } else if constexpr (R > 1) {
        multiply_some<D, R - 1>(a, packed, steps, k, row, rows, column, first, last);
    }
}

template <Dtype D>
void linear_panel(const Linear& a, int64_t panel, int64_t row, int64_t row_end) {
    alignas(64) uint32_t packed[DEPTH * PANEL];
    constexpr int PER_WORD = D == Dtype::bf16 ? 2 : 1;
    for (int64_t k = 0; k < a.k; k += DEPTH) {
        int64_t k_end = k + DEPTH < a.k ? k + DEPTH : a.k;
        pack<D>(a, panel, k, k_end, packed);
        int64_t steps = (k_end - k + PER_WORD - 1) / PER_WORD;
        for (int64_t r = row; r < row_end; r += ROWS) {
            int64_t rows = row_end - r < ROWS ? row_end - r : ROWS;
            multiply_some<D, ROWS>(a, packed, steps, k, r, rows, panel * PANEL, k == 0,
                                   k_end == a.k);
        }
    }
}

void linear(const Linear& a, int64_t panel, int64_t row, int64_t row_end) {
    switch (a.dtype) {
        case Dtype::f32: return linear_panel<Dtype::f32>(a, panel, row, row_end);
        case Dtype::bf16: return linear_panel<Dtype::bf16>(a, panel, row, row_end);
        case Dtype::f16: return linear_panel<Dtype::f16>(a, panel, row, row_end);
    }
}

}  // namespace
}  // namespace quire
