"""A Hugging Face model directory: memory-mapped safetensors, one file or sharded.

Nothing is ever unpickled. Tensors are views of the mapped file until a backend takes them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from quire.architectures import read_json
from quire.backends import Backend
from quire.errors import CheckpointError
from quire.models.names import IGNORED, TensorSpec

__all__ = ["Checkpoint", "Progress", "load_params", "weights_files"]

# Called with (what is loading, how many are done, how many there are).
Progress = Callable[[str, int, int], None]

_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# What reading a header that is not what it should be may raise.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``offset`` bytes into ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The tensors of a model directory, by name.

    Raises CheckpointError for a directory without safetensors, a missing shard, a damaged or
    truncated file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stored: dict[str, _Stored] = {}
        for path in weights_files(directory):
            for name, stored in _read_header(path):
                if name in self._stored:
                    raise CheckpointError(
                        f"tensor {name!r} stands in both {self._stored[name].path} and {path}"
                    )
                self._stored[name] = stored
        self._check_index()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._stored)

    @property
    def page_format(self) -> str:
        """The page format of the dtype that most numbers are stored in: fp32, bf16 or fp16."""
        counts = Counter[str]()
        for stored in self._stored.values():
            if stored.dtype in _FORMATS:
                counts[_FORMATS[stored.dtype]] += int(np.prod(stored.shape))
        return counts.most_common(1)[0][0] if counts else "fp32"

    def tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A read-only view of the mapped file; CheckpointError unless it has ``shape``."""
        stored = self._found(name, shape)
        # A Path would be resolved, link by link, for each tensor.
        return np.memmap(str(stored.path), _DTYPES[stored.dtype], "r", stored.offset, shape)

    def nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Of a tensor, as it is stored; CheckpointError unless it has ``shape``."""
        size: int = _DTYPES[self._found(name, shape).dtype].itemsize
        return math.prod(shape) * size

    def _found(self, name: str, shape: tuple[int, ...]) -> _Stored:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} of shape {list(shape)} is missing"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} has shape {list(stored.shape)}, but config.json "
                f"implies {list(shape)}"
            )
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} of shape {list(shape)} is {stored.dtype}; "
                f"supported are {', '.join(_DTYPES)}"
            )
        return stored

    def _check_index(self) -> None:
        path = self.directory / "model.safetensors.index.json"
        if not path.exists():
            return
        for name, file in read_json(path)["weight_map"].items():
            if name not in self._stored or self._stored[name].path.name != file:
                raise CheckpointError(f"{path} says that tensor {name!r} is in {file}; it is not")


def weights_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order; CheckpointError if there are none."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with a model in it")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} has no 'weight_map'")
        files = sorted(set(map(str, shards.values())))
        foreign = [file for file in files if Path(file).name != file]
        if foreign:
            raise CheckpointError(f"{index} names {foreign[0]!r}, which is not a plain file name")
        present = {path.name for path in directory.iterdir() if path.is_file()}
        missing = [file for file in files if file not in present]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(files)} shards are missing, first "
                f"{missing[0]}"
            )
        return [directory / file for file in files]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pth")]
    hint = (
        f"; {pickled[0]} is a pickle, which Quire never opens: save the model again with "
        "safe_serialization=True"
        if pickled
        else ""
    )
    raise CheckpointError(f"{directory} has no model.safetensors{hint}")


def _read_header(path: Path) -> Iterator[tuple[str, _Stored]]:
    """Names and places of the tensors of one file, each checked to lie inside the file.

    The format: 8 bytes with the header's length (little-endian), a JSON header, the numbers
    (https://github.com/huggingface/safetensors). What is not checked here, such as overlapping
    tensors, the safetensors library checks.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: {size} bytes, header of {length}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise CheckpointError(
                    f"{path} is truncated: tensor {name!r} of shape {entry['shape']} "
                    f"({entry['dtype']}) ends at byte {8 + length + end}, the file at {size}"
                )
            yield name, _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
        with safe_open(path, framework="numpy"):
            pass
    except (*_DAMAGE, SafetensorError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error


def load_params(
    checkpoint: Checkpoint, specs: list[TensorSpec], backend: Backend, progress: Progress | None
) -> dict[str, Any]:
    """Every parameter in ``specs``, taken by the backend, by Quire's name.

    Raises CheckpointError for a tensor that is missing, of the wrong shape or dtype, or extra.
    """
    prefix = _common_prefix(checkpoint, specs)
    names = {spec: spec.name.removeprefix(prefix) for spec in specs}
    _refuse_extra(checkpoint, set(names.values()))
    params: dict[str, Any] = {}
    for done, spec in enumerate(specs):
        array = checkpoint.tensor(names[spec], spec.shape)
        array = array.T if spec.transposed else array
        index, count = spec.part
        step = len(array) // count
        params[spec.key] = backend.weight(array[index * step : (index + 1) * step])
        if progress is not None:
            progress("weights", done + 1, len(specs))
    return params


def stored_bytes(checkpoint: Checkpoint, specs: list[TensorSpec]) -> dict[str, int]:
    """Bytes of every parameter in ``specs`` as the checkpoint stores it, by Quire's name."""
    prefix = _common_prefix(checkpoint, specs)
    return {
        spec.key: checkpoint.nbytes(spec.name.removeprefix(prefix), spec.shape) // spec.part[1]
        for spec in specs
    }


def _common_prefix(checkpoint: Checkpoint, specs: list[TensorSpec]) -> str:
    """Some checkpoints (the original GPT-2's) leave the base model's name away."""
    first = specs[0].name
    prefix = first.split(".")[0] + "."
    bare = first not in checkpoint.names and first.removeprefix(prefix) in checkpoint.names
    return prefix if bare else ""


def _refuse_extra(checkpoint: Checkpoint, wanted: set[str]) -> None:
    for name in checkpoint.names:
        tied_head = name == "lm_head.weight"
        if name not in wanted and not tied_head and not IGNORED.fullmatch(name):
            stored = checkpoint._stored[name]
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} of shape {list(stored.shape)} has no place in "
                "this architecture as config.json describes it"
            )
