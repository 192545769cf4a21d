// Reading tensors of any dtype as float32, and writing them back.
#pragma once
#include "rules.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

static const int64_t CHUNK = 2048;  // elements that are processed together: their float32 stay in the L1 cache

INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_float(sign | EXPONENT | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x400u) return as_float(sign | ((magnitude << 13) + (112u << 23)));
    return as_float(sign | as_bits((float)magnitude * 0x1p-24f));  // subnormal: exact
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & MAGNITUDE;
    if (magnitude > EXPONENT) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // from 65520 on
    if (magnitude < 0x38800000u) {  // subnormal: 2^-24 is the last place of 1.5 * 2^-1
        float shifted = as_float(magnitude) + 0.75f;
        return (uint16_t)(sign | (as_bits(shifted) - as_bits(0.75f)));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - (112u << 23)) >> 13));
}

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits = as_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & MAGNITUDE) > EXPONENT ? 0x7fc0u : rounded);
}

// Elements first..first + n - 1 as float32: the tensor itself, or a copy in `buffer`.
static const float *loaded(int dtype, const void *x, int64_t first, int64_t n, float *buffer) {
    if (dtype == QN_FLOAT32) return (const float *)x + first;
    const uint16_t *from = (const uint16_t *)x + first;
    int64_t i = 0;
    if (dtype == QN_BFLOAT16) {
        for (; i < n; i++) buffer[i] = as_float((uint32_t)from[i] << 16);
        return buffer;
    }
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; i++) buffer[i] = from_half(from[i]);
    return buffer;
}

// Where results are computed: the tensor itself, or `buffer`, from which `stored` takes them.
INLINE float *target(int dtype, int stream, void *out, int64_t first, float *buffer) {
    return dtype == QN_FLOAT32 && !stream ? (float *)out + first : buffer;
}

static void stored(int dtype, int stream, void *out, int64_t first, int64_t n, float *buffer) {
    int64_t i = 0;
    if (dtype == QN_FLOAT32) {
        float *to = (float *)out + first;
        if (to == buffer) return;
#if defined(__AVX2__)
        for (; i < n && ((uintptr_t)(to + i) & 31); i++) to[i] = buffer[i];
        for (; i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(buffer + i));
#elif defined(__SSE2__)
        for (; i < n && ((uintptr_t)(to + i) & 15); i++) to[i] = buffer[i];
        for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(buffer + i));
#endif
        for (; i < n; i++) to[i] = buffer[i];
        return;
    }
    uint16_t *to = (uint16_t *)out + first, *narrow = to;
    uint16_t line[CHUNK];
    if (stream) narrow = line;
    if (dtype == QN_BFLOAT16) {
        for (; i < n; i++) narrow[i] = to_bfloat(buffer[i]);
    } else {
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(narrow + i), _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), 0));
#endif
        for (; i < n; i++) narrow[i] = to_half(buffer[i]);
    }
    if (!stream) return;
    i = 0;
#if defined(__AVX2__)
    for (; i < n && ((uintptr_t)(to + i) & 31); i++) to[i] = narrow[i];
    for (; i + 16 <= n; i += 16)
        _mm256_stream_si256((__m256i *)(to + i), _mm256_loadu_si256((const __m256i *)(narrow + i)));
#elif defined(__SSE2__)
    for (; i < n && ((uintptr_t)(to + i) & 15); i++) to[i] = narrow[i];
    for (; i + 8 <= n; i += 8)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(narrow + i)));
#endif
    for (; i < n; i++) to[i] = narrow[i];
}

INLINE void fence(int stream) {
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#else
    (void)stream;
#endif
}
