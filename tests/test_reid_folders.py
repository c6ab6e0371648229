"""Readers of re-identification folders, on tiny made folders in the layouts of the data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neuraldeps_kernels as nk
from neuraldeps_kernels.data import reid_folders as r


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(split: r.ReidSplit, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in split.paths]


def market(root: Path) -> None:
    touch(root / "bounding_box_train", "0007_c3s1_000001_01.jpg", "0002_c1s1_000451_03.jpg", "Thumbs.db")
    touch(root / "query", "0001_c1s1_001051_00.jpg")
    touch(
        root / "bounding_box_test",
        *("0001_c2s1_000301_00.jpg", "0000_c4s6_000810_05.jpg", "-1_c5s2_000401_03.jpg", "0003_c6s1_000001_00.jpg"),
    )


def duke(root: Path) -> None:
    touch(root / "bounding_box_train", "0001_c2_f0046182.jpg")
    touch(root / "query", "0005_c2_f0046985.jpg")
    touch(root / "bounding_box_test", "0005_c8_f0048001.jpg", "0006_c2_f0046985.jpg")


def msmt(root: Path, train: str = "train", test: str = "test") -> None:
    touch(root / train, "0000/0000_000_01_0303morning_0008_0.jpg", "0001/0001_000_14_0303noon_0020_0.jpg")
    (root / test).mkdir()
    write(root / "list_train.txt", "0000/0000_000_01_0303morning_0008_0.jpg 0\n")
    write(root / "list_val.txt", "0001/0001_000_14_0303noon_0020_0.jpg 1\n")
    write(root / "list_query.txt", "0000/0000_000_02_0113noon_0041_0.jpg 0\n\n")
    write(root / "list_gallery.txt", "0000/0000_001_03_0113noon_0042_0.jpg 0\n0003/0003_000_15_a_0_0_ex.jpg 3\n")


def sysu(root: Path) -> None:
    for camera in range(1, 7):
        for identity in (1, 2, 5, 9):
            if (camera, identity) != (5, 9):  # not everybody passes every camera
                touch(root / f"cam{camera}" / f"{identity:04d}", *(f"{i:04d}.jpg" for i in range(1, 13)))
    write(root / "exp" / "train_id.txt", "1")
    write(root / "exp" / "val_id.txt", "2\n")
    write(root / "exp" / "test_id.txt", "9,5")


def regdb(root: Path) -> None:
    for kind in ("visible", "thermal"):
        write(root / "idx" / f"train_{kind}_3.txt", f"{kind.title()}/1/man_0.bmp 0\n{kind.title()}/2/man_1.bmp 1\n")
        write(root / "idx" / f"test_{kind}_3.txt", f"{kind.title()}/4/man_0.bmp 7\n")


def cuhk03(root: Path) -> None:
    touch(root / "detected" / "bounding_box_train", "0003_c1_1.png")
    touch(root / "detected" / "query", "0001_c1_1.png")
    touch(root / "detected" / "bounding_box_test", "0001_c2_6.png")
    split = {part: [[f"images/{part}.png", 4, 1]] for part in ("train", "query", "gallery")}
    write(root / "splits_new_labeled.json", json.dumps([split]))
    classic = split | {"train": [["/absolute/a.png", 8, 0]]}
    write(root / "splits_classic_detected.json", json.dumps([split, classic]))


# ------------------------------------------------------------------------------------------------ layouts


def test_market1501(tmp_path: Path) -> None:
    market(tmp_path)
    data = r.read_market1501(tmp_path)
    assert names(data.train, tmp_path) == [
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c3s1_000001_01.jpg",
    ]
    assert data.train.ids.tolist() == [2, 7]
    assert data.train.cameras.tolist() == [1, 3]
    assert data.gallery.ids.tolist() == [0, 1, 3]  # distractors stay, junk goes
    assert data.gallery.num_ids == 3
    assert len(r.read_market1501(str(tmp_path), junk=True).gallery) == 4
    assert r.read_market1501(tmp_path, junk=True).gallery.ids.tolist()[0] == -1
    assert data.protocol == {}


def test_dukemtmc_and_occluded_duke(tmp_path: Path) -> None:
    duke(tmp_path)
    data = r.read_dukemtmc(tmp_path, name="Occluded-Duke")
    assert data.name == "Occluded-Duke"
    assert data.query.ids.tolist() == [5]
    assert data.gallery.cameras.tolist() == [8, 2]


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17(tmp_path: Path, folders: tuple[str, str]) -> None:
    msmt(tmp_path, *folders)
    data = r.read_msmt17(tmp_path)
    assert names(data.train, tmp_path)[0] == f"{folders[0]}/0000/0000_000_01_0303morning_0008_0.jpg"
    assert data.train.ids.tolist() == [0, 1]
    assert data.train.cameras.tolist() == [1, 14]
    assert data.gallery.ids.tolist() == [0, 3]
    assert data.gallery.cameras.tolist() == [3, 15]
    assert names(data.query, tmp_path)[0].startswith(folders[1])
    assert len(r.read_msmt17(tmp_path, validation=False).train) == 1


def test_cuhk03(tmp_path: Path) -> None:
    cuhk03(tmp_path)
    folder = r.read_cuhk03(tmp_path)
    assert folder.query.ids.tolist() == [1]
    assert folder.gallery.cameras.tolist() == [2]
    listed = r.read_cuhk03(tmp_path, pictures="labeled")
    assert names(listed.train, tmp_path) == ["images/train.png"]
    assert listed.train.ids.tolist() == [4]
    classic = r.read_cuhk03(tmp_path, protocol="classic", trial=1)
    assert classic.train.paths == (Path("/absolute/a.png"),)
    assert classic.protocol == {"protocol": "single-shot"}
    with pytest.raises(ValueError, match=r"trial must be in 0\.\.1"):
        r.read_cuhk03(tmp_path, protocol="classic", trial=2)


def test_sysu_mm01(tmp_path: Path) -> None:
    sysu(tmp_path)
    data = r.read_sysu_mm01(tmp_path)
    assert sorted(set(data.train.ids.tolist())) == [1, 2]
    assert len(data.train) == 2 * 6 * 12
    assert sorted(set(data.query.cameras.tolist())) == [3, 6]
    assert len(data.query) == 2 * 2 * 12
    assert sorted(zip(data.gallery.ids.tolist(), data.gallery.cameras.tolist(), strict=True)) == [
        *((5, camera) for camera in (1, 2, 4, 5)),
        *((9, camera) for camera in (1, 2, 4)),
    ]
    assert sorted(set(r.read_sysu_mm01(tmp_path, mode="indoor").gallery.cameras.tolist())) == [1, 2]
    assert len(r.read_sysu_mm01(tmp_path, shots=10).gallery) == 70
    assert len(r.read_sysu_mm01(tmp_path, shots=None).gallery) == 84
    draws = [r.read_sysu_mm01(tmp_path, trial=trial).gallery.paths for trial in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_regdb(tmp_path: Path) -> None:
    regdb(tmp_path)
    data = r.read_regdb(tmp_path, trial=3, query="thermal")
    assert data.train.cameras.tolist() == [1, 1, 2, 2]
    assert names(data.query, tmp_path) == ["Thermal/4/man_0.bmp"]
    assert names(data.gallery, tmp_path) == ["Visible/4/man_0.bmp"]
    assert data.query.ids.tolist() == data.gallery.ids.tolist() == [7]


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (market, r.read_market1501),
        (duke, r.read_dukemtmc),
        (msmt, r.read_msmt17),
        (cuhk03, r.read_cuhk03),
        (sysu, r.read_sysu_mm01),
        (regdb, lambda root: r.read_regdb(root, trial=3)),
    ],
    ids=["market", "duke", "msmt", "cuhk03", "sysu", "regdb"],
)
def test_protocols_are_taken_by_the_metrics(make: Callable[[Path], None], read: Any, tmp_path: Path) -> None:
    make(tmp_path)
    data = read(tmp_path)
    q, g = data.query, data.gallery
    distances = (q.ids[:, None] != g.ids).float()
    found = nk.retrieval_metrics(distances, q.ids, g.ids, q.cameras, g.cameras, **data.protocol)
    assert found.rank1 == 1
    assert found.valid.all()
    assert q.ids.dtype == q.cameras.dtype == torch.int64


# ------------------------------------------------------------------------------------------------ malformed


@pytest.mark.parametrize(
    ("make", "read", "message"),
    [
        (lambda root: touch(root, "query/a.jpg"), r.read_market1501, "bounding_box_train: no such folder"),
        (
            lambda root: touch(root, "bounding_box_train/person1.jpg"),
            r.read_market1501,
            r"person1.jpg: expected a name .* such as 0002_c1s1_000451_03.jpg",
        ),
        (lambda root: touch(root, "bounding_box_train/a.txt"), r.read_market1501, "has no pictures"),
        (lambda root: None, r.read_msmt17, "expected the folders train and test, or mask_train_v2"),
        (
            lambda root: (msmt(root), write(root / "list_query.txt", "0000/0000_000_02.jpg\n")),
            r.read_msmt17,
            "list_query.txt: expected 'PATH IDENTITY' in line 1",
        ),
        (
            lambda root: (msmt(root), write(root / "list_query.txt", "0000/0000_000.jpg 1\n")),
            r.read_msmt17,
            "with the camera in their third field",
        ),
        (lambda root: (msmt(root), (root / "list_val.txt").unlink()), r.read_msmt17, "list_val.txt: cannot be read"),
        (lambda root: None, r.read_cuhk03, "found neither detected/bounding_box_train"),
        (
            lambda root: write(root / "splits_new_detected.json", "[{]"),
            r.read_cuhk03,
            "splits_new_detected.json: cannot be read",
        ),
        (
            lambda root: write(root / "splits_new_detected.json", "{}"),
            r.read_cuhk03,
            "expected a list of splits",
        ),
        (
            lambda root: write(root / "splits_new_detected.json", '[{"train": [["a.png", 1]]}]'),
            r.read_cuhk03,
            r"expected \[path, identity, camera\] in 'train'",
        ),
        (
            lambda root: write(root / "splits_new_detected.json", '[{"train": [["a.png", 1, "c"]]}]'),
            r.read_cuhk03,
            "expected whole numbers",
        ),
        (lambda root: None, r.read_sysu_mm01, "expected the folders cam1 to cam6"),
        (
            lambda root: (sysu(root), write(root / "exp" / "test_id.txt", "1,b")),
            r.read_sysu_mm01,
            "test_id.txt: expected numbers with commas, found 'b'",
        ),
        (
            lambda root: (sysu(root), write(root / "exp" / "test_id.txt", "77")),
            r.read_sysu_mm01,
            "has no pictures",
        ),
        (lambda root: sysu(root), lambda root: r.read_sysu_mm01(root, mode="outdoor"), "mode must be one of all"),
        (lambda root: sysu(root), lambda root: r.read_sysu_mm01(root, shots=0), "shots must be 1 or more"),
        (lambda root: regdb(root), lambda root: r.read_regdb(root, trial=9), "train_visible_9.txt: cannot be read"),
        (lambda root: regdb(root), lambda root: r.read_regdb(root, query="x"), "query must be one of visible"),
    ],
)
def test_malformed_folders_are_named(
    make: Callable[[Path], Any], read: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
