"""Neural dependencies: the logit of a category as a sparse linear combination of other logits, within a network or
between two, and how well that holds on samples that were not used to find it.

Notation: f [N, n] logits of the network whose categories are explained, g [N, n2] those of a second network, if any;
S [m, m] the covariance of the m predictable and predicting columns (f, or f and g side by side), mu [m] their means;
theta [T, m] the coefficients of T targets. The prediction, with x = f or [f, g], is

    fhat_i = mu_i + sum_j theta_ij (x_j - mu_j) .

Source: sections 2, 3.10, 5 and 9 of the notes on "Neural Dependencies Emerging from Learning Massive Categories"
(arXiv 2211.12339); what the notes mark as ours is ours, such as splitting by group and the least-squares refit.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuraldeps_kernels.analysis.substitution import Samples, SubstitutionMetrics
from neuraldeps_kernels.ops.covariance import CovarianceAccumulator
from neuraldeps_kernels.ops.covlasso import STATUS_NAMES, covlasso

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_LAM_RATIO = 0.1
CURVE_RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
CHUNK_ROWS = 8192  # samples taken together
BOOTSTRAP_DRAWS = 400
CHUNK_TARGETS = 256  # predictions held at once: [N, 256]


@dataclass(frozen=True, eq=False)
class LogitStatistics:
    """Covariance and mean of logits, divided by the number of samples: all that is needed to find dependencies."""

    cov: Tensor  # [m, m]
    mean: Tensor  # [m]
    count: int  # samples
    sizes: tuple[int, ...]  # (n,) for one network; (n, n2) for two, whose columns stand side by side, m = n + n2

    def __post_init__(self) -> None:
        m = sum(self.sizes)
        if len(self.sizes) not in (1, 2):
            raise ValueError(f"sizes must name one or two networks, got {self.sizes}")
        if self.cov.shape != (m, m) or self.mean.shape != (m,):
            shapes = f"{list(self.cov.shape)} and {list(self.mean.shape)}"
            raise ValueError(f"cov and mean must be [{m}, {m}] and [{m}] for sizes {self.sizes}, got {shapes}")
        if self.count < 2:
            raise ValueError(f"count must be at least 2 samples, got {self.count}")

    @classmethod
    def from_logits(cls, *streams: Tensor) -> LogitStatistics:
        """Statistics of one or two streams of logits [N, n_k] on the same N samples, in float64."""
        accumulator = CovarianceAccumulator(sum(stream.shape[1] for stream in streams), device=streams[0].device)
        for rows in zip(*(stream.split(CHUNK_ROWS) for stream in streams), strict=True):
            accumulator.update(torch.cat(rows, 1) if len(rows) > 1 else rows[0])
        sizes = tuple(stream.shape[1] for stream in streams)
        return cls(accumulator.compute(), accumulator.mean, len(streams[0]), sizes)


@dataclass(frozen=True)
class ErrorCurvePoint:
    """How good all targets of a report are at one penalty. Medians are over targets, shares over all positives."""

    lam_ratio: float
    refit: bool  # least squares on the support instead of the penalised coefficients
    support: float  # median number of nonzero coefficients
    support_quartiles: tuple[float, float]
    residual_ratio_fit: float  # median of residual / variance on the samples that the covariance comes from
    residual_ratio: float  # the same on held-out samples; this and the rest NaN without them
    residual_ratio_quartiles: tuple[float, float]
    residual_ratio_of_occurring: float  # the same median over targets with positives
    precision: float  # of the samples whose argmax becomes i, over all i with positives, the share with y = i
    recall: float  # of all positives, the share whose argmax is still i
    top5: float  # of all positives, the share with i still among the five largest
    auc: float  # mean over targets with positives


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples that dependencies are judged on."""

    logits: Tensor  # f [N, n]
    predictors: Tensor | None  # g [N, n2] between two networks
    labels: Tensor  # y int64 [N]
    groups: Tensor  # int64 [N]: samples of one group, such as crops of one picture, are never split
    true_labels: bool  # else y is the argmax of the unmodified network
    group_name: str | None  # what a group is, such as "picture"; None where every sample is a group of its own

    @property
    def num_groups(self) -> int:
        """Number of distinct groups."""
        return len(self.groups.unique())

    @cached_property
    def samples(self) -> Samples:
        """The logits prepared for substitution metrics."""
        return Samples(self.logits, self.labels, self.groups)


