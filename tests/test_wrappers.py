"""Lookahead and SAM: against optax and worked values, bits of both backends, and whole or not at all."""

import contextlib
import copy
import gc
import random
import signal

import ml_dtypes
import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, float64_in_jax, setting_id, snapshot

import fusedstep as fs
from fusedstep import database

BACKENDS = ["c", "reference"]


def make_params(rng):
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((6, 4)).astype(np.float16).T[::2],
        "c": rng.standard_normal(1100),
        "d": np.array(0.5, np.float32),
        "e": rng.standard_normal(9).astype(ml_dtypes.bfloat16)[::-1],
        "f": np.zeros((0, 2)),
    }


def gradients_at(params):
    """Of some function of the parameters, in types of their own."""
    return {name: np.sin(3 * p.astype(np.float64)).astype(p.dtype) for name, p in params.items()}


def everything(opt, params):
    return [*params.values(), *(a for own in opt.state.values() for a in own.values())]


def close(found, wanted):
    """To 1e-13 of the largest; at most 4e-16 were seen."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())


# ---- Lookahead ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8), (1, 0.3)])
def test_lookahead_as_in_optax(rule, k, alpha, rng):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    w = rng.standard_normal(50)
    params = {"w": w.copy()}
    opt = fs.SGD(params, lr=0.1, momentum=0.9) if rule == "SGD" else fs.Adam(params, lr=0.1)
    lookahead = fs.Lookahead(opt, k, alpha)
    with float64_in_jax():
        theirs = optax.sgd(0.1, momentum=0.9) if rule == "SGD" else optax.adam(0.1)
        theirs = optax.lookahead(theirs, sync_period=k, slow_step_size=alpha)
        both = optax.LookaheadParams.init_synced(jax.numpy.asarray(w))
        state = theirs.init(both)
        for _ in range(23):
            updates, state = theirs.update(jax.numpy.sin(both.fast), state, both)
            both = optax.apply_updates(both, updates)
            lookahead.step({"w": np.sin(params["w"])})
            close(params["w"], both.fast)
            close(opt.averages["w"], both.slow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lookahead_by_hand(backend, dtype, rng):
    """The slow weights to the last bit, and untouched in between."""
    w = rng.standard_normal(100).astype(dtype)
    w[0] = -0.0
    slow, fast = w.copy(), w.copy()
    opt = fs.Lookahead(fs.SGD(w, lr=0.5, backend=backend), k=3, alpha=0.75)
    for step in range(1, 10):
        g = rng.standard_normal(100).astype(dtype)
        g[0] = 0.0
        assert opt.step(g).step == opt.steps == step
        fast = fast - dtype(0.5) * g
        if step % 3 == 0:
            slow = fast = slow + dtype(0.75) * (fast - slow)
        assert_same_bits([w, opt.opt.averages["0"]], [fast, slow])


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_same_bits_by_both_backends(entry, settings, rng):
    found = []
    for backend in BACKENDS:
        params = make_params(np.random.default_rng(1))
        opt = entry.optimizer(params, **settings, backend=backend)
        wrapped = fs.SAM(fs.Lookahead(opt, k=2), adaptive=True)
        for _ in range(4):
            wrapped.step(lambda params=params: gradients_at(params))
        found.append(everything(opt, params))
    assert_same_bits(*found)
    assert all(np.isfinite(a.astype(np.float64)).all() for a in found[0])


@pytest.mark.parametrize("options", database.LOW_PRECISION, ids=setting_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lookahead_of_16_bits(options, backend, rng):
    """Slow weights are in float32; what parameters have no room for, and is kept beside them, is that of the slow weights."""
    options = {**options, "ema_decay": None, "max_norm": None, "clip_adaptive": None, "backend": backend}
    start = rng.standard_normal((6, 7)).astype(ml_dtypes.bfloat16)
    params = {"w": start.copy().T}
    opt = fs.SGD(params, lr=0.25, **options)
    lookahead = fs.Lookahead(opt, k=2)
    for _ in range(4):
        lookahead.step({"w": np.full((7, 6), 0.001)})
    slow = opt.averages["w"]
    assert slow.dtype == np.float32
    assert_same_bits([params["w"]], [slow.astype(ml_dtypes.bfloat16)])
    own = opt.state["w"]
    if "master" in own:
        assert_same_bits([own["master"]], [slow])
    if "compensation" in own:
        assert_same_bits([own["compensation"]], [(slow - params["w"].astype(np.float32)).astype(ml_dtypes.bfloat16)])
    if "remainder" in own:
        whole = (params["w"].astype(np.float32).view(np.int32) + own["remainder"]).view(np.float32)
        assert_same_bits([whole], [slow])
    if options["low_precision"] != "stochastic":  # exact but for the last digits: far less than bfloat16 could hold
        np.testing.assert_allclose(slow - start.T.astype(np.float32), -0.0005, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_do_not_count(backend):
    w, v = np.zeros(2), np.zeros(2)
    opts = [fs.Lookahead(fs.SGD(p, lr=1.0, nonfinite="skip", backend=backend), k=2) for p in (w, v)]
    for i in range(6):
        assert not opts[0].step(np.array([np.nan, 1.0])).applied
        assert opts[0].steps == i
        for opt in opts:
            opt.step(np.ones(2))
        np.testing.assert_array_equal(w, v)
    np.testing.assert_array_equal(w, -3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_with_a_decay_of_1_is_not_touched(backend):
    w = np.array([-0.0, 1.0])
    opt = fs.SGD(w, lr=1.0, ema_decay=1.0, nonfinite="propagate", backend=backend)
    opt.step(np.array([np.inf, np.nan]))
    assert_same_bits([opt.averages["0"]], [np.array([-0.0, 1.0])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_before", [1, 2, 3, 4])
@pytest.mark.parametrize("by_file", [False, True])
def test_lookahead_resumes(backend, n_before, by_file, tmp_path):
    def make():
        params = make_params(np.random.default_rng(2))
        opt = fs.AdamW(params, lr=0.1, clip_norm=1.0, low_precision="kahan", backend=backend)
        return params, fs.Lookahead(opt, k=3)

    params, whole = make()
    first_params, first = make()
    for _ in range(7):
        whole.step(gradients_at(params))
    for _ in range(n_before):
        first.step(gradients_at(first_params))
    second_params, second = make()
    if by_file:
        fs.save(tmp_path / "checkpoint", first)
        fs.load(tmp_path / "checkpoint", second)
    else:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for name, p in first_params.items():
            second_params[name][...] = p
    assert second.steps == n_before
    for _ in range(7 - n_before):
        second.step(gradients_at(second_params))
    assert_same_bits(everything(second.opt, second_params), everything(whole.opt, params))


@pytest.mark.parametrize("settle", ["step", "state_dict", "save", "SAM"])
def test_interrupted_before_the_exchange(settle, monkeypatch, tmp_path):
    def make():
        params = make_params(np.random.default_rng(3))
        return params, fs.Lookahead(fs.Adam(params, lr=0.1), k=2)

    (params, opt), (plain_params, plain) = make(), make()
    for each, p in ((opt, params), (plain, plain_params)):
        each.step(gradients_at(p))
    exchange, calls = opt._exchange_if_due, []

    def interrupted():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        exchange()

    monkeypatch.setattr(opt, "_exchange_if_due", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(gradients_at(params))
    plain.step(gradients_at(plain_params))
    assert opt.steps == 2
    assert (params["a"] != plain_params["a"]).all()
    if settle == "state_dict":
        opt.state_dict()
    elif settle == "save":
        fs.save(tmp_path / "checkpoint", opt)
    elif settle == "SAM":
        with pytest.raises(KeyError):
            fs.SAM(opt).step(lambda: params["none"])
    else:
        with pytest.raises(TypeError, match="expected a mapping"):
            opt.step(np.ones(2))
    assert_same_bits(everything(opt.opt, params), everything(plain.opt, plain_params))


def test_lookahead_and_groups():
    params = {"a": np.zeros(2), "b": np.zeros(2), "frozen": np.zeros(2)}
    opt = fs.Lookahead(fs.SGD(fs.group(params, {"b": {"lr": 2.0}, "frozen": None}), lr=1.0), k=2)
    for _ in range(2):
        opt.step({"a": np.ones(2), "b": np.ones(2)})
    assert [p[0] for p in params.values()] == [-1.0, -2.0, 0.0]
    with opt.opt.averaged():
        assert params["a"][0] == -1.0


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_no_exchange_for_a_step_that_was_not_taken(policy):
    """Even if a state dict brings its number of steps."""
    w, other = np.zeros(1), np.zeros(1)
    opt = fs.Lookahead(fs.SGD(w, lr=1.0, nonfinite=policy), k=2)
    third = fs.Lookahead(fs.SGD(other, lr=1.0), k=3)
    for _ in range(2):
        third.step(np.ones(1))
    opt.step(np.ones(1))
    with contextlib.suppress(fs.NonFiniteGradientError):
        opt.step(np.full(1, np.nan))
    opt.load_state_dict(third.state_dict())
    assert (opt.steps, opt.state_dict()["step"], w[0]) == (2, 2, -1.0)


def test_lookahead_whose_average_is_edited_away():
    w = np.zeros(2)
    opt = fs.Lookahead(fs.SGD(w, lr=1.0), k=1)
    opt.step(np.ones(2))
    opt.opt.param_groups[0]["ema_decay"] = None
    opt.step(np.ones(2))
    assert w.tolist() == [-1.5, -1.5]


# ---- SAM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_sam_as_in_optax(rule, rng):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax.contrib")
    optax_all = pytest.importorskip("optax")
    params = {"w": rng.standard_normal(50), "v": rng.standard_normal((3, 4))}
    with float64_in_jax():
        theirs = optax_all.sgd(0.1, momentum=0.9) if rule == "SGD" else optax_all.adam(0.1)
        theirs = optax.sam(theirs, optax_all.chain(optax.normalize(), optax_all.sgd(0.3)))
        their_params = jax.tree.map(jax.numpy.asarray, params)
        state = theirs.init(their_params)
        opt = fs.SGD(params, lr=0.1, momentum=0.9) if rule == "SGD" else fs.Adam(params, lr=0.1)
        sam = fs.SAM(opt, rho=0.3)
        for _ in range(20):
            for _ in range(2):
                updates, state = theirs.update(jax.tree.map(jax.numpy.sin, their_params), state, their_params)
                their_params = optax_all.apply_updates(their_params, updates)
            sam.step(lambda: {name: np.sin(p) for name, p in params.items()})
            for name, p in params.items():
                close(p, their_params[name])


def places(wrapped, params, gradient):
    """The values that the closure finds in its two calls."""
    seen = []

    def closure():
        seen.append([p.copy() for p in params])
        return [gradient(p) for p in params]

    wrapped.step(closure)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("settings", "nearby"),
    [
        ({}, [[3.75], [5.0]]),  # rho g / ||g|| = 1.25 * (3, 4) / 5
        ({"adaptive": True}, [[3 + 1.25 * 27 / 337**0.5], [4 + 1.25 * 64 / 337**0.5]]),  # p**2 g, by the norm of p g
    ],
)
def test_sam_by_hand(backend, settings, nearby):
    params = [np.array([3.0]), np.array([4.0])]
    sam = fs.SAM(fs.SGD(params, lr=0.5, backend=backend), rho=1.25, **settings)
    first, second = places(sam, params, np.copy)
    assert first == [[3.0], [4.0]]
    np.testing.assert_allclose(second, nearby, rtol=1e-15)
    np.testing.assert_array_equal(params, np.array(first) - 0.5 * np.array(second))


def test_sam_maximizes_near_where_it_is_least():
    params = [np.array([3.0]), np.array([4.0])]
    sam = fs.SAM(fs.SGD(params, lr=0.5, maximize=True), rho=1.25)
    np.testing.assert_array_equal(places(sam, params, np.copy)[1], [[2.25], [3.0]])


@pytest.mark.parametrize("size", [1e-300, 0.0, 1e300])
def test_sam_of_extreme_gradients(size):
    params = [np.array([3.0]), np.array([4.0])]
    sam = fs.SAM(fs.SGD(params, lr=0.0), rho=1.25)
    wanted = [[3.0], [4.0]] if size == 0 else [[3.75], [5.0]]
    np.testing.assert_allclose(places(sam, params, lambda p: size * p)[1], wanted, rtol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_closure_raises(backend, error, call, rng):
    params = make_params(rng)
    params["a"][0, :2] = [-0.0, np.nan]
    params["b"][0, 0] = np.inf
    opt = fs.Adam(params, backend=backend)
    sam = fs.SAM(opt, rho=1.0)
    before, calls = snapshot(opt), []

    def closure():
        calls.append(snapshot(opt))
        if len(calls) == call:
            raise error
        return {name: np.ones(p.shape) for name, p in params.items()}

    with pytest.raises(error):
        sam.step(closure)
    assert len(calls) == call
    assert calls[0] == before
    assert call == 1 or calls[1] != before
    assert snapshot(opt) == before
    assert sam.step(lambda: {name: np.ones(p.shape) for name, p in params.items()}).applied


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("call", [1, 2])
def test_sam_with_nonfinite_gradients(backend, policy, call, rng):
    params = make_params(rng)
    opt = fs.Adam(params, backend=backend, nonfinite=policy)
    before, calls = snapshot(opt), []

    def closure():
        calls.append(0)
        grads = gradients_at(params)
        if len(calls) == call:
            grads["c"][3] = np.inf
        return grads

    sam = fs.SAM(opt)
    if policy == "raise":
        with pytest.raises(fs.NonFiniteGradientError, match="'c'"):
            sam.step(closure)
    else:
        report = sam.step(closure)
        assert (report.applied, report.nonfinite) == (False, {"c": 1})
    assert len(calls) == call
    assert snapshot(opt) == before


def test_sam_with_nonfinite_gradients_as_0():
    params = [np.array([3.0]), np.array([4.0]), np.array([1.0])]
    sam = fs.SAM(fs.SGD(params, lr=0.5, nonfinite="zero"), rho=1.25)
    second = places(sam, params, lambda p: p * (np.nan if p[0] == 1.0 else 1.0))[1]
    np.testing.assert_array_equal(second, [[3.75], [5.0], [1.0]])


@pytest.mark.parametrize("call", [1, 2])
def test_closure_without_gradients(call):
    """Those bound by an earlier step are not taken."""
    w = np.ones(2)
    opt = fs.SAM(fs.SGD(w, lr=0.5))
    opt.step(lambda: w.copy())
    before = w.copy()
    results = iter([None] if call == 1 else [w.copy(), None])
    with pytest.raises(TypeError, match="^closure: expected one that returns gradients, got None from it$"):
        opt.step(lambda: next(results))
    np.testing.assert_array_equal(w, before)
    assert opt.steps == 1


def test_no_step_within_the_closure():
    w = np.ones(2)
    opt = fs.SGD(w, lr=0.5)
    sam = fs.SAM(opt)
    calls = []

    def closure():
        calls.append(0)
        if len(calls) == 2:
            opt.step(np.ones(2))
        return np.ones(2)

    with pytest.raises(RuntimeError) as caught:
        sam.step(closure)
    assert str(caught.value) == (
        "step: expected the parameters in their arrays, got others (within the closure of SAM.step)"
    )
    assert w.tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match=r"^params: expected the parameters in their arrays, got others"):
        sam.step(lambda: sam.step(lambda: np.ones(2)) and np.ones(2) if (w != 1).any() else np.ones(2))


def test_sam_of_arrays_made_read_only():
    params = [np.ones(2), np.ones(2)]
    opt = fs.SGD(params, lr=0.5)
    params[1].flags.writeable = False
    with pytest.raises(ValueError) as caught:
        fs.SAM(opt).step(lambda: [np.ones(2), np.ones(2)])
    assert str(caught.value) == "params['1']: expected a writeable array, got a read-only one"
    assert params[0].tolist() == [1.0, 1.0]


def test_sam_with_scaled_and_cleared_gradients():
    w, v = np.ones(4, np.float16), np.ones(4, np.float16)
    grad = np.zeros(4, np.float16)

    def closure():
        grad[...] = w * np.float16(256)
        return grad

    scaler = fs.DynamicLossScaler(init_scale=256.0)
    assert scaler.step(fs.SAM(fs.Lookahead(fs.SGD(w, lr=0.5, nonfinite="skip"))), closure, zero_grads=True).applied
    fs.SAM(fs.SGD(v, lr=0.5)).step(lambda: v.copy())
    np.testing.assert_array_equal(w, v)
    assert not grad.any()


# ---- Both ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupts_at_random(backend):
    """The parameters are those after `steps` steps, but for an exchange that is still to come."""

    def make():
        params = {"a": np.ones(3000), "b": np.ones((2, 50), np.float32)[:, ::2]}
        return params, fs.SAM(fs.Lookahead(fs.SGD(params, lr=0.1, backend=backend), k=2))

    def closure():
        return {name: p.copy() for name, p in params.items()}

    params, sam = make()
    history = []
    for _ in range(3000):
        history.append([p.copy() for p in params.values()])
        sam.step(closure)
    params, sam = make()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # in what is called by it, and by weak references, interrupts are lost
    caught = 0
    rng = random.Random(0)
    try:
        kept = [sam]
        while caught < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.002 * rng.random())
                for _ in range(1000):  # until it comes; again, if it is lost
                    sam.step(closure)
                    if sam.steps > len(history) - 50:
                        params, sam = make()
                        kept.append(sam)
            except KeyboardInterrupt:
                caught += 1
                sam._settled()
                assert_same_bits(list(params.values()), history[sam.steps])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda opt: fs.Lookahead(np.ones(3)), TypeError, "opt: expected an optimizer, got ndarray"),
        (lambda opt: fs.Lookahead(fs.SAM(opt)), TypeError, "opt: expected an optimizer, got SAM"),
        (lambda opt: fs.Lookahead(opt, k=0), ValueError, "k: expected at least 1, got 0"),
        (lambda opt: fs.Lookahead(opt, k=2.0), TypeError, "k: expected a whole number, got 2.0"),
        (lambda opt: fs.Lookahead(opt, alpha=0), ValueError, "alpha: expected a number in (0, 1], got 0"),
        (lambda opt: fs.Lookahead(opt, alpha=1.5), ValueError, "alpha: expected a number in (0, 1], got 1.5"),
        (lambda opt: fs.Lookahead(fs.SGD(np.ones(2), ema_decay=0.5)), ValueError,
         "opt: expected an optimizer without ema_decay, got one with 0.5"),
        (lambda opt: fs.Lookahead(fs.Lookahead(opt).opt), ValueError,
         "opt: expected an optimizer without ema_decay, got one with SlowDecay(k=5, alpha=0.5)"),
        (lambda opt: fs.SAM(None), TypeError, "opt: expected an optimizer, got NoneType"),
        (lambda opt: fs.SAM(opt, rho=-1.0), ValueError, "rho: expected a finite number >= 0, got -1.0"),
        (lambda opt: fs.SAM(opt, adaptive=1), TypeError, "adaptive: expected True or False, got 1"),
        (lambda opt: fs.SAM(opt).step(np.ones(2)), TypeError,
         "closure: expected a callable that returns gradients, got array([1., 1.])"),
        (lambda opt: fs.SAM(opt).step(lambda: np.ones(3)), ValueError, "grads['0']: expected shape (2,), got (3,)"),
        (lambda opt: fs.SAM(opt).step(lambda: None), TypeError, "closure: expected one that returns gradients, got None from it"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    w = np.ones(2)
    opt = fs.SGD(w, lr=0.5)
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        make(opt)
    assert str(caught.value) == message
    assert snapshot(opt)[0] == before[0]
    assert opt.steps == 0


def test_settings_that_are_fixed():
    opt = fs.Lookahead(fs.SGD(np.ones(2)), k=3)
    for name in ("k", "alpha"):
        with pytest.raises(AttributeError, match=name):
            setattr(opt, name, 1)
    assert (opt.k, opt.alpha) == (3, 0.5)


def test_repr():
    opt = fs.SAM(fs.Lookahead(fs.SGD(np.ones(2)), k=3), rho=0.5)
    assert repr(opt).startswith("SAM(Lookahead(<SGD after 0 steps")
    assert repr(opt).endswith(", k=3, alpha=0.5), rho=0.5, adaptive=False)")
