"""CovLasso and covariances on a GPU, against other ways to compute them on the same card at the same accuracy.

Every input is random and new in each run, up to a seed that the record keeps (real covariances: in a new order of the
categories). Before timing each result is held against float64 arithmetic that shares no code with the kernels, while
torch hands out poisoned memory. Times are those of CUDA events, from an idle device to the end of a call, so the launch
is in them; "graph" is the same call replayed from a CUDA graph.

Floors. CovLasso: one certifying pass over the rows of all supports, at the copy rate of buffers that stay in the caches
(of memory, where the covariance does not fit there), and one Cholesky factor a target at the float32 matrix rate.
Covariance: the rows read once, and the lower triangle at the matrix rate of the type, float32 at a third of the TF32
rate or at its own, whichever is faster.

`OPERATIONS` are small calls of every operator with their oracles, for tests and for compute-sanitizer:

    python -m benchmarks.gpu_cases              # all of them on the first GPU; --cpu: on the CPU
    python -m benchmarks gpu --case "lite0 ratio 0.1"      # a benchmark;  --profile: alone, for nsys and ncu

A rehearsal (no GPU) runs the same cases on the CPU at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks.bench_extrapolation import bisected, newton
from benchmarks.bench_retrieval import clustered, dense_gnn
from benchmarks.harness import (
    Budget,
    Case,
    Contender,
    DeviceRates,
    Missing,
    Rates,
    Recipe,
    device_rates,
    float32_precision,
    poisoned_outputs,
    replayed,
)
from neuraldeps_kernels.data.logits import load_imagenet_covariance
from neuraldeps_kernels.data.synthetic_logits import clustered_logits
from neuraldeps_kernels.reference import closed_form_discriminator as discriminator_reference
from neuraldeps_kernels.reference import covariance as covariance_reference
from neuraldeps_kernels.reference import covlasso as reference
from neuraldeps_kernels.reference import gnn_rerank as gnn_reference
from neuraldeps_kernels.reference import projected_step as step_reference
from neuraldeps_kernels.reference import retrieval as reranking_reference
from neuraldeps_kernels.reference import retrieval_metrics as metrics_reference

MAX_PIVOTS = 30_000
LIMIT = 1.001e-6  # of the violation: the tolerance asked for, and rounding where it is computed again
CACHED_BYTES = 1 << 24  # a covariance up to this size stays in the second-level cache
ORACLE_ROWS = 1 << 16  # rows that the float64 oracle of a covariance takes at a time
FISTA_CHECK = 50  # iterations between two looks at the violation while their number is sought
LATENT = 64  # dimensions behind the logits of the covariance cases
FOURIER_GRIDS = (7, 14, 16, 28, 32, 56, 64)  # with kernels of their own; others are matrix products
FOURIER_SHAPES = (  # [B, H, W, C] of GFNet, AFNO and FAMLP stages
    *((128, 14, 14, 384), (128, 7, 7, 512), (64, 16, 16, 256), (64, 28, 28, 128), (64, 32, 32, 128)),
    *((64, 56, 56, 64), (16, 64, 64, 64), (64, 15, 20, 256), (16, 96, 96, 64)),
)
NEIGHBOR_ROWS = {"Market": 19_281, "MSMT17": 93_820}  # of 2048 values, each among all
NEIGHBORS = 21  # of the default lists of re-ranking
NEIGHBORS_CHECKED = 64  # rows whose lists are compared with float64
NEIGHBORS_WRONG = 1e-3  # share of their positions that peers may have in another order; float32 decides some near ties
# Queries, gallery, rows wanted of each query (None: all), microseconds allowed (GOALS.md); 2048 values a row.
RERANKED = {
    "Market": (3368, 15_913, None, 8_000.0),
    "MSMT17 top-100": (11_659, 82_161, 100, 100_000.0),
    "440k top-100": (44_000, 396_000, 100, 1_200_000.0),
}
RERANKED_CHECKED = 8  # queries whose results are compared with float64
RERANKED_LIMIT = 1e-5
MM = "torch.mm, not centred"
GRAPH = ", graph"  # ends the name of a contender that is replayed

# Batches of matrices (GOALS.md); torch's own functions take batches at once up to this short side, and are timed on few
# matrices beyond, one after the other as they take them.
SPECTRUM_SHAPES = [
    (4096, 32, 32),
    (1024, 64, 64),
    (512, 128, 128),
    (256, 256, 256),
    (64, 512, 512),
    (2048, 33, 33),
    (8192, 16, 16),
    (256, 1024, 128),
]
TORCH_BATCHES, TORCH_FEW = 32, 8
RANK_RTOL = 1e-3


@dataclass(frozen=True)
class Card:
    """Where cases run, and how large they are."""

    device: torch.device
    tiny: bool  # a rehearsal

    @property
    def rates(self) -> DeviceRates:
        return device_rates(self.device, self.tiny)

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


def first_card() -> Card:
    """The first GPU, else the CPU for a rehearsal."""
    on_gpu = torch.cuda.is_available()
    return Card(torch.device("cuda", 0) if on_gpu else torch.device("cpu"), not on_gpu)


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Recipes for `python -m benchmarks gpu`; none without a GPU."""
    card = first_card()
    yield from () if card.tiny else recipes(card, budget)


