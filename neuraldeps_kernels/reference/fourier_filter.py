"""Plain PyTorch twin of `neuraldeps_kernels.ops.fourier_filter`, by torch.fft: the oracle of the tests, in float64,
and what serves where no kernel does. Conjugates are taken at once: in an operator's kernel, torch's lazy ones get lost.

Notation: x, y, g [B, H, W, C] ("NHWC") or [B, C, H, W] ("NCHW"); X, Y, G their half spectra; Wf = W//2 + 1; the weight
is the real view [H, Wf, C, 2] of a filter K, or [H, Wf, G, D, D, 2] of G blocks K_io, C = G D, and is
float64 for float64 x, else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fourier_filter2d(x: Tensor, weight: Tensor, layout: str, norm: str) -> Tensor:
    """irfft2(rfft2(x) K) with the Hermitian-consistent part of K, in the dtype and layout of x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    K = hermitian_part(torch.view_as_complex(weight.contiguous()), width_of(x, layout))
    return _inverse(_product(_spectrum(x, layout, norm), K), x, layout, norm)


def fourier_filter2d_backward(grad: Tensor, x: Tensor, weight: Tensor, layout: str, norm: str) -> tuple[Tensor, Tensor]:
    """dx, in the dtype and layout of x, and dweight: the gradients of `fourier_filter2d` for the gradient `grad` of y.

    dX = G conj(K) and dK[u, v] = c_v sum_b conj(X) G / (H W), c_v = 1 for v = 0 and v = W/2, else 2, of unnormalised
    X and G.
    """
    dx = fourier_filter2d(grad, adjoint(weight), layout, norm).to(x.dtype)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    W = width_of(x, layout)
    X, G = _spectrum(x, layout, "ortho"), _spectrum(grad, layout, "ortho")
    if weight.dim() == 4:
        dK = (X.conj_physical() * G).sum(0)
    else:
        blocks = weight.shape[2:4]
        dK = torch.einsum("buvgi,buvgo->uvgio", X.unflatten(-1, blocks).conj_physical(), G.unflatten(-1, blocks))
    c = torch.tensor([1.0 if v in (0, W - v) else 2.0 for v in range(W // 2 + 1)], dtype=dK.dtype, device=dK.device)
    return dx, torch.view_as_real(c.view(-1, *[1] * (dK.dim() - 2)) * dK).contiguous()


def hermitian_part(K: Tensor, W: int) -> Tensor:
    """The part of K [H, Wf, ...] complex that real signals of width W see: in columns 0 and W/2 (even W) it is
    (K[u] + conj K[-u]) / 2, elsewhere K itself.
    """
    K = K.clone()
    for v in {0, W // 2} if W % 2 == 0 else {0}:
        column = K[:, v].clone()
        K[:, v] = (column + column.flip(0).roll(1, 0).conj_physical()) / 2
    return K


def adjoint(weight: Tensor) -> Tensor:
    """Real view of the filter whose operator is the transpose: conj(K), and its blocks transposed."""
    conjugate = torch.stack([weight[..., 0], -weight[..., 1]], -1)
    return conjugate if weight.dim() == 4 else conjugate.transpose(3, 4)


def width_of(x: Tensor, layout: str) -> int:
    return x.shape[2] if layout == "NHWC" else x.shape[3]


def _spectrum(x: Tensor, layout: str, norm: str) -> Tensor:
    """[B, H, Wf, C] of x."""
    channels_last = x if layout == "NHWC" else x.permute(0, 2, 3, 1)
    computed = channels_last.to(torch.promote_types(x.dtype, torch.float32))
    X: Tensor = torch.fft.rfft2(computed, dim=(1, 2), norm=norm)
    return X


def _product(X: Tensor, K: Tensor) -> Tensor:
    if K.dim() == 3:
        return X * K
    return torch.einsum("buvgi,uvgio->buvgo", X.unflatten(-1, K.shape[2:4]), K).flatten(-2)


def _inverse(Y: Tensor, x: Tensor, layout: str, norm: str) -> Tensor:
    H, W = x.shape[1:3] if layout == "NHWC" else x.shape[2:]
    y: Tensor = torch.fft.irfft2(Y, s=(H, W), dim=(1, 2), norm=norm).to(x.dtype)
    return y if layout == "NHWC" else y.permute(0, 3, 1, 2)
