"""Equations and defaults of other libraries, against those libraries where they install, else against their equations.

50 steps of random gradients in float64. What remains is the order of operations: at worst 3e-14 of the largest parameter, of
RAdam, and less than 5e-15 of other rules.
"""

import inspect
import warnings

import jax
import numpy as np
import optax
import pytest
from conftest import assert_same_bits, float64_in_jax, run

import fusedstep as fs
from fusedstep import database, interop

STEPS = 50
SHAPES = [(3, 4), (70,), ()]
SHAPES_OF = {"Muon": [(3, 4), (9, 5), (6, 6), (1, 7), *SHAPES[1:], (2, 3, 4)]}
"""Of rules for which more of them differ."""
TOLERANCE = 1e-13


def problem(shapes=SHAPES):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in shapes]
    return start, [[rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 1) for shape in shapes] for _ in range(STEPS)]


def ours(rule, convention, settings, start, grads):
    params = [p.copy() for p in start]
    opt = getattr(fs, rule)(params, convention=convention, **settings)
    for g in grads:
        opt.step(g)
    return params


def compare(rule, convention, settings, theirs, shapes=None):
    start, grads = problem(shapes or SHAPES_OF.get(rule, SHAPES))
    found = ours(rule, convention, settings, start, grads)
    for a, b in zip(found, theirs([p.copy() for p in start], grads)):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


# ---- Keras --------------------------------------------------------------------------------------------------------------


