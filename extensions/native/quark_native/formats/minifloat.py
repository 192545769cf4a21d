"""Minifloats: fp8, fp6, fp4 and fp[sign|exponent|mantissa], as elements and with a scale.

An element with e exponent bits, m mantissa bits and bias b has the value

    field > 0:   (-1)^s * 2^(field - b) * (1 + mantissa / 2^m)
    field = 0:   (-1)^s * 2^(1 - b)     * (mantissa / 2^m)            (subnormal)

A value is rounded to the nearest element, ties to the even multiple of the step between
elements, and saturates at the largest; without a sign bit, negative values become zero. The bias
is 2^(e-1) - 1 unless the name says otherwise.

    fp8_e4m3       max 448    OCP 8-bit Floating Point Specification (OFP8) 1.0: one NaN a sign
    fp8_e5m2       max 57344  the same: infinities and NaNs as in IEEE 754
    fp8_e4m3fnuz   max 240    bias 8;  Noune et al. 2022, arXiv 2206.02915: the code of -0 is NaN
    fp8_e5m2fnuz   max 57344  bias 16; the same
    fp6_e3m2 28, fp6_e2m3 7.5, fp4_e2m1 6    OCP Microscaling Formats 1.0: every code is a number
    fp[s|e|m,b]    every code is a number

As a tensor's format an element has a scale: x' = nearest(x / scale) * scale, and
scale = max |x| / max, or the smallest power of two not below that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import ScaleFormat
from quark_native.formats.base import Format, Parameters
from quark_native.formats.bits import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    exponent_of,
    power_of_two,
)
from quark_native.formats.integer import round_scale
from quark_native.formats.layout import Layout
from quark_native.limits import generic_float

Specials = Literal["none", "nan", "ieee", "negative_zero"]


@dataclass(frozen=True)
class Minifloat:
    """The elements of a floating-point format of few bits.

    Attributes:
        exponent_bits: e.
        mantissa_bits: m.
        bias: b.
        signed: Whether there is a sign bit.
        specials: Codes that are no numbers: ``none``; ``nan``, the top code of each sign;
            ``ieee``, the top exponent; ``negative_zero``, the code of -0 is the only NaN.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool = True
    specials: Specials = "none"

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal element."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest element."""
        top_field = (1 << self.exponent_bits) - 1 - (self.specials == "ieee")
        return top_field - self.bias

    @property
    def max(self) -> float:
        """The largest element."""
        mantissa = 2.0 - 2.0**-self.mantissa_bits
        if self.specials == "nan":
            mantissa -= 2.0**-self.mantissa_bits
        return mantissa * 2.0**self.max_exponent

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest element of each value; NaN stays NaN.

        Args:
            x: float32, any shape; left unchanged.
        """
        x = x.clamp(-self.max if self.signed else 0.0, self.max)
        step = self._step(x)
        # x / step is below 2^(m+1): the division and the product by a power of two are exact.
        return x.div_(step).round_().mul_(step)

    def encode(self, elements: Tensor) -> Tensor:
        """Bit patterns, int32, of values that are elements (or NaN)."""
        magnitude = elements.abs().nan_to_num_()
        exponent = exponent_of(magnitude).clamp_(min=self.min_exponent)
        # Multiples of the step: 2^m..2^(m+1)-1 for normal elements, fewer for subnormal ones.
        # Counted on from the first normal field this is the pattern itself, hidden bit and all.
        multiples = (magnitude / self._step(magnitude)).to(torch.int32)
        codes = ((exponent - self.min_exponent) << self.mantissa_bits) + multiples
        if self.signed:
            negative = elements.signbit()
            if self.specials == "negative_zero":
                negative &= codes > 0
            codes |= negative.to(torch.int32) << self._sign_shift
        return codes if self.specials == "none" else codes.where(~elements.isnan(), self._nan_code)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of bit patterns."""
        magnitude = codes & ((1 << self._sign_shift) - 1)
        # Field 0 has the exponent of field 1, without the hidden bit.
        steps_up = ((magnitude >> self.mantissa_bits) - 1).clamp_(min=0)
        multiples = magnitude - (steps_up << self.mantissa_bits)
        values = multiples * power_of_two(steps_up + self.min_exponent - self.mantissa_bits)
        if self.specials == "ieee":
            infinity = (self.max_exponent + 1 + self.bias) << self.mantissa_bits
            values = values.where(magnitude < infinity, torch.inf)
            values = values.where(magnitude <= infinity, torch.nan)
        elif self.specials == "nan":
            values = values.where(magnitude < self._nan_code, torch.nan)
        values = values.where(codes == magnitude, -values)
        if self.specials == "negative_zero":
            values = values.where(codes != self._nan_code, torch.nan)
        return values

    def _step(self, x: Tensor) -> Tensor:
        """Distance of neighbouring elements around each value within the range."""
        exponent = exponent_of(x).clamp_(min=self.min_exponent)
        exponent += EXPONENT_BIAS - self.mantissa_bits
        return exponent.bitwise_left_shift_(MANTISSA_BITS).view(torch.float32)

    @property
    def _sign_shift(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def _nan_code(self) -> int:
        return (
            1 << self._sign_shift
            if self.specials == "negative_zero"
            else (1 << self._sign_shift) - 1
        )


_ELEMENTS = {
    "fp8_e4m3": Minifloat(4, 3, 7, specials="nan"),
    "fp8_e5m2": Minifloat(5, 2, 15, specials="ieee"),
    "fp8_e4m3fnuz": Minifloat(4, 3, 8, specials="negative_zero"),
    "fp8_e5m2fnuz": Minifloat(5, 2, 16, specials="negative_zero"),
    "fp6_e3m2": Minifloat(3, 2, 3),
    "fp6_e2m3": Minifloat(2, 3, 1),
    "fp4_e2m1": Minifloat(2, 1, 1),
}


def element_of(number: NumberFormat) -> Minifloat:
    """The elements of a floating-point format.

    Args:
        number: A format that :mod:`quark_native.limits` does not refuse.
    """
    if number.name in _ELEMENTS:
        return _ELEMENTS[number.name]
    exponent, mantissa, bias = generic_float(number)
    return Minifloat(exponent, mantissa, bias, number.signed)


class ScaledFloat(Format):
    """Floating-point elements with a scale that puts the largest value on the largest element."""

    covers = True

    def __init__(
        self, number: NumberFormat, layout: Layout, scale_format: ScaleFormat = "float32"
    ) -> None:
        super().__init__(number, layout, scale_format)
        self.element = element_of(number)

    def measure(self, x: Tensor) -> Parameters:
        """Cover the largest magnitude under each scale."""
        if not self.number.signed:
            return self.cover(*self.layout.extremes(x))
        largest = self.layout.largest(x)
        return self.cover(-largest, largest)

    def cover(self, low: Tensor, high: Tensor) -> Parameters:
        """Put the end of the range that lies farther from zero on the largest element."""
        largest = torch.maximum(high, -low) if self.number.signed else high.clamp(min=0)
        return Parameters(round_scale(largest.double() / self.element.max, self.scale_format))

    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.nearest(scaled)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.encode(elements)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.decode(codes)

    def _element_limits(self) -> tuple[float, float]:
        return (-self.element.max if self.number.signed else 0.0), self.element.max
