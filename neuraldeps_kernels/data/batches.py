"""Batches for the training of re-identification: pictures, samplers, augmentation.

    Pictures -> sampler: rows of a step -> Augmentation: views of them -> Batch

Batch t is a function of the seed and t alone, so that training goes on after an interruption without a state to keep.
Images are float32 [N, 3, H, W], (value / 255 - mean) / std by channel. Coordinates are in pixels, where pixel i is the
interval [i, i + 1).
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset

from neuraldeps_kernels.data.reid_folders import ReidSplit
from neuraldeps_kernels.data.samplers import DomainBalancedSampler

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# COCO's 17 joints in a mirror: left and right change places.
MIRRORED_JOINTS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


@dataclass(frozen=True, eq=False)
class View:
    """One augmented view of each original picture."""

    images: Tensor  # float32 [N, 3, H, W]
    boxes: Tensor  # float32 [N, 4]: x0, y0, x1, y1 of what is shown, in pixels of the original; may reach beyond it
    flipped: Tensor  # bool [N]: mirrored after the crop


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures of a step. With `views`, `images` and `joints` are those of the originals: resized, not augmented."""

    images: Tensor  # float32 [N, 3, H, W]
    ids: Tensor  # int64 [N]: 0 .. num_ids - 1; -1 in batches without labels
    cameras: Tensor  # int64 [N]
    domains: Tensor  # int64 [N]
    infrared: Tensor  # bool [N]
    joints: Tensor | None = None  # float32 [N, 17, 3]: x, y in pixels of `images`, visibility
    views: tuple[View, ...] = ()
    unlabelled: Batch | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_pictures(self) -> int:
        """Of both streams, views not counted."""
        return len(self) + (0 if self.unlabelled is None else len(self.unlabelled))

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, for DataLoader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, tuple):
                return tuple(changed(entry) for entry in value)
            if isinstance(value, (View, Batch)):
                return type(value)(*(changed(getattr(value, field.name)) for field in fields(value)))
            return value

        return changed(self)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ pictures


class Pixels(Protocol):
    """Pictures by their numbers."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] of rows int64 [n]."""


class Pictures(Protocol):
    """What is known of N pictures: PedestrianImages, FolderImages."""

    @property
    def images(self) -> Pixels: ...
    @property
    def ids(self) -> Tensor: ...  # int64 [N]
    @property
    def cameras(self) -> Tensor: ...  # int64 [N]
    @property
    def domains(self) -> Tensor: ...  # int64 [N]
    @property
    def infrared(self) -> Tensor: ...  # bool [N]
    @property
    def joints(self) -> Tensor | None: ...  # float32 [N, 17, 3]: x, y in pixels, visibility
    def __len__(self) -> int: ...


class FolderImages:
    """Pictures of a split of a data set on disk, read when they are asked for.

    Args:
        split: paths, identities and cameras (data/reid_folders.py).
        height, width: pixels that pictures are resized to (bilinear).
        infrared_cameras: cameras whose pictures are infrared.
        joints: `.npz` file of `names` [M], file names, and `joints` float [M, 17, 3]: x and y as parts of the width and
            height, 0..1, and visibility 0..1, in COCO's order; None: pictures without joints.
        domain: written into `domains`.
        threads: that read pictures.

    Raises:
        ValueError: a size is not positive; the file of joints cannot be read or lacks a picture. `images[rows]` raises
            it for a picture that cannot be read, which the message names.
    """

    def __init__(
        self,
        split: ReidSplit,
        height: int,
        width: int,
        *,
        infrared_cameras: Sequence[int] = (),
        joints: str | Path | None = None,
        domain: int = 0,
        threads: int = 4,
    ) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ImportError('reading pictures needs Pillow: pip install "neuraldeps_kernels[reid]"')
        if min(height, width, threads) < 1:
            raise ValueError(f"height, width and threads must be positive, not {height}, {width} and {threads}")
        self.images = _Files(split.paths, (width, height), threads)
        self.ids, self.cameras = split.ids, split.cameras
        self.domains = torch.full_like(split.ids, domain)
        self.infrared = torch.isin(split.cameras, torch.tensor(infrared_cameras, dtype=torch.int64))
        self.joints = None if joints is None else _stored_joints(Path(joints), split.paths, (width, height))

    def __len__(self) -> int:
        return len(self.ids)


