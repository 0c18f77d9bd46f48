"""Policies that choose pages to read: the rules, what is read, what is shared, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from naive_reading import SparseLlama, choose, lsh_score, quest_score
from quire.backends.native import NativeBackend
from quire.backends.reference import ReferenceBackend
from quire.backends.selecting import planes
from quire.batch import ChosenPages
from quire.engine.reading import ReadUsage, SparseStatus
from quire.errors import BackendError, ConfigError, RequestError
from quire.machine import this_machine
from tiny import random_prompt, write_llama, write_mixed, write_sliding

PAGE, CHUNK, LAYERS, DIM = 4, 16, 3, 6
QUEST, LSH = "quest:budget=20,dense=1", "lsh:budget=20,bits=64,dense=1"
SCORES: dict[str, Callable[..., float]] = {"quest": quest_score, "lsh": lsh_score(planes(64, DIM))}
each_policy = pytest.mark.parametrize("policy", [QUEST, LSH])
each_backend = pytest.mark.parametrize("backend", ["reference", "native"])
long = partial(quire.SamplingParams, max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer that is read whole and two that are not."""
    return write_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


def open_engine(directory: Path, evict: str = "none", **options: Any) -> quire.Engine:
    limits = {"max_batch_tokens": CHUNK} | {
        name: options.pop(name)
        for name in ("max_batch_tokens", "max_sequences", "shadow", "threads")
        if name in options
    }
    backend = options.pop("backend", "reference")
    cache = {"page_size": PAGE, "num_pages": 64, "evict": evict} | options
    return quire.Engine(directory, backend=backend, cache=quire.CacheConfig(**cache), **limits)


