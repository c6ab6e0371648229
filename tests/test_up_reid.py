"""Acceptance checks of UP-ReID, each named by its number: patches, losses, the method in the training loop.

What the queue contrast, the momentum update and the ring buffer do by themselves is tested in test_queue_contrast.py.
Oracles are closed forms, loops, lists and a momentum contrast written apart.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import on_every_rank
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("threadpoolctl")

from benchmarks import reid_up_reid
from neuraldeps_kernels import cli
from neuraldeps_kernels.cli import train as cli_train
from neuraldeps_kernels.data.batches import Augmentation, Batch, Batches, IdentitySampler, UniformSampler, View
from neuraldeps_kernels.data.pedestrian_splits import pretraining_split
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians
from neuraldeps_kernels.models import up_reid
from neuraldeps_kernels.models.baseline import Baseline
from neuraldeps_kernels.models.reid_network import ReidNetwork, resnet, small_network
from neuraldeps_kernels.models.training import LAST, evaluate, load_checkpoint, train
from neuraldeps_kernels.models.up_reid import (
    UPReID,
    boxes_in_original,
    boxes_in_view,
    cell_weights,
    cross_losses,
    hardest_mean,
    intrinsic_losses,
    patch_boxes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

N, K, STEPS = 8, 20, 10
SPLIT = pretraining_split(1, train_ids=4, test_ids=6, unlabelled_cameras=4, unlabelled_ids=8, height=32, width=16)
STREET: dict[str, Any] = {"num_cameras": 1, "images_per_camera": 2, "height": 32, "width": 16}
MOCO = {"consistency_weight": 0.0, "patch_weight": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "MoCo": MOCO,
    "consistency of both views": {"symmetric": True, "patch_weight": 0.0},
    "patches of a grid": {"patches": (2, 3), "consistency_weight": 0.0},
    "hardest negative, frame of the view": {"mining": "negatives", "aligned": False, "point_weight": 0.0},
    "no mining, no other pictures": {"mining": "none", "cross": False},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(seed: int = 0, backbone: nn.Module | None = None, **options: Any) -> UPReID:
    torch.manual_seed(seed)
    network = ReidNetwork(small_network(4, 8) if backbone is None else backbone, 1)
    given: dict[str, Any] = {"features": 6, "queue_size": K, "momentum": 0.9, "ramp": (0.2, 0.3)}
    return UPReID(network, **{**given, **options})


def batches(seed: int = 0, size: int = N) -> Batches:
    assert SPLIT.unlabelled is not None
    augmentation = Augmentation(crop=(0.3, 1.0), grey=0.2, erase=0.5)
    sampler = UniformSampler(len(SPLIT.unlabelled), size=size, seed=seed)
    return Batches(SPLIT.unlabelled, sampler, augmentation, views=2, seed=seed)


def trained(method: UPReID, **options: Any) -> Any:
    return train(method, batches(), **{"steps": STEPS, "lr": 1e-3, **options})


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=generator(seed)), dim=-1)


def view_of(boxes: Tensor, flipped: Tensor, height: int = 32, width: int = 16) -> View:
    return View(torch.zeros(len(boxes), 3, height, width), boxes, flipped)


def original_batch(images: Tensor) -> Batch:
    """Pictures whose views are themselves."""
    count, _, H, W = images.shape
    zeros = torch.zeros(count, dtype=torch.int64)
    view = View(images, torch.tensor([[0.0, 0.0, W, H]]).expand(count, 4), zeros.bool())
    return Batch(images, zeros - 1, zeros, zeros, zeros.bool(), views=(view, view))


def state(method: nn.Module, without: str = "\0") -> dict[str, Tensor]:
    return {
        name: copy.deepcopy(value)
        for name, value in method.state_dict().items()
        if isinstance(value, Tensor) and without not in name
    }


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------------ patches


side = st.floats(0.05, 1.3)
corner = st.floats(-0.4, 0.9)


@settings(deadline=None, max_examples=60)
@given(
    frames=st.lists(st.tuples(corner, corner, side, side, st.booleans()), min_size=1, max_size=4),
    rows=st.integers(1, 6),
)
def test_check_5_patches_go_to_the_view_and_back(
    frames: list[tuple[float, float, float, float, bool]], rows: int
) -> None:
    """Check 5: through any crop and mirror the original box comes back, and both ways are those of single points."""
    H, W = 32, 16
    chosen = torch.tensor([[x * W, y * H, (x + w) * W, (y + h) * H] for x, y, w, h, _ in frames], dtype=torch.float64)
    view = view_of(chosen, torch.tensor([mirror for *_, mirror in frames]))
    boxes = patch_boxes(rows, 2, H, W).double()
    there = boxes_in_view(boxes, view)
    torch.testing.assert_close(boxes_in_original(there, view), boxes.expand(len(frames), -1, -1), rtol=0, atol=1e-5)
    for n, (x, y, w, h, mirror) in enumerate(frames):
        for m in range(2 * rows):
            places = [(float(boxes[m, i]) / W - x) / w * W for i in (0, 2)]
            across = sorted(W - place if mirror else place for place in places)
            down = [(float(boxes[m, i]) / H - y) / h * H for i in (1, 3)]
            want = torch.tensor([across[0], down[0], across[1], down[1]], dtype=torch.float64)
            torch.testing.assert_close(there[n, m], want, rtol=1e-9, atol=1e-6)


def test_check_5_patches_of_a_whole_view_are_plain_stripes() -> None:
    """Check 5: a view equal to the original gives the means of stripes, or of a grid, and all of them count."""
    features = torch.randn(3, 5, 12, 6, generator=generator())
    view = original_batch(torch.zeros(3, 3, 48, 24)).views[0]
    for grid in ((1, 1), (4, 1), (6, 1), (2, 3)):
        weights, share = cell_weights(boxes_in_view(patch_boxes(*grid, 48, 24), view), (48, 24), (12, 6))
        means = weights @ features.flatten(2).mT
        torch.testing.assert_close(means, adaptive_avg_pool2d(features, grid).flatten(2).mT, rtol=0, atol=1e-6)
        torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(x=st.floats(-6, 10), y=st.floats(-6, 18), width=st.floats(0.5, 20), height=st.floats(0.5, 30))
def test_cells_count_by_the_area_they_share_with_a_box(x: float, y: float, width: float, height: float) -> None:
    """Against loops over the cells of a map of another resolution."""
    (H, W), (h, w) = (20, 10), (5, 4)
    weights, share = cell_weights(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64), (H, W), (h, w))
    areas = []
    for row in range(h):
        for column in range(w):
            across = min(x + width, (column + 1) * W / w) - max(x, column * W / w)
            down = min(y + height, (row + 1) * H / h) - max(y, row * H / h)
            areas.append(max(across, 0) * max(down, 0))
    assert float(share) == pytest.approx(sum(areas) / (width * height), abs=1e-9)
    want = torch.tensor(areas, dtype=torch.float64) / max(sum(areas), 1e-9)
    if sum(areas) > 1e-3 or sum(areas) == 0:
        torch.testing.assert_close(weights[0], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pad", [0, 4])
def test_patches_follow_the_augmentation(pad: int) -> None:
    """Where pictures show the place of each pixel, a patch that a view shows whole has the same mean place in it."""
    H, W = 64, 32
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    pixels = torch.stack([x, y, y], -1).to(torch.uint8).expand(200, -1, -1, -1)
    augmentation = Augmentation(crop=(0.4, 1.0), pad=pad, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    view, _ = augmentation(pixels, None, generator())
    boxes = patch_boxes(4, 3, H, W)[[4, 7]]  # not at the border, which is mixed with what lies beyond
    weights, share = cell_weights(boxes_in_view(boxes, view), (H, W), (H, W))
    whole = share > 0.999
    assert 50 < int(whole.sum()) < whole.numel()
    means = (weights @ view.images.flatten(2).mT)[..., :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5
    error = (means - centres).abs().amax(2)
    assert float(error[whole].max()) < 0.2
    assert float(error[share > 0].max()) > 1


def test_check_5_what_a_view_hides_does_not_count() -> None:
    """Check 5: patches less than half inside send no gradient; if all are, the loss is 0 and everything finite."""
    method = made(patches=(4, 1), mining="none").double()
    H, W = 32, 16
    features = torch.randn(2, 8, 4, 2, dtype=torch.float64, generator=generator()).requires_grad_()
    v = unit_rows(2, 4, 6)
    lower = torch.tensor([[0.0, 19.0, W, H], [0.0, 21.0, W, H]], dtype=torch.float64)  # 5 and 3 of 8 rows of patch 2
    view = view_of(lower, torch.tensor([False, True]))
    method._patch_loss(features, view, v).backward()
    assert features.grad is not None
    shown = features.grad.abs().amax(1).sum(2) > 0  # [N, h]: rows of the map that matter
    assert shown.tolist() == [[True, True, True, True], [False, True, True, True]]
    weights, share = cell_weights(boxes_in_view(patch_boxes(4, 1, H, W).double(), view), (H, W), (4, 2))
    assert (share >= 0.5).tolist() == [[False, False, True, True], [False, False, False, True]]
    u = normalize(method.heads.patch(weights @ features.detach().flatten(2).mT), dim=2)
    each = intrinsic_losses(u, v, 0.2) + cross_losses(u, v, 0.2)
    features.grad = None
    loss = method._patch_loss(features, view, v)
    torch.testing.assert_close(loss, torch.stack([each[0, 2], each[0, 3], each[1, 3]]).mean())
    for box in ([0.0, 11.0, W, 13.0], [2.0 * W, 0.0, 3.0 * W, H]):  # between two patches; beside the picture
        nothing = method._patch_loss(features, view_of(torch.tensor([box, box]).double(), torch.zeros(2).bool()), v)
        (gradient,) = torch.autograd.grad(nothing, features)
        assert nothing.item() == 0
        assert not gradient.any()


# ------------------------------------------------------------------------------------------------ losses


def test_patch_losses_are_softmaxes_over_patches_and_pictures() -> None:
    """Against loops in float64, also with the most similar other patch twice."""
    u, v = unit_rows(3, 4, 5), unit_rows(3, 4, 5, seed=1)
    intrinsic, doubled = intrinsic_losses(u, v, 0.2), intrinsic_losses(u, v, 0.2, doubled=True)
    cross = cross_losses(u, v, 0.2)
    for n in range(3):
        for m in range(4):
            e = [math.exp(float(u[n, m] @ v[n, other]) / 0.2) for other in range(4)]
            assert float(intrinsic[n, m]) == pytest.approx(-math.log(e[m] / sum(e)))
            hardest = max(e[other] for other in range(4) if other != m)
            assert float(doubled[n, m]) == pytest.approx(-math.log(e[m] / (sum(e) + hardest)))
            e = [math.exp(float(u[n, m] @ v[other, m]) / 0.2) for other in range(3)]
            assert float(cross[n, m]) == pytest.approx(-math.log(e[n] / sum(e)))
    for loss in (
        lambda u: intrinsic_losses(u, v, 0.2),
        lambda u: intrinsic_losses(u, v, 0.2, doubled=True),
        lambda u: cross_losses(u, v, 0.2),
    ):
        assert torch.autograd.gradcheck(loss, u.clone().requires_grad_())


def test_check_6_one_patch_and_patches_that_are_alike() -> None:
    """Check 6: M = 1 gives 0, the same feature everywhere log M."""
    for doubled in (False, True):
        assert not intrinsic_losses(unit_rows(5, 1, 6), unit_rows(5, 1, 6, seed=1), 0.2, doubled=doubled).any()
    same = unit_rows(5, 1, 6).expand(5, 4, 6)
    torch.testing.assert_close(
        intrinsic_losses(same, same, 0.2), torch.full((5, 4), math.log(4), dtype=torch.float64), rtol=0, atol=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_check_6_the_hardest_patches_count(rows: int, columns: int, count: int, seed: int) -> None:
    """Check 6: h = M is the plain mean, h = 1 the mean of maxima, always over valid patches alone."""
    count = min(count, columns)
    losses = torch.rand(rows, columns, dtype=torch.float64, generator=generator(seed))
    valid = torch.rand(rows, columns, generator=generator(seed + 1)) < 0.7
    kept = [sorted((x for x, ok in zip(*row, strict=True) if ok), reverse=True)[:count]
            for row in zip(losses.tolist(), valid.tolist(), strict=True)]  # fmt: skip
    flat = [x for row in kept for x in row]
    want = sum(flat) / len(flat) if flat else 0.0
    assert float(hardest_mean(losses, valid, count)) == pytest.approx(want, abs=1e-12)
    everything = torch.ones_like(valid)
    assert float(hardest_mean(losses, everything, columns)) == pytest.approx(float(losses.mean()), abs=1e-12)
    assert float(hardest_mean(losses, everything, 1)) == pytest.approx(float(losses.amax(1).mean()), abs=1e-12)
    leaf = losses.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hardest_mean(leaf, valid, count), leaf)
    assert int((gradient > 0).sum()) == len(flat)
    assert not gradient[~valid].any()


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    losses = torch.tensor([[0.1, math.nan, 0.3]])
    assert math.isnan(float(hardest_mean(losses, torch.ones(1, 3).bool(), 1)))


# ------------------------------------------------------------------------------------------------ a step


def test_losses_of_a_step_are_as_defined() -> None:
    """Every term from the encoders' outputs by plain formulas; weights and ramp applied."""
    method = made(patch_weight=0.7, consistency_weight=0.4, point_weight=0.5).eval()  # norms with fixed statistics
    batch = batches()[0]
    losses = method.losses(batch, 0.4)  # r = 2 / 3
    with torch.no_grad():
        online = [method.network.backbone(view.images) for view in batch.views]
        behind = [method.momentum_backbone(x) for x in (batch.views[1].images, batch.images)]
        q = normalize(method.heads.whole(online[0].mean((2, 3))), dim=1)
        k, o = (normalize(method.momentum_heads.whole(x.mean((2, 3))), dim=1) for x in behind)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.T], 1) / 0.1
        contrast = nn.functional.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))
        log_o, log_q = (o @ method.queue.T / 0.07).log_softmax(1), logits[:, 1:].log_softmax(1)
        consistency = (log_o.exp() * (log_o - log_q)).sum(1).mean() + 0.5 * (q - o).square().sum(1).mean()
        weights, share = cell_weights(boxes_in_view(patch_boxes(4, 1, 32, 16), batch.views[0]), (32, 16), (4, 2))
        u = normalize(method.heads.patch(weights @ online[0].flatten(2).mT), dim=2)
        v = normalize(method.momentum_heads.patch(behind[1].mean(3).mT), dim=2)
        patches = hardest_mean(intrinsic_losses(u, v, 0.2) + cross_losses(u, v, 0.2), share >= 0.5, 2)
    want = {"contrast": contrast, "consistency": 0.4 * 2 / 3 * consistency, "patches": 0.7 * 2 / 3 * patches}
    assert losses.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(losses[name].detach(), want[name], rtol=1e-5, atol=1e-6)
    both = made(consistency_weight=0.4, point_weight=0.5, symmetric=True, patch_weight=0.0).eval()
    both.load_state_dict(method.state_dict(), strict=False)
    with torch.no_grad():
        q = normalize(method.heads.whole(online[1].mean((2, 3))), dim=1)
        log_q = (q @ method.queue.T / 0.1).log_softmax(1)
        second = (log_o.exp() * (log_o - log_q)).sum(1).mean() + 0.5 * (q - o).square().sum(1).mean()
    got = both.losses(batch, 0.4)["consistency"].detach()
    torch.testing.assert_close(got, 0.4 * 2 / 3 * (consistency + second) / 2, rtol=1e-5, atol=1e-6)