KERAS = [
    ("SGD", {}, "SGD", {}),
    ("SGD", {"momentum": 0.9}, "SGD", {"momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, "SGD",
     {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adagrad", {}, "Adagrad", {}),
    ("Adadelta", {}, "Adadelta", {}),
    ("RMSprop", {}, "RMSprop", {}),
    ("RMSprop", {"momentum": 0.9}, "RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-3}, "RMSprop",
     {"centered": True, "momentum": 0.5, "epsilon": 1e-3}),
    ("Adafactor", {}, "Adafactor", {}),
    ("Adafactor", {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-3, 0.1), "d": 1.5, "weight_decay": 0.1}, "Adafactor",
     {"learning_rate": 0.5, "beta_2_decay": -0.5, "epsilon_1": 1e-3, "epsilon_2": 0.1, "clip_threshold": 1.5,
      "weight_decay": 0.1}),
    ("Adam", {}, "Adam", {}),
    ("Adam", {"eps": 0.1, "amsgrad": True}, "Adam", {"epsilon": 0.1, "amsgrad": True}),
    ("AdamW", {}, "AdamW", {}),
    ("Adamax", {}, "Adamax", {}),
    ("Adamax", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.1}, "Adamax",
     {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.1}),
    ("Lion", {"weight_decay": 0.1}, "Lion", {"weight_decay": 0.1}),
    ("FTRL", {"lr": 0.01}, "Ftrl", {"learning_rate": 0.01}),
    ("FTRL", {"lr": 0.1, "beta": 1.0, "l1_regularization_strength": 0.5, "l2_regularization_strength": 0.1}, "Ftrl",
     {"learning_rate": 0.1, "beta": 1.0, "l1_regularization_strength": 0.5, "l2_regularization_strength": 0.1}),
    ("NAdam", {}, "Nadam", {}),
    ("NAdam", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.01}, "Nadam",
     {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.01}),
    ("LAMB", {}, "Lamb", {}),
    ("LAMB", {"lr": 0.1, "weight_decay": 0.1, "eps": 0.01}, "Lamb",
     {"learning_rate": 0.1, "weight_decay": 0.1, "epsilon": 0.01}),
    ("Muon", {}, "Muon", {}),
    ("Muon", {"nesterov": False, "momentum": 0.5}, "Muon", {"nesterov": False, "momentum": 0.5}),
    ("Muon",
     {"lr": 0.1, "momentum": 0.8, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "weight_decay": 0.1,
      "adamw_lr_ratio": 0.25, "adamw_betas": (0.8, 0.95), "adamw_eps": 0.01, "adamw_weight_decay": 0.2}, "Muon",
     {"learning_rate": 0.1, "momentum": 0.8, "muon_a": 2.0, "muon_b": -1.5, "muon_c": 0.5, "ns_steps": 3,
      "weight_decay": 0.1, "adam_lr_ratio": 0.25, "adam_beta_1": 0.8, "adam_beta_2": 0.95, "epsilon": 0.01,
      "adam_weight_decay": 0.2}),
    ("ScheduleFreeAdamW", {}, "ScheduleFreeAdamW", {}),
    ("ScheduleFreeAdamW", {"lr": 0.05, "betas": (0.75, 0.99), "eps": 1e-3, "weight_decay": 0.1}, "ScheduleFreeAdamW",
     {"learning_rate": 0.05, "beta_1": 0.75, "beta_2": 0.99, "epsilon": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"clip_norm": 0.5}, "Adam", {"global_clipnorm": 0.5}),
    ("Adam", {"clip_norm_per_array": 0.5}, "Adam", {"clipnorm": 0.5}),
    ("Adam", {"clip_value": 0.1}, "Adam", {"clipvalue": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "name", "theirs"), KERAS)
def test_keras(keras, rule, settings, name, theirs):
    def with_keras(params, grads):
        variables = [keras.Variable(p, dtype="float64") for p in params]
        opt = getattr(keras.optimizers, name)(**theirs)
        opt.build(variables)
        for g in grads:
            opt.apply([np.asarray(x) for x in g], variables)
        return [keras.ops.convert_to_numpy(v) for v in variables]

    compare(rule, "keras", settings, with_keras)


def test_schedule_free_under_a_schedule_of_keras(keras):
    """All steps have the same weight."""
    start, grads = problem()
    found = ours("ScheduleFreeAdamW", "keras", {"lr": lambda step: 0.05 / (1 + step), "weight_decay": 0.1}, start, grads)
    theirs = keras.optimizers.ScheduleFreeAdamW(keras.optimizers.schedules.InverseTimeDecay(0.05, 1, 1.0), weight_decay=0.1)
    variables = [keras.Variable(p, dtype="float64") for p in start]
    for g in grads:
        theirs.apply([np.asarray(x) for x in g], variables)
    for a, b in zip(found, variables):
        np.testing.assert_allclose(a, np.asarray(b), rtol=0, atol=TOLERANCE * np.abs(a).max())


KERAS_CLASSES = {"NAdam": "Nadam", "LAMB": "Lamb", "FTRL": "Ftrl"}


@pytest.mark.parametrize("rule", [name for name, own in fs.conventions().items() if "keras" in own])
def test_defaults_of_keras(keras, rule):
    theirs = {
        name: p.default
        for name, p in inspect.signature(getattr(keras.optimizers, KERAS_CLASSES.get(rule, rule))).parameters.items()
    }
    opt = getattr(fs, rule)(np.zeros(2), convention="keras")
    for name, value in opt.param_groups[0].items():
        found = [theirs[key] for key in interop.keras.HYPER.get(name, (name,)) if key in theirs]
        if found:
            assert (value or 0) == (tuple(found) if len(found) > 1 else found[0] or 0), name
    for name, value in interop.keras.CONSTANTS_HERE.items():
        assert theirs.get(name, value) == value


# ---- optax --------------------------------------------------------------------------------------------------------------


def muon_of_optax(*args, **kwargs):
    """Compiled as a whole, or else parts of it are anew in each step."""
    init, update = optax.contrib.muon(*args, **kwargs)
    return optax.GradientTransformation(init, jax.jit(update))


OPTAX = [
    ("SGD", {"lr": 0.1}, lambda: optax.sgd(0.1)),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    ("Adagrad", {"lr": 0.1}, lambda: optax.adagrad(0.1)),
    ("Adadelta", {"lr": 0.5}, lambda: optax.adadelta(0.5)),
    ("Adafactor", {}, lambda: optax.adafactor()),
    (
        "Adafactor",
        {
            "lr": 0.5,
            "beta2_decay": -0.5,
            "eps": (1e-3, 1e-3),
            "d": 1.5,
            "weight_decay": 0.1,
            "min_dim_size_to_factor": 2,
        },
        lambda: optax.adafactor(
            0.5, decay_rate=0.5, eps=1e-3, clipping_threshold=1.5, weight_decay_rate=0.1, min_dim_size_to_factor=2
        ),
    ),
    ("RMSprop", {"lr": 0.01}, lambda: optax.rmsprop(0.01)),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "eps": 1e-3}, lambda: optax.rmsprop(0.01, momentum=0.9, eps=1e-3)),
    ("RMSprop", {"lr": 0.01, "centered": True, "eps": 1e-3}, lambda: optax.rmsprop(0.01, centered=True, eps=1e-3)),
    ("Adam", {"lr": 0.01, "eps": 0.1}, lambda: optax.adam(0.01, eps=0.1)),
    ("Adam", {"lr": 0.01, "eps_root": 0.1}, lambda: optax.adam(0.01, eps_root=0.1)),
    ("Adam", {"lr": 0.01, "amsgrad": True}, lambda: optax.amsgrad(0.01)),
    ("Adam", {"lr": 0.01, "amsgrad": True, "eps_root": 0.1}, lambda: optax.amsgrad(0.01, eps_root=0.1)),
    ("AdamW", {"lr": 0.01}, lambda: optax.adamw(0.01)),
    ("AdamW", {"lr": 0.01, "eps_root": 0.1, "weight_decay": 0.1}, lambda: optax.adamw(0.01, eps_root=0.1, weight_decay=0.1)),
    ("NAdam", {"lr": 0.01, "betas": (0.5, 0.75), "eps": 0.01}, lambda: optax.nadam(0.01, 0.5, 0.75, 0.01)),
    ("NAdam", {"lr": 0.01, "eps_root": 0.1}, lambda: optax.nadam(0.01, eps_root=0.1)),
    ("Adamax", {"lr": 0.1, "eps": 0.1}, lambda: optax.adamax(0.1, eps=0.1)),
    ("RAdam", {"lr": 0.1}, lambda: optax.radam(0.1)),
    ("RAdam", {"lr": 0.1, "eps": 0.1, "betas": (0.5, 0.9)}, lambda: optax.radam(0.1, 0.5, 0.9, 0.1)),
    ("RAdam", {"lr": 0.1, "eps_root": 0.1, "betas": (0.5, 0.9)}, lambda: optax.radam(0.1, 0.5, 0.9, eps_root=0.1)),
    ("AdaBelief", {"lr": 0.01}, lambda: optax.adabelief(0.01)),
    (
        "AdaBelief",
        {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.1, "eps_root": 0.01},
        lambda: optax.adabelief(0.1, 0.5, 0.75, 0.1, 0.01),
    ),
    ("Yogi", {"lr": 0.1}, lambda: optax.yogi(0.1)),
    ("Yogi", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.1}, lambda: optax.yogi(0.1, 0.5, 0.75, 0.1)),
    (
        "Yogi",
        {"lr": 0.1, "initial_accumulator_value": 0.5},
        lambda: optax.chain(optax.scale_by_yogi(initial_accumulator_value=0.5), optax.scale(-0.1)),
    ),
    ("Adan", {"lr": 0.01}, lambda: optax.adan(0.01)),
    (
        "Adan",
        {"lr": 0.1, "betas": (0.9, 0.75, 0.5), "eps": 0.1, "eps_root": 0.01, "weight_decay": 0.1},
        lambda: optax.adan(0.1, 0.9, 0.75, 0.5, 0.1, 0.01, 0.1),
    ),
    ("Rprop", {"lr": 0.01}, lambda: optax.rprop(0.01)),
    (  # with bounds that matter, and a start beyond them
        "Rprop",
        {"lr": 0.5, "etas": (0.75, 1.5), "step_sizes": (0.05, 0.2)},
        lambda: optax.rprop(0.5, 0.75, 1.5, 0.05, 0.2),
    ),
    ("Signum", {"lr": 0.01}, lambda: optax.signum(0.01)),
    ("Signum", {"lr": 0.01, "momentum": 0.5}, lambda: optax.signum(0.01, 0.5)),
    ("Signum", {"lr": 0.01, "momentum": 0.0}, lambda: optax.sign_sgd(0.01)),
    ("Lion", {"lr": 0.01}, lambda: optax.lion(0.01)),
    ("LAMB", {"lr": 0.1}, lambda: optax.lamb(0.1)),
    ("LAMB", {"lr": 0.1, "weight_decay": 0.2, "eps": 0.1}, lambda: optax.lamb(0.1, weight_decay=0.2, eps=0.1)),
    ("LAMB", {"lr": 0.1, "eps_root": 0.1}, lambda: optax.lamb(0.1, eps_root=0.1)),
    ("LARS", {"lr": 1.0}, lambda: optax.lars(1.0)),
    (
        "LARS",
        {"lr": 0.5, "weight_decay": 0.2, "trust_coefficient": 0.1, "eps": 0.1, "nesterov": True, "momentum": 0.5},
        lambda: optax.lars(0.5, weight_decay=0.2, trust_coefficient=0.1, eps=0.1, nesterov=True, momentum=0.5),
    ),
    ("NovoGrad", {"lr": 0.1}, lambda: optax.novograd(0.1)),
    (
        "NovoGrad",
        {"lr": 0.1, "betas": (0.75, 0.5), "eps": 0.1, "weight_decay": 0.2},
        lambda: optax.novograd(0.1, b1=0.75, b2=0.5, eps=0.1, weight_decay=0.2),
    ),
    ("NovoGrad", {"lr": 0.1, "eps_root": 0.1}, lambda: optax.novograd(0.1, eps_root=0.1)),
    ("Prodigy", {"d0": 0.1}, lambda: optax.contrib.prodigy(estim_lr0=0.1)),
    (  # where d grows
        "Prodigy",
        {
            "lr": 0.5,
            "betas": (0.8, 0.95),
            "beta3": 0.9,
            "eps": 0.01,
            "d0": 0.01,
            "d_coef": 10.0,
            "safeguard_warmup": True,
            "weight_decay": 0.1,
        },
        lambda: optax.contrib.prodigy(0.5, (0.8, 0.95), 0.9, 0.01, 0.01, 10.0, weight_decay=0.1, safeguard_warmup=True),
    ),
    ("Muon", {"lr": 0.1}, lambda: muon_of_optax(0.1)),
    ("Muon", {"lr": 0.1, "nesterov": False}, lambda: muon_of_optax(0.1, nesterov=False)),
    (  # with an eps that matters
        "Muon",
        {
            "lr": 0.1,
            "momentum": 0.8,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 3,
            "eps": 0.1,
            "adjust_lr_fn": "match_rms_adamw",
            "weight_decay": 0.1,
            "adamw_lr_ratio": 0.25,
            "adamw_betas": (0.8, 0.95),
            "adamw_eps": 0.1,
            "adamw_weight_decay": 0.2,
        },
        lambda: muon_of_optax(
            0.1,
            (2.0, -1.5, 0.5),
            3,
            0.8,
            0.1,
            0.1,
            consistent_rms=0.2,
            adam_learning_rate=0.025,
            adam_b1=0.8,
            adam_b2=0.95,
            adam_weight_decay=0.2,
        ),
    ),
    (
        "Muon",
        {"lr": 0.1, "nesterov": False, "eps": 0.1, "adamw_eps": 0.1},
        lambda: muon_of_optax(0.1, nesterov=False, eps=0.1),
    ),
    ("ScheduleFreeSGD", {}, lambda: optax.contrib.schedule_free_sgd()),
    (
        "ScheduleFreeSGD",
        {"lr": 0.1, "momentum": 0.75, "weight_lr_power": 1.0, "weight_decay": 0.1},
        lambda: optax.contrib.schedule_free_sgd(0.1, b1=0.75, weight_lr_power=1.0, weight_decay=0.1),
    ),
    ("ScheduleFreeAdamW", {}, lambda: optax.contrib.schedule_free_adamw()),
    (
        "ScheduleFreeAdamW",
        {"lr": 0.01, "betas": (0.75, 0.99), "eps": 1e-3, "weight_decay": 0.1},
        lambda: optax.contrib.schedule_free_adamw(0.01, b1=0.75, b2=0.99, eps=1e-3, weight_decay=0.1),
    ),
    ("SGD", {"lr": 0.1, "clip_norm": 0.5}, lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))),
]


