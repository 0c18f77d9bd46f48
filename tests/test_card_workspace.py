"""What a plan says of a step on a card, against what a card in software is asked for.

Real sizes of everything but the number of layers; nothing is computed, so a token is any. The card
hands memory out as torch does. Collected where triton compiles (conftest.py).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from quire.analysis.families import read_shape
from softcard.runtime import Runtime
from softcard.whole import whole_card

TENSORS = ("activations", "partials", "rotary", "logits")
SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 32_000,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 8192,
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_layer": 2, "n_head": 12, "n_positions": 4096, "vocab_size": 32_000}
MODELS: dict[str, dict[str, Any]] = {
    "llama": tiny_config("llama", **SIZES),
    "mistral": tiny_config("mistral", **SIZES, sliding_window=1000),
    "gpt2": tiny_config("gpt2", **GPT2),
}


@dataclass
class Counted:
    """An engine on a card, and the bytes that it asked for beside what it began with."""

    engine: quire.Engine
    runtime: Runtime
    began: int

    @property
    def most(self) -> int:
        return self.runtime.memory.most - self.began

    @property
    def planned(self) -> dict[str, int]:
        """Bytes that the engine's plan has for tensors of a step, by kind."""
        planned = asdict(self.engine.plan.memory.workspace)
        return {kind: planned[kind] for kind in TENSORS}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(root / name, like, dtype="fp32" if name == "gpt2" else "bf16")
        for name, like in MODELS.items()
    }


def counted(
    directory: Path, backend: str, chunk: int, sequences: int, kv_format: str = "bf16"
) -> Iterator[Counted]:
    with whole_card(90, total=64 << 30, processors=132, computes=False) as runtime:
        cache = quire.CacheConfig(kv_memory="1GiB", prefix_cache=False, kv_format=kv_format)
        engine = quire.Engine(
            directory,
            backend=backend,
            cache=cache,
            max_batch_tokens=chunk,
            max_sequences=sequences,
        )
        memory = runtime.memory
        memory.most = memory.used
        yield Counted(engine, runtime, memory.used)
        engine.close()


def traffic(engine: quire.Engine) -> None:
    """A long prompt alone; then one in chunks beside all others, which decode on."""
    longest, chunk = engine.model_config.max_position, engine.config.max_batch_tokens
    others = engine.config.max_sequences - 1
    few = quire.SamplingParams(max_new_tokens=2, ignore_eos=True)
    engine.generate([[7] * (longest - 3)], few)
    many = replace(few, max_new_tokens=longest // (chunk - others) + 40)
    for nth in range(others):
        engine.submit([5 + nth] * 3, many)
    for _ in range(4):
        engine.step()
    engine.submit([7] * (longest - 8), replace(few, max_new_tokens=6))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize(
    ("model", "backend", "kv_format"),
    [
        ("llama", "cuda", "bf16"),
        ("llama", "cuda", "int4"),
        ("llama", "cuda-exact", "bf16"),
        ("mistral", "cuda-exact", "bf16"),
        ("gpt2", "cuda", "bf16"),
        ("gpt2", "cuda-exact", "bf16"),
    ],
)
def test_no_traffic_takes_more_than_is_planned(
    checkpoints: dict[str, Path], model: str, backend: str, kv_format: str
) -> None:
    for sizes in ((512, 33), (2048, 128)):
        for each in counted(checkpoints[model], backend, *sizes, kv_format):
            traffic(each.engine)
            assert each.most <= sum(each.planned.values()), each.planned


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_long_prefill_takes_what_is_planned(checkpoints: dict[str, Path], model: str) -> None:
    """Nearly all of the plan is one step, whose tensors can be added up to the number."""
    longest = read_shape(checkpoints[model]).max_position
    for each in counted(checkpoints[model], "cuda", longest, 1):
        traffic(each.engine)
        planned = sum(each.planned.values())
        assert 0.97 * planned < each.most <= planned


def test_the_plan_has_the_backends_own_sizes() -> None:
    """Written down twice: a plan imports neither torch nor triton."""
    from quire.analysis import card_workspace as planned
    from quire.backends.cuda import attending, graphs, layer, products, sampling, tiles, transfer

    assert planned.SPLIT == tiles.SPLIT
    assert planned.BUCKET == graphs.MOST
    assert planned.WAVES == attending._WAVES
    assert planned.HALF == layer._ROWS
    assert products._TILES["SPAN"] == planned.SPAN
    assert products._TILES["BLOCK_M"] * products._TILES["BLOCK_N"] == planned.PRODUCT
    assert planned.DRAWN == sampling.CHUNK
    assert (planned.SLOT, planned.SLOTS) == (transfer.SLOT, 2 * transfer.DEPTH)
