/* How many threads a pass uses: the only place that decides.
 *
 * The team size is always passed to the parallel region, never set process-wide, so that other OpenMP users in the process
 * are left alone. */
#define _POSIX_C_SOURCE 200809L
#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* One thread for every so many elements: below twice this, waking a team costs more than it saves. */
enum { ELEMENTS_PER_THREAD = 12 * FS_BLOCK };

static atomic_int chosen = 0;     /* by the user; 0 for the default */
static atomic_int limit = 0;      /* on the default; 0 for none */
static atomic_bool insisted = false;
static atomic_bool forked = false;

/* libgomp's team does not survive a fork and the child would wait for it for ever: the child keeps to one thread. */
static void after_fork_in_child(void)
{
    atomic_store(&forked, true);
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

bool fs_openmp(void)
{
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

void fs_threads_set(int n_threads)
{
    atomic_store(&chosen, n_threads);
}

void fs_threads_limit(int n_threads)
{
    atomic_store(&limit, n_threads);
}

void fs_threads_insist(bool insist)
{
    atomic_store(&insisted, insist);
}

int fs_threads_get(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (!fs_openmp() || atomic_load(&forked))
        return 1;
    int n_threads = atomic_load(&chosen);
#ifdef _OPENMP
    if (n_threads == 0) {
        /* OMP_NUM_THREADS, the affinity mask and threadpoolctl's limits are all in this number. */
        n_threads = omp_get_max_threads();
        const int cap = atomic_load(&limit);
        if (cap > 0 && cap < n_threads)
            n_threads = cap;
    }
#endif
    return n_threads;
}

/* A team does harm when its cores are busy elsewhere, above all with the threads of a BLAS library that spin for
 * milliseconds after each call: the end of a parallel region waits for all. Then work goes on with one thread for a
 * multiple of the time lost, which doubles as long as trying again does not help. No result depends on it. */
enum { FIRST_PATIENCE = 4, LAST_PATIENCE = 64 };

static atomic_llong alone_until = 0;      /* nanoseconds of fs_clock */
static atomic_int patience = FIRST_PATIENCE;

long long fs_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void fs_threads_learn(int n_threads, long long start, long long own_share)
{
    const long long end = fs_clock(), lost = end - start - n_threads * own_share;
    if (4 * lost < end - start) {
        atomic_store(&patience, FIRST_PATIENCE);
        return;
    }
    const int times = atomic_load(&patience);
    atomic_store(&alone_until, end + times * lost);
    atomic_store(&patience, times < LAST_PATIENCE ? 2 * times : LAST_PATIENCE);
}

int fs_threads_for(size_t n_elements, int asked)
{
    int n_threads = fs_threads_get();
    if (asked > 0 && !atomic_load(&forked))
        n_threads = asked;
    if (atomic_load(&insisted))
        return n_threads;
    const size_t useful = n_elements / ELEMENTS_PER_THREAD;
    if (useful < (size_t)n_threads)
        n_threads = useful > 1 ? (int)useful : 1;
    if (n_threads > 1 && fs_clock() < atomic_load(&alone_until))
        n_threads = 1;
    return n_threads;
}
