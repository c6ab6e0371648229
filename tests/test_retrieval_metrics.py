"""CMC, mAP and mINP against loops in pure Python that follow the definitions with exact fractions of integers.

Checks are numbered as in the specification of re-ranking.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.ops import retrieval_metrics as ops
from neuraldeps_kernels.ops.retrieval_metrics import RetrievalMetrics
from neuraldeps_kernels.reference import retrieval_metrics as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (nq, ng, identities): the smallest; fewer items than a vector; several groups of 8 positives; more than one chunk of
# 2048 distances; more positives than are compared one by one (96).
SHAPES = [(1, 1, 1), (5, 7, 3), (9, 60, 2), (6, 2100, 40), (4, 500, 3), (3, 2500, 5)]

# ------------------------------------------------------------------------------------------------ definitions


def loop(
    distances: Any,
    query_ids: Any,
    gallery_ids: Any,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    *,
    max_rank: int = 50,
    ap: str = "standard",
    denominator: str = "valid",
    camera_rule: str = "same",
    junk_label: int | None = None,
    ranks_of: str = "images",
) -> tuple[float, float, list[float], list[float], list[int]]:
    """mAP, mINP, CMC, and AP and first rank of every query, by the definitions."""
    every, firsts, inps = [], [], []
    for q, row in enumerate(distances):
        kept = []
        for g, d in enumerate(row):
            same = gallery_ids[g] == query_ids[q]
            if camera_rule == "same" and query_cameras is not None and same and query_cameras[q] == gallery_cameras[g]:
                continue
            if camera_rule == "sysu" and query_cameras[q] == 3 and gallery_cameras[g] == 2:
                continue
            if junk_label is not None and gallery_ids[g] == junk_label:
                continue
            kept.append((d, g, same))  # -0.0 == 0.0 in Python, too
        kept.sort(key=lambda item: item[:2])
        ranks = [place + 1 for place, (_, _, same) in enumerate(kept) if same]
        P = len(ranks)
        if P == 0:
            every.append(math.nan), inps.append(math.nan), firsts.append(0)
            continue
        if ap == "standard":
            value = sum((m + 1) / r for m, r in enumerate(ranks)) / P
        elif ap == "trapezoid":
            value = sum(((m / (r - 1) if r > 1 else 1.0) + (m + 1) / r) / 2 for m, r in enumerate(ranks)) / P
        else:
            ends = [sum(1 for d, _, _ in kept if d <= kept[r - 1][0]) for r in ranks]
            value = sum(sum(1 for x in ranks if x <= end) / end for end in ends) / P
        first = ranks[0]
        if ranks_of == "identities":
            first = len({gallery_ids[g] for _, g, _ in kept[: ranks[0]]})
        every.append(value), inps.append(P / ranks[-1]), firsts.append(first)
    valid = [q for q, first in enumerate(firsts) if first]
    number = len(valid) if denominator == "valid" else len(firsts)
    scale = 1 / number if number else math.nan
    cmc = [scale * sum(1 for q in valid if firsts[q] <= k + 1) for k in range(max_rank)]
    return scale * sum(every[q] for q in valid), scale * sum(inps[q] for q in valid), cmc, every, firsts


def assert_equals_loop(
    found: RetrievalMetrics, wanted: tuple[float, float, list[float], list[float], list[int]]
) -> None:
    mean_ap, mean_inp, cmc, ap, first = wanted
    np.testing.assert_allclose([found.map, found.minp], [mean_ap, mean_inp], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.cmc.numpy(), cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.ap.numpy(), ap, rtol=0, atol=1e-12)
    assert found.first_rank.nan_to_num(0).tolist() == first
    assert found.valid.tolist() == [rank > 0 for rank in first]


def some_case(seed: int) -> tuple[Tensor, list[list[int]]]:
    """Distances with ties, both zeros and negative values; ids and cameras of queries and gallery."""
    chance = random.Random(seed)
    nq, ng = chance.randint(1, 6), chance.randint(1, 40)
    values = [-1.5, -0.5, -0.0, 0.0, 0.5, 1.0] if chance.random() < 0.7 else [chance.gauss(0, 1) for _ in range(30)]
    rows = [[chance.choice(values) for _ in range(ng)] for _ in range(nq)]
    people, cameras = chance.randint(1, 8), chance.randint(1, 4)
    ids = [[chance.randint(-1, people) for _ in range(count)] for count in (nq, ng)]
    seen_by = [[chance.randint(1, cameras) for _ in range(count)] for count in (nq, ng)]
    return torch.tensor(rows, dtype=torch.float64), [*ids, *seen_by]


def random_case(nq: int, ng: int, people: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randn(nq, ng, generator=generator).to(dtype)
    ids = [torch.randint(people, (count,), generator=generator) for count in (nq, ng)]
    cameras = [torch.randint(6, (count,), generator=generator) for count in (nq, ng)]
    return distances, [*ids, *cameras]


# ------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_loop(seed: int) -> None:
    """Check 10: ties, junk, invalid queries, rows shorter than max_rank, negative and -0.0 distances."""
    distances, lists = some_case(seed)
    chance = random.Random(-seed)
    options: dict[str, Any] = {
        "max_rank": chance.choice([1, 5, 50]),
        "ap": chance.choice(ops.AVERAGE_PRECISIONS),
        "denominator": chance.choice(ops.DENOMINATORS),
        "camera_rule": chance.choice(ops.CAMERA_RULES),
        "junk_label": chance.choice([None, None, -1, 2]),
        "ranks_of": chance.choice(ops.RANKS_OF),
    }
    wanted = loop(distances.tolist(), *lists, **options)
    assert_equals_loop(nk.retrieval_metrics(distances, *lists, **options), wanted)
    assert_equals_loop(nk.retrieval_metrics(distances.float(), *lists, **options), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    distances, lists = random_case(*shape, dtype)
    for ap in ops.AVERAGE_PRECISIONS:
        wanted = loop(distances.double().tolist(), *(x.tolist() for x in lists), ap=ap)
        assert_equals_loop(nk.retrieval_metrics(distances, *lists, ap=ap), wanted)


def test_strides_do_not_matter() -> None:
    distances, lists = random_case(20, 90, 7, torch.float32)
    wanted = nk.retrieval_metrics(distances, *lists)
    wide = torch.randn(20, 200)
    wide[:, 30:120] = distances
    for same in (distances.T.contiguous().T, wide[:, 30:120], distances.repeat_interleave(2, 0)[::2]):
        assert torch.equal(nk.retrieval_metrics(same, *lists).ap, wanted.ap)


@pytest.mark.parametrize("shape", [(7, 50, 6), (5, 3000, 20)], ids=str)
def test_reference_equals_the_kernel(shape: tuple[int, int, int]) -> None:
    distances, lists = random_case(*shape, torch.float32)
    distances = distances.mul(4).round()  # ties
    for ap in ops.AVERAGE_PRECISIONS:
        options = ops._Options(50, ap, "valid", "sysu", "all", "identities", 1, 0)
        rules = ops._rules(options, distances, *distances.shape, *lists, junk_label=2)
        wanted = torch.ops.neuraldeps.retrieval_metrics(distances, *rules.arguments(), ap)
        for found, want in zip(reference.retrieval_metrics(distances, *rules.arguments(), ap), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12, equal_nan=True)


def test_tied_precision_is_that_of_sklearn() -> None:
    distances, lists = random_case(20, 60, 5, torch.float64)
    distances = distances.mul(2).round()
    found = nk.retrieval_metrics(distances, *lists[:2], ap="sklearn")
    for q in range(20):
        wanted = average_precision_score(lists[1] == lists[0][q], -distances[q])
        assert found.ap[q] == pytest.approx(wanted, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.5, 3.0]), shift=st.sampled_from([-2.0, 0.0, 8.0]))
def test_invariances(seed: int, scale: float, shift: float) -> None:
    """The order alone counts; negatives may change places; far items change nothing but what they stand behind."""
    distances, lists = some_case(seed)
    found = nk.retrieval_metrics(distances, *lists)
    moved = nk.retrieval_metrics(distances * scale + shift, *lists)
    assert torch.equal(found.ap.nan_to_num(-1), moved.ap.nan_to_num(-1))
    more = torch.cat([distances, torch.full((len(distances), 3), 1e9)], 1)
    query_ids, gallery_ids, query_cameras, gallery_cameras = lists
    longer = nk.retrieval_metrics(
        more, query_ids, [*gallery_ids, 99, 99, 98], query_cameras, [*gallery_cameras, 1, 1, 1]
    )
    assert torch.equal(found.ap.nan_to_num(-1), longer.ap.nan_to_num(-1))
    assert bool((found.cmc.diff() >= 0).all()) or found.num_valid == 0


def test_junk_label_equals_removed_columns() -> None:
    distances, (query_ids, gallery_ids, *cameras) = random_case(8, 300, 9, torch.float32)
    query_ids = query_ids.clamp_min(1)
    kept = gallery_ids != 0
    found = nk.retrieval_metrics(distances, query_ids, gallery_ids, *cameras, junk_label=0)
    wanted = nk.retrieval_metrics(distances[:, kept], query_ids, gallery_ids[kept], cameras[0], cameras[1][kept])
    assert torch.equal(found.ap, wanted.ap)
    assert torch.equal(found.cmc, wanted.cmc)


# ------------------------------------------------------------------------------------------------ known faults


def test_rows_shorter_than_max_rank_do_not_take_from_the_query_before() -> None:
    """A compiled evaluator in use reads the tail of the query before, so that the order of the queries counts."""
    distances = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    gallery = [1, 2, 2, 2]
    for order in ([1, 2], [2, 1]):
        found = nk.retrieval_metrics(distances, order, gallery, [0, 0], [1, 1, 0, 0], max_rank=10)
        assert found.cmc.tolist() == [0.5] + [1.0] * 9
    one_left = nk.retrieval_metrics(distances[:, :1], [1, 1], [1], max_rank=5)
    assert one_left.cmc.tolist() == [1.0] * 5


def test_ties_follow_the_gallery() -> None:
    """An unstable sort makes the precision depend on its implementation."""
    gallery = [0] * 500 + [1] + [0] * 500
    found = nk.retrieval_metrics(torch.ones(1, 1001), [1], gallery)
    assert found.first_rank.item() == 501
    assert found.ap.item() == 1 / 501
    assert nk.retrieval_metrics(torch.ones(1, 1001), [1], gallery, ap="sklearn").ap.item() == 1 / 1001


def test_precision_is_of_float64() -> None:
    """float32 would end at 1e-7."""
    positives = 3000
    found = nk.retrieval_metrics(torch.arange(6000.0)[None], [1], [0, 1] * positives)
    assert found.ap.item() == pytest.approx(0.5, abs=1e-15)
    assert found.map == pytest.approx(math.fsum(m / (2 * m) for m in range(1, positives + 1)) / positives, abs=1e-15)


def test_infinite_distances_rank_last() -> None:
    found = nk.retrieval_metrics(torch.tensor([[math.inf, -math.inf, math.inf, 1.0]]), [1], [1, 0, 1, 0])
    assert found.ap.item() == pytest.approx((1 / 3 + 2 / 4) / 2)


# ------------------------------------------------------------------------------------------------ levels, threads


LEVEL = """
import torch, neuraldeps_kernels as nk
g = torch.Generator().manual_seed(1)
for ng, people in ((70, 4), (2300, 30), (900, 3)):
    ids = [torch.randint(people, (n,), generator=g) for n in (30, ng)]
    cameras = [torch.randint(4, (n,), generator=g) for n in (30, ng)]
    d = torch.randn(30, ng, generator=g)
    x, y = torch.randn(30, 40, generator=g), torch.randn(ng, 40, generator=g)
    for case in (d, d.double(), (4 * d).round()):
        print(nk.retrieval_metrics(case, *ids, *cameras, camera_rule="sysu", ranks_of="identities").to_csv())
    print(nk.retrieval_metrics_from_features(x, y, *ids, *cameras).to_csv())
