"""Recall by distance: whether what was said early in a context is still found in the cache.

Into ordinary text, lines ``# set NAME VALUE`` are put; at the end, ``# get NAME`` asks for them one
after the other, and right is whoever holds VALUE likeliest of the whole vocabulary. NAME and VALUE
are words of one token each, paired afresh in every trial, so that only the context tells the
answer (associative recall: Arora et al., 2023, arXiv:2312.04927). The distance is in tokens, from
VALUE to the NAME that asks for it. quill was trained on such lines; other models read them by
induction, more or less well, which the exact cache's own score shows.

It is asked in two ways, since policies that choose what to keep by attention are published for one
of them and used in both:

after the prompt   the text is the prompt, the questions are told after it: who chooses at the end
                   of a prompt does not know yet what will be asked. So are conversations, and
                   prompts that are kept for later questions
in the prompt      each prompt ends with one question, as in the long-context benchmarks that SnapKV
                   was published with (Li et al., 2024, arXiv:2404.14469): queries of the question
                   have their say in what is kept. The prompt's own last logits come from before
                   anything was chosen, so the question is told once more, and that is judged
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from quire.analysis.losses import Interval, wilson
from quire.analysis.text import Passage
from quire.models import TextCodec

__all__ = [
    "RecallScore",
    "RecallTrial",
    "RecallWords",
    "distances",
    "recall_trial",
    "recall_trials_in_prompt",
    "recall_words",
]

LINE = 5  # tokens of "# set NAME VALUE" and a newline
QUESTION = 3  # tokens of "# get NAME"
SHORTEST = 32
WORDS = 320  # names, and as many values
LETTERS = 3
SPACES = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies spell a space before a word
NEWLINES = ("Ċ", "<0x0A>", "\n")


@dataclass(frozen=True)
class RecallWords:
    """Token ids that the lines are made of; names and values are disjoint."""

    hash: int
    set: int
    get: int
    newline: int
    names: tuple[int, ...]
    values: tuple[int, ...]

    def set_line(self, name: int, value: int) -> list[int]:
        """``# set NAME VALUE`` between two newlines; VALUE is the last but one."""
        return [self.newline, self.hash, self.set, name, value, self.newline]

    def question(self, name: int) -> list[int]:
        """``# get NAME``."""
        return [self.hash, self.get, name]


@dataclass(frozen=True)
class RecallTrial:
    """A passage, and for some of its told tokens the distance of the answer that is due there."""

    passage: Passage
    asked: dict[int, int]


class RecallScore:
    """Right answers by distance."""

    def __init__(self, distances: Sequence[int]) -> None:
        self._right = dict.fromkeys(distances, 0)
        self._trials = dict.fromkeys(distances, 0)

    def add(self, distance: int, right: bool) -> None:
        """One answer."""
        self._right[distance] += right
        self._trials[distance] += 1

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right answers for each distance."""
        return {str(d): self._right[d] / self._trials[d] for d in self._right}

    @property
    def mean(self) -> float:
        """Share of right answers over all distances."""
        return sum(self._right.values()) / sum(self._trials.values())

    @property
    def interval(self) -> Interval:
        """A 95 % interval for :attr:`mean`."""
        return wilson(sum(self._right.values()), sum(self._trials.values()))


def recall_words(codec: TextCodec, distances: int) -> RecallWords | None:
    """The words of a tokenizer that serve; None if it has too few for so many distances."""
    vocabulary = codec.vocabulary()
    space = next((space for space in SPACES if f"{space}set" in vocabulary), "")
    newline = next((text for text in NEWLINES if text in vocabulary), None)
    fixed = [vocabulary.get(text) for text in ("#", f"{space}set", f"{space}get")]
    words = sorted(at for text, at in vocabulary.items() if space and _is_word(text, space))
    words = words[: 2 * WORDS]
    if newline is None or None in fixed or len(words) < 2 * distances:
        return None
    hash, set, get = (at for at in fixed if at is not None)
    names, values = tuple(words[0::2]), tuple(words[1::2])
    return RecallWords(hash, set, get, vocabulary[newline], names, values)


def _is_word(text: str, space: str) -> bool:
    word = text.removeprefix(space)
    plain = word.isascii() and word.isalpha() and word.islower() and word not in ("set", "get")
    return text != word and plain and len(word) >= LETTERS


def distances(size: int) -> list[int]:
    """Distances that fit passages of ``size`` tokens: doubling from 32, and the longest."""
    # Before the farthest VALUE stand what the tokenizer begins with (two tokens at most), a newline
    # and three tokens of its line; after it, up to the NAME that asks, lies the distance.
    longest = size - 9
    found: list[int] = []
    while SHORTEST << len(found) <= longest:
        found.append(SHORTEST << len(found))
    if found and longest >= found[-1] + max(16, found[-1] // 5):
        found.append(longest)
    return found


def recall_trial(
    words: RecallWords,
    filler: Sequence[int],
    shape: tuple[int, Sequence[int], Sequence[int]],
    seed: str,
) -> RecallTrial:
    """One trial, asked after its prompt; a pure function of its arguments.

    filler   token ids of ordinary text, at least as many as the passage
    shape    tokens of the passage, what the tokenizer begins with, distances in ascending order
    """
    size, lead, wanted = shape
    rng = random.Random(seed)
    names, values = (rng.sample(pool, len(wanted)) for pool in (words.names, words.values))
    text = size - (LINE * len(wanted) - 2) - len(lead)  # the last question ends with its NAME
    start = rng.randrange(len(filler) - text + 1)
    prompt = [*lead, *filler[start : start + text]]
    prompt[-1] = words.newline
    told: list[int] = []
    asked = {}
    # The nearest is asked first, so that its line is not among the questions.
    for name, value, distance in zip(names, values, wanted, strict=True):
        told += words.question(name)
        asked[len(told) - 1] = distance
        at = len(prompt) + len(told) - 1 - distance  # of VALUE
        prompt[at - 4 : at + 2] = words.set_line(name, value)
        told += [value, words.newline]
    told = told[:-2]  # nothing is asked after the last NAME
    targets = (*told[1:], values[-1])
    return RecallTrial(Passage(tuple(prompt), tuple(told), targets), asked)


def recall_trials_in_prompt(
    words: RecallWords,
    filler: Sequence[int],
    shape: tuple[int, Sequence[int], Sequence[int]],
    seed: str,
) -> list[RecallTrial]:
    """One trial for each distance: the same text, and at its end the question for one VALUE.

    The prompt ends with ``# get NAME`` and a newline; told is ``# get NAME`` once more, from whose
    NAME the distance is counted. Arguments as for :func:`recall_trial`; a pure function of them.
    """
    size, lead, wanted = shape
    rng = random.Random(seed)
    names, values = (rng.sample(pool, len(wanted)) for pool in (words.names, words.values))
    text = size - (2 * QUESTION + 1) - len(lead)
    start = rng.randrange(len(filler) - text + 1)
    prompt = [*lead, *filler[start : start + text]]
    prompt[-1] = words.newline
    for name, value, distance in zip(names, values, wanted, strict=True):
        at = size - 1 - distance
        prompt[at - 4 : at + 2] = words.set_line(name, value)
    return [
        RecallTrial(
            Passage(
                (*prompt, *words.question(name), words.newline),
                tuple(words.question(name)),
                (words.get, name, value),
            ),
            {QUESTION - 1: distance},
        )
        for name, value, distance in zip(names, values, wanted, strict=True)
    ]
