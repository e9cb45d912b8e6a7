"""Schedules: values of optax, PyTorch and Keras; exact properties; use by optimizers; the command."""

import builtins
import copy
import itertools
import math
import pickle
import random

import numpy as np
import optax
import pytest
from conftest import assert_same_bits, float64_in_jax

import fusedstep as fs
from fusedstep import __main__
from fusedstep import schedules as s
from fusedstep.demo.schedules import EXAMPLES, LEAST_STEPS

N = 60

# Some operations come in another order. Worst seen: 2e-15, in optax's double precision; ends may be a rounding from 0.
OPTAX_TOLERANCE = dict(rtol=4e-15, atol=1e-17)

OPTAX = [
    ("constant_schedule", dict(value=0.1)),
    ("linear_schedule", dict(init_value=0.1, end_value=0.01, transition_steps=30)),
    ("linear_schedule", dict(init_value=0.1, end_value=0.5, transition_steps=30, transition_begin=7)),
    ("polynomial_schedule", dict(init_value=0.1, end_value=0.01, power=2, transition_steps=30, transition_begin=7)),
    ("polynomial_schedule", dict(init_value=0.1, end_value=0.01, power=0.5, transition_steps=30)),
    ("exponential_decay", dict(init_value=0.1, transition_steps=10, decay_rate=0.5)),
    ("exponential_decay", dict(init_value=0.1, transition_steps=9, decay_rate=0.5, transition_begin=4, staircase=True)),
    ("exponential_decay", dict(init_value=0.1, transition_steps=9, decay_rate=0.5, end_value=0.02)),
    ("exponential_decay", dict(init_value=0.1, transition_steps=9, decay_rate=1.5, end_value=0.4, transition_begin=3)),
    ("cosine_decay_schedule", dict(init_value=0.1, decay_steps=40)),
    ("cosine_decay_schedule", dict(init_value=0.1, decay_steps=40, alpha=0.1, exponent=2.0)),
    ("piecewise_constant_schedule", dict(init_value=0.1, boundaries_and_scales={25: 0.1, 5: 0.5})),
    (
        "piecewise_interpolate_schedule",
        dict(interpolate_type="linear", init_value=0.1, boundaries_and_scales={25: 0.1, 5: 2.0}),
    ),
    (
        "piecewise_interpolate_schedule",
        dict(interpolate_type="cosine", init_value=0.1, boundaries_and_scales={25: 0.1, 5: 2.0}),
    ),
    ("cosine_onecycle_schedule", dict(transition_steps=50, peak_value=0.1)),
    (
        "cosine_onecycle_schedule",
        dict(transition_steps=50, peak_value=0.1, pct_start=0.5, div_factor=4.0, final_div_factor=8.0),
    ),
    ("linear_onecycle_schedule", dict(transition_steps=50, peak_value=0.1)),
    ("warmup_constant_schedule", dict(init_value=0.0, peak_value=0.1, warmup_steps=10)),
    ("warmup_cosine_decay_schedule", dict(init_value=0.0, peak_value=0.1, warmup_steps=10, decay_steps=50)),
    (
        "warmup_cosine_decay_schedule",
        dict(init_value=0.01, peak_value=0.1, warmup_steps=0, decay_steps=50, end_value=0.01, exponent=2.0),
    ),
    (
        "warmup_exponential_decay_schedule",
        dict(
            init_value=0.0,
            peak_value=0.1,
            warmup_steps=10,
            transition_steps=7,
            decay_rate=0.5,
            transition_begin=3,
            end_value=0.02,
        ),
    ),
    (
        "sgdr_schedule",
        dict(
            cosine_kwargs=[
                dict(init_value=0.0, peak_value=peak, warmup_steps=3, decay_steps=n) for peak, n in [(0.1, 20), (0.2, 30)]
            ]
        ),
    ),
]


@pytest.mark.parametrize(("name", "arguments"), OPTAX)
def test_values_of_optax(name, arguments):
    with float64_in_jax():
        theirs = getattr(optax, name)(**arguments)
        values = [float(theirs(k)) for k in range(N)]
    ours = getattr(s, name)(**arguments)
    np.testing.assert_allclose([ours(k) for k in range(N)], values, **OPTAX_TOLERANCE)


