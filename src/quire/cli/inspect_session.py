"""``quire inspect FILE``: what a session file holds, and whether it is undamaged."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

__all__ = ["inspect_session"]


def inspect_session(path: Path, verify: bool, prune: str | None, as_json: bool) -> bool:
    """Describe the session file ``path``; True if it is damaged."""
    from quire.cache.session import read_header
    from quire.errors import SessionError

    if prune is not None:
        raise click.UsageError(f"{path} is a session file; --prune is for cache directories")
    header = read_header(path)
    found: dict[str, Any] = {
        "path": str(path),
        "kind": "session",
        "file_bytes": header.file_bytes,
        "tokens": header.num_tokens,
        "pages": sum(pages for _, pages, _ in header.groups),
        "created": header.created,
        "identity": dict(header.identity),
        "extra": dict(header.extra),
    }
    if verify:
        found["damaged"] = []
        try:
            _verify(path)
        except SessionError as error:
            found["damaged"] = [{"what": str(path), "why": str(error)}]
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print(found)
    return bool(found.get("damaged"))


def _verify(path: Path) -> None:
    from quire.cache.session import verify_session

    if not sys.stderr.isatty():
        verify_session(path)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        verify_session(path, lambda done, total: bar.update(task, completed=done, total=total))


def _print(found: dict[str, Any]) -> None:
    from quire.config import format_bytes

    age = time.time() - found["created"]
    click.echo(
        f"{found['path']}: a session of {found['tokens']} tokens in {found['pages']} pages, "
        f"{format_bytes(found['file_bytes'])}, written {age / 3600:.1f} h ago"
    )
    for name, value in found["identity"].items():
        click.echo(f"  {name:14} {_plain(value)}")
    messages = found["extra"].get("messages", [])
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict):
            text = _plain(str(message.get("content", "")))
            shown = text if len(text) <= 70 else f"{text[:34]} … {text[-33:]}"
            click.echo(f"  {_plain(str(message.get('role', '')))}: {shown}")
    for damage in found.get("damaged", ()):
        click.echo(f"damaged: {damage['why']}")
    if found.get("damaged") == []:
        click.echo("verified: every checksum is right")


def _plain(text: str) -> str:
    """``text`` on one line; what was in a file must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
