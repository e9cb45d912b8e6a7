/* All that takes several loops (stages, small states, residuals, statistics ...): piece by piece. */
#include "engine.h"

#include <string.h>

static unsigned long long mix(unsigned long long z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* The keys of random bits: an array's, by seed, step and array; and a block's, by that and what they are for. */
enum { FOR_STATES, FOR_PARAM };

static unsigned long long array_key(const fs_plan *plan, size_t array)
{
    return mix(mix(plan->seed) + (unsigned long long)plan->step) + 2 * array;
}

static uint32_t key_at(unsigned long long array_key, int use, size_t start)
{
    return (uint32_t)mix(mix(array_key + (unsigned)use) + start / FS_BLOCK);
}

static bool has_small_states(const fs_work *w, const fs_array *array)
{
    for (int o = FS_STATE; o < w->n_operands; o++)
        if (array->operand[o].is_packed)
            return true;
    return false;
}

/* What of the next piece is still to be fetched, if pieces are copied: runs of operands. */
typedef struct { const char *at, *end; } fs_run;
typedef struct { int n_runs; fs_run run[FS_N_OPERANDS]; } fs_ahead;

static fs_ahead ahead_of(const fs_array *array, size_t start, size_t count, bool in_place)
{
    const size_t next = start + count;
    fs_ahead ahead = {0};
    for (int o = 0; o < FS_N_OPERANDS && !in_place && next + count <= array->size; o++) {
        const fs_operand *operand = &array->operand[o];
        const bool is_small_state = operand->is_packed && o < FS_AVERAGE;
        if (!operand->data || operand->is_constant || is_small_state)
            continue;
        const size_t item = fs_dtype_size(operand->dtype);    /* gaps: of no use */
        const char *at = operand->data + next * item;
        ahead.run[ahead.n_runs++] = (fs_run){at, at + count * item};
    }
    return ahead;
}

/* Between two loops; not all at once, since the CPU drops what it has no room for. Kernels for small states do it
 * themselves. */
static void fetch_some(fs_ahead *ahead)
{
    enum { AT_ONCE = 32 * CACHE_LINE };
    for (size_t left = AT_ONCE; ahead->n_runs > 0 && left > 0;) {
        fs_run *run = &ahead->run[ahead->n_runs - 1];
        const char *at = run->at, *end = at + min_size((size_t)(run->end - at), left);
        left -= (size_t)(end - at);
        for (; at < end; at += CACHE_LINE)
            __builtin_prefetch(at);
        run->at = end;
        if (end == run->end)
            ahead->n_runs--;
    }
}

/* Where a tile has room for a block: for each operand in its own run; average and residual, which need none before the rule,
 * leave it to the factors of units, and to the parameter as it was before. */
static char *room_for(fs_tile *tile, int place)
{
    _Static_assert(2 * sizeof tile->run[0] == 3 * FS_BLOCK * sizeof(double), "three blocks for two runs");
    if (place < FS_N_OPERANDS)
        return (char *)tile->run[place];
    return (char *)tile->run[FS_AVERAGE] + (size_t)(place - FS_N_OPERANDS) * FS_BLOCK * sizeof(double);
}
enum { BEFORE = FS_BY_UNIT };

static void bring_factors(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, char *const *copy)
{
    for (int o = FS_GRAD_FACTOR; o <= FS_PARAM_FACTOR; o++)
        if (o == FS_GRAD_FACTOR ? w->clip_units : w->limit_units)
            at[o] = fs_load_in_memory_order(w->k, array, o, start, count, copy[o]);
}

void fs_bring_piece(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, fs_tile *tile)
{
    char *copy[FS_N_PLACES];
    for (int o = 0; o < FS_N_PLACES; o++)
        copy[o] = room_for(tile, o);
    for (int o = 0; o < w->n_operands; o++)
        at[o] = fs_load_in_memory_order(w->k, array, o, start, count, copy[o]);
    bring_factors(w, array, start, count, at, copy);
}

void fs_copy_block(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, fs_tile *tile)
{
    fs_bring_piece(w, array, start, count, at, tile);
    for (int o = 0; o < w->n_operands; o++)
        if (o != FS_GRAD && at[o] != room_for(tile, o))
            at[o] = memcpy(room_for(tile, o), at[o], count * array->item);
}

const void *fs_load_staged(const fs_work *w, const fs_array *array, size_t start, size_t count, fs_tile *tile)
{
    void *at[FS_N_PLACES];
    fs_work work = *w;
    work.n_operands = FS_STATE;
    fs_bring_piece(&work, array, start, count, at, tile);
    return fs_stage_gradient(w, count, at, tile->run[FS_GRAD]);
}

/* The parameter before and after the update of a block. */
static void add_stats(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t count, const void *before,
                      char *copy)
{
    const size_t block = plan->first_block[i] + start / FS_BLOCK;
    const void *after = fs_load_in_memory_order(w->k, &plan->arrays[i], FS_PARAM, start, count, copy);
    w->k->sum_squares_and_changes(count, after, before, &plan->block_stats[FS_PARAM_SQUARES][block],
                                  &plan->block_stats[FS_UPDATE_SQUARES][block]);
}

/* The new parameter as a gradient of another plan. */
static void add_squares(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t count, char *room)
{
    const void *sums = fs_load_in_memory_order(w->k, &plan->arrays[i], FS_PARAM, start, count, room);
    sums = w->k->unscale(count, sums, room, w->squares_divisor, false);
    w->k->sum_squares(count, sums, 1.0, &plan->block_stats[FS_PARAM_SQUARES][plan->first_block[i] + start / FS_BLOCK]);
}

static void count_zeros(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t count, const char *grad)
{
    double *zeros = &plan->block_stats[FS_ZERO_GRADS][plan->first_block[i] + start / FS_BLOCK];
    const size_t item = plan->arrays[i].item;
    for (size_t done = 0; done < count; done += FS_BLOCK)
        *zeros++ = (double)w->k->count_zeros(min_size(count - done, FS_BLOCK), grad + done * item);
}

/* The states of a block: small ones where they lie, others where they have been brought. */
static fs_small small_states(const fs_work *w, const fs_array *array, unsigned long long key, size_t start, void *const *at)
{
    fs_small small = {.n_states = w->n_operands - FS_STATE, .key = key_at(key, FOR_STATES, start)};
    small.in_place = array->is_run;
    small.all_bfloat16 = array->real == FS_FLOAT32;
    for (int s = 0; s < small.n_states; s++) {
        const fs_state plain = {.data = at[FS_STATE + s], .dtype = array->real};
        small.state[s] = array->operand[FS_STATE + s].is_packed ? fs_packed_state(array, FS_STATE + s, start) : plain;
        small.all_bfloat16 = small.all_bfloat16 && small.state[s].dtype == FS_BFLOAT16;
    }
    return small;
}

/* Towards the parameter as it is stored. */
static void move_average(const fs_work *w, const fs_array *array, size_t start, size_t count, char *const *copy)
{
    const void *param = fs_load_in_memory_order(w->k, array, FS_PARAM, start, count, copy[FS_PARAM]);
    void *average = fs_load_in_memory_order(w->k, array, FS_AVERAGE, start, count, copy[FS_AVERAGE]);
    w->k->average(count, average, param, w->group->average_now);
    fs_store_in_memory_order(w->k, array, FS_AVERAGE, start, count, average, FS_NO_KEY);
}

/* Whether all lies where it can be used, but for small states; units are brought by block. */
static bool is_in_place(const fs_array *array)
{
    return array->is_run && array->n_units == 0;
}

size_t fs_piece_size(const fs_work *w, const fs_array *array)
{
    return is_in_place(array) && !has_small_states(w, array) ? LONG_RUN / array->item : FS_BLOCK;
}

static bool are_halves_in_place(const fs_operand *operand)
{
    return operand->dtype == FS_BFLOAT16 && operand->is_dense && operand->aligned;
}

/* Whether a rule of halves can take parameter and gradient as they are stored: nothing else reads or changes them before. */
static bool takes_halves(const fs_work *w, const fs_plan *plan, const fs_array *array)
{
    bool all_bfloat16 = w->n_operands > FS_STATE;    /* then the rule is one that takes those */
    for (int o = FS_STATE; o < w->n_operands; o++)
        all_bfloat16 = all_bfloat16 && array->operand[o].is_packed && array->operand[o].dtype == FS_BFLOAT16;
    return are_halves_in_place(&array->operand[FS_PARAM]) && are_halves_in_place(&array->operand[FS_GRAD]) &&
           (array->rounding == FS_NEAREST || array->rounding == FS_STOCHASTIC) && array->n_units == 0 &&
           !w->stage_grad && !w->clear && !plan->has_stats && !all_bfloat16;
}

void fs_update_pieces(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &plan->arrays[i];
    const bool in_place = is_in_place(array), has_small = has_small_states(w, array);
    const bool has_sums = plan->has_stats || w->squares_divisor != 0.0, halves = takes_halves(w, plan, array);
    const size_t piece = fs_piece_size(w, array);
    char *copy[FS_N_PLACES];
    for (int o = 0; o < FS_N_PLACES; o++)
        copy[o] = in_place ? (char *)tile : room_for(tile, o);    /* which then is for the gradient alone */
    char *before = in_place ? (char *)tile + LONG_RUN : copy[BEFORE];
    const unsigned long long key = array_key(plan, i);
    fs_small small;
    fs_work work = *w;
    work.small = has_small ? &small : NULL;
    size_t count = array->is_run && !array->in_blocks && !has_sums ? fs_before_cache_line(array, start) : 0;
    for (; start < end; start += count, count = 0) {
        void *at[FS_N_PLACES];
        count = min_size(end - start, count > 0 ? count : piece);
        fs_ahead ahead = ahead_of(array, start, count, in_place);
        for (int o = halves ? FS_STATE : 0; o < w->n_operands; o++) {
            if (!array->operand[o].is_packed)
                at[o] = fs_load_in_memory_order(w->k, array, o, start, count, copy[o]);
            fetch_some(&ahead);
        }
        if (halves) {
            at[FS_PARAM] = copy[FS_PARAM];
            at[FS_GRAD] = array->operand[FS_GRAD].data + start * sizeof(uint16_t);
            work.from = (const uint16_t *)array->operand[FS_PARAM].data + start;
        }
        bring_factors(w, array, start, count, at, copy);
        if (plan->has_stats) {
            memcpy(before, at[FS_PARAM], count * array->item);
            count_zeros(w, plan, i, start, count, at[FS_GRAD]);
            fetch_some(&ahead);
        }
        if (has_small) {
            small = small_states(w, array, key, start, at);
            small.from = work.from;
        }
        fs_update_row(&work, count, at, copy[FS_GRAD]);
        fetch_some(&ahead);
        const uint32_t param_key = array->rounding == FS_STOCHASTIC ? key_at(key, FOR_PARAM, start) : FS_NO_KEY;
        fs_store_in_memory_order(w->k, array, FS_PARAM, start, count, at[FS_PARAM], param_key);
        fetch_some(&ahead);
        for (int o = FS_STATE; o < w->n_operands && !array->operand[o].is_constant; o++) {
            if (!array->operand[o].is_packed)
                fs_store_in_memory_order(w->k, array, o, start, count, at[o], FS_NO_KEY);
            fetch_some(&ahead);
        }
        if (plan->has_stats) {
            add_stats(w, plan, i, start, count, before, copy[FS_PARAM]);
            fetch_some(&ahead);
        }
        if (w->squares_divisor != 0.0)
            add_squares(w, plan, i, start, count, copy[FS_GRAD]);
        if (w->average) {
            move_average(w, array, start, count, copy);
            fetch_some(&ahead);
        }
        if (w->clear) {
            memset(at[FS_GRAD], 0, count * array->item);
            fs_store_in_memory_order(w->k, array, FS_GRAD, start, count, at[FS_GRAD], FS_NO_KEY);
        }
    }
}
