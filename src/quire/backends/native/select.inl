// What is known of pages against a query: bounds and signatures (docs/eviction.md). Lanes are summed in
// one order, so every variant gives the same bits, and a page's score is its own affair.

namespace quire {
namespace {

constexpr int64_t SUMS = 16;

// sum over i of x[i] * bf16 y[i], in lanes i % 16.
inline float dot_bf16(const float* x, const uint16_t* y, int64_t n) {
    alignas(64) float lane[SUMS] = {};
    auto add = [&](int64_t i, int64_t l) {
        uint32_t bits = uint32_t(y[i + l]) << 16;
        float wide;
        std::memcpy(&wide, &bits, 4);
        lane[l] += x[i + l] * wide;
    };
    int64_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
        for (int64_t l = 0; l < SUMS; ++l) add(i, l);
    for (int64_t l = 0; i + l < n; ++l) add(i, l);
    for (int64_t half = SUMS / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
}

// Of pages [first, end): known bf16 [pages, heads, size], query float [heads, size].
void score_bounds(const PageScores& a, int64_t first, int64_t end) {
    auto* known = static_cast<const uint16_t*>(a.known);
    auto* query = static_cast<const float*>(a.query);
    for (int64_t p = first; p < end; ++p) {
        if (p + 4 < end)
            for (int64_t at = 0; at < a.heads * a.size; at += 32)
                __builtin_prefetch(known + a.pages[p + 4] * a.heads * a.size + at);
        for (int64_t g = 0; g < a.heads; ++g) {
            const uint16_t* row = known + (a.pages[p] * a.heads + g) * a.size;
            float score = dot_bf16(query + g * a.size, row, a.size);
            a.out[g * a.count + p] = score == score ? score : HUGE_VALF;  // nothing can be said
        }
    }
}

// Of pages [first, end): known uint64 [pages, heads, page_size, words], query [heads, share, words].
void score_signatures(const PageScores& a, int64_t first, int64_t end) {
    auto* known = static_cast<const uint64_t*>(a.known);
    auto* query = static_cast<const uint64_t*>(a.query);
    for (int64_t p = first; p < end; ++p)
        for (int64_t g = 0; g < a.heads; ++g) {
            const uint64_t* keys = known + (a.pages[p] * a.heads + g) * a.size * a.words;
            int64_t total = 0;
            for (int64_t h = 0; h < a.share; ++h) {
                const uint64_t* own = query + (g * a.share + h) * a.words;
                int64_t least = 64 * a.words;
                for (int64_t t = 0; t < a.size; ++t) {
                    int64_t apart = 0;
                    for (int64_t w = 0; w < a.words; ++w)
                        apart += __builtin_popcountll(keys[t * a.words + w] ^ own[w]);
                    least = apart < least ? apart : least;
                }
                total += 64 * a.words - least;
            }
            a.out[g * a.count + p] = float(total);
        }
}

}  // namespace
}  // namespace quire
