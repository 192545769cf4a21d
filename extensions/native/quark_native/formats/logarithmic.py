"""Powers of two with a sign: log[w,b], and block_log[w|c]{B} whose bias a block shares.

    x' = (-1)^s * 2^clamp(round(log2 |x|), emin, emax)

Rounding is in the logarithm: from sqrt(2) * 2^e on, which no float32 equals, e + 1 is nearer.

    log[w,b]         emin = -b, emax = 2^(w-1) - 1 - b; b is 2^(w-2) - 1 unless given
    block_log[w|c]   the same with b = clamp(2^(w-1) - 1 - ceil(log2 M), 0, 2^c - 1), M = max |x| of
                     the block: emax is the smallest exponent that does not clip M

There is no code for zero: 0 becomes 2^emin and -0 becomes -2^emin, and all smaller values with
them. Values below 2^-126, float32's smallest normal number, do not exist here: a smaller emin
counts as -126. NaN stays NaN; an infinity saturates, in block_log an infinity or NaN makes its
block NaN. Miyashita et al. 2016, "Convolutional neural networks using logarithmic data
representation", arXiv 1603.01025; the codes are MASE's (Zhang et al. 2023, arXiv 2310.05079).

A scale here is 2^emax, so elements are 1, 1/2, 1/4 and so on, and a code counts from emin.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_native.formats.base import ElementFormat, Parameters
from quark_native.formats.bits import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    MIN_EXPONENT,
    exponent_of,
    exponent_of_power,
    power_of_two,
)
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call
from quark_native.limits import log_range

SQRT2_BITS = 0x3504F4
"""Mantissa field of the smallest float32 above sqrt(2)."""
_MASK = (1 << MANTISSA_BITS) - 1


class Logarithmic(ElementFormat):
    """log and block_log."""

    def __init__(self, number: NumberFormat, layout: Layout) -> None:
        if number.block:
            layout = replace(layout, kind="group", size=number.block)
        super().__init__(number, layout, "e8m0" if number.block else "unit")
        self.span = (1 << (number.bits - 1)) - 1
        """emax - emin."""
        self.top = 0 if number.block else log_range(number)[1]

    def measure(self, x: Tensor) -> Parameters:
        """2^emax of each block, or of the name."""
        if not self.number.block:
            return Parameters(torch.tensor(2.0**self.top, device=x.device))
        largest = self.layout.largest(x)
        raised = (largest.view(torch.int32) + _MASK).view(torch.float32)
        largest_bias = (1 << int(self.number.shared_bits)) - 1
        # Exponents outside float32's normal range are no scales.
        lowest = max(self.span - largest_bias, MIN_EXPONENT)
        exponent = exponent_of(raised).clamp(lowest, min(self.span, EXPONENT_BIAS))
        return Parameters(torch.where(largest.isfinite(), power_of_two(exponent), torch.nan))

    def call(self) -> Call | None:
        """One pass, the block's maximum inside."""
        if not self.number.block:
            return Call("log", min_exponent=self.top - self.span, max_exponent=self.top)
        largest_bias = (1 << int(self.number.shared_bits)) - 1
        return Call(
            "block_log",
            bump=_MASK,
            mantissa=self.span,
            min_scale=max(self.span - largest_bias, MIN_EXPONENT),
            max_scale=min(self.span, EXPONENT_BIAS),
        )

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The exponents of blocks; nothing where the name says it."""
        return super().store(parameters) if self.number.block else {}

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        if self.number.block:
            return super().restore(stored, shape)
        return Parameters(torch.tensor(2.0**self.top))

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, _ = self._spread(parameters, x.ndim)
        values = self.layout.split(x)
        bits = values.view(torch.int32)
        exponent = exponent_of(values) + ((bits & _MASK) >= SQRT2_BITS).to(torch.int32)
        top = exponent_of(scale)
        exponent = torch.minimum(torch.maximum(exponent, top - self.span), top)
        powers = power_of_two(exponent.clamp_(min=MIN_EXPONENT)).copysign_(values)
        lost = values.isnan() | scale.isnan()
        return torch.where(lost, torch.nan, powers)

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, _ = self._spread(parameters, x.ndim)
        return self._codes(self._quantized(x, parameters, rounder) / scale, None)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        steps_down = -exponent_of_power(elements.abs().nan_to_num_(1.0))
        return (elements.signbit().to(torch.int32) << (self.number.bits - 1)) | (
            self.span - steps_down
        )

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        powers = power_of_two((codes & self.span) - self.span)
        return torch.where(codes > self.span, -powers, powers)

    def _element_limits(self) -> tuple[float, float]:
        return -1.0, 1.0

    @property
    def signed_codes(self) -> bool:
        """Codes are a sign and an exponent, no integers."""
        return False
