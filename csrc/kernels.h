/* The table of kernels that every (compute type, CPU level) pair provides, and the choice among them. Internal. */
#ifndef FUSEDSTEP_KERNELS_H
#define FUSEDSTEP_KERNELS_H

#include "fusedstep.h"

#include <float.h>
#include <stdint.h>

enum {
#define FS_RULE(name, family, n_states) FS_RULE_##name,
#include "rules.def"
#undef FS_RULE
    FS_N_RULES
};

/* What is done to a run of gradients between loading it and handing it to the rule. */
typedef struct {
    double factor;         /* 1 for none; a norm's clipping, negative to go up the gradient */
    double clip_value;     /* infinity for none */
    double weight_decay;   /* coupled; 0 for none */
    double l1;             /* 0 for none */
} fs_stages;

/* What is known of an array as a whole: how many elements it has, the largest number of its compute type, and norms of the
 * parameter and of the step's direction; or, for a summed rule, both sums over all arrays. */
typedef struct { double size, largest, param_norm, direction_norm, sums[2]; } fs_whole;

/* A hyper-parameter, or what stands for it where it is not given, which is a NaN. */
static inline double or_else(double x, double otherwise) { return x == x ? x : otherwise; }

/* How the means of rows and columns move: by `weight` of the way to those of squared gradients plus `eps`; and the least
 * mean that rows are divided by. A NaN stands for the machine epsilon. */
typedef struct { double weight, eps, least; } fs_factoring;

/* The largest number of a compute type, and no more than that: what is finite stays so when it becomes one of that type. */
static inline double fs_largest(size_t item) { return item == sizeof(float) ? (double)FLT_MAX : DBL_MAX; }
static inline double at_most(double most, double x) { return x > most ? most : x; }

static inline double or_epsilon(double eps, size_t item)
{
    return or_else(eps, item == sizeof(float) ? 0x1p-23 : 0x1p-52);
}

/* Update a run in place: grad is multiplied by factor and param by decay, then the rule is applied. Random fractions of the
 * elements are for states in bfloat16. Rules of halves have their gradient in bfloat16, and read the parameter `from` there. */
typedef void fs_rule(size_t n, const void *from, void *param, const void *grad, void *const *state, double factor,
                     double decay, const void *coefs, const uint32_t *fraction);

/* What a rule has to know of whole arrays, by blocks of FS_BLOCK: sums of two values of each element, or squares of them times
 * scales, which are powers of two. */
typedef void fs_rule_measure(size_t n, const void *param, const void *grad, void *const *state, double factor, double decay,
                             const void *coefs, const double *scales, double *first_sums, double *second_sums);

/* Random bits are made of keys, 32 of each, for two elements half of FS_SCALED apart. The first of a block has the block's
 * key, each other this much more than the one before. A block that is rounded begins at a multiple of FS_SCALED. */
#define FS_BETWEEN_KEYS 0x9e3779b9u

/* The states of a block: each in a small type or, like all else, in the compute type. An element's small states are rounded
 * with the same random fraction. */
typedef struct { char *data; float *scales; fs_dtype dtype; } fs_state;
typedef struct {
    int n_states;
    fs_state state[FS_MAX_STATES];
    uint32_t key;
    bool in_place;                 /* parameter and gradient are where they are kept, with more of them behind */
    bool all_bfloat16;             /* of float32: the rule is one that takes them as they are stored */
    const uint16_t *from;          /* where a rule of halves reads the parameter; else NULL */
} fs_small;

/* `real` below is the table's compute type. Runs are contiguous and do not overlap. */
typedef struct {
    fs_rule *rule[FS_N_RULES];
    fs_rule *bfloat16_rule[FS_N_RULES];    /* with all states in bfloat16; only in tables of float32 */
    fs_rule *rule_of_halves[FS_N_RULES];   /* with parameter and gradient in bfloat16; likewise */
    fs_rule_measure *measure[FS_N_RULES];  /* of rules that are measured */
    /* A rule for a block of which states are small: FS_SCALED elements at a time, in the first-level cache meanwhile. */
    void (*apply_to_small)(fs_rule *rule, size_t n, void *param, const void *grad, const fs_small *small, double factor,
                           double decay, const void *coefs);
    /* Between storage and run, over two dimensions: `outer` and `inner` strides in bytes. */
    void (*load[4])(size_t n_outer, size_t n_inner, void *real, const char *data, ptrdiff_t outer, ptrdiff_t inner);
    void (*store[4])(size_t n_outer, size_t n_inner, const void *real, char *data, ptrdiff_t outer, ptrdiff_t inner);
    /* A block of a small state, from storage. */
    void (*load_small)(size_t n, void *real, const fs_state *state);
    /* A block of a parameter of 16 bits, by rounding and dtype: what it is with its residual (join), and what is stored of it
     * beside that (part), for which random bits are made of `key`; NULL for others. Only in tables of float32. */
    void (*join[FS_N_ROUNDINGS][FS_BFLOAT16 + 1])(size_t n, void *real, const void *residual);
    void (*part[FS_N_ROUNDINGS][FS_BFLOAT16 + 1])(size_t n, const void *real, uint16_t *stored, void *residual,
                                                  uint32_t key);
    /* The two halves of gradient preparation: what the norm sees, and what only the rule sees. Each returns where the result
     * is: `to`, which may be the gradient itself, or the gradient if there was nothing to do. */
    const void *(*unscale)(size_t n, const void *grad, void *to, double grad_scale, bool zero_nonfinite);
    const void *(*apply_stages)(size_t n, const void *grad, void *to, const void *param, const fs_stages *stages);
    /* Each by its own factor; returns `to`, which may be where they come from. */
    const void *(*multiply)(size_t n, const void *from, void *to, const void *factors);
    /* What follows the rule: bound the parameter, and move its average towards it. */
    void (*bound)(size_t n, void *param, double lower, double upper);
    void (*average)(size_t n, void *average, const void *param, double weight);
    size_t (*count_zeros)(size_t n, const void *grad);
    /* Sums over consecutive blocks of FS_BLOCK: of (scale x)^2, scale a power of two; or of x^2 and of squared
     * differences. */
    void (*sum_squares)(size_t n, const void *grad, double scale, double *block_sums);
    void (*sum_squares_and_changes)(size_t n, const void *after, const void *before, double *block_sums, double *block_changes);
    /* The same of x^2, which are also added to sums that there are for each element. */
    void (*sum_squares_both_ways)(size_t n, const void *grad, double *block_sums, double *sums);
    /* Added to the numbers that are there. */
    void (*count_nonfinite)(size_t n, const void *grad, size_t *n_nan, size_t *n_inf);
} fs_kernels;

static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

/* The tables of kernels.c, by level and compute type; a level not compiled has none. */
const fs_kernels *fs_kernels_of(fs_level level, fs_dtype real);

/* The rule's coefficients for the step with this number, from its hyper-parameters. */
void fs_rule_prepare(int rule, const double *hyper, double step, double *coefs);

/* Of a scaled rule: what is left of that for an array, with these numbers, which change. Some are measured first; of a summed
 * rule there is something to begin with before the sums are found. */
void fs_rule_begin(int rule, const double *hyper, const double *numbers, double *coefs);
void fs_rule_scale(int rule, const double *hyper, const fs_whole *whole, double *numbers, double *coefs);
bool fs_rule_is_scaled(int rule);
bool fs_rule_is_summed(int rule);

#endif
