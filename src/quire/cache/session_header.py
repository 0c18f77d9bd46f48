"""The header of a session file: which bytes stand where, and what they belong to.

A session file is a safetensors file (https://github.com/huggingface/safetensors) in which nothing
is left open: names, dtypes, order and offsets of the tensors follow from three lists of numbers.
What is parsed here may come from anyone; every failure is a SessionError that says why.
docs/sessions.md describes the format byte by byte.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from quire.errors import SessionError

__all__ = [
    "DIGEST_BYTES",
    "MAX_HEADER_BYTES",
    "PIECE_BYTES",
    "Header",
    "Tensor",
    "encode_header",
    "lay_out",
    "parse_header",
]

FORMAT_VERSION = 1
PIECE_BYTES = 2**20  # what one checksum covers
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 4 * 2**20  # twice the limits below, since quotes are escaped, and the tensors
MAX_EXTRA_BYTES = 2**20
MAX_IDENTITY_BYTES = 64 * 2**10
MAX_GROUPS = 256
MAX_DIGITS = 18  # of an int; int() of more would be slow, and none is needed

_METADATA = "__metadata__"
_OURS = "quire.session"
_KEYS = {"version", "created", "identity", "first_pages", "checksums", "extra"}


@dataclass(frozen=True)
class Tensor:
    """``nbytes`` bytes from ``begin`` on, counted from the end of the header.

    ``first_row`` is the row of the table of checksums that belongs to its first piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    first_row: int

    @property
    def num_pieces(self) -> int:
        """Pieces of :data:`PIECE_BYTES`, the last one perhaps shorter."""
        return _pieces(self.nbytes)

    def entry(self) -> dict[str, Any]:
        """What the safetensors header says of it."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "data_offsets": [self.begin, self.begin + self.nbytes],
        }


@dataclass(frozen=True)
class Header:
    """``tensors`` are the checksums, the tokens and each group's pages, as they lie in the file.

    ``table_digest`` is the digest, in hexadecimal, of all checksums but the first, which is the
    header's own.
    """

    identity: Mapping[str, str]
    extra: Mapping[str, Any]
    created: int
    first_pages: tuple[int, ...]
    table_digest: str
    tensors: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self.tensors[1].shape[0]

    @property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(first page, pages, bytes a page) of each layer group."""
        shapes = (tensor.shape for tensor in self.tensors[2:])
        pairs = zip(self.first_pages, shapes, strict=True)
        return tuple((first, shape[0], shape[1]) for first, shape in pairs)

    @property
    def data_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.tensors[-1].begin + self.tensors[-1].nbytes


