"""Neighbours and re-ranking over several processes and in blocks: those of one process and of one call."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import clustered
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.distributed_retrieval import sharded_k_reciprocal_rerank, sharded_knn
from neuraldeps_kernels.ops.chunked_retrieval import k_reciprocal_rerank_chunked, knn_chunked
from neuraldeps_kernels.reference import retrieval as reference

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
START_METHOD = "forkserver"  # its server imports once, where "spawn" would import again in every process
multiprocessing.set_forkserver_preload(["torch", "pytest", "neuraldeps_kernels.distributed_retrieval"])
PATIENCE = 60.0  # seconds that a group waits


def as_rank(rank: int, check: Callable[[int, int], None], world: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(meeting_point, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    check(rank, world)
    dist.destroy_process_group()


def on_every_rank(check: Callable[[int, int], None], world: int, folder: Path) -> None:
    """check(rank, world) in `world` processes; raises what one of them raises."""
    arguments = (check, world, str(folder / "meeting_point"))
    torch.multiprocessing.start_processes(as_rank, arguments, nprocs=world, start_method=START_METHOD)


def shard(x: Tensor, rank: int, world: int) -> Tensor:
    """Unequal parts: 1/2 of the rows for the first rank, 1/4 for the next, ..., the rest for the last."""
    ends = [0, *(len(x) - (len(x) >> (r + 1)) for r in range(world - 1)), len(x)]
    return x[ends[rank] : ends[rank + 1]]


def rows_of(x: Tensor, rank: int, world: int) -> slice:
    numbers = shard(torch.arange(len(x)), rank, world)
    return slice(int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else slice(0, 0)


def compare_with_one_process(rank: int, world: int) -> None:
    query, gallery = clustered(37, 0), clustered(150, 1)
    gallery[100:120] = gallery[:20]  # ties across ranks
    own = rows_of(query, rank, world)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for metric in ("sqeuclidean", "cosine", "inner_product"):
            x, y = query.to(dtype), gallery.to(dtype)
            wanted = nk.knn(x, 9, y=y, metric=metric)
            got = sharded_knn(shard(x, rank, world), 9, y=shard(y, rank, world), metric=metric)
            assert all(torch.equal(a, b[own]) for a, b in zip(got, wanted, strict=True))
    within = sharded_knn(shard(gallery, rank, world), 4)
    wanted = nk.knn(gallery, 4)
    assert all(torch.equal(a, b[rows_of(gallery, rank, world)]) for a, b in zip(within, wanted, strict=True))
    for options in (
        {},
        {"k1": 6, "k2": 1, "lambda_value": 0.0},
        {"power": 4, "normalize": "none", "list_length": "k1"},
    ):
        parts = (shard(query, rank, world), shard(gallery, rank, world))
        dense = nk.k_reciprocal_rerank(query, gallery, **options)
        scale = max(1.0, float(dense.abs().max()))
        torch.testing.assert_close(
            sharded_k_reciprocal_rerank(*parts, **options), dense[own], rtol=0, atol=1e-6 * scale
        )
        distances, indices = sharded_k_reciprocal_rerank(*parts, top_k=20, **options)
        best, _ = nk.k_reciprocal_rerank(query, gallery, top_k=20, **options)
        torch.testing.assert_close(distances, best[own], rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(dense[own].gather(1, indices).double(), best[own], rtol=0, atol=1e-6 * scale)


@needs_distributed
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    on_every_rank(compare_with_one_process, world, tmp_path)


def meet_errors(rank: int, world: int) -> None:
    x = clustered(8, rank)
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: sharded_knn(x, 3 + rank), ValueError, "k must be the same on all ranks"),
        (lambda: sharded_knn(x[:, : 24 - rank], 3), ValueError, "x must be the same on all ranks"),
        (lambda: sharded_knn(x, 3, y=x if rank else None), ValueError, "whether y is given must be the same"),
        (lambda: sharded_knn(x, 17), ValueError, "k must be in 1..16"),
        (lambda: sharded_knn(x * (torch.inf if rank == 1 else 1), 3), ValueError, "must be finite"),
        (lambda: sharded_knn(x, 3, metric="l1" if rank else "cosine"), ValueError, "metric must be one of"),
        (lambda: sharded_k_reciprocal_rerank(x, x, k1=0), ValueError, "k1 must be 1 or more"),
        (
            lambda: sharded_k_reciprocal_rerank(x, x, lambda_value=0.1 * rank),
            ValueError,
            "lambda_value must be the same",
        ),
        (lambda: sharded_k_reciprocal_rerank(x, x * (torch.nan if rank else 1)), ValueError, "must be finite"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    none = sharded_k_reciprocal_rerank(x, x[:0], top_k=2)
    assert (none[1] == -1).all()
    some = x[: 8 * rank]  # nothing on the first rank
    assert sharded_knn(some, 2)[1].shape == (8 * rank, 2)
    assert sharded_k_reciprocal_rerank(some, x).shape == (8 * rank, 16)
    assert sharded_k_reciprocal_rerank(some, some, top_k=9)[1].shape == (8 * rank, 9)


@needs_distributed
def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    on_every_rank(meet_errors, 2, tmp_path)


@needs_distributed
def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        sharded_knn(torch.randn(3, 2), 1)


# ------------------------------------------------------------------------------------------------ blocks


# rows of a block: less than the neighbours wanted, no divisor of the rows, a divisor, all
@pytest.mark.parametrize("block_rows", [5, 32, 50, 1000])
def test_blocks_do_not_change_the_lists(block_rows: int) -> None:
    x, y = clustered(50, 2), clustered(150, 3)
    y[100:120] = y[:20]
    for metric in ("sqeuclidean", "cosine", "inner_product"):
        wanted = nk.knn(x, 9, y=y, metric=metric)
        got = knn_chunked(x, 9, y=y, metric=metric, device="cpu", block_rows=block_rows)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    got = knn_chunked(y.double(), 30, device="cpu", block_rows=block_rows)
    assert all(torch.equal(a, b) for a, b in zip(got, nk.knn(y.double(), 30), strict=True))


@pytest.mark.parametrize("block_rows", [16, 1000])
def test_reranking_in_blocks_equals_one_call(block_rows: int) -> None:
    query, gallery = clustered(37, 4), clustered(150, 5)
    where = {"device": "cpu", "block_rows": block_rows}
    dense = nk.k_reciprocal_rerank(query, gallery)
    torch.testing.assert_close(k_reciprocal_rerank_chunked(query, gallery, **where), dense, rtol=0, atol=1e-6)
    wanted = nk.k_reciprocal_rerank(query, gallery, top_k=12)
    got = k_reciprocal_rerank_chunked(query, gallery, top_k=12, **where)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-12)
    assert k_reciprocal_rerank_chunked(query[:0], gallery, **where).shape == (0, 150)


@pytest.mark.gpu
def test_blocks_on_a_gpu() -> None:
    x, y = clustered(50, 6), clustered(150, 7)
    wanted = nk.knn(x, 9, y=y)
    got = knn_chunked(x, 9, y=y, device="cuda", block_rows=32)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(
        k_reciprocal_rerank_chunked(x, y, device="cuda", block_rows=32), nk.k_reciprocal_rerank(x, y), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("reduced", [False, True])
def test_largest_distances_of_two_sets(reduced: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        x, y = clustered(40, 8).to(dtype), (3 * clustered(333, 9)).to(dtype)
        key, index, largest = torch.ops.neuraldeps.neighbors_and_largest(x, y, 7, reduced)
        every = (x.double()[:, None] - y.double()).square().sum(-1)
        torch.testing.assert_close(largest, every.amax(1), rtol=1e-13, atol=0)
        assert torch.equal(key.float(), nk.knn(x, 7, y=y)[0].float())
        plain = reference.neighbors_and_largest(x, y, 7, reduced)
        assert torch.equal(index, plain[1])
        torch.testing.assert_close(largest, plain[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: knn_chunked(x, 0, device="cpu"), ValueError, "k must be in 1..9"),
        (lambda x: knn_chunked(x, 1, device="cpu", block_rows=0), ValueError, "block_rows must be 1 or more"),
        (lambda x: knn_chunked(x.to("meta"), 1, device="cpu"), ValueError, "x must be on the CPU, not on meta"),
        (lambda x: knn_chunked(x, 1, metric="l1", device="cpu"), ValueError, "metric must be one of"),
        (lambda x: knn_chunked(x * torch.nan, 1, device="cpu"), ValueError, "must be finite"),
        (lambda x: k_reciprocal_rerank_chunked(x, x.double(), device="cpu"), ValueError, "must have one dtype"),
        (lambda x: k_reciprocal_rerank_chunked(x, x, device="cpu", top_k=0), ValueError, "top_k must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(9, 3))
