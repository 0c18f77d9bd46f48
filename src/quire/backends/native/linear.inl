// Linear layers. Weights are read where they lie, row-major as in the checkpoint.
//
// The order of summation is that of a dot product along K in a vector of sixteen lanes, whatever the
// number of rows: the numbers along K are words (pairs of bf16, or floats); within a chunk of CHUNK
// words lane l sums the words l, l + 16, l + 32, ... in order, then the lanes are added in order, then
// the chunks. Two kernels keep it. With few rows each output is such a dot product, straight from the
// weights, sixteen outputs side by side. With many, a panel of PANEL columns is turned lane-major in
// the core's own cache and multiplied with ROWS rows at a time, lane by lane.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 6;  // 12 accumulators and 12 sums
constexpr bool SUMS_IN_REGISTERS = true;
#else
constexpr int ROWS = 2;
constexpr bool SUMS_IN_REGISTERS = false;
#endif

constexpr int AHEAD = 1024;  // bytes of a stream of weights that are asked for before they are needed

template <Dtype D>
constexpr int PER_WORD = D == Dtype::bf16 ? 2 : 1;

// out[j][i] = rows[i][j] for 16 x 16 words.
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
    for (int i = 0; i < 16; ++i) {
        uint32_t row[16];  // rows of an odd number of bf16 are not aligned to words
        std::memcpy(row, rows[i], 64);
        for (int j = 0; j < 16; ++j) out[j * stride + i] = row[j];
    }
#endif
}

// The 16 words of a row of weights at word `at`, zero beyond the end: in place where they can be.
template <Dtype D>
inline const uint32_t* words(const Linear& a, int64_t row, int64_t at, uint32_t* spare) {
    int64_t k = at * PER_WORD<D>, left = a.k - k, whole = LANES * PER_WORD<D>;
    size_t count = size_t(left < whole ? left : whole);
    if constexpr (D == Dtype::f32) {
        const float* from = static_cast<const float*>(a.weight) + row * a.k + k;
        if (left >= whole) return reinterpret_cast<const uint32_t*>(from);
        std::memset(spare, 0, 64);
        std::memcpy(spare, from, count * 4);
    } else if constexpr (D == Dtype::bf16) {
        const uint16_t* from = static_cast<const uint16_t*>(a.weight) + row * a.k + k;
        if (left >= whole) return reinterpret_cast<const uint32_t*>(from);
        std::memset(spare, 0, 64);
        std::memcpy(spare, from, count * 2);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(a.weight) + row * a.k + k;
        uint16_t padded[16] = {};
        if (left < whole) {
            std::memcpy(padded, from, count * 2);
            from = padded;
        }
        F16::load_fp16(from).store(reinterpret_cast<float*>(spare));
    }
    return spare;
}

// A vector of words as operands of a multiply-add.
template <Dtype D>
struct Operand {
    std::conditional_t<D == Dtype::bf16, Pairs, F16> v;
    static Operand load(const uint32_t* p) {
        if constexpr (D == Dtype::bf16) return {Pairs::load(reinterpret_cast<const uint16_t*>(p))};
        else return {F16::load(reinterpret_cast<const float*>(p))};
    }
    static Operand stored(const char* p) {
        if constexpr (D == Dtype::f16) return {F16::load_fp16(reinterpret_cast<const uint16_t*>(p))};
        else return load(reinterpret_cast<const uint32_t*>(p));
    }
    F16 add_to(F16 acc, Operand w) const {
        if constexpr (D == Dtype::bf16) return dot_pairs(acc, v, w.v);
        else return fma(v, w.v, acc);
    }
};

// ---- few rows ------------------------------------------------------------------------------------

// What a visit to rows of weights asks for meanwhile: every `visits`th line, `ahead` bytes on.
struct Ask {
    int64_t visit, visits, ahead;
};

