"""Triton kernels of fake quantization, each element read once.

A tile holds whole blocks, so that a block's maximum is found and used without reading it again:
[blocks, elements] where blocks lie along the last axis, [elements, columns] where they lie across.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quark_native.kernels.triton_rules import (
    AFFINE,
    BFP,
    BINARY,
    BLOCK_LOG,
    EXPONENT,
    FAR,
    LAST_FIELD,
    LOG,
    MAGNITUDE,
    MX,
    NAN,
    NVFP,
    SCALED,
    SIGN,
    STOCHASTIC,
    bits_of,
    clamped,
    corrected,
    float_of,
    kept,
    loaded,
    moved_by,
    noise_at,
    nvfp_scale,
    power_of_two,
    shared_scale,
    stored,
    to_grid,
    to_power,
)


@triton.jit
def _quantize_blocks(
    x,
    largest,
    outer,
    noise,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BUMP: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
):
    """Blocks with the bits of their maxima, which broadcast against them."""
    if KIND == MX:
        scale = shared_scale(largest, BUMP, MAX_EXPONENT, MIN_SCALE, MAX_SCALE)
        far = moved_by(largest, scale, MIN_EXPONENT, MANTISSA_BITS)
        v = kept(x * power_of_two(far), x, ROUNDING)
        unit = power_of_two(tl.maximum(scale + far, -126))
        lowest = (scale + far + (MIN_EXPONENT + 127)) << 23
        r = to_grid(v, lowest, HIGH * unit, noise, MANTISSA_BITS, ROUNDING)
        r = r * power_of_two(-far)
    elif KIND == BFP:
        field = largest >> 23
        far = tl.where(field > LAST_FIELD, -FAR, tl.where(field < FAR, FAR, 0))
        v = x * power_of_two(far)
        exponent = field + far - 127
        base = 6.0 * power_of_two(exponent)
        c = 1.5 * power_of_two(exponent - MANTISSA_BITS + 23)
        step = power_of_two(exponent - MANTISSA_BITS)
        t = v + base
        t = (t + c) - c
        r = clamped(t - base, LOW * step, HIGH * step) * power_of_two(-far)
        r = float_of(bits_of(r) | (bits_of(x) & SIGN))
    elif KIND == BLOCK_LOG:
        top = tl.minimum(tl.maximum(((largest + BUMP) >> 23) - 127, MIN_SCALE), MAX_SCALE)
        bottom = tl.maximum(top - MANTISSA_BITS, -126)
        r = to_power(x, bottom + 127, top + 127)
    else:
        scale = nvfp_scale(largest, outer)
        v = clamped(kept(tl.div_rn(x, scale), x, ROUNDING), -HIGH, HIGH)
        lowest = tl.full(x.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
        r = to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING) * scale
    return tl.where(largest >= EXPONENT, float_of(tl.full(x.shape, NAN, tl.int32)), r)


@triton.jit
def blocks_kernel(
    x_ptr,
    out_ptr,
    outer_ptr,
    seed,
    length,
    inner,
    groups,
    rows,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BUMP: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    ACROSS: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Blocks that find their own scales.

    Args:
        x_ptr, out_ptr: [outer, length, inner], contiguous; int16 with BF16.
        outer_ptr: float32, one value; the outer scale of NVFP4.
        seed: Of stochastic rounding.
        length, inner: Of the tensor.
        groups: Blocks along ``length``.
        rows: Blocks in all; with ACROSS outer * groups.
        BLOCK, WIDTH: Elements of a block, and the next power of two.
        EVEN: Whether blocks fill the tensor, one after another.
        ACROSS: Whether blocks lie across rows (inner > 1).
        TILE: Blocks of a program, or with ACROSS columns.
    """
    program = tl.program_id(0).to(tl.int64)
    if ACROSS:
        strips = tl.cdiv(inner, TILE)
        row = program // strips
        column = (program % strips) * TILE + tl.arange(0, TILE)
        place = (row % groups) * BLOCK + tl.arange(0, WIDTH)
        first = (row // groups) * length
        index = (first + place[:, None]) * inner + column[None, :]
        inside = (tl.arange(0, WIDTH) < BLOCK) & (place < length)
        mask = inside[:, None] & (column < inner)[None, :]
        x = loaded(x_ptr, index, mask, BF16)
        largest = tl.max(bits_of(x) & MAGNITUDE, axis=0)[None, :]
    else:
        row = program * TILE + tl.arange(0, TILE)
        lane = tl.arange(0, WIDTH)
        if EVEN:
            index = row[:, None] * BLOCK + lane[None, :]
            mask = (row < rows)[:, None]
        else:
            place = (row % groups)[:, None] * BLOCK + lane[None, :]
            index = (row // groups)[:, None] * length + place
            mask = (row < rows)[:, None] & (lane < BLOCK)[None, :] & (place < length)
        x = loaded(x_ptr, index, mask, BF16)
        largest = tl.max(bits_of(x) & MAGNITUDE, axis=1)[:, None]
    noise = x
    if ROUNDING == STOCHASTIC:
        noise = noise_at(index, seed)
    outer = 1.0
    if KIND == NVFP:
        outer = tl.load(outer_ptr)
    r = _quantize_blocks(
        x,
        largest,
        outer,
        noise,
        KIND,
        ROUNDING,
        MANTISSA_BITS,
        MIN_EXPONENT,
        MAX_EXPONENT,
        LOW,
        HIGH,
        BUMP,
        MIN_SCALE,
        MAX_SCALE,
    )
    stored(out_ptr, index, mask, r, BF16)


@triton.jit
def given_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    extra_ptr,
    seed,
    count,
    length,
    inner,
    block,
    scale_rows,
    scale_outer,
    scale_block,
    scale_inner,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EXTRA: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Elements whose scales are given.

    Args:
        x_ptr, out_ptr: [outer, length, inner], contiguous, ``count`` elements.
        scale_ptr: float32; element (o, l, i) has the scale at (o // scale_rows) * scale_outer +
            (l // block) * scale_block + i * scale_inner.
        extra_ptr: float32 like the scales, zero points or thresholds, if EXTRA.
        seed: Of stochastic rounding.
        WHOLE: Whether one scale is for all.
        TILE: Elements of a program.
    """
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = index < count
    x = loaded(x_ptr, index, mask, BF16)
    if WHOLE:
        scale = tl.load(scale_ptr)
        extra = scale
        if EXTRA:
            extra = tl.load(extra_ptr)
    else:
        column = index % inner
        line = index // inner
        at = (line // length // scale_rows) * scale_outer
        at += (line % length // block) * scale_block + column * scale_inner
        scale = tl.load(scale_ptr + at, mask=mask, other=1.0)
        extra = scale
        if EXTRA:
            extra = tl.load(extra_ptr + at, mask=mask, other=0.0)
    noise = x
    if ROUNDING == STOCHASTIC:
        noise = noise_at(index, seed)
    if KIND == AFFINE:
        low, high = LOW, HIGH
        if EXTRA:
            low, high = LOW - extra, HIGH - extra
        v = clamped(kept(tl.div_rn(x, scale + x * 0.0), x, ROUNDING), low, high)
        bits = bits_of(v)
        a = float_of(bits & MAGNITUDE)
        r = (a + 12582912.0) - 12582912.0
        r = corrected(a, r, 1.0, bits < 0, noise, ROUNDING)
        r = float_of(bits_of(r) | (bits & SIGN)) * scale
    elif KIND == SCALED:
        v = clamped(kept(tl.div_rn(x, scale + x * 0.0), x, ROUNDING), LOW, HIGH)
        lowest = tl.full(x.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
        r = to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING) * scale
    elif KIND == LOG:
        r = to_power(x, MIN_EXPONENT + 127, MAX_EXPONENT + 127)
    elif KIND == BINARY:
        if LOW < 0:
            r = tl.where(x >= 0.0, scale, -scale)
        else:
            r = tl.where(x > 0.0, scale, 0.0 * scale)
        r = tl.where(x != x, x, r)
    else:
        signed = float_of((bits_of(scale + x * 0.0) & MAGNITUDE) | (bits_of(x) & SIGN))
        r = tl.where(tl.abs(x) > extra, signed, 0.0 * scale)
        r = tl.where(x != x, x, r)
    stored(out_ptr, index, mask, r, BF16)
