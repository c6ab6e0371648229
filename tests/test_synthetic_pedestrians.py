"""Rendered pedestrians: the same bits in any set, what belongs to people, cameras and pictures, occluders; splits."""

from __future__ import annotations

import colorsys
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuraldeps_kernels.data import pedestrian_splits as splits
from neuraldeps_kernels.data import synthetic_pedestrians as m
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians

NOSE, RIGHT_SHOULDER, RIGHT_ANKLE = 0, 6, 16  # skin, upper garment and shoe: nothing is drawn over them but occluders


def same(a: PedestrianImages, b: PedestrianImages) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def at_joint(pictures: PedestrianImages, joint: int) -> torch.Tensor:
    """Colours uint8 [N, 3] of the pixels where a joint is."""
    x, y = pictures.joints[:, joint, 0].long(), pictures.joints[:, joint, 1].long()
    return pictures.images[torch.arange(len(pictures)), y, x]


# ------------------------------------------------------------------------------------------------ sets of pictures


def test_fields_and_order() -> None:
    found = pedestrians(3, num_cameras=2, images_per_camera=2, first_id=7, first_camera=5, domain=4)
    assert len(found) == 12
    assert found.images.shape == (12, 64, 32, 3)
    assert found.images.dtype == torch.uint8
    assert found.joints.shape == (12, 17, 3)
    assert found.joints.dtype == torch.float32
    assert found.ids.tolist() == [7] * 4 + [8] * 4 + [9] * 4
    assert found.cameras.tolist() == [5, 5, 6, 6] * 3
    assert found.domains.tolist() == [4] * 12
    assert found.infrared.tolist() == [False] * 12
    assert {x.dtype for x in (found.ids, found.cameras, found.domains)} == {torch.int64}
    assert bool((found.joints[..., 2] == 1).all())


@pytest.mark.parametrize("infrared", [False, True])
def test_a_picture_is_the_same_in_any_set(infrared: bool) -> None:
    """Bit for bit, whatever else is asked for, in sets of several and of single pictures."""
    options: dict[str, Any] = {"occlusion": 0.5, "infrared": infrared, "identity_seed": 1, "style_seed": 2, "seed": 3}
    everything = pedestrians(9, num_cameras=5, images_per_camera=3, **options)
    assert same(everything, pedestrians(9, num_cameras=5, images_per_camera=3, **options))
    person = pedestrians(1, first_id=6, num_cameras=5, images_per_camera=3, **options)
    assert same(everything[everything.ids == 6], person)
    number = torch.arange(len(everything)) % 3
    chosen = (everything.ids >= 3) & (everything.cameras >= 2) & (everything.cameras < 4) & (number < 2)
    part = pedestrians(6, first_id=3, first_camera=2, num_cameras=2, images_per_camera=2, **options)
    assert same(everything[chosen], part)
    single = pedestrians(1, first_id=4, first_camera=3, num_cameras=1, **options)
    assert same(everything[(everything.ids == 4) & (everything.cameras == 3) & (number == 0)], single)


def test_no_two_pictures_are_the_same() -> None:
    found = pedestrians(5, num_cameras=3, images_per_camera=3)
    assert len(found.images.flatten(1).unique(dim=0)) == len(found.joints.flatten(1).unique(dim=0)) == 45


