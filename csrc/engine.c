/* The driver: passes over all arrays of a plan, cut into one contiguous part per thread. */
#include "tiles.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- Passes --------------------------------------------------------------------------------------------------------- */

typedef struct fs_pass {
    fs_plan *plan;
    const fs_options *options;
    const fs_kernels *kernels[2];    /* by compute type */
    int measured;                    /* of units */
    /* Work on elements [start, end) of an array; start is a multiple of FS_BLOCK. */
    void (*work)(const struct fs_pass *pass, size_t array, size_t start, size_t end, fs_tile *tile);
} fs_pass;

static fs_pass make_pass(fs_plan *plan, const fs_options *options)
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

static void run_part(const fs_pass *pass, size_t part, size_t n_parts)
{
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

static void run_pass(const fs_pass *pass)
{
    if (pass->plan->n_elements == 0)
        return;
#ifdef _OPENMP
    const int n_threads = fs_threads_for(pass->plan->n_elements, pass->options->n_threads);
    if (n_threads > 1) {
        const long long start = fs_clock();
        long long own_share = 0;
        int team = 1;
#pragma omp parallel num_threads(n_threads)
        {
            const long long own_start = fs_clock();
            /* The team may be smaller than asked for, e.g. inside another parallel region. */
            run_part(pass, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads());
            if (omp_get_thread_num() == 0) {
                team = omp_get_num_threads();
                own_share = fs_clock() - own_start;
            }
        }
        fs_threads_learn(team, start, own_share);
        return;
    }
#endif
    run_part(pass, 0, 1);
}

/* ---- The norm pass -------------------------------------------------------------------------------------------------- */

/* The gradient as the norm sees it: in the compute type, unscaled, on demand with its non-finite elements zeroed. */
static const void *load_gradient(const fs_pass *pass, const fs_array *array, size_t start, size_t count, bool zero,
                                 fs_tile *tile)
{
    const fs_kernels *k = pass->kernels[array->real];
    const char *run = fs_grad_in_c_order(array);
    if (!run)
        fs_load_in_c_order(k, array, start, count, tile);
    return k->unscale(count, run ? run + start * array->item : (char *)tile, tile, pass->options->grad_scale, zero);
}

/* Bytes of a run that several loops go through: they stay in the second-level cache meanwhile, and the CPU has time to look
 * ahead. */
enum { LONG_RUN = 1 << 15 };

/* So many elements are loaded at a time; of a transposed gradient as many as fit, for its cache lines to be used while they
 * are here. */
static size_t load_size(const fs_array *array)
{
    return array->grad_is_transposed ? sizeof(fs_tile) / array->item / FS_BLOCK * FS_BLOCK : LONG_RUN / array->item;
}

static void sum_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    const size_t step = load_size(array);
    double *sums = pass->plan->block_sums + pass->plan->first_block[i];
    for (; start < end; start += step) {
        const size_t count = min_size(end - start, step);
        k->sum_squares(count, load_gradient(pass, array, start, count, false, tile), 1.0, &sums[start / FS_BLOCK]);
    }
}

/* Sum in a binary tree over neighbours, as if filled up with zeros. Overwrites the values. */
static double pairwise_sum(double *values, size_t n)
{
    if (n == 0)
        return 0.0;
    for (; n > 1; n = (n + 1) / 2) {
        for (size_t i = 0; i < n / 2; i++)
            values[i] = values[2 * i] + values[2 * i + 1];
        if (n % 2)
            values[n / 2] = values[n - 1];
    }
    return values[0];
}

/* Squares of finite doubles may overflow or vanish. The plain sum is taken when it is surely good; beyond that the array
 * is summed again, scaled by a power of two. The decision depends on the values alone. */
static const double BIG_SUM = 0x1p1000, SMALL_SUM = 0x1p-900;

static int rescue_exponent(double sum_squares)
{
    enum { RESCUE_EXPONENT = 600 };
    return sum_squares > BIG_SUM ? RESCUE_EXPONENT : sum_squares < SMALL_SUM ? -RESCUE_EXPONENT : 0;
}

