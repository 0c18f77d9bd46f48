"""Part ``streaming`` of ``bench/gpu.py``: a small model here and in a plain loop over pages.

Six layers, hidden 768, 12 heads of 64, inner 2,048 (two thirds of four times hidden), 32,000 tokens
in the vocabulary, pages of 256, one sequence. The loop (``gpu_baseline.py``) computes in float32,
its products with TF32; ours in float32 without TF32 over fp32 pages ("fp32"), and with weights and
pages in bf16 ("bf16"). Weights and the pages of the longest sequence count in peak memory, of both.
"""

import contextlib
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_baseline import PageLoop
from gpu_checkpoints import STREAMED, TINY, LlamaShape, checkpoint
from gpu_rows import summary
from gpu_timing import Setting

import quire

__all__ = ["streaming"]

T = TypeVar("T")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Contest:
    """Times and peaks of each contestant, by case."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.shape: LlamaShape = setting.choose(STREAMED, STREAMED, TINY)
        self.page = setting.choose(256, 256, 16)
        self.prompts = setting.choose((4096, 8192, 16_384), (4096,), (40,))
        self.contexts = setting.choose((512, 1024, 2048, 4096), (512, 4096), (16, 32))
        self.new = setting.choose(256, 256, 2)
        self.times: dict[tuple[str, str, int], list[float]] = {}
        self.peaks: dict[tuple[str, int], int] = {}
        self._draw = random.Random(0)

    def ids(self, count: int) -> list[int]:
        """Fresh random token ids."""
        return self._draw.choices(range(self.shape.vocabulary), k=count)

    def directory(self, name: str) -> Path:
        """The checkpoint in that precision."""
        setting = self.setting
        return checkpoint(setting.work, self.shape, DTYPES[name], setting.kind)

    def engine(self, name: str, tokens: int) -> quire.Engine:
        """Ours, with pages for one sequence of so many tokens."""
        cache = quire.CacheConfig(
            page_size=self.page,
            kv_format=name,
            num_pages=-(-tokens // self.page),
            prefix_cache=False,
        )
        return quire.Engine(
            self.directory(name), backend="cuda", cache=cache, max_sequences=1,
            max_batch_tokens=self.setting.choose(4096, 4096, 32),
        )  # fmt: skip

    def loop(self) -> PageLoop:
        """The baseline."""
        return PageLoop(self.directory("fp32"), self.page, self.setting.kind, torch.float32)

    def repeat(self, times: int, call: Callable[[], float]) -> list[float]:
        """Seconds of each repeat, after one that compiles and captures."""
        call()
        return [call() for _ in range(times)]


def streaming(setting: Setting) -> None:
    """Agreement, then prefill, decode and peak memory of all."""
    contest = Contest(setting)
    setting.attempt("logits of both", partial(_agree, contest))
    for name in DTYPES:
        setting.attempt(f"ours, {name}", partial(_ours, contest, name))
    setting.attempt("the loop", partial(_theirs, contest))
    for name in DTYPES:
        _rows(contest, name)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 with TF32, for the loop alone."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _agree(contest: Contest) -> None:
    """Logits of three pages: ours may err twice as far from float64 as the loop in float32 does."""
    tokens = contest.ids(contest.page * 5 // 2)
    rows, kind = slice(None), contest.setting.kind

    def loop(dtype: torch.dtype) -> Any:
        made = PageLoop(contest.directory("fp32"), contest.page, kind, dtype)
        return made.forward(tokens, rows).double().cpu()

    law, plain = loop(torch.float64), loop(torch.float32)
    with _tf32():
        theirs = loop(torch.float32)
    with contest.engine("fp32", len(tokens)) as engine:
        ours = torch.from_numpy(engine.logits(tokens)).double()
    errors = [float((x - law).norm() / law.norm()) for x in (ours, plain, theirs)]
    note = "relative errors: ours {:.1e}, the loop {:.1e}, with TF32 {:.1e}".format(*errors)
    contest.setting.row(
        f"logits of {len(tokens)} tokens, fp32",
        ratio=errors[0] / errors[1], of="error of the loop, no TF32", at_most=2.0, note=note,
    )  # fmt: skip
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak(contest: Contest, key: tuple[str, int], make: Callable[[], T]) -> T:
    """What ``make`` gives; from here on, all that is allocated above now counts as ``key``'s."""
    _free()
    if contest.setting.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        contest.peaks[key] = -torch.cuda.memory_allocated()
    return make()


def _note_peak(contest: Contest, key: tuple[str, int]) -> None:
    if contest.setting.kind == "cuda":
        contest.peaks[key] += torch.cuda.max_memory_allocated()


