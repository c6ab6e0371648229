"""What commands print and write: consoles, tables, and an output folder that appears whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from neuraldeps_kernels.analysis import DependencyReport
from neuraldeps_kernels.analysis.formatting import cell, json_text, without_nan

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def console() -> Console:
    """Where results go."""
    return Console(highlight=False)


def messages() -> Console:
    """Where remarks and progress go: standard error."""
    return Console(stderr=True, highlight=False)


def write_report(report: DependencyReport, folder: Path, categories: list[int] | None, extra: dict[str, Any]) -> None:
    """report.json (with the error curve and `extra`), dependencies.csv, graph.graphml and the plots."""
    content = report.to_dict() | {"error_curve": curve_rows(report)} | extra
    (folder / "report.json").write_text(json_text(content), encoding="utf-8")
    report.to_csv(folder / "dependencies.csv")
    report.to_graphml(folder / "graph.graphml")
    report.plot(folder, categories=categories)


def curve_rows(report: DependencyReport) -> list[dict[str, Any]]:
    """The error curve as JSON-able rows; undefined values are None."""
    return [without_nan(asdict(point)) for point in report.error_curve]


def curve_table(name: str, report: DependencyReport) -> Table:
    """The error curve of a report: penalised and refitted coefficients side by side."""
    table = Table(title=f"[bold]{name}[/]: held-out quality along the penalty", title_justify="left", title_style="")
    columns = ("ratio", "k", "R fit", "R held out", "R occurring", "precision", "recall", "top 5", "AUC")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for ratio, group in groupby(report.error_curve, lambda point: point.lam_ratio):
        points = list(group)  # without and, unless coefficients are bounded, with the refit
        fields = ("residual_ratio_fit", "residual_ratio", "residual_ratio_of_occurring")
        errors = [" ".join(cell(getattr(point, field)) for point in points) for field in fields]
        rates = [cell(getattr(points[-1], field), 3) for field in ("precision", "recall", "top5", "auc")]
        table.add_row(f"{ratio:.3g}", f"{points[0].support:.0f}", *errors, *rates)
    number = "" if report.metrics is None else f" ({int((report.metrics.positives > 0).sum())} categories)"
    refit = "" if report.problem.nonnegative else ", first of CovLasso, then of least squares on its support"
    what = "dependency" if report.problem.nonnegative else "least-squares dependency"
    table.caption = (
        f"Ratio: penalty / lambda_max. k and R: medians over all categories; R = residual / variance{refit}. "
        f"Occurring: categories that the network sees in a held-out crop{number}. "
        f"Rates: its argmax against the original one with a single logit replaced by the {what}."
    )
    table.caption_justify = "left"
    return table


def check_output(folder: Path | None, force: bool, plots: bool = True) -> None:
    """Raises ValueError where `folder` could not be written in the end, so that long work does not start in vain."""
    if folder is None:
        return
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--out needs matplotlib for its plots: pip install "neuraldeps_kernels[plot]"')
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} exists and is not a folder")
    if not force and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} exists and is not empty; choose another folder or add --force")


@contextmanager
def output_folder(folder: Path, force: bool, plots: bool = True) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and leaves no trace if it fails.

    Failure includes the signals that end a program (SIGTERM, SIGHUP, SIGINT). With `force` its files replace
    those of the same names in an existing `folder`, each in one step and all before a signal ends the program; others
    stay.
    """
    check_output(folder, force, plots)
    target = folder.absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    with _EndingSignals() as signals:
        draft = None
        try:
            with signals.waiting():
                target.parent.mkdir(parents=True, exist_ok=True)
                draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            yield draft
            draft.chmod(0o777 & ~_umask())
            check_output(folder, force, plots)
            with signals.waiting():
                _move(draft, target)
            made = []
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _move(draft: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(draft, target)
        return
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        place = target / path.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


class _EndingSignals:
    """Signals that end a program raise SystemExit (status 128 + number), SIGINT KeyboardInterrupt, once.

    So what is open is cleaned up. Outside the main thread, which alone may handle signals, nothing changes.
    """

    def __init__(self) -> None:
        self._arrived: int | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _EndingSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that signals do not interrupt; they take effect when it ends."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        if self._arrived is not None:
            self._end(self._arrived)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._arrived = number
        if not self._waiting:
            self._end(number)

    def _end(self, number: int) -> None:
        self._waiting = True  # cleaning up is not to be disturbed
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
