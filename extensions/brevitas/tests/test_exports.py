"""Exported files compute what the module computes, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ExportError

STATIC = {"weight": "int8", "input": "int8/sym/percentile:99.99"}


LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


class Net(nn.Module):
    """Two convolutions and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.side = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        out: Tensor = self.fc(torch.flatten(self.side(y) + y, 1))
        return out


def _quantized(**fields: Any) -> tuple[BrevitasQuantizer, nn.Module, Any]:
    torch.manual_seed(0)
    model = Net().eval()
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    return quantizer, model, quantizer.quantize(model, [torch.randn(4, 3, 4, 4)])


@pytest.mark.parametrize("name", ["onnx_qcdq", "qonnx", "torch_qcdq", "pt2"])
@pytest.mark.parametrize(
    "fields",
    [
        STATIC,
        {**STATIC, "bias": "int32", "bias_correction": True},
        {**STATIC, "backend": "fx", "bias": "int32"},
        {"weight": "int4/asym", "input": "uint8/asym", "algorithm": "gptq"},
        {"weight": "int8/tensor/power_of_two"},
    ],
)
def test_files_equal_the_module(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    if "onnx" in name:
        pytest.importorskip("onnxoptimizer")
        pytest.importorskip("onnxruntime")
    quantizer, model, quantized = _quantized(**fields)
    written = quantized.export(name, tmp_path / name)
    assert written.stat().st_size > 0
    about = json.loads((tmp_path / f"{written.name}.report.json").read_text())
    assert about["metrics"]["sqnr_db"] > 60
    folder = tmp_path / "saved"
    folder.mkdir()
    quantized.save(folder)
    again = quantizer.restore(model, folder).export(name, tmp_path / "again")
    assert again.suffix == written.suffix


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "mxfp4"}, "cannot hold mxfp4_e2m1: it holds integers only"),
        ({"weight": "int8", "input": "int8/dynamic"}, "cannot hold a dynamic scale"),
        ({"weight": "int4/group:4", "pad_groups": True}, "cannot hold groups"),
        ({"weight": "int12"}, "cannot hold 12 bits: it holds at most 8"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    _, _, quantized = _quantized(**fields)
    with pytest.raises(ExportError, match=words):
        quantized.export("torch_qcdq", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quark_brevitas import exports

    def wrong(module: nn.Module, call: Any, plan: Any, path: Path) -> dict[str, Tensor]:
        path.write_bytes(b"x")
        return {"sqnr_db": call.batch.run(module) * 1.01}

    monkeypatch.setitem(exports._FORMS, "torch_qcdq", exports._Form(wrong, ".pt"))
    _, _, quantized = _quantized(**STATIC)
    with pytest.raises(ExportError, match=r"signal to noise 40\.0 dB, at least 60 wanted"):
        quantized.export("torch_qcdq", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": "mxfp4", "input": "mxfp8_e4m3"},
        {"weight": "int4/group:4/asym", "pad_groups": True},
        {"weight": "int8", "input": "int8/dynamic"},
        {"weight": "fp8_e4m3", "input": "fp8_e4m3"},
    ],
)
def test_torch_export_holds_what_integer_files_cannot(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    _, _, quantized = _quantized(**fields)
    written = quantized.export("pt2", tmp_path / "pt2")
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        found = torch.export.load(written).module()(x)
        assert torch.equal(found, quantized(x))
    assert not any(module.training for module in quantized.module.modules())


@pytest.mark.parametrize("name", ["onnx_qcdq", "qonnx", "torch_qcdq", "pt2"])
def test_models_called_by_keyword(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if "onnx" in name:
        pytest.importorskip("onnxoptimizer")
    config = transformers.LlamaConfig(**LLAMA)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(96, (2, 12))} for _ in range(2)]
    fields = {"weight": "int8", "input": "int8/percentile:99.9"}
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    quantized = quantizer.quantize(model, data)
    written = quantized.export(name, tmp_path / name)
    about = json.loads((tmp_path / f"{written.name}.report.json").read_text())
    assert about["metrics"]["sqnr_db"] > 100


def test_unknown_forms_are_refused(tmp_path: Path) -> None:
    _, _, quantized = _quantized(**STATIC)
    with pytest.raises(ExportError, match="has no export format 'onnx'"):
        quantized.export("onnx", tmp_path / "x")
