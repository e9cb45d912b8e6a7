/* Where the elements of arrays lie, and how they come to the kernels and back. */
#include "tiles.h"

#include <stdlib.h>
#include <string.h>

size_t fs_dtype_size(fs_dtype dtype)
{
    static const size_t sizes[] = {4, 8, 2, 2, 1, 1};
    return sizes[dtype];
}

double fs_real_at(const fs_array *array, const void *data, size_t place)
{
    double value;
    float single;
    if (array->real == FS_FLOAT64) {
        memcpy(&value, (const char *)data + place * sizeof value, sizeof value);
        return value;
    }
    memcpy(&single, (const char *)data + place * sizeof single, sizeof single);
    return (double)single;
}

void fs_set_real(const fs_array *array, void *data, size_t place, double value)
{
    const float single = (float)value;
    memcpy((char *)data + place * array->item, array->real == FS_FLOAT64 ? (const void *)&value : &single, array->item);
}

/* ---- Layout --------------------------------------------------------------------------------------------------------- */

fs_status fs_array_init(fs_array *array, int n_dims, const ptrdiff_t *shape)
{
    const size_t n = (size_t)n_dims;
    /* One more loop and dimension than the array has: a tile needs two loops. */
    const size_t loops = (n + 2) * sizeof(fs_loop), grad_loops = (n + 1) * sizeof(fs_loop);
    const size_t lengths = (1 + FS_N_PLACES) * n * sizeof(ptrdiff_t), numbers = FS_MAX_NUMBERS * sizeof(double);
    char *memory = calloc(1, numbers + loops + grad_loops + lengths + n * sizeof(bool));
    if (!memory)
        return FS_OUT_OF_MEMORY;
    *array = (fs_array){.size = 1, .group = array->group, .n_dims = n_dims, .memory = memory,
                        .in_c_order = array->in_c_order, .in_blocks = array->in_blocks};
    for (int i = 0; i < FS_MAX_NUMBERS; i++)
        array->number[i] = (double *)memory + i;
    memory += numbers;
    array->loops = (fs_loop *)memory;
    array->grad_loops = (fs_loop *)(memory + loops);
    array->shape = (ptrdiff_t *)(memory + loops + grad_loops);
    for (int o = 0; o < FS_N_PLACES; o++)
        array->operand[o].strides = array->shape + (size_t)(1 + o) * n;
    array->counts_units = (bool *)(memory + loops + grad_loops + lengths);
    for (int d = 0; d < n_dims; d++) {
        array->shape[d] = shape[d];
        array->size *= (size_t)shape[d];
    }
    return FS_OK;
}

/* The gradient's dimensions in C order, without those of size 1, neighbours merged when one stride walks both. */
static void arrange_grad(fs_array *array)
{
    const ptrdiff_t *strides = array->operand[FS_GRAD].strides;
    fs_loop *loops = array->grad_loops;
    int n = 0;
    for (int d = 0; d < array->n_dims; d++) {
        fs_loop loop = {.size = (size_t)array->shape[d], .stride[FS_GRAD] = strides[d]};
        if (loop.size == 1)
            continue;
        if (n > 0 && loops[n - 1].stride[FS_GRAD] == strides[d] * array->shape[d])
            loop.size *= loops[--n].size;
        loops[n++] = loop;
    }
    if (n == 0)
        loops[n++] = (fs_loop){.size = 1, .stride[FS_GRAD] = (ptrdiff_t)fs_dtype_size(array->operand[FS_GRAD].dtype)};
    array->n_grad_loops = n;
    array->grad_is_transposed = n > 1 && llabs(loops[n - 1].stride[FS_GRAD]) >= CACHE_LINE &&
                                llabs(loops[n - 2].stride[FS_GRAD]) < CACHE_LINE;
}

static bool are_one(const fs_loop *outer, const fs_loop *inner)
{
    for (int o = 0; o < FS_N_PLACES; o++)
        if (outer->stride[o] != inner->stride[o] * (ptrdiff_t)inner->size)
            return false;
    return true;
}

