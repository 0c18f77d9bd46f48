"""Choosing pages on the device: what is known of them, what is picked, and whole engines."""

from collections import Counter
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from naive_reading import choose, lsh_score, quest_score
from quire.backends import create_backend
from quire.backends.selecting import best_pages, key_bounds, planes
from quire.batch import Candidates
from quire.errors import BackendError
from quire.format_choice import parse_formats
from quire.pages import PageShape
from test_cuda import RUNS, STATUS, activations, hard_vectors
from tiny import VOCAB, random_prompt, write_llama

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")

if RUNS:
    from quire.backends.cuda.backend import CudaBackend
    from quire.backends.cuda.graphs import StepGraph
    from quire.backends.cuda.summaries import pick
    from test_cuda_fused import counted

PAGE, DIM, LAYERS = 4, 6, 3
QUEST, LSH = "quest:budget=20,dense=1", "lsh:budget=20,bits=64,dense=1"
SCORES: dict[str, Any] = {"quest": quest_score, "lsh": lsh_score(planes(64, DIM))}
FORMATS = ["fp32", "bf16", "fp16", "int8", "fp8", "int4", "int2"]
each_policy = pytest.mark.parametrize("policy", [QUEST, LSH])
long = partial(quire.SamplingParams, max_new_tokens=16, ignore_eos=True)


# -- what is known of pages ----------------------------------------------------------------------


def stored(backend: Any, format: str, size: int, numbers: np.ndarray) -> tuple[Any, np.ndarray]:
    """A pool of pages with these keys [pages, size, G, D], whole ones, and what it gives back."""
    pages, _, heads, dim = numbers.shape
    key, value = parse_formats(format).of_layers(1, "fp32")[0]
    shape = PageShape(size, heads, dim, dim, key, value)
    pool = backend.pool(shape, pages, pages if shape.by_page else 0)
    taken = activations(backend, numbers.reshape(-1, heads, dim))
    first = pages * size if shape.by_page else 0
    backend.append(pool, np.arange(first, first + pages * size), taken, taken)
    if shape.by_page:
        pool.seal(np.arange(pages, 2 * pages), np.arange(pages))
    return pool, pool.read_pages(range(pages))[0].astype(np.float32)


