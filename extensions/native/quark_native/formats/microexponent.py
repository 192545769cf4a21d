"""Shared microexponents: mx4, mx6 and mx9.

16 elements share an 8-bit exponent E = floor(log2 max |x|), and each pair of them a shift of one
bit, set if both elements lie below 2^E:

    step = 2^(E - shift + 2 - bits)
    x'   = clamp(round(x / step), -(2^(bits-1) - 1), 2^(bits-1) - 1) * step

with elements of 3, 5 and 8 bits, sign included. Rouhani et al. 2023, "With shared microexponents, a
little shifting goes a long way", arXiv 2302.08007.

A scale here belongs to a pair. An infinity or NaN makes its block NaN, and E is at least -126, so
the subnormal numbers have the steps of the smallest normal ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Rounding
from quark_native.formats.base import GridFormat, Parameters
from quark_native.formats.bits import MIN_EXPONENT, exponent_of, exponent_of_power, power_of_two
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder

_PAIR = 2


class SharedMicroexponent(GridFormat):
    """Blocks of pairs: an exponent for all, a shift for each pair."""

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        super().__init__(
            number, replace(layout, kind="group", size=_PAIR), "e8m0", rounding=rounding
        )
        self.blocks = replace(self.layout, size=(number.block or _PAIR) // _PAIR)
        self.highest = (1 << (number.bits - 1)) - 1

    def measure(self, x: Tensor) -> Parameters:
        """The step of each pair."""
        pairs = self.layout.largest(x)
        block = self._of_block(pairs)
        exponent = exponent_of(block).clamp_(min=MIN_EXPONENT)
        shift = (exponent_of(pairs).clamp_(min=MIN_EXPONENT) < exponent).to(torch.int32)
        step = power_of_two(exponent - shift + 2 - self.number.bits)
        return Parameters(torch.where(block.isfinite(), step, torch.nan))

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """A byte with the exponent of each block, and the shifts of its pairs as bits."""
        scale = parameters.scale
        largest = self._of_block(scale)
        shifts = self.blocks.split((scale != largest) & scale.isfinite(), fill=0)
        axis = self.layout.axis % scale.ndim
        exponents = self.blocks.split(largest).select(axis + 1, 0)
        stored = exponent_of_power(exponents) - 2 + self.number.bits + 127
        weights = 1 << torch.arange(self.blocks.size, device=scale.device)
        bits = (shifts.movedim(axis + 1, -1) * weights).sum(-1)
        return {
            "scale": torch.where(exponents.isnan(), 255, stored).to(torch.uint8),
            "outer": bits.to(torch.uint8),
        }

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        axis = self.layout.axis % len(shape)
        pairs = self.layout.compact_shape(shape)
        exponent = stored["scale"].to(torch.int32).unsqueeze(axis + 1)
        places = torch.arange(self.blocks.size, device=exponent.device)
        places = places.reshape([-1] + [1] * (len(shape) - 1 - axis))
        shift = (stored["outer"].to(torch.int32).unsqueeze(axis + 1) >> places) & 1
        step = power_of_two(exponent - 127 - shift + 2 - self.number.bits)
        step = torch.where(exponent == 255, torch.nan, step)
        return Parameters(self.blocks.join(step, pairs))

    def _of_block(self, pairs: Tensor) -> Tensor:
        """The largest value of each block, for each of its pairs."""
        spread = self.blocks.spread(self.blocks.largest(pairs), pairs.ndim)
        return self.blocks.join(spread.expand_as(self.blocks.split(pairs)), tuple(pairs.shape))

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        return rounder(scaled).clamp_(-self.highest, self.highest)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return -self.highest, self.highest
