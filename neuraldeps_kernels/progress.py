"""A bar on standard error for long work, where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """Silent unless standard error is a terminal; gone when it ends."""
    target = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=target, disable=not target.is_terminal, transient=True)


def track(steps: Iterable[T], description: str, total: int) -> Iterator[T]:
    """`steps`, each counted when the next one is asked for."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for step in steps:
            yield step
            bar.advance(task)
