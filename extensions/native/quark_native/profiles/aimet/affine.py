"""AIMET's integer grids.

    q  = clamp(rnd(x / scale) - offset, qmin, qmax)
    x' = (q + offset) scale

rnd is to the nearest, ties to even. Source: aimet-torch 2.42.0,
quantization/affine/backends/torch_builtins.py.

AIMET has two ways to x'. Where it needs gradients of the scale, for blocks and with a zero-point
shift, it computes the formula, in the input's dtype if that resolves a quarter of a step. Else
it calls torch's fake quantization, which multiplies by 1 / scale, in float32: there exact ties
can fall to the other side, and NaN becomes qmin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quark_native.profiles.aimet.blocks import split, spread
from quark_native.profiles.aimet.calibration import min_max, scale_offset

_MANTISSA_BITS = {
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float32: 23,
    torch.float64: 52,
}


def affine(
    x: Tensor,
    *,
    symmetric: bool,
    bitwidth: int | None = None,
    qmin: int | None = None,
    qmax: int | None = None,
    shape: Sequence[int] = (),
    block_size: Sequence[int] | None = None,
    zero_point_shift: float = 0.0,
    learned: bool = True,
) -> Tensor:
    """Calibrate on x by min-max, then quantize and dequantize it.

    Args:
        x: float32, float16 or bfloat16.
        symmetric: Whether the grid's middle is zero.
        bitwidth: b of the grid -2^(b-1) .. 2^(b-1) - 1 when symmetric, else 0 .. 2^b - 1.
        qmin: Lowest integer, in place of ``bitwidth``.
        qmax: Highest integer, in place of ``bitwidth``.
        shape: Of the scales.
        block_size: Of the blocks, if any.
        zero_point_shift: 0, or 0.5 for a grid of half-steps without a zero.
        learned: As in :func:`quantize_dequantize`; a module's range is, outside
            torch.no_grad().

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: The grid is given twice or not at all, or the tensor has no such scales.
    """
    if (qmin is None or qmax is None) == (bitwidth is None):
        raise ValueError("give either a bitwidth or both qmin and qmax")
    if qmin is None or qmax is None:
        qmin, qmax = grid(bitwidth or 0, symmetric=symmetric)
    low, high = min_max(
        x,
        steps=qmax - qmin - (zero_point_shift == 0.5),
        symmetric=symmetric,
        shape=shape,
        block_size=block_size,
    )
    scale, offset = scale_offset(low, high, qmin=qmin, qmax=qmax, symmetric=symmetric)
    return quantize_dequantize(
        x,
        scale=scale,
        offset=offset,
        qmin=qmin,
        qmax=qmax,
        block_size=block_size,
        zero_point_shift=zero_point_shift,
        learned=learned,
    )


def grid(bitwidth: int, *, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest integer of AIMET's usual grids.

    Args:
        bitwidth: At least 1.
        symmetric: Signed, else unsigned.

    Raises:
        ValueError: There are no bits.
    """
    if bitwidth < 1:
        raise ValueError(f"a grid needs at least 1 bit, not {bitwidth}")
    low = -(2 ** (bitwidth - 1)) if symmetric else 0
    return low, low + 2**bitwidth - 1


