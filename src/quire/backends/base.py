"""The protocol between models and numbers: pool storage and the kernels of a forward pass.

T is the number of new tokens in a step (all sequences, packed), H query heads, G KV heads, D
head_dim. An ``Array`` is whatever the backend computes with; only the backend looks inside.
Activations are the backend's own precision (float32 on ``reference``).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from quire.batch import Candidates, ChosenPages, PagedBatch
from quire.pages import PageFormat, PagePool, PageShape
from quire.sampling import Ask, Choice

__all__ = [
    "Ahead",
    "Array",
    "Backend",
    "Compute",
    "HostArray",
    "Logits",
    "SomeRows",
    "Summaries",
]

Array: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]
SomeRows: TypeAlias = tuple[HostArray, PagedBatch]
Compute: TypeAlias = Callable[[Sequence[int], PagedBatch, Sequence[PagePool]], Array]


class Ahead(Protocol):
    """Tokens that a device chooses, for a next step there, before the host knows them."""

    @property
    def tokens(self) -> Array:
        """[n], in the place of the ids that a model's ``forward`` takes."""

    def take(self) -> list[Choice]:
        """The same for the host; waits for them, and for nothing that was queued behind."""


class Logits(Protocol):
    """Rows of logits, float32 [n, vocab], where the backend computed them, perhaps not yet.

    They are there until the backend computes others; what :meth:`host` gave stays.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(n, vocab)."""

    def host(self) -> npt.NDArray[np.float32]:
        """All of them in NumPy, [n, vocab]; they are fetched once. Not to be written to."""

    def row(self, nth: int) -> npt.NDArray[np.float32]:
        """One of them in NumPy, [vocab]. Not to be written to."""

    def choose(self, asked: Sequence[Ask]) -> list[Choice]:
        """The next token of each that asks, in order, as :func:`quire.sampler.decide` has it.

        A backend that adds up in another order may choose the token beside that one where the draw
        falls between the two, as near as float64 can tell.
        """

    def ahead(self, asked: Sequence[Ask]) -> Ahead | None:
        """As :meth:`choose`, one of each row in order, without waiting; other logits may follow.

        None if it cannot be: the host computed them, or has to choose.
        """

    def wait(self) -> None:
        """Return when they are computed."""


class Summaries(Protocol):
    """What is known of the keys of one layer's pages without reading them.

    Made of keys as they are stored, decoded, when :meth:`Backend.choose_pages` meets fresh pages.

    bytes_per_page   of what is known of one
    """

    bytes_per_page: int


