"""vLLM for CPUs, its engine in this process, a step at a time."""

from collections.abc import Sequence
from typing import Any

import protocol


class VLLMWorker:
    """One LLM; requests go to its engine."""

    def load(self, message: dict[str, Any]) -> str:
        """``set``: eager (no torch.compile), and any other argument of ``LLM``."""
        import vllm

        wanted = dict(message["set"])
        eager = bool(wanted.pop("eager", False))
        self.vllm = vllm
        longest = message["longest"]
        llm = vllm.LLM(
            model=message["model"],
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=message["sequences"],
            max_num_batched_tokens=max(message["chunk"], message["sequences"]),
            enable_prefix_caching=message.get("prefix_cache", False),
            enforce_eager=eager,
            **wanted,
        )
        self.engine = llm.llm_engine
        self.requests = 0
        mode = "eager" if eager else "compiled"
        return f"vllm {vllm.__version__}, bf16, {mode}, {message['chunk']} tokens a step"

    def run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """All at once."""
        params = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        clock = protocol.Clock(len(prompts))
        of: dict[str, int] = {}
        for at, prompt in enumerate(inputs):
            self.requests += 1
            of[str(self.requests)] = at
            self.engine.add_request(str(self.requests), prompt, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            fresh: dict[int, int | Sequence[int]] = {}
            for out in outputs:
                at = of[out.request_id]
                fresh[at] = list(out.outputs[0].token_ids)[len(clock.ids[at]) :]
            clock.arrived(fresh)
        return clock.times, clock.ids


if __name__ == "__main__":
    protocol.serve(VLLMWorker())
