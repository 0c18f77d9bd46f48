// Weights of packed values, and the values mixed with them; see packed.inl.

namespace quire {
namespace {

constexpr int64_t WEIGHTS = SPLIT / 2 + 16;  // words of a row's weights: off the powers of two

// Weights of a tile's rows over one split: weights times steps, as words of bf16, for each stretch of
// dimensions, and the sums of weights times centres.
struct StretchWeights {
    uint32_t* words;  // [stretches][rows][WEIGHTS]
    float* middle;    // [rows][stretches]
    int rows;
    int64_t stretches;

    static int64_t size(int64_t rows, int64_t dim) {  // in words
        int64_t stretches = ceil_div(dim, STRETCH);
        return ceil_div(rows * stretches * (WEIGHTS + 1), 16) * 16;
    }
    StretchWeights(uint32_t* at, int rows, int64_t dim)
        : words(at), rows(rows), stretches(ceil_div(dim, STRETCH)) {
        middle = reinterpret_cast<float*>(words + stretches * rows * WEIGHTS);
    }
    uint32_t* row(int64_t stretch, int r) const { return words + (stretch * rows + r) * WEIGHTS; }
};

// Room for the weights of some tiles, kept from call to call.
inline uint32_t* weights_room(int64_t words) {
    static thread_local std::vector<uint32_t> room;
    if (int64_t(room.size()) < words + 16) room.resize(size_t(words) + 16);
    return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t(63));
}

// Steps and centres of tokens that a row does not see count for nothing, whatever they are.
template <Form F, int R, class Ask>
inline void soften_packed(const Weights& w, const Values* blocks, int row, const StretchWeights& to,
                          Ask& ask) {
    Powers<R> powers(w, row);
    F16 sums[R];
    for (F16& s : sums) s = F16::zero();
    for (int64_t b = 0; b < w.count; ++b)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            ask.step();
            float* at = w.scores + (row + r) * SPLIT + b * BLOCK;
            F16 weights = exp2_coarse(powers(at, r));
            sums[r] = sums[r] + weights;
            weights.store(at);
        }
    for (int r = 0; r < R; ++r) w.total[row + r] = sum(sums[r]);
    const F16 middle = F16::set(middle_of(BITS<F>));
    const int64_t stride = blocks[0].stride;
    for (int64_t g = 0; g < to.stretches; ++g) {
        for (F16& s : sums) s = F16::zero();
        for (int64_t b = 0; b < w.count; ++b) {
            const uint16_t* scale = blocks[b].scale + 2 * g * stride;
            F16 step = F16::load_bf16(scale + stride);
            F16 centre = fma(step, middle, F16::load_bf16(scale));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                int64_t at = w.at + b * BLOCK;
                F16 weights = F16::load(w.scores + (row + r) * SPLIT + b * BLOCK);
                F16 seen = seen_by(w.tile, row + r, at, centre, 0.0f);
                sums[r] = fma(weights, seen, sums[r]);
                store_rounded(seen_by(w.tile, row + r, at, weights * step, 0.0f),
                              reinterpret_cast<uint16_t*>(to.row(g, row + r)) + b * BLOCK);
            }
        }
        for (int r = 0; r < R; ++r) to.middle[(row + r) * to.stretches + g] = sum(sums[r]);
    }
}

template <Form F, int R = 4, class Ask>
inline void soften_packed_rows(const Weights& w, const Values* blocks, int row,
                               const StretchWeights& to, Ask& ask) {
    for (; row + R <= w.tile.rows; row += R) soften_packed<F, R>(w, blocks, row, to, ask);
    if constexpr (R > 1) soften_packed_rows<F, R - 1>(w, blocks, row, to, ask);
}

// Blocks of values and their place among the weights.
struct PackedMix {
    const Values* blocks;
    int64_t first, count;
    StretchWeights weights;
    int64_t dim;
    bool more;     // blocks were mixed before
    float* mixed;  // [rows][dim]
};

// mixed[r][0..16 W) (+)= weights[r] . value over some blocks, for R rows.
template <Form F, int R, int W, class Ask>
__attribute__((noinline)) void mix_packed(const PackedMix& m, int row, int64_t column, Ask& ask) {
    constexpr int PAIRS = 16 / BITS<F>, N = BESIDE<F>;
    float* mixed = m.mixed + row * m.dim + column;
    const bool whole = W > 1 || m.dim - column >= 16;  // only a single vector may be less
    const int left = int(m.dim - column);
    const int64_t width = value_words<F>(m.dim), stretch = column / STRETCH;
    const uint32_t* words[(W + 1) / 2];
    F16 acc[R][W];
#pragma GCC unroll 4
    for (int w = 0; w < (W + 1) / 2; ++w) words[w] = m.weights.row(stretch + w, row) + m.first * BLOCK / 2;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const float* from = mixed + r * m.dim + 16 * w;
            const float* middle = m.weights.middle + (row + r) * m.weights.stretches + stretch;
            acc[r][w] = !m.more ? F16::set(middle[w / 2]) : whole ? F16::load(from) : load_some(from, left);
        }
    for (int64_t b = 0; b < m.count; ++b) {
        const char* from = m.blocks[b].data + column * 4;
        for (int64_t t = 0; t < BLOCK / N; ++t, from += width * 4) {
#pragma GCC unroll 8
            for (int k = 0; k < PAIRS; ++k) {
                if (k % 2 == 0) ask.step();
                Pairs pairs[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) pairs[w] = load_packed<BITS<F>>(from + 64 * w, k);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w)
                        acc[r][w] = dot_pairs(acc[r][w], Pairs::set(words[w / 2][r * WEIGHTS + k]),
                                              pairs[w]);
            }
#pragma GCC unroll 4
            for (int w = 0; w < (W + 1) / 2; ++w) words[w] += PAIRS;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            float* to = mixed + r * m.dim + 16 * w;
            if (whole) acc[r][w].store(to);
            else store_some(acc[r][w], to, left);
        }
}

// Rows [row, rows).
template <Form F, int R = MIX_ROWS, class Ask>
inline void mix_packed_rows(int row, int rows, const PackedMix& m, Ask& ask) {
    for (; row + R <= rows; row += R) {
        int64_t column = 0;
        for (; column + 64 <= m.dim; column += 64) mix_packed<F, R, 4>(m, row, column, ask);
        for (; column + 32 <= m.dim; column += 32) mix_packed<F, R, 2>(m, row, column, ask);
        for (; column < m.dim; column += 16) mix_packed<F, R, 1>(m, row, column, ask);
    }
    if constexpr (R > 1)
        if (row < rows) mix_packed_rows<F, R - 1>(row, rows, m, ask);
}

}  // namespace
}  // namespace quire
