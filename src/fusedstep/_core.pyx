"""The border between Python and C: plans over NumPy arrays, CPU levels, threads.

Callers have checked everything (`fusedstep._arrays`); what is refused here would be a bug there.
"""

from cpython.dict cimport PyDict_Next
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject, PyTypeObject
from cpython.pythread cimport (
    PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock, PyThread_get_thread_ident, PyThread_release_lock,
    PyThread_type_lock,
)
from cpython.sequence cimport PySequence_Fast_GET_ITEM
from libc.math cimport INFINITY, NAN, ldexp, sqrt
from libc.stddef cimport ptrdiff_t, size_t
cimport numpy as cnp

import os

from fusedstep import _arrays    # which imports this module: its functions are there when they are called
from fusedstep._hyper import CONVENTIONS, decay_mode

cnp.import_array()


cdef extern from *:
    """
    #if defined(__clang__)
    #define FS_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define FS_COMPILER "gcc " __VERSION__
    #else
    #define FS_COMPILER "unknown"
    #endif
    #ifdef _OPENMP
    #define FS_OPENMP_VERSION _OPENMP
    #else
    #define FS_OPENMP_VERSION 0
    #endif
    """
    const char *FS_COMPILER
    const char *FUSEDSTEP_FLAGS
    const int FS_OPENMP_VERSION

COMPILER = FS_COMPILER.decode()
FLAGS = FUSEDSTEP_FLAGS.decode()
OPENMP_VERSION = FS_OPENMP_VERSION

cdef dict ERRORS = {
    FS_OUT_OF_MEMORY: (MemoryError, "out of memory while preparing a step; nothing has changed"),
    FS_UNKNOWN_RULE: (ValueError, "unknown rule"),
    FS_BAD_LEVEL: (ValueError, "this CPU level is not available"),
}

cdef dict DECAY_MODES = {
    "coupled": FS_COUPLED, "decoupled": FS_DECOUPLED, "independent": FS_INDEPENDENT, "decoupled_after": FS_DECOUPLED_AFTER,
}
cdef dict ROUNDINGS = {
    "nearest": FS_NEAREST, "stochastic": FS_STOCHASTIC, "kahan": FS_KAHAN, "split": FS_SPLIT, "master": FS_MASTER,
}

cdef int check(fs_status status) except -1:
    if status != FS_OK:
        error, message = ERRORS[status]
        raise error(message)
    return 0


# ---- Rules, levels, threads ---------------------------------------------------------------------------------------------

RULES = {fs_rule_name(rule).decode(): rule for rule in range(fs_rule_count())}
MEASURED_RULES = {name for name, rule in RULES.items() if fs_rule_is_measured(rule)}


def _hyper_places(int rule):
    """Where each C hyper-parameter is found, if not under its name: "beta1", of the pair "betas", at ("beta1", "betas", 0);
    "eps2" at ("eps2", "eps", 1)."""
    names = fs_rule_hyper_names(rule).decode().split()
    return [
        (name, name[:-1].rstrip("s") + "s", int(name[-1]) - 1) if name[-1] in "123456789" else (name, None, None)
        for name in names
    ]


def levels():
    """CPU levels as a list of (name, compiled, available), lowest first."""
    return [
        (fs_level_name(<fs_level>level).decode(), bool(fs_level_compiled(<fs_level>level)),
         bool(fs_level_available(<fs_level>level)))
        for level in range(FS_N_LEVELS)
    ]


def get_level():
    return fs_level_name(fs_level_current()).decode()


def set_level(str name):
    for level, (known, _, _) in enumerate(levels()):
        if known == name:
            check(fs_level_set(<fs_level>level))
            return
    raise ValueError(f"unknown CPU level {name!r}")


def openmp():
    """Whether the extension was built with OpenMP."""
    return bool(fs_openmp())


def set_num_threads(int n_threads):
    fs_threads_set(n_threads)


def limit_num_threads(int n_threads):
    fs_threads_limit(n_threads)


def insist_on_threads(bint insist):
    """Use all threads even for small arrays and on busy cores, so that tests see them."""
    fs_threads_insist(insist)


