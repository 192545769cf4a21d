"""Quantizers of weights."""

from __future__ import annotations

from typing import Any

from brevitas.core.function_wrapper import CeilSte
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromStatsFromParameterZeroPoint
from brevitas.inject.enum import ScalingPerOutputType
from brevitas.quant.base import MSESymmetricScale
from brevitas.quant.fixed_point import (
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFixedPointMSE,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFixedPointMSE,
)
from brevitas.quant.float import Fp8e4m3WeightPerChannelFloat, Fp8e4m3WeightPerTensorFloat
from brevitas.quant.float_quant_fnuz import FpFNUZWeightPerChannelFloat, FpFNUZWeightPerTensorFloat
from brevitas.quant.float_quant_ocp import FpOCPWeightPerChannelFloat, FpOCPWeightPerTensorFloat
from brevitas.quant.mx_quant_ocp import (
    GroupwiseWeightFloatProxyMixin,
    MXFloat8e4m3Weight,
    MXInt8Weight,
)
from brevitas.quant.scaled_int import (
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatHQO,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFloat,
    Int8WeightPerTensorFloatHQO,
    Int8WeightPerTensorFloatMSE,
)
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8WeightGroupQuantFloat,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerChannelFloatHQO,
    ShiftedUint8WeightPerChannelFloatMSE,
    ShiftedUint8WeightPerGroupFloatHQO,
    ShiftedUint8WeightPerTensorFloat,
    ShiftedUint8WeightPerTensorFloatHQO,
    ShiftedUint8WeightPerTensorFloatMSE,
)
from brevitas_examples.common.generative.quantizers import (
    IntWeightSymmetricGroupQuant,
    IntWeightSymmetricGroupQuantMSE,
    ShiftedUint8WeightGroupQuantFloatMSE,
)

from quark_brevitas.quantizers.parts import (
    SCALE_ROUNDINGS,
    Family,
    MXIntegerThreshold,
    PowerOfTwoScale,
    Quantizer,
    compose,
    float_family,
    float_settings,
    for_half,
    group_size,
    kind,
)
from quark_core.spec import TensorSpec

_INTEGERS: dict[tuple[str, bool, str, str], Quantizer] = {
    # (granularity, symmetric, scale, search)
    ("tensor", True, "float32", "minmax"): Int8WeightPerTensorFloat,
    ("tensor", True, "float32", "mse"): Int8WeightPerTensorFloatMSE,
    ("tensor", True, "float32", "hqo"): Int8WeightPerTensorFloatHQO,
    ("channel", True, "float32", "minmax"): Int8WeightPerChannelFloat,
    ("channel", True, "float32", "mse"): Int8WeightPerChannelFloatMSE,
    ("channel", True, "float32", "hqo"): Int8WeightPerChannelFloatHQO,
    ("group", True, "float32", "minmax"): IntWeightSymmetricGroupQuant,
    ("group", True, "float32", "mse"): IntWeightSymmetricGroupQuantMSE,
    ("tensor", False, "float32", "minmax"): ShiftedUint8WeightPerTensorFloat,
    ("tensor", False, "float32", "mse"): ShiftedUint8WeightPerTensorFloatMSE,
    ("tensor", False, "float32", "hqo"): ShiftedUint8WeightPerTensorFloatHQO,
    ("channel", False, "float32", "minmax"): ShiftedUint8WeightPerChannelFloat,
    ("channel", False, "float32", "mse"): ShiftedUint8WeightPerChannelFloatMSE,
    ("channel", False, "float32", "hqo"): ShiftedUint8WeightPerChannelFloatHQO,
    ("group", False, "float32", "minmax"): ShiftedUint8WeightGroupQuantFloat,
    ("group", False, "float32", "mse"): ShiftedUint8WeightGroupQuantFloatMSE,
    ("group", False, "float32", "hqo"): ShiftedUint8WeightPerGroupFloatHQO,
    ("tensor", True, "power_of_two", "minmax"): Int8WeightPerTensorFixedPoint,
    ("tensor", True, "power_of_two", "mse"): Int8WeightPerTensorFixedPointMSE,
    ("channel", True, "power_of_two", "minmax"): Int8WeightPerChannelFixedPoint,
    ("channel", True, "power_of_two", "mse"): Int8WeightPerChannelFixedPointMSE,
}
_FLOATS: dict[tuple[Family, str], Quantizer] = {
    ("ocp", "tensor"): FpOCPWeightPerTensorFloat,
    ("ocp", "channel"): FpOCPWeightPerChannelFloat,
    ("fnuz", "tensor"): FpFNUZWeightPerTensorFloat,
    ("fnuz", "channel"): FpFNUZWeightPerChannelFloat,
    ("float", "tensor"): Fp8e4m3WeightPerTensorFloat,
    ("float", "channel"): Fp8e4m3WeightPerChannelFloat,
}


