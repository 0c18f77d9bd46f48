"""Which tiles the attention kernels of the ``cuda`` backend should have on the card that is there.

    python bench/gpu_tune.py [--json FILE] [--seconds 120] [--only decode,bf16,128]

For decode (16 sequences of 16,384 tokens) and prefill (8,192 tokens, causal), formats of pages and
head sizes, 128 first: tries a list of tiles beside those that ``tiles.py`` has, and for the
best of decode how finely contexts are split. A row is one choice; its ratio is the share of the
copy bandwidth of the same rounds that decode reads at, or the rate of prefill beside the present
choice's. ``best`` rows say what to write into ``tiles.py``. All kernels are compiled first, in
half of the time, by processes of their own; what could not be compiled by then is left out.
Results that differ from the present choice's are not timed. ``--dry``: tiny, on a CPU, interpreted.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_rows import HEADER, Row, failed, summary, table_line, write_report

__all__ = ["Trial", "tiles_to_try", "trials"]

SEQUENCES, CONTEXT, PROMPT = 16, 16_384, 8192
FORMATS = {"decode": ("bf16", "int8", "int4", "fp8", "int2"), "prefill": ("bf16", "int8", "int4")}
WAVES = (2, 3, 6, 8)
# Keys, warps, stages; then rows, keys, warps, stages. The likelier ones first.
DECODE = (
    (32, 1, 4), (32, 1, 3), (32, 2, 4), (32, 1, 2), (32, 1, 6), (64, 1, 3), (64, 2, 3), (32, 2, 3),
    (64, 2, 4), (64, 4, 3), (32, 4, 4), (64, 4, 4), (128, 4, 2), (64, 2, 2),
)  # fmt: skip
PREFILL = (
    (64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3),
    (128, 128, 8, 2), (64, 128, 4, 2), (128, 32, 8, 3), (64, 64, 4, 4), (128, 64, 4, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What is tuned: ``decode`` or ``prefill``, of pages of a format, with heads of a size."""

    kind: str
    format: str
    dim: int

    @property
    def case(self) -> str:
        """For rows."""
        return f"{self.format} x {self.dim}"


def trials(dims: tuple[int, ...], only: set[str]) -> Iterator[Trial]:
    """All of them, or those that every word of ``only`` belongs to; large gains first."""
    for dim in dims:
        for kind, formats in FORMATS.items():
            for format in formats:
                if only <= {kind, format, str(dim)}:
                    yield Trial(kind, format, dim)


def tiles_to_try(trial: Trial, most: int) -> list[tuple[int, int, int, int]]:
    """Rows, keys, warps, stages of up to ``most`` tiles; packed keys come 32 at a time."""
    found = [(8, *rest) for rest in DECODE] if trial.kind == "decode" else list(PREFILL)
    if trial.format in ("int4", "int2"):
        found = [(rows, 32, warps, stages) for rows, _, warps, stages in found]
    return list(dict.fromkeys(found))[:most]


