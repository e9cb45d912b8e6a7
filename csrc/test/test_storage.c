/* Tests of where elements lie, in which types, and how they come to the kernels and back. */
#include "harness.h"

/* Every half there is, from storage and back, side by side and with gaps. */
static void check_all_halves(fs_dtype dtype, fs_dtype real, const fs_kernels *k, size_t gap)
{
    enum { N = 1 << 16, MAX_GAP = 3 };
    static uint16_t stored[MAX_GAP * N], back[MAX_GAP * N];
    static double run[N];
    for (size_t i = 0; i < N; i++)
        stored[i * gap] = (uint16_t)i;
    k->load[dtype](1, N, run, (char *)stored, 0, (ptrdiff_t)(gap * sizeof *stored));
    k->store[dtype](1, N, run, (char *)back, 0, (ptrdiff_t)(gap * sizeof *back));
    for (size_t i = 0; i < N; i++) {
        const double x = from_half(dtype, (unsigned)i), y = read_item(real, (char *)run + i * fs_dtype_size(real));
        CHECK(isnan(x) ? isnan(y) : x == y && signbit(x) == signbit(y));
        CHECK(same_half(dtype, back[i * gap], (uint16_t)i));
    }
}

void test_halves_load_and_store(void)
{
    for (fs_dtype dtype = FS_FLOAT16; dtype <= FS_BFLOAT16; dtype++)
        for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++)
            FOR_LEVELS(level) {
                CONTEXT("dtype %d, real %d, level %s", dtype, real, fs_level_name(level));
                check_all_halves(dtype, real, fs_kernels_of(level, real), 1);
                check_all_halves(dtype, real, fs_kernels_of(level, real), 3);
            }
}

void test_halves_round(void)
{
    enum { N = 4096, CHUNKS = 1024 };
    static uint32_t bits[N];
    static uint16_t expected[N], stored[N];
    random_state = 1;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        for (size_t i = 0; i < N; i++)
            bits[i] = random_float_bits();
        for (fs_dtype dtype = FS_FLOAT16; dtype <= FS_BFLOAT16; dtype++) {
            for (size_t i = 0; i < N; i++)
                expected[i] = to_half(dtype, read_item(FS_FLOAT32, (char *)&bits[i]));
            FOR_LEVELS(level) {
                fs_kernels_of(level, FS_FLOAT32)->store[dtype](1, N, bits, (char *)stored, 0, sizeof *stored);
                for (size_t i = 0; i < N; i++)
                    if (!same_half(dtype, stored[i], expected[i])) {
                        CONTEXT("dtype %d, level %s, float32 %08x: %04x, not %04x", dtype, fs_level_name(level),
                                (unsigned)bits[i], stored[i], expected[i]);
                        CHECK(false);
                    }
            }
        }
    }
}

enum { N_TURNS = 3 * N_LAYOUTS };

/* The layout of an operand of an array: in the first turns each operand has another, then all have the same, then all but
 * one. */
static size_t choose_layout(size_t i, int o, size_t turn)
{
    const size_t layout = turn % N_LAYOUTS;
    switch (turn / N_LAYOUTS) {
    case 0:
        return (i + 3 * (size_t)o + layout) % N_LAYOUTS;
    case 1:
        return (i + layout) % N_LAYOUTS;
    default:
        return (i / FS_N_OPERANDS + layout + (i % FS_N_OPERANDS == (size_t)o)) % N_LAYOUTS;
    }
}

/* The operands of an array that a rule with so many uses. */
#define FOR_USED(plan, i, o, n_used)                                                                             \
    for (int o = 0; o < FS_N_OPERANDS; o++)                                                                      \
        if ((o < n_used || o == FS_AVERAGE) && operand(plan, i, o)->data)

/* A plan whose operands are spreads against a contiguous one, in four steps, the last of which clears
 * the gradients, or in clipping. It has the states that the rule needs. */
