"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.retrieval`, and what CUDA tensors go to.

Distances are float64; sets are masks over neighbour lists and sparse entries, so no N x N matrix is formed here either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

_VALUES_AT_ONCE = 1 << 25
_SPARE = 16  # candidates beyond those wanted: more than rounding of the products can move

Csr = tuple[Tensor, Tensor, Tensor]  # crow int64 [N + 1], col int32, value float32


def distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Keys of float64 rows a [..., D] and b [..., D]."""
    if metric == "inner_product":
        return -(a * b).sum(-1)
    if metric == "cosine":
        a, b = unit(a, dim=-1), unit(b, dim=-1)
    squared = (a - b).square().sum(-1)
    return squared / 2 if metric == "cosine" else squared


def neighbors(x: Tensor, y: Tensor | None, k: int, metric: str, reduced: bool) -> tuple[Tensor, Tensor]:
    """Keys float64 [N, k] and indices of the k nearest rows of y, or of x."""
    return _nearest(x, x if y is None else y, k, metric)[:2]


def neighbors_and_largest(x: Tensor, y: Tensor, k: int, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same with squared distances, and the largest of every row [N]."""
    return _nearest(x, y, k, "sqeuclidean")


def neighbor_lists(
    query: Tensor, gallery: Tensor, k: int, query_k: int, dense: bool, reduced: bool, metric: str = "sqeuclidean"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lists of all rows within all, largest distances [N], longer lists and all gallery distances of the queries."""
    x, nq = torch.cat([query, gallery]), len(query)
    key, index, largest = _nearest(x, x, max(k, query_k), metric)
    everything = torch.arange(len(gallery), device=x.device)[: None if dense else 0].expand(nq if dense else 0, -1)
    block = _keys(query[: len(everything)].double(), gallery.double(), everything, metric).float()
    return (
        key[:, :k].contiguous(),
        index[:, :k].contiguous(),
        largest,
        key[:nq, :query_k].contiguous(),
        index[:nq, :query_k].contiguous(),
        block,
    )


def _nearest(x: Tensor, y: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and indices [N, k], and the largest key of every row [N]."""
    key = x.new_empty((len(x), k), dtype=torch.float64)
    index, largest = torch.empty_like(key, dtype=torch.int64), key.new_empty(len(x))
    base = y.double()
    for rows in torch.arange(len(x), device=x.device).split(max(1, _VALUES_AT_ONCE // max(len(y), 1))):
        own = x[rows].double()
        near = _products(own, base, metric)  # [rows, M]
        found = near.topk(min(k + _SPARE, len(y)), dim=1, largest=False).indices.sort(1).values  # ties by index
        far = near.topk(min(_SPARE, len(y)), dim=1).indices
        exact = _keys(own, base, found, metric)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        key[rows], index[rows] = exact.gather(1, order), found.gather(1, order)
        largest[rows] = _keys(own, base, far, metric).amax(1)
    return key, index, largest


def _products(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Keys up to rounding and, within a row, up to order [rows, M]."""
    if metric == "inner_product":
        return -(a @ b.T)
    if metric == "cosine":
        a, b = unit(a, dim=1), unit(b, dim=1)
    centre = b.mean(0)
    a, b = a - centre, b - centre
    return a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)


def _keys(x: Tensor, y: Tensor, index: Tensor, metric: str) -> Tensor:
    """Keys of rows x [rows, D] with y[index], index [rows, k]."""
    key = x.new_empty(index.shape)
    for rows, found in _pieces(x, index):
        key[rows] = distances(x[rows][:, None], y[found], metric)
    return key


def _pieces(x: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers and their part of index [rows, k], so many that differences with x [rows, D] fit."""
    count = max(1, _VALUES_AT_ONCE // max(1, index.shape[1] * x.shape[1]))
    for rows in torch.arange(len(x), device=x.device).split(count):
        yield rows, index[rows]


# ------------------------------------------------------------------------------------------------ re-ranking


def reciprocal_encoding(
    index: Tensor,
    key: Tensor,
    largest: Tensor,
    query: Tensor | None,
    gallery: Tensor | None,
    forward: int,
    half: int,
    expand: int,
    normalize: bool,
    power: int,
) -> Csr:
    """Expanded weights V' of the k-reciprocal neighbours of every row."""
    N = len(index)
    row, col = _members(index, forward, half)
    d = _listed_keys(index, key, row, col)
    if query is not None and gallery is not None:
        unlisted = d.isnan().nonzero()[:, 0]
        x = torch.cat([query, gallery]).double()
        d[unlisted] = _keys(x[row[unlisted]], x, col[unlisted][:, None], "sqeuclidean")[:, 0]
    else:
        d = torch.where(d.isnan(), key[row, -1], d)
    weight = torch.exp(-original(d, largest[row], normalize, power))
    total = torch.zeros(N, dtype=torch.float64, device=index.device).index_add_(0, row, weight)
    v = torch.sparse_coo_tensor(torch.stack([row, col]), weight / total[row], (N, N), check_invariants=False)
    if min(expand, index.shape[1]) > 1:
        first = index[:, :expand]
        rows = torch.arange(N, device=index.device)[:, None].expand_as(first)
        mean = torch.sparse_coo_tensor(
            torch.stack([rows.reshape(-1), first.reshape(-1)]),
            torch.full((first.numel(),), 1 / first.shape[1], dtype=torch.float64, device=index.device),
            (N, N),
            check_invariants=False,
        )
        v = torch.sparse.mm(mean, v)
    v = v.coalesce()
    return _csr(v.indices()[0], v.indices()[1], v.values(), N)


def original(d: Tensor, largest: Tensor, normalize: bool, power: int) -> Tensor:
    """t of squared distances."""
    t = torch.where(largest > 0, d / largest, 0.0) if normalize else d
    return t.square() if power == 4 else t


def _members(index: Tensor, forward: int, half: int) -> tuple[Tensor, Tensor]:
    """Entries (i, g) of all R*(i), by row and column."""
    N = len(index)
    near, nearer = index[:, :forward], index[:, :half]
    reciprocal, half_reciprocal = _reciprocal(near), _reciprocal(nearer)
    pairs = [torch.stack([i, near[i, a]]) for i, a in [reciprocal.nonzero().T]]
    for rows in torch.arange(N, device=index.device).split(max(1, (1 << 22) // max(1, near[0].numel() ** 3))):
        c = near[rows]  # [rows, a]
        other, there = nearer[c], half_reciprocal[c]  # [rows, a, b]
        own = torch.where(reciprocal[rows], c, -1)
        shared = (other[..., None] == own[:, None, None, :]).any(-1) & there
        taken = reciprocal[rows] & (3 * shared.sum(-1) > 2 * there.sum(-1))
        r, a, b = (taken[..., None] & there).nonzero().T
        pairs.append(torch.stack([rows[r], other[r, a, b]]))
    entries = torch.cat(pairs, 1)
    code = torch.unique(entries[0] * N + entries[1])
    return code // max(N, 1), code % max(N, 1)


def _reciprocal(near: Tensor) -> Tensor:
    """bool [N, a]: whether i is among the neighbours of near[i, a]."""
    rows = torch.arange(len(near), device=near.device)
    return torch.stack([(near[near[:, a]] == rows[:, None]).any(1) for a in range(near.shape[1])], 1)


def _listed_keys(index: Tensor, key: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Keys of pairs from the list of either, or NaN."""
    result = torch.full(row.shape, torch.nan, dtype=torch.float64, device=index.device)
    for begin, end in ((col, row), (row, col)):
        hit = index[begin] == end[:, None]
        result = torch.where(hit.any(1), (key[begin] * hit).nan_to_num().sum(1), result)
    return result


def _csr(row: Tensor, col: Tensor, value: Tensor, N: int) -> Csr:
    crow = torch.zeros(N + 1, dtype=torch.int64, device=row.device)
    crow[1:] = torch.bincount(row, minlength=N).cumsum(0)
    return crow, col.int(), value.float()


def _shared(encoding: Csr, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers i and s(i, j) [rows, N - first] of all j >= first."""
    crow, col, value = encoding
    N = len(crow) - 1
    owner = torch.repeat_interleave(torch.arange(N, device=col.device), crow.diff())
    begin = int(crow[first])
    j, c, w = owner[begin:] - first, col[begin:].long(), value[begin:].double()
    for rows in torch.arange(N, device=col.device).split(max(1, _VALUES_AT_ONCE // max(1, len(w)))):
        dense = torch.zeros((len(rows), N), dtype=torch.float64, device=col.device)
        own = slice(int(crow[rows[0]]), int(crow[rows[-1] + 1]))
        dense[owner[own] - rows[0], col[own].long()] = value[own].double()
        least = torch.minimum(dense[:, c], w)
        yield rows, torch.zeros((len(rows), N - first), dtype=torch.float64, device=col.device).index_add_(1, j, least)


def jaccard_rerank(
    crow: Tensor,
    col: Tensor,
    value: Tensor,
    largest: Tensor,
    distance: Tensor,
    lambda_value: float,
    normalize: bool,
    power: int,
) -> None:
    """distance [nq, ng] becomes (1 - lambda) Jaccard + lambda t."""
    nq = len(distance)
    for rows, s in _shared((crow, col, value), nq):
        rows = rows[rows < nq]
        t = original(distance[rows].double(), largest[rows, None], normalize, power)
        s = s[: len(rows)]
        distance[rows] = ((1 - lambda_value) * (1 - s / (2 - s)).clamp_min(0) + lambda_value * t).float()


def jaccard_rerank_top_k(
    crow: Tensor,
    col: Tensor,
    value: Tensor,
    index: Tensor,
    key: Tensor,
    largest: Tensor,
    query: Tensor | None,
    gallery: Tensor | None,
    top_k: int,
    lambda_value: float,
    normalize: bool,
    power: int,
) -> Csr:
    """The smallest top_k of every row; here every row looks at all distances."""
    nq, N = len(index), len(crow) - 1
    result = key.new_full((nq, top_k), torch.inf)
    found = torch.full_like(result, -1, dtype=torch.int64)
    count = min(top_k, N - nq)
    for rows, s in _shared((crow, col, value), nq):
        rows = rows[rows < nq]
        if query is None or gallery is None:
            d = key[rows, -1:].expand(-1, N).clone().scatter_(1, index[rows], key[rows])[:, nq:]
        else:
            everything = torch.arange(N - nq, device=key.device).expand(len(rows), -1)
            d = _keys(query[rows].double(), gallery.double(), everything, "sqeuclidean")
        s = s[: len(rows)]
        t = original(d, largest[rows, None], normalize, power)
        mixed = (1 - lambda_value) * (1 - s / (2 - s)).clamp_min(0) + lambda_value * t
        best = mixed.sort(dim=1, stable=True)
        result[rows, :count], found[rows, :count] = best.values[:, :count], best.indices[:, :count]
    return result, found, torch.full((1,), nq, device=key.device)


def jaccard_distance(crow: Tensor, col: Tensor, value: Tensor) -> Csr:
    """Jaccard distances below 1 of all rows with all."""
    N = len(crow) - 1
    entries = []
    for rows, s in _shared((crow, col, value), 0):
        i, j = (s > 0).nonzero().T
        distance = (1 - s[i, j] / (2 - s[i, j])).clamp_min(0)
        entries.append((rows[i], j, torch.where(rows[i] == j, 0.0, distance)))
    row, column, distance = (torch.cat(part) for part in zip(*entries, strict=True))
    return _csr(row, column, distance, N)
