"""GNN re-ranking without an N x N matrix: neighbours of neighbours as features of a row.

Operators (csrc/torch/gnn_rerank.cpp): `gnn_rerank`, `gnn_rerank_top_k`. Rows are the queries, then the gallery,
N = nq + ng, u_i their directions, r(i, a) the a-th nearest row of i by cosine, itself included:

    A_0(i, r(i, a)) = 1 for a < k1           w(i, a) = <u_i, u_r(i,a)>^2
    A_{l+1}(i) = sum_{a<k2} w(i, a) B_l(r(i, a)) / norm,     B_l = A_l + A_l^T,     l = 0, 1
    score(i, g) = (1 - lambda) <A_2(i), A_2(g)> + lambda <u_i, u_g>

With k2 = 1 there is no layer and A_0 stands for A_2. On CUDA the host waits for the size of A_1. Source: Zhang et al.,
"Understanding Image Retrieval Re-Ranking: A Graph Neural Network Perspective" (2020), with the exponent alpha = 2. The
sparse form (csrc/cpu/gnn_rerank.cpp, csrc/cuda/gnn_rerank.cu), its lists and the exact top rows are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuraldeps_kernels.ops.retrieval import (
    _at_least_float32,
    _check_accepted,
    _check_alike,
    _check_range,
    _check_rows,
    _library,
    _on_cuda,
)
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import gnn_rerank as reference

_LONGER_LISTS = 3  # neighbours of a query for each of its top_k rows


@annotated
def gnn_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 26,
    k2: int = 7,
    lambda_value: float = 0.3,
    top_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Re-ranked similarities of every query with the gallery (module docstring): larger is better.

    Args:
        query, gallery: [nq, D] and [ng, D], float32, float64, bfloat16 or float16, one dtype and device. Only the
            directions of rows count.
        k1: neighbours of a row in the graph, itself included; lists end at N. 60 is usual for vehicles.
        k2: neighbours summed in a layer, 1 to k1; 1: no layer. 10 is usual for vehicles.
        lambda_value: weight of the cosine, 0 to 1.
        top_k: return only the largest so many of each row, without an nq x ng matrix; None: all.

    Returns:
        [nq, ng] float32, or with `top_k` (scores, indices), [nq, top_k] descending, equal ones by index, float64 and
        int64, padded with -infinity and -1 beyond ng. Both agree with the float64 definition to about 1e-6. Detached.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of range, a row is zero or not finite.
        TypeError: an argument is no tensor of these dtypes.

    Source: Zhang et al., 2020.
    """
    _check_rows("query", query)
    _check_rows("gallery", gallery)
    _check_alike(gallery, query, "gallery", "query")
    _check_range("k1", k1, None, "")
    _check_range("k2", k2, k1, "k1")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value must be in [0, 1], not {lambda_value}")
    if top_k is not None:
        _check_range("top_k", top_k, None, "")
    nq, ng = len(query), len(gallery)
    N, count = nq + ng, top_k or 0
    if nq == 0 or ng == 0:
        scores = query.new_full((nq, count), -torch.inf, dtype=torch.float64)
        none = torch.full_like(scores, -1, dtype=torch.int64)
        return query.new_empty((nq, ng), dtype=torch.float32) if top_k is None else (scores, none)
    query, gallery = _at_least_float32(query.detach()), _at_least_float32(gallery.detach())
    k, expand = min(k1, N), min(k2, N)
    query_k = 0 if top_k is None else min(max(_LONGER_LISTS * count, k), N)
    key, index, _, query_key, query_index, dense = torch.ops.neuraldeps.neighbor_lists(
        query, gallery, k, query_k, top_k is None, True, "cosine"
    )
    _check_accepted(key, "cosine", query=query, gallery=gallery)
    if top_k is None:
        torch.ops.neuraldeps.gnn_rerank(index, key, dense, expand, float(lambda_value))
        return dense  # type: ignore[no-any-return]
    best: tuple[Tensor, Tensor] = torch.ops.neuraldeps.gnn_rerank_top_k(
        index, key, query_index, query_key, query, gallery, top_k, expand, float(lambda_value)
    )
    return best


def _mixed_like(index: Tensor, key: Tensor, distance: Tensor, expand: int, lambda_value: float) -> None:
    pass


def _best_like(
    index: Tensor,
    key: Tensor,
    query_index: Tensor,
    query_key: Tensor,
    query: Tensor,
    gallery: Tensor,
    top_k: int,
    expand: int,
    lambda_value: float,
) -> tuple[Tensor, Tensor]:
    score = key.new_empty((query.shape[0], top_k))
    return score, torch.empty_like(score, dtype=torch.int64)


for _name in ("gnn_rerank", "gnn_rerank_top_k"):
    _library.impl(_name, _on_cuda(_name, getattr(reference, _name)), "CUDA")
torch.library.register_fake("neuraldeps::gnn_rerank", _mixed_like)
torch.library.register_fake("neuraldeps::gnn_rerank_top_k", _best_like)
