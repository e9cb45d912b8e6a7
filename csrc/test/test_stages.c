/* Tests of what comes before the rule and after it: norms, clipping, decay, inf and nan; bounds and averages. */
#include "harness.h"

static double measure_norm(fs_plan *plan, fs_options options)
{
    fs_report report;
    if (options.nonfinite == FS_NONFINITE_PROPAGATE)    /* would not measure it */
        options.nonfinite = FS_NONFINITE_STOP;
    fs_measure(plan, &options, &report);
    CHECK(report.has_norm);
    return report.grad_norm;
}

/* The root of a^2 + b^2, neither negative; more than a double holds stays that. (Under valgrind, hypotl overflows.) */
static wide wide_hypot(wide a, wide b)
{
    const wide large = fmaxl(a, b), ratio = fminl(a, b) / large;
    return large == 0 || large > DBL_MAX ? large : large * sqrtl(1 + ratio * ratio);
}

/* An array's norm, in units of so much. */
static wide wide_norm_of(fs_plan *plan, size_t i, double unit)
{
    const size_t size = plan->arrays[i].size;
    wide largest = 0, sum = 0;
    for (size_t e = 0; e < size; e++)
        largest = fmaxl(largest, fabsl(get(plan, i, FS_GRAD, e)));
    for (size_t start = 0; start < size && largest > 0; start += 1000) {
        wide part = 0;    /* under valgrind, wide is no wider than double */
        for (size_t e = start; e < size && e < start + 1000; e++) {
            const wide x = get(plan, i, FS_GRAD, e) / largest;
            part += x * x;
        }
        sum += part;
    }
    return largest / unit * sqrtl(sum);
}

static wide wide_norm(fs_plan *plan, double unit)
{
    wide norm = 0;
    for (size_t i = 0; i < plan->n_arrays; i++)
        norm = wide_hypot(norm, wide_norm_of(plan, i, unit));
    return norm;
}

void test_norms(void)
{
    static const size_t sizes[] = {150000, 1023, 62507, 37243};
    static const struct {
        fs_dtype storage;
        double magnitude[LENGTH(sizes)];    /* of each array */
        double decades;                     /* over which the elements of each array spread */
    } cases[] = {
        {FS_FLOAT32, {1, 1, 1, 1}, 0},
        {FS_FLOAT32, {1e-3, 10, 1, 1}, 6},
        {FS_FLOAT32, {1e30, 1e30, 1e30, 1e30}, 0},
        {FS_FLOAT32, {1e-44, 1e-40, 1e-38, 0}, 0},
        {FS_FLOAT32, {1e38, 1e-38, 0, 1}, 0},
        {FS_FLOAT32, {0, 0, 0, 0}, 0},
        {FS_FLOAT64, {1, 1, 1, 1}, 0},
        {FS_FLOAT64, {1, 1, 1, 1}, 140},
        {FS_FLOAT64, {1e300, 1e300, 1e300, 1e300}, 0},
        {FS_FLOAT64, {1e-300, 1e-300, 1e-300, 1e-300}, 0},
        {FS_FLOAT64, {1e-310, 1e-312, 1e-314, 1e-316}, 0},
        {FS_FLOAT64, {1e300, 1e-300, 1, 0}, 0},
        {FS_FLOAT64, {1e-300, 1, 0, 0}, 0},
        {FS_FLOAT64, {0, 0, 1e-300, 1e-290}, 0},
        {FS_FLOAT64, {1e150, 1e151, 1e149, 1e148}, 0},
        {FS_FLOAT64, {1e-136, 1e-138, 1e-135, 1e-137}, 0},
        {FS_FLOAT64, {1e-160, 1e160, 1e154, 1e-154}, 10},
        {FS_FLOAT64, {0, 0, 0, 0}, 0},
        {FS_FLOAT64, {0, 1e308, 0, 1e308}, 0},    /* more than a double holds */
    };
    fs_plan *plans[] = {make_plan(FS_FLOAT32, LENGTH(sizes), sizes), make_plan(FS_FLOAT64, LENGTH(sizes), sizes)};
    for (size_t c = 0; c < LENGTH(cases); c++) {
        fs_plan *plan = plans[cases[c].storage];
        fs_options options = plain(plan, 0);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++)
                set(plan, i, FS_GRAD, e, cases[c].magnitude[i] * random_signed() *
                    (cases[c].decades ? pow(10, cases[c].decades * (random_unit() - 0.5)) : 1));
        CHECK(fs_level_set(FS_BASELINE) == FS_OK);
        const double norm = measure_norm(plan, options);
        const wide truth = wide_norm(plan, 1);
        CONTEXT("case %zu: %.17g, not %.17Lg", c, norm, truth);
        if (truth > DBL_MAX)
            CHECK(norm == INFINITY);
        else
            CHECK(fabsl(norm - truth) <= 1e-14 * truth + DBL_TRUE_MIN);
        FOR_LEVELS(level)
            for (options.n_threads = 1; options.n_threads <= 3; options.n_threads++) {
                CONTEXT("case %zu, level %s, %d threads", c, fs_level_name(level), options.n_threads);
                CHECK(measure_norm(plan, options) == norm);
            }
    }
    free_plan(plans[0]);
    free_plan(plans[1]);
}

