"""What an engine's steps compute, recorded, and compared with the same tokens computed alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import quire
from quire.engine.request import Sample
from quire.sampler import HostLogits
from tiny import tiny_engine

Array = npt.NDArray[Any]


def same_bits(a: Array, b: Array) -> bool:
    """True if two float32 arrays are equal bit for bit."""
    assert a.dtype == b.dtype == np.float32
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@dataclass
class Recorder:
    """Every row of logits that an engine's steps compute, as (sample, position, logits).

    With ``all_rows`` the steps compute logits of every token, not only of those that decide.
    """

    engine: quire.Engine
    all_rows: bool
    rows: list[tuple[Sample, int, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inner = self.engine._forward.run
        self.engine._forward.run = self._forward  # type: ignore[method-assign]

    def _forward(self, parts: Any, samples: Any = ()) -> HostLogits:
        wider = parts
        if self.all_rows:
            wider = [(sequence, tokens, range(len(tokens))) for sequence, tokens, _ in parts]
        logits = self._inner(wider, samples).host()
        kept, at = [], 0
        for sample, (_, _, computed), (_, _, asked) in zip(samples, wider, parts, strict=True):
            for row in computed:
                self.rows.append((sample, sample.computed + row, logits[at].copy()))
                if row in asked:
                    kept.append(at)
                at += 1
        return HostLogits(logits[kept])


def cold(directory: Path, tokens: list[int], kv_format: str = "auto") -> np.ndarray:
    """Logits of every position, computed in one go by an engine that shares nothing."""
    engine = tiny_engine(
        directory, page_size=16, num_pages=80, prefix_cache=False, kv_format=kv_format
    )
    return engine.logits(tokens)


def assert_warm_is_cold(directory: Path, recorder: Recorder) -> None:
    """Every recorded row has the bits of the same tokens alone, computed in one go."""
    assert recorder.rows
    alone: dict[Sample, np.ndarray] = {}
    for sample, position, logits in recorder.rows:
        if sample not in alone:
            kv_format = recorder.engine.config.cache.kv_format
            alone[sample] = cold(directory, sample.tokens, kv_format)
        assert same_bits(logits, alone[sample][position])
