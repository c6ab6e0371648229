"""What a generator's samples gain and lose when one piece of knowledge is moved: descent and its competitors compared.

Knowledge K is standardised here, K <- (K - mean) / deviation over samples of the prior p, so that eta, targets and gaps
mean the same for all knowledge. Every method gets the same codes z0 and the same target k* and returns codes z, with
x0 = G(z0), x = G(z):

    principal descent      `principal_knowledge_descent`
    full gradient          the same with the plain gradient
    random direction       as far from z0 as the principal descent goes, each sample in a direction of its own
    linear hyperplane      along the normal of a logistic regression of K > median on codes of the prior
    factorisation          along that one of the top right singular vectors of the first affine layer that moves K most
    importance weighting   codes of the prior, drawn with the weights q / p of the closed-form discriminator

The two lines stop each sample where K is nearest to the target. Sources: the linear hyperplane is inspired by
"Interpreting the Latent Space of GANs for Semantic Face Editing" (arXiv 1907.10786), the factorisation by "Closed-Form
Factorization of Latent Semantics in GANs" (arXiv 2007.06600); metrics and settings are our choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuraldeps_kernels.analysis.formatting import cell, json_text, without_nan, written
from neuraldeps_kernels.models.knowledge_extrapolation import (
    Generator,
    Knowledge,
    Whitening,
    principal_knowledge_descent,
)
from neuraldeps_kernels.ops.closed_form_discriminator import (
    Discriminator,
    MassEscapes,
    closed_form_discriminator,
    effective_sample_size,
    knowledge_penalty,
)
from neuraldeps_kernels.progress import track

if TYPE_CHECKING:
    from rich.table import Table

UNCHANGED, PRINCIPAL, WEIGHTING = "unchanged", "principal descent", "importance weighting"
METHODS = (PRINCIPAL, "full gradient", "random direction", "linear hyperplane", "factorisation", WEIGHTING)
NEAR = 0.1  # of the way from K(x0) to the target: what counts as success
FEW = 0.5  # success below which the target counts as out of reach
LARGEST_SHARE = 1 - 1e-6  # of s = 1 - D

_REACH, _COARSE, _FINE = 6.0, 25, 9  # of a line through z0: half its length, and points of the two searches on it
_FACTORS = 5  # singular vectors of the first layer that are tried
_FOLDS, _HIDDEN = 5, 64  # of the classifiers
_OWN_STREAM = 0x9E3779B9  # added to seeds, of which 32 bits count, so that the prior is not drawn as z0 was


# ------------------------------------------------------------------------------------------------ metrics


@dataclass(frozen=True)
class ExtrapolationMetrics:
    """Of one method; NaN where a method has no pairs (x0, x), or nothing was given to measure with."""

    success: float  # share of samples with |K(x) - k*| <= 0.1 |k* - K(x0)|
    gap: float  # mean |K(x) - k*|, deviations of K over the prior
    gain: float  # mean change of the independent scorer over mean change asked for, both in deviations
    others: float  # mean over other attributes a of |a(x) - a(x0)| / deviation of a
    unlikeness: float  # mean of 1 - cosine of the embeddings of x and x0, less their mean over the prior
    logistic: float  # accuracy of telling x from the prior by features without K: 0.5 is best
    mlp: float  # the same of a network with one hidden layer
    frechet: float  # distance of feature Gaussians of x and of samples of the prior with the same K
    displacement: float  # mean |z - z0|
    discriminator: float  # mean D*(x) of the closed-form discriminator: 0.5 where q is p
    evaluations: float  # of the generator, a sample


def success_and_gap(k: Tensor, k0: Tensor, target: Tensor) -> tuple[float, float]:
    """Of knowledge [B, m] after and before."""
    gap = (k - target).norm(dim=1)
    return float((gap <= NEAR * (target - k0).norm(dim=1)).double().mean()), float(gap.double().mean())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of features [N, q] and [M, q], N and M > 1.

    Source: "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (arXiv 1706.08500).
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [N, q] and [M, q] with N, M > 1, not {list(x.shape)} and {list(y.shape)}")
    (m, C), (n, D) = ((t.double().mean(0), torch.cov(t.double().mT).reshape(t.shape[1], t.shape[1])) for t in (x, y))
    values, vectors = torch.linalg.eigh(C)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ D @ root).clamp_min(0).sqrt().sum()
    return float(((m - n).square().sum() + C.trace() + D.trace() - 2 * cross).clamp_min(0))


def matched_subset(k: Tensor, pool: Tensor) -> Tensor:
    """Rows [B] of `pool` [M, m], each at most once, whose knowledge is nearest to k [B, m] in total; M >= B."""
    from scipy.optimize import linear_sum_assignment

    if len(pool) < len(k):
        raise ValueError(f"pool must have at least {len(k)} rows, not {len(pool)}")
    return torch.from_numpy(linear_sum_assignment(torch.cdist(k.double(), pool.double()).numpy())[1])


def indistinguishability(p: Tensor, q: Tensor, k_p: Tensor, k_q: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Accuracies of a logistic regression and of a network with one hidden layer at telling features p from q.

    From features p [N, f] and q [M, f] the part explained by 1, K and K^2 (least squares on both together) is removed;
    k_p [N, m], k_q [M, m]. Five folds with the same share of both; 0.5 is chance for N = M.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("indistinguishability needs scikit-learn: pip install scikit-learn") from error
    features, k = torch.cat([p, q]).double(), torch.cat([k_p, k_q]).double()
    design = torch.cat([torch.ones_like(k[:, :1]), k, k.square()], 1)
    rest = features - design @ torch.linalg.lstsq(design, features, driver="gelsd").solution
    labels = torch.arange(len(features)) >= len(p)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    classifiers = (
        LogisticRegression(max_iter=500),
        MLPClassifier((_HIDDEN,), solver="lbfgs", alpha=1.0, max_iter=100, random_state=seed),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        scores = [
            cross_val_score(make_pipeline(StandardScaler(), classifier), rest.numpy(), labels.numpy(), cv=folds)
            for classifier in classifiers
        ]
    return float(scores[0].mean()), float(scores[1].mean())


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, eq=False)
class ExtrapolationReport:
    """Of `compare_extrapolations`: a row a method, the first for samples as they were."""

    by: tuple[float, ...]  # target, in deviations of K over the prior from its mean
    target: tuple[float, ...]  # in the units of K
    samples: int
    prior_samples: int
    rows: dict[str, ExtrapolationMetrics]
    codes: dict[str, Tensor]  # z in the coordinates of z0; "unchanged": z0
    pictures: dict[str, Tensor]  # G(z) of the first samples, [n, ...]
    ess: float  # of the weights q / p over the prior samples
    divergence: float  # Jensen-Shannon, nats, at most log 2: how far q* of the closed-form discriminator is from p
    cautions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None. Without codes and pictures."""
        content = {name: getattr(self, name) for name in ("by", "target", "samples", "prior_samples")}
        content |= {"ess": self.ess, "divergence": self.divergence, "cautions": self.cautions}
        plain: dict[str, Any] = without_nan(
            content | {"methods": {name: asdict(row) for name, row in self.rows.items()}}
        )
        return plain

    def to_json(self, path: str | Path | None = None) -> str:
        return written(json_text(self.to_dict()), path)

    def table(self) -> Table:
        """A rich table: a row a method."""
        from rich.table import Table

        by = ", ".join(f"{value:+.3g}" for value in self.by)
        style: dict[str, Any] = {"title_justify": "left", "title_style": "", "caption_justify": "left"}
        table = Table(title=f"Knowledge moved to {by} deviations of the prior, {self.samples} samples", **style)
        table.add_column("method", no_wrap=True)
        names = {"success": "success", "gap": "gap", "gain": "true gain", "others": "others", "unlikeness": "1 - cos"}
        names |= {"logistic": "logistic", "mlp": "MLP", "frechet": "Fréchet", "displacement": "|z - z0|"}
        names |= {"discriminator": "D", "evaluations": "evals"}
        for name in names.values():
            table.add_column(name, justify="right", no_wrap=True)
        for method, row in self.rows.items():
            cells = [
                cell(getattr(row, name), 0 if name == "evaluations" else 3 if name == "unlikeness" else 2)
                for name in names
            ]
            table.add_row(method, *cells)
        table.caption = (
            "Success: share within a tenth of the way to the target. True gain: by an independent scorer, 1 is what "
            "was asked. Others: change of other attributes, deviations. Logistic, MLP: accuracy of telling the samples "
            "from the prior without K, 0.5 is chance. Fréchet: to samples of the prior with the same K. D: closed-form "
            f"discriminator. Importance weighting: effective sample size {self.ess:.1f} of {self.prior_samples}; "
            f"divergence of its law {self.divergence:.3f} of at most {math.log(2):.3f} nats."
        )
        return table

    def plot(self, path: str | Path) -> Path:
        """Writes the pictures as one PNG, a row a method, a column a sample; needs matplotlib. Returns the path.

        Raises ValueError where samples are no pictures [3, H, W] or [1, H, W].
        """
        from matplotlib.figure import Figure

        from neuraldeps_kernels.analysis.plots import DPI

        columns = len(next(iter(self.pictures.values())))
        figure = Figure(figsize=(1.6 + columns, len(self.pictures)), layout="constrained")
        axes = figure.subplots(len(self.pictures), columns, squeeze=False)
        for row, (name, pictures) in zip(axes, self.pictures.items(), strict=True):
            if pictures.dim() != 4 or pictures.shape[1] not in (1, 3):
                raise ValueError(f"samples must be pictures [N, 3 or 1, H, W] to be drawn, not {list(pictures.shape)}")
            for place, picture in zip(row, pictures, strict=True):
                place.imshow((0.5 * picture.expand(3, -1, -1).permute(1, 2, 0) + 0.5).clamp(0, 1).numpy())
                place.set_xticks([])
                place.set_yticks([])
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        figure.savefig(path, dpi=DPI)
        return Path(path)


