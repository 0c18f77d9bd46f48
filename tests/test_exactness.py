"""The exactness law on the reference backend and every native variant, bit for bit.

A token's logits are a function of its own prefix, the weights and the page format. Random
schedules draw everything else: company, chunks, page size, pool size, placement, cancellations.
What they compute, recomputation after a preemption included, must equal the same tokens alone.
Engines of the native backend take turns with one, two and three threads.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import quire
from quire.backends.reference import BLOCK, ROWS, ReferenceBackend
from quire.engine.request import Sample
from recording import Recorder, same_bits
from tiny import (
    VOCAB,
    WINDOW,
    WRITERS,
    random_prompt,
    tiny_engine,
)

Array = npt.NDArray[Any]

PLAIN = ("auto", "fp32", "fp16")
PER_TOKEN = ("int8", "fp8", "k=int8,v=fp8", "fp8+k=bf16,v=int8@first", "int8:rotated+fp8@last")


class Schedule:
    """A random workload on a random engine; everything follows from ``seed`` and ``formats``."""

    def __init__(self, directory: Path, seed: int, formats: Sequence[str] = PLAIN) -> None:
        self.random = random = np.random.default_rng(seed)
        self.kv_format = str(random.choice(formats))
        self.todo = [self._request() for _ in range(random.integers(3, 7))]
        self.page_size: int | str = [1, 2, 3, 4, 5, 7, 8, 16, 17, "whole"][random.integers(10)]
        slots = 1100 if self.page_size == "whole" else int(self.page_size)
        largest = max(len(p) + params.max_new_tokens - 1 for p, params in self.todo)
        smallest = -(-largest // slots)  # pages that the largest request cannot do without
        if directory.name == "sliding":
            smallest = min(smallest, (WINDOW - 2) // slots + 2)
        self.roomy = bool(random.random() < 0.4)
        spare = 12 * (smallest + 1) + 8 if self.roomy else int(random.integers(0, smallest + 2))
        self.engine = tiny_engine(
            directory,
            page_size=self.page_size,
            num_pages=smallest + spare,
            kv_format=self.kv_format,
            max_batch_tokens=int(random.choice([1, 3, 5, 8, 13, 32, 512])),
            max_sequences=int(random.choice([1, 3, 5, 16])),
        )
        self.recorder = Recorder(self.engine, all_rows=bool(random.random() < 0.7))
        self.requests: list[quire.Request] = []
        self.others: list[int] = []  # sequences beside the engine's own

    def _request(self) -> tuple[list[int], quire.SamplingParams]:
        random = self.random
        params = quire.SamplingParams(
            max_new_tokens=int(random.integers(4, 30)),
            temperature=float(random.choice([0.0, 0.7, 1.5])),
            top_p=float(random.choice([1.0, 0.9])),
            repetition_penalty=float(random.choice([1.0, 1.2])),
            seed=int(random.integers(0, 2**63)),
            n=int(random.choice([1, 1, 2])),
        )
        return random.integers(0, VOCAB, random.integers(1, 40)).tolist(), params

    def run(self) -> None:
        self._shuffle_pages()
        while self.todo or self.engine.has_work:
            if self.todo and (self.random.random() < 0.5 or not self.engine.has_work):
                self.requests.append(self.engine.submit(*self.todo.pop()))
            if self.roomy:
                self._disturb()
            self.engine.step()
            self.engine.cache.check()
        for sequence in self.others:
            self.engine.cache.release(sequence)
        assert self.engine.cache.free_pages == self.engine.cache.num_pages

    def _shuffle_pages(self) -> None:
        """Leave the free list in a random order, with other sequences' pages between if roomy."""
        cache = self.engine.cache
        held = []
        while min(cache.free_pages) > 0:
            sequence = cache.create()
            cache.commit(cache.reserve([(sequence, 1)]))
            held.append(sequence)
        keep = int(self.random.integers(0, 6)) if self.roomy else 0
        order = [held[i] for i in self.random.permutation(len(held))]
        self.others = order[:keep]
        for sequence in order[keep:]:
            cache.release(sequence)

    def _disturb(self) -> None:
        """Fork a running sequence, so that it must copy its page; forget others; cancel."""
        cache, random = self.engine.cache, self.random
        running = [s.sequence for s in self.engine._queues.running if s.sequence is not None]
        if running and random.random() < 0.2 and len(self.others) < 6:
            self.others.append(cache.fork(running[random.integers(len(running))]))
        if self.others and random.random() < 0.4:
            cache.release(self.others.pop(int(random.integers(len(self.others)))))
        if len(self.requests) > 1 and random.random() < 0.02:
            self.engine.cancel(self.requests[int(random.integers(len(self.requests)))])


