"""Nearest neighbours and k-reciprocal re-ranking against their definitions, written out densely in float64.

Checks are numbered as in the specification of re-ranking.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import clustered
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.ops import retrieval as ops
from neuraldeps_kernels.reference import retrieval as reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Array = np.ndarray[Any, Any]

# (N, M, D, k), M = 0 for rows among themselves: the smallest; one strip of rows (6 or 14) and one more; more rows than
# a panel has columns (128); dimensions around words of two values, steps of 256 words and panels of fewer columns; k as
# large as M; more neighbours than the first room for candidates.
SHAPES = [
    (1, 0, 1, 1),
    (2, 0, 3, 2),
    (14, 0, 5, 3),
    (15, 0, 17, 15),
    (150, 0, 9, 4),
    (300, 0, 64, 21),
    (40, 333, 515, 7),
    (3, 700, 33, 300),
    (9, 20, 2100, 20),
    (5, 1, 8, 1),
]
# (k1, k2, lambda) of check 1
SETTINGS = [(20, 6, 0.3), (6, 1, 0.0), (25, 3, 1.0), (1, 1, 0.5)]


# ------------------------------------------------------------------------------------------------ definitions


def keys(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> Array:
    """All distances [N, M], by the definition."""
    a, b = x.double().numpy(), y.double().numpy()
    if metric == "inner_product":
        return -(a @ b.T)
    if metric == "cosine":
        a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
        return 1 - a @ b.T
    return np.stack([((row - b) ** 2).sum(1) for row in a])


def rerank(
    query: Tensor,
    gallery: Tensor,
    k1: int,
    k2: int,
    lambda_value: float,
    power: int = 2,
    normalize: str = "max",
    list_length: str = "k1+1",
) -> Array:
    """The definition with sets and dense N x N matrices."""
    x, nq = torch.cat([query, gallery]), len(query)
    d = keys(x, x)
    N = len(d)
    order = np.argsort(d, axis=1, kind="stable")
    largest = d.max(1, keepdims=True)
    t = np.divide(d, largest, out=np.zeros_like(d), where=largest > 0) if normalize == "max" else d
    t = t**2 if power == 4 else t
    forward, half = k1 + (list_length == "k1+1"), int(np.around(k1 / 2)) + 1

    def reciprocal(i: int, count: int) -> set[int]:
        return {g for g in order[i, :count] if i in order[g, :count]}

    v = np.zeros((N, N))
    for i in range(N):
        own = reciprocal(i, forward)
        members = set(own)
        for c in own:
            other = reciprocal(c, half)
            if 3 * len(other & own) > 2 * len(other):
                members |= other
        columns = sorted(members)
        v[i, columns] = np.exp(-t[i, columns])
        v[i] /= v[i].sum()
    if k2 > 1:
        v = np.stack([v[order[i, :k2]].mean(0) for i in range(N)])
    shared = np.stack([np.minimum(v[i], v[nq:]).sum(1) for i in range(nq)])
    return (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * t[:nq, nq:]


def rerank_by_matrices(query: Tensor, gallery: Tensor, k1: int, k2: int, lambda_value: float) -> Array:
    """The same in products of matrices, quicker where there are many rows."""
    x, nq = torch.cat([query, gallery]).double().numpy(), len(query)
    square = (x**2).sum(1)
    d = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    np.fill_diagonal(d, 0)
    order, t = np.argsort(d, axis=1, kind="stable"), d / d.max(1, keepdims=True)

    def reciprocal(count: int) -> Array:
        near = np.zeros(d.shape, np.float32)
        np.put_along_axis(near, order[:, :count], 1, 1)
        return near * near.T

    own, half = reciprocal(k1 + 1), reciprocal(int(np.around(k1 / 2)) + 1)
    taken = own * (3 * (own @ half) > 2 * half.sum(1))  # [i, c]: whether R(c) joins R*(i); `half` is symmetric
    v = np.where(own + taken @ half > 0, np.exp(-t), 0)
    v /= v.sum(1, keepdims=True)
    v = np.mean([v[order[:, j]] for j in range(k2)], axis=0)
    shared = np.zeros((nq, len(d) - nq))
    for i in range(nq):
        columns = v[i].nonzero()[0]
        shared[i] = np.minimum(v[i, columns], v[nq:, columns]).sum(1)
    return (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * t[:nq, nq:]


def neighbors(x: Tensor, y: Tensor | None, k: int, metric: str, reduced: bool) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.neuraldeps.neighbors(x, y, k, metric, reduced)
    return result


def assert_nearest(x: Tensor, y: Tensor | None, k: int, metric: str, key: Tensor, index: Tensor) -> None:
    """Lists equal the sorted definition but for distances that differ by less than 1e-12 (check 2)."""
    every = keys(x, x if y is None else y, metric)
    wanted = np.sort(every, axis=1)[:, :k]
    scale = 1e-12 * max(1.0, np.abs(every).max(initial=0))
    np.testing.assert_allclose(key.numpy(), wanted, rtol=0, atol=scale)
    np.testing.assert_allclose(np.take_along_axis(every, index.numpy(), 1), wanted, rtol=0, atol=scale)
    assert all(len(set(row)) == k for row in index.tolist())


# ------------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neighbors_equal_the_definition(shape: tuple[int, int, int, int], metric: str, reduced: bool) -> None:
    """Checks 2 and 3: float32 and bfloat16 candidates."""
    N, M, D, k = shape
    for dtype in DTYPES:
        x = (3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
        y = (3 * torch.randn(M, D, generator=torch.Generator().manual_seed(1)) + 1).to(dtype) if M else None
        assert_nearest(x, y, k, metric, *neighbors(x, y, k, metric, reduced))


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("closer", [0, 1])
def test_a_near_tie_is_decided_by_float64(closer: int, reduced: bool) -> None:
    """Checks 2 and 3: a pair 1e-9 apart at the boundary, equal in float32, in both index orders."""
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    x[0] = 0
    others = x[1:].double()
    radius = others.norm(dim=1).sort().values
    # Two rows on the boundary between the 20 nearest and the rest of row 0, along an axis each.
    r = float((radius[19] + radius[20]) / 2)
    x[100], x[200] = 0, 0
    x[100, 0], x[200, 1] = r, r
    step = torch.tensor(r).nextafter(torch.tensor(np.inf)) - r
    x[[200, 100][closer], 2] = float(step) ** 0.5 * 1e-2  # adds some 1e-11 r to one of the two squares
    d = keys(x[:1], x)[0]
    gap = abs(d[100] - d[200]) / d[100]
    assert 0 < gap < 6e-9
    rank = int((d < d[[100, 200][closer]]).sum()) + 1  # of the closer one, counted from 1
    for k in (rank, rank + 1):
        _, index = neighbors(x, None, k, "sqeuclidean", reduced)
        assert index[0, rank - 1] == [100, 200][closer]
        np.testing.assert_array_equal(index[0].numpy(), np.argsort(d, kind="stable")[:k])


@pytest.mark.parametrize("reduced", [False, True])
def test_equal_distances_come_by_index(reduced: bool) -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).repeat(30, 1)  # every row 30 times
    key, index = neighbors(x, None, 30, "sqeuclidean", reduced)
    assert (key == 0).all()
    np.testing.assert_array_equal(index[:40].numpy(), np.arange(30) * 40 + np.arange(40)[:, None])
    _, index = neighbors(torch.zeros(500, 8), None, 5, "sqeuclidean", reduced)  # more candidates than there is room for
    np.testing.assert_array_equal(index.numpy(), np.tile(np.arange(5), (500, 1)))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
@pytest.mark.parametrize("metric", ops.METRICS)
def test_extreme_units_and_a_common_offset(metric: str, scale: float) -> None:
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(5))
    plain = neighbors(x, None, 9, metric, True)[1]
    np.testing.assert_array_equal(neighbors(x * 2.0 ** round(np.log2(scale)), None, 9, metric, True)[1], plain)
    far = (x * 2**-6).double() + 1000  # cancellation that float32 products would not survive
    assert_nearest(far, None, 9, metric, *neighbors(far, None, 9, metric, True))


def test_one_row_of_huge_norm_does_not_blind_the_others() -> None:
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(6))
    x[17] *= 1e6
    assert_nearest(x, None, 5, "sqeuclidean", *neighbors(x, None, 5, "sqeuclidean", True))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 60),
    base=st.integers(0, 80),
    D=st.integers(1, 40),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(["sqeuclidean", "inner_product"]),
    reduced=st.booleans(),
)
def test_small_integers_have_exact_lists(
    rows: int, base: int, D: int, levels: int, seed: int, metric: str, reduced: bool
) -> None:
    """Values of a few levels tie constantly; every order must be that of (distance, index)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, D), generator=generator).float()
    y = torch.randint(-levels, levels + 1, (base, D), generator=generator).float() if base else None
    every = keys(x, x if y is None else y, metric)
    k = 1 + seed % every.shape[1]
    key, index = neighbors(x, y, k, metric, reduced)
    order = np.argsort(every, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index.numpy(), order)
    np.testing.assert_array_equal(key.numpy(), np.take_along_axis(every, order, 1))


