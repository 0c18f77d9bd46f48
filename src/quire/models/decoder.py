"""Llama and its kin (Mistral, Qwen2, Qwen3): one pre-norm decoder, with the config's flags.

Llama: arXiv:2302.13971, arXiv:2407.21783; Mistral: arXiv:2310.06825; Qwen2: arXiv:2407.10671;
Qwen3: arXiv:2505.09388.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.backends.rope import inverse_frequencies
from quire.batch import PagedBatch
from quire.config import ModelConfig
from quire.pages import PagePool

__all__ = ["Decoder"]


class Decoder:
    """params: Quire's names (see ``names.py``) to the backend's arrays."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], backend: Backend) -> None:
        assert config.rope is not None
        self.config, self.params, self.backend = config, params, backend
        self._inv_freq = inverse_frequencies(config.rope, config.head_dim)

    def forward(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        rows: Sequence[int],
    ) -> npt.NDArray[np.float32]:
        """Append ``tokens`` [T] to the pools; logits float32 [len(rows), vocab] of those rows."""
        backend, params = self.backend, self.params
        x = backend.embed(params["embed"], tokens)
        for layer, pool in enumerate(pools):
            x = backend.add(
                x, self._attention(layer, self._norm(f"layers.{layer}.attn_norm", x), batch, pool)
            )
            x = backend.add(x, self._mlp(layer, self._norm(f"layers.{layer}.mlp_norm", x)))
        x = self._norm("norm", backend.rows(x, rows))
        return backend.to_host(backend.linear(x, params.get("head", params["embed"])))

    def _norm(self, key: str, x: Any) -> Any:
        return self.backend.rms_norm(x, self.params[key], self.config.norm_eps)

    def _linear(self, key: str, x: Any) -> Any:
        return self.backend.linear(x, self.params[key], self.params.get(f"{key}_bias"))

    def _attention(self, layer: int, x: Any, batch: PagedBatch, pool: PagePool) -> Any:
        backend, config, at = self.backend, self.config, f"layers.{layer}."
        query = backend.heads(self._linear(at + "q", x), config.num_heads)
        key = backend.heads(self._linear(at + "k", x), config.num_kv_heads)
        value = backend.heads(self._linear(at + "v", x), config.num_kv_heads)
        if config.qk_norm:
            query, key = self._norm(at + "q_norm", query), self._norm(at + "k_norm", key)
        query = backend.rope(query, batch.positions, self._inv_freq)
        key = backend.rope(key, batch.positions, self._inv_freq)
        group = batch.group_of_layer[layer]
        backend.append(pool, batch.groups[group].slots, key, value)
        return self._linear(at + "o", backend.attend(query, pool, batch, group))

    def _mlp(self, layer: int, x: Any) -> Any:
        backend, at = self.backend, f"layers.{layer}."
        gate = backend.activate(self._linear(at + "gate", x), self.config.activation)
        return self._linear(at + "down", backend.multiply(gate, self._linear(at + "up", x)))
