"""The report on dependencies: what was found, how it holds on samples that were not used, as table, JSON, CSV, figures.

Notation: theta [T, p] the coefficients of T targets, p predicting categories (those of the network itself, or of a
second one); f [N, n] the logits of the explained network, g [N, p] those of the predicting one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuraldeps_kernels.analysis import fitting
from neuraldeps_kernels.analysis.fitting import Fit, Problem, Sparsity
from neuraldeps_kernels.analysis.formatting import cell, json_text, quantile, without_nan, written
from neuraldeps_kernels.analysis.graph import DependencyGraph, graph_of
from neuraldeps_kernels.analysis.inputs import HeldOut, Statistics, check_logits
from neuraldeps_kernels.analysis.selection import Selection
from neuraldeps_kernels.analysis.stability import Stability
from neuraldeps_kernels.analysis.substitution import SubstitutionMetrics
from neuraldeps_kernels.ops.covlasso import STATUS_NAMES

if TYPE_CHECKING:
    from rich.table import Table


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
class DependencyReport:
    """Dependencies of T targets and, with held-out samples, how well each replaces the logit that it explains."""

    statistics: Statistics
    class_names: tuple[str, ...]  # [n], of the explained network
    predictor_names: tuple[str, ...]  # [p], of the predicting network (the same one within a network)
    targets: Tensor  # int64 [T]
    coefficients: Tensor  # theta, sparse CSR [T, p]
    residual_ratio_fit: Tensor  # float64 [T]: residual / variance on the covariance itself
    lam: Tensor  # float64 [T]
    lambda_max: Tensor  # float64 [T]
    status: Tensor  # int64 [T], index into ops.covlasso.STATUS_NAMES
    refit: bool
    standardize: bool
    held_out: HeldOut | None  # on the device of the logits; the other tensors but `statistics` are on the CPU
    metrics: SubstitutionMetrics | None  # on the held-out samples
    selection: Selection | None  # how the penalties were chosen, if by held-out error
    stability: Stability | None  # over resamples, if asked for
    group_name: str  # what the fit is never split within, in words: a group, or "sample"
    curve_ratios: tuple[float, ...]  # penalties / lambda_max of the error curve
    sparsity: Sparsity
    problem: Problem

    @property
    def exclude_same(self) -> bool:
        """Whether category i may not predict category i."""
        return self.problem.exclude_same

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
        entries = self._entries(target)[:top]
        columns, values = self.coefficients.col_indices()[entries], self.coefficients.values()[entries].double()
        return list(zip(columns.tolist(), values.tolist(), strict=True))

    def frequencies(self, target: int, top: int | None = None) -> list[float]:
        """Share of the resamples with each of `dependencies(target, top)` and its sign; NaN without resamples."""
        entries = self._entries(target)[:top]
        if self.stability is None:
            return [math.nan] * len(entries)
        same_sign: list[float] = self.stability.same_sign[entries].tolist()
        return same_sign

    def _entries(self, target: int) -> Tensor:
        """Positions of the coefficients of `target` among all, by falling |coefficient|."""
        row = (self.targets == target).nonzero()
        if len(row) == 0:
            raise ValueError(f"target {target} is not among the report's targets")
        entries = fitting.entries_of(self.coefficients, row[0])
        return entries[self.coefficients.values()[entries].abs().argsort(descending=True, stable=True)]

    def replace_logits(
        self, logits: Tensor, predictors: Tensor | None = None, categories: Iterable[int] | None = None
    ) -> Tensor:
        """Logits f [N, n] with those of `categories` (default: all targets) replaced by their predictions, all at once.

        Every prediction uses the unmodified logits. Between two networks `predictors` is g [N, p]. The result has the
        dtype of `logits`. Raises ValueError where shapes do not fit or a category is no target.
        """
        check_logits("logits", logits, self.statistics.sizes[0])
        if (predictors is not None) != self.between:
            needed = "the second network's logits" if self.between else "None: this report is of one network"
            raise ValueError(f"predictors must be {needed}")
        if predictors is not None:
            check_logits("predictors", predictors, self.statistics.sizes[1], len(logits))
        rows = torch.arange(len(self.targets), device="cpu")
        if categories is not None:
            row_of = {target: row for row, target in enumerate(self.targets.tolist())}
            categories = list(categories)
            wrong = [category for category in categories if category not in row_of]
            if wrong:
                raise ValueError(f"categories has {wrong[0]}, which is not among the report's targets")
            rows = torch.tensor([row_of[category] for category in categories], dtype=torch.long, device="cpu")
        result = logits.clone()
        for part in rows.split(fitting.CHUNK_TARGETS):
            theta, i = fitting.dense_rows(self.coefficients, part), self.targets[part]
            predicted = fitting.predict(self.statistics, theta, i, logits if predictors is None else predictors)
            result[:, i.to(logits.device)] = predicted.to(logits.dtype)
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
        return float(fitting.bootstrap_medians(self.statistics, self.coefficients, self.targets, self.held_out).std())

    @cached_property
    def error_curve(self) -> tuple[ErrorCurvePoint, ...]:
        """The same targets along the path, at `curve_ratios` of their lambda_max, each without and with the refit.

        With the nonnegativity constraint there is no refit, which could break it.
        """
        points = []
        path = self.problem.path(torch.tensor(self.curve_ratios, dtype=torch.float64, device="cpu"))
        for ratio, fit in zip(self.curve_ratios, path, strict=True):
            points.append(_curve_point(self.problem, self.held_out, fit, ratio, refit=False))
            if not self.problem.nonnegative:
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
        return torch.empty(0, dtype=torch.long, device="cpu") if self.held_out is None else self.held_out.labels

    def describe(self) -> str:
        """One sentence: what was measured, on how much."""
        source = "between two networks" if self.between else "within one network"
        return f"{len(self.targets)} categories, {source}, {self.describe_fit()}; {self.describe_measurement()}"

    def describe_fit(self) -> str:
        """What coefficients, from how many samples."""
        text = "least squares on the CovLasso support" if self.refit else "CovLasso coefficients"
        if self.problem.nonnegative:
            text = f"nonnegative {text}"
        if self.sparsity.top_k is not None:
            text += f" of {self.sparsity.top_k} categories"
        text += f" from {self.statistics.count} samples"
        if self.selection is not None:
            rule = "least error" if self.selection.rule == "held_out" else "one standard error above the least"
            text += f", penalties chosen on {self.selection.samples} validation samples ({rule})"
        if self.stability is not None:
            text += f", {self.stability.resamples} resamples of {self.stability.groups} {self.group_name}s"
        return text

    def describe_measurement(self) -> str:
        """On how many samples, and against which categories."""
        if self.held_out is None:
            return "not measured on held-out samples"
        number = len(self.held_out.labels)
        name = self.held_out.group_name
        groups = f"of {self.held_out.num_groups} {name}s" if name else "split by sample"
        y = "given labels" if self.held_out.true_labels else "the network's own unmodified argmax"
        return f"measured on {number} held-out samples {groups}; y: {y}"

    def cautions(self) -> list[str]:
        """What a reader of the figures must know: too few samples for the covariance, targets without certificate."""
        found = []
        count, m = self.statistics.count, self.statistics.sizes[-1]
        if count < 2 * m:
            found.append(f"{count} samples are few for the covariance of {m} logits: the fit looks better than it is")
        if self.selection is not None:
            last = int((self.selection.chosen == len(self.selection.ratios) - 1).sum())
            if last:
                found.append(
                    f"{last} targets chose the smallest penalty of the path: a smaller lam_min_ratio may be better"
                )
        too_few = STATUS_NAMES.index("too_few")
        rarer = int((self.status == too_few).sum())
        if rarer:
            found.append(f"{rarer} targets have fewer than {self.sparsity.top_k} categories at any penalty")
        unsolved = (self.status != 0) & (self.status != too_few)
        if unsolved.any():
            names = sorted({STATUS_NAMES[code] for code in self.status[unsolved].tolist()})
            found.append(f"{int(unsolved.sum())} targets are not solved to the tolerance ({', '.join(names)})")
        return found

    def summary(self) -> dict[str, Any]:
        """Figures over all targets; None where undefined."""
        result: dict[str, Any] = {
            "targets": len(self.targets),
            "support_median": quantile(self.n_nonzero.double(), 0.5),
            "support_max": int(self.n_nonzero.max()) if len(self.targets) else 0,
            "lam_ratio_median": quantile(self.lam / self.lambda_max, 0.5),
            "residual_ratio_fit_median": quantile(self.residual_ratio_fit, 0.5),
            "not_converged": {
                name: int((self.status == code).sum())
                for code, name in enumerate(STATUS_NAMES)
                if code and bool((self.status == code).any())
            },
        }
        if self.stability is not None:
            result |= {
                "same_sign_median": quantile(self.stability.same_sign, 0.5),
                "same_sign_always": float((self.stability.same_sign == 1).double().mean()),
                "support_overlap_median": quantile(self.stability.overlap, 0.5),
            }
        if self.held_out is not None and self.metrics is not None:
            result |= {
                "held_out_samples": len(self.held_out.labels),
                "held_out_groups": self.held_out.num_groups,
                "categories_with_positives": int((self.metrics.positives > 0).sum()),
                "residual_ratio_median": quantile(self.metrics.residual_ratio, 0.5),
                "residual_ratio_median_error": self.residual_ratio_error,
                "residual_ratio_median_of_occurring": quantile(
                    self.metrics.residual_ratio[self.metrics.positives > 0], 0.5
                ),
                **_pooled(self.metrics),
                "top1_before": self.held_out.samples.top1,
                "top1_one_replaced_mean": float(self.metrics.top1_after.mean()),
                "top1_all_replaced": self.top1_all_replaced,
            }
        return {key: without_nan(value) for key, value in result.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the covariance and the samples, as JSON-able values; NaN becomes None."""
        return {
            "what": self.describe(),
            "cautions": self.cautions(),
            "settings": self.settings(),
            "summary": self.summary(),
            "categories": [without_nan(row) for row in self._rows()],
        }

    def settings(self) -> dict[str, Any]:
        """How the dependencies were found, as JSON-able values."""
        return {
            "between_networks": self.between,
            "exclude_same": self.exclude_same,
            "standardize": self.standardize,
            "refit": self.refit,
            "top_k": self.sparsity.top_k,
            "select": None if self.selection is None else self.selection.rule,
            "nonnegative": self.problem.nonnegative,
            "ridge": self.problem.ridge,
            "resamples": 0 if self.stability is None else self.stability.resamples,
            "samples_of_covariance": self.statistics.count,
            "tol": self.problem.tol,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        return written(json_text(self.to_dict()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a dependency, by target and falling |coefficient|, as CSV text, also written to `path` if given.

        With resamples the column `frequency` is the share of them with this predictor and sign.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        resampled = self.stability is not None
        columns = ("target", "target_name", "predictor", "predictor_name", "coefficient")
        writer.writerow((*columns, "frequency") if resampled else columns)
        for target in self.targets.tolist():
            for (j, value), frequency in zip(self.dependencies(target), self.frequencies(target), strict=True):
                row = (target, self.class_names[target], j, self.predictor_names[j], f"{value:.9g}")
                writer.writerow((*row, f"{frequency:.4g}") if resampled else row)
        return written(text.getvalue(), path)

    def to_graph(self, top: int | None = None) -> DependencyGraph:
        """The directed graph of all dependencies, or of the `top` strongest edges of each."""
        return graph_of(self, top)

    def to_graphml(self, path: str | Path | None = None, *, top: int | None = None) -> str:
        """`to_graph` as GraphML text, also written to `path` if given."""
        return self.to_graph(top).to_graphml(path)

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
            cells = [str(int(self.n_nonzero[row])), cell(self.residual_ratio_fit[row])]
            if self.metrics is not None:
                m = self.metrics
                rates = (m.residual_ratio, m.auc_after, m.recall_after, m.precision_after, m.top5_after)
                cells += [cell(values[row]) for values in rates]
                cells.append(self._positives(row))
            terms = zip(self.dependencies(target, top), self.frequencies(target, top), strict=True)
            shown = (
                f"{value:+.2f} {self.predictor_names[j]}" + ("" if share != share else f" ({share:.0%})")
                for (j, value), share in terms
            )
            table.add_row(self.class_names[target], *cells, ", ".join(shown))
        table.caption = "R = residual / variance (0 = the others tell everything, 1 = nothing)."
        if self.stability is not None:
            table.caption += (
                f" In brackets: share of {self.stability.resamples} resamples with this predictor and sign."
            )
        if self.metrics is not None:
            median = f"{quantile(self.metrics.residual_ratio, 0.5):.2f} ± {self.residual_ratio_error:.2f}"
            table.caption += (
                f" Held out, median of all {len(self.targets)} categories: {median} (bootstrap over {self._unit}s)."
            )
            table.caption += " AUC, recall, precision, top 5: of y with this logit alone replaced."
        table.caption_justify = "left"
        return table

    def plot(self, folder: str | Path, *, categories: Sequence[int] | None = None) -> list[Path]:
        """Writes spectrum.png, error_curve.png, dependencies.png, matrix.png and graph.png into an existing folder.

        Needs matplotlib. `categories` are those of dependencies.png, default `notable(6)`; given ones are also those
        whose neighbourhood graph.png shows, instead of the strongest dependencies of all.
        """
        from neuraldeps_kernels.analysis import plots

        return plots.write_all(self, Path(folder), None if categories is None else list(categories))

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
                **self._extra(row, target),
                "held_out": {f.name: getattr(self.metrics, f.name)[row].item() for f in fields(self.metrics)}
                if self.metrics is not None
                else None,
            }

    def _extra(self, row: int, target: int) -> dict[str, Any]:
        """What a choice of the penalty and resamples add to the dict of a target."""
        extra: dict[str, Any] = {}
        if self.selection is not None:
            place = self.selection.chosen[row]
            extra["lam_ratio"] = float(self.selection.lam_ratio[row])
            extra["residual_ratio_validation"] = float(self.selection.error[row, place])
            extra["residual_ratio_validation_error"] = float(self.selection.standard_error[row, place])
        if self.stability is not None:
            extra["frequencies"] = [float(f"{share:.4g}") for share in self.frequencies(target)]
            extra["support_overlap"] = float(self.stability.overlap[row])
        return extra


def _curve_point(
    problem: Problem, held_out: HeldOut | None, fit: Fit, lam_ratio: float, *, refit: bool
) -> ErrorCurvePoint:
    support = fit.coefficients.crow_indices().diff().double()
    error = occurring = torch.full_like(fit.residual_ratio, math.nan)
    shares = dict.fromkeys(("precision", "recall", "top5", "auc"), math.nan)
    if held_out is not None:
        targets = problem.targets
        rows = torch.isin(targets, held_out.labels.cpu()).nonzero()[:, 0]
        error = fitting.residual_ratios(problem.statistics, fit.coefficients, targets, held_out)
        occurring = error[rows]
        if len(rows):
            theta = fitting.dense_rows(fit.coefficients, rows)
            logits = held_out.logits if held_out.predictors is None else held_out.predictors
            predicted = fitting.predict(problem.statistics, theta, targets[rows], logits)
            pooled = _pooled(held_out.samples.metrics(predicted, targets[rows].to(logits.device)).cpu())
            shares = {name: pooled[name] for name in shares}
    return ErrorCurvePoint(
        lam_ratio=lam_ratio,
        refit=refit,
        support=quantile(support, 0.5),
        support_quartiles=(quantile(support, 0.25), quantile(support, 0.75)),
        residual_ratio_fit=quantile(fit.residual_ratio, 0.5),
        residual_ratio=quantile(error, 0.5),
        residual_ratio_quartiles=(quantile(error, 0.25), quantile(error, 0.75)),
        residual_ratio_of_occurring=quantile(occurring, 0.5),
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
