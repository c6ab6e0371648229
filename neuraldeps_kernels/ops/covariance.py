"""Covariance of many rows: one-shot, batched, weighted, streaming and over processes, never as E[x^2] - E[x]^2.

    W = sum_r w_r,   mean = sum_r w_r x_r / W,   moment = sum_r w_r (x_r - mean) (x_r - mean)',
    S = moment / (W - correction)

One operator, `torch.ops.neuraldeps.centered_moments`, computes W, mean and moment in float64 from rows of any floating
dtype (CPU: csrc/cpu/covariance.cpp; CUDA: triton/covariance.py). Everything else is small float64 arithmetic on them.
Source: our choice; the merge of two sets of moments is that of Chan, Golub and LeVeque.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import covariance as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OUTPUT_DTYPES = (torch.float32, torch.float64)

Moments = tuple[Tensor, Tensor, Tensor]  # W [B], mean [B, n], moment [B, n, n], all float64


@annotated
def covariance(
    x: Tensor,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Covariance matrix of the columns of `x`, exactly symmetric.

    Args:
        x: [N, n] or [B, N, n], N rows of n variables; float32, float64, bfloat16 or float16. 16-bit and float32 rows
            are multiplied in float32 after a shift towards the mean and summed in float64, so a common offset costs no
            accuracy; float64 is float64 throughout.
        center: subtract the mean. Without it the result is the second moment `sum_r w_r x_r x_r' / (W - correction)`.
        correction: subtracted from the number of rows (from the sum of weights) in the divisor: 0 divides by N, 1 by
            N - 1.
        weights: [N] or [B, N], finite and not negative, of any real dtype: how often each row counts. A row of weight 0
            is not read, so it may hold NaN. With float32 and 16-bit `x` the square roots of the weights have to lie in
            the range of float32.
        dtype: of the result, float64 or float32.

    Returns:
        [n, n] or [B, n, n], differentiable in `x` and `weights`.

    Raises:
        ValueError: a shape does not fit; N is 0 or not above `correction`; a weight is negative or not finite; the sum
            of weights is not above `correction`; `x` holds NaN, infinity or values whose squares overflow. What depends
            on values is checked on the CPU only, as on CUDA it would make the host wait: there NaN in `x`, a negative
            weight and an empty sum give NaN. Under `torch.compile` and `torch.func` an empty sum gives NaN as well.
        TypeError: `x`, `weights` or `dtype` has the wrong type.
    """
    _check_rows(x)
    _check_dtype(dtype)
    if x.shape[-2] == 0:
        raise ValueError(f"x must have at least one row, not shape {list(x.shape)}")
    weights64 = None if weights is None else _checked_weights(weights, x)
    if weights64 is None and x.shape[-2] <= correction:
        raise ValueError(f"correction must be below the {x.shape[-2]} rows of x, not {correction}")
    moments = centered_moments(x if x.dim() == 3 else x[None], weights64)
    if weights64 is not None:
        _check_weight_sum(moments[0], correction)
    result = _normalised(moments, center, correction).to(dtype)
    return result if x.dim() == 3 else result[0]


