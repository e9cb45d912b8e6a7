/* Which CPU level the kernels run at. */
#include "kernels.h"

#include <stdatomic.h>

const char *fs_level_name(fs_level level)
{
    static const char *const names[FS_N_LEVELS] = {"baseline", "avx2", "avx512"};
    return names[level];
}

bool fs_level_compiled(fs_level level)
{
    return fs_kernels_of(level, FS_FLOAT32) != NULL;
}

bool fs_level_available(fs_level level)
{
    if (!fs_level_compiled(level))
        return false;
#ifdef __x86_64__
    if (level == FS_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == FS_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return true;
}

/* Relaxed order is enough: any thread may find the level out for itself, all find the same. */
static atomic_int current = -1;

fs_level fs_level_current(void)
{
    int level = atomic_load_explicit(&current, memory_order_relaxed);
    if (level < 0) {
        level = FS_N_LEVELS - 1;
        while (!fs_level_available((fs_level)level))
            level--;
        fs_level_set((fs_level)level);
    }
    return (fs_level)level;
}

fs_status fs_level_set(fs_level level)
{
    if (!fs_level_available(level))
        return FS_BAD_LEVEL;
    atomic_store_explicit(&current, (int)level, memory_order_relaxed);
    return FS_OK;
}
