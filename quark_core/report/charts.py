"""Charts as SVG text, drawn by hand: they print, scale and need no library in the browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from quark_core.report.format import bytes_text, metric_text

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 18, 44
_LABEL_HEIGHT, _LABEL_WIDTH = 13, 6.4
_MANY_LAYERS = 60


def size_plot(
    metric: str, points: Sequence[tuple[str, int, float]], reference: tuple[int, float] | None
) -> Markup:
    """A metric against packed size, one labelled point a run, the float model as a ring.

    Args:
        metric: Name of the metric, for the axis.
        points: (name, bytes, value) of each run.
        reference: (bytes, value) of the float model, or None.
    """
    everything = [*points, *([("float", *reference)] if reference else [])]
    x = _scale([math.log(size) for _, size, _ in everything], _LEFT, _WIDTH - _RIGHT, 0.12)
    y = _scale([value for _, _, value in everything], _HEIGHT - _BOTTOM, _TOP, 0.15)
    parts = [
        Markup(
            '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{} against size">'
        ).format(_WIDTH, _HEIGHT, metric),
        Markup("<title>{} against size</title>").format(metric),
    ]
    for value in _ticks([value for _, _, value in everything]):
        line = round(y(value), 1)
        parts.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
                '<text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, line, _LEFT - 8, line + 4, metric_text(metric, value))
        )
    # Labels keep clear of every mark, not only of one another.
    marks = [(x(math.log(size)), y(value)) for _, size, value in everything]
    taken = [(cx - 6, cy - 6, cx + 6, cy + 6) for cx, cy in marks]
    for name, size, value in sorted(everything, key=lambda point: point[1]):
        cx, cy = round(x(math.log(size)), 1), round(y(value), 1)
        label = f"{name} ({bytes_text(size)})"
        lx, ly, anchor = _place(cx, cy, label, taken)
        kind = "float" if reference and name == "float" else "run"
        parts.append(
            Markup(
                '<circle class="{}" cx="{}" cy="{}" r="5"><title>{}: {}</title></circle>'
                '<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>'
            ).format(kind, cx, cy, label, metric_text(metric, value), lx, ly, anchor, label)
        )
    parts.append(
        Markup(
            '<text class="axis" x="{}" y="{}" text-anchor="middle">packed size (log)</text></svg>'
        ).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8)
    )
    return Markup("").join(parts)


def layer_bars(layers: Sequence[dict[str, Any]]) -> Markup:
    """SQNR of each layer's output as horizontal bars, in the model's order.

    Args:
        layers: ``name`` and ``sqnr`` (dB, infinite, or None where it is not known).
    """
    row = 20 if len(layers) <= _MANY_LAYERS else 12
    longest = max((len(layer["name"]) for layer in layers), default=1)
    left = min(260.0, 14 + longest * _LABEL_WIDTH)
    finite = [layer["sqnr"] for layer in layers if _finite(layer["sqnr"])]
    top = max([*finite, 1.0])
    height = row * len(layers) + 8
    parts = [
        Markup(
            '<svg class="bars{}" viewBox="0 0 {} {}" role="img" aria-label="SQNR of each layer">'
            "<title>SQNR of each layer in dB</title>"
        ).format(" dense" if row < 20 else "", _WIDTH, height)
    ]
    for index, layer in enumerate(layers):
        middle, value = index * row + row / 2 + 2, layer["sqnr"]
        share = 0.0 if value is None else 1.0 if value == math.inf else max(0.0, value) / top
        width = round(share * (_WIDTH - left - 70), 1)
        parts.append(
            Markup(
                '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>'
                '<text class="value" x="{}" y="{}">{}</text>'
            ).format(
                left - 8,
                middle + 4,
                _short(layer["name"] or "(model)"),
                left,
                middle - row * 0.32,
                max(width, 1),
                round(row * 0.64, 1),
                left + width + 6,
                middle + 4,
                metric_text("sqnr", value),
            )
        )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(name: str) -> Markup:
    """The end of a long name says more than its beginning."""
    return escape(name if len(name) <= 38 else "…" + name[-37:])


def _scale(values: Sequence[float], start: float, stop: float, margin: float) -> Any:
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - margin * spread, high + margin * spread
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers across the values."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    step: float = 10 ** math.floor(math.log10(spread))
    for factor in (0.1, 0.2, 0.5, 1, 2, 5):
        if spread / (step * factor) <= 5:
            step *= factor
            break
    first = math.floor(low / step)
    count = math.ceil(high / step) - first
    return [round((first + index) * step, 12) for index in range(count + 1)]


def _place(
    x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str]:
    """Where a label stands without covering another: right, left, then ever further up or down."""
    width = len(label) * _LABEL_WIDTH
    for step in range(24):
        shift = (step // 2) * _LABEL_HEIGHT * (1 if step % 4 < 2 else -1)
        for anchor, left in (("start", x + 10), ("end", x - 10 - width)):
            box = (left, y + shift - 9, left + width, y + shift + 4)
            inside = box[0] >= 0 and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - 20
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return (x + 10 if anchor == "start" else x - 10), y + shift + 4, anchor
    return x + 10, y + 4, "start"


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
