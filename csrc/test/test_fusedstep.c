/* Tests of the C core by itself, run by `make test` in csrc: the program, and what concerns no one part alone. Bits are
 * compared wherever bits are promised. */
#include "harness.h"

#include <time.h>

/* Every level, and number of threads where there is work for several, against the baseline with one thread. */
static void check_levels_and_threads(trio t, int rule, bool is_busy)
{
    const size_t size = t.initial->arrays[0].size;
    fs_options options = is_busy ? busy(t.initial, rule) : plain(t.initial, rule);
    t.initial->groups[0].decay_mode = size % 4;
    copy_plan(t.expected, t.initial);
    CONTEXT("%s, size %zu", fs_rule_name(rule), size);
    CHECK(fs_level_set(FS_BASELINE) == FS_OK);
    const fs_report expected = take_3_steps(t.expected, options);
    CHECK(size == 0 || !same_operand(t.expected, t.initial, FS_PARAM));
    FOR_LEVELS(level)
        for (options.n_threads = 1; options.n_threads <= (size > FS_BLOCK ? 3 : 1); options.n_threads++) {
            CONTEXT("%s, size %zu, real %d, busy %d, level %s, %d threads", fs_rule_name(rule), size,
                    t.initial->arrays[0].real, is_busy, fs_level_name(level), options.n_threads);
            copy_plan(t.plan, t.initial);
            const fs_report report = take_3_steps(t.plan, options);
            CHECK(report.applied);
            CHECK(report.has_norm == is_busy);
            CHECK(is_busy || report.clip_factor == 1);
            CHECK(report.grad_norm == expected.grad_norm);
            CHECK(report.clip_factor == expected.clip_factor);
            CHECK(same_plan(t.plan, t.expected));
        }
}

void test_levels_and_threads(void)
{
    static const size_t large[] = {127, 128, 129, 1023, 1024, 1025, 5000, 30011};
    for (size_t s = 0; s < 71 + LENGTH(large); s += quick && s < 60 ? 17 : 1)
        for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++) {
            const size_t size = s <= 70 ? s : large[s - 71];
            const trio t = make_trio((int)real, 1, &size);
            FOR_RULES(rule) {
                check_levels_and_threads(t, rule, false);
                check_levels_and_threads(t, rule, true);
            }
            free_trio(t);
        }
}

/* Many arrays in two groups step as each would alone. */
void test_many_arrays(void)
{
    enum { N_ARRAYS = 160 };
    static const size_t some_sizes[] = {0, 1, 1023, 3000, 0, 7, 1024, 1025, 2049, 16, 500, 5000};
    size_t sizes[N_ARRAYS];
    for (size_t i = 0; i < N_ARRAYS; i++)
        sizes[i] = some_sizes[i % LENGTH(some_sizes)];
    const trio t = make_trio(MIXED, N_ARRAYS, sizes);
    fs_options options = plain(t.initial, find_rule("adam"));
    use_rule(&t.initial->groups[1], find_rule("sgd_momentum"));
    t.initial->groups[1].hyper[0] = 0.5;
    t.initial->groups[1].l1 = 0.125;
    t.initial->groups[1].clip_norm_per_array = 0.5;
    for (size_t i = 0; i < N_ARRAYS; i++)
        t.initial->arrays[i].group = i % 3 == 0;

    copy_plan(t.expected, t.initial);
    for (size_t i = 0; i < N_ARRAYS; i++) {
        fs_plan *alone = fs_plan_new(1, 1, false);
        init_flat(&alone->arrays[0], sizes[i]);
        alone->groups[0] = t.expected->groups[t.expected->arrays[i].group];
        for (int o = 0; o < FS_N_OPERANDS; o++) {
            const fs_operand *expected = operand(t.expected, i, o);
            set_contiguous(&alone->arrays[0], o, expected->data, expected->dtype);
        }
        CHECK(fs_plan_finish(alone) == FS_OK);
        CHECK(take_3_steps(alone, options).applied);
        fs_plan_free(alone);
    }
    t.expected->step = 3;
    FOR_LEVELS(level)
        for (options.n_threads = 1; options.n_threads <= 4; options.n_threads++) {  /* for more, LLVM's OpenMP leaks */
            CONTEXT("level %s, %d threads", fs_level_name(level), options.n_threads);
            copy_plan(t.plan, t.initial);
            CHECK(take_3_steps(t.plan, options).applied);
            CHECK(same_plan(t.plan, t.expected));
        }
    free_trio(t);
}

/* However many arrays there are, a step wakes its threads once for the update, and once for the norm if need be. */
void test_passes(void)
{
    enum { N_ARRAYS = 1000 };
    size_t sizes[N_ARRAYS];
    for (size_t i = 0; i < N_ARRAYS; i++)
        sizes[i] = 100 + i;
    fs_plan *plan = make_plan(FS_FLOAT32, N_ARRAYS, sizes);
    fs_options options = plain(plan, find_rule("adam"));
    n_passes = 0;
    take_step(plan, options);
    CHECK(n_passes == 1);
    options.clip_norm = 1.0;
    options.nonfinite = FS_NONFINITE_STOP;
    take_step(plan, options);
    CHECK(n_passes == 3);
    free_plan(plan);
}

