/* Tests of what is updated block by block: small states, parameters of 16 bits, statistics. */
#include "harness.h"

/* ---- How numbers are rounded, by definition ------------------------------------------------------------------------ */

/* The half next to x towards 0, or the one beyond: if this fraction of 2^20, as many digits of it as are lost, makes a whole
 * with what x has more than the first. */
static uint16_t half_at_random(fs_dtype dtype, float x, unsigned fraction)
{
    const double magnitude = fabs((double)x);
    const double step = dtype == FS_FLOAT16 ? fraction / 128 * 0x1p-13 : fraction / 16 * 0x1p-16;
    uint16_t half = to_half(dtype, x);
    if (!isfinite(x) || (dtype == FS_FLOAT16 && magnitude >= 65504))
        return half;
    half -= fabs(from_half(dtype, half)) > magnitude;
    const double below = fabs(from_half(dtype, half)), above = fabs(from_half(dtype, half + 1u));
    const double unit = isinf(above) ? below - fabs(from_half(dtype, half - 1u)) : above - below;
    return (uint16_t)(half + ((magnitude - below) / unit + step >= 1));
}

/* What is stored of a parameter of 16 bits, and what is kept beside it. */
static uint16_t part(fs_dtype dtype, fs_rounding rounding, float x, unsigned fraction, char *residual)
{
    const uint16_t nearest = to_half(dtype, x);
    const double lost = x - from_half(dtype, nearest);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const bool is_above = (bits & 0xffff) >= 0x8000;
    const int16_t off = (int16_t)(isnan(x) ? 0 : (int)(bits & 0xffff) - 0x10000 * is_above);
    switch (rounding) {
    case FS_STOCHASTIC:
        return half_at_random(dtype, x, fraction);
    case FS_KAHAN:
        write_item(dtype, residual, isfinite(lost) ? lost : 0);
        return nearest;
    case FS_SPLIT:
        memcpy(residual, &off, sizeof off);
        return isnan(x) ? nearest : (uint16_t)((bits >> 16) + is_above);
    case FS_MASTER:
        memcpy(residual, &x, sizeof x);
        return nearest;
    default:
        return nearest;
    }
}

static float join(fs_dtype dtype, fs_rounding rounding, uint16_t stored, const char *residual)
{
    uint32_t bits = (uint32_t)stored << 16;
    int16_t off;
    float x;
    switch (rounding) {
    case FS_KAHAN:
        return (float)(from_half(dtype, stored) + read_item(dtype, residual));
    case FS_SPLIT:
        memcpy(&off, residual, sizeof off);
        bits += (uint32_t)off;
        memcpy(&x, &bits, sizeof x);
        return x;
    case FS_MASTER:
        return (float)read_item(FS_FLOAT32, residual);
    default:
        return (float)from_half(dtype, stored);
    }
}

/* Of a parameter and its rounding: how many bytes of residual there are to an element. */
static size_t residual_size(fs_rounding rounding)
{
    return rounding == FS_MASTER ? 4 : rounding == FS_KAHAN || rounding == FS_SPLIT ? 2 : 0;
}

static const struct { fs_dtype dtype; fs_rounding rounding; } kinds[] = {
    {FS_FLOAT32, FS_NEAREST},    {FS_FLOAT64, FS_NEAREST},   {FS_FLOAT16, FS_NEAREST},  {FS_FLOAT16, FS_STOCHASTIC},
    {FS_FLOAT16, FS_KAHAN},      {FS_FLOAT16, FS_MASTER},    {FS_BFLOAT16, FS_NEAREST}, {FS_BFLOAT16, FS_STOCHASTIC},
    {FS_BFLOAT16, FS_KAHAN},     {FS_BFLOAT16, FS_SPLIT},    {FS_BFLOAT16, FS_MASTER},
};

static bool same_float(float a, float b)
{
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

/* The random fraction of an element of a block with this key: a test's own, for checkpoints count on them. */
static uint32_t fraction_at(uint32_t key, size_t e)
{
    const size_t half = FS_SCALED / 2, is_upper = e / half % 2;
    uint32_t x = key + (uint32_t)(e - is_upper * half) * 0x9e3779b9;
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return is_upper ? x >> 12 : x & 0xfffff;
}

/* A run of floats of every kind, to storage and back. */
static void check_join_and_part(fs_dtype dtype, fs_rounding rounding, const fs_kernels *k, size_t n)
{
    enum { EDGE = 4 };
    float values[FS_BLOCK], run[FS_BLOCK + EDGE];
    uint16_t stored[FS_BLOCK + EDGE];
    char residual[4 * (FS_BLOCK + EDGE)], expected[4 * (FS_BLOCK + EDGE)];
    const size_t kept = residual_size(rounding);
    const uint32_t key = (uint32_t)random_bits();
    const float beyond = 0.1f;    /* which no half is */
    memset(residual, 0x5a, sizeof residual);
    memset(expected, 0x5a, sizeof expected);
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = random_float_bits();
        memcpy(&values[i], &bits, sizeof bits);
    }
    memcpy(run, values, n * sizeof *run);
    for (size_t i = n; i < n + EDGE; i++)
        run[i] = beyond;
    for (size_t i = 0; i < FS_BLOCK + EDGE; i++)
        stored[i] = 0x5a5a;
    k->part[rounding][dtype](n, run, stored, residual, key);
    for (size_t i = 0; i < n; i++) {
        const unsigned fraction = fraction_at(key, i);
        const uint16_t half = part(dtype, rounding, values[i], fraction, expected + i * kept);
        CONTEXT("dtype %d, rounding %d, %a at random %05x: %04x, not %04x", dtype, rounding, values[i], fraction, stored[i],
                half);
        CHECK(same_half(dtype, stored[i], half));
    }
    CHECK(memcmp(residual, expected, sizeof residual) == 0);
    if (k->join[rounding][dtype]) {
        k->load[dtype](1, n, run, (char *)stored, 0, sizeof *stored);
        k->join[rounding][dtype](n, run, residual);
        for (size_t i = 0; i < n; i++) {
            const float joined = join(dtype, rounding, stored[i], residual + i * kept);
            CONTEXT("dtype %d, rounding %d, %a: %a, not %a", dtype, rounding, values[i], run[i], joined);
            CHECK(same_float(run[i], joined));
            CHECK(rounding == FS_KAHAN || same_float(joined, values[i]));
        }
    }
    for (size_t i = n; i < n + EDGE; i++)
        CHECK(run[i] == beyond && stored[i] == 0x5a5a);
}

void test_join_and_part(void)
{
    random_state = 1;
    for (size_t s = 0; s < LENGTH(kinds); s++)
        if (kinds[s].rounding != FS_NEAREST && kinds[s].rounding != FS_MASTER)    /* which needs no conversion */
            FOR_LEVELS(level)
                for (size_t n = FS_BLOCK - 32; n <= FS_BLOCK; n += quick ? 9 : 1)
                    check_join_and_part(kinds[s].dtype, kinds[s].rounding, fs_kernels_of(level, FS_FLOAT32), n);
}

/* ---- Small states -------------------------------------------------------------------------------------------------- */

/* A rule whose first state becomes the gradient, and the second one, which lies behind it, larger; and with it, what a state
 * makes of a block of values. */
