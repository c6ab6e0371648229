"""Figures of a dependency report (covariance spectrum, error against support size, dependencies, clustered matrix,
graph) and of a model matrix.

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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from scipy.cluster import hierarchy
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.distance import squareform
from torch import Tensor

from neuraldeps_kernels.analysis.graph import DependencyGraph, neighbourhood, strongest_part

if TYPE_CHECKING:
    from neuraldeps_kernels.analysis.inputs import Statistics
    from neuraldeps_kernels.analysis.model_matrix import ModelMatrix
    from neuraldeps_kernels.analysis.report import DependencyReport, ErrorCurvePoint

DPI = 130
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2166ac", "#d6604d", "#1b7837", "#762a83", "#777777"
LABELLED_ROWS = 60  # a matrix of more rows names clusters instead of categories
CLUSTERS = 24


def write_all(report: DependencyReport, folder: Path, categories: Sequence[int] | None = None) -> list[Path]:
    """Writes the five figures as PNG into `folder` and returns their paths.

    dependencies.png shows `categories` (default: notable ones), graph.png their neighbourhood (default: the strongest
    dependencies of all).
    """
    figures = {
        "spectrum.png": spectrum(report),
        "error_curve.png": error_curve(report),
        "dependencies.png": dependency_bars(report, report.notable(6) if categories is None else categories),
        "matrix.png": dependency_matrix(report),
        "graph.png": dependency_graph(report, categories),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]


def spectrum(report: DependencyReport) -> Figure:
    """Eigenvalues of the predicting network's logit covariance, and the share of variance that the largest hold."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = torch.linalg.eigvalsh(report.statistics.predictor_cov.cpu().double()).flip(0).clamp_min(0).numpy()
    index = np.arange(1, len(values) + 1)
    share = values / values.sum()
    rank = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    left.plot(index[values > 0], values[values > 0], color=BLUE, lw=1.8)
    right.plot(index, share.cumsum(), color=BLUE, lw=1.8, label=f"entropy effective rank {rank:.0f}")
    for level in (0.5, 0.9, 0.99):
        k = int(np.searchsorted(share.cumsum(), level)) + 1
        right.plot(k, share.cumsum()[k - 1], "o", color=BLUE, ms=5)
        right.annotate(
            f"{k} hold {level:.0%}", (k, level), (6, -12), textcoords="offset points", fontsize=8, color=BLUE
        )
    left.set(xscale="log", yscale="log", xlabel="index of the eigenvalue", ylabel="eigenvalue (squared logit units)")
    whose = " of the predicting network" if report.between else ""
    left.set_title(f"Spectrum of the logit covariance{whose}", fontsize=11, loc="left")
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
        if not line:
            continue
        k = [point.support for point in line]
        left.plot(
            k, [p.residual_ratio_fit for p in line], "--", color=color, lw=1.4, label=f"{name}, samples of the fit"
        )
        if measured:
            error = [point.residual_ratio for point in line]
            left.plot(k, error, "o-", color=color, lw=2, ms=4, label=f"{name}, held out")
            low, high = zip(*(point.residual_ratio_quartiles for point in line), strict=True)
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
        _rates(right, [point for point in points if point.refit != report.problem.nonnegative])
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
    """All coefficients, rows and columns ordered by hierarchical clustering of the logits."""
    n, statistics = report.statistics.sizes[0], report.statistics
    columns = _cluster(_correlation(statistics.predictor_cov))
    rows = _cluster(_profile_similarity(statistics)) if report.between else columns
    row_of = {target: row for row, target in enumerate(report.targets.tolist())}
    targets = [target for target in rows.order if target in row_of]
    dense = report.coefficients.to_dense().double()[[row_of[target] for target in targets]]
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