class Bench:
    """A full pool and a batch of a trial; its call with any tiles."""

    def __init__(self, trial: Trial, device: str, size: str) -> None:
        import torch
        from gpu_pages import FullPool, Heads

        from quire.backends import create_backend

        sequences, context, prompt = {
            "full": (SEQUENCES, CONTEXT, PROMPT), "small": (2, 512, 512), "dry": (2, 64, 64),
        }[size]  # fmt: skip
        if trial.kind == "prefill":
            sequences, context = 1, prompt
        heads = Heads(4, 2, trial.dim) if size == "dry" else Heads(32, 8, trial.dim)
        self.backend: Any = create_backend("cuda")
        most = sequences, sequences * context
        self.full = FullPool(self.backend, device, trial.format, heads, most)
        new = context if trial.kind == "prefill" else 1
        self.batch = self.full.batch(sequences, context, new)
        random = torch.Generator(device).manual_seed(1)
        shape = sequences * new, heads.query, heads.dim
        self.query = torch.randn(shape, generator=random, device=device)
        self.moved = float(self.full.moved(sequences, context))
        self.tokens = sequences * new
        pairs = context * (context + 1) / 2 if trial.kind == "prefill" else sequences * context
        self.flops = 4.0 * pairs * heads.query * heads.dim

    def call(self, tiles: tuple[int, int, int, int] | None, waves: int | None = None) -> Any:
        """Attention with these tiles, or with those that there are."""
        from quire.backends.cuda.attending import Chosen
        from quire.backends.cuda.tiles import Tiles

        chosen = Chosen(None if tiles is None else Tiles(*tiles))
        chosen = chosen if waves is None else replace(chosen, waves=waves)
        self.backend._attention.chosen_tiles = chosen
        return self.backend.attend(self.query, self.full.pool, self.batch, 0)

    def present(self, trial: Trial) -> tuple[int, int, int, int]:
        """The tiles that ``tiles.py`` chooses."""
        from quire.backends.cuda.tiles import decode_tiles, prefill_tiles

        shape, share = self.full.shape, self.full.heads.query // self.full.heads.kv
        shared = self.backend.device.shared_memory
        decode = trial.kind == "decode"
        large = prefill_tiles(shape, share, shared, many=True)
        tiles = decode_tiles(shape, share) if decode else large
        return tiles.rows, tiles.keys, tiles.warps, tiles.stages


def build(trial: Trial, tiles: tuple[int, int, int, int] | None, device: str, size: str) -> None:
    """Compile, by a small call: the code is found on disk by the process that measures."""
    Bench(trial, device, size).call(tiles)


class Tuning:
    """The rows of a run, printed and written as they come."""

    def __init__(self, path: Path | None, dry: bool, seconds: float) -> None:
        self.path, self.dry, self.rows = path, dry, list[Row]()
        self.begin, self.seconds = time.monotonic(), seconds
        self.device = "cpu" if dry else "cuda"
        self.about: dict[str, Any] = {}

    def left(self, share: float = 1.0) -> float:
        """Seconds until that share of the time is over."""
        return self.begin + share * self.seconds - time.monotonic()

    def add(self, row: Row) -> None:
        """One row more."""
        self.rows.append(row)
        print(table_line(row), flush=True)
        if self.path is not None:
            write_report(self.path, self.about, self.rows)

    def compile(self, work: list[tuple[Trial, Any]]) -> set[tuple[Trial, Any]]:
        """What of ``work`` is compiled when half of the time is over; the rest is a row."""
        ready, size = set[tuple[Trial, Any]](), "dry" if self.dry else "small"
        workers = 1 if self.dry else max(1, min(12, (os.cpu_count() or 2) - 2))
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        waiting: dict[tuple[Trial, Any], Future[None]] = {
            each: pool.submit(build, *each, self.device, size) for each in work
        }
        for each, future in waiting.items():
            trial, tiles = each
            try:
                future.result(max(0.1, self.left(0.5)))
                ready.add(each)
            except TimeoutError:
                future.cancel()
            except Exception as error:
                reason = str(error).strip().split("\n")[0][:160]
                self.add(failed(trial.kind, f"{trial.case}, {_name(tiles)}", reason))
        pool.shutdown(wait=False, cancel_futures=True)
        late = len(work) - len(ready) - len(self.rows)
        self.add(Row("compile", "kernels", float(len(ready)), "built", note=f"{late} left out"))
        return ready

    def measure(self, trial: Trial, tried: list[Any], setting: Any) -> None:
        """Rows of one trial: each choice, then the best."""
        bench = Bench(trial, self.device, "dry" if self.dry else "full")
        law, choices = bench.call(None), {"present": (bench.present(trial), None)}
        for tiles in tried:
            name = _name(tiles)
            if tiles not in (None, bench.present(trial)) and self._agrees(trial, bench, tiles, law):
                choices[name] = (tiles, None)
        best, _ = choices[self._rows(trial, bench, choices, setting)]
        note = _name(best)
        if trial.kind == "decode":
            finer = {f"{note}, {waves} waves": (best, waves) for waves in WAVES}
            note = self._rows(trial, bench, {note: (best, None)} | finer, setting)
        self.add(Row(trial.kind, f"{trial.case}, best", note=note))

    def _agrees(self, trial: Trial, bench: Bench, tiles: Any, law: Any) -> bool:
        case = f"{trial.case}, {_name(tiles)}"
        try:
            error = float((bench.call(tiles) - law).abs().max() / law.abs().max())
        except Exception as error:
            self.add(failed(trial.kind, case, str(error).strip().split("\n")[0][:160]))
            return False
        if error < 2**-6:  # operands are rounded to bf16, by other peaks of the softmax
            return True
        self.add(failed(trial.kind, case, f"differs by {error:.2g}"))
        return False

    def _rows(self, trial: Trial, bench: Bench, choices: dict[str, Any], setting: Any) -> str:
        """A row of each choice of tiles and waves; the name of the fastest."""
        from gpu_dense import copying
        from gpu_timing import paired

        copy, copied = copying(setting)
        calls = {name: partial(bench.call, *choice) for name, choice in choices.items()}
        repeats, first = 2 if self.dry else 5, next(iter(choices))
        taken = setting.watch.rounds({"copy": copy, **calls}, repeats)
        for name, (tiles, _) in choices.items():
            seconds, spread = summary(taken[name])
            case = f"{trial.case}, {name}" + (f" {_name(tiles)}" if name == "present" else "")
            row = partial(
                Row, trial.kind, case, spread=spread, repeats=repeats, seconds=seconds,
                flops=bench.flops, bytes=bench.moved,
            )  # fmt: skip
            if trial.kind == "decode":
                share = bench.moved / copied * paired(taken[name], taken["copy"])
                rate = bench.tokens / seconds
                self.add(row(value=rate, unit="tokens/s", ratio=share, of="copy bandwidth"))
            else:
                times = paired(taken[name], taken[first])
                rate = bench.flops / seconds / 1e12
                self.add(row(value=rate, unit="TF/s", ratio=times, of="the present choice"))
        return min(choices, key=lambda name: summary(taken[name])[0])


