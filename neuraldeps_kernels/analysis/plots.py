"""Figures of a dependency report: covariance spectrum, error against support size, dependencies, clustered matrix.

Drawn on figures of their own, without pyplot: nothing global changes, no display is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

if TYPE_CHECKING:
    from neuraldeps_kernels.analysis.dependencies import DependencyReport, ErrorCurvePoint

DPI = 130
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2166ac", "#d6604d", "#1b7837", "#762a83", "#777777"
LABELLED_ROWS = 60  # a matrix of more rows names clusters instead of categories
CLUSTERS = 24


def write_all(report: DependencyReport, folder: Path, categories: Sequence[int]) -> list[Path]:
    """Writes the four figures as PNG into `folder` and returns their paths; dependencies.png shows `categories`."""
    figures = {
        "spectrum.png": spectrum(report),
        "error_curve.png": error_curve(report),
        "dependencies.png": dependency_bars(report, categories),
        "matrix.png": dependency_matrix(report),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]


def spectrum(report: DependencyReport) -> Figure:
    """Eigenvalues of each network's logit covariance, and the share of variance that the largest hold."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    blocks = report.statistics.cov.split(report.statistics.sizes)
    for start, block, color, name in zip(
        np.cumsum((0, *report.statistics.sizes)), blocks, (BLUE, ORANGE), _network_names(report), strict=False
    ):
        values = torch.linalg.eigvalsh(block[:, start : start + len(block)].double()).flip(0).clamp_min(0).numpy()
        index = np.arange(1, len(values) + 1)
        share = values / values.sum()
        rank = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
        left.plot(index[values > 0], values[values > 0], color=color, lw=1.8, label=name)
        right.plot(index, share.cumsum(), color=color, lw=1.8, label=f"{name}: entropy effective rank {rank:.0f}")
        for level in (0.5, 0.9, 0.99):
            k = int(np.searchsorted(share.cumsum(), level)) + 1
            right.plot(k, share.cumsum()[k - 1], "o", color=color, ms=5)
            if start == 0:
                text = f"{k} hold {level:.0%}"
                right.annotate(text, (k, level), (6, -12), textcoords="offset points", fontsize=8, color=color)
    left.set(xscale="log", yscale="log", xlabel="index of the eigenvalue", ylabel="eigenvalue (squared logit units)")
    left.set_title("Spectrum of the logit covariance", fontsize=11, loc="left")
    right.set(
        xscale="log", ylim=(0, 1.04), xlabel="number of largest eigenvalues", ylabel="share of the total variance"
    )
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_title("Share of the variance in the largest eigenvalues", fontsize=11, loc="left")
    right.legend(fontsize=8, frameon=False, loc="upper left")
    for axes in (left, right):
        _tidy(axes)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    return figure


