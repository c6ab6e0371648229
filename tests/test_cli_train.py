"""`neuraldeps train`: configurations, data sets on disk and rendered, stages, resuming, one line for bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import neuraldeps_kernels as nk
from neuraldeps_kernels import cli
from neuraldeps_kernels.cli import train as command
from neuraldeps_kernels.data.batches import Augmentation, FolderImages
from neuraldeps_kernels.data.pedestrian_splits import cross_modality_split, retrieval_split
from neuraldeps_kernels.data.reid_folders import read_sysu_mm01
from neuraldeps_kernels.data.reid_writers import JOINTS, write_market1501, write_sysu_mm01
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians
from neuraldeps_kernels.models.baseline import Baseline
from neuraldeps_kernels.models.reid_network import resnet
from neuraldeps_kernels.models.training import LAST, LOG, Method, embedded, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = """
[data]
split = "retrieval"
train_ids = 8
test_ids = 5
height = 16
width = 8
[batches]
identities = 4
pictures = 2
[augmentation]
pad = 1
[network]
kind = "small"
width = 2
feature = 8
[training]
steps = 6
lr = 1e-2
checkpoint_every = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("c.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered data sets on disk: market, sysu."""
    root = tmp_path_factory.mktemp("sets")
    split = retrieval_split(3, train_ids=8, test_ids=4, height=16, width=8)
    write_market1501(root / "market", split.train, split.query, split.gallery)
    pair = cross_modality_split(3, train_ids=6, test_ids=5, height=16, width=8)
    more = cross_modality_split(4, train_ids=6, test_ids=5, height=16, width=8)
    gallery = type(pair.gallery).concatenate([pair.gallery, more.gallery])  # two pictures by each camera to draw from
    write_sysu_mm01(root / "sysu", pair.train, pair.query, gallery)
    return root


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps train ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *arguments])
    return end.value.code if isinstance(end.value.code, int) else 0


def result(out: str) -> Any:
    return json.loads((Path(out) / "metrics.json").read_text())


SYNTHETIC = ("baseline", "--dataset", "synthetic", "--config", "c.toml", "--out")


# ------------------------------------------------------------------------------------------------ training


def test_training_on_rendered_pedestrians(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SYNTHETIC, "out", "--rerank") == 0
    captured = capsys.readouterr()
    assert "reranked" in captured.out
    assert "wrote out" in captured.err
    content = result("out")
    assert {"mAP", "mINP", "rank-1", "rank-5", "rank-10", "trials"} <= content["original"].keys()
    assert content["reranked"]["valid_queries"] == 10
    assert content["stages"][0]["training"]["steps"] == 6
    assert {path.name for path in Path("out").iterdir()} == {LAST, LOG, "metrics.json"}
    with Path("out", LOG).open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert run(*SYNTHETIC, "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["original"] == content["original"]
    assert run(*SYNTHETIC, "other", "--seed", "1") == 0
    assert result("other")["original"] != content["original"]


def test_an_interrupted_training_resumes_to_the_same_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SYNTHETIC, "whole") == 0
    calls = []

    def interrupting(*_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Baseline, "after_step", interrupting)
        assert run(*SYNTHETIC, "cut") == 130
    assert load_checkpoint("cut/" + LAST)["step"] == 3
    assert not Path("cut", "metrics.json").exists()
    assert run(*SYNTHETIC, "cut", "--resume") == 0
    assert result("cut") == result("whole")
    for name, value in load_checkpoint("whole/" + LAST)["method"].items():
        assert torch.equal(load_checkpoint("cut/" + LAST)["method"][name], value)
    assert run(*SYNTHETIC, "cut", "--resume") == 0  # finished: evaluates again
    assert result("cut") == result("whole")


