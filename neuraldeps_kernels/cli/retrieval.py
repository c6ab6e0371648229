"""`neuraldeps eval` and `neuraldeps rerank`: ranked galleries from files of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.features import Features, read_features
from neuraldeps_kernels.data.logits import read_arrays
from neuraldeps_kernels.ops import query_expansion
from neuraldeps_kernels.ops import retrieval_metrics as metrics
from neuraldeps_kernels.ops.gnn_rerank import gnn_rerank
from neuraldeps_kernels.ops.retrieval import METRICS, k_reciprocal_rerank, knn
from neuraldeps_kernels.ops.retrieval_metrics import RetrievalMetrics, metrics_table
from neuraldeps_kernels.progress import progress_bar

RANKING = "ranking.npz"  # distances [nq, ng], or with indices [nq, K]
K_RECIPROCAL, GNN, EXPANDED, EXPANSION = "k-reciprocal", "gnn", "expanded-neighbors", "query-expansion"
# Of each method the options that it takes, with their defaults; None: left out.
METHODS: dict[str, dict[str, Any]] = {
    K_RECIPROCAL: {
        "k1": 20,
        "k2": 6,
        "lambda_value": 0.3,
        "power": 2,
        "normalize": "max",
        "list_length": "k1+1",
    },
    GNN: {"k1": 26, "k2": 7, "lambda_value": 0.3},
    EXPANDED: {"k": 25, "t": 3, "q": 8, "expanded_distance": "rank"},
    EXPANSION: {"k": 10, "alpha": 3.0, "augment": None},
}

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
Protocol = Annotated[
    str, typer.Option(help="Images of an identity in the gallery.", metavar="|".join(metrics.PROTOCOLS))
]
Draws = Annotated[int, typer.Option(min=1, help="Of single-shot galleries.")]
Seed = Annotated[int, typer.Option(help="Of these draws.")]
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
    protocol: Protocol = "all",
    draws: Draws = 10,
    seed: Seed = 0,
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
    method: Annotated[str, typer.Option(help="How.", metavar="|".join(METHODS))] = K_RECIPROCAL,
    k1: Annotated[
        int | None, typer.Option(min=1, help="Neighbours that may be reciprocal (default: 20), or of the graph (26).")
    ] = None,
    k2: Annotated[
        int | None, typer.Option(min=1, help="Neighbours averaged over, 1 for none (default: 6; gnn: 7).")
    ] = None,
    lambda_value: Annotated[
        float | None, typer.Option("--lambda", help="Weight of the original distance, 0 to 1 (default: 0.3).")
    ] = None,
    power: Annotated[
        int | None, typer.Option(help="2, or 4 for distances squared once more (default: 2).", metavar="2|4")
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(help="Divide by each row's largest distance (default: max).", metavar="max|none")
    ] = None,
    list_length: Annotated[
        str | None, typer.Option(help="Whether k1 counts the row itself (default: k1+1).", metavar="k1+1|k1")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, help="Rows added to a query (default: 10), or entries of a list that count (25)."),
    ] = None,
    t: Annotated[
        int | None, typer.Option("--t", min=1, help="Expanded neighbours: those of a row itself (default: 3).")
    ] = None,
    q: Annotated[
        int | None, typer.Option("--q", min=1, help="Expanded neighbours: those of each of them (default: 8).")
    ] = None,
    expanded_distance: Annotated[
        str | None,
        typer.Option(help="What they average (default: rank).", metavar="|".join(query_expansion.METHODS)),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Exponent of the cosines as weights (default: 3).")] = None,
    augment: Annotated[
        int | None, typer.Option(min=1, help="First replace gallery rows by the sum of so many nearest ones.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many of the gallery a query; default: all.")
    ] = None,
    max_rank: MaxRank = 50,
    ap: Precision = "standard",
    denominator: Denominator = "valid",
    camera_rule: CameraRule = "same",
    junk_label: JunkLabel = None,
    ranks_of: RanksOf = "images",
    protocol: Protocol = "all",
    draws: Draws = 10,
    seed: Seed = 0,
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
    """Re-ranking of a gallery, and with ids what it gains.

    k-reciprocal (Zhong et al., 2017) takes squared Euclidean distances, the others cosines: gnn (Zhang et al., 2020),
    expanded-neighbors (Sarfraz et al., 2018) and query-expansion (Radenovic et al., 2018).
    """
    check_output(out, force, plots=False)
    given = {"k1": k1, "k2": k2, "lambda_value": lambda_value, "power": power, "normalize": normalize}
    given |= {"list_length": list_length, "k": k, "t": t, "q": q, "expanded_distance": expanded_distance}
    given |= {"alpha": alpha, "augment": augment}
    settings = _settings(method, given)
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
        "ranks_of": ranks_of,
        "protocol": protocol,
        "draws": draws,
        "seed": seed,
    }
    rows = {}
    if known:
        labels = _labels(query, x, gallery, y, camera_rule)
        metric = "sqeuclidean" if method == K_RECIPROCAL else "cosine"
        rows["original"] = _of_features(x, y, labels, measured | {"metric": metric})
        _check_valid(rows["original"])
    with progress_bar() as bar:
        bar.add_task(f"re-ranking {len(x)} + {len(y)} rows", total=None)
        distances, indices = RERANKINGS[method](x.features, y.features, top_k, **settings)
    if known:
        rows["re-ranked"] = metrics.retrieval_metrics(distances, *labels, indices=indices, **measured)  # type: ignore[arg-type]
    content = {"files": {"query": str(query), "gallery": str(gallery)}}
    content |= {"settings": {"method": method, **settings, "top_k": top_k} | measured}
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


def _settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the method takes: options given, else their defaults."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    defaults = METHODS[method]
    for name, value in given.items():
        if value is not None and name not in defaults:
            option = {"lambda_value": "lambda"}.get(name, name).replace("_", "-")
            raise ValueError(f"--{option} does not go with --method {method}")
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


Ranking = tuple[Tensor, Tensor | None]  # distances [nq, ng], or of the best [nq, K] with their indices


def _k_reciprocal(query: Tensor, gallery: Tensor, top_k: int | None, **settings: Any) -> Ranking:
    found = k_reciprocal_rerank(query, gallery, top_k=top_k, **settings)
    return found if isinstance(found, tuple) else (found, None)


def _gnn(query: Tensor, gallery: Tensor, top_k: int | None, **settings: Any) -> Ranking:
    """Similarities of the opposite sign."""
    found = gnn_rerank(query, gallery, top_k=top_k, **settings)
    return (-found[0], found[1]) if isinstance(found, tuple) else (-found, None)


def _expanded(query: Tensor, gallery: Tensor, top_k: int | None, expanded_distance: str, **settings: Any) -> Ranking:
    if expanded_distance not in query_expansion.METHODS:
        known = ", ".join(query_expansion.METHODS)
        raise ValueError(f"--expanded-distance must be one of {known}, not {expanded_distance!r}")
    found = query_expansion.expanded_neighbors_rerank(query, gallery, method=expanded_distance, top_k=top_k, **settings)
    return found if isinstance(found, tuple) else (found, None)


def _expansion(query: Tensor, gallery: Tensor, top_k: int | None, k: int, alpha: float, augment: int | None) -> Ranking:
    """Cosine distances of expanded queries, the gallery augmented if asked for."""
    if augment is not None:
        gallery = query_expansion.database_augmentation(gallery, k=augment, alpha=alpha)
    query = query_expansion.alpha_query_expansion(query, gallery, k=k, alpha=alpha)
    gallery = torch.nn.functional.normalize(gallery.to(query.dtype), dim=1)
    if top_k is not None:
        return knn(query, min(top_k, len(gallery)), y=gallery, metric="cosine")
    return 1 - query @ gallery.T, None


RERANKINGS: dict[str, Callable[..., Ranking]] = {
    K_RECIPROCAL: _k_reciprocal,
    GNN: _gnn,
    EXPANDED: _expanded,
    EXPANSION: _expansion,
}


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