"""


def test_levels_and_threads_give_the_same_bits(cpu_levels: list[str], run_python: Callable[..., Any]) -> None:
    """Check 8."""
    results = []
    for level in cpu_levels:
        for threads in ("1", "2") if level == cpu_levels[-1] else ("1",):
            done = run_python(LEVEL, NEURALDEPS_CPU_LEVEL=level, OMP_NUM_THREADS=threads)
            assert done.returncode == 0, done.stderr
            results.append(done.stdout)
    assert len(results[0]) > 1000
    assert len(set(results)) == 1


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("seed", range(40))
def test_complete_lists_equal_the_matrix(seed: int) -> None:
    distances, lists = some_case(seed)
    order = torch.stack([torch.randperm(distances.shape[1]) for _ in distances])
    pads = torch.full((len(order), 2), -1)
    indices = torch.cat([pads, order], 1)  # unsorted, with missing entries
    values = torch.cat([torch.full_like(pads, torch.nan, dtype=torch.float64), distances.gather(1, order)], 1)
    options: dict[str, Any] = {"camera_rule": random.Random(seed).choice(ops.CAMERA_RULES), "junk_label": 2}
    for ap, ranks_of in itertools.product(ops.AVERAGE_PRECISIONS, ops.RANKS_OF):
        found = nk.retrieval_metrics(values, *lists, indices=indices, ap=ap, ranks_of=ranks_of, **options)
        assert_equals_loop(found, loop(distances.tolist(), *lists, ap=ap, ranks_of=ranks_of, **options))
        assert not found.truncated.any()
    found = nk.retrieval_metrics(values, *lists, indices=indices, protocol="single-shot", seed=seed)
    wanted = nk.retrieval_metrics(distances, *lists, protocol="single-shot", seed=seed)
    assert torch.equal(found.ap.nan_to_num(-1), wanted.ap.nan_to_num(-1))
    assert torch.equal(found.cmc.nan_to_num(-1), wanted.cmc.nan_to_num(-1))


def test_cut_lists_are_lower_bounds_and_named() -> None:
    distances, lists = random_case(30, 200, 10, torch.float64)
    full = nk.retrieval_metrics(distances, *lists)
    values, indices = distances.topk(50, largest=False)
    found = nk.retrieval_metrics(values, *lists, indices=indices)
    assert found.truncated.sum() > 20
    assert bool((found.ap <= full.ap + 1e-12).all())
    assert bool((found.inp <= full.inp + 1e-12).all())
    listed = found.first_rank <= 50 - 5  # at most a few of the list are junk
    assert torch.equal(found.first_rank[listed], full.first_rank[listed])
    # As if all that is not listed stood behind, the positives last, one after the other.
    query_ids, gallery_ids, *_ = lists
    behind = torch.where(gallery_ids == query_ids[:, None], 1e6 + torch.arange(200), 1e5).double()
    worst = behind.scatter(1, indices, values)
    for ap, ranks_of in itertools.product(ops.AVERAGE_PRECISIONS, ops.RANKS_OF):
        found = nk.retrieval_metrics(values, *lists, indices=indices, ap=ap, ranks_of=ranks_of)
        assert_equals_loop(found, loop(worst.tolist(), *(x.tolist() for x in lists), ap=ap, ranks_of=ranks_of))
    found = nk.retrieval_metrics(values[:, :5], *lists, indices=indices[:, :5], protocol="single-shot")
    worst = behind.scatter(1, indices[:, :5], values[:, :5])
    torch.testing.assert_close(found.ap, nk.retrieval_metrics(worst, *lists, protocol="single-shot").ap)
    assert bool((found.ap <= nk.retrieval_metrics(distances, *lists, protocol="single-shot").ap).all())


def test_lists_of_the_reranking_are_taken() -> None:
    query, gallery = torch.randn(6, 5), torch.randn(30, 5)
    ids = torch.arange(6), torch.arange(30) % 6
    distances, indices = nk.k_reciprocal_rerank(query, gallery, k1=5, k2=2, top_k=40)
    found = nk.retrieval_metrics(distances, *ids, indices=indices)
    wanted = nk.retrieval_metrics(nk.k_reciprocal_rerank(query, gallery, k1=5, k2=2), *ids)
    torch.testing.assert_close(found.ap, wanted.ap, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ single shot


def test_single_shot_draws_one_image_of_every_identity() -> None:
    """With one image an identity, every draw is the whole gallery."""
    distances, (query_ids, _, *_) = random_case(12, 40, 40, torch.float32)
    gallery_ids = torch.randperm(40)
    found = nk.retrieval_metrics(distances, query_ids, gallery_ids, protocol="single-shot", draws=3)
    wanted = nk.retrieval_metrics(distances, query_ids, gallery_ids)
    for name in ("ap", "inp", "first_rank", "cmc"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_single_shot_is_seeded_and_means_over_draws() -> None:
    distances, lists = random_case(40, 300, 12, torch.float32)
    first = nk.retrieval_metrics(distances, *lists, protocol="single-shot", seed=5)
    assert torch.equal(first.ap, nk.retrieval_metrics(distances, *lists, protocol="single-shot", seed=5).ap)
    other = nk.retrieval_metrics(distances, *lists, protocol="single-shot", seed=6)
    assert not torch.equal(first.ap, other.ap)
    many = nk.retrieval_metrics(distances, *lists, protocol="single-shot", draws=2000)
    # One of n identities, each by an image drawn evenly: simulated by hand.
    chance = np.random.default_rng(0)
    query_ids, gallery_ids, query_cameras, gallery_cameras = (x.numpy() for x in lists)
    for q in range(3):
        kept = ~((gallery_ids == query_ids[q]) & (gallery_cameras == query_cameras[q]))
        pools = [distances[q].numpy()[kept & (gallery_ids == p)] for p in np.unique(gallery_ids[kept])]
        own = distances[q].numpy()[kept & (gallery_ids == query_ids[q])]
        drawn = np.stack([chance.choice(pool, 20000) for pool in pools])
        mine = chance.choice(own, 20000)
        labels = np.unique(gallery_ids[kept])
        ranks = 1 + (drawn[labels != query_ids[q]] < mine).sum(0)
        assert many.ap[q].item() == pytest.approx((1 / ranks).mean(), abs=0.03)


# ------------------------------------------------------------------------------------------------ features


def exact_distances(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    x, y = query.double(), gallery.double()
    if metric == "inner_product":
        return -(x @ y.T)
    if metric == "cosine":
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    return torch.stack([(row - y).square().sum(1) for row in x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ops.METRICS)
def test_features_equal_the_matrix(metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_BLOCK_VALUES", 1000)  # several blocks
    monkeypatch.setattr(ops, "_BLOCK_ROWS", 1)
    monkeypatch.setattr(ops, "_CHUNK_VALUES", 700)
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 37, generator=generator).add(5).to(dtype) for n in (23, 210))
    _, lists = random_case(23, 210, 8, torch.float32)
    seen: list[int] = []
    found = nk.retrieval_metrics_from_features(query, gallery, *lists, metric=metric, progress=seen.append)
    wanted = nk.retrieval_metrics(exact_distances(query, gallery, metric), *lists)
    assert torch.equal(found.ap, wanted.ap)
    assert torch.equal(found.first_rank, wanted.first_rank)
    assert sum(seen) == 23
    assert len(seen) > 3


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_near_ties_of_features_are_settled_in_float64(metric: str) -> None:
    """Distances that float32 products cannot tell apart, and equal rows, which tie by place."""
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    query = centre + torch.randn(4, 64, generator=generator, dtype=torch.float64)
    gallery = centre + 1e-9 * torch.randn(400, 64, generator=generator, dtype=torch.float64)
    gallery[100:200] = gallery[:100]
    ids = torch.arange(4), torch.randint(4, (400,), generator=generator)
    found = nk.retrieval_metrics_from_features(query, gallery, *ids, metric=metric)
    wanted = exact_distances(query, gallery, metric)
    assert len(set(wanted[0].tolist())) == 300
    assert len(set(wanted[0].float().tolist())) < 100
    torch.testing.assert_close(found.ap, nk.retrieval_metrics(wanted, *ids).ap, rtol=0, atol=1e-12)
    equal = nk.retrieval_metrics_from_features(query, gallery[:1].expand(400, -1), *ids, metric=metric)
    assert torch.equal(equal.ap, nk.retrieval_metrics(torch.zeros(4, 400), *ids).ap)


def test_certified_and_float64_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA tensors, on the CPU; and junk, excluded items and identities with approximate distances."""
    generator = torch.Generator().manual_seed(1)
    query, gallery = torch.randn(15, 20, generator=generator), torch.randn(300, 20, generator=generator)
    _, lists = random_case(15, 300, 9, torch.float32)
    options: dict[str, Any] = {"camera_rule": "sysu", "junk_label": 3, "ranks_of": "identities"}
    found = nk.retrieval_metrics_from_features(query, gallery, *lists, **options)
    monkeypatch.setattr(ops, "_certified_blocks", ops._float64_blocks)
    wanted = nk.retrieval_metrics_from_features(query, gallery, *lists, **options)
    assert torch.equal(found.ap.nan_to_num(-1), wanted.ap.nan_to_num(-1))
    assert torch.equal(found.cmc, wanted.cmc)