def test_join_of_optax():
    ours = s.join_schedules([s.linear_schedule(0.0, 0.1, 10), s.exponential_decay(0.1, 5, 0.5), 0.3], [10, 40])
    pieces = [optax.linear_schedule(0.0, 0.1, 10), optax.exponential_decay(0.1, 5, 0.5), optax.constant_schedule(0.3)]
    with float64_in_jax():
        theirs = optax.join_schedules(pieces, [10, 40])
        values = [float(theirs(k)) for k in range(N)]
    np.testing.assert_allclose([ours(k) for k in range(N)], values, **OPTAX_TOLERANCE)


# PyTorch's of a learning rate of 0.1: what makes them, ours, and their values at AT, taken from PyTorch 2.13.
AT = (0, 3, 17, 40, 59)
TORCH = {
    "LinearLR": (
        lambda lr, opt: lr.LinearLR(opt, 0.25, 1.0, 10),
        s.linear_schedule(0.025, 0.1, 10),
        [0.025, 0.0475, 0.1, 0.1, 0.1],
    ),
    "PolynomialLR": (
        lambda lr, opt: lr.PolynomialLR(opt, 40, 2.0),
        s.polynomial_schedule(0.1, 0.0, 2.0, 40),
        [0.1, 0.0855625, 0.0330625, 0.0, 0.0],
    ),
    "StepLR": (
        lambda lr, opt: lr.StepLR(opt, 10, 0.5),
        s.exponential_decay(0.1, 10, 0.5, staircase=True),
        [0.1, 0.1, 0.05, 0.00625, 0.003125],
    ),
    "MultiStepLR": (
        lambda lr, opt: lr.MultiStepLR(opt, [5, 25], 0.1),
        s.piecewise_constant_schedule(0.1, {5: 0.1, 25: 0.1}),
        [0.1, 0.1, 0.01, 0.001, 0.001],
    ),
    "ExponentialLR": (
        lambda lr, opt: lr.ExponentialLR(opt, 0.95),
        s.exponential_decay(0.1, 1, 0.95),
        [0.1, 0.0857375, 0.04181203352191771, 0.012851215656510309, 0.004849452524942308],
    ),
    "CosineAnnealingLR": (
        lambda lr, opt: lr.CosineAnnealingLR(opt, 60, 0.01),
        s.cosine_decay_schedule(0.1, 60, alpha=0.1),
        [0.1, 0.0994459753267812, 0.08331941759724269, 0.0325, 0.010061670936044178],
    ),
    "CosineAnnealingWarmRestarts": (
        lambda lr, opt: lr.CosineAnnealingWarmRestarts(opt, 7, 1, 0.01),
        s.cosine_decay_restarts(0.1, 7, alpha=0.1),
        [0.1, 0.06501344202803415, 0.06501344202803415, 0.026942958916356993, 0.06501344202803415],
    ),
    "CosineAnnealingWarmRestarts, twice as long": (
        lambda lr, opt: lr.CosineAnnealingWarmRestarts(opt, 7, 2, 0.01),
        s.cosine_decay_restarts(0.1, 7, t_mul=2, alpha=0.1),
        [0.1, 0.06501344202803415, 0.026942958916356993, 0.031058556556809863, 0.09310258896527279],
    ),
    "OneCycleLR": (
        lambda lr, opt: lr.OneCycleLR(opt, 0.1, total_steps=60, pct_start=0.25),
        s.cosine_onecycle_schedule(59, 0.1, pct_start=0.25),
        [0.004, 0.014472088841534572, 0.09890738440717015, 0.03790415360439574, 4e-07],
    ),
    "OneCycleLR, three phases": (
        lambda lr, opt: lr.OneCycleLR(opt, 0.1, total_steps=60, pct_start=0.25, anneal_strategy="linear", three_phase=True),
        s.linear_onecycle_schedule(59, 0.1, pct_start=0.25, pct_final=0.48),
        [0.004, 0.02457142857142857, 0.07942857142857143, 0.002451767741935484, 4e-07],
    ),
    "CyclicLR": (
        lambda lr, opt: lr.CyclicLR(opt, 0.01, 0.1, 8, 4),
        s.cyclic_schedule(0.01, 0.1, 8, 4),
        [0.01, 0.04375, 0.06625, 0.055, 0.0325],
    ),
    "CyclicLR, triangular2": (
        lambda lr, opt: lr.CyclicLR(opt, 0.01, 0.1, 8, mode="triangular2"),
        s.cyclic_schedule(0.01, 0.1, 8, mode="triangular2"),
        [0.01, 0.04375, 0.015625, 0.0325, 0.01703125],
    ),
    "CyclicLR, exp_range": (
        lambda lr, opt: lr.CyclicLR(opt, 0.01, 0.1, 8, mode="exp_range", gamma=0.97),
        s.cyclic_schedule(0.01, 0.1, 8, mode="exp_range", gamma=0.97),
        [0.01, 0.04080271375, 0.016703042993411556, 0.036614105865921925, 0.01932512900253988],
    ),
    "SequentialLR": (
        lambda lr, opt: lr.SequentialLR(opt, [lr.LinearLR(opt, 0.1, 1.0, 10), lr.ExponentialLR(opt, 0.9)], [10]),
        s.join_schedules([s.linear_schedule(0.01, 0.1, 10), s.exponential_decay(0.1, 1, 0.9)], [10]),
        [0.01, 0.037, 0.04782969, 0.004239115827521626, 0.0005726416897022357],
    ),
    "ChainedScheduler": (
        lambda lr, opt: lr.ChainedScheduler([lr.LinearLR(opt, 0.1, 1.0, 10), lr.ExponentialLR(opt, 0.9)]),
        s.multiply_schedules([0.1, s.linear_schedule(0.1, 1.0, 10), s.exponential_decay(1.0, 1, 0.9)]),
        [0.01, 0.026973, 0.01667718169966658, 0.0014780882941434613, 0.00019966781110160382],
    ),
}

