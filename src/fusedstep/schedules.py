"""Hyper-parameters that change with the steps: functions of the number of steps taken so far, 0 at the first.

Names and arguments are optax's where it has them. Any hyper-parameter may be such a function, or one of your own. Values are
Python floats, computed in double; ends are met exactly, and held from there on. ``fusedstep schedules`` draws them all.
"""

from __future__ import annotations

import functools
import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ParamSpec

from . import _hyper
from ._hyper import Hyper

__all__ = [
    "ReduceOnPlateau",
    "constant_schedule",
    "cosine_decay_restarts",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "cyclic_schedule",
    "ema_warmup",
    "equal_average",
    "exponential_decay",
    "inverse_sqrt_schedule",
    "inverse_time_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "multiply_schedules",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_linear_decay_schedule",
]

P = ParamSpec("P")
Function = Callable[[int], float]


class Schedule:
    """A function of the steps that shows what it was made with, and can be pickled."""

    def __init__(self, make: Callable[..., Schedule], arguments: dict[str, Any], function: Function) -> None:
        self._make, self._arguments, self._function = make, arguments, function

    def __call__(self, step: int) -> float:
        return self._function(step)

    def __repr__(self) -> str:
        return f"{self._make.__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(self._make, **self._arguments), ()


def schedule(make: Callable[P, Function]) -> Callable[P, Schedule]:
    """Turn what checks arguments and makes a function into what makes a `Schedule`."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_schedule(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        function = make(*args, **kwargs)
        if isinstance(function, Schedule):  # one made with another's formula
            function = function._function
        arguments = signature.bind(*args, **kwargs).arguments
        own = {name: value.copy() if isinstance(value, (list, dict)) else value for name, value in arguments.items()}
        return Schedule(make_schedule, own, function)

    return make_schedule


# ---- What they are built of ---------------------------------------------------------------------------------------------


def constant(value: float) -> Function:
    return lambda step: value


def transition(
    init_value: float, end_value: float, n_steps: int, shape: Callable[[float], float], begin: int = 0
) -> Function:
    """From one value to another in some steps; `shape` falls from 1 at 0 to 0 at 1, as the part of the way that is left."""
    difference, end = init_value - end_value, begin + n_steps

    def at(step: int) -> float:
        if step <= begin:
            return init_value
        if step >= end:
            return end_value
        return difference * shape((step - begin) / n_steps) + end_value

    return at


def linear(fraction: float) -> float:
    return 1.0 - fraction


def cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


SHAPES = {"linear": linear, "cosine": cosine}


def power_of(shape: Callable[[float], float], exponent: float) -> Callable[[float], float]:
    return shape if exponent == 1 else lambda fraction: shape(fraction) ** exponent


def powers_of(base: float) -> Callable[[float], float]:
    """By exponent; from e**700 on, beyond which double's range ends, they no longer grow."""
    largest = 700 / math.log(base) if base > 1 else math.inf
    return lambda exponent: base ** min(exponent, largest)


def joined(functions: Sequence[Function], boundaries: Sequence[int]) -> Function:
    """Each function from its boundary on, where it starts at 0."""
    starts = [0, *boundaries]

    def at(step: int) -> float:
        i = bisect_right(boundaries, step)
        return functions[i](step - starts[i])

    return at


def through(values: Sequence[float], boundaries: Sequence[int], shape: Callable[[float], float]) -> Function:
    """The first value at 0, each of the others at its boundary, and the way between."""
    pieces = [
        transition(here, there, end - start, shape)
        for here, there, start, end in zip(values, values[1:], [0, *boundaries], boundaries)
    ]
    return joined([*pieces, constant(values[-1])], boundaries)


def warmed_up(init_value: float, peak_value: float, warmup_steps: int, then: Function) -> Function:
    init_value, peak_value = _hyper.finite(init_value, "init_value"), _hyper.finite(peak_value, "peak_value")
    warmup_steps = _hyper.whole_number(warmup_steps, "warmup_steps", 0)
    return joined([transition(init_value, peak_value, warmup_steps, linear), then], [warmup_steps])


def steps_after_warmup(warmup_steps: int, decay_steps: int) -> int:
    warmup_steps = _hyper.whole_number(warmup_steps, "warmup_steps", 0)
    return _hyper.whole_number(decay_steps, "decay_steps", warmup_steps + 1) - warmup_steps


