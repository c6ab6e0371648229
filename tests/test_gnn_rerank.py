"""GNN re-ranking against its definition, dense and in float64. Checks are numbered as in its specification."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import clustered
from torch import Tensor

from neuraldeps_kernels.ops.gnn_rerank import gnn_rerank
from neuraldeps_kernels.reference import gnn_rerank as reference

Array = np.ndarray[Any, Any]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (k1, k2, lambda): defaults for persons and for vehicles, no layer, the graph alone, the cosines alone, all of a list
SETTINGS = [(26, 7, 0.3), (60, 10, 0.3), (5, 1, 0.4), (26, 7, 0.0), (12, 3, 1.0), (6, 6, 0.5), (1, 1, 0.5)]


def definition(
    query: Tensor, gallery: Tensor, k1: int = 26, k2: int = 7, lambda_value: float = 0.3, dtype: Any = np.float64
) -> Array:
    """The steps with dense N x N matrices; neighbours by float64 cosines, layers in `dtype`."""
    x, nq = torch.cat([query, gallery]).double().numpy(), len(query)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = u @ u.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k1]
    a = np.zeros(cosine.shape, dtype)
    np.put_along_axis(a, order, 1, 1)
    weight = np.take_along_axis(cosine, order, 1).astype(dtype) ** 2
    for _ in range(2 if k2 > 1 else 0):
        b = a + a.T
        a = sum(weight[:, j, None] * b[order[:, j]] for j in range(min(k2, len(x))))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
    return (1 - lambda_value) * (a[:nq] @ a[nq:].T) + lambda_value * cosine[:nq, nq:]


def assert_best(found: tuple[Tensor, Tensor], wanted: Array, top_k: int) -> None:
    """Scores and rows are the top_k largest of wanted [nq, ng]."""
    scores, indices = found
    best = -np.sort(-wanted, 1)[:, :top_k]
    count = best.shape[1]
    np.testing.assert_allclose(scores.numpy()[:, :count], best, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(wanted, indices.numpy()[:, :count], 1), best, rtol=0, atol=2e-6)
    assert all(len(set(row)) == count for row in indices[:, :count].tolist())
    assert (indices[:, count:] == -1).all()
    assert scores[:, count:].isneginf().all()


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), SETTINGS)
def test_rerank_equals_the_definition(k1: int, k2: int, lambda_value: float) -> None:
    query, gallery = clustered(40, 0), clustered(160, 1)
    options = {"k1": k1, "k2": k2, "lambda_value": lambda_value}
    wanted = definition(query, gallery, **options)
    np.testing.assert_allclose(gnn_rerank(query, gallery, **options).numpy(), wanted, rtol=0, atol=2e-6 * k1)
    if k2 > 1:  # without a layer, scores are counts, of which many tie
        assert_best(gnn_rerank(query, gallery, top_k=30, **options), wanted, 30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rerank_of_every_dtype(dtype: torch.dtype) -> None:
    query, gallery = clustered(30, 2).to(dtype), clustered(90, 3).to(dtype)
    np.testing.assert_allclose(gnn_rerank(query, gallery).numpy(), definition(query, gallery), rtol=0, atol=2e-6)
    strided = torch.zeros(60, 48, dtype=dtype)[::2, ::2].copy_(query)
    assert torch.equal(gnn_rerank(strided, gallery), gnn_rerank(query, gallery))


@pytest.mark.slow
@pytest.mark.parametrize(("nq", "ng"), [(500, 2000), (1000, 5000)])
def test_medium_sets_equal_the_definition(nq: int, ng: int) -> None:
    """Check 9: within 1e-5 for N = 2500 and 6000; the oracle's layers in float32 for the larger."""
    query, gallery = (clustered(n, n, D=128, centres=150, spread=1.0) for n in (nq, ng))
    wanted = definition(query, gallery, dtype=np.float64 if nq == 500 else np.float32)
    np.testing.assert_allclose(gnn_rerank(query, gallery).numpy(), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_many_rows() -> None:
    """Check 9: N = 50 000, beyond products in 32 bits; the queries are in a block that alone is near them."""
    N, block = 50_000, 600
    x = 0.01 * torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 1
    x[:block, :2] = torch.tensor([0.0, 1.0]) + x[:block, 1:3]  # nothing else is among their neighbours
    scores, found = gnn_rerank(x[:100], x[100:], top_k=50)
    wanted = definition(x[:100], x[100:block])
    assert (found < block - 100).all()
    assert_best((scores, found), wanted, 50)
    assert gnn_rerank(x[-100:], x[:-100], top_k=5)[1].max() > 46_341


@pytest.mark.parametrize("top_k", [1, 7, 90])
def test_lists_too_short_for_the_top_are_completed(top_k: int) -> None:
    """Short lists and a cosine that matters: what they do not hold is looked at where it may enter."""
    query, gallery = torch.randn(20, 3), torch.randn(80, 3)
    arguments = (query, gallery, 8, 8, True, True, "cosine")
    key, index, _, query_key, query_index, dense = torch.ops.neuraldeps.neighbor_lists(*arguments)
    found = torch.ops.neuraldeps.gnn_rerank_top_k(index, key, query_index, query_key, query, gallery, top_k, 3, 0.7)
    torch.ops.neuraldeps.gnn_rerank(index, key, dense, 3, 0.7)
    assert_best(found, dense.double().numpy(), top_k)


def test_a_near_tie_of_the_cosine_is_decided_by_float64() -> None:
    """The k1-th and the next neighbour are equal in float32; either order of the pair gives its own graph."""
    x = clustered(60, 4).double()
    for closer, step in ((30, 1e-12), (30, -1e-12)):
        y = x.clone()
        direction = y[0] / y[0].norm()
        across = y[1] - (y[1] @ direction) * direction
        across /= across.norm()
        other = y[2] - (y[2] @ direction) * direction
        other -= (other @ across) * across
        other /= other.norm()
        angle = 0.7
        y[closer] = np.cos(angle) * direction + np.sin(angle) * across
        y[closer + 1] = np.cos(angle + step) * direction + np.sin(angle + step) * other
        cosines = torch.nn.functional.normalize(y, dim=1) @ direction
        k1 = int((cosines > max(cosines[closer], cosines[closer + 1])).sum()) + 1
        wanted = definition(y[:10], y[10:], k1=k1, k2=min(3, k1))
        got = gnn_rerank(y[:10], y[10:], k1=k1, k2=min(3, k1))
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-6)


