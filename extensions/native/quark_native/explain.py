"""What a format makes of some values, for ``quark formats explain``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quark_core.errors import Problem, UnsupportedSpecError
from quark_core.registry.specs import FormatExplanation
from quark_native.formats import Encoded, Format, Parameters
from quark_native.kernels import dispatch
from quark_native.profiles.adapter import Profiled

COLUMNS = ("VALUE", "SCALE", "CODE", "BECOMES", "ERROR", "")


def explain(spec: str, values: list[float], profile: str) -> FormatExplanation:
    """Quantize the values as one row and tell how it went.

    Args:
        spec: Shorthand of a spec.
        values: A row of a weight.
        profile: Whose numerics.

    Raises:
        UnsupportedSpecError: There is no such arithmetic here.
    """
    fmt = Format.parse(spec, profile=profile)
    x = torch.tensor([values])
    try:
        result = fmt.fake_quantize(x)
    except ValueError as error:  # another library may ask for whole blocks
        raise UnsupportedSpecError([Problem("values", str(error))]) from None
    facts = [
        ("storage", f"{fmt.number.bits_per_element:g} bits an element"),
        ("rounding", fmt.rounding.replace("_", " ")),
        ("kernel", _kernel(fmt, x)),
    ]
    if isinstance(fmt, Profiled):
        rows = [(_text(v), "", "", *_outcome(v, r)) for v, r in zip(x[0], result[0], strict=True)]
        return FormatExplanation(tuple(facts), COLUMNS, tuple(rows))
    encoded = fmt.encode(x)
    scales = _spread(fmt, encoded.parameters, x)
    zero_points = _zero_points(fmt, encoded.parameters, x)
    if zero_points is not None:
        facts.append(("zero point", ", ".join(dict.fromkeys(zero_points))))
    low, high = fmt.limits(encoded.parameters)
    facts.append(("range", f"{_text(low.flatten()[0])} .. {_text(high.flatten()[0])}"))
    inside = _inside(fmt, encoded.parameters, x)
    rows = []
    for place, (value, scale) in enumerate(zip(x[0], scales, strict=True)):
        row = (_text(value), _scale(scale), _code(fmt, encoded, place))
        clipped = "" if inside is None or bool(inside[0, place]) else "saturates"
        rows.append((*row, *_outcome(value, result[0, place])[:2], clipped))
    return FormatExplanation(tuple(facts), COLUMNS, tuple(rows))


def _kernel(fmt: Format, x: Tensor) -> str:
    if isinstance(fmt, Profiled):
        return f"the arithmetic of {fmt.profile}, in plain torch"
    choice = dispatch.choose(fmt, x)
    return f"{choice.kernel}: {choice.why}"


def _spread(fmt: Format, parameters: Parameters, x: Tensor) -> list[Tensor]:
    scale = parameters.scale
    if scale.ndim > len(fmt.layout.compact_shape(tuple(x.shape))):
        scale = scale[0]  # of several levels the first
    spread = fmt.layout.spread(scale, x.ndim).expand_as(fmt.layout.split(x))
    return list(fmt.layout.join(spread, tuple(x.shape))[0])


def _zero_points(fmt: Format, parameters: Parameters, x: Tensor) -> list[str] | None:
    if parameters.zero_point is None:
        return None
    return [str(int(point)) for point in parameters.zero_point.flatten()]


def _inside(fmt: Format, parameters: Parameters, x: Tensor) -> Tensor | None:
    if fmt.number.family in ("log", "block_log", "binary", "binary_residual", "ternary"):
        return None
    return fmt.inside(x, parameters) | x.isnan()


def _code(fmt: Format, encoded: Encoded, place: int) -> str:
    code, bits = int(encoded.codes[0, place]), fmt.number.bits
    shown = format(code & ((1 << bits) - 1), f"0{bits}b") if bits <= 16 else hex(code)
    return f"{shown} ({code})"


def _scale(scale: Tensor) -> str:
    mantissa, exponent = math.frexp(float(scale))
    return f"2^{exponent - 1}" if mantissa == 0.5 else _text(scale)


def _outcome(value: Tensor, result: Tensor) -> tuple[str, str, str]:
    return _text(result), _text(result - value), ""


def _text(value: Tensor) -> str:
    return f"{float(value):.6g}"
