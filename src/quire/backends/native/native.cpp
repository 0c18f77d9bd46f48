#include "native.hpp"

#include <atomic>
#include <cmath>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quire {
namespace {

constexpr int64_t FEW = 32;        // rows that linear layers multiply straight from the weights
constexpr int64_t LITTLE = 1 << 15;  // multiply-adds that are not worth waking a thread for

// How one linear layer's outputs are shared out.
struct Shares {
    int64_t columns, blocks, rows;  // columns of an item; blocks of rows, and rows of a block

    Shares(const Linear& a, int threads) {
        if (a.m <= FEW) {
            constexpr int64_t WIDE = 64;
            columns = a.n >= 4 * WIDE * threads ? WIDE : 16;
            rows = a.m;
        } else {
            int64_t panels = ceil_div(a.n, PANEL), each = panels / (8 * threads);
            columns = PANEL * (each > 4 ? 4 : each < 1 ? 1 : each);
            constexpr int64_t MOST = 1024;  // rows of x that the last cache holds
            constexpr int64_t EVEN = 12;    // a multiple of every variant's tiles
            rows = ceil_div(ceil_div(a.m, ceil_div(a.m, MOST)), EVEN) * EVEN;
        }
        blocks = ceil_div(a.m, rows);
    }
    int64_t items(const Linear& a) const { return ceil_div(a.n, columns) * blocks; }
};

// The columns and rows of item i.
struct Share {
    int64_t column, column_end, row, row_end;
    Share(const Shares& shares, const Linear& a, int64_t i) {
        int64_t across = ceil_div(a.n, shares.columns);
        column = i % across * shares.columns, row = i / across * shares.rows;
        column_end = column + shares.columns < a.n ? column + shares.columns : a.n;
        row_end = row + shares.rows < a.m ? row + shares.rows : a.m;
    }
};

const void* weights_of(const Linear& a, const Share& s) {
    int64_t width = a.dtype == Dtype::f32 ? 4 : 2;
    return static_cast<const char*>(a.weight) + s.column * a.k * width;
}

// `next`: the rows of weights that this thread will probably read next, or null.
void compute(const Kernels& kernels, const Linear& a, const Share& s, const void* next) {
    if (a.m <= FEW)
        kernels.linear_few(a, s.column, s.column_end - s.column, next);
    else
        kernels.linear_many(a, s.column / PANEL, ceil_div(s.column_end, PANEL), s.row, s.row_end);
}

#if defined(__x86_64__)
bool has_f16c() {  // not every Clang has __builtin_cpu_supports for it
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

}  // namespace

Native::Native(const std::string& variant, int threads) : threads_(threads) {
    for (auto* kernels : available())
        if (variant == kernels->name) kernels_ = kernels;
    REQUIRE(kernels_ != nullptr, "variant '" + variant + "' is not available here");
}

std::vector<const Kernels*> Native::available() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    [[maybe_unused]] bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(QUIRE_WITH_avx512bf16)
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(avx512bf16_kernels());
#endif
#if defined(QUIRE_WITH_avx512)
    if (avx512) found.push_back(avx512_kernels());
#endif
#if defined(QUIRE_WITH_avx2)
    if (avx2) found.push_back(avx2_kernels());
#endif
#endif
    found.push_back(portable_kernels());
    return found;
}

// ---- linear --------------------------------------------------------------------------------------

void Native::to_words(const float* x, Linear& a) {
    a.x_stride = words_of(a.dtype, a.k) + 16;
    size_t need = size_t(a.m * a.x_stride) + 16;
    if (words_.size() < need) words_.resize(need);
    // A vector of words is a line of the cache: one that straddles two costs twice.
    auto* words = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(words_.data()) + 63) &
                                              ~uintptr_t(63));
    spread(a.m, a.k, [&](int64_t row) {
        uint32_t* to = words + row * a.x_stride;
        if (a.m <= FEW) kernels_->row_words(x + row * a.k, a.dtype, a.k, a.x_stride, to);
        else kernels_->lane_words(x + row * a.k, a.dtype, a.k, to);
    });
    a.x = words;
}