/* All operands' dimensions, in the order of the parameter's memory unless C order is called for, merged likewise. */
static void arrange_loops(fs_array *array)
{
    fs_loop *loops = array->loops;
    int n = 0;
    loops[n++] = (fs_loop){.size = 1};    /* there are always two */
    for (int d = 0; d < array->n_dims; d++) {
        fs_loop loop = {.size = (size_t)array->shape[d]};
        if (loop.size == 1)
            continue;
        for (int o = 0; o < FS_N_PLACES; o++)
            loop.stride[o] = array->operand[o].data && !array->operand[o].is_packed ? array->operand[o].strides[d] : 0;
        int place = n++;
        for (; !array->in_c_order && place > 1 &&
               llabs(loops[place - 1].stride[FS_PARAM]) < llabs(loop.stride[FS_PARAM]); place--)
            loops[place] = loops[place - 1];
        loops[place] = loop;
    }
    int last = 0;
    for (int l = 1; l < n; l++)
        if (last > 0 && are_one(&loops[last], &loops[l])) {
            loops[l].size *= loops[last].size;
            loops[last] = loops[l];
        } else {
            loops[++last] = loops[l];
        }
    if (last == 0) {    /* one element, a run */
        loops[++last] = (fs_loop){.size = 1};
        for (int o = 0; o < FS_N_PLACES; o++)
            loops[last].stride[o] = (ptrdiff_t)fs_dtype_size(array->operand[o].dtype);
    }
    array->n_loops = last + 1;
}

/* Whether an operand jumps from cache line to cache line along the last loop, and is dense along another: that one. */
static bool find_transposed(const fs_array *array, int *loop)
{
    const int last = array->n_loops - 1;
    for (int o = FS_GRAD; o < FS_N_OPERANDS; o++)
        if (llabs(array->loops[last].stride[o]) >= CACHE_LINE)
            for (int l = 1; l < last; l++)
                if (llabs(array->loops[l].stride[o]) < CACHE_LINE) {
                    *loop = l;
                    return true;
                }
    return false;
}

static bool is_run(const fs_array *array, int o, ptrdiff_t stride)
{
    const fs_operand *operand = &array->operand[o];
    return operand->aligned && operand->dtype == array->real && stride == (ptrdiff_t)fs_dtype_size(operand->dtype);
}

/* Long rows that are runs are used in place, one by one. */
static bool has_long_rows(const fs_array *array)
{
    enum { LONG = 64 };
    return array->loops[array->n_loops - 1].size >= LONG;
}

/* Share the tile's memory: a block for each operand, or equal parts for those that have to be copied. Returns how many
 * elements an operand has room for. */
static size_t share_tile(fs_array *array, bool only_copied)
{
    const ptrdiff_t *strides = array->loops[array->n_loops - 1].stride;
    bool copied[FS_N_OPERANDS];
    size_t n_copied = 0, place = 0;
    for (int o = 0; o < FS_N_OPERANDS; o++) {
        copied[o] = !only_copied || o == FS_GRAD || (array->operand[o].data && !is_run(array, o, strides[o]));
        n_copied += copied[o];
    }
    const size_t room = only_copied ? sizeof(fs_tile) / array->item / n_copied : FS_BLOCK;
    for (int o = 0; o < FS_N_OPERANDS; o++) {
        array->copy_offset[o] = place * array->item;
        place += copied[o] ? room : 0;
    }
    return room;
}

/* Cut the loops into blocks of two dimensions, one or several to a tile: along the last loop as far as possible, but if an
 * operand is transposed also across, for it to use the cache lines it touches, and with larger tiles, for longer rows. */
static void arrange_tiles(fs_array *array)
{
    enum { WIDTH = 16 };
    array->across = array->n_loops - 2;
    const bool transposed = find_transposed(array, &array->across);
    const size_t room = share_tile(array, transposed && has_long_rows(array));
    fs_loop *last = &array->loops[array->n_loops - 1], *across = &array->loops[array->across];
    for (int l = 0; l < array->n_loops; l++)
        array->loops[l].chunk = 1;
    last->chunk = min_size(last->size, transposed ? room / WIDTH : room);
    across->chunk = min_size(across->size, room / last->chunk);
    last->chunk = min_size(last->size, room / across->chunk);

    array->n_blocks = 1;
    for (int l = 0; l < array->n_loops; l++) {
        array->loops[l].n_chunks = ratio_up(array->loops[l].size, array->loops[l].chunk);
        array->n_blocks *= array->loops[l].n_chunks;
    }
    array->blocks_per_tile = has_long_rows(array) ? 1 : min_size(array->n_blocks, room / (last->chunk * across->chunk));
    array->n_tiles = ratio_up(array->n_blocks, array->blocks_per_tile);
}

