"""State in bfloat16 and in 8 bits. That kernels and reference agree bit for bit is among the generic tests (`state_dtype`)."""

import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, setting_id

import fusedstep as fs
from fusedstep import _arrays
from fusedstep.reference import storage

INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
codes = pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
NEAREST = 0x80000


def spread(n, seed=0, decades=8):
    """Values of many magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10 ** rng.uniform(-decades, decades, n)).astype(np.float32)


def stored(values, dtype, random=NEAREST):
    """What comes back of flat float32 values."""
    state, scales = np.zeros(values.size, dtype), np.zeros(-(-values.size // 256), np.float32)
    storage.store_small(values, state, scales, np.broadcast_to(np.uint32(random), values.shape).copy())
    return storage.load_small(state, scales)


def neighbours(values):
    """The largest magnitude among those that share a scale, for each."""
    return np.repeat(np.maximum.reduceat(np.abs(values), np.arange(0, values.size, 256)), 256)[: values.size]


# ---- The format ---------------------------------------------------------------------------------------------------------


@codes
def test_nearest_code(dtype):
    values = spread(3000, decades=2)
    values = np.abs(values) if dtype == UINT8 else values
    found, smallest = stored(values, dtype), 2.0 ** (-34 if dtype == UINT8 else -18) * neighbours(values)
    # Half of the distance between codes: a sixteenth of the value at most, except near 0, where codes are evenly spaced.
    assert (np.abs(found - values) <= np.abs(values) / 16 + smallest).all()
    assert (np.signbit(found) == np.signbit(values)).all()


@codes
def test_every_code_is_a_fixed_point(dtype):
    all_codes = np.arange(256, dtype=np.uint8).view(dtype)
    all_codes = all_codes[all_codes & 0x7F != 0x7F] if dtype == INT8 else all_codes[:-1]  # the last one is for rounding up
    scales = np.array([2.0**-7], np.float32)
    values = storage.load_small(all_codes, scales)
    again, new_scales = np.zeros_like(all_codes), np.zeros_like(scales)
    for random in (0, NEAREST, 0xFFFFF):
        storage.store_small(values, again, new_scales, np.full(all_codes.size, random, np.uint32))
        wanted = all_codes.copy()
        if dtype == UINT8:
            wanted[0] = 1  # beside what is not 0 nothing is
        np.testing.assert_array_equal(again, wanted)
        np.testing.assert_array_equal(new_scales, scales)
    assert (np.diff(values[: 127 if dtype == INT8 else 255]) > 0).all()


@codes
def test_magnitudes_and_zeros(dtype):
    for largest in (3.4e38, 1e30, 1.0, 1e-30, 2.0**-126, 1e-40):
        values = np.full(300, largest, np.float32)
        np.testing.assert_allclose(stored(values, dtype), values, rtol=1 / 8, atol=2.0**-129)
    np.testing.assert_array_equal(stored(np.zeros(300, np.float32), dtype), 0)


@pytest.mark.parametrize("size", [29, 256, 300])
def test_nothing_becomes_0_beside_the_largest(level, size):
    """Found by fuzzing: not in a block above 7/4 times the highest scale either."""
    found = []
    for backend in ("c", "reference"):
        w, g = np.ones(size), np.full(size, 3e38)
        g[1::2] = 0.0
        opt = fs.Adamax({"w": w}, state_dtype="int8", backend=backend)
        opt.step({"w": g})
        assert opt.state["w"]["exp_inf"].all()
        found.append([w, *opt.state["w"].values()])
    assert_same_bits(*found)


@pytest.mark.parametrize(("rule", "options"), [(fs.SGD, {"momentum": 0.9}), (fs.Adagrad, {})])
def test_the_largest_do_not_overflow(rule, options):
    # Up to the last float32, rounded at random: as momentum, of either sign, and as sums of squares.
    magnitudes = np.float32(2.0**127) * np.linspace(0.5, 2 - 2.0**-22, 5000, dtype=np.float32)
    grad = magnitudes * np.where(np.arange(5000) % 2, np.float32(1), np.float32(-1)) if options else np.sqrt(magnitudes)
    states = []
    for backend in ("c", "reference"):
        opt = rule(np.zeros(5000, np.float32), lr=1e-30, state_dtype="int8", backend=backend, **options)
        opt.step(grad)
        codes, scales = opt.state["0"].values()
        values = np.abs(storage.load_small(codes, scales))
        np.testing.assert_allclose(values, magnitudes, rtol=1 / 8)
        assert values.max() > 3.19e38  # the last code
        states.append((codes, scales))
    for c, wanted in zip(*states):
        np.testing.assert_array_equal(c, wanted)


@codes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_neighbours(dtype, bad):
    values = np.ones(700, np.float32)
    values[300] = bad
    found = stored(values, dtype)
    assert np.isnan(found[256:512]).all()
    np.testing.assert_allclose(np.delete(found, np.s_[256:512]), 1, rtol=1 / 16)


def test_a_divisor_does_not_become_0():
    values = np.array([1.0, 1e-30, 0.0], np.float32)
    assert (stored(values, UINT8, random=0) > 0).all()
    assert (stored(values, INT8, random=0)[1:] == 0).all()


# ---- Rounding at random -------------------------------------------------------------------------------------------------


def test_random_bits_are_what_they_were():
    # Checkpoints go on with them: they must never change.
    found = storage.random_fractions(seed=1, step=2, array=3, use=0, size=2000)
    assert [int(x) for x in found[[0, 1, 1023, 1024, 1999]]] == RANDOM
    assert (storage.random_fractions(1, 2, 3, 1, 2000) != found).mean() > 0.99


RANDOM = [840328, 398632, 976953, 813061, 944736]


def test_random_bits_are_uniform_and_independent():
    size = 1 << 18
    draws = [
        storage.random_fractions(*key, size)
        for key in [(0, 1, 0, 0), (0, 1, 0, 1), (0, 2, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0)]
    ]
    for i, draw in enumerate(draws):
        counts = np.bincount(draw >> 12, minlength=256)
        assert ((counts - size / 256) ** 2 / (size / 256)).sum() < 350  # chi-squared, 255 degrees of freedom: p = 1e-4
        for other in [np.roll(draw, 1), np.roll(draw, storage.SCALED // 2), *draws[:i]]:
            assert abs(np.corrcoef(draw, other)[0, 1]) < 5 / np.sqrt(size)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_rounding_has_no_bias(state_dtype):
    pytest.importorskip("ml_dtypes")
    values, n = spread(512, decades=1), 2000
    dtype = np.dtype(state_dtype) if state_dtype == "bfloat16" else INT8
    scales = None if state_dtype == "bfloat16" else np.zeros(2, np.float32)

    def rounded(random):
        state = np.zeros(512, dtype)
        storage.store_small(values, state, scales, random)
        return storage.load_small(state, scales).astype(np.float64)

    below, above = (rounded(np.full(512, random, np.uint32)) for random in (0, 0xFFFFF))
    mean = sum(rounded(storage.random_fractions(0, step, 0, 0, 512)) for step in range(n)) / n
    error, variance = mean - values, np.abs((values - below) * (above - values)) / n
    inner = below != above  # not beyond the last code
    assert inner.sum() > 400
    assert (np.abs(error) <= 5.5 * np.sqrt(variance) + 2.0**-15 * np.abs(above - below))[inner].all()


def test_rounding_to_the_nearest_would_freeze():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    g = np.full(1000, 0.5, np.float32)
    w = np.zeros(1000, np.float32)
    opt = fs.Adam(w, state_dtype="bfloat16", betas=(0.9, 0.999))
    nearest = np.zeros(1000, ml_dtypes.bfloat16)
    for _ in range(4000):
        opt.step(g)
        nearest = (np.float32(0.999) * nearest.astype(np.float32) + np.float32(0.001) * g * g).astype(ml_dtypes.bfloat16)
    wanted = 0.25 * (1 - 0.999**4000)
    assert abs(opt.state["0"]["exp_avg_sq"].astype(np.float64).mean() / wanted - 1) < 0.01
    assert nearest.astype(np.float64).mean() < 0.6 * wanted  # it stands still once 1/1000 is less than half of a last digit


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_no_step_blows_up(entry, settings):
    # Gradients of all magnitudes side by side, for which rounding to the nearest multiple of a largest one would give zeros.
    scale = 10 ** np.random.default_rng(0).uniform(-6, 0, 4096)
    w = {dtype: np.zeros(4096, np.float32) for dtype in (None, "int8")}
    opts = {dtype: entry.optimizer(w[dtype], **settings, state_dtype=dtype) for dtype in w}
    largest = dict.fromkeys(w, 0.0)
    for seed in range(200):
        g = (np.random.default_rng(seed).standard_normal(4096) * scale).astype(np.float32)
        for dtype, opt in opts.items():
            before = w[dtype].copy()
            opt.step(g)
            largest[dtype] = max(largest[dtype], float(np.abs(w[dtype] - before).max()))
    assert largest["int8"] < 2 * largest[None]


# ---- As state -----------------------------------------------------------------------------------------------------------


def params():
    w = spread(5000, seed=1, decades=0).reshape(50, 100)
    return {"w": w, "f": np.asfortranarray(w[:30, :70]), "half": w[0].astype(np.float16), "one": w[0, :1].copy().reshape(())}


def grads(seed):
    return {name: spread(p.size, seed, decades=1).reshape(p.shape) for name, p in params().items()}


@pytest.mark.parametrize("state_dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["c", "reference"])
def test_goes_on_after_loading(state_dtype, backend, tmp_path):
    pytest.importorskip("ml_dtypes")
    pytest.importorskip("safetensors")
    p, q = params(), {name: a.copy(order="K") for name, a in params().items()}
    opt = fs.AdamW(p, state_dtype=state_dtype, seed=5, backend=backend)
    for seed in range(3):
        opt.step(grads(seed))
    fs.save(tmp_path / "x.safetensors", opt)
    other = fs.AdamW(q, state_dtype=state_dtype, seed=6)
    fs.load(tmp_path / "x.safetensors", other, params=q)
    assert other.seed == 5
    for seed in range(3, 6):
        opt.step(grads(seed))
        other.step(grads(seed))
    for name in p:
        np.testing.assert_array_equal(p[name], q[name])
        for key, array in opt.state[name].items():
            np.testing.assert_array_equal(array, other.state[name][key])


@pytest.mark.parametrize("there", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("here", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_state_is_loaded_into_other_types_and_orders(there, here, order):
    pytest.importorskip("ml_dtypes")
    w, v = params()["w"], np.asarray(params()["w"], order=order)
    opt, other = fs.Adam({"w": w}, state_dtype=there), fs.Adam({"w": v}, state_dtype=here)
    for seed in range(3):
        opt.step({"w": grads(seed)["w"]})
    saved = opt.state_dict()
    other.load_state_dict(saved)

    def values(optimizer, param, key):
        own = optimizer.state["w"]
        real, axes = np.dtype(np.float32), _arrays.memory_axes(param)
        return storage.load_state(own[key], own.get(f"{key}_scale"), axes, real).astype(np.float64)

    for key in ("exp_avg", "exp_avg_sq"):
        exact, found = values(opt, w, key), values(other, v, key)
        tolerance = 0 if there == here and (order == "C" or here != "int8") else 1 / 16 if here == "int8" else 1 / 256
        coarsest = np.abs(exact).max() * (2.0**-18 if here == "int8" else 0)
        assert (np.abs(found - exact) <= tolerance * np.abs(exact) + coarsest).all()
    assert other.step({"w": grads(9)["w"]}).step == 4


def test_bad_scales_are_refused():
    opt = fs.Adam({"w": params()["w"]}, state_dtype="int8")
    opt.step({"w": grads(0)["w"]})
    saved = opt.state_dict()
    del saved["state"]["w"]["exp_avg_scale"]
    with pytest.raises(ValueError, match=r"expected \['exp_avg', 'exp_avg_scale', 'exp_avg_sq', 'exp_avg_sq_scale'\], got"):
        opt.load_state_dict(saved)
    saved["state"]["w"]["exp_avg_scale"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"\['exp_avg'\]_scale: expected shape \(20,\), got \(3,\)"):
        opt.load_state_dict(saved)
    saved = opt.state_dict() | {"memory_axes": {"w": [0, 0]}}
    with pytest.raises(ValueError, match=r"memory_axes'\]\['w'\]: expected an order of the axes, got \[0, 0\]"):
        opt.load_state_dict(saved)


def test_bytes_of_state():
    n = 1_000_000
    opt = fs.AdamW(np.zeros(n, np.float32), state_dtype="int8")
    assert opt.nbytes == {"exp_avg": n, "exp_avg_scale": 15628, "exp_avg_sq": n, "exp_avg_sq_scale": 15628}
    assert sum(opt.nbytes.values()) / n < 2.1
    assert (opt.state["0"]["exp_avg"].dtype, opt.state["0"]["exp_avg_sq"].dtype) == (INT8, UINT8)


def test_initial_value():
    opt = fs.Adagrad(np.zeros(1000, np.float32), state_dtype="int8", initial_accumulator_value=0.1)
    own = opt.state["0"]
    np.testing.assert_allclose(storage.load_small(own["sum"], own["sum_scale"]), 0.1, rtol=1 / 16)


def test_what_is_subtracted_stays_exact():
    opt = fs.RMSprop(np.zeros(1000), state_dtype="int8", centered=True, momentum=0.9)
    assert {key: array.dtype.name for key, array in opt.state["0"].items()} == {
        "square_avg": "float64", "grad_avg": "float64", "momentum_buffer": "int8", "momentum_buffer_scale": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_state_changes_its_type_with_the_rule(backend):
    w = np.zeros(1000)
    opt = fs.RMSprop(w, state_dtype="int8", momentum=0.5, backend=backend)
    opt.step(spread(1000, decades=0))
    before = opt.state["0"]["square_avg"].copy(), opt.state["0"]["square_avg_scale"].copy()
    opt.param_groups[0]["centered"] = True
    values = storage.load_small(*before).astype(np.float64)
    opt.step(np.zeros(1000))
    np.testing.assert_array_equal(opt.state["0"]["square_avg"], 0.99 * values + (1 - 0.99) * 0.0)
    opt.param_groups[0]["centered"] = False
    opt.step(np.zeros(1000))
    assert opt.state["0"]["square_avg"].dtype == UINT8
    assert opt.steps == 3


def test_allocated_state_has_the_order_of_the_parameter():
    w = np.asfortranarray(params()["w"])
    fs.Adam(w, state_dtype="int8", allocate_state=lambda name, shape, dtype: np.zeros(shape[::-1], dtype).T)
    with pytest.raises(ValueError, match=r"'0.exp_avg'.: expected an array in the order \[1, 0\] of its axes, without gaps"):
        fs.Adam(w, state_dtype="int8", allocate_state=lambda name, shape, dtype: np.zeros(shape, dtype))


@pytest.mark.parametrize("wanted", ["exp_avg", "exp_avg_sq_scale"])
def test_allocated_state_has_no_gaps(wanted):
    def allocate(name, shape, dtype):
        room = np.zeros((*shape, 2), dtype)
        return room[..., 0] if name == f"0.{wanted}" else room[..., 0].copy()

    with pytest.raises(ValueError, match=rf"'0.{wanted}'.: expected an array in C order, without gaps, got strides"):
        fs.Adam(np.zeros((40, 60)), state_dtype="int8", allocate_state=allocate)


def test_scales_may_not_be_gradients():
    w = np.zeros(20, np.float32)
    opt = fs.SGD(w, momentum=0.9, state_dtype="int8")
    room = opt.state["0"]["momentum_buffer_scale"]
    with pytest.raises(ValueError, match="expected separate arrays"):
        opt.step(np.lib.stride_tricks.as_strided(room, (20,), (0,)))


def test_training_goes_as_well():
    data = pytest.importorskip("sklearn.datasets")
    from fusedstep.demo.mlp import MLP

    x, y = data.load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    losses = {}
    for state_dtype in (None, "int8", "bfloat16"):
        model = MLP([64, 32, 10], np.float32, 0)
        opt, rng = fs.AdamW(model.params, lr=3e-3, state_dtype=state_dtype), np.random.default_rng(0)
        for _ in range(5):
            for batch in np.split(rng.permutation(1792), 28):
                model.backward(x[batch], y[batch])
                opt.step(model.grads)
        losses[state_dtype] = model.loss(x, y)
    assert losses["int8"] < 1.05 * losses[None]
    assert losses["bfloat16"] < 1.05 * losses[None]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_packed_state_is_aligned(state_dtype):
    """Kernels store to it directly."""

    def allocate(name, shape, dtype):
        buffer = np.zeros(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize + 1, np.uint8)
        return buffer[1:].view(dtype).reshape(shape)

    with pytest.raises(ValueError, match="expected an array aligned to its items"):
        fs.SGD({"w": np.zeros(3, np.float32)}, lr=0.5, momentum=0.5, state_dtype=state_dtype, allocate_state=allocate)


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_read_only_state(backend):
    w = np.ones(2)
    opt = fs.SGD({"w": w}, lr=0.5, momentum=0.5, backend=backend)
    opt.state["w"]["momentum_buffer"].flags.writeable = False
    with pytest.raises(ValueError, match="momentum_buffer'\\]: expected a writeable array, got a read-only one"):
        opt.step({"w": np.ones(2)})
    np.testing.assert_array_equal(w, [1.0, 1.0])