@dataclass(frozen=True)
class _Problem:
    """What is asked: which targets from which columns at which penalty; solved anew for every point of a curve."""

    statistics: LogitStatistics
    targets: Tensor  # int64 [T]
    candidates: Tensor | None  # bool [m] or [T, m]
    penalty_factors: Tensor | None  # [m]
    tol: float

    def solve(self, *, lam: Tensor | float | None = None, lam_ratio: Tensor | float | None = None) -> _Fit:
        """The CovLasso coefficients."""
        solution = covlasso(
            self.statistics.cov,
            lam,
            lam_ratio=lam_ratio,
            targets=self.targets,
            candidates=self.candidates,
            penalty_factors=self.penalty_factors,
            tol=self.tol,
        )
        error = solution.relative_error
        return _Fit(solution.coefficients, error, solution.lam, solution.lambda_max, solution.status)

    def refit(self, fit: _Fit) -> _Fit:
        """Least squares on the supports of `fit`."""
        theta, err2 = _refit(self.statistics.cov, fit.coefficients, self.targets)
        variance = self.statistics.cov.diagonal()[self.targets].double()
        return replace(fit, coefficients=theta, residual_ratio=torch.where(variance > 0, err2 / variance, 0.0))


@dataclass(frozen=True)
class _Fit:
    coefficients: Tensor  # sparse CSR [T, m]
    residual_ratio: Tensor  # float64 [T], on the covariance
    lam: Tensor
    lambda_max: Tensor
    status: Tensor