void test_empty_plans(void)
{
    static const size_t nothing[] = {0, 0, 0};
    for (size_t n_arrays = 0; n_arrays <= 3; n_arrays++) {
        CONTEXT("%zu arrays", n_arrays);
        fs_plan *plan = make_plan(MIXED, n_arrays, nothing);
        const fs_options options = busy(plan, find_rule("adam"));
        fs_report report = take_step(plan, options);
        CHECK(report.applied && report.has_norm && report.grad_norm == 0 && report.clip_factor == 1);
        CHECK(plan->step == 1);
        report = clip(plan, options);
        CHECK(report.applied);
        free_plan(plan);
    }
}

/* One element without dimensions, aligned or not. */
void test_scalar(void)
{
    const size_t one = 1;
    const trio t = make_trio(FS_FLOAT32, 1, &one);
    char memory[FS_RESIDUAL][9];
    FOR_RULES(rule)
        for (int shift = 0; shift <= 1; shift++) {
            CONTEXT("%s, shift %d", fs_rule_name(rule), shift);
            fs_plan *plan = make_plan_like(t.initial, 0, NULL);
            const fs_options options = busy(t.initial, rule);
            copy_settings(plan, t.initial);
            copy_plan(t.expected, t.initial);
            for (int o = 0; o < FS_RESIDUAL; o++) {
                memcpy(memory[o] + shift, operand(t.initial, 0, o)->data, sizeof(float));
                fs_array_set(&plan->arrays[0], o, memory[o] + shift, FS_FLOAT32, false, NULL);
            }
            take_3_steps(plan, options);
            take_3_steps(t.expected, options);
            CHECK(same_plan(plan, t.expected));
            fs_plan_free(plan);
        }
    free_trio(t);
}

void test_half_made_plans(void)
{
    float data[6] = {0};
    const ptrdiff_t shape[] = {2, 3}, strides[] = {4, 8};
    fs_plan_free(NULL);
    fs_plan_free(fs_plan_new(0, 0, false));
    for (int n_set = 0; n_set <= FS_N_OPERANDS; n_set++) {
        fs_plan *plan = fs_plan_new(2, 1, false);
        CHECK(plan != NULL && fs_array_init(&plan->arrays[1], 2, shape) == FS_OK);
        for (int o = 0; o < n_set; o++)
            for (int times = 0; times < 2; times++)
                fs_array_set(&plan->arrays[1], o, data, FS_FLOAT32, true, strides);
        fs_plan_free(plan);
    }
}

/* Each allocation fails once: the caller is told, and nothing leaks. */
void test_out_of_memory(void)
{
    double data[6] = {0};
    const ptrdiff_t shape[] = {2, 3}, strides[] = {24, 8};
    for (int kind = 0; kind < 8; kind++) {
        const bool has_stats = kind % 2, has_units = kind / 2 % 2, has_factors = kind / 4;
        int n_failed = 0;
        for (bool done = false; !done; n_failed += !done) {
            callocs_left = n_failed;
            fs_plan *plan = fs_plan_new(2, 1, has_stats);
            bool complete = plan != NULL;
            for (int i = 0; complete && i < 2; i++)
                complete = fs_array_init(&plan->arrays[i], 2, shape) == FS_OK;
            if (complete)
                fs_array_set(&plan->arrays[1], FS_PARAM, data, FS_FLOAT64, true, strides);
            if (complete && has_units)
                fs_array_set_units(&plan->arrays[1], 0, NULL);
            if (complete && has_factors)
                fs_array_set_factors(&plan->arrays[1], data, data);
            complete = complete && fs_plan_finish(plan) == FS_OK;
            done = callocs_left >= 0;
            CONTEXT("stats %d, units %d, factors %d, allocation %d", has_stats, has_units, has_factors, n_failed);
            CHECK(complete == done);
            callocs_left = -1;
            fs_plan_free(plan);
        }
        CHECK(n_failed == 18 + has_units + has_factors);
    }
}

static size_t n_parts_seen;

static void spin(const void *nanoseconds, size_t part, size_t n_parts)
{
    struct timespec start, now;
    if (part == 0)
        n_parts_seen = n_parts;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < *(const long *)nanoseconds);
}

static size_t n_parts_of(size_t n_elements, long nanoseconds)
{
    fs_team_run(2, n_elements, spin, &nanoseconds);
    return n_parts_seen;
}

/* A short pass after a pause is done alone; a long one, or one after many short ones, by a team. The first test of all: what
 * teams have lost by then decides as well. */
