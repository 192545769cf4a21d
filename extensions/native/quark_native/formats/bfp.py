"""Block floating point: d-Matrix's BFP[p|8]{B}(SR), and AMD's BFP16.

BFP[p|8]{B}, symmetric, round to nearest, is (SN), the letters left out.

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

Other letters: ``_`` for S adds the code -2^(p-1); D, U, S for N round down, up, stochastically
(where the source's U adds a whole step even to exact values, which ours leaves as they are).

bfp16 shares the exponent of 8 elements of 8 bits: step = 2^(E - 6), doubled if an element of the
block would round to 128 steps; codes -128..127. Source: AMD Quark's BFP16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Rounding
from quark_native.formats.base import SCALE_NAN, GridFormat, Parameters
from quark_native.formats.bits import (
    EXPONENT_BIAS,
    exponent_of,
    exponent_of_power,
    power_of_two,
)
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call

_LETTERS: dict[str, Rounding] = {"D": "floor", "U": "ceil", "S": "stochastic"}


class BlockFloat(GridFormat):
    """dmx-style block floating point."""

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        layout = replace(layout, kind="group", size=number.block or 1)
        letters = number.name.partition("(")[2]
        super().__init__(number, layout, "e8m0", rounding=_LETTERS.get(letters[1:2], rounding))
        self.highest = (1 << (number.bits - 1)) - 1
        self.lowest = -self.highest - letters.startswith("_")

    def measure(self, x: Tensor) -> Parameters:
        """The step that the exponent of each block's maximum makes."""
        largest = self.layout.largest(x)
        step = self._step(largest)
        if self.number.block == 1 and self.rounding == "nearest_even":
            rounded = (largest / step).round_().mul_(step)
            step = torch.where(rounded.isfinite(), self._step(rounded), step)
        return Parameters(torch.where(largest.isfinite(), step, torch.nan))

    def _step(self, largest: Tensor) -> Tensor:
        return power_of_two(exponent_of(largest) + 2 - self.number.bits)

    def call(self) -> Call | None:
        """The nearest element of a block of several; the other modes have no kernel."""
        if self.number.block == 1 or self.rounding != "nearest_even" or self.number.bits > 18:
            return None
        return Call("bfp", mantissa=self.number.bits - 2, low=self.lowest, high=self.highest)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        if self.number.block != 1:
            # In units of the step, 2^(E-21) is 2^(p-23).
            fine = 2.0 ** (23 - self.number.bits)
            scaled = scaled.mul_(fine).round_().div_(fine)
        return rounder(scaled).clamp_(self.lowest, self.highest)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return self.lowest, self.highest

    def store_scale(self, scale: Tensor) -> Tensor:
        """The block's exponent field, since steps reach below E8M0's 2^-127."""
        field = exponent_of_power(scale) - 2 + self.number.bits + EXPONENT_BIAS
        return torch.where(scale.isnan(), SCALE_NAN, field).to(torch.uint8)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        step = power_of_two(stored.to(torch.int32) - EXPONENT_BIAS + 2 - self.number.bits)
        return torch.where(stored == SCALE_NAN, torch.nan, step)


class AmdBlockFloat(GridFormat):
    """BFP16: 8-bit integers of 8 elements with one exponent."""

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        layout = replace(layout, kind="group", size=number.block or 1)
        super().__init__(number, layout, "e8m0", rounding=rounding)

    def measure(self, x: Tensor) -> Parameters:
        """The step that puts the largest value of each block within the codes."""
        low, high = self.layout.extremes(x)
        largest = torch.maximum(high, -low)
        step = power_of_two(exponent_of(largest) - 6)
        # Of the negative side -128 is a code; nothing there rounds to less.
        step = torch.where((high / step).round_() > 127, step * 2, step)
        return Parameters(torch.where(largest.isfinite(), step, torch.nan))

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        return rounder(scaled).clamp_(-128, 127)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return -128, 127

    def store_scale(self, scale: Tensor) -> Tensor:
        """The exponent of 64 steps, which the largest element has at least."""
        return super().store_scale(scale * 64)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        return super().restore_scale(stored) / 64
