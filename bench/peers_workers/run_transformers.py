"""transformers, eager, with its key-value cache kept between steps."""

from collections.abc import Sequence
from typing import Any

import protocol
import torch
import transformers


class TransformersWorker:
    """Prompts of one length, as one batch."""

    def load(self, message: dict[str, Any]) -> str:
        """``set``: attention; cache (dynamic, static, or auto: static for more than one token,
        which copies nothing between steps); compile (torch.compile for the steps)."""
        wanted = message["set"]
        torch.set_num_threads(message["threads"])
        self.cache = wanted.get("cache", "auto")
        attention = wanted.get("attention", "sdpa")
        self.chunk = message["chunk"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            message["model"], dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        compiled = bool(wanted.get("compile", False))
        self.step = torch.compile(self.model, dynamic=False) if compiled else self.model
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return f"{versions}, bf16, {attention}, {self.cache} cache{', compiled' * compiled}"

    def run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """The whole batch goes through the prompt, then takes steps together."""
        if len({len(prompt) for prompt in prompts}) > 1:
            raise protocol.Unsupported("prompts of different lengths would need padding")
        with torch.inference_mode():
            return self._run(prompts, new)

    def _make_cache(self, batch: int, length: int, new: int) -> Any:
        if self.cache == "static" or (self.cache == "auto" and new > 1):
            return transformers.StaticCache(
                config=self.model.config, max_batch_size=batch, max_cache_len=length
            )
        return transformers.DynamicCache(config=self.model.config)

    def _run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        clock = protocol.Clock(len(prompts))
        ids = torch.tensor(prompts)
        cache = self._make_cache(len(prompts), ids.shape[1] + new, new)
        # At most this many tokens a forward pass, of all rows: what is between takes memory.
        width = max(1, self.chunk // len(prompts))
        pieces, model = [*ids.split(width, 1)], self.model
        for _ in range(new):
            for piece in pieces:
                out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            nearest = out.logits[:, -1].argmax(-1, keepdim=True)
            clock.arrived(dict(enumerate(nearest[:, 0].tolist())))
            pieces, model = [nearest], self.step
        return clock.times, clock.ids


if __name__ == "__main__":
    protocol.serve(TransformersWorker())
