"""Pooling of feature maps by maps of body parts: weighted means over positions, for all maps in one read.

    pooled[n, k, c] = sum_hw F[n, c, h, w] H[n, k, h, w] / (sum_hw H[n, k, h, w] + eps)

Operators:

- `torch.ops.neuraldeps.pose_weighted_pool(features, maps, groups, eps) -> pooled`: csrc/torch/pose_weighted_pool.cpp;
  on the CPU csrc/cpu/pose_weighted_pool.cpp, on CUDA triton/pose_weighted_pool.py, else (and for
  float64) reference/pose_weighted_pool.py.
- `.pose_weighted_pool_backward(grad, features, maps, groups, eps, of_features, of_maps) -> (dfeatures, dmaps)`, what is
  not asked for empty. Second derivatives are those of the reference.

Source: the pooling by visible parts of "Pose-Guided Feature Learning with Knowledge Distillation for Occluded Person
Re-Identification" (arXiv 2108.00139), in a form of our own.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.ops.calls import differentiable
from neuraldeps_kernels.ops.layouts import result_like
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import pose_weighted_pool as reference

_log = logging.getLogger("neuraldeps_kernels")

_MOST_MAPS = 32  # that triton/pose_weighted_pool.py keeps beside a block of channels
_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@annotated
def pose_weighted_pool(features: Tensor, maps: Tensor, *, groups: bool = False, eps: float = 1e-6) -> Tensor:
    """Means of the features over positions, weighted by each of K maps.

    Args:
        features: F [N, C, h, w], float32, float64, bfloat16 or float16. Contiguous and channels-last memory are taken
            as they are, other strides cost a copy.
        maps: H [N, K, h, w] >= 0, used in float64 for float64 features, else in float32. A map of ones gives the plain
            mean, a map of zeros exactly 0.
        groups: cut the channels into K groups of C // K, of which the last takes the rest, and pool group k by map k
            alone; the same bits as block (k, group k) of the result without it.
        eps: added to the sum of a map; positive.

    Returns:
        [N, K, C], or [N, C] with `groups`, in the dtype of the features; summed in float64 for float64 features, else
        in float32. Differentiable twice in both tensors. On the CPU the same to the last bit for any number of threads,
        as are the gradients.

    Raises:
        ValueError: a shape or device does not fit, `eps` is not positive, or `groups` are more than channels.
        TypeError: an argument is no tensor or has none of these dtypes.
    """
    _check(features, maps, groups, eps)
    H = maps.to(torch.promote_types(features.dtype, torch.float32))
    return _call(features, H, groups, eps)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ arguments


def _check(features: Tensor, maps: Tensor, groups: bool, eps: float) -> None:
    for name, value in (("features", features), ("maps", maps)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if features.dtype not in _INPUT_DTYPES:
        raise TypeError(f"features must be float32, float64, bfloat16 or float16, not {features.dtype}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be a floating-point tensor, not {maps.dtype}")
    if maps.device != features.device:
        raise ValueError(f"maps are on {maps.device}, but features are on {features.device}")
    if features.dim() != 4:
        raise ValueError(f"features must be [N, C, h, w], not {list(features.shape)}")
    N, C, h, w = features.shape
    if maps.dim() != 4 or maps.shape[0] != N or maps.shape[2:] != features.shape[2:]:
        raise ValueError(f"maps must be [{N}, K, {h}, {w}] for features {list(features.shape)}, not {list(maps.shape)}")
    if groups and not 1 <= maps.shape[1] <= C:
        raise ValueError(f"with groups there must be 1..{C} maps, at most one a channel, not {maps.shape[1]}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}")


# ------------------------------------------------------------------------------------------------ operator rules


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, maps, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(features, maps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    of_features, of_maps, *_ = ctx.needs_input_grad
    backward = reference if torch.is_grad_enabled() else torch.ops.neuraldeps
    dF, dH = backward.pose_weighted_pool_backward(grad, *ctx.saved_tensors, ctx.groups, ctx.eps, of_features, of_maps)
    return dF if of_features else None, dH if of_maps else None, None, None


def _fake(features: Tensor, maps: Tensor, groups: bool, eps: float) -> Tensor:
    N, C = features.shape[:2]
    return features.new_empty((N, C) if groups else (N, maps.shape[1], C))


def _fake_backward(
    grad: Tensor, features: Tensor, maps: Tensor, groups: bool, eps: float, of_features: bool, of_maps: bool
) -> tuple[Tensor, Tensor]:
    dF = result_like(features) if of_features else maps.new_empty(0)
    return dF, maps.new_empty(maps.shape if of_maps else (0,))


def _on_cuda(name: str, first: int) -> Any:
    """The Triton kernel of that name, or the reference; features and maps are arguments `first` and the next."""

    def run(*args: Any) -> Any:
        kernels = _triton_kernels(*args[first : first + 2])
        return getattr(kernels, name)(*args) if kernels else _in_torch(name, *args)

    return run


def _triton_kernels(features: Tensor, maps: Tensor) -> Any:
    """triton/pose_weighted_pool.py where it serves; None: the reference does."""
    if features.dtype == torch.float64 or maps.shape[1] > _MOST_MAPS or features.shape[1:].numel() >= 2**31:
        _log.debug("pose_weighted_pool runs on the plain PyTorch reference: no CUDA kernel serves the call")
        return None
    try:
        from neuraldeps_kernels.triton import pose_weighted_pool as kernels
    except ImportError as error:
        _log.debug("pose_weighted_pool runs on the plain PyTorch reference: %s", error)
        return None
    return kernels


def _in_torch(name: str, *args: Any) -> Any:
    """The reference, its gradient of the features in their layout."""
    with torch.autocast(args[0].device.type, enabled=False):
        if name == "pose_weighted_pool":
            features, maps, groups, eps = args
            return reference.pose_weighted_pool(features, maps, groups=groups, eps=eps).contiguous()
        features, of_features = args[1], args[5]
        dF, dH = reference.pose_weighted_pool_backward(*args)
        return result_like(features).copy_(dF) if of_features else dF, dH.contiguous()


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


_call = differentiable("pose_weighted_pool", _backward, _save, _fake)
torch.library.register_fake("neuraldeps::pose_weighted_pool_backward", _fake_backward)
for _name, _first in (("pose_weighted_pool", 0), ("pose_weighted_pool_backward", 1)):
    _library.impl(_name, _on_cuda(_name, _first), "CUDA")
