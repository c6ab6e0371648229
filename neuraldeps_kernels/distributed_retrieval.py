"""Exact neighbours and re-ranking over the processes of a torch.distributed group, the rows sharded over the ranks.

Every rank brings its own rows; together, in the order of the ranks, they are the rows of the problem. The features of
all are collected on every rank (N D values, which take their memory up to three times while they are put together), and
each rank searches for its own rows: lists are those of one process to the last neighbour. W ranks share N^2 products,
of which one process, that uses their symmetry, needs half: there is a gain from three ranks on. To form each pair of
shards on one rank only would take a kernel that keeps the lists of both sides, and a second exchange to merge them.

    1. every rank checks its arguments; sizes and checksums are exchanged (one small all_gather);
    2. the features of all ranks are exchanged (one all_gather, padded to the largest shard);
    3. every rank finds the neighbours of its rows; for a re-ranking, lists are exchanged, every rank encodes all of
       them (a sparse stage of a few per cent of the work) and ranks the gallery for its own queries.

Errors and lost ranks are as in `neuraldeps_kernels.distributed`. Results are detached and lie where the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuraldeps_kernels.distributed import _check_agreement, _checksum, _Ranks
from neuraldeps_kernels.ops.chunked_retrieval import squared_distances
from neuraldeps_kernels.ops.retrieval import (
    METRICS,
    _at_least_float32,
    _check_alike,
    _check_range,
    _check_rows,
    _nothing,
    _Options,
)
from neuraldeps_kernels.profiling import annotated

__all__ = ["sharded_k_reciprocal_rerank", "sharded_knn"]

_VALUES_AT_ONCE = 1 << 26  # distances held at once for the best of every row


@annotated
@torch.no_grad()
def sharded_knn(
    x: Tensor,
    k: int,
    *,
    y: Tensor | None = None,
    metric: str = "sqeuclidean",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest of all rows for the rows of this rank.

    Args:
        x: [n, D], rows of this rank; n may differ between ranks and be 0.
        k: as in `knn`, up to the number of rows searched on all ranks.
        y: [m, D], this rank's part of the rows searched; None: those of x.
        metric: as in `knn`.
        group: the processes taking part, default all; each of them has to call this.

    Returns:
        (distances, indices), [n, k], for the rows of this rank: those rows of `knn` over the rows of all ranks, whose
        numbers count through the ranks in turn.

    Raises:
        ValueError, TypeError: as `knn`, on all ranks even if one alone meets it; ValueError also where an argument
            differs between ranks.
        RuntimeError: as `neuraldeps_kernels.distributed.covlasso`.
    """
    ranks = _Ranks("sharded_knn", group)
    base = x if y is None else y

    def checked() -> None:
        _check_rows("x", x)
        _check_rows("y", base)
        _check_alike(x, base, "x", "y")
        _check_range("k", k, None, "")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")

    (sizes,) = _agreed(ranks, checked, (base,), {"x": x, "k": k, "metric": metric, "whether y is given": y is not None})
    everything = _collected(ranks, base.detach(), sizes)

    def searched() -> tuple[tuple[Tensor, Tensor], list[int]]:
        _check_range("k", k, len(everything), "the number of rows to search on all ranks")
        return torch.ops.neuraldeps.neighbors(x.detach(), everything, k, metric, True), []

    (distances, indices), _ = ranks.together(searched)
    return distances.to(torch.promote_types(x.dtype, torch.float32)), indices


