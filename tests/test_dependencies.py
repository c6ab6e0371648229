"""find_dependencies and its report against planted dependencies, definitions written as loops, and scikit-learn."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from planted_logits import COEFFICIENTS, NOISE, SUPPORT, normal, planted_logits
from sklearn.linear_model import ElasticNet, lars_path
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from neuraldeps_kernels.analysis import (
    CrossStatistics,
    DependencyReport,
    LogitStatistics,
    find_dependencies,
    inputs,
)
from neuraldeps_kernels.analysis.dependencies import CURVE_RATIOS, json_text
from neuraldeps_kernels.analysis.inputs import held_out_mask
from neuraldeps_kernels.analysis.selection import chosen, path_ratios
from neuraldeps_kernels.analysis.stability import draws
from neuraldeps_kernels.analysis.substitution import Samples, roc_auc, top_logits
from neuraldeps_kernels.ops.covlasso import covlasso
from neuraldeps_kernels.progress import track

# ------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_dependency_is_found_and_its_held_out_error_is_that_of_the_noise(dtype: torch.dtype) -> None:
    report = find_dependencies(planted_logits().to(dtype), lam_ratio=0.2, targets=[0], refit=True, held_out=0.3)
    found = dict(report.dependencies(0))
    assert sorted(found) == SUPPORT
    assert [found[j] for j in SUPPORT] == pytest.approx(COEFFICIENTS, abs=0.03)
    variance = sum(c * c for c in COEFFICIENTS) + NOISE**2
    expected = NOISE**2 / variance
    assert report.residual_ratio_fit.item() == pytest.approx(expected, rel=0.08)
    assert report.metrics is not None
    assert report.metrics.residual_ratio.item() == pytest.approx(expected, rel=0.12)


def test_penalised_coefficients_have_the_error_that_theory_gives() -> None:
    """Independent unit predictors: theta_j = soft(c_j, lam/2), so the residual is noise^2 + sum (lam/2)^2."""
    f = planted_logits(40_000)
    report = find_dependencies(f, lam=0.5, targets=[0], held_out=0.5)
    variance = sum(c * c for c in COEFFICIENTS) + NOISE**2
    assert report.metrics is not None
    assert report.metrics.residual_ratio.item() == pytest.approx((NOISE**2 + 4 * 0.25**2) / variance, rel=0.04)


def test_between_networks_finds_the_sparse_mixing() -> None:
    g = normal(4000, 12, seed=1) + torch.arange(12)
    mixing = torch.zeros(12, 12, dtype=torch.float64)
    for i in range(12):
        mixing[[(i + 1) % 12, (i + 4) % 12, (i + 6) % 12], i] = torch.tensor([0.9, -0.5, 0.7], dtype=torch.float64)
    f = g @ mixing + 0.05 * normal(4000, 12, seed=2)
    report = find_dependencies(f, lam_ratio=0.1, predictors=g, refit=True)
    assert report.exclude_same
    for i in range(12):
        assert sorted(j for j, _ in report.dependencies(i)) == sorted([(i + 1) % 12, (i + 4) % 12, (i + 6) % 12])
    assert report.metrics is not None
    assert report.metrics.residual_ratio.max() < 3e-3


@pytest.mark.parametrize("exclude_same", [True, False])
def test_same_category_of_the_second_network(exclude_same: bool) -> None:
    g = normal(3000, 8, seed=3)
    f = g + 0.3 * normal(3000, 8, seed=4)
    report = find_dependencies(f, predictors=g, lam_ratio=0.5, exclude_same=exclude_same)
    predicts_itself = [i in dict(report.dependencies(i)) for i in range(8)]
    assert predicts_itself == [not exclude_same] * 8


def test_candidates_restrict_the_predictors() -> None:
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[3, 7]] = True
    report = find_dependencies(planted_logits(), candidates=mask, lam_ratio=0.01)
    assert set(report.coefficients.col_indices().tolist()) <= {3, 7}
    per_target = torch.ones(20, 20, dtype=torch.bool)
    per_target[0, 3] = False
    report = find_dependencies(planted_logits(), candidates=per_target, lam_ratio=0.01)
    assert 3 not in dict(report.dependencies(0))
    assert 7 in dict(report.dependencies(0))


def test_standardize_is_the_problem_of_the_correlation_matrix() -> None:
    unit = torch.logspace(-1, 1, 20, dtype=torch.float64)
    f = planted_logits(500) * unit
    report = find_dependencies(f, lam_ratio=0.1, standardize=True, held_out=None)
    spread = report.statistics.cov.diagonal().sqrt()
    plain = covlasso(report.statistics.cov / spread / spread[:, None], lam_ratio=0.1).dense()
    torch.testing.assert_close(report.coefficients.to_dense(), plain * spread[:, None] / spread, atol=1e-6, rtol=1e-5)
    same_lam = find_dependencies(f, lam=0.2, standardize=True, held_out=None)
    plain = covlasso(report.statistics.cov / spread / spread[:, None], 0.2).dense()
    torch.testing.assert_close(same_lam.coefficients.to_dense(), plain * spread[:, None] / spread, atol=1e-6, rtol=1e-5)


def test_standardize_leaves_constant_categories_out() -> None:
    f = planted_logits(500)
    f[:, 5] = 2.5
    report = find_dependencies(f, standardize=True)
    assert 5 not in report.coefficients.col_indices()
    assert report.dependencies(5) == []
    assert report.residual_ratio_fit[5] == 0


def test_refit_is_least_squares_on_the_support() -> None:
    f = planted_logits(300)
    report = find_dependencies(f, lam_ratio=0.1, refit=True, held_out=None)
    centred = (f - f.mean(0)).numpy()
    for i in range(20):
        found = dict(report.dependencies(i))
        a = sorted(found)
        expected, *_ = np.linalg.lstsq(centred[:, a], centred[:, i], rcond=None)
        np.testing.assert_allclose([found[j] for j in a], expected, atol=1e-9)
        residual = centred[:, i] - centred[:, a] @ expected
        assert report.residual_ratio_fit[i].item() == pytest.approx(
            (residual**2).mean() / centred[:, i].var(), rel=1e-9
        )


def test_refit_of_dependent_predictors_is_the_shortest_solution() -> None:
    from neuraldeps_kernels.analysis.fitting import _solve_positive

    x = normal(100, 3, seed=5)
    x = torch.cat([x, x[:, :1]], 1)
    A, c = x.T @ x / 100, x.T @ (x[:, 0] + x[:, 1]) / 100
    torch.testing.assert_close(_solve_positive(A, c), torch.tensor([0.5, 1, 0, 0.5], dtype=torch.float64))


def test_model_and_loader_give_what_their_logits_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 9))
    second = nn.Linear(6, 9)
    model[3].eval()
    x, y = torch.randn(200, 6), torch.randint(9, (200,))
    batches = list(zip(x.split(64), y.split(64), strict=True))
    report = find_dependencies(model, loader=batches, predictors=second, seed=3)
    assert [module.training for module in (model, model[0], model[3])] == [True, True, False]
    model.eval()
    with torch.no_grad():
        expected = find_dependencies(model(x), predictors=second(x), labels=y, seed=3)
    assert report.to_dict() == expected.to_dict()
    assert report.held_out is not None
    assert report.held_out.true_labels


def test_statistics_may_be_given_with_held_out_logits() -> None:
    f = planted_logits()
    report = find_dependencies(LogitStatistics.from_logits(f[:4000]), held_out=f[4000:])
    expected = find_dependencies(f[:4000], held_out=f[4000:])
    assert report.to_dict() == expected.to_dict()


@pytest.mark.parametrize(("nonnegative", "ridge"), [(True, 0.0), (False, 0.3), (True, 0.3)])
def test_nonnegative_and_ridge_are_those_of_scikit_learn(nonnegative: bool, ridge: float) -> None:
    """Ours is err2 + ridge |theta|^2 + lam |theta|_1, twice scikit-learn's objective."""
    f, lam = planted_logits(400, 16), 0.1
    report = find_dependencies(f, lam=lam, nonnegative=nonnegative, ridge=ridge, held_out=None)
    alpha = lam / 2 + ridge
    peer = ElasticNet(alpha=alpha, l1_ratio=lam / 2 / alpha, positive=nonnegative, tol=1e-12, max_iter=100_000)
    for i in (0, 3, 7):
        others = [j for j in range(16) if j != i]
        peer.fit(f[:, others].numpy(), f[:, i].numpy())
        dense = np.zeros(16)
        dense[others] = peer.coef_
        np.testing.assert_allclose(report.coefficients.to_dense()[i], dense, atol=2e-6)
        assert report.dependencies(i)


