"""What devices can do at most: memory, bytes and operations a second, and the link to their peers.

All figures are ceilings that makers state, or that follow from units x clock; none was measured
here, and real kernels reach a part of them. Rates of matrix units are *dense*: data sheets of
NVIDIA and AMD like to print twice that, for weights of which half are zeros. Bandwidths of
links are of one direction: half of what is printed as NVLink's. Sources name the maker's document;
rates that makers do not print are units x clock, and say so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from quire.errors import ConfigError, did_you_mean

__all__ = ["DEVICES", "Device", "Hardware", "Kind", "known_hardware", "pcie"]

Kind = Literal["gpu", "machine"]

T, GIB = 1e12, 2**30
# Where a device has no units for a dtype: dtypes that hold all of its numbers exactly, best first.
# fp8 is e4m3, whose numbers fp16 and bf16 both have; fp16 and bf16 do not have each other's.
WIDER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp32": (),
        "tf32": ("fp32",),
        "bf16": ("fp32",),
        "fp16": ("fp32",),
        "fp8": ("bf16", "fp16", "fp32"),
        "int8": ("bf16", "fp16", "fp32"),
    }
)
GIGATRANSFERS = {3: 8, 4: 16, 5: 32}  # a second and lane; PCIe 3.0 to 5.0 send 128 bits of 130


def pcie(generation: int, lanes: int = 16) -> float:
    """Bytes a second in one direction (PCI Express Base Specification, 3.0 and later)."""
    return GIGATRANSFERS[generation] * 1e9 * lanes * (128 / 130) / 8


@dataclass(frozen=True)
class Hardware:
    """A device.

    name             in the catalogue, or as the user calls it
    kind             ``gpu``, or ``machine``: processor cores and the memory they share
    memory_bytes     of its memory: what the maker calls GB is GiB here, as memory chips are sold
    bandwidth        bytes a second between memory and units
    flops            dense operations a second by dtype; fp32 is always there
    link_bandwidth   bytes a second to its peers, in one direction; None if it has no peers
    source           the data sheet, or the arithmetic
    notes            what a reader of a plan should know of it
    """

    name: str
    kind: Kind
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float]
    link_bandwidth: float | None
    source: str
    notes: tuple[str, ...] = ()

    def computes_in(self, dtype: str) -> str:
        """The dtype that numbers of ``dtype`` are multiplied in: itself, or one that holds them.

        Raises ConfigError for a dtype that nothing is known of.
        """
        if dtype not in WIDER:
            raise ConfigError(f"no rate is known for {dtype!r} (known: {', '.join(WIDER)})")
        return next(each for each in (dtype, *WIDER[dtype]) if each in self.flops)

    def rate(self, dtype: str) -> float:
        """Operations a second on numbers of ``dtype``; see :meth:`computes_in`."""
        return self.flops[self.computes_in(dtype)]

    def ridge(self, dtype: str) -> float:
        """Operations a byte from which ``dtype`` is limited by units and no more by memory.

        The ridge point of a roofline (Williams, Waterman and Patterson, CACM 52(4), 2009).
        """
        return self.rate(dtype) / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "flops_per_s": dict(self.flops),
            "link_bytes_per_s": self.link_bandwidth,
            "source": self.source,
            "notes": list(self.notes),
        }


ANY = ()  # as many modules as there are places for


@dataclass(frozen=True)
class Device:
    """A row of the catalogue: a device, and the memory sizes (GB) that it is sold with.

    ``sizes`` of one is part of the device; of more, or of none (any), is part of what it is called.
    """

    hardware: Hardware
    sizes: tuple[int, ...]


def _rates(fp32: float, half: float | None = None, **more: float) -> dict[str, float]:
    """Tera-operations a second -> by dtype; ``half`` is of fp16 and of bf16."""
    both = {} if half is None else {"fp16": half, "bf16": half}
    return {name: rate * T for name, rate in {"fp32": fp32, **both, **more}.items()}


def _gpu(
    name: str,
    memory: tuple[int, float],
    flops: dict[str, float],
    link: float,
    source: str,
    *notes: str,
) -> Device:
    """``memory``: GB, and GB a second; ``link``: GB a second in one direction."""
    size, bandwidth = memory
    made = Hardware(name, "gpu", size * GIB, bandwidth * 1e9, flops, link * 1e9, source, notes)
    return Device(made, (size,))


def _with_ecc(device: Device) -> Device:
    """GDDR6 with error correction on, as shipped: one byte in 16 holds the codes."""
    made = device.hardware
    note = f"error correction takes 1/16 of its {device.sizes[0]} GB"
    return replace(
        device,
        hardware=replace(
            made, memory_bytes=made.memory_bytes * 15 // 16, notes=(*made.notes, note)
        ),
    )


def _geforce(
    name: str, memory: tuple[int, int, float], units: tuple[int, float], link: float
) -> Device:
    """``memory``: GB, bits of its bus, gigabits a second and pin; ``units``: SMs, boost in GHz.

    128 FP32 lanes an SM. Matrix units with sums in FP32, as models need them: TF32 as fast as FP32,
    BF16 and FP16 twice, FP8 (from Ada on) 4 times, INT8 8 times (white papers of GA102, AD102 and
    GB202, appendix A).
    """
    (size, bits, pin), (sms, clock) = memory, units
    fp32 = sms * 128 * 2 * clock / 1e3
    fp8 = {} if name.startswith("rtx-30") else {"fp8": 4 * fp32}
    flops = _rates(fp32, 2 * fp32, tf32=fp32, int8=8 * fp32, **fp8)
    source = f"units x clock: {sms} SMs at {clock} GHz; {bits} bits x {pin} Gb/s"
    note = "cards talk over PCIe, on most boards by way of the host"
    return _gpu(name, (size, bits / 8 * pin), flops, link / 1e9, source, note)


_MAC = (
    "unified memory: by default macOS lets its GPU have two thirds to three quarters of it",
    "bf16 is computed as fp32, at the same rate as fp16",
)


def _mac(
    name: str, sizes: tuple[int, ...], bandwidth: float, fp32: float, clock: float | None = None
) -> Device:
    """``fp32``: tera-operations a second as Apple says; with a ``clock`` (GHz), GPU cores."""
    if clock is not None:
        source = f"Apple, {name}; rate: {fp32:g} cores x 128 lanes at {clock} GHz, not Apple's"
        fp32 = fp32 * 128 * 2 * clock / 1e3
    else:
        source = f"Apple, press release of {name}"
    flops = _rates(fp32, fp16=fp32)
    made = Hardware(name, "gpu", sizes[-1] * GIB, bandwidth * 1e9, flops, None, source, notes=_MAC)
    return Device(made, sizes)


def _machine(
    name: str,
    memory: tuple[int, int],
    cores: tuple[int, float],
    per_cycle: dict[str, int],
    sizes: tuple[int, ...] = ANY,
) -> Device:
    """``memory``: channels of 64 bits, megatransfers a second; ``cores``: how many, GHz.

    ``per_cycle``: operations a core and cycle, by dtype.
    """
    bandwidth = memory[0] * 8 * memory[1] * 1e6
    flops = {dtype: cores[0] * cores[1] * 1e9 * each for dtype, each in per_cycle.items()}
    source = (
        f"theoretical: {memory[0]} channels x 8 bytes x {memory[1]} MT/s; {cores[0]} cores at "
        f"{cores[1]} GHz x {per_cycle['fp32']} fp32 operations a cycle"
    )
    notes = (
        "memory gives 70 to 90 % of this; measure the machine itself with --hardware this",
        f"assumes {cores[0]} cores that keep {cores[1]} GHz while they multiply",
    )
    size = max(sizes, default=0) * GIB
    return Device(Hardware(name, "machine", size, bandwidth, flops, None, source, notes), sizes)


_HOPPER = _rates(67, 989.4, tf32=494.7, fp8=1978.9, int8=1978.9)
_AMPERE = _rates(19.5, 312, tf32=156, int8=624)
_MI300 = _rates(163.4, 1307.4, tf32=653.7, fp8=2614.9, int8=2614.9)
_AVX2 = {"fp32": 2 * 8 * 2}  # two units of eight lanes that multiply and add
_ZEN4 = {"fp32": 32, "bf16": 64}  # one AVX-512 multiplication and addition; VDPBF16PS twice that
# AMX multiplies tiles of 16 x 16 x 64 bytes in 16 cycles (Intel optimization manual, chapter 20).
_AMX = {"fp32": 64, "bf16": 1024, "int8": 2048}
_PCIE4, _PCIE3 = pcie(4) / 1e9, pcie(3) / 1e9

_NO_BF16 = "it has no units for bf16, which is computed as fp32"

_ROWS = (
    _gpu(
        *("b200", (180, 8000), _rates(75, 2250, tf32=1125, fp8=4500, int8=4500), 900),
        "NVIDIA DGX B200 and HGX B200 data sheets, an eighth",
    ),
    _gpu("gh200", (96, 4000), _HOPPER, 450, "NVIDIA GH200 data sheet, HBM3"),
    _gpu("gh200-144gb", (144, 4900), _HOPPER, 450, "NVIDIA GH200 data sheet, HBM3e"),
    _gpu("h200", (141, 4800), _HOPPER, 450, "NVIDIA H200 data sheet, SXM"),
    _gpu("h100-sxm", (80, 3350), _HOPPER, 450, "NVIDIA H100 data sheet, SXM"),
    _gpu(
        *("h100-nvl", (94, 3900), _rates(60, 835.5, tf32=417.5, fp8=1670.5, int8=1670.5), 300),
        *("NVIDIA H100 NVL data sheet", "NVLink reaches one other card"),
    ),
    _gpu(
        *("h100-pcie", (80, 2000), _rates(51, 756, tf32=378, fp8=1513, int8=1513), 300),
        *("NVIDIA H100 data sheet, PCIe", "NVLink reaches one other card, by a bridge"),
    ),
    _gpu("a100-80gb", (80, 2039), _AMPERE, 300, "NVIDIA A100 data sheet, 80 GB SXM"),
    _gpu(
        *("a100-80gb-pcie", (80, 1935), _AMPERE, 300, "NVIDIA A100 data sheet, 80 GB PCIe"),
        "NVLink reaches one other card, by a bridge",
    ),
    _gpu("a100-40gb", (40, 1555), _AMPERE, 300, "NVIDIA A100 data sheet, 40 GB SXM"),
    _with_ecc(
        _gpu(
            *("l40s", (48, 864), _rates(91.6, 362.05, tf32=183, fp8=733, int8=733), _PCIE4),
            "NVIDIA L40S data sheet",
        )
    ),
    _with_ecc(
        _gpu(
            *("l4", (24, 300), _rates(30.3, 121, tf32=60, fp8=242.5, int8=242.5), _PCIE4),
            "NVIDIA L4 data sheet",
        )
    ),
    _with_ecc(
        _gpu(
            *("a10", (24, 600), _rates(31.2, 125, tf32=62.5, int8=250), _PCIE4),
            "NVIDIA A10 data sheet",
        )
    ),
    _with_ecc(
        _gpu(
            *("t4", (16, 320), _rates(8.1, fp16=65, int8=130), _PCIE3, "NVIDIA T4 data sheet"),
            _NO_BF16,
        )
    ),
    _gpu(
        *("v100-32gb", (32, 900), _rates(15.7, fp16=125), 150, "NVIDIA V100 data sheet, SXM2"),
        _NO_BF16,
    ),
    _gpu(
        *("v100-16gb", (16, 900), _rates(15.7, fp16=125), 150, "NVIDIA V100 data sheet, SXM2"),
        _NO_BF16,
    ),
    _geforce("rtx-3060", (12, 192, 15), (28, 1.777), pcie(4)),
    _geforce("rtx-3090", (24, 384, 19.5), (82, 1.695), pcie(4)),
    _geforce("rtx-4060-ti-16gb", (16, 128, 18), (34, 2.535), pcie(4, 8)),
    _geforce("rtx-4070", (12, 192, 21), (46, 2.475), pcie(4)),
    _geforce("rtx-4080", (16, 256, 22.4), (76, 2.505), pcie(4)),
    _geforce("rtx-4090", (24, 384, 21), (128, 2.52), pcie(4)),
    _geforce("rtx-5080", (16, 256, 30), (84, 2.617), pcie(5)),
    _geforce("rtx-5090", (32, 512, 28), (170, 2.407), pcie(5)),
    _gpu("mi300x", (192, 5300), _MI300, 448, "AMD Instinct MI300X data sheet; 7 links of 64 GB/s"),
    _gpu("mi325x", (256, 6000), _MI300, 448, "AMD Instinct MI325X data sheet; 7 links of 64 GB/s"),
    _gpu(
        *("rx-7900-xtx", (24, 960), _rates(61.4, 122.8, int8=122.8), _PCIE4),
        "AMD Radeon RX 7900 XTX, product page",
    ),
    _mac("m1", (8, 16), 68.25, 2.6),
    _mac("m1-pro", (16, 32), 200, 5.2),
    _mac("m1-max", (32, 64), 400, 10.4),
    _mac("m1-ultra", (64, 128), 800, 21),
    _mac("m2", (8, 16, 24), 100, 3.6),
    _mac("m2-pro", (16, 32), 200, 6.8),
    _mac("m2-max", (32, 64, 96), 400, 13.6),
    _mac("m2-ultra", (64, 128, 192), 800, 27.2),
    _mac("m3", (8, 16, 24), 100, 10, 1.398),
    _mac("m3-pro", (18, 36), 150, 18, 1.398),
    _mac("m3-max-30core", (36, 96), 300, 30, 1.398),
    _mac("m3-max-40core", (48, 64, 128), 400, 40, 1.398),
    _mac("m3-ultra", (96, 256, 512), 819, 80, 1.398),
    _mac("m4", (16, 24, 32), 120, 10, 1.47),
    _mac("m4-pro", (24, 48, 64), 273, 20, 1.578),
    _mac("m4-max-32core", (36,), 410, 32, 1.578),
    _mac("m4-max-40core", (48, 64, 128), 546, 40, 1.578),
    _machine("ddr4-3200-dual", (2, 3200), (8, 3.0), _AVX2),
    _machine("ddr5-4800-dual", (2, 4800), (8, 3.0), _AVX2),
    _machine("ddr5-5600-dual", (2, 5600), (8, 3.0), _AVX2),
    _machine("lpddr5x-7500-dual", (2, 7500), (8, 3.0), _AVX2),
    _machine("epyc-9654", (12, 4800), (96, 2.4), _ZEN4),
    _machine("xeon-8480", (8, 4800), (56, 2.0), _AMX),
)
DEVICES: Mapping[str, Device] = MappingProxyType({row.hardware.name: row for row in _ROWS})
ALIASES = {
    "h100": "h100-sxm",
    "a100": "a100-80gb",
    "a100-80gb-sxm": "a100-80gb",
    "v100": "v100-32gb",
    "rtx-4060-ti": "rtx-4060-ti-16gb",
    "epyc-9004": "epyc-9654",
}
_MAKERS = ("nvidia-", "geforce-", "amd-", "instinct-", "radeon-", "apple-", "intel-", "tesla-")


def known_hardware(name: str) -> Hardware:
    """A device of the catalogue, in any case, with spaces or hyphens, with its maker or without.

    Of a device that is sold with several sizes of memory the name ends with one: ``m2-max-64gb``,
    ``ddr5-5600-dual-32gb``. Raises ConfigError, with the nearest names, for one that is not there,
    and for a size that is missing or that it does not come with.
    """
    folded = re.sub(r"[\s_-]+", "-", name.strip().lower())
    for maker in _MAKERS:
        folded = folded.removeprefix(maker)
    folded = re.sub(r"(\d)-gb$", r"\1gb", folded)
    base = ALIASES.get(folded, folded)
    if base in DEVICES:
        return _of_one_size(DEVICES[base])
    sized = re.fullmatch(r"(.+)-(\d+)gb", base)
    if sized:
        base = ALIASES.get(sized[1], sized[1])
        if base in DEVICES:
            return _of_size(DEVICES[base], int(sized[2]))
    raise ConfigError(
        f"no device {name!r} in the catalogue{did_you_mean(base, [*DEVICES, *ALIASES])} "
        f"(there are: {', '.join(DEVICES)})"
    )


def _of_one_size(device: Device) -> Hardware:
    if len(device.sizes) == 1:
        return device.hardware
    name = device.hardware.name
    sold = " or ".join(f"{size} GB" for size in device.sizes) or "any size of memory"
    example = f"{name}-{device.sizes[-1] if device.sizes else 32}gb"
    raise ConfigError(f"{name} comes with {sold}; name one, as in {example}")


def _of_size(device: Device, size: int) -> Hardware:
    made = device.hardware
    if size < 1 or (device.sizes and size not in device.sizes):
        sold = " or ".join(f"{each} GB" for each in device.sizes) or "1 GB or more"
        raise ConfigError(f"{made.name} comes with {sold} of memory, not with {size} GB")
    if len(device.sizes) == 1:
        return made
    return replace(made, name=f"{made.name}-{size}gb", memory_bytes=size * GIB)
