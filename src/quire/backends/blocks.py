"""The two halves of a decoder layer as a backend sees them, and what they compute, op by op.

A backend that can do a half in one call saves passes over memory and calls from Python; these
compositions say what it must give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.base import Backend, HostArray, Logits, Summaries
from quire.batch import GroupBatch, PagedBatch
from quire.pages import PagePool

__all__ = [
    "AttentionParams",
    "MlpParams",
    "Network",
    "Projection",
    "attend_chosen",
    "attention_block",
    "attention_rows",
    "choosing",
    "choosing_layers",
    "keep",
    "logits",
    "mlp_block",
    "turned",
]

Array = Any


@dataclass(frozen=True)
class Projection:
    """A linear layer: weight [out, in] and bias [out] or None, both the backend's own."""

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True)
class AttentionParams:
    """Pre-norm attention with rotary embedding (H query and G KV heads of D numbers).

    norm, norm_eps   RMS norm before the projections, [hidden]
    q, k, v, o       [H * D, hidden], [G * D, hidden], [G * D, hidden], [hidden, H * D]
    q_norm, k_norm   RMS norms of each head's queries and keys, [D], or None (Qwen3)
    inv_freq         float32 [D / 2], radians a token
    """

    norm: Array
    norm_eps: float
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    q_norm: Array | None
    k_norm: Array | None
    num_heads: int
    num_kv_heads: int
    inv_freq: npt.NDArray[np.float32]


@dataclass(frozen=True)
class MlpParams:
    """Pre-norm gated MLP: ``down(activation(gate(x)) * up(x))``, inner size F.

    gate, up   [F, hidden]; down [hidden, F]
    """

    norm: Array
    norm_eps: float
    gate: Projection
    up: Projection
    down: Projection
    activation: str


@dataclass(frozen=True, eq=False)
class Network:
    """A decoder as a whole: embedding, layers, norm and head.

    embed, head   [vocab, hidden]
    blocks        each layer's attention and MLP half, as the backend's ``block`` gave them
    """

    embed: Array
    blocks: Sequence[tuple[Any, Any]]
    norm: Array
    norm_eps: float
    head: Array


def _linear(backend: Backend, x: Array, projection: Projection) -> Array:
    return backend.linear(x, projection.weight, projection.bias)


def turned(backend: Backend, x: Array, pool: PagePool) -> Array:
    """Keys, or queries, x [T, heads, D] as ``pool`` wants them: rotated if its keys are."""
    return backend.hadamard(x) if pool.shape.rotated else x


def keep(backend: Backend, pool: PagePool, tables: GroupBatch, key: Array, value: Array) -> None:
    """Append key and value [T, G, D] of a step, and seal the pages that they complete.

    Keys are turned first where the pool's are rotated; queries are to be, by :func:`turned`.
    """
    backend.append(pool, tables.slots, turned(backend, key, pool), value)
    if len(tables.open.seal_from):
        pool.seal(tables.open.seal_from, tables.open.seal_to)


def _keep(
    backend: Backend,
    normed: Array,
    params: AttentionParams,
    batch: PagedBatch,
    pool: PagePool,
    *,
    group: int,
) -> None:
    """Put the keys and values of normed [T, hidden] into the pool."""
    key = backend.heads(_linear(backend, normed, params.k), params.num_kv_heads)
    value = backend.heads(_linear(backend, normed, params.v), params.num_kv_heads)
    if params.k_norm is not None:
        key = backend.rms_norm(key, params.k_norm, params.norm_eps)
    key = backend.rope(key, batch.positions, params.inv_freq)
    keep(backend, pool, batch.groups[group], key, value)


def _mix(
    backend: Backend,
    normed: Array,
    params: AttentionParams,
    batch: PagedBatch,
    pool: PagePool,
    *,
    group: int,
    attend: Callable[[Array], Array] | None = None,
) -> Array:
    """What attention gives for the tokens of ``batch``, normed [T, hidden] -> [T, hidden]."""
    query = backend.heads(_linear(backend, normed, params.q), params.num_heads)
    if params.q_norm is not None:
        query = backend.rms_norm(query, params.q_norm, params.norm_eps)
    query = turned(backend, backend.rope(query, batch.positions, params.inv_freq), pool)
    mixed = backend.attend(query, pool, batch, group) if attend is None else attend(query)
    return _linear(backend, mixed, params.o)


