"""Observer: what turns the values of a tensor into a range, and the range into a scale."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quark_core.errors import QuantizationError
from quark_native.formats import Format, Parameters


class Observer(ABC):
    """Sees a tensor, or one batch of it after another, and chooses a range for each scale.

    Args:
        fmt: The format that will represent the tensor; it must take ranges (``covers``).
    """

    def __init__(self, fmt: Format) -> None:
        self.format = fmt

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take in one batch: floating point, any shape that the format's layout accepts."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """The range [low, high] to represent, float32 in the layout's compact shape.

        Raises:
            QuantizationError: Nothing was observed.
        """

    def scale_zero_point(self) -> Parameters:
        """The scales (and zero points) for :meth:`range`.

        Raises:
            QuantizationError: Nothing was observed, or values that are not finite.
        """
        low, high = self.range()
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise QuantizationError(
                "the observed values hold NaN or infinities",
                fix="Look for the layer before it that makes them, and leave out the batches "
                "that cause it",
            )
        return self.format.cover(low, high)


def nothing_observed() -> QuantizationError:
    """The error for a range that was asked for before any value was seen."""
    return QuantizationError(
        "no value was observed",
        fix="Give calibration batches that reach this layer, make it dynamic, or skip it by a rule",
    )