def error_curve(report: DependencyReport) -> Figure:
    """Residual / variance against support size along the penalty, and what the substitution does to the argmax."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [point for point in report.error_curve if point.support > 0]
    measured = report.held_out is not None
    for refit, color, name in ((False, BLUE, "CovLasso"), (True, ORANGE, "least squares on its support")):
        line = [point for point in points if point.refit == refit]
        k = [point.support for point in line]
        left.plot(
            k, [p.residual_ratio_fit for p in line], "--", color=color, lw=1.4, label=f"{name}, samples of the fit"
        )
        if measured:
            error = [point.residual_ratio for point in line]
            left.plot(k, error, "o-", color=color, lw=2, ms=4, label=f"{name}, held out")
            low, high = zip(*(point.residual_ratio_quartiles for point in line), strict=True) if line else ((), ())
            left.fill_between(k, low, high, color=color, alpha=0.12, lw=0)
    left.axhline(1, color=GREY, lw=0.8, ls=":")
    left.set(xscale="log", xlabel="median number of categories in a dependency, k", ylabel="residual / variance, R")
    left.set_ylim(0, 1.15)
    band = "; band: quartiles" if measured else ""
    left.set_title(
        f"Error against support size (median of {len(report.targets)} categories{band})", fontsize=10, loc="left"
    )
    left.legend(fontsize=8, frameon=False, loc="best")
    if measured:
        _rates(right, [point for point in points if point.refit])
        right.set_title(f"With one logit replaced, on {_amount(report)}", fontsize=10, loc="left")
    else:
        right.scatter(report.n_nonzero, report.residual_ratio_fit, s=9, color=BLUE, alpha=0.6, lw=0)
        right.set(xlabel="number of categories in the dependency, k", ylabel="residual / variance, R", ylim=(0, 1.05))
        right.set_title("Every category (samples of the fit)", fontsize=10, loc="left")
    for axes in (left, right) if measured else (left,):
        axes.xaxis.set_major_formatter(ScalarFormatter())
    for axes in (left, right):
        _tidy(axes)
    return figure


def dependency_bars(report: DependencyReport, categories: Sequence[int], *, top: int = 8) -> Figure:
    """The `top` strongest coefficients of each of `categories`, three to a row."""
    rows = max(1, -(-len(categories) // 3))
    figure = Figure(figsize=(13, 0.9 + 2.9 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    panels = figure.subplots(rows, 3, squeeze=False).ravel()
    row_of = {target: row for row, target in enumerate(report.targets.tolist())}
    for axes, target in zip(panels, categories, strict=False):
        row, terms = row_of[target], report.dependencies(target, top)
        values = [value for _, value in terms]
        axes.barh(range(len(terms)), values, color=[BLUE if v > 0 else ORANGE for v in values], height=0.72)
        axes.set_yticks(range(len(terms)), [_short(report.predictor_names[j]) for j, _ in terms])
        axes.invert_yaxis()
        axes.axvline(0, color="black", lw=0.8)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        k = int(report.n_nonzero[row])
        error = f"R {report.residual_ratio_fit[row]:.2f} fit"
        if report.metrics is not None:
            error += f", {report.metrics.residual_ratio[row]:.2f} held out"
        axes.set_title(report.class_names[target], fontsize=11, fontweight="bold", loc="left", pad=18)
        more = f"{len(terms)} of {k} categories" if k > len(terms) else f"{k} categories"
        axes.text(0, 1.02, f"{more}; {error}", transform=axes.transAxes, fontsize=8.5, color=GREY, va="bottom")
        _tidy(axes, grid="x")
    for axes in panels[len(categories) :]:
        axes.set_axis_off()
    figure.supxlabel("coefficient (target logits per predictor logit)", fontsize=10)
    return figure


def dependency_matrix(report: DependencyReport) -> Figure:
    """All coefficients, rows and columns ordered by hierarchical clustering of the logits' correlations."""
    n = report.statistics.sizes[0]
    first = n if report.between else 0
    rows = _cluster(report.statistics.cov[:n, :n])
    columns = _cluster(report.statistics.cov[first:, first:]) if report.between else rows
    row_of = {target: row for row, target in enumerate(report.targets.tolist())}
    targets = [target for target in rows.order if target in row_of]
    dense = report.coefficients.to_dense()[:, first:].double()[[row_of[target] for target in targets]]
    used = (dense != 0).any(0).tolist()
    predictors = [j for j in columns.order if used[j] or len(targets) == n]
    matrix = dense[:, predictors].numpy()
    cells, side = _strongest(matrix)

    figure = Figure(figsize=(11.5, 9), layout="constrained")
    axes = figure.subplots()
    sizes = np.abs(cells[cells != 0])
    limit = float(np.quantile(sizes, 0.99)) if sizes.size else 1.0
    image = axes.imshow(
        cells, cmap="RdBu", norm=Normalize(-limit, limit), aspect="auto", interpolation="nearest",
        extent=(-0.5, len(predictors) - 0.5, len(targets) - 0.5, -0.5),
    )  # fmt: skip
    label = "coefficient (target logits per predictor logit)"
    if side > 1:
        label += f"; of {side} x {side} the one of largest size"
    figure.colorbar(image, ax=axes, shrink=0.6, pad=0.015, label=label, extend="both")
    _label(axes.yaxis, targets, report.class_names, rows)
    _label(axes.xaxis, predictors, report.predictor_names, columns)
    axes.tick_params(axis="x", rotation=90)
    who = "of the second network" if report.between else "of the same network"
    axes.set_xlabel(f"{len(predictors)} predicting categories {who}")
    axes.set_ylabel(f"{len(targets)} explained categories")
    filled = np.count_nonzero(matrix) / max(1, matrix.size)
    axes.set_title(f"Clustered dependency matrix, {filled:.1%} of it nonzero", fontsize=12, loc="left")
    return figure


