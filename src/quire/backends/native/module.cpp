// The extension module: checks arguments, splits work over threads, calls the variant's kernels.
// Arrays are NumPy's; bf16 and fp16 come as uint16 views beside a dtype code. The interpreter lock is
// released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {
namespace {

using Floats = nb::ndarray<nb::numpy, const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy, float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<nb::numpy, const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Storage = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& what) {
    if (!ok) throw nb::value_error(what.c_str());
}

size_t width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

Dtype dtype_of(int code) {
    require(code >= 0 && code <= 2, "dtype code " + std::to_string(code) + " is not 0, 1 or 2");
    return Dtype(code);
}

// A weight matrix [n, k], kept where it is.
struct Weight {
    Weight(Bytes data, int code, int64_t rows, int64_t columns)
        : array(data), dtype(dtype_of(code)), n(rows), k(columns) {
        require(n > 0 && k > 0 && data.size() == size_t(n) * size_t(k) * width(dtype),
                "a weight of " + std::to_string(n) + " x " + std::to_string(k) + " does not fill " +
                    std::to_string(data.size()) + " bytes");
    }
    Bytes array;
    Dtype dtype;
    int64_t n, k;
};

struct PoolArrays {
    PoolArrays(Storage key, Storage value, int code, std::vector<int64_t> shape)
        : keys(key), values(value) {
        require(shape.size() == 5, "a pool's shape has five numbers");
        for (int64_t size : shape) require(size > 0, "a pool's sizes are positive");
        bool paired = dtype_of(code) == Dtype::bf16 && shape[3] % 2 == 0 && shape[4] % 16 == 0;
        pool = Pool{key.data(), value.data(), dtype_of(code), paired,   paired && shape[1] % BLOCK == 0,
                    shape[0],   shape[1],     shape[2],       shape[3], shape[4]};
        require(pool.key_dim <= MAX_HEAD && pool.value_dim <= MAX_HEAD,
                "head dimensions above " + std::to_string(MAX_HEAD) + " are not supported");
        size_t tokens = size_t(shape[0]) * size_t(shape[1]) * size_t(shape[2]);
        require(key.size() == tokens * size_t(pool.key_dim) * width(pool.dtype) &&
                    value.size() == tokens * size_t(pool.value_dim) * width(pool.dtype),
                "the pool's arrays do not have its shape");
    }
    Storage keys, values;
    Pool pool;
};

// The page tables of one layer group for a step, checked once and used by every layer.
struct Tables {
    Tables(Ints positions, Ints query_indptr, Ints indptr, Ints indices, Ints last_page_len,
           Ints first_page, int64_t page_size, int64_t window)
        : positions(positions), query_indptr(query_indptr), indptr(indptr), indices(indices),
          last_page_len(last_page_len), first_page(first_page), page_size(page_size),
          window(window) {
        size_t sequences = last_page_len.size();
        require(page_size > 0 && window >= 0, "page_size must be positive, window not negative");
        require(query_indptr.size() == sequences + 1 && indptr.size() == sequences + 1 &&
                    first_page.size() == sequences,
                "tables of " + std::to_string(sequences) + " sequences disagree in length");
        require(query_indptr(0) == 0 && indptr(0) == 0 &&
                    size_t(query_indptr(sequences)) == positions.size() &&
                    size_t(indptr(sequences)) == indices.size(),
                "indptr must run from 0 to the number of tokens (pages)");
        for (size_t i = 0; i < indices.size(); ++i) {
            require(indices(i) >= 0, "page id " + std::to_string(indices(i)) + " is negative");
            most = indices(i) > most ? indices(i) : most;
        }
        for (size_t s = 0; s < sequences; ++s) check(s);
    }

