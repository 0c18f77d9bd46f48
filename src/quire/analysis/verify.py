"""A plan held against what really happens: the model loads, runs, and every term is measured.

Each measurement runs in a process of its own, that nothing else has grown: ``python -m
quire.analysis.verify`` reads what to do as JSON from standard input and prints what it found.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quire.analysis.plan import Plan
from quire.analysis.residence import (
    allocated,
    mapped_bytes,
    numpy_bytes,
    resident,
    resident_bytes,
    touch_mapped,
)
from quire.analysis.roofline import Timer, decode_time, prefill_time
from quire.config import CacheConfig, format_bytes
from quire.engine import Engine, SamplingParams
from quire.errors import ConfigError, QuireError
from quire.machine import PeakMemory
from quire.models import resolve_model

__all__ = ["Asked", "Measured", "Row", "measure", "verify"]

WEIGHTS = ".safetensors"
STEADY = 48  # steps in which all sequences decode


@dataclass(frozen=True)
class Asked:
    """What to run: ``sequences`` prompts that end, with what is decoded, at ``context`` tokens."""

    model: str
    kv_format: str
    page_size: int
    kv_bytes: int
    context: int
    sequences: int
    chunk: int
    backend: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds; None is what this system cannot tell.

    base         the process with its libraries, before the model
    weights      mapped weights in memory, every byte of a file once, and vectors that were copied
    kv           all pools, in memory, every page written
    workspace    what kernels keep, and the most that a chunk of a prompt has beside
    logits       of the widest step
    peak         the most that the process had in memory
    prefill_s    the prompt of one sequence alone
    decode_s     a step of one sequence, and of all, at the end of their contexts
    """

    base: int | None
    weights: int | None
    kv: int | None
    workspace: int | None
    logits: int
    peak: int | None
    prefill_s: float
    decode_s: float
    decode_all_s: float


def measure(asked: Asked) -> Measured:
    """Run ``asked`` in two new processes. Raises QuireError, with what they said, if one fails."""
    ran, traced = _child(asked, "run"), _child(asked, "trace")
    weights = None if ran["mapped"] is None else ran["mapped"] + traced["copied"]
    kept = ran["kept"]
    return Measured(
        base=ran["base"],
        weights=weights,
        kv=ran["kv"],
        workspace=None if kept is None else kept + traced["transient"],
        logits=ran["logits"],
        peak=ran["peak"],
        prefill_s=ran["prefill_s"],
        decode_s=ran["decode_s"],
        decode_all_s=ran["decode_all_s"],
    )


@dataclass(frozen=True)
class Row:
    """One term: bytes or seconds, as they were predicted and found; None where there is neither."""

    name: str
    unit: Literal["bytes", "seconds"]
    predicted: float | None
    measured: float | None

    @property
    def difference(self) -> str:
        """Of the measured one to the predicted, in percent."""
        if not self.predicted or self.measured is None:
            return ""
        return f"{100 * (self.measured / self.predicted - 1):+.1f} %"

    def show(self, value: float | None) -> str:
        """``value`` for a person."""
        if value is None:
            return ""
        return format_bytes(value) if self.unit == "bytes" else f"{value * 1e3:.4g} ms"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(plan: Plan, model: str | None, timer: Timer, again: Callable[[], Timer]) -> list[Row]:
    """Run what was planned and hold every term against it.

    timer   of this machine before the run; ``again`` measures it behind the run. Predicted seconds
            are the mean of both, since what a machine's memory gives changes by the minute.

    "unaccounted" is what the process came to hold beside what it held before the model and all
    that was predicted: tokenizer, libraries that loading needs, Python's own objects. Raises
    QuireError if the run fails, with its reason.
    """
    load = plan.asked.load
    layout, space = plan.deployment.layout, plan.memory.workspace
    run = Asked(
        model=str(resolve_model(model)),
        kv_format=layout.format_text,
        page_size=layout.page_size,
        kv_bytes=plan.memory.kv,
        context=load.context,
        sequences=load.sequences,
        chunk=load.chunk,
        threads=load.threads,
    )
    found, times = measure(run), [_predicted(plan, run, each) for each in (timer, again())]
    seconds = {name: statistics.mean(each[name] for each in times) for name in times[0]}
    ran = (found.prefill_s, found.decode_s, found.decode_all_s)
    return [
        Row("weights", "bytes", plan.memory.weight_bytes, found.weights),
        Row("keys and values", "bytes", plan.memory.kv, found.kv),
        Row("workspace", "bytes", space.total - space.logits, found.workspace),
        Row("logits", "bytes", space.logits, found.logits),
        Row("process before", "bytes", None, found.base),
        *_totals(plan, found),
        *(
            Row(name, "seconds", predicted, measured)
            for (name, predicted), measured in zip(seconds.items(), ran, strict=True)
        ),
    ]


