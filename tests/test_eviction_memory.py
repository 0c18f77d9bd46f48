"""Peak memory under a budget, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.layout import pages_for
from tiny import write_llama

BUDGET, CHUNK, PAGE = 256, 128, 16

# Prints the growth of resident memory and the most pages held while a long prompt is answered.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import quire

def peak_bytes():
    # Of this program alone: getrusage begins with the peak of the process that forked it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

directory, evict, budget, chunk, page = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache = quire.CacheConfig(page_size=page, num_pages=300, evict=evict, prefix_cache=False)
engine = quire.Engine(directory, backend="native", threads=1, cache=cache, max_batch_tokens=chunk)
params = quire.SamplingParams(max_new_tokens=100, ignore_eos=True)
engine.generate([[1] * (chunk + 1)], params)  # what is not the cache's is there from now on
before = peak_bytes()
request = engine.submit(np.random.default_rng(0).integers(0, 61, 4000).tolist(), params)
held = 0
while not request.finished:
    engine.step()
    if (sequence := request.samples[0].sequence) is not None:
        held = max(held, len(engine.cache.page_tables(sequence)[0][1]))
grown = peak_bytes() - before
page_bytes, peak = engine.cache.layout.page_bytes(0), request.completions[0].kv_bytes_peak
print(json.dumps({"grown": grown, "held": held, "peak": peak, "page": page_bytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_the_budget(tmp_path: Path) -> None:
    """A native pool takes memory when its pages are touched; 4,100 tokens here are 48 MiB."""
    directory = write_llama(
        tmp_path, head_dim=128, num_key_value_heads=6, max_position_embeddings=4200
    )

    def measured(evict: str) -> dict[str, int]:
        args = [directory, evict, BUDGET, CHUNK, PAGE]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, args)],
            capture_output=True,
            check=True,
            timeout=120,
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    all_tokens, evicting = measured("none"), measured(f"window:budget={BUDGET}")
    most = pages_for(BUDGET + CHUNK, PAGE)
    assert evicting["held"] <= pages_for(BUDGET, PAGE) + 1
    assert evicting["peak"] <= most * evicting["page"]
    assert all_tokens["peak"] == pages_for(4099, PAGE) * all_tokens["page"]
    assert all_tokens["grown"] > all_tokens["peak"] / 2
    assert evicting["grown"] < all_tokens["grown"] / 3