/* Whether the rows of all tiles are runs where they lie. */
static bool rows_are_runs(const fs_array *array, int o)
{
    const fs_loop *across = &array->loops[array->across], *last = &array->loops[array->n_loops - 1];
    if (array->blocks_per_tile > 1 || !is_run(array, o, last->stride[o]))
        return false;
    const bool blocks_are_runs = across->stride[o] == last->stride[o] * (ptrdiff_t)last->size;    /* of short, whole rows */
    return has_long_rows(array) || across->chunk == 1 || blocks_are_runs;
}

static bool is_dense(const fs_array *array, int o)
{
    const fs_loop *loops = array->loops;
    for (int l = array->n_loops - 1; l > 1; l--)
        if (loops[l - 1].stride[o] != loops[l].stride[o] * (ptrdiff_t)loops[l].size)
            return false;
    return loops[array->n_loops - 1].stride[o] == (ptrdiff_t)fs_dtype_size(array->operand[o].dtype);
}

static void arrange(fs_array *array)
{
    if (array->size == 0)
        return;
    arrange_loops(array);
    arrange_tiles(array);
    for (int o = 0; o < FS_N_PLACES; o++)
        array->operand[o].is_dense = is_dense(array, o);
    array->is_run = array->is_dense = array->n_loops == 2;
    for (int o = 0; o < FS_N_OPERANDS; o++)
        if (array->operand[o].data && !array->operand[o].is_packed) {
            const ptrdiff_t stride = array->loops[1].stride[o];
            array->is_dense = array->is_dense && stride == (ptrdiff_t)fs_dtype_size(array->operand[o].dtype);
            array->is_run = array->is_run && is_run(array, o, stride);
        }
}

void fs_array_set(fs_array *array, int operand, void *data, fs_dtype dtype, bool aligned, const ptrdiff_t *strides)
{
    fs_operand *changed = &array->operand[operand];
    changed->data = data;
    changed->dtype = dtype;
    changed->aligned = aligned;
    if (array->n_dims > 0)
        memcpy(changed->strides, strides, (size_t)array->n_dims * sizeof *strides);
    if (operand == FS_PARAM) {
        array->real = dtype == FS_FLOAT64 ? FS_FLOAT64 : FS_FLOAT32;
        array->item = fs_dtype_size(array->real);
    }
    if (operand == FS_GRAD && array->size > 0)
        arrange_grad(array);
    arrange(array);
}

void fs_array_for_sums(fs_array *array)
{
    const bool known = array->in_c_order;
    array->in_c_order = array->in_blocks = true;
    if (!known && array->operand[FS_PARAM].data)
        arrange(array);
}

void fs_array_set_small(fs_array *array, int operand, void *data, fs_dtype dtype, float *scales)
{
    array->in_blocks = true;
    array->operand[operand].is_packed = true;
    array->operand[operand].data = data;
    array->operand[operand].dtype = dtype;
    array->operand[operand].scales = scales;
}

void fs_array_set_rounding(fs_array *array, fs_rounding rounding, void *residual)
{
    array->in_blocks = true;
    array->rounding = rounding;
    array->operand[FS_RESIDUAL].is_packed = true;
    array->operand[FS_RESIDUAL].data = residual;
    array->operand[FS_RESIDUAL].dtype = rounding == FS_MASTER ? FS_FLOAT32 : array->operand[FS_PARAM].dtype;
}

void fs_array_set_number(fs_array *array, int number, void *data)
{
    array->number[number] = data;
}

/* ---- Units ---------------------------------------------------------------------------------------------------------- */

void fs_array_set_units(fs_array *array, int n_axes, const int *axes)
{
    array->in_blocks = true;
    array->n_units = 1;
    for (int a = 0; a < n_axes; a++) {
        array->counts_units[axes[a]] = true;
        array->n_units *= (size_t)array->shape[axes[a]];
    }
    array->unit_size = array->n_units > 0 ? array->size / array->n_units : 0;
}