def test_stages_start_from_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = """
    [[stages]]
    name = "pretraining"
    training = { steps = 3 }
    [[stages]]
    name = "tuning"
    training = { lr = 1e-9, weight_decay = 0.0 }
    start = { "network.backbone" = "pretraining:network.backbone" }
    """
    Path("c.toml").write_text(CONFIG + stages)
    assert run(*SYNTHETIC, "out") == 0
    first, second = (load_checkpoint(f"out/{name}/{LAST}") for name in ("pretraining", "tuning"))
    assert (first["step"], second["step"]) == (3, 6)
    torch.testing.assert_close(
        second["method"]["network.backbone.stages.0.conv.weight"],
        first["method"]["network.backbone.stages.0.conv.weight"],
    )
    assert not torch.allclose(
        second["method"]["network.classifier.weight"], first["method"]["network.classifier.weight"]
    )
    # Stopped between the stages, it goes on to the same result.
    with monkeypatch.context() as patch:
        calls = []

        def interrupting(*_: Any) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        patch.setattr(Baseline, "after_step", interrupting)
        assert run(*SYNTHETIC, "cut") == 128 + signal.SIGTERM
    assert not Path("cut", "tuning").exists()
    assert run(*SYNTHETIC, "cut", "--resume") == 0
    assert result("cut") == result("out")
    # From a file, and parts that do not fit.
    Path("file.toml").write_text(CONFIG + f'[start]\n"network" = "out/tuning/{LAST}:network"\n')
    assert run("baseline", "--dataset", "synthetic", "--config", "file.toml", "--out", "file") == 0
    Path("wrong.toml").write_text(CONFIG + f'[start]\n"network.neck" = "out/tuning/{LAST}:network"\n')
    assert run("baseline", "--dataset", "synthetic", "--config", "wrong.toml", "--out", "wrong") == 2


def test_folders_and_stored_joints(folder: Path, sets: Path) -> None:
    config = CONFIG.replace('split = "retrieval"\ntrain_ids = 8\ntest_ids = 5\n', "")
    Path("c.toml").write_text(config.replace("steps = 6", "epochs = 2\nwarm_up = 1"))
    data = ("--dataset", "market1501", "--data", str(sets / "market"), "--joints", str(sets / "market" / JOINTS))
    assert run("baseline", *data, "--config", "c.toml", "--out", "out") == 0
    assert load_checkpoint("out/" + LAST)["step"] == 8  # 32 pictures, 8 a batch
    assert load_checkpoint("out/" + LAST)["compared"]["warm_up"] == 4
    assert result("out")["original"]["trials"] == 1


def test_weights_go_to_the_network_that_is_evaluated(folder: Path, sets: Path) -> None:
    source = resnet(18)
    torch.save(source.state_dict(), "w.pt")
    config = CONFIG.replace('split = "retrieval"\ntrain_ids = 8\ntest_ids = 5\n', "").replace("steps = 6", "steps = 1")
    config = config.replace('kind = "small"\nwidth = 2\nfeature = 8\n', "depth = 18\n").replace(
        "lr = 1e-2", "lr = 1e-9"
    )
    stages = '[[stages]]\nname = "teacher"\nnetwork = { depth = 34 }\n[[stages]]\nname = "student"\n'
    Path("c.toml").write_text(config + stages)
    data = ("--dataset", "market1501", "--data", str(sets / "market"), "--weights", "w.pt")
    assert run("baseline", *data, "--config", "c.toml", "--out", "out") == 0
    taken = load_checkpoint(f"out/student/{LAST}")["method"]["network.backbone.conv1.weight"]
    torch.testing.assert_close(taken, source.state_dict()["conv1.weight"], atol=1e-6, rtol=0)


def test_sysu_mm01_is_judged_over_ten_draws(folder: Path, sets: Path) -> None:
    """Checks 9 and 10 of MID: the rule of cameras 2 and 3, ranks by identity, draws with seeds 0 to 9."""
    config = CONFIG.replace('split = "retrieval"\ntrain_ids = 8\ntest_ids = 5\n', "")
    Path("c.toml").write_text(config.replace("pictures = 2", "pictures = 2\ninfrared_pictures = 2"))
    root = sets / "sysu"
    data = ("--dataset", "sysu-mm01", "--data", str(root), "--config", "c.toml")
    assert run("baseline", *data, "--out", "a") == 0
    assert run("baseline", *data, "--out", "b") == 0
    content = result("a")["original"]
    assert content == result("b")["original"]
    assert content["trials"] == 10

    stage = command.read_config("baseline", "sysu-mm01", Path("c.toml"))[0]
    method = command.make_method(stage, 6)
    method.load_state_dict(load_checkpoint("a/" + LAST)["method"])
    values = []
    for trial in range(10):
        folders = read_sysu_mm01(root, trial=trial)
        query, gallery = (FolderImages(part, 16, 8) for part in (folders.query, folders.gallery))
        x, y = (embedded(method, part, augmentation=Augmentation(pad=1)) for part in (query, gallery))
        exclude = ((query.cameras == 3)[:, None] & (gallery.cameras == 2)).double()
        distances = (1 - x.double() @ y.double().mT) + 1e3 * exclude
        precisions = []
        for row, identity in zip(distances, query.ids, strict=True):
            kept = row < 1e2
            hits = (gallery.ids[kept] == identity)[row[kept].argsort()]
            ranks = hits.nonzero()[:, 0] + 1
            precisions.append(float((torch.arange(1, len(ranks) + 1) / ranks).mean()))
        values.append(statistics.fmean(precisions))
    assert len(set(values)) > 1
    assert content["mAP"] == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert content["standard_deviation"]["mAP"] == pytest.approx(statistics.stdev(values), abs=1e-5)


