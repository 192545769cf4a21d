// A few waiting threads that share one job at a time.
#pragma once
#include <stdint.h>

typedef void (*pool_part)(const void *job, int64_t first, int64_t last);

// Runs part(job, ...) over 0..items-1 on up to `threads` threads, the caller's among them.
// Returns the number of threads that were used.
int pool_run(pool_part part, const void *job, int64_t items, int threads);
