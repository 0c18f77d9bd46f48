// The backend: splits work over threads and calls one variant's kernels. Arguments come checked by
// their types (arguments.hpp); how they fit together is checked here. The interpreter lock is released
// while kernels run.
#pragma once

#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "threads.hpp"

namespace quire {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float* room(std::vector<float>& scratch, int64_t size) {
    if (int64_t(scratch.size()) < size) scratch.resize(size_t(size));
    return scratch.data();
}


class Native {
public:
    Native(const std::string& variant, int threads);
    static std::vector<const Kernels*> available();
    int threads() const { return threads_.threads(); }
    std::string variant() const { return kernels_->name; }

    void linear(Floats x, const Weight& weight, std::optional<Floats> bias, Output y);
    void append(PoolArrays& arrays, Ints slots, Floats key, Floats value);
    void seal(PoolArrays& arrays, Ints source, Ints target);
    void attend(Floats query, PoolArrays& arrays, const Tables& tables, Output out);
    void rms_norm(Floats x, Floats weight, float eps, Output y);
    void layer_norm(Floats x, Floats weight, Floats bias, float eps, Output y);
    void rope(Floats x, Ints positions, Floats cos, Floats sin, Output y);
    void hadamard(Floats x, int64_t dim, Output y);
    void activate(Floats x, int kind, Output y);
    void multiply(Floats x, Floats z, Output y);
    void add(Floats x, Floats z, Output y);
    void embed(const Weight& table, Ints ids, Output y);

    // Halves of a decoder layer in one call: y = x + half(norm(x)); the same bits as op by op.
    void attention_block(Floats x, const AttentionWeights& weights, Floats cos, Floats sin,
                         PoolArrays& arrays, Ints slots, const Tables& tables, Output y);
    void mlp_block(Floats x, const MlpWeights& weights, Output y);
    // Both halves of every layer in turn; slots and tables of each layer group.
    void layers(Floats x, const Layers& stack, Floats cos, Floats sin, std::vector<Ints> slots,
                const std::vector<const Tables*>& tables, Output y);

    // Scores of pages from what is known of their keys: see selecting.py.
    void score_bounds(Floats query, Shorts bounds, Ints pages, Output out);
    void score_signatures(Words query, Words signs, Ints pages, Output out);

    float probe_read(Bytes x);
    double probe_multiply(int64_t steps);

private:
    // What attention of one layer takes: one part, or those of pages of two kinds.
    struct Parts {
        const PoolArrays* arrays;
        int count;
        Attention part[MOST_PARTS];
    };
    // One product of a call: y [m, n] = x @ weight^T + bias, of many rows joined with `other`.
    struct Product {
        const Weight* weight;
        const float* bias;
        float* y;
        Join join = Join::none;
        const float* other = nullptr;
        int activation = 0;
    };
    // What follows when rows [row, row_end) of columns [column, column_end) of few rows are there.
    using Then = std::function<void(int64_t row, int64_t row_end, int64_t column, int64_t column_end)>;

    void project(const float* x, int64_t m, const std::vector<Product>& products);
    // Products of one size: an item computes the same columns of all, then calls `then`.
    void project_together(const float* x, int64_t m, const std::vector<Product>& products,
                          const Then& then);
    std::vector<Linear> prepare(const float* x, int64_t m, const std::vector<Product>& products);
    void to_words(const float* x, Linear& a);
    Then residual(const float* x, float* y, int64_t n) const;  // y += x
    void attention_half(const float* x, const AttentionWeights& w, const Floats& cos,
                        const Floats& sin, Parts parts, const Ints& slots, const Tables& tables,
                        float* y);
    void mlp_half(const float* x, int64_t m, const MlpWeights& w, float* y);
    void run_attention(const Parts& parts, int64_t sequences);
    // The splits that a query at `place` sees something of.
    struct Span {
        int64_t first, end;
        int64_t count() const { return end - first; }
    };
    Span span_of(const Attention& a, int64_t place) const;
    int64_t splits_of(const Parts& parts, int64_t place) const;
    void share_decode(const Parts& parts, const DecodeItem& merge, int64_t splits,
                      std::vector<DecodeItem>& items) const;
    void run_seal(const PoolArrays& arrays, const Ints& source, const Ints& target);
    void check_seal(const PoolArrays& arrays, const Ints& source, const Ints& target) const;
    void norm_rows(const float* x, const Floats& weight, float eps, int64_t rows, float* y);
    void place_rows(const AttentionWeights& w, const Parts& parts, const Floats& cos,
                    const Floats& sin, const int64_t* positions, const int64_t* slots,
                    int64_t row, int64_t row_end);

    void score_pages(PageScores a, const Ints& pages, int64_t known, const Output& out,
                     void (*kernel)(const PageScores&, int64_t, int64_t));
    void check_rope(const Floats& cos, const Floats& sin, const Ints& positions, int64_t half) const;
    void check_slots(const PoolArrays& arrays, const Ints& slots) const;
    Parts check_attention(const AttentionWeights& w, const Floats& cos, const Floats& sin,
                          const PoolArrays& arrays, const Ints& slots, const Tables& tables) const;
    Parts attention(const float* query, int64_t heads, const PoolArrays& arrays,
                    const Tables& tables, float* out) const;
    int64_t same_rows(const Floats& x, const Output& y, int64_t n) const;

    // work(row) for every row, on one thread if it is little.
    template <class Work>
    void spread(int64_t rows, int64_t numbers_a_row, Work work) {
        constexpr int64_t LITTLE = 1 << 14;
        int64_t step = LITTLE / (numbers_a_row > 0 ? numbers_a_row : 1) + 1;
        threads_.run((rows + step - 1) / step, [&](int64_t i) {
            int64_t end = (i + 1) * step < rows ? (i + 1) * step : rows;
            for (int64_t row = i * step; row < end; ++row) work(row);
        });
    }
    template <class Work>
    void elementwise(const Floats& x, const Output& y, Work work) {
        REQUIRE(x.size() == y.size(), "sizes differ");
        constexpr int64_t STEP = 1 << 14;
        int64_t n = int64_t(x.size());
        nb::gil_scoped_release released;
        threads_.run((n + STEP - 1) / STEP, [&](int64_t i) {
            work(i * STEP, (i + 1) * STEP < n ? STEP : n - i * STEP);
        });
    }

    const Kernels* kernels_ = nullptr;
    ThreadPool threads_;
    std::mutex mutex_;  // guards the scratch memory below
    std::vector<uint32_t> words_;
    std::vector<float> partials_, norm_, q_, k_, v_, mixed_, gate_, up_, middle_;
};

}  // namespace quire