    void check(size_t s) const {
        std::string who = "sequence " + std::to_string(s) + ": ";
        int64_t pages = indptr(s + 1) - indptr(s), tokens = query_indptr(s + 1) - query_indptr(s);
        require(pages >= 0 && tokens >= 0, who + "indptr decreases");
        require(first_page(s) >= 0, who + "first_page is negative");
        if (tokens == 0) return;
        int64_t start = first_page(s) * page_size;
        int64_t end = start + (pages - 1) * page_size + last_page_len(s);
        require(pages > 0 && last_page_len(s) > 0 && last_page_len(s) <= page_size,
                who + "last_page_len " + std::to_string(last_page_len(s)) + " is not in 1.." +
                    std::to_string(page_size));
        for (int64_t t = query_indptr(s); t < query_indptr(s + 1); ++t) {
            int64_t at = positions(t), low = window && at >= window ? at - window + 1 : 0;
            require(at < end && low >= start,
                    who + "position " + std::to_string(at) + " sees tokens outside " +
                        std::to_string(start) + ".." + std::to_string(end));
            require(t == query_indptr(s) || at > positions(t - 1), who + "positions must ascend");
        }
    }

    Ints positions, query_indptr, indptr, indices, last_page_len, first_page;
    int64_t page_size, window, most = -1;
};

class Native {
public:
    Native(const std::string& variant, int threads) : threads_(threads) {
        for (auto* kernels : available())
            if (variant == kernels->name) kernels_ = kernels;
        require(kernels_ != nullptr, "variant '" + variant + "' is not available here");
    }

    static std::vector<const Kernels*> available();
    int threads() const { return threads_.threads(); }
    std::string variant() const { return kernels_->name; }

