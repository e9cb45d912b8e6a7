/* Gradients alone: clipped, or set to 0. */
#include "engine.h"

#include <math.h>
#include <string.h>

static void clip_units_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    const fs_stages stages = {.factor = 1.0, .clip_value = pass->plan->groups[array->group].clip_value};
    for (; start < end; start += FS_BLOCK) {
        const size_t count = min_size(end - start, FS_BLOCK);
        void *grad = fs_load_in_memory_order(k, array, FS_GRAD, start, count, tile->run[FS_GRAD]);
        k->multiply(count, grad, grad, fs_load_in_memory_order(k, array, FS_GRAD_FACTOR, start, count, tile));
        k->apply_stages(count, grad, grad, NULL, &stages);
        fs_store_in_memory_order(k, array, FS_GRAD, start, count, grad, FS_NO_KEY);
    }
}

static void clip_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    const fs_group *group = &pass->plan->groups[array->group];
    const fs_stages stages = {.factor = pass->plan->clip_factors[i], .clip_value = group->clip_value};
    char *copy = (char *)tile + array->copy_offset[FS_GRAD];
    if (array->n_units > 0 && group->clip_adaptive < INFINITY) {
        clip_units_work(pass, i, start, end, tile);
        return;
    }
    if (stages.factor == 1.0 && !fs_has_stages(&stages))
        return;
    const size_t end_tile = fs_first_tile(array, end);
    for (size_t t = fs_first_tile(array, start); t < end_tile; t++) {
        const fs_shape shape = fs_tile_shape(array, t);
        const fs_rows grad = fs_bring(k, array, FS_GRAD, t, copy);
        for (size_t r = 0; r < shape.n_rows; r++) {
            char *row = grad.first + (ptrdiff_t)r * grad.stride;
            k->apply_stages(shape.n_columns, row, row, NULL, &stages);
        }
        fs_take_back(k, array, FS_GRAD, t, copy);
    }
}

void fs_clip(fs_plan *plan, const fs_options *options)
{
    fs_pass pass = fs_make_pass(plan, options);
    fs_find_grad_factors(&pass);
    pass.work = clip_work;
    fs_run_pass(&pass);
}

void fs_clear_tile(const fs_kernels *k, const fs_array *array, size_t t, void *copy)
{
    const fs_shape shape = fs_tile_shape(array, t);
    const fs_rows grad = fs_bring(k, array, FS_GRAD, t, copy);
    for (size_t r = 0; r < shape.n_rows; r++)
        memset(grad.first + (ptrdiff_t)r * grad.stride, 0, shape.n_columns * array->item);
    fs_take_back(k, array, FS_GRAD, t, copy);
}

static void clear_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    char *copy = (char *)tile + array->copy_offset[FS_GRAD];
    const size_t end_tile = fs_first_tile(array, end);
    for (size_t t = fs_first_tile(array, start); t < end_tile; t++)
        fs_clear_tile(k, array, t, copy);
}

void fs_clear(fs_plan *plan, const fs_options *options)
{
    fs_pass pass = fs_make_pass(plan, options);
    pass.work = clear_work;
    fs_run_pass(&pass);
}
