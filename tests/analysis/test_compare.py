"""Comparing backends: one float baseline, one calibration set, one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quark_core.analysis.compare import compare
from quark_core.errors import ConfigError
from quark_core.recipe.load import load_recipe

Write = Callable[..., Path]


def test_two_backends_under_the_same_data(recipe: Write, tmp_path: Path) -> None:
    loaded = [load_recipe(recipe(), quantizer=name) for name in ("native", "brevitas")]
    folder = compare(loaded, tmp_path, "both")
    found = json.loads((folder / "comparison.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["small-native", "small-brevitas"]
    assert all(run["error"] is None for run in found["runs"])
    assert len(found["hashes"]["calibration"]) == 32
    manifests = [
        json.loads((folder / run["folder"] / "manifest.json").read_text()) for run in found["runs"]
    ]
    assert manifests[0]["hashes"] == manifests[1]["hashes"] == found["hashes"]
    metrics = [
        json.loads((folder / run["folder"] / "metrics.json").read_text()) for run in found["runs"]
    ]
    assert metrics[0]["float"] == metrics[1]["float"] == found["float"]
    assert (folder / "report.html").exists()


def test_the_float_model_is_evaluated_once(recipe: Write, tmp_path: Path) -> None:
    loaded = [
        load_recipe(recipe(), overrides=[f"quantizer.weight={text}", f"name={name}"])
        for name, text in (("a", "int8"), ("b", "mxfp4"), ("c", "int4/group:4"))
    ]
    folder = compare(loaded, tmp_path, "three")
    found = json.loads((folder / "comparison.json").read_text())
    records = [
        json.loads((folder / run["folder"] / "manifest.json").read_text())["stages"]["float"]
        for run in found["runs"]
    ]
    assert len({record["finished"] for record in records}) == 1
    assert len({record["seconds"] for record in records}) == 1


def test_a_failing_recipe_does_not_stop_the_others(recipe: Write, tmp_path: Path) -> None:
    bad = load_recipe(
        recipe({"quantizer.rules": [{"name": "lats", "skip": True}], "name": "bad"}, "bad.yaml")
    )
    folder = compare([bad, load_recipe(recipe())], tmp_path, "mixed")
    bad_row, good_row = json.loads((folder / "comparison.json").read_text())["runs"]
    assert "rules[0] (name: lats) matches no layer (nearest: last)" in bad_row["error"]
    assert good_row["error"] is None
    assert good_row["metrics"]["sqnr"] > 30


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.kwargs", {"width": 24}),
        ("data.calibration.batch_size", 4),
        ("evaluate.batches", 1),
    ],
)
def test_what_differs_cannot_be_compared(
    recipe: Write, tmp_path: Path, path: str, value: object
) -> None:
    one = load_recipe(recipe())
    other = load_recipe(recipe({path: value, "name": "other"}, "other.yaml"))
    with pytest.raises(ConfigError) as caught:
        compare([one, other], tmp_path)
    section = path.split(".", maxsplit=1)[0]
    assert f"{section}: differs between small and other: what is compared must be" in str(
        caught.value
    )


def test_gates_may_differ(recipe: Write, tmp_path: Path) -> None:
    one = load_recipe(recipe())
    other = load_recipe(recipe({"evaluate.require": {"sqnr": ">= 500"}, "name": "strict"}))
    folder = compare([one, other], tmp_path)
    rows = json.loads((folder / "comparison.json").read_text())["runs"]
    assert [len(row["gates"]) for row in rows] == [0, 1]


def test_one_recipe_alone_is_refused(recipe: Write) -> None:
    with pytest.raises(ConfigError, match="needs two recipes, or one and two --quantizer values"):
        compare([load_recipe(recipe())])
