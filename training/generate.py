"""Plain generation without a cache, for looking at what a model writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from training.model import Quill


@torch.no_grad()
def generate(
    model: Quill,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text of count tokens after prompt; greedy at temperature 0."""
    generator = torch.Generator().manual_seed(seed)
    start = tokenizer.encode(prompt).ids
    ids = list(start)
    for _ in range(count):
        context = torch.tensor([ids[-model.config.max_position_embeddings :]])
        logits = model(context)[0, -1].float()
        if temperature:
            probability = F.softmax(logits / temperature, dim=-1)
            ids.append(int(torch.multinomial(probability, 1, generator=generator)))
        else:
            ids.append(int(logits.argmax()))
    return str(tokenizer.decode(ids[len(start) :]))