def attention_block(
    backend: Backend,
    x: Array,
    params: AttentionParams,
    batch: PagedBatch,
    pool: PagePool,
    *,
    group: int,
    attend: Callable[[Array], Array] | None = None,
) -> Array:
    """x [T, hidden] -> x + attention(norm(x)); the new keys and values go into the pool.

    ``attend`` takes the place of the backend's: queries [T, H, D] -> [T, H * D], when the keys are
    there. Queries come turned where the pool's keys are rotated, so that both can be compared.
    """
    normed = backend.rms_norm(x, params.norm, params.norm_eps)
    _keep(backend, normed, params, batch, pool, group=group)
    return backend.add(x, _mix(backend, normed, params, batch, pool, group=group, attend=attend))


def attention_rows(
    backend: Backend,
    x: Array,
    params: AttentionParams,
    batch: PagedBatch,
    pool: PagePool,
    *,
    group: int,
    rows: Sequence[int] | HostArray,
) -> Array:
    """Rows ``rows`` (ascending) of what :func:`attention_block` gives, [R, hidden]; fills the pool.

    In a model's last layer only rows whose logits are wanted matter, but all keys and values.
    """
    normed = backend.rms_norm(x, params.norm, params.norm_eps)
    _keep(backend, normed, params, batch, pool, group=group)
    if not len(rows):
        return backend.rows(x, rows)
    some = backend.select(batch, rows)
    mixed = _mix(backend, backend.rows(normed, rows), params, some, pool, group=group)
    return backend.add(backend.rows(x, rows), mixed)


def mlp_block(backend: Backend, x: Array, params: MlpParams) -> Array:
    """x [T, hidden] -> x + down(activation(gate(norm(x))) * up(norm(x)))."""
    normed = backend.rms_norm(x, params.norm, params.norm_eps)
    gate = backend.activate(_linear(backend, normed, params.gate), params.activation)
    inner = backend.multiply(gate, _linear(backend, normed, params.up))
    return backend.add(x, _linear(backend, inner, params.down))


def attend_chosen(
    backend: Backend, query: Array, pool: PagePool, batch: PagedBatch, summaries: Summaries
) -> Array:
    """Attention of queries [S, H, D] over what they choose of the batch's candidates."""
    assert batch.candidates is not None
    chosen = backend.choose_pages(query, summaries, batch.candidates)
    return backend.attend_pages(query, pool, chosen)


def choosing_layers(
    backend: Backend,
    x: Array,
    blocks: Sequence[tuple[AttentionParams, Any]],
    batch: PagedBatch,
    pools: Sequence[PagePool],
    *,
    summaries: Sequence[Summaries | None],
) -> Array:
    """Decoder layers of which some choose what they read, [T, hidden] -> [T, hidden].

    ``blocks``: each layer's parameters, and its MLP half as the backend's ``block`` gave it.
    """
    layers = zip(blocks, pools, batch.group_of_layer, summaries, strict=True)
    for (params, mlp), pool, group, known in layers:
        attend = None if known is None else choosing(backend, pool, batch, known)
        x = attention_block(backend, x, params, batch, pool, group=group, attend=attend)
        x = backend.mlp_block(x, mlp)
    return x


def choosing(
    backend: Backend, pool: PagePool, batch: PagedBatch, summaries: Summaries
) -> Callable[[Array], Array]:
    """:func:`attend_chosen` of a layer's queries, in the place of attention to all pages."""
    return lambda query: attend_chosen(backend, query, pool, batch, summaries)


def logits(
    backend: Backend,
    tokens: Sequence[int],
    network: Network,
    batch: PagedBatch,
    pools: Sequence[PagePool],
) -> Logits:
    """Tokens [T] of a step -> what follows each of them, float32 [T, vocab]."""
    x = backend.layers(backend.embed(network.embed, tokens), network.blocks, batch, pools)
    normed = backend.rms_norm(x, network.norm, network.norm_eps)
    return backend.to_logits(backend.linear(normed, network.head))
