/* Elements on their way between arrays and the kernels: runs of at most FS_BLOCK elements of the compute type. Internal. */
#ifndef FUSEDSTEP_TILES_H
#define FUSEDSTEP_TILES_H

#include "kernels.h"

static inline size_t ratio_up(size_t a, size_t b) { return (a + b - 1) / b; }

enum { CACHE_LINE = 64 };

/* Memory for a tile: a run of every operand, or longer ones of those that have to be copied. It is on the stack, and musl
 * gives a thread 128 KB of that. */
typedef struct { _Alignas(64) double run[FS_N_OPERANDS][3 * FS_BLOCK / 2]; } fs_tile;

/* A number among some of an array's compute type. */
double fs_real_at(const fs_array *array, const void *data, size_t place);
void fs_set_real(const fs_array *array, void *data, size_t place, double value);

/* From now on go through an array in C order and in blocks, since sums are made of what is updated. */
void fs_array_for_sums(fs_array *array);

/* Elements [start, start + count) of the gradient in C order, copied to a run. */
void fs_load_in_c_order(const fs_kernels *k, const fs_array *array, size_t start, size_t count, void *run);

/* Elements [start, start + count) of an operand in the order of the parameter's memory, or C order where that is called for:
 * where they lie if they are a run there, else copied to `run`; a parameter with its residual, or where its master lies. At
 * most FS_BLOCK; of small states, from a multiple of FS_SCALED on. */
void *fs_load_in_memory_order(const fs_kernels *k, const fs_array *array, int operand, size_t start, size_t count,
                              void *run);

/* The same place of a state that is packed. */
fs_state fs_packed_state(const fs_array *array, int operand, size_t start);

/* The reverse of loading, but for small states; what is in `run` then is undefined. Parameters of 16 bits are rounded, if at
 * random with bits made of this key. */
enum { FS_NO_KEY = 0 };
void fs_store_in_memory_order(const fs_kernels *k, const fs_array *array, int operand, size_t start, size_t count, void *run,
                              uint32_t key);

/* How many elements of the parameter lie before its next cache line: vectors that cross lines cost twice. */
size_t fs_before_cache_line(const fs_array *array, size_t start);

/* Find places for an array's units in this room; returns what is left of it. */
double *fs_array_place_units(fs_array *array, double *room);

/* The same for the factors of its rows and columns, and the sums they are made of; how many numbers these need. */
enum { CHUNK = 32 };    /* rows, of which a column is summed in order */
size_t fs_array_room_for_factors(const fs_array *array);
double *fs_array_place_factors(fs_array *array, double *room);

/* An operand with its units one after the other, each a run in C order, if it lies so, else NULL; and the way there for what
 * comes in the order of the parameter's memory. */
const char *fs_units_in_place(const fs_array *array, int operand);
void fs_store_by_unit(const fs_kernels *k, const fs_array *array, size_t start, size_t count, void *run);

/* Whether all operands lie in C order without gaps. */
bool fs_is_in_c_order(const fs_array *array);

/* The gradient as one run in C order, where it lies; NULL if it is none. */
const void *fs_grad_in_c_order(const fs_array *array);

/* The first of n tiles, or what else an array is cut into, in the share that starts with this element, a multiple of
 * FS_BLOCK or its size. */
size_t fs_first_of(const fs_array *array, size_t n, size_t start);
size_t fs_first_tile(const fs_array *array, size_t start);

/* The elements of a tile, as rows of the compute type. */
typedef struct { size_t n_rows, n_columns; } fs_shape;
typedef struct { char *first; ptrdiff_t stride; } fs_rows;

fs_shape fs_tile_shape(const fs_array *array, size_t tile);

/* An operand's rows: where they lie if they are runs there, else copied to `run`. */
fs_rows fs_bring(const fs_kernels *k, const fs_array *array, int operand, size_t tile, void *run);

/* The reverse: what `fs_bring` copied, and has changed since, goes back. */
void fs_take_back(const fs_kernels *k, const fs_array *array, int operand, size_t tile, const void *run);

#endif
