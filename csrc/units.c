/* Units: slices of arrays, of which the norms are limited. */
#include "engine.h"

#include <math.h>

/* What is measured: parameter and gradient as they are, and the parameter that the rule leads to. */
enum { UNITS_OF_PARAM = FS_PARAM, UNITS_OF_GRAD = FS_GRAD, UNITS_OF_RESULT };

static bool is_measured(const fs_pass *pass, const fs_array *array)
{
    const fs_group *group = &pass->plan->groups[array->group];
    return array->n_units > 0 && (pass->measured == UNITS_OF_RESULT ? group->max_norm : group->clip_adaptive) < INFINITY;
}

/* Lay out what is measured with the units one after the other, if it does not lie so. */
static void lay_out_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    if (!is_measured(pass, array) || (pass->measured != UNITS_OF_RESULT && fs_units_in_place(array, pass->measured)))
        return;
    fs_work w = fs_work_on(pass, i);
    fs_add_units(&w, array);
    for (; start < end; start += FS_BLOCK) {
        const size_t count = min_size(end - start, FS_BLOCK);
        void *at[FS_N_PLACES], *run = tile;    /* where fs_copy_block leaves the parameter, too */
        if (pass->measured == UNITS_OF_RESULT) {
            fs_copy_block(&w, array, start, count, at, tile);
            fs_apply_rule(&w, count, at, tile->run[FS_GRAD]);
            if (w.group->decay_after != 1.0)
                fs_decay_after(&w, count, at[FS_PARAM]);
        } else {
            run = fs_load_in_memory_order(w.k, array, pass->measured, start, count, run);
        }
        fs_store_by_unit(w.k, array, start, count, run);
    }
}

/* Sum of squares of a unit, by blocks and pairwise, without room for the sums of all blocks: two neighbours become one at
 * once. */
static double sum_unit(const fs_work *w, const fs_array *array, const char *unit, double scale, fs_tile *tile)
{
    enum { N_BLOCKS = 4 };    /* at a time */
    double sums[N_BLOCKS], pending[64];
    size_t n_pending = 0;
    for (size_t start = 0; start < array->unit_size; start += N_BLOCKS * FS_BLOCK) {
        const size_t count = min_size(array->unit_size - start, N_BLOCKS * FS_BLOCK);
        const void *run = w->k->unscale(count, unit + start * array->item, tile, w->grad_scale, w->zero);
        w->k->sum_squares(count, run, scale, sums);
        for (size_t b = 0; b * FS_BLOCK < count; b++) {
            double sum = sums[b];
            for (size_t number = start / FS_BLOCK + b; number % 2; number /= 2)
                sum = pending[--n_pending] + sum;
            pending[n_pending++] = sum;
        }
    }
    double sum = pending[--n_pending];
    while (n_pending > 0)
        sum = pending[--n_pending] + sum;
    return sum;
}

static fs_norm measure_unit(const fs_work *w, const fs_array *array, const char *unit, fs_tile *tile)
{
    fs_norm norm = {.sum_squares = sum_unit(w, array, unit, 1.0, tile)};
    if (array->real == FS_FLOAT32 || isnan(norm.sum_squares))
        return norm;
    norm.exponent = fs_rescue_exponent(norm.sum_squares);
    if (norm.exponent != 0)
        norm.sum_squares = sum_unit(w, array, unit, ldexp(1.0, -norm.exponent), tile);
    return norm;
}

/* limit / max(norm, least) for norms above the limit. */
static double unit_factor(double root, int exponent, double limit, double least)
{
    const double norm = ldexp(root, exponent);
    if (norm <= limit)
        return 1.0;
    return norm < least ? limit / least : fs_clip_factor(root, exponent, limit, 0.0);
}

/* Of the units that begin in this part of an array. */
static void measure_units_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    static const double LEAST_PARAM = 1e-3, LEAST_GRAD = 1e-6;    /* norms: a parameter of 0 has to get away from there */
    const fs_array *array = &pass->plan->arrays[i];
    const fs_group *group = &pass->plan->groups[array->group];
    const size_t size = array->unit_size;
    if (!is_measured(pass, array))
        return;
    fs_work w = fs_work_on(pass, i);
    const double clip = pass->plan->clip_factors[i];
    const char *units = pass->measured == UNITS_OF_RESULT ? NULL : fs_units_in_place(array, pass->measured);
    if (!units)
        units = array->operand[FS_BY_UNIT].data;
    if (pass->measured != UNITS_OF_GRAD) {
        w.grad_scale = 1.0;
        w.zero = false;
    }
    for (size_t unit = (start + size - 1) / size; unit < (end + size - 1) / size; unit++) {
        const fs_norm norm = measure_unit(&w, array, units + unit * size * array->item, tile);
        const double root = sqrt(norm.sum_squares), length = ldexp(root, norm.exponent);
        if (pass->measured == UNITS_OF_PARAM)
            array->unit_limits[unit] = group->clip_adaptive * (length < LEAST_PARAM ? LEAST_PARAM : length);
        else if (pass->measured == UNITS_OF_GRAD)
            fs_set_real(array, array->operand[FS_GRAD_FACTOR].data, unit,
                        clip * unit_factor(root * clip, norm.exponent, array->unit_limits[unit], LEAST_GRAD));
        else
            fs_set_real(array, array->operand[FS_PARAM_FACTOR].data, unit,
                        unit_factor(root, norm.exponent, group->max_norm, 0.0));
    }
}

static void measure_units(fs_pass *pass, int measured)
{
    pass->measured = measured;
    pass->work = lay_out_work;
    fs_run_pass(pass);
    pass->work = measure_units_work;
    fs_run_pass(pass);
}

static bool clips_units(const fs_plan *plan)
{
    bool any = false;
    for (size_t i = 0; i < plan->n_groups && plan->units; i++)
        any = any || plan->groups[i].clip_adaptive < INFINITY;
    return any;
}

static bool limits_units(const fs_plan *plan)
{
    bool any = false;
    for (size_t i = 0; i < plan->n_groups && plan->units; i++)
        any = any || plan->groups[i].max_norm < INFINITY;
    return any;
}

void fs_find_grad_factors(fs_pass *pass)
{
    if (clips_units(pass->plan)) {
        measure_units(pass, UNITS_OF_PARAM);
        measure_units(pass, UNITS_OF_GRAD);
    }
}

void fs_find_param_factors(fs_pass *pass)
{
    if (limits_units(pass->plan))
        measure_units(pass, UNITS_OF_RESULT);
}
