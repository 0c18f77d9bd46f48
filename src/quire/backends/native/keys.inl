// Queries against keys: scores of up to TILE rows over blocks of 16 tokens.

namespace quire {
namespace {

#if defined(__AVX512F__)
constexpr int TILE = 12;  // query rows that share loads of keys
#else
constexpr int TILE = 4;
#endif
constexpr int MOST_BLOCKS = 4;  // blocks of keys, on as many pages, that are read side by side
constexpr float NOTHING = -INFINITY;

// Sums of bytes that registers have room for beside what they are made of.
#if defined(__AVX512VNNI__)
constexpr int SUMS_AT_ONCE = 12;
#elif defined(__AVX512F__)
constexpr int SUMS_AT_ONCE = 24;
#else
constexpr int SUMS_AT_ONCE = 4;
#endif

// Blocks of keys that share loads of R rows of queries: as many as there are accumulators for.
template <Form F>
constexpr int blocks_at_a_time(int rows) {
    if (F == Form::int8)
        return rows * MOST_BLOCKS <= SUMS_AT_ONCE ? MOST_BLOCKS : rows * 2 <= SUMS_AT_ONCE ? 2 : 1;
    return rows * MOST_BLOCKS <= 2 * TILE ? MOST_BLOCKS : 2;
}

// What a tile of up to TILE rows needs to know: queries, and the positions that each row sees.
// Queries are words of a key's form [words][rows]; those for int8 keys are integers of 15 bits,
// [words][rows][2], that a row's `unit` makes what they were, and `start` takes away what the 128 that
// were added to keys add to their sum.
struct Tile {
    int rows;
    const uint32_t* query;
    int64_t low[TILE], high[TILE];
    float unit[TILE];
    int32_t start[TILE];
};

// Room for a row's words, whatever the form.
inline int64_t query_room(int64_t dim) { return dim + 4; }

// One query as integers; a unit of NaN if a number of it is infinite or NaN. Queries below the least
// normal number times 16,256 are taken for zero.
inline void lay_integers(const float* x, int64_t dim, int r, Tile& tile, uint32_t* query) {
    float peak = peak_of(x, dim);
    tile.unit[r] = peak < INFINITY ? peak / MOST_15 : NAN;
    bool any = tile.unit[r] >= 0x1p-126f;
    F16 unit = F16::set(tile.unit[r]), sums = F16::zero();
    for (int64_t d = 0; d < dim; d += 16) {
        F16 v = F16::zero();
        if (any) v = round_even(load_some(x + d, int(dim - d < 16 ? dim - d : 16)) / unit);
        sums = sums + v;
        uint32_t words[8];
        store_quads(v, words);
        for (int64_t i = 0; i < 4 && d + 4 * i < dim; ++i)
            std::memcpy(query + ((d / 4 + i) * tile.rows + r) * 2, words + 2 * i, 8);
    }
    tile.start[r] = int32_t(-128.0f * sum(sums));
}

// A query of a tile's row r in the form that `score` reads.
template <Form F>
inline void lay_query(const float* x, int64_t dim, int r, Tile& tile, uint32_t* query) {
    if constexpr (F == Form::int8) {
        lay_integers(x, dim, r, tile, query);
    } else {
        uint32_t words[MAX_HEAD + 2 * LANES];
        int64_t count = key_words<F>(dim);
        row_words(x, F == Form::pairs ? Dtype::bf16 : Dtype::f32, dim, count, words);
        for (int64_t d = 0; d < count; ++d) query[d * tile.rows + r] = words[d];
    }
}

// Sums that words of keys are added to, with R rows of queries.
template <Form F>
using Sum = std::conditional_t<F == Form::int8, Sums, F16>;

// Scores of R rows against B blocks: scores[r][16 b ..] = query[r] . key
template <Form F, int R, int B, class Ask>
inline void score(const Keys* blocks, const Tile& tile, int64_t dim, float* scores, Ask& asked) {
    Ask ask = asked;  // in registers
    const uint32_t* query = tile.query;
    Sum<F> acc[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
            if constexpr (F == Form::int8) acc[r][b] = Sums::set(tile.start[r]);
            else acc[r][b] = F16::zero();
    const int64_t words = key_words<F>(dim);
    for (int64_t d = 0; d < words; ++d) {
        ask.step();
        if constexpr (F == Form::pairs) {
            Pairs pairs[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
                pairs[b] = Pairs::load(
                    reinterpret_cast<const uint16_t*>(blocks[b].data + d * blocks[b].stride));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Pairs pair = Pairs::set(query[r]);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) acc[r][b] = dot_pairs(acc[r][b], pair, pairs[b]);
            }
            query += R;
        } else if constexpr (F == Form::int8) {
            Quads quads[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
                quads[b] = Quads::load(
                    reinterpret_cast<const uint8_t*>(blocks[b].data + d * blocks[b].stride));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) acc[r][b].add(quads[b], query + 2 * r);
            query += 2 * R;
        } else {
            F16 numbers[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
                numbers[b] = F16::load(
                    reinterpret_cast<const float*>(blocks[b].data + d * blocks[b].stride));
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                float number;
                std::memcpy(&number, query + r, 4);
                F16 wide = F16::set(number);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) acc[r][b] = fma(wide, numbers[b], acc[r][b]);
            }
            query += R;
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        F16 scale = SCALED<F> ? F16::load_bf16(blocks[b].scale) : F16::zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            F16 all;
            if constexpr (F == Form::int8) all = acc[r][b].value() * F16::set(tile.unit[r]) * scale;
            else all = acc[r][b];
            all.store(scores + r * SPLIT + b * BLOCK);
        }
    }
    asked = ask;
}

template <Form F, int R = TILE, class Ask>
inline void score_rows(const Tile& tile, const Keys* blocks, int64_t count, int64_t dim,
                       float* scores, Ask& ask) {
    constexpr int B = blocks_at_a_time<F>(R);
    if (tile.rows == R) {
        int64_t b = 0;
        for (; b + B <= count; b += B)
            score<F, R, B>(blocks + b, tile, dim, scores + b * BLOCK, ask);
        for (; b < count; ++b) score<F, R, 1>(blocks + b, tile, dim, scores + b * BLOCK, ask);
    } else if constexpr (R > 1) {
        score_rows<F, R - 1>(tile, blocks, count, dim, scores, ask);
    }
}

// Scores of a tile against `count` blocks from position `at` on; what a row does not see is -inf.
template <class Ask>
inline void score_tile(Form form, const Tile& tile, const Keys* blocks, int64_t count, int64_t at,
                       int64_t dim, float* scores, Ask& ask) {
    by_form(form, [&](auto f) { score_rows<f()>(tile, blocks, count, dim, scores, ask); });
    auto clamp = [](int64_t x) { return int(x < 0 ? 0 : x > BLOCK ? BLOCK : x); };
    for (int r = 0; r < tile.rows; ++r) {
        int64_t low = tile.low[r] - at, high = tile.high[r] - at;  // relative to the first block
        if (low <= 0 && high >= count * BLOCK) continue;
        for (int64_t b = 0; b < count; ++b) {
            if (low <= b * BLOCK && high >= (b + 1) * BLOCK) continue;
            float* row = scores + r * SPLIT + b * BLOCK;
            keep(F16::load(row), clamp(low - b * BLOCK), clamp(high - b * BLOCK), F16::set(NOTHING))
                .store(row);
        }
    }
}

}  // namespace
}  // namespace quire
