"""The cuda backend beyond the conformance suite, on a GPU or under Triton's interpreter.

Without a GPU these tests run in a process of their own (the last one starts it), because Triton
decides when kernels are defined whether it interprets them.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from conformance import Subject, activations
from conformance.test_attention import Case, check, hard_vectors, lay_out, new_pool
from conformance.test_packed_pages import Book
from conformance.test_packed_pages import Case as Packed
from quire.backends import Backend, backend_status, create_backend, keep
from quire.backends.reference import ReferenceBackend
from quire.batch import ChosenPages
from quire.errors import BackendError
from quire.format_choice import parse_formats
from quire.pages import PageShape
from recording import Recorder, same_bits
from tiny import VOCAB, random_prompt, tiny_engine, write_llama

INSTALLED = importlib.util.find_spec("triton") is not None
STATUS = {status.name: status for status in backend_status()}
RUNS = STATUS["cuda"].available
if RUNS:
    import torch

    from quire.backends.cuda.attending import Attention
    from quire.backends.cuda.device import Device, find_device
    from quire.backends.cuda.graphs import StepGraph, StepShape, shape_of
    from quire.backends.cuda.tiles import HOPPER

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_CARD = RUNS and find_device().hardware  # a GPU, or a whole one in software

runs = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")


@pytest.fixture(params=["cuda", "cuda-exact"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return create_backend(request.param)


@pytest.fixture
def on_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in the test compute with the backend that its parameter names."""
    name = getattr(request, "param", "cuda-exact")
    monkeypatch.setattr(
        "quire.engine.engine.create_backend", lambda asked, threads=None: create_backend(name)
    )


