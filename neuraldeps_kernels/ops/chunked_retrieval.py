"""Exact neighbours and re-ranking of features that stay in host memory: blocks of them move to a device in turn.

A block of rows meets every block of the rows searched, and the lists of both are merged by (distance, index): the same
lists as from one call, for any block size. The device holds two blocks and, on CUDA, the distances of
one with the other; the sparse stages of re-ranking run on the CPU, where the features are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuraldeps_kernels.ops.retrieval import (
    _LONGER_LISTS,
    METRICS,
    _at_least_float32,
    _check_alike,
    _check_range,
    _check_rows,
    _nothing,
    _Options,
)
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import retrieval as reference

_VALUES_AT_ONCE = 1 << 25


@annotated
def knn_chunked(
    x: Tensor,
    k: int,
    *,
    y: Tensor | None = None,
    metric: str = "sqeuclidean",
    device: torch.device | str = "cuda",
    block_rows: int = 65536,
) -> tuple[Tensor, Tensor]:
    """`knn` of features in host memory that the device has no room for.

    Args:
        x, k, y, metric: as in `knn`, `x` and `y` on the CPU.
        device: where blocks are compared.
        block_rows: rows of a block; two blocks are on the device at a time.

    Returns:
        (distances, indices), [N, k], on the CPU, as `knn` gives them, detached.

    Raises:
        ValueError, TypeError: as `knn`; also where `x` or `y` is not on the CPU or `block_rows` is not positive.
    """
    base = x if y is None else y
    _check_on_host("x", x)
    _check_on_host("y", base)
    _check_alike(x, base, "x", "y")
    _check_range("k", k, len(base), "the number of rows to search")
    _check_range("block_rows", block_rows, None, "")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    key, index, _ = _lists(x.detach(), base.detach(), k, metric, torch.device(device), block_rows)
    return key.to(torch.promote_types(x.dtype, torch.float32)), index


@annotated
def k_reciprocal_rerank_chunked(
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
    device: torch.device | str = "cuda",
    block_rows: int = 65536,
) -> Tensor | tuple[Tensor, Tensor]:
    """`k_reciprocal_rerank` of features in host memory that the device has no room for.

    Args:
        query, gallery, k1, k2, lambda_value, top_k, power, normalize, list_length: as in `k_reciprocal_rerank`, the
            features on the CPU.
        device, block_rows: as in `knn_chunked`.

    Returns:
        As `k_reciprocal_rerank`, on the CPU: the same neighbours, values within rounding of float32.

    Raises:
        ValueError, TypeError: as `k_reciprocal_rerank` and `knn_chunked`.
    """
    options = _Options(k1, k2, lambda_value, power, normalize, list_length)
    _check_on_host("query", query)
    _check_on_host("gallery", gallery)
    _check_alike(gallery, query, "gallery", "query")
    _check_range("block_rows", block_rows, None, "")
    if top_k is not None:
        _check_range("top_k", top_k, None, "")
    nq, ng = len(query), len(gallery)
    if nq == 0 or ng == 0:
        return _nothing(query, nq, ng, top_k)
    x = _at_least_float32(torch.cat([query.detach(), gallery.detach()]))
    k = min(max(k1 + 1, k2), len(x))
    query_k = k if top_k is None else min(max(_LONGER_LISTS * top_k, k), len(x))
    where = (torch.device(device), block_rows)
    query_key, query_index, query_largest = _lists(x[:nq], x, query_k, "sqeuclidean", *where)
    key, index, largest = _lists(x[nq:], x, k, "sqeuclidean", *where)
    key, index = torch.cat([query_key[:, :k], key]), torch.cat([query_index[:, :k], index])
    largest = torch.cat([query_largest, largest])
    encoding = options.encoding(index, key, largest, x[:nq], x[nq:])
    if top_k is not None:
        return options.best(encoding, query_index, query_key, largest, x[:nq], x[nq:], top_k)
    return options.mixed(encoding, largest, squared_distances(x[:nq], x[nq:], *where))


def squared_distances(x: Tensor, y: Tensor, device: torch.device, block_rows: int) -> Tensor:
    """float32 [N, M] where x is, from float64 on the device."""
    result = x.new_empty((len(x), len(y)), dtype=torch.float32)
    for begin in range(0, len(y), block_rows):
        base = y[begin : begin + block_rows].to(device).double()
        rows = max(1, min(block_rows, _VALUES_AT_ONCE // len(base)))
        for first in range(0, len(x), rows):
            own = x[first : first + rows].to(device).double()
            near = reference._products(own, base, "sqeuclidean").clamp_min_(0)
            result[first : first + rows, begin : begin + len(base)] = near.float().to(x.device)
    return result


def _check_on_host(name: str, x: Tensor) -> None:
    _check_rows(name, x)
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {x.device}")


def _lists(
    x: Tensor, y: Tensor, k: int, metric: str, device: torch.device, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys float64 and indices [N, k] of the nearest rows of y, and the largest squared distance [N] (or zeros)."""
    key = torch.full((len(x), k), torch.inf, dtype=torch.float64)
    index, largest = torch.full_like(key, -1, dtype=torch.int64), torch.zeros(len(x), dtype=torch.float64)
    for begin in range(0, len(x), block_rows):
        rows = slice(begin, begin + block_rows)
        own = x[rows].to(device)
        near = key[rows, :0].to(device), index[rows, :0].to(device)
        far = largest[rows].to(device)
        for first in range(0, len(y), block_rows):
            base = y[first : first + block_rows].to(device)
            count = min(k, len(base))
            if metric == "sqeuclidean":
                block_key, block_index, block_far = torch.ops.neuraldeps.neighbors_and_largest(own, base, count, True)
                far = torch.maximum(far, block_far)
            else:
                block_key, block_index = torch.ops.neuraldeps.neighbors(own, base, count, metric, True)
            near = _merged(near, (block_key, block_index + first), k)
        key[rows], index[rows], largest[rows] = near[0].cpu(), near[1].cpu(), far.cpu()
    return key, index, largest


def _merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of two lists, of which b has the higher indices."""
    key, index = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    order = key.argsort(dim=1, stable=True)[:, :k]
    return key.gather(1, order), index.gather(1, order)
