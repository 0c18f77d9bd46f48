"""What a pool cannot store or read is refused before anything is launched: kernels do not check."""

from typing import Any

import numpy.typing as npt

from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.steps import Step
from quire.batch import GroupBatch
from quire.errors import BackendError
from quire.pages import PagePool

__all__ = ["require", "require_ids", "require_readable", "require_slots"]

Array = npt.NDArray[Any]


def require(step: Step, pool: PagePool, group: int, tokens: int) -> None:
    """Raise BackendError for what a step cannot store or read; known already if it is static.

    Layers of a group have pools alike, so only the first of them is looked at.
    """
    assert isinstance(pool, CudaPool)
    if tokens != step.batch.num_tokens:
        raise BackendError(f"{tokens} rows for {step.batch.num_tokens} tokens")
    asked = group, pool.num_pages, pool.open_pages, pool.shape
    if step.reach is None and asked not in step.allowed:
        require_slots(step.batch.groups[group].slots, pool)
        require_readable(step.batch.groups[group], pool)
        step.allowed.add(asked)


def require_slots(slots: Array, pool: CudaPool) -> None:
    """Raise BackendError for slots where the pool takes no tokens."""
    inside = pool.slots
    if len(slots) and (slots.min() < inside.start or slots.max() >= inside.stop):
        raise BackendError(
            f"tokens are to be stored outside of slots {inside.start} to {inside.stop - 1}"
        )


def require_readable(tables: GroupBatch, pool: CudaPool) -> None:
    """Raise BackendError for ids that the pool does not have, or not of that kind."""
    last, opened = pool.num_pages + pool.open_pages - 1, tables.open.indices
    require_ids(tables.indices, pool)
    if not pool.shape.by_page or not len(opened):
        return
    if opened.min() < pool.num_pages or opened.max() > last:
        raise BackendError(
            f"queries stand in pages {opened.min()} to {opened.max()}, but ids of open pages are "
            f"{pool.num_pages} to {last}"
        )


def require_ids(indices: Array, pool: CudaPool) -> None:
    """Raise BackendError for ids that the pool does not have."""
    pages = pool.num_pages + pool.open_pages
    if indices.max(initial=-1) >= pages:
        raise BackendError(f"page {indices.max()} of a pool of {pages} is to be read")
