"""Query expansion, database augmentation and expanded-cross-neighbourhood re-ranking from exact neighbour lists.

With u_i the direction of row i, cos(i, j) = <u_i, u_j> and r(i, a) the a-th nearest row by cosine, ties by index:

    expanded query      q' ~ u_q + sum_{a<k} max(cos(q, r), 0)^alpha u_r,       r = r(q, a) in the gallery
    augmented gallery   g' ~ sum_{a<k} max(cos(g, r), 0)^alpha u_r,             r(g, 0) normally g itself

Expanded cross neighbours of i, in the list L_i of all rows (queries, then gallery): N(i) = the entries 1 .. t of L_i
and, for each of these, the entries 1 .. q of its own list, M = t + t q of them with repetitions. Then

    distance(p, g) = 1 / (2 M) ( sum_{j in N(p)} d(j, g) + sum_{j in N(g)} d(j, p) ),
    d(i, j) = 1 - cos(i, j)   or   1 - R(i, j) / R(i, i),   R(i, j) = sum_b max(k - pos_i(b), 0) max(k - pos_j(b), 0),

pos_i(b) = 0, 1, ... the position of b in L_i. Both are linear in what rows hold, so no N x N matrix is formed: with
cosines the sum over N(p) is a product with the mean direction of N(p), with ranks one with a sum of sparse rows.

Sources: Radenovic et al., PAMI 2018 (alpha); Arandjelovic and Zisserman, CVPR 2012 (augmentation); Sarfraz et al., CVPR
2018 (neighbourhoods), whose rank distance is -R: the scale is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from neuraldeps_kernels.ops.retrieval import _at_least_float32, _check_alike, _check_range, _check_rows
from neuraldeps_kernels.profiling import annotated

METHODS = ("rank", "orig")
_VALUES_AT_ONCE = 1 << 24


@annotated
def alpha_query_expansion(query: Tensor, gallery: Tensor, *, k: int, alpha: float = 3.0) -> Tensor:
    """Queries, each with its nearest gallery rows added to it (module docstring).

    Args:
        query, gallery: [nq, D] and [ng, D], float32, float64, bfloat16 or float16, one dtype and device.
        k: gallery rows added, 1 to ng.
        alpha: exponent of the cosines, 0 or more; 0 adds with equal weights.

    Returns:
        [nq, D] unit rows, float32 or for float64 input float64, detached.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, k or alpha is out of range, a row is zero or not finite.
        TypeError: an argument is no tensor of these dtypes.

    Source: Radenovic et al., PAMI 2018.
    """
    _check_rows("query", query)
    _check_rows("gallery", gallery)
    _check_alike(gallery, query, "gallery", "query")
    _check_range("k", k, len(gallery), "the number of gallery rows")
    _check_alpha(alpha)
    query, gallery = _at_least_float32(query.detach()), _at_least_float32(gallery.detach())
    return normalize(normalize(query, dim=1) + _weighted_neighbors(query, gallery, k, alpha), dim=1)


@annotated
def database_augmentation(gallery: Tensor, *, k: int, alpha: float = 3.0) -> Tensor:
    """Gallery rows, each replaced by the weighted sum of its nearest rows (module docstring).

    Args:
        gallery: [ng, D], float32, float64, bfloat16 or float16.
        k: rows summed, the row itself among them, 1 to ng.
        alpha: exponent of the cosines, 0 or more.

    Returns:
        [ng, D] unit rows, float32 or for float64 input float64, detached.

    Raises:
        ValueError, TypeError: as `alpha_query_expansion`.

    Source: Arandjelovic and Zisserman, CVPR 2012, with the weights of Radenovic et al.
    """
    _check_rows("gallery", gallery)
    _check_range("k", k, len(gallery), "the number of gallery rows")
    _check_alpha(alpha)
    gallery = _at_least_float32(gallery.detach())
    return normalize(_weighted_neighbors(gallery, None, k, alpha), dim=1)


@annotated
def expanded_neighbors_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    t: int = 3,
    q: int = 8,
    k: int = 25,
    method: str = "rank",
    top_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Distances of every query with the gallery over their expanded cross neighbours (module docstring).

    Args:
        query, gallery: [nq, D] and [ng, D], float32, float64, bfloat16 or float16, one dtype and device. Only the
            directions of rows count.
        t: neighbours of a row; q: neighbours of each of these. Lists end at N = nq + ng.
        k: entries of a list that count in the rank distance.
        method: d is the "rank" distance or the "orig" cosine distance.
        top_k: return only the smallest so many of each row; None: all.

    Returns:
        [nq, ng] float32, or with `top_k` (distances, indices), [nq, top_k] ascending, equal ones by index, float64 and
        int64, padded with infinity and -1 beyond ng. Rank distances are exact, cosines within about 1e-6. Detached.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of range, a row is zero or not finite.
        TypeError: an argument is no tensor of these dtypes.

    Source: Sarfraz et al., CVPR 2018.
    """
    _check_rows("query", query)
    _check_rows("gallery", gallery)
    _check_alike(gallery, query, "gallery", "query")
    for name, value in (("t", t), ("q", q), ("k", k), *(() if top_k is None else (("top_k", top_k),))):
        _check_range(name, value, None, "")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    nq, ng = len(query), len(gallery)
    count = min(ng if top_k is None else top_k, ng)
    distances = query.new_full((nq, top_k or 0), torch.inf, dtype=torch.float64)
    indices = torch.full_like(distances, -1, dtype=torch.int64)
    if nq == 0 or ng == 0:
        return query.new_empty((nq, ng), dtype=torch.float32) if top_k is None else (distances, indices)
    x = torch.cat([_at_least_float32(query.detach()), _at_least_float32(gallery.detach())])
    length = max(t + 1, q + 1, k if method == "rank" else 0)
    _, lists = torch.ops.neuraldeps.neighbors(x, None, min(length, len(x)), "cosine", True)
    near = lists[:, 1 : t + 1]
    expanded = torch.cat([near, lists[near, 1 : q + 1].flatten(1)], 1)  # [N, M]
    if method == "orig":
        own, other = _mean_directions(x, expanded, nq)
        if top_k is None:
            return (1 + (own @ other.T).neg_()).float()
        key, found = torch.ops.neuraldeps.neighbors(own, other, count, "inner_product", True)
        distances[:, :count], indices[:, :count] = 1 + key, found
        return distances, indices
    dense = query.new_empty((nq if top_k is None else 0, ng), dtype=torch.float32)
    for rows, block in _rank_distances(lists[:, :k], expanded, nq):
        if top_k is None:
            dense[rows] = block.float()
        else:
            best = block.sort(dim=1, stable=True)
            distances[rows, :count], indices[rows, :count] = best.values[:, :count], best.indices[:, :count]
    return dense if top_k is None else (distances, indices)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and 0 or more, not {alpha}")


