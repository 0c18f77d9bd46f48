// Linear layers of many rows: a panel of PANEL columns is turned lane-major in the core's own cache and
// multiplied with ROWS rows of x at a time, lane by lane, in the order of summation of linear.inl.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 6;  // 12 accumulators and 12 sums
#else
constexpr int ROWS = 2;
#endif

// ---- weights as panels -----------------------------------------------------------------------------

// The lines of a panel's weights over words [at, end).
template <Dtype D>
Asking ask_panel(const Linear& a, int64_t panel, int64_t at, int64_t end) {
    constexpr int64_t WORD = PER_WORD<D> * WIDTH<D>;
    int64_t column = panel * PANEL, row_bytes = a.k * WIDTH<D>;
    if (column >= a.n || at >= end) return {};
    return {static_cast<const char*>(a.weight) + column * row_bytes + at * WORD,
            a.n - column < PANEL ? a.n - column : PANEL, row_bytes, (end - at) * WORD};
}

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

// ---- rows of x -------------------------------------------------------------------------------------

// One row of x [k] for panels: within each chunk lane by lane, out[lane][step].
void lane_words(const float* x, Dtype dtype, int64_t k, uint32_t* out) {
    static const uint32_t nothing[LANES] = {};
    static thread_local std::vector<uint32_t> room;
    int64_t total_words = words_of(dtype, k);
    if (int64_t(room.size()) < total_words) room.resize(size_t(total_words));
    row_words(x, dtype, k, total_words, room.data());
    for (int64_t w = 0; w < total_words; w += CHUNK) {
        int64_t end = w + CHUNK < total_words ? w + CHUNK : total_words;
        int64_t steps = (end - w) / LANES;
        for (int64_t s = 0; s < steps; s += LANES) {
            const uint32_t* from[LANES];
            for (int i = 0; i < LANES; ++i)
                from[i] = s + i < steps ? room.data() + w + (s + i) * LANES : nothing;
            if (s + LANES <= steps) {
                transpose(from, out + w + s, steps);
                continue;
            }
            uint32_t turned[LANES * LANES];
            transpose(from, turned, LANES);
            for (int l = 0; l < LANES; ++l)
                std::memcpy(out + w + l * steps + s, turned + l * LANES, size_t(steps - s) * 4);
        }
    }
}

// ---- products --------------------------------------------------------------------------------------

// Up to ROWS rows of x by one chunk of a packed panel.
template <Dtype D>
struct PanelTile {
    const Linear& a;
    const uint32_t* packed;
    int64_t at, end, column;
    int low, high;  // columns of each half of the panel

    PanelTile(const Linear& a, int64_t panel, int64_t at, int64_t end, const uint32_t* packed)
        : a(a), packed(packed), at(at), end(end), column(panel * PANEL) {
        int width = int(a.n - column < PANEL ? a.n - column : PANEL);
        low = width < LANES ? width : LANES, high = width - low;
    }

    // Lines that `finish` will read or write.
    void ask_results(int64_t row, int rows) const {
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) {
                int64_t place = (row + r) * a.n + column + half * LANES;
                __builtin_prefetch(a.y + place, 1);
                if (a.other) __builtin_prefetch(a.other + place);
            }
    }

    // y of one row: `total` is the sum of all words so far.
    void finish(const float* total, int64_t row) const {
        bool last = end == words_of(D, a.k);
        for (int half = 0; half < 2; ++half) {
            int some = half ? high : low;
            int64_t first = column + half * LANES, place = row * a.n + first;
            F16 sum = F16::load(total + half * LANES);
            if (last && a.bias) sum = sum + load_some(a.bias + first, some);
            if (last && a.join != Join::none) {
                F16 other = load_some(a.other + place, some);
                sum = a.join == Join::add ? other + sum : activated(other, a.activation) * sum;
            }
            store_some(sum, a.y + place, some);
        }
    }

    template <int R>
    void multiply(int64_t row, Asking& asked) const {
        Asking ask = asked;  // in registers
        int64_t steps = (end - at) / LANES, stride = a.x_stride;
        const uint32_t *x = a.x + row * stride + at, *w = packed;
        F16 sum[R][2];
        ask_results(row, R);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float* y = a.y + (row + r) * a.n + column;
            sum[r][0] = at ? load_some(y, low) : F16::zero();
            sum[r][1] = at ? load_some(y + LANES, high) : F16::zero();
        }
        for (int l = 0; l < LANES; ++l, w = packed + l * lane_stride(steps)) {
            F16 acc[R][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = F16::zero();
            for (int64_t s = 0; s < steps; ++s, w += PANEL, ++x) {
                ask.next();
                auto w0 = Operand<D>::load(w), w1 = Operand<D>::load(w + LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    Operand<D> number = Operand<D>::set(x[r * stride]);
                    acc[r][0] = number.add_to(acc[r][0], w0);
                    acc[r][1] = number.add_to(acc[r][1], w1);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                sum[r][0] = sum[r][0] + acc[r][0], sum[r][1] = sum[r][1] + acc[r][1];
        }
        alignas(64) float total[R][PANEL];  // out of the registers, in a loop that is not unrolled
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][0].store(total[r]), sum[r][1].store(total[r] + LANES);
        for (int r = 0; r < R; ++r) finish(total[r], row + r);
        asked = ask;
    }

    template <int R = ROWS>
    void multiply_some(int64_t rows, int64_t row, Asking& ask) const {
        if (rows == R) multiply<R>(row, ask);
        else if constexpr (R > 1) multiply_some<R - 1>(rows, row, ask);
    }
};

// Columns of the panels [panel, panel_end), rows [row, row_end) of x.
template <Dtype D>
void many_rows(const Linear& a, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
    static thread_local std::vector<uint32_t> room(LANES * lane_stride(CHUNK / LANES) + LANES);
    auto* packed = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) &
                                               ~uintptr_t(63));
    int64_t total_words = words_of(D, a.k), tiles = (row_end - row + ROWS - 1) / ROWS;
    int64_t share = (row_end - row + tiles - 1) / tiles;  // rows a tile, as even as can be
    auto end_of = [&](int64_t at) { return at + CHUNK < total_words ? at + CHUNK : total_words; };
    for (int64_t p = panel; p < panel_end; ++p)
        for (int64_t w = 0; w < total_words; w += CHUNK) {
            int64_t end = end_of(w), next = p + 1 < panel_end ? p + 1 : a.n;
            pack<D>(a, p, w, end, p == panel && w == 0, packed);
            Asking ask = end < total_words ? ask_panel<D>(a, p, end, end_of(end))
                                           : ask_panel<D>(a, next, 0, end_of(0));
            PanelTile<D> tile(a, p, w, end, packed);
            for (int64_t r = row; r < row_end; r += share)
                tile.multiply_some(row_end - r < share ? row_end - r : share, r, ask);
        }
}

void linear_many(const Linear& a, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
    switch (a.dtype) {
        case Dtype::f32: return many_rows<Dtype::f32>(a, panel, panel_end, row, row_end);
        case Dtype::bf16: return many_rows<Dtype::bf16>(a, panel, panel_end, row, row_end);
        case Dtype::f16: return many_rows<Dtype::f16>(a, panel, panel_end, row, row_end);
        default: return;  // weights have no others
    }
}

}  // namespace
}  // namespace quire
