"""State that goes to PyTorch, Keras and optax and back: runs that change place are those that stay in one.

Fifteen steps of random gradients in three parts: there, here, there; and here, there, here. What remains of the difference to
fifteen steps there is the order of operations: of the largest parameter at most 4.4e-15 seen in float64, and 1.7e-14 with the
RAdam of optax; 6.7e-7 in float32.
"""

import copy
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import SETTINGS, assert_same_bits, float64_in_jax, setting_id, snapshot
from test_conventions import KERAS, OPTAX, SHAPES, SHAPES_OF, problem
from test_muon import in_full

import fusedstep as fs
from fusedstep import database, interop

TOLERANCE = {np.float64: 2e-14, np.float32: 1.2e-6}
ORDERS = ["there, here, there", "here, there, here"]


class Torch:
    """An optimizer of PyTorch and its parameters."""

    def __init__(self, start, rule, settings):
        torch = pytest.importorskip("torch")
        self.tensor = torch.from_numpy
        self.params = [torch.nn.Parameter(self.tensor(p.copy())) for p in start]
        self.opt = getattr(torch.optim, rule)(self.params, **settings)

    def step(self, grads):
        for param, grad in zip(self.params, grads):
            param.grad = self.tensor(np.array(grad))
        self.opt.step()

    def arrays(self):
        return [param.detach().numpy() for param in self.params]

    def take_over(self, opt):
        self.opt.load_state_dict(interop.to_torch(opt))

    def hand_over(self, opt, step):
        return interop.from_torch(opt, self.opt.state_dict(), step=step)


class Keras:
    """An optimizer of Keras and its variables."""

    def __init__(self, start, keras, rule, settings):
        self.keras = keras
        self.variables = [keras.Variable(p, dtype=p.dtype.name) for p in start]
        self.opt = getattr(keras.optimizers, rule)(**settings)
        self.opt.build(self.variables)

    def step(self, grads):
        self.opt.apply(grads, self.variables)

    def arrays(self):
        return [self.keras.ops.convert_to_numpy(v) for v in self.variables]

    def take_over(self, opt):
        interop.to_keras(opt, self.opt)

    def hand_over(self, opt, step):
        return interop.from_keras(opt, self.opt)


class Optax:
    """An optax optimizer, its state and parameters."""

    def __init__(self, start, make):
        self.params = [jax.numpy.asarray(p) for p in start]
        self.opt = make()
        self.state = self.opt.init(self.params)

    def step(self, grads):
        updates, self.state = self.opt.update([jax.numpy.asarray(g) for g in grads], self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def arrays(self):
        return [np.asarray(p) for p in self.params]

    def take_over(self, opt):
        self.state = interop.to_optax(opt, self.state)

    def hand_over(self, opt, step):
        return interop.from_optax(opt, self.state, step=step)


def compare(order, dtype, there, here, here_again, shapes=SHAPES):
    """`there(arrays)` makes one of the classes above, `here` an optimizer, `here_again` one to load state into."""
    start, grads = problem(shapes)
    start, grads = [p.astype(dtype) for p in start], [[np.asarray(g).astype(dtype) for g in gs] for gs in grads[:15]]
    whole = there(start)
    for g in grads:
        whole.step(g)
    arrays, before, opt = start, None, None
    for part, place in enumerate(order.split(", ")):
        if place == "there":
            before = there(arrays)
            if opt is not None:
                before.take_over(opt)
            for g in grads[5 * part : 5 * part + 5]:
                before.step(g)
            arrays = before.arrays()
        else:
            arrays = [np.array(p) for p in arrays]
            if before is None:
                opt = here(arrays)
            else:
                opt = here_again(arrays)
                opt.load_state_dict(before.hand_over(opt, 5 * part))
                assert opt.steps == 5 * part
            for g in grads[5 * part : 5 * part + 5]:
                opt.step(g)
    for a, b in zip(arrays, whole.arrays()):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())


DECAY = [(entry, {"weight_decay": 0.1, "maximize": True}) for entry in database.ENTRIES if entry.torch_name != "Rprop"]
TORCH = [
    (entry, settings)
    for entry, settings in SETTINGS + DECAY
    if entry.torch_name is not None and "min_dim_size_to_factor" not in settings
]


