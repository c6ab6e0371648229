"""The Fourier filter layer on the CPU against torch.fft, torch.compile of it, and scipy.fft: microseconds a call.

Images are normal numbers [B, H, W, C] with weights of GFNet's kind; grids are those of GOALS.md, then some with other
radices, planes (NCHW), bfloat16 and blocks of channels. Errors are relative l2 against float64 on the same inputs: of
y, and of dweight with gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from benchmarks.bench_covlasso_large import megabytes_of
from benchmarks.harness import Budget, Case, Contender, Recipe, measured_rates
from neuraldeps_kernels.ops.fourier_filter import fourier_filter2d
from neuraldeps_kernels.reference import fourier_filter as reference


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    W: int
    C: int
    layout: str = "NHWC"
    dtype: torch.dtype = torch.float32
    groups: int | None = None

    @property
    def name(self) -> str:
        other = [] if self.layout == "NHWC" else [self.layout]
        other += [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        other += [] if self.groups is None else [f"groups {self.groups}"]
        return " ".join([f"{self.B}x{self.H}x{self.W}x{self.C}", *other])


SHAPES = [
    Shape(64, 7, 7, 512),
    Shape(32, 14, 14, 384),
    Shape(32, 16, 16, 256),
    Shape(16, 28, 28, 128),
    Shape(16, 32, 32, 128),
    Shape(8, 56, 56, 64),
    Shape(8, 64, 64, 64),
    Shape(1, 14, 14, 384),
    Shape(16, 15, 20, 64),
    Shape(16, 31, 31, 64),
    Shape(4, 96, 96, 64),
    Shape(32, 14, 14, 384, layout="NCHW"),
    Shape(8, 56, 56, 64, layout="NCHW"),
    Shape(32, 14, 14, 384, dtype=torch.bfloat16),
    Shape(8, 56, 56, 64, dtype=torch.bfloat16),
    Shape(32, 14, 14, 96, groups=4),
    Shape(16, 28, 28, 128, groups=8),
    Shape(16, 28, 28, 64, groups=1),
    Shape(1, 14, 14, 96, groups=4),
]
WITH_GOALS = 7  # the first of them
GOAL = 4.0  # each; the geometric mean is to be 6
LIMITS = {torch.float32: 5e-7, torch.bfloat16: 3e-3}
WEIGHT_LIMIT = 5e-7


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """y, then y with both gradients, of every shape."""
    for index, shape in enumerate(SHAPES):
        goal = GOAL if index < WITH_GOALS else None
        for job in (_forward_case, _training_case):
            name = f"fourier_filter {job.__name__.split('_')[1]} {shape.name}"
            yield Recipe(name, _recipe(job, name, shape, goal))


def _recipe(job: Callable[..., Case], name: str, shape: Shape, goal: float | None) -> Callable[[], Case]:
    return lambda: job(name, shape, goal)


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.B, shape.H, shape.W, shape.C) if shape.layout == "NHWC" else (shape.B, shape.C, shape.H, shape.W)
    block = [shape.C] if shape.groups is None else [shape.groups, *[shape.C // shape.groups] * 2]
    x, g = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
    return x, 0.02 * torch.randn(shape.H, shape.W // 2 + 1, *block, 2, generator=generator), g


def composed(x: Tensor, weight: Tensor, layout: str) -> Tensor:
    """The layer as GFNet and AFNO write it: float32 transforms and a complex product."""
    dims = (1, 2) if layout == "NHWC" else (2, 3)
    K = torch.view_as_complex(weight)
    X = torch.fft.rfft2(x.float(), dim=dims, norm="ortho")
    if K.dim() == 5:
        Y = torch.einsum("buvgi,uvgio->buvgo", X.unflatten(-1, K.shape[2:4]), K).flatten(-2)
    else:
        Y = X * (K if layout == "NHWC" else K.permute(2, 0, 1))
    y: Tensor = torch.fft.irfft2(Y, s=[x.shape[d] for d in dims], dim=dims, norm="ortho").to(x.dtype)
    return y


def by_scipy(x: np.ndarray, K: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    X = scipy.fft.rfft2(x, axes=axes, norm="ortho")
    X *= K
    y: np.ndarray = scipy.fft.irfft2(X, s=[x.shape[d] for d in axes], axes=axes, norm="ortho", overwrite_x=True)
    return y


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _case(name: str, shape: Shape, ours: Contender, peers: list[Contender], tensors: int) -> Case:
    """`tensors`: how many the size of x are read or written."""
    pixels = shape.B * shape.H * shape.W * shape.C
    moved = float(tensors * pixels * shape.dtype.itemsize)
    rates = measured_rates(1, max(1 << 16, pixels * shape.dtype.itemsize), torch.float32)
    parameters = {"B": shape.B, "H": shape.H, "W": shape.W, "C": shape.C, "layout": shape.layout}
    parameters |= {"dtype": str(shape.dtype).removeprefix("torch."), "groups": shape.groups}
    facts = {f"MB {one.name}": round(megabytes_of(one.run), 1) for one in (ours, peers[0])}
    return Case(name, parameters, ours=ours, peers=peers, bytes=moved, rates=rates, facts=facts)


def _forward_case(name: str, shape: Shape, goal: float | None) -> Case:
    x, weight, _ = inputs(shape)
    want = reference.fourier_filter2d(x.double(), weight.double(), shape.layout, "ortho")

    def error(y: Tensor | np.ndarray) -> float:
        return _relative(torch.as_tensor(y), want)

    limit = LIMITS[shape.dtype]
    ours = Contender("ours", lambda: fourier_filter2d(x, weight, layout=shape.layout), 1, error, limit)
    compiled = torch.compile(composed)
    peers = [
        Contender("torch.fft", lambda: composed(x, weight, shape.layout), 1, error, limit, goal),
        Contender("torch.compile of it", lambda: compiled(x, weight, shape.layout), 1, error, limit),
    ]
    if shape.dtype == torch.float32 and shape.groups is None:
        K = torch.view_as_complex(weight)
        array, factor = x.numpy(), (K if shape.layout == "NHWC" else K.permute(2, 0, 1)).numpy()
        axes = (1, 2) if shape.layout == "NHWC" else (2, 3)
        peers.append(Contender("scipy.fft", lambda: by_scipy(array, factor, axes), 1, error, limit))
    return _case(name, shape, ours, peers, 2)


def _training_case(name: str, shape: Shape, goal: float | None) -> Case:
    x, weight, g = inputs(shape)
    _, want = reference.fourier_filter2d_backward(g.double(), x.double(), weight.double(), shape.layout, "ortho")

    def step(function: Callable[[Tensor, Tensor, str], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            function(*leaves, shape.layout).backward(g)
            assert leaves[1].grad is not None
            return leaves[1].grad

        return run

    def error(dweight: Tensor) -> float:
        return _relative(dweight, want)

    def layer(x: Tensor, weight: Tensor, layout: str) -> Tensor:
        return fourier_filter2d(x, weight, layout=layout)

    ours = Contender("ours", step(layer), 1, error, WEIGHT_LIMIT)
    peers = [Contender("torch.fft", step(composed), 1, error, 2 * WEIGHT_LIMIT, goal)]
    return _case(name, shape, ours, peers, 5)