def some_keys(size: int, dim: int) -> np.ndarray:
    """Pages of drawn numbers, and of infinities, NaN, zeros, subnormals and the largest ones."""
    drawn = np.random.default_rng(0).standard_normal((3, size, 2, dim)).astype(np.float32)
    hard = hard_vectors().reshape(-1)
    hard = np.resize(hard, (-(-len(hard) // (size * 2 * dim)), size, 2, dim))
    return np.concatenate([drawn, hard])


@pytest.mark.parametrize(("size", "dim"), [(32, 80), pytest.param(96, 16, marks=pytest.mark.more)])
@pytest.mark.parametrize("format", FORMATS)
def test_bounds_are_those_of_the_definition(format: str, size: int, dim: int) -> None:
    """Bit for bit, but for the sign of a zero among others."""
    backend = create_backend("cuda")
    pool, keys = stored(backend, format, size, some_keys(size, dim))
    summaries = backend.summaries(pool, "quest", 0)
    pages = np.array([*range(1, len(keys)), -1])
    summaries.make(backend.device.integers(pages))
    held = summaries.held.cpu().numpy().view(ml_dtypes.bfloat16)
    wanted = key_bounds(keys[1:]).astype(np.float32)
    np.testing.assert_array_equal(held[1:].astype(np.float32), wanted)
    assert not held[0].any(), "of a page that nobody asked for"
    assert summaries.bytes_per_page == held[0].nbytes


@pytest.mark.parametrize("format", FORMATS)
def test_signatures_are_sides_of_planes(format: str) -> None:
    """But where a product is as near to nothing as its rounding."""
    backend, size, dim, bits = create_backend("cuda"), 32, 24, 128
    drawn = np.random.default_rng(1).standard_normal((3, size, 2, dim)).astype(np.float32)
    pool, keys = stored(backend, format, size, drawn)
    summaries = backend.summaries(pool, "lsh", bits)
    summaries.make(backend.device.integers(np.arange(3)))
    words = summaries.held.cpu().numpy().view(np.uint32)
    sides = (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).reshape(3, 2, size, bits)
    normals = planes(bits, dim).astype(np.float64)
    wanted = np.einsum("psgd,db->pgsb", keys.astype(np.float64), normals)
    room = dim * 2.0**-24 * np.einsum("psgd,db->pgsb", np.abs(keys), np.abs(normals))
    assert (np.abs(wanted) > room).mean() > 0.99
    assert ((wanted > 0) == sides)[np.abs(wanted) > room].all()
    assert summaries.bytes_per_page == words[0].nbytes


# -- what is picked ------------------------------------------------------------------------------


def candidates(lists: list[Any], counts: list[int], heads: int, size: int = PAGE) -> Candidates:
    none, ends = np.empty(0, np.int64), np.cumsum([0, *map(len, lists)])
    last = [1] * len(lists)
    tables = ends, np.concatenate(lists)
    return Candidates.of(size, heads, tables, counts=counts, last_page_len=last, fresh=none)


@pytest.mark.parametrize("longest", [5000, 70])
def test_the_highest_scores_are_picked_of_equal_ones_the_earlier(longest: int) -> None:
    """Against NumPy; scores that are equal, infinite, of both signs and zeros, several blocks."""
    backend, rng, heads = create_backend("cuda"), np.random.default_rng(2), 2
    sizes = [longest, 12, 3, 1, 2, 40]
    counts = [longest // 3, 5, 3, 1, 2, 40]
    scores = np.full((len(sizes), heads, longest), np.nan, np.float32)
    kinds = [
        rng.standard_normal,
        lambda n: rng.integers(-2, 3, n),
        lambda n: rng.choice([-np.inf, np.inf, 0.0, -0.0, 1e-40, -1e-40], n),
    ]
    lists = [rng.permutation(10_000)[:size] for size in sizes]
    for s, size in enumerate(sizes):
        for g in range(heads):
            n = max(0, size - 2)
            scores[s, g, :n] = kinds[(s + g) % 3](n)
    asked = candidates(lists, counts, heads)
    there = backend.device.to_device(scores)
    picked = pick(backend.device, there, asked, heads).cpu().numpy()
    starts = asked.chosen.groups[0].indptr
    for s, (pages, count) in enumerate(zip(lists, counts, strict=True)):
        for g in range(heads):
            row, ids = s * heads + g, pages
            if count < len(pages):
                ids = pages[best_pages(scores[s, g][None, : len(pages) - 2], count)[0]]
            np.testing.assert_array_equal(picked[starts[row] : starts[row + 1]], ids)


# -- engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer that is read whole and two that are not."""
    return write_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


def open_engine(directory: Path, evict: str = "none", **options: Any) -> quire.Engine:
    backend, most = options.pop("backend", "cuda-exact"), options.pop("max_batch_tokens", 16)
    cache = {"page_size": PAGE, "num_pages": 64, "evict": evict} | options
    return quire.Engine(
        directory, backend=backend, cache=quire.CacheConfig(**cache), max_batch_tokens=most
    )


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every choice is compared with the slow rule over keys as they are stored; how many pages."""
    found: list[int] = []

    def compared(inner: Any, self: Any, query: Any, summaries: Any, asked: Candidates) -> Any:
        chosen = inner(self, query, summaries, asked)
        ids, queries = chosen.indices.cpu().numpy(), query.cpu().numpy()
        heads, score = summaries.pool.shape.num_kv_heads, SCORES[summaries.policy]
        for s, count in enumerate(asked.counts.tolist()):
            pages = asked.indices[asked.indptr[s] : asked.indptr[s + 1]]
            key = summaries.pool.read_pages(pages.tolist())[0].astype(np.float32)
            own = queries[s].reshape(heads, -1, queries.shape[-1])
            g = len(found) % heads  # the rule is slow
            scores = [score(own[g], page[:, g]) for page in key]
            at = slice(chosen.indptr[s * heads + g], chosen.indptr[s * heads + g + 1])
            wanted = pages if count == len(pages) else pages[choose(scores, count)]
            np.testing.assert_array_equal(ids[at], wanted)
            found.append(len(pages))
        return chosen

    monkeypatch.setattr("quire.backends.cuda.backend.shape_of", lambda _batch: None)
    inner = CudaBackend.choose_pages
    monkeypatch.setattr(CudaBackend, "choose_pages", partialmethod(partial(compared, inner)))
    return found


@each_policy
def test_tokens_are_those_of_the_reference_backend(
    policy: str, llama: Path, checked: list[int]
) -> None:
    """In fp32, launched kernel by kernel; and every choice is the slow rule's."""
    prompts = [random_prompt(length, seed=length) for length in (22, 29)]
    params = long(max_new_tokens=5)
    ours = open_engine(llama, policy).generate(prompts, params)
    assert len(checked) == 2 * 2 * 4, "layers, requests, steps"
    law = open_engine(llama, policy, backend="reference").generate(prompts, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in law]
    assert [c.reading for c in ours] == [c.reading for c in law]


def settings_of(kv_format: str) -> dict[str, Any]:
    if "int4" not in kv_format:
        return {"kv_format": kv_format}
    return {"kv_format": kv_format, "page_size": 32, "num_pages": 24}


class Replayed:
    """How many steps in which tokens choose were replays, and how many were not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.replays = self.launched = 0
        replay, take = StepGraph.run, CudaBackend.take_step

        def run(graph: Any, tokens: Any, batch: Any) -> Any:
            self.replays += batch.candidates is not None
            return replay(graph, tokens, batch)

        def launch(backend: Any, tokens: Any, batch: Any, rows: Any, beside: Any = ()) -> Any:
            parts = [batch, *(part for _, part in beside)]
            self.launched += any(part.candidates is not None for part in parts)
            return take(backend, tokens, batch, rows, beside)

        patch.setattr(StepGraph, "run", run)
        patch.setattr(CudaBackend, "take_step", launch)


@pytest.mark.parametrize(
    ("policy", "kv_format"),
    [
        ("quest:budget=20,dense=1", "bf16"),
        ("lsh:budget=50%,bits=64,dense=0", "int8"),
        ("quest:budget=96,dense=1", "int4"),
        pytest.param("lsh:budget=96,bits=128,dense=1", "int4:rotated", marks=pytest.mark.more),
        pytest.param("quest:budget=50%,dense=0", "k=fp8,v=bf16", marks=pytest.mark.more),
    ],
)
def test_company_hits_and_replays_change_no_bit(
    policy: str, kv_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply alone, launched kernel by kernel; behind a prefix hit, in replays beside one that has
    nothing to choose from yet and others that read all; and beside one that chooses by another.
    """
    model = write_llama(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=320)
    length = 101 if "int4" in kv_format else 30
    prompt, params = random_prompt(length, seed=1), long(max_new_tokens=6)
    engine = open_engine(model, max_batch_tokens=256, **settings_of(kv_format))
    with monkeypatch.context() as patch:
        patch.setattr("quire.backends.cuda.backend.shape_of", lambda _batch: None)
        [alone] = engine.generate([prompt], long(max_new_tokens=4, evict=policy))
    assert alone.reading is not None

    counted = Replayed(monkeypatch)
    params = long(max_new_tokens=4, evict=policy)
    again, short = engine.generate([prompt, random_prompt(5, seed=2)], params)
    assert again.cached_tokens > length // 2
    assert (again.token_ids, again.reading) == (alone.token_ids, alone.reading)
    assert short.reading is None
    assert counted.replays >= 2, "all but those behind the prompts"

    packed = "int4" in kv_format
    reads_all = ["none", *([] if packed else ["window:budget=16"])]
    before, prompts = counted.replays, [prompt, *[random_prompt(length, seed=3)] * len(reads_all)]
    done = generate(engine, prompts, [policy, *reads_all])
    assert done[0].token_ids == alone.token_ids
    assert counted.replays >= before + 2
    fresh = open_engine(model, **settings_of(kv_format))
    for prompt_of, each, ours in zip(prompts[1:], reads_all, done[1:], strict=True):
        [law] = generate(fresh, [prompt_of], [each])
        assert ours.reading is None
        assert (ours.token_ids, ours.logprobs) == (law.token_ids, law.logprobs)

    before = counted.launched
    other = "lsh:budget=96,bits=64,dense=1" if packed else "lsh:budget=12,bits=64,dense=1"
    assert generate(engine, [prompt] * 2, [policy, other])[0].token_ids == alone.token_ids
    assert counted.launched > before


def generate(engine: quire.Engine, prompts: list[Any], policies: list[str]) -> list[Any]:
    """Completions of four tokens, with their logprobs, each by a policy of its own."""
    requests = [
        engine.submit(prompt, long(max_new_tokens=4, evict=policy, logprobs=0))
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    return [request.completions[0] for request in requests]


def test_what_replays_know_of_pages_is_what_is_stored(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pages that were completed by replayed steps, too."""
    counted, engine = Replayed(monkeypatch), open_engine(llama, QUEST, kv_format="bf16")
    engine.generate([random_prompt(22)], long(max_new_tokens=13))
    assert counted.replays >= 10
    [known] = engine._policies.reader._known.values()
    pages = np.flatnonzero(known._made >= 0)
    assert len(pages) == (22 + 12) // PAGE - 1, "all but the first and the newest"
    for layer in known.layers:
        summaries = known.summaries[layer]
        held = summaries.held.cpu().numpy().view(ml_dtypes.bfloat16)[pages]
        keys = engine.cache.pools[layer].read_pages(pages.tolist())[0]
        np.testing.assert_array_equal(held.astype(np.float32), key_bounds(keys).astype(np.float32))


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_other_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Op by op, and with norms of heads."""
    model, policy = tmp_path / "model", "quest:budget=12,dense=0"
    write_checkpoint(model, tiny_config(kind, vocab_size=VOCAB))
    prompt, params = random_prompt(19), long(max_new_tokens=6)
    [law] = open_engine(model, policy, backend="reference").generate([prompt], params)
    counted = Replayed(monkeypatch)
    [done] = open_engine(model, policy).generate([prompt], params)
    assert (done.token_ids, done.reading) == (law.token_ids, law.reading)
    assert counted.replays >= 3


@pytest.mark.parametrize(("policy", "more"), [(QUEST, 3), (LSH, 4)])
def test_a_layer_that_chooses_takes_three_or_four_launches_more(
    policy: str, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than ten: what is known of fresh pages and, for signs, of the query; scores; the choice."""
    totals = []
    for layers in (2, 3):
        model = write_llama(tmp_path / str(layers), num_hidden_layers=layers, head_dim=16)
        engine = open_engine(model, policy, backend="cuda")
        engine.submit(random_prompt(30), long(logprobs=0))  # a step at a time
        chose: list[Counter[str]] = []
        while len(chose) < 2:  # in the first, what is known gets its memory
            # A card would replay, or launch twice to capture.
            monkeypatch.setattr("quire.backends.cuda.backend.shape_of", lambda _batch: None)
            with counted(engine.backend, monkeypatch) as found:
                engine.step()
            if found["bounds_kernel"] or found["signs_kernel"]:
                chose.append(found)
        totals.append(chose[1])
    assert totals[0]["pick_kernel"] == 1
    assert (totals[1] - totals[0]).total() == 10 + more


def test_pages_outside_the_pool_and_too_little_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = create_backend("cuda")
    pool, _ = stored(backend, "bf16", PAGE, some_keys(PAGE, 8))
    summaries, query = backend.summaries(pool, "quest", 0), np.ones((1, 4, 8), np.float32)
    beyond = candidates([np.array([0, 1, pool.num_pages, 2])], [3], 2)
    with pytest.raises(BackendError, match=f"page {pool.num_pages} of a pool of"):
        backend.choose_pages(activations(backend, query), summaries, beyond)

    def none_left(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(backend.device), "zeros", none_left)
    with pytest.raises(BackendError, match=r"quest remembers of \d+ pages, 64 bytes of each"):
        backend.summaries(pool, "quest", 0)
