"""Recipes give what calling the vendors' quantizers by hand gives, bit for bit, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quark_pt2e.backends.arm import EthosUBackend, TosaBackend, VgfBackend
from quark_pt2e.backends.desktop import ArmInductorBackend, X86InductorBackend
from quark_pt2e.backends.factory import PresetBackend
from quark_pt2e.config.arm import EthosUConfig, TosaConfig, VgfConfig
from quark_pt2e.config.desktop import ArmInductorConfig, X86InductorConfig
from quark_pt2e.config.factory import PresetConfig
from quark_pt2e.graph.encodings import conversion, is_dequantize, is_quantize
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

INT8 = {"weight": "int8/channel", "input": "int8/mse"}


class Mixed(nn.Module):
    """An embedding, convolutions, an addition and linear layers: something for every quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.act, self.bend = nn.ReLU(), nn.ReLU()
        self.hidden = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.act(self.conv(x))
        out: Tensor = self.last(self.bend(self.hidden(x.mean(1))))
        return out


def _arm(kind: str, spec: Callable[[], Any], **options: Any) -> Any:
    from executorch.backends.arm import quantizer

    name = options.pop("config", "get_symmetric_quantization_config")
    config = getattr(quantizer.arm_quantizer, name)
    return getattr(quantizer, kind)(spec()).set_global(config(**options))


def _ethosu(**options: Any) -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    return _arm("EthosUQuantizer", lambda: EthosUCompileSpec("ethos-u55-128"), **options)


def _tosa() -> Any:
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    return _arm("TOSAQuantizer", lambda: TosaCompileSpec("TOSA-1.0+INT+int16+int4"))


def _vgf() -> Any:
    from executorch.backends.arm.vgf import VgfCompileSpec

    return _arm("VgfQuantizer", VgfCompileSpec)


def _x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as theirs

    config = theirs.get_default_x86_inductor_quantization_config()
    return theirs.X86InductorQuantizer().set_global(config)


def _arm_inductor() -> Any:
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as theirs

    config = theirs.get_default_arm_inductor_quantization_config()
    return theirs.ArmInductorQuantizer().set_global(config)


def _cortex_m() -> Any:
    from executorch.backends.cortex_m.quantizer.quantizer import CortexMQuantizer

    return CortexMQuantizer()


def _vulkan() -> Any:
    from executorch.backends.vulkan.quantizer import vulkan_quantizer as theirs

    return theirs.VulkanQuantizer().set_global(theirs.get_symmetric_quantization_config())


def _cadence() -> Any:
    from executorch.backends.cadence.aot.quantizer.quantizer import CadenceDefaultQuantizer

    return CadenceDefaultQuantizer()


def _embedding() -> Any:
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    return EmbeddingQuantizer()


def _qnn() -> Any:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype

    quantizer = QnnQuantizer()
    quantizer.set_default_quant_config(QuantDtype.use_8a8w)
    return quantizer


def _preset(name: str) -> tuple[Any, Any]:
    return PresetBackend, PresetConfig(name=name, batch="static")


def _ours(backend: Any, config: Any, **fields: Any) -> tuple[Any, Any]:
    return backend, config(name="x", batch="static", **{**INT8, **fields})


CASES: dict[str, tuple[tuple[Any, Any], Callable[[], Any]]] = {
    "ethos-u": (_ours(EthosUBackend, EthosUConfig), _ethosu),
    "ethos-u per tensor": (
        _ours(EthosUBackend, EthosUConfig, weight="int8/tensor"),
        lambda: _ethosu(is_per_channel=False),
    ),
    "ethos-u 16x8": (
        _ours(EthosUBackend, EthosUConfig, input="int16/sym/mse"),
        lambda: _ethosu(config="get_symmetric_a16w8_quantization_config"),
    ),
    "ethos-u 8x4": (
        _ours(EthosUBackend, EthosUConfig, weight="int4/channel"),
        lambda: _ethosu(config="get_symmetric_a8w4_quantization_config", is_qat=False),
    ),
    "tosa": (_ours(TosaBackend, TosaConfig), _tosa),
    "vgf": (_ours(VgfBackend, VgfConfig), _vgf),
    "x86-inductor": (_ours(X86InductorBackend, X86InductorConfig), _x86),
    "arm-inductor": (
        _ours(ArmInductorBackend, ArmInductorConfig, weight="int8/tensor"),
        _arm_inductor,
    ),
    "cortex-m": (_preset("cortex-m"), _cortex_m),
    "vulkan": (_preset("vulkan"), _vulkan),
    "cadence": (_preset("cadence"), _cadence),
    "embedding": (_preset("embedding"), _embedding),
    "qnn": (_preset("qnn"), _qnn),
}


def _table(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    rows = []
    for node in graph.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            row = conversion(node)
            assert row is not None
            scale = None if row.scale is None else row.scale.tolist()
            zero = None if row.zero_point is None else row.zero_point.tolist()
            rows.append((node.name, scale, zero, row.low, row.high, row.dtype, row.axis))
    return rows


@pytest.mark.parametrize("name", CASES)
def test_scales_zero_points_and_outputs_are_equal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Qualcomm's quantizer fetches an SDK unless it believes there is one.
    monkeypatch.setenv("QNN_SDK_ROOT", "")
    (backend, config), direct = CASES[name]
    torch.manual_seed(0)
    model = Mixed().eval()
    ids = torch.randint(0, 20, (24, 4), generator=torch.Generator().manual_seed(1))
    quantized = backend(config).quantize(model, list(ids[:, None]))

    strict = name == "cadence"
    with torch.no_grad():
        program = torch.export.export(model, (ids[:1],), strict=strict)
        prepared = prepare_pt2e(program.module(check_guards=False), direct())
        for one in ids:
            prepared(one[None])
        theirs = convert_pt2e(prepared)
        expected = torch.cat([theirs(one[None]) for one in ids])
        found = torch.cat([quantized(one[None]) for one in ids])
    assert _table(theirs)
    assert _table(quantized.graph) == _table(theirs)
    assert torch.equal(found, expected)