@pytest.fixture
def scalars(dtype):
    """Those of PyTorch, like NAdam's product, in the type of the parameters."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype({np.float32: torch.float32, np.float64: torch.float64}[dtype])
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("entry", "settings"), TORCH, ids=setting_id)
def test_torch(entry, settings, dtype, order, scalars):
    """Hyper-parameters go along, so what takes over begins with others."""
    make = entry.optimizer
    n_made = 0

    def there(start):
        nonlocal n_made
        n_made += 1
        first = n_made == 1 or (n_made == 2 and order[0] == "t")
        return Torch(start, entry.torch_name, settings if first else {"lr": 0.123})

    compare(order, dtype, there, lambda arrays: make(arrays, **settings), lambda arrays: make(arrays, lr=0.123))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.1, "momentum": 0.5, "nesterov": False, "ns_steps": 2, "eps": 0.1, "adjust_lr_fn": "match_rms_adamw"}],
    ids=setting_id,
)
def test_muon_of_torch(settings, dtype, order, monkeypatch):
    """Which has matrices alone, and is to round as little as here."""
    monkeypatch.setattr(pytest.importorskip("torch.optim._muon"), "_zeropower_via_newtonschulz", in_full)
    made = []

    def there(start):
        made.append(start)
        first = len(made) == 1 or (len(made) == 2 and order[0] == "t")
        return Torch(start, "Muon", settings if first else {"lr": 0.123})

    here, again = (lambda arrays, own=own: fs.Muon(arrays, **own) for own in (settings, {"lr": 0.123}))
    compare(order, dtype, there, here, again, [shape for shape in SHAPES_OF["Muon"] if len(shape) == 2])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rule", "settings", "name", "theirs"), KERAS)
def test_keras(keras, rule, settings, name, theirs, dtype, order):
    make = getattr(fs, rule)
    compare(
        order,
        dtype,
        lambda start: Keras(start, keras, name, theirs),
        lambda arrays: make(arrays, convention="keras", **settings),
        lambda arrays: make(arrays, lr=0.123, convention="keras"),
        SHAPES_OF.get(rule, SHAPES),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rule", "settings", "make"), OPTAX)
def test_optax(rule, settings, make, dtype, order, exact_decay):
    def here(arrays):
        return getattr(fs, rule)(arrays, convention="optax", **settings)

    with float64_in_jax():
        compare(order, dtype, lambda start: Optax(start, make), here, here, SHAPES_OF.get(rule, SHAPES))


FACTORED = [(4, 3), (3, 3), (2, 3, 4), (2, 4, 3), (1, 2, 3, 2), (1, 5), (5, 1), (1, 1), (1,), (3,)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("min_dim_size", [1, 2, 3])
def test_rows_and_columns_of_optax(min_dim_size, order, exact_decay):
    """Which is which depends on the longer axis there; what is not factored has placeholders."""

    def here(arrays):
        return fs.Adafactor(arrays, lr=0.1, min_dim_size_to_factor=min_dim_size, convention="optax")

    with float64_in_jax():
        make = lambda: optax.adafactor(0.1, min_dim_size_to_factor=min_dim_size)  # noqa: E731
        compare(order, np.float64, lambda start: Optax(start, make), here, here, FACTORED)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_and_columns_of_keras(keras, order):
    def here(arrays):
        return fs.Adafactor(arrays, convention="keras")

    compare(order, np.float64, lambda start: Keras(start, keras, "Adafactor", {}), here, here, FACTORED)


# ---- PyTorch: state dicts written by hand -------------------------------------------------------------------------------


@pytest.fixture
def opt():
    return fs.Adam({"w": np.ones((2, 3), np.float32), "b": np.ones(3)}, lr=0.5)


@pytest.fixture
def theirs():
    """As of torch.optim.Adam after four steps."""
    shapes = [(2, 3), (3,)]
    state = {
        i: {"step": np.float32(4), "exp_avg": np.full(shape, 0.5, dtype), "exp_avg_sq": np.full(shape, 0.25, dtype)}
        for i, (shape, dtype) in enumerate(zip(shapes, ["f4", "f8"]))
    }
    group = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0, "amsgrad": False, "maximize": True}
    return {"state": state, "param_groups": [{**group, "foreach": None, "params": [0, 1]}]}


def test_from_torch_without_torch(opt, theirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    opt.load_state_dict(interop.from_torch(opt, theirs))
    theirs["state"][0]["exp_avg"][...] = 7  # a copy has been made
    assert opt.steps == 4
    group = {key: opt.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
    assert group == {"lr": 0.125, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0, "amsgrad": False, "maximize": True}
    for name, dtype in [("w", np.float32), ("b", np.float64)]:
        np.testing.assert_array_equal(opt.state[name]["exp_avg"], np.full_like(opt.state[name]["exp_avg"], 0.5))
        np.testing.assert_array_equal(opt.state[name]["exp_avg_sq"], np.full_like(opt.state[name]["exp_avg"], 0.25))
        assert opt.state[name]["exp_avg"].dtype == dtype


def test_names_give_the_order(opt, theirs):
    theirs["state"] = {0: theirs["state"][1], 1: theirs["state"][0]}
    opt.load_state_dict(interop.from_torch(opt, theirs, names=["b", "w"]))
    assert opt.steps == 4


def test_names_of_groups_that_differ(theirs):
    opt = fs.Adam([{"params": {"w": np.ones((2, 3), np.float32)}}, {"params": {"b": np.ones(3)}, "lr": 0.5}])
    with pytest.raises(ValueError) as caught:
        interop.from_torch(opt, theirs)
    message = "names: expected the order of PyTorch, whose groups have [2] parameters, not [1, 1]; got none"
    assert str(caught.value) == message
    opt.load_state_dict(interop.from_torch(opt, theirs, names=["w", "b"]))
    assert [group["lr"] for group in opt.param_groups] == [0.125, 0.125]


def test_what_is_here_alone_stays(theirs):
    rate = lambda step: 0.5  # noqa: E731
    params = {"w": np.ones((2, 3), np.float16), "b": np.ones(3)}
    opt = fs.Adam(params, lr=rate, ema_decay=0.5, low_precision="kahan", clip_norm=3.0, l1=0.25, state_dtype="int8")
    opt.step({"w": np.full((2, 3), 1 / 3), "b": np.ones(3)})
    before = copy.deepcopy(opt.state_dict()["state"])
    opt.load_state_dict(interop.from_torch(opt, theirs))
    for name in params:
        np.testing.assert_array_equal(opt.state[name]["average"], before[name]["average"])
    np.testing.assert_array_equal(opt.state["w"]["compensation"], before["w"]["compensation"])
    assert opt.param_groups[0]["lr"] is rate
    assert (opt.clip_norm, opt.param_groups[0]["l1"]) == (3.0, 0.25)
    assert opt.state["w"]["exp_avg"].dtype == np.int8
    saved = interop.common.exported(opt)[2]
    np.testing.assert_allclose(saved["w"]["exp_avg"], np.full((2, 3), 0.5), rtol=1e-4)  # nearly what fits in 8 bits
    assert saved["w"]["exp_avg"].dtype == np.float32


def test_state_that_is_still_to_be_made():
    group = {"lr": 0.1, "lr_decay": 0, "eps": 0, "weight_decay": 0, "initial_accumulator_value": 0.1, "params": [0]}
    opt = fs.Adagrad(np.ones(3, np.float16))
    opt.load_state_dict(interop.from_torch(opt, {"state": {}, "param_groups": [group]}))
    np.testing.assert_array_equal(opt.state["0"]["sum"], np.full(3, 0.1, np.float32))


@pytest.mark.parametrize("given", [False, True, None])
def test_old_versions_have_no_flag_for_decay(theirs, given):
    if given is not None:
        theirs["param_groups"][0]["decoupled_weight_decay"] = given
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3)}
    for rule, default in [(fs.Adam, False), (fs.AdamW, True)]:
        opt = rule(params, decoupled_weight_decay=not default, decay_mode="independent")
        opt.load_state_dict(interop.from_torch(opt, theirs))
        assert opt.param_groups[0]["decoupled_weight_decay"] is (default if given is None else given)
        assert opt.param_groups[0]["decay_mode"] is None


def without(*path):
    def change(d):
        for key in path[:-1]:
            d = d[key]
        del d[path[-1]]

    return change


def setting(*path, value):
    def change(d):
        for key in path[:-1]:
            d = d[key]
        d[path[-1]] = value

    return change


BAD = [
    (
        lambda d: d.clear(),
        TypeError,
        "state_dict: expected optimizer.state_dict() of PyTorch, got a dict without its keys",
    ),
    (
        setting("param_groups", 0, "params", value=[0]),
        ValueError,
        "state_dict['param_groups']: expected parameters for ['w', 'b'], got 1",
    ),
    (
        setting("param_groups", value=[{"lr": 0.5}]),
        TypeError,
        "state_dict['param_groups']: expected a list of dicts with 'params', got [{'lr': 0.5}]",
    ),
    (
        without("param_groups", 0, "amsgrad"),  # RAdam of PyTorch, for example
        ValueError,
        "state_dict['param_groups'][0]['amsgrad']: expected a hyper-parameter of Adam, got none",
    ),
    (
        setting("state", 1, "step", value=3),
        ValueError,
        "params['b']: expected the same whole number of steps as params['w'], 4.0, got 3.0",
    ),
    (
        without("state", 1),
        ValueError,
        "params['b']: expected the same whole number of steps as params['w'], 4.0, got 0",
    ),
    (
        lambda d: d.update(state={str(key): own for key, own in d["state"].items()}),  # as JSON has them
        ValueError,
        "state_dict['state']: expected keys among the groups' params, got ['0', '1']",
    ),
    (
        setting("state", 0, "step", value=1.5),
        ValueError,
        "params['w']: expected the same whole number of steps as params['w'], 1.5, got 1.5",
    ),
    (
        setting("state", 0, "exp_avg", value=np.ones(3, np.float32)),
        ValueError,
        "state_dict['state']['w']['exp_avg']: expected shape (2, 3), got (3,)",
    ),
    (
        setting("state", 0, "exp_avg", value=np.ones((2, 3))),
        TypeError,
        "state_dict['state']['w']['exp_avg']: expected dtype float32, got float64",
    ),
    (
        setting("state", 0, "exp_avg", value="x"),
        TypeError,
        "exp_avg of params['w']: expected an array, got str",
    ),
    (
        without("state", 0, "exp_avg_sq"),
        ValueError,
        "state_dict['state']['w']: expected ['exp_avg', 'exp_avg_sq'], got ['exp_avg']",
    ),
    (
        setting("param_groups", 0, "amsgrad", value=True),
        ValueError,
        "state_dict['state']['w']: expected ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'], got ['exp_avg', 'exp_avg_sq']",
    ),
    (setting("param_groups", 0, "lr", value=-1), ValueError, "lr: expected a finite number >= 0, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_state_changes_nothing(opt, theirs, change, error, message):
    before, groups = snapshot(opt), str(opt.param_groups)
    change(theirs)
    with pytest.raises(error) as caught:
        opt.load_state_dict(interop.from_torch(opt, theirs))
    assert str(caught.value) == message
    assert (snapshot(opt), str(opt.param_groups)) == (before, groups)


def test_groups_of_torch_that_differ_in_one_of_ours(theirs):
    first = theirs["param_groups"][0]
    theirs["param_groups"] = [{**first, "params": [0]}, {**first, "params": [1], "eps": 0.5, "lr": 3.0}]
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3)}
    with pytest.raises(ValueError) as caught:
        interop.from_torch(fs.Adam(params, lr=lambda step: 0.5), theirs, names=["w", "b"])
    assert str(caught.value) == "eps of param_groups[0]: expected one value for ['w', 'b'], got 0.001 and 0.5"
    with pytest.raises(ValueError) as caught:
        interop.from_torch(fs.Adam(params), theirs, names=["w", "w"])
    assert str(caught.value) == "names: expected ['w', 'b'] in some order, got ['w', 'w']"


GROUP = {"lr": 0.5, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
BUFFERS = {0: {"momentum_buffer": np.ones(2)}, 1: {"momentum_buffer": np.ones(3)}}
UNKNOWN = "step: expected the number of steps taken, got none, and state_dict does not tell it"
SGD_STEPS = [
    (GROUP, {}, None, 0),
    (GROUP, {0: {"momentum_buffer": None}}, None, 0),
    (GROUP, BUFFERS, 7, 7),
    ({**GROUP, "momentum": 0}, {}, 7, 7),
    (GROUP, BUFFERS, None, UNKNOWN),
    ({**GROUP, "momentum": 0}, {}, None, UNKNOWN),
    (GROUP, {0: BUFFERS[0]}, None, UNKNOWN),
    (GROUP, {0: BUFFERS[0]}, 7, "params['1']: expected the same whole number of steps as step, 7, got 0"),
    (GROUP, {}, 7, "params['0']: expected the same whole number of steps as step, 7, got 0"),
    (GROUP, BUFFERS, 0, "step: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("group", "state", "step", "wanted"), SGD_STEPS)
def test_sgd_of_torch_does_not_count(group, state, step, wanted):
    opt = fs.SGD([np.ones(2), np.ones(3)])
    theirs = {"state": state, "param_groups": [group]}
    if isinstance(wanted, str):
        with pytest.raises(ValueError) as caught:
            interop.from_torch(opt, theirs, step=step)
        assert str(caught.value) == wanted
    else:
        opt.load_state_dict(interop.from_torch(opt, theirs, step=step))
        assert opt.steps == wanted


# ---- PyTorch itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64])
@pytest.mark.parametrize(("entry", "settings"), TORCH, ids=setting_id)
def test_torch_before_the_first_step(entry, settings, scalars):
    """Nothing is dampened that is not, and accumulators start with what they do."""
    start, grads = problem()
    theirs = Torch(start, entry.torch_name, settings)
    opt = entry.optimizer([p.copy() for p in start], lr=0.123)
    opt.load_state_dict(theirs.hand_over(opt, 0))
    back = Torch(start, entry.torch_name, {})
    back.take_over(opt)
    for g in grads[:3]:
        theirs.step(g)
        back.step(g)
        opt.step(g)
    for a, b, c in zip(theirs.arrays(), back.arrays(), opt._params.arrays):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(c, a, rtol=0, atol=TOLERANCE[np.float64] * np.abs(a).max())


def test_torch_factors_every_matrix(theirs):
    pytest.importorskip("torch")
    group = {"lr": 0.5, "beta2_decay": -0.5, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0, "params": [0]}
    state = {0: {"step": np.float32(3), "row_var": np.ones((2, 1)), "col_var": np.ones((1, 3))}}
    opt = fs.Adafactor(np.ones((2, 3)), min_dim_size_to_factor=3)
    with pytest.raises(ValueError) as caught:
        interop.to_torch(opt)
    assert str(caught.value) == "min_dim_size_to_factor of param_groups[0]: expected 0 as in PyTorch, got 3"
    opt.load_state_dict(interop.from_torch(opt, {"state": state, "param_groups": [group]}))
    assert (opt.param_groups[0]["min_dim_size_to_factor"], list(opt.state["0"])) == (0, ["row_var", "col_var"])


@pytest.mark.parametrize("dtype", [np.float64])
def test_averages_of_asgd_go_along(scalars):
    start, grads = problem()
    settings = {"lr": 0.1, "lambd": 0.01, "t0": 2.0}
    whole, theirs = Torch(start, "ASGD", settings), Torch(start, "ASGD", settings)
    for g in grads[:6]:
        whole.step(g)
    for g in grads[:2]:
        theirs.step(g)
    opt = fs.ASGD([np.array(p) for p in theirs.arrays()])
    opt.load_state_dict(theirs.hand_over(opt, 2))
    for g in grads[2:4]:
        opt.step(g)
    last = Torch(opt._params.arrays, "ASGD", {})
    last.take_over(opt)
    for g in grads[4:6]:
        last.step(g)
    for a, b in zip(last.params, whole.params):
        found, wanted = (run.opt.state[p]["ax"].numpy() for run, p in ((last, a), (whole, b)))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_in_16_bits(dtype):
    """State goes to float32, exactly, and back."""
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    param = torch.nn.Parameter(torch.ones(5, dtype=getattr(torch, dtype)))
    theirs = torch.optim.Adam([param])
    param.grad = torch.arange(5).to(param.dtype) / 3
    theirs.step()
    opt = fs.Adam([np.ones(5, dict(bfloat16=ml_dtypes.bfloat16, float16=np.float16)[dtype])])
    opt.load_state_dict(interop.from_torch(opt, theirs.state_dict()))
    wanted = theirs.state[param]["exp_avg"].clone()
    np.testing.assert_array_equal(opt.state["0"]["exp_avg"], wanted.float().numpy())
    theirs.load_state_dict(interop.to_torch(opt))
    assert theirs.state[param]["exp_avg"].dtype == param.dtype
    assert torch.equal(theirs.state[param]["exp_avg"], wanted)


def test_tensors_that_require_gradients(opt, theirs):
    """As those of optimizers with differentiable=True do."""
    torch = pytest.importorskip("torch")
    theirs["state"][1]["exp_avg"] = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    opt.load_state_dict(interop.from_torch(opt, theirs))
    np.testing.assert_array_equal(opt.state["b"]["exp_avg"], np.full(3, 0.5))


def test_to_torch_has_groups_and_names():
    torch = pytest.importorskip("torch")
    a, b, c = np.ones(1), np.ones(2), np.ones(3)
    opt = fs.AdamW([{"params": {"a": a, "b": b}}, {"params": {"c": c}, "lr": 0.5, "weight_decay": 0.0}])
    opt.step([{"a": a.copy(), "b": b.copy()}, {"c": c.copy()}])
    before = snapshot(opt)
    interop.to_torch(opt)["state"][0]["exp_avg"].zero_()
    assert snapshot(opt) == before  # those are copies
    found = interop.to_torch(opt, names=["c", "b", "a"])
    assert [(group["params"], group["lr"]) for group in found["param_groups"]] == [([0], 0.5), ([1, 2], 1e-3)]
    assert [tuple(found["state"][i]["exp_avg"].shape) for i in range(3)] == [(3,), (2,), (1,)]
    first, *others = (torch.ones(n, dtype=torch.float64) for n in (3, 2, 1))
    theirs = torch.optim.AdamW([{"params": [first]}, {"params": others}])
    theirs.load_state_dict(found)
    other = fs.AdamW([{"params": {"a": a, "b": b}}, {"params": {"c": c}}])
    other.load_state_dict(interop.from_torch(other, theirs.state_dict(), names=["c", "b", "a"]))
    assert snapshot(other) == snapshot(opt)
    with pytest.raises(ValueError) as caught:
        interop.to_torch(opt, names=["a", "c", "b"])
    assert str(caught.value) == "names: expected those of each group together, as PyTorch has them, got ['a', 'c', 'b']"


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("SGD", {"l1": 0.1}, "l1 of param_groups[0]: expected 0.0 as in PyTorch, got 0.1"),
        ("SGD", {"bounds": (0, 1)}, "bounds of param_groups[0]: expected None as in PyTorch, got (0.0, 1.0)"),
        (
            "SGD",
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            "decay_mode of param_groups[0]: expected 'coupled' as in PyTorch, got 'decoupled'",
        ),
        (
            "Rprop",
            {"weight_decay": 0.1},
            "decay_mode of param_groups[0]: expected no weight_decay as in PyTorch, got 'coupled'",
        ),
        (
            "AdamW",
            {"decay_mode": "independent"},
            "decay_mode of param_groups[0]: expected 'coupled' or 'decoupled' as in PyTorch, got 'independent'",
        ),
    ],
)
def test_what_torch_does_not_have(rule, settings, message):
    pytest.importorskip("torch")
    with pytest.raises(ValueError) as caught:
        interop.to_torch(getattr(fs, rule)([np.ones(2)], **settings))
    assert str(caught.value) == message


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_decay_of_torch(rule, decay):
    """Both rules there are one with a flag, which either may have here."""
    pytest.importorskip("torch")
    for settings in ({"decay_mode": decay}, {"decoupled_weight_decay": decay == "decoupled"}):
        opt = getattr(fs, rule)([np.ones(2)], weight_decay=0.1, **settings)
        assert interop.to_torch(opt)["param_groups"][0]["decoupled_weight_decay"] is (decay == "decoupled")


def test_muon_of_torch_before_the_first_step():
    """There is no buffer yet."""
    torch = pytest.importorskip("torch")
    theirs = torch.optim.Muon([torch.ones(2, 3)])
    opt = fs.Muon(np.ones((2, 3), np.float32), lr=0.5, maximize=True, decay_mode="coupled")
    opt.load_state_dict(interop.from_torch(opt, theirs.state_dict()))
    assert (opt.steps, opt.param_groups[0]["lr"], opt.param_groups[0]["maximize"]) == (0, 1e-3, False)
    assert interop.to_torch(opt)["state"] == {0: {}}
    assert set(interop.to_torch(opt)["param_groups"][0]) - set(theirs.param_groups[0]) == {"maximize"}
    opt.step(np.ones((2, 3)))
    theirs.load_state_dict(interop.to_torch(opt))
    with pytest.raises(ValueError) as caught:
        interop.from_torch(opt, theirs.state_dict())
    assert str(caught.value) == UNKNOWN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "params['b']: expected a matrix for Muon of PyTorch, got shape (3,)"),
        ({"maximize": True}, "maximize of param_groups[0]: expected False as in PyTorch, got True"),
        (
            {"decay_mode": "coupled"},
            "decay_mode of param_groups[0]: expected 'decoupled' as in PyTorch, got 'coupled'",
        ),
    ],
)
def test_what_muon_of_torch_does_not_have(settings, message):
    pytest.importorskip("torch")
    params = {"w": np.ones((2, 3))} if settings else {"w": np.ones((2, 3)), "b": np.ones(3)}
    with pytest.raises(ValueError) as caught:
        interop.to_torch(fs.Muon(params, **settings))
    assert str(caught.value) == message


def test_schedules_go_to_torch_as_numbers():
    pytest.importorskip("torch")
    opt = fs.SGD([np.ones(2)], lr=lambda step: 0.5**step)
    opt.step([np.ones(2)])
    assert interop.to_torch(opt)["param_groups"][0]["lr"] == 0.5


# ---- Keras --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(keras):
    """An optimizer of Keras after two steps, and one that could go on; neither has its variables' order of names."""
    variables = [keras.Variable(np.ones(shape), dtype="float64", name=name) for name, shape in [("k", (2, 3)), ("b", (3,))]]
    theirs = keras.optimizers.SGD(0.5, momentum=0.5)
    theirs.build(variables)
    for _ in range(2):
        theirs.apply([np.ones((2, 3)), np.ones(3)], variables)
    opt = fs.SGD({"b": np.ones(3), "k": np.ones((2, 3))}, lr=0.5, momentum=0.5, convention="keras")
    return theirs, opt


