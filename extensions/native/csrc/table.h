// The functions that exist once for each instruction set.
#pragma once
#include "library.h"

typedef struct {
    int64_t (*items)(const qn_format *, const qn_layout *);
    void (*run)(const qn_format *, const qn_layout *, const qn_data *, qn_range);
    void (*pack)(const qn_format *, const qn_layout *, const qn_packed *, qn_range);
    void (*unpack)(const float *table, int scale_bias, const qn_layout *, const qn_packed *,
                   void *out, qn_range);
} qn_table;
