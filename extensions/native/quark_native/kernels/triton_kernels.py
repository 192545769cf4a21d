"""Triton kernels: fake quantization, packing and unpacking, each element read once.

Why they equal the specification. Values are rounded to multiples of q = 2^k by adding and
subtracting c = 1.5 * 2^(k+23) (the argument is in csrc/rules.h), which needs exponents far from
float32's ends. A block near an end is first multiplied by a power of two that moves it away, and
its result by the inverse: the first product is exact or, where it vanishes, far below q; the second
is rounded once, as the specification's product with the scale is. Divisions are IEEE divisions,
and no product is fused with a sum (the launches say so).

A tile holds whole blocks, so that a block's maximum is found and used without reading it again:
[blocks, elements] where blocks lie along the last axis, [elements, columns] where they lie across.
"""

from __future__ import annotations

import triton
import triton.language as tl

AFFINE = tl.constexpr(0)
SCALED = tl.constexpr(1)
LOG = tl.constexpr(2)
BINARY = tl.constexpr(3)
TERNARY = tl.constexpr(4)
MX = tl.constexpr(5)
BFP = tl.constexpr(6)
BLOCK_LOG = tl.constexpr(7)
NVFP = tl.constexpr(8)

NEAREST_EVEN = tl.constexpr(0)
NEAREST_AWAY = tl.constexpr(1)
TOWARD_ZERO = tl.constexpr(2)
FLOOR = tl.constexpr(3)
CEIL = tl.constexpr(4)
STOCHASTIC = tl.constexpr(5)

SIGN = tl.constexpr(-(1 << 31))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
EXPONENT = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x007FFFFF)
HALF = tl.constexpr(0x00400000)
NAN = tl.constexpr(0x7FC00000)
ABOVE_SQRT2 = tl.constexpr(0x3504F4)
FAR = tl.constexpr(64)
LAST_FIELD = tl.constexpr(190)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _loaded(ptr, index, mask, BF16: tl.constexpr):
    """Elements as float32; those of bfloat16 tensors are passed as int16."""
    raw = tl.load(ptr + index, mask=mask, other=0)
    if BF16:
        return _float(raw.to(tl.int32) << 16)
    return raw.to(tl.float32)


