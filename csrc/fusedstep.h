/* fusedstep: fused optimizer steps over many arrays. The interface between the C core and its callers.
 *
 * The caller makes a plan (which arrays, which rule), then takes steps. A plan belongs to one thread at a time; different
 * plans are independent. Nothing here allocates, fails or calls back during a step: every check is made before. Results
 * have the same bits for every CPU level, thread count and memory layout.
 */
#ifndef FUSEDSTEP_H
#define FUSEDSTEP_H

#include <stdbool.h>
#include <stddef.h>

enum {
    FS_BLOCK = 1024,     /* elements in a tile, and in one partial sum */
    FS_LANES = 16,       /* interleaved accumulators of a partial sum */
    FS_MAX_STATES = 3,
    FS_MAX_HYPER = 8,    /* hyper-parameters of a rule */
    FS_MAX_COEFS = 16    /* per-step coefficients of a rule */
};

typedef enum { FS_OK, FS_OUT_OF_MEMORY, FS_UNKNOWN_RULE, FS_BAD_LEVEL } fs_status;

/* Storage types. The first two are also the compute types; halves compute in float32. */
typedef enum { FS_FLOAT32, FS_FLOAT64, FS_FLOAT16, FS_BFLOAT16 } fs_dtype;

/* What a non-finite gradient does to the step. */
typedef enum { FS_NONFINITE_STOP, FS_NONFINITE_ZERO, FS_NONFINITE_PROPAGATE } fs_nonfinite;

/* CPU levels: the same kernels, compiled for wider registers. */
typedef enum { FS_BASELINE, FS_AVX2, FS_AVX512, FS_N_LEVELS } fs_level;

const char *fs_level_name(fs_level level);
bool fs_level_compiled(fs_level level);
bool fs_level_available(fs_level level);      /* compiled, and this CPU has it */
fs_level fs_level_current(void);              /* at first the highest available */
fs_status fs_level_set(fs_level level);       /* FS_BAD_LEVEL if it is not available */

/* Threads. The process-wide number is 0 (the OpenMP default of the calling thread) until set. */
bool fs_openmp(void);
void fs_threads_set(int n_threads);
void fs_threads_limit(int n_threads);         /* cap on the default, e.g. of a container; 0 for none */
int fs_threads_get(void);
void fs_threads_insist(bool insist);          /* use them all even where that does not pay; for tests */

/* Rules, by name; FS_UNKNOWN_RULE stands for none. */
int fs_rule_count(void);
const char *fs_rule_name(int rule);
const char *fs_rule_hyper_names(int rule);    /* space-separated, in the order `fs_group.hyper` wants; lr comes first */
int fs_rule_states(int rule);

/* Where the elements of one array lie. Elements are taken in C order, whatever their layout in memory. */
typedef struct { size_t size; ptrdiff_t stride; } fs_dim;
typedef struct {
    char *data;
    fs_dtype dtype;
    bool contiguous;     /* aligned and in C order without gaps: can be used where it lies */
    int n_dims;          /* 0 if contiguous; else neighbouring dimensions are merged where possible */
    fs_dim *dims;        /* owned; strides in bytes */
} fs_view;

typedef struct {
    size_t size;
    fs_dtype real;       /* compute type */
    int group;
    fs_view param, grad, state[FS_MAX_STATES];
    /* What the norm pass found: the sum of squares of the gradient is sum_squares * 4^exponent. */
    double sum_squares;
    int exponent;
    size_t n_nonfinite;
    double clip_factor;
} fs_array;

/* Settings shared by the arrays of one parameter group. Set these before each step. */
typedef struct {
    int rule;
    double hyper[FS_MAX_HYPER];
    double weight_decay;
    bool decoupled_weight_decay;
    double l1;
    bool maximize;
    double clip_value;             /* infinity for none */
    double clip_norm_per_array;    /* infinity for none */
    /* Computed by the step. */
    double coefs[FS_MAX_COEFS];
    double decay;
} fs_group;

typedef struct {
    size_t n_arrays, n_groups;
    fs_array *arrays;
    fs_group *groups;
    /* Computed by fs_plan_finish. */
    size_t n_elements;
    size_t *first_element;         /* of each array among all, n_arrays + 1 entries */
    size_t *first_block;
    double *block_sums;
    double *array_sums;
    double step;                   /* number of steps applied */
} fs_plan;

typedef struct {
    double grad_scale;             /* gradients are divided by this */
    double clip_norm;              /* infinity for none */
    double clip_factor;            /* a further factor, found by the caller; 1 for none */
    fs_nonfinite nonfinite;
    int n_threads;                 /* 0 for the process-wide number */
} fs_options;

typedef struct {
    bool applied;
    bool has_norm;
    double grad_norm;
    double clip_factor;            /* the smallest factor that the norms call for in any array; 1 for none */
} fs_report;

/* Make a plan: new, one fs_array_set per operand of each array, finish. Free accepts NULL and half-made plans. */
fs_plan *fs_plan_new(size_t n_arrays, size_t n_groups);
fs_status fs_plan_finish(fs_plan *plan);
void fs_plan_free(fs_plan *plan);

/* Describe one operand. `shape` and `strides` (bytes) have n_dims entries. FS_OUT_OF_MEMORY leaves the view as it was. */
fs_status fs_view_set(fs_view *view, void *data, fs_dtype dtype, bool aligned, int n_dims, const ptrdiff_t *shape,
                      const ptrdiff_t *strides);
size_t fs_dtype_size(fs_dtype dtype);

/* One step: parameters and states change in place, unless report->applied is false, when nothing has changed. */
void fs_step(fs_plan *plan, const fs_options *options, fs_report *report);

/* The norm of the gradients alone. */
void fs_norm(fs_plan *plan, const fs_options *options, fs_report *report);

/* Clip the gradients themselves, in place, by norms and values as a step would for its rule. No other stage applies:
 * grad_scale must be 1, and nonfinite STOP or PROPAGATE. */
void fs_clip(fs_plan *plan, const fs_options *options, fs_report *report);

#endif