def test_several_targets_are_judged_apart(folder: Path) -> None:
    small = "unlabelled_cameras = 3\nunlabelled_ids = 2"
    config = CONFIG.replace('split = "retrieval"', f'split = "generalization"\n{small}')
    Path("c.toml").write_text(config.replace("pictures = 2", "pictures = 2\nunlabelled_size = 5"))
    assert run(*SYNTHETIC, "out") == 0
    content = result("out")["original"]
    assert content["trials"] == 2
    assert content["queries"] == 2 * 5 * 2


def test_metrics_are_those_of_the_package(folder: Path) -> None:
    assert run(*SYNTHETIC, "out") == 0
    stage = command.read_config("baseline", "synthetic", Path("c.toml"))[0]
    method = command.make_method(stage, 8)
    method.load_state_dict(load_checkpoint("out/" + LAST)["method"])
    split = retrieval_split(0, train_ids=8, test_ids=5, height=16, width=8)
    x, y = (embedded(method, part) for part in (split.query, split.gallery))
    wanted = nk.retrieval_metrics_from_features(
        x, y, split.query.ids, split.gallery.ids, split.query.cameras, split.gallery.cameras
    )
    assert result("out")["original"]["mAP"] == pytest.approx(wanted.map)
    assert result("out")["original"]["rank-5"] == pytest.approx(wanted.rank(5))


