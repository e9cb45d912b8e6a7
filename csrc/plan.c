/* Plans: which arrays a step works on and where their elements lie. All memory a step needs is allocated here. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

size_t fs_dtype_size(fs_dtype dtype)
{
    static const size_t sizes[] = {4, 8, 2, 2};
    return sizes[dtype];
}

static bool is_contiguous(size_t item, int n_dims, const ptrdiff_t *shape, const ptrdiff_t *strides)
{
    ptrdiff_t expected = (ptrdiff_t)item;
    for (int d = n_dims - 1; d >= 0; d--) {
        if (shape[d] == 0)
            return true;
        if (shape[d] != 1 && strides[d] != expected)
            return false;
        expected *= shape[d];
    }
    return true;
}

/* Dimensions without those of size 1, neighbours merged when one stride walks both. Returns how many are left. */
static int merge_dims(int n_dims, const ptrdiff_t *shape, const ptrdiff_t *strides, fs_dim *merged)
{
    int n = 0;
    for (int d = 0; d < n_dims; d++) {
        if (shape[d] == 1)
            continue;
        if (n > 0 && merged[n - 1].stride == strides[d] * shape[d])
            merged[n - 1] = (fs_dim){merged[n - 1].size * (size_t)shape[d], strides[d]};
        else
            merged[n++] = (fs_dim){(size_t)shape[d], strides[d]};
    }
    return n;
}

fs_status fs_view_set(fs_view *view, void *data, fs_dtype dtype, bool aligned, int n_dims, const ptrdiff_t *shape,
                      const ptrdiff_t *strides)
{
    fs_view new_view = {.data = data, .dtype = dtype};
    new_view.contiguous = aligned && is_contiguous(fs_dtype_size(dtype), n_dims, shape, strides);
    if (!new_view.contiguous) {
        new_view.dims = malloc((size_t)(n_dims + 1) * sizeof *new_view.dims);
        if (!new_view.dims)
            return FS_OUT_OF_MEMORY;
        new_view.n_dims = merge_dims(n_dims, shape, strides, new_view.dims);
        if (new_view.n_dims == 0)    /* one unaligned element */
            new_view.dims[new_view.n_dims++] = (fs_dim){1, 0};
    }
    free(view->dims);
    *view = new_view;
    return FS_OK;
}

fs_plan *fs_plan_new(size_t n_arrays, size_t n_groups)
{
    fs_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    plan->n_arrays = n_arrays;
    plan->n_groups = n_groups;
    plan->arrays = calloc(n_arrays + 1, sizeof *plan->arrays);
    plan->groups = calloc(n_groups + 1, sizeof *plan->groups);
    plan->first_element = calloc(n_arrays + 1, sizeof *plan->first_element);
    plan->first_block = calloc(n_arrays + 1, sizeof *plan->first_block);
    plan->array_sums = calloc(n_arrays + 1, sizeof *plan->array_sums);
    if (!plan->arrays || !plan->groups || !plan->first_element || !plan->first_block || !plan->array_sums) {
        fs_plan_free(plan);
        return NULL;
    }
    return plan;
}

fs_status fs_plan_finish(fs_plan *plan)
{
    for (size_t i = 0; i < plan->n_arrays; i++) {
        const size_t size = plan->arrays[i].size;
        plan->first_element[i + 1] = plan->first_element[i] + size;
        plan->first_block[i + 1] = plan->first_block[i] + (size + FS_BLOCK - 1) / FS_BLOCK;
    }
    plan->n_elements = plan->first_element[plan->n_arrays];
    plan->block_sums = calloc(plan->first_block[plan->n_arrays] + 1, sizeof *plan->block_sums);
    return plan->block_sums ? FS_OK : FS_OUT_OF_MEMORY;
}

void fs_plan_free(fs_plan *plan)
{
    if (!plan)
        return;
    for (size_t i = 0; plan->arrays && i < plan->n_arrays; i++) {
        fs_array *array = &plan->arrays[i];
        free(array->param.dims);
        free(array->grad.dims);
        for (int s = 0; s < FS_MAX_STATES; s++)
            free(array->state[s].dims);
    }
    free(plan->arrays);
    free(plan->groups);
    free(plan->first_element);
    free(plan->first_block);
    free(plan->block_sums);
    free(plan->array_sums);
    free(plan);
}