@dataclass(frozen=True, eq=False)
class DependencyReport:
    """Dependencies of T targets and, with held-out samples, how well each replaces the logit that it explains."""

    statistics: LogitStatistics
    class_names: tuple[str, ...]  # [n], of the explained network
    predictor_names: tuple[str, ...]  # [n2], of the predicting network (the same one within a network)
    targets: Tensor  # int64 [T]
    coefficients: Tensor  # theta, sparse CSR [T, m]; columns are those of `statistics`
    residual_ratio_fit: Tensor  # float64 [T]: residual / variance on the covariance itself
    lam: Tensor  # float64 [T]
    lambda_max: Tensor  # float64 [T]
    status: Tensor  # int64 [T], index into ops.covlasso.STATUS_NAMES
    refit: bool
    standardize: bool
    exclude_same: bool
    held_out: HeldOut | None
    metrics: SubstitutionMetrics | None  # on the held-out samples
    problem: _Problem

    @property
    def between(self) -> bool:
        """Whether a second network predicts."""
        return len(self.statistics.sizes) == 2

    @property
    def n_nonzero(self) -> Tensor:
        """Support size k of each target, int64 [T]."""
        return self.coefficients.crow_indices().diff()

    def dependencies(self, target: int, top: int | None = None) -> list[tuple[int, float]]:
        """(predicting category, coefficient) of category `target`, by falling |coefficient|, at most `top`."""
        row = (self.targets == target).nonzero()
        if len(row) == 0:
            raise ValueError(f"target {target} is not among the report's targets")
        first, last = self.coefficients.crow_indices()[int(row[0]) :][:2].tolist()
        columns = self.coefficients.col_indices()[first:last] - self._first_predictor
        values = self.coefficients.values()[first:last].double()
        order = values.abs().argsort(descending=True, stable=True)[:top]
        return list(zip(columns[order].tolist(), values[order].tolist(), strict=True))

    def replace_logits(
        self, logits: Tensor, predictors: Tensor | None = None, categories: Iterable[int] | None = None
    ) -> Tensor:
        """Logits f [N, n] with those of `categories` (default: all targets) replaced by their predictions, all at once.

        Every prediction uses the unmodified logits. Between two networks `predictors` is g [N, n2]. The result has the
        dtype of `logits`. Raises ValueError where shapes do not fit or a category is no target.
        """
        _check_logits("logits", logits, self.statistics.sizes[0])
        if (predictors is not None) != self.between:
            needed = "the second network's logits" if self.between else "None: this report is of one network"
            raise ValueError(f"predictors must be {needed}")
        if predictors is not None:
            _check_logits("predictors", predictors, self.statistics.sizes[1], len(logits))
        rows = torch.arange(len(self.targets))
        if categories is not None:
            row_of = {target: row for row, target in enumerate(self.targets.tolist())}
            categories = list(categories)
            wrong = [category for category in categories if category not in row_of]
            if wrong:
                raise ValueError(f"categories has {wrong[0]}, which is not among the report's targets")
            rows = torch.tensor([row_of[category] for category in categories], dtype=torch.long)
        result = logits.clone()
        for part in rows.split(CHUNK_TARGETS):
            theta, i = _dense_rows(self.coefficients, part), self.targets[part]
            result[:, i] = _predict(self.statistics, theta, i, logits, predictors).to(logits.dtype)
        return result

    @cached_property
    def top1_all_replaced(self) -> float:
        """Share of held-out samples whose argmax is y once all targets are replaced at once; NaN without samples."""
        if self.held_out is None:
            return math.nan
        replaced = self.replace_logits(self.held_out.logits, self.held_out.predictors)
        return float((replaced.max(1).indices == self.held_out.labels).double().mean())

    @cached_property
    def residual_ratio_error(self) -> float:
        """Standard error of the median held-out R over targets: of a bootstrap that draws the groups with replacement.

        It says how much the median depends on which groups (pictures) were at hand; NaN without held-out samples.
        """
        if self.held_out is None:
            return math.nan
        return float(_bootstrap_medians(self.statistics, self.coefficients, self.targets, self.held_out).std())

    @cached_property
    def error_curve(self) -> tuple[ErrorCurvePoint, ...]:
        """The same targets at the penalties CURVE_RATIOS of their lambda_max, each without and with the refit."""
        points = []
        for ratio in CURVE_RATIOS:
            fit = self.problem.solve(lam_ratio=ratio)
            points.append(_curve_point(self.problem, self.held_out, fit, ratio, refit=False))
            points.append(_curve_point(self.problem, self.held_out, self.problem.refit(fit), ratio, refit=True))
        return tuple(points)

    def notable(self, count: int) -> list[int]:
        """Up to `count` targets to show: most positive groups, then most positives; without samples the best fits.

        Targets with an empty support or whose positives the network itself never finds are left out.
        """
        shown = self.n_nonzero > 0
        order = self.residual_ratio_fit.argsort(stable=True)
        if self.metrics is not None:
            weight = self.metrics.positive_groups * (len(self.held_out_labels) + 1) + self.metrics.positives
            shown &= self.metrics.recall_before > 0
            order = order[weight[order].argsort(descending=True, stable=True)]
        return self.targets[order[shown[order]]][:count].tolist()

    @property
    def held_out_labels(self) -> Tensor:
        """y [N] of the held-out samples, empty without them."""
        return torch.empty(0, dtype=torch.long) if self.held_out is None else self.held_out.labels

    def describe(self) -> str:
        """One sentence: what was measured, on how much."""
        source = "between two networks" if self.between else "within one network"
        fit = "least squares on the CovLasso support" if self.refit else "CovLasso coefficients"
        text = f"{len(self.targets)} categories, {source}, {fit} from {self.statistics.count} samples"
        if self.held_out is None:
            return f"{text}; not measured on held-out samples"
        number = len(self.held_out.labels)
        name = self.held_out.group_name
        groups = f"of {self.held_out.num_groups} {name}s" if name else "split by sample"
        y = "given labels" if self.held_out.true_labels else "the network's own unmodified argmax"
        return f"{text}; measured on {number} held-out samples {groups}; y: {y}"

    def cautions(self) -> list[str]:
        """What a reader of the figures must know: too few samples for the covariance, targets without certificate."""
        found = []
        count, m = self.statistics.count, len(self.statistics.mean)
        if count < 2 * m:
            found.append(f"{count} samples are few for the covariance of {m} logits: the fit looks better than it is")
        unsolved = int((self.status != 0).sum())
        if unsolved:
            names = sorted({STATUS_NAMES[code] for code in self.status.tolist() if code})
            found.append(f"{unsolved} targets are not solved to the tolerance ({', '.join(names)})")
        return found

    def summary(self) -> dict[str, Any]:
        """Figures over all targets; None where undefined."""
        result: dict[str, Any] = {
            "targets": len(self.targets),
            "support_median": _quantile(self.n_nonzero.double(), 0.5),
            "support_max": int(self.n_nonzero.max()) if len(self.targets) else 0,
            "residual_ratio_fit_median": _quantile(self.residual_ratio_fit, 0.5),
            "not_converged": {
                name: int((self.status == code).sum())
                for code, name in enumerate(STATUS_NAMES)
                if code and bool((self.status == code).any())
            },
        }
        if self.held_out is not None and self.metrics is not None:
            result |= {
                "held_out_samples": len(self.held_out.labels),
                "held_out_groups": self.held_out.num_groups,
                "categories_with_positives": int((self.metrics.positives > 0).sum()),
                "residual_ratio_median": _quantile(self.metrics.residual_ratio, 0.5),
                "residual_ratio_median_error": self.residual_ratio_error,
                "residual_ratio_median_of_occurring": _quantile(
                    self.metrics.residual_ratio[self.metrics.positives > 0], 0.5
                ),
                **_pooled(self.metrics),
                "top1_before": self.held_out.samples.top1,
                "top1_one_replaced_mean": float(self.metrics.top1_after.mean()),
                "top1_all_replaced": self.top1_all_replaced,
            }
        return {key: _without_nan(value) for key, value in result.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the covariance and the samples, as JSON-able values; NaN becomes None."""
        return {
            "what": self.describe(),
            "cautions": self.cautions(),
            "settings": {
                "between_networks": self.between,
                "exclude_same": self.exclude_same,
                "standardize": self.standardize,
                "refit": self.refit,
                "samples_of_covariance": self.statistics.count,
                "tol": self.problem.tol,
            },
            "summary": self.summary(),
            "categories": [_without_nan(row) for row in self._rows()],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        text = json_text(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a dependency, by target and falling |coefficient|, as CSV text, also written to `path` if given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("target", "target_name", "predictor", "predictor_name", "coefficient"))
        for target in self.targets.tolist():
            for j, value in self.dependencies(target):
                writer.writerow((target, self.class_names[target], j, self.predictor_names[j], f"{value:.9g}"))
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def table(self, categories: Sequence[int] | None = None, *, count: int = 10, top: int = 4) -> Table:
        """A rich table of `categories` (default: `notable(count)`), each with its `top` strongest dependencies."""
        from rich.table import Table

        table = Table(title=self.describe(), title_justify="left", title_style="", show_lines=False)
        table.add_column("category", no_wrap=True)
        held_out = ("R held out", "AUC", "recall", "precision", "top 5", "positives") if self.metrics else ()
        for name in ("k", "R fit", *held_out):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"strongest dependencies (of k, at most {top} shown)", ratio=1)
        row_of = {target: row for row, target in enumerate(self.targets.tolist())}
        for target in self.notable(count) if categories is None else categories:
            row = row_of[target]
            cells = [str(int(self.n_nonzero[row])), _number(self.residual_ratio_fit[row])]
            if self.metrics is not None:
                m = self.metrics
                rates = (m.residual_ratio, m.auc_after, m.recall_after, m.precision_after, m.top5_after)
                cells += [_number(values[row]) for values in rates]
                cells.append(self._positives(row))
            terms = (f"{value:+.2f} {self.predictor_names[j]}" for j, value in self.dependencies(target, top))
            table.add_row(self.class_names[target], *cells, ", ".join(terms))
        table.caption = "R = residual / variance (0 = the others tell everything, 1 = nothing)."
        if self.metrics is not None:
            median = f"{_quantile(self.metrics.residual_ratio, 0.5):.2f} ± {self.residual_ratio_error:.2f}"
            table.caption += (
                f" Held out, median of all {len(self.targets)} categories: {median} (bootstrap over {self._unit}s)."
            )
            table.caption += " AUC, recall, precision, top 5: of y with this logit alone replaced."
        table.caption_justify = "left"
        return table

    def plot(self, folder: str | Path, *, categories: Sequence[int] | None = None) -> list[Path]:
        """Writes spectrum.png, error_curve.png, dependencies.png and matrix.png into an existing folder.

        Needs matplotlib. `categories` are those of dependencies.png, default `notable(6)`.
        """
        from neuraldeps_kernels.analysis import plots

        return plots.write_all(self, Path(folder), self.notable(6) if categories is None else list(categories))

    @property
    def _first_predictor(self) -> int:
        """Column of `statistics` at which the predicting network begins."""
        return self.statistics.sizes[0] if self.between else 0

    @property
    def _unit(self) -> str:
        """What is held out as a whole."""
        return (self.held_out.group_name if self.held_out is not None else None) or "sample"

    def _positives(self, row: int) -> str:
        assert self.metrics is not None
        assert self.held_out is not None
        number, groups = int(self.metrics.positives[row]), int(self.metrics.positive_groups[row])
        name = self.held_out.group_name
        return f"{number} in {groups} {name}{'s' if groups != 1 else ''}" if name else str(number)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """A dict a target."""
        for row, target in enumerate(self.targets.tolist()):
            terms = self.dependencies(target)
            yield {
                "target": target,
                "name": self.class_names[target],
                "k": len(terms),
                "status": STATUS_NAMES[int(self.status[row])],
                "lam": float(self.lam[row]),
                "lambda_max": float(self.lambda_max[row]),
                "residual_ratio_fit": float(self.residual_ratio_fit[row]),
                "predictors": [j for j, _ in terms],
                "coefficients": [float(f"{value:.9g}") for _, value in terms],
                "held_out": {f.name: getattr(self.metrics, f.name)[row].item() for f in fields(self.metrics)}
                if self.metrics is not None
                else None,
            }


def find_dependencies(
    source: Tensor | nn.Module | LogitStatistics,
    class_names: Sequence[str] | None = None,
    lam_ratio: float | Tensor | None = None,
    *,
    lam: float | Tensor | None = None,
    predictors: Tensor | nn.Module | None = None,
    predictor_names: Sequence[str] | None = None,
    loader: Iterable[Any] | None = None,
    targets: Sequence[int] | Tensor | None = None,
    candidates: Tensor | None = None,
    exclude_same: bool | None = None,
    standardize: bool = False,
    refit: bool = False,
    held_out: float | Tensor | tuple[Tensor, Tensor] | None = 0.2,
    labels: Sequence[int] | Tensor | None = None,
    groups: Sequence[Any] | Tensor | None = None,
    group_name: str = "group",
    seed: int = 0,
    tol: float = 1e-6,
) -> DependencyReport:
    """Finds the categories through which each category of a classifier is expressed; measures how well, held out.

    Args:
        source: logits before the softmax [N, n]; or a model, run in eval mode over `loader`; or ready statistics.
        class_names: n names, default "0", "1", ...
        lam_ratio: penalty as a fraction of each target's lambda_max, a number or [T]; default 0.1 without `lam`.
        lam: penalty in squared logit units, a number or [T]; see `standardize`.
        predictors: logits [N, n2] of a second network on the same samples, or a second model: its categories predict.
        predictor_names: its n2 names, default `class_names` where n2 = n.
        loader: for models; yields inputs, or (inputs, ...) with int64 labels [B] as second entry, if any.
        targets: T categories of `source` to explain, each once; default all.
        candidates: bool over the predicting categories, [n] or [T, n] (n2 between networks); default all.
        exclude_same: between networks, whether category i of the second may not predict category i of the first;
            default True where n2 = n. Within a network a category never predicts itself.
        standardize: solve for logits divided by their standard deviations s: the penalty of theta_ij becomes
            lam_i s_j, lam_ratio is a fraction of the lambda_max of that problem, and `lam` counts in units of
            s_i^2. Coefficients are still reported for the logits as they are.
        refit: replace the penalised coefficients by least squares on their support, in float64, on the same covariance.
        held_out: share of the groups kept out of the covariance and used to measure, in (0, 1); or held-out logits
            [N', n] (between networks a pair, [N', n] and [N', n2]), and all of `source` goes into the covariance; or
            None. With ready statistics there is nothing to split: logits or nothing is held out.
        labels: y of the samples (of the held-out ones where those are given), default the argmax of the unmodified
            network.
        groups: a hashable each for the same samples, such as the picture that a crop is from: a group is never on
            both sides. Default: every sample is one.
        group_name: what a group is, in the singular, for the words of the report.
        seed: of the choice of groups.
        tol: KKT violation allowed, relative to lambda_max / 2.

    Raises:
        ValueError, TypeError: naming the argument, for shapes that do not fit, NaN, too few samples or groups, both
            `lam` and `lam_ratio`, targets out of range or repeated; and as `covlasso` does.
    """
    if lam is not None and lam_ratio is not None:
        raise ValueError("lam and lam_ratio must not both be given")
    loaded_labels = None
    if isinstance(source, nn.Module):
        source, predictors, loaded_labels = _run_models(source, predictors, loader)
    elif loader is not None or isinstance(predictors, nn.Module):
        raise ValueError("loader and a model as predictors need a model as source")
    if labels is None:
        labels = loaded_labels
    if isinstance(source, LogitStatistics):
        if predictors is not None:
            raise ValueError(
                "predictors must be None where source is LogitStatistics; give those of both networks, sizes (n, n2)"
            )
        statistics, evaluation = source, _given_samples(source.sizes, held_out, labels, groups, group_name)
    else:
        statistics, evaluation = _split_or_given(source, predictors, held_out, labels, groups, group_name, seed)
    n = statistics.sizes[0]
    if n < 2:
        raise ValueError(f"source must have at least 2 categories, got {n}")
    between = len(statistics.sizes) == 2
    same = _exclude_same(exclude_same, statistics.sizes)
    names = _names("class_names", class_names, n)
    if not between:
        if predictor_names is not None:
            raise ValueError("predictor_names must be None within one network; it has class_names")
        other_names = names
    elif predictor_names is None and statistics.sizes[1] == n:
        other_names = names
    else:
        other_names = _names("predictor_names", predictor_names, statistics.sizes[1])
    indices = _targets(targets, n)
    spread = statistics.cov.diagonal().clamp_min(0).sqrt()
    factors = torch.where(spread > 0, spread, 1.0) if standardize else None
    mask = _candidates(candidates, statistics.sizes, indices, same, spread if standardize else None)
    problem = _Problem(statistics, indices, mask, factors, tol)
    if lam is not None:
        scale = factors[indices].double() if factors is not None else torch.ones(len(indices), dtype=torch.float64)
        fit = problem.solve(lam=torch.as_tensor(lam, dtype=torch.float64) * scale)
    else:
        fit = problem.solve(lam_ratio=DEFAULT_LAM_RATIO if lam_ratio is None else lam_ratio)
    if refit:
        fit = problem.refit(fit)
    return DependencyReport(
        statistics=statistics,
        class_names=names,
        predictor_names=other_names,
        targets=indices,
        coefficients=fit.coefficients,
        residual_ratio_fit=fit.residual_ratio,
        lam=fit.lam,
        lambda_max=fit.lambda_max,
        status=fit.status,
        refit=refit,
        standardize=standardize,
        exclude_same=same,
        held_out=evaluation,
        metrics=None if evaluation is None else _evaluate(statistics, fit.coefficients, indices, evaluation),
        problem=problem,
    )


# ------------------------------------------------------------------------------------------------ samples


def _run_models(
    model: nn.Module, predictors: Tensor | nn.Module | None, loader: Iterable[Any] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits [N, n] of `model` and of a second one on all batches, on the CPU, and the labels that came along."""
    if loader is None:
        raise ValueError("loader must be given where source is a model")
    if isinstance(predictors, Tensor):
        raise ValueError("predictors must be a model or None where source is a model")
    models = [model] if predictors is None else [model, predictors]
    modes = [(module, module.training) for network in models for module in network.modules()]
    outputs: list[list[Tensor]] = [[] for _ in models]
    labels: list[Tensor] = []
    try:
        with torch.inference_mode():
            for network in models:
                network.eval()
            for batch in loader:
                inputs, batch_labels = _inputs_and_labels(batch)
                for network, parts in zip(models, outputs, strict=True):
                    parameter = next(network.parameters(), None)
                    parts.append(network(inputs if parameter is None else inputs.to(parameter.device)).cpu())
                labels += [] if batch_labels is None else [batch_labels.cpu()]
    finally:
        for module, training in modes:
            module.training = training
    if not outputs[0]:
        raise ValueError("loader must yield at least one batch")
    streams = [torch.cat(parts) for parts in outputs]
    return streams[0], streams[1] if predictors is not None else None, torch.cat(labels) if labels else None


def _inputs_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    second = batch[1] if len(batch) > 1 else None
    has_labels = isinstance(second, Tensor) and second.dim() == 1 and second.dtype == torch.int64
    return batch[0], second if has_labels else None


def _split_or_given(
    source: Tensor,
    predictors: Tensor | None,
    held_out: float | Tensor | tuple[Tensor, Tensor] | None,
    labels: Sequence[int] | Tensor | None,
    groups: Sequence[Any] | Tensor | None,
    group_name: str,
    seed: int,
) -> tuple[LogitStatistics, HeldOut | None]:
    """Statistics of the training samples, and the held-out ones."""
    _check_logits("source", source)
    streams = [source]
    if predictors is not None:
        _check_logits("predictors", predictors, rows=len(source))
        streams.append(predictors)
    if len(source) < 2:
        raise ValueError(f"source must have at least 2 samples, got {len(source)}")
    if held_out is None or not isinstance(held_out, (float, int)):
        sizes = tuple(stream.shape[1] for stream in streams)
        return LogitStatistics.from_logits(*streams), _given_samples(sizes, held_out, labels, groups, group_name)
    y, ids = _labels(labels, source), _group_ids(groups, len(source))
    kept = _held_out_mask(ids, float(held_out), seed)
    if int((~kept).sum()) < 2:
        raise ValueError(f"held_out = {held_out} leaves fewer than 2 of {len(source)} samples for the covariance")
    evaluation = HeldOut(
        logits=source[kept],
        predictors=None if predictors is None else predictors[kept],
        labels=y[kept],
        groups=ids[kept],
        true_labels=labels is not None,
        group_name=group_name if groups is not None else None,
    )
    return LogitStatistics.from_logits(*(stream[~kept] for stream in streams)), evaluation


def _held_out_mask(groups: Tensor, share: float, seed: int) -> Tensor:
    """True for the samples of randomly chosen groups, `share` of the groups rounded up, bool [N]."""
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, held-out logits or None, got {share}")
    distinct = groups.unique()
    number = math.ceil(share * len(distinct))
    if number == len(distinct):
        raise ValueError(f"held_out = {share} of {len(distinct)} groups leaves none for the covariance")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    return torch.isin(groups, distinct[order[:number]])


def _given_samples(
    sizes: tuple[int, ...],
    held_out: float | Tensor | tuple[Tensor, Tensor] | None,
    labels: Sequence[int] | Tensor | None,
    groups: Sequence[Any] | Tensor | None,
    group_name: str,
) -> HeldOut | None:
    """Held-out logits as they were given; None where there are none."""
    if held_out is None or isinstance(held_out, (float, int)):
        return None
    streams = (held_out,) if isinstance(held_out, Tensor) else tuple(held_out)
    if len(streams) != len(sizes):
        raise ValueError(f"held_out must be logits of {len(sizes)} network(s), got {len(streams)}")
    for stream, size in zip(streams, sizes, strict=True):
        _check_logits("held_out", stream, size, len(streams[0]))
    if len(streams[0]) < 2:
        raise ValueError(f"held_out must have at least 2 samples, got {len(streams[0])}")
    return HeldOut(
        logits=streams[0],
        predictors=streams[1] if len(streams) == 2 else None,
        labels=_labels(labels, streams[0]),
        groups=_group_ids(groups, len(streams[0])),
        true_labels=labels is not None,
        group_name=group_name if groups is not None else None,
    )


def _labels(labels: Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    if labels is None:
        return logits.max(1).indices
    y = torch.as_tensor(labels)
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool or len(y) != len(logits):
        raise ValueError(f"labels must be {len(logits)} integers, one a sample, got {list(y.shape)} of {y.dtype}")
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(f"labels must be in 0 to {logits.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
    return y.long()


def _group_ids(groups: Sequence[Any] | Tensor | None, number: int) -> Tensor:
    """Consecutive integers instead of the group values, in order of first appearance, int64 [N]."""
    if groups is None:
        return torch.arange(number)
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(values) != number:
        raise ValueError(f"groups must have {number} entries, one a sample, got {len(values)}")
    ids: dict[Any, int] = {}
    return torch.tensor([ids.setdefault(value, len(ids)) for value in values])


# ------------------------------------------------------------------------------------------------ arguments


def _check_logits(name: str, logits: Tensor, columns: int | None = None, rows: int | None = None) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    shape = list(logits.shape)
    if len(shape) != 2 or (columns is not None and shape[1] != columns) or (rows is not None and shape[0] != rows):
        expected = f"[{'samples' if rows is None else rows}, {'categories' if columns is None else columns}]"
        raise ValueError(f"{name} must be {expected}, got {shape}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    if not logits.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~logits.isfinite()).sum())} NaN or infinite values")


def _names(argument: str, names: Sequence[str] | None, number: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(index) for index in range(number))
    if len(names) != number:
        raise ValueError(f"{argument} must have {number} entries, one a category, got {len(names)}")
    return tuple(names)


def _targets(targets: Sequence[int] | Tensor | None, n: int) -> Tensor:
    if targets is None:
        return torch.arange(n)
    indices = torch.as_tensor(targets)
    if indices.dim() != 1 or len(indices) == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"targets must be at least one integer category, got {targets}")
    indices = indices.long()
    wrong = indices[(indices < 0) | (indices >= n)]
    if len(wrong):
        raise ValueError(f"targets must be in 0 to {n - 1}, got {int(wrong[0])}")
    if len(indices.unique()) < len(indices):
        raise ValueError(f"targets must not repeat, got {indices[indices.bincount()[indices] > 1][0]} more than once")
    return indices


def _exclude_same(exclude_same: bool | None, sizes: tuple[int, ...]) -> bool:
    if len(sizes) == 1:
        if exclude_same is False:
            raise ValueError("exclude_same must be True or None within one network: a category would predict itself")
        return True
    if exclude_same and sizes[0] != sizes[1]:
        raise ValueError(f"exclude_same needs networks of the same categories, got {sizes[0]} and {sizes[1]}")
    return sizes[0] == sizes[1] if exclude_same is None else exclude_same


def _candidates(
    candidates: Tensor | None, sizes: tuple[int, ...], targets: Tensor, exclude_same: bool, spread: Tensor | None
) -> Tensor | None:
    """Columns that may predict, bool [T, m], or None for all; with `spread` [m] those of zero variance may not."""
    between = len(sizes) == 2
    first = sizes[0] if between else 0
    if candidates is not None:
        candidates = torch.as_tensor(candidates)
        shapes = ((sizes[-1],), (len(targets), sizes[-1]))
        if candidates.dtype != torch.bool or candidates.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"candidates must be bool {expected}, got {list(candidates.shape)} of {candidates.dtype}")
        if not candidates.any():
            raise ValueError("candidates must allow at least one category, got none")
    elif not between and (spread is None or bool((spread > 0).all())):
        return None
    mask = torch.zeros(len(targets), sum(sizes), dtype=torch.bool)
    mask[:, first:] = True if candidates is None else candidates
    if between and exclude_same:
        mask[torch.arange(len(targets)), first + targets] = False
    if spread is not None:
        mask &= spread > 0
    return mask


# ------------------------------------------------------------------------------------------------ fitting, measuring


def _refit(cov: Tensor, coefficients: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares on the support a of each target, theta_a = S_aa^+ c_a: float64 sparse CSR [T, m], and err2 [T]."""
    crow = coefficients.crow_indices()
    values, err2 = [], []
    with _one_thread():
        for i, a in zip(targets.tolist(), coefficients.col_indices().tensor_split(crow[1:-1]), strict=True):
            A, c = cov[a[:, None], a].double(), cov[a, i].double()
            theta = _solve_positive(A, c)
            values.append(theta)
            err2.append(cov[i, i].double() - 2 * c @ theta + theta @ A @ theta)
    refitted = torch.sparse_csr_tensor(
        crow, coefficients.col_indices(), torch.cat(values), coefficients.shape, check_invariants=False
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


def _predict(
    statistics: LogitStatistics, coefficients: Tensor, targets: Tensor, logits: Tensor, predictors: Tensor | None
) -> Tensor:
    """fhat float64 [N, T] of targets [T] with dense coefficients [T, m]."""
    mean, theta = statistics.mean.double(), coefficients.double()
    n = statistics.sizes[0]
    if predictors is not None:
        return torch.addmm(mean[targets], predictors.double() - mean[n:], theta[:, n:].T)
    return torch.addmm(mean[targets], logits.double() - mean, theta.T)


def _dense_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Rows of a sparse CSR matrix [T, m] as a dense one."""
    crow, col, values = coefficients.crow_indices(), coefficients.col_indices(), coefficients.values()
    dense = values.new_zeros(len(rows), coefficients.shape[1])
    for out, row in enumerate(rows.tolist()):
        dense[out, col[crow[row] : crow[row + 1]]] = values[crow[row] : crow[row + 1]]
    return dense


def _predictions(
    statistics: LogitStatistics, coefficients: Tensor, targets: Tensor, logits: Tensor, predictors: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(targets [t], fhat [N, t]) of some targets after the others; coefficients sparse CSR [T, m]."""
    for rows in torch.arange(len(targets)).split(CHUNK_TARGETS):
        theta = _dense_rows(coefficients, rows)
        yield targets[rows], _predict(statistics, theta, targets[rows], logits, predictors)


def _evaluate(
    statistics: LogitStatistics, coefficients: Tensor, targets: Tensor, held_out: HeldOut
) -> SubstitutionMetrics:
    """Metrics of all targets on the held-out samples."""
    predictions = _predictions(statistics, coefficients, targets, held_out.logits, held_out.predictors)
    return SubstitutionMetrics.concatenated([held_out.samples.metrics(fhat, i) for i, fhat in predictions])


def _bootstrap_medians(statistics: LogitStatistics, coefficients: Tensor, targets: Tensor, held_out: HeldOut) -> Tensor:
    """Median over targets of residual / variance for BOOTSTRAP_DRAWS choices of groups with replacement, float64."""
    _, group, size = held_out.groups.unique(return_inverse=True, return_counts=True)
    draws = torch.randint(len(size), (BOOTSTRAP_DRAWS, len(size)), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    number = times @ size.double()[:, None]  # [draws, 1] samples
    ratios = []
    for i, fhat in _predictions(statistics, coefficients, targets, held_out.logits, held_out.predictors):
        f = held_out.logits[:, i].double()
        centred = f - f.mean(0)
        sums = [
            times @ torch.zeros(len(size), len(i), dtype=torch.float64).index_add_(0, group, x) / number
            for x in ((fhat - f).square(), centred, centred.square())
        ]  # each [draws, t]
        ratios.append(sums[0] / (sums[2] - sums[1].square()))
    ratio = torch.cat(ratios, 1)
    return torch.where(ratio.isfinite(), ratio, math.nan).nanmedian(1).values


def _curve_point(
    problem: _Problem, held_out: HeldOut | None, fit: _Fit, lam_ratio: float, *, refit: bool
) -> ErrorCurvePoint:
    support = fit.coefficients.crow_indices().diff().double()
    error = occurring = torch.full_like(fit.residual_ratio, math.nan)
    shares = dict.fromkeys(("precision", "recall", "top5", "auc"), math.nan)
    if held_out is not None:
        samples, targets = held_out.samples, problem.targets
        rows = torch.isin(targets, held_out.labels).nonzero()[:, 0]
        predictions = _predictions(problem.statistics, fit.coefficients, targets, held_out.logits, held_out.predictors)
        error = torch.cat([samples.residual_ratio(fhat, i) for i, fhat in predictions])
        occurring = error[rows]
        if len(rows):
            theta = _dense_rows(fit.coefficients, rows)
            predicted = _predict(problem.statistics, theta, targets[rows], held_out.logits, held_out.predictors)
            pooled = _pooled(samples.metrics(predicted, targets[rows]))
            shares = {name: pooled[name] for name in shares}
    return ErrorCurvePoint(
        lam_ratio=lam_ratio,
        refit=refit,
        support=_quantile(support, 0.5),
        support_quartiles=(_quantile(support, 0.25), _quantile(support, 0.75)),
        residual_ratio_fit=_quantile(fit.residual_ratio, 0.5),
        residual_ratio=_quantile(error, 0.5),
        residual_ratio_quartiles=(_quantile(error, 0.25), _quantile(error, 0.75)),
        residual_ratio_of_occurring=_quantile(occurring, 0.5),
        **shares,
    )


def _pooled(metrics: SubstitutionMetrics) -> dict[str, float]:
    """Figures of all targets together, each replaced alone: shares over positives, NaN without any."""
    m = metrics[metrics.positives > 0]
    weight = m.positives.double()

    def over_positives(share: Tensor) -> float:
        return float((share * weight).sum() / weight.sum())

    return {
        "recall_before": over_positives(m.recall_before),
        "recall": over_positives(m.recall_after),
        "precision": float((m.recall_after * weight).sum() / m.calls_after.sum()),
        "top5_before": over_positives(m.top5_before),
        "top5": over_positives(m.top5_after),
        "auc": float(m.auc_after.nanmean()),
    }


def json_text(content: Any) -> str:
    """Indented strict JSON with a list of numbers on one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text) + "\n"


def _quantile(values: Tensor, q: float) -> float:
    """Quantile of the values that are not NaN; NaN where there is none."""
    known = values[~values.isnan()]
    return float(known.double().quantile(q)) if len(known) else math.nan


def _number(value: Tensor) -> str:
    return "-" if value.isnan() else f"{float(value):.2f}"


def _without_nan(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
