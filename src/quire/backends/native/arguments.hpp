// What Python hands over: NumPy arrays, and objects that keep them alive. Everything is checked here,
// once, so that kernels need not.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace quire {
namespace nb = nanobind;

using Floats = nb::ndarray<nb::numpy, const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy, float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<nb::numpy, const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Storage = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<nb::numpy, uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Shorts = nb::ndarray<nb::numpy, const uint16_t, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<nb::numpy, const uint64_t, nb::c_contig, nb::device::cpu>;

// Raises ValueError unless `ok`. A macro, so that the text is only made when it is needed: some checks
// are made for every token of every layer.
#define REQUIRE(ok, text)                                                \
    do {                                                                 \
        if (!(ok)) throw nb::value_error(std::string(text).c_str());     \
    } while (0)

inline size_t width(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : packed_bits(dtype) ? 0 : dtype == Dtype::i8 || dtype == Dtype::f8 ? 1 : 2;
}

inline Dtype dtype_of(int code) {
    REQUIRE(code >= 0 && code <= 2, "dtype code " + std::to_string(code) + " is not 0, 1 or 2");
    return Dtype(code);
}

// A weight matrix [n, k], kept where it is.
struct Weight {
    Weight(Bytes data, int code, int64_t rows, int64_t columns)
        : array(data), dtype(dtype_of(code)), n(rows), k(columns) {
        REQUIRE(n > 0 && k > 0 && data.size() == size_t(n) * size_t(k) * width(dtype),
                "a weight of " + std::to_string(n) + " x " + std::to_string(k) + " does not fill " +
                    std::to_string(data.size()) + " bytes");
    }
    Bytes array;
    Dtype dtype;
    int64_t n, k;
};

// Keys, or values, of all pages of a layer: numbers, and bf16 scales of int8 and fp8 ones. Minima and
// steps of packed numbers lie among those.
struct StoreArrays {
    StoreArrays(Storage data, std::optional<Scales> scale, int code, int64_t dim)
        : data(data), scale(scale), dtype(Dtype(code)), dim(dim) {
        REQUIRE(code >= 0 && code <= 6, "dtype code " + std::to_string(code) + " is not 0 to 6");
        REQUIRE(dim > 0 && dim <= MAX_HEAD, "a head dimension of " + std::to_string(dim) +
                                                " is not in 1.." + std::to_string(MAX_HEAD));
        REQUIRE(scale.has_value() == (dtype == Dtype::i8 || dtype == Dtype::f8),
                "int8 and fp8 numbers have scales, others do not");
    }
    Storage data;
    std::optional<Scales> scale;
    Dtype dtype;
    int64_t dim;
};

// All pages of a layer. Where pages are packed whole, `open` are those that take tokens, whose ids begin
// where those of the packed ones end. Without it, ids from `taking` on take tokens.
struct PoolArrays {
    PoolArrays(const StoreArrays& keys, const StoreArrays& values, std::vector<int64_t> shape,
               const PoolArrays* open, int64_t taking, bool rotated)
        : keys(keys), values(values), taking(taking), rotated(rotated) {
        REQUIRE(shape.size() == 3, "a pool's shape has three numbers");
        for (int64_t size : shape) REQUIRE(size > 0, "a pool's sizes are positive");
        pool = settled({store_of(keys), store_of(values), shape[0], shape[1], shape[2]});
        REQUIRE(!pool.key.packed() || shape[1] % STRETCH == 0,
                "packed keys need pages of a multiple of " + std::to_string(STRETCH) + " tokens");
        check(keys, pool.key), check(values, pool.value);
        REQUIRE((open != nullptr) == (pool.key.packed() || pool.value.packed()),
                "packed pages need open ones, others have none");
        REQUIRE(taking >= 0 && taking <= shape[0], "no page takes tokens");
        if (open) join(*open);
    }

