"""The CUDA kernels of nearest neighbours, emulated, through their C interface; and the operators on a device.

Between the kernels runs the same Python code as on a device; only the products of 16-bit copies come from the CPU.
Checks are numbered as in the specification of re-ranking.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_retrieval import assert_nearest, keys
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.ops import retrieval_cuda
from neuraldeps_kernels.ops.retrieval_cuda import Found, Problem, search

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
METRICS = ("sqeuclidean", "cosine", "inner_product")
KERNEL = emulation.ROOT / "csrc" / "cuda" / "retrieval.cu"
Search = Callable[[Problem], Found]

# (n, m, D, k), m = 0 for rows among themselves: the smallest; one warp of columns and one more; tiles with columns on
# both sides of the rows; more columns than a warp looks at before it meets; k as large as there are rows.
SHAPES = [
    (1, 0, 1, 1),
    (2, 0, 3, 2),
    (33, 0, 17, 33),
    (150, 0, 40, 9),
    (7, 300, 33, 12),
    (140, 150, 12, 5),
    (9, 20, 150, 20),
    (5, 1, 8, 1),
]

P, I, J = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FIELDS = {
    "x": P, "y": P, "dtype": J, "joined": J, "metric": J, "n": I, "m": I, "dim": I, "x_stride": I, "y_stride": I,
    "k": I, "num_queries": I, "query_k": I, "wants_largest": J, "split": J, "fine": J, "bfloat16": J, "left": P,
    "right": P,
}  # fmt: skip


def up(count: int) -> int:
    return -(-count // 8) * 8


class Arguments(ctypes.Structure):
    """NdNeighborsArgs of cuda_api.h."""

    _fields_ = list(FIELDS.items())


class Emulated:
    """`retrieval_cuda.Kernels` by an emulated library; all memory is nonsense before, and nothing is written beyond."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.nd_neighbors_workspace.restype = ctypes.c_size_t
        self.rounding = 0.0  # of products, of what is allowed for
        self.chance = torch.Generator().manual_seed(0)

    def arguments(self, problem: Problem) -> Arguments:
        x, y = problem.x, problem.y
        names = ("joined", "metric", "k", "num_queries", "query_k", "wants_largest", "split", "fine", "bfloat16")
        args = Arguments(
            dtype=[F32, F64].index(x.dtype), n=len(x), dim=x.shape[1], x=x.data_ptr(), x_stride=x.stride(0)
        )
        if y is not None:
            args.m, args.y, args.y_stride = len(y), y.data_ptr(), y.stride(0)
        for name, value in zip(names, problem.how, strict=True):
            setattr(args, name, value)
        return args

    def call(self, name: str, *arguments: Any) -> None:
        assert self.code(name, *arguments) == 0

    def code(self, name: str, *arguments: Any) -> int:
        kinds = {Tensor: lambda t: P(t.data_ptr()), int: I, Arguments: ctypes.byref, type(None): lambda _: P(None)}
        return int(getattr(self.library, name)(*(kinds[type(value)](value) for value in arguments), P(None)))

    def prepare(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        args = self.arguments(problem)
        kind, width = BF16 if problem.bfloat16 else F16, (3 if args.split else 1) * up(args.dim)
        self.left = torch.full((up(problem.searched) + 1, width), torch.nan, dtype=kind)
        one_copy = problem.joined and not args.split
        self.right = self.left[:1] if one_copy else torch.full((up(problem.among) + 1, width), torch.nan, dtype=kind)
        args.left, args.right = self.left.data_ptr(), (self.left if one_copy else self.right).data_ptr()
        needed = self.library.nd_neighbors_workspace(ctypes.byref(args))
        memory = torch.full((needed + 512,), 0xA5, dtype=torch.uint8)
        begin = -memory.data_ptr() % 256
        workspace = memory[begin : begin + needed]
        self.behind = memory[begin + needed :]
        self.call("nd_neighbors_prepare", args, workspace)
        return self.left[:-1], self.right[:-1], workspace

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        exact = left.double() @ right.double().T
        assert exact.isfinite().all()
        bound = (1.5 * left.shape[1] + 16) * 2.0**-23 * (left.double().abs() @ right.double().abs().T)
        out.copy_(exact + self.rounding * bound * (torch.rand(bound.shape, generator=self.chance) - 0.5).sign())

    def offer(self, problem: Problem, workspace: Tensor, product: Tensor, *tile: int) -> None:
        self.call("nd_neighbors_offer", self.arguments(problem), product, product.stride(0), *tile, workspace)

    def finish(self, problem: Problem, workspace: Tensor) -> tuple[Tensor, ...]:
        N, Q = problem.searched, problem.num_queries
        guarded = [
            torch.full((rows * count + 8,), -7, dtype=kind)
            for rows, count, kind in (
                (N, problem.k, F64),
                (N, problem.k, torch.int64),
                (N, int(problem.largest), F64),
                (Q, problem.query_k, F64),
                (Q, problem.query_k, torch.int64),
            )
        ]
        given_largest = guarded[2] if problem.largest else None
        self.call("nd_neighbors_finish", self.arguments(problem), *guarded[:2], given_largest, *guarded[3:], workspace)
        assert all((x[-8:] == -7).all() for x in guarded)
        assert (self.behind == 0xA5).all()
        assert self.left[-1].isnan().all()
        assert len(self.right) == 1 or self.right[-1].isnan().all()
        shapes = ((N, problem.k), (N, problem.k), (-1,), (Q, problem.query_k), (Q, problem.query_k))
        return tuple(x[:-8].view(shape) for x, shape in zip(guarded, shapes, strict=True))

    def write_dense(
        self, problem: Problem, workspace: Tensor, product: Tensor, first_row: int, rows: int, dense: Tensor
    ) -> None:
        stride = product.stride(0)
        self.call("nd_neighbors_dense", self.arguments(problem), product, stride, first_row, rows, dense, workspace)


@pytest.fixture(scope="session")
def kernels() -> Emulated:
    return Emulated(emulation.build_library([KERNEL]))


def on_device(problem: Problem) -> Found:
    """`search` on a device, where a wait of the host is an error."""
    moved = replace(problem, x=problem.x.cuda(), y=None if problem.y is None else problem.y.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = search(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return tuple(part.cpu() for part in found)  # type: ignore[return-value]


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, kernels: Emulated) -> Search:
    return on_device if request.param == "device" else lambda problem: search(problem, kernels)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows make many tiles, of more rows than columns look at before their block meets (128)."""
    monkeypatch.setattr(retrieval_cuda, "_TILE_ROWS", 136)
    monkeypatch.setattr(retrieval_cuda, "_TILE_COLUMNS", 72)
    monkeypatch.setattr(retrieval_cuda, "_DENSE_ROWS", 8)
    monkeypatch.setattr(retrieval_cuda, "_SUMMED_COLUMNS", 64)


def normal(rows: int, D: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, D, generator=generator, dtype=F64) + 1).to(dtype)


@pytest.mark.parametrize("how", ["fine", "coarse", "bfloat16"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_equal_the_definition(run, shape, metric, how, monkeypatch) -> None:
    """Checks 2, 3 and 11, for copies of three parts and of one; the largest distances too."""
    n, m, D, k = shape
    if how != "fine":
        monkeypatch.setattr(retrieval_cuda, "_FINE_DIM", 0)
    for dtype in (F32, F64):
        x, y = normal(n, D, 0, dtype), normal(m, D, 1, dtype) if m else None
        problem = Problem(x, y, y is None, metric, k, largest=True, bfloat16=how == "bfloat16")
        key, index, largest, *_ = run(problem)
        assert_nearest(x, y, k, metric, key, index)
        every = keys(x, x if y is None else y, metric)
        np.testing.assert_allclose(largest.numpy(), every.max(1), rtol=0, atol=1e-12 * max(1, np.abs(every).max()))


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_products_may_be_off_by_what_the_bound_allows(kernels, metric, fine, monkeypatch) -> None:
    """Check 3: the certificate holds for the worst rounding of the matrix products, in every entry."""
    monkeypatch.setattr(kernels, "rounding", 0.99)
    monkeypatch.setattr(retrieval_cuda, "_FINE_DIM", 128 * fine)
    x = normal(60, 40).repeat(3, 1) * (1 + 1e-4 * normal(180, 1, 7))  # near ties throughout
    key, index, largest, *_ = search(Problem(x, None, True, metric, 7, largest=True), kernels)
    assert_nearest(x, None, 7, metric, key, index)
    every = keys(x, x, metric)
    np.testing.assert_allclose(largest.numpy(), every.max(1), rtol=0, atol=1e-12 * max(1, np.abs(every).max()))


@pytest.mark.parametrize("closer", [0, 1])
@pytest.mark.parametrize("fine", [False, True])
def test_a_near_tie_is_decided_by_float64(run, closer, fine, monkeypatch) -> None:
    """Checks 2 and 3: a pair of equal float32 distances at the boundary, in both index orders."""
    monkeypatch.setattr(retrieval_cuda, "_FINE_DIM", 128 * fine)
    x = torch.randn(160, 64, generator=torch.Generator().manual_seed(3))
    x[0] = 0
    radius = x[1:].double().norm(dim=1).sort().values
    r = float((radius[19] + radius[20]) / 2)  # two rows on the boundary, along an axis each
    x[60], x[145] = 0, 0
    x[60, 0], x[145, 1] = r, r
    step = torch.tensor(r).nextafter(torch.tensor(np.inf)) - r
    x[[145, 60][closer], 2] = float(step) ** 0.5 * 1e-2  # adds some 1e-11 r to one of the two squares
    d = keys(x[:1], x)[0]
    gap = abs(d[60] - d[145]) / d[60]
    assert 0 < gap < 6e-9
    rank = int((d < d[[60, 145][closer]]).sum()) + 1  # of the closer one, counted from 1
    for problem in (Problem(x, None, True, "sqeuclidean", rank), Problem(x[:1], x, False, "sqeuclidean", rank + 1)):
        index = run(problem)[1]
        np.testing.assert_array_equal(index[0].numpy(), np.argsort(d, kind="stable")[: problem.k])


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_equal_distances_come_by_index(run, metric) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).repeat(9, 1)  # every row 9 times
    key, index, *_ = run(Problem(x, None, True, metric, 9))
    assert (key == 0).all()
    np.testing.assert_array_equal(index[:20].numpy(), np.arange(9) * 20 + np.arange(20)[:, None])


@pytest.mark.parametrize("metric", ["sqeuclidean", "inner_product"])
def test_rows_without_room_are_searched_in_float64(run, metric) -> None:
    """Lists of 174 candidates: equal rows fill those of rows and of columns, and more of them than there are blocks."""
    x = torch.zeros(190, 3)
    x[5], x[180] = 1, 1
    key, index, largest, *_ = run(Problem(x, None, True, metric, 3, largest=True))
    every = keys(x, x, metric)
    order = np.argsort(every, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(index.numpy(), order)
    np.testing.assert_array_equal(key.numpy(), np.take_along_axis(every, order, 1))
    np.testing.assert_array_equal(largest.numpy(), every.max(1))


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("shape", [(7, 150, 90, 4, 30), (31, 10, 5, 41, 41), (1, 9, 200, 2, 0)], ids=str)
def test_longer_lists_and_all_distances_of_queries(run, shape, metric) -> None:
    """What re-ranking needs; distances from products of three parts are good to float32."""
    n, m, D, k, query_k = shape
    query, gallery = normal(n, D), normal(m, D, 1)
    x = torch.cat([query, gallery])
    problem = Problem(query, gallery, True, metric, k, n, query_k, largest=True, dense=True)
    key, index, largest, query_key, query_index, dense = run(problem)
    every = keys(x, x, metric)
    assert_nearest(x, None, k, metric, key, index)
    if query_k:
        assert_nearest(query, x, query_k, metric, query_key, query_index)
    assert query_index.shape == (n, query_k)
    np.testing.assert_allclose(largest.numpy(), every.max(1), rtol=1e-12)
    np.testing.assert_allclose(dense.numpy(), every[:n, n:], rtol=0, atol=1e-6 * every.max())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_extreme_units_a_common_offset_and_one_huge_row(run, metric, scale) -> None:
    x = normal(90, 20, 5)
    plain = run(Problem(x, None, True, metric, 9))[1]
    scaled = x * 2.0 ** round(np.log2(scale))
    assert torch.equal(run(Problem(scaled, None, True, metric, 9))[1], plain)
    far = (x * 2**-6).double() + 1000  # cancellation that float32 products would not survive
    assert_nearest(far, None, 9, metric, *run(Problem(far, None, True, metric, 9))[:2])
    x[17] *= 1e6
    assert_nearest(x, None, 9, metric, *run(Problem(x, None, True, metric, 9))[:2])


@pytest.mark.parametrize(("metric", "bad"), [*itertools.product(METRICS, (np.nan, np.inf, -np.inf)), ("cosine", 0.0)])
def test_a_refused_row_makes_all_keys_nan(run, metric, bad) -> None:
    """Wherever it is; indices stay within range, for whoever goes on with them."""
    x = normal(150, 6)
    x[140] = bad
    x[141, 3] = bad
    key, index, largest, query_key, _, dense = run(
        Problem(x[:9], x[9:], True, metric, 4, 9, 20, largest=True, dense=metric != "inner_product")
    )
    assert all(part.isnan().all() for part in (key, largest, query_key, dense))
    assert torch.equal(index, torch.arange(4).expand(150, 4))


def test_orders_of_threads_give_the_same_bits(kernels, monkeypatch) -> None:
    """Check 8."""
    x = normal(180, 30).repeat_interleave(2, 0)[:190]
    problem = Problem(x[:8], x[8:], True, "sqeuclidean", 6, 8, 12, largest=True, dense=True)
    plain = search(problem, kernels)
    for order in ("reverse", "random:1"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(search(problem, kernels), plain, strict=True))


def test_strides(run) -> None:
    x, y = normal(40, 20), normal(50, 20, 1)
    wide_x, wide_y = torch.full((40, 33), torch.nan), torch.full((50, 27), torch.nan)
    wide_x[:, 4:24], wide_y[:, :20] = x, y
    plain = run(Problem(x, y, False, "cosine", 5))
    strided = run(Problem(wide_x[:, 4:24], wide_y[:, :20], False, "cosine", 5))
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert run(Problem(x[:0], y, False, "cosine", 5))[1].shape == (0, 5)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    base=st.integers(0, 60),
    D=st.integers(1, 20),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(["sqeuclidean", "inner_product"]),
)
def test_property_small_integers_have_exact_lists(kernels, rows, base, D, levels, seed, metric) -> None:
    """Values of a few levels tie constantly; every order must be that of (distance, index)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, D), generator=generator).float()
    y = torch.randint(-levels, levels + 1, (base, D), generator=generator).float() if base else None
    every = keys(x, x if y is None else y, metric)
    k = 1 + seed % every.shape[1]
    key, index, *_ = search(Problem(x, y, y is None, metric, k), kernels)
    order = np.argsort(every, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index.numpy(), order)
    np.testing.assert_array_equal(key.numpy(), np.take_along_axis(every, order, 1))


