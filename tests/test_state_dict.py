"""Saving and loading: by name, checked whole before anything changes, bit-exact resume."""

import copy
import re

import numpy as np
import pytest
from conftest import SETTINGS, setting_id, snapshot

import fusedstep as fs


def make(entry, settings, rng, backend="c", dtype=np.float32):
    params = {"w": rng.standard_normal((5, 7)).astype(dtype), "b": rng.standard_normal(3).astype(dtype)}
    return params, entry.optimizer(params, **settings, backend=backend)


def grads_like(params, rng):
    return {name: rng.standard_normal(p.shape).astype(p.dtype) for name, p in params.items()}


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_resume(entry, settings, dtype, rng):
    """Ten steps are five steps, saved and loaded, and five more; also from one backend to the other."""
    params, opt = make(entry, settings, rng, dtype=dtype)
    grads = [grads_like(params, rng) for _ in range(10)]
    for g in grads[:5]:
        opt.step(g)
    saved, saved_params = copy.deepcopy(opt.state_dict()), {k: v.copy() for k, v in params.items()}
    for g in grads[5:]:
        opt.step(g)
    for backend in ("c", "reference"):
        again = {k: v.copy() for k, v in saved_params.items()}
        other = entry.optimizer(again, lr=0.123, backend=backend)
        other.load_state_dict(saved)
        assert other.steps == 5
        for g in grads[5:]:
            other.step(g)
        assert snapshot(other) == snapshot(opt)


@pytest.fixture
def saved(rng):
    opt = fs.Adam({"w": np.ones((2, 3), np.float32), "b": np.ones(3)}, amsgrad=True)
    opt.step({"w": np.ones((2, 3), np.float32), "b": np.ones(3)})
    return opt.state_dict()


def without(key):
    def change(d):
        del d[key]

    return change  # fmt: skip


def setting(*path, value):
    def change(d):
        for key in path[:-1]:
            d = d[key]
        d[path[-1]] = value

    return change  # fmt: skip


