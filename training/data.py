"""Batches: token arrays of the corpus, and what row r of step s holds.

A batch is a pure function of (seed, step, row length), so a resumed run sees exactly the data it
would have seen, and nothing about the data order needs to be stored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import HELD_OUT, Corpus, read_corpus
from training.recall import RecallVocabulary, training_document
from training.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer

Tokens = npt.NDArray[np.uint16]
CORPUS = "corpus.json"


@dataclass(frozen=True)
class Mix:
    """Shares of rows, and the weight of an answer token in the loss (plain text weighs 1)."""

    recall: float = 0.35
    dense: float = 0.4
    tests: float = 0.3
    answer_weight: float = 4.0


@dataclass(frozen=True)
class TrainingText:
    """Token streams of the two shares, documents as bos text eos, and what reads them."""

    tokenizer: Tokenizer
    library: Tokens
    tests: Tokens


@dataclass(frozen=True)
class Batch:
    """Inputs, targets, loss weights, and distances (0 where no answer), each [rows, time]."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    distances: Tensor


def prepare(folder: Path) -> TrainingText:
    """Train the tokenizer and encode the corpus into folder, or read what is already there."""
    paths = [folder / name for name in ("tokenizer.json", "library.npy", "tests.npy", CORPUS)]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        _encode_corpus(read_corpus(), paths)
    tokenizer = load_tokenizer(paths[0])
    library, tests = (np.load(path, allow_pickle=False) for path in paths[1:3])
    return TrainingText(tokenizer, library, tests)


def _encode_corpus(corpus: Corpus, paths: list[Path]) -> None:
    tokenizer = train_tokenizer(corpus.library)
    library = encode_documents(tokenizer, corpus.library)
    tests = encode_documents(tokenizer, corpus.tests)
    tokenizer.save(str(paths[0]))
    np.save(paths[1], library)
    np.save(paths[2], tests)
    about = {
        "python_version": corpus.python_version,
        "library": describe(corpus.library, library),
        "tests": describe(corpus.tests, tests),
        "held_out": list(HELD_OUT),
    }
    paths[3].write_text(json.dumps(about, indent=2) + "\n")
    print(f"corpus of CPython {corpus.python_version}", flush=True)


def describe(texts: list[str], tokens: Tokens) -> dict[str, int]:
    """Sizes of one share of the corpus."""
    size = sum(len(text.encode()) for text in texts)
    return {"files": len(texts), "bytes": size, "tokens": len(tokens)}


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokens:
    """One stream: for each text bos, its tokens, eos."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([bos, *item.ids, eos], np.uint16) for item in encodings])


class Sampler:
    """Makes the batch of any step."""

    def __init__(self, text: TrainingText, mix: Mix, seed: int) -> None:
        self.text = text
        self.mix = mix
        self.seed = seed
        self.vocabulary = RecallVocabulary.from_tokenizer(text.tokenizer)

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Rows of length predicted tokens each, for this step."""
        made = [
            self._row(random.Random(f"{self.seed}/{step}/{row}"), length + 1) for row in range(rows)
        ]
        tokens, weights, distances = (
            torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True)
        )
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            weights[:, 1:].contiguous(),
            distances[:, 1:].contiguous(),
        )

    def _row(
        self, rng: random.Random, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        stream = self.text.tests if rng.random() < self.mix.tests else self.text.library
        start = rng.randrange(len(stream) - length)
        window = stream[start : start + length].astype(np.int64)
        weights = np.ones(length, np.float32)
        distances = np.zeros(length, np.int64)
        if rng.random() >= self.mix.recall:
            window[0] = self.vocabulary.bos
            return window, weights, distances
        document = training_document(
            self.vocabulary, window.tolist(), length, self._pairs(rng, length), rng
        )
        weights[document.random_positions] = 0.0
        for answer in document.answers:
            weights[answer.position] = self.mix.answer_weight
            distances[answer.position] = answer.distance
        return np.array(document.tokens, np.int64), weights, distances

    def _pairs(self, rng: random.Random, length: int) -> int:
        """Dense documents are mostly recall lines, the others mostly library text."""
        fit = length // 15
        if rng.random() < self.mix.dense:
            return rng.randint(fit // 2, fit)
        return rng.randint(4, max(8, fit // 4))