def test_rows_and_concatenation() -> None:
    found = pedestrians(4, num_cameras=2)
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(found[rows].images, found.images[rows])
    assert found[rows].ids.tolist() == [2, 0, 2]
    assert same(PedestrianImages.concatenate([found[:3], found[3:]]), found)
    with pytest.raises(ValueError, match=r"parts must be .* of one size, not of \[\(64, 32\), \(128, 64\)\]"):
        PedestrianImages.concatenate([found, pedestrians(1, height=128, width=64)])
    with pytest.raises(ValueError, match="not of none"):
        PedestrianImages.concatenate([])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_ids", 0, "num_ids must be 1 or more, not 0"),
        ("num_cameras", 0, "num_cameras must be 1 or more, not 0"),
        ("images_per_camera", -1, "images_per_camera must be 1 or more, not -1"),
        ("height", 15, "height must be at least 16 pixels, not 15"),
        ("width", 7, "width must be at least 8 pixels, not 7"),
        ("first_id", -1, "first_id must be 0 or more, not -1"),
        ("first_camera", -1, "first_camera must be 0 or more, not -1"),
        ("style_strength", math.nan, "style_strength must be 0 to 3.0, not nan"),
        ("style_strength", -0.1, "style_strength must be 0 to 3.0, not -0.1"),
        ("occlusion", 1.1, "occlusion must be a probability, 0 to 1, not 1.1"),
        ("occlusion", math.nan, "occlusion must be a probability, 0 to 1, not nan"),
    ],
)
def test_bad_input(name: str, value: float, message: str) -> None:
    options: dict[str, Any] = {"num_ids": 2, name: value}
    with pytest.raises(ValueError, match=message):
        pedestrians(**options)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(16, 90),
    st.integers(8, 50),
    st.floats(0, m.MAX_STRENGTH),
    st.floats(0, 1),
    st.booleans(),
    st.integers(-(2**70), 2**70),
)
def test_joints_are_inside_at_any_size(
    height: int, width: int, strength: float, occlusion: float, infrared: bool, seed: int
) -> None:
    seeds = {"identity_seed": seed, "style_seed": seed, "seed": seed}
    found = pedestrians(
        4, height=height, width=width, style_strength=strength, occlusion=occlusion, infrared=infrared, **seeds
    )
    x, y, visible = found.joints.unbind(2)
    assert bool(((x > 0) & (x < width) & (y > 0) & (y < height)).all())
    assert set(visible.unique().tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------------------------------------ who and how


def test_people_keep_their_clothes() -> None:
    """Without a style all cameras see the same colours of a person, and other colours of another."""
    found = pedestrians(40, num_cameras=5, style_strength=0)
    for joint, kinds in ((NOSE, 1), (RIGHT_ANKLE, 1), (RIGHT_SHOULDER, 2)):  # an upper garment may have two colours
        colours = at_joint(found, joint).view(40, 5, 3)
        assert all(len(person.unique(dim=0)) <= kinds for person in colours)
        assert len(colours[:, 0].unique(dim=0)) >= 35
    others = pedestrians(40, num_cameras=5, style_strength=0, identity_seed=1)
    assert not bool((at_joint(found, RIGHT_ANKLE) == at_joint(others, RIGHT_ANKLE)).all(1).any())


def test_seeds_decide_apart() -> None:
    """Poses follow `seed` and build, not styles; shoes follow people and styles, not poses."""
    found = pedestrians(20)
    styled, posed = pedestrians(20, style_seed=1), pedestrians(20, seed=1)
    assert torch.equal(found.joints, styled.joints)
    assert not torch.equal(found.images, styled.images)
    assert not bool((found.joints == posed.joints).all(2).any())
    plain, plain_posed = (pedestrians(20, seed=seed, style_strength=0) for seed in (0, 1))
    assert torch.equal(at_joint(plain, RIGHT_ANKLE), at_joint(plain_posed, RIGHT_ANKLE))


def test_hues_are_those_of_colorsys() -> None:
    values = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    wanted = [colorsys.hsv_to_rgb(*map(float, row)) for row in values]
    assert m._hsv(*values.T) == pytest.approx(np.array(wanted), abs=1e-5)


def test_cameras_have_styles() -> None:
    """Mean colours of a camera's pictures are alike for two groups of people, and unlike between cameras."""
    found = pedestrians(200, num_cameras=6)
    means = found.images.float().mean((1, 2)).view(2, 100, 6, 3).mean(1)  # [group, camera, 3]
    within = (means[0] - means[1]).abs().amax()
    between = torch.pdist(means.mean(0)).min()
    assert float(between) > 2 * float(within)
    wider = pedestrians(200, num_cameras=6, style_strength=1.6)
    spread = [float(at_joint(x, NOSE).float().view(200, 6, 3).std(1).mean()) for x in (found, wider)]
    assert spread[1] > 1.5 * spread[0]


def test_infrared_is_grey_and_tells_materials() -> None:
    found = pedestrians(100, num_cameras=3, infrared=True)
    assert bool(found.infrared.all())
    assert torch.equal(found.images[..., 0], found.images[..., 1])
    assert torch.equal(found.images[..., 0], found.images[..., 2])
    shoes = at_joint(found, RIGHT_ANKLE)[:, 0].view(100, 3).double()
    skin = at_joint(found, NOSE)[:, 0].view(100, 3).double()
    colours = at_joint(pedestrians(100, num_cameras=1, style_strength=0), RIGHT_ANKLE).double()
    luma = colours @ torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    told = torch.corrcoef(torch.cat([shoes.T, luma[None]]))  # by cameras and by light
    assert float(told.min()) > 0.75
    assert float(told[:3, 3].max()) < 0.999  # light does not tell all of it
    assert float(skin.std()) < 25 < float(shoes.std())  # everybody's skin is alike


def test_sizes_show_the_same() -> None:
    """At twice the resolution joints are at twice the place, and means of 2 x 2 pixels are nearly the picture."""
    options: dict[str, Any] = {"num_cameras": 3, "style_strength": 0, "occlusion": 0.5}
    small, large = pedestrians(30, **options), pedestrians(30, height=128, width=64, **options)
    torch.testing.assert_close(large.joints[..., :2], small.joints[..., :2] * 2)
    assert float((large.joints[..., 2] != small.joints[..., 2]).float().mean()) < 0.01  # beside an occluder's edge
    reduced = large.images.float().view(90, 64, 2, 32, 2, 3).mean((2, 4))
    assert float((reduced - small.images).abs().mean()) < 8


def test_noise_is_normal_and_grows_with_the_style() -> None:
    options: dict[str, Any] = {"num_cameras": 1, "infrared": True, "height": 128, "width": 64}
    found = pedestrians(1, **options).images[0, 2:126, :, 0].double()
    steps = (found[:, 1:] - found[:, :-1])[:, :4] / 255  # beside the body, where the background hardly changes
    assert float(steps.std()) == pytest.approx(0.03 * math.sqrt(2), rel=0.15)
    draws = m._Chance(3).normal(100_000)[0]
    assert abs(draws.mean()) < 0.02
    assert draws.std() == pytest.approx(1, rel=0.02)
    assert np.mean(np.abs(draws) < 1) == pytest.approx(0.6827, abs=0.01)


def test_chance_is_splitmix64() -> None:
    """First numbers of the published generator at state 0, which adds the same constant each time."""
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert [int(word) for word in m._mixed(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    draws = m._Chance(5, np.arange(2000)).uniform(2, 4, 7)
    assert draws.shape == (2000, 7)
    assert (draws.min(), draws.max()) == pytest.approx((2, 4), abs=0.01)
    assert draws.mean(0) == pytest.approx(np.full(7, 3), abs=0.06)
    assert np.abs(np.corrcoef(draws.T) - np.eye(7)).max() < 0.1
    assert np.bincount(m._Chance(5, np.arange(3000)).integers(5, low=2), minlength=6)[2:5].min() > 900


# ------------------------------------------------------------------------------------------------ shapes


def test_capsules_are_all_points_near_a_segment() -> None:
    generator = np.random.default_rng(0)
    canvas = m._Canvas(50, 20)
    a, b = (generator.uniform(0, 32, (6, 2)).astype(np.float32) for _ in range(2))
    b[0] = a[0]  # a disc
    radius = np.array([3, 1, 2.5, 6, -1, 0.7], np.float32)
    found = canvas.capsule(a, b, radius)
    points = np.stack(np.meshgrid(canvas.x, canvas.y), 2).astype(np.float64)
    for one in range(6):
        along = np.linspace(0, 1, 2001)[:, None] * (b[one] - a[one]) + a[one]
        distance = np.sqrt(((points[:, :, None] - along) ** 2).sum(3)).min(2)
        clear = abs(distance - radius[one]) > 0.01
        assert np.array_equal(found[one][clear], (distance < radius[one])[clear])


def test_textures() -> None:
    canvas = m._Canvas(64, 32)
    f, origin = np.full(5, 0.5, np.float32), np.full((5, 2), 8, np.float32)
    plain, rows, columns, checks, dots = canvas.texture(np.arange(5), f, origin)
    u, v = canvas.x.astype(np.float64) - 8, canvas.y.astype(np.float64)[:, None] - 8
    assert not plain.any()
    assert np.array_equal(rows, np.broadcast_to(np.sin(np.pi * v / 2.2) > 0, rows.shape))
    assert np.array_equal(columns, np.broadcast_to(np.sin(np.pi * u / 2.2) > 0, rows.shape))
    assert np.array_equal(checks, (np.sin(np.pi * u / 3) > 0) ^ (np.sin(np.pi * v / 3) > 0))
    assert np.array_equal(dots, (np.sin(np.pi * u / 3) > 0.3) & (np.sin(np.pi * v / 3) > 0.3))


@pytest.mark.parametrize("infrared", [False, True])
def test_joints_are_hidden_where_an_occluder_is(infrared: bool) -> None:
    """A picture differs from the one without occluders in a rectangle, and there alone joints are hidden."""
    options: dict[str, Any] = {"num_cameras": 4, "style_strength": 0, "infrared": infrared}
    free, hidden = pedestrians(60, **options), pedestrians(60, occlusion=1.0, **options)
    assert torch.equal(free.joints[..., :2], hidden.joints[..., :2])
    differs = (free.images != hidden.images).any(3)
    kinds = set()
    for mask, joints in zip(differs, hidden.joints, strict=True):
        x, y, visible = joints.unbind(1)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        assert bool(mask[top:bottom, left:right].float().mean() > 0.8)  # colours may agree by chance
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        assert torch.equal(visible == 0, inside)
        kinds.add((int(bottom) == 64, int(right - left) == 32))
        assert 0.29 < float((bottom - top) * (right - left)) / 2048 < 0.62
    assert kinds == {(True, True), (True, False), (False, True)}


def test_occlusion_is_a_probability() -> None:
    free, some = pedestrians(250), pedestrians(250, occlusion=0.4)
    share = float((free.images != some.images).flatten(1).any(1).float().mean())
    assert share == pytest.approx(0.4, abs=0.05)
    assert bool((some[(free.images == some.images).flatten(1).all(1)].joints[..., 2] == 1).all())


# ------------------------------------------------------------------------------------------------ splits

SMALL: dict[str, Any] = {"train_ids": 4, "test_ids": 3}
FEW = {"unlabelled_cameras": 5, "unlabelled_ids": 2}


def test_retrieval_and_occlusion_split() -> None:
    plain, occluded = splits.retrieval_split(**SMALL), splits.occlusion_split(**SMALL)
    for split in (plain, occluded):
        assert (len(split.train), len(split.query), len(split.gallery)) == (16, 6, 12)
        assert split.unlabelled is None
    assert bool((plain.query.joints[..., 2] == 1).all())
    assert bool((occluded.query.joints[..., 2] == 0).any(1).all())
    assert len(splits.retrieval_split(num_cameras=3, **SMALL).train) == 12
    with pytest.raises(ValueError, match="num_cameras must be 2 or more"):
        splits.retrieval_split(num_cameras=1)


def test_cross_modality_split() -> None:
    split = splits.cross_modality_split(**SMALL)
    assert (len(split.train), len(split.query), len(split.gallery)) == (32, 12, 12)
    assert bool(split.query.infrared.all())
    assert not bool(split.gallery.infrared.any())
    assert torch.equal(split.train.infrared, split.train.cameras >= 4)
    assert split.train.ids[split.train.infrared].bincount().tolist() == [4] * 4


def test_pretraining_split() -> None:
    split = splits.pretraining_split(**SMALL, **FEW)
    assert split.unlabelled is not None
    assert (len(split.train), len(split.query), len(split.gallery), len(split.unlabelled)) == (16, 6, 12, 20)
    assert len(split.unlabelled.ids.unique()) == 10
    assert set(split.query.cameras.tolist()).isdisjoint(split.gallery.cameras.tolist())
    with pytest.raises(ValueError, match="unlabelled_cameras must be 1 or more, not 0"):
        splits.pretraining_split(**SMALL, unlabelled_cameras=0)


def test_generalization_split() -> None:
    split = splits.generalization_split(**SMALL, **FEW)
    assert split.unlabelled is not None
    assert (len(split.train), len(split.query), len(split.gallery), len(split.unlabelled)) == (48, 12, 24, 30)
    assert split.train.ids.unique().tolist() == list(range(12))
    assert split.train.domains.unique().tolist() == [0, 1, 2]
    targets = split.targets()
    assert [query.domains.unique().tolist() for query, _ in targets] == [[3], [4]]
    for query, gallery in targets:
        assert torch.equal(query.ids.unique(), gallery.ids.unique())
        assert set(query.cameras.tolist()).isdisjoint(gallery.cameras.tolist())
    assert set(targets[0][0].ids.tolist()).isdisjoint(targets[1][0].ids.tolist())
    assert set(split.train.cameras.tolist()).isdisjoint(
        torch.cat([split.query.cameras, split.gallery.cameras]).tolist()
    )
    for name in ("source_domains", "target_domains"):
        with pytest.raises(ValueError, match="domains must be 1 or more"):
            splits.generalization_split(**{name: 0})


@pytest.mark.parametrize(
    "make",
    [
        splits.retrieval_split,
        splits.occlusion_split,
        splits.cross_modality_split,
        lambda **options: splits.pretraining_split(**options, **FEW),
        lambda **options: splits.generalization_split(**options, **FEW),
    ],
)
def test_parts_share_no_picture_and_training_nobody(make: Any) -> None:
    split = make(**SMALL)
    parts = [part for part in (split.train, split.query, split.gallery, split.unlabelled) if part is not None]
    everything = PedestrianImages.concatenate(parts)
    assert len(everything.images.flatten(1).unique(dim=0)) == len(everything)
    people = [set(part.ids.tolist()) for part in parts]
    assert people[1] == people[2]
    assert people[0].isdisjoint(people[1])
    assert all(people[-1].isdisjoint(other) for other in people[:-1]) or split.unlabelled is None
    other = make(seed=1, **SMALL)
    assert not bool((other.query.joints == split.query.joints).all(2).any())
    assert make(height=32, width=16, **SMALL).train.images.shape[1:] == (32, 16, 3)