static void check_norm_of_nonfinite(int storage, size_t bad, int n_nan, int n_inf)
{
    static const size_t sizes[] = {2000, 0, 37};
    fs_plan *plan = make_plan(storage, LENGTH(sizes), sizes);
    fs_options options = plain(plan, 0);
    for (int e = 0; e < n_nan + n_inf; e++)
        set(plan, bad, FS_GRAD, sizes[bad] - 1 - (size_t)e, e < n_nan ? NAN : e % 2 ? INFINITY : -INFINITY);
    for (int policy = FS_NONFINITE_STOP; policy <= FS_NONFINITE_PROPAGATE; policy++)
        FOR_LEVELS(level) {
            CONTEXT("storage %d, array %zu: %d nan, %d inf, policy %d, level %s", storage, bad, n_nan, n_inf, policy,
                    fs_level_name(level));
            options.nonfinite = (fs_nonfinite)policy;
            const double norm = measure_norm(plan, options);
            if (policy == FS_NONFINITE_ZERO || n_nan + n_inf == 0)
                CHECK(isfinite(norm) && norm > 0);
            else
                CHECK(n_nan ? isnan(norm) : norm == INFINITY);
            for (size_t i = 0; i < LENGTH(sizes); i++)
                CHECK(plan->norms[i].n_nonfinite == (i == bad ? (size_t)(n_nan + n_inf) : 0));
        }
    for (int e = 0; e < n_nan + n_inf; e++)
        set(plan, bad, FS_GRAD, sizes[bad] - 1 - (size_t)e, 0);
    CHECK(isfinite(measure_norm(plan, options)) && plan->norms[bad].n_nonfinite == 0);
    free_plan(plan);
}

void test_norms_of_nonfinite(void)
{
    static const struct { int n_nan, n_inf; } cases[] = {{0, 0}, {1, 0}, {0, 1}, {1, 1}, {12, 0}, {0, 20}, {9, 7}};
    for (int storage = 0; storage < N_DTYPES; storage++)
        for (size_t c = 0; c < LENGTH(cases); c++) {
            check_norm_of_nonfinite(storage, 0, cases[c].n_nan, cases[c].n_inf);
            check_norm_of_nonfinite(storage, 2, cases[c].n_nan, cases[c].n_inf);
        }
}

