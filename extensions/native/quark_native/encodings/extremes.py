"""Observers of smallest and largest values."""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.encodings.base import Observer, nothing_observed
from quark_native.formats import Format


class MinMax(Observer):
    """The smallest and the largest value seen."""

    def __init__(self, fmt: Format) -> None:
        super().__init__(fmt)
        self._range: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor) -> None:
        """Widen the range to include every value of x."""
        if not x.numel():
            return
        low, high = self.format.layout.extremes(x.to(torch.float32))
        if self._range is not None:
            low, high = self._merge(self._range, (low, high))
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """The range seen so far."""
        if self._range is None:
            raise nothing_observed()
        return self._range

    def _merge(
        self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


class MovingAverage(MinMax):
    """The exponential moving average of each batch's smallest and largest value.

    With momentum a: range = (1 - a) * range + a * batch; the first batch sets it.
    """

    def __init__(self, fmt: Format, momentum: float) -> None:
        super().__init__(fmt)
        self.momentum = momentum

    def _merge(
        self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        low, high = (
            (1 - self.momentum) * before + self.momentum * now
            for before, now in zip(old, new, strict=True)
        )
        return low, high
