"""Triton kernels that pack MX blocks into bytes and unpack them."""

from __future__ import annotations

import triton
import triton.language as tl

from quark_native.kernels.triton_rules import (
    EXPONENT,
    MAGNITUDE,
    NAN,
    STOCHASTIC,
    bits_of,
    clamped,
    float_of,
    kept,
    loaded,
    noise_at,
    power_of_two,
    shared_scale,
    stored,
    to_grid,
)


@triton.jit
def _code(
    r,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
):
    """The code of an element, in the scale's units."""
    if FIXED:
        return (r * (1 << MANTISSA_BITS)).to(tl.int32) & ((1 << BITS) - 1)
    smallest = power_of_two(tl.full(r.shape, MIN_EXPONENT, tl.int32))
    a = tl.abs(r)
    below = a < smallest
    z = bits_of(tl.where(below, a + smallest, a))
    code = (z >> (23 - MANTISSA_BITS)) - ((MIN_EXPONENT + 127) << MANTISSA_BITS)
    code += tl.where(below, 0, 1 << MANTISSA_BITS)
    return code | tl.where(bits_of(r) < 0, 1 << (BITS - 1), 0)


@triton.jit
def pack_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    seed,
    rows,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    HIGH: tl.constexpr,
    BUMP: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """MX blocks to packed codes and exponents of scales, for whole blocks along the last axis.

    Args:
        x_ptr: ``rows`` blocks.
        codes_ptr: uint8, ``BITS`` an element, the first in the lowest bits; 4, 6 or 8.
        scales_ptr: uint8, one a block: the exponent less MIN_SCALE, 255 for NaN.
        seed: Of stochastic rounding.
        rows: Blocks.
        FIXED: Whether elements are two's complement.
        TILE: Blocks of a program.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < rows
    x = loaded(x_ptr, index, there[:, None], BF16)
    largest = tl.max(bits_of(x) & MAGNITUDE, axis=1)
    scale = shared_scale(largest, BUMP, MAX_EXPONENT, MIN_SCALE, MAX_SCALE)
    lost = largest >= EXPONENT
    noise = x
    if ROUNDING == STOCHASTIC:
        noise = noise_at(index, seed)
    # In two steps, since 2^-scale itself may be no number.
    half = scale // 2
    v = x * power_of_two(-half)[:, None] * power_of_two(half - scale)[:, None]
    v = clamped(kept(v, x, ROUNDING), -HIGH, HIGH)
    lowest = tl.full(v.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
    r = to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING)
    code = _code(r, BITS, FIXED, MANTISSA_BITS, MIN_EXPONENT)
    code = tl.where(lost[:, None], 0, code)
    if BITS == 8:
        tl.store(codes_ptr + index, code.to(tl.uint8), mask=there[:, None])
    elif BITS == 4:
        low, high = tl.split(tl.reshape(code, (TILE, BLOCK // 2, 2)))
        byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(codes_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=there[:, None])
    else:
        even, odd = tl.split(tl.reshape(code, (TILE, BLOCK // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        word = first | (second << 6) | (third << 12) | (fourth << 18)
        byte = (row[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]) * 3
        tl.store(codes_ptr + byte, (word & 255).to(tl.uint8), mask=there[:, None])
        tl.store(codes_ptr + byte + 1, ((word >> 8) & 255).to(tl.uint8), mask=there[:, None])
        tl.store(codes_ptr + byte + 2, (word >> 16).to(tl.uint8), mask=there[:, None])
    stored = tl.where(lost, 255, scale - MIN_SCALE)
    tl.store(scales_ptr + row, stored.to(tl.uint8), mask=there)


@triton.jit
def unpack_kernel(
    codes_ptr,
    scales_ptr,
    table_ptr,
    out_ptr,
    rows,
    MIN_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Undo :func:`pack_kernel`.

    Args:
        codes_ptr, scales_ptr: As packed.
        table_ptr: float32, the element of each code.
        out_ptr: ``rows`` blocks.
        rows: Blocks.
        TILE: Blocks of a program.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = (row < rows)[:, None]
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if BITS == 8:
        code = tl.load(codes_ptr + index, mask=there, other=0).to(tl.int32)
    elif BITS == 4:
        byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        both = tl.load(codes_ptr + byte, mask=there, other=0).to(tl.int32)
        code = tl.reshape(tl.join(both & 15, both >> 4), (TILE, BLOCK))
    else:
        byte = (row[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]) * 3
        word = tl.load(codes_ptr + byte, mask=there, other=0).to(tl.int32)
        word |= tl.load(codes_ptr + byte + 1, mask=there, other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 2, mask=there, other=0).to(tl.int32) << 16
        even = tl.join(word & 63, (word >> 12) & 63)
        odd = tl.join((word >> 6) & 63, word >> 18)
        code = tl.reshape(tl.join(even, odd), (TILE, BLOCK))
    field = tl.load(scales_ptr + row, mask=row < rows, other=0).to(tl.int32)
    scale = power_of_two(tl.minimum(field + MIN_SCALE, 127))
    scale = tl.where(field == 255, float_of(tl.full(field.shape, NAN, tl.int32)), scale)
    values = tl.load(table_ptr + code) * scale[:, None]
    stored(out_ptr, index, there, values, BF16)
