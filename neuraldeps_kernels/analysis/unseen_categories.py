"""Categories that a network was not trained on, added to it through dependencies on those that it knows.

A base network has logits g [N, U] for U seen categories. A scorer, trained on its own, has logits t [N, V] for V unseen
ones. On samples seen by both, whose labels are not needed, the CovLasso between the networks gives theta_v [U], and

    h_v = m_v + sum_u theta_vu (g_u - m_u)

continues the base network by V logits that are linear in its own; the scorer is not needed any more. m are means.

What makes [g, a h + b] comparable. The argmax over all U + V logits compares numbers of two networks. The h are in the
units of the scorer, so one scale a > 0 and one offset b, common to all unseen categories, take them to those of the
base; the order within the seen and within the unseen is left alone. A softmax network also knows its logits only up to
a number common to all categories of a sample, so the mean over the seen categories is taken off g first and, where the
scorer's logits s [N, U] for the seen categories are given, the mean of s off t. Then a and b come from

    "labels"   the cross-entropy of softmax [g, a h + b], convex in (a, b), least on labelled samples; or
    "anchors"  the seen categories, which both networks score: a is the ratio of the root mean squares of g and s over
               samples and seen categories, and b gives the unseen categories as many samples as the scorer gives them,
               by their argmax. Needs no labels;
    "none"     a = 1, b = 0.

Source: inspired by "Neural Dependencies Emerging from Learning Massive Categories" (arXiv 2211.12339), which names the
use. The protocol, the calibration and the baselines are ours: the paper's own were not available to us.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from neuraldeps_kernels.analysis.formatting import cell, json_text, without_nan, written
from neuraldeps_kernels.ops.covariance import cross_covariance
from neuraldeps_kernels.ops.covlasso import covlasso

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_LAM_RATIO = 0.02
Calibration = Literal["labels", "anchors", "none"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the networks say about N samples, any floating dtype."""

    base: Tensor  # g [N, U]
    scorer: Tensor | None = None  # t [N, V]; needed for the samples that dependencies come from
    scorer_seen: Tensor | None = None  # s [N, U], the scorer's logits for the seen categories, if it has them
    features: Tensor | None = None  # [N, d], for the baselines; default the base logits
    labels: Tensor | None = None  # int64 [N]: 0 to U - 1 seen, U to U + V - 1 unseen


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of one way to have U + V categories; NaN where there are no such samples."""

    name: str
    seen: float  # of samples whose label is seen
    unseen: float
    overall: float
    among_unseen: float  # of samples whose label is unseen, with the unseen categories alone to choose from
    labels_used: int  # labelled samples, beyond the training of base and scorer


@dataclass(frozen=True, eq=False)
class UnseenCategoriesReport:
    """The extended network and how it does beside other ways to add categories."""

    coefficients: Tensor  # theta float64 [V, U]
    predictor_mean: Tensor  # float64 [U], of g less its mean over the seen categories
    target_mean: Tensor  # float64 [V], of t, likewise
    scale: float  # a
    offset: float  # b, in units of the base logits
    calibration: Calibration
    lam_ratio: float
    samples: int  # that the dependencies come from
    support: tuple[int, ...]  # [V] number of nonzero coefficients
    residual_ratio_fit: tuple[float, ...]  # [V] mean squared residual / variance of t_v, on the fit
    residual_ratio: tuple[float, ...]  # the same on the test samples; NaN where the scorer has no logits for them
    status: tuple[str, ...]  # [V], as CovLassoSolution.status_names
    accuracies: tuple[Accuracy, ...]  # dependencies first; empty without test samples
    category_names: tuple[str, ...]  # [U + V]

    def extend(self, base_logits: Tensor) -> Tensor:
        """[g, a h + b], [N, U + V] in the dtype of `base_logits` [N, U], g less its mean over the seen categories.

        Raises:
            ValueError: `base_logits` is not [N, U].
        """
        U = self.coefficients.shape[1]
        if base_logits.dim() != 2 or base_logits.shape[1] != U:
            raise ValueError(f"base_logits must be [N, {U}], not {list(base_logits.shape)}")
        g = _centred(base_logits.double())
        theta, mean = self.coefficients.to(g.device), self.predictor_mean.to(g.device)
        h = self.target_mean.to(g.device) + (g - mean) @ theta.T
        return torch.cat([g, self.scale * h + self.offset], 1).to(base_logits.dtype)

    def dependencies(self, unseen: int, top: int | None = None) -> list[tuple[str, float]]:
        """(seen category, coefficient) of the unseen category 0 to V - 1, by falling |coefficient|, at most `top`."""
        theta = self.coefficients[unseen]
        order = theta.abs().argsort(descending=True, stable=True)[: self.support[unseen]][:top]
        return [(self.category_names[j], float(theta[j])) for j in order.tolist()]

    def describe(self) -> str:
        """One sentence: what was added to what, from how much."""
        V, U = self.coefficients.shape
        return (
            f"{V} unseen categories added to {U} seen ones from {self.samples} samples; lambda {self.lam_ratio:g} of "
            f"its maximum, calibration: {self.calibration} (scale {self.scale:.3g}, offset {self.offset:.3g})"
        )

    def table(self) -> Table:
        """A rich table of the accuracies."""
        from rich.table import Table

        table = Table(title=self.describe(), title_justify="left", title_style="")
        table.add_column("", no_wrap=True)
        for column in ("seen", "unseen", "overall", "among unseen", "labels"):
            table.add_column(column, justify="right", no_wrap=True)
        for entry in self.accuracies:
            shares = (entry.seen, entry.unseen, entry.overall, entry.among_unseen)
            table.add_row(entry.name, *(cell(share, 3) for share in shares), str(entry.labels_used))
        table.caption = (
            "Top-1 accuracy; among unseen: with the unseen categories alone to choose from, where calibration does "
            "not matter. labels: labelled samples used beyond the training of base and scorer."
        )
        table.caption_justify = "left"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything but the coefficients of zero, as JSON-able values; NaN becomes None."""
        U = self.coefficients.shape[1]
        content: dict[str, Any] = {
            "what": self.describe(),
            "settings": {
                "lam_ratio": self.lam_ratio,
                "calibration": self.calibration,
                "scale": self.scale,
                "offset": self.offset,
                "samples": self.samples,
            },
            "accuracies": [asdict(entry) for entry in self.accuracies],
            "categories": [
                {
                    "name": self.category_names[U + v],
                    "k": k,
                    "status": self.status[v],
                    "residual_ratio_fit": self.residual_ratio_fit[v],
                    "residual_ratio": self.residual_ratio[v],
                    "dependencies": [{"name": name, "coefficient": value} for name, value in self.dependencies(v)],
                }
                for v, k in enumerate(self.support)
            ],
        }
        return {key: without_nan(value) for key, value in content.items()}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        return written(json_text(self.to_dict()), path)


