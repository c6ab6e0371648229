"""How the rank of a network falls from layer to layer, measured by three tools (analysis/rank_tools.py).

Exact ranks cannot rise along a chain of layers: `J_{F_k} = J_{f_k} J_{F_{k-1}}`. Numerical ranks count singular values
above a fraction of the largest one, which changes from layer to layer, so that they may; a profile says where.

Inspired by "Rank Diminishing in Deep Neural Networks" (arXiv 2206.06072); rules and defaults are those of the
authors' code where nothing else is said.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from neuraldeps_kernels.analysis.formatting import json_text, without_nan, written
from neuraldeps_kernels.analysis.network_layers import Layer, find_layers, measuring
from neuraldeps_kernels.analysis.rank_tools import (
    EPS32,
    ClassificationDimension,
    canvas_input,
    classification_dimension,
    head_and_features,
    jacobian_grams,
    passes,
    perturbed_covariances,
)
from neuraldeps_kernels.ops.spectrum import matrix_rank, svdvals
from neuraldeps_kernels.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ClassificationDimension",
    "JacobianRanks",
    "Layer",
    "PcaDimensions",
    "RankProfile",
    "Rise",
    "classification_dimension",
    "rank_profile",
]

MEASURES = ("jacobian", "pca", "classification")
COUNTS = ("jacobian", "jacobian_default", "pca")  # ranks with a threshold
CANVASES = ("zero", "image")
PERTURBED = ("all", "patch")
_HEAD_BATCH = 32  # inputs a forward pass when the features before the head are collected


@dataclass(frozen=True, eq=False)
class JacobianRanks:
    """Partial Jacobian ranks of I inputs at L layers, with respect to P input coordinates. -1 where J is not finite."""

    rank: Tensor  # int64 [I, L]: sigma_i > sqrt(P eps32) sigma_1, the authors' rule
    rank_default: Tensor  # int64 [I, L]: sigma_i > max(D, P) eps32 sigma_1, the rule of `matrix_rank` for float32 J
    stable_rank: Tensor  # float64 [I, L]: sum of (sigma_i / sigma_1)^2
    effective_rank: Tensor  # float64 [I, L]: exp of the entropy of sigma_i / sum of sigma
    singular_values: Tensor  # float64 [I, L, P], descending
    coordinates: int  # P
    canvas: str

    @property
    def cut(self) -> float:
        """Threshold of `rank` relative to sigma_1."""
        return float((self.coordinates * EPS32) ** 0.5)


@dataclass(frozen=True, eq=False)
class PcaDimensions:
    """Principal components of L layers' features around I inputs under noise. -1 where features are not finite."""

    rank: Tensor  # int64 [I, L]: eigenvalues above tol min(N, D) eps32 of the largest
    perturbations: int  # N; N - 1 is the largest rank that can be seen
    coordinates: int | None  # of the input that the noise is on, if not on all
    noise: float  # its standard deviation, in units of the input
    tol: float


@dataclass(frozen=True)
class Rise:
    """A layer whose mean numerical rank is above that of the layer before it."""

    measure: str
    before: str
    layer: str
    amount: float
    error: float  # its standard error over inputs, each compared with itself; NaN for a single input


