"""The CUDA kernels of retrieval_metrics, emulated, through their C interface; and on a device."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reranking_cuda import Features, features_of
from torch import Tensor

from neuraldeps_kernels.ops import retrieval_metrics as ops
from neuraldeps_kernels.reference import retrieval_metrics as reference
from neuraldeps_kernels.reference.retrieval_metrics import Metrics, Rules

F32, F64, I32 = torch.float32, torch.float64, torch.int32
P, I, N32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
PRECISIONS = ("standard", "trapezoid", "sklearn")
KERNEL = emulation.ROOT / "csrc" / "cuda" / "retrieval_metrics.cu"
# Several tiles of positives, and the flags of identities in the workspace.
SMALL = ("ND_RETRIEVAL_METRICS_TILE=8", "ND_RETRIEVAL_METRICS_FLAG_BYTES=0")


class Arguments(ctypes.Structure):
    """NdRetrievalMetricsArgs of cuda_api.h."""

    _fields_ = [
        ("distance", P), ("dtype", N32), ("nq", I), ("ng", I), ("stride", I), ("order", P), ("begin", P), ("end", P),
        ("query_camera", P), ("gallery_camera", P), ("excluded", P), ("group", P), ("groups", I), ("identity", P),
        ("precision", N32), ("slack", P), ("features", Features), ("query_unit", P), ("gallery_unit", P),
        ("inner_product", N32), ("ap", P), ("inp", P), ("first_rank", P),
    ]  # fmt: skip


class Emulated:
    """The operators by the C interface of an emulated library; results and workspace are nonsense before."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._size, self._run = functions.nd_retrieval_metrics_workspace, functions.nd_retrieval_metrics
        self._size.restype = ctypes.c_size_t

    def retrieval_metrics(self, distance: Tensor, *rules: Any, **more: Any) -> Metrics:
        *tensors, precision = rules
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        names = ("order", "begin", "end", "query_camera", "gallery_camera", "excluded", "group", "identity")
        nq, ng = distance.shape
        args = Arguments(distance.data_ptr(), distance.dtype == F64, nq, ng, distance.stride(0), **more)
        for name, pointer in zip(names, pointers, strict=True):
            setattr(args, name, pointer)
        args.groups = 0 if tensors[5] is None else len(tensors[5])
        args.precision = PRECISIONS.index(precision)
        ap, inp, first = torch.full((nq,), -7.0, dtype=F64), torch.full((nq,), -7.0, dtype=F64), torch.full((nq,), -7)
        args.ap, args.inp, args.first_rank = ap.data_ptr(), inp.data_ptr(), first.data_ptr()
        workspace = torch.full((self._size(ctypes.byref(args)) + 512,), 0xA5, dtype=torch.uint8)
        start = -workspace.data_ptr() % 256
        assert self._run(ctypes.byref(args), P(workspace.data_ptr() + start), None) == 0
        assert (workspace[len(workspace) - 512 + start :] == 0xA5).all()
        return ap, inp, first

    def retrieval_metrics_from_features(
        self, distance: Tensor, slack: Tensor, query: Tensor, gallery: Tensor, query_unit: Tensor,
        gallery_unit: Tensor, inner_product: bool, *rules: Any,
    ) -> Metrics:  # fmt: skip
        return self.retrieval_metrics(
            distance, *rules, slack=slack.data_ptr(), features=features_of(query, gallery),
            query_unit=query_unit.data_ptr(), gallery_unit=gallery_unit.data_ptr(), inner_product=inner_product,
        )  # fmt: skip


class Device:
    """The same by the operators, on a device."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.neuraldeps, name)
        return lambda *args: tuple(x.cpu() for x in operator(*(x.cuda() if isinstance(x, Tensor) else x for x in args)))


@pytest.fixture(scope="session")
def run() -> Emulated:
    return Emulated(emulation.build_library([KERNEL]))


@pytest.fixture(scope="session")
def run_small() -> Emulated:
    return Emulated(emulation.build_library([KERNEL], definitions=SMALL))


@pytest.fixture(params=["default", "small", pytest.param("device", marks=pytest.mark.gpu)])
def either(request: pytest.FixtureRequest, run: Emulated, run_small: Emulated) -> Emulated | Device:
    return {"default": run, "small": run_small, "device": Device()}[request.param]


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ problems


def rules_of(nq: int, ng: int, identities: int, seed: int = 0, **options: Any) -> Rules:
    """Random identities and cameras 1 to 6; options are those of retrieval_metrics."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    every = {"camera_rule": "same", "junk_label": None, "ranks_of": "images"} | options
    junk = every.pop("junk_label")
    chosen = ops._Options(50, "standard", "valid", protocol="all", draws=1, seed=0, **every)
    ids, cameras = (draw(0, identities + 1, nq), draw(0, identities, ng)), (draw(1, 7, nq), draw(1, 7, ng))
    return ops._rules(chosen, torch.empty(0), nq, ng, *ids, *cameras, junk)


