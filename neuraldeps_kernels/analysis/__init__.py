"""Analyses built on the kernels: which categories of a classifier its other categories express."""

from neuraldeps_kernels.analysis.dependencies import (
    DependencyReport,
    ErrorCurvePoint,
    LogitStatistics,
    find_dependencies,
)
from neuraldeps_kernels.analysis.substitution import SubstitutionMetrics

__all__ = ["DependencyReport", "ErrorCurvePoint", "LogitStatistics", "SubstitutionMetrics", "find_dependencies"]