static void check_layouts(trio t, fs_options options, bool clips, const ptrdiff_t *shape, size_t turn)
{
    const int n_used = FS_STATE + fs_rule_states(t.initial->groups[0].rule);
    bool apart = true;
    spread got[N_PAIRS][FS_N_OPERANDS], wanted[N_PAIRS][FS_N_OPERANDS];
    fs_plan *plan = make_plan_like(t.initial, 3, shape);
    copy_settings(plan, t.initial);
    copy_plan(t.expected, t.initial);
    for (size_t i = 0; i < N_PAIRS; i++)
        FOR_USED(t.initial, i, o, n_used) {
            const fs_operand *initial = operand(t.initial, i, o), *expected = operand(t.expected, i, o);
            const size_t item = fs_dtype_size(initial->dtype);
            size_t l = choose_layout(i, o, turn);
            if (l >= N_WRITABLE && (o != FS_GRAD || clips))
                l = 0;
            apart = apart && l < N_WRITABLE;
            spread *s = &got[i][o];
            *s = make_spread(shape, l, item);
            wanted[i][o] = make_spread(shape, l, item);
            copy_spread(s, shape, item, initial->data, false);
            copy_spread(s, shape, item, expected->data, true);    /* what broadcasting has left */
            const ptrdiff_t earlier[] = {s->strides[0], (ptrdiff_t)item, s->strides[1]};    /* no trace of it may be left */
            fs_array_set(&plan->arrays[i], o, s->first, initial->dtype, true, earlier);
            fs_array_set(&plan->arrays[i], o, s->first, initial->dtype, s->aligned, s->strides);
        }
    const fs_report wanted_report = clips ? clip(t.expected, options) : take_3_steps(t.expected, options);
    const fs_report report = clips ? clip(plan, options) : take_3_steps(plan, options);
    CHECK(report.applied);
    CHECK(report.grad_norm == wanted_report.grad_norm);
    if (!clips) {
        take_step(t.expected, options);
        options.clear_grads = apart;
        take_step(plan, options);
        if (!apart)
            fs_clear(plan, &options);
    }
    for (size_t i = 0; i < N_PAIRS; i++)
        FOR_USED(t.initial, i, o, n_used) {
            const fs_operand *expected = operand(t.expected, i, o);
            if (o == FS_GRAD && !clips)
                memset(expected->data, 0, operand_bytes(t.expected, i, o));
            copy_spread(&wanted[i][o], shape, fs_dtype_size(expected->dtype), expected->data, false);
            CHECK(memcmp(got[i][o].buffer, wanted[i][o].buffer, got[i][o].n_bytes) == 0);
            free(got[i][o].buffer);
            free(wanted[i][o].buffer);
        }
    fs_plan_free(plan);
}

/* All rules and turns on small arrays; on larger ones the rules share the turns among themselves, and always the levels. */
void test_layouts(void)
{
    static const ptrdiff_t shapes[][3] = {{3, 37, 37}, {2, 40, 37}, {70, 2, 21}, {2, 70, 66}, {2, 1100, 3},
                                          {1, 2, 20},  {2, 2, 2},   {1, 5, 1},   {3, 0, 2},   {1, 1, 1}};
    enum { N_LARGE = 5 };
    int n_checked = 0;
    for (size_t s = 0; s < LENGTH(shapes); s++) {
        const ptrdiff_t *shape = shapes[s];
        const int stride = s >= N_LARGE ? 1 : quick ? N_TURNS / 2 : 3;
        size_t sizes[N_PAIRS];
        for (size_t i = 0; i < N_PAIRS; i++)
            sizes[i] = (size_t)(shape[0] * shape[1] * shape[2]);
        const trio t = make_trio(MIXED, N_PAIRS, sizes);
        FOR_RULES(rule)
            for (int turn = (rule + (int)s) % stride; turn < N_TURNS; turn += stride, n_checked++) {
                fs_level_set((fs_level)((rule / 3 + turn + (int)s) % FS_N_LEVELS));    /* if there is one */
                CONTEXT("%s, %td x %td x %td, turn %d, level %s", fs_rule_name(rule), shape[0], shape[1], shape[2], turn,
                        fs_level_name(fs_level_current()));
                fs_options options = n_checked % 4 ? busy(t.initial, rule) : plain(t.initial, rule);
                const bool clips = n_checked % 4 == 3;
                if (clips)
                    options.grad_scale = 1.0;
                options.n_threads = n_checked / 4 % 2 ? 3 : 1;    /* three cut some array in two */
                check_layouts(t, options, clips, shape, (size_t)turn);
            }
        free_trio(t);
    }
}