BAD = [
    (without("step"), ValueError, "state_dict['step']: expected a value, got none"),
    (without("version"), ValueError, "state_dict['version']: expected a value, got none"),
    (setting("version", value=99), ValueError, "state_dict['version']: expected 1, got 99"),
    (setting("rule", value="AdamW"), ValueError, "state_dict['rule']: expected 'Adam', got 'AdamW'"),
    (setting("convention", value="keras"), ValueError, "state_dict['convention']: expected 'torch', got 'keras'"),
    (setting("step", value=-1), ValueError, "state_dict['step']: expected a whole number from 0 to 2**53, got -1"),
    (setting("step", value=1.5), ValueError, "state_dict['step']: expected a whole number from 0 to 2**53, got 1.5"),
    (
        setting("step", value=2**53),
        ValueError,
        f"state_dict['step']: expected a whole number from 0 to 2**53, got {2**53}",
    ),
    (
        setting("options", value={"lr": 1}),
        ValueError,
        "state_dict['options']: expected a mapping with keys among clip_norm, seed, nonfinite, got {'lr': 1}",
    ),
    (
        setting("options", "clip_norm", value=0),
        ValueError,
        "state_dict['options']['clip_norm']: expected a finite number > 0 or None, got 0",
    ),
    (
        setting("options", "nonfinite", value="hope"),
        ValueError,
        "state_dict['options']['nonfinite']: expected one of 'raise', 'skip', 'zero', 'propagate', got 'hope'",
    ),
    (
        setting("state", "b", "exp_avg", value=np.ones(4)),
        ValueError,
        "state_dict['state']['b']['exp_avg']: expected shape (3,), got (4,)",
    ),
    (
        setting("state", "b", "exp_avg", value=np.ones(3, np.float32)),
        TypeError,
        "state_dict['state']['b']['exp_avg']: expected dtype float64, got float32",
    ),
    (
        setting("state", "b", "exp_avg", value="x"),
        TypeError,
        "state_dict['state']['b']['exp_avg']: expected an array, got str",
    ),
    (
        setting("state", "b", value={}),
        ValueError,
        "state_dict['state']['b']: expected ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'], got []",
    ),
    (
        setting("state", "c", value={}),
        ValueError,
        "state_dict['state']['c']: expected a parameter's name, got a name that none has",
    ),
    (lambda d: d["state"].pop("b"), ValueError, "state_dict['state']['b']: expected state arrays, got none"),
    (
        setting("param_groups", 0, "names", value=["b", "w"]),
        ValueError,
        "state_dict['param_groups']: expected the names [['w', 'b']], got [['b', 'w']]",
    ),
    (
        setting("param_groups", 0, "warmup", value=3),
        ValueError,
        "state_dict['param_groups']: expected hyper-parameters of Adam, got 'warmup'",
    ),
    (setting("param_groups", 0, "lr", value=-1), ValueError, "lr: expected a finite number >= 0, got -1"),
    (setting("param_groups", value=None), TypeError, "state_dict['param_groups']: expected a list of mappings, got None"),
    (
        setting("param_groups", 0, "names", 0, value=[]),
        ValueError,
        "state_dict['param_groups']: expected the names [['w', 'b']], got [[[], 'b']]",
    ),
    (
        setting("param_groups", 0, "eps", value=np.zeros(2)),
        TypeError,
        "eps: expected a finite number >= 0, got array([0., 0.])",
    ),
    (setting("version", value=np.ones(2)), ValueError, "state_dict['version']: expected 1, got array([1., 1.])"),
    (
        setting("state", "b", None, value=np.ones(3)),
        ValueError,
        "state_dict['state']['b']: expected ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'], "
        "got [None, 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']",
    ),
    (
        setting("shapes", "b", value=np.ones(2)),
        ValueError,
        "state_dict['shapes']['b']: expected [3], got array([1., 1.])",
    ),
    (
        setting("memory_axes", "w", 0, value=np.ones(2)),
        ValueError,
        "state_dict['memory_axes']['w']: expected an order of the axes, got [array([1., 1.]), 1]",
    ),
    (setting("state", value=[1]), TypeError, "state_dict['state']: expected a mapping of mappings, got [1]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_state_changes_nothing(change, error, message, saved):
    opt = fs.Adam({"w": np.ones((2, 3), np.float32), "b": np.ones(3)}, lr=0.5)
    before, groups = snapshot(opt), copy.deepcopy(opt.param_groups)
    change(saved)
    with pytest.raises(error) as caught:
        opt.load_state_dict(saved)
    assert str(caught.value) == message
    assert snapshot(opt) == before
    assert str(opt.param_groups) == str(groups)


def test_numbers_of_numpy(saved):
    saved["step"], saved["options"]["seed"] = np.int64(3), np.int64(5)
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3)}
    opt = fs.Adam(params, accumulate_dtype="float32")
    opt.load_state_dict(saved)
    assert (opt.steps, opt.seed) == (3, 5)
    opt.accumulate({name: p.copy() for name, p in params.items()})  # whose random bits have a seed below it
    assert opt.step().step == 4


def test_not_a_mapping():
    with pytest.raises(TypeError, match="^state_dict: expected a mapping, got list$"):
        fs.SGD([np.ones(2)]).load_state_dict([])


def test_partial_load(saved):
    opt = fs.Adam({"w": np.ones((2, 3), np.float32), "new": np.ones(2)}, amsgrad=True)
    opt.load_state_dict(saved, strict=False)
    np.testing.assert_array_equal(opt.state["w"]["exp_avg"], saved["state"]["w"]["exp_avg"])
    assert not opt.state["new"]["exp_avg"].any()
    assert opt.steps == 1


