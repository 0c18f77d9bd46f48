"""Text to passages: what is read as a prompt, and what is then told token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.errors import RequestError
from quire.models import TextCodec, resolve_model

__all__ = ["Passage", "documents", "held_out", "limited", "passages"]


@dataclass(frozen=True)
class Passage:
    """Token ids: ``prompt`` is prefilled; ``told`` are fed one by one.

    The logits after ``told[i]`` are judged by ``targets[i]``, the token that comes next.
    """

    prompt: tuple[int, ...]
    told: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a cache holds at its end."""
        return len(self.prompt) + len(self.told)


def held_out() -> dict[str, str]:
    """The modules that quill did not see in training, by name."""
    folder = resolve_model(None) / "heldout"
    return {
        path.name.removesuffix(".py.txt"): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.py.txt"))
    }


def documents(codec: TextCodec, texts: Mapping[str, str]) -> tuple[list[int], list[list[int]]]:
    """What the tokenizer puts before any text (its BOS, or nothing), and each text's token ids.

    Raises RequestError for a text of fewer than two tokens.
    """
    found = []
    for name, text in texts.items():
        found.append(codec.encode(text, add_special_tokens=False))
        if len(found[-1]) < 2:
            raise RequestError(f"{name} has {len(found[-1])} tokens; at least 2 are needed")
    plain, special = codec.encode("a", add_special_tokens=False), codec.encode("a")
    return special[: special.index(plain[0]) if plain[0] in special else 0], found


def passages(lead: Sequence[int], document: Sequence[int], size: int) -> list[Passage]:
    """Passages of at most ``size`` tokens over one document, each beginning with ``lead``.

    The first half of a passage is its prompt, the second half is told; the next passage begins half
    a passage later. So every token of the document is a target once, with at least half a passage
    before it, but for the first half passage, or the first half of a document that fits one: those
    are only read.
    """
    half = (size - len(lead)) // 2
    first = min(half, len(document) // 2)
    found, start, at = [], 0, first
    while at < len(document):
        end = min(start + 2 * half, len(document))
        whole = (*lead, *document[start:end])
        split = len(lead) + at - start
        found.append(Passage(whole[: split - 1], whole[split - 1 : -1], whole[split:]))
        start, at = end - half, end
    return found


def limited(found: Sequence[Sequence[Passage]], most: int | None) -> list[Passage]:
    """The passages of all documents, or of each the first, the second, ... up to ``most`` targets.

    The last one is cut short to meet the limit.
    """
    if most is None:
        return [passage for document in found for passage in document]
    chosen: list[Passage] = []
    for round in range(max(map(len, found), default=0)):
        for passage in (document[round] for document in found if round < len(document)):
            room = most - sum(len(each.targets) for each in chosen)
            if room > 0:
                told, targets = passage.told[:room], passage.targets[:room]
                chosen.append(Passage(passage.prompt, told, targets))
    return chosen
