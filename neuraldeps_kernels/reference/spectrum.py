"""Plain PyTorch twin of `neuraldeps_kernels.ops.spectrum`: singular values by LAPACK or cuSOLVER in float64.

It is the oracle of the tests, and what CUDA tensors go to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _zeros_where_not_finite(a: Tensor) -> tuple[Tensor, Tensor]:
    """a in float64 with zero matrices in place of those with NaN or infinity, and which those are [...]."""
    wrong = ~a.isfinite().all(-1).all(-1)
    return torch.where(wrong[..., None, None], 0.0, a.double()), wrong


def svdvals(a: Tensor) -> Tensor:
    """Singular values [..., min(m, n)] of a [..., m, n], descending: float64 for float64, else float32; NaN where a
    matrix holds NaN or infinity.
    """
    finite, wrong = _zeros_where_not_finite(a)
    values = torch.where(wrong[..., None], torch.nan, torch.linalg.svdvals(finite))
    return values.to(torch.promote_types(a.dtype, torch.float32))


def matrix_rank(a: Tensor, rtol: Tensor, atol: float, hermitian: bool) -> Tensor:
    """#{ i : sigma_i > max(atol, rtol_r sigma_1) } for every rtol_r: [..., R]; -1 where a matrix holds NaN or infinity.

    Args:
        a: [..., m, n].
        rtol: [R].
        hermitian: sigma are the absolute eigenvalues of the symmetric matrix that has the lower triangle of a.
    """
    finite, wrong = _zeros_where_not_finite(a)
    if a.numel() == 0:
        return torch.zeros(*a.shape[:-2], len(rtol), dtype=torch.int64, device=a.device)
    values = torch.linalg.eigvalsh(finite).abs() if hermitian else torch.linalg.svdvals(finite)
    threshold = (values.amax(-1, keepdim=True) * rtol.to(a.device)).clamp(min=atol)  # [..., R]
    rank = (values[..., None, :] > threshold[..., None]).sum(-1)
    return torch.where(wrong[..., None], -1, rank)


def low_rank_project(a: Tensor, k: int) -> Tensor:
    """The sum of the k leading terms sigma_i u_i v_i' of a [..., m, n]; NaN where a matrix is not finite."""
    finite, wrong = _zeros_where_not_finite(a)
    u, s, vh = torch.linalg.svd(finite, full_matrices=False)
    projected = (u[..., :k] * s[..., None, :k]) @ vh[..., :k, :]
    return torch.where(wrong[..., None, None], torch.nan, projected).to(a.dtype)