@triton.jit
def _stored(ptr, index, mask, values, BF16: tl.constexpr):
    """Write float32 values, rounded to nearest, ties to even, to the tensor's dtype."""
    if BF16:
        bits = _bits(values)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & MAGNITUDE) > EXPONENT, 0x7FC0, rounded)
        tl.store(ptr + index, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(ptr + index, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _power(exponent):
    """2 ** exponent, -149..127."""
    subnormal = 1 << tl.minimum(tl.maximum(exponent + 149, 0), 22)
    return _float(tl.where(exponent < -126, subnormal, (exponent + 127) << 23))


@triton.jit
def _noise(index, seed):
    """The random integers in [0, 2^24) of elements, float32: Philox4x32-10, word index % 4."""
    counter = index.to(tl.uint64) // 4
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero, zero)
    lane = (index % 4).to(tl.int32)
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return (word >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def _corrected(a, nearest, q, negative, noise, ROUNDING: tl.constexpr):
    """|a| rounded to multiples of q, from the nearest one."""
    if ROUNDING == NEAREST_EVEN:
        return nearest
    if ROUNDING == NEAREST_AWAY:
        return tl.where(a - nearest == 0.5 * q, nearest + q, nearest)
    down = tl.where(nearest > a, nearest - q, nearest)
    if ROUNDING == TOWARD_ZERO:
        return down
    if ROUNDING == STOCHASTIC:
        rest = a - down
        share = tl.div_rn(rest, q) * 16777216.0
        up = tl.where(noise == 0.0, rest > 0.0, share > noise)
        return tl.where(up, down + q, down)
    upper = tl.where(nearest < a, nearest + q, nearest)
    if ROUNDING == CEIL:
        return tl.where(negative, down, upper)
    return tl.where(negative, upper, down)


@triton.jit
def _kept(v, x, ROUNDING: tl.constexpr):
    """A quotient v of x that vanished stays the smallest number where it is rounded away."""
    if ROUNDING == FLOOR or ROUNDING == CEIL or ROUNDING == STOCHASTIC:
        tiny = _float((_bits(x) & SIGN) | 1)
        v = tl.where((v == 0.0) & (x != 0.0), tiny, v)
    return v


@triton.jit
def _to_grid(v, lowest, high, noise, MANTISSA_BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """The element nearest to v; lowest: exponent bits of the smallest normal one."""
    bits = _bits(v)
    top = tl.maximum(bits & EXPONENT, lowest)
    c = _float((top + ((23 - MANTISSA_BITS) << 23)) | HALF)
    a = _float(bits & MAGNITUDE)
    r = (a + c) - c
    if ROUNDING != NEAREST_EVEN:
        q = _float(top - (MANTISSA_BITS << 23))
        r = _corrected(a, r, q, bits < 0, noise, ROUNDING)
    r = tl.where(r > high, high, r)
    return _float(_bits(r) | (bits & SIGN))


@triton.jit
def _clamped(v, low, high):
    v = tl.where(v <= low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _to_power(x, lowest, highest):
    """X to the nearest power of two in the logarithm; exponent fields."""
    bits = _bits(x)
    field = (bits & EXPONENT) >> 23
    field += ((bits & MANTISSA) >= ABOVE_SQRT2).to(tl.int32)
    field = tl.minimum(tl.maximum(field, lowest), highest)
    power = _float((field << 23) | (bits & SIGN))
    return tl.where(x != x, _float(tl.full(bits.shape, NAN, tl.int32)), power)


@triton.jit
def _far(largest, scale, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """The exponent by which a block is moved away from the ends."""
    small = scale + (MIN_EXPONENT + 125) <= MANTISSA_BITS
    return tl.where((largest >> 23) > LAST_FIELD, -FAR, tl.where(small, FAR, 0))


@triton.jit
def _shared_scale(
    largest,
    BUMP: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
):
    scale = ((largest + BUMP) >> 23) - (127 + MAX_EXPONENT)
    return tl.minimum(tl.maximum(scale, MIN_SCALE), MAX_SCALE)


@triton.jit
def _nvfp_scale(largest, outer):
    """The e4m3 nearest to max / 6 / outer, 2^-9 at least, times outer."""
    wanted = _float(largest).to(tl.float64) / 6.0 / outer.to(tl.float64)
    wanted = tl.minimum(wanted, 448.0)
    exponent = ((wanted.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int64)
    exponent = tl.maximum(exponent, -6)
    c = (((exponent + (1072)) << 52) | (1 << 51)).to(tl.float64, bitcast=True)
    inner = tl.maximum((wanted + c) - c, 0.001953125)
    return inner.to(tl.float32) * outer


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
        scale = _shared_scale(largest, BUMP, MAX_EXPONENT, MIN_SCALE, MAX_SCALE)
        far = _far(largest, scale, MIN_EXPONENT, MANTISSA_BITS)
        v = _kept(x * _power(far), x, ROUNDING)
        unit = _power(tl.maximum(scale + far, -126))
        lowest = (scale + far + (MIN_EXPONENT + 127)) << 23
        r = _to_grid(v, lowest, HIGH * unit, noise, MANTISSA_BITS, ROUNDING)
        r = r * _power(-far)
    elif KIND == BFP:
        field = largest >> 23
        far = tl.where(field > LAST_FIELD, -FAR, tl.where(field < FAR, FAR, 0))
        v = x * _power(far)
        exponent = field + far - 127
        base = 6.0 * _power(exponent)
        c = 1.5 * _power(exponent - MANTISSA_BITS + 23)
        step = _power(exponent - MANTISSA_BITS)
        t = v + base
        t = (t + c) - c
        r = _clamped(t - base, LOW * step, HIGH * step) * _power(-far)
        r = _float(_bits(r) | (_bits(x) & SIGN))
    elif KIND == BLOCK_LOG:
        top = tl.minimum(tl.maximum(((largest + BUMP) >> 23) - 127, MIN_SCALE), MAX_SCALE)
        bottom = tl.maximum(top - MANTISSA_BITS, -126)
        r = _to_power(x, bottom + 127, top + 127)
    else:
        scale = _nvfp_scale(largest, outer)
        v = _clamped(_kept(tl.div_rn(x, scale), x, ROUNDING), -HIGH, HIGH)
        lowest = tl.full(x.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
        r = _to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING) * scale
    return tl.where(largest >= EXPONENT, _float(tl.full(x.shape, NAN, tl.int32)), r)


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
        x = _loaded(x_ptr, index, mask, BF16)
        largest = tl.max(_bits(x) & MAGNITUDE, axis=0)[None, :]
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
        x = _loaded(x_ptr, index, mask, BF16)
        largest = tl.max(_bits(x) & MAGNITUDE, axis=1)[:, None]
    noise = x
    if ROUNDING == STOCHASTIC:
        noise = _noise(index, seed)
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
    _stored(out_ptr, index, mask, r, BF16)


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
    x = _loaded(x_ptr, index, mask, BF16)
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
        noise = _noise(index, seed)
    if KIND == AFFINE:
        low, high = LOW, HIGH
        if EXTRA:
            low, high = LOW - extra, HIGH - extra
        v = _clamped(_kept(tl.div_rn(x, scale + x * 0.0), x, ROUNDING), low, high)
        bits = _bits(v)
        a = _float(bits & MAGNITUDE)
        r = (a + 12582912.0) - 12582912.0
        r = _corrected(a, r, 1.0, bits < 0, noise, ROUNDING)
        r = _float(_bits(r) | (bits & SIGN)) * scale
    elif KIND == SCALED:
        v = _clamped(_kept(tl.div_rn(x, scale + x * 0.0), x, ROUNDING), LOW, HIGH)
        lowest = tl.full(x.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
        r = _to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING) * scale
    elif KIND == LOG:
        r = _to_power(x, MIN_EXPONENT + 127, MAX_EXPONENT + 127)
    elif KIND == BINARY:
        if LOW < 0:
            r = tl.where(x >= 0.0, scale, -scale)
        else:
            r = tl.where(x > 0.0, scale, 0.0 * scale)
        r = tl.where(x != x, x, r)
    else:
        signed = _float((_bits(scale + x * 0.0) & MAGNITUDE) | (_bits(x) & SIGN))
        r = tl.where(tl.abs(x) > extra, signed, 0.0 * scale)
        r = tl.where(x != x, x, r)
    _stored(out_ptr, index, mask, r, BF16)


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
    smallest = _power(tl.full(r.shape, MIN_EXPONENT, tl.int32))
    a = tl.abs(r)
    below = a < smallest
    z = _bits(tl.where(below, a + smallest, a))
    code = (z >> (23 - MANTISSA_BITS)) - ((MIN_EXPONENT + 127) << MANTISSA_BITS)
    code += tl.where(below, 0, 1 << MANTISSA_BITS)
    return code | tl.where(_bits(r) < 0, 1 << (BITS - 1), 0)


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
    x = _loaded(x_ptr, index, there[:, None], BF16)
    largest = tl.max(_bits(x) & MAGNITUDE, axis=1)
    scale = _shared_scale(largest, BUMP, MAX_EXPONENT, MIN_SCALE, MAX_SCALE)
    lost = largest >= EXPONENT
    noise = x
    if ROUNDING == STOCHASTIC:
        noise = _noise(index, seed)
    # In two steps, since 2^-scale itself may be no number.
    half = scale // 2
    v = x * _power(-half)[:, None] * _power(half - scale)[:, None]
    v = _clamped(_kept(v, x, ROUNDING), -HIGH, HIGH)
    lowest = tl.full(v.shape, (MIN_EXPONENT + 127) << 23, tl.int32)
    r = _to_grid(v, lowest, HIGH, noise, MANTISSA_BITS, ROUNDING)
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
    scale = _power(tl.minimum(field + MIN_SCALE, 127))
    scale = tl.where(field == 255, _float(tl.full(field.shape, NAN, tl.int32)), scale)
    values = tl.load(table_ptr + code) * scale[:, None]
    _stored(out_ptr, index, there, values, BF16)