double *fs_array_place_units(fs_array *array, double *room)
{
    const ptrdiff_t item = (ptrdiff_t)array->item;
    ptrdiff_t n_units = 1, n_inside = 1;
    if (array->n_units == 0)
        return room;
    for (int d = array->n_dims - 1; d >= 0; d--) {
        ptrdiff_t *count = array->counts_units[d] ? &n_units : &n_inside;
        const ptrdiff_t by_unit = array->counts_units[d] ? n_units * (ptrdiff_t)array->unit_size : n_inside;
        array->operand[FS_GRAD_FACTOR].strides[d] = array->counts_units[d] ? n_units * item : 0;
        array->operand[FS_PARAM_FACTOR].strides[d] = array->operand[FS_GRAD_FACTOR].strides[d];
        array->operand[FS_BY_UNIT].strides[d] = by_unit * item;
        *count *= array->shape[d];
    }
    array->unit_limits = room;
    room += array->n_units;
    for (int o = FS_GRAD_FACTOR; o < FS_N_PLACES; o++) {
        array->operand[o].data = (char *)room;
        array->operand[o].dtype = array->real;
        array->operand[o].aligned = true;
        room += o == FS_BY_UNIT ? array->size : array->n_units;
    }
    arrange(array);
    return room;
}

const char *fs_units_in_place(const fs_array *array, int o)
{
    const fs_operand *operand = &array->operand[o];
    if (!operand->aligned || operand->dtype != array->real)
        return NULL;
    for (int d = 0; d < array->n_dims; d++)
        if (array->shape[d] > 1 && operand->strides[d] != array->operand[FS_BY_UNIT].strides[d])
            return NULL;
    return operand->data;
}

/* ---- Factors: what is known of the rows and columns of matrices ------------------------------------------------------ */

void fs_array_set_factors(fs_array *array, void *row_state, void *column_state)
{
    array->n_rows = (size_t)array->shape[array->n_dims - 2];
    array->n_columns = (size_t)array->shape[array->n_dims - 1];
    array->n_matrices = array->size > 0 ? array->size / array->n_rows / array->n_columns : 0;
    array->row_state = row_state;
    array->column_state = column_state;
}

static size_t n_row_sums(const fs_array *array)
{
    return array->n_matrices * array->n_rows * ratio_up(array->n_columns, FS_BLOCK);
}

static size_t n_column_sums(const fs_array *array)
{
    return array->n_matrices * ratio_up(array->n_rows, CHUNK) * array->n_columns;
}

size_t fs_array_room_for_factors(const fs_array *array)
{
    return n_row_sums(array) + n_column_sums(array) + array->n_matrices * array->n_rows;
}

/* The rule sees the rows divided by their mean, and the columns as they are kept. */
double *fs_array_place_factors(fs_array *array, double *room)
{
    fs_operand *rows = &array->operand[FS_STATE], *columns = &array->operand[FS_STATE + 1];
    ptrdiff_t n_rows = 1, n_columns = 1;
    if (array->n_matrices == 0)
        return room;
    for (int d = array->n_dims - 1; d >= 0; d--) {
        const bool along_row = d == array->n_dims - 1, along_column = d == array->n_dims - 2;
        rows->strides[d] = along_row ? 0 : n_rows * (ptrdiff_t)array->item;
        columns->strides[d] = along_column ? 0 : n_columns * (ptrdiff_t)array->item;
        n_rows *= along_row ? 1 : array->shape[d];
        n_columns *= along_column ? 1 : array->shape[d];
    }
    array->row_sums = room;
    array->column_sums = array->row_sums + n_row_sums(array);
    rows->data = (char *)(array->column_sums + n_column_sums(array));
    columns->data = array->column_state;
    rows->dtype = columns->dtype = array->real;
    rows->aligned = true;
    columns->aligned = (uintptr_t)array->column_state % array->item == 0;
    rows->is_constant = columns->is_constant = true;
    arrange(array);
    return room + fs_array_room_for_factors(array);
}

bool fs_is_in_c_order(const fs_array *array)
{
    ptrdiff_t stride = (ptrdiff_t)fs_dtype_size(array->operand[FS_PARAM].dtype);
    for (int d = array->n_dims - 1; d >= 0; d--) {
        if (array->shape[d] > 1 && array->operand[FS_PARAM].strides[d] != stride)
            return false;
        stride *= array->shape[d];
    }
    return array->is_dense;
}

/* ---- Any part of an operand, as a run ------------------------------------------------------------------------------- */

/* Where an element lies, and its index along each of the last two loops. */
typedef struct { char *data; size_t row, column; } fs_place;

