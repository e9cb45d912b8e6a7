"""Hyper-parameters that change with the steps: functions of the number of steps taken so far, 0 at the first."""

from __future__ import annotations

from collections.abc import Callable

from . import _hyper


def ema_warmup(decay: float) -> Callable[[int], float]:
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


def equal_average(start: int = 0) -> Callable[[int], float]:
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
    return lambda step: max(0, step - start) / (max(0, step - start) + 1)