std::vector<Linear> Native::prepare(const float* x, int64_t m, const std::vector<Product>& products) {
    std::vector<Linear> all;
    for (const Product& p : products)
        all.push_back({p.weight->array.data(), p.weight->dtype, m, p.weight->n, p.weight->k, nullptr,
                       0, p.bias, p.y, p.join, p.other, p.activation});
    to_words(x, all[0]);
    for (Linear& a : all) a.x = all[0].x, a.x_stride = all[0].x_stride;
    return all;
}

void Native::project(const float* x, int64_t m, const std::vector<Product>& products) {
    for (size_t i = 1; i < products.size(); ++i)
        if (products[i].weight->dtype != products[0].weight->dtype) {  // other words
            project(x, m, {products.begin(), products.begin() + long(i)});
            return project(x, m, {products.begin() + long(i), products.end()});
        }
    std::vector<Linear> all = prepare(x, m, products);
    std::vector<Shares> shares;
    std::vector<int64_t> first{0};
    int64_t work = 0;
    for (const Linear& a : all) {
        shares.emplace_back(a, threads());
        first.push_back(first.back() + shares.back().items(a));
        work += a.m * a.n * a.k;
    }
    auto product_of = [&](int64_t i) {
        size_t p = 0;
        while (i >= first[p + 1]) ++p;
        return p;
    };
    auto share_of = [&](size_t p, int64_t i) { return Share(shares[p], all[p], i - first[p]); };
    auto item = [&](int64_t i) {
        size_t p = product_of(i);
        int64_t then = i + threads();  // if all threads are equally fast
        const void* next = nullptr;
        if (then < first.back()) {
            size_t q = product_of(then);
            next = weights_of(all[q], share_of(q, then));
        }
        compute(*kernels_, all[p], share_of(p, i), next);
    };
    if (work >= LITTLE) return threads_.run(first.back(), item);
    for (int64_t i = 0; i < first.back(); ++i) item(i);
}

void Native::project_together(const float* x, int64_t m, const std::vector<Product>& products,
                              const Then& then) {
    std::vector<Linear> all = prepare(x, m, products);
    Shares shares(all[0], threads());
    int64_t items = shares.items(all[0]);
    auto item = [&](int64_t i) {
        Share share(shares, all[0], i);
        for (size_t p = 0; p < all.size(); ++p) {
            const void* next = nullptr;
            if (p + 1 < all.size()) next = weights_of(all[p + 1], share);
            else if (i + threads() < items)
                next = weights_of(all[0], Share(shares, all[0], i + threads()));
            compute(*kernels_, all[p], share, next);
        }
        if (m <= FEW) then(share.row, share.row_end, share.column, share.column_end);
    };
    if (m * all[0].n * all[0].k >= LITTLE) return threads_.run(items, item);
    for (int64_t i = 0; i < items; ++i) item(i);
}

void Native::linear(Floats x, const Weight& weight, std::optional<Floats> bias, Output y) {
    REQUIRE(x.ndim() == 2 && y.ndim() == 2 && int64_t(x.shape(1)) == weight.k &&
                y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == weight.n,
            "linear: x must be [m, " + std::to_string(weight.k) + "] and y [m, " +
                std::to_string(weight.n) + "]");
    REQUIRE(!bias || int64_t(bias->size()) == weight.n, "linear: bias has the wrong size");
    int64_t m = int64_t(x.shape(0));
    if (m == 0) return;
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> one(mutex_);
    project(x.data(), m, {{&weight, bias ? bias->data() : nullptr, y.data()}});
}

// ---- rows ----------------------------------------------------------------------------------------

int64_t Native::same_rows(const Floats& x, const Output& y, int64_t n) const {
    REQUIRE(n > 0 && x.size() % size_t(n) == 0 && y.size() == x.size(),
            "x and y must have rows of " + std::to_string(n));
    return int64_t(x.size()) / n;
}

