"""FAMLP: acceptance checks 11 to 14, by number, and the network built of these parts.

Checks 1 to 10, of the Fourier filter alone, are in test_fourier_filter.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from tensors import generator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neuraldeps_kernels as nk
from neuraldeps_kernels.models import famlp
from neuraldeps_kernels.models.famlp import FAMLP, AdaptiveFourierFilter, LowRankEnhancement, MomentumTeacher, Size
from neuraldeps_kernels.nn import FourierFilter2d

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Size(2, (8, 12), (2, 1))


def tiny(**options: object) -> FAMLP:
    """Two stages on 8 x 6 and 4 x 3 tokens, three blocks, 5 classes."""
    torch.manual_seed(0)
    return FAMLP(5, TINY, **{"image_size": (16, 12), "low_rank": functools.partial(LowRankEnhancement, 3), **options})


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 12, generator=generator(seed))


# ------------------------------------------------------------------------------------------------ low rank

# [B, N, C] with N > C and N < C, as in the first and the last stages
MATRICES = [(2, 20, 7), (3, 6, 11)]


def matrices(B: int, N: int, C: int) -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64, generator=generator(N))


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed)))[0]


@pytest.mark.parametrize("mode", ["detach", "exact"])
@pytest.mark.parametrize("shape", MATRICES)
def test_low_rank_projection(shape: tuple[int, int, int], mode: str) -> None:
    """Check 11."""
    z, k = matrices(*shape), 3
    full = min(shape[1:])
    low = nk.low_rank_project(z, k, mode=mode)
    torch.testing.assert_close(nk.low_rank_project(z, full, mode=mode), z, rtol=0, atol=1e-12)
    sigma = torch.linalg.svdvals(z)
    assert torch.linalg.svdvals(low)[:, k:].max() < 1e-12 * sigma.max()
    torch.testing.assert_close(nk.low_rank_project(low, k, mode=mode), low, rtol=0, atol=1e-11)
    energy, kept, lost = (part.square().sum((1, 2)) for part in (z, low, z - low))
    torch.testing.assert_close(kept + lost, energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(lost, sigma[:, k:].square().sum(1), rtol=1e-10, atol=0)  # Eckart-Young
    Q, R = orthogonal(shape[1], 1), orthogonal(shape[2], 2)
    torch.testing.assert_close(nk.low_rank_project(Q @ z, k, mode=mode), Q @ low, rtol=0, atol=1e-11)
    torch.testing.assert_close(nk.low_rank_project(z @ R, k, mode=mode), low @ R, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", MATRICES)
def test_exact_gradient_of_low_rank_projection(shape: tuple[int, int, int]) -> None:
    """Check 12: differences at a clear gap, finite where kept singular values repeat."""
    B, N, C = shape
    U, V = orthogonal(N, 3)[:, :5], orthogonal(C, 4)[:, :5]
    clear = (U * torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5], dtype=torch.float64)) @ V.mT
    repeated = (U * torch.tensor([5.0, 5.0, 5.0, 1.0, 0.5], dtype=torch.float64)) @ V.mT
    for z in (clear, repeated):
        exact = functools.partial(nk.low_rank_project, k=3, mode="exact")
        assert torch.autograd.gradcheck(exact, z[None].expand(B, N, C).clone().requires_grad_())


@pytest.mark.parametrize("shape", MATRICES)
def test_detached_gradient_of_low_rank_projection(shape: tuple[int, int, int]) -> None:
    """Check 12: the projector of the shorter side is a constant, V_k V_k' for N >= C, U_k U_k' for N < C."""
    z = matrices(*shape).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, generator=generator(9))
    (found,) = torch.autograd.grad(nk.low_rank_project(z, 3, mode="detach"), z, grad)
    U, _, Vh = torch.linalg.svd(z.detach(), full_matrices=False)
    U, V = U[..., :3], Vh[:, :3].mT
    expected = grad @ V @ V.mT if shape[1] >= shape[2] else U @ U.mT @ grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_enhancement_projects_tokens_or_channels() -> None:
    z = torch.randn(2, 6, 5, 4, generator=generator())
    low = LowRankEnhancement(2)(z)
    torch.testing.assert_close(low.view(2, 30, 4), nk.low_rank_project(z.view(2, 30, 4), 2))
    by_channel = LowRankEnhancement(2, per_channel=True, mode="exact")(z)
    for channel in range(4):
        torch.testing.assert_close(by_channel[..., channel], nk.low_rank_project(z[..., channel], 2))
    scaled = LowRankEnhancement(2, learn_scale=True)
    assert scaled.scale is not None
    torch.testing.assert_close(scaled(z), low)
    scaled(z).sum().backward()
    torch.testing.assert_close(scaled.scale.grad, low.sum(), rtol=1e-4, atol=1e-4)
    assert torch.equal(LowRankEnhancement(0)(z), torch.zeros_like(z))


# ------------------------------------------------------------------------------------------------ momentum


def test_teacher_is_the_weighted_past() -> None:
    """Check 13: after n steps with a constant student theta (1 - m^n) + m^n theta_bar(0)."""
    start, student, m, n = tiny().double(), tiny().double(), 0.9, 7
    with torch.no_grad():
        for theta in student.parameters():
            theta.add_(torch.randn(theta.shape, dtype=theta.dtype, generator=generator(1)))
    teacher = MomentumTeacher(start, m)
    for _ in range(n):
        teacher.update(student)
    found, first, last = (list(net.parameters()) for net in (teacher.network, start, student))
    for theta_bar, begin, theta in zip(found, first, last, strict=True):
        torch.testing.assert_close(theta_bar, theta * (1 - m**n) + m**n * begin, rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_the_teacher() -> None:
    """Check 13."""
    student = tiny(drop_path=0.5)
    teacher = MomentumTeacher(student).train()
    before = copy.deepcopy(teacher.state_dict())
    x = images()
    targets = teacher(x)
    assert not targets.requires_grad
    assert torch.equal(targets, teacher(x))  # eval mode, also after train(): no path is dropped
    loss = famlp.distillation_loss(student(x), targets)
    loss.backward()
    assert all(theta.grad is None for theta in teacher.parameters())
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    logits = torch.zeros(2, 3, requires_grad=True)
    famlp.distillation_loss(torch.ones(2, 3, requires_grad=True), logits).backward()
    assert logits.grad is None


def test_teacher_copies_buffers() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = MomentumTeacher(student)
    student(torch.randn(8, 3, generator=generator()))
    teacher.update(student)
    assert torch.equal(teacher.network[1].running_mean, student[1].running_mean)
    assert int(teacher.network[1].num_batches_tracked) == 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss(temperature: float) -> None:
    """Check 13: T^2 KL against its definition, 0 for equal logits, else positive."""
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator()) * 3
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(famlp.distillation_loss(student, teacher, temperature), expected)
    assert float(expected) > 0
    assert float(famlp.distillation_loss(student, student, temperature)) == 0.0
    assert famlp.distillation_loss(student.half(), teacher.half()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ learning


def test_filter_learns_a_low_pass() -> None:
    """Check 14: from the identity, Adam 0.05, 400 steps of 16 noise pictures on 8 x 8, 2 channels."""
    layer = AdaptiveFourierFilter(2, 8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.weight))
    u, v = torch.fft.fftfreq(8)[:, None], torch.fft.rfftfreq(8)
    mask = (torch.hypot(u, v) < 0.25).float()[..., None].expand(8, 5, 2)
    optimizer, source = torch.optim.Adam(layer.parameters(), 0.05), generator(2)
    for _ in range(400):
        z = torch.randn(16, 8, 8, 2, generator=source)
        wanted = torch.fft.irfft2(torch.fft.rfft2(z, dim=(1, 2)) * mask, s=(8, 8), dim=(1, 2))
        optimizer.zero_grad()
        (layer(z) - wanted).square().mean().backward()
        optimizer.step()
    real, imaginary = layer.weight.detach().unbind(-1)
    assert float((real - mask).abs().max()) < 1e-3
    assert float(imaginary.abs().max()) < 0.05


# ------------------------------------------------------------------------------------------------ filter


def test_gate_starts_at_one_and_scales_pictures_and_channels() -> None:
    torch.manual_seed(0)
    gated = AdaptiveFourierFilter(8, 6, 5, gate=True)
    plain = FourierFilter2d(8, 6, 5)
    plain.weight = gated.weight
    z = torch.randn(3, 6, 5, 8, generator=generator())
    assert torch.equal(gated(z), plain(z))
    assert gated.gate is not None
    nn.init.normal_(gated.gate[2].weight)
    amplitude = torch.fft.rfft2(z.double(), dim=(1, 2), norm="ortho").abs().mean((1, 2))
    first, _, last = copy.deepcopy(gated.gate).double()
    s = 2 * torch.sigmoid(last(torch.relu(first((1 + amplitude).log()))))
    torch.testing.assert_close(gated(z), (plain(z) * s[:, None, None]).float(), rtol=1e-5, atol=1e-6)
    assert float((s - 1).detach().abs().max()) > 0.01


@pytest.mark.parametrize("mode", ["complex", "separable", "amplitude"])
def test_modes_serve_as_mixer(mode: str) -> None:
    network = tiny(mixer=functools.partial(AdaptiveFourierFilter, mode=mode, gate=True))
    network(images()).sum().backward()
    assert all(theta.grad is not None for theta in network.parameters())


# ------------------------------------------------------------------------------------------------ network


def test_block_is_its_formula() -> None:
    torch.manual_seed(0)
    mixer, low_rank = AdaptiveFourierFilter(6, 4, 3), LowRankEnhancement(2)
    x = torch.randn(2, 4, 3, 6, generator=generator())
    block = famlp.FAMLPBlock(6, mixer, low_rank, layer_scale=0.3)
    z = block.norm1(x)
    f = mixer(z) + low_rank(z)
    torch.testing.assert_close(block(x), x + 0.3 * block.mlp(block.norm2(f)))
    block = famlp.FAMLPBlock(6, mixer, layer_scale=0.3, two_residuals=True)
    middle = x + 0.3 * mixer(block.norm1(x))
    torch.testing.assert_close(block(x), middle + 0.3 * block.mlp(block.norm2(middle)))
    block = famlp.FAMLPBlock(6, mixer, layer_scale=None)
    torch.testing.assert_close(block(x), x + block.mlp(block.norm2(mixer(block.norm1(x)))))


def test_drop_path_keeps_the_mean_and_whole_pictures() -> None:
    torch.manual_seed(0)
    drop = famlp.DropPath(0.25)
    y = drop(torch.ones(4000, 2, 2))
    of_picture = y.flatten(1)
    assert torch.equal(of_picture, of_picture[:, :1].expand_as(of_picture))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert float(y.mean()) == pytest.approx(1, abs=0.05)
    x = torch.randn(3, 2)
    assert drop.eval()(x) is x


def test_drop_path_grows_linearly_from_block_to_block() -> None:
    rates = [module.p for module in tiny(drop_path=0.2).modules() if isinstance(module, famlp.DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("which", "expected"),
    [("last", [False, True, True]), ("all", [True] * 3), ("none", [False] * 3), ([0, 2], [True, False, True])],
)
def test_low_rank_blocks(which: str | list[int], expected: list[bool]) -> None:
    blocks = [block for stage in tiny(low_rank_blocks=which).blocks for block in stage]
    assert [block.low_rank is not None for block in blocks] == expected


@pytest.mark.parametrize("two_residuals", [False, True])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_shapes_and_gradients(B: int, two_residuals: bool) -> None:
    network = tiny(two_residuals=two_residuals)
    logits = network(images(B))
    assert logits.shape == (B, 5)
    assert network.features(images(B)).shape == (B, 12)
    logits.sum().backward()
    assert all(theta.grad is not None and theta.grad.isfinite().all() for theta in network.parameters())
    if B:
        assert all(float(theta.grad.abs().max()) > 0 for theta in network.parameters())


def test_gradient_agrees_with_differences() -> None:
    """Of the exact mode, as the other is no gradient of the output; in float64."""
    network = tiny(low_rank=lambda: LowRankEnhancement(3, mode="exact"), layer_scale=0.5, drop_path=0.0).double()
    x = images(1).double().requires_grad_()
    assert torch.autograd.gradcheck(network, x, fast_mode=True)
    weight = network.blocks[0][0].filter.weight
    assert torch.autograd.gradcheck(lambda _: network(x.detach()), weight, fast_mode=True)


def test_batch_does_not_matter() -> None:
    network, x = tiny().eval(), images(4)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    network, x = tiny().eval(), images()
    with torch.autocast("cpu", dtype):
        logits = network(x)
    torch.testing.assert_close(logits.float(), network(x), rtol=0.1, atol=0.05)


def test_compiled_network_agrees() -> None:
    """One graph, with low rank and filter in it, forward and backward."""
    network = tiny(drop_path=0.0)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    x = images()
    for net in (network, compiled):
        net(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), network(x))
    for mine, theirs in zip(compiled.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_functional_call_and_state_dict_round_trip() -> None:
    network, x = tiny().eval(), images()
    other = FAMLP(5, TINY, image_size=(16, 12), low_rank=lambda: LowRankEnhancement(3)).eval()
    assert not torch.equal(other(x), network(x))
    called = torch.func.functional_call(other, network.state_dict(), (x,))
    torch.testing.assert_close(called, network(x), rtol=0, atol=0)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_per_picture_gradients_by_vmap() -> None:
    network = tiny(low_rank_blocks="none", drop_path=0.0)
    parameters = {name: theta.detach() for name, theta in network.named_parameters()}
    x, labels = images(), torch.tensor([0, 3, 4])

    def loss(values: dict[str, Tensor], picture: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, values, (picture[None],))
        return nn.functional.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    nn.functional.cross_entropy(network(x), labels).backward()
    for name, theta in network.named_parameters():
        torch.testing.assert_close(each[name].mean(0), theta.grad, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------ figures


def test_default_network_has_the_size_of_the_table() -> None:
    """Section 5: 15 M parameters, 2.0 G multiply-adds, 1,605,632 real numbers in filters."""
    network = FAMLP(low_rank_blocks="none")
    found = famlp.costs(network)
    assert found.filter_parameters == 1_605_632
    assert round(found.parameters / 1e6) == 15
    assert round(found.multiply_adds / 1e9, 1) == 2.0
    assert found.low_rank_flops == 0
    assert network.grids == [(56, 56), (28, 28), (14, 14), (7, 7)]
    per_block = [stage[0].filter.weight.numel() // 2 for stage in network.blocks]
    assert per_block == [103_936, 53_760, 28_672, 14_336]
    assert network.pos_embed.shape == (1, 3136, 64)


def test_multiply_adds_are_those_that_torch_counts() -> None:
    network = tiny(low_rank_blocks="none").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images(1))
    assert famlp.costs(network).multiply_adds == counter.get_total_flops() // 2


def test_costs_of_low_rank_and_filters() -> None:
    """By hand: stages of 48 x 8 and 12 x 12 tokens, k = 3; filters of 8 x 6 and 4 x 3 points."""
    found = famlp.costs(tiny())
    assert found.low_rank_flops == (2 * 48 * 8**2 + 4 * 48 * 8 * 3) + (2 * 12 * 12**2 + 4 * 12 * 12 * 3)
    first, second = 5 * 48 * math.log2(48) + 6 * 8 * 4, 5 * 12 * math.log2(12) + 6 * 4 * 2
    assert found.filter_flops == 2 * 8 * round(first) + 12 * round(second)


@pytest.mark.parametrize("name", list(famlp.SIZES))
def test_named_sizes_build(name: str) -> None:
    """On the meta device, as some have 50 M parameters."""
    with torch.device("meta"):
        network = FAMLP(7, name)
    assert sum(len(stage) for stage in network.blocks) == sum(famlp.SIZES[name].depths)
    assert network.head.weight.shape == (7, famlp.SIZES[name].dims[-1])


def test_parameter_groups() -> None:
    """Section 7: filters, convolutions and linear maps decay; positions, norms, scales and biases do not."""
    network = tiny(low_rank=lambda: LowRankEnhancement(2, learn_scale=True))
    decayed, others = ({id(theta) for theta in g["params"]} for g in famlp.parameter_groups(network, 0.3))
    names = {name: id(theta) in decayed for name, theta in network.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert not decayed & others
    for name, decays in names.items():
        expected = name.endswith(("filter.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight"))
        assert decays == expected, name


def test_degree_of_filtering() -> None:
    """A filter of known response by ring, on a grid with H != W; a zero frequency is left out."""
    H, W = 8, 6
    u, v = torch.fft.fftfreq(H, 1 / H)[:, None], torch.fft.rfftfreq(W, 1 / W)
    ring = torch.hypot(u, v).floor()
    before = torch.randn(3, H, W, 2, dtype=torch.float64, generator=generator())
    X = torch.fft.rfft2(before, dim=(1, 2))
    after = torch.fft.irfft2(X * (0.5**ring)[..., None], s=(H, W), dim=(1, 2))
    expected = 0.5 ** torch.arange(int(ring.max()) + 1, dtype=torch.float64)
    torch.testing.assert_close(famlp.degree_of_filtering(before, after), expected)
    flat = torch.ones(1, 4, 4, 1)
    found = famlp.degree_of_filtering(flat, 3 * flat)
    assert float(found[0]) == pytest.approx(3)
    assert found[1:].isnan().all()


# ------------------------------------------------------------------------------------------------ GFNet's weights


def gfnet_state(network: FAMLP, side: int, isotropic: bool = False) -> dict[str, Tensor]:
    """Random weights with the names and shapes of a GFNet for square pictures whose first grid has this side."""
    state = {}
    for name, value in network.state_dict().items():
        shape = list(value.shape)
        if name == "pos_embed":
            shape[1] = side * side
        if name.endswith("filter.weight"):
            here = side >> int(name.split(".")[1])
            shape[:2] = [here, here // 2 + 1]
            name = name.replace("filter.weight", "filter.complex_weight")
        if isotropic:
            name = name.replace("blocks.0.", "blocks.").replace("patch_embed.0.", "patch_embed.")
        state[name] = torch.randn(shape, generator=generator(len(name)))
    return state


def test_gfnet_weights_of_the_same_grid() -> None:
    network = tiny(image_size=16, low_rank_blocks="none")
    state = gfnet_state(network, 8)
    assert network.load_gfnet({"model": state}) == []
    taken = network.state_dict()
    for name, value in state.items():
        assert torch.equal(taken[name.replace("complex_weight", "weight")], value), name


def test_gfnet_weights_of_another_grid_and_other_classes() -> None:
    network = tiny(image_size=(16, 12), low_rank=lambda: LowRankEnhancement(2, learn_scale=True))
    state = gfnet_state(tiny(image_size=16, low_rank_blocks="none"), 8)
    state["head.weight"], state["head.bias"] = torch.randn(9, 12), torch.randn(9)
    left = network.load_gfnet(state)
    assert left == ["blocks.0.1.low_rank.scale", "blocks.1.0.low_rank.scale", "head.bias", "head.weight"]
    kept = network.blocks[0][0].filter.weight
    assert kept.shape == (8, 4, 8, 2)
    corners = state["blocks.0.0.filter.complex_weight"][[0, -1]][:, [0, -1]]
    torch.testing.assert_close(kept[[0, -1]][:, [0, -1]].detach(), corners)  # first and last frequencies stay
    positions = state["pos_embed"].view(8, 8, 8)
    torch.testing.assert_close(
        network.pos_embed.detach().view(8, 6, 8)[[0, -1]][:, [0, -1]], positions[[0, -1]][:, [0, -1]]
    )


def test_isotropic_gfnet_names() -> None:
    network = FAMLP(5, Size(4, (8,), (2,)), image_size=16, layer_scale=None, low_rank_blocks="none")
    state = gfnet_state(network, 4, isotropic=True)
    assert "blocks.1.filter.complex_weight" in state
    assert network.load_gfnet(state) == []
    assert torch.equal(network.blocks[0][1].filter.weight, state["blocks.1.filter.complex_weight"])


def test_gfnet_weights_that_do_not_fit() -> None:
    network = tiny(image_size=16)
    state = gfnet_state(tiny(image_size=16, low_rank_blocks="none"), 8)
    with pytest.raises(ValueError, match=r"state must fit.*norm\.weight is \[13\], expected \[12\]"):
        network.load_gfnet(state | {"norm.weight": torch.ones(13)})
    with pytest.raises(ValueError, match="no such parameter"):
        network.load_gfnet(state | {"blocks.7.0.norm1.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="square grid"):
        network.load_gfnet(state | {"pos_embed": torch.ones(1, 63, 8)})


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FAMLP(size="huge"), "size must be one of h_ti"),
        (lambda: FAMLP(size=Size(2, (8,), (1, 1))), "as many dims as depths"),
        (lambda: FAMLP(size=TINY, image_size=18), "multiples of 4, not 18"),
        (lambda: FAMLP(size=TINY, image_size=0), "positive multiples of 4"),
        (lambda: tiny(low_rank_blocks="first"), "low_rank_blocks must be .* not 'first'"),
        (lambda: tiny(low_rank_blocks=[3]), r"0\.\.2, not \[3\]"),
        (lambda: tiny(drop_path=1.0), r"p must be in \[0, 1\), not 1\.0"),
        (lambda: tiny()(torch.zeros(1, 3, 12, 16)), r"x must be \[B, 3, 16, 12\], not \[1, 3, 12, 16\]"),
        (lambda: LowRankEnhancement(-1), "k must be at least 0, not -1"),
        (lambda: LowRankEnhancement(1, mode="half"), "mode must be .* not 'half'"),
        (lambda: MomentumTeacher(nn.Linear(1, 1), 1.5), r"momentum must be in \[0, 1\], not 1\.5"),
        (lambda: famlp.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "student and teacher must both"),
        (lambda: famlp.distillation_loss(torch.zeros(0, 3), torch.zeros(0, 3)), "B >= 1"),
        (lambda: famlp.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature must be positive"),
        (lambda: famlp.degree_of_filtering(torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2)), "before and after"),
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_costs_leave_the_network_as_it_was() -> None:
    network = tiny(drop_path=0.5)
    state = torch.get_rng_state()
    first = famlp.costs(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert dataclasses.asdict(first) == dataclasses.asdict(famlp.costs(network))
    assert not network.head._forward_hooks
