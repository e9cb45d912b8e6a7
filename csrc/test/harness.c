#include "harness.h"

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

bool quick;
int n_failures;
char context[200];
int callocs_left = -1;
int n_passes = 0;

void check(bool holds, const char *condition, const char *file, int line)
{
    if (!holds && ++n_failures <= 5)
        printf("%s:%d: CHECK(%s) failed: %s\n", file, line, condition, context);
    if (!holds && quick)
        _exit(1);
}

/* The linker sends the library's calls of calloc here (--wrap): after so many, one fails. */
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);

void *__wrap_calloc(size_t n, size_t size)
{
    if (callocs_left >= 0 && callocs_left-- == 0)
        return NULL;
    return __real_calloc(n, size);
}

/* Likewise the calls of a team. */
void __real_fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context);
void __wrap_fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context);

void __wrap_fs_team_run(int n_threads, size_t n_elements, fs_part *part, const void *context)
{
    n_passes++;
    __real_fs_team_run(n_threads, n_elements, part, context);
}

/* ---- Numbers in storage ------------------------------------------------------------------------------------------
 * Halves by definition: a significand of so many digits, and an exponent, in frexp's sense, not below the smallest. */

static const struct { int digits, min_exponent; } halves[] = {[FS_FLOAT16] = {11, -13}, [FS_BFLOAT16] = {8, -125}};

double from_half(fs_dtype dtype, unsigned bits)
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

uint16_t to_half(fs_dtype dtype, double x)
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

bool same_half(fs_dtype dtype, uint16_t a, uint16_t b)
{
    return a == b || (isnan(from_half(dtype, a)) && isnan(from_half(dtype, b)));
}

double read_item(fs_dtype dtype, const char *item)
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

void write_item(fs_dtype dtype, char *item, double x)
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

uint64_t random_state;

uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

uint64_t random_bits(void)
{
    const uint64_t bits = mix(random_state);
    random_state += 0x9e3779b97f4a7c15;
    return bits;
}

double random_unit(void)
{
    return (double)(random_bits() >> 11) * 0x1p-53;
}

double random_signed(void)
{
    const double x = 0.125 + 0.875 * random_unit();
    return random_bits() & 1 ? -x : x;
}

uint32_t random_float_bits(void)
{
    static const uint32_t edges[] = {
        0, 1, 0x007fffff, 0x00800000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fc00000, 0x7fffffff,
        0x7f7f0000, 0x7f7f7fff, 0x7f7f8000, 0x7f7f8001,                 /* the largest bfloat16; its end */
        0x477fe000, 0x477fefff, 0x477ff000, 0x477ff001, 0x47800000,     /* 65504; 65519.99; 65520; 65536 */
        0x38800000, 0x387fffff, 0x387ff000, 0x387fefff, 0x387fe000,     /* 2^-14 and below */
        0x33800000, 0x33000000, 0x33000001, 0x32ffffff, 0x33c00000,     /* 2^-24; its half; 1.5 times */
        0x00008000, 0x00008001, 0x00007fff, 0x00018000,                 /* half of the smallest bfloat16; 1.5 times */
    };
    const uint64_t r = random_bits();
    const uint32_t bits = (uint32_t)r, near_half_range = (bits & 0x807fffff) | (100 + (r >> 32) % 46) << 23;
    const uint32_t nudge = (uint32_t)(r >> 40) % 3 - 1;
    switch (r >> 61) {
    case 0:
        return edges[(r >> 32) % LENGTH(edges)] | (bits & 0x80000000);
    case 1:
        return bits;
    case 2:
    case 3:
        return near_half_range;
    case 4:
    case 5:
        return (near_half_range & ~0xfffu) + nudge;     /* ties of float16 */
    default:
        return (bits & ~0x7fffu) + nudge;               /* ties of bfloat16 */
    }
}

/* ---- Plans over memory of our own -------------------------------------------------------------------------------- */

const fs_operand *operand(fs_plan *plan, size_t i, int o)
{
    return &plan->arrays[i].operand[o];
}

size_t operand_bytes(fs_plan *plan, size_t i, int o)
{
    return operand(plan, i, o)->data ? plan->arrays[i].size * fs_dtype_size(operand(plan, i, o)->dtype) : 0;
}

