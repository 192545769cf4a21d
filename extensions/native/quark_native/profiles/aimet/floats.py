"""AIMET's floating-point formats, with a scale.

    x' = cast(clamp(x / scale, -max, max)) scale,    scale = 2^(log2 absmax - log2 max)

absmax is the calibrated absolute maximum and max the format's. Formats that torch has go through
torch's cast. Others are rounded as

    step = 2^(max(floor(log2 |x| + bias), 1) - m - bias),    rnd(x / step) step

with bias 2^(e-1), one more than IEEE's: one binade more at the bottom than a format of that many
bits has. Source: aimet-torch 2.42.0, quantization/float/quantizer.py, quantization/float/_finfo.py
and fp_quantization.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quark_native.profiles.aimet.blocks import split, spread
from quark_native.profiles.aimet.calibration import min_max

_TORCH_DTYPES = {
    (5, 10, False, False): torch.float16,
    (8, 7, False, False): torch.bfloat16,
    (4, 3, True, False): torch.float8_e4m3fn,
    (4, 3, True, True): torch.float8_e4m3fnuz,
    (5, 2, False, False): torch.float8_e5m2,
    (5, 2, True, True): torch.float8_e5m2fnuz,
}
"""By exponent and mantissa bits, and whether there are no infinities and no negative zero."""
_E2M1 = (2, 1, True, False)
_MAX_E2M1 = 6.0


class _Format(NamedTuple):
    bits: int
    max: float
    cast: Callable[[Tensor], Tensor]
    integer_max: bool = False


def float_quantize_dequantize(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    exponent_bits: int | None = None,
    mantissa_bits: int | None = None,
    finite: bool = False,
    unsigned_zero: bool = False,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] = (),
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Fake-cast to a float format.

    Infinities become the largest value, NaN stays NaN.

    Args:
        x: float32.
        scale: float32, broadcasts against x or has one entry a block; None is what
            :func:`float_scale` finds in x. AIMET calibrates formats below 16 bits; larger ones
            have a scale of 1 unless they are given an analyzer.
        exponent_bits: e.
        mantissa_bits: m.
        finite: Whether the top binade holds numbers. Of such formats there are torch's and e2m1.
        unsigned_zero: Whether there is no negative zero; torch's formats alone.
        dtype: A float dtype of torch of 8 or 16 bits, in place of the four.
        shape: Of the scales, where none is given.
        block_size: Of the blocks, if any.

    Returns:
        The shape of x.

    Raises:
        ValueError: AIMET has no such format, or the tensor no such scales.
    """
    form = _format(exponent_bits, mantissa_bits, finite, unsigned_zero, dtype)
    if scale is None:
        scale, _ = _calibrate(x, form, shape, block_size)
    return _scaled_cast(x, scale, form, block_size)


