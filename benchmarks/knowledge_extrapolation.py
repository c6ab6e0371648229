"""How well does each method move one factor of a generator of shapes and keep the others? A study over seeds.

`python -m benchmarks.knowledge_extrapolation` trains for each of 5 seeds a generator of shapes and two probes of its
factors, moves hue, x and size by 1.5 deviations with every method of `compare_extrapolations`, and prints means over
seeds ± their standard deviations. One probe is the knowledge, the other the independent scorer, also of the factors
that are to stay. `--faces` adds the mean brightness of a real face generator, told by a probe trained on its pictures
(needs the package gan-face-generate).

Every run is appended to benchmarks/results/<date>-extrapolation.jsonl when it ends; runs recorded there are not run
again. One thread; numbers describe this generator alone, and are ours: none is of the paper that the method is a
reconstruction of.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import digit_studies as studies
from benchmarks import harness
from neuraldeps_kernels.analysis.extrapolation import METHODS, UNCHANGED, ExtrapolationReport, compare_extrapolations
from neuraldeps_kernels.data.rendered_shapes import FACTORS
from neuraldeps_kernels.models.generators import (
    PICTURE_KNOWLEDGE,
    face_generator,
    train_factor_probe,
    train_knowledge_probe,
    train_shape_generator,
)

BENCH = "extrapolation"
MOVED = ("hue", "x", "size")
FACE_KNOWLEDGE = "brightness"
BY = 1.5  # deviations
SETTINGS: dict[str, Any] = {"refresh": 5, "steps": 40}
COLUMNS = ("success", "gap", "gain", "others", "unlikeness", "logistic", "mlp", "frechet", "displacement")
COLUMNS += ("discriminator", "evaluations")


def shapes_run(seed: int, factors: Sequence[str], steps: int, samples: int) -> dict[str, ExtrapolationReport]:
    """Reports by factor on a generator of its own."""
    generator = train_shape_generator(seed=seed, steps=steps)
    told, scored = (train_factor_probe(seed=2 * seed + i, steps=steps // 2) for i in range(2))
    z0 = torch.randn(samples, generator.latent, generator=torch.Generator().manual_seed(seed))
    scorers = {name: partial(_column, scored, j) for j, name in enumerate(FACTORS)}
    return {
        name: compare_extrapolations(
            generator,
            partial(_column, told, FACTORS.index(name)),
            z0,
            by=BY,
            scorer=scorers[name],
            attributes={other: scorer for other, scorer in scorers.items() if other != name},
            prior=16 * samples,
            seed=seed,
            **SETTINGS,
        )
        for name in factors
    }


def faces_run(seed: int, samples: int) -> ExtrapolationReport:
    """Brightness of faces, by a probe; the mean over the picture itself is the scorer."""
    generator = face_generator()
    random = torch.Generator().manual_seed(seed)
    known = dict(PICTURE_KNOWLEDGE)
    scorer = known.pop(FACE_KNOWLEDGE)
    probe = train_knowledge_probe(
        generator, scorer, torch.randn(8 * samples, generator.latent, generator=random), seed=seed, steps=300
    )
    z0 = torch.randn(samples, generator.latent, generator=random)
    return compare_extrapolations(
        generator, probe, z0, by=BY, scorer=scorer, attributes=known, prior=8 * samples, seed=seed, **SETTINGS
    )


def _column(network: Callable[[Tensor], Tensor], index: int, x: Tensor) -> Tensor:
    return network(x)[:, index]


# ------------------------------------------------------------------------------------------------ records


def recorded(path: Path, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Reports in a file of results with these settings, by knowledge and seed."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line)
        if record["bench"] == BENCH and record["settings"] == settings:
            found[record["knowledge"], record["seed"]] = record["report"]
    return found


def run_study(
    path: Path, seeds: int, factors: Sequence[str], steps: int, samples: int, faces: bool, pictures: Path | None
) -> dict[tuple[str, int], dict[str, Any]]:
    """Reports by knowledge and seed; those not in `path` are run and appended."""
    settings = {"by": BY, "steps": steps, "samples": samples, **{f"descent_{k}": v for k, v in SETTINGS.items()}}
    found = recorded(path, settings)
    facts = {"schema": harness.SCHEMA, "bench": BENCH, **harness.machine(), "settings": settings}
    say = Console(stderr=True)

    def keep(name: str, seed: int, report: ExtrapolationReport, seconds: float) -> None:
        found[name, seed] = studies.rounded(report.to_dict())
        entry = {"knowledge": name, "seed": seed, "report": found[name, seed], "seconds": round(seconds, 1)}
        harness.append_record(path, facts | entry)
        if pictures is not None and seed == 0:
            report.plot(pictures / f"{name.replace(' ', '_')}.png")
        say.print(f"{name}, seed {seed}: {seconds:.0f} s")

    for seed in range(seeds):
        missing = [name for name in factors if (name, seed) not in found]
        if missing:
            begin = time.perf_counter()
            reports = shapes_run(seed, missing, steps, samples)
            for name, report in reports.items():
                keep(name, seed, report, (time.perf_counter() - begin) / len(missing))
    if faces and (f"face {FACE_KNOWLEDGE}", 0) not in found:
        begin = time.perf_counter()
        keep(f"face {FACE_KNOWLEDGE}", 0, faces_run(0, min(samples, 64)), time.perf_counter() - begin)
    wanted = [(name, seed) for name in factors for seed in range(seeds)]
    return {key: found[key] for key in wanted + ([(f"face {FACE_KNOWLEDGE}", 0)] if faces else [])}


# ------------------------------------------------------------------------------------------------ table


def study_table(runs: dict[tuple[str, int], dict[str, Any]]) -> list[list[str]]:
    """Header, then a row for each knowledge and method: means ± standard deviations over seeds."""
    rows = [["knowledge", "method", "seeds", *COLUMNS]]
    for name in dict.fromkeys(name for name, _ in runs):
        reports = [report for (other, _), report in runs.items() if other == name]
        for method in (UNCHANGED, *METHODS):
            entries = [report["methods"][method] for report in reports if method in report["methods"]]
            if entries:
                cells = [_mean_cell([entry[column] for entry in entries], column) for column in COLUMNS]
                rows.append([name, method, str(len(entries)), *cells])
    return rows


def _mean_cell(values: list[float | None], column: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 0 if column == "evaluations" else 3 if column == "unlikeness" else 2
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knowledge_extrapolation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--factors", default=",".join(MOVED), help="with commas")
    parser.add_argument("--steps", type=int, default=1200, help="of training the generator; probes take half")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--faces", action="store_true")
    parser.add_argument("--results", type=Path, help="file of records")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of seed 0")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    options = parser.parse_args(argv)
    today = datetime.date.today().isoformat()
    path = options.results or harness.ROOT / "benchmarks" / "results" / f"{today}-extrapolation.jsonl"
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    factors = options.factors.split(",")
    with harness.threads_limited(1):
        runs = run_study(path, options.seeds, factors, options.steps, options.samples, options.faces, options.pictures)
    header, *rows = study_table(runs)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=harness.TABLE_WIDTH + 60).print(table)
    if options.markdown is not None:
        lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
        options.markdown.write_text("".join(f"| {line} |\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
