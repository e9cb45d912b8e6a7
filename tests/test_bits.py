"""Kernels and reference give the same bits: every rule, option, storage type, size, layout, CPU level, thread count."""

import copy
import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import LEVELS, SETTINGS, STORAGE_SETTINGS, assert_same_bits, run, setting_id
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fusedstep as fs
from fusedstep import _core, check, database

STEPS = 3


def compare(entry, settings, params, grads_of_steps, num_threads=None):
    """Run both backends on copies of the parameters, which keep their layout: random rounding follows it."""
    wanted, report = run(entry.optimizer, [p.copy(order="K") for p in params], grads_of_steps, **settings,
                         backend="reference")  # fmt: skip
    found, c_report = run(entry.optimizer, [p.copy(order="K") for p in params], grads_of_steps, **settings,
                          num_threads=num_threads)  # fmt: skip
    assert_same_bits(found, wanted)
    assert_same_bits([np.array(c_report.grad_norm or 0.0)], [np.array(report.grad_norm or 0.0)])
    assert_same_bits([np.array(c_report.clip_factor)], [np.array(report.clip_factor)])
    assert c_report.nonfinite == report.nonfinite
    assert (c_report.stats is None) == (report.stats is None)
    if report.stats is not None:
        assert_same_bits([c_report.stats.rows], [report.stats.rows])


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes(entry, settings, dtype, level, rng):
    shape = [*range(131), 1023, 1024, 1025, 2 * 1024 + 7]
    params = [rng.standard_normal(n).astype(dtype) for n in shape]
    grads = [[rng.standard_normal(n).astype(dtype) for n in shape] for _ in range(STEPS)]
    compare(entry, settings, params, grads)


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_steps(entry, settings, dtype, level, rng):
    """Some rules go on otherwise after some steps."""
    params = [rng.standard_normal(100).astype(dtype)]
    grads = [[rng.standard_normal(100).astype(dtype)] for _ in range(30)]
    compare(entry, settings, params, grads)


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_both_sides_know_which_rules_are_scaled(entry, settings):
    kernel = entry.optimizer(np.ones((1, 1)), **settings)._kernels[0]
    assert (kernel.name in _core.MEASURED_RULES) == entry.optimizer._is_scaled


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("options", database.OPTIONS, ids=setting_id)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_options_and_threads(entry, settings, options, num_threads, all_threads, rng):
    shape = [7001, 3, 0, 3000, 1]
    nonfinite = options.get("nonfinite", "raise")
    params = [rng.standard_normal(n).astype(np.float32) for n in shape]
    grads = [check.gradients(rng, shape, np.float32, nonfinite) for _ in range(STEPS)]
    compare(entry, {**settings, **options}, params, grads, num_threads)


