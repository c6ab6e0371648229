"""What an analysis starts from: samples of logits, their statistics, what is held out, and checks of the arguments.

Notation: f [N, n] logits of the network whose categories are explained (targets), g [N, p] those of the predicting
network; within one network g = f. Samples of one group, such as crops of one picture, are never split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neuraldeps_kernels.analysis.substitution import Samples
from neuraldeps_kernels.ops.covariance import (
    CovarianceAccumulator,
    CrossCovariance,
    CrossCovarianceAccumulator,
    covariance,
    cross_covariance,
)

CHUNK_ROWS = 8192  # samples taken together


# ------------------------------------------------------------------------------------------------ statistics


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
        _check_count(self.count)

    @classmethod
    def from_logits(cls, *streams: Tensor) -> LogitStatistics:
        """Statistics of one or two streams of logits [N, n_k] on the same N samples, in float64."""
        accumulator = CovarianceAccumulator(sum(stream.shape[1] for stream in streams), device=streams[0].device)
        for rows in zip(*(stream.split(CHUNK_ROWS) for stream in streams), strict=True):
            accumulator.update(torch.cat(rows, 1) if len(rows) > 1 else rows[0])
        sizes = tuple(stream.shape[1] for stream in streams)
        return cls(accumulator.compute(), accumulator.mean, len(streams[0]), sizes)

    def between(self) -> CrossStatistics:
        """Of two networks: what is needed to explain the first from the second."""
        n, _ = self.sizes
        parts = CrossCovariance(
            cov=self.cov[n:, n:].contiguous(),
            cross=self.cov[:n, n:].contiguous(),
            variance=self.cov.diagonal()[:n].clone(),
            predictor_mean=self.mean[n:],
            target_mean=self.mean[:n],
            exclude_same=False,
        )
        return CrossStatistics(parts, self.count)

    @property
    def solvable(self) -> Tensor:
        """What `covlasso` takes."""
        return self.cov

    @property
    def predictor_cov(self) -> Tensor:
        """Covariance of the predicting logits [p, p]."""
        return self.cov

    @property
    def cross(self) -> Tensor:
        """Covariance of every target with every predicting logit [n, p]."""
        return self.cov

    @property
    def variance(self) -> Tensor:
        """Variance of every target, float64 [n]."""
        return self.cov.diagonal().double()

    @property
    def predictor_mean(self) -> Tensor:
        """[p]"""
        return self.mean

    @property
    def target_mean(self) -> Tensor:
        """[n]"""
        return self.mean


@dataclass(frozen=True, eq=False)
class CrossStatistics:
    """Statistics of two networks, of which the second explains the first: the covariance of the second [p, p], that
    between both [n, p], and of the first only the variances."""

    solvable: CrossCovariance
    count: int  # samples

    def __post_init__(self) -> None:
        _check_count(self.count)

    @classmethod
    def from_logits(cls, targets: Tensor, predictors: Tensor) -> CrossStatistics:
        """Statistics of f [N, n] and g [N, p] on the same N samples, in float64."""
        accumulator = CrossCovarianceAccumulator(targets.shape[1], predictors.shape[1], device=targets.device)
        for f, g in zip(targets.split(CHUNK_ROWS), predictors.split(CHUNK_ROWS), strict=True):
            accumulator.update(f, g)
        return cls(accumulator.compute(exclude_same=False), len(targets))

    @property
    def sizes(self) -> tuple[int, ...]:
        """(n, p)"""
        n, p = self.solvable.cross.shape
        return n, p

    @property
    def predictor_cov(self) -> Tensor:
        """Covariance of the predicting logits [p, p]."""
        return self.solvable.cov

    @property
    def cross(self) -> Tensor:
        """Covariance of every target with every predicting logit [n, p]."""
        return self.solvable.cross

    @property
    def variance(self) -> Tensor:
        """Variance of every target, float64 [n]."""
        return self.solvable.variance.double()

    @property
    def predictor_mean(self) -> Tensor:
        """[p]"""
        return self.solvable.predictor_mean

    @property
    def target_mean(self) -> Tensor:
        """[n]"""
        return self.solvable.target_mean


Statistics = LogitStatistics | CrossStatistics


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"count must be at least 2 samples, got {count}")


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples of the explained network and, between two networks, of the predicting one."""

    logits: Tensor  # f [N, n]
    predictors: Tensor | None  # g [N, p] between two networks
    groups: Tensor  # int64 [N] on the CPU: samples of one group are never split

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def num_groups(self) -> int:
        """Number of distinct groups."""
        return len(self.groups.unique())

    def statistics(self) -> Statistics:
        """Of all samples."""
        if self.predictors is None:
            return LogitStatistics.from_logits(self.logits)
        return CrossStatistics.from_logits(self.logits, self.predictors)

    def weighted_covariance(self, weights: Tensor) -> Tensor | CrossCovariance:
        """What `covlasso` takes, of samples that count `weights` float64 [N] times; none is copied."""
        weights = weights.to(self.logits.device)
        if self.predictors is None:
            return covariance(self.logits, weights=weights)
        return cross_covariance(self.logits, self.predictors, weights=weights, exclude_same=False)

    def part(self, mask: Tensor) -> Rows:
        """The samples where `mask` bool [N] (on the CPU)."""
        if bool(mask.all()):
            return self
        on_device = mask.to(self.logits.device)
        other = None if self.predictors is None else self.predictors[on_device]
        return Rows(self.logits[on_device], other, self.groups[mask])