class Backend(Protocol):
    """What a model needs. Only ``append`` changes an argument: the pool that it fills.

    name      what it is asked for by
    replays   True if it keeps what a step launches, for others of that shape: then it is best that
              all tokens of a step are computed alike, even where some could be spared something
    """

    name: str
    replays: bool

    @property
    def identity(self) -> str:
        """What decides the bits of its results and the layout of its pages, beside their inputs.

        Pages that outlive the process are only read where it is the same.
        """

    @property
    def own_memory(self) -> int | None:
        """Bytes that all pools may take where nobody says how many; None if it cannot say.

        Asked for when the weights are loaded.
        """

    def weight(self, array: HostArray) -> Array:
        """Take a tensor of the checkpoint (fp32, bf16 or fp16; may be a read-only memory map)."""

    def require_formats(self, key: PageFormat, value: PageFormat) -> None:
        """Raise BackendError, saying which there are, unless pools can store these formats."""

    def pool(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> PagePool:
        """Storage for ``num_pages`` pages of one layer, and ``open_pages`` that take tokens.

        Open ones are needed in the groups of formats that store whole pages; see
        :class:`quire.pages.PagePool`. Raises BackendError if it does not fit, or as
        :meth:`require_formats` does.
        """

    def take_step(
        self,
        tokens: Sequence[int] | Array,
        batch: PagedBatch,
        rows: Sequence[int] | HostArray,
        beside: Sequence[SomeRows] = (),
    ) -> tuple[Any, Any]:
        """Take all integers of a step together, before anything is computed of it.

        tokens [T], and those rows [R] (ascending) whose logits are wanted. What it gives stands in
        their place from here on, as ids of :meth:`embed` and in :meth:`attention_rows`,
        :meth:`select` and :meth:`rows`, with this very batch. ``beside``: rows of the batch, and
        batches of them alone, for which layers attend apart. Without it the same comes out, but
        each op hands over what it is the first to need. :meth:`logits` and :meth:`whole_step` take
        their step themselves.
        """

    def embed(self, table: Array, ids: Sequence[int] | HostArray) -> Array:
        """Rows ``ids`` [T] of ``table`` [vocab, hidden] -> [T, hidden]. ids are in range."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """``x @ weight.T + bias``: x [T, in], weight [out, in], bias [out] -> [T, out]."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) * weight over the last axis [..., n], weight [n].

        Zhang & Sennrich, 2019, arXiv:1910.07467.
        """

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """(x - mean) / sqrt(var + eps) * weight + bias over the last axis [..., n].

        Ba, Kiros & Hinton, 2016, arXiv:1607.06450.
        """

    def rope(self, x: Array, positions: HostArray, inv_freq: HostArray) -> Array:
        """Rotate the pairs (i, i + D/2) of x [T, heads, D] by ``positions[t] * inv_freq[i]``.

        positions int64 [T]; inv_freq float32 [D/2], radians a token; angles are float32 products,
        as in transformers. Su et al., 2021, arXiv:2104.09864.
        """

    def hadamard(self, x: Array) -> Array:
        """Turn each vector of x [T, heads, D], float32, as :func:`quire.rotation.rotate` does.

        Ashkboos et al., 2024, arXiv:2404.00456.
        """

    def activate(self, x: Array, kind: str) -> Array:
        """Elementwise silu, gelu (erf), gelu_new / gelu_pytorch_tanh or relu, any shape.

        Hendrycks & Gimpel, 2016, arXiv:1606.08415; Elfwing et al., 2017, arXiv:1702.03118.
        """

    def multiply(self, x: Array, y: Array) -> Array:
        """Elementwise product of equal shapes: the gate of a gated MLP (arXiv:2002.05202)."""

    def add(self, x: Array, y: Array) -> Array:
        """Elementwise sum of equal shapes: the residual stream."""

    def heads(self, x: Array, num_heads: int) -> Array:
        """[T, num_heads * D] -> [T, num_heads, D]."""

    def append(self, pool: PagePool, slots: HostArray, key: Array, value: Array) -> None:
        """Store key [T, G, D] and value [T, G, D] of T tokens in ``slots`` int64 [T] of a pool.

        Where pages are packed whole the slots are those of open pages, and those that a step
        completes are sealed behind it (:meth:`quire.pages.PagePool.seal`), before it attends.
        """

    def attend(self, query: Array, pool: PagePool, batch: PagedBatch, group: int) -> Array:
        """Causal attention of query [T, H, D] over the pages of a layer group -> [T, H * D].

        Query head h reads KV head ``h // (H / G)`` (grouped queries, arXiv:2305.13245; G = 1 is
        multi-query, arXiv:1911.02150). A query at position p sees stored positions up to p, the
        last ``window`` of them in a windowed group. Scores are scaled by 1 / sqrt(D). Keys and
        values are read back from the pool, also those appended in this step; those of a query's
        own page from its open page (:class:`quire.batch.OpenPages`), the others from
        ``batch.groups[group].indices``. So what a query sees depends on its place alone.
        """

    def attend_pages(self, query: Array, pool: PagePool, chosen: ChosenPages) -> Array:
        """Attention of one token of each of S sequences, [S, H, D] -> [S, H * D].

        As :meth:`attend`, but each KV head reads the pages that ``chosen`` lists for it and no
        other byte of keys and values. Over all pages of a sequence it gives the same bits.
        """

    def summaries(self, pool: PagePool, policy: str, bits: int) -> Summaries:
        """Room for what ``policy`` knows of the pages of ``pool``, of none of which it is made yet.

        "quest": the bounds of their keys (Tang et al., 2024, arXiv:2406.10774); "lsh": ``bits``
        signs of each of their keys (Charikar, 2002). Where whole pages are packed, of packed ones:
        those that are open are always read. Raises BackendError if it does not fit.
        """

    def choose_pages(
        self, query: Array, summaries: Summaries, candidates: Candidates
    ) -> ChosenPages:
        """What one token of each of S sequences, query [S, H, D], is to read of ``candidates``.

        Scores are those of :mod:`quire.backends.selecting`, summed over the query heads that share
        a KV head. Makes summaries of ``candidates.fresh`` first.
        """

    def weigh_keys(
        self, query: Array, pool: PagePool, pages: Sequence[int] | HostArray, places: HostArray
    ) -> Array:
        """What queries of one sequence give each of its keys: float32 [G, n], n keys in ``pages``.

        query [T, H, D], its own or the host's, stands at ``places`` int64 [T], ascending; n is the
        last and one. Softmax weights, of each query over the keys up to its own, are summed over
        queries and over the heads that share a KV head. Pages of single tokens alone.
        """

    def key_norms(self, pool: PagePool, pages: Sequence[int] | HostArray, count: int) -> Array:
        """L2 norms float32 [G, count] of the first keys in ``pages``, of single tokens."""

    def join_rows(self, parts: Sequence[tuple[HostArray, Array]]) -> Array:
        """One array of all rows: x[i] of each (rows [R], x [R, n]) is row ``rows[i]``."""

    def block(self, params: Any) -> Any:
        """Take half a decoder layer's weights: AttentionParams or MlpParams, see ``blocks.py``."""

    def attention_block(
        self, x: Array, block: Any, batch: PagedBatch, pool: PagePool, group: int
    ) -> Array:
        """x [T, hidden] -> x + attention(norm(x)) [T, hidden]; see :func:`blocks.attention_block`.

        Appends the new tokens' keys and values to the pool, and seals the pages that are whole.
        """

    def attention_rows(
        self,
        x: Array,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        rows: Sequence[int] | HostArray,
    ) -> Array:
        """Rows ``rows`` (ascending) of :meth:`attention_block`'s result, [R, hidden].

        The keys and values of all tokens go into the pool; see :func:`blocks.attention_rows`.
        """

    def mlp_block(self, x: Array, block: Any) -> Array:
        """x [T, hidden] -> x + mlp(norm(x)) [T, hidden]; see :func:`blocks.mlp_block`."""

    def layers(
        self,
        x: Array,
        blocks: Sequence[tuple[Any, Any]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: Sequence[Summaries | None] = (),
    ) -> Array:
        """The first ``len(blocks)`` decoder layers, [T, hidden] -> [T, hidden].

        blocks      each layer's attention and MLP half, as :meth:`block` gave them
        summaries   of each layer, if tokens choose pages by them from the batch's candidates; None
                    of a layer that is read whole. Bits are those of :meth:`choose_pages` and
                    :meth:`attend_pages`
        """

    def logits(
        self, tokens: Sequence[int], network: Any, batch: PagedBatch, pools: Sequence[PagePool]
    ) -> Logits:
        """All of a step whose every row is wanted: see :func:`blocks.logits` and ``Network``."""

    def whole_step(
        self,
        compute: Compute,
        head: Array,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Logits:
        """``linear(compute(tokens, batch, pools), head)``, logits [T, vocab] of every row.

        ``compute`` gives [T, hidden], ``head`` is [vocab, hidden].
        A backend may keep what that launches and launch it again for another batch of the same
        shape. So ``compute`` must be equal, and hashed alike, for each step of a model, work by the
        backend's ops alone, and hand the arrays of the batch that it is called with to them as
        they are: what it reads of their numbers itself is that of some earlier step.
        """

    def rows(self, x: Array, indices: Sequence[int] | HostArray) -> Array:
        """Rows ``indices`` of x [T, n] -> [len(indices), n]."""

    def select(self, batch: PagedBatch, rows: Sequence[int] | HostArray) -> PagedBatch:
        """The batch of tokens ``rows`` [R] (ascending) alone, for :meth:`attend`."""

    def to_logits(self, x: Array) -> Logits:
        """x [n, vocab] as rows of logits, which stay where they are."""

    def to_host(self, x: Array) -> npt.NDArray[np.float32]:
        """x as a float32 NumPy array of the same shape."""
