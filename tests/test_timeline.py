"""Points of a long run, and times by rank."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from quire.analysis.replayed import Times
from quire.analysis.timeline import Moment, Timeline


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(0, 9)), max_size=60))
def test_points_hold_the_most_of_their_bins(states: list[tuple[int, int, int]]) -> None:
    """Whole seconds and eight bins, so that bins end where they are said to, without rounding."""
    timeline, now, spans = Timeline(8), 0, []
    for lasts, held, waiting in states:
        moment = Moment(now, held, 0, 5 - held, 0, held, waiting)
        timeline.add(moment, now + lasts)
        spans.append((now, now + lasts, moment))
        now += lasts
    points = timeline.points()
    assert len(points) <= 8
    assert bool(points) == bool(states)
    if len(points) < 2:
        return
    width = points[1].seconds - points[0].seconds
    assert points[-1].seconds < now <= points[-1].seconds + width
    for point in points:
        there = [
            moment
            for start, end, moment in spans
            if start < point.seconds + width and end > point.seconds
        ]
        assert point.held_bytes == max(moment.held_bytes for moment in there)
        assert point.waiting == max(moment.waiting for moment in there)
        assert point.held_bytes + point.cached_bytes == 5


def test_a_moment_that_takes_no_time_is_in_the_points() -> None:
    timeline = Timeline(4)
    for start, end, held in [(5, 5, 1), (5, 5, 3), (5, 9, 2), (9, 9, 4), (9, 13, 1)]:
        timeline.add(Moment(start, held, 0, 0, 0, held, 0), end)
    held_most = [point.held_bytes for point in timeline.points()]
    assert (held_most[0], max(held_most), held_most[-1]) == (3, 4, 1)


def test_points_of_a_long_run_are_at_least_half_of_the_most() -> None:
    timeline = Timeline()
    for start, end in itertools.pairwise(range(100_000)):
        timeline.add(Moment(start, start, 0, 0, 0, 1, 0), end)
    points = timeline.points()
    assert 256 <= len(points) <= 512
    assert [p.held_bytes for p in points] == sorted(p.held_bytes for p in points)
    assert points[-1].held_bytes == 99_998


def test_times_are_of_the_nearest_rank() -> None:
    assert Times.of([]) is None
    assert Times.of([3.0]) == Times(3.0, 3.0, 3.0)
    assert Times.of([float(at) for at in range(100, 0, -1)]) == Times(50.0, 90.0, 99.0)
    assert Times.of([1.0, 2.0, 3.0]) == Times(2.0, 3.0, 3.0)
