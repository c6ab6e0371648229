"""The closed-form discriminator of a law tilted towards a target, from penalties of samples alone.

The game between q and D of a law p with penalty l >= 0 and weight eta,

    min over q, max over D   E_p[log D] + E_q[log(1 - D)] + eta E_q[l]                       JS
    min over q               KL(q || p) + eta E_q[l]                                          KL

has with samples of p the solutions, w = q / p being the density ratio,

    JS   w = s / (1 - s),  s = exp(c - eta l),  c < eta min l the root of mean w = 1
    KL   w = exp(c - eta l),  c = -log mean exp(-eta l)
    both D = 1 / (1 + w)

Operator: `torch.ops.neuraldeps.closed_form_discriminator(penalty, eta, game) -> (D, w, c)`, on the CPU
csrc/cpu/closed_form_discriminator.cpp, on CUDA triton/closed_form_discriminator.py, else the reference.

Source: a reconstruction of the closed-form discriminator of knowledge extrapolation (arXiv 2205.13444), of which only
the abstract could be read; equations and method are ours.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import closed_form_discriminator as reference

_log = logging.getLogger("neuraldeps_kernels")

GAMES = ("js", "kl")
ESCAPED = 0.1  # share of q on one sample from which on samples stand badly for p


class Discriminator(NamedTuple):
    """Solution of the game on N samples."""

    discriminator: Tensor  # D [N]
    weights: Tensor  # w = q / p [N], of mean 1
    c: Tensor  # float64, no dimensions


class MassEscapes(UserWarning):
    """The tilted law piles up on few samples: too few of them, too large an eta, or a target out of reach."""


@annotated
def closed_form_discriminator(
    k: Tensor, k_star: float | Tensor, eta: float, game: str = "js", *, penalty: str = "squared", sharpness: float = 1.0
) -> Discriminator:
    """Discriminator and density ratio of the law that is nearest to that of the samples and has the wanted knowledge.

    Args:
        k: knowledge of N > 0 samples, [N] or [N, m]; float32, float64, bfloat16 or float16, any strides.
        k_star: the target, a number or [m].
        eta: weight of the penalty, finite and >= 0; 0 gives w = 1.
        game: "js" or "kl".
        penalty: "squared", l = |k - k*|^2 / 2; or "push", l = the mean over m of softplus(sharpness (k* - k)), which
            asks for at least k*.
        sharpness: of "push", > 0.

    Returns:
        D, w in float64 for float64 `k`, else in float32, and c. Differentiable in `k` and a tensor `k_star`. NaN in `k`
        makes everything NaN; a sample at an infinite distance has w = 0. s is at most 1 - 1e-6: beyond that, mass of q
        would leave the samples, and mean w stays below 1.

    Warns:
        MassEscapes: on the CPU, if q puts more than a tenth of its mass on one of 100 or more samples. On CUDA nothing
        is read back: look at `effective_sample_size(weights)`.

    Raises:
        TypeError: `k` is no floating-point tensor.
        ValueError: shapes, eta, game, penalty or sharpness do not fit.

    Source: see the head of this file.
    """
    loss = knowledge_penalty(k, k_star, penalty=penalty, sharpness=sharpness)
    if loss.dim() != 1 or not len(loss):
        raise ValueError(f"k must be [N] or [N, m] with N > 0, not {list(k.shape)}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and >= 0, not {eta}")
    if game not in GAMES:
        raise ValueError(f'game must be "js" or "kl", not {game!r}')
    D, w, c = torch.ops.neuraldeps.closed_form_discriminator(loss, float(eta), game)
    if w.device.type == "cpu" and len(w) >= 100 and not torch.compiler.is_compiling():
        share = float(w.detach().amax()) / len(w)
        if share > ESCAPED:
            warnings.warn(
                f"one of {len(w)} samples carries {share:.0%} of the tilted law: take a smaller eta than {eta:g}, more "
                f"samples, a nearer target" + (', or game="kl"' if game == "js" else ""),
                MassEscapes,
                stacklevel=2,
            )
    return Discriminator(D, w, c[0])


def knowledge_penalty(k: Tensor, k_star: float | Tensor, *, penalty: str = "squared", sharpness: float = 1.0) -> Tensor:
    """l [N] of knowledge [N] or [N, m] in at least float32; arguments as of `closed_form_discriminator`."""
    if not isinstance(k, Tensor) or not k.is_floating_point():
        raise TypeError(f"k must be a floating-point tensor, not {k.dtype if isinstance(k, Tensor) else type(k)}")
    if k.dim() not in (1, 2):
        raise ValueError(f"k must be [N] or [N, m], not {list(k.shape)}")
    rows = k if k.dim() == 2 else k[:, None]
    rows = rows.to(torch.promote_types(k.dtype, torch.float32))
    target = torch.as_tensor(k_star, dtype=rows.dtype, device=rows.device)
    if target.dim() > 1 or (target.dim() == 1 and len(target) != rows.shape[1]):
        raise ValueError(f"k_star must be a number or [{rows.shape[1]}], not {list(target.shape)}")
    if penalty == "squared":
        return 0.5 * (rows - target).square().sum(1)
    if penalty == "push":
        if not sharpness > 0:
            raise ValueError(f"sharpness must be > 0, not {sharpness}")
        return torch.nn.functional.softplus(sharpness * (target - rows)).mean(1)
    raise ValueError(f'penalty must be "squared" or "push", not {penalty!r}')


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights [..., N] >= 0, in 1..N: how many equal samples are worth as much.

    Raises:
        ValueError: no weights.
    """
    if weights.dim() == 0 or weights.shape[-1] == 0:
        raise ValueError(f"weights must be [..., N] with N > 0, not {list(weights.shape)}")
    wide = weights.double()
    return wide.sum(-1).square() / wide.square().sum(-1)


