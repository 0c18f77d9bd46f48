"""A decoder layer of the cuda backend: the bits of its ops one by one, in few launches."""

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quire
from conformance import activations
from conformance.test_packed_pages import Book, Case
from quire.analysis.native_workspace import BOOKS
from quire.backends import AttentionParams, Backend, MlpParams, Network, Projection, create_backend
from quire.backends.blocks import attention_block, attention_rows, mlp_block
from quire.backends.rope import inverse_frequencies
from quire.batch import PagedBatch
from quire.config import RopeConfig
from test_cuda import RUNS, STATUS
from tiny import random_prompt, tiny_engine, write_llama

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")

if RUNS:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from quire.backends.cuda import refusals
    from quire.backends.cuda.attending import Attention, Chosen
    from quire.backends.cuda.layer import FusedAttention, FusedMlp, Residual, plain
    from quire.backends.cuda.products import Products
    from quire.backends.cuda.steps import Taken, to_device
    from quire.backends.cuda.tiles import Tiles

HIDDEN, INNER = 72, 100
DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


@functools.cache
def frequencies(dim: int) -> Any:
    """The same array for all layers, as a model has it."""
    return inverse_frequencies(RopeConfig(), dim)


class Weights:
    """Random ones of a layer, as a backend takes them."""

    def __init__(self, backend: Backend, dtype: str = "bf16") -> None:
        self.backend, self.dtype = backend, DTYPES[dtype]
        self.rng = np.random.default_rng(0)

    def vector(self, n: int) -> Any:
        """Around 1."""
        return self.backend.weight(1 + 0.2 * self.rng.standard_normal(n, np.float32))

    def projection(self, out: int, width: int, bias: bool) -> Projection:
        """Results are about as large as what goes in."""
        weight = self.rng.standard_normal((out, width), np.float32) / np.float32(np.sqrt(width))
        taken = self.backend.weight(weight.astype(self.dtype))
        return Projection(taken, self.vector(out) if bias else None)

    def attention(self, heads: tuple[int, int, int], kind: str) -> AttentionParams:
        """Of a Llama, a Qwen2 (biases) or a Qwen3 (norms of heads)."""
        query, kv, dim = heads
        sizes = query * dim, kv * dim, kv * dim
        q, k, v = (self.projection(size, HIDDEN, kind == "qwen2") for size in sizes)
        norms = [self.vector(dim) if kind == "qwen3" else None for _ in "qk"]
        return AttentionParams(
            norm=self.vector(HIDDEN),
            norm_eps=1e-5,
            q=q,
            k=k,
            v=v,
            o=self.projection(HIDDEN, query * dim, False),
            q_norm=norms[0],
            k_norm=norms[1],
            num_heads=query,
            num_kv_heads=kv,
            inv_freq=frequencies(dim),
        )

    def mlp(self, activation: str = "silu", bias: bool = False) -> MlpParams:
        """Gated."""
        up = [self.projection(INNER, HIDDEN, bias) for _ in range(2)]
        down = self.projection(HIDDEN, INNER, bias)
        return MlpParams(self.vector(HIDDEN), 1e-6, *up, down, activation)

    def x(self, tokens: int) -> Any:
        """[T, hidden]."""
        return activations(self.backend, self.rng.standard_normal((tokens, HIDDEN), np.float32))


def equal(a: Any, b: Any) -> bool:
    """The same bits, be a and b tensors or what the next op adds up."""
    return bool(torch.equal(plain(a), plain(b)))


# -- the same bits -------------------------------------------------------------------------------

KINDS = ("llama", "qwen2", "qwen3")
SHAPES = [
    pytest.param(kind, dim, "bf16", "bf16", marks=() if dim == 64 else pytest.mark.slow)
    for kind in KINDS
    for dim in (64, 80, 128)
]
FORMATS = [  # kind, head_dim, page format, weights
    ("llama", 64, "fp32", "fp32"),
    ("qwen2", 80, "fp16", "fp16"),
    ("qwen3", 128, "fp8", "bf16"),
    ("llama", 80, "int8", "bf16"),
    ("qwen2", 64, "k=int8,v=fp8", "fp32"),
    pytest.param("qwen3", 64, "int4", "bf16", marks=pytest.mark.slow),
    pytest.param("llama", 128, "k=int2,v=int4", "bf16", marks=pytest.mark.slow),
    ("qwen3", 80, "int4:rotated", "bf16"),
    ("llama", 64, "k=int8:rotated,v=bf16", "bf16"),
]