    void linear(Floats x, const Weight& weight, std::optional<Floats> bias, Output y) {
        int64_t m = int64_t(x.shape(0));
        require(x.ndim() == 2 && y.ndim() == 2 && int64_t(x.shape(1)) == weight.k &&
                    int64_t(y.shape(0)) == m && int64_t(y.shape(1)) == weight.n,
                "linear: x must be [m, " + std::to_string(weight.k) + "] and y [m, " +
                    std::to_string(weight.n) + "]");
        require(!bias || int64_t(bias->size()) == weight.n, "linear: bias has the wrong size");
        if (m == 0) return;
        Linear a{weight.array.data(), weight.dtype, m,       weight.n, weight.k, x.data(), nullptr,
                 (weight.k + 31) / 32 * 32 + 32, bias ? bias->data() : nullptr, y.data()};
        nb::gil_scoped_release released;
        std::lock_guard<std::mutex> one(mutex_);
        if (weight.dtype == Dtype::bf16) {
            pairs_.resize(size_t(m * a.pairs_stride));
            spread(m, weight.k, [&](int64_t row) {
                kernels_->to_pairs(x.data() + row * a.k, pairs_.data() + row * a.pairs_stride, a.k,
                                   a.pairs_stride);
            });
            a.pairs = pairs_.data();
        }
        constexpr int64_t ROWS = 384;  // of x and y that stay in a core's cache
        int64_t panels = (a.n + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
        auto work = [&](int64_t i) {
            int64_t row = i / panels * ROWS;
            kernels_->linear(a, i % panels, row, row + ROWS < m ? row + ROWS : m);
        };
        if (a.n * a.k * m < 1 << 15) {
            for (int64_t i = 0; i < panels * blocks; ++i) work(i);
        } else {
            threads_.run(panels * blocks, work);
        }
    }

    void append(PoolArrays& arrays, Ints slots, Floats key, Floats value) {
        const Pool& pool = arrays.pool;
        size_t n = slots.size();
        require(key.size() == n * size_t(pool.heads * pool.key_dim) &&
                    value.size() == n * size_t(pool.heads * pool.value_dim),
                "append: keys and values do not have one row a slot");
        for (size_t i = 0; i < n; ++i)
            require(slots(i) >= 0 && slots(i) < pool.num_pages * pool.page_size,
                    "append: slot " + std::to_string(slots(i)) + " is outside the pool");
        nb::gil_scoped_release released;
        spread(int64_t(n), pool.heads * pool.key_dim * 8, [&](int64_t t) {
            kernels_->append(pool, slots(size_t(t)), key.data() + t * pool.heads * pool.key_dim,
                             value.data() + t * pool.heads * pool.value_dim);
        });
    }

    void attend(Floats query, PoolArrays& arrays, const Tables& tables, Output out) {
        const Pool& pool = arrays.pool;
        size_t tokens = tables.positions.size();
        require(query.ndim() == 3 && query.shape(0) == tokens &&
                    int64_t(query.shape(2)) == pool.key_dim,
                "attend: query must be [" + std::to_string(tokens) + ", heads, " +
                    std::to_string(pool.key_dim) + "]");
        int64_t heads = int64_t(query.shape(1));
        require(heads % pool.heads == 0, "attend: query heads must be a multiple of KV heads");
        require(out.size() == tokens * size_t(heads * pool.value_dim),
                "attend: out has the wrong size");
        require(tables.page_size == pool.page_size && tables.most < pool.num_pages,
                "attend: page id " + std::to_string(tables.most) + " is outside the pool of " +
                    std::to_string(pool.num_pages) + " pages, or page sizes differ");
        Attention a{pool, query.data(), out.data(), tables.positions.data(),
                    tables.query_indptr.data(), tables.indptr.data(), tables.indices.data(),
                    tables.last_page_len.data(), tables.first_page.data(), heads, tables.window,
                    1.0f / std::sqrt(float(pool.key_dim))};
        nb::gil_scoped_release released;
        std::lock_guard<std::mutex> one(mutex_);
        run_attention(a, int64_t(tables.last_page_len.size()));
    }

    void rms_norm(Floats x, Floats weight, float eps, Output y) {
        int64_t n = int64_t(weight.size()), rows = same_rows(x, y, n);
        nb::gil_scoped_release released;
        spread(rows, n, [&](int64_t r) {
            kernels_->rms_norm(x.data() + r * n, weight.data(), eps, n, y.data() + r * n);
        });
    }

    void layer_norm(Floats x, Floats weight, Floats bias, float eps, Output y) {
        int64_t n = int64_t(weight.size()), rows = same_rows(x, y, n);
        require(bias.size() == weight.size(), "layer_norm: weight and bias differ in size");
        nb::gil_scoped_release released;
        spread(rows, n, [&](int64_t r) {
            kernels_->layer_norm(x.data() + r * n, weight.data(), bias.data(), eps, n,
                                 y.data() + r * n);
        });
    }

    // x [tokens, heads, dim], cos and sin [tokens, dim / 2]
    void rope(Floats x, Floats cos, Floats sin, Output y) {
        require(x.ndim() == 3 && x.shape(2) % 2 == 0, "rope: x must be [tokens, heads, even dim]");
        int64_t tokens = int64_t(x.shape(0)), heads = int64_t(x.shape(1));
        int64_t half = int64_t(x.shape(2)) / 2;
        require(cos.size() == size_t(tokens * half) && sin.size() == cos.size() &&
                    y.size() == x.size(),
                "rope: cos, sin and y do not fit x");
        nb::gil_scoped_release released;
        spread(tokens, heads * half * 2, [&](int64_t t) {
            for (int64_t h = 0; h < heads; ++h) {
                int64_t at = (t * heads + h) * half * 2;
                kernels_->rope(x.data() + at, cos.data() + t * half, sin.data() + t * half, half,
                               y.data() + at);
            }
        });
    }

    void activate(Floats x, int kind, Output y) {
        elementwise(x, y, [&](int64_t at, int64_t n) {
            kernels_->activate(x.data() + at, kind, n, y.data() + at);
        });
    }

    void multiply(Floats x, Floats z, Output y) {
        require(z.size() == x.size(), "multiply: sizes differ");
        elementwise(x, y, [&](int64_t at, int64_t n) {
            kernels_->multiply(x.data() + at, z.data() + at, n, y.data() + at);
        });
    }

    void add(Floats x, Floats z, Output y) {
        require(z.size() == x.size(), "add: sizes differ");
        elementwise(x, y, [&](int64_t at, int64_t n) {
            kernels_->add(x.data() + at, z.data() + at, n, y.data() + at);
        });
    }

    // Rows of a table as float.
    void embed(const Weight& table, Ints ids, Output y) {
        require(int64_t(y.size()) == int64_t(ids.size()) * table.k, "embed: y has the wrong size");
        for (size_t i = 0; i < ids.size(); ++i)
            require(ids(i) >= 0 && ids(i) < table.n,
                    "embed: id " + std::to_string(ids(i)) + " is outside the table");
        nb::gil_scoped_release released;
        spread(int64_t(ids.size()), table.k, [&](int64_t i) {
            const uint8_t* row = table.array.data() + ids(size_t(i)) * table.k * int64_t(width(table.dtype));
            kernels_->widen(row, table.dtype, table.k, y.data() + i * table.k);
        });
    }

    // Reads every byte of x, on all threads.
    float probe_read(Bytes x) {
        constexpr int64_t STEP = 1 << 20;
        std::atomic<float> most{0};
        nb::gil_scoped_release released;
        threads_.run(int64_t(x.size()) / STEP, [&](int64_t i) {
            most = kernels_->read(x.data() + i * STEP, STEP);
        });
        return most;
    }

    // Multiply-adds in registers on all threads; returns how many floating-point operations.
    double probe_multiply(int64_t steps) {
        std::atomic<float> result{0};
        nb::gil_scoped_release released;
        threads_.run(threads(), [&](int64_t) { result = kernels_->multiply_add(steps); });
        return double(steps) * threads() * PROBE_CHAINS * 16 * 2 * 2;
    }

private:
    int64_t same_rows(const Floats& x, const Output& y, int64_t n) {
        require(n > 0 && x.size() % size_t(n) == 0 && y.size() == x.size(),
                "x and y must have rows of " + std::to_string(n));
        return int64_t(x.size()) / n;
    }

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
        require(x.size() == y.size(), "sizes differ");
        constexpr int64_t STEP = 1 << 14;
        int64_t n = int64_t(x.size());
        nb::gil_scoped_release released;
        threads_.run((n + STEP - 1) / STEP, [&](int64_t i) {
            work(i * STEP, (i + 1) * STEP < n ? STEP : n - i * STEP);
        });
    }

