"""The CUDA CovLasso kernel, emulated, through its C interface: optimal by an independent check, whole, repeatable.

The same cases run on a device in test_covlasso.py (marker gpu); array libraries are tested in test_native.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cov_factory as make
import emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuraldeps_kernels.reference import covlasso as reference

STATUS = {"converged": 0, "capped": 1, "collinear": 2, "not_psd": 3, "too_few": 4}
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-12}
KERNEL = emulation.ROOT / "csrc" / "cuda" / "covlasso.cu"
# Everything spills, and outputs of less than 17 places limit the active set to 32.
SMALL = ("ND_COVLASSO_SHARED_SUPPORT=16", "ND_COVLASSO_SHARED_COLUMNS=0", "ND_COVLASSO_LEAST_LIMIT=32")


P, I, D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
FIELDS = {
    "cov": P, "cov_stride": I, "n": I, "ld": I, "cross": P, "variance": P, "targets": P, "num_targets": I, "lam": P,
    "num_lams": I, "penalty": P, "penalty_stride": I, "ridge": D, "scale": P, "nonnegative": ctypes.c_int32,
    "start_value": P, "start_index": P, "start_count": P, "start_capacity": I, "tol": D, "max_pivots": I, "index": P,
    "value": P, "capacity": I, "count": P, "info": P,
}  # fmt: skip


class Arguments(ctypes.Structure):
    """NdCovlassoArgs of cuda_api.h."""

    _fields_ = list(FIELDS.items())


@dataclass
class Result:
    theta: Tensor  # [T, n] or [T, L, n]
    count: Tensor  # [T] or [T, L]
    info: Tensor  # [T, 6] or [T, L, 6]
    lam: Tensor  # [T] or [T, L]; chosen by top_k

    def at(self, which: Any, dim: int = 1) -> Result:
        """The solutions at the which-th penalty of a path; with dim = 0 those of some targets."""
        rows = (slice(None), which) if dim else which
        return Result(self.theta[rows], self.count[rows], self.info[rows], self.lam[rows])


def aligned_rows(x: Tensor, ld: int) -> np.ndarray:
    """x [..., n] in rows of ld values, nonsense behind column n, at a multiple of 64 bytes."""
    rows = np.full((*x.shape[:-1], ld), np.nan, x.numpy().dtype)
    rows[..., : x.shape[-1]] = x.numpy()
    store = np.empty(rows.size + 64, rows.dtype)
    aligned = store[(-store.ctypes.data % 64) // store.itemsize :][: rows.size].reshape(rows.shape)
    aligned[...] = rows
    return aligned


def solver(library: Path) -> Callable[..., Result]:
    """run(S, targets, lam, penalty, ...): the C interface of an emulated library on outputs filled with nonsense.

    S [n, n] or [T, n, n], without ridge; lam [T] or [T, L]; top_k: (k, position) in place of lam.
    """
    functions = ctypes.CDLL(str(library))

    def run(
        S: Tensor,
        targets: Tensor,
        lam: Tensor | None,
        penalty=None,
        *,
        cross=None,
        variance=None,
        nonnegative=False,
        ridge=0.0,
        start=None,
        scale=1.0,
        top_k=None,
        tol=None,
        max_pivots=20_000,
        capacity=None,
        extra_columns=0,
    ) -> Result:
        n, num_targets = S.shape[-1], len(targets)
        shape = (num_targets,) if lam is None else tuple(lam.shape)
        rows = int(np.prod(shape))
        suffix, T = ("f32", np.float32) if S.dtype == F32 else ("f64", np.float64)
        size, call = getattr(functions, f"nd_covlasso_workspace_{suffix}"), getattr(functions, f"nd_covlasso_{suffix}")
        size.restype, size.argtypes, call.argtypes = ctypes.c_size_t, [P], [P, P, P]
        capacity = (max(n - 1, 1) if capacity is None else capacity) if top_k is None else top_k[0]
        index, value = np.full((rows + 1, capacity), -7, np.int32), np.full((rows + 1, capacity), np.nan, T)
        count, info = np.full(rows + 1, -7, np.int32), np.full((rows + 1, 6), np.nan)
        unit = np.array([scale])
        args = Arguments(
            n=n, num_targets=num_targets, num_lams=shape[1] if len(shape) > 1 else 1, ridge=ridge,
            nonnegative=nonnegative, tol=TOLERANCE[S.dtype] if tol is None else tol, max_pivots=max_pivots,
            capacity=capacity, scale=None if scale == 1 else unit.ctypes.data,
            ld=(n + 15) // 16 * 16 + extra_columns, cov_stride=0,
        )  # fmt: skip
        kept = []

        def give(name: str, array: np.ndarray | None) -> None:
            if array is not None:
                kept.append(array)
                setattr(args, name, array.ctypes.data)

        give("cov", aligned_rows(scale * (S + ridge * torch.eye(n, dtype=S.dtype)), args.ld))
        if S.dim() == 3:
            args.cov_stride = n * args.ld
        give("cross", None if cross is None else aligned_rows(scale * cross.to(S.dtype), args.ld))
        give("variance", None if variance is None else variance.double().numpy())
        give("targets", targets.numpy().astype(np.int64))
        give("lam", None if lam is None else lam.double().contiguous().numpy())
        if penalty is not None:
            give("penalty", np.ascontiguousarray(penalty.numpy(), T))
            args.penalty_stride = n if penalty.dim() == 2 else 0
        if start is not None:
            args.start_capacity = start[0].shape[1]
            for name, part, dtype in zip(("value", "index", "count"), start, (T, np.int32, np.int32), strict=True):
                give(f"start_{name}", np.ascontiguousarray(part.numpy(), dtype))
        for name, array in (("index", index), ("value", value), ("count", count), ("info", info)):
            give(name, array)
        bytes_needed = size(ctypes.byref(args))
        workspace = np.full(bytes_needed + 512, 0xA5, np.uint8)
        first = -workspace.ctypes.data % 256
        end = first + bytes_needed
        if top_k is None:
            code = call(ctypes.byref(args), workspace.ctypes.data + first, None)
        else:
            chosen = np.full(num_targets + 1, np.nan)
            find = functions.nd_covlasso_top_k_f64
            find.argtypes = [P, I, D, P, P, P]
            code = find(ctypes.byref(args), *top_k, chosen.ctypes.data, workspace.ctypes.data + first, None)
            assert np.isnan(chosen[num_targets])
            lam = torch.from_numpy(chosen[:num_targets])
        assert code == 0
        assert (workspace[:first] == 0xA5).all()
        assert (workspace[end:] == 0xA5).all()
        assert (index[rows] == -7).all()
        assert np.isnan(value[rows]).all()
        assert count[rows] == -7
        assert np.isnan(info[rows]).all()
        assert np.isfinite(info[:rows]).all()
        theta = np.zeros((rows, n), T)
        for t, k in enumerate(count[:rows]):
            assert (np.diff(index[t, :k]) > 0).all()
            assert (index[t, k:] == 0).all()
            assert (value[t, :k] != 0).all()
            assert (value[t, k:] == 0).all()
            theta[t, index[t, :k]] = value[t, :k]
        return Result(
            torch.from_numpy(theta).view(*shape, n),
            torch.from_numpy(count[:rows]).view(shape),
            torch.from_numpy(info[:rows]).view(*shape, 6),
            lam,
        )

    return run


@pytest.fixture
def solve(emulated: Path) -> Callable[..., Result]:
    return solver(emulated)


@pytest.fixture(scope="session")
def solve_spilling() -> Callable[..., Result]:
    """Built with room for 16 coordinates and no column in shared memory: every larger set climbs through the slices."""
    return solver(emulation.build_library([KERNEL], definitions=SMALL))


@pytest.fixture(scope="session")
def solve_guarded() -> Callable[..., Result]:
    """Built to go over to single pivots after the first step, and to leave a homotopy for them at every turn."""
    return solver(
        emulation.build_library([KERNEL], definitions=["ND_COVLASSO_GUARD_AFTER=1", "ND_COVLASSO_PATIENCE=-1000000"])
    )


def certify(
    S: Tensor, targets: Tensor, lam: Tensor, result: Result, penalty: Tensor | None = None, **problem: Any
) -> None:
    """Converged, optimal, and every number reported is what the coefficients imply in float64.

    problem: cross, variance, nonnegative, ridge.
    """
    if lam.dim() == 2:
        for x in range(lam.shape[1]):
            certify(S, targets, lam[:, x], result.at(x), penalty, **problem)
        return
    tol, ridge = TOLERANCE[S.dtype], problem.get("ridge", 0.0)
    if ridge:  # it is added in the type of S
        unit = torch.eye(S.shape[-1], dtype=S.dtype)
        S = (S + ridge * unit).double() - ridge * unit.double()
    v = (S.double().diagonal() if problem.get("variance") is None else problem["variance"].double())[targets]
    v = v + ridge
    assert result.info[:, 4].tolist() == [STATUS["converged"]] * len(targets)
    violation = reference.kkt_violation(S, result.theta, targets, lam, penalty, **problem)
    assert violation.max() <= tol
    assert (result.info[:, 2] - violation).abs().max() <= 1e-12
    assert (result.info[:, 0] - reference.err2(S, result.theta, targets, **problem)).abs().le(1e-12 * v).all()
    gap = reference.duality_gap(S, result.theta, targets, lam, penalty, **problem)
    assert (result.info[:, 1] - gap).abs().le(1e-11 * v).all()
    top = reference.lambda_max(S, targets, penalty, **problem)
    torch.testing.assert_close(result.info[:, 5], top, rtol=1e-6, atol=0)
    assert result.count.tolist() == (result.theta != 0).sum(1).tolist()
    if problem.get("nonnegative"):
        assert (result.theta >= 0).all()


def equal(a: Result, b: Result) -> bool:
    return torch.equal(a.theta, b.theta) and torch.equal(a.count, b.count) and torch.equal(a.info, b.info)


# 1: no predictor; 2: one; 17, 33: one more than a block of the factor; 64, 100: several blocks; 200: more than shared
# memory holds, and columns that leave some warps without any
@pytest.mark.parametrize("n", [1, 2, 5, 17, 33, 64, 100, 200])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_optimal(solve, n, dtype):
    S = (make.mixed(n, seed=n) if n > 1 else torch.ones(1, 1)).to(dtype)
    targets = torch.tensor([0, n // 2, n - 1])
    for ratio in (0.9, 0.5, 0.1, 0.02):
        lam = ratio * reference.lambda_max(S, targets)
        result = solve(S, targets, lam)
        certify(S, targets, lam, result)
        theta = reference.covlasso(S, targets, lam, tol=1e-12)
        difference = result.info[:, 0] - reference.err2(S, theta, targets)
        assert difference.abs().le((1e-5 if dtype == F32 else 1e-11) * S.double().diagonal()[targets]).all()
    if n == 200:
        assert result.count.max() > 80


@pytest.mark.parametrize("dtype", [F32, F64])
def test_support_larger_than_shared_memory(solve, solve_spilling, dtype):
    """All n - 1 others are used; where the state lies changes no bit of the solution."""
    S = make.low_rank(130, 20, seed=3, noise=2.0).to(dtype)
    targets = torch.tensor([5, 77])
    lam = 1e-4 * reference.lambda_max(S, targets)
    result = solve(S, targets, lam)
    certify(S, targets, lam, result)
    assert result.count.tolist() == [129, 129]
    assert equal(solve_spilling(S, targets, lam), result)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_columns_in_the_workspace(solve, solve_spilling, dtype):
    S = make.clustered(70, 40, seed=12).to(dtype)
    targets = torch.arange(70)
    lam = 0.1 * reference.lambda_max(S, targets)
    assert equal(solve_spilling(S, targets, lam), solve(S, targets, lam))


SINGULAR = {
    "duplicates": lambda: make.repeated(make.mixed(20, seed=6), 15),
    "low rank": lambda: make.low_rank(40, 8, seed=3),
    "duplicates of a singular one": lambda: make.repeated(make.low_rank(24, 9, seed=7), 12),
    "few samples": lambda: make.mixed(36, seed=5, samples=15),
    "near duplicates": lambda: make.near_duplicates(16, 12, seed=9, difference=1e-6),
    "unequal scales": lambda: make.unequal_scales(make.low_rank(30, 10, seed=13), 3, seed=13),
    "rank one": lambda: torch.outer(torch.arange(1.0, 18.0, dtype=F64), torch.arange(1.0, 18.0, dtype=F64)),
    "all equal": lambda: torch.ones(19, 19, dtype=F64),
    "ties": lambda: make.equicorrelated(33, 0.6),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SINGULAR)
def test_dependent_categories(solve, solve_guarded, name, dtype):
    """Some solution is found and certified, by blocks and by single pivots, for every target."""
    S = SINGULAR[name]().to(dtype)
    targets = torch.arange(len(S))
    for ratio in (0.5, 0.05, 0.01):
        lam = ratio * reference.lambda_max(S, targets)
        certify(S, targets, lam, solve(S, targets, lam))
        certify(S, targets, lam, solve_guarded(S, targets, lam))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_single_pivots(solve, solve_guarded, dtype):
    """The slow way ends at the same point, with fewer coordinates tried."""
    S = make.clustered(50, 100, seed=11).to(dtype)
    targets = torch.tensor([0, 24, 49])
    lam = 0.02 * reference.lambda_max(S, targets)
    plain, guarded = solve(S, targets, lam), solve_guarded(S, targets, lam)
    certify(S, targets, lam, guarded)
    torch.testing.assert_close(guarded.theta, plain.theta, rtol=0, atol=1e-3 if dtype == F32 else 1e-9)
    assert guarded.info[:, 3].max() < plain.info[:, 3].max()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(2, 30),
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 60),
    log_ratio=st.floats(-3, 0.05),
    dtype=st.sampled_from([F32, F64]),
)
def test_property_optimal(solve, n, seed, rank, log_ratio, dtype):
    S = make.low_rank(n, rank, seed, samples=100).to(dtype)
    targets = torch.arange(n)
    lam = 10**log_ratio * reference.lambda_max(S, targets)
    certify(S, targets, lam, solve(S, targets, lam))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_penalties_and_exclusion(solve, dtype):
    S = make.clustered(40, 80, seed=9).to(dtype)
    targets = torch.arange(4)
    penalty = torch.logspace(-0.5, 0.5, 40, dtype=dtype).expand(4, 40).clone()
    penalty[:, 10:25] = torch.inf
    lam = 0.1 * reference.lambda_max(S, targets, penalty)
    result = solve(S, targets, lam, penalty)
    certify(S, targets, lam, result, penalty)
    assert (result.theta[:, 10:25] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_shared_and_unit_penalties(solve, dtype):
    """One row for all targets equals the same row for each; ones change no bit; a row of +inf leaves nothing."""
    S = make.clustered(40, 80, seed=10).to(dtype)
    targets = torch.tensor([7, 0, 39])
    penalty = 0.5 + torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    lam = 0.1 * reference.lambda_max(S, targets, penalty)
    result = solve(S, targets, lam, penalty)
    certify(S, targets, lam, result, penalty)
    assert equal(solve(S, targets, lam, penalty.expand(3, -1)), result)
    plain = 0.1 * reference.lambda_max(S, targets)
    assert equal(solve(S, targets, plain, torch.ones(40, dtype=dtype)), solve(S, targets, plain))
    nothing = solve(S, targets, plain, torch.full((40,), torch.inf, dtype=dtype))
    assert nothing.count.tolist() == [0, 0, 0]
    assert torch.equal(nothing.info[:, 0], S.double().diagonal()[targets])
    assert (nothing.info[:, [1, 2, 3, 4, 5]] == 0).all()


def test_uncorrelated_target_and_no_target(solve):
    S = torch.eye(6, dtype=F64)
    result = solve(S, torch.tensor([2]), torch.tensor([0.5]))
    assert result.count.tolist() == [0]
    assert result.info[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert solve(S, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=F64)).theta.shape == (0, 6)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_zero_variance(solve, dtype):
    """A constant category is solved without predictors, predicts nothing, and disturbs no other."""
    S = torch.block_diag(make.mixed(10, seed=103), torch.zeros(1, 1, dtype=F64)).to(dtype)
    targets = torch.arange(11)
    lam = (0.1 * reference.lambda_max(S, targets)).clamp_min(1e-3)
    result = solve(S, targets, lam)
    certify(S, targets, lam, result)
    assert result.info[10].tolist() == [0.0] * 6
    assert (result.theta[:, 10] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_lambda_max_itself_leaves_nothing(solve, dtype):
    S = make.mixed(30, seed=50).to(dtype)
    targets = torch.arange(30)
    top = reference.lambda_max(S, targets)
    assert solve(S, targets, top).count.tolist() == [0] * 30
    below = solve(S, targets, 0.999 * top)
    assert below.count.tolist() == [1] * 30
    assert below.theta.abs().argmax(1).tolist() == S.clone().fill_diagonal_(0).abs().argmax(1).tolist()


def test_more_targets_than_blocks(solve):
    """1,100 targets in 1,024 blocks: some blocks take a second one, all rows are those of the target alone."""
    S = make.mixed(4, seed=8)
    targets = torch.arange(1100) % 4
    lam = 0.2 * reference.lambda_max(S, targets)
    result = solve(S, targets, lam)
    few = solve(S, targets[:4], lam[:4])
    assert torch.equal(result.theta, few.theta[targets])
    assert torch.equal(result.info, few.info[targets])


def test_wider_rows(solve):
    S = make.clustered(30, 60, seed=15).float()
    targets = torch.arange(30)
    lam = 0.1 * reference.lambda_max(S, targets)
    assert equal(solve(S, targets, lam, extra_columns=48), solve(S, targets, lam))


# ------------------------------------------------------------------------------------- paths, exact counts, other forms


def grid(S: Tensor, targets: Tensor, *ratios: float, **problem: Any) -> Tensor:
    """lam [T, L] at these parts of lambda_max."""
    return reference.lambda_max(S, targets, **problem)[:, None] * torch.tensor(ratios, dtype=F64)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_gives_what_each_lam_gives(solve, solve_spilling, dtype):
    """Whatever the order of lam: above lambda_max first, down, a jump up, twice the same; 200: beyond shared memory."""
    for S in (make.clustered(60, 100, seed=3), make.low_rank(130, 20, seed=3, noise=2.0)):
        S = S.to(dtype)
        targets = torch.tensor([0, 7, 33])
        lams = grid(S, targets, 1.5, 0.9, 0.3, 0.08, 0.01, 0.4, 0.4, 0.03)
        path = solve(S, targets, lams)
        certify(S, targets, lams, path)
        for x in range(lams.shape[1]):
            cold = solve(S, targets, lams[:, x])
            torch.testing.assert_close(path.theta[:, x], cold.theta, rtol=0, atol=2e-4 if dtype == F32 else 1e-10)
        assert torch.equal(path.theta[:, 5], path.theta[:, 6])
        assert (path.info[:, 6, 3] == 0).all()
        assert equal(solve_spilling(S, targets, lams), path)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["duplicates", "few samples", "near duplicates", "rank one", "ties"])
def test_path_over_dependent_categories(solve, solve_guarded, name, dtype):
    S = SINGULAR[name]().to(dtype)
    targets = torch.arange(0, len(S), 3)
    lams = grid(S, targets, 0.9, 0.4, 0.1, 0.03, 0.01)
    certify(S, targets, lams, solve(S, targets, lams))
    certify(S, targets, lams, solve_guarded(S, targets, lams))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(2, 26),
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 50),
    log_ratios=st.lists(st.floats(-3, 0.1), min_size=2, max_size=5),
    nonnegative=st.booleans(),
    ridge=st.sampled_from([0.0, 0.01, 10.0]),
    dtype=st.sampled_from([F32, F64]),
)
def test_property_path(solve, n, seed, rank, log_ratios, nonnegative, ridge, dtype):
    """Any order of lam, with ridge and sign constraint: certified against float64 conditions."""
    S = make.low_rank(n, rank, seed, samples=100).to(dtype)
    targets = torch.arange(n)
    problem = {"nonnegative": nonnegative, "ridge": ridge}
    lams = grid(S, targets, *(10**x for x in log_ratios), **problem)
    lams = lams.clamp_min(1e-9)  # nothing correlates positively: lambda_max is 0
    certify(S, targets, lams, solve(S, targets, lams, **problem), **problem)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nonnegative_by_its_conditions(solve, dtype):
    """Conditions recomputed in NumPy; where the free solution has no negative coefficient it is the solution."""
    S = make.clustered(50, 80, seed=21).to(dtype)
    targets = torch.arange(0, 50, 7)
    lam = 0.1 * reference.lambda_max(S, targets, nonnegative=True)
    result = solve(S, targets, lam, nonnegative=True)
    certify(S, targets, lam, result, nonnegative=True)
    free = solve(S, targets, lam)
    A, tol = S.double().numpy(), TOLERANCE[dtype]
    for t, i in enumerate(targets.tolist()):
        theta, a = result.theta[t].double().numpy(), lam[t].item() / 2
        rho = A[i] - A @ theta
        others = np.arange(50) != i
        allowed = tol * A[i][others].max()
        assert (theta >= 0).all()
        assert (rho[others] <= a + allowed).all()
        assert (np.abs(rho - a)[theta > 0] <= allowed).all()
        if (free.theta[t] >= 0).all():
            torch.testing.assert_close(free.theta[t], result.theta[t], rtol=0, atol=1e-5)
    assert (free.theta < 0).any()
    uncorrelated = solve(-torch.ones(4, 4, dtype=dtype) + 5 * torch.eye(4, dtype=dtype), torch.tensor([1]),
                         torch.tensor([0.1]), nonnegative=True)  # fmt: skip
    assert uncorrelated.count.tolist() == [0]
    assert uncorrelated.info[0, 1:].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [F32, F64])
def test_ridge_is_a_larger_diagonal(solve, dtype):
    """The coefficients are those of S + ridge; err2 is that of S."""
    S = make.clustered(40, 60, seed=22).to(dtype)
    targets = torch.tensor([3, 20, 39])
    lams = grid(S, targets, 0.5, 0.1, 0.02)
    ridge = 0.25
    result = solve(S, targets, lams, ridge=ridge)
    certify(S, targets, lams, result, ridge=ridge)
    plain = solve(S + ridge * torch.eye(40, dtype=dtype), targets, lams)
    assert torch.equal(result.theta, plain.theta)
    squares = result.theta.double().square().sum(-1)
    expected = plain.info[..., 0] - ridge * (1 + squares)
    torch.testing.assert_close(result.info[..., 0], expected, rtol=1e-6 if dtype == F32 else 1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scale_changes_no_digit(solve, dtype):
    S = make.clustered(40, 60, seed=23).to(dtype)
    targets = torch.tensor([3, 20, 39])
    lams = grid(S, targets, 0.5, 0.1, 0.02)
    result = solve(S, targets, lams, ridge=0.5)
    for scale in (2.0**-10, 4.0):  # even powers, of which the roots in the factor are exact
        assert equal(solve(S, targets, lams, ridge=0.5, scale=scale), result)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_cross_is_the_joint_problem_with_a_mask(solve, dtype):
    """Bit for bit, targets in any order and more than once; nothing is left out by a target's number."""
    joint = make.clustered(70, 60, seed=24).to(dtype)
    S, cross, variance = joint[:50, :50], joint[50:, :50].contiguous(), joint.double().diagonal()[50:].clone()
    targets = torch.tensor([3, 19, 0, 3])
    mask = torch.ones(70, dtype=dtype)
    mask[50:] = torch.inf
    for nonnegative in (False, True):
        problem = {"cross": cross, "variance": variance, "nonnegative": nonnegative}
        lams = grid(S, targets, 0.8, 0.2, 0.02, **problem)
        result = solve(S, targets, lams, **problem)
        certify(S, targets, lams, result, **problem)
        expected = solve(joint, targets + 50, lams, mask, nonnegative=nonnegative)
        assert torch.equal(result.theta, expected.theta[..., :50])
        assert torch.equal(result.info, expected.info)
    some = solve(S, targets, lams, cross=cross, variance=variance, ridge=0.1)
    certify(S, targets, lams, some, cross=cross, variance=variance, ridge=0.1)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_matrix_a_problem(solve, dtype):
    """Each row is the problem alone with its own matrix, bit for bit; with cross and without."""
    S = torch.stack([make.mixed(30, seed=seed).to(dtype) for seed in range(4)])
    targets = torch.tensor([5, 0, 29, 5])
    lam = torch.stack([0.1 * reference.lambda_max(S[t], targets[t : t + 1])[0] for t in range(4)])
    batch = solve(S, targets, lam)
    cross, variance = S[torch.arange(4), targets], S[torch.arange(4), targets, targets].double()
    penalty = torch.ones(4, 30, dtype=dtype)
    penalty[torch.arange(4), targets] = torch.inf
    rows = solve(S, torch.arange(4), lam, penalty, cross=cross, variance=variance)
    for t in range(4):
        alone = solve(S[t], targets[t : t + 1], lam[t : t + 1])
        certify(S[t], targets[t : t + 1], lam[t : t + 1], alone)
        assert torch.equal(alone.theta[0], batch.theta[t])
        assert torch.equal(alone.info[0], batch.info[t])
    assert equal(rows, batch)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_start(solve, solve_spilling, dtype):
    """From its own solution no pivot is needed; what is no active set is skipped or left on the way."""
    S = make.clustered(60, 100, seed=25).to(dtype)
    targets = torch.tensor([0, 7, 33])
    lam = 0.05 * reference.lambda_max(S, targets)
    cold = solve(S, targets, lam)
    order = cold.theta.abs().sort(1, descending=True)
    start = (cold.theta.gather(1, order.indices), order.indices, cold.count)
    warm = solve(S, targets, lam, start=start)
    certify(S, targets, lam, warm)
    assert (warm.info[:, 3] == 0).all()
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-3, 64, (3, 90), generator=generator)
    value = torch.randn(3, 90, generator=generator).to(dtype)
    value[:, ::7] = 0
    value[:, 1] = torch.nan
    count = torch.tensor([90, 4000, 0])  # 4000: more than there are places
    penalty = torch.ones(60, dtype=dtype)
    penalty[40:] = torch.inf
    for problem in ({}, {"nonnegative": True}):
        some = solve(S, targets, lam, penalty, start=(value, index, count), **problem)
        certify(S, targets, lam, some, penalty, **problem)
        assert equal(solve_spilling(S, targets, lam, penalty, start=(value, index, count), **problem), some)
    torch.testing.assert_close(warm.theta, cold.theta, rtol=0, atol=1e-4 if dtype == F32 else 1e-10)


