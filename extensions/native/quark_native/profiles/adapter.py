"""Formats with another library's numerics, by the name of a profile.

``ocp`` is the default: the specifications' arithmetic, exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from quark_core.errors import Problem, UnknownNameError, UnsupportedSpecError, did_you_mean
from quark_core.formats import NumberFormat
from quark_core.spec import TensorSpec
from quark_native.formats.base import Format, Parameters, require_floating
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.profiles import (
    aimet,
    brevitas,
    dmx,
    gfloat,
    mase,
    microxcaling,
    quark,
    tensorcast,
    torchao,
)

_Function = Callable[[Tensor], Tensor]
_Build = Callable[[TensorSpec, int], _Function | None]


@dataclass(frozen=True)
class Profile:
    """A library's numerics.

    Attributes:
        name: As in ``Format.parse(..., profile=NAME)``.
        version: Of the library.
        build: Makes the function of a resolved spec and an axis; None if the library has no such
            format.
    """

    name: str
    version: str
    build: _Build


class Profiled(Format):
    """Fake quantization as another library does it; its values need no codes of this format."""

    def __init__(self, number: NumberFormat, layout: Layout, profile: str, run: _Function) -> None:
        super().__init__(number, layout)
        self.profile = profile
        self._run = run

    def fake_quantize(
        self,
        x: Tensor,
        parameters: Parameters | None = None,
        *,
        out: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """What the library returns for x, computed in float32.

        Args:
            x: Floating point.
            parameters: Must be None.
            out: Where to write.
            seed: Unused: no stochastic rounding is reproduced.
        """
        require_floating(self.number.name, x)
        found = self._run(x.to(torch.float32)).to(x.dtype) if x.numel() else x.clone()
        return found if out is None else out.copy_(found)

    def measure(self, x: Tensor) -> Parameters:
        """Not of another library."""
        self._refuse()

    def limits(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Not of another library."""
        self._refuse()

    def inside(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Not of another library."""
        self._refuse()

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        self._refuse()

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        self._refuse()

    def _decoded(self, codes: Tensor, parameters: Parameters) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"profile {self.profile} reproduces values, which may have no codes in "
            f"{self.number.name}: encode with the default profile"
        )


def _element(spec: TensorSpec) -> str | None:
    """The element of an MX format by microxcaling's names."""
    number = spec.number_format
    if number.family != "mx" or spec.rounding not in _MICROXCALING_ROUNDINGS:
        return None
    return number.name.partition("{")[0].removeprefix("mx")


_MICROXCALING_ROUNDINGS = {
    "nearest_away": "nearest",
    "nearest_even": "even",
    "toward_zero": "floor",
}


def _microxcaling(spec: TensorSpec, axis: int) -> _Function | None:
    element, block = _element(spec), spec.number_format.block or 32
    if element is None or spec.scale_rule != "floor":
        return None
    rounding = _MICROXCALING_ROUNDINGS[spec.rounding]
    return lambda x: microxcaling.mx_torch(x, element, block=block, axis=axis, rounding=rounding)


def _torchao(spec: TensorSpec, axis: int) -> _Function | None:
    if spec.rounding != "nearest_even":
        return None
    if spec.number_format.family == "nvfp":
        return _nvfp(spec, axis)
    element, block = _element(spec), spec.number_format.block or 32
    scaling = spec.scale_rule or "floor"
    if element is None or element.startswith("int"):
        return None
    return lambda x: _last(
        x, axis, lambda rows: torchao.mx(rows, element, block=block, scaling=scaling).values
    )


def _nvfp(spec: TensorSpec, axis: int) -> _Function:
    two_levels = spec.format == "nvfp4"

    def run(rows: Tensor) -> Tensor:
        return torchao.nvfp4(rows, torchao.per_tensor_scale(rows) if two_levels else None).values

    return lambda x: _last(x, axis, run)


def _dmx(spec: TensorSpec, axis: int) -> _Function | None:
    number = spec.number_format
    name = number.name.upper()
    if spec.rounding != "nearest_even":
        return None
    if number.family == "bfp" and name.startswith("BFP["):
        shorthand = name if name.endswith(")") else f"{name}(SN)"
    elif number.family == "mx" and number.exponent is None:
        shorthand = f"MXINT{number.bits}{{{number.block}}}"
    elif number.family == "mx" and spec.scale_rule == "floor":
        element = f"E{number.exponent}M{number.mantissa}"
        shorthand = f"MXFP{number.bits}[{element}]{{{number.block}}}"
    elif number.family == "sbfp":
        sizes = name.removeprefix("SBFP").partition("{")[0].strip("[]").split("|")
        shorthand = (
            f"SBFP<XP[{sizes[0]},0](CSN)><FP[0|{'|'.join(sizes[1:])}](FN)>{{{number.block}}}"
        )
    elif number.family == "fixed" and number.signed:
        shorthand = name.replace("FIXED", "XP") + ("" if name.endswith(")") else "(C_N)")
    else:
        return None
    return lambda x: dmx.cast(x, shorthand, axis=axis)


def _quark(spec: TensorSpec, axis: int) -> _Function | None:
    name, block = spec.format, spec.number_format.block or 32
    if spec.rounding != "nearest_even":
        return None
    if name == "bfp16":
        return lambda x: quark.bfp16(x, axis=axis)
    if name in ("mx6", "mx9"):
        return lambda x: quark.microexponents(x, name, axis=axis)
    element, scaling = _element(spec), spec.scale_rule or "floor"
    if element is None or scaling == "rceil" or element in ("int4", "int2"):
        return None
    return lambda x: quark.mx(x, element, block=block, axis=axis, scaling=scaling)


def _plain_mx(run: Callable[..., Tensor], *elements: str) -> _Build:
    def build(spec: TensorSpec, axis: int) -> _Function | None:
        element, block = _element(spec), spec.number_format.block or 32
        known = element is not None and (element in elements or element.startswith("fp"))
        if not known or spec.rounding != "nearest_even" or spec.scale_rule != "floor":
            return None
        return lambda x: run(x, element, block=block, axis=axis)

    return build


def _mase(spec: TensorSpec, axis: int) -> _Function | None:
    number = spec.number_format
    if spec.rounding not in ("nearest_even", "floor"):
        return None
    if spec.rounding == "floor":
        floored = number.family == "fixed" and not number.name.endswith(")")
        return _mase_fixed(number, mase.integer_floor) if floored else None
    build = _MASE.get(number.family)
    return None if build is None else build(number, axis)


def _mase_fixed(
    number: NumberFormat, run: Callable[..., Tensor] = mase.integer
) -> _Function | None:
    if number.name.endswith(")"):
        return None
    fraction, signed = number.mantissa, number.signed
    return lambda x: run(x, width=number.bits, frac_width=fraction, is_signed=signed)


def _bias(number: NumberFormat) -> int | None:
    _, comma, text = number.name.partition("]")[0].partition(",")
    return int(text) if comma else None


def _mase_float(number: NumberFormat) -> _Function | None:
    run = mase.minifloat_denorm if number.family == "denorm" else mase.minifloat_ieee
    plain = number.name.startswith("fp[1") or number.family == "denorm"
    if not plain or number.name.endswith(")"):
        return None
    width, exponent, bias = number.bits, number.exponent or 0, _bias(number)
    return lambda x: run(x, width=width, exponent_width=exponent, exponent_bias=bias)


def _mase_blocks(
    run: Callable[..., Tensor], **options: int | None
) -> Callable[[int, int], _Function]:
    """Blocks of rows along an axis; MASE takes two-dimensional tensors with blocks on the last."""

    def build(block: int, axis: int) -> _Function:
        def rows(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            found = run(flat, block_size=[1, block], skip_first_dim=False, **options)
            return found.reshape(x.shape)

        return lambda x: _last(x, axis, rows)

    return build


def _mase_block_fp(number: NumberFormat, axis: int) -> _Function:
    bias, block = _bias(number), number.block or 1
    options = {"width": number.bits, "exponent_width": int(number.shared_bits)}
    return _mase_blocks(mase.block_fp, **options, exponent_bias=bias)(block, axis)


def _mase_block_minifloat(number: NumberFormat, axis: int) -> _Function:
    options = {"width": number.bits, "exponent_width": number.exponent}
    bias_width = int(number.shared_bits)
    build = _mase_blocks(mase.block_minifloat, **options, exponent_bias_width=bias_width)
    return build(number.block or 1, axis)


def _mase_block_log(number: NumberFormat, axis: int) -> _Function:
    bias_width = int(number.shared_bits)
    build = _mase_blocks(mase.block_log, width=number.bits, exponent_bias_width=bias_width)
    return build(number.block or 1, axis)


def _mase_mx(number: NumberFormat, axis: int) -> _Function:
    block = number.block or 32
    if number.exponent is None:
        return lambda x: mase.mxint(x, block_size=block, element_bits=number.bits, block_dim=axis)
    exponent, fraction = number.exponent, number.mantissa or 0
    return lambda x: mase.mxfp(
        x,
        block_size=block,
        element_exp_bits=exponent,
        element_frac_bits=fraction,
        block_dim=axis,
    )


_MASE: dict[str, Callable[[NumberFormat, int], _Function | None]] = {
    "fixed": lambda number, axis: _mase_fixed(number),
    "float": lambda number, axis: _mase_float(number),
    "denorm": lambda number, axis: _mase_float(number),
    "log": lambda number, axis: (
        lambda x: mase.log(x, width=number.bits, exponent_bias=_bias(number))
    ),
    "block_fp": _mase_block_fp,
    "block_minifloat": _mase_block_minifloat,
    "block_log": _mase_block_log,
    "mx": _mase_mx,
}
_AIMET_DTYPES = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def _aimet(spec: TensorSpec, axis: int) -> _Function | None:
    number = spec.number_format
    plain = spec.rounding == "nearest_even" and not spec.narrow
    if not plain or spec.scale not in ("float32", "unit", "integer"):
        return None
    kind = spec.granularity.kind if spec.granularity else "tensor"
    if number.family == "integer" and kind in ("tensor", "channel"):
        symmetric, bits = spec.symmetric is not False, number.bits
        if symmetric != number.signed:
            return None  # its grids are signed symmetric and unsigned asymmetric
        return lambda x: aimet.affine(
            x, symmetric=symmetric, bitwidth=bits, shape=_aimet_shape(kind, x, axis)
        )
    if number.name in _AIMET_DTYPES and kind in ("tensor", "channel"):
        dtype = _AIMET_DTYPES[number.name]
        if spec.scale == "unit":
            return lambda x: aimet.float_quantize_dequantize(x, dtype=dtype)
        return lambda x: _aimet_scaled(x, dtype, _aimet_shape(kind, x, axis))
    return None


def _aimet_scaled(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    scale, _ = aimet.float_scale(x, dtype=dtype, shape=shape)
    return aimet.float_quantize_dequantize(x, scale=scale, dtype=dtype, shape=shape)


def _aimet_shape(kind: str, x: Tensor, axis: int) -> tuple[int, ...]:
    if kind == "tensor":
        return ()
    return tuple(size if place == axis % x.ndim else 1 for place, size in enumerate(x.shape))


def _last(x: Tensor, axis: int, run: _Function) -> Tensor:
    """The library quantizes along the last axis only."""
    return run(x.movedim(axis, -1).contiguous()).movedim(-1, axis)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("microxcaling", microxcaling.VERSION, _microxcaling),
        Profile("torchao", torchao.VERSION, _torchao),
        Profile("dmx", dmx.VERSION, _dmx),
        Profile("quark", quark.VERSION, _quark),
        Profile("brevitas", brevitas.VERSION, _plain_mx(brevitas.mx, "int8")),
        Profile("tensorcast", tensorcast.VERSION, _plain_mx(tensorcast.mx, "int8", "int4")),
        Profile("mase", mase.VERSION, _mase),
        Profile("aimet", aimet.VERSION, _aimet),
        Profile("gfloat", gfloat.VERSION, _plain_mx(gfloat.mx, "int8")),
    )
}


def profiled(spec: TensorSpec, layout: Layout, profile: str) -> Format:
    """The format of a resolved spec with another library's numerics.

    Raises:
        UnknownNameError: There is no such profile.
        UnsupportedSpecError: The library has no such format.
    """
    known = PROFILES.get(profile)
    if known is None:
        names = ["ocp", *PROFILES]
        hint = did_you_mean(profile, names) or f"Profiles are {', '.join(names)}"
        raise UnknownNameError(f"unknown profile {profile!r}", fix=hint)
    run = known.build(spec, layout.axis)
    if run is None:
        text = f"profile {profile} ({known.version}) has no {spec}: use the default profile, ocp"
        raise UnsupportedSpecError([Problem("profile", text)])
    return Profiled(spec.number_format, layout, profile, run)