static double scaled_sum(const fs_pass *pass, size_t i, bool zero, double scale, fs_tile *tile)
{
    fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    const size_t step = load_size(array);
    double *sums = plan->block_sums + plan->first_block[i];
    for (size_t start = 0; start < array->size; start += step) {
        const size_t count = min_size(array->size - start, step);
        const void *grad = load_gradient(pass, array, start, count, zero, tile);
        pass->kernels[array->real]->sum_squares(count, grad, scale, &sums[start / FS_BLOCK]);
    }
    return pairwise_sum(sums, plan->first_block[i + 1] - plan->first_block[i]);
}

static void count_nonfinite(const fs_pass *pass, const fs_array *array, size_t *n_nan, size_t *n_inf, fs_tile *tile)
{
    const size_t step = load_size(array);
    for (size_t start = 0; start < array->size; start += step) {
        const size_t count = min_size(array->size - start, step);
        const void *grad = load_gradient(pass, array, start, count, false, tile);
        pass->kernels[array->real]->count_nonfinite(count, grad, n_nan, n_inf);
    }
}

static void finish_array_sum(const fs_pass *pass, size_t i)
{
    fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    fs_norm *norm = &plan->norms[i];
    double *sums = plan->block_sums + plan->first_block[i];
    norm->sum_squares = pairwise_sum(sums, plan->first_block[i + 1] - plan->first_block[i]);
    norm->exponent = 0;
    norm->n_nonfinite = 0;
    if (array->real == FS_FLOAT32 ? isfinite(norm->sum_squares)
                                  : norm->sum_squares >= SMALL_SUM && norm->sum_squares <= BIG_SUM)
        return;

    fs_tile tile;
    size_t n_nan = 0, n_inf = 0;
    count_nonfinite(pass, array, &n_nan, &n_inf, &tile);
    norm->n_nonfinite = n_nan + n_inf;
    const bool zero = pass->options->nonfinite == FS_NONFINITE_ZERO;
    norm->sum_squares = scaled_sum(pass, i, zero, 1.0, &tile);
    if (array->real == FS_FLOAT32)
        return;
    norm->exponent = rescue_exponent(norm->sum_squares);
    if (norm->exponent != 0)
        norm->sum_squares = scaled_sum(pass, i, zero, ldexp(1.0, -norm->exponent), &tile);
}

/* min(1, max_norm / (norm + eps)) for norm = root * 2^exponent, which alone may be too large for a double. */
static double clip_factor(double root, int exponent, double max_norm, double eps)
{
    const double norm = ldexp(root, exponent);
    const double factor = isinf(norm) && isfinite(root) ? ldexp(max_norm / root, -exponent)
                                                        : max_norm / (norm + eps);
    return factor >= 1.0 ? 1.0 : factor;
}

/* The norm over all arrays, as *root * 2^*exponent. */
static void combine_arrays(fs_plan *plan, double *root, int *exponent)
{
    bool any = false;
    *exponent = 0;
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const fs_norm *norm = &plan->norms[i];
        if (norm->sum_squares > 0 && (!any || norm->exponent > *exponent)) {
            *exponent = norm->exponent;
            any = true;
        }
    }
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const fs_norm *norm = &plan->norms[i];
        const int shift = 2 * (norm->exponent - *exponent);
        plan->array_sums[i] = shift == 0 ? norm->sum_squares : ldexp(norm->sum_squares, shift);
    }
    *root = sqrt(pairwise_sum(plan->array_sums, plan->n_arrays));
}

/* The same with each array's norm first scaled by its clip_factor, which can be as tiny as the norm was large. What still
 * vanishes when squared is too small to be clipped. */
static void combine_clipped_arrays(fs_plan *plan, double *root, int *exponent)
{
    *exponent = 0;
    for (int squaring = 0; squaring < 2; squaring++)
        for (size_t i = 0; i < plan->n_arrays; i++) {
            const fs_norm *norm = &plan->norms[i];
            int own = 0;
            const double mantissa = frexp(sqrt(norm->sum_squares) * plan->clip_factors[i], &own);
            if (squaring) {
                const double scaled = ldexp(mantissa, own + norm->exponent - *exponent);
                plan->array_sums[i] = scaled * scaled;
            } else if (isfinite(mantissa) && own + norm->exponent > *exponent) {
                *exponent = own + norm->exponent;
            }
        }
    *root = sqrt(pairwise_sum(plan->array_sums, plan->n_arrays));
}

