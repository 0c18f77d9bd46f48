"""Quire, through its public API."""

from collections.abc import Sequence
from typing import Any

import protocol

import quire


class QuireWorker:
    """One Engine; a step at a time."""

    def load(self, message: dict[str, Any]) -> str:
        """``set``: page_size, kv_format."""
        wanted = message["set"]
        page = wanted.get("page_size", 16)
        sequences = message["sequences"]
        self.engine = quire.Engine(
            message["model"],
            threads=message["threads"],
            max_batch_tokens=message["chunk"],
            max_sequences=sequences,
            cache=quire.CacheConfig(
                page_size=page,
                kv_format=wanted.get("kv_format", "auto"),
                num_pages=-(-message["tokens"] // page) + 2 * sequences,
                prefix_cache=message.get("prefix_cache", False),
            ),
        )
        backend = self.engine.backend
        name = f"{backend.name} {getattr(backend, 'variant', '')}".strip()
        return f"quire {quire.__version__}, {name}, {message['chunk']} tokens a step"

    def run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """All at once."""
        params = quire.SamplingParams(max_new_tokens=new, ignore_eos=True)
        clock = protocol.Clock(len(prompts))
        of = {self.engine.submit(prompt, params): at for at, prompt in enumerate(prompts)}
        while self.engine.has_work:
            outputs = self.engine.step()
            clock.arrived({of[out.request]: out.token_id for out in outputs})
        return clock.times, clock.ids


if __name__ == "__main__":
    protocol.serve(QuireWorker())