def test_names_of_keras(pair):
    theirs, opt = pair
    opt.load_state_dict(interop.from_keras(opt, theirs, names=["k", "b"]))
    assert opt.steps == 2
    np.testing.assert_array_equal(opt.state["k"]["momentum_buffer"], np.full((2, 3), 0.75))
    opt.step({"k": np.zeros((2, 3)), "b": np.zeros(3)})
    opt.param_groups[0]["lr"] = 0.25
    interop.to_keras(opt, theirs, names=["k", "b"])
    assert float(theirs.learning_rate.numpy()) == 0.25
    assert int(theirs.iterations.numpy()) == 3
    np.testing.assert_array_equal(np.asarray(theirs.momentums[0]), np.full((2, 3), -0.375))


def test_refusals_of_keras(keras, pair):
    theirs, opt = pair

    def check(error, message, *changes):
        for obj, name, value in changes:
            setattr(obj, name, value)
        before, own = [np.array(np.asarray(v)) for v in theirs.variables], snapshot(opt)
        with pytest.raises(error) as caught:
            interop.to_keras(opt, theirs, names=["k", "b"])
        assert str(caught.value) == message
        for found, wanted in zip(theirs.variables, before):
            np.testing.assert_array_equal(np.asarray(found), wanted)
        assert snapshot(opt) == own

    group = opt.param_groups[0]
    for key, value, message in [
        ("momentum", 0.25, "momentum of params['k']: expected 0.5 as in Keras, got 0.25"),
        ("nesterov", True, "nesterov of params['k']: expected False as in Keras, got True"),
        ("clip_value", 1.0, "clip_value of params['k']: expected None as in Keras, got 1.0"),
        ("l1", 1.0, "l1 of param_groups[0]: expected 0.0 as in Keras, got 1.0"),
        ("maximize", True, "maximize of param_groups[0]: expected False as in Keras, got True"),
    ]:
        before, group[key] = group[key], value
        check(ValueError, message)
        group[key] = before
    check(ValueError, "clip_norm of opt: expected None as in Keras, got 1.0", (opt, "clip_norm", 1.0))
    check(
        ValueError,
        "clip_value of params['k']: expected 2.0 as in Keras, got None",
        (opt, "clip_norm", None),
        (theirs, "clipvalue", 2.0),
    )
    check(
        ValueError,
        "weight_decay of params['k']: expected 0.1 as in Keras, got 0.0",
        (theirs, "clipvalue", 0),
        (theirs, "weight_decay", 0.1),
    )
    check(
        ValueError,
        "keras_optimizer: expected no loss_scale_factor, got 8.0",
        (theirs, "weight_decay", None),
        (theirs, "loss_scale_factor", 8.0),
    )
    theirs.loss_scale_factor = None
    with pytest.raises(ValueError) as caught:
        interop.to_keras(opt, theirs)  # in the order of opt
    assert str(caught.value) == "keras_optimizer: momentum_buffer of params['b']: expected shape (3,), got (2, 3)"
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(interop.from_keras(opt, theirs))
    assert str(caught.value) == "state_dict['state']['b']['momentum_buffer']: expected shape (3,), got (2, 3)"
    with pytest.raises(ValueError) as caught:
        interop.from_keras(fs.SGD(np.ones(3), convention="keras"), theirs)
    assert str(caught.value) == "keras_optimizer: expected variables for ['0'], got 2"
    with pytest.raises(ValueError) as caught:
        interop.from_keras(opt, keras.optimizers.SGD())
    assert str(caught.value) == "keras_optimizer: expected one that is built, got one without variables"
    with pytest.raises(TypeError) as caught:
        interop.from_keras(opt, keras.optimizers.Adam())
    assert str(caught.value) == "keras_optimizer: expected an optimizer SGD of Keras, got Adam"
    two = fs.SGD(
        [{"params": {"b": np.ones(3)}, "lr": 1.0}, {"params": {"k": np.ones((2, 3))}}], momentum=0.5, convention="keras"
    )
    with pytest.raises(ValueError) as caught:
        interop.to_keras(two, theirs, names=["k", "b"])
    assert str(caught.value) == "lr: expected one for all groups as in Keras, got [0.01, 1.0]"


