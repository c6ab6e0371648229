"""Query expansion, database augmentation and expanded cross neighbours against dense float64 definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensors import clustered
from torch import Tensor

from neuraldeps_kernels.ops.query_expansion import (
    METHODS,
    alpha_query_expansion,
    database_augmentation,
    expanded_neighbors_rerank,
)

Array = np.ndarray[Any, Any]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def directions(x: Tensor) -> Array:
    rows = x.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def weighted_sum(u: Array, v: Array, k: int, alpha: float) -> Array:
    """Rows of v, weighted by all cosines but those that are not among the k largest."""
    cosine = u @ v.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    weight = np.zeros(cosine.shape)
    np.put_along_axis(weight, order, np.maximum(np.take_along_axis(cosine, order, 1), 0) ** alpha, 1)
    return weight @ v


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def expanded(query: Tensor, gallery: Tensor, t: int, q: int, k: int, method: str) -> Array:
    """The definition with N x N distances and loops over neighbours."""
    nq = len(query)
    u = directions(torch.cat([query, gallery]))
    N = len(u)
    d = 1 - u @ u.T
    order = np.argsort(d, axis=1, kind="stable")
    if method == "rank":
        position = np.argsort(order, axis=1, kind="stable")
        factor = np.maximum(min(k, N) - position, 0).astype(float)
        similarity = factor @ factor.T
        d = 1 - similarity / similarity.diagonal()[:, None]
    near = [list(order[i, 1 : t + 1]) for i in range(N)]
    neighbours = [near[i] + [j for c in near[i] for j in order[c, 1 : q + 1]] for i in range(N)]
    result = np.zeros((nq, N - nq))
    for p in range(nq):
        for g in range(nq, N):
            of_p = sum(d[j, g] for j in neighbours[p])
            of_g = sum(d[j, p] for j in neighbours[g])
            result[p, g - nq] = (of_p + of_g) / (2 * len(neighbours[p]))
    return result


@pytest.mark.parametrize(("k", "alpha"), [(1, 3.0), (10, 3.0), (10, 0.0), (7, 2.5), (90, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expansions_equal_the_definition(dtype: torch.dtype, k: int, alpha: float) -> None:
    query, gallery = clustered(30, 0).to(dtype), 5 * clustered(90, 1).to(dtype)
    u, v = directions(query), directions(gallery)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    got = alpha_query_expansion(query, gallery, k=k, alpha=alpha)
    assert got.dtype == wanted
    np.testing.assert_allclose(got.numpy(), unit(u + weighted_sum(u, v, k, alpha)), rtol=0, atol=tolerance)
    got = database_augmentation(gallery, k=k, alpha=alpha)
    assert got.dtype == wanted
    np.testing.assert_allclose(got.numpy(), unit(weighted_sum(v, v, k, alpha)), rtol=0, atol=tolerance)


def test_expansion_by_nothing_alike_and_by_itself() -> None:
    """Opposite rows weigh nothing; a gallery of one row is its own augmentation."""
    x = torch.eye(4)
    assert torch.equal(alpha_query_expansion(x, -x[:1], k=1), x)
    assert torch.equal(database_augmentation(3 * x, k=1), x)
    assert alpha_query_expansion(x[:0], x, k=2).shape == (0, 4)


# (t, q, k): the defaults, one of each, more neighbours than half of the rows, and lists that end at N
@pytest.mark.parametrize(("t", "q", "k"), [(3, 8, 25), (1, 1, 1), (40, 2, 30), (3, 100, 200)])
@pytest.mark.parametrize("method", METHODS)
def test_expanded_neighbors_equal_the_definition(method: str, t: int, q: int, k: int) -> None:
    query, gallery = clustered(14, 2), clustered(50, 3)
    options = {"t": t, "q": q, "k": k, "method": method}
    wanted = expanded(query, gallery, **options)
    np.testing.assert_allclose(expanded_neighbors_rerank(query, gallery, **options).numpy(), wanted, rtol=0, atol=1e-6)
    distances, indices = expanded_neighbors_rerank(query, gallery, top_k=9, **options)
    best = np.sort(wanted, 1)[:, :9]
    np.testing.assert_allclose(distances.numpy(), best, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(wanted, indices.numpy(), 1), best, rtol=0, atol=1e-6)
    assert all(len(set(row)) == 9 for row in indices.tolist())


def test_equal_rank_distances_come_by_index() -> None:
    query, gallery = clustered(8, 4), clustered(60, 5)
    dense = expanded_neighbors_rerank(query, gallery, t=1, q=1, k=3)
    best = dense.sort(dim=1, stable=True)
    assert (best.values.diff(dim=1) == 0).any()
    distances, indices = expanded_neighbors_rerank(query, gallery, t=1, q=1, k=3, top_k=60)
    assert torch.equal(distances.float(), best.values)
    assert torch.equal(indices, best.indices)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbors_of_every_dtype_and_few_rows(dtype: torch.dtype, method: str) -> None:
    query, gallery = clustered(3, 6).to(dtype), clustered(9, 7).to(dtype)
    for rows in (1, 2, 9):
        got = expanded_neighbors_rerank(query, gallery[:rows], method=method)
        wanted = expanded(query, gallery[:rows], 3, 8, 25, method)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-6)
    distances, indices = expanded_neighbors_rerank(query, gallery[:2], method=method, top_k=4)
    assert (indices[:, 2:] == -1).all()
    assert distances[:, 2:].isinf().all()
    assert expanded_neighbors_rerank(query[:0], gallery, method=method).shape == (0, 9)
    assert expanded_neighbors_rerank(query, gallery[:0], method=method, top_k=2)[1].shape == (3, 2)


def test_strides_do_not_matter() -> None:
    query, gallery = clustered(9, 8), clustered(40, 9)
    results = []
    for x, y in ((query, gallery), (query.T.contiguous().T, torch.stack([gallery, gallery], -1)[..., 0])):
        ranked = [expanded_neighbors_rerank(x, y, method=method) for method in METHODS]
        results.append((alpha_query_expansion(x, y, k=3), database_augmentation(y, k=3), *ranked))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: alpha_query_expansion(x, x.numpy(), k=1), TypeError, "gallery must be a tensor"),
        (lambda x: alpha_query_expansion(x, x[:, :1], k=1), ValueError, "gallery and query must have one number"),
        (lambda x: alpha_query_expansion(x, x[:0], k=1), ValueError, "k must be in 1..0, the number of gallery rows"),
        (lambda x: alpha_query_expansion(x, x, k=10), ValueError, "k must be in 1..9, the number of gallery rows"),
        (lambda x: alpha_query_expansion(x, x, k=1, alpha=-1), ValueError, "alpha must be finite and 0 or more"),
        (lambda x: alpha_query_expansion(x, x, k=1, alpha=float("nan")), ValueError, "alpha must be finite"),
        (lambda x: alpha_query_expansion(x * 0, x, k=1), ValueError, "x must be finite and without zero rows"),
        (lambda x: database_augmentation(x[0], k=1), ValueError, r"gallery must be \[N, D\]"),
        (lambda x: database_augmentation(x, k=0), ValueError, "k must be in 1..9"),
        (lambda x: database_augmentation(x * torch.nan, k=1), ValueError, "must be finite"),
        (lambda x: expanded_neighbors_rerank(x, x, t=0), ValueError, "t must be 1 or more"),
        (lambda x: expanded_neighbors_rerank(x, x, q=1.5), TypeError, "q must be an int"),
        (lambda x: expanded_neighbors_rerank(x, x, k=0), ValueError, "k must be 1 or more"),
        (lambda x: expanded_neighbors_rerank(x, x, top_k=0), ValueError, "top_k must be 1 or more"),
        (lambda x: expanded_neighbors_rerank(x, x, method="cosine"), ValueError, "method must be one of rank, orig"),
        (lambda x: expanded_neighbors_rerank(x, x * 0), ValueError, "without zero rows"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(9, 3))