# ------------------------------------------------------------------------------------------------ comparison


def compare_extrapolations(
    generator: Generator,
    knowledge: Knowledge,
    z0: Tensor,
    *,
    by: float | Sequence[float] = 1.5,
    target: float | Sequence[float] | None = None,
    scorer: Knowledge | None = None,
    attributes: Mapping[str, Knowledge] | None = None,
    features: Knowledge | None = None,
    methods: Iterable[str] = METHODS,
    prior: Tensor | int = 4096,
    whitening: Whitening | None = None,
    first_layer: Tensor | None = None,
    eta: float = 1.0,
    rho: float = 0.02,
    tilt: float | None = None,
    shown: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    **descent: Any,
) -> ExtrapolationReport:
    """Moves knowledge of samples by several methods and measures what it costs.

    Args:
        generator, knowledge, z0, whitening, batch_size: of `principal_knowledge_descent`; at least 10 codes on the CPU.
        by: the target, in deviations of K over the prior from its mean; a number or one a dimension of K.
        target: the target in the units of K, instead of `by`.
        scorer: the same knowledge told independently of K, [B] or [B, m]; None: K itself, whose gains may be
            adversarial.
        attributes: other knowledge to be kept, by name.
        features: [B, q] of samples, for classifiers, the Fréchet distance and the cosine; default the attributes, or
            samples pooled to 4 x 4 where there are none.
        methods: of METHODS; those that need the length of the principal descent bring it along.
        prior: codes of the prior, in the shape of z0, or how many to draw from N(0, I); at least as many as of z0.
        first_layer: weight [out, d] of the first affine layer of the codes; default that of the generator, where it is
            a module.
        eta, rho: of the descent, for standardised knowledge.
        tilt: eta of the closed-form discriminator; default eta / rho, that of the descent's own game, at most 100 eta.
        shown: samples whose pictures are kept.
        seed: of prior, directions, weighting and classifiers.
        descent: further options of `principal_knowledge_descent` (mode, rank, energy, preserve, steps, refresh, ...).

    Raises:
        ValueError: an argument does not fit, or K does not vary over the prior or is not finite.
        ImportError: scikit-learn is not installed.
    """
    study = _Study(generator, knowledge, z0, prior, whitening, batch_size, seed)
    chosen = _checked_methods(methods)
    goal = study.goal(by, target)
    cautions: list[str] = []
    weight = min(eta / rho if rho > 0 else math.inf, 100 * eta) if tilt is None else tilt
    solved = study.discriminator(goal, weight, cautions)
    layer = _first_layer(generator, z0.shape[-1]) if first_layer is None else first_layer
    if layer is None and "factorisation" in chosen:
        chosen.remove("factorisation")
        cautions.append("no factorisation: the generator shows no first affine layer; give first_layer")
    codes, costs = {UNCHANGED: study.origin}, {UNCHANGED: 1.0}
    needed = [PRINCIPAL, *chosen] if "random direction" in chosen and PRINCIPAL not in chosen else chosen
    for name in track(needed, "methods", len(needed)):
        before = study.evaluations
        options = {"eta": eta, "rho": rho, "batch_size": batch_size, **descent}
        if name == PRINCIPAL:
            codes[name] = study.descend(goal, options)
        elif name == "full gradient":
            codes[name] = study.descend(goal, options | {"mode": "full"})
        elif name == "random direction":
            codes[name] = study.randomly(codes[PRINCIPAL])
        elif name == "linear hyperplane":
            codes[name] = study.along(study.hyperplane(), goal)
        elif name == "factorisation":
            codes[name] = study.along(study.factor(layer), goal)  # type: ignore[arg-type]
        else:
            codes[name] = study.resampled(solved)
        uses_prior = name in ("linear hyperplane", WEIGHTING)
        costs[name] = (study.evaluations - before + uses_prior * len(study.prior)) / len(study.origin)
    measure = _Measure(study, goal, scorer, attributes or {}, features, solved.c, weight, seed)
    kept = [name for name in codes if name == UNCHANGED or name in chosen]
    rows = {name: measure(codes[name], name != WEIGHTING, costs[name]) for name in track(kept, "metrics", len(kept))}
    if PRINCIPAL in rows and rows[PRINCIPAL].success < FEW:
        cautions.append(
            f"the target is out of reach of the principal descent for {1 - rows[PRINCIPAL].success:.0%} of the "
            "samples: take a nearer one, a larger rank or eta, or a smaller rho"
        )
    w, D = solved.weights.double(), solved.discriminator.double()
    divergence = 0.5 * float(D.log().mean() + (w * torch.log1p(-D).nan_to_num(neginf=0)).mean() + math.log(4))
    return ExtrapolationReport(
        by=tuple(goal.tolist()),
        target=tuple((study.mean + study.spread * goal).tolist()),
        samples=len(z0),
        prior_samples=len(study.prior),
        rows=rows,
        codes={name: study.decoded(codes[name]) for name in kept},
        pictures={name: study.samples(codes[name][:shown]) for name in kept},
        ess=float(effective_sample_size(w)),
        divergence=divergence,
        cautions=tuple(cautions),
    )


