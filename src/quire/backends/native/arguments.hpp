// What Python hands over: NumPy arrays, and objects that keep them alive. Everything is checked here,
// once, so that kernels need not.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>
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
    return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 || dtype == Dtype::f8 ? 1 : 2;
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

// Keys, or values, of all pages of a layer: numbers, and bf16 scales of int8 and fp8 ones.
struct StoreArrays {
    StoreArrays(Storage data, std::optional<Scales> scale, int code, int64_t dim)
        : data(data), scale(scale), dtype(Dtype(code)), dim(dim) {
        REQUIRE(code >= 0 && code <= 4, "dtype code " + std::to_string(code) + " is not 0 to 4");
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

struct PoolArrays {
    PoolArrays(const StoreArrays& keys, const StoreArrays& values, std::vector<int64_t> shape)
        : keys(keys), values(values) {
        REQUIRE(shape.size() == 3, "a pool's shape has three numbers");
        for (int64_t size : shape) REQUIRE(size > 0, "a pool's sizes are positive");
        check(keys, shape), check(values, shape);
        pool = settled({store_of(keys), store_of(values), shape[0], shape[1], shape[2]});
    }

    static void check(const StoreArrays& store, const std::vector<int64_t>& shape) {
        size_t tokens = size_t(shape[0]) * size_t(shape[1]) * size_t(shape[2]);
        REQUIRE(store.data.size() == tokens * size_t(store.dim) * width(store.dtype) &&
                    (!store.scale || store.scale->size() == tokens),
                "the pool's arrays do not have its shape");
    }
    static Store store_of(const StoreArrays& from) {
        return {from.data.data(), from.scale ? from.scale->data() : nullptr, from.dtype, from.dim};
    }
    StoreArrays keys, values;
    Pool pool;
};

// The page tables of one layer group for a step, checked once and used by every layer. A token's
// place among those that its sequence keeps decides what it sees, its position how it is rotated.
struct Tables {
    Tables(Ints places, Ints positions, Ints query_indptr, Ints indptr, Ints indices,
           Ints last_page_len, Ints first_page, int64_t page_size, int64_t window)
        : places(places), positions(positions), query_indptr(query_indptr), indptr(indptr),
          indices(indices), last_page_len(last_page_len), first_page(first_page),
          page_size(page_size), window(window) {
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

    Ints places, positions, query_indptr, indptr, indices, last_page_len, first_page;
    int64_t page_size, window, most = -1;
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
