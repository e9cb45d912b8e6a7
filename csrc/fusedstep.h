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
    FS_SCALED = 256,     /* neighbours that share the scale of an 8-bit state */
    FS_MAX_STATES = 4,
    FS_MAX_NUMBERS = 2,  /* that a rule keeps for each array beside its states */
    FS_MAX_HYPER = 10,   /* hyper-parameters of a rule */
    FS_MAX_COEFS = 16    /* per-step coefficients of a rule */
};

typedef enum { FS_OK, FS_OUT_OF_MEMORY, FS_UNKNOWN_RULE, FS_BAD_LEVEL } fs_status;

/* Storage types. The first two are also the compute types; halves compute in float32. The last two are for states alone:
 * floats of 8 bits, of either sign (4 bits of exponent, 3 of mantissa) or of none (5 and 3), relative to a scale. */
typedef enum { FS_FLOAT32, FS_FLOAT64, FS_FLOAT16, FS_BFLOAT16, FS_INT8, FS_UINT8 } fs_dtype;

/* What becomes of the digits that a parameter of 16 bits has no room for: they are lost, or decide at random whether it is
 * rounded up, or are kept beside it: as what is to be added (kahan), as the lower half of a float32 (split, of bfloat16
 * alone), or with the rest as a float32 (master). Rules and averages see the parameter with what is kept. */
typedef enum { FS_NEAREST, FS_STOCHASTIC, FS_KAHAN, FS_SPLIT, FS_MASTER, FS_N_ROUNDINGS } fs_rounding;

/* Weight decay adds to the gradient; or multiplies the parameter by 1 - lr weight_decay, or by 1 - weight_decay, before the
 * rule; or by 1 - lr weight_decay after it. */
typedef enum { FS_COUPLED, FS_DECOUPLED, FS_INDEPENDENT, FS_DECOUPLED_AFTER } fs_decay;

/* Whose equations to follow: values of the hyper-parameter `convention`, of rules that differ in more than defaults. */
enum { FS_TORCH, FS_KERAS, FS_OPTAX, FS_TF, FS_SKLEARN, FS_THINC };

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
int fs_rule_numbers(int rule);
bool fs_rule_is_factored(int rule);           /* knows matrices by their rows and columns */
bool fs_rule_is_measured(int rule);           /* has to know norms or sums of whole arrays first */

/* The arrays that belong to one parameter; and, of one with units, those of the plan: factors of each unit's gradients and
 * parameters, and room for an operand with its units one after the other. */
enum {
    FS_PARAM, FS_GRAD, FS_STATE, FS_AVERAGE = FS_STATE + FS_MAX_STATES, FS_RESIDUAL, FS_N_OPERANDS,
    FS_GRAD_FACTOR = FS_N_OPERANDS, FS_PARAM_FACTOR, FS_BY_UNIT, FS_N_PLACES
};

typedef struct {
    char *data;                    /* NULL for none */
    fs_dtype dtype;
    bool aligned;
    bool is_packed;                /* without strides: in the order of the elements, and without gaps */
    bool is_dense;                 /* its elements follow one another in the order of the loops */
    bool is_constant;              /* only read by the rule */
    ptrdiff_t *strides;            /* in bytes, one per dimension */
    float *scales;                 /* of 8-bit states, one for FS_SCALED elements in that order */
} fs_operand;

/* A dimension that operands are walked along together, or several merged; in tiles, in pieces of `chunk` elements. */
typedef struct { size_t size, chunk, n_chunks; ptrdiff_t stride[FS_N_PLACES]; } fs_loop;

typedef struct {
    size_t size;
    fs_dtype real;                 /* compute type */
    int group;
    size_t item;                   /* size of the compute type */
    int n_dims;
    bool is_dense;                 /* all operands lie in one order, without gaps */
    bool is_run;                   /* and are of the compute type, to be used where they lie */
    bool in_blocks;                /* to be updated FS_BLOCK by FS_BLOCK: some operand is packed, or sums are made */
    ptrdiff_t *shape;
    fs_operand operand[FS_N_PLACES];
    void *number[FS_MAX_NUMBERS];  /* where the doubles lie that the rule keeps from step to step; perhaps not aligned */
    /* Two ways through the elements. Sums take the gradient in C order, whatever its layout, for the same bits: */
    int n_grad_loops;
    fs_loop *grad_loops;
    bool grad_is_transposed;       /* jumps from cache line to cache line in C order, and not across */
    /* All else goes through all operands in the order in which the parameter lies in memory, tile by tile (tiles.c); where
     * sums are made of what is updated, in C order: */
    bool in_c_order;
    int n_loops, across;           /* a tile extends along the last loop, and across this one */
    fs_loop *loops;
    size_t n_blocks, blocks_per_tile, n_tiles;
    fs_rounding rounding;
    /* Units of which the norms are limited: slices with the same indices along these dimensions. */
    bool *counts_units;            /* by dimension */
    size_t n_units, unit_size;     /* 0 without */
    double *unit_limits;           /* of the norms of their gradients */
    /* Of factored rules: matrices, the last two dimensions, and what is kept of their rows and columns. */
    size_t n_matrices, n_rows, n_columns;    /* 0 for others */
    void *row_state, *column_state;          /* in C order, of the compute type */
    double *row_sums, *column_sums;          /* of blocks of each row, and of chunks of each column */
    size_t copy_offset[FS_N_OPERANDS];    /* in the tile's memory, of operands that have to be copied */
    void *memory;                  /* that all these pointers point into */
} fs_array;

