"""`FourierFilter2d`: the global filter of GFNet, the adaptive Fourier filter of FAMLP, the mode-wise product of FNO.

Notation of FAMLP: x, y [B, H, W, C], X = rfft2(x), Wf = W//2 + 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuraldeps_kernels.ops.fourier_filter import LAYOUTS, fourier_filter2d

MODES = ("complex", "separable", "amplitude")
_INIT_STD = 0.02  # of GFNet


class FourierFilter2d(nn.Module):
    """y = irfft2(filter(rfft2(x))) with a learned filter, over images of one fixed size.

    Args:
        channels: C.
        height, width: H, W of the images, any number from 1 on.
        layout: "NHWC" for x [B, H, W, C], also given as tokens [B, H W, C]; "NCHW" for x [B, C, H, W].
        mode: what the parameter `weight` is.
            "complex": Y = X K, weight [H, Wf, C, 2] the real and imaginary part of K, as in GFNet, whose parameter
            `complex_weight` is loaded as `weight`.
            "separable": Y = a Re X + i b Im X, weight [H, Wf, C, 2] holding a and b.
            "amplitude": Y = X softplus(theta), weight [H, Wf, C] holding theta: no phase changes.
        groups: None: every channel has its own filter. A number G: Y_o = sum_i X_i K_io within each of G blocks of C/G
            channels, weight [H, Wf, G, C/G, C/G, 2]; mode "complex" only. With AFNO's blocks, which all frequencies
            share, call `fourier_filter2d` with an expanded weight.

    The parameter starts as 0.02 times normal numbers, as in GFNet, and in mode "amplitude" around softplus(theta) = 1.
    Whatever its dtype the product is in float32 (float64 for float64 x), and y has the dtype of x.

    Raises:
        ValueError: unknown `layout` or `mode`, sizes below 1, `channels` that `groups` does not divide, `groups` with
            another mode than "complex"; in `forward`, x of other sizes.

    Source: inspired by FAMLP (arXiv 2203.12893); the start of "amplitude" is our choice.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        layout: str = "NHWC",
        mode: str = "complex",
        groups: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("height", height), ("width", width), ("groups", groups or 1)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if layout not in LAYOUTS:
            raise ValueError(f'layout must be "NHWC" or "NCHW", not {layout!r}')
        if mode not in MODES:
            raise ValueError(f'mode must be "complex", "separable" or "amplitude", not {mode!r}')
        if groups is not None and (mode != "complex" or channels % groups):
            raise ValueError(
                f'groups must divide channels in mode "complex", not {groups} for {channels} channels in mode {mode!r}'
            )
        self.channels, self.height, self.width = channels, height, width
        self.layout, self.mode, self.groups = layout, mode, groups
        of_channels = [channels] if groups is None else [groups, channels // groups, channels // groups]
        parts = [] if mode == "amplitude" else [2]
        shape = [height, width // 2 + 1, *of_channels, *parts]
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_rename_complex_weight)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, math.log(math.e - 1) if self.mode == "amplitude" else 0.0, _INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """y in the shape of x: [B, H, W, C], or tokens [B, H W, C]; with layout "NCHW" [B, C, H, W]."""
        if x.dim() == 3 and self.layout == "NHWC":
            if x.shape[1] != self.height * self.width:
                raise ValueError(
                    f"x must be [B, {self.height} * {self.width}, {self.channels}] tokens, not {list(x.shape)}"
                )
            return self.forward(x.unflatten(1, (self.height, self.width))).flatten(1, 2)
        if self.mode == "separable":
            return self._separable(x)
        weight: Tensor = self.weight
        if self.mode == "amplitude":
            theta = self.weight.to(torch.promote_types(x.dtype, torch.float32))
            weight = torch.stack([F.softplus(theta), torch.zeros_like(theta)], -1)
        return fourier_filter2d(x, weight, layout=self.layout)

    def _separable(self, x: Tensor) -> Tensor:
        """AFF_p(x) + AFF_q(rev x) with p = (a + b) / 2, q = (a - b) / 2, rev x[h, w] = x[-h mod H, -w mod W]."""
        a, b = self.weight.to(torch.promote_types(x.dtype, torch.float32)).unbind(-1)
        p, q = ((a + sign * b) / 2 for sign in (1, -1))
        filters = (torch.stack([real, torch.zeros_like(real)], -1) for real in (p, q))
        image = (1, 2) if self.layout == "NHWC" else (2, 3)
        y, reversed_y = (
            fourier_filter2d(z, K, layout=self.layout)
            for z, K in zip((x, x.flip(image).roll((1, 1), image)), filters, strict=True)
        )
        return y + reversed_y

    def extra_repr(self) -> str:
        groups = "" if self.groups is None else f", groups={self.groups}"
        return f"{self.channels}, {self.height}, {self.width}, layout={self.layout!r}, mode={self.mode!r}{groups}"


def resize_filter(weight: Tensor, height: int, width: int) -> Tensor:
    """The filter weight [H, Wf, ...] of another grid, [height, width//2 + 1, ...], by bicubic interpolation between its
    frequencies with the first and the last ones kept (GFNet's rule). Real or complex.

    Raises:
        ValueError: `weight` has fewer than 2 dimensions, or a size is below 1.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """
    if weight.dim() < 2 or min(height, width) < 1:
        raise ValueError(
            f"weight must be [H, W//2 + 1, ...] and sizes at least 1, not {list(weight.shape)} for {height} x {width}"
        )
    if weight.is_complex():
        return torch.view_as_complex(resize_filter(torch.view_as_real(weight), height, width))
    planes = weight.flatten(2).permute(2, 0, 1) if weight.dim() > 2 else weight[None]  # [*, H, Wf]
    size = (height, width // 2 + 1)
    resized = F.interpolate(planes[:, None], size=size, mode="bicubic", align_corners=True)[:, 0]
    return resized.permute(1, 2, 0).reshape(*size, *weight.shape[2:]).contiguous()


def _rename_complex_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """GFNet's name of the parameter becomes ours."""
    if f"{prefix}complex_weight" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}complex_weight")
