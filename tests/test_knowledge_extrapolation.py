"""Principal knowledge descent on generators whose factors are known, and the closed forms of its latent law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from neuraldeps_kernels.models.knowledge_extrapolation import (
    MODES,
    Extrapolation,
    Whitening,
    knowledge_weights,
    principal_knowledge_descent,
    shifted_prior_discriminator,
)
from neuraldeps_kernels.ops.closed_form_discriminator import closed_form_discriminator
from neuraldeps_kernels.ops.spectrum import principal_directions

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16  # of the latent space


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int = D, seed: int = 5) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


W = rotation()  # G(z) = W z: the factors of a sample; the first is the true knowledge
SPURIOUS = torch.linalg.qr(normal(D, D, seed=6))[0][:, :6]


def linear(z: Tensor) -> Tensor:
    return z @ W.mT


def clean(x: Tensor) -> Tensor:
    return x[:, 0]


def contaminated(x: Tensor) -> Tensor:
    """The first factor, and waves too fast to mean anything."""
    return x[:, 0] + 0.06 * torch.sin(9 * x @ SPURIOUS).sum(1)


def descend(knowledge: Callable[[Tensor], Tensor], z0: Tensor, **options: Any) -> Extrapolation:
    """Asks for one more than the mean of the knowledge."""
    target = options.pop("target", float(knowledge(linear(z0)).mean()) + 1)
    return principal_knowledge_descent(linear, knowledge, z0, target, **options)


def assert_descends(trace: Any) -> None:
    """Check T7: E never rises, for any sample or step."""
    for before, after in zip(trace.energies, trace.energies[1:], strict=False):
        assert bool((after <= before).all())


# ------------------------------------------------------------------------------------------------ closed forms


def test_latent_discriminator_is_a_logistic_regression() -> None:
    """Check T4: the closed form has the coefficients that a fit finds, within 0.02."""
    mu = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64)
    p, q = normal(40_000, 3, seed=1), normal(40_000, 3, seed=2) + mu
    labels = torch.cat([torch.ones(len(p)), torch.zeros(len(q))])
    fit = LogisticRegression(C=1e6).fit(torch.cat([p, q]).numpy(), labels.numpy())
    divergence = 0.5 * float(mu.square().sum())
    assert abs(float(fit.intercept_[0]) - divergence) <= 0.02
    assert float((torch.from_numpy(fit.coef_[0]) + mu).abs().max()) <= 0.02
    discriminator, kl = shifted_prior_discriminator(p, mu)
    torch.testing.assert_close(kl, mu.square().sum() / 2)
    torch.testing.assert_close(discriminator, torch.sigmoid(divergence - p @ mu))
    ratio = torch.exp(p @ mu - kl)  # q / p
    torch.testing.assert_close(discriminator, 1 / (1 + ratio))


def test_knowledge_weights() -> None:
    z = normal(5000, D)
    weights = knowledge_weights(linear, clean, z, 1.5, eta=0.8, game="kl", batch_size=700)
    want = closed_form_discriminator(linear(z)[:, 0], 1.5, 0.8, "kl")
    assert all(torch.equal(a, b) for a, b in zip(weights, want, strict=True))
    assert float((weights.weights * linear(z)[:, 0]).mean()) > 0.5


# ------------------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (3, 50, 20), (18, 24, 48)], ids=str)
def test_principal_directions(shape: tuple[int, ...]) -> None:
    """Projectors and values as of torch's SVD; orthonormal."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        decay = torch.linspace(0, 3, shape[-1], dtype=torch.float64).neg().exp()
        rows = (normal(*shape) * decay).to(dtype)
        _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
        for rank in (1, 3):
            U, values = principal_directions(rows, rank)
            assert U.dtype == values.dtype == dtype
            kept = vh[..., :rank, :]
            torch.testing.assert_close((U.mT @ U).double(), kept.mT @ kept, rtol=0, atol=tolerance)
            torch.testing.assert_close(values.double(), s, rtol=0, atol=tolerance * float(s.max()))
            torch.testing.assert_close(
                (U @ U.mT).double(), torch.eye(rank, dtype=torch.float64).expand(*shape[:-2], -1, -1), rtol=0, atol=1e-5
            )