def test_strides_and_dtypes_of_the_public_function() -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    distances, indices = nk.knn(x, 4)
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64
    strided = torch.zeros(100, 60)[::2, ::2].copy_(x)
    transposed = x.T.contiguous().T
    for other in (strided, transposed):
        assert all(torch.equal(a, b) for a, b in zip(nk.knn(other, 4), (distances, indices), strict=True))
    assert nk.knn(x.double(), 4)[0].dtype == torch.float64
    assert nk.knn(x[:0], 4, y=x)[1].shape == (0, 4)


LEVELS = """
import sys, torch, neuraldeps_kernels as nk
x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
threads = int(sys.argv[2])
torch.set_num_threads(threads)
lists = nk.knn(x, 21)
ranked = nk.k_reciprocal_rerank(x[:100], x[100:]), *nk.k_reciprocal_rerank(x[:100], x[100:], top_k=30)
torch.save([*lists, *ranked], sys.argv[1])
"""


def test_levels_and_threads_agree(cpu_levels: list[str], tmp_path: Path) -> None:
    """Check 8: the same bits for any number of threads; lists are the same at every level too."""
    results = {}
    for level, threads in [(level, 1) for level in cpu_levels] + [(cpu_levels[-1], 2)]:
        path = tmp_path / f"{level}{threads}.pt"
        subprocess.run(
            [sys.executable, "-c", LEVELS, str(path), str(threads)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "NEURALDEPS_CPU_LEVEL": level},
        )
        results[level, threads] = torch.load(path)
    best = results[cpu_levels[-1], 1]
    assert all(torch.equal(a, b) for a, b in zip(best, results[cpu_levels[-1], 2], strict=True))
    for other in results.values():
        assert torch.equal(other[1], best[1])
        torch.testing.assert_close(other[2], best[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ops.METRICS)
def test_distances_are_differentiable(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: nk.knn(x, 3, y=y, metric=metric)[0], (x, y))
    # Within x: without the row itself, whose distance has a corner at 0 only for cosines.
    assert torch.autograd.gradcheck(lambda x: nk.knn(x, 3, metric=metric)[0][:, 1:], (x,))


def test_operator_rules() -> None:
    x, y = torch.randn(8, 5), torch.randn(11, 5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for args in [(x, None, 3, "cosine", True), (x, y.requires_grad_(), 3, "sqeuclidean", False)]:
        torch.library.opcheck(torch.ops.neuraldeps.neighbors.default, args, test_utils=checks)
    torch.library.opcheck(
        torch.ops.neuraldeps.neighbor_lists.default, (x, y.detach(), 3, 6, True, True), test_utils=checks
    )


def test_compiles_without_a_break() -> None:
    def loss(x: Tensor) -> Tensor:
        return nk.knn(x, 3)[0].sum()

    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


# ------------------------------------------------------------------------------------------------ re-ranking


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), SETTINGS)
def test_rerank_equals_the_definition(k1: int, k2: int, lambda_value: float) -> None:
    """Checks 1, 6 and 12: dense and top rows, every option."""
    query, gallery = clustered(40, 0), clustered(160, 1)
    for power, normalize, list_length in itertools.product((2, 4), ("max", "none"), ("k1+1", "k1")):
        options = {"power": power, "normalize": normalize, "list_length": list_length}
        wanted = rerank(query, gallery, k1, k2, lambda_value, **options)
        scale = max(1.0, np.abs(wanted).max())
        dense = nk.k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, lambda_value=lambda_value, **options)
        np.testing.assert_allclose(dense.numpy(), wanted, rtol=0, atol=1e-6 * scale)
        distances, indices = nk.k_reciprocal_rerank(
            query, gallery, k1=k1, k2=k2, lambda_value=lambda_value, top_k=30, **options
        )
        best = np.sort(wanted, 1)[:, :30]
        np.testing.assert_allclose(distances.numpy(), best, rtol=0, atol=1e-6 * scale)
        np.testing.assert_allclose(np.take_along_axis(wanted, indices.numpy(), 1), best, rtol=0, atol=1e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(("k1", "k2", "lambda_value"), SETTINGS)
def test_rerank_of_2500_rows(k1: int, k2: int, lambda_value: float) -> None:
    """Check 1: every entry within 1e-6 of float64 at D = 512."""
    few = clustered(40, 0), clustered(160, 1)
    expected = rerank_by_matrices(*few, k1, k2, lambda_value)
    np.testing.assert_allclose(expected, rerank(*few, k1, k2, lambda_value), rtol=0, atol=1e-12)
    query, gallery = (clustered(count, count, D=512, centres=150, spread=2.0) for count in (500, 2000))
    wanted = rerank_by_matrices(query, gallery, k1, k2, lambda_value)
    found = nk.k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, lambda_value=lambda_value)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rerank_of_every_dtype(dtype: torch.dtype) -> None:
    query, gallery = clustered(30, 2).to(dtype), clustered(90, 3).to(dtype)
    wanted = rerank(query, gallery, 20, 6, 0.3)
    np.testing.assert_allclose(nk.k_reciprocal_rerank(query, gallery).numpy(), wanted, rtol=0, atol=1e-6)


