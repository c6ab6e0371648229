"""Covariance and CovLasso of CuPy arrays; `neuraldeps_kernels.arrays` is the same for NumPy arrays.

    from neuraldeps_kernels import cupy as ndc
    solution = ndc.covlasso(ndc.covariance(logits), lam_ratio=0.1)       # coefficients: cupyx csr_matrix [T, n]

covlasso runs the CUDA kernel of libneuraldeps_cuda.so on CuPy's current device and stream; arrays never pass through
torch. Arrays of other libraries with `__cuda_array_interface__` are taken as `cupy.asarray` takes them, which waits for
the stream they name. covariance and lambda_max are CuPy's own operations: the Triton kernel for covariances belongs to
torch, and centred float64 matrix products take its place.

As in the torch operators the values of a covariance are not checked on a GPU: NaN comes back with a status other than
converged.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import cupy as cp
    from cupyx.scipy import sparse
except ImportError as error:
    raise ImportError(
        f"neuraldeps_kernels.cupy needs CuPy ({error}); install it with `pip install neuraldeps_kernels[cupy]`"
    ) from error

from neuraldeps_kernels import _native
from neuraldeps_kernels.arrays import (
    STATUS_NAMES,
    Array,
    CovLassoArrays,
    Values,
    batched_rows,
    check_covariance_shape,
    check_penalty_choice,
    checked_targets,
    default_pivots,
    normalised,
    penalty,
    per_target,
    solution,
)
from neuraldeps_kernels.profiling import annotated

__all__ = ["STATUS_NAMES", "CovLassoArrays", "covariance", "covlasso", "lambda_max"]

CUDA_LIBRARY = Path(__file__).parent / "_lib" / "libneuraldeps_cuda.so"
_CHUNK = 1 << 24  # padded coefficients held at once


@annotated
def covariance(
    x: Array,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Any = None,
    dtype: npt.DTypeLike = np.float64,
) -> Array:
    """Covariance matrix of the columns of `x` in float64, by CuPy's matrix product of the centred rows.

    Arguments, result and errors as `neuraldeps_kernels.arrays.covariance`, except that NaN and infinity in `x` come
    back as they are.
    """
    rows = _device_array("x", x, (np.float16, np.float32, np.float64))
    batched, w = batched_rows(cp, rows, weights, correction)
    batched = batched.astype(np.float64)
    if w is None:
        w = cp.ones(batched.shape[:2])
    elif not bool(((w >= 0) & cp.isfinite(w)).all()):
        raise ValueError("weights must be finite and not negative")
    weight_sum = w.sum(axis=1)
    batched = cp.where((w != 0)[..., None], batched, 0.0)
    mean = (w[..., None] * batched).sum(axis=1) / cp.where(weight_sum > 0, weight_sum, 1.0)[:, None]
    deviation = batched - mean[:, None]
    moment = deviation.swapaxes(1, 2) @ (w[..., None] * deviation)
    moment = (moment + moment.swapaxes(1, 2)) / 2
    result = normalised(cp, weight_sum, mean, moment, center, correction, dtype)
    return result if rows.ndim == 3 else result[0]


@annotated
def lambda_max(cov: Array, targets: Any = None, *, candidates: Any = None, penalty_factors: Any = None) -> Array:
    """The smallest penalty [T] of each target without any coefficient; arguments and errors as `covlasso`."""
    cov = _checked_covariance(cov)
    indices = checked_targets(cp, targets, cov.shape[0])
    return _lambda_max(cov, indices, penalty(cp, cov, len(indices), candidates, penalty_factors))


@annotated
def covlasso(
    cov: Array,
    lam: Values | Array | None = None,
    *,
    lam_ratio: Values | Array | None = None,
    targets: Any = None,
    candidates: Any = None,
    penalty_factors: Any = None,
    tol: float = 1e-6,
    max_pivots: int | None = None,
) -> CovLassoArrays:
    """Solves CovLasso for many targets from one covariance; `neuraldeps_kernels.covlasso` for CuPy arrays.

    Args:
        cov: [n, n] float32 or float64 on the current device, any strides; float16 is computed in float32.
        lam, lam_ratio, targets, candidates, penalty_factors, tol, max_pivots: as in `neuraldeps_kernels.covlasso`, as
            numbers, sequences, NumPy or CuPy arrays.

    Returns:
        CovLassoArrays of CuPy arrays and a cupyx.scipy.sparse.csr_matrix. The number of nonzeros depends on the data,
        so the call waits for the result.

    Raises:
        ValueError, TypeError: as `neuraldeps_kernels.covlasso`, but for the values of `cov`.
        ImportError: the package was built without CUDA kernels.
        RuntimeError: CUDA refused the launch.
    """
    cov = _checked_covariance(cov)
    n, indices = cov.shape[0], checked_targets(cp, targets, cov.shape[0])
    check_penalty_choice(lam, lam_ratio)
    factors = penalty(cp, cov, len(indices), candidates, penalty_factors)
    if lam_ratio is None:
        lams = per_target(cp, "lam", lam, len(indices))
    else:
        lams = per_target(cp, "lam_ratio", lam_ratio, len(indices)) * _lambda_max(cov, indices, factors)
    pivots = default_pivots(n) if max_pivots is None else max_pivots

    packed = cp.zeros((n, _native.leading_dimension(n, cov.dtype.itemsize)), dtype=cov.dtype)
    packed[:, :n] = cov
    chunk = max(64, _CHUNK // n)
    parts = []
    for first in range(0, max(len(indices), 1), chunk):
        rows = slice(first, first + chunk)
        row_factors = factors if factors is None or factors.ndim == 1 else factors[rows]
        parts.append(_solve(packed, n, indices[rows], lams[rows], row_factors, tol, pivots))
    column, value, count, info = (cp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    count = count.astype(np.int64)
    indptr = cp.concatenate([cp.zeros(1, dtype=np.int64), cp.cumsum(count)])
    coefficients = sparse.csr_matrix((value, column, indptr), shape=(len(indices), n))
    return solution(cp, cov, indices, lams, coefficients, count, info)


def _solve(
    packed: Array, n: int, targets: Array, lam: Array, factors: Array | None, tol: float, max_pivots: int
) -> tuple[Array, Array, Array, Array]:
    """Column [nnz], value [nnz], count [T] and info [T, 6] of a chunk of targets."""
    num_targets, capacity = len(targets), max(n - 1, 1)
    value = cp.empty((num_targets, capacity), dtype=packed.dtype)
    index = cp.empty((num_targets, capacity), dtype=np.int32)
    count = cp.empty(num_targets, dtype=np.int32)
    info = cp.empty((num_targets, 6), dtype=np.float64)
    library = cuda_library(str(CUDA_LIBRARY))
    workspace = cp.empty(library.covlasso_workspace(n, num_targets, packed.dtype.name), dtype=np.uint8)
    stream = cp.cuda.get_current_stream().ptr
    library.covlasso(packed, n, targets, lam, factors, tol, max_pivots, value, index, count, info, workspace, stream)
    inside = cp.arange(capacity) < count[:, None]
    return index[inside], value[inside], count, info


@functools.cache
def cuda_library(path: str) -> _native.CudaLibrary:
    """The CUDA kernels in the file `path`, opened once."""
    if not Path(path).is_file():
        raise ImportError(
            "neuraldeps_kernels was built without CUDA kernels; rebuild it with NEURALDEPS_CUDA=1 and the CUDA toolkit"
        )
    return _native.CudaLibrary(path)


def _lambda_max(cov: Array, targets: Array, factors: Array | None) -> Array:
    strength = cp.abs(cov[targets])
    if factors is not None:
        strength = strength / factors
    strength[cp.arange(len(targets)), targets] = 0
    return 2.0 * strength.max(axis=1).astype(np.float64)


def _device_array(name: str, value: Any, dtypes: tuple[type[np.floating[Any]], ...]) -> Array:
    if not hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{name} must be a CuPy array or have __cuda_array_interface__, not be {type(value).__name__}")
    array = cp.asarray(value)
    if array.dtype.type not in dtypes:
        expected = ", ".join(np.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{name} must be one of {expected}, not {array.dtype}")
    return array


def _checked_covariance(cov: Any) -> Array:
    array = _device_array("cov", cov, (np.float16, np.float32, np.float64))
    check_covariance_shape(array.shape)
    return array.astype(np.float32) if array.dtype == np.float16 else array
