"""Dependency-aware neural networks: kernels as torch operators and the analyses built on them.

`import neuraldeps_kernels as nk` registers `torch.ops.neuraldeps.*`. The submodules `analysis`, `arrays` (NumPy),
`data`, `profiling` and `reference` are loaded at their first use, `cupy` when it is imported.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

__version__ = "0.1.0"

_OPS_LIBRARY = Path(__file__).parent / "_lib" / "libneuraldeps_ops.so"
if not _OPS_LIBRARY.is_file():
    raise ImportError(
        f"neuraldeps_kernels is not built: {_OPS_LIBRARY} is missing; run `make build` or `pip install .`"
    )
torch.ops.load_library(_OPS_LIBRARY)
torch.ops.neuraldeps.cpu_levels()  # raises ValueError here, not at the first kernel, if NEURALDEPS_CPU_LEVEL is wrong

from neuraldeps_kernels.ops.covariance import CovarianceAccumulator, covariance  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.covlasso import CovLassoSolution, covlasso, lambda_max  # noqa: E402  needs the operators

_LAZY_SUBMODULES = ("analysis", "arrays", "data", "profiling", "reference")

__all__ = ["CovLassoSolution", "CovarianceAccumulator", "__version__", "covariance", "covlasso", "lambda_max"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_SUBMODULES})
