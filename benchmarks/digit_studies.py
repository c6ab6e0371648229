"""What the studies on pairs of digits share: pictures, networks, training, intervals over seeds, tables and records.

Pictures are split before pairs are made, so that no picture is in two of the parts. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor, nn

from benchmarks import harness
from neuraldeps_kernels.data.digits import Digits, mnist_5k, uci_digits

HIDDEN = 128
BATCH = 256


@dataclass(frozen=True)
class Source:
    """A set of pictures and how many of them go where."""

    name: str
    load: Callable[[], Digits]
    pictures: tuple[int, ...]  # for training, held-out statistics, test


SOURCES = (
    Source("UCI digits 8 x 8", uci_digits, (900, 400, 497)),
    Source("MNIST-5k 14 x 14", lambda: mnist_5k().pooled(2), (2000, 1000, 2000)),
)


def sources(only: str | None) -> Iterator[tuple[Source, Digits]]:
    """The sets whose package is installed and whose name contains `only`."""
    for source in SOURCES:
        if only is None or only.lower() in source.name.lower():
            try:
                yield source, source.load()
            except ModuleNotFoundError as error:
                print(f"{source.name}: left out, {error}")


def network(height: int, width: int, categories: int, seed: int, hidden: int = HIDDEN) -> nn.Sequential:
    """Two hidden layers of ReLU; the last entry is the linear head, the rest gives its features."""
    torch.manual_seed(seed)
    body = [nn.Flatten(), nn.Linear(height * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*body), nn.Linear(hidden, categories))


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order."""
    for rows in torch.randperm(len(images), generator=generator).split(BATCH):
        yield images[rows], labels[rows]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; infinite for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * spread


def percent(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and 95 % half-width of shares, in percent."""
    mean, half = interval(values)
    return f"{100 * mean:{'+' if signed else ''}.1f} ± {100 * half:.1f}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> str:
    """Prints a table and returns it as Markdown."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in header:
        shown.add_column(column, justify="left" if column == header[0] else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([f"{title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def append(options: argparse.Namespace, study: str, record: dict[str, Any]) -> None:
    """Adds a JSON line of the study to the results file."""
    path = options.results
    if path is None:
        kept = harness.default_results(options.quick)
        path = kept.with_name(kept.name.replace("-cpu", "-studies"))
    facts = {"schema": harness.SCHEMA, "bench": study, "quick": options.quick, **harness.machine()}
    harness.append_record(path, facts | rounded(record))


def rounded(value: Any) -> Any:
    """Floats to 5 significant digits, wherever they are in a record."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parser(description: str, seeds: int) -> argparse.ArgumentParser:
    """Options that both studies have."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="two seeds and little training: shows that it runs")
    result.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"runs of each kind, default {seeds}")
    result.add_argument("--source", metavar="TEXT", help="only sets of pictures with TEXT in their name")
    result.add_argument("--results", type=Path, metavar="FILE", help="JSON lines are appended here")
    result.add_argument("--markdown", type=Path, metavar="FILE", help="tables are appended here")
    return result


def write_markdown(options: argparse.Namespace, text: str) -> None:
    """Appends a table to the file asked for, if any."""
    if options.markdown is not None:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