def get_num_threads():
    return fs_threads_get()


# ---- Plans --------------------------------------------------------------------------------------------------------------

cdef int bfloat16_type = -1


cdef inline int known_dtype(PyArrayObject *array) noexcept:
    """The fs_dtype of an array; -1 if there is none, or if it is bfloat16 for the first time."""
    cdef int kind = PyArray_TYPE(array)
    if not PyArray_ISNOTSWAPPED(array):
        return -1
    if kind == cnp.NPY_FLOAT32:
        return FS_FLOAT32
    if kind == cnp.NPY_FLOAT64:
        return FS_FLOAT64
    if kind == cnp.NPY_FLOAT16:
        return FS_FLOAT16
    return FS_BFLOAT16 if kind == bfloat16_type else -1


cdef int dtype_code(cnp.ndarray array) except -2:
    """The fs_dtype of an array; -1 if there is none."""
    global bfloat16_type
    cdef int dtype = known_dtype(<PyArrayObject *>array)
    if dtype < 0 and bfloat16_type < 0 and array.dtype.name == "bfloat16":
        bfloat16_type = PyArray_TYPE(<PyArrayObject *>array)
        return FS_BFLOAT16
    return dtype


cdef int set_operand(fs_array *place, int operand, cnp.ndarray array) except -1:
    cdef PyArrayObject *pointer = <PyArrayObject *>array
    cdef int dtype = dtype_code(array)
    if dtype < 0:
        raise TypeError(f"no kernel for dtype {array.dtype}")
    fs_array_set(place, operand, PyArray_DATA(pointer), <fs_dtype>dtype, PyArray_ISALIGNED(pointer), PyArray_STRIDES(pointer))
    return 0


cdef int set_small_operand(fs_array *place, int operand, cnp.ndarray array, cnp.ndarray scales) except -1:
    cdef int dtype = FS_INT8 if array.dtype == "i1" else FS_UINT8 if array.dtype == "u1" else dtype_code(array)
    fs_array_set_small(place, operand, PyArray_DATA(<PyArrayObject *>array), <fs_dtype>dtype,
                       NULL if scales is None else <float *>PyArray_DATA(<PyArrayObject *>scales))
    return 0


cdef bint has_shape(const fs_array *place, PyArrayObject *array) noexcept:
    cdef int d
    if PyArray_NDIM(array) != place.n_dims:
        return False
    for d in range(place.n_dims):
        if PyArray_DIMS(array)[d] != place.shape[d]:
            return False
    return True


def address(cnp.ndarray array not None):
    return <size_t>PyArray_DATA(<PyArrayObject *>array)


cdef bint lies_at(const fs_array *place, int operand, PyArrayObject *array) noexcept:
    """Whether an array is just what the plan has for an operand."""
    cdef const fs_operand *known = &place.operand[operand]
    cdef const ptrdiff_t *dims = PyArray_DIMS(array)
    cdef const ptrdiff_t *strides = PyArray_STRIDES(array)
    cdef int d
    if PyArray_DATA(array) != known.data or PyArray_NDIM(array) != place.n_dims:
        return False
    for d in range(place.n_dims):
        if dims[d] != place.shape[d] or strides[d] != known.strides[d]:
            return False
    return known_dtype(array) == <int>known.dtype


cdef void find_span(PyArrayObject *array, size_t itemsize, size_t *first, size_t *end) noexcept:
    """The addresses from an array's first byte to behind its last."""
    cdef ptrdiff_t extent
    cdef int d
    first[0] = <size_t>PyArray_DATA(array)
    end[0] = first[0] + itemsize
    for d in range(PyArray_NDIM(array)):
        extent = PyArray_STRIDES(array)[d] * (PyArray_DIMS(array)[d] - 1)
        if PyArray_DIMS(array)[d] == 0:
            end[0] = first[0]
            return
        if extent < 0:
            first[0] += <size_t>extent
        else:
            end[0] += <size_t>extent