static fs_place find_place(const fs_operand *operand, int o, const fs_loop *loops, int n_loops, size_t element)
{
    fs_place place = {.data = operand->data};
    for (int l = n_loops - 1; l >= 0; l--) {
        const size_t index = element % loops[l].size;
        element /= loops[l].size;
        place.data += (ptrdiff_t)index * loops[l].stride[o];
        if (l == n_loops - 1)
            place.column = index;
        else if (l == n_loops - 2)
            place.row = index;
    }
    return place;
}

/* Load or store elements [start, start + count) of an operand, in the order of these loops. */
static void move(const fs_kernels *k, const fs_array *array, int o, const fs_loop *loops, int n_loops, size_t start,
                 size_t count, void *run, bool store)
{
    const fs_operand *operand = &array->operand[o];
    const int last = n_loops - 1;
    const fs_loop *inner = &loops[last];
    while (count > 0) {
        const fs_place place = find_place(operand, o, loops, n_loops, start);
        size_t n_rows = 1, n_columns = min_size(count, inner->size - place.column);
        if (last > 0 && n_columns == inner->size)
            n_rows = min_size(count / n_columns, loops[last - 1].size - place.row);
        const ptrdiff_t outer = last > 0 ? loops[last - 1].stride[o] : 0;
        if (store)
            k->store[operand->dtype](n_rows, n_columns, run, place.data, outer, inner->stride[o]);
        else
            k->load[operand->dtype](n_rows, n_columns, run, place.data, outer, inner->stride[o]);
        const size_t n = n_rows * n_columns;
        run = (char *)run + n * array->item;
        start += n;
        count -= n;
    }
}

const void *fs_grad_in_c_order(const fs_array *array)
{
    if (array->n_grad_loops > 1 || !is_run(array, FS_GRAD, array->grad_loops[0].stride[FS_GRAD]))
        return NULL;
    return array->operand[FS_GRAD].data;
}

void fs_load_in_c_order(const fs_kernels *k, const fs_array *array, size_t start, size_t count, void *run)
{
    move(k, array, FS_GRAD, array->grad_loops, array->n_grad_loops, start, count, run, false);
}

size_t fs_before_cache_line(const fs_array *array, size_t start)
{
    const uintptr_t address = (uintptr_t)(array->operand[FS_PARAM].data + start * array->item);
    return -address % CACHE_LINE / array->item;
}

fs_state fs_packed_state(const fs_array *array, int o, size_t start)
{
    const fs_operand *operand = &array->operand[o];
    return (fs_state){.data = operand->data + start * fs_dtype_size(operand->dtype), .dtype = operand->dtype,
                      .scales = operand->scales ? operand->scales + start / FS_SCALED : NULL};
}

static char *residual_from(const fs_array *array, size_t start)
{
    const fs_operand *residual = &array->operand[FS_RESIDUAL];
    return residual->data ? residual->data + start * fs_dtype_size(residual->dtype) : NULL;
}

/* Elements [start, start + count) of an operand that is not dense, if they are a run where they lie; else NULL. */
static void *run_in_row(const fs_array *array, int o, size_t start, size_t count)
{
    const fs_loop *last = &array->loops[array->n_loops - 1];
    if (!is_run(array, o, last->stride[o]) || start % last->size + count > last->size)
        return NULL;
    return find_place(&array->operand[o], o, array->loops, array->n_loops, start).data;
}

void *fs_load_in_memory_order(const fs_kernels *k, const fs_array *array, int o, size_t start, size_t count, void *run)
{
    const fs_operand *operand = &array->operand[o];
    char *data = operand->data + start * fs_dtype_size(operand->dtype);
    if (o == FS_PARAM && array->rounding == FS_MASTER)
        return residual_from(array, start);
    if (operand->is_packed) {
        const fs_state state = fs_packed_state(array, o, start);
        k->load_small(count, run, &state);
    } else if (!operand->is_dense) {
        void *in_place = run_in_row(array, o, start, count);
        if (in_place)
            return in_place;
        move(k, array, o, array->loops, array->n_loops, start, count, run, false);
    } else if (operand->aligned && operand->dtype == array->real)
        return data;
    else
        k->load[operand->dtype](1, count, run, data, 0, (ptrdiff_t)fs_dtype_size(operand->dtype));
    if (o == FS_PARAM && k->join[array->rounding][operand->dtype])
        k->join[array->rounding][operand->dtype](count, run, residual_from(array, start));
    return run;
}

