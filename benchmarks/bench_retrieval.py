"""Exact neighbours and re-ranking on the CPU against FAISS, the published NumPy algorithm and dense PyTorch: a call.

Features are unit rows around identities with an offset for each camera and noise; 30 % of the gallery is of nobody.
Sizes are those of tests, of Market-1501 and of MSMT17. Errors: of neighbours the share of positions that differ from
float64 distances on 256 rows; of re-rankings the largest difference from the definition in float64 where that is
feasible (N = 2500). The floor is N^2 D flops, half of all products, at the rate of bfloat16 or float32, whichever is
faster. "MB" is the peak of one call above what was held.

`python -m benchmarks.bench_retrieval --rows 440000` re-ranks that many rows once and prints time, memory and accuracy.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks.bench_covlasso_large import megabytes_of
from benchmarks.harness import (
    Budget,
    Case,
    Contender,
    Missing,
    Recipe,
    append_record,
    default_results,
    measured_rates,
    stamped,
)

try:
    import faiss
except ImportError:
    faiss = None

Array = np.ndarray[Any, Any]

# queries, gallery, D
SIZES = {
    "2.5k": (500, 2000, 512),
    "6k": (1000, 5000, 2048),
    "Market": (3368, 15_913, 2048),
    "MSMT17": (11_659, 82_161, 2048),
}
QUICK = ("2.5k", "6k")
ALONE = "MSMT17"  # peers would take hundreds of GB
THREADS = 2
K = 21  # neighbours of the default lists
TOP_K = 100
CHECKED = 256  # rows whose lists are compared with float64
GOALS = {"knn": 10.0, "k-reciprocal": 30.0, "gnn": 15.0}  # at the size of Market-1501
LIMIT = 1e-5  # of re-ranked values, ours and peers'
PEER_SHARE = 1e-3  # of list positions; float32 decides some near ties otherwise


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Neighbours, k-reciprocal re-ranking (all distances, the best 100) and GNN re-ranking by size."""
    for size in SIZES:
        if budget.quick and size not in QUICK:
            continue
        for name, build in (
            ("knn", knn_case),
            ("k-reciprocal", dense_case),
            ("k-reciprocal top-100", top_k_case),
            ("gnn", gnn_case),
            ("gnn top-100", gnn_top_k_case),
        ):
            if size == ALONE and name in ("k-reciprocal", "gnn"):
                continue  # the result alone would be 3.8 GB
            title = f"retrieval {name} {size}"
            yield Recipe(title, functools.partial(build, title, size))