TOP_K = {
    "regular": lambda: make.mixed(40, seed=2),
    "clustered": lambda: make.clustered(50, 30, seed=9),
    "unequal scales": SINGULAR["unequal scales"],
    "few samples": SINGULAR["few samples"],
    "duplicates": lambda: make.repeated(make.clustered(30, 20, seed=10), 15),
}


@pytest.mark.parametrize("name", TOP_K)
def test_top_k(solve, solve_spilling, solve_guarded, name):
    """k nonzeros, at the place asked for on the first segment of an independent homotopy; certified at that lam."""
    S = TOP_K[name]()
    targets = torch.arange(0, len(S), 7)
    segments = [reference.homotopy(S, i) for i in targets.tolist()]
    for k, position in ((1, 1e-3), (4, 0.3), (9, 0.999)):
        result = solve(S, targets, None, top_k=(k, position))
        first = [next((s for s in path if len(s.support) == k), None) for path in segments]
        found = torch.tensor([s is not None for s in first])
        assert found.any()
        assert set(result.info[~found, 4].tolist()) <= {STATUS["too_few"], STATUS["capped"]}
        certify(S, targets[found], result.lam[found], result.at(found, 0))
        assert (result.count[found] == k).all()
        for lam, s in zip(result.lam.tolist(), first, strict=True):
            if s is not None:
                assert lam == pytest.approx(s.high - position * (s.high - s.low), rel=1e-8)
        assert equal(solve_spilling(S, targets, None, top_k=(k, position)), result)
        if position == 0.3:  # from a lam that is a little lower than the turn
            passed = solve_guarded(S, targets, None, top_k=(k, position))
            certify(S, targets[found], passed.lam[found], passed.at(found, 0))
            torch.testing.assert_close(passed.lam[found], result.lam[found], rtol=1e-4, atol=0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(3, 16),
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6),
    nonnegative=st.booleans(),
    ridge=st.sampled_from([0.0, 0.3]),
    penalised=st.booleans(),
)
def test_property_top_k(solve, n, seed, k, nonnegative, ridge, penalised):
    """Found wherever the independent homotopy finds it, at the same lam; else the end of the path, and said."""
    S = make.mixed(n, seed)
    targets = torch.arange(n)
    penalty = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64) if penalised else None
    problem = {"nonnegative": nonnegative, "ridge": ridge}
    k = min(k, n - 1)
    result = solve(S, targets, None, penalty, top_k=(k, 0.5), **problem)
    for i in range(n):
        path = reference.homotopy(S, i, penalty, **problem)
        first = next((s for s in path if len(s.support) == k), None)
        if first is None:
            assert result.info[i, 4] in (STATUS["too_few"], STATUS["capped"])
            continue
        row = result.at(slice(i, i + 1), 0)
        certify(S, targets[i : i + 1], row.lam, row, penalty, **problem)
        assert row.count[0] == k
        assert row.lam[0].item() == pytest.approx((first.high + first.low) / 2, rel=1e-7)


