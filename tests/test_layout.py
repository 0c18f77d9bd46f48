"""The plan in bytes and pages: groups, windows, bounds and budgets, against brute force."""

from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caches import HEADS, Windows, layout_of
from quire.config import ModelConfig
from quire.errors import ConfigError
from quire.layout import CacheLayout, LayerGroup, cache_layout, fit_pages, pages_for
from quire.pages import PAGE_FORMATS, PageShape

BF16 = (PAGE_FORMATS["bf16"], PAGE_FORMATS["bf16"])


def model(windows: Windows) -> ModelConfig:
    return ModelConfig(
        architecture="Test",
        vocab_size=10,
        hidden_size=24,
        intermediate_size=8,
        num_layers=len(windows),
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        max_position=64,
        windows=windows,
        norm_eps=1e-5,
        activation="silu",
        rope=None,
    )


def test_pages_for_counts_unfinished_pages() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16])
def test_first_needed_is_the_first_position_in_the_window(window: int | None) -> None:
    group = LayerGroup((0,), window)
    for length in range(40):
        seen = [p for p in range(length + 1) if window is None or length - p < window]
        assert group.first_needed(length) == seen[0]


def held_at_once(window: int | None, before: int, chunk: int, size: int) -> int:
    """Pages of a sequence of ``before`` tokens while ``chunk`` are added."""
    first = 0 if window is None else max(0, before - window + 1)  # what the first of them sees
    return sum((page + 1) * size > first for page in range(-(-(before + chunk) // size)))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize("size", [1, 3, 8, 80])
def test_most_pages_is_the_peak_of_growing_by_chunks(window: int | None, size: int) -> None:
    group = LayerGroup((0,), window)
    for chunk, tokens in product([1, 2, 3, 5, 9, 16], [*range(1, 20), 80]):
        peak = max(
            held_at_once(window, before, part, size)
            for before in range(tokens)
            for part in range(1, min(chunk, tokens - before) + 1)
        )
        most = group.most_pages(tokens, chunk, size)
        assert peak <= most <= -(-tokens // size)
        if tokens == 80:  # long enough to meet every alignment: the bound is reached
            assert peak == most


def test_layers_with_the_same_window_share_a_group() -> None:
    layout = cache_layout(model((None, 8, None, 4, 8)), 16, [BF16] * 5)
    assert layout.groups == (
        LayerGroup((0, 2), None),
        LayerGroup((1, 4), 8),
        LayerGroup((3,), 4),
    )
    assert layout.group_of_layer == (0, 1, 0, 2, 1)
    assert layout.shapes == (PageShape(16, 3, 4, 4, *BF16),) * 5


def test_bytes_of_a_group_are_those_of_its_layers() -> None:
    layout = cache_layout(model((None, 8, None)), 16, [BF16] * 3)
    token = 3 * (4 + 4) * 2  # heads, K and V of 4 numbers, 2 bytes
    assert [layout.token_bytes(g) for g in (0, 1)] == [2 * token, token]
    assert [layout.page_bytes(g) for g in (0, 1)] == [2 * 16 * token, 16 * token]


def test_layers_of_different_shapes_are_added_up() -> None:
    wide = PageShape(4, 2, 8, 6, *[PAGE_FORMATS["fp32"]] * 2)
    narrow = PageShape(4, 1, 3, 5, *[PAGE_FORMATS["fp16"]] * 2)
    layout = CacheLayout(4, (LayerGroup((0, 1), None),), (wide, narrow))
    assert layout.token_bytes(0) == 2 * 14 * 4 + 8 * 2
    assert layout.page_bytes(0) == 4 * (2 * 14 * 4 + 8 * 2)


@pytest.mark.parametrize(("window", "name"), [(None, "full attention"), (9, "sliding window 9")])
def test_a_group_has_a_name_for_messages(window: int | None, name: str) -> None:
    assert LayerGroup((0,), window).name() == name


# -- fit_pages -------------------------------------------------------------------------------


def bytes_of(layout: CacheLayout, pages: tuple[int, ...]) -> int:
    return sum(n * layout.page_bytes(g) for g, n in enumerate(pages))


@given(st.integers(1, 20), st.integers(0, 10**6))
def test_one_full_group_gets_all_pages_that_fit(size: int, extra: int) -> None:
    layout = layout_of(size, (None, None))
    page = 2 * size * HEADS * 5 * 4
    (pages,) = fit_pages(layout, page + extra, 4, 64)
    assert pages * page <= page + extra < (pages + 1) * page


@given(
    windows=st.sampled_from([(4,), (9, 9), (4, 9), (4, 9, 9, 9)]),
    size=st.sampled_from([1, 4, 16]),
    extra=st.integers(0, 10**5),
)
def test_groups_with_windows_only_share_evenly(windows: Windows, size: int, extra: int) -> None:
    layout = layout_of(size, windows)
    one_each = bytes_of(layout, (1,) * len(layout.groups))
    pages = fit_pages(layout, one_each + extra, 4, 64)
    assert len(set(pages)) == 1
    assert bytes_of(layout, pages) <= one_each + extra < bytes_of(layout, pages) + one_each


@given(
    windows=st.sampled_from([(None, 4), (9, None, None), (None, 4, 9), (4, 4, 4, None)]),
    size=st.sampled_from([1, 4, 16]),
    extra=st.integers(0, 10**5),
    sequences=st.integers(1, 5),
    batch=st.integers(1, 40),
)
def test_a_mixed_model_stays_in_budget_and_wastes_less_than_a_page_of_each(
    windows: Windows, size: int, extra: int, sequences: int, batch: int
) -> None:
    layout = layout_of(size, windows)
    full = (windows.index(None) and 1) or 0
    one_each = bytes_of(layout, (1,) * len(layout.groups))
    pages = fit_pages(layout, one_each + extra, sequences, batch)
    assert min(pages) >= 1
    assert bytes_of(layout, pages) <= one_each + extra
    # One more page of the full group, and of each window that keeps pace with it, is too many.
    more = tuple(n + (n == pages[full]) for n in pages)
    assert bytes_of(layout, more) > one_each + extra
    assert all(n <= pages[full] for n in pages)
    # With ten times the budget, a window that fell behind gets not one page more.
    richer = fit_pages(layout, 10 * (one_each + extra), sequences, batch)
    behind = [g for g, n in enumerate(pages) if n < pages[full]]
    assert [richer[g] for g in behind] == [pages[g] for g in behind]


def most_pages_of_all(window: int, size: int, sequences: int, batch: int) -> int:
    """Pages that ``sequences`` hold at worst while one step adds ``batch`` tokens to them."""
    # For each share of a step, the worst place to be; shares of nothing hold what is at rest.
    start = window + size
    worst = [
        max(held_at_once(window, n, share, size) for n in range(start, start + size))
        for share in range(batch + 1)
    ]

    @cache
    def most(left: int, sequences: int) -> int:
        if sequences == 0:
            return 0
        return max(worst[n] + most(left - n, sequences - 1) for n in range(left + 1))

    return most(batch, sequences)


windows_and_sizes = pytest.mark.parametrize(
    ("window", "size"), list(product([1, 4, 7, 8, 15], [1, 4, 8]))
)


@windows_and_sizes
def test_a_window_gets_no_more_pages_than_all_sequences_can_hold(window: int, size: int) -> None:
    for batch, sequences in product([1, 5, 24], [1, 3, 6]):
        pages = fit_pages(layout_of(size, (None, window)), 10**9, sequences, batch)
        assert pages[1] <= most_pages_of_all(window, size, sequences, batch)


@windows_and_sizes
def test_a_window_gets_all_pages_that_a_step_can_need(window: int, size: int) -> None:
    for batch, sequences in product([1, 5, 24], [1, 3, 6]):
        pages = fit_pages(layout_of(size, (None, window)), 10**9, sequences, batch)
        assert pages[1] >= most_pages_of_all(window, size, sequences, batch)


@pytest.mark.parametrize("windows", [(None,), (4,), (None, 4, 4)], ids=str)
def test_a_budget_below_one_page_is_refused_with_the_numbers(windows: Windows) -> None:
    layout = layout_of(16, windows)
    need = len(windows) * 16 * HEADS * 5 * 4
    assert fit_pages(layout, need, 4, 64) == (1,) * len(layout.groups)
    expected = rf"\({need - 1} bytes\) is below one page: 16 tokens in {len(windows)} layers"
    with pytest.raises(ConfigError, match=rf"{expected} take .* \({need} bytes\)"):
        fit_pages(layout, need - 1, 4, 64)
