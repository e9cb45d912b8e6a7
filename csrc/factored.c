/* What is known of the rows and columns of matrices: means of squared gradients, of which factored rules make a variance. */
#include "engine.h"

#include <string.h>

/* ---- Sums of squares: of each row by blocks of FS_BLOCK columns, of each column by chunks of CHUNK rows ---- */

/* Those of blocks [block, end) in one chunk, of all there are in an array; row by row, as they lie in memory. */
static void sum_part(const fs_work *w, const fs_array *array, size_t chunk, size_t block, size_t end, fs_tile *tile)
{
    const size_t n_columns = array->n_columns, n_blocks = ratio_up(n_columns, FS_BLOCK);
    const size_t n_chunks = ratio_up(array->n_rows, CHUNK), first = chunk % n_chunks * CHUNK;
    const size_t row = chunk / n_chunks * array->n_rows + first, n_rows = min_size(array->n_rows - first, CHUNK);
    const size_t together = n_blocks > 1 ? 1 : FS_BLOCK / n_columns;    /* rows that make one run */
    double *sums = array->column_sums + chunk * n_columns;
    memset(sums + block * FS_BLOCK, 0, (min_size(end * FS_BLOCK, n_columns) - block * FS_BLOCK) * sizeof *sums);
    for (size_t r = 0; r < n_rows; r += together)
        for (size_t b = block; b < end; b++) {
            const size_t n = min_size(n_rows - r, together), column = b * FS_BLOCK;
            const size_t count = min_size(n_columns - column, FS_BLOCK);
            const char *grad = fs_load_staged(w, array, (row + r) * n_columns + column, n * count, tile);
            for (size_t l = 0; l < n; l++, grad += count * array->item) {
                double *row_sum = &array->row_sums[(row + r + l) * n_blocks + b];
                w->k->sum_squares_both_ways(count, grad, row_sum, sums + column);
            }
        }
}

static void sum_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    if (array->n_matrices == 0)
        return;
    fs_work w = fs_work_on(pass, i);
    fs_add_units(&w, array);
    const size_t n_blocks = ratio_up(array->n_columns, FS_BLOCK);
    const size_t n = array->n_matrices * ratio_up(array->n_rows, CHUNK) * n_blocks, last = fs_first_of(array, n, end);
    for (size_t part = fs_first_of(array, n, start), next; part < last; part = next) {
        const size_t chunk = part / n_blocks;
        next = min_size((chunk + 1) * n_blocks, last);
        sum_part(&w, array, chunk, part - chunk * n_blocks, next - chunk * n_blocks, tile);
    }
}

/* ---- Means ---- */

/* Move what is kept, a mean of n squares, towards that of these; returns where it is then. */
static double move(const fs_array *array, void *state, size_t place, double sum, size_t n, const fs_factoring *f)
{
    const double before = fs_real_at(array, state, place), mean = sum / (double)n + or_epsilon(f->eps, array->item);
    fs_set_real(array, state, place, at_most(fs_largest(array->item), before + f->weight * (mean - before)));
    return fs_real_at(array, state, place);
}

/* The rule sees rows divided by their mean. */
static void move_rows(const fs_array *array, size_t matrix, const fs_factoring *f)
{
    const size_t n_blocks = ratio_up(array->n_columns, FS_BLOCK), n = array->n_rows, first = matrix * n;
    const double least = or_epsilon(f->least, array->item);
    double *sums = array->row_sums + first * n_blocks;
    for (size_t r = 0; r < n; r++) {
        const double sum = fs_pairwise_sum(sums + r * n_blocks, n_blocks);
        sums[r] = move(array, array->row_state, first + r, sum, array->n_columns, f);
    }
    double mean = at_most(DBL_MAX, fs_pairwise_sum(sums, n) / (double)n);
    mean = mean < least ? least : mean;
    for (size_t r = first; r < first + n; r++)
        fs_set_real(array, array->operand[FS_STATE].data, r, fs_real_at(array, array->row_state, r) / mean);
}

static void move_columns(const fs_array *array, size_t matrix, const fs_factoring *f)
{
    const size_t n_columns = array->n_columns, n_chunks = ratio_up(array->n_rows, CHUNK);
    double *sums = array->column_sums + matrix * n_chunks * n_columns;
    for (size_t n = n_chunks; n > 1; n = (n + 1) / 2) {    /* pairwise, as elsewhere */
        for (size_t i = 0; i < n / 2; i++)
            for (size_t c = 0; c < n_columns; c++)
                sums[i * n_columns + c] = sums[2 * i * n_columns + c] + sums[(2 * i + 1) * n_columns + c];
        if (n % 2)
            memcpy(sums + n / 2 * n_columns, sums + (n - 1) * n_columns, n_columns * sizeof *sums);
    }
    for (size_t c = 0; c < n_columns; c++)
        move(array, array->column_state, matrix * n_columns + c, sums[c], array->n_rows, f);
}

static void move_work(const fs_pass *pass, size_t i, size_t start, size_t end, fs_tile *tile)
{
    const fs_array *array = &pass->plan->arrays[i];
    (void)end, (void)tile;
    for (size_t m = 0; start == 0 && m < array->n_matrices; m++) {
        const fs_factoring *f = (const fs_factoring *)pass->plan->groups[array->group].coefs;
        move_rows(array, m, f);
        move_columns(array, m, f);
    }
}

void fs_move_factors(fs_pass *pass)
{
    pass->work = sum_work;
    fs_run_pass(pass);
    pass->work = move_work;
    fs_run_pass(pass);
}
