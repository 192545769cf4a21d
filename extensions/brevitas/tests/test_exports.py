"""Exported files compute what the module computes, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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

    def write(subject: Any, path: Path, batched: bool) -> None:
        path.write_bytes(b"x")
        path.with_name("weights.bin").write_bytes(b"x")

    def run(subject: Any, path: Path, call: Any) -> dict[str, Tensor]:
        return {"sqnr_db": call.run(subject.module) * 1.01}

    monkeypatch.setitem(exports._FORMS, "torch_qcdq", exports._Form(write, run, ".pt"))
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


class Fixed(nn.Module):
    """Takes one sample and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.reshape(1, 12))
        return out


@pytest.mark.parametrize("name", ["onnx_qcdq", "qonnx", "torch_qcdq", "pt2"])
def test_models_of_one_sample_are_written_so(tmp_path: Path, name: str) -> None:
    if "onnx" in name:
        pytest.importorskip("onnxoptimizer")
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **STATIC))
    quantized = quantizer.quantize(Fixed().eval(), [torch.randn(1, 3, 4)])
    written = quantized.export(name, tmp_path / name)
    facts = json.loads((tmp_path / f"{written.name}.report.json").read_text())["facts"]
    assert facts["samples"].startswith("1 only: ")


def test_an_onnx_file_has_the_models_names_and_an_open_axis(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxoptimizer")
    _, _, quantized = _quantized(**STATIC)
    written = quantized.export("onnx_qcdq", tmp_path / "x")
    graph = onnx.load(str(written)).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes["x"] == ["batch", 3, 4, 4]
    assert axes["output"] == ["batch", 5]
    facts = json.loads((tmp_path / "x.onnx.report.json").read_text())["facts"]
    assert facts["samples"] == "any number: run with 1 and 3"


def test_a_second_export_takes_the_place_of_the_first(tmp_path: Path) -> None:
    _, _, quantized = _quantized(**STATIC)
    first = quantized.export("torch_qcdq", tmp_path / "x")
    held = first.stat().st_ino
    assert quantized.export("torch_qcdq", tmp_path / "x") == first
    assert first.stat().st_ino != held
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "x.pt.report.json"}


def test_a_refused_export_leaves_the_file_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxoptimizer")
    from quark_brevitas import onnx_file

    _, _, quantized = _quantized(**STATIC)
    written = quantized.export("onnx_qcdq", tmp_path / "x")
    content = written.read_bytes()
    # Of 1141 weights 216 + 64 + 640 are codes.
    monkeypatch.setattr(onnx_file, "LARGEST", 1500)
    with pytest.raises(ExportError, match=r"the model's tensors take .* GB.*Use pt2"):
        quantized.export("qonnx", tmp_path / "y")
    assert written.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"x.onnx", "x.onnx.report.json"}
    assert quantized.export("onnx_qcdq", tmp_path / "x") == written


class Odd(nn.Module):
    """Calls what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.inner = Fold()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.fc(x))
        return out


class Fold(nn.Module):
    """A function without a counterpart in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Stubborn(nn.Module):
    """Raises as soon as it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise LookupError("not today.\nAnd not tomorrow.")
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        (Odd, "onnx_qcdq", r"layer 'inner': onnx_qcdq cannot hold the model \(Unsupported.*bessel"),
        (Odd, "qonnx", r"layer 'inner': qonnx cannot hold the model"),
        (
            nn.Sequential,
            "torch_qcdq",
            r"layer '1': torch_qcdq cannot hold the model \(LookupError: not today",
        ),
        (
            nn.Sequential,
            "onnx_qcdq",
            r"layer '1': onnx_qcdq cannot hold the model \(LookupError: not today",
        ),
        (nn.Sequential, "pt2", r"layer '1': pt2 cannot hold the model \("),
    ],
)
def test_what_exporters_raise_becomes_a_sentence_that_names_the_layer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], model: Any, name: str, words: str
) -> None:
    if "onnx" in name:
        pytest.importorskip("onnxoptimizer")
    parts = (nn.Linear(12, 12), Stubborn()) if model is nn.Sequential else ()
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **STATIC))
    quantized = quantizer.quantize(model(*parts).eval(), [torch.randn(2, 12)])
    with pytest.raises(ExportError, match=words) as caught:
        quantized.export(name, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert "graph(" not in capfd.readouterr().out


def test_a_module_in_training_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)).eval()
    fields = {**STATIC, "merge_bn": False}
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    quantized = quantizer.quantize(model, [torch.randn(8, 12)])
    quantized.module.train()
    before = {name: tensor.clone() for name, tensor in quantized.module.state_dict().items()}
    for name in ("torch_qcdq", "pt2"):
        quantized.export(name, tmp_path / name)
    after = quantized.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(
        part.training for part in quantized.module.modules() if isinstance(part, nn.BatchNorm1d)
    )


def test_arguments_that_are_no_tensors_stay_as_in_the_example(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor, twice: bool = False, mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.fc(x) * (2 if twice else 1)
            return out

    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **STATIC))
    data = [{"x": torch.randn(4, 12), "twice": True, "mask": None}]
    quantized = quantizer.quantize(Scaled().eval(), data)
    written = quantized.export("torch_qcdq", tmp_path / "x")
    with torch.no_grad():
        x = data[0]["x"]
        assert torch.equal(torch.jit.load(str(written))(x), quantized.module(x, twice=True))


def test_rotations_are_the_same_in_a_form_that_exporters_hold() -> None:
    from brevitas.graph.hadamard import matmul_hadU
    from quark_brevitas.portable import _Rotation

    for size in (16, 12, 96, 172):
        x = torch.randn(3, 2, size)
        assert torch.equal(_Rotation(size)(x), matmul_hadU(x))


def _llama(**fields: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**LLAMA, **fields})
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("name", ["pt2", "onnx_qcdq"])
def test_models_that_keep_keys_and_values(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, data = _llama(use_cache=True), [{"input_ids": torch.randint(64, (2, 7))}]
    config = BrevitasConfig(name="brevitas", weight="int8", input="int8")
    quantized = BrevitasQuantizer(config).quantize(model, data)
    quantized.export(name, tmp_path / "model")
    with torch.no_grad():
        assert quantized(**data[0]).past_key_values is not None


@pytest.mark.parametrize("name", ["gguf", "onnx_qcdq"])
def test_half_precision_is_told_apart_from_a_wrong_file(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, data = _llama().to(torch.bfloat16), [{"input_ids": torch.randint(64, (2, 7))}]
    fields = {"weight": "int4/group:32"} if name == "gguf" else {"weight": "int8", "input": "int8"}
    config = BrevitasConfig.model_validate(
        {"name": "brevitas", **fields, "awq": {"steps": 4, "mode": "fused"}}
    )
    quantized = BrevitasQuantizer(config).quantize(model, data)
    with pytest.raises(ExportError, match="Load the model in float32"):
        quantized.export(name, tmp_path / "model")
    assert not list(tmp_path.iterdir())