    void run_attention(const Attention& a, int64_t sequences);

    const Kernels* kernels_ = nullptr;
    ThreadPool threads_;
    std::mutex mutex_;  // guards the scratch memory below
    std::vector<uint16_t> pairs_;
    std::vector<float> partials_;
};

// Every (sequence, KV head, block of query rows); the dearest, late in a prompt, come first.
std::vector<AttentionItem> attention_items(const Attention& a, int64_t sequences) {
    std::vector<AttentionItem> items;
    int64_t share = a.num_heads / a.pool.heads;
    for (int64_t s = 0; s < sequences; ++s) {
        int64_t from = a.query_indptr[s], rows = (a.query_indptr[s + 1] - from) * share;
        for (int64_t row = (rows - 1) / ROW_BLOCK * ROW_BLOCK; rows > 0 && row >= 0; row -= ROW_BLOCK) {
            int64_t count = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
            int64_t first = a.positions[from + row / share];
            int64_t last = a.positions[from + (row + count - 1) / share];
            int64_t low = a.window && first >= a.window ? first - a.window + 1 : 0;
            for (int64_t head = 0; head < a.pool.heads; ++head)
                items.push_back({s, head, row, count, low / SPLIT, last / SPLIT + 1, nullptr});
        }
    }
    return items;
}

