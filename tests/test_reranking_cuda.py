"""The CUDA kernels of k-reciprocal and GNN re-ranking, emulated, through their C interface; and on a device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuraldeps_kernels.ops.gnn_rerank import gnn_rerank
from neuraldeps_kernels.ops.retrieval import (
    jaccard_distance,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_neighbors,
)
from neuraldeps_kernels.reference import gnn_rerank as gnn_reference
from neuraldeps_kernels.reference import retrieval as reference

F32, F64, I32, I64 = torch.float32, torch.float64, torch.int32, torch.int64
P, I, D, N32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int32
CUDA = emulation.ROOT / "csrc" / "cuda"
SOURCES = [CUDA / "reranking.cu", CUDA / "gnn_rerank.cu"]
# Several chunks of columns, few threads, and what warps sort in the workspace.
SMALL = ("ND_SPARSE_CHUNK=23", "ND_SPARSE_THREADS=64", "ND_RERANKING_SHARED_BYTES=1000")
# (k1, k2, lambda): defaults; no expansion; odd halves; the smallest
SETTINGS = [(20, 6, 0.3), (6, 1, 0.0), (25, 3, 1.0), (1, 1, 0.5)]


class Lists(ctypes.Structure):
    """NdLists of cuda_api.h."""

    _fields_ = [("rows", I), ("k", I), ("index", P), ("key", P)]


class Features(ctypes.Structure):
    """NdFeatures."""

    _fields_ = [
        ("query", P), ("gallery", P), ("dtype", N32), ("num_queries", I), ("dim", I), ("query_stride", I),
        ("gallery_stride", I),
    ]  # fmt: skip


class Encoding(ctypes.Structure):
    """NdReciprocalEncodingArgs."""

    _fields_ = [
        ("lists", Lists), ("largest", P), ("features", Features), ("forward", I), ("half", I), ("expand", I),
        ("normalize", N32), ("power", N32), ("crow", P), ("col", P), ("value", P),
    ]  # fmt: skip


class Jaccard(ctypes.Structure):
    """NdJaccardArgs."""

    _fields_ = [
        ("rows", I), ("num_queries", I), ("crow", P), ("col", P), ("value", P), ("room", I), ("largest", P),
        ("lambda_value", D), ("normalize", N32), ("power", N32), ("distance", P), ("lists", Lists),
        ("features", Features), ("top_k", I), ("best", P), ("found", P), ("rescanned", P), ("crow_out", P),
        ("col_out", P), ("value_out", P),
    ]  # fmt: skip


class Gnn(ctypes.Structure):
    """NdGnnArgs."""

    _fields_ = [
        ("lists", Lists), ("num_queries", I), ("expand", I), ("lambda_value", D), ("edges", I), ("distance", P),
        ("query_lists", Lists), ("features", Features), ("top_k", I), ("score", P), ("found", P),
    ]  # fmt: skip


def lists_of(index: Tensor, key: Tensor, rows: int | None = None) -> Lists:
    assert index.is_contiguous()
    assert key.is_contiguous()
    return Lists(len(index) if rows is None else rows, index.shape[1], index.data_ptr(), key.data_ptr())


def features_of(query: Tensor | None, gallery: Tensor | None) -> Features:
    if query is None or gallery is None:
        return Features()
    return Features(
        query.data_ptr(), gallery.data_ptr(), query.dtype == F64, len(query), query.shape[1], query.stride(0),
        gallery.stride(0),
    )  # fmt: skip


class Emulated:
    """The operators by the C interface of an emulated library; results and workspaces are nonsense before."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.nd_reciprocal_encoding_room.restype = I

    def call(self, name: str, size: str, args: Any, workspace: Tensor | None = None) -> Tensor:
        """Runs a function; its workspace of exactly the size asked for, for calls that go on with it."""
        needed = getattr(self.library, size)
        needed.restype = ctypes.c_size_t
        pointer = ctypes.byref(args)
        if workspace is None:
            workspace = torch.full((needed(pointer) + 512,), 0xA5, dtype=torch.uint8)
        first = -workspace.data_ptr() % 256
        assert getattr(self.library, name)(pointer, P(workspace.data_ptr() + first), None) == 0
        assert (workspace[:first] == 0xA5).all()
        assert (workspace[first + needed(pointer) :] == 0xA5).all()
        return workspace

    def reciprocal_encoding(
        self, index: Tensor, key: Tensor, largest: Tensor, query: Tensor | None, gallery: Tensor | None,
        forward: int, half: int, expand: int, normalize: bool, power: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        options = (forward, half, expand, normalize, power)
        args = Encoding(lists_of(index, key), largest.data_ptr(), features_of(query, gallery), *options)
        room = len(index) * self.library.nd_reciprocal_encoding_room(ctypes.byref(args))
        crow = torch.full((len(index) + 1,), -7)
        col, value = torch.full((room + 8,), -7, dtype=I32), torch.full((room + 8,), -7.0)
        args.crow, args.col, args.value = crow.data_ptr(), col.data_ptr(), value.data_ptr()
        self.call("nd_reciprocal_encoding", "nd_reciprocal_encoding_workspace", args)
        assert (col[crow[-1] :] == -7).all()
        assert crow[-1] <= room
        return crow, col[:room], value[:room]

    def jaccard(self, encoding: tuple[Tensor, ...], num_queries: int, **more: Any) -> Jaccard:
        crow, col, value = encoding
        args = Jaccard(len(crow) - 1, num_queries, crow.data_ptr(), col.data_ptr(), value.data_ptr(), len(col), **more)
        args.power = args.power or 2
        return args

    def jaccard_rerank(
        self, crow: Tensor, col: Tensor, value: Tensor, largest: Tensor, distance: Tensor, lambda_value: float,
        normalize: bool, power: int,
    ) -> None:  # fmt: skip
        args = self.jaccard(
            (crow, col, value), len(distance), largest=largest.data_ptr(), lambda_value=lambda_value,
            normalize=normalize, power=power, distance=distance.data_ptr(),
        )  # fmt: skip
        self.call("nd_jaccard_rerank", "nd_jaccard_workspace", args)

    def jaccard_rerank_top_k(
        self, crow: Tensor, col: Tensor, value: Tensor, index: Tensor, key: Tensor, largest: Tensor,
        query: Tensor | None, gallery: Tensor | None, top_k: int, lambda_value: float, normalize: bool, power: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        nq = len(index)
        best, found = torch.full((nq, top_k), torch.nan, dtype=F64), torch.full((nq, top_k), -7)
        rescanned = torch.full((1,), -7)
        args = self.jaccard(
            (crow, col, value), nq, largest=largest.data_ptr(), lambda_value=lambda_value, normalize=normalize,
            power=power, lists=lists_of(index, key, len(crow) - 1), features=features_of(query, gallery), top_k=top_k,
            best=best.data_ptr(), found=found.data_ptr(), rescanned=rescanned.data_ptr(),
        )  # fmt: skip
        self.call("nd_jaccard_rerank_top_k", "nd_jaccard_workspace", args)
        return best, found, rescanned

    def jaccard_distance(self, crow: Tensor, col: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        crow_out = torch.full_like(crow, -7)
        args = self.jaccard((crow, col, value), 0, crow_out=crow_out.data_ptr())
        workspace = self.call("nd_jaccard_distance_count", "nd_jaccard_workspace", args)
        size = int(crow_out[-1])
        col_out, value_out = torch.full((size + 8,), -7, dtype=I32), torch.full((size + 8,), -7.0)
        args.col_out, args.value_out = col_out.data_ptr(), value_out.data_ptr()
        self.call("nd_jaccard_distance_fill", "nd_jaccard_workspace", args, workspace)
        assert (col_out[size:] == -7).all()
        return crow_out, col_out[:size], value_out[:size]

    def gnn(self, index: Tensor, key: Tensor, num_queries: int, expand: int, **more: Any) -> None:
        args = Gnn(lists_of(index, key), num_queries, expand, **more)
        edges, pointer = torch.full((1,), -7), ctypes.byref(args)
        needed = self.library.nd_gnn_layer_workspace
        needed.restype = ctypes.c_size_t
        layer = torch.full((needed(pointer) + 512,), 0xA5, dtype=torch.uint8)
        base = layer.data_ptr() + -layer.data_ptr() % 256
        assert self.library.nd_gnn_layer(pointer, P(edges.data_ptr()), P(base), None) == 0
        assert (layer[base - layer.data_ptr() + needed(pointer) :] == 0xA5).all()
        args.edges = int(edges)
        needed = self.library.nd_gnn_rerank_workspace
        needed.restype = ctypes.c_size_t
        workspace = torch.full((needed(pointer) + 512,), 0xA5, dtype=torch.uint8)
        first = -workspace.data_ptr() % 256
        assert self.library.nd_gnn_rerank(pointer, P(base), P(workspace.data_ptr() + first), None) == 0
        assert (workspace[first + needed(pointer) :] == 0xA5).all()

    def gnn_rerank(self, index: Tensor, key: Tensor, distance: Tensor, expand: int, lambda_value: float) -> None:
        self.gnn(index, key, len(distance), expand, lambda_value=lambda_value, distance=distance.data_ptr())

    def gnn_rerank_top_k(
        self, index: Tensor, key: Tensor, query_index: Tensor, query_key: Tensor, query: Tensor, gallery: Tensor,
        top_k: int, expand: int, lambda_value: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        nq = len(query)
        score, found = torch.full((nq, top_k), torch.nan, dtype=F64), torch.full((nq, top_k), -7)
        self.gnn(
            index, key, nq, expand, lambda_value=lambda_value, query_lists=lists_of(query_index, query_key, len(index)),
            features=features_of(query, gallery), top_k=top_k, score=score.data_ptr(), found=found.data_ptr(),
        )  # fmt: skip
        return score, found


class Device:
    """The same by the operators, on a device."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.neuraldeps, name)

        def run(*args: Any) -> Any:
            moved = [x.cuda() if isinstance(x, Tensor) else x for x in args]
            result = operator(*moved)
            for own, there in zip(args, moved, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(there)
            return result if result is None else tuple(x.cpu() for x in result)

        return run


@pytest.fixture(scope="session")
def run() -> Emulated:
    return Emulated(emulation.build_library(SOURCES))


@pytest.fixture(scope="session")
def run_small() -> Emulated:
    return Emulated(emulation.build_library(SOURCES, definitions=SMALL))


@pytest.fixture(params=["default", "small", pytest.param("device", marks=pytest.mark.gpu)])
def either(request: pytest.FixtureRequest, run: Emulated, run_small: Emulated) -> Emulated | Device:
    return {"default": run, "small": run_small, "device": Device()}[request.param]


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ problems


def clustered(count: int, seed: int, D: int = 12, centres: int = 6, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, D, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(centres, (count,), generator=generator)
    return middle[chosen] + spread * torch.randn(count, D, generator=generator)


@dataclass
class Problem:
    """Lists of queries and gallery, as neighbor_lists makes them."""

    query: Tensor
    gallery: Tensor
    index: Tensor
    key: Tensor
    largest: Tensor
    query_index: Tensor
    query_key: Tensor
    dense: Tensor

    @classmethod
    def of(cls, query: Tensor, gallery: Tensor, k: int, query_k: int, metric: str = "sqeuclidean") -> Problem:
        N = len(query) + len(gallery)
        key, index, largest, query_key, query_index, dense = reference.neighbor_lists(
            query, gallery, min(k, N), min(query_k, N), True, True, metric
        )
        return cls(query, gallery, index, key, largest, query_index, query_key, dense)

    def encoding(self, k1: int, k2: int, normalize: bool = True, power: int = 2) -> tuple[Any, ...]:
        """Arguments of reciprocal_encoding."""
        options = (k1 + 1, round(k1 / 2) + 1, k2, normalize, power)
        return (self.index, self.key, self.largest, self.query, self.gallery, *options)


def problem(nq: int = 9, ng: int = 60, k: int = 21, query_k: int = 30, dtype: torch.dtype = F32) -> Problem:
    return Problem.of(clustered(nq, 1).to(dtype), clustered(ng, 2).to(dtype), k, query_k)


def dense_of(csr: tuple[Tensor, ...], fill: float = 0.0) -> Tensor:
    """[N, N] of crow, col, value; room behind the end is not looked at."""
    crow, col, value = csr
    size = int(crow[-1])
    full = torch.full((len(crow) - 1, len(crow) - 1), fill, dtype=F64)
    row = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
    full[row, col[:size].long()] = value[:size].double()
    return full


def assert_rows_ascend(csr: tuple[Tensor, ...]) -> None:
    crow, col, _ = csr
    assert crow[0] == 0
    for begin, end in zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True):
        assert (col[begin:end].diff() > 0).all()


# ------------------------------------------------------------------------------------------------ k-reciprocal


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), SETTINGS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_everything_matches_the_reference(either, k1, k2, lambda_value, dtype):
    p = problem(k=max(k1 + 1, k2), dtype=dtype)
    csr, wanted = either.reciprocal_encoding(*p.encoding(k1, k2)), reference.reciprocal_encoding(*p.encoding(k1, k2))
    assert_rows_ascend(csr)
    assert torch.equal(csr[0], wanted[0])
    assert (dense_of(csr) - dense_of(wanted)).abs().max() <= 1e-6

    mixed, exact = p.dense.clone(), p.dense.clone()
    either.jaccard_rerank(*csr, p.largest, mixed, lambda_value, True, 2)
    reference.jaccard_rerank(*wanted, p.largest, exact, lambda_value, True, 2)
    assert (mixed - exact).abs().max() <= 1e-6

    for top_k in (1, 7, len(p.gallery) + 3):
        best, found, rescanned = either.jaccard_rerank_top_k(
            *csr, p.query_index, p.query_key, p.largest, p.query, p.gallery, top_k, lambda_value, True, 2
        )
        assert 0 <= rescanned <= len(p.query)
        assert_best(best, found, exact, top_k)

    pairs, all_pairs = either.jaccard_distance(*csr), reference.jaccard_distance(*wanted)
    assert_rows_ascend(pairs)
    assert (dense_of(pairs, 1.0) - dense_of(all_pairs, 1.0)).abs().max() <= 1e-6
    assert (dense_of(pairs, 1.0).diagonal() == 0).all()


def assert_best(best: Tensor, found: Tensor, exact: Tensor, top_k: int) -> None:
    """The smallest of exact [nq, ng], ascending, each once, padded."""
    count = min(top_k, exact.shape[1])
    wanted = exact.double().sort(1).values[:, :count]
    assert (best[:, :count] - wanted).abs().max() <= 1e-6
    assert (exact.double().gather(1, found[:, :count]) - wanted).abs().max() <= 1e-6
    assert all(len(set(row)) == count for row in found[:, :count].tolist())
    assert (best[:, :count].diff(dim=1) >= 0).all()
    assert best[:, count:].isinf().all()
    assert (found[:, count:] == -1).all()


def whole(run: Any, p: Problem, k1: int, k2: int, top_k: int, options: tuple[bool, int] = (True, 2)) -> list[Tensor]:
    """Everything that follows from the lists."""
    csr = run.reciprocal_encoding(*p.encoding(k1, k2, *options))
    size = int(csr[0][-1])
    mixed = p.dense.clone()
    run.jaccard_rerank(*csr, p.largest, mixed, 0.3, *options)
    lists = (p.query_index, p.query_key, p.largest, p.query, p.gallery)
    best, found, _ = run.jaccard_rerank_top_k(*csr, *lists, top_k, 0.3, *options)
    return [csr[0], csr[1][:size], csr[2][:size], mixed, best, found, *run.jaccard_distance(*csr)]


@pytest.mark.parametrize("options", [(True, 4), (False, 2), (False, 4)], ids=str)
def test_named_options(either, options):
    """Check 12: power and normalize."""
    p = problem()
    scale = p.dense.mean().sqrt()
    p = Problem.of(p.query / scale, p.gallery / scale, 21, 30)
    got, wanted = whole(either, p, 20, 6, 7, options), whole(reference, p, 20, 6, 7, options)
    assert torch.equal(got[0], wanted[0])
    assert (dense_of(tuple(got[:3])) - dense_of(tuple(wanted[:3]))).abs().max() <= 1e-6
    assert (got[3] - wanted[3]).abs().max() <= 2e-6 * wanted[3].abs().max()
    assert_best(got[4], got[5], wanted[3], 7)


def test_invariants(either):
    """Check 4: rows of V' sum to 1, J is symmetric, in [0, 1], 0 with itself; k2 = 1 is no expansion."""
    p = problem()
    for k2 in (1, 6):
        csr = either.reciprocal_encoding(*p.encoding(20, k2))
        assert (dense_of(csr).sum(1) - 1).abs().max() <= 1e-6
        J = dense_of(either.jaccard_distance(*csr), 1.0)
        assert torch.equal(J, J.T)
        assert J.min() == 0
        assert J.max() <= 1
        mixed = p.dense.clone()
        either.jaccard_rerank(*csr, p.largest, mixed, 0.0, True, 2)
        assert (mixed - J[:9, 9:]).abs().max() <= 1e-6


def test_lists_that_are_too_short_are_rescanned(either):
    """Check 6: where the listed neighbours of a query do not settle its best rows, all of its distances do."""
    p = problem(nq=6, ng=90, query_k=8)
    csr = either.reciprocal_encoding(*p.encoding(7, 3))
    exact = p.dense.clone()
    reference.jaccard_rerank(*reference.reciprocal_encoding(*p.encoding(7, 3)), p.largest, exact, 0.9, True, 2)
    lists = (p.query_index, p.query_key, p.largest, p.query, p.gallery)
    best, found, rescanned = either.jaccard_rerank_top_k(*csr, *lists, 40, 0.9, True, 2)
    assert 1 <= rescanned <= 6
    assert_best(best, found, exact, 40)
    best, found, rescanned = either.jaccard_rerank_top_k(*csr, *lists, 2, 0.9, True, 2)
    assert rescanned < 6
    assert_best(best, found, exact, 2)


def test_without_features_the_rest_counts_as_the_last_listed(either):
    p = problem(query_k=21)
    arguments = p.encoding(20, 6)
    arguments = (*arguments[:3], None, None, *arguments[5:])
    csr, wanted = either.reciprocal_encoding(*arguments), reference.reciprocal_encoding(*arguments)
    assert (dense_of(csr) - dense_of(wanted)).abs().max() <= 1e-6
    lists = (p.query_index, p.query_key, p.largest, None, None)
    for top_k in (3, 50):
        best, found, _ = either.jaccard_rerank_top_k(*csr, *lists, top_k, 0.3, True, 2)
        exact, rows, _ = reference.jaccard_rerank_top_k(*wanted, *lists, top_k, 0.3, True, 2)
        assert (best - exact).abs().max() <= 1e-6
        assert (found == rows).double().mean() > 0.9  # others are equal to within that


@pytest.mark.parametrize(("nq", "ng"), [(1, 1), (2, 3), (0, 7), (7, 0), (1, 0)])
def test_few_rows(either, nq, ng):
    """Check 5: N <= k1, no query, no gallery, one sample; and duplicates."""
    x = clustered(nq + ng, 5).repeat_interleave(2, 0)[: nq + ng]
    p = Problem.of(x[:nq], x[nq:], 21, 21)
    csr, wanted = either.reciprocal_encoding(*p.encoding(20, 6)), reference.reciprocal_encoding(*p.encoding(20, 6))
    assert (dense_of(csr) - dense_of(wanted)).abs().max() <= 1e-6
    if nq > 0 and ng > 0:
        exact = p.dense.clone()
        reference.jaccard_rerank(*wanted, p.largest, exact, 0.3, True, 2)
        lists = (p.query_index, p.query_key, p.largest, p.query, p.gallery)
        assert_best(*either.jaccard_rerank_top_k(*csr, *lists, 5, 0.3, True, 2)[:2], exact, 5)
    either.jaccard_rerank(*csr, p.largest, p.dense, 0.3, True, 2)
    pairs = reference.jaccard_distance(*wanted)
    assert (dense_of(either.jaccard_distance(*csr), 1.0) - dense_of(pairs, 1.0)).abs().max() <= 1e-6


def test_equal_rows(either):
    """Check 5: all distances are 0, lists are by index."""
    p = Problem.of(torch.ones(4, 5), torch.ones(40, 5), 21, 21)
    mixed, best, found = whole(either, p, 20, 6, 6)[3:6]
    exact = whole(reference, p, 20, 6, 6)[3]
    assert (mixed - exact).abs().max() <= 1e-6
    assert_best(best, found, exact, 6)


def test_indices_out_of_range_do_no_harm(run_small):
    """They count as the nearest row that there is."""
    p = problem()
    index = p.index.clone()
    index[3, 5], index[60, 20], index[8, 0] = -(2**40), 2**40, 69
    got = run_small.reciprocal_encoding(index, *p.encoding(20, 6)[1:])
    wanted = run_small.reciprocal_encoding(index.clamp(0, 68), *p.encoding(20, 6)[1:])
    size = int(got[0][-1])
    assert all(torch.equal(a[:size], b[:size]) for a, b in zip(got, wanted, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nq=st.integers(1, 6),
    ng=st.integers(1, 50),
    seed=st.integers(0, 10_000),
    k1=st.integers(1, 30),
    k2=st.integers(1, 9),
    top_k=st.integers(1, 12),
    spread=st.floats(0.05, 2),
)
def test_property_best_rows_are_those_of_the_dense_result(run_small, nq, ng, seed, k1, k2, top_k, spread):
    """Check 6."""
    p = Problem.of(clustered(nq, seed, spread=spread), clustered(ng, seed + 1, spread=spread), k1 + 1, 3 * top_k)
    mixed, best, found = whole(run_small, p, k1, k2, top_k)[3:6]
    assert_best(best, found, mixed, top_k)
    exact = whole(reference, p, k1, k2, top_k)[3]
    assert (mixed - exact).abs().max() <= 1e-6


def test_thread_order_does_not_matter(either, monkeypatch):
    """Check 8, of everything, and of the GNN; atomics only ever add integers."""
    p, q = problem(), Problem.of(clustered(9, 1), clustered(60, 2), 26, 30, "cosine")

    def results() -> list[Tensor]:
        scores = q.dense.clone()
        either.gnn_rerank(q.index, q.key, scores, 7, 0.3)
        best = either.gnn_rerank_top_k(q.index, q.key, q.query_index, q.query_key, q.query, q.gallery, 5, 7, 0.3)
        return [*whole(either, p, 20, 6, 7), scores, *best]

    plain = results()
    for order in ("reverse", "random:1", "random:2"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


def test_chunks_change_no_bit(run, run_small):
    """How many columns and threads a block has changes nothing of the integers that are added."""
    p = problem()
    assert all(torch.equal(a, b) for a, b in zip(whole(run, p, 20, 6, 7), whole(run_small, p, 20, 6, 7), strict=True))


@pytest.mark.parametrize(("sanitizer", "definitions"), [("address", SMALL), ("thread", SMALL), ("thread", ())])
def test_sanitizers(sanitizer, definitions):
    """No access out of bounds, no undefined behaviour, no race between the threads of a block; metrics included."""
    metrics = ("ND_RETRIEVAL_METRICS_TILE=8", "ND_RETRIEVAL_METRICS_FLAG_BYTES=0") if definitions else ()
    sources = [Path(__file__).with_name("reranking_cuda_driver.cu"), *SOURCES, CUDA / "retrieval_metrics.cu"]
    program = emulation.build_program(sources, sanitizer=sanitizer, definitions=(*definitions, *metrics))
    result = emulation.run(program, order="random:1")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_rules(device):
    """Schemas and fake kernels of all operators; a compiled part takes an encoding that was made before."""
    p, q = problem(), Problem.of(clustered(9, 1), clustered(60, 2), 26, 30, "cosine")
    ops = torch.ops.neuraldeps
    encoding = [x.to(device) if isinstance(x, Tensor) else x for x in p.encoding(20, 6)]
    csr = ops.reciprocal_encoding(*encoding)
    _, _, largest, query, gallery, *_ = encoding
    lists = (p.query_index.to(device), p.query_key.to(device), largest, query, gallery)
    of_q = [x.to(device) for x in (q.index, q.key, q.query_index, q.query_key, q.query, q.gallery, q.dense)]
    calls = (
        (ops.reciprocal_encoding, encoding),
        (ops.jaccard_rerank, (*csr, largest, p.dense.to(device), 0.3, True, 2)),
        (ops.jaccard_rerank_top_k, (*csr, *lists, 5, 0.3, True, 2)),
        (ops.jaccard_distance, csr),
        (ops.gnn_rerank, (*of_q[:2], of_q[-1], 7, 0.3)),
        (ops.gnn_rerank_top_k, (*of_q[:-1], 5, 7, 0.3)),
    )
    for operator, arguments in calls:
        torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *args: ops.jaccard_rerank_top_k(*args)[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(*calls[2][1]), ops.jaccard_rerank_top_k(*calls[2][1])[0])


def test_refused_arguments(run):
    """An error code, and no pointer is read."""
    lists = Lists(5, 3, None, None)
    encoding = {"lists": lists, "forward": 3, "half": 2, "expand": 2, "power": 2}
    for change in (
        {"forward": 0},
        {"half": 0},
        {"expand": 0},
        {"power": 3},
        {"lists": Lists(-1, 3)},
        {"lists": Lists(5, 0)},
    ):
        args = Encoding(**(encoding | change))
        assert run.library.nd_reciprocal_encoding(ctypes.byref(args), None, None) != 0
        assert run.library.nd_reciprocal_encoding_room(ctypes.byref(args)) == 0
    for change in ({"rows": -1}, {"num_queries": 6}, {"power": 3}, {"room": -1}):
        args = Jaccard(**({"rows": 5, "num_queries": 2, "power": 2} | change))
        assert run.library.nd_jaccard_rerank(ctypes.byref(args), None, None) != 0
    for change in ({"expand": 4}, {"expand": 0}, {"num_queries": 6}, {"edges": -1}):
        args = Gnn(**({"lists": lists, "num_queries": 2, "expand": 2} | change))
        assert run.library.nd_gnn_rerank(ctypes.byref(args), None, None, None) != 0


# ------------------------------------------------------------------------------------------------ on a device


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"k1": 6, "k2": 1}, {"power": 4}, {"list_length": "k1"}], ids=str)
def test_public_functions_on_a_device(options):
    """Check 11: equal to those of the CPU, dense, best rows and pairs."""
    query, gallery = clustered(70, 1, D=64, centres=40), clustered(900, 2, D=64, centres=40)
    on_device = (query.cuda(), gallery.cuda())
    exact = k_reciprocal_rerank(query, gallery, **options)
    assert (k_reciprocal_rerank(*on_device, **options).cpu() - exact).abs().max() <= 1e-6
    best, found = k_reciprocal_rerank(*on_device, **options, top_k=20)
    assert_best(best.cpu(), found.cpu(), exact, 20)
    x = torch.cat([query, gallery])
    pairs = jaccard_distance(x.cuda(), **options)
    assert (pairs.cpu().to_dense() - jaccard_distance(x, **options).to_dense()).abs().max() <= 1e-6
    if not options:
        scores = gnn_rerank(query, gallery)
        assert (gnn_rerank(*on_device).cpu() - scores).abs().max() <= 2e-6
        best, found = gnn_rerank(*on_device, top_k=20)
        assert_best(-best.cpu(), found.cpu(), -scores, 20)


@pytest.mark.gpu
def test_more_gallery_rows_than_a_chunk_holds_on_a_device():
    """Check 11: 45,000 rows, two chunks of counters and more; and the GNN past 32-bit products (check 9)."""
    query, gallery = clustered(40, 1, D=32, centres=3000), clustered(50_000, 2, D=32, centres=3000)
    for rerank in (k_reciprocal_rerank, gnn_rerank):
        exact = rerank(query, gallery)
        dense = rerank(query.cuda(), gallery.cuda()).cpu()
        assert (dense - exact).abs().max() <= 2e-6
        best, found = rerank(query.cuda(), gallery.cuda(), top_k=30)
        sign = -1 if rerank is gnn_rerank else 1
        assert_best(sign * best.cpu(), found.cpu(), sign * exact, 30)


@pytest.mark.gpu
def test_lists_of_another_search_engine_on_a_device():
    p = problem(nq=30, ng=400, query_k=40)
    arguments = (p.index, p.key, 30)
    exact = k_reciprocal_rerank_from_neighbors(*arguments, row_max=p.largest)
    on_device = (p.index.cuda(), p.key.cuda(), 30)
    got = k_reciprocal_rerank_from_neighbors(*on_device, row_max=p.largest.cuda())
    assert (got.cpu() - exact).abs().max() <= 1e-6
    with pytest.raises(ValueError, match=r"indices must be in 0\.\.429"):
        k_reciprocal_rerank_from_neighbors(p.index.cuda() + 1, *on_device[1:], row_max=p.largest.cuda())


@pytest.mark.gpu
def test_sparse_stages_wait_for_nothing():
    """Encoding, dense and best rows are captured in a CUDA graph, which replays to the same bits."""
    p = problem(nq=30, ng=400, query_k=40)
    index, key, largest, query, gallery = (x.cuda() for x in p.encoding(20, 6)[:5])
    lists = (p.query_index.cuda(), p.query_key.cuda(), largest, query, gallery)
    dense = p.dense.cuda()

    def run() -> tuple[Tensor, ...]:
        csr = torch.ops.neuraldeps.reciprocal_encoding(index, key, largest, query, gallery, 21, 11, 6, True, 2)
        mixed = dense.clone()
        torch.ops.neuraldeps.jaccard_rerank(*csr, largest, mixed, 0.3, True, 2)
        return mixed, *torch.ops.neuraldeps.jaccard_rerank_top_k(*csr, *lists, 9, 0.3, True, 2)

    plain = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ------------------------------------------------------------------------------------------------ GNN


# (k1, k2, lambda): defaults for persons; all of a list; no layer; the graph alone
@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(26, 7, 0.3), (6, 6, 0.5), (5, 1, 0.4), (12, 3, 0.0)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gnn_matches_the_reference(either, k1, k2, lambda_value, dtype):
    """Check 9."""
    p = Problem.of(clustered(9, 1).to(dtype), clustered(60, 2).to(dtype), k1, 30, "cosine")
    mixed, exact = p.dense.clone(), p.dense.clone()
    either.gnn_rerank(p.index, p.key, mixed, k2, lambda_value)
    gnn_reference.gnn_rerank(p.index, p.key, exact, k2, lambda_value)
    assert (mixed - exact).abs().max() <= 1e-6
    for top_k in (1, 7, len(p.gallery) + 3):
        score, found = either.gnn_rerank_top_k(
            p.index, p.key, p.query_index, p.query_key, p.query, p.gallery, top_k, k2, lambda_value
        )
        assert_best(-score, found, -exact, top_k)
