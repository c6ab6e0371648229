"""Region-wise mixup and pose-weighted pooling on the CPU: microseconds a call, forward and forward with backward.

Peers are the formulas in eager torch, at their best as matrix products and as they are written with the intermediate
[N, K, C, h, w], and torch.compile of the former. Errors are relative to float64: of the result, with a backward of the
gradient that comes first. "MB" is the peak of one call above what was held.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_covlasso_large import megabytes_of
from benchmarks.harness import Budget, Case, Contender, Missing, Recipe, measured_rates
from neuraldeps_kernels import pose_weighted_pool, region_mixup
from neuraldeps_kernels.reference.pose_weighted_pool import group_of_channel

GOAL = 2.0  # forward and backward
LIMIT, PEER_LIMIT = 1e-6, 1e-3
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """Inputs, which of them need a gradient, ours, and plain ways to say the same."""

    name: str
    inputs: tuple[Tensor, ...]
    needed: tuple[int, ...]
    ours: Function
    peers: dict[str, Function]  # the first is compiled too
    bytes_forward: float
    bytes_backward: float


def mixed(x_v: Tensor, x_i: Tensor, ratio: Tensor) -> Tensor:
    lam = ratio.repeat_interleave(x_v.shape[2] // ratio.shape[1], 1)[:, None, :, None]
    return lam * x_v + (1 - lam) * x_i


def pooled_by_product(features: Tensor, maps: Tensor) -> Tensor:
    H = maps.flatten(2)
    return H @ features.flatten(2).mT / (H.sum(2) + 1e-6)[:, :, None]


def pooled_by_sums(features: Tensor, maps: Tensor) -> Tensor:
    return (features[:, None] * maps[:, :, None]).sum((3, 4)) / (maps.sum((2, 3)) + 1e-6)[:, :, None]


def pooled_in_groups(features: Tensor, maps: Tensor) -> Tensor:
    group = group_of_channel(features.shape[1], maps.shape[1], features.device)
    return (features * maps[:, group]).sum((2, 3)) / (maps.sum((2, 3)) + 1e-6)[:, group]


def mixup_step(shape: tuple[int, ...], of_images: bool) -> Step:
    generator = torch.Generator().manual_seed(0)
    x_v, x_i = (torch.randn(shape, generator=generator) for _ in range(2))
    ratio = torch.rand(shape[0], 6 if shape[2] % 6 == 0 else 4, generator=generator)
    needed = (0, 1, 2) if of_images else (2,)
    name = f"region_mixup {'x'.join(map(str, shape))}, gradients of {'all' if of_images else 'ratios'}"
    return Step(
        name,
        (x_v, x_i, ratio),
        needed,
        region_mixup,
        {"eager": mixed},
        3 * x_v.nbytes,
        (3 + 2 * of_images) * x_v.nbytes,
    )


def pool_step(shape: tuple[int, ...], K: int, channels_last: bool, of_maps: bool, groups: bool = False) -> Step:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    maps = torch.rand(shape[0], K, *shape[2:], generator=generator)
    peers = {"eager, batched product": pooled_by_product, "eager, multiply and sum": pooled_by_sums}
    layout = " channels_last" * channels_last + " groups" * groups + ", gradients of maps too" * of_maps
    return Step(
        f"pose_weighted_pool {'x'.join(map(str, shape))} K{K}{layout}",
        (features, maps),
        (0, 1) if of_maps else (0,),
        lambda F, H: pose_weighted_pool(F, H, groups=groups),
        {"eager": pooled_in_groups} if groups else peers,
        features.nbytes,
        (1 + of_maps) * features.nbytes,
    )


LARGE, SMALL = (64, 2048, 16, 8), (64, 128, 8, 4)
STEPS: tuple[Callable[[], Step], ...] = (
    lambda: mixup_step((32, 3, 288, 144), True),
    lambda: mixup_step((32, 3, 288, 144), False),
    lambda: mixup_step((16, 3, 64, 32), False),
    *(lambda K=K, last=last: pool_step(LARGE, K, last, False) for K in (5, 17) for last in (False, True)),  # type: ignore[misc]
    lambda: pool_step(LARGE, 5, False, True),
    lambda: pool_step(LARGE, 4, False, False, True),
    lambda: pool_step(SMALL, 5, False, False),
    lambda: pool_step(SMALL, 5, True, True),
)


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    for make in STEPS:
        step = make()
        for backward in (False, True):
            name = f"reid_ops {step.name}{' backward' * backward}"
            yield Recipe(name, lambda name=name, make=make, back=backward: step_case(name, make(), back, budget.quick))  # type: ignore[misc]


def step_case(name: str, step: Step, backward: bool, quick: bool) -> Case:
    wide = tuple(x.double() for x in step.inputs)
    plain = next(iter(step.peers.values()))
    grad = torch.randn(plain(*step.inputs).shape, generator=torch.Generator().manual_seed(1))
    want = _run(step, plain, wide, grad.double(), backward)()

    def error(got: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    def contender(label: str, function: Function, limit: float, goal: float | None = None) -> Contender:
        return Contender(label, _run(step, function, step.inputs, grad, backward), 1, error, limit, goal)

    ours = contender("ours", step.ours, LIMIT)
    goal = GOAL if backward else None
    peers: list[Contender | Missing] = [contender(label, f, PEER_LIMIT, goal) for label, f in step.peers.items()]
    peers.append(_compiled(plain, contender, goal, quick))
    held = [one for one in (ours, *peers) if isinstance(one, Contender)]
    return Case(
        name,
        {"shapes": [list(x.shape) for x in step.inputs]},
        ours=ours,
        peers=peers,
        bytes=step.bytes_forward + backward * step.bytes_backward,
        rates=measured_rates(1, max(1 << 16, step.inputs[0].nbytes), torch.float32),
        facts={f"MB {one.name}": round(megabytes_of(one.run), 1) for one in held},
    )


def _run(
    step: Step, function: Function, inputs: tuple[Tensor, ...], grad: Tensor, backward: bool
) -> Callable[[], Tensor]:
    """The result; with a backward the first gradient that is needed."""
    leaves = [x.detach().requires_grad_(backward and i in step.needed) for i, x in enumerate(inputs)]

    def run() -> Tensor:
        result = function(*leaves)
        return torch.autograd.grad(result, [leaves[i] for i in step.needed], grad)[0] if backward else result

    return run


def _compiled(function: Function, contender: Any, goal: float | None, quick: bool) -> Contender | Missing:
    name = "torch.compile of it"
    if quick:
        return Missing(name, "not compiled in a quick run")
    torch.compiler.reset()
    found: Contender = contender(name, torch.compile(function, dynamic=False), PEER_LIMIT, goal)
    try:
        found.run()
    except Exception as failure:  # whatever a compiler without a toolchain raises
        return Missing(name, f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}")
    return found
