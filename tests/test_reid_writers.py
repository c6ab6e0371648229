"""Rendered data sets in the standard folder layouts, read back by the package's readers; `neuraldeps data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import neuraldeps_kernels as nk
from neuraldeps_kernels import cli
from neuraldeps_kernels.data import reid_folders, reid_writers
from neuraldeps_kernels.data.batches import FolderImages
from neuraldeps_kernels.data.pedestrian_splits import (
    PedestrianSplit,
    cross_modality_split,
    occlusion_split,
    retrieval_split,
)
from neuraldeps_kernels.data.reid_folders import ReidFolders
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians

SIZES: dict[str, Any] = {"train_ids": 3, "test_ids": 4, "height": 32, "width": 16}
READERS: dict[str, tuple[Callable[..., PedestrianSplit], Callable[..., ReidFolders], int]] = {
    "market1501": (retrieval_split, reid_folders.read_market1501, 1),
    "dukemtmc": (retrieval_split, reid_folders.read_dukemtmc, 1),
    "occluded-duke": (occlusion_split, reid_folders.read_dukemtmc, 1),
    "msmt17": (retrieval_split, reid_folders.read_msmt17, 0),
    "sysu-mm01": (cross_modality_split, lambda root: reid_folders.read_sysu_mm01(root, shots=None), 1),
}
"""What fills a layout, what reads it, and the number of the first identity there."""
SYSU_CAMERAS = torch.tensor([1, 2, 4, 5, 3, 6])  # of the cameras 0 to 5 of cross_modality_split


def metrics(query: Any, gallery: Any, protocol: dict[str, Any]) -> dict[str, Any]:
    """Of pictures themselves as features: FolderImages or PedestrianImages."""
    pixels = [x.images[torch.arange(len(x))].flatten(1).float() / 255 for x in (query, gallery)]
    return nk.retrieval_metrics_from_features(
        *pixels, query.ids, gallery.ids, query.cameras, gallery.cameras, **protocol
    ).to_dict()


@pytest.mark.parametrize("layout", READERS)
def test_what_is_written_is_read(layout: str, tmp_path: Path) -> None:
    """Pictures bit for bit, identities, cameras and joints; the evaluator finds the same in files and in memory."""
    make, read, first_id = READERS[layout]
    split = make(**SIZES)
    reid_writers.WRITERS[layout](tmp_path / "set", split.train, split.query, split.gallery)
    folders = read(tmp_path / "set")
    joints = tmp_path / "set" / reid_writers.JOINTS
    numbers = {str(name): row for row, name in enumerate(np.load(joints)["names"])}
    assert len(numbers) == len(split.train) + len(split.query) + len(split.gallery)
    first = 0
    loaded = []
    for written, found in (
        (split.train, folders.train),
        (split.query, folders.query),
        (split.gallery, folders.gallery),
    ):
        rows = torch.tensor([numbers[path.name] - first for path in found.paths])
        assert sorted(rows.tolist()) == list(range(len(written)))
        images = FolderImages(found, 32, 16, joints=joints)
        wanted = written[rows]
        cameras = SYSU_CAMERAS[wanted.cameras] if layout == "sysu-mm01" else wanted.cameras + 1
        assert torch.equal(found.ids, wanted.ids + first_id)
        assert torch.equal(found.cameras, cameras)
        assert torch.equal(images.images[torch.arange(len(found))], wanted.images)
        assert images.joints is not None
        torch.testing.assert_close(images.joints, wanted.joints, atol=1e-5, rtol=0)
        loaded.append(images)
        first += len(written)
    protocol = dict(folders.protocol)
    found = metrics(*loaded[1:], protocol)
    if layout == "sysu-mm01":  # its rule knows its own numbers of cameras
        split = replace(
            split,
            query=replace(split.query, cameras=SYSU_CAMERAS[split.query.cameras]),
            gallery=replace(split.gallery, cameras=SYSU_CAMERAS[split.gallery.cameras]),
        )
    wanted_metrics = metrics(split.query, split.gallery, protocol)
    assert found["valid_queries"] == wanted_metrics["valid_queries"] == len(split.query)
    assert found["map"] == pytest.approx(wanted_metrics["map"], abs=1e-12)
    assert found["cmc"] == pytest.approx(wanted_metrics["cmc"], abs=1e-12)


def test_jpeg_is_nearly_the_picture(tmp_path: Path) -> None:
    split = retrieval_split(**SIZES)
    reid_writers.write_market1501(tmp_path, split.train, split.query, split.gallery, suffix=".jpg")
    found = reid_folders.read_market1501(tmp_path).query
    assert {path.suffix for path in found.paths} == {".jpg"}
    images = np.stack([np.asarray(Image.open(path)) for path in found.paths]).astype(np.float64)
    difference = np.abs(images - split.query.images.numpy()).mean()
    assert 0 < difference < 12


def parts(**changes: PedestrianImages) -> tuple[PedestrianImages, ...]:
    split = cross_modality_split(train_ids=3, test_ids=2, height=16, width=8)
    return tuple({"train": split.train, "query": split.query, "gallery": split.gallery, **changes}.values())


def test_bad_parts(tmp_path: Path) -> None:
    train, query, gallery = parts()
    write = reid_writers.write_sysu_mm01
    with pytest.raises(ValueError, match="query must hold a picture or more"):
        reid_writers.write_market1501(tmp_path, train, query[:0], gallery)
    with pytest.raises(ValueError, match="both have identity 3"):
        reid_writers.write_msmt17(tmp_path, PedestrianImages.concatenate([train, query]), query, gallery)
    with pytest.raises(ValueError, match=r"suffix must be one of .png, .jpg, not '.gif'"):
        reid_writers.write_dukemtmc(tmp_path, train, query, gallery, suffix=".gif")
    with pytest.raises(ValueError, match="query must be infrared and gallery visible"):
        write(tmp_path, train, gallery, query)
    with pytest.raises(ValueError, match="not 1"):
        write(tmp_path, train[train.ids == 0], query, gallery)
    small = {"height": 16, "width": 8}
    with pytest.raises(ValueError, match="not 9 visible ones"):
        write(tmp_path, pedestrians(2, num_cameras=5, first_camera=6, **small), query, gallery)
    both_kinds = PedestrianImages.concatenate([train, pedestrians(2, num_cameras=1, infrared=True, **small)])
    with pytest.raises(ValueError, match="not 3 infrared ones"):
        write(tmp_path, both_kinds, query, gallery)
    mixed = train[(train.cameras == 0) | (train.cameras == 4)]
    with pytest.raises(ValueError, match="each of one kind"):
        write(tmp_path, replace(mixed, cameras=torch.full_like(mixed.cameras, 4)), query, gallery)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").touch()
    for root in (tmp_path, tmp_path / "there"):
        with pytest.raises(ValueError, match="must be an empty folder or not exist yet"):
            write(root, train, query, gallery)


# ------------------------------------------------------------------------------------------------ commands


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps data ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(("data", *arguments))
    return end.value.code if isinstance(end.value.code, int) else 0


def test_preview_shows_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "preview"
    options = ("--out", str(out), "--ids", "2", "--seed", "3")
    assert run("preview", *options) == 0
    assert "wrote" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["preview.png"]
    picture = np.asarray(Image.open(out / "preview.png"))
    assert picture.shape == (16 + 2 * (192 + 4), 16 * 96 + 6 * 4, 3)
    seeds = {"identity_seed": 3, "style_seed": 3, "seed": 3}
    shown = pedestrians(2, **seeds).images[5].numpy()  # the second person by the second camera
    assert np.array_equal(picture[16 + 196 :: 3, 4 + 96 :: 3][:64, :32], shown)
    assert run("preview", *options) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("preview", *options, "--force", "--height", "128", "--width", "64") == 0
    assert np.asarray(Image.open(out / "preview.png")).shape == (16 + 2 * (128 + 4), 16 * 64 + 6 * 4, 3)


@pytest.mark.parametrize("layout", READERS)
def test_write_makes_what_the_functions_make(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, read, _ = READERS[layout]
    root = tmp_path / "sets" / layout
    sizes = ("--train-ids", "3", "--test-ids", "4", "--height", "32", "--width", "16", "--seed", "5")
    assert run("write", layout, str(root), *sizes) == 0
    split = make(5, **SIZES)
    printed = capsys.readouterr().out
    assert f"train: {len(split.train)} pictures, 3 people" in printed
    assert f"gallery: {len(split.gallery)} pictures, 4 people" in printed
    found = read(root)
    loaded = FolderImages(found.gallery, 32, 16).images[torch.arange(len(found.gallery))]
    wanted = split.gallery.images
    assert torch.equal(loaded.flatten(1).double().sum(1).sort()[0], wanted.flatten(1).double().sum(1).sort()[0])


def test_write_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("write", "cuhk03", str(tmp_path / "x")) == 2
    assert "layout must be one of market1501, dukemtmc, occluded-duke, msmt17, sysu-mm01" in capsys.readouterr().err
    assert run("write", "market1501", str(tmp_path / "x"), "--height", "3") == 2
    assert "height must be at least 16 pixels, not 3" in capsys.readouterr().err
    assert run("write", "market1501", str(tmp_path / "x"), "--train-ids", "3", "--suffix", "gif") == 2
    assert "suffix must be one of" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (tmp_path / "there").touch()
    assert run("write", "market1501", str(tmp_path)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
