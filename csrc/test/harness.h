/* What the tests stand on: checks, numbers in storage, plans over memory of their own. */
#ifndef HARNESS_H
#define HARNESS_H

#define _GNU_SOURCE    /* mmap, fork, alarm */
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

static bool quick;           /* whether to leave most cases of slow tests out, and to end with the first failure */
static int n_failures;       /* in the test that runs */
static char context[200];    /* which of a test's many cases; part of the failure message */

#define CONTEXT(...) snprintf(context, sizeof context, __VA_ARGS__)
#define CHECK(condition) check((condition), #condition, __LINE__)

static void check(bool holds, const char *condition, int line)
{
    if (!holds && ++n_failures <= 5)
        printf("%s:%d: CHECK(%s) failed: %s\n", __FILE__, line, condition, context);
    if (!holds && quick)
        _exit(1);
}

#define FOR_LEVELS(level)                                                  \
    for (fs_level level = FS_BASELINE; level < FS_N_LEVELS; level++)       \
        if (fs_level_set(level) == FS_OK)
#define FOR_RULES(rule) for (int rule = 0; rule < fs_rule_count(); rule++)

/* The linker sends the library's calls of calloc here (--wrap): after so many, one fails. */
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
static int callocs_left = -1;

void *__wrap_calloc(size_t n, size_t size)
{
    if (callocs_left >= 0 && callocs_left-- == 0)
        return NULL;
    return __real_calloc(n, size);
}

/* ---- Numbers in storage ------------------------------------------------------------------------------------------
 * Halves by definition: a significand of so many digits, and an exponent, in frexp's sense, not below the smallest. */

static const struct { int digits, min_exponent; } halves[] = {[FS_FLOAT16] = {11, -13}, [FS_BFLOAT16] = {8, -125}};

static double from_half(fs_dtype dtype, unsigned bits)
{
    const int digits = halves[dtype].digits, min_exponent = halves[dtype].min_exponent;
    const int hidden = 1 << (digits - 1), field = (int)(bits & 0x7fff) / hidden, fraction = (int)bits & (hidden - 1);
    double x;
    if (field == 0x7fff / hidden)
        x = fraction ? NAN : INFINITY;
    else if (field == 0)
        x = ldexp(fraction, min_exponent - digits);
    else
        x = ldexp(hidden + fraction, min_exponent - digits + field - 1);
    return bits & 0x8000 ? -x : x;
}

/* Round to nearest, ties to even. */
static uint16_t to_half(fs_dtype dtype, double x)
{
    const int digits = halves[dtype].digits, min_exponent = halves[dtype].min_exponent;
    const unsigned sign = signbit(x) ? 0x8000 : 0, hidden = 1u << (digits - 1), infinity = 0x8000 - hidden;
    int exponent;
    if (isnan(x))
        return (uint16_t)(sign | 0x7fff);
    if (isinf(x))
        return (uint16_t)(sign | infinity);
    frexp(x, &exponent);
    if (exponent < min_exponent || x == 0)
        exponent = min_exponent;
    const unsigned significand = (unsigned)nearbyint(fabs(ldexp(x, digits - exponent)));
    const unsigned bits = (unsigned)(exponent - min_exponent) * hidden + significand;
    return (uint16_t)(sign | (bits < infinity ? bits : infinity));
}

static double read_item(fs_dtype dtype, const char *item)
{
    float single;
    double x;
    uint16_t half;
    switch (dtype) {
    case FS_FLOAT32:
        memcpy(&single, item, sizeof single);
        return single;
    case FS_FLOAT64:
        memcpy(&x, item, sizeof x);
        return x;
    default:
        memcpy(&half, item, sizeof half);
        return from_half(dtype, half);
    }
}

static void write_item(fs_dtype dtype, char *item, double x)
{
    const float single = (float)x;
    uint16_t half;
    switch (dtype) {
    case FS_FLOAT32:
        memcpy(item, &single, sizeof single);
        break;
    case FS_FLOAT64:
        memcpy(item, &x, sizeof x);
        break;
    default:
        half = to_half(dtype, x);
        memcpy(item, &half, sizeof half);
    }
}

static uint64_t random_state;

static uint64_t random_bits(void)    /* splitmix64 */
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static double random_unit(void)
{
    return (double)(random_bits() >> 11) * 0x1p-53;
}

