"""CovLasso where the covariance outgrows the caches, and where it is never formed: microseconds a target, on the CPU.

Covariances are synthetic: clustered categories, features with a decaying spectrum, a linear discriminant on them. The
violation is recomputed in float64 on a sample of the targets. "memory" is the peak of one call above what was held.
"""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks.harness import Budget, Case, Contender, Rates, Recipe, measured_rates
from neuraldeps_kernels.ops.factored import FactoredCovariance

LARGE_GOALS = {0.5: None, 0.3: None, 0.2: 120.0, 0.12: None}  # lam_ratio: microseconds a target, n = 10,000
FACTORED_RATIOS = (0.3, 0.05)
SCALING = {500: 512, 1000: 512, 2000: 1024, 4000: 1024, 10_000: 1024}  # n: features
SUPPORTS = (5, 20, 80, 350)
CHECKED = 32  # targets whose violation is recomputed
LATENT = 96


def cases(budget: Budget) -> Iterator[Recipe]:
    """n = 10,000 at several penalties, n = 50,000 from factors, then the table of n and k."""
    count = 1000 if budget.quick else 10_000  # of few targets the checks of the covariance are a large part
    for ratio, goal in LARGE_GOALS.items():
        name = f"covlasso large n 10,000 ratio {ratio}"
        yield Recipe(name, functools.partial(dense_case, name, ratio, None if budget.quick else goal, count))
    for ratio in FACTORED_RATIOS:
        name = f"covlasso large factored n 50,000 ratio {ratio}"
        yield Recipe(name, functools.partial(factored_case, name, ratio))
    for n in SCALING:
        name = f"covlasso large scaling n {n}"
        yield Recipe(name, functools.partial(scaling_case, name, n, 256 if budget.quick else 1024))


