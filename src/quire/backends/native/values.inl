// Weights from scores, and values mixed with them, for the rows of a tile over one split.
//
// A row of scores [SPLIT] becomes, in place, what its values are multiplied with: floats; bf16 from the
// front; or, for bytes, words of 16 bits a number (of integers for int8 values, of bf16 for fp8 ones),
// with what makes them weights at the row's end.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int MIX_ROWS = 6;  // query rows that share loads of values
#else
constexpr int MIX_ROWS = 2;
#endif

constexpr int MIX_WIDTH = 4;  // vectors of 16 value dimensions at a time

// What of a split's values a row is weighted with: blocks [first, first + count) of the weights.
struct Mix {
    const Values* blocks;
    int64_t first, count;
    const float* weights;  // [rows][SPLIT]
    int64_t dim;
    bool more, last;  // blocks were mixed before; will not be
    float* mixed;     // [rows][dim]
};

// A row of weights that bytes are multiplied with.
struct ByteWeights {
    uint32_t words[SPLIT / 4][2];
    float unit;
    int32_t start;  // what takes away the 128 that were added to values
};
static_assert(sizeof(ByteWeights) <= SPLIT * sizeof(float), "weights take the place of scores");
inline const ByteWeights& byte_weights(const float* row) {
    return *reinterpret_cast<const ByteWeights*>(row);
}

// mixed[r][0..16 W) (+)= weights[r] . value over some blocks, for R rows; of int8 values sums stay
// integers until the last block. A function of its own, like `score`: where it was inlined its sums were
// spilled.
template <Form F, int R, int W, class Ask>
__attribute__((noinline)) void mix(const Mix& m, int row, int64_t column, Ask& ask) {
    const float* rows = m.weights + row * SPLIT;
    float* mixed = m.mixed + row * m.dim + column;
    Sum<F> acc[R][W];
    // Only a single vector may be less than whole.
    const bool whole = W > 1 || m.dim - column >= 16;
    const int left = int(m.dim - column);
    const int64_t dim = value_words<F>(m.dim);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const float* from = mixed + r * m.dim + 16 * w;
            if constexpr (INTEGER<F>)
                acc[r][w] = !m.more ? Sums::set(byte_weights(rows + r * SPLIT).start)
                                    : Sums::from_bits(whole ? F16::load(from) : load_some(from, left));
            else acc[r][w] = !m.more ? F16::zero() : whole ? F16::load(from) : load_some(from, left);
        }
    for (int64_t b = 0; b < m.count; ++b) {
        const char* value = m.blocks[b].data + column * LANE<F>;
        const float* weights = rows + (m.first + b) * (BLOCK / BESIDE<F> * PARTS<F>);
        for (int64_t t = 0; t < BLOCK / BESIDE<F>; ++t, value += dim * LANE<F>) {
            ask.step();
#pragma GCC unroll 2
            for (int part = 0; part < PARTS<F>; ++part, ++weights) {
                decltype(load_part<F>(nullptr, 0)) parts[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w)
                    parts[w] = whole ? load_part<F>(value + w * LINE<F>, part)
                                     : load_lanes<F>(value, part, left);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    uint32_t word;
                    std::memcpy(&word, weights + r * SPLIT, 4);
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) add_product(acc[r][w], parts[w], word);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            float* to = mixed + r * m.dim + 16 * w;
            F16 all;
            if constexpr (INTEGER<F>)
                all = m.last ? acc[r][w].value() * F16::set(byte_weights(rows + r * SPLIT).unit)
                             : acc[r][w].bits();
            else if (SCALED<F> && m.last)
                all = acc[r][w] * F16::set(byte_weights(rows + r * SPLIT).unit);
            else all = acc[r][w];
            if (whole) all.store(to);
            else store_some(all, to, left);
        }
}

template <Form F, int R, class Ask>
inline void mix_some(const Mix& m, int row, Ask& ask) {
    int64_t column = 0;
    for (; column + 16 * MIX_WIDTH <= m.dim; column += 16 * MIX_WIDTH)
        mix<F, R, MIX_WIDTH>(m, row, column, ask);
    for (; column < m.dim; column += 16) mix<F, R, 1>(m, row, column, ask);
}

