/* How many threads a pass may use: the only place that decides.
 *
 * The team size is always passed to the parallel region, never set process-wide, so that other OpenMP users in the process
 * are left alone. */
#define _POSIX_C_SOURCE 200809L
#include "team.h"

#include <pthread.h>
#include <stdatomic.h>

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

bool fs_threads_insisted(void)
{
    return atomic_load(&insisted);
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
    return n_threads;
}
