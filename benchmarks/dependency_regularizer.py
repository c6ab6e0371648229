"""Does a penalty built from dependencies make a small network more robust?

`python -m benchmarks.dependency_regularizer`; with `--cost` it times forward and backward against plain autograd.

Task: pairs of digits, 100 categories (see data/digits.py). A network of two hidden layers is trained without a penalty
and with each of those below, from the same start, on the same batches, and tested on pairs of other pictures, clean and
corrupted in seven ways that it has never seen. Numbers are means over seeds with 95 % intervals of Student's t;
differences are paired, seed by seed, to the run without a penalty.

Penalties, all from epoch `start` on. Equal strength: at that point the weight is set, once a run, so that the gradient
of the penalty for all parameters is `strength` times that of the cross-entropy, in root mean square over an epoch.

    break unrelated   DependencyRegularizer "break" of dependencies on categories that share no digit with the target,
                      which nobody would call reasonable; found anew after every epoch
    break any         the same without the restriction
    bind related      "bind" to dependencies on categories that share one digit with the target
    label smoothing   control: cross-entropy against the uniform distribution
    logit L2          control: mean square of the logits
    weight L2         control: sum of squares of the weights

The form of the regulariser and this protocol are ours, inspired by arXiv 2211.12339, whose own evaluation was not
available to us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neuraldeps_kernels as nk
from benchmarks import digit_studies as studies
from benchmarks import harness
from neuraldeps_kernels.data.digits import (
    CORRUPTIONS,
    NUM_PAIRS,
    Digits,
    corrupted,
    digit_pairs,
    pairs_sharing_no_digit,
)
from neuraldeps_kernels.losses import DependencyRegularizer, MomentumCovariance

PENALTIES = ("break unrelated", "break any", "bind related", "label smoothing", "logit L2", "weight L2")
LAM_RATIO = 0.1
MOMENTUM = 0.95


@dataclass(frozen=True)
class Plan:
    """How long and how much to train."""

    strengths: tuple[float, ...] = (0.03, 0.1, 0.3)
    epochs: int = 25
    start: int = 5  # the first epoch with a penalty
    pairs: int = 4000
    test_pairs: int = 4000


QUICK = Plan(strengths=(0.1,), epochs=4, start=2, pairs=512, test_pairs=256)


@dataclass
class Run:
    """What one training gave."""

    clean: float
    corrupted: dict[str, float]
    unrelated: float  # mean R on test logits of dependencies on categories that share no digit
    weight: float = 0.0  # of the penalty

    @property
    def corrupted_mean(self) -> float:
        return sum(self.corrupted.values()) / len(self.corrupted)


class Penalty:
    """A penalty on logits [B, 100] and parameters; dependencies are kept up to date by `observe` and `refresh`."""

    def __init__(self, name: str, net: nn.Module) -> None:
        self.name, self.net, self.weight = name, net, 0.0
        self.statistics = MomentumCovariance(NUM_PAIRS, MOMENTUM)
        self.regularizer = DependencyRegularizer(mode="bind" if name.startswith("bind") else "break")
        related = ~pairs_sharing_no_digit()
        candidates = {"break unrelated": ~related, "bind related": related}
        self.candidates = candidates.get(name, torch.ones_like(related))
        self.uses_dependencies = name in PENALTIES[:3]

    def observe(self, logits: Tensor) -> None:
        if self.uses_dependencies:
            self.statistics.update(logits)

    def refresh(self) -> None:
        if self.uses_dependencies:
            cov = self.statistics.compute()
            self.regularizer.refresh(nk.covlasso(cov, lam_ratio=LAM_RATIO, candidates=self.candidates))

    def value(self, logits: Tensor) -> Tensor:
        if self.uses_dependencies:
            return self.regularizer(logits)
        if self.name == "label smoothing":
            return -logits.log_softmax(1).mean()
        if self.name == "logit L2":
            return logits.square().mean()
        return torch.stack([p.square().sum() for p in self.net.parameters() if p.dim() > 1]).sum()


@dataclass(frozen=True)
class Task:
    """Pairs of one seed."""

    images: Tensor
    labels: Tensor
    tests: dict[str, Tensor] = field(repr=False)  # "clean" and every corruption
    test_labels: Tensor = field(repr=False)

    @staticmethod
    def of(digits: Digits, pictures: Sequence[int], plan: Plan, seed: int) -> Task:
        train, _, test = digits.split(pictures, seed)
        images, labels = digit_pairs(train, plan.pairs, seed)
        clean, test_labels = digit_pairs(test, plan.test_pairs, seed)
        tests = {"clean": clean} | {kind: corrupted(clean, kind, seed) for kind in CORRUPTIONS}
        return Task(images, labels, tests, test_labels)


def train(task: Task, name: str | None, strength: float, plan: Plan, seed: int) -> tuple[nn.Module, float]:
    """The trained network and the weight that its penalty had."""
    net = studies.network(*task.images.shape[1:], NUM_PAIRS, seed)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
    penalty = None if name is None else Penalty(name, net)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(plan.epochs):
        if penalty is not None and epoch >= plan.start:
            penalty.refresh()
            if epoch == plan.start:
                penalty.weight = strength * gradient_ratio(net, penalty, task, seed)
        for images, labels in studies.batches(task.images, task.labels, generator):
            logits = net(images)
            loss = cross_entropy(logits, labels)
            if penalty is not None:
                penalty.observe(logits)
                if epoch >= plan.start:
                    loss = loss + penalty.weight * penalty.value(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net, 0.0 if penalty is None else penalty.weight


def gradient_ratio(net: nn.Module, penalty: Penalty, task: Task, seed: int) -> float:
    """Gradient of the cross-entropy over that of the penalty, root mean squares over an epoch; 0 over nothing."""
    squares = torch.zeros(2, dtype=torch.float64)
    parameters = list(net.parameters())
    for images, labels in studies.batches(task.images, task.labels, torch.Generator().manual_seed(seed)):
        logits = net(images)
        for i, value in enumerate((cross_entropy(logits, labels), penalty.value(logits))):
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares[i] += sum(float(g.square().sum()) for g in found if g is not None)
    return float((squares[0] / squares[1]).sqrt()) if squares[1] > 0 else 0.0


@torch.no_grad()
def measured(net: nn.Module, task: Task, weight: float) -> Run:
    """Accuracy on clean and corrupted pairs, and how far unrelated categories still explain each other."""
    logits = {kind: net(images) for kind, images in task.tests.items()}
    shares = {kind: float((out.argmax(1) == task.test_labels).double().mean()) for kind, out in logits.items()}
    found = nk.covlasso(nk.covariance(logits["clean"]), lam_ratio=LAM_RATIO, candidates=pairs_sharing_no_digit())
    return Run(shares.pop("clean"), shares, float(found.relative_error.mean()), weight)


def study(digits: Digits, source: studies.Source, plan: Plan, seeds: int) -> dict[tuple[str, float], list[Run]]:
    """Runs by (penalty, strength), one a seed; the first has none."""
    cases: list[tuple[str, float]] = [("none", 0.0), *((p, s) for s in plan.strengths for p in PENALTIES)]
    runs: dict[tuple[str, float], list[Run]] = {case: [] for case in cases}
    for seed in range(seeds):
        task = Task.of(digits, source.pictures, plan, seed)
        for name, strength in cases:
            net, weight = train(task, None if name == "none" else name, strength, plan, seed)
            runs[name, strength].append(measured(net, task, weight))
    return runs


def rows(runs: dict[tuple[str, float], list[Run]]) -> list[list[str]]:
    """Cells: penalty, strength, accuracies, paired differences, worst and best corruption against none, R."""
    base = runs["none", 0.0]
    result = []
    for (name, strength), found in runs.items():
        cells = [name, f"{strength:g}" if strength else "-"]
        for share in (lambda run: run.clean, lambda run: run.corrupted_mean):
            cells.append(studies.percent([share(run) for run in found]))
            gains = [share(run) - share(other) for run, other in zip(found, base, strict=True)]
            cells.append("-" if name == "none" else studies.percent(gains, signed=True))
        result.append([*cells, f"{studies.interval([run.unrelated for run in found])[0]:.2f}"])
    return result


HEADER = ("penalty", "strength", "clean %", "gain", "corrupted %", "gain", "R unrelated")


# ------------------------------------------------------------------------------------------------ cost


def planted(B: int, n: int, T: int, k: int) -> tuple[Tensor, nk.CovLassoSolution]:
    """Logits [B, n] and T dependencies of exactly k coefficients each, on random other categories."""
    generator = torch.Generator().manual_seed(k)
    column = torch.stack([torch.randperm(n - T, generator=generator)[:k].sort().values + T for _ in range(T)])
    value = 0.3 * torch.randn(T, k, generator=generator)
    theta = torch.sparse_csr_tensor(torch.arange(0, T * k + 1, k), column.view(-1), value.view(-1), (T, n))
    nothing, count = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.int64)
    solution = nk.CovLassoSolution(
        coefficients=theta, targets=torch.arange(T), lam=nothing, lambda_max=nothing, err2=nothing,
        relative_error=nothing, n_nonzero=count + k, duality_gap=nothing, kkt_violation=nothing, n_pivots=count,
        status=count,
    )  # fmt: skip
    return torch.randn(B, n, generator=generator), solution


def cost_case(k: int, B: int = 256, n: int = 1000, T: int = 100) -> harness.Case:
    """Forward and backward of the penalty, ours and as one would write it with autograd."""
    logits, solution = planted(B, n, T, k)
    logits.requires_grad_()
    regularizer = DependencyRegularizer(solution, mode="bind")
    theta = solution.dense().index_put((torch.arange(T), solution.targets), torch.tensor(-1.0))
    sparse, targets = theta.to_sparse_csr(), solution.targets
    exact = plain(logits.detach().double().requires_grad_(), lambda fc: fc @ theta.double().T, targets)

    def error(gradient: Tensor) -> float:
        return float((gradient - exact).abs().max() / exact.abs().max())

    def contender(name: str, run: Callable[[], Tensor], note: str = "") -> harness.Contender:
        return harness.Contender(name, run, error=error, limit=1e-5, note=note)

    return harness.Case(
        f"regulariser k {k}",
        {"B": B, "n": n, "T": T, "k": k},
        ours=contender("ours", lambda: torch.autograd.grad(regularizer(logits), logits)[0]),
        peers=[
            contender("dense product", lambda: plain(logits, lambda fc: fc @ theta.T, targets), "Theta [T, n]"),
            contender("sparse product", lambda: plain(logits, lambda fc: (sparse @ fc.T).T, targets), "Theta in CSR"),
        ],
    )


def plain(logits: Tensor, residual: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Gradient of mean R, each step an operation that autograd records."""
    fc = logits - logits.mean(0)
    ratios = residual(fc).square().mean(0) / fc[:, targets].square().mean(0).clamp_min(1e-8)
    return torch.autograd.grad(ratios.mean(), logits)[0]


# ------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study, prints tables, appends JSON lines."""
    parser = studies.parser("Trains with and without penalties built from dependencies.", seeds=10)
    parser.add_argument("--cost", action="store_true", help="time forward and backward instead")
    options = parser.parse_args(argv)
    console = Console(width=max(Console().width, harness.TABLE_WIDTH))
    if options.cost:
        for k in (10, 30, 50):
            record = harness.measure(cost_case(k), harness.Budget.of(options.quick))
            harness.print_record(record, console)
            studies.append(options, "dependency_regularizer cost", record)
        return 0
    plan, seeds = (QUICK, 2) if options.quick else (Plan(), options.seeds)
    with harness.threads_limited(1):
        for source, digits in studies.sources(options.source):
            runs = study(digits, source, plan, seeds)
            title = f"Regulariser, pairs of {source.name}, {seeds} seeds"
            text = studies.table(title, HEADER, rows(runs), console)
            studies.write_markdown(options, text)
            for (name, strength), found in runs.items():
                record = {"source": source.name, "penalty": name, "strength": strength, "plan": vars(plan)}
                studies.append(options, "dependency_regularizer", record | {"runs": [vars(run) for run in found]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
