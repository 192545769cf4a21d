// Fake quantization, compiled once for each instruction set (QN_TABLE names the result).
//
// Results are the same whatever the chunks, threads and instruction set: each element or block is
// computed on its own, and rules.h says why each computation equals the specification.
#include "memory.h"
#include "table.h"

#define EACH(i, n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); i++)

namespace {

// Elements whose scales are given. `scale` and `extra` advance by `step` (0 or 1) an element.
template <int R>
void pointwise(const qn_format *f, const float *x, float *y, int64_t n, const float *scale,
               const float *extra, int64_t step, const float *random) {
    const float low = f->low, high = f->high;
    if (f->kind == QN_AFFINE) {
        if (step == 0) {
            const float s = scale[0], z = extra ? extra[0] : 0.0f;
            EACH(i, n) y[i] = affine<R>(x[i], s, low - z, high - z, random[i]);
        } else if (extra) {
            EACH(i, n) y[i] = affine<R>(x[i], scale[i], low - extra[i], high - extra[i], random[i]);
        } else {
            EACH(i, n) y[i] = affine<R>(x[i], scale[i], low, high, random[i]);
        }
        return;
    }
    if (f->kind == QN_SCALED) {
        const grid g = {(int32_t)((uint32_t)(f->min_exponent + 127) << 23),
                        (uint32_t)(23 - f->mantissa) << 23, (uint32_t)f->mantissa << 23, high};
        const float s = scale[0];
        if (step == 0) EACH(i, n) y[i] = scaled<R>(x[i], s, low, g, random[i]);
        else EACH(i, n) y[i] = scaled<R>(x[i], scale[i], low, g, random[i]);
        return;
    }
    if (R != QN_NEAREST_EVEN) return;  // the rest has one rounding
    if (f->kind == QN_LOG) {
        const int32_t lowest = f->min_exponent + 127, highest = f->max_exponent + 127;
        EACH(i, n) y[i] = to_power(x[i], lowest, highest);
    } else if (f->kind == QN_BINARY) {
        const float s = scale[0];
        if (step == 0) EACH(i, n) y[i] = binary(x[i], s, low);
        else EACH(i, n) y[i] = binary(x[i], scale[i], low);
    } else {
        const float s = scale[0], threshold = extra[0];
        if (step == 0) EACH(i, n) y[i] = ternary(x[i], s, threshold);
        else EACH(i, n) y[i] = ternary(x[i], scale[i], extra[i]);
    }
}

template <int N>
INLINE uint32_t largest_of(const float *x, int64_t n) {
    int32_t m = 0;
    if (N) n = N;
    EACH(i, n) {
        int32_t a = (int32_t)(as_bits(x[i]) & MAGNITUDE);
        m = a > m ? a : m;
    }
    return (uint32_t)m;
}

INLINE void fill(float *y, int64_t n, uint32_t bits) {
    EACH(i, n) y[i] = as_float(bits);
}

// One block of N elements, or of n where N is 0.
template <int R, int N>
INLINE void mx_block(const qn_format *f, const float *x, float *y, int64_t n, const float *random) {
    if (N) n = N;
    const shared s = share(f, largest_of<N>(x, n));
    if (__builtin_expect(s.lost, 0)) fill(y, n, NOT_A_NUMBER);
    else if (__builtin_expect(s.fast, 1)) EACH(i, n) y[i] = to_grid<R>(x[i], s.g, random[i]);
    else for (int64_t i = 0; i < n; i++) y[i] = exact<R>(f, x[i], s.scale, random[i]);
}

template <int R, int N>
INLINE void bfp_block(const qn_format *f, const float *x, float *y, int64_t n, const float *) {
    if (N) n = N;
    const bfp_shared s = bfp_share(f, largest_of<N>(x, n));
    if (__builtin_expect(s.lost, 0)) fill(y, n, NOT_A_NUMBER);
    else if (__builtin_expect(s.fast, 1)) EACH(i, n) y[i] = bfp(x[i], s);
    else for (int64_t i = 0; i < n; i++) y[i] = bfp_exact(f, x[i], s);
}

// Exponent fields of the smallest and the largest power of a block.
INLINE void powers(const qn_format *f, uint32_t largest, int32_t *lowest, int32_t *highest) {
    int top = (int)((largest + f->bump) >> 23) - 127;
    top = top < f->min_scale ? f->min_scale : top;
    top = top > f->max_scale ? f->max_scale : top;
    int bottom = top - f->mantissa;
    *lowest = (bottom < -126 ? -126 : bottom) + 127;
    *highest = top + 127;
}

template <int R, int N>
INLINE void log_block(const qn_format *f, const float *x, float *y, int64_t n, const float *) {
    if (N) n = N;
    const uint32_t largest = largest_of<N>(x, n);
    int32_t lowest, highest;
    powers(f, largest, &lowest, &highest);
    if (__builtin_expect(largest >= EXPONENT, 0)) fill(y, n, NOT_A_NUMBER);
    else EACH(i, n) y[i] = to_power(x[i], lowest, highest);
}

// NVFP4: the scale is the e4m3 nearest to M / 6 / outer, 2^-9 at least, times outer.
INLINE float nvfp_scale(uint32_t largest, float outer) {
    if (largest >= EXPONENT) return as_float(NOT_A_NUMBER);
    // A double has 49 bits more than e4m3: its own roundings cannot reach a tie but from one.
    double wanted = (double)as_float(largest) / 6.0 / (double)outer;
    wanted = wanted > 448.0 ? 448.0 : wanted;
    uint64_t bits;
    memcpy(&bits, &wanted, 8);
    int exponent = (int)(bits >> 52) - 1023;
    exponent = exponent < -6 ? -6 : exponent;
    // As in to_grid, for the three mantissa bits of a double.
    bits = ((uint64_t)(exponent - 3 + 52 + 1023) << 52) | (1ull << 51);
    double c;
    memcpy(&c, &bits, 8);
    double inner = (wanted + c) - c;
    return (float)(inner < 0x1p-9 ? 0x1p-9 : inner) * outer;
}

template <int R, int N>
INLINE void nvfp_block(const qn_format *f, const float *x, float *y, int64_t n, const float *random,
                       float outer) {
    if (N) n = N;
    const float s = nvfp_scale(largest_of<N>(x, n), outer), high = f->high;
    const grid g = {(int32_t)((uint32_t)(f->min_exponent + 127) << 23),
                    (uint32_t)(23 - f->mantissa) << 23, (uint32_t)f->mantissa << 23, high};
    EACH(i, n) y[i] = scaled<R>(x[i], s, -high, g, random[i]);
}

template <int R, int N>
void blocks_of(const qn_format *f, const float *x, float *y, int64_t n, int64_t block,
               const float *random, float outer) {
    if (N) block = N;
    const int64_t whole = n / block * block;
#define RUN(one, ...)                                                                        \
    for (int64_t i = 0; i < whole; i += block)                                               \
        one<R, N>(f, x + i, y + i, block, random + i, ##__VA_ARGS__);                        \
    if (whole < n) one<R, 0>(f, x + whole, y + whole, n - whole, random + whole, ##__VA_ARGS__)
    if (f->kind == QN_MX) { RUN(mx_block); }
    else if (f->kind == QN_NVFP) { RUN(nvfp_block, outer); }
    else if (R != QN_NEAREST_EVEN) return;  // the rest has one rounding
    else if (f->kind == QN_BFP) { RUN(bfp_block); }
    else { RUN(log_block); }
#undef RUN
}

template <int R>
void blocks(const qn_format *f, const float *x, float *y, int64_t n, int64_t block,
            const float *random, float outer) {
    // Common sizes are compiled on their own, for the common rounding.
    switch (R == QN_NEAREST_EVEN ? block : 0) {
    case 16: return blocks_of<R, 16>(f, x, y, n, block, random, outer);
    case 32: return blocks_of<R, 32>(f, x, y, n, block, random, outer);
    case 64: return blocks_of<R, 64>(f, x, y, n, block, random, outer);
    default: return blocks_of<R, 0>(f, x, y, n, block, random, outer);
    }
}

// Blocks across rows: a strip of columns at a time, each with a block of its own.
static const int64_t STRIP = 128;

template <int R>
void strip(const qn_format *f, const qn_layout *at, const qn_data *d, int64_t first, int64_t rows,
           int64_t columns) {
    float in[STRIP], out[STRIP], random[STRIP];
    int32_t m[STRIP], lowest[STRIP], highest[STRIP];
    float high[STRIP], scale[STRIP];
    bfp_shared bfps[STRIP];
    shared shares[STRIP];
    memset(m, 0, sizeof m);
    for (int64_t row = 0; row < rows; row++) {
        const float *x = loaded(d->dtype, d->x, first + row * at->inner, columns, in);
        EACH(j, columns) {
            int32_t a = (int32_t)(as_bits(x[j]) & MAGNITUDE);
            m[j] = a > m[j] ? a : m[j];
        }
    }
    int fast = 1;
    for (int64_t j = 0; j < columns; j++) {
        if (f->kind == QN_MX) {
            shares[j] = share(f, (uint32_t)m[j]);
            fast &= shares[j].fast && !shares[j].lost;
            lowest[j] = shares[j].g.lowest;
            high[j] = shares[j].g.high;
        } else if (f->kind == QN_BFP) {
            bfps[j] = bfp_share(f, (uint32_t)m[j]);
            fast &= bfps[j].fast && !bfps[j].lost;
        } else if (f->kind == QN_BLOCK_LOG) {
            powers(f, (uint32_t)m[j], lowest + j, highest + j);
            fast &= (uint32_t)m[j] < EXPONENT;
        } else {
            scale[j] = nvfp_scale((uint32_t)m[j], d->extra[0]);
        }
    }
    const grid g = {(int32_t)((uint32_t)(f->min_exponent + 127) << 23),
                    (uint32_t)(23 - f->mantissa) << 23, (uint32_t)f->mantissa << 23, f->high};
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at_row = first + row * at->inner;
        const float *x = loaded(d->dtype, d->x, at_row, columns, in);
        float *y = target(d->dtype, 0, d->out, at_row, out);
        if (R == QN_STOCHASTIC) noise((uint64_t)at_row, columns, f->seed, random);
        if (f->kind == QN_MX && fast) {
            EACH(j, columns) {
                const grid own = {lowest[j], g.shift, g.down, high[j]};
                y[j] = to_grid<R>(x[j], own, random[j]);
            }
        } else if (f->kind == QN_MX) {
            for (int64_t j = 0; j < columns; j++)
                y[j] = shares[j].lost   ? as_float(NOT_A_NUMBER)
                       : shares[j].fast ? to_grid<R>(x[j], shares[j].g, random[j])
                                        : exact<R>(f, x[j], shares[j].scale, random[j]);
        } else if (f->kind == QN_BFP) {
            for (int64_t j = 0; j < columns; j++)
                y[j] = bfps[j].lost ? as_float(NOT_A_NUMBER)
                       : bfps[j].fast ? bfp(x[j], bfps[j]) : bfp_exact(f, x[j], bfps[j]);
        } else if (f->kind == QN_BLOCK_LOG) {
            EACH(j, columns) {
                const float found = to_power(x[j], lowest[j], highest[j]);
                y[j] = (uint32_t)m[j] >= EXPONENT ? as_float(NOT_A_NUMBER) : found;
            }
        } else {
            EACH(j, columns) y[j] = scaled<R>(x[j], scale[j], -f->high, g, random[j]);
        }
        stored(d->dtype, 0, d->out, at_row, columns, y);
    }
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int finds_scales(const qn_format *f) { return f->kind >= QN_MX; }

// A contiguous row is cut into chunks that hold whole blocks.
INLINE int64_t chunk_of(const qn_layout *at) {
    return at->block >= CHUNK ? CHUNK : CHUNK / at->block * at->block;
}

template <int R>
void rows(const qn_format *f, const qn_layout *at, const qn_data *d, qn_range range) {
    alignas(64) float in[CHUNK];
    alignas(64) float out[CHUNK];
    alignas(64) float random[CHUNK];
    const int64_t chunk = chunk_of(at), chunks = ceil_div(at->length, chunk);
    const float outer = f->kind == QN_NVFP ? d->extra[0] : 1.0f;
    for (int64_t item = range.first; item < range.last; item++) {
        const int64_t row = item / chunks, begin = item % chunks * chunk;
        const int64_t n = begin + chunk > at->length ? at->length - begin : chunk;
        const int64_t first = row * at->length + begin;
        const float *x = loaded(d->dtype, d->x, first, n, in);
        float *y = target(d->dtype, d->stream, d->out, first, out);
        if (R == QN_STOCHASTIC) noise((uint64_t)first, n, f->seed, random);
        if (finds_scales(f)) {
            blocks<R>(f, x, y, n, at->block, random, outer);
        } else {
            const int64_t base = row / at->scale_rows * at->scale_outer;
            for (int64_t i = 0; i < n;) {
                const int64_t place = begin + i, group = place / at->block;
                const int64_t varying = at->block == 1 && at->scale_block == 1;
                int64_t end = varying ? n : (group + 1) * at->block - begin;
                end = end > n ? n : end;
                const int64_t s = base + group * at->scale_block;
                pointwise<R>(f, x + i, y + i, end - i, d->scale + s, d->extra ? d->extra + s : 0,
                             varying, random + i);
                i = end;
            }
        }
        stored(d->dtype, d->stream, d->out, first, n, y);
    }
}

// Rows of the inner axis, each with a scale of its own or one for each column.
template <int R>
void columns(const qn_format *f, const qn_layout *at, const qn_data *d, qn_range range) {
    alignas(64) float in[CHUNK];
    alignas(64) float out[CHUNK];
    alignas(64) float random[CHUNK];
    const int64_t chunks = ceil_div(at->inner, CHUNK);
    for (int64_t item = range.first; item < range.last; item++) {
        const int64_t row = item / chunks, begin = item % chunks * CHUNK;
        const int64_t n = begin + CHUNK > at->inner ? at->inner - begin : CHUNK;
        const int64_t first = row * at->inner + begin;
        const int64_t s = row / at->length / at->scale_rows * at->scale_outer +
                          row % at->length / at->block * at->scale_block + begin * at->scale_inner;
        const float *x = loaded(d->dtype, d->x, first, n, in);
        float *y = target(d->dtype, d->stream, d->out, first, out);
        if (R == QN_STOCHASTIC) noise((uint64_t)first, n, f->seed, random);
        pointwise<R>(f, x, y, n, d->scale + s, d->extra ? d->extra + s : 0, at->scale_inner, random);
        stored(d->dtype, d->stream, d->out, first, n, y);
    }
}

template <int R>
void strips(const qn_format *f, const qn_layout *at, const qn_data *d, qn_range range) {
    const int64_t groups = ceil_div(at->length, at->block);
    const int64_t across = ceil_div(at->inner, STRIP);
    for (int64_t item = range.first; item < range.last; item++) {
        const int64_t outer = item / across / groups, group = item / across % groups;
        const int64_t column = item % across * STRIP, row = group * at->block;
        const int64_t rows_here = row + at->block > at->length ? at->length - row : at->block;
        const int64_t columns_here = column + STRIP > at->inner ? at->inner - column : STRIP;
        strip<R>(f, at, d, (outer * at->length + row) * at->inner + column, rows_here, columns_here);
    }
}

int64_t items(const qn_format *f, const qn_layout *at) {
    if (at->inner == 1) return at->outer * ceil_div(at->length, chunk_of(at));
    if (!finds_scales(f)) return at->outer * at->length * ceil_div(at->inner, CHUNK);
    return at->outer * ceil_div(at->length, at->block) * ceil_div(at->inner, STRIP);
}

template <int R>
void run_rounded(const qn_format *f, const qn_layout *at, const qn_data *d, qn_range range) {
    if (at->inner == 1) rows<R>(f, at, d, range);
    else if (finds_scales(f)) strips<R>(f, at, d, range);
    else columns<R>(f, at, d, range);
}

void run(const qn_format *f, const qn_layout *at, const qn_data *d, qn_range range) {
    switch (f->rounding) {
    case QN_NEAREST_EVEN: run_rounded<QN_NEAREST_EVEN>(f, at, d, range); break;
    case QN_NEAREST_AWAY: run_rounded<QN_NEAREST_AWAY>(f, at, d, range); break;
    case QN_TOWARD_ZERO: run_rounded<QN_TOWARD_ZERO>(f, at, d, range); break;
    case QN_FLOOR: run_rounded<QN_FLOOR>(f, at, d, range); break;
    case QN_CEIL: run_rounded<QN_CEIL>(f, at, d, range); break;
    default: run_rounded<QN_STOCHASTIC>(f, at, d, range);
    }
    fence(d->stream);
}

#include "packing.inl"

}  // namespace

extern "C" const qn_table QN_TABLE = {items, run, pack, unpack};