def recipes(card: Card, budget: Budget) -> Iterator[Recipe]:
    """All cases, most important first."""

    def solve(name: str, source: Callable[[Card], Tensor], ratio: float | None, k: int, goals: Goals) -> Recipe:
        name = f"covlasso {name}"
        return Recipe(name, lambda: solve_case(name, card, source(card), ratio, k, goals, budget))

    def covariance(dtype: torch.dtype) -> Recipe:
        name = f"covariance 1M x 1000 {short(dtype)}"
        return Recipe(name, lambda: covariance_case(name, card, dtype))

    def spectrum(name: str, make: Callable[..., Case], batch: int, m: int, n: int) -> Recipe:
        name = f"{name} {batch} x {m} x {n}"
        return Recipe(name, lambda: make(name, card, batch, m, n))

    def norm(size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, backward: bool) -> Recipe:
        name = f"domain_norm {size} {short(dtype)} {layout}{' with backward' * backward}"
        return Recipe(name, lambda: norm_case(name, card, shape, 4, dtype, layout, backward))

    def fourier(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Recipe:
        name = f"fourier_filter {'x'.join(map(str, shape))} {short(dtype)}{' with backward' * backward}"
        return Recipe(name, lambda: fourier_case(name, card, shape, dtype, backward))

    def neighbors(size: str) -> Recipe:
        name = f"retrieval knn {size}"
        return Recipe(name, lambda: knn_case(name, card, NEIGHBOR_ROWS[size]))

    def rerank(size: str) -> Recipe:
        name = f"rerank {size}"
        return Recipe(name, lambda: rerank_case(name, card, size))

    def metrics(size: str) -> Recipe:
        name = f"retrieval_metrics {size.split()[0]}"
        return Recipe(name, lambda: metrics_case(name, card, size))

    def fused_step(fused: Fused) -> Recipe:
        name = f"{fused.name} forward and backward"
        return Recipe(name, lambda: fused_case(name, card, fused))

    yield solve("lite0 ratio 0.2", lite0, 0.2, 0, Goals(None, 50))
    yield solve("synthetic k 10", synthetic, None, 10, Goals(100, 50))
    yield solve("synthetic k 25", synthetic, None, 25, Goals(250, 50))
    yield covariance(torch.bfloat16)
    yield covariance(torch.float32)
    yield solve("lite0 ratio 0.1", lite0, 0.1, 0, Goals(None, 50))
    yield solve("lite0 ratio 0.05", lite0, 0.05, 0, Goals(None, 50))
    yield Recipe("covlasso path lite0, 20 to .1", lambda: path_case(card, lite0(card), 20, 0.1))
    yield Recipe("covlasso top 20 lite0", lambda: top_k_case(card, lite0(card), card.size(20, 3)))
    yield solve("n 10000 k 30", large, None, 30, Goals(12_000, None))
    yield covariance(torch.float64)
    for batch, m, n in SPECTRUM_SHAPES:
        yield spectrum("matrix_rank", rank_case, batch, m, n)
        yield spectrum("svdvals with gradient", values_case, batch, m, n)
    for backward in (False, True):
        yield norm("64x256x64x32", (64, 256, 64, 32), torch.float32, "contiguous", backward)
        yield norm("64x256x64x32", (64, 256, 64, 32), torch.float32, "channels_last", backward)
        yield norm("64x256x16x8", (64, 256, 16, 8), torch.float32, "contiguous", backward)
        yield norm("64x256x16x8", (64, 256, 16, 8), torch.float32, "channels_last", backward)
        yield norm("128x2048", (128, 2048), torch.float32, "contiguous", backward)
        yield norm("64x256x64x32", (64, 256, 64, 32), torch.bfloat16, "channels_last", backward)

    for shape in FOURIER_SHAPES:
        for backward in (False, True):
            yield fourier(shape, torch.float32, backward)
            if shape[1] in FOURIER_GRIDS:
                yield fourier(shape, torch.bfloat16, backward)
    for fused in FUSED:
        yield fused_step(fused)
    for size in NEIGHBOR_ROWS:
        yield neighbors(size)
    for size in RERANKED:
        yield rerank(size)
    yield Recipe("gnn Market", lambda: gnn_case("gnn Market", card))
    for size in ("Market", "MSMT17 top-100"):
        yield metrics(size)
    yield Recipe("closed_form_discriminator 1M", lambda: discriminator_case("closed_form_discriminator 1M", card))
    for B, L, rank in ((2048, 1, 4), (256, 18, 1)):
        name = f"projected_step {B}x{L}x512 r {rank}"
        yield Recipe(name, functools.partial(step_case, name, card, B, L, rank))


# ------------------------------------------------------------------------------------------------ inputs


@functools.cache
def seed() -> int:
    """Of everything random in this process, new in each."""
    return torch.Generator().seed() % 2**31


def lite0(card: Card) -> Tensor:
    """[1000, 1000] float32 of a real network, the categories in random order."""
    cov = load_imagenet_covariance().lite0
    order = torch.randperm(len(cov), generator=torch.Generator().manual_seed(seed()))[: card.size(1000, 40)]
    return cov[order][:, order].contiguous().to(card.device)


def synthetic(card: Card) -> Tensor:
    """[1000, 1000] float32, of 50,000 synthetic logits from 512 features."""
    return _clustered(card, card.size(1000, 40), card.size(512, 16), card.size(50_000, 400))


def large(card: Card) -> Tensor:
    """[10000, 10000] float32, 400 MB: larger than the caches."""
    return _clustered(card, card.size(10_000, 60), card.size(512, 16), card.size(30_000, 400))


@functools.lru_cache(1)
def _clustered(card: Card, n: int, features: int, samples: int) -> Tensor:
    x = clustered_logits(n, features, samples, seed())[0].to(card.device)
    return exact_covariance(x).float()


def exact_covariance(x: Tensor) -> Tensor:
    """[n, n] float64 of rows x [N, n] in two passes, a block of rows at a time."""
    mean = sum(part.double().sum(0) for part in x.split(ORACLE_ROWS)) / len(x)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(ORACLE_ROWS):
        centred = part.double() - mean
        total.addmm_(centred.T, centred)
    return total / len(x)


def ratio_for(cov: Tensor, k: float) -> float:
    """The lam_ratio, to 2 %, at which the mean support of every tenth target is k."""
    low, high = 1e-3, 1.0
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        found = nk.covlasso(cov, lam_ratio=middle, targets=range(0, len(cov), 10)).n_nonzero.double().mean()
        low, high = (low, middle) if float(found) < k else (middle, high)
    return (low * high) ** 0.5


# ------------------------------------------------------------------------------------------------ CovLasso


@dataclass(frozen=True)
class Goals:
    """Asked of ours in microseconds for all targets, and as a ratio of the peer's time to ours."""

    us: float | None
    peer: float | None


def solve_case(name: str, card: Card, cov: Tensor, ratio: float | None, k: int, goals: Goals, budget: Budget) -> Case:
    """All n targets at one ratio of lambda_max, given or found by the mean support `k`."""
    k = min(k, len(cov) // 4)
    ratio = ratio_for(cov, k) if ratio is None else ratio
    lam = ratio * largest_lam(cov)
    operator = solve_contender("ours operator", cov, lam, goals.us)
    support = operator.run()[2].double()
    cached = cov.nbytes <= CACHED_BYTES
    return Case(
        name,
        {"n": len(cov), "ratio": round(ratio, 4), "dtype": "float32", "tol": 1e-6, "seed": seed()},
        ours=operator,
        variants=[public_contender(cov, ratio, lam)],
        peers=[graph_of(operator, card), *(fista_peers(cov, lam, goals.peer, budget) if cached else ())],
        threads=0,
        device=card.device,
        bytes=float(4 * len(cov) * support.sum()),
        flops=float((support**3 / 3).sum()),
        rates=Rates(card.rates.cache if cached else card.rates.memory, card.rates.gemm["float32"]),
        facts={"k": f"{support.mean():.1f} (most {support.max():.0f})", "floor at": "cache" if cached else "memory"},
    )


def largest_lam(cov: Tensor) -> Tensor:
    """lambda_max [n] float64, by plain torch."""
    return 2 * (cov - torch.diag(cov.diagonal())).abs().amax(1).double()


def solve_contender(name: str, cov: Tensor, lam: Tensor, goal: float | None) -> Contender:
    """`torch.ops.neuraldeps.covlasso` at lam [n] or along lam [n, L], for all targets in one call."""
    targets = torch.arange(len(cov), device=cov.device)
    last = lam if lam.dim() == 1 else lam[:, -1]
    capacity = min(len(cov), int(nk.covlasso(cov, last).n_nonzero.max()) + 8)

    def run() -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.covlasso(cov, targets, lam, None, 1e-6, MAX_PIVOTS, capacity)

    return Contender(name, run, 1, lambda result: solution_error(cov, lam, result), LIMIT, goal, "all targets")


def solution_error(cov: Tensor, lam: Tensor, result: tuple[Tensor, ...]) -> float:
    """Largest violation of the optimality conditions of an operator's result; infinite where its padding or a status
    is not what it promises."""
    value, index, count, info = result
    padding = torch.arange(value.shape[-1], device=value.device) >= count[..., None]
    if bool(((value != 0) & padding).any() | ((index != 0) & padding).any() | (info[..., 4] != 0).any()):
        return math.inf
    theta = torch.zeros(*count.shape, len(cov), dtype=torch.float64, device=cov.device)
    theta.scatter_add_(-1, index.long(), value.double())
    return largest_violation(cov, theta, lam)


def largest_violation(cov: Tensor, theta: Tensor, lam: Tensor) -> float:
    """Of the optimality conditions of all targets by theta [n, n] at lam [n], or [n, L, n] at [n, L], over
    lambda_max / 2; float64."""
    if lam.dim() == 2:
        return max(largest_violation(cov, theta[:, x], lam[:, x]) for x in range(lam.shape[1]))
    cov = cov.double()
    gradient, bound = theta @ cov - cov, lam[:, None] / 2
    violation = torch.where(theta != 0, (gradient + bound * theta.sign()).abs(), (gradient.abs() - bound).clamp_min(0))
    violation.fill_diagonal_(0.0)
    if bool(theta.diagonal().any()):
        return math.inf
    return float((violation.amax(1) / (largest_lam(cov) / 2).clamp_min(1e-300)).max())


def graph_of(contender: Contender, card: Card) -> Contender | Missing:
    """The contender replayed from a CUDA graph, or why it cannot be captured."""
    name = f"{contender.name}{GRAPH}"
    try:
        return replace(contender, name=name, run=replayed(contender.run, card.device))
    except RuntimeError as failure:
        return Missing(name, first_line_of(failure))


def public_contender(cov: Tensor, ratio: float, lam: Tensor) -> Contender:
    return Contender(
        "ours nk.covlasso",
        lambda: nk.covlasso(cov, lam_ratio=ratio),
        error=lambda solution: largest_violation(cov, solution.dense().double(), lam),
        limit=LIMIT,
        note="sparse result, waits for the device",
    )


class Fista:
    """CovLasso of all targets by accelerated proximal gradient steps, momentum restarted target by target.

        theta <- soft(ahead - step (ahead S - S), step lam / 2),   the diagonal at zero

    Two matrix products' worth of work a step is one product [n, n] x [n, n] and elementwise passes.
    """

    def __init__(self, cov: Tensor, lam: Tensor, dtype: torch.dtype) -> None:
        self.cov = cov.to(dtype)
        self.step = 1 / float(torch.linalg.eigvalsh(cov.double())[-1])
        self.bound = (self.step * lam / 2).to(dtype)[:, None]

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """theta [n, n], the point ahead of it, and the momentum counter [n, 1]."""
        zeros = torch.zeros_like(self.cov)
        return zeros, zeros, torch.ones_like(self.cov[:, :1])

    def advance(self, state: tuple[Tensor, Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        theta, ahead, t = state
        for _ in range(iterations):
            gradient = torch.addmm(self.cov, ahead, self.cov, beta=-1.0)
            moved = ahead - self.step * gradient
            new = moved - moved.clamp(-self.bound, self.bound)
            new.fill_diagonal_(0.0)
            change = new - theta
            uphill = ((ahead - new) * change).sum(1, keepdim=True) > 0
            t = torch.where(uphill, 1.0, t)
            t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
            theta, ahead, t = new, new + (t - 1) / t_next * change, t_next
        return theta, ahead, t


def fista_peers(cov: Tensor, lam: Tensor, goal: float | None, budget: Budget) -> list[Contender | Missing]:
    """Batched FISTA in float32 and float64, each with as many steps as it needs, found beforehand."""
    return [fista_peer(cov, lam, dtype, goal, budget.search_seconds / 3) for dtype in (torch.float32, torch.float64)]


def fista_peer(cov: Tensor, lam: Tensor, dtype: torch.dtype, goal: float | None, seconds: float) -> Contender | Missing:
    """Timed without looking at the violation, and with the step size given, which favours it."""
    name = f"batched FISTA in torch, {short(dtype)}"
    fista = Fista(cov, lam, dtype)
    state, iterations, violation, end = fista.start(), 0, math.inf, time.perf_counter() + seconds
    while not violation <= 1e-6:
        if time.perf_counter() > end:
            return Missing(name, f"violation {violation:.1e} after {iterations} steps, {seconds:.1f} s")
        state, iterations = fista.advance(state, FISTA_CHECK), iterations + FISTA_CHECK
        violation = largest_violation(cov, state[0].double(), lam)
    return Contender(
        name,
        lambda: fista.advance(fista.start(), iterations)[0],
        error=lambda theta: largest_violation(cov, theta.double(), lam),
        limit=1e-5,
        goal=goal if dtype == torch.float64 else None,
        note=f"{iterations} steps",
    )


def path_case(card: Card, cov: Tensor, num_lams: int, least: float) -> Case:
    """All targets along a geometric path in one call; beside it a cold solve at each penalty."""
    steps = torch.linspace(0, 1, num_lams, dtype=torch.float64, device=cov.device)
    lams = largest_lam(cov)[:, None] * least**steps
    operator = solve_contender("ours operator", cov, lams, None)
    support = operator.run()[2].double()
    cold = [solve_contender("", cov, lam, None).run for lam in lams.unbind(1)]
    public = Contender("ours nk.covlasso_path", lambda: nk.covlasso_path(cov, lams=lams), note="sparse result")
    return Case(
        f"covlasso path lite0, {num_lams} to {least:g}".replace("0.", "."),
        {"n": len(cov), "lambdas": num_lams, "lam_min_ratio": least, "dtype": "float32", "tol": 1e-6, "seed": seed()},
        ours=operator,
        variants=[public, Contender(f"ours, {num_lams} cold calls", lambda: [run() for run in cold])],
        peers=[graph_of(operator, card)],
        threads=0,
        device=card.device,
        bytes=float(4 * len(cov) * support.sum()),
        flops=float((support[:, -1] ** 3 / 3).sum()),
        rates=Rates(card.rates.cache, card.rates.gemm["float32"]),
        facts={"k at the end": f"{support[:, -1].mean():.1f}"},
    )


def top_k_case(card: Card, cov: Tensor, k: int) -> Case:
    """Exactly k nonzeros for every target, by homotopy in float64; beside it the cold solve at the penalties found."""
    found = nk.covlasso_top_k(cov, k)

    def error(solution: nk.CovLassoSolution) -> float:
        if not bool((solution.n_nonzero == k).all()):
            return math.inf
        return largest_violation(cov, solution.dense().double(), solution.lam)

    return Case(
        "covlasso top 20 lite0",
        {"n": len(cov), "k": k, "dtype": "float64 inside", "tol": 1e-6, "seed": seed()},
        ours=Contender("ours nk.covlasso_top_k", lambda: nk.covlasso_top_k(cov, k), error=error, limit=2e-6),
        variants=[Contender("ours nk.covlasso there", lambda: nk.covlasso(cov, found.lam))],
        threads=0,
        device=card.device,
        bytes=8.0 * len(cov) ** 2 * k,
        rates=Rates(card.rates.cache, card.rates.gemm["float64"]),
    )


# ------------------------------------------------------------------------------------------------ covariance


def covariance_case(name: str, card: Card, dtype: torch.dtype) -> Case:
    """One covariance [n, n] of rows x [N, n] with offsets up to 8 deviations; N as large as the memory allows."""
    n = card.size(1000, 24)
    x = offset_logits(card, num_rows(card, n, dtype), n, dtype)
    exact = exact_covariance(x)
    top = float(exact.diagonal().max())
    limit = 1e-12 if dtype == torch.float64 else 2e-5  # as the tests; the record has the error
    gemm = card.rates.gemm

    def error(result: Tensor) -> float:
        return float((torch.as_tensor(result, device=card.device).double() - exact).abs().max()) / top

    ours = Contender("ours nk.covariance", lambda: nk.covariance(x), error=error, limit=limit)
    return Case(
        name,
        {"samples": len(x), "n": n, "dtype": short(dtype), "seed": seed()},
        ours=ours,
        variants=triton_contenders(x, error, limit),
        peers=[graph_of(ours, card), *map(available, covariance_peers(card, x, error, limit))],
        threads=0,
        device=card.device,
        bytes=float(x.nbytes + exact.nbytes),
        flops=float(len(x) * n * (n + 1)),
        rates=Rates(
            2 * card.rates.memory,  # x is read, nothing of that size is written
            max(gemm["float32"], gemm["tf32"] / 3) if dtype == torch.float32 else gemm[short(dtype)],
        ),
        facts={"rows": len(x)},
    )


def num_rows(card: Card, n: int, dtype: torch.dtype) -> int:
    """A million, or what fits with the copies that peers make (float32, twice) in 60 % of the free memory."""
    if card.device.type == "cpu":
        return card.size(1_000_000, 200)
    free, _ = torch.cuda.mem_get_info(card.device)
    return min(1_000_000, int(0.6 * free / (n * (dtype.itemsize + 2 * max(4, dtype.itemsize)))))


def offset_logits(card: Card, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """x [rows, n]: correlated columns of deviation about 2.5, means up to 20 from zero."""
    chance = torch.Generator(card.device).manual_seed(seed())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, device=card.device)

    mixing, mean = normal(LATENT, n) * (2.5 / LATENT**0.5), 40 * torch.rand(n, device=card.device) - 20
    x = torch.empty(rows, n, dtype=dtype, device=card.device)
    for part in x.split(ORACLE_ROWS):
        part.copy_(normal(len(part), LATENT) @ mixing + 0.3 * normal(len(part), n) + mean)
    return x


def triton_contenders(x: Tensor, error: Callable[[Tensor], float], limit: float) -> list[Contender]:
    """The Triton kernels alone; on the CPU in Triton's interpreter, which cannot multiply 16-bit numbers."""
    if x.device.type == "cpu" and (os.environ.get("TRITON_INTERPRET") != "1" or x.element_size() == 2):
        return []
    from neuraldeps_kernels.triton import covariance as kernels

    return [
        Contender(
            "ours Triton kernels", lambda: kernels.centered_moments(x[None])[2][0] / len(x), error=error, limit=limit
        )
    ]


def covariance_peers(card: Card, x: Tensor, error: Callable[[Tensor], float], limit: float) -> list[Contender]:
    """torch.cov, the compiled formula, the plain product that a covariance cannot do without, and CuPy."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32

    def formula(rows: Tensor) -> Tensor:
        centred = rows.to(wide) - rows.to(wide).mean(0)
        return centred.T @ centred / len(rows)

    compiled = torch.compile(formula, backend="eager" if card.tiny else "inductor")
    goal = None if x.dtype == torch.float64 else 1.7
    peers = [
        Contender("torch.cov", lambda: torch.cov(x.to(wide).T, correction=0), error=error, limit=100 * limit),
        Contender("torch.compile of the formula", lambda: compiled(x), error=error, limit=100 * limit),
        Contender(MM, lambda: torch.mm(x.T, x), goal=goal, note=f"result in {short(x.dtype)}"),
        Contender("cupy.cov", lambda: cupy_covariance(x.to(wide)), error=error, limit=100 * limit),
    ]
    if x.dtype == torch.float32:
        peers.append(Contender(f"{MM}, TF32", lambda: tf32_product(x), note="inexact"))
    return peers


def tf32_product(x: Tensor) -> Tensor:
    with float32_precision("high"):
        return torch.mm(x.T, x)


def cupy_covariance(x: Tensor) -> Tensor:
    """By CuPy in the dtype of x, on torch's stream."""
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream(x.device).cuda_stream):
        return torch.as_tensor(cupy.cov(cupy.asarray(x), rowvar=False, ddof=0, dtype=str(x.dtype)[6:]), device=x.device)


def available(peer: Contender) -> Contender | Missing:
    """The peer, or why it does not run here."""
    try:
        peer.run()
    except Exception as failure:  # of another package: whatever it raises, it cannot be timed
        return Missing(peer.name, first_line_of(failure))
    return peer


def first_line_of(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ spectrum


def matrices(card: Card, batch: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """a [B, m, n] float32, and the values [B, k] planted in it: k/3 from 1 to 10^-1.5, the others up to 1e-4."""
    chance, k = torch.Generator(card.device).manual_seed(seed()), min(m, n)

    def orthonormal(rows: int) -> Tensor:
        """[B, rows, k] by Cholesky factors, twice, which is quick for batches."""
        x = torch.randn(batch, rows, k, generator=chance, device=card.device, dtype=torch.float64)
        for _ in range(2 + (rows == k)):  # square normal matrices may be nearly singular
            x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.mT @ x), x.mT, upper=False).mT
        return x

    values = 1e-4 * torch.rand(batch, k, generator=chance, device=card.device, dtype=torch.float64)
    values[:, : k // 3] = torch.logspace(0, -1.5, k // 3, dtype=torch.float64)
    values = values.sort(descending=True)[0]
    return ((orthonormal(m) * values[:, None]) @ orthonormal(n).mT).float(), values


def spectrum_case(
    name: str, card: Card, a: Tensor, ours: Contender, peers: list[Contender], more: list[Contender | Missing]
) -> Case:
    """Per matrix: its bytes read once; multiply-adds of the Gram matrix and its tridiagonal form in float64."""
    (batch, m, n), k = a.shape, min(a.shape[1:])
    return Case(
        name,
        {"B": batch, "m": m, "n": n, "dtype": "float32", "seed": seed()},
        ours=ours,
        peers=[*more, *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=4.0 * m * n,
        flops=max(m, n) * k * (k + 1) + 4 / 3 * k**3,
        rates=Rates(2 * card.rates.memory, card.rates.gemm["float64"]),
    )


def few_of(a: Tensor) -> Tensor:
    return a if min(a.shape[1:]) <= TORCH_BATCHES else a[:TORCH_FEW]


def float64_gram(a: Tensor) -> Tensor:
    """[B, k, k] of the shorter side."""
    wide = a.double()
    return wide.mT @ wide if a.shape[1] >= a.shape[2] else wide @ wide.mT


def cupy_eigenvalues(gram: Tensor) -> Tensor:
    """[B, k] ascending, by CuPy on torch's stream: cuSOLVER's batched routine."""
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream(gram.device).cuda_stream):
        return torch.as_tensor(cupy.linalg.eigvalsh(cupy.asarray(gram)), device=gram.device)


def count_eigenvalues(values: Tensor) -> Tensor:
    """Ranks [B] from ascending eigenvalues of Gram matrices."""
    return (values > RANK_RTOL**2 * values[:, -1:]).sum(-1)


def rank_case(name: str, card: Card, batch: int, m: int, n: int) -> Case:
    a, values = matrices(card, card.size(batch, 3), card.size(m, min(m, 24)), card.size(n, min(n, 20)))
    want, few = (values > RANK_RTOL).sum(-1), few_of(a)
    looped = min(m, n) > TORCH_BATCHES

    def wrong(rank: Tensor) -> float:
        return float((rank != want[: len(rank)]).double().mean())

    ours = Contender("ours nk.matrix_rank", lambda: nk.matrix_rank(a, rtol=RANK_RTOL), len(a), wrong, 0.0)
    rank_by = functools.partial(Contender, error=wrong, limit=0.01)
    peers = [
        rank_by(
            "torch.linalg.matrix_rank",
            lambda: torch.linalg.matrix_rank(few, rtol=RANK_RTOL),
            len(few),
            goal=50 if looped else None,
        ),
        rank_by(
            "float64 Gram, cupy eigvalsh",
            lambda: count_eigenvalues(cupy_eigenvalues(float64_gram(a))),
            len(a),
            goal=3 if looped else None,
        ),
        rank_by(
            "float64 Gram, torch eigvalsh",
            lambda: count_eigenvalues(torch.linalg.eigvalsh(float64_gram(few))),
            len(few),
        ),
    ]
    if not looped and card.device.type == "cuda":

        def by_gesvdj() -> Tensor:
            found = torch.linalg.svdvals(a, driver="gesvdj")
            return (found > RANK_RTOL * found[:, :1]).sum(-1)

        peers.append(rank_by("gesvdjBatched", by_gesvdj, len(a), goal=2))
    return spectrum_case(name, card, a, ours, peers, [graph_of(ours, card)])


def values_case(name: str, card: Card, batch: int, m: int, n: int) -> Case:
    """The values of normal matrices and the gradient of their sum, which is the orthogonal polar factor."""
    chance = torch.Generator(card.device).manual_seed(seed())
    shape = (card.size(batch, 3), card.size(m, min(m, 24)), card.size(n, min(n, 20)))
    a = torch.randn(shape, generator=chance, device=card.device)
    few, k = few_of(a), min(shape[1:])
    unit = torch.eye(k, device=card.device, dtype=torch.float64)

    def step(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            leaf = inputs.detach().requires_grad_()
            return torch.autograd.grad(function(leaf).sum(), leaf)[0]

        return run

    def error(polar: Tensor) -> float:
        return float((float64_gram(polar) - unit).abs().max())

    ours = Contender("ours nk.svdvals", step(nk.svdvals, a), len(a), error, 1e-5)
    theirs = Contender(
        "torch.linalg.svdvals",
        step(torch.linalg.svdvals, few),
        len(few),
        error,
        1e-2,
        20 if TORCH_BATCHES < k <= 128 else None,
    )
    alone = Contender("ours without gradient", lambda: nk.svdvals(a), len(a))
    return replace(spectrum_case(name, card, a, ours, [theirs], [graph_of(ours, card)]), variants=[alone])


# ------------------------------------------------------------------------------------------------ batch norm by domain


@dataclass(frozen=True)
class NormProblem:
    """Arguments of `nk.domain_batch_norm` in training, all of x's device, and the gradient of the result."""

    x: Tensor  # [N, C, *], requires a gradient; weight and bias too
    domain: Tensor  # [N]
    weight: Tensor  # [D, C]
    bias: Tensor
    running: tuple[Tensor, Tensor]  # mean and variance, [D, C]
    grad: Tensor

    def ours(self) -> Tensor:
        return nk.domain_batch_norm(self.x, self.domain, *self.running, self.weight, self.bias, training=True)

    def loop(self) -> Tensor:
        """Domain by domain: rows gathered, F.batch_norm, rows scattered."""
        y = torch.empty_like(self.x)
        for d, tables in enumerate(zip(*self.running, self.weight, self.bias, strict=True)):
            rows = (self.domain == d).nonzero()[:, 0]
            y.index_copy_(0, rows, torch.nn.functional.batch_norm(self.x[rows], *tables, training=True))
        return y

    def one_domain(self) -> Tensor:
        """What a single F.batch_norm costs: another result."""
        tables = (*(table[0] for table in self.running), self.weight[0], self.bias[0])
        return torch.nn.functional.batch_norm(self.x, *tables, training=True)

    def composition(self) -> Tensor:
        """Without a loop: moments of samples, merged by index_add, one addcmul."""
        return composed_domain_norm(self.x, self.domain, *self.running, self.weight, self.bias)

    def with_gradients(self, forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """y and the gradients of x, weight and bias."""
        y = forward()
        return y.detach(), *torch.autograd.grad(y, (self.x, self.weight, self.bias), self.grad)

    def without(self, forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(),)

    def in_float64(self) -> NormProblem:
        tables = [table.detach().double().requires_grad_() for table in (self.x, self.weight, self.bias)]
        running = tuple(table.double() for table in self.running)
        return NormProblem(tables[0], self.domain, *tables[1:], running, self.grad.double())


def composed_domain_norm(
    x: Tensor, domain: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    D, (N, C), values = len(weight), x.shape[:2], x[0, 0].numel()
    wide = x.to(weight.dtype)
    if x.dim() == 2:
        variances, means = torch.zeros_like(wide), wide
    else:
        variances, means = torch.var_mean(wide, tuple(range(2, x.dim())), correction=0)
    instances = torch.zeros(D, device=x.device, dtype=weight.dtype).index_add_(0, domain, weight.new_ones(N))
    over = 1 / instances.clamp(min=1)[:, None]
    mean = weight.new_zeros(D, C).index_add(0, domain, means) * over
    inner = variances + (means - mean[domain]).square()
    variance = weight.new_zeros(D, C).index_add(0, domain, inner) * over
    with torch.no_grad():
        present, count = (instances > 0)[:, None], (instances * values)[:, None]
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(torch.where(present, running + 0.1 * (batch - running), running))
    scale = weight * (variance + 1e-5).rsqrt()
    shift = bias - scale * mean
    tables = (table[domain].reshape(N, C, *(1,) * (x.dim() - 2)) for table in (shift, scale))
    return torch.addcmul(next(tables), wide, next(tables)).to(x.dtype)


def norm_problem(card: Card, shape: tuple[int, ...], D: int, dtype: torch.dtype, channels_last: bool) -> NormProblem:
    """Random x with another mean and deviation in every channel, ids in random order."""
    chance = torch.Generator(card.device).manual_seed(seed())

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=chance, device=card.device)

    if card.tiny:
        shape = (32, 4, *(4 for _ in shape[2:]))
    C, ones = shape[1], (1,) * (len(shape) - 2)
    x = ((1 + normal(1, C, *ones).square()) * normal(*shape) + 3 * normal(1, C, *ones)).to(dtype)
    grad = normal(*shape).to(dtype)
    if channels_last:
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    domain = torch.randperm(shape[0], generator=chance, device=card.device) % D
    weight, bias = (1 + 0.3 * normal(D, C)).requires_grad_(), normal(D, C).requires_grad_()
    running = torch.zeros(D, C, device=card.device), torch.ones(D, C, device=card.device)
    return NormProblem(x.requires_grad_(), domain, weight, bias, running, grad)


def norm_case(
    name: str, card: Card, shape: tuple[int, ...], D: int, dtype: torch.dtype, layout: str, backward: bool
) -> Case:
    """Batch norm by domain in training, forward or with the backward. The floor counts the passes over memory: three
    forward (12 bytes an element of float32), five backward (20)."""
    problem = norm_problem(card, shape, D, dtype, layout == "channels_last")
    x, exact = problem.x, problem.in_float64()
    step = NormProblem.with_gradients if backward else NormProblem.without
    expected = step(exact, exact.loop)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    small = x.nbytes < 1 << 22
    cached = x.nbytes <= CACHED_BYTES

    def error(result: tuple[Tensor, ...]) -> float:
        pairs = zip(result, expected, strict=True)
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)

    def contender(name: str, forward: Callable[[], Tensor], goal: float | None = None, same: bool = True) -> Contender:
        run = functools.partial(step, problem, forward)
        return Contender(
            name, run, error=error if same else None, limit=limit, goal=goal, note="" if same else "of one domain"
        )

    torch.compiler.reset()  # or the limit on recompilation turns it into eager code after a few cases
    compiled = torch.compile(composed_domain_norm, backend="eager" if card.tiny else "inductor")
    arguments = (x, problem.domain, *problem.running, problem.weight, problem.bias)
    ours = contender("ours nk.domain_batch_norm", problem.ours)
    peers = [
        contender("loop over domains", problem.loop, 10 if small else 2),
        contender("one F.batch_norm", problem.one_domain, 1 / 1.15, same=False),
        contender("loop-free composition", problem.composition),
        contender("torch.compile of it", lambda: compiled(*arguments)),
    ]
    return Case(
        name,
        {
            "shape": list(x.shape),
            "domains": D,
            "dtype": short(dtype),
            "layout": layout,
            "backward": backward,
            "seed": seed(),
        },
        ours=ours,
        peers=[graph_of(ours, card), *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=float((8 if backward else 3) * x.nbytes),
        rates=Rates(card.rates.cache if cached else card.rates.memory, card.rates.gemm["float32"]),
        facts={"floor at": "cache" if cached else "memory", "MB": round(x.nbytes / 1e6, 1)},
    )


# ------------------------------------------------------------------------------------------------ Fourier filter


def filtered_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    """irfft2(rfft2(x) K) of x [B, H, W, C], K [H, W//2+1, C, 2], as it is usually written."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    X = torch.fft.rfft2(x.to(wide), dim=(1, 2), norm="ortho")
    y = torch.fft.irfft2(X * torch.view_as_complex(weight), s=x.shape[1:3], dim=(1, 2), norm="ortho")
    return y.to(x.dtype)


def fourier_case(name: str, card: Card, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Case:
    """The filter layer of images [B, H, W, C], or it and its gradients. The floor reads and writes each image once: 8
    bytes an element of float32, with the backward 20."""
    B, H, W, C = (card.size(n, min(n, tiny)) for n, tiny in zip(shape, (2, 64, 64, 3), strict=True))
    chance = torch.Generator(card.device).manual_seed(seed())

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=chance, device=card.device)

    x, grad = (normal(B, H, W, C).to(dtype) for _ in range(2))
    weight = normal(H, W // 2 + 1, C, 2)

    def step(function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            return (function(x, weight),)
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    exact = step(filtered_by_torch, x.double(), weight.double(), grad.double())

    def error(result: tuple[Tensor, ...]) -> float:
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(result, exact, strict=True))

    def contender(name: str, function: Callable[..., Tensor], goal: float | None = None) -> Contender:
        limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
        return Contender(name, lambda: step(function, x, weight, grad), error=error, limit=limit, goal=goal)

    torch.compiler.reset()
    compiled = torch.compile(filtered_by_torch, backend="eager" if card.tiny else "inductor")
    ours = contender("ours nk.fourier_filter2d", nk.fourier_filter2d)
    goal = 6 if backward else 8 if dtype == torch.bfloat16 else 5
    peers = [contender("torch.fft", filtered_by_torch, goal), contender("torch.compile of it", compiled)]
    return Case(
        name,
        {"shape": list(x.shape), "dtype": short(dtype), "backward": backward, "seed": seed()},
        ours=ours,
        peers=[graph_of(ours, card), *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=float((5 if backward else 2) * x.nbytes + (3 if backward else 1) * weight.nbytes),
        rates=Rates(card.rates.memory, card.rates.gemm["float32"]),
        facts={"MB": round(x.nbytes / 1e6, 1)},
    )


# ------------------------------------------------------------------------------------------------ neighbours


def knn_case(name: str, card: Card, rows: int) -> Case:
    """The 21 nearest of every row among all rows, around identities with offsets of cameras. The floor: half of all
    products, N^2 D flops, at the rate of bfloat16."""
    N, D = card.size(rows, 200), card.size(2048, 24)
    x = clustered(N, D, N // 20, seed()).to(card.device)
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(seed()))[:NEIGHBORS_CHECKED].to(card.device)
    base = x.double()
    exact = torch.stack([(base[i] - base).square().sum(1).sort(stable=True).indices[:NEIGHBORS] for i in chosen])
    del base

    def blocks(distances: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([distances(own).topk(NEIGHBORS, largest=False).indices for own in x.split(4096)])

    def products(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        other, squares = x.to(dtype), x.square().sum(1)
        return lambda own: squares - 2 * (own.to(dtype) @ other.T)

    def contender(label: str, run: Callable[[], Tensor], limit: float, note: str = "") -> Contender:
        return Contender(label, run, 1, lambda found: float((found[chosen] != exact).double().mean()), limit, note=note)

    def operator() -> Tensor:
        return torch.ops.neuraldeps.neighbors(x, None, NEIGHBORS, "sqeuclidean", True)[1]

    ours = contender("ours operator", operator, 0.0)
    peers = [
        contender("torch.mm and topk", lambda: blocks(products(torch.float32)), NEIGHBORS_WRONG),
        contender("torch.cdist and topk", lambda: blocks(lambda own: torch.cdist(own, x)), NEIGHBORS_WRONG),
        contender("torch.mm of bfloat16 and topk", lambda: blocks(products(torch.bfloat16)), math.inf, "inexact"),
    ]
    return Case(
        name,
        {"N": N, "D": D, "k": NEIGHBORS, "dtype": "float32", "seed": seed()},
        ours=ours,
        variants=[contender("ours nk.knn", lambda: nk.knn(x, NEIGHBORS)[1], 0.0, "waits for one number")],
        peers=[graph_of(ours, card), *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=float(x.nbytes + N * NEIGHBORS * 16),
        flops=float(N) ** 2 * D,
        rates=Rates(card.rates.memory, card.rates.gemm["bfloat16"]),
    )


# ------------------------------------------------------------------------------------------------ re-ranking


def reranked_features(card: Card, size: str) -> tuple[Tensor, Tensor]:
    """Queries and gallery."""
    nq, ng = (card.size(rows, tiny) for rows, tiny in zip(RERANKED[size][:2], (20, 180), strict=True))
    x = clustered(nq + ng, card.size(2048, 24), nq // 4, seed()).to(card.device)
    return x[:nq], x[nq:]


def rerank_case(name: str, card: Card, size: str) -> Case:
    """Features to re-ranked distances, and the part after the neighbour lists alone. The floor is that of the lists."""
    query, gallery = reranked_features(card, size)
    (nq, D), N, top_k, goal = query.shape, len(query) + len(gallery), *RERANKED[size][2:]
    longer = min(3 * (top_k or 0), N)
    lists = torch.ops.neuraldeps.neighbor_lists(query, gallery, NEIGHBORS, longer, top_k is None, True)
    rows = torch.randperm(nq, generator=torch.Generator().manual_seed(seed()))[:RERANKED_CHECKED].to(card.device)
    exact = exact_reranked(query, gallery, lists[:3], rows)  # [rows, ng]

    def error(result: Tensor | tuple[Tensor, ...]) -> float:
        if isinstance(result, Tensor):
            return float((result[rows] - exact).abs().max())
        return float((result[0][rows] - exact.sort(1).values[:, :top_k]).abs().max())

    def after_lists() -> Tensor | tuple[Tensor, ...]:
        key, index, largest, query_key, query_index, dense = lists
        options = (NEIGHBORS, NEIGHBORS // 2 + 1, 6, True, 2)
        csr = torch.ops.neuraldeps.reciprocal_encoding(index, key, largest, query, gallery, *options)
        if top_k is None:
            mixed = dense.clone()
            torch.ops.neuraldeps.jaccard_rerank(*csr, largest, mixed, 0.3, True, 2)
            return mixed
        found = (query_index, query_key, largest, query, gallery, top_k, 0.3, True, 2)
        return torch.ops.neuraldeps.jaccard_rerank_top_k(*csr, *found)

    def ours() -> Tensor | tuple[Tensor, ...]:
        return nk.k_reciprocal_rerank(query, gallery, top_k=top_k)

    sparse = Contender("ours after the lists", after_lists, 1, error, RERANKED_LIMIT, note="operators alone")
    peer = Contender("dense PyTorch", lambda: dense_rerank(query, gallery), 1, error, math.inf, 10, "N x N matrices")
    fits = size == "Market" or card.tiny
    return Case(
        name,
        {"nq": nq, "ng": len(gallery), "D": D, "top_k": top_k, "dtype": "float32", "seed": seed()},
        ours=Contender("ours nk.k_reciprocal_rerank", ours, 1, error, RERANKED_LIMIT, goal, "waits for one number"),
        variants=[sparse],
        peers=[
            graph_of(sparse, card),
            available(peer) if fits else Missing(peer.name, "its N x N matrices do not fit"),
        ],
        threads=0,
        device=card.device,
        bytes=float(4 * N * D + (8 * N * NEIGHBORS + 4 * nq * len(gallery) * (top_k is None))),
        flops=float(N) ** 2 * D,
        rates=Rates(card.rates.memory, card.rates.gemm["bfloat16"]),
        rounds=5 if fits else 2,
    )


def exact_reranked(query: Tensor, gallery: Tensor, lists: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """[rows, ng] float64 by the definition, from exact lists of all rows."""
    key, index, largest = lists
    options = (NEIGHBORS, NEIGHBORS // 2 + 1, 6, True, 2)
    crow, col, value = reranking_reference.reciprocal_encoding(index, key, largest, query, gallery, *options)
    own = torch.repeat_interleave(torch.arange(len(index), device=col.device), crow.diff())
    result = torch.empty(len(rows), len(gallery), dtype=torch.float64, device=col.device)
    for place, i in enumerate(rows.tolist()):
        row = torch.zeros(len(index), dtype=torch.float64, device=col.device)
        mine = slice(int(crow[i]), int(crow[i + 1]))
        row[col[mine].long()] = value[mine].double()
        s = torch.zeros_like(row).index_add_(0, own, torch.minimum(row[col.long()], value.double()))[len(query) :]
        d = torch.cat([(query[i].double() - part.double()).square().sum(1) for part in gallery.split(8192)])
        result[place] = 0.7 * (1 - s / (2 - s)).clamp_min(0) + 0.3 * d / largest[i]
    return result


def dense_rerank(query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Tensor:
    """k-reciprocal re-ranking with matrices of all rows with all; sets are masks, their sizes products of masks."""
    nq, x = len(query), torch.cat([query, gallery])
    squares = x.square().sum(1)
    d = torch.addmm(squares, x, x.T, alpha=-2).add_(squares[:, None]).clamp_min_(0).fill_diagonal_(0)
    d /= d.amax(1, keepdim=True)
    order = d.topk(k1 + 1, largest=False).indices

    def reciprocal(k: int) -> Tensor:
        near = torch.zeros_like(d, dtype=torch.bool).scatter_(1, order[:, : k + 1], True)
        return near & near.T

    own, half = reciprocal(k1), reciprocal(round(k1 / 2)).half()
    taken = own & (3 * (own.half() @ half.T) > 2 * half.sum(1))
    v = torch.where(own | (taken.half() @ half > 0), torch.exp(-d), 0.0)
    del own, half, taken
    v /= v.sum(1, keepdim=True)
    v = torch.stack([v[order[:, a]] for a in range(k2)]).mean(0) if len(v) < 4096 else _mean_of(v, order[:, :k2])
    result = torch.empty(nq, len(gallery), device=x.device)
    for i in range(nq):
        columns = v[i].nonzero()[:, 0]
        s = torch.minimum(v[i, columns], v[nq:, columns]).sum(1)
        result[i] = (1 - lambda_value) * (1 - s / (2 - s)) + lambda_value * d[i, nq:]
    return result


def _mean_of(v: Tensor, order: Tensor) -> Tensor:
    """Means of rows order [N, k] of v, one summand at a time."""
    total = v[order[:, 0]]
    for a in range(1, order.shape[1]):
        total += v[order[:, a]]
    return total / order.shape[1]


def gnn_case(name: str, card: Card) -> Case:
    """Features to scores by the graph of neighbours."""
    query, gallery = reranked_features(card, "Market")
    exact = dense_gnn(query, gallery, dtype=torch.float64)

    def contender(label: str, run: Callable[[], Tensor], limit: float, goal: float | None = None) -> Contender:
        return Contender(label, run, 1, lambda found: float((found - exact).abs().max()), limit, goal)

    return Case(
        name,
        {"nq": len(query), "ng": len(gallery), "D": query.shape[1], "dtype": "float32", "seed": seed()},
        ours=contender("ours nk.gnn_rerank", lambda: nk.gnn_rerank(query, gallery), RERANKED_LIMIT),
        peers=[available(contender("dense PyTorch", lambda: dense_gnn(query, gallery), math.inf, 10))],
        threads=0,
        device=card.device,
        bytes=float(query.nbytes + gallery.nbytes + 4 * len(query) * len(gallery)),
        flops=float(len(query) + len(gallery)) ** 2 * query.shape[1],
        rates=Rates(card.rates.memory, card.rates.gemm["bfloat16"]),
        rounds=5,
    )


def metrics_case(name: str, card: Card, size: str) -> Case:
    """AP, INP and first rank of all queries from distances; the floor is one read of them. Peers sort."""
    nq, ng = (card.size(rows, tiny) for rows, tiny in zip(RERANKED[size][:2], (20, 180), strict=True))
    generator = torch.Generator(card.device).manual_seed(seed())

    def drawn(most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=generator, device=card.device)

    query_id, gallery_id = drawn(max(2, nq // 4), nq), drawn(max(2, nq // 4), ng)
    distance = torch.rand(nq, ng, generator=generator, device=card.device)
    distance -= 0.4 * (query_id[:, None] == gallery_id)  # positives are near
    by_identity = gallery_id.sort(stable=True)
    begin, end = (torch.searchsorted(by_identity.values, query_id, right=right) for right in (False, True))
    rules = (by_identity.indices, begin, end, drawn(6, nq), drawn(6, ng), None, None, None)

    def ours() -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.retrieval_metrics(distance, *rules, "standard")

    def sorting() -> tuple[Tensor, ...]:
        return metrics_reference.retrieval_metrics(distance, *rules, "standard")

    exact = sorting()[0]

    def error(found: tuple[Tensor, ...]) -> float:
        return float((found[0] - exact).nan_to_num().abs().max())

    operator = Contender("ours operator", ours, 1, error, 1e-12)
    return Case(
        name,
        {"nq": nq, "ng": ng, "dtype": "float32", "seed": seed()},
        ours=operator,
        peers=[
            graph_of(operator, card),
            available(Contender("PyTorch, rows sorted", sorting, 1, error, 1e-12)),
            available(Contender("torch.argsort alone", lambda: distance.argsort(1))),
        ],
        threads=0,
        device=card.device,
        bytes=float(distance.nbytes),
        rates=Rates(card.rates.memory, card.rates.gemm["float32"]),
        rounds=5,
    )


# ------------------------------------------------------------------------------------------------ fused steps


@dataclass(frozen=True)
class Fused:
    """A fused function with the plain PyTorch that says the same; the gradient is that of the first input."""

    name: str
    inputs: Callable[..., tuple[Tensor, ...]]  # of a generator and a size, tiny or not
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    passes: float  # over the largest input, forward and backward
    products: Callable[..., float] | None = None  # flops, of the inputs

    def step(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        """The result and the gradient of the first input."""
        first = inputs[0].detach().requires_grad_()
        y = function(first, *inputs[1:])
        return y.detach(), *torch.autograd.grad(y, first, grad)


def _mixed_inputs(chance: torch.Generator, tiny: bool) -> tuple[Tensor, ...]:
    """Pairs of pictures and ratios of six stripes."""
    shape = (3, 3, 24, 10) if tiny else (32, 3, 288, 144)
    visible, infrared = (torch.randn(shape, generator=chance) for _ in range(2))
    return visible, infrared, torch.rand(shape[0], 6, generator=chance)


def _mixed(visible: Tensor, infrared: Tensor, ratio: Tensor) -> Tensor:
    lam = ratio.repeat_interleave(visible.shape[2] // ratio.shape[1], 1)[:, None, :, None].to(visible.dtype)
    return lam * visible + (1 - lam) * infrared


def _pooled_inputs(chance: torch.Generator, tiny: bool) -> tuple[Tensor, ...]:
    """Features and heat maps of 17 joints."""
    N, C, h, w = (3, 20, 5, 4) if tiny else (64, 2048, 16, 8)
    return torch.randn(N, C, h, w, generator=chance), torch.rand(N, 17, h, w, generator=chance)


def _pooled(features: Tensor, maps: Tensor) -> Tensor:
    maps = maps.to(features.dtype)
    return torch.einsum("nchw,nkhw->nkc", features, maps) / (maps.sum((2, 3)) + 1e-6)[..., None]


def _logits_inputs(chance: torch.Generator, tiny: bool) -> tuple[Tensor, ...]:
    """Student and teacher over the identities of many data sets."""
    shape = (5, 77) if tiny else (64, 31_423)
    student, teacher = (4 * torch.randn(shape, generator=chance) for _ in range(2))
    return student, teacher


def _distilled(student: Tensor, teacher: Tensor) -> Tensor:
    log_student, teacher = (torch.log_softmax(x / 4, 1) for x in (student, teacher.to(student.dtype)))
    return 16 * torch.nn.functional.kl_div(log_student, teacher, reduction="batchmean", log_target=True)


def _queue_inputs(chance: torch.Generator, tiny: bool) -> tuple[Tensor, ...]:
    """Queries, keys, the queue, originals: unit rows."""
    N, K, d = (5, 70, 12) if tiny else (320, 65_536, 128)
    rows = (torch.randn(count, d, generator=chance) for count in (N, N, K, N))
    return tuple(torch.nn.functional.normalize(x) for x in rows)


def _contrast(q: Tensor, k: Tensor, queue: Tensor, original: Tensor) -> Tensor:
    return torch.stack(nk.queue_contrast(q, k, queue, original=original))


def _plain_contrast(q: Tensor, k: Tensor, queue: Tensor, original: Tensor) -> Tensor:
    k, queue, original = (x.to(q.dtype) for x in (k, queue, original))
    negative = q @ queue.T / 0.1
    logits = torch.cat([(q * k).sum(1, keepdim=True) / 0.1, negative], 1)
    contrast = torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
    target = torch.softmax(original @ queue.T / 0.07, 1)
    consistency = torch.nn.functional.kl_div(torch.log_softmax(negative, 1), target, reduction="batchmean")
    return torch.stack([contrast, consistency])


FUSED = (
    Fused("region_mixup", _mixed_inputs, lambda *x: nk.region_mixup(*x), _mixed, 5.0),
    Fused("distillation_kl", _logits_inputs, lambda a, b: nk.distillation_kl(a, b, 4.0), _distilled, 5.0),
    Fused(
        "queue_contrast", _queue_inputs, _contrast, _plain_contrast, 2.0, lambda q, k, Q, o: 6.0 * len(q) * Q.numel()
    ),
    Fused("pose_weighted_pool", _pooled_inputs, lambda *x: nk.pose_weighted_pool(*x), _pooled, 2.0),
)


def fused_case(name: str, card: Card, fused: Fused) -> Case:
    """Forward and backward against the same in PyTorch, eager and compiled."""
    inputs = tuple(x.to(card.device) for x in fused.inputs(torch.Generator().manual_seed(seed()), card.tiny))
    wide = tuple(x.double() for x in inputs)
    grad = torch.ones_like(fused.plain(*wide))
    exact = fused.step(fused.plain, wide, grad)

    def error(result: tuple[Tensor, ...]) -> float:
        return max(relative_error(a, b.cpu()) for a, b in zip(result, exact, strict=True))

    def contender(name: str, function: Callable[..., Tensor], goal: float | None = None) -> Contender:
        return Contender(name, lambda: fused.step(function, inputs, grad.float()), error=error, limit=1e-4, goal=goal)

    torch.compiler.reset()
    compiled = torch.compile(fused.plain, backend="eager" if card.tiny else "inductor")
    ours = contender(f"ours nk.{fused.name}", fused.ours)
    peers = [contender("plain PyTorch", fused.plain, 2), contender("torch.compile of it", compiled, 2)]
    return Case(
        name,
        {"shapes": [list(x.shape) for x in inputs], "dtype": "float32", "seed": seed()},
        ours=ours,
        peers=[graph_of(ours, card), *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=fused.passes * max(x.nbytes for x in inputs),
        flops=fused.products(*inputs) if fused.products else 0.0,
        rates=Rates(card.rates.memory, card.rates.gemm["float32"]),
    )


# ------------------------------------------------------------------------------------------------ extrapolation


def discriminator_case(name: str, card: Card) -> Case:
    """Ratios of a million samples in the JS game; the floor reads penalties and writes D and w."""
    chance = torch.Generator().manual_seed(seed())
    penalty = 0.5 * (torch.randn(card.size(1 << 20, 300), generator=chance) - 2).square().to(card.device)
    exact = discriminator_reference.closed_form_discriminator(penalty.double(), 1.0, "js")[1]

    def contender(label: str, run: Callable[[], tuple[Tensor, ...]]) -> Contender:
        return Contender(label, run, 1, lambda found: float((found[1] - exact).norm() / exact.norm()), 1e-4)

    ours = contender("ours operator", lambda: torch.ops.neuraldeps.closed_form_discriminator(penalty, 1.0, "js"))
    peers = [
        contender("eager bisection", lambda: bisected(penalty, 1.0)),
        contender("eager Newton", lambda: newton(penalty, 1.0)),
    ]
    return Case(
        name,
        {"N": len(penalty), "dtype": "float32", "seed": seed()},
        ours=ours,
        peers=[graph_of(ours, card), *map(available, peers)],
        threads=0,
        device=card.device,
        bytes=3.0 * penalty.nbytes,
        rates=Rates(card.rates.memory, card.rates.gemm["float32"]),
    )


def step_inputs(chance: torch.Generator, B: int, L: int, d: int, rank: int) -> tuple[Tensor, ...]:
    """z, gradient, origin [B, L, d], an orthonormal basis [L, rank, d], step sizes [B]."""
    z, gradient, origin = (torch.randn(B, L, d, generator=chance) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(L, d, rank, generator=chance))[0].mT.contiguous()
    return z, gradient, origin, basis, torch.rand(B, generator=chance)


def step_case(name: str, card: Card, B: int, L: int, rank: int) -> Case:
    """Codes of 512 values; the floor reads z, gradient and origin and writes z' and p."""
    sizes = (card.size(B, 3), card.size(L, 2), card.size(512, 8), rank)
    inputs = step_inputs(torch.Generator().manual_seed(seed()), *sizes)
    z, gradient, origin, basis, a = (x.to(card.device) for x in inputs)
    exact = step_reference.projected_step(*(x.double() for x in (z, gradient, basis, a, origin)), 0.02)[0]

    def contender(label: str, run: Callable[..., tuple[Tensor, ...]]) -> Contender:
        arguments = (z, gradient, basis, a, origin, 0.02)
        return Contender(label, lambda: run(*arguments), 1, lambda found: relative_error(found[0], exact.cpu()), 1e-4)

    ours = contender("ours operator", torch.ops.neuraldeps.projected_step)
    return Case(
        name,
        {"B": sizes[0], "L": sizes[1], "d": sizes[2], "rank": rank, "dtype": "float32", "seed": seed()},
        ours=ours,
        peers=[graph_of(ours, card), available(contender("plain PyTorch", step_reference.projected_step))],
        threads=0,
        device=card.device,
        bytes=5.0 * z.nbytes,
        flops=float(z.numel() * (4 * rank + 5)),
        rates=Rates(card.rates.memory, card.rates.gemm["float32"]),
    )


# ------------------------------------------------------------------------------------------------ small calls


@dataclass(frozen=True)
class Operation:
    """A small call of one operator: results of static shape, without waiting for the device unless `waits`."""

    name: str
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]  # on the CPU
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor]  # of the inputs on the CPU, float64, sharing no code with `run`
    tolerance: float  # of the largest magnitude of the oracle's result
    gradient: bool = False  # of the sum of squares of the result in the first input, against `run` in float64
    waits: bool = False  # the host reads a size: neither a CUDA graph nor one graph of torch.compile
    compiles: bool = True  # by torch.compile in one graph; what has sizes of its own on the CPU does not

    def error(self, result: Tensor, inputs: tuple[Tensor, ...]) -> float:
        """Largest difference from the oracle over its largest magnitude; NaN counts as infinite."""
        return relative_error(result, self.oracle(*inputs))

    def squares_gradient(self, inputs: tuple[Tensor, ...]) -> Tensor:
        first = inputs[0].detach().clone().requires_grad_()
        return torch.autograd.grad(self.run(first, *inputs[1:]).double().square().sum(), first)[0]


def relative_error(result: Tensor, expected: Tensor) -> float:
    error = float((result.detach().cpu().double() - expected).abs().max()) / float(expected.abs().max())
    return math.inf if math.isnan(error) else error


def _covariance_of(n: int, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Inputs (S [n, n]): of random rows with a few strong directions, well conditioned."""

    def make(chance: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(8 * n, n, generator=chance, dtype=torch.float64)
        x = x @ (torch.eye(n) + 0.5 * torch.randn(n, n, generator=chance) / n**0.5).double()
        return ((x.T @ x / len(x)).to(dtype),)

    return make


def _rows_of(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> Callable[..., tuple[Tensor, ...]]:
    def make(chance: torch.Generator) -> tuple[Tensor, ...]:
        x = (torch.randn(shape, generator=chance, dtype=torch.float64) + 3.0).to(dtype)
        return (x, torch.rand(shape[:-1], generator=chance, dtype=torch.float64) + 0.1) if weighted else (x,)

    return make


def _dense(value: Tensor, index: Tensor, n: int) -> Tensor:
    """theta [..., n] of padded coefficients; what a kernel leaves unwritten spoils it."""
    return value.new_zeros(*value.shape[:-1], n).scatter_add(-1, index.long(), value)


def _problem(cov: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """All targets, and lam [n] at a ratio of lambda_max."""
    targets = torch.arange(len(cov), device=cov.device)
    return targets, ratio * largest_lam(cov)


def _tolerance(cov: Tensor) -> float:
    return 1e-12 if cov.dtype == torch.float64 else 1e-6


def _solve(cov: Tensor) -> Tensor:
    targets, lam = _problem(cov.detach(), 0.2)
    value, index, *_ = torch.ops.neuraldeps.covlasso(cov, targets, lam, None, _tolerance(cov), MAX_PIVOTS, len(cov))
    return _dense(value, index, len(cov))


def _solve_oracle(cov: Tensor) -> Tensor:
    return reference.covlasso(cov, *_problem(cov.double(), 0.2))


def _path(cov: Tensor) -> Tensor:
    targets, lam = _problem(cov, 1.0)
    lams = lam[:, None] * 0.7 * 0.5 ** torch.arange(3, dtype=torch.float64, device=cov.device)
    options = (_tolerance(cov), MAX_PIVOTS, len(cov), None, None, True, 0.25)
    value, index, *_ = torch.ops.neuraldeps.covlasso(cov, targets, lams, None, *options)
    return _dense(value, index, len(cov))


def _path_oracle(cov: Tensor) -> Tensor:
    targets, lam = _problem(cov.double(), 1.0)
    lams = lam[:, None] * 0.7 * 0.5 ** torch.arange(3)
    return reference.path(cov, targets, lams, nonnegative=True, ridge=0.25)


def _penalised(cov: Tensor, penalty: Tensor) -> Tensor:
    targets, lam = _problem(cov, 0.1)
    value, index, *_ = torch.ops.neuraldeps.covlasso(cov, targets, lam, penalty, _tolerance(cov), MAX_PIVOTS, len(cov))
    return _dense(value, index, len(cov))


def _penalised_oracle(cov: Tensor, penalty: Tensor) -> Tensor:
    return reference.covlasso(cov, *_problem(cov.double(), 0.1), penalty)


def _penalised_inputs(chance: torch.Generator) -> tuple[Tensor, ...]:
    (cov,) = _covariance_of(40, torch.float32)(chance)
    penalty = 0.5 + torch.rand(40, generator=chance)
    penalty[::7] = torch.inf
    return cov, penalty


def _top_k(cov: Tensor) -> Tensor:
    targets = torch.arange(len(cov), device=cov.device)
    value, index, *_ = torch.ops.neuraldeps.covlasso_top_k(cov, targets, 5, None, 1e-6, MAX_PIVOTS, 0.5)
    return _dense(value, index, len(cov))


def _top_k_oracle(cov: Tensor) -> Tensor:
    return reference.top_k(cov, torch.arange(len(cov)), 5, position=0.5).theta


def _lambda_max(cov: Tensor) -> Tensor:
    return torch.ops.neuraldeps.lambda_max(cov, torch.arange(len(cov), device=cov.device), None)


def _covariance(x: Tensor, weights: Tensor | None = None) -> Tensor:
    return nk.covariance(x, weights=weights)


def _covariance_oracle(x: Tensor, weights: Tensor | None = None) -> Tensor:
    return covariance_reference.covariance(x.double(), weights=weights)


def _cross(targets: Tensor, predictors: Tensor) -> Tensor:
    return nk.cross_covariance(targets, predictors).cross


def _cross_oracle(targets: Tensor, predictors: Tensor) -> Tensor:
    a, b = (x.double() - x.double().mean(0) for x in (targets, predictors))
    return a.T @ b / len(a)


def _two_streams(chance: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(_rows_of((300, n), torch.float32, False)(chance)[0] for n in (17, 40))


def _matrices_of(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    return lambda chance: (torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype),)


def _low_rank_inputs(chance: torch.Generator) -> tuple[Tensor, ...]:
    """Whole numbers of rank 7, exact in float32: no Gram matrix decides the smaller tolerance."""
    left, right = (torch.randint(-4, 5, shape, generator=chance) for shape in ((6, 40, 7), (6, 7, 33)))
    return ((left @ right).float(),)


def _ranks(a: Tensor) -> Tensor:
    return nk.matrix_rank(a, rtol=torch.tensor([0.5, 1e-3, 1e-12], dtype=torch.float64))


def _ranks_oracle(a: Tensor) -> Tensor:
    values = torch.linalg.svdvals(a.double())
    return torch.stack([(values > rtol * values[:, :1]).sum(-1) for rtol in (0.5, 1e-3, 1e-12)], -1).double()


def _hermitian_rank(a: Tensor) -> Tensor:
    return nk.matrix_rank(a + a.mT, rtol=0.3, hermitian=True)


def _hermitian_rank_oracle(a: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh((a + a.mT).double()).abs()
    return (values > 0.3 * values.amax(-1, keepdim=True)).sum(-1).double()


def _values_oracle(a: Tensor) -> Tensor:
    return torch.linalg.svdvals(a.double())


def _projected(a: Tensor) -> Tensor:
    return nk.low_rank_project(a, 5)


def _projected_oracle(a: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return (u[..., :5] * s[..., None, :5]) @ vh[..., :5, :]


def _values_gradient(a: Tensor) -> Tensor:
    """Of the sum of the values, by the operator that transforms of functions take."""
    grad = torch.ones(len(a), min(a.shape[1:]), dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    return torch.ops.neuraldeps.svdvals_backward(grad, a)


def _values_gradient_oracle(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return u @ vh


def _gram_of_basis(a: Tensor) -> Tensor:
    """V S^2 V' of tall a."""
    values, basis = torch.ops.neuraldeps.singular_basis(a)
    return (basis.mT * values[:, None].square()) @ basis


NORM_DOMAINS = 4  # of the small calls; ids name the first three


def _norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Callable[..., tuple[Tensor, ...]]:
    """x and residual [N, C, *], weight and bias [D, C]."""

    def make(chance: torch.Generator) -> tuple[Tensor, ...]:
        x, residual = (torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for _ in range(2))
        if channels_last:
            x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
        size, wide = (NORM_DOMAINS, shape[1]), torch.promote_types(dtype, torch.float32)
        weight, bias = (torch.randn(size, generator=chance, dtype=wide) for _ in range(2))
        return 2 * x + 3, residual, 1 + 0.3 * weight, bias

    return make


def _ids(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) * 2 % (NORM_DOMAINS - 1)


def _domain_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rest = {"training": True, "residual": residual, "activation": "relu"}
    return nk.domain_batch_norm(x, _ids(x), None, None, weight, bias, **rest)


def _domain_norm_oracle(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = residual.double()
    for d in range(NORM_DOMAINS - 1):
        rows, tables = _ids(x) == d, (weight[d].double(), bias[d].double())
        y[rows] += torch.nn.functional.batch_norm(x[rows].double(), None, None, *tables, training=True)
    return y.relu()


def _running(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Running mean and variance [2, D, C] after one batch."""
    running = bias.clone(), weight.square()
    nk.domain_batch_norm(x, _ids(x), *running, training=True)
    return torch.stack(running)


def _running_oracle(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    running = torch.stack((bias.double(), weight.double().square()))
    for d in range(NORM_DOMAINS - 1):
        torch.nn.functional.batch_norm(x[_ids(x) == d].double(), *running[:, d], training=True)
    return running


def _unseen(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By running statistics, a third of the samples of an unseen domain."""
    return nk.domain_batch_norm(x, _ids(x) - 1, bias, weight.square() + 0.5, weight, bias, training=False)


def _unseen_oracle(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, gamma, beta = bias.double(), weight.double(), bias.double()
    variance = gamma.square() + 0.5
    pooled_variance = variance.mean(0) + mean.var(0, correction=0)
    tables = [torch.cat([table, table.mean(0, keepdim=True)])[_ids(x) - 1] for table in (mean, gamma, beta)]
    rows = torch.cat([variance, pooled_variance[None]])[_ids(x) - 1]
    mean, gamma, beta, rows = (table.reshape(*table.shape, *(1,) * (x.dim() - 2)) for table in (*tables, rows))
    return gamma * (x.double() - mean) / (rows + 1e-5).sqrt() + beta


def _instance_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    def coefficients(g: Tensor, q: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return gamma * (q + 1e-5).rsqrt(), beta.expand_as(g)

    return nk.normalize(x, coefficients, weight[0], bias[0], residual=residual)[0]


def _instance_norm_oracle(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    tables = weight[0].double(), bias[0].double()
    return torch.nn.functional.instance_norm(x.double(), None, None, *tables) + residual.double()


def _norm_operations() -> Iterator[Operation]:
    """Small maps, which a GPU normalises in one launch, and larger ones; both layouts."""
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}
    for shape, size in (((12, 6, 5, 4), "small"), ((30, 6, 24, 18), "large")):
        for dtype in tolerance:
            for channels_last in (False, True):
                make = _norm_inputs(shape, dtype, channels_last)
                name = f"{size} {short(dtype)}{' channels_last' * channels_last}"
                wide = dtype in (torch.float32, torch.float64)
                yield Operation(
                    f"domain_batch_norm {name}",
                    make,
                    _domain_norm,
                    _domain_norm_oracle,
                    tolerance[dtype],
                    gradient=wide,
                )
                if dtype in (torch.float32, torch.bfloat16):
                    yield Operation(f"running statistics {name}", make, _running, _running_oracle, 5e-6)
                    yield Operation(f"unseen domain {name}", make, _unseen, _unseen_oracle, tolerance[dtype])
                    yield Operation(
                        f"instance norm {name}", make, _instance_norm, _instance_norm_oracle, tolerance[dtype], wide
                    )
    make = _norm_inputs((40, 17), torch.float32, False)
    yield Operation("domain_batch_norm [N, C]", make, _domain_norm, _domain_norm_oracle, 5e-6, gradient=True)


def _fourier_inputs(shape: tuple[int, ...], dtype: torch.dtype, planes: bool = False) -> Callable[..., Any]:
    """Inputs (x [B, H, W, C], weight), x a view of planes if asked for."""

    def make(chance: torch.Generator) -> tuple[Tensor, ...]:
        B, H, W, C = shape
        x = torch.randn(B, C, H, W, generator=chance).permute(0, 2, 3, 1)
        return (x if planes else x.contiguous()).to(dtype), torch.randn(H, W // 2 + 1, C, 2, generator=chance)

    return make


def _fourier_oracle(x: Tensor, weight: Tensor) -> Tensor:
    """By full transforms, from the filter as an image: the real part of the inverse of its Hermitian extension."""
    half, (H, W) = torch.view_as_complex(weight.double()), x.shape[1:3]
    full = x.new_zeros(H, W, x.shape[3], dtype=torch.complex128)
    full[:, : W // 2 + 1] = half
    full[:, 1 : (W + 1) // 2] *= 2  # of two columns that are each other's conjugates, one stands for both
    filter_image = torch.fft.ifft2(full, dim=(0, 1)).real
    spectrum = torch.fft.fft2(x.double(), dim=(1, 2)) * torch.fft.fft2(filter_image, dim=(0, 1))
    return torch.fft.ifft2(spectrum, dim=(1, 2)).real


def _fourier_weight_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """Of the sum of squares of y / 2."""
    y = nk.fourier_filter2d(x, weight)
    return torch.ops.neuraldeps.fourier_filter2d_backward(y, x, weight, "NHWC", "ortho")[1]


def _fourier_weight_gradient_oracle(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.double().requires_grad_()
    return torch.autograd.grad(_fourier_oracle(x, weight).square().sum() / 2, weight)[0]


def _fourier_operations() -> Iterator[Operation]:
    """A grid of each kernel: one, two and four threads a line, and matrix products; an odd batch and part of a tile."""
    for shape, dtype, planes in [
        ((3, 7, 7, 37), F32, False),
        ((3, 28, 28, 10), F32, True),
        ((2, 56, 56, 5), F32, False),
        ((2, 15, 20, 5), F32, True),
        ((3, 14, 14, 20), BF16, True),
        ((3, 32, 32, 5), F16, False),
    ]:
        make, tolerance = _fourier_inputs(shape, dtype, planes), {F32: 2e-6, BF16: 4e-3, F16: 6e-4}[dtype]
        name = f"{shape[1]}x{shape[2]} {short(dtype)} {'planes' if planes else 'pixels'}"
        yield Operation(
            f"fourier_filter2d {name}", make, nk.fourier_filter2d, _fourier_oracle, tolerance, gradient=dtype == F32
        )
        if dtype == F32:
            run, oracle = _fourier_weight_gradient, _fourier_weight_gradient_oracle
            yield Operation(f"fourier_filter2d weight gradient {name}", make, run, oracle, 4e-6)


def _feature_rows(dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Inputs (x [70, D], y [90, D]), some of x twice."""

    def make(chance: torch.Generator) -> tuple[Tensor, ...]:
        x, y = (torch.randn(rows, 37, generator=chance).to(dtype) for rows in (60, 90))
        return torch.cat([x, x[:10]]), y

    return make


def _flat(*parts: Tensor) -> Tensor:
    return torch.cat([part.double().reshape(-1) for part in parts])


def _exact_lists(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances and indices of the k nearest, equal ones by index, and all squared distances."""
    every = (x.double()[:, None] - y.double()).square().sum(-1)
    key, index = every.sort(dim=1, stable=True)
    return key[:, :k], index[:, :k], every


def _neighbors(x: Tensor, y: Tensor) -> Tensor:
    within = torch.ops.neuraldeps.neighbors(x, None, 7, "sqeuclidean", True)
    return _flat(*within, *torch.ops.neuraldeps.neighbors(x, y, 30, "sqeuclidean", False))


def _neighbors_oracle(x: Tensor, y: Tensor) -> Tensor:
    return _flat(*_exact_lists(x, x, 7)[:2], *_exact_lists(x, y, 30)[:2])


def _neighbor_lists(x: Tensor, y: Tensor) -> Tensor:
    lists = torch.ops.neuraldeps.neighbor_lists(x, y, 5, 11, True, True)
    return _flat(*lists, *torch.ops.neuraldeps.neighbors_and_largest(x, y, 5, True))


def _neighbor_lists_oracle(x: Tensor, y: Tensor) -> Tensor:
    both, n = torch.cat([x, y]), len(x)
    key, index, every = _exact_lists(both, both, 11)
    lists = key[:, :5], index[:, :5], every.amax(1), key[:n], index[:n], every[:n, n:]
    key, index, every = _exact_lists(x, y, 5)
    return _flat(*lists, key, index, every.amax(1))


RERANK_OPTIONS = (11, 6, 4, True, 2)  # of small calls: k1 = 10, k2 = 4


def _reranked_by(functions: Any, x: Tensor, y: Tensor) -> Tensor:
    """Dense result and the best 7."""
    key, index, largest, query_key, query_index, dense = functions.neighbor_lists(x, y, 11, 21, True, True)
    csr = functions.reciprocal_encoding(index, key, largest, x, y, *RERANK_OPTIONS)
    mixed = dense.clone()
    functions.jaccard_rerank(*csr, largest, mixed, 0.3, True, 2)
    best = functions.jaccard_rerank_top_k(*csr, query_index, query_key, largest, x, y, 7, 0.3, True, 2)[0]
    return _flat(mixed, best)


def _pairs_by(functions: Any, x: Tensor, y: Tensor) -> Tensor:
    """1 - Jaccard distances of all rows of both."""
    key, index, largest, *_ = functions.neighbor_lists(x, y, 11, 0, False, True)
    crow, col, value = functions.jaccard_distance(
        *functions.reciprocal_encoding(index, key, largest, x, y, *RERANK_OPTIONS)
    )
    row = torch.repeat_interleave(torch.arange(len(index), device=col.device), crow.diff())
    near = torch.zeros(len(index), len(index), dtype=torch.float64, device=col.device)
    return near.index_put_((row, col.long()), 1 - value.double())


def _gnn_by(lists: Any, functions: Any, x: Tensor, y: Tensor) -> Tensor:
    key, index, _, query_key, query_index, dense = lists.neighbor_lists(x, y, 9, 21, True, True, "cosine")
    scores = dense.clone()
    functions.gnn_rerank(index, key, scores, 4, 0.3)
    return _flat(scores, functions.gnn_rerank_top_k(index, key, query_index, query_key, x, y, 7, 4, 0.3)[0])


def _metrics_by(functions: Any, x: Tensor, y: Tensor) -> Tensor:
    """From distances and from features; every query has positives and junk, and some distances are equal."""
    query_id, gallery_id = (torch.arange(len(rows), device=rows.device) % 5 for rows in (x, y))
    by_identity = gallery_id.sort(stable=True)
    begin, end = (torch.searchsorted(by_identity.values, query_id, right=right) for right in (False, True))
    cameras = (query_id * 2 % 3, torch.arange(len(y), device=y.device) % 3)
    rules = (by_identity.indices, begin, end, *cameras, None, None, gallery_id.int())
    distance = (x[:, None] - y).square().sum(-1)
    unit = [torch.ones(len(rows), dtype=torch.float64, device=rows.device) for rows in (x, y)]
    slack = torch.full_like(unit[0], 1e-3)
    given = functions.retrieval_metrics(distance.round(), *rules, "sklearn")
    bounded = functions.retrieval_metrics_from_features(distance, slack, x, y, *unit, False, *rules, "standard")
    return _flat(*given, *bounded)


def _rerank_operations() -> Iterator[Operation]:
    ours, exact = torch.ops.neuraldeps, reranking_reference
    for dtype in (F32, F64):
        inputs = _feature_rows(dtype)
        name = short(dtype)

        def operation(what: str, by: Callable[..., Tensor], limit: float, *functions: Any, **how: Any) -> Operation:
            run, oracle = (functools.partial(by, *of) for of in functions)
            return Operation(f"{what} {name}", inputs, run, oracle, limit, **how)  # noqa: B023  called at once

        yield operation("k_reciprocal", _reranked_by, 2e-6, (ours,), (exact,), compiles=False)
        yield operation("jaccard_distance", _pairs_by, 2e-6, (ours,), (exact,), waits=True)
        yield operation("gnn", _gnn_by, 2e-6, (ours, ours), (exact, gnn_reference), waits=True)
    yield Operation(
        "retrieval_metrics",
        _feature_rows(F32),
        functools.partial(_metrics_by, ours),
        functools.partial(_metrics_by, metrics_reference),
        1e-12,
    )


def _penalties(chance: torch.Generator) -> tuple[Tensor, ...]:
    return (0.5 * (torch.randn(5000, generator=chance) - 2).square(),)


def _ratios(functions: Any, game: str, penalty: Tensor) -> Tensor:
    D, w, c = functions.closed_form_discriminator(penalty, 0.7, game)
    return torch.cat([D, w, c.to(w.dtype)])


def _ratios_oracle(game: str, penalty: Tensor) -> Tensor:
    return _ratios(discriminator_reference, game, penalty.double())


def _step_of(chance: torch.Generator) -> tuple[Tensor, ...]:
    return step_inputs(chance, 5, 3, 70, 6)


def _stepped(z: Tensor, gradient: Tensor, origin: Tensor, basis: Tensor, step: Tensor) -> Tensor:
    return torch.cat(nk.projected_step(z, gradient, basis, step, origin=origin, rho=0.3)[:2])


def _stepped_oracle(z: Tensor, gradient: Tensor, origin: Tensor, basis: Tensor, step: Tensor) -> Tensor:
    wide = (x.double() for x in (z, gradient, basis, step, origin))
    return torch.cat(step_reference.projected_step(*wide, 0.3)[:2])


def _extrapolation_operations() -> Iterator[Operation]:
    for game in ("js", "kl"):
        run = functools.partial(_ratios, torch.ops.neuraldeps, game)
        oracle = functools.partial(_ratios_oracle, game)
        yield Operation(f"closed_form_discriminator {game}", _penalties, run, oracle, 2e-6, gradient=True)
    yield Operation("projected_step", _step_of, _stepped, _stepped_oracle, 2e-6, gradient=True)


def _fused_operations() -> Iterator[Operation]:
    for fused in FUSED:
        for dtype, tolerance in ((F32, 2e-5), (F64, 1e-12), (BF16, 2e-2)):

            def inputs(chance: torch.Generator, fused: Fused = fused, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                return tuple(x.to(dtype) for x in fused.inputs(chance, True))

            def oracle(*x: Tensor, fused: Fused = fused) -> Tensor:
                return fused.plain(*(part.double() for part in x))

            name = f"{fused.name} {short(dtype)}"
            yield Operation(name, inputs, fused.ours, oracle, tolerance, gradient=dtype != BF16)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# n = 40: supports of one to two blocks of the factor; 150: of 70 coordinates, beyond what shared memory holds.
OPERATIONS = (
    Operation("covlasso float32", _covariance_of(40, F32), _solve, _solve_oracle, 1e-4, gradient=True),
    Operation("covlasso float64", _covariance_of(150, F64), _solve, _solve_oracle, 1e-9, gradient=True),
    Operation("covlasso path", _covariance_of(40, F32), _path, _path_oracle, 1e-4),
    Operation("covlasso penalties", _penalised_inputs, _penalised, _penalised_oracle, 1e-4),
    Operation("covlasso top k", _covariance_of(24, F64), _top_k, _top_k_oracle, 1e-8),
    Operation("lambda_max", _covariance_of(40, F32), _lambda_max, largest_lam, 1e-6),
    Operation("cross_covariance", _two_streams, _cross, _cross_oracle, 2e-6),
    *(
        Operation(
            f"covariance {short(dtype)}{' weighted' * weighted}",
            _rows_of((2, 700, 33), dtype, weighted),
            _covariance,
            _covariance_oracle,
            1e-12 if dtype == F64 else 2e-6,
            gradient=dtype in (F32, F64),
        )
        for dtype in (F32, F64, BF16, F16)
        for weighted in (False, True)
    ),
    # One warp a matrix, four, sixteen with the matrix in the workspace; R in pieces.
    Operation("matrix_rank", _low_rank_inputs, _ranks, _ranks_oracle, 0.0),
    Operation("matrix_rank hermitian", _matrices_of((9, 21, 21), F32), _hermitian_rank, _hermitian_rank_oracle, 0.0),
    Operation("svdvals float32", _matrices_of((9, 30, 20), F32), nk.svdvals, _values_oracle, 5e-7, gradient=True),
    Operation("svdvals float64", _matrices_of((5, 30, 70), F64), nk.svdvals, _values_oracle, 1e-13, gradient=True),
    Operation("svdvals bfloat16", _matrices_of((5, 60, 33), BF16), nk.svdvals, _values_oracle, 5e-7),
    Operation("svdvals float16 large", _matrices_of((3, 200, 170), F16), nk.svdvals, _values_oracle, 5e-7),
    Operation("svdvals float64 tall", _matrices_of((4, 300, 40), F64), nk.svdvals, _values_oracle, 1e-13),
    Operation("svdvals backward", _matrices_of((9, 30, 20), F32), _values_gradient, _values_gradient_oracle, 2e-6),
    Operation("singular_basis", _matrices_of((9, 30, 20), F32), _gram_of_basis, float64_gram, 1e-12),
    Operation("low_rank_project", _matrices_of((4, 40, 24), F32), _projected, _projected_oracle, 1e-5, gradient=True),
    *_norm_operations(),
    *_fourier_operations(),
    *_fused_operations(),
    *_extrapolation_operations(),
    Operation("neighbors float32", _feature_rows(F32), _neighbors, _neighbors_oracle, 1e-12, gradient=True),
    Operation("neighbors float64", _feature_rows(F64), _neighbors, _neighbors_oracle, 1e-12, gradient=True),
    Operation("neighbors bfloat16", _feature_rows(BF16), _neighbors, _neighbors_oracle, 1e-12),
    Operation("neighbor_lists float32", _feature_rows(F32), _neighbor_lists, _neighbor_lists_oracle, 1e-6),
    Operation("neighbor_lists float64", _feature_rows(F64), _neighbor_lists, _neighbor_lists_oracle, 1e-6),
    *_rerank_operations(),
)


def main(argv: list[str] | None = None) -> int:
    """Every operation once on poisoned memory; prints its error, and returns 1 where one is beyond its tolerance."""
    parser = argparse.ArgumentParser(prog="gpu_cases", description="Runs every operator once on small inputs.")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, as a rehearsal")
    device = torch.device("cpu" if parser.parse_args(argv).cpu else "cuda")
    failures = 0
    for operation in OPERATIONS:
        inputs = operation.inputs(torch.Generator().manual_seed(seed()))
        with poisoned_outputs():
            result = operation.run(*(x.to(device) for x in inputs))
        error = operation.error(result, inputs)
        failures += not error <= operation.tolerance
        print(f"{operation.name}: error {error:.1e}, allowed {operation.tolerance:.0e}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
