"""Prodigy: one learning rate for all arrays, found from all of them."""

import jax
import numpy as np
import optax
import pytest
from conftest import assert_same_bits, float64_in_jax

import fusedstep as fs

backends = pytest.mark.parametrize("backend", ["c", "reference"])
SHAPES = {"w": (30, 70), "none": (0, 3), "b": (70,), "scalar": ()}
FACTORS = np.logspace(-1, 1, 30 * 70)  # of a quadratic loss around 1


def zeros(dtype=np.float64):
    return {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}


def gradients(params):
    return {name: FACTORS[: p.size].reshape(p.shape) * (p.astype(np.float64) - 1) for name, p in params.items()}


def take(opt, params, n_steps):
    """The learning rates found after each step."""
    found = []
    for _ in range(n_steps):
        opt.step(gradients(params))
        values = {float(own["d"]) for own in opt.state.values()}
        assert len(values) == 1
        found += values
    return found


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_trains_without_a_learning_rate(backend, dtype):
    params = zeros(dtype)
    found = take(fs.Prodigy(params, backend=backend), params, 200)
    assert found == sorted(found)
    assert found[0] == 1e-6
    assert 0.1 < found[-1] < 1
    assert all(np.abs(p - 1).max(initial=0) < 1e-3 for p in params.values())


def test_against_optax():
    """Where d grows by what it leads to, half a million times in 50 steps.

    Worst seen: 4e-14 of parameters around 1; 3e-14 of d, 1e-13 of its numerator, relative.
    """
    with float64_in_jax():
        params = zeros()
        opt = fs.Prodigy(params, convention="optax")
        theirs = {name: jax.numpy.asarray(p) for name, p in params.items()}
        transform = optax.contrib.prodigy()
        state = transform.init(theirs)
        for _ in range(50):
            opt.step(gradients(params))
            updates, state = transform.update(gradients(theirs), state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        worst = max(np.abs(params[name] - theirs[name]).max(initial=0) for name in params)
        assert worst < 1e-13
        assert opt.state["w"]["d"] > 0.1
        np.testing.assert_allclose(opt.state["w"]["d"], state.estim_lr, rtol=1e-13)
        np.testing.assert_allclose(opt.state["w"]["d_numerator"], state.numerator_weighted, rtol=1e-12)


@backends
def test_groups_have_a_learning_rate_in_common(backend):
    """Each with its own lr, by which its part of the numerator is multiplied: against the equations on flat arrays."""
    rates, d0, beta3 = np.array([0.25, 0.25, 1.0]), 1e-3, np.sqrt(0.999)
    p, q = np.zeros(2), np.zeros(1)
    opt = fs.Prodigy([{"params": {"p": p}, "lr": 0.25}, {"params": {"q": q}}], d0=d0, backend=backend)
    x, m, v, s, r, d = np.zeros(3), 0.0, 0.0, 0.0, 0.0, d0
    for _ in range(30):
        g = np.array([1.0, 2.0, 3.0]) * (x - [3.0, -2.0, 1.0])
        opt.step([{"p": g[:2]}, {"q": g[2:]}])
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * (d * g) ** 2
        r = beta3 * r + d / d0 * np.sum(d * rates * g * -x)
        s = beta3 * s + d / d0 * d * rates * g
        before, d = d, max(d, r / np.abs(s).sum())
        x = x - before * rates * m / (np.sqrt(v) + d * 1e-8)
        np.testing.assert_allclose([*p, *q], x, rtol=0, atol=1e-13)
        np.testing.assert_allclose([opt.state["p"]["d"], opt.state["q"]["d"]], d, rtol=1e-13)
    assert d > 0.1


@backends
def test_stays_without_gradients(backend):
    params = zeros()
    opt = fs.Prodigy(params, backend=backend)
    opt.step({name: np.zeros_like(p) for name, p in params.items()})
    assert {float(own["d"]) for own in opt.state.values()} == {1e-6}


@backends
@pytest.mark.parametrize(("bad", "lr"), [(1e308, 1.0), (1e300, 1e10), (np.inf, 1.0), (np.nan, 1.0)])
def test_stays_where_it_would_not_be_finite(backend, bad, lr):
    """In the second step, when the parameter has moved, the numerator alone overflows, or both sums, or they are nan."""
    p = np.zeros(2)
    opt = fs.Prodigy({"p": p}, d0=1.0, lr=lr, nonfinite="propagate", backend=backend)
    for g in (1.0, bad, 1.0):
        opt.step({"p": np.array([g, 1.0])})
    assert not np.isfinite(opt.state["p"]["d_numerator"])
    assert opt.state["p"]["d"] == 1.0


@backends
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_start_is_exact(backend, state_dtype, rng):
    params = {"w": rng.standard_normal(300).astype(np.float32)}
    start = params["w"].copy()
    opt = fs.Prodigy(params, state_dtype=state_dtype, backend=backend)
    take(opt, params, 3)
    assert_same_bits([opt.state["w"]["p0"]], [start])
    assert opt.state["w"]["s"].dtype == state_dtype


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_for_threads_and_layouts(dtype, level, rng):
    """Sums of several blocks in several arrays; in C order, and so they are the reference's."""
    shapes = [(67, 90), (5,), (1, 2000)]
    start, factors = ([rng.random(shape).astype(dtype) for shape in shapes] for _ in range(2))
    results = []
    for settings, order in (({"backend": "reference"}, "C"), *(({"num_threads": n}, o) for n in (1, 2, 3) for o in "CF")):
        params = [np.array(a, order=order) for a in start]
        opt = fs.Prodigy(params, d0=1e-2, **settings)
        for _ in range(20):
            opt.step([a * (p - 1) for a, p in zip(factors, params)])
        results.append([*params, *(a for own in opt.state.values() for a in own.values())])
        assert opt.state["0"]["d"] > 2e-2
        assert_same_bits(results[-1], results[0])


@backends
def test_of_16_bits(backend):
    """The first steps are lost unless what they lack is kept."""
    for low_precision, found in (("nearest", 1e-6), ("kahan", 0.1)):
        params = {"w": np.full(50, 2.0, np.float16)}
        opt = fs.Prodigy(params, low_precision=low_precision, backend=backend)
        assert take(opt, params, 200)[-1] >= found
        assert (low_precision == "nearest") == (opt.state["w"]["d"] == 1e-6)
