"""The arithmetic that the Triton kernels share, each part equal to the specification.

Why they equal the specification. Values are rounded to multiples of q = 2^k by adding and
subtracting c = 1.5 * 2^(k+23) (the argument is in csrc/rules.h), which needs exponents far from
float32's ends. A block near an end is first multiplied by a power of two that moves it away, and
its result by the inverse: the first product is exact or, where it vanishes, far below q; the second
is rounded once, as the specification's product with the scale is. Divisions are IEEE divisions,
and no product is fused with a sum (the launches say so).
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
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def loaded(ptr, index, mask, BF16: tl.constexpr):
    """Elements as float32; those of bfloat16 tensors are passed as int16."""
    raw = tl.load(ptr + index, mask=mask, other=0)
    if BF16:
        return float_of(raw.to(tl.int32) << 16)
    return raw.to(tl.float32)


@triton.jit
def stored(ptr, index, mask, values, BF16: tl.constexpr):
    """Write float32 values, rounded to nearest, ties to even, to the tensor's dtype."""
    if BF16:
        bits = bits_of(values)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & MAGNITUDE) > EXPONENT, 0x7FC0, rounded)
        tl.store(ptr + index, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(ptr + index, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent, -149..127."""
    subnormal = 1 << tl.minimum(tl.maximum(exponent + 149, 0), 22)
    return float_of(tl.where(exponent < -126, subnormal, (exponent + 127) << 23))


@triton.jit
def noise_at(index, seed):
    """The random integers in [0, 2^24) of elements, float32: Philox4x32-10, word index % 4."""
    counter = index.to(tl.uint64) // 4
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero, zero)
    lane = (index % 4).to(tl.int32)
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return (word >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def corrected(a, nearest, q, negative, noise, ROUNDING: tl.constexpr):
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
def kept(v, x, ROUNDING: tl.constexpr):
    """A quotient v of x that vanished stays the smallest number where it is rounded away."""
    if ROUNDING == FLOOR or ROUNDING == CEIL or ROUNDING == STOCHASTIC:
        tiny = float_of((bits_of(x) & SIGN) | 1)
        v = tl.where((v == 0.0) & (x != 0.0), tiny, v)
    return v


@triton.jit
def to_grid(v, lowest, high, noise, MANTISSA_BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """The element nearest to v; lowest: exponent bits of the smallest normal one."""
    bits = bits_of(v)
    top = tl.maximum(bits & EXPONENT, lowest)
    c = float_of((top + ((23 - MANTISSA_BITS) << 23)) | HALF)
    a = float_of(bits & MAGNITUDE)
    r = (a + c) - c
    if ROUNDING != NEAREST_EVEN:
        q = float_of(top - (MANTISSA_BITS << 23))
        r = corrected(a, r, q, bits < 0, noise, ROUNDING)
    r = tl.where(r > high, high, r)
    return float_of(bits_of(r) | (bits & SIGN))


@triton.jit
def clamped(v, low, high):
    v = tl.where(v <= low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def to_power(x, lowest, highest):
    """X to the nearest power of two in the logarithm; exponent fields."""
    bits = bits_of(x)
    field = (bits & EXPONENT) >> 23
    field += ((bits & MANTISSA) >= ABOVE_SQRT2).to(tl.int32)
    field = tl.minimum(tl.maximum(field, lowest), highest)
    power = float_of((field << 23) | (bits & SIGN))
    return tl.where(x != x, float_of(tl.full(bits.shape, NAN, tl.int32)), power)


@triton.jit
def moved_by(largest, scale, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """The exponent by which a block is moved away from the ends."""
    small = scale + (MIN_EXPONENT + 125) <= MANTISSA_BITS
    return tl.where((largest >> 23) > LAST_FIELD, -FAR, tl.where(small, FAR, 0))


@triton.jit
def shared_scale(
    largest,
    BUMP: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
):
    scale = ((largest + BUMP) >> 23) - (127 + MAX_EXPONENT)
    return tl.minimum(tl.maximum(scale, MIN_SCALE), MAX_SCALE)


@triton.jit
def nvfp_scale(largest, outer):
    """The e4m3 nearest to max / 6 / outer, 2^-9 at least, times outer."""
    wanted = float_of(largest).to(tl.float64) / 6.0 / outer.to(tl.float64)
    wanted = tl.minimum(wanted, 448.0)
    exponent = ((wanted.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int64)
    exponent = tl.maximum(exponent, -6)
    c = (((exponent + (1072)) << 52) | (1 << 51)).to(tl.float64, bitcast=True)
    inner = tl.maximum((wanted + c) - c, 0.001953125)
    return inner.to(tl.float32) * outer