/* What the norm pass found out about an array: the sum of squares of its gradient is sum_squares * 4^exponent. */
typedef struct { double sum_squares; int exponent; size_t n_nonfinite; } fs_norm;

/* What an update finds out about an array, where asked: sums of squares of the new parameter and of its change, both as they
 * are stored with their residual, and how many elements of the gradient were 0. */
enum { FS_PARAM_SQUARES, FS_UPDATE_SQUARES, FS_ZERO_GRADS, FS_N_STATS };

/* Settings shared by the arrays of one parameter group. Set these before each step. */
typedef struct {
    int rule;
    double hyper[FS_MAX_HYPER];
    double weight_decay;
    fs_decay decay_mode;
    double l1;
    bool maximize;
    double clip_value;             /* infinity for none */
    double clip_norm_per_array;    /* infinity for none */
    double lower, upper;           /* bounds on the parameter; infinities for none */
    double clip_adaptive;          /* of arrays with units: limit of the norm of a gradient to that of its parameter, */
    double max_norm;               /* and limit of the norm of a parameter; infinities for none */
    double average_weight;         /* of the new parameter in its average, where there is one */
    bool average_copies_first;     /* the first step: then it is 1 */
    /* Computed by the step. */
    double coefs[FS_MAX_COEFS];
    double decay, decay_after, average_now;
    bool is_scaled;                /* by what is known of whole arrays: coefficients are each array's own */
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
    /* By array, apart from the arrays themselves: what one thread writes in every step, others need not fetch again. */
    fs_norm *norms;
    double *clip_factors;
    double *units, *factors;       /* what arrays with units need, and those of factored rules */
    bool has_stats;
    double *block_stats[FS_N_STATS], *stats[FS_N_STATS];    /* by array */
    double (*coefs)[FS_MAX_COEFS]; /* by array, in scaled groups */
    double squares_divisor;        /* of which the last update left squares in block_stats[FS_PARAM_SQUARES]; 0 if of none */
    double step;                   /* number of steps applied */
    unsigned long long seed;       /* of random rounding */
} fs_plan;

typedef struct {
    double grad_scale;             /* gradients are divided by this */
    double clip_norm;              /* infinity for none */
    double clip_eps;               /* added to norms when they are clipped */
    double clip_factor;            /* a further factor, found by the caller; 1 for none */
    fs_nonfinite nonfinite;
    bool clear_grads;              /* fs_update sets them to 0 once they are used; they must lie apart */
    double squares_divisor;        /* fs_update adds up squares of the new parameters, divided by this; 0: it does not */
    const fs_plan *sums;           /* one that did so, and whose parameters are the gradients of this one; NULL for none */
    int n_threads;                 /* 0 for the process-wide number */
} fs_options;

typedef struct {
    bool applied;                  /* whether the gradients may be used */
    bool has_norm;                 /* whether they were measured */
    bool is_finite;                /* whether nothing else was found in them: true, too, if they were not measured */
    double grad_norm;
    double clip_factor;            /* the smallest factor that the norms call for in any array; 1 for none */
} fs_report;

/* Make a plan: new, init each array, set its operands (the gradient may come later, and change), finish. Only these
 * allocate. Free accepts NULL and half-made plans. With stats, updates leave them in the plan, and norms are measured. */
fs_plan *fs_plan_new(size_t n_arrays, size_t n_groups, bool has_stats);
fs_status fs_array_init(fs_array *array, int n_dims, const ptrdiff_t *shape);
fs_status fs_plan_finish(fs_plan *plan);
void fs_plan_free(fs_plan *plan);

/* Say where an operand lies; strides in bytes. A run of the compute type is used in place, all else goes through tiles. */
void fs_array_set(fs_array *array, int operand, void *data, fs_dtype dtype, bool aligned, const ptrdiff_t *strides);

/* The same for a state in a small type (bfloat16, with scales NULL, or of 8 bits), in the order of the elements and without
 * gaps. Such states are rounded at random: up as often as the distance to the value below calls for. */
void fs_array_set_small(fs_array *array, int operand, void *data, fs_dtype dtype, float *scales);

/* How a parameter of 16 bits is rounded; the residual, in the same order, NULL for ways that keep none. */
void fs_array_set_rounding(fs_array *array, fs_rounding rounding, void *residual);

/* Have a number of the rule lie there. Until then it is the array's own, and 0. */
void fs_array_set_number(fs_array *array, int number, void *data);

/* Of an array of at least two dimensions with a factored rule: have what is kept of the rows and columns of its matrices lie
 * there, without gaps, of the compute type. The parameter has to be set by then. */
void fs_array_set_factors(fs_array *array, void *row_state, void *column_state);

size_t fs_dtype_size(fs_dtype dtype);

/* Have units: one for each index along these dimensions, or with none of them the array as a whole. Before the plan is
 * finished, and the parameter has to be set by then. */
void fs_array_set_units(fs_array *array, int n_axes, const int *axes);

/* The first half of all that is done: look at the gradients and decide. If report->applied is false, the second half must
 * not follow. The norm is measured if anything depends on it. */
void fs_measure(fs_plan *plan, const fs_options *options, fs_report *report);

/* The second half of a step, with the same options: change parameters, states and averages in place. */
void fs_update(fs_plan *plan, const fs_options *options);

/* Or of clipping: change the gradients in place, by norms, units and values as a step would for its rule. No other applies:
 * grad_scale must be 1, and nonfinite not ZERO. */
void fs_clip(fs_plan *plan, const fs_options *options);

/* Set the gradients to 0. */
void fs_clear(fs_plan *plan, const fs_options *options);

#endif
