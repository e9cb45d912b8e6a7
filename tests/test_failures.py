"""What goes wrong elsewhere must not here: failures reproduced in other libraries, and all-or-nothing in general."""

import math
import pickle

import ml_dtypes
import numpy as np
import pytest
from conftest import SETTINGS, setting_id, snapshot

import fusedstep as fs

BACKENDS = ["c", "reference"]


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_strided_view_of_a_larger_array(entry, settings, level, rng):
    """PyTorch's fused kernels leave half the rows out and overwrite 8 elements that are not the view's."""
    base = rng.standard_normal((16, 8)).astype(np.float32)
    before = base.copy()
    plain = base[:, :4].copy()
    grad = rng.standard_normal((16, 4)).astype(np.float32)
    entry.optimizer([base[:, :4]], **settings).step([grad])
    entry.optimizer([plain], **settings).step([grad])
    np.testing.assert_array_equal(base[:, :4], plain)
    np.testing.assert_array_equal(base[:, 4:], before[:, 4:])
    assert (base[:, :4] != before[:, :4]).all()


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_transposed_parameter_with_c_order_gradient(entry, settings, level, rng):
    """PyTorch's fused kernels pair elements by position in memory."""
    base = rng.standard_normal((7, 33)).astype(np.float32)
    plain = base.T.copy()
    grad = rng.standard_normal((33, 7)).astype(np.float32)
    entry.optimizer([base.T], **settings).step([grad])
    entry.optimizer([plain], **settings).step([grad])
    np.testing.assert_array_equal(base.T, plain)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 70, 1000, 1025])
def test_half_precision_updates_every_element(dtype, size, level):
    """PyTorch's fused SGD skips whole SIMD blocks: 64 of 70 elements."""
    for momentum in (0.0, 0.9):
        p = np.zeros(size, dtype)
        fs.SGD([p], lr=1.0, momentum=momentum).step([np.ones(size, dtype)])
        assert (p == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_first_step_leaves_valid_state(backend):
    """PyTorch's fused momentum buffer stays uninitialised memory if the first step is skipped."""
    p, q = np.ones(100), np.ones(100)
    opt = fs.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, nonfinite="skip", backend=backend)
    report = opt.step([np.full(100, np.nan)])
    assert not report.applied
    assert report.step == 0
    assert report.nonfinite == {"0": 100}
    assert not opt.state["0"]["momentum_buffer"].any()
    other = fs.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    for _ in range(3):
        opt.step([np.ones(100)])
        other.step([np.ones(100)])
    np.testing.assert_array_equal(p, q)


def test_swapped_names_do_not_load():
    """PyTorch loads by position: swapped parameters go silently into each other."""
    opt = fs.Adam({"a": np.ones(3), "b": np.ones(3)})
    opt.step({"a": np.full(3, 1.0), "b": np.full(3, 2.0)})
    swapped = fs.Adam({"b": np.ones(3), "a": np.ones(3)})
    with pytest.raises(ValueError, match="expected the names"):
        swapped.load_state_dict(opt.state_dict())
    swapped.load_state_dict(opt.state_dict(), strict=False)
    for name in "ab":
        np.testing.assert_array_equal(swapped.state[name]["exp_avg"], opt.state[name]["exp_avg"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float32, 1e30), (np.float64, 1e300), (np.float64, 1e-300), (np.float32, 1e-40)]
)
def test_norm_of_finite_gradients_of_any_size(dtype, size, backend):
    """PyTorch's norm of float32 gradients of 1e30 is inf, and clipping turns all gradients to 0."""
    g = [np.full(3, size, dtype), np.full((2, 3), size, dtype), np.zeros(2, dtype)]
    wanted = float(g[0][0]) * 3.0
    report = fs.SGD([np.zeros_like(a) for a in g], clip_norm=1.0, backend=backend).step(g)
    assert report.grad_norm == pytest.approx(wanted, rel=1e-15)
    assert fs.global_norm(g) == report.grad_norm
    assert fs.clip_by_global_norm(g, 1.0) == report.grad_norm
    clipped = math.sqrt(sum(float(np.sum(a.astype(np.float64) ** 2)) for a in g))
    assert clipped == pytest.approx(min(1.0, wanted), rel=1e-6, abs=1e-200)


