"""The reference itself, against independent truth: worked values, optax, PyTorch where installed, exact arithmetic."""

import inspect
import itertools
import math
from fractions import Fraction

import numpy as np
import optax
import pytest
import torch_record
from conftest import float64_in_jax, setting_id

import fusedstep as fs
from fusedstep import database
from fusedstep.reference import sums

STEPS = 20


def gradients_of(rng, shape):
    return [rng.standard_normal(shape) for _ in range(STEPS)]


def trajectory(optimizer, start, grads, **settings):
    p = start.copy()
    opt = optimizer([p], **settings, backend="reference")
    for g in grads:
        opt.step([g])
    return p


# Rounding apart the equations are the same; the order of operations differs. Worst seen: 1e-13, of a
# parameter near 0; 9e-16 absolute.
FLOAT64_TOLERANCE = dict(rtol=1e-12, atol=1e-14)

OPTAX = {
    "sgd": (fs.SGD, dict(lr=0.1), lambda: optax.sgd(0.1)),
    "momentum": (fs.SGD, dict(lr=0.1, momentum=0.9), lambda: optax.sgd(0.1, momentum=0.9)),
    "nesterov": (
        fs.SGD,
        dict(lr=0.1, momentum=0.9, nesterov=True),
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "adadelta": (fs.Adadelta, dict(lr=0.5, rho=0.9, eps=1e-6), lambda: optax.adadelta(0.5, rho=0.9, eps=1e-6)),
    "rmsprop": (
        fs.RMSprop,
        dict(lr=0.01, alpha=0.9, eps=1e-8),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-8, eps_in_sqrt=False),
    ),
    "rmsprop centered": (
        fs.RMSprop,
        dict(lr=0.01, alpha=0.9, eps=1e-8, centered=True),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-8, eps_in_sqrt=False, centered=True),
    ),
    "rmsprop momentum": (
        fs.RMSprop,
        dict(lr=0.01, alpha=0.9, eps=1e-8, momentum=0.9),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-8, eps_in_sqrt=False, momentum=0.9),
    ),
    "adagrad": (
        fs.Adagrad,  # optax has eps inside the root: compare without
        dict(lr=0.1, initial_accumulator_value=0.1, eps=0.0),
        lambda: optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
    ),
    "adam": (fs.Adam, dict(lr=0.01), lambda: optax.adam(0.01)),
    "adamw": (fs.AdamW, dict(lr=0.01, weight_decay=0.1), lambda: optax.adamw(0.01, weight_decay=0.1)),
    "adamax": (fs.Adamax, dict(lr=0.01), lambda: optax.adamax(0.01)),
    "radam": (
        fs.RAdam,  # optax has eps beside the corrected root: compare without
        dict(lr=0.01, betas=(0.9, 0.99), eps=0.0),
        lambda: optax.radam(0.01, b2=0.99, eps=0.0),
    ),
    "lion": (fs.Lion, dict(lr=0.01, weight_decay=0.1), lambda: optax.lion(0.01, weight_decay=0.1)),
    "signum": (fs.Signum, dict(lr=0.01, momentum=0.8), lambda: optax.signum(0.01, beta=0.8)),
    "signsgd": (fs.Signum, dict(lr=0.01, momentum=0.0), lambda: optax.sign_sgd(0.01)),
    "adabelief": (
        fs.AdaBelief,
        dict(lr=0.01, betas=(0.9, 0.99), eps=1e-6),
        lambda: optax.adabelief(0.01, b2=0.99, eps=1e-6, eps_root=1e-6),
    ),
    "yogi": (
        fs.Yogi,  # optax starts m with the initial value, too: compare without
        dict(lr=0.01, betas=(0.9, 0.99), eps=1e-3, initial_accumulator_value=0.0),
        lambda: optax.chain(optax.scale_by_yogi(b2=0.99, initial_accumulator_value=0.0), optax.scale(-0.01)),
    ),
    "adan": (
        fs.Adan,  # optax has 1 - beta2 where the paper has beta2 in this notation: compare where that is the same
        dict(lr=0.01, betas=(0.98, 0.5, 0.99), eps=1e-8, weight_decay=0.0),
        lambda: optax.adan(0.01, b2=0.5, eps=1e-8, eps_root=0.0),
    ),
    "clip_norm": (
        fs.SGD,
        dict(lr=0.1, clip_value=0.3),
        lambda: optax.chain(optax.clip(0.3), optax.sgd(0.1)),
    ),
    "l2": (
        fs.Adam,
        dict(lr=0.01, weight_decay=0.1),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.01)),
    ),
}