void fs_store_in_memory_order(const fs_kernels *k, const fs_array *array, int o, size_t start, size_t count, void *run,
                              uint32_t key)
{
    const fs_operand *operand = &array->operand[o];
    const ptrdiff_t item = (ptrdiff_t)fs_dtype_size(operand->dtype);
    char *data = operand->data + start * (size_t)item;
    const bool dense = operand->is_dense;
    if (o == FS_PARAM && k->part[array->rounding][operand->dtype]) {
        uint16_t apart[FS_BLOCK], *stored = dense && operand->aligned ? (uint16_t *)data : apart;
        k->part[array->rounding][operand->dtype](count, run, stored, residual_from(array, start), key);
        if (stored != apart)
            return;
        k->load[operand->dtype](1, count, run, (const char *)apart, 0, item);
    }
    if (!dense) {
        if (run != run_in_row(array, o, start, count))
            move(k, array, o, array->loops, array->n_loops, start, count, run, true);
    } else if (run != data)
        k->store[operand->dtype](1, count, run, data, 0, item);
}

void fs_store_by_unit(const fs_kernels *k, const fs_array *array, size_t start, size_t count, void *run)
{
    move(k, array, FS_BY_UNIT, array->loops, array->n_loops, start, count, run, true);
}

/* ---- All operands, tile by tile ------------------------------------------------------------------------------------- */

typedef struct { char *data; size_t n_outer, n_inner; } fs_block;

#define FOR_BLOCKS(array, tile, block)                                                                           \
    for (size_t block = tile * array->blocks_per_tile;                                                           \
         block < (tile + 1) * array->blocks_per_tile && block < array->n_blocks; block++)

static fs_block find_block(const fs_array *array, int o, size_t block)
{
    const int last = array->n_loops - 1;
    fs_block found = {.data = array->operand[o].data};
    for (int l = last; l >= 0; l--) {
        const fs_loop *loop = &array->loops[l];
        const size_t index = block % loop->n_chunks * loop->chunk;
        block /= loop->n_chunks;
        found.data += (ptrdiff_t)index * loop->stride[o];
        if (l == last)
            found.n_inner = min_size(loop->chunk, loop->size - index);
        else if (l == array->across)
            found.n_outer = min_size(loop->chunk, loop->size - index);
    }
    return found;
}

size_t fs_first_of(const fs_array *array, size_t n, size_t start)
{
    const size_t unit = ratio_up(start, FS_BLOCK), n_units = ratio_up(array->size, FS_BLOCK);
    return n / n_units * unit + n % n_units * unit / n_units;
}

size_t fs_first_tile(const fs_array *array, size_t start)
{
    return fs_first_of(array, array->n_tiles, start);
}

fs_shape fs_tile_shape(const fs_array *array, size_t tile)
{
    size_t count = 0;
    FOR_BLOCKS(array, tile, block) {
        const fs_block b = find_block(array, FS_PARAM, block);
        if (has_long_rows(array))
            return (fs_shape){b.n_outer, b.n_inner};
        count += b.n_outer * b.n_inner;
    }
    return (fs_shape){1, count};
}

fs_rows fs_bring(const fs_kernels *k, const fs_array *array, int o, size_t tile, void *run)
{
    const ptrdiff_t across = array->loops[array->across].stride[o], along = array->loops[array->n_loops - 1].stride[o];
    char *place = run;
    fs_block b = {0};
    FOR_BLOCKS(array, tile, block) {
        b = find_block(array, o, block);
        if (rows_are_runs(array, o))
            return (fs_rows){b.data, across};
        k->load[array->operand[o].dtype](b.n_outer, b.n_inner, place, b.data, across, along);
        place += b.n_outer * b.n_inner * array->item;
    }
    return (fs_rows){run, (ptrdiff_t)(b.n_inner * array->item)};
}

void fs_take_back(const fs_kernels *k, const fs_array *array, int o, size_t tile, const void *run)
{
    const ptrdiff_t across = array->loops[array->across].stride[o], along = array->loops[array->n_loops - 1].stride[o];
    const char *place = run;
    if (rows_are_runs(array, o))
        return;
    FOR_BLOCKS(array, tile, block) {
        const fs_block b = find_block(array, o, block);
        k->store[array->operand[o].dtype](b.n_outer, b.n_inner, place, b.data, across, along);
        place += b.n_outer * b.n_inner * array->item;
    }
}
