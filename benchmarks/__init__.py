"""Benchmarks against other packages, run from a checkout: `python -m benchmarks covlasso --quick`; see README.md."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# OpenBLAS reads these when NumPy loads it; a foreign core type may halve the rate of the peers' matrix products.
_SLOWS_PEERS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks named in `argv` (default: the command line) and returns the exit status.

    Where the environment would slow NumPy, they run in a process of their own without those variables.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(name in os.environ for name in _SLOWS_PEERS):
        environment = {name: value for name, value in os.environ.items() if name not in _SLOWS_PEERS}
        root = Path(__file__).resolve().parents[1]
        return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], env=environment, cwd=root).returncode
    from benchmarks.harness import run_command

    return run_command(arguments)