def checked_functions(schedules: Any) -> list[Function]:
    """Schedules, or numbers in their place, as functions."""
    if not isinstance(schedules, (list, tuple)):
        raise TypeError(f"schedules: expected a list or tuple, got {schedules!r}")
    if not schedules:
        raise ValueError(f"schedules: expected at least one, got {schedules!r}")
    return [s if callable(s) else constant(_hyper.finite(s, f"schedules[{i}]")) for i, s in enumerate(schedules)]


def scaled_values(init_value: Any, boundaries_and_scales: Any) -> tuple[list[float], list[int]]:
    """The values that the products of scales lead to, one more than the boundaries, and the boundaries."""
    label = "boundaries_and_scales"
    if not isinstance(boundaries_and_scales, Mapping):
        raise TypeError(f"{label}: expected a mapping of steps to scales, got {boundaries_and_scales!r}")
    values = [_hyper.finite(init_value, "init_value")]
    boundaries = sorted(_hyper.whole_number(boundary, f"{label}: key", 0) for boundary in boundaries_and_scales)
    for boundary in boundaries:
        scale = boundaries_and_scales[boundary]
        values.append(values[-1] * _hyper.at_least_0(scale, f"{label}[{boundary}]"))
    return values, boundaries


# ---- One formula --------------------------------------------------------------------------------------------------------


@schedule
def constant_schedule(value: float) -> Function:
    """Always `value`.

    Examples
    --------
    >>> import fusedstep as fs
    >>> fs.schedules.constant_schedule(0.1)(1000)
    0.1

    References
    ----------
    As ``optax.constant_schedule``.
    """
    return constant(_hyper.finite(value, "value"))


@schedule
def linear_schedule(init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0) -> Function:
    """``(init - end) * (1 - f) + end`` with ``f = (step - begin) / transition_steps``, held at both ends.

    Parameters
    ----------
    init_value, end_value : float
        Value up to `transition_begin`, and from `transition_steps` later on.
    transition_steps : int
        At least 1.
    transition_begin : int
        Step of the start.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.linear_schedule(0.5, 0.25, 10)
    >>> lr
    linear_schedule(init_value=0.5, end_value=0.25, transition_steps=10)
    >>> lr(0), lr(5), lr(10), lr(1000)
    (0.5, 0.375, 0.25, 0.25)

    References
    ----------
    As ``optax.linear_schedule``; ``torch.optim.lr_scheduler.LinearLR`` with ``start_factor * lr`` and ``end_factor * lr``.
    """
    return polynomial_schedule(init_value, end_value, 1.0, transition_steps, transition_begin)


