"""The native backend beyond the conformance suite: variants, threads, arguments, fallback."""

import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quire
from quire.backends import (
    AttentionParams,
    MlpParams,
    Projection,
    backend_status,
    create_backend,
)
from quire.backends.blocks import attention_block, mlp_block
from quire.batch import GroupBatch, PagedBatch
from quire.errors import BackendError
from quire.pages import PageShape, page_format

native = pytest.importorskip("quire.backends.native")
extension = pytest.importorskip("quire.backends.native._native")

NativeBackend = native.NativeBackend
VARIANTS = NativeBackend.variants()


def test_auto_is_native_with_the_fastest_variant() -> None:
    backend = create_backend("auto")
    assert backend.name == "native"
    assert backend.variant == VARIANTS[0]
    assert VARIANTS[-1] == "portable"


def test_status_names_the_variant_and_the_others() -> None:
    status = next(s for s in backend_status() if s.name == "native")
    assert status.available
    assert VARIANTS[0] in status.detail


def test_an_unknown_variant_and_absurd_threads_are_refused() -> None:
    with pytest.raises(BackendError, match=r"variant 'sse9'.*available: .*portable"):
        NativeBackend("sse9")
    for threads in (0, -1, 2000):
        with pytest.raises(BackendError, match=f"threads must be .* not {threads}"):
            NativeBackend(threads=threads)


def test_without_the_extension_auto_falls_back_loudly() -> None:
    code = (
        "import sys; sys.modules['quire.backends.native._native'] = None\n"
        "import quire\n"
        "engine = quire.Engine()\n"
        "print(engine.backend.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "reference\n"
    assert "native backend is off" in done.stderr
    assert "slow" in done.stderr


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_do_not_change_a_bit(variant: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, 300)).astype(np.float32)
    weight = rng.standard_normal((500, 300)).astype(ml_dtypes.bfloat16)
    one = NativeBackend(variant, threads=1)
    many = NativeBackend(variant, threads=threads)
    expected = one.linear(x, one.weight(weight))
    for _ in range(20):
        assert np.array_equal(many.linear(x, many.weight(weight)), expected)