void Native::norm_rows(const float* x, const Floats& weight, float eps, int64_t rows, float* y) {
    int64_t n = int64_t(weight.size());
    spread(rows, n,
           [&](int64_t r) { kernels_->rms_norm(x + r * n, weight.data(), eps, n, y + r * n); });
}

void Native::rms_norm(Floats x, Floats weight, float eps, Output y) {
    int64_t rows = same_rows(x, y, int64_t(weight.size()));
    nb::gil_scoped_release released;
    norm_rows(x.data(), weight, eps, rows, y.data());
}

void Native::layer_norm(Floats x, Floats weight, Floats bias, float eps, Output y) {
    int64_t n = int64_t(weight.size()), rows = same_rows(x, y, n);
    REQUIRE(bias.size() == weight.size(), "layer_norm: weight and bias differ in size");
    nb::gil_scoped_release released;
    spread(rows, n, [&](int64_t r) {
        kernels_->layer_norm(x.data() + r * n, weight.data(), bias.data(), eps, n, y.data() + r * n);
    });
}

void Native::check_rope(const Floats& cos, const Floats& sin, const Ints& positions,
                        int64_t half) const {
    REQUIRE(cos.ndim() == 2 && int64_t(cos.shape(1)) == half && cos.size() == sin.size(),
            "rope: cos and sin must be [positions, " + std::to_string(half) + "]");
    for (size_t t = 0; t < positions.size(); ++t)
        REQUIRE(positions(t) >= 0 && positions(t) < int64_t(cos.shape(0)),
                "rope: position " + std::to_string(positions(t)) + " is outside the tables of " +
                    std::to_string(cos.shape(0)));
}

// x [tokens, heads, dim], cos and sin [positions, dim / 2]
void Native::rope(Floats x, Ints positions, Floats cos, Floats sin, Output y) {
    REQUIRE(x.ndim() == 3 && x.shape(2) % 2 == 0 && x.shape(0) == positions.size() &&
                y.size() == x.size(),
            "rope: x and y must be [" + std::to_string(positions.size()) + ", heads, even dim]");
    int64_t heads = int64_t(x.shape(1)), half = int64_t(x.shape(2)) / 2;
    check_rope(cos, sin, positions, half);
    nb::gil_scoped_release released;
    spread(int64_t(positions.size()), heads * half * 2, [&](int64_t t) {
        int64_t angle = positions(size_t(t)) * half;
        for (int64_t h = 0; h < heads; ++h) {
            int64_t at = (t * heads + h) * half * 2;
            kernels_->rope(x.data() + at, cos.data() + angle, sin.data() + angle, half, y.data() + at);
        }
    });
}

void Native::hadamard(Floats x, int64_t dim, Output y) {
    int64_t rows = same_rows(x, y, dim);
    nb::gil_scoped_release released;
    spread(rows, dim, [&](int64_t r) { kernels_->hadamard(x.data() + r * dim, dim, y.data() + r * dim); });
}

void Native::activate(Floats x, int kind, Output y) {
    elementwise(x, y, [&](int64_t at, int64_t n) {
        kernels_->activate(x.data() + at, kind, n, y.data() + at);
    });
}

void Native::multiply(Floats x, Floats z, Output y) {
    REQUIRE(z.size() == x.size(), "multiply: sizes differ");
    elementwise(x, y, [&](int64_t at, int64_t n) {
        kernels_->multiply(x.data() + at, z.data() + at, n, y.data() + at);
    });
}

void Native::add(Floats x, Floats z, Output y) {
    REQUIRE(z.size() == x.size(), "add: sizes differ");
    elementwise(x, y, [&](int64_t at, int64_t n) {
        kernels_->add(x.data() + at, z.data() + at, n, y.data() + at);
    });
}

