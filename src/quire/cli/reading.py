"""Prompts from the command line, files and standard input."""

import sys
from pathlib import Path

import click

__all__ = ["decode_utf8", "read_prompt"]


def read_prompt(prompt: str | None, path: Path | None, token_ids: str | None) -> "str | list[int]":
    """The prompt, from exactly one of its sources; standard input if none is named.

    Raises UsageError for none or several of them, a file that cannot be read, or bytes that are
    not UTF-8.
    """
    given = [what for what in (prompt, path, token_ids) if what is not None]
    if len(given) > 1:
        raise click.UsageError("give one of PROMPT, --file and --token-ids")
    if token_ids is not None:
        return _parse_ids(token_ids)
    if path is not None and str(path) != "-":
        try:
            return decode_utf8(path.read_bytes(), str(path))
        except OSError as error:
            raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and path is None and sys.stdin.isatty():
        raise click.UsageError("no prompt; give one, or --file, or pipe it to standard input")
    return decode_utf8(sys.stdin.buffer.read(), "standard input")


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of ints", param_hint="--token-ids"
        ) from None


def decode_utf8(data: bytes, where: str) -> str:
    """Text; UsageError, with the first bad byte and its offset, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{where} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