def test_decay_of_keras_leaves_variables_out(keras):
    variables = [keras.Variable(np.ones(3), dtype="float64", name=name) for name in ("kernel", "bias")]
    theirs = keras.optimizers.AdamW(weight_decay=0.25)
    theirs.exclude_from_weight_decay(var_names=["bias"])
    theirs.build(variables)
    params = {"kernel": np.ones(3), "bias": np.ones(3)}
    opt = fs.AdamW(params, convention="keras")
    with pytest.raises(ValueError) as caught:
        interop.from_keras(opt, theirs)
    message = "weight_decay of param_groups[0]: expected one value for ['kernel', 'bias'], got 0.25 and 0.0"
    assert str(caught.value) == message
    opt = fs.AdamW(
        fs.group(params, {"bias": {}}), convention="keras", decoupled_weight_decay=False, decay_mode="independent"
    )
    opt.load_state_dict(interop.from_keras(opt, theirs))
    assert all(group["decoupled_weight_decay"] and group["decay_mode"] is None for group in opt.param_groups)
    opt.param_groups[0]["decay_mode"] = opt.param_groups[1]["decay_mode"] = "coupled"
    with pytest.raises(ValueError) as caught:
        interop.to_keras(opt, theirs)
    assert str(caught.value) == "decay_mode of param_groups[0]: expected 'decoupled' as in Keras, got 'coupled'"
    assert {group["names"][0]: group["weight_decay"] for group in opt.param_groups} == {"kernel": 0.25, "bias": 0.0}