def with_optax(make):
    def steps(params, grads):
        opt = make()
        state = opt.init(params)
        for g in grads:
            updates, state = opt.update([jax.numpy.asarray(x) for x in g], state, params)
            params = optax.apply_updates(params, updates)
        return [np.asarray(p) for p in params]

    return steps


@pytest.mark.parametrize(("rule", "settings", "make"), OPTAX)
def test_optax(rule, settings, make, exact_decay):
    with float64_in_jax():
        compare(rule, "optax", settings, with_optax(make))


FACTORED_BY_DEFAULT = [(130, 140), (140, 130), (128, 128), (2, 128, 129), (128, 129, 128), (3, 2, 130, 128)]
NOT_FACTORED_BY_DEFAULT = [(3, 4), (70,), (), (64, 300), (127, 300), (300, 2, 5)]


@pytest.mark.parametrize(("settings", "make"), [case[1:] for case in OPTAX if case[0] == "Adafactor"])
def test_what_optax_factors(settings, make, exact_decay):
    shapes = FACTORED_BY_DEFAULT + NOT_FACTORED_BY_DEFAULT
    if settings:
        shapes = [(3, 4), (4, 3), (3, 3), (2, 3, 4), (2, 4, 3), (1, 2, 2, 2), (1, 4), (4, 1), (4, 1, 1), (2,), ()]
    with float64_in_jax():
        compare("Adafactor", "optax", settings, with_optax(make), shapes)
        state = make().init([np.zeros(shape) for shape in shapes])[0]
        opt = fs.Adafactor([np.zeros(shape) for shape in shapes], convention="optax", **settings)
    factored = ["row_var" in own for own in opt.state.values()]
    assert factored == [v.shape != shape for v, shape in zip(state.v, shapes)]
    assert settings or factored == [shape in FACTORED_BY_DEFAULT for shape in shapes]


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("shape", [(128, 3, 128), (129, 128, 128), (128, 128, 1, 1)])
def test_other_axes_that_optax_factors(shape, backend):
    def make(array):
        return fs.Adafactor({"b": np.zeros(3), "w": array}, convention="optax", backend=backend)

    with pytest.raises(ValueError) as caught:
        make(np.zeros(shape))
    expected = "expected a view with the two largest axes last, of which optax makes rows and columns"
    assert str(caught.value) == f"params['w']: {expected}, got shape {shape}"
    assert "row_var" in make(np.zeros(shape).transpose(np.argsort(shape, kind="stable"))).state["w"]
    for convention in ("torch", "keras"):
        fs.Adafactor(np.zeros(shape), convention=convention, backend=backend)
    opt = fs.Adafactor(np.zeros(shape), min_dim_size_to_factor=130, convention="optax", backend=backend)
    opt.param_groups[0]["min_dim_size_to_factor"] = 128
    with pytest.raises(ValueError) as caught:
        opt.step(np.ones(shape))
    assert str(caught.value) == f"params['0']: {expected}, got shape {shape}"
    assert (opt.steps, list(opt.state["0"])) == (0, ["variance"])
    opt.param_groups[0]["min_dim_size_to_factor"] = 130
    assert opt.step(np.ones(shape)).applied