def test_top_k_that_a_path_lacks(solve):
    """Rank 3 gives no more than 3; nothing correlates: none at all; a limit of pivots is said to be one."""
    S = make.low_rank(20, 3, seed=4)
    targets = torch.arange(6)
    result = solve(S, targets, None, top_k=(5, 0.5))
    assert (result.info[:, 4] == STATUS["too_few"]).all()
    assert (result.count <= 3).all()
    assert (result.lam < 1e-6 * reference.lambda_max(S, targets)).all()
    assert (result.info[:, 2] <= 1e-12).all()
    empty = solve(torch.eye(6, dtype=F64), torch.tensor([2]), None, top_k=(1, 0.5))
    assert empty.info[0].tolist() == [1.0, 0.0, 0.0, 0.0, STATUS["too_few"], 0.0]
    assert empty.lam.tolist() == [0.0]
    short = solve(make.mixed(30, seed=2), targets, None, top_k=(9, 0.5), max_pivots=4)
    assert (short.info[:, 4] == STATUS["capped"]).all()


def test_top_k_at_ties(solve):
    """Small integers: columns that tie and copies. What is called converged has k nonzeros and is optimal."""
    generator = torch.Generator().manual_seed(3)
    found = 0
    for _ in range(12):
        x = torch.randint(-1, 2, (9, 8), generator=generator).double()
        S, targets = x.T @ x, torch.arange(8)
        for k in (1, 2, 4):
            result = solve(S, targets, None, top_k=(k, 0.5))
            good = result.info[:, 4] == STATUS["converged"]
            assert (result.count[good] == k).all()
            assert (reference.kkt_violation(S, result.theta, targets, result.lam)[good] <= 1e-12).all()
            found += int(good.sum())
    assert found > 150