def test_partial_load_that_calls_for_more_state(saved):
    """The loaded hyper-parameters switch AMSGrad on; arrays that were not loaded start from 0."""
    opt = fs.Adam({"w": np.ones((2, 3), np.float32), "new": np.ones(2)})
    opt.load_state_dict(saved, strict=False)
    assert not opt.state["new"]["max_exp_avg_sq"].any()
    opt.step({"w": np.ones((2, 3), np.float32), "new": np.ones(2)})


def test_state_dict_is_a_copy(saved):
    opt = fs.Adam({"w": np.ones((2, 3), np.float32), "b": np.ones(3)})
    opt.load_state_dict(saved)
    opt.step({"w": np.ones((2, 3), np.float32), "b": np.ones(3)})
    assert saved["step"] == 1
    assert not np.array_equal(saved["state"]["b"]["exp_avg"], opt.state["b"]["exp_avg"])


def test_callables_stay_with_their_owner():
    opt = fs.SGD([np.ones(2)], lr=lambda step: 0.5, momentum=0.9)
    opt.step([np.ones(2)])
    saved = opt.state_dict()
    assert "lr" not in saved["param_groups"][0]
    p = np.ones(2)
    other = fs.SGD([p], lr=lambda step: float(step))
    other.load_state_dict(saved)
    other.step([np.zeros(2)])
    np.testing.assert_array_equal(p, 1 - 1.0 * 0.9 * 1.0)


def test_hyperparameters_edited_before_saving():
    """State follows the rule that the hyper-parameters call for, also between steps."""
    p = np.ones(2)
    opt = fs.SGD([p], lr=0.5, momentum=0.9)
    opt.step([np.ones(2)])
    opt.param_groups[0]["momentum"] = 0.0
    other = fs.SGD([np.ones(2)])
    other.load_state_dict(opt.state_dict())
    assert other.state["0"] == {}
    opt.step([np.ones(2)])
    opt.param_groups[0]["momentum"] = 0.5
    other.load_state_dict(opt.state_dict())
    assert not other.state["0"]["momentum_buffer"].any()


def test_hyper_parameters_go_by_names():
    """As state does, where not all names are there: not by the place of a group."""

    def optimizer(**rates):
        return fs.SGD([{"params": {name: np.ones(2)}, "lr": lr} for name, lr in rates.items()])

    opt = optimizer(b=0.9, z=0.7, a=0.8)
    opt.load_state_dict(optimizer(a=0.1, b=0.2).state_dict(), strict=False)
    assert [(group["names"], group["lr"]) for group in opt.param_groups] == [(["b"], 0.2), (["z"], 0.7), (["a"], 0.1)]

    both = fs.SGD([{"params": {"a": np.ones(2), "b": np.ones(2)}, "lr": 0.5}])
    message = "state_dict['param_groups']: expected one lr for ['a', 'b'], got 0.1 and 0.2"
    with pytest.raises(ValueError, match=re.escape(message)):
        both.load_state_dict(optimizer(a=0.1, b=0.2).state_dict(), strict=False)
    assert both.param_groups[0]["lr"] == 0.5


def test_shapes_are_checked_without_state():
    """Plain gradient descent has none that would tell."""
    opt = fs.SGD({"w": np.ones(3)}, lr=0.1)
    with pytest.raises(ValueError, match=re.escape("state_dict['shapes']['w']: expected [3], got [4]")):
        opt.load_state_dict(fs.SGD({"w": np.ones(4)}, lr=0.5).state_dict())
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("key", "value"), [("param_groups", [{"names": 3}]), ("memory_axes", {"w": ["x", 0]}), ("shapes", 3)], ids=str
)
def test_nonsense_is_refused_by_name(key, value):
    opt = fs.SGD({"w": np.ones((2, 2))}, lr=0.1, momentum=0.5)
    with pytest.raises((TypeError, ValueError), match=re.escape(f"state_dict['{key}']")):
        opt.load_state_dict({**opt.state_dict(), key: value})
