"""Numbers as text: strict JSON, quantiles that leave NaN out, short cells of tables."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor


def json_text(content: Any) -> str:
    """Indented strict JSON with a list of numbers on one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text) + "\n"


def quantile(values: Tensor, q: float) -> float:
    """Quantile of the values that are not NaN; NaN where there is none."""
    known = values[~values.isnan()]
    return float(known.double().quantile(q)) if len(known) else math.nan


def cell(value: float | Tensor, digits: int = 2) -> str:
    """A number of a table; a dash for NaN."""
    return "-" if math.isnan(value) else f"{float(value):.{digits}f}"


def without_nan(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def written(text: str, path: str | Path | None) -> str:
    """`text`, also written to `path` if given."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
