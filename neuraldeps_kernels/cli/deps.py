"""`neuraldeps deps`: dependencies in a user's own logits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis import DependencyReport, find_dependencies
from neuraldeps_kernels.analysis.dependencies import DEFAULT_LAM_RATIO, json_text
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.logits import read_lines, read_logits

SHOWN = 10  # categories in the printed table, unless --targets names others


def deps(
    files: Annotated[
        list[Path],
        typer.Argument(help="Logits [samples, categories]; a second file predicts the first.", metavar="FILE [FILE]"),
    ],
    lam_ratio: Annotated[
        float | None, typer.Option(help=f"Penalty as a fraction of lambda_max [default: {DEFAULT_LAM_RATIO}].")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="Penalty in squared logit units, instead of --lam-ratio.")] = None,
    targets: Annotated[str | None, typer.Option(help="Categories to explain: numbers or names, with commas.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file, one category name a line.")] = None,
    predictor_names: Annotated[
        Path | None, typer.Option(help="The same for the second file, if its categories are others.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, the true category number of each sample.")] = None,
    groups: Annotated[
        Path | None,
        typer.Option(help="Text file, one group a line and sample (e.g. its picture); groups are never split."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the groups that is measured on, not fitted; 0 measures nothing.")
    ] = 0.2,
    refit: Annotated[bool, typer.Option("--refit", help="Least squares on the supports found.")] = False,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Penalise coefficients of logits divided by their deviations.")
    ] = False,
    same: Annotated[
        bool, typer.Option("--same", help="Two files: category i of the second may predict category i of the first.")
    ] = False,
    key: Annotated[str | None, typer.Option(help="Name of the array in files that hold several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Dependencies shown for each category.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, dependencies.csv and plots.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Which categories of a classifier its other categories express, from logits in .npy, .npz, .pt or .safetensors."""
    check_output(out, force)
    if len(files) > 2:
        raise ValueError(f"expected one or two files of logits, got {len(files)}")
    streams = [read_logits(path, key) for path in files]
    first, second = streams[0], streams[1] if len(streams) == 2 else None
    if second is not None and len(second) != len(first):
        raise ValueError(f"{files[1]}: {len(second)} samples, but {files[0]} has {len(first)}")
    if second is None and (same or predictor_names is not None):
        raise ValueError("--same and --predictor-names need a second file")
    names = None if class_names is None else read_lines(class_names, first.shape[1], "class name")
    report = find_dependencies(
        first,
        names,
        lam_ratio,
        lam=lam,
        predictors=second,
        predictor_names=_predictor_names(predictor_names, second),
        targets=None if targets is None else parse_targets(targets, names, first.shape[1]),
        exclude_same=False if same else None,
        standardize=standardize,
        refit=refit,
        held_out=held_out if held_out != 0 else None,
        labels=None if labels is None else _read_labels(labels, len(first)),
        groups=None if groups is None else read_lines(groups, len(first), "group"),
    )
    if out is not None:
        with output_folder(out, force) as folder:
            write_report(report, folder, {"files": [str(path) for path in files]})
        messages().print(f"wrote {out}", soft_wrap=True)
    for caution in report.cautions():
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        typer.echo(report.to_json())
    else:
        chosen = report.targets.tolist() if targets is not None else report.notable(SHOWN)
        console().print(report.table(chosen, top=top))


def write_report(report: DependencyReport, folder: Path, extra: dict[str, Any]) -> None:
    """report.json (with the error curve and `extra`), dependencies.csv and the plots."""
    content = report.to_dict() | {"error_curve": curve_rows(report)} | extra
    (folder / "report.json").write_text(json_text(content), encoding="utf-8")
    report.to_csv(folder / "dependencies.csv")
    report.plot(folder)


def curve_rows(report: DependencyReport) -> list[dict[str, Any]]:
    """The error curve as JSON-able rows; undefined values are None."""
    return [
        {name: None if value != value else value for name, value in asdict(point).items()}
        for point in report.error_curve
    ]


def parse_targets(text: str, names: list[str] | None, n: int) -> list[int]:
    """Categories from a list with commas of numbers or names; a name may contain commas only if it stands alone."""
    known: dict[str, list[int]] = {}
    for index, name in enumerate(names or ()):
        known.setdefault(name, []).append(index)
    chosen = []
    for part in [text] if text in known else [part.strip() for part in text.split(",")]:
        if part in known and len(known[part]) == 1:
            chosen.append(known[part][0])
        elif part in known:
            raise ValueError(f"--targets {part!r} names categories {known[part]}; give a number")
        elif part.isdecimal() and int(part) < n:
            chosen.append(int(part))
        else:
            raise ValueError(f"--targets has {part!r}, which is neither a class name nor a number from 0 to {n - 1}")
    return chosen


def _predictor_names(path: Path | None, logits: Tensor | None) -> list[str] | None:
    return None if path is None or logits is None else read_lines(path, logits.shape[1], "class name")


def _read_labels(path: Path, number: int) -> Tensor:
    lines = read_lines(path, number, "label")
    wrong = [line for line in lines if not line.isdecimal()]
    if wrong:
        raise ValueError(f"{path}: expected a category number on every line, found {wrong[0]!r}")
    return torch.tensor([int(line) for line in lines])
