"""What this machine takes for the operations of a model, measured with the kernels that do them.

No weights of the model are needed. What is timed: linear layers of three sizes, attention over
pages of the model's own heads and format, and two tiny models that the engine runs;
:class:`Measured` interpolates. All are medians; a busy machine gives the times of a busy machine.
"""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.analysis.hardware import Hardware
from quire.analysis.memory import weight_bytes
from quire.analysis.overhead import Overhead, measure_overheads
from quire.analysis.roofline import Limit
from quire.analysis.shape import LayerShape, ModelShape
from quire.analysis.steps import Op, Work
from quire.backends import Backend, MlpParams, Projection, create_backend
from quire.backends.native import NativeBackend
from quire.cache import KVCache
from quire.layout import CacheLayout, lay_out
from quire.machine import this_machine
from quire.sampler import likeliest

__all__ = ["Measured", "Overhead", "Profile", "calibrate", "measure_machine", "measured_hardware"]

Array = npt.NDArray[Any]
Table = Mapping[tuple[int, int], float]

DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}
# hidden, inner and layers of MLPs: a model that caches hold, and three of 200 MB, which they do
# not; of 75 MB a cache of 32 MB still gave a tenth.
CACHED = (256, 704, 4)
MLPS = ((256, 704, 170), (768, 2048, 20), (2048, 5632, 3))
CACHED_BYTES, MAPPED_BYTES = 4 << 20, 128 << 20  # of weights that caches hold, and do not
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHUNK = 512
DECODES = ((1, 256), (1, 1024), (1, 4096), (8, 256), (8, 1024), (8, 4096))  # sequences, contexts
PREFILLS = (0, 1536, 7680)  # tokens before a chunk
COLD_BYTES = 64 << 20  # of weights, at most, are read between steps of tiny models
FEW_ROWS = 8  # up to which a linear layer is as fast as weights come
POOL_BYTES = 384 << 20  # at most, of pages that probes attend to
REPEATS, SECONDS = 3, 0.12  # of each probe, at least


@dataclass(frozen=True)
class Profile:
    """Seconds by measurement, of one model's heads and page format; weights of ``dtype``.

    linear    (rows, numbers of the matrix) -> seconds a number, from memory
    cached    rows -> seconds a number of small matrices, from the processor's caches
    decode    (sequences, bytes that each reads in a layer) -> seconds a byte
    prefill   (new tokens, context with them) -> seconds an operation
    decoding, prefilling   what a step takes outside its operations, with and without layers in one
              call
    choosing  seconds that choosing a token takes, for each number of the vocabulary
    """

    dtype: str
    linear: Table
    cached: Mapping[int, float]
    decode: Table
    prefill: Table
    decoding: Overhead
    prefilling: Overhead
    choosing: float


# -- between what was measured ---------------------------------------------------------------------


def _bracket(points: Sequence[int], at: float) -> tuple[int, int, float]:
    """The neighbours of ``at`` among ascending ``points``, and how far it is from the first."""
    if at <= points[0]:
        return points[0], points[0], 0.0
    for low, high in itertools.pairwise(points):
        if at <= high:
            return low, high, math.log(at / low) / math.log(high / low)
    return points[-1], points[-1], 0.0


def _between(table: Table, first: float, second: float) -> float:
    """Value at (first, second), linear in logarithms of both and of itself; flat outside."""
    rows = sorted({key[0] for key in table})
    low, high, part = _bracket(rows, first)
    ends = []
    for row in (low, high):
        columns = sorted(key[1] for key in table if key[0] == row)
        left, right, share = _bracket(columns, second)
        values = [math.log(table[row, column]) for column in (left, right)]
        ends.append(values[0] + share * (values[1] - values[0]))
    return math.exp(ends[0] + part * (ends[1] - ends[0]))


