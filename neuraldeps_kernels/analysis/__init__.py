"""Analyses built on the kernels: which categories of a classifier its others express; rank from layer to layer."""

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
from neuraldeps_kernels.analysis.independence_deficit import (
    CategoryDeficit,
    IndependenceDeficit,
    ReplacedLogit,
    independence_deficit,
)
from neuraldeps_kernels.analysis.model_matrix import ModelMatrix, PairFigures, model_matrix
from neuraldeps_kernels.analysis.rank_profile import (
    ClassificationDimension,
    JacobianRanks,
    PcaDimensions,
    RankProfile,
    Rise,
    classification_dimension,
    rank_profile,
)
from neuraldeps_kernels.analysis.substitution import SubstitutionMetrics
from neuraldeps_kernels.analysis.unseen_categories import (
    Accuracy,
    Outputs,
    UnseenCategoriesReport,
    unseen_categories,
)

__all__ = [
    "Accuracy",
    "CategoryDeficit",
    "ClassificationDimension",
    "CrossStatistics",
    "DependencyGraph",
    "DependencyReport",
    "ErrorCurvePoint",
    "IndependenceDeficit",
    "JacobianRanks",
    "LogitStatistics",
    "ModelMatrix",
    "Outputs",
    "PairFigures",
    "PcaDimensions",
    "RankProfile",
    "ReplacedLogit",
    "Rise",
    "Selection",
    "Stability",
    "SubstitutionMetrics",
    "UnseenCategoriesReport",
    "classification_dimension",
    "find_dependencies",
    "independence_deficit",
    "model_matrix",
    "rank_profile",
    "unseen_categories",
]
