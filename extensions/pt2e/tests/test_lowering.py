"""Integer programs: bit-exact on TOSA's reference model, compiled by Vela."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quark_pt2e import schemes
from quark_pt2e.backends.arm import EthosUBackend, VgfBackend
from quark_pt2e.config.arm import EthosUConfig, VgfConfig
from quark_pt2e.lowering import edge, stages, tosa, vela, vgf
from torch import nn

from quark_core.batch import Batch
from quark_core.errors import ExportError, MissingDependencyError

GOLDEN = Path(__file__).parent / "golden"
INT8, A16W8, UINT8 = schemes.int8(), schemes.a16w8(), schemes.uint8_io()
CONFIGS: dict[str, dict[str, Any]] = {
    "int8_global": INT8,
    "int8_global_per_tensor": schemes.int8(per_channel=False),
    "int8_set_io_uint8": {
        **INT8,
        "rules": [{"io": "input", **UINT8}, {"io": "output", **UINT8}],
    },
    "name_block1_pw_a16w8": {**INT8, "rules": [{"name": "block1.pw", **A16W8}]},
    "type_block_a16w8": {**INT8, "rules": [{"type": "Block", **A16W8}]},
    "a16w8_global": A16W8,
    "a8w4_global": schemes.a8w4(),
}
HISTOGRAMS = {
    "int8_global": {0: 146, 1: 10, 2: 4},
    "name_block1_pw_a16w8": {0: 148, 1: 9, 2: 3},
    "a16w8_global": {0: 99, 1: 58, 2: 3},
}


def _quantize(model: nn.Module, inputs: Any, **config: Any) -> Any:
    quantizer = EthosUBackend(EthosUConfig(name="ethos-u", target="ethos-u85-256", **config))
    quantized = quantizer.quantize(
        model, [torch.from_numpy(image[None]) for image in inputs["calib"]]
    )
    quantized.float_model = model
    quantized.evaluation = [(torch.from_numpy(inputs["test"]), torch.arange(16) % 10)]
    return quantized


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_integer_outputs_are_those_of_direct_calls(
    name: str, golden_model: nn.Module, golden_inputs: Any
) -> None:
    quantized = _quantize(golden_model, golden_inputs, **CONFIGS[name])
    lowered = tosa.lower(quantized, quantized.export_program())
    assert len(edge.delegates(lowered)) == 1
    run = edge.IntegerProgram(lowered)
    images = [Batch((torch.from_numpy(image[None]),)) for image in golden_inputs["test"]]
    found = torch.cat([run(image)[0] for image in images]).double()
    numbers = stages.Probe(quantized, layers=False).scales[0]
    assert numbers is not None
    assert numbers.scale is not None
    codes = (found / numbers.scale.double()).round() + numbers.zero_point
    expected = np.load(GOLDEN / "outputs.npz")[f"{name}__tosa_int"]
    apart = np.abs(codes.long().numpy() - expected.astype(np.int64))
    # The reference model is exact; a scale whose last bit another processor rounds otherwise may
    # move a value over a tie.
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 0.02
    if name in HISTOGRAMS:
        comparison = tosa.check(quantized, lowered)
        found_steps, known = comparison.tallies["output"].histogram, HISTOGRAMS[name]
        # The integers are exact; the floats beside them round to another step where the order of
        # a sum moves them over a tie, which differs between processors.
        assert max(found_steps) == max(known)
        assert sum(found_steps.values()) == sum(known.values())
        assert found_steps[0] == pytest.approx(known[0], rel=0.1)


@pytest.mark.slow
def test_exports(golden_model: nn.Module, golden_inputs: Any, tmp_path: Path) -> None:
    quantized = _quantize(
        golden_model, golden_inputs, **INT8, more_targets=["ethos-u55-128"], check_samples=5
    )
    # What a resumed run exports is the saved model, loaded again.
    (tmp_path / "saved").mkdir()
    quantized.save(tmp_path / "saved")
    again: Any = EthosUBackend(quantized.config).restore(golden_model, tmp_path / "saved")
    again.float_model, again.evaluation = quantized.float_model, quantized.evaluation
    for name in ("ethos-u", "tosa"):
        again.export(name, tmp_path / name)
    device = json.loads((tmp_path / "ethos-u" / "report.json").read_text())
    rows = {
        row[0]: dict(zip(device["tables"][0]["columns"], row, strict=True))
        for row in device["tables"][0]["rows"]
    }
    assert set(rows) == {"ethos-u85-256", "ethos-u55-128"}
    for target, row in rows.items():
        assert int(row["CPU ops"]) == 0 < int(row["NPU ops"])
        assert int(row["cycles"]) > 10_000
        assert int(row["MACs"]) > 190_000
        program = (tmp_path / "ethos-u" / f"{target}.pte").read_bytes()
        assert program[4:6] == b"ET"
        assert len(program) == int(row[".pte bytes"])
        assert "Network summary" in (tmp_path / "ethos-u" / f"{target}.vela.txt").read_text()
        numbers = device["metrics"]
        assert numbers[f"{target} cycles"] == int(row["cycles"])
        assert numbers[f"{target} off-chip KiB"] == float(row["off-chip KiB"])
    # U55's weights lie in flash, U85's in the same memory as everything else.
    assert float(rows["ethos-u55-128"]["off-chip KiB"]) > 1
    told = json.loads((tmp_path / "tosa" / "report.json").read_text())
    assert told["facts"]["samples compared"] == "5"
    assert told["metrics"]["samples compared"] == 5
    assert 0.5 < told["metrics"]["equal output codes"] <= 1
    if told["metrics"]["equal output codes"] < 1:
        assert told["metrics"]["sqnr integer against fake-quant dB"] > 25
    assert told["facts"]["left to the CPU"] == "nothing"
    layers = [row[0] for row in told["tables"][0]["rows"]]
    assert {"output", "block1.pw", "block2.add", "head"} <= set(layers)
    assert (tmp_path / "tosa" / "part0.tosa").stat().st_size > 20_000


@pytest.mark.slow
def test_several_parts_are_added_up(
    golden_model: nn.Module, golden_inputs: Any, tmp_path: Path
) -> None:
    rules = [{"name": "block2", "skip": True}]
    quantized = _quantize(golden_model, golden_inputs, **INT8, rules=rules)
    quantized.export("ethos-u", tmp_path / "ethos-u")
    told = json.loads((tmp_path / "ethos-u" / "report.json").read_text())
    assert "2 convolution" in told["facts"]["left to the CPU, ethos-u85-256"]
    row = dict(zip(told["tables"][0]["columns"], told["tables"][0]["rows"][0], strict=True))
    assert 0 < int(row["MACs"]) < 190_000


def test_vgf_files(
    golden_model: nn.Module,
    golden_inputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = VgfConfig(name="vgf", **INT8)
    images = torch.from_numpy(golden_inputs["calib"])
    quantized = VgfBackend(config).quantize(golden_model, [images])
    with monkeypatch.context() as changed:
        changed.delenv("MODEL_CONVERTER_PATH", raising=False)
        changed.setattr(vgf.shutil, "which", lambda *_args, **_more: None)
        with pytest.raises(MissingDependencyError, match=r"model converter.*quark-pt2e\[vgf\]"):
            quantized.export("vgf", tmp_path / "vgf")
    assert not (tmp_path / "vgf").exists()
    scripts = sysconfig.get_path("scripts")
    if not (shutil.which("model-converter") or shutil.which("model-converter", path=scripts)):
        pytest.skip("Arm's model converter is not installed: pip install quark-pt2e[vgf]")
    quantized.export("vgf", tmp_path / "vgf")
    assert (tmp_path / "vgf" / "part0.vgf").read_bytes()[:4] == b"VGF1"
    assert (tmp_path / "vgf" / "model.pte").read_bytes()[4:6] == b"ET"
    told = json.loads((tmp_path / "vgf" / "report.json").read_text())
    assert told["metrics"]["VGF programs"] == 1
    assert told["metrics"]["operations left to the CPU"] == 0


def test_onnx_needs_its_packages(
    golden_model: nn.Module,
    golden_inputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized = _quantize(golden_model, golden_inputs, **INT8)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"quark-pt2e\[onnx\]"):
        quantized.export("onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8_global", "a16w8_global"])
def test_onnx_runs_and_agrees(
    name: str, golden_model: nn.Module, golden_inputs: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="pip install quark-pt2e[onnx]")
    quantized = _quantize(golden_model, golden_inputs, **CONFIGS[name])
    quantized.export("onnx", tmp_path / "onnx")
    told = json.loads((tmp_path / "onnx" / "report.json").read_text())
    assert (tmp_path / "onnx" / "model.onnx").stat().st_size == told["metrics"]["bytes"]
    assert "QuantizeLinear" in told["facts"]["operations"]
    assert told["metrics"]["samples compared"] == 16
    if told["metrics"]["equal output codes"] < 1:
        assert told["metrics"]["sqnr onnxruntime against fake-quant dB"] > 30


def test_figures_of_parts() -> None:
    part = {
        "cycles_total": "10.0",
        "sram_total_bytes": "5",
        "dram_total_bytes": "1",
        "off_chip_flash_total_bytes": "2",
        "nn_macs": "100",
        "sram_memory_used": "1.5",
        "dram_memory_used": "0.0",
        "off_chip_flash_memory_used": "3.25",
        "inference_time": "0.001",
    }
    found = vela.add([part, {**part, "sram_memory_used": "2.5"}])
    assert found["cycles"] == 20
    assert found["SRAM KiB"] == 2.5
    assert found["off-chip KiB"] == 3.25
    assert found["off-chip traffic bytes"] == 6
    assert found["ms"] == "2.000"
    printed = "CPU operators = 1 (5.0%)\nNPU operators = 12 (95.0%)\n" * 2
    assert vela.operators(printed, 2) == {"NPU ops": 24, "CPU ops": 2}


def test_nothing_to_lower(golden_model: nn.Module, golden_inputs: Any, tmp_path: Path) -> None:
    rules = [{"io": "input", **INT8}, {"io": "output", **INT8}]
    quantized = _quantize(golden_model, golden_inputs, rules=rules)
    with pytest.raises(ExportError, match="no part of the model is integer arithmetic"):
        quantized.export("tosa", tmp_path / "tosa")
    assert not (tmp_path / "tosa").exists()