void test_team(void)
{
    enum { SHORT = 30000, LONG = 1 << 30, ENOUGH = 20000 };
    const size_t all = fs_openmp() ? 2 : 1;
    fs_threads_insist(false);
    CHECK(n_parts_of(LONG, 0) == all);
    const struct timespec pause = {.tv_nsec = 20000000};
    nanosleep(&pause, NULL);
    CHECK(n_parts_of(SHORT, 50000) == 1);
    int n = 0;
    while (n_parts_of(SHORT, 50000) != all && n < ENOUGH)
        n++;
    CHECK(n < ENOUGH && (n > 0 || all == 1));
    fs_threads_insist(true);
}

enum { PARALLEL_SIZE = 100003 };

void test_fork(void)
{
    const size_t size = PARALLEL_SIZE;
    const trio t = make_trio(FS_FLOAT32, 1, &size);
    fs_options options = busy(t.initial, find_rule("adam"));
    options.n_threads = 3;
    copy_plan(t.expected, t.initial);
    copy_plan(t.plan, t.initial);
    take_step(t.expected, options);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        take_step(t.plan, options);
        _exit(same_plan(t.plan, t.expected) && fs_threads_get() == 1 ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CONTEXT("wait status %x", (unsigned)status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    take_step(t.plan, options);
    CHECK(same_plan(t.plan, t.expected));
    free_trio(t);
}

static void *take_20_steps(void *plan)
{
    fs_options options = busy(plan, find_rule("adam"));
    options.n_threads = 2;
    for (int t = 0; t < 20; t++)
        take_step(plan, options);
    return NULL;
}

/* Different plans in different threads at the same time: ours, and those of a parallel region. */
void test_plans_are_independent(void)
{
    enum { N_PLANS = 5 };
    const size_t size = PARALLEL_SIZE;
    fs_plan *plans[N_PLANS];
    pthread_t threads[2];
    for (int i = 0; i < N_PLANS; i++)
        plans[i] = make_plan(FS_FLOAT32, 1, &size);
    take_20_steps(plans[0]);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, take_20_steps, plans[1 + i]) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(2)
#endif
    for (int i = 3; i < N_PLANS; i++)
        take_20_steps(plans[i]);
    for (int i = 1; i < N_PLANS; i++) {
        CONTEXT("plan %d", i);
        CHECK(same_plan(plans[i], plans[0]));
    }
    for (int i = 0; i < N_PLANS; i++)
        free_plan(plans[i]);
}

void test_settings(void)
{
    static const size_t sizes[] = {[FS_FLOAT32] = 4, [FS_FLOAT64] = 8, [FS_FLOAT16] = 2, [FS_BFLOAT16] = 2};
    for (int dtype = 0; dtype < N_DTYPES; dtype++)
        CHECK(fs_dtype_size((fs_dtype)dtype) == sizes[dtype]);
    CHECK(fs_rule_numbers(fs_rule_count()) == 0);
    CHECK(fs_level_available(FS_BASELINE));
    for (fs_level level = FS_BASELINE; level < FS_N_LEVELS; level++) {
        const fs_level before = fs_level_current();
        CONTEXT("level %s", fs_level_name(level));
        CHECK(fs_level_set(level) == (fs_level_available(level) ? FS_OK : FS_BAD_LEVEL));
        CHECK(fs_level_current() == (fs_level_available(level) ? level : before));
        CHECK(fs_level_compiled(level) || !fs_level_available(level));
    }
    const int n_default = fs_threads_get();
    CHECK(n_default >= 1);
    fs_threads_limit(1);
    CHECK(fs_threads_get() == 1);
    fs_threads_set(3);    /* the limit is one on the default only */
    CHECK(fs_threads_get() == (fs_openmp() ? 3 : 1));
    fs_threads_limit(0);
    fs_threads_set(0);
    CHECK(fs_threads_get() == n_default);
}

static bool is_wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return true;
    return argc == 1;
}

/* Runs all tests, or those that are named. With QUICK set in the environment, only some cases of slow ones, and up
 * to the first failure. */
int main(int argc, char **argv)
{
    quick = getenv("QUICK") != NULL;
    fs_threads_insist(true);
#define TEST(name) {#name, test_##name},
    static const struct { const char *name; void (*run)(void); } tests[] = {FOR_TESTS(TEST)};
    const fs_level best = fs_level_current();
    int n_run = 0, n_failed = 0;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);    /* so that nothing is lost in a crash or said twice after a fork */
    for (size_t t = 0; t < LENGTH(tests); t++) {
        if (!is_wanted(tests[t].name, argc, argv))
            continue;
        n_failures = 0;
        context[0] = '\0';
        fs_level_set(best);
        tests[t].run();
        printf("%s %s\n", n_failures ? "FAILED" : "ok    ", tests[t].name);
        n_run++;
        n_failed += n_failures > 0;
    }
    printf("%d passed, %d failed\n", n_run - n_failed, n_failed);
    return n_failed > 0 || n_run == 0;
}