@schedule
def polynomial_schedule(
    init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> Function:
    """``(init - end) * (1 - f)**power + end`` with ``f = (step - begin) / transition_steps``, held at both ends.

    Parameters
    ----------
    init_value, end_value : float
        Value up to `transition_begin`, and from `transition_steps` later on.
    power : float
        More than 0.
    transition_steps : int
        At least 1.
    transition_begin : int
        Step of the start.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.polynomial_schedule(1.0, 0.0, power=2, transition_steps=10)
    >>> lr(0), lr(5), lr(10)
    (1.0, 0.25, 0.0)

    References
    ----------
    As ``optax.polynomial_schedule``, ``keras.optimizers.schedules.PolynomialDecay`` without `cycle`, and, to 0,
    ``torch.optim.lr_scheduler.PolynomialLR``.
    """
    init_value, end_value = _hyper.finite(init_value, "init_value"), _hyper.finite(end_value, "end_value")
    power = _hyper.above_0(power, "power")
    transition_steps = _hyper.whole_number(transition_steps, "transition_steps", 1)
    begin = _hyper.whole_number(transition_begin, "transition_begin", 0)
    return transition(init_value, end_value, transition_steps, power_of(linear, power), begin)


@schedule
def exponential_decay(
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Function:
    """``init * decay_rate**f`` with ``f = (step - begin) / transition_steps``.

    Parameters
    ----------
    init_value : float
        Value up to `transition_begin`.
    transition_steps : int
        After so many steps the value is `decay_rate` times what it was; at least 1.
    decay_rate : float
        More than 0; above 1 the value grows.
    transition_begin : int
        Step of the start.
    staircase : bool
        Use the whole part of f.
    end_value : float, optional
        A lower bound; an upper one if the value grows.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.exponential_decay(1.0, 10, 0.25, end_value=0.01)
    >>> lr(0), lr(5), lr(10), lr(1000)
    (1.0, 0.5, 0.25, 0.01)
    >>> lr = fs.schedules.exponential_decay(1.0, 10, 0.5, staircase=True)
    >>> lr(9), lr(10), lr(20)
    (1.0, 0.5, 0.25)

    References
    ----------
    As ``optax.exponential_decay`` and ``keras.optimizers.schedules.ExponentialDecay``; with a staircase
    ``torch.optim.lr_scheduler.StepLR``, with ``transition_steps=1`` its ``ExponentialLR``.
    """
    init_value, decay_rate = _hyper.finite(init_value, "init_value"), _hyper.above_0(decay_rate, "decay_rate")
    transition_steps = _hyper.whole_number(transition_steps, "transition_steps", 1)
    begin = _hyper.whole_number(transition_begin, "transition_begin", 0)
    whole = _hyper.boolean(staircase, "staircase")
    factor = powers_of(decay_rate)
    if end_value is None:
        bound = None
    else:
        end_value = _hyper.finite(end_value, "end_value")
        bound = functools.partial(max if decay_rate < 1 else min, end_value)

    def at(step: int) -> float:
        exponent = max(0, step - begin) / transition_steps
        value = init_value * factor(math.floor(exponent) if whole else exponent)
        return value if bound is None else bound(value)

    return at


@schedule
def inverse_time_decay(init_value: float, transition_steps: int, decay_rate: float, staircase: bool = False) -> Function:
    """``init / (1 + decay_rate * f)`` with ``f = step / transition_steps``.

    Parameters
    ----------
    init_value : float
        Value at the first step.
    transition_steps : int
        At least 1.
    decay_rate : float
        At least 0.
    staircase : bool
        Use the whole part of f.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.inverse_time_decay(1.0, transition_steps=10, decay_rate=0.5)
    >>> lr(0), lr(20), lr(60)
    (1.0, 0.5, 0.25)

    References
    ----------
    As ``keras.optimizers.schedules.InverseTimeDecay``; Robbins and Monro, "A Stochastic Approximation Method" (1951).
    """
    init_value, decay_rate = _hyper.finite(init_value, "init_value"), _hyper.at_least_0(decay_rate, "decay_rate")
    transition_steps = _hyper.whole_number(transition_steps, "transition_steps", 1)
    if _hyper.boolean(staircase, "staircase"):
        return lambda step: init_value / (1.0 + decay_rate * (step // transition_steps))
    return lambda step: init_value / (1.0 + decay_rate * (step / transition_steps))


@schedule
def cosine_decay_schedule(init_value: float, decay_steps: int, alpha: float = 0.0, exponent: float = 1.0) -> Function:
    """Half a cosine from `init_value` to ``alpha * init_value``, held from there on.

    ``init * ((1 - alpha) * ((1 + cos(pi * step / decay_steps)) / 2)**exponent + alpha)``

    Parameters
    ----------
    init_value : float
        Value at the first step.
    decay_steps : int
        At least 1.
    alpha : float
        What part of the value remains.
    exponent : float
        More than 0.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.cosine_decay_schedule(1.0, 10)
    >>> lr(0), round(lr(5), 15), lr(10), lr(1000)
    (1.0, 0.5, 0.0, 0.0)

    References
    ----------
    As ``optax.cosine_decay_schedule`` and ``keras.optimizers.schedules.CosineDecay``. PyTorch's ``CosineAnnealingLR`` rises
    again after `decay_steps`. Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017).
    """
    init_value, alpha = _hyper.finite(init_value, "init_value"), _hyper.finite(alpha, "alpha")
    decay_steps = _hyper.whole_number(decay_steps, "decay_steps", 1)
    shape = power_of(cosine, _hyper.above_0(exponent, "exponent"))
    return transition(init_value, alpha * init_value, decay_steps, shape)


@schedule
def inverse_sqrt_schedule(peak_value: float, warmup_steps: int) -> Function:
    """``peak * min(t / warmup_steps, sqrt(warmup_steps / t))`` with ``t = step + 1``, the number of the step.

    Parameters
    ----------
    peak_value : float
        Value of step number `warmup_steps`; in the paper ``(d_model * warmup_steps)**-0.5``.
    warmup_steps : int
        At least 1.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.inverse_sqrt_schedule(1.0, 100)
    >>> lr(0), lr(99), lr(399)
    (0.01, 1.0, 0.5)

    References
    ----------
    Vaswani et al., "Attention Is All You Need" (2017), where N. Shazeer ("Noam") is said to have found it.
    """
    peak_value = _hyper.finite(peak_value, "peak_value")
    warmup_steps = _hyper.whole_number(warmup_steps, "warmup_steps", 1)
    return lambda step: peak_value * min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))


# ---- Pieces -------------------------------------------------------------------------------------------------------------


@schedule
def piecewise_constant_schedule(init_value: float, boundaries_and_scales: Mapping[int, float]) -> Function:
    """The product of `init_value` and the scales of all boundaries reached.

    Parameters
    ----------
    init_value : float
        Value before the first boundary.
    boundaries_and_scales : mapping of int to float
        From each of these steps on the value is so many times what it was.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.piecewise_constant_schedule(1.0, {100: 0.5, 200: 0.25})
    >>> lr(99), lr(100), lr(200)
    (1.0, 0.5, 0.125)

    References
    ----------
    As ``optax.piecewise_constant_schedule`` and ``torch.optim.lr_scheduler.MultiStepLR``. Keras' ``PiecewiseConstantDecay``
    comes a step later: there a boundary still has the value before.
    """
    values, boundaries = scaled_values(init_value, boundaries_and_scales)
    return lambda step: values[bisect_right(boundaries, step)]


@schedule
def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: float, boundaries_and_scales: Mapping[int, float]
) -> Function:
    """The values of :func:`piecewise_constant_schedule` at its boundaries, and a way from one to the next between them.

    Parameters
    ----------
    interpolate_type : {"linear", "cosine"}
        The way: straight, or half a cosine.
    init_value : float
        Value at the first step.
    boundaries_and_scales : mapping of int to float
        At each of these steps the value is so many times what it was at the one before.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.piecewise_interpolate_schedule("linear", 1.0, {100: 0.5, 200: 0.25})
    >>> lr(0), lr(50), lr(100), lr(200), lr(1000)
    (1.0, 0.75, 0.5, 0.125, 0.125)

    References
    ----------
    As ``optax.piecewise_interpolate_schedule``.
    """
    shape = SHAPES[_hyper.one_of(interpolate_type, tuple(SHAPES), "interpolate_type")]
    return through(*scaled_values(init_value, boundaries_and_scales), shape)


@schedule
def cosine_onecycle_schedule(
    transition_steps: int, peak_value: float, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> Function:
    """One cycle in two halves of a cosine: up from ``peak / div_factor``, down to ``peak / div_factor / final_div_factor``.

    Parameters
    ----------
    transition_steps : int
        Length of the cycle; at least 1.
    peak_value : float
        The highest value.
    pct_start : float
        The part of the cycle that rises, in [0, 1]: ``int(pct_start * transition_steps)`` steps.
    div_factor, final_div_factor : float
        As above; more than 0.

    Notes
    -----
    For a momentum that falls meanwhile, as Smith advises, a :func:`piecewise_interpolate_schedule` with the same boundaries.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.cosine_onecycle_schedule(100, peak_value=1.0, div_factor=4.0, final_div_factor=8.0)
    >>> lr(0), lr(30), lr(100)
    (0.25, 1.0, 0.03125)

    References
    ----------
    As ``optax.cosine_onecycle_schedule``, and ``torch.optim.lr_scheduler.OneCycleLR`` with ``total_steps=transition_steps +
    1`` if `pct_start` of these is a whole number. Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks
    Using Large Learning Rates" (2018).
    """
    transition_steps = _hyper.whole_number(transition_steps, "transition_steps", 1)
    start, peak, end = onecycle_values(peak_value, div_factor, final_div_factor)
    up = int(_hyper.from_0_to_1(pct_start, "pct_start") * transition_steps)
    return through([start, peak, end], [up, transition_steps], cosine)


@schedule
def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Function:
    """One cycle in three straight lines: up from ``start = peak / div_factor``, back, on to ``start / final_div_factor``.

    Parameters
    ----------
    transition_steps : int
        Length of the cycle; at least 1.
    peak_value : float
        The highest value.
    pct_start, pct_final : float
        The parts of the cycle at which the value is at its peak, and back; in [0, 1], the first not above the second.
    div_factor, final_div_factor : float
        More than 0.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.linear_onecycle_schedule(100, peak_value=1.0, div_factor=4.0, final_div_factor=8.0)
    >>> lr(0), lr(30), lr(85), lr(100)
    (0.25, 1.0, 0.25, 0.03125)

    References
    ----------
    As ``optax.linear_onecycle_schedule``; PyTorch's ``OneCycleLR`` with `three_phase`. Smith and Topin (2018), as above.
    """
    transition_steps = _hyper.whole_number(transition_steps, "transition_steps", 1)
    start, peak, end = onecycle_values(peak_value, div_factor, final_div_factor)
    pct_start, pct_final = _hyper.from_0_to_1(pct_start, "pct_start"), _hyper.from_0_to_1(pct_final, "pct_final")
    if pct_start > pct_final:
        raise ValueError(f"pct_final: expected at least pct_start, {pct_start}, got {pct_final}")
    up, back = int(pct_start * transition_steps), int(pct_final * transition_steps)
    return through([start, peak, start, end], [up, back, transition_steps], linear)


def onecycle_values(peak_value: Any, div_factor: Any, final_div_factor: Any) -> tuple[float, float, float]:
    peak = _hyper.finite(peak_value, "peak_value")
    start = peak / _hyper.above_0(div_factor, "div_factor")
    return start, peak, start / _hyper.above_0(final_div_factor, "final_div_factor")


# ---- Warm-up ------------------------------------------------------------------------------------------------------------


@schedule
def warmup_constant_schedule(init_value: float, peak_value: float, warmup_steps: int) -> Function:
    """A straight line from `init_value` to `peak_value`, which is held.

    Parameters
    ----------
    init_value, peak_value : float
        Value at the first step, and after `warmup_steps`.
    warmup_steps : int
        At least 0.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.warmup_constant_schedule(0.0, 1.0, 10)
    >>> lr(0), lr(5), lr(10), lr(1000)
    (0.0, 0.5, 1.0, 1.0)

    References
    ----------
    As ``optax.warmup_constant_schedule``. Goyal et al., "Accurate, Large Minibatch SGD" (2017).
    """
    return warmed_up(init_value, peak_value, warmup_steps, constant(_hyper.finite(peak_value, "peak_value")))


@schedule
def warmup_cosine_decay_schedule(
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> Function:
    """A straight line from `init_value` to `peak_value`, then half a cosine to `end_value`.

    Parameters
    ----------
    init_value, peak_value, end_value : float
        Value at the first step, after `warmup_steps`, and from `decay_steps` on.
    warmup_steps : int
        At least 0.
    decay_steps : int
        All steps, those of the warm-up included; more than these.
    exponent : float
        Of the cosine's part, as for :func:`cosine_decay_schedule`.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=110, end_value=0.1)
    >>> lr(0), lr(5), lr(10), round(lr(60), 15), lr(110)
    (0.0, 0.5, 1.0, 0.55, 0.1)

    References
    ----------
    As ``optax.warmup_cosine_decay_schedule``. Keras' ``CosineDecay`` with `warmup_target` counts its `decay_steps` after the
    warm-up.
    """
    n_steps = steps_after_warmup(warmup_steps, decay_steps)
    peak_value, end_value = _hyper.finite(peak_value, "peak_value"), _hyper.finite(end_value, "end_value")
    shape = power_of(cosine, _hyper.above_0(exponent, "exponent"))
    return warmed_up(init_value, peak_value, warmup_steps, transition(peak_value, end_value, n_steps, shape))


@schedule
def warmup_linear_decay_schedule(
    init_value: float, peak_value: float, warmup_steps: int, decay_steps: int, end_value: float = 0.0
) -> Function:
    """A straight line from `init_value` to `peak_value`, and another to `end_value`.

    Parameters
    ----------
    init_value, peak_value, end_value : float
        Value at the first step, after `warmup_steps`, and from `decay_steps` on.
    warmup_steps : int
        At least 0.
    decay_steps : int
        All steps, those of the warm-up included; more than these.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.warmup_linear_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=110)
    >>> lr(0), lr(5), lr(10), lr(60), lr(110)
    (0.0, 0.5, 1.0, 0.5, 0.0)

    References
    ----------
    As ``get_linear_schedule_with_warmup`` of Hugging Face's transformers. Devlin et al., "BERT" (2019).
    """
    peak_value, end_value = _hyper.finite(peak_value, "peak_value"), _hyper.finite(end_value, "end_value")
    decay = transition(peak_value, end_value, steps_after_warmup(warmup_steps, decay_steps), linear)
    return warmed_up(init_value, peak_value, warmup_steps, decay)


@schedule
def warmup_exponential_decay_schedule(
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Function:
    """A straight line from `init_value` to `peak_value`, then :func:`exponential_decay`, whose steps count from there.

    Parameters
    ----------
    init_value, peak_value : float
        Value at the first step, and after `warmup_steps`.
    warmup_steps : int
        At least 0.
    transition_steps, decay_rate, transition_begin, staircase, end_value
        As for :func:`exponential_decay`.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=100, decay_rate=0.25)
    >>> lr(0), lr(5), lr(10), lr(60), lr(110)
    (0.0, 0.5, 1.0, 0.5, 0.25)

    References
    ----------
    As ``optax.warmup_exponential_decay_schedule``.
    """
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return warmed_up(init_value, peak_value, warmup_steps, decay)


# ---- Cycles -------------------------------------------------------------------------------------------------------------


@schedule
def cosine_decay_restarts(
    init_value: float, decay_steps: int, t_mul: int = 1, m_mul: float = 1.0, alpha: float = 0.0
) -> Function:
    """:func:`cosine_decay_schedule` again and again, each time `t_mul` times as long and from `m_mul` times as high.

    In cycle k = 0, 1, ..., of ``decay_steps * t_mul**k`` steps, at the fraction f of it:
    ``init * ((1 - alpha) * m_mul**k * (1 + cos(pi * f)) / 2 + alpha)``

    Parameters
    ----------
    init_value : float
        Value at the first step.
    decay_steps : int
        Length of the first cycle; at least 1.
    t_mul : int
        At least 1.
    m_mul : float
        At least 0.
    alpha : float
        What part of the value remains.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.cosine_decay_restarts(1.0, 10, t_mul=2, m_mul=0.5)
    >>> lr(0), round(lr(5), 15), lr(10), round(lr(20), 15), lr(30)
    (1.0, 0.5, 0.5, 0.25, 0.25)

    References
    ----------
    As ``keras.optimizers.schedules.CosineDecayRestarts``, whose `t_mul` is 2 by default, and
    ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`` with ``T_0=decay_steps, T_mult=t_mul, eta_min=alpha * lr``.
    Loshchilov and Hutter (2017), as above.
    """
    init_value, alpha = _hyper.finite(init_value, "init_value"), _hyper.finite(alpha, "alpha")
    decay_steps, t_mul = _hyper.whole_number(decay_steps, "decay_steps", 1), _hyper.whole_number(t_mul, "t_mul", 1)
    factor, least = powers_of(_hyper.at_least_0(m_mul, "m_mul")), alpha * init_value

    def at(step: int) -> float:
        if t_mul == 1:
            cycle, step = divmod(step, decay_steps)
            length = decay_steps
        else:
            cycle, length = 0, decay_steps
            while step >= length:
                cycle, step, length = cycle + 1, step - length, length * t_mul
        return (init_value - least) * factor(cycle) * cosine(step / length) + least

    return at


@schedule
def sgdr_schedule(cosine_kwargs: Sequence[Mapping[str, Any]]) -> Function:
    """One :func:`warmup_cosine_decay_schedule` after the other, each for its `decay_steps`.

    Parameters
    ----------
    cosine_kwargs : sequence of mapping
        The arguments of each.

    Examples
    --------
    >>> import fusedstep as fs
    >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=10)
    >>> lr = fs.schedules.sgdr_schedule([dict(cycle, decay_steps=100), dict(cycle, decay_steps=200, end_value=0.5)])
    >>> lr(10), lr(100), lr(110), lr(300)
    (1.0, 0.0, 1.0, 0.5)

    References
    ----------
    As ``optax.sgdr_schedule``; :func:`cosine_decay_restarts` goes on for ever.
    """
    if not isinstance(cosine_kwargs, (list, tuple)) or not all(isinstance(kwargs, Mapping) for kwargs in cosine_kwargs):
        raise TypeError(f"cosine_kwargs: expected a list of mappings, got {cosine_kwargs!r}")
    schedules = [warmup_cosine_decay_schedule(**kwargs) for kwargs in cosine_kwargs]
    ends = [sum(kwargs["decay_steps"] for kwargs in cosine_kwargs[:i]) for i in range(1, len(schedules))]
    return join_schedules(schedules, ends)


@schedule
def cyclic_schedule(
    init_value: float,
    peak_value: float,
    step_size_up: int,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> Function:
    """Straight up from `init_value` to `peak_value` and down again, over and over.

    Parameters
    ----------
    init_value, peak_value : float
        The lowest and highest value.
    step_size_up, step_size_down : int
        Steps up and down, at least 1; as many down as up unless given.
    mode : {"triangular", "triangular2", "exp_range"}
        What becomes of the height above `init_value`: stays, is halved from cycle to cycle, or is multiplied by
        ``gamma**step``.
    gamma : float
        More than 0.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.cyclic_schedule(0.0, 1.0, 10, mode="triangular2")
    >>> lr(0), lr(5), lr(10), lr(15), lr(20), lr(30)
    (0.0, 0.5, 1.0, 0.5, 0.0, 0.5)

    References
    ----------
    As ``torch.optim.lr_scheduler.CyclicLR``. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017).
    """
    init_value, peak_value = _hyper.finite(init_value, "init_value"), _hyper.finite(peak_value, "peak_value")
    up = _hyper.whole_number(step_size_up, "step_size_up", 1)
    down = up if step_size_down is None else _hyper.whole_number(step_size_down, "step_size_down", 1)
    _hyper.one_of(mode, ("triangular", "triangular2", "exp_range"), "mode")
    factor = powers_of(_hyper.above_0(gamma, "gamma"))

    def at(step: int) -> float:
        cycle, place = divmod(step, up + down)
        height = place / up if place <= up else (up + down - place) / down
        if mode == "triangular2":
            height *= 0.5**cycle
        elif mode == "exp_range":
            height *= factor(step)
        return (peak_value - init_value) * height + init_value

    return at


# ---- Of others ----------------------------------------------------------------------------------------------------------


@schedule
def join_schedules(schedules: Sequence[Hyper], boundaries: Sequence[int]) -> Function:
    """One schedule after the other; each starts at 0 at its boundary.

    Parameters
    ----------
    schedules : list of callable or float
        At least one.
    boundaries : list of int
        The first step of each but the first, in ascending order.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.join_schedules([0.1, fs.schedules.linear_schedule(1.0, 0.0, 10)], [100])
    >>> lr(99), lr(100), lr(105)
    (0.1, 1.0, 0.5)

    References
    ----------
    As ``optax.join_schedules`` and ``torch.optim.lr_scheduler.SequentialLR``.
    """
    functions = checked_functions(schedules)
    if not isinstance(boundaries, (list, tuple)):
        raise TypeError(f"boundaries: expected a list or tuple, got {boundaries!r}")
    if len(boundaries) != len(functions) - 1:
        raise ValueError(f"boundaries: expected {len(functions) - 1}, one less than schedules, got {len(boundaries)}")
    ends: list[int] = []
    for i, boundary in enumerate(boundaries):
        ends.append(_hyper.whole_number(boundary, f"boundaries[{i}]", ends[-1] + 1 if ends else 0))
    return joined(functions, ends)


@schedule
def multiply_schedules(schedules: Sequence[Hyper]) -> Function:
    """The product of all.

    Parameters
    ----------
    schedules : list of callable or float
        At least one.

    Examples
    --------
    >>> import fusedstep as fs
    >>> plateau = fs.schedules.ReduceOnPlateau(0.5)
    >>> lr = fs.schedules.multiply_schedules([fs.schedules.warmup_constant_schedule(0.0, 1.0, 10), plateau])
    >>> lr(5), lr(10)
    (0.25, 0.5)

    References
    ----------
    As ``torch.optim.lr_scheduler.ChainedScheduler``.
    """
    functions = checked_functions(schedules)
    return lambda step: math.prod([function(step) for function in functions])


@dataclass(eq=False)
class ReduceOnPlateau:
    """A value that is reduced when what you :meth:`observe`, a loss for example, no longer gets better.

    Parameters
    ----------
    init_value : float
        The first value.
    factor : float
        What the value is multiplied by; in (0, 1).
    patience : int
        Reduce at the first observation that is not better after so many others.
    threshold : float
        How much better than the best so far is better: by this part of it, or, absolute, by so much.
    threshold_mode : {"rel", "abs"}
        See `threshold`.
    cooldown : int
        After a reduction so many observations are not counted as bad.
    min_value : float
        Never reduce below.
    mode : {"min", "max"}
        Whether smaller is better, or larger. A nan is not better.

    Attributes
    ----------
    value : float
        The present value, which calls return whatever the step.
    best : float
        The best observation so far.

    Notes
    -----
    It changes by :meth:`observe` alone, and is not part of an optimizer's state dict: save its own.

    Examples
    --------
    >>> import fusedstep as fs
    >>> lr = fs.schedules.ReduceOnPlateau(0.5, factor=0.5, patience=1)
    >>> for loss in 3.0, 2.0, 2.0, 2.0:
    ...     lr.observe(loss)
    >>> lr(4)
    0.25

    References
    ----------
    As ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with ``eps=0``.
    """

    init_value: float
    _: KW_ONLY
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_value: float = 0.0
    mode: str = "min"
    value: float = field(init=False)
    best: float = field(init=False)
    _n_bad: int = field(init=False, repr=False, default=0)  # observations in a row that were not better
    _n_cooldown: int = field(init=False, repr=False, default=0)  # more that are not counted

    def __post_init__(self) -> None:
        self.value = _hyper.finite(self.init_value, "init_value")
        self.factor = _hyper.number(self.factor, "factor", "a number in (0, 1)", lambda x: 0 < x < 1)
        self.patience = _hyper.whole_number(self.patience, "patience", 0)
        self.threshold = _hyper.at_least_0(self.threshold, "threshold")
        _hyper.one_of(self.threshold_mode, ("rel", "abs"), "threshold_mode")
        self.cooldown = _hyper.whole_number(self.cooldown, "cooldown", 0)
        self.min_value = _hyper.finite(self.min_value, "min_value")
        _hyper.one_of(self.mode, ("min", "max"), "mode")
        self.best = math.inf if self.mode == "min" else -math.inf

    def __call__(self, step: int) -> float:
        return self.value

    def observe(self, observed: float) -> None:
        """Take note of a loss or the like, and reduce the value if it is time."""
        observed = _hyper.as_float(observed, "observed", "a number")
        if self._is_better(observed):
            self.best, self._n_bad = observed, 0
        else:
            self._n_bad += 1
        if self._n_cooldown:
            self._n_cooldown, self._n_bad = self._n_cooldown - 1, 0
        if self._n_bad > self.patience:
            self.value = max(self.value * self.factor, min(self.min_value, self.value))
            self._n_cooldown, self._n_bad = self.cooldown, 0

    def _is_better(self, observed: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":
            return sign * observed > sign * self.best * (1 + sign * self.threshold)
        return sign * observed > sign * self.best + self.threshold

    def state_dict(self) -> dict[str, float]:
        """What is needed to go on later."""
        return {"value": self.value, "best": self.best, "n_bad": self._n_bad, "n_cooldown": self._n_cooldown}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"value", "best", "n_bad", "n_cooldown"}:
            wanted = "a mapping with value, best, n_bad and n_cooldown"
            raise ValueError(f"state_dict: expected {wanted}, got {state_dict!r}")
        value = _hyper.finite(state_dict["value"], "state_dict['value']")
        best = _hyper.as_float(state_dict["best"], "state_dict['best']", "a number")
        if math.isnan(best):
            raise ValueError(f"state_dict['best']: expected a number, got {best}")
        n_bad = _hyper.whole_number(state_dict["n_bad"], "state_dict['n_bad']", 0)
        n_cooldown = _hyper.whole_number(state_dict["n_cooldown"], "state_dict['n_cooldown']", 0)
        self.value, self.best, self._n_bad, self._n_cooldown = value, best, n_bad, n_cooldown


# ---- For averages -------------------------------------------------------------------------------------------------------


@schedule
def ema_warmup(decay: float) -> Function:
    """For `ema_decay`: ``min(decay, (1 + step) / (10 + step))``, for an average that soon forgets the first parameters.

    Parameters
    ----------
    decay : float
        In [0, 1], as `ema_decay`.

    Examples
    --------
    >>> import fusedstep as fs
    >>> decay = fs.schedules.ema_warmup(0.999)
    >>> decay(0), decay(8), decay(1_000_000)
    (0.1, 0.5, 0.999)

    References
    ----------
    As ``tf.train.ExponentialMovingAverage`` with `num_updates`.
    """
    decay = _hyper.from_0_to_1(decay, "decay")
    return lambda step: min(decay, (1 + step) / (10 + step))


@schedule
def equal_average(start: int = 0) -> Function:
    """For `ema_decay`: the average is the mean of the parameters after each step from `start` on (Polyak averaging, SWA).

    Until then it is the parameters themselves.

    Examples
    --------
    >>> import fusedstep as fs
    >>> decay = fs.schedules.equal_average(start=2)
    >>> decay(0), decay(1), decay(2), decay(3), decay(5)
    (0.0, 0.0, 0.0, 0.5, 0.75)

    References
    ----------
    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization" (2018).
    """
    start = _hyper.whole_number(start, "start", 0)
    return lambda step: max(0, step - start) / (max(0, step - start) + 1)