def test_sums_in_float16_are_never_trusted(monkeypatch) -> None:
    """Where torch is told to sum products of float16 in float16, copies are bfloat16."""
    seen: list[Problem] = []
    monkeypatch.setattr(retrieval_cuda, "search", lambda problem: seen.append(problem) or (problem.x,) * 6)
    x, settings = normal(4, 3), torch.backends.cuda.matmul
    before = settings.allow_fp16_accumulation
    for allowed in (False, True):
        settings.allow_fp16_accumulation = allowed
        try:
            retrieval_cuda.neighbors(x, None, 2, "cosine", True)
        finally:
            settings.allow_fp16_accumulation = before
    assert [problem.bfloat16 for problem in seen] == [False, True]


def test_refused_arguments(kernels) -> None:
    """An error code, nothing written."""
    x = normal(9, 4)
    good = kernels.arguments(Problem(x, None, True, "cosine", 3))
    wrong = {"k": 10, "dtype": 2, "metric": 3, "dim": 0, "num_queries": 10, "query_k": 2, "fine": 1, "n": 1 << 31}
    for name, value in wrong.items():
        args = Arguments.from_buffer_copy(good)
        args.split = 0
        setattr(args, name, value)
        assert kernels.library.nd_neighbors_workspace(ctypes.byref(args)) == 0
        assert kernels.code("nd_neighbors_prepare", args, None) != 0
    tile = torch.zeros(9, 16)
    for rows, columns in ((10, 9), (9, 10), (0, 9)):
        assert kernels.code("nd_neighbors_offer", good, tile, 16, 0, rows, 0, columns, None) != 0
    assert kernels.code("nd_neighbors_dense", good, tile, 16, 0, 1, tile, None) != 0