/* One bad element, the first or last of the last array. */
static void check_nonfinite(trio t, double bad, bool is_first, int n_threads)
{
    const size_t n_arrays = t.initial->n_arrays, last = n_arrays - 1, e = is_first ? 0 : t.initial->arrays[last].size - 1;
    const double good = get(t.initial, last, FS_GRAD, e);
    CONTEXT("%zu arrays, %g, first %d, %d threads", n_arrays, bad, is_first, n_threads);
    fs_options options = plain(t.initial, find_rule("sgd_momentum"));
    options.n_threads = n_threads;
    t.initial->step = 7;
    set(t.initial, last, FS_GRAD, e, bad);

    options.nonfinite = FS_NONFINITE_STOP;
    copy_plan(t.plan, t.initial);
    fs_report report = take_step(t.plan, options);
    CHECK(!report.applied && report.has_norm && !report.is_finite && !isfinite(report.grad_norm));
    CHECK(same_plan(t.plan, t.initial));
    for (size_t i = 0; i < n_arrays; i++)
        CHECK(t.plan->norms[i].n_nonfinite == (i == last));

    options.nonfinite = FS_NONFINITE_ZERO;
    copy_plan(t.expected, t.initial);
    set(t.expected, last, FS_GRAD, e, 0.0);
    const fs_report expected_report = take_step(t.expected, options);
    report = take_step(t.plan, options);
    CHECK(report.applied && report.grad_norm == expected_report.grad_norm);
    CHECK(same_operand(t.plan, t.initial, FS_GRAD));
    set(t.plan, last, FS_GRAD, e, 0.0);
    CHECK(same_plan(t.plan, t.expected));

    options.nonfinite = FS_NONFINITE_PROPAGATE;
    copy_plan(t.plan, t.initial);
    report = take_step(t.plan, options);
    CHECK(report.applied && !report.has_norm);
    CHECK(report.is_finite);    /* as far as anybody has looked */
    CHECK(!isfinite(get(t.plan, last, FS_PARAM, e)) && !isfinite(get(t.plan, last, FS_STATE, e)));
    for (int o = 0; o < FS_N_OPERANDS; o++)
        if (operand(t.plan, last, o)->data)
            set(t.plan, last, o, e, get(t.expected, last, o, e));
    CHECK(same_plan(t.plan, t.expected));
    set(t.initial, last, FS_GRAD, e, good);
}

void test_nonfinite(void)
{
    enum { MIN_ARRAYS = 33, MAX_ARRAYS = MIN_ARRAYS + N_PAIRS - 1 };    /* the last has each pair of types once */
    static const size_t some_sizes[] = {6000, 1, 0, 2048, 5000, 77, 9100};
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    size_t sizes[MAX_ARRAYS];
    for (size_t n_arrays = MIN_ARRAYS; n_arrays <= MAX_ARRAYS; n_arrays++) {
        for (size_t i = 0; i < n_arrays; i++)
            sizes[i] = i == n_arrays - 1 ? 1500 : some_sizes[i % LENGTH(some_sizes)];
        const trio t = make_trio(MIXED, n_arrays, sizes);
        for (size_t b = 0; b < LENGTH(bad); b++)
            for (int n_threads = 1; n_threads <= 3; n_threads++)
                check_nonfinite(t, bad[b], n_threads == 2, n_threads);
        free_trio(t);
    }

    /* A finite gradient that unscaling makes infinite. */
    const size_t size = 40;
    const trio t = make_trio(FS_FLOAT32, 1, &size);
    fs_options options = plain(t.initial, find_rule("adam"));
    options.nonfinite = FS_NONFINITE_STOP;
    options.grad_scale = 1e-36;
    CONTEXT("grad_scale %g", options.grad_scale);
    set(t.initial, 0, FS_GRAD, 39, 1e4);
    copy_plan(t.plan, t.initial);
    CHECK(!take_step(t.plan, options).applied);
    CHECK(t.plan->norms[0].n_nonfinite == 1);
    CHECK(same_plan(t.plan, t.initial));
    free_trio(t);
}

/* What a step of plain gradient descent makes of a parameter and its gradient, stage by stage. */
#define STAGE_BY_STAGE(real)                                                                                     \
    static void stages_in_##real(const fs_group *group, double grad_scale, double clip_factor, double *param,    \
                                 double *grad)                                                                   \
    {                                                                                                            \
        const real bound = (real)group->clip_value;                                                              \
        real p = (real)*param, g = (real)*grad;                                                                  \
        g = g / (real)grad_scale;                                                                                \
        if (group->maximize)                                                                                     \
            g = -g;                                                                                              \
        g = g * (real)clip_factor;                                                                               \
        g = g > bound ? bound : g < -bound ? -bound : g;                                                         \
        if (group->weight_decay != 0 && group->decay_mode == FS_COUPLED)                                         \
            g = g + (real)group->weight_decay * p;                                                               \
        if (group->l1 != 0)                                                                                      \
            g = g + (p > 0 ? (real)group->l1 : p < 0 ? -(real)group->l1 : 0);                                    \
        if (group->decay_mode == FS_DECOUPLED)                                                                   \
            p = p * (real)(1.0 - group->hyper[0] * group->weight_decay);                                         \
        if (group->decay_mode == FS_INDEPENDENT)                                                                 \
            p = p * (real)(1.0 - group->weight_decay);                                                           \
        p = p - (real)group->hyper[0] * g;                                                                       \
        if (group->decay_mode == FS_DECOUPLED_AFTER)                                                             \
            p = p * (real)(1.0 - group->hyper[0] * group->weight_decay);                                         \
        *param = p;                                                                                              \
        *grad = g;                                                                                               \
    }

