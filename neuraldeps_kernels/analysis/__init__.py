"""Analyses built on the kernels: which categories of a classifier its other categories express."""

from neuraldeps_kernels.analysis.dependencies import (
    CrossStatistics,
    DependencyReport,
    ErrorCurvePoint,
    LogitStatistics,
    Selection,
    Stability,
    find_dependencies,
)
from neuraldeps_kernels.analysis.graph import DependencyGraph
from neuraldeps_kernels.analysis.model_matrix import ModelMatrix, PairFigures, model_matrix
from neuraldeps_kernels.analysis.substitution import SubstitutionMetrics

__all__ = [
    "CrossStatistics",
    "DependencyGraph",
    "DependencyReport",
    "ErrorCurvePoint",
    "LogitStatistics",
    "ModelMatrix",
    "PairFigures",
    "Selection",
    "Stability",
    "SubstitutionMetrics",
    "find_dependencies",
    "model_matrix",
]