@pytest.mark.parametrize(("rule", "settings", "make"), [case for case in OPTAX if case[0].startswith("ScheduleFree")])
def test_averages_of_schedule_free(rule, settings, make):
    start, grads = problem()
    opt = getattr(fs, rule)([p.copy() for p in start], convention="optax", **settings)
    with float64_in_jax():
        theirs, params = make(), [jax.numpy.asarray(p) for p in start]
        state = theirs.init(params)
        for g in grads:
            opt.step(g)
            updates, state = theirs.update([jax.numpy.asarray(x) for x in g], state, params)
            params = optax.apply_updates(params, updates)
            wanted = optax.contrib.schedule_free_eval_params(state, params)
            for a, b in zip(opt.averages.values(), wanted):
                np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


# ---- scikit-learn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings", "name", "theirs"),
    [
        ("SGD", {}, "SGDOptimizer", {}),
        ("SGD", {"nesterov": False, "lr": 0.01}, "SGDOptimizer", {"nesterov": False, "learning_rate_init": 0.01}),
        ("Adam", {}, "AdamOptimizer", {}),
        ("Adam", {"eps": 0.1, "betas": (0.8, 0.9)}, "AdamOptimizer", {"epsilon": 0.1, "beta_1": 0.8, "beta_2": 0.9}),
    ],
)
def test_sklearn(rule, settings, name, theirs):
    solvers = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")

    def with_sklearn(params, grads):
        opt = getattr(solvers, name)(params, **theirs)
        for g in grads:
            opt.update_params(params, g)
        return params

    # 0-d arrays are no parameters there: `+=` rebinds them.
    start, grads = problem()
    start, grads = start[:2], [g[:2] for g in grads]
    found = ours(rule, "sklearn", settings, start, grads)
    for a, b in zip(found, with_sklearn([p.copy() for p in start], grads)):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