@pytest.mark.parametrize(("optimizer", "settings", "make"), OPTAX.values(), ids=OPTAX)
def test_against_optax(optimizer, settings, make, rng):
    import jax

    with float64_in_jax():
        start, grads = rng.standard_normal(50), gradients_of(rng, 50)
        found = trajectory(optimizer, start, grads, **settings)
        transform = make()
        params = jax.numpy.asarray(start)
        state = transform.init(params)
        for g in grads:
            updates, state = transform.update(jax.numpy.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(found, np.asarray(params), **FLOAT64_TOLERANCE)


# PyTorch, as recorded: it need not be installed. Where it is, the record is checked.

RECORD = torch_record.recorded()
OURS = {entry.torch_name: entry.optimizer for entry in database.ENTRIES}
each_case = pytest.mark.parametrize(
    "case", RECORD["cases"], ids=lambda case: f"{case['rule']}-{setting_id(case['settings'])}"
)


@each_case
def test_against_torch(case):
    found = trajectory(OURS[case["rule"]], np.array(RECORD["start"]), np.array(RECORD["grads"]), **case["settings"])
    np.testing.assert_allclose(found, case["params"], **FLOAT64_TOLERANCE)


@pytest.mark.parametrize("rule", RECORD["defaults"])
def test_defaults_are_torchs(rule):
    ours = inspect.signature(OURS[rule]).parameters
    for name, theirs in RECORD["defaults"][rule].items():
        assert name not in ours or ours[name].default == theirs, name


def test_the_record_has_every_setting():
    """Or else: python tests/torch_record.py"""
    found = [(case["rule"], case["settings"]) for case in RECORD["cases"]]
    for rule, settings in torch_record.wanted():
        known = {name: value for name, value in settings.items() if name in RECORD["defaults"][rule]}
        assert (rule, known) in found


@each_case
def test_the_record_is_what_torch_gives(case):
    torch = pytest.importorskip("torch")
    assert torch_record.arguments(torch, case["rule"]) == RECORD["defaults"][case["rule"]]
    params = torch_record.params_after(torch, case["rule"], case["settings"], RECORD["start"], RECORD["grads"])
    np.testing.assert_allclose(params, case["params"], **FLOAT64_TOLERANCE)


def test_clip_norm_against_torch(rng):
    torch = pytest.importorskip("torch")
    grads = [rng.standard_normal(shape) for shape in [(3, 4), (7,), ()]]
    tensors = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for tensor, g in zip(tensors, grads):
        tensor.grad = torch.from_numpy(np.array(g))
    theirs = torch.nn.utils.clip_grad_norm_(tensors, 0.5)
    grads = [np.array(g) for g in grads]
    assert fs.clip_by_global_norm(grads, 0.5) == pytest.approx(float(theirs), rel=1e-15)
    for tensor, g in zip(tensors, grads):
        np.testing.assert_allclose(g, tensor.grad.numpy(), rtol=1e-15)


def test_worked_values():
    """Two steps by hand, in exact fractions where the rule allows."""
    p = np.array([1.0])
    opt = fs.SGD([p], lr=0.5, momentum=0.5, dampening=0.25, backend="reference")
    opt.step([np.array([2.0])])  # b = 2, p = 1 - 1
    assert p[0] == 0.0
    opt.step([np.array([4.0])])  # b = 0.5 * 2 + 0.75 * 4 = 4, p = 0 - 2
    assert p[0] == -2.0

    p = np.array([1.0])
    opt = fs.SGD([p], lr=0.5, momentum=0.5, nesterov=True, backend="reference")
    opt.step([np.array([2.0])])  # b = 2, d = 2 + 1
    assert p[0] == -0.5

    p = np.array([1.0])
    opt = fs.Adagrad([p], lr=1.0, lr_decay=1.0, eps=0.0, backend="reference")
    opt.step([np.array([3.0])])  # 3 / sqrt(9)
    assert p[0] == 0.0
    opt.step([np.array([4.0])])  # lr / 2 * 4 / sqrt(25)
    assert p[0] == -0.4

    # Kingma and Ba: with eps = 0 the first step is lr in size, whatever the gradient.
    p = np.array([0.0, 0.0])
    fs.Adam([p], lr=0.25, eps=0.0, backend="reference").step([np.array([1e-3, -1e3])])
    np.testing.assert_allclose(p, [-0.25, 0.25], rtol=1e-15)

    # Zeiler: the first step is sqrt(eps) / sqrt((1 - rho) g^2 + eps) g.
    p = np.array([0.0])
    fs.Adadelta([p], rho=0.75, eps=1.0, backend="reference").step([np.array([4.0])])
    assert p[0] == pytest.approx(-4 / math.sqrt(5), rel=1e-15)

    # Tieleman and Hinton: v = (1 - alpha) g^2.
    p = np.array([0.0])
    fs.RMSprop([p], lr=1.0, alpha=0.75, eps=0.0, backend="reference").step([np.array([-6.0])])
    assert p[0] == 2.0


# The rules as their sources have them, in plain floats, for one element: the changes they make, one for each gradient.


def plain_adamax(gradients, lr, beta1, beta2, eps):
    m = u = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, abs(g) + eps)
        yield -lr * m / ((1 - beta1**t) * u)