/* Norms and clip factors of all arrays. Returns whether every gradient is finite. */
static bool norm_pass(fs_pass *pass, fs_report *report)
{
    fs_plan *plan = pass->plan;
    double root;
    int exponent;
    bool finite = true, clips_arrays = false;
    const double eps = pass->options->clip_eps;
    pass->work = sum_work;
    run_pass(pass);
    for (size_t i = 0; i < plan->n_arrays; i++) {
        finish_array_sum(pass, i);
        plan->clip_factors[i] = 1.0;
        finite = finite && plan->norms[i].n_nonfinite == 0;
    }
    combine_arrays(plan, &root, &exponent);
    report->has_norm = true;
    report->grad_norm = ldexp(root, exponent);

    for (size_t i = 0; i < plan->n_arrays; i++) {
        const fs_norm *norm = &plan->norms[i];
        const double max_norm = plan->groups[plan->arrays[i].group].clip_norm_per_array;
        if (max_norm < INFINITY) {
            plan->clip_factors[i] = clip_factor(sqrt(norm->sum_squares), norm->exponent, max_norm, eps);
            clips_arrays = true;
        }
    }
    if (pass->options->clip_norm < INFINITY) {
        if (clips_arrays)
            combine_clipped_arrays(plan, &root, &exponent);
        const double factor = clip_factor(root, exponent, pass->options->clip_norm, eps);
        for (size_t i = 0; i < plan->n_arrays; i++)
            plan->clip_factors[i] *= factor;
    }
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (plan->clip_factors[i] < report->clip_factor || isnan(plan->clip_factors[i]))
            report->clip_factor = plan->clip_factors[i];
    return finite;
}

static bool norm_is_needed(const fs_plan *plan, const fs_options *options)
{
    if (options->nonfinite != FS_NONFINITE_PROPAGATE || options->clip_norm < INFINITY || plan->has_stats)
        return true;
    for (size_t i = 0; i < plan->n_groups; i++)
        if (plan->groups[i].clip_norm_per_array < INFINITY)
            return true;
    return false;
}

/* The norm pass if anything needs it. */
void fs_measure(fs_plan *plan, const fs_options *options, fs_report *report)
{
    fs_pass pass = make_pass(plan, options);
    *report = (fs_report){.applied = true, .clip_factor = 1.0};
    if (norm_is_needed(plan, options)) {
        const bool finite = norm_pass(&pass, report);
        report->applied = finite || options->nonfinite != FS_NONFINITE_STOP;
    } else {
        for (size_t i = 0; i < plan->n_arrays; i++) {
            plan->clip_factors[i] = 1.0;
            plan->norms[i].n_nonfinite = 0;
        }
    }
    for (size_t i = 0; i < plan->n_arrays; i++)
        plan->clip_factors[i] *= options->clip_factor;
}

/* ---- The update pass ------------------------------------------------------------------------------------------------ */

static fs_stages stages_of(const fs_group *group, double clip_factor)
{
    return (fs_stages){
        .factor = group->maximize ? -clip_factor : clip_factor,
        .clip_value = group->clip_value,
        .weight_decay = group->decay_mode == FS_COUPLED ? group->weight_decay : 0.0,
        .l1 = group->l1,
    };
}

/* Whether anything is to be done but to multiply by the factor. */
static bool has_stages(const fs_stages *s)
{
    return s->clip_value < INFINITY || s->weight_decay != 0.0 || s->l1 != 0.0;
}

/* How many elements of the parameter lie before its next cache line: vectors that cross lines cost twice. */
static size_t before_cache_line(const fs_array *array, size_t start)
{
    const uintptr_t address = (uintptr_t)(array->operand[FS_PARAM].data + start * array->item);
    return -address % CACHE_LINE / array->item;
}