/* What works on a tile changes all of n elements and nothing beyond. */
void test_runs_have_ends(void)
{
    enum { MAX_SIZE = 70, EDGE = 4 };
    const fs_stages stages = {.factor = -0.5, .clip_value = 100, .weight_decay = 0.5, .l1 = 0.25};
    double memory[MAX_SIZE + 2 * EDGE], param[MAX_SIZE];
    for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++)
        FOR_LEVELS(level)
            for (size_t n = 0; n <= MAX_SIZE; n++) {
                const fs_kernels *k = fs_kernels_of(level, real);
                const size_t item = fs_dtype_size(real);
                char *const run = (char *)memory + EDGE * item;
                CONTEXT("real %d, level %s, %zu elements", real, fs_level_name(level), n);
                for (int nonfinite = 0; nonfinite <= 1; nonfinite++) {
                    for (size_t i = 0; i < n + 2 * EDGE; i++)
                        write_item(real, (char *)memory + i * item, nonfinite ? NAN : 24);
                    for (size_t i = 0; i < n; i++)
                        write_item(real, (char *)param + i * item, 2);
                    size_t n_nan = 0, n_inf = 0;
                    k->count_nonfinite(n, run, &n_nan, &n_inf);
                    CHECK(n_nan == (nonfinite ? n : 0) && n_inf == 0);
                    CHECK(k->unscale(n, run, run, 3, true) == run);
                    for (size_t i = 0; i < n; i++)
                        CHECK(read_item(real, run + i * item) == (nonfinite ? 0 : 8));
                    CHECK(k->apply_stages(n, run, run, param, &stages) == run);
                    for (size_t i = 0; i < n; i++)
                        CHECK(read_item(real, run + i * item) == (nonfinite ? 1.25 : -2.75));
                    double sum = 0, changes = 0;
                    k->sum_squares_and_changes(n, param, run, &sum, &changes);
                    CHECK(sum == (double)n * 4 && changes == (double)n * (nonfinite ? 0.75 * 0.75 : 4.75 * 4.75));
                    for (size_t i = 0; i < EDGE; i++)
                        for (int after = 0; after <= 1; after++) {
                            const double x = read_item(real, (char *)memory + (i + (after ? n + EDGE : 0)) * item);
                            CHECK(nonfinite ? isnan(x) : x == 24);
                        }
                }
            }
}

/* Between arrays without gaps and those of `spaced`, which has one of an element between neighbours. */
static void copy_spaced(fs_plan *spaced, fs_plan *plan, ptrdiff_t gap, bool to_spaced)
{
    for (int o = 0; o < FS_RESIDUAL; o++) {
        const ptrdiff_t item = (ptrdiff_t)fs_dtype_size(operand(plan, 0, o)->dtype);
        for (ptrdiff_t e = 0; e < (ptrdiff_t)plan->arrays[0].size; e++) {
            char *place = operand(spaced, 0, o)->data + e * gap * item, *other = operand(plan, 0, o)->data + e * item;
            memcpy(to_spaced ? place : other, to_spaced ? other : place, (size_t)item);
        }
    }
}

/* Kernels that read or write one element too many die here: `pages` lie between inaccessible ones. */
static void check_in_pages(char **pages, size_t page_size, fs_dtype storage, size_t size)
{
    const trio t = make_trio((int)storage, 1, &size);
    const ptrdiff_t shape = (ptrdiff_t)size, item = (ptrdiff_t)fs_dtype_size(storage);
    fs_plan *plan = make_plan_like(t.initial, 1, &shape);
    for (ptrdiff_t gap = -2; gap <= 2; gap++)    /* 1: none; negative: backwards from the end */
        for (int at_end = 0; at_end <= 1; at_end++) {
            const ptrdiff_t extent = (shape - 1) * gap * item, stride = gap * item;
            if (gap == 0 || gap == -1)
                continue;
            for (int o = 0; o < FS_RESIDUAL; o++) {
                const ptrdiff_t low = extent < 0 ? -extent : 0, high = extent < 0 ? 0 : extent;
                char *data = pages[o] + (at_end ? (ptrdiff_t)page_size - item - high : low);
                fs_array_set(&plan->arrays[0], o, data, storage, true, &stride);
            }
            FOR_RULES(rule)
                for (int is_busy = 0; is_busy <= 1; is_busy++)
                    FOR_LEVELS(level) {
                        CONTEXT("%s, storage %d, size %zu, gap %td, at end %d, busy %d, level %s", fs_rule_name(rule),
                                storage, size, gap, at_end, is_busy, fs_level_name(level));
                        const fs_options options = is_busy ? busy(t.initial, rule) : plain(t.initial, rule);
                        copy_plan(t.expected, t.initial);
                        copy_settings(plan, t.initial);
                        copy_spaced(plan, t.initial, gap, true);
                        take_step(t.expected, options);
                        CHECK(take_step(plan, options).applied);
                        copy_settings(t.plan, plan);
                        copy_spaced(plan, t.plan, gap, false);
                        CHECK(same_plan(t.plan, t.expected));
                    }
        }
    fs_plan_free(plan);
    free_trio(t);
}

void test_guard_pages(void)
{
    const size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
    char *pages[FS_RESIDUAL];
    for (int o = 0; o < FS_RESIDUAL; o++) {
        pages[o] = mmap(NULL, 3 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(pages[o] != MAP_FAILED);
        pages[o] += page_size;
        CHECK(mprotect(pages[o], page_size, PROT_READ | PROT_WRITE) == 0);
    }
    for (int storage = 0; storage < N_DTYPES; storage++)
        for (size_t size = 1; size <= 130; size += quick ? 21 : 1)
            check_in_pages(pages, page_size, (fs_dtype)storage, size);
    for (int o = 0; o < FS_RESIDUAL; o++)
        munmap(pages[o] - page_size, 3 * page_size);
}
