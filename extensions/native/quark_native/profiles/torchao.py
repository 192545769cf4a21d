"""MX and NVFP4 as torchao computes them: codes, scales and the values they stand for.

    MX:    s = f(M) - emax, code = RNE(x / 2**s) saturating, y = code * 2**s
    NVFP4: s = e4m3(clamp(M / 6 / S, 2**-6, 448)), code = RNE(clamp(x * ((1 / S) / s), -6, 6))

M is the block's largest magnitude and S a scale of the whole tensor. f is the floor or ceiling of
log2 M, the floor after rounding M to the element's precision (even), or rceil: the ceiling of
log2 (M / largest element), without the subtraction of emax.

Source: torchao 0.18.0 and its main branch at 36027d8 (2026-08-21), eager mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quark_native.formats.bits import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    MIN_NORMAL,
    exponent_of,
    power_of_two,
)

from ._common import (
    ELEMENTS,
    MAX_E8M0,
    MAX_E8M0_EXPONENT,
    MIN_E8M0_EXPONENT,
    Element,
    block_max,
    element_of,
    encode_grid,
    round_to_grid,
)

VERSION = "0.18.0"
VERSION_MAIN = "36027d8"

INTEGERS = ("int8", "int4", "int2")
NAN_BYTE = 0x7F
"""NaN in both eight-bit float formats as torch casts it, the sign bit apart."""
NAN_FROM_BYTE = 0x7FF00000
"""The float32 that torch makes of e4m3's NaN; its payload reaches the codes."""
SIGN = -(2**31)
NVFP4_BLOCK = 16
NVFP4_ELEMENT = ELEMENTS["fp4_e2m1"]
NVFP4_SCALE = ELEMENTS["fp8_e4m3"]
NVFP4_MIN_SCALE = 2.0**-6


class Quantized(NamedTuple):
    """Codes, scales and values of one tensor."""

    codes: Tensor
    """uint8, the shape of x; of fp4 the last dimension is half, the first of a pair low."""
    scale: Tensor
    """uint8 codes of E8M0 (MX) or E4M3 (NVFP4), [..., blocks]."""
    values: Tensor
    """The shape and dtype of x."""


def mx(
    x: Tensor, element: str = "fp8_e4m3", *, block: int = 32, scaling: str = "floor"
) -> Quantized:
    """MX of torchao 0.18.0.

    Unlike OCP MX: blocks whose scale code is 0 are divided by 2**-126 but multiplied by 2**-127
    (under rceil by 1); an infinity saturates, its block's other elements become 0; NaN has a code
    in fp4 and fp6, chosen by its payload; rceil takes a float32 log2, wrong by one next to powers
    of two.

    Args:
        x: float32 or bfloat16, [..., length], length a multiple of block.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3 or fp4_e2m1.
        block: elements a block.
        scaling: floor, ceil, even or rceil.

    Raises:
        ValueError: an unknown name, or a length that does not divide.
    """
    grid = element_of(element, without=INTEGERS)
    blocks = _blocks(x, block)
    maximum = block_max(blocks)
    if scaling == "rceil":
        descale = maximum / grid.max
        exponent = descale.log2().ceil().clamp(MIN_E8M0_EXPONENT, MAX_E8M0_EXPONENT)
        code = torch.where(descale.isnan(), MAX_E8M0, exponent.nan_to_num() + MAX_E8M0_EXPONENT)
        code = code.to(torch.int32)
        factor = torch.where(code == 0, 1.0, _inverse(code))
        scaled = blocks * torch.where(descale.isnan(), descale, factor)
    else:
        rounded, exponent = _shared_exponent(maximum, grid, scaling)
        code = torch.where(rounded.isnan(), MAX_E8M0, exponent + MAX_E8M0_EXPONENT)
        # Shifted into place, code 255 is an infinity, which makes every finite element zero.
        divisor = (code.to(torch.int32) << MANTISSA_BITS).view(torch.float32)
        scaled = blocks / divisor.clamp(min=MIN_NORMAL)
    return _finish(x, scaled, code, grid)


