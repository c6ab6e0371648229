"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.distillation_kl`: float64 throughout.

It is the oracle of the tests, what CUDA tensors go to where Triton is missing, and, being differentiable, the second
derivative of the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 / N sum_n KL(softmax(teacher_n / T) || softmax(student_n / T)); student, teacher [N, C]; 0 of no rows.

    The result is float64 for float64 `student`, else float32.
    """
    log_s = torch.log_softmax(student.double() / temperature, 1)
    log_t = torch.log_softmax(teacher.detach().double() / temperature, 1)
    loss = (log_t.exp() * (log_t - log_s)).sum() * (temperature**2 / max(len(student), 1))
    return loss.to(torch.promote_types(student.dtype, torch.float32))


def distillation_kl_forward(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss, and [N, 4] float64: largest logit m and log sum exp((x - m) / T) of the student, then the teacher."""
    statistics = []
    for x in (student.double(), teacher.double()):
        largest = x.amax(1) if x.shape[1] else x.new_zeros(len(x))
        statistics += [largest, torch.logsumexp((x - largest[:, None]) / temperature, 1)]
    return distillation_kl(student, teacher, temperature), torch.stack(statistics, 1)


def distillation_kl_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float
) -> Tensor:
    """grad T / N (softmax(student / T) - softmax(teacher / T)) in the dtype of `student`; `statistics` is not read."""
    p_s = torch.softmax(student.double() / temperature, 1)
    p_t = torch.softmax(teacher.detach().double() / temperature, 1)
    return (grad.double() * (temperature / max(len(student), 1)) * (p_s - p_t)).to(student.dtype)
