"""Which norm, and which part of FAMLP, helps a small network in a domain it has never seen?

`python -m benchmarks.domain_generalization` trains and tests all of them, in about ten minutes on two cores.

Task: digits in four domains (data/domain_digits.py: UCI's, MNIST's, coloured textures, sketches), 16 x 16 pixels. Every
domain is left out in turn: the network is trained on the three others and tested on other pictures in the one left out,
after the last step; settings were chosen by pictures of the sources. All methods of a study see the same batches for as
many steps, with random shifts and jitter of contrast and lightness.

Study "norms": a residual network of three stages; BN is replaced throughout.
    BN        plain batch norm of the mixed batch
    DSBN      batch norm by domain; the unseen domain gets statistics pooled over domains, and mean weights
    CSBN      DSBN between two calibrations by the sample's own mean, weights shared
    IN        instance norm
    CIN       instance norm with a gate that sees the contrast removed
    CFD       BN, and modules that split features after the first two stages, with their losses
    GDNorm    batch norm by domain, each step also on a random path of a Gaussian process through the domains; the
              unseen domain gets the mean path

Study "famlp": two stages of one block, on 8 x 8 and 4 x 4 tokens.
    MLP mixer    tokens are mixed by an MLP of two layers
    filter       by a Fourier filter, as in GFNet
    + low rank   filter, and the leading four singular components of the tokens are added; here filters start as large
                 as what is added to them, since with the start of the others the network learns nothing in these steps
    + momentum   filter, and outputs of the weighted past of the network are targets; its own accuracy stands beside
    full         filter, low rank and momentum: FAMLP

Numbers are accuracies in the unseen domain: means over seeds with 95 % intervals of Student's t; the gain over the
first method is paired by seed, and p is that of the paired t test on the means over the four domains, not corrected for
the number of methods. "sources" is the accuracy on held-out pictures of the domains trained on. Networks, sizes and
protocol are our choice, inspired by the papers; they are no reproduction of their numbers.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, pad

from benchmarks import digit_studies as studies
from benchmarks import harness
from neuraldeps_kernels.data.domain_digits import DOMAINS, DomainDigits, Parts, domain_digits, leave_one_out
from neuraldeps_kernels.models import cfd, gdnorm, reid_training
from neuraldeps_kernels.models.backbones import ResNet
from neuraldeps_kernels.models.famlp import (
    FAMLP,
    LowRankEnhancement,
    MomentumTeacher,
    Size,
    distillation_loss,
    parameter_groups,
)
from neuraldeps_kernels.nn import FourierFilter2d, convert_domain_batch_norm, domain_context, path_coefficients

SOURCES = len(DOMAINS) - 1  # domains trained on
CLASSES = 10
WIDTH = 12  # of the residual network's first stage
RANK = 4  # of the low-rank enhancement
UNIT_FILTER_STD = 0.5**0.5  # of both parts of a filter that keeps the size of what it filters


@dataclass(frozen=True)
class Plan:
    """How long and how much to train."""

    steps: int = 200
    batch: int = 16  # pictures of each source domain in a step
    lr: float = 4e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1  # part of the steps, also without paths and with a growing weight of distillation
    momentum: float = 0.99  # of the teacher; 0.999 remembers more steps than there are
    size: int = 16  # side of the pictures, pixels
    pictures: tuple[int, int, int] = (1000, 160, 500)  # of each domain, for training, validation and test


QUICK = Plan(steps=2, batch=4, size=8, pictures=(40, 20, 40))


# ------------------------------------------------------------------------------------------------ methods


class Learner:
    """A network and what it learns from a batch: the cross-entropy of its logits."""

    def __init__(self, network: nn.Module, plan: Plan, seed: int) -> None:
        self.network, self.plan = network, plan
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self, batch: DomainDigits, progress: float) -> Tensor:
        with domain_context(batch.domains):
            return cross_entropy(self.network(self.augmented(batch.images)), batch.labels)

    def augmented(self, images: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] moved by up to a pixel, contrast times 0.6 to 1.4, lightness plus -0.2 to 0.2."""
        N, _, S, _ = images.shape
        down, right = torch.randint(3, (2, N, 1), generator=self.generator) + torch.arange(S)  # [N, S]
        moved = pad(images, (1, 1, 1, 1), mode="replicate")[
            torch.arange(N)[:, None, None, None],
            torch.arange(3)[:, None, None],
            down[:, None, :, None],
            right[:, None, None],
        ]
        contrast, lightness = torch.rand(2, N, 1, 1, 1, generator=self.generator)
        return 0.5 + (0.6 + 0.8 * contrast) * (moved - 0.5) + 0.4 * (lightness - 0.5)

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    def judged(self) -> dict[str, nn.Module]:
        """Networks to test, by the name of their accuracy."""
        return {"accuracy": self.network}


