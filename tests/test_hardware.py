"""The catalogue of devices: dense rates, one name a device, errors that name the nearest."""

import json
import re

import pytest

from quire.analysis.hardware import ALIASES, DEVICES, Hardware, known_hardware, pcie
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "dtype", "sparse"),
    [  # as printed in data sheets, "with sparsity"; TFLOPS or TOPS
        ("h200", "bf16", 1979),
        ("h200", "fp8", 3958),
        ("h200", "tf32", 989),
        ("h100-sxm", "int8", 3958),
        ("h100-pcie", "bf16", 1513),
        ("h100-pcie", "fp8", 3026),
        ("h100-nvl", "bf16", 1671),
        ("a100-80gb", "bf16", 624),
        ("a100-40gb", "int8", 1248),
        ("l40s", "fp8", 1466),
        ("l4", "bf16", 242),
        ("l4", "int8", 485),
        ("a10", "bf16", 250),
        ("b200", "fp8", 9000),
        ("b200", "tf32", 2250),
        ("mi300x", "fp8", 5229.8),
        ("rtx-4090", "bf16", 330.3),
        ("rtx-4090", "fp8", 660.6),
        ("rtx-5090", "bf16", 419),
        ("rtx-3090", "bf16", 142),
    ],
)
def test_rates_are_half_of_what_is_printed_for_sparse_weights(
    name: str, dtype: str, sparse: float
) -> None:
    assert known_hardware(name).flops[dtype] == pytest.approx(sparse * 1e12 / 2, rel=0.005)


@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [
        ("rtx-3060", 360),
        ("rtx-3090", 936),
        ("rtx-4060-ti", 288),
        ("rtx-4070", 504),
        ("rtx-4080", 716.8),
        ("rtx-4090", 1008),
        ("rtx-5080", 960),
        ("rtx-5090", 1792),
        ("epyc-9004-384gb", 460.8),
        ("ddr5-5600-dual-32gb", 89.6),
        ("ddr4-3200-dual-16gb", 51.2),
        ("xeon-8480-512gb", 307.2),
    ],
)
def test_bandwidths_from_width_and_clock_are_those_that_makers_print(
    name: str, gigabytes_per_s: float
) -> None:
    assert known_hardware(name).bandwidth == pytest.approx(gigabytes_per_s * 1e9)


def test_links_are_of_one_direction() -> None:
    assert known_hardware("h100").link_bandwidth == 900e9 / 2
    assert known_hardware("a100").link_bandwidth == 600e9 / 2
    assert pcie(4) == pytest.approx(31.5e9, rel=1e-3)
    assert known_hardware("rtx-4060-ti").link_bandwidth == pytest.approx(pcie(4) / 2)
    assert known_hardware("m2-max-32gb").link_bandwidth is None


def test_ridge_of_an_a100() -> None:
    assert known_hardware("A100 80GB").ridge("bf16") == pytest.approx(312e12 / 2.039e12)


@pytest.mark.parametrize(
    "name", ["H200", "nvidia h200", " NVIDIA_H200 ", "NVIDIA H200 141 GB", "h200-141gb"]
)
def test_names_in_any_case_with_their_maker_or_not(name: str) -> None:
    assert known_hardware(name).name == "h200"


def test_memory_size_is_part_of_the_name_where_there_is_a_choice() -> None:
    made = known_hardware("Apple M2 Max 64 GB")
    assert (made.name, made.memory_bytes) == ("m2-max-64gb", 64 * 2**30)
    assert known_hardware("ddr5-5600-dual-48gb").memory_bytes == 48 * 2**30
    with pytest.raises(ConfigError, match=r"m2-max comes with 32 GB or 64 GB or 96 GB; name one"):
        known_hardware("m2-max")
    with pytest.raises(ConfigError, match="not with 48 GB"):
        known_hardware("m2-max-48gb")
    with pytest.raises(ConfigError, match="not with 24 GB"):
        known_hardware("h100-24gb")
    with pytest.raises(ConfigError, match="any size of memory; name one, as in epyc-9654-32gb"):
        known_hardware("epyc-9004")
    with pytest.raises(ConfigError, match="not with 0 GB"):
        known_hardware("epyc-9004-0gb")


@pytest.mark.parametrize(
    ("wrong", "near"), [("h300", "h200"), ("rtx4090", "rtx-4090"), ("m2-mox-64gb", "m2-max")]
)
def test_a_device_that_does_not_exist_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"did you mean '{near}")):
        known_hardware(wrong)
    with pytest.raises(ConfigError, match=r"there are: .*a100-80gb.*xeon-8480"):
        known_hardware("abacus")


def test_numbers_are_multiplied_in_a_dtype_that_holds_them() -> None:
    a100, t4 = known_hardware("a100"), known_hardware("t4")
    assert a100.computes_in("fp8") == "bf16"
    assert a100.rate("fp8") == a100.flops["bf16"]
    assert t4.computes_in("bf16") == "fp32"  # fp16 has not the range
    assert t4.computes_in("fp8") == "fp16"
    assert known_hardware("ddr4-3200-dual-8gb").computes_in("fp16") == "fp32"
    with pytest.raises(ConfigError, match="'fp4'"):
        a100.rate("fp4")


def each() -> list[Hardware]:
    return [row.hardware for row in DEVICES.values()]


@pytest.mark.parametrize("made", each(), ids=lambda made: str(made.name))
def test_rows_make_sense(made: Hardware) -> None:
    assert made.name == made.name.lower()
    assert "fp32" in made.flops
    assert made.source
    narrower = [made.rate(dtype) for dtype in ("fp32", "tf32", "bf16", "fp8")]
    assert narrower == sorted(narrower)  # fewer bits are never slower
    assert 10 < made.bandwidth / 1e9 < 10_000
    assert made.kind == ("machine" if "dual" in made.name or made.memory_bytes == 0 else "gpu")
    json.dumps(made.as_dict())


def test_aliases_lead_to_devices() -> None:
    assert set(ALIASES.values()) <= set(DEVICES)
    assert not set(ALIASES) & set(DEVICES)
