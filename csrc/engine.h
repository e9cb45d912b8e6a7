/* What the files of the driver share. It goes in passes through all arrays of a plan, and does to each run of elements what
 * its group and the options of the step ask for. Internal.
 *
 *     passes.c    all arrays, cut into one contiguous part per thread
 *     norms.c     the norms of gradients, and the factors that clip them: fs_measure
 *     scaled.c    what scaled rules have to know of whole arrays
 *     factored.c  and factored rules of the rows and columns of matrices
 *     units.c     the norms of slices of arrays
 *     work.c      a run, from the gradient to the new parameter
 *     pieces.c    all that takes several loops, in pieces that stay in a cache meanwhile
 *     update.c    every array, in the way that suits it: fs_update
 *     clip.c      gradients alone: fs_clip, fs_clear
 */
#ifndef FUSEDSTEP_ENGINE_H
#define FUSEDSTEP_ENGINE_H

#include "tiles.h"

/* Bytes of a run that several loops go through: they stay in the second-level cache meanwhile, and the CPU has time to look
 * ahead. */
enum { LONG_RUN = 1 << 15 };

/* ---- passes.c ------------------------------------------------------------------------------------------------------- */

typedef struct fs_pass {
    fs_plan *plan;
    const fs_options *options;
    const fs_kernels *kernels[2];    /* by compute type */
    int measured;                    /* of units */
    /* Work on elements [start, end) of an array; start is a multiple of FS_BLOCK. */
    void (*work)(const struct fs_pass *pass, size_t array, size_t start, size_t end, fs_tile *tile);
} fs_pass;

/* With the kernels of the current CPU level. What its work is, is still to be said. */
fs_pass fs_make_pass(fs_plan *plan, const fs_options *options);
void fs_run_pass(const fs_pass *pass);

/* ---- norms.c -------------------------------------------------------------------------------------------------------- */

/* Sum in a binary tree over neighbours, as if filled up with zeros. Overwrites the values. */
double fs_pairwise_sum(double *values, size_t n);

/* Each array's sum of what its blocks have of a statistic; and that of one. */
void fs_finish_stat(fs_plan *plan, int stat);
void fs_finish_stat_of(fs_plan *plan, int stat, size_t i);

/* The exponent e for which a sum of squares of doubles x is to be taken again, of 2^-e x, since it is too large or too small
 * to be good; 0 if it is good, or nan. */
int fs_rescue_exponent(double sum_squares);

/* min(1, max_norm / (norm + eps)) for norm = root * 2^exponent, which alone may be too large for a double. */
double fs_clip_factor(double root, int exponent, double max_norm, double eps);

/* ---- work.c --------------------------------------------------------------------------------------------------------- */

/* What is to be done to each run of an array. */
typedef struct {
    const fs_kernels *k;
    const fs_group *group;
    int rule;
    double decay;
    const double *coefs;
    fs_stages stages;
    double grad_scale, factor;    /* the factor is a multiplication that costs the rule nothing */
    bool zero, stage_grad, clip_units, limit_units, bound, average, clear;
    double squares_divisor;       /* 0 if no squares are added up */
    int n_operands;               /* of the rule: parameter, gradient, states */
    const fs_small *small;        /* in place of the states, if any is small */
    const uint16_t *from;         /* where the parameter is read if it and its gradient are halves the rule takes; or NULL */
} fs_work;

fs_work fs_work_on(const fs_pass *pass, size_t i);

/* And to its units, if it has any. */
void fs_add_units(fs_work *w, const fs_array *array);

/* Whether anything is to be done but to multiply by the factor. */
bool fs_has_stages(const fs_stages *s);

/* Update a run of each operand, `at` these places: all there is to be done, from the gradient to the new parameter; or the
 * rule alone; or the decay that may follow it; or only the gradient, as the rule wants it. A gradient that is changed on its
 * way there goes to `room`. */
void fs_update_row(const fs_work *w, size_t n, void *const *at, void *room);
const void *fs_stage_gradient(const fs_work *w, size_t n, void *const *at, void *room);
void fs_apply_rule(const fs_work *w, size_t n, void *const *at, void *room);
void fs_decay_after(const fs_work *w, size_t n, void *param);

/* ---- pieces.c ------------------------------------------------------------------------------------------------------- */

/* Update elements [start, end) of an array that is dense or to be updated in blocks. */
void fs_update_pieces(const fs_work *w, const fs_plan *plan, size_t i, size_t start, size_t end, fs_tile *tile);

/* So many elements go through all loops together: a long run where nothing has to be copied, else a block. */
size_t fs_piece_size(const fs_work *w, const fs_array *array);

/* A piece as it is before the update, for a look at what will be: of each operand where it lies, or in the tile; or a block,
 * copied there (the parameter first) for the rule to work on while nothing changes, all but the gradient. */
void fs_bring_piece(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, fs_tile *tile);
void fs_copy_block(const fs_work *w, const fs_array *array, size_t start, size_t count, void **at, fs_tile *tile);

/* A block of the gradient as the rule will have it, in the tile or where it lies. */
const void *fs_load_staged(const fs_work *w, const fs_array *array, size_t start, size_t count, fs_tile *tile);

/* ---- scaled.c ------------------------------------------------------------------------------------------------------- */

/* Before anything else goes through the arrays of which norms or sums scale the steps: what is packed lies in that order. */
void fs_put_in_order_of_sums(fs_plan *plan);

/* All that depends on whole arrays: their own coefficients, and their numbers after this step. */
void fs_scale_pass(fs_pass *pass);

/* ---- factored.c ----------------------------------------------------------------------------------------------------- */

/* Move what is kept of rows and columns to what these gradients make of it. */
void fs_move_factors(fs_pass *pass);

/* ---- units.c -------------------------------------------------------------------------------------------------------- */

/* The factors that bring the norms of units within their limits, where there are any: of their gradients, and of the
 * parameters that the rule leads to. */
void fs_find_grad_factors(fs_pass *pass);
void fs_find_param_factors(fs_pass *pass);

/* ---- clip.c --------------------------------------------------------------------------------------------------------- */

/* Set a tile of the gradient to 0; `copy` is room for it. */
void fs_clear_tile(const fs_kernels *k, const fs_array *array, size_t t, void *copy);

#endif
