"""Quantizers in their own terms: by name, by import path, several in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quark_pt2e.backends.factory import FactoryBackend, PresetBackend
from quark_pt2e.config.factory import FactoryConfig, PresetConfig
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from quark_core.errors import (
    ConfigError,
    ExportError,
    MissingDependencyError,
    QuantizationError,
    QuarkError,
)
from quark_core.recipe.load import load_recipe

XNNPACK = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"
EMBEDDING = "torchao.quantization.pt2e.quantizer.embedding_quantizer:EmbeddingQuantizer"


class Words(nn.Module):
    """A table of vectors, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.hidden = nn.Linear(16, 16)
        self.act = nn.ReLU()
        self.last = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self.hidden(self.table(ids).mean(1))))
        return out


@pytest.fixture
def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1))


class OnlyAnnotates(Quantizer):  # type: ignore[misc]
    """The least a quantizer can be: it knows linear layers' inputs."""

    def __init__(self, top: int = 127) -> None:
        super().__init__()
        self._top = top

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        spec = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-self._top,
            quant_max=self._top,
            qscheme=torch.per_tensor_symmetric,
            observer_or_fake_quant_ctr=MinMaxObserver,
        )
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[0]: spec}, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def _noise(model: nn.Module, quantized: Any, inputs: Tensor) -> float:
    with torch.no_grad():
        truth, found = model(inputs), quantized(inputs)
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vulkan", {"hidden", "last"}),
        ("embedding", {"table"}),
        ("cadence", {"hidden", "last"}),
        ("cortex-m", {"hidden", "last"}),
        ("qnn", {"table", "hidden", "last"}),
    ],
)
def test_presets(name: str, layers: set[str], words: nn.Module, ids: Tensor) -> None:
    quantized = PresetBackend(PresetConfig(name=name)).quantize(words, [ids])
    weights = {entry.name for entry in quantized.plan.entries if entry.weight is not None}
    assert weights == layers
    assert _noise(words, quantized, ids) > 25


@pytest.mark.slow
def test_coreml(ids: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    inputs = ids.float() / 50
    quantized = PresetBackend(PresetConfig(name="coreml")).quantize(model, [inputs])
    assert _noise(model, quantized, inputs) > 20


def test_preset_arguments(words: nn.Module, ids: Tensor) -> None:
    config = PresetConfig(name="vulkan", config_arguments={"weight_bits": 4})
    quantized = PresetBackend(config).quantize(words, [ids])
    assert str(quantized.plan["last"].weight) == "int4/channel/sym"
    bad = PresetConfig(name="vulkan", config_arguments={"bits": 4})
    with pytest.raises(QuantizationError, match="refuses its arguments"):
        PresetBackend(bad).quantize(words, [ids])


def test_nothing_annotated_is_an_error(words: nn.Module) -> None:
    linear = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(QuantizationError, match="annotates nothing here.*linear"):
        PresetBackend(PresetConfig(name="embedding")).quantize(linear, [torch.randn(2, 4)])


def test_any_class(
    words: nn.Module, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("somebodys_package")
    module.OnlyAnnotates = OnlyAnnotates  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    config = FactoryConfig(
        name="pt2e",
        quantizer_class="somebodys_package:OnlyAnnotates",
        arguments={"top": 7},
        rules=[{"name": "hidden", "skip": True}],
    )
    backend = FactoryBackend(config)
    quantized = backend.quantize(words, [ids])
    assert [entry.name for entry in quantized.plan.quantized] == ["last"]
    assert str(quantized.plan["last"].input) == "int4/tensor/sym"
    quantized.save(tmp_path)
    again = backend.restore(words, tmp_path)
    assert torch.equal(again(ids), quantized(ids))


def test_several_in_order(words: nn.Module, ids: Tensor) -> None:
    linear = {
        "quantizer_class": f"{XNNPACK}:XNNPACKQuantizer",
        "config_factory": f"{XNNPACK}:get_symmetric_quantization_config",
        "config_arguments": {"is_per_channel": True},
    }
    config = FactoryConfig(name="pt2e", quantizers=[{"quantizer_class": EMBEDDING}, linear])
    backend = FactoryBackend(config)
    assert backend.describe() == "EmbeddingQuantizer, then XNNPACKQuantizer"
    quantized = backend.quantize(words, [ids])
    weights = {entry.name: str(entry.weight) for entry in quantized.plan.quantized if entry.weight}
    assert weights == {
        "table": "uint8/channel/asym",
        "hidden": "int8/channel/sym",
        "last": "int8/channel/sym",
    }
    twice = FactoryConfig(
        name="pt2e", quantizers=[{"quantizer_class": EMBEDDING}, {"quantizer_class": EMBEDDING}]
    )
    with pytest.raises(QuantizationError, match="EmbeddingQuantizer overwrites"):
        FactoryBackend(twice).quantize(words, [ids])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantizer_class": "nowhere.at_all:Thing"}, MissingDependencyError, "cannot import"),
        ({"quantizer_class": "torch.nn:Linear"}, QuantizationError, "is no torchao Quantizer"),
        ({"quantizer_class": f"{XNNPACK}:XNNPACKQuantiser"}, QuantizationError, "Did you mean"),
        ({"config_method": "set_globl"}, QuantizationError, "Did you mean 'set_global'"),
        ({"config_arguments": {"bits": 3}}, QuantizationError, "refuses its arguments"),
    ],
)
def test_wrong_paths_and_arguments(
    changes: dict[str, Any], error: type[Exception], message: str, words: nn.Module, ids: Tensor
) -> None:
    fields = {
        "quantizer_class": f"{XNNPACK}:XNNPACKQuantizer",
        "config_factory": f"{XNNPACK}:get_symmetric_quantization_config",
    }
    config = FactoryConfig(name="pt2e", **{**fields, **changes})
    with pytest.raises(error, match=message):
        FactoryBackend(config).quantize(words, [ids])