def test_variables_of_keras_without_state(keras):
    """Those that are overwritten with their gradients."""
    variables = [keras.Variable(np.ones(3), dtype="float64") for _ in range(2)]
    variables[0].overwrite_with_gradient = True
    theirs = keras.optimizers.Adagrad()
    theirs.build(variables)
    with pytest.raises(ValueError) as caught:
        interop.from_keras(fs.Adagrad([np.ones(3), np.ones(3)], convention="keras"), theirs)
    assert str(caught.value) == "keras_optimizer: expected one accumulator for each of ['0', '1'], got 1"


def test_variables_of_adafactor_without_state(keras):
    variables = [keras.Variable(np.ones((2, 3)), dtype="float64") for _ in range(2)]
    variables[0].overwrite_with_gradient = True
    theirs = keras.optimizers.Adafactor()
    theirs.build(variables)
    with pytest.raises(ValueError) as caught:
        interop.from_keras(fs.Adafactor([np.ones((2, 3)), np.ones((2, 3))], convention="keras"), theirs)
    assert str(caught.value) == "keras_optimizer: expected one _c for each of ['0', '1'], got 1"


def test_keras_factors_every_matrix(keras):
    theirs = keras.optimizers.Adafactor()
    theirs.build([keras.Variable(np.ones((2, 3)), dtype="float64")])
    opt = fs.Adafactor(np.ones((2, 3)), min_dim_size_to_factor=3, convention="keras")
    with pytest.raises(ValueError) as caught:
        interop.to_keras(opt, theirs)
    assert str(caught.value) == "min_dim_size_to_factor of params['0']: expected 0 as in Keras, got 3"
    opt.load_state_dict(interop.from_keras(opt, theirs))
    assert opt.param_groups[0]["min_dim_size_to_factor"] == 0
    assert list(opt.state["0"]) == ["row_var", "col_var"]


