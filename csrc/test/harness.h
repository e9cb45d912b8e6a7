/* What the tests stand on: checks, numbers in storage, plans over memory of their own. */
#ifndef HARNESS_H
#define HARNESS_H

#define _GNU_SOURCE    /* mmap, fork, alarm */
#include "kernels.h"
#include "team.h"

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

typedef long double wide;

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

extern bool quick;           /* whether to leave most cases of slow tests out, and to end with the first failure */
extern int n_failures;       /* in the test that runs */
extern char context[200];    /* which of a test's many cases; part of the failure message */
extern int callocs_left;     /* the library's calls of calloc before one fails; negative for none that does */
extern int n_passes;         /* over all arrays, each by one team of threads */

#define CONTEXT(...) snprintf(context, sizeof context, __VA_ARGS__)
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

void check(bool holds, const char *condition, const char *file, int line);

#define FOR_LEVELS(level)                                                  \
    for (fs_level level = FS_BASELINE; level < FS_N_LEVELS; level++)       \
        if (fs_level_set(level) == FS_OK)
#define FOR_RULES(rule) for (int rule = 0; rule < fs_rule_count(); rule++)

/* ---- Numbers in storage ------------------------------------------------------------------------------------------ */

double from_half(fs_dtype dtype, unsigned bits);
uint16_t to_half(fs_dtype dtype, double x);    /* to nearest, ties to even */
bool same_half(fs_dtype dtype, uint16_t a, uint16_t b);    /* the same bits, or both nan */

double read_item(fs_dtype dtype, const char *item);
void write_item(fs_dtype dtype, char *item, double x);

extern uint64_t random_state;

uint64_t mix(uint64_t z);             /* splitmix64 */
uint64_t random_bits(void);
double random_unit(void);
double random_signed(void);           /* 1/8 to 1, of either sign */
uint32_t random_float_bits(void);     /* often where halves are rounded one way or the other */

/* ---- Plans over memory of our own -------------------------------------------------------------------------------- */

enum { N_DTYPES = 4, N_PAIRS = N_DTYPES * N_DTYPES };
enum { MIXED = N_DTYPES };    /* array by array, all pairs of types of parameter and gradient */

const fs_operand *operand(fs_plan *plan, size_t i, int o);
size_t operand_bytes(fs_plan *plan, size_t i, int o);
double get(fs_plan *plan, size_t i, int o, size_t element);
void set(fs_plan *plan, size_t i, int o, size_t element, double x);

void init_flat(fs_array *array, size_t size);
void set_contiguous(fs_array *array, int o, void *data, fs_dtype dtype);

/* Contiguous arrays, all in the first of two groups. They have all the states, positive, so that any rule may be used, and
 * every other, the first too, has an average; the contents depend on the arguments alone. */
fs_plan *make_plan(int storage, size_t n_arrays, const size_t *sizes);
void free_plan(fs_plan *plan);

/* A plan for as many arrays, of this shape, which are yet to be given a place. */
fs_plan *make_plan_like(const fs_plan *model, int n_dims, const ptrdiff_t *shape);

void copy_settings(fs_plan *to, const fs_plan *from);
void copy_plan(fs_plan *to, fs_plan *from);    /* between plans whose arrays are contiguous */
bool same_operand(fs_plan *a, fs_plan *b, int o);
bool same_plan(fs_plan *a, fs_plan *b);

/* Three plans made alike: one to start from, one to step in a way known to be right, one to step in the way tested. */
typedef struct { fs_plan *initial, *expected, *plan; } trio;

trio make_trio(int storage, size_t n_arrays, const size_t *sizes);
void free_trio(trio t);

int find_rule(const char *name);
void use_rule(fs_group *group, int rule);
fs_options plain(fs_plan *plan, int rule);    /* a contiguous array is updated where it lies, in one pass */
fs_options busy(fs_plan *plan, int rule);     /* everything there is */

fs_report take_step(fs_plan *plan, fs_options options);
fs_report clip(fs_plan *plan, fs_options options);
fs_report take_3_steps(fs_plan *plan, fs_options options);

/* ---- Layouts ----------------------------------------------------------------------------------------------------- */

enum { N_LAYOUTS = 10, N_WRITABLE = 8 };    /* the last ones are broadcast: only to be read */

/* An array of three dimensions somewhere in a buffer. */
typedef struct {
    char *buffer, *first;
    size_t n_bytes;
    ptrdiff_t strides[3];
    bool aligned;
} spread;

spread make_spread(const ptrdiff_t *shape, size_t layout, size_t item);

/* Between the buffer and the same array in C order. */
void copy_spread(const spread *s, const ptrdiff_t *shape, size_t item, char *run, bool to_run);

/* ---- The tests, in the order in which they run: cheap and strong ones first ----------------------------------------- */

#define FOR_TESTS(TEST)                                                                                            \
    TEST(team) TEST(textbook) TEST(scaled) TEST(scaled_magnitudes) TEST(summed) TEST(numbers) TEST(muon)           \
    TEST(conventions) TEST(negative_variance) TEST(settings) TEST(out_of_memory) TEST(empty_plans)                 \
    TEST(half_made_plans) TEST(scalar) TEST(passes) TEST(norms_of_nonfinite) TEST(clip_nonfinite)                  \
    TEST(clip_magnitudes) TEST(after_the_rule) TEST(grad_scale) TEST(runs_have_ends) TEST(small_states)            \
    TEST(join_and_part) TEST(stats) TEST(many_arrays) TEST(fork) TEST(plans_are_independent)                       \
    TEST(halves_load_and_store) TEST(halves_round) TEST(units) TEST(norms) TEST(sums) TEST(guard_pages)            \
    TEST(blocks) TEST(nonfinite) TEST(stages) TEST(levels_and_threads) TEST(factored) TEST(layouts)

#define DECLARE_TEST(name) void test_##name(void);
FOR_TESTS(DECLARE_TEST)

#endif
