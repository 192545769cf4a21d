// How one element is quantized, for every family of formats.
//
// Each rule equals quark_native.formats bit for bit, for these reasons:
//
// Rounding without division. With c = 1.5 * 2^(k+23), adding c to |a| < 2^(k+22) leaves multiples
// of 2^k, rounded to nearest, ties to even: r = (|a| + c) - c, where the subtraction is exact. For
// an element with m mantissa bits, k = max(exponent(a), smallest exponent) - m. That needs c finite
// and 2^k normal, which holds unless the exponents are extreme; such blocks are detected and go
// through `exact`, which follows the specification's formula step by step.
//
// The other roundings correct r: with q = 2^k, |a| - r is exact, and r is off by one q at most.
//
// Saturation. The largest element is an element itself, so clipping after rounding equals clipping
// before.
#pragma once
#include <stdint.h>
#include <string.h>
#include "library.h"

#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t as_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

static const uint32_t SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, EXPONENT = 0x7f800000u;
static const uint32_t MANTISSA = 0x007fffffu, HALF = 0x00400000u, NOT_A_NUMBER = 0x7fc00000u;
static const uint32_t ABOVE_SQRT2 = 0x3504f4u;  // mantissa of the smallest float above sqrt(2)
static const float NOISE_STEPS = 16777216.0f;

INLINE float minimum(float a, float b) { return a < b ? a : b; }  // b where a is NaN
INLINE float power(int exponent) {  // 2^exponent, -149..127
    return as_float(exponent >= -126 ? (uint32_t)(exponent + 127) << 23
                                     : 1u << (exponent + 149));
}

// Random numbers: Philox4x32-10 with the counter i / 4, of which element i takes word i mod 4.
INLINE void philox(uint64_t counter, uint64_t seed, uint32_t word[4]) {
    uint32_t w0 = (uint32_t)counter, w1 = (uint32_t)(counter >> 32), w2 = 0, w3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)w0 * 0xD2511F53u, second = (uint64_t)w2 * 0xCD9E8D57u;
        w0 = (uint32_t)(second >> 32) ^ w1 ^ k0;
        w1 = (uint32_t)second;
        w2 = (uint32_t)(first >> 32) ^ w3 ^ k1;
        w3 = (uint32_t)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = w0; word[1] = w1; word[2] = w2; word[3] = w3;
}

// The random integers in [0, 2^24) of elements index..index + count - 1.
static void noise(uint64_t index, int64_t count, uint64_t seed, float *to) {
    uint32_t word[4];
    for (int64_t i = 0; i < count; i++) {
        if (i == 0 || (index + i) % 4 == 0) philox((index + i) / 4, seed, word);
        to[i] = (float)(word[(index + i) % 4] >> 8);
    }
}

// |a| rounded to multiples of q = 2^k by mode R, given `nearest`: |a| to nearest, ties to even.
template <int R>
INLINE float corrected(float a, float nearest, float q, uint32_t sign, float random) {
    float r = nearest;
    if (R == QN_NEAREST_EVEN) return r;
    if (R == QN_NEAREST_AWAY) return a - r == 0.5f * q ? r + q : r;
    float down = r > a ? r - q : r;
    if (R == QN_TOWARD_ZERO) return down;
    if (R == QN_STOCHASTIC) {  // u < f, written so that a quotient lost to underflow counts
        float rest = a - down;
        return (random == 0.0f ? rest > 0 : rest / q * NOISE_STEPS > random) ? down + q : down;
    }
    float up = r < a ? r + q : r;
    return (R == QN_CEIL) == (sign == 0) ? up : down;
}

// Elements with a mantissa: v, within +-high, to the nearest element.
typedef struct {
    int32_t lowest;    // exponent bits of the smallest normal element
    uint32_t shift;    // (23 - m) << 23
    uint32_t down;     // m << 23
    float high;
} grid;

template <int R>
INLINE float to_grid(float v, grid g, float random) {
    uint32_t bits = as_bits(v), sign = bits & SIGN;
    int32_t top = (int32_t)(bits & EXPONENT);
    top = top < g.lowest ? g.lowest : top;
    float c = as_float(((uint32_t)top + g.shift) | HALF), a = as_float(bits & MAGNITUDE);
    float r = (a + c) - c;
    if (R != QN_NEAREST_EVEN) r = corrected<R>(a, r, as_float((uint32_t)top - g.down), sign, random);
    r = r > g.high ? g.high : r;  // NaN stays
    return as_float(as_bits(r) | sign);
}

// Integers: v within +-2^22 to the nearest integer.
template <int R>
INLINE float to_integer(float v, float random) {
    uint32_t sign = as_bits(v) & SIGN;
    float a = as_float(as_bits(v) & MAGNITUDE), c = 12582912.0f, r = (a + c) - c;
    r = corrected<R>(a, r, 1.0f, sign, random);
    return as_float(as_bits(r) | sign);
}

INLINE float clamped(float v, float low, float high) {  // NaN stays; -0 is not above 0
    v = v <= low ? low : v;
    return v > high ? high : v;
}

// A quotient v of x too small for a float stays the smallest one where that is rounded away.
template <int R>
INLINE float kept(float v, float x) {
    if (R == QN_FLOOR || R == QN_CEIL || R == QN_STOCHASTIC)
        v = v == 0 && x != 0 ? as_float((as_bits(x) & SIGN) | 1u) : v;
    return v;
}

template <int R>
INLINE float divided(float x, float scale) { return kept<R>(x / scale, x); }

template <int R>
INLINE float affine(float x, float scale, float low, float high, float random) {
    return to_integer<R>(clamped(divided<R>(x, scale), low, high), random) * scale;
}