def test_refused_configurations() -> None:
    with pytest.raises(ConfigError, match="chooses formats itself"):
        PresetConfig(name="vulkan", weight="int8")
    with pytest.raises(ConfigError, match="either quantizer_class or quantizers"):
        FactoryConfig(name="pt2e")
    with pytest.raises(ConfigError, match="is no import path"):
        FactoryConfig(name="pt2e", quantizer_class="XNNPACKQuantizer")


def test_import_paths_are_code() -> None:
    recipe = {
        "version": 1,
        "model": {"source": "python", "factory": "a:b"},
        "quantizer": {"name": "pt2e", "quantizer_class": "os:system"},
        "nonsense": 1,
    }
    # With a fault of its own, the recipe is told everything at once.
    with pytest.raises(QuarkError, match="quantizer 'pt2e' runs Python code"):
        load_recipe(recipe, allow_code=False)


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.mark.slow
def test_cortex_m_kernels(layers: nn.Module, tmp_path: Path) -> None:
    inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    quantized = PresetBackend(PresetConfig(name="cortex-m")).quantize(layers, [inputs])
    quantized.float_model, quantized.evaluation = layers, [inputs]
    quantized.export("cortex-m", tmp_path / "out")
    assert (tmp_path / "out" / "model.pte").read_bytes()[4:6] == b"ET"
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "2 quantized_linear" in told["facts"]["Cortex-M kernels"]
    assert told["facts"]["left to portable operators"] == "nothing"
    assert told["metrics"]["samples compared"] == 32
    assert told["metrics"]["equal output codes"] > 0.8
    assert told["metrics"]["largest difference LSB"] <= 2


@pytest.mark.slow
def test_vulkan_programs(layers: nn.Module, tmp_path: Path) -> None:
    quantized = PresetBackend(PresetConfig(name="vulkan")).quantize(layers, [torch.randn(8, 16)])
    quantized.export("vulkan", tmp_path / "out")
    assert (tmp_path / "out" / "model.pte").read_bytes()[4:6] == b"ET"
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["metrics"]["Vulkan parts"] == 1
    with pytest.raises(ExportError, match=r"no export 'cortex-m'.*vulkan, onnx, pt2"):
        quantized.export("cortex-m", tmp_path / "other")
