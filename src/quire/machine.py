"""What this machine offers: processor features, usable threads, memory."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Machine", "PeakMemory", "this_machine"]

# Features that kernels care about, in /proc/cpuinfo's spelling.
_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("neon", "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"),
)


@dataclass(frozen=True)
class Machine:
    """Facts about the machine that runs this process.

    cpu_features     instruction sets that matter here; empty where they cannot be read
    logical_cpus     CPUs that the machine has
    affinity_cpus    CPUs that this process may run on
    quota_cpus       CPUs' worth of time that its control group grants; None is unlimited
    memory_bytes     physical memory, or the control group's limit if that is less
    available_bytes  what could be allocated now without swapping; None where it is unknown
    """

    system: str
    cpu_name: str
    cpu_features: tuple[str, ...]
    logical_cpus: int
    affinity_cpus: int
    quota_cpus: float | None
    memory_bytes: int | None
    available_bytes: int | None

    @property
    def threads(self) -> int:
        """Threads worth starting: affinity, capped by the quota, at least 1."""
        quota = self.affinity_cpus if self.quota_cpus is None else self.quota_cpus
        return max(1, min(self.affinity_cpus, int(quota + 0.5)))


def this_machine() -> Machine:
    """Read the facts from the operating system; never raises for what it cannot find."""
    name, features = _cpu()
    total, available = _memory()
    limit = _cgroup_value("memory.max", "memory/memory.limit_in_bytes")
    if limit is not None and (total is None or limit < total):
        total = limit
        available = None if available is None else min(available, limit)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_name=name,
        cpu_features=features,
        logical_cpus=os.cpu_count() or 1,
        affinity_cpus=_affinity(),
        quota_cpus=_quota(),
        memory_bytes=total,
        available_bytes=available,
    )


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if flags:
        return name, tuple(feature for feature in _FEATURES if feature in flags)
    config = np.show_config(mode="dicts") or {}
    simd = config.get("SIMD Extensions", {})
    return name, tuple(str(feature).lower() for feature in simd.get("found", ()))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _own_groups() -> dict[str, str]:
    """Control-group directories of this process by controller; "" is version 2."""
    found = {}
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _group_files(version2: str, version1: str) -> list[str]:
    """Candidate files, from the process's own group up to the root, version 2 first."""
    groups = _own_groups()
    controller, _, file = version1.partition("/")
    files = []
    for root, own, name in (
        ("/sys/fs/cgroup", groups.get("", "/"), version2),
        (f"/sys/fs/cgroup/{controller}", groups.get(controller, "/"), file),
    ):
        here = Path(own.lstrip("/"))
        files += [str(Path(root) / part / name) for part in (here, *here.parents)]
    return files


def _cgroup_value(version2: str, version1: str) -> int | None:
    """The least limit on the way to the root, or None if there is none."""
    values = [
        int(text)
        for path in _group_files(version2, version1)
        if (text := (_read(path) or "").strip()).isdigit() and int(text) < 2**60
    ]
    return min(values, default=None)


def _quota() -> float | None:
    quotas = []
    for path in _group_files("cpu.max", "cpu/cpu.cfs_quota_us"):
        words = (_read(path) or "").split()
        if path.endswith("cfs_quota_us"):
            words += (_read(path.replace("quota", "period")) or "").split()
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory() -> tuple[int | None, int | None]:
    values = {}
    for line in (_read("/proc/meminfo") or "").splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    if "MemTotal" in values:
        return values["MemTotal"], values.get("MemAvailable")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return None, None


class PeakMemory:
    """The most memory this process had resident while a ``with`` block ran.

    ``bytes`` is None where the system cannot say: it needs Linux's resettable high-water mark.
    """

    bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True
        except OSError:
            self._reset = False
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reset:
            for line in (_read("/proc/self/status") or "").splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = int(line.split()[1]) * 1024