def _predicted(plan: Plan, run: Asked, timer: Timer) -> dict[str, float]:
    """Seconds of the steps that :class:`Measured` has, in its order."""
    new, most = _new_tokens(run), run.context
    prompt, deployment = most - new, plan.deployment
    return {
        "prefill": prefill_time(deployment, timer, prompt, run.chunk).seconds,
        "decode step, 1 request": decode_time(deployment, timer, 1, prompt + new // 2).seconds,
        f"decode step, {run.sequences} requests": decode_time(
            deployment, timer, run.sequences, most - STEADY // 2
        ).seconds,
    }


def _totals(plan: Plan, found: Measured) -> list[Row]:
    if found.peak is None or found.base is None:
        return []
    predicted = plan.memory.total
    return [
        Row("unaccounted", "bytes", None, found.peak - found.base - predicted),
        Row("total", "bytes", predicted + found.base, found.peak),
    ]


def _child(asked: Asked, what: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "quire.analysis.verify", what],
        input=json.dumps(asdict(asked)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise QuireError(f"the plan cannot be verified, its run failed: {said}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in the child ----------------------------------------------------------------------------------


def _engine(asked: Asked) -> Engine:
    cache = CacheConfig(
        page_size=asked.page_size,
        kv_format=asked.kv_format,
        kv_memory=asked.kv_bytes,
        prefix_cache=False,
    )
    return Engine(
        asked.model,
        backend=asked.backend,
        threads=asked.threads,
        cache=cache,
        max_batch_tokens=asked.chunk,
        max_sequences=asked.sequences,
    )


def _new_tokens(asked: Asked) -> int:
    """Decoded by each: enough that all decode together when the last prompt is through."""
    return STEADY + asked.sequences * -(-asked.context // asked.chunk)


def _prompts(asked: Asked, engine: Engine) -> list[list[int]]:
    count = asked.context - _new_tokens(asked)
    if count < 1:
        raise ConfigError(
            f"a context of {asked.context} is too short to verify {asked.sequences} sequences in "
            f"chunks of {asked.chunk}: {_new_tokens(asked)} tokens are decoded; raise the context "
            "or lower the number of requests"
        )
    rng = np.random.default_rng(0)
    shape = asked.sequences, count
    found: list[list[int]] = rng.integers(0, engine.model_config.vocab_size, shape).tolist()
    return found


def _steps(engine: Engine, asked: Asked, prompts: list[list[int]]) -> list[tuple[int, float]]:
    """Run prompts to their end; of each step how many tokens came of it, and its seconds."""
    params = SamplingParams(max_new_tokens=_new_tokens(asked), ignore_eos=True)
    for prompt in prompts:
        engine.submit(prompt, params)
    found = []
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        found.append((len(outputs), time.perf_counter() - started))
    return found


def _decode_seconds(steps: list[tuple[int, float]], sequences: int) -> float:
    """Median of the steps in which, as in the one before, every sequence got a token."""
    steady = [s for (was, _), (is_, s) in pairwise(steps) if was == is_ == sequences]
    return statistics.median(steady)


def _prefill_seconds(steps: list[tuple[int, float]]) -> float:
    """Of the steps up to the first token."""
    first = next(i for i, (count, _) in enumerate(steps) if count)
    return sum(seconds for _, seconds in steps[: first + 1])


def _write_pages(arrays: list[npt.NDArray[Any]]) -> None:
    """Write to every page of the system's memory: pools keep some pages for steps yet to come."""
    for array in arrays:
        array.reshape(-1).view(np.uint8)[::1024] |= 0


def _run(asked: Asked) -> dict[str, Any]:
    gc.collect()
    base = resident()
    engine = _engine(asked)
    logits = _WidestLogits(engine)
    with PeakMemory() as peak:
        prompts = _prompts(asked, engine)
        touch_mapped(WEIGHTS)
        gc.collect()
        before = allocated()
        _steps(engine, asked, prompts[:1])  # the first time pages are new and tables grow
        alone = _steps(engine, asked, prompts[:1])
        together = _steps(engine, asked, prompts)
        gc.collect()
        after = allocated()
        pools = [array for pool in engine.cache.pools for array in pool.arrays]
        _write_pages(pools)
    return {
        "base": base,
        "mapped": mapped_bytes(WEIGHTS),
        "kept": None if after is None or before is None else after - before,
        "kv": resident_bytes(pools),
        "logits": logits.bytes,
        "peak": peak.bytes,
        "prefill_s": _prefill_seconds(alone),
        "decode_s": _decode_seconds(alone, 1),
        "decode_all_s": _decode_seconds(together, asked.sequences),
    }


class _WidestLogits:
    """Watches the model of an engine: bytes of the most logits that it gave."""

    def __init__(self, engine: Engine) -> None:
        self.bytes = 0
        self._forward = engine._loaded.model.forward
        engine._loaded.model.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, *args: Any) -> Any:
        """What the model gives."""
        logits = self._forward(*args)
        rows, vocab = logits.shape
        self.bytes = max(self.bytes, 4 * rows * vocab)
        return logits


def _trace(asked: Asked) -> dict[str, Any]:
    """What NumPy's arrays take: ``tracemalloc`` slows everything, and takes memory itself."""
    tracemalloc.start()
    engine = _engine(asked)
    copied, transient = numpy_bytes(), 0
    prompts = _prompts(asked, engine)
    _steps(engine, asked, prompts[:1])  # tables grow
    whole = [token for prompt in prompts for token in prompt]  # a chunk as large as can be
    widest = whole[: min(asked.chunk, asked.context - 1)]
    engine.submit(widest, SamplingParams(max_new_tokens=1))
    while engine.has_work:
        tracemalloc.reset_peak()
        now, _ = tracemalloc.get_traced_memory()
        engine.step()
        transient = max(transient, tracemalloc.get_traced_memory()[1] - now)
    return {"copied": copied, "transient": transient}


def main() -> None:
    """Entry of the child: ``run`` or ``trace``."""
    asked = Asked(**json.loads(sys.stdin.read()))
    try:
        found = {"run": _run, "trace": _trace}[sys.argv[1]](asked)
    except QuireError as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