def features(size: str) -> tuple[Tensor, Tensor]:
    """Queries [nq, D] and gallery [ng, D]."""
    nq, ng, D = SIZES[size]
    x = clustered(nq + ng, D, nq // 4, seed=0)
    return x[:nq], x[nq:]


def clustered(rows: int, D: int, identities: int, seed: int, cameras: int = 6) -> Tensor:
    """Unit rows; made in blocks, so that no second copy of them is needed."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(4, identities), D, generator=generator)
    offsets = 0.35 * torch.randn(cameras, D, generator=generator)
    x = torch.empty(rows, D)
    for block in x.split(8192):
        identity = torch.randint(len(centres), (len(block),), generator=generator)
        camera = torch.randint(cameras, (len(block),), generator=generator)
        somebody = torch.rand(len(block), 1, generator=generator) > 0.3
        noise = torch.randn(block.shape, generator=generator)
        block.copy_(centres[identity] * torch.where(somebody, 1.0, 0.6) + offsets[camera])
        block += noise * torch.where(somebody, 1.0, 1.3)
        block /= block.norm(dim=1, keepdim=True)
    return x


# ------------------------------------------------------------------------------------------------ cases


def knn_case(name: str, size: str) -> Case:
    """The 21 nearest of every row among all."""
    x = torch.cat(features(size))
    rows, wanted = exact_lists(x)

    def wrong(indices: Tensor) -> float:
        return share_wrong(x, rows, wanted, indices[rows])

    ours = Contender("ours knn", lambda: nk.knn(x, K)[1], error=wrong, limit=0.0)
    peers: list[Contender | Missing] = []
    if faiss is None:
        peers.append(Missing("faiss IndexFlatL2", "faiss-cpu is not installed"))
    elif size != ALONE:
        goal = GOALS["knn"] if size == "Market" else None
        peers.append(Contender("faiss IndexFlatL2", lambda: faiss_lists(x), error=wrong, limit=PEER_SHARE, goal=goal))
    return _case(name, size, ours, peers)


def dense_case(name: str, size: str) -> Case:
    query, gallery = features(size)
    error = _difference(functools.partial(published_rerank, dtype=np.float64), query, gallery, size)
    ours = Contender("ours k_reciprocal_rerank", lambda: nk.k_reciprocal_rerank(query, gallery), 1, error, LIMIT)
    goal = GOALS["k-reciprocal"] if size == "Market" else None
    # A near tie that float32 decides otherwise changes hundreds of entries; the time is that of the algorithm.
    numpy = Contender(
        "NumPy, as published", lambda: published_rerank(query, gallery), 1, error, math.inf, goal, "argsort, dense V"
    )
    return _case(name, size, ours, [numpy])


def top_k_case(name: str, size: str) -> Case:
    """The best 100 of every query, without a matrix: no peer does it."""
    query, gallery = features(size)
    error = _difference_of_best(functools.partial(published_rerank, dtype=np.float64), query, gallery, size)
    ours = Contender(
        "ours k_reciprocal_rerank", lambda: nk.k_reciprocal_rerank(query, gallery, top_k=TOP_K), 1, error, LIMIT
    )
    return _case(name, size, ours, [])


def gnn_case(name: str, size: str) -> Case:
    query, gallery = features(size)
    error = _difference(functools.partial(dense_gnn, dtype=torch.float64), query, gallery, size)
    ours = Contender("ours gnn_rerank", lambda: nk.gnn_rerank(query, gallery), 1, error, LIMIT)
    goal = GOALS["gnn"] if size == "Market" else None
    dense = Contender("dense torch", lambda: dense_gnn(query, gallery), 1, error, math.inf, goal, "N x N matrices")
    return _case(name, size, ours, [dense])


def gnn_top_k_case(name: str, size: str) -> Case:
    query, gallery = features(size)
    exact = functools.partial(dense_gnn, dtype=torch.float64)
    error = _difference_of_best(exact, query, gallery, size, descending=True)
    ours = Contender("ours gnn_rerank", lambda: nk.gnn_rerank(query, gallery, top_k=TOP_K), 1, error, LIMIT)
    return _case(name, size, ours, [])


def _case(name: str, size: str, ours: Contender, peers: list[Contender | Missing]) -> Case:
    """With the memory of one call of each, and so few rounds of what takes long."""
    nq, ng, D = SIZES[size]
    facts = {"MB": round(megabytes_of(ours.run))}
    facts |= {f"MB {peer.name}": round(megabytes_of(peer.run)) for peer in peers if isinstance(peer, Contender)}
    return Case(
        name,
        {"nq": nq, "ng": ng, "D": D},
        ours=ours,
        peers=peers,
        threads=THREADS,
        flops=float((nq + ng) ** 2 * D),
        rates=measured_rates(THREADS, 1 << 24, torch.bfloat16),
        facts=facts,
        rounds=5 if size == "2.5k" else 2,
    )


# ------------------------------------------------------------------------------------------------ accuracy


def exact_lists(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers and their lists by (float64 distance, index)."""
    rows = torch.arange(0, len(x), max(1, len(x) // CHECKED))[:CHECKED]
    lists = torch.empty((len(rows), K), dtype=torch.int64)
    for own, found in zip(rows.split(16), lists.split(16), strict=True):
        near = torch.cat([torch.cdist(x[own].double(), block.double()) for block in x.split(8192)], 1)
        candidates = near.topk(min(4 * K, len(x)), dim=1, largest=False).indices.sort(1).values
        exact = (x[own].double()[:, None] - x[candidates].double()).square().sum(-1)
        found.copy_(candidates.gather(1, exact.argsort(dim=1, stable=True)[:, :K]))
    return rows, lists


def share_wrong(x: Tensor, rows: Tensor, wanted: Tensor, got: Tensor) -> float:
    """Of list positions, but for pairs whose float64 distances differ by less than 1e-12."""
    row, place = (wanted != got).nonzero().T
    own = x[rows[row]].double()
    a, b = ((own - x[lists[row, place]].double()).square().sum(1) for lists in (wanted, got))
    return float(((a - b).abs() > 1e-12 * a.clamp_min(1e-300)).sum()) / wanted.numel()


def _difference(
    definition: Callable[[Tensor, Tensor], Tensor], query: Tensor, gallery: Tensor, size: str
) -> Callable[[Tensor], float] | None:
    """Largest difference from the definition, where that is feasible."""
    if size != "2.5k":
        return None
    exact = definition(query.double(), gallery.double())
    return lambda result: float((result.double() - exact).abs().max())


def _difference_of_best(
    definition: Callable[[Tensor, Tensor], Tensor], query: Tensor, gallery: Tensor, size: str, descending: bool = False
) -> Callable[[tuple[Tensor, Tensor]], float] | None:
    """The same for the values of the best 100."""
    if size != "2.5k":
        return None
    exact = definition(query.double(), gallery.double()).sort(dim=1, descending=descending).values[:, :TOP_K]
    return lambda result: float((result[0] - exact).abs().max())


# ------------------------------------------------------------------------------------------------ peers


def faiss_lists(x: Tensor) -> Tensor:
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x.numpy())
    return torch.from_numpy(index.search(x.numpy(), K)[1])


def published_rerank(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3, dtype: Any = np.float32
) -> Tensor:
    """The k-reciprocal algorithm as public code has it: all distances, a full argsort, dense weights."""
    nq, x = len(query), torch.cat([query, gallery]).numpy().astype(dtype)
    square = (x**2).sum(1)
    d = np.maximum(square[:, None] + square - 2 * (x @ x.T), 0)
    np.fill_diagonal(d, 0)
    d = (d / d.max(0)).T
    order = np.argsort(d, axis=1, kind="stable" if dtype == np.float64 else None).astype(np.int32)
    N, half = len(d), int(np.around(k1 / 2))

    def reciprocal(i: int, k: int) -> Array:
        forward = order[i, : k + 1]
        return forward[np.where(order[forward, : k + 1] == i)[0]]

    v = np.zeros_like(d)
    for i in range(N):
        own = reciprocal(i, k1)
        members = own
        for c in own:
            other = reciprocal(c, half)
            if len(np.intersect1d(other, own)) > 2 / 3 * len(other):
                members = np.append(members, other)
        members = np.unique(members)
        weight = np.exp(-d[i, members])
        v[i, members] = weight / weight.sum()
    original = d[:nq]
    if k2 > 1:
        expanded = np.zeros_like(v)
        for i in range(N):
            expanded[i] = v[order[i, :k2]].mean(0)
        v = expanded
    holders = [np.nonzero(v[:, c])[0] for c in range(N)]
    jaccard = np.zeros_like(original)
    for i in range(nq):
        shared = np.zeros(N, dtype)
        for c in np.nonzero(v[i])[0]:
            shared[holders[c]] += np.minimum(v[i, c], v[holders[c], c])
        jaccard[i] = 1 - shared / (2 - shared)
    return torch.from_numpy((jaccard * (1 - lambda_value) + original * lambda_value)[:, nq:])


def dense_gnn(
    query: Tensor,
    gallery: Tensor,
    k1: int = 26,
    k2: int = 7,
    lambda_value: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """GNN re-ranking with dense N x N matrices."""
    nq, x = len(query), torch.nn.functional.normalize(torch.cat([query, gallery]).to(dtype), dim=1)
    cosine = x @ x.T
    weight, near = cosine.topk(k1, dim=1)
    weight = weight.square_()
    original = cosine[:nq, nq:].clone()
    a = cosine.zero_().scatter_(1, near, 1.0)
    for _ in range(2):
        b = a + a.T
        a = weight[:, :1] * b[near[:, 0]]
        for j in range(1, k2):
            a += weight[:, j, None] * b[near[:, j]]
        a /= a.norm(dim=1, keepdim=True)
    return (a[:nq] @ a[nq:].T).mul_(1 - lambda_value).add_(original, alpha=lambda_value)


# ------------------------------------------------------------------------------------------------ one large run


def rerank_once(rows: int, D: int, results: Path) -> None:
    """A tenth of the rows as queries against the rest, the best 100; then the lists of 256 rows against float64."""
    torch.set_num_threads(THREADS)
    x = clustered(rows, D, rows // 16, seed=0)
    nq = rows // 10
    timed: dict[str, float] = {}

    def ranked() -> None:
        start = time.perf_counter()
        nk.k_reciprocal_rerank(x[:nq], x[nq:], top_k=TOP_K)
        timed["seconds"] = round(time.perf_counter() - start, 1)

    megabytes = megabytes_of(ranked)
    numbers, wanted = exact_lists(x)
    wrong = share_wrong(x, numbers, wanted, nk.knn(x[numbers], K, y=x)[1])
    record = {"case": f"retrieval k-reciprocal top-100 once {rows} x {D}", "megabytes": round(megabytes)}
    record |= {"features_megabytes": round(x.nbytes / 2**20), "wrong_positions": wrong, "threads": THREADS} | timed
    print(json.dumps(record))
    append_record(results, stamped(record, "retrieval", False, None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Re-ranks many rows once.")
    parser.add_argument("--rows", type=int, default=440_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--results", type=Path, metavar="FILE", default=default_results(False))
    arguments = parser.parse_args()
    rerank_once(arguments.rows, arguments.dim, arguments.results)
