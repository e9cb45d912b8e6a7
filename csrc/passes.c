/* Passes over all arrays of a plan, cut into one contiguous part per thread. */
#include "engine.h"
#include "team.h"

fs_pass fs_make_pass(fs_plan *plan, const fs_options *options)
{
    const fs_level level = fs_level_current();
    return (fs_pass){.plan = plan, .options = options,
                     .kernels = {fs_kernels_of(level, FS_FLOAT32), fs_kernels_of(level, FS_FLOAT64)}};
}

/* Where part `part` of `n_parts` equal parts begins, rounded down to a block of its array. */
static void find_cut(const fs_plan *plan, size_t part, size_t n_parts, size_t *array, size_t *start)
{
    *array = plan->n_arrays;
    *start = 0;
    if (part == n_parts)
        return;
    const size_t element = plan->n_elements / n_parts * part + plan->n_elements % n_parts * part / n_parts;
    size_t low = 0, high = plan->n_arrays;    /* first_element[low] <= element < first_element[high] */
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (plan->first_element[middle] <= element)
            low = middle;
        else
            high = middle;
    }
    *array = low;
    *start = (element - plan->first_element[low]) / FS_BLOCK * FS_BLOCK;
}

static void run_part(const void *context, size_t part, size_t n_parts)
{
    const fs_pass *pass = context;
    fs_tile tile;
    size_t array, start, last_array, last_end;
    find_cut(pass->plan, part, n_parts, &array, &start);
    find_cut(pass->plan, part + 1, n_parts, &last_array, &last_end);
    for (; array < last_array; array++, start = 0)
        if (start < pass->plan->arrays[array].size)
            pass->work(pass, array, start, pass->plan->arrays[array].size, &tile);
    if (start < last_end)
        pass->work(pass, array, start, last_end, &tile);
}

void fs_run_pass(const fs_pass *pass)
{
    const size_t n_elements = pass->plan->n_elements;
    fs_team_run(fs_threads_for(n_elements, pass->options->n_threads), n_elements, run_part, pass);
}