def test_mixed_magnitudes():
    g = [np.full(4, 1e300), np.full(4, 1e-300), np.zeros(4), np.full(4, 1e-310)]
    assert fs.global_norm(g) == pytest.approx(2e300, rel=1e-15)
    assert fs.global_norm(g[1:]) == pytest.approx(2e-300, rel=1e-15)
    assert fs.global_norm(g[2:3]) == 0.0
    # A norm beyond the largest double still clips finite gradients to finite, non-zero ones.
    huge = [np.full(100, 1.7e308)]
    fs.clip_by_global_norm(huge, 1.0)
    np.testing.assert_allclose(huge[0], 0.1, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 1e160, 1e300, 1e-160, 1e-300])
@pytest.mark.parametrize("limit", [1e-200, 0.25, 1e200])
def test_both_norm_clips_at_any_size(backend, size, limit):
    """The factor of an array can be so small that its square is 0."""
    params = [np.zeros(3), np.zeros(5), np.zeros(1)]
    grads = [np.full(p.size, size * (i + 1)) for i, p in enumerate(params)]
    own = [min(1.0, limit / (fs.global_norm(g) + 1e-6)) for g in grads]
    clipped = [np.full(g.size, f * g[0]) for f, g in zip(own, grads)]
    everywhere = min(1.0, 0.5 * limit / (fs.global_norm(clipped) + 1e-6))
    fs.SGD(params, lr=1.0, clip_norm_per_array=limit, clip_norm=0.5 * limit, backend=backend).step(grads)
    for p, c in zip(params, clipped):
        np.testing.assert_allclose(-p, c * everywhere, rtol=1e-13)


SCALED = [case for case in SETTINGS if case[0].optimizer._is_scaled]


@pytest.mark.parametrize(("entry", "settings"), SCALED, ids=setting_id)
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(np.float32, size) for size in (1e-45, 1e-40, 1e-20, 1e20, 1e30)]
    + [(np.float64, size) for size in (5e-324, 1e-310, 1e-160, 1e160, 1e300)],
)
def test_whole_arrays_stay_finite(entry, settings, shape, dtype, size):
    """Where steps depend on norms or means, one extreme element, as finite as it is, could take all others along."""
    found = []
    for backend in BACKENDS:
        param = np.ones(shape, dtype)
        opt = entry.optimizer([param], backend=backend, **settings)
        extreme = np.resize(np.array([size, -size, 0.5 * size], dtype), shape)
        for g in (extreme, 0.5 * extreme, np.full(shape, 0.1, dtype), -extreme, np.full(shape, 0.1, dtype)):
            opt.step([g])
        assert np.isfinite(param).all()
        found.append(param)
    np.testing.assert_array_equal(*found)


def test_norm_of_many_float32_values(rng):
    """PyTorch's is off by 3.1e-5 for 2 million values, NumPy's by 3.6e-6."""
    g = rng.standard_normal(2_000_000).astype(np.float32)
    exact = math.sqrt(math.fsum((g.astype(np.float64) ** 2).tolist()))
    assert fs.global_norm(g) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_parameters_move(backend):
    """Keras' Adam never moves them: 0.999 rounds to 1."""
    p = np.ones(4, ml_dtypes.bfloat16)
    opt = fs.Adam([p], lr=0.1, backend=backend)
    opt.step([np.ones(4, ml_dtypes.bfloat16)])
    assert (p < 1).all()
    assert opt.state["0"]["exp_avg"].dtype == np.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays_float64(backend):
    """Thinc raises; DeepSpeed has no float64."""
    p = np.ones(3)
    fs.Adam([p], lr=1e-12, backend=backend).step([np.ones(3)])
    assert 0 < 1 - p[0] < 2e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_centered_rmsprop_with_negative_variance(backend):
    """Rounding makes v - m^2 negative; PyTorch's step is nan then."""
    p = np.zeros(1000, np.float32)
    opt = fs.RMSprop([p], lr=1e-3, alpha=0.5, centered=True, eps=1e-3, backend=backend)
    g = np.random.default_rng(0).uniform(0.1, 10, 1000).astype(np.float32)
    negative = False
    for _ in range(40):  # constant gradients: the variance goes to 0
        opt.step([g])
        own = opt.state["0"]
        negative = negative or bool((own["square_avg"] - own["grad_avg"] ** 2 < 0).any())
    assert negative, "the case was not reached"
    assert np.isfinite(p).all()


