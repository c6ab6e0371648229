"""The closed-form discriminator against numerical optimisation, Gaussian formulas and its own conditions."""

from __future__ import annotations

import itertools
import math
import subprocess
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from neuraldeps_kernels.ops.closed_form_discriminator import (
    MassEscapes,
    closed_form_discriminator,
    effective_sample_size,
    knowledge_penalty,
)
from neuraldeps_kernels.reference import closed_form_discriminator as reference

OPERATOR = torch.ops.neuraldeps.closed_form_discriminator
WIDE = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
GAMES = ["js", "kl"]

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def penalties(N: int, seed: int = 0) -> Tensor:
    return 0.5 * (normal(N, seed=seed) - 2).square()


def assert_solves(loss: Tensor, eta: float, game: str) -> None:
    """Equal to the bisected root in float64, and D = 1 / (1 + w)."""
    D, w, c = OPERATOR(loss, eta, game)
    want_D, want_w, want_c = reference.closed_form_discriminator(loss.double(), eta, game)
    tolerance = TOLERANCE[loss.dtype]
    torch.testing.assert_close(w.double(), want_w, rtol=0, atol=tolerance * float(want_w.max()))
    torch.testing.assert_close(D.double(), want_D, rtol=0, atol=tolerance)
    torch.testing.assert_close(c, want_c, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ kernel


@pytest.mark.parametrize("dtype", WIDE, ids=str)
# one sample; below, at and beyond vectors; one block, and a block and one sample; a run of several blocks
@pytest.mark.parametrize("N", [1, 2, 7, 16, 17, 1000, 16_384, 16_385, 100_003])
def test_matches_the_reference(N: int, dtype: torch.dtype) -> None:
    loss = penalties(N).to(dtype)
    for game in GAMES:
        for eta in (0.0, 1e-3, 1.0, 30.0, 1e4):
            assert_solves(loss, eta, game)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40),
    exponent=st.floats(-8, 8),
    game=st.sampled_from(GAMES),
)
def test_any_penalties(values: list[float], exponent: float, game: str) -> None:
    assert_solves(torch.tensor(values, dtype=torch.float64), 10.0**exponent, game)


@pytest.mark.parametrize(
    "loss",
    [10 ** (15 * torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 12)],
    ids=["15 decades"],
)
def test_hard_roots(loss: Tensor) -> None:
    """Penalties over many decades, sorted either way: Newton's start from the first block is then a bad one."""
    for order in (loss, loss.sort().values, loss.sort(descending=True).values):
        for eta in (1e-3, 1.0, 1e3, 1e8):
            assert_solves(order, eta, "js")


def test_root_condition() -> None:
    """Check T11: E_p[s / (1 - s)] = 1 within 1e-8 in float64."""
    for N in (24, 10_000, 200_000):
        for eta in (0.01, 1.0, 100.0):
            loss = penalties(N)
            _, _, c = OPERATOR(loss, eta, "js")
            s = torch.exp(c - eta * loss)
            assert abs(float((s / (1 - s)).mean()) - 1) <= 1e-8


def test_levels_and_threads_agree(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Every level is near float64, and the bits are those of any number of threads."""
    code = """
import torch, neuraldeps_kernels
from neuraldeps_kernels.reference import closed_form_discriminator as reference
for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
    loss = torch.randn(50_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square().to(dtype)
    for game in ("js", "kl"):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.neuraldeps.closed_form_discriminator(loss, 3.0, game))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0]))
        want = reference.closed_form_discriminator(loss.double(), 3.0, game)
        for value, exact in zip(results[0], want):
            assert float((value.double() - exact).abs().max() / exact.abs().max()) <= tolerance