@dataclass(frozen=True, eq=False)
class RankProfile:
    """Ranks by layer, in the order of evaluation; a measure that was not asked for is None."""

    network: str
    layers: tuple[Layer, ...]  # [L]; empty if only the classification dimension was asked for
    jacobian: JacobianRanks | None
    pca: PcaDimensions | None
    classification: ClassificationDimension | None
    precision: str = "float32"  # of the forward pass

    def mean_ranks(self) -> dict[str, Tensor]:
        """Mean over inputs of every rank by layer, float64 [L].

        Keys: jacobian, jacobian_default, jacobian_stable, jacobian_effective, pca; those that were measured.
        """
        return {name: ranks.double().mean(0) for name, ranks in self._ranks().items()}

    def standard_errors(self) -> dict[str, Tensor]:
        """Of `mean_ranks` over inputs, float64 [L]; NaN for a single input."""
        return {name: _standard_error(ranks.double()) for name, ranks in self._ranks().items()}

    def rises(self) -> tuple[Rise, ...]:
        """Where a mean count rises from one layer to the next, by measure and layer."""
        found = []
        for name, ranks in self._ranks().items():
            if name in COUNTS:
                steps = ranks.double().diff(dim=1)
                mean, error = steps.mean(0), _standard_error(steps)
                for k in (mean > 0).nonzero()[:, 0].tolist():
                    before, layer = self.layers[k].name, self.layers[k + 1].name
                    found.append(Rise(name, before, layer, float(mean[k]), float(error[k])))
        return tuple(found)

    def describe(self) -> str:
        """One sentence: what was measured, on how much."""
        parts = []
        if self.jacobian is not None:
            j = self.jacobian
            parts.append(f"Jacobian in {j.coordinates} input coordinates at {_number(len(j.rank))}, canvas {j.canvas}")
        if self.pca is not None:
            p = self.pca
            where = "" if p.coordinates is None else f" of {p.coordinates} coordinates"
            parts.append(f"PCA of {p.perturbations} perturbations{where} of size {p.noise:g} at {_number(len(p.rank))}")
        if self.classification is not None:
            parts.append(f"classification dimension on {_number(self.classification.samples)}")
        return f"{self.network}, eval mode, full {self.precision} (no TF32): {'; '.join(parts)}"

    def cautions(self) -> list[str]:
        """What a reader of the numbers must know."""
        found = []
        for name in COUNTS:
            rises = [rise for rise in self.rises() if rise.measure == name]
            if rises:
                worst = max(rises, key=lambda rise: rise.amount)
                error = "" if math.isnan(worst.error) else f" ± {worst.error:.2g}"
                found.append(
                    f"{name}: the numerical rank rises at {len(rises)} of {len(self.layers) - 1} layers, most at "
                    f"{worst.layer} (+{worst.amount:.3g}{error}); the exact rank cannot along a chain, but the "
                    "threshold moves with the largest singular value"
                )
        if self.jacobian is not None:
            full = int((self.jacobian.rank == self.jacobian.coordinates).all(0).sum())
            if full:
                found.append(
                    f"jacobian: {full} layers keep all {self.jacobian.coordinates} coordinates above the cut; the "
                    "stable and effective ranks tell them apart"
                )
        if self.pca is not None:
            limit = self.pca.perturbations - 1
            full = sum(bool((ranks >= limit).any()) for ranks in self.pca.rank.T)
            if full:
                found.append(
                    f"pca: {full} layers reach {limit}, the largest that {limit + 1} perturbations can show; give "
                    "more, or perturb a patch"
                )
        if any(bool((ranks < 0).any()) for ranks in self._ranks().values()):
            found.append("a rank of -1 stands for features that are not finite")
        if self.classification is not None:
            c = self.classification
            if not c.true_labels:
                found.append("classification: accuracy is agreement with the network's own argmax, without labels")
            if c.samples <= c.width:
                found.append(f"classification: {c.samples} samples span {c.samples - 1} of {c.width} components")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the singular values, as JSON-able values; NaN becomes None."""
        means, errors = self.mean_ranks(), self.standard_errors()
        rows = [
            {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "features": layer.width}
            | {name: float(mean[k]) for name, mean in means.items()}
            | {f"{name}_error": float(error[k]) for name, error in errors.items()}
            | {f"{name}_of_inputs": ranks[:, k].tolist() for name, ranks in self._ranks().items()}
            for k, layer in enumerate(self.layers)
        ]
        content = {
            "what": self.describe(),
            "cautions": self.cautions(),
            "network": self.network,
            "precision": self.precision,
            "settings": self.settings(),
            "layers": rows,
            "rises": [asdict(rise) for rise in self.rises()],
            "classification": None if self.classification is None else _classification_dict(self.classification),
        }
        return without_nan(content)  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """How the ranks were measured, as JSON-able values."""
        settings: dict[str, Any] = {}
        if self.jacobian is not None:
            j = self.jacobian
            settings["jacobian"] = {
                "inputs": len(j.rank),
                "coordinates": j.coordinates,
                "canvas": j.canvas,
                "relative_cut": j.cut,
            }
        if self.pca is not None:
            p = self.pca
            settings["pca"] = {
                "inputs": len(p.rank),
                "perturbations": p.perturbations,
                "coordinates": p.coordinates,
                "noise": p.noise,
                "tol": p.tol,
            }
        return settings

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if given."""
        return written(json_text(self.to_dict()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a layer with means and standard errors over inputs, as CSV text, also written to `path` if given."""
        means, errors = self.mean_ranks(), self.standard_errors()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [column for name in means for column in (name, f"{name}_error")]
        writer.writerow(("layer", "kind", "features", *columns))
        for k, layer in enumerate(self.layers):
            values = [float(values[name][k]) for name in means for values in (means, errors)]
            cells = ["" if value != value else f"{value:.6g}" for value in values]
            writer.writerow((layer.name, layer.kind, layer.width, *cells))
        return written(text.getvalue(), path)

    def table(self) -> Table:
        """A rich table: a row a layer, means over inputs, of the counts ± their standard errors."""
        from rich.table import Table

        style: dict[str, Any] = {"title_justify": "left", "title_style": "", "caption_justify": "left"}
        table = Table(title=self.describe(), min_width=None if self.layers else 76, **style)
        table.add_column("layer", no_wrap=True)
        names = {"jacobian": "J rank", "jacobian_default": "default", "jacobian_stable": "stable"}
        names |= {"jacobian_effective": "entropy", "pca": "PCA dim."}
        means, errors = self.mean_ranks(), self.standard_errors()
        for column in ("features", *(names[name] for name in means)):
            table.add_column(column, justify="right", no_wrap=True)
        for k, layer in enumerate(self.layers):
            cells = [
                _mean_cell(means[name][k], errors[name][k] if name in ("jacobian", "pca") else None) for name in means
            ]
            table.add_row(layer.name, f"{layer.width:,}", *cells)
        table.caption = self._caption()
        return table

    def plot(self, path: str | Path) -> Path:
        """Writes ranks by depth, the decay of the singular values and the accuracy by dimension as one PNG.

        Needs matplotlib. Returns the path.
        """
        from neuraldeps_kernels.analysis import rank_plots

        rank_plots.profile(self).savefig(path, dpi=rank_plots.DPI)
        return Path(path)

    def _ranks(self) -> dict[str, Tensor]:
        """Each [I, L]."""
        ranks: dict[str, Tensor] = {}
        if self.jacobian is not None:
            ranks |= {
                "jacobian": self.jacobian.rank,
                "jacobian_default": self.jacobian.rank_default,
                "jacobian_stable": self.jacobian.stable_rank,
                "jacobian_effective": self.jacobian.effective_rank,
            }
        if self.pca is not None:
            ranks["pca"] = self.pca.rank
        return ranks

    def _caption(self) -> str:
        parts = []
        if self.jacobian is not None:
            parts.append(
                f"J rank: singular values above {self.jacobian.cut:.3g} of the largest; default: above "
                "max(features, coordinates) 2^-23 of it; stable, entropy: ranks without a threshold."
            )
        if self.pca is not None:
            parts.append(f"PCA dim.: eigenvalues above {self.pca.tol:g} min(N, features) 2^-23 of the largest.")
        if self.classification is not None:
            c = self.classification
            parts.append(
                f"Classification dimension: {c.dimension} of {c.width} features keep {c.share:.0%} of the accuracy "
                f"{c.original:.3f}{'' if c.true_labels else ' (agreement with the own argmax)'}."
            )
        return " ".join(parts)


def rank_profile(
    model: nn.Module,
    inputs: Tensor,
    layers: Sequence[str] | None = None,
    measures: Sequence[str] = MEASURES,
    *,
    labels: Tensor | None = None,
    patch: int | Tensor | None = None,
    canvas: str = "zero",
    jacobian_inputs: int = 10,
    pca_inputs: int = 100,
    perturbations: int = 5000,
    perturb: str = "all",
    noise: float = 1e-3,
    tol: float = 1.0,
    head: str | nn.Module | None = None,
    share: float = 0.95,
    project_centered: bool = False,
    chunk: int = 32,
    batch: int = 128,
    memory: int = 1 << 30,
    seed: int = 0,
    network: str | None = None,
) -> RankProfile:
    """Measures how the rank of a network falls with depth.

    The network is run in eval mode and full float32 (or float64); TF32 is turned off meanwhile. Modes and settings are
    restored at the end.

    Args:
        model: any network of one tensor; float32 or float64 all through.
        inputs: [N, ...] on the device of the model, already normalised as it expects.
        layers: names of modules (`named_modules`), or "output"; default: the children of the network, entries of lists
            in place of the lists. Ranks can only be expected to fall along layers of which each is a function of the
            one before: a residual block is one layer, what is inside of its skip connection is none.
        measures: of "jacobian", "pca" and "classification".
        labels: int64 [N] for the classification dimension; default the network's own argmax.
        patch: coordinates P that the Jacobian is taken in: the side of the central square for images [C, H, W]
            (default 16, or the largest that fits), or a bool mask of the shape of an input; default else all
            coordinates.
        canvas: "zero": the Jacobian is evaluated at the patch alone, other coordinates zero; "image": at the input.
        jacobian_inputs, pca_inputs: how many of the inputs, from the first on, those two measures take.
        perturbations: N of the PCA, at least 2.
        perturb: "all": noise on all coordinates of the input, where many perturbations are needed before their number
            is no limit; "patch": on the patch alone, at the same point as the Jacobian, whose rank it then estimates.
        noise: standard deviation of the perturbations.
        tol: threshold of the PCA in units of min(N, D) 2^-23 of the largest eigenvalue.
        head: the last `nn.Linear`, or its name; default: the one whose output the network returns.
        share: of the accuracy that the classification dimension keeps.
        project_centered: as in `classification_dimension`.
        chunk: tangents pushed through the network at once.
        batch: perturbations in a forward pass.
        memory: bytes of tangents or features held at once, besides one N x N matrix and what the network itself needs;
            the less, the more often the network is run again.
        seed: of the perturbations.
        network: its name in the report; default the class of `model`.

    Raises:
        ValueError, TypeError: naming the argument; autocast or reduced precision in the network; layers that do not run
            exactly once.
    """
    _check_options(
        inputs, measures, canvas, perturb, jacobian_inputs, pca_inputs, perturbations, noise, tol, chunk, batch
    )
    jacobian = pca = classification = None
    found: tuple[Layer, ...] = ()
    with measuring(model, inputs):
        if "jacobian" in measures or "pca" in measures:
            found = find_layers(model, inputs[:1], layers)
        coordinates = patch_coordinates(inputs.shape[1:], patch).to(inputs.device)
        if "jacobian" in measures:
            points = [canvas_input(x[None], coordinates, canvas) for x in inputs[:jacobian_inputs]]
            jacobian = _jacobian_ranks(model, points, found, coordinates, canvas, chunk, memory)
        if "pca" in measures:
            points = list(inputs[:pca_inputs, None])
            noisy = coordinates if perturb == "patch" else None
            if noisy is not None:
                points = [canvas_input(x, noisy, canvas) for x in points]
            pca = _pca_dimensions(model, points, found, noisy, perturbations, noise, tol, batch, memory, seed)
        if "classification" in measures:
            linear, features = head_and_features(model, inputs.split(_HEAD_BATCH), head)
            classification = classification_dimension(
                features, linear.weight, linear.bias, labels, share=share, project_centered=project_centered
            )
    name = type(model).__name__ if network is None else network
    precision = str(inputs.dtype).removeprefix("torch.")
    return RankProfile(name, found, jacobian, pca, classification, precision)


def patch_coordinates(shape: Sequence[int], patch: int | Tensor | None) -> Tensor:
    """int64 [P]: indices into a flattened input of `shape` of what `patch` of `rank_profile` stands for."""
    index = torch.arange(int(torch.Size(shape).numel()), device="cpu").view(*shape)
    if isinstance(patch, Tensor):
        if patch.dtype != torch.bool or patch.shape != index.shape or not patch.any():
            raise ValueError(f"patch must be a bool mask {list(shape)} with a coordinate, got {list(patch.shape)}")
        return index[patch.cpu()]
    if len(shape) != 3:
        if patch is not None:
            raise ValueError(f"patch must be None or a mask where inputs are {list(shape)}, not images; got {patch}")
        return index.flatten()
    side = min(16, *shape[1:]) if patch is None else patch
    if not 1 <= side <= min(shape[1:]):
        raise ValueError(f"patch must be between 1 and {min(shape[1:])}, got {patch}")
    top, left = (shape[1] - side) // 2, (shape[2] - side) // 2
    return index[:, top : top + side, left : left + side].flatten()


def _jacobian_ranks(
    model: nn.Module,
    points: Sequence[Tensor],
    layers: Sequence[Layer],
    coordinates: Tensor,
    canvas: str,
    chunk: int,
    memory: int,
) -> JacobianRanks:
    P, L = len(coordinates), len(layers)
    rank = torch.zeros(len(points), L, 2, dtype=torch.int64, device="cpu")
    sigma = torch.zeros(len(points), L, P, dtype=torch.float64, device="cpu")
    runs = len(passes([layer.width for layer in layers], P, memory, points[0].element_size()))
    with progress_bar() as bar:
        task = bar.add_task("Jacobian, tangents", total=P * runs * len(points))
        for i, x in enumerate(points):
            options: dict[str, Any] = {"chunk": chunk, "memory": memory, "advance": _advance(bar, task)}
            for k, G in enumerate(jacobian_grams(model, x, layers, coordinates, **options)):
                cuts = (
                    torch.tensor([P, (max(layers[k].width, P)) ** 2 * EPS32], dtype=torch.float64, device="cpu") * EPS32
                )
                rank[i, k] = matrix_rank(G, rtol=cuts, hermitian=True)
                sigma[i, k] = svdvals(G).sqrt()
    largest = sigma[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    zero = sigma[..., 0] == 0
    return JacobianRanks(
        rank=rank[..., 0],
        rank_default=rank[..., 1],
        stable_rank=(sigma / largest).square().sum(-1),
        effective_rank=torch.where(zero, 0.0, torch.special.entr(share).sum(-1).exp()),
        singular_values=sigma,
        coordinates=P,
        canvas=canvas,
    )


def _pca_dimensions(
    model: nn.Module,
    points: Sequence[Tensor],
    layers: Sequence[Layer],
    coordinates: Tensor | None,
    perturbations: int,
    noise: float,
    tol: float,
    batch: int,
    memory: int,
    seed: int,
) -> PcaDimensions:
    rank = torch.zeros(len(points), len(layers), dtype=torch.int64, device="cpu")
    runs = len(passes([layer.width for layer in layers], perturbations, memory, points[0].element_size()))
    with progress_bar() as bar:
        task = bar.add_task("PCA, perturbations", total=perturbations * runs * len(points))
        for i, x in enumerate(points):
            covariances = perturbed_covariances(
                model,
                x,
                layers,
                perturbations=perturbations,
                noise=noise,
                coordinates=coordinates,
                seed=seed * 1_000_003 + i,
                batch=batch,
                memory=memory,
                advance=_advance(bar, task),
            )
            for k, C in covariances:
                cut = torch.tensor(tol * min(perturbations, layers[k].width) * EPS32, device="cpu")
                rank[i, k] = matrix_rank(C, rtol=cut, hermitian=True)
    return PcaDimensions(rank, perturbations, None if coordinates is None else len(coordinates), noise, tol)


def _advance(bar: Progress, task: TaskID) -> Any:
    return lambda steps: bar.advance(task, steps)


def _check_options(
    inputs: Tensor,
    measures: Sequence[str],
    canvas: str,
    perturb: str,
    jacobian_inputs: int,
    pca_inputs: int,
    perturbations: int,
    noise: float,
    tol: float,
    chunk: int,
    batch: int,
) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch.Tensor [N, ...], not {type(inputs).__name__}")
    if inputs.dim() < 2 or len(inputs) == 0:
        raise ValueError(f"inputs must be [N, ...] with N >= 1, got {list(inputs.shape)}")
    if not measures or any(measure not in MEASURES for measure in measures):
        raise ValueError(f"measures must be some of {', '.join(MEASURES)}, got {list(measures)}")
    if canvas not in CANVASES:
        raise ValueError(f"canvas must be one of {', '.join(CANVASES)}, got {canvas!r}")
    if perturb not in PERTURBED:
        raise ValueError(f"perturb must be one of {', '.join(PERTURBED)}, got {perturb!r}")
    counts = {"jacobian_inputs": jacobian_inputs, "pca_inputs": pca_inputs, "chunk": chunk, "batch": batch}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if perturbations < 2:
        raise ValueError(f"perturbations must be at least 2, got {perturbations}")
    for name, size in {"noise": noise, "tol": tol}.items():
        if not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")


def _classification_dict(found: ClassificationDimension) -> dict[str, Any]:
    return {
        "dimension": found.dimension,
        "features": found.width,
        "share": found.share,
        "original_accuracy": found.original,
        "samples": found.samples,
        "labels": "given" if found.true_labels else "the network's own argmax",
        "accuracy": [float(f"{value:.6g}") for value in found.accuracy.tolist()],
    }


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean of values [I, L] over inputs, [L]."""
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    return values.std(0) / math.sqrt(len(values))


def _mean_cell(mean: Tensor, error: Tensor | None) -> str:
    return f"{mean:.1f}" if error is None or error.isnan() else f"{mean:.1f}±{error:.2g}"


def _number(inputs: int) -> str:
    return "1 input" if inputs == 1 else f"{inputs} inputs"
