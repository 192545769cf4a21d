"""Comparing recipes and backends: one model, one calibration set, one evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quark_core.errors import ConfigError, Problem, QuarkError
from quark_core.execution import Executor, InProcess, Reporter, Silent
from quark_core.recipe.folder import read_json, write_json
from quark_core.recipe.load import LoadedRecipe
from quark_core.recipe.run import folder_for, run_recipe

_SHARED = ("model", "data", "evaluate", "device")
_PATHS = ("factory", "checkpoint", "path")


def compare(
    recipes: Sequence[LoadedRecipe],
    root: Path | None = None,
    name: str = "comparison",
    *,
    reporter: Reporter | None = None,
    executor: Executor | None = None,
) -> Path:
    """Run several recipes under one calibration set and one evaluation.

    Args:
        recipes: At least two; they may differ in quantizer and exports only.
        root: Folder that holds the comparison's; by default the first recipe's ``output``.
        name: Name of the comparison's folder.
        reporter: Told how the runs go.
        executor: Where the runs take place; by default in this process.

    Returns:
        The folder with comparison.json, report.html and the run folders.

    Raises:
        ConfigError: Fewer than two recipes, or they differ in what must be the same.
    """
    _require_same(recipes)
    recipes = _named_apart(recipes)
    folder = ((root or Path(recipes[0].recipe.output)) / name).resolve()
    report = reporter or Silent()

    def task(loaded: LoadedRecipe) -> dict[str, Any]:
        try:
            run_recipe(loaded, root=folder, reporter=report, reuse=(folder.parent,))
        except QuarkError as error:
            report.warn(f"{loaded.name}: {error}")
            return _row(loaded, folder, str(error))
        return _row(loaded, folder, None)

    rows = list((executor or InProcess()).map(task, recipes))
    write_json(folder / "comparison.json", _summary(rows))
    from quark_core.report.html import write_report

    write_report(folder)
    return folder


def _require_same(recipes: Sequence[LoadedRecipe]) -> None:
    if len(recipes) < 2:
        raise ConfigError(
            [Problem("compare", "needs two recipes, or one and two --quantizer values")]
        )
    first = recipes[0]
    problems = []
    for other in recipes[1:]:
        for section in _SHARED:
            if _content(first, section) != _content(other, section):
                problems.append(
                    Problem(
                        section,
                        f"differs between {first.name} and {other.name}: what is compared must "
                        "be the same model under the same data and evaluation",
                        str(other.file) if other.file else None,
                    )
                )
    if problems:
        raise ConfigError(problems)


def _content(loaded: LoadedRecipe, section: str) -> Any:
    """A section's content with its files made absolute; gates may differ."""
    data = loaded.recipe.model_dump(mode="json")[section]
    if section == "evaluate":
        return {key: value for key, value in data.items() if key != "require"}
    if section == "model":
        return _absolute(data, loaded.folder)
    if section == "data":
        return {part: _absolute(data[part], loaded.folder) for part in data}
    return data


def _absolute(section: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    if section is None:
        return None
    return {
        key: str((folder / value).resolve()) if key in _PATHS and isinstance(value, str) else value
        for key, value in section.items()
    }


def _named_apart(recipes: Sequence[LoadedRecipe]) -> list[LoadedRecipe]:
    """Recipes of one name get the backend's name added, then a number."""
    counts = Counter(loaded.name for loaded in recipes)
    seen: Counter[str] = Counter()
    result = []
    for loaded in recipes:
        name = loaded.name
        if counts[name] > 1:
            name = f"{name}-{loaded.config.name.replace(':', '-')}"
            seen[name] += 1
            if seen[name] > 1:
                name = f"{name}-{seen[name]}"
        result.append(replace(loaded, recipe=loaded.recipe.model_copy(update={"name": name})))
    return result


def _row(loaded: LoadedRecipe, root: Path, error: str | None) -> dict[str, Any]:
    path = folder_for(loaded, root)
    config = loaded.config
    specs = [getattr(config, role) for role in ("weight", "input", "output", "bias")]
    row: dict[str, Any] = {
        "name": loaded.name,
        "folder": path.name,
        "quantizer": config.name,
        "specs": " + ".join(str(spec) for spec in specs if spec is not None),
        "metrics": {},
        "quantized_bytes": None,
        "seconds": {},
        "gates": [],
        "error": error,
        "float": {},
        "float_bytes": None,
        "hashes": {},
    }
    if error is not None:
        return row
    metrics, manifest = read_json(path / "metrics.json"), read_json(path / "manifest.json")
    row.update(
        metrics=metrics["quantized"],
        quantized_bytes=metrics["size"]["quantized_bytes"],
        seconds={stage: manifest["stages"][stage]["seconds"] for stage in ("quantize", "evaluate")},
        gates=metrics["gates"],
        float=metrics["float"],
        float_bytes=metrics["size"]["float_bytes"],
        hashes=manifest["hashes"],
    )
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["error"] is None]
    shared: dict[str, Any] = {}
    empties: dict[str, Any] = {"hashes": {}, "float": {}, "float_bytes": None}
    for key, empty in empties.items():
        values = [row[key] for row in done]
        for row, value in zip(done, values, strict=True):
            if value != values[0]:
                row["error"] = f"its {key} differ from those of {done[0]['name']}"
        shared[key] = values[0] if values else empty
    runs = [{key: value for key, value in row.items() if key not in shared} for row in rows]
    return {"schema": 1, **shared, "runs": runs}
