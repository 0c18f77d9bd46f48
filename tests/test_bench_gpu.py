"""bench/gpu.py: every part runs, at tiny shapes under the interpreter, and says what it should."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu
import gpu_roofline
import gpu_tune
from gpu_rows import Row, failed, read_report, summary, table_line, write_report

BENCH = Path(__file__).parents[1] / "bench"
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "triton"))
needs_triton = pytest.mark.skipif(not INSTALLED, reason="the extra cuda is not installed")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra bench is not installed"
)


# -- rows ----------------------------------------------------------------------------------------


def test_a_ratio_is_held_to_what_is_asked_of_it() -> None:
    row = Row("decode", "8 x 8192", 3.0, "tokens/s", ratio=0.85, at_least=0.85)
    assert row.holds is True
    assert replace(row, ratio=0.84).holds is False
    assert replace(row, ratio=None).holds is None
    assert replace(row, at_least=None).holds is None
    assert replace(row, at_least=None, at_most=0.8).holds is False
    assert "MISSED" in table_line(replace(row, ratio=0.84))
    assert "failed: no reason" in table_line(failed("decode", "all of it", "no reason"))


def test_spread_is_half_of_greatest_less_least() -> None:
    assert summary([2.0, 4.0, 5.0]) == (4.0, 0.375)


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [Row("decode", "a", 1.5, "ms", ratio=2.0, at_most=1.0), failed("step", "b", "no")]
    write_report(tmp_path / "gpu.json", {"card": "x"}, rows)
    assert read_report(tmp_path / "gpu.json") == ({"card": "x"}, rows)
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


# -- modules -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed"
)
def test_transformers_takes_no_file_of_the_benchmarks_for_a_package_it_looks_for() -> None:
    """It imports ``kernels``, say, if there is one; a script's folder is searched first."""
    code = (
        "import sys; from transformers import LlamaForCausalLM\n"
        "files = {str(getattr(module, '__file__', '')) for module in sys.modules.values()}\n"
        "print([file for file in files if file.startswith(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCH)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(BENCH)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


# -- parts ---------------------------------------------------------------------------------------


class OneThatFails:
    """A model whose continuous batching fails when it has its own attention and nothing else."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def generate_batch(self, *args: Any, **named: Any) -> None:
        self.set_attn_implementation("paged|sdpa")
        raise MemoryError

    def destroy_cached_continuous_batching_manager(self) -> None:
        pass


@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed"
)
def test_continuous_batching_that_fails_leaves_the_model_to_the_static_cache() -> None:
    import gpu_transformers

    setting, model = SimpleNamespace(kind="cuda"), OneThatFails()
    contest: Any = SimpleNamespace(setting=setting, new=3, prompts=lambda *_: [[1, 2]])
    with pytest.raises(MemoryError):
        gpu_transformers._continuous(model, contest, 1)
    assert model.config._attn_implementation == "sdpa"


@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed"
)
def test_parts_run_dry_on_a_cpu(tmp_path: Path) -> None:
    file, parts = tmp_path / "gpu.json", {"ceilings", "transformers"}
    command = [sys.executable, BENCH / "gpu.py", "--dry", "--only", ",".join(parts), "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    about, rows = read_report(file)
    assert not [row for row in rows if row.note.startswith(("failed", "skipped"))]
    assert {row.part for row in rows} == parts == set(about["parts"])
    assert about["card"].startswith("none")
    assert all(table_line(row) in done.stdout for row in rows)


@needs_triton
def test_the_other_parts_run_dry_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One in software; transformers and cuDNN would need one that torch was built for."""
    file, parts = tmp_path / "gpu.json", set(gpu.PARTS) - {"transformers"}
    monkeypatch.setattr(gpu, "WORKER", Path(__file__).with_name("card_worker.py"))
    command = ["gpu.py", "--dry", "--only", ",".join(sorted(parts)), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    about, rows = read_report(file)
    failures = [
        row.case for row in rows if row.note.startswith(("failed", "skipped", "not stored"))
    ]
    assert failures == ["torch's SDPA, cuDNN"]
    assert {row.part for row in rows} == parts == set(about["parts"])
    assert about["card"] == "a card in software"
    agree = {(row.part, row.case): row for row in rows if row.at_most == 2.0}
    assert len(agree) == 5  # three page formats, prefill, the streamed model's logits
    assert all(row.holds for row in agree.values()), agree
    said = capsys.readouterr().out
    for row in rows:
        assert row.value is None or row.value > 0
        assert table_line(row) in said
    formats = {row.case.rsplit(", ")[-1] for row in rows if row.part == "decode" and row.value}
    assert formats == {"bf16", "int8", "int4"}
    assert sum("peak memory" in row.case for row in rows) == 2
    assert set(gpu_roofline.points_of(rows)) == set(gpu_roofline.SERIES)


@needs_triton
def test_the_tuner_runs_dry(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    command = [sys.executable, BENCH / "gpu_tune.py", "--dry", "--json", file, "--only", "bf16"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    about, rows = read_report(file)
    assert about["card"].startswith("none")
    assert not [row for row in rows if row.note.startswith(("failed", "skipped"))]
    best = [row.case for row in rows if row.case.endswith("best")]
    assert best == ["bf16 x 16, best"] * 2  # decode, prefill
    tried = {row.case.split(", ")[1].split(" rows")[0] for row in rows if row.value and row.ratio}
    assert "present" in tried
    assert len(tried) > 1


def test_tiles_to_try_are_a_bounded_list_and_packed_keys_come_a_group_at_a_time() -> None:
    names = [(t.kind, t.format) for t in gpu_tune.trials((128,), set())]
    assert len(names) == len(set(names)) == 8
    for trial in gpu_tune.trials((128, 64), set()):
        tiles = gpu_tune.tiles_to_try(trial, 14)
        assert 1 < len(tiles) == len(set(tiles)) <= 14
        assert trial.format not in ("int4", "int2") or {keys for _, keys, *_ in tiles} == {32}


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, BENCH / "gpu.py", "--only", "decoder"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no part 'decoder'; choose among ceilings, decode" in done.stderr


WORKER = """
import json, os, sys, time
print(json.dumps({"about": {"card": "fake"}}), flush=True)
print(json.dumps({"row": {"part": sys.argv[1], "case": "one", "value": 1.0}}), flush=True)
BODY
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('an illegal address')", "an illegal address (exit 1)"),
        ("time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_a_part_that_breaks_or_hangs_leaves_its_rows_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    worker, file = tmp_path / "worker.py", tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "WORKER", worker)
    report, start = gpu.Report(file), time.monotonic()
    for text, part in ((body, "decode"), ("print(json.dumps({'done': True, 'late': 3}))", "step")):
        worker.write_text(WORKER.replace("BODY", text), encoding="utf-8")
        gpu.run_part(part, "full", tmp_path, 1.0 if text == body else 30.0, report)
    assert time.monotonic() - start < 30
    about, rows = read_report(file)
    assert [(row.part, row.case) for row in rows] == [
        ("decode", "one"),
        ("decode", "all of it"),
        ("step", "one"),
    ]
    assert rows[1].note.startswith("failed: ")
    assert said in rows[1].note
    assert about["parts"]["step"]["late"] == 3


@needs_triton
def test_a_sample_that_holds_the_hosts_time_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu_timing import Stopwatch

    passed = iter([True, True, False])  # had the device come to the call before it was queued?

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def query(self) -> bool:
            return next(passed)

        def elapsed_time(self, end: object) -> float:
            return 7.0  # milliseconds

        record = synchronize = lambda self: None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch, calls = Stopwatch("cpu"), list[int]()
    watch.kind = "cuda"
    assert watch.sample(lambda: calls.append(watch._flushes)) == 0.007
    assert calls == [4, 4, 8, 16]  # the first is not timed
    assert (watch.late, list(passed)) == (0, [])


# -- arithmetic ----------------------------------------------------------------------------------


@needs_triton
def test_time_in_kernels_counts_what_runs_side_by_side_once() -> None:
    from gpu_steps import busy

    def event(start: float, length: float, kind: str) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "ts": start, "dur": length}

    trace = [event(10, 5, "kernel"), event(0, 4, "kernel"), event(12, 6, "kernel")]
    trace += [event(13, 1, "kernel"), event(30, 9, "gpu_memcpy"), {"ph": "M"}]
    assert busy(trace, ["kernel"]) == pytest.approx(12e-6)
    assert busy(trace, ["kernel", "gpu_memcpy"]) == pytest.approx(21e-6)
    assert busy([], ["kernel"]) == 0


@needs_triton
def test_the_error_of_plain_arithmetic_is_one_of_itself() -> None:
    import torch
    from gpu_attention import error_ratio

    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 4, 8), torch.randn(2, 20, 2, 8).double()
    seen = [slice(0, 20 - 2 + row) for row in range(3)]
    out = []
    for row, places in enumerate(seen):
        for head in range(4):
            scores = key[places, head // 2] @ query[row, head].bfloat16().double() / 8**0.5
            weights = torch.softmax(scores, 0).bfloat16().double()
            out.append(weights @ value[places, head // 2])
    mixed = torch.stack(out).reshape(3, 32)
    assert error_ratio(mixed, query, key, value) == pytest.approx(1.0)


@needs_triton
def test_the_loop_over_pages_computes_what_attention_is(tmp_path: Path) -> None:
    """Against transformers in float64, in one go and token by token."""
    transformers = pytest.importorskip("transformers")
    import torch
    from gpu_baseline import PageLoop
    from gpu_checkpoints import TINY, checkpoint

    directory = checkpoint(tmp_path, TINY, "float32", "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    tokens = np.random.default_rng(0).integers(0, TINY.vocabulary, 23).tolist()
    with torch.inference_mode():
        law = model(torch.tensor([tokens])).logits[0]
    loop = PageLoop(directory, 8, "cpu", torch.float64)
    # Angles are float32 in both; the rest is float64 there and here.
    bound = 1e-5 * float(law.abs().max())
    assert float((loop.forward(tokens, slice(None)) - law).abs().max()) < bound
    loop.forget()
    parts = [loop.forward(tokens[:9], slice(None))]
    parts += [loop.forward([token]) for token in tokens[9:]]
    assert float((torch.cat(parts) - law).abs().max()) < bound


# -- the picture ---------------------------------------------------------------------------------


def made_up() -> tuple[dict[str, Any], list[Row]]:
    """A card that copies 4 TB/s and multiplies 800 TF/s."""
    rows = [
        Row("ceilings", "copy", 4000.0, "GB/s", seconds=1.0),
        Row("ceilings", "product", 800.0, "TF/s", seconds=1.0),
    ]
    for name, size, share in (("bf16", 2.0, 0.9), ("int8", 1.03, 0.85), ("int4", 0.6, 0.75)):
        for tokens in (8 * 8192, 64 * 32_768):
            moved, flops = tokens * 2048 * size, tokens * 4.0 * 32 * 128
            seconds = moved / (share * 4e12)
            case = f"{tokens}, {name}"
            rows.append(Row("decode", case, seconds=seconds, flops=flops, bytes=moved))
    rows.append(Row("prefill", "8192, ours", seconds=1e-3, flops=5.5e11, bytes=3e8))
    rows.append(Row("prefill", "8192, SDPA flash", seconds=1e-3, flops=5.5e11))
    for count in (1, 64, 4096):
        flops, moved = 2.0 * count * 8192 * 2048, 2.0 * 8192 * 2048 + 4.0 * count * 10_240
        seconds = max(flops / 6e14, moved / 3.4e12)
        rows.append(Row("linear", f"{count}, bf16", seconds=seconds, flops=flops, bytes=moved))
    return {"card": "a card that is not there", "torch": "2", "date": "2000-01-01T00:00"}, rows


def test_points_are_operations_a_byte_and_a_second() -> None:
    _, rows = made_up()
    assert gpu_roofline.ceilings_of(rows) == (4e12, 8e14)
    points = gpu_roofline.points_of([*rows, failed("decode", "16 x 8192, bf16", "no")])
    assert list(points) == list(gpu_roofline.SERIES)
    assert points["prefill attention"] == [(5.5e11 / 3e8, 5.5e14)]
    assert points["decode, bf16 pages"][0] == pytest.approx((4.0, 4.0 * 0.9 * 4e12))
    with pytest.raises(SystemExit, match="no ceiling in GB/s"):
        gpu_roofline.ceilings_of([row for row in rows if row.unit != "GB/s"])


@needs_matplotlib
def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    about, rows = made_up()
    report, picture = tmp_path / "gpu.json", tmp_path / "roofline.png"
    write_report(report, about, rows)
    command = [sys.executable, BENCH / "gpu_roofline.py", report, picture]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture.read_bytes()[at : at + 4]) for at in (16, 20))
    assert (width, height) == (8 * gpu_roofline.DPI, 5.2 * gpu_roofline.DPI)
    assert json.loads(report.read_text(encoding="utf-8"))["rows"]
