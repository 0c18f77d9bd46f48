"""GPT-2 end to end: transformers' own cache and ours give the same text."""

from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_config, write_with_transformers
from quire import CacheConfig, Engine, SamplingParams
from quire.backends import backend_status

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTHS = (4, 31, 1, 17)
NEW = 50


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("gpt2", n_embd=48, n_head=6, n_layer=3)
    return write_with_transformers(tmp_path_factory.mktemp("gpt2"), config)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def theirs(directory: Path, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """One batch, padded on the left as generate() wants it, through transformers' cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    longest = max(LENGTHS)
    padded = [[0] * (longest - len(tokens)) + tokens for tokens in prompts]
    mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts]
    out = model.eval().generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        use_cache=True,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [tuple(row) for row in out[:, longest:].tolist()]


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, "whole"])
@pytest.mark.parametrize("max_batch_tokens", [5, 512])
@pytest.mark.parametrize("backend", [s.name for s in backend_status() if s.available])
def test_a_batch_of_four_gets_the_same_50_greedy_tokens(
    directory: Path,
    prompts: list[list[int]],
    theirs: list[tuple[int, ...]],
    page_size: int | str,
    max_batch_tokens: int,
    backend: str,
) -> None:
    cache = CacheConfig(page_size=page_size, kv_memory="8MiB")  # type: ignore[arg-type]
    engine = Engine(directory, backend=backend, cache=cache, max_batch_tokens=max_batch_tokens)
    done = engine.generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [completion.token_ids for completion in done] == theirs
    assert [completion.prompt_tokens for completion in done] == list(LENGTHS)
    assert {completion.finish_reason for completion in done} == {"length"}
    assert all(len(tokens) == NEW for tokens in theirs)


def test_the_text_is_worth_comparing(theirs: list[tuple[int, ...]]) -> None:
    assert len({token for tokens in theirs for token in tokens}) >= 10
    assert len(set(theirs)) == len(theirs)