// Rows of a table as float.
void Native::embed(const Weight& table, Ints ids, Output y) {
    REQUIRE(int64_t(y.size()) == int64_t(ids.size()) * table.k, "embed: y has the wrong size");
    for (size_t i = 0; i < ids.size(); ++i)
        REQUIRE(ids(i) >= 0 && ids(i) < table.n,
                "embed: id " + std::to_string(ids(i)) + " is outside the table");
    nb::gil_scoped_release released;
    spread(int64_t(ids.size()), table.k, [&](int64_t i) {
        const uint8_t* row =
            table.array.data() + ids(size_t(i)) * table.k * int64_t(width(table.dtype));
        kernels_->widen(row, table.dtype, table.k, y.data() + i * table.k);
    });
}

// ---- halves of a decoder layer ---------------------------------------------------------------------

// Norms, positions and, if asked for, rotation of queries and keys of some tokens; then keys and values
// into the pool.
void Native::place_rows(const AttentionWeights& w, const Parts& parts, const Floats& cos,
                        const Floats& sin, const int64_t* positions, const int64_t* slots,
                        int64_t row, int64_t row_end) {
    const Attention& a = parts.part[0];
    int64_t dim = a.pool.key.dim, half = dim / 2;
    for (int64_t t = row; t < row_end; ++t) {
        auto turn = [&](float* x, int64_t heads, const std::optional<Floats>& norm) {
            for (int64_t h = 0; h < heads; ++h, x += dim) {
                if (norm) kernels_->rms_norm(x, norm->data(), w.eps, dim, x);
                const int64_t angle = positions[t] * half;
                kernels_->rope(x, cos.data() + angle, sin.data() + angle, half, x);
                if (parts.arrays->rotated) kernels_->hadamard(x, dim, x);
            }
        };
        float *key = k_.data() + t * a.pool.heads * dim,
              *value = v_.data() + t * a.pool.heads * a.pool.value.dim;
        turn(q_.data() + t * a.num_heads * dim, a.num_heads, w.q_norm);
        turn(key, a.pool.heads, w.k_norm);
        kernels_->append(parts.arrays->taker(), slots[t], key, value);
    }
}

Native::Parts Native::check_attention(const AttentionWeights& w, const Floats& cos,
                                      const Floats& sin, const PoolArrays& arrays, const Ints& slots,
                                      const Tables& tables) const {
    const Pool& pool = arrays.pool;
    REQUIRE(tables.positions.size() == slots.size(),
            "attention_block: there must be one slot a token");
    REQUIRE(w.q.weight.n % pool.key.dim == 0 && w.k.weight.n == pool.heads * pool.key.dim &&
                w.v.weight.n == pool.heads * pool.value.dim && pool.key.dim % 2 == 0,
            "attention_block: projections do not fit the pool");
    int64_t heads = w.q.weight.n / pool.key.dim;
    REQUIRE(w.o.weight.k == heads * pool.value.dim &&
                (!w.q_norm || int64_t(w.q_norm->size()) == pool.key.dim) &&
                (!w.k_norm || int64_t(w.k_norm->size()) == pool.key.dim),
            "attention_block: output projection or norms do not fit the heads");
    check_rope(cos, sin, tables.positions, pool.key.dim / 2);
    check_slots(arrays, slots);
    check_seal(arrays, tables.open.seal_from, tables.open.seal_to);
    return attention(nullptr, heads, arrays, tables, nullptr);
}

