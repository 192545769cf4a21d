// Packing and unpacking MX codes along a contiguous last axis of whole blocks.

// c[0..n) hold a byte each; n is a multiple of 32.
INLINE void narrow(const uint32_t *c, uint8_t *to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (; i + 32 <= n; i += 32) {
        const __m256i *from = (const __m256i *)(c + i);
        __m256i a = _mm256_packus_epi32(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1));
        __m256i b = _mm256_packus_epi32(_mm256_loadu_si256(from + 2), _mm256_loadu_si256(from + 3));
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
        _mm256_storeu_si256((__m256i *)(to + i), bytes);
    }
#elif defined(__SSE2__)
    for (; i + 16 <= n; i += 16) {  // codes are below 2^15, so signed saturation changes nothing
        const __m128i *from = (const __m128i *)(c + i);
        __m128i a = _mm_packs_epi32(_mm_loadu_si128(from), _mm_loadu_si128(from + 1));
        __m128i b = _mm_packs_epi32(_mm_loadu_si128(from + 2), _mm_loadu_si128(from + 3));
        _mm_storeu_si128((__m128i *)(to + i), _mm_packus_epi16(a, b));
    }
#endif
    for (; i < n; i++) to[i] = (uint8_t)c[i];
}

// Bytes of n codes of `bits` bits each, n a multiple of 8; `bytes` holds a code a byte.
INLINE void squeeze(const uint8_t *bytes, uint8_t *to, int64_t n, int bits) {
    if (bits == 8) {
        memcpy(to, bytes, (size_t)n);
    } else if (bits == 4) {
        int64_t i = 0;
#if defined(__SSE2__)
        const __m128i low = _mm_set1_epi16(0x00ff);
        for (; i + 32 <= n; i += 32) {
            __m128i a = _mm_loadu_si128((const __m128i *)(bytes + i));
            __m128i b = _mm_loadu_si128((const __m128i *)(bytes + i + 16));
            a = _mm_and_si128(_mm_or_si128(a, _mm_srli_epi16(a, 4)), low);
            b = _mm_and_si128(_mm_or_si128(b, _mm_srli_epi16(b, 4)), low);
            _mm_storeu_si128((__m128i *)(to + i / 2), _mm_packus_epi16(a, b));
        }
#endif
        for (; i < n; i += 2) to[i / 2] = (uint8_t)(bytes[i] | bytes[i + 1] << 4);
    } else {
        for (int64_t i = 0; i < n; i += 8) {
            uint64_t word = 0;
            for (int k = 0; k < 8; k++) word |= (uint64_t)bytes[i + k] << (bits * k);
            for (int k = 0; k < bits; k++) to[i / 8 * bits + k] = (uint8_t)(word >> (8 * k));
        }
    }
}

// A code of a float element: the magnitude r in units of the scale, an element itself.
//
// From the smallest normal number 2^e on, the bits of r above the lost ones are the code but for
// the exponents' bias. Below it, r + 2^e has the code in its mantissa.
typedef struct {
    float smallest;        // 2^e
    uint32_t shift, bias;  // lost mantissa bits; the code of 2^e in those bits
    uint32_t first;        // the code of 2^e
    uint32_t sign;         // bits between a float's sign and the code's
} float_codes;

template <int R>
INLINE uint32_t float_code(float v, grid g, float_codes k, float random) {
    const float q = to_grid<R>(v, g, random), r = as_float(as_bits(q) & MAGNITUDE);
    const int below = r < k.smallest;
    const float z = below ? r + k.smallest : r;
    const uint32_t code = (as_bits(z) >> k.shift) - k.bias + (below ? 0 : k.first);
    return code | (as_bits(q) & SIGN) >> k.sign;
}

// The code of a fixed-point element: two's complement of r / step in `mask`'s bits.
INLINE uint32_t fixed_code(float element, float steps, uint32_t mask) {
    return (uint32_t)(int32_t)(element * steps) & mask;
}