@pytest.mark.parametrize("dtype", [F32, F64])
def test_support_beyond_the_limit_of_the_outputs(solve_spilling, dtype):
    """16 places limit the active set to 32: what needs more is capped, and what comes later is right again."""
    S = make.low_rank(70, 20, seed=3, noise=2.0).to(dtype)
    targets = torch.tensor([5, 44])
    lams = grid(S, targets, 0.3, 1e-4, 0.3)
    result = solve_spilling(S, targets, lams, capacity=16)
    assert result.info[:, :, 4].tolist() == [[STATUS["converged"], STATUS["capped"], STATUS["converged"]]] * 2
    certify(S, targets, lams[:, 0], result.at(0))
    certify(S, targets, lams[:, 2], result.at(2))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sorted_queue_changes_nothing(solve, dtype):
    """1,100 paths in 1,024 blocks, those with most to do first, with penalties; each is that of the target alone."""
    S = make.clustered(12, 30, seed=8).to(dtype)
    targets = torch.arange(1100) % 12
    lams = grid(S, targets, 0.5, 0.1) * torch.linspace(0.2, 1.0, 1100, dtype=F64)[:, None]
    penalty = torch.linspace(0.5, 1.5, 12, dtype=dtype)
    result = solve(S, targets, lams, penalty)
    for t in (0, 77, 1099):
        alone = solve(S, targets[t : t + 1], lams[t : t + 1], penalty)
        assert torch.equal(alone.theta[0], result.theta[t])
        assert torch.equal(alone.info[0], result.info[t])
    certify(S, targets[:12], lams[:12], result.at(slice(12), 0), penalty)