"""
    for level in cpu_levels:
        result = run_python(code, NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, (level, result.stderr)


def test_not_finite() -> None:
    """An infinite penalty has no weight; NaN, or nothing finite, has no solution."""
    for dtype in WIDE:
        loss = penalties(100).to(dtype)
        loss[7] = torch.inf
        for game in GAMES:
            D, w, _ = OPERATOR(loss, 1.0, game)
            assert w[7] == 0
            assert D[7] == 1
            torch.testing.assert_close(float(w.double().mean()), 1.0, rtol=1e-6, atol=0)
            for broken in (loss.index_fill(0, torch.tensor(50), torch.nan), torch.full_like(loss, torch.inf)):
                assert all(value.isnan().all() for value in OPERATOR(broken, 1.0, game))


@pytest.mark.parametrize("game", GAMES)
def test_gradients(game: str) -> None:
    loss = penalties(40).requires_grad_()
    assert torch.autograd.gradcheck(lambda l: OPERATOR(l, 1.3, game), (loss,))
    k = normal(30, 2).requires_grad_()
    target = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, t: closed_form_discriminator(k, t, 0.7, game)[:2], (k, target))


def test_gradient_where_s_is_held() -> None:
    """At the bound of s the constant follows the least penalty alone."""
    loss = torch.cat([torch.zeros(1), torch.full((3_000_000,), 5.0)]).double().requires_grad_()
    _, w, c = OPERATOR(loss, 10.0, "js")
    assert float(w.detach().mean()) < 1
    (gradient,) = torch.autograd.grad(c.sum(), loss)
    assert gradient[0] == 10
    assert not gradient[1:].any()


@pytest.mark.parametrize("game", GAMES)
def test_operator_rules(game: str) -> None:
    torch.library.opcheck(OPERATOR, (penalties(50).requires_grad_(), 0.5, game))


@pytest.mark.compile
def test_torch_compile() -> None:
    k = normal(200)
    compiled = torch.compile(lambda k: closed_form_discriminator(k, 1.0, 0.5), fullgraph=True)
    for got, want in zip(compiled(k), closed_form_discriminator(k, 1.0, 0.5), strict=True):
        torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ theory


def discrete_problem() -> tuple[Tensor, Tensor, float]:
    """24 atoms of equal weight, their level K in 0..3 and penalty, eta."""
    K = torch.arange(24) % 4
    return K, (K.double() - 3).square(), 0.15


def objective(logits: np.ndarray, loss: np.ndarray, eta: float, game: str) -> tuple[float, np.ndarray]:
    """Value of the game after the inner maximum, at q = softmax(logits), and its gradient."""
    x = torch.tensor(logits, requires_grad=True)
    q, p = torch.softmax(x, 0), torch.full((len(logits),), 1 / len(logits), dtype=torch.float64)
    middle = (p + q) / 2
    divergence = (
        (p * (p / middle).log()).sum() + (q * (q / middle).log()).sum() if game == "js" else (q * (q / p).log()).sum()
    )
    value = divergence + eta * (q * torch.from_numpy(loss)).sum()
    (gradient,) = torch.autograd.grad(value, x)
    return float(value.detach()), gradient.numpy()


@pytest.mark.parametrize("game", GAMES)
def test_discrete_equilibrium(game: str) -> None:
    """Check T1: the closed form is the minimiser over q, and no perturbation lowers the objective. Check T2: the ratio
    depends on K alone.
    """
    K, loss, eta = discrete_problem()
    D, w, _ = closed_form_discriminator(K.double(), 3.0, 2 * eta, game)  # l = (K - 3)^2 / 2
    q = (w / 24).numpy()
    assert abs(q.sum() - 1) <= 1e-10
    found = minimize(
        objective, np.zeros(24), args=(loss.numpy(), eta, game), jac=True, method="BFGS", options={"gtol": 1e-12}
    )
    optimum = np.exp(found.x) / np.exp(found.x).sum()
    assert np.abs(optimum - q).max() <= 1e-6
    best = objective(np.log(q), loss.numpy(), eta, game)[0]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        assert objective(np.log(q) + 0.05 * rng.standard_normal(24), loss.numpy(), eta, game)[0] >= best - 1e-14
    for level in range(4):
        inside = level == K
        assert float(w[inside].max() - w[inside].min()) == 0
        ratio = optimum[inside.numpy()] * 24
        assert ratio.max() - ratio.min() <= 1e-6
    torch.testing.assert_close(D, 1 / (1 + w), rtol=1e-14, atol=0)


def test_gibbs_tilt_of_a_gaussian() -> None:
    """Check T3: the KL game is p exp(-eta l) / Z, and of N(0, 1) and target t has mean eta t / (1 + eta)."""
    k = normal(200_000)
    for eta, t in ((0.3, 2.0), (10 / 3, 1.0)):
        _, w, _ = closed_form_discriminator(k, t, eta, "kl")
        tilt = torch.exp(-eta * (k - t).square() / 2)
        torch.testing.assert_close(w, tilt / tilt.mean(), rtol=1e-8, atol=0)
        mean = float((w * k).mean())
        assert abs(mean - eta * t / (1 + eta)) <= 0.01
        assert abs(float((w * (k - mean).square()).mean()) - 1 / (1 + eta)) <= 0.01


def test_conditionals_are_untouched() -> None:
    """Check T5: moments of what does not depend on K stay, while K moves."""
    k, others = normal(200_000), normal(200_000, 3, seed=1)
    for game in GAMES:
        _, w, _ = closed_form_discriminator(k, 2.0, 0.5, game)
        assert float((w * k).mean()) > 0.5
        assert float(((w - 1)[:, None] * others).mean(0).abs().max()) <= 0.01
        assert float(((w - 1)[:, None] * (others.square() - 1)).mean(0).abs().max()) <= 0.01


def test_limits_in_eta() -> None:
    """Check T9: a small eta leaves p, a larger one brings E[K] nearer to the target."""
    k = normal(20_000)
    spread = float((0.5 * (k - 1).square()).max())
    for game in GAMES:
        for eta in (1e-4, 1e-3):
            _, w, _ = closed_form_discriminator(k, 1.0, eta, game)
            assert float((w - 1).abs().max()) <= 3 * eta * spread
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MassEscapes)
            means = [
                float((closed_form_discriminator(k, 1.0, eta, game).weights * k).mean())
                for eta in np.logspace(-2, 2, 10).tolist()
            ]
        assert all(low < high for low, high in itertools.pairwise(means))
        assert means[0] < 0.01 < 0.9 < means[-1] < 1.01


def test_escaping_mass() -> None:
    """Check T11: K bounded away from the target, with vanishing density there."""
    k = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).amin(1)
    k = (k + 0.1).negative()  # at most -0.1, rarely near it
    with pytest.warns(MassEscapes, match="of 20000 samples"):
        closed_form_discriminator(k.neg().square().neg() * 40 - 10, 60.0, 30.0)
    loss = torch.cat([torch.zeros(1), torch.full((3_000_000,), 5.0)])
    D, w, _ = OPERATOR(loss, 10.0, "js")
    assert float(D[0]) == pytest.approx(1e-6, rel=1e-3)  # s is clamped
    assert float(w.mean()) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closed_form_discriminator(normal(20_000), 1.0, 1.0)


def test_effective_sample_size() -> None:
    assert float(effective_sample_size(torch.ones(7))) == 7
    assert float(effective_sample_size(torch.tensor([0.0, 3.0, 0.0]))) == 1
    k = normal(100_000)
    sizes = [float(effective_sample_size(closed_form_discriminator(k, t, 1.0).weights)) for t in (0.0, 1.0, 2.0, 3.0)]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match="weights"):
        effective_sample_size(torch.ones(0))


# ------------------------------------------------------------------------------------------------ arguments


def test_knowledge_of_several_dimensions_and_dtypes() -> None:
    k = normal(50, 3)
    target = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(knowledge_penalty(k, target), 0.5 * (k - target).square().sum(1))
    push = torch.nn.functional.softplus(4 * (1.0 - k)).mean(1)
    torch.testing.assert_close(knowledge_penalty(k, 1.0, penalty="push", sharpness=4.0), push)
    wide = closed_form_discriminator(k[:, 0].bfloat16().float(), 0.3, 1.0)
    narrow = closed_form_discriminator(k[:, 0].bfloat16(), 0.3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))
    strided = closed_form_discriminator(k[:, 1], 0.3, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(strided, closed_form_discriminator(k[:, 1].clone(), 0.3, 1.0), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(3, dtype=torch.int64), 1.0, 1.0), TypeError, "k must be a floating-point"),
        (([1.0], 1.0, 1.0), TypeError, "k must be"),
        ((torch.zeros(0), 1.0, 1.0), ValueError, "N > 0"),
        ((torch.zeros(2, 2, 2), 1.0, 1.0), ValueError, r"k must be \[N\]"),
        ((torch.zeros(2, 3), torch.zeros(2), 1.0), ValueError, r"k_star must be a number or \[3\]"),
        ((torch.zeros(2), 1.0, -1.0), ValueError, "eta"),
        ((torch.zeros(2), 1.0, math.nan), ValueError, "eta"),
        ((torch.zeros(2), 1.0, 1.0, "tv"), ValueError, "game"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        closed_form_discriminator(*arguments)


def test_bad_penalties() -> None:
    with pytest.raises(ValueError, match="penalty must be"):
        closed_form_discriminator(torch.zeros(2), 1.0, 1.0, penalty="cubic")
    with pytest.raises(ValueError, match="sharpness"):
        closed_form_discriminator(torch.zeros(2), 1.0, 1.0, penalty="push", sharpness=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_on_a_device(dtype: torch.dtype) -> None:
    for N in (1, 1000, 1_000_003):
        loss = penalties(N).to(dtype).cuda()
        for game in GAMES:
            for eta in (0.0, 1.0, 100.0):
                got = OPERATOR(loss, eta, game)
                for value, want in zip(got, reference.closed_form_discriminator(loss.double(), eta, game), strict=True):
                    assert (
                        float((value.double() - want).abs().max() / want.abs().max().clamp_min(1)) <= TOLERANCE[dtype]
                    )