# lists of rows and columns; rows without room; copies of three parts with all distances
@pytest.mark.parametrize("problem", ["plain", "equal", "dense"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(problem, sanitizer) -> None:
    """No access out of bounds, no undefined behaviour, no race between the threads of a block."""
    sources = [Path(__file__).with_name("retrieval_cuda_driver.cu"), KERNEL]
    program = emulation.build_program(sources, sanitizer=sanitizer, definitions=["ND_RETRIEVAL_COLUMN_WARPS=2"])
    result = emulation.run(program, problem, order="random:1")
    assert result.returncode == 0, result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------ on a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("D", [24, 512, 2048, 6144])
def test_products_of_a_device_are_within_the_bound(D, dtype) -> None:
    """What the certificate assumes of matrix units: also for terms of one sign, of which none may be lost to others."""
    for a, b in (
        (normal(512, D), normal(4096, D, 1)),
        (normal(512, D).abs() + 50, normal(4096, D, 1).exp().clamp(max=200)),
    ):
        left, right = a.to(dtype).cuda(), b.to(dtype).cuda()
        product = torch.empty(512, 4096, device="cuda")
        retrieval_cuda._Device().multiply(left, right, product)
        exact, absolute = left.double() @ right.double().T, left.double().abs() @ right.double().abs().T
        assert ((product.double() - exact).abs() <= (1.5 * D + 16) * 2.0**-23 * absolute).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_a_device_finds_what_the_cpu_finds(metric, dtype, monkeypatch) -> None:
    """Check 11, at the sizes of tiles that are used."""
    monkeypatch.undo()
    for x, y, k in (
        (normal(5000, 512, 0, dtype), None, 21),
        (normal(300, 2048, 0, dtype), normal(9000, 2048, 1, dtype), 60),
        (normal(70, 33, 0, dtype), normal(6000, 33, 1, dtype), 2000),
    ):
        wanted = nk.knn(x, k, y=y, metric=metric)
        found = nk.knn(x.cuda(), k, y=None if y is None else y.cuda(), metric=metric)
        assert torch.equal(found[1].cpu(), wanted[1])
        torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-6, atol=1e-6 * float(wanted[0].abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [None, 50])
def test_a_device_reranks_as_the_cpu_does(top_k, monkeypatch) -> None:
    """Check 11."""
    monkeypatch.undo()
    centres = normal(200, 256, 5)
    x = centres.repeat(12, 1) + 2 * normal(2400, 256, 6)
    wanted = nk.k_reciprocal_rerank(x[:400], x[400:], top_k=top_k)
    found = nk.k_reciprocal_rerank(x[:400].cuda(), x[400:].cuda(), top_k=top_k)
    for a, b in zip(*((r,) if top_k is None else r[:1] for r in (found, wanted)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_a_device_refuses_rows_and_needs_no_matrix(monkeypatch) -> None:
    """Check 7 too: beside the rows a tile, the copies and the lists, far from N x N."""
    monkeypatch.undo()
    x = normal(40, 8).cuda()
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="x must be finite, but its row 7 is not"):
        nk.knn(x, 3)
    with pytest.raises(ValueError, match="y must be finite and without zero rows, but its row 2 is not"):
        nk.knn(x[:7], 3, y=torch.cat([x[:2], torch.zeros_like(x[:1])]), metric="cosine")
    with pytest.raises(ValueError, match="gallery must be finite, but its row 2 is not"):
        nk.k_reciprocal_rerank(x[:5], x[5:], k1=3)
    x = normal(40_000, 64).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nk.knn(x, 21)
    assert torch.cuda.max_memory_allocated() - before < 600 << 20