# ---- All or nothing ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_last_of_many(entry, settings, backend, bad, rng):
    params = {f"p{i}": rng.standard_normal(40) for i in range(30)}
    opt = entry.optimizer(params, **settings, backend=backend)
    grads = {name: rng.standard_normal(40) for name in params}
    opt.step(grads)
    grads["p29"][39] = bad
    grads["p3"][:2] = bad
    before = snapshot(opt, *grads.values())
    with pytest.raises(fs.NonFiniteGradientError) as caught:
        opt.step(grads)
    assert isinstance(caught.value, ArithmeticError)
    assert caught.value.names == ("p3", "p29")
    assert str(caught.value) == (
        "expected finite gradients, got inf or nan in grads['p3'] (2 elements), grads['p29'] (1 elements)"
    )
    assert snapshot(opt, *grads.values()) == before

    opt.nonfinite = "skip"
    report = opt.step(grads)
    assert not report.applied
    assert report.nonfinite == {"p3": 2, "p29": 1}
    assert snapshot(opt, *grads.values()) == before

    opt.nonfinite = "zero"
    zeroed = {name: np.where(np.isfinite(g), g, 0) for name, g in grads.items()}
    twin = entry.optimizer({name: p.copy() for name, p in params.items()}, **settings, backend=backend)
    twin.load_state_dict(opt.state_dict())
    report = opt.step(grads)
    assert report.nonfinite == {"p3": 2, "p29": 1}
    assert twin.step(zeroed).grad_norm == report.grad_norm
    assert snapshot(opt) == snapshot(twin)

    opt.nonfinite = "propagate"
    opt.step(grads)
    twin.step(zeroed)
    assert snapshot(opt) != snapshot(twin)
    if np.isnan(bad):  # the sign of inf is finite, and some rules want no more
        assert np.isnan(params["p29"][39])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_overflows_on_the_way(backend):
    """Finite in float64, or before division by grad_scale, but not in the compute type."""
    p = np.ones(3, np.float32)
    opt = fs.SGD([p], backend=backend)
    with pytest.raises(fs.NonFiniteGradientError):
        opt.step([np.array([0.0, 1e39, 0.0])])
    with pytest.raises(fs.NonFiniteGradientError):
        opt.step([np.array([0.0, 1e30, 0.0], np.float32)], grad_scale=1e-20)
    assert (p == 1).all()


def test_wrong_gradient_last_of_a_thousand():
    params = [np.ones(5, np.float32) for _ in range(1000)]
    opt = fs.AdamW(params)
    before = snapshot(opt)
    grads = [np.ones(5, np.float32) for _ in range(999)]
    for last in (np.ones(6, np.float32), np.ones(5, int), None, params[0]):
        with pytest.raises((TypeError, ValueError), match=r"grads\['999'\]"):
            opt.step([*grads, last])
        assert snapshot(opt) == before


def test_clip_refuses_nonfinite_and_changes_nothing():
    for clip in (fs.clip_by_global_norm, fs.clip_by_norm):
        g = [np.array([3.0, 4.0]), np.array([np.inf])]
        with pytest.raises(fs.NonFiniteGradientError, match=r"grads\['1'\] \(1 elements\)"):
            clip(g, 1.0)
        assert g[0][0] == 3.0
    assert math.isnan(fs.global_norm([np.array([np.nan, np.inf])]))
    assert fs.global_norm([np.array([np.inf])]) == math.inf


# ---- Stages, as separate steps in NumPy ----


def test_stages_are_separate_steps(rng):
    """Unscale, negate, clip by array norm, by global norm, by value, decay, L1: in this order."""
    real = np.float32
    p = [rng.standard_normal(n).astype(real) for n in (50, 7)]
    g = [rng.standard_normal(n).astype(real) for n in (50, 7)]
    q = [a.copy() for a in p]
    opt = fs.SGD(p, lr=0.5, maximize=True, clip_norm_per_array=1.0, clip_norm=0.5, clip_value=0.1, weight_decay=0.2, l1=0.3)
    opt.step(g, grad_scale=3.0)
    unscaled = [a / real(3) for a in g]
    own = [min(1.0, 1.0 / (fs.global_norm(a) + 1e-6)) for a in unscaled]
    total = math.sqrt(sum((fs.global_norm(a) * f) ** 2 for a, f in zip(unscaled, own)))
    everywhere = min(1.0, 0.5 / (total + 1e-6))
    for a, b, f, found in zip(q, unscaled, own, p):
        d = np.clip(-b * real(f * everywhere), real(-0.1), real(0.1)) + real(0.2) * a
        d = d + real(0.3) * np.sign(a)
        np.testing.assert_array_equal(found, a - real(0.5) * d)


