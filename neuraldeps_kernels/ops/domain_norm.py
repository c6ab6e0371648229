"""Normalisation by instance, by domain and anything between, as moments -> table [N, C] -> one affine pass.

    g[n, c] = mean of x,  q[n, c] = mean of (x - g)^2             over the trailing dimensions of x [N, C, *]
    y = act(A (x - g) + B + residual),   A, B [N, C],             act(z) = z or max(z, 0)

Operators (`torch.ops.neuraldeps`), statistics in float32 (float64 for float64 x), those of domains in float64:

- `instance_moments` and `centred_affine`, differentiable, with vmap; `centred_affine_sums` and
  `centred_affine_input_grad` are their backward.
- `domain_batch_norm` and `domain_batch_norm_backward`: batch normalisation of each domain by its own samples.
- `update_running_statistics`: running mean, variance and number of batches of each domain, in place.

CPU: csrc/torch/domain_norm.cpp, csrc/cpu/domain_norm.cpp. CUDA: triton/domain_norm.py, whose functions have the names
and arguments of the operators, else reference/domain_norm.py. Second derivatives are those of the reference.

Memory layouts: contiguous [N, C, *] and channels-last of any rank are read as they are, anything else is copied once.
Results have the layout of x (contiguous where x was copied). For the backward x is kept, with "relu" also y.

Source: batch norm by domain as in DSBN (Chang et al., CVPR 2019); the formulation by moments is ours.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuraldeps_kernels.ops.layouts import result_like
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import domain_norm as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ACTIVATIONS = (None, "relu")

Coefficients = Callable[..., tuple[Tensor, ...]]


@annotated
def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every sample and channel.

    Args:
        x: [N, C, *], float32, float64, bfloat16 or float16.

    Returns:
        g, q [N, C], float64 for float64 `x`, else float32; q is never negative. Without trailing dimensions g = x and
        q = 0; of no values both are 0. Differentiable twice.

    Raises:
        ValueError: `x` has fewer than 2 dimensions.
        TypeError: `x` is no tensor of these dtypes.
    """
    _check_x(x)
    return _call("instance_moments", x)  # type: ignore[no-any-return]