def test_rows_that_lists_do_not_settle_are_rescanned() -> None:
    """Check 6: with short lists and distances that matter most, the rescan is taken, and right."""
    query, gallery = torch.randn(20, 3), torch.randn(300, 3)
    N, top_k = 320, 40
    key, index, largest, query_key, query_index, dense = torch.ops.neuraldeps.neighbor_lists(
        query, gallery, 5, 6, True, True
    )
    encoding = torch.ops.neuraldeps.reciprocal_encoding(index, key, largest, query, gallery, 5, 3, 2, True, 2)
    distance, found, rescanned = torch.ops.neuraldeps.jaccard_rerank_top_k(
        *encoding, query_index, query_key, largest, query, gallery, top_k, 0.9, True, 2
    )
    assert rescanned == 20
    torch.ops.neuraldeps.jaccard_rerank(*encoding, largest, dense, 0.9, True, 2)
    torch.testing.assert_close(distance, dense.double().sort(1).values[:, :top_k], rtol=0, atol=1e-6)
    torch.testing.assert_close(dense.double().gather(1, found), distance, rtol=0, atol=1e-6)
    *_, long_key, long_index, _ = torch.ops.neuraldeps.neighbor_lists(query, gallery, 5, N, False, True)
    settled = torch.ops.neuraldeps.jaccard_rerank_top_k(
        *encoding, long_index, long_key, largest, query, gallery, top_k, 0.9, True, 2
    )
    assert settled[2] == 0
    assert torch.equal(settled[0], distance)
    assert torch.equal(settled[1], found)