def test_refit_with_ridge_has_the_normal_equations_of_ridge_regression() -> None:
    f = planted_logits(300)
    report = find_dependencies(f, lam_ratio=0.1, ridge=0.2, refit=True, held_out=None)
    S = np.cov(f.numpy().T, bias=True)
    for i in range(20):
        found = dict(report.dependencies(i))
        a = sorted(found)
        theta = np.linalg.solve(S[np.ix_(a, a)] + 0.2 * np.eye(len(a)), S[a, i])
        np.testing.assert_allclose([found[j] for j in a], theta, atol=1e-9)


def test_top_k_gives_the_first_k_of_the_lars_path() -> None:
    f = planted_logits(400, 16)
    report = find_dependencies(f, top_k=3, held_out=None)
    assert report.n_nonzero.tolist() == [3] * 16
    for i in range(16):
        others = [j for j in range(16) if j != i]
        x = (f - f.mean(0)).numpy()
        _, _, path = lars_path(x[:, others], x[:, i], method="lasso")
        first = next(theta for theta in path.T if np.count_nonzero(np.abs(theta) > 1e-12) >= 3)
        assert {j for j, _ in report.dependencies(i)} == {others[j] for j in np.flatnonzero(np.abs(first) > 1e-12)}
    assert "of 3 categories" in report.describe()


