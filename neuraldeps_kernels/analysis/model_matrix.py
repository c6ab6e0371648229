"""How well each of several networks is expressed by each: dependencies within every network and between every ordered
pair, on the same held-out samples.

Source: the between-network experiment of the notes on "Neural Dependencies Emerging from Learning Massive Categories"
(arXiv 2211.12339), section 6; the figures reported are ours.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuraldeps_kernels.analysis.dependencies import find_dependencies
from neuraldeps_kernels.analysis.formatting import cell, json_text, quantile, without_nan, written
from neuraldeps_kernels.analysis.report import DependencyReport
from neuraldeps_kernels.progress import track

if TYPE_CHECKING:
    from rich.table import Table

_NOT_SHARED = ("class_names", "predictors", "predictor_names", "loader", "candidates", "resamples")
_OF_A_PAIR = ("between_networks", "exclude_same")  # settings that differ between the pairs


@dataclass(frozen=True)
class PairFigures:
    """Dependencies of all categories of one network on another (or itself). Medians are over categories.

    R = residual / variance. What needs held-out samples is NaN without them.
    """

    explained: str
    predicting: str
    support: float  # median number of predicting categories
    residual_ratio_fit: float  # median R on the samples of the fit
    residual_ratio: float  # median R on held-out samples
    residual_ratio_error: float  # its standard error, a bootstrap over groups
    residual_ratio_quartiles: tuple[float, float]
    recall: float  # of all held-out samples, how many keep their argmax with that logit alone replaced
    top5: float  # the same for the five largest
    auc: float  # how well replaced logits rank samples, mean over categories that occur


@dataclass(frozen=True, eq=False)
class ModelMatrix:
    """The figures of all ordered pairs of M networks, a network with itself included."""

    names: tuple[str, ...]  # [M]
    pairs: tuple[PairFigures, ...]  # [M * M], by explained and then by predicting network
    what: str  # one sentence: on how much it was measured
    cautions: tuple[str, ...]
    settings: dict[str, Any]

    def matrix(self, figure: str) -> Tensor:
        """One figure of every pair, float64 [M, M]: rows are explained, columns predict."""
        if figure not in {field.name for field in fields(PairFigures) if field.type == "float"}:
            raise ValueError(f"figure must be a number of PairFigures, got {figure!r}")
        values = [getattr(pair, figure) for pair in self.pairs]
        return torch.tensor(values, dtype=torch.float64, device="cpu").view(len(self.names), len(self.names))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; NaN becomes None."""
        return {
            "what": self.what,
            "cautions": list(self.cautions),
            "settings": self.settings,
            "networks": list(self.names),
            "pairs": [without_nan(asdict(pair)) for pair in self.pairs],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        return written(json_text(self.to_dict()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a pair, as CSV text, also written to `path` if given; unknown figures are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [field.name for field in fields(PairFigures) if field.type != "tuple[float, float]"]
        writer.writerow((*names, "residual_ratio_quartile_1", "residual_ratio_quartile_3"))
        for pair in self.pairs:
            values = [*(getattr(pair, name) for name in names), *pair.residual_ratio_quartiles]
            writer.writerow([_csv_cell(value) for value in values])
        return written(text.getvalue(), path)

    def table(self) -> Table:
        """A rich table: a row an explained network, a column a predicting one."""
        from rich.table import Table

        held_out = any(pair.residual_ratio == pair.residual_ratio for pair in self.pairs)
        table = Table(title=self.what, title_justify="left", title_style="", caption_justify="left")
        table.add_column("explained", no_wrap=True)
        for name in self.names:
            table.add_column(f"by {name}", justify="right", no_wrap=True)
        for row, name in enumerate(self.names):
            pairs = self.pairs[row * len(self.names) : (row + 1) * len(self.names)]
            table.add_row(name, *(_pair_cell(pair, held_out) for pair in pairs))
        table.caption = "R = residual / variance, median over categories"
        table.caption += ", held out ± its bootstrap error (on the fit)" if held_out else ", on the samples of the fit"
        table.caption += "; k = median number of predicting categories."
        return table

    def plot(self, path: str | Path) -> Path:
        """Writes a heat map of R as PNG and returns its path. Needs matplotlib."""
        from neuraldeps_kernels.analysis import plots

        plots.model_matrix(self).savefig(path, dpi=plots.DPI)
        return Path(path)


def model_matrix(
    streams: Mapping[str, Tensor],
    *,
    exclude_same: bool | None = None,
    targets: Sequence[int] | None = None,
    **options: Any,
) -> ModelMatrix:
    """Finds the dependencies of every network on every one, itself included, all with the same options.

    Args:
        streams: logits [N, n_k] of each network by name, the same N samples in the same order; n_k may differ.
        exclude_same: between networks, as in `find_dependencies`.
        targets: categories to explain, of every network; default all.
        options: of `find_dependencies`: sparsity (lam_ratio, lam, top_k, select, ...), standardize, nonnegative, ridge,
            refit, held_out as a share or None, labels, groups, group_name, seed, tol.

    Raises:
        ValueError, TypeError: as `find_dependencies`; fewer than two networks; an option that belongs to one pair.
    """
    if len(streams) < 2:
        raise ValueError(f"streams must hold the logits of at least 2 networks, got {len(streams)}")
    wrong = [name for name in options if name in _NOT_SHARED]
    if wrong or not isinstance(options.get("held_out", 0.2), (float, int, type(None))):
        raise ValueError(f"{wrong[0] if wrong else 'held_out as logits'} belongs to one pair of networks, not to all")
    lengths = {name: len(stream) for name, stream in streams.items()}
    first = next(iter(lengths))
    for name, length in lengths.items():
        if length != lengths[first]:
            raise ValueError(f"streams must have the same samples: {name} has {length}, {first} {lengths[first]}")
    pairs = list(product(streams, repeat=2))
    figures: list[PairFigures] = []
    cautions: dict[str, None] = {}
    for explained, predicting in track(pairs, "pairs of networks", len(pairs)):
        between: dict[str, Any] = (
            {} if explained == predicting else {"predictors": streams[predicting], "exclude_same": exclude_same}
        )
        report = find_dependencies(streams[explained], targets=targets, **between, **options)
        figures.append(_figures(report, explained, predicting))
        cautions |= dict.fromkeys(report.cautions())
    what = f"{len(streams)} networks, each explained by each: {report.describe_fit()}; {report.describe_measurement()}"
    settings = {name: value for name, value in report.settings().items() if name not in _OF_A_PAIR}
    return ModelMatrix(tuple(streams), tuple(figures), what, tuple(cautions), settings)


def _figures(report: DependencyReport, explained: str, predicting: str) -> PairFigures:
    summary = report.summary()

    def known(name: str) -> float:
        value = summary.get(name)
        return math.nan if value is None else float(value)

    ratio = (
        report.residual_ratio_fit.new_full((1,), math.nan) if report.metrics is None else report.metrics.residual_ratio
    )
    return PairFigures(
        explained=explained,
        predicting=predicting,
        support=known("support_median"),
        residual_ratio_fit=known("residual_ratio_fit_median"),
        residual_ratio=known("residual_ratio_median"),
        residual_ratio_error=known("residual_ratio_median_error"),
        residual_ratio_quartiles=(quantile(ratio, 0.25), quantile(ratio, 0.75)),
        recall=known("recall"),
        top5=known("top5"),
        auc=known("auc"),
    )


def _pair_cell(pair: PairFigures, held_out: bool) -> str:
    fit, k = cell(pair.residual_ratio_fit), f"k {pair.support:.0f}"
    if not held_out:
        return f"{fit}  {k}"
    return f"{cell(pair.residual_ratio)} ± {cell(pair.residual_ratio_error)} ({fit})  {k}"


def _csv_cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
