"""A Llama in float64 that keeps a list of tokens for every KV head, and drops by the papers' rules.

Slow and obvious: nothing is paged, every head's tokens are dicts in a list, oldest first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[np.float64]
Kept = list[dict[str, Any]]


class NaiveLlama:
    """``held[layer][head]`` are the kept tokens: position, key, value, gathered attention."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
        self.tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
        self.layers = range(self.config["num_hidden_layers"])
        self.heads = range(self.config["num_key_value_heads"])
        self.held: list[list[Kept]] = [[[] for _ in self.heads] for _ in self.layers]
        self.queries: list[list[Array]] = [[] for _ in self.layers]  # [H, D] of every token
        self.fed = 0

    def feed(self, tokens: list[int]) -> Array:
        """Logits after each of ``tokens``."""
        positions = range(self.fed, self.fed + len(tokens))
        self.fed += len(tokens)
        x = self.tensors["model.embed_tokens.weight"][tokens]
        for layer in self.layers:
            at = f"model.layers.{layer}."
            mixed = self.attend(layer, self.norm(x, at + "input_layernorm"), positions)
            x = x + mixed @ self.tensors[at + "self_attn.o_proj.weight"].T
            y = self.norm(x, at + "post_attention_layernorm")
            gate = y @ self.tensors[at + "mlp.gate_proj.weight"].T
            inner = gate / (1 + np.exp(-gate)) * (y @ self.tensors[at + "mlp.up_proj.weight"].T)
            x = x + inner @ self.tensors[at + "mlp.down_proj.weight"].T
        return self.norm(x, "model.norm") @ self.tensors["lm_head.weight"].T

    def norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.tensors[name + ".weight"]

    def attend(self, layer: int, x: Array, positions: range) -> Array:
        dim, share = self.config["head_dim"], self.share
        q, k, v = (
            (x @ self.tensors[f"model.layers.{layer}.self_attn.{n}_proj.weight"].T).reshape(
                len(x), -1, dim
            )
            for n in "qkv"
        )
        out = np.empty_like(q)
        for t, position in enumerate(positions):
            query = self.rotate(q[t], position)
            self.queries[layer].append(query)
            for g in self.heads:
                key = self.rotate(k[t], position)[g]
                new = {"position": position, "key": key, "value": v[t, g], "attention": 0.0}
                self.held[layer][g].append(new)
                seen = self.seen(layer, g, query[g * share : (g + 1) * share])
                for head in range(g * share, (g + 1) * share):
                    weights = self.weights(query[head], seen)
                    for token, weight in zip(seen, weights, strict=True):
                        token["attention"] += weight
                    values = np.stack([token["value"] for token in seen])
                    out[t, head] = weights @ values
        return out.reshape(len(x), -1)

    def seen(self, layer: int, g: int, query: Array) -> Kept:
        """The kept tokens that queries [share, D] of the newest one read: all of them."""
        return self.held[layer][g]

    @property
    def share(self) -> int:
        return int(self.config["num_attention_heads"] // self.config["num_key_value_heads"])

    def rotate(self, x: Array, position: int) -> Array:
        half = x.shape[-1] // 2
        angle = position * self.config["rope_theta"] ** -(np.arange(half) / half)
        low, high = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def weights(self, query: Array, tokens: Kept) -> Array:
        scores = np.stack([token["key"] for token in tokens]) @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def drop(self, rule: Any) -> None:
        """``rule(model, layer, head)`` says which of that head's tokens stay."""
        for layer in self.layers:
            for g in self.heads:
                self.held[layer][g] = rule(self, layer, g)


def streaming_llm(budget: int, sink: int) -> Any:
    """Attention sinks and a rolling window (Xiao et al., 2023, arXiv:2309.17453, section 3.2)."""

    def rule(model: NaiveLlama, layer: int, g: int) -> Kept:
        tokens = model.held[layer][g]
        return tokens[:sink] + tokens[len(tokens) - (budget - sink) :]

    return rule


def low_norms(budget: int, recent: int) -> Any:
    """The keys of the lowest L2 norm (Devoto et al., 2024, arXiv:2406.11430, section 3)."""

    def rule(model: NaiveLlama, layer: int, g: int) -> Kept:
        tokens = model.held[layer][g]
        older, newest = tokens[:-recent], tokens[-recent:]
        lowest = sorted(older, key=lambda token: float(np.linalg.norm(token["key"])))
        return in_order(lowest[: budget - recent]) + newest

    return rule


def heavy_hitters(budget: int, recent: int) -> Any:
    """Half the most attended, half the newest (Zhang et al., 2023, arXiv:2306.14048, section 4)."""

    def rule(model: NaiveLlama, layer: int, g: int) -> Kept:
        tokens = model.held[layer][g]
        older, newest = tokens[:-recent], tokens[-recent:]
        heaviest = sorted(older, key=lambda token: -token["attention"])
        return in_order(heaviest[: budget - recent]) + newest

    return rule


def snap(budget: int, window: int, kernel: int) -> Any:
    """The newest ``window`` queries vote; votes are pooled (Li et al., 2024, arXiv:2404.14469, 4).

    Where queries share a KV head their votes are summed.
    """

    def rule(model: NaiveLlama, layer: int, g: int) -> Kept:
        tokens = model.held[layer][g]
        prefix = len(tokens) - window
        votes = np.zeros(prefix)
        for back in range(1, window + 1):
            seen = tokens[: len(tokens) - back + 1]
            for head in range(g * model.share, (g + 1) * model.share):
                votes += model.weights(model.queries[layer][-back][head], seen)[:prefix]
        reach = kernel // 2
        pooled = [max(votes[max(0, i - reach) : i + reach + 1]) for i in range(prefix)]
        chosen = sorted(range(prefix), key=lambda i: (-pooled[i], i))[: budget - window]
        return in_order([tokens[i] for i in chosen]) + tokens[prefix:]

    return rule


def in_order(tokens: Kept) -> Kept:
    return sorted(tokens, key=lambda token: int(token["position"]))