// Rows [row, rows).
template <Form F, int R = MIX_ROWS, class Ask>
inline void mix_rows(int row, int rows, const Mix& m, Ask& ask) {
    for (; row + R <= rows; row += R) mix_some<F, R>(m, row, ask);
    if constexpr (R > 1)
        if (row < rows) mix_rows<F, R - 1>(row, rows, m, ask);
}

// Scores that become weights in place: `count` blocks from position `at` on. Their rows go side by
// side, so that one waits less for the end of its sums.
struct Weights {
    const Tile& tile;
    float* scores;  // [rows][SPLIT]
    int64_t count, at;
    float scale;             // of scores; the factor log2(e) is in it: weights are powers of two
    const uint16_t* scales;  // of values, bf16 [16 count], or null
    float *best, *total;     // [rows] the greatest scaled score, and the sum of weights
};

// A row's weights are 2^(score * factor + shift).
template <int R>
struct Powers {
    F16 factor, shift[R];

    Powers(const Weights& w, int row) : factor(F16::set(w.scale)) {
        F16 top[R];
        for (F16& t : top) t = F16::set(NOTHING);
        for (int64_t b = 0; b < w.count; ++b)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                top[r] = max(top[r], F16::load(w.scores + (row + r) * SPLIT + b * BLOCK));
        for (int r = 0; r < R; ++r) {
            float best = max(top[r]);
            w.best[row + r] = best * w.scale;
            shift[r] = F16::set(best == NOTHING ? 0.0f : -best * w.scale);
        }
    }
    F16 operator()(const float* scores, int r) const {
        return fma(F16::load(scores), factor, shift[r]);
    }
};

template <Form F, int R, class Ask>
inline void soften(const Weights& w, int row, Ask& ask) {
    Powers<R> powers(w, row);
    F16 sums[R];
    for (F16& s : sums) s = F16::zero();
    for (int64_t b = 0; b < w.count; ++b)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            ask.step();
            float* at = w.scores + (row + r) * SPLIT;
            F16 weights;
            if constexpr (F == Form::pairs) {
                weights = exp2_coarse(powers(at + b * BLOCK, r));
                // Bf16 weights overwrite the scores from the front. What is summed is what values
                // will be multiplied with, so that roundings of the weights largely cancel.
                weights = store_rounded(weights, reinterpret_cast<uint16_t*>(at) + b * BLOCK);
            } else {
                weights = exp2(powers(at + b * BLOCK, r));
                weights.store(at + b * BLOCK);
            }
            sums[r] = sums[r] + weights;
        }
    for (int r = 0; r < R; ++r) w.total[row + r] = sum(sums[r]);
}

// Weights times the scales of their values, in place; `peak`: the greatest. A scale that a row does not
// see counts for nothing, whatever it is; one of NaN that it sees makes its peak NaN.
template <int R, class Ask>
inline void weigh(const Weights& w, int row, float* peak, Ask& ask) {
    Powers<R> powers(w, row);
    F16 sums[R], most[R];
    for (int r = 0; r < R; ++r) sums[r] = most[r] = F16::zero();
    for (int64_t b = 0; b < w.count; ++b) {
        F16 scale = F16::load_bf16(w.scales + b * BLOCK);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            ask.step();
            float* at = w.scores + (row + r) * SPLIT + b * BLOCK;
            F16 weights = exp2_coarse(powers(at, r));
            sums[r] = sums[r] + weights;
            weights = seen_by(w.tile, row + r, w.at + b * BLOCK, weights * scale, 0.0f);
            most[r] = max_bits(most[r], weights);
            weights.store(at);
        }
    }
    for (int r = 0; r < R; ++r) w.total[row + r] = sum(sums[r]), peak[r] = max_bits(most[r]);
}