# ---- Thinc and TensorFlow: their equations; Thinc itself where it is installed ------------------------------------------


def thinc(kind, lr, L2=0.0, grad_clip=1.0, beta1=0.9, beta2=0.999, eps=1e-8):
    """As in thinc.optimizers.Optimizer."""

    def steps(params, grads):
        m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
        for t, gradients in enumerate(grads, 1):
            for i, g in enumerate(gradients):
                norm = np.sqrt((np.asarray(g) ** 2).sum())
                if norm >= grad_clip:
                    g = g * (grad_clip / norm)
                if kind != "SGD":
                    m[i] = m[i] * beta1 + g * (1 - beta1)
                    v[i] = v[i] * beta2 + g * g * (1 - beta2)
                if kind == "RAdam":
                    n, power2 = t + 1, beta2 ** (t + 1)
                    longest = 2 / (1 - beta2) - 1
                    length = longest - 2 * n * power2 / (1 - power2)
                    alpha, below = lr / (1 - beta1**n), 1.0
                    if length >= 5:
                        square = (
                            (1 - power2) * (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
                        )
                        alpha, below = alpha * np.sqrt(square), np.sqrt(v[i]) + eps
                    params[i] = params[i] - alpha * (m[i] / below)
                elif kind == "Adam":
                    alpha = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
                    params[i] = params[i] - alpha * m[i] / (np.sqrt(v[i]) + eps)
                else:
                    params[i] = params[i] - lr * g
                params[i] = params[i] - lr * L2 * params[i]
        return params

    return steps


@pytest.mark.parametrize(
    ("rule", "settings", "kwargs"),
    [
        ("SGD", {"lr": 0.1}, {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.1, "L2": 0.2}),
        ("Adam", {}, {"lr": 1e-3}),
        ("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 0.01}, {"lr": 0.01, "L2": 0.1, "eps": 0.01}),
        ("RAdam", {}, {"lr": 1e-3}),
        (
            "RAdam",
            {"lr": 0.01, "weight_decay": 0.1, "eps": 0.01, "betas": (0.5, 0.9)},
            {"lr": 0.01, "L2": 0.1, "eps": 0.01, "beta1": 0.5, "beta2": 0.9},
        ),
    ],
)
def test_thinc(rule, settings, kwargs):
    compare(rule, "thinc", settings, thinc(rule, **kwargs))


@pytest.mark.parametrize(
    ("rule", "kwargs"),
    [
        ("SGD", {"lr": 0.1, "L2": 0.2}),
        ("Adam", {"lr": 0.01, "L2": 0.1, "eps": 0.01}),
        ("RAdam", {"lr": 0.01, "L2": 0.1, "eps": 0.01, "beta1": 0.5, "beta2": 0.9}),
    ],
)
def test_these_are_thincs_equations(rule, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("thinc.optimizers")
    theirs = {key: value for key, value in kwargs.items() if key != "lr"}
    opt = getattr(library, rule)(kwargs["lr"], **theirs, use_averages=False)
    start, grads = problem()
    params = [p.astype(np.float32).copy() for p in start[:2]]
    for gradients in grads:
        for i in range(2):
            params[i], _ = opt((i, "w"), params[i], gradients[i].astype(np.float32).copy())
    wanted = thinc(rule, **kwargs)([p.copy() for p in start[:2]], [g[:2] for g in grads])
    for a, b in zip(params, wanted):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # it computes in float32


def tensorflow(
    kind, lr, momentum=0.0, nesterov=False, rho=0.9, centered=False, eps=1e-7, beta1=0.9, beta2=0.999, amsgrad=False,
    schedule_decay=0.004, start=0.1, l1=0.0, l2=0.0, beta=0.0,
):  # fmt: skip
    """As in the kernels of training_ops.cc and the legacy classes of tf.keras that call them."""

    def steps(params, grads):
        a, b, c = ([np.zeros_like(p) for p in params] for _ in range(3))
        if kind in ("Adagrad", "FTRL"):
            a = [np.full_like(p, start) for p in params]
        product = 1.0
        for t, gradients in enumerate(grads, 1):
            mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (schedule_decay * n)) for n in (t, t + 1))
            product *= mu
            for i, g in enumerate(gradients):
                if kind == "SGD":  # ApplyKerasMomentum
                    a[i] = momentum * a[i] - lr * g
                    params[i] = params[i] + (momentum * a[i] - lr * g if nesterov else a[i])
                elif kind == "Adagrad":  # ApplyAdagradV2
                    a[i] = a[i] + g * g
                    params[i] = params[i] - lr * g / (np.sqrt(a[i]) + eps)
                elif kind == "Adadelta":  # ApplyAdadelta
                    a[i] = a[i] * rho + g * g * (1 - rho)
                    update = np.sqrt(b[i] + eps) / np.sqrt(a[i] + eps) * g
                    b[i] = b[i] * rho + update * update * (1 - rho)
                    params[i] = params[i] - update * lr
                elif kind == "RMSprop":  # ApplyRMSProp and ApplyCenteredRMSProp, but without momentum in Python
                    a[i] = a[i] + (g * g - a[i]) * (1 - rho)
                    c[i] = c[i] + (g - c[i]) * (1 - rho)
                    square = a[i] - c[i] * c[i] if centered else a[i]
                    b[i] = momentum * b[i] + lr * g / np.sqrt(square + eps)
                    params[i] = params[i] - (b[i] if momentum else lr * g / (np.sqrt(square) + eps))
                elif kind == "Adamax":  # ApplyAdaMax
                    a[i] = a[i] + (g - a[i]) * (1 - beta1)
                    b[i] = np.maximum(beta2 * b[i], np.abs(g))
                    params[i] = params[i] - lr / (1 - beta1**t) * (a[i] / (b[i] + eps))
                elif kind == "NAdam":  # in Python
                    a[i] = beta1 * a[i] + (1 - beta1) * g
                    b[i] = beta2 * b[i] + (1 - beta2) * g * g
                    average = (1 - mu) * g / (1 - product) + next_mu * a[i] / (1 - product * next_mu)
                    params[i] = params[i] - lr * average / (np.sqrt(b[i] / (1 - beta2**t)) + eps)
                elif kind == "FTRL":  # ApplyFtrl with lr_power = -0.5; the class adds beta / (2 lr) to l2
                    before, a[i] = a[i], a[i] + g * g
                    b[i] = b[i] + g - (np.sqrt(a[i]) - np.sqrt(before)) / lr * params[i]
                    below = np.sqrt(a[i]) / lr + 2 * (l2 + beta / (2 * lr))
                    params[i] = np.where(np.abs(b[i]) > l1, (np.sign(b[i]) * l1 - b[i]) / below, 0.0)
                else:  # ApplyAdam and ApplyAdamWithAmsgrad
                    a[i] = a[i] + (g - a[i]) * (1 - beta1)
                    b[i] = b[i] + (g * g - b[i]) * (1 - beta2)
                    c[i] = np.maximum(c[i], b[i]) if amsgrad else b[i]
                    alpha = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
                    params[i] = params[i] - a[i] * alpha / (np.sqrt(c[i]) + eps)
        return params

    return steps


TF = [
    ("SGD", {}, {"lr": 0.01}),
    ("SGD", {"momentum": 0.9}, {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}, {"lr": 1e-3}),
    ("Adagrad", {"initial_accumulator_value": 0.5, "eps": 0.01}, {"lr": 1e-3, "start": 0.5, "eps": 0.01}),
    ("Adadelta", {}, {"lr": 1e-3, "rho": 0.95}),
    ("Adadelta", {"lr": 0.1, "rho": 0.8, "eps": 0.01}, {"lr": 0.1, "rho": 0.8, "eps": 0.01}),
    ("RMSprop", {}, {"lr": 1e-3}),
    ("RMSprop", {"eps": 0.01}, {"lr": 1e-3, "eps": 0.01}),
    ("RMSprop", {"eps": 0.01, "centered": True}, {"lr": 1e-3, "eps": 0.01, "centered": True}),
    ("RMSprop", {"momentum": 0.9, "eps": 0.01}, {"lr": 1e-3, "momentum": 0.9, "eps": 0.01}),
    ("RMSprop", {"momentum": 0.9, "eps": 0.01, "alpha": 0.8, "centered": True},
     {"lr": 1e-3, "momentum": 0.9, "eps": 0.01, "rho": 0.8, "centered": True}),
    ("Adam", {}, {"lr": 1e-3}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "amsgrad": True},
     {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "amsgrad": True}),
    ("Adamax", {}, {"lr": 1e-3}),
    ("Adamax", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01}, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01}),
    ("NAdam", {}, {"lr": 1e-3}),
    ("NAdam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "momentum_decay": 0.1},
     {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "schedule_decay": 0.1}),
    ("FTRL", {}, {"lr": 1e-3}),
    ("FTRL",
     {"lr": 0.1, "l1_regularization_strength": 0.3, "l2_regularization_strength": 0.2, "beta": 0.1,
      "initial_accumulator_value": 0.5},
     {"lr": 0.1, "l1": 0.3, "l2": 0.2, "beta": 0.1, "start": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "kwargs"), TF)