def test_what_accumulators_started_with_does_not_matter(keras):
    theirs = keras.optimizers.Adagrad(initial_accumulator_value=0.5)
    theirs.build([keras.Variable(np.ones(3), dtype="float64")])
    interop.to_keras(fs.Adagrad(np.ones(3), initial_accumulator_value=0.25, convention="keras"), theirs)
    np.testing.assert_array_equal(np.asarray(theirs._accumulators[0]), np.full(3, 0.25))


def test_ftrl_of_keras_has_more(keras):
    for theirs, message in [
        (
            keras.optimizers.Ftrl(l2_shrinkage_regularization_strength=0.5),
            "keras_optimizer: expected no l2_shrinkage_regularization_strength, got 0.5",
        ),
        (
            keras.optimizers.Ftrl(learning_rate_power=-0.25),
            "keras_optimizer: expected learning_rate_power=-0.5, got -0.25",
        ),
    ]:
        theirs.build([keras.Variable(np.ones(3), dtype="float64")])
        with pytest.raises(ValueError) as caught:
            interop.from_keras(fs.FTRL(np.ones(3), convention="keras"), theirs)
        assert str(caught.value) == message


def test_nadam_of_keras_has_a_constant(keras):
    theirs = keras.optimizers.Nadam()
    theirs.build([keras.Variable(np.ones(3), dtype="float64")])
    opt = fs.NAdam(np.ones(3), convention="keras", momentum_decay=0.5)
    with pytest.raises(ValueError) as caught:
        interop.to_keras(opt, theirs)
    assert str(caught.value) == "momentum_decay of params['0']: expected 1.0 as in Keras, got 0.5"
    opt.load_state_dict(interop.from_keras(opt, theirs))
    assert opt.param_groups[0]["momentum_decay"] == 1.0


def muon_of_keras(keras, shapes, **settings):
    """With variables called as their shapes are, built."""
    theirs = keras.optimizers.Muon(**settings)
    theirs.exclude_from_weight_decay(var_names=["bias"])
    theirs.build([keras.Variable(np.ones(shape), dtype="float64", name=name) for name, shape in shapes.items()])
    return theirs


@pytest.mark.parametrize("others", [{}, {"b": (3,)}])
@pytest.mark.parametrize("settings", [{}, {"exclude_layers": ["last"]}])
def test_matrices_that_muon_of_keras_leaves_out(keras, settings, others):
    """Embeddings, and what it is told to."""
    shapes = {"w": (2, 3), "last" if settings else "embeddings": (2, 3), **others}
    theirs = muon_of_keras(keras, shapes, **settings)
    opt = fs.Muon({name: np.ones(shape) for name, shape in shapes.items()}, convention="keras")
    for call in (interop.from_keras, interop.to_keras):
        with pytest.raises(ValueError) as caught:
            call(opt, theirs)
        message = f"keras_optimizer: expected one velocity for each of {list(others)}, got {1 + len(others)}"
        assert str(caught.value) == message


def test_decay_of_muon_of_keras(keras):
    """It has one for each kind of arrays."""
    shapes = {"w": (2, 3), "bias": (3,)}
    params = {name: np.ones(shape) for name, shape in shapes.items()}
    opt = fs.Muon(params, convention="keras", weight_decay=0.5, adamw_weight_decay=0.25, adjust_lr_fn="match_rms_adamw")
    opt.load_state_dict(interop.from_keras(opt, muon_of_keras(keras, shapes, weight_decay=None)))
    assert (opt.param_groups[0]["weight_decay"], opt.param_groups[0]["adamw_weight_decay"]) == (0.0, 0.0)
    shapes["c"] = shapes.pop("bias")
    opt = fs.Muon({"w": params["w"], "c": params["bias"]}, convention="keras")
    theirs = muon_of_keras(keras, shapes, weight_decay=None, adam_weight_decay=0.125)
    opt.load_state_dict(interop.from_keras(opt, theirs))
    assert (opt.param_groups[0]["weight_decay"], opt.param_groups[0]["adamw_weight_decay"]) == (0.0, 0.125)
    opt.param_groups[0]["decay_mode"] = "coupled"
    with pytest.raises(ValueError) as caught:
        interop.to_keras(opt, theirs)
    assert str(caught.value) == "decay_mode of param_groups[0]: expected 'decoupled' as in Keras, got 'coupled'"


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("Muon", {"rms_rate": None}, "keras_optimizer: expected rms_rate=0.2, got None"),
        ("ScheduleFreeAdamW", {"warmup_steps": 3}, "keras_optimizer: expected no warmup_steps, got 3"),
    ],
)
def test_what_is_not_here(keras, rule, settings, message):
    theirs = getattr(keras.optimizers, rule)(**settings)
    theirs.build([keras.Variable(np.ones((2, 3)), dtype="float64")])
    with pytest.raises(ValueError) as caught:
        interop.from_keras(getattr(fs, rule)(np.ones((2, 3)), convention="keras"), theirs)
    assert str(caught.value) == message


