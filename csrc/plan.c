/* Plans: which arrays a step works on. */
#include "tiles.h"

#include <stdlib.h>

fs_plan *fs_plan_new(size_t n_arrays, size_t n_groups, bool has_stats)
{
    fs_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    plan->n_arrays = n_arrays;
    plan->n_groups = n_groups;
    plan->has_stats = has_stats;
    plan->arrays = calloc(n_arrays + 1, sizeof *plan->arrays);
    plan->groups = calloc(n_groups + 1, sizeof *plan->groups);
    plan->first_element = calloc(n_arrays + 1, sizeof *plan->first_element);
    plan->first_block = calloc(n_arrays + 1, sizeof *plan->first_block);
    plan->array_sums = calloc(n_arrays + 1, sizeof *plan->array_sums);
    plan->norms = calloc(n_arrays + 1, sizeof *plan->norms);
    plan->clip_factors = calloc(n_arrays + 1, sizeof *plan->clip_factors);
    if (!plan->arrays || !plan->groups || !plan->first_element || !plan->first_block || !plan->array_sums ||
        !plan->norms || !plan->clip_factors) {
        fs_plan_free(plan);
        return NULL;
    }
    for (size_t i = 0; i < n_arrays; i++)
        if (has_stats)
            fs_array_for_sums(&plan->arrays[i]);
    return plan;
}

fs_status fs_plan_finish(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const size_t size = plan->arrays[i].size;
        plan->first_element[i + 1] = plan->first_element[i] + size;
        plan->first_block[i + 1] = plan->first_block[i] + (size + FS_BLOCK - 1) / FS_BLOCK;
    }
    plan->n_elements = plan->first_element[plan->n_arrays];
    const size_t n_blocks = plan->first_block[plan->n_arrays];
    plan->block_sums = calloc(n_blocks + 1, sizeof *plan->block_sums);
    plan->coefs = calloc(plan->n_arrays + 1, sizeof *plan->coefs);
    bool complete = plan->block_sums && plan->coefs;
    size_t room = 0;
    for (size_t i = 0; i < plan->n_arrays; i++)
        room += plan->arrays[i].n_units > 0 ? plan->arrays[i].size + 3 * plan->arrays[i].n_units : 0;
    if (room > 0) {
        double *rest = plan->units = calloc(room, sizeof *plan->units);
        for (size_t i = 0; rest && i < plan->n_arrays; i++)
            rest = fs_array_place_units(&plan->arrays[i], rest);
        complete = complete && plan->units;
    }
    room = 0;
    for (size_t i = 0; i < plan->n_arrays; i++)
        room += fs_array_room_for_factors(&plan->arrays[i]);
    if (room > 0) {
        double *rest = plan->factors = calloc(room, sizeof *plan->factors);
        for (size_t i = 0; rest && i < plan->n_arrays; i++)
            rest = fs_array_place_factors(&plan->arrays[i], rest);
        complete = complete && plan->factors;
    }
    for (int s = 0; s < FS_N_STATS; s++) {
        plan->block_stats[s] = calloc(n_blocks + 1, sizeof *plan->block_stats[s]);
        plan->stats[s] = calloc(plan->n_arrays + 1, sizeof *plan->stats[s]);
        complete = complete && plan->block_stats[s] && plan->stats[s];
    }
    return complete ? FS_OK : FS_OUT_OF_MEMORY;
}

void fs_plan_free(fs_plan *plan)
{
    if (!plan)
        return;
    for (size_t i = 0; plan->arrays && i < plan->n_arrays; i++)
        free(plan->arrays[i].memory);
    free(plan->arrays);
    free(plan->groups);
    free(plan->first_element);
    free(plan->first_block);
    free(plan->block_sums);
    free(plan->coefs);
    for (int s = 0; s < FS_N_STATS; s++) {
        free(plan->block_stats[s]);
        free(plan->stats[s]);
    }
    free(plan->array_sums);
    free(plan->norms);
    free(plan->clip_factors);
    free(plan->units);
    free(plan->factors);
    free(plan);
}
