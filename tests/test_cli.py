"""The command line as a person uses it: real processes, real streams, exit codes, messages."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import quire
from quire.cli import cli
from quire.models import resolve_model

QUILL = resolve_model(None)
GENERATE = ("generate", "--model", str(QUILL))
JSON_KEYS = {
    *("text", "token_ids", "finish_reason", "prompt_tokens", "cached_tokens", "new_tokens"),
    *("ttft_s", "decode_tokens_per_s", "kv_bytes_peak"),
}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "quire", *args]


def run(*args: str, stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*args), check=False, input=stdin, capture_output=True, timeout=120
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quill without its tokenizer."""
    directory = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(QUILL / name, directory)
    return directory


@pytest.fixture(scope="module")
def expected() -> str:
    params = quire.SamplingParams(max_new_tokens=8)
    return quire.Engine(QUILL).generate("import os", params)[0].text


def test_generate_streams_the_engines_text(expected: str) -> None:
    done = run(*GENERATE, "import os", "-n", "8")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


@pytest.mark.parametrize("how", ["file", "stdin", "dash", "file dash"])
def test_the_prompt_comes_from_a_file_or_standard_input(
    how: str, tmp_path: Path, expected: str
) -> None:
    (tmp_path / "prompt").write_text("import os")
    args = {
        "file": ["--file", str(tmp_path / "prompt")],
        "stdin": [],
        "dash": ["-"],
        "file dash": ["--file", "-"],
    }[how]
    done = run(*GENERATE, *args, "-n", "8", stdin=b"import os")
    assert done.stdout.decode() == expected


def test_json_is_one_object_with_the_promised_keys(expected: str) -> None:
    done = run(*GENERATE, "import os", "-n", "8", "--json")
    found = json.loads(done.stdout)
    assert found.keys() >= JSON_KEYS
    assert found["text"] == expected
    assert found["new_tokens"] == len(found["token_ids"]) == 8
    assert found["cached_tokens"] == 0


def test_without_a_model_it_uses_quill_and_says_so(expected: str) -> None:
    done = run("generate", "import os", "-n", "8")
    assert done.stdout.decode() == expected
    assert b"using the built-in model quill" in done.stderr


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(bare: Path) -> None:
    done = run("generate", "--model", str(bare), "--token-ids", "0,5,6", "-n", "4", "--json")
    ids = json.loads(done.stdout)["token_ids"]
    plain = run("generate", "--model", str(bare), "--token-ids", "0 5 6", "-n", "4")
    assert [int(word) for word in plain.stdout.split()] == ids
    assert len(ids) == 4


def test_a_seed_repeats_and_settings_do_not_change_the_answer() -> None:
    sampled = (*GENERATE, "class", "-n", "12", "-t", "0.9", "--top-p", "0.9", "--seed", "5")
    first = run(*sampled).stdout
    assert first
    for more in (["--page-size", "whole"], ["--max-batch-tokens", "2"], ["--kv-memory", "1MiB"]):
        assert run(*sampled, *more).stdout == first
    assert run(*sampled, "--seed", "6").stdout != first


def test_formats_of_keys_values_and_layers_are_taken_as_text() -> None:
    taken = []
    for kv_format in ("bf16", "k=int8,v=fp8+int8@first,last"):
        settings = ("--backend", "reference", "--kv-format", kv_format)
        done = run(*GENERATE, "import os", "-n", "4", *settings, "--json")
        taken.append(json.loads(done.stdout)["kv_bytes_peak"])
    assert taken[1] * 64 == taken[0] * 33  # heads of 64 numbers: 66 bytes instead of 128