@dataclass(frozen=True, eq=False)
class HeldOut(Rows):
    """Samples that dependencies are judged on."""

    labels: Tensor  # y int64 [N], on the device of the logits
    true_labels: bool  # else y is the argmax of the unmodified network
    group_name: str | None  # what a group is, such as "picture"; None where every sample is a group of its own

    @cached_property
    def samples(self) -> Samples:
        """The logits prepared for substitution metrics."""
        return Samples(self.logits, self.labels, self.groups.to(self.logits.device))

    def without(self, mask: Tensor) -> HeldOut:
        """The samples where `mask` bool [N] (on the CPU) is False."""
        rows = self.part(~mask)
        labels = self.labels[~mask.to(self.labels.device)]
        return HeldOut(rows.logits, rows.predictors, rows.groups, labels, self.true_labels, self.group_name)


def logits_of_models(
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


def split_or_given(
    source: Tensor,
    predictors: Tensor | None,
    held_out: float | Tensor | tuple[Tensor, Tensor] | None,
    labels: Sequence[int] | Tensor | None,
    groups: Sequence[Any] | Tensor | None,
    group_name: str,
    seed: int,
) -> tuple[Rows, HeldOut | None]:
    """The samples of the fit, and the held-out ones.

    Where held-out logits are given, `labels` and `groups` are theirs, and every sample of the fit is its own group.
    """
    check_logits("source", source)
    if predictors is not None:
        check_logits("predictors", predictors, rows=len(source))
        check_same_device("predictors", predictors, source)
        predictors = predictors.detach()
    source = source.detach()
    if len(source) < 2:
        raise ValueError(f"source must have at least 2 samples, got {len(source)}")
    if not is_share(held_out) and held_out is not None:
        sizes = (source.shape[1],) if predictors is None else (source.shape[1], predictors.shape[1])
        evaluation = given_samples(sizes, held_out, labels, groups, group_name)
        return Rows(source, predictors, _group_ids(None, len(source))), evaluation
    y, ids = _labels(labels, source), _group_ids(groups, len(source))
    everything = Rows(source, predictors, ids)
    if held_out is None:
        return everything, None
    kept = held_out_mask(ids, float(held_out), seed)  # type: ignore[arg-type]  # a share
    if int((~kept).sum()) < 2:
        raise ValueError(f"held_out = {held_out} leaves fewer than 2 of {len(source)} samples for the covariance")
    name = group_name if groups is not None else None
    evaluation = HeldOut(source, predictors, ids, y, labels is not None, name).without(~kept)
    return everything.part(~kept), evaluation


def is_share(held_out: object) -> bool:
    """Whether `held_out` is a number, not logits."""
    return isinstance(held_out, (float, int))


def held_out_mask(groups: Tensor, share: float, seed: int, name: str = "held_out") -> Tensor:
    """True for the samples of randomly chosen groups, `share` of the groups rounded up, bool [N]."""
    if not 0 < share < 1:
        what = "a share between 0 and 1" + (", held-out logits or None" if name == "held_out" else "")
        raise ValueError(f"{name} must be {what}, got {share}")
    distinct = groups.unique()
    number = math.ceil(share * len(distinct))
    if number == len(distinct):
        raise ValueError(f"{name} = {share} of {len(distinct)} groups leaves none for the covariance")
    order = torch.randperm(len(distinct), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return torch.isin(groups, distinct[order[:number]])


def given_samples(
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
        check_logits("held_out", stream, size, len(streams[0]))
        check_same_device("held_out", stream, streams[0])
    if len(streams[0]) < 2:
        raise ValueError(f"held_out must have at least 2 samples, got {len(streams[0])}")
    return HeldOut(
        logits=streams[0].detach(),
        predictors=streams[1].detach() if len(streams) == 2 else None,
        groups=_group_ids(groups, len(streams[0])),
        labels=_labels(labels, streams[0]),
        true_labels=labels is not None,
        group_name=group_name if groups is not None else None,
    )


def _labels(labels: Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    if labels is None:
        return logits.max(1).indices
    y = torch.as_tensor(labels, device=logits.device)
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool or len(y) != len(logits):
        raise ValueError(f"labels must be {len(logits)} integers, one a sample, got {list(y.shape)} of {y.dtype}")
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(f"labels must be in 0 to {logits.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
    return y.long()


def _group_ids(groups: Sequence[Any] | Tensor | None, number: int) -> Tensor:
    """Consecutive integers instead of the group values, in order of first appearance, int64 [N] on the CPU."""
    if groups is None:
        return torch.arange(number, device="cpu")
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(values) != number:
        raise ValueError(f"groups must have {number} entries, one a sample, got {len(values)}")
    ids: dict[Any, int] = {}
    return torch.tensor([ids.setdefault(value, len(ids)) for value in values], device="cpu")


# ------------------------------------------------------------------------------------------------ arguments


def check_logits(name: str, logits: Tensor, columns: int | None = None, rows: int | None = None) -> None:
    """Raises unless `logits` is a finite floating tensor [rows, columns]; None: any number."""
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


def check_same_device(name: str, logits: Tensor, other: Tensor) -> None:
    """Raises unless both tensors are on one device."""
    if logits.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like the other logits, got {logits.device}")


def checked_names(argument: str, names: Sequence[str] | None, number: int) -> tuple[str, ...]:
    """`names`, or "0", "1", ..."""
    if names is None:
        return tuple(str(index) for index in range(number))
    if len(names) != number:
        raise ValueError(f"{argument} must have {number} entries, one a category, got {len(names)}")
    return tuple(names)


def checked_targets(targets: Sequence[int] | Tensor | None, n: int) -> Tensor:
    """Distinct categories, int64 [T] on the CPU."""
    if targets is None:
        return torch.arange(n, device="cpu")
    indices = torch.as_tensor(targets, device="cpu")
    if indices.dim() != 1 or len(indices) == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"targets must be at least one integer category, got {targets}")
    indices = indices.long()
    wrong = indices[(indices < 0) | (indices >= n)]
    if len(wrong):
        raise ValueError(f"targets must be in 0 to {n - 1}, got {int(wrong[0])}")
    if len(indices.unique()) < len(indices):
        raise ValueError(f"targets must not repeat, got {indices[indices.bincount()[indices] > 1][0]} more than once")
    return indices


def checked_exclude_same(exclude_same: bool | None, sizes: tuple[int, ...]) -> bool:
    """Whether category i may not predict category i."""
    if len(sizes) == 1:
        if exclude_same is False:
            raise ValueError("exclude_same must be True or None within one network: a category would predict itself")
        return True
    if exclude_same and sizes[0] != sizes[1]:
        raise ValueError(f"exclude_same needs networks of the same categories, got {sizes[0]} and {sizes[1]}")
    return sizes[0] == sizes[1] if exclude_same is None else exclude_same


def checked_candidates(candidates: Tensor | None, num_targets: int, usable: Tensor) -> Tensor | None:
    """Those of `candidates` that are `usable` bool [p], bool [p] or [T, p] on its device, or None for all."""
    if candidates is not None:
        candidates = torch.as_tensor(candidates, device=usable.device)
        shapes = ((len(usable),), (num_targets, len(usable)))
        if candidates.dtype != torch.bool or candidates.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"candidates must be bool {expected}, got {list(candidates.shape)} of {candidates.dtype}")
        if not candidates.any():
            raise ValueError("candidates must allow at least one category, got none")
        return candidates & usable
    return None if bool(usable.all()) else usable
