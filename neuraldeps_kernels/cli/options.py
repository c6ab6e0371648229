"""Options that several commands share, and files of text that belong to logits."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis.dependencies import DEFAULT_LAM_RATIO
from neuraldeps_kernels.data.logits import read_lines, read_logits


class Select(str, Enum):
    """Rules of `find_dependencies(select=...)` as they are written on the command line."""

    HELD_OUT = "held-out"
    ONE_STANDARD_ERROR = "one-standard-error"


LamRatio = Annotated[
    float | None, typer.Option(help=f"Penalty as a fraction of lambda_max (default: {DEFAULT_LAM_RATIO}).")
]
Lam = Annotated[float | None, typer.Option(help="Penalty in squared logit units.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Exactly that many categories in every dependency.")]
Choose = Annotated[
    Select | None, typer.Option("--select", help="Choose each category's penalty by the error on validation groups.")
]
PathEnd = Annotated[
    float | None, typer.Option(help="Where the path ends, as a fraction of lambda_max (default: 0.01).")
]
Validation = Annotated[
    float | None, typer.Option(help="Share of the fitted groups that --select judges on (default: 0.25).")
]
Standardize = Annotated[
    bool, typer.Option("--standardize", help="Penalise coefficients of logits divided by their deviations.")
]
Nonnegative = Annotated[bool, typer.Option("--nonnegative", help="Coefficients of at least 0 only.")]
Ridge = Annotated[float, typer.Option(min=0, help="Adds this times the squared coefficients to the objective.")]
Refit = Annotated[bool, typer.Option("--refit", help="Least squares on the supports found.")]
Labels = Annotated[Path | None, typer.Option(help="Text file, the true category number of each sample.")]
Groups = Annotated[
    Path | None,
    typer.Option(help="Text file, one group a line and sample (e.g. its picture); groups are never split."),
]
HeldOutShare = Annotated[
    float, typer.Option(help="Share of the groups that is measured on, not fitted; 0 measures nothing.")
]
Key = Annotated[str | None, typer.Option(help="Name of the array in files that hold several.")]
Seed = Annotated[int, typer.Option(help="Of the choice of groups and of resamples.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")]


def path_options(
    select: Select | None, path: int | None, lam_min_ratio: float | None, validation: float | None
) -> dict[str, Any]:
    """Arguments of `find_dependencies` about the path and the choice on it."""
    if validation is not None and select is None:
        raise ValueError("--validation needs --select")
    if lam_min_ratio is not None and path is None and select is None:
        raise ValueError("--lam-min-ratio needs --path or --select")
    given: dict[str, Any] = {"n_lambdas": path, "lam_min_ratio": lam_min_ratio, "validation": validation}
    if select is not None:
        given["select"] = select.name.lower()
    return {name: value for name, value in given.items() if value is not None}


def read_streams(files: list[Path], key: str | None) -> list[Tensor]:
    """Logits of each file, all of the same number of samples."""
    streams = [read_logits(path, key) for path in files]
    for path, stream in zip(files, streams, strict=True):
        if len(stream) != len(streams[0]):
            raise ValueError(f"{path}: {len(stream)} samples, but {files[0]} has {len(streams[0])}")
    return streams


def read_labels(path: Path | None, number: int) -> Tensor | None:
    """The category numbers of a text file, one a sample."""
    if path is None:
        return None
    lines = read_lines(path, number, "label")
    wrong = [line for line in lines if not line.isdecimal()]
    if wrong:
        raise ValueError(f"{path}: expected a category number on every line, found {wrong[0]!r}")
    return torch.tensor([int(line) for line in lines])


def read_names(path: Path | None, number: int, what: str) -> list[str] | None:
    """The lines of a text file, one a category or sample."""
    return None if path is None else read_lines(path, number, what)
