"""What weight and input quantizers have in common: float families, scales, MX integers."""

from __future__ import annotations

from typing import Any

from brevitas.core.function_wrapper import CeilSte, FloorSte, RoundSte
from brevitas.core.scaling import RoundMidMaxSte
from brevitas.inject import ExtendedInjector, this, value
from brevitas.inject.enum import RestrictValueType
from brevitas.quant.mx_quant_ocp import RestrictThresholdMixin
from brevitas.utils.float_quant_utils import get_midmax_mantissa_bit_bias
from torch import Tensor, nn

from quark_brevitas.formats import Family, float_family, largest
from quark_core.formats import NumberFormat
from quark_core.spec import TensorSpec

Quantizer = Any
"""A Brevitas injector class; Brevitas has no type of its own for them."""

_LEAST_HALF = 2.0**-22
SCALE_ROUNDINGS: dict[str, Any] = {
    "round": RoundSte,
    "ceil": CeilSte,
    "floor": FloorSte,
    "midmax": RoundMidMaxSte,
}


class PowerOfTwoScale(ExtendedInjector):  # type: ignore[misc]
    """A scale rounded up to a power of two, so that the largest magnitude is not cut off.

    The largest element is rounded down before the division, as Brevitas does for MX: rounding it
    up as well would make scales up to twice too small.
    """

    threshold_mixin = RestrictThresholdMixin
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl = CeilSte

    @value  # type: ignore[untyped-decorator]
    def restrict_threshold_impl() -> Any:  # noqa: D102 (an injected value, not a method)
        return this.threshold_mixin.restrict_scaling_impl

    @value  # type: ignore[untyped-decorator]
    def midmax_mantissa_bit_bias(  # noqa: D102
        mantissa_bit_width: int,  # noqa: N805
        nan_values: Any,
        inf_values: Any,
    ) -> float:
        bias: float = get_midmax_mantissa_bit_bias(mantissa_bit_width, nan_values, inf_values)
        return bias


class MXIntegerThreshold(nn.Module):
    """The power of two in an MX integer's largest magnitude: 2^6 for the INT8 of OCP MX 1.0.

    Such an element is a fixed-point number of two integer digits, sign included. Brevitas 0.13.4
    divides by 2^7 instead: its scales are half of what they should be, and about half of all
    values are cut off.
    """

    def __init__(self) -> None:  # Brevitas's injection refuses torch's open argument list
        super().__init__()

    def forward(self, bit_width: Tensor, signed: Any = None) -> Tensor:
        """2^(bits - 2)."""
        power: Tensor = 2.0 ** (bit_width - 2)
        return power


def compose(name: str, *parts: Quantizer, **settings: Any) -> Quantizer:
    """A quantizer of several injectors, the first that sets a value winning."""
    return type(name, parts, settings)


def float_settings(fmt: NumberFormat) -> dict[str, Any]:
    """Bit widths, and the exponent bias where a format has one of its own."""
    settings: dict[str, Any] = {
        "bit_width": fmt.bits,
        "exponent_bit_width": fmt.exponent,
        "mantissa_bit_width": fmt.mantissa,
    }
    bias = fmt.name.removesuffix("]").partition(",")[2]
    if float_family(fmt) == "float" and bias:
        settings["exponent_bias"] = int(bias)
    return settings


def group_size(spec: TensorSpec) -> int:
    """Elements that share a scale, of a spec with groups."""
    assert spec.granularity is not None
    assert spec.granularity.size is not None
    return spec.granularity.size


def for_half(quantizer: Quantizer, spec: TensorSpec) -> Quantizer:
    """The same quantizer for float16, in which Brevitas's least range, 1e-10, is zero.

    A channel or token of zeros would be divided by a scale of zero. Here a least range divided by
    the largest code is still a float16.
    """
    fmt = spec.number_format
    high = largest(fmt) if fmt.exponent is not None else 2.0**fmt.bits
    return quantizer.let(scaling_min_val=high * _LEAST_HALF)


def kind(spec: TensorSpec) -> str:
    """The kind of granularity of a resolved spec."""
    assert spec.granularity is not None
    return spec.granularity.kind


__all__ = [
    "SCALE_ROUNDINGS",
    "Family",
    "MXIntegerThreshold",
    "PowerOfTwoScale",
    "Quantizer",
    "compose",
    "float_family",
    "float_settings",
    "for_half",
    "group_size",
    "kind",
]
