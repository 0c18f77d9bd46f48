"""The rotation of keys and queries: its definition, and engines over pages whose keys are turned.

The exactness law over rotated pages is tested where that of the other formats is.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from conformance import SUBJECTS, Subject, activations, backend_of
from quire.backends.blocks import keep
from quire.batch import GroupBatch, OpenPages
from quire.formats import PAGE_FORMATS, page_format
from quire.pages import PageShape
from quire.rotation import rotate
from tiny import WRITERS, random_prompt
from turning import turn_all_keys

DIMS = (1, 2, 6, 32, 64, 80, 96, 127, 128, 256)
UNIT = 2.0**-24

every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def matrix(dim: int) -> np.ndarray:
    """float64: Sylvester's matrices of the powers of two in ``dim``, on the diagonal."""
    out, start = np.zeros((dim, dim)), 0
    for size in (2**bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1):
        block = np.ones((1, 1))
        while len(block) < size:
            block = np.block([[block, block], [block, -block]])
        out[start : start + size, start : start + size] = block / np.sqrt(size)
        start += size
    return out


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounding(x: np.ndarray) -> np.ndarray:
    """Bound of the error of each number: a sum of log2 D roundings, and two of the factor."""
    steps = x.shape[-1].bit_length() - 1 + 2
    return 1.01 * steps * UNIT * np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_a_product_with_an_orthonormal_matrix(dim: int) -> None:
    exact, x = matrix(dim), numbers(dim, 5, 3, dim)
    assert np.abs(exact @ exact.T - np.eye(dim)).max() < 1e-15 * dim
    before = x.copy()
    assert (np.abs(rotate(x) - x.astype(np.float64) @ exact) <= rounding(x)).all()
    assert x.tobytes() == before.tobytes()


@pytest.mark.parametrize("dim", DIMS)
def test_twice_gives_the_same_back(dim: int) -> None:
    """An error of the first time is turned as a whole, and no longer than all of its numbers."""
    x = numbers(dim, 40, dim)
    assert (np.abs(rotate(rotate(x)) - x) <= (np.sqrt(dim) + 1) * rounding(x)).all()


def test_infinities_and_nan_never_become_a_number() -> None:
    x = numbers(1, 4, 80)
    x[0, 3], x[1, 3], x[2, 70] = np.inf, np.nan, -np.inf
    found = np.isfinite(rotate(x))
    assert not found[:2, :64].any()
    assert not found[2, 64:].any()
    assert found[:2, 64:].all()
    assert found[2, :64].all()
    assert found[3].all()


@every_subject
@pytest.mark.parametrize("dim", DIMS)
def test_every_backend_has_the_bits_of_the_definition(subject: Subject, dim: int) -> None:
    x = numbers(dim, 37, 3, dim) * np.float32(10.0) ** numbers(0, 37, 1, 1)
    backend = backend_of(subject)
    got = backend.to_host(backend.hadamard(activations(backend, x)))
    assert got.tobytes() == rotate(x).tobytes()


# -- what is stored ------------------------------------------------------------------------------


def pool_with(backend: Any, name: str, key: np.ndarray, value: np.ndarray) -> Any:
    """A pool of page 0, packed from open page 1 if the format packs, else of page 0 alone."""
    formats = page_format(name), page_format(name.removesuffix(":rotated"))
    shape = PageShape(32, *key.shape[1:], key.shape[2], *formats)
    pool = backend.pool(shape, 1, 1 if shape.by_page else 0)
    slots = np.arange(32) + (32 if shape.by_page else 0)
    none = np.empty(0, np.int64)
    tables = GroupBatch(32, None, slots, none, none, none, none)
    if shape.by_page:
        tables = replace(tables, open=OpenPages(none, none, none, np.array([1]), np.array([0])))
    keep(backend, pool, tables, activations(backend, key), activations(backend, value))
    return pool


@every_subject
@pytest.mark.parametrize("name", ["int8:rotated", "fp8:rotated", "int4:rotated", "int2:rotated"])
def test_stored_numbers_are_those_of_turned_keys(subject: Subject, name: str) -> None:
    key, value = numbers(1, 32, 2, 64), numbers(2, 32, 2, 64)
    pool = pool_with(backend_of(subject), name, key, value)
    format = page_format(name)
    taken = [rotate(key), value]
    if format.kind == "page":  # as the open page has them
        taken = [x.astype(PAGE_FORMATS["bf16"].dtype).astype(np.float32) for x in taken]
    stored = [
        coding.decode(coding.encode(x), 64)
        for coding, x in zip((format.key, format.value), taken, strict=True)
    ]
    for got, expected in zip(pool.read_pages([0]), stored, strict=True):
        assert got[0].tobytes() == expected.tobytes()