@pytest.mark.parametrize(("kind", "dim", "format", "dtype"), [*SHAPES, *FORMATS])
def test_a_fused_layer_gives_the_bits_of_its_ops(
    kind: str, dim: int, format: str, dtype: str
) -> None:
    """Prefills and decodes in one batch; what the next layer gets, and what lies in pages."""
    backend = create_backend("cuda-exact")
    packed = "int4" in format or "int2" in format
    case = Case(40, heads=(3, 1, dim), format=format, page_size=32 if packed else 4)
    made, books = Weights(backend, dtype), [Book(backend, case, 3) for _ in range(3)]
    attention, mlp = made.attention(case.heads, kind), made.mlp()
    blocks = backend.block(attention), backend.block(mlp)
    assert isinstance(blocks[0], FusedAttention)
    assert isinstance(blocks[1], FusedMlp)
    for counts in ([31 if packed else 7, 2, 0], [1, 3, 1]):
        x, batches = made.x(sum(counts)), [book.batch(counts) for book in books]
        apart = attention_block(backend, x, attention, batches[0], books[0].pool, group=0)
        apart = mlp_block(backend, apart, mlp)
        fused = backend.layers(x, [blocks], batches[1], [books[1].pool])
        assert equal(fused, apart)
        rows = [0, sum(counts) - 1]
        some = backend.attention_rows(x, blocks[0], batches[2], books[2].pool, group=0, rows=rows)
        assert equal(backend.mlp_block(some, blocks[1]), plain(apart)[rows])
        pages = [_bytes(book) for book in books]
        assert pages[0] == pages[1] == pages[2]


def _bytes(book: Book) -> bytes:
    pool = book.pool
    halves = np.arange(pool.num_pages), pool.num_pages + np.arange(pool.open_pages)
    return b"".join(pool.export_pages(pages).tobytes() for pages in halves)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_fused_mlp_gives_the_bits_of_its_ops(activation: str, dtype: str) -> None:
    backend = create_backend("cuda-exact")
    made = Weights(backend, dtype)
    mlp, x = made.mlp(activation, bias=True), made.x(5)
    assert equal(backend.mlp_block(x, backend.block(mlp)), mlp_block(backend, x, mlp))


def test_an_mlp_of_many_rows_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them at a time: what gate and up give is the most that a step holds."""
    monkeypatch.setattr("quire.backends.cuda.layer._ROWS", 4)
    backend = create_backend("cuda-exact")
    made = Weights(backend)
    mlp, x = made.mlp(), made.x(13)
    assert equal(backend.mlp_block(x, backend.block(mlp)), mlp_block(backend, x, mlp))


def test_the_norm_of_a_wide_row_adds_what_is_to_be_added() -> None:
    """Rows of more numbers than a program sums at a time."""
    backend = create_backend("cuda-exact")
    rng = np.random.default_rng(0)
    x, delta = (activations(backend, rng.standard_normal((2, 5000), np.float32)) for _ in range(2))
    weight = backend.weight(rng.standard_normal(5000, np.float32))
    total, held = x + delta, Residual(x, delta)
    before, memory = x.clone(), delta.data_ptr()
    normed = backend._layers.norm(held, weight, 1e-5, torch.bfloat16)
    assert equal(held.sum(), total)
    assert held.x.data_ptr() == memory, "the sum takes no memory of its own"
    assert equal(x, before), "what is added to stays as it was"
    assert equal(normed, backend.rms_norm(total, weight, 1e-5).to(torch.bfloat16))
    wide = total.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert (normed.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_in_the_fast_backend_only_products_of_another_shape_may_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With products that sum in one order, everything else gives the bits of the ops."""
    backend = create_backend("cuda")
    monkeypatch.setattr(backend._products, "_exact", True)
    case = Case(40, heads=(4, 2, 16), format="k=int8,v=bf16")
    made, books = Weights(backend), [Book(backend, case, 2) for _ in range(2)]
    attention, mlp = made.attention(case.heads, "qwen2"), made.mlp()
    blocks = backend.block(attention), backend.block(mlp)
    for counts in ([7, 3], [1, 1]):
        x, batches = made.x(sum(counts)), [book.batch(counts) for book in books]
        apart = attention_block(backend, x, attention, batches[0], books[0].pool, group=0)
        apart = mlp_block(backend, apart, mlp)
        assert equal(backend.layers(x, [blocks], batches[1], [books[1].pool]), apart)


# -- memory --------------------------------------------------------------------------------------


def test_parameters_become_rows_of_what_is_multiplied() -> None:
    backend = create_backend("cuda")
    made = Weights(backend)
    params, mlp = made.attention((4, 2, 16), "qwen2"), made.mlp(bias=True)
    values = [p.weight.clone() for p in (params.q, params.k, params.v, mlp.gate, mlp.up)]
    blocks = backend.block(params), backend.block(mlp)
    for whole, parts in (
        (blocks[0].whole, [p.weight for p in (params.q, params.k, params.v)]),
        (blocks[0].bias, [p.bias for p in (params.q, params.k, params.v)]),
        (blocks[1].whole, [mlp.gate.weight, mlp.up.weight]),
        (blocks[1].bias, [mlp.gate.bias, mlp.up.bias]),
    ):
        assert len({part.untyped_storage().data_ptr() for part in [whole, *parts]}) == 1
        assert whole.untyped_storage().nbytes() == whole.numel() * whole.element_size()
        assert all(part._base is None for part in parts), "a view holds what it was cut from"
        assert equal(torch.cat(list(parts)), whole)
    again = [p.weight for p in (params.q, params.k, params.v, mlp.gate, mlp.up)]
    assert all(map(equal, values, again))


