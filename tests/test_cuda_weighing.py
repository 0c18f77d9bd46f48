"""What speaks for keys when tokens are dropped, on the device; and engines whose requests do."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.backends import create_backend
from quire.errors import BackendError
from quire.format_choice import parse_formats
from quire.pages import PageShape
from test_cuda import RUNS, STATUS, activations
from tiny import random_prompt, write_llama

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")

if RUNS:
    from quire.backends.cuda import weighing
    from quire.backends.cuda.device import Device

HEADS, SHARE, DIM, PAGE = 2, 3, 24, 20
FORMATS = ["fp32", "bf16", "fp16", "int8", "fp8"]
long = partial(quire.SamplingParams, max_new_tokens=12, ignore_eos=True)


def stored(format: str, pages: int) -> tuple[Any, Any]:
    """A backend, and a pool of so many pages of drawn keys."""
    backend = create_backend("cuda")
    key, value = parse_formats(format).of_layers(1, "fp32")[0]
    pool = backend.pool(PageShape(PAGE, HEADS, DIM, DIM, key, value), pages)
    numbers = np.random.default_rng(0).standard_normal((pages * PAGE, HEADS, DIM))
    taken = activations(backend, numbers.astype(np.float32))
    backend.append(pool, np.arange(pages * PAGE), taken, taken)
    return backend, pool


def keys_of(pool: Any, pages: list[int], count: int) -> np.ndarray:
    """As they are stored, float64 [count, G, D]."""
    return pool.read_pages(pages)[0].reshape(-1, HEADS, DIM)[:count].astype(np.float64)


def weights(query: np.ndarray, key: np.ndarray, places: np.ndarray) -> np.ndarray:
    """In float64, one query and one head at a time."""
    out = np.zeros((HEADS, len(key)))
    for x, place in zip(query.astype(np.float64), places, strict=True):
        for h, row in enumerate(x):
            scores = key[: place + 1, h // SHARE] @ row / np.sqrt(DIM)
            each = np.exp(scores - scores.max())
            out[h // SHARE, : place + 1] += each / each.sum()
    return out


@pytest.mark.parametrize("most", [1 << 24, 60, 1])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "length"), [(1, 41), (7, 33)])
def test_weights_are_those_of_float64(
    format: str, tokens: int, length: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at a time, and heads and rows one by one; the last page is not full."""
    monkeypatch.setattr(weighing, "_MOST", most)
    backend, pool = stored(format, 5)
    pages, places = [3, 0, 4], np.arange(length - tokens, length)
    query = np.random.default_rng(1).standard_normal((tokens, HEADS * SHARE, DIM))
    query = query.astype(np.float32)
    key = keys_of(pool, pages, length)
    wanted = weights(query, key, places)
    for given in (activations(backend, query), query):
        found = backend.to_host(backend.weigh_keys(given, pool, pages, places))
        assert (np.abs(found - wanted) <= room(query, key) * wanted).all()


def room(query: np.ndarray, key: np.ndarray) -> float:
    """Relative, of float32. A score is a sum of DIM products and is scaled; weights have the errors
    of two exponents (their own, the sum's), of exp (two units), of a sum over keys and a division,
    and of sums over queries.
    """
    unit = 2.0**-24
    sizes = np.abs(query).max(axis=(0, 1)) @ np.abs(key).max(axis=(0, 1)) / np.sqrt(DIM)
    score = (DIM + 3) * unit * sizes  # with the difference from the greatest
    return float(np.expm1(2 * score) + (2 * 2 * 2 + len(key) + 1 + len(query) * SHARE) * unit)


@pytest.mark.parametrize("format", FORMATS)
def test_norms_are_those_of_float64(format: str) -> None:
    backend, pool = stored(format, 5)
    pages = [2, 1]
    wanted = np.linalg.norm(keys_of(pool, pages, 31), axis=-1).T
    found = backend.to_host(backend.key_norms(pool, pages, 31))
    np.testing.assert_allclose(found, wanted, rtol=(DIM + 2) * 2.0**-24)
    with pytest.raises(BackendError, match="page 9 of a pool of 5"):
        backend.key_norms(pool, [9], 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


def replies(directory: Path, backend: str, policies: list[str], **options: Any) -> list[Any]:
    cache = quire.CacheConfig(page_size=4, num_pages=64, prefix_cache=False, **options)
    engine = quire.Engine(directory, backend=backend, cache=cache, max_batch_tokens=16)
    requests = [
        engine.submit(random_prompt(14 + 5 * nth, seed=nth), long(evict=policy))
        for nth, policy in enumerate(policies)
    ]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    done = [request.completions[0] for request in requests]
    return [(each.token_ids, each.evicted_tokens) for each in done]


DROPPING = ["h2o:budget=12", "snapkv:budget=12,window=4", "knorm:budget=12", "window:budget=12"]


def test_tokens_are_those_of_the_reference_backend(llama: Path) -> None:
    """In fp32, each policy beside the others and one request without."""
    policies = [*DROPPING, "none"]
    ours = replies(llama, "cuda-exact", policies, kv_format="fp32")
    assert ours == replies(llama, "reference", policies, kv_format="fp32")
    assert [dropped > 0 for _, dropped in ours] == [True] * 4 + [False]


def test_company_changes_no_choice(llama: Path) -> None:
    """Nor what is dropped: what is summed up of a request is its own."""
    together = replies(llama, "cuda-exact", ["h2o:budget=12", "h2o:budget=16"], kv_format="int8")
    [alone] = replies(llama, "cuda-exact", ["h2o:budget=12"], kv_format="int8")
    assert together[0] == alone


def test_keys_stay_on_the_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back of a layer is a number for each key of a head, or the newest queries."""
    sizes: list[int] = []
    inner = Device.to_host

    def counted(self: Device, tensor: Any) -> Any:
        sizes.append(tensor.numel())
        return inner(self, tensor)

    monkeypatch.setattr(Device, "to_host", counted)
    replies(llama, "cuda-exact", DROPPING, kv_format="bf16")
    heads, most, dim = 2, 29 + 12, 6
    assert max(sizes) <= max(heads * most, 4 * 6 * dim), "keys are heads * dim for each token"
