"""Three numerical tools for the rank of a network at a layer k: F_k is the network up to there, D its features.

- `jacobian_grams`: J' J of the Jacobian of F_k with respect to P input coordinates, by forward mode.
- `perturbed_covariances`: covariance of F_k around an input under small noise; over the noise's variance it tends to
  J J' as the noise vanishes.
- `classification_dimension`: how many principal components of the features before the head classify as all do.

The first two hold a block of columns [P or N, w] at a time and run the network again for the next block, up to the last
layer that the block needs; nothing of size N x D is stored.

Source: sections 3 to 5 and 8 of the notes on "Rank Diminishing in Deep Neural Networks" (arXiv 2206.06072). Forward
mode, the blocks and the reference subtracted before the Gram matrix are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from neuraldeps_kernels.analysis.network_layers import Layer, visit_layers
from neuraldeps_kernels.ops.covariance import covariance

EPS32 = 2.0**-23
_COLUMNS = 4096  # of a block turned into float64 at once
_SAMPLES = 512  # whose logits stay in cache while components are added

Advance = Callable[[int], None]  # is told how many tangents or perturbations have run


# ------------------------------------------------------------------------------------------------ blocks of columns


@dataclass(frozen=True)
class Piece:
    """Features start..stop of a layer."""

    layer: int
    start: int
    stop: int


def passes(widths: Sequence[int], rows: int, memory: int, itemsize: int = 4) -> list[list[Piece]]:
    """Cuts the features of all layers into passes of at most `memory` bytes for `rows` rows each.

    A layer of at most `rows` features is not cut: its D x D matrix, the smaller one, needs all of them.
    """
    room = max(1, memory // (rows * itemsize))
    plan: list[list[Piece]] = [[]]
    used = 0
    for layer, width in enumerate(widths):
        start = 0
        while start < width:
            if used and (used >= room or (width <= rows and used + width > room)):
                plan.append([])
                used = 0
            stop = width if width <= rows else min(width, start + room - used)
            plan[-1].append(Piece(layer, start, stop))
            used += stop - start
            start = stop
    return plan


def gram(X: Tensor) -> Tensor:
    """X X' [R, R] in float64, of X [R, w] in any precision, by columns in float64."""
    G = torch.zeros(len(X), len(X), dtype=torch.float64, device=X.device)
    for part in X.split(_COLUMNS, dim=1):
        wide = part.double()
        G.addmm_(wide, wide.mT)
    return G


# ------------------------------------------------------------------------------------------------ tool 1


def canvas_input(x: Tensor, coordinates: Tensor, canvas: str) -> Tensor:
    """x [1, ...] itself with canvas "image", or zero but at `coordinates` [P] with canvas "zero"."""
    if canvas == "image":
        return x
    flat = x.flatten()
    return torch.zeros_like(flat).index_copy(0, coordinates, flat[coordinates]).view_as(x)


def jacobian_grams(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[Layer],
    coordinates: Tensor,
    *,
    chunk: int = 32,
    memory: int = 1 << 30,
    advance: Advance = lambda _: None,
) -> list[Tensor]:
    """J' J [P, P] float64 of every layer at x, J [D, P] the Jacobian with respect to the coordinates.

    Args:
        model: in the context of `measuring`.
        x: [1, ...], the point of evaluation.
        coordinates: int64 [P], indices into the flattened x.
        chunk: tangents pushed through the network at once.
        memory: bytes of the tangents held at once.
        advance: called with the number of tangents after each chunk.
    """
    P = len(coordinates)
    grams = [torch.zeros(P, P, dtype=torch.float64, device=x.device) for _ in layers]
    for pieces in passes([layer.width for layer in layers], P, memory, x.element_size()):
        blocks = [x.new_empty(P, piece.stop - piece.start) for piece in pieces]
        for start in range(0, P, chunk):
            stop = min(P, start + chunk)
            parts = _tangents(model, x, [layers[piece.layer] for piece in pieces], pieces, coordinates[start:stop])
            for block, part in zip(blocks, parts, strict=True):
                block[start:stop] = part
            advance(stop - start)
        for piece, block in zip(pieces, blocks, strict=True):
            grams[piece.layer] += gram(block)
    return grams


