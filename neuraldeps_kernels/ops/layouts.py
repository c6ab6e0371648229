"""Memory layouts of values [N, C, *], as csrc/torch/layouts.hpp has them."""

from __future__ import annotations

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, *] is dense with channels last, of any rank; False where it is contiguous as well."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x where it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def beside(other: Tensor, x: Tensor) -> Tensor:
    """`other`, of the shape of x, in the layout of x, which is dense."""
    if is_channels_last(x):
        return other.movedim(1, -1).contiguous().movedim(-1, 1)
    return other.contiguous()


def result_like(x: Tensor) -> Tensor:
    """Uninitialised, of shape and dtype of x: in its layout if that is contiguous or channels-last, else contiguous."""
    if x.is_contiguous() or is_channels_last(x):
        return x.new_empty_strided(x.shape, x.stride())
    return x.new_empty(x.shape)
