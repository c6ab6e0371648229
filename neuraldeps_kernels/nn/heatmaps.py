"""Heat maps of body joints on a grid of cells, from stored joints: per joint, per group of joints, of the whole body.

    J_j(cell) = v_j exp(-|cell - joint_j|^2 / (2 sigma^2)),   H_k = max over j in group k of J_j,   M = max over all j

in cells, where cell (r, c) has its centre at (r + 1/2, c + 1/2). Joints [N, 17, 3] are x and y in pixels of a picture
of `height` x `width`, whose first pixel covers 0 to 1, and visibility v in 0..1, in COCO's order. A joint of visibility
0 has a map of zeros, whatever its coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Groups = Sequence[Sequence[int]]

FOUR_PARTS: Groups = (tuple(range(5)), tuple(range(5, 13)), tuple(range(11, 15)), tuple(range(13, 17)))
"""Head; trunk and arms; hips and thighs; lower legs. Each is its own mirror image."""
SIX_PARTS: Groups = (tuple(range(7)), (5, 7, 9), (11, 13, 15), (6, 8, 10), (12, 14, 16), (5, 6, 11, 12))
THIRTEEN_PARTS: Groups = (tuple(range(5)), *((joint,) for joint in range(5, 17)))
"""The head and twelve single joints."""


def joint_heatmaps(
    joints: Tensor, height: int, width: int, cells_h: int, cells_w: int, sigma: float = 0.9
) -> Tensor:  # [N, J, h, w]
    """J of every joint.

    Args:
        joints: float [N, J, 3].
        height, width: of the picture, in pixels.
        cells_h, cells_w: h and w of the maps.
        sigma: in cells.

    Raises:
        ValueError: a shape or size is wrong.
        TypeError: `joints` is not floating.
    """
    _check(joints, {"height": height, "width": width, "cells_h": cells_h, "cells_w": cells_w, "sigma": sigma})
    visible = joints[..., 2] > 0

    def along(axis: int, size: int, cells: int) -> Tensor:
        """exp(-distance^2 / (2 sigma^2)) of one coordinate [N, J, cells], of unseen joints as if they were at 0."""
        place = torch.where(visible, joints[..., axis], 0) * (cells / size)
        centres = torch.arange(cells, dtype=joints.dtype, device=joints.device) + 0.5
        return torch.exp((centres - place[..., None]).square() / (-2 * sigma * sigma))

    shown = torch.where(visible, joints[..., 2], 0)[..., None] * along(1, height, cells_h)
    return shown[..., None] * along(0, width, cells_w)[..., None, :]


def part_heatmaps(
    joints: Tensor,
    height: int,
    width: int,
    cells_h: int,
    cells_w: int,
    sigma: float = 0.9,
    *,
    groups: Groups = FOUR_PARTS,
    total: bool = False,
) -> Tensor:  # [N, K + 1, h, w]
    """H of the K `groups`, then M, of the joints as `joint_heatmaps` takes them.

    Args:
        groups: numbers of joints, at least one a group; they may overlap.
        total: sums of a group's maps, at most 1, instead of their maxima; M stays a maximum.

    Raises:
        ValueError: besides those of `joint_heatmaps`, a group is empty or names a joint that is not there.
    """
    maps = joint_heatmaps(joints, height, width, cells_h, cells_w, sigma)
    wrong = [group for group in groups if not len(group) or not all(0 <= joint < maps.shape[1] for joint in group)]
    if wrong:
        raise ValueError(f"groups must hold joints of 0..{maps.shape[1] - 1}, at least one each, not {wrong[0]}")
    parts = (maps[:, list(group)] for group in groups)
    return torch.stack([part.sum(1).clamp(max=1) if total else part.amax(1) for part in parts] + [maps.amax(1)], 1)


def _check(joints: Tensor, sizes: dict[str, float]) -> None:
    if not joints.is_floating_point():
        raise TypeError(f"joints must be floating, not {joints.dtype}")
    if joints.dim() != 3 or joints.shape[1] < 1 or joints.shape[2] != 3:
        raise ValueError(f"joints must be [N, J, 3] with J of 1 or more, not {list(joints.shape)}")
    for name, value in sizes.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, not {value}")
