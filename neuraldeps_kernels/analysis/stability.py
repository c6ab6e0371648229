"""Which dependencies stay when the samples are drawn again: a bootstrap of whole groups, such as pictures.

Draw b takes G of the G groups of the fit with replacement; a sample then counts as often as its group was drawn. Every
target is solved anew, and each predictor of the report is looked for: chosen at all, and with the sign that it has on
all samples. Samples are weighted, never copied. Source: our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuraldeps_kernels.analysis.fitting import Fit, Problem, Sparsity
from neuraldeps_kernels.analysis.inputs import Rows
from neuraldeps_kernels.progress import track


@dataclass(frozen=True, eq=False)
class Stability:
    """How often the dependencies of a report come back in `resamples` draws; entries as in its coefficients."""

    resamples: int
    groups: int
    chosen: Tensor  # float64 [nnz]: share of the draws in which the predictor has a nonzero coefficient
    same_sign: Tensor  # float64 [nnz]: the same with the sign that it has on all samples
    overlap: Tensor  # float64 [T]: mean over the draws of |a and b| / |a or b|, a, b supports; 1 where both are empty


def resample(rows: Rows, problem: Problem, sparsity: Sparsity, fit: Fit, resamples: int, seed: int) -> Stability:
    """Solves `problem` at `sparsity` on `resamples` draws of the groups of `rows` and compares with `fit`."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    shape = fit.coefficients.shape
    original, sign = _keys(fit.coefficients), fit.coefficients.values().sign()
    row = original // max(shape[1], 1)
    size = fit.coefficients.crow_indices().diff()
    chosen, same_sign = torch.zeros(len(original), dtype=torch.float64, device="cpu"), torch.zeros_like(sign).double()
    overlap = torch.zeros(shape[0], dtype=torch.float64, device="cpu")
    for weights in track(draws(rows.groups, resamples, seed), "resamples", resamples):
        drawn = problem.solve(sparsity, rows.weighted_covariance(weights)).coefficients
        found, values = _keys(drawn), drawn.values()
        present = torch.isin(original, found)
        position = torch.searchsorted(found, original[present])
        chosen += present
        same_sign[present] += (values[position].sign() == sign[present]).double()
        both = torch.zeros_like(size).index_add_(0, row[present], torch.ones_like(row[present]))
        either = size + drawn.crow_indices().diff() - both
        overlap += torch.where(either > 0, both.double() / either, 1.0)
    groups = rows.num_groups
    return Stability(resamples, groups, chosen / resamples, same_sign / resamples, overlap / resamples)


def draws(groups: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each sample counts, float64 [N], for every draw of as many groups as there are; groups int64 [N]."""
    group = groups.unique(return_inverse=True)[1]
    number = int(group.max()) + 1
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(resamples):
        drawn = torch.randint(number, (number,), generator=generator, device="cpu")
        yield torch.bincount(drawn, minlength=number).double()[group]


def _keys(coefficients: Tensor) -> Tensor:
    """row * p + column of every entry of a sparse CSR matrix [T, p], rising: int64 [nnz]."""
    crow = coefficients.crow_indices()
    row = torch.arange(len(crow) - 1, device=crow.device).repeat_interleave(crow.diff())
    return row * coefficients.shape[1] + coefficients.col_indices()
