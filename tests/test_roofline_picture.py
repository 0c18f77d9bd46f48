"""The roofline picture: points lie where their times say, and files are valid."""

import itertools
from pathlib import Path

import pytest

from quire.analysis.catalogue import known_model
from quire.analysis.drawing import HEIGHT, LETTER, WIDTH, Scene
from quire.analysis.hardware import known_hardware
from quire.analysis.roofline import Roof
from quire.analysis.roofline_scene import draw_roofline, roofline_scene, workload_points
from quire.analysis.steps import deploy
from quire.errors import ConfigError, QuireError

CASES = [
    ("llama-3.1-8b", "h100"),
    ("qwen3-0.6b", "ddr5-5600-dual-16gb"),
    ("deepseek-v3", "mi300x"),
    ("gpt2", "t4"),
    ("llama-3.2-3b", "m2-max-64gb"),
]


def scene(model: str, device: str) -> Scene:
    hardware = known_hardware(device)
    points = workload_points(deploy(known_model(model)), Roof(hardware), 1024)
    return roofline_scene(hardware, points, model)


@pytest.mark.parametrize(("model", "device"), CASES)
def test_all_lies_inside_and_no_step_above_the_roof(model: str, device: str) -> None:
    drawn = scene(model, device)
    points = [point for line in drawn.lines for point in line.points]
    points += [(each.x, each.y) for each in (*drawn.marks, *drawn.labels)]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    roofs = [line.points for line in drawn.lines if line.kind == "roof"]
    (x0, y0), (x1, y1) = roofs[0]  # the slope of the memory
    for mark in drawn.marks:
        on_slope = y0 + (mark.x - x0) / (x1 - x0) * (y1 - y0)
        assert mark.y >= on_slope - 1e-6
        assert mark.y >= min(y for line in roofs for _, y in line) - 1e-6


@pytest.mark.parametrize(("model", "device"), CASES)
def test_names_cover_neither_each_other_nor_marks_nor_names_of_roofs(
    model: str, device: str
) -> None:
    drawn = scene(model, device)
    names = [label for label in drawn.labels if label.kind == "name"]
    assert len(names) == len(drawn.marks) == 4
    boxes = [(n.x, n.y - 10, n.x + LETTER * len(n.text), n.y + 3) for n in names]
    roofs = [label for label in drawn.labels if "FLOP/s" in label.text and label.kind == "tick"]
    assert roofs
    boxes += [(n.x - LETTER * len(n.text), n.y - 10, n.x, n.y + 3) for n in roofs]
    for a, b in itertools.combinations(boxes, 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)
    for box, mark in itertools.product(boxes, drawn.marks):
        assert not (box[0] < mark.x < box[2] and box[1] < mark.y < box[3])


def test_more_sequences_lie_further_right_and_higher() -> None:
    one, eight, many, prefill = scene("llama-3.1-8b", "h100").marks
    assert one.x < eight.x < many.x < prefill.x
    assert one.y > eight.y > many.y > prefill.y
    assert (one.kind, prefill.kind) == ("decode", "prefill")


def test_files(tmp_path: Path) -> None:
    hardware = known_hardware("rtx-4090")
    points = workload_points(deploy(known_model("qwen3-4b")), Roof(hardware), 512)
    draw_roofline(hardware, points, "a <model> & more", tmp_path / "made.html")
    text = (tmp_path / "made.html").read_text(encoding="utf-8")
    assert "a &lt;model&gt; &amp; more on rtx-4090" in text
    assert text.count("<circle") == 4
    assert text.count("<tr>") == 5
    with pytest.raises(QuireError, match=r"neither a \.png nor a \.html"):
        draw_roofline(hardware, points, "x", tmp_path / "made.pdf")
    with pytest.raises(ConfigError, match="one point or more"):
        roofline_scene(hardware, [], "x")
    pytest.importorskip("matplotlib")
    draw_roofline(hardware, points, "x", tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
