"""What follows the rule: bounds, averages, clearing of the gradients."""

import re
import weakref

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from fusedstep import database, state

BACKENDS = ["c", "reference"]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
backends = pytest.mark.parametrize("backend", BACKENDS)


def values(n=2000, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


# ---- Averages -----------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_average_follows_the_stored_parameter(backend, dtype):
    w, real = values(dtype=dtype), np.float64 if dtype == np.float64 else np.float32
    opt = fs.SGD({"w": w}, lr=0.125, ema_decay=0.9, backend=backend)
    wanted = w.astype(real)
    np.testing.assert_array_equal(opt.averages["w"], wanted)
    for seed in range(5):
        opt.step({"w": values(seed=seed)})
        wanted += real(1 - 0.9) * (w.astype(real) - wanted)
        np.testing.assert_array_equal(opt.averages["w"], wanted)
        assert opt.averages["w"].dtype == real


def test_average_of_torch():
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    import torch

    w = values(dtype=np.float64)
    opt = fs.SGD(w, lr=0.1, ema_decay=0.8)
    theirs, average = torch.from_numpy(w.copy()), swa_utils.get_ema_avg_fn(0.8)
    for seed in range(20):
        opt.step(values(seed=seed, dtype=np.float64))
        theirs = average(theirs, torch.from_numpy(w), seed)
    np.testing.assert_allclose(opt.averages["0"], theirs.numpy(), rtol=1e-12)


@backends
@pytest.mark.parametrize("ema_decay", [0.9, lambda step: 0.5 + 0.1 * step])
def test_average_of_keras(keras, backend, ema_decay):
    """Which begins with a copy of the parameter after the first step."""
    w = values(dtype=np.float64)
    opt = fs.SGD(w, lr=0.1, ema_decay=ema_decay, convention="keras", backend=backend)
    variable, theirs = keras.Variable(w.copy(), dtype="float64"), keras.optimizers.SGD(0.1, use_ema=True)
    theirs.build([variable])
    for seed in range(4):
        grad = values(seed=seed, dtype=np.float64)
        opt.step(grad)
        theirs.ema_momentum = ema_decay(seed) if callable(ema_decay) else ema_decay
        theirs.apply([grad], [variable])
        average = keras.ops.convert_to_numpy(theirs._model_variables_moving_average[0])
        np.testing.assert_allclose(opt.averages["0"], average, rtol=0, atol=1e-14)


@backends
def test_equal_average_is_the_mean(backend):
    w = values(dtype=np.float64)
    opt = fs.SGD(w, lr=0.1, ema_decay=fs.schedules.equal_average(start=3), backend=backend)
    seen = []
    for seed in range(10):
        opt.step(values(seed=seed, dtype=np.float64))
        seen.append(w.copy())
        wanted = np.mean(seen[3:], axis=0) if seed > 3 else w
        np.testing.assert_allclose(opt.averages["0"], wanted, rtol=1e-12)


@backends
def test_a_skipped_step_moves_no_average(backend):
    w = values()
    opt = fs.Adam(w, ema_decay=0.5, nonfinite="skip", backend=backend)
    opt.step(values(seed=1))
    before = opt.averages["0"].copy()
    bad = values(seed=2)
    bad[7] = np.nan
    assert not opt.step(bad).applied
    np.testing.assert_array_equal(opt.averages["0"], before)


@backends
def test_averaged(backend):
    half = values(50, dtype=np.float16)
    w, v, u = values(), values(300).reshape(20, 15).T, values(7)
    groups = [{"params": {"w": w, "v": v, "half": half}, "ema_decay": 0.75}, {"params": {"u": u}}]
    opt = fs.Adam(groups, lr=0.1, backend=backend)
    grads = [{"w": values(seed=1), "v": values(300).reshape(15, 20), "half": half.copy()}, {"u": u.copy()}]
    opt.step(grads)
    before = [a.copy() for a in (w, v, half, u)]
    averages = {name: a.copy() for name, a in opt.averages.items()}
    assert list(averages) == ["w", "v", "half"]
    with pytest.raises(ZeroDivisionError), opt.averaged():  # noqa: PT012
        np.testing.assert_array_equal(w, averages["w"])
        np.testing.assert_array_equal(v, averages["v"])
        np.testing.assert_array_equal(half, averages["half"].astype(np.float16))
        np.testing.assert_array_equal(u, before[3])
        with pytest.raises(RuntimeError, match="expected the parameters in their arrays, got their averages"):
            opt.step(grads)
        with (
            pytest.raises(RuntimeError, match="expected the parameters in their arrays, got their averages"),
            opt.averaged(),
        ):
            pass
        raise ZeroDivisionError
    for array, wanted in zip((w, v, half, u), before):
        np.testing.assert_array_equal(array, wanted)
    for name, wanted in averages.items():
        np.testing.assert_array_equal(opt.averages[name], wanted)
    assert opt.step(grads).step == 2


def test_averaged_without_averages():
    opt = fs.SGD(values())
    assert opt.averages == {}
    with pytest.raises(ValueError, match="ema_decay: expected a number in some parameter group, got none"), opt.averaged():
        pass


@backends
@pytest.mark.parametrize("low_precision", ["nearest", "kahan", "split", "master"])
def test_averages_of_the_rule(backend, low_precision):
    """A rule's own averages, of parameters as exact as they are kept, in the compute type."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    w, half = values(300).reshape(20, 15).T, values(50, dtype=bfloat16)
    opt = fs.ScheduleFreeSGD({"w": w, "half": half}, lr=0.1, momentum=0.5, low_precision=low_precision, backend=backend)
    for seed in range(3):
        opt.step({"w": values(300, seed=seed).reshape(15, 20), "half": values(50, seed=seed)})
    exact = {"w": w, "half": state.exact(half, opt.state["half"], low_precision)}
    assert low_precision == "nearest" or (exact["half"] != half).any()
    averages = opt.averages
    for name, y in exact.items():
        assert averages[name].dtype == np.float32
        np.testing.assert_array_equal(averages[name], y - (opt.state[name]["z"] - y))  # of which y is the mean with z
    before = [w.copy(), half.copy()]
    with opt.averaged():
        np.testing.assert_array_equal(w, averages["w"])
        np.testing.assert_array_equal(half, averages["half"].astype(bfloat16))
        for name, average in opt.averages.items():
            np.testing.assert_array_equal(average, averages[name])
    for array, wanted in zip((w, half), before):
        np.testing.assert_array_equal(array, wanted)


@backends
def test_averages_asked_for_come_before_those_of_the_rule(backend):
    w, u = values(), values(7)
    groups = [{"params": {"w": w}, "ema_decay": 0.0}, {"params": {"u": u}}]
    opt = fs.ScheduleFreeSGD(groups, backend=backend)
    for seed in range(2):
        opt.step([{"w": values(seed=seed)}, {"u": values(7, seed=seed)}])
    np.testing.assert_array_equal(opt.averages["w"], w)
    assert (opt.averages["u"] != u).all()


def test_averages_are_saved(tmp_path):
    pytest.importorskip("safetensors")
    w, other = values(), values(seed=5)
    opt, resumed = fs.Adam({"w": w}, ema_decay=0.9), fs.Adam({"w": other}, ema_decay=0.9)
    opt.step({"w": values(seed=1)})
    fs.save(tmp_path / "x.safetensors", opt)
    checkpoint = fs.load(tmp_path / "x.safetensors", resumed)
    np.testing.assert_array_equal(checkpoint.state_dict["state"]["w"]["average"], opt.averages["w"])
    for _ in range(3):
        opt.step({"w": values(seed=2)})
        resumed.step({"w": values(seed=2)})
    np.testing.assert_array_equal(w, other)
    np.testing.assert_array_equal(resumed.averages["w"], opt.averages["w"])


def test_averages_come_and_go():
    w = values()
    opt = fs.SGD(w)
    opt.step(values(seed=1))
    opt.param_groups[0]["ema_decay"] = 0.5
    at = w.copy()
    opt.step(values(seed=2))
    np.testing.assert_array_equal(opt.averages["0"], at + np.float32(0.5) * (w - at))
    opt.param_groups[0]["ema_decay"] = None
    opt.step(values(seed=3))
    assert opt.averages == {}


def test_nbytes():
    opt = fs.Adam({"w": values(1000), "h": values(10, dtype=np.float16)}, ema_decay=0.9)
    assert opt.nbytes == {"exp_avg": 4040, "exp_avg_sq": 4040, "average": 4040}
    assert fs.SGD(values()).nbytes == {}


# ---- Bounds -------------------------------------------------------------------------------------------------------------


@backends
def test_bounds(backend):
    w = np.array([-1.0, 0.0, 1.0, np.nan, 5.0], np.float32)
    opt = fs.SGD(w, lr=1.0, bounds=(-0.5, 2), backend=backend)
    opt.step(np.array([1, 0.25, -0.25, 0, 0], np.float32))
    np.testing.assert_array_equal(w, np.array([-0.5, -0.25, 1.25, np.nan, 2.0], np.float32))
    opt.param_groups[0]["bounds"] = (None, 1)
    opt.step(np.full(5, 1, np.float32))
    np.testing.assert_array_equal(w, np.array([-1.5, -1.25, 0.25, np.nan, 1.0], np.float32))


def test_non_negative_least_squares():
    rng = np.random.default_rng(3)
    a, target = rng.standard_normal((40, 5)), rng.standard_normal(40)
    x = np.ones(5)
    opt = fs.SGD(x, lr=0.01, bounds=(0, None))
    for _ in range(3000):
        opt.step(a.T @ (a @ x - target))
    slope = a.T @ (a @ x - target)
    assert (x >= 0).all()
    assert (x == 0).any()
    assert np.abs(slope[x > 0]).max() < 1e-10
    assert (slope[x == 0] >= 0).all()


# ---- Clearing -----------------------------------------------------------------------------------------------------------


def shared_gradients():
    """Gradients that share memory with one another, or within themselves."""
    room = values(4000, seed=9)
    sliding = np.lib.stride_tricks.as_strided(room[:2100], (3, 1000), (400, 4))
    return {
        "the same twice": [room[:2000], room[:2000]],
        "overlapping": [room[:2000], room[1000:3000]],
        "interleaved": [room[::2], room[1::2]],
        "apart": [room[:2000], room[2000:]],
        "broadcast": [np.lib.stride_tricks.as_strided(room, (2000,), (0,)), room[2000:]],
        "sliding": [sliding, room[3000:]],
    }


@pytest.mark.parametrize("kind", list(shared_gradients()))
@pytest.mark.parametrize("options", [{}, database.OPTIONS[-1]], ids=["plain", "busy"])
def test_gradients_that_share_memory_are_used_before_they_are_cleared(kind, options):
    results = []
    for zero_grads in (False, True):
        grads = shared_gradients()[kind]
        params = [values(g.size, seed=i).reshape(g.shape) for i, g in enumerate(grads)]
        opt = fs.Adam(params, lr=0.1, num_threads=1, **options)
        for _ in range(2):  # the second time the short way
            opt.step(grads, zero_grads=zero_grads)
            assert not zero_grads or not any(grad.any() for grad in grads)
            for grad, fresh in zip(grads, shared_gradients()[kind]):
                grad[...] = fresh
        results.append([*params, *(a for own in opt.state.values() for a in own.values())])
    for without, with_clearing in zip(*results):
        np.testing.assert_array_equal(without, with_clearing)


# ---- Accumulation -------------------------------------------------------------------------------------------------------


def micro_batches(n, dtype=np.float32):
    return [
        {"w": values(3000, seed=i, dtype=dtype), "v": values(60, seed=i + 50, dtype=dtype).reshape(6, 10)} for i in range(n)
    ]


@backends
@pytest.mark.parametrize("options", [{}, database.OPTIONS[-1], {"state_dtype": "int8"}], ids=["plain", "busy", "int8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_accumulated_gradients_are_their_mean(backend, options, dtype):
    def params():
        return {
            "w": values(3000, seed=7, dtype=dtype),
            "v": np.asfortranarray(values(60, seed=8, dtype=dtype).reshape(6, 10)),
        }

    p, q = params(), params()
    opt, plain = fs.Adam(p, backend=backend, **options), fs.Adam(q, **options)
    real = np.float64 if dtype == np.float64 else np.float32
    for step in range(2):
        grads = [{name: g * 2**step for name, g in batch.items()} for batch in micro_batches(3, dtype)]
        before = [{name: g.copy() for name, g in batch.items()} for batch in grads]
        for i, batch in enumerate(grads):
            opt.accumulate(batch)
            assert opt.accumulated == i + 1
        sums = {name: sum((g[name].astype(real) for g in grads), start=np.zeros(p[name].shape, real)) for name in p}
        report, wanted = opt.step(), plain.step(sums, grad_scale=3.0)
        assert report == wanted
        assert opt.accumulated == 0
        for name in p:
            np.testing.assert_array_equal(p[name], q[name])
            for found, kept in zip(grads, before):
                np.testing.assert_array_equal(found[name], kept[name])


@pytest.mark.parametrize("nonfinite", ["raise", "zero", "skip"])
@pytest.mark.parametrize("kept", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.dtype(t) for t in DTYPES], ids=str)
def test_norms_of_sums_are_those_of_the_reference(dtype, kept, nonfinite):
    """Found while they are added up or afterwards: for any layout, divisor, type, and size of blocks and threads' parts."""

    def batches(step):
        first = {"w": values(70_001, seed=step), "v": values(60, seed=step + 50).reshape(6, 10), "empty": values(0)}
        first |= {"t": values(300_000, seed=step + 9).reshape(500, 600), "one": values(1, seed=step).reshape(())}
        for i in range(3):
            grads = {name: (np.asarray(g) * (i - 0.7)).astype(dtype) for name, g in first.items()}
            grads["v"] = np.asfortranarray(grads["v"]) if i == 2 else grads["v"]
            grads["t"] = np.asfortranarray(grads["t"]) if step > 2 else grads["t"]
            if step == 2 and nonfinite != "raise":
                grads["t"][7, 11] = grads["w"][2000] = np.inf
            yield grads

    def run(backend, num_threads):
        params = {name: np.zeros_like(g) for name, g in next(batches(0)).items()}
        params["t"] = np.asfortranarray(params["t"])
        opt = fs.SGD(
            params,
            lr=1e-3,
            clip_norm=0.5,
            accumulate_dtype=kept,
            nonfinite=nonfinite,
            backend=backend,
            num_threads=num_threads,
            stats=num_threads == 3,
        )
        reports = []
        for step, grad_scale in enumerate([1.0, 3.0, 3.0, 0.7, 0.7]):
            for grads in batches(step):
                opt.accumulate(grads)
            reports.append(opt.step(grad_scale=grad_scale)._replace(stats=None))
        return reports, params

    wanted_reports, wanted = run("reference", None)
    assert [report.applied for report in wanted_reports] == [True, True, nonfinite != "skip", True, True]
    for num_threads in 1, 3:
        reports, params = run("c", num_threads)
        assert reports == wanted_reports
        for name, param in params.items():
            np.testing.assert_array_equal(param, wanted[name])


@pytest.mark.parametrize("kept", [None, "bfloat16"])
def test_sums_are_read_once_more_only_where_their_norm_is_not_known(kept):
    w = np.zeros((40, 100), np.float32)
    opt = fs.SGD(w, lr=1.0, accumulate_dtype=kept)
    for grad_scale, is_known in (1.0, True), (2.0, False), (2.0, True), (2.0, True), (1.0, False):
        for _ in range(4):
            opt.accumulate(np.full_like(w, 3.0))
        opt._sums.params[0][5, 5] = 12e3  # behind its back
        norm = opt.step(grad_scale=grad_scale).grad_norm
        assert (norm < 1000 / grad_scale) == is_known
        assert not is_known or norm == np.sqrt(4000 * 9) / grad_scale
    for grads in np.asfortranarray(np.ones_like(w)), np.ones_like(w), np.ones((40, 200), np.float32)[:, ::2]:
        opt.accumulate(grads)
    opt._sums.params[0][5, 5] = 12e3
    assert opt.step().grad_norm > 1000  # the last gradient was in another order: sums were not added up block by block
    opt.accumulate(np.ones_like(w))
    opt._sums.bind([np.zeros_like(w)])  # as if interrupted before the update
    opt._sums.params[0][5, 5] = 12e3
    assert opt.step().grad_norm > 1000


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.dtype(t) for t in DTYPES], ids=str)
def test_sums_in_another_type_are_those_of_the_reference(dtype, kept):
    found = []
    for backend, num_threads in ("reference", None), ("c", 1), ("c", 3):
        p = {"w": values(3000, seed=7, dtype=dtype), "v": np.asfortranarray(values(60, seed=8, dtype=dtype).reshape(6, 10))}
        opt = fs.SGD(p, lr=0.5, accumulate_dtype=kept, seed=9, backend=backend, num_threads=num_threads)
        for step in range(2):
            for batch in micro_batches(3, dtype):
                opt.accumulate({name: g * dtype.type(2**step) for name, g in batch.items()})
            sums = [array.copy() for array in opt._sums.params]
            opt.step()
        assert {array.dtype for array in sums} == {np.dtype(kept)}
        found.append([*p.values(), *sums])
    for other in found[1:]:
        for wanted, array in zip(found[0], other):
            np.testing.assert_array_equal(wanted, array)


