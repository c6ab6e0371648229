"""Rendered pedestrians for re-identification: people in clothes of their own, seen by cameras of different styles.

A person has colours and textures of clothes, a bag or none, build and height; a picture shows it in a random phase of
walking and width of view, by the style of its camera (gains, offset, gamma, saturation, blur, noise, background), by
light or in infrared, where each material has one grey value, and maybe partly behind an occluder. The 17 COCO joints
are known, with their visibility. Everything is drawn on a grid of 64 x 32 units, so that the size in pixels changes
nothing but the resolution.

Every random number is a hash (splitmix64) of what it belongs to: a person's of (identity_seed, identity), a camera's of
(style_seed, camera), a picture's of (seed, identity, camera, number, infrared). A picture is thus the same in any set.

The distributions are our choice, such that pictures of known styles are easy to tell apart, those of unseen styles hard
and people seen by light hard to find in infrared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Array = Any  # numpy.ndarray, float32 unless it is said; its arithmetic has no types

UNITS = (64, 32)  # height and width that poses are given in
MIN_SIZE = (16, 8)  # pixels
MAX_STRENGTH = 3.0  # beyond, channels vanish
_CHUNK = 16  # pictures at a time: their maps stay in the cache
_LEVELS = 64  # of the background's mixture of two colours
# Rows of a palette after the levels of the background; a texture's second colour follows its first.
_UPPER, _UPPER2, _LOWER, _LOWER2, _BAG, _SHOE, _HAIR, _SKIN, _OCCLUDER, _OCCLUDER2 = range(_LEVELS, _LEVELS + 10)
_GARMENTS = 6  # of these materials, the first, have random hues
_PLAIN, _ROWS, _COLUMNS, _CHECKS, _DOTS = range(5)  # textures
_SHORTS, _SKIRT = 1, 2  # 0: trousers
_BACKPACK, _HAND_BAG, _STRAP = 1, 2, 3  # 0: no bag
_PEOPLE, _STYLES, _PICTURES = range(3)  # what random numbers are of


@dataclass(frozen=True, eq=False)
class PedestrianImages:
    """Pictures of people; rows of all fields belong together."""

    images: Tensor  # uint8 [N, H, W, 3]
    ids: Tensor  # int64 [N]
    cameras: Tensor  # int64 [N]
    domains: Tensor  # int64 [N]
    infrared: Tensor  # bool [N]
    joints: Tensor  # float32 [N, 17, 3]: x, y in pixels, visibility 0 or 1; COCO's order

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> PedestrianImages:
        """The pictures `rows`: int64 numbers, bool [N] or a slice."""
        return PedestrianImages(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[PedestrianImages]) -> PedestrianImages:
        """All pictures of `parts` in their order; ValueError where there are none or sizes differ."""
        sizes = {tuple(part.images.shape[1:3]) for part in parts}
        if len(sizes) != 1:
            raise ValueError(
                f"parts must be one or more sets of pictures of one size, not of {sorted(sizes) or 'none'}"
            )
        columns = ([getattr(part, field.name) for part in parts] for field in fields(PedestrianImages))
        return PedestrianImages(*(torch.cat(column) for column in columns))


def pedestrians(
    num_ids: int,
    *,
    num_cameras: int = 4,
    images_per_camera: int = 1,
    height: int = 64,
    width: int = 32,
    style_strength: float = 0.6,
    occlusion: float = 0.0,
    infrared: bool = False,
    first_id: int = 0,
    identity_seed: int = 0,
    style_seed: int = 0,
    seed: int = 0,
    first_camera: int = 0,
    domain: int = 0,
) -> PedestrianImages:
    """Pictures of `num_ids` people, each `images_per_camera` times by each camera, ordered by person, then camera.

    Args:
        num_ids: number of people; they are numbered from `first_id`.
        num_cameras: number of cameras, numbered from `first_camera`.
        height, width: pixels, at least 16 and 8.
        style_strength: how far styles are from neutral, 0 to 3; 0.6 is usual, 0.8 wide.
        occlusion: probability of an occluder: the lower part, a side or a band of the picture.
        infrared: the same people by their materials' infrared reflectance, in grey.
        identity_seed: with its number, decides who a person is.
        style_seed: with its number, decides a camera's style.
        seed: of poses, occluders and noise.
        domain: written into `domains`.

    Raises:
        ValueError: a number is out of range.
    """
    counts = {"num_ids": num_ids, "num_cameras": num_cameras, "images_per_camera": images_per_camera}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    for name, value in {"first_id": first_id, "first_camera": first_camera}.items():
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    for name, value, least in zip(("height", "width"), (height, width), MIN_SIZE, strict=True):
        if value < least:
            raise ValueError(f"{name} must be at least {least} pixels, not {value}")
    if not 0 <= style_strength <= MAX_STRENGTH:
        raise ValueError(f"style_strength must be 0 to {MAX_STRENGTH}, not {style_strength}")
    if not 0 <= occlusion <= 1:
        raise ValueError(f"occlusion must be a probability, 0 to 1, not {occlusion}")
    shape = (num_ids, num_cameras, images_per_camera)
    ids, cameras, numbers = (grid.ravel() for grid in np.indices(shape, np.int64))
    ids, cameras = ids + first_id, cameras + first_camera
    images = np.empty((len(ids), height, width, 3), np.uint8)
    joints = np.empty((len(ids), 17, 3), np.float32)
    for begin in range(0, len(ids), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        people = _people(_Chance(_PEOPLE, identity_seed, ids[rows]))
        style = _style(_Chance(_STYLES, style_seed, cameras[rows]), style_strength)
        chance = _Chance(_PICTURES, seed, ids[rows], cameras[rows], numbers[rows], int(infrared))
        images[rows], joints[rows] = _rendered(people, style, chance, (height, width), occlusion, infrared)
    return PedestrianImages(
        torch.from_numpy(images),
        torch.from_numpy(ids),
        torch.from_numpy(cameras),
        torch.full((len(ids),), domain),
        torch.full((len(ids),), infrared),
        torch.from_numpy(joints),
    )


# ------------------------------------------------------------------------------------------------ chance


class _Chance:
    """Random numbers of n things, each a function of that thing's words and of how many were drawn before."""

    def __init__(self, *words: int | _Array) -> None:
        key = np.zeros(1, np.uint64)
        for word in words:
            number = word.astype(np.uint64) if isinstance(word, np.ndarray) else np.uint64(word % 2**64)
            key = _mixed(key ^ number)
        self._key: _Array = key  # [n]
        self._drawn = 0

    def words(self, count: int) -> _Array:
        """64 random bits each, [n, count]."""
        steps = np.arange(self._drawn, self._drawn + count, dtype=np.uint64)
        self._drawn += count
        return _mixed(self._key[:, None] + steps * np.uint64(0xD1342543DE82EF95))

    def uniform(self, low: float, high: float, *shape: int) -> _Array:
        """[n, *shape], from low to high."""
        bits = self.words(int(np.prod(shape))) >> np.uint64(11)
        return (low + (high - low) * (bits * 2.0**-53)).astype(np.float32).reshape(-1, *shape)

    def integers(self, count: int, low: int = 0) -> _Array:
        """[n], low to count - 1."""
        return low + (self.words(1)[:, 0] % np.uint64(count - low)).astype(np.int64)

    def normal(self, *shape: int) -> _Array:
        """[n, *shape], standard normal, rounded to one of 65536 quantiles."""
        count = int(np.prod(shape))
        quarters = self.words(-(-count // 4)).view(np.uint16)[:, :count]
        return _normal_quantiles()[quarters].reshape(-1, *shape)


def _mixed(words: _Array) -> _Array:
    """The hash of splitmix64 (Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


@cache
def _normal_quantiles() -> _Array:
    ranks = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return np.asarray(torch.special.ndtri(ranks).float().numpy())


def _hsv(hue: _Array, saturation: _Array, value: _Array) -> _Array:
    """[..., 3] of red, green, blue."""
    k = (np.array([5, 3, 1], np.float32) + 6 * hue[..., None]) % 6
    chroma = (value * saturation)[..., None]
    return value[..., None] - chroma * np.clip(np.minimum(k, 4 - k), 0, 1)


def _luma(colours: _Array) -> _Array:
    """[...] of colours [..., 3]; no matrix product, whose bits would depend on how many there are."""
    return 0.3 * colours[..., 0] + 0.6 * colours[..., 1] + 0.1 * colours[..., 2]


# ------------------------------------------------------------------------------------------------ people, styles


@dataclass(frozen=True)
class _People:
    """Who is in each of n pictures."""

    colours: _Array  # [n, 8, 3] of _UPPER .. _SKIN
    reflectances: _Array  # [n, 8, 1] in infrared
    textures: _Array  # [n, 2] upper, lower
    frequencies: _Array  # [n, 2] of the textures
    long_sleeves: _Array  # [n]
    legs: _Array  # [n] trousers, shorts or skirt
    bag: _Array  # [n]
    build: _Array  # [n] width of the body
    tall: _Array  # [n] height


def _people(chance: _Chance) -> _People:
    garments = _hsv(*(chance.uniform(*ends, _GARMENTS) for ends in ((0, 1), (0.3, 0.9), (0.25, 0.9))))
    hair = _hsv(chance.uniform(0.02, 0.12, 1), np.array([[0.5]], np.float32), chance.uniform(0.1, 0.5, 1))
    skin = _hsv(np.array([[0.07]], np.float32), np.array([[0.45]], np.float32), chance.uniform(0.5, 0.9, 1))
    dye = chance.uniform(0.15, 0.9, _GARMENTS + 1)  # what of the reflectance the colour does not tell
    worn = np.clip(0.85 * _luma(garments) / 0.8 + 0.15 * dye[:, :_GARMENTS], 0.05, 0.95)
    reflectances = np.concatenate([worn, 0.3 + 0.4 * dye[:, _GARMENTS:], np.full_like(dye[:, :1], 0.8)], 1)
    return _People(
        colours=np.concatenate([garments, hair, skin], 1),
        reflectances=reflectances[..., None],
        textures=np.stack([chance.integers(5), chance.integers(4)], 1),
        frequencies=chance.uniform(0.35, 0.8, 2),
        long_sleeves=chance.integers(2) > 0,
        legs=chance.integers(3),
        bag=chance.integers(4),
        build=chance.uniform(0.85, 1.2),
        tall=chance.uniform(0.93, 1.06),
    )


@dataclass(frozen=True)
class _Style:
    """How the cameras of n pictures see."""

    gains: _Array  # [n, 1, 3]
    offset: _Array  # [n, 1, 1]
    gamma: _Array  # [n, 1, 1]
    grey: _Array  # [n, 1, 1] share of luma in every channel
    noise: _Array  # [n] standard deviation
    blur: _Array  # [n]
    grounds: _Array  # [n, 2, 3] colours of the background
    frequency: _Array  # [n] of its waves


def _style(chance: _Chance, strength: float) -> _Style:
    def about(low: float, high: float, *shape: int) -> _Array:
        return np.float32(strength) * chance.uniform(low, high, *shape)

    return _Style(
        gains=1 + about(-0.3, 0.3, 1, 3),
        offset=about(-0.08, 0.08, 1, 1),
        gamma=np.exp(about(-0.4, 0.4, 1, 1)),
        grey=np.minimum(about(0, 0.25, 1, 1), 1),
        noise=about(0.01, 0.05),
        blur=chance.uniform(0, 1) < 0.3 * strength,
        grounds=_hsv(
            chance.uniform(0, 1, 2),
            chance.uniform(0.05, 0.4, 2),
            np.stack([chance.uniform(0.3, 0.8), chance.uniform(0.2, 0.7)], 1),
        ),
        frequency=chance.uniform(0.05, 0.3),
    )


# ------------------------------------------------------------------------------------------------ pictures


def _rendered(
    people: _People, style: _Style, chance: _Chance, size: tuple[int, int], occlusion: float, infrared: bool
) -> tuple[_Array, _Array]:
    """Images uint8 [n, H, W, 3] and joints [n, 17, 3] of n pictures."""
    canvas = _Canvas(*size)
    joints, width = _pose(people, chance)  # units
    materials = _background(canvas, style, chance)
    _draw_body(materials, canvas, people, joints, width)
    covered = _draw_occluder(materials, canvas, chance, occlusion)
    palette = _palette(people, style, chance, infrared)
    values = _colours(palette, materials)  # [n, H, W, C]
    noise = np.full_like(style.noise, 0.03) if infrared else style.noise
    values += noise[:, None, None, None] * chance.normal(*values.shape[1:])
    if style.blur.any():
        values[style.blur] = _blurred(values[style.blur], max(1, round(size[0] / UNITS[0])))
    values *= 255
    values += 0.5
    images = np.clip(values, 0, 255, out=values).astype(np.uint8)
    pixels = joints / np.array([canvas.unit_x, canvas.unit_y], np.float32)
    column, row = pixels[..., 0].astype(np.int64), pixels[..., 1].astype(np.int64)
    visible = ~covered[np.arange(len(pixels))[:, None], row, column]
    return np.broadcast_to(images, (*images.shape[:3], 3)), np.concatenate([pixels, visible[..., None]], 2)


class _Canvas:
    """Centres of the pixels in units: x [W], y [H]."""

    def __init__(self, height: int, width: int) -> None:
        self.unit_y, self.unit_x = UNITS[0] / height, UNITS[1] / width  # units a pixel
        self.y = ((np.arange(height) + 0.5) * self.unit_y).astype(np.float32)
        self.x = ((np.arange(width) + 0.5) * self.unit_x).astype(np.float32)

    def capsule(self, a: _Array, b: _Array, radius: _Array) -> _Array:
        """Pixels [n, H, W] within `radius` [n] of the segments from a to b, [n, 2]; none where the radius is negative.

        With the foot of the perpendicular at u of the segment and t = u clipped to 0..1, the squared distance of p is
        |p - a|^2 - |b - a|^2 t (2 u - t).
        """
        d = b - a
        square = np.maximum((d * d).sum(1), 1e-6)[:, None]  # |b - a|^2
        px, py = self.x - a[:, :1], self.y - a[:, 1:]
        u = (py * (d[:, 1:] / square))[:, :, None] + (px * (d[:, :1] / square))[:, None]
        t = np.clip(u, 0, 1)
        u += u
        u -= t
        u *= t
        u *= square[:, None]
        return (py * py)[:, :, None] + (px * px - (radius * abs(radius))[:, None])[:, None] < u

    def texture(self, kind: _Array, frequency: _Array, origin: _Array) -> _Array:
        """Where [n, H, W] a texture has its second colour; kind, frequency [n], origin [n, 2]."""
        small = kind[:, None] >= _CHECKS  # two dimensions
        angle = np.where(small, 2 * np.pi / 3, 2 * np.pi / 2.2).astype(np.float32) * frequency[:, None]
        least = np.where(kind[:, None] == _DOTS, np.float32(0.3), np.float32(0))
        columns = (np.sin(angle * (self.x - origin[:, :1])) > least) & (small | (kind[:, None] == _COLUMNS))
        rows = (np.sin(angle * (self.y - origin[:, 1:])) > least) & (small | (kind[:, None] == _ROWS))
        across, down = columns[:, None], rows[:, :, None]
        return np.where((kind == _DOTS)[:, None, None], down & across, down ^ across)


def _pose(people: _People, chance: _Chance) -> tuple[_Array, _Array]:
    """Joints [n, 17, 2] in units, and the width [n] of the body as it is seen."""
    centre, top = UNITS[1] / 2 + chance.uniform(-2, 2), 4 + chance.uniform(-1.5, 1.5)
    scale = people.tall * chance.uniform(0.92, 1.02)
    swing = np.sin(chance.uniform(0, 2 * np.pi))
    w = people.build * chance.uniform(0.6, 1)
    joints = np.empty((len(w), 17, 2), np.float32)
    face = ((0, 4), (1, 3), (-1, 3), (2, 4), (-2, 4))  # nose, eyes, ears; a person's left is on the right
    for joint, (x, y) in enumerate(face):
        joints[:, joint] = np.stack([centre + x, top + y * scale], 1)
    for left, out, forward, y, same in (  # same: 1 where left and right swing alike, -1 where against each other
        (5, 4.5, 0, 11, 1),  # shoulders, then elbows, wrists
        (7, 5.5, -1, 18, 1),
        (9, 5.5, -2.5, 25, 1),
        (11, 2.8, 0, 28, -1),  # hips, then knees, ankles
        (13, 2.8, 2, 40, -1),
        (15, 2.8, 3, 52, -1),
    ):
        joints[:, left] = np.stack([centre + out * w + same * forward * swing, top + y * scale], 1)
        joints[:, left + 1] = np.stack([centre - out * w + forward * swing, top + y * scale], 1)
    return joints, w


def _background(canvas: _Canvas, style: _Style, chance: _Chance) -> _Array:
    """Levels [n, H, W] of a wavy mixture of two colours."""
    frequency, phase = style.frequency[:, None], chance.uniform(0, 1)[:, None]
    rows = np.sin(canvas.y * (2 * frequency) + 6 * phase)[:, :, None]
    columns = np.sin(canvas.x * (3 * frequency) + 9 * phase)[:, None]
    share = 0.25 * (_LEVELS - 1)
    return (share * rows + (share * columns + (2 * share + 0.5))).astype(np.uint8)


def _draw_body(materials: _Array, canvas: _Canvas, people: _People, joints: _Array, width: _Array) -> None:
    """Legs, bag, trunk, arms and head, in this order."""
    build, origin = people.build, joints[:, 0]
    upper, lower = (
        (first + canvas.texture(people.textures[:, side], people.frequencies[:, side], origin)).astype(np.uint8)
        for side, first in enumerate((_UPPER, _LOWER))
    )
    shins = np.where((people.legs == _SHORTS)[:, None, None], np.uint8(_SKIN), lower)
    sleeves = np.where(people.long_sleeves[:, None, None], upper, np.uint8(_SKIN))

    def draw(material: int | _Array, a: _Array, b: _Array, radius: float | _Array) -> None:
        radius = np.broadcast_to(np.float32(radius), width.shape)
        np.copyto(materials, np.asarray(material, np.uint8), where=canvas.capsule(a, b, radius))

    def shifted(point: _Array, x: float, y: float) -> _Array:
        return point + np.array([x, y], np.float32)

    def only(kind: int, radius: float | _Array) -> _Array:
        return np.where(people.bag == kind, np.float32(radius), np.float32(-1))

    chest, hips, knees = (joints[:, pair].mean(1) for pair in ([5, 6], [11, 12], [13, 14]))
    for hip, knee, ankle in ((11, 13, 15), (12, 14, 16)):
        draw(lower, joints[:, hip], joints[:, knee], 2.6 * build)
        draw(shins, joints[:, knee], joints[:, ankle], 2.1 * build)
        draw(_SHOE, joints[:, ankle], shifted(joints[:, ankle], 1.2, 1), 1.7)
    draw(lower, hips, knees, np.where(people.legs == _SKIRT, 4.6 * build, np.float32(-1)))
    draw(_BAG, shifted(chest, 0, 3), shifted(hips, 0, -4), only(_BACKPACK, 6 * width))
    draw(upper, shifted(chest, 0, 2.5), hips, 4.2 * width * build)
    for shoulder, elbow, wrist in ((5, 7, 9), (6, 8, 10)):
        draw(upper, joints[:, shoulder], joints[:, elbow], 1.7 * build)
        draw(sleeves, joints[:, elbow], joints[:, wrist], 1.4 * build)
        draw(_SKIN, joints[:, wrist], shifted(joints[:, wrist], 0, 1), 1.2)
    draw(_BAG, shifted(joints[:, 9], 0, 2), shifted(joints[:, 9], 0, 6), only(_HAND_BAG, 2.4))
    draw(_BAG, joints[:, 5], joints[:, 12], only(_STRAP, 0.9))
    draw(_SKIN, origin, shifted(origin, 0, 1), 3.1)
    draw(_HAIR, shifted(origin, -1, -3), shifted(origin, 1, -3), 2.1)


def _draw_occluder(materials: _Array, canvas: _Canvas, chance: _Chance, probability: float) -> _Array:
    """Where [n, H, W] an occluder hides the picture: nowhere, below a row, beside a column or in a band of rows."""
    height, width = materials.shape[1:]
    kind = chance.integers(3)
    row, column, start, tall = (chance.uniform(*ends) for ends in ((0.4, 0.7), (0.35, 0.55), (0, 0.45), (0.35, 0.5)))
    right, hidden = chance.uniform(0, 1) < 0.5, chance.uniform(0, 1) < probability
    top = np.select([kind == 0, kind == 2], [row, start], 0)
    bottom = np.where(kind == 2, start + tall, 1)
    left = np.where((kind == 1) & right, 1 - column, 0)
    end = np.where((kind == 1) & ~right, column, 1)
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < end[:, None]) & hidden[:, None]
    covered = rows[:, :, None] & columns[:, None]
    kinds, frequency = chance.integers(5, low=1), chance.uniform(0.3, 0.9)
    if covered.any():
        texture = canvas.texture(kinds, frequency, np.zeros((len(kind), 2), np.float32))
        np.copyto(materials, (_OCCLUDER + texture).astype(np.uint8), where=covered)
    return covered


def _palette(people: _People, style: _Style, chance: _Chance, infrared: bool) -> _Array:
    """Colours [n, levels and materials, 3] as the camera sees them, or one channel in infrared."""
    share = np.linspace(0, 1, _LEVELS, dtype=np.float32)[:, None]
    ground = style.grounds[:, :1] * share + style.grounds[:, 1:] * (1 - share)
    occluder = _hsv(chance.uniform(0, 1, 1), chance.uniform(0, 0.7, 1), chance.uniform(0.2, 0.8, 1))
    occluders = np.concatenate([occluder, 0.7 * occluder + 0.3 * chance.uniform(0, 1, 1, 3)], 1)
    if infrared:
        grey = 0.15 + 0.5 * ground.mean(2, keepdims=True)
        seen = np.concatenate([grey, people.reflectances, occluders.mean(2, keepdims=True)], 1)
        return seen ** chance.uniform(0.85, 1.2, 1, 1) * chance.uniform(0.9, 1.1, 1, 1)
    colours = np.concatenate([ground, people.colours, occluders], 1)
    colours += style.grey * (_luma(colours)[..., None] - colours)
    return np.clip(colours * style.gains + style.offset, 0, 1) ** style.gamma


def _colours(palette: _Array, materials: _Array) -> _Array:
    """[n, H, W, C] of the palettes [n, M, C]."""
    n, m, channels = palette.shape
    rows = materials + (m * np.arange(n, dtype=np.int64))[:, None, None]
    return palette.reshape(n * m, channels).take(rows, axis=0)


def _blurred(values: _Array, step: int) -> _Array:
    """Means [n, H, W, C] of each pixel and those `step` pixels above, below, left and right; edges are repeated."""
    wide = np.pad(values, ((0, 0), (step, step), (step, step), (0, 0)), mode="edge")
    inner = slice(step, -step)
    beside = wide[:, inner, : -2 * step] + wide[:, inner, 2 * step :]
    beside += wide[:, : -2 * step, inner] + wide[:, 2 * step :, inner]
    beside += values
    beside /= 5
    return beside