def test_between_networks_never_forms_the_covariance_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    f, g = planted_logits(400), normal(400, 9, seed=21) + planted_logits(400)[:, :9]
    joint = LogitStatistics.from_logits(f[:300], g[:300])
    expected = find_dependencies(joint, held_out=(f[300:], g[300:]))

    def never(*_: object) -> None:
        raise AssertionError("a covariance of all targets")

    monkeypatch.setattr(inputs, "CovarianceAccumulator", never)
    monkeypatch.setattr(inputs, "covariance", never)
    for source in (f[:300], CrossStatistics.from_logits(f[:300], g[:300])):
        other = {"predictors": g[:300], "resamples": 1} if isinstance(source, Tensor) else {}
        report = find_dependencies(source, held_out=(f[300:], g[300:]), **other)  # type: ignore[arg-type]
        torch.testing.assert_close(report.coefficients.to_dense(), expected.coefficients.to_dense())
        assert report.metrics is not None
        assert expected.metrics is not None
        torch.testing.assert_close(report.metrics.residual_ratio, expected.metrics.residual_ratio)
        assert report.coefficients.shape == (20, 9)


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("between", [False, True])
def test_no_tensor_is_made_on_the_default_device_or_turned_into_numpy(
    between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What forgets the device of its inputs lands on the meta device here, and fails where it meets them."""

    def never(_: Tensor) -> None:
        raise AssertionError("a hidden copy to NumPy")

    options = {"predictors": normal(200, 6, seed=22)} if between else {"standardize": True}
    f = planted_logits(200)
    arguments = {**options, "refit": True, "resamples": 2, "select": "held_out", "n_lambdas": 4}
    expected = find_dependencies(f, **arguments)  # type: ignore[arg-type]
    with torch.device("meta"), monkeypatch.context() as patch:
        patch.setattr(Tensor, "numpy", never)
        report = find_dependencies(f, **arguments)  # type: ignore[arg-type]
        assert report.summary() == expected.summary()
        assert report.error_curve == expected.error_curve
        replaced = report.replace_logits(f, options.get("predictors") if between else None)  # type: ignore[arg-type]
    assert report.to_dict() == expected.to_dict()
    assert replaced.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("between", [False, True])
def test_sources_on_cuda(between: bool) -> None:
    f, g = planted_logits(1200), normal(1200, 9, seed=23)
    f[:, :9] += g
    arguments = {
        "refit": True,
        "resamples": 3,
        "select": "held_out",
        "n_lambdas": 6,
        "groups": [i // 4 for i in range(1200)],
    }
    expected = find_dependencies(f, predictors=g if between else None, **arguments)  # type: ignore[arg-type]
    report = find_dependencies(f.cuda(), predictors=g.cuda() if between else None, **arguments)  # type: ignore[arg-type]
    assert report.coefficients.device.type == "cpu"
    assert report.statistics.predictor_cov.is_cuda
    torch.testing.assert_close(report.coefficients.to_dense(), expected.coefficients.to_dense(), atol=1e-5, rtol=1e-4)
    assert report.metrics is not None
    assert expected.metrics is not None
    torch.testing.assert_close(report.metrics.residual_ratio, expected.metrics.residual_ratio, atol=1e-5, rtol=1e-4)
    replaced = report.replace_logits(f.cuda(), g.cuda() if between else None)
    assert replaced.is_cuda
    assert [p.support for p in report.error_curve] == [p.support for p in expected.error_curve]


def test_logits_with_a_gradient_are_taken_as_they_are() -> None:
    f, g = planted_logits(200), normal(200, 6, seed=24)
    expected = find_dependencies(f, predictors=g, resamples=1)
    report = find_dependencies(f.requires_grad_(), predictors=g.requires_grad_(), resamples=1)
    assert not report.coefficients.requires_grad
    assert report.metrics is not None
    assert not report.metrics.residual_ratio.requires_grad
    assert report.to_dict() == expected.to_dict()


def test_logits_on_two_devices_are_named() -> None:
    f = normal(50, 8, seed=14)
    with pytest.raises(ValueError, match="predictors must be on cpu like the other logits, got meta"):
        inputs.check_same_device("predictors", f.to("meta"), f)


# ------------------------------------------------------------------------------------------------ choice of sparsity


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("rule", ["held_out", "one_standard_error"])
def test_selected_penalty_is_that_of_brute_force(rule: str, refit: bool) -> None:
    """Every point of every path solved alone, judged sample by sample; all groups are of one size.

    12 logits, of which the first three are mixtures, in 60 groups of 4 with a common part.
    """
    common = normal(60, 12, seed=31).repeat_interleave(4, 0)
    f = common + normal(240, 12, seed=32)
    f[:, :3] += f[:, 3:6] + 0.5 * f[:, 6:9]
    groups = [i // 4 for i in range(240)]
    report = find_dependencies(
        f,
        groups=groups,
        select=rule,
        n_lambdas=9,
        lam_min_ratio=0.02,
        validation=0.3,
        refit=refit,
        seed=5,
        held_out=0.25,
    )  # type: ignore[arg-type]
    measured = held_out_mask(torch.tensor(groups), 0.25, 5)
    rest, rest_groups = f[~measured], torch.tensor(groups)[~measured]
    judging = held_out_mask(rest_groups, 0.3, 5)
    x, z = rest[~judging].numpy(), rest[judging].numpy()
    mean, cov = x.mean(0), np.cov(x.T, bias=True)
    ratios = np.geomspace(1, 0.02, 9)
    for i in range(12):
        top = 2 * np.abs(np.delete(cov[i], i)).max()
        errors, deviations = [], []
        for ratio in ratios:
            theta = covlasso(torch.tensor(cov), float(ratio * top), targets=[i]).dense()[0].numpy()
            if refit:
                a = np.flatnonzero(theta)
                theta[a] = np.linalg.lstsq(x[:, a] - mean[a], x[:, i] - mean[i], rcond=None)[0]
            square = (mean[i] + (z - mean) @ theta - z[:, i]) ** 2
            errors.append(square.mean() / z[:, i].var())
            of_groups = square.reshape(-1, 4).mean(1)  # groups stand together
            deviations.append(of_groups.std(ddof=1) / len(of_groups) ** 0.5 / z[:, i].var())
        best = int(np.argmin(errors))
        if rule == "one_standard_error":
            best = next(l for l in range(9) if errors[l] <= errors[best] + deviations[best])
        assert report.selection is not None
        np.testing.assert_allclose(report.selection.error[i], errors, rtol=1e-5)
        np.testing.assert_allclose(report.selection.standard_error[i], deviations, rtol=1e-5)
        assert int(report.selection.chosen[i]) == best
    whole = find_dependencies(rest, lam_ratio=report.selection.lam_ratio, held_out=None, refit=refit)
    torch.testing.assert_close(report.coefficients.to_dense(), whole.coefficients.to_dense())
    row = report.to_dict()["categories"][0]
    assert row["lam_ratio"] == pytest.approx(float(ratios[report.selection.chosen[0]]))
    assert row["residual_ratio_validation"] == pytest.approx(float(report.selection.error[0].min()), rel=0.5)


def test_selection_with_ready_statistics_divides_the_held_out_samples() -> None:
    f = planted_logits(900)
    statistics = LogitStatistics.from_logits(f[:600])
    report = find_dependencies(statistics, held_out=f[600:], select="held_out", validation=0.4, n_lambdas=6)
    assert report.selection is not None
    assert report.held_out is not None
    assert (report.selection.samples, len(report.held_out)) == (120, 180)
    rows = torch.cat([report.held_out.logits, f[600:][held_out_mask(torch.arange(300), 0.4, 0)]])
    torch.testing.assert_close(rows.sort(0).values, f[600:].sort(0).values)
    with pytest.raises(ValueError, match="select needs samples to judge on"):
        find_dependencies(statistics, held_out=None, select="held_out")


def test_rules_of_choice() -> None:
    error = torch.tensor([[1.0, 0.5, 0.4, 0.45], [math.nan] * 4, [0.2, 0.2, 0.3, 0.2]], dtype=torch.float64)
    deviation = torch.tensor([[0.3, 0.3, 0.11, 0.3], [math.nan] * 4, [0.0] * 4], dtype=torch.float64)
    assert chosen(error, deviation, "held_out").tolist() == [2, 0, 0]
    assert chosen(error, deviation, "one_standard_error").tolist() == [1, 0, 0]


def test_path_ratios_are_geometric() -> None:
    np.testing.assert_allclose(path_ratios(5, 1e-2), np.geomspace(1, 1e-2, 5))
    report = find_dependencies(planted_logits(200), n_lambdas=4, lam_min_ratio=0.05)
    assert [p.lam_ratio for p in report.error_curve[::2]] == pytest.approx(np.geomspace(1, 0.05, 4))


# ------------------------------------------------------------------------------------------------ resamples


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 3))
def test_draws_take_as_many_groups_as_there_are_with_replacement(groups: list[int], number: int, seed: int) -> None:
    ids = torch.tensor(groups)
    weights = list(draws(ids, number, seed))
    assert len(weights) == number
    for weight in weights:
        times = [set(weight[ids == group].tolist()) for group in set(groups)]
        assert all(len(each) == 1 for each in times)
        assert sum(each.pop() for each in times) == len(set(groups))


@pytest.mark.parametrize("options", [{"lam_ratio": 0.2}, {"lam": 0.3}, {"top_k": 3}, {"lam_ratio": 0.2, "refit": True}])
@pytest.mark.parametrize("between", [False, True])
def test_frequencies_are_those_of_rows_drawn_again(between: bool, options: dict[str, float]) -> None:
    """Against copies of the drawn rows, their covariance by NumPy, and counts in dictionaries."""
    f = planted_logits(120, 16)
    g = normal(120, 16, seed=41) + f.flip(1) if between else f
    groups = torch.arange(120) // 5
    f[:, 2] += 0.3 * f[:, 3]  # an unsure dependency
    report = find_dependencies(
        f,
        predictors=g if between else None,
        exclude_same=None,
        groups=groups,
        held_out=None,
        resamples=6,
        seed=3,
        **options,
    )  # type: ignore[arg-type]
    counts: dict[tuple[int, int], int] = {}
    overlap = np.zeros(16)
    plain = find_dependencies(f, predictors=g if between else None, held_out=None, **{**options, "refit": False})  # type: ignore[arg-type]
    for weights in draws(groups, 6, 3):
        rows = np.repeat(np.arange(120), weights.long().numpy())
        assert len(rows) == 120
        drawn = torch.from_numpy(f.numpy()[rows])
        other = {"predictors": torch.from_numpy(g.numpy()[rows])} if between else {}
        again = find_dependencies(drawn, held_out=None, **other, **{k: v for k, v in options.items() if k != "refit"})  # type: ignore[arg-type]
        for i in range(16):
            signs, now = (dict(each.dependencies(i)) for each in (plain, again))
            for j in now:
                counts[i, j] = counts.get((i, j), 0) + (j in signs and (now[j] > 0) == (signs[j] > 0))
            either = set(signs) | set(now)
            overlap[i] += len(set(signs) & set(now)) / len(either) if either else 1
    for i in range(16):
        frequencies = dict(zip((j for j, _ in report.dependencies(i)), report.frequencies(i), strict=True))
        assert frequencies == {j: pytest.approx(counts.get((i, j), 0) / 6) for j in frequencies}
    assert report.stability is not None
    np.testing.assert_allclose(report.stability.overlap, overlap / 6)
    assert (report.stability.same_sign <= report.stability.chosen).all()
    assert report.stability.groups == 24


def test_planted_predictors_always_return_and_chance_ones_do_not() -> None:
    report = find_dependencies(planted_logits(400), lam_ratio=0.05, resamples=20)
    frequency = dict(zip((j for j, _ in report.dependencies(0)), report.frequencies(0), strict=True))
    assert [frequency.pop(j) for j in SUPPORT] == [1.0] * 4
    assert frequency
    assert np.mean(list(frequency.values())) < 0.9


def test_frequencies_are_in_table_csv_and_json() -> None:
    from rich.console import Console

    report = find_dependencies(planted_logits(300), lam_ratio=0.1, resamples=4, groups=[i // 3 for i in range(300)])
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    frequencies = [share for i in range(20) for share in report.frequencies(i)]
    assert [float(row["frequency"]) for row in rows] == frequencies
    content = report.to_dict()
    assert [share for row in content["categories"] for share in row["frequencies"]] == frequencies
    assert content["settings"]["resamples"] == 4
    assert 0 < content["summary"]["same_sign_median"] <= 1
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table([0], top=1))
    ((j, value),) = report.dependencies(0, 1)
    assert f"{value:+.2f} {j} ({report.frequencies(0)[0]:.0%})" in console.export_text()
    assert "4 resamples of 80 groups" in report.describe()
    with pytest.raises(ValueError, match="resamples needs logits"):
        find_dependencies(LogitStatistics.from_logits(planted_logits(50)), resamples=1, held_out=None)


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), "counting", 5)) == list(range(5))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


# ------------------------------------------------------------------------------------------------ held-out groups


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=60), st.floats(0.05, 0.6), st.integers(0, 5))
def test_a_group_is_never_on_both_sides(groups: list[int], share: float, seed: int) -> None:
    ids = torch.tensor(groups)
    number = len(set(groups))
    if math.ceil(share * number) == number:
        with pytest.raises(ValueError, match="leaves none"):
            held_out_mask(ids, share, seed)
        return
    kept = held_out_mask(ids, share, seed)
    assert not set(ids[kept].tolist()) & set(ids[~kept].tolist())
    assert len(ids[kept].unique()) == math.ceil(share * number)


def test_the_covariance_sees_no_held_out_group() -> None:
    f = planted_logits(400)
    pictures = [f"picture {i // 8}" for i in range(400)]
    report = find_dependencies(f, groups=pictures, held_out=0.25, seed=7)
    assert report.held_out is not None
    held_out = (f[:, None] == report.held_out.logits[None]).all(2).any(1)  # rows are distinct
    assert int(held_out.sum()) == len(report.held_out.labels) == 13 * 8
    assert held_out.view(50, 8).all(1).logical_or(~held_out.view(50, 8).any(1)).all()
    torch.testing.assert_close(report.statistics.mean, f[~held_out].mean(0))
    assert report.statistics.count == 400 - 13 * 8
    assert "13 groups" in report.describe()


# ------------------------------------------------------------------------------------------------ metrics


def small_logits(samples: int, n: int) -> st.SearchStrategy[Tensor]:
    """Few distinct values, so that ties are the rule."""
    values = st.lists(st.integers(-2, 2), min_size=samples * n, max_size=samples * n)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float32).view(samples, n))


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(2, 9), st.integers(1, 6))
def test_substituted_argmax_and_top5_are_those_of_brute_force(data: st.DataObject, n: int, samples: int) -> None:
    """T14: ties go to the lower index."""
    f = data.draw(small_logits(samples, n))
    fhat = data.draw(small_logits(samples, n)).double()
    context = Samples(f, f.max(1).indices, torch.arange(samples))
    targets = torch.arange(n)
    argmax, top5 = context.argmax_after(fhat, targets), context.stays_in_top(5, fhat, targets)
    for s in range(samples):
        for i in range(n):
            g = f[s].double().numpy().copy()
            g[i] = fhat[s, i]
            assert argmax[s, i] == int(np.argmax(g))
            assert bool(top5[s, i]) == (i in np.argsort(-g, kind="stable")[:5])


@settings(deadline=None, max_examples=40)
@given(small_logits(4, 7), st.integers(1, 7))
def test_top_logits_are_sorted_with_ties_by_index(f: Tensor, k: int) -> None:
    values, indices = top_logits(f, k)
    expected = np.argsort(-f.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(f.numpy(), expected, 1))


@settings(deadline=None, max_examples=60)
@given(small_logits(12, 2), st.lists(st.booleans(), min_size=12, max_size=12))
def test_roc_auc_is_that_of_scikit_learn(score: Tensor, positive: list[bool]) -> None:
    mask = torch.tensor(positive)[:, None].expand(12, 2)
    area = roc_auc(score, mask)
    if not 0 < sum(positive) < 12:
        assert area.isnan().all()
        return
    expected = [roc_auc_score(positive, score[:, j].numpy()) for j in range(2)]
    np.testing.assert_allclose(area, expected, atol=1e-12)


def test_metrics_are_their_definitions() -> None:
    """Every field against its definition written down for one target; labels and predictions are arbitrary."""
    samples, n, targets = 90, 7, torch.tensor([4, 0, 6])
    f = 2 * normal(samples, n, seed=8)
    f[5, 4] = 1e-9  # left out of relative errors
    f[:, 6] += 9  # nearly always the argmax: the others' softmax sum must not cancel
    y = 1 + torch.randint(6, (samples,), generator=torch.Generator().manual_seed(9))  # no positives of category 0
    groups = torch.arange(samples) // 4
    fhat = f[:, targets] + normal(samples, 3, seed=10)
    metrics = Samples(f, y, groups).metrics(fhat, targets)
    for column, i in enumerate(targets.tolist()):
        after = f.clone()
        after[:, i] = fhat[:, column]
        expected = definitions(f.numpy(), after.numpy(), y.numpy(), groups.numpy(), i)
        got = {field.name: getattr(metrics, field.name)[column].item() for field in fields(metrics)}
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


def definitions(f: np.ndarray, after: np.ndarray, y: np.ndarray, groups: np.ndarray, i: int) -> dict[str, float]:
    positive = y == i
    error = np.abs(after[:, i] - f[:, i])
    large = np.abs(f[:, i]) >= 1e-6
    argmax_before, argmax_after = f.argmax(1), after.argmax(1)
    p = (np.exp(f) / np.exp(f).sum(1, keepdims=True))[:, i]
    q = (np.exp(after) / np.exp(after).sum(1, keepdims=True))[:, i]

    def mean(x: np.ndarray) -> float:
        return float(x.mean()) if len(x) else math.nan

    def variance(x: np.ndarray) -> float:
        return float(x.var(ddof=1)) if len(x) > 1 else math.nan

    def top5(g: np.ndarray) -> np.ndarray:
        return np.array([i in row for row in np.argsort(-g, axis=1, kind="stable")[:, :5]])

    def auc(g: np.ndarray) -> float:
        return float(roc_auc_score(positive, g[:, i])) if 0 < positive.sum() < len(y) else math.nan

    relative = np.divide(error, np.abs(f[:, i]))
    pairs = {
        "abs_error_positives": error[positive],
        "rel_error_positives": relative[positive & large],
        "abs_error_negatives": error[~positive],
        "rel_error_negatives": relative[~positive & large],
        "probability_abs_error": np.abs(q - p)[positive],
        "probability_rel_error": (np.abs(q - p) / p)[positive],
    }
    return {
        "residual_ratio": float((error**2).mean() / f[:, i].var()),
        "positives": int(positive.sum()),
        "positive_groups": len(set(groups[positive])),
        **{name: mean(x) for name, x in pairs.items()},
        **{f"{name}_variance": variance(x) for name, x in pairs.items()},
        "recall_before": mean((argmax_before == i)[positive]),
        "recall_after": mean((argmax_after == i)[positive]),
        "calls_before": int((argmax_before == i).sum()),
        "calls_after": int((argmax_after == i).sum()),
        "precision_before": mean(positive[argmax_before == i]),
        "precision_after": mean(positive[argmax_after == i]),
        "negative_accuracy_before": mean((argmax_before == y)[~positive]),
        "negative_accuracy_after": mean((argmax_after == y)[~positive]),
        "top5_before": mean(top5(f)[positive]),
        "top5_after": mean(top5(after)[positive]),
        "auc_before": auc(f),
        "auc_after": auc(after),
        "top1_after": mean(argmax_after == y),
    }


def test_metrics_do_not_depend_on_how_targets_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    f = planted_logits(200)
    whole = find_dependencies(f).metrics
    monkeypatch.setattr("neuraldeps_kernels.analysis.substitution.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("neuraldeps_kernels.analysis.fitting.CHUNK_TARGETS", 3)
    parts = find_dependencies(f).metrics
    assert whole is not None
    assert parts is not None
    for field in fields(whole):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name), equal_nan=True)


# ------------------------------------------------------------------------------------------------ report


@pytest.fixture(scope="module")
def report() -> DependencyReport:
    names = [f"class, {i}" for i in range(20)]
    return find_dependencies(planted_logits(1200), names, groups=list(range(600)) * 2, refit=True)


def test_replace_logits_is_the_affine_prediction(report: DependencyReport) -> None:
    x = planted_logits(30, seed=11)
    mean, theta = report.statistics.mean, report.coefficients.to_dense()
    expected = mean + (x - mean) @ theta.T
    torch.testing.assert_close(report.replace_logits(x), expected)
    only = report.replace_logits(x.float(), categories=[4, 2])
    assert only.dtype == torch.float32
    torch.testing.assert_close(only[:, [2, 4]], expected[:, [2, 4]].float())
    untouched = [j for j in range(20) if j not in (2, 4)]
    assert torch.equal(only[:, untouched], x.float()[:, untouched])


def test_replace_logits_between_networks() -> None:
    f, g = planted_logits(500), normal(500, 6, seed=12)
    report = find_dependencies(f, predictors=g, lam_ratio=0.05)
    f_mean, g_mean, theta = (
        report.statistics.target_mean,
        report.statistics.predictor_mean,
        report.coefficients.to_dense(),
    )
    torch.testing.assert_close(report.replace_logits(f, g), f_mean + (g - g_mean) @ theta.T)
    with pytest.raises(ValueError, match="predictors must be the second network's logits"):
        report.replace_logits(f)


def test_json_holds_the_report_and_is_strict(report: DependencyReport, tmp_path: Path) -> None:
    text = report.to_json(tmp_path / "report.json")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (tmp_path / "report.json").read_text() == text
    assert content == json.loads(json.dumps(report.to_dict()))
    for row in content["categories"]:
        terms = report.dependencies(row["target"])
        assert row["predictors"] == [j for j, _ in terms]
        assert row["coefficients"] == pytest.approx([value for _, value in terms], rel=1e-8)
        assert row["k"] == len(terms)
    summary = content["summary"]
    assert report.metrics is not None
    assert summary["residual_ratio_median"] == pytest.approx(report.metrics.residual_ratio.quantile(0.5).item())
    assert summary["held_out_samples"] == 240
    assert summary["held_out_groups"] == 120


def test_pooled_rates_count_samples(report: DependencyReport) -> None:
    assert report.metrics is not None
    assert report.held_out is not None
    f, y = report.held_out.logits, report.held_out.labels
    kept = called = top5 = 0
    for i in y.unique().tolist():
        g = report.replace_logits(f, categories=[i])
        kept += int(((g.argmax(1) == i) & (y == i)).sum())
        called += int((g.argmax(1) == i).sum())
        top5 += int((g.topk(5).indices[y == i] == i).sum())
    summary = report.summary()
    assert summary["recall"] == pytest.approx(kept / len(y))
    assert summary["precision"] == pytest.approx(kept / called)
    assert summary["top5"] == pytest.approx(top5 / len(y))
    replaced = report.replace_logits(f)
    assert summary["top1_all_replaced"] == pytest.approx((replaced.argmax(1) == y).double().mean().item())


def test_bootstrap_error_is_that_of_drawing_groups_again(report: DependencyReport) -> None:
    """Against resampling written out sample by sample with another generator."""
    assert report.held_out is not None
    held_out = report.held_out
    fhat = report.replace_logits(held_out.logits)
    generator = np.random.default_rng(1)
    medians = []
    for _ in range(400):
        drawn = generator.choice(held_out.groups.unique().numpy(), held_out.num_groups)
        rows = np.concatenate([np.flatnonzero(held_out.groups.numpy() == group) for group in drawn])
        f = held_out.logits[rows].numpy()
        medians.append(np.median(((fhat[rows].numpy() - f) ** 2).mean(0) / f.var(0)))
    assert report.residual_ratio_error == pytest.approx(np.std(medians), rel=0.15)
    assert report.summary()["residual_ratio_median_error"] == report.residual_ratio_error


def test_csv_holds_every_coefficient(report: DependencyReport, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "d.csv"))))
    dense = torch.zeros(20, 20, dtype=torch.float64)
    for row in rows:
        dense[int(row["target"]), int(row["predictor"])] = float(row["coefficient"])
        assert row["target_name"] == f"class, {row['target']}"
    torch.testing.assert_close(dense, report.coefficients.to_dense(), rtol=1e-8, atol=0)
    assert len(rows) == int(report.n_nonzero.sum())
    assert (tmp_path / "d.csv").read_text().count("\n") == len(rows) + 1


def test_table_shows_names_numbers_and_strongest_terms(report: DependencyReport) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table([0], top=2))
    text = console.export_text()
    (first, value), (second, _) = report.dependencies(0, 2)
    assert f"{value:+.2f} class, {first}" in text
    assert f"class, {second}" in text
    assert "240 held-out samples of 120 groups" in " ".join(text.split())


def test_error_curve_passes_through_the_report_and_falls(report: DependencyReport) -> None:
    plain, refit = (([p for p in report.error_curve if p.refit == r]) for r in (False, True))
    assert [p.lam_ratio for p in plain] == list(CURVE_RATIOS)
    here = next(p for p in refit if p.lam_ratio == 0.1)
    summary = report.summary()
    assert here.residual_ratio == pytest.approx(summary["residual_ratio_median"])
    assert here.recall == pytest.approx(summary["recall"])
    assert here.auc == pytest.approx(summary["auc"])
    errors = [p.residual_ratio_fit for p in plain]
    assert errors == sorted(errors, reverse=True)
    for p, r in zip(plain, refit, strict=True):
        assert r.residual_ratio_fit <= p.residual_ratio_fit + 1e-12
        assert r.support == p.support


@pytest.mark.parametrize(
    "case",
    [
        "within",
        "between",  # rectangular matrix, a graph of two kinds of nodes
        "few targets",  # rows are a choice, the graph is their neighbourhood
        "not measured",  # no held-out curves
        "nonnegative",  # no refit on the curve
        "resampled",  # dashed edges
        "nothing found",  # empty dependencies everywhere
        "many",  # cluster names instead of category names
    ],
)
def test_plots_are_written_and_not_blank(case: str, tmp_path: Path) -> None:
    f = planted_logits(400, n=90 if case == "many" else 20)
    options = {
        "between": {"predictors": normal(400, 6, seed=13)},
        "few targets": {"targets": [0, 5]},
        "not measured": {"held_out": None},
        "nonnegative": {"nonnegative": True},
        "resampled": {"resamples": 2},
        "nothing found": {"lam_ratio": 1.5},
    }.get(case, {})
    written = find_dependencies(f, **options).plot(tmp_path, categories=options.get("targets"))  # type: ignore[arg-type]
    assert sorted(path.name for path in written) == [
        "dependencies.png",
        "error_curve.png",
        "graph.png",
        "matrix.png",
        "spectrum.png",
    ]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 3


def test_cautions_name_few_samples_and_uncertified_targets() -> None:
    assert find_dependencies(planted_logits(200), held_out=None).cautions() == []
    few = find_dependencies(planted_logits(30), held_out=None)
    assert few.cautions() == ["30 samples are few for the covariance of 20 logits: the fit looks better than it is"]
    assert few.to_dict()["cautions"] == few.cautions()
    coarse = find_dependencies(
        planted_logits(400), select="held_out", n_lambdas=3, lam_min_ratio=0.5, targets=[0], held_out=None
    )
    assert coarse.cautions() == [
        "1 targets chose the smallest penalty of the path: a smaller lam_min_ratio may be better"
    ]
    twins = planted_logits(400)[:, :16].repeat(1, 2)[:, :18]
    twins[:, 2:] = twins[:, 2:3]  # of 17 predictors three are distinct
    rare = find_dependencies(twins, top_k=5, held_out=None, targets=[0])
    assert rare.cautions() == ["1 targets have fewer than 5 categories at any penalty"]
    unsolved = dataclasses.replace(few, status=torch.tensor([1, 2, 0] + [0] * 17))
    assert unsolved.cautions()[1] == "2 targets are not solved to the tolerance (capped, collinear)"


def test_notable_categories_occur_in_most_groups() -> None:
    f = planted_logits(600)
    report = find_dependencies(f, groups=[i // 3 for i in range(600)], lam_ratio=0.05)
    assert report.metrics is not None
    groups = [int(report.metrics.positive_groups[i]) for i in report.notable(5)]
    assert groups == sorted(groups, reverse=True)
    assert groups[0] == report.metrics.positive_groups.max()


def test_json_text_keeps_strings_and_nested_lists() -> None:
    content = {"numbers": [1, -2.5e-9], "text": "[\n1]", "none": [None], "nested": [[1, 2], []]}
    assert json.loads(json_text(content)) == content
    assert "[1, -2.5e-09]" in json_text(content)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0.1, "lam_ratio": 0.1}, "lam and lam_ratio must not both"),
        ({"lam": 0.1, "top_k": 2}, "lam and top_k must not both"),
        ({"top_k": 2, "select": "held_out"}, "top_k and select must not both"),
        ({"top_k": 0}, "k must be"),
        ({"top_k": 8}, "k must be"),
        ({"select": "best"}, "select must be one of held_out, one_standard_error or None, got 'best'"),
        ({"select": "held_out", "n_lambdas": 1}, "n_lambdas must be at least 2, got 1"),
        ({"select": "held_out", "lam_min_ratio": 1.0}, "lam_min_ratio must be between 0 and 1, got 1.0"),
        ({"select": "held_out", "validation": 0.0}, "validation must be a share between 0 and 1, got 0.0"),
        ({"select": "held_out", "validation": 0.97}, "leaves fewer than 2 of 40 samples for the path"),
        (
            {"select": "one_standard_error", "groups": [i // 17 for i in range(50)], "held_out": 0.3},
            "needs at least 2 groups of validation samples",
        ),
        ({"refit": True, "nonnegative": True}, "refit must be False with nonnegative"),
        ({"ridge": 0.1, "standardize": True}, "ridge must be 0 with standardize"),
        ({"ridge": -0.1}, "ridge must"),
        ({"resamples": -1}, "resamples must not be negative"),
        ({"lam": -1.0}, "lam must be positive"),
        ({"lam_ratio": 0.0}, "lam_ratio must be positive"),
        ({"class_names": ["a"] * 7}, "class_names must have 8 entries"),
        ({"predictor_names": ["a"] * 8}, "predictor_names must be None"),
        ({"targets": [8]}, "targets must be in 0 to 7, got 8"),
        ({"targets": [-1]}, "targets must be in 0 to 7, got -1"),
        ({"targets": [2, 3, 2]}, "targets must not repeat, got 2"),
        ({"targets": []}, "targets must be at least one"),
        ({"candidates": torch.zeros(8, dtype=torch.bool)}, "candidates must allow at least one"),
        ({"candidates": torch.ones(7, dtype=torch.bool)}, r"candidates must be bool \[8\]"),
        ({"exclude_same": False}, "exclude_same must be True or None within"),
        ({"held_out": 1.0}, "held_out must be a share between 0 and 1"),
        ({"held_out": 0.99, "groups": [0] * 25 + [1] * 25}, "leaves none for the covariance"),
        ({"held_out": 0.97}, "fewer than 2 of 50 samples"),
        ({"held_out": torch.zeros(5, 9)}, r"held_out must be \[5, 8\]"),
        ({"groups": [1, 2]}, "groups must have 50 entries"),
        ({"labels": [0] * 49}, "labels must be 50 integers"),
        ({"labels": [8] * 50}, "labels must be in 0 to 7"),
        ({"predictors": torch.zeros(49, 8)}, r"predictors must be \[50, categories\]"),
        ({"loader": []}, "need a model as source"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_dependencies(normal(50, 8, seed=14), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (torch.zeros(10), ValueError, r"source must be \[samples, categories\]"),
        (torch.zeros(10, 3, dtype=torch.int64), TypeError, "source must be floating point"),
        (torch.full((10, 3), math.nan), ValueError, "source must be finite, got 30"),
        (torch.zeros(1, 3), ValueError, "at least 2 samples"),
        (torch.randn(10, 1), ValueError, "at least 2 categories"),
        ([[1.0, 2.0]], TypeError, "source must be a torch.Tensor"),
        (nn.Linear(2, 2), ValueError, "loader must be given"),
    ],
)
def test_bad_source_is_named(source: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_dependencies(source)  # type: ignore[arg-type]


def test_statistics_check_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"cov and mean must be \[3, 3\]"):
        LogitStatistics(torch.eye(4), torch.zeros(3), 10, (3,))
    with pytest.raises(ValueError, match="count must be at least 2"):
        LogitStatistics(torch.eye(3), torch.zeros(3), 1, (3,))
    with pytest.raises(ValueError, match="one or two networks"):
        LogitStatistics(torch.eye(3), torch.zeros(3), 9, (1, 1, 1))