# -- engines -------------------------------------------------------------------------------------


def engine_over(directory: Path, backend: str, **cache: Any) -> quire.Engine:
    settings = quire.CacheConfig(**({"num_pages": 40, "kv_format": "fp32"} | cache))
    return quire.Engine(directory, backend=backend, cache=settings, max_batch_tokens=30)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"max_position_embeddings": 400, "head_dim": 24}  # blocks of 16 and 8
    return WRITERS["full"](tmp_path_factory.mktemp("wide"), **sizes)


BACKENDS = sorted({subject.name.split("-")[0] for subject in SUBJECTS})
# Not knorm, to which keys of equal tokens are ties; not quest and lsh, whose bounds and planes are
# others of turned keys, so that they may choose other pages.
POLICIES = ("none", "h2o:budget=48", "snapkv:budget=48,window=8")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@pytest.mark.parametrize("evict", POLICIES)
def test_nothing_is_lost_by_the_rotation_itself(
    wide: Path, backend: str, evict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that compared turned keys with queries as they were would keep other tokens."""
    params = quire.SamplingParams(max_new_tokens=20, ignore_eos=True, logprobs=1)
    prompt = random_prompt(90, seed=3)
    [plain] = engine_over(wide, backend, evict=evict).generate([prompt], params)
    turn_all_keys(monkeypatch)
    engine = engine_over(wide, backend, evict=evict)
    assert all(shape.rotated for shape in engine.cache.layout.shapes)
    [turned] = engine.generate([prompt], params)
    assert turned.token_ids == plain.token_ids
    assert turned.evicted_tokens == plain.evicted_tokens
    assert turned.logprobs is not None
    assert plain.logprobs is not None
    for ours, theirs in zip(turned.logprobs, plain.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@every_backend
@pytest.mark.parametrize("kv_format", ["int8", "fp8", "int4"])
def test_arrays_are_given_in_the_basis_of_the_model(
    wide: Path, backend: str, kv_format: str
) -> None:
    """Turned back they are the exact keys of layer 0, but for what the format loses of them."""
    tokens, found = random_prompt(70, seed=8), []
    for name in ("fp32", kv_format + ":rotated"):
        engine = engine_over(wide, backend, kv_format=name, page_size=32)
        sequence = engine.cache.create()
        engine._forward.prefill(sequence, tokens)
        found.append(engine.cache.to_arrays(sequence, "BSHD").layers[0].key[0])
    assert found[1].dtype == np.float32
    exact, turned_back = (key.astype(np.float64) for key in found)
    # A number of a turned key is at most the key's length. int8 errs by half of 1/127 of it in each
    # of 24, fp8 by 1/16; int4 by half of 1/15 of the range over 32 keys, at most twice the longest.
    longest = np.linalg.norm(exact, axis=-1)
    spread = longest.max() / longest.min()
    parts = {"int8": 1.02 * 24**0.5 / 254, "fp8": 1 / 16 + 24**0.5 / 448 / 2}
    bound = parts.get(kv_format, 24**0.5 * spread * (1 / 15 + 2.0**-7))
    wrong = np.linalg.norm(turned_back - exact, axis=-1) / longest
    assert 0 < wrong.max() <= bound


def test_identity_and_status_say_that_keys_are_turned(wide: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "talk.quire", random_prompt(40, seed=1)
    engine = engine_over(wide, "reference", kv_format="int8:rotated")
    assert engine.cache.layout.format_text == "int8:rotated"
    assert engine.status().lossy == ("layers 0-1: int8:rotated pages",)
    request = engine.submit(prompt, quire.SamplingParams(max_new_tokens=2))
    while engine.has_work:
        engine.step()
    engine.save_session(request, path)
    same = engine_over(wide, "reference", kv_format="k=int8:rotated,v=int8")
    assert same.load_session(path).reason is None
    other = engine_over(wide, "reference", kv_format="int8")
    assert "page_format" in str(other.load_session(path).reason)


def test_a_packed_page_and_its_open_one_are_turned_alike() -> None:
    shape = PageShape(32, 1, 8, 8, page_format("int4:rotated"), page_format("int4"))
    assert shape.rotated
    assert shape.open_shape.rotated
    assert not replace(shape, key_format=page_format("int4")).open_shape.rotated
