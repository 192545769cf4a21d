"""Recipes give what direct calls of Brevitas gave, on a fixed network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
STATIC = "int8/sym/percentile:99.999"
COMMON = {"name": "brevitas", "equalize_iterations": 20}
CONFIGS: dict[str, dict[str, Any]] = {
    "lw_w8a8_pc": {"weight": "int8", "input": STATIC, "bias": "int32", "bias_correction": True},
    "lw_w8a8_nobc": {"weight": "int8", "input": STATIC, "bias": "int32"},
    "fx_w8a8_pc": {
        "backend": "fx",
        "weight": "int8",
        "input": STATIC,
        "bias": "int32",
        "bias_correction": True,
    },
    "fx_w8a8_po2": {
        "backend": "fx",
        "weight": "int8/power_of_two",
        "input": f"{STATIC}/power_of_two",
        "bias": "int32",
        "bias_correction": True,
    },
    "lw_w8_only": {"weight": "int8"},
    "lw_w4a8_gptq": {
        "weight": "int4",
        "rules": [{"name": "stem.0", "weight": "int8"}],
        "input": STATIC,
        "bias": "int32",
        "algorithm": {"name": "gptq", "engine": "brevitas"},
        "bias_correction": True,
    },
    "lw_w8a8_dyn": {"weight": "int8", "input": "int8/sym/channel:0/dynamic"},
    "lw_mxfp8": {"weight": "mxfp8_e4m3", "input": "mxfp8_e4m3"},
    "lw_noeq_w8a8_asym": {
        "equalize_iterations": 0,
        "weight": "uint8/asym",
        "input": "uint8/asym/percentile:99.999",
        "bias": "int32",
    },
}


@pytest.fixture(scope="module")
def golden() -> Any:
    """The reference results."""
    return np.load(GOLDEN / "results.npz")


@pytest.fixture(scope="module")
def inputs() -> Any:
    """Calibration and evaluation images."""
    return np.load(GOLDEN / "inputs.npz")


def _close(found: torch.Tensor, expected: np.ndarray, limit: float) -> None:
    np.testing.assert_allclose(
        found.detach().numpy().reshape(expected.shape), expected, rtol=limit, atol=1e-9
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_direct_calls(name: str, golden_model: nn.Module, golden: Any, inputs: Any) -> None:
    model = golden_model
    batches = [torch.from_numpy(part) for part in np.split(inputs["calib"], 3)]
    quantizer = BrevitasQuantizer(BrevitasConfig(**{**COMMON, **CONFIGS[name]}))
    quantized = quantizer.quantize(model, batches)
    images = torch.from_numpy(inputs["eval"])
    with torch.no_grad():
        _close(model(images), golden["float_logits"], 1e-4)
        logits = quantized(images)
    for encoding in quantized.encodings():
        key = {"weight": "weight_quant", "input": "input_quant"}.get(encoding.role)
        scale = f"{name}/{encoding.layer}/{key}/scale"
        if scale in golden.files:
            assert encoding.scale is not None
            _close(encoding.scale, golden[scale], 1e-6)
            if encoding.zero_point is not None:
                zero_point = golden[scale.replace("scale", "zero_point")]
                found = encoding.zero_point.numpy().reshape(-1)
                assert np.array_equal(found, np.broadcast_to(zero_point.reshape(-1), found.shape))
    for layer in ("stem.0", "block2.conv2", "fc"):
        bias = quantized.module.get_submodule(layer).get_parameter("bias")
        np.testing.assert_allclose(
            bias.detach().numpy(), golden[f"{name}/{layer}/bias_float"], rtol=1e-3, atol=1e-5
        )
    # Sums in another order move an activation across a rounding boundary now and then.
    expected = golden[f"{name}/logits"]
    noise = np.square(expected - logits.numpy()).sum()
    assert 10 * np.log10(np.square(expected).sum() / noise) > 50
    assert np.array_equal(expected.argmax(1), logits.numpy().argmax(1))
    images_equal = np.isclose(expected, logits.numpy(), atol=1e-5, rtol=1e-5).all(1)
    assert images_equal.mean() > 0.9


def test_integer_weights_are_those_of_direct_calls(golden_model: nn.Module, golden: Any) -> None:
    config = BrevitasConfig(**COMMON, weight="int8")
    quantized = BrevitasQuantizer(config).quantize(golden_model)
    for entry in quantized.plan.quantized:
        layer: Any = quantized.module.get_submodule(entry.name)
        codes = layer.quant_weight().int().numpy()
        assert np.array_equal(codes, golden[f"lw_w8_only/{entry.name}/weight_quant/int"])


def test_our_own_gptq_is_as_good_as_brevitas_own(
    golden_model: nn.Module, golden: Any, inputs: Any
) -> None:
    batches = [torch.from_numpy(part) for part in np.split(inputs["calib"], 3)]
    fields = {**COMMON, **CONFIGS["lw_w4a8_gptq"], "algorithm": "gptq"}
    quantized = BrevitasQuantizer(BrevitasConfig(**fields)).quantize(golden_model, batches)
    with torch.no_grad():
        logits = quantized(torch.from_numpy(inputs["eval"])).numpy()
    truth = golden["float_logits"]

    def sqnr(found: np.ndarray) -> float:
        return float(10 * np.log10(np.square(truth).sum() / np.square(truth - found).sum()))

    assert sqnr(logits) > sqnr(golden["lw_w4a8_gptq/logits"]) - 1


def test_the_copy_is_small() -> None:
    assert sum(file.stat().st_size for file in Path(GOLDEN).iterdir()) < 1_200_000
