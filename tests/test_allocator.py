"""PageAllocator: free list and reference counts, and that its check finds doctored books."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cache.allocator import PageAllocator
from quire.errors import CacheError, CacheFull, CacheInvariantError


def test_every_page_is_handed_out_exactly_once() -> None:
    allocator = PageAllocator(7)
    pages = [*allocator.allocate(3), *allocator.allocate(0), *allocator.allocate(4)]
    assert sorted(pages) == list(range(7))
    assert allocator.num_free == 0
    assert [allocator.references(page) for page in range(7)] == [1] * 7
    allocator.check(pages)


def test_exhaustion_takes_nothing_and_says_the_numbers() -> None:
    allocator = PageAllocator(5)
    held = allocator.allocate(3)
    with pytest.raises(CacheFull, match=r"3 pages wanted, 2 of 5 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    allocator.check(held)
    allocator.check(held + allocator.allocate(2))


def test_a_page_is_private_while_one_holds_it_and_it_is_not_kept() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    assert allocator.is_private(page)
    assert not allocator.is_private(1 - page)  # free
    allocator.retain([page])
    assert not allocator.is_private(page)
    allocator.release([page])
    assert allocator.is_private(page)
    allocator.keep(page)
    assert not allocator.is_private(page)


def test_a_shared_page_is_free_only_after_its_last_holder_left() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    allocator.retain(pages)
    allocator.retain(pages[:1])
    assert allocator.references(pages[0]) == 3
    allocator.check(pages * 2 + pages[:1])
    allocator.release(pages)
    assert (allocator.num_free, allocator.references(pages[1])) == (0, 1)
    allocator.release(pages)
    assert (allocator.num_free, allocator.references(pages[0])) == (1, 1)
    allocator.release(pages[:1])
    assert allocator.num_free == 2
    allocator.check([])


def test_a_free_page_can_be_neither_released_nor_shared() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.allocate(1)
    allocator.release([page])
    with pytest.raises(CacheError, match=f"page {page} is already free"):
        allocator.release([page])
    with pytest.raises(CacheError, match=f"page {page} is free and cannot be shared"):
        allocator.retain([page])
    assert allocator.num_free == 3
    allocator.check([])


@pytest.mark.parametrize(
    "held",
    [[], [0], [0, 1, 1], [0, 2], [0, 1, 2], [0, 1, 3], [0, -2], [0, 1, -4]],
    ids=str,
)
def test_check_refuses_holders_that_differ_from_the_counts(held: list[int]) -> None:
    allocator = PageAllocator(3)
    assert sorted(allocator.allocate(2)) == [0, 1]
    allocator.check([1, 0])
    with pytest.raises(CacheInvariantError):
        allocator.check(held)


def test_check_names_the_page_and_both_counts() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.allocate(1)
    with pytest.raises(CacheInvariantError, match=f"page {page}: counted 1, held 2"):
        allocator.check([page, page])


@pytest.mark.parametrize("doctor", ["lost", "twice", "held"])
def test_check_refuses_a_free_list_that_is_not_the_free_pages(doctor: str) -> None:
    allocator = PageAllocator(4)
    held = allocator.allocate(2)
    if doctor == "lost":
        allocator.areas[0].free.pop()
    elif doctor == "twice":
        allocator.areas[0].free.append(allocator.areas[0].free[0])
    else:
        allocator.areas[0].free[0] = held[0]
    with pytest.raises(CacheInvariantError, match="free list"):
        allocator.check(held)


@given(st.lists(st.tuples(st.sampled_from("ars"), st.integers(0, 6)), max_size=60))
def test_counts_agree_with_a_plain_dict_over_any_history(steps: list[tuple[str, int]]) -> None:
    allocator, model = PageAllocator(6), dict.fromkeys(range(6), 0)
    for verb, n in steps:
        held = [page for page, count in model.items() if count]
        if verb == "a" and n <= 6 - len(held):
            pages = allocator.allocate(n)
            assert len(set(pages)) == n
            assert not set(pages) & set(held)
            model.update(dict.fromkeys(pages, 1))
        elif verb == "a":
            with pytest.raises(CacheFull):
                allocator.allocate(n)
        elif held:
            page = held[n % len(held)]
            (allocator.retain if verb == "r" else allocator.release)([page])
            model[page] += 1 if verb == "r" else -1
        allocator.check(page for page, count in model.items() for _ in range(count))
        assert allocator.num_free == sum(count == 0 for count in model.values())
        assert [allocator.references(page) for page in range(6)] == list(model.values())