@pytest.mark.parametrize(("entry", "settings"), STORAGE_SETTINGS, ids=setting_id)
@pytest.mark.parametrize("options", [database.OPTIONS[0], database.OPTIONS[-1]], ids=setting_id)
@pytest.mark.parametrize("param_dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes(entry, settings, options, param_dtype, grad_dtype, level, rng):
    shape = [1, 70, 1500]
    params = [rng.standard_normal(n).astype(param_dtype) for n in shape]
    grads = [[rng.standard_normal(n).astype(grad_dtype) for n in shape] for _ in range(STEPS)]
    compare(entry, {**settings, **options}, params, grads)


HALVES = [(dtype, o) for dtype in (np.float16, ml_dtypes.bfloat16) for o in database.low_precision_options(dtype)]


@pytest.mark.parametrize(("entry", "settings"), STORAGE_SETTINGS, ids=setting_id)
@pytest.mark.parametrize(("dtype", "options"), HALVES, ids=setting_id)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_low_precision(entry, settings, dtype, options, num_threads, level, all_threads, rng):
    params = [rng.standard_normal(n).astype(dtype) for n in (0, 1, 70, 5000)] + [
        rng.standard_normal((30, 70)).astype(dtype).T
    ]
    grads = [[rng.standard_normal(p.shape).astype(dtype) for p in params] for _ in range(STEPS)]
    compare(entry, {**settings, **options}, params, grads, num_threads)


# ---- Layouts ----

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
GUARD = 777

# Views of (n, m) elements in a room of at least (3 n + 4, 3 m + 4) and as much the other way round.
LAYOUTS = {
    "contiguous": lambda room, n, m: room.reshape(-1)[5 : 5 + n * m].reshape(n, m),
    "Fortran order": lambda room, n, m: room.reshape(-1)[5 : 5 + n * m].reshape(m, n).T,
    "columns": lambda room, n, m: room[:n, 2 : 2 + m],
    "transposed columns": lambda room, n, m: room[2 : 2 + m, :n].T,
    "strided": lambda room, n, m: room[1 : 1 + 3 * n : 3, 2 : 2 + 2 * m : 2],
    "reversed": lambda room, n, m: room[n:0:-1, 3 * m : m : -2][:, :m],
    "one backwards": lambda room, n, m: room.reshape(-1)[5 : 5 + n * m].reshape(n, m)[:, ::-1],
    "unaligned": lambda room, n, m: room.view(np.uint8).reshape(-1)[1:][: n * m * room.itemsize].view(room.dtype).reshape(n, m),
}  # fmt: skip
GRAD_LAYOUTS = [*LAYOUTS, "broadcast rows", "broadcast columns"]


def laid_out(values, layout):
    """These values in a room of guard values: (view, room)."""
    side = 3 * max(values.shape) + 4
    room = np.full((side, side), GUARD, values.dtype)
    view = LAYOUTS[layout](room, *values.shape)
    assert view.shape == values.shape
    view[...] = values
    return view, room


def as_gradient(values, layout):
    """Values that are the same along one dimension, as that layout has them; else (view, room) as above."""
    if layout == "broadcast rows":
        return np.broadcast_to(values[0], values.shape), None
    if layout == "broadcast columns":
        return np.broadcast_to(values[:, :1], values.shape), None
    return laid_out(values, layout)


def broadcastable(values, layout):
    """What a gradient of this layout can hold."""
    repeated = {"broadcast rows": values[:1], "broadcast columns": values[:, :1]}.get(layout, values)
    return np.broadcast_to(repeated, values.shape)


def combinations():
    """Of layouts; every other one with all options on."""
    pairs = itertools.product(LAYOUTS, GRAD_LAYOUTS)
    return [(layout, grad_layout, i % 3 == 0) for i, (layout, grad_layout) in enumerate(pairs)]


def test_number_of_combinations():
    assert len(combinations()) * len(DTYPES) * len(STORAGE_SETTINGS) * 2 >= 5000  # on each level, of two shapes


@pytest.mark.parametrize(("entry", "settings"), STORAGE_SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 33), (3, 17)])
def test_layouts(entry, settings, dtype, shape, rng):
    """Every pair of layouts on every level: the reference's bits in the view, and not one byte changed around it."""
    before = _core.get_level()
    start = rng.standard_normal(shape).astype(dtype)
    values = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
    wanted = {}
    try:
        for level, (layout, grad_layout, busy) in itertools.product(LEVELS, combinations()):
            _core.set_level(level)
            options = {**settings, **(database.OPTIONS[-1] if busy else {})}
            key = grad_layout if grad_layout.startswith("broadcast") else "any", busy
            if key not in wanted:
                grads = [[broadcastable(v, grad_layout)] for v in values]
                wanted[key], _ = run(entry.optimizer, [start.copy()], grads, **options, backend="reference")
            param, room = laid_out(start, layout)
            grads, grad_rooms = zip(*(as_gradient(v, grad_layout) for v in values))
            grad_rooms_before = copy.deepcopy(grad_rooms)
            found, _ = run(entry.optimizer, [param], [[g] for g in grads], **options)
            assert_same_bits(found, wanted[key])
            _, wanted_room = laid_out(wanted[key][0], layout)
            assert room.tobytes() == wanted_room.tobytes(), f"outside the view: {layout}, {grad_layout}, {level}"
            for got, kept in zip(grad_rooms, grad_rooms_before):
                assert got is None or got.tobytes() == kept.tobytes()
    finally:
        _core.set_level(before)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_values(data):
    """Special values and shapes, through every stage: inf, nan, -0.0, subnormals, 0-d and empty arrays."""
    entry, settings = data.draw(st.sampled_from(SETTINGS))
    options = data.draw(st.sampled_from(database.OPTIONS))
    shapes = data.draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    elements = FLOATS if dtype == np.float32 else st.floats()
    policy = options.get("nonfinite", data.draw(st.sampled_from(["zero", "propagate"])))
    params = [data.draw(hnp.arrays(dtype, shape, elements=elements)) for shape in shapes]
    grads = [[data.draw(hnp.arrays(dtype, shape, elements=elements)) for shape in shapes] for _ in range(2)]
    compare(entry, {**settings, **options, "nonfinite": policy}, params, grads)


@hypothesis_settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_view(data):
    """Any basic-slice view of any array, parameter and gradient laid out alike or not."""
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9))
    base = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False))
    param = base[index] if isinstance(base[index], np.ndarray) else base[..., :1]
    param = np.transpose(param, data.draw(st.permutations(range(param.ndim))))
    before = base.copy()
    grad = np.linspace(-1, 1, param.size, dtype=np.float32).reshape(param.shape)
    wanted = param.copy()
    fs.Adam([param], lr=0.1).step([grad])
    fs.Adam([wanted], lr=0.1, backend="reference").step([grad])
    np.testing.assert_array_equal(param, wanted)
    inside = np.zeros(shape, bool)
    view = inside[index] if isinstance(inside[index], np.ndarray) else inside[..., :1]
    view[...] = True
    np.testing.assert_array_equal(base[~inside], before[~inside])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_norms(dtype, num_threads, level, all_threads, rng):
    """The same bits for any thread count, level and layout, which are the reference's."""
    shape = [100_003, 0, 1, 1023, 40_000]
    grads = [rng.standard_normal(n).astype(dtype) for n in shape]
    wanted = fs.Adam([g.copy() for g in grads], backend="reference").step(grads).grad_norm
    with fs.threads(num_threads):
        assert fs.global_norm(grads) == wanted
        assert fs.global_norm([check.lay_out(g, layout) for layout, g in enumerate(grads)]) == wanted
