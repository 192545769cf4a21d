"""Block floating point as d-Matrix defines it: BFP[p|8]{B}, symmetric, round to nearest.

A block of B elements shares an 8-bit exponent; each has a p-bit mantissa, sign included. With
E = floor(log2 max |x|):

    step = 2^(E + 2 - p)
    x'   = clamp(round(round_f(x) / step), -(2^(p-1) - 1), 2^(p-1) - 1) * step

where round_f rounds to a multiple of 2^(E-21) and both rounds are to nearest, ties to even. The
first comes from the definition's arithmetic, which adds 6 * 2^E in float32; p = 8, E = 0:
2^-7 + 2^-22 becomes 0, 2^-7 + 2^-21 becomes 2^-6. Source: the CPU code of dmx-compressor.

An infinity or NaN makes its block NaN. The last block of an axis may be short. A subnormal
maximum counts as E = -127, the value of its exponent field.

Where the source leaves the format we follow the formula. For max |x| >= 2^126 its 6 * 2^E
overflows, and every element, zeros too, becomes the most negative value. For a subnormal maximum
it rounds to multiples of 2^-(126+p), half our step, whose multiples reach 2^p - 1: one bit more
than a mantissa has.

Blocks of one element are floating-point numbers with p - 2 mantissa bits: rounded once, and a
carry goes into the exponent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_native.formats.base import SCALE_NAN, Format, Parameters
from quark_native.formats.bits import (
    EXPONENT_BIAS,
    exponent_of,
    exponent_of_power,
    power_of_two,
)
from quark_native.formats.layout import Layout


class BlockFloat(Format):
    """dmx-style block floating point."""

    def __init__(self, number: NumberFormat, layout: Layout) -> None:
        super().__init__(number, replace(layout, kind="group", size=number.block or 1), "e8m0")
        self.highest = (1 << (number.bits - 1)) - 1

    def measure(self, x: Tensor) -> Parameters:
        """The step that the exponent of each block's maximum makes."""
        largest = self.layout.largest(x)
        step = self._step(largest)
        if self.number.block == 1:
            rounded = (largest / step).round_().mul_(step)
            step = torch.where(rounded.isfinite(), self._step(rounded), step)
        return Parameters(torch.where(largest.isfinite(), step, torch.nan))

    def _step(self, largest: Tensor) -> Tensor:
        return power_of_two(exponent_of(largest) + 2 - self.number.bits)

    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        if self.number.block != 1:
            # In units of the step, 2^(E-21) is 2^(p-23).
            fine = 2.0 ** (23 - self.number.bits)
            scaled = scaled.mul_(fine).round_().div_(fine)
        return scaled.round_().clamp_(-self.highest, self.highest)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return -self.highest, self.highest

    def store_scale(self, scale: Tensor) -> Tensor:
        """The block's exponent field, since steps reach below E8M0's 2^-127."""
        field = exponent_of_power(scale) - 2 + self.number.bits + EXPONENT_BIAS
        return torch.where(scale.isnan(), SCALE_NAN, field).to(torch.uint8)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        step = power_of_two(stored.to(torch.int32) - EXPONENT_BIAS + 2 - self.number.bits)
        return torch.where(stored == SCALE_NAN, torch.nan, step)
