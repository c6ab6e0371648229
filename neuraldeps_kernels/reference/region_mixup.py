"""Plain PyTorch twin of `neuraldeps_kernels.ops.region_mixup`: the oracle of the tests, in float64, what serves where
no kernel does, and, being differentiable throughout, the second derivative of the operator.

Notation: images x_v, x_i, x_m [N, C, H, W]; ratios [N, R] (R stripes) or [N, Rh, Rw], used in float64 for float64
images, else in float32; lam [N, 1, H, W] the ratio at every pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def region_mixup(x_v: Tensor, x_i: Tensor, ratio: Tensor, *, soft: int = 0) -> Tensor:
    """x_m = lam x_v + (1 - lam) x_i in the dtype of x_v, within its parents and the parent itself where lam is 0 or 1;
    NaN where lam is outside 0..1."""
    wide = torch.promote_types(x_v.dtype, torch.float32)
    v, i = x_v.to(wide), x_i.to(wide)
    lam = ratio_map(ratio.to(wide), x_v.shape[2], x_v.shape[3], soft)
    mixed = lam * v + (1 - lam) * i
    with torch.no_grad():  # what rounding must not change, and no gradient may see
        inside = mixed.clamp(torch.minimum(v, i), torch.maximum(v, i))
        inside = torch.where((lam < 0) | (lam > 1) | lam.isnan(), torch.nan, inside)
        mixed.copy_(torch.where(lam == 1, v, torch.where(lam == 0, i, inside)))
    return mixed.to(x_v.dtype)


def region_mixup_backward(
    grad: Tensor, x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int, images: bool, ratios: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lam grad and (1 - lam) grad in the dtype of x_v, with `images`; dratio [N, R] or [N, Rh, Rw], with `ratios`: sums
    of grad (x_v - x_i) over channels and pixels, weighted by the part of a region in a pixel. Else empty tensors."""
    wide = torch.promote_types(x_v.dtype, torch.float32)
    g = grad.to(wide)
    H, W = x_v.shape[2:]
    dv = di = dratio = ratio.new_empty(0)
    if images:
        lam = ratio_map(ratio.to(wide), H, W, soft)
        dv, di = (lam * g).to(x_v.dtype), ((1 - lam) * g).to(x_v.dtype)
    if ratios:
        rows, columns = ratio.shape[1], ratio.shape[2] if ratio.dim() == 3 else 1
        by_row = region_weights(H, rows, soft, g).mT  # [Rh, H]
        by_column = region_weights(W, columns, soft, g)  # [W, Rw]
        dratio = (by_row @ (g * (x_v.to(wide) - x_i.to(wide))).sum(1) @ by_column).reshape(ratio.shape)
    return dv, di, dratio


def ratio_map(ratio: Tensor, H: int, W: int, soft: int) -> Tensor:
    """lam [N, 1, H, W]."""
    grid = ratio if ratio.dim() == 3 else ratio[:, :, None]
    first_row, step_row = regions_of_pixels(H, grid.shape[1], soft, grid)
    first_column, step_column = regions_of_pixels(W, grid.shape[2], soft, grid)
    rows = _between(grid, 1, first_row, step_row[:, None])
    return _between(rows, 2, first_column, step_column)[:, None]


def regions_of_pixels(pixels: int, regions: int, soft: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Along one dimension, for every pixel: region a [pixels] int64 and how far it is on its way to region a + 1, t in
    [0, 1). Region a begins at pixel ceil(a pixels / regions); t rises over `soft` pixels around a border."""
    borders = torch.tensor([-(-a * pixels // regions) for a in range(1, regions)], device=like.device, dtype=like.dtype)
    centre = torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5
    first = (centre[:, None] - soft / 2 >= borders).sum(1)  # borders passed for good
    ahead = torch.cat([borders, borders.new_full((1,), torch.inf)])[first]
    return first, ((centre - ahead) / max(soft, 1) + 0.5).clamp(min=0) if soft else torch.zeros_like(centre)


def region_weights(pixels: int, regions: int, soft: int, like: Tensor) -> Tensor:
    """[pixels, regions], rows of sum 1: the part of every region in a pixel; dtype and device of `like`."""
    first, step = regions_of_pixels(pixels, regions, soft, like)
    places = torch.arange(regions, device=like.device)
    return (places == first[:, None]) * (1 - step[:, None]) + (places == first[:, None] + 1) * step[:, None]


def _between(ratio: Tensor, dim: int, first: Tensor, step: Tensor) -> Tensor:
    """(1 - step) ratio[first] + step ratio[first + 1] along `dim`; where step is 0 exactly ratio[first]."""
    here = ratio.index_select(dim, first)
    there = ratio.index_select(dim, (first + 1).clamp(max=ratio.shape[dim] - 1))
    return torch.where(step == 0, here, here + step * (there - here))
