"""`neuraldeps eval` and `neuraldeps rerank`: ranked galleries from files of features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.analysis.progress import progress_bar
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.features import Features, read_features
from neuraldeps_kernels.data.logits import read_arrays
from neuraldeps_kernels.ops import retrieval_metrics as metrics
from neuraldeps_kernels.ops.retrieval import METRICS, k_reciprocal_rerank
from neuraldeps_kernels.ops.retrieval_metrics import RetrievalMetrics, metrics_table

RANKING = "ranking.npz"  # distances [nq, ng], or with indices [nq, K]

Query = Annotated[Path, typer.Argument(help="File with features, ids and cameras of the queries.", metavar="QUERY")]
Gallery = Annotated[Path, typer.Argument(help="The same of the gallery.", metavar="GALLERY")]
QueryIds = Annotated[Path | None, typer.Option(help="Their ids instead: an array, or a text file.")]
GalleryIds = Annotated[Path | None, typer.Option(help="The same of the gallery.")]
QueryCameras = Annotated[Path | None, typer.Option(help="Their cameras instead: an array, or a text file.")]
GalleryCameras = Annotated[Path | None, typer.Option(help="The same of the gallery.")]
Precision = Annotated[
    str, typer.Option("--ap", help="Average precision.", metavar="|".join(metrics.AVERAGE_PRECISIONS))
]
Denominator = Annotated[str, typer.Option(help="Queries averaged over.", metavar="|".join(metrics.DENOMINATORS))]
CameraRule = Annotated[
    str, typer.Option(help="Junk by camera; ignored without cameras.", metavar="|".join(metrics.CAMERA_RULES))
]
JunkLabel = Annotated[int | None, typer.Option(help="Gallery id that is junk for all queries.")]
RanksOf = Annotated[str, typer.Option(help="What a rank counts.", metavar="|".join(metrics.RANKS_OF))]
MaxRank = Annotated[int, typer.Option(min=1, help="Length of the CMC.")]


def evaluate(
    query: Query,
    gallery: Gallery,
    ranking: Annotated[
        Path | None,
        typer.Option(help=f"Distances instead of those of the features: {RANKING} of neuraldeps rerank, or a matrix."),
    ] = None,
    metric: Annotated[str, typer.Option(help="Distance of features.", metavar="|".join(METRICS))] = METRICS[0],
    max_rank: MaxRank = 50,
    ap: Precision = "standard",
    denominator: Denominator = "valid",
    camera_rule: CameraRule = "same",
    junk_label: JunkLabel = None,
    ranks_of: RanksOf = "images",
    protocol: Annotated[
        str, typer.Option(help="Images of an identity in the gallery.", metavar="|".join(metrics.PROTOCOLS))
    ] = "all",
    draws: Annotated[int, typer.Option(min=1, help="Of single-shot galleries.")] = 10,
    seed: Annotated[int, typer.Option(help="Of these draws.")] = 0,
    query_ids: QueryIds = None,
    gallery_ids: GalleryIds = None,
    query_cameras: QueryCameras = None,
    gallery_cameras: GalleryCameras = None,
    key: o.Key = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json and queries.csv.")] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON instead of a table.")] = False,
) -> None:
    """CMC, mAP and mINP of a gallery ranked by features, or by given distances, in .npy, .npz, .pt or .safetensors."""
    check_output(out, force, plots=False)
    x = read_features(query, key=key, ids=query_ids, cameras=query_cameras)
    y = read_features(gallery, key=key, ids=gallery_ids, cameras=gallery_cameras)
    settings = {
        "max_rank": max_rank,
        "ap": ap,
        "denominator": denominator,
        "camera_rule": camera_rule,
        "junk_label": junk_label,
        "ranks_of": ranks_of,
        "protocol": protocol,
        "draws": draws,
        "seed": seed,
    }
    labels = _labels(query, x, gallery, y, camera_rule)
    if ranking is None:
        found = _of_features(x, y, labels, settings | {"metric": metric})
        settings["metric"] = metric
    else:
        distances, indices = _ranking(ranking)
        found = metrics.retrieval_metrics(distances, *labels, indices=indices, **settings)  # type: ignore[arg-type]
    _check_valid(found)
    files = {"query": str(query), "gallery": str(gallery), "ranking": None if ranking is None else str(ranking)}
    content = {"files": files, "settings": settings} | found.to_dict()
    if out is not None:
        with output_folder(out, force, plots=False) as folder:
            (folder / "metrics.json").write_text(json_text(content), encoding="utf-8")
            found.to_csv(folder / "queries.csv")
        messages().print(f"wrote {out}", soft_wrap=True)
    _print({"": found}, content, as_json)


def rerank(
    query: Query,
    gallery: Gallery,
    k1: Annotated[int, typer.Option(min=1, help="Neighbours that may be reciprocal.")] = 20,
    k2: Annotated[int, typer.Option(min=1, help="Neighbours averaged over, 1 for none.")] = 6,
    lambda_value: Annotated[float, typer.Option("--lambda", help="Weight of the original distance, 0 to 1.")] = 0.3,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many of the gallery a query; default: all.")
    ] = None,
    power: Annotated[int, typer.Option(help="2, or 4 for distances squared once more.", metavar="2|4")] = 2,
    normalize: Annotated[str, typer.Option(help="Divide by each row's largest distance.", metavar="max|none")] = "max",
    list_length: Annotated[str, typer.Option(help="Whether k1 counts the row itself.", metavar="k1+1|k1")] = "k1+1",
    max_rank: MaxRank = 50,
    ap: Precision = "standard",
    denominator: Denominator = "valid",
    camera_rule: CameraRule = "same",
    junk_label: JunkLabel = None,
    query_ids: QueryIds = None,
    gallery_ids: GalleryIds = None,
    query_cameras: QueryCameras = None,
    gallery_cameras: GalleryCameras = None,
    key: o.Key = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for {RANKING}, and with ids metrics.json and queries.csv.")
    ] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON instead of a table.")] = False,
) -> None:
    """k-reciprocal re-ranking of a gallery, and with ids what it gains."""
    check_output(out, force, plots=False)
    x = read_features(query, key=key, ids=query_ids, cameras=query_cameras)
    y = read_features(gallery, key=key, ids=gallery_ids, cameras=gallery_cameras)
    known = x.ids is not None and y.ids is not None
    if not known and out is None:
        raise ValueError("nothing to do: files without ids give no metrics; add --out for the ranking, or ids")
    measured = {
        "max_rank": max_rank,
        "ap": ap,
        "denominator": denominator,
        "camera_rule": camera_rule,
        "junk_label": junk_label,
    }
    settings: dict[str, Any] = {
        "k1": k1,
        "k2": k2,
        "lambda_value": lambda_value,
        "top_k": top_k,
        "power": power,
        "normalize": normalize,
        "list_length": list_length,
    }
    rows = {}
    if known:
        labels = _labels(query, x, gallery, y, camera_rule)
        rows["original"] = _of_features(x, y, labels, measured)
        _check_valid(rows["original"])
    with messages().status(f"re-ranking {len(x)} + {len(y)} rows"):
        result = k_reciprocal_rerank(x.features, y.features, **settings)
    distances, indices = result if isinstance(result, tuple) else (result, None)
    if known:
        rows["re-ranked"] = metrics.retrieval_metrics(distances, *labels, indices=indices, **measured)  # type: ignore[arg-type]
    content = {"files": {"query": str(query), "gallery": str(gallery)}, "settings": settings | measured}
    content |= {name.replace("-", ""): found.to_dict() for name, found in rows.items()}
    if out is not None:
        with output_folder(out, force, plots=False) as folder:
            if indices is None:
                np.savez(folder / RANKING, distances=distances.numpy())
            else:
                np.savez(folder / RANKING, distances=distances.numpy(), indices=indices.numpy())
            if known:
                (folder / "metrics.json").write_text(json_text(content), encoding="utf-8")
                rows["re-ranked"].to_csv(folder / "queries.csv")
        messages().print(f"wrote {out}", soft_wrap=True)
    if known:
        _print(rows, content, as_json)
    elif as_json:
        typer.echo(json_text(content), nl=False)


def _labels(
    query_path: Path, query: Features, gallery_path: Path, gallery: Features, camera_rule: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Ids and cameras of both; cameras where both have them and the rule looks at them."""
    for path, side, option in ((query_path, query, "--query-ids"), (gallery_path, gallery, "--gallery-ids")):
        if side.ids is None:
            raise ValueError(f"{path}: has no array 'ids'; give {option}")
    assert query.ids is not None
    assert gallery.ids is not None
    if camera_rule == "none":
        return query.ids, gallery.ids, None, None
    if (query.cameras is None) != (gallery.cameras is None):
        path, option = (query_path, "--query-cameras") if query.cameras is None else (gallery_path, "--gallery-cameras")
        raise ValueError(f"{path}: has no array 'cameras', but the other file has; give {option} or --camera-rule none")
    return query.ids, gallery.ids, query.cameras, gallery.cameras


