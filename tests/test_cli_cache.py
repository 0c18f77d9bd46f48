"""The cache from the command line: hits after a restart, reasons, contexts beyond the pool."""

import json
from pathlib import Path

import numpy as np
import pytest

from test_cli import GENERATE, run
from tiny import write_llama

PROMPT = "import os\n" * 60  # some hundred tokens: worth loading


def test_a_second_process_finds_the_prompt_on_disk_and_says_so(tmp_path: Path) -> None:
    args = (*GENERATE, PROMPT, "-n", "4", "--cache-dir", str(tmp_path), "--json", "--explain-cache")
    cold, warm = (json.loads(run(*args).stdout) for _ in range(2))
    assert cold["cached_tokens_by_tier"] == {"pool": 0, "host": 0, "disk": 0}
    assert cold["cache_reasons"] == ["no cached prompt begins like this one"]
    assert cold["tier_decision"] is None
    assert warm["token_ids"] == cold["token_ids"]
    whole = (cold["prompt_tokens"] - 1) // 16 * 16
    held = f"{whole} tokens ({whole} on disk)"
    assert warm["tier_decision"].startswith(held)
    # Loaded if that was expected to take less time; the sentence says which.
    loaded = f"{held} loaded" in warm["tier_decision"]
    assert warm["cached_tokens"] == warm["cached_tokens_by_tier"]["disk"] == whole * loaded


def test_reasons_go_to_standard_error_beside_the_text() -> None:
    done = run(*GENERATE, "import os", "-n", "4", "--explain-cache", "--no-prefix-cache")
    assert done.returncode == 0
    told = done.stderr.decode()
    assert "0 of" in told
    assert "the prefix cache is off (prefix_cache=False, --no-prefix-cache)" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--disk-cache", "1GiB"], "disk_cache needs a cache_dir"),
        (["--host-cache", "1GiB", "--no-prefix-cache"], "host_cache needs prefix_cache"),
        (["--host-cache", "1GiB", "--page-size", "whole"], "never whole"),
        (["--host-cache", "100"], "too small for pages of"),
        (["--beam-width", "3", "--temperature", "1"], "cannot be combined with temperature"),
    ],
)
def test_settings_that_cannot_work_are_one_message(options: list[str], message: str) -> None:
    done = run(*GENERATE, "import os", "-n", "4", *options)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_beams_are_followed_from_the_command_line() -> None:
    found = json.loads(run(*GENERATE, "import os", "-n", "6", "--beam-width", "3", "--json").stdout)
    assert found["new_tokens"] == 6
    assert found["score"] < 0


def test_a_context_larger_than_kv_memory_runs(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", dtype="bf16", max_position_embeddings=4096)
    ids = ",".join(map(str, np.random.default_rng(0).integers(0, 61, 1500).tolist()))
    args = ("generate", "--model", str(directory), "--token-ids", ids, "-n", "4", "--json")
    per_token = 2 * 2 * 2 * 6 * 2  # layers, K and V, heads, head_dim, bytes
    tight = ("--kv-memory", str(900 * per_token))
    refused = run(*args, *tight)
    assert refused.returncode == 2
    assert b"or give a host_cache or cache_dir to stream from" in refused.stderr
    roomy = json.loads(run(*args).stdout)
    streamed = json.loads(run(*args, *tight, "--host-cache", "1MiB").stdout)
    assert streamed["token_ids"] == roomy["token_ids"]
    assert "host memory" in streamed["streamed"]
    assert roomy["streamed"] is None
