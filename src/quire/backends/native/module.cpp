// The extension module: names and types of what Python calls. Arrays are NumPy's and are never
// converted on the way; bf16 and fp16 come as bytes beside a dtype code.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "native.hpp"

using namespace nanobind::literals;

NB_MODULE(_native, m) {
    using namespace quire;
    m.doc() = "Kernels for the CPU; see quire.backends.native.";
    m.def(
        "variants",
        [] {
            std::vector<std::string> names;
            for (auto* kernels : Native::available()) names.push_back(kernels->name);
            return names;
        },
        "Variants that this processor can run, the fastest first.");
    nb::class_<Weight>(m, "Weight")
        .def(nb::init<Bytes, int, int64_t, int64_t>(), "data"_a.noconvert(), "dtype"_a, "rows"_a,
             "columns"_a)
        .def_ro("rows", &Weight::n)
        .def_ro("columns", &Weight::k);
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<const Weight&, std::optional<Floats>>(), "weight"_a,
             "bias"_a.none().noconvert());
    nb::class_<AttentionWeights>(m, "AttentionWeights")
        .def(nb::init<Floats, float, Layer, Layer, Layer, Layer, std::optional<Floats>,
                      std::optional<Floats>>(),
             "norm"_a.noconvert(), "eps"_a, "q"_a, "k"_a, "v"_a, "o"_a,
             "q_norm"_a.none().noconvert(), "k_norm"_a.none().noconvert());
    nb::class_<MlpWeights>(m, "MlpWeights")
        .def(nb::init<Floats, float, Layer, Layer, Layer, int>(), "norm"_a.noconvert(), "eps"_a,
             "gate"_a, "up"_a, "down"_a, "activation"_a);
    nb::class_<StoreArrays>(m, "Store")
        .def(nb::init<Storage, std::optional<Scales>, int, int64_t>(), "data"_a.noconvert(),
             "scale"_a.none().noconvert(), "dtype"_a, "dim"_a);
    nb::class_<PoolArrays>(m, "Pool")
        .def(nb::init<const StoreArrays&, const StoreArrays&, std::vector<int64_t>,
                      const PoolArrays*, int64_t, bool>(),
             "key"_a, "value"_a, "shape"_a, "open"_a.none() = nb::none(), "taking"_a = 0,
             "rotated"_a = false)
        .def_prop_ro("key_beside", [](const PoolArrays& p) { return p.pool.key.beside; })
        .def_prop_ro("value_beside", [](const PoolArrays& p) { return p.pool.value.beside; });
    nb::class_<OpenTables>(m, "OpenTables")
        .def(nb::init<Ints, Ints, Ints, Ints, Ints>(), "indptr"_a.noconvert(),
             "indices"_a.noconvert(), "first"_a.noconvert(), "seal_from"_a.noconvert(),
             "seal_to"_a.noconvert());
    nb::class_<Tables>(m, "Tables")
        .def(nb::init<Ints, Ints, Ints, Ints, Ints, Ints, Ints, int64_t, int64_t,
                      const OpenTables&>(),
             "places"_a.noconvert(), "positions"_a.noconvert(), "query_indptr"_a.noconvert(),
             "indptr"_a.noconvert(), "indices"_a.noconvert(), "last_page_len"_a.noconvert(),
             "first_page"_a.noconvert(), "page_size"_a, "window"_a, "open"_a);
    nb::class_<Layers>(m, "Layers")
        .def(nb::init<>())
        .def("add", &Layers::add, "attention"_a, "mlp"_a, "pool"_a, "group"_a);
    nb::class_<Native>(m, "Native")
        .def(nb::init<const std::string&, int>(), "variant"_a, "threads"_a)
        .def_prop_ro("threads", &Native::threads)
        .def_prop_ro("variant", &Native::variant)
        .def("linear", &Native::linear, "x"_a.noconvert(), "weight"_a,
             "bias"_a.none().noconvert(), "y"_a.noconvert())
        .def("append", &Native::append, "pool"_a, "slots"_a.noconvert(), "key"_a.noconvert(),
             "value"_a.noconvert())
        .def("seal", &Native::seal, "pool"_a, "source"_a.noconvert(), "target"_a.noconvert())
        .def("attend", &Native::attend, "query"_a.noconvert(), "pool"_a, "tables"_a,
             "out"_a.noconvert())
        .def("rms_norm", &Native::rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
             "y"_a.noconvert())
        .def("layer_norm", &Native::layer_norm, "x"_a.noconvert(), "weight"_a.noconvert(),
             "bias"_a.noconvert(), "eps"_a, "y"_a.noconvert())
        .def("rope", &Native::rope, "x"_a.noconvert(), "positions"_a.noconvert(),
             "cos"_a.noconvert(), "sin"_a.noconvert(), "y"_a.noconvert())
        .def("hadamard", &Native::hadamard, "x"_a.noconvert(), "dim"_a, "y"_a.noconvert())
        .def("activate", &Native::activate, "x"_a.noconvert(), "kind"_a, "y"_a.noconvert())
        .def("multiply", &Native::multiply, "x"_a.noconvert(), "z"_a.noconvert(), "y"_a.noconvert())
        .def("add", &Native::add, "x"_a.noconvert(), "z"_a.noconvert(), "y"_a.noconvert())
        .def("embed", &Native::embed, "table"_a, "ids"_a.noconvert(), "y"_a.noconvert())
        .def("attention_block", &Native::attention_block, "x"_a.noconvert(), "weights"_a,
             "cos"_a.noconvert(), "sin"_a.noconvert(), "pool"_a, "slots"_a.noconvert(), "tables"_a,
             "y"_a.noconvert())
        .def("mlp_block", &Native::mlp_block, "x"_a.noconvert(), "weights"_a, "y"_a.noconvert())
        .def("layers", &Native::layers, "x"_a.noconvert(), "layers"_a, "cos"_a.noconvert(),
             "sin"_a.noconvert(), "slots"_a.noconvert(), "tables"_a, "y"_a.noconvert())
        .def("score_bounds", &Native::score_bounds, "query"_a.noconvert(), "bounds"_a.noconvert(),
             "pages"_a.noconvert(), "out"_a.noconvert())
        .def("score_signatures", &Native::score_signatures, "query"_a.noconvert(),
             "signs"_a.noconvert(), "pages"_a.noconvert(), "out"_a.noconvert())
        .def("probe_read", &Native::probe_read, "x"_a.noconvert())
        .def("probe_multiply", &Native::probe_multiply, "steps"_a);
}