# -- engines -------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("on_cuda", ["cuda", "cuda-exact"], indirect=True)
def test_greedy_tokens_are_those_of_the_reference_backend(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32: where numbers are narrower, random weights leave ties that rounding decides."""
    model = write_llama(tmp_path / "model", head_dim=16)
    params = quire.SamplingParams(max_new_tokens=6)
    prompts = [random_prompt(length, seed=length) for length in (1, 9, 21)]
    ours = tiny_engine(model, max_batch_tokens=16).generate(prompts, params)
    monkeypatch.setattr("quire.engine.engine.create_backend", lambda *asked: ReferenceBackend())
    law = tiny_engine(model).generate(prompts, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in law]


@runs
@pytest.mark.parametrize(
    ("kind", "kv_format"),  # the windows of layers and the formats of pages do not know each other
    [
        ("full", "auto"),
        ("mixed", "k=int8,v=fp8"),
        pytest.param("full", "k=int8,v=fp8", marks=pytest.mark.more),
        pytest.param("mixed", "auto", marks=pytest.mark.more),
    ],
)
def test_exact_logits_are_the_same_bits_alone_in_company_in_chunks_and_after_a_hit(
    models: dict[str, Path], kind: str, kv_format: str, on_cuda: None
) -> None:
    tokens, model = random_prompt(25, seed=3), models[kind]
    law = tiny_engine(model, page_size="whole", num_pages=1, kv_format=kv_format).logits(tokens)
    chunked = tiny_engine(model, page_size=3, max_batch_tokens=7, kv_format=kv_format)
    assert same_bits(chunked.logits(tokens), law)
    # What is decoded beside others, over a prefix that an earlier request left, is what it was.
    params = quire.SamplingParams(max_new_tokens=5, temperature=1.0, seed=11)
    (alone,) = tiny_engine(model, kv_format=kv_format).generate([tokens], params)
    crowd = tiny_engine(model, max_batch_tokens=9, num_pages=96, kv_format=kv_format)
    crowd.generate([tokens[:17]], params)
    company = [random_prompt(length, seed=length) for length in (1, 12)]
    again = crowd.generate([company[0], tokens, company[1]], params)[1]
    assert again.cached_tokens > 0
    assert again.token_ids == alone.token_ids
    assert again.logprobs == alone.logprobs


@runs
@pytest.mark.parametrize("window", [None, 100])
def test_exact_attention_over_several_splits_is_the_same_bits_in_prefill_and_decode(
    window: int | None,
) -> None:
    backend, case = create_backend("cuda-exact"), Case(((240, 40),), (2, 1, 16), 64, window)
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    query, key, value = case.numbers(0)
    first = laid.first[0]
    slots = np.concatenate([laid.stored_slots[0], laid.batch.groups[0].slots])
    backend.append(
        pool, slots, activations(backend, key[first:]), activations(backend, value[first:])
    )
    whole = backend.to_host(backend.attend(activations(backend, query), pool, laid.batch, 0))
    for row in (0, 15, 16, 39):  # places 240 to 279; splits meet at 256
        one = replace(laid.batch.select(np.array([row])), query_indptr=np.array([0, 1], np.int64))
        taken = activations(backend, query[row : row + 1])
        assert same_bits(backend.to_host(backend.attend(taken, pool, one, 0))[0], whole[row])


@runs
@pytest.mark.parametrize("share", [9, 16, 17])
@pytest.mark.parametrize("format", ["bf16", "int8", "fp16"])
def test_decode_of_many_heads_that_share_keys(share: int, format: str) -> None:
    """Up to 16 of them are columns of products, more are rows."""
    subject = Subject("cuda", lambda: create_backend("cuda"), exact=False, narrow=True, half=True)
    check(subject, Case(((40, 1), (7, 1), (31, 1)), (share, 1, 32), format=format))


@runs
@pytest.mark.parametrize(("sequences", "splits"), [(((480, 16),), 3), (((0, 64),) * 9, 1)])
def test_a_prefill_of_few_tiles_is_split_unless_bits_must_not_depend_on_it(
    sequences: Any, splits: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = grids_of(sequences, backend, monkeypatch)
    assert grids[0][2] == (1 if backend.name == "cuda-exact" else splits)


def grids_of(
    sequences: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """Of what attention to such sequences launches."""
    grids, inner = [], Device.launch

    def recorded(self: Device, kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        grids.append(grid)
        inner(self, kernel, grid, *args, **named)

    case = Case(sequences, (4, 2, 16))
    laid, numbers = lay_out(case), [case.numbers(s)[0] for s in range(len(sequences))]
    pool = new_pool(backend, case, laid.num_pages)
    with monkeypatch.context() as patch:
        patch.setattr(Device, "launch", recorded)
        backend.attend(activations(backend, np.concatenate(numbers)), pool, laid.batch, 0)
    return grids


@runs
def test_who_decodes_beside_a_prefill_takes_none_of_its_tiles(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each split of a tile has its numbers: of 64 decoding beside a chunk they were 65 times."""
    alone = grids_of(((480, 16),), backend, monkeypatch)
    beside = grids_of(((9, 1),) * 32 + ((480, 16),) + ((9, 1),) * 32, backend, monkeypatch)
    prefill = 1 if len(alone) == 1 else 2  # the kernel, and what merges its splits
    assert beside[:prefill] == alone
    assert alone[0][0] <= 2


@runs
@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("sequences", "window", "rows"),
    [(((0, 150), (100, 70), (5, 1)), None, 128), (((30, 150),), 40, 128), (((0, 20),), None, 64)],
)
def test_a_prefill_of_many_rows_has_large_tiles_on_a_card_that_holds_them(
    sequences: Any, window: int | None, rows: int, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, inner = set[int](), Device.launch

    def recorded(self: Device, kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        if "SPLIT" in named:
            tiles.add(named["BLOCK_M"])
        inner(self, kernel, grid, *args, **named)

    monkeypatch.setattr(Device, "launch", recorded)
    monkeypatch.setattr(Device, "shared_memory", HOPPER)
    monkeypatch.setattr(Device, "processors", 4)
    subject = Subject("cuda", lambda: create_backend("cuda"), exact=False, narrow=True, half=True)
    check(subject, Case(sequences, (4, 2, 16), 16, window, format))
    assert tiles == {rows}


@runs
def test_a_step_hands_its_batch_over_in_one_transfer(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(write_llama(tmp_path / "model", num_hidden_layers=3))
    device, copied = engine.backend.device, []
    to_device = device.to_device

    def recorded(array: np.ndarray) -> Any:
        copied.append(array.dtype.kind)
        return to_device(array)

    engine.submit(random_prompt(9), quire.SamplingParams(max_new_tokens=8))
    engine.step()
    renew, renewed = device.renew, []

    def counted(there: Any, here: Any, count: int) -> None:
        renewed.append(count)
        renew(there, here, count)

    monkeypatch.setattr(device, "to_device", recorded)
    monkeypatch.setattr(device, "renew", counted)
    for _ in range(3):
        copied.clear()
        engine.step()
        assert copied == [], copied
        assert len(renewed) == 1, "token ids and the batch"
        renewed.clear()


@runs
@pytest.mark.parametrize(
    "kv_format", ["int4", pytest.param("k=int8,v=int2", marks=pytest.mark.slow)]
)
def test_exact_logits_over_packed_pages_are_the_same_bits_in_chunks_and_after_a_hit(
    models: dict[str, Path], kv_format: str, on_cuda: None
) -> None:
    tokens, settings = random_prompt(75, seed=3), {"kv_format": kv_format, "page_size": 32}
    law = tiny_engine(models["full"], max_batch_tokens=80, **settings).logits(tokens)
    chunked = tiny_engine(models["full"], max_batch_tokens=33, **settings)
    assert same_bits(chunked.logits(tokens), law)
    assert same_bits(chunked.logits(tokens), law)  # over the pages that are there


# -- steps that only decode ----------------------------------------------------------------------


def decoded(model: Path, steps: int, **settings: Any) -> list[tuple[int, np.ndarray]]:
    """(position, logits) of three sequences, the first of which completes a page of 32."""
    engine = tiny_engine(model, num_pages=24, max_batch_tokens=64, **settings)
    recorder = Recorder(engine, all_rows=False)
    params = quire.SamplingParams(max_new_tokens=steps, ignore_eos=True)
    engine.generate([random_prompt(length, seed=length) for length in (30, 9, 1)], params)
    return [(position, logits) for _, position, logits in recorder.rows]


@runs
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("full", {}, marks=pytest.mark.slow),
        ("mixed", {"kv_format": "k=int8,v=fp8", "page_size": 3}),
        ("full", {"kv_format": "int4", "page_size": 32}),
        pytest.param(
            "full", {"kv_format": "int4+int8@first", "page_size": 32}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "windows", "packed", "packed and not"],
)
def test_a_step_padded_to_its_bucket_gives_the_bits_of_one_that_is_not(
    models: dict[str, Path],
    kind: str,
    settings: dict[str, Any],
    on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_bits_of_padding(models[kind], settings, monkeypatch)


@runs
def test_a_padded_step_of_a_model_that_goes_op_by_op(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2: what is captured is told by its ops alone."""
    config = tiny_config("gpt2", vocab_size=VOCAB)
    require_bits_of_padding(write_checkpoint(tmp_path / "gpt2", config), {}, monkeypatch)


def require_bits_of_padding(
    model: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of three sequences run in a bucket of four."""
    seen, inner = [], StepGraph.run

    def counted(self: StepGraph, tokens: Any, batch: Any) -> Any:
        seen.append((len(tokens), self.shape))
        return inner(self, tokens, batch)

    monkeypatch.setattr(StepGraph, "run", counted)
    padded = decoded(model, 5, **settings)
    assert (3, StepShape(4, 1, 64)) in seen
    monkeypatch.setattr("quire.backends.cuda.backend.shape_of", lambda batch: None)
    plain = decoded(model, 5, **settings)
    assert [position for position, _ in padded] == [position for position, _ in plain]
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(padded, plain, strict=True))


@runs
@pytest.mark.skipif(ON_A_CARD, reason="a graph launches what it was captured with")
def test_launches_of_a_shape_are_the_same_whatever_the_lengths(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured launch is replayed with its grid, numbers and addresses."""
    engine = tiny_engine(models["mixed"], page_size=3)
    device, launched = engine.backend.device, []
    inner = device.launch

    def recorded(kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        # Tensors made in a step are the graph's own; what it reads is where it was.
        launched.append((grid, *(each for each in args if isinstance(each, int)), *named.items()))
        inner(kernel, grid, *args, **named)

    engine.submit(random_prompt(4), quire.SamplingParams(max_new_tokens=9, ignore_eos=True))
    engine.step()
    monkeypatch.setattr(device, "launch", recorded)
    steps = []
    for _ in range(6):
        launched.clear()
        engine.step()
        steps.append(launched[:])
    assert steps[0]
    assert all(step == steps[0] for step in steps)


@runs
@pytest.mark.parametrize("format", ["int4", "k=int8,v=int4", "fp8"])
def test_what_is_to_be_stored_below_zero_is_stored_nowhere(format: str) -> None:
    """So do padding rows: their slot, and the pages that they seal, are -1."""
    backend = create_backend("cuda-exact")
    key, value = parse_formats(format).of_layers(1, "fp32")[0]
    pool = backend.pool(PageShape(32, 2, 8, 8, key, value), 2, 2)
    ones = activations(backend, np.ones((64, 2, 8), np.float32))
    backend.append(pool, np.arange(64, 128), ones, ones)
    before = [pool.export_pages(pages).tobytes() for pages in ([0, 1], [2, 3])]
    none = np.full(3, -1)
    pool.store(backend.device.integers(none), ones[:3] * 2, ones[:3] * 2)
    pool.seal(none, none)
    pool.seal(none, np.arange(3) % 2)
    pool.seal(np.array([2, 3, 2]), none)
    assert [pool.export_pages(pages).tobytes() for pages in ([0, 1], [2, 3])] == before
    pool.seal(np.array([2]), np.array([1]))
    assert pool.export_pages([0, 1]).tobytes() != before[0]


def test_steps_are_put_into_buckets() -> None:
    if not RUNS:
        pytest.skip(STATUS["cuda"].detail)

    def shape(sequences: int, place: int) -> StepShape | None:
        case = Case(((place, 1),) * sequences, (1, 1, 8))
        return shape_of(lay_out(case).batch)

    assert shape(1, 0) == StepShape(1, 1, 64)
    assert shape(3, 255) == StepShape(4, 1, 64)
    assert shape(5, 256) == StepShape(8, 2, 128)
    assert shape(64, 511) == StepShape(64, 2, 2048)
    assert shape(65, 0) == StepShape(128, 1, 128)
    assert shape(256, 0) == StepShape(256, 1, 256)
    assert shape(257, 0) is None
    assert shape_of(lay_out(Case(((0, 2), (3, 1)), (1, 1, 8))).batch) is None
    assert shape_of(lay_out(Case(((3, 1), (3, 0)), (1, 1, 8))).batch) is None


# -- memory --------------------------------------------------------------------------------------


@runs
def test_a_step_without_memory_says_so_and_a_later_one_goes_on(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, prompt = quire.SamplingParams(max_new_tokens=4, ignore_eos=True), random_prompt(9)
    (law,) = tiny_engine(models["full"]).generate([prompt], params)
    engine = tiny_engine(models["full"])
    request = engine.submit(prompt, params)
    inner, fails = Attention.__call__, {"prefill", "decode"}

    def full(self: Any, query: Any, pool: Any, step: Any, *rest: Any) -> Any:
        kind = "prefill" if step.reach is None else "decode"
        if kind in fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        return inner(self, query, pool, step, *rest)

    monkeypatch.setattr(Attention, "__call__", full)
    for kind in ("prefill", "decode"):  # which a card captures
        free = []
        for _ in range(2):
            if kind == "decode" and free:
                engine.step()  # hands out the token that was chosen before memory ended
            with pytest.raises(BackendError, match=r"allocate 20\.00 MiB; .* lower kv_memory"):
                engine.step()
            free.append(engine.cache.free_pages)
        assert free[0] == free[1] == {"prefill": (64,), "decode": (61,)}[kind]
        fails.remove(kind)
    while engine.has_work:
        engine.step()
    assert request.completions[0].token_ids == law.token_ids


@runs
def test_pools_take_what_the_card_has_free_where_nobody_says(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "own_memory", 40_000_000)
    engine = quire.Engine(models["full"])
    assert 37_900_000 < engine.plan.memory.total <= 38_000_000  # 5 % are left
    assert engine.cache.usage().pool_bytes == engine.plan.memory.kv


# -- pools ---------------------------------------------------------------------------------------


def filled(backend: Backend, formats: str, dim: int = 6) -> Any:
    """A pool of 5 pages of 4 tokens, 2 heads, every slot filled."""
    key, value = parse_formats(formats).of_layers(1, "fp32")[0]
    pool = backend.pool(PageShape(4, 2, dim, dim, key, value), 5)
    numbers = np.random.default_rng(0).standard_normal((2, 20, 2, dim)).astype(np.float32)
    pair = (activations(backend, part) for part in numbers)
    backend.append(pool, np.arange(20, dtype=np.int64), *pair)
    return pool


@runs
@pytest.mark.parametrize("formats", ["fp32", "bf16", "fp16", "int8", "k=fp8,v=bf16"])
def test_pool_verbs_do_what_those_of_the_reference_do(backend: Backend, formats: str) -> None:
    pools = [filled(backend, formats), filled(ReferenceBackend(), formats)]

    def agree() -> None:
        for ours, law in zip(*(pool.read_pages(range(5)) for pool in pools), strict=True):
            assert ours.dtype == law.dtype
            assert ours.tobytes() == law.tobytes()

    agree()
    for pool in pools:
        pool.copy_pages([0, 3], [4, 1])
        # Each head keeps tokens of its own; all are read before one is written.
        pool.gather_tokens(np.array([[5, 9, 2], [9, 5, 0]]), np.array([2, 5, 6]))
        pages = pool.export_pages([4, 1, 2])
        assert pages.shape == (3, pool.shape.bytes_per_page)
        pool.blank_slots(pages, 3)
        pool.import_pages([0, 2, 3], pages)
    agree()
    for pool in pools:
        pool.discard()
    agree()


@runs
def test_pages_survive_a_trip_through_host_memory(backend: Backend) -> None:
    pool, other = filled(backend, "k=int8,v=fp16"), filled(backend, "k=int8,v=fp16")
    other.discard()
    pages = pool.export_pages([3, 0])
    other.import_pages([1, 2], pages)
    assert other.export_pages([1, 2]).tobytes() == pages.tobytes()


@runs
@pytest.mark.parametrize("format", ["int4", "int2"])
def test_hard_numbers_are_packed_as_the_definition_does(format: str) -> None:
    """Infinities, NaN, both zeros, ties, subnormals and the largest numbers; of many sizes."""
    backend = create_backend("cuda-exact")
    numbers = hard_vectors()
    numbers = numbers[: len(numbers) // 64 * 64].reshape(-1, 32, 4, 8)
    numbers = np.concatenate([numbers, np.sort(numbers, axis=1)[::-1]])  # groups of one size, too
    pages, (key, value) = len(numbers), parse_formats(format).of_layers(1, "fp32")[0]
    pool = backend.pool(PageShape(32, 4, 8, 8, key, value), pages, pages)
    taken = activations(backend, numbers.reshape(-1, 4, 8))
    backend.append(pool, np.arange(pages * 32, 2 * pages * 32), taken, taken)
    pool.seal(np.arange(pages, 2 * pages), np.arange(pages))
    held = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    both = zip(pool.read_pages(range(pages)), (key.key, value.value), strict=True)
    for read, coding in both:
        wanted = coding.decode(coding.encode(held), 8)
        assert np.array_equal(np.isnan(read), np.isnan(wanted))
        there = ~np.isnan(wanted)
        assert read[there].tobytes() == wanted[there].tobytes()


@runs
@pytest.mark.parametrize("format", ["bf16", "k=int8,v=fp8", "int4", "k=bf16,v=int2"])
def test_lists_of_all_pages_give_the_bits_of_attention(format: str) -> None:
    backend, case = create_backend("cuda-exact"), Packed(99, (64,), format=format)
    if not case.shape.by_page:
        case = replace(case, page_size=16)
    book = Book(backend, case)
    book.step([64])
    book.step([34])
    batch, (query, key, value) = book.batch([1]), (a[98:] for a in case.numbers())
    taken = [activations(backend, a) for a in (query, key, value)]
    keep(backend, book.pool, batch.groups[0], *taken[1:])
    tables = batch.groups[0]
    everything = ChosenPages(
        case.page_size,
        np.array([0, 1, 2]) * len(tables.indices),
        np.tile(tables.indices, 2),
        np.array([98, 98]),
    )
    law = backend.to_host(backend.attend(taken[0], book.pool, batch, 0))
    assert same_bits(backend.to_host(backend.attend_pages(taken[0], book.pool, everything)), law)


@runs
@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_each_head_reads_the_pages_chosen_for_it(backend: Backend, format: str) -> None:
    """The first of them packed, too; compared with the reference over the same bytes."""
    case, results = Packed(140, format=format), []
    for each in (backend, ReferenceBackend()):
        book = Book(each, case)
        book.step([139])
        batch, (query, key, value) = book.batch([1]), (a[139:] for a in case.numbers())
        taken = [activations(each, a) for a in (query, key, value)]
        keep(each, book.pool, batch.groups[0], *taken[1:])
        ids = batch.groups[0].indices
        pages = np.concatenate([ids[[0, 2, 4]], ids[[1, 4]]])
        last = 139 % 32
        places = np.array([2 * 32 + last, 32 + last])
        chosen = ChosenPages(32, np.array([0, 3, 5]), pages, places)
        results.append(each.to_host(each.attend_pages(taken[0], book.pool, chosen)))
    ours, law = results
    # Operands of a bf16 product are rounded, half of 2**-8 each: query and weight, or step.
    assert np.abs(ours - law).max() <= (1e-5 if format == "fp32" else 2**-7 * np.abs(law).max())


@runs
def test_what_lies_outside_the_pool_is_refused(backend: Backend) -> None:
    pool = filled(backend, "fp32")
    pair = [activations(backend, np.ones((1, 2, 6), np.float32)) for _ in range(2)]
    for slot in (-1, 20):
        with pytest.raises(BackendError, match="slots 0 to 19"):
            backend.append(pool, np.array([slot], np.int64), *pair)
    with pytest.raises(BackendError, match="2 slots for 1 tokens"):
        backend.append(pool, np.array([0, 1], np.int64), *pair)
    batch = lay_out(Case(((0, 1),), (2, 2, 6), 4)).batch
    beyond = replace(batch, groups=(replace(batch.groups[0], indices=np.array([5])),))
    with pytest.raises(BackendError, match="page 5 of a pool of 5"):
        backend.attend(pair[0], pool, beyond, 0)
    two = activations(backend, np.ones((2, 2, 6), np.float32))
    with pytest.raises(BackendError, match="2 queries for 1 tokens"):
        backend.attend(two, pool, batch, 0)


# -- where it does not run -----------------------------------------------------------------------


def test_the_identity_says_what_decides_bits() -> None:
    if not RUNS:
        pytest.skip(STATUS["cuda"].detail)
    fast, exact = (create_backend(name).identity for name in ("cuda", "cuda-exact"))
    assert fast != exact
    assert "triton" in fast


def test_a_backend_has_the_name_that_it_is_asked_for_by() -> None:
    if not RUNS:
        pytest.skip(STATUS["cuda"].detail)
    assert [create_backend(name).name for name in ("cuda", "cuda-exact")] == ["cuda", "cuda-exact"]


@pytest.mark.skipif(RUNS, reason="the backend runs here")
def test_a_machine_without_a_gpu_is_told_why() -> None:
    reason = STATUS["cuda"].detail
    assert ("NVIDIA GPU" if INSTALLED else "quire[cuda]") in reason
    with pytest.raises(BackendError, match="backend 'cuda' is off"):
        create_backend("cuda")


slow = pytest.mark.slow
PACKED = ["tests/conformance/test_packed_pages.py", "tests/conformance/test_stored_formats.py"]
OWN = ["tests/test_cuda.py", "tests/test_cuda_streams.py"]
QUICK_PACKED = "sealing or travel or blanked or single_tokens or any_size or accepts or agrees"
QUICK = "long_prefixes or large_scores or a_lone or test_append or smallest or 6x3x33 or identity"


@pytest.mark.skipif(not INSTALLED, reason="the extra cuda is not installed")
@pytest.mark.skipif(RUNS, reason="this process runs the kernels itself")
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/test_cuda.py", "tests/test_cuda_shapes.py", "tests/test_cuda_streams.py"],
        ["tests/test_cuda_sampling.py", "tests/conformance/test_choosing.py", "-k", "cuda"],
        ["tests/test_cuda_ahead.py"],
        ["tests/test_cuda_fused.py"],
        ["tests/test_cuda_steps.py"],
        ["tests/test_whole_card.py"],
        ["tests/conformance/test_ops.py", "-k", "cuda"],
        ["tests/conformance/test_attention.py", "-k", f"cuda and ({QUICK})"],
        [*PACKED, "-k", f"cuda and ({QUICK_PACKED})"],
        pytest.param([*OWN, "-m", "slow", "-k", "not compile"], marks=slow),
        pytest.param(["tests/conformance/test_attention.py", "-k", "cuda", "-n", "2"], marks=slow),
        pytest.param([*PACKED, "-k", "cuda", "-n", "2"], marks=slow),
    ],
    ids=[
        "cuda",
        "sampling",
        "ahead",
        "fused",
        "steps",
        "whole card",
        "ops",
        "attention",
        "packed",
        "more of cuda",
        "all of attention",
        "all of packed",
    ],
)
def test_interpreted(tests: list[str]) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow  # about three minutes
@pytest.mark.skipif(not INSTALLED, reason="the extra cuda is not installed")
@pytest.mark.parametrize(
    "name", ["cuda_compile.py", "cuda_compile_between.py", "cuda_compile_reading.py"]
)
def test_kernels_compile_and_fit_the_shared_memory_of_every_card(name: str) -> None:
    script = Path(__file__).parent / name
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "80", "90"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