STAGE_BY_STAGE(float)
STAGE_BY_STAGE(double)

/* Bits of `on` in the tests below; where nothing but clipping is on, fs_clip is tested too. */
enum {
    CLIP_VALUE = 1, CLIP_PER_ARRAY = 2, CLIP_GLOBAL = 4, CLIPPING = 7,
    MAXIMIZE = 8, GRAD_SCALE = 16, CLIP_FACTOR = 32, DECAY = 64, L1 = 128, MODE = 256, ALL = 1023    /* of four modes */
};

/* Values of what can be on. */
typedef struct { double clip_value, per_array, global, eps, grad_scale, clip_factor, decay, l1; } stage_values;

static void check_stages(trio t, fs_plan *clipped, int on, const stage_values *values)
{
    fs_options options = plain(t.initial, find_rule("sgd"));
    fs_group *group = &t.initial->groups[0];
    group->maximize = on & MAXIMIZE;
    group->clip_value = on & CLIP_VALUE ? values->clip_value : INFINITY;
    group->clip_norm_per_array = on & CLIP_PER_ARRAY ? values->per_array : INFINITY;
    group->weight_decay = on & DECAY ? values->decay : 0.0;
    group->decay_mode = (fs_decay)(on / MODE);
    group->l1 = on & L1 ? values->l1 : 0.0;
    options.nonfinite = FS_NONFINITE_STOP;
    options.grad_scale = on & GRAD_SCALE ? values->grad_scale : 1.0;
    options.clip_norm = on & CLIP_GLOBAL ? values->global : INFINITY;
    options.clip_eps = values->eps;
    options.clip_factor = on & CLIP_FACTOR ? values->clip_factor : 1.0;
    options.n_threads = on % 7 ? 1 : 3;
    copy_plan(t.plan, t.initial);
    copy_plan(t.expected, t.initial);
    copy_plan(clipped, t.initial);
    const fs_report report = take_step(t.plan, options);
    CHECK(report.applied);

    double squares[3], factors[3], smallest = 1.0;
    for (int i = 0; i < 3; i++) {
        squares[i] = t.plan->norms[i].sum_squares;
        CHECK(t.plan->norms[i].exponent == 0);
        factors[i] = fmin(1.0, group->clip_norm_per_array / (sqrt(squares[i]) + values->eps));
    }
    CHECK(report.grad_norm == sqrt(squares[0] + squares[1] + squares[2]));
    for (int i = 0; i < 3 && on & CLIP_PER_ARRAY; i++) {
        const double clipped_norm = sqrt(squares[i]) * factors[i];
        squares[i] = clipped_norm * clipped_norm;
    }
    const double norm = sqrt(squares[0] + squares[1] + squares[2]);
    for (size_t i = 0; i < 3; i++) {
        factors[i] *= fmin(1.0, options.clip_norm / (norm + values->eps));
        smallest = fmin(smallest, factors[i]);
        for (size_t e = 0; e < t.initial->arrays[i].size; e++) {
            double p = get(t.initial, i, FS_PARAM, e), g = get(t.initial, i, FS_GRAD, e);
            const double factor = factors[i] * options.clip_factor;
            if (t.initial->arrays[i].real == FS_FLOAT32)
                stages_in_float(group, options.grad_scale, factor, &p, &g);
            else
                stages_in_double(group, options.grad_scale, factor, &p, &g);
            set(t.expected, i, FS_PARAM, e, p);
            set(clipped, i, FS_GRAD, e, g);
        }
    }
    CHECK(report.clip_factor == smallest);
    t.expected->step = 1;
    CHECK(same_plan(t.plan, t.expected));

    if ((on & ~CLIPPING) == 0) {
        fs_report clip_report;
        copy_plan(t.plan, t.initial);
        clip_report = clip(t.plan, options);
        CHECK(clip_report.applied && clip_report.grad_norm == report.grad_norm);
        CHECK(same_plan(t.plan, clipped));
    }
}

