"""Pictures of a plan: every series, the limit and where they meet, and names that can be read."""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from quire.analysis.catalogue import known_model
from quire.analysis.drawing import Scene, meet, spread
from quire.analysis.memory import Load, kv_layout, plan_memory
from quire.analysis.paint import write_picture
from quire.analysis.plan_figures import (
    Case,
    Limit,
    context_capacity,
    growth_over_context,
    request_capacity,
)
from quire.analysis.plan_scene import plan_picture
from quire.analysis.roofline_scene import Roof, Roofline, RooflinePoint
from quire.errors import ConfigError, QuireError

FORMATS = ("bf16", "int8", "int4")
CARD = Limit("a card <24 GB>", 24 * 10**9)
ROOFLINE = Roofline(
    (Roof("card", 160e12, 1e12),),
    (RooflinePoint("prefill", 480, 120e12, "compute"), RooflinePoint("decode", 1, 9e11, "memory")),
)


def case(name: str = "llama-3.1-8b", limit: Limit | None = CARD, formats=FORMATS) -> Case:
    return Case(known_model(name), formats, Load(8192, sequences=8), limit)


def picture(given: Case, counts=(1, 8), capacity=request_capacity) -> Scene:
    return plan_picture(growth_over_context(given, counts), capacity(given), ROOFLINE)


def page(scene: Scene, path: Path) -> tuple[str, ET.Element]:
    write_picture(scene, path / "a.html")
    text = (path / "a.html").read_text(encoding="utf-8")
    return text, ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_the_page_has_every_series_the_limit_and_all_panels(tmp_path: Path) -> None:
    text, svg = page(picture(case()), tmp_path)
    lines = [(e.get("class"), e.findtext("title") or "") for e in svg.iter("polyline")]
    for kind, count in (("solid", 1), ("dashed", 8)):
        for name, tone in zip(FORMATS, ("blue", "orange", "green"), strict=True):
            [title] = [t for c, t in lines if c == f"{kind} {tone}" and "tokens" in t]
            assert title.startswith(f"{count} × {name}: ")
    assert ("limit limit", "a card <24 GB>: 22.35 GiB") in lines
    words = {e.text for e in svg.iter("text")}
    assert {"a card <24 GB>: 22.35 GiB", "weights 14.96 GiB", "ridge 160 FLOP/byte"} <= words
    assert {"card: 160 TFLOP/s", "1 TB/s", "prefill", "decode", "128K", "16 GiB"} <= words
    axes = {e.text for e in svg.iter("text") if e.get("class") == "axis"}
    assert "arithmetic intensity, FLOP/byte" in axes
    assert "context of each request, tokens (logarithmic)" in axes
    assert len([e for e in svg.iter("rect") if (e.get("class") or "").startswith("bar ")]) == 3
    assert text.count("<table>") == 3
    for outside in ("http", "//", "src=", "href=", "url(", "<script", "$"):
        assert outside not in text


def test_marks_lie_on_the_limit_where_the_next_token_does_not_fit() -> None:
    given, counts = case(), (1, 8)
    growth = growth_over_context(given, counts)
    scene = plan_picture(growth)
    [limit] = [line for line in scene.lines if line.kind == "limit"]
    found = {mark.title: mark for mark in scene.marks}
    for count, name in itertools.product(counts, FORMATS):
        layout = kv_layout(given.shape, name)

        def total(tokens: int, layout=layout, count=count) -> int:
            return plan_memory(given.shape, layout, Load(tokens, sequences=count)).total

        low, high = 1, given.shape.max_position
        while low < high:  # by halves, without the search of the module
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle) <= CARD.bytes else (low, middle - 1)
        title = f"{count} × {name}: fits up to {low:,} tokens"
        assert (title in found) == (low < given.shape.max_position)
        if title in found:
            assert total(low) <= CARD.bytes < total(low + 1)
            assert found[title].y == limit.points[0][1]
            assert any(label.text == f"{low:,}" for label in scene.labels)
    assert len(found) == 5  # one int4 request fits with all of the model's context


