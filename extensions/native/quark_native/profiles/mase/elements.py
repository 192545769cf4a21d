"""MASE's minifloats as codes: the elements of its microscaling formats.

A code is sign | field | fraction with e, m bits and bias b = 2^(e-1) - 1:

    field > 0:   2^(field - b) (1 + fraction / 2^m)
    field = 0:   2^(1 - b) (fraction / 2^m)

Encoding rounds the fraction alone, after dropping its low 8 of 23 bits, and ors it under the
field; three things go wrong there against the nearest element:

- a fraction that rounds up to 2^m adds 1 to an even field, but leaves an odd one as it is, so
  that the value falls to the bottom of its binade;
- below the normal range the fraction is shifted without rounding, by one place at most: powers
  of two and everything under 2^-b become zero;
- infinity and NaN go in as 2^-1 and 1.5 * 2^-1 where all codes are finite, and as the largest
  power of two and the largest value where they are not.

Source: MASE 6ff398c, _minifloat_mx/fake.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quark_native.formats.bits import EXPONENT_BIAS, MANTISSA_BITS, exponent_of

RoundMode = Literal["rn", "rd", "ru", "rz"]

_DROPPED_BITS = 8
_NON_FINITE_EXPONENT = -1
"""What frexp leaves for infinities and NaN: exponent 0 of a fraction below 1."""


def minifloat_mx(
    x: Tensor,
    *,
    exp_bits: int,
    frac_bits: int,
    is_finite: bool = True,
    round_mode: RoundMode = "rn",
) -> Tensor:
    """Encode and decode each element, without a scale.

    Args:
        x: float32, any shape; subnormals count as zero.
        exp_bits: e, at least 1.
        frac_bits: m, at least 1; e + m below 16.
        is_finite: Whether every code is a number: the top field holds no infinities and NaNs.
        round_mode: Of the fraction's magnitude: nearest, ties to even; down; up; to zero, which
            is down.

    Raises:
        ValueError: Too few or too many bits.
    """
    if exp_bits < 1 or frac_bits < 1 or exp_bits + frac_bits > 15:
        raise ValueError(f"MASE has no minifloat of {exp_bits} + {frac_bits} bits")
    codes = encode(x, exp_bits, frac_bits, is_finite=is_finite, round_mode=round_mode)
    return decode(codes, exp_bits, frac_bits, is_finite=is_finite)


def encode(
    x: Tensor,
    exp_bits: int,
    frac_bits: int,
    *,
    is_finite: bool = True,
    round_mode: RoundMode = "rn",
) -> Tensor:
    """The int32 codes of x, as :func:`minifloat_mx` explains."""
    bias = (1 << (exp_bits - 1)) - 1
    top_field = (1 << exp_bits) - (1 if is_finite else 2)
    top_fraction = (1 << frac_bits) - 1

    exponent = torch.where(x.isfinite(), exponent_of(x), _NON_FINITE_EXPONENT)
    field = exponent + bias
    fraction = _round(x.view(torch.int32) & ((1 << MANTISSA_BITS) - 1), frac_bits, round_mode)
    subnormal = (field == 0) & (fraction != 0)
    fraction = torch.where(subnormal, (fraction | (1 << frac_bits)) >> 1, fraction)

    low, high = field < 0, field > top_field
    if not is_finite:
        # The fields of infinity and NaN are overwritten, whatever the range made of them.
        high = high | ~x.isfinite()
        low = low & ~high
    zero = low | (exponent_of(x) == -EXPONENT_BIAS)
    field = torch.where(high, top_field, field)
    fraction = torch.where(high, top_fraction, fraction)
    if not is_finite:
        fraction = torch.where(x.isinf(), 0, fraction)
    codes = torch.where(zero, 0, (field << frac_bits) | fraction)
    return torch.where(x < 0, codes + (1 << (exp_bits + frac_bits)), codes)


def decode(codes: Tensor, exp_bits: int, frac_bits: int, *, is_finite: bool = True) -> Tensor:
    """The float32 values of int32 codes."""
    bias = (1 << (exp_bits - 1)) - 1
    top_field = (1 << exp_bits) - 1
    field = (codes >> frac_bits) & top_field
    fraction = (codes & ((1 << frac_bits) - 1)).to(torch.float32) / (1 << frac_bits)
    normal = torch.exp2(field - bias) * (fraction + 1)
    value = torch.where(field == 0, 2.0 ** (1 - bias) * fraction, normal)
    if not is_finite:
        special = torch.where(fraction == 0, torch.inf, torch.nan)
        value = torch.where(field == top_field, special, value)
    return torch.where(codes >> (exp_bits + frac_bits) > 0, -value, value)


def _round(fraction: Tensor, frac_bits: int, round_mode: RoundMode) -> Tensor:
    """A 23-bit fraction in ``frac_bits`` bits, or one more bit where it rounds up to 2^m."""
    if round_mode == "rz":
        return fraction >> (MANTISSA_BITS - frac_bits)
    kept = (fraction >> _DROPPED_BITS).to(torch.float32)
    kept = kept / (1 << (MANTISSA_BITS - _DROPPED_BITS - frac_bits))
    rounding = {"rn": torch.round, "rd": torch.floor, "ru": torch.ceil}[round_mode]
    return rounding(kept).to(torch.int32)
