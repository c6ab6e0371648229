"""`neuraldeps eval` and `neuraldeps rerank`: what they print and write, and one line with status 2 for bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import neuraldeps_kernels as nk
from neuraldeps_kernels import cli
from neuraldeps_kernels.cli import retrieval
from neuraldeps_kernels.data.features import read_features

NQ, NG = 12, 60


def made(number: int, seed: int) -> dict[str, torch.Tensor]:
    """Features around 6 centres, their ids and cameras."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    ids = torch.arange(number) % 6
    return {
        "features": centres[ids] + 0.8 * torch.randn(number, 8, generator=generator),
        "ids": ids,
        "cameras": torch.randint(1, 5, (number,), generator=generator),
    }


Q, G = made(NQ, 0), made(NG, 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the same data as q.npz and g.pt, and in pieces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    np.savez("q.npz", **{name: x.numpy() for name, x in Q.items()}, paths=np.array([f"{i}.jpg" for i in range(NQ)]))
    torch.save(G, "g.pt")
    np.save("q.npy", Q["features"].numpy())
    np.save("q_ids.npy", Q["ids"].numpy())
    Path("q_cameras.txt").write_text("\n".join(map(str, Q["cameras"].tolist())))
    save_file({"embedding": G["features"], "pids": G["ids"].int(), "camids": G["cameras"].int()}, "g.safetensors")
    return tmp_path


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code if isinstance(end.value.code, int) else 0


def expected(**options: Any) -> dict[str, Any]:
    labels = (Q["ids"], G["ids"], Q["cameras"], G["cameras"])
    return nk.retrieval_metrics_from_features(Q["features"], G["features"], *labels, **options).to_dict()


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ eval


def test_eval_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "q.npz", "g.pt") == 0
    text = capsys.readouterr().out
    assert f"{100 * expected()['map']:.2f} %" in text
    assert "mINP" in text
    assert f"{NQ} of {NQ}" in text
    assert list(folder.glob("*.json")) == []


def test_eval_reads_all_kinds_of_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = ("q.npy", "g.safetensors", "--query-ids", "q_ids.npy", "--query-cameras", "q_cameras.txt", "--json")
    assert run("eval", *split) == 0
    content = printed(capsys)
    assert {name: content[name] for name in expected()} == expected()


def test_eval_takes_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--ap",
        "trapezoid",
        "--camera-rule",
        "none",
        "--junk-label",
        "3",
        "--max-rank",
        "7",
        "--metric",
        "cosine",
    )
    assert run("eval", "q.npz", "g.pt", *options, "--denominator", "all", "--ranks-of", "identities", "--json") == 0
    content = printed(capsys)
    wanted = expected(
        ap="trapezoid",
        camera_rule="none",
        junk_label=3,
        max_rank=7,
        metric="cosine",
        denominator="all",
        ranks_of="identities",
    )
    assert {name: content[name] for name in wanted} == wanted
    assert content["settings"]["metric"] == "cosine"
    assert run("eval", "q.npz", "g.pt", "--protocol", "single-shot", "--draws", "4", "--seed", "3", "--json") == 0
    assert printed(capsys)["map"] == expected(protocol="single-shot", draws=4, seed=3)["map"]


def test_eval_writes_json_and_csv_and_keeps_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "q.npz", "g.pt", "--out", "new/result") == 0
    out = folder / "new" / "result"
    assert {path.name for path in out.iterdir()} == {"metrics.json", "queries.csv"}
    assert json.loads((out / "metrics.json").read_text())["map"] == expected()["map"]
    rows = list(csv.DictReader((out / "queries.csv").open()))
    assert np.mean([float(row["ap"]) for row in rows]) == pytest.approx(expected()["map"], abs=1e-12)
    capsys.readouterr()
    assert run("eval", "q.npz", "g.pt", "--out", "new/result") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("eval", "q.npz", "g.pt", "--out", "new/result", "--force", "--max-rank", "3") == 0
    assert len(json.loads((out / "metrics.json").read_text())["cmc"]) == 3