@pytest.mark.parametrize("what", ["dtypes", "biases"])
def test_parameters_that_cannot_be_one_stay_apart(what: str) -> None:
    backend = create_backend("cuda-exact")
    made, narrow = Weights(backend), Weights(backend, "fp16")
    case = Case(40, heads=(4, 2, 16), format="bf16")
    params = made.attention(case.heads, "llama")
    other = narrow.projection(32, HIDDEN, False) if what == "dtypes" else None
    bias = Projection(params.v.weight, made.vector(32))
    params = replace(params, v=bias if other is None else other)
    block = backend.block(params)
    assert block is params
    books, x = [Book(backend, case, 2) for _ in range(2)], made.x(5)
    fused = backend.layers(x, [(block, backend.block(made.mlp()))], *_step(books[0], [4, 1]))
    assert plain(fused).shape == x.shape
    rows = attention_rows(backend, x, params, *_one(books[1], [4, 1]), group=0, rows=[4])
    assert rows.shape == (1, HIDDEN)


def _step(book: Book, counts: list[int]) -> tuple[PagedBatch, list[Any]]:
    batch, pool = _one(book, counts)
    return batch, [pool]


def _one(book: Book, counts: list[int]) -> tuple[PagedBatch, Any]:
    return book.batch(counts), book.pool