/* What is to be done to each run of an array. */
typedef struct {
    const fs_kernels *k;
    const fs_group *group;
    int rule;
    double decay;
    const double *coefs;
    fs_stages stages;
    double grad_scale, factor;    /* the factor is a multiplication that costs the rule nothing */
    bool zero, stage_grad, clip_units, limit_units, bound, average, clear;
    int n_operands;               /* of the rule: parameter, gradient, states */
} fs_work;

static fs_work work_on(const fs_pass *pass, size_t i)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_group *group = &pass->plan->groups[array->group];
    fs_work w = {.k = pass->kernels[array->real], .group = group, .grad_scale = pass->options->grad_scale};
    w.rule = group->rule;
    w.decay = group->decay;
    w.coefs = group->is_scaled ? pass->plan->coefs[i] : group->coefs;
    w.stages = stages_of(group, pass->plan->clip_factors[i]);
    w.zero = pass->options->nonfinite == FS_NONFINITE_ZERO && pass->plan->norms[i].n_nonfinite > 0;
    w.stage_grad = w.grad_scale != 1.0 || w.zero || has_stages(&w.stages);
    w.factor = w.stage_grad ? 1.0 : w.stages.factor;
    w.bound = group->lower > -INFINITY || group->upper < INFINITY;
    w.average = array->operand[FS_AVERAGE].data != NULL && group->average_weight != 0.0;
    w.clear = pass->options->clear_grads;
    w.n_operands = FS_STATE + fs_rule_states(group->rule);
    return w;
}

/* And to its units, if it has any. */
static void add_units(fs_work *w, const fs_array *array)
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

/* The gradient as the rule wants it. If it is changed on its way it goes to `room`. */
static const void *stage_gradient(const fs_work *w, size_t n, void *const *at, void *room)
{
    const void *grad = w->k->unscale(n, at[FS_GRAD], room, w->grad_scale, w->zero);
    if (w->clip_units)
        grad = w->k->multiply(n, grad, room, at[FS_GRAD_FACTOR]);
    return w->k->apply_stages(n, grad, room, at[FS_PARAM], &w->stages);
}

static void apply_rule(const fs_work *w, size_t n, void *const *at, void *room)
{
    const void *grad = w->stage_grad ? stage_gradient(w, n, at, room) : at[FS_GRAD];
    w->k->rule[w->rule](n, at[FS_PARAM], grad, &at[FS_STATE], w->factor, w->decay, w->coefs);
}

static void decay_after(const fs_work *w, size_t n, void *param)
{
    const fs_stages decay = {.factor = w->group->decay_after, .clip_value = INFINITY};
    w->k->apply_stages(n, param, param, NULL, &decay);
}

/* From the gradient to the new parameter. */
static void update_row(const fs_work *w, size_t n, void *const *at, void *room)
{
    apply_rule(w, n, at, room);
    if (w->group->decay_after != 1.0)
        decay_after(w, n, at[FS_PARAM]);
    if (w->bound) {
        if (w->limit_units)
            w->k->multiply(n, at[FS_PARAM], at[FS_PARAM], at[FS_PARAM_FACTOR]);
        w->k->bound(n, at[FS_PARAM], w->group->lower, w->group->upper);
    }
}

/* Arrays that are runs, to which nothing is done but what the rule does: in one go from the first cache line on. */
static void update_run(const fs_work *w, const fs_array *array, size_t start, size_t end)
{
    size_t count = end - start < FS_BLOCK / 4 ? 0 : before_cache_line(array, start);
    for (; start < end; start += count, count = 0) {
        void *at[FS_N_PLACES];
        count = count > 0 ? count : end - start;
        for (int o = 0; o < w->n_operands; o++)
            at[o] = array->operand[o].data + start * array->item;
        apply_rule(w, count, at, NULL);
    }
}

