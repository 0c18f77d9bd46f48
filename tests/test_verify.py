"""A plan of quill's memory against what two processes measured."""

import sys

import numpy as np
import pytest

from quire.analysis import residence
from quire.analysis.families import read_shape
from quire.analysis.memory import Load, kv_layout, plan_memory
from quire.analysis.verify import Asked, measure
from quire.errors import ConfigError, QuireError
from quire.models.source import resolve_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")


@linux
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
def test_every_term_of_quill_is_within_two_percent(kv_format: str) -> None:
    shape = read_shape(resolve_model("quill"))
    layout, load = kv_layout(shape, kv_format), Load(1024, 8, threads=2)
    plan = plan_memory(shape, layout, load)
    asked = Asked("quill", kv_format, layout.page_size, plan.kv, 1024, 8, 512, threads=2)
    found = measure(asked)
    pairs = {
        "weights": (plan.weight_bytes, found.weights),
        "kv": (plan.kv, found.kv),
        "workspace": (plan.workspace.total - plan.workspace.logits, found.workspace),
        "logits": (plan.workspace.logits, found.logits),
    }
    for name, (predicted, measured) in pairs.items():
        assert measured == pytest.approx(predicted, rel=0.02), name
    assert found.peak is not None
    assert found.base is not None
    assert found.peak - found.base > plan.total - plan.workspace.logits
    assert found.prefill_s > found.decode_s > 0


def test_a_run_that_cannot_be_is_refused_with_its_reason() -> None:
    with pytest.raises(QuireError, match=r"its run failed: .*context of 20 is too short to verify"):
        measure(Asked("quill", "bf16", 16, 1 << 20, 20, 4, 512))
    with pytest.raises(QuireError, match="no model directory at"):
        measure(Asked("no-such-model", "bf16", 16, 1 << 20, 512, 4, 512))
    assert issubclass(ConfigError, QuireError)


@linux
def test_arrays_are_resident_once_they_are_written() -> None:
    array = np.zeros(64 << 20, np.uint8)
    before = residence.resident_bytes([array])
    array[: 32 << 20 : 1024] = 1
    after = residence.resident_bytes([array])
    assert before is not None
    assert after is not None
    assert before < 1 << 20
    assert 32 << 20 <= after <= 34 << 20  # huge pages


@linux
def test_what_malloc_has_handed_out_is_counted() -> None:
    before = residence.allocated()
    if before is None:
        pytest.skip("no mallinfo2 in this C library")
    array = np.empty(3 << 20, np.uint8)
    after = residence.allocated()
    assert after is not None
    assert 0 <= after - before - array.nbytes < 1 << 16


def test_bytes_of_a_file_that_are_mapped_twice_count_once() -> None:
    assert residence._union([(0, 10), (5, 10), (30, 2), (31, 1)]) == 17
