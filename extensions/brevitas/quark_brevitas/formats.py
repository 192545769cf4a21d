"""Which number formats Brevitas can carry out. Imports neither torch nor Brevitas."""

from __future__ import annotations

from typing import Literal

from quark_core.formats import NumberFormat
from quark_core.spec import TensorSpec
from quark_core.support import integers

Family = Literal["ocp", "fnuz", "float"]

MAX_BITS = 16
INTEGERS = (*integers(2, MAX_BITS), *integers(2, MAX_BITS, signed=False))
SIGNED = integers(2, MAX_BITS)
NAMED_FLOATS = (
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp8_e5m2fnuz",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp4_e2m1",
)
FLOATS = (*NAMED_FLOATS, "fp[1|*")
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


def float_family(fmt: NumberFormat) -> Family:
    """Which of Brevitas's minifloats a format is: OCP's, FNUZ, or one without infinity and NaN."""
    if fmt.name.endswith("fnuz"):
        return "fnuz"
    return "float" if fmt.name.startswith("fp[") else "ocp"


def largest(fmt: NumberFormat) -> float:
    """The largest magnitude an element of a floating-point format has."""
    exponent, mantissa = fmt.exponent or 0, fmt.mantissa or 0
    bias = exponent_bias(fmt)
    if fmt.name.endswith("e4m3") and float_family(fmt) == "ocp":
        return 448.0  # all ones stands for NaN
    top = (1 << exponent) - 1 - bias
    if fmt.name.endswith("e5m2"):
        top -= 1  # the last exponent stands for infinity and NaN
    return float(2.0**top * (2 - 2.0**-mantissa))


def exponent_bias(fmt: NumberFormat) -> int:
    """What is subtracted from the stored exponent."""
    exponent = fmt.exponent or 0
    if float_family(fmt) == "fnuz":
        return 1 << exponent >> 1
    written = fmt.name.removesuffix("]").partition(",")[2]
    return int(written) if written else (1 << exponent >> 1) - 1


def float_refusal(fmt: NumberFormat) -> str | None:
    """Why a ``fp[1|e|m]`` cannot be carried out, or None."""
    exponent, mantissa = fmt.exponent or 0, fmt.mantissa or 0
    if exponent == 0:
        return f"{fmt.name} has no exponent bits, which Brevitas needs: write int{fmt.bits}"
    if fmt.bits > MAX_BITS:
        return f"{fmt.name} has {fmt.bits} bits: minifloats have at most {MAX_BITS} here"
    bias = exponent_bias(fmt)
    smallest, top = 1 - bias - mantissa, (1 << exponent) - 1 - bias
    if smallest < -126 or top > 127:
        return (
            f"{fmt.name} reaches from 2^{smallest} to 2^{top}, outside float32's 2^-126 to 2^127: "
            "use fewer exponent bits"
        )
    return None


def is_static(spec: TensorSpec | None) -> bool:
    """Whether an input's range comes from calibration."""
    return spec is not None and not spec.dynamic and not spec.number_format.is_block
