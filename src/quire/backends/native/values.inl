// Weights from scores, and values mixed with them, for the rows of a tile over one split.
//
// A row of scores [SPLIT] becomes, in place, what its values are multiplied with: floats; bf16 from the
// front; or, for int8 values, the words of integers of 15 bits, whose unit lies at the row's end.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int MIX_ROWS = 6;  // query rows that share loads of values
#else
constexpr int MIX_ROWS = 2;
#endif

// Vectors of 16 value dimensions at a time.
template <Form F>
constexpr int mix_width(int rows) {
    return F != Form::int8 || rows * 4 <= SUMS_AT_ONCE ? 4 : rows * 2 <= SUMS_AT_ONCE ? 2 : 1;
}

// What of a split's values a row is weighted with: blocks [first, first + count) of the weights.
struct Mix {
    const Values* blocks;
    int64_t first, count;
    const float* weights;  // [rows][SPLIT]
    int64_t dim;
    bool more, last;  // blocks were mixed before; will not be
    float* mixed;     // [rows][dim]
};

// The end of a row of integer weights.
struct Integers {
    uint32_t words[SPLIT / 4][2];
    float unit;
    int32_t start;  // what takes away the 128 that were added to values
};
static_assert(sizeof(Integers) <= SPLIT * sizeof(float), "weights take the place of scores");
inline const Integers& integers(const float* row) { return *reinterpret_cast<const Integers*>(row); }

// mixed[r][0..16 W) (+)= weights[r] . value over some blocks, for R rows; of int8 values sums stay
// integers until the last block.
template <Form F, int R, int W, class Ask>
inline void mix(const Mix& m, int64_t column, Ask& asked) {
    Ask ask = asked;
    Sum<F> acc[R][W];
    // Only a single vector may be less than whole.
    const bool whole = W > 1 || m.dim - column >= 16;
    const int left = int(m.dim - column);
    const int64_t dim = value_words<F>(m.dim);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const float* from = m.mixed + r * m.dim + column + 16 * w;
            if constexpr (F == Form::int8)
                acc[r][w] = !m.more ? Sums::set(integers(m.weights + r * SPLIT).start)
                                    : Sums::from_bits(whole ? F16::load(from) : load_some(from, left));
            else acc[r][w] = !m.more ? F16::zero() : whole ? F16::load(from) : load_some(from, left);
        }
    for (int64_t b = 0; b < m.count; ++b) {
        const auto* value = reinterpret_cast<const Number<F>*>(m.blocks[b].data);
        const int64_t at = m.first + b;
        for (int64_t t = 0; t < BLOCK / BESIDE<F>; ++t) {
            ask.step();
            const auto* from = value + (t * dim + column) * BESIDE<F>;
            if constexpr (F == Form::pairs) {
                Pairs pairs[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) pairs[w] = Pairs::load(from + 32 * w);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    uint32_t pair;
                    const auto* row = reinterpret_cast<const uint16_t*>(m.weights + r * SPLIT);
                    std::memcpy(&pair, row + at * BLOCK + 2 * t, 4);
                    Pairs weight = Pairs::set(pair);
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) acc[r][w] = dot_pairs(acc[r][w], weight, pairs[w]);
                }
            } else if constexpr (F == Form::int8) {
                Quads quads[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) quads[w] = Quads::load(from + 64 * w);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const uint32_t* words = integers(m.weights + r * SPLIT).words[at * 4 + t];
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) acc[r][w].add(quads[w], words);
                }
            } else {
                F16 numbers[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w)
                    numbers[w] = whole ? F16::load(from + 16 * w) : load_some(from, left);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    F16 weight = F16::set(m.weights[r * SPLIT + at * BLOCK + t]);
#pragma GCC unroll 4
                    for (int w = 0; w < W; ++w) acc[r][w] = fma(weight, numbers[w], acc[r][w]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            float* to = m.mixed + r * m.dim + column + 16 * w;
            F16 all;
            if constexpr (F == Form::int8)
                all = m.last ? acc[r][w].value() * F16::set(integers(m.weights + r * SPLIT).unit)
                             : acc[r][w].bits();
            else all = acc[r][w];
            if (whole) all.store(to);
            else store_some(all, to, left);
        }
    asked = ask;
}

template <Form F, int R, class Ask>
inline void mix_some(const Mix& m, Ask& ask) {
    constexpr int W = mix_width<F>(R);
    int64_t column = 0;
    for (; column + 16 * W <= m.dim; column += 16 * W) mix<F, R, W>(m, column, ask);
    if constexpr (W > 1)
        for (; column < m.dim; column += 16) mix<F, R, 1>(m, column, ask);
    else if (column < m.dim) mix<F, R, 1>(m, column, ask);
}

template <Form F, int R = MIX_ROWS, class Ask>
inline void mix_rows(int rows, Mix m, Ask& ask) {
    for (; rows > R; rows -= R) {
        mix_some<F, R>(m, ask);
        m.weights += R * SPLIT, m.mixed += R * m.dim;
    }
    if (rows == R) {
        mix_some<F, R>(m, ask);
    } else if constexpr (R > 1) {
        mix_rows<F, R - 1>(rows, m, ask);
    }
}

