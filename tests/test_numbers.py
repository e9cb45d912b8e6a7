"""Numbers that rules keep for each array: in double, as arrays of shape () among the state."""

import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, setting_id, snapshot

import fusedstep as fs

NUMBERED = [(entry.optimizer, settings) for entry, settings in SETTINGS if entry.optimizer._numbers]

numbered = pytest.mark.parametrize(("optimizer", "settings"), NUMBERED, ids=setting_id)
backends = pytest.mark.parametrize("backend", ["c", "reference"])


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"w": rng.standard_normal((3, 50)).astype(dtype), "b": rng.standard_normal(5).astype(dtype)}


def grads(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((3, 50)), "b": rng.standard_normal(5)}


def numbers_of(opt):
    return [own[key] for own in opt.state.values() for key in opt._numbers]


@numbered
@backends
@pytest.mark.parametrize("state_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_are_doubles(optimizer, settings, backend, state_dtype, dtype):
    # From 0, where no step is lost in float16.
    zeros = {name: np.zeros_like(array) for name, array in params(dtype).items()}
    opt = optimizer(zeros, **settings, state_dtype=state_dtype, backend=backend)
    assert {(a.shape, a.dtype.name) for a in numbers_of(opt)} == {((), "float64")}
    assert numbers_of(opt) == [optimizer._initial_state(key, opt.param_groups[0]) for _ in zeros for key in opt._numbers]
    for _ in range(2):
        opt.step(grads(1))
    assert all(a > 0 for a in numbers_of(opt))
    assert {key: opt.nbytes[key] for key in opt._numbers} == dict.fromkeys(opt._numbers, 2 * 8)


@numbered
@backends
def test_go_on_after_loading(optimizer, settings, backend, tmp_path):
    pytest.importorskip("safetensors")
    p, q = params(), params()
    opt, other = optimizer(p, **settings, backend=backend), optimizer(q, **settings, backend=backend)
    for seed in range(3):
        opt.step(grads(seed))
    saved = opt.state_dict()
    fs.save(tmp_path / "x.safetensors", opt)
    fs.load(tmp_path / "x.safetensors", other)
    assert_same_bits(numbers_of(other), numbers_of(opt))
    opt.step(grads(3))
    other.step(grads(3))
    assert_same_bits([*q.values(), *numbers_of(other)], [*p.values(), *numbers_of(opt)])
    assert all(saved["state"][name][key] is not own[key] for name, own in opt.state.items() for key in own)


@numbered
@backends
def test_count_when_they_are_edited(optimizer, settings, backend):
    found = []
    for factor in (1, 100):
        p = params()
        opt = optimizer(p, **settings, backend=backend)
        opt.step(grads(0))
        for own in opt.state.values():
            own[opt._numbers[0]][...] *= factor
        opt.step(grads(1))
        found.append(p["w"])
    assert (found[0] != found[1]).any()


@numbered
@backends
def test_stay_when_a_step_is_not_applied(optimizer, settings, backend):
    opt = optimizer(params(), **settings, nonfinite="skip", backend=backend)
    opt.step(grads(0))
    before = snapshot(opt)
    bad = grads(1)
    bad["b"][0] = np.nan
    assert not opt.step(bad).applied
    assert snapshot(opt) == before
    opt.nonfinite = "raise"
    with pytest.raises(fs.NonFiniteGradientError):
        opt.step(bad)
    assert snapshot(opt) == before


@numbered
def test_are_checked_when_loaded(optimizer, settings):
    opt = optimizer(params(), **settings)
    opt.step(grads(0))
    key = opt._numbers[0]
    before = snapshot(opt)
    for wrong, error, message in (
        (np.zeros(1), ValueError, r"expected shape \(\), got \(1,\)"),
        (np.zeros((), np.float32), TypeError, "expected dtype float64, got float32"),
    ):
        saved = opt.state_dict()
        saved["state"]["b"][key] = wrong
        with pytest.raises(error, match=rf"^state_dict\['state'\]\['b'\]\['{key}'\]: {message}$"):
            opt.load_state_dict(saved)
    saved = opt.state_dict()
    del saved["state"]["b"][key]
    with pytest.raises(ValueError, match=r"^state_dict\['state'\]\['b'\]: expected \["):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


@numbered
def test_may_not_be_gradients(optimizer, settings):
    opt = optimizer({"b": np.ones(5)}, **settings)
    key = opt._numbers[-1]
    grad = np.lib.stride_tricks.as_strided(opt.state["b"][key], (5,), (0,))
    message = rf"^state\['b'\]\['{key}'\] and grads\['b'\]: expected separate arrays, got arrays that share memory$"
    with pytest.raises(ValueError, match=message):
        opt.step({"b": grad})


@numbered
@backends
def test_lie_where_they_are_allocated(optimizer, settings, backend):
    """Also where doubles should not lie."""
    made = {}

    def allocate(name, shape, dtype):
        room = np.zeros(int(np.prod(shape)) * dtype.itemsize + 1, np.uint8)
        made[name] = room[1:].view(dtype).reshape(shape)
        return made[name]

    p, q = params(), params()
    opt, other = optimizer(p, **settings, allocate_state=allocate, backend=backend), optimizer(q, **settings)
    for seed in range(3):
        opt.step(grads(seed))
        other.step(grads(seed))
    assert_same_bits([*p.values(), *numbers_of(opt)], [*q.values(), *numbers_of(other)])
    for key in opt._numbers:
        assert opt.state["w"][key] is made[f"w.{key}"]
        assert not made[f"w.{key}"].flags.aligned


@numbered
def test_of_single_arrays_are_checked(optimizer, settings):
    kernel = getattr(fs.kernels, optimizer._rule.__name__)
    arrays = {key: array.copy() for key, array in optimizer(np.ones(3), **settings).state["0"].items()}
    key = optimizer._numbers[0]
    values = {"param": np.ones(3), "grad": np.ones(3), "step": 1, **settings}
    for wrong, error, message in (
        (np.zeros(3), ValueError, r"expected shape \(\), got \(3,\)"),
        (np.zeros((), np.float32), TypeError, "expected dtype float64, got float32"),
    ):
        with pytest.raises(error, match=f"^{key}: {message}$"):
            kernel(**values, **{**arrays, key: wrong})
    assert (values["param"] == 1).all()
