"""Writers of rendered pedestrians in the folder layouts that `data.reid_folders` reads.

    write_market1501    bounding_box_train, query, bounding_box_test / 0001_c1s1_000000_00.png
    write_dukemtmc      the same with 0001_c1_f0000000.png: DukeMTMC-reID, Occluded-Duke
    write_msmt17        train, test / 0000/0000_000000_01_0303morning_0000_0.png and list_*.txt, list_val.txt empty
    write_sysu_mm01     cam1 .. cam6 / 0001/000000.png and exp/*_id.txt

The six or seven digits count pictures through training, query and gallery, so that a file's name is its own in the
data set. Cameras are numbered from 1, identities as well but in MSMT17. Beside the folders, joints.npz holds `names`
[M], file names, and `joints` float32 [M, 17, 3]: x and y as parts of the width and height, and visibility.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from neuraldeps_kernels.data.reid_folders import SYSU_GALLERY_CAMERAS, SYSU_QUERY_CAMERAS
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages

JOINTS = "joints.npz"
SUFFIXES = (".png", ".jpg")
_PARTS = ("bounding_box_train", "query", "bounding_box_test")  # of Market-1501: train, query, gallery

_Name = Callable[[int, int, int, int], str]
"""File without suffix, relative to the root: of part (0, 1, 2), identity, camera and the picture's number."""


def write_market1501(
    root: str | Path,
    train: PedestrianImages,
    query: PedestrianImages,
    gallery: PedestrianImages,
    *,
    suffix: str = ".png",
) -> None:
    """The layout of Market-1501.

    Args:
        root: a folder that is empty or not there yet.
        suffix: ".png", or ".jpg" for JPEG of quality 95.

    Raises:
        ValueError: `root` is not empty or no folder, a part is empty, the suffix is another one, or somebody is in
            training and test.
    """

    def name(part: int, identity: int, camera: int, number: int) -> str:
        return f"{_PARTS[part]}/{identity + 1:04d}_c{camera + 1}s1_{number:06d}_00"

    _write(Path(root), (train, query, gallery), name, suffix)


def write_dukemtmc(
    root: str | Path,
    train: PedestrianImages,
    query: PedestrianImages,
    gallery: PedestrianImages,
    *,
    suffix: str = ".png",
) -> None:
    """The layout of DukeMTMC-reID and Occluded-Duke. Arguments and errors as of `write_market1501`."""

    def name(part: int, identity: int, camera: int, number: int) -> str:
        return f"{_PARTS[part]}/{identity + 1:04d}_c{camera + 1}_f{number:07d}"

    _write(Path(root), (train, query, gallery), name, suffix)


def write_msmt17(
    root: str | Path,
    train: PedestrianImages,
    query: PedestrianImages,
    gallery: PedestrianImages,
    *,
    suffix: str = ".png",
) -> None:
    """The layout of MSMT17. Arguments and errors as of `write_market1501`."""

    def name(part: int, identity: int, camera: int, number: int) -> str:
        folder = "test" if part else "train"
        return f"{folder}/{identity:04d}/{identity:04d}_{number:06d}_{camera + 1:02d}_0303morning_0000_0"

    root, parts = Path(root), (train, query, gallery)
    names = _write(root, parts, name, suffix)
    for kind, files, part in zip(("train", "query", "gallery"), names, parts, strict=True):
        lines = [
            f"{file.partition('/')[2]} {identity}\n" for file, identity in zip(files, part.ids.tolist(), strict=True)
        ]
        (root / f"list_{kind}.txt").write_text("".join(lines), encoding="utf-8")
    (root / "list_val.txt").touch()


def write_sysu_mm01(
    root: str | Path,
    train: PedestrianImages,
    query: PedestrianImages,
    gallery: PedestrianImages,
    *,
    suffix: str = ".png",
) -> None:
    """The layout of SYSU-MM01: cameras by light become 1, 2, 4, 5, infrared ones 3, 6, in their order.

    The last training identity is written as that of validation. Arguments and errors as of `write_market1501`.

    Raises:
        ValueError: besides, there are more cameras, a query is not infrared, a picture of the gallery is, or training
            has fewer than two people.
    """
    parts = (train, query, gallery)
    if not bool(query.infrared.all()) or bool(gallery.infrared.any()):
        raise ValueError("query must be infrared and gallery visible in the layout of SYSU-MM01")
    all_cameras, all_infrared = (torch.cat([getattr(part, name) for part in parts]) for name in ("cameras", "infrared"))
    place: dict[int, int] = {}
    for numbers, infrared in ((SYSU_GALLERY_CAMERAS["all"], False), (SYSU_QUERY_CAMERAS, True)):
        cameras = all_cameras[all_infrared == infrared].unique().tolist()
        if len(cameras) > len(numbers) or place.keys() & set(cameras):
            raise ValueError(
                f"cameras must be at most 4 visible and 2 infrared ones, each of one kind, in the layout of SYSU-MM01, "
                f"not {len(cameras)} {'infrared' if infrared else 'visible'} ones: {cameras}"
            )
        place.update(zip(cameras, numbers, strict=False))
    learned = (train.ids.unique() + 1).tolist()
    if len(learned) < 2:
        raise ValueError(f"train must hold two people or more in the layout of SYSU-MM01, not {len(learned)}")

    def name(part: int, identity: int, camera: int, number: int) -> str:
        return f"cam{place[camera]}/{identity + 1:04d}/{number:06d}"

    root = Path(root)
    _write(root, parts, name, suffix)
    tested = (torch.cat([query.ids, gallery.ids]).unique() + 1).tolist()
    (root / "exp").mkdir()
    for kind, ids in (("train", learned[:-1]), ("val", learned[-1:]), ("test", tested)):
        (root / "exp" / f"{kind}_id.txt").write_text(",".join(map(str, ids)) + "\n", encoding="utf-8")


WRITERS = {
    "market1501": write_market1501,
    "dukemtmc": write_dukemtmc,
    "occluded-duke": write_dukemtmc,
    "msmt17": write_msmt17,
    "sysu-mm01": write_sysu_mm01,
}


def _write(root: Path, parts: tuple[PedestrianImages, ...], name: _Name, suffix: str) -> list[list[str]]:
    """Writes all pictures and their joints; their names by part, relative to `root`."""
    from PIL import Image

    _check(root, parts, suffix)
    files: list[list[str]] = []
    number = 0
    for index, part in enumerate(parts):
        files.append([])
        rows = zip(part.images.numpy(), part.ids.tolist(), part.cameras.tolist(), strict=True)
        for image, identity, camera in rows:
            file = root / f"{name(index, identity, camera, number)}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file, quality=95)  # PNG ignores it
            files[-1].append(file.relative_to(root).as_posix())
            number += 1
    joints = [part.joints / torch.tensor([part.images.shape[2], part.images.shape[1], 1.0]) for part in parts]
    names = np.array([file.rpartition("/")[2] for part_files in files for file in part_files])
    np.savez_compressed(root / JOINTS, names=names, joints=torch.cat(joints).numpy())
    return files


def _check(root: Path, parts: tuple[PedestrianImages, ...], suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise ValueError(f"suffix must be one of {', '.join(SUFFIXES)}, not {suffix!r}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"root {root} must be an empty folder or not exist yet")
    for kind, part in zip(("train", "query", "gallery"), parts, strict=True):
        if not len(part):
            raise ValueError(f"{kind} must hold a picture or more")
    train, query, gallery = (part.ids for part in parts)
    both = train[torch.isin(train, torch.cat([query, gallery]))]
    if len(both):
        raise ValueError(f"train and test must not share people, but both have identity {int(both[0])}")