# PyTorch multiplies from step to step, and finds places in cycles in floats. Worst seen: 5e-15; at the very end of its one
# cycle a difference of 2e-19 that is 6e-13 of the value.
TORCH_TOLERANCE = dict(rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize(("make", "ours", "values"), TORCH.values(), ids=TORCH)
def test_values_of_torch(make, ours, values):
    np.testing.assert_allclose([ours(k) for k in AT], values, **TORCH_TOLERANCE)


@pytest.mark.parametrize(("make", "ours", "values"), TORCH.values(), ids=TORCH)
@pytest.mark.filterwarnings("ignore")  # SequentialLR steps in a way that PyTorch warns of
def test_against_torch(make, ours, values):
    torch = pytest.importorskip("torch")
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, theirs = make(torch.optim.lr_scheduler, opt), []
    for _ in range(N):
        theirs.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    np.testing.assert_allclose([ours(k) for k in range(N)], theirs, **TORCH_TOLERANCE)


# Keras', in the same way, from Keras 3.15.
KERAS = {
    "ExponentialDecay": (
        lambda k: k.ExponentialDecay(0.1, 10, 0.5),
        s.exponential_decay(0.1, 10, 0.5),
        [0.1, 0.08122523874044418, 0.030778611078858376, 0.00625, 0.0016746459295973182],
    ),
    "ExponentialDecay, staircase": (
        lambda k: k.ExponentialDecay(0.1, 10, 0.5, staircase=True),
        s.exponential_decay(0.1, 10, 0.5, staircase=True),
        [0.1, 0.1, 0.05, 0.00625, 0.003125],
    ),
    "PolynomialDecay": (
        lambda k: k.PolynomialDecay(0.1, 40, 0.01, 2.0),
        s.polynomial_schedule(0.1, 0.01, 2.0, 40),
        [0.1, 0.08700625598430634, 0.039756253361701965, 0.01, 0.01],
    ),
    "InverseTimeDecay": (
        lambda k: k.InverseTimeDecay(0.1, 10, 0.5),
        s.inverse_time_decay(0.1, 10, 0.5),
        [0.1, 0.08695652335882187, 0.054054055362939835, 0.03333333507180214, 0.025316456332802773],
    ),
    "InverseTimeDecay, staircase": (
        lambda k: k.InverseTimeDecay(0.1, 10, 0.5, staircase=True),
        s.inverse_time_decay(0.1, 10, 0.5, staircase=True),
        [0.1, 0.1, 0.06666667014360428, 0.03333333507180214, 0.02857142873108387],
    ),
    "CosineDecay": (
        lambda k: k.CosineDecay(0.1, 40, 0.1),
        s.cosine_decay_schedule(0.1, 40, 0.1),
        [0.1, 0.09875664860010147, 0.06550504267215729, 0.01, 0.01],
    ),
    "CosineDecay, warm-up": (
        lambda k: k.CosineDecay(0.01, 40, 0.1, warmup_target=0.1, warmup_steps=10),
        s.warmup_cosine_decay_schedule(0.01, 0.1, 10, 50, 0.01),
        [0.01, 0.03700000047683716, 0.09336880594491959, 0.023180196061730385, 0.01],
    ),
    "CosineDecayRestarts": (
        lambda k: k.CosineDecayRestarts(0.1, 7, 2.0, 0.8, 0.1),
        s.cosine_decay_restarts(0.1, 7, 2, 0.8, 0.1),
        [0.1, 0.06501343846321106, 0.0235543604940176, 0.023477474227547646, 0.05254852771759033],
    ),
}

# Keras computes in float32. Worst seen: 3e-7.
KERAS_TOLERANCE = dict(rtol=5e-7)


@pytest.mark.parametrize(("make", "ours", "values"), KERAS.values(), ids=KERAS)
def test_values_of_keras(make, ours, values):
    np.testing.assert_allclose([ours(k) for k in AT], values, **KERAS_TOLERANCE)


@pytest.mark.parametrize(("make", "ours", "values"), KERAS.values(), ids=KERAS)
@pytest.mark.filterwarnings("ignore")
def test_against_keras(make, ours, values, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    theirs = make(keras.optimizers.schedules)
    np.testing.assert_allclose([ours(k) for k in range(N)], [float(theirs(k)) for k in range(N)], **KERAS_TOLERANCE)


# ---- What holds exactly -------------------------------------------------------------------------------------------------


def test_every_schedule_has_an_example():
    assert sorted(EXAMPLES) == sorted(s.__all__)


@pytest.mark.parametrize("seed", range(20))
def test_ends_are_exact_and_held(seed):
    rng = random.Random(seed)
    a, b, c = (rng.uniform(1e-9, 1.0) for _ in range(3))
    begin, n = rng.randrange(1, 50), rng.randrange(1, 50)
    for schedule in (
        s.linear_schedule(a, b, n, begin),
        s.polynomial_schedule(a, b, rng.uniform(0.1, 3), n, begin),
        s.warmup_constant_schedule(a, b, begin + n),
        s.warmup_cosine_decay_schedule(a, c, begin, begin + n, b),
        s.warmup_linear_decay_schedule(a, c, begin, begin + n, b),
        s.join_schedules([a, s.linear_schedule(c, b, n)], [begin + 1]),
    ):
        assert schedule(0) == a, schedule
        assert [schedule(begin + n + 1 + k) for k in range(3)] == [b] * 3
        assert schedule(10**15) == b
    assert s.cosine_decay_schedule(a, n, alpha=c)(n) == a * c
    assert s.warmup_cosine_decay_schedule(a, c, begin, begin + n, b)(begin) == c
    assert s.cosine_decay_restarts(a, n, t_mul=3, alpha=c)(n + 3 * n) == (a - a * c) + a * c
    assert s.cyclic_schedule(a, b, n, begin + 1)(5 * (n + begin + 1)) == a
    assert s.inverse_sqrt_schedule(a, n)(n - 1) == a


DECREASING = [
    s.linear_schedule(0.3, 0.1, 997),
    s.polynomial_schedule(0.3, 0.1, 0.7, 997, 3),
    s.exponential_decay(0.3, 70, 0.4, end_value=0.01),
    s.exponential_decay(0.3, 70, 0.4, staircase=True),
    s.inverse_time_decay(0.3, 70, 0.4),
    s.cosine_decay_schedule(0.3, 997, 0.1, 1.5),
    s.piecewise_constant_schedule(0.3, {100: 0.5, 200: 0.1}),
    s.piecewise_interpolate_schedule("cosine", 0.3, {100: 0.5, 997: 0.1}),
    s.warmup_linear_decay_schedule(0.3, 0.2, 7, 997),
    s.inverse_sqrt_schedule(0.3, 1),
]


@pytest.mark.parametrize("schedule", DECREASING, ids=repr)
def test_decreases(schedule):
    values = [schedule(step) for step in range(1100)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[0] > values[-1] >= 0


def test_warmup_is_continuous():
    n, peak = 10**6, 1.0
    for schedule in (
        s.warmup_cosine_decay_schedule(0.0, peak, n, 3 * n),
        s.warmup_linear_decay_schedule(0.0, peak, n, 3 * n),
        s.warmup_exponential_decay_schedule(0.0, peak, n, n, 0.5),
        s.inverse_sqrt_schedule(peak, n),
        s.cosine_onecycle_schedule(3 * n, peak, 1 / 3),
        s.cyclic_schedule(0.0, peak, n),
    ):
        steps = range(n - 5, n + 5)
        assert max(abs(schedule(k + 1) - schedule(k)) for k in steps) < 2 / n
        assert max(schedule(k) for k in steps) == peak


def test_noam():
    # Vaswani et al., equation 3, with d_model = 512 and 4000 steps of warm-up.
    schedule = s.inverse_sqrt_schedule((512 * 4000) ** -0.5, 4000)
    for t in (1, 17, 3999, 4000, 4001, 100_000):
        assert schedule(t - 1) == pytest.approx(512**-0.5 * min(t**-0.5, t * 4000**-1.5), rel=1e-14)


def test_growth_stays_finite():
    assert s.exponential_decay(1e-7, 1, 1.1, end_value=10.0)(10**9) == 10.0
    for schedule in (
        s.exponential_decay(1e-7, 1, 1.1),
        s.cosine_decay_restarts(1e-7, 2, m_mul=1.1),
        s.cyclic_schedule(0.0, 1e-7, 2, mode="exp_range", gamma=1.1),
    ):
        assert 1.0 < schedule(10**9 + 1) < math.inf


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_shows_its_arguments_and_can_be_copied(name):
    schedule = EXAMPLES[name](LEAST_STEPS) if name != "ReduceOnPlateau" else s.ReduceOnPlateau(0.5, patience=3)
    assert repr(schedule).startswith(f"{name}(")
    others = [pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)]
    if name != "ReduceOnPlateau":
        others.append(eval(repr(schedule), vars(s)))
    for other in others:
        assert repr(other) == repr(schedule)
        assert [other(k) for k in range(N)] == [schedule(k) for k in range(N)]


def test_arguments_that_change_later():
    scales, parts = {2: 0.5}, [0.25, 0.75]
    schedules = [s.piecewise_constant_schedule(1.0, scales), s.join_schedules(parts, [2])]
    scales[2], parts[1] = 0.0, 0.0
    for schedule in schedules:
        assert eval(repr(schedule), vars(s))(3) == schedule(3) != 0.0


@pytest.mark.parametrize("name", EXAMPLES)
def test_late_steps_take_no_longer(name):
    assert 0 <= EXAMPLES[name](LEAST_STEPS)(10**15) <= 1


# ---- Plateaus -----------------------------------------------------------------------------------------------------------

PLATEAUS = [
    {},
    dict(patience=0),
    dict(patience=2, cooldown=3, factor=0.5, min_value=0.01),
    dict(patience=1, threshold=0.2, factor=0.9),
    dict(patience=2, mode="max", threshold=0.1),
    dict(patience=1, threshold=0.05, threshold_mode="abs"),
    dict(patience=1, threshold=0.05, threshold_mode="abs", mode="max", cooldown=1),
    dict(patience=1, min_value=0.5),
]


def observations(seed):
    rng = random.Random(seed)
    values = [2 / (1 + 0.1 * k) + rng.gauss(0, 0.2) for k in range(100)]
    values[20:22] = math.nan, math.inf
    return values


@pytest.mark.parametrize("options", PLATEAUS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_plateau_against_torch(options, seed):
    torch = pytest.importorskip("torch")
    ours = s.ReduceOnPlateau(0.1, **options)
    theirs_options = {"min_lr" if key == "min_value" else key: value for key, value in options.items()}
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, **theirs_options, eps=0.0)
    for k, observed in enumerate(observations(seed)):
        ours.observe(observed)
        theirs.step(observed)
        assert ours(k) == opt.param_groups[0]["lr"]
        assert ours.best == theirs.best


def test_plateau_by_hand():
    schedule = s.ReduceOnPlateau(1.0, factor=0.5, patience=1, threshold=0.0, cooldown=2, min_value=0.3)
    values = []
    for observed in (5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3):
        schedule.observe(observed)
        values.append(schedule(0))
    # Bad ones: the third and fourth reduce; two of cooldown; the next two reduce, to the least.
    assert values == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3]
    assert schedule.best == 3


def test_plateau_goes_on_after_loading():
    values = observations(7)
    schedule, other = (s.ReduceOnPlateau(0.1, patience=2, cooldown=2) for _ in range(2))
    for observed in values[:50]:
        schedule.observe(observed)
    other.load_state_dict(schedule.state_dict())
    for observed in values[50:]:
        schedule.observe(observed)
        other.observe(observed)
        assert other.state_dict() == schedule.state_dict()
    assert schedule(0) < 0.1
    for bad in ({}, {**schedule.state_dict(), "n_bad": -1}, {**schedule.state_dict(), "value": math.nan}):
        before = other.state_dict()
        with pytest.raises(ValueError, match="^state_dict"):
            other.load_state_dict(bad)
        assert other.state_dict() == before


# ---- Optimizers ---------------------------------------------------------------------------------------------------------


def trained(backend, name):
    schedule = EXAMPLES[name](LEAST_STEPS)

    def seen(step):  # clip_norm must not be 0; and so a schedule that observes is called once in each step
        values.setdefault(step, schedule(step))
        return values[step]

    values = {}
    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5), 7))
    sgd = fs.SGD(
        [p],
        lr=seen,
        momentum=seen,
        weight_decay=seen,
        clip_norm=lambda step: seen(step) + 1.0,
        ema_decay=seen,
        backend=backend,
    )
    adam = fs.AdamW([q], lr=seen, betas=(seen, 0.99), weight_decay=seen, clip_value=lambda k: seen(k) + 0.5, backend=backend)
    for _ in range(LEAST_STEPS):
        sgd.step([rng.standard_normal(p.shape)])
        adam.step([rng.standard_normal(q.shape)])
    assert sorted(values) == list(range(LEAST_STEPS))
    return [p, q, *(a for opt in (sgd, adam) for own in opt.state.values() for a in own.values())]


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_hyperparameter_on_both_backends(name):
    found, wanted = trained("c", name), trained("reference", name)
    assert_same_bits(found, wanted)
    assert len(found) >= 6


