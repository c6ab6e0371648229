"""Distillation over many classes, contrast with a queue, momentum update, on the CPU: microseconds a call.

Peers are the formulas in eager torch, with their [N, C] and [N, K] matrices, and torch.compile of that; for the update
of a momentum encoder, loops over its tensors. Errors are relative to float64: of the loss, with a backward of the
gradient. "MB" is the peak of one call above what was held.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize, softmax

from benchmarks.bench_reid_ops import Step, step_case
from benchmarks.harness import Budget, Case, Contender, Recipe, measured_rates
from neuraldeps_kernels import distillation_kl, momentum_update, queue_contrast
from neuraldeps_kernels.models.resnet import ResNet

CLASSES, TEMPERATURE = 31_423, 16.0
BATCHES = (48, 64, 256)  # images
QUEUES = ((320, 65_536, 128), (64, 65_536, 128), (64, 1024, 64))  # rows, queue, features
TAU, TAU_T = 0.1, 0.07
MOMENTUM = 0.999


def distilled(student: Tensor, teacher: Tensor) -> Tensor:
    divergence = kl_div(log_softmax(student / TEMPERATURE, 1), softmax(teacher / TEMPERATURE, 1), reduction="sum")
    return divergence * (TEMPERATURE**2 / len(student))


def contrasted(q: Tensor, k: Tensor, o: Tensor, queue: Tensor) -> Tensor:
    """L_con + KL."""
    negative = q @ queue.T
    logits = torch.cat([(q * k).sum(1, keepdim=True), negative], 1) / TAU
    contrast = cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
    return contrast + kl_div(log_softmax(negative / TAU, 1), softmax(o @ queue.T / TAU_T, 1), reduction="batchmean")


def distillation_step(N: int) -> Step:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (5 * torch.randn(N, CLASSES, generator=generator) for _ in range(2))
    return Step(
        f"distillation_kl {N} x {CLASSES}",
        (student, teacher),
        (0,),
        lambda a, b: distillation_kl(a, b, TEMPERATURE),
        {"eager": distilled},
        2 * student.nbytes,
        3 * student.nbytes,
    )


def queue_step(N: int, K: int, d: int) -> Step:
    generator = torch.Generator().manual_seed(0)
    q, k, o, queue = (normalize(torch.randn(rows, d, generator=generator), dim=1) for rows in (N, N, N, K))
    return Step(
        f"queue_contrast {N} x {K} x {d}",
        (q, k, o, queue),
        (0,),
        lambda q, k, o, queue: sum(queue_contrast(q, k, queue, original=o, temperature=TAU, target_temperature=TAU_T)),
        {"eager": contrasted},
        queue.nbytes,
        0.0,
    )


def distillation_case(name: str, N: int, backward: bool, quick: bool) -> Case:
    return step_case(name, distillation_step(N), backward, quick)


def queue_case(name: str, size: tuple[int, int, int], backward: bool, quick: bool) -> Case:
    """With its products in the floor: those of q and o with the queue, and back for the gradient."""
    return replace(step_case(name, queue_step(*size), backward, quick), flops=(1 + backward) * 4.0 * math.prod(size))


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    for backward in (False, True):
        for N in BATCHES:
            name = f"distillation distillation_kl {N} x {CLASSES}{' backward' * backward}"
            yield Recipe(name, partial(distillation_case, name, N, backward, budget.quick))
        for size in QUEUES:
            name = f"distillation queue_contrast {' x '.join(map(str, size))}{' backward' * backward}"
            yield Recipe(name, partial(queue_case, name, size, backward, budget.quick))
    yield Recipe("distillation momentum_update ResNet-50", momentum_case)


def momentum_case() -> Case:
    torch.manual_seed(0)
    online = [p.detach() for p in ResNet(50).parameters()]
    start = [torch.randn_like(p) for p in online]
    want = torch.cat(
        [torch.lerp(a.double(), b.double(), 1 - MOMENTUM).flatten() for a, b in zip(start, online, strict=True)]
    )

    def contender(label: str, update: Callable[[list[Tensor], list[Tensor]], None], limit: float) -> Contender:
        teacher = [p.clone() for p in start]
        fresh = True

        def run() -> list[Tensor]:
            nonlocal fresh
            update(teacher, online)
            found, fresh = ([p.clone() for p in teacher] if fresh else teacher), False
            return found

        def error(found: list[Tensor]) -> float:
            return float((torch.cat([p.double().flatten() for p in found]) - want).norm() / want.norm())

        return Contender(label, run, 1, error, limit)

    def lerp(teacher: list[Tensor], params: list[Tensor]) -> None:
        for a, b in zip(teacher, params, strict=True):
            a.lerp_(b, 1 - MOMENTUM)

    def scaled(teacher: list[Tensor], params: list[Tensor]) -> None:
        for a, b in zip(teacher, params, strict=True):
            a.mul_(MOMENTUM).add_(b, alpha=1 - MOMENTUM)

    size = sum(p.nbytes for p in online)
    return Case(
        "distillation momentum_update ResNet-50",
        {"tensors": len(online), "parameters": size // 4},
        ours=contender("ours momentum_update", lambda a, b: momentum_update(a, b, MOMENTUM), 1e-6),
        peers=[contender("loop of lerp_", lerp, 1e-6), contender("loop of mul_ and add_", scaled, 1e-6)],
        bytes=3.0 * size,
        rates=measured_rates(1, size, torch.float32),
    )
