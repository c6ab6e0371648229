"""Batch normalisation by domain on the CPU: microseconds a call, forward and forward with backward.

Peers: a loop over the domains (index_select, F.batch_norm, index_put), one plain F.batch_norm of the whole tensor,
which does less, a composition of torch operations without a loop, and torch.compile of that. Errors are relative to
float64: of y, and for a backward of dx. The record has the bytes that a forward keeps for its backward, ours and those
of the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Budget, Case, Contender, Missing, Recipe, measured_rates
from neuraldeps_kernels import domain_batch_norm

Norm = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]

# (shape, domains, channels last): two stages of a ResNet in both layouts, wide, a feature vector, many domains, tiny.
CASES = [
    ((64, 256, 16, 8), 4, False),
    ((64, 256, 16, 8), 4, True),
    ((32, 64, 64, 32), 3, False),
    ((32, 64, 64, 32), 3, True),
    ((64, 2048, 16, 8), 3, False),
    ((128, 2048), 4, False),
    ((32, 256, 16, 8), 16, False),
    ((8, 64, 8, 4), 4, False),
]
FUSED = 4  # the first of them are measured with residual and ReLU too
LIMIT = {False: 1e-6, True: 3e-6}  # of y, of dx
PEER_LIMIT = 1e-3


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    for index, (shape, domains, channels_last) in enumerate(CASES):
        for fused in (False, True) if index < FUSED else (False,):
            for backward in (False, True):
                layout = " channels_last" if channels_last else ""
                job = " residual relu" * fused + " backward" * backward
                name = f"domain_norm {'x'.join(map(str, shape))} D{domains}{layout}{job}"
                yield Recipe(name, _recipe(name, shape, domains, channels_last, fused, backward, budget.quick))


def _recipe(*arguments: Any) -> Callable[[], Case]:
    return lambda: _case(*arguments)


def loop_over_domains(
    x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    y = torch.empty_like(x)
    for k in range(weight.shape[0]):
        rows = (domain == k).nonzero()[:, 0]
        if len(rows):
            part = F.batch_norm(x.index_select(0, rows), None, None, weight[k], bias[k], True)
            y = y.index_put((rows,), part)
    return finished(y, residual, relu)


def without_a_loop(
    x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """Moments by sample, merged by index_add, and one affine map."""
    D, C = weight.shape
    flat = x.reshape(*x.shape[:2], -1)
    variance, mean = torch.var_mean(flat, 2, correction=0)
    count = x.new_zeros(D).index_add(0, domain, x.new_ones(x.shape[0])).clamp(min=1)[:, None]
    centre = x.new_zeros(D, C).index_add(0, domain, mean) / count
    spread = variance + (mean - centre[domain]).square()
    scale = weight * (x.new_zeros(D, C).index_add(0, domain, spread) / count + 1e-5).rsqrt()
    tail = (1,) * (x.dim() - 2)
    a, m, b = (table[domain].reshape(*x.shape[:2], *tail) for table in (scale, centre, bias))
    return finished(a * (x - m) + b, residual, relu)


def finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def plain(x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return finished(F.batch_norm(x, None, None, weight[0], bias[0], True), residual, relu)


def ours(x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    options: dict[str, Any] = {"residual": residual, "activation": "relu" if relu else None}
    return domain_batch_norm(x, domain, None, None, weight, bias, training=True, **options)


def _case(
    name: str, shape: tuple[int, ...], D: int, channels_last: bool, fused: bool, backward: bool, quick: bool
) -> Case:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad, residual = (torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(3))
    x = 2 * x + 5
    weight, bias = (torch.randn(D, shape[1], generator=generator) for _ in range(2))
    domain = torch.arange(shape[0]) % D
    rest = (residual if fused else None, fused)

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_(backward) for t in (x, weight, bias)]
        added = rest[0] if rest[0] is None else rest[0].clone().requires_grad_(backward)

        def run() -> Tensor:
            y = function(leaves[0], domain, *leaves[1:], added, fused)
            if not backward:
                return y
            return torch.autograd.grad(y, [*leaves, *([] if added is None else [added])], grad)[0]

        return run

    def exact(function: Callable[..., Tensor]) -> Tensor:
        leaf = x.double().requires_grad_(backward)
        added = rest[0] if rest[0] is None else rest[0].double()
        y = function(leaf, domain, weight.double(), bias.double(), added, fused)
        return torch.autograd.grad(y, leaf, grad.double())[0] if backward else y

    def error_to(want: Tensor) -> Callable[[Tensor], float]:
        return lambda got: float((got.double() - want).norm() / want.norm())

    error, plain_error = error_to(exact(loop_over_domains)), error_to(exact(plain))
    # A value that rounds to the other side of the ReLU has another gradient: at most some in a million do.
    limit = 2e-3 if fused and backward else LIMIT[backward]
    over_loop, over_plain = _goals(shape, channels_last, backward) if not fused else (None, None)
    peers: list[Contender | Missing] = [
        Contender("loop over domains", step(loop_over_domains), 1, error, max(limit, PEER_LIMIT), over_loop),
        Contender("one F.batch_norm", step(plain), 1, plain_error, max(limit, PEER_LIMIT), over_plain),
        Contender("composition", step(without_a_loop), 1, error, max(limit, PEER_LIMIT)),
        _compiled(step, error, quick),
    ]
    values = x.numel() * 4
    return Case(
        name,
        {"shape": list(shape), "domains": D, "channels_last": channels_last},
        ours=Contender("ours domain_batch_norm", step(ours), 1, error, limit),
        peers=peers,
        bytes=float(values * (2 + fused + backward * (3 + 2 * fused))),
        rates=measured_rates(1, max(1 << 16, values), torch.float32),
        facts={
            "kept_mib": round(kept_bytes(ours, x, domain, weight, bias, *rest) / 2**20, 2),
            "kept_by_loop_mib": round(kept_bytes(loop_over_domains, x, domain, weight, bias, *rest) / 2**20, 2),
        },
    )


def _goals(shape: tuple[int, ...], channels_last: bool, backward: bool) -> tuple[float, float]:
    """Of GOALS: ratios to the loop and to one F.batch_norm."""
    if len(shape) == 2:
        return 3.0, 1.0
    return (9.0 if backward else 10.0), 1.5 if channels_last else (4.0 if backward else 5.0)


def _compiled(
    step: Callable[[Callable[..., Tensor]], Callable[[], Tensor]], error: Callable[[Tensor], float], quick: bool
) -> Contender | Missing:
    name = "torch.compile of it"
    if quick:
        return Missing(name, "not compiled in a quick run")
    torch.compiler.reset()
    run = step(torch.compile(without_a_loop, dynamic=False))
    try:
        run()
    except Exception as failure:  # whatever a compiler without a toolchain raises
        return Missing(name, f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}")
    return Contender(name, run, 1, error, PEER_LIMIT)


def kept_bytes(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> int:
    """Bytes of the different tensors that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    arguments = [x, *rest]
    leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*leaves)
    return sum(kept.values())
