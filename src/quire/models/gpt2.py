"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, plain MLP, biases everywhere."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quire.backends import Backend, Logits, SomeRows, choosing, keep, turned
from quire.batch import PagedBatch
from quire.config import ModelConfig
from quire.models.choosing import ChoosingStep, OfLayers
from quire.pages import PagePool

__all__ = ["GPT2"]


class GPT2:
    """params: Quire's names (see ``names.py``) to the backend's arrays."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], backend: Backend) -> None:
        self.config, self.params, self.backend = config, params, backend
        self._head = params.get("head", params["embed"])

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
            return self.backend.whole_step(self._hidden, self._head, tokens, batch, pools)
        tokens, rows = self.backend.take_step(tokens, batch, rows)
        x = self._embed(tokens, batch)
        for layer, pool in enumerate(pools):
            if layer + 1 == len(pools) and len(rows) < batch.num_tokens:  # nobody reads the others
                x = self._layer_rows(layer, x, batch, pool, rows)
            else:
                x = self._layer(layer, x, batch, pool)
        return self._logits(x)

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
        x = self._embed(tokens, batch)
        for layer, pool in enumerate(pools):
            x = self._layer(layer, x, batch, pool, partial(attend, layer))
        return self._logits(backend.rows(x, rows))

    def forward_choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Logits:
        """See :class:`quire.models.CausalLM`."""
        step = ChoosingStep(self._hidden, tuple(summaries))
        return self.backend.whole_step(step, self._head, tokens, batch, pools)

    def _hidden(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers = (),
    ) -> Any:
        """[T] -> what the head makes logits of, [T, hidden]."""
        x = self._embed(tokens, batch)
        for layer, pool in enumerate(pools):
            known = summaries[layer] if summaries else None
            attend = None if known is None else choosing(self.backend, pool, batch, known)
            x = self._layer(layer, x, batch, pool, attend)
        return self._norm("norm", x)

    def _embed(self, tokens: Sequence[int], batch: PagedBatch) -> Any:
        """[T] -> [T, hidden]."""
        backend, params = self.backend, self.params
        at = backend.embed(params["positions"], batch.positions)
        return backend.add(backend.embed(params["embed"], tokens), at)

    def _layer(
        self,
        layer: int,
        x: Any,
        batch: PagedBatch,
        pool: PagePool,
        attend: Callable[[Any], Any] | None = None,
    ) -> Any:
        """[T, hidden] -> [T, hidden]; ``attend`` in the place of the backend's."""
        normed = self._keep(layer, x, batch, pool)
        return self._mix(layer, x, normed, batch, pool, attend=attend)

    def _layer_rows(
        self, layer: int, x: Any, batch: PagedBatch, pool: PagePool, rows: Sequence[int]
    ) -> Any:
        """Rows ``rows`` of what :meth:`_layer` gives, [R, hidden]; keys and values of all."""
        backend = self.backend
        normed = self._keep(layer, x, batch, pool)
        x, normed = backend.rows(x, rows), backend.rows(normed, rows)
        if not len(rows):
            return x
        return self._mix(layer, x, normed, backend.select(batch, rows), pool)

    def _keep(self, layer: int, x: Any, batch: PagedBatch, pool: PagePool) -> Any:
        """Put keys and values of x [T, hidden] into the pool; gives x normed, as they meet it."""
        backend, heads, at = self.backend, self.config.num_heads, f"layers.{layer}."
        normed = self._norm(at + "attn_norm", x)
        key, value = (backend.heads(self._linear(at + name, normed), heads) for name in "kv")
        keep(backend, pool, batch.groups[batch.group_of_layer[layer]], key, value)
        return normed

    def _mix(
        self,
        layer: int,
        x: Any,
        normed: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        attend: Callable[[Any], Any] | None = None,
    ) -> Any:
        """x [T, hidden] -> [T, hidden]: attention and MLP, when keys and values are there."""
        backend, at = self.backend, f"layers.{layer}."
        query = backend.heads(self._linear(at + "q", normed), self.config.num_heads)
        query, group = turned(backend, query, pool), batch.group_of_layer[layer]
        mixed = backend.attend(query, pool, batch, group) if attend is None else attend(query)
        x = backend.add(x, self._linear(at + "o", mixed))
        return backend.add(x, self._mlp(at, self._norm(at + "mlp_norm", x)))

    def _logits(self, x: Any) -> Logits:
        """[R, hidden] -> [R, vocab]."""
        x = self.backend.linear(self._norm("norm", x), self._head)
        return self.backend.to_logits(x)

    def _norm(self, key: str, x: Any) -> Any:
        weight, bias = self.params[key], self.params[f"{key}_bias"]
        return self.backend.layer_norm(x, weight, bias, self.config.norm_eps)

    def _linear(self, key: str, x: Any) -> Any:
        return self.backend.linear(x, self.params[key], self.params[f"{key}_bias"])

    def _mlp(self, at: str, x: Any) -> Any:
        hidden = self.backend.activate(self._linear(at + "up", x), self.config.activation)
        return self._linear(at + "down", hidden)
