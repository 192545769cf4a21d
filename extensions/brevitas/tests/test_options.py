"""Options on equalization, signs, scales and the model's ends, against Brevitas called directly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError, DataError


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


@pytest.mark.parametrize(
    ("fields", "direct"),
    [
        ({}, {}),
        ({"equalize_scale": "range"}, {"equalize_scale_computation": "range"}),
        ({"equalize_bias_shrinkage": 3.0}, {"equalize_bias_shrinkage": 3.0}),
        ({"equalize_merge_bias": False}, {"equalize_merge_bias": False}),
    ],
)
def test_equalization_is_brevitas_s_own(
    golden_model: nn.Module, fields: dict[str, Any], direct: dict[str, Any]
) -> None:
    from brevitas.graph.quantize import preprocess_for_quantize

    expected = preprocess_for_quantize(copy.deepcopy(golden_model), equalize_iters=4, **direct)
    quantized = _quantizer(equalize_iterations=4, **fields).quantize(golden_model)
    for entry in quantized.plan.quantized:
        weight = quantized.module.get_submodule(entry.name).get_parameter("weight")
        assert torch.equal(weight, expected.get_submodule(entry.name).weight)
        quantized.set_enabled(entry.name, False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        truth = golden_model(x)
        assert float((quantized(x) - truth).norm() / truth.norm()) < 1e-5


def test_first_and_last_layers_by_rules(tiny: nn.Module, batches: list[Tensor]) -> None:
    ends = [{"io": "input", "weight": "int8"}, {"io": "output", "weight": "int8", "input": "int16"}]
    quantized = _quantizer(weight="int4", input="int8", rules=ends).quantize(tiny, batches)
    found = {encoding.tensor: encoding.format for encoding in quantized.encodings()}
    assert found["conv.weight"] == "int8"
    assert found["fc.weight"] == "int8"
    assert found["fc.input"] == "int16"
    assert {found[f"{name}.weight"] for name in ("up", "conv1d", "up1d")} == {"int4"}


def test_the_ends_are_found_by_a_batch(tiny: nn.Module) -> None:
    with pytest.raises(DataError, match="a rule with io runs one batch"):
        _quantizer(rules=[{"io": "output", "skip": True}]).make_plan(tiny)


@pytest.mark.parametrize("unsigned", [True, False])
def test_signs_after_a_relu(tiny: nn.Module, batches: list[Tensor], unsigned: bool) -> None:
    quantizer = _quantizer(input="int8/sym", backend="fx", unsigned_relu=unsigned)
    module: Any = quantizer.quantize(tiny, batches).module
    assert module.relu.act_quant.is_signed is not unsigned


@pytest.mark.parametrize("text", ["fp8_e4m3", "fp8_e4m3fnuz", "fp[1|3|2]"])
def test_inputs_without_a_scale(tiny: nn.Module, batches: list[Tensor], text: str) -> None:
    from brevitas.nn import QuantIdentity
    from quark_brevitas.quantizers.inputs import _UNSCALED
    from quark_brevitas.quantizers.parts import float_family, float_settings

    from quark_core.formats import parse_format

    fmt = parse_format(text)
    quantizer = _quantizer(weight="int8", input=text, unscaled_inputs=True)
    quantized = quantizer.quantize(tiny)  # no data needed
    encodings = [one for one in quantized.encodings() if one.role == "input"]
    assert all(float(one.scale) == 1.0 for one in encodings if one.scale is not None)
    direct = QuantIdentity(_UNSCALED[float_family(fmt)].let(**float_settings(fmt)))
    conv: Any = quantized.module.get_submodule("conv")
    with torch.no_grad():
        own = conv.input_quant(batches[0]).value
        assert torch.equal(own, direct(batches[0]))
        assert not torch.equal(own, batches[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unscaled_inputs": True}, "no input is quantized"),
        ({"unscaled_inputs": True, "input": "int8"}, "write fp8_e4m3, or unscaled_inputs: false"),
        ({"unscaled_inputs": True, "input": "fp8_e4m3/mse"}, "leave mse out"),
        ({"unsigned_relu": False}, "layerwise takes int8 and uint8 as they are written"),
        ({"equalize_scale": "range"}, "nothing is equalized"),
        ({"smoothquant": True}, "unknown field. Write activation_equalization: {alpha: 0.5}"),
        ({"gptq": True}, "unknown field. Write algorithm: gptq"),
        ({"algorithm": "adaround"}, "AdaRound is learned rounding: write algorithm: learned_round"),
        (
            {
                "equalize_iterations": 1,
                "equalize_bias_shrinkage": 2,
                "equalize_merge_bias": False,
            },
            "write equalize_merge_bias: true",
        ),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _quantizer(**fields)
    assert words in str(caught.value)
