from typing import Any

import numpy as np
import numpy.typing as npt

_Float64s = npt.NDArray[np.float64]

def cpu_levels() -> tuple[str, str, str]: ...
def leading_dimension(n: int, bytes_per_value: int) -> int: ...
def covlasso(
    cov: npt.NDArray[np.floating[Any]],
    targets: npt.NDArray[np.int64],
    lam: _Float64s,
    penalty: npt.NDArray[np.floating[Any]] | None = None,
    tol: float = 1e-6,
    max_pivots: int = 100_000,
    threads: int = 1,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.floating[Any]], _Float64s]: ...
def lambda_max(
    cov: npt.NDArray[np.floating[Any]],
    targets: npt.NDArray[np.int64],
    penalty: npt.NDArray[np.floating[Any]] | None = None,
    threads: int = 1,
) -> _Float64s: ...
def centered_moments(
    x: npt.NDArray[np.floating[Any]], weights: _Float64s | None = None, threads: int = 1
) -> tuple[_Float64s, _Float64s, _Float64s]: ...
def svdvals(a: npt.NDArray[np.floating[Any]], threads: int = 1) -> npt.NDArray[np.floating[Any]] | None: ...
def matrix_rank(
    a: npt.NDArray[np.floating[Any]], rtol: _Float64s, atol: float = 0.0, hermitian: bool = False, threads: int = 1
) -> npt.NDArray[np.int64] | None: ...
def singular_basis(a: npt.NDArray[np.floating[Any]], threads: int = 1) -> tuple[_Float64s, _Float64s]: ...

class CudaLibrary:
    def __init__(self, path: str) -> None: ...
    def covlasso_workspace(self, n: int, num_targets: int, dtype: str) -> int: ...
    def covlasso(
        self,
        cov: Any,
        n: int,
        targets: Any,
        lam: Any,
        penalty: Any,
        tol: float,
        max_pivots: int,
        value: Any,
        index: Any,
        count: Any,
        info: Any,
        workspace: Any,
        stream: int,
    ) -> None: ...
