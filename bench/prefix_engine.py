"""Parts ``shared`` and ``restart`` of ``bench/prefix.py``: what a prefix that is kept saves."""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers_prefix
from prefix_figures import Figure, Quiet, Report, ratios

import quire

WORKER = Path(__file__).with_name("prefix_worker.py")
PAGE = 16


@dataclass
class Setting:
    """A model and how to measure it; ``max_position`` and ``vocabulary`` are the model's."""

    model: Path
    threads: int
    rounds: int
    quiet: Quiet
    max_position: int
    vocabulary: int
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def ids(self, count: int) -> list[int]:
        """Random token ids."""
        return self.draw.choices(range(self.vocabulary), k=count)


# -- shared ----------------------------------------------------------------------------------


def shared(report: Report, setting: Setting, requests: int) -> None:
    """``requests`` at once that share 2,048 tokens, against the same without a prefix cache."""
    keeps, plain = (_engine(setting, requests, keeps) for keeps in (True, False))
    _round(setting, keeps, plain, min(2, requests))  # warms up
    rounds = [
        setting.quiet.turn(lambda: _round(setting, keeps, plain, requests))
        for _ in range(setting.rounds)
    ]
    busy = setting.quiet.take_worst()
    shape = f"{requests} x ({peers_prefix.SHARED:,} shared + {peers_prefix.OWN} own) tokens"
    report.title(f"shared: {shape}, {peers_prefix.SHARED_NEW} new each; seconds in all")
    seconds = {name: [each[name][0] for each in rounds] for name in rounds[0]}
    for name, values in seconds.items():
        note = f"{rounds[-1][name][1]:,} prompt tokens cached"
        report.add(Figure("shared", name, "s", values, note=note, disturbed=busy))
    for name in ("cold", "warm"):
        over = ratios(seconds[name], seconds["unshared"])
        asked = "at most 0.125, for 16 requests"
        report.add(Figure("shared", f"{name} over unshared", "", over, asked, disturbed=busy))


def _engine(setting: Setting, requests: int, keeps: bool) -> quire.Engine:
    length = peers_prefix.SHARED + peers_prefix.OWN + peers_prefix.SHARED_NEW
    pages = requests * (-(-length // PAGE) + 2)
    cache = quire.CacheConfig(page_size=PAGE, num_pages=pages, prefix_cache=keeps)
    return quire.Engine(setting.model, threads=setting.threads, cache=cache, max_sequences=requests)


def _round(
    setting: Setting, keeps: quire.Engine, plain: quire.Engine, requests: int
) -> dict[str, tuple[float, int]]:
    """The requests cold, warm with other own tokens, and without a prefix cache.

    Of each, the seconds, and how many prompt tokens were found in the cache.
    """
    drawn = [setting.ids(peers_prefix.SHARED_IDS) for _ in range(requests)]
    cold, warm = peers_prefix.shared_prompts(drawn)
    params = quire.SamplingParams(max_new_tokens=peers_prefix.SHARED_NEW, ignore_eos=True)
    found = {}
    for name, engine, prompts in (
        ("cold", keeps, cold),
        ("warm", keeps, warm),
        ("unshared", plain, cold),
    ):
        start = time.perf_counter()
        done = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        found[name] = seconds, sum(completion.cached_tokens for completion in done)
    return found


# -- restart ---------------------------------------------------------------------------------


def restart(report: Report, setting: Setting, lengths: Sequence[int]) -> None:
    """Time to first token of prompts that an earlier process, or an evicted pool, had computed."""
    for length in lengths:
        with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
            _Restarts(report, setting, min(length, setting.max_position - 1), Path(folder)).run()


class _Restarts:
    """One length of prompt; ``folder`` gets the disk store and the session file."""

    def __init__(self, report: Report, setting: Setting, length: int, folder: Path) -> None:
        self.report, self.setting, self.length = report, setting, length
        self.store, self.session = folder / "store", folder / "prompt.session"
        self.prompt = setting.ids(length)

    def run(self) -> None:
        """Measure and print."""
        self._ask(cache_dir=self.store, save=self.session)
        ways: dict[str, dict[str, Any]] = {
            "cold": {},
            "disk": {"cache_dir": self.store},
            "disk, file not in memory": {"cache_dir": self.store},
            "session": {"load": self.session},
        }
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in range(self.setting.rounds):
            for name, settings in ways.items():
                turn = functools.partial(self._restart, name, settings)
                answers[name].append(self.setting.quiet.turn(turn))
        host = self.setting.quiet.turn(self._from_host)
        self._tell(answers, host)

    def _restart(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        if "not in memory" in name:
            forget_files(self.store)
        return self._ask(**settings)

    def _from_host(self) -> dict[str, Any]:
        rounds = self.setting.rounds
        room = (2 + rounds) * (self.length + 2 * PAGE) * self._bytes_a_token() + (64 << 20)
        return self._ask(host_cache=room, evictions=rounds)

    def _bytes_a_token(self) -> int:
        return max(1, -(-self.session.stat().st_size // self.length))

    def _ask(self, **settings: Any) -> dict[str, Any]:
        asked = dict.fromkeys(("cache_dir", "host_cache", "load", "save"))
        asked |= {name: _plain(value) for name, value in settings.items()}
        message = {
            "evictions": 0,
            **asked,
            "at": time.time(),
            "model": str(self.setting.model),
            "threads": self.setting.threads,
            "pages": -(-self.length // PAGE) + 8,
            "prompt": self.prompt,
        }
        done = subprocess.run(
            [sys.executable, WORKER],
            input=json.dumps(message),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{WORKER.name} ended with {done.returncode}; {done.stderr[-900:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _tell(self, answers: dict[str, list[dict[str, Any]]], host: dict[str, Any]) -> None:
        busy, length = self.setting.quiet.take_worst(), self.length
        self.report.title(f"restart: a prompt of {length:,} tokens; seconds to its first token")
        asked = "at least 5" if 8000 <= length <= 8192 else ""
        cold = [answer["first"][0] for answer in answers["cold"]]

        def add(name: str, values: list[float], unit: str = "s", **more: str) -> None:
            self.report.add(Figure(f"restart {length}", name, unit, values, disturbed=busy, **more))

        for name, given in answers.items():
            values = [answer["load"] + answer["first"][0] for answer in given]
            add(name, values, note=_came(given[-1]))
            add(f"  {name}: start of the engine before", [answer["start"] for answer in given])
            if name != "cold":
                wanted = asked if name.startswith("disk") else ""
                add(f"  {name}: times better", ratios(cold, values), "x", asked=wanted)
        came = host["first"][1:]
        add("host memory, after eviction", came, note=_came(host))
        add("  computed again, after eviction", host["recomputed"])
        add("  swap: times better", ratios(host["recomputed"], came), "x", asked="above 1")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _came(answer: dict[str, Any]) -> str:
    """Where the prompt's tokens came from, and why."""
    tiers = ", ".join(f"{count} from {tier}" for tier, count in answer["cached"].items() if count)
    parts = [tiers or "nothing cached", answer["decision"], answer["reason"]]
    return "; ".join(part for part in parts if part)


def forget_files(folder: Path) -> None:
    """Have the operating system drop what it holds of the files in ``folder``, where it can."""
    if sys.platform != "linux":
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
