"""Metrics of extrapolated knowledge against their definitions, the comparison of methods on known generators, and the
generators of faces and shapes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from neuraldeps_kernels.analysis.extrapolation import (
    METHODS,
    PRINCIPAL,
    UNCHANGED,
    WEIGHTING,
    ExtrapolationReport,
    compare_extrapolations,
    frechet_distance,
    indistinguishability,
    matched_subset,
    pooled,
    success_and_gap,
)
from neuraldeps_kernels.data.rendered_shapes import FACTORS, SIDE, render_shapes, sample_factors
from neuraldeps_kernels.models import generators
from neuraldeps_kernels.models.generators import (
    PICTURE_KNOWLEDGE,
    DCGANGenerator,
    face_generator,
    train_factor_probe,
    train_knowledge_probe,
    train_shape_generator,
)
from neuraldeps_kernels.models.knowledge_extrapolation import (
    Whitening,
    joint_directions,
    knowledge_directions,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ metrics


def test_success_and_gap() -> None:
    """Ways 1, 2, 1 to the target; remaining gaps 0.1, 0.1, 0.5."""
    k, k0 = torch.tensor([[0.91], [1.1], [1.5]]), torch.tensor([[0.0], [3.0], [2.0]])
    success, gap = success_and_gap(k, k0, torch.ones(1))
    assert success == pytest.approx(2 / 3)
    assert gap == pytest.approx((0.09 + 0.1 + 0.5) / 3)


def test_frechet_distance() -> None:
    """scipy's matrix square root; 0 for the same, and of shifted ones the squared shift."""
    x, y = normal(300, 5).double(), (normal(200, 5, seed=1) @ normal(5, 5, seed=2)).double() + 1
    C, D = torch.cov(x.mT).numpy(), torch.cov(y.mT).numpy()
    want = float((x.mean(0) - y.mean(0)).square().sum()) + (C + D - 2 * sqrtm(C @ D).real).trace()
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x + 2) == pytest.approx(20, rel=1e-9)
    assert frechet_distance(x[:, :1], x[:, :1] * 3) > 1
    for bad in (x[:1], x[:, 0], x[:, :2]):
        with pytest.raises(ValueError, match="features must be"):
            frechet_distance(x, bad)


def test_matched_subset() -> None:
    pool, k = torch.tensor([[0.0], [5.0], [1.0], [1.1], [9.0]]), torch.tensor([[1.0], [1.0], [4.0]])
    rows = matched_subset(k, pool)
    assert sorted(rows.tolist()) == [1, 2, 3]
    assert int(rows[2]) == 1
    with pytest.raises(ValueError, match="pool must have"):
        matched_subset(pool, k)


def test_indistinguishability() -> None:
    """Chance where features differ by K and its square alone, near 1 where they differ otherwise."""
    k_p, k_q, noise = normal(150, 1), normal(150, 1, seed=1) * 0.3 + 1.5, normal(300, 4, seed=2)
    k = torch.cat([k_p, k_q])
    features = noise + 2 * k - k.square()
    same = indistinguishability(features[:150], features[150:], k_p, k_q)
    assert all(0.35 <= accuracy <= 0.65 for accuracy in same)
    shifted = features.clone()
    shifted[150:, 0] += 8 * torch.where(noise[150:, 1] > 0, 1.0, -1.0)  # no line tells them, a network does
    logistic, mlp = indistinguishability(shifted[:150], shifted[150:], k_p, k_q)
    assert logistic <= 0.7
    assert mlp >= 0.9


# ------------------------------------------------------------------------------------------------ comparison

D = 10


