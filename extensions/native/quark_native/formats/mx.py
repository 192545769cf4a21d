"""Microscaling (MX): blocks of minifloats or fixed-point numbers with a shared power of two.

OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3. With M = max |x| in a block
and emax = exponent of the largest power of two among the elements:

    S  = max(floor(log2 M) - emax, -127)
    x' = nearest(x / 2^S) * 2^S

nearest rounds to the nearest element, ties to even, and saturates. An infinity or NaN makes the
whole block NaN (scale code 0xFF). The last block of an axis may be short.

Elements: those of :mod:`~quark_native.formats.minifloat`, or two's complement fixed point of b
bits with b - 2 fraction bits, without its most negative code: mxint8 has -127/64..127/64 in steps
of 1/64. mxint4 and mxint2 follow the same rule; the specification has only mxint8.

This is the profile ``ocp``: values equal those of two independent codes, microxcaling's C++
functions with round-to-even and torchao's MX with the FLOOR scale; a negative value that rounds
to zero keeps its sign, as in torchao.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat, parse_format
from quark_native.formats.base import Format, Parameters
from quark_native.formats.bits import exponent_of, power_of_two
from quark_native.formats.layout import Layout
from quark_native.formats.minifloat import Minifloat, element_of

MIN_EXPONENT_E8M0 = -127


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

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest element of each value; NaN stays NaN."""
        return x.div(self.step).round_().mul_(self.step).clamp_(-self.max, self.max)

    def encode(self, elements: Tensor) -> Tensor:
        """int32 codes of values that are elements; NaN, whose block has a NaN scale, becomes 0."""
        return (elements / self.step).nan_to_num().to(torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of codes."""
        return codes.to(torch.float32) * self.step


class Microscaling(Format):
    """MX formats in the profile ``ocp``."""

    def __init__(self, number: NumberFormat, layout: Layout) -> None:
        super().__init__(number, replace(layout, kind="group", size=number.block or 1), "e8m0")
        self.element: Minifloat | FixedPoint
        if number.exponent is None:
            self.element = FixedPoint(number.bits)
        else:
            element = number.name.removeprefix("mx").partition("{")[0]
            self.element = element_of(parse_format(element))

    def measure(self, x: Tensor) -> Parameters:
        """The largest power of two that puts no block's maximum above the largest exponent."""
        largest = self.layout.largest(x)
        # Subnormal maxima read as 2^-127, which is already where the scale is cut off.
        exponent = exponent_of(largest) - self.element.max_exponent
        scale = power_of_two(exponent.clamp(min=MIN_EXPONENT_E8M0))
        return Parameters(torch.where(largest.isfinite(), scale, torch.nan))

    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.nearest(scaled)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.encode(elements)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.decode(codes)

    def _element_limits(self) -> tuple[float, float]:
        return -self.element.max, self.element.max
