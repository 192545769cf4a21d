"""d-Matrix's formats as dmx-compressor computes them, and the one rule dmx-mltools has apart.

    BFP:   b = 6 * 2**E, t = fl(x + b), y = (t rounded to p stored bits) - b,
           clipped to +-(2 - 2**(2 - p)) * 2**E;  E = exponent of the block's largest magnitude M
    XP:    y = round(x * 2**f) / 2**f, clamped to p bits
    FP:    y = x rounded to m stored bits, saturating at exponent 2**(e - 1)
    SBFP:  s = M / (2**(p - 1) - 1), y = XP(x / s) * FP(s)
    MXFP:  s = 2**(floor(log2 M) - 2**(e - 1)), y = FP(x / s) * s
    MXINT: BFP

Source: dmx-compressor 69a2245 and dmx-mltools dc4ff9f, their C++ extension on CPU. Rounding "S"
(stochastic) is left out: it draws from a generator that cannot be seeded.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from quark_native.formats.bits import EXPONENT_BIAS, MANTISSA_BITS, exponent_of

from ._common import block_max, blockwise
from ._dmx import EXPONENT_MASK, first_bits, make_asymmetric, round_bits, round_on_base

VERSION = "69a2245"
VERSION_MLTOOLS = "dc4ff9f"

ASYMMETRY_MASK = 0x7F << 16
"""The first seven mantissa bits, on which dmx-mltools decides."""
ROUNDINGS = {"N": "nearest", "D": "down", "U": "up"}


def cast(x: Tensor, shorthand: str, *, axis: int = -1) -> Tensor:
    """Fake quantization by a format's shorthand, as dmx-compressor spells it.

    Args:
        x: float32, any shape.
        shorthand: such as BFP[8|8]{64}(SN), XP[8,+4](CSN), FP[1|4|3,7](_N),
            SBFP<XP[4,0](CSN)><FP[0|4|4,7](FN)>{16}, MXFP8[E4M3]{32}, MXINT8{32} or SAME.
        axis: the axis that blocks lie along.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: the shorthand is no known one.
    """
    if shorthand == "SAME":
        return x.clone()
    for pattern, function in _SHORTHANDS:
        found = re.fullmatch(pattern, shorthand)
        if found:
            return function(x, axis, *found.groups())
    raise ValueError(f"shorthand {shorthand!r} is none of XP, FP, BFP, SBFP, MXFP, MXINT, SAME")


def bfp(
    x: Tensor,
    precision: int = 8,
    *,
    block: int = 64,
    axis: int = -1,
    symmetric: bool = True,
    rounding: str = "nearest",
) -> Tensor:
    """Block floating point, BFP[precision|8]{block}.

    Unlike exact arithmetic: "nearest" rounds twice, since fl(x + b) drops what lies below
    2**(E - 21); "up" adds a whole quantum and cuts, so that 1.0 becomes 1.015625; a block with
    M >= 2**126 becomes all -max ("up": all max), zeros included.

    Asymmetric: codes of -(2**(p - 1) - 1) move one down where that is no worse. Where one code of
    a column of blocks is such a candidate, the whole column is put together again, wherein -max of
    huge blocks becomes -inf and NaN becomes -2**(32 - p).

    Args:
        x: float32, any shape with at least one dimension.
        precision: mantissa bits with the sign, 2..22; 2..24 for block 1.
        block: elements a block; 1 makes a float with precision - 2 stored bits.
        axis: the axis that blocks lie along.
        symmetric: no code -2**(p - 1).
        rounding: nearest, down (toward minus infinity) or up; for block 1 only nearest.

    Returns:
        float32 of the same shape; NaN throughout a symmetric block that holds an infinity or NaN.
    """
    if block == 1:
        return _float_of_block_one(x, precision, rounding)

    def quantize(blocks: Tensor) -> Tensor:
        y = round_on_base(blocks, block_max(blocks), precision, rounding)
        return y if symmetric else make_asymmetric(y, blocks, precision)

    return blockwise(quantize, x, block=block, axis=axis)


def bfp_mltools(
    x: Tensor,
    precision: int = 8,
    *,
    block: int = 64,
    axis: int = -1,
    symmetric: bool = True,
    rounding: str = "nearest",
) -> Tensor:
    """Block floating point of dmx-mltools, BFP[precision|8]{block,axis}.

    Differs from :func:`bfp` in the asymmetric rule alone: an element that equals -M rises to the
    next exponent when M's first seven mantissa bits are ones, whatever the precision.

    Args:
        x: float32, any shape with at least one dimension.
        precision: mantissa bits with the sign.
        block: elements a block.
        axis: the axis that blocks lie along.
        symmetric: no code -2**(p - 1).
        rounding: nearest, down or up.

    Returns:
        float32 of the same shape.
    """
    if block == 1:
        return _float_of_block_one(x, precision, rounding)

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks)
        if not symmetric:
            bits = maximum.view(torch.int32)
            rises = (blocks == -maximum) & (bits & ASYMMETRY_MASK == ASYMMETRY_MASK)
            raised = (bits & EXPONENT_MASK) + (1 << MANTISSA_BITS)
            maximum = torch.where(rises, raised.view(torch.float32), maximum)
        return round_on_base(blocks, maximum, precision, rounding)

    return blockwise(quantize, x, block=block, axis=axis)


def xp(
    x: Tensor,
    precision: int = 8,
    fraction: int = 0,
    *,
    clamp: bool = True,
    symmetric: bool = True,
    rounding: str = "nearest",
) -> Tensor:
    """Fixed point, XP[precision,fraction].

    "nearest" adds and subtracts one half before it rounds, in float32 and float64: values less
    than one float32 step beyond a tie fall with the tie.

    Args:
        x: float32, any shape.
        precision: bits with the sign.
        fraction: bits after the point; negative ones lie before it.
        clamp: limit to the precision.
        symmetric: no code -2**(precision - 1).
        rounding: nearest (ties to even), down or up.
    """
    scaled = torch.ldexp(x, torch.tensor(fraction))
    if rounding == "nearest":
        scaled = ((scaled + 0.5).double() - 0.5).round().float()
    elif rounding == "down":
        scaled = scaled.floor()
    elif rounding == "up":
        scaled = scaled.ceil()
    else:
        raise ValueError(f"rounding {rounding!r} is none of nearest, down, up")
    y = torch.ldexp(scaled, torch.tensor(-fraction))
    if not clamp:
        return y
    step, limit = 2.0**-fraction, 2.0 ** (precision - fraction - 1)
    return y.clamp(step - limit if symmetric else -limit, limit - step)


def fp(
    x: Tensor,
    exponent: int = 4,
    mantissa: int = 3,
    bias: int = 7,
    *,
    flush: bool = False,
    unsigned: bool = False,
) -> Tensor:
    """Floating point rounded to nearest even, FP[sign|exponent|mantissa,bias].

    Unlike IEEE 754 and OCP: the largest exponent is 2**(exponent - 1) whatever the bias, with no
    codes for infinity and NaN, which saturate (8 exponent bits apart); subnormals round twice,
    since 2**emin is added to them.

    Args:
        x: float32, any shape.
        exponent: exponent bits, 1..8.
        mantissa: stored bits, 0..22; 23 only in FP[1|8|23,127](_N), which is x itself.
        bias: places the smallest normal, 2**(1 - bias).
        flush: subnormals become zero.
        unsigned: the magnitude is returned.
    """
    if (exponent, mantissa, bias, flush) == (8, 23, 127, False):
        return x.abs() if unsigned else x.clone()
    rounded = round_bits(x, mantissa, "nearest")
    top = (EXPONENT_BIAS + 2 ** (exponent - 1)) << MANTISSA_BITS
    largest = torch.tensor(top | first_bits(mantissa), dtype=torch.int32).view(torch.float32)
    over = (rounded.view(torch.int32) & EXPONENT_MASK) > top
    rounded = torch.where(over, largest.copysign(x), rounded)
    smallest = 1 - bias
    small = exponent_of(x) < smallest
    shift = torch.tensor(2.0**smallest).copysign(x)
    denormal = 0.0 if flush else round_bits(x + shift, mantissa, "nearest") - shift
    y = torch.where(small, denormal, rounded)
    return y.abs() if unsigned else y


def sbfp(
    x: Tensor,
    precision: int = 4,
    *,
    scale: Callable[[Tensor], Tensor],
    block: int = 16,
    axis: int = -1,
) -> Tensor:
    """Block fixed point with a scale in a small float format.

    Divides by the exact scale and multiplies by the rounded one; a scale that rounds to zero makes
    its block zero. A block with NaN, or of zeros, stays as it is.

    Args:
        x: float32, any shape with at least one dimension.
        precision: bits of an element with its sign.
        scale: rounds scales, such as ``partial(fp, exponent=4, mantissa=4, bias=7, flush=True)``.
        block: elements a block.
        axis: the axis that blocks lie along.
    """

    def quantize(blocks: Tensor) -> Tensor:
        unit = block_max(blocks) / (2 ** (precision - 1) - 1)
        return torch.where(unit > 0, xp(blocks / unit, precision) * scale(unit), blocks)

    return blockwise(quantize, x, block=block, axis=axis)


def mxfp(
    x: Tensor, exponent: int = 4, mantissa: int = 3, *, block: int = 32, axis: int = -1
) -> Tensor:
    """Microscaling floats, MXFPn[EexponentMmantissa]{block}.

    Unlike OCP MX: E5M2 scales by 2**16, E4M3 saturates at 480; the scale has no limits and comes
    of a float32 log2; an infinity makes its block's others NaN. Blocks come back in the wrong
    places along any axis but the last: they are joined along that axis of the flattened tensor,
    which is right for axis 1 of two or three dimensions, scrambles axis 0 (unless it is one block)
    and fails beyond axis 1.

    Args:
        x: float32, any shape with at least one dimension.
        exponent: exponent bits of an element.
        mantissa: stored mantissa bits of an element.
        block: elements a block; the last block along an axis may be short.
        axis: the axis that blocks lie along.

    Raises:
        IndexError: the axis is 2 or more.
        RuntimeError: blocks of axis 0 are of different size.
    """
    moved = x.transpose(axis, -1)
    largest_power = 2.0 ** (2 ** (exponent - 1))
    parts = []
    for chunk in torch.split(moved.reshape(-1, moved.shape[-1]), block, -1):
        unit = 2 ** block_max(chunk).log2().floor() / largest_power
        scaled = chunk / unit
        # 0 / 0 and inf / inf are the negative NaN on x86-64; it saturates to the negative end.
        scaled = torch.where(scaled.isnan(), -torch.inf, scaled)
        parts.append(fp(scaled, exponent, mantissa, 2 ** (exponent - 1) - 1) * unit)
    return torch.cat(parts, axis).reshape(moved.shape).transpose(axis, -1).contiguous()


def mxint(x: Tensor, precision: int = 8, *, block: int = 32, axis: int = -1) -> Tensor:
    """Microscaling integers, MXINTn{block}: another name of symmetric :func:`bfp`.

    Args:
        x: float32, any shape with at least one dimension.
        precision: bits of an element with its sign.
        block: elements a block.
        axis: the axis that blocks lie along.
    """
    return bfp(x, precision, block=block, axis=axis)


def _float_of_block_one(x: Tensor, precision: int, rounding: str) -> Tensor:
    if rounding != "nearest":
        raise ValueError(f"rounding {rounding!r} of block 1 is not nearest")
    return fp(x, 8, precision - 2, 127)


def _bfp(x: Tensor, axis: int, precision: str, block: str, symmetric: str, rounding: str) -> Tensor:
    return bfp(
        x,
        int(precision),
        block=int(block),
        axis=axis,
        symmetric=symmetric == "S",
        rounding=ROUNDINGS[rounding],
    )


def _xp(
    x: Tensor, _: int, precision: str, fraction: str, clamp: str, symmetric: str, rounding: str
) -> Tensor:
    return xp(
        x,
        int(precision),
        int(fraction),
        clamp=clamp == "C",
        symmetric=symmetric == "S",
        rounding=ROUNDINGS[rounding],
    )


def _fp(
    x: Tensor, _: int, sign: str, exponent: str, mantissa: str, bias: str, flush: str
) -> Tensor:
    return fp(x, int(exponent), int(mantissa), int(bias), flush=flush == "F", unsigned=sign == "0")


def _sbfp(x: Tensor, axis: int, precision: str, scale: str, block: str) -> Tensor:
    return sbfp(x, int(precision), scale=lambda s: cast(s, scale), block=int(block), axis=axis)


def _mxfp(x: Tensor, axis: int, exponent: str, mantissa: str, block: str) -> Tensor:
    return mxfp(x, int(exponent), int(mantissa), block=int(block), axis=axis)


def _mxint(x: Tensor, axis: int, precision: str, block: str) -> Tensor:
    return mxint(x, int(precision), block=int(block), axis=axis)


_XP = r"XP\[(\d+),([+-]?\d+)\]\(([C_])([S_])([NDU])\)"
_FP = r"FP\[([01])\|(\d+)\|(\d+),(-?\d+)\]\(([F_])N\)"
_SHORTHANDS: tuple[tuple[str, Callable[..., Tensor]], ...] = (
    (r"BFP\[(\d+)\|8\]\{(\d+)\}\(([S_])([NDU])\)", _bfp),
    (_XP, _xp),
    (_FP, _fp),
    (r"SBFP<XP\[(\d+),0\]\(CSN\)><(FP\[.*\]\(.N\))>\{(\d+)\}", _sbfp),
    (r"MXFP\d+\[E(\d+)M(\d+)\]\{(\d+)\}", _mxfp),
    (r"MXINT(\d+)\{(\d+)\}", _mxint),
)
