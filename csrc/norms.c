/* The norm pass: the norms of gradients, and the factors that clip them. */
#include "engine.h"

#include <math.h>
#include <string.h>

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

/* So many elements are loaded at a time; of a transposed gradient as many as fit, for its cache lines to be used while they
 * are here. */
static size_t load_size(const fs_array *array)
{
    return array->grad_is_transposed ? sizeof(fs_tile) / array->item / FS_BLOCK * FS_BLOCK : LONG_RUN / array->item;
}

/* Whether the plan that added these gradients up has left their squares, divided by what they are divided by now. */
static bool squares_are_known(const fs_pass *pass, size_t i)
{
    const fs_plan *sums = pass->options->sums;
    return sums && sums->squares_divisor == pass->options->grad_scale && fs_is_in_c_order(&sums->arrays[i]) &&
           sums->arrays[i].real == pass->plan->arrays[i].real;
}

static void sum_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    const fs_kernels *k = pass->kernels[array->real];
    const size_t step = load_size(array);
    double *sums = pass->plan->block_sums + pass->plan->first_block[i];
    if (squares_are_known(pass, i)) {
        const double *known = pass->options->sums->block_stats[FS_PARAM_SQUARES] + pass->plan->first_block[i];
        const size_t first = start / FS_BLOCK;
        memcpy(&sums[first], &known[first], (ratio_up(end, FS_BLOCK) - first) * sizeof *sums);
        return;
    }
    for (; start < end; start += step) {
        const size_t count = min_size(end - start, step);
        k->sum_squares(count, load_gradient(pass, array, start, count, false, tile), 1.0, &sums[start / FS_BLOCK]);
    }
}

double fs_pairwise_sum(double *values, size_t n)
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

void fs_finish_stat_of(fs_plan *plan, int stat, size_t i)
{
    plan->stats[stat][i] = fs_pairwise_sum(plan->block_stats[stat] + plan->first_block[i],
                                           plan->first_block[i + 1] - plan->first_block[i]);
}

void fs_finish_stat(fs_plan *plan, int stat)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        fs_finish_stat_of(plan, stat, i);
}

/* Squares of finite doubles may overflow or vanish. The plain sum is taken when it is surely good; beyond that the array
 * is summed again, scaled by a power of two. The decision depends on the values alone. */
static const double BIG_SUM = 0x1p1000, SMALL_SUM = 0x1p-900;

int fs_rescue_exponent(double sum_squares)
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
    return fs_pairwise_sum(sums, plan->first_block[i + 1] - plan->first_block[i]);
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

static void finish_unusual_sum(const fs_pass *pass, size_t i)
{
    const fs_array *array = &pass->plan->arrays[i];
    fs_norm *norm = &pass->plan->norms[i];
    fs_tile tile;
    const bool zero = pass->options->nonfinite == FS_NONFINITE_ZERO;
    if (!isfinite(norm->sum_squares)) {
        size_t n_nan = 0, n_inf = 0;
        count_nonfinite(pass, array, &n_nan, &n_inf, &tile);
        norm->n_nonfinite = n_nan + n_inf;
        if (zero)
            norm->sum_squares = scaled_sum(pass, i, zero, 1.0, &tile);
    }
    if (array->real == FS_FLOAT32)
        return;
    norm->exponent = fs_rescue_exponent(norm->sum_squares);
    if (norm->exponent != 0)
        norm->sum_squares = scaled_sum(pass, i, zero, ldexp(1.0, -norm->exponent), &tile);
}

static void finish_array_sum(const fs_pass *pass, size_t i)
{
    fs_plan *plan = pass->plan;
    fs_norm *norm = &plan->norms[i];
    double *sums = plan->block_sums + plan->first_block[i];
    norm->sum_squares = fs_pairwise_sum(sums, plan->first_block[i + 1] - plan->first_block[i]);
    norm->exponent = 0;
    norm->n_nonfinite = 0;
    if (plan->arrays[i].real == FS_FLOAT32 ? !isfinite(norm->sum_squares)
                                           : !(norm->sum_squares >= SMALL_SUM && norm->sum_squares <= BIG_SUM))
        finish_unusual_sum(pass, i);
}

double fs_clip_factor(double root, int exponent, double max_norm, double eps)
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
    *root = sqrt(fs_pairwise_sum(plan->array_sums, plan->n_arrays));
}

/* The same with each array's norm first scaled by its own factor, which can be as tiny as the norm was large. What still
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
    *root = sqrt(fs_pairwise_sum(plan->array_sums, plan->n_arrays));
}

static void measure_norms(fs_plan *plan, const fs_options *options, fs_report *report, double *root, int *exponent)
{
    fs_pass pass = fs_make_pass(plan, options);
    pass.work = sum_work;
    fs_run_pass(&pass);
    report->has_norm = true;
    for (size_t i = 0; i < plan->n_arrays; i++) {
        finish_array_sum(&pass, i);
        report->is_finite = report->is_finite && plan->norms[i].n_nonfinite == 0;
    }
    combine_arrays(plan, root, exponent);
    report->grad_norm = ldexp(*root, *exponent);
}

static bool clips_arrays(const fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_groups; i++)
        if (plan->groups[i].clip_norm_per_array < INFINITY)
            return true;
    return false;
}

/* The factors of arrays with limits of their own. */
static void clip_arrays(fs_plan *plan, double eps)
{
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const fs_norm *norm = &plan->norms[i];
        const double limit = plan->groups[plan->arrays[i].group].clip_norm_per_array;
        plan->clip_factors[i] = limit < INFINITY ? fs_clip_factor(sqrt(norm->sum_squares), norm->exponent, limit, eps) : 1.0;
    }
}

void fs_measure(fs_plan *plan, const fs_options *options, fs_report *report)
{
    const bool has_own = clips_arrays(plan);
    double root, factor = 1.0;
    int exponent;
    *report = (fs_report){.is_finite = true, .clip_factor = 1.0};
    if (options->nonfinite != FS_NONFINITE_PROPAGATE || options->clip_norm < INFINITY || plan->has_stats || has_own)
        measure_norms(plan, options, report, &root, &exponent);
    if (has_own)
        clip_arrays(plan, options->clip_eps);
    if (options->clip_norm < INFINITY) {
        if (has_own)
            combine_clipped_arrays(plan, &root, &exponent);
        factor = fs_clip_factor(root, exponent, options->clip_norm, options->clip_eps);
    }
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const double of_norms = has_own ? plan->clip_factors[i] * factor : factor, all = of_norms * options->clip_factor;
        if (of_norms < report->clip_factor || isnan(of_norms))
            report->clip_factor = of_norms;
        if (plan->clip_factors[i] != all)    /* or other threads would have to fetch it again */
            plan->clip_factors[i] = all;
    }
    report->applied = report->is_finite || options->nonfinite != FS_NONFINITE_STOP;
}
