"""Choosing pages to read where whole pages are packed: int4 and int2, rotated or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from naive_reading import choose, lsh_score, quest_score
from quire.backends.selecting import planes
from quire.batch import Candidates
from recording import same_bits
from tiny import random_prompt, write_llama

PAGE, DIM, PROMPT = 32, 6, 200
SCORES: dict[str, Any] = {"quest": quest_score, "lsh": lsh_score(planes(64, DIM))}
POLICIES = ("quest:budget=128,dense=1", "lsh:budget=128,bits=64,dense=1")
FORMATS = ("int4", "int2", "int4:rotated", "k=int8,v=int4", "int4+int8@first")
every_backend = pytest.mark.parametrize("backend", ["reference", "native"])
every_format = pytest.mark.parametrize("kv_format", FORMATS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 320}
    return write_llama(tmp_path_factory.mktemp("llama"), **sizes)


def open_engine(directory: Path, evict: str, **options: Any) -> quire.Engine:
    chunk = options.pop("max_batch_tokens", 50)
    backend = options.pop("backend")
    cache = quire.CacheConfig(num_pages=40, evict=evict, **options)
    return quire.Engine(directory, backend=backend, cache=cache, max_batch_tokens=chunk)


def sparse_logits(engine: quire.Engine) -> np.ndarray:
    """Of tokens that cross two borders of pages, read one at a time behind a prompt."""
    with engine.forced() as text:
        text.begin(PROMPT)
        text.read(random_prompt(PROMPT, seed=2))
        return np.concatenate([text.score([token]) for token in random_prompt(60, seed=3)])


@every_backend
@every_format
@pytest.mark.parametrize("policy", POLICIES)
def test_pages_are_chosen_by_their_keys_as_stored(
    llama: Path, policy: str, kv_format: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the slow rule over decoded keys; and chunks change no bit."""
    seen: list[int] = []

    def checked(query: Any, summaries: Any, candidates: Any) -> Any:
        chosen = inner(query, summaries, candidates)
        [count], pages = candidates.counts, candidates.indices
        key = summaries.pool.read_pages(pages.tolist())[0].astype(np.float32)
        score = SCORES[policy.partition(":")[0]]
        queries = query[0].reshape(key.shape[2], -1, DIM)
        g = len(seen) % key.shape[2]  # one head a step: the rule is slow
        best = choose([score(queries[g], page[:, g]) for page in key], count)
        at = slice(chosen.indptr[g], chosen.indptr[g + 1])
        np.testing.assert_array_equal(chosen.indices[at], pages[best])
        seen.append(len(pages))
        return chosen

    whole = sparse_logits(open_engine(llama, policy, kv_format=kv_format, backend=backend))
    chunked = open_engine(llama, policy, kv_format=kv_format, backend=backend, max_batch_tokens=33)
    inner = chunked.backend.choose_pages
    monkeypatch.setattr(chunked.backend, "choose_pages", checked)
    assert same_bits(sparse_logits(chunked), whole)
    assert (min(seen), max(seen)) == (7, 9)


@every_backend
@every_format
def test_choosing_all_pages_reads_what_attention_reads(
    llama: Path, kv_format: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first page and the newest open, the others packed: not a bit is changed."""

    def everything(query: Any, summaries: Any, candidates: Any) -> Any:
        counts, [last, *_] = np.diff(candidates.indptr), candidates.chosen.places % PAGE + 1
        tables, heads = (candidates.indptr, candidates.indices), summaries.pool.shape.num_kv_heads
        every = {"counts": counts, "last_page_len": [last], "fresh": candidates.fresh}
        return inner(query, summaries, Candidates.of(PAGE, heads, tables, **every))

    settings: dict[str, Any] = {"kv_format": kv_format, "backend": backend}
    engine = open_engine(llama, POLICIES[0], **settings)
    inner = engine.backend.choose_pages
    monkeypatch.setattr(engine.backend, "choose_pages", everything)
    sparse = sparse_logits(engine)
    assert engine.status().reading is not None
    assert same_bits(sparse, sparse_logits(open_engine(llama, "none", **settings)))
