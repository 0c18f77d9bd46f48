"""``bench/gpu_worker.py`` on a whole card in software: its events, memory, graphs and streams."""

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent
WORKER = TESTS.parent / "bench" / "gpu_worker.py"

if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(WORKER.parent)]
    from interpreting import interpret_quickly
    from softcard.whole import whole_card

    interpret_quickly()
    with whole_card(total=1 << 32):
        runpy.run_path(str(WORKER), run_name="__main__")
