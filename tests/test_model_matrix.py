"""The model matrix against single analyses of its pairs, and what it writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_logits import normal, planted_logits
from torch import Tensor

from neuraldeps_kernels.analysis import ModelMatrix, find_dependencies, model_matrix


@pytest.fixture(scope="module")
def streams() -> dict[str, Tensor]:
    """Three networks on the same samples: two of like categories, and one of 7 others that only the first can tell."""
    f = planted_logits(400, 16)
    return {"a": f, "b": f + 0.5 * normal(400, 16, seed=61), "c": f[:, :7] * 2 + 0.1 * normal(400, 7, seed=62)}


@pytest.fixture(scope="module")
def matrix(streams: dict[str, Tensor]) -> ModelMatrix:
    return model_matrix(streams, lam_ratio=0.2, refit=True, groups=[i // 4 for i in range(400)], group_name="picture")


def test_model_matrix_is_that_of_single_analyses(matrix: ModelMatrix, streams: dict[str, Tensor]) -> None:
    groups = [i // 4 for i in range(400)]
    for row, a in enumerate("abc"):
        for column, b in enumerate("abc"):
            report = find_dependencies(
                streams[a], lam_ratio=0.2, refit=True, predictors=None if a == b else streams[b], groups=groups
            )
            assert report.metrics is not None
            median = report.metrics.residual_ratio.quantile(0.5).item()
            assert matrix.matrix("residual_ratio")[row, column].item() == pytest.approx(median)
            assert matrix.matrix("support")[row, column] == report.n_nonzero.double().quantile(0.5)
            assert matrix.matrix("residual_ratio_fit")[row, column] == report.residual_ratio_fit.quantile(0.5)
            assert matrix.matrix("auc")[row, column] == report.summary()["auc"]
    assert matrix.matrix("residual_ratio")[2, 0] < 0.1 < matrix.matrix("residual_ratio")[0, 2]
    with pytest.raises(ValueError, match="figure must be a number of PairFigures, got 'explained'"):
        matrix.matrix("explained")


def test_model_matrix_as_json_csv_table_and_picture(matrix: ModelMatrix, tmp_path: Path) -> None:
    from rich.console import Console

    content = json.loads(matrix.to_json(tmp_path / "m.json"), parse_constant=lambda name: pytest.fail(name))
    assert content == json.loads((tmp_path / "m.json").read_text())
    assert [(pair["explained"], pair["predicting"]) for pair in content["pairs"]] == [
        (a, b) for a in "abc" for b in "abc"
    ]
    rows = list(csv.DictReader(io.StringIO(matrix.to_csv(tmp_path / "m.csv"))))
    for row, pair in zip(rows, content["pairs"], strict=True):
        assert float(row["residual_ratio"]) == pytest.approx(pair["residual_ratio"], rel=1e-5)
        assert float(row["residual_ratio_quartile_3"]) == pytest.approx(pair["residual_ratio_quartiles"][1], rel=1e-5)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(matrix.table())
    text = console.export_text()
    assert "3 networks, each explained by each: least squares" in text
    assert f"{matrix.pairs[1].residual_ratio:.2f} ± {matrix.pairs[1].residual_ratio_error:.2f}" in text
    pixels = np.asarray(Image.open(matrix.plot(tmp_path / "m.png")).convert("L"))
    assert pixels.std() > 10


def test_model_matrix_without_held_out_samples(streams: dict[str, Tensor], tmp_path: Path) -> None:
    matrix = model_matrix(streams, top_k=2, held_out=None)
    assert matrix.matrix("support").tolist() == [[2.0] * 3] * 3
    assert matrix.matrix("residual_ratio").isnan().all()
    assert matrix.to_dict()["pairs"][0]["residual_ratio_quartiles"] == [None, None]
    assert next(csv.DictReader(io.StringIO(matrix.to_csv())))["residual_ratio"] == ""
    assert "not measured" in matrix.what
    matrix.table()
    assert matrix.plot(tmp_path / "m.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": {"a": torch.zeros(9, 3)}}, "at least 2 networks, got 1"),
        ({"streams": {"a": torch.randn(9, 3), "b": torch.randn(8, 3)}}, "b has 8, a 9"),
        ({"predictors": torch.zeros(400, 3)}, "predictors belongs to one pair"),
        ({"held_out": torch.zeros(4, 16)}, "held_out as logits belongs to one pair"),
        ({"exclude_same": True}, "exclude_same needs networks of the same categories"),
    ],
)
def test_bad_model_matrix_is_named(options: dict[str, object], message: str, streams: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        model_matrix(**{"streams": streams, **options})  # type: ignore[arg-type]
