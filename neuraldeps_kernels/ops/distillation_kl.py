"""Knowledge distillation over many classes without stored softmaxes.

    L = T^2 / N sum_n KL(softmax(b_n / T) || softmax(a_n / T)),    dL/da = T / N (softmax(a / T) - softmax(b / T))

of logits a [N, C] of the student and b [N, C] of the teacher, at temperature T.

Operators (`torch.ops.neuraldeps`): `distillation_kl(student, teacher, temperature) -> (loss, statistics [N, 4])` and
`distillation_kl_backward(grad, student, teacher, statistics, temperature) -> dstudent`. CPU:
csrc/torch/distillation_kl.cpp, csrc/cpu/distillation_kl.cpp. CUDA: triton/distillation_kl.py, else
reference/distillation_kl.py. Kept for the backward are the logits and four numbers a row; second derivatives are those
of the reference.

Source: the loss of FastHuman / SSKD (arXiv 2108.05045); method ours.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import distillation_kl as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@annotated
def distillation_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 / N sum_n KL(softmax(teacher_n / T) || softmax(student_n / T))`.

    Args:
        student: logits [N, C] with C >= 1; float32, float64, bfloat16 or float16. N may be 0.
        teacher: logits of the same shape. No gradient flows to it.
        temperature: T > 0, finite.

    Returns:
        Scalar, float64 if one of the two is float64, else float32; never negative, and 0 exactly where both are the
        same; 0 for N = 0. Sums are in that precision or better. Logits that are not finite make it NaN or infinite.
        Differentiable twice in `student`. On the CPU the same bits for any number of threads.

    Raises:
        ValueError: a shape, device or `temperature` does not fit.
        TypeError: an argument is no tensor of these dtypes.

    Source: SSKD (arXiv 2108.05045).
    """
    _check(student, teacher, temperature)
    if student.dtype != teacher.dtype:
        wide = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(wide), teacher.to(wide)
    return torch.ops.neuraldeps.distillation_kl(student, teacher.detach(), float(temperature))[0]  # type: ignore[no-any-return]


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        if value.dtype not in _INPUT_DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, not {value.dtype}; convert it first"
            )
    if student.dim() != 2 or student.shape[1] < 1:
        raise ValueError(f"student must be [N, C] with C >= 1, not {list(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(f"teacher must have the shape of student, {list(student.shape)}, not {list(teacher.shape)}")
    if teacher.device != student.device:
        raise ValueError(f"teacher is on {teacher.device}, but student is on {student.device}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")


# ------------------------------------------------------------------------------------------------ operator rules


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student, teacher, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    student, teacher, statistics = ctx.saved_tensors
    differentiable = torch.is_grad_enabled()  # then the gradient will itself be differentiated
    op = reference.distillation_kl_backward if differentiable else torch.ops.neuraldeps.distillation_kl_backward
    return op(grad, student, teacher, statistics, ctx.temperature), None, None


def _fake(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    return loss, student.new_empty((student.shape[0], 4), dtype=torch.float64)


def _fake_backward(grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float) -> Tensor:
    return student.new_empty(student.shape)


def _on_cuda(name: str, plain: Any) -> Any:
    """The Triton kernel of the operator; the reference where triton is not installed."""

    @functools.wraps(plain)
    def run(*args: Any) -> Any:
        try:
            from neuraldeps_kernels.triton import distillation_kl as kernels
        except ImportError as error:
            _log.debug("%s runs on the plain PyTorch reference: %s", name, error)
            return plain(*args)
        return getattr(kernels, plain.__name__)(*args)

    return run


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


def _register() -> None:
    torch.library.register_fake("neuraldeps::distillation_kl", _fake)
    torch.library.register_fake("neuraldeps::distillation_kl_backward", _fake_backward)
    torch.library.register_autograd("neuraldeps::distillation_kl", _backward, setup_context=_save)
    for name, plain in (
        ("distillation_kl", reference.distillation_kl_forward),
        ("distillation_kl_backward", reference.distillation_kl_backward),
    ):
        _library.impl(name, _on_cuda(name, plain), "CUDA")


_register()