def _tangents(
    model: nn.Module, x: Tensor, layers: Sequence[Layer], pieces: Sequence[Piece], coordinates: Tensor
) -> tuple[Tensor, ...]:
    """Columns of the Jacobian as rows: one [c, w] a piece for c coordinates."""
    basis = x.new_zeros(len(coordinates), x.numel())
    basis[torch.arange(len(coordinates), device=x.device), coordinates] = 1

    def features(value: Tensor) -> tuple[Tensor, ...]:
        parts: dict[int, Tensor] = {}

        def keep(index: int, output: Tensor) -> None:
            # A copy: a layer that follows may write over its input.
            parts[index] = output.flatten()[pieces[index].start : pieces[index].stop].clone()

        visit_layers(model, value, layers, keep)
        return tuple(parts[index] for index in range(len(pieces)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        push = vmap(lambda tangent: jvp(features, (x,), (tangent,))[1])
        return push(basis.view(-1, *x.shape))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ tool 2


class PerturbationGram:
    """Covariance among N perturbations of features that arrive by columns, with the reference already subtracted.

    C = H (sum over columns of X X') H / N, H = I - 11'/N, so that rows and columns of C sum to 0. Subtracting the
    reference first is what keeps C accurate: of features as they are, X X' would be the square of their mean.
    """

    def __init__(self, perturbations: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(perturbations, perturbations, dtype=torch.float64, device=device)

    def update(self, X: Tensor) -> None:
        """Adds columns X [N, w] of F(x + d g) - F(x)."""
        self._sum += gram(X)

    def covariance(self) -> Tensor:
        """C [N, N] float64."""
        C = self._sum - self._sum.mean(0, keepdim=True)
        C -= C.mean(1, keepdim=True)
        return C / len(C)


def perturbed_covariances(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[Layer],
    *,
    perturbations: int = 5000,
    noise: float = 1e-3,
    coordinates: Tensor | None = None,
    seed: int = 0,
    batch: int = 128,
    memory: int = 1 << 30,
    advance: Advance = lambda _: None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of a layer, C float64) in the order of the layers: the covariance of (F_k(x + d g) - F_k(x)) / d.

    C is [D, D] where D <= N, else the Gram matrix [N, N] among the perturbations, which has the same nonzero
    eigenvalues.

    Args:
        model: in the context of `measuring`.
        x: [1, ...], the point of evaluation.
        perturbations: N.
        noise: d, standard deviation of the noise.
        coordinates: int64 [P], indices into the flattened x that the noise is on; default all.
        seed: of the noise, which is the same in every pass.
        batch: perturbations in a forward pass.
        memory: bytes of the features held at once.
        advance: called with the number of perturbations after each forward pass.
    """
    N = perturbations
    noisy = torch.full_like(x[0], noise)
    if coordinates is not None:
        noisy = torch.zeros_like(noisy).flatten().index_fill(0, coordinates, noise).view_as(noisy)
    reference = _flat_features(model, x, layers)
    open_grams: dict[int, PerturbationGram] = {}
    for pieces in passes([layer.width for layer in layers], N, memory, x.element_size()):
        wanted = [layers[piece.layer] for piece in pieces]
        blocks = [x.new_empty(N, piece.stop - piece.start) for piece in pieces]
        generator = torch.Generator("cpu").manual_seed(seed)
        for start in range(0, N, batch):
            stop = min(N, start + batch)
            # Drawn one by one, as randn of several depends on how many.
            draws = [
                torch.randn(x.shape[1:], generator=generator, dtype=x.dtype, device="cpu") for _ in range(start, stop)
            ]

            def subtract(index: int, output: Tensor, start: int = start, stop: int = stop) -> None:
                piece = pieces[index]  # noqa: B023  called before the next pass
                part = output.flatten(1)[:, piece.start : piece.stop]
                offset = reference[piece.layer][:, piece.start : piece.stop]
                torch.sub(part, offset, out=blocks[index][start:stop])  # noqa: B023

            visit_layers(model, x + noisy * torch.stack(draws).to(x.device), wanted, subtract)
            advance(stop - start)
        for piece, block in zip(pieces, blocks, strict=True):
            block /= noise
            if layers[piece.layer].width <= N:
                X = block.double()
                X -= X.mean(0)
                yield piece.layer, X.mT @ X / N
                continue
            open_grams.setdefault(piece.layer, PerturbationGram(N, x.device)).update(block)
            if piece.stop == layers[piece.layer].width:
                yield piece.layer, open_grams.pop(piece.layer).covariance()


def _flat_features(model: nn.Module, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """F_k(x) [1, D] of every layer."""
    features: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> None:
        features[index] = output.flatten(1).clone()

    visit_layers(model, x, layers, keep)
    return [features[index] for index in range(len(layers))]


# ------------------------------------------------------------------------------------------------ tool 3


@dataclass(frozen=True, eq=False)
class ClassificationDimension:
    """How many principal components of the features before the head keep `share` of the accuracy."""

    dimension: int  # smallest number that does, found from below; d + 1 never occurs, as all components do
    accuracy: Tensor  # float64 [d + 1], with the first k components
    original: float  # accuracy of the network
    share: float
    samples: int
    true_labels: bool  # or the network's own argmax

    @property
    def width(self) -> int:
        """d, the number of features."""
        return len(self.accuracy) - 1


def classification_dimension(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    share: float = 0.95,
    project_centered: bool = False,
) -> ClassificationDimension:
    """Smallest k at which features on their first k principal components keep `share` of the accuracy.

    With v_k the eigenvectors of the centred covariance, by falling eigenvalue, logits of E V_k V_k' grow by
    (E v_k)(W v_k)' with each k, from the bias: one rank-1 update and an argmax a component. The accuracy need not be
    monotone in k, so all k are evaluated and the first that suffices is reported.

    Args:
        features: E [N, d] before the head, N >= 2.
        weight, bias: W [n, d] and b [n] of the head.
        labels: int64 [N]; default: the argmax of the head on E, so that the accuracy is agreement.
        share: of the original accuracy.
        project_centered: project E minus its mean and add the mean back; the default projects E itself, as the
            authors' code does.

    Raises:
        ValueError: shapes that do not fit; `share` outside of (0, 1].
    """
    N, d = _checked_head(features, weight, bias, labels)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    E, W = features.double(), weight.double()
    b = W.new_zeros(len(W)) if bias is None else bias.double()
    V = torch.linalg.eigh(covariance(features, correction=0)).eigenvectors.flip(1)  # [d, d], by falling eigenvalue
    if project_centered:
        mean = E.mean(0)
        E, b = E - mean, b + W @ mean
    y = (E @ W.mT + b).argmax(1) if labels is None else labels.to(E.device)
    scores, directions = E @ V, (W @ V).mT.contiguous()  # [N, d], [d, n]
    hits = torch.zeros(d + 1, dtype=torch.int64, device=E.device)
    original = 0
    for rows in torch.arange(N, device=E.device).split(_SAMPLES):
        original += int(((E[rows] @ W.mT + b).argmax(1) == y[rows]).sum())
        logits = b.expand(len(rows), -1).clone()
        hits[0] += (logits.argmax(1) == y[rows]).sum()
        for k in range(d):
            logits.addr_(scores[rows, k], directions[k])
            hits[k + 1] += (logits.argmax(1) == y[rows]).sum()
    enough = hits.double() >= share * original
    enough[d] = True
    return ClassificationDimension(
        dimension=int(enough.int().argmax()),
        accuracy=hits.double().cpu() / N,
        original=original / N,
        share=share,
        samples=N,
        true_labels=labels is not None,
    )


def head_and_features(
    model: nn.Module, batches: Iterable[Tensor], head: str | nn.Module | None = None
) -> tuple[nn.Linear, Tensor]:
    """The linear layer that gives the network's output, and its inputs [N, d] over all batches.

    Args:
        model: in the context of `measuring`.
        head: the layer or its name; default: the `nn.Linear` whose output the network returns as it is.

    Raises:
        ValueError: no such layer, or its input is not [B, d].
        TypeError: `head` is no `nn.Linear`.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(head, str):
        given = dict(model.named_modules()).get(head)
        if given is None:
            raise ValueError(f"head must name a module of {type(model).__name__}, got {head!r}")
        head = given
    if head is not None and not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, not {type(head).__name__}")
    candidates = list(linears.values()) if head is None else [head]
    features: list[Tensor] = []
    for batch in batches:
        output, seen = _calls(model, batch, candidates)
        last = next(((m, e) for m, e, out in reversed(seen) if head is not None or out is output), None)
        if last is None:
            raise ValueError("head was not found: no nn.Linear gives the network's output as it is; give head")
        head, E = last
        candidates = [head]
        if E.dim() != 2:
            raise ValueError(f"head must take features [B, d], got {list(E.shape)}")
        features.append(E.clone())
    if head is None:
        raise ValueError("inputs must hold at least one batch to find the head")
    return head, torch.cat(features)


def _calls(
    model: nn.Module, batch: Tensor, linears: Sequence[nn.Linear]
) -> tuple[Tensor, list[tuple[nn.Linear, Tensor, Tensor]]]:
    """The network's output, and of every call of `linears` the module, its input and its output."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
    with ExitStack() as stack:
        for module in linears:
            hook = module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
            stack.callback(hook.remove)
        return model(batch), seen


def _checked_head(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None) -> tuple[int, int]:
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, d] with N >= 2, got {list(features.shape)}")
    if weight.dim() != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(f"weight must be [n, {features.shape[1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}")
    if labels is not None and labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be [{len(features)}], got {list(labels.shape)}")
    return features.shape[0], features.shape[1]