def _name(tiles: tuple[int, int, int, int] | None) -> str:
    if tiles is None:
        return "present"
    return "rows {} keys {} warps {} stages {}".format(*tiles)


def main() -> None:
    """Compile, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write what is known after every row")
    parser.add_argument("--seconds", type=float, default=120, help="most of all together")
    parser.add_argument("--only", default="", help="decode or prefill, a format, a head size")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    options = parser.parse_args()
    tuning = Tuning(options.json, options.dry, options.seconds)
    only = set(filter(None, options.only.split(",")))
    chosen = list(trials((16,) if options.dry else (128, 64), only))
    if not chosen:
        parser.error(f"nothing is called {options.only!r}")
    tried = {trial: tiles_to_try(trial, 2 if options.dry else 14) for trial in chosen}
    print(HEADER, flush=True)
    ready = tuning.compile([(t, tiles) for t in chosen for tiles in [None, *tried[t]]])
    from gpu_timing import Setting, Stopwatch
    from gpu_worker import about

    tuning.about = about(tuning.device)
    with tempfile.TemporaryDirectory() as work:
        mode = "dry" if options.dry else "full"
        end, watch = time.monotonic() + tuning.left(), Stopwatch(tuning.device)
        setting = Setting("tune", mode, Path(work), end, tuning.add, watch)
        for trial in chosen:
            there = [tiles for tiles in tried[trial] if (trial, tiles) in ready]
            case = f"{trial.kind} {trial.case}"
            setting.attempt(case, partial(tuning.measure, trial, there, setting))
    tuning.about["seconds"] = round(time.monotonic() - tuning.begin, 1)
    if options.json is not None:
        write_report(options.json, tuning.about, tuning.rows)


if __name__ == "__main__":
    sys.exit(main())
