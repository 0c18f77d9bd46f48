// Linear layers. Weights are read where they lie, row-major as in the checkpoint.
//
// The order of summation is that of a dot product along K in a vector of sixteen lanes, whatever the
// number of rows: the numbers along K are words (pairs of bf16, or floats); within a chunk of CHUNK
// words lane l sums the words l, l + 16, l + 32, ... in order, then the lanes are added in order, then
// the chunks. Two kernels keep it. With few rows (here) each output is such a dot product, straight
// from the weights, up to sixteen at a time; many rows are in panels.inl.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 4, TILE_COLUMNS = 4;  // of few rows: sixteen sums
#else
constexpr int TILE_ROWS = 3, TILE_COLUMNS = 4;
#endif

constexpr int STREAM_ROWS = 2;  // rows of x that read weights in streams
constexpr int STRIP = 16;       // columns that all rows of x visit before the next

constexpr int64_t PAGE = 4096;  // bytes whose addresses are translated together

constexpr int AHEAD = 1024;  // bytes of a stream of weights that are asked for before they are needed

template <Dtype D>
constexpr int PER_WORD = D == Dtype::bf16 ? 2 : 1;
template <Dtype D>
constexpr int WIDTH = D == Dtype::f32 ? 4 : 2;  // bytes of a stored number

