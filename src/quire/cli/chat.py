"""``quire chat``: a conversation in the terminal, with the checkpoint's chat template."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from quire.cli.generate import report, run_request
from quire.cli.options import engine_options, make_engine, sampling_options, sampling_params
from quire.cli.reading import decode_utf8
from quire.errors import RequestError

if TYPE_CHECKING:
    from quire.engine import Engine, SamplingParams, StepOutput

__all__ = ["chat"]

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


@click.command()
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@sampling_options
@engine_options
def chat(system: str | None, **options: Any) -> None:
    """Hold a conversation.

    Every line of input is a message. In it, /reset forgets the conversation, /exit leaves and
    Ctrl-C stops a reply.
    """
    params = sampling_params(options)
    engine = make_engine(options)
    if engine.codec is None:
        raise RequestError(f"{engine.directory} has no tokenizer, so it cannot chat")
    opening = [] if system is None else [{"role": "system", "content": system}]
    engine.codec.render_chat([*opening, {"role": "user", "content": ""}])  # refuse before asking
    if sys.stdin.isatty():
        click.echo(_HELP, err=True)
    messages = list(opening)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
        elif line in ("/help", "/?"):
            click.echo(_HELP, err=True)
        elif line.startswith("/"):
            click.echo(f"quire: there is no command {line!r}; {_HELP}", err=True)
        elif line:
            _turn(engine, messages, line, params)


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
) -> None:
    """One message and its reply; a message that cannot be served is taken back, with the reason."""
    assert engine.codec is not None
    asked = [*messages, {"role": "user", "content": line}]
    try:
        text = engine.codec.render_chat(asked)
        request = engine.submit(engine.codec.encode(text, add_special_tokens=False), params)
    except RequestError as error:
        click.echo(f"quire: error: {error} (/reset begins anew)", err=True)
        return
    interrupted = run_request(engine, request, _show)
    completion = request.completions[0]
    click.echo()
    if sys.stderr.isatty():
        click.echo(report(completion), err=True)
    if interrupted and not sys.stdin.isatty():
        raise click.Abort
    messages[:] = [*asked, {"role": "assistant", "content": completion.text}]


def _show(output: "StepOutput") -> None:
    sys.stdout.write(output.text)
    sys.stdout.flush()