static void keep(size_t n, const void *from, void *param, const void *grad, void *const *state, double factor, double decay,
                 const void *coefs, const uint32_t *fraction)
{
    (void)from, (void)param, (void)factor, (void)decay, (void)coefs, (void)fraction;
    memcpy(state[0], grad, n * sizeof(float));
    memset(state[1], 0x7f, n * sizeof(float));
}

static void store_small(const fs_kernels *kernels, size_t n, const float *values, const fs_state *state, uint32_t key)
{
    uint16_t other[FS_BLOCK] = {0};
    const fs_small small = {.n_states = 2, .state = {*state, {.data = (char *)other, .dtype = FS_BFLOAT16}}, .key = key};
    float param[FS_BLOCK];
    kernels->apply_to_small(keep, n, param, values, &small, 1.0, 1.0, NULL);
}

/* Small states: a float that comes back is one of the two nearest that can be stored, nothing around is changed, and all
 * levels and numbers of threads do the same. */
void test_small_states(void)
{
    enum { N = 5000, N_KINDS = 3, GUARD = 64 };
    static const struct { fs_dtype dtype; double coarseness, least, finest; } kinds[N_KINDS] = {
        {FS_BFLOAT16, 1.0 / 128, 0, 0x1p-133},
        {FS_INT8, 1.0 / 8, 0x1p-18, 0x1p-129},
        {FS_UINT8, 1.0 / 8, 0x1p-34, 0x1p-129}};
    static const size_t sizes[] = {1, 255, 256, 257, 1023, 1030, 2048, N};
    enum { SCALES = N / FS_SCALED + 1 };
    static char expected[N_KINDS][2 * N + GUARD], data[N_KINDS][2 * N + GUARD];
    static float expected_scales[N_KINDS][SCALES + 1], scales[N_KINDS][SCALES + 1];
    for (size_t s = 0; s < LENGTH(sizes); s++) {
        const trio t = make_trio(FS_FLOAT32, 1, &sizes[s]);
        const fs_options options = busy(t.initial, find_rule("adam_amsgrad"));
        const size_t n_scales = (sizes[s] + FS_SCALED - 1) / FS_SCALED;
        static double exact[N];    /* with the states in float32; three steps of 0.01 are taken */
        bool first = true;
        copy_plan(t.expected, t.initial);
        for (int o = FS_STATE; o < FS_AVERAGE; o++)
            memset(operand(t.expected, 0, o)->data, 0, operand_bytes(t.expected, 0, o));
        take_3_steps(t.expected, options);
        for (size_t e = 0; e < sizes[s]; e++)
            exact[e] = get(t.expected, 0, FS_PARAM, e);
        FOR_LEVELS(level)
            for (int n_threads = 1; n_threads <= 3; n_threads++) {
                CONTEXT("size %zu, level %s, %d threads", sizes[s], fs_level_name(level), n_threads);
                fs_plan *plan = fs_plan_new(1, 2, false);
                fs_options its_options = options;
                its_options.n_threads = n_threads;
                init_flat(&plan->arrays[0], sizes[s]);
                copy_plan(t.plan, t.initial);
                copy_settings(plan, t.initial);
                for (int o = 0; o < FS_STATE; o++)
                    set_contiguous(&plan->arrays[0], o, operand(t.plan, 0, o)->data, FS_FLOAT32);
                memset(data, 0, sizeof data);
                memset(scales, 0, sizeof scales);
                for (int k = 0; k < N_KINDS; k++) {
                    const size_t end = sizes[s] * fs_dtype_size(kinds[k].dtype);
                    memset(&data[k][end], 0x5a, GUARD);
                    scales[k][n_scales] = 7;
                    fs_array_set_small(&plan->arrays[0], FS_STATE + k, data[k], kinds[k].dtype, k ? scales[k] : NULL);
                }
                CHECK(fs_plan_finish(plan) == FS_OK);
                take_3_steps(plan, its_options);
                for (int k = 0; k < N_KINDS; k++) {
                    const size_t end = sizes[s] * fs_dtype_size(kinds[k].dtype);
                    for (size_t i = 0; i < GUARD; i++)
                        CHECK(data[k][end + i] == 0x5a);
                    CHECK(scales[k][n_scales] == 7);
                }
                if (first) {
                    copy_plan(t.expected, t.plan);
                    memcpy(expected, data, sizeof data);
                    memcpy(expected_scales, scales, sizeof scales);
                }
                for (size_t e = 0; e < sizes[s]; e++)
                    CHECK(fabs(get(t.plan, 0, FS_PARAM, e) - exact[e]) < 0.01);
                CHECK(same_operand(t.expected, t.plan, FS_PARAM));
                CHECK(memcmp(expected, data, sizeof data) == 0 && memcmp(expected_scales, scales, sizeof scales) == 0);
                first = false;
                fs_plan_free(plan);
            }
        free_trio(t);
    }
    /* The last ones, as they were when this was written: checkpoints go on with the same random bits. */
    const unsigned char *bytes = (const unsigned char *)expected;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < sizeof expected; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3;
    CONTEXT("hash %016llx", (unsigned long long)hash);
    CHECK(hash == 0x2e7b6253c434197f);
    FOR_LEVELS(level)
        for (int k = 0; k < N_KINDS; k++)
            for (int exponent = -120; exponent <= (k ? 128 : 127); exponent += 31) {    /* a code bounds the last floats */
                const fs_kernels *kernels = fs_kernels_of(level, FS_FLOAT32);
                const size_t n = exponent % 2 ? FS_BLOCK : FS_BLOCK - 56, item = fs_dtype_size(kinds[k].dtype);
                float values[FS_BLOCK], found[FS_BLOCK + 1];
                CONTEXT("level %s, kind %d, exponent %d", fs_level_name(level), k, exponent);
                data[k][n * item] = 0x5a;
                found[n] = 0.1f;
                for (size_t i = 0; i < n; i++) {
                    const double x = ldexp(random_signed(), exponent - (int)(i % 7));
                    values[i] = (float)(kinds[k].dtype == FS_UINT8 ? fabs(x) : x);
                }
                const fs_state state = {.data = (char *)data[k], .scales = scales[k], .dtype = kinds[k].dtype};
                store_small(kernels, n, values, &state, (uint32_t)exponent);
                kernels->load_small(n, found, &state);
                CHECK(data[k][n * item] == 0x5a && found[n] == 0.1f);
                for (size_t i = 0; i < n; i++) {
                    const double error = fabs((double)found[i] - values[i]), coarsest = ldexp(kinds[k].least, exponent + 1);
                    CHECK(error < kinds[k].coarseness * fabs((double)values[i]) + coarsest + kinds[k].finest);
                }
            }
    FOR_LEVELS(level) {    /* what rules divide by is not 0 beside what is not; zeros stay zeros; all are nan by infinity */
        const fs_kernels *kernels = fs_kernels_of(level, FS_FLOAT32);
        float values[FS_BLOCK] = {1, [2 * FS_SCALED] = 1, [2 * FS_SCALED + 9] = INFINITY};
        float found[FS_BLOCK], scale[FS_BLOCK / FS_SCALED] = {1};
        uint8_t codes[FS_BLOCK] = {0};
        const fs_state state = {.data = (char *)codes, .scales = scale, .dtype = FS_UINT8};
        store_small(kernels, FS_BLOCK, values, &state, 0);
        kernels->load_small(FS_BLOCK, found, &state);
        for (size_t i = 0; i < FS_BLOCK; i++) {
            CHECK((found[i] > 0) == (i < FS_SCALED));
            CHECK(isnan(found[i]) == (i / FS_SCALED == 2));
            CHECK(codes[i] == 0 || i < FS_SCALED);
        }
    }
}

