"""``quire measure`` as a person uses it."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from quire.models import resolve_model
from test_cli import command, run

QUILL = resolve_model(None)
MEASURE = ("measure", "--model", str(QUILL))
SHORT = ("--context", "128", "--tokens", "200", "--recall-trials", "1")
KEYS = {
    *("kv_format", "evict", "bytes_per_token", "compression", "perplexity", "perplexity_change"),
    *("kl_mean", "kl_p99", "top1_agreement", "recall", "decode_tokens_per_s"),
    *("recall_in_prompt", "recall_in_prompt_mean", "recall_in_prompt_interval"),
}
SPEEDS = ("decode_tokens_per_s", "attention_bytes_per_s")


def without_speeds(found: list[dict[str, object]]) -> list[dict[str, object]]:
    for each in found:
        for numbers in (each, each["exact"]):
            assert isinstance(numbers, dict)
            for name in SPEEDS:
                assert numbers.pop(name) > 0
    return found


def test_json_is_a_list_with_the_promised_keys_and_the_same_every_time() -> None:
    args = (*MEASURE, *SHORT, "--kv-format", "fp16", "--kv-format", "fp32", "--json")
    first, again = run(*args), run(*args)
    assert (first.returncode, first.stderr) == (0, b"")
    found = json.loads(first.stdout)
    assert [each["kv_format"] for each in found] == ["fp16", "fp32"]
    for each in found:
        assert each.keys() >= KEYS
        assert (each["evict"], each["error"], each["recommended"]) == ("none", None, None)
        assert (each["tokens"], each["context"]) == (200, 128)
        assert each["recall"].keys() == {"32", "64", "119"} == each["recall_in_prompt"].keys()
        assert each["exact"]["kv_format"] == "bf16"
    assert [each["compression"] for each in found] == [1.0, 0.5]
    assert without_speeds(found) == without_speeds(json.loads(again.stdout))


def test_the_table_the_advice_and_the_page(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n" * 20)
    page = tmp_path / "page.html"
    args = ("--text", str(tmp_path / "text"), "--budget", "1%", "--plot", str(page))
    done = run(*MEASURE, *SHORT, "--kv-format", "fp16", *args)
    assert (done.returncode, done.stderr) == (0, b"")
    for word in (
        b"bf16 (exact)",
        b"values recalled",
        b"Keep the exact cache",
        b"is fp16, which saves nothing",
    ):
        assert word in done.stdout
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_budget_that_nothing_meets() -> None:
    args = ("--kv-format", "fp16", "--budget", "0.000001%", "--json")
    done = run(*MEASURE, *SHORT, *args)
    assert [each["recommended"] for each in json.loads(done.stdout)] == [False]
    assert b"No setting stays under 1e-06 %" in done.stderr


def test_a_refused_candidate_is_shown_beside_the_others() -> None:
    args = ("--kv-format", "fp16", "--kv-format", "int9", "--evict", "none", "--evict", "h2o")
    done = run(*MEASURE, *SHORT, *args, "--json", "--recall-trials", "0")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert [(e["kv_format"], e["evict"], e["error"] is None) for e in found] == [
        ("fp16", "none", True),
        ("fp16", "h2o", False),
        ("int9", "none", False),
        ("int9", "h2o", False),
    ]
    assert found[1]["perplexity"] is None
    assert found[1].keys() == found[0].keys()
    assert b"fp16 + h2o: eviction 'h2o' has no budget" in done.stderr
    assert b"int9: unknown page format 'int9'" in done.stderr


BAD = {
    "all refused": (["--kv-format", "int9"], "no candidate could be measured"),
    "budget": (["--budget", "1"], "'1' is not a loss in percent; write it as 1%"),
    "budget none": (["--budget", "0%"], "is not a loss in percent"),
    "budget nan": (["--budget", "nan%"], "is not a loss in percent"),
    "tokens": (["--tokens", "few"], "'few' is neither a number of tokens nor 'all'"),
    "context": (["--context", "9999"], "this model allows 40 to 2048"),
    "no file": (["--text", "/no/such/file"], "cannot read /no/such/file"),
    "plot": (["--plot", "a.svg"], "neither a .png nor a .html"),
    "plot nowhere": (["--plot", "/no/such/dir/a.html"], "is not a directory"),
    "model": (["--model", "/no/such/model"], "no model directory at /no/such/model"),
    "page size": (["--page-size", "0"], "page_size must be an int of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_exit_code_2(name: str) -> None:
    args, message = BAD[name]
    done = run(*MEASURE, *SHORT, *args)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_an_empty_text_and_one_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    empty = run(*MEASURE, "--text", str(tmp_path / "empty"))
    assert (empty.returncode, b"has 0 tokens; at least 2" in empty.stderr) == (2, True)
    odd = run(*MEASURE, "--text", str(tmp_path / "bytes"))
    assert (odd.returncode, b"byte 0xff at offset 2" in odd.stderr) == (2, True)


def test_progress_is_shown_on_a_terminal_only() -> None:
    master, slave = pty.openpty()
    args = command(*MEASURE, *SHORT, "--kv-format", "fp32", "--json")
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    out, _ = process.communicate(timeout=120)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed and all was read
            break
    os.close(master)
    assert json.loads(out)
    assert b"reading the text" in shown