// y = x + attention(norm(x)) of the tokens that `a` names; scratch memory is this thread's.
void Native::attention_half(const float* x, const AttentionWeights& w, const Floats& cos,
                            const Floats& sin, Parts parts, const Ints& slots, const Tables& tables,
                            float* y) {
    int64_t m = int64_t(slots.size()), hidden = int64_t(w.norm.size());
    float* q = room(q_, m * w.q.weight.n);
    float* mixed = room(mixed_, m * w.o.weight.k);
    for (Attention& part : parts.part) part.query = q, part.out = mixed;
    float* norm = room(norm_, m * hidden);
    norm_rows(x, w.norm, w.eps, m, norm);
    project(norm, m,
            {{&w.q.weight, w.q.bias_data(), q},
             {&w.k.weight, w.k.bias_data(), room(k_, m * w.k.weight.n)},
             {&w.v.weight, w.v.bias_data(), room(v_, m * w.v.weight.n)}});
    spread(m, w.q.weight.n * 4,
           [&](int64_t t) {
               place_rows(w, parts, cos, sin, tables.positions.data(), slots.data(), t, t + 1);
           });
    run_seal(*parts.arrays, tables.open.seal_from, tables.open.seal_to);
    run_attention(parts, int64_t(tables.last_page_len.size()));
    project_together(mixed, m, {{&w.o.weight, w.o.bias_data(), y, Join::add, x}},
                     residual(x, y, hidden));
}

void Native::attention_block(Floats x, const AttentionWeights& w, Floats cos, Floats sin,
                             PoolArrays& arrays, Ints slots, const Tables& tables, Output y) {
    int64_t m = same_rows(x, y, int64_t(w.norm.size()));
    REQUIRE(m == int64_t(slots.size()), "attention_block: there must be one slot a row");
    Parts parts = check_attention(w, cos, sin, arrays, slots, tables);
    if (m == 0) return;
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> one(mutex_);
    attention_half(x.data(), w, cos, sin, parts, slots, tables, y.data());
}

Native::Then Native::residual(const float* from, float* to, int64_t n) const {
    return [this, from, to, n](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
        for (int64_t at = row * n + column; at < row_end * n; at += n)
            kernels_->add(from + at, to + at, column_end - column, to + at);
    };
}

// y = x + mlp(norm(x)), m rows.
void Native::mlp_half(const float* x, int64_t m, const MlpWeights& w, float* y) {
    int64_t hidden = int64_t(w.norm.size()), inner = w.gate.weight.n;
    float *norm = room(norm_, m * hidden), *gate = room(gate_, m * inner);
    // Many rows are joined with the gate before they are stored: in its place, unless sums of chunks
    // are stored before.
    bool apart = m <= FEW || words_of(w.up.weight.dtype, hidden) > CHUNK;
    float* up = apart ? room(up_, m * inner) : gate;
    norm_rows(x, w.norm, w.eps, m, norm);
    project_together(norm, m,
                     {{&w.gate.weight, w.gate.bias_data(), gate},
                      {&w.up.weight, w.up.bias_data(), up, Join::gate, gate, w.activation}},
                     [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
                         int64_t n = column_end - column;
                         for (int64_t r = row; r < row_end; ++r) {
                             float* g = gate + r * inner + column;
                             kernels_->activate(g, w.activation, n, g);
                             kernels_->multiply(g, up + r * inner + column, n, g);
                         }
                     });
    project_together(m <= FEW ? gate : up, m,
                     {{&w.down.weight, w.down.bias_data(), y, Join::add, x}},
                     residual(x, y, hidden));
}

void Native::mlp_block(Floats x, const MlpWeights& w, Output y) {
    int64_t m = same_rows(x, y, int64_t(w.norm.size()));
    if (m == 0) return;
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> one(mutex_);
    mlp_half(x.data(), m, w, y.data());
}

void Native::layers(Floats x, const Layers& stack, Floats cos, Floats sin, std::vector<Ints> slots,
                    const std::vector<const Tables*>& tables, Output y) {
    int64_t m = same_rows(x, y, stack.hidden);
    std::vector<Parts> all;
    for (const DecoderLayer& layer : stack.layers) {
        size_t g = size_t(layer.group);
        REQUIRE(g < slots.size() && g < tables.size(),
                "layers: there is no layer group " + std::to_string(g));
        REQUIRE(m == int64_t(slots[g].size()), "layers: there must be one slot a row");
        all.push_back(check_attention(layer.attention, cos, sin, layer.pool, slots[g], *tables[g]));
    }
    if (m == 0) return;
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> one(mutex_);
    float* middle = room(middle_, m * stack.hidden);
    const float* from = x.data();
    for (size_t i = 0; i < all.size(); ++i, from = y.data()) {
        const DecoderLayer& layer = stack.layers[i];
        size_t g = size_t(layer.group);
        attention_half(from, layer.attention, cos, sin, all[i], slots[g], *tables[g], middle);
        mlp_half(middle, m, layer.mlp, y.data());
    }
}