def quantize(
    x: Tensor,
    *,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Integers of the grid, in the dtype of x. NaN stays NaN.

    Args:
        x: float32, float16 or bfloat16.
        scale: float32, broadcasts against x or has one entry a block.
        offset: float32, the same shape.
        qmin: Lowest integer.
        qmax: Highest integer.
        block_size: Of the blocks, if any.

    Raises:
        ValueError: The dtype cannot hold the grid, or the blocks do not cover the tensor.
    """
    if not _holds(x.dtype, qmin, qmax):
        raise ValueError(f"{x.dtype} cannot hold the integers {qmin} to {qmax}")
    dtype = _computing_dtype(x.dtype, qmin, qmax)
    parts = split(x, scale.shape, block_size).to(dtype)
    steps, shifts = (spread(each, block_size).to(dtype) for each in (scale, offset))
    q = (torch.round(parts / steps) - shifts).clamp(qmin, qmax)
    return q.to(x.dtype).reshape(x.shape)


def dequantize(
    q: Tensor, *, scale: Tensor, offset: Tensor, block_size: Sequence[int] | None = None
) -> Tensor:
    """The values of integers, in their dtype.

    Args:
        q: float32, float16 or bfloat16.
        scale: float32, broadcasts against q or has one entry a block.
        offset: float32, the same shape.
        block_size: Of the blocks, if any.

    Raises:
        ValueError: The blocks do not cover the tensor.
    """
    parts = split(q, scale.shape, block_size)
    steps, shifts = (spread(each, block_size).to(q.dtype) for each in (scale, offset))
    return ((parts + shifts) * steps).reshape(q.shape)


def quantize_dequantize(
    x: Tensor,
    *,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float = 0.0,
    learned: bool = False,
) -> Tensor:
    """Fake-quantize with a given scale and offset.

    Args:
        x: float32, float16 or bfloat16.
        scale: float32, broadcasts against x or has one entry a block.
        offset: float32, the same shape.
        qmin: Lowest integer.
        qmax: Highest integer.
        block_size: Of the blocks, if any.
        zero_point_shift: Moves the grid by that many steps.
        learned: Whether AIMET would be training the scale or the offset: by the formula, with
            AIMET's gradients, and NaN stays NaN.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: The blocks do not cover the tensor.
    """
    if not learned and block_size is None and zero_point_shift == 0:
        found = _fake_quantize(x, scale, offset, qmin, qmax)
        if found is not None:
            return found
    dtype = _computing_dtype(x.dtype, qmin, qmax)
    parts = split(x, scale.shape, block_size).to(dtype)
    steps, shifts = (spread(each, block_size).to(dtype) for each in (scale, offset))
    y: Tensor = _Formula.apply(  # type: ignore[no-untyped-call]
        parts, steps, shifts, qmin, qmax, zero_point_shift
    )
    return y.to(x.dtype).reshape(x.shape)


class _Formula(torch.autograd.Function):
    """Fake quantization with a straight-through gradient.

    With r = x / scale - shift and q before it is clamped, the gradients of x' are

                     x    scale                            offset
        on the grid  1    rnd(r) - r                       0
        off it       0    rnd(r), clamped to the grid      scale
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, shift: float
    ) -> Tensor:
        ratio = x / scale - shift
        q = torch.round(ratio) - offset
        ctx.save_for_backward(ratio, scale, offset, (q >= qmin) & (q <= qmax))
        ctx.grid = (qmin, qmax)
        y: Tensor = (q.clamp(qmin, qmax) + (offset + shift)) * scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        ratio, scale, offset, on_grid = ctx.saved_tensors
        qmin, qmax = ctx.grid
        rounded = torch.round(ratio)
        slope = torch.where(on_grid, rounded - ratio, rounded.clamp(offset + qmin, offset + qmax))
        of_x = torch.where(on_grid, grad, 0)
        of_offset = torch.where(on_grid, 0, grad * scale)
        # torch sums what comes back in the shape of x to the shapes of scale and offset.
        return of_x, grad * slope, of_offset, None, None, None


def _fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor | None:
    """Torch's own fake quantization, or None where AIMET does not use it."""
    zero_point = -offset.to(torch.int32)
    if scale.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(
            x, scale.reshape(()), zero_point.reshape(()), qmin, qmax
        )
    missing = x.ndim - scale.ndim
    axes = [missing + axis for axis, length in enumerate(scale.shape) if length != 1]
    # Torch refuses a zero point off the grid; AIMET falls back then.
    if len(axes) != 1 or zero_point.amin() < qmin or zero_point.amax() > qmax:
        return None
    return torch.fake_quantize_per_channel_affine(
        x, scale.flatten(), zero_point.flatten(), axes[0], qmin, qmax
    )


def _computing_dtype(dtype: torch.dtype, qmin: int, qmax: int) -> torch.dtype:
    for each in (dtype, torch.float32):
        fine = qmin == qmax or torch.finfo(each).eps <= 0.25 / (qmax - qmin)
        if fine and _holds(each, qmin, qmax):
            return each
    return torch.float64


def _holds(dtype: torch.dtype, qmin: int, qmax: int) -> bool:
    """Whether a dtype has the ends of a grid, and their neighbours, exactly."""
    info = torch.finfo(dtype)
    for value in (qmin, qmin + 1, qmax - 1, qmax):
        trailing = (value & -value).bit_length()
        if not info.min <= value <= info.max:
            return False
        if value.bit_length() - trailing > _MANTISSA_BITS[dtype]:
            return False
    return True