void test_stages(void)
{
    static const size_t sizes[] = {1030, 5, 70};
    static const stage_values values[] = {
        {.clip_value = 0.03, .per_array = 2.0, .global = 1.5, .eps = 1e-6,
         .grad_scale = 3.0, .clip_factor = 0.7, .decay = 0.1, .l1 = 0.01},
        {.clip_value = 2.0, .per_array = 3.0, .global = 4.0, .eps = 0.5,
         .grad_scale = 0.125, .clip_factor = 2.0, .decay = 1.0, .l1 = 1.0},
        {.clip_value = 1.0, .per_array = 1.0, .global = 1.0, .eps = 0.0,
         .grad_scale = 0.125, .clip_factor = 0.0, .decay = 2.0, .l1 = 2.0},
    };
    for (int storage = 0; storage < N_DTYPES; storage++) {
        const trio t = make_trio(storage, 3, sizes);
        fs_plan *clipped = make_plan(storage, 3, sizes);
        set(t.initial, 0, FS_PARAM, 1, 0.0);
        set(t.initial, 0, FS_PARAM, 2, -0.0);
        set(t.initial, 0, FS_GRAD, 2, -0.0);
        set(t.initial, 0, FS_GRAD, 3, -0.0);
        set(t.initial, 0, FS_PARAM, 4, 1.0);
        set(t.initial, 1, FS_GRAD, 0, 3.0);
        for (int on = 0; on <= ALL; on++)
            for (size_t v = 0; v < LENGTH(values); v++) {
                CONTEXT("storage %d, stages %x, values %zu", storage, (unsigned)on, v);
                check_stages(t, clipped, on, &values[v]);
            }
        free_trio(t);
        free_plan(clipped);
    }
}

void test_clip_nonfinite(void)
{
    static const size_t sizes[] = {3, 10};
    const trio t = make_trio(FS_FLOAT64, 2, sizes);
    fs_options options = plain(t.initial, 0);
    fs_report report;
    t.initial->groups[0].clip_value = 0.5;
    set(t.initial, 0, FS_GRAD, 0, NAN);
    set(t.initial, 0, FS_GRAD, 1, INFINITY);
    set(t.initial, 0, FS_GRAD, 2, -INFINITY);
    copy_plan(t.plan, t.initial);
    options.nonfinite = FS_NONFINITE_STOP;
    report = clip(t.plan, options);
    CHECK(!report.applied);
    CHECK(same_plan(t.plan, t.initial));
    options.nonfinite = FS_NONFINITE_PROPAGATE;
    report = clip(t.plan, options);
    CHECK(report.applied);
    CHECK(isnan(get(t.plan, 0, FS_GRAD, 0)));
    CHECK(get(t.plan, 0, FS_GRAD, 1) == 0.5 && get(t.plan, 0, FS_GRAD, 2) == -0.5);

    /* What is wrong in one array does not concern the other. */
    t.initial->groups[0].clip_value = INFINITY;
    t.initial->groups[0].clip_norm_per_array = 1.0;
    copy_plan(t.plan, t.initial);
    report = clip(t.plan, options);
    CHECK(report.applied && isnan(report.grad_norm) && isnan(report.clip_factor));
    CHECK(isnan(get(t.plan, 0, FS_GRAD, 1)) && fabsl(wide_norm_of(t.plan, 1, 1) - 1) < 1e-5L);
    free_trio(t);
}

/* What clipping makes of the norms of two arrays, with its `small` of 1e-6; returns that of both together. */
static wide clipped_norm(const wide *norms, wide per_array, wide global, wide small)
{
    wide clipped[2], both;
    for (int i = 0; i < 2; i++)
        clipped[i] = norms[i] * fminl(1, per_array / (norms[i] + small));
    both = wide_hypot(clipped[0], clipped[1]);
    return both * fminl(1, global / (both + small));
}