// ---- what is known of pages -------------------------------------------------------------------------

void Native::score_pages(PageScores a, const Ints& pages, int64_t known, const Output& out,
                         void (*kernel)(const PageScores&, int64_t, int64_t)) {
    REQUIRE(out.ndim() == 2 && int64_t(out.shape(0)) == a.heads && out.shape(1) == pages.size(),
            "scores must be [" + std::to_string(a.heads) + ", " + std::to_string(pages.size()) + "]");
    for (size_t i = 0; i < pages.size(); ++i)
        REQUIRE(pages(i) >= 0 && pages(i) < known,
                "page " + std::to_string(pages(i)) + " is not one of " + std::to_string(known));
    a.pages = pages.data(), a.count = int64_t(pages.size()), a.out = out.data();
    constexpr int64_t STEP = 64;
    nb::gil_scoped_release released;
    threads_.run(ceil_div(a.count, STEP), [&](int64_t i) {
        kernel(a, i * STEP, (i + 1) * STEP < a.count ? (i + 1) * STEP : a.count);
    });
}

void Native::score_bounds(Floats query, Shorts bounds, Ints pages, Output out) {
    REQUIRE(query.ndim() == 3 && bounds.ndim() == 4 && query.shape(1) == 2 && bounds.shape(2) == 2 &&
                query.shape(0) == bounds.shape(1) && query.shape(2) == bounds.shape(3),
            "score_bounds: bounds [pages, heads, 2, dim] and query [heads, 2, dim] disagree");
    int64_t heads = int64_t(query.shape(0)), size = 2 * int64_t(query.shape(2));
    PageScores a{bounds.data(), query.data(), nullptr, 0, heads, 1, size, 0, nullptr};
    score_pages(a, pages, int64_t(bounds.shape(0)), out, kernels_->score_bounds);
}

void Native::score_signatures(Words query, Words signs, Ints pages, Output out) {
    REQUIRE(query.ndim() == 2 && signs.ndim() == 4 && query.shape(1) == signs.shape(3) &&
                signs.shape(1) > 0 && query.shape(0) % signs.shape(1) == 0,
            "score_signatures: signatures [pages, heads, page_size, words] and query [query heads, "
            "words] disagree");
    int64_t heads = int64_t(signs.shape(1)), share = int64_t(query.shape(0)) / heads;
    PageScores a{signs.data(), query.data(), nullptr, 0, heads, share, int64_t(signs.shape(2)),
                 int64_t(signs.shape(3)), nullptr};
    score_pages(a, pages, int64_t(signs.shape(0)), out, kernels_->score_signatures);
}

// ---- the machine's limits --------------------------------------------------------------------------

// Reads every byte of x, on all threads.
float Native::probe_read(Bytes x) {
    constexpr int64_t STEP = 1 << 20;
    std::atomic<float> most{0};
    nb::gil_scoped_release released;
    threads_.run(int64_t(x.size()) / STEP,
                 [&](int64_t i) { most = kernels_->read(x.data() + i * STEP, STEP); });
    return most;
}

// Multiply-adds in registers on all threads; returns how many floating-point operations.
double Native::probe_multiply(int64_t steps) {
    std::atomic<float> result{0};
    nb::gil_scoped_release released;
    threads_.run(threads(), [&](int64_t) { result = kernels_->multiply_add(steps); });
    return double(steps) * threads() * PROBE_CHAINS * 16 * 2 * 2;
}

}  // namespace quire