@dataclass(frozen=True)
class Measured:
    """A :class:`quire.analysis.roofline.Timer` of a profile.

    weights   bytes of all weights: those of a small model stay in the processor's caches
    """

    profile: Profile
    weights: float

    def seconds(self, op: Op) -> float:
        """All of ``op.count`` together; what is no linear layer or attention is in overheads."""
        if op.what == "linear":
            return self._linear(op)
        return self._attention(op) if op.what == "attention" else 0.0

    def limit(self, op: Op) -> Limit:
        """By rows: few are as fast as weights come, many as units compute."""
        if op.what == "other":
            return "overhead"
        many = op.rows > 16 if op.what == "linear" else op.new > 1
        return "compute" if many else "memory bandwidth"

    def overhead(self, shape: ModelShape, work: Sequence[Work]) -> float:
        """The engine's own: scheduling, tables, calls, choosing tokens."""
        decodes = all(each.new == 1 for each in work)
        own = self.profile.decoding if decodes else self.profile.prefilling
        chosen = sum(each.logits for each in work) * shape.vocab_size
        return own.of(len(shape.layers), len(work)) + self.profile.choosing * chosen

    def _linear(self, op: Op) -> float:
        numbers = op.inputs * op.outputs
        each = _between(self.profile.linear, op.rows, numbers)
        if self.weights < MAPPED_BYTES:
            each = self._partly_cached(op.rows, each)
        if op.rows > ROWS[-1]:
            each *= op.rows / ROWS[-1]
        return op.count * op.copies * numbers * each

    def _partly_cached(self, rows: int, from_memory: float) -> float:
        """Between the time from caches and that from memory, by the size of the model."""
        points = sorted(self.profile.cached)
        low, high, part = _bracket(points, rows)
        ends = [math.log(self.profile.cached[row]) for row in (low, high)]
        cached = ends[0] + part * (ends[1] - ends[0])
        share = math.log(max(self.weights, CACHED_BYTES) / CACHED_BYTES)
        share /= math.log(MAPPED_BYTES / CACHED_BYTES)
        return math.exp(cached + share * (math.log(from_memory) - cached))

    def _attention(self, op: Op) -> float:
        if op.new > 1:
            return op.flops * _between(self.profile.prefill, op.new, op.context + op.new)
        read = op.kv_bytes / op.count / op.sequences
        return op.kv_bytes * _between(self.profile.decode, op.sequences, read)


# -- measuring -------------------------------------------------------------------------------------


def calibrate(shape: ModelShape, layout: CacheLayout, backend: NativeBackend) -> Profile:
    """Time ``backend`` on this machine with the dtype, heads and page formats of a model.

    That tokens become text takes time, too, by quill's tokenizer, which stands for all; not where
    a directory was planned that has none.
    Takes some seconds and up to 0.6 GB. Of several kinds of layers the one that most layers have
    stands for all.
    """
    [(layer, _)] = shape.layer_kinds.most_common(1)
    index = shape.layers.index(layer)
    probe, directory = _Attending(backend, layer, layout, index), _directory(shape)
    text = directory is None or (directory / "tokenizer.json").is_file()
    cold = min(COLD_BYTES, round(sum(weight_bytes(shape).values())))
    decoding, prefilling = measure_overheads(backend, cold, text=text)
    linear, cached = _linear_times(backend, shape.dtype, _largest_file(directory))
    return Profile(
        dtype=shape.dtype,
        linear=linear,
        cached=cached,
        decode={
            (count, round(read)): seconds
            for count, context in DECODES
            for read, seconds in [probe.decode(count, context)]
        },
        prefill={(CHUNK, before + CHUNK): probe.prefill(before) for before in PREFILLS},
        decoding=decoding,
        prefilling=prefilling,
        choosing=_median(lambda: likeliest(np.ones(1 << 15, np.float32), 0)) / (1 << 15),
    )


def _directory(shape: ModelShape) -> Path | None:
    """Of the planned checkpoint; None if only its shape is known."""
    source = Path(shape.source)
    return source.parent if source.is_file() else None


def _largest_file(directory: Path | None) -> Path | None:
    """Of the weights in a directory; None if there are none."""
    found = [] if directory is None else list(directory.glob("*.safetensors"))
    return max(found, key=lambda path: path.stat().st_size, default=None)