void Native::run_attention(const Attention& a, int64_t sequences) {
    std::vector<AttentionItem> items = attention_items(a, sequences);
    if (int64_t(items.size()) >= 4 * threads()) {
        threads_.run(int64_t(items.size()), [&](int64_t i) { kernels_->attend(a, items[size_t(i)]); });
        return;
    }
    // Too few to share out: one item a split, merged afterwards in the same order.
    size_t need = 0;
    for (auto& item : items)
        need += size_t((item.split_end - item.split) * item.rows * (a.pool.value_dim + 2));
    partials_.resize(need);
    std::vector<AttentionItem> parts;
    float* at = partials_.data();
    for (auto& item : items) {
        item.partial = at;
        for (int64_t split = item.split; split < item.split_end; ++split) {
            parts.push_back(item);
            parts.back().split = split, parts.back().split_end = split + 1;
            parts.back().partial = at;
            at += item.rows * (a.pool.value_dim + 2);
        }
    }
    threads_.run(int64_t(parts.size()), [&](int64_t i) { kernels_->attend(a, parts[size_t(i)]); });
    threads_.run(int64_t(items.size()), [&](int64_t i) { kernels_->merge(a, items[size_t(i)]); });
}

std::vector<const Kernels*> Native::available() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(avx512bf16_kernels());
    if (avx512) found.push_back(avx512_kernels());
    if (avx2) found.push_back(avx2_kernels());
#endif
    found.push_back(portable_kernels());
    return found;
}

}  // namespace
}  // namespace quire

NB_MODULE(_native, m) {
    using namespace quire;
    m.doc() = "Kernels for the CPU; see quire.backends.native.";
    m.def("variants", [] {
        std::vector<std::string> names;
        for (auto* kernels : Native::available()) names.push_back(kernels->name);
        return names;
    }, "Variants that this processor can run, the fastest first.");
    nb::class_<Weight>(m, "Weight")
        .def(nb::init<Bytes, int, int64_t, int64_t>(), "data"_a.noconvert(), "dtype"_a, "rows"_a, "columns"_a)
        .def_ro("rows", &Weight::n)
        .def_ro("columns", &Weight::k);
    nb::class_<PoolArrays>(m, "Pool")
        .def(nb::init<Storage, Storage, int, std::vector<int64_t>>(), "key"_a.noconvert(), "value"_a.noconvert(), "dtype"_a,
             "shape"_a)
        .def_prop_ro("interleaved", [](const PoolArrays& p) { return p.pool.interleaved; });
    nb::class_<Tables>(m, "Tables")
        .def(nb::init<Ints, Ints, Ints, Ints, Ints, Ints, int64_t, int64_t>(), "positions"_a.noconvert(),
             "query_indptr"_a.noconvert(), "indptr"_a.noconvert(), "indices"_a.noconvert(), "last_page_len"_a.noconvert(), "first_page"_a.noconvert(),
             "page_size"_a, "window"_a);
    nb::class_<Native>(m, "Native")
        .def(nb::init<const std::string&, int>(), "variant"_a, "threads"_a)
        .def_prop_ro("threads", &Native::threads)
        .def_prop_ro("variant", &Native::variant)
        .def("linear", &Native::linear, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.none().noconvert(), "y"_a.noconvert())
        .def("append", &Native::append, "pool"_a, "slots"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert())
        .def("attend", &Native::attend, "query"_a.noconvert(), "pool"_a, "tables"_a, "out"_a.noconvert())
        .def("rms_norm", &Native::rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "y"_a.noconvert())
        .def("layer_norm", &Native::layer_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a, "y"_a.noconvert())
        .def("rope", &Native::rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "y"_a.noconvert())
        .def("activate", &Native::activate, "x"_a.noconvert(), "kind"_a, "y"_a.noconvert())
        .def("multiply", &Native::multiply, "x"_a.noconvert(), "z"_a.noconvert(), "y"_a.noconvert())
        .def("add", &Native::add, "x"_a.noconvert(), "z"_a.noconvert(), "y"_a.noconvert())
        .def("probe_read", &Native::probe_read, "x"_a.noconvert())
        .def("probe_multiply", &Native::probe_multiply, "steps"_a)
        .def("embed", &Native::embed, "table"_a, "ids"_a.noconvert(), "y"_a.noconvert());
}
