"""``quire inspect``: what a cache directory holds, whether it is undamaged, and pruning it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.inspect_session import inspect_session

if TYPE_CHECKING:
    from quire.cache.disk_contents import HeldIdentity, HeldPrefix, StoreContents
    from quire.models.text import TextCodec

__all__ = ["inspect"]

_SHOWN = 20  # prefixes of an identity; --json has all
_TEXT_WIDTH = 60
_ENDS = 40  # tokens decoded at either end of a prefix


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Check every checksum; exit code 1 if one is wrong.")
@click.option(
    "--prune",
    metavar="BYTES",
    help="Delete the least recently used until the files take at most BYTES, such as 2GiB; "
    "'all' deletes everything.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, verify: bool, prune: str | None, as_json: bool) -> None:
    """List what the cache directory or session file PATH holds: prefixes, tokens, bytes, age, hits.

    Other processes may go on using it. Nothing is changed but by --prune.
    """
    damaged = _KINDS[_kind(path)](path, verify, prune, as_json)
    if damaged:
        raise click.exceptions.Exit(1)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "directory"
    if not path.exists():
        raise click.UsageError(
            f"there is nothing at {path}; give a cache directory or a session file"
        )
    return "file"


def _inspect_store(path: Path, verify: bool, prune: str | None, as_json: bool) -> bool:
    """A directory of the disk tier; True if something in it is damaged."""
    from quire.cache.disk_contents import open_contents, prune_store

    pruned = None if prune is None else prune_store(path, _prune_bytes(prune))
    with open_contents(path) as contents:
        found = _store_as_dict(contents)
        if pruned is not None:
            found["pruned"] = pruned
        if verify:
            found["damaged"] = _verify(contents)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print_store(found)
    return bool(found.get("damaged"))


# What is done for each kind of path: (path, verify, prune, as_json) -> is something damaged?
_KINDS: dict[str, Callable[[Path, bool, str | None, bool], bool]] = {
    "directory": _inspect_store,
    "file": inspect_session,
}


def _prune_bytes(prune: str) -> int:
    from quire.config import parse_bytes

    return 0 if prune == "all" else parse_bytes(prune)


def _verify(contents: "StoreContents") -> list[dict[str, str]]:
    damaged = []
    with _progress(contents.count()) as advance:
        for damage in contents.verify():
            advance()
            if damage is not None:
                damaged.append({"what": damage.what, "why": damage.why})
    return damaged


@contextmanager
def _progress(pages: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; call what is yielded for every page."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=pages)
        yield lambda: progress.advance(task)


def _store_as_dict(contents: "StoreContents") -> dict[str, Any]:
    identities = contents.identities()
    return {
        "path": str(contents.path),
        "kind": "disk cache",
        "file_bytes": contents.file_bytes,
        "pages": sum(identity.pages for identity in identities),
        "stored_bytes": sum(identity.bytes for identity in identities),
        "raw_bytes": sum(identity.raw_bytes for identity in identities),
        "identities": [_identity_as_dict(identity) for identity in identities],
    }


def _identity_as_dict(identity: "HeldIdentity") -> dict[str, Any]:
    codec = _codec(identity.facts.get("model"))
    return {
        "identity": identity.facts,
        "pages": identity.pages,
        "stored_bytes": identity.bytes,
        "raw_bytes": identity.raw_bytes,
        "prefixes": [_prefix_as_dict(prefix, codec) for prefix in identity.prefixes],
    }


def _prefix_as_dict(prefix: "HeldPrefix", codec: "TextCodec | None") -> dict[str, Any]:
    return {
        "text": _text(prefix, codec),
        "tokens": len(prefix.tokens),
        "start": prefix.start,
        "pages": prefix.pages,
        "stored_bytes": prefix.bytes,
        "created": prefix.created,
        "last_used": prefix.used,
        "hits": prefix.hits,
    }


def _codec(model: str | None) -> "TextCodec | None":
    """The tokenizer of the model that computed the pages, if it is still where it was."""
    from quire.errors import CheckpointError
    from quire.models.text import load_text_codec

    if model is None or not Path(model).is_dir():
        return None
    try:
        return load_text_codec(Path(model))
    except CheckpointError:
        return None


def _text(prefix: "HeldPrefix", codec: "TextCodec | None") -> str:
    """Both ends of a prefix on one line; token ids if there is no tokenizer."""
    tokens = prefix.tokens
    ends = (tokens,) if len(tokens) <= 2 * _ENDS else (tokens[:_ENDS], tokens[-_ENDS:])
    parts = [" ".join(map(str, end)) if codec is None else codec.decode(end) for end in ends]
    # What was in a prompt must not steer the terminal.
    texts = ["".join(c if c.isprintable() else " " for c in part).strip() for part in parts]
    half = _TEXT_WIDTH // 2 - 1
    if len(texts) == 1 and len(texts[0]) <= _TEXT_WIDTH:
        shown = texts[0]
    else:
        shown = f"{texts[0][:half].rstrip()} … {texts[-1][-half:].lstrip()}"
    return f"… {shown}" if prefix.start else shown


def _print_store(found: dict[str, Any]) -> None:
    from rich.console import Console

    from quire.config import format_bytes

    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    if "pruned" in found:
        console.print(f"pruned {found['pruned']} pages")
    console.print(
        f"{found['path']}: {found['pages']} pages, {format_bytes(found['stored_bytes'])} stored, "
        f"{format_bytes(found['raw_bytes'])} unpacked; the files take "
        f"{format_bytes(found['file_bytes'])}"
    )
    for identity in found["identities"]:
        _print_identity(console, identity)
    for damage in found.get("damaged", ()):
        console.print(f"damaged: {damage['what']}: {damage['why']}")
    if "damaged" in found:
        console.print(f"verified {found['pages']} pages, {len(found['damaged'])} damaged")


def _print_identity(console: Any, identity: dict[str, Any]) -> None:
    from rich.table import Table

    from quire.config import format_bytes

    console.print()
    facts = ", ".join(f"{name} {value}" for name, value in identity["identity"].items())
    console.print("".join(c if c.isprintable() else " " for c in facts) or "unknown identity")
    table = Table(box=None, pad_edge=False)
    table.add_column("prefix")
    for heading in ("tokens", "bytes", "age", "last used", "hits"):
        table.add_column(heading, justify="right", no_wrap=True)
    now = time.time()
    for prefix in identity["prefixes"][:_SHOWN]:
        table.add_row(
            prefix["text"],
            str(prefix["tokens"]),
            format_bytes(prefix["stored_bytes"]),
            _duration(now - prefix["created"]),
            _duration(now - prefix["last_used"]),
            str(prefix["hits"]),
        )
    console.print(table)
    more = len(identity["prefixes"]) - _SHOWN
    if more > 0:
        console.print(f"and {more} prefixes that were used less recently; --json lists all")


def _duration(seconds: float) -> str:
    """``seconds`` for a person: ``"40 s"``, ``"3 h"``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
