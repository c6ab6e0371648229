"""The Fourier filter layer: a learned multiplication in the frequency domain, per channel or per block of channels.

    y = irfft2(rfft2(x) K),    x, y [B, H, W, C] ("NHWC") or [B, C, H, W] ("NCHW"),    K [H, Wf, C],  Wf = W//2 + 1

or, with G blocks K_io of D = C / G channels, Y_o = sum_i X_i K_io, K [H, Wf, G, D, D].

Operators, of the real view of K (weight [..., 2]), which has no complex number at its boundary:

- `torch.ops.neuraldeps.fourier_filter2d(x, weight, layout, norm) -> y`: csrc/torch/fourier_filter.cpp; on the CPU
  csrc/cpu/fourier_filter.cpp and, for products of blocks, fourier_filter_blocks.cpp; on CUDA
  csrc/cuda/fourier_filter.cu for the grids it lists and triton/fourier_filter.py for other sizes up to 128, else (and
  for blocks) the reference.
- `.fourier_filter2d_backward(grad, x, weight, layout, norm) -> (dx, dweight)`. Either is linear in each of its tensors
  and the gradients of both are made of both, so that every order of derivative exists.

Source: the layer of GFNet and FAMLP (arXiv 2203.12893); the method is ours.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import fourier_filter as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LONGEST_PRODUCT = 128  # points of a line that triton/fourier_filter.py transforms
LAYOUTS = ("NHWC", "NCHW")
NORMS = ("ortho", "backward", "forward")


@annotated
def fourier_filter2d(x: Tensor, weight: Tensor, *, layout: str = "NHWC", norm: str = "ortho") -> Tensor:
    """y = irfft2(rfft2(x) K): a circular convolution with one real kernel irfft2(K) per channel, over the whole image.

    Args:
        x: [B, H, W, C], or [B, C, H, W] with layout "NCHW"; float32, float64, bfloat16 or float16; any B >= 0 and
            H, W, C >= 1. Contiguous and channels-last memory are taken as they are, other strides cost a copy.
        weight: K [H, W//2+1, C] complex, or its real view [H, W//2+1, C, 2]; or G dense blocks
            [H, W//2+1, G, C/G, C/G], from input to output channel, or their real view [..., 2]. It is used in float64
            for float64 `x`, else in float32.
        layout: order of the dimensions of `x` and of the result.
        norm: "ortho", "backward" or "forward", that of the two transforms. They undo each other's factors, so y is the
            same for all three.

    Returns:
        y in the shape, dtype and memory format of `x`. Transforms and products are in float64 for float64 `x`, else in
        float32. Only the Hermitian-consistent part of K counts, on every device: in columns 0 and W/2 (even W) that is
        (K[u] + conj K[-u]) / 2. A plane (image and channel, or all channels of a block) with NaN or infinity has NaN,
        and no other plane. Differentiable any number of times, in `x` and `weight`. On the CPU y is the same to the
        last bit for any number of threads and any batch around an image; gradients of `weight` for any number of
        threads.

    Raises:
        ValueError: wrong dimensions or sizes, unknown `layout` or `norm`, tensors on different devices.
        TypeError: `x` or `weight` is no tensor, or has none of these dtypes.

    Source: the layer of GFNet and FAMLP; method of csrc/cpu/fourier_filter.cpp and fourier_filter_blocks.cpp (ours).
    """
    _check(x, weight, layout, norm)
    real = torch.view_as_real(weight) if weight.is_complex() else weight
    real = real.to(_weight_dtype(x))
    return _filter(x, real, layout, norm)


# ------------------------------------------------------------------------------------------------ arguments


def _check(x: Tensor, weight: Tensor, layout: str, norm: str) -> None:
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "NHWC" or "NCHW", not {layout!r}')
    if norm not in NORMS:
        raise ValueError(f'norm must be "ortho", "backward" or "forward", not {norm!r}')
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}; convert it first")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"weight must be complex or floating-point, not {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x and weight must be on one device, not on {x.device} and {weight.device}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        order = "[B, H, W, C]" if layout == "NHWC" else "[B, C, H, W]"
        raise ValueError(f"x must be {order} with no dimension but B empty, not {list(x.shape)}")
    H, W, C = _sizes(x, layout)
    shape = list(weight.shape) + [2] * weight.is_complex()
    blocks = shape[2:5]
    in_blocks = len(shape) == 6 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == C
    if shape[:2] != [H, W // 2 + 1] or shape[-1] != 2 or not (shape[2:-1] == [C] or in_blocks):
        raise ValueError(
            f"weight must be [{H}, {W // 2 + 1}, {C}] complex or [{H}, {W // 2 + 1}, {C}, 2] real, or blocks "
            f"[{H}, {W // 2 + 1}, G, {C}/G, {C}/G] of either, for x {list(x.shape)} ({layout}), "
            f"not {weight.dtype} {list(weight.shape)}"
        )


def _sizes(x: Tensor, layout: str) -> tuple[int, int, int]:
    """H, W, C."""
    if layout == "NHWC":
        return x.shape[1], x.shape[2], x.shape[3]
    return x.shape[2], x.shape[3], x.shape[1]


def _weight_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------------------------------ operator rules


def _filter(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
    """F(x, K)."""
    if _in_functorch(x, weight):
        return _FourierFilter.apply(x, weight, layout, norm)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.neuraldeps.fourier_filter2d(x, weight, layout, norm)  # type: ignore[no-any-return]


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
    """F(grad, K*) and D(x, grad), where <F(x, K), grad> = <x, F(grad, K*)> = <K, D(x, grad)>."""
    if _in_functorch(grad, x, weight):
        return _Gradients.apply(grad, x, weight, layout, norm)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.neuraldeps.fourier_filter2d_backward(grad, x, weight, layout, norm)  # type: ignore[no-any-return]


def _in_functorch(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func runs, which sees autograd.Function but not the rules of an operator."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _sum(terms: Sequence[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, terms) if terms else None


class _Rules(torch.autograd.Function):
    """What the two operators share; their last two arguments are layout and norm, the others tensors."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-2])
        ctx.save_for_forward(*inputs[:-2])
        ctx.options = inputs[-2:]
        ctx.set_materialize_grads(False)


class _FourierFilter(_Rules):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
        return torch.ops.neuraldeps.fourier_filter2d(x, weight, layout, norm)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        if not ctx.needs_input_grad[1]:
            return _filter(grad, reference.adjoint(weight), *ctx.options), None, None, None
        return *_gradients(grad, x, weight, *ctx.options), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, *_: None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [_filter(dx, weight, *ctx.options)]
        return _sum(terms if dweight is None else [*terms, _filter(x, dweight, *ctx.options)])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, layout: str, norm: str
    ) -> tuple[Tensor, int]:
        V, channel = info.batch_size, _channel_dim(layout)
        if in_dims[1] is None:  # the images of all V join one batch
            assert in_dims[0] is not None
            y = _filter(x.movedim(in_dims[0], 0).flatten(0, 1), weight, layout, norm)
            return y.unflatten(0, (V, y.shape[0] // V)), 0
        y = _filter(_folded(x, in_dims[0], V, channel), _folded(weight, in_dims[1], V, 2), layout, norm)
        return y.unflatten(channel, (V, -1)), channel


class _Gradients(_Rules):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
        return torch.ops.neuraldeps.fourier_filter2d_backward(grad, x, weight, layout, norm)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight = ctx.saved_tensors
        of_grad: list[Tensor] = []
        of_x = of_weight = None
        if ddx is not None:
            of_grad.append(_filter(ddx, weight, *ctx.options))
            of_weight = _gradients(grad, ddx, weight, *ctx.options)[1]
        if ddweight is not None:
            of_grad.append(_filter(x, ddweight, *ctx.options))
            of_x = _filter(grad, reference.adjoint(ddweight), *ctx.options)
        return _sum(of_grad), of_x, of_weight, None, None

    @staticmethod
    def jvp(
        ctx: Any, dgrad: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None]:
        grad, x, weight = ctx.saved_tensors
        of_x: list[Tensor] = []
        of_weight: list[Tensor] = []
        if dgrad is not None:
            by_grad = _gradients(dgrad, x, weight, *ctx.options)
            of_x.append(by_grad[0])
            of_weight.append(by_grad[1])
        if dx is not None:
            of_weight.append(_gradients(grad, dx, weight, *ctx.options)[1])
        if dweight is not None:
            of_x.append(_filter(grad, reference.adjoint(dweight), *ctx.options))
        return _sum(of_x), _sum(of_weight)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        V, channel = info.batch_size, _channel_dim(layout)
        grad, x = (_folded(value, in_dims[i], V, channel) for i, value in enumerate((grad, x)))
        dx, dweight = _gradients(grad, x, _folded(weight, in_dims[2], V, 2), layout, norm)
        return (dx.unflatten(channel, (V, -1)), dweight.unflatten(2, (V, -1))), (channel, 2)


def _channel_dim(layout: str) -> int:
    return 3 if layout == "NHWC" else 1


def _folded(value: Tensor, batch_dim: int | None, V: int, channel: int) -> Tensor:
    """The V values side by side along dimension `channel`."""
    batched = value.expand(V, *value.shape) if batch_dim is None else value.movedim(batch_dim, 0)
    return batched.movedim(0, channel).flatten(channel, channel + 1)


def _result_like(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
    """Dense and uninitialised, with channels or columns innermost in memory as in x, else in the layout's order."""
    of_layout, other = (3, 2) if layout == "NHWC" else (3, 1)  # innermost dimensions
    if x.stride(other) != 1 or x.stride(of_layout) == 1:
        return x.new_empty(x.shape)
    order, back = ((0, 3, 1, 2), (0, 2, 3, 1)) if layout == "NHWC" else ((0, 2, 3, 1), (0, 3, 1, 2))
    return x.new_empty([x.shape[d] for d in order]).permute(back)


def _gradients_like(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
    return _result_like(x, weight, layout, norm), weight.new_empty(weight.shape)


def _filter_in_torch(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _result_like(x, weight, layout, norm).copy_(reference.fourier_filter2d(x, weight, layout, norm))


def _gradients_in_torch(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dx, dweight = reference.fourier_filter2d_backward(grad, x, weight, layout, norm)
        return _result_like(x, weight, layout, norm).copy_(dx), dweight


def _triton_kernels(x: Tensor, weight: Tensor, layout: str) -> Any:
    """triton/fourier_filter.py if it serves a call that csrc/cuda/fourier_filter.cu has no kernel for: one filter a
    channel, not in float64, lines short enough for products with matrices. None: the reference does."""
    H, W, _ = _sizes(x, layout)
    if weight.dim() == 4 and x.dtype != torch.float64 and max(H, W) <= _LONGEST_PRODUCT:
        try:
            from neuraldeps_kernels.triton import fourier_filter as kernels
        except ImportError as error:
            _log.debug("fourier_filter2d runs on the plain PyTorch reference: %s", error)
            return None
        return kernels
    _log.debug("fourier_filter2d runs on the plain PyTorch reference: no CUDA kernel serves %s", list(weight.shape))
    return None


def _channels_last(x: Tensor, layout: str) -> Tensor:
    return x if layout == "NHWC" else x.permute(0, 2, 3, 1)


def _filter_on_cuda(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
    kernels = _triton_kernels(x, weight, layout)
    if kernels is None:
        return _filter_in_torch(x, weight, layout, norm)
    y = _result_like(x, weight, layout, norm)
    kernels.filter_images(_channels_last(x, layout), _channels_last(y, layout), weight.contiguous())
    return y


def _gradients_on_cuda(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
    kernels = _triton_kernels(x, weight, layout)
    if kernels is None:
        return _gradients_in_torch(grad, x, weight, layout, norm)
    dx = _result_like(x, weight, layout, norm)
    images = (_channels_last(image, layout) for image in (grad, x, dx))
    return dx, kernels.filter_gradients(*images, weight.contiguous())


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


def _register() -> None:
    _library.define("fourier_filter2d_in_torch(Tensor x, Tensor weight, str layout, str norm) -> Tensor")
    _library.define(
        "fourier_filter2d_backward_in_torch(Tensor grad, Tensor x, Tensor weight, str layout, str norm)"
        " -> (Tensor dx, Tensor dweight)"
    )
    operators: dict[str, tuple[Any, Any, Any]] = {
        "fourier_filter2d": (_filter_on_cuda, _result_like, _FourierFilter),
        "fourier_filter2d_backward": (_gradients_on_cuda, _gradients_like, _Gradients),
    }
    for name, (on_cuda, fake, rules) in operators.items():
        _library.impl(f"{name}_in_torch", on_cuda, "CUDA")
        torch.library.register_fake(f"neuraldeps::{name}", fake)
        torch.library.register_vmap(f"neuraldeps::{name}", rules.vmap)
        torch.library.register_autograd(f"neuraldeps::{name}", rules.backward, setup_context=rules.setup_context)


_register()