class PathLearner(Learner):
    """GDNorm: also the loss of the same pictures on a random path, drawn for every step."""

    def loss(self, batch: DomainDigits, progress: float) -> Tensor:
        paths = path_coefficients(SOURCES, generator=self.generator)[: int(progress >= self.plan.warm_up)]
        outputs = gdnorm.forward_with_paths(self.network, self.augmented(batch.images), batch.domains, paths)
        return gdnorm.combined_loss([cross_entropy(logits, batch.labels) for logits in outputs])


class CFDLearner(Learner):
    """CFD: also the losses of the decomposition."""

    def loss(self, batch: DomainDigits, progress: float) -> Tensor:
        with domain_context(batch.domains):
            logits, domain_logits, pools = self.network(self.augmented(batch.images))
        ranking = [reid_training.restitution_ranking_loss(p.z, p.f, p.f_minus, batch.labels) for p in pools]
        return (
            cross_entropy(logits, batch.labels)
            + cfd.DOMAIN_WEIGHT * cfd.domain_loss(domain_logits, batch.domains)
            + cfd.RANKING_WEIGHT * torch.stack(ranking).mean()
        )


class MomentumLearner(Learner):
    """Also distillation from the weighted past, which sees the same pictures augmented anew."""

    def __init__(self, network: nn.Module, plan: Plan, seed: int) -> None:
        super().__init__(network, plan, seed)
        self.teacher = MomentumTeacher(network, plan.momentum)

    def loss(self, batch: DomainDigits, progress: float) -> Tensor:
        logits = self.network(self.augmented(batch.images))
        targets = self.teacher(self.augmented(batch.images))
        weight = min(1.0, progress / self.plan.warm_up)
        return cross_entropy(logits, batch.labels) + weight * distillation_loss(logits, targets)

    def after_step(self) -> None:
        self.teacher.update(self.network)

    def judged(self) -> dict[str, nn.Module]:
        return {"accuracy": self.network, "teacher": self.teacher}


def resnet(kind: str | None = None) -> nn.Module:
    """Three stages of one block, 12, 24 and 48 channels; with the norms of `kind` instead of batch norm."""
    network = ResNet(CLASSES, width=WIDTH, blocks_per_stage=1)
    return network if kind is None else convert_domain_batch_norm(network, SOURCES, kind=kind)


class CFDNetwork(nn.Module):
    """The residual network with CFD modules after its first two stages.

    Pictures to logits; in training to (logits, logits of the domains, pooled maps), the last two a list of modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet()
        self.decompositions = nn.ModuleList(
            cfd.CFDModule(channels, SOURCES, reduction=4) for channels in (WIDTH, 2 * WIDTH)
        )
        self.domain_heads = nn.ModuleList(nn.Linear(channels, SOURCES) for channels in (WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor) -> Any:
        x, pools = self.network.stem(x), []
        for stage, block in enumerate(self.network.blocks):
            x = block(x)
            if stage < len(self.decompositions):
                x, pooled = self.decompositions[stage].with_pools(x)
                pools.append(pooled)
        logits = self.network.head(self.network.pool(x).flatten(1))
        if not self.training:
            return logits
        return logits, [head(p.domain) for head, p in zip(self.domain_heads, pools, strict=True)], pools


class TokenMLP(nn.Module):
    """Mixes the N = H W tokens of [B, H, W, C] by an MLP of two layers, the same for all channels."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        tokens = height * width
        self.fc1, self.fc2 = nn.Linear(tokens, 2 * tokens), nn.Linear(2 * tokens, tokens)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(z.flatten(1, 2).mT))).mT.view(z.shape)