class Held(TorchDispatchMode if RUNS else object):
    """The most bytes that tensors made meanwhile take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.is_watching = True
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if not self.is_watching:
            return out
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._add(tensor, before)
        return out

    def _add(self, tensor: Any, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in before and not self._users[place]:
            return  # a view of what was there
        self.now += 0 if self._users[place] else size
        self.most = max(self.most, self.now)
        self._users[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        self.now -= 0 if self._users[place] else size


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_step_takes_no_more_than_is_planned(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill of as many tokens as a step may have; tables that any model needs left out."""
    monkeypatch.setattr(
        "quire.engine.engine.create_backend", lambda *asked: create_backend("cuda-exact")
    )
    monkeypatch.setattr("quire.backends.cuda.layer._ROWS", 16)
    sizes = {"hidden_size": 48, "intermediate_size": 400, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
    model = write_llama(tmp_path / "model", dtype=dtype, **sizes, **heads)
    engine = tiny_engine(model, max_batch_tokens=90, max_sequences=1)
    engine.submit(random_prompt(90), quire.SamplingParams(max_new_tokens=2))
    planned = engine.plan.memory.workspace
    device, inner, held = engine.backend.device, engine.backend.device.launch, Held()

    def launch(*args: Any, **named: Any) -> None:
        held.is_watching = False  # an interpreter copies arguments
        inner(*args, **named)
        held.is_watching = True

    monkeypatch.setattr(device, "launch", launch)
    with held:
        engine.step()
    assert 90 * 400 * 4 < held.most <= planned.activations - BOOKS + planned.logits


# -- launches ------------------------------------------------------------------------------------

FREE = ("empty", "view", "reshape", "slice", "select", "split", "expand", "unsqueeze", "detach")
FREE += ("alias", "transpose", "t.default", "as_strided", "_unsafe_view", "unbind", "narrow")


@contextmanager
def counted(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is launched: Triton's kernels by name, products, and torch's ops that are no views."""
    found: Counter[str] = Counter()
    busy = [0]
    inner, product = backend.device.launch, Products.__call__

    def launch(kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        if 0 not in grid:
            found[getattr(kernel, "__name__", None) or kernel.fn.__name__] += 1
        busy[0] += 1
        inner(kernel, grid, *args, **named)
        busy[0] -= 1

    def multiply(self: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        found["cast"] += x.dtype != weight.dtype
        found["product"] += 1
        found["bias"] += bias is not None
        busy[0] += 1
        out = product(self, x, weight, bias)
        busy[0] -= 1
        return out

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(func).removeprefix("aten.")
            if not busy[0] and not name.startswith(FREE):
                found[name] += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(backend.device, "launch", launch)
    monkeypatch.setattr(Products, "__call__", multiply)
    with Ops():
        yield found
    monkeypatch.undo()


def launches(
    kind: str, format: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[Counter[str]]:
    """Of steps of one layer and of three, from token ids to what the head meets."""
    backend, results = create_backend("cuda"), []
    case = Case(64, heads=(4, 2, 16), format=format)
    made = Weights(backend)
    for layers in (1, 3):
        blocks = [
            (backend.block(made.attention(case.heads, kind)), backend.block(made.mlp()))
            for _ in range(layers)
        ]
        table = made.projection(20, HIDDEN, False).weight
        network = Network(table, blocks, made.vector(HIDDEN), 1e-5, table)
        books = [Book(backend, case, len(counts)) for _ in range(layers)]
        # The same tables for all, over pools of their own; sealed pages would add launches.
        batch = replace(books[0].batch(counts), group_of_layer=(0,) * layers)
        step = Taken(to_device(batch, backend.device))
        tokens = backend.device.integers([0] * batch.num_tokens)
        compute = partial(backend._hidden, network)
        pools = [book.pool for book in books]
        backend._layers._scale(16)
        backend.computed(compute, tokens, step, pools)
        with counted(backend, monkeypatch) as found:
            backend.computed(compute, tokens, step, pools)
        results.append(found)
    return results


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("llama", "bf16"),
        ("qwen2", "int8"),
        ("qwen3", "k=fp8,v=bf16"),
        ("qwen3", "int4:rotated"),
    ],
)
def test_a_layer_of_a_step_that_decodes_is_ten_launches(
    kind: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = launches(kind, format, [1, 1], monkeypatch)
    assert three - one == Counter(
        product=8, norm_kernel=4, place_kernel=2, decode_kernel=2, merge_kernel=2, gated_kernel=2
    )
    # Embedding, angles (a product, its cosines and sines) and the last norm.
    assert one.total() - 10 == 2 + 3 + 1, one


LAYER = {"product": 4, "norm_kernel": 2, "place_kernel": 1, "prefill_kernel": 1, "gated_kernel": 1}


@pytest.mark.parametrize(
    ("others", "expected"), [(0, LAYER), (2, LAYER | {"decode_kernel": 1, "merge_kernel": 1})]
)
def test_a_layer_of_an_engines_prefill_is_nine_launches(
    others: int, expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And eleven where other sequences decode in the same step."""
    waits = quire.SamplingParams(max_new_tokens=20, ignore_eos=True, logprobs=1)  # for each step
    found = []
    for layers in (2, 4):
        monkeypatch.setattr("quire.engine.engine.create_backend", lambda *_: create_backend("cuda"))
        model = write_llama(tmp_path / str(layers), dtype="bf16", num_hidden_layers=layers)
        engine = tiny_engine(model)
        for length in range(others):
            engine.submit(random_prompt(3 + length), waits)
        for _ in range(others):
            engine.step()
        engine.submit(random_prompt(9), quire.SamplingParams(max_new_tokens=1))
        with counted(engine.backend, monkeypatch) as launched:
            engine.step()
        found.append(launched)
    assert found[1] - found[0] == Counter({name: 2 * count for name, count in expected.items()})


def test_layers_of_a_step_share_what_depends_on_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether ids are the pool's, tiles and splits: found once a group of layers, not by each."""
    monkeypatch.setattr("quire.engine.engine.create_backend", lambda *_: create_backend("cuda"))
    engine = tiny_engine(write_llama(tmp_path / "model", num_hidden_layers=4))
    engine.submit(random_prompt(3), quire.SamplingParams(max_new_tokens=9, logprobs=1))
    engine.step()
    found: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def counting(*args: Any, **named: Any) -> Any:
            found[name] += 1
            return inner(*args, **named)

        monkeypatch.setattr(owner, name, counting)

    for name in ("require_slots", "require_readable"):
        watch(refusals, name)
    for name in ("_plan_prefill", "_plan_decode"):
        watch(Attention, name)
    engine.submit(random_prompt(9), quire.SamplingParams(max_new_tokens=1))
    engine.step()
    # All rows but the last layer's are of the whole step; that one attends for those it is asked.
    assert found == {
        "require_slots": 1, "require_readable": 1, "_plan_prefill": 1, "_plan_decode": 2
    }  # fmt: skip


def test_other_tiles_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step keeps how attention is launched, but not for tiles that are to be compared."""
    backend = create_backend("cuda")
    book = Book(backend, Case(64, heads=(4, 2, 16), format="bf16"), 1)
    batch, query = book.batch([40]), activations(backend, np.zeros((40, 4, 16), np.float32))
    step, blocks, inner = to_device(batch, backend.device), [], backend.device.launch

    def launch(*args: Any, **named: Any) -> None:
        blocks.append((named["BLOCK_M"], named["BLOCK_N"]))
        inner(*args, **named)

    monkeypatch.setattr(backend.device, "launch", launch)
    for keys in (16, 32):
        backend._attention.chosen_tiles = Chosen(Tiles(32, keys, 4, 1))
        backend._attention(query, book.pool, step, 0)
    assert blocks == [(32, 16), (32, 32)]
