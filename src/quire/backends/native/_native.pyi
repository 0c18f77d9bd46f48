"""The compiled kernels. Arrays must be C-contiguous; a wrong shape or dtype raises."""

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]
_Shorts = npt.NDArray[np.uint16]
_Words = npt.NDArray[np.uint64]

def variants() -> list[str]: ...

class Weight:
    rows: int
    columns: int
    def __init__(self, data: _Bytes, dtype: int, rows: int, columns: int) -> None: ...

class Layer:
    def __init__(self, weight: Weight, bias: _Floats | None) -> None: ...

class AttentionWeights:
    def __init__(
        self,
        norm: _Floats,
        eps: float,
        q: Layer,
        k: Layer,
        v: Layer,
        o: Layer,
        q_norm: _Floats | None,
        k_norm: _Floats | None,
    ) -> None: ...

class MlpWeights:
    def __init__(
        self, norm: _Floats, eps: float, gate: Layer, up: Layer, down: Layer, activation: int
    ) -> None: ...

class Store:
    def __init__(
        self, data: _Bytes, scale: npt.NDArray[np.uint16] | None, dtype: int, dim: int
    ) -> None: ...

class Pool:
    key_beside: int
    value_beside: int
    def __init__(
        self,
        key: Store,
        value: Store,
        shape: list[int],
        open: Pool | None = None,
        taking: int = 0,
        rotated: bool = False,
    ) -> None: ...

class OpenTables:
    def __init__(
        self, indptr: _Ints, indices: _Ints, first: _Ints, seal_from: _Ints, seal_to: _Ints
    ) -> None: ...

class Tables:
    def __init__(
        self,
        places: _Ints,
        positions: _Ints,
        query_indptr: _Ints,
        indptr: _Ints,
        indices: _Ints,
        last_page_len: _Ints,
        first_page: _Ints,
        page_size: int,
        window: int,
        open: OpenTables,
    ) -> None: ...

class Layers:
    def __init__(self) -> None: ...
    def add(self, attention: AttentionWeights, mlp: MlpWeights, pool: Pool, group: int) -> None: ...

class Native:
    threads: int
    variant: str
    def __init__(self, variant: str, threads: int) -> None: ...
    def linear(self, x: _Floats, weight: Weight, bias: _Floats | None, y: _Floats) -> None: ...
    def append(self, pool: Pool, slots: _Ints, key: _Floats, value: _Floats) -> None: ...
    def seal(self, pool: Pool, source: _Ints, target: _Ints) -> None: ...
    def attend(self, query: _Floats, pool: Pool, tables: Tables, out: _Floats) -> None: ...
    def rms_norm(self, x: _Floats, weight: _Floats, eps: float, y: _Floats) -> None: ...
    def layer_norm(
        self, x: _Floats, weight: _Floats, bias: _Floats, eps: float, y: _Floats
    ) -> None: ...
    def rope(
        self, x: _Floats, positions: _Ints, cos: _Floats, sin: _Floats, y: _Floats
    ) -> None: ...
    def hadamard(self, x: _Floats, dim: int, y: _Floats) -> None: ...
    def activate(self, x: _Floats, kind: int, y: _Floats) -> None: ...
    def multiply(self, x: _Floats, z: _Floats, y: _Floats) -> None: ...
    def add(self, x: _Floats, z: _Floats, y: _Floats) -> None: ...
    def attention_block(
        self,
        x: _Floats,
        weights: AttentionWeights,
        cos: _Floats,
        sin: _Floats,
        pool: Pool,
        slots: _Ints,
        tables: Tables,
        y: _Floats,
    ) -> None: ...
    def mlp_block(self, x: _Floats, weights: MlpWeights, y: _Floats) -> None: ...
    def layers(
        self,
        x: _Floats,
        layers: Layers,
        cos: _Floats,
        sin: _Floats,
        slots: list[_Ints],
        tables: list[Tables],
        y: _Floats,
    ) -> None: ...
    def score_bounds(self, query: _Floats, bounds: _Shorts, pages: _Ints, out: _Floats) -> None: ...
    def score_signatures(
        self, query: _Words, signs: _Words, pages: _Ints, out: _Floats
    ) -> None: ...
    def probe_read(self, x: _Bytes) -> float: ...
    def probe_multiply(self, steps: int) -> float: ...
    def embed(self, table: Weight, ids: _Ints, y: _Floats) -> None: ...
