"""Parameters of 16 bits. That kernels and reference agree bit for bit is among the generic tests (`LOW_PRECISION`)."""

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from fusedstep.reference import storage

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
backends = pytest.mark.parametrize("backend", ["c", "reference"])
halves = pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)


def gradients(n, steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, n)).astype(np.float32)


def small_steps(dtype, low_precision, backend="c", steps=1000):
    """Where 1.0 ends after steps of 2^-13, of which neither type has room for one."""
    w = np.ones(64, dtype)
    opt = fs.SGD(w, lr=2.0**-13, low_precision=low_precision, backend=backend)
    for _ in range(steps):
        opt.step(np.full(64, -1, np.float32))
    return w.astype(np.float64)


@halves
def test_small_steps(dtype):
    wanted = 1 + 1000 * 2.0**-13
    np.testing.assert_array_equal(small_steps(dtype, "nearest"), 1)
    digit = float(ml_dtypes.finfo(dtype).eps)
    for low_precision in ("kahan", "master", *(["split"] if dtype == BFLOAT16 else [])):
        np.testing.assert_allclose(small_steps(dtype, low_precision), wanted, atol=digit / 2)
    at_random = small_steps(dtype, "stochastic")
    assert set(np.unique(at_random / digit % 1)) == {0}
    assert abs(at_random.mean() - wanted) < 5 * np.sqrt(1000 * 2.0**-13 * digit / 64)  # 5 standard deviations


@backends
@pytest.mark.parametrize("low_precision", ["master", "split"])
def test_steps_are_those_of_float32(low_precision, backend):
    start = gradients(500, 1)[0].astype(BFLOAT16)
    w, exact = start.copy(), start.astype(np.float32)
    options = {"weight_decay": 0.1, "clip_norm": 3.0, "ema_decay": 0.9, "lr": 1e-3}
    opt = fs.AdamW({"w": w}, **options, low_precision=low_precision, backend=backend)
    wanted = fs.AdamW({"w": exact}, **options)
    for grad in gradients(500, 30, seed=1):
        opt.step({"w": grad})
        wanted.step({"w": grad})
        kept = (
            opt.state["w"]["master"] if low_precision == "master" else storage.join(w, "split", opt.state["w"]["remainder"])
        )
        np.testing.assert_array_equal(kept, exact)
    np.testing.assert_array_equal(opt.averages["w"], wanted.averages["w"])
    np.testing.assert_array_equal(w, exact.astype(BFLOAT16))
    assert opt.nbytes == {
        **wanted.nbytes,
        **({"master": 2000} if low_precision == "master" else {"remainder": 1000}),
    }


def test_any_float32_splits_and_joins():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = [
        0,
        0x80000000,
        1,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x7F800000,
        0xFF800000,
        0x3F807FFF,
        0x3F808000,
        0x3F808001,
        0x3F818000,
    ]
    values = np.concatenate([np.array(edges, np.uint32), bits]).view(np.float32)
    param, remainder = np.zeros(values.shape, BFLOAT16), np.zeros(values.shape, np.int16)
    storage.part(values, param, "split", remainder, None)
    np.testing.assert_array_equal(storage.join(param, "split", remainder), values)
    finite = np.abs(values) < 3e38
    distance = np.abs(values[finite].astype(np.float64) - param[finite].astype(np.float64))
    nearest = np.abs(values[finite].astype(np.float64) - values[finite].astype(BFLOAT16).astype(np.float64))
    np.testing.assert_array_equal(distance, nearest)


@halves
def test_random_rounding(dtype):
    """To one of two neighbours, the nearer more often, and what has room stays."""
    digit = float(ml_dtypes.finfo(dtype).eps)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    unsigned = np.arange(2**16, dtype=np.uint16).view(dtype)
    exact = unsigned[np.isfinite(unsigned.astype(np.float32))].astype(np.float32)
    for random in (0, 0x7FFFF, 0xFFFFF):
        stored = np.zeros(exact.shape, dtype)
        storage.part(exact, stored, "stochastic", None, np.full(exact.shape, random, np.uint32))
        np.testing.assert_array_equal(stored, exact.astype(dtype))
    n = 1 << 16
    for lower, step in [(1.0, digit), (-2.0, -2 * digit), (0.0, tiny), (3 * tiny, tiny)]:
        for part in (0.25, 0.5, 0.9):
            stored = np.zeros(n, dtype)
            values = np.full(n, lower + part * step, np.float32)
            storage.part(values, stored, "stochastic", None, np.arange(n, dtype=np.uint32) << 4)
            up = stored == dtype.type(lower + step)
            assert (up | (stored == dtype.type(lower))).all()
            assert abs(up.mean() - part) <= 2**-12
    special = np.array([np.inf, -np.inf, np.nan, 3.4e38, 65504, 65519, 65520], np.float32)
    stored = np.zeros(special.shape, dtype)
    storage.part(special, stored, "stochastic", None, np.zeros(special.shape, np.uint32))
    assert np.isinf(stored[:2].astype(np.float32)).all()
    assert np.isnan(stored[2].astype(np.float32))
    if dtype == FLOAT16:
        np.testing.assert_array_equal(stored[3:], [np.inf, 65504, 65504, np.inf])