def test_sums_in_float32_of_float64(rng):
    batches = rng.standard_normal((5, 1000))
    w = np.zeros(1000)
    opt = fs.SGD(w, lr=1.0, accumulate_dtype="float32")
    for batch in batches:
        opt.accumulate(batch)
    assert opt.nbytes == {"accumulated": 4000}
    opt.step()
    total = np.zeros(1000, np.float32)
    for batch in batches:
        total += batch.astype(np.float32)
    np.testing.assert_array_equal(w, -(total.astype(np.float64) / 5))


@backends
def test_sums_in_bfloat16_lose_nothing_on_average(backend):
    """The nearest would stay at 1: half a digit there is 1/256."""
    n_calls, small = 64, 2.0**-11
    w = np.zeros(4000, np.float32)
    opt = fs.SGD(w, lr=1.0, accumulate_dtype="bfloat16", backend=backend)
    sums = []
    for _ in range(2):
        opt.accumulate(np.ones_like(w))
        for _ in range(n_calls):
            opt.accumulate(np.full_like(w, small))
        sums.append(opt._sums.params[0].astype(np.float64))
        opt.step()
    exact, digit = 1 + n_calls * small, 2.0**-7
    # A sum gains a whole digit n_calls times, each with this probability, or not.
    chance = small / digit
    deviation = digit * np.sqrt(n_calls * chance * (1 - chance) / w.size)
    assert all(abs(found.mean() - exact) < 5 * deviation for found in sums)
    assert len(np.unique(sums[0])) > 2  # each element by bits of its own
    assert np.count_nonzero(sums[0] != sums[1]) > w.size / 4  # and in each step by others