def unseen_categories(
    fit: Outputs,
    test: Outputs | None = None,
    *,
    labelled: Outputs | None = None,
    lam_ratio: float = DEFAULT_LAM_RATIO,
    calibration: Calibration | None = None,
    category_names: Sequence[str] | None = None,
    tol: float = 1e-6,
) -> UnseenCategoriesReport:
    """Adds the scorer's categories to the base network and compares with other ways to do so.

    Args:
        fit: samples that the dependencies come from; base and scorer logits. They should contain seen and unseen
            categories about as they will occur. Labels are not used.
        test: samples to measure on, with labels; scorer logits and features only serve the baselines.
        labelled: samples with labels (and features) that calibration "labels" and the two trained baselines may use.
            It may be `fit`.
        lam_ratio: penalty as a fraction of each target's lambda_max; 0.02 is our choice.
        calibration: see the module; default "labels" with `labelled`, else "anchors" with `fit.scorer_seen`, else
            "none".
        category_names: U + V names, default "0", "1", ...
        tol: KKT violation allowed, relative to lambda_max / 2.

    Baselines on `test`:
        base alone: g, so that no unseen category is ever found;
        scorer alone: [s, t], or t alone, so that no seen category is found; it needs the scorer at test time;
        base + scorer: [g, a t + b], calibrated likewise: what h would reach if dependencies were perfect;
        dense probe: as the dependencies, but the scorer's logits by least squares on all features of `fit`;
        nearest mean: the category whose mean of features over `labelled` is closest;
        retrained head: logistic regression on the features of `labelled`, its penalty that of scikit-learn at C = 1.

    Returns:
        UnseenCategoriesReport.

    Raises:
        ValueError, TypeError: naming the argument, for shapes that do not fit, values that are not finite, missing
            parts, an unknown calibration; and as `covlasso` does.
    """
    U, V = _checked_sizes(fit, test, labelled)
    chosen = _calibration(calibration, fit, labelled)
    names = tuple(str(c) for c in range(U + V)) if category_names is None else tuple(category_names)
    if len(names) != U + V:
        raise ValueError(f"category_names must have {U + V} entries, got {len(names)}")

    g, t = _centred(fit.base), _scorer_logits(fit)
    between = cross_covariance(t, g, exclude_same=False)
    solution = covlasso(between, lam_ratio=lam_ratio, tol=tol)
    theta, predictor_mean, target_mean = solution.dense(), between.predictor_mean, between.target_mean

    def predicted(outputs: Outputs) -> Tensor:
        return target_mean + (_centred(outputs.base) - predictor_mean) @ theta.T

    scale, offset = _scale_and_offset(chosen, fit, labelled, predicted)
    accuracies: list[Accuracy] = []
    residual_ratio = [math.nan] * V
    if test is not None:
        extended = torch.cat([_centred(test.base), scale * predicted(test) + offset], 1)
        used = len(labelled.base) if labelled is not None and chosen == "labels" else 0
        accuracies.append(_accuracy("dependencies", extended, test, used))
        accuracies += _baselines(chosen, fit, test, labelled)
        if _same_kind(fit, test):
            error = (predicted(test) - _scorer_logits(test)).square().mean(0)
            residual_ratio = (error / _scorer_logits(test).var(0, correction=0)).tolist()
    return UnseenCategoriesReport(
        coefficients=theta,
        predictor_mean=predictor_mean,
        target_mean=target_mean,
        scale=scale,
        offset=offset,
        calibration=chosen,
        lam_ratio=lam_ratio,
        samples=len(g),
        support=tuple(solution.n_nonzero.tolist()),
        residual_ratio_fit=tuple(solution.relative_error.tolist()),
        residual_ratio=tuple(residual_ratio),
        status=tuple(solution.status_names),
        accuracies=tuple(accuracies),
        category_names=names,
    )


