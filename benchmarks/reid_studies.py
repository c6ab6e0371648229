"""What do the parts of a method of re-identification bring on rendered pedestrians? Variants paired by seed.

`python -m benchmarks.reid_studies mid` runs all variants of benchmarks/reid_mid.py for 5 seeds, on two processes of one
thread each, and prints a table. A module of variants has

    VARIANTS: names (or a dict by name), the first one being what the others are compared with
    run(variant, seed, steps) -> metrics by name, such as mAP, rank-1, mINP and re-ranked mAP; `steps` has a default

Every run is appended to benchmarks/results/<date>-reid.jsonl when it ends; what is recorded there for the same method,
variant, seed and steps is not run again, so that an interrupted study goes on where it was.

Numbers are means over seeds and, after ±, their standard deviations, in percent. Gains are paired by seed with the 95 %
interval of Student's t; p is that of the two-sided paired t test, not corrected for the number of variants.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from scipy.stats import ttest_rel

from benchmarks import digit_studies as studies
from benchmarks import harness

BENCH = "reid"
TESTED = ("mAP", "re-ranked mAP")  # metrics whose gain over the first variant is shown
Key = tuple[str, int]  # variant, seed


def timed_run(method: str, variant: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Metrics of one training on one thread, and its seconds."""
    begin = time.perf_counter()
    with harness.threads_limited(1), contextlib.redirect_stderr(io.StringIO()):  # without bars of its own
        metrics = _module(method).run(variant, seed, **({} if steps is None else {"steps": steps}))
    return {"metrics": {name: float(value) for name, value in metrics.items()}, "seconds": time.perf_counter() - begin}


def _module(method: str) -> Any:
    return importlib.import_module(f"benchmarks.reid_{method.replace('-', '_')}")


def methods() -> list[str]:
    """Those that have a module of variants."""
    here = Path(__file__)
    names = (path.stem.removeprefix("reid_") for path in here.parent.glob("reid_*.py") if path != here)
    return sorted(name.replace("_", "-") for name in names)


# ------------------------------------------------------------------------------------------------ records


def recorded(path: Path, method: str, steps: int | None) -> dict[Key, dict[str, float]]:
    """Metrics in a file of results, by variant and seed; those of a later line replace earlier ones."""
    found: dict[Key, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line)
        if (record["bench"], record["method"], record["steps"]) == (BENCH, method, steps):
            found[record["variant"], record["seed"]] = record["metrics"]
    return found


def finished_runs(method: str, keys: Sequence[Key], steps: int | None, workers: int) -> Iterator[tuple[Key, Any]]:
    """Results of runs as they end."""
    if workers == 0:
        for key in keys:
            yield key, timed_run(method, *key, steps)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context) as pool:
        waiting: dict[Future[Any], Key] = {pool.submit(timed_run, method, *key, steps): key for key in keys}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_study(
    method: str, variants: Sequence[str], seeds: int, steps: int | None, path: Path, workers: int
) -> dict[Key, dict[str, float]]:
    """Metrics of all variants and seeds; those not yet recorded in `path` are run and appended."""
    found = recorded(path, method, steps)
    missing = [(variant, seed) for seed in range(seeds) for variant in variants if (variant, seed) not in found]
    runs: Iterable[tuple[Key, Any]] = finished_runs(method, missing, steps, workers) if missing else ()
    facts = {"schema": harness.SCHEMA, "bench": BENCH, **harness.machine()}
    for (variant, seed), result in track(
        runs, method, len(missing), console=Console(stderr=True), transient=True, disable=not missing
    ):
        record = {"method": method, "variant": variant, "seed": seed, "steps": steps, **result}
        harness.append_record(path, facts | studies.rounded(record))
        found[variant, seed] = studies.rounded(result)["metrics"]
    return {(variant, seed): found[variant, seed] for variant in variants for seed in range(seeds)}


# ------------------------------------------------------------------------------------------------ table


def table_rows(
    runs: Mapping[Key, Mapping[str, float]], variants: Sequence[str], seeds: int
) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    names = list(runs[variants[0], 0])
    tested = [name for name in TESTED if name in names]
    header = ["variant", *names, *(word for name in tested for word in (f"gain in {name}", "p"))]

    def values(variant: str, name: str) -> list[float]:
        return [runs[variant, seed][name] for seed in range(seeds)]

    rows = []
    for variant in variants:
        cells = [variant, *(mean_and_deviation(values(variant, name)) for name in names)]
        for name in tested:
            own, base = values(variant, name), values(variants[0], name)
            if variant == variants[0]:
                cells += ["-", "-"]
            else:
                gains = [a - b for a, b in zip(own, base, strict=True)]
                gain = studies.percent(gains, signed=True) if seeds > 1 else f"{100 * gains[0]:+.1f}"
                cells += [gain, p_value(own, base)]
        rows.append(cells)
    return header, rows


def mean_and_deviation(values: Sequence[float]) -> str:
    """In percent; the deviation of the sample, none for one value."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def p_value(values: Sequence[float], base: Sequence[float]) -> str:
    """Of the two-sided paired t test; a dash for fewer than two seeds or where nothing differs."""
    if len(values) < 2 or values == base:
        return "-"
    p = float(ttest_rel(values, base).pvalue)
    return "-" if math.isnan(p) else f"{p:.2g}"


# ------------------------------------------------------------------------------------------------ command


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.reid_studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("method", choices=methods(), help="whose variants")
    result.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each variant, default 5")
    result.add_argument("--steps", type=int, metavar="N", help="steps of a training; default: those of the method")
    result.add_argument("--variant", action="append", metavar="NAME", help="only this one and the first; repeatable")
    result.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread, default 2")
    result.add_argument("--results", type=Path, metavar="FILE", help="instead of benchmarks/results/<date>-reid.jsonl")
    result.add_argument("--markdown", type=Path, metavar="FILE", help="the table is appended here")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study, prints its table."""
    options = parser().parse_args(argv)
    variants = list(_module(options.method).VARIANTS)
    for name in options.variant or ():
        if name not in variants:
            parser().error(f"argument --variant: must be one of {', '.join(variants)}, not {name!r}")
    if options.variant:
        variants = [name for name in variants if name == variants[0] or name in options.variant]
    if options.seeds < 1 or options.workers < 0 or (options.steps is not None and options.steps < 1):
        parser().error("--seeds and --steps must be positive, --workers 0 or more")
    day = datetime.date.today().isoformat()
    path = options.results or harness.ROOT / "benchmarks" / "results" / f"{day}-reid.jsonl"
    runs = run_study(options.method, variants, options.seeds, options.steps, path, options.workers)
    header, rows = table_rows(runs, variants, options.seeds)
    console = Console(width=max(Console().width, harness.TABLE_WIDTH))
    length = "" if options.steps is None else f", {options.steps} steps"
    title = f"{options.method} on rendered pedestrians, {options.seeds} seeds{length}, percent"
    studies.write_markdown(options, studies.table(title, header, rows, console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