def test_scheduled_values_are_the_numbers():
    schedule = s.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)
    p, q = np.ones(5), np.ones(5)
    opt, by_hand = fs.AdamW(p, lr=schedule, clip_norm=schedule_of_clip), fs.AdamW(q)
    for step in range(25):
        by_hand.param_groups[0]["lr"] = schedule(step)
        by_hand.clip_norm = schedule_of_clip(step)
        opt.step(p - 3)
        by_hand.step(q - 3)
    np.testing.assert_array_equal(p, q)
    assert "lr=warmup_cosine_decay_schedule(init_value=0.0, peak_value=0.1, warmup_steps=5, decay_steps=20)" in repr(opt)
    assert "lr" not in opt.state_dict()["param_groups"][0]


schedule_of_clip = s.linear_schedule(2.0, 1.0, 10)


# ---- Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: s.constant_schedule("a"), TypeError, "value: expected a finite number, got 'a'"),
        (lambda: s.linear_schedule(math.nan, 1, 1), ValueError, "init_value: expected a finite number, got nan"),
        (lambda: s.linear_schedule(0, [1], 1), TypeError, "end_value: expected a finite number, got [1]"),
        (lambda: s.linear_schedule(0, 1, 0), ValueError, "transition_steps: expected at least 1, got 0"),
        (lambda: s.linear_schedule(0, 1, 2.5), TypeError, "transition_steps: expected a whole number, got 2.5"),
        (lambda: s.linear_schedule(0, 1, True), TypeError, "transition_steps: expected a whole number, got True"),
        (lambda: s.linear_schedule(0, 1, 5, -1), ValueError, "transition_begin: expected at least 0, got -1"),
        (lambda: s.polynomial_schedule(0, 1, 0, 5), ValueError, "power: expected a finite number > 0, got 0"),
        (lambda: s.exponential_decay(1, 1, 0), ValueError, "decay_rate: expected a finite number > 0, got 0"),
        (lambda: s.exponential_decay(1, 1, 0.5, staircase=1), TypeError, "staircase: expected True or False, got 1"),
        (lambda: s.exponential_decay(1, 1, 0.5, end_value="0"), TypeError, "end_value: expected a finite number, got '0'"),
        (lambda: s.inverse_time_decay(1, 1, -1), ValueError, "decay_rate: expected a finite number >= 0, got -1"),
        (lambda: s.cosine_decay_schedule("1", 1), TypeError, "init_value: expected a finite number, got '1'"),
        (lambda: s.cosine_decay_schedule(1, 1, exponent=-1), ValueError, "exponent: expected a finite number > 0, got -1"),
        (lambda: s.inverse_sqrt_schedule(1, 0), ValueError, "warmup_steps: expected at least 1, got 0"),
        (
            lambda: s.piecewise_constant_schedule(1, [5]),
            TypeError,
            "boundaries_and_scales: expected a mapping of steps to scales, got [5]",
        ),
        (
            lambda: s.piecewise_constant_schedule(1, {0.5: 1}),
            TypeError,
            "boundaries_and_scales: key: expected a whole number, got 0.5",
        ),
        (
            lambda: s.piecewise_constant_schedule(1, {5: -1}),
            ValueError,
            "boundaries_and_scales[5]: expected a finite number >= 0, got -1",
        ),
        (
            lambda: s.piecewise_interpolate_schedule("cubic", 1, {}),
            ValueError,
            "interpolate_type: expected one of 'linear', 'cosine', got 'cubic'",
        ),
        (lambda: s.cosine_onecycle_schedule(10, 1, 1.5), ValueError, "pct_start: expected a number in [0, 1], got 1.5"),
        (
            lambda: s.linear_onecycle_schedule(10, 1, 0.5, 0.25),
            ValueError,
            "pct_final: expected at least pct_start, 0.5, got 0.25",
        ),
        (
            lambda: s.linear_onecycle_schedule(10, 1, div_factor=0),
            ValueError,
            "div_factor: expected a finite number > 0, got 0",
        ),
        (lambda: s.warmup_constant_schedule(0, 1, -1), ValueError, "warmup_steps: expected at least 0, got -1"),
        (lambda: s.warmup_cosine_decay_schedule(0, 1, 5, 5), ValueError, "decay_steps: expected at least 6, got 5"),
        (lambda: s.warmup_linear_decay_schedule(0, 1, "5", 5), TypeError, "warmup_steps: expected a whole number, got '5'"),
        (lambda: s.cosine_decay_restarts(1, 5, 1.5), TypeError, "t_mul: expected a whole number, got 1.5"),
        (lambda: s.cosine_decay_restarts(1, 5, m_mul=-1), ValueError, "m_mul: expected a finite number >= 0, got -1"),
        (lambda: s.cyclic_schedule(0, 1, 0), ValueError, "step_size_up: expected at least 1, got 0"),
        (
            lambda: s.cyclic_schedule(0, 1, 5, mode="round"),
            ValueError,
            "mode: expected one of 'triangular', 'triangular2', 'exp_range', got 'round'",
        ),
        (lambda: s.cyclic_schedule(0, 1, 5, gamma=0), ValueError, "gamma: expected a finite number > 0, got 0"),
        (lambda: s.sgdr_schedule([5]), TypeError, "cosine_kwargs: expected a list of mappings, got [5]"),
        (
            lambda: s.sgdr_schedule({"peak_value": 1}),
            TypeError,
            "cosine_kwargs: expected a list of mappings, got {'peak_value': 1}",
        ),
        (
            lambda: s.ReduceOnPlateau(1).load_state_dict({"value": 1, "best": math.nan, "n_bad": 0, "n_cooldown": 0}),
            ValueError,
            "state_dict['best']: expected a number, got nan",
        ),
        (lambda: s.join_schedules([], []), ValueError, "schedules: expected at least one, got []"),
        (lambda: s.join_schedules([1, "a"], [5]), TypeError, "schedules[1]: expected a finite number, got 'a'"),
        (lambda: s.join_schedules([1, 2], 5), TypeError, "boundaries: expected a list or tuple, got 5"),
        (
            lambda: s.join_schedules([1, 2], []),
            ValueError,
            "boundaries: expected 1, one less than schedules, got 0",
        ),
        (lambda: s.join_schedules([1, 2, 3], [5, 5]), ValueError, "boundaries[1]: expected at least 6, got 5"),
        (lambda: s.multiply_schedules(1), TypeError, "schedules: expected a list or tuple, got 1"),
        (lambda: s.ReduceOnPlateau(1, factor=1.0), ValueError, "factor: expected a number in (0, 1), got 1.0"),
        (lambda: s.ReduceOnPlateau(1, patience=-1), ValueError, "patience: expected at least 0, got -1"),
        (lambda: s.ReduceOnPlateau(1, mode="less"), ValueError, "mode: expected one of 'min', 'max', got 'less'"),
        (
            lambda: s.ReduceOnPlateau(1, threshold_mode="r"),
            ValueError,
            "threshold_mode: expected one of 'rel', 'abs', got 'r'",
        ),
        (lambda: s.ReduceOnPlateau(1).observe("low"), TypeError, "observed: expected a number, got 'low'"),
        (lambda: s.equal_average(-1), ValueError, "start: expected at least 0, got -1"),
        (lambda: s.ema_warmup(2), ValueError, "decay: expected a number in [0, 1], got 2"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---- The command --------------------------------------------------------------------------------------------------------


def test_command(capsys, tmp_path):
    plot = tmp_path / "all.png"
    assert __main__.main(["schedules", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(EXAMPLES)
    assert lines[0].split() == ["step", "0", "25", "50", "75", "100"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert __main__.main(["schedules", "linear_schedule", "--steps", "20"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["linear_schedule", "0.1", "0.1", "0.0505", "0.001", "0.001"]


def test_command_mistakes(capsys, monkeypatch, tmp_path):
    assert __main__.main(["schedules", "linear"]) == 2
    assert "NAME: expected any of constant_schedule, linear_schedule," in capsys.readouterr().err
    for steps, message in (("3", "expected at least 20, got 3"), ("1" + 12 * "0", "expected at most 100000, got a larger")):
        with pytest.raises(SystemExit, match="2"):
            __main__.main(["schedules", "--steps", steps])
        assert message in capsys.readouterr().err

    def without_matplotlib(name, *others):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return known(name, *others)

    known = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["schedules", "--plot", str(tmp_path / "x.png")])
    assert "--plot: it needs matplotlib, pip install 'fusedstep[demo]'" in capsys.readouterr().err
