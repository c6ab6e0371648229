"""ResNet-18 to -152 as a map of features, with the parameter names of torchvision and any normalisation.

    x [N, 3, H, W] -> [N, C, H / 16, W / 16],   C = 512 (depth 18, 34) or 2048 (50, 101, 152)

The last stage keeps its resolution (stride 1), as is usual for re-identification; `last_stride=2` is the classifier of
the paper, with H / 32. Norms that take a residual and an activation (nn/domain_norm.py) get both and run as one pass.

Source: "Deep Residual Learning for Image Recognition"; stride on the 3 x 3 convolution, as in torchvision's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from neuraldeps_kernels.nn.conversion import fuse_domain_batch_norm

Norm = Callable[[int], nn.Module]  # from the number of channels
Model = TypeVar("Model", bound=nn.Module)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))): [N, C, H, W] to [N, width, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _shortcut(channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        inner = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(inner), self.downsample(x))


class Bottleneck(nn.Module):
    """As BasicBlock with convolutions 1 x 1, 3 x 3, 1 x 1: [N, C, H, W] to [N, 4 width, H / stride, W / stride]."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = norm(out)
        self.downsample = _shortcut(channels, out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        inner = norm_relu(self.bn1, self.conv1(x))
        inner = norm_relu(self.bn2, self.conv2(inner))
        return norm_relu(self.bn3, self.conv3(inner), self.downsample(x))


def _shortcut(channels: int, out: int, stride: int, norm: Norm) -> nn.Sequential:
    """x itself, or its projection where the shape changes."""
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual)."""
    if getattr(norm, "takes_residual", False):
        return norm(x, residual=residual, activation="relu")  # type: ignore[no-any-return]
    y = norm(x)
    return torch.relu(y if residual is None else y + residual)


_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """See the head of the file.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem; stage i has 2^(i-1) times as many, 4 times that in the output of a bottleneck.
        last_stride: 1 or 2, of the last stage.
        norm: from a number of channels to the norm of that layer.

    Attributes:
        channels: of the results of stages 1 to 4.

    Raises:
        ValueError: depth or last_stride is another.
    """

    def __init__(self, depth: int = 50, *, width: int = 64, last_stride: int = 1, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _BLOCKS))}, not {depth}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, not {last_stride}")
        block, blocks = _BLOCKS[depth]
        self.channels = tuple(block.expansion * width << stage for stage in range(4))
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = norm(width)
        channels = (width, *self.channels)
        for stage, (count, stride) in enumerate(zip(blocks, (1, 2, 2, last_stride), strict=True)):
            first = block(channels[stage], width << stage, stride, norm)
            others = [block(channels[stage + 1], width << stage, 1, norm) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        """Stages 1 to 4, which follow the stem."""
        return [getattr(self, f"layer{stage}") for stage in (1, 2, 3, 4)]

    def stem(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to [N, width, H / 4, W / 4]."""
        return max_pool2d(norm_relu(self.bn1, self.conv1(x)), 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


def load_imagenet(backbone: ResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Takes the weights of torchvision's ResNet of the same depth by name; every domain gets the same BatchNorm.

    Args:
        state_dict: of torchvision.models.resnet50, say; its classifier `fc` is left out.

    Raises:
        ValueError: a weight of the backbone is missing, or one is left over, as from another depth.
    """
    weights = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
    calibrations = ("center_weight", "scale_weight", "scale_bias")  # those of calibrated norms are in no plain network
    own = backbone.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(calibrations)]
    unexpected = [name for name in weights if name not in own and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"state_dict must be that of torchvision's ResNet of the same depth; it lacks {missing[:3]} and has "
            f"{unexpected[:3]} too many"
        )
    backbone.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def folded(backbone: ResNet, domain: int = -1) -> ResNet:
    """Copy without norms for one domain (-1: the unseen one), each folded into the convolution before it.

    The norms have to be DomainBatchNorm2d or GaussianProcessBatchNorm2d. The copy does what the backbone does in eval.
    """
    backbone = copy.deepcopy(backbone)
    for parent in list(backbone.modules()):
        names = list(parent._modules)
        for conv, norm in _PAIRS:
            if conv in names and norm in names and isinstance(parent.get_submodule(conv), nn.Conv2d):
                fused = fuse_domain_batch_norm(parent.get_submodule(conv), parent.get_submodule(norm), domain)
                setattr(parent, conv, fused)
                setattr(parent, norm, nn.Identity())
    return backbone.eval()


_PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"))  # the last one in shortcuts
