"""The Pareto picture: laid out so that it can be read, and written as valid files."""

import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quire.analysis.picture import draw, require_drawable
from quire.analysis.quality import Report
from quire.analysis.scene import HEIGHT, LETTER, WIDTH, Scene, scene_of
from quire.errors import QuireError
from test_measure_losses import made

MANY = [
    *(made("fp32", 4096, -0.00002, 0.0002), made("fp16", 2048, 0.00001, 0.0002)),
    *(made("fp8", 1056, 0.004, 0.0004), made("int8", 1056, 0.0003, 0.0002)),
    *(made("k=int8,v=int4", 832, 0.003, 0.0005), made("int4", 640, 0.009, 0.001)),
    *(made("int4, rotated", 660, 0.0095, 0.001), made("int2", 384, 0.31, 0.02)),
    *(made("int8 + snapkv:25%", 264, 0.4, 0.02), made("bf16 + h2o:25%", 512, 0.35, 0.02)),
    *(made("bf16 + window:25%", 512, 0.55, 0.02), made("bf16 + <tag> & more", 512, 0.33, 0.02)),
]


def report(*measured: object) -> Report:
    found = tuple((each.setting, each) for each in measured)  # type: ignore[attr-defined]
    return Report(2048, 60_000, made("bf16", 2048, 0.0), found, None)  # type: ignore[arg-type]


def scene() -> Scene:
    return scene_of(report(*MANY), "quill")


def test_all_lies_inside_the_picture() -> None:
    drawn = scene()
    points = [point for line in drawn.lines for point in line.points]
    points += [(mark.x, mark.y) for mark in drawn.marks]
    points += [(label.x, label.y) for label in drawn.labels]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_names_cover_neither_each_other_nor_marks() -> None:
    drawn = scene()
    names = [label for label in drawn.labels if label.kind == "name"]
    assert len(names) == len(MANY) + 1
    boxes = [(n.x, n.y - 10, n.x + LETTER * len(n.text), n.y + 3) for n in names]
    boxes += [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in drawn.marks]
    for a, b in itertools.combinations(boxes, 2):
        touch = a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        both_marks = a[2] - a[0] == b[2] - b[0] == 10
        assert both_marks or not touch, (a, b)


def test_names_of_marks_at_one_place_stay_near_it() -> None:
    pair = [made(f"{name} + window:budget=512", 326, 0.06, 0.05) for name in ("int8", "fp8")]
    drawn = scene_of(report(*pair, made("int8", 1056, 0.0), made("x", 326, 0.22, 0.07)), "quill")
    mark = next(mark for mark in drawn.marks if mark.title.startswith("int8 + window"))
    for each in pair:
        [name] = [label for label in drawn.labels if label.text == each.setting.name]
        assert abs(name.y - mark.y) < 40


def test_a_candidate_that_is_the_exact_cache_has_no_mark_of_its_own() -> None:
    marks = scene_of(report(made("bf16", 2048, 0.0), made("int8", 1056, 0.0)), "quill").marks
    assert [mark.kind for mark in marks] == ["front", "exact"]


def test_memory_grows_to_the_right_and_loss_upwards() -> None:
    marks = {mark.title.split(":")[0]: mark for mark in scene().marks}
    assert marks["int2"].x < marks["int4"].x < marks["int8"].x < marks["fp32"].x
    assert marks["int2"].y < marks["int4"].y < marks["int8"].y < marks["fp32"].y
    assert marks["int8"].kind == "front"
    assert marks["fp8"].kind == "beaten"
    assert marks["bf16"].kind == "exact"


def test_axes_have_units_and_the_front_is_drawn_from_left_to_right() -> None:
    drawn = scene()
    ticks = {label.text for label in drawn.labels if label.kind == "tick"}
    assert {"0", "+0.1 %", "+100 %", "512 B", "2 KiB"} <= ticks
    axes = {label.text for label in drawn.labels if label.kind == "axis"}
    assert axes == {
        "bytes of keys and values a token",
        "change of perplexity against the exact cache",
    }
    [front] = [line for line in drawn.lines if line.kind == "front"]
    xs = [x for x, _ in front.points]
    assert xs == sorted(xs)
    assert len(xs) == 7


def test_one_candidate_and_none_that_loses_can_be_drawn(tmp_path: Path) -> None:
    for alone in (made("fp16", 2048, 0.0), made("int2", 256, 900.0), made("x", 256, -0.9)):
        draw(report(alone), "quill", tmp_path / "one.html")


class Checker(HTMLParser):
    """Counts elements, and that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    draw(report(*MANY), "quill <1>", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen.count("circle") == len(MANY)
    assert checker.seen.count("title") == 1 + len(MANY) + 1  # the page's, and one for each mark
    assert checker.seen.count("tr") == 1 + 1 + len(MANY)
    for outside in ("http", "//", "src=", "href=", "@import", "url(", "<script"):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    assert "quill &lt;1&gt;" in page
    assert "bf16 + &lt;tag&gt; &amp; more" in page
    assert not re.search(r"\bnan\b|\binf\b|\$", page)


def test_the_same_report_draws_the_same_files(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        draw(report(*MANY), "quill", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_png_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.PNG"):
        draw(report(*MANY), "quill", tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (data[12:16], data[-8:-4]) == (b"IHDR", b"IEND")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1.6 * WIDTH, 1.6 * HEIGHT)
    assert data == (tmp_path / "b.PNG").read_bytes()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QuireError, match=r"pip install 'quire\[bench\]', or draw an \.html"):
        require_drawable(tmp_path / "a.png")
    require_drawable(tmp_path / "a.html")


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(QuireError, match=r"neither a \.png nor a \.html"):
        require_drawable(tmp_path / "a.pdf")
    with pytest.raises(QuireError, match="is not a directory"):
        require_drawable(tmp_path / "none" / "a.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(QuireError, match="cannot be written: Is a directory"):
        draw(report(*MANY), "quill", tmp_path / "taken.html")