cdef bint gather(object spec, object tree, list leaves) except -1:
    """Append the leaves of a tree to a list. False if it is not built of dictionaries, lists and tuples just like the spec."""
    cdef Py_ssize_t i
    if spec is None:
        leaves.append(tree)
    elif type(spec) is dict:
        if type(tree) is not dict or len(<dict>tree) != len(<dict>spec):
            return False
        for key, part in (<dict>spec).items():
            if key not in <dict>tree:
                return False
            if part is None:
                leaves.append((<dict>tree)[key])
            elif not gather(part, (<dict>tree)[key], leaves):
                return False
    elif (type(tree) is not list and type(tree) is not tuple) or len(tree) != len(<list>spec):
        return False
    else:
        for i, part in enumerate(<list>spec):
            leaf = <object>PySequence_Fast_GET_ITEM(tree, i)
            if part is None:
                leaves.append(leaf)
            elif not gather(part, leaf, leaves):
                return False
    return True


cdef long long n_forks = 0    # between the first process and this one


def count_fork():
    global n_forks
    n_forks += 1


os.register_at_fork(after_in_child=count_fork)


cdef class Lock:
    """A lock for ``with`` blocks, and for `Plan.repeat`, that does not wait where nobody would ever release it."""

    cdef PyThread_type_lock lock
    cdef unsigned long owner         # the thread that holds it; 0 if unknown
    cdef long long forks_before      # n_forks when it was acquired; -1 if unknown

    def __cinit__(self):
        self.forks_before = -1
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            check(FS_OUT_OF_MEMORY)

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    cdef bint acquire_at_once(self) noexcept:
        if not PyThread_acquire_lock(self.lock, 0):
            return False
        self.take()
        return True

    cdef void take(self) noexcept:
        self.owner = PyThread_get_thread_ident()
        self.forks_before = n_forks

    cdef void release(self) noexcept:
        self.owner = 0
        self.forks_before = -1
        PyThread_release_lock(self.lock)

    def __enter__(self):
        cdef bint acquired = self.acquire_at_once()
        if acquired:
            return
        if 0 <= self.forks_before < n_forks:
            raise RuntimeError(
                "the process forked while another thread was in a call of this optimizer: what it has here may be half updated"
            )
        if self.owner == PyThread_get_thread_ident():
            raise RuntimeError(
                "this thread is within a call of the same optimizer, from where a schedule or a signal handler made another: "
                "make it afterwards"
            )
        while not acquired:
            with nogil:
                acquired = PyThread_acquire_lock_timed(self.lock, -1, 1) == PY_LOCK_ACQUIRED
            if not acquired:    # a signal came
                PyErr_CheckSignals()
        self.take()

    def __exit__(self, *error):
        self.release()


# A plan writes each operand of a parameter, the scales of its states, and its numbers.
cdef enum:
    FIRST_NUMBER = FS_N_OPERANDS + FS_MAX_STATES
    N_WRITTEN = FIRST_NUMBER + FS_MAX_NUMBERS

# Below so many elements a step is over sooner than the GIL is released and taken again.
cdef enum: N_SMALL = 20_000


