"""Contrast with a queue of keys without an [N, K] matrix, and the upkeep of that queue and its momentum encoder.

    S = q Q^T / tau,  R = o Q^T / tau_t        of rows q, k, o [N, d] and a queue Q [K, d]
    L_con = mean -log softmax([<q, k> / tau, S])[0],    KL = mean KL(softmax(R) || softmax(S))

Operator `torch.ops.neuraldeps.queue_contrast(q, k, queue, original, temperature, target_temperature, gradient) ->
(L_con, KL, dL_con / dq, dKL / dq)`: one pass over the queue gives the losses and their gradients, which are all that is
kept for the backward, so the queue may change in between. CPU: csrc/torch/queue_contrast.cpp,
csrc/cpu/queue_contrast.cpp. CUDA: triton/queue_contrast.py, else reference/queue_contrast.py.

`momentum_update` and `enqueue` are torch's own multi-tensor and indexed operations, on every device.

Source: momentum contrast as in LUPerson; global consistency as reconstructed for UP-ReID (arXiv 2112.00317).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import queue_contrast as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@annotated
def queue_contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    original: Tensor | None = None,
    temperature: float = 0.1,
    target_temperature: float = 0.07,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of q against its key k and the queue, and how far q sees other neighbours in the queue than `original`.

    Args:
        q: [N, d], usually unit rows; float32, float64, bfloat16 or float16. N may be 0.
        k: [N, d], the positive key of each row.
        queue: Q [K, d], the negatives; K may be 0.
        original: o [N, d], whose softmax over the queue is the target of the KL; None: no KL.
        temperature: tau > 0.
        target_temperature: tau_t > 0, of `original`.

    Returns:
        L_con and KL, scalars, means over N; 0 where there are no rows or no queue, KL also without `original`. float64
        for float64 `q`, else float32, in which all products are taken; KL is never negative. Differentiable once, in
        `q` alone. On the CPU the same bits for any number of threads.

    Raises:
        ValueError: a shape, device or temperature does not fit.
        TypeError: an argument is no tensor of these dtypes.
        RuntimeError: a second derivative is asked for.

    Source: as of the module; gradients are closed forms.
    """
    tensors = {"q": q, "k": k, "queue": queue} | ({} if original is None else {"original": original})
    _check_rows(tensors)
    for name, value in (("temperature", temperature), ("target_temperature", target_temperature)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, not {value}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    gradient = torch.is_grad_enabled() and q.requires_grad
    if (queue.dtype == torch.float64) != (wide == torch.float64):
        queue = queue.to(wide)
    contrast, consistency, _, _ = torch.ops.neuraldeps.queue_contrast(
        q.to(wide),
        k.detach().to(wide),
        queue.detach(),
        None if original is None else original.detach().to(wide),
        float(temperature),
        float(target_temperature),
        gradient,
    )
    return contrast, consistency


@annotated
def momentum_update(teacher_params: Sequence[Tensor], params: Sequence[Tensor], m: float) -> None:
    """`theta_k <- m theta_k + (1 - m) theta_q` in place for all tensors at once.

    Args:
        teacher_params: theta_k, floating-point tensors of any layout.
        params: theta_q, of the same shapes and devices; taken in the dtype of theta_k.
        m: momentum in 0..1; 1 changes nothing, 0 copies.

    Raises:
        ValueError: numbers, shapes or devices of the tensors differ, or `m` is out of range.
        TypeError: a tensor is not floating-point.

    The same bits as `theta_k.lerp_(theta_q, 1 - m)` tensor by tensor, in any order. One launch a few dozen tensors on
    CUDA (`torch._foreach_lerp_`).
    """
    teacher_params, params = list(teacher_params), list(params)
    if len(teacher_params) != len(params):
        raise ValueError(f"params must hold {len(teacher_params)} tensors as teacher_params does, not {len(params)}")
    if not 0 <= m <= 1:
        raise ValueError(f"m must be in 0..1, not {m}")
    for i, (teacher, online) in enumerate(zip(teacher_params, params, strict=True)):
        if teacher.shape != online.shape or teacher.device != online.device:
            raise ValueError(
                f"params[{i}] must be {list(teacher.shape)} on {teacher.device} as in teacher_params, "
                f"not {list(online.shape)} on {online.device}"
            )
        if not (teacher.is_floating_point() and online.is_floating_point()):
            raise TypeError(f"teacher_params[{i}] and params[{i}] must be floating-point tensors")
    if teacher_params:
        with torch.no_grad():
            ends = [online.to(teacher.dtype) for teacher, online in zip(teacher_params, params, strict=True)]
            torch._foreach_lerp_(teacher_params, ends, 1 - m)


@annotated
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes keys as unit rows into a ring buffer, in place, and advances its pointer modulo K.

    Args:
        queue: Q [K, d], floating-point.
        pointer: int64 [] or [1], the row of the next key.
        keys: [N, d] with N <= K, floating-point; normalised in float32 (float64 for float64 keys), then rounded to the
            dtype of `queue`. A zero row stays zero.

    Raises:
        ValueError: shapes or devices do not fit, or there are more keys than the queue holds.
        TypeError: `pointer` is not int64, or `queue` or `keys` not floating-point.

    The host never waits for a device.
    """
    _check_rows({"keys": keys, "queue": queue})
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        raise TypeError("pointer must be an int64 tensor")
    if pointer.numel() != 1 or pointer.device != queue.device:
        raise ValueError(f"pointer must be one number on {queue.device}, not {list(pointer.shape)} on {pointer.device}")
    N, K = len(keys), len(queue)
    if N > K:
        raise ValueError(f"keys must hold at most the {K} rows of the queue, not {N}")
    if N == 0:
        return
    with torch.no_grad():
        unit = torch.nn.functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=1)
        rows = (pointer + torch.arange(N, device=queue.device)) % K
        queue.index_copy_(0, rows, unit.to(queue.dtype))
        pointer.add_(N).remainder_(K)


# ------------------------------------------------------------------------------------------------ arguments


def _check_rows(tensors: dict[str, Tensor]) -> None:
    """All are [., d] on the device of the first, and [N, d] but for the queue."""
    (first, like), *_ = tensors.items()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        if value.dtype not in _INPUT_DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, not {value.dtype}; convert it first"
            )
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, but {first} is on {like.device}")
        if value.dim() != 2 or value.shape[1] < 1:
            rows = "K" if name == "queue" else "N"
            raise ValueError(f"{name} must be [{rows}, d] with d >= 1, not {list(value.shape)}")
        if value.shape[1] != like.shape[1]:
            raise ValueError(f"{name} must have the {like.shape[1]} columns of {first}, not {value.shape[1]}")
        if name != "queue" and value.shape != like.shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(like.shape)}, not {list(value.shape)}")


# ------------------------------------------------------------------------------------------------ operator rules


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    original, gradient = inputs[3], inputs[6]
    ctx.original = original is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[2:] if gradient else output))
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad_contrast: Tensor | None, grad_consistency: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("queue_contrast has no second derivative: differentiate without create_graph")
    dcontrast, dconsistency = ctx.saved_tensors
    dq = None if grad_contrast is None else grad_contrast * dcontrast
    if grad_consistency is not None and ctx.original:
        term = grad_consistency * dconsistency
        dq = term if dq is None else dq + term
    return dq, *(None,) * 6


def _fake(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    original: Tensor | None,
    temperature: float,
    target_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, d = q.shape
    second = gradient and original is not None
    return (
        q.new_empty(()),
        q.new_empty(()),
        q.new_empty((N if gradient else 0, d)),
        q.new_empty((N if second else 0, d)),
    )


@functools.wraps(reference.queue_contrast_forward)
def _on_cuda(*args: Any) -> tuple[Tensor, ...]:
    """The Triton kernel; the reference where triton is not installed."""
    try:
        from neuraldeps_kernels.triton import queue_contrast as kernels
    except ImportError as error:
        _log.debug("queue_contrast runs on the plain PyTorch reference: %s", error)
        return reference.queue_contrast_forward(*args)
    return kernels.queue_contrast_forward(*args)


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object
torch.library.register_fake("neuraldeps::queue_contrast", _fake)
torch.library.register_autograd("neuraldeps::queue_contrast", _backward, setup_context=_save)
_library.impl("queue_contrast", _on_cuda, "CUDA")