def run(engine: quire.Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.cache.check()


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every choice of every step is compared with the slow rule, over keys as they are stored.

    Holds how many pages there were to choose from, each time.
    """
    found: list[int] = []

    def checked(inner: Any, self: Any, query: Any, summaries: Any, candidates: Any) -> Any:
        chosen = inner(self, query, summaries, candidates)
        heads, score = summaries.pool.shape.num_kv_heads, SCORES[summaries.policy]
        for s, count in enumerate(candidates.counts.tolist()):
            pages = candidates.indices[candidates.indptr[s] : candidates.indptr[s + 1]]
            key = summaries.pool.read_pages(pages.tolist())[0].astype(np.float32)
            queries = query[s].reshape(heads, -1, query.shape[-1])
            for g in range(heads):
                scores = [score(queries[g], page[:, g]) for page in key]
                at = slice(chosen.indptr[s * heads + g], chosen.indptr[s * heads + g + 1])
                wanted = pages if count == len(pages) else pages[choose(scores, count)]
                np.testing.assert_array_equal(chosen.indices[at], wanted)
                found.append(len(pages))
        return chosen

    for kind in (ReferenceBackend, NativeBackend):
        inner = kind.choose_pages
        monkeypatch.setattr(kind, "choose_pages", partialmethod(partial(checked, inner)))
    return found


@each_backend
@each_policy
def test_every_step_reads_what_the_paper_says(policy: str, backend: str, llama: Path) -> None:
    """Logits of float64 attention over exactly the pages that the rule chooses."""
    plan = {"size": PAGE, "pages": 5, "prompt": 45, "dense": 1}
    naive = SparseLlama(llama, SCORES[policy.partition(":")[0]], plan)
    tokens, engine = random_prompt(69), open_engine(llama, policy, backend=backend)
    with engine.forced() as text:
        for at in [*range(0, 45, CHUNK), *range(45, 69)]:
            part = tokens[at : min(at + CHUNK, 45)] if at < 45 else [tokens[at]]
            if at == 0:
                text.begin(45)
            np.testing.assert_allclose(text.score(part), naive.feed(part), rtol=0, atol=2e-4)
    status = engine.status().reading
    assert status is not None
    assert status.usage.steps == 24
    held, read = sum(range(46, 70)), sum(4 * PAGE + (n - 1) % PAGE + 1 for n in range(46, 70))
    assert (status.usage.tokens_held, status.usage.tokens_read) == (held, read)


@each_backend
@pytest.mark.parametrize(
    ("format", "alike"),
    [("fp32", False), ("bf16", False), ("int8", False), ("k=fp8,v=bf16", False), ("bf16", True)],
)
def test_every_format_and_company(
    format: str,
    alike: bool,
    backend: str,
    llama: Path,
    choices: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without policies in one batch, of which the pool holds a part at a time.

    And so where a backend computes all tokens alike if it can, as one does that replays steps.
    """
    engine = open_engine(llama, backend=backend, kv_format=format, num_pages=40)
    monkeypatch.setattr(engine.backend, "replays", alike)
    policies = QUEST, "none", LSH, "h2o:budget=20", "quest:budget=50%,dense=0", "none"
    prompts = [random_prompt(30 + 7 * i, seed=i) for i in range(len(policies))]
    requests = [
        engine.submit(prompt, long(evict=policy))
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    run(engine)
    assert sum(len(r.completions[0].preemptions) for r in requests) > 0
    assert len(choices) > 200
    for prompt, policy, request in zip(prompts, policies, requests, strict=True):
        [done] = request.completions
        assert (done.reading is not None) == (policy[0] in "ql")
        if policy == "none" or (policy[0] in "ql" and not done.preemptions):
            alone = open_engine(llama, backend=backend, kv_format=format)
            assert alone.generate([prompt], long(evict=policy))[0].token_ids == done.token_ids
    assert engine.cache.usage().allocated_bytes == 0


@each_backend
@each_policy
def test_chunks_company_prefixes_and_threads_change_no_bit(
    policy: str, backend: str, llama: Path
) -> None:
    prompt = random_prompt(50)
    [wanted] = open_engine(llama, policy, backend=backend).generate([prompt], long())
    settings: list[dict[str, Any]] = [{"max_batch_tokens": 3}, {"prefix_cache": False}]
    if backend == "native":
        settings.append({"threads": 1})
    for changes in settings:
        engine = open_engine(llama, policy, backend=backend, **changes)
        others = [random_prompt(20 + i, seed=i) for i in range(3)]
        for _ in range(2):  # the second time behind what the first left in the index
            [done, *_] = engine.generate([prompt, *others], long())
            assert done.token_ids == wanted.token_ids
            assert done.reading == wanted.reading
    [exact] = open_engine(llama, backend=backend).generate([prompt], long())
    assert exact.token_ids != wanted.token_ids


@each_backend
@pytest.mark.parametrize("policy", ["quest:budget=76,dense=0", "lsh:budget=80", "quest:budget=200"])
def test_a_budget_beyond_the_context_changes_no_bit(policy: str, backend: str, llama: Path) -> None:
    exact, sparse = open_engine(llama, backend=backend), open_engine(llama, policy, backend=backend)
    tokens = random_prompt(74)
    with exact.forced() as one, sparse.forced() as other:
        np.testing.assert_array_equal(one.score(tokens[:50]), other.score(tokens[:50]))
        for token in tokens[50:]:
            np.testing.assert_array_equal(one.score([token]), other.score([token]))
    [done] = sparse.generate([tokens[:50]], long())
    assert done.reading is None
    [again] = exact.generate([tokens[:50]], long())
    assert done.token_ids == again.token_ids


@each_backend
def test_pages_that_are_not_chosen_are_not_read(
    backend: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are NaN while a layer attends; one of the chosen being NaN is seen at once."""
    engine = open_engine(llama, "quest:budget=20,dense=0", backend=backend)
    inner, poison_chosen = engine.backend.attend_pages, [False]

    def poisoned(query: Any, pool: Any, chosen: Any) -> Any:
        heads = pool.shape.num_kv_heads
        kept = pool.export_pages(range(pool.num_pages))
        lists = [set(chosen.indices[a:b]) for a, b in pairwise(chosen.indptr)]
        for g in range(heads):
            read = set.union(*lists[g::heads])
            for page in set(range(pool.num_pages)) - (set() if poison_chosen[0] else read):
                for array in arrays_of(pool, page, g):
                    array[...] = np.nan
        mixed = inner(query, pool, chosen)
        pool.import_pages(range(pool.num_pages), kept)
        return mixed

    monkeypatch.setattr(engine.backend, "attend_pages", poisoned)
    tokens = random_prompt(60)
    with (
        engine.forced() as text,
        open_engine(llama, "quest:budget=20,dense=0", backend=backend).forced() as clean,
    ):
        text.read(tokens[:50]), clean.read(tokens[:50])
        for token in tokens[50:]:
            np.testing.assert_array_equal(text.score([token]), clean.score([token]))
        poison_chosen[0] = True
        assert np.isnan(text.score([1])).all()


def arrays_of(pool: Any, page: int, head: int) -> list[Any]:
    """Views of one head's keys and values in a page of plain numbers."""
    if isinstance(pool.key, tuple):
        return [pool.key[0][page, :, head], pool.value[0][page, :, head]]
    heads = pool.shape.num_kv_heads
    return [
        array.reshape(array.shape[0], heads, -1)[page, head] for array in (pool.key, pool.value)
    ]


@each_policy
def test_what_was_computed_sparsely_is_never_offered_as_exact(policy: str, llama: Path) -> None:
    engine, prompt = open_engine(llama, host_cache="4MiB"), random_prompt(42)
    [lossy] = engine.generate([prompt], long(evict=policy))
    follow = [*prompt, *lossy.token_ids]
    [next_one] = engine.generate([follow], long())
    [fresh] = open_engine(llama).generate([follow], long())
    assert next_one.token_ids == fresh.token_ids
    assert next_one.cached_tokens == 40  # the whole pages of the prompt, which are exact
    [again] = engine.generate([prompt], long(evict=policy))
    assert again.token_ids == lossy.token_ids
    assert again.cached_tokens == 41
    engine.close()


def test_samples_of_one_prompt_and_beams(llama: Path, choices: list[int]) -> None:
    engine, prompt = open_engine(llama, QUEST, num_pages=128), random_prompt(42)
    samples = engine.generate([prompt], long(n=3, temperature=1.0, seed=3))
    assert len({done.token_ids for done in samples}) == 3
    alone = open_engine(llama, QUEST).generate([prompt], long(temperature=1.0, seed=3))
    assert alone[0].token_ids == samples[0].token_ids
    beams = engine.generate([prompt], long(n=2, beam_width=3))
    assert [done.new_tokens for done in beams] == [24, 24]
    assert len(choices) > 300
    engine.cache.check()


def test_sessions_hold_the_exact_numbers(llama: Path, tmp_path: Path) -> None:
    engine, prompt = open_engine(llama), random_prompt(42)
    request = engine.submit(prompt, long(evict=QUEST))
    run(engine)
    assert engine.save_session(request, tmp_path / "session") == 42 + 23
    other = open_engine(llama)
    assert len(other.load_session(tmp_path / "session").tokens) == 42 + 23
    follow = [*prompt, *request.completions[0].token_ids]
    [done] = other.generate([follow], long())
    [fresh] = open_engine(llama).generate([follow], long())
    assert (done.token_ids, done.cached_tokens) == (fresh.token_ids, 65)


def test_pages_that_are_written_again_are_summed_up_again(llama: Path, choices: list[int]) -> None:
    """Reused, truncated, compacted, restored from a tier: the slow rule checks every choice."""
    engine = open_engine(llama, num_pages=24, host_cache="4MiB")
    for seed in range(4):
        engine.generate([random_prompt(40, seed)], long(evict=QUEST))
        engine.generate([random_prompt(40, seed)], long(evict="window:budget=12"))
        engine.generate([random_prompt(36, seed % 2)], long(evict=LSH))
    with engine.twin(engine.config).forced() as text:
        text.read([1])
    sparse = open_engine(llama, QUEST)
    with sparse.forced() as text:
        text.begin(30)
        for seed in range(3):
            for token in random_prompt(60 - text.tokens, seed):
                text.score([token])
            sparse.cache.truncate(text.sequence, 33 + seed)
    assert len(choices) > 500
    engine.close()


@each_backend
@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_other_models(model: str, backend: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(model))
    engine = open_engine(directory, "quest:budget=12,dense=0", backend=backend)
    prompt = (random_prompt(30) * 2)[: engine.model_config.max_position - 25]
    [done] = engine.generate([prompt], long())
    assert done.reading is not None
    assert done.reading.steps == 23
    exact = open_engine(directory, backend=backend)
    np.testing.assert_array_equal(exact.logits(prompt), engine.logits(prompt))


def test_layers_with_a_window_are_read_as_ever(tmp_path: Path) -> None:
    mixed = open_engine(write_mixed(tmp_path / "mixed"), "quest:budget=12,dense=0")
    assert mixed.status().lossy == ("layer 0: read quest:budget=12,dense=0",)
    [done] = mixed.generate([random_prompt(40)], long())
    assert done.reading is not None
    with pytest.raises(ConfigError, match="none of the 2 layers is one; lower dense"):
        open_engine(write_sliding(tmp_path / "sliding"), "quest:budget=12,dense=0")


def test_what_was_read_is_told_and_the_shadow_counts_the_loss(llama: Path) -> None:
    engine = open_engine(llama, QUEST, kv_format="bf16", shadow=1.0)
    assert engine.status().lossy == ("layers 1-2: read quest:budget=20,dense=1",)
    assert engine.status().reading == SparseStatus(
        ReadUsage(), 4 * 2 * 2 * DIM, 0, engine.plan.memory.summaries
    )
    [done] = engine.generate([random_prompt(40)], long())
    pages = [-(-n // PAGE) for n in range(41, 64)]
    token = 2 * 2 * 2 * DIM  # key and value, two heads, bf16
    read = [4 * PAGE + (n - 1) % PAGE + 1 for n in range(41, 64)]
    bounds = 2 * 2 * 2 * DIM  # least and greatest, two heads, bf16
    assert done.reading == ReadUsage(
        steps=23,
        tokens_read=sum(read),
        tokens_held=sum(range(41, 64)),
        bytes_read=sum(range(41, 64)) * token
        + 2 * sum(read) * token
        + 2 * bounds * sum(n - 2 for n in pages),
        bytes_held=3 * sum(range(41, 64)) * token,
    )
    assert str(done.reading).startswith("read 18 of 52 tokens a step, ")
    status = engine.status()
    assert status.reading is not None
    assert status.reading.usage == done.reading
    assert status.reading.bytes_per_page == 2 * bounds
    assert status.reading.bytes == 2 * bounds * (pages[-1] - 2)
    assert status.reading.bytes_most == 2 * bounds * 64
    assert status.shadow is not None
    assert (status.shadow.kl_mean or 0) > 0


def test_what_cannot_be_combined_is_refused_with_the_reason(llama: Path) -> None:
    with pytest.raises(ConfigError, match="page_size 'whole' has one page a sequence"):
        open_engine(llama, QUEST, page_size="whole")
    with pytest.raises(ConfigError, match="3 pages of 4 tokens; give a budget of at least 12"):
        open_engine(llama, "quest:budget=11")
    with pytest.raises(ConfigError, match=r"layers from 3 on .* none of the 3 layers"):
        open_engine(llama, "lsh:budget=20,dense=3")
    engine = open_engine(llama, num_pages=16, host_cache="4MiB")
    with pytest.raises(RequestError, match="at least 12"):
        engine.submit([1, 2], long(evict="quest:budget=4"))
    with pytest.raises(RequestError, match="do not fit the pool, and quest chooses among pages"):
        engine.submit(random_prompt(60), long(evict=QUEST))
    for text, message in [
        ("lsh:budget=20,bits=60", "bits must be a multiple of 64, at most 512"),
        ("lsh:budget=20,bits=1024", "bits must be a multiple of 64"),
        ("quest:budget=20,sink=4", "quest has no option 'sink'"),
        ("quest", "has no budget; write quest:budget=512"),
    ]:
        with pytest.raises(ConfigError, match=message):
            quire.CacheConfig(evict=text)


def test_generations_grow_before_anything_is_written(llama: Path) -> None:
    """Of the page that a token is appended to, of new ones, and of those that tokens move to."""
    cache = open_engine(llama).cache
    sequence = cache.create()

    def written(act: Callable[[], Any]) -> list[int]:
        before = cache.generations(0).copy()
        act()
        return np.flatnonzero(cache.generations(0) != before).tolist()

    def append(count: int) -> None:
        cache.commit(cache.reserve([(sequence, count)]))

    grown = written(lambda: append(10))
    pages = cache.page_tables(sequence)[0][1]
    assert grown == sorted(pages)
    assert written(lambda: append(1)) == [pages[2]]
    assert written(lambda: cache.truncate(sequence, 6)) == []
    assert written(lambda: append(1)) == [pages[1]]
    keep = [np.tile(np.array([0, 2, 3, 5, 6]), (2, 1))] * LAYERS
    assert written(lambda: cache.evict(sequence, keep)) == sorted(pages[:2])


@each_backend
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_lists_of_all_pages_give_the_bits_of_attention(
    format: str, backend: str, llama: Path
) -> None:
    engine = open_engine(llama, backend=backend, kv_format=format)
    with engine.forced() as text:
        text.read(random_prompt(50))
        reservation = engine.cache.reserve([(text.sequence, 1)])
        [tables], pool = reservation.batch.groups, engine.cache.pools[0]
        query = np.random.default_rng(0).standard_normal((1, 6, DIM)).astype(np.float32)
        pages = tables.indices
        everything = ChosenPages(
            PAGE, np.array([0, 1, 2]) * len(pages), np.tile(pages, 2), np.array([50, 50])
        )
        np.testing.assert_array_equal(
            engine.backend.attend_pages(query, pool, everything),
            engine.backend.attend(query, pool, reservation.batch, 0),
        )
        engine.cache.rollback(reservation)


def test_a_requests_own_policy_finds_room_or_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a plan that has none for it; what is set aside is the status's, before a step."""
    engine, prompt = open_engine(llama), random_prompt(40)
    assert engine.plan.memory.summaries == 0
    need = 64 * 2 * 2 * 2 * 2 * DIM  # pages, layers, heads, least and greatest, bf16

    def offers(available: int) -> None:
        machine = replace(this_machine(), available_bytes=available)
        monkeypatch.setattr("quire.engine.policies.this_machine", lambda: machine)

    offers(need)  # of which some are left to others
    with pytest.raises(RequestError, match=f"{need // 64} bytes of each of 64 pages, and"):
        engine.submit(prompt, long(evict=QUEST))
    assert engine.status().reading is None
    [exact] = engine.generate([prompt], long())

    offers(2 * need)
    engine.submit(prompt, long(evict=QUEST))
    assert engine.status().reading == SparseStatus(ReadUsage(), need // 64, 0, need)
    offers(0)  # it has its room
    [other, _] = engine.generate([prompt, prompt], [long(), long(evict=QUEST)])
    assert other.token_ids == exact.token_ids


def test_a_card_without_memory_for_a_requests_policy_refuses_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(llama)

    def no_memory(*_: object) -> None:
        raise BackendError("no memory for what quest remembers")

    monkeypatch.setattr(engine.backend, "summaries", no_memory)
    with pytest.raises(RequestError, match="no memory for what quest remembers"):
        engine.submit(random_prompt(40), long(evict=QUEST))
    assert not engine.has_work
    assert len(engine.generate([random_prompt(40)], long())[0].token_ids) == 24