def test_invariants() -> None:
    """Checks 4 and 5: rows of V sum to 1; lambda 1 gives t, and 0 the Jaccard distances; order and scale."""
    query, gallery = clustered(25, 4), clustered(110, 5)
    x = torch.cat([query, gallery])
    key, index, largest, *_ = torch.ops.neuraldeps.neighbor_lists(query, gallery, 21, 0, False, True)
    for k2 in (1, 6):
        crow, _, value = torch.ops.neuraldeps.reciprocal_encoding(
            index, key, largest, query, gallery, 21, 11, k2, True, 2
        )
        sums = torch.segment_reduce(value, "sum", offsets=crow)
        torch.testing.assert_close(sums, torch.ones(135), rtol=0, atol=1e-5)
    t = keys(query, gallery) / keys(query, x).max(1, keepdims=True)
    np.testing.assert_allclose(nk.k_reciprocal_rerank(query, gallery, lambda_value=1.0).numpy(), t, atol=1e-6)
    jaccard = nk.jaccard_distance(x)
    dense = torch.ones(135, 135)
    row = torch.repeat_interleave(torch.arange(135), jaccard.crow_indices().diff())
    dense[row, jaccard.col_indices()] = jaccard.values()
    assert ((dense >= 0) & (dense <= 1)).all()
    assert (dense.diagonal() == 0).all()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-6)
    plain = nk.k_reciprocal_rerank(query, gallery, lambda_value=0.0)
    torch.testing.assert_close(plain, dense[:25, 25:], rtol=0, atol=1e-6)
    ranked = nk.k_reciprocal_rerank(query, gallery)
    shuffled = torch.randperm(110, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nk.k_reciprocal_rerank(query, gallery[shuffled]), ranked[:, shuffled])
    torch.testing.assert_close(nk.k_reciprocal_rerank(3 * query, 3 * gallery), ranked, rtol=0, atol=1e-5)