// lanes[r][n][16] (+)= the lanes' sums over words [at, end) for R rows of x and N rows of weights
template <Dtype D, int R, int N>
inline void dot(const Linear& a, const uint32_t* x, const int64_t* columns, int64_t at, int64_t end,
                Ask ask, float* lanes) {
    constexpr int WIDTH = D == Dtype::f32 ? 4 : 2;  // bytes of a stored number
    F16 acc[R][N];
    const char* from[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        from[n] = static_cast<const char*>(a.weight) + columns[n] * a.k * WIDTH;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            acc[r][n] = at % CHUNK ? F16::load(lanes + (r * LANES + n) * LANES) : F16::zero();
    }
    int64_t whole = a.k / (LANES * PER_WORD<D>) * LANES, w = at, turn = ask.visit;
    auto step = [&](auto weights) {
        Operand<D> number[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) number[r] = Operand<D>::load(x + r * a.x_stride + w);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Operand<D> weight = weights(n);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][n] = number[r].add_to(acc[r][n], weight);
        }
    };
    for (; w < (end < whole ? end : whole); w += LANES) {
        int64_t byte = w * PER_WORD<D> * WIDTH;
        if (turn == 0) {  // a wrong address is no fault: this only asks
            for (int n = 0; n < N; ++n) __builtin_prefetch(from[n] + byte + ask.ahead, 0, 2);
            turn = ask.visits;
        }
        --turn;
        step([&](int n) { return Operand<D>::stored(from[n] + byte); });
    }
    uint32_t spare[LANES];
    if (w < end) step([&](int n) { return Operand<D>::load(words<D>(a, columns[n], w, spare)); });
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][n].store(lanes + (r * LANES + n) * LANES);
}

template <Dtype D, int R, int N>
inline void dot_some(const Linear& a, int64_t rows, const uint32_t* x, const int64_t* columns,
                     int64_t at, int64_t end, Ask ask, float* lanes) {
    if (rows == R) {
        for (int n = 0; n < LANES; n += N)
            dot<D, R, N>(a, x, columns + n, at, end, ask, lanes + n * LANES);
    } else if constexpr (R > 1) {
        dot_some<D, R - 1, N>(a, rows, x, columns, at, end, ask, lanes);
    }
}

// total[0..15] += sixteen outputs' lanes, each in order
inline void add_lanes(const float* lanes, float* total) {
    alignas(64) uint32_t turned[LANES * LANES];
    const uint32_t* from[LANES];
    for (int i = 0; i < LANES; ++i) from[i] = reinterpret_cast<const uint32_t*>(lanes + i * LANES);
    transpose(from, turned, LANES);
    F16 sum = F16::load(total);
    for (int l = 0; l < LANES; ++l)
        sum = sum + F16::load(reinterpret_cast<float*>(turned) + l * LANES);
    sum.store(total);
}

// All rows of x with sixteen columns. A stretch of x and weights stays in the first caches while up to
// R rows of x at a time visit it.
template <Dtype D, int R, int N>
void few_rows(const Linear& a, const int64_t* columns, int64_t stretch, float* lanes,
              float* totals) {
    int64_t total_words = words_of(D, a.k), visits = (a.m + R - 1) / R;
    int64_t share = (a.m + visits - 1) / visits;
    for (int64_t w = 0; w < total_words; w += stretch) {
        int64_t end = w + stretch < total_words ? w + stretch : total_words;
        for (int64_t v = 0; v < visits; ++v) {
            int64_t row = v * share, rows = a.m - row < share ? a.m - row : share;
            dot_some<D, R, N>(a, rows, a.x + row * a.x_stride, columns, w, end,
                              {v, visits, visits == 1 ? AHEAD : stretch * 4},
                              lanes + row * LANES * LANES);
        }
        if (end % CHUNK && end < total_words) continue;
        for (int64_t row = 0; row < a.m; ++row)
            add_lanes(lanes + row * LANES * LANES, totals + row * LANES);
    }
}

