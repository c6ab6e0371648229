"""Independence deficit: the logit of a category as a sparse linear combination of the others', from its own samples.

For category i with the m samples of that label (its positives), X [m, n] their logits without column i, y column i:

    theta_i = argmin  (1/m) |X theta - y|^2 + lam |theta|_1

without intercept and uncentred by default, as in the authors' code: CovLasso on S = (1/m) L' L. Their penalty, 20, is
tied to the scale of the logits; `lam_ratio`, a fraction of lambda_max, is not. What is left of the confidence once
logit i is replaced by X theta is measured on the positives, on the other samples, and on all.

Inspired by "Rank Diminishing in Deep Neural Networks" (arXiv 2206.06072), section 6 of its notes; the exact solver and
measuring on other samples than those of the fit are ours.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuraldeps_kernels.analysis.formatting import cell, json_text, without_nan, written
from neuraldeps_kernels.analysis.inputs import checked_names
from neuraldeps_kernels.ops.covariance import covariance
from neuraldeps_kernels.ops.covlasso import STATUS_NAMES, covlasso
from neuraldeps_kernels.progress import track

if TYPE_CHECKING:
    from rich.table import Table

AUTHORS_LAM = 20.0
OUR_LAM_RATIO = 0.1
FEW_POSITIVES = 10
SAMPLE_SETS = ("positives", "negatives", "all")


@dataclass(frozen=True)
class ReplacedLogit:
    """What replacing logit i does on one set of samples. y is the logit or the softmax probability of i, yhat the new.

    Variances are unbiased; NaN for fewer than two samples, all figures NaN without samples.
    """

    samples: int
    logit_relative_error: float  # mean of |yhat - y| / |y|
    logit_relative_variance: float
    logit_error: float  # mean of |yhat - y|
    logit_variance: float
    probability_relative_error: float
    probability_relative_variance: float
    probability_error: float
    probability_variance: float
    called_before: float  # share of the samples whose argmax is i: on the positives the accuracy
    called_after: float


@dataclass(frozen=True)
class CategoryDeficit:
    """The dependency of one category."""

    category: int
    positives: int  # m, samples of the fit with this label
    lam: float
    lambda_max: float
    relative_error: float  # (1/m) |X theta - y|^2 over (1/m) |y|^2 (of y minus its mean if centred), all coefficients
    status: str  # one of STATUS_NAMES
    predictors: tuple[int, ...]  # by falling |coefficient|, of those kept
    coefficients: tuple[float, ...]
    replaced: dict[str, ReplacedLogit]  # by sample set: positives, negatives, all

    @property
    def lam_ratio(self) -> float:
        """lam / lambda_max; infinite where no category correlates."""
        return self.lam / self.lambda_max if self.lambda_max else float("inf")


@dataclass(frozen=True)
class IndependenceDeficit:
    """Dependencies of all categories that have positives enough."""

    categories: tuple[CategoryDeficit, ...]
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    skipped: int  # categories with fewer than two positives

    def describe(self) -> str:
        """One sentence: what was fitted and what it was measured on."""
        s = self.settings
        penalty = self._penalty()
        rows = "the positives" if s["positives_only"] else "all samples"
        kept = "" if s["top_k"] is None else f", the {s['top_k']} largest coefficients kept"
        where = "other samples" if s["evaluated_on_other_samples"] else "the samples of the fit"
        centre = "centred" if s["center"] else "uncentred"
        labels = "" if s["given_labels"] else "; labels are the network's own argmax"
        return (
            f"{len(self.categories)} categories from {rows} of each, {centre}, {penalty}{kept}; measured on {where}"
            f"{labels}"
        )

    def cautions(self) -> list[str]:
        """What a reader of the numbers must know."""
        found = []
        if self.skipped:
            found.append(f"deficit: {self.skipped} of {len(self.class_names)} categories have no two positives")
        few = sum(category.positives < FEW_POSITIVES for category in self.categories)
        if few and self.settings["positives_only"] and not self.settings["evaluated_on_other_samples"]:
            found.append(
                f"deficit: {few} categories are fitted to and measured on fewer than {FEW_POSITIVES} samples, which "
                "flatters them; the authors had 50"
            )
        empty = sum(not category.predictors for category in self.categories)
        if empty:
            found.append(
                f"deficit: {empty} categories have no predictor: {self._penalty()} is at least their lambda_max"
            )
        return found

    def _penalty(self) -> str:
        lam, ratio = self.settings["lam"], self.settings["lam_ratio"]
        return f"penalty {lam:g}" if lam is not None else f"penalty {ratio:g} of lambda_max"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; NaN and infinity become None."""
        rows = [
            asdict(found) | {"name": self.class_names[found.category], "lam_ratio": found.lam_ratio}
            for found in self.categories
        ]
        content = {
            "what": self.describe(),
            "cautions": self.cautions(),
            "settings": self.settings,
            "skipped_categories": self.skipped,
            "categories": rows,
        }
        return without_nan(content)  # type: ignore[no-any-return]

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        return written(json_text(self.to_dict()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a dependency, by category and falling |coefficient|, as CSV text, also written to `path`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("category", "category_name", "predictor", "predictor_name", "coefficient"))
        for found in self.categories:
            for j, value in zip(found.predictors, found.coefficients, strict=True):
                names = (self.class_names[found.category], self.class_names[j])
                writer.writerow((found.category, names[0], j, names[1], f"{value:.9g}"))
        return written(text.getvalue(), path)

    def table(self, categories: Sequence[int] | None = None, *, count: int = 10, top: int = 4) -> Table:
        """A rich table of `categories`, default the `count` of least relative logit error on positives."""
        from rich.table import Table

        table = Table(title=self.describe(), title_justify="left", title_style="", caption_justify="left")
        table.add_column("category", no_wrap=True, max_width=24)
        for name in ("m", "ratio", "k", "logit", "prob.", "top 1", "after"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"dependency (at most {top} terms)", min_width=12)
        row_of = {found.category: found for found in self.categories}
        by_error = sorted(self.categories, key=lambda found: found.replaced["positives"].logit_relative_error)
        for found in by_error[:count] if categories is None else [row_of[category] for category in categories]:
            on = found.replaced["positives"]
            shares = (on.logit_relative_error, on.probability_relative_error, on.called_before, on.called_after)
            pairs = list(zip(found.predictors, found.coefficients, strict=True))[:top]
            terms = ", ".join(f"{value:+.2f} {self.class_names[j]}" for j, value in pairs)
            numbers = (str(found.positives), cell(found.lam_ratio), str(len(found.predictors)))
            table.add_row(self.class_names[found.category], *numbers, *map(cell, shares), terms)
        table.caption = (
            "m: positives; ratio: penalty over lambda_max. On the positives: mean relative error of the replaced logit "
            "and of its softmax probability; share whose argmax is the category, before and after."
        )
        return table

    def plot(self, path: str | Path) -> Path:
        """Writes errors by number of predictors and the clearest dependencies as one PNG.

        Needs matplotlib. Returns the path.
        """
        from neuraldeps_kernels.analysis import rank_plots

        rank_plots.deficits({"": self}).savefig(path, dpi=rank_plots.DPI)
        return Path(path)


def independence_deficit(
    logits: Tensor,
    labels: Tensor | None = None,
    categories: Sequence[int] | None = None,
    *,
    lam: float | None = None,
    lam_ratio: float | None = None,
    top_k: int | None = None,
    center: bool = False,
    positives_only: bool = True,
    evaluate: tuple[Tensor, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    tol: float = 1e-6,
) -> IndependenceDeficit:
    """Finds, from each category's own samples, the few logits that decide its logit, and what replacing it costs.

    Args:
        logits: [N, n] before the softmax, n >= 2.
        labels: int64 [N], default the argmax of `logits`.
        categories: which to explain, each once; default all with at least two positives.
        lam: penalty in squared logit units; default 20, the authors' value, where `lam_ratio` is not given.
        lam_ratio: penalty as a fraction of each category's lambda_max, our choice for logits of another scale.
        top_k: keep that many coefficients of largest magnitude and drop the rest, without a refit.
        center: subtract means and predict with them as intercept; the authors' code does not.
        positives_only: fit on the samples labelled i; else on all samples.
        evaluate: logits [N', n] and labels [N'] to measure on, default those of the fit.
        class_names: n names, default numbers.
        tol: of the solver, as in `covlasso`.

    Raises:
        ValueError: shapes that do not fit, NaN, labels out of range, a category without two positives, both of `lam`
            and `lam_ratio`; and as `covlasso`.
    """
    y = _checked_samples("logits", logits, labels)
    if evaluate is not None and (len(evaluate) != 2 or evaluate[0].shape[1:] != logits.shape[1:]):
        raise ValueError(f"evaluate must be logits [N', {logits.shape[1]}] and labels [N']")
    if lam is not None and lam_ratio is not None:
        raise ValueError("lam and lam_ratio must not both be given")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if lam is None and lam_ratio is None:
        lam = AUTHORS_LAM
    measured = (logits, y) if evaluate is None else (evaluate[0], _checked_samples("evaluate", *evaluate))
    positives = y.bincount(minlength=logits.shape[1])
    chosen = (positives >= 2).nonzero()[:, 0].tolist() if categories is None else list(categories)
    names = checked_names("class_names", class_names, logits.shape[1])
    for i in chosen:
        if not 0 <= i < len(positives) or int(positives[i]) < 2 or chosen.count(i) > 1:
            raise ValueError(f"categories must be distinct and have at least two positives, got {i}")
    found = []
    for i in track(chosen, "independence deficit", len(chosen)):
        rows = (logits[y == i] if positives_only else logits).double()
        S = covariance(rows, center=center, correction=0)
        solution = covlasso(S, lam, lam_ratio=lam_ratio, targets=[i], tol=tol)
        theta = _largest(solution.dense()[0].double(), top_k)
        order = theta.abs().argsort(descending=True)[: int(theta.count_nonzero())]
        found.append(
            CategoryDeficit(
                category=i,
                positives=int(positives[i]),
                lam=float(solution.lam),
                lambda_max=float(solution.lambda_max),
                relative_error=float(solution.relative_error),
                status=STATUS_NAMES[int(solution.status)],
                predictors=tuple(order.tolist()),
                coefficients=tuple(theta[order].tolist()),
                replaced=_replaced(i, theta, rows.mean(0) if center else None, *measured),
            )
        )
    settings = {
        "lam": lam,
        "lam_ratio": lam_ratio,
        "top_k": top_k,
        "center": center,
        "positives_only": positives_only,
        "evaluated_on_other_samples": evaluate is not None,
        "given_labels": labels is not None,
        "tol": tol,
    }
    skipped = int((positives < 2).sum()) if categories is None else 0
    return IndependenceDeficit(tuple(found), names, settings, skipped)


def _largest(theta: Tensor, top_k: int | None) -> Tensor:
    """theta [n] with all but its top_k entries of largest magnitude set to zero."""
    if top_k is None or top_k >= len(theta):
        return theta
    kept = theta.abs().topk(top_k).indices
    return torch.zeros_like(theta).index_copy(0, kept, theta[kept])


def _replaced(i: int, theta: Tensor, mean: Tensor | None, logits: Tensor, y: Tensor) -> dict[str, ReplacedLogit]:
    """Figures of each sample set. theta [n] is zero at i."""
    L = logits.double()
    predicted = L @ theta if mean is None else (L - mean) @ theta + mean[i]
    after = L.clone()
    after[:, i] = predicted
    probability = [values.softmax(1)[:, i] for values in (L, after)]
    called = [(values.argmax(1) == i).double() for values in (L, after)]
    masks = {"positives": y == i, "negatives": y != i, "all": torch.ones_like(y, dtype=torch.bool)}
    return {
        name: ReplacedLogit(
            int(mask.sum()),
            *_errors(L[mask, i], predicted[mask]),
            *_errors(probability[0][mask], probability[1][mask]),
            *(float(share[mask].mean()) for share in called),
        )
        for name, mask in masks.items()
    }


def _errors(y: Tensor, yhat: Tensor) -> tuple[float, float, float, float]:
    """Mean and unbiased variance of the relative error, and of the absolute one."""
    absolute = (yhat - y).abs()
    figures = []
    for error in (absolute / y.abs(), absolute):
        figures += [float(error.mean()), float(error.var()) if len(error) > 1 else float("nan")]
    return figures[0], figures[1], figures[2], figures[3]


def _checked_samples(name: str, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Labels int64 [N]."""
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"{name} must be floating logits [N, n] with n >= 2, got {logits.dtype} {list(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
    if labels is None:
        return logits.argmax(1)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers [{len(logits)}], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels must be from 0 to {logits.shape[1] - 1}")
    return labels.to(logits.device, torch.int64)
