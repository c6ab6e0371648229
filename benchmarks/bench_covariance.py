"""Covariance of logits on the CPU against torch.cov and NumPy, with the error against float64 at column offsets.

Errors are over the largest variance, against the float64 covariance of the same rounded input. NumPy's plain product
X'X (syrk, half the flops) neither centres nor survives an offset: its error is against the uncentred second moment.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks.harness import Budget, Case, Contender, Rates, Recipe, measured_rates
from neuraldeps_kernels.data.synthetic_logits import clustered_logits
from neuraldeps_kernels.reference.covariance import covariance as reference_covariance

SAMPLES, CATEGORIES = 20_000, 1000
OFFSETS = (0.0, 100.0, 3000.0)  # added to all logits; the deviation is 2.5
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Errors at which a time counts, ours and theirs. Asked of ours at full size: 3e-7 in single precision.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-12}
ASKED_ERROR = {torch.float32: 3e-7, torch.bfloat16: 3e-7, torch.float64: 1e-12}
STREAM_BYTES = 1 << 28  # buffers of the copy rate, beyond the caches


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """float32 at all offsets and one and two threads, the other dtypes without offset on one."""
    samples = SAMPLES // 10 if budget.quick else SAMPLES
    settings = [(torch.float32, offset, threads) for threads in (1, 2) for offset in OFFSETS]
    settings += [(dtype, 0.0, 1) for dtype in DTYPES[1:]]
    for dtype, offset, threads in settings:
        name = f"covariance {samples} x {CATEGORIES} {_short(dtype)} offset {offset:g} threads {threads}"
        yield Recipe(name, _build(name, samples, CATEGORIES, dtype, offset, threads))


def _build(name: str, samples: int, n: int, dtype: torch.dtype, offset: float, threads: int) -> Callable[[], Case]:
    return lambda: covariance_case(name, samples, n, dtype, offset, threads)


def covariance_case(name: str, samples: int, n: int, dtype: torch.dtype, offset: float, threads: int) -> Case:
    """One covariance [n, n] of x [samples, n]; a float32 copy of bfloat16 input is made for NumPy outside its time."""
    x = (_logits(samples, n) + offset).to(dtype)
    for_numpy = x.float().numpy() if dtype == torch.bfloat16 else x.numpy()
    exact = reference_covariance(x)
    top = float(exact.diagonal().max())

    def error(result: Tensor | np.ndarray) -> float:
        return float((torch.as_tensor(result).double() - exact).abs().max()) / top

    def product_error(product: np.ndarray) -> float:
        second = exact + torch.outer(x.double().mean(0), x.double().mean(0))
        return float((torch.as_tensor(product).double() / samples - second).abs().max() / second.abs().max())

    goals = {"torch.cov": 2.4, "NumPy X'X, not centred": 1.0} if dtype == torch.float32 else {}
    limit = LIMITS[dtype]
    in_float = "torch.cov(x.float())" if dtype == torch.bfloat16 else "torch.cov"
    peers = [
        Contender(in_float, lambda: torch.cov(_widened(x).T, correction=0), 1, error, limit),
        Contender("NumPy X'X, not centred", lambda: for_numpy.T @ for_numpy, 1, product_error, limit),
        Contender("numpy.cov", lambda: np.cov(for_numpy, rowvar=False, ddof=0, dtype=for_numpy.dtype), 1, error, limit),
    ]
    rates = measured_rates(threads, STREAM_BYTES, dtype)
    return Case(
        name,
        {"samples": samples, "n": n, "dtype": _short(dtype), "offset": offset},
        ours=Contender("ours nk.covariance", lambda: nk.covariance(x), 1, error, limit),
        peers=[_with_goal(peer, goals.get(peer.name)) for peer in peers],
        threads=threads,
        bytes=float(x.nbytes + exact.nbytes),
        flops=float(samples * n * (n + 1)),
        rates=Rates(2 * rates.copy, rates.gemm),  # x is read, nothing of that size is written
        facts={"error asked": f"{ASKED_ERROR[dtype]:.0e}"},
    )


@functools.lru_cache(1)
def _logits(samples: int, n: int) -> Tensor:
    return clustered_logits(n, min(512, n), samples)[0]


def _with_goal(peer: Contender, goal: float | None) -> Contender:
    return Contender(peer.name, peer.run, peer.units, peer.error, peer.limit, goal)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
