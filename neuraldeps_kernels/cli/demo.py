"""`neuraldeps demo`: two real ImageNet networks, run live; which categories they express through which others."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis import DependencyReport, LogitStatistics, find_dependencies
from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.cli.output import check_output, console, curve_rows, curve_table, messages, output_folder
from neuraldeps_kernels.data.logits import imagenet_class_names, load_imagenet_covariance
from neuraldeps_kernels.progress import progress_bar

NETWORKS = ("efficientnet-lite0", "efficientnet-lite1")
MIN_PICTURES = 10
HELD_OUT = 0.25  # of the pictures of a user's folder


@dataclass(frozen=True)
class Measured:
    """Logits of both networks on crops, and where the covariance comes from."""

    logits: tuple[Tensor, Tensor]  # [N, 1000] each
    picture: Tensor  # int64 [N]
    labels: list[int | None]  # of each picture
    source: dict[str, Any]  # for report.json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.json, dependencies.csv and plots.")] = Path("out/demo"),
    from_pictures: Annotated[
        Path | None,
        typer.Option(help="Folder of your own pictures: fit and measure on them instead of the shipped covariance."),
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Crops of each picture.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Replace files in an existing folder.")] = False,
) -> None:
    """Dependencies within efficientnet-lite0, and of it on efficientnet-lite1, measured on held-out pictures."""
    check_output(out, force)
    measured = _run_networks(from_pictures, crops)
    reports = _find(measured, own_statistics=from_pictures is not None)
    measured.source["covariance"] = _covariance_source(reports["lite0"].statistics.count, from_pictures)
    with messages().status("error curves and plots"), output_folder(out, force) as folder:
        _write(measured, reports, folder)
    _print(measured, reports)
    messages().print(f"wrote {out}", soft_wrap=True)


def _run_networks(folder: Path | None, crops: int) -> Measured:
    """Logits on crops of the packaged pictures, or of those in `folder`."""
    if importlib.util.find_spec("PIL") is None:
        raise ValueError('pictures need Pillow: pip install "neuraldeps_kernels[demo]"')
    from neuraldeps_kernels.data.networks import crop_logits, load_network
    from neuraldeps_kernels.data.pictures import folder_pictures, packaged_pictures

    pictures = packaged_pictures() if folder is None else folder_pictures(folder)
    networks = [load_network(name) for name in NETWORKS]
    with progress_bar() as bar:
        task = bar.add_task(f"{' and '.join(NETWORKS)}, {crops} crops a picture", total=len(pictures))
        result = crop_logits(networks, pictures, crops, advance=lambda: bar.advance(task))
    for message in result.unreadable:
        messages().print(f"skipped {message}", soft_wrap=True, markup=False)
    if len(result.pictures) < MIN_PICTURES:
        where = (
            f"{folder} has"
            if folder is not None
            else "the installed foolbox, gradio, imgaug, scikit-image, scikit-learn have"
        )
        hint = "" if folder is not None else "; pip install --no-deps foolbox gradio imgaug scikit-image"
        raise ValueError(f"{where} {len(result.pictures)} readable pictures, at least {MIN_PICTURES} are needed{hint}")
    source = {
        "networks": list(NETWORKS),
        "crops_per_picture": crops,
        "pictures": [picture.id for picture in result.pictures],
        "unreadable": list(result.unreadable),
    }
    first, second = result.logits
    return Measured((first, second), result.picture, [picture.label for picture in result.pictures], source)


def _find(measured: Measured, own_statistics: bool) -> dict[str, DependencyReport]:
    """The three analyses by name; held out are all pictures, or a share of them where they also give the statistics."""
    names = imagenet_class_names()
    within, between, same = "lite0", "lite1 predicts lite0", "lite1 predicts lite0, same category allowed"
    common: dict[str, Any] = {"refit": True, "groups": measured.picture, "group_name": "picture"}
    first, second = measured.logits
    if own_statistics:
        common |= {"held_out": HELD_OUT}
        return {
            within: find_dependencies(first, names, **common),
            between: find_dependencies(first, names, predictors=second, **common),
            same: find_dependencies(first, names, predictors=second, exclude_same=False, **common),
        }
    shipped = load_imagenet_covariance()
    n = shipped.num_categories
    one = LogitStatistics(shipped.lite0, shipped.lite0_mean, shipped.crops, (n,))
    both = LogitStatistics(shipped.joint, shipped.mean, shipped.crops, (n, n))
    return {
        within: find_dependencies(one, names, held_out=first, **common),
        between: find_dependencies(both, names, held_out=(first, second), **common),
        same: find_dependencies(both, names, held_out=(first, second), exclude_same=False, **common),
    }


def _write(measured: Measured, reports: dict[str, DependencyReport], folder: Path) -> None:
    """report.json of all analyses; CSV and plots of the first here, of the second in the folder `between`."""
    within, between = list(reports.values())[:2]
    content = {
        "source": measured.source,
        "top1_of_labelled_pictures": _labelled_top1(measured),
        "analyses": {name: report.to_dict() | {"error_curve": curve_rows(report)} for name, report in reports.items()},
    }
    (folder / "report.json").write_text(json_text(content), encoding="utf-8")
    (folder / "between").mkdir()
    for report, place in ((within, folder), (between, folder / "between")):
        report.to_csv(place / "dependencies.csv")
        report.to_graphml(place / "graph.graphml")
        report.plot(place)


def _covariance_source(samples: int, folder: Path | None) -> str:
    if folder is not None:
        return f"{samples} crops of the pictures in {folder} that are not held out"
    shipped = load_imagenet_covariance()
    return f"{shipped.provenance} {shipped.crops} crops of {shipped.pictures} pictures."


def _labelled_top1(measured: Measured) -> dict[str, Any]:
    """Top-1 of each network on the central crop of the pictures whose category is known: a check of the set-up."""
    labels = torch.tensor([-1 if label is None else label for label in measured.labels])
    central = torch.arange(len(labels)) * measured.source["crops_per_picture"]
    known = labels >= 0
    if not known.any():
        return {"pictures": 0}
    top1 = {
        name: float((logits[central].argmax(1) == labels)[known].double().mean())
        for name, logits in zip(NETWORKS, measured.logits, strict=True)
    }
    return {"pictures": int(known.sum()), **top1}


def _print(measured: Measured, reports: dict[str, DependencyReport]) -> None:
    out = console()
    check = _labelled_top1(measured)
    out.print(f"Covariance: {measured.source['covariance']}")
    out.print(f"Measured on {reports['lite0'].describe().partition('measured on ')[2]}.")
    if check["pictures"]:
        rates = ", ".join(f"{name} {check[name]:.2f}" for name in NETWORKS)
        out.print(f"Set-up check, top-1 on the {check['pictures']} labelled pictures: {rates}.")
    for name, report in reports.items():
        for caution in report.cautions():
            out.print(f"[yellow]{name}: {caution}[/]")
        out.print(curve_table(name, report))
    for name, report in reports.items():
        if not name.endswith("allowed"):
            out.print(f"\n[bold]{name}[/]")
            out.print(report.table(count=10, top=4))