BAD = {
    "no such directory": (["--model", "/no/such/model"], "no model directory at /no/such/model"),
    "nan": (["--temperature", "nan"], "temperature must be a number from 0 to 100, not nan"),
    "negative": (["--temperature", "-1"], "temperature must be"),
    "top-p": (["--top-p", "1.5"], "top_p must be a number above 0 to 1, not 1.5"),
    "no tokens": (["-n", "0"], "max_new_tokens must be an int of at least 1, not 0"),
    "not a number": (["-n", "many"], "'many' is not a valid integer"),
    "seed": (["--seed", "-1"], "seed must be"),
    "budget": (["--kv-memory", "1KiB"], "1024 bytes) is below one page: 16 tokens"),
    "unit": (["--kv-memory", "2 bananas"], "'2 bananas' is not a size in bytes"),
    "both sizes": (["--kv-memory", "1MiB", "--num-pages", "4"], "not both"),
    "pool": (["--num-pages", "2"], "but the pool has 2"),
    "format": (["--kv-format", "bf61"], "did you mean 'bf16'"),
    "half a format": (["--kv-format", "k=int8"], "gives a format for keys only; give both"),
    "format of no layer": (["--kv-format", "bf16+fp16@9"], "layer 9, and the model has 4 layers"),
    "backend": (["--backend", "refrence"], "did you mean 'reference'"),
    "backend that is off": (["--backend", "cuda"], "backend 'cuda' is off"),
    "page size": (["--page-size", "0"], "page_size must be an int of at least 1, not 0"),
    "page size text": (["--page-size", "big"], "neither a number of tokens nor 'whole'"),
    "unknown option": (["--temprature", "1"], "--temperature"),
    "ids": (["--token-ids", "1,x"], "give one of PROMPT"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_get_one_message_and_exit_code_2(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args, message = BAD[name]
    assert_refused(["generate", "hello", *args], message, monkeypatch, capfd)


def assert_refused(
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["quire", *args])
    from quire.cli import main

    with pytest.raises(SystemExit) as leave:
        main()
    out, err = capfd.readouterr()
    assert leave.value.code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("1,4096", "token 1 of the prompt is 4096; ids of this model are 0 to 4095"),
        ("-1", "token 0 of the prompt is -1"),
        ("1,x", "'1,x' is not a list of ints"),
        ("", "the prompt is empty"),
    ],
)
def test_bad_token_ids(
    ids: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["generate", "--token-ids", ids], message, monkeypatch, capfd)


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["genrate"], "did you mean 'generate'", monkeypatch, capfd)