# ------------------------------------------------------------------------------------------------ logits


def _centred(logits: Tensor) -> Tensor:
    """Logits in float64 less their mean over the categories, of each sample."""
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def _scorer_logits(outputs: Outputs) -> Tensor:
    """t [N, V] float64, less the scorer's mean over the seen categories where it has logits for them."""
    assert outputs.scorer is not None
    t = outputs.scorer.double()
    return t if outputs.scorer_seen is None else t - outputs.scorer_seen.double().mean(1, keepdim=True)


def _same_kind(one: Outputs, other: Outputs) -> bool:
    """Whether both have t, on the same scale."""
    both = one.scorer is not None and other.scorer is not None
    return both and (one.scorer_seen is None) == (other.scorer_seen is None)


def _scale_and_offset(
    calibration: Calibration, fit: Outputs, labelled: Outputs | None, unseen: Callable[[Outputs], Tensor]
) -> tuple[float, float]:
    """a and b for the logits [N, V] that `unseen` gives."""
    if calibration == "labels":
        assert labelled is not None
        assert labelled.labels is not None
        return _least_cross_entropy(_centred(labelled.base), unseen(labelled), labelled.labels)
    if calibration == "anchors":
        assert fit.scorer_seen is not None
        g, s = _centred(fit.base), _centred(fit.scorer_seen)
        if not bool(s.any()):
            raise ValueError("fit.scorer_seen must differ between categories for calibration 'anchors'")
        scale = float(g.square().mean().sqrt() / s.square().mean().sqrt())
        is_unseen = _scorer_logits(fit).amax(1) > s.amax(1)
        return scale, _offset_for(int(is_unseen.sum()), g.amax(1) - scale * unseen(fit).amax(1))
    return 1.0, 0.0