def famlp(plan: Plan, low_rank_blocks: str = "none", **options: Any) -> nn.Module:
    """Patches of 2, widths 32 and 64, one block each; linear maps start by Xavier's rule, 0.02 being for wide ones."""
    fixed: dict[str, Any] = {"layer_scale": None, "drop_path": 0.0, "low_rank": lambda: LowRankEnhancement(RANK)}
    size = Size(2, (32, 64), (1, 1))
    network = FAMLP(CLASSES, size, image_size=plan.size, low_rank_blocks=low_rank_blocks, **fixed, **options)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, FourierFilter2d) and low_rank_blocks != "none":
            nn.init.normal_(module.weight, std=UNIT_FILTER_STD)
    return network


Method = Callable[[Plan, int], Learner]  # of a plan and a seed, the parameters being drawn from torch's generator

STUDIES: dict[str, dict[str, Method]] = {
    "norms": {
        "BN": lambda plan, seed: Learner(resnet(), plan, seed),
        "DSBN": lambda plan, seed: Learner(resnet("domain"), plan, seed),
        "CSBN": lambda plan, seed: Learner(resnet("calibrated"), plan, seed),
        "IN": lambda plan, seed: Learner(resnet("instance"), plan, seed),
        "CIN": lambda plan, seed: Learner(resnet("calibrated_instance"), plan, seed),
        "CFD": lambda plan, seed: CFDLearner(CFDNetwork(), plan, seed),
        "GDNorm": lambda plan, seed: PathLearner(resnet("gaussian_process"), plan, seed),
    },
    "famlp": {
        "MLP mixer": lambda plan, seed: Learner(famlp(plan, mixer=TokenMLP), plan, seed),
        "filter": lambda plan, seed: Learner(famlp(plan), plan, seed),
        "+ low rank": lambda plan, seed: Learner(famlp(plan, "last"), plan, seed),
        "+ momentum": lambda plan, seed: MomentumLearner(famlp(plan), plan, seed),
        "full": lambda plan, seed: MomentumLearner(famlp(plan, "last"), plan, seed),
    },
}


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Run:
    """What one training gave: shares of pictures classified correctly."""

    method: str
    target: str  # the domain left out
    seed: int
    accuracy: float  # in the target
    sources: float  # on validation pictures of the source domains
    teacher: float | None = None  # of the weighted past, in the target