def clustered_factors(n: int, features: int, samples: int = 30_000) -> FactoredCovariance:
    """Categories in a tree of three levels, rectified features, discriminant weights; a function of the sizes."""
    generator = torch.Generator().manual_seed(n + features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def choice(below: int, size: int) -> Tensor:
        return torch.randint(below, (size,), generator=generator)

    coarse, fine = normal(max(4, n // 50), LATENT), 0.9 * normal(max(8, n // 8), LATENT)
    fine += coarse[choice(len(coarse), len(fine))]
    centre = fine[choice(len(fine), n)] + 0.7 * normal(n, LATENT)
    mixing = normal(LATENT, features) * torch.arange(1, LATENT + 1).pow(-0.35)[:, None] / LATENT**0.5
    labels = choice(n, samples)
    hidden = ((centre[labels] + 0.9 * normal(samples, LATENT)) @ mixing + 0.35 * normal(samples, features)).relu()
    mean = (
        torch.zeros(n, features).index_add_(0, labels, hidden)
        / torch.bincount(labels, minlength=n).clamp_min(1)[:, None]
    )
    within = hidden - mean[labels]
    scatter = (within.T @ within).double() / samples
    scatter.diagonal().add_(0.02)
    weight = torch.linalg.solve(scatter, (mean - mean.mean(0)).double().T).T
    return FactoredCovariance(hidden, weight.float())


@functools.lru_cache(1)
def _dense(n: int) -> Tensor:
    """[n, n] float32."""
    return clustered_factors(n, SCALING[n]).dense()


@functools.lru_cache(1)
def _factored() -> FactoredCovariance:
    return clustered_factors(50_000, 576, 60_000)


# ------------------------------------------------------------------------------------------------ cases


def dense_case(name: str, ratio: float, goal_us: float | None, count: int) -> Case:
    """Targets spread over n = 10,000, in one call: checks, and packing where the memory needs it, included."""
    cov = _dense(10_000)
    targets = torch.arange(0, 10_000, 10_000 // count)
    lam = ratio * nk.lambda_max(cov, targets)
    ours = operator("ours operator float32", cov, targets, lam, goal_us)
    k = ours.run()[2].double()
    rates = measured_rates(1, cov.nbytes, torch.float32)
    return Case(
        name,
        {"n": len(cov), "targets": count, "ratio": ratio, "dtype": "float32", "tol": 1e-6},
        ours=ours,
        bytes=float(4 * len(cov) * k.mean()),  # one certifying pass over the rows of the support
        flops=float((k**3 / 3).mean()),
        rates=Rates(rates.copy, rates.gemm),
        facts={"k": f"{k.mean():.1f} (most {k.max():.0f})", "memory": f"{megabytes_of(ours.run):.0f} MB"},
    )


def factored_case(name: str, ratio: float) -> Case:
    """64 targets of a vocabulary of 50,000, rank 576, two threads."""
    cov = _factored()
    targets = torch.arange(0, 50_000, 781)[:64]

    def run() -> nk.CovLassoSolution:
        return nk.covlasso(cov, lam_ratio=ratio, targets=targets)

    def error(solution: nk.CovLassoSolution) -> float:
        W, theta = cov.weight.double(), solution.dense()
        g = ((theta @ W - W[targets]) @ cov.hidden_cov) @ W.T
        return _violation(g, theta, solution.lam / 2, targets, solution.lambda_max / 2)

    k = run().n_nonzero.double()
    return Case(
        name,
        {"n": 50_000, "rank": 576, "targets": len(targets), "ratio": ratio, "dtype": "float32", "tol": 1e-6},
        ours=Contender("ours nk.covlasso, factored", run, len(targets), error, 1e-6),
        threads=2,
        facts={"k": f"{k.mean():.1f} (most {k.max():.0f})", "memory": f"{megabytes_of(run):.0f} MB"},
    )


def scaling_case(name: str, n: int, count: int) -> Case:
    """One covariance at several mean supports, without checks and packing, which all targets of a call share; the first
    is what the others are compared with.
    """
    cov = _dense(n)
    targets = torch.arange(0, n, max(1, n // count))[:count]
    solves = []
    for k in SUPPORTS:
        ratio = _ratio_for(cov, k)
        some = targets if k < 100 else targets[:: max(1, len(targets) // 64)]
        lam = ratio * nk.lambda_max(cov, some)
        solves.append(alone(operator(f"k {k} (ratio {ratio:.3g})", cov, some, lam, capacity=1024), cov))
    facts = {"rank at most": min(n - 1, SCALING[n])}
    return Case(name, {"n": n, "dtype": "float32", "tol": 1e-6}, ours=solves[0], variants=solves[1:], facts=facts)


def operator(
    name: str, cov: Tensor, targets: Tensor, lam: Tensor, goal_us: float | None = None, capacity: int = 512
) -> Contender:
    """`torch.ops.neuraldeps.covlasso`; the error is the largest violation over a sample of the targets."""
    capacity = min(len(cov), capacity)

    def run() -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.covlasso(cov, targets, lam, None, 1e-6, 1_000_000, capacity)

    def error(result: tuple[Tensor, ...]) -> float:
        sample = torch.arange(0, len(targets), max(1, len(targets) // CHECKED))
        value, index, count, info = (x[sample] for x in result)
        inside = torch.arange(capacity) < count[:, None]
        theta = torch.zeros(len(sample), len(cov), dtype=torch.float64)
        theta.scatter_add_(1, index.long(), torch.where(inside, value.double(), 0.0))
        g = torch.stack(
            [w[w != 0] @ cov[w != 0].double() - cov[t].double() for w, t in zip(theta, targets[sample], strict=True)]
        )
        return _violation(g, theta, lam[sample] / 2, targets[sample], info[:, 5] / 2)

    return Contender(name, run, len(targets), error, 1e-6, goal_us)


def alone(solve: Contender, cov: Tensor) -> Contender:
    """`solve` less the time of a call that has nothing to solve: one target at its lambda_max."""
    first = torch.zeros(1, dtype=torch.int64)
    lam = nk.lambda_max(cov, first)

    def run() -> tuple[tuple[Tensor, ...], float]:
        start = time.process_time()
        torch.ops.neuraldeps.covlasso(cov, first, lam, None, 1e-6, 1_000_000, 1)
        prepared = time.process_time()
        result = solve.run()
        return result, time.process_time() - prepared - (prepared - start)

    def error(timed: tuple[tuple[Tensor, ...], float]) -> float:
        assert solve.error
        return solve.error(timed[0])

    return Contender(solve.name, run, solve.units, error, solve.limit, clock=lambda timed: float(timed[1]))


def _violation(g: Tensor, theta: Tensor, a: Tensor, targets: Tensor, top: Tensor) -> float:
    a = a[:, None]
    violation = torch.where(theta != 0, (g + a * theta.sign()).abs(), (g.abs() - a).clamp_min(0))
    violation[torch.arange(len(targets)), targets] = 0
    return float((violation.amax(1) / top).max())


def _ratio_for(cov: Tensor, k: float) -> float:
    """The lam_ratio, to 5 %, at which the mean support of 16 targets is k."""
    low, high = 1e-4, 1.0
    targets = torch.arange(0, len(cov), len(cov) // 16)[:16]
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        mean = nk.covlasso(cov, lam_ratio=middle, targets=targets).n_nonzero.double().mean()
        low, high = (low, middle) if mean < k else (middle, high)
    return float((low * high) ** 0.5)


def megabytes_of(run: Callable[[], object]) -> float:
    """Peak resident memory of a call above what was held before (Linux; 0 elsewhere)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0.0

    def resident(field: str) -> float:
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        return int(found[1]) / 1024 if found else 0.0

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier calls freed must not hide what this one takes
    reset.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before
