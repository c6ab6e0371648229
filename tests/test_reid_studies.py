"""Studies of re-identification: a run is recorded once, an interrupted study goes on, tables are paired by seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("threadpoolctl")

from benchmarks import reid_studies

CALLS: list[tuple[str, int, int]] = []


class Broken(RuntimeError):
    pass


def run(variant: str, seed: int, steps: int = 3) -> dict[str, float]:
    CALLS.append((variant, seed, steps))
    if (variant, seed) == ("b", 1) and len(CALLS) < 5:
        raise Broken
    value = 0.3 + 0.1 * (variant == "b") + 0.01 * seed + 0.001 * (seed == 2) * (variant == "b")
    return {"mAP": value, "rank-1": 2 * value, "re-ranked mAP": value + 0.1}


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method "fake" with the variants a, b."""
    module = ModuleType("benchmarks.reid_fake")
    module.run, module.VARIANTS = run, {"a": None, "b": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.reid_fake", module)
    monkeypatch.setattr(reid_studies, "methods", lambda: ["fake"])
    CALLS.clear()


def command(tmp_path: Path, *more: str) -> int:
    files = ("--results", str(tmp_path / "r.jsonl"), "--markdown", str(tmp_path / "t.md"))
    return reid_studies.main(["fake", "--seeds", "3", "--workers", "0", *files, *more])


def test_an_interrupted_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Broken):
        command(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["variant"], r["seed"]) for r in records] == [("a", 0), ("b", 0), ("a", 1)]
    assert {"schema", "bench", "commit", "date", "versions", "seconds", "metrics"} <= records[0].keys()
    assert command(tmp_path) == 0
    assert [call[:2] for call in CALLS[4:]] == [("b", 1), ("a", 2), ("b", 2)]
    text = capsys.readouterr().out
    assert command(tmp_path) == 0
    assert len(CALLS) == 7
    assert "b" in text
    assert capsys.readouterr().out == text
    assert command(tmp_path, "--steps", "2", "--variant", "b") == 0
    assert CALLS[7:] == [("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("b", 1, 2), ("a", 2, 2), ("b", 2, 2)]


def test_the_table_is_paired_by_seed(tmp_path: Path) -> None:
    CALLS.extend([("", 0, 0)] * 5)
    assert command(tmp_path) == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:] if line}
    assert cells["variant"] == ["mAP", "rank-1", "re-ranked mAP", "gain in mAP", "p", "gain in re-ranked mAP", "p"]
    assert cells["a"] == ["31.0 ± 1.0", "62.0 ± 2.0", "41.0 ± 1.0", "-", "-", "-", "-"]
    p = ttest_rel([0.4, 0.41, 0.421], [0.3, 0.31, 0.32]).pvalue
    assert cells["b"] == [
        "41.0 ± 1.1",
        "82.1 ± 2.1",
        "51.0 ± 1.1",
        "+10.0 ± 0.1",
        f"{p:.2g}",
        "+10.0 ± 0.1",
        f"{p:.2g}",
    ]


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--variant", "c"), ("--steps", "-1"), ("--workers", "-1")])
def test_bad_arguments(tmp_path: Path, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command(tmp_path, *wrong)
    assert end.value.code == 2
    assert "must be" in capsys.readouterr().err
    assert not CALLS
