"""Small classifiers of images with named blocks: an MLP, a ResNet and a vision transformer, randomly initialised.

Each is a chain of modules: stem, blocks.0, blocks.1, .., head, and every block is one function of the block before it,
its skip connection included. Input [N, 3, size, size], output logits [N, classes]. Textbook architectures; sizes are
our choice, so that every measurement of them takes seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZE = 32  # side of an input, pixels


class MLP(nn.Module):
    """Flattened image, `depth` blocks of a linear map, LayerNorm and GELU, and a linear head."""

    def __init__(self, classes: int = 10, *, size: int = SIZE, width: int = 256, depth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, width))
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class MLPBlock(nn.Module):
    """gelu(norm(W x)), [N, width] to [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(self.linear(x)))


class ResNet(nn.Module):
    """3 x 3 stem, `blocks_per_stage` basic blocks at each of three widths, mean over positions, linear head."""

    def __init__(self, classes: int = 10, *, width: int = 16, blocks_per_stage: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList()
        channels = width
        for stage in range(3):
            for block in range(blocks_per_stage):
                out = width << stage
                self.blocks.append(BasicBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), [N, C, H, W] to [N, C', H/stride, W/stride]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(inner)))


class VisionTransformer(nn.Module):
    """Patches of `patch` pixels as tokens, learned positions, `depth` pre-norm blocks, mean of tokens, linear head."""

    def __init__(
        self, classes: int = 10, *, size: int = SIZE, patch: int = 4, width: int = 96, depth: int = 6, heads: int = 3
    ) -> None:
        super().__init__()
        self.stem = PatchEmbedding(size, patch, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pool = TokenMean()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(self.norm(x)))  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """[N, 3, size, size] to tokens [N, T, width]."""

    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).mT + self.position  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on tokens [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, h, T, w/h]
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TokenMean(nn.Module):
    """[N, T, width] to [N, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


BACKBONES: dict[str, Callable[[int], nn.Module]] = {"mlp": MLP, "resnet": ResNet, "vit": VisionTransformer}


def backbone(name: str, classes: int = 10, *, seed: int = 0) -> nn.Module:
    """The network called `name` in eval mode, its weights drawn from `seed` without changing the global generator.

    Raises ValueError for a name that is not in BACKBONES.
    """
    if name not in BACKBONES:
        raise ValueError(f"name must be one of {', '.join(BACKBONES)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BACKBONES[name](classes).eval()
