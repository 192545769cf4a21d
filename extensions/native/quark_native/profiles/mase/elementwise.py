"""MASE's quantizers that look at one element at a time, and its integer with a scale a row.

    integer            clamp(rnd(x 2^f), low, high) / 2^f
    scale_integer      clamp(rnd(x s), low, high) / s,   s = 2^(w-1) / (max |row| + 1e-9)
    minifloat_ieee     sign 2^e (1 + rnd(|x| / 2^e 2^m - 2^m) / 2^m),   e = floor(log2(|x| + 1e-9))
    minifloat_denorm   sign 2^e rnd(|x| / 2^e 2^m) / 2^m,               e = ceil(log2(|x| + 1e-9))
    log                sign 2^rnd(log2(|x| + d)),                       d = 0.1 * 2^emin

rnd is to the nearest, ties to even. Source: MASE 6ff398c, integer.py, scale_integer.py,
minifloat.py, log.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEARLY_ZERO = 1e-8
"""Up to this magnitude the minifloats and block_fp return the input itself."""
OFFSET = 1e-9
"""Added before a logarithm or a division, against zero."""


def integer(
    x: Tensor, *, width: int, frac_width: int | None = None, is_signed: bool = True
) -> Tensor:
    """Fixed point: ``width`` bits, the last ``frac_width`` of them behind the point.

    Nothing is lost against exact arithmetic while x * 2^frac_width stays below the largest
    float32. NaN stays NaN, infinities saturate.

    Args:
        x: float32, any shape.
        width: Bits, the sign included.
        frac_width: Bits behind the point; may be negative or above ``width``; None is half of
            ``width``, rounded down.
        is_signed: Two's complement, else 0 .. 2^width - 1.
    """
    return _fixed_point(x, torch.round, width, frac_width, is_signed)


def integer_floor(
    x: Tensor, *, width: int, frac_width: int | None = None, is_signed: bool = True
) -> Tensor:
    """As :func:`integer`, rounding down: half a step of bias."""
    return _fixed_point(x, torch.floor, width, frac_width, is_signed)


def scale_integer(
    x: Tensor, *, width: int, is_signed: bool = True, quantile: float | None = None
) -> Tensor:
    """Integers with a scale for each row of the last axis.

    The scale maps the largest magnitude to 2^(width-1) (unsigned: 2^width), one step above the
    largest integer, so +max loses a step and -max keeps its value. A row of zeros stays zero.

    Args:
        x: float32, one axis or more.
        width: Bits, the sign included.
        is_signed: Two's complement, else 0 .. 2^width - 1.
        quantile: Ignored, as MASE ignores it.
    """
    del quantile
    largest = x.abs().amax(dim=-1, keepdim=True) + OFFSET
    # A power of two over a tensor is a reciprocal and an exact product: two roundings in all.
    scale = largest.reciprocal() * 2 ** (width - 1 if is_signed else width)
    low, high = _integer_range(width, is_signed)
    y: Tensor = torch.round(x * scale).clamp(low, high) / scale
    return y


def minifloat_ieee(
    x: Tensor, *, width: int, exponent_width: int, exponent_bias: int | None = None
) -> Tensor:
    """A minifloat with a hidden bit and gradual underflow, whose every code is a finite number.

    The mantissa is rounded and then clamped: where exact rounding would carry into the next
    binade (the top half-step of each), MASE returns the last value of the binade. The largest
    value is 2^(2^E-1-bias) * (2 - 2^-m), not IEEE's. Magnitudes up to 1e-8 come back as they
    are, and infinities become NaN.

    Args:
        x: float32, any shape.
        width: Bits: sign, exponent and m = width - exponent_width - 1 of mantissa.
        exponent_width: E.
        exponent_bias: None is 2^(E-1) - 1.
    """
    return ieee_with_bias(x, width, exponent_width, default_bias(exponent_width, exponent_bias))


def minifloat_denorm(
    x: Tensor, *, width: int, exponent_width: int, exponent_bias: int | None = None
) -> Tensor:
    """A minifloat without a hidden bit: sign * 2^e * integer / 2^m.

    Rounding loses its carry as in :func:`minifloat_ieee`, which here cuts exact powers of two to
    1 - 2^-m of their value. Magnitudes up to 1e-8 come back as they are, and infinities become
    NaN.

    Args:
        x: float32, any shape.
        width: Bits: sign, exponent and m = width - exponent_width - 1 of mantissa.
        exponent_width: E.
        exponent_bias: None is 2^(E-1) - 1.
    """
    bias = default_bias(exponent_width, exponent_bias)
    steps = 2 ** (width - exponent_width - 1)
    value = x.abs()
    exponent = torch.ceil(torch.log2(value + OFFSET))
    power = torch.exp2(exponent.clamp(-bias, 2**exponent_width - 1 - bias))
    mantissa = torch.round(value / power * steps).clamp(0, steps - 1) / steps
    return unless_nearly_zero(x, torch.sign(x + OFFSET) * power * mantissa)


def log(x: Tensor, *, width: int, exponent_bias: int | None = None) -> Tensor:
    """Signed powers of two, rounded in the logarithm.

    So the threshold between 2^k and 2^(k+1) is 2^k sqrt(2), not the midpoint 2^k * 1.5. There is
    no zero: 0 and small negative values become +2^-bias.

    Args:
        x: float32, any shape.
        width: One sign bit and width - 1 exponent bits.
        exponent_bias: None is 2^(width-2) - 1.
    """
    return log_with_bias(x, width, default_bias(width - 1, exponent_bias))


def ieee_with_bias(x: Tensor, width: int, exponent_width: int, bias: float | Tensor) -> Tensor:
    """:func:`minifloat_ieee` with a bias for all, or one that broadcasts against x."""
    steps = 2 ** (width - exponent_width - 1)
    value = x.abs()
    exponent = torch.floor(torch.log2(value + OFFSET))
    exponent = _between(exponent, -bias, 2**exponent_width - 1 - bias)
    power = torch.exp2(exponent)
    ratio = value / power * steps
    # The lowest exponent has no hidden bit and twice the step.
    normal = torch.round(ratio - steps).clamp(0, steps - 1) / steps + 1
    subnormal = torch.round(ratio / 2).clamp(0, steps - 1) / steps * 2
    mantissa = torch.where(exponent == -bias, subnormal, normal)
    return unless_nearly_zero(x, torch.sign(x + OFFSET) * power * mantissa)


def log_with_bias(x: Tensor, width: int, bias: float | Tensor) -> Tensor:
    """:func:`log` with a bias for all, or one that broadcasts against x."""
    offset = 2.0**-bias * 0.1
    exponent = torch.round(torch.log2(x.abs() + offset))
    exponent = _between(exponent, -bias, 2 ** (width - 1) - 1 - bias)
    return torch.sign(x + offset) * torch.exp2(exponent)


def unless_nearly_zero(x: Tensor, y: Tensor) -> Tensor:
    """Y, but x where it is nearly zero.

    A sum of products and not a choice, as in MASE: what is not finite on the side that loses
    still turns the result into NaN.
    """
    nearly_zero = x.abs() <= NEARLY_ZERO
    return ~nearly_zero * y + nearly_zero * x


def default_bias(exponent_width: int, exponent_bias: int | None) -> int:
    """The bias, IEEE's where none is given."""
    return 2 ** (exponent_width - 1) - 1 if exponent_bias is None else exponent_bias


def _fixed_point(
    x: Tensor,
    rounding: Callable[[Tensor], Tensor],
    width: int,
    frac_width: int | None,
    is_signed: bool,
) -> Tensor:
    scale = 2.0 ** (width // 2 if frac_width is None else frac_width)
    low, high = _integer_range(width, is_signed)
    return rounding(x * scale).clamp(low, high) / scale


def _integer_range(width: int, is_signed: bool) -> tuple[int, int]:
    if is_signed:
        return -(2 ** (width - 1)), 2 ** (width - 1) - 1
    return 0, 2**width - 1


def _between(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return x.clamp(torch.as_tensor(low), torch.as_tensor(high))