def _of_features(
    query: Features, gallery: Features, labels: tuple[Tensor, Tensor, Tensor | None, Tensor | None], settings: Any
) -> RetrievalMetrics:
    with progress_bar() as bar:
        task = bar.add_task("queries", total=len(query))
        return metrics.retrieval_metrics_from_features(
            query.features,
            gallery.features,
            *labels,
            **settings,
            progress=lambda number: bar.advance(task, number),
        )


def _ranking(path: Path) -> tuple[Tensor, Tensor | None]:
    arrays = dict(read_arrays(path))
    indices = arrays.pop("indices", None)
    if "distances" not in arrays and len(arrays) != 1:
        raise ValueError(f"{path}: expected an array 'distances', found {', '.join(arrays) or 'none'}")
    distances = arrays.get("distances", next(iter(arrays.values())))
    return distances, None if indices is None or indices.is_floating_point() else indices.to(torch.int64)


def _check_valid(found: RetrievalMetrics) -> None:
    if found.num_valid == 0:
        raise ValueError("no query has a positive in the gallery: ids of both files do not meet, or all are junk")


def _print(rows: dict[str, RetrievalMetrics], content: dict[str, Any], as_json: bool) -> None:
    for found in rows.values():
        if number := int(found.truncated.sum()):
            messages().print(
                f"[yellow]{number} queries have positives that the lists do not hold: their figures are lower bounds[/]"
            )
    if as_json:
        typer.echo(json_text(content), nl=False)
    else:
        console().print(metrics_table(rows))
