"""What an export tells of itself: a JSON file that the run's report shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quark_core.errors import MissingDependencyError

REPORT = "report.json"


def write(
    folder: Path,
    title: str,
    facts: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> None:
    """Write ``report.json``: facts by name, tables with title, columns and rows, and numbers."""
    data = {
        "title": title,
        "facts": dict(facts),
        "tables": list(tables),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }
    (folder / REPORT).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table as the report wants it: texts throughout."""
    return {
        "title": title,
        "columns": list(columns),
        "rows": [[_text(cell) for cell in row] for row in rows],
    }


def missing(what: str, install: str, error: ImportError) -> MissingDependencyError:
    """The error for a tool that is not installed."""
    return MissingDependencyError(
        f"{what} is not installed",
        where="export",
        cause=str(error),
        fix=f"pip install {install!r}",
    )


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
