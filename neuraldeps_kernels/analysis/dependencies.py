"""Neural dependencies: the logit of a category as a sparse linear combination of other logits, within a network or
between two, and how well that holds on samples that were not used to find it.

Notation: f [N, n] logits of the network whose categories are explained, g [N, p] those of the predicting one (g = f
within a network); mu their means; theta [T, p] the coefficients of T targets. The prediction is

    fhat_i = mu_i + sum_j theta_ij (g_j - mu_j) .

Source: sections 2, 3.10, 5 and 9 of the notes on "Neural Dependencies Emerging from Learning Massive Categories"
(arXiv 2211.12339); what the notes mark as ours is ours, such as splitting by group and the least-squares refit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuraldeps_kernels.analysis.fitting import Problem, Sparsity, substitution_metrics
from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.analysis.inputs import (
    CrossStatistics,
    HeldOut,
    LogitStatistics,
    Rows,
    Statistics,
    checked_candidates,
    checked_exclude_same,
    checked_names,
    checked_targets,
    given_samples,
    held_out_mask,
    logits_of_models,
    split_or_given,
)
from neuraldeps_kernels.analysis.report import DependencyReport, ErrorCurvePoint
from neuraldeps_kernels.analysis.selection import Rule, Selection, path_ratios, select_by_held_out
from neuraldeps_kernels.analysis.stability import Stability, resample

__all__ = [
    "CURVE_RATIOS",
    "DEFAULT_LAM_RATIO",
    "CrossStatistics",
    "DependencyReport",
    "ErrorCurvePoint",
    "HeldOut",
    "LogitStatistics",
    "Selection",
    "Stability",
    "find_dependencies",
    "json_text",
]

DEFAULT_LAM_RATIO = 0.1
DEFAULT_LAMBDAS = 20
CURVE_RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


def find_dependencies(
    source: Tensor | nn.Module | LogitStatistics | CrossStatistics,
    class_names: Sequence[str] | None = None,
    lam_ratio: float | Tensor | None = None,
    *,
    lam: float | Tensor | None = None,
    top_k: int | None = None,
    select: Rule | None = None,
    n_lambdas: int | None = None,
    lam_min_ratio: float = 0.01,
    validation: float = 0.25,
    predictors: Tensor | nn.Module | None = None,
    predictor_names: Sequence[str] | None = None,
    loader: Iterable[Any] | None = None,
    targets: Sequence[int] | Tensor | None = None,
    candidates: Tensor | None = None,
    exclude_same: bool | None = None,
    standardize: bool = False,
    nonnegative: bool = False,
    ridge: float = 0.0,
    refit: bool = False,
    held_out: float | Tensor | tuple[Tensor, Tensor] | None = 0.2,
    labels: Sequence[int] | Tensor | None = None,
    groups: Sequence[Any] | Tensor | None = None,
    group_name: str = "group",
    resamples: int = 0,
    seed: int = 0,
    tol: float = 1e-6,
) -> DependencyReport:
    """Finds the categories through which each category of a classifier is expressed; measures how well, held out.

    How many categories a dependency has follows from one of `lam_ratio`, `lam`, `top_k` and `select`.

    Args:
        source: logits before the softmax [N, n]; or a model, run in eval mode over `loader`; or ready statistics.
            Logits may be on any device and are worked on there; what the report holds is on the CPU, but for the
            statistics and the held-out logits.
        class_names: n names, default "0", "1", ...
        lam_ratio: penalty as a fraction of each target's lambda_max, a number or [T]; default 0.1.
        lam: penalty in squared logit units, a number or [T]; see `standardize`.
        top_k: exactly that many categories in every dependency, at the largest penalty that gives as many; there the
            last one has hardly any weight, so that `refit` is advisable.
        select: choose the penalty of every target by its error on samples that the path is not solved from:
            "held_out" the least error, "one_standard_error" the sparsest dependency whose error is at most one
            standard error (over groups) above the least. Those samples are a part of the samples of the fit, not the
            held-out ones that the report is measured on; with ready statistics a part of the given held-out ones,
            which is then not measured on. The dependencies are solved from all samples of the fit.
        n_lambdas: penalties on the path of `select` (default 20) and of the report's error curve (default 8 fixed
            fractions of lambda_max), geometric from lambda_max to lam_min_ratio * lambda_max.
        lam_min_ratio: the last one, as a fraction of lambda_max.
        validation: share of the groups that `select` judges on, in (0, 1).
        predictors: logits [N, p] of a second network on the same samples, or a second model: its categories predict.
        predictor_names: its p names, default `class_names` where p = n.
        loader: for models; yields inputs, or (inputs, ...) with int64 labels [B] as second entry, if any.
        targets: T categories of `source` to explain, each once; default all.
        candidates: bool over the predicting categories, [p] or [T, p]; default all.
        exclude_same: between networks, whether category i of the second may not predict category i of the first;
            default True where p = n. Within a network a category never predicts itself.
        standardize: solve for logits divided by their standard deviations s: the penalty of theta_ij becomes
            lam_i s_j, lam_ratio is a fraction of the lambda_max of that problem, and `lam` counts in units of
            s_i^2. Coefficients are still reported for the logits as they are.
        nonnegative: coefficients >= 0 only; not with `refit`.
        ridge: adds ridge |theta|^2 to the objective, in squared logit units; the refit has it too. Not with
            `standardize`.
        refit: replace the penalised coefficients by least squares on their support, in float64, on the same covariance.
        held_out: share of the groups kept out of the covariance and used to measure, in (0, 1); or held-out logits
            [N', n] (between networks a pair, [N', n] and [N', p]), and all of `source` goes into the covariance; or
            None. With ready statistics there is nothing to split: logits or nothing is held out.
        labels: y of the samples (of the held-out ones where those are given), default the argmax of the unmodified
            network.
        groups: a hashable each for the same samples, such as the picture that a crop is from: a group is never on
            both sides. Default: every sample is one.
        group_name: what a group is, in the singular, for the words of the report.
        resamples: draw the groups of the fit that often with replacement and solve again, at the same fraction of
            lambda_max, `lam` or `top_k`; the report then says how often each predictor comes back with its sign.
            Needs logits.
        seed: of the choice of groups and of the draws.
        tol: KKT violation allowed, relative to lambda_max / 2.

    Raises:
        ValueError, TypeError: naming the argument, for shapes that do not fit, NaN, too few samples or groups, more
            than one of `lam`, `lam_ratio`, `top_k` and `select`, targets out of range or repeated; and as `covlasso`
            does.
    """
    _check_options(lam, lam_ratio, top_k, select, standardize, nonnegative, ridge, refit, resamples)
    if isinstance(source, nn.Module):
        source, predictors, loaded_labels = logits_of_models(source, predictors, loader)
        labels = loaded_labels if labels is None else labels
    elif loader is not None or isinstance(predictors, nn.Module):
        raise ValueError("loader and a model as predictors need a model as source")
    rows = None
    if isinstance(source, (LogitStatistics, CrossStatistics)):
        statistics = _given_statistics(source, predictors, resamples)
        evaluation = given_samples(statistics.sizes, held_out, labels, groups, group_name)
    else:
        rows, evaluation = split_or_given(source, predictors, held_out, labels, groups, group_name, seed)
        statistics = rows.statistics()
    if statistics.sizes[0] < 2:
        raise ValueError(f"source must have at least 2 categories, got {statistics.sizes[0]}")
    names = _names(class_names, predictor_names, statistics.sizes)
    problem = _problem(statistics, targets, candidates, exclude_same, standardize, nonnegative, ridge, tol)
    selection = None
    if select is not None:
        judged, judges, evaluation = _validation(statistics, rows, evaluation, validation, seed)
        ratios = path_ratios(DEFAULT_LAMBDAS if n_lambdas is None else n_lambdas, lam_min_ratio)
        selection = select_by_held_out(problem, judged, judges, select, ratios, refit=refit)
    sparsity = _sparsity(problem, lam, lam_ratio, top_k, selection, standardize)
    penalised = problem.solve(sparsity)
    stability = None
    if rows is not None and resamples:
        stability = resample(rows, problem, sparsity, penalised, resamples, seed)
    fit = problem.refit(penalised) if refit else penalised
    return DependencyReport(
        statistics=statistics,
        class_names=names[0],
        predictor_names=names[1],
        targets=problem.targets,
        coefficients=fit.coefficients,
        residual_ratio_fit=fit.residual_ratio,
        lam=fit.lam,
        lambda_max=fit.lambda_max,
        status=fit.status,
        refit=refit,
        standardize=standardize,
        held_out=evaluation,
        metrics=None
        if evaluation is None
        else substitution_metrics(statistics, fit.coefficients, problem.targets, evaluation),
        selection=selection,
        stability=stability,
        group_name=group_name if groups is not None else "sample",
        curve_ratios=CURVE_RATIOS if n_lambdas is None else tuple(path_ratios(n_lambdas, lam_min_ratio).tolist()),
        sparsity=sparsity,
        problem=problem,
    )


def _check_options(
    lam: object,
    lam_ratio: object,
    top_k: int | None,
    select: str | None,
    standardize: bool,
    nonnegative: bool,
    ridge: float,
    refit: bool,
    resamples: int,
) -> None:
    """Raises where options contradict each other."""
    given = {"lam": lam, "lam_ratio": lam_ratio, "top_k": top_k, "select": select}
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise ValueError(f"{several[0]} and {several[1]} must not both be given")
    if refit and nonnegative:
        raise ValueError("refit must be False with nonnegative: least squares could make coefficients negative")
    if ridge and standardize:
        raise ValueError(f"ridge must be 0 with standardize, got {ridge}")
    if resamples < 0:
        raise ValueError(f"resamples must not be negative, got {resamples}")


def _given_statistics(
    source: LogitStatistics | CrossStatistics, predictors: object, resamples: int
) -> LogitStatistics | CrossStatistics:
    """`source`, the joint statistics of two networks as those that explaining the first takes."""
    if predictors is not None:
        raise ValueError("predictors must be None where source is ready statistics; give those of both networks")
    if resamples:
        raise ValueError("resamples needs logits as source: statistics cannot be drawn again")
    return source.between() if isinstance(source, LogitStatistics) and len(source.sizes) == 2 else source


def _names(
    class_names: Sequence[str] | None, predictor_names: Sequence[str] | None, sizes: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the explained and of the predicting categories."""
    names = checked_names("class_names", class_names, sizes[0])
    if len(sizes) == 1:
        if predictor_names is not None:
            raise ValueError("predictor_names must be None within one network; it has class_names")
        return names, names
    if predictor_names is None and sizes[1] == sizes[0]:
        return names, names
    return names, checked_names("predictor_names", predictor_names, sizes[1])


def _problem(
    statistics: Statistics,
    targets: Sequence[int] | Tensor | None,
    candidates: Tensor | None,
    exclude_same: bool | None,
    standardize: bool,
    nonnegative: bool,
    ridge: float,
    tol: float,
) -> Problem:
    """With `standardize` penalties are in proportion to the predictors' deviations, and constant ones are left out."""
    indices = checked_targets(targets, statistics.sizes[0])
    spread = statistics.predictor_cov.diagonal().clamp_min(0).sqrt()
    usable = spread > 0 if standardize else torch.ones_like(spread, dtype=torch.bool)
    return Problem(
        statistics=statistics,
        exclude_same=checked_exclude_same(exclude_same, statistics.sizes),
        targets=indices,
        candidates=checked_candidates(candidates, len(indices), usable),
        penalty_factors=torch.where(usable, spread, 1.0) if standardize else None,
        nonnegative=nonnegative,
        ridge=ridge,
        tol=tol,
    )


def _validation(
    statistics: Statistics, rows: Rows | None, evaluation: HeldOut | None, share: float, seed: int
) -> tuple[Statistics, Rows, HeldOut | None]:
    """What paths are solved on, what judges their points, and what is left to measure the report on.

    The judging groups are a share of those of the fit; with ready statistics, of the held-out ones.
    """
    if rows is not None:
        mask = held_out_mask(rows.groups, share, seed, "validation")
        fitted = rows.part(~mask)
        if len(fitted) < 2:
            raise ValueError(f"validation = {share} leaves fewer than 2 of {len(rows)} samples for the path")
        return fitted.statistics(), rows.part(mask), evaluation
    if evaluation is None:
        raise ValueError("select needs samples to judge on: held_out must be logits where source is statistics")
    mask = held_out_mask(evaluation.groups, share, seed, "validation")
    return statistics, evaluation.part(mask), evaluation.without(mask)


def _sparsity(
    problem: Problem,
    lam: float | Tensor | None,
    lam_ratio: float | Tensor | None,
    top_k: int | None,
    selection: Selection | None,
    standardize: bool,
) -> Sparsity:
    """The one way of the four that was asked for; `lam` counts in units of the target's deviation if standardized."""
    if selection is not None:
        return Sparsity(lam_ratio=selection.lam_ratio)
    if top_k is not None:
        return Sparsity(top_k=top_k)
    if lam is None:
        return Sparsity(lam_ratio=DEFAULT_LAM_RATIO if lam_ratio is None else lam_ratio)
    if not standardize:
        return Sparsity(lam=lam)
    spread = problem.statistics.variance.clamp_min(0).sqrt().cpu()[problem.targets]
    absolute = torch.as_tensor(lam, dtype=torch.float64, device="cpu")
    return Sparsity(lam=absolute * torch.where(spread > 0, spread, 1.0))
