"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.retrieval_metrics`, what CUDA tensors go to, and what
measures top-K lists: all of them sort.

Notation: nq queries, ng gallery items; items of one identity stand side by side in `order` [ng], those of query q in
order[begin_q : end_q]. Of the items that are no junk, r_m is the rank of the m-th positive, P their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_VALUES_AT_ONCE = 1 << 23

Metrics = tuple[Tensor, Tensor, Tensor]  # ap float64 [nq], inp float64 [nq], first_rank int64 [nq]


@dataclass(frozen=True, eq=False)
class Rules:
    """Which gallery items are positives of a query and which are junk."""

    order: Tensor  # int64 [ng]
    begin: Tensor  # int64 [nq]
    end: Tensor  # int64 [nq]
    query_camera: Tensor | None  # int64 [nq]; items of the query's identity and camera are junk
    gallery_camera: Tensor | None  # int64 [ng]
    excluded: Tensor | None  # bool [groups, ng], junk whatever its identity
    group: Tensor | None  # int64 [nq], row of `excluded`
    identity: Tensor | None  # int32 [ng] 0, 1, ..: first ranks count identities instead of images

    def arguments(self) -> tuple[Tensor | None, ...]:
        """In the order of the operators."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def of_queries(self, rows: slice) -> Rules:
        """The same for some queries."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return replace(
            self,
            begin=self.begin[rows],
            end=self.end[rows],
            query_camera=part(self.query_camera),
            group=part(self.group),
        )

    def junk_and_positive(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """bool [nq, K] each, of gallery items index int64 [nq, K]; -1 is junk."""
        ng = len(self.order)
        position = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(ng, device=self.order.device))
        item = index.clamp_min(0)
        at = position[item]
        same = (at >= self.begin[:, None]) & (at < self.end[:, None])
        junk = index < 0
        if self.query_camera is not None and self.gallery_camera is not None:
            junk = junk | (same & (self.query_camera[:, None] == self.gallery_camera[item]))
        if self.excluded is not None and self.group is not None:
            junk = junk | self.excluded[self.group[:, None], item]
        return junk, same & ~junk

    def totals(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives, and of items that are no junk, int64 [nq] each."""
        ng = len(self.order)
        found = []
        for rows in blocks(len(self.begin), ng):
            everything = torch.arange(ng, device=self.order.device).expand(len(self.begin[rows]), -1)
            junk, positive = self.of_queries(rows).junk_and_positive(everything)
            found.append(torch.stack([positive.sum(1), (~junk).sum(1)]))
        positives, kept = torch.cat(found, 1) if found else self.begin.new_zeros((2, 0))
        return positives, kept


def retrieval_metrics(
    distance: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    query_camera: Tensor | None,
    gallery_camera: Tensor | None,
    excluded: Tensor | None,
    group: Tensor | None,
    identity: Tensor | None,
    precision: str,
) -> Metrics:
    """Of every query from distance [nq, ng]; NaN and first rank 0 without a positive, -1 with a NaN distance."""
    rules = Rules(order, begin, end, query_camera, gallery_camera, excluded, group, identity)
    parts = []
    for rows in blocks(*distance.shape):
        key, index = (distance[rows].double() + 0.0).sort(dim=1, stable=True)
        part = rules.of_queries(rows)
        junk, positive = part.junk_and_positive(index)
        ap, inp, first = _of_sorted(key, junk, positive, positive.sum(1), (~junk).sum(1), precision)
        if identity is not None:
            first = _ranks_of_identities(identity[index], junk, positive)
        bad = key.isnan().any(1)
        parts.append((ap.masked_fill(bad, torch.nan), inp.masked_fill(bad, torch.nan), first.masked_fill(bad, -1)))
    return _joined(parts, distance)


def retrieval_metrics_from_features(
    distance: Tensor,
    slack: Tensor,
    query: Tensor,
    gallery: Tensor,
    query_unit: Tensor,
    gallery_unit: Tensor,
    inner_product: bool,
    *rules: Any,
) -> Metrics:
    """The same from float64 keys of the features; `distance` and `slack` are not needed."""
    x, y = query.double() * query_unit[:, None], gallery.double() * gallery_unit[:, None]
    keys = [-(row * y).sum(1) if inner_product else (row - y).square().sum(1) for row in x]
    return retrieval_metrics(torch.stack(keys) if keys else distance.double(), *rules)


def listed_metrics(distance: Tensor, index: Tensor, rules: Rules, precision: str) -> tuple[Metrics, Tensor]:
    """From lists distance, index [nq, K], -1 for no entry; and which queries have positives that are not listed.

    Such positives count as the very last of the gallery, so that nothing is overestimated.
    """
    positives, kept = rules.totals()
    parts, truncated = [], []
    for rows in blocks(*index.shape):
        part = rules.of_queries(rows)
        by_index = index[rows].sort(dim=1)  # a stable sort by distance then leaves ties in the order of the gallery
        by_distance = (distance[rows].double() + 0.0).gather(1, by_index.indices).sort(dim=1, stable=True)
        found = by_index.values.gather(1, by_distance.indices)
        junk, positive = part.junk_and_positive(found)
        parts.append(_of_sorted(by_distance.values, junk, positive, positives[rows], kept[rows], precision))
        truncated.append(positive.sum(1) < positives[rows])
    return _joined(parts, distance), torch.cat(truncated) if truncated else positives.bool()


def blocks(rows: int, columns: int) -> list[slice]:
    """Of so many rows that their values fit."""
    step = max(1, _VALUES_AT_ONCE // max(columns, 1))
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _joined(parts: list[Metrics], like: Tensor) -> Metrics:
    if not parts:
        nothing = like.new_empty(0, dtype=torch.float64)
        return nothing, nothing.clone(), nothing.long()
    ap, inp, first = (torch.cat(part) for part in zip(*parts, strict=True))
    return ap, inp, first


def _of_sorted(key: Tensor, junk: Tensor, positive: Tensor, P: Tensor, kept: Tensor, precision: str) -> Metrics:
    """From keys in order [b, K] and what they belong to; P and kept [b] count the whole gallery."""
    listed = positive.sum(1)
    # Ranks of the positives in columns m = 1 .. most; those that are not listed are the last of the gallery.
    most = int(P.max()) if len(P) else 0
    m = torch.arange(1, most + 1, device=key.device).expand(len(P), -1)
    present, known = m <= P[:, None], m <= listed[:, None]
    r = kept[:, None] - (P[:, None] - m)
    count = positive.cumsum(1)
    row, column = positive.nonzero().T
    at = count[row, column] - 1
    r[row, at] = (~junk).cumsum(1)[row, column]
    shared_m, shared_r = m.clone(), r.clone()
    if precision == "sklearn":
        last = _last_equal(key)[row, column]
        shared_m[row, at], shared_r[row, at] = count[row, last], (~junk).cumsum(1)[row, last]
    value = shared_m.double() / shared_r
    if precision == "trapezoid":
        value = (torch.where(r == 1, 1.0, (m - 1).double() / (r - 1)) + value) / 2
    ap = torch.where(present, value, 0.0).sum(1) / P
    last_rank = torch.where(known | present, r, 0).amax(1) if most else P
    first = r[:, 0] if most else P
    valid = P > 0
    return (
        torch.where(valid, ap, torch.nan),
        torch.where(valid, P.double() / last_rank, torch.nan),
        torch.where(valid, first, 0),
    )


def _last_equal(key: Tensor) -> Tensor:
    """int64 [b, K]: the last column of the same key."""
    K = key.shape[1]
    column = torch.arange(K, device=key.device).expand_as(key)
    ends = torch.ones_like(key, dtype=torch.bool)
    ends[:, :-1] = key.diff(dim=1) != 0
    return torch.where(ends, column, K).flip(1).cummin(1).values.flip(1)


def _ranks_of_identities(identity: Tensor, junk: Tensor, positive: Tensor) -> Tensor:
    """Number of identities among the items in order [b, K] up to the first positive; 0 without one."""
    by_identity = torch.where(junk, -1, identity).sort(dim=1, stable=True)
    new = torch.ones_like(junk)
    new[:, 1:] = by_identity.values.diff(dim=1) != 0
    fresh = torch.zeros_like(junk).scatter_(1, by_identity.indices, new) & ~junk
    rank = torch.where(positive, fresh.cumsum(1), fresh.shape[1] + 1).amin(1) if junk.shape[1] else positive.sum(1)
    return torch.where(positive.any(1), rank, 0)
