"""Grid: what a weight quantizer can represent, with its scales taken out once.

Algorithms that round one column after the other would otherwise run the whole weight through the
quantizer for each column. Brevitas keeps the scales of weights once they are known, so that

    integers:  q = (clamp(round(w / scale + zero)) - zero) * scale
    floats:    q = clamp(round(w / scale / step) * step) * scale,  step = 2^(floor(log2 |w / scale|)
               - mantissa bits), not less than the subnormal step

give the same numbers, bit for bit, column by column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quark_brevitas.formats import exponent_bias, largest
from quark_core.spec import TensorSpec

Rounder = Callable[[Tensor, int], Tensor]
"""From the values of a column [rows] and its position to the nearest representable values."""


@dataclass(frozen=True)
class Grid:
    """The representable values of one weight.

    Attributes:
        scale: float, [rows or 1, columns or 1] for the weight as a matrix.
        zero_point: like ``scale``, or None where all are zero.
        low, high: Smallest and largest code, or element of a floating-point format.
        mantissa: Mantissa bits of a floating-point element, or None for integers.
        smallest_step: Exponent of the distance between subnormal elements.
    """

    scale: Tensor
    zero_point: Tensor | None
    low: float
    high: float
    mantissa: int | None = None
    smallest_step: int = 0

    @classmethod
    def of(cls, layer: Any, spec: TensorSpec) -> Grid:
        """Read the grid of a Brevitas layer; its scales become known if they were not yet."""
        numbers = layer.quant_weight()
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        scale = _matrix(numbers.scale, layer.weight, rows, columns)
        fmt = spec.number_format
        if fmt.exponent is not None and fmt.mantissa is not None:
            high = largest(fmt)
            step = 1 - exponent_bias(fmt) - fmt.mantissa
            return cls(scale, None, -high, high, fmt.mantissa, step)
        zero_point = _matrix(numbers.zero_point, layer.weight, rows, columns)
        integer = layer.weight_quant.tensor_quant.int_quant
        bits = numbers.bit_width
        return cls(
            scale,
            zero_point if bool(zero_point.any()) else None,
            float(integer.min_int(bits)),
            float(integer.max_int(bits)),
        )

    def rounder(self, rows: slice, order: Tensor) -> Rounder:
        """Rounds columns of some rows, taken in ``order`` [columns]."""
        scales = _columns(self.scale, rows, order)
        if self.mantissa is not None:
            return lambda values, at: self._nearest_float(values / scales[at]).mul_(scales[at])
        low, high = self.low, self.high
        if self.zero_point is None:
            return lambda values, at: (
                (values / scales[at]).round_().clamp_(low, high).mul_(scales[at])
            )
        zeros = _columns(self.zero_point, rows, order)
        return lambda values, at: (
            (values / scales[at])
            .add_(zeros[at])
            .round_()
            .clamp_(low, high)
            .sub_(zeros[at])
            .mul_(scales[at])
        )

    def units(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight [rows, columns] counted in steps of the grid, and the size of a step.

        Rounding the count to an integer and :meth:`clamp`-ing its product with the step gives a
        representable value.
        """
        scaled = weight / self.scale
        if self.mantissa is None:
            return scaled, self.scale.expand_as(weight)
        step = self._step(scaled)
        return scaled / step, step * self.scale

    def clamp(self, counts: Tensor, steps: Tensor) -> Tensor:
        """The values of whole counts of steps, kept within the grid."""
        if self.mantissa is not None:
            values = counts * steps
            return torch.minimum(
                torch.maximum(values, self.low * self.scale), self.high * self.scale
            )
        zero: Tensor | float = 0.0 if self.zero_point is None else self.zero_point
        return ((counts + zero).clamp(self.low, self.high) - zero) * steps

    def _nearest_float(self, scaled: Tensor) -> Tensor:
        step = self._step(scaled)
        return (scaled / step).round_().mul_(step).clamp_(self.low, self.high)

    def _step(self, scaled: Tensor) -> Tensor:
        assert self.mantissa is not None
        tiny = torch.finfo(scaled.dtype).tiny
        exponent = (scaled.abs() + tiny).log2_().floor_().sub_(self.mantissa)
        return exponent.clamp_(min=self.smallest_step).exp2_()


def _matrix(numbers: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """Numbers that broadcast against a weight, as a matrix no larger than it must be."""
    if numbers.numel() == 1:
        return numbers.reshape(1, 1)
    if numbers.numel() == rows and numbers.shape[0] == rows:
        return numbers.reshape(rows, 1)
    return numbers.expand_as(weight).reshape(rows, columns)


def _columns(numbers: Tensor, rows: slice, order: Tensor) -> list[Tensor]:
    """One row vector a column, in order; the same vector again where columns share it."""
    if numbers.shape[0] > 1:
        numbers = numbers[rows]
    if numbers.shape[1] == 1:
        return [numbers[:, 0].contiguous()] * len(order)
    return list(numbers[:, order].t().contiguous().unbind(0))