/* Squares that a double does not hold; with DBL_MAX, not even the norm. */
void test_clip_magnitudes(void)
{
    static const size_t sizes[] = {3, 1000};
    static const double magnitudes[] = {DBL_MAX, 1e300, 1e160, 100, 1e-160, 1e-300}, limits[] = {1, 1e200};
    static const int cases[] = {CLIP_PER_ARRAY, CLIP_GLOBAL, CLIP_PER_ARRAY | CLIP_GLOBAL};
    const trio t = make_trio(FS_FLOAT64, 2, sizes);
    for (size_t m = 0; m < LENGTH(magnitudes); m++)
        for (size_t c = 0; c < LENGTH(limits) * LENGTH(cases); c++) {
            const double limit = limits[c % 2], unit = magnitudes[m] > 1 ? 0x1p64 : 1;    /* for norms a double holds */
            const int on = cases[c / 2];
            const double per_array = on & CLIP_PER_ARRAY ? 3 * limit : INFINITY;
            const double global = on & CLIP_GLOBAL ? 2 * limit : INFINITY;
            wide norms[2];
            fs_options options = plain(t.initial, 0);
            options.clip_norm = global;
            t.initial->groups[0].clip_norm_per_array = per_array;
            for (size_t i = 0; i < LENGTH(sizes); i++) {
                for (size_t e = 0; e < sizes[i]; e++)
                    set(t.initial, i, FS_GRAD, e, magnitudes[m] * random_signed());
                norms[i] = wide_norm_of(t.initial, i, unit);
            }
            copy_plan(t.plan, t.initial);
            const fs_report report = clip(t.plan, options);
            const wide norm = wide_norm(t.plan, unit);
            const wide wanted = clipped_norm(norms, per_array / unit, global / unit, 1e-6L / unit);
            CONTEXT("magnitude %g, clipping %x to %g: norm %.17Lg, not %.17Lg", magnitudes[m], (unsigned)on, limit, norm,
                    wanted);
            CHECK(fabsl(norm - wanted) <= 1e-13L * wanted);
            if (magnitudes[m] < limit)
                CHECK(report.clip_factor == 1 && same_plan(t.plan, t.initial));
        }
    free_trio(t);
}

/* Bounds on the parameter, then its average, which sees what is stored. */
void test_after_the_rule(void)
{
    static const size_t sizes[] = {1, 5, 1030, 77, 2, 300};
    for (int storage = 0; storage <= MIXED; storage++) {
        const trio t = make_trio(storage, LENGTH(sizes), sizes);
        fs_options options = plain(t.plan, find_rule("sgd"));
        plain(t.expected, find_rule("sgd"));
        for (int turn = 0; turn < 7; turn++) {
            const double lower = turn & 1 ? -1.25 : -INFINITY, upper = turn & 2 ? 1.5 : INFINITY;
            /* In turns 4 and 6 the first step is to copy the parameter, unless averages are not touched; in 5 it is over. */
            const bool copies_first = turn >= 4;
            const double given = turn == 6 ? 0.0 : turn < 4 && turn & 1 ? 1.0 : 0.25, weight = turn == 4 ? 1.0 : given;
            CONTEXT("storage %d, turn %d", storage, turn);
            copy_plan(t.plan, t.initial);
            copy_plan(t.expected, t.initial);
            plain(t.expected, find_rule("sgd"));
            plain(t.plan, find_rule("sgd"));
            for (int p = 0; p <= 1; p++) {
                fs_group *group = p ? t.plan->groups : t.expected->groups;
                group->hyper[0] = 2.0;
                group->weight_decay = 0.125;
                group->decay_mode = FS_DECOUPLED_AFTER;
            }
            t.plan->groups[0].lower = lower;
            t.plan->groups[0].upper = upper;
            t.plan->groups[0].average_weight = given;
            t.plan->groups[0].average_copies_first = copies_first;
            t.plan->step = turn == 5;
            options.clear_grads = turn == 3;
            take_step(t.plan, options);
            options.clear_grads = false;
            take_step(t.expected, options);
            for (size_t i = 0; i < LENGTH(sizes); i++)
                for (size_t e = 0; e < sizes[i]; e++) {
                    const double free = get(t.expected, i, FS_PARAM, e), param = get(t.plan, i, FS_PARAM, e);
                    CHECK(param == (free < lower ? lower : free > upper ? upper : free));
                    CHECK(get(t.plan, i, FS_GRAD, e) == (turn == 3 ? 0.0 : get(t.initial, i, FS_GRAD, e)));
                    if (!operand(t.plan, i, FS_AVERAGE)->data)
                        continue;
                    const double old = get(t.initial, i, FS_AVERAGE, e), new = get(t.plan, i, FS_AVERAGE, e);
                    const bool in_double = operand(t.plan, i, FS_PARAM)->dtype == FS_FLOAT64;
                    const float in_float = (float)old + (float)weight * ((float)param - (float)old);
                    double stored[1];
                    if (weight == 0.0)
                        CHECK(new == old);
                    write_item(operand(t.plan, i, FS_AVERAGE)->dtype, (char *)stored,
                               in_double ? old + weight * (param - old) : in_float);
                    CHECK(new == read_item(operand(t.plan, i, FS_AVERAGE)->dtype, (char *)stored));
                }
        }
        free_trio(t);
    }
}

