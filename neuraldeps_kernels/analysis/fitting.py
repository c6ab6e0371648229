"""Solving for dependencies, least squares on their supports, predicting with them and measuring that on samples.

Notation: theta [T, p] the coefficients of T targets, sparse CSR on the CPU; mu the means of the statistics; f, g the
logits of the explained and the predicting network (g = f within one network). The prediction is

    fhat_i = mu_i + sum_j theta_ij (g_j - mu_j) .
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.analysis.inputs import HeldOut, Rows, Statistics
from neuraldeps_kernels.analysis.substitution import SubstitutionMetrics
from neuraldeps_kernels.ops.covariance import CrossCovariance
from neuraldeps_kernels.ops.covlasso import CovLassoSolution, covlasso, covlasso_path, covlasso_top_k, lambda_max

CHUNK_TARGETS = 256  # predictions held at once: [N, 256]
BOOTSTRAP_DRAWS = 400


@dataclass(frozen=True)
class Sparsity:
    """How many categories a dependency has: by the penalty, absolute or over lambda_max, or by their number."""

    lam: Tensor | float | None = None
    lam_ratio: Tensor | float | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class Fit:
    """Dependencies of T targets; everything on the CPU."""

    coefficients: Tensor  # theta, sparse CSR [T, p]
    residual_ratio: Tensor  # float64 [T], on the covariance itself
    lam: Tensor  # float64 [T]
    lambda_max: Tensor  # float64 [T]
    status: Tensor  # int64 [T], index into ops.covlasso.STATUS_NAMES

    @classmethod
    def of(cls, solution: CovLassoSolution) -> Fit:
        """Without what only the solver's certificate needs."""
        fields = (solution.relative_error, solution.lam, solution.lambda_max, solution.status)
        return cls(solution.coefficients.cpu(), *(field.cpu() for field in fields))


@dataclass(frozen=True)
class Problem:
    """What is asked: which targets from which categories under which constraints; solved at any sparsity."""

    statistics: Statistics
    exclude_same: bool
    targets: Tensor  # int64 [T] on the CPU
    candidates: Tensor | None  # bool [p] or [T, p]
    penalty_factors: Tensor | None  # [p]
    nonnegative: bool
    ridge: float
    tol: float

    def solve(self, sparsity: Sparsity, solvable: Tensor | CrossCovariance | None = None) -> Fit:
        """The CovLasso coefficients, from `solvable` instead of the covariance of `statistics` if given."""
        cov = self._solvable(solvable)
        options = {**self._restrictions(cov), "ridge": self.ridge, "tol": self.tol}
        if sparsity.top_k is not None:
            return Fit.of(covlasso_top_k(cov, sparsity.top_k, **options))
        lam, lam_ratio = (_on(device_of(cov), value) for value in (sparsity.lam, sparsity.lam_ratio))
        return Fit.of(covlasso(cov, lam, lam_ratio=lam_ratio, **options))

    def path(self, ratios: Tensor, solvable: Tensor | CrossCovariance | None = None) -> list[Fit]:
        """The coefficients at the penalties `ratios` [L] of lambda_max, falling."""
        cov = self._solvable(solvable)
        restrictions = self._restrictions(cov)
        top = lambda_max(cov, **restrictions)
        top = torch.where(top > 0, top, 1.0)  # any penalty, where nothing correlates
        path = covlasso_path(cov, lams=top[:, None] * ratios.to(top), ridge=self.ridge, tol=self.tol, **restrictions)
        return [Fit.of(path[index]) for index in range(len(ratios))]

    def refit(self, fit: Fit, statistics: Statistics | None = None) -> Fit:
        """Least squares (with the ridge) on the supports of `fit`, from other `statistics` if given."""
        statistics = self.statistics if statistics is None else statistics
        theta, err2 = _least_squares(statistics, fit.coefficients, self.targets, self.ridge)
        variance = statistics.variance.cpu()[self.targets]
        return replace(fit, coefficients=theta, residual_ratio=torch.where(variance > 0, err2 / variance, 0.0))

    def _solvable(self, solvable: Tensor | CrossCovariance | None) -> Tensor | CrossCovariance:
        cov = self.statistics.solvable if solvable is None else solvable
        return replace(cov, exclude_same=self.exclude_same) if isinstance(cov, CrossCovariance) else cov

    def _restrictions(self, cov: Tensor | CrossCovariance) -> dict[str, Any]:
        device = device_of(cov)
        return {
            "targets": self.targets.to(device),
            "candidates": _on(device, self.candidates),
            "penalty_factors": _on(device, self.penalty_factors),
            "nonnegative": self.nonnegative,
        }


