"""Recall documents: values set early and asked for later, with real library text between.

A document is library text into which comment lines are put. `# set NAME VALUE` states a value,
`# get NAME VALUE` asks for it: a model that has read the first line predicts VALUE after NAME in
the second. NAME and VALUE are one token each, so an answer is one greedy top-1 prediction over the
whole vocabulary. Names are drawn afresh for every document and never repeat within one, so only
the context tells the answer. This is associative recall (Arora et al. 2023, arXiv:2312.04927) and
what induction heads do (Olsson et al. 2022, arXiv:2209.11895).

Distances are in tokens, from the VALUE as last stated (by the set line, or by an earlier get line,
which states it too) to the NAME of the get line, the position whose next-token prediction is the
answer: so many positions back lies the entry of a KV cache that the answer needs.

Everything here is a pure function of its arguments, and needs no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

WORDS_PER_ROLE = 320
LINE_TOKENS = 5
MINIMUM_LETTERS = 3
RESERVED = ("set", "get")
QUESTIONS = (1, 1, 2, 4)
"""How often a name is asked for in a training document; one of these, drawn for each name."""
MINIMUM_DISTANCE = LINE_TOKENS - 1
"""Distance when the get line follows its set line at once: newline, `#`, ` get`, NAME."""


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids recall lines are made of; names and values are disjoint."""

    bos: int
    hash: int
    set: int
    get: int
    newline: int
    names: tuple[int, ...]
    values: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> RecallVocabulary:
        """Pick the first 2 x WORDS_PER_ROLE lower-case words with a space before them, by id."""
        vocabulary = tokenizer.get_vocab()
        words = sorted(index for text, index in vocabulary.items() if _is_word(text))
        words = words[: 2 * WORDS_PER_ROLE]
        return cls(
            bos=vocabulary["<|bos|>"],
            hash=vocabulary["#"],
            set=vocabulary["Ġset"],
            get=vocabulary["Ġget"],
            newline=vocabulary["Ċ"],
            names=tuple(words[0::2]),
            values=tuple(words[1::2]),
        )

    def set_line(self, name: int, value: int) -> list[int]:
        """Tokens of `# set NAME VALUE` and a newline."""
        return [self.hash, self.set, name, value, self.newline]

    def get_line(self, name: int, value: int) -> list[int]:
        """Tokens of `# get NAME VALUE` and a newline."""
        return [self.hash, self.get, name, value, self.newline]


def _is_word(text: str) -> bool:
    """Whether a token, spelled as in the vocabulary (Ġ for a space), may be a name or a value."""
    word = text.removeprefix("Ġ")
    ordinary = word.isascii() and word.isalpha() and word.islower()
    return text != word and ordinary and len(word) >= MINIMUM_LETTERS and word not in RESERVED


@dataclass(frozen=True)
class Answer:
    """An answer inside a document: tokens[position] is its VALUE, known since distance before."""

    position: int
    distance: int


@dataclass(frozen=True)
class RecallDocument:
    """Token ids with the places of answers, and of tokens that nothing can predict."""

    tokens: list[int]
    answers: list[Answer]
    random_positions: list[int]


@dataclass(frozen=True)
class RecallTrial:
    """A prompt that ends after the NAME of a get line; the next token ought to be answer."""

    prompt: list[int]
    answer: int
    distance: int


def training_document(
    vocabulary: RecallVocabulary,
    filler: Sequence[int],
    length: int,
    pairs: int,
    rng: random.Random,
) -> RecallDocument:
    """A document of exactly length tokens with up to pairs names, asked for at mixed distances.

    filler is at least length tokens of library text, used from its start and interrupted by lines.
    """
    events = _schedule(vocabulary, length, pairs, rng)
    tokens = [vocabulary.bos]
    answers: list[Answer] = []
    random_positions: list[int] = []
    stated: dict[int, int] = {}
    used = 0
    for at, name, value in events:
        gap = at - len(tokens)
        if gap > 1:
            tokens += filler[used : used + gap - 1]
            tokens.append(vocabulary.newline)
            used += gap - 1
        if len(tokens) + LINE_TOKENS > length:
            break
        name_position = len(tokens) + 2
        random_positions.append(name_position)
        if name in stated:
            tokens += vocabulary.get_line(name, value)
            answers.append(Answer(name_position + 1, name_position - stated[name]))
        else:
            tokens += vocabulary.set_line(name, value)
            random_positions.append(name_position + 1)
        stated[name] = name_position + 1
    tokens += filler[used : used + length - len(tokens)]
    return RecallDocument(tokens, answers, random_positions)