def _offset_for(count: int, margins: Tensor) -> float:
    """b such that `count` of the margins max g - a max h [N] are below it."""
    ordered = margins.sort().values.tolist()
    if count in (0, len(ordered)):
        return float(ordered[0] - 1 if count == 0 else ordered[-1] + 1)
    return float(ordered[count - 1] + ordered[count]) / 2


def _least_cross_entropy(g: Tensor, h: Tensor, labels: Tensor) -> tuple[float, float]:
    """a > 0 and b with the least cross-entropy of softmax [g, a h + b]."""
    parameters = g.new_zeros(2, requires_grad=True)  # log a, b

    def loss() -> Tensor:
        return cross_entropy(torch.cat([g, parameters[0].exp() * h + parameters[1]], 1), labels)

    _minimise(loss, [parameters])
    return float(parameters[0].exp().detach()), float(parameters[1].detach())


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Full-batch L-BFGS to a gradient of 1e-7, at most 500 steps."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(closure)


# ------------------------------------------------------------------------------------------------ baselines


def _baselines(calibration: Calibration, fit: Outputs, test: Outputs, labelled: Outputs | None) -> list[Accuracy]:
    """Other ways to have the categories; those whose inputs are missing are left out."""
    assert fit.scorer is not None
    V = fit.scorer.shape[1]
    used = 0 if labelled is None else len(labelled.base)
    base = _centred(test.base)
    nothing = base.new_full((len(base), V), -math.inf)
    found = [_accuracy("base alone", torch.cat([base, nothing], 1), test, 0)]
    if test.scorer is not None:
        seen = torch.full_like(base, -math.inf) if test.scorer_seen is None else test.scorer_seen
        found.append(_accuracy("scorer alone", torch.cat([seen.double(), test.scorer.double()], 1), test, 0))
        calibrating = labelled if calibration == "labels" else fit
        if calibrating is not None and _same_kind(calibrating, test):
            a, b = _scale_and_offset(calibration, fit, labelled, _scorer_logits)
            both = torch.cat([base, a * _scorer_logits(test) + b], 1)
            found.append(_accuracy("base + scorer", both, test, used if calibration == "labels" else 0))
    if (fit.features is None) == (test.features is None):
        probe = _dense_probe(fit)
        a, b = _scale_and_offset(calibration, fit, labelled, probe)
        probed = torch.cat([base, a * probe(test) + b], 1)
        found.append(_accuracy("dense probe", probed, test, used if calibration == "labels" else 0))
    if labelled is not None:
        assert labelled.labels is not None
        x, z = _features(labelled), _features(test)
        categories = test.base.shape[1] + V
        found.append(_accuracy("nearest mean", _nearest_mean(x, labelled.labels, z, categories), test, used))
        found.append(_accuracy("retrained head", _retrained_head(x, labelled.labels, z, categories), test, used))
    return found


def _features(outputs: Outputs) -> Tensor:
    """Features [N, d] float64, or the base logits."""
    return _centred(outputs.base) if outputs.features is None else outputs.features.double()


def _dense_probe(fit: Outputs) -> Callable[[Outputs], Tensor]:
    """t [N, V] by least squares on the features, with a ridge of 1e-6 of their mean variance."""
    x, t = _features(fit), _scorer_logits(fit)
    mean, target_mean = x.mean(0), t.mean(0)
    x = x - mean
    gram = x.T @ x
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=x.dtype, device=x.device), x.T @ t)
    return lambda outputs: target_mean + (_features(outputs) - mean) @ weight


def _nearest_mean(x: Tensor, labels: Tensor, z: Tensor, categories: int) -> Tensor:
    """-|z - mean of x of category c|^2, [N', categories]; -inf for a category without samples."""
    count = labels.bincount(minlength=categories)
    mean = x.new_zeros(categories, x.shape[1]).index_add_(0, labels, x) / count.clamp_min(1)[:, None]
    return torch.where(count > 0, -torch.cdist(z, mean).square(), -math.inf)