def measure_machine(
    shape: ModelShape, layout: CacheLayout, threads: int
) -> tuple[Hardware, Measured]:
    """This machine as hardware, and a timer for a model; BackendError without native kernels."""
    backend = create_backend("native", threads)
    assert isinstance(backend, NativeBackend)
    profile = calibrate(shape, layout, backend)
    timer = Measured(profile, sum(weight_bytes(shape).values()))
    return measured_hardware(profile, backend), timer


def measured_hardware(profile: Profile, backend: NativeBackend) -> Hardware:
    """This machine as hardware: its memory, what it reads, and what linear layers reach.

    Bandwidth is of reading 256 MiB on all threads, by the native kernels; the rate of operations is
    the best that linear layers reached in ``profile``, not what the processor could do.
    """
    machine, buffer = this_machine(), np.ones(1 << 28, np.uint8)
    seconds = _median(lambda: backend.probe_read(buffer))
    best = max(2 * rows / each for (rows, _), each in profile.linear.items())
    return Hardware(
        name="this machine",
        kind="machine",
        memory_bytes=machine.available_bytes or machine.memory_bytes or 0,
        bandwidth=buffer.nbytes / seconds,
        flops={"fp32": best, profile.dtype: best},
        link_bandwidth=None,
        source=f"measured now: {machine.cpu_name}, {backend.threads} threads",
        notes=(
            "memory is what is available now",
            f"operations a second are what linear layers of {profile.dtype} reach",
        ),
    )


def _median(call: Callable[[], Any]) -> float:
    call()
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < SECONDS:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _linear_times(
    backend: NativeBackend, dtype: str, model: Path | None
) -> tuple[Table, Mapping[int, float]]:
    """From memory, by rows and size, and from caches, by rows.

    Weights are mapped from a file, as those of a checkpoint are. Few rows take as much longer as
    the file of ``model`` is read more slowly than this new one, whose pages may lie otherwise.
    """
    with tempfile.TemporaryFile() as file:
        weights = _Weights(backend, file, DTYPES[dtype])
        slower = 1.0 if model is None else _slower(backend, model, weights.mapped.view(np.uint8))
        linear = {}
        for hidden, inner, layers in MLPS:
            for rows, seconds in weights.times(hidden, inner, layers):
                linear[rows, hidden * inner] = seconds * (slower if rows <= FEW_ROWS else 1)
        return linear, dict(weights.times(*CACHED))


def _slower(backend: NativeBackend, path: Path, new: Array) -> float:
    """How many times as long a file takes to be read as ``new`` bytes; 1 if caches may hold it."""
    mapped = np.memmap(path, np.uint8, "r")
    size = min(len(mapped), len(new)) >> 20 << 20
    if size < MAPPED_BYTES:
        return 1.0
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(1 + 2 * REPEATS):  # by turns: what the memory gives changes by the second
        for found, bytes_read in zip(seconds, (mapped[:size], new[:size]), strict=True):
            started = time.perf_counter()
            backend.probe_read(bytes_read)
            found.append(time.perf_counter() - started)
    theirs, ours = (statistics.median(found[1:]) for found in seconds)
    return theirs / ours


