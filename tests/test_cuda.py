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

import numpy as np
import pytest

import quire
from conformance import activations
from conformance.test_attention import Case, lay_out, new_pool
from quire.backends import Backend, backend_status, create_backend
from quire.backends.reference import ReferenceBackend
from quire.errors import BackendError
from quire.format_choice import parse_formats
from quire.pages import PageShape
from recording import same_bits
from tiny import random_prompt, tiny_engine, write_llama

INSTALLED = importlib.util.find_spec("triton") is not None
STATUS = {status.name: status for status in backend_status()}
RUNS = STATUS["cuda"].available
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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
@pytest.mark.parametrize("kv_format", ["auto", "k=int8,v=fp8"])
@pytest.mark.parametrize("kind", ["full", "mixed"])
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


@pytest.mark.skipif(RUNS, reason="the backend runs here")
def test_a_machine_without_a_gpu_is_told_why() -> None:
    reason = STATUS["cuda"].detail
    assert ("NVIDIA GPU" if INSTALLED else "quire[cuda]") in reason
    with pytest.raises(BackendError, match="backend 'cuda' is off"):
        create_backend("cuda")


QUICK = "test_large_scores or test_a_lone or test_append or smallest or 6x3x33 or identity"


@pytest.mark.skipif(not INSTALLED, reason="the extra cuda is not installed")
@pytest.mark.skipif(RUNS, reason="this process runs the kernels itself")
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/test_cuda.py", "tests/test_cuda_shapes.py"],
        ["tests/conformance/test_ops.py", "-k", "cuda"],
        ["tests/conformance/test_attention.py", "-k", f"cuda and ({QUICK})"],
        pytest.param(
            ["tests/conformance/test_attention.py", "-k", "cuda", "-n", "2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cuda", "ops", "attention", "all of attention"],
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
def test_attention_kernels_compile_and_fit_the_shared_memory_of_every_card() -> None:
    script = Path(__file__).parent / "cuda_compile.py"
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "80", "90"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
