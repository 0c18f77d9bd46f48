"""``quire plan`` as people and programs meet it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from checkpoints import tiny_config, write_checkpoint
from quire.analysis import calibrate
from quire.analysis.catalogue import known_model
from quire.analysis.hardware import known_hardware
from quire.analysis.memory import Load, kv_layout, plan_memory
from quire.cli.plan import plan
from quire.errors import QuireError

TRACE = Path(__file__).parent.parent / "examples" / "trace.jsonl"


def run(*args: str) -> str:
    done = CliRunner().invoke(plan, [*args], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def answer(*args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json"))
    return found


def test_llama_2_7b_on_a_card_by_hand() -> None:
    found = answer("llama-2-7b", "--hardware", "a100-80gb", "--context", "4096")
    assert found["kv_bytes_per_token"] == 512 << 10
    assert found["kv_bytes"] == 2 << 30
    assert found["weight_bytes"] == 2 * 6_738_415_616
    card = known_hardware("a100-80gb")
    # a step reads all weights but the embedding table, and 2 GiB of keys and values
    read = found["weight_bytes"] - 2 * 32000 * 4096 + (2 << 30)
    assert found["decode_tokens_per_s"] == pytest.approx(card.bandwidth / read, rel=0.01)
    flops = 2 * (6_738_415_616 - 2 * 32000 * 4096) * 4096 + 32 * 4 * 4096 * 4096 * 4097 // 2
    assert found["prefill_s"] == pytest.approx(flops / card.rate("fp16"), rel=0.02)
    assert found["max_context"] == 4096
    room = 0.95 * 80 * 2**30 - found["weight_bytes"]
    assert found["max_requests"] in (int(room / 2**31), int(room / 2**31) - 1)
    assert found["fits"] is True


def test_without_a_format_pages_are_of_the_checkpoints_dtype() -> None:
    found = answer("llama-3-8b", "--hardware", "h100")
    assert (found["kv_format"], found["kv_bytes_per_token"]) == ("bf16", 128 << 10)
    assert [row["kv_format"] for row in found["formats"]] == ["bf16", "int8", "int4"]
    ours = answer("llama-3-8b", "--hardware", "h100", "--kv-format", "int8")
    assert ours["kv_bytes_per_token"] == 2 * 32 * 8 * (128 + 2)


def test_numbers_are_those_of_the_modules() -> None:
    found = answer(
        *("gemma-3-27b", "--hardware", "h200", "--context", "32768", "--requests", "8"),
        *("--kv-format", "int4", "--weights", "int8", "--max-batch-tokens", "2048"),
    )
    shape = known_model("gemma-3-27b")
    layout, load = kv_layout(shape, "int4"), Load(32768, 8, 2048)
    made = plan_memory(shape, layout, load, "int8")
    assert (found["weight_bytes"], found["kv_bytes"]) == (made.weight_bytes, made.kv)
    assert found["requests"] == 8
    assert set(found["decode"]) == {"1", "8", "64"}


def test_quill_is_planned_where_no_model_is_named() -> None:
    assert answer("--hardware", "h100")["model"] == "quill"


def test_a_directory_is_planned_by_its_config_alone(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", tiny_config("llama"), dtype="bf16")
    (directory / "model.safetensors").unlink()
    found = answer(str(directory), "--hardware", "t4", "--context", "100")
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # fp32: config.json names no dtype
    assert any("names no dtype" in note for note in found["notes"])


def test_kv_by_layer_and_waste_by_length_are_told() -> None:
    found = answer("gemma-3-1b", "--hardware", "h100", "--context", "1000")
    layers = found["kv_bytes_per_token_by_layer"]
    assert layers == [2 * 256 * 2] * 26
    assert sum(layers) == found["kv_bytes_per_token"]
    lengths = range(1, 1001)
    empty = 1 - sum(lengths) / (1000 * 32768)
    assert found["waste"]["contiguous"] == pytest.approx(empty)
    pages = sum(-(-length // 16) * 16 for length in lengths)
    assert found["waste"]["paged"] == pytest.approx(1 - sum(lengths) / pages)


def test_config_of_a_hub_model_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    directory = write_checkpoint(tmp_path / "m", tiny_config("qwen2"), dtype="bf16")
    asked = []

    def download(name: str, file: str, *, local_files_only: bool) -> str:
        asked.append((name, file, local_files_only))
        if local_files_only:
            raise OSError("not cached")
        if name != "someone/model":
            raise OSError("no route to the hub")
        return str(directory / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = answer("someone/model", "--hardware", "h100", "--context", "64")
    assert found["model"] == "someone/model"
    assert asked == [("someone/model", "config.json", local) for local in (True, False)]
    with pytest.raises(QuireError, match=r"'nobody/model': .*OSError: no route to the hub"):
        run("nobody/model", "--hardware", "h100")


def test_tables_say_what_people_ask() -> None:
    said = run("mistral-7b", "--hardware", "rtx-4090", "--context", "32768")
    for text in (
        "mistral-7b: 7.242 B parameters, 32 layers, context 32,768, bf16",
        "windows hold at most 512 MiB a request",
        "fits, with",
        "requests of 32,768",
        "limited by",
        "linear layers are limited by computing from",
        "contiguous",
        "scores of a prefill, one layer: whole prompt: 128 GiB",
    ):
        assert text in said
    large = run("llama-3-70b", "--hardware", "rtx-4090")
    assert "does not fit: " in large


def test_devices_that_share_a_model_are_told_apart() -> None:
    found = answer(
        *("llama-3-70b", "--hardware", "h100", "--tensor-parallel", "4"),
        *("--pipeline-parallel", "2", "--context", "2048"),
    )
    assert len(found["split"]["stages"]) == 2
    assert found["split"]["stages"][0]["layers"] == 40
    assert found["split_decode"]["link_seconds"] > 0
    said = run("llama-3-70b", "--hardware", "h100", "--tensor-parallel", "4")
    assert "Each device of 4 x 1, h100-sxm" in said


def test_a_trace_is_replayed() -> None:
    found = answer("llama-3-8b", "--hardware", "h100", "--trace", str(TRACE))["trace"]
    arrivals = [json.loads(line) for line in TRACE.read_text().splitlines()]
    served = [a for a in arrivals if a["input_length"] + max(1, a["output_length"]) <= 8192]
    assert (found["requests"], found["refused"]) == (len(served), 64 - len(served))
    assert found["prompt_tokens"] == sum(a["input_length"] for a in served)
    assert 0 < found["hit_rate"] <= 1
    rates = [rate["hit_rate"] for rate in found["hit_rates"]["rates"]]
    assert rates == sorted(rates)
    said = run("llama-3-8b", "--hardware", "h100", "--trace", str(TRACE))
    assert "a cache that forgets nothing" in said
    assert "until the first token" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("lama-3-8b",), "no model 'lama-3-8b'.*did you mean 'llama-3-8b'"),
        (("llama-3-8b", "--hardware", "h10"), "no device 'h10'.*did you mean 'h100"),
        (("llama-3-8b", "--hardware", "h100", "--memory", "0"), "must be positive, not 0"),
        (
            ("llama-3-8b", "--hardware", "h100", "--context", "9000"),
            "a context of 9,000 tokens is past the 8,192 of llama-3-8b",
        ),
        (("llama-3-8b", "--hardware", "h100", "--kv-format", "int5"), "int5.*did you mean"),
        (("llama-3-8b", "--hardware", "h100", "--weights", "bf61"), "did you mean 'bf16'"),
        (("gpt2", "--hardware", "h100", "--tensor-parallel", "5"), "12.*5|5.*12"),
        (("gpt2", "--hardware", "h100", "--pipeline-parallel", "13"), "12 layers, too few for 13"),
        (("llama-3-8b", "--hardware", "m2-max"), "m2-max comes with"),
        (("llama-3-8b", "--verify"), "only known from the catalogue"),
    ],
)
def test_what_cannot_be_is_refused(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(QuireError, match=message):
        run(*args)


def test_verification_is_of_this_machine() -> None:
    done = CliRunner().invoke(plan, ["--verify", "--hardware", "h100"])
    assert done.exit_code == 2
    assert "leave --hardware out" in done.output


@pytest.mark.parametrize("text", ["0", "-3", "many"])
def test_counts_are_positive(text: str) -> None:
    done = CliRunner().invoke(plan, ["gpt2", "--hardware", "h100", "--requests", text])
    assert done.exit_code == 2


def test_a_picture_is_drawn_of_the_plans_own_numbers(tmp_path: Path) -> None:
    args = ("llama-3.1-8b", "--hardware", "rtx-4090", "--context", "8192", "--requests", "8")
    found = answer(*args, "--plot", str(tmp_path / "plan.html"))
    page = (tmp_path / "plan.html").read_text()
    assert "llama-3.1-8b: what fits into rtx-4090" in page
    assert "8 × int8" in page
    for row in found["formats"]:
        assert f"{row['max_context']:,}" in page  # where the dashed line meets the limit
    assert "decode of 64" in page
    assert "prefill of 8,192" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(tmp_path: Path) -> None:
    args = ("gpt2", "--hardware", "h100", "--plot")
    with pytest.raises(QuireError, match=r"\.jpg"):
        run(*args, str(tmp_path / "plan.jpg"))
    with pytest.raises(QuireError, match="nowhere"):
        run(*args, str(tmp_path / "nowhere" / "plan.html"))
    done = CliRunner().invoke(plan, [*args, str(tmp_path / "plan.html"), "--tensor-parallel", "2"])
    assert "--plot draws one device" in done.output


def test_hardware_is_listed() -> None:
    said = run("--hardware", "list")
    assert "h100-sxm" in said
    assert "GB/s" in said


def test_this_machine_is_measured_and_the_plan_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sizes, and once: until times can be relied upon takes half a minute."""
    monkeypatch.setattr(calibrate, "ROWS", (1, 8, 128))
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    found = answer("--verify", "--context", "512", "--requests", "4")
    assert found["hardware"]["kind"] == "machine"
    assert found["hardware"]["bandwidth_bytes_per_s"] > 1e8
    rows = {row["name"]: row for row in found["verify"]}
    assert {"weights", "keys and values", "workspace", "logits", "total", "prefill"} <= set(rows)
    assert "decode step, 4 requests" in rows
    for row in rows.values():
        values = [row["predicted"], row["measured"]]
        assert all(math.isfinite(value) for value in values if value is not None)
    if sys.platform == "linux":
        assert rows["unaccounted"]["measured"] is not None
        for name in ("weights", "keys and values", "logits"):
            row = rows[name]
            assert row["measured"] == pytest.approx(row["predicted"], rel=0.02)


def test_a_plan_for_a_card_imports_no_framework_and_no_kernels() -> None:
    script = """
import sys
from click.testing import CliRunner
from quire.cli.plan import plan
done = CliRunner().invoke(plan, ["llama-3-8b", "--hardware", "h100", "--json"])
assert done.exit_code == 0, done.output
heavy = {"torch", "transformers", "triton", "matplotlib", "quire.backends.native._native"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
