"""``quire chat``: a conversation in the terminal, with the checkpoint's chat template."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.generate import report, run_request
from quire.cli.options import engine_options, make_engine, sampling_options, sampling_params
from quire.cli.reading import decode_utf8
from quire.errors import CacheFull, RequestError, SessionError
from quire.evict_choice import parse_eviction

if TYPE_CHECKING:
    from quire.engine import Engine, Request, SamplingParams, StepOutput

__all__ = ["chat"]

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


@click.command()
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@click.option(
    "--session",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on with the conversation in FILE, without prefill, and save it there at the end.",
)
@sampling_options
@engine_options
def chat(system: str | None, path: Path | None, **options: Any) -> None:
    """Hold a conversation.

    Every line of input is a message. In it, /reset forgets the conversation, /exit leaves and
    Ctrl-C stops a reply.
    """
    saved = _saved_messages(path)
    if saved and system is not None:
        raise click.UsageError(f"{path} begins with its own messages; leave --system away")
    params = sampling_params(options)
    _require_kept(path, options["evict"])
    engine = make_engine(options)
    if engine.codec is None:
        raise RequestError(f"{engine.directory} has no tokenizer, so it cannot chat")
    opening = [] if system is None else [{"role": "system", "content": system}]
    engine.codec.render_chat([*opening, {"role": "user", "content": ""}])  # refuse before asking
    if sys.stdin.isatty():
        click.echo(_HELP, err=True)
    messages = saved or list(opening)
    if path is not None and saved:
        _resume(engine, path, len(saved))
    last: Request | None = None
    changed = False
    try:
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                messages[:], last, changed = opening, None, True
            elif line in ("/help", "/?"):
                click.echo(_HELP, err=True)
            elif line.startswith("/"):
                click.echo(f"quire: there is no command {line!r}; {_HELP}", err=True)
            elif line:
                asked = _turn(engine, messages, line, params)
                last, changed = asked or last, changed or asked is not None
    finally:
        if path is not None and changed:
            _save(engine, path, last, messages)


def _require_kept(path: Path | None, evict: str) -> None:
    """Refuse to save a conversation of which tokens are dropped."""
    choice = parse_eviction(evict)
    if path is not None and choice is not None and choice.drops:
        raise click.UsageError(
            "a session keeps every token, and --evict drops some; leave one of them away"
        )


def _save(
    engine: "Engine", path: Path, last: "Request | None", messages: list[dict[str, str]]
) -> None:
    """Save a conversation; its messages alone where its pages cannot be."""
    extra, tokens = {"messages": messages}, 0
    try:
        if last is None:
            engine.save_notes(path, extra)
        else:
            tokens = engine.save_session(last, path, extra=extra)
    except CacheFull as error:
        click.echo(f"quire: warning: pages are not saved: {error}", err=True)
        engine.save_notes(path, extra)
    click.echo(
        f"quire: {len(messages)} messages, {tokens} tokens of pages saved in {path}", err=True
    )


def _saved_messages(path: Path | None) -> list[dict[str, str]]:
    """The messages of a session file; none if there is no file yet.

    Raises SessionError for a file that is no sound session, so that it is never written over.
    """
    if path is None or not path.exists():
        return []
    from quire.cache.session import read_header

    messages = read_header(path).extra.get("messages", [])
    keys = {"role", "content"}
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.keys() == keys and all(isinstance(v, str) for v in m.values())
        for m in messages
    ):
        raise SessionError(f"{path} holds no messages of a chat; give another file")
    return messages


def _resume(engine: "Engine", path: Path, messages: int) -> None:
    session = engine.load_session(path)
    how = (
        f"{len(session.tokens)} tokens without prefill"
        if session.reason is None
        else f"its pages are not used and will be computed again: {session.reason}"
    )
    click.echo(f"quire: {path} goes on after {messages} messages; {how}", err=True)


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield decode_utf8(line, "standard input").strip()
        return
    import readline  # noqa: F401  (gives input() line editing and history)

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            click.echo(err=True)
            return


def _turn(
    engine: "Engine", messages: list[dict[str, str]], line: str, params: "SamplingParams"
) -> "Request | None":
    """One message and its reply; a message that cannot be served is taken back, with the reason."""
    assert engine.codec is not None
    asked = [*messages, {"role": "user", "content": line}]
    try:
        text = engine.codec.render_chat(asked)
        request = engine.submit(engine.codec.encode(text, add_special_tokens=False), params)
    except RequestError as error:
        click.echo(f"quire: error: {error} (/reset begins anew)", err=True)
        return None
    interrupted = run_request(engine, request, _show)
    completion = request.completions[0]
    click.echo()
    if sys.stderr.isatty():
        click.echo(report(completion), err=True)
    if interrupted and not sys.stdin.isatty():
        raise click.Abort
    messages[:] = [*asked, {"role": "assistant", "content": completion.text}]
    return request


def _show(output: "StepOutput") -> None:
    sys.stdout.write(output.text)
    sys.stdout.flush()
