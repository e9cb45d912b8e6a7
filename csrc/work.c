/* What is done to a run, from the gradient to the new parameter. */
#include "engine.h"

#include <math.h>

static fs_stages stages_of(const fs_group *group, double clip_factor)
{
    return (fs_stages){
        .factor = group->maximize ? -clip_factor : clip_factor,
        .clip_value = group->clip_value,
        .weight_decay = group->decay_mode == FS_COUPLED ? group->weight_decay : 0.0,
        .l1 = group->l1,
    };
}

bool fs_has_stages(const fs_stages *s)
{
    return s->clip_value < INFINITY || s->weight_decay != 0.0 || s->l1 != 0.0;
}

fs_work fs_work_on(const fs_pass *pass, size_t i)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_group *group = &pass->plan->groups[array->group];
    fs_work w = {.k = pass->kernels[array->real], .group = group, .grad_scale = pass->options->grad_scale};
    w.rule = group->rule;
    w.decay = group->decay;
    w.coefs = group->is_scaled ? pass->plan->coefs[i] : group->coefs;
    w.stages = stages_of(group, pass->plan->clip_factors[i]);
    w.zero = pass->options->nonfinite == FS_NONFINITE_ZERO && pass->plan->norms[i].n_nonfinite > 0;
    w.stage_grad = w.grad_scale != 1.0 || w.zero || fs_has_stages(&w.stages);
    w.factor = w.stage_grad ? 1.0 : w.stages.factor;
    w.bound = group->lower > -INFINITY || group->upper < INFINITY;
    w.average = array->operand[FS_AVERAGE].data != NULL && group->average_now != 0.0;
    w.clear = pass->options->clear_grads;
    w.squares_divisor = pass->options->squares_divisor != 0.0 && fs_is_in_c_order(array) ? pass->options->squares_divisor : 0.0;
    w.n_operands = FS_STATE + fs_rule_states(group->rule);
    return w;
}

void fs_add_units(fs_work *w, const fs_array *array)
{
    w->clip_units = array->n_units > 0 && w->group->clip_adaptive < INFINITY;
    w->limit_units = array->n_units > 0 && w->group->max_norm < INFINITY;
    w->bound = w->bound || w->limit_units;
    if (w->clip_units) {    /* the factors of the units have all but the sign */
        w->stages.factor = w->group->maximize ? -1.0 : 1.0;
        w->factor = 1.0;
        w->stage_grad = true;
    }
}

const void *fs_stage_gradient(const fs_work *w, size_t n, void *const *at, void *room)
{
    const void *grad = w->k->unscale(n, at[FS_GRAD], room, w->grad_scale, w->zero);
    if (w->clip_units)
        grad = w->k->multiply(n, grad, room, at[FS_GRAD_FACTOR]);
    return w->k->apply_stages(n, grad, room, at[FS_PARAM], &w->stages);
}

void fs_apply_rule(const fs_work *w, size_t n, void *const *at, void *room)
{
    const void *grad = w->stage_grad ? fs_stage_gradient(w, n, at, room) : at[FS_GRAD];
    fs_rule *rule = (w->from                              ? w->k->rule_of_halves
                     : w->small && w->small->all_bfloat16 ? w->k->bfloat16_rule
                                                          : w->k->rule)[w->rule];
    if (w->small)
        w->k->apply_to_small(rule, n, at[FS_PARAM], grad, w->small, w->factor, w->decay, w->coefs);
    else
        rule(n, w->from, at[FS_PARAM], grad, &at[FS_STATE], w->factor, w->decay, w->coefs, NULL);
}

void fs_decay_after(const fs_work *w, size_t n, void *param)
{
    const fs_stages decay = {.factor = w->group->decay_after, .clip_value = INFINITY};
    w->k->apply_stages(n, param, param, NULL, &decay);
}

void fs_update_row(const fs_work *w, size_t n, void *const *at, void *room)
{
    fs_apply_rule(w, n, at, room);
    if (w->group->decay_after != 1.0)
        fs_decay_after(w, n, at[FS_PARAM]);
    if (w->bound) {
        if (w->limit_units)
            w->k->multiply(n, at[FS_PARAM], at[FS_PARAM], at[FS_PARAM_FACTOR]);
        w->k->bound(n, at[FS_PARAM], w->group->lower, w->group->upper);
    }
}
