"""OpenVINO GenAI, its continuous-batching pipeline."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import protocol


def cache_bytes(config: str, tokens: int) -> int:
    """Bytes of bf16 keys and values, read from the text of ``config.json``."""
    number = {name: int(value) for name, value in re.findall(r'"(\w+)":\s*(\d+)', config)}
    heads, layers = number["num_key_value_heads"], number["num_hidden_layers"]
    return tokens * layers * heads * number["head_dim"] * 2 * 2


class OpenVINOWorker:
    """One pipeline; a step at a time."""

    def load(self, message: dict[str, Any]) -> str:
        """``set``: precision (bf16, f32), kv (bf16, f16, u8), split (dynamic_split_fuse)."""
        wanted = message["set"]
        directory = Path(message["model"])
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = message["chunk"]
        scheduler.max_num_seqs = message["sequences"]
        scheduler.enable_prefix_caching = message.get("prefix_cache", False)
        scheduler.dynamic_split_fuse = bool(wanted.get("split", True))
        blocks = -(-message["tokens"] // 32) + 2 * message["sequences"]
        if wanted.get("kv", "bf16") == "u8":
            scheduler.cache_size = 1
        else:
            scheduler.num_kv_blocks = blocks
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": message["threads"],
            "KV_CACHE_PRECISION": wanted.get("kv", "bf16"),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if "precision" in wanted:
            properties["INFERENCE_PRECISION_HINT"] = wanted["precision"]
        properties |= wanted.get("properties", {})
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(directory), scheduler, "CPU", properties
        )
        self.requests = 0
        return (
            f"openvino-genai {openvino_genai.__version__}, weights fp16, "
            f"{properties}, {message['chunk']} tokens a step"
        )

    def run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """All at once."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new
        config.min_new_tokens = 0
        config.ignore_eos = True
        config.do_sample = False
        arrays = [np.array([prompt], np.int64) for prompt in prompts]
        clock = protocol.Clock(len(prompts))
        handles = []
        for array in arrays:
            self.requests += 1
            tensor = openvino.Tensor(array)
            handles.append(self.pipeline.add_request(self.requests, tensor, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            clock.arrived({at: _read(handle) for at, handle in enumerate(handles)})
        return clock.times, clock.ids


def _read(handle: Any) -> list[int]:
    fresh: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            fresh += output.generated_ids
    return fresh


if __name__ == "__main__":
    protocol.serve(OpenVINOWorker())
