"""CovLasso over several processes: bit for bit the result of one, the same error on every rank, no hang.

Every process is a rank of a gloo group that meets through a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cov_factory as make
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels import (
    CrossCovarianceAccumulator,
    covlasso,
    covlasso_path,
    covlasso_top_k,
    cross_covariance,
    distributed,
)
from neuraldeps_kernels.ops import covlasso as solver
from neuraldeps_kernels.ops.factored import FactoredCovariance

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

START_METHOD = "forkserver"  # its server imports once, where "spawn" would import again in every process
multiprocessing.set_forkserver_preload(["torch", "pytest", "neuraldeps_kernels.distributed"])

PATIENCE = 60.0  # seconds that a group waits
TIMEOUT = 4.0  # the same in the tests of ranks that are lost


@contextlib.contextmanager
def process_group(rank: int, world: int, meeting_point: str, backend: str = "gloo") -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        store=dist.FileStore(meeting_point, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    yield
    dist.destroy_process_group()


def as_rank(rank: int, check: Callable[[int, int], None], world: int, meeting_point: str) -> None:
    with process_group(rank, world, meeting_point):
        check(rank, world)


def on_every_rank(check: Callable[[int, int], None], world: int, folder: Path) -> None:
    """check(rank, world) in `world` processes; raises what one of them raises."""
    arguments = (check, world, str(folder / "meeting_point"))
    torch.multiprocessing.start_processes(as_rank, arguments, nprocs=world, start_method=START_METHOD)


def assert_same_bits(got: Any, want: Any) -> None:
    """Two solutions or paths agree in every field: type, shape and value."""
    assert type(got) is type(want)
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "coefficients":
            assert a.shape == b.shape
            pairs = [(x(a), x(b)) for x in (Tensor.crow_indices, Tensor.col_indices, Tensor.values)]
        else:
            pairs = [(a, b)]
        for x, y in pairs:
            assert (x.dtype, x.shape) == (y.dtype, y.shape), field.name
            assert torch.equal(x, y), field.name


def streams(n: int = 9, m: int = 14) -> tuple[Tensor, Tensor]:
    predictors = make.normal(400, m, seed=5) @ make.normal(m, m, seed=6) + 10
    return predictors[:, :n] @ make.normal(n, n, seed=7) + make.normal(400, n, seed=8) - 3, predictors


# ------------------------------------------------------------------------------------------------ one process or many


def covlasso_cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    S = make.clustered(23, 12, seed=1)  # 23 targets: no multiple of 2 or 4
    T = 7
    some = torch.tensor([3, 3, 22, 0, 9, 14, 1])
    lam = torch.linspace(0.01, 0.3, T, dtype=torch.float64)
    candidates = torch.rand(T, 23, generator=torch.Generator().manual_seed(2)) < 0.6
    candidates[2] = False
    factors = torch.linspace(0.5, 2, 23, dtype=torch.float64)
    return {
        "every target": (S, {"lam_ratio": 0.1}),
        "float32": (S.float(), {"lam": 0.02}),
        "bfloat16": (S.bfloat16(), {"lam_ratio": 0.5}),
        "rows of arguments": (S, {"lam": lam, "targets": some, "candidates": candidates, "penalty_factors": factors}),
        "ratios, one mask": (S, {"lam_ratio": lam, "targets": some.tolist(), "candidates": candidates[0]}),
        "one target": (S, {"lam": 0.1, "targets": [5]}),
        "three targets": (S, {"lam": [0.1, 0.2, 0.3], "targets": some[:3]}),
        "no target": (S, {"lam_ratio": 0.1, "targets": []}),
        "no coefficient": (S, {"lam_ratio": 1.0}),
        "one category": (S[:1, :1], {"lam": 1.0}),
        "capped": (S, {"lam_ratio": 1e-3, "max_pivots": 3}),
        "restricted": (S, {"lam_ratio": 0.1, "nonnegative": True, "ridge": 0.1, "tol": 1e-3}),
    }


def path_cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    S = make.clustered(11, 8, seed=3)
    grid = torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64)
    rows = grid * torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None]
    return {
        "every target": (S, {"n_lambdas": 6}),
        "one grid": (S.float(), {"lams": grid}),
        "grid per target": (S, {"lams": rows, "targets": [3, 3, 0, 10, 7]}),
        "one target": (S, {"lams": rows[:1], "targets": [2]}),
        "no target": (S, {"n_lambdas": 4, "targets": []}),
        "two networks": (cross_covariance(*streams()), {"n_lambdas": 4, "nonnegative": True}),
    }


def top_k_cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    S = make.clustered(11, 8, seed=3)
    return {
        "every target": (S, {"k": 3}),
        "best fit": (S, {"k": 2, "position": 0.999, "targets": [4, 1, 1]}),
        "one target": (S, {"k": 1, "targets": [2]}),
        "no target": (S, {"k": 1, "targets": []}),
        "two networks": (cross_covariance(*streams()), {"k": 4}),
    }


def compare_with_one_process(rank: int, world: int) -> None:
    calls = (
        (distributed.covlasso, covlasso, covlasso_cases()),
        (distributed.covlasso_path, covlasso_path, path_cases()),
        (distributed.covlasso_top_k, covlasso_top_k, top_k_cases()),
    )
    for over_ranks, alone, cases in calls:
        for cov, keywords in cases.values():
            assert_same_bits(over_ranks(cov, **keywords), alone(cov, **keywords))

    S = make.clustered(23, 12, seed=1)
    start = covlasso(S, lam_ratio=0.3)
    keywords = {"lam_ratio": 0.2, "warm_start": start}
    assert_same_bits(distributed.covlasso(S, **keywords), covlasso(S, **keywords))
    path_keywords = {"n_lambdas": 3, "warm_start": start}
    assert_same_bits(distributed.covlasso_path(S, **path_keywords), covlasso_path(S, **path_keywords))
    factored = FactoredCovariance(make.normal(50, 6, seed=1), make.normal(23, 6, seed=2))
    for over_ranks, alone in (
        (distributed.covlasso(factored, lam_ratio=0.3), covlasso(factored, lam_ratio=0.3)),
        (distributed.covlasso_path(factored, n_lambdas=4), covlasso_path(factored, n_lambdas=4)),
        (distributed.covlasso_top_k(factored, 2), covlasso_top_k(factored, 2)),
    ):
        torch.testing.assert_close(over_ranks.dense(), alone.dense(), rtol=1e-5, atol=1e-6)
        assert torch.equal(over_ranks.status, alone.status)
    tracked = S.clone().requires_grad_()
    assert not distributed.covlasso(tracked, lam_ratio=0.3).coefficients.requires_grad

    pair = dist.new_group([0, 1])
    if rank < 2:
        assert_same_bits(distributed.covlasso(S, 0.1, group=pair), covlasso(S, 0.1))
    else:
        with pytest.raises(ValueError, match="group does not contain this process"):
            distributed.covlasso(S, 0.1, group=pair)


@pytest.mark.parametrize("world", [2, 4])
def test_bit_for_bit_the_result_of_one_process(world: int, tmp_path: Path) -> None:
    on_every_rank(compare_with_one_process, world, tmp_path)


def solve_what_was_streamed(rank: int, world: int) -> None:
    """Rows r = rank modulo world - 1, the last rank without any: streamed, added up, solved."""
    targets, predictors = streams()
    mine = slice(rank, None, world - 1) if rank < world - 1 else slice(0, 0)
    within, across = nk.CovarianceAccumulator(14), CrossCovarianceAccumulator(9, 14)
    for x, y in zip(targets[mine].split(60), predictors[mine].split(60), strict=True):
        within.update(y)
        across.update(x, y)
    with pytest.raises(ValueError, match=r"cov must be the same on all ranks, but differs from rank 0 on \[1"):
        distributed.covlasso(torch.eye(3) * (1 + rank), 0.1)
    if world == 2:
        unlike = [nk.CovarianceAccumulator(3), nk.CovarianceAccumulator(3, center=False), nk.CovarianceAccumulator(4)]
        for other in (*unlike[1:], CrossCovarianceAccumulator(3, 3)):
            with pytest.raises(ValueError, match=rf"accumulators of one kind.*; on \[{1 - rank}\] they differ"):
                (unlike[0], other)[rank].all_reduce()
    within.all_reduce()
    across.all_reduce()
    S, C = within.compute(), across.compute()
    for got, exact in (
        (distributed.covlasso(S, lam_ratio=0.05), covlasso(nk.covariance(predictors), lam_ratio=0.05)),
        (distributed.covlasso(C, lam_ratio=0.05), covlasso(cross_covariance(targets, predictors), lam_ratio=0.05)),
    ):
        torch.testing.assert_close(got.err2, exact.err2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.dense(), exact.dense(), rtol=1e-3, atol=1e-4)
        assert not got.status.any()
    assert distributed.covlasso(C, lam_ratio=0.05).relative_error.max() < 0.5


@pytest.mark.parametrize("world", [2, 4])
def test_streams_are_added_up_and_solved(world: int, tmp_path: Path) -> None:
    on_every_rank(solve_what_was_streamed, world, tmp_path)


# ------------------------------------------------------------------------------------------------ errors


def raise_on_every_rank(rank: int, world: int) -> None:
    """Input that is wrong on rank 1 alone, or that rank 1 alone meets, raises everywhere; the group stays usable."""
    S = make.clustered(6, 4, seed=1)
    one = rank == 1

    def at_category_1(value: float) -> Tensor:  # target 1 belongs to rank 1
        return torch.where(torch.arange(6) == 1, value, 0.1).double()

    nan = S.clone()
    nan[2, 2] = torch.nan
    cross = cross_covariance(*streams())
    other_cross = dataclasses.replace(cross, variance=cross.variance * (1 + 1e-15 * one))
    mask = torch.ones(6, 6, dtype=torch.bool)
    start = covlasso(S, 0.2)
    differs = r"must be the same on all ranks, but differs from rank 0 on \[1\]"
    here = "" if one else "rank 1: "  # the rank that met the error raises its own
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, f"cov {differs}", lambda: distributed.covlasso(nan if one else S, 0.1)),
        (ValueError, f"cov {differs}", lambda: distributed.covlasso(S.float() if one else S, 0.1)),
        (ValueError, f"cov {differs}", lambda: distributed.covlasso(other_cross, 0.1)),
        (ValueError, f"lam {differs}", lambda: distributed.covlasso(S, -0.1 if one else 0.1)),
        (ValueError, f"lam {differs}", lambda: distributed.covlasso(S, at_category_1(0.2 if one else 0.1))),
        (ValueError, f"targets {differs}", lambda: distributed.covlasso(S, 0.1, targets=[0, 1, 2][: 3 - rank])),
        (ValueError, f"candidates {differs}", lambda: distributed.covlasso(S, 0.1, candidates=mask if one else None)),
        (ValueError, f"warm_start {differs}", lambda: distributed.covlasso(S, 0.1, warm_start=start if one else None)),
        (ValueError, f"lams {differs}", lambda: distributed.covlasso_path(S, lams=[0.2, 0.1 + 0.01 * one])),
        (ValueError, f"k {differs}", lambda: distributed.covlasso_top_k(S, 1 + one)),
        (
            ValueError,
            f"the function called {differs}",
            lambda: distributed.covlasso_path(S) if one else distributed.covlasso(S, 0.1),
        ),
        (TypeError, f"^{here}cov must be .*, not list", lambda: distributed.covlasso([1.0] if one else S, 0.1)),
        (ValueError, f"^{here}cov must be a square", lambda: distributed.covlasso(S[0] if one else S, 0.1)),
        (ValueError, f"^{here}lam must be positive", lambda: distributed.covlasso(S, at_category_1(-1))),
        (ValueError, "targets contains 9", lambda: distributed.covlasso(S, 0.1, targets=[0, 9])),
        (ValueError, "lam must have one entry for each of the 6", lambda: distributed.covlasso(S, torch.ones(5))),
        (
            ValueError,
            "warm_start must have 2 targets",
            lambda: distributed.covlasso(S, 1, targets=[0, 1], warm_start=start),
        ),
        (ValueError, "cov has a NaN", lambda: distributed.covlasso(nan, 0.1)),
        (ValueError, "targets must be one-dimensional", lambda: distributed.covlasso(S, 0.1, targets=[[0]])),
    ]
    for error, text, call in calls:
        with pytest.raises(error, match=text):
            call()
        assert_same_bits(distributed.covlasso(S, 0.1), covlasso(S, 0.1))

    def faulty(*args: Any, **keywords: Any) -> None:
        raise KeyError("a failure of the solver")

    if one:
        solver.covlasso = faulty
    with pytest.raises(KeyError if one else RuntimeError, match="a failure of the solver"):
        distributed.covlasso(S, 0.1)


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    on_every_rank(raise_on_every_rank, 2, tmp_path)


def lose_rank_1(rank: int, world: int, folder: str, how: str) -> None:
    """The last thing that rank 1 does is to start solving; the others leave their error and how long it took."""
    with process_group(rank, world, f"{folder}/meeting_point"):
        S = make.clustered(30, 10, seed=1)
        impatient = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
        distributed.covlasso(S, 0.1, group=impatient)
        accumulator = CrossCovarianceAccumulator(200, 200)
        if rank == 1:
            solver.covlasso = lambda *args, **keywords: os._exit(9) if how == "dies" else time.sleep(60)
            accumulator._add_product = lambda *args: os._exit(9)
        start = time.monotonic()
        try:
            if how == "dies while adding up":
                accumulator.all_reduce(impatient)
            distributed.covlasso(S, 0.1, group=impatient)
        except RuntimeError as error:
            Path(f"{folder}/rank{rank}").write_text(f"{time.monotonic() - start} {error}")
        os._exit(0)


@pytest.mark.parametrize(("world", "how"), [(2, "dies"), (2, "hangs"), (4, "dies"), (2, "dies while adding up")])
def test_the_others_fail_when_a_rank_is_lost(world: int, how: str, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context(START_METHOD)
    processes = [context.Process(target=lose_rank_1, args=(rank, world, str(tmp_path), how)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        survivors = [process for rank, process in enumerate(processes) if rank != 1]
        for process in survivors:
            process.join(PATIENCE)
        assert [process.exitcode for process in survivors] == [0] * (world - 1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank in range(world):
        if rank == 1:
            continue
        seconds, text = (tmp_path / f"rank{rank}").read_text().split(" ", 1)
        assert float(seconds) <= TIMEOUT + 10
        if how == "dies while adding up":
            assert text.startswith("all_reduce: the exchange with the other processes failed; one of them has died or")
        else:
            assert text.startswith(f"covlasso on rank {rank} of {world}: the exchange with the other ranks failed")
            assert "has died or did not call covlasso" in text


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"covlasso_path needs torch.distributed: call .*init_process_group first"):
        distributed.covlasso_path(torch.eye(3))


def test_checksums_see_every_difference() -> None:
    S = make.clustered(8, 4, seed=1)
    swapped = S[[1, 0, 2, 3, 4, 5, 6, 7]][:, [1, 0, 2, 3, 4, 5, 6, 7]]
    last_bit = S.clone()
    last_bit[3, 4] = torch.nextafter(S[3, 4], S[3, 4] + 1)
    cross = nk.CrossCovariance(S, S[:3], S[0, :3].clone(), S[0], S[0, :3].clone(), False)
    features, weight = make.normal(50, 2, seed=1), make.normal(8, 2, seed=2)
    factored = [FactoredCovariance(features, weight), FactoredCovariance(features, weight + 1)]
    values = [S, swapped, last_bit, -S, S.float(), S[:4], S.view(-1), S * torch.nan, torch.eye(2), torch.eye(2).bool()]
    values += [cross, dataclasses.replace(cross, cross=S[1:4]), covlasso(S, 0.1), covlasso(S, 0.2)]
    values += [*factored, FactoredCovariance(features + features.abs(), weight)]
    values += [None, True, 0.1, 0.2, [1], (2,), torch.eye(2).bfloat16()]
    checksums = [distributed._checksum(value) for value in values]
    assert len(set(checksums)) == len(values)
    assert distributed._checksum(S.T.contiguous().T) == checksums[0]
    assert distributed._checksum(S.clone()) == checksums[0]
    again = FactoredCovariance(features.clone(), weight.clone())
    assert distributed._checksum(again) == distributed._checksum(factored[0])


def compare_on_the_gpu(rank: int, meeting_point: str) -> None:
    with process_group(rank, 1, meeting_point, backend="nccl"):
        S = make.clustered(40, 12, seed=1).cuda()
        assert_same_bits(distributed.covlasso(S, lam_ratio=0.1), covlasso(S, lam_ratio=0.1))
        some = torch.tensor([3, 1, 3], device="cuda")
        got = distributed.covlasso_path(S.float(), n_lambdas=4, targets=some)
        assert_same_bits(got, covlasso_path(S.float(), n_lambdas=4, targets=some))


@pytest.mark.gpu
def test_gpu_nccl(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare_on_the_gpu, (str(tmp_path / "meeting_point"),), nprocs=1)
