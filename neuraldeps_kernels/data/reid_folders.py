"""Readers of the standard folder layouts of re-identification: paths, identities and cameras, no picture is opened.

    read_market1501   root/{bounding_box_train,query,bounding_box_test}/0002_c1s1_000451_03.jpg
    read_dukemtmc     the same with 0005_c2_f0046985.jpg: DukeMTMC-reID, Occluded-Duke
    read_msmt17       root/list_{train,val,query,gallery}.txt with lines "0000/0000_000_01_0303morning_0008_0.jpg 0",
                      pictures in train and test, or in mask_train_v2 and mask_test_v2
    read_cuhk03       root/{detected,labeled}/ as Market-1501 with 0001_c1_1.png, or splits_{new,classic}_*.json
    read_sysu_mm01    root/cam1/0001/0001.jpg .. cam6, root/exp/{train,val,test}_id.txt with "1,2,4"
    read_regdb        root/idx/{train,test}_{visible,thermal}_1.txt with lines "Visible/1/male_back_v_00000.bmp 0"

Cameras and identities are numbered as in the data sets; train and test may number other people alike.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_IMAGE_NAME = re.compile(r"(-?\d+)_c(\d+)")  # of Market-1501, DukeMTMC-reID and CUHK03
_JUNK = -1
SYSU_QUERY_CAMERAS = (3, 6)  # infrared
SYSU_GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
_REGDB_CAMERAS = {"visible": 1, "thermal": 2}

_Item = tuple[Path, int, int]  # path, identity, camera


@dataclass(frozen=True, eq=False)
class ReidSplit:
    """Pictures of one part of a data set, in the order of their names or of its list."""

    paths: tuple[Path, ...]  # [N]
    ids: Tensor  # int64 [N]
    cameras: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_ids(self) -> int:
        """Number of identities."""
        return len(self.ids.unique())


@dataclass(frozen=True, eq=False)
class ReidFolders:
    """A data set; `protocol` are the keywords of `retrieval_metrics` that its evaluation takes."""

    name: str
    train: ReidSplit
    query: ReidSplit
    gallery: ReidSplit
    protocol: dict[str, str] = field(default_factory=dict)


def read_market1501(root: str | Path, *, junk: bool = False) -> ReidFolders:
    """Market-1501, and data sets in its layout.

    Args:
        root: folder that holds bounding_box_train, query and bounding_box_test.
        junk: keep pictures of identity -1, parts of people that evaluations leave out; 0 are distractors, always kept.

    Raises:
        ValueError: a folder is missing or without pictures, or a name does not tell identity and camera.
    """
    return _boxes("Market-1501", Path(root), "0002_c1s1_000451_03.jpg", junk)


def read_dukemtmc(root: str | Path, *, name: str = "DukeMTMC-reID") -> ReidFolders:
    """DukeMTMC-reID, or with another `name` Occluded-Duke, which has its layout. Raises as `read_market1501`."""
    return _boxes(name, Path(root), "0005_c2_f0046985.jpg", False)


def read_msmt17(root: str | Path, *, validation: bool = True) -> ReidFolders:
    """MSMT17, first or second version.

    Args:
        root: folder of the lists.
        validation: count the pictures of list_val.txt as training pictures, as is common.

    Raises:
        ValueError: a list or folder is missing, or a line is not "PATH IDENTITY" with the camera in the name.
    """
    root = Path(root)
    train, test = _existing(root, [("train", "test"), ("mask_train_v2", "mask_test_v2")])
    names = ["list_train.txt", "list_val.txt"] if validation else ["list_train.txt"]
    return ReidFolders(
        "MSMT17",
        _split([item for name in names for item in _msmt17_list(root / name, train)], root),
        _split(_msmt17_list(root / "list_query.txt", test), root),
        _split(_msmt17_list(root / "list_gallery.txt", test), root),
    )


def read_cuhk03(root: str | Path, *, pictures: str = "detected", protocol: str = "new", trial: int = 0) -> ReidFolders:
    """CUHK03, from its re-split folders if there are any, else from JSON lists of splits.

    Args:
        root: folder that holds `detected` and `labeled`, or splits_new_detected.json and so on.
        pictures: "detected" or "labeled" boxes.
        protocol: "new" (767 and 700 identities) or "classic" (20 trials, evaluated with protocol="single-shot").
        trial: of the classic splits, from 0.

    Raises:
        ValueError: an option is unknown, neither layout is found, or names or lists are malformed.
    """
    root = Path(root)
    _check_choice("pictures", pictures, ("detected", "labeled"))
    _check_choice("protocol", protocol, ("new", "classic"))
    name = f"CUHK03 {pictures}, {protocol}"
    if protocol == "new" and (root / pictures / "bounding_box_train").is_dir():
        return _boxes(name, root / pictures, "0001_c1_1.png", False)
    path = root / f"splits_{protocol}_{pictures}.json"
    if not path.is_file():
        raise ValueError(f"{root}: found neither {pictures}/bounding_box_train (new protocol) nor {path.name}")
    splits = _json(path)
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise ValueError(f"{path}: expected a list of splits")
    if not 0 <= trial < len(splits):
        raise ValueError(f"trial must be in 0..{len(splits) - 1}, the splits of {path}, not {trial}")
    train, query, gallery = (_split(_json_items(path, splits[trial], p), path) for p in ("train", "query", "gallery"))
    return ReidFolders(name, train, query, gallery, {"protocol": "single-shot"} if protocol == "classic" else {})


def read_sysu_mm01(root: str | Path, *, mode: str = "all", shots: int | None = 1, trial: int = 0) -> ReidFolders:
    """SYSU-MM01: infrared queries (cameras 3 and 6), visible gallery.

    Args:
        root: folder that holds cam1 .. cam6 and exp.
        mode: gallery of "all" visible cameras (1, 2, 4, 5) or of the "indoor" ones (1, 2).
        shots: pictures of each identity and camera in the gallery, drawn by `trial`: 1 ("single-shot"), 10
            ("multi-shot"), None for all.
        trial: seed of the draw; published figures are means over 10 trials.

    Returns:
        Training pictures are those of the ids in train_id.txt and val_id.txt, of all cameras.

    Raises:
        ValueError: an option is unknown, a folder or list is missing, an id is no number, or a part has no picture.
    """
    root = Path(root)
    _check_choice("mode", mode, tuple(SYSU_GALLERY_CAMERAS))
    if shots is not None and shots < 1:
        raise ValueError(f"shots must be 1 or more, or None for all, not {shots}")
    cameras = [int(folder.name[3:]) for folder in root.glob("cam*") if folder.name[3:].isdecimal()]
    if not cameras:
        raise ValueError(f"{root}: expected the folders cam1 to cam6 of SYSU-MM01")
    train = [*_sysu_ids(root / "exp" / "train_id.txt"), *_sysu_ids(root / "exp" / "val_id.txt")]
    test = _sysu_ids(root / "exp" / "test_id.txt")
    gallery = [
        item
        for items in _sysu_pictures(root, test, SYSU_GALLERY_CAMERAS[mode])
        for item in (items if shots is None else _drawn(items, shots, trial))
    ]
    return ReidFolders(
        f"SYSU-MM01, {mode}",
        _split([item for items in _sysu_pictures(root, train, sorted(cameras)) for item in items], root),
        _split([item for items in _sysu_pictures(root, test, SYSU_QUERY_CAMERAS) for item in items], root),
        _split(gallery, root),
        protocol={"camera_rule": "sysu", "ranks_of": "identities"},
    )


def read_regdb(root: str | Path, *, trial: int = 1, query: str = "visible") -> ReidFolders:
    """RegDB: visible (camera 1) and thermal (camera 2) pictures.

    Args:
        root: folder that holds idx, Visible and Thermal.
        trial: 1 to 10.
        query: "visible" or "thermal"; the gallery is the other.

    Raises:
        ValueError: an option is unknown, a list is missing, or a line is not "PATH IDENTITY".
    """
    root = Path(root)
    _check_choice("query", query, tuple(_REGDB_CAMERAS))
    other = "thermal" if query == "visible" else "visible"

    def listed(part: str, kind: str) -> list[_Item]:
        path = root / "idx" / f"{part}_{kind}_{trial}.txt"
        return [(root / name, identity, _REGDB_CAMERAS[kind]) for name, identity in _lines(path)]

    return ReidFolders(
        f"RegDB, trial {trial}",
        _split([*listed("train", "visible"), *listed("train", "thermal")], root),
        _split(listed("test", query), root),
        _split(listed("test", other), root),
        protocol={"camera_rule": "none"},
    )


# ------------------------------------------------------------------------------------------------ layouts


def _boxes(name: str, root: Path, example: str, junk: bool) -> ReidFolders:
    """The layout of Market-1501."""
    parts = []
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        items = []
        for path in _pictures(root / folder, name):
            found = _IMAGE_NAME.match(path.name)
            if found is None:
                raise ValueError(f"{path}: expected a name with identity and camera, such as {example} ({name})")
            if junk or int(found[1]) != _JUNK:
                items.append((path, int(found[1]), int(found[2])))
        parts.append(_split(items, root / folder))
    train, query, gallery = parts
    return ReidFolders(name, train, query, gallery)


def _msmt17_list(path: Path, folder: Path) -> list[_Item]:
    items = []
    for name, identity in _lines(path):
        fields = name.rpartition("/")[2].split("_")
        if len(fields) < 3 or not fields[2].isdecimal():
            raise ValueError(
                f"{path}: expected names with the camera in their third field, such as "
                f"0000/0000_000_01_0303morning_0008_0.jpg, found {name!r}"
            )
        items.append((folder / name, identity, int(fields[2])))
    return items


def _sysu_ids(path: Path) -> list[int]:
    words = _text(path).replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong or not words:
        raise ValueError(f"{path}: expected numbers with commas, found {wrong[0] if wrong else 'nothing'!r}")
    return sorted(map(int, words))


def _sysu_pictures(root: Path, ids: Iterable[int], cameras: Sequence[int]) -> list[list[_Item]]:
    """Pictures by identity and camera, where there are any."""
    found = []
    for identity in ids:
        for camera in cameras:
            folder = root / f"cam{camera}" / f"{identity:04d}"
            if folder.is_dir():
                found.append([(path, identity, camera) for path in _pictures(folder, "SYSU-MM01")])
    return found


def _drawn(items: list[_Item], shots: int, trial: int) -> list[_Item]:
    """`shots` of the pictures of one identity and camera, whatever the others are."""
    _, identity, camera = items[0]
    chance = random.Random(f"{trial} {identity} {camera}")
    return [items[index] for index in sorted(chance.sample(range(len(items)), min(shots, len(items))))]


def _json_items(path: Path, split: dict[str, Any], part: str) -> list[_Item]:
    items = []
    for entry in split.get(part, ()):
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
            raise ValueError(f"{path}: expected [path, identity, camera] in {part!r}, found {entry!r}")
        name, identity, camera = entry
        if not isinstance(identity, int) or not isinstance(camera, int):
            raise ValueError(f"{path}: expected whole numbers as identity and camera in {part!r}, found {entry!r}")
        items.append((path.parent / name, identity, camera))  # absolute names stay as they are
    return items


# ------------------------------------------------------------------------------------------------ files


def _split(items: Sequence[_Item], source: Path) -> ReidSplit:
    if not items:
        raise ValueError(f"{source}: a part of the data set has no pictures")
    paths, ids, cameras = zip(*items, strict=True)
    return ReidSplit(tuple(paths), torch.tensor(ids), torch.tensor(cameras))


def _pictures(folder: Path, name: str) -> list[Path]:
    """Pictures of a folder by name."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected in {name}")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _existing(root: Path, pairs: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    for first, second in pairs:
        if (root / first).is_dir() and (root / second).is_dir():
            return root / first, root / second
    wanted = ", or ".join(f"{first} and {second}" for first, second in pairs)
    raise ValueError(f"{root}: expected the folders {wanted}")


def _lines(path: Path) -> list[tuple[str, int]]:
    """Names and identities of a list "PATH IDENTITY"."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, identity = line.strip().rpartition(" ")
        if not name or not identity.isdecimal():
            raise ValueError(f"{path}: expected 'PATH IDENTITY' in line {number}, found {line.strip()!r}")
        found.append((name.strip(), int(identity)))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