def _ours(contest: Contest, name: str) -> None:
    repeats = contest.setting.choose(5, 3, 1)
    for prompt in contest.prompts:
        _our_prefill(contest, name, prompt, repeats)
    longest = max(contest.contexts) + contest.new + 1
    with contest.engine(name, longest) as engine:
        for context in contest.contexts:
            decode = partial(_engine_run, contest, engine, context, contest.new + 1)
            contest.times["decode", name, context] = contest.repeat(repeats, decode)


def _our_prefill(contest: Contest, name: str, prompt: int, repeats: int) -> None:
    with _peak(contest, (name, prompt), partial(contest.engine, name, prompt + 1)) as engine:
        prefill = partial(_engine_run, contest, engine, prompt, 1)
        contest.times["prefill", name, prompt] = contest.repeat(repeats, prefill)
    _note_peak(contest, (name, prompt))


def _their_prefill(contest: Contest, prompt: int, repeats: int) -> None:
    loop = _peak(contest, ("loop", prompt), contest.loop)
    prefill = partial(_loop_run, contest, loop, prompt, 1)
    contest.times["prefill", "loop", prompt] = contest.repeat(repeats, prefill)
    _note_peak(contest, ("loop", prompt))


def _engine_run(contest: Contest, engine: quire.Engine, prompt: int, new: int) -> float:
    """Seconds to the first token, if one is wanted; else of those behind it."""
    params = quire.SamplingParams(max_new_tokens=new, ignore_eos=True)
    ids = contest.ids(prompt)

    def first() -> quire.Request:
        request = engine.submit(ids, params)
        while len(request.samples[0].tokens) == prompt and not request.finished:
            engine.step()
        return request

    def others() -> None:
        while not request.finished:
            engine.step()

    seconds, request = contest.setting.watch.wall(first)
    return seconds if new == 1 else contest.setting.watch.wall(others)[0]


def _theirs(contest: Contest) -> None:
    repeats = contest.setting.choose(2, 1, 1)
    with _tf32():
        for prompt in contest.prompts:
            _their_prefill(contest, prompt, repeats)
        loop = contest.loop()
        for context in contest.contexts:
            decode = partial(_loop_run, contest, loop, context, contest.new + 1)
            contest.times["decode", "loop", context] = contest.repeat(repeats, decode)


def _loop_run(contest: Contest, loop: PageLoop, prompt: int, new: int) -> float:
    """As :func:`_engine_run`; greedy too, and the token goes to the host."""
    ids = contest.ids(prompt)
    loop.forget()

    def take(tokens: list[int]) -> list[int]:
        return [int(loop.forward(tokens)[-1].argmax().item())]

    def others() -> None:
        token = last
        for _ in range(new - 1):
            token = take(token)

    seconds, last = contest.setting.watch.wall(partial(take, ids))
    return seconds if new == 1 else contest.setting.watch.wall(others)[0]


def _rows(contest: Contest, name: str) -> None:
    """Ours beside the loop, where both were measured."""
    times, row = contest.times, contest.setting.row
    work = [("prefill", at, at, 50.0) for at in contest.prompts]
    work += [("decode", at, contest.new, 5.0) for at in contest.contexts]
    for what, at, tokens, asked in work:
        ours, loop = times.get((what, name, at)), times.get((what, "loop", at))
        if ours is None:
            continue
        seconds, spread = summary(ours)
        ratio = None if loop is None else statistics.median(loop) / seconds
        note = "" if loop is None else f"the loop: {tokens / statistics.median(loop):.4g} tokens/s"
        case = f"{what}{' after' * (what == 'decode')} {at}, {name}"
        row(
            case, tokens / seconds, "tokens/s",
            spread, len(ours), "wall", ratio, "the loop", asked, note=note, seconds=seconds,
        )  # fmt: skip
    first, last = (times.get(("decode", name, contest.contexts[at])) for at in (0, -1))
    if first is not None and last is not None:
        ratio = statistics.median(first) / statistics.median(last)
        case = f"speed of decode after {contest.contexts[-1]}, {name}"
        row(
            case, 100 * ratio, "%", repeats=len(last), clock="wall",
            ratio=ratio, of=f"decode after {contest.contexts[0]}", at_least=0.9,
        )  # fmt: skip
    for prompt in contest.prompts:
        if (name, prompt) in contest.peaks and ("loop", prompt) in contest.peaks:
            ours_peak, theirs = contest.peaks[name, prompt], contest.peaks["loop", prompt]
            row(
                f"peak memory, prefill {prompt}, {name}",
                ours_peak / 2**20, "MiB", ratio=ours_peak / theirs, of="the loop",
                at_most=1.0, note=f"the loop: {theirs / 2**20:.4g} MiB",
            )  # fmt: skip
