"""Kernels and reference give the same bits: every rule, option, storage type, size, layout, CPU level, thread count."""

import ml_dtypes
import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, run, setting_id
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fusedstep as fs
from fusedstep import check, database

STEPS = 3


def compare(entry, settings, params, grads_of_steps, num_threads=None):
    """Run both backends on copies of the parameters with the same layout."""
    wanted, report = run(entry.optimizer, [p.copy() for p in params], grads_of_steps, **settings, backend="reference")
    found, c_report = run(entry.optimizer, [p.copy(order="K") for p in params], grads_of_steps, **settings,
                          num_threads=num_threads)  # fmt: skip
    assert_same_bits(found, wanted)
    assert_same_bits([np.array(c_report.grad_norm or 0.0)], [np.array(report.grad_norm or 0.0)])
    assert_same_bits([np.array(c_report.clip_factor)], [np.array(report.clip_factor)])
    assert c_report.nonfinite == report.nonfinite


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes(entry, settings, dtype, level, rng):
    shape = [*range(131), 1023, 1024, 1025, 2 * 1024 + 7]
    params = [rng.standard_normal(n).astype(dtype) for n in shape]
    grads = [[rng.standard_normal(n).astype(dtype) for n in shape] for _ in range(STEPS)]
    compare(entry, settings, params, grads)


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("options", database.OPTIONS, ids=setting_id)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_options_and_threads(entry, settings, options, num_threads, all_threads, rng):
    shape = [7001, 3, 0, 3000, 1]
    nonfinite = options.get("nonfinite", "raise")
    params = [rng.standard_normal(n).astype(np.float32) for n in shape]
    grads = [check.gradients(rng, shape, np.float32, nonfinite) for _ in range(STEPS)]
    compare(entry, {**settings, **options}, params, grads, num_threads)


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("options", [database.OPTIONS[0], database.OPTIONS[-1]], ids=setting_id)
@pytest.mark.parametrize("param_dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes(entry, settings, options, param_dtype, grad_dtype, level, rng):
    shape = [1, 70, 1500]
    params = [rng.standard_normal(n).astype(param_dtype) for n in shape]
    grads = [[rng.standard_normal(n).astype(grad_dtype) for n in shape] for _ in range(STEPS)]
    compare(entry, {**settings, **options}, params, grads)


def guarded(values, layout):
    """A view with these values in a larger room of guard values: (view, room)."""
    n_rows, n_cols = values.shape
    side = 3 * max(n_rows, n_cols) + 4
    room = np.full((side, side), 777, values.dtype)
    view = {
        "contiguous": lambda: room.reshape(-1)[5 : 5 + values.size].reshape(values.shape),
        "columns": lambda: room[:n_rows, 2 : 2 + n_cols],
        "transposed": lambda: room[:n_cols, :n_rows].T,
        "strided": lambda: room[1 : 1 + 3 * n_rows : 3, 2 : 2 + 2 * n_cols : 2],
        "reversed": lambda: room[n_rows:0:-1, 3 * n_cols : n_cols : -2][:, :n_cols],
        "unaligned": lambda: room.reshape(-1).view(np.uint8)[1 : 1 + values.nbytes].view(values.dtype).reshape(values.shape),
    }[layout]()
    assert view.shape == values.shape
    view[...] = values
    return view, room


LAYOUTS = ["contiguous", "columns", "transposed", "strided", "reversed", "unaligned"]


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_layouts_and_guards(layout, grad_layout, dtype, level, rng):
    for n_rows, n_cols in [(70, 4), (5, 300), (1, 1), (37, 41)]:
        values = rng.standard_normal((n_rows, n_cols)).astype(dtype)
        grads = rng.standard_normal((n_rows, n_cols)).astype(dtype)
        param, room = guarded(values, layout)
        grad, _ = guarded(grads, grad_layout)
        _, blank = guarded(np.full_like(values, 777), layout)
        plain = values.copy()
        for p, g in [(param, grad), (plain, grads)]:
            opt = fs.AdamW([p], lr=0.1, clip_norm=1.0)
            opt.step([g])
            opt.step([g])
        np.testing.assert_array_equal(param, plain)
        assert not np.array_equal(param, values)
        param[...] = 777
        np.testing.assert_array_equal(room, blank)


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
