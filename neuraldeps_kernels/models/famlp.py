"""Reference model inspired by FAMLP (arXiv 2203.12893): Fourier filters and MLPs, for unseen domains of pictures.

No public code of the paper exists: what it leaves open is our choice, with the skeleton and the parameter names of
GFNet. It does not reproduce the paper's numbers.

Notation: x [B, H, W, C] channels-last tokens, N = H W, Wf = W//2 + 1. A block does, with one residual around both maps,

    z = LayerNorm1(x),   f = AFF(z) + lam LR_k(z),   x + DropPath(gamma MLP(LayerNorm2(f))),

AFF the adaptive Fourier filter, LR_k the nearest matrix of rank k. `MomentumTeacher` and `distillation_loss` are the
third part: outputs of the weighted past of the network are the targets of its present.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuraldeps_kernels.nn.fourier_filter import FourierFilter2d, resize_filter
from neuraldeps_kernels.ops.spectrum import low_rank_project

Mixer = Callable[[int, int, int], nn.Module]  # (C, H, W) to a module of [B, H, W, C]

_EPS = 1e-6  # of every LayerNorm
_GATE_REDUCTION = 4


# ------------------------------------------------------------------------------------------------ parts of a block


class AdaptiveFourierFilter(FourierFilter2d):
    """y = s AFF(z), [B, H, W, C] to the same: a `FourierFilter2d`, and a gate s of every picture and channel.

    Args:
        channels, height, width: C, H, W.
        mode: "complex", "separable" or "amplitude", see `FourierFilter2d`.
        gate: s [B, C] = 2 sigmoid(W2 relu(W1 log(1 + mean over the half spectrum of |rfft2(z)|))), hidden width C/4;
            W2 starts at 0, so that s = 1. Without it s = 1.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """

    def __init__(self, channels: int, height: int, width: int, *, mode: str = "complex", gate: bool = False) -> None:
        super().__init__(channels, height, width, mode=mode)
        self.gate: nn.Sequential | None = None
        if gate:
            hidden = max(1, channels // _GATE_REDUCTION)
            last = nn.Linear(hidden, channels)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), last)

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = super().forward(z)
        return y if self.gate is None else y * self._gate_of(z)[:, None, None].to(y.dtype)

    def _gate_of(self, z: Tensor) -> Tensor:
        """s [B, C]."""
        assert self.gate is not None
        amplitude = torch.fft.rfft2(z.to(torch.promote_types(z.dtype, torch.float32)), dim=(1, 2), norm="ortho").abs()
        s: Tensor = 2 * torch.sigmoid(self.gate(torch.log1p(amplitude.mean((1, 2)))))
        return s


class LowRankEnhancement(nn.Module):
    """lam LR_k(z), [B, H, W, C] to the same: of every picture, the k leading singular triplets of its tokens [N, C].

    Args:
        k: terms kept, at least 0; z itself from min(N, C) on.
        learn_scale: lam is a parameter that starts at 1, instead of the constant 1.
        per_channel: of B C matrices [H, W] instead.
        mode: "detach" takes the projector, that of the shorter side, as a constant in the gradient; "exact" does not.

    Raises:
        ValueError: `k` is negative; unknown `mode`.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """

    def __init__(
        self, k: int = 8, *, learn_scale: bool = False, per_channel: bool = False, mode: str = "detach"
    ) -> None:
        super().__init__()
        if k < 0:
            raise ValueError(f"k must be at least 0, not {k}")
        if mode not in ("detach", "exact"):
            raise ValueError(f'mode must be "detach" or "exact", not {mode!r}')
        self.k, self.per_channel, self.mode = k, per_channel, mode
        self.scale = nn.Parameter(torch.ones(())) if learn_scale else None

    def forward(self, z: Tensor) -> Tensor:
        if self.per_channel:
            low = low_rank_project(z.permute(0, 3, 1, 2), self.k, mode=self.mode).permute(0, 2, 3, 1)
        else:
            low = low_rank_project(z.flatten(1, 2), self.k, mode=self.mode).view(z.shape)
        return low if self.scale is None else low * self.scale

    def extra_repr(self) -> str:
        return f"k={self.k}, per_channel={self.per_channel}, mode={self.mode!r}"


class MLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2 of the last dimension C, hidden width 4 C, GELU by erf."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """In training, 0 for a picture with probability p, else x / (1 - p); x [B, ...]."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= self.p
        return torch.where(kept, x / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class FAMLPBlock(nn.Module):
    """One block, [B, H, W, C] to the same.

    Args:
        channels: C.
        mixer: AFF, or any module of [B, H, W, C] in its place; kept as `filter`.
        low_rank: LR, added to what the mixer gives; None for none.
        layer_scale: gamma [C] starts there; None for no gamma.
        drop_path: probability of leaving the block out for a picture in training.
        two_residuals: x + DropPath(gamma_filter f), and then x + DropPath(gamma MLP(LayerNorm2(x))).

    Source: inspired by FAMLP (arXiv 2203.12893).
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        low_rank: nn.Module | None = None,
        *,
        layer_scale: float | None = 1e-3,
        drop_path: float = 0.0,
        two_residuals: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=_EPS), nn.LayerNorm(channels, eps=_EPS)
        self.filter, self.low_rank = mixer, low_rank
        self.mlp, self.drop_path = MLP(channels), DropPath(drop_path)
        self.two_residuals = two_residuals

        def gamma() -> nn.Parameter | None:
            return None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))

        self.gamma, self.gamma_filter = gamma(), gamma() if two_residuals else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        f: Tensor = self.filter(z) if self.low_rank is None else self.filter(z) + self.low_rank(z)
        if self.two_residuals:
            x = x + self.drop_path(_scaled(f, self.gamma_filter))
            f = x
        return x + self.drop_path(_scaled(self.mlp(self.norm2(f)), self.gamma))  # type: ignore[no-any-return]


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class PatchEmbedding(nn.Module):
    """[B, H, W, C] to [B, H/p, W/p, C'] by a convolution of p x p pixels with stride p."""

    def __init__(self, channels: int, out: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ network


@dataclass(frozen=True)
class Size:
    """Stages of a network: the patch of the first, and widths and numbers of blocks of all."""

    patch: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]


SIZES = {
    "h_ti": Size(4, (64, 128, 256, 512), (3, 3, 10, 3)),  # 15 M parameters, 2.0 G multiply-adds
    "h_s": Size(4, (96, 192, 384, 768), (3, 3, 10, 3)),
    "h_b": Size(4, (96, 192, 384, 768), (3, 3, 27, 3)),
    "ti": Size(16, (256,), (12,)),
    "xs": Size(16, (384,), (12,)),
    "s": Size(16, (384,), (19,)),
    "b": Size(16, (512,), (19,)),
}
"""GFNet's hierarchical sizes h_* and its isotropic ones, for pictures of 224 x 224."""


class FAMLP(nn.Module):
    """Pictures [B, 3, S, S] to logits [B, classes]: stages of blocks, each begun by a patch embedding, LayerNorm, mean
    over tokens, linear head. Positions are learned, [1, N, C] in the first stage.

    Args:
        classes: outputs.
        size: one of `SIZES`, or a `Size`.
        image_size: S or (height, width), in pixels.
        mixer: (C, H, W) to what mixes tokens; default `AdaptiveFourierFilter`, whose options
            `functools.partial(AdaptiveFourierFilter, mode="separable", gate=True)` sets.
        low_rank: () to a `LowRankEnhancement`, with k = 8 by default.
        low_rank_blocks: which blocks have it: "last" of every stage, "all", "none", or numbers counted from 0 through
            all stages.
        layer_scale: start of gamma; 1e-5 or 1e-6 for larger networks, None for no gamma, as in GFNet's isotropic sizes.
        drop_path: probability at the last block, growing linearly from 0 at the first.
        two_residuals: see `FAMLPBlock`.

    Raises:
        ValueError: unknown size or block number, sides that the patches do not divide; in `forward`, other shapes.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """

    def __init__(
        self,
        classes: int = 1000,
        size: str | Size = "h_ti",
        *,
        image_size: int | tuple[int, int] = 224,
        mixer: Mixer = AdaptiveFourierFilter,
        low_rank: Callable[[], nn.Module] = LowRankEnhancement,
        low_rank_blocks: str | Sequence[int] = "last",
        layer_scale: float | None = 1e-3,
        drop_path: float = 0.1,
        two_residuals: bool = False,
    ) -> None:
        super().__init__()
        size = _size_named(size)
        self.grids = _grids(size, image_size)
        self.image_size = (self.grids[0][0] * size.patch, self.grids[0][1] * size.patch)
        depth = sum(size.depths)
        enhanced = _blocks_with_low_rank(low_rank_blocks, size.depths)
        rates = iter([drop_path * number / max(depth - 1, 1) for number in range(depth)])
        numbers = iter(range(depth))

        self.patch_embed, self.blocks = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for (H, W), C, blocks in zip(self.grids, size.dims, size.depths, strict=True):
            self.patch_embed.append(PatchEmbedding(channels, C, 2 if len(self.patch_embed) else size.patch))
            self.blocks.append(
                nn.Sequential(
                    *(
                        FAMLPBlock(
                            C,
                            mixer(C, H, W),
                            low_rank() if next(numbers) in enhanced else None,
                            layer_scale=layer_scale,
                            drop_path=next(rates),
                            two_residuals=two_residuals,
                        )
                        for _ in range(blocks)
                    )
                )
            )
            channels = C
        H, W = self.grids[0]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, H * W, size.dims[0]), std=0.02))
        self.norm, self.head = nn.LayerNorm(channels, eps=_EPS), nn.Linear(channels, classes)
        for linear in _linear_maps(self):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def features(self, x: Tensor) -> Tensor:
        """[B, C] of the last stage, from pictures [B, 3, *image_size]."""
        if x.dim() != 4 or x.shape[1:] != (3, *self.image_size):
            raise ValueError(f"x must be [B, 3, {self.image_size[0]}, {self.image_size[1]}], not {list(x.shape)}")
        x = x.permute(0, 2, 3, 1)
        for stage, (embed, blocks) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = embed(x)
            if stage == 0:
                x = x + self.pos_embed.view(1, *x.shape[1:])
            x = blocks(x)
        return self.norm(x).mean((1, 2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def load_gfnet(self, state: Mapping[str, Any]) -> list[str]:
        """Takes weights of a GFNet of the same widths and depths; filters and positions of another grid are resized.

        Args:
            state: its state dict, or a checkpoint with that under "model". A head of other classes is left out.

        Returns:
            Names of our parameters that it did not set, ascending.

        Raises:
            ValueError: a weight of GFNet fits none of ours.
        """
        ours = self.state_dict()
        taken: dict[str, Tensor] = {}
        for name, value in state.get("model", state).items():
            key = _gfnet_name(name, isotropic=len(self.grids) == 1)
            if key.startswith("head.") and value.shape != ours[key].shape:
                continue
            taken[key] = self._resized(key, value) if key in ours else value
            if key not in ours or taken[key].shape != ours[key].shape:
                wanted = list(ours[key].shape) if key in ours else "no such parameter"
                raise ValueError(f"state must fit this network: {name} is {list(value.shape)}, expected {wanted}")
        self.load_state_dict(taken, strict=False)
        return sorted(ours.keys() - taken.keys())

    def _resized(self, key: str, value: Tensor) -> Tensor:
        """A filter [H, Wf, C, 2] or positions [1, N, C] of square pictures, on the grid of ours."""
        if key.endswith("filter.weight"):
            return resize_filter(value, *self.grids[int(key.split(".")[1])])
        if key == "pos_embed" and value.shape[1] != self.pos_embed.shape[1]:
            side = math.isqrt(value.shape[1])
            if side**2 != value.shape[1]:
                raise ValueError(f"state must have pos_embed of a square grid to be resized, not {list(value.shape)}")
            grid = value.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            resized = F.interpolate(grid, size=self.grids[0], mode="bicubic", align_corners=True)
            return resized.flatten(2).mT
        return value


def _size_named(size: str | Size) -> Size:
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, or a Size, not {size!r}")
        size = SIZES[size]
    if len(size.dims) != len(size.depths) or not size.dims or min(size.patch, *size.dims, *size.depths) < 1:
        raise ValueError(f"size must have as many dims as depths, all positive, not {size}")
    return size


def _grids(size: Size, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """(H, W) of every stage."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    coarsest = size.patch << (len(size.dims) - 1)
    if min(height, width) < 1 or height % coarsest or width % coarsest:
        raise ValueError(f"image_size must be positive multiples of {coarsest}, not {image_size}")
    return [(height // (size.patch << stage), width // (size.patch << stage)) for stage in range(len(size.dims))]


def _blocks_with_low_rank(which: str | Sequence[int], depths: tuple[int, ...]) -> set[int]:
    depth = sum(depths)
    if isinstance(which, str):
        last = {sum(depths[: stage + 1]) - 1 for stage in range(len(depths))}
        named = {"last": last, "all": set(range(depth)), "none": set()}
        if which not in named:
            raise ValueError(f'low_rank_blocks must be "last", "all", "none" or block numbers, not {which!r}')
        return named[which]
    if any(number not in range(depth) for number in which):
        raise ValueError(f"low_rank_blocks must be in 0..{depth - 1}, not {list(which)}")
    return set(which)


def _linear_maps(model: FAMLP) -> Iterator[nn.Linear]:
    """The maps that start at truncated normal numbers: of the blocks' MLPs, and the head."""
    for module in model.modules():
        if isinstance(module, MLP):
            yield from (module.fc1, module.fc2)
    yield model.head


def _gfnet_name(name: str, isotropic: bool) -> str:
    """Our name of a parameter of GFNet, whose isotropic networks do not number their only stage."""
    name = name.replace(".complex_weight", ".weight")
    if isotropic:
        name = re.sub(r"^blocks\.", "blocks.0.", name)
        name = re.sub(r"^patch_embed\.proj", "patch_embed.0.proj", name)
    return name


# ------------------------------------------------------------------------------------------------ training


class MomentumTeacher(nn.Module):
    """The weighted past of a network: theta_bar <- m theta_bar + (1 - m) theta after each of its steps.

    It starts as a copy, is always in eval mode, and gives outputs without a gradient. Buffers are copied.

    Args:
        student: the network; it is copied, not kept.
        momentum: m in [0, 1].

    Raises:
        ValueError: `momentum` is out of range.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """

    def __init__(self, student: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], not {momentum}")
        self.momentum = momentum
        self.network = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """One step towards `student`, which has the parameters and buffers of the network that this began with."""
        past, present = ([theta.detach() for theta in net.parameters()] for net in (self.network, student))
        torch._foreach_lerp_(past, present, 1 - self.momentum)
        for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def train(self, mode: bool = True) -> MomentumTeacher:
        """Stays in eval mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch: a number >= 0, in float32 at least.

    Args:
        student, teacher: logits [B, n], B >= 1; no gradient reaches the teacher's.
        temperature: T > 0.

    Raises:
        ValueError: shapes differ or are not [B, n], or T is not positive.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """
    if student.shape != teacher.shape or student.dim() != 2 or len(student) == 0:
        raise ValueError(
            f"student and teacher must both be [B, n] with B >= 1, not {list(student.shape)}, {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = ((logits.to(dtype) / temperature).log_softmax(1) for logits in (student, teacher.detach()))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def parameter_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights of filters, convolutions and linear maps decay; positions, norms, scales and
    biases do not. For any network.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """
    maps = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, FourierFilter2d)))
    decayed = {id(module.weight): module.weight for module in maps}
    others = [theta for theta in model.parameters() if id(theta) not in decayed]
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Costs:
    """Numbers of parameters, and operations of one forward pass of one picture."""

    parameters: int
    filter_parameters: int  # real numbers in all Fourier filters, part of `parameters`
    multiply_adds: int  # of convolutions and linear maps: what tables of networks call FLOPs
    filter_flops: int  # of Fourier filters: 5 HW log2(HW) for both transforms and 6 H Wf for the product, a channel
    low_rank_flops: int  # Gram matrix and two thin products; its eigenvectors are not counted


def costs(model: FAMLP) -> Costs:
    """What `model` needs for a picture of its size, counted while it passes one of zeros."""
    counted = {"multiply_adds": 0, "filter_flops": 0, "low_rank_flops": 0}

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            counted["multiply_adds"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, FourierFilter2d):
            H, W, C = module.height, module.width, module.channels
            counted["filter_flops"] += C * round(5 * H * W * math.log2(H * W) + 6 * H * (W // 2 + 1))
        elif isinstance(module, LowRankEnhancement):
            counted["low_rank_flops"] += _low_rank_flops(output, module)

    probe = copy.deepcopy(model).eval()
    for module in probe.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        probe(model.pos_embed.new_zeros(1, 3, *model.image_size))
    filters = (module for module in model.modules() if isinstance(module, FourierFilter2d))
    return Costs(
        parameters=sum(theta.numel() for theta in model.parameters()),
        filter_parameters=sum(module.weight.numel() for module in filters),
        **counted,
    )


def _low_rank_flops(z: Tensor, module: LowRankEnhancement) -> int:
    """Of z [1, H, W, C]: 2 l s^2 for the Gram matrix of an l x s matrix, l >= s, and 4 l s k for the products."""
    _, H, W, C = z.shape
    matrices, rows, columns = (C, H, W) if module.per_channel else (1, H * W, C)
    short, long = sorted((rows, columns))
    return 0 if module.k >= short else matrices * (2 * long * short**2 + 4 * long * short * module.k)


def degree_of_filtering(before: Tensor, after: Tensor) -> Tensor:
    """|FFT(after)| / |FFT(before)| by frequency: mean over batch, channels and the ring r <= |(u, v)| < r + 1.

    Args:
        before, after: [B, H, W, C], what a layer takes and gives.

    Returns:
        [R], r = 0, 1, ..; u in -H/2..H/2 and v in -W/2..W/2 count periods over the picture. float64 for float64, else
        float32. Entries whose |FFT(before)| is 0 are left out; a ring of none but those is NaN.

    Raises:
        ValueError: shapes differ, or are not [B, H, W, C] with none of them 0.

    Source: inspired by FAMLP (arXiv 2203.12893).
    """
    if before.shape != after.shape or before.dim() != 4 or before.numel() == 0:
        raise ValueError(
            f"before and after must both be [B, H, W, C], not empty, not {list(before.shape)} and {list(after.shape)}"
        )
    dtype = torch.promote_types(before.dtype, torch.float32)
    taken, given = (torch.fft.fft2(x.to(dtype), dim=(1, 2)).abs() for x in (before, after))
    counted = taken > 0
    ratio = torch.where(counted, given / torch.where(counted, taken, 1.0), 0.0).sum((0, 3))  # [H, W]
    u, v = (torch.fft.fftfreq(n, 1 / n, device=before.device) for n in ratio.shape)
    ring = torch.hypot(u[:, None], v).floor().long().flatten()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(int(ring.max()) + 1).index_add_(0, ring, values.flatten())

    return total(ratio) / total(counted.sum((0, 3)).to(dtype))
