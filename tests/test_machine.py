"""What the machine offers, against what the system says by other means."""

import os
from pathlib import Path

import numpy as np
import pytest

from quire import machine
from quire.machine import PeakMemory, this_machine


def test_threads_respect_affinity() -> None:
    found = this_machine()
    if hasattr(os, "sched_getaffinity"):
        assert found.affinity_cpus == len(os.sched_getaffinity(0))
    assert 1 <= found.threads <= found.affinity_cpus


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"/sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        (
            {
                "/sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "/sys/fs/cgroup/a/cpu.max": "50000 100000",
            },
            0.5,
        ),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, None),
        ({}, None),
    ],
)
def test_quota_is_the_least_on_the_way_to_the_root(
    files: dict[str, str], quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/self/cgroup": "0::/a/b\n3:cpu,cpuacct:/c\n", **files}
    monkeypatch.setattr(machine, "_read", files.get)
    assert this_machine().quota_cpus == quota


def test_a_quota_below_one_cpu_still_gives_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "10000 100000"}
    monkeypatch.setattr(machine, "_read", files.get)
    assert this_machine().threads == 1


def test_memory_is_capped_by_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/",
        "/proc/meminfo": "MemTotal: 8192 kB\nMemAvailable: 4096 kB\n",
        "/sys/fs/cgroup/memory.max": str(2 * 2**20),
    }
    monkeypatch.setattr(machine, "_read", files.get)
    found = this_machine()
    assert (found.memory_bytes, found.available_bytes) == (2 * 2**20, 2 * 2**20)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_an_allocation_and_forgets_it() -> None:
    size = 64 * 2**20
    with PeakMemory() as before:
        pass
    with PeakMemory() as during:
        np.ones(size, np.uint8)
    with PeakMemory() as after:
        pass
    assert before.bytes is not None
    assert during.bytes is not None
    assert after.bytes is not None
    assert during.bytes - before.bytes > size * 0.9
    assert during.bytes - after.bytes > size * 0.9