def test_workspace_stays_small(emulated):
    """Within a gigabyte for 50,000 categories, whatever the number of targets, while supports are short."""
    functions = ctypes.CDLL(str(emulated))
    for suffix in ("f32", "f64"):
        size = getattr(functions, f"nd_covlasso_workspace_{suffix}")
        size.restype, size.argtypes = ctypes.c_size_t, [P]

        def needed(n: int, num_targets: int, capacity: int, size=size) -> int:
            return size(ctypes.byref(Arguments(n=n, ld=n, num_targets=num_targets, num_lams=1, capacity=capacity)))

        assert 0 < needed(50_000, 64, 1024) < 4e8
        assert needed(50_000, 50_000, 1024) < 1e9
        assert needed(1000, 1000, 999) < 5e8
        assert needed(1000, 1000, 200) <= needed(1000, 1000, 999)


def test_impossible_sizes_are_refused(emulated):
    """Code 1 is cudaErrorInvalidValue; nothing is touched."""
    functions = ctypes.CDLL(str(emulated))
    call, find = functions.nd_covlasso_f64, functions.nd_covlasso_top_k_f64
    call.argtypes, find.argtypes = [P, P, P], [P, I, D, P, P, P]
    good = {"n": 8, "ld": 8, "num_targets": 1, "num_lams": 1, "capacity": 7}
    for wrong in (
        {"n": 0},
        {"n": 9},
        {"num_targets": -1},
        {"num_lams": 0},
        {"capacity": -1},
        {"start_capacity": -1},
        {"n": 1 << 27, "ld": 1 << 27},
    ):
        assert call(ctypes.byref(Arguments(**{**good, **wrong})), None, None) == 1, wrong
    for k, position in ((0, 0.5), (8, 0.5), (2, 0.0), (2, 1.0), (2, float("nan"))):
        assert find(ctypes.byref(Arguments(**good)), k, position, None, None, None) == 1, (k, position)


