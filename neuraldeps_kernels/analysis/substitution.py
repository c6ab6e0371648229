"""What happens to a classifier when the logit of one category i is replaced by a prediction of it, others untouched.

Notation: f [N, n] logits of N samples; y [N] their categories; fhat [N, T] predictions of the logits of `targets` [T];
a positive of i is a sample with y = i. Ties of logits go to the lower index, everywhere.

No target looks at all n logits again: with the largest logits of every sample kept in order (value and index), the
rank of i after the substitution is one comparison (T14 of the notes checks it against brute force).

Source: section 5 of the notes on "Neural Dependencies Emerging from Learning Massive Categories" (arXiv 2211.12339).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TOP = 5  # "stays in the top 5"
SMALL_LOGIT = 1e-6  # relative errors leave out samples with |f| below this
CHUNK_ELEMENTS = 1 << 15  # of the [N, targets] temporaries, so that they stay in cache
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class SubstitutionMetrics:
    """One value a target, float64 [T] (counts int64); NaN where undefined, such as without positives.

    "before" is the unmodified network, "after" the one with the logit of this target alone replaced by its prediction.
    Errors are |fhat - f| and |fhat - f| / |f|; those of probabilities are the same on the softmax probability of i,
    over positives. Variances are unbiased.
    """

    residual_ratio: Tensor  # mean (fhat - f)^2 / variance of f about its mean over the same samples
    positives: Tensor
    positive_groups: Tensor  # groups (pictures) that the positives come from
    abs_error_positives: Tensor
    abs_error_positives_variance: Tensor
    rel_error_positives: Tensor
    rel_error_positives_variance: Tensor
    abs_error_negatives: Tensor
    abs_error_negatives_variance: Tensor
    rel_error_negatives: Tensor
    rel_error_negatives_variance: Tensor
    probability_abs_error: Tensor
    probability_abs_error_variance: Tensor
    probability_rel_error: Tensor
    probability_rel_error_variance: Tensor
    recall_before: Tensor  # share of positives whose argmax is i (positive accuracy)
    recall_after: Tensor
    calls_before: Tensor  # samples whose argmax is i
    calls_after: Tensor
    precision_before: Tensor  # share of positives among the calls
    precision_after: Tensor
    negative_accuracy_before: Tensor  # share of the other samples whose argmax is y
    negative_accuracy_after: Tensor
    top5_before: Tensor  # share of positives with i among the five largest logits
    top5_after: Tensor
    auc_before: Tensor  # area under the ROC curve of the logit of i, positives against the others
    auc_after: Tensor
    top1_after: Tensor  # share of all samples whose argmax is y

    def __getitem__(self, index: Tensor) -> SubstitutionMetrics:
        """The metrics of some targets: a mask or indices."""
        return SubstitutionMetrics(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def cpu(self) -> SubstitutionMetrics:
        """The same on the CPU."""
        return SubstitutionMetrics(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})

    @classmethod
    def concatenated(cls, parts: Sequence[SubstitutionMetrics]) -> SubstitutionMetrics:
        """The metrics of the targets of all parts, one part after the other."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