// Outputs [column, column + columns) as STREAMS streams of consecutive rows of weights, which the
// hardware follows: N of them side by side.
template <Dtype D, int R, int N, int STREAMS>
void few_columns(const Linear& a, int64_t column, int64_t columns, int64_t stretch) {
    constexpr int64_t EACH = LANES / STREAMS;  // outputs of a stream at a time
    std::vector<float> scratch(size_t(a.m * LANES * (LANES + 1)));
    float *lanes = scratch.data(), *totals = lanes + a.m * LANES * LANES;
    int64_t length = (columns + STREAMS - 1) / STREAMS;
    for (int64_t done = 0; done < length; done += EACH) {
        int64_t at[LANES];
        bool wanted[LANES];
        for (int i = 0; i < LANES; ++i) {
            int64_t mine = done + i / STREAMS, output = i % STREAMS * length + mine;
            wanted[i] = mine < length && output < columns;
            at[i] = column + (wanted[i] ? output : columns - 1);
        }
        std::memset(totals, 0, size_t(a.m * LANES) * 4);
        few_rows<D, R, N>(a, at, stretch, lanes, totals);
        for (int64_t row = 0; row < a.m; ++row)
            for (int i = 0; i < LANES; ++i) {
                if (!wanted[i]) continue;
                float sum = totals[row * LANES + i];
                a.y[row * a.n + at[i]] = a.bias ? sum + a.bias[at[i]] : sum;
            }
    }
}

template <Dtype D>
void few(const Linear& a, int64_t column, int64_t columns) {
    if (a.m <= 2) few_columns<D, 2, 8, 8>(a, column, columns, CHUNK);
    else few_columns<D, 6, 4, 16>(a, column, columns, CHUNK / 2);
}

// ---- many rows -----------------------------------------------------------------------------------

// The lines of a panel's weights over words [at, end), asked for one by one while another panel is
// multiplied.
template <Dtype D>
struct Asking {
    const char* line = nullptr;
    int64_t rows = 0, lines = 0, left = 0, skip = 0;

    Asking(const Linear& a, int64_t panel, int64_t at, int64_t end) {
        constexpr int64_t WIDTH = D == Dtype::f32 ? 4 : 2;
        int64_t column = panel * PANEL;
        if (column >= a.n || at >= end) return;
        rows = a.n - column < PANEL ? a.n - column : PANEL;
        line = static_cast<const char*>(a.weight) + (column * a.k + at * PER_WORD<D>) * WIDTH;
        left = lines = ((end - at) * PER_WORD<D> * WIDTH + 63) / 64;
        skip = a.k * WIDTH - lines * 64;
    }
    void next() {
        if (rows == 0) return;
        __builtin_prefetch(line, 0, 2);
        line += 64;
        if (--left == 0) line += skip, left = lines, --rows;
    }
};

// packed[lane][step][column] for the columns of a panel over words [at, end).
template <Dtype D>
void pack(const Linear& a, int64_t panel, int64_t at, int64_t end, bool cold, uint32_t* packed) {
    static const uint32_t nothing[LANES] = {};
    uint32_t spare[LANES][LANES];
    int64_t lane = lane_stride((end - at) / LANES);
    for (int half = 0; half < PANEL; half += LANES) {
        int64_t column = panel * PANEL + half;
        for (int64_t w = at; w < end; w += LANES) {
            const uint32_t* rows[LANES];
            for (int i = 0; i < LANES; ++i) {
                rows[i] = column + i < a.n ? words<D>(a, column + i, w, spare[i]) : nothing;
                if (cold) __builtin_prefetch(reinterpret_cast<const char*>(rows[i]) + AHEAD / 2, 0, 2);
            }
            transpose(rows, packed + (w - at) / LANES * PANEL + half, lane);
        }
    }
}

