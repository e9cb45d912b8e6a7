"""Steps that repeat the last one take a short way: whatever is new since then must be noticed, and wrong things refused."""

import itertools

import numpy as np
import pytest
from conftest import assert_same_bits

import fusedstep as fs

SIZES = (5, 1000, 0, 3)


def make_arrays(rng, form):
    arrays = [rng.standard_normal(n).astype(np.float32) for n in SIZES]
    if form == "one":
        return arrays[1]
    if form == "list":
        return arrays
    if form == "dict":
        return dict(zip("wxyz", arrays))
    if form == "nested":
        return {"a": {"w": arrays[0], "b": arrays[1:2]}, "c": (arrays[2], arrays[3])}
    return [{"params": arrays[:2], "lr": 0.5}, {"params": {"y": arrays[2], "z": arrays[3]}}]  # groups


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree] if isinstance(tree, np.ndarray) else []


def copied(tree):
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree.copy() if isinstance(tree, np.ndarray) else tree


def as_gradients(tree):
    """The same structure without the hyper-parameters of groups."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return [copied(group["params"]) for group in tree]
    return copied(tree)


def used_short_way(opt, monkeypatch, *args, **kwargs):
    """Take a step; whether it was the short one."""
    long = []
    original = type(opt)._step
    with monkeypatch.context() as patch:
        patch.setattr(type(opt), "_step", lambda *a: long.append(1) or original(*a))
        opt.step(*args, **kwargs)
    return not long


def edit_lr(opt, grads):
    opt.param_groups[0]["lr"] = 0.25
    return {}


def edit_every_group(opt, grads):
    for i, group in enumerate(opt.param_groups):
        group["weight_decay"] = 0.1 + i
    return {}


def make_lr_callable(opt, grads):
    opt.param_groups[-1]["lr"] = lambda step: 1 / (step + 1)
    return {}


def lr_there_and_back_with_a_state_dict_between(opt, grads):
    before = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = 0.9
    opt.state_dict()
    opt.param_groups[0]["lr"] = before
    return {}


def lr_there_and_back_beside_a_schedule_with_averages_between(opt, grads):
    group = opt.param_groups[0]
    group["weight_decay"] = lambda step: 0.1 * step
    for _ in range(2):
        opt.step(grads)
    before, group["lr"] = group["lr"], 0.9
    assert opt.averages == {}  # for which hyper-parameters are looked at
    group["lr"] = before
    return {}


def callable_there_and_back(opt, grads):
    before = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = lambda step: 0.75
    opt.step(grads)
    opt.param_groups[0]["lr"] = before
    return {}


def clip_norm_there_and_back(opt, grads):
    before, opt.clip_norm = opt.clip_norm, 0.01
    opt.step(grads)
    opt.clip_norm = before
    return {}


def make_clip_norm_callable(opt, grads):
    opt.clip_norm = lambda step: 1 / (step + 1)
    return {}


def exchange_a_group(opt, grads):
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.125}
    return {}


def exchange_all_groups(opt, grads):
    opt.param_groups = [{**group, "maximize": True} for group in opt.param_groups]
    return {}


def add_a_kind_of_state(opt, grads):
    for group in opt.param_groups:
        group["amsgrad"] = True
    return {}


def edit_nonfinite(opt, grads):
    opt.nonfinite = "zero"
    leaves(grads)[0][-1:] = np.nan
    return {}


def edit_num_threads(opt, grads):
    opt.num_threads = 2
    return {}


def scale(opt, grads):
    return {"grad_scale": 3.0}


def scale_by_an_integer(opt, grads):
    return {"grad_scale": 4}


def scale_by_numpy(opt, grads):
    return {"grad_scale": np.float32(0.5)}


def clear(opt, grads):
    return {"zero_grads": True}


def load(opt, grads):
    saved = opt.state_dict()
    opt.step(grads)
    opt.load_state_dict(saved)
    return {}


def same(opt, grads):
    return {}


CHANGES = [
    same, edit_lr, edit_every_group, make_lr_callable, lr_there_and_back_with_a_state_dict_between,
    lr_there_and_back_beside_a_schedule_with_averages_between, callable_there_and_back,
    clip_norm_there_and_back, make_clip_norm_callable, exchange_a_group, exchange_all_groups, add_a_kind_of_state,
    edit_nonfinite, edit_num_threads, scale, scale_by_an_integer, scale_by_numpy, clear, load,
]  # fmt: skip


@pytest.mark.parametrize(("binds", "stats"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("form", ["one", "list", "dict", "nested", "groups"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change, form, binds, stats, rng):
    params = make_arrays(rng, form)
    grads = as_gradients(make_arrays(rng, form))
    found = []
    for backend in ("c", "reference"):
        own, own_grads = copied(params), copied(grads)
        opt = fs.Adam(own, lr=0.1, clip_norm=2.0, stats=stats, backend=backend)
        if binds:
            opt.bind(own_grads)
        given = None if binds else own_grads
        reports = [opt.step(given), opt.step(given)]
        options = change(opt, own_grads)
        reports += [opt.step(given, **options), opt.step(given), opt.step(given, **options)]
        found.append((reports, [*leaves(own), *leaves(own_grads), *leaves_of_state(opt)]))
    (compiled_reports, compiled), (reference_reports, reference) = found
    assert compiled_reports == reference_reports
    assert_same_bits(compiled, reference)


@pytest.mark.parametrize("what", ["params", "grads", "state"])
def test_a_schedule_that_makes_arrays_read_only(what):
    """They are looked at after it."""
    w, g = np.ones(3), np.ones(3)

    def lr(step):
        if step == 1:
            {"params": w, "grads": g, "state": opt.state["w"]["momentum_buffer"]}[what].flags.writeable = False
        return 0.5

    opt = fs.SGD({"w": w}, lr=lr, momentum=0.5)
    opt.step({"w": g})
    with pytest.raises(ValueError, match=rf"^{what}\['w'\].*: expected a writeable array"):
        opt.step({"w": g}, zero_grads=what == "grads")
    assert opt.steps == 1
    assert w.tolist() == [0.5] * 3


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("form", ["one", "list", "dict", "nested", "groups"])
def test_the_short_way_is_taken(form, stats, rng, monkeypatch):
    params, grads = make_arrays(rng, form), as_gradients(make_arrays(rng, form))
    opt = fs.Adam(params, clip_norm=1.0, stats=stats)
    assert not used_short_way(opt, monkeypatch, grads)
    for _ in range(2):
        assert used_short_way(opt, monkeypatch, grads)
        assert used_short_way(opt, monkeypatch, copied(grads))
        assert used_short_way(opt, monkeypatch, grads, zero_grads=True)
        assert used_short_way(opt, monkeypatch)
    assert not used_short_way(opt, monkeypatch, grads, grad_scale=2.0)
    assert used_short_way(opt, monkeypatch, grads, grad_scale=2.0)
    opt.param_groups[0]["lr"] = 0.25
    assert not used_short_way(opt, monkeypatch, grads, grad_scale=2.0)


def read_only_param(opt, params, grads):
    params[1].flags.writeable = False
    return r"params\['1'\]: expected a writeable array, got a read-only one", {}


def read_only_grad(opt, params, grads):
    grads[1].flags.writeable = False
    return r"grads\['1'\]: expected a writeable array for zero_grads=True, got a read-only one", {"zero_grads": True}


def read_only_state(opt, params, grads):
    opt.state["3"]["exp_avg_sq"].flags.writeable = False
    return r"state\['3'\]\['exp_avg_sq'\]: expected a writeable array, got a read-only one", {}


def resized_param(opt, params, grads):
    params[1].resize(2000, refcheck=False)
    return r"params\['1'\]: expected the memory and shape it had, got others", {}


def reshaped_param(opt, params, grads):
    params[1].resize((10, 100), refcheck=False)
    return r"params\['1'\]: expected the memory and shape it had, got others", {}


def wrong_shape(opt, params, grads):
    grads[3] = np.ones(4, np.float32)
    return r"grads\['3'\]: expected shape \(3,\), got \(4,\)", {}


def resized_grad(opt, params, grads):
    grads[3].resize(300, refcheck=False)
    return r"grads\['3'\]: expected shape \(3,\), got \(300,\)", {}


def wrong_dtype(opt, params, grads):
    grads[3] = np.ones(3, np.int32)
    return r"grads\['3'\]: expected dtype .*, got int32", {}


def too_few(opt, params, grads):
    del grads[3]
    return "grads: expected 4 arrays, got 3", {}


def gradient_is_a_parameter(opt, params, grads):
    grads[3] = params[1][997:]
    return r"params\['1'\] and grads\['3'\]: expected separate arrays, got arrays that share memory", {}


def gradient_is_state(opt, params, grads):
    grads[0] = opt.state["1"]["exp_avg"][:5]
    return r".*: expected separate arrays, got arrays that share memory", {}


def nan_in_the_last(opt, params, grads):
    grads[3][-1] = np.nan
    return r".*'3'", {}


def wrong_scale(opt, params, grads):
    return r"grad_scale: expected a number in \[1e-37, 1e37\], got nan", {"grad_scale": np.nan}


def wrong_lr(opt, params, grads):
    opt.param_groups[0]["lr"] = -1.0
    return r"lr: expected a finite number >= 0, got -1.0", {}


def wrong_policy(opt, params, grads):
    opt.nonfinite = "Raise"
    return r"nonfinite: expected one of .*, got 'Raise'", {}


WRONG = [
    read_only_param, read_only_grad, read_only_state, resized_param, reshaped_param, wrong_shape, resized_grad, wrong_dtype, too_few,
    gradient_is_a_parameter, gradient_is_state, nan_in_the_last, wrong_scale, wrong_lr, wrong_policy,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_things_are_refused(wrong, rng):
    params, grads = make_arrays(rng, "list"), make_arrays(rng, "list")
    opt = fs.Adam(params)
    for _ in range(3):
        opt.step(grads)
    message, options = wrong(opt, params, grads)
    before = [a.copy() for a in itertools.chain(params, *(own.values() for own in opt.state.values()))]
    for _ in range(2):  # and again
        with pytest.raises((TypeError, ValueError, ArithmeticError), match=f"^{message}"):
            opt.step(grads, **options)
    after = itertools.chain(params, *(own.values() for own in opt.state.values()))
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a, b)
    assert opt.steps == 3


def test_bound_gradients_that_were_resized():
    grad = np.ones(3)
    opt = fs.SGD([np.ones(3)], lr=0.5)
    opt.bind([grad])
    opt.step()
    opt.step()
    grad.resize(3000, refcheck=False)
    with pytest.raises(ValueError, match=r"^grads\['0'\]: expected shape \(3,\), got \(3000,\)$"):
        opt.step()


def test_the_form_still_matters():
    """The bound array itself, where a list of it is wanted."""
    grad = np.ones(3)
    opt = fs.SGD([np.ones(3)])
    opt.step([grad])
    for wrong in (grad, (grad, grad), {"0": grad}):
        with pytest.raises((TypeError, ValueError), match="^grads: expected "):
            opt.step(wrong)
    assert opt.step([grad]).step == 2


def test_interleaved_arrays():
    """Gradients between the parameters of one matrix: their ranges of addresses meet, they do not."""
    matrix = np.ones((100, 4), np.float32)
    opt = fs.SGD([matrix[:, 0], matrix[:, 2]], lr=0.5)
    for _ in range(3):
        opt.step([matrix[:, 1], matrix[:, 3]])
    np.testing.assert_array_equal(matrix, np.tile(np.float32([-0.5, 1, -0.5, 1]), (100, 1)))
    with pytest.raises(ValueError, match=r"^params\['1'\] and grads\['0'\]: expected separate arrays"):
        opt.step([matrix[:, 2], matrix[:, 3]])


@pytest.mark.parametrize("form", ["one", "list", "dict", "nested", "groups"])
def test_new_gradients_every_step(form, rng):
    """Elsewhere, of another type, of another layout."""
    params = make_arrays(rng, form)
    steps = [as_gradients(make_arrays(rng, form)) for _ in range(6)]
    found = []
    for backend in ("c", "reference"):
        own = copied(params)
        opt = fs.SGD(own, lr=0.1, momentum=0.9, backend=backend)
        norms = [opt.step(converted(grads, i)).grad_norm for i, grads in enumerate(steps)]
        found.append([*leaves(own), *leaves_of_state(opt), np.array(norms)])
    assert_same_bits(*found)


def converted(tree, i):
    """A tree of gradients in another form for each step."""
    if isinstance(tree, dict):
        return {key: converted(value, i) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(converted(value, i) for value in tree)
    if i % 3 == 1:
        return tree.astype(np.float64)
    return np.repeat(tree, 2)[::2] if i % 3 == 2 else tree


def leaves_of_state(opt):
    return [array for state in opt.state.values() for array in state.values()]


def test_schedules_take_the_short_way(rng, monkeypatch):
    param = rng.standard_normal(100)
    grad, before, asked = rng.standard_normal(100), param.copy(), []

    def lr(step):
        asked.append(step)
        return -1.0 if len(asked) == 6 else 0.1 / (step + 1)

    opt = fs.SGD([param], lr=lr, momentum=lambda step: 0.9 if step >= 4 else 0.0)
    opt.step([grad])
    for _ in range(3):
        assert used_short_way(opt, monkeypatch, [grad])
    assert asked == [0, 0, 1, 2, 3]  # the first time to see whether it can be called
    assert_same_bits(param, stepwise(before, grad, 4))

    now = param.copy()
    with pytest.raises(ValueError, match=r"^lr: expected a finite number >= 0, got -1\.0$"):
        opt.step([grad])
    assert_same_bits(param, now)
    assert not used_short_way(opt, monkeypatch, [grad])  # now with momentum, a kernel of another kind
    assert used_short_way(opt, monkeypatch, [grad])
    assert_same_bits(param, stepwise(before, grad, 6))


def stepwise(param, grad, n_steps):
    """Where the reference is after so many of the steps of the test above."""
    param = param.copy()
    opt = fs.SGD(
        [param],
        lr=lambda step: 0.1 / (step + 1),
        momentum=lambda step: 0.9 if step >= 4 else 0.0,
        backend="reference",
    )
    for _ in range(n_steps):
        opt.step([grad])
    return param