def test_random_bits_differ_by_step_array_seed_and_use():
    def run(seed, n_arrays=2):
        params = [np.ones(2000, BFLOAT16) for _ in range(n_arrays)]
        opt = fs.SGD(params, lr=2.0**-8, low_precision="stochastic", seed=seed, momentum=0.5, state_dtype="bfloat16")
        opt.step([np.full(2000, -1, np.float32)] * n_arrays)
        return params[0] == 1, params[1] == 1

    first, second = run(0)
    other, _ = run(1)
    again, _ = run(0)
    np.testing.assert_array_equal(first, again)
    for a, b in [(first, second), (first, other)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(2000)
    assert 0.4 < first.mean() < 0.6


@backends
@halves
@pytest.mark.parametrize("low_precision", ["stochastic", "kahan", "master", "split"])
def test_saved_and_resumed(dtype, low_precision, backend, tmp_path):
    pytest.importorskip("safetensors")
    if low_precision == "split" and dtype == FLOAT16:
        return
    make = lambda: {"w": np.linspace(-1, 1, 300).astype(dtype), "b": np.ones(7, np.float32)}  # noqa: E731
    options = {"low_precision": low_precision, "state_dtype": "int8", "seed": 7, "backend": backend}
    steps = [{"w": g[:300], "b": g[300:307]} for g in gradients(307, 6)]
    params, resumed = make(), make()
    opt = fs.AdamW(params, **options)
    for grads in steps[:3]:
        opt.step(grads)
    fs.save(tmp_path / "x.safetensors", opt)
    other = fs.AdamW(resumed, **options)
    fs.load(tmp_path / "x.safetensors", other)
    for grads in steps[3:]:
        opt.step(grads)
        other.step(grads)
    for name in params:
        np.testing.assert_array_equal(params[name], resumed[name])
        for key, array in opt.state[name].items():
            np.testing.assert_array_equal(other.state[name][key], array)
    assert "compensation" not in opt.state["b"]
    assert "master" not in opt.state["b"]


def test_average_in_the_arrays_and_back():
    w = gradients(100, 1)[0].astype(BFLOAT16)
    opt = fs.SGD({"w": w}, lr=0.1, low_precision="split", ema_decay=0.5)
    for grad in gradients(100, 3, seed=1):
        opt.step({"w": grad})
    kept, remainder = w.copy(), opt.state["w"]["remainder"].copy()
    with opt.averaged():
        np.testing.assert_array_equal(w, opt.averages["w"].astype(BFLOAT16))
    np.testing.assert_array_equal(w, kept)
    np.testing.assert_array_equal(opt.state["w"]["remainder"], remainder)


def test_errors():
    message = r"params\['w'\]: expected bfloat16 for low_precision=\"split\", which halves a float32, got float16"
    with pytest.raises(TypeError, match=message):
        fs.SGD({"w": np.ones(3, np.float16)}, low_precision="split")
    saved = fs.SGD({"w": np.ones(3, BFLOAT16)}, low_precision="split").state_dict()
    opt = fs.SGD({"w": np.ones(3, BFLOAT16)}, low_precision="master")
    with pytest.raises(ValueError, match=r"state'\]\['w'\]: expected \['master'\], got \['remainder'\]"):
        opt.load_state_dict(saved)
    saved["state"]["w"]["master"] = saved["state"]["w"].pop("remainder")
    with pytest.raises(TypeError, match=r"\['master'\]: expected dtype float32, got int16"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="expected an array in C order, without gaps"):
        fs.SGD(
            np.ones((3, 4), BFLOAT16), low_precision="kahan", allocate_state=lambda _, shape, t: np.zeros(shape[::-1], t).T
        )
