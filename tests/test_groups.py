"""Groups by pattern: the bits of groups by hand, names, gradients' structure, what is left out, saving, mistakes."""

import re

import numpy as np
import pytest
from conftest import assert_same_bits

import fusedstep as fs

BACKENDS = ["c", "reference"]
STEPS = 4


def tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "embed": array(9, 4),
        "layers": [{"w": array(4, 5), "b": array(5), "scale": array()}, {"w": array(5, 4), "b": array(4), "scale": array()}],
        "head": {"w": array(4, 3), "b": array(3)},
    }


NAMES = ["embed", *(f"layers.{i}.{k}" for i in (0, 1) for k in ("w", "b", "scale")), "head.w", "head.b"]


def leaves(params):
    layers = [array for layer in params["layers"] for array in layer.values()]
    return dict(zip(NAMES, [params["embed"], *layers, *params["head"].values()]))


def test_groups():
    params = tree()
    lr = fs.schedules.linear_schedule(1.0, 0.0, 10)
    groups = fs.group(
        params, {"layers.*": {"lr": 0.5, "l1": 0.1}, "*.b": {"lr": lr}, "head.[wb]": {"eps": 0.5}}, no_decay_on_1d=True
    )
    found = [(list(group["params"]), {key: value for key, value in group.items() if key != "params"}) for group in groups]
    assert found == [
        (["embed"], {}),
        (["layers.0.w", "layers.1.w"], {"lr": 0.5, "l1": 0.1}),
        (["layers.0.b", "layers.1.b"], {"weight_decay": 0.0, "lr": lr, "l1": 0.1}),
        (["layers.0.scale", "layers.1.scale"], {"weight_decay": 0.0, "lr": 0.5, "l1": 0.1}),
        (["head.w"], {"eps": 0.5}),
        (["head.b"], {"weight_decay": 0.0, "lr": lr, "eps": 0.5}),
    ]
    opt = fs.Adam(groups, weight_decay=0.25)
    assert list(opt.state) == NAMES
    assert [group["weight_decay"] for group in opt.param_groups] == [0.25, 0.25, 0.0, 0.0, 0.25, 0.0]


def test_patterns_tell_cases_apart():
    groups = fs.group({"w": np.ones(2), "W": np.ones(2)}, {"w": {"lr": 0.5}})
    assert [(list(group["params"]), group.get("lr")) for group in groups] == [(["w"], 0.5), (["W"], None)]