def _rates(axes: Axes, line: Sequence[ErrorCurvePoint]) -> None:
    """Rates of the argmax with one logit replaced by its refitted dependency."""
    k = [point.support for point in line]
    for name, label, color, marker in (
        ("auc", "AUC of the replaced logit", GREEN, "s"),
        ("precision", "precision of its argmax", PURPLE, "^"),
        ("top5", "recall in the top 5", BLUE, "D"),
        ("recall", "recall of the argmax", ORANGE, "o"),
    ):
        axes.plot(k, [getattr(p, name) for p in line], color=color, marker=marker, ms=4, lw=1.8, label=label)
    axes.set(xscale="log", ylim=(-0.02, 1.04), xlabel="median number of categories in a dependency, k", ylabel="rate")
    axes.legend(fontsize=8, frameon=False, loc="best")


@dataclass(frozen=True)
class _Clustering:
    order: list[int]  # categories in the order of the dendrogram
    members: list[list[int]]  # categories of each cluster, the most central first


def _cluster(cov: Tensor) -> _Clustering:
    """Ward's clustering of standardised logits, whose Euclidean distance is sqrt(2 (1 - correlation))."""
    spread = cov.diagonal().double().clamp_min(0).sqrt()
    scale = torch.where(spread > 0, 1 / spread, 0.0)
    correlation = (cov.double() * scale * scale[:, None]).numpy()
    distance = np.sqrt(2 * np.clip(1 - correlation, 0, None))
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "ward", optimal_ordering=len(cov) <= 1000)
    label = hierarchy.fcluster(tree, min(CLUSTERS, len(cov)), "maxclust")
    clusters = [np.flatnonzero(label == number) for number in np.unique(label)]
    members = [c[np.argsort(-correlation[np.ix_(c, c)].sum(0), kind="stable")].tolist() for c in clusters]
    return _Clustering(hierarchy.leaves_list(tree).tolist(), members)


def _strongest(matrix: Any) -> tuple[Any, int]:
    """Square blocks of a large matrix, each reduced to its entry of largest size to be visible; and their side."""
    side = max(1, round(max(matrix.shape) / 260))
    rows, columns = (-(-size // side) * side for size in matrix.shape)
    padded = np.zeros((rows, columns))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.reshape(rows // side, side, columns // side, side).swapaxes(1, 2).reshape(-1, side * side)
    strongest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)]
    return strongest.reshape(rows // side, columns // side), side


def _label(axis: Axis, shown: Sequence[int], names: Sequence[str], clusters: _Clustering) -> None:
    """Names on an axis of the categories `shown`: each one, or of many the two most central of every cluster."""
    position = {category: place for place, category in enumerate(shown)}
    if len(shown) <= LABELLED_ROWS:
        axis.set_ticks(range(len(shown)), [_short(names[category]) for category in shown], fontsize=7)
        return
    present = [[category for category in members if category in position] for members in clusters.members]
    present = [members for members in present if members]
    centres = [sum(position[category] for category in members) / len(members) for members in present]
    axis.set_ticks(centres, [", ".join(_short(names[j], 18) for j in members[:2]) for members in present], fontsize=7)


def _short(name: str, width: int = 30) -> str:
    return textwrap.shorten(name, width, placeholder="…")


def _amount(report: DependencyReport) -> str:
    """How many positives the rates are measured on."""
    assert report.held_out is not None
    assert report.metrics is not None
    number, name = int(report.metrics.positives.sum()), report.held_out.group_name
    groups = f" of {report.held_out.num_groups} {name}s" if name else ""
    return f"{number} held-out samples{groups}"


def _network_names(report: DependencyReport) -> tuple[str, ...]:
    return ("explained network", "predicting network") if report.between else ("network",)


def _tidy(axes: Axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