/* ---- Blocks of arrays of every kind ---------------------------------------------------------------------------------- */

static const ptrdiff_t shapes[][3] = {{2, 25, 100}, {1, 1, 1},   {3, 0, 2},   {3, 5, 17}, {4, 8, 8},
                                      {1, 257, 1},  {3, 11, 31}, {4, 16, 16}, {5, 5, 41}};
enum { N_TURNS = 2, N_ARRAYS = LENGTH(kinds) * LENGTH(shapes) * N_TURNS, N_STEPS = 3, MARGIN = 64 };

/* What an array is to be, without gaps in the order of the elements. */
typedef struct {
    fs_dtype dtype[FS_N_OPERANDS];
    fs_rounding rounding;
    const ptrdiff_t *shape;
    size_t size, item[FS_N_OPERANDS];              /* 0 for none */
    char *initial[FS_N_OPERANDS], *wanted[FS_N_OPERANDS];
    double stats[FS_N_STATS];
} sample;

static fs_dtype real_of(fs_dtype dtype)
{
    return dtype == FS_FLOAT64 ? FS_FLOAT64 : FS_FLOAT32;
}

/* Of some arrays no state is small, of some one, of some all are, of some either the last or the first of two neighbours. */
static bool is_small(size_t i, int o)
{
    static const unsigned several[] = {0xf, 0, 0, 0xa, 0xf, 0x6, 0};
    const unsigned which = i % 7 == 1 ? 1u << i / 7 % FS_MAX_STATES : several[i % 7];
    return o >= FS_STATE && o < FS_AVERAGE && which >> (o - FS_STATE) & 1;
}

static sample make_sample(size_t i, int n_states)
{
    const fs_dtype dtype = kinds[i % LENGTH(kinds)].dtype, real = real_of(dtype);
    sample s = {.rounding = kinds[i % LENGTH(kinds)].rounding, .shape = shapes[i / LENGTH(kinds) % LENGTH(shapes)]};
    s.size = (size_t)(s.shape[0] * s.shape[1] * s.shape[2]);
    for (int o = 0; o < FS_N_OPERANDS; o++) {
        s.dtype[o] = o == FS_PARAM || (o == FS_GRAD && i % 3) || (o == FS_AVERAGE && i % 2) ? dtype : real;
        s.dtype[o] = is_small(i, o) ? FS_BFLOAT16 : s.dtype[o];
        s.item[o] = fs_dtype_size(s.dtype[o]);
        if (o == FS_RESIDUAL)
            s.item[o] = residual_size(s.rounding);
        if ((o >= FS_STATE + n_states && o < FS_AVERAGE) || (o == FS_AVERAGE && i % 5 == 0))
            s.item[o] = 0;
        s.initial[o] = malloc(s.size * s.item[o] + 1);
        s.wanted[o] = malloc(s.size * s.item[o] + 1);
    }
    return s;
}

static double read_sample(const sample *s, int o, size_t e)
{
    return read_item(s->dtype[o], s->wanted[o] + e * s->item[o]);
}

static void write_sample(const sample *s, int o, size_t e, double x)
{
    write_item(s->dtype[o], s->wanted[o] + e * s->item[o], x);
}

/* The same of an element for this use of its array. */
static uint32_t fraction_of(const fs_plan *plan, size_t i, int use, size_t e)
{
    const uint64_t array = mix(mix(mix(plan->seed) + (uint64_t)plan->step) + 2 * i + (uint64_t)use);
    return fraction_at((uint32_t)mix(array + e / FS_BLOCK), e % FS_BLOCK);
}

/* Store a parameter that is `exact`; returns what is left of it. */
static double settle_param(const sample *s, const fs_plan *plan, size_t i, size_t e, double exact)
{
    char *residual = s->wanted[FS_RESIDUAL] + e * s->item[FS_RESIDUAL];
    const fs_dtype dtype = s->dtype[FS_PARAM];
    if (dtype == FS_FLOAT32 || dtype == FS_FLOAT64) {
        write_sample(s, FS_PARAM, e, exact);
        return exact;
    }
    const uint16_t stored = part(dtype, s->rounding, (float)exact, fraction_of(plan, i, 1, e), residual);
    memcpy(s->wanted[FS_PARAM] + e * s->item[FS_PARAM], &stored, sizeof stored);
    return join(dtype, s->rounding, stored, residual);
}

static void settle_state(const sample *s, const fs_plan *plan, size_t i, int o, size_t e, double exact)
{
    if (is_small(i, o)) {
        const uint16_t stored = half_at_random(FS_BFLOAT16, (float)exact, fraction_of(plan, i, 0, e));
        memcpy(s->wanted[o] + e * s->item[o], &stored, sizeof stored);
    } else {
        write_sample(s, o, e, exact);
    }
}

static void settle_average(const sample *s, size_t e, double param, double weight)
{
    const double average = read_sample(s, FS_AVERAGE, e);
    const float in_float = (float)average + (float)weight * ((float)param - (float)average);
    write_sample(s, FS_AVERAGE, e, s->dtype[FS_PARAM] == FS_FLOAT64 ? average + weight * (param - average) : in_float);
}

/* Of so many values, and 0 for the rest up to `room`, a power of two. */
static double sum_in_tree(const double *values, size_t n, size_t room)
{
    if (room == 1)
        return n > 0 ? values[0] : 0;
    return sum_in_tree(values, min_size(n, room / 2), room / 2) +
           sum_in_tree(values + room / 2, n > room / 2 ? n - room / 2 : 0, room / 2);
}

static double sum_of_squares(const double *values, size_t n)
{
    enum { MAX_BLOCKS = 32 };
    double blocks[MAX_BLOCKS] = {0};
    for (size_t b = 0; b * FS_BLOCK < n; b++) {
        double lanes[FS_LANES] = {0};
        for (size_t i = b * FS_BLOCK; i < min_size(n, (b + 1) * FS_BLOCK); i++)
            lanes[i % FS_LANES] += values[i] * values[i];
        for (int half = FS_LANES / 2; half > 0; half /= 2)
            for (int l = 0; l < half; l++)
                lanes[l] = lanes[l] + lanes[l + half];
        blocks[b] = lanes[0];
    }
    return sum_in_tree(blocks, MAX_BLOCKS, MAX_BLOCKS);
}