class _Weights:
    """Matrices of a mapped file, one behind the other."""

    def __init__(self, backend: Backend, file: Any, dtype: Any) -> None:
        self.backend, self.dtype, self.place = backend, np.dtype(dtype), 0
        self.numbers = max(3 * hidden * inner * layers for hidden, inner, layers in MLPS)
        some = np.full(1 << 20, 2.0**-8, dtype)
        for _ in range(-(-self.numbers // len(some))):
            file.write(some.tobytes())
        file.flush()
        self.mapped = np.memmap(file, self.dtype, "r", shape=(self.numbers,))

    def times(self, hidden: int, inner: int, layers: int) -> Iterator[tuple[int, float]]:
        """Rows, and seconds a number of so many MLPs one behind the other."""
        self.place, backend = 0, self.backend
        blocks = [backend.block(self.mlp(hidden, inner)) for _ in range(layers)]
        for rows in ROWS:
            x = backend.embed(backend.weight(np.ones((1, hidden), self.dtype)), [0] * rows)

            def run(x: Any = x) -> None:
                for block in blocks:
                    backend.mlp_block(x, block)

            yield rows, _median(run) / (3 * hidden * inner * layers)

    def matrix(self, outputs: int, inputs: int) -> Projection:
        """The next one."""
        start, self.place = self.place, self.place + outputs * inputs
        return Projection(self.backend.weight(self.mapped[start : self.place].reshape(outputs, -1)))

    def mlp(self, hidden: int, inner: int) -> MlpParams:
        """The next three, and a norm."""
        gate, up = self.matrix(inner, hidden), self.matrix(inner, hidden)
        norm = self.backend.weight(np.ones(hidden, self.dtype))
        return MlpParams(norm, 1e-5, gate, up, self.matrix(hidden, inner), "silu")


class _Attending:
    """Attention over pages of one layer's heads and format, in as many pools as it has layers."""

    def __init__(
        self, backend: Backend, layer: LayerShape, layout: CacheLayout, index: int
    ) -> None:
        self.backend, self.layer = backend, layer
        page = layout.shapes[index]
        self.formats, self.size = (page.key_format, page.value_format), layout.page_size
        self.layers = max(1, min(len(layout.shapes), 12))

    def _cache(self, sequences: int, context: int) -> tuple[KVCache, list[int]]:
        """A cache with so many sequences whose tokens were never computed."""
        one = lay_out([None], [self.layer.kv], self.size, [self.formats])
        tokens = sequences * (context + self.size)
        layers = max(
            1, min(self.layers, POOL_BYTES // max(1, tokens * one.page_bytes(0) // self.size))
        )
        layout = lay_out(
            [None] * layers, [self.layer.kv] * layers, self.size, [self.formats] * layers
        )
        pages, opened = -(-context // self.size) + 2, CHUNK // self.size + 3 * sequences
        counts = [opened if area.is_open else sequences * pages for area in layout.areas]
        pools = [self.backend.pool(shape, *counts) for shape in layout.shapes]
        for pool in pools:
            for array in pool.arrays:
                array[...] = np.ones((), array.dtype)
        cache = KVCache(layout, counts, pools, None)
        return cache, [cache.create() for _ in range(sequences)]

    def _time(self, cache: KVCache, chunks: list[tuple[int, int]]) -> tuple[float, int]:
        """Seconds of attention in one layer when ``chunks`` are added, and how many layers ran."""
        reservation = cache.reserve(chunks)
        rows = sum(count for _, count in chunks)
        query = np.full((rows, self.layer.num_heads, self.layer.kv.key_dim), 0.1, np.float32)
        batch = reservation.batch

        def run() -> None:
            for pool in cache.pools:
                self.backend.attend(query, pool, batch, 0)

        seconds = _median(run)
        cache.rollback(reservation)
        return seconds / len(cache.pools), len(cache.pools)

    def decode(self, count: int, context: int) -> tuple[float, float]:
        """Bytes that a sequence reads in a layer, and seconds a byte."""
        cache, sequences = self._cache(count, context)
        self._fill(cache, sequences, context - 1)
        seconds, layers = self._time(cache, [(sequence, 1) for sequence in sequences])
        read = cache.layout.seen_bytes(context - 1) / layers
        return read, seconds / (read * count)

    def prefill(self, before: int) -> float:
        """Seconds an operation, of a chunk behind so many tokens."""
        cache, sequences = self._cache(1, before + CHUNK)
        if before:
            self._fill(cache, sequences, before)
        seconds, _ = self._time(cache, [(sequences[0], CHUNK)])
        pairs = CHUNK * before + CHUNK * (CHUNK + 1) // 2
        return seconds / self.layer.attention_flops(pairs)

    def _fill(self, cache: KVCache, sequences: list[int], tokens: int) -> None:
        """A page at a time: there are open ones for no more of all sequences."""
        for start in range(0, tokens, self.size):
            new = min(self.size, tokens - start)
            cache.commit(cache.reserve([(sequence, new) for sequence in sequences]))