def test_decoupled_decay_and_l1_on_any_rule(rng):
    for optimizer in (fs.SGD, fs.Adagrad, fs.Adadelta, fs.RMSprop, fs.Adam):
        p = np.ones(5)
        optimizer([p], lr=0.5, weight_decay=0.5, decoupled_weight_decay=True).step([np.zeros(5)])
        np.testing.assert_array_equal(p, 0.75)
        p = np.ones(5)
        optimizer([p], lr=0.125, weight_decay=0.5, decay_mode="independent").step([np.zeros(5)])
        np.testing.assert_array_equal(p, 0.5)
        p = np.array([1.0, -1.0, 0.0])
        optimizer([p], lr=0.25, l1=1.0).step([np.zeros(3)])
        assert p[0] < 1
        assert p[1] > -1
        assert p[2] == 0


@pytest.mark.parametrize("clip", [fs.clip_by_global_norm, fs.clip_by_norm, fs.clip_by_value])
def test_clip_functions_on_views(clip, level, rng):
    base = rng.standard_normal((40, 6))
    before, plain = base.copy(), base[::2, ::-2].copy()
    clip([base[::2, ::-2]], 0.5)
    clip([plain], 0.5)
    np.testing.assert_array_equal(base[::2, ::-2], plain)
    np.testing.assert_array_equal(base[1::2], before[1::2])
    with pytest.raises(ValueError, match=r"^max_(norm|value): expected a finite number > 0, got 0$"):
        clip([plain], 0)
    with pytest.raises(ValueError, match=r"^grads\['0'\] and grads\['1'\]: expected separate arrays"):
        clip([plain, plain], 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_gradients_stay_refused(backend):
    """Also the second time, when the arrays are known; and with others bound before."""
    for bound in (False, True):
        p, q = np.ones(3), np.ones(3)
        opt = fs.Adam([p, q], backend=backend)
        if bound:
            opt.bind([np.ones(3), np.ones(3)])
        before = snapshot(opt)
        for _ in range(3):
            with pytest.raises(ValueError, match=r"^params\['0'\] and grads\['1'\]: expected separate arrays"):
                opt.step([np.ones(3), p])
            with pytest.raises(ValueError, match=r"^grads\['1'\]: expected shape \(3,\), got \(4,\)"):
                opt.step([p, np.ones(4)])
            assert snapshot(opt) == before


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("size", [1e200, 1.0, 1e-200])
@pytest.mark.parametrize("optimizer", [fs.LAMB, fs.LARS, fs.Adafactor])
def test_norms_of_parameters_of_any_size(optimizer, size, backend):
    """A step is as long as the parameter, which is `size` times that of a parameter of 1, to rounding."""
    options = {"eps": (None, 0.0)} if optimizer is fs.Adafactor else {}
    found = []
    for scale in 1.0, size:
        w = scale * np.arange(1.0, 7.0).reshape(2, 3)
        optimizer(w, lr=0.1, backend=backend, **options).step(np.arange(-6.0, 0.0).reshape(2, 3))
        found.append(w / scale)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-14)
    assert (found[0] != np.arange(1.0, 7.0).reshape(2, 3)).all()


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_direction_of_any_size(backend):
    """LARS divides by the norm of the gradient, whose squares a double does not hold."""
    found = []
    for scale in 1.0, 1e200, 1e-200:
        w = np.ones(4)
        fs.LARS(w, lr=0.1, backend=backend).step(np.full(4, scale))
        found.append(w)
    assert (found[0] < 1).all()
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-15)


def test_errors_come_back_from_workers():
    """Pools of processes pickle exceptions; one that cannot be read again breaks the pool, or hangs it."""
    opt = fs.SGD({"a": np.ones(2), "b": np.ones(2)}, lr=0.1)
    with pytest.raises(fs.NonFiniteGradientError) as caught:
        opt.step({"a": np.ones(2), "b": np.array([np.nan, np.inf])})
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.names, again.counts) == (str(caught.value), ("b",), {"b": 2})


@pytest.mark.parametrize(
    "clip", [fs.global_norm, lambda g: fs.clip_by_global_norm(g, 1.0), lambda g: fs.clip_by_norm(g, 1.0)]
)
def test_gradients_from_a_generator(clip):
    assert clip(g for g in [np.full(2, 3.0), np.full(2, 4.0)]) > 4
