"""Norms of units: adaptive gradient clipping and max-norm."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import STORAGE_SETTINGS, assert_same_bits, float64_in_jax, run, setting_id, snapshot
from test_bits import LAYOUTS, laid_out

import fusedstep as fs
from fusedstep.reference import stages, storage

BACKENDS = ["c", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

BUSY = {
    "clip_adaptive": 0.05, "max_norm": 3.0, "clip_norm": 2.0, "clip_value": 0.1, "weight_decay": 0.1, "l1": 0.01,
    "decay_mode": "decoupled_after", "maximize": True, "bounds": (-0.75, 1.0), "ema_decay": 0.9, "nonfinite": "zero",
}  # fmt: skip
UNITS = [
    {"clip_adaptive": 0.05},
    {"max_norm": 1.0},
    BUSY,
    {**BUSY, "stats": True, "unit_axes": 1},
    {**BUSY, "state_dtype": "int8", "unit_axes": ()},
]
LAYOUT_PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
LOW_PRECISION = [{"low_precision": way, "seed": 3} for way in ("stochastic", "kahan", "master")]


def values(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "settings"), STORAGE_SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(entry, settings, dtype, level, all_threads):
    """Any layout, thread count and level: the reference's bits in the view, and nothing changed around it."""
    for number, (shape, options) in enumerate(itertools.product([(70, 33), (3, 17)], UNITS)):
        if dtype in (np.float16, ml_dtypes.bfloat16) and "state_dtype" not in options:
            options = {**options, **LOW_PRECISION[(shape[0] + len(options)) % 3]}
        merged = {**settings, **options}
        start = values(*shape, dtype=dtype)
        grads = [values(*shape, seed=seed, dtype=dtype) for seed in (1, 2)]
        layout, grad_layout = LAYOUT_PAIRS[(number * 7 + len(settings) + 8 * DTYPES.index(dtype)) % len(LAYOUT_PAIRS)]
        twin, _ = laid_out(start, layout)  # random rounding belongs to places in memory
        wanted, wanted_report = run(entry.optimizer, [twin], [[g] for g in grads], **merged, backend="reference")
        param, room = laid_out(start, layout)
        placed = [laid_out(g, grad_layout) for g in grads]
        n_threads = 1 + len(layout) % 3
        found, report = run(entry.optimizer, [param], [[g] for g, _ in placed], **merged, num_threads=n_threads)
        assert_same_bits(found, wanted)
        assert report[:4] == wanted_report[:4]
        assert room.tobytes() == laid_out(wanted[0], layout)[1].tobytes()
        for (_, grad_room), g in zip(placed, grads):
            assert grad_room.tobytes() == laid_out(g, grad_layout)[1].tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2500,), (1, 7), (7, 1), (0, 3), (3, 0), (2, 3, 4), (5, 1, 1030), (2, 3, 4, 5),
                                   (2, 1, 3, 2, 2), (2, 2, 1, 3, 2, 2)])  # fmt: skip
@pytest.mark.parametrize("convention", ["torch", "keras", "optax", "tf"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes(shape, convention, order, rng):
    for options in ({"clip_adaptive": 0.05}, {"max_norm": 1.0}, {"clip_adaptive": 0.1, "max_norm": 0.5, "clip_norm": 1.0}):
        start, grad = rng.standard_normal(shape), rng.standard_normal(shape)
        found, wanted = start.copy(order=order), start.copy()
        fs.Adam(found, lr=0.1, convention=convention, **options).step(grad)
        fs.Adam(wanted, lr=0.1, convention=convention, backend="reference", **options).step(grad)
        np.testing.assert_array_equal(found, wanted)


def test_kernels(rng):
    for axes in (None, 0, 1, (0, 2), (-1, 0), (2, 0, 1), ()):
        p, g = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 3))
        q, other = np.asfortranarray(p), p.copy()
        for module, param in ((fs.kernels, p), (fs.kernels, q), (fs.reference, other)):
            module_axes = (axes,) if isinstance(axes, int) and module is fs.reference else axes
            module.sgd(param, g, step=1, lr=0.1, clip_adaptive=0.1, max_norm=1.0, unit_axes=module_axes)
        np.testing.assert_array_equal(p, other)
        np.testing.assert_array_equal(q, other)


# ---- What it is ---------------------------------------------------------------------------------------------------------


