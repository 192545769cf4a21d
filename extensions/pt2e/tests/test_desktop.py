"""XNNPACK and Inductor: as direct calls, with our rules, running on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from quark_pt2e.backends.desktop import ArmInductorBackend, X86InductorBackend, XnnpackBackend
from quark_pt2e.config.desktop import ArmInductorConfig, X86InductorConfig, XnnpackConfig
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from quark_core.errors import ConfigError, QuantizationError, UnmatchedRuleError

INT8 = {"weight": "int8/channel", "input": "int8/mse"}


@pytest.fixture
def images(golden_inputs: Any) -> Tensor:
    return torch.from_numpy(golden_inputs["calib"])


def _direct(model: nn.Module, images: Tensor, quantizer: Any) -> Tensor:
    graph = torch.export.export(model, (images[:1],)).module(check_guards=False)
    prepared = prepare_pt2e(graph, quantizer)
    for image in images:
        prepared(image[None])
    converted = convert_pt2e(prepared)
    return torch.cat([converted(image[None]) for image in images])


def test_xnnpack_as_direct_calls(golden_model: nn.Module, images: Tensor) -> None:
    theirs = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    expected = _direct(golden_model, images, theirs)
    config = XnnpackConfig(name="xnnpack", batch="static", **INT8)
    quantized = XnnpackBackend(config).quantize(golden_model, list(images[:, None]))
    assert torch.equal(quantized(images), expected)


def test_x86_as_direct_calls(golden_model: nn.Module, images: Tensor) -> None:
    theirs = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    expected = _direct(golden_model, images, theirs)
    config = X86InductorConfig(name="x86-inductor", batch="static", **INT8)
    quantized = X86InductorBackend(config).quantize(golden_model, list(images[:, None]))
    assert torch.equal(quantized(images), expected)
    assert quantized.plan["head"].input is not None
    assert quantized.plan["head"].input.format == "uint8"


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        (XnnpackBackend, XnnpackConfig),
        (X86InductorBackend, X86InductorConfig),
        (ArmInductorBackend, ArmInductorConfig),
    ],
)
def test_the_last_rule_wins(
    backend: Any, config: Any, golden_model: nn.Module, images: Tensor
) -> None:
    weight = "int8/tensor" if config is ArmInductorConfig else "int8/channel"
    rules = [{"type": "Block", "skip": True}, {"name": "block1.pw"}, {"op": "linear", "skip": True}]
    built = config(name="x", weight=weight, input="int8", rules=rules)
    plan = backend(built).make_plan(golden_model, images)
    quantized = {entry.name for entry in plan.entries if entry.weight is not None}
    assert quantized == {"stem", "block1.pw", "expand"}
    assert not plan["block2.add"].quantized
    assert plan["block2.add"].rule == "rules[0] (type: Block)"
    assert plan["head"].reason == "left out by the rule"


def test_unknown_names_are_errors(golden_model: nn.Module, images: Tensor) -> None:
    config = XnnpackConfig(name="xnnpack", **INT8, rules=[{"name": "blok1", "skip": True}])
    with pytest.raises(UnmatchedRuleError, match=r"rules\[0\] \(name: blok1\).*block1"):
        XnnpackBackend(config).make_plan(golden_model, images)


def test_dynamic_inputs(golden_model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = XnnpackConfig(name="xnnpack", weight="int8/channel", input="int8/dynamic")
    quantized = XnnpackBackend(config).quantize(golden_model, [images])
    rows = {row.tensor: row for row in quantized.encodings()}
    assert rows["head.input"].dynamic
    assert rows["head.input"].scale is None
    assert rows["head.weight"].scale is not None
    assert not quantized.plan.needs_calibration
    quantized.export("xnnpack", tmp_path / "xnnpack")
    told = json.loads((tmp_path / "xnnpack" / "report.json").read_text())
    assert int(told["facts"][".pte bytes"]) > 0


@pytest.mark.slow
def test_xnnpack_runs_in_its_runtime(
    golden_model: nn.Module, golden_inputs: Any, images: Tensor, tmp_path: Path
) -> None:
    quantized = XnnpackBackend(XnnpackConfig(name="xnnpack", **INT8)).quantize(
        golden_model, [images]
    )
    quantized.float_model = golden_model
    quantized.evaluation = [torch.from_numpy(golden_inputs["test"])]
    quantized.export("xnnpack", tmp_path / "xnnpack")
    told = json.loads((tmp_path / "xnnpack" / "report.json").read_text())
    assert told["facts"]["samples compared"] == "16"
    assert int(told["facts"]["largest difference"].removesuffix(" LSB")) <= 8
    against = told["facts"]["runtime against fake-quant"]
    assert float(against.removesuffix(" dB")) > 25
    assert (tmp_path / "xnnpack" / "model.pte").read_bytes()[4:6] == b"ET"
    # Layer by layer: what the runtime computes inside.
    assert told["facts"]["program with layers as outputs"] == "same outputs"
    layers = {row[0]: row for row in told["tables"][2]["rows"]}
    assert {"block1.pw", "block2.add", "expand", "head"} <= layers.keys()
    assert int(layers["block1.dw"][5]) <= 2
    # Roundings add up from layer to layer.
    assert float(layers["block1.dw"][3]) > float(layers["head"][3]) + 5
    numbers = told["metrics"]
    assert numbers["sqnr runtime against fake-quant dB"] == pytest.approx(
        float(against.removesuffix(" dB")), abs=0.06
    )
    assert numbers[".pte bytes"] == (tmp_path / "xnnpack" / "model.pte").stat().st_size


@pytest.mark.slow
def test_inductor_compiles(
    golden_model: nn.Module, golden_inputs: Any, images: Tensor, tmp_path: Path
) -> None:
    config = X86InductorConfig(name="x86-inductor", **INT8)
    quantized = X86InductorBackend(config).quantize(golden_model, [images])
    quantized.float_model = golden_model
    quantized.evaluation = [torch.from_numpy(golden_inputs["test"])]
    quantized.export("inductor", tmp_path / "inductor")
    told = json.loads((tmp_path / "inductor" / "report.json").read_text())
    programs = [row[0] for row in told["tables"][0]["rows"]]
    assert programs == ["int8 compiled", "float compiled", "float eager"]
    assert float(told["tables"][1]["rows"][0][3]) > 30
    assert told["facts"]["program with layers as outputs"].startswith(("same outputs", "outputs "))
    assert {"block1.add", "block2.add"} <= {row[0] for row in told["tables"][-1]["rows"]}
    assert told["metrics"]["float compiled ms"] > 0
    assert told["metrics"]["speedup over float compiled"] > 0


def test_saved_and_loaded(golden_model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    backend = X86InductorBackend(X86InductorConfig(name="x86-inductor", **INT8))
    quantized = backend.quantize(golden_model, [images])
    quantized.save(tmp_path)
    again = backend.restore(golden_model, tmp_path)
    assert torch.equal(again(images), quantized(images))
    ours = {row.tensor: row for row in quantized.encodings()}
    theirs = {row.tensor: row for row in again.encodings()}
    assert ours.keys() == theirs.keys()
    assert again.size_bytes() == quantized.size_bytes()
    assert quantized.storage()["_frozen_param0"] == 8 * 3 * 3 * 3


def test_pt2_is_loaded_in_another_process(
    golden_model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    backend = X86InductorBackend(X86InductorConfig(name="x86-inductor", **INT8))
    quantized = backend.quantize(golden_model, [images])
    file = quantized.export("pt2", tmp_path / "pt2")
    torch.save(images[:3], tmp_path / "images.pt")
    torch.save(quantized(images[:3]), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from quark_pt2e import load_program\n"
        "images, expected = torch.load(sys.argv[2]), torch.load(sys.argv[3])\n"
        "found = load_program(sys.argv[1]).module()(images)\n"
        "assert torch.allclose(found, expected, atol=1e-5)\n"
    )
    arguments = [str(file), str(tmp_path / "images.pt"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


class Twice(nn.Module):
    """One activation module behind a convolution and behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(4, 4, 3, padding=1), nn.ReLU()
        self.hidden, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.act(self.conv(x))
        out: Tensor = self.last(self.act(self.hidden(x.mean(1))))
        return out


def test_modules_called_twice_are_refused_in_plain_words() -> None:
    backend = X86InductorBackend(X86InductorConfig(name="x86-inductor", **INT8))
    with pytest.raises(QuantizationError, match="calls of a module called several times"):
        backend.make_plan(Twice().eval(), torch.randn(2, 4, 16))


def test_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="weight and input together"):
        XnnpackConfig(name="xnnpack", input="int8")
    with pytest.raises(ConfigError, match="cannot mix static and dynamic"):
        X86InductorConfig(
            name="x86-inductor",
            **INT8,
            rules=[{"op": "linear", "input": "int8/dynamic"}],
        )
    with pytest.raises(ConfigError, match=r"input\.format"):
        XnnpackConfig(name="xnnpack", weight="int8", input="int16")