// A row of scores that becomes weights: over `count` blocks from position `at` on, of which the row
// sees positions [low, high).
struct Row {
    float* scores;
    int64_t count, at, low, high;
    float scale;            // of scores; the factor log2(e) is in it: weights are powers of two
    const uint16_t* scales;  // of values, bf16 [16 count], or null
};

inline float best_of(const Row& row) {
    F16 top = F16::set(NOTHING);
    for (int64_t b = 0; b < row.count; ++b) top = max(top, F16::load(row.scores + b * BLOCK));
    return max(top);
}

// Weights in place, and `best`, the greatest scaled score, and `total`, the sum of weights.
template <Form F, class Ask>
inline void soften(const Row& row, float& best, float& total, Ask& ask) {
    best = best_of(row);
    F16 factor = F16::set(row.scale), sums = F16::zero();
    F16 shift = F16::set(best == NOTHING ? 0.0f : -best * row.scale);
    for (int64_t b = 0; b < row.count; ++b) {
        ask.step();
        F16 power = fma(F16::load(row.scores + b * BLOCK), factor, shift), weights;
        if constexpr (F == Form::pairs) {
            weights = exp2_coarse(power);
            // Bf16 weights overwrite the scores from the front. What is summed is what values will
            // be multiplied with, so that roundings of the weights largely cancel.
            weights = store_rounded(weights, reinterpret_cast<uint16_t*>(row.scores) + b * BLOCK);
        } else {
            weights = exp2(power);
            weights.store(row.scores + b * BLOCK);
        }
        sums = sums + weights;
    }
    best = best * row.scale;
    total = sum(sums);
}

// Weights times the scales of their values, in place; gives the greatest. A scale that the row does not
// see counts for nothing, whatever it is; one of NaN that it sees makes the result NaN.
template <class Ask>
inline float weigh(const Row& row, float& best, float& total, Ask& ask) {
    best = best_of(row);
    F16 factor = F16::set(row.scale), sums = F16::zero(), peak = F16::zero(), all = F16::zero();
    F16 shift = F16::set(best == NOTHING ? 0.0f : -best * row.scale);
    for (int64_t b = 0; b < row.count; ++b) {
        ask.step();
        float* at = row.scores + b * BLOCK;
        F16 weights = exp2_coarse(fma(F16::load(at), factor, shift));
        sums = sums + weights;
        weights = weights * F16::load_bf16(row.scales + b * BLOCK);
        int64_t low = row.low - row.at - b * BLOCK, high = row.high - row.at - b * BLOCK;
        if (low > 0 || high < BLOCK)
            weights = keep(weights, low > 0 ? int(low < BLOCK ? low : BLOCK) : 0,
                           high < BLOCK ? int(high > 0 ? high : 0) : BLOCK, F16::zero());
        peak = max(peak, weights);
        all = all + weights;
        weights.store(at);
    }
    best = best * row.scale;
    total = sum(sums);
    float whole = sum(all);
    return whole == whole ? max(peak) : NAN;
}

// As `soften`, for int8 values: weights times scales become integers. Those below the least normal
// number times 16,256 are taken for zero.
template <class Ask>
inline void soften_integers(const Row& row, float& best, float& total, Ask& ask) {
    float peak = weigh(row, best, total, ask), unit = peak / MOST_15;
    F16 factor = F16::set(unit >= 0x1p-126f && unit < INFINITY ? MOST_15 / peak : 0.0f);
    F16 most = F16::set(MOST_15), sums = F16::zero();
    auto* to = reinterpret_cast<Integers*>(row.scores);
    for (int64_t b = 0; b < row.count; ++b) {
        // NaN becomes a number here; the unit, or the sum of weights, is NaN then.
        F16 weights = F16::load(row.scores + b * BLOCK) * factor;
        weights = round_even(min(max(weights, F16::zero()), most));
        sums = sums + weights;
        store_quads(weights, to->words[b * 4]);
    }
    to->unit = unit;
    to->start = int32_t(-128.0f * sum(sums));
}

template <class Ask>
inline void soften_row(Form form, const Row& row, float& best, float& total, Ask& ask) {
    by_form(form, [&](auto f) {
        if constexpr (f() == Form::int8) soften_integers(row, best, total, ask);
        else soften<f()>(row, best, total, ask);
    });
}

// True if a token of the block that some row of the tile does not see has a value that is infinite
// or NaN: 0 * inf would carry it to that row. Scaled numbers are finite; what a row does not see of
// their scales it does not count.
template <Form F>
bool is_wild(const Tile& tile, const Values& block, int64_t at, int64_t dim) {
    if (SCALED<F> || (tile.low[tile.rows - 1] <= at && tile.high[0] >= at + BLOCK)) return false;
    const auto* value = reinterpret_cast<const Number<F>*>(block.data);
    uint32_t most = 0;  // exponent, as bits of a bf16: a maximum compiles to vectors
    for (int64_t i = 0; i < BLOCK * dim; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, value + i, sizeof value[i]);
        uint32_t exponent = (F == Form::pairs ? bits : bits >> 16) & 0x7f80;
        most = exponent > most ? exponent : most;
    }
    return most == 0x7f80;
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
        mix_rows<F, 1>(1, {seen.data(), 0, m.count, m.weights + r * SPLIT, m.dim, false, true,
                           m.mixed + r * m.dim}, ask);
    }
}

}  // namespace
}  // namespace quire