@backends
def test_accumulation_goes_with_bound_gradients(backend):
    w, g = values(), values(seed=1)
    opt = fs.SGD(w, lr=1.0, backend=backend)
    with pytest.raises(ValueError, match="grads: expected gradients, got none, and none are bound"):
        opt.accumulate()
    opt.bind(g)
    opt.accumulate()
    g[...] = 0
    opt.accumulate()
    at = w.copy()
    opt.step()
    np.testing.assert_array_equal(w, at - values(seed=1) / np.float32(2))
    g[...] = 1
    opt.step()  # with what is bound
    np.testing.assert_array_equal(w, at - values(seed=1) / np.float32(2) - 1)


@backends
def test_what_was_accumulated_stays_after_an_error(backend):
    w = values()
    opt = fs.SGD(w, lr=1.0, backend=backend)
    at, bad = w.copy(), values(seed=2)
    bad[3] = np.inf
    opt.accumulate(values(seed=1))
    with pytest.raises(ValueError, match=r"grads\['0'\]: expected shape \(2000,\), got \(3,\)"):
        opt.accumulate(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"grads: expected none after accumulate\(\), got gradients"):
        opt.step(values())
    assert opt.accumulated == 1
    opt.accumulate(bad)
    with pytest.raises(fs.NonFiniteGradientError):
        opt.step()
    np.testing.assert_array_equal(w, at)
    assert opt.accumulated == 2
    opt.nonfinite = "skip"
    assert not opt.step().applied
    assert opt.accumulated == 0
    opt.accumulate(values(seed=1))
    assert opt.step().applied
    np.testing.assert_array_equal(w, at - values(seed=1))
    with pytest.raises(ValueError, match="grads: expected gradients, got none, and none are bound"):
        opt.step()


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_accumulated_gradients_can_be_forgotten(backend):
    w = np.zeros(2)
    opt = fs.SGD({"w": w}, lr=1.0, backend=backend)
    opt.accumulate({"w": np.array([1.0, np.nan])})
    for _ in range(2):
        with pytest.raises(fs.NonFiniteGradientError):
            opt.step()
    with pytest.raises(ValueError, match=re.escape("add them with accumulate(), or reset_accumulated()")):
        opt.step({"w": np.ones(2)})
    opt.reset_accumulated()
    assert opt.accumulated == 0
    opt.step({"w": np.ones(2)})
    np.testing.assert_array_equal(w, [-1.0, -1.0])


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_loading_forgets_accumulated_gradients(backend):
    w = np.zeros(2)
    opt = fs.SGD({"w": w}, lr=1.0, backend=backend)
    before = opt.state_dict()
    opt.accumulate({"w": np.full(2, 100.0)})
    opt.load_state_dict(before)
    opt.accumulate({"w": np.ones(2)})
    opt.step()
    np.testing.assert_array_equal(w, [-1.0, -1.0])


def test_letting_go_of_gradients():
    opt = fs.SGD({"w": np.zeros(2)}, lr=1.0)
    gradient = np.ones(2)
    alive = weakref.ref(gradient)
    opt.step({"w": gradient})
    opt.bind(None)
    del gradient
    assert alive() is None
    with pytest.raises(ValueError, match="none are bound"):
        opt.step()
