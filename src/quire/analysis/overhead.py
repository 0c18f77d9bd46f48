"""What a step of the engine takes outside its operations, measured with two tiny models."""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from quire.backends.native import NativeBackend
from quire.config import CacheConfig
from quire.engine import Engine, SamplingParams
from quire.models import resolve_model

__all__ = ["Overhead", "measure_overheads"]

BF16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step outside its operations: fixed, for each sequence, for each layer."""

    step: float
    sequence: float
    layer: float

    def of(self, layers: int, sequences: int) -> float:
        """Of one step."""
        return max(0.0, self.step + self.sequence * sequences + self.layer * layers)


def measure_overheads(
    backend: NativeBackend, cold: int, *, text: bool
) -> tuple[Overhead, Overhead]:
    """Of steps that decode, and of those that prefill: two tiny models, one and many sequences.

    Between steps ``cold`` bytes are read, as a model does, which leaves little of the engine's own
    code and books in the processor's caches. With ``text`` tokens become text, by quill's
    tokenizer.
    """
    few, many, layers = 1, 16, (2, 10)
    decode, prefill = {}, {}
    for count in layers:
        with tempfile.TemporaryDirectory() as directory:
            _write_tiny(Path(directory), count, text)
            for sequences in (few, many):
                decode[count, sequences] = _decode_step(directory, backend, sequences, cold)
            prefill[count] = _prefill_step(directory, backend, cold)
    first, last = layers
    per_layer = (decode[last, few] - decode[first, few]) / (last - first)
    per_sequence = (decode[first, many] - decode[first, few]) / (many - few)
    fixed = decode[first, few] - first * per_layer - few * per_sequence
    layer = (prefill[last] - prefill[first]) / (last - first)
    begin = prefill[first] - first * layer - per_sequence
    return Overhead(fixed, per_sequence, per_layer), Overhead(begin, per_sequence, layer)


def _write_tiny(directory: Path, layers: int, text: bool) -> None:
    """A checkpoint with nothing to compute."""
    if text:
        for path in resolve_model(None).glob("tokenizer*.json"):
            shutil.copy(path, directory)
    hidden, vocab = 32, 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": hidden,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    square, row = np.ones((hidden, hidden), BF16), np.ones(hidden, BF16)
    tensors = {"model.embed_tokens.weight": np.ones((vocab, hidden), BF16)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            tensors[f"{at}self_attn.{name}_proj.weight"] = square
        for name in ("gate", "up", "down"):
            tensors[f"{at}mlp.{name}_proj.weight"] = square
        tensors[f"{at}input_layernorm.weight"] = row
        tensors[f"{at}post_attention_layernorm.weight"] = row
    tensors["model.norm.weight"] = row
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors")


def _tiny_engine(directory: str, backend: NativeBackend, chunk: int) -> Engine:
    cache = CacheConfig(num_pages=1024, prefix_cache=False)
    return Engine(
        resolve_model(directory),
        backend=backend.name,
        threads=backend.threads,
        cache=cache,
        max_batch_tokens=chunk,
    )


def _steps(engine: Engine, backend: NativeBackend, cold: int) -> list[float]:
    """Seconds of each step."""
    found, buffer = [], np.ones(cold >> 20 << 20, np.uint8)
    while engine.has_work:
        backend.probe_read(buffer)
        started = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - started)
    return found


def _decode_step(directory: str, backend: NativeBackend, sequences: int, cold: int) -> float:
    engine = _tiny_engine(directory, backend, 512)
    for _ in range(sequences):
        engine.submit([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    return statistics.median(_steps(engine, backend, cold)[2:])


def _prefill_step(directory: str, backend: NativeBackend, cold: int) -> float:
    engine = _tiny_engine(directory, backend, 2)
    engine.submit([1] * 200, SamplingParams(max_new_tokens=1))
    return statistics.median(_steps(engine, backend, cold)[1:-1])
