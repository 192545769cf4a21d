// The C interface of quark-native's compiled kernels.
//
// Tensors are contiguous and seen as [outer, length, inner]; blocks run along the middle axis and
// the last of an axis may be short. Nothing here allocates, and nothing depends on libtorch.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QN_ABI 1
#define QN_API __attribute__((visibility("default")))

enum { QN_FLOAT32, QN_BFLOAT16, QN_FLOAT16 };

enum { QN_AFFINE, QN_SCALED, QN_LOG, QN_BINARY, QN_TERNARY,  // given scales
       QN_MX, QN_BFP, QN_BLOCK_LOG, QN_NVFP };               // scales found in each block

enum { QN_NEAREST_EVEN, QN_NEAREST_AWAY, QN_TOWARD_ZERO, QN_FLOOR, QN_CEIL, QN_STOCHASTIC };

// What a format is; the fields are those of quark_native.kernels.call.Call.
typedef struct {
    int32_t kind, rounding;
    int32_t mantissa, min_exponent, max_exponent, min_scale, max_scale;
    uint32_t bump;
    float low, high;
    uint64_t seed;
} qn_format;

// Where the elements are, and which scale is theirs: that of element (o, l, i) lies at
// (o / scale_rows) * scale_outer + (l / block) * scale_block + i * scale_inner.
typedef struct {
    int64_t outer, length, inner, block;
    int64_t scale_rows, scale_outer, scale_block, scale_inner;
} qn_layout;

typedef struct {
    const void *x;
    void *out;
    const float *scale, *extra;  // extra: zero points, thresholds, or the outer scale
    int32_t dtype, stream;       // stream: write around the caches
} qn_data;

// Packed codes: `bits` an element, the first in the lowest bits; the scales' exponents as bytes.
typedef struct {
    const void *x;
    uint8_t *codes, *scales;
    int32_t dtype, bits;
} qn_packed;

// A range of work items; the unit is a kernel's own (see qn_items).
typedef struct {
    int64_t first, last;
} qn_range;

QN_API int qn_abi(void);
QN_API const char *qn_isa(void);                 // the instruction set in use
QN_API int qn_use_isa(const char *name);         // 0, or -1 if this machine has it not
// Separate arguments, since filling a structure from Python costs more than a small tensor's work.
QN_API int qn_fake_quantize(const qn_format *, const qn_layout *, const void *x, void *out,
                            const float *scale, const float *extra, int dtype, int stream,
                            int threads);
QN_API int qn_pack(const qn_format *, const qn_layout *, const qn_packed *, int threads);
// Values of codes: table[code] * 2^(scale code + scale_bias), NaN for the scale code 255.
QN_API int qn_unpack(const float *table, int scale_bias, const qn_layout *, const qn_packed *, void *out,
              int threads);
QN_API void qn_advise_huge(void *memory, int64_t bytes);

#ifdef __cplusplus
}
#endif
