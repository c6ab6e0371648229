"""What the CovLasso functions return."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STATUS_NAMES = ("converged", "capped", "collinear", "not_psd", "too_few")


@dataclass(frozen=True, eq=False)
class CovLassoSolution:
    """Solutions of T CovLasso problems over n predictors, one row per target.

    Attributes:
        coefficients: [T, n] sparse CSR, columns increasing, dtype of the covariance; the pinned -1 is left out.
        targets: [T] int64.
        lam: [T] float64, the penalty of each target.
        lambda_max: [T] float64, the smallest penalty without any nonzero coefficient.
        err2: [T] float64, mean squared residual `Theta' S Theta`, without ridge and penalty; differentiable where the
            coefficients are.
        relative_error: [T] float64, `err2 / S_ii`; 0 for a target of zero variance.
        n_nonzero: [T] int64.
        duality_gap: [T] float64, objective minus dual bound, in squared logit units; rounding may leave it slightly
            negative.
        kkt_violation: [T] float64, the largest violation of the optimality conditions over `lambda_max / 2`.
        n_pivots: [T] int64, coordinates that entered or left on the way.
        status: [T] int64, index into `STATUS_NAMES`: 0 converged; 1 capped (`max_pivots` reached); 2 collinear (the
            tolerance is out of reach because predictors of the support are linearly dependent to rounding); 3 not_psd
            (the covariance is not positive semidefinite where it matters, so there may be no minimum); 4 too_few (no
            penalty gives as many nonzeros as were asked for).
    """

    coefficients: Tensor
    targets: Tensor
    lam: Tensor
    lambda_max: Tensor
    err2: Tensor
    relative_error: Tensor
    n_nonzero: Tensor
    duality_gap: Tensor
    kkt_violation: Tensor
    n_pivots: Tensor
    status: Tensor

    @property
    def status_names(self) -> list[str]:
        """One of "converged", "capped", "collinear", "not_psd", "too_few" per target."""
        return [STATUS_NAMES[code] for code in self.status.tolist()]

    @cached_property
    def _dense(self) -> Tensor:
        return dense_rows(self.coefficients)

    def dense(self) -> Tensor:
        """The coefficients as a dense [T, n] tensor, zero at the targets themselves."""
        return self._dense

    def predict(self, x: Tensor, mean: Tensor | None = None, target_mean: Tensor | None = None) -> Tensor:
        """Predicted logits of the targets.

        Args:
            x: [N, n] logits of the predictors.
            mean: [n] their mean. With it `mean_i + sum_j theta_j (x_j - mean_j)` is returned, as fits a centred
                covariance; without it `sum_j theta_j x_j`.
            target_mean: mean of the variables that `targets` counts, where these are not the predictors; default
                `mean`.

        Returns:
            [N, T], dtype of `x`.

        Raises:
            ValueError: `x` or `mean` does not have n columns, `target_mean` lacks a target or comes without `mean`.
        """
        n = self.coefficients.shape[1]
        if x.dim() != 2 or x.shape[1] != n:
            raise ValueError(f"x must be [N, {n}], not {list(x.shape)}")
        if mean is not None and mean.shape != (n,):
            raise ValueError(f"mean must be [{n}], not {list(mean.shape)}")
        theta = self.dense().to(x.dtype)
        if mean is None:
            if target_mean is not None:
                raise ValueError("target_mean needs mean, the mean of the predictors")
            return x @ theta.T
        base = (mean if target_mean is None else target_mean).to(x)
        if base.dim() != 1 or (len(self.targets) and int(self.targets.max()) >= len(base)):
            raise ValueError(f"target_mean must be one-dimensional and hold every target, not {list(base.shape)}")
        return base[self.targets] + (x - mean.to(x)) @ theta.T


@dataclass(frozen=True, eq=False)
class CovLassoPath:
    """Solutions of T CovLasso problems over n predictors at L penalties each.

    `len(path)` is L, `path[l]` the CovLassoSolution at every target's l-th penalty.

    Attributes:
        coefficients: [T * L, n] sparse CSR; row `t * L + l` belongs to target t and its penalty l.
        targets: [T] int64.
        lams: [T, L] float64, decreasing.
        lambda_max: [T] float64.
        err2, relative_error, n_nonzero, duality_gap, kkt_violation, n_pivots, status: [T, L], as in CovLassoSolution.
            `n_pivots` counts from one penalty to the next.
    """

    coefficients: Tensor
    targets: Tensor
    lams: Tensor
    lambda_max: Tensor
    err2: Tensor
    relative_error: Tensor
    n_nonzero: Tensor
    duality_gap: Tensor
    kkt_violation: Tensor
    n_pivots: Tensor
    status: Tensor

    def __len__(self) -> int:
        return self.lams.shape[1]

    def __getitem__(self, index: int) -> CovLassoSolution:
        if not -len(self) <= index < len(self):
            raise IndexError(f"the path has {len(self)} penalties, no number {index}")
        return self.at(torch.full_like(self.targets, index % len(self)))

    def at(self, index: Tensor) -> CovLassoSolution:
        """The solution with one penalty chosen for each target.

        Args:
            index: [T] integers in [0, L).

        Raises:
            ValueError: `index` has another shape or a value out of range.
            TypeError: `index` is not of integers.
        """
        index = torch.as_tensor(index, device=self.lams.device)
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"index must be integers, not {index.dtype}")
        index = index.long()
        if index.shape != self.targets.shape:
            raise ValueError(f"index must be [{len(self.targets)}], not {list(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"index must be 0 to {len(self) - 1}, not {int(index.min())} to {int(index.max())}")
        rows = torch.arange(len(index), device=index.device)

        def chosen(values: Tensor) -> Tensor:
            return values[rows, index]

        return CovLassoSolution(
            coefficients=select_rows(self.coefficients, rows * len(self) + index),
            targets=self.targets,
            lam=chosen(self.lams),
            lambda_max=self.lambda_max,
            err2=chosen(self.err2),
            relative_error=chosen(self.relative_error),
            n_nonzero=chosen(self.n_nonzero),
            duality_gap=chosen(self.duality_gap),
            kkt_violation=chosen(self.kkt_violation),
            n_pivots=chosen(self.n_pivots),
            status=chosen(self.status),
        )

    def dense(self) -> Tensor:
        """The coefficients as a dense [T, L, n] tensor."""
        return dense_rows(self.coefficients).view(*self.lams.shape, self.coefficients.shape[1])


def csr(count: Tensor, column: Tensor, value: Tensor, n: int) -> Tensor:
    """Sparse CSR [rows, n] from the number of entries of each row, their columns and values."""
    crow = torch.cat([count.new_zeros(1), count.cumsum(0)])
    shape = (len(count), n)
    return torch.sparse_csr_tensor(crow, column.long(), value, shape, device=value.device, check_invariants=False)


def dense_rows(coefficients: Tensor) -> Tensor:
    """A sparse CSR matrix as a dense one; differentiable."""
    rows = torch.repeat_interleave(coefficients.crow_indices().diff())
    flat = rows * coefficients.shape[1] + coefficients.col_indices()
    zeros = coefficients.values().new_zeros(coefficients.shape[0] * coefficients.shape[1])
    return zeros.index_put((flat,), coefficients.values()).view(coefficients.shape)


def ranges(start: Tensor, count: Tensor) -> Tensor:
    """start[0], start[0] + 1, ... count[0] of them, then start[1], ...: int64 [sum of count]."""
    end = count.cumsum(0)
    flat = torch.repeat_interleave(start - (end - count), count)
    return flat.add_(torch.arange(len(flat), device=flat.device))


def select_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a sparse CSR matrix, in the order given; differentiable."""
    crow = coefficients.crow_indices()
    count = crow.diff()[rows]
    entries = ranges(crow[rows], count)
    return csr(count, coefficients.col_indices()[entries], coefficients.values()[entries], coefficients.shape[1])
