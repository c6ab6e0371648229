"""What commands print and write: consoles, progress, and an output folder that appears whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    """Where results go."""
    return Console(highlight=False)


def messages() -> Console:
    """Where remarks and progress go: standard error."""
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A progress bar on standard error, silent unless that is a terminal."""
    target = messages()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=target, disable=not target.is_terminal, transient=True)


def check_output(folder: Path | None, force: bool) -> None:
    """Raises ValueError where `folder` could not be written in the end, so that long work does not start in vain."""
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--out needs matplotlib for its plots: pip install "neuraldeps_kernels[plot]"')
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} exists and is not a folder")
    if not force and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} exists and is not empty; choose another folder or add --force")


@contextmanager
def output_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and leaves no trace if it fails.

    With `force` its files replace those of the same names in an existing `folder`, each in one step; others stay.
    """
    check_output(folder, force)
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        check_output(folder, force)
        if not target.exists() or not any(target.iterdir()):
            os.replace(draft, target)
        else:
            for path in sorted(path for path in draft.rglob("*") if path.is_file()):
                place = target / path.relative_to(draft)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