def dependency_graph(
    report: DependencyReport, categories: Sequence[int] | None = None, *, top: int = 4, nodes: int = 48
) -> Figure:
    """A part of the dependency graph that can be read: arrows lead from a predicting category to the explained one.

    The `top` strongest predictors of each of `categories`; without them the largest connected parts of
    the edges of largest |coefficient|, `nodes` categories at most.
    """
    whole = report.to_graph()
    if categories is None:
        graph, title = strongest_part(whole.strongest(top), nodes), "Strongest dependencies"
    else:
        graph, title = neighbourhood(whole, categories, top), f"The {top} strongest predictors of each chosen category"
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots()
    place = _layout(graph)
    _draw_edges(axes, graph, place)
    resampled = report.stability is not None
    for node, name in enumerate(graph.names):
        explained = graph.in_degree[node] > 0
        color = PURPLE if graph.networks[node] == "predicting" else BLUE if explained else GREY
        axes.plot(*place[node], "o", color=color, ms=5 if explained else 4, zorder=3)
        axes.annotate(
            _short(name, 24), place[node], (0, 6), textcoords="offset points", ha="center", fontsize=7.5, zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
    axes.set_axis_off()
    axes.margins(0.06)
    parts = int(graph.component.max()) + 1 if graph.num_nodes else 0
    shown = f"{len(graph.source)} of {len(whole.source)} edges, {graph.num_nodes} of {whole.num_nodes} categories"
    axes.set_title(f"{title}: {shown}, {parts} connected parts", fontsize=12, loc="left")
    legend = "blue: positive coefficient, orange: negative; width: size"
    if report.between:
        legend += "; purple: categories of the predicting network"
    if resampled:
        legend += "; dashed: in less than 80 % of the resamples"
    axes.text(0, 0, legend, transform=axes.transAxes, fontsize=8.5, color=GREY, va="top")
    return figure


def model_matrix(matrix: ModelMatrix) -> Figure:
    """Heat map of the median R of every ordered pair of networks: held out where measured, else on the fit."""
    held_out = matrix.matrix("residual_ratio")
    measured = bool(held_out.isfinite().any())
    values = (held_out if measured else matrix.matrix("residual_ratio_fit")).numpy()
    support, error = matrix.matrix("support"), matrix.matrix("residual_ratio_error")
    M = len(matrix.names)
    figure = Figure(figsize=(3.2 + 1.35 * M, 1.9 + 1.1 * M), layout="constrained")
    axes = figure.subplots()
    limit = max(1.0, float(np.nanmax(values, initial=0)))
    image = axes.imshow(values, cmap="viridis_r", norm=Normalize(0, limit))
    for row in range(M):
        for column in range(M):
            text = f"{values[row, column]:.2f}" + (f" ± {error[row, column]:.2f}" if measured else "")
            axes.text(
                column, row, f"{text}\nk {support[row, column]:.0f}", ha="center", va="center", fontsize=9,
                color="white" if values[row, column] > limit / 2 else "black",
            )  # fmt: skip
    axes.set_xticks(range(M), [_short(name) for name in matrix.names], rotation=30, ha="right")
    axes.set_yticks(range(M), [_short(name) for name in matrix.names])
    axes.set(xlabel="predicting network", ylabel="explained network")
    where = "held out" if measured else "samples of the fit"
    axes.set_title(f"Residual / variance R, median over categories, {where}", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8, label="R")
    return figure


def _draw_edges(axes: Axes, graph: DependencyGraph, place: Any) -> None:
    """An arrow a dependency, opposite ones bent apart."""
    largest = float(graph.coefficient.abs().max()) if len(graph.coefficient) else 1.0
    edges = (graph.source, graph.target, graph.coefficient, graph.frequency)
    for source, target, coefficient, frequency in zip(*(column.tolist() for column in edges), strict=True):
        style = {
            "arrowstyle": "-|>,head_width=0.18,head_length=0.35",
            "connectionstyle": "arc3,rad=0.12",
            "color": BLUE if coefficient > 0 else ORANGE,
            "lw": 0.5 + 2 * abs(coefficient) / largest,
            "alpha": 0.7,
            "linestyle": "dashed" if frequency < 0.8 else "solid",
            "shrinkA": 4,
            "shrinkB": 4,
        }
        axes.annotate("", place[target], place[source], arrowprops=style, zorder=2)


def _layout(graph: DependencyGraph) -> Any:
    """Places [V, 2]: each connected part by stress majorization, the parts side by side in rows, the largest first."""
    place = np.zeros((graph.num_nodes, 2))
    component = graph.component.numpy()
    x = y = height = 0.0
    width = 1.6 * sum(_extent((component == part).sum()) ** 2 for part in np.unique(component)) ** 0.5
    for part in np.unique(component):
        nodes = np.flatnonzero(component == part)
        side = _extent(len(nodes))
        if x > 0 and x + side > width:
            x, y, height = 0.0, y - height, 0.0
        inside = _stress_layout(graph, nodes)
        place[nodes] = inside * side * 0.8 + (x + side / 2, y - side / 2)
        x, height = x + side, max(height, side)
    return place


def _extent(nodes: int) -> float:
    """Side of the square that a connected part is drawn in."""
    return float(np.sqrt(nodes)) + 0.6


def _stress_layout(graph: DependencyGraph, nodes: Any) -> Any:
    """Places [v, 2] in [-1/2, 1/2]^2 of a connected part, so that drawn distances follow the graph's.

    Minimises sum_ab d_ab^-2 (|x_a - x_b| - d_ab)^2 over the places x, d the numbers of edges between nodes (direction
    ignored), from classical scaling; each step is a weighted mean of where the others want a node (Gansner, Koren and
    North).
    """
    ones = np.ones(len(graph.source))
    edges = coo_array((ones, (graph.source.numpy(), graph.target.numpy())), shape=(graph.num_nodes,) * 2)
    d = shortest_path(edges.tocsr()[nodes][:, nodes], directed=False, unweighted=True)
    if len(nodes) < 2:
        return np.zeros((len(nodes), 2))
    centred = d**2 - (d**2).mean(0) - (d**2).mean(1)[:, None] + (d**2).mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    x = vectors[:, -2:] * np.sqrt(np.clip(values[-2:], 1e-3, None))
    x = x + 1e-2 * np.random.default_rng(0).standard_normal(x.shape)  # nodes of equal distances must not coincide
    weight = 1 / np.where(d > 0, d, np.inf) ** 2
    for _ in range(300):
        apart = x[:, None] - x[None]  # [v, v, 2]
        length = np.linalg.norm(apart, axis=2)
        pull = weight * d / np.where(length > 1e-9, length, np.inf)
        x = (weight @ x + (pull[:, :, None] * apart).sum(1)) / weight.sum(1)[:, None]
    x = x - (x.max(0) + x.min(0)) / 2
    return x / max(1e-9, 2 * np.abs(x).max())


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


def _correlation(cov: Tensor) -> Any:
    """Of a covariance [n, n], float64; 0 with a constant."""
    spread = cov.diagonal().double().clamp_min(0).sqrt()
    scale = torch.where(spread > 0, 1 / spread, 0.0)
    return (cov.double() * scale * scale[:, None]).cpu().numpy()


def _profile_similarity(statistics: Statistics) -> Any:
    """Cosine between explained categories of their covariances with the standardised predicting ones, float64 [n, n].

    Between two networks the covariance among the explained categories is not known.
    """
    spread = statistics.predictor_cov.diagonal().double().clamp_min(0).sqrt()
    profile = statistics.cross.double() * torch.where(spread > 0, 1 / spread, 0.0)
    return _correlation(profile @ profile.T)


def _cluster(correlation: Any) -> _Clustering:
    """Ward's clustering of unit vectors with the scalar products `correlation`: distance sqrt(2 (1 - correlation))."""
    distance = np.sqrt(2 * np.clip(1 - correlation, 0, None))
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "ward", optimal_ordering=len(distance) <= 1000)
    label = hierarchy.fcluster(tree, min(CLUSTERS, len(distance)), "maxclust")
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


def _tidy(axes: Axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