RULES: list[dict[str, Any]] = [
    {},
    {"camera_rule": "none"},
    {"camera_rule": "sysu", "junk_label": 0},
    {"junk_label": 1, "ranks_of": "identities"},
]
# (nq, ng, identities): the smallest; several tiles of 8 positives; none at all for many; more items than threads
SHAPES = [(1, 1, 1), (4, 70, 2), (9, 40, 60), (3, 1300, 9)]


def distances(nq: int, ng: int, dtype: torch.dtype, levels: int = 0, seed: int = 1) -> Tensor:
    """Of both signs; with `levels`, so many different ones, both zeros among them."""
    d = torch.randn(nq, ng, generator=torch.Generator().manual_seed(seed), dtype=F64)
    if levels:
        d = (d * levels / 4).round().clamp(-levels, levels) / 8
        d[:, ::2] = torch.where(d[:, ::2] == 0, -0.0, d[:, ::2])
    return d.to(dtype)


def assert_equal(got: Metrics, wanted: Metrics) -> None:
    assert torch.equal(got[2], wanted[2])
    for own, exact in zip(got[:2], wanted[:2], strict=True):
        assert torch.equal(own.isnan(), exact.isnan())
        assert (own - exact).nan_to_num().abs().max() <= 1e-13


# ------------------------------------------------------------------------------------------------ distances


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_metrics_match_the_reference(either, shape, options, precision):
    """Check 10, with and without ties."""
    nq, ng, identities = shape
    rules = rules_of(nq, ng, identities, **options)
    for dtype, levels in ((F32, 0), (F32, 5), (F64, 0)):
        d = distances(nq, ng, dtype, levels)
        args = (d, *rules.arguments(), precision)
        assert_equal(either.retrieval_metrics(*args), reference.retrieval_metrics(*args))


def test_nan_is_found_wherever_it_is(either):
    """In a row without a positive too; other rows do not change."""
    rules = rules_of(6, 300, 4)
    rules = replace(rules, end=torch.where(torch.arange(6) == 2, rules.begin, rules.end))
    d = distances(6, 300, F32)
    plain = either.retrieval_metrics(d, *rules.arguments(), "standard")
    spoiled = d.clone()
    spoiled[2, 299] = spoiled[4, 0] = torch.nan
    got = either.retrieval_metrics(spoiled, *rules.arguments(), "standard")
    assert plain[2][2] == 0
    assert (got[2][[2, 4]] == -1).all()
    assert got[0][[2, 4]].isnan().all()
    others = [0, 1, 3, 5]
    assert_equal(tuple(x[others] for x in got), tuple(x[others] for x in plain))


def test_infinite_distances_and_strides(either):
    rules = rules_of(5, 200, 3)
    d = distances(5, 200, F32, levels=3)
    d[:, 20:60] = torch.inf
    d[:, 90:95] = -torch.inf
    wide = torch.full((5, 231), torch.nan)[:, :200]
    wide.copy_(d)
    args = (*rules.arguments(), "sklearn")
    wanted = reference.retrieval_metrics(d, *args)
    assert_equal(either.retrieval_metrics(d, *args), wanted)
    if isinstance(either, Emulated):
        assert_equal(either.retrieval_metrics(wide, *args), wanted)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nq=st.integers(1, 4),
    ng=st.integers(1, 60),
    identities=st.integers(1, 20),
    seed=st.integers(0, 10_000),
    levels=st.integers(0, 8),
    options=st.sampled_from(RULES),
    precision=st.sampled_from(PRECISIONS),
)
def test_property_metrics_match(run_small, nq, ng, identities, seed, levels, options, precision):
    rules = rules_of(nq, ng, identities, seed, **options)
    args = (distances(nq, ng, F32, levels, seed), *rules.arguments(), precision)
    assert_equal(run_small.retrieval_metrics(*args), reference.retrieval_metrics(*args))


def test_numbers_out_of_range_are_skipped(run):
    """No crash, no access elsewhere; queries whose numbers are right do not change."""
    rules = rules_of(4, 30, 3, junk_label=0, ranks_of="identities")
    d = distances(4, 30, F32)
    plain = run.retrieval_metrics(d, *rules.arguments(), "standard")
    begin, end, group = rules.begin.clone(), rules.end.clone(), rules.group.clone()
    begin[1], end[2], group[3] = -(2**40), 2**40, 2**40
    got = run.retrieval_metrics(d, *replace(rules, begin=begin, end=end, group=group).arguments(), "standard")
    assert_equal(tuple(x[:1] for x in got), tuple(x[:1] for x in plain))
    bad = replace(rules, order=rules.order + 2**33, identity=rules.identity - 1000)
    assert run.retrieval_metrics(d, *bad.arguments(), "standard")[2].tolist() == [0] * 4


