"""Which page formats every backend stores: a refusal elsewhere in the suite is only a skip."""

from itertools import product

import pytest

from conformance import ALL_SUBJECTS, Subject, backend_of
from quire.errors import BackendError
from quire.pages import PAGE_FORMATS, PageShape

pytestmark = ALL_SUBJECTS

PLAIN = {"fp32", "bf16", "fp16"}
BY_TOKEN = {"fp8", "int8"}
BY_PAGE = {"int4", "int2"}

# Keys and values each in any of these. A row is the first word of a subject's name.
STORES = {
    "reference": PLAIN | BY_TOKEN | BY_PAGE,
    "native": PLAIN | BY_TOKEN | BY_PAGE,
    "cuda": PLAIN | BY_TOKEN | BY_PAGE,
}

PAIRS = tuple(product(PAGE_FORMATS, PAGE_FORMATS))


def stores(subject: Subject, key: str, value: str) -> bool:
    """Whether ``subject`` is to store keys and values in the formats of these names."""
    return {key, value} <= STORES[subject.name.partition("-")[0]]


def test_a_backend_accepts_the_formats_of_its_row_and_no_others(subject: Subject) -> None:
    backend, refused = backend_of(subject), {}
    for pair in PAIRS:
        try:
            backend.require_formats(*(PAGE_FORMATS[name] for name in pair))
        except BackendError as error:
            refused[pair] = str(error)
    assert set(PAIRS) - set(refused) == {pair for pair in PAIRS if stores(subject, *pair)}
    for pair, reason in refused.items():
        assert any(name in reason for name in pair), reason


def test_a_pool_agrees_with_what_was_promised(subject: Subject) -> None:
    """It is made where require_formats says so, and not otherwise."""
    backend = backend_of(subject)
    for key, value in PAIRS:
        shape = PageShape(32, 2, 64, 64, PAGE_FORMATS[key], PAGE_FORMATS[value])
        if stores(subject, key, value):
            pool = backend.pool(shape, 3, int(shape.by_page))
            assert pool.shape == shape
            exported = pool.export_pages(range(3))
            assert exported.shape == (3, shape.bytes_per_page)
        else:
            with pytest.raises(BackendError):
                backend.pool(shape, 3)