static void clear_tile(const fs_kernels *k, const fs_array *array, size_t t, void *copy)
{
    const fs_shape shape = fs_tile_shape(array, t);
    const fs_rows grad = fs_bring(k, array, FS_GRAD, t, copy);
    for (size_t r = 0; r < shape.n_rows; r++)
        memset(grad.first + (ptrdiff_t)r * grad.stride, 0, shape.n_columns * array->item);
    fs_take_back(k, array, FS_GRAD, t, copy);
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
        update_row(w, shape.n_columns, at, rows[FS_GRAD].first == copy[FS_GRAD] ? at[FS_GRAD] : copy[FS_GRAD]);
    }
    for (int o = 0; o < w->n_operands; o++)
        if (o != FS_GRAD)
            fs_take_back(w->k, array, o, t, copy[o]);
    if (w->average) {
        const fs_rows param = fs_bring(w->k, array, FS_PARAM, t, copy[FS_PARAM]);    /* as it is stored, rounded */
        const fs_rows average = fs_bring(w->k, array, FS_AVERAGE, t, copy[FS_AVERAGE]);
        for (size_t r = 0; r < shape.n_rows; r++)
            w->k->average(shape.n_columns, average.first + (ptrdiff_t)r * average.stride,
                          param.first + (ptrdiff_t)r * param.stride, w->group->average_weight);
        fs_take_back(w->k, array, FS_AVERAGE, t, copy[FS_AVERAGE]);
    }
    if (w->clear)
        clear_tile(w->k, array, t, copy[FS_GRAD]);
}

/* ---- All that takes several loops (stages, small states, residuals, statistics ...): piece by piece ---- */

