"""Observers: how values become a range, and a range a scale and a zero point."""

from __future__ import annotations

from quark_core.spec import Observer as ObserverSpec
from quark_native.encodings.base import Observer
from quark_native.encodings.extremes import MinMax, MovingAverage
from quark_native.encodings.samples import Histogram, Whole
from quark_native.encodings.search import CLIP_RATIOS, MeanSquaredError, Percentile
from quark_native.formats import Format

__all__ = [
    "CLIP_RATIOS",
    "Histogram",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Whole",
    "observer_for",
]


def observer_for(spec: ObserverSpec | None, fmt: Format, *, stream: bool) -> Observer:
    """The observer that a spec names; None means minmax.

    Args:
        spec: ``minmax``, ``moving_average``, ``percentile`` or ``mse``.
        fmt: The format to find scales for.
        stream: Whether batches come one after another (activations) or the tensor comes once and
            whole (weights).

    Raises:
        ValueError: There is no such observer here, or not for this layout.
    """
    name = spec.name if spec is not None else "minmax"
    if spec is None or name == "minmax":
        return MinMax(fmt)
    if name == "moving_average":
        return MovingAverage(fmt, spec.momentum)
    if name not in ("percentile", "mse"):
        known = "minmax, moving_average, percentile and mse"
        raise ValueError(f"there is no observer {name} here: there are {known}")
    if stream and fmt.layout.kind != "tensor":
        raise ValueError(f"observer {name} needs granularity tensor for an input or output")
    sample = Histogram(fmt) if stream else Whole(fmt)
    if name == "percentile":
        return Percentile(fmt, sample, spec.percentile)
    return MeanSquaredError(fmt, sample)