def test_caps_are_reported(solve):
    """A capped target has an honest certificate; a support that is cut keeps its first categories."""
    S = make.clustered(60, 100, seed=5)
    targets = torch.tensor([1, 2])
    lam = 0.02 * reference.lambda_max(S, targets)
    full = solve(S, targets, lam)
    capped = solve(S, targets, lam, max_pivots=3)
    assert capped.info[:, 4].tolist() == [STATUS["capped"]] * 2
    violation = reference.kkt_violation(S, capped.theta, targets, lam)
    torch.testing.assert_close(capped.info[:, 2], violation, rtol=1e-10, atol=0)
    assert violation.min() > 1e-6
    assert equal(solve(S, targets, lam, max_pivots=int(full.info[:, 3].max())), full)
    cut = solve(S, targets, lam, capacity=2)
    assert cut.info[:, 4].tolist() == [STATUS["capped"]] * 2
    assert cut.count.tolist() == [2, 2]
    for t in range(2):
        kept = full.theta[t].nonzero()[:2, 0]
        assert torch.equal(cut.theta[t].nonzero()[:, 0], kept)
        assert torch.equal(cut.theta[t, kept], full.theta[t, kept])


def test_unreachable_tolerance_is_said(solve):
    """float32 coefficients cannot meet 1e-9: the best found is returned as not converged."""
    S = make.mixed(40, seed=16).float()
    targets = torch.arange(5)
    lam = 0.05 * reference.lambda_max(S, targets)
    result = solve(S, targets, lam, tol=1e-9)
    assert (result.info[:, 4] != STATUS["converged"]).all()
    assert reference.kkt_violation(S, result.theta, targets, lam).max() <= 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("negative", [1, 5])
