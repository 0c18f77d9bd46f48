"""Progress bars on standard error, and only if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["loading_progress", "measuring_progress", "prefill_progress"]


@contextmanager
def loading_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback (what, done, total) that draws a bar; None if there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar() as draw:
        yield lambda what, done, total: draw(f"loading {what}", done, total)


@contextmanager
def measuring_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback (what, done, total) that draws a bar; None if there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar() as draw:
        yield draw


@contextmanager
def prefill_progress(tokens: int, least: int) -> Iterator[Callable[[int], None]]:
    """A callback (tokens done) for a prompt of ``tokens``; draws nothing for up to ``least``."""
    if tokens <= least or not sys.stderr.isatty():
        yield lambda done: None
        return
    with _bar() as draw:
        yield lambda done: draw("reading the prompt", done, tokens)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        shown = ""

        def draw(what: str, done: int, total: int) -> None:
            nonlocal shown  # what is new is drawn at once: it may be over before the next refresh
            new, shown = what != shown, what
            progress.update(task, description=what, completed=done, total=total, refresh=new)

        yield draw
