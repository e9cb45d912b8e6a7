/* What scaled rules have to know of whole arrays: norms of parameters and of the directions of steps, or sums over all
 * arrays; and numbers. */
#include "engine.h"

#include <math.h>
#include <string.h>

enum { N_MEASURED = 2 };
static const int measured[N_MEASURED] = {FS_PARAM_SQUARES, FS_UPDATE_SQUARES};

/* What those norms are made of: sums of squares, each of a multiple, of the parameter, with its decay, and of the direction
 * of its step; or sums of what else the rule has to know. */
static void measure(const fs_pass *pass, size_t i, size_t start, size_t end, const double *scales, fs_tile *tile)
{
    const fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    fs_work w = fs_work_on(pass, i);
    if (!fs_rule_is_measured(w.rule))
        return;
    fs_add_units(&w, array);
    const size_t piece = fs_piece_size(&w, array);
    for (; start < end; start += piece) {
        const size_t count = min_size(end - start, piece), block = plan->first_block[i] + start / FS_BLOCK;
        void *at[FS_N_PLACES];
        fs_bring_piece(&w, array, start, count, at, tile);
        const void *grad = w.stage_grad ? fs_stage_gradient(&w, count, at, tile->run[FS_GRAD]) : at[FS_GRAD];
        w.k->measure[w.rule](count, at[FS_PARAM], grad, &at[FS_STATE], w.factor, w.decay, w.coefs, scales,
                             &plan->block_stats[FS_PARAM_SQUARES][block], &plan->block_stats[FS_UPDATE_SQUARES][block]);
    }
}

static void scale_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    static const double as_it_is[N_MEASURED] = {1.0, 1.0};
    measure(pass, i, start, end, as_it_is, tile);
}

/* Squares that a double does not hold are measured once more. */
static void finish_norms(const fs_pass *pass, size_t i, double *norms)
{
    fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    int exponents[N_MEASURED] = {0};
    double scales[N_MEASURED];
    for (int m = 0; m < N_MEASURED; m++) {
        if (array->real == FS_FLOAT64)
            exponents[m] = fs_rescue_exponent(plan->stats[measured[m]][i]);
        scales[m] = ldexp(1.0, -exponents[m]);
    }
    if (exponents[0] != 0 || exponents[1] != 0) {
        fs_tile tile;
        measure(pass, i, 0, array->size, scales, &tile);
        for (int m = 0; m < N_MEASURED; m++)
            fs_finish_stat_of(plan, measured[m], i);
    }
    for (int m = 0; m < N_MEASURED; m++)
        norms[m] = ldexp(sqrt(plan->stats[measured[m]][i]), exponents[m]);
}

static bool is_summed_array(const fs_plan *plan, size_t i)
{
    return fs_rule_is_summed(plan->groups[plan->arrays[i].group].rule);
}

/* By array; those of summed rules all have the sum over all of them. */
static void finish_measured(fs_plan *plan, int stat)
{
    fs_finish_stat(plan, stat);
    for (size_t i = 0; i < plan->n_arrays; i++)
        plan->array_sums[i] = is_summed_array(plan, i) ? plan->stats[stat][i] : 0.0;
    const double total = fs_pairwise_sum(plan->array_sums, plan->n_arrays);
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (is_summed_array(plan, i))
            plan->stats[stat][i] = total;
}

static void measure_directions(fs_pass *pass)
{
    pass->work = scale_work;
    fs_run_pass(pass);
    for (int m = 0; m < N_MEASURED; m++)
        finish_measured(pass->plan, measured[m]);
}

void fs_put_in_order_of_sums(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (fs_rule_is_measured(plan->groups[plan->arrays[i].group].rule))
            fs_array_for_sums(&plan->arrays[i]);
}

static void load_numbers(const fs_array *array, int n_numbers, double *numbers)
{
    for (int n = 0; n < n_numbers; n++)
        memcpy(&numbers[n], array->number[n], sizeof numbers[n]);
}

/* An array's own coefficients, as far as they are known before anything is measured. */
static void begin_array(fs_plan *plan, size_t i)
{
    const fs_array *array = &plan->arrays[i];
    const fs_group *group = &plan->groups[array->group];
    double numbers[FS_MAX_NUMBERS];
    load_numbers(array, fs_rule_numbers(group->rule), numbers);
    memcpy(plan->coefs[i], group->coefs, sizeof plan->coefs[i]);
    fs_rule_begin(group->rule, group->hyper, numbers, plan->coefs[i]);
}

/* The others, and its numbers after this step. */
static void scale_array(const fs_pass *pass, size_t i)
{
    fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    const fs_group *group = &plan->groups[array->group];
    const int n_numbers = fs_rule_numbers(group->rule);
    double numbers[FS_MAX_NUMBERS], norms[N_MEASURED] = {0};
    load_numbers(array, n_numbers, numbers);
    if (fs_rule_is_measured(group->rule) && !fs_rule_is_summed(group->rule))
        finish_norms(pass, i, norms);
    const fs_whole whole = {.size = (double)array->size, .largest = fs_largest(array->item),
                            .param_norm = norms[0], .direction_norm = norms[1],
                            .sums = {plan->stats[FS_PARAM_SQUARES][i], plan->stats[FS_UPDATE_SQUARES][i]}};
    fs_rule_scale(group->rule, group->hyper, &whole, numbers, plan->coefs[i]);
    for (int n = 0; n < n_numbers; n++)
        memcpy(array->number[n], &numbers[n], sizeof numbers[n]);
}

void fs_scale_pass(fs_pass *pass)
{
    fs_plan *plan = pass->plan;
    bool any_measured = false, any_factored = false;
    for (size_t i = 0; i < plan->n_groups; i++) {
        any_measured = any_measured || fs_rule_is_measured(plan->groups[i].rule);
        any_factored = any_factored || fs_rule_is_factored(plan->groups[i].rule);
    }
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (plan->groups[plan->arrays[i].group].is_scaled)
            begin_array(plan, i);
    if (any_factored)
        fs_move_factors(pass);
    if (any_measured)
        measure_directions(pass);
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (plan->groups[plan->arrays[i].group].is_scaled)
            scale_array(pass, i);
}