@backends
def test_by_hand(backend):
    w = np.array([[3.0, 4.0], [0.0, 0.0], [0.25, 0.0]])
    g = np.array([[0.0, 8.0], [2.0, 0.0], [0.0, 0.0625]])
    p = w.copy()
    fs.SGD(p, lr=1.0, clip_adaptive=0.5, backend=backend).step(g)
    np.testing.assert_array_equal(p, w - [[0, 2.5], [0.0005, 0], [0, 0.0625]])
    fs.SGD(p, lr=0.0, max_norm=1.0, backend=backend).step(g)
    row = np.array([3.0, 1.5])
    np.testing.assert_array_equal(p[0], row * (1 / np.sqrt(row @ row)))
    np.testing.assert_array_equal(p[1:], (w - [[0, 2.5], [0.0005, 0], [0, 0.0625]])[1:])


@backends
def test_order_of_stages(backend):
    """After the clipping of norms and before that of values; before bounds."""
    w, g = values(5, 4), 100 * values(5, 4, seed=1)
    p = w.copy()
    opt = fs.SGD(
        p, lr=1.0, clip_norm=10.0, clip_adaptive=0.5, clip_value=0.2, max_norm=1.0, bounds=(-0.4, 0.5), backend=backend
    )
    report = opt.step(g, grad_scale=2.0)
    factor = 10 / (np.linalg.norm(g / 2) + 1e-6)
    assert report.clip_factor == pytest.approx(factor, rel=1e-14)
    g = g / 2 * factor
    limit = 0.5 * np.linalg.norm(w, axis=1, keepdims=True)
    g *= np.minimum(1, limit / np.linalg.norm(g, axis=1, keepdims=True))
    w -= np.clip(g, -0.2, 0.2)
    w *= np.minimum(1, 1 / np.linalg.norm(w, axis=1, keepdims=True))
    np.testing.assert_allclose(p, np.clip(w, -0.4, 0.5), rtol=1e-13)


