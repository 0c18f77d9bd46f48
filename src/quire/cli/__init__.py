"""The ``quire`` command.

Modules here import only click when they load, so that ``quire --help`` answers at once; the engine
and rich are imported by the commands that use them. Exit codes: 0 done, 2 bad input (with one
message and no traceback), 130 interrupted, 141 the reader of the output went away.
"""

import os
import sys
from typing import Any

import click

import quire
from quire.cli.bench import bench
from quire.cli.chat import chat
from quire.cli.doctor import doctor
from quire.cli.generate import generate
from quire.cli.inspect import inspect
from quire.cli.measure import measure
from quire.cli.plan import plan
from quire.errors import QuireError, did_you_mean

__all__ = ["cli", "main"]

INTERRUPTED, CLOSED_PIPE, BAD_INPUT = 130, 141, 2


class _Commands(click.Group):
    """A group that names the nearest command for an unknown one and leaves quietly on EPIPE."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that ``args`` names; UsageError, with the nearest name, if there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(
                f"there is no command {args[0]!r}{did_you_mean(args[0], self.commands)}", ctx
            ) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit code 141 if the reader of its output went away."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered cannot be written; let the interpreter's own flush succeed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(CLOSED_PIPE)
        return result


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(quire.__version__, prog_name="quire")
def cli() -> None:
    """Run language models through a paged KV cache that never changes the answer.

    Start with:  quire generate "def fibonacci(n):"
    """


for command in (generate, chat, plan, measure, bench, doctor, inspect):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(_run())


def _run() -> int:
    try:
        return int(cli.main(prog_name="quire", standalone_mode=False) or 0)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("quire: interrupted", err=True)
        return INTERRUPTED
    except QuireError as error:
        click.echo(f"quire: error: {error}", err=True)
        return BAD_INPUT
