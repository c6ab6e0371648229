"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.retrieval_metrics`, which sorts; top-K lists as keys.

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

    def of_queries(self, rows: slice | Tensor) -> Rules:
        """The same for some queries, by their numbers or a slice of them."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return replace(
            self,
            begin=self.begin[rows],
            end=self.end[rows],
            query_camera=part(self.query_camera),
            group=part(self.group),
        )

    def same_identity(self) -> tuple[Tensor, Tensor]:
        """Queries and gallery items of one identity, int64 [pairs] each, junk among them."""
        sizes = self.end - self.begin
        query = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        place = torch.arange(len(query), device=sizes.device) - (sizes.cumsum(0) - sizes)[query]
        return query, self.order[self.begin[query] + place]

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
        ap, inp, first = _of_sorted(key, junk, positive, precision)
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


def listed_keys(distance: Tensor, index: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Keys float64 [b, ng] that order the gallery as lists distance, index [b, K] do; which have positives not listed.

    An item's key is the number of nearer ones in its list, so that ties stay ties; -1 is no entry. What is not listed
    ranks behind, positives last and one after the other, so that nothing is overestimated.
    """
    (b, K), ng = index.shape, len(rules.order)
    value = torch.where(index < 0, torch.inf, distance.double() + 0.0).contiguous()
    nearer = torch.searchsorted(value.sort(dim=1).values, value).double()
    keys = nearer.new_full((b, ng + 1), float(K))
    row, item = rules.same_identity()
    keys[row, item] = (K + 1 + item).double()
    keys.scatter_(1, torch.where(index < 0, ng, index), nearer)
    _, positive = rules.of_queries(row).junk_and_positive(item[:, None])
    unlisted = positive[:, 0] & (keys[row, item] > K)
    return keys[:, :ng], torch.zeros_like(rules.begin, dtype=torch.bool).index_fill_(0, row[unlisted], True)


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


def _of_sorted(key: Tensor, junk: Tensor, positive: Tensor, precision: str) -> Metrics:
    """From keys in order [b, K] and what they belong to."""
    P, m, r = positive.sum(1), positive.cumsum(1), (~junk).cumsum(1)
    shared_m, shared_r = m, r
    if precision == "sklearn":
        last = _last_equal(key)
        shared_m, shared_r = m.gather(1, last), r.gather(1, last)
    value = shared_m.double() / shared_r
    if precision == "trapezoid":
        value = (torch.where(r == 1, 1.0, (m - 1).double() / (r - 1)) + value) / 2
    valid = P > 0
    return (
        torch.where(valid, torch.where(positive, value, 0.0).sum(1) / P, torch.nan),
        torch.where(valid, P.double() / torch.where(positive, r, 0).amax(1), torch.nan),
        torch.where(valid, torch.where(positive, r, r.shape[1]).amin(1), 0),
    )


def _last_equal(key: Tensor) -> Tensor:
    """int64 [b, K]: the last column of the same key."""
    K = key.shape[1]
    column = torch.arange(K, device=key.device).expand_as(key)
    ends = torch.ones_like(key, dtype=torch.bool)
    ends[:, :-1] = key[:, 1:] != key[:, :-1]
    return torch.where(ends, column, K).flip(1).cummin(1).values.flip(1)


def _ranks_of_identities(identity: Tensor, junk: Tensor, positive: Tensor) -> Tensor:
    """Number of identities among the items in order [b, K] up to the first positive; 0 without one."""
    by_identity = torch.where(junk, -1, identity).sort(dim=1, stable=True)
    new = torch.ones_like(junk)
    new[:, 1:] = by_identity.values.diff(dim=1) != 0
    fresh = torch.zeros_like(junk).scatter_(1, by_identity.indices, new) & ~junk
    rank = torch.where(positive, fresh.cumsum(1), fresh.shape[1] + 1).amin(1) if junk.shape[1] else positive.sum(1)
    return torch.where(positive.any(1), rank, 0)
