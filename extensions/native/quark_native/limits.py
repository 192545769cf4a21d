"""Which number formats have arithmetic here, by name. Imports no torch."""

from __future__ import annotations

from quark_core.formats import NumberFormat
from quark_core.spec import TensorSpec
from quark_core.support import integers

MAX_INTEGER_BITS = 16
INTEGERS = (
    *integers(1, MAX_INTEGER_BITS),
    *integers(1, MAX_INTEGER_BITS, signed=False),
)
NAMED_FLOATS = (
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp8_e5m2fnuz",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp4_e2m1",
)
FLOATS = (*NAMED_FLOATS, "fp[*")
MX = (
    "mxfp8_e4m3*",
    "mxfp8_e5m2*",
    "mxfp6_e3m2*",
    "mxfp6_e2m3*",
    "mxfp4_e2m1*",
    "mxint8*",
    "mxint4*",
    "mxint2*",
)
BFP = ("bfp[*",)


def refusal(spec: TensorSpec) -> str | None:
    """Why a resolved spec has no arithmetic here, or None if it has."""
    number, granularity = spec.number_format, spec.granularity
    if granularity is not None and granularity.kind == "block":
        return f"tiles are not implemented: write {number.name} with tensor, channel or group:SIZE"
    if spec.rounding != "nearest_even":
        return f"rounding {spec.rounding} is not implemented: leave it out (nearest_even)"
    if not number.is_block and spec.scale not in (None, "float32", "power_of_two"):
        return f"{number.name} has float32 or power_of_two scales here, not {spec.scale}"
    return _format_refusal(number)


def _format_refusal(number: NumberFormat) -> str | None:
    if number.name.startswith("fp["):
        return _outside_float32(number)
    if number.family == "integer" and number.bits > MAX_INTEGER_BITS:
        return f"{number.name} is too wide: integers have 1 to {MAX_INTEGER_BITS} bits here"
    if number.name.startswith("bfp[") and number.name.endswith(")"):
        return f"{number.name}: only symmetric mantissas rounded to nearest are implemented"
    known = number.family in ("integer", "mx") or number.name.startswith("bfp[")
    return None if known or number.name in NAMED_FLOATS else f"{number.name} is not implemented"


def generic_float(number: NumberFormat) -> tuple[int, int, int]:
    """Exponent bits, mantissa bits and bias of ``fp[s|e|m]`` or ``fp[s|e|m,bias]``."""
    exponent, mantissa = number.exponent or 0, number.mantissa or 0
    _, comma, bias = number.name.removesuffix("]").partition(",")
    return exponent, mantissa, int(bias) if comma else (1 << exponent >> 1) - 1


def _outside_float32(number: NumberFormat) -> str | None:
    exponent, mantissa, bias = generic_float(number)
    if exponent == 0:
        return f"{number.name} has no exponent bits: use an integer format instead"
    smallest, largest = 1 - bias - mantissa, (1 << exponent) - 1 - bias
    if smallest < -126 or largest > 127:
        return (
            f"{number.name} reaches from 2^{smallest} to 2^{largest}, outside float32's 2^-126 to "
            "2^127: use fewer exponent bits or another bias"
        )
    return None