def test_numbers_that_keras_does_not_have(keras):
    """Of Schedule-Free: they follow from the number of steps."""
    theirs = Keras([np.ones(3)], keras, "ScheduleFreeAdamW", {"learning_rate": 0.5})
    for _ in range(3):
        theirs.step([np.ones(3)])
    opt = fs.ScheduleFreeAdamW({"w": np.ones(3)}, convention="keras")
    opt.load_state_dict(theirs.hand_over(opt, 3))
    assert (float(opt.state["w"]["weight_sum"]), float(opt.state["w"]["lr_max"])) == (3.0, 0.5)


def test_schedules_of_keras(keras):
    """They are on both sides: neither becomes a number."""
    theirs = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5))
    theirs.build([keras.Variable(np.ones(3), dtype="float64")])
    opt = fs.SGD(np.ones(3), convention="keras")
    with pytest.raises(ValueError) as caught:
        interop.from_keras(opt, theirs)
    assert str(caught.value) == "param_groups[0]['lr']: expected a schedule like that of Keras, got 0.01"
    opt.param_groups[0]["lr"] = rate = fs.schedules.exponential_decay(0.5, 1, 0.5)
    opt.load_state_dict(interop.from_keras(opt, theirs))
    assert opt.param_groups[0]["lr"] is rate
    opt.step(np.ones(3))
    interop.to_keras(opt, theirs)
    assert float(theirs.learning_rate) == 0.25


# ---- optax --------------------------------------------------------------------------------------------------------------


PARAMS = {"layers": [{"w": np.ones((2, 3), np.float32)}, {"b": np.ones(3, np.float32)}], "a": np.ones((), np.float32)}
MASK = {"layers": [{"w": True}, {"b": False}], "a": True}
LABELS = {"layers": [{"w": "x"}, {"b": "y"}], "a": "y"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adam(lambda count: 0.1),
        lambda: optax.chain(optax.clip_by_global_norm(1e9), optax.adam(0.1)),
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        lambda: optax.multi_transform({"x": optax.adam(0.1), "y": optax.adam(0.1)}, LABELS),
        lambda: optax.adam(0.1, mu_dtype="bfloat16"),
        lambda: optax.chain(optax.adam(0.1), optax.masked(optax.add_decayed_weights(0.0), MASK)),
    ],
)
def test_trees_of_optax(make):
    """Of dictionaries, which JAX sorts, and in whatever holds the states."""
    rng = np.random.default_rng(3)
    grads = [jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), PARAMS) for _ in range(4)]
    theirs = make()
    state, params = theirs.init(PARAMS), PARAMS
    for g in grads[:2]:
        updates, state = theirs.update(g, state, params)
        params = optax.apply_updates(params, updates)
    here = {key: jax.tree.map(np.array, params[key]) for key in PARAMS}  # in its order
    opt = fs.Adam(here, lr=0.1, convention="optax")
    opt.load_state_dict(interop.from_optax(opt, state))
    assert opt.steps == 2
    same = interop.to_optax(opt, theirs.init(PARAMS))
    assert jax.tree.structure(same) == jax.tree.structure(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if "hyperparams" not in jax.tree_util.keystr(path):
            found = dict(jax.tree_util.tree_leaves_with_path(same))[path]
            assert found.dtype == leaf.dtype
            np.testing.assert_array_equal(found, leaf)
    for g in grads[2:]:
        updates, state = theirs.update(g, state, params)
        params = optax.apply_updates(params, updates)
        opt.step(g)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(here)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if "bfloat16" not in str(state) else 1e-2)


def test_one_array_of_optax():
    theirs = optax.adam(0.1)
    opt = fs.Adam(np.ones(3, np.float32), lr=0.1, convention="optax")
    opt.load_state_dict(interop.from_optax(opt, theirs.init(np.ones(3, np.float32))))
    assert opt.steps == 0


def test_masked_parameters_of_optax_are_left_out_here():
    theirs = optax.masked(optax.adam(0.1), MASK)
    state = theirs.init(PARAMS)
    opt = fs.Adam(fs.group(copy.deepcopy(PARAMS), {"layers.1.b": None}), lr=0.1, convention="optax")
    opt.load_state_dict(interop.from_optax(opt, state))
    opt.step(PARAMS)
    assert int(interop.to_optax(opt, state).inner_state[0].count) == 1


def momentum(params):
    return fs.SGD(params, 0.1, momentum=0.9, convention="optax")


OPTAX_KINDS = "TraceState, EmptyState, ScaleByScheduleState, MaskedState, PartitionState, InjectStatefulHyperparamsState"
OPTAX_BAD = [
    (optax.adam(0.1), {}, TypeError, f"opt_state[0]: expected one of {OPTAX_KINDS}, got ScaleByAdamState"),
    (
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
        {},
        TypeError,
        f"opt_state: expected one of {OPTAX_KINDS}, got MultiStepsState",
    ),
    (
        optax.sgd(0.1, momentum=0.9),
        {},
        ValueError,
        "step: expected the number of steps taken, got none, and opt_state does not tell it",
    ),
    (
        optax.sgd(lambda step: 0.1, momentum=0.9),
        {"step": 3},
        ValueError,
        "opt_state[1].count: expected the same whole number of steps as step, 3, got 0",
    ),
    (
        optax.chain(optax.trace(0.9), optax.trace(0.9)),
        {"step": 3},
        ValueError,
        "opt_state[1].trace: expected one momentum_buffer of params['a'], got a second",
    ),
    (
        optax.sgd(0.1),
        {"step": 3},
        ValueError,
        "state_dict['state']['layers.0.w']: expected ['momentum_buffer'], got []",
    ),
    (
        optax.masked(optax.trace(0.9), MASK),
        {"step": 3},
        ValueError,
        "state_dict['state']['layers.1.b']: expected ['momentum_buffer'], got []",
    ),
]