def assert_as_alone(directory: Path, schedule: Schedule) -> None:
    """Every recorded row and every reply equals what the request gives on an engine of its own."""
    for request in schedule.requests:
        alone = tiny_engine(directory, kv_format=schedule.kv_format, page_size=16, num_pages=8)
        whole = [c for c in request.completions if c.finish_reason == "length"]
        samples = alone.generate([list(request.prompt_tokens)], request.params) if whole else []
        for completion in whole:
            assert completion.token_ids == samples[completion.index].token_ids
        for index, completion in enumerate(request.completions):
            law = alone.logits([*request.prompt_tokens, *completion.token_ids])
            for sample, position, logits in schedule.recorder.rows:
                if sample is request.samples[index]:
                    assert same_bits(logits, law[position]), f"position {position}"


def check_schedule(directory: Path, seed: int, formats: Sequence[str] = PLAIN) -> Schedule:
    schedule = Schedule(directory, seed, formats)
    schedule.run()
    assert_as_alone(directory, schedule)
    return schedule


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", ["full", "mixed", "wide"])
def test_any_schedule_computes_the_bits_of_each_request_alone(
    models: dict[str, Path], kind: str, seed: int
) -> None:
    check_schedule(models[kind], seed)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_computes_the_bits_of_each_request_alone_when_all_layers_slide(
    models: dict[str, Path], seed: int
) -> None:
    check_schedule(models["sliding"], seed)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("seed", range(200, 208))
@pytest.mark.parametrize("kind", list(WRITERS))
def test_any_schedule_over_quantised_pages_computes_the_bits_of_each_request_alone(
    models: dict[str, Path], kind: str, seed: int
) -> None:
    check_schedule(models[kind], seed, PER_TOKEN)


@pytest.mark.slow
@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("seed", range(300, 320))
@pytest.mark.parametrize("kind", list(WRITERS))
def test_many_more_schedules_over_quantised_pages_compute_the_bits_of_each_request_alone(
    models: dict[str, Path], kind: str, seed: int
) -> None:
    check_schedule(models[kind], seed, PER_TOKEN)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kv_format", PER_TOKEN)
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_logits_over_quantised_pages_are_the_same_bits_in_any_chunks_and_pages(
    models: dict[str, Path], kind: str, kv_format: str
) -> None:
    tokens = random_prompt(90, seed=5)
    whole = tiny_engine(models[kind], page_size="whole", num_pages=1, kv_format=kv_format)
    law = whole.logits(tokens)
    for page_size, chunk in [(1, 512), (3, 1), (16, 7), (64, 33), ("whole", 2)]:
        engine = tiny_engine(
            models[kind],
            page_size=page_size,
            num_pages=96,
            max_batch_tokens=chunk,
            kv_format=kv_format,
        )
        assert same_bits(engine.logits(tokens), law), (page_size, chunk)
    assert not same_bits(tiny_engine(models[kind]).logits(tokens), law), "nothing was rounded"


@pytest.mark.slow
@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("seed", range(100, 140))
@pytest.mark.parametrize("kind", list(WRITERS))
def test_many_more_schedules_compute_the_bits_of_each_request_alone(
    models: dict[str, Path], kind: str, seed: int
) -> None:
    check_schedule(models[kind], seed)