def weight_quantizer(
    spec: TensorSpec | None,
    *,
    hqo: bool = False,
    narrow_range: bool = False,
    scale_rounding: str | None = None,
    round_zero_points: bool = True,
    half: bool = False,
) -> Quantizer | None:
    """Brevitas's quantizer for a weight spec.

    Scales are taken from the float weight once and kept, as algorithms that move weights need.

    Args:
        spec: A resolved spec that the configuration accepted.
        hqo: Search the scale or zero point of integers by half-quadratic optimization.
        narrow_range: Leave the smallest code of symmetric integers unused.
        scale_rounding: How power-of-two scales are rounded; None is up, and down for MX.
        round_zero_points: Whether zero points become integers, as storing codes needs.
        half: Whether the weight is of float16.
    """
    if spec is None:
        return None
    family = spec.number_format.family
    if family == "mx":
        quantizer = _mx(spec)
    elif family == "float":
        quantizer = _float(spec)
    else:
        quantizer = _integer(spec, hqo, narrow_range, round_zero_points)
    if scale_rounding is not None and spec.scale in ("power_of_two", "e8m0"):
        rounding = SCALE_ROUNDINGS[scale_rounding]
        quantizer = quantizer.let(restrict_value_float_to_int_impl=rounding)
    if half:
        quantizer = for_half(quantizer, spec)
    return quantizer.let(scaling_impl=ParameterFromStatsFromParameterScaling)


def _integer(spec: TensorSpec, hqo: bool, narrow_range: bool, round_zero_points: bool) -> Quantizer:
    assert spec.observer is not None
    assert spec.scale is not None
    narrow = narrow_range or spec.narrow
    settings: dict[str, Any] = {"bit_width": spec.number_format.bits, "narrow_range": narrow}
    if kind(spec) == "group":
        settings["group_size"] = group_size(spec)
    if not spec.symmetric:
        settings["zero_point_impl"] = ParameterFromStatsFromParameterZeroPoint
        settings["quantize_zero_point"] = round_zero_points
        settings["narrow_range"] = False
    elif not spec.number_format.signed:
        settings["signed"] = False
    if kind(spec) == "group" and spec.scale == "power_of_two":
        base = compose("Group", MSESymmetricScale, MXInt8Weight) if _mse(spec) else MXInt8Weight
        return base.let(**settings, restrict_value_float_to_int_impl=CeilSte)
    search = "hqo" if hqo else spec.observer.name
    return _INTEGERS[(kind(spec), bool(spec.symmetric), spec.scale, search)].let(**settings)


def _float(spec: TensorSpec) -> Quantizer:
    fmt = spec.number_format
    groups = kind(spec) == "group"
    parts = [_FLOATS[(float_family(fmt), "channel" if groups else kind(spec))]]
    settings = float_settings(fmt)
    if groups:
        parts.insert(0, GroupwiseWeightFloatProxyMixin)
        settings["group_size"] = group_size(spec)
        settings["scaling_per_output_type"] = ScalingPerOutputType.GROUP
    if spec.scale == "power_of_two":
        parts.insert(0, PowerOfTwoScale)
    if _mse(spec):
        parts.insert(0, MSESymmetricScale)
    return compose("FloatWeight", *parts).let(**settings)


def _mx(spec: TensorSpec) -> Quantizer:
    fmt = spec.number_format
    if fmt.exponent is not None:
        return MXFloat8e4m3Weight.let(**float_settings(fmt), group_size=fmt.block)
    return MXInt8Weight.let(
        bit_width=fmt.bits,
        group_size=fmt.block,
        int_scaling_impl=MXIntegerThreshold,
        narrow_range=True,
    )


def _mse(spec: TensorSpec) -> bool:
    return spec.observer is not None and spec.observer.name == "mse"