def test_degenerate_inputs() -> None:
    """Check 5."""
    x = clustered(12, 0)
    for query, gallery in [
        (x[:5], x[5:]),  # N <= k1
        (x[:1], x[1:2]),
        (x[:3], x[:3]),  # duplicates
        (torch.ones(4, 3), torch.ones(6, 3)),  # all equal
    ]:
        wanted = rerank(query, gallery, 20, 6, 0.3)
        np.testing.assert_allclose(nk.k_reciprocal_rerank(query, gallery).numpy(), wanted, rtol=0, atol=1e-6)
    assert nk.k_reciprocal_rerank(x[:0], x).shape == (0, 12)
    assert nk.k_reciprocal_rerank(x, x[:0]).shape == (12, 0)
    distances, indices = nk.k_reciprocal_rerank(x[:2], x[2:5], top_k=5)
    assert (indices[:, 3:] == -1).all()
    assert distances[:, 3:].isinf().all()
    assert nk.jaccard_distance(x[:0]).shape == (0, 0)
    assert nk.jaccard_distance(x[:1]).to_dense() == 0


def test_zero_rows_and_duplicates_are_rows_like_others() -> None:
    """Check 5: at distance 0 of each other, by index."""
    query, gallery = clustered(20, 10), clustered(80, 11)
    query[3], gallery[[5, 6, 40]] = 0, 0
    gallery[50:60] = gallery[10:20]
    wanted = rerank(query, gallery, 8, 3, 0.3)
    np.testing.assert_allclose(nk.k_reciprocal_rerank(query, gallery, k1=8, k2=3).numpy(), wanted, rtol=0, atol=1e-6)
    _, indices = nk.knn(query, 3, y=gallery)
    assert indices[3].tolist() == [5, 6, 40]


def test_strides_do_not_change_a_bit() -> None:
    query, gallery = clustered(20, 12), clustered(70, 13)
    ranked = nk.k_reciprocal_rerank(query, gallery)
    jaccard = nk.jaccard_distance(gallery).to_dense()
    d, indices = nk.knn(torch.cat([query, gallery]), 30)
    lists = nk.k_reciprocal_rerank_from_neighbors(indices, d, 20, normalize="none")

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    for other in (strided, transposed):
        assert torch.equal(nk.k_reciprocal_rerank(other(query), other(gallery)), ranked)
        assert torch.equal(nk.jaccard_distance(other(gallery)).to_dense(), jaccard)
        again = nk.k_reciprocal_rerank_from_neighbors(other(indices), other(d), 20, normalize="none")
        assert torch.equal(again, lists)


@pytest.mark.parametrize("normalize", ["max", "none"])
def test_lists_of_another_search_engine(normalize: str) -> None:
    """Full lists give the same result; short ones differ only in what they do not hold."""
    query, gallery = clustered(30, 6), clustered(100, 7)
    x = torch.cat([query, gallery])
    wanted = rerank(query, gallery, 20, 6, 0.3, normalize=normalize)
    d, indices = nk.knn(x.double(), 130)
    scale = 1e-6 * np.abs(wanted).max()
    full = nk.k_reciprocal_rerank_from_neighbors(indices, d, 30, row_max=d[:, -1], normalize=normalize)
    np.testing.assert_allclose(full.numpy(), wanted, rtol=0, atol=scale)
    best, found = nk.k_reciprocal_rerank_from_neighbors(indices, d, 30, row_max=d[:, -1], normalize=normalize, top_k=10)
    np.testing.assert_allclose(best.numpy(), np.sort(wanted, 1)[:, :10], rtol=0, atol=scale)
    np.testing.assert_allclose(np.take_along_axis(wanted, found.numpy(), 1), best.numpy(), rtol=0, atol=scale)
    short = nk.k_reciprocal_rerank_from_neighbors(
        indices[:, :21], d[:, :21], 30, row_max=d[:, -1], normalize=normalize, lambda_value=0.0
    )
    jaccard = rerank(query, gallery, 20, 6, 0.0, normalize=normalize)
    if normalize == "max":  # weights without it underflow float32
        assert ((short.numpy() < 1) == (jaccard < 1)).all()  # the same sets
        np.testing.assert_allclose(short.numpy(), jaccard, rtol=0, atol=0.05)


