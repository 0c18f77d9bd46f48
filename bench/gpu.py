"""Everything that is claimed of the ``cuda`` backend, measured in one go on the card that is there.

    python bench/gpu.py [--json FILE] [--quick] [--only PART,PART] [--seconds 460]

Parts, each in a process of its own: one that fails or hangs is a row that says so, and the others
go on. Every row is in FILE as soon as it is known.

    ceilings      what the card gives: copying, bf16 products. Parts that are compared with
                  them measure them again, in turns with their own calls
    decode        attention of {8, 16, 64} sequences x {8k, 16k, 32k} tokens, pages bf16, int8, int4
    prefill       causal attention of 8k tokens beside torch's flash SDPA
    linear        products with bf16 weights, for the roofline (``bench/gpu_roofline.py``)
    streaming     a small model beside a plain loop over pages (``bench/gpu_baseline.py``)
    step          what of a decode step of Llama 1B shapes lies outside kernels
    exact         what batch invariance costs: steps of cuda-exact and of cuda
    reading       tokens that choose what they read of {8k, 32k} tokens, beside ones that read all
    moving        pages to and from host memory, alone and beside steps; what the steps lose
    transformers  tokens a second beside transformers: static cache, continuous batching

``--dry`` runs all of it at tiny shapes on a CPU, kernels interpreted; its figures mean nothing.
Needs the extra quire[cuda]; the last part transformers, too.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_rows import HEADER, Row, failed, table_line, write_report

WORKER = Path(__file__).with_name("gpu_worker.py")

# Seconds after which a part is stopped; the total is bounded apart. In order of what matters most.
PARTS = {
    "ceilings": 40,
    "decode": 120,
    "prefill": 60,
    "streaming": 110,
    "step": 80,
    "linear": 45,
    "exact": 80,
    "moving": 60,
    "reading": 40,
    "transformers": 240,
}
_GRACE = 0.85  # of a part's seconds, after which it begins no new case


class Report:
    """Rows as they come: printed, and written where the caller wants them."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()
        self.about: dict[str, Any] = {"parts": {}}

    def tell(self, about: dict[str, Any]) -> None:
        """What a worker knows of the machine; the first prints it."""
        if "card" not in self.about:
            print(", ".join(f"{name} {value}" for name, value in about.items()))
            print(f"\n{HEADER}", flush=True)
        self.about |= about

    def add(self, row: Row) -> None:
        """One row more."""
        self.rows.append(row)
        print(table_line(row), flush=True)
        self.write()

    def ended(self, part: str, seconds: float, late: int) -> None:
        """A part is over; ``late`` samples hold some of the host's time."""
        self.about["parts"][part] = {"seconds": round(seconds, 1), "late": late}
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self.path is not None:
            write_report(self.path, self.about, self.rows)


@contextlib.contextmanager
def _process(command: list[str], seconds: float, errors: Any, dry: bool) -> Iterator[Any]:
    """The worker, with all that it starts, stopped after ``seconds`` or when this is over."""
    env = {**os.environ, "TRITON_INTERPRET": "1"} if dry else dict(os.environ)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True
    ) as process:

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            yield process
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()


def run_part(part: str, mode: str, work: Path, seconds: float, report: Report) -> None:
    """Rows of one part, and one more if it did not come to its end."""
    start, done, late = time.monotonic(), False, 0
    command = [sys.executable, str(WORKER), part, mode, str(work), str(seconds * _GRACE)]
    with (work / f"{part}.log").open("w+", encoding="utf-8", errors="replace") as errors:
        with _process(command, seconds, errors, mode == "dry") as process:
            for line in process.stdout:
                told = json.loads(line)
                if "about" in told:
                    report.tell(told["about"])
                elif "row" in told:
                    report.add(Row(**told["row"]))
                else:
                    done, late = True, told["late"]
        taken = time.monotonic() - start
        if not done:
            errors.seek(0)
            last = next((text for text in reversed(errors.read().splitlines()) if text.strip()), "")
            stopped = f"stopped after {taken:.0f} s" if taken >= seconds else last.strip()[:200]
            report.add(failed(part, "all of it", f"{stopped} (exit {process.returncode})"))
    report.ended(part, taken, late)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write what is known after every row")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--seconds", type=float, default=460, help="most of all parts together")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_const", const="quick", dest="mode", default="full")
    modes.add_argument("--dry", action="store_const", const="dry", dest="mode")
    options = parser.parse_args()
    chosen = [part for part in options.only.split(",") if part]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose among {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was measured is written"))
    start, report = time.monotonic(), Report(options.json)
    with tempfile.TemporaryDirectory() as work:
        for part in chosen:
            left = options.seconds - (time.monotonic() - start)
            if left < 5:
                report.add(Row(part, "all of it", note="skipped: no time left"))
                continue
            run_part(part, options.mode, Path(work), min(left, PARTS[part]), report)
    taken = time.monotonic() - start
    report.about["seconds"] = round(taken, 1)
    report.write()
    missed = [row for row in report.rows if row.holds is False]
    broken = [row for row in report.rows if row.note.startswith("failed")]
    print(f"\n{taken:.0f} s in all; {len(missed)} asked and missed, {len(broken)} failed")


if __name__ == "__main__":
    main()
