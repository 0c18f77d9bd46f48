"""Write docs/cli.md from the commands' own help; tests/test_docs.py checks that it is current.

With ``--print`` it is printed, and nothing is written.
"""

import sys
from pathlib import Path

import click

from quire.cli import cli

__all__ = ["cli_reference"]

PATH = Path(__file__).parent / "cli.md"


def cli_reference() -> str:
    """The help of every command as Markdown."""
    parts = ["# The command line\n\nMade from `--help` by `docs/make_cli.py`.\n"]
    root = click.Context(cli, info_name="quire", terminal_width=96, **cli.context_settings)
    parts.append(_section("quire", cli.get_help(root)))
    for name, command in sorted(cli.commands.items()):
        ctx = click.Context(command, info_name=name, parent=root, terminal_width=96)
        parts.append(_section(f"quire {name}", command.get_help(ctx)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(cli_reference(), end="")
    else:
        PATH.write_text(cli_reference(), encoding="utf-8")