def trained(learner: Learner, train: DomainDigits, seed: int) -> Learner:
    """The learner after all steps of AdamW, cosine schedule with warm-up, gradients clipped at norm 1."""
    plan, network = learner.plan, learner.network.train()
    optimizer = torch.optim.AdamW(parameter_groups(network, plan.weight_decay), plan.lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(plan.steps):
        progress = step / plan.steps
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * rate(progress, plan.warm_up)
        optimizer.zero_grad()
        learner.loss(random_batch(train, plan.batch, generator), progress).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        learner.after_step()
    return learner


def rate(progress: float, warm_up: float) -> float:
    """Share of the learning rate: linear over the warm-up, then half a cosine."""
    return min(1.0, 0.1 + progress / warm_up) * (1 + math.cos(math.pi * progress)) / 2


def random_batch(train: DomainDigits, each: int, generator: torch.Generator) -> DomainDigits:
    """`each` pictures of every source domain; `train` holds as many of each, ordered by domain."""
    pictures = len(train) // SOURCES
    rows = torch.randint(pictures, (SOURCES, each), generator=generator) + pictures * torch.arange(SOURCES)[:, None]
    return train.select(rows.flatten())


@torch.no_grad()
def accuracy(network: nn.Module, part: DomainDigits) -> float:
    """Share of correct classes, in eval mode, with the statistics of the domains of `part` (-1: unseen)."""
    with domain_context(part.domains):
        return float((network.eval()(part.images).argmax(1) == part.labels).double().mean())


@functools.cache
def parts_of(plan: Plan, seed: int) -> Parts:
    return domain_digits(plan.size, plan.pictures, seed)


def runs_of(job: tuple[str, int, str, Plan]) -> list[Run]:
    """One run of each method of a study, for a seed and a target."""
    study, seed, target, plan = job
    parts = leave_one_out(parts_of(plan, seed), target)
    runs = []
    with harness.threads_limited(1):
        for name, method in STUDIES[study].items():
            torch.manual_seed(seed)
            learner = trained(method(plan, seed), parts.train, seed)
            found = {key: accuracy(network, parts.test) for key, network in learner.judged().items()}
            runs.append(Run(name, target, seed, sources=accuracy(learner.network, parts.validation), **found))
    return runs


def run_study(study: str, plan: Plan, seeds: int, workers: int) -> list[Run]:
    """All runs of a study: targets, seeds and methods; a bar on a terminal shows how far it is."""
    jobs = [(study, seed, target, plan) for seed, target in itertools.product(range(seeds), DOMAINS)]
    bar = functools.partial(track, description=study, total=len(jobs), console=Console(stderr=True), transient=True)
    if workers == 1:
        return [run for runs in bar(map(runs_of, jobs)) for run in runs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [run for runs in bar(pool.map(runs_of, jobs)) for run in runs]


# ------------------------------------------------------------------------------------------------ tables

HEADER = ("method", *(f"{name} %" for name in DOMAINS), "mean %", "gain", "p", "sources %", "teacher %")


def by_seed(runs: Sequence[Run], method: str, value: str = "accuracy", target: str | None = None) -> list[float]:
    """Of a method, the mean over its targets (or the one named) for every seed, in the order of seeds."""
    chosen = [run for run in runs if run.method == method and target in (None, run.target)]
    seeds = sorted({run.seed for run in chosen})
    values = [[getattr(run, value) for run in chosen if run.seed == seed] for seed in seeds]
    return [sum(of_seed) / len(of_seed) for of_seed in values]


def rows(runs: Sequence[Run], methods: Sequence[str]) -> list[list[str]]:
    """Cells of every method, as in HEADER."""
    base = by_seed(runs, methods[0])
    result = []
    for method in methods:
        means = by_seed(runs, method)
        cells = [method, *(studies.percent(by_seed(runs, method, target=target)) for target in DOMAINS)]
        cells.append(studies.percent(means))
        if method == methods[0]:
            cells += ["-", "-"]
        else:
            gains = [mean - other for mean, other in zip(means, base, strict=True)]
            cells += [studies.percent(gains, signed=True), f"{p_value(means, base):.2g}"]
        cells.append(studies.percent(by_seed(runs, method, "sources")))
        has_teacher = any(run.teacher is not None for run in runs if run.method == method)
        result.append([*cells, studies.percent(by_seed(runs, method, "teacher")) if has_teacher else "-"])
    return result


def p_value(values: Sequence[float], base: Sequence[float]) -> float:
    """Of the two-sided paired t test; NaN for one seed or where all differences are equal to each other and 0."""
    return float(ttest_rel(values, base).pvalue)


# ------------------------------------------------------------------------------------------------ command


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.domain_generalization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--study", choices=list(STUDIES), help="only this one; default both")
    result.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind, default 5")
    result.add_argument("--steps", type=int, metavar="N", help=f"steps of every training, default {Plan.steps}")
    result.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread each, default 2")
    result.add_argument("--quick", action="store_true", help="two seeds, tiny pictures, 2 steps: shows that it runs")
    result.add_argument("--out", type=Path, dest="results", metavar="FILE", help="JSON lines are appended here")
    result.add_argument("--markdown", type=Path, metavar="FILE", help="tables are appended here")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the studies, prints tables, appends JSON lines."""
    options = parser().parse_args(argv)
    console = Console(width=max(Console().width, harness.TABLE_WIDTH))
    plan, seeds = (QUICK, 2) if options.quick else (Plan(), options.seeds)
    if options.steps is not None:
        plan = Plan(**{**asdict(plan), "steps": options.steps})
    for study in [options.study] if options.study else STUDIES:
        runs = run_study(study, plan, seeds, 1 if options.quick else options.workers)
        methods = list(STUDIES[study])
        title = f"Accuracy in the unseen domain, study {study}, {seeds} seeds, {plan.steps} steps"
        studies.write_markdown(options, studies.table(title, HEADER, rows(runs, methods), console))
        for method in methods:
            record = {"study": study, "method": method, "plan": asdict(plan)}
            found = [asdict(run) for run in runs if run.method == method]
            studies.append(options, "domain_generalization", record | {"runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