template <int R>
void pack_rounded(const qn_format *f, const qn_layout *at, const qn_packed *p, qn_range range) {
    alignas(64) float in[CHUNK];
    alignas(64) uint32_t codes[CHUNK];
    alignas(64) uint8_t bytes[CHUNK];
    float random[CHUNK];
    const int64_t block = at->block, chunk = CHUNK / block * block;
    const int64_t chunks = ceil_div(at->length, chunk), groups = at->length / block;
    const int fixed = f->max_exponent == 0 && f->min_exponent == 0 && f->high < 2.0f &&
                      p->bits == f->mantissa + 2;
    const grid g = {(int32_t)((uint32_t)(f->min_exponent + 127) << 23),
                    (uint32_t)(23 - f->mantissa) << 23, (uint32_t)f->mantissa << 23, f->high};
    const float_codes k = {power(f->min_exponent), (uint32_t)(23 - f->mantissa),
                           (uint32_t)(f->min_exponent + 127) << f->mantissa,
                           1u << f->mantissa, (uint32_t)(32 - p->bits)};
    const uint32_t mask = (1u << p->bits) - 1;
    const float steps = power(f->mantissa);
    for (int64_t item = range.first; item < range.last; item++) {
        const int64_t row = item / chunks, begin = item % chunks * chunk;
        const int64_t n = begin + chunk > at->length ? at->length - begin : chunk;
        const int64_t first = row * at->length + begin;
        const float *x = loaded(p->dtype, p->x, first, n, in);
        uint8_t *scales = p->scales + row * groups + begin / block;
        if (R == QN_STOCHASTIC) noise((uint64_t)first, n, f->seed, random);
        for (int64_t i = 0; i < n; i += block) {
            const shared s = share(f, block == 32 ? largest_of<32>(x + i, 32)
                                                  : largest_of<0>(x + i, block));
            scales[i / block] = (uint8_t)(s.lost ? 255 : s.scale - f->min_scale);
            const float *v = x + i, *random_here = random + i;
            uint32_t *c = codes + i;
            if (s.lost) {
                // Codes of a NaN block mean nothing, but should not depend on the kernel.
                EACH(j, block) c[j] = 0;
            } else if (s.fast && s.scale > -126 && s.scale < 127) {
                const float inverse = power(-s.scale);  // exact, like the division
                if (fixed) EACH(j, block)
                    c[j] = fixed_code(to_grid<R>(kept<R>(v[j] * inverse, v[j]), g, random_here[j]),
                                      steps, mask);
                else EACH(j, block)
                    c[j] = float_code<R>(kept<R>(v[j] * inverse, v[j]), g, k, random_here[j]);
            } else {
                const float scale = power(s.scale);
                for (int64_t j = 0; j < block; j++) {
                    const float e = element_of<R>(f, divided<R>(v[j], scale), random_here[j]);
                    c[j] = fixed ? fixed_code(e, steps, mask)
                                 : float_code<QN_NEAREST_EVEN>(e, g, k, 0.0f);
                }
            }
        }
        narrow(codes, bytes, n);
        squeeze(bytes, p->codes + first * p->bits / 8, n, p->bits);
    }
}

void pack(const qn_format *f, const qn_layout *at, const qn_packed *p, qn_range range) {
    switch (f->rounding) {
    case QN_NEAREST_EVEN: return pack_rounded<QN_NEAREST_EVEN>(f, at, p, range);
    case QN_NEAREST_AWAY: return pack_rounded<QN_NEAREST_AWAY>(f, at, p, range);
    case QN_TOWARD_ZERO: return pack_rounded<QN_TOWARD_ZERO>(f, at, p, range);
    case QN_FLOOR: return pack_rounded<QN_FLOOR>(f, at, p, range);
    case QN_CEIL: return pack_rounded<QN_CEIL>(f, at, p, range);
    default: return pack_rounded<QN_STOCHASTIC>(f, at, p, range);
    }
}

// n codes, a byte each, from `bits` bits each; n is a multiple of 8.
INLINE void stretch(const uint8_t *from, uint8_t *bytes, int64_t n, int bits) {
    if (bits == 4) {
        int64_t i = 0;
#if defined(__SSE2__)
        const __m128i low = _mm_set1_epi8(0x0f);
        for (; i + 32 <= n; i += 32) {
            __m128i both = _mm_loadu_si128((const __m128i *)(from + i / 2));
            __m128i even = _mm_and_si128(both, low);
            __m128i odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
            _mm_storeu_si128((__m128i *)(bytes + i), _mm_unpacklo_epi8(even, odd));
            _mm_storeu_si128((__m128i *)(bytes + i + 16), _mm_unpackhi_epi8(even, odd));
        }
#endif
        for (; i < n; i += 2) {
            bytes[i] = from[i / 2] & 15;
            bytes[i + 1] = from[i / 2] >> 4;
        }
        return;
    }
    const uint64_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        for (int k = 0; k < bits; k++) word |= (uint64_t)from[i / 8 * bits + k] << (8 * k);
        for (int k = 0; k < 8; k++) bytes[i + k] = (uint8_t)(word >> (bits * k) & mask);
    }
}

void unpack(const float *table, int scale_bias, const qn_layout *at, const qn_packed *p, void *out,
            qn_range range) {
    alignas(64) float values[CHUNK];
    alignas(64) uint8_t bytes[CHUNK];
    const int64_t block = at->block, chunk = CHUNK / block * block;
    const int64_t chunks = ceil_div(at->length, chunk), groups = at->length / block;
    for (int64_t item = range.first; item < range.last; item++) {
        const int64_t row = item / chunks, begin = item % chunks * chunk;
        const int64_t n = begin + chunk > at->length ? at->length - begin : chunk;
        const int64_t first = row * at->length + begin;
        const uint8_t *code = p->codes + first * p->bits / 8;
        const uint8_t *scales = p->scales + row * groups + begin / block;
        float *y = target(p->dtype, 0, out, first, values);
        if (p->bits != 8) {
            stretch(code, bytes, n, p->bits);
            code = bytes;
        }
        for (int64_t i = 0; i < n; i += block) {
            const int field = scales[i / block];
            const float scale = field == 255 ? as_float(NOT_A_NUMBER) : power(field + scale_bias);
            EACH(j, block) y[i + j] = table[code[i + j]] * scale;
        }
        stored(p->dtype, 0, out, first, n, y);
    }
}