# ------------------------------------------------------------------------------------------------ features


def feature_arguments(
    dtype: torch.dtype, inner: bool, slack: float, nq: int = 7, ng: int = 300, D: int = 10
) -> tuple[Any, ...]:
    """Arguments before the rules: small integers, among them duplicates, and distances off by up to `slack`."""
    generator = torch.Generator().manual_seed(3)
    query, gallery = (torch.randint(-2, 3, (n, D), generator=generator).to(dtype) for n in (nq, ng))
    gallery[ng // 2 :] = gallery[: ng - ng // 2]
    gallery[5] = query[0]
    unit = (torch.full((nq,), 0.25, dtype=F64), torch.full((ng,), 0.25, dtype=F64))
    x, y = query.double() / 4, gallery.double() / 4
    exact = -(x @ y.T) if inner else torch.cdist(x, y).square()
    error = slack * (2 * torch.rand(nq, ng, generator=generator, dtype=F64) - 1)
    return (exact + error).float(), torch.full((nq,), slack + 1e-5, dtype=F64), query, gallery, *unit, inner


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("slack", [0.0, 0.05, 1e3])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_metrics_of_features_are_those_of_exact_keys(either, dtype, inner, slack, precision):
    """Many equal keys; errors that leave almost nothing open, some, and everything."""
    for options in RULES[::3]:
        args = (*feature_arguments(dtype, inner, slack), *rules_of(7, 300, 8, **options).arguments(), precision)
        got, wanted = either.retrieval_metrics_from_features(*args), reference.retrieval_metrics_from_features(*args)
        assert_equal(got, wanted)


def test_thread_order_does_not_matter(either, monkeypatch):
    rules = rules_of(5, 300, 4, ranks_of="identities").arguments()
    d = distances(5, 300, F32, levels=4)

    def results() -> list[Tensor]:
        of_features = feature_arguments(F32, False, 0.05, nq=5)
        found = (
            *either.retrieval_metrics(d, *rules, "trapezoid"),
            *either.retrieval_metrics_from_features(*of_features, *rules, "sklearn"),
        )
        return [x.nan_to_num(-1) for x in found]

    plain = results()
    for order in ("reverse", "random:1", "random:2"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


def test_refused_arguments_and_no_query(run):
    for change in ({"nq": -1}, {"ng": 2**31}, {"precision": 3}, {"dtype": 2}):
        args = Arguments(nq=2, ng=5)
        for name, value in change.items():
            setattr(args, name, value)
        assert run._run(ctypes.byref(args), None, None) != 0
    rules = rules_of(2, 5, 2).of_queries(slice(0, 0)).arguments()
    assert [len(x) for x in run.retrieval_metrics(torch.zeros(0, 5), *rules, "standard")] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_public_functions_on_a_device(options, metric):
    """Equal to those of the CPU to the last digit of a float64 sum; equal rows tie on both."""
    generator = torch.Generator().manual_seed(5)
    query, gallery = (torch.randn(n, 48, generator=generator) for n in (60, 3000))
    gallery[1000:1500] = gallery[:500]
    ids = [torch.randint(0, 40, (n,), generator=generator) for n in (60, 3000)]
    cameras = [torch.randint(1, 7, (n,), generator=generator) for n in (60, 3000)]
    exact = ops.retrieval_metrics_from_features(query, gallery, *ids, *cameras, metric=metric, **options)
    got = ops.retrieval_metrics_from_features(query.cuda(), gallery.cuda(), *ids, *cameras, metric=metric, **options)
    d = torch.cdist(query, gallery)
    for own, wanted in (
        (got, exact),
        (
            ops.retrieval_metrics(d.cuda(), *ids, *cameras, **options),
            ops.retrieval_metrics(d, *ids, *cameras, **options),
        ),
    ):
        assert torch.equal(own.cmc, wanted.cmc)
        assert torch.equal(own.first_rank.nan_to_num(), wanted.first_rank.nan_to_num())
        assert (own.ap - wanted.ap).nan_to_num().abs().max() <= 1e-13


@pytest.mark.gpu
def test_large_rows_on_a_device():
    """More positives than a tile holds, and identities whose flags lie in the workspace."""
    rules = rules_of(20, 150_000, 60, ranks_of="identities")
    args = (distances(20, 150_000, F32, levels=64), *rules.arguments(), "sklearn")
    assert_equal(Device().retrieval_metrics(*args), reference.retrieval_metrics(*args))