@annotated
def centred_affine(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`scale (x - mean) + shift + residual`, then the activation, in one pass over `x`.

    Args:
        x: [N, C, *], float32, float64, bfloat16 or float16.
        mean, scale, shift: [N, C], real; used in float64 for float64 `x`, else in float32.
        residual: of the shape and dtype of `x`; None: nothing is added.
        activation: None or "relu".

    Returns:
        Tensor of shape, dtype and layout of `x`. Differentiable twice in all tensors; where the result of "relu" is 0,
        so is the derivative.

    Raises:
        ValueError: a shape, device or `activation` does not fit.
        TypeError: `x` is no tensor of these dtypes, or another argument is no real tensor.
    """
    _check_x(x)
    tables = [_checked_table(name, t, x) for name, t in (("mean", mean), ("scale", scale), ("shift", shift))]
    residual = _checked_residual(residual, x)
    return _call("centred_affine", x, *tables, residual, _checked_activation(activation))  # type: ignore[no-any-return]


@annotated
def domain_batch_norm(
    x: Tensor,
    domain: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    strict: bool = False,
    group: dist.ProcessGroup | None = None,
    num_domains: int | None = None,
) -> Tensor:
    """Batch normalisation in which every domain has its own statistics and, as an option, its own affine map.

        y[n, c] = weight[k, c] (x[n, c] - m_kc) / sqrt(v_kc + eps) + bias[k, c] + residual[n, c],   k = domain[n]

    With batch statistics m, v are mean and biased variance of all values of domain k in the batch; they and the
    unbiased variance then move the running statistics as in `torch.nn.functional.batch_norm`, but domain by domain: a
    domain without samples keeps its buffers to the last bit and has gradients of exactly zero.

    Args:
        x: [N, C, *], float32, float64, bfloat16 or float16; N may be 0.
        domain: [N] int64 or int32 ids 0..D-1 in any order. Where running statistics normalise, -1 marks samples of an
            unseen domain: statistics pooled over the domains (the mean of the means; the mean of the variances plus the
            variance of the means) and the means of `weight` and `bias`.
        running_mean, running_var: [D, C], updated in place with `training`; None: not tracked.
        weight, bias: [D, C], or [C] for all domains; None: 1 and 0.
        training: normalise by batch statistics, as also happens without running statistics.
        momentum: step of the running statistics; None: the average over all batches, counted by `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: [D] int64, counts for every domain the batches that held it.
        residual: of the shape of `x`, added before the activation; taken in the dtype of `x`.
        activation: None or "relu".
        strict: raise where a domain has one value per channel, as BatchNorm does. On CUDA the host then waits.
            Otherwise such a domain has variance 0 (unbiased: also 0), y = bias and no gradient in `x`.
        group: ranks whose samples are normalised together, such as `torch.distributed.group.WORLD`; every rank has to
            call this, N may be 0 there. One collective forward, one backward. None: this process alone.
        num_domains: D, needed where neither running statistics nor `weight`, `bias` [D, C] tell it.

    Returns:
        y of shape, dtype and layout of `x`. Differentiable in x, weight, bias and residual, twice but with `group`.

    Raises:
        ValueError: a shape, device or option does not fit; on the CPU also: an id outside its range (on CUDA that would
            make the host wait: samples of such an id are NaN there), or what `strict` refuses.
        TypeError: a tensor has the wrong dtype.

    Source: domain-specific batch norm (Chang et al., CVPR 2019); unseen domains and degenerate cases are our choice.
    """
    _check_x(x)
    D = _checked_tables_of_domains(x, running_mean, running_var, weight, bias, num_domains)
    domain = _checked_ids(domain, x)
    _check_tracking(num_batches_tracked, momentum, running_mean, D)
    residual = _checked_residual(residual, x)
    act = _checked_activation(activation)
    by_batch = training or running_mean is None
    if by_batch and (group is not None or _in_transform(x, weight, bias, residual)):
        y, mean, variance, count = _by_coefficients(
            x, domain, weight, bias, residual, D, eps, activation, strict, group
        )
    else:
        tables = (running_mean, running_var, weight, bias)
        y, mean, variance, count = _call(
            "domain_batch_norm", x, domain, *tables, residual, D, by_batch, eps, act, strict
        )
    if training and running_mean is not None:
        assert running_var is not None
        update_running_statistics(running_mean, running_var, num_batches_tracked, mean, variance, count, momentum)
    return y


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    momentum: float | None,
) -> None:
    """Moves running statistics [D, C] towards those of a batch, in place; domains of count 0 are left alone.

    Args:
        running_mean, running_var: [D, C].
        num_batches_tracked: [D] int64, first incremented; None: not counted.
        mean, variance: [D, C] float64 of the batch; the variance is biased, and multiplied by M / max(M - 1, 1) here.
        count: [D] int64, M.
        momentum: step; None: 1 / num_batches_tracked.

    Raises:
        ValueError: `momentum` is None without `num_batches_tracked`.
    """
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None needs num_batches_tracked")
    buffers = (running_mean, running_var, num_batches_tracked)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            _OPERATORS["update_running_statistics"](*buffers, mean, variance, count, momentum)
        return
    _below_autograd("update_running_statistics", *buffers, mean, variance, count, momentum)
    torch.autograd.graph.increment_version([buffer for buffer in buffers if buffer is not None])


@annotated
def normalize(
    x: Tensor,
    coefficients: Coefficients,
    *parameters: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Any normalisation whose scale and shift follow from instance moments, in two passes forward and two backward.

        g, q = instance_moments(x)
        A, B, *extras = coefficients(g, q, *parameters)
        y = act(A (x - g) + B + residual)

    Args:
        x: [N, C, *], float32, float64, bfloat16 or float16.
        coefficients: a function of g, q [N, C] and `parameters` in differentiable torch operations, whose first results
            are A and B [N, C]; further ones (batch statistics, say) are handed back. What it captures from outside
            counts as constant: tensors that need a gradient have to be `parameters`.
        parameters: tensors, with or without gradient, or None.
        residual, activation: as in `centred_affine`.

    Returns:
        y of shape, dtype and layout of `x`, differentiable twice in x, parameters and residual; and the extras,
        detached.

    Raises:
        ValueError: a shape or `activation` does not fit, or `coefficients` returns fewer than two tensors.
        TypeError: `x` is no tensor of these dtypes.
    """
    _check_x(x)
    residual = _checked_residual(residual, x)
    _checked_activation(activation)
    if torch.compiler.is_compiling() or _in_transform(x, residual, *parameters):
        return _normalize_by_operators(x, coefficients, parameters, residual, activation)
    y, *extras = _Normalize.apply(x, residual, coefficients, activation, *parameters)  # type: ignore[no-untyped-call]
    return y, tuple(extras)


# ------------------------------------------------------------------------------------------------ arguments


def _check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}; convert it first")
    if x.dim() < 2:
        raise ValueError(f"x must be [N, C, *], not {list(x.shape)}")


def _check_real(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")


def _checked_table(name: str, table: Tensor, x: Tensor) -> Tensor:
    """table [N, C] in the dtype of statistics."""
    _check_real(name, table, x)
    if table.shape != x.shape[:2]:
        raise ValueError(f"{name} must be {list(x.shape[:2])} beside x {list(x.shape)}, not {list(table.shape)}")
    return table.to(_statistics_dtype(x))


def _checked_residual(residual: Tensor | None, x: Tensor) -> Tensor | None:
    if residual is None:
        return None
    _check_real("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, not {list(residual.shape)}")
    return residual if residual.dtype == x.dtype else residual.to(x.dtype)


def _checked_activation(activation: str | None) -> str:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None or 'relu', not {activation!r}")
    return activation or "none"


def _checked_ids(domain: Tensor, x: Tensor) -> Tensor:
    """domain [N] in int64."""
    if not isinstance(domain, Tensor):
        raise TypeError(f"domain must be a torch.Tensor, not {type(domain).__name__}")
    if domain.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"domain must be int64 or int32, not {domain.dtype}")
    if domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [{x.shape[0]}], one id for each sample of x, not {list(domain.shape)}")
    if domain.device != x.device:
        raise ValueError(f"domain is on {domain.device}, but x is on {x.device}")
    return domain if domain.dtype == torch.int64 else domain.long()


def _checked_tables_of_domains(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_domains: int | None,
) -> int:
    """D, on which all tables agree."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if weight is not None and bias is not None and weight.dim() != bias.dim():
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} must both be [D, C] or both [C]")
    tables = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    C, D = x.shape[1], num_domains
    for name, table in tables.items():
        if table is None:
            continue
        _check_real(name, table, x)
        of_domains = table.dim() == 2 and table.shape[1] == C and table.shape[0] == (table.shape[0] if D is None else D)
        shared = table.dim() == 1 and table.shape[0] == C and name in ("weight", "bias")
        if not of_domains and not shared:
            or_shared = f" or [{C}]" if name in ("weight", "bias") else ""
            expected = "D" if D is None else D
            raise ValueError(
                f"{name} must be [{expected}, {C}]{or_shared} beside x {list(x.shape)}, not {list(table.shape)}"
            )
        D = table.shape[0] if of_domains else D
    if D is None:
        raise ValueError("num_domains is needed: neither running statistics nor weight and bias [D, C] tell it")
    if D < 1:
        raise ValueError(f"the number of domains must be at least 1, not {D}")
    return D


def _check_tracking(tracked: Tensor | None, momentum: float | None, running_mean: Tensor | None, D: int) -> None:
    if tracked is not None and (tracked.shape != (D,) or tracked.dtype != torch.int64):
        raise ValueError(f"num_batches_tracked must be int64 [{D}], not {tracked.dtype} {list(tracked.shape)}")
    if momentum is None and tracked is None and running_mean is not None:
        raise ValueError("momentum=None needs num_batches_tracked")


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ calls


def _in_transform(*tensors: Tensor | None) -> bool:
    """Inside a transform of torch.func that is not being compiled."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _call(name: str, *args: Any) -> Any:
    """The operator by the shortest way: in eager mode past its autograd rule, which would double a small call."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.neuraldeps, name).default(*args)
    if _in_transform(*(arg if isinstance(arg, Tensor) else None for arg in args)):
        return _FUNCTIONS[name].apply(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _EAGER_FUNCTIONS[name].apply(*args)
    return _below_autograd(name, *args)


def _below_autograd(name: str, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _OPERATORS[name](*args)


def _values_per_row(x: Tensor) -> int:
    """HW: values of one sample and channel."""
    return math.prod(x.shape[2:])


def _kernel(name: str) -> Any:
    """What computes a gradient: the operator, or, where it will itself be differentiated, the reference."""
    return getattr(reference, name) if torch.is_grad_enabled() else _OPERATORS[name]


# ------------------------------------------------------------------------------------------------ any coefficients


def _normalize_by_operators(
    x: Tensor,
    coefficients: Coefficients,
    parameters: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    g, q = instance_moments(x)
    A, B, *extras = _checked_coefficients(coefficients(g, q, *parameters))
    y = centred_affine(x, g, A, B, residual=residual, activation=activation)
    return y, tuple(extra.detach() for extra in extras)


def _checked_coefficients(found: Any) -> tuple[Tensor, ...]:
    if not isinstance(found, tuple | list) or len(found) < 2:
        raise ValueError(f"coefficients must return at least A and B, not {type(found).__name__}")
    return tuple(found)


class _Normalize(torch.autograd.Function):
    """y and extras, with the graph of the coefficients kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        coefficients: Coefficients,
        activation: str | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        g, q = torch.ops.neuraldeps.instance_moments(x)
        leaves = [_leaf(g, ctx.needs_input_grad[0]), _leaf(q, ctx.needs_input_grad[0])]
        leaves += [_leaf(p, needed) for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True)]
        with torch.enable_grad():
            A, B, *extras = _checked_coefficients(coefficients(*leaves))
        scale, shift = (_checked_table(name, t, x).detach() for name, t in (("A", A), ("B", B)))
        act = _checked_activation(activation)
        y: Tensor = torch.ops.neuraldeps.centred_affine(x, g, scale, shift, residual, act)
        extras = [extra.detach() for extra in extras]
        ctx.mark_non_differentiable(*extras)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, residual, y if act == "relu" else None, *parameters)
        ctx.g, ctx.scale, ctx.leaves, ctx.graph = g, scale, leaves, (A, B)
        ctx.coefficients, ctx.activation = coefficients, activation
        return y, *extras

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, residual, y, *parameters = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(parameters))
        if torch.is_grad_enabled():
            return _Normalize._differentiable(ctx, grad, x, residual, parameters)
        ops = torch.ops.neuraldeps
        S1, S2 = ops.centred_affine_sums(grad, x, ctx.g, y)
        dg, dq, *dparameters = _gradients(ctx.graph, ctx.leaves, (S2, S1))
        dx = dresidual = None
        needs_x, needs_residual = ctx.needs_input_grad[:2]
        if needs_x or (needs_residual and y is not None):
            over = 1 / max(_values_per_row(x), 1)
            offset = (-ctx.scale * S1 if dg is None else torch.addcmul(dg, ctx.scale, S1, value=-1)) * over
            slope = torch.zeros_like(ctx.g) if dq is None else dq * (2 * over)
            dx, dresidual = ops.centred_affine_input_grad(
                grad, x, ctx.g, ctx.scale, offset, slope, y, needs_residual and y is not None
            )
        if needs_residual and y is None:
            dresidual = grad
        return dx if needs_x else None, dresidual if needs_residual else None, None, None, *dparameters

    @staticmethod
    def _differentiable(
        ctx: Any, grad: Tensor, x: Tensor, residual: Tensor | None, parameters: list[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        again, _ = _normalize_by_operators(x, ctx.coefficients, tuple(parameters), residual, ctx.activation)
        dx, dresidual, *dparameters = _gradients((again,), [x, residual, *parameters], (grad,), create_graph=True)
        return dx, dresidual, None, None, *dparameters


def _leaf(tensor: Tensor | None, needs_gradient: bool) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(needs_gradient)


def _gradients(
    outputs: tuple[Tensor, ...], inputs: list[Tensor | None], grads: tuple[Tensor, ...], create_graph: bool = False
) -> list[Tensor | None]:
    """Gradient of every input, None of one that needs none or does not matter; the graph stays."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    tracked = [
        (output, grad.to(output.dtype)) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad
    ]
    if not wanted or not tracked:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in tracked],
            wanted,
            [grad for _, grad in tracked],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


# ------------------------------------------------------------------------------------------------ domains over ranks


def _by_coefficients(
    x: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    D: int,
    eps: float,
    activation: str | None,
    strict: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`domain_batch_norm` by batch statistics as a case of `normalize`: over ranks, and in transforms of torch.func."""
    _check_ids_in_range(domain, D)
    values = _values_per_row(x)

    def coefficients(
        g: Tensor, q: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        wide_g = g.double()
        mean, variance, count = reference.merged_moments(wide_g, q.double(), domain, D, values)
        if group is not None:
            mean, variance, count = MergeOverRanks.apply(mean, variance, count, group)  # type: ignore[no-untyped-call]
        if strict and bool((count == 1).any()):
            raise ValueError(reference.single_value_message(count))
        index = domain.clamp(0, D - 1)
        scale = (reference.affine_rows(weight, mean, 1.0)[:-1] * (variance + eps).rsqrt())[index]
        shift = reference.affine_rows(bias, mean, 0.0)[:-1][index] + scale * (wide_g - mean[index])
        shift = torch.where(((domain < 0) | (domain >= D))[:, None], torch.nan, shift)
        return scale.to(g.dtype), shift.to(g.dtype), mean, variance, count

    y, (mean, variance, count) = normalize(x, coefficients, weight, bias, residual=residual, activation=activation)
    return y, mean, variance, count


def _check_ids_in_range(domain: Tensor, D: int) -> None:
    if domain.device.type != "cpu" or torch.compiler.is_compiling() or _in_transform(domain) or domain.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(domain))
    if low < 0 or high >= D:
        raise ValueError(f"domain must hold ids in 0..{D - 1}, not {low if low < 0 else high}")


class MergeOverRanks(torch.autograd.Function):
    """Mean, biased variance [D, C] and count [D] over the ranks of `group`, by Chan's formula in the order of ranks."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, count: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        C = mean.shape[1]
        own = torch.cat([count[:, None].to(mean.dtype), mean, variance], 1)  # [D, 1 + 2 C]
        table = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(table.unbind()), own, group=group)
        counts, means, variances = table.split([1, C, C], 2)
        total = counts.sum(0)  # [D, 1]
        share = counts / total.clamp(min=1)
        merged = (share * means).sum(0)
        merged_variance = (share * (variances + (means - merged).square())).sum(0)
        ctx.group = group
        ctx.save_for_backward(count[:, None] / total.clamp(min=1), mean - merged)
        merged_count = total[:, 0].to(count.dtype)
        ctx.mark_non_differentiable(merged_count)
        return merged, merged_variance, merged_count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
        share, shift = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_variance])
        dist.all_reduce(grads, group=ctx.group)
        return share * (grads[0] + 2 * shift * grads[1]), share * grads[1], None, None


# ------------------------------------------------------------------------------------------------ operator rules


def _backward_of_moments(ctx: Any, grad_mean: Tensor | None, grad_moment: Tensor | None) -> Tensor:
    x, g = ctx.saved_tensors
    over = 1 / max(_values_per_row(x), 1)
    offset = torch.zeros_like(g) if grad_mean is None else grad_mean * over
    slope = torch.zeros_like(g) if grad_moment is None else grad_moment * (2 * over)
    return _kernel("centred_affine_input_grad")(None, x, g, None, offset, slope, None, False)[0]  # type: ignore[no-any-return]


def _save_for_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0])


def _backward_of_affine(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, mean, scale, y = ctx.saved_tensors
    needs_x, needs_mean, needs_scale, needs_shift, needs_residual, _ = ctx.needs_input_grad
    dx = dresidual = dmean = S1 = S2 = None
    if needs_mean or needs_scale or needs_shift:
        S1, S2 = _kernel("centred_affine_sums")(grad, x, mean, y)
        dmean = -scale * S1
    if needs_x or (needs_residual and y is not None):
        zero = torch.zeros_like(mean)
        dx, dresidual = _kernel("centred_affine_input_grad")(
            grad, x, mean, scale, zero, zero, y, needs_residual and y is not None
        )
    if needs_residual and y is None:
        dresidual = grad
    found = (dx, dmean, S2, S1, dresidual)
    return *(d if needed else None for d, needed in zip(found, ctx.needs_input_grad, strict=False)), None


def _save_for_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, scale, _shift, _residual, activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, scale, output if activation == "relu" else None)


def _backward_of_domains(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    x, domain, weight, mean, variance, count, y = ctx.saved_tensors
    needs_residual = ctx.needs_input_grad[6]
    if torch.is_grad_enabled() and ctx.training:
        mean, variance, count = reference.domain_statistics(x, domain, mean.shape[0])
    backward = _kernel("domain_batch_norm_backward")
    tensors, masked_residual = (grad, x, domain, weight, mean, variance, count, y), needs_residual and y is not None
    dx, dweight, dbias, dresidual = backward(*tensors, ctx.training, ctx.eps, ctx.shared_affine, masked_residual)
    if needs_residual and y is None:
        dresidual = grad
    found = {0: dx, 4: _in_dtype(dweight, ctx.weight_dtype), 5: _in_dtype(dbias, ctx.bias_dtype), 6: dresidual}
    return tuple(found.get(i) if needed else None for i, needed in enumerate(ctx.needs_input_grad))


def _in_dtype(gradient: Tensor, dtype: torch.dtype | None) -> Tensor:
    return gradient if dtype is None or gradient.dtype == dtype else gradient.to(dtype)


def _save_for_domains(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, domain, _, _, weight, bias, _, _, ctx.training, ctx.eps, activation, _ = inputs
    y, mean, variance, count = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, variance, count)
    ctx.shared_affine = any(p is not None and p.dim() == 1 for p in (weight, bias))
    ctx.weight_dtype, ctx.bias_dtype = (None if p is None else p.dtype for p in (weight, bias))
    ctx.save_for_backward(x, domain, weight, mean, variance, count, y if activation == "relu" else None)


def _table_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=_statistics_dtype(x))


def _fake_affine(x: Tensor, *_: Any) -> Tensor:
    return result_like(x)


def _fake_sums(grad: Tensor, x: Tensor, mean: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return _table_like(x), _table_like(x)


def _fake_input_grad(grad: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return result_like(x), result_like(x) if rest[-1] and grad is not None else x.new_empty(0)


def _fake_domains(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = args[6]
    statistics = (x.new_empty((D, x.shape[1]), dtype=torch.float64) for _ in range(2))
    return result_like(x), *statistics, x.new_empty((D,), dtype=torch.int64)  # type: ignore[return-value]


def _fake_domains_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, (shared_affine, residual) = args[2], args[-2:]
    shape = mean.shape[1:] if shared_affine else mean.shape
    gradients = (x.new_empty(shape, dtype=_statistics_dtype(x)) for _ in range(2))
    return result_like(x), *gradients, result_like(x) if residual else x.new_empty(0)  # type: ignore[return-value]


def _fold_samples(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap rule: the new dimension joins N."""

    def folded(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        batched = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return batched.flatten(0, 1)

    def unfolded(result: Tensor) -> Tensor:
        if result.dim() == 1:  # a result that was not asked for
            return result.expand(info.batch_size, 0)
        return result.reshape(info.batch_size, result.shape[0] // max(info.batch_size, 1), *result.shape[1:])

    results = op(*map(folded, args, in_dims))
    if isinstance(results, Tensor):
        return unfolded(results), 0
    return tuple(map(unfolded, results)), (0,) * len(results)


def _on_cuda(name: str) -> Any:
    """The Triton kernel of that name; the reference where triton is not installed."""
    plain = getattr(reference, name)

    @functools.wraps(plain)
    def run(*args: Any) -> Any:
        try:
            from neuraldeps_kernels.triton import domain_norm as kernels
        except ImportError as error:
            _log.debug("%s runs on the plain PyTorch reference: %s", name, error)
            return plain(*args)
        return getattr(kernels, name)(*args)

    return run


_FAKES: dict[str, Any] = {
    "instance_moments": lambda x: (_table_like(x), _table_like(x)),
    "centred_affine": _fake_affine,
    "centred_affine_sums": _fake_sums,
    "centred_affine_input_grad": _fake_input_grad,
    "domain_batch_norm": _fake_domains,
    "domain_batch_norm_backward": _fake_domains_backward,
    "update_running_statistics": lambda *_: None,
}
_DIFFERENTIABLE: dict[str, tuple[Any, Any]] = {
    "instance_moments": (_backward_of_moments, _save_for_moments),
    "centred_affine": (_backward_of_affine, _save_for_affine),
    "domain_batch_norm": (_backward_of_domains, _save_for_domains),
}
_FOLDED = ("instance_moments", "centred_affine", "centred_affine_sums", "centred_affine_input_grad")


def _function(name: str) -> Any:
    """autograd.Function of the operator, for transforms of torch.func."""
    backward, setup_context = _DIFFERENTIABLE[name]
    rules = {"forward": _OPERATORS[name], "setup_context": setup_context, "backward": backward}
    if name in _FOLDED:
        rules["vmap"] = functools.partial(_fold_samples, lambda *args: _FUNCTIONS[name].apply(*args))
    return type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})


def _eager_function(name: str) -> Any:
    """The same without transforms."""
    backward, setup_context = _DIFFERENTIABLE[name]

    def forward(ctx: Any, *args: Any) -> Any:
        output = _below_autograd(name, *args)
        setup_context(ctx, args, output)
        return output

    rules = {"forward": forward, "backward": backward}
    return type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})


_OPERATORS = {name: getattr(torch.ops.neuraldeps, name).default for name in _FAKES}
_FUNCTIONS = {name: _function(name) for name in _DIFFERENTIABLE}
_EAGER_FUNCTIONS = {name: _eager_function(name) for name in _DIFFERENTIABLE}

_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


def _register() -> None:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"neuraldeps::{name}", fake)
        _library.impl(name, _on_cuda(name), "CUDA")
    for name, (backward, setup_context) in _DIFFERENTIABLE.items():
        torch.library.register_autograd(f"neuraldeps::{name}", backward, setup_context=setup_context)
    for name in _FOLDED:
        op = getattr(torch.ops.neuraldeps, name).default
        torch.library.register_vmap(f"neuraldeps::{name}", functools.partial(_fold_samples, op))


_register()