#if defined(__AVX512F__)
// out[j] lane i = r[i] lane j
inline void turn(__m512i (&r)[LANES], __m512i (&out)[LANES]) {
    __m512i t[LANES];
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
        out[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        out[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        out[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}
#endif

// out[j][i] = rows[i][j] for 16 x 16 words.
inline void transpose(const uint32_t* const rows[16], uint32_t* out, int64_t stride) {
#if defined(__AVX512F__)
    __m512i r[LANES], turned[LANES];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
    turn(r, turned);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * stride, turned[i]);
#else
    for (int i = 0; i < 16; ++i) {
        uint32_t row[16];  // rows of an odd number of bf16 are not aligned to words
        std::memcpy(row, rows[i], 64);
        for (int j = 0; j < 16; ++j) out[j * stride + i] = row[j];
    }
#endif
}

// total + the lanes of up to sixteen sums, in order: lane i of the result is that of acc[i].
template <int COUNT>
inline F16 add_lanes(F16 total, const F16 (&acc)[LANES]) {
#if defined(__AVX512F__)
    __m512i r[LANES], turned[LANES];
    for (int i = 0; i < LANES; ++i) r[i] = _mm512_castps_si512(acc[i].v);
    turn(r, turned);
    for (int l = 0; l < LANES; ++l) total = total + F16{_mm512_castsi512_ps(turned[l])};
    return total;
#else
    float sum[LANES], lanes[COUNT][LANES];
    total.store(sum);
    for (int i = 0; i < COUNT; ++i) acc[i].store(lanes[i]);
    for (int l = 0; l < LANES; ++l)
        for (int i = 0; i < COUNT; ++i) sum[i] += lanes[i][l];
    return F16::load(sum);
#endif
}

// Lines of memory asked for one by one, while others are worked on: `bytes` of each of some rows.
struct Asking {
    const char* line = nullptr;
    int64_t rows = 0, lines = 0, left = 0, skip = 0;

    Asking() = default;
    Asking(const char* first, int64_t rows, int64_t row_bytes, int64_t bytes)
        : line(first), rows(rows), lines((bytes + 63) / 64), left(lines),
          skip(row_bytes - lines * 64) {}
    // Has the addresses of pages translated, many at once: a line asked for on a page of unknown
    // address holds up the core.
    void touch_pages() const {
        int64_t row_bytes = lines * 64 + skip, step = row_bytes > PAGE ? row_bytes : PAGE;
        for (int64_t at = 0; at < rows * row_bytes; at += step) __builtin_prefetch(line + at, 0, 2);
    }
    void next() {
        if (rows == 0) return;
        __builtin_prefetch(line, 0, 2);  // a wrong address is no fault: this only asks
        line += 64;
        if (--left == 0) line += skip, left = lines, --rows;
    }
};

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
    static Operand set(uint32_t word) {
        if constexpr (D == Dtype::bf16) {
            return {Pairs::set(word)};
        } else {
            float number;
            std::memcpy(&number, &word, 4);
            return {F16::set(number)};
        }
    }
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

// What a tile asks for at each step along K: its own rows of weights further on, or lines elsewhere.
template <int N>
struct AskAhead {
    void step(const char* const* from, int64_t byte) {
        for (int n = 0; n < N; ++n) __builtin_prefetch(from[n] + byte + AHEAD, 0, 2);
    }
};
struct AskElsewhere {
    Asking lines;
    int64_t each;
    void step(const char* const*, int64_t) {
        for (int64_t i = 0; i < each; ++i) lines.next();
    }
};

// total[r * N + n] += x[r] . weights[columns[n]] over words [at, end) of one chunk
template <Dtype D, int R, int N, class Ask>
inline void dot_tile(const Linear& a, const uint32_t* x, const int64_t* columns, int64_t at,
                     int64_t end, Ask& asked, float* total) {
    static_assert(R * N <= LANES, "sums of lanes are turned sixteen at a time");
    Ask ask = asked;  // in registers
    F16 acc[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) acc[i] = F16::zero();
    const char* from[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
        from[n] = static_cast<const char*>(a.weight) + columns[n] * a.k * WIDTH<D>;
    int64_t whole = a.k / (LANES * PER_WORD<D>) * LANES, w = at;
    auto step = [&](auto weights) {
        Operand<D> number[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) number[r] = Operand<D>::load(x + r * a.x_stride + w);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            Operand<D> weight = weights(n);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r * N + n] = number[r].add_to(acc[r * N + n], weight);
        }
    };
    for (; w < (end < whole ? end : whole); w += LANES) {
        int64_t byte = w * PER_WORD<D> * WIDTH<D>;
        ask.step(from, byte);
        step([&](int n) { return Operand<D>::stored(from[n] + byte); });
    }
    uint32_t spare[LANES];
    if (w < end) step([&](int n) { return Operand<D>::load(words<D>(a, columns[n], w, spare)); });
    add_lanes<R * N>(F16::load(total), acc).store(total);
    asked = ask;
}

template <Dtype D, int R, int N, class Ask>
inline void dot_some(const Linear& a, int64_t rows, const uint32_t* x, const int64_t* columns,
                     int64_t at, int64_t end, Ask& ask, float* total) {
    if (rows == R) dot_tile<D, R, N>(a, x, columns, at, end, ask, total);
    else if constexpr (R > 1) dot_some<D, R - 1, N>(a, rows, x, columns, at, end, ask, total);
}

// y[row + r, columns[n]] = total[r * N + n] + bias
template <int N>
inline void write_tile(const Linear& a, int64_t row, int64_t rows, const int64_t* columns,
                       const float* total) {
    for (int64_t r = 0; r < rows; ++r)
        for (int n = 0; n < N; ++n) {
            float sum = total[r * N + n];
            a.y[(row + r) * a.n + columns[n]] = a.bias ? sum + a.bias[columns[n]] : sum;
        }
}

// One or two rows: as many streams of consecutive rows of weights, which the hardware follows, as
// there are columns in a tile.
template <Dtype D>
void streams(const Linear& a, int64_t column, int64_t columns) {
    constexpr int N = LANES / STREAM_ROWS;
    int64_t length = (columns + N - 1) / N, total_words = words_of(D, a.k);
    for (int64_t done = 0; done < length; ++done) {
        int64_t at[N];
        for (int n = 0; n < N; ++n) {  // beyond the last: the last once more
            int64_t output = n * length + done;
            at[n] = column + (output < columns ? output : columns - 1);
        }
        alignas(64) float total[LANES] = {};
        AskAhead<N> ask;
        for (int64_t w = 0; w < total_words; w += CHUNK)
            dot_some<D, STREAM_ROWS, N>(a, a.m, a.x, at, w,
                                        w + CHUNK < total_words ? w + CHUNK : total_words,
                                        ask, total);
        write_tile<N>(a, 0, a.m, at, total);
    }
}

// A strip of columns, whose weights of one chunk stay in the core's cache while all rows of x visit
// them, TILE_ROWS at a time. Meanwhile the next weights are asked for in the order they lie in.
template <Dtype D>
struct Strip {
    static constexpr int TILES = STRIP / TILE_COLUMNS;
    const Linear& a;
    int64_t column, column_end, visits, share;
    std::vector<float> totals;  // [visit][tile][sum]

    Strip(const Linear& a, int64_t column, int64_t column_end)
        : a(a), column(column), column_end(column_end), visits((a.m + TILE_ROWS - 1) / TILE_ROWS),
          share((a.m + visits - 1) / visits), totals(size_t(visits * TILES * LANES)) {}

    template <class Work>
    void each_tile(Work work) {
        float* total = totals.data();
        for (int64_t row = 0; row < a.m; row += share)
            for (int64_t first = column; first < column + STRIP; first += TILE_COLUMNS) {
                int64_t columns[TILE_COLUMNS];
                for (int n = 0; n < TILE_COLUMNS; ++n)
                    columns[n] = first + n < column_end ? first + n : column_end - 1;
                if (first < column_end)
                    work(row, a.m - row < share ? a.m - row : share, columns, total);
                total += LANES;
            }
    }
    void multiply(int64_t at, int64_t end, const Asking& next) {
        next.touch_pages();
        AskElsewhere ask{next, (TILE_COLUMNS + visits - 1) / visits};
        each_tile([&](int64_t row, int64_t rows, const int64_t* columns, float* total) {
            dot_some<D, TILE_ROWS, TILE_COLUMNS>(a, rows, a.x + row * a.x_stride, columns, at, end,
                                                 ask, total);
        });
    }
    void write() {
        each_tile([&](int64_t row, int64_t rows, const int64_t* columns, float* total) {
            write_tile<TILE_COLUMNS>(a, row, rows, columns, total);
            std::memset(total, 0, LANES * 4);
        });
    }
};

template <Dtype D>
void strips(const Linear& a, int64_t column, int64_t columns, const char* next) {
    int64_t total_words = words_of(D, a.k), row_bytes = a.k * WIDTH<D>;
    auto end_of = [&](int64_t at) { return at + CHUNK < total_words ? at + CHUNK : total_words; };
    auto asking = [&](const char* first, int64_t at) {
        constexpr int64_t WORD = PER_WORD<D> * WIDTH<D>;
        return Asking(first + at * WORD, STRIP, row_bytes, (end_of(at) - at) * WORD);
    };
    Strip<D> strip(a, column, column + columns);
    for (; strip.column < strip.column_end; strip.column += STRIP) {
        const char* here = static_cast<const char*>(a.weight) + strip.column * row_bytes;
        const char* then = strip.column + STRIP < strip.column_end ? here + STRIP * row_bytes : next;
        for (int64_t w = 0; w < total_words; w += CHUNK)
            strip.multiply(w, end_of(w), end_of(w) < total_words ? asking(here, end_of(w))
                                         : then                  ? asking(then, 0)
                                                                 : Asking());
        strip.write();
    }
}

template <Dtype D>
void few(const Linear& a, int64_t column, int64_t columns, const char* next) {
    if (a.m <= STREAM_ROWS) streams<D>(a, column, columns);
    else strips<D>(a, column, columns, next);
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
        for (; i + 2 * LANES <= k; i += 2 * LANES)
            store_bf16(x + i, numbers + i), store_bf16(x + i + LANES, numbers + i + LANES);
        for (; i < 2 * stride; ++i) numbers[i] = i < k ? float_to_bf16(x[i]) : 0;
    } else {
        for (int64_t i = 0; i < stride; ++i) out[i] = word_of(x, dtype, k, i);
    }
}

void linear_few(const Linear& a, int64_t column, int64_t columns, const void* next) {
    auto* then = static_cast<const char*>(next);
    switch (a.dtype) {
        case Dtype::f32: return few<Dtype::f32>(a, column, columns, then);
        case Dtype::bf16: return few<Dtype::bf16>(a, column, columns, then);
        case Dtype::f16: return few<Dtype::f16>(a, column, columns, then);
        default: return;  // weights have no others
    }
}

}  // namespace
}  // namespace quire