    void check(const StoreArrays& from, const Store& store) const {
        size_t heads = size_t(pool.num_pages) * size_t(pool.heads);
        size_t tokens = heads * size_t(pool.page_size);
        size_t bytes = store.packed() ? heads * size_t(store.head_bytes)
                                      : tokens * size_t(store.dim) * width(store.dtype);
        REQUIRE(from.data.size() == bytes && (!from.scale || from.scale->size() == tokens),
                "the pool's arrays do not have its shape");
    }
    void join(const PoolArrays& other) {
        for (auto [mine, its] : {std::pair{&pool.key, &other.pool.key},
                                 std::pair{&pool.value, &other.pool.value}})
            REQUIRE(its->dim == mine->dim &&
                        its->dtype == (mine->packed() ? Dtype::bf16 : mine->dtype),
                    "open pages hold bf16 numbers where others are packed, and the same elsewhere");
        REQUIRE(!other.open && other.pool.page_size == pool.page_size && other.pool.heads == pool.heads,
                "open and packed pages differ in shape");
        open = std::make_shared<PoolArrays>(other);
        open->pool.first = pool.num_pages;
    }
    static Store store_of(const StoreArrays& from) {
        return {from.data.data(), from.scale ? from.scale->data() : nullptr, from.dtype, from.dim};
    }
    // The pages that take tokens, and the id of the first.
    const Pool& taker() const { return open ? open->pool : pool; }
    int64_t first_taker() const { return open ? pool.num_pages : taking; }
    int64_t all_pages() const { return pool.num_pages + (open ? open->pool.num_pages : 0); }

    StoreArrays keys, values;
    Pool pool;
    std::shared_ptr<PoolArrays> open;
    int64_t taking;
    bool rotated;  // keys, and the queries that attend to them, are turned by hadamard()
};

// Pages that a step's new tokens go through in a group whose pages are packed; empty in others.
struct OpenTables {
    OpenTables(Ints indptr, Ints indices, Ints first, Ints seal_from, Ints seal_to)
        : indptr(indptr), indices(indices), first(first), seal_from(seal_from), seal_to(seal_to) {
        REQUIRE(seal_from.size() == seal_to.size(), "every page that is sealed has one target");
        REQUIRE(indptr.size() == 0 ? indices.size() == 0 && seal_from.size() == 0
                                   : first.size() + 1 == indptr.size(),
                "tables of open pages disagree in length");
    }
    bool used() const { return indptr.size() > 0; }
    Ints indptr, indices, first, seal_from, seal_to;
};

// The least and the greatest of some ids.
struct Range {
    void take(int64_t id) { least = id < least ? id : least, most = id > most ? id : most; }
    bool within(int64_t low, int64_t high) const { return least > most || (least >= low && most < high); }
    int64_t least = INT64_MAX, most = -1;
};

// The page tables of one layer group for a step, checked once and used by every layer. A token's
// place among those that its sequence keeps decides what it sees, its position how it is rotated.
struct Tables {
    Tables(Ints places, Ints positions, Ints query_indptr, Ints indptr, Ints indices,
           Ints last_page_len, Ints first_page, int64_t page_size, int64_t window,
           const OpenTables& open)
        : places(places), positions(positions), query_indptr(query_indptr), indptr(indptr),
          indices(indices), last_page_len(last_page_len), first_page(first_page),
          page_size(page_size), window(window), open(open) {
        size_t sequences = last_page_len.size();
        REQUIRE(page_size > 0 && window >= 0, "page_size must be positive, window not negative");
        REQUIRE(query_indptr.size() == sequences + 1 && indptr.size() == sequences + 1 &&
                    first_page.size() == sequences,
                "tables of " + std::to_string(sequences) + " sequences disagree in length");
        REQUIRE(query_indptr(0) == 0 && indptr(0) == 0 &&
                    size_t(query_indptr(sequences)) == places.size() &&
                    places.size() == positions.size() &&
                    size_t(indptr(sequences)) == indices.size(),
                "indptr must run from 0 to the number of tokens (pages)");
        for (size_t i = 0; i < indices.size(); ++i) {
            REQUIRE(indices(i) >= 0, "page id " + std::to_string(indices(i)) + " is negative");
            most = indices(i) > most ? indices(i) : most;
        }
        for (size_t s = 0; s < sequences; ++s) check(s);
        if (!open.used()) return;
        REQUIRE(open.indptr.size() == sequences + 1 && open.indptr(0) == 0 &&
                    size_t(open.indptr(sequences)) == open.indices.size(),
                "indptr of open pages must run from 0 to their number");
        for (size_t s = 0; s < sequences; ++s) check_open(s);
    }

    void check(size_t s) const {
        auto who = [s] { return "sequence " + std::to_string(s) + ": "; };
        int64_t pages = indptr(s + 1) - indptr(s), tokens = query_indptr(s + 1) - query_indptr(s);
        REQUIRE(pages >= 0 && tokens >= 0, who() + "indptr decreases");
        REQUIRE(first_page(s) >= 0, who() + "first_page is negative");
        if (tokens == 0) return;
        int64_t start = first_page(s) * page_size;
        int64_t end = start + (pages - 1) * page_size + last_page_len(s);
        REQUIRE(pages > 0 && last_page_len(s) > 0 && last_page_len(s) <= page_size,
                who() + "last_page_len " + std::to_string(last_page_len(s)) + " is not in 1.." +
                    std::to_string(page_size));
        for (int64_t t = query_indptr(s); t < query_indptr(s + 1); ++t) {
            int64_t at = places(t), low = window && at >= window ? at - window + 1 : 0;
            REQUIRE(at < end && low >= start,
                    who() + "place " + std::to_string(at) + " sees tokens outside " +
                        std::to_string(start) + ".." + std::to_string(end));
            REQUIRE(t == query_indptr(s) || at > places(t - 1), who() + "places must ascend");
        }
    }