// For bytes weights times scales become words: bf16 of their shares of the greatest, or integers. Those
// whose greatest is next to nothing are taken for zero.
template <Form F, int R, class Ask>
inline void soften_scaled(const Weights& w, int row, Ask& ask) {
    constexpr float MOST = F == Form::int8 ? MOST_16 : 1.0f;
    float peak[R];
    weigh<R>(w, row, peak, ask);
    F16 factor[R], sums[R];
    for (int r = 0; r < R; ++r) {
        bool any = peak[r] >= 0x1p-111f && peak[r] < INFINITY;
        factor[r] = F16::set(any ? MOST / peak[r] : 0.0f), sums[r] = F16::zero();
    }
    for (int64_t b = 0; b < w.count; ++b)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            float* at = w.scores + (row + r) * SPLIT;
            F16 weights = F16::load(at + b * BLOCK) * factor[r];
            uint32_t* to = reinterpret_cast<ByteWeights*>(at)->words[b * 4];
            if constexpr (F == Form::int8) {
                weights = round_even(weights);
                sums[r] = sums[r] + weights;
                store_integers(weights, to);
            } else {
                store_bf16_words(weights, to);
            }
        }
    for (int r = 0; r < R; ++r) {
        auto& end = *reinterpret_cast<ByteWeights*>(w.scores + (row + r) * SPLIT);
        float all = sum(sums[r]);  // NaN if a weight is: then the sum of weights is, too
        end.unit = peak[r] / MOST, end.start = all == all ? int32_t(-128.0f * all) : 0;
    }
}

template <class Ask, int R = 4>
inline void soften_rows(Form form, const Weights& w, int row, Ask& ask) {
    for (; row + R <= w.tile.rows; row += R)
        by_form(form, [&](auto f) {
            if constexpr (PACKED<f()>) return;  // soften_packed_rows
            else if constexpr (SCALED<f()>) soften_scaled<f(), R>(w, row, ask);
            else soften<f(), R>(w, row, ask);
        });
    if constexpr (R > 1) soften_rows<Ask, R - 1>(form, w, row, ask);
}

// True if a token of the block that some row of the tile does not see has a value that is infinite
// or NaN: 0 * inf would carry it to that row. Scaled numbers are finite; what a row does not see of
// their scales it does not count.
template <Form F>
bool is_wild(const Tile& tile, const Values& block, int64_t at, int64_t dim) {
    if (SCALED<F> || PACKED<F> || (tile.low[tile.rows - 1] <= at && tile.high[0] >= at + BLOCK)) return false;
    const auto* value = reinterpret_cast<const Number<F>*>(block.data);
    constexpr uint32_t EXPONENTS = F == Form::halves ? 0x7c00 : 0x7f80;
    uint32_t most = 0;  // exponent, as bits of a bf16 or fp16: a maximum compiles to vectors
    for (int64_t i = 0; i < BLOCK * dim; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, value + i, sizeof value[i]);
        uint32_t exponent = (F == Form::floats ? bits >> 16 : bits) & EXPONENTS;
        most = exponent > most ? exponent : most;
    }
    return most == EXPONENTS;
}

// A copy of the block without the values of tokens that one row does not see.
template <Form F>
Values seen_only(const Values& block, int64_t low, int64_t high, int64_t at, int64_t dim,
                 Spare& spare) {
    constexpr int N = BESIDE<F>;
    const auto* from = reinterpret_cast<const Number<F>*>(block.data);
    auto* to = reinterpret_cast<Number<F>*>(spare.number);
    for (int64_t t = 0; t < BLOCK; ++t)
        for (int64_t d = 0; d < dim; ++d) {
            int64_t i = (t / N * dim + d) * N + t % N;
            to[i] = at + t >= low && at + t < high ? from[i] : Number<F>(0);
        }
    return {reinterpret_cast<const char*>(to), block.scale};
}

// The weighted sum of values row by row, each over what that row sees.
template <Form F>
void mix_apart(const Tile& tile, const Mix& m, int64_t at) {
    std::vector<Spare> spare(static_cast<size_t>(m.count));
    std::vector<Values> seen(static_cast<size_t>(m.count));
    NoLines ask;
    for (int r = 0; r < tile.rows; ++r) {
        for (int64_t b = 0; b < m.count; ++b)
            seen[size_t(b)] = seen_only<F>(m.blocks[b], tile.low[r], tile.high[r], at + b * BLOCK,
                                           m.dim, spare[size_t(b)]);
        mix_rows<F, 1>(r, r + 1, {seen.data(), 0, m.count, m.weights, m.dim, false, true, m.mixed},
                       ask);
    }
}

}  // namespace
}  // namespace quire
