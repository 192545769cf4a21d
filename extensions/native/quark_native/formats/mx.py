"""Microscaling (MX): blocks of minifloats or fixed-point numbers with a shared power of two.

OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3. With M = max |x| in a block
and emax = exponent of the largest power of two among the elements:

    S  = max(floor(log2 M) - emax, -127)
    x' = nearest(x / 2^S) * 2^S

nearest rounds to the nearest element, ties to even, and saturates. An infinity or NaN makes the
whole block NaN (scale code 0xFF). The last block of an axis may be short.

That is the scale rule ``floor``, the specification's. The others avoid saturation, with M = f 2^E,
1 <= f < 2, and the largest element g 2^emax:

    ceil    E + 1 if f > 1
    even    E + 1 if f, rounded to the element's m mantissa bits (halves up), is 2
    rceil   E + 1 if f > g, which is the smallest scale under which M does not saturate

in place of floor(log2 M). All of them add a constant to the bits of M and read the exponent then.
Sources: torchao's ScaleCalculationMode; even is also Quark's; rceil is from Mishra et al. 2025,
arXiv 2506.08027. (torchao computes rceil with a rounded 1/max, which differs at boundaries.)

Elements: those of :mod:`~quark_native.formats.minifloat`, or two's complement fixed point of b
bits with b - 2 fraction bits, without its most negative code: mxint8 has -127/64..127/64 in steps
of 1/64. mxint4 and mxint2 follow the same rule; the specification has only mxint8.

The values of floor and nearest_even equal those of two independent codes, microxcaling's C++
functions with round-to-even and torchao's MX with the FLOOR scale; a negative value that rounds
to zero keeps its sign, as in torchao.

Formats of the same kind, with other elements and limits of the scale:

    msfp12..msfp16          Rouhani et al. 2020, "Pushing the limits of narrow precision inferencing
                            at cloud scale with Microsoft floating point": blocks of 16, sign and
                            3 to 7 mantissa bits, the step 2^(E + 2 - bits)
    block_fp[w|e,b]{B}      the same with w bits and an exponent E + 1 within -b..2^e - 1 - b. Zhang
                            et al. 2023, arXiv 2310.05079 (MASE)
    block_minifloat[w|e|c]{B}   elements of all codes finite, whose bias the block shares, so that
                            their largest exponent is E, within the range of a c-bit exponent,
                            1 - 2^(c-1)..2^(c-1). Fox et al. 2021, "A block minifloat
                            representation for training deep neural networks". (MASE takes E
                            itself for the bias: its values vanish in blocks below 2.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat, parse_format
from quark_core.spec import Rounding, ScaleRule
from quark_native.formats.base import SCALE_NAN, GridFormat, Parameters
from quark_native.formats.bits import (
    MANTISSA_BITS,
    MIN_SUBNORMAL_EXPONENT,
    exponent_of,
    exponent_of_power,
    power_of_two,
)
from quark_native.formats.layout import Layout
from quark_native.formats.minifloat import Minifloat, element_of
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call
from quark_native.limits import shared_exponent_range

MIN_EXPONENT_E8M0, MAX_EXPONENT_E8M0 = -127, 127
_MANTISSA_MASK = (1 << MANTISSA_BITS) - 1


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point elements with one integer bit and a symmetric range.

    Attributes:
        bits: Bits of an element, sign included.
    """

    bits: int
    max_exponent = 0

    @property
    def step(self) -> float:
        """Distance of neighbouring elements."""
        return 2.0 ** (2 - self.bits)

    @property
    def max(self) -> float:
        """The largest element."""
        return 2.0 - self.step if self.bits > 1 else 0.0

    @property
    def mantissa_bits(self) -> int:
        """Bits behind the leading one of the largest element."""
        return max(self.bits - 2, 0)

    def round(self, x: Tensor, rounder: Rounder) -> Tensor:
        """The element that each value is rounded to; NaN stays NaN."""
        return rounder(x.div(self.step)).mul_(self.step).clamp_(-self.max, self.max)

    def encode(self, elements: Tensor) -> Tensor:
        """int32 codes of values that are elements; NaN, whose block has a NaN scale, becomes 0."""
        return (elements / self.step).nan_to_num().to(torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of codes."""
        return codes.to(torch.float32) * self.step


class SharedExponent(GridFormat):
    """Elements of a block with a power of two in common, which the block's maximum decides.

    Args:
        number: Name and sizes.
        layout: Its axis counts; blocks are those of the format.
        element: The elements.
        rounding: Of the elements.
        scale_rule: How the scale is rounded to a power of two.
        scale_limits: Smallest and largest exponent of a scale.
    """

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        element: Minifloat | FixedPoint,
        rounding: Rounding = "nearest_even",
        scale_rule: ScaleRule = "floor",
        scale_limits: tuple[int, int] = (MIN_EXPONENT_E8M0, MAX_EXPONENT_E8M0),
    ) -> None:
        layout = replace(layout, kind="group", size=number.block or 1)
        super().__init__(number, layout, "e8m0", rounding=rounding)
        self.element = element
        self.scale_limits = scale_limits
        self.bump = _bump(scale_rule, element)

    def measure(self, x: Tensor) -> Parameters:
        """The power of two of each block's maximum, by the scale rule."""
        largest = self.layout.largest(x)
        # Subnormal maxima read as 2^-127, which is already where the scale is cut off.
        raised = (largest.view(torch.int32) + self.bump).view(torch.float32)
        exponent = exponent_of(raised) - self.element.max_exponent
        scale = power_of_two(exponent.clamp(*self.scale_limits))
        return Parameters(torch.where(largest.isfinite(), scale, torch.nan))

    def call(self) -> Call | None:
        """One pass finds the maximum and rounds."""
        if isinstance(self.element, FixedPoint):
            element: Minifloat | FixedPoint = self.element
            smallest, mantissa = 0, self.element.bits - 2
        else:
            element, smallest = self.element, self.element.min_exponent
            mantissa = self.element.mantissa_bits
        if mantissa > 10 or not -60 <= smallest <= element.max_exponent <= 60:
            return None
        return Call(
            "mx",
            self.rounding,
            mantissa=mantissa,
            min_exponent=smallest,
            max_exponent=element.max_exponent,
            low=-element.max,
            high=element.max,
            bump=self.bump,
            min_scale=self.scale_limits[0],
            max_scale=self.scale_limits[1],
        )

    def code_table(self) -> Tensor:
        """The element of each code, float32; of two's complement codes read as unsigned."""
        codes = torch.arange(1 << self.number.bits, dtype=torch.int32)
        if self.signed_codes:
            codes = torch.where(codes >= codes.numel() // 2, codes - codes.numel(), codes)
        return self._elements(codes, None)

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, _ = self._spread(parameters, x.ndim)
        # Nothing but its scale tells that a block is NaN.
        return torch.where(scale.isnan(), 0, super()._coded(x, parameters, rounder))

    def store_scale(self, scale: Tensor) -> Tensor:
        """The exponent, counted from the smallest one: E8M0 in the MX formats."""
        field = exponent_of_power(scale) - self.scale_limits[0]
        return torch.where(scale.isnan(), SCALE_NAN, field).to(torch.uint8)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        scale = power_of_two(stored.to(torch.int32) + self.scale_limits[0])
        return torch.where(stored == SCALE_NAN, torch.nan, scale)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        return self.element.round(scaled, rounder)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.encode(elements)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.decode(codes)

    def _element_limits(self) -> tuple[float, float]:
        return -self.element.max, self.element.max


def _bump(rule: ScaleRule, element: Minifloat | FixedPoint) -> int:
    """What the bits of a maximum are raised by so that its exponent is that of the scale rule."""
    if rule == "floor":
        return 0
    if rule == "ceil":
        return _MANTISSA_MASK
    if rule == "even":
        return 1 << (MANTISSA_BITS - 1 - element.mantissa_bits)
    fraction = element.max / 2.0**element.max_exponent - 1
    return _MANTISSA_MASK - int(fraction * (1 << MANTISSA_BITS))


def microscaling(
    number: NumberFormat, layout: Layout, rounding: Rounding, scale_rule: ScaleRule
) -> SharedExponent:
    """An MX format."""
    if number.exponent is None:
        return SharedExponent(number, layout, FixedPoint(number.bits), rounding, scale_rule)
    element = element_of(parse_format(number.name.removeprefix("mx").partition("{")[0]))
    return SharedExponent(number, layout, element, rounding, scale_rule)


def block_fixed_point(number: NumberFormat, layout: Layout, rounding: Rounding) -> SharedExponent:
    """MSFP or block_fp."""
    limits = (MIN_EXPONENT_E8M0, MAX_EXPONENT_E8M0)
    if number.family == "block_fp":
        lowest, highest = shared_exponent_range(number)
        limits = (max(lowest - 1, limits[0]), min(highest - 1, limits[1]))
    return SharedExponent(number, layout, FixedPoint(number.bits), rounding, scale_limits=limits)


def block_minifloat(number: NumberFormat, layout: Layout, rounding: Rounding) -> SharedExponent:
    """block_minifloat: the elements have the bias 0, the scale is 2^-bias."""
    element = Minifloat(number.exponent or 1, number.mantissa or 0, bias=0)
    half = 1 << int(number.shared_bits) >> 1
    lowest, highest = (end - element.max_exponent for end in (1 - half, half))
    limits = (max(lowest, MIN_SUBNORMAL_EXPONENT), highest)
    return SharedExponent(number, layout, element, rounding, scale_limits=limits)