/* What becomes of the samples in a step: `exact` has them without gaps and nothing rounded but what it starts from. */
static void step_samples(sample *samples, fs_plan *exact, fs_options options)
{
    enum { MAX_SIZE = 5000 };
    static double before[N_ARRAYS][MAX_SIZE], changes[MAX_SIZE], params[MAX_SIZE];
    for (size_t i = 0; i < N_ARRAYS; i++)
        for (size_t e = 0; e < samples[i].size; e++)
            before[i][e] = get(exact, i, FS_PARAM, e);
    take_step(exact, options);
    for (size_t i = 0; i < N_ARRAYS; i++) {
        sample *s = &samples[i];
        s->stats[FS_ZERO_GRADS] = 0;
        for (size_t e = 0; e < s->size; e++) {
            params[e] = settle_param(s, exact, i, e, get(exact, i, FS_PARAM, e));
            changes[e] = params[e] - before[i][e];
            if (s->dtype[FS_PARAM] != FS_FLOAT64)
                changes[e] = (float)changes[e];
            s->stats[FS_ZERO_GRADS] += get(exact, i, FS_GRAD, e) == 0;
            set(exact, i, FS_PARAM, e, params[e]);
            for (int o = FS_STATE; o < FS_AVERAGE; o++)
                if (s->item[o]) {
                    settle_state(s, exact, i, o, e, get(exact, i, o, e));
                    set(exact, i, o, e, read_sample(s, o, e));
                }
            if (s->item[FS_AVERAGE])
                settle_average(s, e, params[e], exact->groups[exact->arrays[i].group].average_weight);
        }
        s->stats[FS_PARAM_SQUARES] = sum_of_squares(params, s->size);
        s->stats[FS_UPDATE_SQUARES] = sum_of_squares(changes, s->size);
    }
}

/* All samples in `wanted` are filled and made `initial`, and `exact` is the same without gaps. */
static void fill_samples(sample *samples, fs_plan *exact)
{
    random_state = 1;
    for (size_t i = 0; i < N_ARRAYS; i++) {
        sample *s = &samples[i];
        const fs_dtype real = real_of(s->dtype[FS_PARAM]);
        init_flat(&exact->arrays[i], s->size);
        exact->arrays[i].group = (int)(i / 3 % exact->n_groups);
        for (int o = 0; o < FS_AVERAGE; o++)
            if (s->item[o])
                set_contiguous(&exact->arrays[i], o, malloc(s->size * fs_dtype_size(real) + 1), real);
        for (size_t e = 0; e < s->size; e++) {
            set(exact, i, FS_PARAM, e, settle_param(s, exact, i, e, random_signed()));
            write_sample(s, FS_GRAD, e, e % 7 ? random_signed() : e % 2 ? -0.0 : 0.0);
            for (int o = FS_STATE; o <= FS_AVERAGE; o++)
                if (s->item[o])
                    write_sample(s, o, e, 0.125 + random_unit());
            for (int o = FS_GRAD; o < FS_AVERAGE; o++)
                if (s->item[o])
                    set(exact, i, o, e, read_sample(s, o, e));
        }
        for (int o = 0; o < FS_N_OPERANDS; o++)
            memcpy(s->initial[o], s->wanted[o], s->size * s->item[o]);
    }
    CHECK(fs_plan_finish(exact) == FS_OK);
}

/* Where an operand of a sample lies while steps are taken: with strides, or packed. */
typedef struct { spread at, in_order; ptrdiff_t shape[3]; } place;

/* As the parameter's memory has the dimensions, or C order. */
static void put_in_order(place *p, const sample *s, const ptrdiff_t *param, bool in_c_order)
{
    int order[3] = {0, 1, 2};
    for (int n = 1; n < 3 && !in_c_order; n++)
        for (int d = n; d > 0 && labs(param[order[d]]) > labs(param[order[d - 1]]); d--) {
            const int swapped = order[d];
            order[d] = order[d - 1];
            order[d - 1] = swapped;
        }
    p->in_order = p->at;
    for (int d = 0; d < 3; d++) {
        p->in_order.strides[d] = p->at.strides[order[d]];
        p->shape[d] = s->shape[order[d]];
    }
}

/* The same layout for all operands at first, then for each another. */
static size_t layout_of(size_t i, int o)
{
    return (i + 2 + (i / (N_ARRAYS / N_TURNS) ? 3 * (size_t)o : 0)) % N_WRITABLE;
}

static void place_operand(fs_array *array, const sample *s, size_t i, int o, const ptrdiff_t *param, bool in_c_order,
                          place *p)
{
    const bool packed = o == FS_RESIDUAL || is_small(i, o);
    if (packed) {
        const ptrdiff_t item = (ptrdiff_t)s->item[o], run = (ptrdiff_t)s->size * item;
        p->at = (spread){.buffer = malloc((size_t)run + MARGIN), .n_bytes = (size_t)run + MARGIN};
        memset(p->at.buffer, 0xa5, p->at.n_bytes);
        p->at.first = p->at.buffer;
        p->in_order = p->at;
        p->in_order.strides[2] = item;
        p->shape[0] = p->shape[1] = 1;
        p->shape[2] = (ptrdiff_t)s->size;
    } else {
        p->at = make_spread(s->shape, layout_of(i, o), s->item[o]);
        put_in_order(p, s, param ? param : p->at.strides, in_c_order);
    }
    copy_spread(&p->in_order, p->shape, s->item[o], s->initial[o], false);
    if (o == FS_RESIDUAL)
        fs_array_set_rounding(array, s->rounding, p->at.first);
    else if (packed)
        fs_array_set_small(array, o, p->at.first, s->dtype[o], NULL);
    else
        fs_array_set(array, o, p->at.first, s->dtype[o], p->at.aligned, p->at.strides);
}

/* The operand is as wanted, and all around it as before. Its place is given back. */
static void check_place(const sample *s, int o, place *p)
{
    char *found = malloc(s->size * s->item[o] + 1);
    bool is_whole = true;
    copy_spread(&p->in_order, p->shape, s->item[o], found, true);
    CHECK(memcmp(found, s->wanted[o], s->size * s->item[o]) == 0);
    memset(found, 0xa5, s->size * s->item[o]);
    copy_spread(&p->in_order, p->shape, s->item[o], found, false);
    for (size_t b = 0; b < p->at.n_bytes; b++)
        is_whole = is_whole && p->at.buffer[b] == (char)0xa5;
    CHECK(is_whole);
    free(found);
    free(p->at.buffer);
}

static void check_blocks(const sample *samples, const fs_plan *settings, fs_options options, bool has_stats)
{
    static place places[N_ARRAYS][FS_N_OPERANDS];
    fs_plan *plan = fs_plan_new(N_ARRAYS, settings->n_groups, has_stats);
    for (size_t i = 0; i < N_ARRAYS; i++) {
        const sample *s = &samples[i];
        CHECK(fs_array_init(&plan->arrays[i], 3, s->shape) == FS_OK);
        for (int o = 0; o < FS_N_OPERANDS; o++)
            if (s->item[o])
                place_operand(&plan->arrays[i], s, i, o, o ? places[i][0].at.strides : NULL, has_stats, &places[i][o]);
        if (s->rounding == FS_STOCHASTIC)
            fs_array_set_rounding(&plan->arrays[i], FS_STOCHASTIC, NULL);
    }
    CHECK(fs_plan_finish(plan) == FS_OK);
    copy_settings(plan, settings);
    plan->step = settings->step - N_STEPS;
    plan->seed = settings->seed;
    for (int n = 1; n <= N_STEPS; n++) {
        options.clear_grads = n == N_STEPS;
        const fs_report report = take_step(plan, options);
        CHECK(report.applied && report.has_norm == has_stats);
    }
    for (size_t i = 0; i < N_ARRAYS; i++) {
        const sample *s = &samples[i];
        char which[sizeof context];
        memcpy(which, context, sizeof which);
        for (int o = 0; o < FS_N_OPERANDS; o++)
            if (s->item[o]) {
                CONTEXT("%.60s, array %zu: dtype %d, rounding %d, %td x %td x %td, operand %d", which, i, s->dtype[0],
                        s->rounding, s->shape[0], s->shape[1], s->shape[2], o);
                check_place(s, o, &places[i][o]);
            }
        for (int stat = 0; stat < FS_N_STATS && has_stats; stat++) {
            CONTEXT("%.60s, array %zu, stat %d: %a, not %a", which, i, stat, plan->stats[stat][i], s->stats[stat]);
            CHECK(plan->stats[stat][i] == s->stats[stat]);
        }
        memcpy(context, which, sizeof which);
    }
    fs_plan_free(plan);
}