@pytest.mark.parametrize(("theirs", "arguments", "error", "message"), OPTAX_BAD, ids=[case[3][:60] for case in OPTAX_BAD])
def test_refusals_from_optax(theirs, arguments, error, message):
    opt = momentum(copy.deepcopy(PARAMS))
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.load_state_dict(interop.from_optax(opt, theirs.init(PARAMS), **arguments))
    assert str(caught.value) == message
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    ("theirs", "params", "message"),
    [
        (optax.sgd(0.1), PARAMS, "opt_state: expected a place for momentum_buffer of params['layers.0.w'], got none"),
        (
            optax.sgd(0.1, momentum=0.9),
            {"c": np.ones(3)},
            "opt_state[0].trace: expected no momentum_buffer of params['c'], which opt does not have, got one",
        ),
        (
            optax.sgd(0.1, momentum=0.9),
            {**PARAMS, "a": np.ones(3)},
            "opt_state[0].trace: momentum_buffer of params['a']: expected shape (), got (3,)",
        ),
    ],
)
def test_refusals_to_optax(theirs, params, message):
    with pytest.raises(ValueError) as caught:
        interop.to_optax(momentum(copy.deepcopy(PARAMS)), theirs.init(params))
    assert str(caught.value) == message


def test_numbers_that_optax_has_once():
    """Of nested parameters; here each array has them, and they must not differ."""
    opt = fs.Prodigy(copy.deepcopy(PARAMS), convention="optax")
    there = (
        optax.contrib.prodigy().init(PARAMS)._replace(estim_lr=np.float32(0.5), numerator_weighted=np.float32(-2), count=3)
    )
    opt.load_state_dict(interop.from_optax(opt, there))
    assert opt.steps == 3
    assert {(float(own["d"]), float(own["d_numerator"])) for own in opt.state.values()} == {(0.5, -2.0)}
    assert interop.to_optax(opt, optax.contrib.prodigy().init(PARAMS)).estim_lr == 0.5
    opt.state["a"]["d"][...] = 0.25
    with pytest.raises(ValueError) as caught:
        interop.to_optax(opt, there)
    numbers = [float(own["d"]) for own in opt.state.values()]
    assert str(caught.value) == f"opt_state.estim_lr: expected the same d of all arrays, got {numbers}"


def test_schedule_free_of_optax_counts_from_1():
    """Its schedules, from 0."""
    theirs = optax.contrib.schedule_free_adamw(0.5, warmup_steps=4)
    state, params = theirs.init(PARAMS), PARAMS
    for _ in range(2):
        updates, state = theirs.update(PARAMS, state, params)
        params = optax.apply_updates(params, updates)
    opt = fs.ScheduleFreeAdamW(copy.deepcopy(PARAMS), convention="optax")
    opt.load_state_dict(interop.from_optax(opt, state))
    assert opt.steps == 2
    assert {float(own["lr_max"]) for own in opt.state.values()} == {float(state.max_lr)}
    same = interop.to_optax(opt, theirs.init(PARAMS))
    assert jax.tree.structure(same) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_optax_that_factors_other_arrays():
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones((1, 1), np.float32)}
    there = optax.adafactor(min_dim_size_to_factor=2).init(params)
    opt = fs.Adafactor(params, min_dim_size_to_factor=3, convention="optax")
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(interop.from_optax(opt, there))
    assert str(caught.value) == "state_dict['state']['a']: expected ['variance'], got ['col_var', 'row_var', 'variance']"
    with pytest.raises(ValueError) as caught:
        interop.to_optax(opt, there)
    message = "opt_state[0].v_row: expected no row_var of params['a'], which opt does not have, got one"
    assert str(caught.value) == message
    opt.param_groups[0]["min_dim_size_to_factor"] = 2  # is looked at before the next step
    opt.load_state_dict(interop.from_optax(opt, there))
    assert [list(own) for own in opt.state.values()] == [["row_var", "col_var"], ["variance"]]
    opt.param_groups[0]["min_dim_size_to_factor"] = 1
    with pytest.raises(ValueError) as caught:
        interop.to_optax(opt, there)
    message = "opt_state[0].v: expected no variance of params['b'], which opt does not have, got one"
    assert str(caught.value) == message


# ---- What all have in common --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
def test_initial_states(entry, settings, rng):
    """Those of an optimizer that has taken no step."""
    param = rng.standard_normal((3, 4)).astype(np.float32)
    opt = entry.optimizer({"w": param}, **settings)
    part = opt._parts(opt._resolve(opt.param_groups, 0))[opt._part_of[0]]
    found = interop.common.initial_states(part, param)
    assert list(found) == list(opt.state["w"])
    assert_same_bits(list(found.values()), list(opt.state["w"].values()))


@pytest.mark.parametrize(
    ("call", "convention"),
    [
        (lambda opt: interop.from_torch(opt, {}), "torch"),
        (lambda opt: interop.to_torch(opt), "torch"),
        (lambda opt: interop.from_keras(opt, None), "keras"),
        (lambda opt: interop.to_keras(opt, None), "keras"),
        (lambda opt: interop.from_optax(opt, ()), "optax"),
        (lambda opt: interop.to_optax(opt, ()), "optax"),
    ],
)
def test_the_convention_has_to_be_theirs(call, convention):
    library = interop.common.LIBRARIES[convention]
    with pytest.raises(ValueError) as caught:
        call(fs.Adam(np.ones(2), convention="tf"))
    assert str(caught.value) == f"opt: expected convention={convention!r} for the equations of {library}, got 'tf'"
    with pytest.raises(TypeError) as caught:
        call([])
    tables = {"torch": interop.torch.RULES, "keras": interop.keras.STATES, "optax": interop.optax.STATES}
    assert str(caught.value) == f"opt: expected one of {', '.join(tables[convention])} for {library}, got list"


def test_libraries_that_are_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"^fs\.interop needs torch for this \(.*\): pip install torch$"):
        interop.to_torch(fs.Adam(np.ones(2)))
    opt = fs.Adam(np.ones(2), 0.1, convention="optax")
    state = optax.adam(0.1).init(np.ones(2, np.float32))
    monkeypatch.setitem(sys.modules, "jax.tree_util", None)
    with pytest.raises(ImportError, match=r"^fs\.interop needs jax for this \(.*\): pip install jax$"):
        interop.from_optax(opt, state)


def test_every_rule_that_they_have():
    """A rule of the database whose equations another library shares is one that its state can be exchanged with."""
    assert {entry.optimizer.__name__ for entry in database.ENTRIES if entry.torch_name} | {"Muon"} == set(
        interop.torch.RULES
    )
    for convention, table, tested in [
        ("keras", interop.keras.STATES, KERAS),
        ("optax", interop.optax.STATES, OPTAX),
    ]:
        wanted = {rule for rule, own in fs.conventions().items() if convention in own}
        assert wanted == {case[0] for case in tested}
        assert set(table) == wanted
