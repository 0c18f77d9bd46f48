"""llama.cpp, through the low-level calls of llama-cpp-python: batches of any sequences."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import protocol


class LlamaWorker:
    """One model; one context for each shape of work, made before the clock starts."""

    def load(self, message: dict[str, Any]) -> str:
        """``set``: ubatch, mmap (true, false), flash (on, off, or best: off for long decodes of one
        sequence and where prefixes are kept, on for all else, as it was found faster)."""
        wanted = message["set"]
        self.threads, self.chunk = message["threads"], message["chunk"]
        self.ubatch = wanted.get("ubatch", 512)
        self.flash = wanted.get("flash", "best")
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = bool(wanted.get("mmap", True))
        self.model = llama_cpp.llama_model_load_from_file(message["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {message['model']}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.longest, self.keeps = message["longest"], message.get("prefix_cache", False)
        self.kept: list[int] = []
        self.context: Any = None
        self.shape: tuple[int, int, bool] | None = None
        return (
            f"llama-cpp-python {llama_cpp.__version__}, {message['model'].rsplit('.', 2)[-2]}, "
            f"flash attention {self.flash}, n_batch {self.chunk}, n_ubatch {self.ubatch}"
        )

    def _prepare(self, sequences: int, length: int, best: bool) -> None:
        """A context that holds ``sequences`` of ``length`` tokens; ``best``: of flash attention."""
        length = -(-length // 256) * 256
        flash = best if self.flash == "best" else self.flash == "on"
        if (sequences, length, flash) != self.shape:
            if self.context is not None:
                llama_cpp.llama_batch_free(self.batch)
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * length, sequences
            params.n_batch, params.n_ubatch = self.chunk, self.ubatch
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = int(flash)
            params.no_perf = True
            self.context = llama_cpp.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp made no context of {sequences} x {length} tokens")
            self.batch = llama_cpp.llama_batch_init(self.chunk, 0, 1)
            self.shape = (sequences, length, flash)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) rows; the nearest token of each wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at] = token
            batch.pos[at] = position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = wanted
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")
        return [self._nearest(at) for at, row in enumerate(rows) if row[3]]

    def _nearest(self, at: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, at)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def run(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """The prompts one after another in pieces of n_batch, then all take steps together."""
        if self.keeps:
            return self._run_in_turn(prompts, new)
        best = len(prompts) > 1 or new < 64
        self._prepare(len(prompts), max(map(len, prompts)) + new, best)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        clock = protocol.Clock(len(prompts))
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(rows), self.chunk):
            piece = rows[start : start + self.chunk]
            ended = [sequence for _, _, sequence, wanted in piece if wanted]
            clock.arrived(dict(zip(ended, self._decode(piece), strict=True)))
        for step in range(new - 1):
            rows = [
                (clock.ids[sequence][-1], len(prompt) + step, sequence, True)
                for sequence, prompt in enumerate(prompts)
            ]
            clock.arrived(dict(enumerate(self._decode(rows))))
        return clock.times, clock.ids

    def _run_in_turn(
        self, prompts: Sequence[Sequence[int]], new: int
    ) -> tuple[protocol.Times, protocol.Ids]:
        """One request after another in one sequence, from the longest prefix that it has in common
        with the one before: what ``Llama.generate`` does."""
        self._prepare(1, self.longest, False)
        memory = llama_cpp.llama_get_memory(self.context)
        clock = protocol.Clock(len(prompts))
        for at, prompt in enumerate(prompts):
            pairs = zip(self.kept, prompt[:-1], strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if common is None:
                common = min(len(self.kept), len(prompt) - 1)
            llama_cpp.llama_memory_seq_rm(memory, 0, common, -1)
            rows = [(prompt[i], i, 0, i == len(prompt) - 1) for i in range(common, len(prompt))]
            found: list[int] = []
            for start in range(0, len(rows), self.chunk):
                found = self._decode(rows[start : start + self.chunk])
            clock.arrived({at: found})
            for step in range(new - 1):
                found = self._decode([(found[0], len(prompt) + step, 0, True)])
                clock.arrived({at: found})
            self.kept = [*prompt, *clock.ids[at][:-1]]
        return clock.times, clock.ids


if __name__ == "__main__":
    protocol.serve(LlamaWorker())
