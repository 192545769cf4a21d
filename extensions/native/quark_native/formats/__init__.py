"""The number formats: exact arithmetic in plain torch, one file a family.

:func:`format_for` turns a specification into a :class:`Format`, which encodes, decodes and
fake-quantizes tensors. This is the reference that every faster implementation must equal bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable

from quark_core.errors import Problem, UnsupportedSpecError
from quark_core.formats import NumberFormat
from quark_core.spec import Rounding, TensorSpec
from quark_native.formats.base import Encoded, Format, Parameters
from quark_native.formats.bfp import AmdBlockFloat, BlockFloat
from quark_native.formats.binary import Binary, ResidualBinary, Ternary
from quark_native.formats.integer import FixedPoint, Integer, LowPowerBlockwise
from quark_native.formats.layout import Layout
from quark_native.formats.logarithmic import Logarithmic
from quark_native.formats.microexponent import SharedMicroexponent
from quark_native.formats.minifloat import ScaledFloat
from quark_native.formats.mx import block_fixed_point, block_minifloat, microscaling
from quark_native.formats.scaled_block import Nvfp4, ScaledBlockFloat
from quark_native.limits import refusal

__all__ = [
    "Encoded",
    "Format",
    "Layout",
    "Parameters",
    "format_for",
]


_Builder = Callable[[TensorSpec, Layout], Format]


def format_for(spec: TensorSpec, axis: int | None = None, *, profile: str = "ocp") -> Format:
    """The arithmetic of a resolved spec.

    Args:
        spec: As :meth:`~quark_core.spec.TensorSpec.resolve` returns it.
        axis: The tensor's own axis of channels or groups, used if the spec names none; None is
            0 for channels and -1 for groups.
        profile: Whose numerics; see :mod:`quark_native.profiles`.

    Raises:
        UnsupportedSpecError: There is no such arithmetic here.
    """
    reason = refusal(spec)
    if reason is not None:
        raise UnsupportedSpecError([Problem("format", reason)])
    if profile != "ocp":
        from quark_native.profiles.adapter import profiled

        fmt = profiled(spec, _layout(spec, axis), profile)
    else:
        fmt = _BUILDERS[spec.number_format.family](spec, _layout(spec, axis))
    fmt.spelling = str(spec), axis, profile
    return fmt


def _integer(spec: TensorSpec, layout: Layout) -> Format:
    return Integer(
        spec.number_format,
        layout,
        spec.scale or "float32",
        spec.symmetric is not False,
        spec.rounding,
        narrow=spec.narrow,
    )


def _float(spec: TensorSpec, layout: Layout) -> Format:
    return ScaledFloat(spec.number_format, layout, spec.scale or "float32", spec.rounding)


def _bfp(spec: TensorSpec, layout: Layout) -> Format:
    kind = AmdBlockFloat if spec.format == "bfp16" else BlockFloat
    return kind(spec.number_format, layout, spec.rounding)


def _mx(spec: TensorSpec, layout: Layout) -> Format:
    return microscaling(spec.number_format, layout, spec.rounding, spec.scale_rule or "floor")


def _of(build: Callable[[NumberFormat, Layout, Rounding], Format]) -> _Builder:
    return lambda spec, layout: build(spec.number_format, layout, spec.rounding)


def _plain(build: Callable[[NumberFormat, Layout], Format]) -> _Builder:
    return lambda spec, layout: build(spec.number_format, layout)


_BUILDERS: dict[str, _Builder] = {
    "integer": _integer,
    "fixed": lambda spec, layout: FixedPoint(spec.number_format, spec.rounding),
    "lpbq": _of(LowPowerBlockwise),
    "float": _float,
    "denorm": _float,
    "mx": _mx,
    "msfp": _of(block_fixed_point),
    "block_fp": _of(block_fixed_point),
    "block_minifloat": _of(block_minifloat),
    "shared_microexponent": _of(SharedMicroexponent),
    "bfp": _bfp,
    "nvfp": _of(Nvfp4),
    "sbfp": _of(ScaledBlockFloat),
    "log": _plain(Logarithmic),
    "block_log": _plain(Logarithmic),
    "binary": _plain(Binary),
    "binary_residual": _plain(ResidualBinary),
    "ternary": _plain(Ternary),
}


def _layout(spec: TensorSpec, axis: int | None) -> Layout:
    granularity = spec.granularity
    if granularity is None or granularity.kind == "tensor":
        return Layout()
    if granularity.kind == "block":
        return Layout("block", tile=granularity.shape or ())
    if granularity.axis is not None:
        axis = granularity.axis
    if granularity.kind == "channel":
        return Layout("channel", 0 if axis is None else axis)
    if granularity.kind == "token":
        return Layout("token")
    return Layout("group", -1 if axis is None else axis, granularity.size or 1)