def test_the_schedules_above_do_preempt_chunk_fork_and_mix(models: dict[str, Path]) -> None:
    """The test of the test: what should change nothing does happen."""
    schedules = []
    for seed in range(24):
        schedules.append(Schedule(models["full"], seed))
        schedules[-1].run()
    samples = [s for schedule in schedules for r in schedule.requests for s in r.samples]
    assert sum(len(sample.preemptions) for sample in samples) > 10
    assert sum(len(schedule.recorder.rows) for schedule in schedules) > 1000
    formats = {schedule.engine.cache.layout.format_text for schedule in schedules}
    assert formats == {"bf16", "fp32", "fp16"}
    assert len({schedule.page_size for schedule in schedules}) > 5
    assert {schedule.roomy for schedule in schedules} == {False, True}


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", ["full", "mixed", "wide"])
def test_recomputation_after_a_preemption_has_the_same_bits(
    models: dict[str, Path], kind: str
) -> None:
    engine = tiny_engine(models[kind], page_size=4, num_pages=8)
    recorder = Recorder(engine, all_rows=True)
    params = quire.SamplingParams(max_new_tokens=14, temperature=0.8, seed=3)
    prompts = [random_prompt(9, seed) for seed in range(4)]
    done = engine.generate(prompts, params)
    assert any(completion.preemptions for completion in done)
    seen: dict[tuple[Sample, int], Array] = {}
    twice = 0
    for sample, position, logits in recorder.rows:
        if (sample, position) in seen:
            twice += 1
            assert same_bits(seen[sample, position], logits)
        seen[sample, position] = logits
    assert twice > 0
    for prompt, completion in zip(prompts, done, strict=True):
        (alone,) = tiny_engine(models[kind]).generate([prompt], params)
        assert completion.token_ids == alone.token_ids


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kv_format", ["auto", "int8", "k=fp8,v=int8", "k=bf16,v=fp8"])
@pytest.mark.parametrize(("context", "sizes"), [(900, (16, 5, 48)), (257, (1, 3, 64))])
def test_logits_over_several_splits_of_keys_are_the_same_bits(
    models: dict[str, Path], context: int, sizes: tuple[int, ...], kv_format: str
) -> None:
    tokens, wide = random_prompt(context, seed=7), models["wide"]
    whole = tiny_engine(wide, page_size="whole", num_pages=1, kv_format=kv_format).logits(tokens)
    for page_size, chunk in zip(sizes, (512, 190, 33), strict=True):
        engine = tiny_engine(
            wide, page_size=page_size, num_pages=1100, max_batch_tokens=chunk, kv_format=kv_format
        )
        assert same_bits(engine.logits(tokens), whole), (page_size, chunk)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_logits_are_the_same_bits_in_any_chunks_and_pages(
    models: dict[str, Path], kind: str
) -> None:
    tokens = random_prompt(90, seed=5)
    whole = tiny_engine(models[kind], page_size="whole", num_pages=1).logits(tokens)
    for page_size, chunk in [(1, 512), (3, 1), (16, 7), (5, 16), (64, 33), ("whole", 2), (16, 89)]:
        engine = tiny_engine(
            models[kind], page_size=page_size, num_pages=96, max_batch_tokens=chunk
        )
        assert same_bits(engine.logits(tokens), whole), (page_size, chunk)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_logits_do_not_depend_on_tokens_that_follow(models: dict[str, Path], kind: str) -> None:
    engine = tiny_engine(models[kind])
    tokens = random_prompt(60, seed=6)
    whole = engine.logits(tokens)
    for length in (1, 2, 7, 15, 16, 17, 33, 59):
        assert same_bits(engine.logits(tokens[:length]), whole[:length])


@pytest.mark.usefixtures("every_backend")
def test_seeded_samples_are_the_same_in_any_company(models: dict[str, Path]) -> None:
    params = quire.SamplingParams(max_new_tokens=24, temperature=1.3, top_k=20, seed=99, n=2)
    prompt = random_prompt(12, seed=1)
    alone = tiny_engine(models["mixed"]).generate([prompt], params)
    assert alone[0].token_ids != alone[1].token_ids
    engine = tiny_engine(models["mixed"], max_batch_tokens=9, num_pages=96)
    company = [random_prompt(length, seed=length) for length in (1, 30, 17)]
    crowd = engine.generate([*company, prompt, *company], params)
    assert [c.token_ids for c in crowd[6:8]] == [c.token_ids for c in alone]


