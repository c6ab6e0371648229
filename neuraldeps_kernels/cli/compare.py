"""`neuraldeps compare`: which of several networks expresses which, from their logits on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuraldeps_kernels.analysis import model_matrix
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Logits (samples x categories) of each network on the same samples.", metavar="FILE"),
    ],
    lam_ratio: o.LamRatio = None,
    lam: o.Lam = None,
    top_k: o.TopK = None,
    select: o.Choose = None,
    path: Annotated[int | None, typer.Option(min=2, metavar="N", help="Penalties that --select tries.")] = None,
    lam_min_ratio: o.PathEnd = None,
    validation: o.Validation = None,
    labels: o.Labels = None,
    groups: o.Groups = None,
    held_out: o.HeldOutShare = 0.2,
    refit: o.Refit = False,
    standardize: o.Standardize = False,
    nonnegative: o.Nonnegative = False,
    ridge: o.Ridge = 0.0,
    same: Annotated[
        bool, typer.Option("--same", help="Category i of one network may predict category i of another.")
    ] = False,
    seed: o.Seed = 0,
    key: o.Key = None,
    out: Annotated[Path | None, typer.Option(help="Folder for matrix.json, matrix.csv and matrix.png.")] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrix as JSON instead of a table.")] = False,
) -> None:
    """How well the categories of each of several networks are expressed by those of each."""
    check_output(out, force)
    if len(files) < 2:
        raise ValueError(f"expected at least two files of logits, got {len(files)}; see neuraldeps deps for one")
    if path is not None and select is None:
        raise ValueError("--path needs --select")
    streams = o.read_streams(files, key)
    matrix = model_matrix(
        dict(zip(stream_names(files), streams, strict=True)),
        exclude_same=False if same else None,
        lam_ratio=lam_ratio,
        lam=lam,
        top_k=top_k,
        **o.path_options(select, path, lam_min_ratio, validation),
        standardize=standardize,
        nonnegative=nonnegative,
        ridge=ridge,
        refit=refit,
        held_out=held_out if held_out != 0 else None,
        labels=o.read_labels(labels, len(streams[0])),
        groups=o.read_names(groups, len(streams[0]), "group"),
        seed=seed,
    )
    if out is not None:
        with output_folder(out, force) as folder:
            matrix.to_json(folder / "matrix.json")
            matrix.to_csv(folder / "matrix.csv")
            matrix.plot(folder / "matrix.png")
        messages().print(f"wrote {out}", soft_wrap=True)
    for caution in matrix.cautions:
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        typer.echo(matrix.to_json(), nl=False)
    else:
        console().print(matrix.table())


def stream_names(files: list[Path]) -> list[str]:
    """File names without suffix where that tells them apart, else the paths."""
    stems = [path.stem for path in files]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given more than once")
    return names