def mx_main(
    x: Tensor, element: str = "fp8_e4m3", *, block: int = 32, scaling: str = "floor"
) -> Quantized:
    """MX of torchao's main branch.

    With floor scaling the values are those of OCP MX. An infinity or NaN makes the block's scale
    NaN. Under even scaling so does a finite maximum that rounds to 2**128.

    Args:
        x: float32 or bfloat16, [..., length], length a multiple of block.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3 or fp4_e2m1.
        block: elements a block.
        scaling: floor, ceil, even or rceil.

    Raises:
        ValueError: an unknown name, or a length that does not divide.
    """
    grid = element_of(element, without=INTEGERS)
    blocks = _blocks(x, block)
    maximum = block_max(blocks)
    if scaling == "rceil":
        # The reciprocal is rounded to float32 first: M / max and this differ in the last place.
        maximum = maximum * (1.0 / grid.max)
        bits = maximum.view(torch.int32)
        field, mantissa = bits >> MANTISSA_BITS, bits & (1 << MANTISSA_BITS) - 1
        # Code 0 is 2**-127, the subnormal whose only bit is the mantissa's first.
        above = mantissa > torch.where(field == 0, 1 << MANTISSA_BITS - 1, 0)
        code = field + above
    else:
        maximum, exponent = _shared_exponent(maximum, grid, scaling)
        code = exponent + MAX_E8M0_EXPONENT
    code = torch.where(maximum.isfinite(), code, MAX_E8M0)
    return _finish(x, blocks * _inverse(code), code, grid)


def per_tensor_scale(x: Tensor) -> Tensor:
    """The outer scale of two-level NVFP4, S = max |x| / (448 * 6).

    Args:
        x: any shape, float32 or bfloat16.

    Returns:
        float32, no dimensions.
    """
    return x.abs().amax().to(torch.float32) / (NVFP4_SCALE.max * NVFP4_ELEMENT.max)


def nvfp4(x: Tensor, outer: Tensor | None = None) -> Quantized:
    """NVFP4 of torchao 0.18.0, block 16, with one scale level or two.

    Unlike the format: scales stay at or above 2**-6, e4m3's smallest normal, so small blocks lose
    precision; NaN has a code, chosen by its payload; an infinity saturates unless it
    reaches the outer scale.

    Args:
        x: float32 or bfloat16, [..., length], length a multiple of 16.
        outer: the outer scale of one element; None for one level.

    Raises:
        ValueError: a length that does not divide.
    """
    blocks = _blocks(x, NVFP4_BLOCK)
    wanted = block_max(blocks) / NVFP4_ELEMENT.max
    if outer is not None:
        wanted = wanted / outer
    scale = round_to_grid(wanted.clamp(NVFP4_MIN_SCALE, NVFP4_SCALE.max), NVFP4_SCALE)
    scale = torch.where(scale.isnan(), _nan_from_byte(scale), scale)
    # The order of the two divisions shows in the last bit.
    factor = (1.0 if outer is None else 1.0 / outer) / scale
    scaled = (blocks * factor).clamp(-NVFP4_ELEMENT.max, NVFP4_ELEMENT.max)
    codes = _encode(scaled, NVFP4_ELEMENT)
    total = scale if outer is None else scale * outer
    values = (_decode(codes, NVFP4_ELEMENT) * total).reshape(x.shape).to(x.dtype)
    return Quantized(_pack(codes.reshape(x.shape)), _encode(scale, NVFP4_SCALE).squeeze(-1), values)


def _blocks(x: Tensor, block: int) -> Tensor:
    if x.shape[-1] % block:
        raise ValueError(f"a last dimension of {x.shape[-1]} is no multiple of the block {block}")
    return x.reshape(*x.shape[:-1], -1, block).to(torch.float32)


def _nan_from_byte(like: Tensor) -> Tensor:
    return torch.full_like(like, NAN_FROM_BYTE, dtype=torch.int32).view(torch.float32)


