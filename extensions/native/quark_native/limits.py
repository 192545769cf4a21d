"""Which number formats have arithmetic here, by name. Imports no torch."""

from __future__ import annotations

from quark_core.formats import NumberFormat
from quark_core.spec import ScaleFormat, TensorSpec
from quark_core.support import integers

INTEGERS = (*integers(1, 32), *integers(1, 32, signed=False))
NAMED_FLOATS = (
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp8_e5m2fnuz",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp4_e2m1",
    "float16",
    "bfloat16",
)
FLOATS = (*NAMED_FLOATS, "fp[*")
UNSCALED = ("fixed[*", "ufixed[*", "denorm[*", "log[*")
MEANS = ("binary*", "ternary*")
MX = ("mxfp8_e4m3*", "mxfp8_e5m2*", "mxfp6_e3m2*", "mxfp6_e2m3*", "mxfp4_e2m1*", "mxint*")
POWER_BLOCKS = (
    "bfp*",
    "msfp*",
    "block_fp[*",
    "block_minifloat[*",
    "mx4",
    "mx6",
    "mx9",
)
BLOCK_LOG = ("block_log[*",)
FLOAT_BLOCKS: dict[ScaleFormat, tuple[str, ...]] = {
    "fp8_e4m3": ("nvfp4*",),
    "minifloat": ("sbfp[*",),
    "integer": ("lpbq[*",),
}

_SUBNORMAL_EXPONENT, _LARGEST_EXPONENT = -149, 127


def refusal(spec: TensorSpec) -> str | None:
    """Why a resolved spec has no arithmetic here, or None if it has."""
    number, granularity = spec.number_format, spec.granularity
    if granularity is not None and granularity.kind == "block" and number.is_block:
        return f"{number.name} has blocks of its own: leave the granularity out"
    nearest_only = number.family in ("log", "block_log", "binary", "binary_residual", "ternary")
    if spec.rounding != "nearest_even" and nearest_only:
        return f"{number.name} is not rounded to multiples: leave rounding out"
    if spec.rounding != "nearest_even" and number.name.endswith(")") and number.family != "float":
        return f"the letters of {number.name} say how it is rounded: leave rounding out"
    plain = ("float32", "power_of_two", "unit")
    if not number.is_block and spec.scale not in (None, *plain):
        return f"{number.name} has {', '.join(plain)} scales here, not {spec.scale}"
    return _format_refusal(number)


def _format_refusal(number: NumberFormat) -> str | None:
    if number.name == "float32":
        return "float32 is what tensors are in: leave the tensor out"
    if number.name.startswith("fp[") or number.family == "denorm":
        return _outside_float32(number)
    if number.family in ("log", "block_log") and number.bits > 9:
        return f"{number.name} has more exponents than float32: use at most 9 bits"
    if number.family == "log":
        lowest, highest = log_range(number)
        if lowest < -126 or highest > _LARGEST_EXPONENT:
            return (
                f"{number.name} reaches from 2^{lowest} to 2^{highest}, outside float32's 2^-126 "
                "to 2^127: use fewer bits or another bias"
            )
    if number.family == "block_minifloat" and (number.exponent or 0) > 5:
        return f"{number.name} has more exponents than fit beside a scale: use at most 5 bits"
    return None


def generic_float(number: NumberFormat) -> tuple[int, int, int]:
    """Exponent bits, mantissa bits and bias of ``fp[...]`` and ``denorm[...]``."""
    exponent, mantissa = number.exponent or 0, number.mantissa or 0
    _, comma, bias = number.name.partition("]")[0].partition(",")
    return exponent, mantissa, int(bias) if comma else (1 << exponent >> 1) - 1


def log_range(number: NumberFormat) -> tuple[int, int]:
    """Smallest and largest exponent of ``log[w]`` or ``log[w,b]``."""
    _, comma, text = number.name.rstrip("]").partition(",")
    codes = 1 << (number.bits - 1)
    bias = int(text) if comma else codes // 2 - 1
    return -bias, codes - 1 - bias


def shared_exponent_range(number: NumberFormat) -> tuple[int, int]:
    """Smallest and largest exponent of ``block_fp[w|e]`` or ``block_fp[w|e,b]``."""
    _, comma, text = number.name.partition("]")[0].partition(",")
    codes = 1 << int(number.shared_bits)
    bias = int(text) if comma else codes // 2 - 1
    return -bias, codes - 1 - bias


def _outside_float32(number: NumberFormat) -> str | None:
    exponent, mantissa, bias = generic_float(number)
    if exponent == 0:
        return f"{number.name} has no exponent bits: use an integer format instead"
    smallest, largest = 1 - bias - mantissa, (1 << exponent) - 1 - bias
    if number.family == "denorm":
        smallest, largest = smallest - 1, largest - 1
    if smallest < _SUBNORMAL_EXPONENT or largest > _LARGEST_EXPONENT:
        return (
            f"{number.name} reaches from 2^{smallest} to 2^{largest}, outside float32's 2^-149 to "
            "2^127: use fewer exponent bits or another bias"
        )
    return None
