"""Plain PyTorch twin of `neuraldeps_kernels.ops.queue_contrast`: both [N, K] matrices in float64.

It is the oracle of the tests, and what CUDA tensors go to where Triton is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def queue_contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    original: Tensor | None = None,
    temperature: float = 0.1,
    target_temperature: float = 0.07,
) -> tuple[Tensor, Tensor]:
    """L_con and KL, means over N, float64 for float64 `q`, else float32; 0 where there is nothing to compare with.

        L_con = -log softmax([<q, k>, q Q^T] / tau)[0],    KL = KL(softmax(o Q^T / tau_t) || softmax(q Q^T / tau))

    q, k, original [N, d], queue [K, d]; only q has a gradient.
    """
    q, wide = q.double(), torch.promote_types(q.dtype, torch.float32)
    k, queue = k.detach().double(), queue.detach().double()
    count = max(len(q), 1)
    negative = q @ queue.T / temperature  # [N, K]
    logits = torch.cat([(q * k).sum(1, keepdim=True) / temperature, negative], 1)
    contrast = (torch.logsumexp(logits, 1) - logits[:, 0]).sum() / count
    consistency = q.sum() * 0.0
    if original is not None and len(queue):
        log_o = torch.log_softmax(original.detach().double() @ queue.T / target_temperature, 1)
        consistency = (log_o.exp() * (log_o - torch.log_softmax(negative, 1))).sum() / count
    return contrast.to(wide), consistency.to(wide)


def queue_contrast_forward(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    original: Tensor | None,
    temperature: float,
    target_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator: both losses and, with `gradient`, the gradients [N, d] of both in q; else [0, d], as without
    `original` for the second."""
    leaf = q.detach().requires_grad_()
    with torch.enable_grad():
        contrast, consistency = queue_contrast(
            leaf, k, queue, original=original, temperature=temperature, target_temperature=target_temperature
        )
    nothing = q.new_empty(0, q.shape[1])
    if not gradient:
        return contrast.detach(), consistency.detach(), nothing, nothing
    (dcontrast,) = torch.autograd.grad(contrast, leaf, retain_graph=True)
    dconsistency = nothing if original is None else torch.autograd.grad(consistency, leaf)[0]
    return contrast.detach(), consistency.detach(), dcontrast, dconsistency


def momentum_update(teacher_params: Sequence[Tensor], params: Sequence[Tensor], m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q in place, one tensor after the other."""
    with torch.no_grad():
        for teacher, online in zip(teacher_params, params, strict=True):
            teacher.lerp_(online.to(teacher.dtype), 1 - m)


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes the unit rows of keys [N, d] to queue [K, d] from row `pointer` on, wrapping around, and advances it."""
    with torch.no_grad():
        unit = torch.nn.functional.normalize(keys.double(), dim=1).to(queue.dtype)
        for row in unit:
            queue[int(pointer)] = row
            pointer.copy_((pointer + 1) % len(queue))