def _shared_exponent(maximum: Tensor, grid: Element, scaling: str) -> tuple[Tensor, Tensor]:
    """The maximum as the rule sees it and the scale's exponent, -127..128."""
    exponent = exponent_of(maximum)
    if scaling == "even":
        half = 1 << (MANTISSA_BITS - grid.mantissa_bits - 1)
        # A carry out of the mantissa raises the exponent field: rounding half up, done on bits.
        exponent_only = -1 << MANTISSA_BITS
        rounded = ((maximum.view(torch.int32) + half) & exponent_only).view(torch.float32)
        maximum = torch.where(maximum.isnan(), maximum, rounded)
        exponent = exponent_of(maximum)
    elif scaling == "ceil":
        mantissa = maximum.view(torch.int32) & (1 << MANTISSA_BITS) - 1
        exponent = exponent + (mantissa > 0)
    elif scaling != "floor":
        raise ValueError(f"scaling {scaling!r} is none of floor, ceil, even, rceil")
    shared = (exponent - grid.emax).clamp(MIN_E8M0_EXPONENT, MAX_E8M0_EXPONENT + 1)
    return maximum, shared


def _inverse(code: Tensor) -> Tensor:
    """2 ** (127 - code), NaN for code 255."""
    power = power_of_two((MAX_E8M0_EXPONENT - code).clamp(min=MIN_E8M0_EXPONENT))
    return torch.where(code == MAX_E8M0, torch.nan, power)


def _finish(x: Tensor, scaled: Tensor, code: Tensor, grid: Element) -> Quantized:
    """Codes, scale bytes and values of scaled blocks, the values computed in x's dtype."""
    codes = _encode(scaled, grid)
    scale = power_of_two((code - MAX_E8M0_EXPONENT).clamp(max=MAX_E8M0_EXPONENT).to(torch.int32))
    scale = torch.where(code == MAX_E8M0, torch.nan, scale)
    values = (_decode(codes, grid).to(x.dtype) * scale.to(x.dtype)).reshape(x.shape)
    codes = codes.reshape(x.shape)
    if grid.bits == 4:
        codes = _pack(codes)
    return Quantized(codes, code.to(torch.uint8).squeeze(-1), values)


def _encode(scaled: Tensor, grid: Element) -> Tensor:
    """Codes of scaled values, NaN as torch's cast or torchao's integer arithmetic leaves it."""
    bits = scaled.view(torch.int32) & ~SIGN
    if grid.bits == 8:
        not_a_number = torch.full_like(bits, NAN_BYTE)
    else:
        # NaN goes the way of normal numbers: exponent 128 rebiased, mantissa (a payload) rounded,
        # the result cut to a byte. Bits above the format's own survive until packing.
        dropped = MANTISSA_BITS - grid.mantissa_bits
        bias = 1 - grid.emin
        half = (1 << dropped - 1) - 1 + (bits >> dropped & 1)
        not_a_number = bits + ((bias - EXPONENT_BIAS) << MANTISSA_BITS) + half >> dropped & 0xFF
    not_a_number |= scaled.signbit().to(torch.int32) << (grid.bits - 1)
    finite = encode_grid(round_to_grid(scaled.nan_to_num(nan=0.0), grid), grid)
    return torch.where(scaled.isnan(), not_a_number, finite).to(torch.uint8)


def _decode(codes: Tensor, grid: Element) -> Tensor:
    """The values of codes: float32."""
    magnitude = codes.to(torch.int32) & (1 << grid.bits - 1) - 1
    field = magnitude >> grid.mantissa_bits
    mantissa = magnitude & (1 << grid.mantissa_bits) - 1
    units = mantissa + torch.where(field > 0, 1 << grid.mantissa_bits, 0)
    exponent = field.clamp(min=1) - 1 + grid.emin - grid.mantissa_bits
    value = units.to(torch.float32) * power_of_two(exponent)
    if grid.bits == 8:
        value = torch.where(magnitude == NAN_BYTE, torch.nan, value)
    negative = (codes >> grid.bits - 1 & 1).to(torch.bool)
    return torch.where(negative, -value, value)


def _pack(codes: Tensor) -> Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4