cdef class Plan:
    """Which arrays a step updates, with which rule; and the steps themselves.

    Parameters
    ----------
    params : list of ndarray
    operands : list of Operands
        What goes with each parameter.
    groups : list of int
        Index into ``rules`` for each parameter.
    rules : list of (str or None)
        The kernel of each group; None for a plan that only measures or clips gradients.
    seed : int
        Of random rounding.
    has_stats : bool
        Whether updates make statistics.
    """

    cdef fs_plan *plan
    cdef fs_options options
    cdef readonly list params, operands
    cdef list places
    cdef readonly list grads    # None before any are bound
    cdef int apart              # whether no elements of gradients share memory; -1: to be found out
    cdef PyArrayObject **written    # what a step writes, by array, NULL where none; owned by the lists
    cdef PyArrayObject **beside     # those of them that are no parameters, without gaps
    cdef size_t n_beside
    cdef size_t n_spans         # address ranges of what a step writes, apart and in order: first address, end, ...
    cdef size_t *spans
    cdef list seen              # what `repeat` expects: each group's dictionary, and its keys and values in turn
    cdef tuple seen_options     # clip_norm, nonfinite, num_threads
    cdef bint follows           # schedules

    def __cinit__(self, list params, list operands, list groups, list rules, unsigned long long seed=0,
                  bint has_stats=False):
        cdef fs_array *array
        cdef PyArrayObject *param
        cdef size_t i, s
        self.params = params
        self.operands = operands
        self.places = []
        self.plan = fs_plan_new(len(params), len(rules), has_stats)
        if self.plan == NULL:
            check(FS_OUT_OF_MEMORY)
        for i, rule in enumerate(rules):
            if rule is None:
                self.places.append([])
                continue
            if rule not in RULES:
                check(FS_UNKNOWN_RULE)
            self.plan.groups[i].rule = RULES[rule]
            self.places.append(_hyper_places(RULES[rule]))
        self.written = <PyArrayObject **>PyMem_Calloc(len(params) * N_WRITTEN + 1, sizeof(PyArrayObject *))
        if self.written == NULL:
            check(FS_OUT_OF_MEMORY)
        for i in range(len(params)):
            array = &self.plan.arrays[i]
            array.group = groups[i]
            param = <PyArrayObject *><cnp.ndarray>params[i]
            check(fs_array_init(array, PyArray_NDIM(param), PyArray_DIMS(param)))
            self.set_written(i, FS_PARAM, params[i])
            states, scales, average, low_precision, residual, unit_axes, numbers = operands[i]
            rule = rules[groups[i]]
            if rule is not None and (len(states), len(numbers)) != (fs_rule_states(RULES[rule]), fs_rule_numbers(RULES[rule])):
                raise ValueError(f"rule {rule} has others than {len(states)} states and {len(numbers)} numbers")
            for s in range(len(numbers)):
                self.set_number(i, <int>s, numbers[s])
            if rule is not None and fs_rule_is_factored(RULES[rule]):
                self.set_factors(i, states[0], states[1])
            else:
                for s in range(len(states)):
                    self.set_state(i, <int>s, states[s], scales[s] if scales else None)
            if average is not None:
                self.set_written(i, FS_AVERAGE, average)
            if low_precision != "nearest":
                self.set_rounding(i, ROUNDINGS[low_precision], residual)
            if unit_axes is not None:
                self.set_units(i, unit_axes)
        self.find_beside()
        self.seed = seed
        check(fs_plan_finish(self.plan))

    def __dealloc__(self):
        fs_plan_free(self.plan)
        PyMem_Free(self.spans)
        PyMem_Free(self.beside)
        PyMem_Free(self.written)

    cdef int set_written(self, size_t i, int operand, cnp.ndarray array) except -1:
        set_operand(&self.plan.arrays[i], operand, array)
        self.written[i * N_WRITTEN + operand] = <PyArrayObject *>array
        return 0

    cdef int set_state(self, size_t i, int s, cnp.ndarray array, cnp.ndarray scales) except -1:
        if scales is None and dtype_code(array) != FS_BFLOAT16:
            return self.set_written(i, FS_STATE + s, array)
        set_small_operand(&self.plan.arrays[i], FS_STATE + s, array, scales)
        self.written[i * N_WRITTEN + FS_STATE + s] = <PyArrayObject *>array
        if scales is not None:
            self.written[i * N_WRITTEN + FS_N_OPERANDS + s] = <PyArrayObject *>scales
        return 0

    cdef int set_factors(self, size_t i, cnp.ndarray rows, cnp.ndarray columns) except -1:
        fs_array_set_factors(&self.plan.arrays[i], PyArray_DATA(<PyArrayObject *>rows), PyArray_DATA(<PyArrayObject *>columns))
        self.written[i * N_WRITTEN + FS_STATE] = <PyArrayObject *>rows
        self.written[i * N_WRITTEN + FS_STATE + 1] = <PyArrayObject *>columns
        return 0

    cdef int set_number(self, size_t i, int n, cnp.ndarray array) except -1:
        fs_array_set_number(&self.plan.arrays[i], n, PyArray_DATA(<PyArrayObject *>array))
        self.written[i * N_WRITTEN + FIRST_NUMBER + n] = <PyArrayObject *>array
        return 0

    cdef int set_rounding(self, size_t i, fs_rounding rounding, cnp.ndarray residual) except -1:
        cdef PyArrayObject *pointer = NULL if residual is None else <PyArrayObject *>residual
        fs_array_set_rounding(&self.plan.arrays[i], rounding, NULL if pointer == NULL else PyArray_DATA(pointer))
        self.written[i * N_WRITTEN + FS_RESIDUAL] = pointer
        return 0

    cdef int set_units(self, size_t i, tuple axes) except -1:
        cdef int[cnp.NPY_MAXDIMS] counting
        for a, axis in enumerate(axes):
            counting[a] = axis
        fs_array_set_units(&self.plan.arrays[i], <int>len(axes), counting)
        return 0

    cdef int find_beside(self) except -1:
        cdef size_t i
        self.beside = <PyArrayObject **>PyMem_Malloc(self.plan.n_arrays * N_WRITTEN * sizeof(PyArrayObject *) + 1)
        if self.beside == NULL:
            check(FS_OUT_OF_MEMORY)
        for i in range(self.plan.n_arrays * N_WRITTEN):
            if i % N_WRITTEN != FS_PARAM and self.written[i] != NULL:
                self.beside[self.n_beside] = self.written[i]
                self.n_beside += 1
        return 0

    # ---- Gradients ----

    def look_at(self, list grads):
        """What may be wrong with gradients for this plan.

        Returns the index of the first that is no supported array of its parameter's shape, or -1; and whether any may share
        memory with what a step writes. Those that lie where the bound ones do have been checked.
        """
        cdef bint moved = False, near = False
        cdef Py_ssize_t bad = self.find_bad(grads, &moved, &near)
        return bad, near

    cdef Py_ssize_t find_bad(self, list grads, bint *moved, bint *near) except -2:
        cdef fs_array *place
        cdef PyArrayObject *grad
        cdef size_t i
        for i in range(self.plan.n_arrays):
            place = &self.plan.arrays[i]
            grad = <PyArrayObject *>PyList_GET_ITEM(<PyObject *>grads, i)
            if not PyArray_CheckExact(<PyObject *>grad):
                return <Py_ssize_t>i
            if lies_at(place, FS_GRAD, grad):
                continue
            if dtype_code(<cnp.ndarray>grads[i]) < 0 or not has_shape(place, grad):
                return <Py_ssize_t>i
            moved[0] = True
            near[0] = near[0] or self.is_near(grad, fs_dtype_size(<fs_dtype>known_dtype(grad)))
        return -1

    cpdef bind(self, list grads):
        """Take these gradients for the next steps."""
        cdef fs_array *place
        cdef size_t i
        for i in range(self.plan.n_arrays):
            place = &self.plan.arrays[i]
            if not lies_at(place, FS_GRAD, <PyArrayObject *>PyList_GET_ITEM(<PyObject *>grads, i)):
                set_operand(place, FS_GRAD, grads[i])
        self.grads = grads
        self.apart = -1
        self.plan.squares_divisor = 0    # an update by others may have left none

    def unbind(self):
        """Have no gradients."""
        self.grads = None

    cdef bint grads_lie_apart(self) except -1:
        """Whether one gradient's elements can be cleared while others are still to be read."""
        cdef size_t i, first, end, last_end = 0
        cdef list spans = []
        if self.apart < 0:
            for i in range(self.plan.n_arrays):
                find_span(<PyArrayObject *>PyList_GET_ITEM(<PyObject *>self.grads, i),
                          fs_dtype_size(self.plan.arrays[i].operand[FS_GRAD].dtype), &first, &end)
                if first < end:
                    spans.append((first, end))
            apart = not any(map(_arrays.overlaps_itself, self.grads))
            for first, end in sorted(spans):
                apart = apart and first >= last_end
                last_end = end
            self.apart = apart
        return self.apart

    cdef bint is_near(self, PyArrayObject *grad, size_t itemsize) except -1:
        """Whether the range of addresses of an array meets that of one to be written."""
        cdef size_t first, end, low = 0, high, middle
        if self.spans == NULL:
            self.find_spans()
        find_span(grad, itemsize, &first, &end)
        high = self.n_spans
        while low < high:    # for the first span that ends behind the beginning
            middle = (low + high) // 2
            if self.spans[2 * middle + 1] > first:
                high = middle
            else:
                low = middle + 1
        return low < self.n_spans and self.spans[2 * low] < end

    cdef int find_spans(self) except -1:
        cdef size_t i, first, end
        cdef list found = []
        for i in range(self.plan.n_arrays * N_WRITTEN):
            if self.written[i] != NULL:
                find_span(self.written[i], <size_t>PyArray_ITEMSIZE(self.written[i]), &first, &end)
                if first < end:
                    found.append((first, end))
        self.spans = <size_t *>PyMem_Malloc((2 * len(found) + 1) * sizeof(size_t))
        if self.spans == NULL:
            check(FS_OUT_OF_MEMORY)
        for first, end in sorted(found):
            if self.n_spans > 0 and first < self.spans[2 * self.n_spans - 1]:
                self.spans[2 * self.n_spans - 1] = max(end, self.spans[2 * self.n_spans - 1])
            else:
                self.spans[2 * self.n_spans] = first
                self.spans[2 * self.n_spans + 1] = end
                self.n_spans += 1
        return 0

    # ---- Parameters and settings ----

    def first_read_only(self):
        """The index of the first parameter that cannot be written; -1 if there is none."""
        cdef size_t i
        for i in range(self.plan.n_arrays):
            if not PyArray_ISWRITEABLE(self.written[i * N_WRITTEN]):
                return <Py_ssize_t>i
        return -1

    def first_moved(self):
        """The index of the first parameter that no longer lies where it did; -1 if there is none."""
        cdef size_t i
        for i in range(self.plan.n_arrays):
            if not lies_at(&self.plan.arrays[i], FS_PARAM, self.written[i * N_WRITTEN]):
                return <Py_ssize_t>i
        return -1

    def set_group(self, size_t index, dict values):
        """Set the hyper-parameters of a group, from their public names."""
        cdef fs_group *group = &self.plan.groups[index]
        cdef int h = 0
        self.seen = None
        mode = decay_mode(values)
        weight_decay = values.get("weight_decay", 0.0)
        by_rule = mode == "coupled" and ("weight_decay", None, None) in self.places[index]
        group.weight_decay = 0.0 if by_rule else weight_decay
        group.decay_mode = DECAY_MODES[mode]
        for name, several, item in self.places[index]:
            if name == "convention":
                group.hyper[h] = CONVENTIONS.index(values.get(name, "torch"))
            elif name == "weight_decay":
                group.hyper[h] = weight_decay if by_rule else 0.0
            else:
                value = values[name] if name in values else values[several][item]
                group.hyper[h] = NAN if value is None else value
            h += 1
        group.l1 = values.get("l1", 0.0)
        group.maximize = values.get("maximize", False)
        group.clip_value = or_infinity(values.get("clip_value"))
        group.clip_norm_per_array = or_infinity(values.get("clip_norm_per_array"))
        group.clip_adaptive = or_infinity(values.get("clip_adaptive"))
        group.max_norm = or_infinity(values.get("max_norm"))
        bounds = values.get("bounds")
        group.lower = -INFINITY if bounds is None else bounds[0]
        group.upper = INFINITY if bounds is None else bounds[1]
        group.average_weight = 1.0 - (values.get("ema_decay") or 0.0)
        group.average_copies_first = values.get("convention") == "keras"

    @property
    def steps(self):
        """Number of steps applied."""
        return int(self.plan.step)

    @steps.setter
    def steps(self, value):
        self.plan.step = value

    @property
    def seed(self):
        """Of random rounding."""
        return self.plan.seed

    @seed.setter
    def seed(self, unsigned long long value):
        self.plan.seed = value

    def measure(self, *, double grad_scale=1.0, clip_norm=None, double clip_eps=1e-6, double clip_factor=1.0,
                nonfinite="raise", num_threads=None, bint clear_grads=False, double squares_divisor=0.0, Plan sums=None):
        """Look at the bound gradients, and get ready to use them with these options.

        With a `squares_divisor`, updates add up squares of the new parameters divided by it. `sums` is the plan that did so,
        if these gradients are its parameters: where they are now divided by the same, nobody needs to look at them again.

        Returns whether they may be used, their norm (None if nothing depends on it), the smallest clip factor, and for each
        array with non-finite gradients its index and the number of such elements.
        """
        cdef fs_report report
        cdef size_t i
        self.options.grad_scale = grad_scale
        self.options.clip_norm = or_infinity(clip_norm)
        self.options.clip_eps = clip_eps
        self.options.n_threads = 0 if num_threads is None else num_threads
        self.options.clip_factor = clip_factor
        self.options.clear_grads = clear_grads and self.grads_lie_apart()
        self.options.nonfinite = (FS_NONFINITE_ZERO if nonfinite == "zero" else
                                  FS_NONFINITE_PROPAGATE if nonfinite == "propagate" else FS_NONFINITE_STOP)
        self.options.squares_divisor = squares_divisor
        self.options.sums = NULL if sums is None else sums.plan
        with nogil:
            fs_measure(self.plan, &self.options, &report)
        self.options.sums = NULL    # which may not live as long
        bad = []
        if not report.is_finite:
            for i in range(self.plan.n_arrays):
                if self.plan.norms[i].n_nonfinite > 0:
                    bad.append((i, self.plan.norms[i].n_nonfinite))
        return bool(report.applied), report.grad_norm if report.has_norm else None, report.clip_factor, bad

    def clip_factor(self, size_t i):
        """What the measured gradient of an array is multiplied by."""
        return self.plan.clip_factors[i]

    # What follows uses gradients that were measured. Nothing here can fail or be interrupted: no allocation, no Python.

    def update(self, bint apply, bint clear_grads, Plan used=None, cnp.ndarray stats=None):
        """Update parameters and states if the step is to be applied, then clear the gradients if they are to be.

        The steps of `used`, the plan that summed up these gradients, count from 0 again. `stats` gets a row for each array:
        norms of gradient, parameter and update, clip factor, numbers of elements of the gradient that are 0 and not finite.
        """
        cdef double *rows = NULL if stats is None else rows_of(stats)
        with nogil:
            self.finish(apply, clear_grads, rows)
        if used is not None:
            used.plan.step = 0

    cdef void tell(self, double *rows) noexcept nogil:
        cdef size_t i
        cdef double *row
        for i in range(self.plan.n_arrays):
            row = rows + 6 * i
            row[0] = ldexp(sqrt(self.plan.norms[i].sum_squares), self.plan.norms[i].exponent)
            row[1] = sqrt(self.plan.stats[FS_PARAM_SQUARES][i])
            row[2] = sqrt(self.plan.stats[FS_UPDATE_SQUARES][i])
            row[3] = self.plan.clip_factors[i]
            row[4] = self.plan.stats[FS_ZERO_GRADS][i]
            row[5] = <double>self.plan.norms[i].n_nonfinite

    cdef void finish(self, bint apply, bint clear_grads, double *rows) noexcept nogil:
        if apply:
            fs_update(self.plan, &self.options)
            if rows != NULL:
                self.tell(rows)
        if clear_grads and not (apply and self.options.clear_grads):    # that is in the same pass
            fs_clear(self.plan, &self.options)

    def clip(self):
        """Clip the gradients in place."""
        with nogil:
            fs_clip(self.plan, &self.options)


    # ---- The short way ----

    def remember(self, list groups, clip_norm, nonfinite, num_threads, bint follows):
        """Take what is in these dictionaries, and the options, as what this plan was told last.

        `follows` says that some are schedules.
        """
        self.follows = follows
        self.seen_options = (clip_norm, nonfinite, num_threads)
        self.seen = [(group, tuple([part for item in group.items() for part in item])) for group in groups]

    def forget(self):
        """Take the long way next time."""
        self.seen = None

    def repeat(self, Lock lock, optimizer, grads, grad_scale, zero_grads, report_type):
        """Take a step if all is as at the last one but what the gradients hold and where they lie.

        Returns its report; None if there is more to look at, anything wrong, or the lock held: nothing has changed then.

        Parameters
        ----------
        optimizer : Optimizer
            Of whose attributes these are used: param_groups, clip_norm, nonfinite and num_threads, to be what `remember` was
            given; _spec, a tree as that of the gradients, with None for arrays; _follow_schedules, if there are any; and
            _new_stats, if updates make statistics.
        grads : object
            None for the bound gradients.
        report_type : type
            A named tuple.
        """
        if self.seen is None or not lock.acquire_at_once():
            return None
        try:
            return self.repeat_locked(optimizer, grads, grad_scale, zero_grads, report_type)
        finally:
            lock.release()

    cdef repeat_locked(self, optimizer, grads, grad_scale, zero_grads, report_type):
        cdef dict settings = optimizer.__dict__
        cdef fs_report report
        cdef PyArrayObject *param
        cdef size_t i
        cdef list leaves
        cdef bint moved = False, near = False, clears = zero_grads is True
        cdef double *rows = NULL
        if not self.has_seen(settings) or (not clears and zero_grads is not False):
            return None
        if type(grad_scale) is not float or <double>grad_scale != self.options.grad_scale:
            return None
        leaves = self.grads
        if leaves is None:
            return None
        spec = settings["_spec"]
        if grads is not None and not (spec is None and leaves[0] is grads):
            leaves = []
            if not gather(spec, grads, leaves):
                return None
        if self.follows:    # schedules, which may do anything: arrays are looked at afterwards
            seen = self.seen
            if not optimizer._follow_schedules():
                return None
            self.seen = seen    # nothing else has changed
        if self.find_bad(leaves, &moved, &near) >= 0 or near:
            return None
        if moved:
            self.bind(leaves)
        self.grads = leaves
        for i in range(self.plan.n_arrays):
            param = self.written[i * N_WRITTEN]
            if not PyArray_ISWRITEABLE(param) or not lies_at(&self.plan.arrays[i], FS_PARAM, param):
                return None
            if clears and not cnp.PyArray_ISWRITEABLE(self.grads[i]):
                return None
        for i in range(self.n_beside):
            if not PyArray_ISWRITEABLE(self.beside[i]):
                return None
        self.options.clear_grads = clears and self.grads_lie_apart()
        if self.plan.n_elements < N_SMALL:
            fs_measure(self.plan, &self.options, &report)
        else:
            with nogil:
                fs_measure(self.plan, &self.options, &report)
        if not report.is_finite:
            return None
        stats = None
        if self.plan.has_stats:
            stats = optimizer._new_stats()
            rows = rows_of(stats.rows)
        result = PyTuple_Type.tp_new(report_type, ((
            <long long>self.plan.step + 1, True, report.grad_norm if report.has_norm else None, report.clip_factor, {},
            stats,
        ),), NULL)
        if self.plan.n_elements < N_SMALL:
            self.finish(True, clears, rows)
        else:
            with nogil:
                self.finish(True, clears, rows)
        return result

    cdef bint has_seen(self, dict settings) except -1:
        cdef Py_ssize_t place, i, j
        cdef PyObject *key
        cdef PyObject *value
        cdef PyObject *seen
        groups = settings["param_groups"]
        if type(groups) is not list or len(<list>groups) != len(self.seen):
            return False
        if (settings["clip_norm"] is not self.seen_options[0] or settings["nonfinite"] is not self.seen_options[1] or
                settings["num_threads"] is not self.seen_options[2]):
            return False
        for i in range(len(self.seen)):
            group, items = <tuple>self.seen[i]
            if (<list>groups)[i] is not group or 2 * len(<dict>group) != len(<tuple>items):
                return False
            seen = <PyObject *>items
            place = j = 0
            while PyDict_Next(group, &place, &key, &value):
                if key != PyTuple_GET_ITEM(seen, j) or value != PyTuple_GET_ITEM(seen, j + 1):
                    return False
                j += 2
        return True


cdef double *rows_of(cnp.ndarray stats) noexcept:
    return <double *>PyArray_DATA(<PyArrayObject *>stats)


cdef double or_infinity(value):
    return INFINITY if value is None else value


fs_threads_get()    # watch for forks from now on
