"""A Llama whose attention is a plain PyTorch loop over pages: what a cache is without kernels.

The baseline of part ``streaming`` of ``bench/gpu.py``. Everything is done as one would write it
down first: dense work on all new tokens at once, keys and values written into pages one token at a
time, and attention of all queries to one page after the other with the online softmax (Milakov &
Gimelshein, 2018, arXiv:1805.02867), so that no more scores exist at a time than those of a page.
Queries that stand before a page do not look at it. One sequence; as many KV heads as heads.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

__all__ = ["PageLoop"]

Tensor = Any


class PageLoop:
    """A checkpoint on ``device``, computing in ``dtype``."""

    def __init__(self, directory: Path, page_size: int, device: str, dtype: torch.dtype) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config["num_attention_heads"] != config["num_key_value_heads"]:
            raise ValueError("the loop has no grouped queries")
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.page_size, self.device, self.dtype = page_size, device, dtype
        stored = load_file(directory / "model.safetensors")
        self.weights = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        # NumPy's powers and torch's differ in the last bit, which many tokens on is an angle.
        steps = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        frequencies = np.float32(1) / np.power(np.float32(config["rope_theta"]), steps)
        self.frequencies = torch.from_numpy(frequencies).to(device)
        self.forget()

    def forget(self) -> None:
        """Begin a new sequence; its pages are let go."""
        self.length = 0
        self.pages: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]

    @torch.inference_mode()
    def forward(self, tokens: list[int], rows: slice = slice(-1, None)) -> Tensor:
        """Take the next tokens of the sequence; logits [len(rows), vocab] of those of them."""
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens, device=self.device)]
        positions = torch.arange(self.length, self.length + len(tokens), device=self.device)
        angles = (positions[:, None].float() * self.frequencies).to(self.dtype)
        cos, sin = angles.cos(), angles.sin()
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(x, f"{at}input_layernorm"), cos, sin)
            x = x + self._mlp(f"{at}mlp.", self._norm(x, f"{at}post_attention_layernorm"))
        self.length += len(tokens)
        return self._linear(self._norm(x[rows], "model.norm"), "lm_head")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        gate, up = self._linear(x, f"{at}gate_proj"), self._linear(x, f"{at}up_proj")
        return self._linear(silu(gate) * up, f"{at}down_proj")

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    def _attention(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        at = f"model.layers.{layer}.self_attn."
        query, key, value = (
            self._linear(x, f"{at}{part}_proj").view(len(x), self.heads, self.dim)
            for part in ("q", "k", "v")
        )
        self._write(layer, self._rotate(key, cos, sin), value)
        mixed = self._mix(layer, self._rotate(query, cos, sin))
        return self._linear(mixed.reshape(len(x), -1), f"{at}o_proj")

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [T, heads, D] into the pages [heads, page_size, D], token by token."""
        pages = self.pages[layer]
        for token in range(len(key)):
            offset = (self.length + token) % self.page_size
            if offset == 0:
                shape = (self.heads, self.page_size, self.dim)
                pages.append(
                    tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv")
                )
            pages[-1][0][:, offset] = key[token]
            pages[-1][1][:, offset] = value[token]

    def _mix(self, layer: int, query: Tensor) -> Tensor:
        """Queries [T, heads, D] -> [T, heads, D]."""
        query = query.transpose(0, 1) * self.dim**-0.5
        tokens, end = query.shape[1], self.length + query.shape[1]
        best = torch.full((self.heads, tokens, 1), -torch.inf, device=self.device, dtype=self.dtype)
        total, mixed = torch.zeros_like(best), torch.zeros_like(query)
        for number, (key, value) in enumerate(self.pages[layer]):
            first = number * self.page_size
            used = min(self.page_size, end - first)
            seeing = slice(max(0, first - self.length), tokens)
            scores = query[:, seeing] @ key[:, :used].transpose(1, 2)
            if first + used - 1 > self.length + seeing.start:  # some queries stand inside
                places = torch.arange(first, first + used, device=self.device)
                stand = torch.arange(self.length + seeing.start, end, device=self.device)
                scores = scores.masked_fill(places > stand[:, None], -torch.inf)
            peak = torch.maximum(best[:, seeing], scores.amax(-1, keepdim=True))
            weights, shrink = torch.exp(scores - peak), torch.exp(best[:, seeing] - peak)
            total[:, seeing] = total[:, seeing] * shrink + weights.sum(-1, keepdim=True)
            mixed[:, seeing] = mixed[:, seeing] * shrink + weights @ value[:, :used]
            best[:, seeing] = peak
        return (mixed / total).transpose(0, 1)