static double random_signed(void)    /* 1/8 to 1, of either sign */
{
    const double x = 0.125 + 0.875 * random_unit();
    return random_bits() & 1 ? -x : x;
}

/* ---- Plans over memory of our own -------------------------------------------------------------------------------- */

enum { N_DTYPES = 4, N_PAIRS = N_DTYPES * N_DTYPES };
enum { MIXED = N_DTYPES };    /* array by array, all pairs of types of parameter and gradient */

static const fs_operand *operand(fs_plan *plan, size_t i, int o)
{
    return &plan->arrays[i].operand[o];
}

static size_t operand_bytes(fs_plan *plan, size_t i, int o)
{
    return operand(plan, i, o)->data ? plan->arrays[i].size * fs_dtype_size(operand(plan, i, o)->dtype) : 0;
}

static double get(fs_plan *plan, size_t i, int o, size_t element)
{
    const fs_operand *at = operand(plan, i, o);
    return read_item(at->dtype, at->data + element * fs_dtype_size(at->dtype));
}

static void set(fs_plan *plan, size_t i, int o, size_t element, double x)
{
    const fs_operand *at = operand(plan, i, o);
    write_item(at->dtype, at->data + element * fs_dtype_size(at->dtype), x);
}

static void init_flat(fs_array *array, size_t size)
{
    const ptrdiff_t shape = (ptrdiff_t)size;
    CHECK(fs_array_init(array, 1, &shape) == FS_OK);
}

static void set_contiguous(fs_array *array, int o, void *data, fs_dtype dtype)
{
    const ptrdiff_t stride = (ptrdiff_t)fs_dtype_size(dtype);
    fs_array_set(array, o, data, dtype, true, &stride);
}

/* Contiguous arrays, all in the first of two groups. They have all the states, positive, so that any rule may be used, and
 * every other, the first too, has an average; the contents depend on the arguments alone. */
static fs_plan *make_plan(int storage, size_t n_arrays, const size_t *sizes)
{
    fs_plan *plan = fs_plan_new(n_arrays, 2, false);
    random_state = 1;
    for (size_t i = 0; i < n_arrays; i++) {
        fs_array *array = &plan->arrays[i];
        init_flat(array, sizes[i]);
        for (int o = 0; o < FS_N_OPERANDS; o++) {
            const fs_dtype mixed = (o == FS_GRAD ? i / N_DTYPES : i) % N_DTYPES;
            const fs_dtype dtype = storage == MIXED ? mixed : (fs_dtype)storage;
            if (o == FS_AVERAGE && (i + i / N_DTYPES) % 2 == 1)
                continue;
            set_contiguous(array, o, malloc(sizes[i] * fs_dtype_size(dtype) + !sizes[i]), dtype);
            for (size_t e = 0; e < sizes[i]; e++)
                set(plan, i, o, e, o < FS_STATE ? random_signed() : 0.125 + random_unit());
        }
    }
    CHECK(fs_plan_finish(plan) == FS_OK);
    return plan;
}

static void free_plan(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        for (int o = 0; o < FS_N_OPERANDS; o++)
            free(operand(plan, i, o)->data);
    fs_plan_free(plan);
}

/* A plan for as many arrays, of this shape, which are yet to be given a place. */
static fs_plan *make_plan_like(const fs_plan *model, int n_dims, const ptrdiff_t *shape)
{
    fs_plan *plan = fs_plan_new(model->n_arrays, model->n_groups, false);
    for (size_t i = 0; i < model->n_arrays; i++)
        CHECK(fs_array_init(&plan->arrays[i], n_dims, shape) == FS_OK);
    CHECK(fs_plan_finish(plan) == FS_OK);
    return plan;
}

static void copy_settings(fs_plan *to, const fs_plan *from)
{
    for (size_t i = 0; i < from->n_arrays; i++)
        to->arrays[i].group = from->arrays[i].group;
    memcpy(to->groups, from->groups, from->n_groups * sizeof *from->groups);
    to->step = from->step;
}

/* Between plans whose arrays are contiguous. */
static void copy_plan(fs_plan *to, fs_plan *from)
{
    copy_settings(to, from);
    for (size_t i = 0; i < from->n_arrays; i++)
        for (int o = 0; o < FS_N_OPERANDS; o++)
            if (operand(to, i, o)->data)
                memcpy(operand(to, i, o)->data, operand(from, i, o)->data, operand_bytes(from, i, o));
}

