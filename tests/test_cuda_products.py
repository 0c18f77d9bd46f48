"""Products of ``cuda-exact``, which sum in one order however many rows there are; where they go."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.backends import backend_status, create_backend
from recording import same_bits

STATUS = {status.name: status for status in backend_status()}
pytestmark = pytest.mark.skipif(
    not STATUS["cuda-exact"].available, reason=f"cuda-exact: {STATUS['cuda-exact'].detail}"
)
if STATUS["cuda-exact"].available:
    from quire.backends.cuda.device import Device, find_device
    from quire.backends.cuda.products import Products

DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


@pytest.fixture(autouse=True)
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processors: few tiles are enough for it."""
    monkeypatch.setattr(Device, "processors", 4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [40, 1024, 2085])
def test_a_row_alone_has_the_bits_of_a_row_among_many(inner: int, dtype: str, biased: bool) -> None:
    """Alone it is split along what is summed over, where that is more than one span."""
    random, backend = np.random.default_rng(0), create_backend("cuda-exact")
    columns, rows = 70, 260  # so many rows are tiles enough
    weight = random.standard_normal((columns, inner)).astype(DTYPES[dtype])
    bias = random.standard_normal(columns).astype(np.float32) if biased else None
    x = random.standard_normal((rows, inner)).astype(np.float32)
    there = backend.weight(weight)
    added = None if bias is None else backend.weight(bias)

    def product(of: Any) -> Any:
        table = backend.weight(np.ascontiguousarray(of))
        return backend.to_host(backend.linear(table, there, added))

    many = product(x)
    for row in (0, 63, 64, 259):
        assert same_bits(product(x[row : row + 1])[0], many[row])
    rounded = x.astype(DTYPES[dtype]).astype(np.float64)
    exact = rounded @ weight.astype(np.float64).T + (0 if bias is None else bias)
    size = np.abs(rounded) @ np.abs(weight.astype(np.float64)).T + 10
    assert (np.abs(many - exact) <= 2 * (inner + 1) * 2.0**-24 * size).all()


def test_few_rows_are_computed_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = create_backend("cuda-exact")
    grids, inner = [], backend.device.launch  # type: ignore[attr-defined]

    def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        grids.append(grid)
        inner(kernel, grid, *args, **named)

    monkeypatch.setattr(backend.device, "launch", watched)  # type: ignore[attr-defined]
    weight = backend.weight(np.ones((64, 2085), np.float32))
    for rows, grid in ((1, [(1, 1, 3), (1,)]), (300, [(1, 5, 1)])):
        grids.clear()
        backend.linear(backend.weight(np.ones((rows, 2085), np.float32)), weight)
        assert grids == grid


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 300])  # of cuda-exact in spans, and not
def test_a_product_is_the_same_where_it_is_written_to(dtype: str, rows: int, exact: bool) -> None:
    random, backend = np.random.default_rng(0), create_backend("cuda")
    products = Products(backend.device, exact)  # type: ignore[attr-defined]
    weight = backend.weight(random.standard_normal((70, 2085)).astype(DTYPES[dtype]))
    x = backend.weight(random.standard_normal((rows, 2085)).astype(np.float32))
    memory = backend.device.empty((rows + 1, 70)).fill_(7)  # type: ignore[attr-defined]
    out = memory[:rows]
    assert products.into(out, x, weight) is out
    assert same_bits(backend.to_host(out), backend.to_host(products(x, weight)))
    assert (backend.to_host(memory[rows:]) == 7).all()


def test_logits_of_captured_steps_lie_in_one_memory() -> None:
    """Of any number of rows and any vocabulary; what became too small stays as it is."""
    device = find_device()
    four, other = device.logits(4, 100).fill_(4), device.logits(2, 61)
    assert (tuple(four.shape), tuple(other.shape)) == ((4, 100), (2, 61))
    assert other.data_ptr() == four.data_ptr()
    eight = device.logits(8, 100).fill_(8)
    assert device.to_host(four).eq(4).all()
    assert device.to_host(device.logits(1, 800)).eq(8).all()
    assert device.logits(4, 100).data_ptr() == eight.data_ptr() != four.data_ptr()