@pytest.mark.slow
def test_torchrun(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-c", "import sys; from neuraldeps_kernels.cli import main; main(sys.argv[1:])", "train", *SYNTHETIC]
    done = subprocess.run(
        [*launcher, "--no-python", sys.executable, *arguments, "out"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert result("out")["original"]["trials"] == 1
    assert load_checkpoint("out/" + LAST)["compared"]["ranks"] == 2


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("dataset", ["synthetic", "sysu-mm01"])
@pytest.mark.parametrize("model", command.MODELS)
def test_presets_have_known_keys_alone(model: str, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = command.models()
    monkeypatch.setattr(command, "models", lambda: list(command.MODELS))
    stages = command.read_config(model, dataset, None)
    parts = [pedestrians(80, num_cameras=2, height=16, width=8, infrared=infrared) for infrared in (False, True)]
    pictures = PedestrianImages.concatenate(parts)
    reid_set = command.ReidSet(pictures, pictures, pictures, {}, pictures, [])
    for stage in stages:
        data = {**stage.tables["data"]}
        reader = command.SPLITS[data.pop("split")] if dataset == "synthetic" else read_sysu_mm01
        sizes = () if dataset == "synthetic" else ("height", "width")
        command._keywords(reader, {key: data[key] for key in data if key not in sizes}, "data", stage.source)
        for networks in ("network", "teacher"):
            if "depth" in stage.tables[networks]:
                stage.tables[networks]["depth"] = 18
            table = stage.tables[networks]
            command.network_options(5, **command._keywords(command.network_options, table, networks, stage.source))
        if "size" in stage.tables["batches"]:
            stage.tables["batches"]["size"] = 16
        if stage.model in there:
            assert isinstance(command.make_method(stage, 5), Method)
        assert command.training_options(stage, command.make_batches(reid_set, stage, 0))["lr"] > 0
        command._keywords(command.evaluation_options, stage.tables["evaluation"], "evaluation", stage.source)


def test_a_model_without_its_module_does_not_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.MODELS, "ghost", ("ghost", "Ghost"))
    assert "ghost" not in command.models()
    with pytest.raises(ValueError, match="model must be one of baseline"):
        command.read_config("ghost", "synthetic", None)


def edited(old: str, new: str) -> str:
    assert old in CONFIG
    return CONFIG.replace(old, new)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (edited("lr = 1e-2", "lr = 1e-2\nlearning_rate = 1"), "unknown key 'learning_rate' in [training]"),
        (edited("pad = 1", "padding = 1"), "unknown key 'padding' in [augmentation]; known: flip, pad"),
        (edited("[network]", "[net]"), "unknown table or key 'net'; known tables: data, batches"),
        (edited("identities = 4", "identities = 9"), "a batch of 9 identities needs as many, but the pictures show 8"),
        (edited("identities = 4", 'identities = "4"'), "identities in [batches] must be a whole number, not '4'"),
        (edited("lr = 1e-2", "lr = true"), "lr in [training] must be a number, not True"),
        (edited("lr = 1e-2", ""), "[training] needs lr"),
        (edited("steps = 6", "steps = 6\nepochs = 1"), "needs a whole number of epochs or of steps, and not both"),
        (edited("steps = 6", ""), "needs a whole number of epochs or of steps"),
        (edited("width = 2", "width = 2\nweights = 'w.pt'"), "weights are those of a ResNet"),
        (edited('kind = "small"', 'kind = "vit"'), "kind in [network] must be one of resnet, small, not 'vit'"),
        (edited('"retrieval"', '"random"'), "split in [data] must be one of retrieval, occlusion"),
        (edited("pictures = 2", "unlabelled_size = 3"), "give their folder by --unlabelled"),
        (CONFIG + "[method]\ntau = 1\n", "unknown key 'tau' in [method]; known: smoothing, margin"),
        (CONFIG + '[start]\n"network" = "no.pt:network"\n', "no.pt: no such checkpoint"),
        (CONFIG + "stages = 3\n", "unknown key 'stages' in [training]"),
        ("stages = 3\n" + CONFIG, "stages must be written as [[stages]]"),
        (CONFIG + "[[stages]]\n[[stages]]\n", "each of several stages needs a name of its own"),
        ("a = ", "c.toml: cannot be read"),
    ],
)
def test_bad_configurations_are_one_line(
    folder: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.toml").write_text(config)
    assert run(*SYNTHETIC, "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("basline", "--dataset", "synthetic", "--out", "out"), "model must be one of baseline"),
        (("baseline", "--dataset", "market", "--out", "out"), "dataset must be one of market1501"),
        (("baseline", "--dataset", "market1501", "--out", "out"), "--dataset market1501 needs --data, its folder"),
        (("baseline", "--dataset", "market1501", "--data", "no", "--out", "out"), "bounding_box_train: no such folder"),
        (("baseline", "--dataset", "synthetic", "--data", "no", "--out", "out"), "--data does not go with --dataset"),
        ((*SYNTHETIC, "c.toml"), "--out c.toml exists and is not a folder"),
        ((*SYNTHETIC, "."), "is not empty; add --resume to go on"),
        ((*SYNTHETIC, "out", "--resume"), "--out out holds no checkpoint to resume from"),
        ((*SYNTHETIC, "out", "--device", "abacus"), "--device 'abacus' is none that torch knows"),
        ((*SYNTHETIC, "out", "--precision", "int8"), "precision must be one of float32, bfloat16, float16"),
        ((*SYNTHETIC, "out", "--seed", "-1"), "--seed"),
    ],
)
def test_bad_arguments_are_one_line(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_settings_and_damaged_checkpoints_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SYNTHETIC, "out") == 0
    assert run(*SYNTHETIC, "out", "--resume", "--seed", "3") == 2
    assert "is of a training with batches.sampler_seed = 0, not 3" in capsys.readouterr().err
    Path("c.toml").write_text(edited("pad = 1", "pad = 2"))
    assert run(*SYNTHETIC, "out", "--resume") == 2
    assert "is of a training with batches.augmentation.pad = 1, not 2" in capsys.readouterr().err
    Path("out", LAST).write_bytes(b"damage")
    assert run(*SYNTHETIC, "out", "--resume") == 2
    assert "last.pt: is no checkpoint that can be read" in capsys.readouterr().err
