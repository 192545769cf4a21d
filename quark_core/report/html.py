"""One self-contained HTML file: no script is needed to read it, nothing is fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quark_core import __version__
from quark_core.recipe.folder import write_text
from quark_core.report import format as text
from quark_core.report.charts import layer_bars, size_plot
from quark_core.report.record import RunRecord, higher_is_better, load_records


def write_report(folder: Path, file: Path | None = None) -> Path:
    """Write the report of a run or comparison.

    Args:
        folder: A run folder, or a comparison's.
        file: Where to write; by default report.html in the folder.

    Returns:
        The file written, whole or not at all.

    Raises:
        RunFolderError: The folder holds no run, or a file in it is damaged.
    """
    target = file or folder / "report.html"
    write_text(target, render(load_records(folder), title=folder.name))
    return target


def render(records: Sequence[RunRecord], title: str) -> str:
    """The page as text. Everything from a recipe or model is escaped."""
    environment = Environment(
        loader=PackageLoader("quark_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    done = [record for record in records if record.metrics or record.status == "finished"]
    base = next((record for record in done if record.float_bytes), None)
    metrics = list(dict.fromkeys(name for record in done for name in record.metrics))
    page: str = environment.get_template("report.html.j2").render(
        title=records[0].name if len(records) == 1 else title,
        version=__version__,
        records=records,
        rows=[_row(record, metrics) for record in records],
        base=None if base is None else _base(base, metrics),
        metrics=metrics,
        better={name: better for name, better in higher_is_better().items() if name in metrics},
        plot=_plot(done, base, metrics),
        layers=[(record.name, layer_bars(record.layers)) for record in done if record.layers],
        plans=[(record.name, _plan(record.plan)) for record in records if record.plan],
        exports=[(record.name, export) for record in records for export in record.exports],
        stages=[(record.name, _stages(record)) for record in records if record.manifest],
        facts=_facts(records),
        warnings=[
            (record.name, warning)
            for record in records
            for warning in record.manifest.get("warnings", [])
        ],
        notes=[(record.name, note) for record in records for note in record.notes],
        recipes=[
            (record.name, json.dumps(record.manifest["recipe"], indent=2, ensure_ascii=False))
            for record in records
            if record.manifest
        ],
    )
    return page


def _base(record: RunRecord, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "metrics": [text.metric_text(name, record.float_metrics.get(name)) for name in metrics],
        "size": text.bytes_text(record.float_bytes),
    }


def _row(record: RunRecord, metrics: Sequence[str]) -> dict[str, Any]:
    missed = {gate["metric"]: gate["require"] for gate in record.gates if not gate["passed"]}
    cells = []
    for name in metrics:
        value, base = record.metrics.get(name), record.float_metrics.get(name)
        known = value is not None and base is not None and math.isfinite(value)
        cells.append(
            {
                "text": text.metric_text(name, value),
                "delta": text.delta_text(name, value, base) if known else "",  # type: ignore[arg-type]
                "missed": missed.get(name, ""),
            }
        )
    return {
        "name": record.name,
        "quantizer": record.quantizer,
        "specs": record.specs,
        "status": record.status,
        "error": record.error or "",
        "cells": cells,
        "size": text.bytes_text(record.quantized_bytes),
        "ratio": text.ratio_text(record.quantized_bytes, record.float_bytes),
        "seconds": text.seconds_text(record.seconds.get("quantize")),
    }


def _plot(
    done: Sequence[RunRecord], base: RunRecord | None, metrics: Sequence[str]
) -> dict[str, str] | None:
    """The first metric the float model has too, else the first of all, against size."""
    if base is None or not metrics:
        return None
    name = next((metric for metric in metrics if metric in base.float_metrics), metrics[0])
    points = [
        (record.name, record.quantized_bytes, record.metrics[name])
        for record in done
        if record.quantized_bytes and math.isfinite(record.metrics.get(name, math.nan))
    ]
    if not points:
        return None
    own = base.float_metrics.get(name)
    reference = None if own is None or base.float_bytes is None else (base.float_bytes, own)
    return {"metric": name, "svg": size_plot(name, points, reference)}


def _plan(plan: dict[str, Any] | None) -> list[dict[str, str]]:
    return [
        {
            "name": layer["name"] or "(model)",
            "type": layer["type"],
            "shape": "x".join(str(side) for side in layer["shape"] or []),
            **{role: layer[role] or "-" for role in ("weight", "input", "output", "bias")},
            "rule": layer["rule"] + (f": {layer['reason']}" if layer["reason"] else ""),
        }
        for layer in (plan or {}).get("layers", [])
    ]


def _stages(record: RunRecord) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "seconds": text.seconds_text(stage["seconds"]),
            "memory": text.bytes_text(stage["peak_memory_bytes"]),
            "finished": stage["finished"],
        }
        for name, stage in record.manifest["stages"].items()
    ]


def _facts(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Versions, machine and hashes; of a comparison's runs, which share all but the backend."""
    manifests = [record.manifest for record in records if record.manifest]
    if not manifests:
        return []
    versions: dict[str, str] = {}
    for manifest in manifests:
        versions.update(manifest["versions"])
    first = manifests[0]
    hardware = first["hardware"]
    return [
        *((f"version of {name}", version) for name, version in versions.items()),
        (
            "processor",
            f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads",
        ),
        ("memory", text.bytes_text(hardware["memory_bytes"])),
        ("GPU", hardware["gpu"] or "none"),
        ("seed", str(first["seed"])),
        *((f"hash of {name}", digest or "-") for name, digest in first["hashes"].items()),
    ]