# ------------------------------------------------------------------------------------------------ rerank


def test_rerank_prints_before_and_after(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rerank", "q.npz", "g.pt", "--k1", "5", "--k2", "2", "--json") == 0
    content = printed(capsys)
    d = nk.k_reciprocal_rerank(Q["features"], G["features"], k1=5, k2=2)
    wanted = nk.retrieval_metrics(d, Q["ids"], G["ids"], Q["cameras"], G["cameras"]).to_dict()
    assert content["reranked"] == wanted
    assert content["original"] == expected()
    assert run("rerank", "q.npz", "g.pt", "--k1", "5") == 0
    assert {"original", "re-ranked"} <= set(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("top_k", [None, 20, 99])
def test_ranking_goes_from_rerank_to_eval(folder: Path, top_k: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    extra = () if top_k is None else ("--top-k", str(top_k))
    assert run("rerank", "q.npz", "g.pt", "--k1", "5", *extra, "--out", "out", "--json") == 0
    captured = capsys.readouterr()
    after = json.loads(captured.out)["reranked"]
    assert ("lower bounds" in captured.err) == (after["truncated_queries"] > 0)
    assert {path.name for path in Path("out").iterdir()} == {"ranking.npz", "metrics.json", "queries.csv"}
    with np.load("out/ranking.npz") as file:
        assert file["distances"].shape == (NQ, NG if top_k is None else top_k)
        assert ("indices" in file.files) == (top_k is not None)
    assert run("eval", "q.npz", "g.pt", "--ranking", "out/ranking.npz", "--json") == 0
    content = printed(capsys)
    assert {name: content[name] for name in after} == after


def test_rerank_without_ids_writes_the_ranking(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("g.npy", G["features"].numpy())
    assert run("rerank", "q.npy", "g.npy", "--out", "out") == 0
    assert [path.name for path in Path("out").iterdir()] == ["ranking.npz"]
    capsys.readouterr()
    assert run("rerank", "q.npy", "g.npy") == 2
    assert "files without ids give no metrics" in capsys.readouterr().err


def directions(method: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """Options of a method, and what it should give [NQ, NG]."""
    x, y = Q["features"], G["features"]
    if method == "gnn":
        return ("--k1", "8", "--k2", "3", "--lambda", "0.2"), -nk.gnn_rerank(x, y, k1=8, k2=3, lambda_value=0.2)
    if method == "expanded-neighbors":
        options = ("--t", "2", "--q", "3", "--k", "9", "--expanded-distance", "orig")
        return options, nk.expanded_neighbors_rerank(x, y, t=2, q=3, k=9, method="orig")
    y = nk.database_augmentation(y, k=2, alpha=1.0)
    x = nk.alpha_query_expansion(x, y, k=4, alpha=1.0)
    return ("--k", "4", "--alpha", "1", "--augment", "2"), 1 - x @ y.T


@pytest.mark.parametrize("method", ["gnn", "expanded-neighbors", "query-expansion"])
def test_rerank_by_another_method(folder: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All distances and lists of the 30 nearest are those of the function; before it stand the cosines."""
    options, distances = directions(method)
    labels = (Q["ids"], G["ids"], Q["cameras"], G["cameras"])
    wanted = nk.retrieval_metrics(distances, *labels)
    command = ("rerank", "q.npz", "g.pt", "--method", method, *options, "--json")
    assert run(*command, "--out", "all") == 0
    content = printed(capsys)
    assert content["reranked"] == wanted.to_dict()
    assert content["original"] == expected(metric="cosine")
    assert content["settings"]["method"] == method
    with np.load("all/ranking.npz") as file:
        np.testing.assert_allclose(file["distances"], distances, rtol=0, atol=1e-6)
    assert run(*command, "--top-k", "30", "--ranks-of", "identities", "--out", "best") == 0
    with np.load("best/ranking.npz") as file:
        found = torch.from_numpy(file["distances"]), torch.from_numpy(file["indices"])
    np.testing.assert_allclose(found[0], distances.sort(1).values[:, :30], rtol=0, atol=1e-6)
    wanted = nk.retrieval_metrics(found[0], *labels, indices=found[1], ranks_of="identities")
    assert printed(capsys)["reranked"] == wanted.to_dict()


@pytest.mark.parametrize("method", ["k-reciprocal", "gnn", "expanded-neighbors", "query-expansion"])
def test_defaults_of_the_methods_are_those_of_the_functions(
    folder: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = Q["features"], G["features"]
    distances = {
        "k-reciprocal": lambda: nk.k_reciprocal_rerank(x, y),
        "gnn": lambda: -nk.gnn_rerank(x, y),
        "expanded-neighbors": lambda: nk.expanded_neighbors_rerank(x, y),
        "query-expansion": lambda: 1 - nk.alpha_query_expansion(x, y, k=10) @ torch.nn.functional.normalize(y).T,
    }[method]()
    assert run("rerank", "q.npz", "g.pt", "--method", method, "--camera-rule", "none", "--json") == 0
    assert printed(capsys)["reranked"] == nk.retrieval_metrics(distances, Q["ids"], G["ids"]).to_dict()


def test_rerank_measures_by_every_protocol(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SYSU-MM01 counts identities, CUHK03 draws single images; also from lists."""
    labels = (Q["ids"], G["ids"], Q["cameras"], G["cameras"])
    distances, indices = nk.k_reciprocal_rerank(Q["features"], G["features"], k1=5, top_k=40)
    for options, settings in (
        (("--camera-rule", "sysu", "--ranks-of", "identities"), {"camera_rule": "sysu", "ranks_of": "identities"}),
        (
            ("--protocol", "single-shot", "--draws", "3", "--seed", "7"),
            {"protocol": "single-shot", "draws": 3, "seed": 7},
        ),
    ):
        assert run("rerank", "q.npz", "g.pt", "--k1", "5", "--top-k", "40", *options, "--json") == 0
        wanted = nk.retrieval_metrics(distances, *labels, indices=indices, **settings)
        assert printed(capsys)["reranked"] == wanted.to_dict()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "no.npz", "g.pt"), "no.npz: no such file"),
        (("eval", "q.npz"), "Missing argument 'GALLERY'"),
        (("eval", "q.npy", "g.pt"), "q.npy: has no array 'ids'; give --query-ids"),
        (
            ("eval", "q.npy", "g.pt", "--query-ids", "q_ids.npy"),
            "q.npy: has no array 'cameras', but the other file has",
        ),
        (("eval", "q.npz", "g.pt", "--query-ids", "short.txt"), "short.txt: expected 12 lines, one identity each"),
        (("eval", "q.npz", "g.pt", "--query-ids", "words.txt"), "words.txt: expected a whole number on every line"),
        (("eval", "q.npz", "g.pt", "--query-ids", "q.npy"), "q.npy: expected 12 whole numbers, one identity a row"),
        (("eval", "q.npz", "g.pt", "--query-ids", "g.pt"), "g.pt: expected one array, found 3"),
        (("eval", "q.npz", "g.pt", "--key", "feats"), "q.npz: has no array 'feats'"),
        (("eval", "q.npz", "g.pt", "--key", "ids"), r"q.npz: expected features [N, D]"),
        (("eval", "two.npz", "g.pt"), "two.npz: expected an array 'features', found a, b"),
        (("eval", "nan.npz", "g.pt"), "nan.npz: features must be finite, but row 2 is not"),
        (("eval", "whole.npz", "g.pt"), "whole.npz: expected floating-point features"),
        (("eval", "narrow.npz", "g.pt"), "query and gallery must have one number of columns"),
        (("eval", "other.npz", "g.pt"), "no query has a positive in the gallery"),
        (("eval", "q.npz", "g.pt", "--ap", "best"), "ap must be one of standard"),
        (("eval", "q.npz", "g.pt", "--ranking", "two.npz"), "two.npz: expected an array 'distances', found a, b"),
        (("eval", "q.npz", "g.pt", "--ranking", "q_ids.npy"), "distances must be float32"),
        (("eval", "q.npz", "g.pt", "--ranking", "q.npy"), "gallery_ids must be [8], not [60]"),
        (("rerank", "q.npz", "g.pt", "--lambda", "2"), "lambda_value must be in [0, 1]"),
        (("rerank", "q.npz", "g.pt", "--normalize", "sum"), "normalize must be one of max, none"),
        (("rerank", "narrow.npz", "g.pt"), "must have one number of columns"),
        (("rerank", "q.npz", "g.pt", "--method", "fusion"), "method must be one of k-reciprocal, gnn"),
        (("rerank", "q.npz", "g.pt", "--alpha", "2"), "--alpha does not go with --method k-reciprocal"),
        (("rerank", "q.npz", "g.pt", "--method", "query-expansion", "--lambda", "1"), "--lambda does not go with"),
        (("rerank", "q.npz", "g.pt", "--method", "gnn", "--list-length", "k1"), "--list-length does not go with"),
        (("rerank", "q.npz", "g.pt", "--method", "gnn", "--k1", "3", "--k2", "4"), "k2 must be in 1..3, k1"),
        (("rerank", "q.npz", "g.pt", "--method", "query-expansion", "--k", "61"), "k must be in 1..60"),
        (
            ("rerank", "q.npz", "g.pt", "--method", "expanded-neighbors", "--expanded-distance", "l2"),
            "--expanded-distance must be one of rank, orig",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = Q["features"].numpy()
    labels = {"ids": Q["ids"].numpy(), "cameras": Q["cameras"].numpy()}
    Path("short.txt").write_text("1\n2\n")
    Path("words.txt").write_text("\n".join(["person"] * NQ))
    np.savez("two.npz", a=x, b=x)
    bad = x.copy()
    bad[2, 3] = np.nan
    np.savez("nan.npz", features=bad, **labels)
    np.savez("whole.npz", features=x.astype(int), **labels)
    np.savez("narrow.npz", features=x[:, :4], **labels)
    np.savez("other.npz", features=x, ids=labels["ids"] + 100, cameras=labels["cameras"])
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("neuraldeps: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_mixed_dtypes_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("half.npz", **{name: x.half().numpy() if name == "features" else x.numpy() for name, x in Q.items()})
    assert run("eval", "half.npz", "g.pt") == 2
    assert "one dtype and device, not torch.float16" in capsys.readouterr().err


def test_progress_counts_all_queries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuraldeps_kernels.ops.retrieval_metrics._BLOCK_VALUES", 5 * NG)
    monkeypatch.setattr("neuraldeps_kernels.ops.retrieval_metrics._BLOCK_ROWS", 1)
    counted: list[int] = []
    bar = retrieval.progress_bar()
    monkeypatch.setattr(retrieval, "progress_bar", lambda: bar)
    monkeypatch.setattr(bar, "advance", lambda task, number: counted.append(number))
    assert run("eval", "q.npz", "g.pt", "--json") == 0
    assert counted == [5, 5, 2]
    assert run("rerank", "q.npz", "g.pt", "--json") == 0
    assert counted == [5, 5, 2] * 2
    assert [task.description for task in bar.tasks] == ["queries", "queries", f"re-ranking {NQ} + {NG} rows"]


def test_features_of_one_floating_table_are_found(folder: Path) -> None:
    found = read_features("g.safetensors")
    assert torch.equal(found.features, G["features"])
    assert found.ids is not None
    assert found.ids.dtype == torch.int64
    assert len(found) == NG
