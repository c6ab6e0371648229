"""Photographs inside installed packages or a folder, and crops of them for ImageNet networks.

Crop c of a picture depends on the picture's id and on c alone, not on the machine, the order or the network: two
networks see the same crops, and a run can be repeated. Crop 0 is the largest central square; the others cover 25 to
100 % of the area at an aspect ratio of 3/4 to 4/3, half of them mirrored. Input of a network: bicubic resize, RGB,
(value - 127) / 128, as the efficientnet-lite networks were trained. Source: our choice, but for the preprocessing.
"""

from __future__ import annotations

import importlib.util
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# Photographs by package, relative to its folder. Left out: diagrams, logos, masks, micrographs and second views.
_PACKAGED = {
    "foolbox": tuple(
        f"data/imagenet_{index:02d}_{label}.jpg"
        for index, label in enumerate(
            (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
        )
    ),
    "gradio": tuple(
        f"media_assets/images/{name}" for name in ("cheetah.jpg", "cheetah1.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")
    ),
    "imgaug": ("quokka.jpg",),
    "skimage": (
        *(f"data/{name}.png" for name in ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass")),
        *("data/gravel.png", "data/motorcycle_left.png", "data/rocket.jpg"),
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


@dataclass(frozen=True)
class Picture:
    """A file with a picture; `id` names it in reports and seeds its crops."""

    id: str
    path: Path
    label: int | None = None  # ImageNet category, where the file's name tells it


def packaged_pictures() -> list[Picture]:
    """Photographs of foolbox, gradio, imgaug, scikit-image and scikit-learn, where installed; imports none of them."""
    pictures = []
    for package, names in _PACKAGED.items():
        for folder in package_folders(package):
            for name in names:
                path = folder / name
                if path.is_file():
                    pictures.append(Picture(f"{package}/{path.stem}", path, _label(path.stem)))
    return pictures


def folder_pictures(folder: str | Path) -> list[Picture]:
    """All files below `folder` with a picture's suffix, sorted by path; ValueError where it is no folder."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [Picture(path.relative_to(root).as_posix(), path) for path in paths]


def package_folders(package: str) -> list[Path]:
    """Folders of a top-level package, found without importing it; empty where it is not installed."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


def read_picture(path: Path) -> Image.Image:
    """RGB image, upright, transparency over white. ValueError with the path where it cannot be decoded in full."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a value, which convert() would clip
                values = np.asarray(upright, dtype=np.float32) / 257
                upright = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return upright.convert("RGB")
    except Exception as error:  # decoders raise SyntaxError, struct.error and more, besides OSError
        raise ValueError(f"{path}: not a readable picture: {error}") from error


def crop_boxes(picture_id: str, size: tuple[int, int], count: int) -> list[tuple[tuple[int, int, int, int], bool]]:
    """`count` boxes (left, upper, right, lower) within `size` = (width, height), each with whether to mirror it."""
    width, height = size
    side = min(size)
    left, upper = (width - side) // 2, (height - side) // 2
    boxes = [((left, upper, left + side, upper + side), False)][:count]
    generator = np.random.default_rng(zlib.crc32(picture_id.encode()))
    for _ in range(count - 1):
        share, aspect = generator.uniform(0.25, 1.0), math.exp(generator.uniform(-1, 1) * math.log(4 / 3))
        area = share * width * height
        w = max(1, min(width, round(math.sqrt(area * aspect))))
        h = max(1, min(height, round(math.sqrt(area / aspect))))
        x, y = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
        boxes.append(((x, y, x + w, y + h), bool(generator.integers(2))))
    return boxes


def crops(picture: Picture, count: int, sizes: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """`count` crops, each once per side length of `sizes` as float32 [3, size, size]. Raises as `read_picture`."""
    image = read_picture(picture.path)
    for box, mirror in crop_boxes(picture.id, image.size, count):
        view = image.crop(box)
        if mirror:
            view = ImageOps.mirror(view)
        yield tuple(network_input(view, size) for size in sizes)


def network_input(image: Image.Image, size: int) -> Tensor:
    """RGB image resized to [3, size, size] float32, (value - 127) / 128."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)  # [size, size, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).sub(127).div(128)


def _label(stem: str) -> int | None:
    match = re.fullmatch(r"imagenet_\d+_(\d+)", stem)
    return int(match[1]) if match else None
