"""Quantizers of inputs, static and dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brevitas.core.function_wrapper import CeilSte
from brevitas.core.function_wrapper.shape import OverBatchOverTensorView, OverOutputFeaturesView
from brevitas.core.scaling.runtime import RuntimeDynamicGroupStatsScaling
from brevitas.core.stats import NegativeMinOrZero
from brevitas.inject.enum import RestrictValueType, ScalingPerOutputType, StatsOp
from brevitas.proxy.float_runtime_quant import DynamicActFloatQuantProxyFromInjector
from brevitas.proxy.groupwise_float_runtime_quant import GroupwiseActFloatQuantProxyFromInjector
from brevitas.proxy.groupwise_int_runtime_quant import GroupwiseActQuantProxyFromInjector
from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
from brevitas.quant.base import MSESymmetricScale
from brevitas.quant.fixed_point import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFixedPointMSE,
)
from brevitas.quant.float import Fp8e4m3Act, Fp8e4m3ActPerTensorFloat
from brevitas.quant.float_quant_fnuz import FpFNUZAct, FpFNUZActPerTensorFloat
from brevitas.quant.float_quant_ocp import FpOCPAct, FpOCPActPerTensorFloat
from brevitas.quant.mx_quant_ocp import MXFloat8e4m3Act, MXInt8Act
from brevitas.quant.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMSE,
)
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFixedPointMSE,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloatMSE,
)
from brevitas_examples.common.generative.quant_blocks import (
    RuntimeDynamicStatsScaling,
    RuntimeDynamicStatsZeroPoint,
)
from brevitas_examples.common.generative.quantizers import (
    Int8DynamicActPerTensorFloat,
    ShiftedUint8DynamicActPerTensorFloat,
)
from torch import Tensor

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

_INTEGERS: dict[tuple[bool, str, str], Quantizer] = {
    # (symmetric, scale, search)
    (True, "float32", "stats"): Int8ActPerTensorFloat,
    (True, "float32", "mse"): Int8ActPerTensorFloatMSE,
    (False, "float32", "stats"): ShiftedUint8ActPerTensorFloat,
    (False, "float32", "mse"): ShiftedUint8ActPerTensorFloatMSE,
    (True, "power_of_two", "stats"): Int8ActPerTensorFixedPoint,
    (True, "power_of_two", "mse"): Int8ActPerTensorFixedPointMSE,
    (False, "power_of_two", "stats"): ShiftedUint8ActPerTensorFixedPoint,
    (False, "power_of_two", "mse"): ShiftedUint8ActPerTensorFixedPointMSE,
}
_FLOATS: dict[Family, Quantizer] = {
    "ocp": FpOCPActPerTensorFloat,
    "fnuz": FpFNUZActPerTensorFloat,
    "float": Fp8e4m3ActPerTensorFloat,
}
_UNSCALED: dict[Family, Quantizer] = {
    "ocp": FpOCPAct,
    "fnuz": FpFNUZAct,
    "float": Fp8e4m3Act,
}
# Brevitas takes the ceil(q / 100 * n)-th smallest value, so that q = 0 would ask for the zeroth.
_SMALLEST_PERCENTILE = 1e-9


def _one_a_sample(scale: Tensor, shape: Sequence[int]) -> Tensor:
    return scale.view(shape[0], *[1] * (len(shape) - 1))


def _one_a_row(scale: Tensor, shape: Sequence[int]) -> Tensor:
    return scale.view(*shape[:-1], 1)


def _one(scale: Tensor, _shape: Sequence[int]) -> Tensor:
    return scale.view(())


def input_quantizer(
    spec: TensorSpec | None,
    op: str = "linear",
    *,
    scale_rounding: str | None = None,
    unscaled: bool = False,
    half: bool = False,
) -> Quantizer | None:
    """Brevitas's quantizer for an input spec, static or dynamic.

    Args:
        spec: A resolved spec that the configuration accepted.
        op: The layer's operation; says which axis groups run along.
        scale_rounding: How power-of-two scales are rounded; None is up, and down for MX.
        unscaled: Whether static minifloats do without a scale.
        half: Whether inputs are of float16.
    """
    if spec is None:
        return None
    family = spec.number_format.family
    if family == "mx":
        quantizer = _mx(spec)
    elif spec.dynamic:
        quantizer = _dynamic(spec)
    elif family == "float" and unscaled:
        elements = _UNSCALED[float_family(spec.number_format)]
        quantizer = elements.let(**float_settings(spec.number_format))
    elif family == "float":
        quantizer = _static_float(spec)
    else:
        quantizer = _static_integer(spec)
    if kind(spec) == "group":
        axis = -1 if op == "linear" else 1
        quantizer = quantizer.let(
            group_dim=axis,
            group_size=group_size(spec),
            stats_reduce_dim=axis if axis < 0 else axis + 1,
        )
    if scale_rounding is not None and spec.scale in ("power_of_two", "e8m0"):
        rounding = SCALE_ROUNDINGS[scale_rounding]
        quantizer = quantizer.let(restrict_value_float_to_int_impl=rounding)
    return for_half(quantizer, spec) if half else quantizer


def _static_integer(spec: TensorSpec) -> Quantizer:
    assert spec.observer is not None
    assert spec.scale is not None
    settings: dict[str, Any] = {"bit_width": spec.number_format.bits}
    if spec.observer.name == "mse":
        search = "mse"
    else:
        search = "stats"
        settings |= _percentiles(spec)
    if spec.symmetric and not spec.number_format.signed:
        settings["signed"] = False
    return _INTEGERS[(bool(spec.symmetric), spec.scale, search)].let(**settings)


def _percentiles(spec: TensorSpec) -> dict[str, float]:
    assert spec.observer is not None
    high = spec.observer.percentile if spec.observer.name == "percentile" else 100.0
    settings = {"high_percentile_q": high}
    if not spec.symmetric:
        settings["low_percentile_q"] = max(100.0 - high, _SMALLEST_PERCENTILE)
    return settings


def _static_float(spec: TensorSpec) -> Quantizer:
    assert spec.observer is not None
    parts = [_FLOATS[float_family(spec.number_format)]]
    settings = float_settings(spec.number_format)
    if spec.scale == "power_of_two":
        parts.insert(0, PowerOfTwoScale)
    if spec.observer.name == "mse":
        parts.insert(0, MSESymmetricScale)
    elif spec.observer.name == "percentile":
        settings["scaling_stats_op"] = StatsOp.PERCENTILE
        settings["high_percentile_q"] = spec.observer.percentile
    return compose("FloatInput", *parts).let(**settings)


def _dynamic(spec: TensorSpec) -> Quantizer:
    floating = spec.number_format.family == "float"
    symmetric = spec.symmetric is not False
    parts: list[Quantizer]
    if floating:
        parts = [_FLOATS[float_family(spec.number_format)]]
        settings = float_settings(spec.number_format)
    else:
        parts = [
            Int8DynamicActPerTensorFloat if symmetric else ShiftedUint8DynamicActPerTensorFloat
        ]
        settings = {"bit_width": spec.number_format.bits}
    if spec.scale == "power_of_two":
        if floating:
            parts.insert(0, PowerOfTwoScale)
        settings["restrict_scaling_type"] = RestrictValueType.POWER_OF_TWO
        settings["restrict_value_float_to_int_impl"] = CeilSte
    shared = _groups(floating) if kind(spec) == "group" else _runtime(spec, floating)
    settings["scaling_stats_op"] = StatsOp.MAX if symmetric else StatsOp.MIN_MAX
    return compose("DynamicInput", *parts).let(**settings, **shared)


def _groups(floating: bool) -> dict[str, Any]:
    return {
        "proxy_class": GroupwiseActFloatQuantProxyFromInjector
        if floating
        else GroupwiseActQuantProxyFromInjector,
        "scaling_impl": RuntimeDynamicGroupStatsScaling,
        "scaling_per_output_type": ScalingPerOutputType.GROUP,
    }


def _runtime(spec: TensorSpec, floating: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "scaling_impl": RuntimeDynamicStatsScaling,
        "proxy_class": DynamicActFloatQuantProxyFromInjector
        if floating
        else DynamicActQuantProxyFromInjector,
    }
    if not spec.symmetric:
        settings["zero_point_impl"] = RuntimeDynamicStatsZeroPoint
        settings["zero_point_stats_impl"] = NegativeMinOrZero
    if kind(spec) == "tensor":
        return settings | {"dynamic_scaling_broadcastable_fn": _one}
    # Brevitas leaves it to the caller to say how several scales meet the input's shape.
    rows = kind(spec) == "token"
    return settings | {
        "scaling_stats_input_view_shape_impl": (
            OverOutputFeaturesView if rows else OverBatchOverTensorView
        ),
        "dynamic_scaling_broadcastable_fn": _one_a_row if rows else _one_a_sample,
        "scaling_stats_permute_dims": None,
        "permute_dims": None,
        "stats_reduce_dim": 1,
    }


def _mx(spec: TensorSpec) -> Quantizer:
    fmt = spec.number_format
    if fmt.exponent is not None:
        return MXFloat8e4m3Act.let(**float_settings(fmt))
    return MXInt8Act.let(bit_width=fmt.bits, int_scaling_impl=MXIntegerThreshold, narrow_range=True)
