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

// Blocks of keys that share loads of R rows of queries: as many as there are accumulators for.
constexpr int blocks_at_a_time(int rows) { return rows * MOST_BLOCKS <= 2 * TILE ? MOST_BLOCKS : 2; }

// What a tile of up to TILE rows needs to know: queries, and the positions that each row sees.
// Queries are words of a key's form, [words][rows], or [words][2][rows] of 16 bits a number for bytes:
// bf16 for fp8 keys, and for int8 keys integers that a row's `unit` makes what they were; `start` takes
// away what the 128 that were added to int8 keys add to their sum. For packed keys they are floats.
struct Tile {
    int rows;
    const uint32_t* query;
    int64_t low[TILE], high[TILE];
    float unit[TILE];
    int32_t start[TILE];
};

// Room for a row's words, whatever the form.
inline int64_t query_room(int64_t dim) { return ceil_div(dim, STRETCH) * STRETCH + 4; }

// One query as integers; a unit of NaN if a number of it is infinite or NaN. Queries below the least
// normal number times 32,767 are taken for zero.
inline void lay_integers(const float* x, int64_t dim, int r, Tile& tile, uint32_t* query) {
    float peak = peak_of(x, dim);
    tile.unit[r] = peak < INFINITY ? peak / MOST_16 : NAN;
    bool any = tile.unit[r] >= 0x1p-126f;
    F16 unit = F16::set(tile.unit[r]), sums = F16::zero();
    for (int64_t d = 0; d < dim; d += 16) {
        F16 v = F16::zero();
        if (any) v = round_even(load_some(x + d, int(dim - d < 16 ? dim - d : 16)) / unit);
        sums = sums + v;
        uint32_t words[8];
        store_integers(v, words);
        for (int64_t i = 0; i < 4 && d + 4 * i < dim; ++i)
            for (int64_t part = 0; part < 2; ++part)
                query[((d / 4 + i) * 2 + part) * tile.rows + r] = words[2 * i + part];
    }
    tile.start[r] = int32_t(-128.0f * sum(sums));
}

// A query of a tile's row r in the form that `score` reads.
template <Form F>
inline void lay_query(const float* x, int64_t dim, int r, Tile& tile, uint32_t* query) {
    uint32_t words[MAX_HEAD + 2 * LANES];
    int64_t count = key_words<F>(dim);
    if constexpr (PACKED<F>) {
        auto* to = reinterpret_cast<float*>(query) + r * ceil_div(dim, STRETCH) * STRETCH;
        std::memcpy(to, x, size_t(dim) * 4);
        std::memset(to + dim, 0, size_t(-dim & (STRETCH - 1)) * 4);
    } else if constexpr (F == Form::int8) {
        lay_integers(x, dim, r, tile, query);
    } else if constexpr (F == Form::fp8) {
        row_words(x, Dtype::bf16, dim, 2 * count, words);
        for (int64_t d = 0; d < count; ++d) {
            uint32_t a = words[2 * d], b = words[2 * d + 1], *to = query + 2 * d * tile.rows + r;
            to[0] = (a & 0xffff) | b << 16, to[tile.rows] = a >> 16 | (b & 0xffff0000u);
        }
    } else {
        row_words(x, F == Form::pairs ? Dtype::bf16 : Dtype::f32, dim, count, words);
        for (int64_t d = 0; d < count; ++d) query[d * tile.rows + r] = words[d];
    }
}

// Scores of R rows against B blocks of one stride: scores[r][16 b ..] = query[r] . key
template <Form F, int R, int B, class Ask>
__attribute__((noinline)) void score(const Keys* blocks, const Tile& tile, int64_t dim, float* scores, Ask& ask) {
    const uint32_t* query = tile.query;
    Sum<F> acc[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
            if constexpr (INTEGER<F>) acc[r][b] = Sums::set(tile.start[r]);
            else acc[r][b] = F16::zero();
    const char* key[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) key[b] = blocks[b].data;
    const int64_t stride = blocks[0].stride, end = key_words<F>(dim) * stride;
    for (int64_t at = 0; at < end; at += stride) {
        ask.step();
#pragma GCC unroll 2
        for (int part = 0; part < PARTS<F>; ++part) {
            decltype(load_part<F>(nullptr, 0)) parts[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) parts[b] = load_part<F>(key[b] + at, part);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b)
                    add_product(acc[r][b], parts[b], query[part * R + r]);
        }
        query += PARTS<F> * R;
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        F16 scale = SCALED<F> ? F16::load_bf16(blocks[b].scale) : F16::zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            F16 all;
            if constexpr (INTEGER<F>) all = acc[r][b].value() * F16::set(tile.unit[r]) * scale;
            else all = SCALED<F> ? acc[r][b] * scale : acc[r][b];
            all.store(scores + r * SPLIT + b * BLOCK);
        }
    }
}

// True if blocks have one stride; copies have another than what lies in long pages.
inline bool alike(const Keys* blocks, int count) {
    bool same = true;
    for (int b = 1; b < count; ++b) same &= blocks[b].stride == blocks[0].stride;
    return same;
}

template <Form F, int R = TILE, class Ask>
inline void score_rows(const Tile& tile, const Keys* blocks, int64_t count, int64_t dim,
                       float* scores, Ask& ask) {
    constexpr int B = blocks_at_a_time(R);
    if (tile.rows == R) {
        int64_t b = 0;
        for (; b + B <= count && alike(blocks + b, B); b += B)
            score<F, R, B>(blocks + b, tile, dim, scores + b * BLOCK, ask);
        for (; b < count; ++b) score<F, R, 1>(blocks + b, tile, dim, scores + b * BLOCK, ask);
    } else if constexpr (R > 1) {
        score_rows<F, R - 1>(tile, blocks, count, dim, scores, ask);
    }
}

// Lanes of a block from position `at` on that a row sees; `other` for the rest.
__attribute__((always_inline)) inline F16 seen_by(const Tile& tile, int row, int64_t at, F16 x, float other) {
    int64_t low = tile.low[row] - at, high = tile.high[row] - at;
    if (low <= 0 && high >= BLOCK) return x;
    auto clamp = [](int64_t lane) { return int(lane < 0 ? 0 : lane > BLOCK ? BLOCK : lane); };
    return keep(x, clamp(low), clamp(high), F16::set(other));
}

template <Form F, int R, class Ask>
void score_packed_rows(const Tile& tile, const Keys* blocks, int64_t count, int64_t at, int64_t dim,
                       float* scores, Ask& ask);  // packed.inl

// Scores of a tile against `count` blocks from position `at` on; what a row does not see is -inf.
template <class Ask>
inline void score_tile(Form form, const Tile& tile, const Keys* blocks, int64_t count, int64_t at,
                       int64_t dim, float* scores, Ask& ask) {
    by_read_form(form, [&](auto f) {
        if constexpr (PACKED<f()>)
            score_packed_rows<f(), TILE>(tile, blocks, count, at, dim, scores, ask);
        else score_rows<f()>(tile, blocks, count, dim, scores, ask);
    });
    for (int r = 0; r < tile.rows; ++r) {
        if (tile.low[r] <= at && tile.high[r] >= at + count * BLOCK) continue;
        for (int64_t b = 0; b < count; ++b) {
            float* row = scores + r * SPLIT + b * BLOCK;
            seen_by(tile, r, at + b * BLOCK, F16::load(row), NOTHING).store(row);
        }
    }
}

}  // namespace
}  // namespace quire
