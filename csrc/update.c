/* The update pass. */
#include "engine.h"

/* Arrays that are runs, to which nothing is done but what the rule does: in one go from the first cache line on. */
static void update_run(const fs_work *w, const fs_array *array, size_t start, size_t end)
{
    size_t count = end - start < FS_BLOCK / 4 ? 0 : fs_before_cache_line(array, start);
    for (; start < end; start += count, count = 0) {
        void *at[FS_N_PLACES];
        count = count > 0 ? count : end - start;
        for (int o = 0; o < w->n_operands; o++)
            at[o] = array->operand[o].data + start * array->item;
        fs_apply_rule(w, count, at, NULL);
    }
}

static void update_tile(const fs_work *w, const fs_array *array, size_t t, char *const *copy)
{
    const fs_shape shape = fs_tile_shape(array, t);
    fs_rows rows[FS_N_OPERANDS];
    void *at[FS_N_PLACES];
    for (int o = 0; o < w->n_operands; o++)
        rows[o] = fs_bring(w->k, array, o, t, copy[o]);
    for (size_t r = 0; r < shape.n_rows; r++) {
        for (int o = 0; o < w->n_operands; o++)
            at[o] = rows[o].first + (ptrdiff_t)r * rows[o].stride;
        /* What was copied may be changed where it is; the caller's own gradient may not. */
        fs_update_row(w, shape.n_columns, at, rows[FS_GRAD].first == copy[FS_GRAD] ? at[FS_GRAD] : copy[FS_GRAD]);
    }
    for (int o = 0; o < w->n_operands; o++)
        if (o != FS_GRAD)
            fs_take_back(w->k, array, o, t, copy[o]);
    if (w->average) {
        const fs_rows param = fs_bring(w->k, array, FS_PARAM, t, copy[FS_PARAM]);    /* as it is stored, rounded */
        const fs_rows average = fs_bring(w->k, array, FS_AVERAGE, t, copy[FS_AVERAGE]);
        for (size_t r = 0; r < shape.n_rows; r++)
            w->k->average(shape.n_columns, average.first + (ptrdiff_t)r * average.stride,
                          param.first + (ptrdiff_t)r * param.stride, w->group->average_now);
        fs_take_back(w->k, array, FS_AVERAGE, t, copy[FS_AVERAGE]);
    }
    if (w->clear)
        fs_clear_tile(w->k, array, t, copy[FS_GRAD]);
}

static void update_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    fs_work w = fs_work_on(pass, i);
    const bool rule_alone = !(w.stage_grad || w.bound || w.average || w.clear || w.squares_divisor != 0.0 ||
                              w.group->decay_after != 1.0);
    if (array->is_run && rule_alone && !array->in_blocks) {
        update_run(&w, array, start, end);
        return;
    }
    if (array->is_dense || array->in_blocks) {
        fs_add_units(&w, array);
        fs_update_pieces(&w, pass->plan, i, start, end, tile);
        return;
    }
    char *copy[FS_N_OPERANDS];
    for (int o = 0; o < FS_N_OPERANDS; o++)
        copy[o] = (char *)tile + array->copy_offset[o];
    const size_t end_tile = fs_first_tile(array, end);
    for (size_t t = fs_first_tile(array, start); t < end_tile; t++)
        update_tile(&w, array, t, copy);
}

void fs_update(fs_plan *plan, const fs_options *options)
{
    fs_pass pass = fs_make_pass(plan, options);
    bool any_scaled = false;
    plan->step += 1.0;
    plan->squares_divisor = options->squares_divisor;
    for (size_t i = 0; i < plan->n_groups; i++) {
        fs_group *group = &plan->groups[i];
        group->is_scaled = fs_rule_is_scaled(group->rule);
        any_scaled = any_scaled || group->is_scaled;
        fs_rule_prepare(group->rule, group->hyper, plan->step, group->coefs);
        const double decoupled = 1.0 - group->hyper[0] * group->weight_decay;
        group->decay = group->decay_mode == FS_DECOUPLED     ? decoupled
                       : group->decay_mode == FS_INDEPENDENT ? 1.0 - group->weight_decay
                                                             : 1.0;
        const bool is_copy = group->average_copies_first && plan->step == 1.0 && group->average_weight != 0.0;
        group->average_now = is_copy ? 1.0 : group->average_weight;
        group->decay_after = group->decay_mode == FS_DECOUPLED_AFTER ? decoupled : 1.0;
    }
    if (any_scaled)
        fs_put_in_order_of_sums(plan);
    fs_find_grad_factors(&pass);
    if (any_scaled)
        fs_scale_pass(&pass);
    fs_find_param_factors(&pass);
    pass.work = update_work;
    fs_run_pass(&pass);
    for (int s = 0; s < FS_N_STATS && plan->has_stats; s++)
        fs_finish_stat(plan, s);
}