def _checked_methods(methods: Iterable[str]) -> list[str]:
    chosen = list(dict.fromkeys(methods))
    wrong = [name for name in chosen if name not in METHODS]
    if wrong or not chosen:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, not {wrong or 'none'}")
    return chosen


def _first_layer(generator: Generator, d: int) -> Tensor | None:
    """Weight [out, d] of the first affine layer of a module that takes d values, or None."""
    for module in generator.modules() if isinstance(generator, nn.Module) else ():
        if isinstance(module, nn.Linear) and module.in_features == d:
            return module.weight.detach()
        if isinstance(module, nn.ConvTranspose2d) and module.in_channels == d:
            return module.weight.detach().flatten(1).mT
    return None


class _Study:
    """Generator, standardised knowledge and samples of the prior; counts what the generator is asked for.

    Codes are whitened ones throughout.
    """

    def __init__(
        self,
        generator: Generator,
        knowledge: Knowledge,
        z0: Tensor,
        prior: Tensor | int,
        whitening: Whitening | None,
        batch_size: int,
        seed: int,
    ) -> None:
        if z0.dim() not in (2, 3) or len(z0) < 2 * _FOLDS or z0.device.type != "cpu":
            raise ValueError(
                f"z0 must be [B, d] or [B, L, d] on the CPU with B >= {2 * _FOLDS}, not {list(z0.shape)} on {z0.device}"
            )
        self._generator, self._knowledge, self._whitening = generator, knowledge, whitening
        self._batch, self._random = batch_size, torch.Generator().manual_seed(seed + _OWN_STREAM)
        self.evaluations = 0
        self.origin = self._encoded(z0)
        if isinstance(prior, int):
            self.prior = torch.randn(prior, *z0.shape[1:], generator=self._random, dtype=z0.dtype)
        else:
            self.prior = self._encoded(prior.to(z0.dtype))
        if len(self.prior) < len(z0) or self.prior.shape[1:] != z0.shape[1:]:
            raise ValueError(
                f"prior must be at least {len(z0)} codes {list(z0.shape[1:])}, not {list(self.prior.shape)}"
            )
        self.mean, self.spread = torch.zeros(1), torch.ones(1)
        k = self.values(self.knowledge, self.prior)
        if not bool(k.isfinite().all()) or not bool((k.std(0) > 0).all()):
            raise ValueError("knowledge must be finite and vary over the prior")
        self.mean, self.spread = k.mean(0), k.std(0)
        self.k_prior, self.k0 = (k - self.mean) / self.spread, self.values(self.knowledge, self.origin)

    def _encoded(self, z: Tensor) -> Tensor:
        return z.detach() if self._whitening is None else self._whitening.encode(z.detach())

    def decoded(self, z: Tensor) -> Tensor:
        return z if self._whitening is None else self._whitening.decode(z)

    def generator(self, z: Tensor) -> Tensor:
        self.evaluations += len(z)
        return self._generator(self.decoded(z))

    def knowledge(self, x: Tensor) -> Tensor:
        """[B, m], standardised."""
        return (_columns(self._knowledge(x)) - self.mean.to(x)) / self.spread.to(x)

    def samples(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._generator(part) for part in self.decoded(z).split(self._batch)])

    def values(self, feature: Knowledge, z: Tensor) -> Tensor:
        """[n, m] of the samples of codes z [n, ...]."""
        with torch.no_grad():
            return torch.cat([_columns(feature(self.generator(part))) for part in z.split(self._batch)])

    def goal(self, by: float | Sequence[float], target: float | Sequence[float] | None) -> Tensor:
        """Standardised target [m]."""
        given = torch.as_tensor(by if target is None else target, dtype=self.mean.dtype).reshape(-1)
        if len(given) not in (1, len(self.mean)) or not bool(given.isfinite().all()):
            raise ValueError(f"the target must be a finite number or {len(self.mean)} of them, not {given.tolist()}")
        return (given if target is None else (given - self.mean) / self.spread).expand(len(self.mean))

    def discriminator(self, goal: Tensor, tilt: float, cautions: list[str]) -> Discriminator:
        """Of the prior samples; a warning that mass escapes becomes a caution."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MassEscapes)
            solved = closed_form_discriminator(self.k_prior, goal, tilt)
        cautions += [f"mass escapes: {w.message}" for w in caught if issubclass(w.category, MassEscapes)]
        return solved

    def descend(self, goal: Tensor, options: dict[str, Any]) -> Tensor:
        return principal_knowledge_descent(self.generator, self.knowledge, self.origin, goal, **options).z

    def randomly(self, moved: Tensor) -> Tensor:
        """Codes as far from the origin as `moved`."""
        direction = torch.randn(self.origin.shape, generator=self._random, dtype=self.origin.dtype).flatten(1)
        length = (moved - self.origin).flatten(1).norm(dim=1, keepdim=True)
        step: Tensor = (length * direction / direction.norm(dim=1, keepdim=True)).view_as(self.origin)
        return self.origin + step

    def hyperplane(self) -> Tensor:
        """Unit normal [d] or [L, d] between codes of the prior with the first knowledge above and below its median."""
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("the linear hyperplane needs scikit-learn: pip install scikit-learn") from error
        k = self.k_prior[:, 0]
        fit = LogisticRegression(max_iter=500).fit(self.prior.flatten(1).numpy(), (k > k.median()).numpy())
        normal = torch.from_numpy(fit.coef_[0]).to(self.origin)
        unit: Tensor = (normal / normal.norm()).view(self.origin.shape[1:])
        return unit

    def factor(self, weight: Tensor) -> Tensor:
        """Of the top right singular vectors of a layer [out, d] that which moves the knowledge most."""
        d = self.origin.shape[-1]
        if weight.dim() != 2 or weight.shape[1] != d:
            raise ValueError(f"first_layer must be [out, {d}], not {list(weight.shape)}")
        wide = weight.double()
        if self._whitening is not None and self.origin.dim() == 2:
            wide = wide @ self._whitening.scale.double()
        vectors = torch.linalg.svd(wide, full_matrices=False)[2][:_FACTORS].to(self.origin)
        few = self.origin[:64]
        lines: list[Tensor] = [v.expand(self.origin.shape[1:]) / self.origin[0, ..., 0].numel() ** 0.5 for v in vectors]
        effects = [
            (self.values(self.knowledge, few + line) - self.values(self.knowledge, few - line)).mean(0).norm()
            for line in lines
        ]
        return lines[int(torch.stack(effects).argmax())]

    def along(self, direction: Tensor, goal: Tensor) -> Tensor:
        """z0 + t direction, t that where the knowledge is nearest to the goal, in -6..6; the smaller of like ones."""
        t = torch.zeros(len(self.origin), dtype=self.origin.dtype)
        width = _REACH
        for points in (_COARSE, _FINE):
            tried = t + torch.linspace(-width, width, points, dtype=t.dtype)[:, None]  # [points, B]
            codes = self.origin + tried.view(points, -1, *[1] * direction.dim()) * direction
            gap = (self.values(self.knowledge, codes.flatten(0, 1)) - goal).norm(dim=1).view(points, -1)
            t = tried.gather(0, (gap + 1e-3 * tried.abs()).argmin(0, keepdim=True))[0]
            width *= 2 / (points - 1)
        moved: Tensor = self.origin + t.view(-1, *[1] * direction.dim()) * direction
        return moved

    def resampled(self, solved: Discriminator) -> Tensor:
        drawn = torch.multinomial(solved.weights.double(), len(self.origin), replacement=True, generator=self._random)
        return self.prior[drawn]


class _Measure:
    """Metrics of codes; what they need of the prior and of z0 is computed once."""

    def __init__(
        self,
        study: _Study,
        goal: Tensor,
        scorer: Knowledge | None,
        attributes: Mapping[str, Knowledge],
        features: Knowledge | None,
        c: Tensor,
        tilt: float,
        seed: int,
    ) -> None:
        self.study, self.goal, self.c, self.tilt, self.seed = study, goal, c, tilt, seed

        def others(x: Tensor) -> Tensor:
            return torch.cat([_columns(attribute(x)) for attribute in attributes.values()], 1)

        self._score = _Standardised(scorer or study.knowledge, study)
        if self._score.prior.shape[1] != len(goal):
            raise ValueError(f"scorer must tell {len(goal)} values as knowledge does, not {self._score.prior.shape[1]}")
        self._feature = _Standardised(features or (others if attributes else pooled), study)
        self._other = _Standardised(others, study) if attributes else None
        rows = torch.randperm(len(study.prior), generator=torch.Generator().manual_seed(seed))[: len(study.origin)]
        self._drawn = self._feature.prior[rows], study.k_prior[rows]

    def __call__(self, z: Tensor, paired: bool, evaluations: float) -> ExtrapolationMetrics:
        study, goal = self.study, self.goal
        k, feature, score = (study.values(of, z) for of in (study.knowledge, self._feature, self._score))
        success, gap = success_and_gap(k, study.k0, goal)
        asked = (goal - study.k0).mean(0)
        gain = ((score.mean(0) - self._score.origin.mean(0)) @ asked) / asked.square().sum()
        logistic, mlp = self._told_apart(z, feature, k)
        matched = self._feature.prior[matched_subset(k, study.k_prior)]
        s = torch.exp(self.c - self.tilt * knowledge_penalty(k, goal).double()).clamp_max(LARGEST_SHARE)
        metrics = dict.fromkeys(("others", "unlikeness", "displacement"), math.nan)
        if paired:
            cosine = torch.nn.functional.cosine_similarity(feature, self._feature.origin, dim=1)
            metrics["unlikeness"] = float(1 - cosine.double().mean())
            metrics["displacement"] = float((z - study.origin).flatten(1).norm(dim=1).double().mean())
            if self._other is not None:
                metrics["others"] = float((study.values(self._other, z) - self._other.origin).abs().double().mean())
        return ExtrapolationMetrics(
            success=success,
            gap=gap,
            gain=float(gain),
            logistic=logistic,
            mlp=mlp,
            frechet=frechet_distance(feature, matched),
            discriminator=float(1 - s.mean()),
            evaluations=evaluations,
            **metrics,
        )

    def _told_apart(self, z: Tensor, feature: Tensor, k: Tensor) -> tuple[float, float]:
        """Of each different code once, as copies in several folds would be remembered; NaN for too few."""
        different = torch.unique(z, dim=0, return_inverse=True)[1]
        first = torch.full((int(different.max()) + 1,), len(z)).scatter_reduce(
            0, different, torch.arange(len(z)), "amin"
        )
        if len(first) < 2 * _FOLDS:
            return math.nan, math.nan
        p, k_p = (values[: len(first)] for values in self._drawn)
        return indistinguishability(p, feature[first], k_p, k[first], seed=self.seed)


class _Standardised:
    """Features less their mean, over their deviation on the prior (1 where that is 0); keeps those of prior and z0."""

    def __init__(self, feature: Knowledge, study: _Study) -> None:
        self._feature = feature
        raw = study.values(feature, study.prior)
        spread = raw.std(0)
        self._mean, self._spread = raw.mean(0), torch.where(spread > 0, spread, 1.0)
        self.prior = (raw - self._mean) / self._spread
        self.origin = study.values(self, study.origin)

    def __call__(self, x: Tensor) -> Tensor:
        return (_columns(self._feature(x)) - self._mean) / self._spread


def pooled(x: Tensor, side: int = 4) -> Tensor:
    """Samples [B, C, H, W] averaged to [B, C side side]; others flattened."""
    return torch.nn.functional.adaptive_avg_pool2d(x, side).flatten(1) if x.dim() == 4 else x.flatten(1)


def _columns(values: Tensor) -> Tensor:
    return values[:, None] if values.dim() == 1 else values


FIELDS: tuple[str, ...] = tuple(entry.name for entry in fields(ExtrapolationMetrics))