def test_tf(rule, settings, kwargs):
    compare(rule, "tf", settings, tensorflow(rule, **kwargs))


def test_all_rules_of_a_convention_are_tested():
    for convention, cases in (("keras", KERAS), ("optax", OPTAX), ("tf", TF)):
        assert {case[0] for case in cases} == {rule for rule, own in fs.conventions().items() if convention in own}


# ---- What all have in common --------------------------------------------------------------------------------------------

CONVENTIONS = [
    (entry, convention, {name: 0.01 for name, value in own.items() if value == "to be given"})
    for entry in database.ENTRIES
    for convention, own in fs.conventions()[entry.optimizer.__name__].items()
]


@pytest.mark.parametrize(("entry", "convention", "required"), CONVENTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits(entry, convention, required, dtype, level):
    """Of every rule in every convention, with each of its settings that the convention takes."""
    start, grads = problem()
    start, grads = [p.astype(dtype) for p in start], [[np.asarray(x).astype(dtype) for x in g] for g in grads[:5]]
    n_taken = 0
    for settings in [*entry.settings, {"eps_root": 0.1}]:
        options = {**required, "clip_norm": 0.5, **settings, "convention": convention}
        try:
            entry.optimizer(start, **options)
        except (TypeError, ValueError):  # see test_refusals
            continue
        wanted, _ = run(entry.optimizer, [p.copy() for p in start], grads, **options, backend="reference")
        found, _ = run(entry.optimizer, [p.copy() for p in start], grads, **options)
        assert_same_bits(found, wanted)
        n_taken += 1
    assert n_taken > 0


def test_a_schedule_shows_where_lr_is():
    """With lr inside the velocity, an lr of 0 does not stop what is under way."""
    for convention, moves in [("torch", False), ("optax", False), ("keras", True), ("sklearn", True)]:
        w = np.ones(3)
        opt = fs.SGD(w, lr=lambda step: 0.1 * (step == 0), momentum=0.5, nesterov=False, convention=convention)
        opt.step(np.ones(3))
        before = w.copy()
        opt.step(np.zeros(3))
        assert (w != before).all() == moves


def test_arguments_given_stay():
    assert fs.SGD(np.zeros(2), convention="sklearn").param_groups[0]["nesterov"] is True
    assert fs.SGD(np.zeros(2), nesterov=False, convention="sklearn").param_groups[0]["nesterov"] is False
    assert fs.Adam(np.zeros(2), 0.5, convention="keras").param_groups[0]["lr"] == 0.5
    assert fs.AdamW(np.zeros(2), convention="keras", weight_decay=0.5).param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda w: fs.Adam(w, convention="optax"),
            TypeError,
            "lr: expected a number, got none: convention='optax' has no default",
        ),
        (
            lambda w: fs.Adagrad(w, convention="thinc"),
            ValueError,
            "convention: expected one of 'torch', 'keras', 'optax', 'tf' for Adagrad, got 'thinc'",
        ),
        (
            lambda w: fs.SGD(w, momentum=0.9, dampening=0.1, convention="keras"),
            ValueError,
            "dampening: expected 0 for convention='keras', got 0.1",
        ),
        (
            lambda w: fs.SGD(w, 0.1, momentum=0.9, convention="thinc"),
            ValueError,
            "momentum: expected 0 for convention='thinc', got 0.9",
        ),
        (
            lambda w: fs.Adam(w, amsgrad=True, convention="sklearn"),
            ValueError,
            "amsgrad: expected False for convention='sklearn', got True",
        ),
        (
            lambda w: fs.AdamW(w, eps_root=1e-8, convention="keras"),
            ValueError,
            "eps_root: expected None for convention='keras', got 1e-08",
        ),
        (
            lambda w: fs.kernels.adan(w, *(w.copy() for _ in range(5)), step=1, eps_root=0.0),
            ValueError,
            "eps_root: expected None for convention='torch', got 0.0",
        ),
        (
            lambda w: fs.kernels.adagrad(w, w.copy(), w.copy(), step=1, convention="thinc"),
            ValueError,
            "convention: expected one of 'torch', 'keras', 'optax', 'tf' for Adagrad, got 'thinc'",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error) as caught:
        make(np.ones(2))
    assert str(caught.value) == message