def test_options_change_the_patches() -> None:
    """Alignment, other pictures, mining and the grid each give another loss of the same batch."""
    options: list[dict[str, Any]] = [
        *({}, {"aligned": False}, {"cross": False}, {"mining": "none"}, {"mining": "negatives"}),
        *({"hard_patches": 1}, {"patches": (2, 2)}, {"least_visible": 0.0}, {"patch_temperature": 0.3}),
    ]
    found = [made(**each).losses(batches()[0], 1.0)["patches"].item() for each in options]
    assert len({round(x, 5) for x in found}) == len(found)


def test_ramp_begins_late() -> None:
    """r is 0 for 30 % of the steps, then grows to 1 over 10 %."""
    method = made(ramp=(0.3, 0.1))
    assert [method._ramp(p) for p in (0.0, 0.29, 0.3)] == [0.0, 0.0, 0.0]
    assert [method._ramp(p) for p in (0.35, 0.4, 0.9)] == pytest.approx([0.5, 1.0, 1.0])
    assert made(ramp=(0.0, 0.0))._ramp(0.0) == 1.0
    assert made(ramp=(0.5, 0.0))._ramp(0.49) == 0.0
    history = trained(made(ramp=(0.3, 0.1)))
    assert [set(row) >= {"consistency", "patches"} for row in history.rows] == [False] * 4 + [True] * 6


