"""Decoding with a cache gives what recomputing everything gives, bit for bit.

For every architecture, page size, chunking and page format: the reference backend claims the
exactness law, so nothing here has a tolerance.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from checkpoints import VARIETY, write_checkpoint
from quire import CacheConfig, Engine, KVCache, SamplingParams
from quire.backends import create_backend
from quire.format_choice import parse_formats
from quire.layout import cache_layout
from quire.models import LoadedModel, load_model

Logits = npt.NDArray[np.float32]

PAGE_SIZES: tuple[int | str, ...] = (1, 3, 16, 64, "whole")
BACKEND = "reference"

every_model = pytest.mark.parametrize("name", VARIETY)
every_page_size = pytest.mark.parametrize("page_size", PAGE_SIZES)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(root / name, config) for name, config in VARIETY.items()}


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> dict[str, LoadedModel]:
    backend = create_backend(BACKEND)
    return {name: load_model(path, backend) for name, path in directories.items()}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 97, length).tolist()


class Runner:
    """A model over a cache, without scheduler and sampler."""

    def __init__(self, loaded: LoadedModel, page_size: int | str, kv_format: str = "fp32") -> None:
        config = loaded.config
        size = config.max_position if page_size == "whole" else int(page_size)
        formats = parse_formats(kv_format).of_layers(config.num_layers, "fp32")
        layout = cache_layout(config, size, formats)
        pages = -(-4 * config.max_position // size)
        backend = create_backend(BACKEND)
        pools = [backend.pool(shape, pages) for shape in layout.shapes]
        self.model = loaded.model
        self.cache = KVCache(layout, [pages] * len(layout.groups), pools)

    def step(self, chunks: Sequence[tuple[int, list[int]]]) -> list[Logits]:
        """One pass over (sequence, tokens) pairs; the logits of all tokens of each."""
        reservation = self.cache.reserve([(s, len(tokens)) for s, tokens in chunks])
        tokens = [token for _, chunk in chunks for token in chunk]
        batch, rows = reservation.batch, range(len(tokens))
        logits = self.model.forward(tokens, batch, self.cache.pools, rows).host()
        self.cache.commit(reservation)
        self.cache.check()
        return np.split(logits, batch.query_indptr[1:-1])

    def in_chunks(self, tokens: list[int], cuts: Sequence[int]) -> Logits:
        """The logits of ``tokens`` computed from cut to cut in a sequence of their own."""
        sequence = self.cache.create()
        parts = [self.step([(sequence, tokens[a:b])])[0] for a, b in pairwise(cuts)]
        self.cache.release(sequence)
        return np.concatenate(parts)


@every_model
@every_page_size
def test_decoding_one_by_one_equals_one_pass(
    loaded: dict[str, LoadedModel], name: str, page_size: int | str
) -> None:
    tokens = prompt(70)
    runner = Runner(loaded[name], page_size)
    at_once = runner.in_chunks(tokens, [0, 70])
    assert np.array_equal(runner.in_chunks(tokens, range(71)), at_once)


@every_model
@every_page_size
def test_decoding_equals_recomputing_every_prefix_from_nothing(
    loaded: dict[str, LoadedModel], name: str, page_size: int | str
) -> None:
    tokens = prompt(36, seed=1)
    runner = Runner(loaded[name], page_size)
    decoded = runner.in_chunks(tokens, range(37))
    anew = [runner.in_chunks(tokens[:n], [0, n])[-1] for n in range(1, 37)]
    assert np.array_equal(decoded, np.stack(anew))


@every_model
@every_page_size
@pytest.mark.parametrize("kv_format", ["bf16", "fp16"])
def test_narrow_lossless_pages_are_as_consistent(
    loaded: dict[str, LoadedModel], name: str, page_size: int | str, kv_format: str
) -> None:
    tokens = prompt(40, seed=2)
    runner = Runner(loaded[name], page_size, kv_format)
    at_once = runner.in_chunks(tokens, [0, 40])
    assert np.array_equal(runner.in_chunks(tokens, range(41)), at_once)
    wide = Runner(loaded[name], page_size).in_chunks(tokens, [0, 40])
    assert not np.array_equal(wide, at_once), "the pages did not round"


@every_model
@every_page_size
def test_chunks_pages_and_company_change_no_bit(
    loaded: dict[str, LoadedModel], name: str, page_size: int | str
) -> None:
    """Against one law for all page sizes: a single pass over whole pages."""
    tokens, other = prompt(60, seed=3), prompt(60, seed=4)
    law = Runner(loaded[name], "whole").in_chunks(tokens, [0, 60])
    runner = Runner(loaded[name], page_size)
    for cuts in ([0, 60], [0, 7, 14, 21, 60], [0, 16, 32, 48, 60], [0, 59, 60], [0, 1, 60]):
        assert np.array_equal(runner.in_chunks(tokens, cuts), law), cuts
    left, ours, right = (runner.cache.create() for _ in range(3))
    parts, at = [], 0
    for step, size in enumerate((5, 1, 17, 0, 1, 1, 20, 15)):
        chunks = [(left, other[5 * step : 5 * step + 5]), (ours, tokens[at : at + size])]
        if step % 3 == 0:
            chunks.append((right, other[step : step + 3]))
        parts.append(runner.step(chunks)[1])
        at += size
    assert np.array_equal(np.concatenate(parts), law)


@every_model
@pytest.mark.parametrize("page_size", [3, 16])
def test_forks_decode_as_if_each_were_alone(
    loaded: dict[str, LoadedModel], name: str, page_size: int
) -> None:
    shared = prompt(28, seed=5)
    texts = [shared + prompt(12, seed=6), shared + prompt(12, seed=7)]
    runner = Runner(loaded[name], page_size)
    laws = [runner.in_chunks(text, [0, 40]) for text in texts]
    first = runner.cache.create()
    runner.step([(first, shared)])
    forks = [runner.cache.fork(first), first]  # the younger one writes first
    for at in range(28, 40):
        for fork, text, law in zip(forks, texts, laws, strict=True):
            assert np.array_equal(runner.step([(fork, [text[at]])])[0][0], law[at])


@pytest.mark.parametrize("name", ["llama", "llama-mqa-tied", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("page_size", [3, 16])
def test_a_truncated_sequence_decodes_as_if_nothing_had_been_there(
    loaded: dict[str, LoadedModel], name: str, page_size: int
) -> None:
    tokens, other = prompt(30, seed=7), prompt(4, seed=8)
    runner = Runner(loaded[name], page_size)
    law = runner.in_chunks(tokens, [0, 30])
    sequence = runner.cache.create()
    runner.step([(sequence, tokens[:20])])
    runner.step([(sequence, other)])
    runner.cache.truncate(sequence, 20)
    assert np.array_equal(runner.step([(sequence, tokens[20:])])[0], law[20:])


@every_model
@every_page_size
def test_the_engine_decodes_what_its_own_scoring_says(
    directories: dict[str, Path], name: str, page_size: int | str
) -> None:
    """Greedy tokens of generate() are the argmax of logits() over the whole text, and so are the
    log-probabilities, to the last bit."""
    cache = CacheConfig(page_size=page_size, kv_memory="4MiB")  # type: ignore[arg-type]
    engine = Engine(directories[name], backend=BACKEND, cache=cache, max_batch_tokens=7)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=1)
    prompts = [prompt(11, seed=9), prompt(1, seed=10), prompt(30, seed=11)]
    for tokens, done in zip(prompts, engine.generate(prompts, params), strict=True):
        scored = engine.logits([*tokens, *done.token_ids])[len(tokens) - 1 : -1]
        assert done.token_ids == tuple(scored.argmax(axis=1).tolist())
        assert done.logprobs is not None
        wide = scored.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        wanted = -np.log(np.exp(wide).sum(axis=1))
        assert [entry.logprob for entry in done.logprobs] == wanted.tolist()


@every_model
def test_scoring_does_not_depend_on_the_step_budget(
    directories: dict[str, Path], name: str
) -> None:
    tokens = prompt(50, seed=12)
    law = None
    for budget in (1, 5, 16, 512):
        cache = CacheConfig(page_size=16, kv_memory="4MiB")
        engine = Engine(directories[name], backend=BACKEND, cache=cache, max_batch_tokens=budget)
        scored = engine.logits(tokens)
        law = scored if law is None else law
        assert np.array_equal(scored, law)
