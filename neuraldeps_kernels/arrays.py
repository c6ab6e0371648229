"""Covariance, CovLasso, spectra and ranks of NumPy arrays; `neuraldeps_kernels.cupy` has the first two for CuPy arrays.

    from neuraldeps_kernels import arrays
    S = arrays.covariance(logits)                                 # [n, n]
    solution = arrays.covlasso(S, lam_ratio=0.1, threads=4)       # coefficients: scipy.sparse.csr_matrix [T, n]
    arrays.matrix_rank(weights)                                   # int64 [...] of [..., m, n]

The kernels are those of the torch operators and give the same bits, but arrays never pass through torch: the compiled
module `neuraldeps_kernels._native` below depends on Python alone. Importing the package imports torch; a program that
must not can load the file of `_native` by itself, with importlib.util.spec_from_file_location.

Threads: torch's threads are not at hand here, so each call takes their number and starts them itself. Results do not
depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from neuraldeps_kernels import _native
from neuraldeps_kernels.ops.covlasso import STATUS_NAMES
from neuraldeps_kernels.profiling import annotated

__all__ = [
    "STATUS_NAMES",
    "CovLassoArrays",
    "covariance",
    "covlasso",
    "lambda_max",
    "low_rank_project",
    "matrix_rank",
    "svdvals",
]

_MATRIX_DTYPES = (np.float16, np.float32, np.float64)
_LONGEST_BASIS = 256  # short side of the vectors that the kernel finds faster than LAPACK

Array = Any  # numpy.ndarray or cupy.ndarray
Values = float | Sequence[float] | npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class CovLassoArrays:
    """Solutions of T CovLasso problems over n categories, one row per target, as NumPy or CuPy arrays.

    Attributes:
        coefficients: [T, n] csr_matrix of SciPy or CuPy, columns increasing, dtype of the covariance; the pinned -1 is
            left out.
        targets, lam, lambda_max, err2, relative_error, n_nonzero, duality_gap, kkt_violation, n_pivots, status: [T], as
            in `neuraldeps_kernels.CovLassoSolution`.
    """

    coefficients: Any
    targets: Array
    lam: Array
    lambda_max: Array
    err2: Array
    relative_error: Array
    n_nonzero: Array
    duality_gap: Array
    kkt_violation: Array
    n_pivots: Array
    status: Array

    @property
    def status_names(self) -> list[str]:
        """One of "converged", "capped", "collinear", "not_psd" per target."""
        return [STATUS_NAMES[code] for code in self.status.tolist()]

    def dense(self) -> Array:
        """The coefficients as a dense [T, n] array, zero at the targets themselves."""
        return self.coefficients.toarray()

    def predict(self, x: Array, mean: Array | None = None) -> Array:
        """Predicted logits [N, T] from x [N, n]: `mean_i + sum_j theta_j (x_j - mean_j)`; `mean` [n] defaults to zero.

        Raises:
            ValueError: `x` or `mean` does not have n columns.
        """
        n = self.coefficients.shape[1]
        if x.ndim != 2 or x.shape[1] != n:
            raise ValueError(f"x must be [N, {n}], not {list(x.shape)}")
        if mean is not None and mean.shape != (n,):
            raise ValueError(f"mean must be [{n}], not {list(mean.shape)}")
        theta = self.dense().astype(x.dtype, copy=False)
        return x @ theta.T if mean is None else mean[self.targets] + (x - mean) @ theta.T


@annotated
def covariance(
    x: npt.NDArray[Any],
    *,
    center: bool = True,
    correction: float = 0,
    weights: npt.ArrayLike | None = None,
    dtype: npt.DTypeLike = np.float64,
    threads: int = 1,
) -> npt.NDArray[Any]:
    """Covariance matrix of the columns of `x`, exactly symmetric; `neuraldeps_kernels.covariance` for NumPy arrays.

    Args:
        x: [N, n] or [B, N, n] float32, float64 or float16.
        center: subtract the mean; without it the second moment.
        correction: subtracted from the number of rows (from the sum of weights) in the divisor.
        weights: [N] or [B, N], finite and not negative; a row of weight 0 is not read.
        dtype: of the result, float64 or float32.
        threads: number of threads.

    Returns:
        [n, n] or [B, n, n].

    Raises:
        ValueError: a shape does not fit; the sum of weights is not above `correction`; a weight is negative or not
            finite; `x` holds NaN, infinity or values whose squares overflow; `threads` is not positive.
        TypeError: `x`, `weights` or `dtype` has the wrong type.
    """
    _check_array("x", x, (np.float16, np.float32, np.float64))
    batched, batched_weights = batched_rows(np, x, weights, correction)
    if batched_weights is not None:
        batched_weights = np.require(batched_weights, requirements=["C", "A"])
    weight_sum, mean, moment = _native.centered_moments(_readable_rows(batched), batched_weights, threads)
    result: npt.NDArray[Any] = normalised(np, weight_sum, mean, moment, center, correction, dtype)
    return result if x.ndim == 3 else result[0]


@annotated
def lambda_max(
    cov: npt.NDArray[Any],
    targets: npt.ArrayLike | None = None,
    *,
    candidates: npt.ArrayLike | None = None,
    penalty_factors: npt.ArrayLike | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float64]:
    """The smallest penalty [T] of each target without any coefficient; arguments and errors as `covlasso`."""
    cov = _checked_covariance(cov)
    indices = checked_targets(np, targets, len(cov))
    return _native.lambda_max(cov, indices, penalty(np, cov, len(indices), candidates, penalty_factors), threads)


@annotated
def covlasso(
    cov: npt.NDArray[Any],
    lam: Values | None = None,
    *,
    lam_ratio: Values | None = None,
    targets: npt.ArrayLike | None = None,
    candidates: npt.ArrayLike | None = None,
    penalty_factors: npt.ArrayLike | None = None,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    threads: int = 1,
) -> CovLassoArrays:
    """Solves CovLasso for many targets from one covariance; `neuraldeps_kernels.covlasso` for NumPy arrays.

    Args:
        cov: [n, n] float32 or float64 in native byte order, any strides; float16 is computed in float32.
        lam, lam_ratio, targets, candidates, penalty_factors, tol, max_pivots: as in `neuraldeps_kernels.covlasso`, as
            numbers, sequences or NumPy arrays.
        threads: number of threads.

    Returns:
        CovLassoArrays of NumPy arrays and a scipy.sparse.csr_matrix.

    Raises:
        ValueError, TypeError: as `neuraldeps_kernels.covlasso`; `threads` is not positive.
    """
    cov = _checked_covariance(cov)
    indices = checked_targets(np, targets, len(cov))
    check_penalty_choice(lam, lam_ratio)
    factors = penalty(np, cov, len(indices), candidates, penalty_factors)
    if lam_ratio is None:
        lams = per_target(np, "lam", lam, len(indices))
    else:
        ratios = per_target(np, "lam_ratio", lam_ratio, len(indices))
        lams = ratios * _native.lambda_max(cov, indices, factors, threads)
    pivots = default_pivots(len(cov)) if max_pivots is None else max_pivots
    indptr, column, value, info = _native.covlasso(cov, indices, lams, factors, tol, pivots, threads)
    coefficients = sparse.csr_matrix((value, column, indptr), shape=(len(indices), len(cov)))
    return solution(np, cov, indices, lams, coefficients, np.diff(indptr), info)


@annotated
def svdvals(a: npt.NDArray[Any], *, threads: int = 1) -> npt.NDArray[Any]:
    """Singular values [..., min(m, n)] of `a` [..., m, n], descending; `neuraldeps_kernels.svdvals` for NumPy arrays.

    Args:
        a: float16, float32 or float64; any strides, m or n or the batch may be 0.
        threads: number of threads.

    Returns:
        float64 for float64 `a`, else float32; NaN where a matrix holds NaN or infinity. LAPACK serves where it is
        faster: single large matrices, and min(m, n) beyond 256, in float64 beyond 128.

    Raises:
        ValueError: `a` has fewer than 2 dimensions; `threads` is not positive.
        TypeError: `a` is no array of these dtypes.
    """
    flat = _matrices(a)
    values: npt.NDArray[Any] | None = _native.svdvals(flat, threads)
    if values is None:
        finite, wrong = _finite_matrices(flat)
        values = np.where(wrong[:, None], np.nan, np.linalg.svd(finite, compute_uv=False))
        values = values.astype(np.float64 if a.dtype == np.float64 else np.float32, copy=False)
    by_matrix: npt.NDArray[Any] = values.reshape((*a.shape[:-2], min(a.shape[-2:])))
    return by_matrix


@annotated
def matrix_rank(
    a: npt.NDArray[Any],
    *,
    rtol: Values | None = None,
    atol: float | None = None,
    hermitian: bool = False,
    threads: int = 1,
) -> npt.NDArray[np.int64]:
    """Number of singular values above `max(atol, rtol sigma_1)`; `neuraldeps_kernels.matrix_rank` for NumPy arrays.

    Args:
        a, threads: as in `svdvals`.
        rtol: a number, or a sequence [R] of them; default `max(m, n) eps`, or 0 if `atol` is positive.
        atol: absolute tolerance; default 0.
        hermitian: `a` is symmetric, only its lower triangle is read, and its absolute eigenvalues are counted.

    Returns:
        int64 [...], or [..., R]; 0 for a zero or empty matrix, -1 where a matrix holds NaN or infinity.

    Raises:
        ValueError: a shape does not fit; a tolerance is negative or NaN; `threads` is not positive.
        TypeError: `a` is no array of these dtypes.
    """
    flat = _matrices(a)
    absolute = 0.0 if atol is None else float(atol)
    if rtol is None:
        eps = np.finfo(np.float64 if a.dtype == np.float64 else np.float32).eps
        rtol = 0.0 if absolute > 0 else float(max(a.shape[-2:]) * eps)
    relative = _real_numbers(np, "rtol", rtol, np.float64)
    if relative.ndim > 1:
        raise ValueError(f"rtol must be a number or [R], not {list(relative.shape)}")
    tolerances = np.ascontiguousarray(relative.reshape(-1))
    rank = _native.matrix_rank(flat, tolerances, absolute, hermitian, threads)
    if rank is None:
        rank = _ranks_by_lapack(flat, tolerances, absolute, hermitian)
    undecided = (rank == -2).any(1)
    if undecided.any():
        rank[undecided] = _ranks_by_lapack(flat[undecided], tolerances, absolute, hermitian)
    by_matrix: npt.NDArray[np.int64] = rank.reshape((*a.shape[:-2], *relative.shape))
    return by_matrix


@annotated
def low_rank_project(a: npt.NDArray[Any], k: int, *, threads: int = 1) -> npt.NDArray[Any]:
    """The nearest matrix of rank at most k, as `neuraldeps_kernels.low_rank_project`, without a gradient.

    Args:
        a, threads: as in `svdvals`.
        k: number of terms, at least 0; from min(m, n) on the result is a copy of `a`.

    Returns:
        [..., m, n] in the dtype of `a`; NaN where a matrix holds NaN or infinity.

    Raises:
        ValueError, TypeError: as `svdvals`; k is negative or no integer.
    """
    flat = _matrices(a)
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    if k >= min(a.shape[-2:]) or a.size == 0:
        unchanged: npt.NDArray[Any] = a.copy()
        return unchanged
    finite, wrong = _finite_matrices(flat)
    transposed = finite.shape[1] < finite.shape[2]
    tall = finite.swapaxes(1, 2) if transposed else finite  # [B, longer, shorter]
    if a.dtype == np.float64 or tall.shape[2] > _LONGEST_BASIS:
        kept = np.linalg.svd(tall.astype(np.float64), full_matrices=False)[2][:, :k]
    else:
        kept = _native.singular_basis(finite, threads)[1][:, :k]
    projected = tall.astype(np.float64) @ kept.swapaxes(1, 2) @ kept  # [B, longer, shorter]
    result = projected.swapaxes(1, 2) if transposed else projected
    result = np.where(wrong[:, None, None], np.nan, result)
    return np.ascontiguousarray(result.astype(a.dtype)).reshape(a.shape)


# ----------------------------------------------------------------------------- arguments and results, NumPy and CuPy
# xp is the module of the arrays: numpy or cupy.


def check_covariance_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"cov must be a square matrix [n, n], not {list(shape)}")
    if shape[0] == 0:
        raise ValueError("cov must have at least one category, not 0")


def checked_targets(xp: ModuleType, targets: Any, n: int) -> Array:
    """targets as contiguous int64 [T]; None: all n."""
    if targets is None:
        return xp.arange(n, dtype=np.int64)
    indices = xp.asarray(targets)
    if indices.ndim != 1:
        raise ValueError(f"targets must be one-dimensional [T], not {list(indices.shape)}")
    if indices.size and indices.dtype.kind not in "iu":
        raise TypeError(f"targets must be integers, not {indices.dtype}")
    wrong = (indices < 0) | (indices >= n)
    if bool(wrong.any()):
        raise ValueError(f"targets contains {int(indices[wrong][0])}; expected 0 to {n - 1}")
    return _contiguous(xp, indices, np.int64)


def check_penalty_choice(lam: object, lam_ratio: object) -> None:
    if (lam is None) == (lam_ratio is None):
        given = "none" if lam is None else "both"
        raise ValueError(f"exactly one of lam and lam_ratio must be given, not {given}")


def per_target(xp: ModuleType, name: str, value: Any, num_targets: int) -> Array:
    """`value` as contiguous float64 [T], positive and finite."""
    given = _real_numbers(xp, name, value, np.float64)
    if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != num_targets):
        raise ValueError(f"{name} must be a number or [{num_targets}], not {list(given.shape)}")
    if not bool(((given > 0) & xp.isfinite(given)).all()):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return _contiguous(xp, xp.broadcast_to(given, (num_targets,)), np.float64)


def penalty(xp: ModuleType, cov: Array, num_targets: int, candidates: Any, penalty_factors: Any) -> Array | None:
    """Penalty factors [n] or [T, n] in the dtype of `cov`, infinite for what is no candidate; None: all ones."""
    n, factors = cov.shape[0], None
    if penalty_factors is not None:
        factors = _contiguous(xp, _real_numbers(xp, "penalty_factors", penalty_factors, cov.dtype), cov.dtype)
        if factors.shape != (n,):
            raise ValueError(f"penalty_factors must be [{n}], not {list(factors.shape)}")
        if not bool(((factors > 0) & xp.isfinite(factors)).all()):
            raise ValueError("penalty_factors must be positive and finite; use candidates to exclude a category")
    if candidates is None:
        return factors
    allowed = xp.asarray(candidates)
    if allowed.dtype != np.bool_:
        raise TypeError(f"candidates must be bool, not {allowed.dtype}")
    if allowed.shape not in ((n,), (num_targets, n)):
        raise ValueError(f"candidates must be [{n}] or [{num_targets}, {n}], not {list(allowed.shape)}")
    ones = xp.ones(n, dtype=cov.dtype) if factors is None else factors
    return xp.where(allowed, ones, xp.full(n, np.inf, dtype=cov.dtype))


def default_pivots(n: int) -> int:
    return 10_000 + 20 * n


def solution(
    xp: ModuleType, cov: Array, targets: Array, lam: Array, coefficients: Any, count: Array, info: Array
) -> CovLassoArrays:
    """Result from what the kernels return: info [T, 6] in the order of csrc/include/neuraldeps/cpu_api.h."""
    err2, duality_gap, kkt_violation, n_pivots, status, top = info.T
    variance = xp.diagonal(cov)[targets].astype(np.float64)
    varies = variance > 0
    return CovLassoArrays(
        coefficients=coefficients,
        targets=targets,
        lam=lam,
        lambda_max=top,
        err2=err2,
        relative_error=xp.where(varies, err2 / xp.where(varies, variance, 1.0), 0.0),
        n_nonzero=count,
        duality_gap=duality_gap,
        kkt_violation=kkt_violation,
        n_pivots=n_pivots.astype(np.int64),
        status=status.astype(np.int64),
    )


def batched_rows(xp: ModuleType, x: Array, weights: Any, correction: float) -> tuple[Array, Array | None]:
    """x as [B, N, n] and weights as float64 [B, N], their shapes checked, and the number of rows where it divides."""
    if x.ndim not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"x must be [N, n] or [B, N, n] with n >= 1, not {list(x.shape)}")
    if x.shape[-2] == 0:
        raise ValueError(f"x must have at least one row, not shape {list(x.shape)}")
    batched = x if x.ndim == 3 else x[None]
    if weights is None:
        if x.shape[-2] <= correction:
            raise ValueError(f"correction must be below the {x.shape[-2]} rows of x, not {correction}")
        return batched, None
    given = _real_numbers(xp, "weights", weights, np.float64)
    if given.shape != x.shape[:-1]:
        raise ValueError(f"weights must be {list(x.shape[:-1])}, one for each row of x, not {list(given.shape)}")
    return batched, given if x.ndim == 3 else given[None]


def normalised(
    xp: ModuleType,
    weight_sum: Array,
    mean: Array,
    moment: Array,
    center: bool,
    correction: float,
    dtype: npt.DTypeLike,
) -> Array:
    """Covariances [B, n, n] from float64 W [B], mean [B, n] and centred moment [B, n, n]."""
    if np.dtype(dtype) not in (np.float64, np.float32):
        raise TypeError(f"dtype must be float64 or float32, not {dtype}")
    smallest = float(weight_sum.min()) if weight_sum.size else np.inf
    if smallest <= correction:
        raise ValueError(f"the sum of weights is {smallest:g}; it must be above correction = {correction}")
    if not center:
        moment = moment + weight_sum[:, None, None] * mean[:, :, None] * mean[:, None, :]
    return (moment / (weight_sum - correction)[:, None, None]).astype(dtype, copy=False)


def _real_numbers(xp: ModuleType, name: str, value: Any, dtype: npt.DTypeLike) -> Array:
    numbers = xp.asarray(value)
    if numbers.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be real numbers, not {numbers.dtype}")
    return numbers.astype(dtype, copy=False)


def _contiguous(xp: ModuleType, array: Array, dtype: npt.DTypeLike) -> Array:
    contiguous = xp.ascontiguousarray(array, dtype=dtype)
    return contiguous if xp is not np else np.require(contiguous, requirements=["A"])


# --------------------------------------------------------------------------------------------------- arguments, NumPy


def _check_array(name: str, value: object, dtypes: tuple[type[np.floating[Any]], ...]) -> None:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, not {type(value).__name__}")
    if value.dtype.type not in dtypes or not value.dtype.isnative:
        expected = ", ".join(np.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{name} must be one of {expected} in native byte order, not {value.dtype.str!r}")


def _checked_covariance(cov: npt.NDArray[Any]) -> npt.NDArray[Any]:
    _check_array("cov", cov, (np.float16, np.float32, np.float64))
    check_covariance_shape(cov.shape)
    return _readable_rows(cov.astype(np.float32) if cov.dtype == np.float16 else cov)


def _matrices(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """a as [B, m, n] with contiguous rows."""
    _check_array("a", a, _MATRIX_DTYPES)
    if a.ndim < 2:
        raise ValueError(f"a must be [..., m, n], not {list(a.shape)}")
    batch = int(np.prod(a.shape[:-2]))
    flat = a.reshape(batch, *a.shape[-2:])
    in_place = flat.flags.aligned and (flat.strides[2] == flat.itemsize or flat.shape[2] == 1)
    return flat if in_place else flat.copy(order="C")


def _finite_matrices(a: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """a [B, m, n] with zeros in place of matrices with NaN or infinity, and which those are [B]; at least float32."""
    wrong = ~np.isfinite(a).all((1, 2))
    finite = np.where(wrong[:, None, None], 0.0, a) if wrong.any() else a
    return finite.astype(np.float64 if a.dtype == np.float64 else np.float32, copy=False), wrong


def _ranks_by_lapack(
    a: npt.NDArray[Any], rtol: npt.NDArray[np.float64], atol: float, hermitian: bool
) -> npt.NDArray[np.int64]:
    """[B, R] from float64 values of a [B, m, n]."""
    finite, wrong = _finite_matrices(a)
    matrices = finite.astype(np.float64)
    values = np.abs(np.linalg.eigvalsh(matrices)) if hermitian else np.linalg.svd(matrices, compute_uv=False)
    threshold = np.maximum(atol, rtol * values.max(1, keepdims=True, initial=0.0))  # [B, R]
    rank = (values[:, None, :] > threshold[:, :, None]).sum(-1)
    return np.where(wrong[:, None], -1, rank)


def _readable_rows(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`a` itself if the kernels read it in place: aligned, rows contiguous and in increasing order; else a copy."""
    row, item = a.strides[-2:]
    in_place = a.flags.aligned and item == a.itemsize and row >= a.shape[-1] * item and row % item == 0
    return a if in_place else a.copy(order="C")