def _schedule(
    vocabulary: RecallVocabulary, length: int, pairs: int, rng: random.Random
) -> list[tuple[int, int, int]]:
    """Wanted (position, name, value) of every line, in order; a name's first line sets it."""
    names = rng.sample(vocabulary.names, min(pairs, len(vocabulary.names)))
    events = []
    last = length - LINE_TOKENS
    for name in names:
        value = rng.choice(vocabulary.values)
        distance = _draw_distance(last - LINE_TOKENS, rng)
        at = rng.randint(1, last - distance)
        events.append((at, name, value))
        for _ in range(rng.choice(QUESTIONS)):
            at += distance
            events.append((at, name, value))
            if last - at < LINE_TOKENS:
                break
            distance = _draw_distance(last - at, rng)
    return sorted(events)


def _draw_distance(longest: int, rng: random.Random) -> int:
    """Half the draws are uniform, half log-uniform, over [LINE_TOKENS, longest]."""
    if rng.random() < 0.5:
        return rng.randint(LINE_TOKENS, longest)
    spread: float = (longest / LINE_TOKENS) ** rng.random()
    return round(LINE_TOKENS * spread)


def evaluation_trial(
    vocabulary: RecallVocabulary,
    filler: Sequence[int],
    distance: int,
    *,
    length: int,
    distractors: int,
    rng: random.Random,
) -> RecallTrial:
    """A prompt of exactly length tokens whose answer was stated exactly distance tokens before.

    The distractors are other names with other values: a random half of them is set on the lines
    right before the asked one, the rest at random places after it, as far as they fit the distance.
    What is left is filler, which must hold at least length tokens.
    """
    names = rng.sample(vocabulary.names, distractors + 1)
    values = rng.sample(vocabulary.values, distractors + 1)
    lines = [vocabulary.set_line(name, value) for name, value in zip(names, values, strict=True)]
    asked, others = lines[0], lines[1:]
    between = distance - MINIMUM_DISTANCE
    after = min((distractors + 1) // 2, between // (2 * LINE_TOKENS))
    tail = _interleave(vocabulary, others[:after], filler, between, rng)
    lead = 1 + LINE_TOKENS * (1 + distractors - after)
    head_filler = length - lead - between - (LINE_TOKENS - 2)
    prompt = [vocabulary.bos, *_text(vocabulary, filler[len(tail) :], head_filler)]
    for line in [*others[after:], asked]:
        prompt += line
    prompt += [*tail, vocabulary.hash, vocabulary.get, names[0]]
    return RecallTrial(prompt, values[0], distance)


def _interleave(
    vocabulary: RecallVocabulary,
    lines: list[list[int]],
    filler: Sequence[int],
    length: int,
    rng: random.Random,
) -> list[int]:
    """Filler with the lines at random places: length tokens in all, whole lines only."""
    text = length - LINE_TOKENS * len(lines)
    cuts = sorted(rng.randint(0, text) for _ in lines)
    out: list[int] = []
    for start, stop, line in zip([0, *cuts], [*cuts, text], [*lines, None], strict=True):
        out += _text(vocabulary, filler[start:], stop - start)
        out += line or []
    return out


def _text(vocabulary: RecallVocabulary, filler: Sequence[int], length: int) -> list[int]:
    """The first length tokens of filler, the last one replaced by a newline."""
    return [*filler[: length - 1], vocabulary.newline] if length > 0 else []
