"""The shape of a model, as far as bytes and operations go: matrices, heads, what a token keeps.

Wider than what Quire runs: mixtures of experts, latent attention and other families can be planned
for, too. :mod:`quire.analysis.families` reads one from ``config.json``.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from quire.layout import KVShape

__all__ = ["DTYPE_BITS", "PART_NAMES", "LayerShape", "Matrix", "ModelShape", "Part"]

Part = Literal["embeddings", "attention", "mlp", "experts", "norms", "head"]
PART_NAMES: tuple[Part, ...] = ("embeddings", "attention", "mlp", "experts", "norms", "head")

# Bits a weight, scales included. mxfp4: 32 numbers share 8 bits (OCP Microscaling Formats 1.0).
DTYPE_BITS: dict[str, Fraction] = {
    "fp32": Fraction(32),
    "bf16": Fraction(16),
    "fp16": Fraction(16),
    "fp8": Fraction(8),
    "int8": Fraction(8),
    "mxfp4": Fraction(17, 4),
    "int4": Fraction(4),
}


@dataclass(frozen=True)
class Matrix:
    """A linear layer: ``copies`` matrices [outputs, inputs], of which a token uses ``active``."""

    part: Part
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    active: int = 1

    @property
    def numbers(self) -> int:
        """Weights of all copies."""
        return self.copies * self.outputs * (self.inputs + self.bias)

    @property
    def flops(self) -> int:
        """Operations a token: a multiplication and an addition for each weight it uses."""
        return 2 * self.active * self.inputs * self.outputs

    def expected_copies(self, tokens: int) -> float:
        """Copies that ``tokens`` tokens use, if each chooses its ``active`` ones evenly."""
        if self.copies == self.active:
            return float(self.copies)
        return self.copies * (1.0 - (1.0 - self.active / self.copies) ** tokens)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    matrices     its linear layers
    vectors      weights that are no matrices: norms, attention sinks
    num_heads    query heads
    score_dim    numbers of a query that a cached key is multiplied with
    mix_dim      numbers of a cached value that are summed
    prefill_dims (score, mix) where keys and values are first expanded: latent attention
    kv           what is kept of a token
    window       most recent tokens that a query sees, itself included; None for all
    """

    matrices: tuple[Matrix, ...]
    vectors: int
    num_heads: int
    score_dim: int
    mix_dim: int
    kv: KVShape
    window: int | None = None
    prefill_dims: tuple[int, int] | None = None

    def seen(self, position: int) -> int:
        """Tokens that a query at ``position`` sees, itself included."""
        return position + 1 if self.window is None else min(position + 1, self.window)

    def attention_flops(self, seen: int, prefill: bool = False) -> int:
        """Operations of one query over ``seen`` tokens: scores, and the sum of values."""
        score, mix = (
            self.prefill_dims
            if prefill and self.prefill_dims
            else (
                self.score_dim,
                self.mix_dim,
            )
        )
        return 2 * self.num_heads * (score + mix) * seen


@dataclass(frozen=True)
class ModelShape:
    """A model.

    name, source   what it is called, and where its shape was read
    dtype          of the checkpoint (fp32, bf16 or fp16): of keys and values, and of weights
    stored         of parts whose weights the checkpoint stores in another one
    positions      rows of a learned position table; 0 without
    vectors        numbers of the last norm
    tied           the head is the embedding table
    notes          what a reader of a plan should know of it
    """

    name: str
    source: str
    dtype: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[LayerShape, ...]
    positions: int = 0
    vectors: int = 0
    tied: bool = False
    stored: tuple[tuple[Part, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer."""
        return tuple(layer.window for layer in self.layers)

    @property
    def kv(self) -> tuple[KVShape, ...]:
        """What each layer keeps of a token."""
        return tuple(layer.kv for layer in self.layers)

    @cached_property
    def head(self) -> Matrix:
        """The matrix that gives logits: a table of its own, or that of the embeddings."""
        return Matrix("head", self.hidden_size, self.vocab_size)

    @cached_property
    def layer_kinds(self) -> Counter[LayerShape]:
        """How many layers there are of each shape."""
        return Counter(self.layers)

    def matrices(self) -> Iterator[tuple[Matrix, int]]:
        """Linear layers of all decoder layers, and how many there are of each."""
        for layer, count in self.layer_kinds.items():
            for matrix in layer.matrices:
                yield matrix, count

    @cached_property
    def numbers(self) -> dict[Part, int]:
        """Weights by part; a tied head counts once, as embeddings."""
        found = dict.fromkeys(PART_NAMES, 0)
        found["embeddings"] = (self.vocab_size + self.positions) * self.hidden_size
        for matrix, count in self.matrices():
            found[matrix.part] += matrix.numbers * count
        found["norms"] = self.vectors + sum(layer.vectors for layer in self.layers)
        found["head"] = 0 if self.tied else self.head.numbers
        return found

    @property
    def total_numbers(self) -> int:
        """Weights of the whole model: its parameters."""
        return sum(self.numbers.values())

    @property
    def active_numbers(self) -> int:
        """Weights that one token uses: those of its experts only."""
        idle = sum(
            matrix.numbers * count * (matrix.copies - matrix.active) // matrix.copies
            for matrix, count in self.matrices()
        )
        return self.total_numbers - idle