# What reference.py builds on: BLAS computes every row of a ROWS-row product alike, wherever the
# row stands and whatever stands beside it.


def neighbours(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Rows of very different sizes, zeros and subnormal numbers among them."""
    scales = np.float32(10.0) ** random.integers(-42, 12, (*shape[:-1], 1))
    rows = random.standard_normal(shape).astype(np.float32) * scales.astype(np.float32)
    rows[random.random(shape[:-1]) < 0.2] = 0
    return rows


@pytest.mark.parametrize(
    ("inner", "outer"),
    [(1, 1), (1, 9), (9, 1), (17, 3), (36, 61), (64, 256), (255, 65), (192, 576), (576, 1536)],
)
def test_a_row_of_a_linear_layer_has_the_same_bits_in_any_place_and_company(
    inner: int, outer: int
) -> None:
    random = np.random.default_rng(inner * 7919 + outer)
    backend = ReferenceBackend()
    weight = backend.weight(random.standard_normal((outer, inner)).astype(np.float32))
    row = random.standard_normal(inner).astype(np.float32)
    alone = backend.linear(row[None], weight)[0]
    for total in (1, 2, 5, ROWS, ROWS + 1, 3 * ROWS - 1, 4 * ROWS):
        company = neighbours(random, (total, inner))
        for place in {0, total - 1, *random.integers(0, total, 4).tolist()}:
            rows = company.copy()
            rows[place] = row
            assert same_bits(backend.linear(rows, weight)[place], alone), (total, place)


@pytest.mark.parametrize("dim", [2, 6, 16, 64, 80, 128])
def test_a_row_of_scores_and_of_mixed_values_has_the_same_bits_in_any_place(dim: int) -> None:
    """The two products of attention, with the shapes and strides that it uses."""
    random = np.random.default_rng(dim)
    heads = 3
    key = random.standard_normal((heads, BLOCK, dim)).astype(np.float32)
    query = random.standard_normal((heads, dim)).astype(np.float32)
    weights = random.random((heads, BLOCK)).astype(np.float32)

    def products(queries: Array, mixes: Array) -> tuple[Array, Array]:
        return (
            np.matmul(queries, key.transpose(0, 2, 1)[:, None]),
            np.matmul(mixes, key[:, None]),
        )

    queries = np.zeros((heads, 1, ROWS, dim), np.float32)
    mixes = np.zeros((heads, 1, ROWS, BLOCK), np.float32)
    queries[:, 0, 0], mixes[:, 0, 0] = query, weights
    alone = [product[:, 0, 0] for product in products(queries, mixes)]
    for tiles in (1, 2, 5):
        for place in range(ROWS):
            tile = int(random.integers(tiles))
            queries = neighbours(random, (heads, tiles + 2, ROWS, dim))
            mixes = neighbours(random, (heads, tiles + 2, ROWS, BLOCK))
            queries[:, tile + 1, place], mixes[:, tile + 1, place] = query, weights
            part = slice(1, tiles + 1)  # as attention takes the tiles that see a block
            for product, expected in zip(
                products(queries[:, part], mixes[:, part]), alone, strict=True
            ):
                assert same_bits(product[:, tile, place], expected), (tiles, tile, place)


_DIGEST = """
import hashlib
import numpy as np
from quire.backends.reference import ReferenceBackend
random = np.random.default_rng(0)
digest = hashlib.sha256()
for inner, outer in ((512, 2048), (2048, 512), (257, 1031)):
    rows = random.standard_normal((40, inner)).astype(np.float32)
    weight = random.standard_normal((outer, inner)).astype(np.float32)
    digest.update(ReferenceBackend().linear(rows, weight).tobytes())
print(digest.hexdigest())
"""


def test_linear_layers_have_the_same_bits_with_any_number_of_threads() -> None:
    source = str(Path(quire.__file__).parents[1])
    digests = set()
    for threads in ("1", "2", "3"):
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        env = {**os.environ, "PYTHONPATH": source, **dict.fromkeys(names, threads)}
        ran = subprocess.run(
            [sys.executable, "-c", _DIGEST], env=env, capture_output=True, text=True, check=True
        )
        digests.add(ran.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == hashlib.sha256().digest_size * 2
