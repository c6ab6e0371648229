"""The CUDA CovLasso kernel, emulated, through its C interface: optimal by an independent check, whole, repeatable.

The same cases run on a device in test_covlasso.py (marker gpu); array libraries are tested in test_native.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cov_factory as make
import emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuraldeps_kernels.reference import covlasso as reference

STATUS = {"converged": 0, "capped": 1, "collinear": 2, "not_psd": 3}
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-12}
KERNEL = emulation.ROOT / "csrc" / "cuda" / "covlasso.cu"
SMALL = ("ND_COVLASSO_SHARED_SUPPORT=16", "ND_COVLASSO_SHARED_COLUMNS=0")  # everything spills


@dataclass
class Result:
    theta: Tensor  # [T, n]
    count: Tensor  # [T]
    info: Tensor  # [T, 6]


def solver(library: Path) -> Callable[..., Result]:
    """run(S, targets, lam, penalty): the C interface of an emulated library on outputs filled with nonsense."""
    functions = ctypes.CDLL(str(library))

    def run(
        S: Tensor,
        targets: Tensor,
        lam: Tensor,
        penalty=None,
        *,
        tol=None,
        max_pivots=20_000,
        capacity=None,
        extra_columns=0,
    ) -> Result:
        n, rows = len(S), len(targets)
        suffix, T = ("f32", np.float32) if S.dtype == F32 else ("f64", np.float64)
        size, call = getattr(functions, f"nd_covlasso_workspace_{suffix}"), getattr(functions, f"nd_covlasso_{suffix}")
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int64] * 2
        p, i = ctypes.c_void_p, ctypes.c_int64
        call.argtypes = [p, i, i, p, p, i, p, i, ctypes.c_double, i, p, p, i, p, p, p, p]
        ld = (n + 15) // 16 * 16 + extra_columns
        store = np.zeros(n * ld + 64, T)  # rows start at 64 bytes
        padded = store[(-store.ctypes.data % 64) // store.itemsize :][: n * ld].reshape(n, ld)
        padded[:, :n] = S.numpy()
        capacity = max(n - 1, 1) if capacity is None else capacity
        index, value = np.full((rows + 1, capacity), -7, np.int32), np.full((rows + 1, capacity), np.nan, T)
        count, info = np.full(rows + 1, -7, np.int32), np.full((rows + 1, 6), np.nan)
        workspace = np.full(size(n, rows) + 512, 0xA5, np.uint8)
        start = -workspace.ctypes.data % 256
        end = start + size(n, rows)
        which, lams = targets.numpy().astype(np.int64), lam.double().numpy().copy()
        factors = None if penalty is None else np.ascontiguousarray(penalty.numpy(), T)
        code = call(
            padded.ctypes.data, n, ld, which.ctypes.data, lams.ctypes.data, rows,
            None if factors is None else factors.ctypes.data, 0 if factors is None or factors.ndim == 1 else n,
            TOLERANCE[S.dtype] if tol is None else tol, max_pivots, index.ctypes.data, value.ctypes.data, capacity,
            count.ctypes.data, info.ctypes.data, workspace.ctypes.data + start, None,
        )  # fmt: skip
        assert code == 0
        assert (workspace[:start] == 0xA5).all()
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
        return Result(torch.from_numpy(theta), torch.from_numpy(count[:rows]), torch.from_numpy(info[:rows]))

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
    """Built to go over to single pivots after the first step."""
    return solver(emulation.build_library([KERNEL], definitions=["ND_COVLASSO_GUARD_AFTER=1"]))


def certify(S: Tensor, targets: Tensor, lam: Tensor, result: Result, penalty: Tensor | None = None) -> None:
    """Converged, optimal, and every number reported is what the coefficients imply in float64."""
    tol, variance = TOLERANCE[S.dtype], S.double().diagonal()[targets]
    assert result.info[:, 4].tolist() == [STATUS["converged"]] * len(targets)
    violation = reference.kkt_violation(S, result.theta, targets, lam, penalty)
    assert violation.max() <= tol
    assert (result.info[:, 2] - violation).abs().max() <= 1e-12
    assert (result.info[:, 0] - reference.err2(S, result.theta, targets)).abs().le(1e-12 * variance).all()
    gap = reference.duality_gap(S, result.theta, targets, lam, penalty)
    assert (result.info[:, 1] - gap).abs().le(1e-11 * variance).all()
    torch.testing.assert_close(result.info[:, 5], reference.lambda_max(S, targets, penalty), rtol=1e-6, atol=0)
    assert result.count.tolist() == (result.theta != 0).sum(1).tolist()


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


def test_impossible_sizes_are_refused(emulated):
    """Code 1 is cudaErrorInvalidValue; nothing is touched."""
    call = ctypes.CDLL(str(emulated)).nd_covlasso_f64
    p, i = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [p, i, i, p, p, i, p, i, ctypes.c_double, i, p, p, i, p, p, p, p]
    for n, ld, targets, capacity in (
        (0, 8, 1, 1),
        (9, 8, 1, 8),
        (8, 8, -1, 7),
        (8, 8, 1, -1),
        (1 << 27, 1 << 27, 1, 1),
    ):
        assert (
            call(None, n, ld, None, None, targets, None, 0, 1e-6, 100, None, None, capacity, None, None, None, None)
            == 1
        )


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
    lam = 0.05 * reference.lambda_max(S, targets)
    plain = solve(S, targets, lam)
    for order in ("reverse", "random:1", "random:2"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        again = solve(S, targets, lam)
        assert equal(again, plain)
    alone = solve(S, targets[1:2], lam[1:2])
    assert torch.equal(alone.theta[0], plain.theta[1])


# 20 by rank 60: regular; 40 by rank 12: dependent categories, single pivots; 90 at 1e-4: beyond shared memory, refined
@pytest.mark.parametrize(
    "problem", [("20", "0.1", "60", "penalty"), ("40", "0.01", "12"), ("90", "0.0001", "100")], ids=" ".join
)
@pytest.mark.parametrize("definitions", [(), SMALL], ids=["default", "small"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(problem, definitions, sanitizer):
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
