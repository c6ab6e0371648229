"""Pictures of one soft-edged disc with known factors, for generators whose factors of variation are to be measured.

factors [N, 5], each in 0..1: hue (red to blue), x and y (position of the centre), size, background (its grey)
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = ("hue", "x", "y", "size", "background")
SIDE = 32
_EDGE = 1.0  # pixels from inside to outside


def sample_factors(count: int, *, seed: int = 0) -> Tensor:
    """[count, 5] float32, independent and uniform in 0..1; the same for a seed on every machine."""
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    return torch.rand(count, len(FACTORS), generator=torch.Generator().manual_seed(seed))


def render_shapes(factors: Tensor, *, side: int = SIDE) -> Tensor:
    """Pictures float32 [N, 3, side, side] in -1..1 of factors [N, 5] in 0..1; differentiable.

    Raises:
        ValueError: another shape, or factors outside 0..1 or NaN.
    """
    if factors.dim() != 2 or factors.shape[1] != len(FACTORS):
        raise ValueError(f"factors must be [N, {len(FACTORS)}] ({', '.join(FACTORS)}), not {list(factors.shape)}")
    if side < 8:
        raise ValueError(f"side must be at least 8, not {side}")
    if not bool(((factors >= 0) & (factors <= 1)).all()):
        raise ValueError("factors must be in 0..1")
    hue, x, y, size, background = (factors[:, i, None, None].float() for i in range(len(FACTORS)))
    grid = torch.arange(side, device=factors.device) + 0.5
    centre_x, centre_y = side * (0.3 + 0.4 * x), side * (0.3 + 0.4 * y)
    radius = side * (0.12 + 0.14 * size)
    distance = ((grid[None, None, :] - centre_x).square() + (grid[None, :, None] - centre_y).square()).sqrt()
    inside = torch.sigmoid(4 * (radius - distance) / _EDGE)  # [N, side, side]
    grey = 0.1 + 0.35 * background
    colour = torch.stack([1 - 0.9 * hue, torch.full_like(hue, 0.25), 0.1 + 0.9 * hue], 1)  # [N, 3, 1, 1]
    return 2 * (inside[:, None] * colour + (1 - inside[:, None]) * grey[:, None]) - 1
