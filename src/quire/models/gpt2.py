"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, plain MLP, biases everywhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.backends import Backend, Logits, SomeRows, attend_chosen, keep, turned
from quire.batch import PagedBatch
from quire.config import ModelConfig
from quire.models.choosing import ChoosingStep, OfLayers
from quire.pages import PagePool

__all__ = ["GPT2"]


class GPT2:
    """params: Quire's names (see ``names.py``) to the backend's arrays."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], backend: Backend) -> None:
        self.config, self.params, self.backend = config, params, backend

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
            return self.backend.whole_step(self._logits, tokens, batch, pools)
        asked = self.backend.take_step(tokens, batch, rows)
        return self.backend.to_logits(self._run(asked, batch, pools, self._attending(batch)))

    def _logits(self, tokens: Sequence[int], batch: PagedBatch, pools: Sequence[PagePool]) -> Any:
        """[T] -> [T, vocab], the backend's own."""
        return self._run((tokens, range(len(tokens))), batch, pools, self._attending(batch))

    def _attending(self, batch: PagedBatch) -> Callable[[int, Any, PagePool], Any]:
        groups = batch.group_of_layer

        def attend(layer: int, query: Any, pool: PagePool) -> Any:
            return self.backend.attend(query, pool, batch, groups[layer])

        return attend

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
        asked = self.backend.take_step(tokens, batch, rows, beside)
        mixed = self._run(asked, batch, pools, lambda layer, q, _: attend(layer, q))
        return self.backend.to_logits(mixed)

    def forward_choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Logits:
        """See :class:`quire.models.CausalLM`."""
        step = ChoosingStep(self._choosing, tuple(summaries))
        return self.backend.whole_step(step, tokens, batch, pools)

    def _choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Any:
        """[T] -> [T, vocab], the backend's own."""
        whole = self._attending(batch)

        def attend(layer: int, query: Any, pool: PagePool) -> Any:
            known = summaries[layer]
            if known is None:
                return whole(layer, query, pool)
            return attend_chosen(self.backend, query, pool, batch, known)

        return self._run((tokens, range(len(tokens))), batch, pools, attend)

    def _run(
        self,
        asked: tuple[Sequence[int], Sequence[int]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        attend: Callable[[int, Any, PagePool], Any],
    ) -> Any:
        """Logits [R, vocab]. ``asked``: tokens [T], and which of them want logits."""
        backend, params, (tokens, rows) = self.backend, self.params, asked
        at = backend.embed(params["positions"], batch.positions)
        x = backend.add(backend.embed(params["embed"], tokens), at)
        for layer, pool in enumerate(pools):
            at = f"layers.{layer}."
            query = self._place(layer, self._norm(at + "attn_norm", x), batch, pool)
            mixed = attend(layer, query, pool)
            x = backend.add(x, self._linear(at + "o", mixed))
            x = backend.add(x, self._mlp(at, self._norm(at + "mlp_norm", x)))
        x = self._norm("norm", backend.rows(x, rows))
        return backend.linear(x, params.get("head", params["embed"]))

    def _norm(self, key: str, x: Any) -> Any:
        weight, bias = self.params[key], self.params[f"{key}_bias"]
        return self.backend.layer_norm(x, weight, bias, self.config.norm_eps)

    def _linear(self, key: str, x: Any) -> Any:
        return self.backend.linear(x, self.params[key], self.params[f"{key}_bias"])

    def _place(self, layer: int, x: Any, batch: PagedBatch, pool: PagePool) -> Any:
        """Put keys and values of x [T, hidden] into the pool; its queries [T, H, D]."""
        backend, heads, at = self.backend, self.config.num_heads, f"layers.{layer}."
        query, key, value = (backend.heads(self._linear(at + name, x), heads) for name in "qkv")
        group = batch.group_of_layer[layer]
        keep(backend, pool, batch.groups[group], key, value)
        return turned(backend, query, pool)

    def _mlp(self, at: str, x: Any) -> Any:
        hidden = self.backend.activate(self._linear(at + "up", x), self.config.activation)
        return self._linear(at + "down", hidden)