/* A grad_scale of 2 and gradients twice as large change nothing. */
void test_grad_scale(void)
{
    static const size_t sizes[] = {3000, 17};
    const trio t = make_trio(FS_FLOAT32, LENGTH(sizes), sizes);
    for (int is_busy = 0; is_busy <= 1; is_busy++) {
        CONTEXT("busy %d", is_busy);
        fs_options options = is_busy ? busy(t.initial, find_rule("adam")) : plain(t.initial, find_rule("adam"));
        copy_plan(t.expected, t.initial);
        copy_plan(t.plan, t.initial);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++)
                set(t.plan, i, FS_GRAD, e, 2 * get(t.initial, i, FS_GRAD, e));
        options.grad_scale = 1;
        const fs_report expected = take_3_steps(t.expected, options);
        options.grad_scale = 2;
        const fs_report report = take_3_steps(t.plan, options);
        CHECK(report.grad_norm == expected.grad_norm && report.clip_factor == expected.clip_factor);
        for (int o = 0; o < FS_N_OPERANDS; o++)
            CHECK(o == FS_GRAD || same_operand(t.plan, t.expected, o));
    }
    free_trio(t);
}

/* Parameters of one plan are the gradients of another, which need not look at them: their squares are known. */
static void check_sums(fs_plan *sums, fs_plan *plan, fs_options options, double divisor)
{
    fs_options adding = plain(sums, find_rule("sgd"));
    adding.squares_divisor = divisor;
    adding.n_threads = options.n_threads;
    take_step(sums, adding);
    const double measured = measure_norm(plan, options);
    options.sums = sums;
    CHECK(measure_norm(plan, options) == measured);
    for (size_t i = 0; i < plan->n_arrays; i++)
        if (plan->arrays[i].size > 0) {
            const double x = get(sums, i, FS_PARAM, 0);
            set(sums, i, FS_PARAM, 0, 100.0);
            CHECK((measure_norm(plan, options) == measured) == (divisor == options.grad_scale));
            set(sums, i, FS_PARAM, 0, x);
        }
}

void test_sums(void)
{
    static const size_t sizes[] = {20 * FS_BLOCK + 7, 0, 1, FS_BLOCK, 3 * FS_BLOCK - 1};
    static const double divisors[] = {1.0, 3.0, 0.0};
    FOR_LEVELS(level)
        for (fs_dtype storage = FS_FLOAT32; storage <= FS_FLOAT64; storage++)
            for (size_t d = 0; d < LENGTH(divisors); d++) {
                fs_plan *sums = make_plan((int)storage, LENGTH(sizes), sizes);
                fs_plan *plan = make_plan((int)storage, LENGTH(sizes), sizes);
                fs_options options = plain(plan, 0);
                void *own[LENGTH(sizes)];
                options.grad_scale = 3.0;
                for (size_t i = 0; i < LENGTH(sizes); i++) {
                    own[i] = plan->arrays[i].operand[FS_GRAD].data;
                    set_contiguous(&plan->arrays[i], FS_GRAD, sums->arrays[i].operand[FS_PARAM].data, storage);
                }
                for (options.n_threads = 1; options.n_threads <= 3; options.n_threads += 2) {
                    CONTEXT("level %s, type %d, divisor %g, %d threads", fs_level_name(level), (int)storage, divisors[d],
                            options.n_threads);
                    check_sums(sums, plan, options, divisors[d]);
                }
                for (size_t i = 0; i < LENGTH(sizes); i++)
                    set_contiguous(&plan->arrays[i], FS_GRAD, own[i], storage);
                free_plan(sums);
                free_plan(plan);
            }
}