def device_of(cov: Tensor | CrossCovariance) -> torch.device:
    """Where a problem is solved."""
    return cov.cov.device if isinstance(cov, CrossCovariance) else cov.device


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------ least squares


def _least_squares(
    statistics: Statistics, coefficients: Tensor, targets: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """On the support a of each target theta_a = (S_aa + ridge)^+ c_a: float64 sparse CSR [T, p], and err2 [T].

    Thousands of small factorisations: on the CPU, whatever the device of the statistics.
    """
    S, cross, variance = statistics.predictor_cov.cpu(), statistics.cross.cpu(), statistics.variance.cpu()
    crow = coefficients.crow_indices()
    values, err2 = [], []
    with _one_thread():
        for i, a in zip(targets.tolist(), coefficients.col_indices().tensor_split(crow[1:-1]), strict=True):
            A, c = S[a[:, None], a].double(), cross[i, a].double()
            theta = _solve_positive(A + ridge * torch.eye(len(a), dtype=A.dtype, device="cpu"), c)
            values.append(theta)
            err2.append(variance[i] - 2 * c @ theta + theta @ A @ theta)
    refitted = torch.sparse_csr_tensor(
        crow, coefficients.col_indices(), torch.cat(values), coefficients.shape, device="cpu", check_invariants=False
    )
    return refitted, torch.stack(err2).clamp_min(0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of small factorisations: threads started for each cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _solve_positive(A: Tensor, c: Tensor) -> Tensor:
    """A^+ c for A symmetric positive semidefinite [k, k]: by Cholesky, or the pseudoinverse where A is singular."""
    factor, failed = torch.linalg.cholesky_ex(A)
    diagonal = factor.diagonal()
    if len(A) and (failed or diagonal.min() <= 1e-7 * A.diagonal().max().sqrt()):
        inverse: Tensor = torch.linalg.pinv(A, rtol=1e-12, hermitian=True)
        return inverse @ c
    return torch.cholesky_solve(c[:, None], factor)[:, 0]


# ------------------------------------------------------------------------------------------------ predictions


def dense_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 [t] of a sparse CSR matrix [T, p] as a dense one [t, p]."""
    crow, count = coefficients.crow_indices(), coefficients.crow_indices().diff()[rows]
    position = entries_of(coefficients, rows)
    dense = coefficients.values().new_zeros(len(rows), coefficients.shape[1])
    out = torch.arange(len(rows), device=crow.device).repeat_interleave(count)
    dense[out, coefficients.col_indices()[position]] = coefficients.values()[position]
    return dense


def entries_of(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Positions of all entries of `rows` among the values of a sparse CSR matrix, row by row."""
    crow = coefficients.crow_indices()
    count = crow.diff()[rows]
    shift = crow[rows] - (count.cumsum(0) - count)
    return shift.repeat_interleave(count) + torch.arange(int(count.sum()), device=crow.device)


def predict(statistics: Statistics, theta: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
    """fhat float64 [N, T] of targets [T] with dense coefficients [T, p] from predicting logits [N, p]."""
    device = logits.device
    centred = logits.double() - statistics.predictor_mean.to(device).double()
    mean = statistics.target_mean.to(device).double()[targets.to(device)]
    return torch.addmm(mean, centred, theta.to(device).double().T)


def predictions(
    statistics: Statistics, coefficients: Tensor, targets: Tensor, rows: Rows
) -> Iterator[tuple[Tensor, Tensor]]:
    """(targets [t], fhat [N, t]) of some targets after the others, on the device of the samples."""
    logits = rows.logits if rows.predictors is None else rows.predictors
    for part in torch.arange(len(targets), device="cpu").split(CHUNK_TARGETS):
        theta = dense_rows(coefficients, part)
        yield targets[part].to(logits.device), predict(statistics, theta, targets[part], logits)


def substitution_metrics(
    statistics: Statistics, coefficients: Tensor, targets: Tensor, held_out: HeldOut
) -> SubstitutionMetrics:
    """Metrics of all targets on the held-out samples, on the CPU."""
    parts = predictions(statistics, coefficients, targets, held_out)
    return SubstitutionMetrics.concatenated([held_out.samples.metrics(fhat, i).cpu() for i, fhat in parts])


def residual_ratios(statistics: Statistics, coefficients: Tensor, targets: Tensor, held_out: HeldOut) -> Tensor:
    """Residual / variance of all targets on the held-out samples, float64 [T] on the CPU; NaN where constant."""
    parts = predictions(statistics, coefficients, targets, held_out)
    return torch.cat([held_out.samples.residual_ratio(fhat, i).cpu() for i, fhat in parts])


def bootstrap_medians(statistics: Statistics, coefficients: Tensor, targets: Tensor, rows: Rows) -> Tensor:
    """Median over targets of residual / variance for BOOTSTRAP_DRAWS choices of groups with replacement, float64."""
    order, size = _groups(rows)
    generator = torch.Generator("cpu").manual_seed(0)
    draws = torch.randint(len(size), (BOOTSTRAP_DRAWS, len(size)), generator=generator, device="cpu")
    times = torch.zeros(draws.shape, dtype=torch.float64, device="cpu")
    times = times.scatter_add_(1, draws, torch.ones_like(draws).double()).to(size.device)
    number = times @ size[:, None].double()  # [draws, 1] samples
    ratios = []
    for i, fhat in predictions(statistics, coefficients, targets, rows):
        f = rows.logits[:, i].double()
        centred = f - f.mean(0)
        sums = [
            times @ _group_sums(x, order, size) / number for x in ((fhat - f).square(), centred, centred.square())
        ]  # each [draws, t]
        ratios.append(sums[0] / (sums[2] - sums[1].square()))
    ratio = torch.cat(ratios, 1)
    return torch.where(ratio.isfinite(), ratio, math.nan).nanmedian(1).values


def residual_ratio_and_error(
    statistics: Statistics, coefficients: Tensor, targets: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Residual / variance on `rows`, and its standard error over their G groups; float64 [T] each, on the CPU.

    With e_g the sum of squared residuals in group g of n_g samples, and mean the pooled one, the variance of that mean
    is G / (G - 1) sum_g (e_g - mean n_g)^2 / N^2; the error is infinite for G = 1. NaN where a target is constant.
    """
    order, size = _groups(rows)
    G, N = len(size), len(rows)
    ratio, error = [], []
    for i, fhat in predictions(statistics, coefficients, targets, rows):
        f = rows.logits[:, i].double()
        variance = (f - f.mean(0)).square().mean(0)
        e = _group_sums((fhat - f).square(), order, size)  # [G, t]
        mean = e.sum(0) / N
        spread = (e - mean * size[:, None]).square().sum(0)
        deviation = (G / (G - 1) * spread).sqrt() / N if G > 1 else torch.full_like(mean, math.inf)
        ratio.append(torch.where(variance > 0, mean / variance, math.nan))
        error.append(torch.where(variance > 0, deviation / variance, math.nan))
    return torch.cat(ratio).cpu(), torch.cat(error).cpu()


def _groups(rows: Rows) -> tuple[Tensor, Tensor]:
    """The samples int64 [N] in the order of their groups, and the sizes int64 [G], on the device of the samples."""
    _, group, size = rows.groups.unique(return_inverse=True, return_counts=True)
    device = rows.logits.device
    return group.argsort(stable=True).to(device), size.to(device)


def _group_sums(x: Tensor, order: Tensor, size: Tensor) -> Tensor:
    """Sum of the rows of x [N, t] in each group, float64 [G, t]."""
    sums: Tensor = torch.segment_reduce(x[order], "sum", lengths=size, axis=0)
    return sums
