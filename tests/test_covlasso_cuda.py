"""The CUDA CovLasso kernel, emulated, through its C interface: optimal by an independent check, whole, repeatable.

The same cases run on a device in test_covlasso.py (marker gpu); array libraries are tested in test_native.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import cov_factory as make
import emulation
import numpy as np
import pytest
import torch
from torch import Tensor

from neuraldeps_kernels.reference import covlasso as reference

STATUS = {"converged": 0, "capped": 1, "collinear": 2, "not_psd": 3}
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-12}


@dataclass
class Result:
    theta: Tensor  # [T, n]
    count: Tensor  # [T]
    info: Tensor  # [T, 6]


@pytest.fixture
def solve(emulated: Path):
    library = ctypes.CDLL(str(emulated))

    def run(S: Tensor, targets: Tensor, lam: Tensor, penalty=None, *, tol=None, max_pivots=20_000, capacity=None):
        n, rows = len(S), len(targets)
        suffix, T = ("f32", np.float32) if S.dtype == F32 else ("f64", np.float64)
        size, call = getattr(library, f"nd_covlasso_workspace_{suffix}"), getattr(library, f"nd_covlasso_{suffix}")
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int64] * 2
        p, i = ctypes.c_void_p, ctypes.c_int64
        call.argtypes = [p, i, i, p, p, i, p, i, ctypes.c_double, i, p, p, i, p, p, p, p]
        ld = (n + 15) // 16 * 16
        store = np.zeros(n * ld + 64, T)  # rows start at 64 bytes
        padded = store[(-store.ctypes.data % 64) // store.itemsize :][: n * ld].reshape(n, ld)
        padded[:, :n] = S.numpy()
        capacity = max(n - 1, 1) if capacity is None else capacity
        index, value = np.full((rows, capacity), -7, np.int32), np.full((rows, capacity), np.nan, T)
        count, info = np.full(rows, -7, np.int32), np.full((rows, 6), np.nan)
        workspace = np.full(size(n, rows) + 256, 0xA5, np.uint8)
        start = workspace.ctypes.data + (-workspace.ctypes.data % 256)
        which, lams = targets.numpy().astype(np.int64), lam.double().numpy().copy()
        factors = None if penalty is None else np.ascontiguousarray(penalty.numpy(), T)
        code = call(
            padded.ctypes.data, n, ld, which.ctypes.data, lams.ctypes.data, rows,
            None if factors is None else factors.ctypes.data, 0 if factors is None or factors.ndim == 1 else n,
            TOLERANCE[S.dtype] if tol is None else tol, max_pivots, index.ctypes.data, value.ctypes.data, capacity,
            count.ctypes.data, info.ctypes.data, start, None,
        )  # fmt: skip
        assert code == 0
        theta = np.zeros((rows, n), T)
        for t, k in enumerate(count):
            assert (np.diff(index[t, :k]) > 0).all()
            assert (index[t, k:] == 0).all()
            assert (value[t, k:] == 0).all()
            theta[t, index[t, :k]] = value[t, :k]
        return Result(torch.from_numpy(theta), torch.from_numpy(count), torch.from_numpy(info))

    return run


def certify(S: Tensor, targets: Tensor, lam: Tensor, result: Result, penalty: Tensor | None = None) -> None:
    tol = TOLERANCE[S.dtype]
    assert result.info[:, 4].tolist() == [STATUS["converged"]] * len(targets)
    assert reference.kkt_violation(S, result.theta, targets, lam, penalty).max() <= 1.05 * tol
    error = reference.err2(S, result.theta, targets)
    exact = 1e-5 if S.dtype == F32 else 1e-9
    assert (result.info[:, 0] - error).abs().le(exact * S.double().diagonal()[targets]).all()
    torch.testing.assert_close(result.info[:, 5], reference.lambda_max(S, targets, penalty), rtol=1e-6, atol=0)


# 2: one predictor; 17, 33: one more than a block of the factor; 100: supports of several blocks
@pytest.mark.parametrize("n", [2, 5, 17, 33, 64, 100])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_optimal(solve, n, dtype):
    S = make.clustered(n, 3 * n + 8, seed=n).to(dtype)
    targets = torch.tensor([0, n // 2, n - 1])
    for ratio in (0.9, 0.3, 0.05):
        lam = ratio * reference.lambda_max(S, targets)
        certify(S, targets, lam, solve(S, targets, lam))


def test_support_larger_than_shared_memory(solve):
    """n - 1 nonzeros, more than the 64 coordinates of float64 that shared memory holds."""
    S = make.mixed(120, seed=3, samples=2000)
    targets = torch.tensor([5])
    lam = 1e-6 * reference.lambda_max(S, targets)
    result = solve(S, targets, lam)
    certify(S, targets, lam, result)
    assert result.count.item() == 119


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


def test_singular_covariance(solve):
    """Exact copies of categories: some solution is found, certified."""
    S = make.repeated(make.mixed(12, seed=4), 8)
    targets = torch.arange(len(S))
    lam = 0.05 * reference.lambda_max(S, targets)
    certify(S, targets, lam, solve(S, targets, lam))


def test_uncorrelated_target_and_no_target(solve):
    S = torch.eye(6, dtype=F64)
    result = solve(S, torch.tensor([2]), torch.tensor([0.5]))
    assert result.count.tolist() == [0]
    assert result.info[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert solve(S, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=F64)).theta.shape == (0, 6)


def test_caps_are_reported(solve):
    S = make.clustered(60, 100, seed=5)
    targets = torch.tensor([1, 2])
    lam = 0.02 * reference.lambda_max(S, targets)
    assert solve(S, targets, lam, max_pivots=3).info[:, 4].tolist() == [STATUS["capped"]] * 2
    cut = solve(S, targets, lam, capacity=2)
    assert cut.info[:, 4].tolist() == [STATUS["capped"]] * 2
    assert cut.count.tolist() == [2, 2]


def test_indefinite_is_finite_and_said(solve):
    S = make.indefinite(24, seed=1, negative=5)
    targets = torch.arange(6)
    lam = 0.05 * reference.lambda_max(S, targets)
    result = solve(S, targets, lam)
    converged = result.info[:, 4] == STATUS["converged"]
    assert result.theta.isfinite().all()
    assert reference.kkt_violation(S, result.theta, targets, lam)[converged].le(1e-11).all()


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
        assert torch.equal(again.theta, plain.theta)
        assert torch.equal(again.info, plain.info)
    alone = solve(S, targets[1:2], lam[1:2])
    assert torch.equal(alone.theta[0], plain.theta[1])


# 20 by rank 60: regular; 40 by rank 12: dependent categories, single pivots; 90 at 1e-3: beyond shared memory
@pytest.mark.parametrize("problem", [("20", "0.1", "60"), ("40", "0.01", "12"), ("90", "0.001", "300")], ids=" ".join)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(problem, sanitizer):
    """No access out of bounds, no undefined behaviour, no race between the threads of a block."""
    sources = [Path(__file__).with_name("covlasso_cuda_driver.cu"), *emulation.CUDA_SOURCES]
    program = emulation.build_program(sources, sanitizer=sanitizer)
    result = emulation.run(program, *problem)
    assert result.returncode == 0, result.stdout + result.stderr
