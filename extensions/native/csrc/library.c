// The library's entry: which instruction set, and the division of work among threads.
#include "library.h"
#include "pool.h"
#include "table.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern const qn_table QN_BASE_TABLE;
#if defined(__x86_64__)
extern const qn_table qn_avx2_table, qn_avx512_table;
#endif

typedef struct {
    const char *name;
    const qn_table *table;
} variant;

static int runs_here(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#else
    (void)name;
#endif
    return 1;
}

static const variant VARIANTS[] = {  // best first
#if defined(__x86_64__)
    {"avx512", &qn_avx512_table},
    {"avx2", &qn_avx2_table},
    {"sse2", &QN_BASE_TABLE},
#else
    {"portable", &QN_BASE_TABLE},
#endif
};

static const variant *chosen;

static const variant *in_use(void) {
    if (!chosen) {
        const variant *best = VARIANTS;
        while (!runs_here(best->name)) best++;
        chosen = best;
    }
    return chosen;
}

int qn_abi(void) { return QN_ABI; }
const char *qn_isa(void) { return in_use()->name; }

int qn_use_isa(const char *name) {
    for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++)
        if (!strcmp(VARIANTS[i].name, name) && runs_here(name)) {
            chosen = VARIANTS + i;
            return 0;
        }
    return -1;
}

typedef struct {
    const qn_format *format;
    const qn_layout *layout;
    const qn_data *data;
    const qn_packed *packed;
    const float *table;
    void *out;
    int scale_bias;
} work;

static void quantize_part(const void *job, int64_t first, int64_t last) {
    const work *w = job;
    in_use()->table->run(w->format, w->layout, w->data, (qn_range){first, last});
}

static void pack_part(const void *job, int64_t first, int64_t last) {
    const work *w = job;
    in_use()->table->pack(w->format, w->layout, w->packed, (qn_range){first, last});
}

static void unpack_part(const void *job, int64_t first, int64_t last) {
    const work *w = job;
    in_use()->table->unpack(w->table, w->scale_bias, w->layout, w->packed, w->out, (qn_range){first, last});
}

int qn_fake_quantize(const qn_format *f, const qn_layout *at, const void *x, void *out,
                     const float *scale, const float *extra, int dtype, int stream, int threads) {
    const qn_data d = {x, out, scale, extra, dtype, stream};
    work w = {.format = f, .layout = at, .data = &d};
    return pool_run(quantize_part, &w, in_use()->table->items(f, at), threads);
}

static int64_t chunks(const qn_layout *at) {
    const int64_t chunk = 2048 / at->block * at->block;
    return at->outer * ((at->length + chunk - 1) / chunk);
}

int qn_pack(const qn_format *f, const qn_layout *at, const qn_packed *p, int threads) {
    work w = {.format = f, .layout = at, .packed = p};
    return pool_run(pack_part, &w, chunks(at), threads);
}

int qn_unpack(const float *table, int scale_bias, const qn_layout *at, const qn_packed *p, void *out,
              int threads) {
    work w = {.table = table, .scale_bias = scale_bias, .layout = at, .packed = p, .out = out};
    return pool_run(unpack_part, &w, chunks(at), threads);
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Memory that is free in pieces of 2 MB and more: /proc/buddyinfo counts free pieces of 2^order
// pages, order by order, on a line for each zone.
static int64_t free_in_huge_pieces(void) {
    FILE *file = fopen("/proc/buddyinfo", "r");
    if (!file) return 0;
    int64_t bytes = 0;
    char line[512];
    while (fgets(line, sizeof line, file)) {
        char *at = strstr(line, "zone");
        if (!at) continue;
        at += strlen("zone");
        at += strspn(at, " ");   // the zone's name follows
        at += strcspn(at, " ");
        for (int order = 0;; order++) {
            char *end;
            const long long pieces = strtoll(at, &end, 10);
            if (end == at) break;
            if (order >= 9) bytes += pieces << (order + 12);
            at = end;
        }
    }
    fclose(file);
    return bytes;
}
#endif

// A fresh tensor's first write costs a page fault for every 4 kB, which is most of a copy's time;
// with huge pages it costs one for every 2 MB. Where the system has none ready it would stop to
// make some, which takes longer than all the faults: then memory is left as it is.
void qn_advise_huge(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(page - 1);
    if (end <= begin || free_in_huge_pieces() < 2 * bytes) return;
    (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}