def float_scale(
    x: Tensor,
    *,
    exponent_bits: int | None = None,
    mantissa_bits: int | None = None,
    finite: bool = False,
    unsigned_zero: bool = False,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] = (),
    block_size: Sequence[int] | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scale that maps the absolute maximum of x to the format's, and that maximum.

    Without mantissa bits AIMET cuts the maximum to a 64-bit integer. A maximum below 1 then gives
    a scale of 0, where everything becomes 0 and zeros NaN; one from 2^63 on overflows (on x86 to
    a scale of NaN).

    Args:
        x: float32.
        exponent_bits: As in :func:`float_quantize_dequantize`.
        mantissa_bits: The same.
        finite: The same.
        unsigned_zero: The same.
        dtype: The same.
        shape: Of the scales.
        block_size: Of the blocks, if any.
        power_of_two: Whether to take the power of two that is nearest in the logarithm.

    Returns:
        scale and maximum, float32 of ``shape``.

    Raises:
        ValueError: AIMET has no such format, or the tensor no such scales.
    """
    form = _format(exponent_bits, mantissa_bits, finite, unsigned_zero, dtype)
    return _calibrate(x, form, shape, block_size, power_of_two=power_of_two)


def float_max(
    *,
    exponent_bits: int | None = None,
    mantissa_bits: int | None = None,
    finite: bool = False,
    unsigned_zero: bool = False,
    dtype: torch.dtype | None = None,
) -> float:
    """The largest value of a format: IEEE's, where the format is not torch's or e2m1.

    Args:
        exponent_bits: As in :func:`float_quantize_dequantize`.
        mantissa_bits: The same.
        finite: The same.
        unsigned_zero: The same.
        dtype: The same.

    Raises:
        ValueError: AIMET has no such format.
    """
    return _format(exponent_bits, mantissa_bits, finite, unsigned_zero, dtype).max


def mxfp4(x: Tensor, *, shape: Sequence[int], block_size: Sequence[int]) -> Tensor:
    """Quantize to e2m1 with a power of two for each block.

    The power is the one nearest to absmax / 6 in the logarithm. The Microscaling specification
    takes 2^(floor(log2 absmax) - 2), which is the same but for maxima up to 6% above a power of
    two: there AIMET's scale is half of it, and elements saturate at three quarters of absmax.

    Args:
        x: float32.
        shape: Of the scales.
        block_size: Of the blocks.

    Raises:
        ValueError: The blocks do not cover the tensor.
    """
    form = _format(*_E2M1, None)
    scale, _ = _calibrate(x, form, shape, block_size, power_of_two=True)
    return _scaled_cast(x, scale, form, block_size)


def nvfp4(x: Tensor, *, shape: Sequence[int], block_size: Sequence[int]) -> Tensor:
    """Quantize to e2m1 with a float32 scale for each block.

    AIMET's class only marks tensors for export: in its arithmetic there are neither NVIDIA's
    e4m3 scales nor a second scale for the tensor.

    Args:
        x: float32.
        shape: Of the scales.
        block_size: Of the blocks.

    Raises:
        ValueError: The blocks do not cover the tensor.
    """
    form = _format(*_E2M1, None)
    scale, _ = _calibrate(x, form, shape, block_size)
    return _scaled_cast(x, scale, form, block_size)


def _format(
    exponent_bits: int | None,
    mantissa_bits: int | None,
    finite: bool,
    unsigned_zero: bool,
    dtype: torch.dtype | None,
) -> _Format:
    if exponent_bits is None or mantissa_bits is None:
        if dtype is None or dtype not in _TORCH_DTYPES.values():
            raise ValueError(f"give exponent_bits and mantissa_bits, or a dtype, not {dtype}")
        return _Format(8 * dtype.itemsize, torch.finfo(dtype).max, partial(_cast, dtype=dtype))
    if dtype is not None:
        raise ValueError("give either exponent_bits and mantissa_bits, or a dtype")
    known = (exponent_bits, mantissa_bits, finite, unsigned_zero)
    if known in _TORCH_DTYPES:
        return _format(None, None, False, False, _TORCH_DTYPES[known])
    bits = 1 + exponent_bits + mantissa_bits
    if known == _E2M1:
        return _Format(bits, _MAX_E2M1, partial(_round, mantissa_bits=mantissa_bits, bias=1))
    if finite or unsigned_zero:
        raise ValueError(f"AIMET has no e{exponent_bits}m{mantissa_bits} of that kind")
    return _Format(
        bits,
        (2 - 2.0**-mantissa_bits) * 2.0 ** (2 ** (exponent_bits - 1) - 1),
        partial(_round, mantissa_bits=mantissa_bits, bias=2 ** (exponent_bits - 1)),
        # 2 - 2^0 is an integer in Python, and so is the buffer that AIMET fills with the maximum.
        integer_max=mantissa_bits == 0,
    )


def _calibrate(
    x: Tensor,
    form: _Format,
    shape: Sequence[int],
    block_size: Sequence[int] | None,
    *,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    low, high = min_max(
        x, steps=2**form.bits - 1, symmetric=False, shape=shape, block_size=block_size
    )
    largest = torch.maximum(low.abs(), high.abs())
    largest = largest.to(torch.int64) if form.integer_max else largest
    exponent = torch.log2(largest.abs()) - math.log2(form.max)
    # pow, as AIMET computes it: exp2 rounds fractions differently.
    return torch.pow(2, exponent.round() if power_of_two else exponent), largest.to(x.dtype)


def _scaled_cast(
    x: Tensor, scale: Tensor, form: _Format, block_size: Sequence[int] | None
) -> Tensor:
    steps = spread(scale, block_size)
    ratio = (split(x, scale.shape, block_size) / steps).clamp(-form.max, form.max)
    y: Tensor = form.cast(ratio) * steps
    return y.reshape(x.shape)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _round(x: Tensor, mantissa_bits: int, bias: int) -> Tensor:
    exponent = torch.floor(torch.log2(x.abs()) + bias).clamp(min=1)
    step = torch.exp2(exponent - mantissa_bits - bias)
    y: Tensor = torch.round(x / step) * step
    return y
