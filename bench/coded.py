"""Keys and values coded in any way, read back by dense attention: experiments, not an engine.

A passage goes through a model in one step on the reference backend's ops. Attention sees keys and
values as a recipe gives them back, so that a coding need not be one that engines store. As page
formats that store whole pages have it, only finished pages of 32 tokens are coded: what a query
sees of its own page is bf16, as everything is in the exact cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.backends.reference import ReferenceBackend
from quire.batch import GroupBatch, PagedBatch
from quire.formats import GROUP, PAGE_FORMATS, Coding
from quire.models import load_model

__all__ = ["EXACT", "Code", "CodedModel", "Recipe", "by_channel", "by_token", "hadamard", "rotated"]

Array = npt.NDArray[Any]
Code = Callable[[Array], Array]  # float32 [tokens, heads, dim] -> as read back; whole pages

ROWS = 256  # queries at a time, whole pages


@dataclass(frozen=True)
class Recipe:
    """How keys and values are coded.

    keep_first   the first page stays bf16, as in formats that store whole pages
    every_token  unfinished pages are coded, too, as in formats that store each token on its own
    """

    name: str
    key: Code
    value: Code
    keep_first: bool = True
    every_token: bool = False


def _exact(numbers: Array) -> Array:
    return numbers


EXACT = Recipe("bf16", _exact, _exact)


def by_token(format: str) -> Code:
    """Numbers of one token and head share a scale; of int4 and int2, 32 of them: as values do."""
    return _read_back(PAGE_FORMATS[format].value)


def by_channel(format: str) -> Code:
    """32 tokens of one channel share a scale, as keys of int4 and int2 do."""
    if PAGE_FORMATS[format].kind == "page":
        return _read_back(PAGE_FORMATS[format].key)
    alone = by_token(format)

    def code(numbers: Array) -> Array:
        groups = numbers.reshape(-1, GROUP, *numbers.shape[1:])
        return np.moveaxis(alone(np.moveaxis(groups, 1, -1)), -1, 1).reshape(numbers.shape)

    return code


def rotated(code: Code) -> Code:
    """Each head is turned by a Hadamard matrix before it is coded, and back afterwards.

    Turning queries as keys are (QuaRot: Ashkboos et al., 2024, arXiv:2404.00456) gives the same
    scores as turning keys back; of values, the output would be turned back.
    """

    def turned(numbers: Array) -> Array:
        turn = hadamard(numbers.shape[-1])
        return code(numbers @ turn) @ turn.T

    return turned


def hadamard(dim: int) -> Array:
    """Sylvester's orthogonal matrix, float32 [dim, dim]; dim is a power of two."""
    turn = np.ones((1, 1), np.float32)
    while len(turn) < dim:
        turn = np.block([[turn, turn], [turn, -turn]])
    return turn / np.float32(np.sqrt(dim))


def _read_back(coding: Coding) -> Code:
    def code(numbers: Array) -> Array:
        return coding.decode(coding.encode(numbers), numbers.shape[-1])

    return code


class CodedModel:
    """A model of Quire's, run over whole passages with a recipe."""

    def __init__(self, directory: Path) -> None:
        self.backend = _CodedBackend()
        self._loaded = load_model(directory, self.backend)
        self._layers = self._loaded.config.num_layers

    def logits(self, tokens: Sequence[int], recipe: Recipe) -> npt.NDArray[np.float32]:
        """Logits float32 [tokens, vocab] after each of ``tokens``, in one step."""
        self.backend.recipe = recipe
        return self._loaded.model.forward(
            tokens, _one_sequence(len(tokens), self._layers), self._pools(), range(len(tokens))
        ).host()

    def numbers(self, tokens: Sequence[int]) -> Iterator[tuple[Array, Array, Array]]:
        """Queries, keys (both with RoPE) and values of each layer: float32 [tokens, heads, dim]."""
        self.backend.recipe, pools = EXACT, self._pools()
        batch, queries = _one_sequence(len(tokens), self._layers), []
        self._loaded.model.forward_watched(
            tokens, batch, pools, [], lambda _, query: queries.append(query)
        )
        for query, pool in zip(queries, pools, strict=True):
            yield query, pool.key, pool.value

    def _pools(self) -> list[Any]:
        return [_Numbers() for _ in range(self._layers)]


class _Numbers:
    """Keys and values of a layer, bf16 as float32 [tokens, heads, dim]."""

    key: Array
    value: Array


class _CodedBackend(ReferenceBackend):
    recipe = EXACT

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """[T, in], [out, in], [out] -> [T, out], in any order of summation."""
        out: Array = x @ weight.T
        return out if bias is None else out + bias

    def append(self, pool: Any, slots: Array, key: Array, value: Array) -> None:
        """Keep a whole passage."""
        pool.key, pool.value = (
            numbers.astype(ml_dtypes.bfloat16).astype(np.float32) for numbers in (key, value)
        )

    def attend(self, query: Array, pool: Any, batch: PagedBatch, group: int) -> Array:
        """[T, H, D] -> [T, H * D] over what the recipe gives back of the pool."""
        tokens, num_heads, dim = query.shape
        share = num_heads // pool.key.shape[1]
        key, value = (_by_head(numbers, share) for numbers in (pool.key, pool.value))
        coded_key, coded_value = (
            _by_head(self._coded(numbers, code), share)
            for numbers, code in ((pool.key, self.recipe.key), (pool.value, self.recipe.value))
        )
        out = np.empty((num_heads, tokens, value.shape[-1]), np.float32)
        queries = query.transpose(1, 0, 2) * np.float32(dim**-0.5)
        for start in range(0, tokens, ROWS):
            rows = slice(start, min(start + ROWS, tokens))
            seen = (rows.start, rows.stop)
            at = np.arange(*seen)
            own = at[:, None] // GROUP == at // GROUP
            if self.recipe.every_token:
                own &= False
            scores = queries[:, rows] @ coded_key[:, : rows.stop].transpose(0, 2, 1)
            near = queries[:, rows] @ key[:, rows].transpose(0, 2, 1)
            block = np.where(own, near, scores[..., rows])
            scores[..., rows] = np.where(at <= at[:, None], block, np.float32(-np.inf))
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = scores @ coded_value[:, : rows.stop]
            mixed += (scores[..., rows] * own) @ (value - coded_value)[:, rows]
            out[:, rows] = mixed / scores.sum(axis=-1, keepdims=True)
        return out.transpose(1, 0, 2).reshape(tokens, -1)

    def _coded(self, numbers: Array, code: Code) -> Array:
        """``numbers`` [tokens, heads, dim] as read back; tokens of a last, unfinished page too."""
        tokens = len(numbers)
        fill = [(0, -tokens % GROUP), (0, 0), (0, 0)]
        out = code(np.pad(numbers, fill, mode="edge"))[:tokens].astype(np.float32)
        if self.recipe.keep_first:
            out[:GROUP] = numbers[:GROUP]
        return out


def _by_head(numbers: Array, share: int) -> Array:
    """[tokens, kv heads, dim] -> [heads, tokens, dim]."""
    return np.repeat(numbers.transpose(1, 0, 2), share, axis=0)


def _one_sequence(tokens: int, layers: int) -> PagedBatch:
    at, zero, one = np.arange(tokens), np.zeros(1, np.int64), np.array([0, 1])
    last = np.array([tokens])
    group = GroupBatch(tokens, None, at, one, zero, last, zero)
    return PagedBatch(at, np.array([0, tokens]), (group,), (0,) * layers)