# ------------------------------------------------------------------------------------------------ operator rules


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    penalty, ctx.eta, ctx.game = inputs
    D, w, c = output
    ctx.save_for_backward(penalty, D, w, c)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, of_discriminator: Tensor | None, of_weight: Tensor | None, of_c: Tensor | None
) -> tuple[Tensor | None, None, None]:
    """dw = v (dc - eta dl) with v = w (1 + w) in the JS game, w in the KL game, and mean dw = 0.

    Where s is held at its bound, c follows the least penalty instead.
    """
    penalty, D, w, c = ctx.saved_tensors
    v = (w * (1 + w) if ctx.game == "js" else w).double()
    upstream = torch.zeros_like(v)
    if of_weight is not None:
        upstream = upstream + of_weight
    if of_discriminator is not None:
        upstream = upstream - of_discriminator * D.double().square()
    total = (upstream * v).sum() + (0 if of_c is None else of_c[0])
    share = v / v.sum()
    if ctx.game == "js":
        lowest = penalty.amin()
        held = c >= ctx.eta * lowest.double() + math.log(reference.LARGEST_SHARE) * (1 + 1e-9)
        least = (penalty == lowest).double()
        share = torch.where(held, least / least.sum(), share)
    return (ctx.eta * (total * share - upstream * v)).to(penalty.dtype), None, None


def _like(penalty: Tensor, eta: float, game: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(penalty), torch.empty_like(penalty), penalty.new_empty(1, dtype=torch.float64)


def _on_cuda(penalty: Tensor, eta: float, game: str) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from neuraldeps_kernels.triton import closed_form_discriminator as kernels
    except ImportError as error:
        _log.debug("closed_form_discriminator runs on the plain PyTorch reference: %s", error)
        return reference.closed_form_discriminator(penalty, eta, game)
    return kernels.closed_form_discriminator(penalty.contiguous(), eta, game)


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object
_library.impl("closed_form_discriminator", _on_cuda, "CUDA")
torch.library.register_fake("neuraldeps::closed_form_discriminator", _like)
torch.library.register_autograd("neuraldeps::closed_form_discriminator", _backward, setup_context=_setup)