def test_check_2_originals_agree_with_themselves() -> None:
    """Check 2: views that are the originals, encoders alike and tau = tau_t: no consistency loss, no gradient of it."""
    method = made(patch_weight=0.0, temperature=0.1, target_temperature=0.1, ramp=(0.0, 0.0))
    loss = method.losses(original_batch(torch.randn(6, 3, 32, 16, generator=generator())), 0.0)["consistency"]
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in method.heads.parameters() if p.grad is not None) < 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_check_3_gradients_reach_the_online_encoder_alone(name: str) -> None:
    """Check 3: none to the momentum encoder, the queue, k and o; all of the online encoder gets one."""
    method = made(**VARIANTS[name])
    torch.stack(list(method.losses(batches()[0], 1.0).values())).sum().backward()
    online = {id(p) for group in method.trained_parameters(0.0) for p in group["params"]}
    for parameter_name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in online), parameter_name
        assert (id(parameter) in online) == parameter_name.startswith(("network.backbone.", "heads.")), parameter_name
    assert not method.queue.requires_grad
    assert method._keys is not None
    assert not method._keys.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_check_3_the_momentum_encoder_follows(momentum: float) -> None:
    """Check 3: m theta' + (1 - m) theta of every step; m = 1 stays, m = 0 copies; norms see the pictures of k and o."""
    method = made(momentum=momentum)
    behind = [*method.momentum_backbone.parameters(), *method.momentum_heads.parameters()]
    want = [p.detach().double() for p in behind]
    start = [p.detach().clone() for p in behind]
    norm, first = method.momentum_backbone.stages[0].norm, copy.deepcopy(method.momentum_backbone.stages[0].norm)
    follow = method.after_step

    def watched(batch: Batch, progress: float) -> dict[str, float]:
        result = follow(batch, progress)
        for i, p in enumerate(method._online_parameters()):
            want[i] = momentum * want[i] + (1 - momentum) * p.detach().double()
        return result

    method.after_step = watched  # type: ignore[method-assign]
    trained(method, lr=1e-2)
    for got, exact in zip(behind, want, strict=True):
        torch.testing.assert_close(got.detach().double(), exact, rtol=0, atol=1e-6)
    exact_ends = {0.0: method._online_parameters(), 1.0: start}
    for got, end in zip(behind, exact_ends.get(momentum, behind), strict=True):
        assert torch.equal(got, end)
    assert int(norm.num_batches_tracked) == STEPS + 7  # k always, o where r > 0
    if momentum == 1.0:  # then the statistics are those of a network that does not move
        conv = method.momentum_backbone.stages[0].conv
        for step in range(STEPS):
            batch = batches()[step]
            first(conv(batch.views[1].images))
            if step > 2:
                first(conv(batch.images))
        torch.testing.assert_close(norm.running_mean, first.running_mean)
        torch.testing.assert_close(norm.running_var, first.running_var)


