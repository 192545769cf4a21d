"""A run leaves what it promises, does nothing twice, and says clearly what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark_core.api import get_quantizer
from quark_core.errors import (
    AccuracyGateError,
    ConfigError,
    DataError,
    ExportError,
    QuantizationError,
    RunFolderError,
    UnmatchedRuleError,
)
from quark_core.plan import Plan
from quark_core.recipe.load import load_recipe
from quark_core.recipe.run import folder_for, plan_recipe, run_recipe

Write = Callable[..., Path]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_leaves_what_it_promises(recipe: Write, tmp_path: Path) -> None:
    result = run_recipe(load_recipe(recipe()), root=tmp_path / "runs")
    names = {path.name for path in result.folder.iterdir()}
    assert {
        "manifest.json",
        "plan.json",
        "encodings.json",
        "metrics.json",
        "report.html",
        "quantized",
        "export",
    } <= names
    manifest = _read(result.folder / "manifest.json")
    assert manifest["status"] == "finished"
    assert list(manifest["stages"]) == ["float", "plan", "quantize", "evaluate", "export", "report"]
    assert all(stage["peak_memory_bytes"] > 10**7 for stage in manifest["stages"].values())
    assert {"torch", "quark-core", "quark-native", "python"} <= set(manifest["versions"])
    assert {"model", "code", "calibration", "evaluation"} == set(manifest["hashes"])
    assert {path.name for path in (result.folder / "export").iterdir()} == {
        "checkpoint",
        "encodings.json",
    }
    metrics = _read(result.folder / "metrics.json")
    assert 0 <= metrics["float"]["accuracy"] <= 1
    assert metrics["quantized"]["sqnr"] > 30
    assert [layer["name"] for layer in metrics["layers"]] == ["first", "last"]
    assert metrics["size"]["quantized_bytes"] < metrics["size"]["float_bytes"]


def test_encodings_hold_scale_and_zero_point(recipe: Write, tmp_path: Path) -> None:
    result = run_recipe(load_recipe(recipe()), root=tmp_path)
    rows = {row["tensor"]: row for row in _read(result.folder / "encodings.json")["encodings"]}
    assert set(rows) == {"first.weight", "first.input", "last.weight", "last.input"}
    assert len(rows["first.weight"]["scale"]) == 16
    assert rows["first.input"]["zero_point"] != 0
    assert rows["last.input"]["min"] <= 0


def test_a_finished_run_is_not_done_again(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe())
    first = run_recipe(loaded, root=tmp_path)
    second = run_recipe(loaded, root=tmp_path)
    assert first.reused == ()
    assert set(second.reused) == {"float", "plan", "quantize", "evaluate", "export", "report"}
    assert second.metrics == first.metrics


@pytest.mark.parametrize(
    ("file", "again"),
    [("metrics.json", "evaluate"), ("encodings.json", "quantize"), ("plan.json", "plan")],
)
def test_a_damaged_file_is_made_anew(recipe: Write, tmp_path: Path, file: str, again: str) -> None:
    loaded = load_recipe(recipe())
    first = run_recipe(loaded, root=tmp_path)
    before = (first.folder / file).read_bytes()
    (first.folder / file).write_text("{}")
    second = run_recipe(loaded, root=tmp_path)
    assert again not in second.reused
    assert (first.folder / file).read_bytes() == before


def test_unchanged_stages_are_taken_from_a_run_beside(recipe: Write, tmp_path: Path) -> None:
    run_recipe(load_recipe(recipe()), root=tmp_path)
    other = run_recipe(load_recipe(recipe(), overrides=["quantizer.weight=mxfp4"]), root=tmp_path)
    assert other.reused == ("float",)


def test_changed_weights_change_everything(recipe: Write, tmp_path: Path) -> None:
    run_recipe(load_recipe(recipe()), root=tmp_path)
    other = load_recipe(recipe({"model.kwargs": {"width": 24}}))
    assert run_recipe(other, root=tmp_path).reused == ()


def test_changed_code_counts(recipe: Write, project: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from quark_core.recipe.load import load_recipe;"
        "from quark_core.recipe.run import run_recipe;"
        f"print(run_recipe(load_recipe(Path({str(recipe())!r})), root=Path({str(tmp_path)!r})).reused)"
    )

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    run()
    assert run() != "()"
    code = project / "model.py"
    code.write_text(code.read_text() + "\n# another comment\n")
    assert run() == "()"


def test_missed_gate_comes_after_the_results(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe({"evaluate.require": {"sqnr": ">= 500"}}))
    result = run_recipe(loaded, root=tmp_path)
    assert (result.folder / "report.html").exists()
    with pytest.raises(AccuracyGateError, match=r"sqnr is \d\d\.\d+, required is >= 500"):
        result.require_gates()


def test_folder_of_another_recipe_is_kept(recipe: Write, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    first = run_recipe(load_recipe(recipe()), folder=folder)
    before = (first.folder / "metrics.json").read_bytes()
    other = load_recipe(recipe(), overrides=["quantizer.weight=mxfp4"])
    with pytest.raises(RunFolderError, match="holds a run of another recipe .small.*--overwrite"):
        run_recipe(other, folder=folder)
    assert (first.folder / "metrics.json").read_bytes() == before
    assert run_recipe(other, folder=folder, overwrite=True).metrics != first.metrics


def test_folder_with_other_files_is_kept(recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="holds files that are not a run's"):
        run_recipe(load_recipe(recipe()), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name == "thesis.tex"]


def test_damaged_manifest_says_what_to_do(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe())
    folder = folder_for(loaded, tmp_path)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{not json")
    with pytest.raises(RunFolderError, match=r"manifest.json cannot be read .* Delete the folder"):
        run_recipe(loaded, root=tmp_path)


def test_failed_run_is_marked_and_goes_on_later(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe({"quantizer.rules": [{"name": "lats", "skip": True}]}))
    with pytest.raises(UnmatchedRuleError, match=r"rules\[0\] \(name: lats\).*nearest: last"):
        run_recipe(loaded, root=tmp_path)
    folder = folder_for(loaded, tmp_path)
    manifest = _read(folder / "manifest.json")
    assert manifest["status"] == "failed"
    assert list(manifest["stages"]) == ["float"]
    assert not list(folder.glob(".work-*"))


def test_nothing_to_quantize_is_an_error(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe({"quantizer.rules": [{"glob": "*", "skip": True}]}))
    with pytest.raises(QuantizationError, match="nothing would be quantized: no layer has a spec"):
        run_recipe(loaded, root=tmp_path)


def test_metrics_without_labels_or_data(recipe: Write, tmp_path: Path) -> None:
    loaded = load_recipe(recipe({"data.evaluation.target": None}))
    with pytest.raises(
        DataError, match="metric 'accuracy' needs labels, the evaluation data have none"
    ):
        run_recipe(loaded, root=tmp_path)
    with pytest.raises(ConfigError, match="data.evaluation: missing, but evaluate.metrics asks"):
        load_recipe(recipe({"data.evaluation": None}))


def test_a_model_that_cannot_take_the_data(recipe: Write, project: Path, tmp_path: Path) -> None:
    np.savez(project / "bytes.npz", x=np.zeros((8, 8), np.uint8), wide=np.zeros((8, 9), np.float32))
    for name, part, words in (
        ("wide", "evaluation", r"batch 1: the float model cannot take \(float32 \[8, 9\]\) .*mat1"),
        ("x", "evaluation", r"cannot take \(uint8 \[8, 8\]\) .*normalize turns bytes into floats"),
        (
            "wide",
            "calibration",
            r"calibration data: the float model cannot take \(float32 \[1, 9\]",
        ),
    ):
        data = {"source": "npz", "path": "bytes.npz", "input": name}
        loaded = load_recipe(recipe({f"data.{part}": data, "evaluate": {"metrics": ["sqnr"]}}))
        with pytest.raises(DataError, match=words) as caught:
            run_recipe(loaded, root=tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_an_output_folder_that_cannot_be_made(recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made .*Choose another folder or output"):
        run_recipe(load_recipe(recipe()), root=tmp_path / "file")


def test_plan_reads_without_writing(recipe: Write, tmp_path: Path) -> None:
    plan = plan_recipe(load_recipe(recipe()))
    assert [entry.name for entry in plan.entries] == ["first", "last"]
    assert plan.needs_calibration
    assert not (tmp_path / "runs").exists()


def test_plan_warnings_are_kept_when_the_plan_is_reused(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, loaded = get_quantizer("native"), load_recipe(recipe())
    plan = quantizer.plan

    def warned(self: Any, *arguments: Any) -> Plan:
        return replace(plan(self, *arguments), warnings=("careful",))

    monkeypatch.setattr(quantizer, "plan", warned)
    for reused in (False, True):
        result = run_recipe(loaded, root=tmp_path)
        assert ("plan" in result.reused) is reused
        assert _read(result.folder / "manifest.json")["warnings"] == ["careful"]


def test_gpu_asked_for_without_one(recipe: Write, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Exception, match="device cuda is asked for, but torch sees no GPU"):
        run_recipe(load_recipe(recipe({"device": "cuda"})), root=tmp_path)
    assert run_recipe(load_recipe(recipe({"device": "auto"})), root=tmp_path).metrics


def test_brevitas_runs_the_same_recipe(recipe: Write, tmp_path: Path) -> None:
    native = run_recipe(load_recipe(recipe()), root=tmp_path)
    brevitas = run_recipe(load_recipe(recipe(), quantizer="brevitas"), root=tmp_path)
    assert brevitas.metrics["float"] == native.metrics["float"]
    assert brevitas.metrics["quantized"]["sqnr"] > 20


def test_notes_and_metrics_of_exports_are_recorded_and_shown(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quark_native.quantizer import NativeQuantizer

    from quark_core.recipe import stages
    from quark_core.report.record import load_record

    def convert(self: Any, prepared: Any, plain: Any = NativeQuantizer.convert) -> Any:
        quantized = plain(self, prepared)
        quantized.notes.append("the branch saw 3 samples")
        return quantized

    def write(name: str, *rest: Any, plain: Any = stages.write_export) -> Path:
        written: Path = plain(name, *rest)
        report = stages.report_file(written)
        assert report.parent in (written, written.parent)
        report.write_text(json.dumps({"metrics": {"cycles": 12.5}}))
        return written

    monkeypatch.setattr(NativeQuantizer, "convert", convert)
    monkeypatch.setattr(stages, "write_export", write)
    result = run_recipe(load_recipe(recipe()), root=tmp_path)
    assert _read(result.folder / "notes.json") == ["the branch saw 3 samples"]
    assert result.exports == {"checkpoint": {"cycles": 12.5}, "encodings": {"cycles": 12.5}}
    record = load_record(result.folder)
    assert {export["title"] for export in record.exports} == {"checkpoint", "encodings"}
    assert all(export["facts"] == {"cycles": "12.5"} for export in record.exports)
    page = (result.folder / "report.html").read_text()
    assert "the branch saw 3 samples" in page
    assert run_recipe(load_recipe(recipe()), root=tmp_path).exports == result.exports


def test_exports_get_a_batch_also_after_loading(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quark_core.recipe import stages

    seen = []

    def write(_name: str, quantized: Any, folder: Path, *_rest: Any) -> Path:
        seen.append(quantized.example.args[0].shape)
        (folder / "x").write_text("")
        return folder / "x"

    monkeypatch.setattr(stages, "write_export", write)
    run_recipe(load_recipe(recipe({"export": ["checkpoint"]})), root=tmp_path)
    run_recipe(load_recipe(recipe({"export": ["encodings"]})), root=tmp_path)
    assert seen == [(8, 8), (8, 8)]


def test_train_mode_is_noted() -> None:
    from torch import nn

    import quark_core

    model = nn.Sequential(nn.Linear(8, 4))
    config = {"name": "native", "weight": "int8"}
    assert "train mode" in quark_core.quantize(model.train(), config).notes[0]
    assert quark_core.quantize(model.eval(), config).notes == []


def test_an_export_that_cannot_hold_the_plan_is_refused_before_any_work(
    recipe: Write, tmp_path: Path
) -> None:
    changes = {
        "quantizer": {"name": "brevitas", "weight": "int8", "input": "int8/dynamic"},
        "export": ["checkpoint", "onnx_qcdq"],
    }
    for carry_out in (plan_recipe, lambda loaded: run_recipe(loaded, root=tmp_path)):
        with pytest.raises(ExportError, match=r"onnx_qcdq cannot hold a dynamic scale"):
            carry_out(load_recipe(recipe(changes)))
    with pytest.raises(ExportError, match=r"gguf holds transformers' Llama models, not"):
        plan_recipe(load_recipe(recipe({**changes, "export": ["gguf"]})))
    assert not list(tmp_path.rglob("quantized*"))