def _inverse_norms(x: Tensor) -> Tensor:
    """float64 [N]; a zero row has no neighbours, so that it is refused before."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return norms.reciprocal()


def _weighted_neighbors(x: Tensor, y: Tensor | None, k: int, alpha: float) -> Tensor:
    """Sums of the directions of the k nearest rows of y (of x) with weights max(cos, 0)^alpha."""
    key, index = torch.ops.neuraldeps.neighbors(x, y, k, "cosine", True)
    base = x if y is None else y
    weight = (1 - key).clamp_min(0).pow(alpha) * _inverse_norms(base)[index]
    return embedding_bag(index, base, per_sample_weights=weight.to(base.dtype), mode="sum")


def _mean_directions(x: Tensor, expanded: Tensor, nq: int) -> tuple[Tensor, Tensor]:
    """Rows [nq, 2 D] and [ng, 2 D] whose products are the mean cosines with the expanded neighbours of either side."""
    inverse = _inverse_norms(x)
    weight = inverse[expanded] / (2 * expanded.shape[1])
    mean = embedding_bag(expanded, x, per_sample_weights=weight.to(x.dtype), mode="sum")
    unit = x * inverse.to(x.dtype)[:, None]
    return torch.cat([mean[:nq], unit[:nq]], 1), torch.cat([unit[nq:], mean[nq:]], 1)


def _rank_distances(lists: Tensor, expanded: Tensor, nq: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers of queries and their distances [rows, ng], from lists [N, k] and expanded neighbours [N, M]."""
    (N, length), M = lists.shape, expanded.shape[1]
    weight = torch.arange(length, 0, -1, dtype=torch.float64, device=lists.device)
    ranks = _sparse(lists, weight.expand_as(lists))
    neighbours = torch.sparse.mm(_sparse(expanded, torch.ones_like(expanded, dtype=torch.float64)), ranks).coalesce()
    scale = 1 / (2 * M * float(weight.square().sum()))
    everything = torch.arange(N, device=lists.device)
    own, own_neighbours = (a.index_select(0, everything[nq:]).to_sparse_csr() for a in (ranks, neighbours))
    for rows in everything[:nq].split(max(1, _VALUES_AT_ONCE // N)):
        of_query, of_neighbours = (a.index_select(0, rows).to_dense().T for a in (ranks, neighbours))  # [N, rows]
        yield rows, 1 - scale * (own @ of_neighbours + own_neighbours @ of_query).T


def _sparse(column: Tensor, value: Tensor) -> Tensor:
    """Sparse [N, N] with value [N, K] at the columns [N, K], added up where one is repeated."""
    N = len(column)
    row = torch.arange(N, device=column.device)[:, None].expand_as(column)
    indices = torch.stack([row.reshape(-1), column.reshape(-1)])
    return torch.sparse_coo_tensor(indices, value.reshape(-1), (N, N), check_invariants=False).coalesce()
