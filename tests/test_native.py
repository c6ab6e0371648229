"""NumPy and CuPy arrays: the same bits as the torch operators, every layout, errors by name, and no torch below.

CuPy is played by device_arrays.py on host memory, its kernels by the emulated CUDA library.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cov_factory as make
import device_arrays
import numpy as np
import pytest
import torch
from device_arrays import DeviceArray, upload
from hypothesis import given, settings
from hypothesis import strategies as st

import neuraldeps_kernels as nk
from neuraldeps_kernels import _native, arrays
from neuraldeps_kernels.reference import covariance as covariance_reference
from neuraldeps_kernels.reference import covlasso as covlasso_reference

FIELDS = ("targets", "lam", "lambda_max", "err2", "relative_error", "n_nonzero", "duality_gap", "kkt_violation")
FIELDS += ("n_pivots", "status")
TOL = {"float32": 1e-6, "float64": 1e-12}


def matrix(n: int = 30, dtype: str = "float64") -> np.ndarray:
    return make.mixed(n, seed=n).numpy().astype(dtype)


def host(x: object) -> object:
    return x.get() if isinstance(x, DeviceArray) else x


def assert_same_bits(solution: arrays.CovLassoArrays, expected: nk.CovLassoSolution) -> None:
    np.testing.assert_array_equal(solution.dense(), expected.dense().numpy())
    assert solution.dense().dtype == expected.dense().numpy().dtype
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(solution, field), getattr(expected, field).numpy(), err_msg=field)


# ------------------------------------------------------------------------------------------------------ NumPy: covlasso


class TestCovlasso:
    # 1 and 2: no and one predictor. 15 to 17: around a group of packed rows. 70: more than a block of 64 targets.
    @pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 70])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_gives_the_bits_of_the_operator(self, n, dtype, threads):
        S = matrix(n, dtype)
        solution = arrays.covlasso(S, lam_ratio=0.1, tol=TOL[dtype], threads=threads)
        assert_same_bits(solution, nk.covlasso(torch.from_numpy(S), lam_ratio=0.1, tol=TOL[dtype]))

    def test_all_options_together(self):
        S, generator = matrix(), np.random.default_rng(0)
        targets = [3, 29, 3, 0]
        lam = np.array([0.02, 0.1, 0.02, 0.5]) * S.diagonal()[targets]
        candidates = generator.random((4, 30)) < 0.6
        factors = generator.uniform(0.5, 2.0, 30)
        solution = arrays.covlasso(
            S, lam, targets=targets, candidates=candidates, penalty_factors=factors, tol=1e-9, max_pivots=500, threads=2
        )
        expected = nk.covlasso(
            torch.from_numpy(S),
            torch.from_numpy(lam),
            targets=targets,
            candidates=torch.from_numpy(candidates),
            penalty_factors=torch.from_numpy(factors),
            tol=1e-9,
            max_pivots=500,
        )
        assert_same_bits(solution, expected)
        assert solution.n_nonzero.sum() > 0
        assert not solution.dense()[~candidates].any()
        assert solution.status_names == ["converged"] * 4

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_lambda_max(self, dtype):
        S, candidates = matrix(80, dtype), np.arange(80) % 3 == 0
        expected = nk.lambda_max(torch.from_numpy(S), candidates=torch.from_numpy(candidates)).numpy()
        for threads in (1, 2):
            np.testing.assert_array_equal(arrays.lambda_max(S, candidates=candidates, threads=threads), expected)

    def test_results_of_many_targets_are_moved_in_parts(self):
        # 2^20 padded coefficients are held at once: 300 targets of 4000 categories take two rounds.
        generator = np.random.default_rng(1)
        features = generator.standard_normal((4000, 4), dtype=np.float32)
        S = features @ features.T + np.eye(4000, dtype=np.float32)
        targets = generator.integers(0, 4000, 300)
        solution = arrays.covlasso(S, lam_ratio=0.8, targets=targets)
        for part in (slice(0, 5), slice(295, 300)):
            alone = arrays.covlasso(S, lam_ratio=0.8, targets=targets[part])
            np.testing.assert_array_equal(solution.coefficients[part].toarray(), alone.dense())
            np.testing.assert_array_equal(solution.err2[part], alone.err2)
        assert len(np.unique(solution.n_nonzero)) > 1

    @pytest.mark.parametrize(
        "change",
        [
            np.asfortranarray,
            lambda S: np.repeat(np.repeat(S, 2, 0), 3, 1)[::2, ::3],  # strided in both directions
            lambda S: np.pad(S, ((0, 3), (0, 5)))[:30, :30],  # rows apart, read in place
            lambda S: np.ascontiguousarray(S[::-1, ::-1])[::-1, ::-1],  # negative strides
            lambda S: np.ascontiguousarray(S[::-1])[::-1],  # rows backwards
            lambda S: np.frombuffer(b"\0" + S.tobytes(), np.uint8)[1:].view(S.dtype).reshape(S.shape),  # unaligned
        ],
        ids=["fortran", "strided", "slice", "negative", "rows backwards", "unaligned"],
    )
    def test_every_layout(self, change):
        S = matrix()
        changed = change(S)
        np.testing.assert_array_equal(changed, S)
        assert_same_bits(arrays.covlasso(changed, lam_ratio=0.1), nk.covlasso(torch.from_numpy(S), lam_ratio=0.1))

    def test_half_precision_is_computed_in_float32(self):
        S = (matrix() / matrix().max()).astype("float16")
        S = np.asfortranarray(np.maximum(S, S.T))
        np.fill_diagonal(S, 2)
        expected = nk.covlasso(torch.from_numpy(np.ascontiguousarray(S)), lam_ratio=0.3)
        assert_same_bits(arrays.covlasso(S, lam_ratio=0.3), expected)

    def test_read_only_input_is_read_and_left_alone(self):
        S = matrix()
        before = S.copy()
        S.flags.writeable = False
        arrays.covlasso(S, lam_ratio=0.1)
        np.testing.assert_array_equal(S, before)

    def test_no_targets(self):
        solution = arrays.covlasso(matrix(), lam_ratio=0.1, targets=[])
        assert solution.coefficients.shape == (0, 30)
        assert solution.err2.shape == solution.status.shape == (0,)
        assert solution.status_names == []
        assert arrays.lambda_max(matrix(), np.array([], dtype=np.int32)).shape == (0,)

    def test_prediction(self):
        S, generator = matrix(), np.random.default_rng(2)
        solution = arrays.covlasso(S, lam_ratio=0.1, targets=[4, 7])
        x, mean = generator.standard_normal((5, 30)), generator.standard_normal(30)
        theta = solution.coefficients.toarray()
        np.testing.assert_allclose(solution.predict(x), x @ theta.T)
        np.testing.assert_allclose(solution.predict(x, mean), mean[[4, 7]] + (x - mean) @ theta.T)
        with pytest.raises(ValueError, match=r"x must be \[N, 30\], not \[5, 29\]"):
            solution.predict(x[:, 1:])
        with pytest.raises(ValueError, match=r"mean must be \[30\], not \[29\]"):
            solution.predict(x, mean[1:])

    @settings(deadline=None, max_examples=40)
    @given(n=st.integers(1, 40), seed=st.integers(0, 99), ratio=st.floats(0.02, 1.2), threads=st.integers(1, 3))
    def test_solutions_are_optimal(self, n, seed, ratio, threads):
        S = make.mixed(n, seed)
        solution = arrays.covlasso(S.numpy(), lam_ratio=ratio, tol=1e-10, threads=threads)
        lam, theta = torch.from_numpy(solution.lam), torch.from_numpy(solution.dense())
        assert covlasso_reference.kkt_violation(S, theta, torch.arange(n), lam).max() <= 1e-10
        assert (solution.status == 0).all()


# ---------------------------------------------------------------------------------------------------- NumPy: covariance


class TestCovariance:
    # One row is no variance; 300 rows pass the blocks of 256; 130 columns pass a tile of 96.
    @pytest.mark.parametrize("shape", [(1, 1), (2, 3), (300, 7), (50, 130), (3, 40, 5), (0, 4, 2)])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_gives_the_bits_of_the_operator(self, shape, dtype, threads):
        generator = np.random.default_rng(0)
        x = (5 + generator.standard_normal(shape)).astype(dtype)
        weights = generator.uniform(0.5, 2, shape[:-1])
        tensor = torch.from_numpy(x)
        np.testing.assert_array_equal(arrays.covariance(x, threads=threads), nk.covariance(tensor).numpy())
        weighted = arrays.covariance(
            x, weights=weights, center=False, correction=0.25, dtype=np.float32, threads=threads
        )
        expected = nk.covariance(
            tensor, weights=torch.from_numpy(weights), center=False, correction=0.25, dtype=torch.float32
        )
        assert weighted.dtype == np.float32
        np.testing.assert_array_equal(weighted, expected.numpy())

    @pytest.mark.parametrize(
        "change",
        [
            np.asfortranarray,
            lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
            lambda x: np.pad(x, ((0, 2), (0, 3)))[:40, :6],
            lambda x: np.repeat(x, 2, 0)[::2],
        ],
        ids=["fortran", "negative", "slice", "every second row"],
    )
    def test_every_layout(self, change):
        x = np.random.default_rng(1).standard_normal((40, 6))
        np.testing.assert_array_equal(arrays.covariance(change(x)), arrays.covariance(x))

    def test_a_batch_of_any_strides(self):
        x = np.random.default_rng(2).standard_normal((4, 30, 5))
        for changed in (x[::-1], x[::2], x.transpose(1, 0, 2), np.broadcast_to(x[0], (3, 30, 5))):
            expected = np.stack([np.cov(rows.T, bias=True) for rows in changed])
            np.testing.assert_allclose(arrays.covariance(changed), expected, atol=1e-12)

    def test_a_row_of_weight_zero_may_hold_nan(self):
        x = np.random.default_rng(3).standard_normal((20, 3))
        weights = np.ones(20)
        weights[4], x[4] = 0, np.nan
        np.testing.assert_allclose(
            arrays.covariance(x, weights=weights), np.cov(np.delete(x, 4, 0).T, bias=True), atol=1e-12
        )


# ------------------------------------------------------------------------------------------------------- NumPy: errors


def with_entry(i: int, j: int, value: float) -> np.ndarray:
    S = matrix(5)
    S[i, j] = value
    return S


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cov": [[1.0]]}, TypeError, "cov must be a numpy.ndarray, not list"),
        ({"cov": torch.eye(3)}, TypeError, "cov must be a numpy.ndarray, not Tensor"),
        ({"cov": np.eye(3, dtype=int)}, TypeError, "cov must be one of float16, float32, float64 in native.*'<i8'"),
        ({"cov": np.eye(3, dtype=">f8")}, TypeError, "cov must be .* in native byte order, not '>f8'"),
        ({"cov": np.eye(3, dtype=complex)}, TypeError, "cov must be .*'<c16'"),
        ({"cov": np.ones((2, 3))}, ValueError, r"cov must be a square matrix \[n, n\], not \[2, 3\]"),
        ({"cov": np.ones(3)}, ValueError, r"cov must be a square matrix \[n, n\], not \[3\]"),
        ({"cov": np.ones((0, 0))}, ValueError, "cov must have at least one category, not 0"),
        ({"cov": with_entry(2, 2, -1)}, ValueError, r"cov\[2, 2\] is -1.*; a variance is not negative"),
        ({"cov": with_entry(1, 1, np.inf)}, ValueError, r"cov has a NaN or infinite entry at \[1, 1\]"),
        ({"cov": with_entry(1, 3, np.nan)}, ValueError, "cov has a NaN or infinite entry"),
        ({"cov": with_entry(1, 3, 1e6)}, ValueError, "cov is not symmetric"),
        ({"lam": 0.0}, ValueError, "lam must be positive and finite, not 0.0"),
        ({"lam": "much"}, TypeError, "lam must be real numbers"),
        ({"lam": [1.0, 2.0]}, ValueError, r"lam must be a number or \[5\], not \[2\]"),
        ({"lam": None}, ValueError, "exactly one of lam and lam_ratio must be given, not none"),
        ({"lam_ratio": 0.1}, ValueError, "exactly one of lam and lam_ratio must be given, not both"),
        ({"lam": None, "lam_ratio": np.nan}, ValueError, "lam_ratio must be positive and finite, not nan"),
        ({"targets": [0, 5]}, ValueError, "targets contains 5; expected 0 to 4"),
        ({"targets": [-1]}, ValueError, "targets contains -1; expected 0 to 4"),
        ({"targets": [[0]]}, ValueError, r"targets must be one-dimensional \[T\], not \[1, 1\]"),
        ({"targets": [0.0]}, TypeError, "targets must be integers, not float64"),
        ({"targets": np.ones(5, dtype=bool)}, TypeError, "targets must be integers, not bool"),
        ({"candidates": np.ones(5)}, TypeError, "candidates must be bool, not float64"),
        ({"candidates": np.ones(4, dtype=bool)}, ValueError, r"candidates must be \[5\] or \[5, 5\], not \[4\]"),
        ({"penalty_factors": np.ones(4)}, ValueError, r"penalty_factors must be \[5\], not \[4\]"),
        ({"penalty_factors": np.zeros(5)}, ValueError, "penalty_factors must be positive and finite"),
        ({"tol": 0.0}, ValueError, "tol must be positive, not 0"),
        ({"max_pivots": 0}, ValueError, "max_pivots must be at least 1, not 0"),
        ({"threads": 0}, ValueError, "threads must be at least 1, not 0"),
    ],
)
def test_bad_input_of_covlasso(arguments, error, message):
    with pytest.raises(error, match=message):
        arrays.covlasso(**{"cov": matrix(5), "lam": 1.0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a numpy.ndarray, not list"),
        ({"x": np.ones((3, 2), dtype=int)}, TypeError, "x must be one of float16, float32, float64"),
        ({"x": np.ones((3, 2), dtype=">f4")}, TypeError, "x must be .* native byte order, not '>f4'"),
        ({"x": np.ones(3)}, ValueError, r"x must be \[N, n\] or \[B, N, n\] with n >= 1, not \[3\]"),
        ({"x": np.ones((3, 0))}, ValueError, r"x must be .* with n >= 1, not \[3, 0\]"),
        ({"x": np.ones((0, 3))}, ValueError, r"x must have at least one row, not shape \[0, 3\]"),
        ({"x": np.array([[1.0], [np.nan]])}, ValueError, "x has no finite covariance in column 0"),
        ({"correction": 3}, ValueError, "correction must be below the 3 rows of x, not 3"),
        ({"weights": np.ones(2)}, ValueError, r"weights must be \[3\], one for each row of x, not \[2\]"),
        ({"weights": [1, -1, 1]}, ValueError, "weights holds -1.0*; expected finite numbers that are not negative"),
        ({"weights": [1, np.inf, 1]}, ValueError, "weights holds inf"),
        ({"weights": [0, 0, 0]}, ValueError, "the sum of weights is 0; it must be above correction = 0"),
        ({"weights": [1j, 1, 1]}, TypeError, "weights must be real numbers, not complex128"),
        ({"dtype": np.int32}, TypeError, "dtype must be float64 or float32"),
        ({"threads": -1}, ValueError, "threads must be at least 1, not -1"),
    ],
)
def test_bad_input_of_covariance(arguments, error, message):
    with pytest.raises(error, match=message):
        arrays.covariance(**{"x": np.random.default_rng(0).standard_normal((3, 2)), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cov": np.asfortranarray(matrix(5))}, ValueError, "cov must have contiguous rows in increasing order"),
        ({"cov": matrix(5)[::-1]}, ValueError, "cov must have contiguous rows in increasing order"),
        ({"cov": np.eye(5, dtype="float16")}, TypeError, "cov must be float32 or float64 .* not '<f2'"),
        ({"cov": np.eye(5, dtype=object)}, TypeError, "cov must be float32 or float64"),
        ({"targets": np.zeros(2, np.int32)}, TypeError, "targets must be int64 .* not '<i4'"),
        ({"targets": np.zeros((2, 2), np.int64)}, ValueError, r"targets must be int64 \[T\], not \[2, 2\]"),
        ({"targets": np.arange(4)[::2]}, ValueError, "targets must be contiguous"),
        ({"targets": np.array([0, 5])}, ValueError, r"targets\[1\] is 5; expected 0 to 4"),
        ({"lam": np.ones(3)}, ValueError, r"lam must be \[T\] = \[2\], not \[3\]"),
        ({"lam": np.ones(2, np.float32)}, TypeError, "lam must be float64"),
        ({"lam": np.array([1.0, -1.0])}, ValueError, r"lam\[1\] is -1"),
        ({"penalty": np.ones(5, np.float32)}, TypeError, "penalty must be of the dtype of cov"),
        ({"penalty": np.ones((3, 5))}, ValueError, r"penalty must be \[n\] = \[5\] or \[T, n\] = \[2, 5\], not"),
        ({"penalty": np.ones((5, 2)).T}, ValueError, "penalty must be contiguous"),
        ({"penalty": np.array([1, 1, 0.0, 1, 1])}, ValueError, "penalty holds 0.0*; expected positive numbers"),
        ({"penalty": np.full(5, np.nan)}, ValueError, "penalty holds nan"),
    ],
)
def test_the_compiled_module_takes_arrays_as_they_are(arguments, error, message):
    valid = {"cov": matrix(5), "targets": np.array([0, 1]), "lam": np.ones(2)}
    _native.covlasso(**valid)
    with pytest.raises(error, match=message):
        _native.covlasso(**{**valid, **arguments})


# ------------------------------------------------------------------------------------------------- torch and threads

WITHOUT_TORCH = """
import importlib.util, sys
sys.modules["torch"] = None  # importing it raises ImportError
specification = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(specification)
specification.loader.exec_module(native)
import numpy as np
cov = np.array([[2.0, 1.0], [1.0, 2.0]])
indptr, column, value, info = native.covlasso(cov, np.array([0]), np.array([1.0]), threads=2)
print(indptr, column, value, info[0, 0], native.lambda_max(cov, np.array([0])))
print(native.centered_moments(np.array([[[1.0], [3.0]]]))[2].item())
assert "libtorch" not in open("/proc/self/maps").read()
assert "neuraldeps_kernels" not in sys.modules
"""


def test_the_compiled_module_runs_without_torch(run_python):
    result = run_python(WITHOUT_TORCH, _native.__file__)
    assert result.returncode == 0, result.stderr
    # 2 theta^2 - 2 theta + 2 + |theta| is least at theta = 1/4; the rows 1 and 3 are 1 away from their mean.
    assert result.stdout.splitlines() == ["[0 1] [1] [0.25] 1.625 [2.]", "2.0"]


def test_the_compiled_module_links_neither_torch_nor_cuda():
    needed = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed
    assert "cuda" not in needed


def test_other_threads_run_meanwhile():
    S = make.clustered(300, 200, seed=3).numpy()
    events: list[str] = []

    def work() -> None:
        events.append("begin")
        arrays.covlasso(S, lam_ratio=0.01)
        events.append("end")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread gives way unless it releases the lock itself
    try:
        worker = threading.Thread(target=work)
        worker.start()
        while "begin" not in events:
            pass
        events.append("meanwhile")
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert events == ["begin", "meanwhile", "end"]


def test_calls_from_many_threads_do_not_disturb_each_other():
    S = matrix(40)
    expected = arrays.covlasso(S, lam_ratio=0.05).dense()
    results: list[np.ndarray] = []
    workers = [
        threading.Thread(target=lambda: results.append(arrays.covlasso(S, lam_ratio=0.05, threads=2).dense()))
        for _ in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6
    for result in results:
        np.testing.assert_array_equal(result, expected)


# ------------------------------------------------------------------------------------------------------- CuPy, emulated


@pytest.fixture
def cupy_front(monkeypatch, emulated) -> Iterator[ModuleType]:
    """neuraldeps_kernels.cupy on the stand-in for CuPy and the emulated kernels."""
    for name, module in device_arrays.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "neuraldeps_kernels.cupy", raising=False)
    monkeypatch.delattr(nk, "cupy", raising=False)
    front = importlib.import_module("neuraldeps_kernels.cupy")
    monkeypatch.setattr(front, "CUDA_LIBRARY", emulated)
    yield front
    sys.modules.pop("neuraldeps_kernels.cupy", None)
    vars(nk).pop("cupy", None)


class TestCupy:
    # 1: no predictor. 17: beyond a block of the factor. Two chunks of targets are reached by a small chunk below.
    @pytest.mark.parametrize("n", [1, 2, 17])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_solutions_match_the_operator(self, cupy_front, n, dtype):
        S, tol = matrix(n, dtype), {"float32": 2e-6, "float64": 1e-10}[dtype]
        solution = cupy_front.covlasso(upload(S), lam_ratio=0.2, tol=tol)
        expected = nk.covlasso(torch.from_numpy(S), lam_ratio=0.2, tol=tol)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-7, "atol": 1e-9}
        np.testing.assert_allclose(solution.dense(), expected.dense().numpy(), **close)
        for field in ("targets", "n_nonzero", "status"):
            np.testing.assert_array_equal(
                host(getattr(solution, field)), getattr(expected, field).numpy(), err_msg=field
            )
        for field in ("lam", "lambda_max", "err2", "relative_error"):
            np.testing.assert_allclose(host(getattr(solution, field)), getattr(expected, field).numpy(), **close)
        assert all(isinstance(getattr(solution, field), DeviceArray) for field in FIELDS)
        assert (solution.kkt_violation <= tol).all()

    def test_all_options_in_chunks(self, cupy_front, monkeypatch):
        monkeypatch.setattr(cupy_front, "_CHUNK", 0)  # then 64 targets at a time
        S, generator = matrix(6), np.random.default_rng(0)
        targets = generator.integers(0, 6, 70)
        candidates, factors = generator.random((70, 6)) < 0.7, generator.uniform(0.5, 2.0, 6)
        options = {"lam": 2.0, "tol": 1e-10}
        solution = cupy_front.covlasso(
            upload(S),
            targets=upload(targets),
            candidates=upload(candidates),
            penalty_factors=upload(factors),
            **options,
        )
        expected = arrays.covlasso(S, targets=targets, candidates=candidates, penalty_factors=factors, **options)
        np.testing.assert_allclose(solution.dense(), expected.dense(), atol=1e-9)
        np.testing.assert_array_equal(host(solution.n_nonzero), expected.n_nonzero)
        from_host = cupy_front.covlasso(
            upload(S), targets=targets.tolist(), candidates=candidates, penalty_factors=factors, **options
        )
        np.testing.assert_array_equal(from_host.dense(), solution.dense())

    @pytest.mark.parametrize("change", [np.asfortranarray, lambda S: S[::-1, ::-1], lambda S: S[::2, ::2]])
    def test_every_layout(self, cupy_front, change):
        S = change(matrix(8))
        strided = change(upload(matrix(8)))
        assert strided.strides == S.strides
        solution = cupy_front.covlasso(strided.view(DeviceArray), lam_ratio=0.2, targets=[1])
        np.testing.assert_allclose(solution.dense(), arrays.covlasso(S, lam_ratio=0.2, targets=[1]).dense(), atol=1e-6)

    def test_no_targets(self, cupy_front):
        solution = cupy_front.covlasso(upload(matrix(4)), lam_ratio=0.1, targets=[])
        assert solution.coefficients.shape == (0, 4)
        assert solution.status_names == []

    def test_lambda_max(self, cupy_front):
        S, candidates = matrix(9), np.arange(9) % 2 == 0
        expected = arrays.lambda_max(S, [8, 1], candidates=candidates)
        np.testing.assert_allclose(host(cupy_front.lambda_max(upload(S), [8, 1], candidates=candidates)), expected)

    @pytest.mark.parametrize("shape", [(1, 1), (40, 5), (3, 20, 4)])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_covariance(self, cupy_front, shape, dtype):
        generator = np.random.default_rng(4)
        x = (3 + generator.standard_normal(shape)).astype(dtype)
        weights = generator.integers(1, 4, shape[:-1]).astype(float)
        for options in ({}, {"center": False, "correction": 0.5}):
            result = cupy_front.covariance(upload(x), weights=upload(weights), **options)
            expected = covariance_reference.covariance(
                torch.from_numpy(x), weights=torch.from_numpy(weights), **options
            )
            np.testing.assert_allclose(host(result), expected.numpy(), rtol=1e-12, atol=1e-13)
        assert cupy_front.covariance(upload(x), dtype=np.float32).dtype == np.float32

    def test_bad_input(self, cupy_front):
        S = upload(matrix(4))
        with pytest.raises(TypeError, match=r"cov must be a CuPy array .* not be ndarray"):
            cupy_front.covlasso(matrix(4), 1.0)
        with pytest.raises(TypeError, match="cov must be one of float16, float32, float64, not int64"):
            cupy_front.covlasso(upload(np.eye(3, dtype=int)), 1.0)
        with pytest.raises(ValueError, match=r"cov must be a square matrix \[n, n\], not \[2, 3\]"):
            cupy_front.covlasso(upload(np.ones((2, 3))), 1.0)
        with pytest.raises(ValueError, match="lam must be positive and finite, not -1"):
            cupy_front.covlasso(S, -1)
        with pytest.raises(ValueError, match="targets contains 4; expected 0 to 3"):
            cupy_front.covlasso(S, 1.0, targets=upload([0, 4]))
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            cupy_front.covariance(S, weights=upload([1.0, -1.0, 1.0, 1.0]))

    def test_a_build_without_cuda_says_so(self, cupy_front, monkeypatch, tmp_path):
        monkeypatch.setattr(cupy_front, "CUDA_LIBRARY", tmp_path / "none.so")
        with pytest.raises(ImportError, match="built without CUDA kernels"):
            cupy_front.covlasso(upload(matrix(4)), 1.0)

    def test_without_cupy_the_import_names_the_extra(self, run_python):
        code = "import sys; sys.modules['cupy'] = None; from neuraldeps_kernels import cupy"
        result = run_python(code)
        assert result.returncode == 1
        assert "pip install neuraldeps_kernels[cupy]" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------- device arrays and the library


def launch_arguments(n: int = 4, dtype: str = "float64") -> dict[str, object]:
    """Valid arguments of CudaLibrary.covlasso without `workspace`: two targets."""
    packed = np.zeros((n, _native.leading_dimension(n, np.dtype(dtype).itemsize)), dtype)
    packed[:, :n] = matrix(n, dtype)
    return {
        "cov": upload(packed),
        "n": n,
        "targets": upload([0, 1]),
        "lam": upload([1.0, 1.0]),
        "penalty": None,
        "tol": 1e-6,
        "max_pivots": 100,
        "value": upload(np.empty((2, n - 1), dtype)),
        "index": upload(np.empty((2, n - 1), np.int32)),
        "count": upload(np.empty(2, np.int32)),
        "info": upload(np.empty((2, 6))),
        "stream": 0,
    }


def changed(x: object, stream: int | None = 1, **changes: object) -> DeviceArray:
    array = upload(x)
    array.stream, array.changes = stream, changes
    return array


def read_only(x: object) -> DeviceArray:
    array = upload(x)
    array.flags.writeable = False
    return array


class TestLibrary:
    @pytest.fixture
    def launch(self, emulated) -> Callable[..., dict[str, object]]:
        """launch(**changes): the call with changed arguments; returns all of them."""
        library = _native.CudaLibrary(str(emulated))

        def call(**changes: object) -> dict[str, object]:
            arguments = {**launch_arguments(), **changes}
            bytes_needed = library.covlasso_workspace(4, 2, "float64")
            arguments = {"workspace": upload(np.empty(bytes_needed, np.uint8)), **arguments}
            library.covlasso(**arguments)
            return arguments

        return call

    def test_results_lie_in_the_given_arrays(self, launch):
        results = launch()
        indptr, column, value, _ = _native.covlasso(matrix(4), np.array([0, 1]), np.ones(2))
        assert results["count"].tolist() == np.diff(indptr).tolist()
        rows = range(2)
        found = np.concatenate([results["value"][t, : results["count"][t]] for t in rows])
        np.testing.assert_allclose(host(found), value, rtol=1e-6)
        assert np.concatenate([results["index"][t, : results["count"][t]] for t in rows]).tolist() == column.tolist()

    @pytest.mark.parametrize(("pending", "stream"), [(None, 7), (1, 0), (1, 1), (2, 2), (7, 7)])
    def test_pending_work_on_the_stream_of_the_call_is_fine(self, launch, pending, stream):
        arguments = launch_arguments()
        for name, array in arguments.items():
            if isinstance(array, DeviceArray):
                array.stream = pending
                assert array.__cuda_array_interface__["stream"] == pending, name
        workspace = changed(np.empty(1 << 20, np.uint8), pending)
        assert launch(**{**arguments, "workspace": workspace, "stream": stream})["info"][:, 4].tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"lam": np.ones(2)}, TypeError, "lam must have __cuda_array_interface__, not be ndarray"),
            ({"lam": changed(np.ones(2), 7)}, ValueError, "lam has pending work on stream 7, not on stream 0"),
            ({"lam": changed(np.ones(2), 0)}, ValueError, "lam: stream 0 is not allowed"),
            ({"lam": upload(np.ones(4))[::2]}, ValueError, "lam must be contiguous in C order"),
            ({"lam": upload(np.ones(3))}, ValueError, r"lam must be \[T\] = \[2\], not \[3\]"),
            ({"lam": upload(np.ones(2, ">f8"))}, TypeError, "lam must be float64 in native byte order, not '>f8'"),
            ({"lam": changed(np.ones(2), mask=np.ones(2))}, ValueError, "lam must have no mask"),
            ({"lam": changed(np.ones(2), data=(0, False))}, ValueError, "lam has no memory"),
            ({"lam": changed(np.ones(2), strides=(8, 8))}, ValueError, "lam: .* has 2 strides for 1 dimensions"),
            ({"cov": upload(np.ones((4, 4)))}, ValueError, r"cov must be \[n, leading_dimension\(n\)\] = \[4, 24\]"),
            ({"cov": upload(np.ones((4, 24), int))}, TypeError, "cov must be float32 or float64"),
            ({"cov": upload(np.ones(97))[1:].reshape(4, 24)}, ValueError, "cov must be aligned to 64 bytes"),
            ({"n": 0}, ValueError, r"n must be 1 to 2\^31 - 1025, not 0"),
            ({"targets": upload(np.zeros(2, np.int32))}, TypeError, "targets must be int64"),
            ({"penalty": upload(np.ones(3))}, ValueError, r"penalty must be \[n\] = \[4\] or \[T, n\] = \[2, 4\], not"),
            ({"penalty": upload(np.ones(4, "f4"))}, TypeError, "penalty must be of the dtype of cov"),
            ({"value": upload(np.ones(6))}, ValueError, r"value must be \[T, capacity\], not \[6\]"),
            ({"value": read_only(np.ones((2, 3)))}, ValueError, "value is read-only"),
            ({"index": upload(np.ones((2, 2), np.int32))}, ValueError, r"index must be \[T, capacity\] = \[2, 3\]"),
            ({"index": upload(np.ones((2, 3), np.int64))}, TypeError, "index must be int32"),
            ({"count": read_only(np.ones(2, np.int32))}, ValueError, "count is read-only"),
            ({"info": upload(np.ones((6, 2))).T}, ValueError, "info must be contiguous in C order"),
            ({"info": read_only(np.ones((2, 6)))}, ValueError, "info is read-only"),
            ({"workspace": upload(np.ones(3, np.uint8))}, ValueError, "workspace must hold .* bytes, not 3"),
            ({"workspace": upload(np.ones(3))}, TypeError, "workspace must be uint8"),
            ({"tol": -1.0}, ValueError, "tol must be positive"),
        ],
    )
    def test_bad_arguments_are_refused_by_name(self, launch, changes, error, message):
        with pytest.raises(error, match=message):
            launch(**changes)

    def test_the_dtype_of_a_workspace(self, emulated):
        library = _native.CudaLibrary(str(emulated))
        assert 0 < library.covlasso_workspace(100, 5, "float32") < library.covlasso_workspace(100, 5, "float64")
        with pytest.raises(TypeError, match="dtype must be 'float32' or 'float64', not 'float16'"):
            library.covlasso_workspace(100, 5, "float16")

    def test_a_file_that_is_no_library(self, tmp_path: Path):
        path = tmp_path / "empty.so"
        path.write_bytes(b"")
        with pytest.raises(ImportError, match="the CUDA kernels do not load"):
            _native.CudaLibrary(str(path))


# ------------------------------------------------------------------------------------------------ spectra and ranks


def matrices(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 8, 6), (2, 3, 5, 7), (4, 4), (1, 90, 80), (5, 140, 150), (0, 3, 4), (2, 0, 3)])
def test_spectra_are_those_of_the_operators(shape: tuple[int, ...], dtype: type) -> None:
    """The same bits where the kernel serves, its tolerance where LAPACK does (single large, large float64 matrices)."""
    a = matrices(shape, dtype)
    tensor = torch.from_numpy(a)
    values, want = arrays.svdvals(a, threads=2), nk.svdvals(tensor).numpy()
    assert values.dtype == want.dtype
    np.testing.assert_allclose(values, want, rtol=0, atol=(1e-12 if dtype == np.float64 else 3e-6) * max(shape))
    assert np.array_equal(arrays.matrix_rank(a), nk.matrix_rank(tensor).numpy())
    rtol = [0.5, 0.1, 1e-3]
    several = arrays.matrix_rank(a, rtol=rtol, atol=1e-3, threads=3)
    assert np.array_equal(several, nk.matrix_rank(tensor, rtol=torch.tensor(rtol), atol=1e-3).numpy())
    projected = arrays.low_rank_project(a, 2)
    assert projected.dtype == dtype
    tolerance = {np.float16: 1e-2, np.float32: 1e-5, np.float64: 1e-12}[dtype]
    np.testing.assert_allclose(projected, nk.low_rank_project(tensor, 2).numpy(), rtol=0, atol=tolerance)
    if len(shape) > 1 and shape[-1] == shape[-2]:
        assert np.array_equal(arrays.matrix_rank(a, hermitian=True), nk.matrix_rank(tensor, hermitian=True).numpy())


def test_spectra_of_any_strides_and_of_what_is_not_finite() -> None:
    a = matrices((6, 10, 8), np.float32)
    for view in (a.swapaxes(1, 2), a[::-2], a[:, ::2], a[:, :, ::-1], a[:, 2:7, 1:6]):
        dense = np.ascontiguousarray(view)
        np.testing.assert_allclose(arrays.svdvals(view), arrays.svdvals(dense), rtol=1e-5)
        assert np.array_equal(arrays.matrix_rank(view, rtol=0.3), arrays.matrix_rank(dense, rtol=0.3))
    for dtype in (np.float32, np.float64):
        for shape in ((6, 10, 8), (2, 90, 80)):
            wrong = matrices(shape, dtype)
            wrong[1, 2, 3] = np.inf
            assert np.isnan(arrays.svdvals(wrong)[1]).all()
            assert np.isfinite(arrays.svdvals(wrong)[0]).all()
            assert arrays.matrix_rank(wrong).tolist()[1] == -1
            assert np.isnan(arrays.low_rank_project(wrong, 1)[1]).all()
    assert arrays.matrix_rank(np.zeros((3, 4), np.float32)) == 0
    nearly_singular = np.diag([1.0, 1e-9, 0.0]).astype(np.float32)[None].repeat(5, 0)
    assert arrays.matrix_rank(nearly_singular, rtol=1e-10).tolist() == [2] * 5  # beyond what a Gram matrix resolves


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: arrays.svdvals(a[0, 0]), ValueError, r"a must be \[..., m, n\], not \[4\]"),
        (lambda a: arrays.svdvals(a.astype(int)), TypeError, "a must be one of float16, float32, float64"),
        (lambda a: arrays.svdvals([[1.0]]), TypeError, "a must be a numpy.ndarray, not list"),
        (lambda a: arrays.svdvals(a, threads=0), ValueError, "threads must be at least 1"),
        (lambda a: arrays.matrix_rank(a, rtol=-1.0), ValueError, "rtol must not be negative"),
        (lambda a: arrays.matrix_rank(a, atol=float("nan")), ValueError, "atol must not be negative or NaN"),
        (lambda a: arrays.matrix_rank(a, rtol=[[0.1]]), ValueError, r"rtol must be a number or \[R\]"),
        (lambda a: arrays.matrix_rank(a, hermitian=True), ValueError, "a must be square if hermitian"),
        (lambda a: arrays.low_rank_project(a, -1), ValueError, "k must be at least 0, not -1"),
        (lambda a: arrays.low_rank_project(a, 1.5), TypeError, "k must be an int, not float"),
    ],
)
def test_bad_matrices(call: Callable[[np.ndarray], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(matrices((2, 3, 4), np.float32))