def lay_out(num_tokens: int, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The tensors of a file with these tokens and (pages, bytes a page) of each group."""
    sizes = [4 * num_tokens, *(pages * page_bytes for pages, page_bytes in groups)]
    rows = list(accumulate(map(_pieces, sizes), initial=1))
    table_bytes = rows[-1] * DIGEST_BYTES
    begins = list(accumulate(sizes, initial=table_bytes))
    kinds: list[tuple[str, str, tuple[int, ...]]] = [("tokens", "U32", (num_tokens,))]
    kinds += [(f"group.{index}", "U8", shape) for index, shape in enumerate(groups)]
    return (
        Tensor("checksums", "U8", (rows[-1], DIGEST_BYTES), 0, table_bytes, 0),
        *(
            Tensor(*kind, begin, size, row)
            for kind, begin, size, row in zip(kinds, begins, sizes, rows, strict=False)
        ),
    )


def encode_header(header: Header) -> bytes:
    """The first bytes of the file: the JSON's length, the JSON, spaces up to a multiple of 8.

    Raises TypeError, ValueError or SessionError for what JSON cannot hold. Whether it is within
    the limits, :func:`parse_header` tells.
    """
    metadata = {
        "version": FORMAT_VERSION,
        "created": header.created,
        "identity": dict(header.identity),
        "first_pages": list(header.first_pages),
        "checksums": header.table_digest,
        "extra": dict(header.extra),
    }
    entries = {tensor.name: tensor.entry() for tensor in header.tensors}
    text = _dump({_METADATA: {_OURS: _dump(metadata)}, **entries})
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode("ascii")


def parse_header(text: bytes) -> Header:
    """The header whose JSON is ``text``; SessionError, saying why, if it is not a session's.

    Whether the file has ``data_bytes`` behind it is the caller's to check.
    """
    entries = _object(_parse(text.decode("ascii")), "header")
    metadata = _object(entries.pop(_METADATA, None), _METADATA)
    if set(metadata) != {_OURS} or not isinstance(metadata[_OURS], str):
        raise SessionError(f"it is a safetensors file without {_OURS!r} in its metadata")
    ours = _object(_parse(metadata[_OURS]), _OURS)
    version = ours.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise SessionError(
            f"its format version is {version!r:.40}, this Quire reads version {FORMAT_VERSION}"
        )
    if set(ours) != _KEYS:
        raise SessionError(f"it has the facts {_list(ours)} instead of {_list(_KEYS)}")
    tensors = _tensors(entries)
    first_pages = tuple(_count(n, "a first page") for n in _array(ours["first_pages"]))
    if len(first_pages) != len(tensors) - 2:
        raise SessionError(f"it has {len(first_pages)} first pages for {len(tensors) - 2} groups")
    return Header(
        _identity(ours["identity"]),
        _extra(ours["extra"]),
        _count(ours["created"], "its time"),
        first_pages,
        str(ours["checksums"]),
        tensors,
    )


def _tensors(entries: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that ``entries`` describe, if they lie exactly as :func:`lay_out` has them."""
    groups = len(entries) - 2
    if groups > MAX_GROUPS:
        raise SessionError(f"it holds {groups} layer groups, at most {MAX_GROUPS} are possible")
    names = ["checksums", "tokens", *(f"group.{index}" for index in range(groups))]
    if set(entries) != set(names):
        raise SessionError(f"it holds the tensors {_list(entries)} instead of {_list(names)}")
    shapes = {name: _shape(entries[name], name) for name in names}
    pages = [(shapes[name][0], shapes[name][1]) for name in names[2:]]
    if any(page_bytes == 0 for _, page_bytes in pages):
        raise SessionError("it holds pages of 0 bytes")
    tensors = lay_out(shapes["tokens"][0], pages)
    for tensor in tensors:
        pair = entries[tensor.name], tensor.entry()
        found, wanted = (json.dumps(entry, sort_keys=True) for entry in pair)
        if found != wanted:
            raise SessionError(f"tensor {tensor.name!r} is {found:.200}, but must be {wanted}")
    return tensors


def _shape(entry: object, name: str) -> list[int]:
    shape = _array(_object(entry, f"tensor {name!r}").get("shape"))
    if len(shape) != (1 if name == "tokens" else 2):
        raise SessionError(f"tensor {name!r} has {len(shape)} axes")
    return [_count(length, f"the shape of {name!r}") for length in shape]


def _identity(value: object) -> dict[str, str]:
    identity = _object(value, "identity")
    for key, fact in identity.items():
        if not isinstance(key, str) or not isinstance(fact, str):
            raise SessionError(f"identity: {key!r:.100} is {fact!r:.100}, not text")
    _limit("identity", identity, MAX_IDENTITY_BYTES)
    return identity


def _extra(value: object) -> dict[str, Any]:
    extra = _object(value, "extra")
    _limit("extra", extra, MAX_EXTRA_BYTES)
    return extra


def _limit(what: str, value: object, most: int) -> None:
    size = len(_dump(value))
    if size > most:
        raise SessionError(f"{what} is {size} bytes as JSON, at most {most} are possible")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SessionError(f"{what} is no JSON object")
    return value


def _array(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise SessionError(f"{value!r:.100} stands where a list is expected")
    return value


def _count(value: object, what: str) -> int:
    if type(value) is not int or value < 0:
        raise SessionError(f"{what} holds {value!r:.100}, not a whole number of 0 or more")
    return value


def _list(names: object) -> str:
    return f"{sorted(names)!r:.200}"  # type: ignore[call-overload]


def _pieces(nbytes: int) -> int:
    return -(-nbytes // PIECE_BYTES)


def _dump(value: object) -> str:
    """ASCII, so that any text can be stored, lone surrogates too.

    Raises SessionError for a NaN and for what is nested too deeply.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise SessionError("it is nested too deeply") from None


def _parse(text: str) -> Any:
    """JSON without repeated keys, huge numbers, NaN and infinities; SessionError for those."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise SessionError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise SessionError(f"key {name!r:.100} stands twice")
        found[name] = value
    return found


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise SessionError(f"a number of {len(digits)} digits, at most {MAX_DIGITS} are possible")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits) if len(digits) <= 40 else math.inf
    if not math.isfinite(number):
        raise SessionError(f"the number {digits:.40} cannot be stored")
    return number


def _refuse_constant(name: str) -> float:
    raise SessionError(f"{name} is no JSON number")
