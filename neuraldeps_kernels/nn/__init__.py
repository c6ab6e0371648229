"""Modules (`torch.nn.Module`) on the operators of the package, each loaded from its file at its first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DomainBatchNorm1d": "domain_norm",
    "DomainBatchNorm2d": "domain_norm",
    "DomainBatchNorm3d": "domain_norm",
    "SyncDomainBatchNorm2d": "domain_norm",
    "domain_context": "domain_norm",
    "CalibratedBatchNorm1d": "calibrated_norm",
    "CalibratedBatchNorm2d": "calibrated_norm",
    "CalibratedInstanceNorm2d": "calibrated_norm",
    "BatchNormPaths": "gaussian_process_norm",
    "DomainCoordinates": "gaussian_process_norm",
    "GaussianProcessBatchNorm1d": "gaussian_process_norm",
    "GaussianProcessBatchNorm2d": "gaussian_process_norm",
    "RegressionPaths": "gaussian_process_norm",
    "batch_norm_paths": "gaussian_process_norm",
    "path_coefficients": "gaussian_process_norm",
    "path_context": "gaussian_process_norm",
    "regression_coefficients": "gaussian_process_norm",
    "sample_coordinates": "gaussian_process_norm",
    "DecomposedConv2d": "decomposed_conv",
    "decompose_convolutions": "decomposed_conv",
    "modality_context": "decomposed_conv",
    "convert_domain_batch_norm": "conversion",
    "export_batch_norm": "conversion",
    "fuse_domain_batch_norm": "conversion",
    "FourierFilter2d": "fourier_filter",
    "resize_filter": "fourier_filter",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