static bool same_operand(fs_plan *a, fs_plan *b, int o)
{
    for (size_t i = 0; i < a->n_arrays; i++)
        if (operand(a, i, o)->data && memcmp(operand(a, i, o)->data, operand(b, i, o)->data, operand_bytes(a, i, o)) != 0)
            return false;
    return true;
}

static bool same_plan(fs_plan *a, fs_plan *b)
{
    for (int o = 0; o < FS_N_OPERANDS; o++)
        if (!same_operand(a, b, o))
            return false;
    return a->step == b->step;
}

/* Three plans made alike: one to start from, one to step in a way known to be right, one to step in the way tested. */
typedef struct { fs_plan *initial, *expected, *plan; } trio;

static trio make_trio(int storage, size_t n_arrays, const size_t *sizes)
{
    return (trio){make_plan(storage, n_arrays, sizes), make_plan(storage, n_arrays, sizes),
                  make_plan(storage, n_arrays, sizes)};
}

static void free_trio(trio t)
{
    free_plan(t.initial);
    free_plan(t.expected);
    free_plan(t.plan);
}

static int find_rule(const char *name)
{
    FOR_RULES(rule)
        if (strcmp(fs_rule_name(rule), name) == 0)
            return rule;
    CONTEXT("no rule %s", name);
    CHECK(false);
    return 0;
}

static void use_rule(fs_group *group, int rule)
{
    static const struct { const char *name; double value; } known[] = {
        {"lr", 0.01}, {"eps", 1e-8}, {"lr_decay", 0.1}, {"momentum", 0.9}, {"dampening", 0.25}, {"rho", 0.9},
        {"alpha", 0.99}, {"beta1", 0.9}, {"beta2", 0.999}, {"convention", FS_TORCH},
    };
    *group = (fs_group){.rule = rule, .clip_value = INFINITY, .clip_norm_per_array = INFINITY,
                        .lower = -INFINITY, .upper = INFINITY};
    char names[100];
    snprintf(names, sizeof names, "%s", fs_rule_hyper_names(rule));
    char *rest;
    int n = 0;
    for (const char *name = strtok_r(names, " ", &rest); name; name = strtok_r(NULL, " ", &rest), n++) {
        group->hyper[n] = 0.5;    /* for a hyper-parameter that a later rule brings */
        for (size_t h = 0; h < LENGTH(known); h++)
            if (strcmp(known[h].name, name) == 0)
                group->hyper[n] = known[h].value;
    }
}

/* Options under which a contiguous array is updated where it lies, in one pass. */
static fs_options plain(fs_plan *plan, int rule)
{
    for (size_t g = 0; g < plan->n_groups; g++)
        use_rule(&plan->groups[g], rule);
    return (fs_options){.grad_scale = 1.0, .clip_norm = INFINITY, .clip_factor = 1.0, .clip_eps = 1e-6,
                        .nonfinite = FS_NONFINITE_PROPAGATE, .n_threads = 1};
}

/* Options that bring in everything there is. */
static fs_options busy(fs_plan *plan, int rule)
{
    fs_options options = plain(plan, rule);
    for (size_t g = 0; g < plan->n_groups; g++) {
        fs_group *group = &plan->groups[g];
        group->maximize = true;
        group->clip_norm_per_array = 1.0;
        group->clip_value = 0.25;
        group->weight_decay = 0.1;
        group->l1 = 0.01;
        group->lower = -0.75;
        group->upper = 0.625;
        group->average_weight = 0.25;
    }
    options.grad_scale = 3.0;
    options.clip_norm = 0.9;
    options.clip_factor = 0.75;
    options.nonfinite = FS_NONFINITE_STOP;
    return options;
}

static fs_report take_step(fs_plan *plan, fs_options options)
{
    fs_report report;
    fs_measure(plan, &options, &report);
    if (report.applied)
        fs_update(plan, &options);
    return report;
}

static fs_report clip(fs_plan *plan, fs_options options)
{
    fs_report report;
    fs_measure(plan, &options, &report);
    if (report.applied)
        fs_clip(plan, &options);
    return report;
}

static fs_report take_3_steps(fs_plan *plan, fs_options options)
{
    take_step(plan, options);
    take_step(plan, options);
    return take_step(plan, options);
}

#endif