class CovarianceAccumulator:
    """Covariance of rows that arrive in chunks, on one device or spread over processes.

    State: sum of weights, mean and centred moment, float64 on `device`. Every chunk is centred on its own mean and
    merged in float64, so order and size of the chunks matter for rounding only. A merge touches n^2 values, which
    chunks of some thousand rows hide.

    Args:
        n: columns of every chunk.
        center: as in `covariance`.
        dtype: of what `compute` and `mean` return, float64 or float32.
        device: of the state and of every chunk; default the current default device.

    Raises:
        ValueError: n is not positive.
        TypeError: `dtype` is neither float64 nor float32.
    """

    def __init__(
        self,
        n: int,
        *,
        center: bool = True,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        _check_dtype(dtype)
        self.n, self.center, self.dtype = n, center, dtype
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(n, dtype=torch.float64, device=device)
        self._moment = torch.zeros(n, n, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @property
    def count(self) -> Tensor:
        """Rows seen (sum of their weights): [] float64."""
        return self._count.clone()

    @property
    def mean(self) -> Tensor:
        """Mean of the rows: [n] in `dtype`; zero before the first row."""
        return self._mean.to(self.dtype, copy=True)

    @torch.no_grad()
    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows `x` [N, n] with `weights` [N]; N may be 0. Nothing is kept of a chunk that raises.

        Raises:
            ValueError, TypeError: as `covariance`; also if `x` has not n columns or lies on another device.
        """
        _check_rows(x)
        if x.dim() != 2 or x.shape[1] != self.n:
            raise ValueError(f"x must be [N, {self.n}], not {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, but the accumulator is on {self.device}")
        weights64 = None if weights is None else _checked_weights(weights, x)
        count, mean, moment = centered_moments(x[None], weights64)
        self._merge(count[0], mean[0], moment[0])

    @torch.no_grad()
    def merge(self, other: CovarianceAccumulator) -> None:
        """Adds all rows of `other`, which stays as it is and may live on another device.

        Raises:
            ValueError: `other` has another n or center.
        """
        self._check_compatible("other", other.n, other.center)
        self._merge(*(state.to(self.device) for state in (other._count, other._mean, other._moment)))

    def _merge(self, count: Tensor, mean: Tensor, moment: Tensor) -> None:
        """M += M' + d d' c c' / (c + c') with d = mean' - mean."""
        total = self._count + count
        share = torch.where(total > 0, count / total, 0.0)
        delta = mean - self._mean
        self._moment += moment
        self._moment.addr_(delta * (self._count * share), delta)
        self._mean += delta * share
        self._count = total

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the rows of all processes of `group` (default: all); afterwards every process holds the same state.

        Two sums are exchanged: [count, count * mean], which gives the common mean, and then the moments about it.
        Every process has to call this, also one without rows.

        Raises:
            RuntimeError: `torch.distributed` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group first")
        sums = torch.cat([self._count[None], self._count * self._mean])
        dist.all_reduce(sums, group=group)
        count, total = sums[0], sums[1:]
        mean = torch.where(count > 0, total / count, 0.0)
        delta = self._mean - mean
        moment = torch.addr(self._moment, delta * self._count, delta)
        dist.all_reduce(moment, group=group)
        self._count, self._mean, self._moment = count, mean, moment

    def compute(self, correction: float = 0) -> Tensor:
        """The covariance of all rows so far: [n, n] in `dtype`.

        Raises:
            ValueError: the sum of weights is not above `correction` (checked on the CPU only; NaN on CUDA).
        """
        _check_weight_sum(self._count, correction, what="the count of rows")
        state = (self._count[None], self._mean[None], self._moment[None])
        return _normalised(state, self.center, correction)[0].to(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """`count` [], `mean` [n] and `moment` [n, n], float64, and the flag `center`."""
        tensors = {"count": self._count, "mean": self._mean, "moment": self._moment}
        return {**{name: tensor.clone() for name, tensor in tensors.items()}, "center": self.center}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the state by that of `state_dict`.

        Raises:
            ValueError: a key is missing or unknown, a shape does not fit n, or `center` differs.
        """
        shapes: dict[str, tuple[int, ...]] = {"count": (), "mean": (self.n,), "moment": (self.n, self.n)}
        if set(state) != {*shapes, "center"}:
            raise ValueError(f"state must have the keys {[*shapes, 'center']}, not {sorted(state)}")
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(f"state[{name!r}] must be {list(shape)}, not {list(state[name].shape)}")
        self._check_compatible("state", self.n, state["center"])
        loaded = [state[name].to(device=self.device, dtype=torch.float64, copy=True) for name in shapes]
        self._count, self._mean, self._moment = loaded

    def _check_compatible(self, name: str, n: int, center: bool) -> None:
        if (n, center) != (self.n, self.center):
            raise ValueError(f"{name} has n={n}, center={center}, but the accumulator n={self.n}, center={self.center}")


def centered_moments(x: Tensor, weights: Tensor | None = None) -> Moments:
    """`torch.ops.neuraldeps.centered_moments` with a gradient that `torch.func` transforms understand.

    Args:
        x: [B, N, n] float32, float64, bfloat16 or float16.
        weights: [B, N] float64, finite and not negative; None: ones.

    Returns:
        W [B], mean [B, n], moment [B, n, n], float64; all zero where W is zero.

    Raises:
        ValueError: on the CPU, a weight is negative or not finite, or a column has no finite variance.
    """
    return _CenteredMoments.apply(x, weights)  # type: ignore[no-any-return, no-untyped-call]


def _normalised(moments: Moments, center: bool, correction: float) -> Tensor:
    """S [B, n, n] float64."""
    weight_sum, mean, moment = moments
    if not center:
        moment = moment + weight_sum[:, None, None] * mean[:, :, None] * mean[:, None, :]
    divisor = weight_sum - correction
    return moment / torch.where(divisor > 0, divisor, torch.nan)[:, None, None]


# ------------------------------------------------------------------------------------------------ argument checks


def _check_rows(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}; convert it first")
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"x must be [N, n] or [B, N, n] with n >= 1, not {list(x.shape)}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"dtype must be torch.float64 or torch.float32, not {dtype}")


def _checked_weights(weights: Tensor, x: Tensor) -> Tensor:
    """weights as float64 [B, N]."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor, not {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"weights must be real, not {weights.dtype}")
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"weights must be {list(x.shape[:-1])}, one for each row of x, not {list(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"weights is on {weights.device}, but x is on {x.device}")
    weights = weights.to(torch.float64)
    return weights if x.dim() == 3 else weights[None]


def _check_weight_sum(weight_sum: Tensor, correction: float, what: str = "the sum of weights") -> None:
    if not _has_values(weight_sum):
        return
    smallest = float(weight_sum.detach().min()) if weight_sum.numel() else float("inf")
    if smallest <= correction:
        raise ValueError(f"{what} is {smallest:g}; it must be above correction = {correction}")


def _has_values(x: Tensor) -> bool:
    """Values may be read without making a device wait, breaking a graph or leaving a transform."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not isinstance(x, torch._subclasses.FakeTensor)
    )


# ------------------------------------------------------------------------------------------------ operator rules


def _fake_moments(x: Tensor, weights: Tensor | None) -> Moments:
    B, _N, n = x.shape
    return (
        x.new_empty((B,), dtype=torch.float64),
        x.new_empty((B, n), dtype=torch.float64),
        x.new_empty((B, n, n), dtype=torch.float64),
    )


def _centered_moments_on_cuda(x: Tensor, weights: Tensor | None) -> Moments:
    try:
        from neuraldeps_kernels.triton import covariance as kernels
    except ImportError as error:
        _log.debug("covariance runs on the plain PyTorch reference: %s", error)
        return reference.centered_moments(x, weights)
    return kernels.centered_moments(x, weights)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Moments) -> None:
    weight_sum, mean, _ = output
    ctx.save_for_backward(*inputs, weight_sum, mean)


def _gradient(
    ctx: Any, grad_sum: Tensor | None, grad_mean: Tensor | None, grad_moment: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """With y_r = x_r - mean, which sums to zero under the weights, and G, g, s the gradients of moment, mean and W:

    dL/dx_r = w_r ((G + G') y_r + g / W)        dL/dw_r = y_r' G y_r + g' y_r / W + s

    in float64 for float64 x, else in float32.
    """
    x, weights, weight_sum, mean = ctx.saved_tensors
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = (x - mean[:, None]).to(dtype) if x.dtype != torch.float64 else x - mean[:, None]
        if weights is not None:  # rows that may not be read count as rows at the mean
            unread = (weights == 0) & ~y.isfinite().all(-1)
            y = torch.where(unread[..., None], 0.0, y)
        pull = torch.zeros_like(y)  # [B, N, n]: dL/dx_r / w_r
        spread = pull
        if grad_moment is not None:
            spread = y @ (grad_moment + grad_moment.mT).to(dtype)
            pull = spread
        if grad_mean is not None:
            over_sum = torch.where(weight_sum > 0, 1 / weight_sum, 0.0)[:, None]
            pull = pull + (over_sum * grad_mean).to(dtype)[:, None]
        grad_x = pull if weights is None else pull * weights[..., None].to(dtype)
        if weights is None or not ctx.needs_input_grad[1]:
            return grad_x.to(x.dtype), None
        # y' G y is half of y' (G + G') y
        grad_weights = ((pull - 0.5 * spread) * y).sum(-1).double()
        if grad_sum is not None:
            grad_weights = grad_weights + grad_sum[:, None]
        return grad_x.to(x.dtype), grad_weights


def _fold_batch(
    op: Any, info: Any, in_dims: tuple[int | None, ...], x: Tensor, weights: Tensor | None
) -> tuple[Any, Any]:
    """vmap rule: the new dimension joins the batch."""

    def folded(tensor: Tensor, dim: int | None) -> Tensor:
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batched.flatten(0, 1)

    outputs = op(folded(x, in_dims[0]), None if weights is None else folded(weights, in_dims[1]))
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0, 0)


class _CenteredMoments(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weights: Tensor | None) -> Moments:
        return torch.ops.neuraldeps.centered_moments(x, weights)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _fold_batch(_CenteredMoments.apply, info, in_dims, *args)


def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    return _fold_batch(torch.ops.neuraldeps.centered_moments, info, in_dims, *args)


_library = torch.library.Library("neuraldeps", "IMPL")  # the registration lives as long as this object
_library.impl("centered_moments", _centered_moments_on_cuda, "CUDA")
torch.library.register_fake("neuraldeps::centered_moments", _fake_moments)
torch.library.register_autograd("neuraldeps::centered_moments", _gradient, setup_context=_setup_context)
torch.library.register_vmap("neuraldeps::centered_moments", _vmap_rule)