/* Each kind of array in each size, in many layouts, with small states and without. */
void test_blocks(void)
{
    static const fs_decay modes[] = {FS_COUPLED, FS_DECOUPLED, FS_INDEPENDENT, FS_DECOUPLED_AFTER};
    static sample samples[N_ARRAYS];
    fs_plan *exact = fs_plan_new(N_ARRAYS, LENGTH(modes), false);
    const int rule = find_rule("adan");
    fs_options options = plain(exact, rule);
    options.grad_scale = 3;
    exact->step = 7;
    exact->seed = 0x123456789abcdef0;
    for (size_t g = 0; g < LENGTH(modes); g++) {
        fs_group *group = &exact->groups[g];
        group->decay_mode = modes[g];
        group->weight_decay = 0.1;
        group->l1 = g % 2 ? 0.01 : 0;
        group->upper = g == 2 ? 0.75 : INFINITY;
        group->average_weight = 0.25;
    }
    for (size_t i = 0; i < N_ARRAYS; i++)
        samples[i] = make_sample(i, fs_rule_states(rule));
    fill_samples(samples, exact);
    CHECK(fs_level_set(FS_BASELINE) == FS_OK);
    for (int n = 0; n < N_STEPS; n++)
        step_samples(samples, exact, options);
    for (size_t i = 0; i < N_ARRAYS; i++)
        memset(samples[i].wanted[FS_GRAD], 0, samples[i].size * samples[i].item[FS_GRAD]);    /* at last cleared */
    FOR_LEVELS(level)
        for (options.n_threads = 1; options.n_threads <= 3; options.n_threads += 2)
            for (int has_stats = 0; has_stats <= 1; has_stats++) {
                CONTEXT("level %s, %d threads, stats %d", fs_level_name(level), options.n_threads, has_stats);
                check_blocks(samples, exact, options, has_stats);
            }
    for (size_t i = 0; i < N_ARRAYS; i++)
        for (int o = 0; o < FS_N_OPERANDS; o++) {
            free(samples[i].initial[o]);
            free(samples[i].wanted[o]);
        }
    free_plan(exact);
}

/* ---- Statistics ------------------------------------------------------------------------------------------------------ */