def test_indefinite_is_finite_and_said(solve, negative, dtype):
    """What has no minimum is not called converged; where KKT points exist they may be."""
    S = make.indefinite(24, seed=1, negative=negative).to(dtype)
    targets = torch.arange(24)
    for ratio in (0.9, 0.05):
        lam = ratio * reference.lambda_max(S, targets)
        result = solve(S, targets, lam)
        converged = result.info[:, 4] == STATUS["converged"]
        assert set(result.info[:, 4].tolist()) <= {STATUS["converged"], STATUS["not_psd"]}
        assert result.theta.isfinite().all()
        assert reference.kkt_violation(S, result.theta, targets, lam)[converged].le(TOLERANCE[dtype]).all()
    assert not converged.any()


def test_diagonal_that_no_data_have(solve):
    """S_jj = 0 or less beside S_ij != 0."""
    for diagonal in ((1.0, 0.0, 1.0), (1.0, -0.5, 1.0), (-1.0, 1.0, 1.0)):
        S = torch.tensor([[0.0, 0.5, 0.1], [0.5, 0.0, 0.0], [0.1, 0.0, 0.0]], dtype=F64) + torch.diag(
            torch.tensor(diagonal, dtype=F64)
        )
        result = solve(S, torch.tensor([0]), torch.tensor([0.1]))
        assert result.info[0, 4] == STATUS["not_psd"]
        assert result.theta.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_thread_order_and_batch_do_not_matter(solve, dtype, monkeypatch):
    """Bit for bit: forward, reverse and random order of threads and blocks, and a target alone or among others."""
    S = make.clustered(50, 100, seed=6).to(dtype)
    targets = torch.tensor([3, 40, 17])
    lams = grid(S, targets, 0.3, 0.05)
    start = (torch.ones(3, 5, dtype=dtype), torch.tensor([[7, 9, 11, 9, 30]] * 3), torch.full((3,), 5))

    def results(rows: slice) -> list[Result]:
        chosen, own = targets[rows], tuple(x[rows] for x in start)
        cross = {"cross": S[[3, 40, 17]], "variance": S.double().diagonal()[[3, 40, 17]], "nonnegative": True}
        found = [solve(S, chosen, lams[rows], start=own), solve(S, torch.arange(3)[rows], lams[rows], **cross)]
        return found + ([solve(S, chosen, None, top_k=(6, 0.5))] if dtype == F64 else [])

    plain = results(slice(3))
    for order in ("reverse", "random:1", "random:2"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        assert all(equal(a, b) for a, b in zip(results(slice(3)), plain, strict=True))
    for alone, all_of_them in zip(results(slice(1, 2)), plain, strict=True):
        assert torch.equal(alone.theta[0], all_of_them.theta[1])
        assert torch.equal(alone.info[0], all_of_them.info[1])


# 20 by rank 60: regular; 40 by rank 12: dependent categories, single pivots; 90 at 1e-4: beyond shared memory, refined
SANITIZED = [
    ("20", "0.1", "60", "penalty"),
    ("40", "0.01", "12", "plain"),
    ("90", "0.0001", "100", "plain"),
    ("36", "0.01", "50", "path"),
    ("30", "0.05", "40", "cross"),
    ("40", "0", "30", "top"),
]


@pytest.mark.parametrize("problem", SANITIZED, ids=" ".join)
@pytest.mark.parametrize(
    ("sanitizer", "definitions"),
    [("address", ()), ("address", SMALL), ("thread", SMALL)],
    ids=["address-default", "address-small", "thread-small"],
)
def test_sanitizers(problem, sanitizer, definitions):
    """No access out of bounds, no undefined behaviour, no race between the threads of a block."""
    sources = [Path(__file__).with_name("covlasso_cuda_driver.cu"), KERNEL]
    program = emulation.build_program(sources, sanitizer=sanitizer, definitions=definitions)
    result = emulation.run(program, *problem, order="random:1")
    assert result.returncode == 0, result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 17, 200, 1025, 2300])  # 1025: several pieces of a row; 2300: columns in the workspace
