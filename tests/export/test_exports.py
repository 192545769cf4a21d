"""Writing models: what is written is proven, what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quark_core
from quark_core import Encoding, Plan, QuantizedModel, QuantizerSpec
from quark_core.batch import Batch
from quark_core.errors import ExportError, QuantizationError, UnknownNameError
from quark_core.export import encodings, pt2, write_export
from quark_core.registry import registry


@pytest.fixture
def quantized() -> QuantizedModel:
    """A small model quantized by native."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return quark_core.quantize(model, {"name": "native", "weight": "int8/channel"})


BATCH = Batch((torch.randn(4, 8),))


def _native() -> Any:
    return registry().get("quantizer", "native")


def test_checkpoint_is_what_the_backend_loads(quantized: QuantizedModel, tmp_path: Path) -> None:
    path = write_export("checkpoint", quantized, tmp_path, BATCH, _native())
    assert path == tmp_path / "checkpoint"
    assert any(file.suffix == ".safetensors" for file in path.iterdir())


def test_program_computes_the_same_after_loading(quantized: QuantizedModel, tmp_path: Path) -> None:
    path = write_export("pt2", quantized, tmp_path, BATCH, _native())
    found = torch.export.load(path).module()(*BATCH.args)
    assert torch.equal(found, quantized(*BATCH.args))


def test_program_needs_an_example(quantized: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pt2 needs an example batch"):
        pt2.export(quantized, tmp_path / "x.pt2", None)


class Branching(nn.Module):
    """Cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Bare(QuantizedModel):
    """A model of a backend that can do nothing extra."""

    def encodings(self) -> list[Encoding]:
        return []


def test_program_that_torch_refuses_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"export pt2: torch.export refuses the quantized model"):
        pt2.export(Bare(Branching(), Plan(())), tmp_path / "x.pt2", BATCH)
    assert list(tmp_path.iterdir()) == []


def test_unknown_form(quantized: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown exporter 'onnxx'"):
        write_export("onnxx", quantized, tmp_path, BATCH, _native())


def test_backend_that_can_do_nothing_extra_says_so(tmp_path: Path) -> None:
    bare = Bare(nn.Linear(1, 1), Plan(()))
    with pytest.raises(ExportError, match="Bare cannot be saved"):
        bare.save(tmp_path)
    with pytest.raises(ExportError, match="Bare has no export format 'onnx'"):
        bare.export("onnx", tmp_path)
    with pytest.raises(QuantizationError, match=r"layer 'a': Bare cannot switch layers"):
        bare.set_enabled("a", False)
    assert bare.layer("nowhere") is None
    assert bare.counterpart("a") == "a"


def test_exporter_that_fails_is_named(quantized: QuantizedModel, tmp_path: Path) -> None:
    from quark_core.registry.specs import Capabilities

    class Failing(Bare):
        def export(self, name: str, path: Path) -> Path:
            raise ValueError("disk full of cats")

    spec = QuantizerSpec("odd", "a.b:C", "a.b:D", capabilities=Capabilities(exports=("mine",)))
    with registry().temporary() as found:
        found.register(spec)
        entry = found.get("quantizer", "odd")
        with pytest.raises(
            ExportError, match=r"backend odd: writing 'mine' raised ValueError .disk"
        ):
            write_export("mine", Failing(nn.Linear(1, 1), Plan(())), tmp_path, BATCH, entry)


def test_long_tensors_go_beside_the_json(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 64))
    quantized = quark_core.quantize(model, {"name": "native", "weight": "int4/group:4"})
    path = encodings.export(quantized, tmp_path / "encodings.json", None)
    (row,) = json.loads(path.read_text())["encodings"]
    assert row["scale"] == {"file": "encodings.safetensors", "key": "0.weight.scale"}
    stored = load_file(tmp_path / "encodings.safetensors")["0.weight.scale"]
    (encoding,) = quantized.encodings()
    assert encoding.scale is not None
    assert torch.equal(stored, encoding.scale)
