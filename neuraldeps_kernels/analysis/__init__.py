"""Analyses built on the kernels: which categories of a classifier its other categories express, and uses of that."""

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
from neuraldeps_kernels.analysis.unseen_categories import (
    Accuracy,
    Outputs,
    UnseenCategoriesReport,
    unseen_categories,
)

__all__ = [
    "Accuracy",
    "CrossStatistics",
    "DependencyGraph",
    "DependencyReport",
    "ErrorCurvePoint",
    "LogitStatistics",
    "ModelMatrix",
    "Outputs",
    "PairFigures",
    "Selection",
    "Stability",
    "SubstitutionMetrics",
    "UnseenCategoriesReport",
    "find_dependencies",
    "model_matrix",
    "unseen_categories",
]
