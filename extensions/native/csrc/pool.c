// Threads are started when first needed and wait on a condition; after a fork the child starts
// its own. A second caller at the same time computes alone instead of waiting.
#include "pool.h"

enum { LIMIT = 256 };

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;   // held by the caller of a job
static pthread_mutex_t state = PTHREAD_MUTEX_INITIALIZER;  // guards what follows
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static int started, wanted, running;
static uint64_t round_number;
static pool_part part_now;
static const void *job_now;
static int64_t items_now;

static void share_of(int who, int among, int64_t items, int64_t *first, int64_t *last) {
    *first = items * who / among;
    *last = items * (who + 1) / among;
}

static void *wait_for_work(void *argument) {
    const int me = (int)(intptr_t)argument;
    uint64_t seen = 0;
    pthread_mutex_lock(&state);
    for (;;) {
        while (round_number == seen) pthread_cond_wait(&begun, &state);
        seen = round_number;
        if (me >= wanted) continue;
        const pool_part part = part_now;
        const void *job = job_now;
        int64_t first, last;
        share_of(me, wanted, items_now, &first, &last);
        pthread_mutex_unlock(&state);
        part(job, first, last);
        pthread_mutex_lock(&state);
        if (--running == 0) pthread_cond_signal(&ended);
    }
    return 0;
}

static void forget_threads(void) {
    pthread_mutex_init(&busy, 0);
    pthread_mutex_init(&state, 0);
    pthread_cond_init(&begun, 0);
    pthread_cond_init(&ended, 0);
    started = 0;
    round_number = 0;
}

// With `state` held: at least `count` workers, numbered from 1, or as many as the system gives.
static int start(int count) {
    static int prepared;
    if (!prepared) {
        prepared = 1;
        pthread_atfork(0, 0, forget_threads);
    }
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (started < count) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, wait_for_work, (void *)(intptr_t)(started + 1))) break;
        started++;
    }
    pthread_attr_destroy(&detached);
    return started < count ? started : count;
}

int pool_run(pool_part part, const void *job, int64_t items, int threads) {
    threads = threads > LIMIT ? LIMIT : threads;
    if (threads > items) threads = (int)items;
    if (threads <= 1 || pthread_mutex_trylock(&busy)) {
        part(job, 0, items);
        return 1;
    }
    pthread_mutex_lock(&state);
    const int among = start(threads - 1) + 1;
    part_now = part;
    job_now = job;
    items_now = items;
    wanted = among;
    running = among - 1;
    round_number++;
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&state);
    int64_t first, last;
    share_of(0, among, items, &first, &last);
    part(job, first, last);
    pthread_mutex_lock(&state);
    while (running) pthread_cond_wait(&ended, &state);
    pthread_mutex_unlock(&state);
    pthread_mutex_unlock(&busy);
    return among;
}

#else

int pool_run(pool_part part, const void *job, int64_t items, int threads) {
    (void)threads;
    part(job, 0, items);
    return 1;
}

#endif