@pytest.mark.parametrize("k", [2, 5, 21])
def test_best_of_short_lists_are_those_of_the_whole_row(k: int) -> None:
    """What no list holds counts as the last one listed, in a dense result as in top_k, ties by lower index."""
    query, gallery = clustered(30, 6), clustered(100, 7)
    d, indices = nk.knn(torch.cat([query, gallery]).double(), k)
    arguments = (indices, d, 30)
    dense = nk.k_reciprocal_rerank_from_neighbors(*arguments, row_max=d[:, -1])
    wanted = dense.sort(dim=1, stable=True)
    for top_k in (1, 10, 60, 100, 120):
        best, found = nk.k_reciprocal_rerank_from_neighbors(*arguments, row_max=d[:, -1], top_k=top_k)
        there = min(top_k, 100)
        np.testing.assert_allclose(best[:, :there].numpy(), wanted.values[:, :there].numpy(), rtol=0, atol=1e-6)
        assert (found[:, :there].sort(1).values.diff(dim=1) > 0).all()
        np.testing.assert_allclose(
            dense.gather(1, found[:, :there]).numpy(), best[:, :there].numpy(), rtol=0, atol=1e-6
        )
        assert best[:, there:].isinf().all()
        assert (found[:, there:] == -1).all()


def test_reference_equals_the_kernels() -> None:
    query, gallery = clustered(30, 8), clustered(90, 9)
    ours = torch.ops.neuraldeps.neighbor_lists(query, gallery, 21, 40, True, True)
    plain = reference.neighbor_lists(query, gallery, 21, 40, True, True)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if a.dtype == torch.float32 else 1e-12)
    for metric in ops.METRICS:
        torch.testing.assert_close(
            neighbors(query, gallery, 7, metric, True), reference.neighbors(query, gallery, 7, metric, True)
        )
    key, index, largest, query_key, query_index, _ = ours
    for features in [(query, gallery), (None, None)]:
        arguments = (index, key, largest, *features, 21, 11, 6, True, 2)
        encoding = torch.ops.neuraldeps.reciprocal_encoding(*arguments)
        other = reference.reciprocal_encoding(*arguments)
        assert torch.equal(encoding[0], other[0])
        assert torch.equal(encoding[1], other[1])
        torch.testing.assert_close(encoding[2], other[2], rtol=0, atol=1e-6)
        best = (*encoding, query_index, query_key, largest, *features, 12, 0.3, True, 2)
        for a, b in zip(
            torch.ops.neuraldeps.jaccard_rerank_top_k(*best)[:2], reference.jaccard_rerank_top_k(*best)[:2], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        mixed, expected = torch.ones(30, 90), torch.ones(30, 90)
        torch.ops.neuraldeps.jaccard_rerank(*encoding, largest, mixed, 0.3, True, 4)
        reference.jaccard_rerank(*encoding, largest, expected, 0.3, True, 4)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
        for a, b in zip(
            torch.ops.neuraldeps.jaccard_distance(*encoding), reference.jaccard_distance(*encoding), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


MEMORY = """
import resource, sys, torch, neuraldeps_kernels as nk
N, D, top_k = 20_000, 256, 10 if sys.argv[1] == "top" else None
x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
nk.k_reciprocal_rerank(x[:50], x[50:200], top_k=top_k)  # libraries and threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nk.k_reciprocal_rerank(x[:1000], x[1000:], top_k=top_k)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("form", ["top", "dense"])
def test_memory_grows_with_n_not_with_its_square(form: str, run_python: Any) -> None:
    """Check 7: 3 or 4 times the features, 2 kB a row and the result; an N x N matrix of bytes would be 400 MB."""
    N, D = 20_000, 256
    result = run_python(MEMORY, form)
    assert result.returncode == 0, result.stderr
    allowed = {"top": 3 * 4 * N * D, "dense": 4 * 4 * N * D + 4 * 1000 * (N - 1000)}[form] + 2000 * N
    assert int(result.stdout) < allowed


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nk.knn(x.numpy(), 1), TypeError, "x must be a tensor"),
        (lambda x: nk.knn(x.long(), 1), TypeError, "x must be float32"),
        (lambda x: nk.knn(x[0], 1), ValueError, r"x must be \[N, D\]"),
        (lambda x: nk.knn(x[:, :0], 1), ValueError, r"x must be \[N, D\]"),
        (lambda x: nk.knn(x, 0), ValueError, "k must be in 1..9"),
        (lambda x: nk.knn(x, 10), ValueError, "k must be in 1..9"),
        (lambda x: nk.knn(x, 2.0), TypeError, "k must be an int"),
        (lambda x: nk.knn(x, 4, y=x[:3]), ValueError, "k must be in 1..3"),
        (lambda x: nk.knn(x, 1, y=x[:0]), ValueError, "k must be in 1..0"),
        (lambda x: nk.knn(x, 1, y=x[:, :2]), ValueError, "y and x must have one number of columns"),
        (lambda x: nk.knn(x, 1, y=x.double()), ValueError, "y and x must have one dtype"),
        (lambda x: nk.knn(x, 1, metric="l1"), ValueError, "metric must be one of"),
        (lambda x: nk.knn(x / torch.arange(9.0)[:, None], 1), ValueError, "x must be finite, but its row 0"),
        (lambda x: nk.knn(x, 1, y=x * torch.nan), ValueError, "y must be finite, but its row 0"),
        (lambda x: nk.knn(x * (torch.arange(9.0) != 4)[:, None], 1, metric="cosine"), ValueError, "zero rows.*row 4"),
        (lambda x: nk.k_reciprocal_rerank(x, x, k1=0), ValueError, "k1 must be 1 or more"),
        (lambda x: nk.k_reciprocal_rerank(x, x, k2=0), ValueError, "k2 must be 1 or more"),
        (lambda x: nk.k_reciprocal_rerank(x, x, lambda_value=1.5), ValueError, "lambda_value must be in"),
        (lambda x: nk.k_reciprocal_rerank(x, x, top_k=0), ValueError, "top_k must be 1 or more"),
        (lambda x: nk.k_reciprocal_rerank(x, x, power=3), ValueError, "power must be one of 2, 4"),
        (lambda x: nk.k_reciprocal_rerank(x, x, normalize="sum"), ValueError, "normalize must be one of"),
        (lambda x: nk.k_reciprocal_rerank(x, x, list_length="k"), ValueError, "list_length must be one of"),
        (lambda x: nk.k_reciprocal_rerank(x, x[:, :1]), ValueError, "gallery and query must have one number"),
        (lambda x: nk.k_reciprocal_rerank(x * torch.inf, x), ValueError, "must be finite, but its row 0"),
        (lambda x: nk.jaccard_distance(x[0]), ValueError, r"x must be \[N, D\]"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(9, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(9, 4)}, TypeError, "indices must be int64"),
        ({"indices": torch.zeros(9, 3, dtype=torch.int64)}, ValueError, r"indices and distances must be \[N, K\]"),
        ({"indices": torch.full((9, 4), 9)}, ValueError, r"index must be in 0..8, not 9"),
        ({"indices": torch.full((9, 4), -1)}, ValueError, r"index must be in 0..8, not -1"),
        ({"distances": torch.tensor([[0.0, 2, 1, 3]]).repeat(9, 1)}, ValueError, "ascending in every row, but row 0"),
        ({"distances": torch.full((9, 4), torch.nan)}, ValueError, "ascending in every row, but row 0"),
        ({"row_max": None}, ValueError, "row_max must be given"),
        ({"row_max": torch.ones(3)}, ValueError, r"row_max must be \[N\]"),
        ({"num_queries": 10}, ValueError, "num_queries must be in 0..9"),
        ({"top_k": 0}, ValueError, "top_k must be 1 or more"),
    ],
)
def test_bad_lists_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    d, indices = nk.knn(torch.randn(9, 3), 4)
    arguments = {"indices": indices, "distances": d, "num_queries": 3, "row_max": torch.full((9,), 9.0)}
    with pytest.raises(error, match=message):
        nk.k_reciprocal_rerank_from_neighbors(**{**arguments, **change})
