"""Which page format keys and values have in which layer, as text and as a plan.

::

    int8                         keys and values of all layers
    k=int8,v=fp8                 keys and values apart
    int4+int8@first,last         int4, but int8 in the first and in the last layer
    auto+k=int8,v=fp8@0,1,-1     layers by number, those below 0 from the end
    int4:rotated                 int4, of keys that are turned first (see rotation.py)
    k=int2:rotated,v=int4        likewise; values are never turned

``auto`` is the checkpoint's own dtype.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from quire.errors import ConfigError
from quire.formats import ROTATED, PageFormat, page_format

__all__ = ["AUTO", "FormatChoice", "Formats", "describe_formats", "parse_formats"]

AUTO = "auto"

Formats: TypeAlias = tuple[PageFormat, PageFormat]  # of a layer's keys and values
Names: TypeAlias = tuple[str, str]

_EXAMPLES = "such as 'int8', 'k=int8,v=fp8' or 'int4+int8@first,last'"
_WORDS = {"first": 0, "last": -1}


@dataclass(frozen=True)
class FormatChoice:
    """What a text such as ``"int4+int8@first,last"`` says.

    base       names for keys and values of all layers that no override is for
    overrides  layers (counted from the end if below 0) and names for them
    """

    base: Names
    overrides: tuple[tuple[tuple[int, ...], Names], ...]

    @property
    def pairs(self) -> tuple[Names, ...]:
        """Every pair of names, each once."""
        return tuple(dict.fromkeys([self.base, *(names for _, names in self.overrides)]))

    @property
    def by_page(self) -> bool:
        """True if any of the formats stores whole pages at once."""
        names = {name for pair in self.pairs for name in pair} - {AUTO}
        return any(page_format(name).kind == "page" for name in names)

    def of_layers(self, num_layers: int, auto: str) -> tuple[Formats, ...]:
        """Formats of each layer of a model whose own dtype is ``auto``.

        Raises ConfigError for a layer that the model does not have, and for two overrides that
        disagree on one.
        """
        chosen: dict[int, Names] = {}
        for layers, names in self.overrides:
            for layer in layers:
                at = layer + num_layers if layer < 0 else layer
                if not 0 <= at < num_layers:
                    raise ConfigError(
                        f"kv_format names layer {layer}, and the model has {num_layers} layers "
                        f"(0 to {num_layers - 1}, or -{num_layers} to -1)"
                    )
                if chosen.setdefault(at, names) != names:
                    raise ConfigError(
                        f"kv_format gives layer {at} twice, as {_pair_text(chosen[at])} and as "
                        f"{_pair_text(names)}; name it once"
                    )
        return tuple(self._formats(chosen.get(n, self.base), auto) for n in range(num_layers))

    @staticmethod
    def _formats(names: Names, auto: str) -> Formats:
        key, value = (page_format(auto if name == AUTO else name) for name in names)
        return key, value


def parse_formats(text: str) -> FormatChoice:
    """What ``text`` says; ConfigError, naming the nearest known format, if it says nothing."""
    base, *overrides = text.split("+")
    return FormatChoice(_names(base, text), tuple(_override(part, text) for part in overrides))


def _override(part: str, text: str) -> tuple[tuple[int, ...], Names]:
    names, at, layers = part.partition("@")
    if not at:
        raise ConfigError(
            f"kv_format {text!r}: {part.strip()!r} does not say for which layers it is; write "
            f"formats, {_EXAMPLES}"
        )
    return tuple(_layer(word, text) for word in layers.split(",")), _names(names, text)


def _layer(word: str, text: str) -> int:
    word = word.strip()
    if word in _WORDS:
        return _WORDS[word]
    if re.fullmatch(r"-?[0-9]{1,6}", word) is None:
        raise ConfigError(
            f"kv_format {text!r}: {word!r} is no layer; write a number (below 0 counts from the "
            "end), 'first' or 'last'"
        )
    return int(word)


def _names(part: str, text: str) -> Names:
    """Names for keys and values from ``"int8"`` or ``"k=int8,v=fp8"``."""
    words = [word.strip() for word in part.split(",")]
    if len(words) == 1 and "=" not in words[0]:
        _require(words[0])
        return words[0], words[0].removesuffix(ROTATED)
    given = dict[str, str]()
    for word in words:
        side, _, name = (piece.strip() for piece in word.partition("="))
        if side not in ("k", "v") or side in given:
            raise ConfigError(
                f"kv_format {text!r}: {part.strip()!r} is neither one format nor one each for k "
                f"and v; write formats, {_EXAMPLES}"
            )
        _require(name)
        if side == "v" and name.endswith(ROTATED):
            raise ConfigError(
                f"kv_format {text!r}: only keys are rotated, with the queries that attend to them; "
                f"it does nothing for values; write v={name.removesuffix(ROTATED)}"
            )
        given[side] = name
    if len(given) != 2:
        raise ConfigError(
            f"kv_format {text!r}: {part.strip()!r} gives a format for "
            f"{'keys' if 'k' in given else 'values'} only; give both, {_EXAMPLES}"
        )
    return given["k"], given["v"]


def _require(name: str) -> None:
    if name == AUTO + ROTATED:
        raise ConfigError(
            f"{name}: the checkpoint's own dtype is lossless, and rotating its keys would change "
            "bits for nothing; write 'auto', or rotate a format that quantises, such as 'int4'"
        )
    if name != AUTO:
        page_format(name)


def _pair_text(names: Names) -> str:
    key, value = names
    return key if key.removesuffix(ROTATED) == value else f"k={key},v={value}"


def describe_formats(layers: Sequence[Formats]) -> str:
    """The one text for the formats of layers, whichever way they were asked for.

    The pair that most layers have, then the others in the order of their first layer.
    """
    names = [(key.text, value.text) for key, value in layers]
    base = max(dict.fromkeys(names), key=names.count)
    text = _pair_text(base)
    for other in dict.fromkeys(names):
        if other != base:
            at = ",".join(str(n) for n, pair in enumerate(names) if pair == other)
            text += f"+{_pair_text(other)}@{at}"
    return text