def test_the_last_pattern_wins_and_patterns_win_over_no_decay():
    a, b = ({"weight_decay": 0.5}, {"weight_decay": 0.25})
    assert [g["weight_decay"] for g in fs.group([np.ones(2)], {"0": a, "*": b}, no_decay_on_1d=True)] == [0.25]
    assert [g["weight_decay"] for g in fs.group([np.ones(2)], {"*": b, "0": a}, no_decay_on_1d=True)] == [0.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"clip_norm_per_array": 0.5, "ema_decay": 0.5}, {"nonfinite": "propagate"}], ids=str
)
def test_bits_of_groups_by_hand(backend, options):
    found, wanted = tree(), tree()
    lr = fs.schedules.linear_schedule(0.1, 0.0, 10)
    patterns = {"layers.1.*": {"lr": lr}, "*.scale": {"amsgrad": True}}
    opt = fs.AdamW(fs.group(found, patterns, no_decay_on_1d=True), weight_decay=0.5, backend=backend, **options)
    own = {name: {} for name in NAMES}
    for name in NAMES:
        if leaves(wanted)[name].ndim <= 1:
            own[name]["weight_decay"] = 0.0
        if name.startswith("layers.1."):
            own[name]["lr"] = lr
        if name.endswith(".scale"):
            own[name]["amsgrad"] = True
    by_hand = [{"params": {name: array}, **own[name]} for name, array in leaves(wanted).items()]
    other = fs.AdamW(by_hand, weight_decay=0.5, backend=backend, **options)
    for step in range(STEPS):
        grads = tree(step + 1)
        opt.step(grads)
        other.step([{name: grad} for name, grad in leaves(grads).items()])
    assert_same_bits(list(leaves(found).values()), list(leaves(wanted).values()))
    for name in NAMES:
        assert list(opt.state[name]) == list(other.state[name])
        assert_same_bits(list(opt.state[name].values()), list(other.state[name].values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_groups_that_change_nothing_change_no_bit(backend, state_dtype):
    # Norms over all arrays, and random rounding, depend on the order of the arrays: it is that of the tree.
    found, wanted = tree(), tree()
    options = dict(clip_norm=0.5, state_dtype=state_dtype, seed=5, backend=backend)
    opt = fs.AdamW(fs.group(found, {"*.b": {}, "layers.1.*": {}, "embed": {}}), **options)
    other = fs.AdamW(wanted, **options)
    assert len(opt.param_groups) == 5
    for step in range(STEPS):
        assert opt.step(tree(step + 1)) == other.step(tree(step + 1))
    assert_same_bits(list(leaves(found).values()), list(leaves(wanted).values()))
    for name in NAMES:
        assert_same_bits(list(opt.state[name].values()), list(other.state[name].values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("params", "names"),
    [
        (np.ones(3), ["0"]),
        ([np.ones(3), np.ones((2, 2))], ["0", "1"]),
        ({"b": np.ones(3), "w": np.ones((2, 2))}, ["b", "w"]),
        (({"w": np.ones((2, 2))}, {}, [np.ones(3)]), ["0.w", "2.0"]),
    ],
)
def test_structures(params, names, backend):
    params, grads = copied(params), copied(params)
    opt = fs.SGD(fs.group(params, no_decay_on_1d=True), lr=1.0, backend=backend)
    assert list(opt.state) == names
    for _ in range(2):  # the long way and the short
        opt.step(grads)
    opt.bind(grads)
    opt.step()
    opt.accumulate(grads)
    opt.step()
    assert all(array.max() == -3 for array in opt._params.arrays)


def copied(value):
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return type(value)(copied(part) for part in value)


def test_the_short_way_is_taken(monkeypatch):
    params = tree()
    opt = fs.SGD(fs.group(params, {"layers.*": {"lr": 0.5}, "head.*": None}))
    without_head = {key: value for key, value in tree(1).items() if key != "head"}
    opt.step(without_head)
    before = params["layers"][1]["w"].copy()
    steps = []
    monkeypatch.setattr(opt, "_step", lambda *args: steps.append(args))
    assert opt.step(without_head).step == 2
    assert not steps
    np.testing.assert_array_equal(params["layers"][1]["w"], before - np.float32(0.5) * without_head["layers"][1]["w"])
    opt.step(tree(1))  # with gradients that are not looked at: the long way
    assert len(steps) == 1


# ---- Arrays left out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_left_out_do_not_change(backend):
    params, wanted = tree(), tree()
    opt = fs.Adam(fs.group(params, {"*": {}, "layers.0.*": None, "*.b": None}), lr=0.1, clip_norm=0.1, backend=backend)
    kept = [name for name in NAMES if not name.startswith("layers.0.") and not name.endswith(".b")]
    assert list(opt.state) == kept
    other = fs.Adam({name: leaves(wanted)[name] for name in kept}, lr=0.1, clip_norm=0.1, backend=backend)
    for step in range(STEPS):
        grads = tree(step + 1)
        other.step({name: leaves(grads)[name] for name in kept})
        if step == 0:
            grads["layers"][0] = {name: np.array(np.nan) for name in "wbz"}  # not looked at, whatever it is
            grads["layers"][1]["b"][:] = np.nan
        elif step == 1:
            grads["layers"][0] = None
            del grads["layers"][1]["b"], grads["head"]["b"]
        elif step == 2:
            grads["layers"][0] = {}
            grads["head"]["b"] = None
        opt.step(grads)
    assert_same_bits(list(leaves(params).values()), list(leaves(wanted).values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_left_out_of_sequences_have_a_place(backend):
    params = [np.ones(2), [np.ones(2), np.ones(2)], np.ones(2)]
    opt = fs.SGD(fs.group(params, {"0": None, "1.*": None}), lr=1.0, backend=backend)
    for first, second in ((None, None), (np.full(2, 9.0), [np.full(2, 9.0)] * 2), (np.ones(5), "no array"), ({}, {})):
        for _ in range(2):
            opt.step([first, second, np.ones(2)])
    assert [array.tolist() for array in (params[0], *params[1], params[2])] == [[1, 1], [1, 1], [1, 1], [-7, -7]]


def test_empty_parts_are_not_left_out():
    w, x = np.ones(2), np.ones(2)
    opt = fs.SGD(fs.group({"w": w, "relu": {}, "x": x}, {"x": None}), lr=1.0)
    for grads in ({"w": np.ones(2)}, {"w": np.ones(2), "x": np.ones(2)}):
        with pytest.raises(ValueError, match=r"^grads\['relu'\]: expected a gradient, got none$"):
            opt.step(grads)
    opt.step({"w": np.ones(2), "relu": {}})
    assert (w.tolist(), x.tolist()) == ([0, 0], [1, 1])


def test_their_gradients_are_not_cleared():
    params = {"a": np.ones(2), "b": np.ones(2)}
    grads = {"a": np.ones(2), "b": np.ones(2)}
    fs.SGD(fs.group(params, {"a": None})).step(grads, zero_grads=True)
    assert grads["a"].tolist() == [1, 1]
    assert grads["b"].tolist() == [0, 0]


# ---- Layers -------------------------------------------------------------------------------------------------------------


def test_layer_decay():
    patterns = ["embed", "layers.0.*", "layers.1.*", "head.*"]
    lr = fs.schedules.linear_schedule(1.0, 0.0, 10)
    numbers, functions = fs.layer_decay(patterns, 0.25, 0.75), fs.layer_decay(patterns, lr, 0.75)
    assert list(numbers) == list(functions) == patterns
    for distance, pattern in enumerate(reversed(patterns)):
        assert numbers[pattern] == {"lr": 0.25 * 0.75**distance}
        assert [functions[pattern]["lr"](k) for k in range(12)] == [lr(k) * 0.75**distance for k in range(12)]
    params = tree()
    before = {name: array.copy() for name, array in leaves(params).items()}
    opt = fs.SGD(fs.group(params, fs.layer_decay(patterns, lr, 0.5) | {"*.b": {"momentum": 0.5}}))
    grads = tree(1)
    opt.step(grads)
    for name, array in leaves(params).items():
        factor = {"embed": 0.125, "layers.0": 0.25, "layers.1": 0.5}.get(name.rsplit(".", 1)[0], 1.0)
        np.testing.assert_array_equal(array, before[name] - np.float32(factor) * leaves(grads)[name])
    assert list(opt.state["head.b"]) == ["momentum_buffer"]


# ---- Saving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to_file", [False, True])
def test_saving_and_loading(backend, to_file, tmp_path):
    def make(params, seed):
        patterns = {"*.w": {"lr": 0.5}, "layers.1.*": {"lr": 0.25}, "layers.0.*": None}
        groups = fs.group(params, patterns, no_decay_on_1d=True)
        return fs.AdamW(groups, lr=0.125, weight_decay=0.5, backend=backend, state_dtype="int8", seed=seed)

    params, others = tree(), tree(9)
    opt, other = make(params, 1), make(others, 2)
    opt.step(tree(1))
    opt.param_groups[0]["lr"] = 0.75
    if to_file:
        fs.save(tmp_path / "x.safetensors", opt, params)
        fs.load(tmp_path / "x.safetensors", other, others)
    else:
        saved = opt.state_dict()
        assert [name for group in saved["param_groups"] for name in group["names"]] == [
            "embed", "layers.1.w", "layers.1.b", "layers.1.scale", "head.w", "head.b",
        ]  # fmt: skip
        assert list(saved["state"]) == [name for name in NAMES if "layers.0" not in name]
        for a, b in zip(leaves(others).values(), leaves(params).values()):
            a[...] = b
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.75
    for step in range(STEPS):
        opt.step(tree(step + 2))
        other.step(tree(step + 2))
    assert_same_bits(list(leaves(params).values()), list(leaves(others).values()))


def test_a_list_of_the_groups_is_like_any():
    params = tree()
    opt = fs.SGD([*fs.group(params, {"head.*": {"lr": 1.0}})])
    assert list(opt.state) == NAMES
    grads = leaves(tree(1))
    opt.step([{name: grads[name] for name in group["names"]} for group in opt.param_groups])
    with pytest.raises(ValueError, match="^grads: expected 2 groups, got 1$"):
        opt.step(tree(1))


# ---- Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: fs.group(p, {"*.bais": {}}),
            ValueError,
            "patterns['*.bais']: expected to match a parameter's name, got none among "
            "embed, layers.0.w, layers.0.b, layers.0.scale, layers.1.w, ...",
        ),
        (
            lambda p: fs.group(p["head"], {"W": {}}),
            ValueError,
            "patterns['W']: expected to match a parameter's name, got none among w, b",
        ),
        (
            lambda p: fs.group(p, {"*": 0.5}),
            TypeError,
            "patterns['*']: expected a mapping of hyper-parameters, or None to leave arrays out, got 0.5",
        ),
        (lambda p: fs.group(p, {0: {}}), TypeError, "patterns[0]: expected a pattern of type str, got 0"),
        (
            lambda p: fs.group(p, ["*"]),
            TypeError,
            "patterns: expected a mapping of patterns to hyper-parameters, got ['*']",
        ),
        (lambda p: fs.group(p, {"*": {"params": []}}), ValueError, "patterns['*']: expected hyper-parameters, got 'params'"),
        (lambda p: fs.group(p, {"*": None}), ValueError, "params: expected some arrays to be in groups, got none"),
        (lambda p: fs.group({}), ValueError, "params: expected some arrays to be in groups, got none"),
        (
            lambda p: fs.group(fs.group(p)),
            TypeError,
            "params: expected arrays, or sequences or mappings of them, got groups",
        ),
        (
            lambda p: fs.group({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}),
            ValueError,
            "params['a.b']: expected names of their own, got one name twice",
        ),
        (lambda p: fs.group(p, no_decay_on_1d=1), TypeError, "no_decay_on_1d: expected True or False, got 1"),
        (
            lambda p: fs.group({"w": "text"}, no_decay_on_1d=True),
            TypeError,
            "params['w']: expected an array, got str",
        ),
        (lambda p: fs.group(p, {}, True), TypeError, "group() takes from 1 to 2 positional arguments but 3 were given"),
        (lambda p: fs.SGD(fs.group(p, {"embed": {"lr": -1}})), ValueError, "param_groups[0].lr: expected a finite number >= 0, got -1"),
        (lambda p: fs.layer_decay("*", 1.0, 0.5), TypeError, "patterns: expected a list of patterns of type str, got '*'"),
        (lambda p: fs.layer_decay(["*"], 1.0, 0), ValueError, "decay: expected a number in (0, 1], got 0"),
        (lambda p: fs.layer_decay(["*"], -1.0, 0.5), ValueError, "lr: expected a finite number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_mistakes(call, error, message):
    with pytest.raises(error) as caught:
        call(tree())
    assert str(caught.value) == message


def test_unknown_hyperparameters():
    with pytest.raises(
        TypeError, match=r"^param_groups\[0\]: unknown key 'learning_rate'; a group has params, lr, momentum"
    ):
        fs.SGD(fs.group(tree(), {"*": {"learning_rate": 1.0}}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda g: g.pop("embed"), ValueError, "grads['embed']: expected a gradient, got none"),
        (lambda g: g["layers"][1].pop("w"), ValueError, "grads['layers.1.w']: expected a gradient, got none"),
        (lambda g: g.update(x=1), ValueError, "grads['x']: expected a parameter's name, got a name that none has"),
        (lambda g: g["layers"].pop(0), ValueError, "grads['layers']: expected 2 arrays, got 1"),
        (lambda g: g.update(head=None), TypeError, "grads['head']: expected a mapping like the parameters', got NoneType"),
        (lambda g: g["head"].update(w=None), TypeError, "grads['head.w']: expected an array, got NoneType"),
        (
            lambda g: g["head"].update(w=np.ones(3)),
            ValueError,
            "grads['head.w']: expected shape (4, 3), got (3,)",
        ),
    ],
)
def test_wrong_gradients(spoil, error, message, backend):
    params = tree()
    opt = fs.SGD(fs.group(params, {"layers.0.*": None, "*.b": None}), backend=backend)
    opt.step(tree(1))
    before = [array.copy() for array in leaves(params).values()]
    grads = tree(1)
    spoil(grads)
    with pytest.raises(error) as caught:
        opt.step(grads)
    assert str(caught.value) == message
    assert_same_bits(list(leaves(params).values()), before)


def test_names_of_a_group_are_not_given():
    with pytest.raises(TypeError, match=re.escape("param_groups[0]: unknown key 'names'")):
        fs.SGD([{"params": np.ones(2), "names": ["w"]}], lr=0.5)


@pytest.mark.parametrize("grads", [5, np.ones(2)], ids=["number", "array"])
def test_gradients_of_groups_are_a_sequence(grads):
    opt = fs.SGD([{"params": np.ones(2)}], lr=0.5)
    message = f"grads: expected a sequence with the gradients of each group, got {type(grads).__name__}"
    with pytest.raises(TypeError, match=re.escape(message)):
        opt.step(grads)