def test_check_4_and_7_the_queue_holds_earlier_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 4: a list of the last K keys, bit for bit, though N does not divide K. Check 7: never those of the step."""
    method = made(queue_size=K)
    ring: deque[Tensor] = deque(method.queue.clone(), maxlen=K)
    calls = up_reid.queue_contrast

    def watched(q: Tensor, k: Tensor, queue: Tensor, **options: Any) -> Any:
        place = int(method.pointer)
        in_order = torch.cat([queue[place:], queue[:place]])
        assert torch.equal(in_order, torch.stack(list(ring)))
        assert not (k[:, None] == queue).all(2).any()
        ring.extend(normalize(k, dim=1))
        return calls(q, k, queue, **options)

    monkeypatch.setattr(up_reid, "queue_contrast", watched)
    trained(method)
    assert int(method.pointer) == STEPS * N % K
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(K), rtol=0, atol=1e-6)


def test_check_4_a_batch_larger_than_the_queue_is_refused() -> None:
    with pytest.raises(ValueError, match="the 7 rows of the queue"):
        trained(made(queue_size=7))


class MomentumContrast(nn.Module):
    """Momentum contrast as plainly as possible, but for the loss itself."""

    def __init__(self, backbone: nn.Module, channels: int, features: int, size: int) -> None:
        super().__init__()
        self.queue = normalize(torch.randn(size, features), dim=1)
        head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, features))
        self.online = nn.Sequential(backbone, MeanOfPositions(), head)
        self.behind = copy.deepcopy(self.online)
        self.place = 0

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, m: float) -> float:
        q = normalize(self.online(batch.views[0].images), dim=1)
        with torch.no_grad():
            k = normalize(self.behind(batch.views[1].images), dim=1)
        loss, _ = up_reid.queue_contrast(q, k, self.queue, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for behind, ahead in zip(self.behind.parameters(), self.online.parameters(), strict=True):
                behind.lerp_(ahead, 1 - m)
            for row in normalize(k, dim=1):
                self.queue[self.place] = row
                self.place = (self.place + 1) % len(self.queue)
        return float(loss)


class MeanOfPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_check_7_without_weights_it_is_momentum_contrast() -> None:
    """Check 7: bit for bit, against one written apart, and so is the whole method until its ramp begins."""
    torch.manual_seed(3)
    network = ReidNetwork(small_network(4, 8), 1)
    plain = MomentumContrast(network.backbone, 8, 6, K)
    optimizer = torch.optim.Adam(plain.online.parameters(), lr=1e-3, weight_decay=5e-4)
    losses = [plain.step(batches()[step], optimizer, 0.9) for step in range(STEPS)]
    method = made(3, **MOCO)
    assert trained(method).column("contrast") == losses
    late = made(3, ramp=(1.0, 0.0))
    assert trained(late).column("contrast") == losses
    for got in (method, late):
        assert torch.equal(got.queue, plain.queue)
        for part, other in (
            (got.network.backbone, plain.online[0]),
            (got.heads.whole, plain.online[2]),
            (got.momentum_backbone, plain.behind[0]),
            (got.momentum_heads.whole, plain.behind[2]),
        ):
            assert_same_bits(state(part), state(other))
    usual = made(3)
    trained(usual)
    assert not torch.equal(usual.queue, plain.queue)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_training_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Queue, pointer and momentum encoder are in the checkpoint."""
    whole, half, resumed = (made(seed, **VARIANTS[name]) for seed in (0, 0, 5))
    history = trained(whole, out=tmp_path / "whole")
    follow = half.after_step

    class Enough(Exception):
        pass

    def stop(batch: Batch, progress: float) -> dict[str, float]:
        if progress >= 0.6:
            raise Enough
        return follow(batch, progress)

    half.after_step = stop  # type: ignore[method-assign]
    with pytest.raises(Enough):
        trained(half, out=tmp_path / "half", checkpoint_every=5)
    rest = trained(resumed, out=tmp_path / "half", resume=True)
    assert_same_bits(state(whole), state(resumed))
    assert rest.column("contrast") == history.column("contrast")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_stays_close(precision: str) -> None:
    """The queue stays float32 and of unit rows."""
    exact, method = made(), made()
    want, got = trained(exact), trained(method, precision=precision)
    assert method.queue.dtype == torch.float32
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(K), rtol=0, atol=1e-6)
    for name in ("contrast", "consistency", "patches"):
        assert got.column(name)[2] == pytest.approx(want.column(name)[2], rel=0.1, nan_ok=True)


