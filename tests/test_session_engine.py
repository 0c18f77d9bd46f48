"""Conversations that survive a restart: saved, loaded, gone on with, without prefill."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.cache.session import read_header
from quire.errors import SessionError
from recording import Recorder, assert_warm_is_cold
from tiny import WRITERS, random_prompt, tiny_engine, write_llama

SHORT = quire.SamplingParams(max_new_tokens=5, ignore_eos=True)


def saved(directory: Path, path: Path, prompt: list[int], **settings: Any) -> list[int]:
    """Save a conversation of ``prompt`` and its reply; all of its tokens."""
    engine = tiny_engine(directory, **settings)
    request = engine.submit(prompt, SHORT)
    while engine.has_work:
        engine.step()
    engine.save_session(request, path, extra={"note": "ünï"})
    engine.cache.check()
    assert engine.cache.sequences == ()
    return request.samples[0].tokens


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_a_conversation_goes_on_in_another_engine_with_the_same_bits(
    models: dict[str, Path], kind: str, page_size: int, tmp_path: Path
) -> None:
    path = tmp_path / "talk.quire"
    tokens = saved(models[kind], path, random_prompt(37, seed=1), page_size=page_size)
    engine = tiny_engine(models[kind], page_size=page_size)
    session = engine.load_session(path)
    assert session.reason is None
    assert session.tokens == tuple(tokens[:-1])
    assert session.extra == {"note": "ünï"}
    engine.cache.check()
    recorder = Recorder(engine, all_rows=True)
    [done] = engine.generate([[*tokens, *random_prompt(4, seed=2)]], SHORT)
    assert done.cached_tokens == len(tokens) - 1
    assert_warm_is_cold(models[kind], recorder)


def test_pages_that_are_gone_are_computed_again_before_they_are_saved(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for prefix_cache in (True, False):
        engine = tiny_engine(models["full"], num_pages=14, prefix_cache=prefix_cache)
        request = engine.submit(random_prompt(37, seed=3), SHORT)
        while engine.has_work:
            engine.step()
        engine.generate([random_prompt(50, seed=4)], SHORT)
        engine.save_session(request, tmp_path / f"{prefix_cache}")
        engine.cache.check()
    other = tiny_engine(models["full"])
    for prefix_cache in (True, False):
        assert len(other.load_session(tmp_path / f"{prefix_cache}").tokens) == 41


def test_a_session_of_something_else_is_a_miss_with_a_reason(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "talk.quire"
    saved(models["full"], path, random_prompt(37, seed=5))
    other = write_llama(tmp_path / "other", dtype="bf16", seed=1)
    cases = [
        (tiny_engine(other), "weights"),
        (tiny_engine(models["full"], kv_format="fp32"), "page_format"),
        (tiny_engine(models["full"], page_size=8), "page_size"),
        (tiny_engine(models["full"], num_pages=9), "need 11 pages"),
        (tiny_engine(models["full"], prefix_cache=False), "prefix cache is off"),
    ]
    for engine, reason in cases:
        session = engine.load_session(path)
        assert session.tokens == ()
        assert session.reason is not None
        assert reason in session.reason
        engine.cache.check()
        assert engine.cache.cached_pages == (0,)
        [done] = engine.generate([random_prompt(9)], SHORT)  # as if it had not been offered
        assert done.cached_tokens == 0


def test_a_damaged_missing_or_foreign_file_is_a_miss(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "talk.quire"
    prompt = random_prompt(37, seed=6)
    saved(models["full"], path, prompt)
    good = path.read_bytes()
    engine = tiny_engine(models["full"])
    for at in np.random.default_rng(0).integers(0, len(good), 40).tolist():
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        session = engine.load_session(path)
        assert (session.tokens, session.reason is None) == ((), False)
    path.write_bytes(b"\x80\x04\x95 a pickle would begin like this")
    assert engine.load_session(path).reason is not None
    assert "cannot" in str(engine.load_session(tmp_path / "nothing").reason)
    assert engine.cache.cached_pages == (0,)


def test_a_session_stays_with_its_tenant(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "talk.quire"
    tokens = saved(models["full"], path, random_prompt(37, seed=7))
    engine = tiny_engine(models["full"])
    engine.load_session(path, salt="a")
    assert engine.explain_prefix(tokens).cached_tokens == 0
    assert engine.explain_prefix(tokens, salt="a").cached_tokens == 41


def test_no_other_conversation_is_in_the_file(models: dict[str, Path], tmp_path: Path) -> None:
    """The unfinished last page: what others left behind its last token is not saved."""
    for backend in ("reference", "native"):
        cache = quire.CacheConfig(page_size=16, num_pages=4)
        engine = quire.Engine(models["wide"], backend=backend, cache=cache)
        engine.generate([random_prompt(60, seed=8)], SHORT)  # fills every page
        request = engine.submit(random_prompt(20, seed=9), SHORT)
        while engine.has_work:
            engine.step()
        engine.save_session(request, tmp_path / backend)
        clean = quire.Engine(models["wide"], backend=backend, cache=cache)
        request = clean.submit(random_prompt(20, seed=9), SHORT)
        while clean.has_work:
            clean.step()
        clean.save_session(request, tmp_path / f"{backend}-clean")
        read = [(tmp_path / name).read_bytes() for name in (backend, f"{backend}-clean")]
        start = read_header(tmp_path / backend).file_bytes - 4096  # after what is dated
        assert read[0][start:] == read[1][start:]


def test_one_token_is_no_session(models: dict[str, Path], tmp_path: Path) -> None:
    engine = tiny_engine(models["full"])
    request = engine.submit([1], SHORT)
    with pytest.raises(SessionError, match="at least two tokens"):
        engine.save_session(request, tmp_path / "talk.quire")


def test_chat_goes_on_where_it_ended(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "model", tokenizer=True, max_position_embeddings=400)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = tmp_path / "talk.quire"

    def chat(*lines: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quire", "chat", "--model", str(directory)]
        options = ["--session", str(path), "-n", "6", "--backend", "reference"]
        typed = "\n".join(lines) + "\n"
        return subprocess.run(
            [*command, *options], input=typed, capture_output=True, text=True, check=False
        )

    first = chat("the quick fox")
    assert first.returncode == 0, first.stderr
    assert "saved" in first.stderr
    second = chat("and the dog")
    assert second.returncode == 0, second.stderr
    assert "goes on after 2 messages" in second.stderr
    assert "without prefill" in second.stderr
    messages = read_header(path).extra["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    inspect = [sys.executable, "-m", "quire", "inspect", str(path)]
    shown = subprocess.run([*inspect, "--verify"], capture_output=True, text=True, check=True)
    assert "user: the quick fox" in shown.stdout
    assert "every checksum is right" in shown.stdout
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    told = subprocess.run([*inspect, "--verify"], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "damaged:" in told.stdout
    path.write_bytes(b"notes that are not a session")
    third = chat("the fox")
    assert third.returncode == 2
    assert "not" in third.stderr
    assert path.read_bytes() == b"notes that are not a session"
