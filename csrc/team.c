/* A pass by a team of threads: how it is woken and waited for, and when one thread does better without it. */
#ifdef __linux__
#define _GNU_SOURCE    /* sched_getcpu, sched_setaffinity */
#else
#define _POSIX_C_SOURCE 200809L
#endif
#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

/* A team does harm when its cores are busy elsewhere, above all with the threads of a BLAS library that spin for
 * milliseconds after each call, or when it sleeps and has to be woken for little. So what teams save is added up, and what
 * they lose taken off; when the credit is used up, one thread works alone for a multiple of what was lost, which doubles
 * until teams have earned their credit again. Of a pass that was interrupted neither is known well, so that one counts for
 * little. No result depends on any of it. Times are in nanoseconds. */
enum { CREDIT = 1000000, EARNED_AT_MOST = CREDIT / 8, LOST_AT_MOST = 4 * CREDIT, FIRST_PATIENCE = 2, LAST_PATIENCE = 64 };

static atomic_llong credit = CREDIT;
static atomic_int patience = FIRST_PATIENCE;
static atomic_llong alone_for = 0;

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void learn(long long saved)
{
    const long long earned = saved > EARNED_AT_MOST ? EARNED_AT_MOST : saved < -LOST_AT_MOST ? -LOST_AT_MOST : saved;
    const long long left = atomic_fetch_add(&credit, earned) + earned;
    if (left >= CREDIT) {
        atomic_store(&credit, CREDIT);
        atomic_store(&patience, FIRST_PATIENCE);
    } else if (left < 0) {
        const int times = atomic_load(&patience);
        atomic_store(&credit, CREDIT / 2);
        atomic_store(&alone_for, times * (CREDIT / 2 - left));
        atomic_store(&patience, times < LAST_PATIENCE ? 2 * times : LAST_PATIENCE);
    }
}

/* A thread that slept may be woken on the CPU of the one that called it, though others are idle, and both stay there: for
 * milliseconds the caller spins for one that cannot run, or cannot run itself. So the caller gives its CPU away while it
 * waits, and who finds itself on it moves to another. */
static void leave_cpu(int cpu)
{
#ifdef __linux__
    cpu_set_t allowed, others;
    if (sched_getcpu() != cpu || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
#else
    (void)cpu;
#endif
}

static int current_cpu(void)
{
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_for(atomic_int *n_done, int n)
{
    enum { SPINS = 100 };    /* some microseconds */
    for (int spins = 0; atomic_load(n_done) < n;)
        if (spins < SPINS) {
            pause_cpu();
            spins++;
        } else {
            sched_yield();
        }
}

static void run_together(int n_threads, fs_part *part, const void *context)
{
    const long long start = now();
    const int cpu = current_cpu();
    long long saved = 0;
    atomic_int n_done = 0;
#pragma omp parallel num_threads(n_threads)
    {
        /* The team may be smaller than asked for, e.g. inside another parallel region. */
        const int thread = omp_get_thread_num(), n = omp_get_num_threads();
        if (thread > 0) {
            leave_cpu(cpu);
            part(context, (size_t)thread, (size_t)n);
            atomic_fetch_add(&n_done, 1);
        } else {
            const long long own_start = now();
            part(context, 0, (size_t)n);
            saved = n * (now() - own_start);
            wait_for(&n_done, n - 1);
        }
    }
    learn(saved - (now() - start));
}

/* A team that had nothing to do for AWAKE sleeps. To wake it takes WAKING, and pays once passes since then have lost as much
 * for want of it, or when this one alone would: a short step every now and then does better alone. */
enum { AWAKE = 4000000, WAKING = 100000, ELEMENTS_PER_NANOSECOND_SAVED = 8 };

static atomic_llong last_end = -AWAKE, last_team_end = -AWAKE, missed = 0;

static bool pays_to_wake(long long start, size_t n_elements)
{
    if (start - atomic_load(&last_end) > AWAKE)
        atomic_store(&missed, 0);
    return start - atomic_load(&last_team_end) <= AWAKE ||
           atomic_load(&missed) + (long long)(n_elements / ELEMENTS_PER_NANOSECOND_SAVED) >= WAKING;
}

void fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context)
{
    if (n_threads == 1) {
        part(context, 0, 1);
        return;
    }
    const long long start = now();
    const bool must_rest = atomic_load(&alone_for) > 0;
    if (fs_threads_insisted() || (!must_rest && pays_to_wake(start, n_elements))) {
        run_together(n_threads, part, context);
        atomic_store(&last_end, now());
        atomic_store(&last_team_end, atomic_load(&last_end));
        return;
    }
    part(context, 0, 1);
    const long long end = now();
    atomic_fetch_sub(&alone_for, must_rest ? end - start : 0);
    atomic_fetch_add(&missed, (end - start) / n_threads * (n_threads - 1));
    atomic_store(&last_end, end);
}

#else

void fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context)
{
    (void)n_threads, (void)n_elements;
    part(context, 0, 1);
}

#endif
