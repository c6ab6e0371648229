"""`neuraldeps deps`: dependencies in a user's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuraldeps_kernels.analysis import find_dependencies
from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import (
    check_output,
    console,
    curve_rows,
    curve_table,
    messages,
    output_folder,
    write_report,
)

SHOWN = 10  # categories in the printed table, unless --targets names others


def deps(
    files: Annotated[
        list[Path],
        typer.Argument(help="Logits (samples x categories); a second file predicts the first.", metavar="FILE"),
    ],
    lam_ratio: o.LamRatio = None,
    lam: o.Lam = None,
    top_k: o.TopK = None,
    select: o.Choose = None,
    path: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Show the errors at N penalties from lambda_max down; also for --select."
        ),
    ] = None,
    lam_min_ratio: o.PathEnd = None,
    validation: o.Validation = None,
    targets: Annotated[str | None, typer.Option(help="Categories to explain: numbers or names, with commas.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file, one category name a line.")] = None,
    predictor_names: Annotated[
        Path | None, typer.Option(help="The same for the second file, if its categories are others.")
    ] = None,
    labels: o.Labels = None,
    groups: o.Groups = None,
    held_out: o.HeldOutShare = 0.2,
    refit: o.Refit = False,
    standardize: o.Standardize = False,
    nonnegative: o.Nonnegative = False,
    ridge: o.Ridge = 0.0,
    same: Annotated[
        bool, typer.Option("--same", help="Two files: category i of the second may predict category i of the first.")
    ] = False,
    resamples: Annotated[
        int, typer.Option(min=0, metavar="B", help="Draw the groups again B times: how often does a predictor return?")
    ] = 0,
    seed: o.Seed = 0,
    key: o.Key = None,
    top: Annotated[int, typer.Option(min=1, help="Dependencies shown for each category.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json, dependencies.csv, graph.graphml and plots.")
    ] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Which categories of a classifier its other categories express, from logits in .npy, .npz, .pt or .safetensors."""
    check_output(out, force)
    if len(files) > 2:
        raise ValueError(f"expected one or two files of logits, got {len(files)}; see neuraldeps compare for more")
    streams = o.read_streams(files, key)
    first, second = streams[0], streams[1] if len(streams) == 2 else None
    if second is None and (same or predictor_names is not None):
        raise ValueError("--same and --predictor-names need a second file")
    names = o.read_names(class_names, first.shape[1], "class name")
    report = find_dependencies(
        first,
        names,
        lam_ratio,
        lam=lam,
        top_k=top_k,
        **o.path_options(select, path, lam_min_ratio, validation),
        predictors=second,
        predictor_names=None if second is None else o.read_names(predictor_names, second.shape[1], "class name"),
        targets=None if targets is None else parse_targets(targets, names, first.shape[1]),
        exclude_same=False if same else None,
        standardize=standardize,
        nonnegative=nonnegative,
        ridge=ridge,
        refit=refit,
        held_out=held_out if held_out != 0 else None,
        labels=o.read_labels(labels, len(first)),
        groups=o.read_names(groups, len(first), "group"),
        resamples=resamples,
        seed=seed,
    )
    chosen = report.targets.tolist() if targets is not None else None
    if out is not None:
        with output_folder(out, force) as folder:
            write_report(report, folder, chosen, {"files": [str(file) for file in files]})
        messages().print(f"wrote {out}", soft_wrap=True)
    for caution in report.cautions():
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        content = report.to_dict() | ({} if path is None else {"error_curve": curve_rows(report)})
        typer.echo(json_text(content), nl=False)
        return
    console().print(report.table(report.notable(SHOWN) if chosen is None else chosen, top=top))
    if path is not None:
        console().print(curve_table("path", report))


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
