"""From specs to Brevitas's quantizers."""

from __future__ import annotations

from typing import Any

from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromStatsFromParameterZeroPoint
from brevitas.quant.fixed_point import (
    Int8ActPerTensorFixedPoint,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFixedPointMSE,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFixedPointMSE,
)
from brevitas.quant.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFloat,
    Int8WeightPerTensorFloatMSE,
    Int16Bias,
    Int32Bias,
    Uint8ActPerTensorFloat,
)
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerChannelFloatMSE,
    ShiftedUint8WeightPerTensorFloat,
    ShiftedUint8WeightPerTensorFloatMSE,
)

from quark_core.spec import TensorSpec

Quantizer = Any
"""A Brevitas injector class; Brevitas has no type of its own for them."""

_WEIGHTS: dict[tuple[str, bool, str, str], Quantizer] = {
    # (granularity, symmetric, scale, observer)
    ("tensor", True, "float32", "minmax"): Int8WeightPerTensorFloat,
    ("tensor", True, "float32", "mse"): Int8WeightPerTensorFloatMSE,
    ("channel", True, "float32", "minmax"): Int8WeightPerChannelFloat,
    ("channel", True, "float32", "mse"): Int8WeightPerChannelFloatMSE,
    ("tensor", False, "float32", "minmax"): ShiftedUint8WeightPerTensorFloat,
    ("tensor", False, "float32", "mse"): ShiftedUint8WeightPerTensorFloatMSE,
    ("channel", False, "float32", "minmax"): ShiftedUint8WeightPerChannelFloat,
    ("channel", False, "float32", "mse"): ShiftedUint8WeightPerChannelFloatMSE,
    ("tensor", True, "power_of_two", "minmax"): Int8WeightPerTensorFixedPoint,
    ("tensor", True, "power_of_two", "mse"): Int8WeightPerTensorFixedPointMSE,
    ("channel", True, "power_of_two", "minmax"): Int8WeightPerChannelFixedPoint,
    ("channel", True, "power_of_two", "mse"): Int8WeightPerChannelFixedPointMSE,
}
_INPUTS: dict[tuple[bool, str], Quantizer] = {
    # (symmetric, scale)
    (True, "float32"): Int8ActPerTensorFloat,
    (False, "float32"): ShiftedUint8ActPerTensorFloat,
    (True, "power_of_two"): Int8ActPerTensorFixedPoint,
    (False, "power_of_two"): ShiftedUint8ActPerTensorFixedPoint,
}
# Brevitas takes the ceil(q / 100 * n)-th smallest value, so that q = 0 would ask for the zeroth.
_SMALLEST_PERCENTILE = 1e-9
_BIASES: dict[str, Quantizer] = {"int16": Int16Bias, "int32": Int32Bias}


def weight_quantizer(spec: TensorSpec | None) -> Quantizer | None:
    """Brevitas's quantizer for a weight spec.

    The full range is used (no narrow range), and zero points are rounded to integers, without
    which codes could not be stored.
    """
    if spec is None:
        return None
    assert spec.granularity is not None
    assert spec.observer is not None
    assert spec.scale is not None
    key = (spec.granularity.kind, bool(spec.symmetric), spec.scale, spec.observer.name)
    settings: dict[str, Any] = {
        "bit_width": spec.number_format.bits,
        "narrow_range": False,
        "scaling_impl": ParameterFromStatsFromParameterScaling,
    }
    if not spec.symmetric:
        settings["zero_point_impl"] = ParameterFromStatsFromParameterZeroPoint
        settings["quantize_zero_point"] = True
    elif not spec.number_format.signed:
        settings["signed"] = False
    return _WEIGHTS[key].let(**settings)


def input_quantizer(spec: TensorSpec | None) -> Quantizer | None:
    """Brevitas's quantizer for an input spec, static or dynamic."""
    if spec is None:
        return None
    settings: dict[str, Any] = {"bit_width": spec.number_format.bits}
    if spec.dynamic:
        return _dynamic(spec).let(**settings)
    assert spec.observer is not None
    assert spec.scale is not None
    high = spec.observer.percentile if spec.observer.name == "percentile" else 100.0
    settings["high_percentile_q"] = high
    if not spec.symmetric:
        settings["low_percentile_q"] = max(100.0 - high, _SMALLEST_PERCENTILE)
    if spec.symmetric and not spec.number_format.signed:
        return Uint8ActPerTensorFloat.let(**settings)
    return _INPUTS[(bool(spec.symmetric), spec.scale)].let(**settings)


def bias_quantizer(spec: TensorSpec | None) -> Quantizer | None:
    """Brevitas's quantizer for a bias spec; its scale is input scale times weight scale."""
    return None if spec is None else _BIASES[spec.format]


def _dynamic(spec: TensorSpec) -> Quantizer:
    from brevitas_examples.common.generative.quantizers import (
        Int8DynamicActPerRowFloat,
        Int8DynamicActPerTensorFloat,
    )

    assert spec.granularity is not None
    if spec.granularity.kind == "tensor":
        return Int8DynamicActPerTensorFloat
    # Brevitas leaves it to the caller to say how one scale a row meets the input's shape.
    return Int8DynamicActPerRowFloat.let(
        dynamic_scaling_broadcastable_fn=lambda scale, shape: scale.view(*shape[:-1], 1),
        scaling_stats_permute_dims=None,
    )