def ranks_share_a_queue(rank: int, world: int) -> None:
    """Keys come back in their order although processes exchange pictures, and all have the queue of all."""
    method = made().eval()
    batch = batches().of_rank(rank, world)[0]
    rows, patches = method._momentum_rows(batch.images, patches=True)
    assert patches is not None
    features = method.momentum_backbone(batch.images)
    weights, _ = cell_weights(patch_boxes(4, 1, 32, 16), (32, 16), (4, 2))
    with torch.no_grad():
        want = normalize(method.momentum_heads.whole(features.mean((2, 3))), dim=1)
        want_patches = normalize(method.momentum_heads.patch(weights @ features.flatten(2).mT), dim=2)
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, want_patches, rtol=0, atol=1e-5)
    seen: list[Tensor] = []
    method.momentum_backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method._momentum_rows(batch.images)
    assert not torch.equal(seen[0], batch.images)
    method = made()
    train(method, batches(), steps=STEPS, lr=1e-3)
    assert int(method.pointer) == STEPS * N % K
    for mine in (method.queue, *(p.detach() for p in method.parameters())):
        everyone = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(everyone, mine.contiguous())
        assert all(torch.equal(one, mine) for one in everyone)


def test_two_processes_share_a_queue(tmp_path: Path) -> None:
    on_every_rank(ranks_share_a_queue, 2, tmp_path)


