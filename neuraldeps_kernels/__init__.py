"""Dependency-aware neural networks: kernels as torch operators and the analyses built on them.

`import neuraldeps_kernels as nk` registers `torch.ops.neuraldeps.*`. The submodules `analysis`, `arrays` (NumPy),
`data`, `distributed`, `distributed_retrieval`, `losses`, `models`, `nn`, `profiling` and `reference` are loaded at
their first use, `cupy` when it is imported.
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

from neuraldeps_kernels.ops.chunked_retrieval import (  # noqa: E402  needs the operators
    k_reciprocal_rerank_chunked,
    knn_chunked,
)
from neuraldeps_kernels.ops.closed_form_discriminator import (  # noqa: E402  needs the operators
    closed_form_discriminator,
    effective_sample_size,
)
from neuraldeps_kernels.ops.covariance import (  # noqa: E402  needs the operators
    CovarianceAccumulator,
    CrossCovariance,
    CrossCovarianceAccumulator,
    covariance,
    cross_covariance,
)
from neuraldeps_kernels.ops.covlasso import (  # noqa: E402  needs the operators
    CovLassoPath,
    CovLassoSolution,
    covlasso,
    covlasso_path,
    covlasso_top_k,
    lambda_max,
)
from neuraldeps_kernels.ops.distillation_kl import distillation_kl  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.domain_norm import (  # noqa: E402  needs the operators
    centred_affine,
    domain_batch_norm,
    instance_moments,
    normalize,
)
from neuraldeps_kernels.ops.factored import FactoredCovariance  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.fourier_filter import fourier_filter2d  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.gnn_rerank import gnn_rerank  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.pose_weighted_pool import pose_weighted_pool  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.projected_step import projected_step  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.query_expansion import (  # noqa: E402  needs the operators
    alpha_query_expansion,
    database_augmentation,
    expanded_neighbors_rerank,
)
from neuraldeps_kernels.ops.queue_contrast import (  # noqa: E402  needs the operators
    enqueue,
    momentum_update,
    queue_contrast,
)
from neuraldeps_kernels.ops.region_mixup import region_mixup  # noqa: E402  needs the operators
from neuraldeps_kernels.ops.retrieval import (  # noqa: E402  needs the operators
    jaccard_distance,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_neighbors,
    knn,
)
from neuraldeps_kernels.ops.retrieval_metrics import (  # noqa: E402  needs the operators
    RetrievalMetrics,
    retrieval_metrics,
    retrieval_metrics_from_features,
)
from neuraldeps_kernels.ops.spectrum import (  # noqa: E402  needs the operators
    effective_rank,
    low_rank_project,
    matrix_rank,
    principal_directions,
    stable_rank,
    svdvals,
)

_LAZY_SUBMODULES = (
    "analysis",
    "arrays",
    "data",
    "distributed",
    "distributed_retrieval",
    "losses",
    "models",
    "nn",
    "profiling",
    "reference",
)

__all__ = [
    "CovLassoPath",
    "CovLassoSolution",
    "CovarianceAccumulator",
    "CrossCovariance",
    "CrossCovarianceAccumulator",
    "FactoredCovariance",
    "RetrievalMetrics",
    "__version__",
    "alpha_query_expansion",
    "centred_affine",
    "closed_form_discriminator",
    "covariance",
    "covlasso",
    "covlasso_path",
    "covlasso_top_k",
    "cross_covariance",
    "database_augmentation",
    "distillation_kl",
    "domain_batch_norm",
    "effective_rank",
    "effective_sample_size",
    "enqueue",
    "expanded_neighbors_rerank",
    "fourier_filter2d",
    "gnn_rerank",
    "instance_moments",
    "jaccard_distance",
    "k_reciprocal_rerank",
    "k_reciprocal_rerank_chunked",
    "k_reciprocal_rerank_from_neighbors",
    "knn",
    "knn_chunked",
    "lambda_max",
    "low_rank_project",
    "matrix_rank",
    "momentum_update",
    "normalize",
    "pose_weighted_pool",
    "principal_directions",
    "projected_step",
    "queue_contrast",
    "region_mixup",
    "retrieval_metrics",
    "retrieval_metrics_from_features",
    "stable_rank",
    "svdvals",
]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_SUBMODULES})
