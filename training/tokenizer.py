"""quill's tokenizer: byte-level BPE of 4096 tokens with single digits, trained on the corpus.

Source: BPE, Sennrich et al. 2016 (arXiv:1508.07909); byte level, Radford et al. 2019 (GPT-2); the
splitting pattern follows OpenAI's cl100k, with digits one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY_SIZE = 4096
BOS = "<|bos|>"
EOS = "<|endoftext|>"
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the one space or mark before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation up to and with the line's end
    r"|\s*[\r\n]+"  # blank lines
    r"|\s+(?!\S)|\s+"  # indentation
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train on texts; encoding with special tokens puts `<|bos|>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`."""
    return Tokenizer.from_file(str(path))