def plain_radam(gradients, lr, beta1, beta2, eps):
    m = v = 0.0
    longest = 2 / (1 - beta2) - 1
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        corrected = m / (1 - beta1**t)
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length > 5:
            adaptive = math.sqrt(1 - beta2**t) / (math.sqrt(v) + eps)
            r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            yield -lr * corrected * r * adaptive
        else:
            yield -lr * corrected


def plain_yogi(gradients, lr, beta1, beta2, eps, initial):
    m, v = 0.0, initial
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * math.copysign(g**2, v - g**2)
        yield -lr * m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)


def plain_rprop(gradients, lr, eta1, eta2, smallest, largest):
    size, before = lr, 0.0
    for g in gradients:
        if g * before > 0:
            size = min(size * eta2, largest)
        elif g * before < 0:
            size = max(size * eta1, smallest)
            g = 0.0
        yield -math.copysign(size, g) if g else 0.0
        before = g


def plain_asgd(gradients, lr, lambd, alpha, t0):
    p = 1.0
    for t, g in enumerate(gradients):
        eta = lr / (1 + lambd * lr * t) ** alpha
        yield -eta * (lambd * p + g)
        p -= eta * (lambd * p + g)


def plain_ftrl(gradients, lr, initial, beta, l1, l2):
    """As McMahan et al., figure 1: alpha is lr, lambda_2 is 2 l2."""
    n, z, w = initial, 0.0, 1.0
    for g in gradients:
        sigma = (math.sqrt(n + g**2) - math.sqrt(n)) / lr
        z += g - sigma * w
        n += g**2
        before, w = w, 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((beta + math.sqrt(n)) / lr + 2 * l2)
        yield w - before


def plain_adan(gradients, lr, beta1, beta2, beta3, eps):
    """As Xie et al., algorithm 1, with their betas 1 - ours, and the corrections of their implementation."""
    b1, b2, b3 = 1 - beta1, 1 - beta2, 1 - beta3
    m = v = n = 0.0
    before = gradients[0]
    for k, g in enumerate(gradients, 1):
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * (g - before)
        n = (1 - b3) * n + b3 * (g + (1 - b2) * (g - before)) ** 2
        m_hat, v_hat, n_hat = m / (1 - (1 - b1) ** k), v / (1 - (1 - b2) ** k), n / (1 - (1 - b3) ** k)
        yield -lr / (math.sqrt(n_hat) + eps) * (m_hat + (1 - b2) * v_hat)
        before = g


def plain_novograd(gradients, lr, beta1, beta2, eps, weight_decay):
    """As Ginsburg et al., algorithm 1."""
    p, m, v = 1.0, 0.0, gradients[0] ** 2
    for t, g in enumerate(gradients):
        v = beta2 * v + (1 - beta2) * g**2 if t > 0 else v
        m = beta1 * m + (g / (math.sqrt(v) + eps) + weight_decay * p)
        yield -lr * m
        p -= lr * m


def plain_schedule_free(directions, lr, beta, r, power):
    """As Defazio et al., equations (1) to (3), with all three sequences; `lr` is a number, or one for each step."""
    x = y = z = 1.0
    total = 0.0
    for t in itertools.count(1):
        rates = [lr(s) for s in range(t)] if callable(lr) else [lr]
        z -= rates[-1] * directions(t, y)
        weight = t**r * max(rates) ** power
        total += weight
        c = weight / total if total else 0.0
        x = (1 - c) * x + c * z
        before, y = y, (1 - beta) * z + beta * x
        yield y - before, x


def plain_schedule_free_sgd(gradients, lr, momentum, r, power):
    for change, _ in plain_schedule_free(lambda t, y: gradients[t - 1], lr, momentum, r, power):
        yield change