template <int R>
INLINE float scaled(float x, float scale, float low, grid g, float random) {
    return to_grid<R>(clamped(divided<R>(x, scale), low, g.high), g, random) * scale;
}

// lowest, highest: exponent fields, 1..254.
INLINE float to_power(float x, int32_t lowest, int32_t highest) {
    uint32_t bits = as_bits(x);
    int32_t field = (int32_t)((bits & EXPONENT) >> 23) + ((bits & MANTISSA) >= ABOVE_SQRT2);
    field = field < lowest ? lowest : field;
    field = field > highest ? highest : field;
    uint32_t power_bits = ((uint32_t)field << 23) | (bits & SIGN);
    return as_float((bits & MAGNITUDE) > EXPONENT ? NOT_A_NUMBER : power_bits);
}

INLINE float binary(float x, float scale, float low) {
    float below = low < 0 ? -scale : 0.0f * scale;
    float found = (low < 0 ? x >= 0 : x > 0) ? scale : below;
    return x != x ? as_float(NOT_A_NUMBER) : found;
}

INLINE float ternary(float x, float scale, float threshold) {
    float a = as_float(as_bits(x) & MAGNITUDE);
    float signed_scale = as_float((as_bits(scale) & MAGNITUDE) | (as_bits(x) & SIGN));
    float found = a > threshold ? signed_scale : 0.0f * scale;
    return x != x ? as_float(NOT_A_NUMBER) : found;
}

// Rounding as the specification writes it: integers by mode R, the sign of the value itself.
template <int R>
INLINE float round_any(float k, float random) {
    float a = __builtin_fabsf(k), whole = __builtin_truncf(a), rest = a - whole, r = whole;
    int negative = (as_bits(k) & SIGN) != 0;
    if (R == QN_NEAREST_EVEN) r = __builtin_rintf(a);
    if (R == QN_NEAREST_AWAY) r = rest >= 0.5f ? whole + 1 : whole;
    if (R == QN_FLOOR) r = negative && rest > 0 ? whole + 1 : whole;
    if (R == QN_CEIL) r = !negative && rest > 0 ? whole + 1 : whole;
    if (R == QN_STOCHASTIC) r = rest * NOISE_STEPS > random ? whole + 1 : whole;
    return __builtin_copysignf(r, k);
}

// A block's parameters. fast: `to_grid` holds for it; else `exact` does.
typedef struct {
    int fast, lost;      // lost: an infinity or NaN is in it
    int scale;           // exponent of the shared scale
    grid g;
} shared;

INLINE shared share(const qn_format *f, uint32_t largest) {
    shared s;
    s.lost = largest >= EXPONENT;
    int field = (int)((largest + f->bump) >> 23);
    int scale = field - 127 - f->max_exponent;
    scale = scale < f->min_scale ? f->min_scale : scale;
    s.scale = scale > f->max_scale ? f->max_scale : scale;
    int lowest = s.scale + f->min_exponent + 127;
    int top = s.scale + f->max_exponent + 127;
    s.fast = (int)(largest >> 23) <= 230 && lowest > f->mantissa && top < 254;
    s.g.lowest = (int32_t)((uint32_t)lowest << 23);
    s.g.shift = (uint32_t)(23 - f->mantissa) << 23;
    s.g.down = (uint32_t)f->mantissa << 23;
    s.g.high = as_float(as_bits(f->high) + ((uint32_t)s.scale << 23));
    return s;
}

// The element for v = x / 2^scale, in the specification's steps; elements and steps are exact.
template <int R>
INLINE float element_of(const qn_format *f, float v, float random) {
    v = clamped(v, f->low, f->high);
    uint32_t magnitude = as_bits(v) & MAGNITUDE;
    int exponent = (int)(magnitude >> 23) - 127;
    exponent = exponent < f->min_exponent ? f->min_exponent : exponent;
    float step = power(exponent - f->mantissa);
    return clamped(round_any<R>(v / step, random) * step, f->low, f->high);
}

template <int R>
INLINE float exact(const qn_format *f, float x, int scale, float random) {
    float s = power(scale);
    return element_of<R>(f, divided<R>(x, s), random) * s;
}

// d-Matrix's block floating point: t = fl(x + 6 * 2^E) is rounded to multiples of the step, both
// to nearest; fl itself rounds to multiples of 2^(E-21).
typedef struct {
    int fast, lost;
    float base, c, low, high, step;
} bfp_shared;

INLINE bfp_shared bfp_share(const qn_format *f, uint32_t largest) {
    bfp_shared s;
    s.lost = largest >= EXPONENT;
    int field = (int)(largest >> 23), down = f->mantissa;  // p - 2
    s.fast = field <= 225 && field >= 30;
    s.step = power(field - 127 - down);
    s.base = 6.0f * as_float((uint32_t)field << 23);
    s.c = as_float(((uint32_t)(field - down + 23) << 23) | HALF);
    s.low = f->low * s.step;
    s.high = f->high * s.step;
    return s;
}

INLINE float bfp(float x, bfp_shared s) {
    float t = x + s.base;
    t = (t + s.c) - s.c;
    float r = clamped(t - s.base, s.low, s.high);
    return as_float(as_bits(r) | (as_bits(x) & SIGN));  // what rounds to zero keeps its sign
}

INLINE float bfp_exact(const qn_format *f, float x, bfp_shared s) {
    float fine = power(21 - f->mantissa), v = x / s.step;
    v = __builtin_rintf(v * fine) / fine;
    return clamped(__builtin_rintf(v), f->low, f->high) * s.step;
}