class _Files:
    """images[rows]: uint8 [n, H, W, 3]."""

    def __init__(self, paths: tuple[Path, ...], size: tuple[int, int], threads: int) -> None:
        self.paths, self.size, self.threads = paths, size, threads

    def __getitem__(self, rows: Tensor) -> Tensor:
        paths = [self.paths[row] for row in rows.tolist()]
        with ThreadPoolExecutor(self.threads) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._read, paths))))

    def _read(self, path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from PIL import Image

        try:
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB").resize(self.size, Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: cannot be read as a picture: {error}") from error


def _stored_joints(path: Path, pictures: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """float32 [N, 17, 3] in pixels of pictures of size (W, H)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, joints = file["names"], np.asarray(file["joints"], np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected arrays 'names' and 'joints' in an .npz file: {error}") from error
    if joints.shape != (len(names), 17, 3):
        raise ValueError(f"{path}: joints must be [{len(names)}, 17, 3], one entry a name, not {list(joints.shape)}")
    place = {str(name): row for row, name in enumerate(names)}
    missing = next((picture for picture in pictures if picture.name not in place), None)
    if missing is not None:
        raise ValueError(f"{path}: has no joints of {missing.name}")
    chosen = torch.from_numpy(joints[[place[picture.name] for picture in pictures]])
    return chosen * torch.tensor([*size, 1.0])


# ------------------------------------------------------------------------------------------------ samplers


class PictureSampler(Protocol):
    """Rows of the pictures of each step, from the seed and the step alone."""

    labelled: bool  # whether identities may be looked at
    seed: int

    def __len__(self) -> int:
        """Steps of an epoch."""

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        """For each modality int64 [P, K]; rows of one P belong together."""


class IdentitySampler:
    """P identities and K pictures of each; with K_i > 0, K by light and K_i in infrared of the same P identities.

    In an epoch every identity comes once; the last batch is filled up.

    Args:
        ids: int64 [N].
        identities: P.
        pictures: K, without repetition where an identity has as many.
        infrared: bool [N], needed where K_i > 0.
        infrared_pictures: K_i; 0: modalities are not told apart.
        seed: of the order.

    Raises:
        ValueError: a size is not positive, there are fewer than P identities, or one lacks a modality.
    """

    labelled = True

    def __init__(
        self,
        ids: Tensor,
        *,
        identities: int = 16,
        pictures: int = 4,
        infrared: Tensor | None = None,
        infrared_pictures: int = 0,
        seed: int = 0,
    ) -> None:
        everyone = ids.unique()
        if min(identities, pictures) < 1 or infrared_pictures < 0:
            raise ValueError(
                f"identities and pictures must be positive and infrared_pictures 0 or more, not {identities}, "
                f"{pictures} and {infrared_pictures}"
            )
        if len(everyone) < identities:
            raise ValueError(f"a batch of {identities} identities needs as many, but the pictures show {len(everyone)}")
        kinds = {"": (torch.ones_like(ids, dtype=torch.bool), pictures)}
        if infrared_pictures:
            dark = torch.zeros_like(ids, dtype=torch.bool) if infrared is None else infrared
            kinds = {"visible ": (~dark, pictures), "infrared ": (dark, infrared_pictures)}
        self.identities, self.seed = identities, seed
        self._parts = []
        for name, (chosen, count) in kinds.items():
            if len(lacking := everyone[~torch.isin(everyone, ids[chosen])]):
                raise ValueError(f"identity {int(lacking[0])} has no {name}picture, but batches take {count}")
            rows = chosen.nonzero()[:, 0]
            # Samplers of one seed take the same identities, whatever pictures there are.
            order = DomainBalancedSampler(
                ids[rows],
                torch.zeros_like(rows),
                identities_per_domain=identities,
                pictures_per_identity=count,
                seed=seed,
            )
            self._parts.append((rows, order))
        self._epoch, self._drawn = -1, list[Tensor]()

    def __len__(self) -> int:
        return len(self._parts[0][1])

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            for _, order in self._parts:
                order.set_epoch(epoch)
            self._drawn = [rows[torch.tensor(list(order))] for rows, order in self._parts]  # [steps, P K] each
            self._epoch = epoch
        return tuple(drawn[number].view(self.identities, -1) for drawn in self._drawn)


class UniformSampler:
    """Pictures in random order whoever they show, each once in an epoch; an incomplete last batch is left out.

    Raises ValueError for fewer pictures than a batch has.
    """

    labelled = False

    def __init__(self, number: int, *, size: int = 64, seed: int = 0) -> None:
        if not 1 <= size <= number:
            raise ValueError(f"size of a batch must be in 1..{number}, the number of pictures, not {size}")
        self.number, self.size, self.seed = number, size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.number // self.size

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            self._order = torch.randperm(self.number, generator=_generator(self.seed, epoch))
            self._epoch = epoch
        return (self._order[number * self.size : (number + 1) * self.size, None],)


def _generator(*numbers: int) -> torch.Generator:
    """Random numbers that belong to `numbers`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# ------------------------------------------------------------------------------------------------ augmentation


@dataclass(frozen=True)
class Augmentation:
    """Random views, each picture by itself: grey, crop, shift, mirror, erase, in this order.

    A view is read from its box by bilinear interpolation; what lies beyond the picture or is erased is 0, the mean.
    """

    flip: float = 0.5  # probability
    pad: int = 0  # pixels; the box is moved by up to so many in x and in y
    crop: tuple[float, float] = (1.0, 1.0)  # range of the box's area over the picture's
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # range of height / width over the picture's; for crop < 1
    grey: float = 0.0  # probability
    erase: float = 0.0  # probability
    erase_area: tuple[float, float] = (0.02, 0.4)  # range over that of the view
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)  # range of height / width
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("flip", "grey", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, 0 to 1, not {getattr(self, name)}")
        for name, most in (("crop", 1.0), ("erase_area", 1.0), ("crop_ratio", math.inf), ("erase_ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must be a range in 0..{most}, not {low} to {high}")
        if self.pad < 0 or min(self.std) <= 0:
            raise ValueError(f"pad must be 0 or more and std positive, not {self.pad} and {self.std}")

    def original(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, H, W] of uint8 [N, H, W, 3]."""
        return self._normalised(_unit_range(pixels))

    def __call__(self, pixels: Tensor, joints: Tensor | None, generator: torch.Generator) -> tuple[View, Tensor | None]:
        """A view of each picture uint8 [N, H, W, 3], and where its joints [N, 17, 3] are in it."""
        N, H, W, _ = pixels.shape
        chance = torch.rand(12, N, generator=generator)
        images = _unit_range(pixels)
        images = torch.where((chance[0] < self.grey)[:, None, None, None], images.mean(1, keepdim=True), images)
        boxes = _boxes(self.crop, self.crop_ratio, chance[1:5], H, W)
        boxes += (chance[[5, 6, 5, 6]].mT * (2 * self.pad + 1)).floor() - self.pad
        flipped = chance[7] < self.flip
        erased = _boxes(self.erase_area, self.erase_ratio, chance[8:12], H, W, square=True)
        erased[torch.rand(N, generator=generator) >= self.erase] = -1  # a box beyond the picture
        images = _cropped(self._normalised(images), boxes, flipped)
        if self.erase:
            images = images.masked_fill(_inside(_pixel_centres(H, W), erased).view(N, 1, H, W), 0.0)
        return View(images, boxes, flipped), None if joints is None else _moved(joints, boxes, flipped, erased, H, W)

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def _unit_range(pixels: Tensor) -> Tensor:
    """float32 [N, 3, H, W] in 0..1 of uint8 [N, H, W, 3]."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)


def _boxes(
    area: tuple[float, float],
    ratio: tuple[float, float],
    chance: Tensor,
    H: int,
    W: int,
    *,
    square: bool = False,
) -> Tensor:
    """Random boxes [N, 4] in a picture from chance [4, N] in 0..1; `ratio` is relative to H / W unless `square`."""
    shape = H / W if square else 1.0
    part = area[0] + (area[1] - area[0]) * chance[0]
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** chance[1] if area[0] < 1 else torch.ones_like(part)
    h = H * (part * aspect / shape).sqrt().clamp_max(1)
    w = W * (part / aspect * shape).sqrt().clamp_max(1)
    x, y = chance[2] * (W - w), chance[3] * (H - h)
    return torch.stack([x, y, x + w, y + h], 1)


def _cropped(images: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
    """The boxes of images [N, 3, H, W] in their size, mirrored where `flipped`."""
    size = torch.tensor([images.shape[3], images.shape[2]])
    scale = (boxes[:, 2:] - boxes[:, :2]) / size
    centre = (boxes[:, 2:] + boxes[:, :2]) / size - 1
    scale[:, 0] *= torch.where(flipped, -1.0, 1.0)
    to_picture = torch.cat([torch.diag_embed(scale), centre[:, :, None]], 2)  # [N, 2, 3], of coordinates in -1..1
    return grid_sample(images, affine_grid(to_picture, list(images.shape), align_corners=False), align_corners=False)


def _moved(joints: Tensor, boxes: Tensor, flipped: Tensor, erased: Tensor, H: int, W: int) -> Tensor:
    """Joints [N, 17, 3] as they lie in the view; those outside or erased are not visible."""
    place = (joints[..., :2] - boxes[:, None, :2]) / (boxes[:, None, 2:] - boxes[:, None, :2])
    place = place * torch.tensor([W, H])
    mirrored = torch.stack([W - place[..., 0], place[..., 1]], -1)[:, MIRRORED_JOINTS]
    place = torch.where(flipped[:, None, None], mirrored, place)
    visibility = torch.where(flipped[:, None], joints[:, MIRRORED_JOINTS, 2], joints[..., 2])
    frame = torch.tensor([[0.0, 0.0, W, H]])
    seen = _inside(place, frame) & ~_inside(place, erased)
    return torch.cat([place, (visibility * seen)[..., None]], 2)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """bool [N, M]: whether points [N or 1, M, 2] lie in boxes [N or 1, 4]."""
    return ((points >= boxes[:, None, :2]) & (points < boxes[:, None, 2:])).all(2)


def _pixel_centres(H: int, W: int) -> Tensor:
    """x, y [1, H W, 2]."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)[None]


# ------------------------------------------------------------------------------------------------ batches


class Batches(Dataset[Batch]):
    """batches[t]: the batch of step t = 0, 1, ..., those of all ranks together being disjoint parts of one.

    Args:
        pictures: N of them.
        sampler: IdentitySampler(pictures.ids, ...) or, for pictures without labels, UniformSampler(len(pictures)).
        augmentation: of the pictures, or of the views.
        views: 0: `images` are augmented; else so many augmented views beside the originals.
        unlabelled: batches of a second stream, which come as `unlabelled`.
        seed: of the augmentation.

    Attributes:
        num_ids: identities in `pictures`; batches number them 0 .. num_ids - 1 in ascending order of `pictures.ids`.
        rank, world: whose part of every batch this is, see `of_rank`.
    """

    def __init__(
        self,
        pictures: Pictures,
        sampler: PictureSampler,
        augmentation: Augmentation | None = None,
        *,
        views: int = 0,
        unlabelled: Batches | None = None,
        seed: int = 0,
    ) -> None:
        self.pictures, self.sampler, self.views, self.unlabelled, self.seed = pictures, sampler, views, unlabelled, seed
        self.augmentation = Augmentation() if augmentation is None else augmentation
        names, self._labels = pictures.ids.unique(return_inverse=True)
        self.num_ids, self.rank, self.world = len(names), 0, 1

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler)

    def of_rank(self, rank: int, world: int) -> Batches:
        """The part of rank 0 .. world - 1: as many identities (without labels, pictures) of each batch for everyone.

        Raises ValueError where they cannot be shared out equally.
        """
        if (count := len(self.sampler[0][0])) % world:
            raise ValueError(f"{count} identities (without labels, pictures) a batch cannot be shared by {world} ranks")
        result = copy.copy(self)
        result.rank, result.world = rank, world
        result.unlabelled = None if self.unlabelled is None else self.unlabelled.of_rank(rank, world)
        return result

    def settings(self) -> dict[str, Any]:
        """What decides on the batches but the pictures themselves, as JSON-able values."""
        return {
            "pictures": len(self.pictures),
            "identities": self.num_ids,
            "sampler": type(self.sampler).__name__,
            "sizes": [list(part.shape) for part in self.sampler[0]],
            "sampler_seed": self.sampler.seed,
            "augmentation": asdict(self.augmentation),
            "views": self.views,
            "seed": self.seed,
            "unlabelled": None if self.unlabelled is None else self.unlabelled.settings(),
        }

    def __getitem__(self, step: int) -> Batch:
        rows = torch.cat([part.chunk(self.world)[self.rank].flatten() for part in self.sampler[step]])
        pictures, generator = self.pictures, _generator(self.seed, step, self.rank)
        pixels, joints = pictures.images[rows], None if pictures.joints is None else pictures.joints[rows]
        views: tuple[View, ...] = ()
        if self.views:
            views = tuple(self.augmentation(pixels, None, generator)[0] for _ in range(self.views))
            images = self.augmentation.original(pixels)
        else:
            view, joints = self.augmentation(pixels, joints, generator)
            images = view.images
        return Batch(
            images,
            self._labels[rows] if self.sampler.labelled else torch.full_like(rows, -1),
            pictures.cameras[rows],
            pictures.domains[rows],
            pictures.infrared[rows],
            joints,
            views,
            None if self.unlabelled is None else self.unlabelled[step],
        )
