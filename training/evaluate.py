"""Measure an exported model: held-out bits per byte, and recall by distance.

`python -m training.evaluate FOLDER` prints the figures and writes FOLDER/evaluation.json. The
weights are computed with in float32 whatever their stored type.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.export import EVALUATION, TOKENIZER, load_export, read_held_out
from training.model import Quill
from training.recall import RecallTrial, RecallVocabulary, evaluation_trial
from training.tokenizer import BOS, load_tokenizer

WINDOW = 2048
STRIDE = 1024
DISTANCES = (32, 64, 128, 256, 512, 1024, 1536, 1980)
TRIALS = 100
PROMPT_TOKENS = 2040
DISTRACTORS = 8
ROWS = 4
BITS_PER_BYTE_METHOD = (
    f"Windows of {WINDOW} inputs, <|bos|> first, then {WINDOW - 1} tokens of the module; each "
    f"window begins {STRIDE} tokens after the one before, and scores only tokens no window scored "
    f"before, so that all but a module's first {WINDOW} tokens have at least {STRIDE - 1} tokens "
    "of context. Bits summed over all tokens of a module, divided by its UTF-8 bytes. float32."
)
RECALL_METHOD = (
    f"{PROMPT_TOKENS}-token prompts of held-out library text with {DISTRACTORS + 1} "
    "`# set NAME VALUE` lines, ending in `# get NAME`; right when greedy top-1 over the whole "
    "vocabulary is that name's value. Distance in tokens from the value to the end of the prompt."
)


def main() -> None:
    """Evaluate the model in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=TRIALS, help="recall prompts a distance")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_export(options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    tokenizer = load_tokenizer(options.folder / TOKENIZER)
    texts = read_held_out(options.folder)
    start = time.monotonic()
    result = {
        "bits_per_byte": bits_per_byte(model, tokenizer, texts),
        "recall": recall_by_distance(model, tokenizer, texts, options.trials, options.seed),
    }
    (options.folder / EVALUATION).write_text(json.dumps(result, indent=2) + "\n")
    print(f"evaluated in {time.monotonic() - start:.0f} s")


@torch.no_grad()
def bits_per_byte(model: Quill, tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, Any]:
    """Bits a byte of every text and of all together."""
    modules = {}
    bos = tokenizer.get_vocab()[BOS]
    bits_of_all = bytes_of_all = tokens_of_all = 0.0
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        bits = nats_of(model, bos, ids) / math.log(2)
        size = len(text.encode())
        modules[name] = {"bits_per_byte": round(bits / size, 4), "bytes": size, "tokens": len(ids)}
        print(f"{name:14} {bits / size:.4f} bits per byte", flush=True)
        bits_of_all, bytes_of_all = bits_of_all + bits, bytes_of_all + size
        tokens_of_all += len(ids)
    total = {
        "bits_per_byte": round(bits_of_all / bytes_of_all, 4),
        "bytes": int(bytes_of_all),
        "tokens": int(tokens_of_all),
        "perplexity_per_token": round(2 ** (bits_of_all / tokens_of_all), 3),
    }
    print(f"{'all':14} {total['bits_per_byte']:.4f} bits per byte", flush=True)
    return {"method": BITS_PER_BYTE_METHOD, "total": total, "modules": modules}


def nats_of(model: Quill, bos: int, ids: list[int]) -> float:
    """Sum of -log p over all ids (nats), with sliding windows."""
    nats = 0.0
    scored = 0
    for start in range(0, len(ids), STRIDE):
        targets = ids[start : start + WINDOW]
        losses = _token_losses(model, [bos, *targets[:-1]], targets)
        nats += losses[scored - start :].sum().item()
        scored = start + len(targets)
        if scored == len(ids):
            break
    return nats


def _token_losses(model: Quill, inputs: list[int], targets: list[int]) -> Tensor:
    """-log p of every target, float32 [time]."""
    device = model.model.embed_tokens.weight.device
    logits = model(torch.tensor([inputs], device=device))[0].float()
    return F.cross_entropy(logits, torch.tensor(targets, device=device), reduction="none")


def recall_trials(
    tokenizer: Tokenizer, texts: dict[str, str], distance: int, trials: int, seed: int
) -> list[RecallTrial]:
    """The prompts of one distance; a pure function of its arguments."""
    vocabulary = RecallVocabulary.from_tokenizer(tokenizer)
    filler = tokenizer.encode("".join(texts.values()), add_special_tokens=False).ids
    made = []
    for trial in range(trials):
        rng = random.Random(f"{seed}/{distance}/{trial}")
        start = rng.randrange(len(filler) - PROMPT_TOKENS)
        made.append(
            evaluation_trial(
                vocabulary,
                filler[start : start + PROMPT_TOKENS],
                distance,
                length=PROMPT_TOKENS,
                distractors=DISTRACTORS,
                rng=rng,
            )
        )
    return made


@torch.no_grad()
def recall_by_distance(
    model: Quill, tokenizer: Tokenizer, texts: dict[str, str], trials: int, seed: int
) -> dict[str, Any]:
    """Share of right answers at each distance, and what guessing would reach."""
    accuracy = {}
    for distance in DISTANCES:
        made = recall_trials(tokenizer, texts, distance, trials, seed)
        right = sum(_count_right(model, made[row : row + ROWS]) for row in range(0, trials, ROWS))
        accuracy[str(distance)] = round(right / trials, 4)
        print(f"recall at {distance:5} tokens {right / trials:.3f}", flush=True)
    values = len(RecallVocabulary.from_tokenizer(tokenizer).values)
    return {
        "method": RECALL_METHOD,
        "trials_per_distance": trials,
        "seed": seed,
        "accuracy_by_distance": accuracy,
        "chance_any_token": round(1 / model.config.vocab_size, 5),
        "chance_any_value_word": round(1 / values, 5),
        "chance_value_in_prompt": round(1 / (DISTRACTORS + 1), 4),
    }


def _count_right(model: Quill, trials: list[RecallTrial]) -> int:
    device = model.model.embed_tokens.weight.device
    prompts = torch.tensor([trial.prompt for trial in trials], device=device)
    answers = torch.tensor([trial.answer for trial in trials], device=device)
    last = model.model(prompts)[:, -1]
    guesses = F.linear(last, model.model.embed_tokens.weight).argmax(-1)
    return int((guesses == answers).sum().item())


if __name__ == "__main__":
    main()