double get(fs_plan *plan, size_t i, int o, size_t element)
{
    const fs_operand *at = operand(plan, i, o);
    return read_item(at->dtype, at->data + element * fs_dtype_size(at->dtype));
}

void set(fs_plan *plan, size_t i, int o, size_t element, double x)
{
    const fs_operand *at = operand(plan, i, o);
    write_item(at->dtype, at->data + element * fs_dtype_size(at->dtype), x);
}

void init_flat(fs_array *array, size_t size)
{
    const ptrdiff_t shape = (ptrdiff_t)size;
    CHECK(fs_array_init(array, 1, &shape) == FS_OK);
}

void set_contiguous(fs_array *array, int o, void *data, fs_dtype dtype)
{
    const ptrdiff_t stride = (ptrdiff_t)fs_dtype_size(dtype);
    fs_array_set(array, o, data, dtype, true, &stride);
}

fs_plan *make_plan(int storage, size_t n_arrays, const size_t *sizes)
{
    fs_plan *plan = fs_plan_new(n_arrays, 2, false);
    random_state = 1;
    for (size_t i = 0; i < n_arrays; i++) {
        fs_array *array = &plan->arrays[i];
        init_flat(array, sizes[i]);
        for (int n = 0; n < FS_MAX_NUMBERS; n++)
            *(double *)array->number[n] = 0.125 * (n + 1);
        for (int o = 0; o < FS_RESIDUAL; o++) {
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

void free_plan(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++)
        for (int o = 0; o < FS_N_OPERANDS; o++)
            free(operand(plan, i, o)->data);
    fs_plan_free(plan);
}

fs_plan *make_plan_like(const fs_plan *model, int n_dims, const ptrdiff_t *shape)
{
    fs_plan *plan = fs_plan_new(model->n_arrays, model->n_groups, false);
    for (size_t i = 0; i < model->n_arrays; i++)
        CHECK(fs_array_init(&plan->arrays[i], n_dims, shape) == FS_OK);
    CHECK(fs_plan_finish(plan) == FS_OK);
    return plan;
}

void copy_settings(fs_plan *to, const fs_plan *from)
{
    for (size_t i = 0; i < from->n_arrays; i++) {
        to->arrays[i].group = from->arrays[i].group;
        for (int n = 0; n < FS_MAX_NUMBERS; n++)
            memcpy(to->arrays[i].number[n], from->arrays[i].number[n], sizeof(double));
    }
    memcpy(to->groups, from->groups, from->n_groups * sizeof *from->groups);
    to->step = from->step;
}

void copy_plan(fs_plan *to, fs_plan *from)
{
    copy_settings(to, from);
    for (size_t i = 0; i < from->n_arrays; i++)
        for (int o = 0; o < FS_N_OPERANDS; o++)
            if (operand(to, i, o)->data)
                memcpy(operand(to, i, o)->data, operand(from, i, o)->data, operand_bytes(from, i, o));
}

bool same_operand(fs_plan *a, fs_plan *b, int o)
{
    for (size_t i = 0; i < a->n_arrays; i++)
        if (operand(a, i, o)->data && memcmp(operand(a, i, o)->data, operand(b, i, o)->data, operand_bytes(a, i, o)) != 0)
            return false;
    return true;
}

bool same_plan(fs_plan *a, fs_plan *b)
{
    for (int o = 0; o < FS_N_OPERANDS; o++)
        if (!same_operand(a, b, o))
            return false;
    for (size_t i = 0; i < a->n_arrays; i++)
        for (int n = 0; n < FS_MAX_NUMBERS; n++)
            if (memcmp(a->arrays[i].number[n], b->arrays[i].number[n], sizeof(double)) != 0)
                return false;
    return a->step == b->step;
}

trio make_trio(int storage, size_t n_arrays, const size_t *sizes)
{
    return (trio){make_plan(storage, n_arrays, sizes), make_plan(storage, n_arrays, sizes),
                  make_plan(storage, n_arrays, sizes)};
}

void free_trio(trio t)
{
    free_plan(t.initial);
    free_plan(t.expected);
    free_plan(t.plan);
}

int find_rule(const char *name)
{
    FOR_RULES(rule)
        if (strcmp(fs_rule_name(rule), name) == 0)
            return rule;
    CONTEXT("no rule %s", name);
    CHECK(false);
    return 0;
}

void use_rule(fs_group *group, int rule)
{
    static const struct { const char *name; double value; } known[] = {
        {"lr", 0.01}, {"eps", 1e-8}, {"lr_decay", 0.1}, {"momentum", 0.9}, {"dampening", 0.25}, {"rho", 0.9},
        {"alpha", 0.99}, {"beta1", 0.9}, {"beta2", 0.999}, {"convention", FS_TORCH}, {"eps_root", 0.0},
    };
    *group = (fs_group){.rule = rule, .clip_value = INFINITY, .clip_norm_per_array = INFINITY,
                        .lower = -INFINITY, .upper = INFINITY, .clip_adaptive = INFINITY, .max_norm = INFINITY};
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

fs_options plain(fs_plan *plan, int rule)
{
    for (size_t g = 0; g < plan->n_groups; g++)
        use_rule(&plan->groups[g], rule);
    return (fs_options){.grad_scale = 1.0, .clip_norm = INFINITY, .clip_factor = 1.0, .clip_eps = 1e-6,
                        .nonfinite = FS_NONFINITE_PROPAGATE, .n_threads = 1};
}

fs_options busy(fs_plan *plan, int rule)
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

fs_report take_step(fs_plan *plan, fs_options options)
{
    fs_report report;
    fs_measure(plan, &options, &report);
    if (report.applied)
        fs_update(plan, &options);
    return report;
}

fs_report clip(fs_plan *plan, fs_options options)
{
    fs_report report;
    fs_measure(plan, &options, &report);
    if (report.applied)
        fs_clip(plan, &options);
    return report;
}

fs_report take_3_steps(fs_plan *plan, fs_options options)
{
    take_step(plan, options);
    take_step(plan, options);
    return take_step(plan, options);
}

/* ---- Layouts ----------------------------------------------------------------------------------------------------- */

spread make_spread(const ptrdiff_t *shape, size_t layout, size_t item)
{
    enum { MARGIN = 64 };
    const ptrdiff_t a = shape[0], b = shape[1], c = shape[2];
    const struct { ptrdiff_t strides[3]; size_t shift; } layouts[N_LAYOUTS] = {    /* in elements; in bytes */
        {{b * c, c, 1}, 0},
        {{b * (c + 3) + 5, c + 3, 1}, 0},     /* gaps */
        {{1, a, a * b}, 0},                   /* Fortran order */
        {{c, a * c, 1}, 0},                   /* two dimensions swapped */
        {{-b * c, -c, -1}, 0},                /* backwards */
        {{2 * b * c, -2 * c, 2}, 0},
        {{b * c, c, 1}, 1},                   /* unaligned */
        {{-1, 2 * a, -2 * a * b}, 1},
        {{0, c, 1}, 0},                       /* broadcast */
        {{0, 0, 0}, 1},
    };
    const size_t shift = layouts[layout].shift;
    spread s = {.n_bytes = 2 * MARGIN + shift, .aligned = shift == 0};
    size_t before = 0;
    for (int d = 0; d < 3; d++) {
        const ptrdiff_t stride = layouts[layout].strides[d];
        const size_t extent = shape[d] ? (size_t)((shape[d] - 1) * labs(stride)) * item : 0;
        s.strides[d] = stride * (ptrdiff_t)item;
        s.n_bytes += extent + item;
        before += stride < 0 ? extent : 0;
    }
    s.buffer = malloc(s.n_bytes);
    memset(s.buffer, 0xa5, s.n_bytes);    /* what no step may change */
    s.first = s.buffer + MARGIN + shift + before;
    return s;
}

/* Of a size that the compiler knows, which is several times faster. */
static inline void copy_item(char *to, const char *from, size_t item)
{
    switch (item) {
    case 2:
        memcpy(to, from, 2);
        break;
    case 4:
        memcpy(to, from, 4);
        break;
    default:
        memcpy(to, from, 8);
    }
}

void copy_spread(const spread *s, const ptrdiff_t *shape, size_t item, char *run, bool to_run)
{
    for (ptrdiff_t i = 0; i < shape[0]; i++)
        for (ptrdiff_t j = 0; j < shape[1]; j++)
            for (ptrdiff_t k = 0; k < shape[2]; k++, run += item) {
                char *place = s->first + i * s->strides[0] + j * s->strides[1] + k * s->strides[2];
                copy_item(to_run ? run : place, to_run ? place : run, item);
            }
}
