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

import torch
from torch import Tensor

import neuraldeps_kernels as nk
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
from neuraldeps_kernels.reference import covariance as covariance_reference
from neuraldeps_kernels.reference import covlasso as reference

MAX_PIVOTS = 30_000
LIMIT = 1.001e-6  # of the violation: the tolerance asked for, and rounding where it is computed again
CACHED_BYTES = 1 << 24  # a covariance up to this size stays in the second-level cache
ORACLE_ROWS = 1 << 16  # rows that the float64 oracle of a covariance takes at a time
FISTA_CHECK = 50  # iterations between two looks at the violation while their number is sought
LATENT = 64  # dimensions behind the logits of the covariance cases
MM = "torch.mm, not centred"
GRAPH = ", graph"  # ends the name of a contender that is replayed


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


# ------------------------------------------------------------------------------------------------ small calls


@dataclass(frozen=True)
class Operation:
    """A small call of one operator: results of static shape, without waiting for the device."""

    name: str
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]  # on the CPU
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor]  # of the inputs on the CPU, float64, sharing no code with `run`
    tolerance: float  # of the largest magnitude of the oracle's result
    gradient: bool = False  # of the sum of squares of the result in the first input, against `run` in float64

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
