"""Region-wise mixup: two batches of images mixed with a ratio for every region of every pair.

    x_m[n, c, h, w] = lam[n, r] x_v[n, c, h, w] + (1 - lam[n, r]) x_i[n, c, h, w],   r the region of (h, w)

Operators:

- `torch.ops.neuraldeps.region_mixup(x_v, x_i, ratio, soft) -> x_m`: csrc/torch/region_mixup.cpp; on the CPU
  csrc/cpu/region_mixup.cpp, on CUDA triton/region_mixup.py, else (and for float64) reference/region_mixup.py.
- `.region_mixup_backward(grad, x_v, x_i, ratio, soft, images, ratios) -> (dx_v, dx_i, dratio)`, what is not asked for
  empty. Second derivatives are those of the reference.

Source: the region-wise mixing of "Modality-Adaptive Mixup and Invariant Decomposition for RGB-Infrared Person
Re-Identification" (arXiv 2203.01735); soft borders and the method are ours.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.ops.calls import differentiable
from neuraldeps_kernels.ops.layouts import result_like
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import region_mixup as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@annotated
def region_mixup(x_v: Tensor, x_i: Tensor, ratio: Tensor, *, soft: int = 0) -> Tensor:
    """Mixes x_v and x_i region by region, in one pass.

    Args:
        x_v, x_i: [N, C, H, W], float32, float64, bfloat16 or float16, both alike. Contiguous and channels-last memory
            are taken as they are, other strides cost a copy, and so does another layout of `x_i`.
        ratio: lam, the share of `x_v`, within 0..1: [N, R] for R horizontal stripes, or [N, Rh, Rw] for a grid. Region
            a of R along a dimension of H pixels begins at pixel ceil(a H / R). Used in float64 for float64 images, else
            in float32.
        soft: pixels around a border over which the ratio goes linearly from one region's to the next one's, at most the
            size of the smallest region; 0 and 1: at once.

    Returns:
        x_m in the shape, dtype and layout of `x_v`. Every pixel lies within its two parents; where lam is 1 or 0 it is
        the one parent to the last bit, whatever the other one holds. A ratio of NaN makes its region NaN.
        Differentiable twice in all three tensors. On the CPU the same to the last bit for any number of threads, as are
        the gradients.

    Raises:
        ValueError: a shape, device or `soft` does not fit; on the CPU also: a ratio outside 0..1 (on CUDA the host
            would have to wait: such a region is NaN there).
        TypeError: an argument is no tensor, or has none of these dtypes; `soft` is no integer.
    """
    _check(x_v, x_i, ratio, soft)
    lam = ratio.to(torch.promote_types(x_v.dtype, torch.float32))
    return _call(x_v, x_i, lam, soft)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ arguments


def _check(x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int) -> None:
    for name, value in (("x_v", x_v), ("x_i", x_i), ("ratio", ratio)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        if value.device != x_v.device:
            raise ValueError(f"{name} is on {value.device}, but x_v is on {x_v.device}")
    if x_v.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x_v must be float32, float64, bfloat16 or float16, not {x_v.dtype}; convert it first")
    if x_i.dtype != x_v.dtype:
        raise TypeError(f"x_i must have the dtype of x_v, {x_v.dtype}, not {x_i.dtype}")
    if not ratio.is_floating_point():
        raise TypeError(f"ratio must be a floating-point tensor, not {ratio.dtype}")
    if x_v.dim() != 4:
        raise ValueError(f"x_v must be [N, C, H, W], not {list(x_v.shape)}")
    if x_i.shape != x_v.shape:
        raise ValueError(f"x_i must have the shape of x_v, {list(x_v.shape)}, not {list(x_i.shape)}")
    if ratio.dim() not in (2, 3) or ratio.shape[0] != x_v.shape[0]:
        N = x_v.shape[0]
        raise ValueError(f"ratio must be [{N}, R] or [{N}, Rh, Rw] for x_v {list(x_v.shape)}, not {list(ratio.shape)}")
    if not isinstance(soft, int) or isinstance(soft, bool):
        raise TypeError(f"soft must be an int, not {soft!r}")
    if soft < 0:
        raise ValueError(f"soft must be at least 0, not {soft}")
    for name, pixels, regions in zip("HW", x_v.shape[2:], ratio.shape[1:], strict=False):
        if not 1 <= regions <= pixels:
            raise ValueError(f"ratio must have 1..{pixels} regions along {name}, not {regions}")
        if regions > 1 and soft > pixels // regions:
            size = pixels // regions
            raise ValueError(f"soft must be at most the size of a region, {size} pixels along {name}, not {soft}")


# ------------------------------------------------------------------------------------------------ operator rules


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_v, x_i, ratio, ctx.soft = inputs
    ctx.save_for_backward(x_v, x_i, ratio)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    needs_v, needs_i, needs_ratio, _ = ctx.needs_input_grad
    backward = reference if torch.is_grad_enabled() else torch.ops.neuraldeps
    dv, di, dratio = backward.region_mixup_backward(grad, *ctx.saved_tensors, ctx.soft, needs_v or needs_i, needs_ratio)
    return dv if needs_v else None, di if needs_i else None, dratio if needs_ratio else None, None


def _fake_backward(
    grad: Tensor, x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int, images: bool, ratios: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = (ratio.new_empty(0) for _ in range(3))
    dv, di, dratio = nothing
    if images:
        dv, di = result_like(x_v), result_like(x_v)
    return dv, di, ratio.new_empty(ratio.shape) if ratios else dratio


def _on_cuda(name: str) -> Any:
    """The Triton kernel of that name, or the reference."""

    def run(*args: Any) -> Any:
        kernels = _triton_kernels(args[0])
        return getattr(kernels, name)(*args) if kernels else _in_torch(name, *args)

    return run


def _triton_kernels(images: Tensor) -> Any:
    """triton/region_mixup.py where it serves; None: the reference does."""
    if images.dtype == torch.float64 or images.shape[1:].numel() >= 2**31:
        _log.debug("region_mixup runs on the plain PyTorch reference: no CUDA kernel serves the call")
        return None
    try:
        from neuraldeps_kernels.triton import region_mixup as kernels
    except ImportError as error:
        _log.debug("region_mixup runs on the plain PyTorch reference: %s", error)
        return None
    return kernels


def _in_torch(name: str, *args: Any) -> Any:
    """The reference, its images in the layout of x_v."""
    with torch.autocast(args[0].device.type, enabled=False):
        if name == "region_mixup":
            x_v, x_i, ratio, soft = args
            return result_like(x_v).copy_(reference.region_mixup(x_v, x_i, ratio, soft=soft))
        images = args[5]
        dv, di, dratio = reference.region_mixup_backward(*args)
        return *(result_like(args[1]).copy_(d) if images else d for d in (dv, di)), dratio


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


_call = differentiable("region_mixup", _backward, _save, lambda x_v, x_i, ratio, soft: result_like(x_v))
torch.library.register_fake("neuraldeps::region_mixup_backward", _fake_backward)
for _name in ("region_mixup", "region_mixup_backward"):
    _library.impl(_name, _on_cuda(_name), "CUDA")