def test_error_bound_holds() -> None:
    """Float32 distances stay within the slack, which is small against them."""
    seen = []
    operator = torch.ops.neuraldeps.retrieval_metrics_from_features

    def record(distance: Tensor, slack: Tensor, query: Tensor, gallery: Tensor, *rest: Any) -> Any:
        seen.append((distance, slack, query.double() * rest[0][:, None], gallery.double() * rest[1][:, None], rest[2]))
        return operator(distance, slack, query, gallery, *rest)

    class Namespace:
        retrieval_metrics_from_features = staticmethod(record)

    for metric in ops.METRICS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops, "neuraldeps", Namespace)
            x, y = torch.randn(20, 300) * 1e3 + 7e3, torch.randn(50, 300) * 1e3 + 7e3
            nk.retrieval_metrics_from_features(x, y, [0] * 20, [0] * 50, metric=metric)
        distance, slack, u, v, inner = seen[-1]
        exact = -(u @ v.T) if inner else torch.stack([(row - v).square().sum(1) for row in u])
        error = (distance.double() - exact).abs().amax(1)
        assert bool((error <= slack).all())
        assert bool((slack < 0.01 * exact.abs().amax()).all())


def test_reduced_precision_of_products_does_not_reach_the_bound() -> None:
    x, y = torch.randn(20, 100), torch.randn(200, 100)
    ids = torch.arange(20) % 5, torch.arange(200) % 5
    wanted = nk.retrieval_metrics_from_features(x, y, *ids)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nk.retrieval_metrics_from_features(x, y, *ids).ap, wanted.ap)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_single_shot_of_features_equals_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(20, 30, dtype=torch.float64), torch.randn(150, 30, dtype=torch.float64)
    _, lists = random_case(20, 150, 10, torch.float32)
    wanted = nk.retrieval_metrics(exact_distances(x, y, "sqeuclidean"), *lists, protocol="single-shot")
    monkeypatch.setattr(ops, "_BLOCK_VALUES", 900)
    monkeypatch.setattr(ops, "_BLOCK_ROWS", 1)
    found = nk.retrieval_metrics_from_features(x, y, *lists, protocol="single-shot")
    torch.testing.assert_close(found.ap, wanted.ap, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.cmc, wanted.cmc, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rules", [{"camera_rule": "sysu", "ranks_of": "identities"}, {"camera_rule": "none"}], ids=str)
def test_rules_of_infrared_data_sets_from_features(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """SYSU-MM01 and RegDB, from features in several blocks and from lists; and a query without a positive."""
    monkeypatch.setattr(ops, "_BLOCK_VALUES", 1000)
    monkeypatch.setattr(ops, "_BLOCK_ROWS", 1)
    monkeypatch.setattr(reference, "_VALUES_AT_ONCE", 1000)
    chance = torch.Generator().manual_seed(4)
    query, gallery = torch.randn(24, 16, generator=chance).half(), torch.randn(130, 16, generator=chance).half()
    lists = [torch.randint(9, (n,), generator=chance) for n in (24, 130)]
    lists[0][7] = 99
    cameras = [torch.tensor([3, 6])[torch.arange(24) % 2], torch.tensor([1, 2, 4, 5])[torch.arange(130) % 4]]
    distances = exact_distances(query, gallery, "cosine")
    wanted = loop(distances.tolist(), *(x.tolist() for x in (*lists, *cameras)), **rules)
    options = {"metric": "cosine", **rules}
    assert_equals_loop(nk.retrieval_metrics_from_features(query, gallery, *lists, *cameras, **options), wanted)
    order = distances.argsort(1, descending=True)
    found = nk.retrieval_metrics(distances.gather(1, order), *lists, *cameras, indices=order, **rules)
    assert_equals_loop(found, wanted)
    assert found.valid.tolist() == [q != 7 for q in range(24)]


MEMORY = """
import resource, torch, neuraldeps_kernels as nk
x, y = torch.randn(4000, 32), torch.randn(60000, 32)
ids = torch.arange(4000) % 1000, torch.arange(60000) % 1000
nk.retrieval_metrics_from_features(x[:8], y[:8], ids[0][:8], ids[1][:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nk.retrieval_metrics_from_features(x, y, *ids)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_no_matrix_is_formed(run_python: Callable[..., Any]) -> None:
    """960 MB it would take."""
    done = run_python(MEMORY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 20


# ------------------------------------------------------------------------------------------------ results, operators


def test_results_as_text_and_numbers() -> None:
    distances, lists = random_case(9, 40, 5, torch.float32)
    lists[0][3] = 77  # no positive
    found = nk.retrieval_metrics(distances, *lists, max_rank=8)
    content = found.to_dict()
    assert content["map"] == found.map
    assert content["valid_queries"] == 8
    assert found.rank(8) == found.cmc[7]
    assert found.rank1 == found.cmc[0]
    lines = found.to_csv().splitlines()
    assert lines[0] == "query,valid,ap,inp,first_rank,truncated"
    assert lines[4] == "3,0,,,,0"
    assert len(lines) == 10
    assert [column.header for column in found.table().columns] == ["mAP", "mINP", "rank-1", "rank-5", "valid queries"]
    with pytest.raises(ValueError, match=r"k must be in 1\.\.8"):
        found.rank(9)


def test_no_valid_query_is_nan_or_zero() -> None:
    """A query without a positive leaves every average; documented."""
    found = nk.retrieval_metrics(torch.zeros(2, 3), [1, 2], [3, 4, 5])
    assert math.isnan(found.map)
    assert found.cmc.isnan().all()
    assert found.to_dict()["map"] is None
    every = nk.retrieval_metrics(torch.zeros(2, 3), [1, 2], [3, 4, 5], denominator="all")
    assert every.map == 0
    assert every.cmc.sum() == 0


def operator_arguments(distances: Tensor, lists: list[Tensor], **change: Any) -> tuple[Any, ...]:
    options = ops._Options(**{**OPTIONS, **change})
    return ops._rules(options, distances, *distances.shape, *lists, junk_label=1).arguments()


OPTIONS = {
    "max_rank": 5,
    "ap": "standard",
    "denominator": "valid",
    "camera_rule": "same",
    "protocol": "all",
    "ranks_of": "images",
    "draws": 1,
    "seed": 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    distances, lists = random_case(4, 20, 3, dtype)
    lists[0] = lists[0] // 2 * 2  # all queries are valid: opcheck does not take NaN for equal
    rules = operator_arguments(distances, lists, ranks_of="identities")
    torch.library.opcheck(torch.ops.neuraldeps.retrieval_metrics.default, (distances, *rules, "standard"))
    ones = torch.ones(4, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    features = torch.randn(4, 6, dtype=dtype), torch.randn(20, 6, dtype=dtype)
    near = exact_distances(*features, "sqeuclidean").float()
    torch.library.opcheck(
        torch.ops.neuraldeps.retrieval_metrics_from_features.default,
        (near, ones[0] * 1e-3, *features, *ones, False, *rules, "standard"),
    )


def test_operator_of_features_equals_its_reference() -> None:
    _, lists = random_case(4, 20, 3, torch.float32)
    features = torch.randn(4, 6), torch.randn(20, 6)
    ones = torch.ones(4, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    for inner in (False, True):
        near = exact_distances(*features, "inner_product" if inner else "sqeuclidean").float()
        rules = operator_arguments(near, lists)
        arguments = (near, ones[0] * 1e-3, *features, *ones, inner, *rules, "standard")
        for found, wanted in zip(
            torch.ops.neuraldeps.retrieval_metrics_from_features(*arguments),
            reference.retrieval_metrics_from_features(*arguments),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, equal_nan=True)


def test_operator_compiles() -> None:
    distances, lists = random_case(4, 20, 3, torch.float32)
    rules = operator_arguments(distances, lists)

    def mean(distances: Tensor) -> Tensor:
        ap: Tensor = torch.ops.neuraldeps.retrieval_metrics(distances, *rules, "standard")[0]
        return ap.nanmean()

    assert torch.compile(mean, fullgraph=True, backend="aot_eager")(distances) == mean(distances)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, dtype=torch.int64), "distance must be float32 or float64"),
        (0, torch.zeros(3), r"distance must be \[nq, ng\]"),
        (1, torch.arange(4), "order has a wrong dtype or shape"),
        (1, torch.tensor([0, 1, 3]), r"order must be in 0\.\.2, not 3"),
        (2, torch.tensor([0, -1]), r"begin must be in 0\.\.3, not -1"),
        (3, torch.tensor([0, 4]), r"end must be in 0\.\.3, not 4"),
        (4, torch.tensor([0, 0]), "query_camera and gallery_camera must be given together"),
        (6, torch.ones(1, 3, dtype=torch.bool), "excluded and group must be given together"),
        (8, torch.tensor([0, -1, 0], dtype=torch.int32), "identity must be in"),
        (9, "median", "precision must be standard, trapezoid or sklearn, not median"),
    ],
)
def test_operator_names_bad_arguments(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = [torch.zeros(2, 3), torch.arange(3), torch.zeros(2).long(), torch.ones(2).long()]
    arguments += [None] * 5 + ["standard"]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.neuraldeps.retrieval_metrics(*arguments)


# ------------------------------------------------------------------------------------------------ bad input


D = torch.zeros(2, 3)
IDS = ([0, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nk.retrieval_metrics(D.numpy(), *IDS), TypeError, "distances must be a tensor"),
        (lambda: nk.retrieval_metrics(D.long(), *IDS), TypeError, "distances must be float32"),
        (lambda: nk.retrieval_metrics(D[0], *IDS), ValueError, "distances must have 2 dimensions"),
        (lambda: nk.retrieval_metrics(D[:, :0], [0, 1], []), ValueError, "a query and a gallery item, not 2 and 0"),
        (lambda: nk.retrieval_metrics(D[:0], [], [0, 1, 2]), ValueError, "a query and a gallery item, not 0 and 3"),
        (lambda: nk.retrieval_metrics(D * math.nan, *IDS), ValueError, "distances must not be NaN.* query 0"),
        (lambda: nk.retrieval_metrics(D, [0], IDS[1]), ValueError, r"query_ids must be \[2\], not \[1\]"),
        (lambda: nk.retrieval_metrics(D, IDS[0], [0]), ValueError, r"gallery_ids must be \[3\], not \[1\]"),
        (lambda: nk.retrieval_metrics(D, [0.5, 1], IDS[1]), TypeError, "query_ids must be integers"),
        (lambda: nk.retrieval_metrics(D, ["a", "b"], IDS[1]), TypeError, "query_ids must be integers"),
        (lambda: nk.retrieval_metrics(D, *IDS, [0, 1]), ValueError, "query_cameras and gallery_cameras must both"),
        (lambda: nk.retrieval_metrics(D, *IDS, [0, 1], [0]), ValueError, r"gallery_cameras must be \[3\]"),
        (lambda: nk.retrieval_metrics(D, *IDS, camera_rule="sysu"), ValueError, "'sysu' needs query_cameras"),
        (lambda: nk.retrieval_metrics(D, *IDS, camera_rule="x"), ValueError, "camera_rule must be one of same, sysu"),
        (lambda: nk.retrieval_metrics(D, *IDS, ap="x"), ValueError, "ap must be one of"),
        (lambda: nk.retrieval_metrics(D, *IDS, denominator="x"), ValueError, "denominator must be one of"),
        (lambda: nk.retrieval_metrics(D, *IDS, protocol="x"), ValueError, "protocol must be one of"),
        (lambda: nk.retrieval_metrics(D, *IDS, ranks_of="x"), ValueError, "ranks_of must be one of"),
        (lambda: nk.retrieval_metrics(D, *IDS, max_rank=0), ValueError, "max_rank must be 1 or more"),
        (lambda: nk.retrieval_metrics(D, *IDS, draws=2.0), TypeError, "draws must be an int"),
        (
            lambda: nk.retrieval_metrics(D, *IDS, protocol="single-shot", ap="sklearn"),
            ValueError,
            "'single-shot' leaves one image",
        ),
        (
            lambda: nk.retrieval_metrics(D * math.nan, *IDS, protocol="single-shot"),
            ValueError,
            "distances must not be NaN",
        ),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=D), TypeError, "indices must be an int64 tensor"),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=D.long()), ValueError, "indices must not repeat.* row 0"),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=D.long()[:1]), ValueError, "indices must have the shape"),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=D.long() + 3), ValueError, r"indices must be in 0\.\.2.*not 3"),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=D.long() - 2), ValueError, r"indices must be in 0\.\.2.*not -2"),
        (lambda: nk.retrieval_metrics(D, *IDS, indices=torch.arange(3).repeat(2, 1)[:, :2]), ValueError, "the shape"),
        (lambda: features(torch.ones(2, 4), torch.ones(3, 5)), ValueError, "one number of columns"),
        (lambda: features(torch.ones(2, 4), torch.ones(3, 4).double()), ValueError, "one dtype and device"),
        (lambda: features(torch.ones(2, 4), torch.ones(3, 4), metric="l1"), ValueError, "metric must be one of"),
        (lambda: features(torch.ones(2, 4) * math.inf, torch.ones(3, 4)), ValueError, "query must be finite.* row 0"),
        (lambda: features(torch.ones(2, 4), torch.zeros(3, 4), metric="cosine"), ValueError, "without zero rows"),
        (lambda: features(torch.ones(2, 4), torch.ones(0, 4), gallery_ids=[]), ValueError, "a gallery item, not 2 and"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def features(query: Tensor, gallery: Tensor, gallery_ids: Any = (0, 1, 2), **options: Any) -> RetrievalMetrics:
    return nk.retrieval_metrics_from_features(query, gallery, [0, 1], gallery_ids, **options)


def test_zero_features_tie() -> None:
    found = nk.retrieval_metrics_from_features(torch.zeros(1, 4), torch.zeros(3, 4), [1], [0, 1, 1])
    assert found.ap.item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_benchmark_times_a_right_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from benchmarks import bench_retrieval_metrics, harness

    monkeypatch.setattr(bench_retrieval_metrics, "measured_rates", lambda *_: harness.Rates(1e9, 1e9))
    monkeypatch.setattr(bench_retrieval_metrics, "EVALUATORS", {"loop": bench_retrieval_metrics.EVALUATORS["loop"]})
    budget = harness.Budget(quick=True, case_seconds=0.0, round_seconds=0.01, search_seconds=5.0)
    for case in (
        bench_retrieval_metrics._matrix_case("tiny", 20, 150, 2.0),
        bench_retrieval_metrics._feature_case("tiny", 20, 150, 2.0),
    ):
        record = harness.measure(case, budget)
        assert record["ours"]["error"] < 1e-9
        assert all(peer["status"] == "timed" for peer in record["peers"])


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    distances, lists = random_case(20, 500, 9, torch.float32)
    query, gallery = torch.randn(20, 64), torch.randn(500, 64)
    for options in ({}, {"junk_label": 2, "camera_rule": "sysu"}, {"protocol": "single-shot"}):
        wanted = nk.retrieval_metrics(distances, *lists, **options)
        found = nk.retrieval_metrics(distances.cuda(), *lists, **options)
        torch.testing.assert_close(found.ap, wanted.ap, equal_nan=True)
        wanted = nk.retrieval_metrics_from_features(query, gallery, *lists, **options)
        found = nk.retrieval_metrics_from_features(query.cuda(), gallery.cuda(), *lists, **options)
        torch.testing.assert_close(found.ap, wanted.ap, equal_nan=True)