def test_windows_flatten_growth_and_what_they_save_is_drawn() -> None:
    growth = growth_over_context(case("mistral-7b"), (1,))
    bf16 = dict(growth.lines[0].points)
    all_kept = dict(growth.unwindowed.points)  # type: ignore[union-attr]
    longest = growth.longest
    token = 32 * 8 * 128 * 2 * 2
    assert bf16[longest] - bf16[longest // 2] < 0.01 * token * longest / 2
    assert all_kept[longest] - all_kept[longest // 2] > token * longest / 2
    scene = plan_picture(growth)
    [ghost] = [line for line in scene.lines if line.kind == "ghost"]
    [line] = [line for line in scene.lines if line.kind == "solid" and line.tone == "blue"]
    assert ghost.points[-1][1] < line.points[-1][1]
    assert growth_over_context(case(), (1,)).unwindowed is None


@pytest.mark.parametrize(
    ("name", "limit", "counts"),
    [
        ("llama-3-8b", CARD, (1, 8)),
        ("llama-3.1-8b", CARD, (1, 8)),
        ("gemma-3-27b", Limit("H100", 80 * 10**9), (1, 8)),
        ("mistral-7b", CARD, (8,)),
        ("llama-3-70b", CARD, (1, 8)),
        ("gpt2", Limit("a laptop", 16 * 2**30), (1, 8)),
        ("llama-3-8b", None, (1,)),
    ],
)
def test_names_cover_no_other_and_all_lies_inside(name, limit, counts) -> None:
    given = case(name, limit)
    capacity = request_capacity(given) if limit else None
    scene = plan_picture(growth_over_context(given, counts), capacity, ROOFLINE)
    flat = [label for label in scene.labels if not label.turned]
    for a, b in itertools.combinations(flat, 2):
        assert not meet(a.box, b.box), (a, b)
    for label in flat:
        left, top, right, bottom = label.box
        ticks = label.kind in ("tick", "title", "note")  # letters of other sizes
        assert ticks or (left >= 0 and right <= scene.size[0]), label
        assert top >= 0
        assert bottom <= scene.size[1]
    points = [point for line in scene.lines for point in line.points]
    assert all(0 <= x <= scene.size[0] and 0 <= y <= scene.size[1] for x, y in points)


def test_a_limit_far_above_is_said_not_drawn_to_scale() -> None:
    given = case("gpt2", Limit("a laptop", 64 * 2**30))
    scene = plan_picture(growth_over_context(given, (1,)))
    [text] = [label.text for label in scene.labels if label.tone == "limit"]
    assert text.startswith("↑ a laptop: 64 GiB, ")
    assert not [line for line in scene.lines if line.kind == "limit"]


def test_bars_are_as_long_as_what_fits_and_say_it() -> None:
    for ask, limit in ((request_capacity, CARD), (context_capacity, CARD)):
        given = case(limit=limit)
        capacity = ask(given)
        scene = plan_picture(growth_over_context(given, (8,)), capacity)
        bars = [bar for bar in scene.bars if bar.kind == "bar"]
        for bar, each in zip(bars, capacity.bars, strict=True):
            assert bar.title.startswith(f"{each.name}: {each.most:,}")
            wide = (bar.box[2] - bar.box[0]) / (bars[0].box[2] - bars[0].box[0])
            assert wide == pytest.approx(each.most / capacity.bars[0].most)
    with pytest.raises(ConfigError, match="give a limit"):
        request_capacity(replace(given, limit=None))


def test_formats_of_the_same_size_are_one_line() -> None:
    scene = plan_picture(growth_over_context(case(formats=("int8", "fp8")), (1,)))
    [line] = [line for line in scene.lines if line.kind == "solid"]
    assert line.title.startswith("int8, fp8: ")


def test_roofs_and_points_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ConfigError, match="both must be above 0"):
        Roof("card", 0, 1e12)
    with pytest.raises(ConfigError, match="both must be above 0"):
        RooflinePoint("step", 1, 0, "memory")
    with pytest.raises(ConfigError, match="at least one roof"):
        Roofline((), ())


def test_names_are_spread_about_where_they_are_wanted() -> None:
    assert spread([5, 50], 10, 0, 100) == [5, 50]
    assert spread([52, 50], 10, 0, 100) == [56, 46]
    assert spread([99, 98, 97], 10, 0, 100) == [100, 90, 80]
    assert spread([1, 2], 10, 0, 100) == [0, 10]
    assert spread([], 10, 0, 100) == []


def test_files_are_written_or_refused(tmp_path: Path) -> None:
    scene = picture(case())
    with pytest.raises(QuireError, match=r"neither a \.png nor a \.html"):
        write_picture(scene, tmp_path / "a.pdf")
    with pytest.raises(QuireError, match="is not a directory"):
        write_picture(scene, tmp_path / "none" / "a.html")
    pytest.importorskip("matplotlib")
    write_picture(scene, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == tuple(int(1.6 * side) for side in scene.size)
