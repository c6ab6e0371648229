"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.gnn_rerank`, and what CUDA tensors go to.

The layers are sparse matrices in float64; only the rows of some queries are dense at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_VALUES_AT_ONCE = 1 << 25


def gnn_rerank(index: Tensor, key: Tensor, distance: Tensor, expand: int, lambda_value: float) -> None:
    """Cosine distances [nq, ng] become (1 - lambda) <A_i, A_g> + lambda cos(i, g)."""
    for rows, similarity in _similarities(index, key, len(distance), expand):
        mixed = (1 - lambda_value) * similarity + lambda_value * (1 - distance[rows].double())
        distance[rows] = mixed.float()


def gnn_rerank_top_k(
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
    """The largest top_k of every row; here every row looks at all cosines."""
    score = key.new_full((len(query), top_k), -torch.inf)
    found = torch.full_like(score, -1, dtype=torch.int64)
    count = min(top_k, len(gallery))
    unit_query, unit_gallery = (torch.nn.functional.normalize(x.double(), dim=1) for x in (query, gallery))
    for rows, similarity in _similarities(index, key, len(query), expand):
        mixed = (1 - lambda_value) * similarity + lambda_value * unit_query[rows] @ unit_gallery.T
        best = mixed.sort(dim=1, descending=True, stable=True)
        score[rows, :count], found[rows, :count] = best.values[:, :count], best.indices[:, :count]
    return score, found


def _similarities(index: Tensor, key: Tensor, nq: int, expand: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers of queries and their products <A_i, A_g> with the gallery."""
    N = len(index)
    a = _matrix(index, torch.ones_like(key))
    if expand > 1:
        mean = _matrix(index[:, :expand], (1 - key[:, :expand]).square())
        for _ in range(2):
            a = torch.sparse.mm(mean, (a + a.T).coalesce()).coalesce()
            row, _ = a.indices()
            norm = torch.zeros(N, dtype=torch.float64, device=a.device).index_add_(0, row, a.values().square()).sqrt()
            a = torch.sparse_coo_tensor(
                a.indices(), a.values() / norm[row], (N, N), is_coalesced=True, check_invariants=False
            )
    everything = torch.arange(N, device=index.device)
    gallery = a.index_select(0, everything[nq:]).coalesce()
    for rows in everything[:nq].split(max(1, _VALUES_AT_ONCE // max(N, 1))):
        own = a.index_select(0, rows).to_dense()  # [rows, N]
        yield rows, torch.sparse.mm(gallery, own.T).T


def _matrix(column: Tensor, value: Tensor) -> Tensor:
    """Sparse [N, N] with value [N, K] at the columns [N, K]."""
    N = len(column)
    row = torch.arange(N, device=column.device)[:, None].expand_as(column)
    indices = torch.stack([row.reshape(-1), column.reshape(-1)])
    return torch.sparse_coo_tensor(indices, value.reshape(-1), (N, N), check_invariants=False).coalesce()
