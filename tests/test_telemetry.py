"""Statistics of a step. That kernels and reference agree bit for bit is among the generic tests (`stats`)."""

import math

import numpy as np
import pytest

import fusedstep as fs

backends = pytest.mark.parametrize("backend", ["c", "reference"])


def close(x):
    return pytest.approx(x, rel=1e-12)


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_worked_values(backend, dtype):
    params = {"w": np.array([3.0, -4.0], dtype), "b": np.zeros((), dtype), "none": np.zeros((0, 3), dtype)}
    opt = fs.SGD(params, lr=0.5, clip_norm_per_array=1.0, stats=True, backend=backend)
    stats = opt.step({"w": np.array([0.0, 4.0]), "b": np.array(0.25), "none": np.zeros((0, 3))}, grad_scale=2.0).stats
    factor = 1 / (2 + 1e-6)
    w, b, none = stats["w"], stats["b"], stats["none"]
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    assert w[:1] + w[3:] == (2, pytest.approx(0.5 * 2 * factor, rel=tolerance), factor, 1, 0)
    assert (w.grad_norm, w.param_norm) == (2.0, pytest.approx(math.hypot(3, 4 + factor), rel=tolerance))
    assert b == (1, 0.125, 0.0625, 0.0625, 1.0, 0, 0)
    assert none == (0, 0.0, 0.0, 0.0, 1.0, 0, 0)
    assert w.update_ratio == w.update_norm / w.param_norm
    assert math.isnan(none.update_ratio)
    assert stats.total.size == 3
    assert stats.total.grad_norm == close(math.hypot(2, 0.125))
    assert (stats.total.clip_factor, stats.total.n_zero) == (factor, 1)
    assert list(stats) == ["w", "b", "none"]
    assert len(stats) == 3
    assert str(stats).splitlines()[-1].startswith("all ")
    with pytest.raises(KeyError):
        stats["v"]


@backends
def test_any_layout_gives_the_same(backend):
    """Sums run in C order, and so do the blocks of small states then."""
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal((70, 90)), rng.standard_normal((70, 90))
    found = []
    for layout in (np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]):
        for state_dtype in (None, "int8"):
            w = layout(start.astype(np.float32))
            opt = fs.Adam({"w": w}, lr=0.01, state_dtype=state_dtype, stats=True, backend=backend)
            rows = [tuple(opt.step({"w": layout(grad)}).stats["w"]) for _ in range(3)]
            found.append((state_dtype, rows, w.tobytes(), {k: a.tobytes() for k, a in opt.state["w"].items()}))
    for state_dtype in (None, "int8"):
        first, *others = [f[1:] for f in found if f[0] == state_dtype]
        assert all(other == first for other in others)


def test_state_moves_between_orders():
    """With statistics, blocks of 8-bit state are in C order, else in that of memory: loading converts."""
    rng = np.random.default_rng(0)
    w, grad = np.asfortranarray(rng.standard_normal((40, 30))), rng.standard_normal((40, 30))
    opt = fs.SGD({"w": w}, lr=0.1, momentum=0.9, state_dtype="int8")
    opt.step({"w": grad})
    saved = opt.state_dict()
    assert saved["memory_axes"] == {"w": [1, 0]}
    with_stats = fs.SGD({"w": w}, lr=0.1, momentum=0.9, state_dtype="int8", stats=True)
    with_stats.load_state_dict(saved)
    assert with_stats.state_dict()["memory_axes"] == {"w": [0, 1]}
    np.testing.assert_allclose(decoded(with_stats, [0, 1]), decoded(opt, [1, 0]), rtol=1 / 8, atol=1e-4)


def decoded(opt, axes):
    own = opt.state["w"]
    return fs.reference.storage.load_state(own["momentum_buffer"], own["momentum_buffer_scale"], axes, np.dtype(np.float64))


@backends
def test_counts_and_skipped_steps(backend):
    w = np.ones(2000, np.float32)
    grad = np.ones(2000, np.float32)
    grad[:500] = 0
    grad[700:710] = np.nan
    grad[800] = np.inf
    opt = fs.SGD({"w": w}, lr=0.1, stats=True, nonfinite="skip", backend=backend)
    assert opt.step({"w": grad}).stats is None
    opt.nonfinite = "zero"
    stats = opt.step({"w": grad}).stats["w"]
    assert (stats.n_zero, stats.n_nonfinite) == (500, 11)
    assert stats.grad_norm == math.sqrt(1489)
    opt.nonfinite = "propagate"
    stats = opt.step({"w": grad}).stats
    assert math.isnan(stats["w"].grad_norm)
    assert stats["w"].n_nonfinite == 11
    assert "w: the gradient is inf or nan in 11 of 2000 elements" in stats.warnings()


def test_reports_are_independent():
    w = np.ones(4)
    opt = fs.SGD({"w": w}, lr=0.5, stats=True)
    first, second = opt.step({"w": np.ones(4)}).stats, opt.step({"w": np.zeros(4)}).stats
    assert (first["w"].grad_norm, second["w"].grad_norm) == (2.0, 0.0)
    assert opt.step({"w": np.ones(4)}).stats["w"].param_norm == 0.0


def test_frozen_by_rounding():
    """The update is what became of the parameter, not what the rule wanted."""
    w = np.ones(64, np.float16)
    stats = fs.SGD({"w": w}, lr=1e-6, stats=True).step({"w": np.ones(64)}).stats
    assert stats["w"].update_norm == 0
    assert stats.warnings() == ["w: the update is 0 times the parameter"]
    exact = fs.SGD({"w": w}, lr=1e-6, stats=True, low_precision="master").step({"w": np.ones(64)}).stats
    assert exact["w"].update_norm == pytest.approx(8e-6, rel=0.02)
    assert len(exact.warnings(vanishing=1e-4)) == 1
    assert exact.warnings() == []
