"""What a run or a comparison left in its folder, read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_core.errors import RunFolderError
from quark_core.recipe.folder import read_json
from quark_core.registry import registry


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: Name of the run.
        folder: Where it lies.
        quantizer: Name of the backend.
        specs: The configuration's own specs in one line.
        status: running, finished, failed or interrupted.
        float_metrics: Metrics of the float model.
        metrics: Metrics of the quantized model.
        float_bytes: Size of the float model, or None before it is known.
        quantized_bytes: Packed size of the quantized model, or None.
        seconds: Time of each finished stage.
        layers: SQNR of each layer, as metrics.json has it.
        gates: Gates and whether they were kept.
        plan: What plan.json holds, or None.
        manifest: What manifest.json holds.
        notes: What the backend noted.
        exports: What exports reported of themselves: title, facts and tables.
        error: Why it failed, if it is part of a comparison and did.
    """

    name: str
    folder: Path
    quantizer: str
    specs: str
    status: str
    float_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    float_bytes: int | None = None
    quantized_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def load_records(folder: Path) -> list[RunRecord]:
    """The run in a folder, or all runs of a comparison, in its order.

    Raises:
        RunFolderError: The folder holds neither, or a file in it is damaged.
    """
    comparison = folder / "comparison.json"
    if comparison.exists():
        rows = read_json(comparison)["runs"]
        return [_of_row(folder, row) for row in rows]
    if (folder / "manifest.json").exists():
        return [load_record(folder)]
    raise RunFolderError(
        f"{folder} holds no run: neither manifest.json nor comparison.json is there",
        fix="Give the folder that `quark run` or `quark compare` printed",
    )


def load_record(folder: Path) -> RunRecord:
    """One run, as far as it got.

    Raises:
        RunFolderError: A file is missing or damaged.
    """
    manifest = read_json(folder / "manifest.json")
    metrics = _optional(folder / "metrics.json")
    size = metrics.get("size", {})
    quantizer = manifest["recipe"].get("quantizer", {})
    return RunRecord(
        name=manifest["name"],
        folder=folder,
        quantizer=manifest["quantizer"]["name"],
        specs=_specs(quantizer),
        status=manifest["status"],
        float_metrics=_numbers(metrics.get("float") or _optional(folder / "float.json")),
        metrics=_numbers(metrics.get("quantized", {})),
        float_bytes=size.get("float_bytes"),
        quantized_bytes=size.get("quantized_bytes"),
        seconds={stage: record["seconds"] for stage, record in manifest["stages"].items()},
        layers=[
            {**layer, "sqnr": None if layer["sqnr"] is None else float(layer["sqnr"])}
            for layer in metrics.get("layers", [])
        ],
        gates=metrics.get("gates", []),
        plan=_optional(folder / "plan.json") or None,
        manifest=manifest,
        notes=read_json(folder / "notes.json") if (folder / "notes.json").exists() else [],
        exports=[_export(file) for file in _export_reports(folder / "export")],
    )


def higher_is_better() -> dict[str, bool]:
    """Direction of improvement of each known metric."""
    return {entry.spec.name: entry.spec.higher_is_better for entry in registry().entries("metric")}


def _of_row(folder: Path, row: dict[str, Any]) -> RunRecord:
    place = folder / row["folder"]
    if row["error"] is None:
        return load_record(place)
    return RunRecord(
        name=row["name"],
        folder=place,
        quantizer=row["quantizer"],
        specs=row["specs"],
        status="failed",
        error=row["error"],
    )


def _specs(quantizer: dict[str, Any]) -> str:
    parts = []
    for role in ("weight", "input", "output", "bias"):
        spec = quantizer.get(role)
        if spec is not None:
            text = spec if isinstance(spec, str) else str(spec.get("format", spec))
            parts.append(f"{role} {text}")
    return ", ".join(parts)


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


def _export_reports(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*/report.json"), *folder.glob("*.report.json")])


def _export(file: Path) -> dict[str, Any]:
    found = read_json(file)
    own = file.parent.name if file.name == "report.json" else file.name.split(".")[0]
    facts, tables = found.get("facts", {}), found.get("tables", [])
    if not facts and not tables:
        facts = {name: f"{float(value):.6g}" for name, value in found.get("metrics", {}).items()}
    return {"title": found.get("title", own), "facts": facts, "tables": tables}


def _optional(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    return found
