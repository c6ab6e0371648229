"""CMC, mAP and mINP of a ranked gallery, from distances, from top-K lists, or from features without an nq x ng matrix.

Operators (csrc/torch/retrieval_metrics.cpp): `retrieval_metrics`, `retrieval_metrics_from_features`. Of a query with
identity p and camera c, a gallery item is

    junk       if it has identity p and camera c, or is excluded by a rule below: it counts nowhere
    positive   if it has identity p otherwise,      negative  else

Items are ordered by ascending distance, equal ones by their place in the gallery, -0.0 as 0.0. With the ranks
r_1 < .. < r_P of the P positives among all items that are no junk, over all valid queries (P > 0):

    CMC(k) = share of r_1 <= k        AP = (1/P) sum_m m / r_m        INP = P / r_P        mAP, mINP = means

Source: Zheng et al., ICCV 2015 (Market-1501, CMC and mAP); Ye et al., survey and outlook of person re-identification
(mINP); public evaluators differ, the choices and the counting without a sort are ours.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuraldeps_kernels.ops.retrieval import METRICS, _device_operator, _on_cuda
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import retrieval_metrics as reference
from neuraldeps_kernels.reference.retrieval_metrics import Metrics, Rules

if TYPE_CHECKING:
    from rich.table import Table

AVERAGE_PRECISIONS = ("standard", "trapezoid", "sklearn")
DENOMINATORS = ("valid", "all")
CAMERA_RULES = ("same", "sysu", "none")
PROTOCOLS = ("all", "single-shot")
RANKS_OF = ("images", "identities")
SYSU_QUERY_CAMERA, SYSU_SKIPPED_CAMERA = 3, 2  # they stand in one place
_SHOWN_RANKS = (1, 5, 10, 20)
_BLOCK_VALUES = 1 << 22  # distances held at once,
_BLOCK_ROWS = 64  # but for so many queries at least, below which products are slow
_CHUNK_VALUES = 1 << 22  # float64 features held at once
_UNIT = 2.0**-24  # of float32

Ids = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """Results of `retrieval_metrics`; per query NaN without a positive. All tensors are on the CPU."""

    map: float  # mean of AP
    minp: float  # mean of INP
    cmc: Tensor  # float64 [max_rank], CMC(1), CMC(2), ..; constant beyond the end of a short gallery
    ap: Tensor  # float64 [nq]
    inp: Tensor  # float64 [nq]
    first_rank: Tensor  # float64 [nq] r_1; over several draws their mean
    valid: Tensor  # bool [nq]
    truncated: Tensor  # bool [nq] top-K lists: not all positives are listed, so that its figures are lower bounds

    def rank(self, k: int) -> float:
        """CMC(k)."""
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"k must be in 1..{len(self.cmc)}, max_rank, not {k}")
        return float(self.cmc[k - 1])

    @property
    def rank1(self) -> float:
        """CMC(1)."""
        return self.rank(1)

    @property
    def num_valid(self) -> int:
        """Queries with a positive."""
        return int(self.valid.sum())

    def to_dict(self) -> dict[str, Any]:
        """Averages, CMC and counts as JSON-able values; None for what is undefined."""
        return {
            "map": None if math.isnan(self.map) else self.map,
            "minp": None if math.isnan(self.minp) else self.minp,
            "cmc": [None if math.isnan(value) else value for value in self.cmc.tolist()],
            "queries": len(self.ap),
            "valid_queries": self.num_valid,
            "truncated_queries": int(self.truncated.sum()),
        }

    def to_csv(self, path: str | Path | None = None) -> str:
        """One row a query: query, valid, ap, inp, first_rank, truncated; also written to `path`. Empty: undefined."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["query", "valid", "ap", "inp", "first_rank", "truncated"])
        columns = (self.valid, self.ap, self.inp, self.first_rank, self.truncated)
        for query, (valid, *values, truncated) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            writer.writerow([query, int(valid), *(("" if math.isnan(v) else v) for v in values), int(truncated)])
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def table(self) -> Table:
        """mAP, mINP and some ranks in percent."""
        return metrics_table({"": self})