@annotated
@torch.no_grad()
def sharded_k_reciprocal_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    top_k: int | None = None,
    power: int = 2,
    normalize: str = "max",
    list_length: str = "k1+1",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Re-ranked distances of the queries of this rank with the gallery of all ranks.

    Args:
        query, gallery: [nq, D] and [ng, D], rows of this rank; their numbers may differ between ranks and be 0.
        k1, k2, lambda_value, top_k, power, normalize, list_length: as in `k_reciprocal_rerank`.
        group: as in `sharded_knn`.

    Returns:
        As `k_reciprocal_rerank` over the rows of all ranks, its rows of this rank's queries; gallery rows count through
        the ranks in turn. The same neighbours, values within rounding of float32.

    Raises:
        ValueError, TypeError, RuntimeError: as `sharded_knn` and `k_reciprocal_rerank`.
    """
    ranks = _Ranks("sharded_k_reciprocal_rerank", group)
    arguments: dict[str, Any] = {"k1": k1, "k2": k2, "lambda_value": lambda_value, "top_k": top_k, "power": power}
    arguments |= {"normalize": normalize, "list_length": list_length}

    def checked() -> None:
        _Options(k1, k2, lambda_value, power, normalize, list_length)
        _check_rows("query", query)
        _check_rows("gallery", gallery)
        _check_alike(gallery, query, "gallery", "query")
        if top_k is not None:
            _check_range("top_k", top_k, None, "")

    query_sizes, gallery_sizes = _agreed(ranks, checked, (query, gallery), {"query": query, **arguments})
    nq, ng = sum(query_sizes), sum(gallery_sizes)
    if nq == 0 or ng == 0:
        return _nothing(query, len(query), ng, top_k)
    options = _Options(k1, k2, lambda_value, power, normalize, list_length)
    own_query, own_gallery = _at_least_float32(query.detach()), _at_least_float32(gallery.detach())
    x = torch.cat([_collected(ranks, own_query, query_sizes), _collected(ranks, own_gallery, gallery_sizes)])
    first = sum(query_sizes[: ranks.rank])  # of this rank's queries

    def searched() -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
        own, k = torch.cat([own_query, own_gallery]), min(max(k1 + 1, k2), len(x))
        return torch.ops.neuraldeps.neighbors_and_largest(own, x, k, True), []

    lists, _ = ranks.together(searched)
    key, index, largest = (
        torch.cat(
            [
                _collected(ranks, part[: len(query)], query_sizes),
                _collected(ranks, part[len(query) :], gallery_sizes),
            ]
        )
        for part in lists
    )

    def ranked() -> tuple[Tensor | tuple[Tensor, Tensor], list[int]]:
        encoding = options.encoding(index, key, largest, x[:nq], x[nq:])
        return _ranked(options, encoding, largest, x, nq, first, len(query), top_k), []

    return ranks.together(ranked)[0]


def _ranked(
    options: _Options,
    encoding: tuple[Tensor, Tensor, Tensor],
    largest: Tensor,
    x: Tensor,
    nq: int,
    first: int,
    count: int,
    top_k: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Distances of the queries first .. first + count - 1 with the gallery x[nq:], or the best of them."""
    ng, gallery = len(x) - nq, x[nq:]
    if top_k is None:
        return _mixed(options, encoding, largest, x[first : first + count], gallery, nq, first)
    distances = x.new_full((count, top_k), torch.inf, dtype=torch.float64)
    indices = torch.full_like(distances, -1, dtype=torch.int64)
    found, step = min(top_k, ng), max(1, _VALUES_AT_ONCE // len(x))
    for begin in range(0, count, step):
        end = min(count, begin + step)
        dense = _mixed(options, encoding, largest, x[first + begin : first + end], gallery, nq, first + begin)
        best = dense.sort(dim=1, stable=True)
        distances[begin:end, :found] = best.values[:, :found].double()
        indices[begin:end, :found] = best.indices[:, :found]
    return distances, indices


def _mixed(
    options: _Options,
    encoding: tuple[Tensor, Tensor, Tensor],
    largest: Tensor,
    query: Tensor,
    gallery: Tensor,
    nq: int,
    first: int,
) -> Tensor:
    """Distances of queries first, first + 1, ... with the gallery.

    Rows of the encoding are these queries, the gallery and, in place of the other queries, empty ones: columns keep
    their numbers.
    """
    count, ng = len(query), len(gallery)
    crow, col, value = encoding
    size = crow.diff()
    own, rest = slice(int(crow[first]), int(crow[first + count])), slice(int(crow[nq]), None)
    sizes = torch.cat([size[first : first + count], size[nq:], size.new_zeros(nq - count)])
    start = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    dense = query.new_zeros((count, ng + nq - count), dtype=torch.float32)
    dense[:, :ng] = squared_distances(query, gallery, query.device, ng)
    parts = (torch.cat([col[own], col[rest]]), torch.cat([value[own], value[rest]]))
    return options.mixed((start, *parts), largest[first : first + count], dense)[:, :ng].contiguous()


def _agreed(
    ranks: _Ranks, check: Callable[[], None], rows: tuple[Tensor, ...], arguments: dict[str, Any]
) -> list[list[int]]:
    """Numbers of rows of every rank, for each of `rows`; arguments are checked here and between ranks.

    Of an argument that is a tensor, the number of columns, the dtype and the kind of device have to agree.
    """

    def prepared() -> tuple[None, list[int]]:
        check()
        facts = [(v.shape[1], v.dtype, v.device.type) if isinstance(v, Tensor) else v for v in arguments.values()]
        return None, [*map(len, rows), *map(_checksum, facts)]

    _, table = ranks.together(prepared)
    _check_agreement(list(arguments), [numbers[len(rows) :] for numbers in table])
    return [[numbers[place] for numbers in table] for place in range(len(rows))]


def _collected(ranks: _Ranks, x: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all ranks, in the order of the ranks."""
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    parts = ranks.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
