"""How well can a network be extended to categories that it was not trained on? `python -m benchmarks.unseen_categories`

Task: pairs of digits, 100 categories (see data/digits.py), 20 of them unseen, chosen anew for every seed such that each
digit is missing twice on either side. The base network (two hidden layers) is trained on pairs of the 80 others. The
scorer, a small convolutional network, is trained on its own on all 100. Dependencies of its 20 logits on the 80 of the
base come from unlabelled pairs of other pictures; accuracy is measured on pairs of pictures used nowhere else.

Ways to have all 100 categories, and what labels they use beyond those of the two trainings: see
`analysis.unseen_categories`. "labels" counts labelled pairs, the same number of each category, seen and unseen.
Numbers are means over seeds with 95 % intervals of Student's t. The protocol is ours, inspired by arXiv 2211.12339.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import digit_studies as studies
from benchmarks import harness
from neuraldeps_kernels.analysis.unseen_categories import Outputs, UnseenCategoriesReport, unseen_categories
from neuraldeps_kernels.data.digits import NUM_PAIRS, Digits, digit_pairs, pair_names

HEADER = ("way", "labels", "seen %", "unseen %", "overall %", "among unseen %")


@dataclass(frozen=True)
class Plan:
    """How long and how much to train, and what to try."""

    epochs: int = 20
    pairs: int = 5000
    fit_pairs: int = 4000
    test_pairs: int = 4000
    shots: tuple[int, ...] = (1, 5, 20)  # labelled pairs of every category
    lam_ratios: tuple[float, ...] = (0.3, 0.1, 0.02, 0.005)


QUICK = Plan(epochs=3, pairs=600, fit_pairs=400, test_pairs=300, shots=(1,), lam_ratios=(0.02,))


def scorer_network(height: int, width: int, seed: int) -> nn.Sequential:
    """Two convolutions and a linear head for all pairs."""
    torch.manual_seed(seed + 10_000)
    size = 24 * ((height + 1) // 2) * ((width + 1) // 2)
    body = (nn.Unflatten(1, (1, height)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
    return nn.Sequential(
        *body, nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(size, NUM_PAIRS)
    )


def trained(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """`net` after training with cross-entropy, in eval mode."""
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch, wanted in studies.batches(images, labels, generator):
            optimizer.zero_grad()
            cross_entropy(net(batch), wanted).backward()
            optimizer.step()
    return net.eval()


def unseen_pairs(seed: int) -> Tensor:
    """20 of the 100 categories, each digit twice on the left and twice on the right: int64 [20], ascending."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=generator)
    left = torch.arange(10)
    return torch.cat([10 * left[order] + left[order.roll(step)] for step in (1, 4)]).sort().values


def networks_and_parts(
    digits: Digits, source: studies.Source, plan: Plan, seed: int
) -> tuple[Outputs, Outputs, tuple[str, ...]]:
    """What base and scorer say about the pairs for fitting and for testing, with labels, and the categories' names."""
    unseen = unseen_pairs(seed)
    seen = torch.tensor([c for c in range(NUM_PAIRS) if c not in set(unseen.tolist())])
    number = torch.empty(NUM_PAIRS, dtype=torch.int64)  # category -> its place among the seen, then the unseen
    number[torch.cat([seen, unseen])] = torch.arange(NUM_PAIRS)
    train, held_out, test = digits.split(source.pictures, seed)
    images, labels = digit_pairs(train, plan.pairs, seed)
    known = number[labels] < len(seen)
    size = images.shape[1:]
    base = trained(studies.network(*size, len(seen), seed), images[known], number[labels][known], plan.epochs, seed)
    scorer = trained(scorer_network(*size, seed), images, number[labels], plan.epochs, seed + 1)

    @torch.no_grad()
    def outputs(part: Digits, count: int, offset: int) -> Outputs:
        pictures, categories = digit_pairs(part, count, seed + offset)
        features, scores = base[0](pictures), scorer(pictures)
        return Outputs(base[1](features), scores[:, len(seen) :], scores[:, : len(seen)], features, number[categories])

    names = pair_names()
    order = [names[c] for c in torch.cat([seen, unseen]).tolist()]
    return outputs(held_out, plan.fit_pairs, 1), outputs(test, plan.test_pairs, 2), tuple(order)


def first_of_each(outputs: Outputs, shots: int) -> Outputs:
    """The first `shots` samples of every category, or all that there are."""
    rows = torch.cat([(outputs.labels == c).nonzero()[:shots, 0] for c in range(NUM_PAIRS)])
    parts = (outputs.base, outputs.scorer, outputs.scorer_seen, outputs.features, outputs.labels)
    return Outputs(*(part[rows] for part in parts))


def reports(fit: Outputs, test: Outputs, names: tuple[str, ...], plan: Plan) -> dict[str, UnseenCategoriesReport]:
    """A report for every penalty without labels, and for every number of labels at the last but one penalty."""
    found = {
        f"ratio {ratio:g}": unseen_categories(fit, test, lam_ratio=ratio, category_names=names)
        for ratio in plan.lam_ratios
    }
    for shots in plan.shots:
        labelled = first_of_each(fit, shots)
        found[f"{shots} a category"] = unseen_categories(fit, test, labelled=labelled, category_names=names)
    return found


def table_rows(by_seed: Sequence[dict[str, UnseenCategoriesReport]]) -> list[list[str]]:
    """A row for every way, without repeating what does not depend on the penalty or the labels."""
    result = []
    for key, first in by_seed[0].items():
        by_ratio = key.startswith("ratio")
        for i, entry in enumerate(first.accuracies):
            if entry.labels_used == 0 and not (by_ratio and (i == 0 or key == next(iter(by_seed[0])))):
                continue
            found = [reports[key].accuracies[i] for reports in by_seed]
            name = entry.name
            if i == 0 and by_ratio:
                k = studies.interval([sum(r[key].support) / len(r[key].support) for r in by_seed])[0]
                error = studies.interval([sum(r[key].residual_ratio) / len(r[key].support) for r in by_seed])[0]
                name = f"{name}, {key}: k {k:.0f}, R {error:.2f}"
            shares = ([getattr(a, share) for a in found] for share in ("seen", "unseen", "overall", "among_unseen"))
            result.append([name, str(entry.labels_used), *(studies.percent(values) for values in shares)])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study, prints tables, appends JSON lines."""
    options = studies.parser("Adds categories to a trained network through dependencies.", seeds=8).parse_args(argv)
    console = Console(width=max(Console().width, harness.TABLE_WIDTH))
    plan, seeds = (QUICK, 2) if options.quick else (Plan(), options.seeds)
    with harness.threads_limited(1):
        for source, digits in studies.sources(options.source):
            by_seed = []
            for seed in range(seeds):
                fit, test, names = networks_and_parts(digits, source, plan, seed)
                by_seed.append(reports(fit, test, names, plan))
            title = f"Unseen categories, pairs of {source.name}, {seeds} seeds"
            studies.write_markdown(options, studies.table(title, HEADER, table_rows(by_seed), console))
            for key in by_seed[0]:
                runs = [found[key].to_dict() for found in by_seed]
                for run in runs:
                    del run["categories"]  # hundreds of coefficients a run
                record = {"source": source.name, "case": key, "plan": vars(plan), "runs": runs}
                studies.append(options, "unseen_categories", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