def test_invariants() -> None:
    """Order of the gallery, scale of any row, and lambda = 1: the cosine."""
    query, gallery = clustered(25, 5), clustered(110, 6)
    ranked = gnn_rerank(query, gallery)
    assert (ranked <= 1 + 1e-5).all()
    shuffled = torch.randperm(110, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gnn_rerank(query, gallery[shuffled]), ranked[:, shuffled], rtol=0, atol=2e-6)
    torch.testing.assert_close(gnn_rerank(3 * query, gallery * torch.rand(110, 1).add(0.5)), ranked, rtol=0, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(query[:, None].double(), gallery.double(), dim=-1)
    torch.testing.assert_close(gnn_rerank(query, gallery, lambda_value=1.0).double(), cosine, rtol=0, atol=1e-6)


def test_threads_do_not_change_a_bit() -> None:
    """Check 8."""
    query, gallery = clustered(300, 7), clustered(900, 8)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append((gnn_rerank(query, gallery), *gnn_rerank(query, gallery, top_k=20)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(deadline=None, max_examples=30)
@given(nq=st.integers(1, 20), ng=st.integers(1, 40), k1=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_any_sizes(nq: int, ng: int, k1: int, seed: int) -> None:
    x = torch.randn(nq + ng, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k2 = 1 + seed % k1
    wanted = definition(x[:nq], x[nq:], k1, k2)
    np.testing.assert_allclose(gnn_rerank(x[:nq], x[nq:], k1=k1, k2=k2).numpy(), wanted, rtol=0, atol=1e-6 * k1)
    assert_best(gnn_rerank(x[:nq], x[nq:], k1=k1, k2=k2, top_k=3), wanted, 3) if k2 > 1 else None


def test_degenerate_inputs() -> None:
    """Duplicates, fewer rows than neighbours, nothing to rank."""
    x = clustered(12, 9)
    for query, gallery in [(x[:5], x[5:]), (x[:1], x[1:2]), (torch.ones(4, 3), torch.ones(6, 3))]:
        wanted = definition(query, gallery)
        np.testing.assert_allclose(gnn_rerank(query, gallery).numpy(), wanted, rtol=0, atol=2e-6)
    assert gnn_rerank(x[:0], x).shape == (0, 12)
    assert gnn_rerank(x, x[:0]).shape == (12, 0)
    assert_best(gnn_rerank(x[:2], x[2:5], top_k=5), definition(x[:2], x[2:5]), 5)
    assert (gnn_rerank(x, x[:0], top_k=2)[1] == -1).all()


def test_reference_equals_the_kernels() -> None:
    query, gallery = clustered(30, 8), clustered(90, 9)
    lists = torch.ops.neuraldeps.neighbor_lists(query, gallery, 20, 40, True, True, "cosine")
    key, index, _, query_key, query_index, dense = lists
    for expand in (1, 6):
        ours, plain = dense.clone(), dense.clone()
        torch.ops.neuraldeps.gnn_rerank(index, key, ours, expand, 0.3)
        reference.gnn_rerank(index, key, plain, expand, 0.3)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    arguments = (index, key, query_index, query_key, query, gallery, 12, 6, 0.3)
    for a, b in zip(
        torch.ops.neuraldeps.gnn_rerank_top_k(*arguments), reference.gnn_rerank_top_k(*arguments), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_operator_rules() -> None:
    query, gallery = clustered(12, 12), clustered(30, 13)
    key, index, _, query_key, query_index, dense = torch.ops.neuraldeps.neighbor_lists(
        query, gallery, 8, 10, True, True, "cosine"
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    rest = (index, key, query_index, query_key, query, gallery, 5, 3, 0.3)
    torch.library.opcheck(torch.ops.neuraldeps.gnn_rerank.default, (index, key, dense, 3, 0.3), test_utils=checks)
    torch.library.opcheck(torch.ops.neuraldeps.gnn_rerank_top_k.default, rest, test_utils=checks)
    lists = (query, gallery, 5, 6, True, True, "cosine")
    torch.library.opcheck(torch.ops.neuraldeps.neighbor_lists.default, lists, test_utils=checks)
    torch.library.opcheck(
        torch.ops.neuraldeps.neighbors_and_largest.default, (query, gallery, 5, True), test_utils=checks
    )


def test_compiles_without_a_break() -> None:
    query, gallery = clustered(20, 14), clustered(60, 15)
    compiled = torch.compile(gnn_rerank, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, gallery), gnn_rerank(query, gallery))


def test_dense_cosines_of_the_lists() -> None:
    query, gallery = clustered(30, 10), 100 * clustered(90, 11)
    for reduced in (False, True):
        dense = torch.ops.neuraldeps.neighbor_lists(query, gallery, 5, 0, True, reduced, "cosine")[-1]
        cosine = torch.nn.functional.cosine_similarity(query[:, None].double(), gallery.double(), dim=-1)
        torch.testing.assert_close(1 - dense.double(), cosine, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="metric must not be inner_product"):
        torch.ops.neuraldeps.neighbor_lists(query, gallery, 5, 0, True, True, "inner_product")


MEMORY = """
import resource, torch
from neuraldeps_kernels.ops.gnn_rerank import gnn_rerank
N, D = 20_000, 16
x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
gnn_rerank(x[:50], x[50:200], top_k=10)  # libraries and threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gnn_rerank(x[:500], x[500:], top_k=10)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_grows_with_n_not_with_its_square(run_python: Any) -> None:
    """Check 7: some 15 kB a row (hundreds of entries of B_1); N x N floats would be 1.6 GB."""
    assert int(run_python(MEMORY).stdout) < 15_000 * 20_000


def test_benchmark_times_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours, k-reciprocal and GNN re-ranking equal the peers' own definitions; missing FAISS is reported."""
    pytest.importorskip("threadpoolctl")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from benchmarks import bench_retrieval, harness

    monkeypatch.setattr(bench_retrieval, "measured_rates", lambda *_: harness.Rates(1e9, 1e9))
    monkeypatch.setattr(bench_retrieval, "SIZES", {"2.5k": (30, 170, 16)})
    budget = harness.Budget(quick=True, case_seconds=0.0, round_seconds=0.01, search_seconds=5.0)
    for recipe in bench_retrieval.cases(budget, argparse.Namespace()):
        record = harness.measure(recipe.build(), budget)
        assert record["ours"]["error"] < 2e-6
        assert all(peer["status"] == "missing" or peer["error"] < 1e-3 for peer in record["peers"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: gnn_rerank(x.numpy(), x), TypeError, "query must be a tensor"),
        (lambda x: gnn_rerank(x, x.long()), TypeError, "gallery must be float32"),
        (lambda x: gnn_rerank(x, x[:, :1]), ValueError, "gallery and query must have one number"),
        (lambda x: gnn_rerank(x, x, k1=0), ValueError, "k1 must be 1 or more"),
        (lambda x: gnn_rerank(x, x, k2=27), ValueError, "k2 must be in 1..26, k1"),
        (lambda x: gnn_rerank(x, x, k2=2.0), TypeError, "k2 must be an int"),
        (lambda x: gnn_rerank(x, x, lambda_value=-0.1), ValueError, "lambda_value must be in"),
        (lambda x: gnn_rerank(x, x, lambda_value=float("nan")), ValueError, "lambda_value must be in"),
        (lambda x: gnn_rerank(x, x, top_k=0), ValueError, "top_k must be 1 or more"),
        (lambda x: gnn_rerank(x * torch.nan, x), ValueError, "finite and without zero rows, but its row 0"),
        (lambda x: gnn_rerank(x, x * 0), ValueError, "finite and without zero rows, but its row 0"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(9, 3))


def test_bad_lists_are_named() -> None:
    index, key = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.float64)
    run = torch.ops.neuraldeps.gnn_rerank
    for arguments, message in [
        ((index + 4, key, torch.ones(1, 3), 1, 0.3), r"index must be in 0..3, not 4"),
        ((index, key[:, :1], torch.ones(1, 3), 1, 0.3), r"must be \[N, K\]"),
        ((index, key, torch.ones(1, 4), 1, 0.3), "distance must be contiguous float32"),
        ((index, key, torch.ones(1, 3), 3, 0.3), "expand must be in 1..2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*arguments)
