"""Llama and its kin (Mistral, Qwen2, Qwen3): one pre-norm decoder, with the config's flags.

Llama: arXiv:2302.13971, arXiv:2407.21783; Mistral: arXiv:2310.06825; Qwen2: arXiv:2407.10671;
Qwen3: arXiv:2505.09388.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quire.backends import (
    AttentionParams,
    Backend,
    Logits,
    MlpParams,
    Network,
    Projection,
    SomeRows,
)
from quire.backends.blocks import attention_block
from quire.backends.rope import inverse_frequencies
from quire.batch import PagedBatch
from quire.config import ModelConfig
from quire.models.choosing import ChoosingStep, OfLayers
from quire.pages import PagePool

__all__ = ["Decoder"]


class Decoder:
    """params: Quire's names (see ``names.py``) to the backend's arrays."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], backend: Backend) -> None:
        assert config.rope is not None
        self.config, self.params, self.backend = config, params, backend
        self._inv_freq = inverse_frequencies(config.rope, config.head_dim)
        layers = range(config.num_layers)
        self._attention = [self._attention_params(layer) for layer in layers]
        self._blocks = [
            (backend.block(self._attention[layer]), backend.block(self._mlp_params(layer)))
            for layer in layers
        ]
        self._network = Network(
            embed=params["embed"],
            blocks=self._blocks,
            norm=params["norm"],
            norm_eps=config.norm_eps,
            head=params.get("head", params["embed"]),
        )

    def forward(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        rows: Sequence[int],
    ) -> Logits:
        """Append ``tokens`` [T] to the pools; logits float32 [len(rows), vocab] of those rows.

        ``rows`` ascend.
        """
        if len(rows) == len(tokens) and isinstance(pools, tuple):
            return self.backend.logits(tokens, self._network, batch, pools)
        tokens, rows = self.backend.take_step(tokens, batch, rows)
        return self._logits(self._layer_by_layer(tokens, batch, pools, rows))

    def forward_with(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        rows: Sequence[int],
        *,
        attend: Callable[[int, Any], Any],
        beside: Sequence[SomeRows] = (),
    ) -> Logits:
        """See :class:`quire.models.CausalLM`."""
        backend = self.backend
        tokens, rows = backend.take_step(tokens, batch, rows, beside)
        x = backend.embed(self.params["embed"], tokens)
        for layer, pool in enumerate(pools):
            mix = partial(attend, layer)
            params, group = self._attention[layer], batch.group_of_layer[layer]
            x = attention_block(backend, x, params, batch, pool, group=group, attend=mix)
            x = backend.mlp_block(x, self._blocks[layer][1])
        return self._logits(backend.rows(x, rows))

    def forward_choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Logits:
        """See :class:`quire.models.CausalLM`."""
        step = ChoosingStep(self._choosing, tuple(summaries))
        return self.backend.whole_step(step, self._network.head, tokens, batch, pools)

    def _choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Any:
        """[T] -> what the head makes logits of, [T, hidden]."""
        x = self.backend.embed(self._network.embed, tokens)
        return self._norm(self.backend.layers(x, self._blocks, batch, pools, summaries))

    def _logits(self, x: Any) -> Logits:
        backend = self.backend
        return backend.to_logits(backend.linear(self._norm(x), self._network.head))

    def _norm(self, x: Any) -> Any:
        return self.backend.rms_norm(x, self._network.norm, self._network.norm_eps)

    def _layer_by_layer(
        self, tokens: Any, batch: PagedBatch, pools: Sequence[PagePool], rows: Sequence[int]
    ) -> Any:
        """[T] -> [len(rows), hidden]; asks for each layer's pool when it comes to it."""
        backend = self.backend
        x = backend.embed(self.params["embed"], tokens)  # nobody else holds it
        for layer, pool in enumerate(pools):
            group, (attention, mlp) = batch.group_of_layer[layer], self._blocks[layer]
            if layer + 1 == len(pools) and len(rows) < batch.num_tokens:  # nobody reads the others
                x = backend.attention_rows(x, attention, batch, pool, group=group, rows=rows)
            else:
                x = backend.attention_block(x, attention, batch, pool, group)
            x = backend.mlp_block(x, mlp)
        return x

    def _projection(self, key: str) -> Projection:
        return Projection(self.params[key], self.params.get(f"{key}_bias"))

    def _attention_params(self, layer: int) -> AttentionParams:
        config, at = self.config, f"layers.{layer}."
        return AttentionParams(
            norm=self.params[at + "attn_norm"],
            norm_eps=config.norm_eps,
            q=self._projection(at + "q"),
            k=self._projection(at + "k"),
            v=self._projection(at + "v"),
            o=self._projection(at + "o"),
            q_norm=self.params[at + "q_norm"] if config.qk_norm else None,
            k_norm=self.params[at + "k_norm"] if config.qk_norm else None,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            inv_freq=self._inv_freq,
        )

    def _mlp_params(self, layer: int) -> MlpParams:
        at = f"layers.{layer}."
        return MlpParams(
            norm=self.params[at + "mlp_norm"],
            norm_eps=self.config.norm_eps,
            gate=self._projection(at + "gate"),
            up=self._projection(at + "up"),
            down=self._projection(at + "down"),
            activation=self.config.activation,
        )
