"""Heat maps from joints: against their formula in float64, and check 10 of the occlusion specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuraldeps_kernels.nn import heatmaps as m

HEIGHT, WIDTH, H, W = 64, 32, 8, 4


def made(number: int, seed: int = 0) -> torch.Tensor:
    """Joints [N, 17, 3] in and around the picture, some hidden, some half seen."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(number, 17, 2, generator=generator) * torch.tensor([1.2 * WIDTH, 1.2 * HEIGHT])
    seen = torch.tensor([0.0, 0.5, 1.0])[torch.randint(0, 3, (number, 17), generator=generator)]
    return torch.cat([places, seen[..., None]], 2)


def expected(joint: list[float], height: int, width: int, h: int, w: int, sigma: float) -> list[list[float]]:
    x, y, seen = joint[0] * w / width, joint[1] * h / height, joint[2]
    return [
        [seen * math.exp(-((r + 0.5 - y) ** 2 + (c + 0.5 - x) ** 2) / (2 * sigma**2)) for c in range(w)]
        for r in range(h)
    ]


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.integers(1, 9), st.floats(0.2, 3)
)
def test_joint_maps_follow_the_formula(n: int, height: int, width: int, h: int, w: int, sigma: float) -> None:
    joints = made(n) * torch.tensor([width / WIDTH, height / HEIGHT, 1])
    found = m.joint_heatmaps(joints, height, width, h, w, sigma)
    wanted = [[expected(joint, height, width, h, w, sigma) for joint in one] for one in joints.tolist()]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=2e-5, rtol=0)


def test_peak_is_one_at_a_cell_centre() -> None:
    """Check 10: a joint on a cell's centre has 1 there, and less elsewhere."""
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    x, y = (columns.flatten() + 0.5) * (WIDTH / W), (rows.flatten() + 0.5) * (HEIGHT / H)
    joints = torch.stack([x, y, torch.ones_like(x)], 1)[:, None]  # [H W, 1, 3]
    maps = m.joint_heatmaps(joints, HEIGHT, WIDTH, H, W)[:, 0].flatten(1)
    assert torch.equal(maps.diagonal(), torch.ones(H * W))
    assert bool((maps.fill_diagonal_(0) < 0.6).all())


@pytest.mark.parametrize("place", [3.0, float("nan"), float("inf")])
def test_hidden_joints_have_exact_zeros(place: float) -> None:
    """Check 10: visibility 0 gives zeros, whatever the coordinates."""
    joints = torch.tensor([place, place, 0.0]).expand(2, 17, 3)
    assert torch.equal(m.joint_heatmaps(joints, HEIGHT, WIDTH, H, W), torch.zeros(2, 17, H, W))
    assert torch.equal(m.part_heatmaps(joints, HEIGHT, WIDTH, H, W), torch.zeros(2, 5, H, W))


@pytest.mark.parametrize("groups", [m.FOUR_PARTS, m.SIX_PARTS, m.THIRTEEN_PARTS])
def test_part_maps_are_maxima_of_joint_maps(groups: m.Groups) -> None:
    """Check 10: bit for bit; the last map is that of the whole body."""
    joints = made(5)
    single = m.joint_heatmaps(joints, HEIGHT, WIDTH, H, W)
    found = m.part_heatmaps(joints, HEIGHT, WIDTH, H, W, groups=groups)
    assert found.shape == (5, len(groups) + 1, H, W)
    for number, group in enumerate((*groups, range(17))):
        wanted = single[:, group[0]]
        for joint in group:
            wanted = torch.maximum(wanted, single[:, joint])
        assert torch.equal(found[:, number], wanted)


def test_sums_of_joint_maps_end_at_one() -> None:
    joints = made(5)
    single = m.joint_heatmaps(joints, HEIGHT, WIDTH, H, W).double()
    found = m.part_heatmaps(joints, HEIGHT, WIDTH, H, W, total=True)
    for number, group in enumerate(m.FOUR_PARTS):
        wanted = single[:, list(group)].sum(1).clamp(max=1)
        torch.testing.assert_close(found[:, number].double(), wanted, atol=1e-6, rtol=0)
    assert float(found[:, :-1].max()) == 1
    assert torch.equal(found[:, -1], m.part_heatmaps(joints, HEIGHT, WIDTH, H, W)[:, -1])


def test_mirrored_joints_give_mirrored_maps() -> None:
    joints = made(4)
    flipped = joints.clone()
    flipped[..., 0] = WIDTH - joints[..., 0]
    maps = m.part_heatmaps(joints, HEIGHT, WIDTH, H, W)
    torch.testing.assert_close(m.part_heatmaps(flipped, HEIGHT, WIDTH, H, W), maps.flip(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays_and_no_pictures_are_allowed(dtype: torch.dtype) -> None:
    assert m.part_heatmaps(made(2).to(dtype), HEIGHT, WIDTH, H, W).dtype == dtype
    assert m.part_heatmaps(made(2)[:0], HEIGHT, WIDTH, H, W).shape == (0, 5, H, W)


def test_bad_input() -> None:
    joints = made(2)
    with pytest.raises(TypeError, match=r"joints must be floating, not torch.int64"):
        m.joint_heatmaps(joints.long(), HEIGHT, WIDTH, H, W)
    for wrong in (joints[0], joints[:, :0], joints[..., :2]):
        with pytest.raises(ValueError, match="joints must be"):
            m.joint_heatmaps(wrong, HEIGHT, WIDTH, H, W)
    with pytest.raises(ValueError, match="cells_w must be positive and finite, not 0"):
        m.joint_heatmaps(joints, HEIGHT, WIDTH, H, 0)
    with pytest.raises(ValueError, match="sigma must be positive and finite, not nan"):
        m.part_heatmaps(joints, HEIGHT, WIDTH, H, W, math.nan)
    for group in ((), (3, 17)):
        with pytest.raises(ValueError, match=r"groups must hold joints of 0\.\.16"):
            m.part_heatmaps(joints, HEIGHT, WIDTH, H, W, groups=[(0,), group])
