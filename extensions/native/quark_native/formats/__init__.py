"""The number formats: exact arithmetic in plain torch, one file a family.

:func:`format_for` turns a specification into a :class:`Format`, which encodes, decodes and
fake-quantizes tensors. This is the reference that every faster implementation must equal bit for
bit.
"""

from __future__ import annotations

from quark_core.errors import Problem, UnsupportedSpecError
from quark_core.spec import TensorSpec
from quark_native.formats.base import Encoded, Format, Parameters
from quark_native.formats.bfp import BlockFloat
from quark_native.formats.integer import Integer
from quark_native.formats.layout import Layout
from quark_native.formats.minifloat import ScaledFloat
from quark_native.formats.mx import Microscaling
from quark_native.limits import refusal

__all__ = [
    "Encoded",
    "Format",
    "Layout",
    "Parameters",
    "format_for",
]


def format_for(spec: TensorSpec, axis: int | None = None) -> Format:
    """The arithmetic of a resolved spec.

    Args:
        spec: As :meth:`~quark_core.spec.TensorSpec.resolve` returns it.
        axis: The tensor's own axis of channels or groups, used if the spec names none; None is
            0 for channels and -1 for groups.

    Raises:
        UnsupportedSpecError: There is no such arithmetic here.
    """
    reason = refusal(spec)
    if reason is not None:
        raise UnsupportedSpecError([Problem("format", reason)])
    number, layout = spec.number_format, _layout(spec, axis)
    scale = spec.scale or "float32"
    if number.family == "integer":
        return Integer(number, layout, scale, spec.symmetric is not False)
    if number.family == "float":
        return ScaledFloat(number, layout, scale)
    if number.family == "mx":
        return Microscaling(number, layout)
    return BlockFloat(number, layout)


def _layout(spec: TensorSpec, axis: int | None) -> Layout:
    granularity = spec.granularity
    if granularity is None or granularity.kind in ("tensor", "block"):
        return Layout()
    if granularity.axis is not None:
        axis = granularity.axis
    if granularity.kind == "channel":
        return Layout("channel", 0 if axis is None else axis)
    if granularity.kind == "token":
        return Layout("token")
    return Layout("group", -1 if axis is None else axis, granularity.size or 1)