static bool same_number(double a, double b)
{
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

/* Of runs that are updated where they lie, also such as are too long to go through all loops at once, and of halves, with
 * all the states there are. The step is what it is without, also where a gradient is infinite and no one minds. */
void test_stats(void)
{
    enum { LARGEST = 20000 };
    static const size_t sizes[] = {LARGEST, 1, 8192, 1030, 5000};
    static double after[LARGEST], changes[LARGEST];
    for (int storage = 0; storage < N_DTYPES; storage++) {
        const trio t = make_trio(storage, LENGTH(sizes), sizes);
        fs_options options = busy(t.initial, find_rule("adan"));
        options.nonfinite = FS_NONFINITE_PROPAGATE;
        options.clip_norm = INFINITY;
        options.clear_grads = true;
        t.initial->groups[0].clip_norm_per_array = INFINITY;
        for (size_t e = 0; e < LARGEST; e += 7)
            set(t.initial, 0, FS_GRAD, e, 0.0);
        set(t.initial, 0, FS_GRAD, LARGEST / 2, INFINITY);
        copy_plan(t.expected, t.initial);
        take_step(t.expected, options);
        for (options.n_threads = 1; options.n_threads <= 3; options.n_threads++) {
            fs_plan *plan = fs_plan_new(LENGTH(sizes), t.plan->n_groups, true);
            copy_plan(t.plan, t.initial);
            for (size_t i = 0; i < LENGTH(sizes); i++) {
                init_flat(&plan->arrays[i], sizes[i]);
                for (int o = 0; o < FS_RESIDUAL; o++)
                    if (operand(t.plan, i, o)->data)
                        set_contiguous(&plan->arrays[i], o, operand(t.plan, i, o)->data, (fs_dtype)storage);
            }
            CHECK(fs_plan_finish(plan) == FS_OK);
            copy_settings(plan, t.initial);
            take_step(plan, options);
            for (size_t i = 0; i < LENGTH(sizes); i++) {
                double n_zeros = 0;
                CONTEXT("storage %d, %d threads, array %zu", storage, options.n_threads, i);
                for (size_t e = 0; e < sizes[i]; e++) {
                    after[e] = get(plan, i, FS_PARAM, e);
                    changes[e] = after[e] - get(t.initial, i, FS_PARAM, e);
                    if (storage != FS_FLOAT64)
                        changes[e] = (float)changes[e];
                    n_zeros += get(t.initial, i, FS_GRAD, e) == 0;
                }
                CHECK(plan->stats[FS_PARAM_SQUARES][i] == sum_of_squares(after, sizes[i]));
                CHECK(plan->stats[FS_UPDATE_SQUARES][i] == sum_of_squares(changes, sizes[i]));
                CHECK(plan->stats[FS_ZERO_GRADS][i] == n_zeros);
            }
            for (int o = 0; o < FS_N_OPERANDS; o++)
                CHECK(same_operand(t.plan, t.expected, o));
            fs_plan_free(plan);
        }
        free_trio(t);
    }
}

/* ---- Units ----------------------------------------------------------------------------------------------------------- */

/* What an array with units is, its elements in C order, and what a step makes of it. */
typedef struct {
    ptrdiff_t shape[3];
    size_t size;
    bool has_units, counts[3];
    fs_dtype dtype;
    double *param, *grad, *staged, *moved, *wanted;
} limited;

enum { MAX_LIMITED = 40, MAX_LIMITED_SIZE = 22000 };

static double as_stored(fs_dtype dtype, double x)
{
    char item[sizeof(double)];
    write_item(dtype, item, x);
    return read_item(dtype, item);
}

static double as_computed(const limited *s, double x)
{
    return as_stored(real_of(s->dtype), x);
}

static size_t unit_of(const limited *s, size_t e)
{
    const size_t b = (size_t)s->shape[1], c = (size_t)s->shape[2], at[3] = {e / c / b, e / c % b, e % c};
    size_t unit = 0;
    for (int d = 0; d < 3; d++)
        unit = s->counts[d] ? unit * (size_t)s->shape[d] + at[d] : unit;
    return unit;
}

/* A norm is root * 2^exponent. */
typedef struct { double root; int exponent; } norm;

static norm norm_of_unit(const limited *s, size_t unit, const double *values)
{
    static double inside[MAX_LIMITED_SIZE];
    double largest = 0;
    size_t n = 0;
    norm found = {0};
    for (size_t e = 0; e < s->size; e++)
        if (unit_of(s, e) == unit) {
            largest = fmax(largest, fabs(values[e]));
            inside[n++] = values[e];
        }
    if (isfinite(largest))
        frexp(largest, &found.exponent);
    for (size_t e = 0; e < n; e++)
        inside[e] = ldexp(inside[e], -found.exponent);
    found.root = sqrt(sum_of_squares(inside, n));
    return found;
}

static double limiting_factor(norm found, double limit, double least)
{
    const double length = ldexp(found.root, found.exponent);
    return length <= limit ? 1 : length < least ? limit / least : ldexp(limit / found.root, -found.exponent);
}

/* The gradient as the rule sees it. */
static void stage_limited(const limited *s, const fs_options *options, const fs_group *group)
{
    const size_t n_units = s->size > 0 ? 1 + unit_of(s, s->size - 1) : 0;
    for (size_t e = 0; e < s->size; e++) {
        s->staged[e] = as_computed(s, s->grad[e] / options->grad_scale);
        if (options->nonfinite == FS_NONFINITE_ZERO && !isfinite(s->staged[e]))
            s->staged[e] = 0;
    }
    for (size_t unit = 0; unit < n_units; unit++) {
        double factor = options->clip_factor;
        if (s->has_units && group->clip_adaptive < INFINITY) {
            const norm param = norm_of_unit(s, unit, s->param);
            norm grad = norm_of_unit(s, unit, s->staged);
            grad.root *= factor;
            factor *= limiting_factor(grad, group->clip_adaptive * fmax(ldexp(param.root, param.exponent), 1e-3), 1e-6);
        }
        for (size_t e = 0; e < s->size; e++)
            if (unit_of(s, e) == unit) {
                const double x = as_computed(s, s->staged[e] * as_computed(s, factor));
                s->staged[e] = x > group->clip_value ? group->clip_value : x < -group->clip_value ? -group->clip_value : x;
            }
    }
}

/* The parameter that this gradient leads to, by SGD or by the first step of NovoGrad. */
static void move_limited(const limited *s, const fs_group *group, bool is_scaled)
{
    const double lr = group->hyper[0], decay = 1 - lr * group->weight_decay;
    const double length = sqrt(sum_of_squares(s->staged, s->size));
    const double divisor = is_scaled ? as_computed(s, sqrt(length * length) + group->hyper[3]) : 1;
    const size_t n_units = s->size > 0 ? 1 + unit_of(s, s->size - 1) : 0;
    for (size_t e = 0; e < s->size; e++) {
        const double before = group->decay_mode == FS_DECOUPLED ? decay : 1;
        const double after = group->decay_mode == FS_DECOUPLED_AFTER ? decay : 1;
        const double param = as_computed(s, s->param[e] * as_computed(s, before));
        double direction = as_computed(s, (group->maximize ? -s->staged[e] : s->staged[e]) / divisor);
        if (is_scaled)
            direction = as_computed(s, direction + as_computed(s, as_computed(s, group->hyper[4]) * param));
        const double moved = as_computed(s, param - as_computed(s, as_computed(s, lr) * direction));
        s->moved[e] = as_computed(s, moved * as_computed(s, after));
    }
    for (size_t unit = 0; unit < n_units; unit++) {
        const bool is_limited = s->has_units && group->max_norm < INFINITY;
        const double factor = is_limited ? limiting_factor(norm_of_unit(s, unit, s->moved), group->max_norm, 0) : 1;
        for (size_t e = 0; e < s->size; e++)
            if (unit_of(s, e) == unit) {
                const double x = as_computed(s, s->moved[e] * as_computed(s, factor));
                s->wanted[e] = as_stored(s->dtype, x > group->upper ? group->upper : x);
            }
    }
}

static void check_spread(const limited *s, const spread *at, const double *wanted)
{
    static char items[MAX_LIMITED_SIZE * sizeof(double)];
    const size_t item = fs_dtype_size(s->dtype);
    bool is_same = true;
    copy_spread(at, s->shape, item, items, true);
    for (size_t e = 0; e < s->size; e++)
        is_same = is_same && same_number(read_item(s->dtype, items + e * item), as_stored(s->dtype, wanted[e]));
    CHECK(is_same);
}

static spread spread_limited(fs_array *array, int o, const limited *s, size_t layout, const double *values)
{
    static char items[MAX_LIMITED_SIZE * sizeof(double)];
    const size_t item = fs_dtype_size(s->dtype);
    const spread at = make_spread(s->shape, layout, item);
    for (size_t e = 0; e < s->size; e++)
        write_item(s->dtype, items + e * item, values[e]);
    copy_spread(&at, s->shape, item, items, false);
    fs_array_set(array, o, at.first, s->dtype, at.aligned, at.strides);
    return at;
}

/* Clip all these arrays in one plan, and take a step from where they were. */
static void check_units(const limited *samples, size_t n, size_t layout, fs_options options,
                        const fs_group *group, bool has_stats)
{
    static const double zeros[MAX_LIMITED_SIZE] = {0};
    static double changes[MAX_LIMITED_SIZE];
    const bool clips = options.nonfinite != FS_NONFINITE_ZERO && options.grad_scale == 1;
    spread param[MAX_LIMITED], grad[MAX_LIMITED], state[MAX_LIMITED];
    fs_plan *plan = fs_plan_new(n, 2, has_stats);
    plain(plan, find_rule("sgd"));
    plan->groups[layout % 2] = *group;
    for (size_t i = 0; i < n; i++) {
        const limited *s = &samples[i];
        int axes[3], n_axes = 0;
        for (int d = 0; d < 3; d++)
            if (s->counts[d])
                axes[n_axes++] = d;
        CHECK(fs_array_init(&plan->arrays[i], 3, s->shape) == FS_OK);
        plan->arrays[i].group = (int)(layout % 2);
        if (s->has_units)
            fs_array_set_units(&plan->arrays[i], n_axes, axes);
        param[i] = spread_limited(&plan->arrays[i], FS_PARAM, s, layout, s->param);
    }
    if (layout % 2)
        CHECK(fs_plan_finish(plan) == FS_OK);
    for (size_t i = 0; i < n; i++) {
        const size_t other = i % 2 ? layout : 3 * layout + 1;
        grad[i] = spread_limited(&plan->arrays[i], FS_GRAD, &samples[i], other % N_WRITABLE, samples[i].grad);
        state[i] = spread_limited(&plan->arrays[i], FS_STATE, &samples[i], other % N_WRITABLE, zeros);
    }
    if (layout % 2 == 0)
        CHECK(fs_plan_finish(plan) == FS_OK);
    for (size_t i = 0; i < n; i++) {
        const fs_array *array = &plan->arrays[i];
        CHECK(array->n_units == 0 || (char *)&array->unit_limits[array->n_units] <= array->operand[FS_GRAD_FACTOR].data);
    }
    if (clips)
        clip(plan, options);
    for (size_t i = 0; i < n && clips; i++) {
        check_spread(&samples[i], &grad[i], samples[i].staged);
        free(grad[i].buffer);
        grad[i] = spread_limited(&plan->arrays[i], FS_GRAD, &samples[i], (2 * layout + i) % N_WRITABLE, samples[i].grad);
    }
    take_step(plan, options);
    for (size_t i = 0; i < n; i++) {
        const limited *s = &samples[i];
        const size_t which = strlen(context);
        snprintf(context + which, sizeof context - which, ", array %zu", i);
        check_spread(s, &param[i], s->wanted);
        if (has_stats) {
            double n_zeros = 0;
            for (size_t e = 0; e < s->size; e++) {
                changes[e] = as_computed(s, s->wanted[e] - s->param[e]);
                n_zeros += s->grad[e] == 0;
            }
            CHECK(same_number(plan->stats[FS_PARAM_SQUARES][i], sum_of_squares(s->wanted, s->size)));
            CHECK(same_number(plan->stats[FS_UPDATE_SQUARES][i], sum_of_squares(changes, s->size)));
            CHECK(plan->stats[FS_ZERO_GRADS][i] == n_zeros);
        }
        context[which] = '\0';
        free(param[i].buffer);
        free(grad[i].buffer);
        free(state[i].buffer);
    }
    fs_plan_free(plan);
}

/* Units along any axes, in any layout, of one to several blocks, with numbers of which the squares are no doubles. */
void test_units(void)
{
    static const ptrdiff_t small[][3] = {{3, 5, 7}, {1, 1, 1}, {4, 1, 6}, {2, 3, 0}};
    static const struct { ptrdiff_t shape[3]; bool has_units, counts_first; fs_dtype dtype; } large[] = {
        {{3, 1, 7300}, true, true, FS_FLOAT64},   {{1, 9300, 1}, true, false, FS_FLOAT64},
        {{3, 1100, 1}, false, false, FS_FLOAT64}, {{2, 7169, 1}, true, true, FS_FLOAT32},
        {{3, 5, 200}, true, true, FS_FLOAT64},
    };
    static const fs_dtype dtypes[] = {FS_FLOAT64, FS_FLOAT32, FS_FLOAT64, FS_BFLOAT16, FS_FLOAT64, FS_FLOAT16, FS_FLOAT64};
    static const int exponents[][2] = {{0, 0}, {-30, -21}, {700, 1023}, {-700, -700}, {0, 700}};    /* parameter, gradient */
    static const struct {
        const char *rule;
        double clip_adaptive, max_norm, clip_value, upper, grad_scale;
        fs_nonfinite nonfinite;
        fs_decay decay_mode;
        bool maximize, has_stats;
    } cases[] = {
        {"sgd", 0.5, INFINITY, INFINITY, INFINITY, 1, FS_NONFINITE_PROPAGATE, FS_DECOUPLED, false, false},
        {"sgd", INFINITY, 1, INFINITY, INFINITY, 1, FS_NONFINITE_PROPAGATE, FS_COUPLED, true, false},
        {"sgd", 2, 0.75, INFINITY, 0.25, 3, FS_NONFINITE_ZERO, FS_DECOUPLED_AFTER, true, false},
        {"sgd", 1e-4, INFINITY, 1e-6, INFINITY, 1, FS_NONFINITE_PROPAGATE, FS_COUPLED, true, true},
        {"sgd", INFINITY, 0x1p-720, INFINITY, INFINITY, 3, FS_NONFINITE_PROPAGATE, FS_DECOUPLED, false, true},
        {"novograd", 0.5, 0.75, INFINITY, INFINITY, 3, FS_NONFINITE_ZERO, FS_DECOUPLED_AFTER, false, false},
    };
    static limited samples[MAX_LIMITED];
    size_t n = 0;
    random_state = 1;
    for (size_t i = 0; i < LENGTH(large) + LENGTH(small) * 8; i++) {
        const bool is_small = i >= LENGTH(large);
        const size_t l = is_small ? 0 : i, axes = i - LENGTH(large);
        const int *exponent = exponents[i % LENGTH(exponents)];
        limited *s = &samples[n++];
        *s = (limited){.has_units = is_small || large[l].has_units,
                       .dtype = is_small ? dtypes[i % LENGTH(dtypes)] : large[l].dtype};
        memcpy(s->shape, is_small ? small[axes / 8] : large[l].shape, sizeof s->shape);
        for (int d = 0; d < 3; d++)
            s->counts[d] = is_small ? axes % 8 >> d & 1 : d == 0 && large[l].counts_first;
        s->size = (size_t)(s->shape[0] * s->shape[1] * s->shape[2]);
        for (double **values = &s->param; values <= &s->wanted; values++)
            *values = calloc(s->size + 1, sizeof **values);
        const bool is_double = s->dtype == FS_FLOAT64;
        const int of_param = is_double ? exponent[0] : 0, of_grad = is_double ? exponent[1] : -7 * (int)(i % 4);
        for (size_t e = 0; e < s->size; e++) {
            s->param[e] = as_stored(s->dtype, e % 3 ? ldexp(random_signed(), of_param) : 0);
            s->grad[e] = as_stored(s->dtype, e % 5 ? ldexp(random_signed(), of_grad) : 0);
        }
        if (i % 4 == 2 && s->size > 1)
            s->grad[s->size / 2] = i % 8 == 2 ? INFINITY : NAN;
        if (i % 8 / 2 == 1 && s->size > 1)
            s->param[s->size / 2] = INFINITY;
    }
    for (size_t c = 0; c < LENGTH(cases); c++) {
        fs_plan *settings = fs_plan_new(0, 1, false);
        fs_options options = plain(settings, find_rule(cases[c].rule));
        fs_group *group = &settings->groups[0];
        options.clip_factor = 0.75;
        options.grad_scale = cases[c].grad_scale;
        options.nonfinite = cases[c].nonfinite;
        group->clip_adaptive = cases[c].clip_adaptive;
        group->max_norm = cases[c].max_norm;
        group->clip_value = cases[c].clip_value;
        group->upper = cases[c].upper;
        group->decay_mode = cases[c].decay_mode;
        group->weight_decay = group->decay_mode == FS_COUPLED ? 0 : 0.5;
        group->maximize = cases[c].maximize;
        for (size_t i = 0; i < n; i++) {
            stage_limited(&samples[i], &options, group);
            move_limited(&samples[i], group, strcmp(cases[c].rule, "novograd") == 0);
        }
        for (size_t layout = 0; layout < N_WRITABLE; layout++) {
            CONTEXT("case %zu, layout %zu", c, layout);
            options.n_threads = 1 + (int)layout % 3;
            check_units(samples, n, layout, options, group, cases[c].has_stats);
        }
        fs_plan_free(settings);
    }
    for (size_t i = 0; i < n; i++)
        for (double **values = &samples[i].param; values <= &samples[i].wanted; values++)
            free(*values);
}

/* ---- Factored variance ---- */

/* Adafactor as its paper has it, in wide doubles, of matrices of which chunks, blocks and runs end somewhere; and with all
 * of the variance. */
void test_factored(void)
{
    enum { LARGEST = 70 * 2060, BEYOND = 100, ROOM = LARGEST + BEYOND, STEPS = 3 };
    static const ptrdiff_t shapes[][3] = {{1, 1, 1},     {2, 3, 5},   {1, 70, 2060}, {3, 33, 31}, {2, 5, 1500},
                                          {2, 64, 1024}, {1, 700, 3}, {1, 40, 100},  {2, 0, 3}};
    static const struct { double hyper[FS_MAX_HYPER], grad_scale; } cases[] = {
        {{0.75, -0.75, 1e-3, 0.25, 1.5, FS_TORCH, 0.125}, 2.0},
        {{0.25, -0.75, 0.75, 0.25, 1.5, FS_TORCH, 0.0}, 1.0},
        {{0.25, -0.5, 0.125, 1e-3, 1.0, FS_KERAS, 0.0}, 1.0},
        {{0.25, -0.5, NAN, 1e-3, 1.0, FS_TORCH, 0.0}, 1.0},
        {{1.5, -0.5, 0.125, 1e-3, 1.0, FS_OPTAX, 0.125}, 1.0},
        {{0.25, -0.5, 0.0, 1e-3, 1.0, FS_OPTAX, 0.0}, 0x1p100},    /* with a row and a column without gradients */
    };
    static char param[8 * ROOM], grad[8 * ROOM], rows[8 * ROOM], columns[8 * ROOM], all[8 * ROOM];
    static wide expected[LARGEST], row[LARGEST], column[LARGEST], variance[LARGEST], direction[LARGEST];
    random_state = 1;
    for (size_t s = 0; s < LENGTH(shapes); s++)
        for (size_t c = 0; c < LENGTH(cases); c++)
            for (int kind = 0; kind < 6; kind++) {
                const bool is_factored = kind % 2;
                const int n_threads = kind / 2 == 1 ? 3 : 1;
                const fs_dtype real = kind / 2 == 2 ? FS_FLOAT32 : FS_FLOAT64;
                const size_t item = fs_dtype_size(real);
                CONTEXT("shape %zu, case %zu, factored %d, %d threads, real %d", s, c, is_factored, n_threads, real);
                const double *h = cases[c].hyper, epsilon = real == FS_FLOAT64 ? DBL_EPSILON : FLT_EPSILON;
                const double grad_scale = fmin(cases[c].grad_scale, real == FS_FLOAT64 ? 0x1p100 : 0x1p20);
                const size_t n = (size_t)shapes[s][0], n_rows = (size_t)shapes[s][1], n_columns = (size_t)shapes[s][2];
                const size_t size = n * n_rows * n_columns;
                const ptrdiff_t strides[] = {(ptrdiff_t)(n_rows * n_columns * item),
                                             (ptrdiff_t)(n_columns * item), (ptrdiff_t)item};
                fs_plan *plan = fs_plan_new(1, 1, false);
                fs_array *array = &plan->arrays[0];
                CHECK(fs_array_init(array, 3, shapes[s]) == FS_OK);
                fs_array_set(array, FS_PARAM, param, real, true, strides);
                fs_array_set(array, FS_GRAD, grad, real, true, strides);
                if (is_factored)
                    fs_array_set_factors(array, rows, columns);
                else
                    fs_array_set(array, FS_STATE, all, real, true, strides);
                CHECK(fs_plan_finish(plan) == FS_OK);
                fs_options options = plain(plan, find_rule(is_factored ? "adafactor" : "adafactor_of_vectors"));
                options.n_threads = n_threads;
                options.grad_scale = grad_scale;
                memcpy(plan->groups[0].hyper, h, sizeof cases[c].hyper);
                memset(rows, 0, (size + BEYOND) * item);
                memset(columns, 0, (size + BEYOND) * item);
                memset(all, 0, (size + BEYOND) * item);
                for (size_t e = 0; e < size; e++) {
                    row[e] = column[e] = variance[e] = 0.0;
                    write_item(real, param + e * item, random_signed());
                    expected[e] = read_item(real, param + e * item);
                }
                for (int t = 1; t <= STEPS; t++) {
                    const wide weight = powl(t, h[1]), eps = isnan(h[2]) ? epsilon : h[2];
                    const wide inside = h[5] == FS_TORCH ? 0 : eps, least = h[5] == FS_TORCH ? eps : 0;
                    wide param_squares = 0, direction_squares = 0;
                    for (size_t e = 0; e < size; e++) {
                        const bool is_gap = eps == 0 && (e / n_columns % n_rows == 1 || e % n_columns == 1);
                        write_item(real, grad + e * item, is_gap ? 0.0 : random_signed());
                    }
                    for (size_t i = 0; i < n * n_rows; i++)
                        row[i] *= 1 - weight;
                    for (size_t i = 0; i < n * n_columns; i++)
                        column[i] *= 1 - weight;
                    for (size_t e = 0; e < size; e++) {
                        const wide g = read_item(real, grad + e * item) / grad_scale;
                        row[e / n_columns] += weight * (g * g + inside) / n_columns;
                        column[e / n_columns / n_rows * n_columns + e % n_columns] += weight * (g * g + inside) / n_rows;
                    }
                    for (size_t m = 0; m < n; m++) {
                        wide mean = 0;
                        for (size_t r = 0; r < n_rows; r++)
                            mean += row[m * n_rows + r] / n_rows;
                        for (size_t e = m * n_rows * n_columns; e < (m + 1) * n_rows * n_columns; e++) {
                            const wide g = read_item(real, grad + e * item) / grad_scale;
                            const wide product = row[e / n_columns] / fmaxl(mean, least);
                            variance[e] += weight * (g * g + inside - variance[e]);
                            const wide v = is_factored ? product * column[m * n_columns + e % n_columns] : variance[e];
                            direction[e] = g == 0 ? 0 : g / fmaxl(sqrtl(v), least);
                            param_squares += expected[e] * expected[e];
                            direction_squares += direction[e] * direction[e];
                        }
                    }
                    const wide rms = sqrtl(param_squares / size), excess = sqrtl(direction_squares / size) / h[4];
                    const wide limit = h[5] == FS_OPTAX ? INFINITY : 1 / sqrtl(t);
                    const wide rate = fmaxl(h[3], rms) * fminl(h[0], limit) / fmaxl(1, excess);
                    const wide decay = (h[5] == FS_OPTAX ? 1 : h[0]) * h[6];
                    for (size_t e = 0; e < size; e++)
                        expected[e] = (1 - decay) * expected[e] - rate * direction[e];
                    CHECK(take_step(plan, options).applied);
                }
                for (size_t e = 0; e < size + BEYOND; e++) {
                    const bool is_used = is_factored && size > 0;
                    const double p = read_item(real, param + e * item), v = read_item(real, all + e * item);
                    const double r = read_item(real, rows + e * item), col = read_item(real, columns + e * item);
                    CHECK(e >= size || fabsl(p - expected[e]) < 500 * epsilon);
                    CHECK(is_factored || e >= size ? v == 0.0 : fabsl(v - variance[e]) < 50 * epsilon);
                    CHECK(e < n * n_rows && is_used ? fabsl(r - row[e]) < 50 * epsilon : r == 0.0);
                    CHECK(e < n * n_columns && is_used ? fabsl(col - column[e]) < 50 * epsilon : col == 0.0);
                }
                fs_plan_free(plan);
            }
}