def _retrained_head(x: Tensor, labels: Tensor, z: Tensor, categories: int) -> Tensor:
    """Logits [N', categories] of logistic regression on features scaled to mean 0 and variance 1.

    The least of sum cross-entropy + |W|^2 / 2, the intercept free, as scikit-learn at C = 1.
    """
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    x, z = (x - mean) / spread, (z - mean) / spread
    weight = x.new_zeros(categories, x.shape[1], requires_grad=True)
    intercept = x.new_zeros(categories, requires_grad=True)

    def loss() -> Tensor:
        return cross_entropy(x @ weight.T + intercept, labels) + weight.square().sum() / (2 * len(x))

    _minimise(loss, [weight, intercept])
    return (z @ weight.T + intercept).detach()


def _accuracy(name: str, logits: Tensor, test: Outputs, labels_used: int) -> Accuracy:
    """Top-1 of logits [N, U + V]; ties go to the lower index."""
    assert test.labels is not None
    U = test.base.shape[1]
    right = logits.max(1).indices == test.labels
    is_unseen = test.labels >= U
    among = logits[:, U:].max(1).indices + U == test.labels
    parts = (right[~is_unseen], right[is_unseen], right, among[is_unseen])
    seen, unseen, overall, among_unseen = (float(part.double().mean()) for part in parts)
    return Accuracy(name, seen, unseen, overall, among_unseen, labels_used)


# ------------------------------------------------------------------------------------------------ arguments


def _checked_sizes(fit: Outputs, test: Outputs | None, labelled: Outputs | None) -> tuple[int, int]:
    """U and V."""
    if fit.scorer is None:
        raise ValueError("fit must have scorer logits")
    for name, part in (("fit.base", fit.base), ("fit.scorer", fit.scorer)):
        if not isinstance(part, Tensor) or part.dim() != 2 or part.shape[1] == 0:
            raise ValueError(f"{name} must be logits [N, categories]")
    U, V = fit.base.shape[1], fit.scorer.shape[1]
    if U < 2 or len(fit.base) < 2:
        raise ValueError(f"fit must have at least 2 samples and 2 seen categories, got {list(fit.base.shape)}")
    for where, outputs in (("fit", fit), ("test", test), ("labelled", labelled)):
        if outputs is None:
            continue
        widths = {"base": U, "scorer": V, "scorer_seen": U, "features": None}
        for name, width in widths.items():
            _check_part(f"{where}.{name}", getattr(outputs, name), len(outputs.base), width)
        if where != "fit":
            _check_labels(f"{where}.labels", outputs.labels, len(outputs.base), U + V)
    if test is not None and labelled is not None and (test.features is None) != (labelled.features is None):
        raise ValueError("features must be given for both test and labelled, or for neither")
    return U, V


def _check_part(name: str, values: Tensor | None, rows: int, width: int | None) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if values.dim() != 2 or len(values) != rows or (width is not None and values.shape[1] != width):
        raise ValueError(f"{name} must be [{rows}, {'d' if width is None else width}], got {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def _check_labels(name: str, labels: Tensor | None, rows: int, categories: int) -> None:
    if labels is None or labels.shape != (rows,) or labels.dtype != torch.int64:
        got = "none" if labels is None else f"{list(labels.shape)} of {labels.dtype}"
        raise ValueError(f"{name} must be int64 [{rows}], got {got}")
    if rows == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < categories:
        raise ValueError(f"{name} must be at least one category in 0 to {categories - 1}")


def _calibration(calibration: Calibration | None, fit: Outputs, labelled: Outputs | None) -> Calibration:
    if calibration is None:
        without_labels: Calibration = "none" if fit.scorer_seen is None else "anchors"
        calibration = without_labels if labelled is None else "labels"
    if calibration == "labels":
        if labelled is None or labelled.labels is None:
            raise ValueError("calibration 'labels' needs labelled samples")
        is_unseen = labelled.labels >= fit.base.shape[1]
        if bool(is_unseen.all()) or not bool(is_unseen.any()):
            raise ValueError("labelled must have samples of seen and of unseen categories for calibration 'labels'")
    elif calibration == "anchors":
        if fit.scorer_seen is None:
            raise ValueError("calibration 'anchors' needs fit.scorer_seen")
    elif calibration != "none":
        raise ValueError(f"calibration must be 'labels', 'anchors' or 'none', not {calibration!r}")
    return calibration