// R rows of x over a packed panel: total[r][0..31] += x[r] . packed, lane by lane
template <Dtype D, int R>
void multiply_tile(const uint32_t* x, const uint32_t* packed, int64_t steps, Asking<D>& ask,
                   float* total) {
    F16 sum[R][2];
    for (int r = 0; SUMS_IN_REGISTERS && r < R; ++r)
        sum[r][0] = F16::load(total + r * PANEL), sum[r][1] = F16::load(total + r * PANEL + LANES);
    for (int l = 0; l < LANES; ++l) {
        const uint32_t* w = packed + l * lane_stride(steps);
        F16 acc[R][2];
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = F16::zero();
        for (int64_t s = 0; s < steps; ++s, w += PANEL, x += R) {
            ask.next();
            if constexpr (D == Dtype::bf16) {
                Pairs w0 = Pairs::load(reinterpret_cast<const uint16_t*>(w));
                Pairs w1 = Pairs::load(reinterpret_cast<const uint16_t*>(w + LANES));
                for (int r = 0; r < R; ++r) {
                    Pairs pair = Pairs::set(x[r]);
                    acc[r][0] = dot_pairs(acc[r][0], pair, w0);
                    acc[r][1] = dot_pairs(acc[r][1], pair, w1);
                }
            } else {
                F16 w0 = F16::load(reinterpret_cast<const float*>(w));
                F16 w1 = F16::load(reinterpret_cast<const float*>(w + LANES));
                for (int r = 0; r < R; ++r) {
                    float number;
                    std::memcpy(&number, x + r, 4);
                    F16 wide = F16::set(number);
                    acc[r][0] = fma(wide, w0, acc[r][0]);
                    acc[r][1] = fma(wide, w1, acc[r][1]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            float* to = total + r * PANEL;
            if constexpr (SUMS_IN_REGISTERS) {
                sum[r][0] = sum[r][0] + acc[r][0], sum[r][1] = sum[r][1] + acc[r][1];
            } else {
                (F16::load(to) + acc[r][0]).store(to);
                (F16::load(to + LANES) + acc[r][1]).store(to + LANES);
            }
        }
    }
    for (int r = 0; SUMS_IN_REGISTERS && r < R; ++r)
        sum[r][0].store(total + r * PANEL), sum[r][1].store(total + r * PANEL + LANES);
}

template <Dtype D, int R>
void multiply_some(int64_t rows, const uint32_t* x, const uint32_t* packed, int64_t steps,
                   Asking<D>& ask, float* total) {
    if (rows == R) multiply_tile<D, R>(x, packed, steps, ask, total);
    else if constexpr (R > 1) multiply_some<D, R - 1>(rows, x, packed, steps, ask, total);
}

// One chunk of a packed panel with the rows [row, row_end) of x, added to y.
template <Dtype D>
void multiply_panel(const Linear& a, int64_t panel, int64_t row, int64_t row_end, int64_t at,
                    int64_t end, const uint32_t* packed, Asking<D> ask) {
    int64_t column = panel * PANEL, width = a.n - column < PANEL ? a.n - column : PANEL;
    int low = int(width < LANES ? width : LANES), high = int(width - low);
    const float* bias = a.bias && end == words_of(D, a.k) ? a.bias + column : nullptr;
    for (int64_t r = row; r < row_end; r += a.tile) {
        int64_t rows = a.m - r < a.tile ? a.m - r : a.tile;
        alignas(64) float total[ROWS * PANEL] = {};
        float* y = a.y + r * a.n + column;
        for (int64_t i = 0; at && i < rows; ++i) {
            load_some(y + i * a.n, low).store(total + i * PANEL);
            load_some(y + i * a.n + LANES, high).store(total + i * PANEL + LANES);
        }
        multiply_some<D, ROWS>(rows, a.x + at * a.m + r * (end - at), packed, (end - at) / LANES,
                               ask, total);
        for (int64_t i = 0; i < rows; ++i) {
            F16 left = F16::load(total + i * PANEL), right = F16::load(total + i * PANEL + LANES);
            if (bias) {
                left = left + load_some(bias, low);
                right = right + load_some(bias + LANES, high);
            }
            store_some(left, y + i * a.n, low);
            store_some(right, y + i * a.n + LANES, high);
        }
    }
}

template <Dtype D>
void many_rows(const Linear& a, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
    static thread_local std::vector<uint32_t> room(LANES * lane_stride(CHUNK / LANES) + LANES);
    auto* packed = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) &
                                               ~uintptr_t(63));
    int64_t total_words = words_of(D, a.k);
    auto end_of = [&](int64_t at) { return at + CHUNK < total_words ? at + CHUNK : total_words; };
    for (int64_t p = panel; p < panel_end; ++p)
        for (int64_t w = 0; w < total_words; w += CHUNK) {
            int64_t end = end_of(w), next = p + 1 < panel_end ? p + 1 : a.n;
            pack<D>(a, p, w, end, p == panel && w == 0, packed);
            Asking<D> ask = end < total_words ? Asking<D>(a, p, end, end_of(end))
                                              : Asking<D>(a, next, 0, end_of(0));
            multiply_panel<D>(a, p, row, row_end, w, end, packed, ask);
        }
}

// ---- rows of x as words ---------------------------------------------------------------------------

inline uint32_t word_of(const float* x, Dtype dtype, int64_t k, int64_t at) {
    uint32_t word = 0;
    if (dtype == Dtype::bf16) {
        if (2 * at < k) word = float_to_bf16(x[2 * at]);
        if (2 * at + 1 < k) word |= uint32_t(float_to_bf16(x[2 * at + 1])) << 16;
    } else if (at < k) {
        std::memcpy(&word, x + at, 4);
    }
    return word;
}

// One row for `few_rows`: words in order, zeros to the end of the stride.
void row_words(const float* x, Dtype dtype, int64_t k, int64_t stride, uint32_t* out) {
    if (dtype == Dtype::bf16) {
        auto* numbers = reinterpret_cast<uint16_t*>(out);
        int64_t i = 0;
        // Whole vectors of words only, as in `tile_words`: the instruction drops denormals, the
        // plain rounding of the rest keeps them, and both kernels must see the same numbers.
        for (; i + 2 * LANES <= k; i += 2 * LANES)
            store_bf16(x + i, numbers + i), store_bf16(x + i + LANES, numbers + i + LANES);
        for (; i < 2 * stride; ++i) numbers[i] = i < k ? float_to_bf16(x[i]) : 0;
    } else {
        for (int64_t i = 0; i < stride; ++i) out[i] = word_of(x, dtype, k, i);
    }
}

// The rows [row, row + rows) of x [m, k] for `many_rows`: chunk, tile, lane, step, row.
void tile_words(const float* x, Dtype dtype, int64_t m, int64_t k, int64_t row, int64_t rows,
                uint32_t* out) {
    int64_t total_words = words_of(dtype, k);
    for (int64_t w = 0; w < total_words; w += CHUNK) {
        int64_t end = w + CHUNK < total_words ? w + CHUNK : total_words;
        int64_t steps = (end - w) / LANES;
        uint32_t* to = out + w * m + row * (end - w);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < steps; ++s) {
                alignas(64) uint32_t words[LANES];
                int64_t at = w + s * LANES;
                if (dtype == Dtype::bf16 && 2 * (at + LANES) <= k) {
                    const float* from = x + (row + r) * k + 2 * at;
                    auto* numbers = reinterpret_cast<uint16_t*>(words);
                    store_bf16(from, numbers), store_bf16(from + LANES, numbers + LANES);
                } else {
                    for (int l = 0; l < LANES; ++l)
                        words[l] = word_of(x + (row + r) * k, dtype, k, at + l);
                }
                for (int l = 0; l < LANES; ++l) to[(l * steps + s) * rows + r] = words[l];
            }
    }
}

// Rows a tile for m rows: no more than ROWS, and as even as can be.
int64_t tile_rows(int64_t m) {
    int64_t tiles = (m + ROWS - 1) / ROWS;
    return (m + tiles - 1) / tiles;
}

void linear_few(const Linear& a, int64_t column, int64_t columns) {
    switch (a.dtype) {
        case Dtype::f32: return few<Dtype::f32>(a, column, columns);
        case Dtype::bf16: return few<Dtype::bf16>(a, column, columns);
        case Dtype::f16: return few<Dtype::f16>(a, column, columns);
    }
}

void linear_many(const Linear& a, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
    switch (a.dtype) {
        case Dtype::f32: return many_rows<Dtype::f32>(a, panel, panel_end, row, row_end);
        case Dtype::bf16: return many_rows<Dtype::bf16>(a, panel, panel_end, row, row_end);
        case Dtype::f16: return many_rows<Dtype::f16>(a, panel, panel_end, row, row_end);
    }
}

}  // namespace
}  // namespace quire
