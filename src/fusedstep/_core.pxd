"""What `_core` uses of C: the kernels' interface, csrc/fusedstep.h, and what Cython's own declarations lack."""

from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_type_lock
from libc.stddef cimport ptrdiff_t, size_t


cdef extern from "Python.h":
    # Borrowed references.
    PyObject *PyList_GET_ITEM(PyObject *, Py_ssize_t) noexcept
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t) noexcept
    ctypedef object (*newfunc)(type, tuple, PyObject *)
    cdef struct _typeobject "PyTypeObject":
        newfunc tp_new
    _typeobject PyTuple_Type


cdef extern from "pythread.h" nogil:
    enum: PY_LOCK_ACQUIRED
    int PyThread_acquire_lock_timed(PyThread_type_lock, long long microseconds, int may_be_interrupted)


cdef extern from "numpy/arrayobject.h" nogil:
    ctypedef struct PyArrayObject:
        pass
    # By pointer, for loops over many arrays in which counting references would cost more than the rest.
    void *PyArray_DATA(PyArrayObject *)
    int PyArray_NDIM(PyArrayObject *)
    const ptrdiff_t *PyArray_DIMS(PyArrayObject *)
    const ptrdiff_t *PyArray_STRIDES(PyArrayObject *)
    int PyArray_TYPE(PyArrayObject *)
    int PyArray_ITEMSIZE(PyArrayObject *)
    bint PyArray_ISALIGNED(PyArrayObject *)
    bint PyArray_ISNOTSWAPPED(PyArrayObject *)
    bint PyArray_ISWRITEABLE(PyArrayObject *)
    bint PyArray_CheckExact(PyObject *)


cdef extern from "fusedstep.h" nogil:
    ctypedef enum fs_status:
        FS_OK
        FS_OUT_OF_MEMORY
        FS_UNKNOWN_RULE
        FS_BAD_LEVEL

    ctypedef enum fs_dtype:
        FS_FLOAT32
        FS_FLOAT64
        FS_FLOAT16
        FS_BFLOAT16
        FS_INT8
        FS_UINT8

    ctypedef enum fs_rounding:
        FS_NEAREST
        FS_STOCHASTIC
        FS_KAHAN
        FS_SPLIT
        FS_MASTER

    ctypedef enum fs_decay:
        FS_COUPLED
        FS_DECOUPLED
        FS_INDEPENDENT
        FS_DECOUPLED_AFTER

    ctypedef enum fs_nonfinite:
        FS_NONFINITE_STOP
        FS_NONFINITE_ZERO
        FS_NONFINITE_PROPAGATE

    ctypedef enum fs_level:
        FS_BASELINE
        FS_N_LEVELS

    const char *fs_level_name(fs_level level)
    bint fs_level_compiled(fs_level level)
    bint fs_level_available(fs_level level)
    fs_level fs_level_current()
    fs_status fs_level_set(fs_level level)

    bint fs_openmp()
    void fs_threads_set(int n_threads)
    void fs_threads_limit(int n_threads)
    int fs_threads_get()
    void fs_threads_insist(bint insist)

    int fs_rule_count()
    const char *fs_rule_name(int rule)
    const char *fs_rule_hyper_names(int rule)
    int fs_rule_states(int rule)
    int fs_rule_numbers(int rule)
    bint fs_rule_is_factored(int rule)
    bint fs_rule_is_measured(int rule)

    enum:
        FS_PARAM
        FS_GRAD
        FS_STATE
        FS_AVERAGE
        FS_RESIDUAL
        FS_N_OPERANDS
        FS_MAX_STATES
        FS_MAX_NUMBERS
        FS_PARAM_SQUARES
        FS_UPDATE_SQUARES
        FS_ZERO_GRADS

    ctypedef struct fs_operand:
        char *data
        fs_dtype dtype
        ptrdiff_t *strides

    ctypedef struct fs_array:
        int group, n_dims
        ptrdiff_t *shape
        fs_operand *operand

    ctypedef struct fs_norm:
        double sum_squares
        int exponent
        size_t n_nonfinite

    ctypedef struct fs_group:
        int rule
        double *hyper
        double weight_decay, l1, clip_value, clip_norm_per_array, clip_adaptive, max_norm, lower, upper, average_weight
        fs_decay decay_mode
        bint maximize, average_copies_first

    ctypedef struct fs_plan:
        size_t n_arrays, n_groups, n_elements
        fs_array *arrays
        fs_group *groups
        fs_norm *norms
        double *clip_factors
        bint has_stats
        double **stats
        double squares_divisor, step
        unsigned long long seed

    ctypedef struct fs_options:
        double grad_scale, clip_norm, clip_eps, clip_factor
        fs_nonfinite nonfinite
        bint clear_grads
        double squares_divisor
        const fs_plan *sums
        int n_threads

    ctypedef struct fs_report:
        bint applied, has_norm, is_finite
        double grad_norm, clip_factor

    fs_plan *fs_plan_new(size_t n_arrays, size_t n_groups, bint has_stats)
    fs_status fs_plan_finish(fs_plan *plan)
    void fs_plan_free(fs_plan *plan)
    fs_status fs_array_init(fs_array *array, int n_dims, const ptrdiff_t *shape)
    size_t fs_dtype_size(fs_dtype dtype)
    void fs_array_set(fs_array *array, int operand, void *data, fs_dtype dtype, bint aligned, const ptrdiff_t *strides)
    void fs_array_set_small(fs_array *array, int operand, void *data, fs_dtype dtype, float *scales)
    void fs_array_set_rounding(fs_array *array, fs_rounding rounding, void *residual)
    void fs_array_set_units(fs_array *array, int n_axes, const int *axes)
    void fs_array_set_number(fs_array *array, int number, void *data)
    void fs_array_set_factors(fs_array *array, void *row_state, void *column_state)
    void fs_measure(fs_plan *plan, const fs_options *options, fs_report *report)
    void fs_update(fs_plan *plan, const fs_options *options)
    void fs_clear(fs_plan *plan, const fs_options *options)
    void fs_clip(fs_plan *plan, const fs_options *options)
