"""Benchmarks: tiny runs of each, the schema of their records, and that a wrong result is never timed as a right one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import neuraldeps_kernels as nk

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("threadpoolctl")

from benchmarks import bench_covariance, bench_covlasso, bench_overhead, harness, peers_covlasso  # noqa: E402

BUDGET = harness.Budget(quick=True, case_seconds=0.0, round_seconds=0.01, search_seconds=5.0)
SKLEARN = peers_covlasso.PEERS[0]
ENTRY_KEYS = {"name", "status", "error", "note", "goal", "units", "us", "us_quartiles", "us_best"}
ENTRY_KEYS |= {"ratio", "ratio_quartiles"}


def small_covariance(n: int = 40) -> torch.Tensor:
    """[n, n] float32, full rank."""
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return (x.T @ x / len(x)).contiguous()


def contender(name: str, error: float, limit: float = 1.0) -> harness.Contender:
    return harness.Contender(name, lambda: error, error=float, limit=limit)


# ------------------------------------------------------------------------------------------------ harness


def test_wrong_result_of_ours_is_an_error() -> None:
    case = harness.Case("wrong", {}, ours=contender("ours", 2.0))
    with pytest.raises(harness.AccuracyError, match=r"2\.00e\+00"):
        harness.measure(case, BUDGET)


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_wrong_result_of_a_peer_is_refused_and_not_timed(error: float) -> None:
    case = harness.Case("peer", {}, contender("ours", 0.0), peers=[contender("bad", error), contender("good", 0.5)])
    bad, good = harness.measure(case, BUDGET)["peers"]
    assert bad["status"] == "refused"
    assert "us" not in bad
    assert good["status"] == "timed"


def test_missing_peers_stay_in_the_record_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    case = harness.Case("absent", {}, contender("ours", 0.0), peers=[harness.Missing("rival", "not importable")])
    record = harness.measure(case, BUDGET)
    harness.print_record(record, harness.Console(width=120))
    assert record["peers"] == [{"name": "rival", "status": "missing", "reason": "not importable"}]
    assert "missing: not importable" in capsys.readouterr().out


def test_rounds_hold_every_contender_once_and_change_order() -> None:
    calls: list[str] = []
    rivals = [harness.Contender(name, lambda name=name: calls.append(name)) for name in "abcd"]
    seconds = harness.interleaved_seconds(rivals, BUDGET, harness.timer_for(1))
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 1
    assert {len(entries) for entries in seconds.values()} == {len(rounds)} == {harness.MIN_ROUNDS}


def test_ratio_is_theirs_over_ours_per_unit() -> None:
    ours = harness.Contender("ours", lambda: 4.0, units=2, clock=float)  # 2 s a unit
    peer = harness.Contender("peer", lambda: 10.0, units=1, clock=float)
    rates = harness.Rates(copy=100.0, gemm=10.0)
    record = harness.measure(harness.Case("clock", {}, ours, peers=[peer], bytes=50, flops=5, rates=rates), BUDGET)
    assert record["ours"]["us"] == pytest.approx(2e6)
    assert record["peers"][0]["ratio"] == pytest.approx(5.0)
    assert record["floor_fraction"] == pytest.approx((0.5 + 0.5) / 2)


def test_record_line_says_what_it_depends_on_and_not_where(tmp_path: Path) -> None:
    file = tmp_path / "results" / "day.jsonl"
    options = ["overhead", "--quick", "--case", "call, inference", "--results", str(file)]
    assert harness.run_command(options) == 0
    assert harness.run_command(options) == 0
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    record = json.loads(lines[0])
    assert record["schema"] == harness.SCHEMA
    assert record["bench"] == "overhead"
    assert set(record["ours"]) == ENTRY_KEYS
    assert record["cpu_level"] in ("baseline", "avx2", "avx512", "neon", "generic")
    assert {"device", "cores", "commit", "date", "parameters", "rounds", "timer", "peers"} <= set(record)
    assert {"torch", "numpy"} <= set(record["versions"])
    assert str(ROOT) not in lines[0]
    assert os.uname().nodename not in lines[0]


def test_unknown_case_fails(tmp_path: Path) -> None:
    assert harness.run_command(["overhead", "--case", "no such case", "--results", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


def test_profile_runs_ours_only() -> None:
    calls: list[str] = []
    ours = harness.Contender("ours", lambda: calls.append("ours"))
    peer = harness.Contender("peer", lambda: calls.append("peer"))
    harness.profile(harness.Case("profiled", {}, ours, peers=[peer]), warm_up=1, repeats=2)
    assert calls == ["ours"] * 3


def test_profile_on_a_gpu_captures_all_but_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range of the profiler API opens after the warm-up and closes when the device is done."""
    events: list[str] = []

    @contextlib.contextmanager
    def captured() -> Iterator[None]:
        events.append("start")
        yield
        events.append("stop")

    monkeypatch.setattr(torch.cuda.profiler, "profile", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    ours = harness.Contender("ours", lambda: events.append("ours"))
    harness.profile(harness.Case("profiled", {}, ours, device=torch.device("cuda", 0)), warm_up=1, repeats=2)
    assert events == ["ours", "wait", "start", "ours", "ours", "wait", "stop"]


def test_environment_that_slows_numpy_is_dropped() -> None:
    """`python -m benchmarks` and the command line run in a clean process; an unknown option shows that it started."""
    code = "import benchmarks; raise SystemExit(benchmarks.main(['--no-such-option']))"
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--no-such-option" in run.stderr


# ------------------------------------------------------------------------------------------------ covlasso


def test_covlasso_case_times_ours_and_scikit_learn() -> None:
    case = bench_covlasso.solve_case("tiny", small_covariance(), 0.2, BUDGET, peers=(SKLEARN,))
    record = harness.measure(case, BUDGET)
    assert record["ours"]["error"] <= 1e-6
    assert [entry["status"] for entry in (*record["variants"], *record["peers"])] == ["timed"] * 3
    assert record["peers"][0]["error"] <= bench_covlasso.PEER_SLACK * SKLEARN.accuracy


def test_largest_violation_sees_a_wrong_coefficient() -> None:
    cov = small_covariance().double()
    lam = 0.2 * nk.lambda_max(cov)
    theta = nk.covlasso(cov, lam, tol=1e-12).dense()
    assert bench_covlasso.largest_violation(cov, theta, lam) <= 1e-12
    theta[3, int(theta[3].abs().argmax())] *= 1.01
    assert bench_covlasso.largest_violation(cov, theta, lam) > 1e-5


@pytest.mark.parametrize("peer", peers_covlasso.PEERS, ids=lambda peer: peer.name)
def test_peer_solves_our_objective(peer: peers_covlasso.Peer) -> None:
    """At a tight tolerance every installed peer agrees with us, so alpha, scale and signs are stated rightly."""
    if failure := peers_covlasso.import_failure(peer):
        pytest.skip(failure)
    peers_covlasso.silence_peers()
    cov = small_covariance(20)
    problem = bench_covlasso.problem_of(cov, 0.2, 7)
    tolerance = peers_covlasso.loosest_tolerance(peer, [problem], 60.0)
    assert isinstance(tolerance, float), tolerance
    ours = nk.covlasso(cov.double(), lam_ratio=0.2, targets=[7], tol=1e-12).dense()[0].numpy()
    np.testing.assert_allclose(peer.solve(problem, tolerance), np.delete(ours, 7), atol=100 * peer.accuracy)


def test_tolerance_search_refuses_a_wrong_peer() -> None:
    wrong = peers_covlasso.Peer("wrong", "numpy", 1e-6, range(3, 6), lambda problem, tol: np.ones(len(problem.gram)))
    problem = bench_covlasso.problem_of(small_covariance(), 0.2, 0)
    assert "misses 1e-06 at any tolerance" in str(peers_covlasso.loosest_tolerance(wrong, [problem], 10.0))


def test_absent_package_is_named() -> None:
    absent = peers_covlasso.Peer("absent", "no_such_package", 1e-6, (0,), SKLEARN.solve)
    missing = bench_covlasso.peer_contender(absent, small_covariance(), 0.2, torch.arange(40), BUDGET, None)
    assert isinstance(missing, harness.Missing)
    assert "no_such_package" in missing.reason


def test_sample_spans_the_support_sizes() -> None:
    assert bench_covlasso.spread(torch.arange(100), 4) == [12, 37, 62, 87]
    assert bench_covlasso.spread(torch.arange(3), 8) == [0, 1, 2]


def test_ratio_for_gives_the_support_asked_for() -> None:
    cov = small_covariance()
    ratio = bench_covlasso.ratio_for(cov, 5)
    assert nk.covlasso(cov, lam_ratio=ratio, targets=range(0, 40, 20)).n_nonzero.double().mean() == pytest.approx(
        5, abs=1.5
    )


# ------------------------------------------------------------------------------------------------ covariance, overhead


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 0.0),  # all peers
        (torch.float32, 3000.0),  # an offset that ruins one-pass formulas
        (torch.bfloat16, 0.0),  # a dtype NumPy has not
        (torch.float64, 0.0),
    ],
)
def test_covariance_case(dtype: torch.dtype, offset: float) -> None:
    case = bench_covariance.covariance_case("tiny", 300, 24, dtype, offset, threads=1)
    record = harness.measure(case, BUDGET)
    assert record["ours"]["status"] == "timed"
    assert len(record["peers"]) == 3
    assert offset != 0 or {peer["status"] for peer in record["peers"]} == {"timed"}


def test_import_time_comes_from_the_fresh_process() -> None:
    case = bench_overhead.import_case()
    assert case.ours.clock is not None
    assert 0 < case.ours.clock(case.ours.run()) < 60