    // Pages that queries stand in are open, as is the first; those between are packed.
    void check_open(size_t s) {
        REQUIRE(open.indptr(s) <= open.indptr(s + 1), "indptr of open pages decreases");
        if (query_indptr(s) == query_indptr(s + 1)) return;
        int64_t first = places(query_indptr(s)) / page_size;
        int64_t last = places(query_indptr(s + 1) - 1) / page_size;
        REQUIRE(open.first(s) >= 0 && open.first(s) <= first &&
                    last - open.first(s) < open.indptr(s + 1) - open.indptr(s),
                "sequence " + std::to_string(s) + ": a query stands in a page that is not open");
        for (int64_t i = open.indptr(s); i < open.indptr(s + 1); ++i) opened.take(open.indices(i));
        for (int64_t i = indptr(s), page = first_page(s); page < last; ++i, ++page)
            (page ? packed : opened).take(indices(i));
    }

    Ints places, positions, query_indptr, indptr, indices, last_page_len, first_page;
    int64_t page_size, window, most = -1;
    OpenTables open;
    Range opened, packed;  // ids that are read as open pages, and as packed ones
};

// A linear layer's weight and bias.
struct Layer {
    Layer(const Weight& weight, std::optional<Floats> bias) : weight(weight), bias(bias) {
        REQUIRE(!bias || int64_t(bias->size()) == weight.n,
                "linear: a bias of " + std::to_string(bias ? bias->size() : 0) +
                    " numbers does not fit " + std::to_string(weight.n) + " outputs");
    }
    const float* bias_data() const { return bias ? bias->data() : nullptr; }
    Weight weight;
    std::optional<Floats> bias;
};

// Weights of the attention half of a decoder layer: norm, projections, norms of queries and keys.
struct AttentionWeights {
    AttentionWeights(Floats norm, float eps, Layer q, Layer k, Layer v, Layer o,
                     std::optional<Floats> q_norm, std::optional<Floats> k_norm)
        : norm(norm), eps(eps), q(q), k(k), v(v), o(o), q_norm(q_norm), k_norm(k_norm) {
        int64_t hidden = int64_t(norm.size());
        REQUIRE(q.weight.k == hidden && k.weight.k == hidden && v.weight.k == hidden &&
                    o.weight.n == hidden,
                "attention: projections do not fit a hidden size of " + std::to_string(hidden));
    }
    Floats norm;
    float eps;
    Layer q, k, v, o;
    std::optional<Floats> q_norm, k_norm;
};

// Weights of the gated MLP half of a decoder layer.
struct MlpWeights {
    MlpWeights(Floats norm, float eps, Layer gate, Layer up, Layer down, int activation)
        : norm(norm), eps(eps), gate(gate), up(up), down(down), activation(activation) {
        int64_t hidden = int64_t(norm.size()), inner = gate.weight.n;
        REQUIRE(gate.weight.k == hidden && up.weight.k == hidden && up.weight.n == inner &&
                    down.weight.k == inner && down.weight.n == hidden,
                "mlp: projections do not fit a hidden size of " + std::to_string(hidden));
        REQUIRE(gate.weight.dtype == up.weight.dtype, "mlp: gate and up differ in dtype");
    }
    Floats norm;
    float eps;
    Layer gate, up, down;
    int activation;
};

// A decoder layer, the pool of its keys and values, and its layer group.
struct DecoderLayer {
    AttentionWeights attention;
    MlpWeights mlp;
    PoolArrays pool;
    int group;
};

// Consecutive decoder layers.
struct Layers {
    void add(const AttentionWeights& attention, const MlpWeights& mlp, const PoolArrays& pool,
             int group) {
        REQUIRE(attention.norm.size() == mlp.norm.size() && group >= 0 &&
                    (layers.empty() || int64_t(mlp.norm.size()) == hidden),
                "layers: hidden sizes differ, or a layer group is negative");
        hidden = int64_t(mlp.norm.size());
        layers.push_back({attention, mlp, pool, group});
    }
    std::vector<DecoderLayer> layers;
    int64_t hidden = 0;
};

}  // namespace quire
