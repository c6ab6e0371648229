"""Figures of a rank profile (ranks by depth, decay of the Jacobian's singular values, accuracy by dimension) and of
independence deficits.

Drawn on a figure of its own, without pyplot: nothing global changes, no display is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuraldeps_kernels.analysis.plots import BLUE, DPI, GREY, ORANGE, PURPLE

if TYPE_CHECKING:
    from neuraldeps_kernels.analysis.independence_deficit import IndependenceDeficit
    from neuraldeps_kernels.analysis.rank_profile import ClassificationDimension, JacobianRanks, RankProfile

__all__ = ["DPI", "deficits", "profile"]

_DEPENDENCIES = 12  # a panel
_TERMS = 3  # of a dependency that are written out

_COUNTS = {
    "jacobian": (BLUE, "o-", "Jacobian, authors' rule"),
    "jacobian_default": (BLUE, "o:", "Jacobian, default rule"),
    "jacobian_effective": (PURPLE, "s--", "Jacobian, entropy effective rank"),
    "pca": (ORANGE, "^-", "perturbed PCA dimension"),
}


def profile(found: RankProfile) -> Figure:
    """One panel for each measure of `found`, the first for all ranks by depth."""
    panels = [bool(found.layers), found.jacobian is not None, found.classification is not None]
    ratios = [width for width, shown in zip((1.5, 1.0, 1.0), panels, strict=True) if shown]
    figure = Figure(figsize=(2 + 4.6 * sum(ratios), 5.2), layout="constrained")
    axes = list(figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0])
    if found.layers:
        _depth(axes.pop(0), found)
    if found.jacobian is not None:
        _decay(axes.pop(0), found, found.jacobian)
    if found.classification is not None:
        _accuracy(axes.pop(0), found.classification)
    figure.suptitle(textwrap.fill(found.describe(), 40 + 50 * len(ratios)), fontsize=10, x=0.01, ha="left")
    return figure


def _depth(axes: Axes, found: RankProfile) -> None:
    means, errors = found.mean_ranks(), found.standard_errors()
    depth = np.arange(len(found.layers))
    for name, (color, style, label) in _COUNTS.items():
        if name in means:
            error = errors[name].nan_to_num(0).numpy()
            axes.errorbar(depth, means[name].numpy(), error, fmt=style, color=color, ms=4, lw=1.6, label=label)
    if found.jacobian is not None:
        axes.axhline(found.jacobian.coordinates, color=GREY, lw=0.8, ls=":")
    axes.set_xticks(depth, [layer.name for layer in found.layers], rotation=90, fontsize=7)
    axes.set(ylim=(0, None), ylabel="numerical rank")
    axes.set_title("Rank by depth (bars: standard error over inputs)", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _decay(axes: Axes, found: RankProfile, jacobian: JacobianRanks) -> None:
    """sigma_i / sigma_1 of at most eight layers, geometric mean over inputs."""
    L = len(found.layers)
    for k in sorted({round(step * (L - 1) / 7) for step in range(8)}):
        sigma = jacobian.singular_values[:, k]
        relative = (sigma / sigma[:, :1].clamp_min(1e-300)).clamp_min(1e-12).log().mean(0).exp()
        color = colormaps["viridis"](0.92 * k / max(1, L - 1))
        axes.plot(
            np.arange(1, len(relative) + 1), relative, color=color, lw=1.4, label=found.layers[k].name.lstrip("_")
        )
    axes.axhline(jacobian.cut, color=GREY, lw=0.9, ls="--")
    axes.set(yscale="log", ylim=(1e-6, 1.5), xlabel="index i", ylabel="singular value i / largest")
    axes.set_title("Singular values of the Jacobian (dashed: cut)", fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _accuracy(axes: Axes, found: ClassificationDimension) -> None:
    axes.plot(np.arange(found.width + 1), found.accuracy, color=BLUE, lw=1.6)
    axes.axhline(found.share * found.original, color=GREY, lw=0.9, ls="--")
    axes.axvline(found.dimension, color=ORANGE, lw=1.2)
    axes.set(xlabel="principal components kept", ylim=(0, 1.03))
    axes.set_ylabel("accuracy" if found.true_labels else "agreement with the own argmax")
    axes.set_title(f"Classification dimension {found.dimension} of {found.width}", fontsize=10, loc="left")
    _tidy(axes)


def deficits(found: Mapping[str, IndependenceDeficit]) -> Figure:
    """Relative logit error on the positives by number of predictors, and the dependencies of least error of each."""
    figure = Figure(figsize=(5 + 6.2 * len(found), 5.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(found), squeeze=False, width_ratios=[1.0] + [1.3] * len(found))[0]
    colors = [BLUE, ORANGE, PURPLE]
    for index, (name, deficit) in enumerate(found.items()):
        pairs = [(len(c.predictors), c.replaced["positives"].logit_relative_error) for c in deficit.categories]
        number, error = np.array(pairs, dtype=float).reshape(-1, 2).T
        axes[0].plot(number, error, "o", color=colors[index % 3], ms=4, alpha=0.6, label=name)
        _clearest(axes[1 + index], deficit, colors[index % 3])
        axes[1 + index].set_title(
            textwrap.fill(f"{name}: {deficit.describe()}".lstrip(": "), 62), fontsize=9, loc="left"
        )
    axes[0].set(xlabel="predictors", ylabel="mean relative error of the replaced logit", ylim=(0, None))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title("Every category, on its positives", fontsize=10, loc="left")
    if any(found):
        axes[0].legend(fontsize=8, frameon=False)
    _tidy(axes[0])
    return figure


def _clearest(axes: Axes, deficit: IndependenceDeficit, color: str) -> None:
    """Bars of the least relative logit errors, with the largest terms of their dependencies."""
    with_terms = [category for category in deficit.categories if category.predictors]
    shown = sorted(with_terms, key=lambda c: c.replaced["positives"].logit_relative_error)[:_DEPENDENCIES]
    errors = [category.replaced["positives"].logit_relative_error for category in shown]
    short = [textwrap.shorten(name, 22, placeholder="…") for name in deficit.class_names]
    axes.barh(np.arange(len(shown)), errors, color=color, alpha=0.35)
    for row, category in enumerate(shown):
        terms = list(zip(category.predictors, category.coefficients, strict=True))
        text = ", ".join(f"{value:+.2f} {short[j]}" for j, value in terms[:_TERMS])
        axes.text(0, row, f" {text}{', …' if len(terms) > _TERMS else ''}", va="center", fontsize=7)
    axes.set_yticks(np.arange(len(shown)), [short[category.category] for category in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("mean relative error of the replaced logit")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
