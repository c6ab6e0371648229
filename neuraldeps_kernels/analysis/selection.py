"""The sparsity of every dependency, chosen by the error on samples that its path was not solved from.

The path of a target is solved on the samples of the fit but the validation groups, at L penalties from lambda_max down;
residual / variance on the validation groups then tells which penalty to take. Source: our choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from neuraldeps_kernels.analysis.fitting import Problem, residual_ratio_and_error
from neuraldeps_kernels.analysis.inputs import Rows, Statistics

Rule = Literal["held_out", "one_standard_error"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True, eq=False)
class Selection:
    """What the choice of a penalty for each of T targets was made from."""

    rule: Rule
    ratios: Tensor  # float64 [L], falling: penalty / lambda_max
    error: Tensor  # float64 [T, L]: residual / variance on the validation samples; NaN for a constant target
    standard_error: Tensor  # float64 [T, L], over the validation groups
    chosen: Tensor  # int64 [T], index into ratios
    samples: int  # of validation
    groups: int

    @property
    def lam_ratio(self) -> Tensor:
        """The chosen penalty / lambda_max, float64 [T]."""
        return self.ratios[self.chosen]


def path_ratios(n_lambdas: int, lam_min_ratio: float) -> Tensor:
    """float64 [L]: L penalties / lambda_max, geometric from 1 down to lam_min_ratio."""
    if n_lambdas < 2:
        raise ValueError(f"n_lambdas must be at least 2, got {n_lambdas}")
    if not 0 < lam_min_ratio < 1:
        raise ValueError(f"lam_min_ratio must be between 0 and 1, got {lam_min_ratio}")
    return torch.logspace(0, math.log10(lam_min_ratio), n_lambdas, dtype=torch.float64, device="cpu")


def select_by_held_out(
    problem: Problem, statistics: Statistics, validation: Rows, rule: Rule, ratios: Tensor, *, refit: bool
) -> Selection:
    """Solves the path of every target of `problem` on `statistics` and judges each point on `validation`.

    "held_out" takes the least error, "one_standard_error" the largest penalty whose error exceeds the least by at most
    the standard error of that one.
    """
    if rule not in RULES:
        raise ValueError(f"select must be one of {', '.join(RULES)} or None, got {rule!r}")
    if rule == "one_standard_error" and validation.num_groups < 2:
        raise ValueError("select = one_standard_error needs at least 2 groups of validation samples, got 1")
    errors, deviations = [], []
    for fit in problem.path(ratios, statistics.solvable):
        shown = problem.refit(fit, statistics) if refit else fit
        error, deviation = residual_ratio_and_error(statistics, shown.coefficients, problem.targets, validation)
        errors.append(error)
        deviations.append(deviation)
    error, deviation = torch.stack(errors, 1), torch.stack(deviations, 1)
    return Selection(
        rule, ratios, error, deviation, chosen(error, deviation, rule), len(validation), validation.num_groups
    )


def chosen(error: Tensor, standard_error: Tensor, rule: Rule) -> Tensor:
    """Index of the penalty that `rule` takes from error and standard_error [T, L], falling penalties: int64 [T].

    The first, without any predictor, for a target without known errors.
    """
    known = error.nan_to_num(nan=math.inf)
    least, best = known.min(1)
    if rule == "held_out":
        return best
    limit = least + standard_error.nan_to_num(nan=0.0).gather(1, best[:, None])[:, 0]
    return (known <= limit[:, None]).int().argmax(1)  # the first of the largest
