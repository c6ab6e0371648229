"""Convolution with basis filters of each modality and coefficients that all modalities share.

    A [M, K, kh, kw]   basis filters (atoms) of modality m          c [Co, Ci, K]   coefficients of all modalities
    W^m[o, i] = sum_k c[o, i, k] A^m[k]                             y[n] = W^m * x[n] + b,   m = modality[n]

It has two forms, of equal result, of which "auto" takes the cheaper:

    dense      W^m, a product [Co Ci, K] x [K, kh kw], is convolved with x: the cost of a plain convolution
    two-step   z[n, i, k] = A^m[k] * x[n, i], then y[n, o] = sum_{i,k} c[o, i, k] z[n, i, k] + b: Ci K channels between

Samples between modalities have weights w [M] and the atoms sum_m w_m A^m; y is linear in them.

Source: inspired by MID (arXiv 2203.01735), whose abstract tells of bases by modality and shared coefficients, and by
the dictionaries of "A Dictionary Approach to Domain-Invariant Learning in Deep Networks" (arXiv 1909.11285).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.modules.utils import _pair

from neuraldeps_kernels.nn.domain_norm import UNSEEN, context, domain_context

Layer = TypeVar("Layer", bound=nn.Module)

FORMS = ("auto", "dense", "two-step")
NUM_BASIS = {3: 6, 7: 12}  # K by size of the kernel: our choice
_TWO_STEP_SHARE = 1 / 12  # of kh kw: up to this K the two-step form is faster forward and backward, as measured on CPU

_mixture: list[Tensor | None] = [None]  # innermost last


class modality_context:
    """`with modality_context(ids, mixture): model(x)`: modalities for decomposed convolutions and norms by domain.

    It is `domain_context(ids)` with the weights of samples between modalities.

    Args:
        modality: int64 [N], or one int for the whole batch: 0..M-1, M for mixed samples, -1 for unknown ones. Norms by
            domain take the same ids; the set M of M + 1 is then that of mixed samples.
        mixture: [N, M] weights, of which those of mixed samples count; None: equal weights.
    """

    def __init__(self, modality: Tensor | int, mixture: Tensor | None = None) -> None:
        self._domain, self.mixture = domain_context(modality), mixture

    def __enter__(self) -> None:
        self._domain.__enter__()
        _mixture.append(self.mixture)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mixture.pop()
        self._domain.__exit__(kind, error, trace)


class DecomposedConv2d(nn.Module):
    """See the head of the file.

    Args:
        in_channels, out_channels: Ci, Co.
        kernel_size, stride, padding, dilation, bias: as nn.Conv2d, with zeros as padding and without groups.
        num_modalities: M.
        num_basis: K, in 1..kh kw.
        form: "dense", "two-step" or "auto".

    All modalities start from the same orthonormal atoms; c is drawn so that W^m has the variance of He's rule.

    forward(x, modality=None, mixture=None):
        x: [N, Ci, H, W], floating.
        modality: int64 [N] in any order, or an int: 0..M-1; M for samples that `mixture` weighs; -1 for unknown ones,
            which get the mean of the atoms. None: those of `modality_context` or `domain_context`; without one, unknown
            in eval, while training raises ValueError unless M = 1.
        mixture: [N, M], real, of which the rows of samples of modality M count; None: that of `modality_context`, or
            equal weights.

        On CUDA and compiled, where the host would have to wait for ids [N], every sample passes all modalities with
        weights 0 and 1; on the CPU, and for an int, only its own.

    Raises:
        ValueError, TypeError: a size, shape, dtype or option does not fit; on the CPU also an id out of range
            (elsewhere such samples are NaN).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        num_modalities: int = 2,
        num_basis: int = 6,
        form: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kh, kw = _pair(kernel_size)
        if min(in_channels, out_channels, num_modalities) < 1:
            raise ValueError(
                "in_channels, out_channels and num_modalities must be positive, "
                f"not {in_channels}, {out_channels} and {num_modalities}"
            )
        if not 1 <= num_basis <= kh * kw:
            raise ValueError(f"num_basis must be in 1..{kh * kw}, the values of a {kh} x {kw} kernel, not {num_basis}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (kh, kw)
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.num_modalities, self.num_basis, self.form = num_modalities, num_basis, form
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.atoms = nn.Parameter(torch.empty(num_modalities, num_basis, kh, kw, **options))  # A
        self.coefficients = nn.Parameter(torch.empty(out_channels, in_channels, num_basis, **options))  # c
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **options)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal atoms, the same for all modalities; c normal with variance 2 / (Ci K); b = 0."""
        with torch.no_grad():
            basis = torch.empty_like(self.atoms[0].flatten(1), dtype=torch.float32)  # QR knows no 16-bit numbers
            nn.init.orthogonal_(basis)
            self.atoms.copy_(basis.view_as(self.atoms[0]).expand_as(self.atoms))
            nn.init.normal_(self.coefficients, std=(2 / (self.in_channels * self.num_basis)) ** 0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, num_modalities: int = 2, num_basis: int = 6, form: str = "auto"
    ) -> DecomposedConv2d:
        """The K-term decomposition nearest to the filters of `conv`, the same for all modalities; exact for K = kh kw.

        With W [Co Ci, kh kw] = U S V^T: A = V_K^T, c = W V_K.

        Raises:
            ValueError: `conv` has groups or pads with other than zeros, or by name.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"conv must have one group and a number of zeros as padding, not be {conv}")
        Co, Ci, kh, kw = conv.weight.shape
        layer = cls(
            Ci,
            Co,
            (kh, kw),
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.bias is not None,
            num_modalities=num_modalities,
            num_basis=num_basis,
            form=form,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        W = conv.weight.detach().double().flatten(2)  # [Co, Ci, kh kw]
        V = torch.linalg.eigh(torch.einsum("oip,oiq->pq", W, W)).eigenvectors.flip(1)[:, :num_basis]
        with torch.no_grad():
            layer.atoms.copy_(V.T.unflatten(1, (kh, kw)).expand_as(layer.atoms))
            layer.coefficients.copy_(W @ V)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def forward(self, x: Tensor, modality: Tensor | int | None = None, mixture: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, {self.in_channels}, H, W], not {list(x.shape)}")
        M = self.num_modalities
        modality = self._modality(modality)
        mixture = _mixture[-1] if mixture is None else mixture
        if isinstance(modality, int):
            if not UNSEEN <= modality <= M:
                raise ValueError(f"modality must be in {UNSEEN}..{M}, not {modality}")
            if 0 <= modality < M:
                return self._convolved(x[:, None], self.atoms[modality : modality + 1])
            if modality == UNSEEN or mixture is None:
                return self._convolved(x[:, None], self.atoms.mean(0, keepdim=True))
            return self._weighted(x, self._checked_mixture(mixture, x))
        self._check_ids(modality, x)
        weights = self._weights(modality, mixture, x)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._weighted(x, weights)
        return self._by_modality(x, modality, weights)

    def kernel(self, modality: int) -> Tensor:
        """W^m [Co, Ci, kh, kw] of a modality; -1: of the mean of the atoms."""
        if not UNSEEN <= modality < self.num_modalities:
            raise ValueError(f"modality must be in {UNSEEN}..{self.num_modalities - 1}, not {modality}")
        atoms = self.atoms.mean(0, keepdim=True) if modality == UNSEEN else self.atoms[modality : modality + 1]
        return self._kernels(atoms)[:, 0]

    def plain(self, modality: int) -> nn.Conv2d:
        """nn.Conv2d that does what this layer does for one modality (-1: unknown)."""
        kernel = self.kernel(modality).detach()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=kernel.device,
            dtype=kernel.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def orthogonality(self) -> Tensor:
        """sum_m |A^m A^m^T - I|_F^2 with A^m as [K, kh kw]: a number, 0 for orthonormal atoms."""
        A = self.atoms.flatten(2)
        return (A @ A.mT - torch.eye(self.num_basis, dtype=A.dtype, device=A.device)).square().sum()

    def leash(self) -> Tensor:
        """sum over pairs l < m of |A^l - A^m|_F^2: a number, 0 for equal atoms."""
        # The squared distances of M points to their mean add up to 1/M of those of their pairs.
        return self.num_modalities * (self.atoms - self.atoms.mean(0)).square().sum()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"num_modalities={self.num_modalities}, num_basis={self.num_basis}, form={self.form}"
        )

    # -------------------------------------------------------------------------------------------- arguments

    def _modality(self, modality: Tensor | int | None) -> Tensor | int:
        modality = context.domain if modality is None else modality
        if modality is not None:
            return modality
        if self.num_modalities == 1:
            return 0
        if self.training:
            raise ValueError("modality must be given in training: int64 [N], an int, or by modality_context")
        return UNSEEN

    def _check_ids(self, modality: Tensor, x: Tensor) -> None:
        if not isinstance(modality, Tensor):
            raise TypeError(f"modality must be an int64 tensor [N] or an int, not {type(modality).__name__}")
        if modality.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"modality must be int64 or int32, not {modality.dtype}")
        if modality.shape != x.shape[:1]:
            raise ValueError(f"modality must be [{x.shape[0]}], one id for each sample, not {list(modality.shape)}")
        if modality.device != x.device:
            raise ValueError(f"modality is on {modality.device}, but x is on {x.device}")
        if x.device.type == "cpu" and len(modality) and not torch.compiler.is_compiling():
            low, high = (int(end) for end in modality.aminmax())
            if low < UNSEEN or high > self.num_modalities:
                wrong = low if low < UNSEEN else high
                raise ValueError(f"modality must hold ids in {UNSEEN}..{self.num_modalities}, not {wrong}")

    def _checked_mixture(self, mixture: Tensor, x: Tensor) -> Tensor:
        """mixture [N, M] in the dtype of x."""
        if not isinstance(mixture, Tensor) or not mixture.is_floating_point():
            raise TypeError(f"mixture must be a floating-point tensor, not {getattr(mixture, 'dtype', type(mixture))}")
        if mixture.shape != (x.shape[0], self.num_modalities):
            raise ValueError(f"mixture must be [{x.shape[0]}, {self.num_modalities}], not {list(mixture.shape)}")
        if mixture.device != x.device:
            raise ValueError(f"mixture is on {mixture.device}, but x is on {x.device}")
        return mixture.to(x.dtype)

    def _weights(self, modality: Tensor, mixture: Tensor | None, x: Tensor) -> Tensor:
        """w [N, M]: 0 and 1 for pure samples, else those of the mixture or equal ones."""
        M = self.num_modalities
        pure = (modality[:, None] == torch.arange(M, device=x.device)).to(x.dtype)
        if mixture is not None:
            pure = torch.where((modality == M)[:, None], self._checked_mixture(mixture, x), pure)
        equal = (modality == UNSEEN) | (modality == M) if mixture is None else modality == UNSEEN
        weights = torch.where(equal[:, None], 1 / M, pure)
        return torch.where(((modality < UNSEEN) | (modality > M))[:, None], torch.nan, weights)

    # -------------------------------------------------------------------------------------------- arithmetic

    def _by_modality(self, x: Tensor, modality: Tensor, weights: Tensor) -> Tensor:
        """Each sample through the atoms of its own modality, mixed and unknown ones through all."""
        order = modality.argsort(stable=True)
        is_sorted = bool((modality[1:] >= modality[:-1]).all())
        if not is_sorted:
            x, weights = x[order], weights[order]
        counts = torch.bincount(modality + 1, minlength=self.num_modalities + 2).tolist()  # of ids -1..M
        parts, first = [], 0
        for m, count in enumerate(counts, UNSEEN):
            rows = slice(first, first + count)
            if count and 0 <= m < self.num_modalities:
                parts.append(self._convolved(x[rows, None], self.atoms[m : m + 1]))
            elif count:
                parts.append(self._weighted(x[rows], weights[rows]))
            first += count
        if not parts:
            return self._convolved(x[:, None], self.atoms[:1])
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y if is_sorted else y[order.argsort()]

    def _weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        """y of samples with weights [N, M]: one convolution over M Ci channels."""
        return self._convolved(weights[:, :, None, None, None] * x[:, None], self.atoms)

    def _convolved(self, x: Tensor, atoms: Tensor) -> Tensor:
        """sum_m W^m * x[:, m] + b of x [N, M, Ci, H, W], atoms [M, K, kh, kw]."""
        geometry = (self.stride, self.padding, self.dilation)
        if not self._in_two_steps():
            return conv2d(x.flatten(1, 2), self._kernels(atoms).flatten(1, 2), self.bias, *geometry)
        z = conv2d(x.transpose(1, 2).flatten(0, 1), atoms.transpose(0, 1), None, *geometry)  # [N Ci, K, Ho, Wo]
        z = z.unflatten(0, (len(x), self.in_channels)).flatten(1, 2)
        return conv2d(z, self.coefficients.flatten(1)[:, :, None, None], self.bias)

    def _kernels(self, atoms: Tensor) -> Tensor:
        """W [Co, M, Ci, kh, kw] of atoms [M, K, kh, kw]; not in the reduced precision of autocast."""
        with torch.autocast(atoms.device.type, enabled=False):
            return torch.einsum("oik,mkhw->omihw", self.coefficients, atoms)

    def _in_two_steps(self) -> bool:
        kh, kw = self.kernel_size
        return self.form == "two-step" or (self.form == "auto" and self.num_basis <= _TWO_STEP_SHARE * kh * kw)


