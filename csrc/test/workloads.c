/* Fixed pieces of work whose instructions are counted (bench/instructions.py). Each makes some steps in one thread. */
#include "harness.h"

enum { STEPS = 10 };

typedef enum { PLAIN, CHECKED, BUSY } how;    /* checked: for what is not finite */

static void drop_averages(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++) {
        free(operand(plan, i, FS_AVERAGE)->data);
        set_contiguous(&plan->arrays[i], FS_AVERAGE, NULL, FS_FLOAT32);
    }
}

static void steps_of(const char *rule, int storage, size_t n_arrays, size_t size, how how)
{
    size_t sizes[1000];
    for (size_t i = 0; i < n_arrays; i++)
        sizes[i] = size;
    fs_plan *plan = make_plan(storage, n_arrays, sizes);
    if (how != BUSY)
        drop_averages(plan);
    const int found = find_rule(rule);
    fs_options options = how == BUSY ? busy(plan, found) : plain(plan, found);
    if (how == CHECKED)
        options.nonfinite = FS_NONFINITE_STOP;
    for (int i = 0; i < STEPS; i++)
        take_step(plan, options);
    free_plan(plan);
}

/* A Fortran-order parameter and state; the gradient in C order. */
static void steps_transposed(const char *rule, ptrdiff_t n_rows, ptrdiff_t n_columns)
{
    const size_t size = (size_t)(n_rows * n_columns);
    const ptrdiff_t shape[] = {n_rows, n_columns};
    const ptrdiff_t c_order[] = {4 * n_columns, 4}, fortran_order[] = {4, 4 * n_rows};
    fs_plan *flat = make_plan(FS_FLOAT32, 1, &size), *plan = make_plan_like(flat, 2, shape);
    for (int o = 0; o < FS_AVERAGE; o++)
        fs_array_set(&plan->arrays[0], o, operand(flat, 0, o)->data, FS_FLOAT32, true,
                     o == FS_GRAD ? c_order : fortran_order);
    const fs_options options = plain(plan, find_rule(rule));
    for (int i = 0; i < STEPS; i++)
        take_step(plan, options);
    fs_plan_free(plan);
    free_plan(flat);
}

static void steps_of_small(fs_dtype first, fs_dtype second)
{
    enum { SIZE = 100000 };
    static uint16_t states[2][SIZE];
    static float scales[2][SIZE / FS_SCALED + 1];
    const fs_dtype dtypes[] = {first, second};
    const size_t size = SIZE;
    fs_plan *plan = make_plan(FS_FLOAT32, 1, &size), *small = make_plan_like(plan, 1, (const ptrdiff_t[]){SIZE});
    for (int o = 0; o < FS_STATE; o++)
        set_contiguous(&small->arrays[0], o, operand(plan, 0, o)->data, FS_FLOAT32);
    for (int s = 0; s < 2; s++)
        fs_array_set_small(&small->arrays[0], FS_STATE + s, states[s], dtypes[s],
                           dtypes[s] == FS_BFLOAT16 ? NULL : scales[s]);
    const fs_options options = plain(small, find_rule("adam"));
    for (int i = 0; i < STEPS; i++)
        take_step(small, options);
    fs_plan_free(small);
    free_plan(plan);
}

static void one_array(void) { steps_of("adam", FS_FLOAT32, 1, 100000, PLAIN); }
static void one_small_array(void) { steps_of("adam", FS_FLOAT32, 1, 1000, PLAIN); }
static void many_small_arrays(void) { steps_of("adam", FS_FLOAT32, 1000, 100, PLAIN); }
static void many_checked_arrays(void) { steps_of("adam", FS_FLOAT32, 1000, 100, CHECKED); }
static void one_checked_array(void) { steps_of("adam", FS_FLOAT32, 1, 100000, CHECKED); }
static void every_stage(void) { steps_of("adam", FS_FLOAT32, 1, 100000, BUSY); }
static void in_double(void) { steps_of("adam", FS_FLOAT64, 1, 100000, PLAIN); }
static void half_precision(void) { steps_of("adam", FS_BFLOAT16, 1, 100000, PLAIN); }
static void state_in_bfloat16(void) { steps_of_small(FS_BFLOAT16, FS_BFLOAT16); }
static void state_in_8_bits(void) { steps_of_small(FS_INT8, FS_UINT8); }
static void transposed(void) { steps_transposed("adam", 300, 333); }

static void every_rule(void)
{
    FOR_RULES(rule)
        steps_of(fs_rule_name(rule), FS_FLOAT32, 1, 10000, PLAIN);
}

/* One is run, at a CPU level: workloads NAME LEVEL. Without arguments, lists the names. */
int main(int argc, char **argv)
{
#define WORKLOAD(name) {#name, name}
    static const struct { const char *name; void (*run)(void); } workloads[] = {
        WORKLOAD(one_array),   WORKLOAD(one_small_array), WORKLOAD(many_small_arrays),
        WORKLOAD(many_checked_arrays), WORKLOAD(one_checked_array), WORKLOAD(every_stage), WORKLOAD(in_double),
        WORKLOAD(half_precision), WORKLOAD(state_in_bfloat16), WORKLOAD(state_in_8_bits), WORKLOAD(transposed),
        WORKLOAD(every_rule),
    };
    for (size_t w = 0; w < LENGTH(workloads); w++) {
        if (argc == 1)
            puts(workloads[w].name);
        for (fs_level level = FS_BASELINE; argc == 3 && level < FS_N_LEVELS; level++)
            if (strcmp(argv[1], workloads[w].name) == 0 && strcmp(argv[2], fs_level_name(level)) == 0) {
                if (fs_level_set(level) != FS_OK)
                    return 2;
                workloads[w].run();
                return n_failures > 0;
            }
    }
    return argc != 1;
}