@pytest.mark.parametrize("kind", ["small", "resnet"])
def test_check_9_the_backbone_starts_a_supervised_model(kind: str, tmp_path: Path) -> None:
    """Check 9: no key of the backbone is missing or unexpected, and embeddings before its head are the same."""

    def backbone() -> nn.Module:
        return small_network(4, 8) if kind == "small" else resnet(18, width=4)

    method = made(backbone=backbone())
    trained(method, steps=2, out=tmp_path)
    supervised = Baseline(ReidNetwork(backbone(), 4))
    content = load_checkpoint(tmp_path / LAST)["method"]
    prefix = "network.backbone."
    chosen = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    found = supervised.network.backbone.load_state_dict(chosen)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    heads = {name for name in supervised.state_dict() if prefix + name.removeprefix(prefix) not in content}
    assert {name.split(".")[1] for name in heads} == {"neck", "classifier"}
    images = batches()[0].images
    torch.testing.assert_close(supervised.eval().network(images).pooled, method.eval().embed(images))


def test_check_9_the_preset_pre_trains_and_fine_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 9: one command; a baseline of the same seed without the first stage ends elsewhere."""
    stages = cli_train.read_config("up-reid", "synthetic", None)
    assert [(stage.name, stage.model) for stage in stages] == [("pretraining", "up-reid"), ("fine-tuning", "baseline")]
    text = Path(stages[0].source).read_text(encoding="utf-8")
    small = 'split = "pretraining"\ntest_ids = 5\nunlabelled_cameras = 4\nunlabelled_ids = 8'
    changes = {'split = "pretraining"': small + "\nheight = 16\nwidth = 8", "steps = 150": "steps = 4"}
    changes |= {"size = 64": "size = 8", "steps = 100": "steps = 3", "queue_size = 1024": "queue_size = 20"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["train", "up-reid", "--dataset", "synthetic", "--config", "c.toml", "--out", "out"]
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(command)
    kept, tuned = (load_checkpoint(tmp_path / "out" / stage.name / LAST) for stage in stages)
    assert (kept["step"], tuned["step"]) == (4, 3)
    assert (tmp_path / "out" / "metrics.json").is_file()
    method = Baseline(ReidNetwork(small_network(), 6))
    stages[1].tables["start"] = {"network.backbone": f"{tmp_path}/out/pretraining/{LAST}:network.backbone"}
    cli_train.start(method, stages[1], {})
    name = "network.backbone.stages.0.conv.weight"
    assert torch.equal(method.state_dict()[name], kept["method"][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mining": "hard"}, "mining must be one of patches, negatives, none"),
        ({"queue_size": 0}, "queue_size, patches must be positive"),
        ({"patches": (0, 1)}, "patches must be positive"),
        ({"hard_patches": 5}, r"hard_patches must be in 1\.\.4"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"target_temperature": math.nan}, "target_temperature must be positive"),
        ({"patch_temperature": math.inf}, "patch_temperature must be positive"),
        ({"patch_weight": -0.1}, "patch_weight must be 0 or more"),
        ({"consistency_weight": math.nan}, "consistency_weight must be 0 or more"),
        ({"momentum": 1.5}, r"momentum must be in 0\.\.1"),
        ({"ramp": (0.3, -0.1)}, r"ramp\[1\] must be in 0\.\.1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_batches_without_views_are_refused() -> None:
    sampler = IdentitySampler(SPLIT.train.ids, identities=2)
    with pytest.raises(ValueError, match="batches must have 2 views of each picture, not 0"):
        train(made(), Batches(SPLIT.train, sampler), steps=1, lr=1e-3)


# ------------------------------------------------------------------------------------------------ effect


@pytest.mark.parametrize("name", ["as usual", "MoCo"])
def test_pictures_of_a_person_come_together(name: str) -> None:
    """Small gate of check 10: of people not seen before, the other picture by the same camera is found far better."""
    trained_on, tested = (
        PedestrianImages.concatenate(
            [
                pedestrians(12, first_id=first + 12 * camera, first_camera=camera, seed=seed, **STREET)
                for camera in cameras
            ]
        )
        for first, cameras, seed in ((0, range(16), 3), (500, range(4), 4))
    )
    method = made(0, small_network(8, 32), features=32, queue_size=128, **VARIANTS[name])

    def score() -> float:
        return evaluate(method, tested[::2], tested[1::2], {"camera_rule": "none"}).map

    before = score()
    augmentation = Augmentation(crop=(0.5, 1.0), grey=0.2, erase=0.3)
    made_batches = Batches(trained_on, UniformSampler(len(trained_on), size=32), augmentation, views=2)
    train(method, made_batches, steps=60, lr=5e-3, schedule="one-cycle")
    assert score() > before + 0.1


@pytest.mark.parametrize("variant", reid_up_reid.VARIANTS)
def test_study_runs(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reid_up_reid, "TUNING_STEPS", 2)
    metrics = reid_up_reid.run(variant, 0, 2, train_ids=8, test_ids=4, unlabelled_cameras=4, unlabelled_ids=8)
    assert list(metrics)[:4] == ["mAP", "rank-1", "mINP", "re-ranked mAP"]
    assert all(0 < value <= 1 for value in metrics.values())


@pytest.mark.study
def test_check_10_pre_training_helps_few_labels() -> None:
    """Check 10: means of 3 seeds of the study, where 6 people have labels."""
    means = {
        variant: sum(reid_up_reid.run(variant, seed)["mAP"] for seed in range(3)) / 3
        for variant in reid_up_reid.VARIANTS
    }
    assert means["MoCo"] >= means["random init"] + 0.02
    assert means["+ both"] >= means["random init"] + 0.01
    assert means["+ intrinsic"] >= means["MoCo"] - 0.01
    assert means["+ both"] >= means["+ consistency"] - 0.01
