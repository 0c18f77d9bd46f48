"""Part ``transformers`` of ``bench/gpu.py``: the same weights, prompts and greedy rule, elsewhere.

Llama 1B shapes in bf16, 512 random tokens of prompt and 128 new ones of each sequence, end of text
ignored. Tokens a second are new tokens over all of the time, prompts included. Theirs is given what
it is best at: ``generate`` with a static cache (which compiles its decode step), and continuous
batching with a manager that ``generate_batch`` sized and warmed up for this very work, and that
goes on running. Contestants work one after another, since each takes the memory that it finds.
"""

import gc
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import LLAMA_1B, TINY, checkpoint
from gpu_rows import Row, summary
from gpu_timing import Setting

import quire

__all__ = ["transformers"]

Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]


class Contest:
    """Seconds and first answers of each contestant, by number of sequences."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.shape = setting.choose(LLAMA_1B, LLAMA_1B, TINY)
        self.counts = setting.choose((8, 64, 1), (8,), (2, 1))
        self.prompt, self.new = setting.choose((512, 128), (512, 128), (12, 3))
        self.repeats = setting.choose(3, 2, 1)
        self.directory: Path = checkpoint(setting.work, self.shape, "bfloat16", setting.kind)
        self.answers: dict[int, list[list[int]]] = {}
        self.ours: dict[int, float] = {}

    def prompts(self, count: int, seed: int) -> Prompts:
        """The same for every contestant, others in each repeat."""
        draw, ids = random.Random(f"{count} {seed}"), range(self.shape.vocabulary)
        return [draw.choices(ids, k=self.prompt) for _ in range(count)]

    def run(self, name: str, count: int, generate: Generate) -> None:
        """Repeats behind one that warms up, and their row."""
        answers, taken = generate(self.prompts(count, 0)), list[float]()
        lengths = {len(answer) for answer in answers}
        if len(answers) != count or lengths != {self.new}:
            raise RuntimeError(f"{self.new} new tokens were asked for, {sorted(lengths)} came")
        for at in range(1, self.repeats + 1):
            prompts = self.prompts(count, at)
            taken.append(self.setting.watch.wall(partial(generate, prompts))[0])
        seconds, spread = summary(taken)
        row = partial(
            Row, self.setting.part, f"{count} x {self.prompt} + {self.new}, {name}",
            count * self.new / seconds, "tokens/s", spread, len(taken), "wall", seconds=seconds,
        )  # fmt: skip
        if name == "quire":
            self.ours[count], self.answers[count] = seconds, answers
            self.setting.emit(row())
            return
        ratio = seconds / self.ours[count] if count in self.ours else None
        note = ""
        if count in self.answers:
            pairs = zip(answers, self.answers[count], strict=True)
            same = sum(one[0] == other[0] for one, other in pairs)
            note = f"{same} of {count} first tokens are ours"
        self.setting.emit(row(ratio=ratio, of="quire's over these", note=note))

    def each(self, name: str, generate: Generate) -> None:
        """All numbers of sequences."""
        for count in self.counts:
            self.setting.attempt(f"{count}, {name}", partial(self.run, name, count, generate))


def transformers(setting: Setting) -> None:
    """Quire, then transformers' two ways."""
    contest = Contest(setting)
    setting.attempt("quire", partial(_quire, contest))
    _free()
    model = setting.attempt("transformers", partial(_model, contest))
    if model is None:
        return
    for count in contest.counts:
        case = f"{count}, continuous batching"
        setting.attempt(case, partial(_continuous, model, contest, count))
        _free()
    contest.each("static cache", partial(_static, model, contest))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quire(contest: Contest) -> None:
    most = max(contest.counts)
    pages = most * (-(-(contest.prompt + contest.new) // 16) + 1)
    params = quire.SamplingParams(max_new_tokens=contest.new, ignore_eos=True)
    engine = quire.Engine(
        contest.directory, backend="cuda", max_sequences=most,
        cache=quire.CacheConfig(num_pages=pages, prefix_cache=False),
        max_batch_tokens=contest.setting.choose(8192, 8192, 64),
    )  # fmt: skip

    def generate(prompts: Prompts) -> list[list[int]]:
        return [list(done.token_ids) for done in engine.generate(prompts, params)]

    contest.each("quire", generate)


def _model(contest: Contest) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        contest.directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.to(contest.setting.kind).eval()


def _settings(contest: Contest, **more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=contest.new, do_sample=False, **more)


@torch.inference_mode()
def _static(model: Any, contest: Contest, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    settings = _settings(contest, cache_implementation="static", pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return answers


def _continuous(model: Any, contest: Contest, count: int) -> None:
    settings, first = _settings(contest, eos_token_id=-1), contest.prompts(count, 0)
    attention = model.config._attn_implementation
    small: dict[str, Any] = {}
    if contest.setting.kind == "cpu":  # which it would take most of the memory of
        from transformers.generation import ContinuousBatchingConfig

        config = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
        small = {"continuous_batching_config": config}
    try:
        model.generate_batch(
            first, generation_config=settings, progress_bar=False, persistent_manager=True, **small
        )
        with model.continuous_batching_context_manager(generation_config=settings) as manager:
            paged = model.config._attn_implementation
            generate = partial(_managed, manager, contest.new)
            contest.run(f"continuous batching, {paged}", count, generate)
    finally:  # its cache is as large as the memory that was free
        model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(attention)  # what fails before it has begun leaves its own


def _managed(manager: Any, new: int, prompts: Prompts) -> list[list[int]]:
    names = manager.add_requests(inputs=prompts, max_new_tokens=new)
    done: dict[str, list[int]] = {}
    while len(done) < len(names):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("the manager's thread has ended")
        if result is not None and result.is_finished():
            done[result.request_id] = list(result.generated_tokens)
    return [done[name] for name in names]