static unsigned long long mix(unsigned long long z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Random bits for a piece, by seed, step, array, what they are for (pairs of states, 0 and 1, or the parameter), block and
 * place. */
enum { FOR_PARAM = 2 };

static void draw(const fs_work *w, const fs_plan *plan, size_t array, int use, size_t start, size_t count, uint32_t *random)
{
    const unsigned long long key = mix(mix(mix(plan->seed) + (unsigned long long)plan->step) + 4 * array + (unsigned)use);
    w->k->random(count, (uint32_t)mix(key + start / FS_BLOCK), start % FS_BLOCK, random);
}

/* So many elements go through all loops together where some are copied, in the first-level cache: a multiple of FS_SCALED.
 * Where sums are made it is FS_BLOCK. */
enum { PIECE = FS_BLOCK / 2 };

/* Whether all operands are runs to be used where they lie. */
static bool is_in_place(const fs_array *array)
{
    bool in_place = array->is_run && array->n_units == 0;
    for (int o = 0; o < FS_N_OPERANDS; o++)
        in_place = in_place && !array->operand[o].is_packed;
    return in_place;
}

/* What of a later piece is still to be fetched: loops over short pieces are too short for the CPU to look ahead. */
typedef struct { const fs_array *array; size_t start, count, byte; int operand; } fs_ahead;

static fs_ahead ahead_of(const fs_array *array, size_t start, size_t count)
{
    enum { AHEAD = 2 * PIECE };
    const bool is_there = count <= FS_BLOCK && start + AHEAD + count <= array->size;
    return (fs_ahead){.array = array, .start = start + AHEAD, .count = count, .operand = is_there ? 0 : FS_N_OPERANDS};
}

/* Between two loops; not all at once, since the CPU drops what it has no room for. */
static void fetch_some(fs_ahead *ahead)
{
    enum { AT_ONCE = 16 * CACHE_LINE };
    size_t left = AT_ONCE;
    for (; ahead->operand < FS_N_OPERANDS; ahead->operand++, ahead->byte = 0) {
        const fs_operand *operand = &ahead->array->operand[ahead->operand];
        const size_t item = fs_dtype_size(operand->dtype), size = operand->data ? ahead->count * item : 0;
        for (; ahead->byte < size; ahead->byte += CACHE_LINE, left -= CACHE_LINE) {
            if (left == 0)
                return;
            __builtin_prefetch(operand->data + ahead->start * item + ahead->byte);
        }
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

/* A block as it is before the update, in the tile, for the rule to work on while nothing changes. */
static void copy_block(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, fs_tile *tile)
{
    char *copy[FS_N_PLACES];
    for (int o = 0; o < FS_N_PLACES; o++)
        copy[o] = room_for(tile, o);
    for (int o = 0; o < w->n_operands; o++) {
        at[o] = copy[o];
        const void *found = fs_load_in_memory_order(w->k, array, o, start, count, at[o]);
        if (found != at[o])
            memcpy(at[o], found, count * array->item);
    }
    bring_factors(w, array, start, count, at, copy);
}

/* Whether norms scale the steps of a group. */
static bool has_direction(const fs_group *group)
{
    return fs_rule_direction(group->rule) != group->rule;
}

/* Those norms: of the parameter, with its decay, and of the direction of its step; nothing else changes. */
static void scale_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_plan *plan = pass->plan;
    const fs_array *array = &plan->arrays[i];
    fs_work w = work_on(pass, i);
    if (!has_direction(w.group))
        return;
    add_units(&w, array);
    const fs_stages decay = {.factor = w.decay, .clip_value = INFINITY};
    w.coefs = w.group->coefs;
    w.rule = fs_rule_direction(w.rule);
    w.decay = 1.0;
    for (; start < end; start += FS_BLOCK) {
        const size_t count = min_size(end - start, FS_BLOCK), block = plan->first_block[i] + start / FS_BLOCK;
        void *at[FS_N_PLACES];
        copy_block(&w, array, start, count, at, tile);
        w.k->apply_stages(count, at[FS_PARAM], at[FS_PARAM], NULL, &decay);
        w.k->sum_squares(count, at[FS_PARAM], 1.0, &plan->block_stats[FS_PARAM_SQUARES][block]);
        apply_rule(&w, count, at, at[FS_GRAD]);
        w.k->sum_squares(count, at[FS_PARAM], 1.0, &plan->block_stats[FS_UPDATE_SQUARES][block]);
    }
}

static void finish_stat(fs_plan *plan, int stat)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        plan->stats[stat][i] = pairwise_sum(plan->block_stats[stat] + plan->first_block[i],
                                            plan->first_block[i + 1] - plan->first_block[i]);
}

static void measure_directions(fs_pass *pass)
{
    pass->work = scale_work;
    run_pass(pass);
    finish_stat(pass->plan, FS_PARAM_SQUARES);
    finish_stat(pass->plan, FS_UPDATE_SQUARES);
}

/* Before anything else goes through these arrays: what is packed lies in that order. */
static void put_in_order_of_sums(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (has_direction(&plan->groups[plan->arrays[i].group]))
            fs_array_for_sums(&plan->arrays[i]);
}

/* An array's own coefficients, and its numbers after this step. */
static void scale_array(fs_plan *plan, size_t i)
{
    const fs_array *array = &plan->arrays[i];
    const fs_group *group = &plan->groups[array->group];
    const int n_numbers = fs_rule_numbers(group->rule);
    double numbers[FS_MAX_NUMBERS];
    for (int n = 0; n < n_numbers; n++)
        memcpy(&numbers[n], array->number[n], sizeof numbers[n]);
    memcpy(plan->coefs[i], group->coefs, sizeof plan->coefs[i]);
    fs_rule_scale(group->rule, group->hyper, sqrt(plan->stats[FS_PARAM_SQUARES][i]),
                  sqrt(plan->stats[FS_UPDATE_SQUARES][i]), numbers, plan->coefs[i]);
    for (int n = 0; n < n_numbers; n++)
        memcpy(array->number[n], &numbers[n], sizeof numbers[n]);
}

/* All that depends on whole arrays. */
static void scale_pass(fs_pass *pass)
{
    fs_plan *plan = pass->plan;
    bool any_measured = false;
    for (size_t i = 0; i < plan->n_groups; i++)
        any_measured = any_measured || has_direction(&plan->groups[i]);
    if (any_measured)
        measure_directions(pass);
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (plan->groups[plan->arrays[i].group].is_scaled)
            scale_array(plan, i);
}

/* ---- Units: slices of arrays, of which the norms are limited ---- */

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
    fs_work w = work_on(pass, i);
    add_units(&w, array);
    for (; start < end; start += FS_BLOCK) {
        const size_t count = min_size(end - start, FS_BLOCK);
        void *at[FS_N_PLACES], *run = tile;    /* where copy_block leaves the parameter, too */
        if (pass->measured == UNITS_OF_RESULT) {
            copy_block(&w, array, start, count, at, tile);
            apply_rule(&w, count, at, at[FS_GRAD]);
            if (w.group->decay_after != 1.0)
                decay_after(&w, count, at[FS_PARAM]);
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
    norm.exponent = rescue_exponent(norm.sum_squares);
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
    return norm < least ? limit / least : clip_factor(root, exponent, limit, 0.0);
}

static void set_factor(const fs_array *array, int o, size_t unit, double factor)
{
    char *place = array->operand[o].data + unit * array->item;
    const float single = (float)factor;
    memcpy(place, array->real == FS_FLOAT64 ? (const void *)&factor : &single, array->item);
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
    fs_work w = work_on(pass, i);
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
            set_factor(array, FS_GRAD_FACTOR, unit,
                       clip * unit_factor(root * clip, norm.exponent, array->unit_limits[unit], LEAST_GRAD));
        else
            set_factor(array, FS_PARAM_FACTOR, unit, unit_factor(root, norm.exponent, group->max_norm, 0.0));
    }
}

static void measure_units(fs_pass *pass, int measured)
{
    pass->measured = measured;
    pass->work = lay_out_work;
    run_pass(pass);
    pass->work = measure_units_work;
    run_pass(pass);
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

static void find_grad_factors(fs_pass *pass)
{
    if (clips_units(pass->plan)) {
        measure_units(pass, UNITS_OF_PARAM);
        measure_units(pass, UNITS_OF_GRAD);
    }
}

static void find_param_factors(fs_pass *pass)
{
    if (limits_units(pass->plan))
        measure_units(pass, UNITS_OF_RESULT);
}

/* ---- Updates ---- */

/* The parameter before and after the update of a block; the change goes where it was before. */
static void add_stats(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t count, void *before, char *copy)
{
    const size_t block = plan->first_block[i] + start / FS_BLOCK;
    const void *after = fs_load_in_memory_order(w->k, &plan->arrays[i], FS_PARAM, start, count, copy);
    w->k->sum_squares(count, after, 1.0, &plan->block_stats[FS_PARAM_SQUARES][block]);
    w->k->subtract(count, after, before);
    w->k->sum_squares(count, before, 1.0, &plan->block_stats[FS_UPDATE_SQUARES][block]);
}

static void count_zeros(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t count, const char *grad)
{
    double *zeros = &plan->block_stats[FS_ZERO_GRADS][plan->first_block[i] + start / FS_BLOCK];
    const size_t item = plan->arrays[i].item;
    for (size_t done = 0; done < count; done += FS_BLOCK)
        *zeros++ = (double)w->k->count_zeros(min_size(count - done, FS_BLOCK), grad + done * item);
}

static void update_pieces(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &plan->arrays[i];
    const bool in_place = is_in_place(array);
    const size_t piece = in_place ? LONG_RUN / array->item : plan->has_stats ? FS_BLOCK : PIECE;
    char *copy[FS_N_PLACES];
    for (int o = 0; o < FS_N_PLACES; o++)
        copy[o] = in_place ? (char *)tile : room_for(tile, o);    /* which then is for the gradient alone */
    char *before = in_place ? (char *)tile + LONG_RUN : copy[BEFORE];
    size_t count = array->is_run && !array->in_blocks ? before_cache_line(array, start) : 0;
    for (; start < end; start += count, count = 0) {
        void *at[FS_N_PLACES];
        uint32_t random[FS_BLOCK];
        count = min_size(end - start, count > 0 ? count : piece);
        fs_ahead ahead = ahead_of(array, start, count);
        for (int o = 0; o < w->n_operands; o++) {
            at[o] = fs_load_in_memory_order(w->k, array, o, start, count, copy[o]);
            fetch_some(&ahead);
        }
        bring_factors(w, array, start, count, at, copy);
        if (plan->has_stats) {
            memcpy(before, at[FS_PARAM], count * array->item);
            count_zeros(w, plan, i, start, count, at[FS_GRAD]);
            fetch_some(&ahead);
        }
        update_row(w, count, at, copy[FS_GRAD]);
        fetch_some(&ahead);
        if (array->rounding == FS_STOCHASTIC)
            draw(w, plan, i, FOR_PARAM, start, count, random);
        fs_store_in_memory_order(w->k, array, FS_PARAM, start, count, at[FS_PARAM], random);
        fetch_some(&ahead);
        for (int o = FS_STATE; o < w->n_operands; o++) {
            const int pair = (o - FS_STATE) / 2;
            const bool is_first = (o - FS_STATE) % 2 == 0;
            if (array->operand[o].is_packed && (is_first || !array->operand[o - 1].is_packed))
                draw(w, plan, i, pair, start, count, random);
            fs_store_in_memory_order(w->k, array, o, start, count, at[o], random);
            fetch_some(&ahead);
        }
        if (plan->has_stats) {
            add_stats(w, plan, i, start, count, before, copy[FS_PARAM]);
            fetch_some(&ahead);
        }
        if (w->average) {
            at[FS_PARAM] = fs_load_in_memory_order(w->k, array, FS_PARAM, start, count, copy[FS_PARAM]);    /* rounded */
            at[FS_AVERAGE] = fs_load_in_memory_order(w->k, array, FS_AVERAGE, start, count, copy[FS_AVERAGE]);
            w->k->average(count, at[FS_AVERAGE], at[FS_PARAM], w->group->average_weight);
            fs_store_in_memory_order(w->k, array, FS_AVERAGE, start, count, at[FS_AVERAGE], NULL);
            fetch_some(&ahead);
        }
        if (w->clear) {
            memset(at[FS_GRAD], 0, count * array->item);
            fs_store_in_memory_order(w->k, array, FS_GRAD, start, count, at[FS_GRAD], NULL);
        }
    }
}

static void update_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    fs_work w = work_on(pass, i);
    const bool rule_alone = !(w.stage_grad || w.bound || w.average || w.clear || w.group->decay_after != 1.0);
    if (array->is_run && rule_alone && !array->in_blocks) {
        update_run(&w, array, start, end);
        return;
    }
    if (array->is_dense || array->in_blocks) {
        add_units(&w, array);
        update_pieces(&w, pass->plan, i, start, end, tile);
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
    fs_pass pass = make_pass(plan, options);
    bool any_scaled = false;
    plan->step += 1.0;
    for (size_t i = 0; i < plan->n_groups; i++) {
        fs_group *group = &plan->groups[i];
        group->is_scaled = fs_rule_is_scaled(group->rule);
        any_scaled = any_scaled || group->is_scaled;
        fs_rule_prepare(group->rule, group->hyper, plan->step, group->coefs);
        const double decoupled = 1.0 - group->hyper[0] * group->weight_decay;
        group->decay = group->decay_mode == FS_DECOUPLED     ? decoupled
                       : group->decay_mode == FS_INDEPENDENT ? 1.0 - group->weight_decay
                                                             : 1.0;
        group->decay_after = group->decay_mode == FS_DECOUPLED_AFTER ? decoupled : 1.0;
    }
    if (any_scaled)
        put_in_order_of_sums(plan);
    find_grad_factors(&pass);
    if (any_scaled)
        scale_pass(&pass);
    find_param_factors(&pass);
    pass.work = update_work;
    run_pass(&pass);
    for (int s = 0; s < FS_N_STATS && plan->has_stats; s++)
        finish_stat(plan, s);
}

/* ---- Gradients alone ------------------------------------------------------------------------------------------------ */

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
        fs_store_in_memory_order(k, array, FS_GRAD, start, count, grad, NULL);
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
    if (stages.factor == 1.0 && !has_stages(&stages))
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
    fs_pass pass = make_pass(plan, options);
    find_grad_factors(&pass);
    pass.work = clip_work;
    run_pass(&pass);
}

static void clear_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    char *copy = (char *)tile + array->copy_offset[FS_GRAD];
    const size_t end_tile = fs_first_tile(array, end);
    for (size_t t = fs_first_tile(array, start); t < end_tile; t++)
        clear_tile(k, array, t, copy);
}

void fs_clear(fs_plan *plan, const fs_options *options)
{
    fs_pass pass = make_pass(plan, options);
    pass.work = clear_work;
    run_pass(&pass);
}