def decompose_convolutions(
    model: Layer, num_modalities: int = 2, num_basis: int | Mapping[int, int] = NUM_BASIS, *, form: str = "auto"
) -> Layer:
    """Replaces every nn.Conv2d of more than 1 x 1 by the nearest DecomposedConv2d, in place.

    Args:
        model: its convolutions must have one group; those inside are replaced, not `model` itself.
        num_modalities: M.
        num_basis: K, or K by height of the kernel; at most kh kw are taken.

    Raises:
        ValueError: a convolution has groups, or `num_basis` names no K for its kernel.
    """
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, conv in parent._modules.items():  # unlike named_children, every time that one occurs
            if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1:
                continue
            if conv not in made:
                made[conv] = _decomposed(conv, num_modalities, num_basis, form)
            setattr(parent, name, made[conv])
    return model


def _decomposed(
    conv: nn.Conv2d, num_modalities: int, num_basis: int | Mapping[int, int], form: str
) -> DecomposedConv2d:
    kh, kw = conv.kernel_size
    K = num_basis if isinstance(num_basis, int) else num_basis.get(kh)
    if K is None:
        raise ValueError(f"num_basis must name K for kernels of height {kh}, not only {num_basis}")
    return DecomposedConv2d.from_dense(conv, num_modalities=num_modalities, num_basis=min(K, kh * kw), form=form)