def test_several_python_threads_may_share_a_backend() -> None:
    rng = np.random.default_rng(0)
    backend = NativeBackend(threads=2)
    weight = backend.weight(rng.standard_normal((400, 200)).astype(ml_dtypes.bfloat16))
    inputs = [rng.standard_normal((9, 200)).astype(np.float32) for _ in range(8)]
    expected = [backend.linear(x, weight) for x in inputs]
    wrong = []

    def work(at: int) -> None:
        for _ in range(50):
            if not np.array_equal(backend.linear(inputs[at], weight), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- whatever the number of rows, op by op or half a layer at a time: the same bits ---------------


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (33, 31), (70, 100), (130, 2100), (64, 4096)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_has_the_same_bits_alone_and_among_others(
    variant: str, out: int, inner: int, dtype: type
) -> None:
    # Few rows are multiplied straight from the weights, many from panels: 24 and 25 are the border.
    rng = np.random.default_rng(out)
    backend = NativeBackend(variant, threads=2)
    weight = backend.weight(rng.standard_normal((out, inner)).astype(dtype))
    bias = rng.standard_normal(out).astype(np.float32)
    x = rng.standard_normal((53, inner)).astype(np.float32)
    x[:, ::3] = np.float32(1.1754942e-38)  # a denormal that rounds up to a normal bf16
    alone = np.concatenate([backend.linear(x[t : t + 1], weight, bias) for t in range(len(x))])
    for rows in (2, 3, 4, 6, 7, 8, 13, 24, 25, 31, 53):
        assert backend.linear(x[:rows], weight, bias).tobytes() == alone[:rows].tobytes()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (30,), (1, 7, 0, 1), (70,), (40, 1, 5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_a_layer_in_one_call_is_its_ops_one_by_one(
    variant: str, counts: tuple[int, ...], biased: bool, norms: bool
) -> None:
    rng = np.random.default_rng(len(counts))
    backend = NativeBackend(variant, threads=2)
    hidden, heads, kv_heads, dim, inner = 48, 6, 2, 32, 80

    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    def projection(out: int, width: int) -> Projection:
        weight = rng.standard_normal((out, width)).astype(ml_dtypes.bfloat16)
        return Projection(backend.weight(weight), vector(out) if biased else None)

    attention = AttentionParams(
        norm=vector(hidden),
        norm_eps=1e-5,
        q=projection(heads * dim, hidden),
        k=projection(kv_heads * dim, hidden),
        v=projection(kv_heads * dim, hidden),
        o=projection(hidden, heads * dim),
        q_norm=vector(dim) if norms else None,
        k_norm=vector(dim) if norms else None,
        num_heads=heads,
        num_kv_heads=kv_heads,
        inv_freq=np.abs(vector(dim // 2)),
    )
    mlp = MlpParams(
        vector(hidden),
        1e-5,
        projection(inner, hidden),
        projection(inner, hidden),
        projection(hidden, inner),
        "silu",
    )
    stored = 300  # tokens before these in every sequence
    pages = [-(-(stored + count) // 16) if count else 0 for count in counts]
    ids = rng.permutation(sum(pages)).astype(np.int64)
    indptr = np.cumsum([0, *pages])
    positions, slots = [], []
    for s, count in enumerate(counts):
        for at in range(stored, stored + count):
            positions.append(at)
            slots.append(ids[indptr[s] + at // 16] * 16 + at % 16)
    last = [(stored + count - 1) % 16 + 1 if count else 0 for count in counts]
    group = GroupBatch(
        16,
        None,
        np.array(slots, np.int64),
        indptr,
        ids,
        np.array(last, np.int64),
        np.zeros(len(counts), np.int64),
    )
    batch = PagedBatch(np.array(positions, np.int64), np.cumsum([0, *counts]), (group,), (0,))
    bf16 = page_format("bf16")  # turned, which nobody may ask for, where there are norms
    shape = PageShape(16, kv_heads, dim, dim, replace(bf16, rotated=norms), bf16)
    pools = [backend.pool(shape, max(1, sum(pages))) for _ in range(2)]
    for pool in pools[:1]:
        pool.key[:] = rng.standard_normal(pool.key.shape)
        pool.value[:] = rng.standard_normal(pool.value.shape)
    pools[1].key[:], pools[1].value[:] = pools[0].key, pools[0].value

    before = pools[0].key.copy(), pools[0].value.copy()

    x = rng.standard_normal((sum(counts), hidden)).astype(np.float32)
    fused = backend.attention_block(x, backend.block(attention), batch, pools[0], 0)
    apart = attention_block(backend, x, attention, batch, pools[1], group=0)
    assert fused.tobytes() == apart.tobytes()
    assert pools[0].key.tobytes() == pools[1].key.tobytes()
    assert pools[0].value.tobytes() == pools[1].value.tobytes()
    fused = backend.mlp_block(x, backend.block(mlp))
    assert fused.tobytes() == mlp_block(backend, x, mlp).tobytes()

    for pool in pools:
        pool.key[:], pool.value[:] = before
    blocks = (backend.block(attention), backend.block(mlp))
    stack = backend.layers(x, [blocks, blocks], replace(batch, group_of_layer=(0, 0)), pools)
    x_layer = x
    for pool in pools:
        again = backend.pool(shape, pool.num_pages)
        again.key[:], again.value[:] = before
        x_layer = mlp_block(
            backend, attention_block(backend, x_layer, attention, batch, again, group=0), mlp
        )
        assert pool.key.tobytes() == again.key.tobytes()
        assert pool.value.tobytes() == again.value.tobytes()
    assert stack.tobytes() == x_layer.tobytes()

    rows = sorted(rng.choice(len(x), size=(len(x) + 2) // 3, replace=False).tolist())
    for some in ([], [len(x) - 1], rows):
        for pool in pools:
            pool.key[:], pool.value[:] = before
        whole = backend.attention_block(x, backend.block(attention), batch, pools[0], 0)
        part = backend.attention_rows(
            x, backend.block(attention), batch, pools[1], group=0, rows=some
        )
        assert part.tobytes() == whole[some].tobytes()
        assert pools[0].key.tobytes() == pools[1].key.tobytes()
        assert pools[0].value.tobytes() == pools[1].value.tobytes()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_mlp_whose_sums_are_made_in_several_chunks(
    variant: str, rows: int, activation: str
) -> None:
    rng = np.random.default_rng(rows)
    backend = NativeBackend(variant, threads=2)
    hidden, inner = 2100, 50  # 2,048 numbers of bf16 a chunk

    def projection(out: int, width: int) -> Projection:
        weight = rng.standard_normal((out, width)).astype(ml_dtypes.bfloat16)
        return Projection(backend.weight(weight), rng.standard_normal(out).astype(np.float32))

    mlp = MlpParams(
        rng.standard_normal(hidden).astype(np.float32),
        1e-5,
        projection(inner, hidden),
        projection(inner, hidden),
        projection(hidden, inner),
        activation,
    )
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    fused = backend.mlp_block(x, backend.block(mlp))
    assert fused.tobytes() == mlp_block(backend, x, mlp).tobytes()


# -- malformed arguments raise, never crash --------------------------------------------------------


@pytest.fixture
def kernels() -> "extension.Native":
    return extension.Native(VARIANTS[0], 2)


def weight_of(rows: int, columns: int) -> "extension.Weight":
    return extension.Weight(np.zeros(rows * columns * 4, np.uint8), 0, rows, columns)


def test_a_weight_must_fill_its_bytes() -> None:
    for size, code, rows, columns in ((7, 0, 1, 2), (8, 3, 1, 2), (8, 0, -1, 2), (0, 0, 0, 0)):
        with pytest.raises(ValueError, match=r"weight|dtype code"):
            extension.Weight(np.zeros(size, np.uint8), code, rows, columns)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)),
        (np.zeros((2, 4), np.float32), np.zeros((1, 5), np.float32)),
        (np.zeros(4, np.float32), np.zeros((1, 5), np.float32)),
        (np.zeros((2, 4)), np.zeros((2, 5), np.float32)),
        (np.zeros((4, 2), np.float32).T, np.zeros((2, 5), np.float32)),
        (np.zeros((2, 8), np.float32)[:, ::2], np.zeros((2, 5), np.float32)),
        (None, np.zeros((2, 5), np.float32)),
    ],
)
def test_linear_refuses_wrong_shapes_dtypes_and_strides(
    kernels: "extension.Native", x: object, y: np.ndarray
) -> None:
    with pytest.raises((ValueError, TypeError)):
        kernels.linear(x, weight_of(5, 4), None, y)


def test_a_read_only_result_is_refused(kernels: "extension.Native") -> None:
    y = np.zeros((2, 5), np.float32)
    y.setflags(write=False)
    with pytest.raises((ValueError, TypeError)):
        kernels.linear(np.zeros((2, 4), np.float32), weight_of(5, 4), None, y)


def new_pool(pages: int = 4) -> "native.pool.NativePool":
    return NativeBackend(threads=1).pool(
        PageShape(16, 2, 32, 32, *[page_format("bf16")] * 2), pages
    )


@pytest.mark.parametrize("pages", [2**38, 2**60])
def test_a_pool_beyond_all_memory_is_refused_with_its_size(pages: int) -> None:
    with pytest.raises(BackendError, match=f"no memory for {pages} pages of 4096 bytes"):
        new_pool(pages)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("page_size", "dim"), [(16, 64), (32, 16), (16, 33), (3, 8)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_pages_hold_the_bytes_of_the_definition(
    variant: str, page_size: int, dim: int, format: str
) -> None:
    """Numbers and scales as the encoder gives them, whatever order they lie in."""
    made = page_format(format)
    pool = NativeBackend(variant, threads=1).pool(PageShape(page_size, 2, dim, dim, made, made), 2)
    rng = np.random.default_rng(dim)
    numbers = rng.standard_normal((2 * page_size, 2, dim)).astype(np.float32)
    numbers[1] *= 1e-6
    numbers[2, 0] = 0
    NativeBackend(variant, threads=1).append(pool, np.arange(2 * page_size), numbers, -numbers)
    n, m = pool.handle.key_beside, pool.handle.value_beside
    key = pool.key.reshape(2, 2, dim // n, page_size, n).transpose(0, 3, 1, 2, 4)
    value = pool.value.reshape(2, 2, page_size // m, dim, m).transpose(0, 2, 4, 1, 3)
    for held, scale, given in (
        (key, pool.key_scale, numbers),
        (value, pool.value_scale, -numbers),
    ):
        payload, wanted = made.key.encode(given)
        assert scale is not None
        scales = scale.reshape(2, 2, page_size).transpose(0, 2, 1)
        assert scales.reshape(wanted.shape).tobytes() == wanted.tobytes()
        stored = held.reshape(payload.shape)
        if format == "int8":
            stored = stored ^ np.uint8(128)
        assert stored.tobytes() == payload.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": 7}, "dtype code 7 is not 0 to 6"),
        ({"dim": 0}, "a head dimension of 0"),
        ({"dim": 513}, "a head dimension of 513 is not in 1..512"),
        ({"scale": None}, "int8 and fp8 numbers have scales"),
        ({"code": 1}, "int8 and fp8 numbers have scales, others do not"),
        ({"scale": np.zeros(31, np.uint16)}, "do not have its shape"),
        ({"data": np.zeros(511, np.uint8)}, "do not have its shape"),
        ({"shape": [1, 16]}, "three numbers"),
        ({"shape": [0, 16, 2]}, "positive"),
        ({"shape": [2, 16, 2]}, "do not have its shape"),
    ],
)
def test_a_pool_that_does_not_fit_its_arrays_is_refused(
    change: dict[str, Any], message: str
) -> None:
    def store(data: Any, scale: Any, code: int, dim: int) -> "extension.Store":
        return extension.Store(data, scale, code, dim)

    good = {"data": np.zeros(512, np.uint8), "scale": np.zeros(32, np.uint16), "code": 3, "dim": 16}
    kept = store(**good)
    shape = change.pop("shape", [1, 16, 2])
    extension.Pool(kept, kept, [1, 16, 2])
    with pytest.raises(ValueError, match=message):
        extension.Pool(kept, store(**{**good, **change}), shape)


@pytest.mark.parametrize("slot", [-1, 64, 2**40])
def test_append_refuses_slots_outside_the_pool(kernels: "extension.Native", slot: int) -> None:
    new = np.zeros((1, 2, 32), np.float32)
    with pytest.raises(ValueError, match=f"slot {slot} is outside the pool"):
        kernels.append(new_pool().handle, np.array([slot]), new, new)


def tables(**changes: object) -> "extension.Tables":
    arrays = {
        "places": [20],
        "positions": [20],
        "query_indptr": [0, 1],
        "indptr": [0, 2],
        "indices": [3, 1],
        "last_page_len": [5],
        "first_page": [0],
    }
    arrays.update({k: v for k, v in changes.items() if k in arrays})  # type: ignore[misc]
    made = {name: np.array(values, dtype=np.int64) for name, values in arrays.items()}
    return extension.Tables(
        **made,
        page_size=changes.get("page_size", 16),
        window=changes.get("window", 0),
        open=open_tables(**changes.get("open", {})),  # type: ignore[arg-type]
    )


def open_tables(**arrays: list[int]) -> "extension.OpenTables":
    """Of no open pages, but for ``arrays``."""
    names = ("indptr", "indices", "first", "seal_from", "seal_to")
    return extension.OpenTables(*[np.array(arrays.get(name, []), np.int64) for name in names])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [3, -1]}, "page id -1 is negative"),
        ({"places": [21]}, "place 21 sees tokens outside 0..21"),
        ({"first_page": [1]}, "sees tokens outside 16..37"),
        ({"first_page": [-1]}, "first_page is negative"),
        ({"last_page_len": [17]}, "last_page_len 17 is not in 1..16"),
        ({"last_page_len": [0]}, "last_page_len 0 is not in 1..16"),
        ({"indptr": [0, 3]}, "indptr must run from 0"),
        ({"indptr": [0, 0], "indices": []}, "sequence 0: last_page_len"),
        ({"query_indptr": [0, 2]}, "indptr must run from 0"),
        ({"query_indptr": [0]}, "disagree in length"),
        ({"page_size": 0}, "page_size must be positive"),
        ({"window": -1}, "window not negative"),
        ({"places": [20, 20], "positions": [20, 20], "query_indptr": [0, 2]}, "must ascend"),
        ({"positions": [20, 21]}, "indptr must run from 0"),
    ],
)
def test_tables_that_would_read_elsewhere_are_refused(
    changes: dict[str, object], message: str
) -> None:
    assert tables() is not None
    with pytest.raises(ValueError, match=message):
        tables(**changes)


def test_attend_refuses_pages_outside_the_pool_and_wrong_shapes(
    kernels: "extension.Native",
) -> None:
    query, out = np.zeros((1, 4, 32), np.float32), np.zeros((1, 128), np.float32)
    kernels.attend(query, new_pool().handle, tables(), out)
    with pytest.raises(ValueError, match="page id 3 is outside the pool of 3 pages"):
        kernels.attend(query, new_pool(3).handle, tables(), out)
    for bad in (np.zeros((2, 4, 32)), np.zeros((1, 3, 32)), np.zeros((1, 4, 16))):
        with pytest.raises(ValueError, match="attend"):
            kernels.attend(bad.astype(np.float32), new_pool().handle, tables(), out)
    with pytest.raises(ValueError, match="out has the wrong size"):
        kernels.attend(query, new_pool().handle, tables(), out[:, :64].copy())


def test_half_a_layer_refuses_what_does_not_fit(kernels: "extension.Native") -> None:
    def layer(out: int, inner: int) -> "extension.Layer":
        return extension.Layer(weight_of(out, inner), None)

    def floats(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    with pytest.raises(ValueError, match="a bias of 3 numbers does not fit 4 outputs"):
        extension.Layer(weight_of(4, 8), floats(3))
    with pytest.raises(ValueError, match="do not fit a hidden size of 8"):
        extension.MlpWeights(floats(8), 1e-5, layer(4, 8), layer(5, 8), layer(8, 4), 0)
    mlp = extension.MlpWeights(floats(8), 1e-5, layer(4, 8), layer(4, 8), layer(8, 4), 0)
    with pytest.raises(ValueError, match="rows of 8"):
        kernels.mlp_block(floats(2, 7), mlp, floats(2, 7))
    with pytest.raises(ValueError, match="do not fit a hidden size of 8"):
        extension.AttentionWeights(
            floats(8), 1e-5, layer(128, 8), layer(64, 7), layer(64, 8), layer(8, 128), None, None
        )
    weights = extension.AttentionWeights(
        floats(8), 1e-5, layer(128, 8), layer(64, 8), layer(64, 8), layer(8, 128), None, None
    )
    angles = floats(21, 16)
    slots = np.array([20], np.int64)
    good = [floats(1, 8), weights, angles, angles, new_pool().handle, slots, tables(), floats(1, 8)]
    kernels.attention_block(*good)
    for at, wrong, message in [
        (0, floats(1, 9), "x and y must have rows of 8"),
        (2, floats(20, 16), "position 20 is outside the tables of 20|cos and sin"),
        (2, floats(21, 8), "cos and sin"),
        (4, new_pool(3).handle, "page id 3 is outside the pool of 3 pages"),
        (5, np.array([64], np.int64), "slot 64 is outside the pool"),
        (5, np.array([1, 2], np.int64), "one slot a row"),
        (6, tables(places=[19, 20], positions=[19, 20], query_indptr=[0, 2]), "one slot a token"),
    ]:
        bad = list(good)
        bad[at] = wrong
        if at == 2:
            bad[3] = wrong
        with pytest.raises(ValueError, match=message):
            kernels.attention_block(*bad)

    layers = extension.Layers()
    layers.add(weights, mlp, good[4], 0)
    kernels.layers(good[0], layers, angles, angles, [slots], [tables()], good[7])
    other = extension.MlpWeights(floats(9), 1e-5, layer(4, 9), layer(4, 9), layer(9, 4), 0)
    with pytest.raises(ValueError, match="hidden sizes differ"):
        layers.add(weights, other, good[4], 0)
    with pytest.raises(ValueError, match="no layer group 0"):
        kernels.layers(good[0], layers, angles, angles, [], [], good[7])
    with pytest.raises(ValueError, match="one slot a row"):
        kernels.layers(good[0], layers, angles, angles, [np.array([1, 2])], [tables()], good[7])
    with pytest.raises(ValueError, match="slot 64 is outside"):
        kernels.layers(good[0], layers, angles, angles, [np.array([64])], [tables()], good[7])


def test_embed_refuses_ids_outside_the_table(kernels: "extension.Native") -> None:
    with pytest.raises(ValueError, match="id 5 is outside the table"):
        kernels.embed(weight_of(5, 4), np.array([5]), np.zeros((1, 4), np.float32))


def test_the_engine_takes_threads_and_the_reference_backend_refuses_them() -> None:
    assert quire.Engine(threads=1).backend.threads == 1
    with pytest.raises(BackendError, match="reference backend takes its threads from BLAS"):
        quire.Engine(backend="reference", threads=1)