@backends
@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (6, 5), (4, 3, 2), (2, 3, 4, 5), (2, 2, 3, 4, 2)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_optax(backend, shape, axis):
    """The same but for sums in another order: to 1e-14 of the largest parameter."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    if axis is not None and len(shape) < 2:
        return
    with float64_in_jax():
        w = np.asarray(values(*shape) * (1.0 if shape == () else np.geomspace(1e-6, 1, shape[-1])))
        ours, theirs = w.copy(), jax.numpy.array(w)
        counting = None if axis is None else tuple(a for a in range(len(shape)) if a != axis % len(shape))
        opt = fs.Adam(ours, lr=0.1, clip_adaptive=0.03, unit_axes=counting, convention="optax", backend=backend)
        transform = optax.chain(optax.adaptive_grad_clip(0.03, axis=axis), optax.adam(0.1))
        state = transform.init(theirs)
        for seed in range(5):
            g = values(*shape, seed=seed + 1)
            opt.step(g)
            updates, state = transform.update(jax.numpy.array(g), state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14 * np.abs(ours).max())


@backends
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
def test_keras(backend, shape, keras):
    """Its constraint divides by ``norm + 1e-7``."""
    constraint = keras.constraints.MaxNorm(0.5, axis=tuple(range(len(shape) - 1)))
    w, g = values(*shape), values(*shape, seed=1)
    p = w.copy()
    fs.SGD(p, lr=0.1, max_norm=0.5, convention="keras", backend=backend).step(g)
    np.testing.assert_allclose(p, np.asarray(constraint(w - 0.1 * g)), rtol=3e-7)
    norms = np.sqrt((p**2).sum(tuple(range(len(shape) - 1))))
    np.testing.assert_allclose(norms, 0.5, rtol=1e-15)


@backends
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_torch(backend, shape, axis):
    """renorm divides by ``norm + 1e-7``."""
    torch = pytest.importorskip("torch")
    w, g = values(*shape), values(*shape, seed=1)
    p = w.copy()
    fs.SGD(p, lr=0.1, max_norm=1.5, unit_axes=axis, backend=backend).step(g)
    wanted = torch.renorm(torch.from_numpy(w - 0.1 * g), 2, axis, 1.5)
    np.testing.assert_allclose(p, wanted.numpy(), rtol=3e-7)


@backends
@pytest.mark.parametrize("scale", [1e300, 1e150, 1e-160, 1e-300])
def test_magnitudes(backend, scale):
    """Norms of which the squares do not fit in a double."""
    w, g = values(3, 2000), values(3, 2000, seed=1)
    p = np.zeros_like(w)
    fs.SGD(p, lr=1.0, clip_adaptive=2.0, backend=backend).step(g * scale)
    limit = 2 * 1e-3 / np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(p, -g * np.minimum(scale, limit), rtol=1e-13)
    p = w * scale
    fs.SGD(p, lr=0.0, max_norm=scale, backend=backend).step(g)
    np.testing.assert_allclose(p / scale, w / np.linalg.norm(w, axis=1, keepdims=True), rtol=1e-13)


@backends
def test_tiny_limits(backend):
    """A gradient's norm below 1e-6 counts as that; a parameter's does not."""
    p = np.array([[1.0, 1.0]])
    fs.SGD(p, lr=1.0, clip_adaptive=1e-8, backend=backend).step(np.array([[3e-7, 4e-7]]))
    np.testing.assert_allclose(1 - p, np.array([[3e-7, 4e-7]]) * np.sqrt(2) * 1e-2, rtol=1e-6)
    p = np.array([[3e-7, 4e-7]])
    fs.SGD(p, lr=0.0, max_norm=1e-8, backend=backend).step(np.zeros((1, 2)))
    np.testing.assert_allclose(p, [[6e-9, 8e-9]], rtol=1e-15)


@backends
def test_what_is_not_finite_concerns_its_unit(backend):
    w, g = np.ones((4, 3)), np.ones((4, 3))
    g[1, 0], g[2, 1], w[3, 2] = np.nan, np.inf, np.nan
    opt = fs.SGD(w, lr=0.5, clip_adaptive=0.5, max_norm=1.0, nonfinite="propagate", backend=backend)
    opt.step(g)
    np.testing.assert_array_equal(np.isnan(w).any(axis=1), [False, True, True, True])
    assert np.linalg.norm(w[0]) == pytest.approx(1.0)


# ---- Groups, schedules, state -------------------------------------------------------------------------------------------


@backends
def test_groups_and_schedules(backend):
    w, v, b = values(4, 3), values(4, 3), values(5)
    twins = [a.copy() for a in (w, v, b)]
    groups = [{"params": {"w": w}, "max_norm": 0.5, "unit_axes": -1}, {"params": {"v": v, "b": b}}]
    opt = fs.Adam(groups, lr=0.1, clip_adaptive=lambda step: 0.1 / (1 + step) if step < 2 else None, backend=backend)
    plain = [fs.Adam(twins[0], lr=0.1), fs.Adam(twins[1], lr=0.1), fs.Adam(twins[2], lr=0.1)]
    for step in range(4):
        clip = 0.1 / (1 + step) if step < 2 else None
        for own, twin in zip(plain, twins):
            own.param_groups[0]["clip_adaptive"] = clip
            if twin is twins[0]:
                own.param_groups[0].update(max_norm=0.5, unit_axes=(1,))
        grads = values(4, 3, seed=step), values(4, 3, seed=9 + step), values(5, seed=step)
        opt.step([{"w": grads[0]}, {"v": grads[1], "b": grads[2]}])
        for own, g in zip(plain, grads):
            own.step(g)
        for found, wanted in zip((w, v, b), twins):
            np.testing.assert_array_equal(found, wanted)


@backends
def test_int8_state_stays_when_the_option_comes_and_goes(backend):
    p, q = values(40, 30, dtype=np.float32), values(40, 30, dtype=np.float32)
    opt, plain = (fs.Adam(a, state_dtype="int8", convention="keras", backend=backend) for a in (p, q))
    for step in range(4):
        opt.param_groups[0]["max_norm"] = 1e9 if step in (1, 2) else None
        for o in (opt, plain):
            o.step(values(40, 30, seed=step, dtype=np.float32))
        np.testing.assert_array_equal(p, q)


def test_checkpoint(tmp_path):
    pytest.importorskip("safetensors")
    p, q = values(4, 3, 2), values(4, 3, 2, seed=5)
    opt = fs.Adam(p, clip_adaptive=0.1, max_norm=1.0, unit_axes=(2, 0))
    opt.step(values(4, 3, 2, seed=1))
    fs.save(tmp_path / "x.safetensors", opt)
    resumed = fs.Adam(q)
    fs.load(tmp_path / "x.safetensors", resumed)
    for o in (opt, resumed):
        o.step(values(4, 3, 2, seed=2))
    np.testing.assert_array_equal(p, q)


# ---- Refusals -----------------------------------------------------------------------------------------------------------

AXES = [
    (2, "unit_axes: expected different axes of params['w'], which has 2 dimensions, got (2,)"),
    (-3, "unit_axes: expected different axes of params['w'], which has 2 dimensions, got (-3,)"),
    ((0, -2), "unit_axes: expected different axes of params['w'], which has 2 dimensions, got (0, -2)"),
]


@backends
@pytest.mark.parametrize(("axes", "message"), AXES, ids=[str(axes) for axes, _ in AXES])
def test_axes(backend, axes, message):
    w, b = values(3, 4), values(3)
    with pytest.raises(ValueError, match="^") as caught:
        fs.SGD({"b": b, "w": w}, max_norm=1.0, unit_axes=axes, backend=backend)
    assert str(caught.value) == message
    opt = fs.SGD(
        [{"params": {"b": b}}, {"params": {"w": w}, "unit_axes": axes}], backend=backend
    )  # of which nothing is made
    opt.step([{"b": b.copy()}, {"w": w.copy()}])
    before = snapshot(opt)
    opt.param_groups[1]["clip_adaptive"] = 0.1
    with pytest.raises(ValueError, match="^") as caught:
        opt.step([{"b": b.copy()}, {"w": w.copy()}])
    assert str(caught.value) == "param_groups[1]." + message
    assert snapshot(opt) == before


def test_kernels_refuse_axes():
    for module in (fs.kernels, fs.reference):
        with pytest.raises(
            ValueError, match=r"^unit_axes: expected different axes of param, which has 2 dimensions, got \(2,\)$"
        ):
            module.sgd(values(3, 4), values(3, 4), step=1, max_norm=1.0, unit_axes=(2,))


# ---- Gradients alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_adaptive_grad_clip(dtype, layout):
    """Just what a step subtracts."""
    for shape, options in itertools.product([(70, 33), (3, 40)], [{}, {"convention": "keras"}, {"unit_axes": ()}]):
        w, g = values(*shape, dtype=dtype), values(*shape, seed=1, dtype=dtype)
        own, room = laid_out(g, layout)
        before = w.copy()
        norm = fs.adaptive_grad_clip([own], [w], 0.05, **options)
        assert norm == fs.global_norm(g)
        np.testing.assert_array_equal(w, before)
        wanted = np.zeros(shape, storage.compute_dtype(w.dtype))
        axes = stages.axes_of_units(shape, options.get("unit_axes"), options.get("convention", "torch"))
        flat = [a.astype(wanted.dtype).reshape(-1) for a in (w, g)]
        wanted = (flat[1] * stages.adaptive_factors(*flat, 0.05, 1.0, shape, axes)).reshape(shape).astype(dtype)
        assert_same_bits([own], [wanted])
        assert room.tobytes() == laid_out(wanted, layout)[1].tobytes()


def test_adaptive_grad_clip_of_optax():
    optax = pytest.importorskip("optax")
    with float64_in_jax():
        params, grads = {"w": values(6, 5), "b": values(5)}, {"w": values(6, 5, seed=1), "b": values(5, seed=1)}
        transform = optax.adaptive_grad_clip(0.1)
        wanted, _ = transform.update(grads, transform.init(params), params)
        fs.adaptive_grad_clip(grads, params, 0.1, convention="optax")
        for name, g in grads.items():
            np.testing.assert_allclose(g, wanted[name], rtol=1e-14)


W, NAN = np.ones((2, 3)), np.full((2, 3), np.nan)
SINGLE = np.ones((2, 3), np.float32)
REFUSED = [
    ((np.ones((2, 3)), W, -1), {}, ValueError, "clipping: expected a finite number > 0, got -1"),
    ((np.ones((2, 2)), W, 1), {}, ValueError, "grads['0']: expected shape (2, 3), got (2, 2)"),
    ((W, W, 1), {}, ValueError, "grads['0'] and params['0']: expected separate arrays, got arrays that share memory"),
    ((np.ones((2, 3)), SINGLE, 1), {}, TypeError, "grads['0']: expected a dtype computed in float32 as its parameter's, got float64"),
    (([np.ones(2)], [np.ones(2), np.ones(2)], 1), {}, ValueError, "grads: expected 2 arrays, got 1"),
    ((np.ones((2, 3)), W, 1), {"unit_axes": 5}, ValueError, "unit_axes: expected different axes of params['0'], which has 2 dimensions, got (5,)"),
    ((np.ones((2, 3)), W, 1), {"convention": "x"}, ValueError,
     "convention: expected one of 'torch', 'keras', 'optax', 'tf', 'sklearn', 'thinc', got 'x'"),
    ((NAN, W, 1), {}, fs.NonFiniteGradientError, "expected finite gradients, got inf or nan in grads['0'] (6 elements)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), REFUSED, ids=[message[:50] for *_, message in REFUSED]
)
def test_adaptive_grad_clip_refuses(arguments, options, error, message):
    with pytest.raises(error) as caught:
        fs.adaptive_grad_clip(*arguments, **options)
    assert str(caught.value) == message
    np.testing.assert_array_equal(W, 1)