def test_rank_by_energy() -> None:
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).double()
    for energy, rank in ((0.5, 1), (9 / 14.25, 1), (0.7, 2), (0.95, 3), (1.0, 4)):
        assert principal_directions(rows, energy=energy)[0].shape == (rank, 4)
    U, _ = principal_directions(torch.zeros(5, 3), 2)
    torch.testing.assert_close(U @ U.mT, torch.eye(2))


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        (torch.zeros(3), {}, "must be"),
        (torch.zeros(0, 3), {}, "rows must be"),
        (torch.eye(3), {"rank": 4}, "rank must be"),
        (torch.eye(3), {"rank": 1, "energy": 0.5}, "rank or energy"),
        (torch.eye(3), {"energy": 1.5}, "energy must be"),
        (torch.full((3, 3), torch.nan), {}, "NaN"),
    ],
)
def test_bad_directions(rows: Tensor, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        principal_directions(rows, **options)


# ------------------------------------------------------------------------------------------------ descent


def test_linear_generator() -> None:
    """Check T6: the principal direction is W' a, and nothing orthogonal to it moves."""
    z0 = normal(64, D)
    gradients = W[0].expand(64, D)
    U, values = principal_directions(gradients, 1)
    assert abs(float(U[0] @ W[0])) >= 1 - 1e-10
    assert int((values > 1e-10 * values[0]).sum()) == 1
    result = descend(clean, z0, rank=1)
    moved = result.z - z0
    rest = moved - (moved @ W[0])[:, None] * W[0]
    assert float(rest.abs().max()) <= 1e-12
    assert float(moved.abs().max()) > 0.1
    assert_descends(result.trace)


def test_principal_subspace_resists_spurious_gradients() -> None:
    """Check T8: the true factor moves by what was asked, others by a third of what the full gradient moves them."""
    z0 = normal(256, D)
    gains, others = {}, {}
    for mode in ("svd", "full"):
        target = contaminated(linear(z0)) + 1  # each sample by one: a target of its own
        moved = torch.cat(
            [
                linear(
                    principal_knowledge_descent(linear, contaminated, z0, float(target.mean()), mode=mode, rho=0.0).z
                )
                - linear(z0)
            ]
        )
        asked = float(target.mean()) - contaminated(linear(z0))
        far = asked.abs() > 0.5
        gains[mode] = float((moved[far, 0] / asked[far]).mean())
        others[mode] = float((moved[far, 1:].norm(dim=1) / asked[far].abs()).mean())
    assert gains["svd"] >= 0.85
    assert others["svd"] <= others["full"] / 3


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_descends_and_stops(mode: str) -> None:
    """Check T7, and samples reach their target where nothing stands against it."""
    z0 = normal(40, D)
    options = {"mode": mode, "rho": 0.0, "coordinates": 4}
    if mode == "natural":
        options["preserve_map"] = lambda x: x[:, 1:4]
    result = descend(clean, z0, **options)
    assert_descends(result.trace)
    assert result.trace.steps < 60
    k = linear(result.z)[:, 0]
    spread = linear(z0)[:, 0].std(correction=0)
    assert float((k - (linear(z0)[:, 0].mean() + 1)).abs().max()) <= 0.0101 * spread
    if mode == "natural":
        kept, free = linear(result.z - z0)[:, 1:4], descend(clean, z0, mode="full", rho=0.0).z - z0
        assert float(kept.abs().max()) <= 1e-6 + float(linear(free)[:, 1:4].abs().max())


def test_natural_direction_spares_the_features() -> None:
    """Where K and the features share a direction of codes, the natural step goes round it."""
    z0 = normal(40, D)

    def mixed(x: Tensor) -> Tensor:
        return x[:, 0] + x[:, 1]

    moves = {
        mode: linear(descend(mixed, z0, mode=mode, rho=0.0, preserve_map=lambda x: x[:, 1:2]).z - z0)
        for mode in ("full", "natural")
    }
    assert float(moves["natural"][:, 1].abs().mean()) <= 0.05 * float(moves["full"][:, 1].abs().mean())


def test_limits_in_eta() -> None:
    """Check T9: nothing moves for eta = 0, and more with larger eta."""
    z0 = normal(32, D)
    still = descend(clean, z0, eta=0.0)
    assert torch.equal(still.z, z0)
    gaps = []
    for eta in (0.01, 0.1, 1.0, 10.0):
        result = descend(clean, z0, eta=eta, rho=0.5, steps=200, tolerance=0.0)
        gaps.append(float((linear(result.z)[:, 0] - float(linear(z0)[:, 0].mean()) - 1).abs().mean()))
    assert gaps == sorted(gaps, reverse=True)


def test_invariances() -> None:
    """Check T10: rotated codes give rotated results, and the order of the batch does not matter."""
    z0, Q = normal(48, D), rotation(seed=9)
    target = float(contaminated(linear(z0)).mean()) + 1
    result = principal_knowledge_descent(linear, contaminated, z0, target, steps=8)
    rotated = principal_knowledge_descent(lambda z: linear(z @ Q), contaminated, z0 @ Q.mT, target, steps=8)
    torch.testing.assert_close(rotated.z, result.z @ Q.mT, rtol=0, atol=1e-8)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = principal_knowledge_descent(linear, contaminated, z0[order], target, steps=8, batch_size=7)
    torch.testing.assert_close(shuffled.z, result.z[order], rtol=0, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_device(mode: str) -> None:
    """Check T10: CPU = GPU within 1e-4."""
    z0, options = normal(48, D), {"mode": mode, "rank": 2, "steps": 8, "coordinates": 4}

    def descended(device: str) -> Tensor:
        turned = W.to(device)
        return principal_knowledge_descent(
            lambda z: z @ turned.mT,
            lambda x: x[:, 0] + 0.2 * torch.tanh(x[:, 1]),
            z0.to(device),
            1.5,
            preserve_map=lambda x: x[:, 2:4],
            **options,
        ).z.cpu()

    torch.testing.assert_close(descended("cuda"), descended("cpu"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_preserved_directions(mode: str) -> None:
    """Check T12: no code moves along what is to be preserved."""
    z0 = normal(40, D)
    preserve = torch.linalg.qr(torch.stack([W[1] + W[0], W[2]], 1))[0].mT
    result = descend(clean, z0, mode=mode, preserve=preserve, preserve_map=lambda x: x[:, 3:4], rank=2)
    moved = result.z - z0
    assert float((moved @ preserve.mT).norm(dim=1).max()) <= 1e-10
    assert float(moved.norm(dim=1).min()) > 1e-3


def test_everything_preserved() -> None:
    z0 = normal(10, D)
    assert torch.equal(descend(clean, z0, preserve=W[:1]).z, z0)


def test_vector_knowledge() -> None:
    """Check T13: both targets are reached, by the least motion that does it."""
    A = normal(2, D, seed=3) / math.sqrt(D)
    z0, target = normal(30, D), torch.tensor([1.0, -0.5], dtype=torch.float64)
    result = principal_knowledge_descent(
        linear, lambda x: x @ A.mT, z0, target, rank=2, rho=0.0, steps=2000, tolerance=1e-8
    )
    B = A @ W  # knowledge is B z
    torch.testing.assert_close(result.z @ B.mT, target.expand(30, 2), rtol=0, atol=1e-5)
    least = z0 + (target - z0 @ B.mT) @ torch.linalg.pinv(B).mT
    torch.testing.assert_close(result.z, least, rtol=0, atol=1e-4)


def test_layered_codes() -> None:
    """w+: each layer has a subspace of its own; a layer that K does not depend on stays."""
    z0 = normal(20, 3, 8)
    first, last = normal(8, seed=1), normal(8, seed=2)

    def knowledge(w: Tensor) -> Tensor:
        return w[:, 0] @ first + w[:, 2] @ last

    result = principal_knowledge_descent(lambda w: w, knowledge, z0, 4.0, rho=0.0)
    moved = result.z - z0
    assert float(moved[:, 1].abs().max()) <= 1e-12
    assert float((knowledge(result.z) - 4).abs().max()) <= 0.011 * float(knowledge(z0).std(correction=0))
    for layer, u in ((0, first), (2, last)):
        unit = u / u.norm()
        torch.testing.assert_close((moved[:, layer] @ unit)[:, None] * unit, moved[:, layer], rtol=0, atol=1e-10)


def test_whitened_codes() -> None:
    """Codes of any Gaussian law are treated as those of N(0, I): the same samples come out."""
    z0, scale, shift = normal(400, D), torch.tril(normal(D, D, seed=4)) + 3 * torch.eye(D), normal(D, seed=8)
    codes = z0 @ scale.mT + shift
    exact = Whitening(shift, scale)
    torch.testing.assert_close(exact.decode(exact.encode(codes)), codes)

    def mapped(w: Tensor) -> Tensor:
        return linear(exact.encode(w))

    plain = principal_knowledge_descent(linear, clean, z0[:50], 2.0)
    whitened = principal_knowledge_descent(mapped, clean, codes[:50], 2.0, whitening=exact)
    torch.testing.assert_close(mapped(whitened.z), linear(plain.z), rtol=0, atol=1e-8)
    fitted = Whitening.of_samples(codes)
    spread = torch.cov(fitted.encode(codes).mT, correction=0)
    torch.testing.assert_close(spread, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-4)
    layered = Whitening.of_samples(codes.view(-1, 2, D // 2))
    torch.testing.assert_close(layered.decode(layered.encode(codes.view(-1, 2, 8))), codes.view(-1, 2, 8))


def test_push_stops_beyond_the_target() -> None:
    z0 = normal(40, D)
    target = 0.5
    result = principal_knowledge_descent(
        linear, clean, z0, target, penalty="push", sharpness=6.0, rho=0.0, tolerance=0.0
    )
    k0, k = linear(z0)[:, 0], linear(result.z)[:, 0]
    assert bool((k >= target).all())
    assert torch.equal(result.z[k0 >= target], z0[k0 >= target])


def test_float32_and_a_network() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(D, 32), torch.nn.Tanh(), torch.nn.Linear(32, 12)).eval()
    z0 = normal(64, D).float()
    before = [parameter.clone() for parameter in network.parameters()]
    result = principal_knowledge_descent(network, lambda x: x[:, :3].mean(1), z0, 0.5, energy=0.9)
    assert result.z.dtype == torch.float32
    assert result.trace.rank >= 1
    assert_descends(result.trace)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    again = principal_knowledge_descent(network, lambda x: x[:, :3].mean(1), z0, 0.5, energy=0.9)
    assert torch.equal(result.z, again.z)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"z0": torch.zeros(3, dtype=torch.float16)}, TypeError, "z0 must be"),
        ({"z0": torch.zeros(3)}, ValueError, r"z0 must be \[B, d\]"),
        ({"z0": torch.zeros(0, D)}, ValueError, "empty"),
        ({"mode": "best"}, ValueError, "mode must be"),
        ({"mode": "natural"}, ValueError, "preserve_map"),
        ({"eta": -1.0}, ValueError, "eta"),
        ({"rho": math.nan}, ValueError, "rho"),
        ({"steps": -1}, ValueError, "steps"),
        ({"refresh": 0}, ValueError, "refresh"),
        ({"coordinates": 99}, ValueError, "coordinates"),
        ({"preserve": torch.ones(2, D)}, ValueError, "orthonormal"),
        ({"preserve": torch.ones(2, 3)}, ValueError, "preserve must be"),
        ({"penalty": "cubic"}, ValueError, "penalty"),
        ({"target": torch.zeros(3)}, ValueError, "k_star"),
        ({"knowledge": lambda x: x[0]}, ValueError, "knowledge must be"),
        ({"knowledge": lambda x: x[:, 0] / 0}, ValueError, "finite"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"generator": linear, "knowledge": clean, "z0": normal(4, D), "target": 1.0} | options
    with pytest.raises(error, match=match):
        principal_knowledge_descent(**arguments)


def test_bad_whitening() -> None:
    with pytest.raises(ValueError, match="codes must be"):
        Whitening.of_samples(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="positive definite"):
        Whitening.of_samples(torch.ones(5, 4), ridge=0.0)
    with pytest.raises(ValueError, match="mu"):
        shifted_prior_discriminator(torch.zeros(3, 4), torch.zeros(3))
