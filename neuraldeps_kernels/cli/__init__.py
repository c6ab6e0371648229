"""The command `neuraldeps`: info, deps, compare, rank, rerank, eval, train, extrapolate, demo, data, bench.

Bad input: one clear line and exit status 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import neuraldeps_kernels
from neuraldeps_kernels import _info
from neuraldeps_kernels.cli import compare, data, demo, deps, extrapolate, rank, retrieval, train

app = typer.Typer(
    help="Dependency-aware neural networks: which categories a classifier expresses through which others.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(deps.deps)
app.command()(compare.compare)
app.command()(rank.rank)
app.command()(retrieval.rerank)
app.command("eval")(retrieval.evaluate)
app.command()(train.train)
app.command()(extrapolate.extrapolate)
app.command()(demo.demo)
app.add_typer(data.app, name="data")

# The base of all errors of usage, which typer does not export under one name in all its versions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, and which kernel serves each hot path."""
    facts = _info.collect()
    typer.echo(json.dumps(facts, indent=1) if as_json else _info.format(facts))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CASE]...", help="Such as covlasso; default all. Options go to the benchmarks."),
    ] = None,
) -> None:
    """Run the benchmarks of a source checkout (python -m benchmarks)."""
    root = Path(neuraldeps_kernels.__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file() or not (root / "pyproject.toml").is_file():
        raise ValueError("benchmarks are in the source repository, not in an installed package; run it from a checkout")
    command = [sys.executable, "-m", "benchmarks", *(arguments or [])]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        status = command.main(given or ["--help"], prog_name="neuraldeps", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except _UsageError as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(str(error))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print(f"neuraldeps: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