def test_a_broken_model_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(QUILL / "config.json", tmp_path)
    weights = (QUILL / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    args = ["generate", "hello", "--model", str(tmp_path)]
    assert_refused(args, "is truncated: tensor 'model.", monkeypatch, capfd)


def test_input_that_is_not_utf8() -> None:
    done = run(*GENERATE, stdin=b"ab\xff")
    assert done.returncode == 2
    assert b"not UTF-8 text: byte 0xff at offset 2" in done.stderr
    argument = subprocess.run(
        [*command(*GENERATE), b"ab\xff"], check=False, capture_output=True, timeout=60
    )
    assert argument.returncode == 2
    assert b"not valid text" in argument.stderr
    assert b"Traceback" not in done.stderr + argument.stderr


def test_a_prompt_longer_than_the_context_says_by_how_much() -> None:
    done = run(*GENERATE, stdin=b"x " * 5000)
    assert done.returncode == 2
    assert b"the model's context of 2048; shorten it by" in done.stderr


def test_a_closed_pipe_ends_it_quietly() -> None:
    process = subprocess.Popen(
        command(*GENERATE, "import os", "-n", "400"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_stops_cleanly_and_keeps_what_was_printed() -> None:
    # The slow backend: it must not be done before the signal comes.
    options = command(*GENERATE, "import os", "-n", "1900", "--backend", "reference")[3:]
    # A shell that runs tests in the background has them ignore the signal, and so their children.
    program = (
        "import signal; from quire.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    )
    args = [sys.executable, "-c", program, *options]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(first)) == (130, 20)
    assert err == b"quire: interrupted\n"


def test_ctrl_c_with_json_still_prints_the_object(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from quire.cli import main
    from quire.engine import Engine

    step, steps = Engine.step, iter(range(4))

    def interrupted(engine: Engine) -> object:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    monkeypatch.setattr(sys, "argv", ["quire", *GENERATE, "import os", "--json"])
    with pytest.raises(SystemExit) as leave:
        main()
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (found["finish_reason"], found["new_tokens"]) == ("cancelled", 3)
    assert (leave.value.code, err) == (130, "quire: interrupted\n")


def test_progress_and_the_report_are_shown_on_a_terminal_only() -> None:
    master, slave = pty.openpty()
    args = command(*GENERATE, "-n", "2", "--max-batch-tokens", "100")
    prompt = b"import os\n" * 100
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    out, _ = process.communicate(prompt, timeout=120)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed and all was read
            break
    os.close(master)
    for word in (b"loading weights", b"reading the prompt", b"KV peak", b"length"):
        assert word in shown
        assert word not in out


def test_chat_answers_every_line_and_remembers() -> None:
    chat = ("chat", "--model", str(QUILL), "-n", "6")
    both = run(*chat, stdin=b"import os\nimport re\n").stdout
    first = run(*chat, stdin=b"import os\n").stdout
    second_alone = run(*chat, stdin=b"import re\n").stdout
    again = run(*chat, stdin=b"import os\n/reset\nimport re\n/exit\nimport sys\n").stdout
    assert both.startswith(first)
    assert again == first + second_alone


def test_chat_says_what_it_cannot_do(bare: Path) -> None:
    chat = ("chat", "--model", str(QUILL), "-n", "4")
    unknown = run(*chat, stdin=b"/rest\n")
    assert b"there is no command '/rest'" in unknown.stderr
    long = run(*chat, stdin=b"x " * 4000 + b"\nimport os\n")
    assert b"the model's context of 2048" in long.stderr
    assert long.stdout == run(*chat, stdin=b"import os\n").stdout
    no_tokenizer = run("chat", "--model", str(bare))
    assert (no_tokenizer.returncode, b"no tokenizer" in no_tokenizer.stderr) == (2, True)


def test_chat_needs_a_template(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    shutil.copy(QUILL / "tokenizer.json", tmp_path)
    done = run("chat", "--model", str(tmp_path))
    assert (done.returncode, b"no chat template" in done.stderr) == (2, True)


def test_doctor_says_what_was_found() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["threads"] >= 1
    states = {backend["name"]: backend["available"] for backend in found["backends"]}
    assert states["reference"] is True
    assert {"cuda", "hf", "serve", "bench", "dev"} <= found["extras"].keys()
    shown = run("doctor").stdout
    assert b"backend    reference on" in shown
    assert b"quire[serve]" in shown or b"extra      serve on" in shown


def test_bench_prints_a_table_and_json() -> None:
    args = ("bench", "--model", str(QUILL), "--lengths", "8,40", "--repeats", "1")
    found = json.loads(run(*args, "--decode-tokens", "3", "--json").stdout)
    assert [row["tokens"] for row in found["rows"]] == [8, 40]
    for row, pages in zip(found["rows"], (1, 3), strict=True):
        assert row["ttft_s"] > 0
        assert row["decode_tokens_per_s"] > 0
        page = 2 * 2 * 64 * 2 * 16 * found_layers()  # K and V, KV heads, head_dim, bf16, tokens
        assert row["kv_bytes_peak"] == pages * page
        # Three decoded tokens: their mean context is one more than the prompt.
        weights = (QUILL / "model.safetensors").stat().st_size
        kv = (row["tokens"] + 2) * page // 16
        assert 0 < weights + kv - row["decode_bytes_per_token"] < 100_000  # header
        moved = row["decode_bytes_per_token"] * row["decode_tokens_per_s"]
        assert row["decode_bytes_per_s"] == pytest.approx(moved)
        share = row["decode_bytes_per_s"] / found["read_bytes_per_s"]
        assert row["share_of_read_bandwidth"] == pytest.approx(share)
    table = run(*args, "--decode-tokens", "3").stdout
    assert b"peak memory" in table
    assert b"decode at 40: " in table
    refused = run("bench", "--lengths", "4096")
    assert (refused.returncode, b"more than the context" in refused.stderr) == (2, True)


def found_layers() -> int:
    return int(json.loads((QUILL / "config.json").read_text())["num_hidden_layers"])


def test_help_imports_no_engine() -> None:
    code = (
        "import sys; sys.argv = ['quire', '--help']\n"
        "from quire.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'tokenizers', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"generate" in done.stdout


def test_tokens_above_a_budget_are_dropped_and_counted() -> None:
    prompt = "import os\n" * 60
    done = run("generate", prompt, "--evict", "window:budget=40", "-n", "8", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["evicted_tokens"] > 40
    refused = run("generate", prompt, "--evict", "windows:budget=40")
    assert refused.returncode != 0
    assert b"did you mean 'window'?" in refused.stderr


def test_what_evict_asks_for_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the engine's own policy, so its summaries of pages are counted before loading."""
    engines: list[quire.Engine] = []

    def submit(engine: quire.Engine, *_: Any) -> Any:
        engines.append(engine)
        raise quire.QuireError("that will do")

    monkeypatch.setattr(quire.Engine, "submit", submit)
    for evict in ("quest:budget=64", "none"):
        CliRunner().invoke(cli, ["generate", "import", "--evict", evict, "--num-pages", "32"])
    [sparse, plain] = [engine.plan.memory.summaries for engine in engines]
    heads, dim, layers = 2, 64, 2  # of quill; two of its four layers choose
    assert sparse == 32 * layers * heads * 2 * dim * 2
    assert plain == 0


def test_a_chat_that_is_saved_keeps_every_token(tmp_path: Path) -> None:
    done = run("chat", "--session", str(tmp_path / "s"), "--evict", "h2o:budget=50%")
    assert done.returncode == 2
    assert b"a session keeps every token" in done.stderr