def test_device_finds_what_the_cpu_finds(n, dtype):
    S = make.clustered(n, 512, seed=n, samples=4000).to(dtype) if n > 1 else torch.ones(1, 1, dtype=dtype)
    targets = torch.arange(0, n, max(1, n // 40))
    for ratio in (0.3, 0.05, 0.01):
        lam = ratio * reference.lambda_max(S, targets)
        arguments = (None, TOLERANCE[dtype], 20_000, max(n - 1, 1))
        cpu = torch.ops.neuraldeps.covlasso(S, targets, lam, *arguments)
        gpu = torch.ops.neuraldeps.covlasso(S.cuda(), targets.cuda(), lam.cuda(), *arguments)
        again = torch.ops.neuraldeps.covlasso(S.cuda(), targets.cuda(), lam.cuda(), *arguments)
        assert all(torch.equal(a, b) for a, b in zip(gpu, again, strict=True))
        info, expected = gpu[3].cpu(), cpu[3]
        assert (info[:, 4] == STATUS["converged"]).all()
        assert info[:, 2].max() <= TOLERANCE[dtype]
        assert (info[:, 0] - expected[:, 0]).abs().le(1e-5 * S.double().diagonal()[targets]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SINGULAR)
def test_device_on_dependent_categories(name):
    S = SINGULAR[name]()
    targets = torch.arange(len(S))
    lam = 0.01 * reference.lambda_max(S, targets)
    info = torch.ops.neuraldeps.covlasso(S.cuda(), targets.cuda(), lam.cuda(), None, 1e-12, 20_000, len(S))[3].cpu()
    assert (info[:, 4] == STATUS["converged"]).all()
    assert info[:, 2].max() <= 1e-12


def on_device(x: Any) -> Any:
    return x.cuda() if isinstance(x, Tensor) else x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("form", ["path", "nonnegative", "ridge", "cross", "batched", "start", "many targets"])
def test_device_solves_every_form(form, dtype):
    """As the CPU does, and twice the same."""
    joint = make.clustered(260, 300, seed=26, samples=4000).to(dtype)
    S, targets, more = joint[:200, :200].contiguous(), torch.arange(0, 200, 9), {}
    if form in ("cross", "batched"):
        targets = torch.arange(0, 60, 7)
        more = {"cross": joint[200:, :200].contiguous(), "variance": joint.double().diagonal()[200:].clone()}
    if form == "batched":
        S = torch.stack([S * (1 + 0.1 * t) for t in range(len(targets))])
    if form == "nonnegative":
        more = {"nonnegative": True}
    if form == "ridge":
        more = {"ridge": 0.1}
    if form == "many targets":
        targets = torch.arange(200).repeat(9)
    lams = grid(S, targets, 0.5, 0.2, 0.05, 0.02, **more)
    limits = (None, TOLERANCE[dtype], 20_000, 200)
    if form == "start":
        value, index, count, _ = torch.ops.neuraldeps.covlasso(S, targets, lams[:, -1], *limits)
        more = {"start_value": value, "start_index": index, "start_count": count}
    cpu = torch.ops.neuraldeps.covlasso(S, targets, lams, *limits, **more)
    arguments, keywords = (S.cuda(), targets.cuda(), lams.cuda(), *limits), {k: on_device(v) for k, v in more.items()}
    gpu = torch.ops.neuraldeps.covlasso(*arguments, **keywords)
    again = torch.ops.neuraldeps.covlasso(*arguments, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(gpu, again, strict=True))
    info, expected = gpu[3].cpu(), cpu[3]
    assert info.shape == (len(targets), 4, 6)
    assert (info[..., 4] == STATUS["converged"]).all()
    assert info[..., 2].max() <= TOLERANCE[dtype]
    assert (info[..., 0] - expected[..., 0]).abs().le(1e-5 * expected[..., 0].max()).all()


@pytest.mark.gpu
def test_device_finds_the_top_k():
    S = make.clustered(300, 400, seed=27, samples=4000)
    targets = torch.arange(0, 300, 7)
    for k in (1, 8, 30):
        cpu = torch.ops.neuraldeps.covlasso_top_k(S, targets, k, None, 1e-12, 20_000, 0.3)
        gpu = torch.ops.neuraldeps.covlasso_top_k(S.cuda(), targets.cuda(), k, None, 1e-12, 20_000, 0.3)
        assert (gpu[3][:, 4] == STATUS["converged"]).all()
        assert (gpu[2] == k).all()
        torch.testing.assert_close(gpu[4].cpu(), cpu[4], rtol=1e-7, atol=0)
        assert torch.equal(gpu[1].cpu(), cpu[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
def test_device_at_50_000_categories(dtype):
    """A matrix of 10 or 20 GB with one block of correlations: 64 targets, as the block alone is solved."""
    if torch.cuda.mem_get_info()[0] < 4 * 50_000**2 * torch.finfo(dtype).bits // 8:
        pytest.skip("too little device memory")
    small = make.clustered(400, 300, seed=28, samples=4000).to(dtype)
    place = torch.randperm(50_000, generator=torch.Generator().manual_seed(1))[:400]
    S = torch.zeros(50_000, 50_000, dtype=dtype, device="cuda").fill_diagonal_(1.0)
    S[place.cuda()[:, None], place.cuda()] = small.cuda()
    targets = torch.arange(64)
    lam = 0.03 * reference.lambda_max(small, targets)
    limits = (TOLERANCE[dtype], 20_000, 512)
    info = torch.ops.neuraldeps.covlasso(S, place[targets].cuda(), lam.cuda(), None, *limits)[3].cpu()
    expected = torch.ops.neuraldeps.covlasso(small, targets, lam, None, *limits)[3]
    assert (info[:, 4] == STATUS["converged"]).all()
    assert (info[:, 0] - expected[:, 0]).abs().le(1e-5 * expected[:, 0].max()).all()
