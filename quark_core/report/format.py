"""Numbers as people read them."""

from __future__ import annotations

import math

_SHARES = {"accuracy", "top5", "topk", "top1_agreement"}
_DECIBELS = {"sqnr"}


def metric_text(name: str, value: float | None) -> str:
    """A metric with its unit: shares in percent, noise in dB, others as they are."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    if name in _SHARES:
        return f"{100 * value:.2f} %"
    if name in _DECIBELS:
        return f"{value:.1f} dB"
    return f"{value:.4g}"


def delta_text(name: str, value: float, base: float) -> str:
    """The distance from the float model's value, in the metric's unit."""
    if name in _SHARES:
        return f"{100 * (value - base):+.2f}"
    return f"{value - base:+.3g}"


def bytes_text(count: int | None) -> str:
    """A size in kB, MB or GB (powers of 1000)."""
    if count is None:
        return "-"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def ratio_text(count: int | None, base: int | None) -> str:
    """One size as a share of another."""
    return "-" if not count or not base else f"{count / base:.3f}"


def seconds_text(seconds: float | None) -> str:
    """A duration in seconds or minutes."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
