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
    float16, bfloat16                        IEEE 754, saturating
    fp[s|e|m,b]    every code is a number; (ieee), (nan), (fnuz): codes that are none, as in
                   fp8_e5m2, fp8_e4m3, fp8_e4m3fnuz; (flush): no subnormal numbers, what rounds to
                   one becomes zero

denorm[w|e,b] has no hidden bit: with m = w - 1 - e, field f and mantissa k the value is
k * 2^(f - b - m), k < 2^m. The largest exponent of a value is the smallest with which it fits.

As a tensor's format an element has a scale: x' = round(x / scale) * scale, and
scale = max |x| / max, or the smallest power of two not below that, or none at all (unit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Rounding, ScaleFormat
from quark_native.formats.base import GridFormat, Parameters
from quark_native.formats.bits import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    MIN_EXPONENT,
    exponent_of,
    power_of_two,
)
from quark_native.formats.integer import round_scale
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call, Kind
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
        flush: Whether there are no subnormal elements.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool = True
    specials: Specials = "none"
    flush: bool = False

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
        """The nearest element of each value; NaN stays NaN."""
        return self.round(x, Rounder())

    def round(self, x: Tensor, rounder: Rounder) -> Tensor:
        """The element that each value is rounded to; NaN stays NaN.

        Args:
            x: float32, any shape; left unchanged.
            rounder: What to do between two elements.
        """
        x = x.clamp(-self.max, self.max)
        if not self.signed:
            x = torch.where(x <= 0, 0.0, x)  # -0 too
        step = self._step(x)
        # x / step is below 2^(m+1): the division and the product by a power of two are exact.
        rounded = rounder(x.div_(step)).mul_(step)
        if self.flush:
            tiny = rounded.abs() < 2.0**self.min_exponent
            rounded = torch.where(tiny, torch.zeros_like(rounded).copysign_(rounded), rounded)
        return rounded

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
        if self.min_exponent - self.mantissa_bits < MIN_EXPONENT:
            return power_of_two(exponent - self.mantissa_bits)
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


@dataclass(frozen=True)
class NoHiddenBit(Minifloat):
    """Elements whose mantissa holds its leading bit.

    They are those of a float with one mantissa bit less, in other codes.

    Attributes:
        exponent_bits: e.
        mantissa_bits: m - 1.
        bias: b.
    """

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest element with a leading one."""
        return -self.bias - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest element."""
        return (1 << self.exponent_bits) - 2 - self.bias

    def encode(self, elements: Tensor) -> Tensor:
        """Bit patterns: sign, field, mantissa with its leading bit."""
        magnitude = elements.abs().nan_to_num_()
        field = exponent_of(magnitude).clamp_(min=self.min_exponent) - self.min_exponent
        multiples = (magnitude / self._step(magnitude)).to(torch.int32)
        codes = (field << (self.mantissa_bits + 1)) | multiples
        return codes | (elements.signbit().to(torch.int32) << (self._sign_shift + 1))

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of bit patterns."""
        magnitude = codes & ((2 << self._sign_shift) - 1)
        field = magnitude >> (self.mantissa_bits + 1)
        multiples = magnitude & ((2 << self.mantissa_bits) - 1)
        values = multiples * power_of_two(field + self.min_exponent - self.mantissa_bits)
        return values.where(codes == magnitude, -values)


_ELEMENTS = {
    "fp8_e4m3": Minifloat(4, 3, 7, specials="nan"),
    "fp8_e5m2": Minifloat(5, 2, 15, specials="ieee"),
    "fp8_e4m3fnuz": Minifloat(4, 3, 8, specials="negative_zero"),
    "fp8_e5m2fnuz": Minifloat(5, 2, 16, specials="negative_zero"),
    "fp6_e3m2": Minifloat(3, 2, 3),
    "fp6_e2m3": Minifloat(2, 3, 1),
    "fp4_e2m1": Minifloat(2, 1, 1),
    "float16": Minifloat(5, 10, 15, specials="ieee"),
    "bfloat16": Minifloat(8, 7, 127, specials="ieee"),
}
_VARIANTS: dict[str, Specials] = {"ieee": "ieee", "nan": "nan", "fnuz": "negative_zero"}


def element_of(number: NumberFormat) -> Minifloat:
    """The elements of a floating-point format.

    Args:
        number: A format that :mod:`quark_native.limits` does not refuse.
    """
    if number.name in _ELEMENTS:
        return _ELEMENTS[number.name]
    exponent, mantissa, bias = generic_float(number)
    if number.family == "denorm":
        return NoHiddenBit(exponent, mantissa - 1, bias)
    variant = number.name.partition("(")[2].rstrip(")")
    specials = _VARIANTS.get(variant, "none")
    return Minifloat(exponent, mantissa, bias, number.signed, specials, variant == "flush")


class ScaledFloat(GridFormat):
    """Floating-point elements, with a scale that puts the largest value on the largest element.

    Without a scale (``unit``) values are rounded to the elements themselves.
    """

    covers = True

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        scale_format: ScaleFormat = "float32",
        rounding: Rounding = "nearest_even",
    ) -> None:
        super().__init__(number, layout, scale_format, rounding=rounding)
        self.covers = scale_format != "unit"
        self.element = element_of(number)

    def measure(self, x: Tensor) -> Parameters:
        """Cover the largest magnitude under each scale."""
        if self.scale_format == "unit":
            return Parameters(torch.ones((), device=x.device))
        if not self.number.signed:
            return self.cover(*self.layout.extremes(x))
        largest = self.layout.largest(x)
        return self.cover(-largest, largest)

    def cover(self, low: Tensor, high: Tensor) -> Parameters:
        """Put the end of the range that lies farther from zero on the largest element."""
        largest = torch.maximum(high, -low) if self.number.signed else high.clamp(min=0)
        return Parameters(round_scale(largest.double() / self.element.max, self.scale_format))

    def call(self) -> Call | None:
        """Any layout; scales are given."""
        return element_call("scaled", self.element, self.rounding)

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The scales, if there are any."""
        return {} if self.scale_format == "unit" else super().store(parameters)

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        if self.scale_format == "unit":
            return Parameters(torch.ones(()))
        return super().restore(stored, shape)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        return self.element.round(scaled, rounder)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.encode(elements)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.decode(codes)

    def _element_limits(self) -> tuple[float, float]:
        return (-self.element.max if self.number.signed else 0.0), self.element.max


def element_call(kind: Kind, element: Minifloat, rounding: Rounding) -> Call | None:
    """The kernel's parameters of elements; None where their exponents leave the fast path."""
    if element.flush or element.min_exponent - element.mantissa_bits < -100:
        return None
    if element.max_exponent > 100:
        return None
    return Call(
        kind,
        rounding,
        mantissa=element.mantissa_bits,
        min_exponent=element.min_exponent,
        max_exponent=element.max_exponent,
        low=-element.max if element.signed else 0.0,
        high=element.max,
    )
