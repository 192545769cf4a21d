"""``plan``, ``run``, ``compare`` and ``report``, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Quark = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_plan_shows_each_layer_and_the_deciding_rule(quark: Quark, recipe: Write) -> None:
    path = recipe({"quantizer.rules": [{"type": "Linear", "weight": "mxfp4", "input": None}]})
    said = quark("plan", path)
    assert said.status == 0
    first = next(line for line in said.out.splitlines() if line.startswith("first"))
    assert first.split()[:4] == ["first", "Linear", "16x8", "mxfp4_e2m1"]
    assert "rules[0] (type: Linear)" in first
    assert not Path("runs").exists()


def test_plan_of_nothing_warns(quark: Quark, recipe: Write) -> None:
    said = quark("plan", recipe({"quantizer.weight": None, "quantizer.input": None}))
    assert "warning: nothing would be quantized" in said.err


def test_plan_as_json(quark: Quark, recipe: Write) -> None:
    plan = json.loads(quark("plan", recipe(), "--json").out)
    assert plan["needs_calibration"] is True
    assert plan["layers"][0]["weight"] == "int8/channel/sym"


def test_plan_of_brevitas_lists_its_passes(quark: Quark, recipe: Write) -> None:
    said = quark(
        "plan", recipe(), "--quantizer", "brevitas", "--set", "quantizer.bias_correction=true"
    )
    assert "1. layerwise rewriting" in said.out
    assert "3. bias correction" in said.out


def test_run_prints_the_table_and_the_report(quark: Quark, recipe: Write) -> None:
    said = quark("run", recipe())
    assert said.status == 0
    assert "accuracy" in said.out
    assert "sqnr" in said.out
    report = Path(said.out.rpartition("report: ")[2].strip())
    assert report.exists()
    assert "quantize" in said.err
    again = quark("run", recipe())
    assert again.err.count("finished before") == 6
    assert again.out == said.out


def test_run_as_json_keeps_progress_off_standard_output(quark: Quark, recipe: Write) -> None:
    data = json.loads(quark("run", recipe(), "--json").out)
    assert data["quantized"]["sqnr"] > 30
    assert Path(data["folder"]).is_dir()


def test_missed_gate_exits_5_after_writing(quark: Quark, recipe: Write) -> None:
    said = quark("run", recipe({"evaluate.require": {"sqnr": ">= 500"}}))
    assert said.status == 5
    assert "required is >= 500" in said.err
    assert Path(said.out.rpartition("report: ")[2].strip()).exists()


def test_unmatched_rule_exits_4(quark: Quark, recipe: Write) -> None:
    path = recipe({"quantizer.rules": [{"name": "lats", "skip": True}]})
    for command in ("plan", "run"):
        said = quark(command, path)
        assert said.status == 4
        assert "rules[0] (name: lats) matches no layer (nearest: last)" in said.err


def test_wrong_recipe_exits_2(quark: Quark, recipe: Write) -> None:
    said = quark("run", recipe({"quantizer.weight": "int99"}))
    assert said.status == 2
    assert "quantizer.weight.format: unknown number format 'int99'" in said.err


def test_no_code_exits_2(quark: Quark, recipe: Write) -> None:
    said = quark("run", recipe(), "--no-code")
    assert said.status == 2
    assert "source 'python' runs Python code that the recipe names" in said.err


def test_failing_model_exits_1_and_traceback_is_there_for_the_asking(
    quark: Quark, recipe: Write, project: Path
) -> None:
    (project / "model.py").write_text("def build():\n    raise RuntimeError('no weights today')\n")
    said = quark("run", recipe())
    assert said.status == 1
    assert "'model.py:build' raised RuntimeError (no weights today)" in said.err
    assert "Traceback" not in said.err
    assert "Traceback" in quark("--traceback", "run", recipe()).err


def test_compare_backends(quark: Quark, recipe: Write) -> None:
    said = quark("compare", recipe(), "--quantizer", "native", "--quantizer", "brevitas")
    assert said.status == 0, said.err
    for word in ("float", "small-native", "small-brevitas", "calibration  "):
        assert word in said.out
    assert "taken from small-native" in said.err
    data = json.loads(quark("report", "runs/comparison", "--json").out)
    assert len(data["runs"]) == 2


def test_compare_with_a_failure_exits_1(quark: Quark, recipe: Write) -> None:
    bad = recipe({"quantizer.rules": [{"name": "lats", "skip": True}], "name": "bad"}, "bad.yaml")
    said = quark("compare", recipe(), bad)
    assert said.status == 1
    assert "error: bad: quantizer.rules: rules[0] (name: lats) matches no layer" in said.err
    assert "small" in said.out


def test_compare_with_a_missed_gate_exits_5(quark: Quark, recipe: Write) -> None:
    strict = recipe({"evaluate.require": {"sqnr": ">= 500"}, "name": "strict"}, "strict.yaml")
    said = quark("compare", recipe(), strict)
    assert said.status == 5
    assert "error: strict: sqnr is" in said.err


def test_report_on_a_folder_without_a_run(quark: Quark, tmp_path: Path) -> None:
    said = quark("report", tmp_path)
    assert said.status == 6
    assert "holds no run: neither manifest.json nor comparison.json is there" in said.err


def test_export_pt2_computes_the_same(quark: Quark, recipe: Write) -> None:
    import torch

    data = json.loads(quark("run", recipe({"export": ["pt2"]}), "--json").out)
    program = torch.export.load(Path(data["folder"]) / "export" / "pt2.pt2")
    assert program.module()(torch.zeros(8, 8)).shape == (8, 4)