def plain_schedule_free_adamw(gradients, lr, beta1, beta2, eps, r, power, weight_decay):
    v = 0.0

    def direction(t, y):
        nonlocal v
        v = beta2 * v + (1 - beta2) * gradients[t - 1] ** 2
        return gradients[t - 1] / (math.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * y

    for change, _ in plain_schedule_free(direction, lr, beta1, r, power):
        yield change


def plain_prodigy(gradients, lr, beta1, beta2, beta3, eps, d0, d_coef, corrected, safeguarded, weight_decay):
    """As Mishchenko and Defazio, algorithm 4, and what their implementation adds."""
    p, m, v, s, r, d = 1.0, 0.0, 0.0, 0.0, 0.0, d0
    found = [d0]
    beta3 = math.sqrt(beta2) if beta3 is None else beta3
    for t, g in enumerate(gradients, 1):
        dlr = d * lr * (math.sqrt(1 - beta2**t) / (1 - beta1**t) if corrected else 1)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = beta3 * r + d / d0 * dlr * g * (1.0 - p)
        s = beta3 * s + d / d0 * (d if safeguarded else dlr) * g
        d = max(d, d_coef * r / abs(s))
        found.append(d)
        change = -dlr * m / (math.sqrt(v) + d * eps) - dlr * weight_decay * p
        p += change
        assert t < STEPS or 2 < len(set(found)) < STEPS  # it grows in some steps, and not in others
        yield change


PLAIN = [
    (fs.Adamax, dict(lr=0.1, betas=(0.5, 0.75), eps=1e-3), plain_adamax),
    (fs.RAdam, dict(lr=0.1, betas=(0.5, 0.9), eps=1e-3), plain_radam),
    (fs.Yogi, dict(lr=0.1, betas=(0.5, 0.75), eps=1e-3, initial_accumulator_value=0.5), plain_yogi),
    (fs.Rprop, dict(lr=0.1, etas=(0.5, 1.25), step_sizes=(0.06, 0.15)), plain_rprop),
    (fs.ASGD, dict(lr=0.1, lambd=0.5, alpha=0.75, t0=5.0), plain_asgd),
    (
        fs.FTRL,
        dict(
            lr=0.1,
            initial_accumulator_value=0.5,
            beta=0.25,
            l1_regularization_strength=1.0,
            l2_regularization_strength=0.125,
        ),
        plain_ftrl,
    ),
    (fs.Adan, dict(lr=0.1, betas=(0.75, 0.875, 0.5), eps=1e-3), plain_adan),
    (fs.NovoGrad, dict(lr=0.1, betas=(0.75, 0.5), eps=1e-3, weight_decay=0.25), plain_novograd),
    *(
        (
            fs.Prodigy,
            dict(
                lr=0.5,
                betas=(0.75, 0.9),
                beta3=beta3,
                eps=1e-3,
                d0=0.01,
                d_coef=20.0,
                use_bias_correction=corrected,
                safeguard_warmup=safeguarded,
                weight_decay=0.25,
            ),
            plain_prodigy,
        )
        for beta3, corrected, safeguarded in [
            (None, False, False),
            (0.8, True, False),
            (0.8, False, True),
            (None, True, True),
        ]
    ),
    (fs.ScheduleFreeSGD, dict(lr=0.1, momentum=0.75, r=0.5, weight_lr_power=1.0), plain_schedule_free_sgd),
    (
        fs.ScheduleFreeAdamW,
        dict(lr=0.1, betas=(0.75, 0.9), eps=1e-3, r=0.5, weight_lr_power=1.0, weight_decay=0.25),
        plain_schedule_free_adamw,
    ),
]


def flat(values):
    """The numbers in these hyper-parameters."""
    return [x for value in values for x in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize(("optimizer", "settings", "plain"), PLAIN, ids=setting_id)
def test_against_plain_floats(optimizer, settings, plain, rng):
    gradients = rng.standard_normal(STEPS).tolist()
    p, wanted = np.ones(1), 1.0
    opt = optimizer([p], **settings, backend="reference")
    for g, change in zip(gradients, plain(gradients, *flat(settings.values()))):
        opt.step([np.array([g])])
        wanted += change
        assert p[0] == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize(
    "lr", [fs.schedules.warmup_constant_schedule(0.0, 0.5, 5), lambda step: 0.5 / (1 + step)], ids=["warm-up", "decay"]
)
def test_schedule_free_average_under_a_schedule(lr, backend, rng):
    """The first steps of a warm-up from 0 have no weight; a smaller learning rate has that of the largest."""
    gradients = rng.standard_normal(STEPS).tolist()
    p, wanted = np.ones(1), 1.0
    opt = fs.ScheduleFreeSGD([p], lr=lr, momentum=0.75, backend=backend)
    assert opt.averages["0"].tolist() == [1.0]
    for g, (change, x) in zip(gradients, plain_schedule_free(lambda t, y: gradients[t - 1], lr, 0.75, 0.0, 2.0)):
        opt.step([np.array([g])])
        wanted += change
        assert p[0] == pytest.approx(wanted, rel=1e-13, abs=1e-14)
        assert opt.averages["0"][0] == pytest.approx(x, rel=1e-13, abs=1e-14)
    rates = [lr(step) for step in range(STEPS)]
    sums = np.square(np.maximum.accumulate(rates)).sum()
    assert opt.state["0"]["weight_sum"] == pytest.approx(sums, rel=1e-14)
    assert opt.state["0"]["lr_max"] == max(rates)


def test_ftrl_without_any_gradient_is_0():
    p = np.ones(2)
    fs.FTRL([p], initial_accumulator_value=0.0, backend="reference").step([np.array([0.0, 1.0])])  # 0 / 0 in Keras
    assert p.tolist() == [0.0, 1.0 - 0.001]


def test_asgd_averages():
    p = np.zeros(1)
    opt, values = fs.ASGD([p], lr=0.5, lambd=0.0, t0=2.0, backend="reference"), []
    for g in (1.0, 2.0, -3.0, 1.0, 4.0, -1.0):
        opt.step([np.array([g])])
        values.append(float(p[0]))
    # The parameter itself until mu = 1 / (step - 1 - t0) is below 1: then the mean from there on.
    assert opt.state["0"]["ax"][0] == pytest.approx(np.mean(values[3:]), rel=1e-15)


def test_rprop_of_tiny_gradients():
    """Their product vanishes; it is the signs that count."""
    p = np.zeros(2, np.float32)
    opt = fs.Rprop([p], lr=0.5, etas=(0.5, 2.0))
    opt.step([np.full(2, 1e-30, np.float32)])
    opt.step([np.array([1e-30, -1e-30], np.float32)])
    assert p.tolist() == [-1.5, -0.5]
    assert opt.state["0"]["step_size"].tolist() == [1.0, 0.25]


@pytest.mark.parametrize(("optimizer", "settings"), [(fs.Lion, {}), (fs.Signum, {}), (fs.Signum, {"momentum": 0.0})])
@pytest.mark.parametrize("backend", ["c", "reference"])
def test_zero_has_no_sign(optimizer, settings, backend):
    p = np.array([1.0, -0.0, 0.0, 1.0])
    opt = optimizer([p], lr=0.5, **settings, nonfinite="propagate", backend=backend)
    opt.step([np.array([0.0, -0.0, -0.0, np.nan])])
    np.testing.assert_array_equal(p, [1.0, -0.0, 0.0, np.nan])
    assert np.signbit(p).tolist()[:3] == [False, True, False]


def test_signum_averages():
    """The steps do not tell: their signs are the same for any multiple."""
    opt = fs.Signum([np.zeros(1)], momentum=0.75, backend="reference")
    for g, average in ((4.0, 1.0), (8.0, 2.75)):
        opt.step([np.array([g])])
        assert opt.state["0"]["momentum_buffer"][0] == average


def test_amsgrad_keeps_the_maximum():
    p = np.array([0.0])
    opt = fs.Adam([p], amsgrad=True, backend="reference")
    for g in (10.0, 0.1, 0.1):
        opt.step([np.array([g])])
    assert opt.state["0"]["max_exp_avg_sq"][0] > opt.state["0"]["exp_avg_sq"][0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norm_against_exact_sum(dtype, rng):
    g = (rng.standard_normal(10_001) * 10.0 ** rng.uniform(-15, 15, 10_001)).astype(dtype)
    exact = sum(Fraction(float(x)) ** 2 for x in g)
    assert sums.sum_squares(g) == pytest.approx(float(exact), rel=1e-14)
    assert fs.global_norm(g) == pytest.approx(math.sqrt(exact), rel=1e-14)


def test_pairwise_sum_is_a_binary_tree():
    values = np.array([1e16, 1.0, -1e16, 1.0, 1.0])
    assert sums.pairwise_sum(values) == ((1e16 + 1.0) + (-1e16 + 1.0)) + 1.0