class Mixture(nn.Module):
    """Codes to six values; of the fourth a wave too fast to mean anything is added to what is taken for knowledge."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 6)
        with torch.no_grad():
            self.first.weight.copy_(torch.linalg.qr(normal(D, D, seed=3))[0][:6])
            self.first.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.first(z)
        return x


def told(x: Tensor) -> Tensor:
    return x[:, 0] + 0.06 * torch.sin(9 * x[:, 1:]).sum(1)


def comparison(**options: Any) -> ExtrapolationReport:
    attributes = {f"factor {j}": (lambda x, j=j: x[:, j]) for j in range(1, 6)}
    settings: dict[str, Any] = {"prior": 1000, "scorer": lambda x: x[:, 0], "attributes": attributes, "rho": 0.01}
    return compare_extrapolations(Mixture().eval(), told, normal(80, D), **{**settings, **options})


def test_comparison_of_methods() -> None:
    """The principal descent moves the true factor and spares the others; so do the weights, on few samples."""
    report = comparison()
    rows = report.rows
    assert list(rows) == [UNCHANGED, *METHODS]
    assert rows[UNCHANGED].success <= 0.1
    assert (rows[UNCHANGED].gain, rows[UNCHANGED].displacement, rows[UNCHANGED].others) == (0, 0, 0)
    assert rows[UNCHANGED].frechet > 0.01  # the prior is not drawn as z0 was, with the same seed
    assert rows[PRINCIPAL].success >= 0.6
    assert rows[PRINCIPAL].gain == pytest.approx(1, abs=0.15)
    assert rows[PRINCIPAL].others <= 0.5 * rows["full gradient"].others
    assert rows["random direction"].displacement == pytest.approx(rows[PRINCIPAL].displacement, rel=1e-4)
    assert abs(rows["random direction"].gain) <= 0.2
    assert rows["linear hyperplane"].gain == pytest.approx(1, abs=0.15)
    assert rows["linear hyperplane"].gap <= 0.05
    assert rows[WEIGHTING].gain == pytest.approx(1, abs=0.2)
    assert math.isnan(rows[WEIGHTING].displacement)
    assert rows[WEIGHTING].frechet < rows["factorisation"].frechet + 1
    assert 1 < report.ess < 300
    assert 0.3 < report.divergence < math.log(2)
    assert rows[UNCHANGED].discriminator > 0.8 > 0.3 > rows[PRINCIPAL].discriminator
    assert rows[PRINCIPAL].evaluations > rows["linear hyperplane"].evaluations > rows[WEIGHTING].evaluations > 10
    again = comparison()
    assert again.to_dict() == report.to_dict()
    assert all(torch.equal(again.codes[name], report.codes[name]) for name in rows)


def test_report(tmp_path: Path) -> None:
    report = comparison(methods=[PRINCIPAL], by=1.0, steps=3)
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert list(content["methods"]) == [UNCHANGED, PRINCIPAL]
    assert content["by"] == [1.0]
    assert report.table().row_count == 2
    with pytest.raises(ValueError, match="must be pictures"):
        report.plot(tmp_path / "x.png")


def test_only_the_random_direction() -> None:
    report = comparison(methods=["random direction"], steps=2)
    assert list(report.rows) == [UNCHANGED, "random direction"]
    assert report.rows["random direction"].displacement > 0


def test_vector_knowledge_and_layers() -> None:
    """Two pieces of knowledge of w+ codes, moved to a target each."""
    first = normal(2, 3, 4, seed=1)
    report = compare_extrapolations(
        lambda w: w.flatten(1),
        lambda x: torch.einsum("bld,mld->bm", x.view(-1, 3, 4), first),
        normal(40, 3, 4),
        by=[1.0, -0.5],
        prior=300,
        methods=[PRINCIPAL, "linear hyperplane", "random direction", "factorisation"],
        first_layer=torch.eye(4),
        rank=2,
        rho=0.0,
        steps=200,
        tolerance=0.01,
    )
    assert report.by == pytest.approx([1.0, -0.5])
    assert report.rows[PRINCIPAL].gap <= 0.02
    assert report.rows[PRINCIPAL].gain == pytest.approx(1, abs=0.05)
    assert report.codes[PRINCIPAL].shape == (40, 3, 4)


def test_whitened_comparison() -> None:
    """Codes of another Gaussian law go the same way as whitened ones."""
    exact = Whitening(normal(D, seed=8), torch.tril(normal(D, D, seed=4)) + 3 * torch.eye(D))
    z0, pool, network = normal(40, D), normal(500, D, seed=1), Mixture().eval()
    options: dict[str, Any] = {"methods": [PRINCIPAL, "linear hyperplane"], "rho": 0.01}
    plain = compare_extrapolations(network, told, z0, prior=pool, **options)
    mapped = compare_extrapolations(
        lambda w: network(exact.encode(w)), told, exact.decode(z0), prior=exact.decode(pool), whitening=exact, **options
    )
    torch.testing.assert_close(exact.encode(mapped.codes[PRINCIPAL]), plain.codes[PRINCIPAL], rtol=0, atol=0.02)
    assert mapped.rows[PRINCIPAL].displacement == pytest.approx(plain.rows[PRINCIPAL].displacement, rel=0.01)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ["magic"]}, "methods must be"),
        ({"methods": []}, "methods must be"),
        ({"by": math.nan}, "finite"),
        ({"by": [1.0, 2.0]}, "the target must be"),
        ({"prior": 20}, "prior must be"),
        ({"prior": torch.zeros(200, 3)}, "prior must be"),
        ({"prior": torch.zeros(200, D)}, "vary over the prior"),
        ({"first_layer": torch.zeros(2, 3)}, "first_layer"),
        ({"mode": "best"}, "mode must be"),
        ({"scorer": lambda x: x[:, :2]}, "scorer must tell 1 value"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        comparison(**options)
    with pytest.raises(ValueError, match="z0 must be"):
        compare_extrapolations(Mixture(), told, normal(3, D))


def test_directions_to_preserve() -> None:
    """Directions of two linear pieces of knowledge, and of their sum of subspaces."""
    network, z = Mixture(), normal(50, D)
    weight = network.first.weight.detach()
    one = knowledge_directions(network, lambda x: x[:, 0] + x[:, 1], z)
    two = knowledge_directions(network, lambda x: x[:, 1], z)
    unit = (weight[0] + weight[1]) / math.sqrt(2)
    torch.testing.assert_close(one.mT @ one, unit[:, None] @ unit[None], rtol=0, atol=1e-5)
    both = joint_directions([one, two, one])
    assert both.shape == (2, D)
    torch.testing.assert_close(both.mT @ both, weight[:2].mT @ weight[:2], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ generators


def test_rendered_shapes() -> None:
    """Colour, place, size and background are those asked for."""
    factors = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.0], [1.0, 0.5, 0.5, 0.5, 1.0], [0.5, 0.0, 1.0, 0.0, 0.5]])
    x = render_shapes(factors)
    assert x.shape == (3, 3, SIDE, SIDE)
    assert -1 <= float(x.min()) < float(x.max()) <= 1
    centre, corner = x[:2, :, SIDE // 2, SIDE // 2], x[:2, :, 0, 0]
    assert centre[0, 0] > 0.9 > -0.7 > centre[0, 2]  # red
    assert centre[1, 2] > 0.9 > -0.7 > centre[1, 0]  # blue
    torch.testing.assert_close(corner, 2 * torch.tensor([[0.1], [0.45]]).expand(2, 3) - 1, rtol=0, atol=1e-4)
    contrast = (x - x[:, :, :1, :1]).abs().sum(1)  # [N, side, side]
    disc = contrast > 0.5 * contrast.amax((1, 2), keepdim=True)
    area = disc.sum((1, 2))
    assert area[0] == pytest.approx(math.pi * (0.19 * SIDE) ** 2, rel=0.15)
    assert area[2] < area[0]
    rows, columns = disc[2].nonzero().float().mean(0)
    assert (rows / SIDE, columns / SIDE) == pytest.approx((0.7, 0.3), abs=0.03)
    assert torch.equal(sample_factors(5, seed=1), sample_factors(5, seed=1))
    for bad in (torch.zeros(2, 3), torch.full((1, 5), 1.5), torch.full((1, 5), torch.nan)):
        with pytest.raises(ValueError, match="factors must be"):
            render_shapes(bad)
    with pytest.raises(ValueError, match="side"):
        render_shapes(factors, side=4)
    with pytest.raises(ValueError, match="count"):
        sample_factors(0)


@pytest.mark.slow
def test_trained_shapes() -> None:
    """Probes tell factors of rendered pictures, two agree on generated ones, and these vary in every factor but hue,
    which takes the full training."""
    network = train_shape_generator(steps=400)
    probes = [train_factor_probe(seed=seed, steps=250) for seed in (0, 1)]
    factors = sample_factors(500, seed=9)
    z = normal(500, network.latent)
    found = [probe(network(z)) for probe in probes]
    for probe in probes:
        assert bool(((probe(render_shapes(factors)) - factors).abs().mean(0) <= 0.08).all())
    assert bool((found[0].std(0)[1:] >= 0.12).all())
    for j in range(1, len(FACTORS)):
        pair = torch.stack([values[:, j] for values in found])
        assert float(torch.corrcoef(pair)[0, 1]) >= 0.7


def test_trainings_repeat_and_leave_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    a, b = (train_shape_generator(seed=3, steps=2) for _ in range(2))
    other = train_shape_generator(seed=4, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    z = normal(4, a.latent)
    assert torch.equal(a(z), b(z))
    assert not torch.equal(a(z), other(z))
    assert a(z).shape == (4, 3, SIDE, SIDE)
    assert not any(parameter.requires_grad for parameter in a.parameters())


def test_probe_of_knowledge() -> None:
    """Told in deviations; knowledge that does not vary is refused."""
    codes = normal(400, 8)

    def network(z: Tensor) -> Tensor:
        return (0.3 * z[:, :3, None, None]).expand(-1, -1, 40, 40)

    probe = train_knowledge_probe(network, PICTURE_KNOWLEDGE["brightness"], codes, steps=60)
    told = probe(network(codes))[:, 0]
    exact = codes[:, :3].mean(1)
    assert float(torch.corrcoef(torch.stack([told, exact]))[0, 1]) >= 0.97
    assert float(told.std()) == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="vary over the codes"):
        train_knowledge_probe(network, lambda x: 0 * x.sum((1, 2, 3)), codes)


def test_picture_knowledge() -> None:
    x = torch.zeros(1, 3, 12, 12)
    x[:, 0, :4, :6] = 1.0  # red, above, on the left
    values = {name: float(knowledge(x)[0]) for name, knowledge in PICTURE_KNOWLEDGE.items()}
    assert values["brightness"] == pytest.approx(24 / 432)
    assert values["upper-brightness"] == pytest.approx(3 * 24 / 432)
    assert values["centre-brightness"] == pytest.approx(3 / 108)
    assert values["redness"] == pytest.approx(24 / 144)
    assert values["symmetry"] == pytest.approx(-48 / 432)
    assert values["contrast"] == pytest.approx(float(x.std()))
    symmetric = x + x.flip(3)
    assert float(PICTURE_KNOWLEDGE["symmetry"](symmetric)[0]) == 0
    assert pooled(x).shape == (1, 48)


def test_face_weights_in_a_file(tmp_path: Path) -> None:
    """A checkpoint of the package's layout, or bare parameters; anything else is refused."""
    torch.manual_seed(0)
    state = DCGANGenerator().state_dict()
    z = normal(2, 100)
    for name, content in (("a", {"netG_state_dict": state, "epoch": 5}), ("b", state)):
        torch.save(content, tmp_path / name)
        faces = face_generator(tmp_path / name)
        assert faces(z).shape == (2, 3, 64, 64)
        assert float(faces(z).abs().max()) <= 1
        assert not faces.training
        assert not any(parameter.requires_grad for parameter in faces.parameters())
    torch.save({"netG_state_dict": {"main.0.weight": torch.zeros(2)}}, tmp_path / "c")
    (tmp_path / "d").write_text("no checkpoint")
    for name in ("c", "d"):
        with pytest.raises(ValueError, match="holds no weights"):
            face_generator(tmp_path / name)
    with pytest.raises(OSError, match="nowhere"):
        face_generator(tmp_path / "nowhere")


@pytest.mark.skipif(importlib.util.find_spec("gan_face_generate") is None, reason="gan-face-generate is not installed")
def test_real_faces() -> None:
    """The package's weights give pictures that vary, and brighter ones by the descent."""
    report = compare_extrapolations(
        face_generator(), generators.brightness, normal(12, 100), methods=[PRINCIPAL], prior=100, steps=10
    )
    assert report.rows[PRINCIPAL].gap < 0.3 * report.rows[UNCHANGED].gap
    assert float(report.pictures[UNCHANGED].std(0).mean()) > 0.1