class Samples:
    """Logits f [N, n], n >= 2, with what every target needs of them, computed once."""

    def __init__(self, logits: Tensor, labels: Tensor, groups: Tensor) -> None:
        self.logits = logits
        self.labels = labels  # int64 [N]
        self.groups = groups  # int64 [N]
        self.top_values, self.top_indices = top_logits(logits, min(TOP + 1, logits.shape[1]))  # [N, 6]
        self.log_total, self.log_total_but_top = _log_sums(logits, self.top_indices[:, 0])  # [N]

    @property
    def top1(self) -> float:
        """Share of samples whose argmax is y."""
        return float((self.top_indices[:, 0] == self.labels).double().mean())

    def metrics(self, predicted: Tensor, targets: Tensor) -> SubstitutionMetrics:
        """Metrics of fhat = predicted [N, T] for targets int64 [T]."""
        width = max(1, CHUNK_ELEMENTS // len(self.logits))
        parts = [self._chunk(p, i) for p, i in zip(predicted.split(width, 1), targets.split(width), strict=True)]
        return SubstitutionMetrics.concatenated(parts)

    def _chunk(self, predicted: Tensor, targets: Tensor) -> SubstitutionMetrics:
        f = self.logits[:, targets].double()  # [N, T]
        fhat = predicted.double()
        positive = self.labels[:, None] == targets
        error = (fhat - f).abs()
        large = f.abs() >= SMALL_LOGIT
        log_others = self._log_sum_of_others(f, targets)
        p, phat = torch.sigmoid(f - log_others), torch.sigmoid(fhat - log_others)
        before, after = self.top_indices[:, :1], self.argmax_after(fhat, targets)
        moments = {
            "abs_error_positives": _mean_and_variance(error, positive),
            "rel_error_positives": _mean_and_variance(error / f.abs(), positive & large),
            "abs_error_negatives": _mean_and_variance(error, ~positive),
            "rel_error_negatives": _mean_and_variance(error / f.abs(), ~positive & large),
            "probability_abs_error": _mean_and_variance((phat - p).abs(), positive),
            "probability_rel_error": _mean_and_variance((phat - p).abs() / p, positive & (p > 0)),
        }
        right_before, right_after = before == self.labels[:, None], after == self.labels[:, None]
        return SubstitutionMetrics(
            residual_ratio=self.residual_ratio(fhat, targets),
            positives=positive.sum(0),
            positive_groups=self._groups_of(positive),
            **{name: mean for name, (mean, _) in moments.items()},
            **{f"{name}_variance": spread for name, (_, spread) in moments.items()},
            recall_before=_share(before == targets, positive),
            recall_after=_share(after == targets, positive),
            calls_before=(before == targets).sum(0),
            calls_after=(after == targets).sum(0),
            precision_before=_share(positive, before == targets),
            precision_after=_share(positive, after == targets),
            negative_accuracy_before=_share(right_before, ~positive),
            negative_accuracy_after=_share(right_after, ~positive),
            top5_before=_share(self.stays_in_top(TOP, f, targets), positive),
            top5_after=_share(self.stays_in_top(TOP, fhat, targets), positive),
            auc_before=roc_auc(f, positive),
            auc_after=roc_auc(fhat, positive),
            top1_after=right_after.double().mean(0),
        )

    def residual_ratio(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Mean (fhat - f)^2 over the variance of f about its mean, float64 [T]; NaN where f is constant."""
        f = self.logits[:, targets].double()
        variance = (f - f.mean(0)).square().mean(0)
        return torch.where(variance > 0, (predicted - f).square().mean(0) / variance, math.nan)

    def argmax_after(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Argmax [N, T] of the logits in which that of target i alone is replaced by predicted [N, T]."""
        return torch.where(self.stays_in_top(1, predicted, targets), targets, self._best_other(1, targets)[1])

    def stays_in_top(self, k: int, predicted: Tensor, targets: Tensor) -> Tensor:
        """Whether i is among the k largest logits once its own is replaced by predicted: bool [N, T]."""
        if k >= self.logits.shape[1]:
            return torch.ones_like(predicted, dtype=torch.bool)
        value, index = self._best_other(k, targets)
        return (predicted > value) | ((predicted == value) & (targets < index))

    def _best_other(self, k: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Value and index [N, T] of the k-th largest logit among those other than i."""
        among = (self.top_indices[:, :k, None] == targets).any(1)  # [N, T]
        position = k - 1 + among.long()
        return self.top_values.gather(1, position), self.top_indices.gather(1, position)

    def _log_sum_of_others(self, f: Tensor, targets: Tensor) -> Tensor:
        """log sum_{j != i} exp f_j [N, T]; no cancellation: an i below the largest holds at most half of the sum."""
        is_top = self.top_indices[:, :1] == targets
        share = torch.where(is_top, 0.0, torch.exp(f - self.log_total[:, None]))
        return torch.where(is_top, self.log_total_but_top[:, None], self.log_total[:, None] + torch.log1p(-share))

    def _groups_of(self, positive: Tensor) -> Tensor:
        """Number of distinct groups among the positives of each target, int64 [T]."""
        sample, target = positive.nonzero(as_tuple=True)
        pairs = torch.stack([target, self.groups[sample]]).unique(dim=1)
        return torch.bincount(pairs[0], minlength=positive.shape[1])


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each sample, value float64 and index int64 [N, k], falling; ties by rising index."""
    rest = logits.clone()
    values, indices = [], []
    for _ in range(k):
        value, index = rest.max(1)  # the first of equal ones
        values.append(value.double())
        indices.append(index)
        rest.scatter_(1, index[:, None], -math.inf)
    return torch.stack(values, 1), torch.stack(indices, 1)


def roc_auc(score: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of each column: score [N, T], positive bool [N, T] -> float64 [T].

    A tie counts one half. NaN without positives or without negatives.
    """
    positives = positive.sum(0)
    known = (positives > 0) & (positives < len(score))
    columns, count = score[:, known].T.contiguous(), positives[known].double()  # [T', N], [T']
    ordered = columns.sort(1).values
    rank = (torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True) + 1).double() / 2
    wins = torch.where(positive[:, known].T, rank, 0.0).sum(1) - count * (count + 1) / 2
    area = torch.full(known.shape, math.nan, dtype=torch.float64, device=score.device)
    area[known] = wins / (count * (len(score) - count))
    return area


def _log_sums(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of all logits, and of all but the largest; float64 [N]."""
    total, but_top = [], []
    for f, index in zip(logits.split(CHUNK_ROWS), top.split(CHUNK_ROWS), strict=True):
        f = f.double()
        total.append(f.logsumexp(1))
        but_top.append(f.scatter(1, index[:, None], -math.inf).logsumexp(1))
    return torch.cat(total), torch.cat(but_top)


def _mean_and_variance(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance [T] of value [N, T] where mask; NaN below 1 and below 2 values."""
    count = mask.sum(0).double()
    mean = torch.where(mask, value, 0.0).sum(0) / count
    square = torch.where(mask, value - mean, 0.0).square().sum(0)
    return mean, torch.where(count > 1, square / (count - 1), math.nan)


def _share(event: Tensor, given: Tensor) -> Tensor:
    """Share [T] of `event` among the samples where `given`, both [N, T] (or broadcast); NaN where there is none."""
    return (event & given).sum(0).double() / given.sum(0)