def metrics_table(rows: Mapping[str, RetrievalMetrics]) -> Table:
    """mAP, mINP and some ranks in percent, a row each, by name."""
    from rich.table import Table

    table = Table()
    ranks = [k for k in _SHOWN_RANKS if all(k <= len(metrics.cmc) for metrics in rows.values())]
    if len(rows) > 1:
        table.add_column("")
    for name in ("mAP", "mINP", *(f"rank-{k}" for k in ranks), "valid queries"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, metrics in rows.items():
        values = [metrics.map, metrics.minp, *(metrics.rank(k) for k in ranks)]
        cells = [f"{100 * value:.2f} %" for value in values] + [f"{metrics.num_valid} of {len(metrics.ap)}"]
        table.add_row(*([name] if len(rows) > 1 else []), *cells)
    return table


@annotated
def retrieval_metrics(
    distances: Tensor,
    query_ids: Ids,
    gallery_ids: Ids,
    query_cameras: Ids | None = None,
    gallery_cameras: Ids | None = None,
    *,
    indices: Tensor | None = None,
    max_rank: int = 50,
    ap: str = "standard",
    denominator: str = "valid",
    camera_rule: str = "same",
    junk_label: int | None = None,
    protocol: str = "all",
    ranks_of: str = "images",
    draws: int = 10,
    seed: int = 0,
) -> RetrievalMetrics:
    """CMC, mAP and mINP (module docstring) of distances, exact to float64.

    Args:
        distances: [nq, ng], float32, float64, bfloat16 or float16, any strides; smaller is nearer, of any sign.
        query_ids, gallery_ids: integers [nq] and [ng].
        query_cameras, gallery_cameras: integers, or both None: no item is junk by its camera.
        indices: int64 [nq, K] gallery items of top-K lists, whose distances are then [nq, K] in any order; -1 for no
            entry. What is not listed ranks behind what is; a query whose positives are not all listed is `truncated`:
            they count as the last of the gallery, which makes its figures lower bounds.
        max_rank: length of the CMC.
        ap: "standard"; "trapezoid", (1/P) sum_m ((m - 1) / (r_m - 1) [1 for r_m = 1] + m / r_m) / 2, as the toolbox of
            Market-1501 computes; "sklearn", where equal distances share one precision as in `average_precision_score`.
        denominator: averages over "valid" queries, or over "all", where those without a positive count 0.
        camera_rule: "same": same identity and camera is junk (Market-1501, DukeMTMC-reID, MSMT17, CUHK03); "sysu":
            queries of camera 3 skip all items of camera 2 (SYSU-MM01); "none": cameras are not looked at (RegDB).
        junk_label: gallery identity that is junk for every query; None: such distractors are negatives.
        protocol: "all" images, or "single-shot" (CUHK03): of every identity one image that is no junk, drawn `draws`
            times from `seed`; figures are means over the draws.
        ranks_of: CMC by ranks of "images", or of "identities": an identity counts once, by its nearest image
            (SYSU-MM01). mAP and mINP are always those of images.

    Returns:
        RetrievalMetrics; its averages are NaN if no query is valid and the denominator is "valid".

    Raises:
        ValueError: shapes or lengths do not fit, there is no query or no gallery, a distance is NaN, an index is out of
            range or twice in a row, an option is unknown or does not go with another.
        TypeError: `distances` is no floating tensor, `indices` no int64 tensor, ids or cameras are no integers.
    """
    _check_matrix("distances", distances)
    options = _Options(max_rank, ap, denominator, camera_rule, protocol, ranks_of, draws, seed)
    ng = distances.shape[1] if indices is None else None
    rules = _rules(
        options, distances, len(distances), ng, query_ids, gallery_ids, query_cameras, gallery_cameras, junk_label
    )
    values = distances.detach()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    if indices is not None:
        return _of_lists(values, indices, rules, options)
    if options.protocol == "single-shot":
        return options.summary(*_single_shot(values, rules, options))
    found = torch.ops.neuraldeps.retrieval_metrics(values, *rules.arguments(), options.ap)
    return options.summary(*_checked(found))


@annotated
def retrieval_metrics_from_features(
    query: Tensor,
    gallery: Tensor,
    query_ids: Ids,
    gallery_ids: Ids,
    query_cameras: Ids | None = None,
    gallery_cameras: Ids | None = None,
    *,
    metric: str = "sqeuclidean",
    max_rank: int = 50,
    ap: str = "standard",
    denominator: str = "valid",
    camera_rule: str = "same",
    junk_label: int | None = None,
    protocol: str = "all",
    ranks_of: str = "images",
    draws: int = 10,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> RetrievalMetrics:
    """`retrieval_metrics` of features, a block of queries at a time: no nq x ng matrix is formed.

    Args:
        query, gallery: [nq, D] and [ng, D], float32, float64, bfloat16 or float16, one dtype and device, any strides.
        metric: "sqeuclidean" |x - y|^2, "cosine" 1 - <x, y> / (|x| |y|), or "inner_product" -<x, y>.
        progress: called after each block with the number of its queries.

        The others are those of `retrieval_metrics`.

    Returns:
        RetrievalMetrics by the order of float64 distances of the values given, equal ones by place. Products are taken
        in float32 with a bound of their error, and what it leaves open is decided by float64 sums, so equal rows tie
        exactly. With "single-shot", and on CUDA without our kernels, distances are float64 matrix products: equal but
        for the last digits.

    Raises:
        ValueError: as `retrieval_metrics`; a row is not finite or, for cosines, zero.
        TypeError: as `retrieval_metrics`.
    """
    _check_features(query, gallery, metric)
    options = _Options(max_rank, ap, denominator, camera_rule, protocol, ranks_of, draws, seed)
    rules = _rules(
        options,
        query,
        len(query),
        len(gallery),
        query_ids,
        gallery_ids,
        query_cameras,
        gallery_cameras,
        junk_label,
    )
    query, gallery = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (query, gallery))
    query_unit, gallery_unit = _units(query, gallery, metric)
    served = not query.is_cuda or _device_operator("retrieval_metrics_from_features") is not None
    exact = options.protocol == "single-shot" or not served
    block = _float64_blocks if exact else _certified_blocks
    measure = block(query, gallery, query_unit, gallery_unit, metric)
    step = max(_BLOCK_ROWS, _BLOCK_VALUES // len(gallery))
    parts = []
    for begin in range(0, len(query), step):
        rows = slice(begin, begin + step)
        parts.append(measure(rows, rules.of_queries(rows), options))
        if progress is not None:
            progress(len(parts[-1][0]))
    return options.summary(*_joined(parts))


# ------------------------------------------------------------------------------------------------ options and rules


@dataclass(frozen=True)
class _Options:
    """What both functions share, checked."""

    max_rank: int
    ap: str
    denominator: str
    camera_rule: str
    protocol: str
    ranks_of: str
    draws: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_rank", "draws"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        for name, known in (
            ("ap", AVERAGE_PRECISIONS),
            ("denominator", DENOMINATORS),
            ("camera_rule", CAMERA_RULES),
            ("protocol", PROTOCOLS),
            ("ranks_of", RANKS_OF),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.protocol == "single-shot" and (self.ap != "standard" or self.ranks_of != "images"):
            raise ValueError(
                "protocol='single-shot' leaves one image of every identity: it goes with ap='standard' and "
                f"ranks_of='images', not {self.ap!r} and {self.ranks_of!r}"
            )

    def summary(self, ap: Tensor, inp: Tensor, first: Tensor, truncated: Tensor | None = None) -> RetrievalMetrics:
        """From ap, inp float64 [nq] and first ranks int64 [nq], or [draws, nq]."""
        ap, inp, first = ap.cpu(), inp.cpu(), first.cpu()
        valid = ~ap.isnan()
        number = int(valid.sum()) if self.denominator == "valid" else len(valid)
        ranks = first.reshape(-1, len(ap))[:, valid]  # [draws, valid]
        hits = torch.bincount(ranks[ranks <= self.max_rank], minlength=self.max_rank + 1)[1:].cumsum(0)
        scale = 1 / number if number else math.nan
        return RetrievalMetrics(
            map=float(ap[valid].sum()) * scale,
            minp=float(inp[valid].sum()) * scale,
            cmc=hits.double() / len(first.reshape(-1, len(ap))) * scale,
            ap=ap,
            inp=inp,
            first_rank=torch.where(valid, first.reshape(-1, len(ap)).double().mean(0), torch.nan),
            valid=valid,
            truncated=torch.zeros_like(valid) if truncated is None else truncated.cpu(),
        )


def _rules(
    options: _Options,
    like: Tensor,
    nq: int,
    ng: int | None,
    query_ids: Ids,
    gallery_ids: Ids,
    query_cameras: Ids | None,
    gallery_cameras: Ids | None,
    junk_label: int | None,
) -> Rules:
    """ng None: as many as there are gallery ids."""
    device = like.device
    query_id = _integers("query_ids", query_ids, nq, device)
    gallery_id = _integers("gallery_ids", gallery_ids, ng, device)
    if nq == 0 or len(gallery_id) == 0:
        raise ValueError(f"there must be a query and a gallery item, not {nq} and {len(gallery_id)}")
    cameras = None
    if (query_cameras is None) != (gallery_cameras is None):
        raise ValueError("query_cameras and gallery_cameras must both be given or both be None")
    if query_cameras is not None and gallery_cameras is not None:
        cameras = (
            _integers("query_cameras", query_cameras, nq, device),
            _integers("gallery_cameras", gallery_cameras, len(gallery_id), device),
        )
    if cameras is None and options.camera_rule == "sysu":
        raise ValueError("camera_rule='sysu' needs query_cameras and gallery_cameras")
    excluded, group = _exclusions(options.camera_rule, cameras, gallery_id, junk_label, nq)
    by_identity = gallery_id.sort(stable=True)
    numbered = options.ranks_of == "identities" or options.protocol == "single-shot"
    by_camera = cameras if cameras is not None and options.camera_rule == "same" else (None, None)
    return Rules(
        order=by_identity.indices,
        begin=torch.searchsorted(by_identity.values, query_id),
        end=torch.searchsorted(by_identity.values, query_id, right=True),
        query_camera=by_camera[0],
        gallery_camera=by_camera[1],
        excluded=excluded,
        group=group,
        identity=gallery_id.unique(return_inverse=True)[1].int() if numbered else None,
    )


def _exclusions(
    camera_rule: str, cameras: tuple[Tensor, Tensor] | None, gallery_id: Tensor, junk_label: int | None, nq: int
) -> tuple[Tensor | None, Tensor | None]:
    """bool [groups, ng] and the group of every query."""
    if junk_label is None and camera_rule != "sysu":
        return None, None
    junk = torch.zeros_like(gallery_id, dtype=torch.bool) if junk_label is None else gallery_id == junk_label
    if camera_rule != "sysu" or cameras is None:
        return junk[None], gallery_id.new_zeros(nq)
    query_camera, gallery_camera = cameras
    skipped = gallery_camera == SYSU_SKIPPED_CAMERA
    return torch.stack([junk, junk | skipped]), (query_camera == SYSU_QUERY_CAMERA).long()


def _integers(name: str, values: Ids, length: int | None, device: torch.device) -> Tensor:
    try:
        found = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, not {type(values).__name__}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, not {found.dtype}")
    if found.dim() != 1 or (length is not None and len(found) != length):
        wanted = "[ng]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must be {wanted}, not {list(found.shape)}")
    return found.long()


def _check_matrix(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, not {x.dim()}")


def _check_features(query: Tensor, gallery: Tensor, metric: str) -> None:
    _check_matrix("query", query)
    _check_matrix("gallery", gallery)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    if query.shape[1] != gallery.shape[1] or query.shape[1] < 1:
        raise ValueError(
            f"query and gallery must have one number of columns, 1 or more, not {query.shape[1]} and {gallery.shape[1]}"
        )
    if query.dtype != gallery.dtype or query.device != gallery.device:
        raise ValueError(
            f"query and gallery must have one dtype and device, not {query.dtype} on {query.device} and "
            f"{gallery.dtype} on {gallery.device}"
        )
    for name, x in (("query", query), ("gallery", gallery)):
        good = x.isfinite().all(1)
        wanted = "finite"
        if metric == "cosine":
            good, wanted = good & (x != 0).any(1), "finite and without zero rows"
        if not bool(good.all()):
            raise ValueError(f"{name} must be {wanted}, but its row {int((~good).nonzero()[0])} is not")


def _joined(parts: list[Metrics]) -> Metrics:
    """Of all queries; first ranks of draws are [draws, rows]."""
    ap, inp, first = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return ap, inp, first


def _checked(found: Metrics) -> Metrics:
    bad = found[2] < 0
    if bool(bad.any()):
        raise ValueError(f"distances must not be NaN, but those of query {int(bad.nonzero()[0])} are")
    return found


# ------------------------------------------------------------------------------------------------ lists, single shots


def _of_lists(distances: Tensor, indices: Tensor, rules: Rules, options: _Options) -> RetrievalMetrics:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        what = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, not {what}")
    if indices.shape != distances.shape:
        raise ValueError(
            f"indices must have the shape of distances, {list(distances.shape)}, not {list(indices.shape)}"
        )
    ng = len(rules.order)
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < ng:
        wrong = int(indices.min()) if int(indices.min()) < -1 else int(indices.max())
        raise ValueError(f"indices must be in 0..{ng - 1}, or -1 for no entry, not {wrong}")
    ascending = indices.sort(dim=1).values
    twice = ((ascending.diff(dim=1) == 0) & (ascending[:, 1:] >= 0)).any(1)
    if bool(twice.any()):
        raise ValueError(f"indices must not repeat in a row, but row {int(twice.nonzero()[0])} does")
    _refuse_nan(distances, indices < 0)
    parts, truncated = [], []
    for rows in reference.blocks(len(indices), ng):
        part = rules.of_queries(rows)
        keys, cut = reference.listed_keys(distances[rows], indices[rows], part)
        truncated.append(cut)
        if options.protocol == "single-shot":
            parts.append(_single_shot(keys, part, options))
        else:
            parts.append(torch.ops.neuraldeps.retrieval_metrics(keys, *part.arguments(), options.ap))
    return options.summary(*_joined(parts), torch.cat(truncated))


def _refuse_nan(distances: Tensor, ignored: Tensor | None = None) -> None:
    bad = distances.isnan()
    bad = (bad if ignored is None else bad & ~ignored).any(1)
    _checked((bad, bad, torch.where(bad, -1, 0)))


def _single_shot(distances: Tensor, rules: Rules, options: _Options) -> Metrics:
    """ap and inp [nq], means over the draws, and first ranks [draws, nq], from distances [nq, ng]."""
    _refuse_nan(distances)
    nq, ng = distances.shape
    first = rules.order.new_zeros((options.draws, nq))
    generator = torch.Generator().manual_seed(options.seed)
    for draw in range(options.draws):
        drawn = torch.randperm(ng, generator=generator).to(distances.device)  # items, the first of an identity stays
        for rows in reference.blocks(nq, ng):
            first[draw, rows] = _ranks_in_draw(distances[rows], rules.of_queries(rows), drawn)
    ap = torch.where((first > 0).all(0), (1 / first.double()).mean(0), torch.nan)
    return ap, ap.clone(), first


def _ranks_in_draw(distances: Tensor, rules: Rules, drawn: Tensor) -> Tensor:
    """Rank of the query's identity among all, each left with the image that comes first in `drawn`; 0 without one."""
    assert rules.identity is not None
    rows, ng = distances.shape
    junk, positive = rules.junk_and_positive(torch.arange(ng, device=drawn.device).expand(rows, -1))
    place = torch.empty_like(drawn).scatter_(0, drawn, torch.arange(ng, device=drawn.device))
    identity = rules.identity.long()
    number = int(identity.max()) + 1
    chosen = torch.full((rows, number), ng, device=drawn.device).scatter_reduce_(
        1, identity.expand(rows, -1), torch.where(junk, ng, place), "amin"
    )
    item = drawn[chosen.clamp_max(ng - 1)]  # [rows, number]
    d = distances.gather(1, item)
    own = identity[positive.long().argmax(1)][:, None]
    own_d, own_item = d.gather(1, own), item.gather(1, own)
    before = ((d < own_d) | ((d == own_d) & (item < own_item))) & (chosen < ng)
    return torch.where(positive.any(1), before.sum(1) + 1, 0)


# ------------------------------------------------------------------------------------------------ features

_Measure = Callable[[slice, Rules, _Options], Metrics]


def _chunks(x: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // x.shape[1])
    for begin in range(0, len(x), step):
        yield slice(begin, begin + step)


def _units(query: Tensor, gallery: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Factors of the rows, float64 [nq] and [ng]: 1 / |x| for cosines, else a power of two that brings all below 1."""
    if metric != "cosine":
        largest = max(float(x.abs().max()) if len(x) else 0.0 for x in (query, gallery))
        scale = math.ldexp(1.0, -math.frexp(largest)[1])
        return tuple(x.new_full((len(x),), scale, dtype=torch.float64) for x in (query, gallery))  # type: ignore[return-value]

    def inverse_norms(x: Tensor) -> Tensor:
        found = x.new_empty(len(x), dtype=torch.float64)
        for rows in _chunks(x):
            part = x[rows].double()
            size = part.abs().amax(1, keepdim=True)
            found[rows] = 1 / ((part / size).norm(dim=1) * size[:, 0])
        return found

    return inverse_norms(query), inverse_norms(gallery)


def _centre(gallery: Tensor, unit: Tensor, metric: str) -> Tensor:
    """float64 [D]: distances do not change by it, their rounding does; zero for inner products."""
    total = gallery.new_zeros(gallery.shape[1], dtype=torch.float64)
    if metric != "inner_product":
        for rows in _chunks(gallery):
            total += unit[rows] @ gallery[rows].double()
    return total / len(gallery)


def _float64_blocks(query: Tensor, gallery: Tensor, query_unit: Tensor, gallery_unit: Tensor, metric: str) -> _Measure:
    """Metrics of some queries, from matrix products in float64."""
    centre = _centre(gallery, gallery_unit, metric)
    y = gallery.double() * gallery_unit[:, None] - centre
    squares = y.square().sum(1)

    def measure(rows: slice, rules: Rules, options: _Options) -> Metrics:
        x = query[rows].double() * query_unit[rows, None] - centre
        if metric == "inner_product":
            distances = -(x @ y.T)
        else:
            distances = torch.addmm(squares, x, y.T, alpha=-2) + x.square().sum(1, keepdim=True)
        if options.protocol == "single-shot":
            return _single_shot(distances, rules, options)
        return torch.ops.neuraldeps.retrieval_metrics(distances, *rules.arguments(), options.ap)  # type: ignore[no-any-return]

    return measure


@dataclass(frozen=True, eq=False)
class _Rounded:
    """Rows z = unit x - centre rounded to float32, and bounds of what that loses."""

    z: Tensor  # float32 [N, D]
    square: Tensor  # float32 [N], |z|^2
    radius: Tensor  # float64 [N], at least |z| before and after rounding
    error: Tensor  # float64 [N], at least what rounding moved

    @classmethod
    def of(cls, x: Tensor, unit: Tensor, centre: Tensor) -> _Rounded:
        z = torch.empty_like(x, dtype=torch.float32)
        square, radius, error = (x.new_empty(len(x), dtype=torch.float64) for _ in range(3))
        far = float(centre.norm())
        for rows in _chunks(x):
            exact = x[rows].double() * unit[rows, None] - centre
            z[rows] = exact.float()
            norm = exact.norm(dim=1)
            square[rows] = norm.square()
            # Norms in float64 are good to far more than 1e-6; float32 loses no more than 1e-30 to flushed denormals.
            error[rows] = (exact - z[rows].double()).norm(dim=1) * (1 + 1e-6) + 2**-50 * (norm + far) + 1e-30
            radius[rows] = norm * (1 + 1e-6) + error[rows]
        return cls(z, square.float(), radius, error)


def _certified_blocks(
    query: Tensor, gallery: Tensor, query_unit: Tensor, gallery_unit: Tensor, metric: str
) -> _Measure:
    """Metrics of some queries, from float32 products within a bound and float64 sums where the bound leaves it open."""
    centre = _centre(gallery, gallery_unit, metric)
    y = _Rounded.of(gallery, gallery_unit, centre)
    farthest, roughest = float(y.radius.max()), float(y.error.max())
    terms = (query.shape[1] + 8) * _UNIT
    gamma = terms / (1 - terms) if terms < 1 else math.inf  # of a sum of D products in any order
    inner = metric == "inner_product"

    def measure(rows: slice, rules: Rules, options: _Options) -> Metrics:
        x = _Rounded.of(query[rows], query_unit[rows], centre)
        slack = x.error * farthest + x.radius * roughest + gamma * x.radius * farthest
        with _full_float32():
            if inner:
                distances = (x.z @ y.z.T).neg_()
            else:
                distances = torch.addmm(y.square, x.z, y.z.T, alpha=-2).add_(x.square[:, None])
                slack = 2 * slack + 16 * _UNIT * (x.radius + farthest).square()  # the last: squares and two sums
        return torch.ops.neuraldeps.retrieval_metrics_from_features(  # type: ignore[no-any-return]
            distances,
            slack + 1e-30,
            query[rows],
            gallery,
            query_unit[rows],
            gallery_unit,
            inner,
            *rules.arguments(),
            options.ap,
        )

    return measure


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the user allows elsewhere."""
    settings: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]  # run time
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


# ------------------------------------------------------------------------------------------------ operator rules


def _metrics_like(distance: Tensor, *_: Any) -> Metrics:
    ap = distance.new_empty(distance.shape[0], dtype=torch.float64)
    return ap, torch.empty_like(ap), torch.empty_like(ap, dtype=torch.int64)


_library = torch.library.Library("neuraldeps", "FRAGMENT")
for _name in ("retrieval_metrics", "retrieval_metrics_from_features"):
    _library.impl(_name, _on_cuda(_name, getattr(reference, _name)), "CUDA")
    torch.library.register_fake(f"neuraldeps::{_name}", _metrics_like)
