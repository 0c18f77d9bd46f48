// Packed pages (int4, int2): scores of keys, and values mixed, straight from the packed numbers.
//
// A number is minimum + step * n. With `middle` = 7.5 or 1.5 that is centre + step * (n - middle), where
// centre = minimum + step * middle; n - middle is exact in bf16.
//
// Keys share minimum and step over 32 tokens of a dimension: a query times the steps, rounded to bf16, is
// multiplied with the numbers, and added to the query times the centres, in floats. Values share them over
// 32 dimensions of a token: weights times steps, rounded to bf16, are multiplied with the numbers, and
// added to the weights times the centres. So what is rounded to bf16 is what is multiplied with a
// number's distance from the middle, and the error is that of bf16 arithmetic.

namespace quire {
namespace {

constexpr int64_t FOLDED = MAX_HEAD / 2 + 16;  // words of a folded query: off the powers of two


// Step and centre of 16 dimensions from d on, zeros behind the last.
template <Form F>
__attribute__((always_inline)) inline void load_stretch(const uint16_t* scale, int64_t dim, int64_t d,
                                                        F16& step, F16& centre) {
    const F16 middle = F16::set(middle_of(BITS<F>));
    F16 least;
    if (d + 16 <= dim) {
        least = F16::load_bf16(scale + d), step = F16::load_bf16(scale + dim + d);
    } else {
        uint16_t some[2][16] = {};
        for (int64_t i = 0; d + i < dim; ++i) some[0][i] = scale[d + i], some[1][i] = scale[dim + d + i];
        least = F16::load_bf16(some[0]), step = F16::load_bf16(some[1]);
    }
    centre = fma(step, middle, least);
}

// Queries of R rows times the steps of a stretch, as words [R][FOLDED] of bf16, and times its centres.
template <Form F, int R>
__attribute__((noinline)) void fold(const Tile& tile, const uint16_t* scale, int64_t dim,
                                    uint32_t* folded, float* start) {
    const float* query = reinterpret_cast<const float*>(tile.query);
    const int64_t width = ceil_div(dim, STRETCH) * STRETCH;  // as lay_query has it
    F16 sums[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r] = F16::zero();
    for (int64_t d = 0; d < dim; d += 32) {
        F16 step[2], centre[2];
        load_stretch<F>(scale, dim, d, step[0], centre[0]);
        load_stretch<F>(scale, dim, d + 16, step[1], centre[1]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            F16 a = F16::load(query + r * width + d), b = F16::load(query + r * width + d + 16);
            sums[r] = fma(b, centre[1], fma(a, centre[0], sums[r]));
            store_pairs(a * step[0], b * step[1], folded + r * FOLDED + d / 2);
        }
    }
    store_sums(sums, start);
}

// Scores of R rows against B blocks, every two of one stretch. A function of its own, like `score`.
template <Form F, int R, int B, class Ask>
__attribute__((noinline)) void score_packed(const Keys* blocks, const uint32_t* folded, const float* start, int64_t dim,
                         float* scores, Ask& ask) {
    constexpr int PAIRS = 16 / BITS<F>;
    F16 acc[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[r][b] = F16::set(start[b / 2 * R + r]);
    const char* key[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) key[b] = blocks[b].data;
    const int64_t stride = blocks[0].stride, end = key_words<F>(dim) * stride;
    for (int64_t at = 0; at < end; at += stride, folded += PAIRS) {
#pragma GCC unroll 8
        for (int k = 0; k < PAIRS; ++k) {
            if (k % 4 == 0) ask.step();
            Pairs pairs[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) pairs[b] = load_packed<BITS<F>>(key[b] + at, k);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b)
                    acc[r][b] = dot_pairs(
                        acc[r][b], Pairs::set(folded[(b / 2 * R + r) * FOLDED + k]), pairs[b]);
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][b].store(scores + r * SPLIT + b * BLOCK);
}

// Scores of a tile against blocks from position `at` on, stretch by stretch. Two stretches are folded
// before the first is scored, so that their sums wait less for each other; a few rows score both at a time.
template <Form F, int R, class Ask>
void score_packed_rows(const Tile& tile, const Keys* blocks, int64_t count, int64_t at, int64_t dim,
                       float* scores, Ask& ask) {
    if (tile.rows == R) {
        alignas(64) uint32_t folded[2 * R * FOLDED];
        float start[2 * R];
        auto fold_at = [&](int64_t b, int i) {
            fold<F, R>(tile, blocks[b].scale, dim, folded + i * R * FOLDED, start + i * R);
        };
        auto score_at = [&](int64_t b, int i, auto n) {
            score_packed<F, R, n()>(blocks + b, folded + i * R * FOLDED, start + i * R, dim,
                                    scores + b * BLOCK, ask);
            return n();
        };
        using std::integral_constant;
        for (int64_t b = 0; b < count;) {
            fold_at(b, 0);
            if ((at / BLOCK + b) % 2 != 0 || count - b == 1) {
                b += score_at(b, 0, integral_constant<int, 1>());
            } else if (count - b < 4) {
                b += score_at(b, 0, integral_constant<int, 2>());
            } else {
                fold_at(b + 2, 1);
                if constexpr (R <= 2) {
                    b += score_at(b, 0, integral_constant<int, 4>());
                } else {
                    b += score_at(b, 0, integral_constant<int, 2>());
                    b += score_at(b, 1, integral_constant<int, 2>());
                }
            }
        }
    } else if constexpr (R > 1) {
        score_packed_rows<F, R - 1>(tile, blocks, count, at, dim, scores, ask);
    }
}

}  // namespace
}  // namespace quire
