"""``fusedstep schedules``: values and a picture of every schedule."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .. import schedules as s
from ..arguments import CommandError, picture, whole

LEAST_STEPS = 20  # for all examples to have pieces of at least one step
MOST_STEPS = 100_000  # for all of them to be done within seconds


def plateau(n: int) -> Callable[[int], float]:
    """Observes a loss that falls for a third of the steps."""
    schedule = s.ReduceOnPlateau(0.1, factor=0.5, patience=n // 10)

    def at(step: int) -> float:
        schedule.observe(max(1.0, 2.0 - 3.0 * step / n))
        return schedule(step)

    return at


EXAMPLES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "constant_schedule": lambda n: s.constant_schedule(0.1),
    "linear_schedule": lambda n: s.linear_schedule(0.1, 0.001, n // 2, n // 4),
    "polynomial_schedule": lambda n: s.polynomial_schedule(0.1, 0.001, 2, n),
    "exponential_decay": lambda n: s.exponential_decay(0.1, n, 0.05),
    "inverse_time_decay": lambda n: s.inverse_time_decay(0.1, n, 10.0),
    "inverse_sqrt_schedule": lambda n: s.inverse_sqrt_schedule(0.1, n // 10),
    "cosine_decay_schedule": lambda n: s.cosine_decay_schedule(0.1, n, alpha=0.01),
    "piecewise_constant_schedule": lambda n: s.piecewise_constant_schedule(0.1, {n // 2: 0.5, 3 * n // 4: 0.1}),
    "piecewise_interpolate_schedule": lambda n: s.piecewise_interpolate_schedule(
        "linear", 0.05, {n // 3: 2.0, n // 2: 0.25, n: 0.5}
    ),
    "cosine_onecycle_schedule": lambda n: s.cosine_onecycle_schedule(n, 0.1),
    "linear_onecycle_schedule": lambda n: s.linear_onecycle_schedule(n, 0.1),
    "warmup_constant_schedule": lambda n: s.warmup_constant_schedule(0.01, 0.1, n // 10),
    "warmup_cosine_decay_schedule": lambda n: s.warmup_cosine_decay_schedule(0.01, 0.1, n // 10, n, end_value=0.001),
    "warmup_linear_decay_schedule": lambda n: s.warmup_linear_decay_schedule(0.01, 0.1, n // 10, n, end_value=0.001),
    "warmup_exponential_decay_schedule": lambda n: s.warmup_exponential_decay_schedule(0.01, 0.1, n // 10, n, 0.05),
    "cosine_decay_restarts": lambda n: s.cosine_decay_restarts(0.1, n // 7, t_mul=2, alpha=0.01),
    "sgdr_schedule": lambda n: s.sgdr_schedule(
        [
            dict(init_value=0.01, peak_value=peak, warmup_steps=n // 20, decay_steps=n // 2 + 1, end_value=0.001)
            for peak in (0.1, 0.05)
        ]
    ),
    "cyclic_schedule": lambda n: s.cyclic_schedule(0.01, 0.1, n // 8, mode="triangular2"),
    "join_schedules": lambda n: s.join_schedules([0.1, s.cosine_decay_schedule(0.1, n // 2, 0.01)], [n // 2]),
    "multiply_schedules": lambda n: s.multiply_schedules(
        [s.cosine_decay_restarts(0.1, n // 4, alpha=0.2), s.exponential_decay(1.0, n, 0.2)]
    ),
    "ReduceOnPlateau": plateau,
    "ema_warmup": lambda n: s.ema_warmup(0.99),
    "equal_average": lambda n: s.equal_average(n // 4),
}
"""A schedule of each kind for n steps, at least `LEAST_STEPS`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="of functions in fusedstep.schedules (default: all)")
    steps = whole(LEAST_STEPS, MOST_STEPS)
    parser.add_argument("--steps", type=steps, default=100, metavar="N", help="steps to show (default: 100)")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="save a picture")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n_columns = min(4, len(curves))
    n_rows = -(-len(curves) // n_columns)
    figure, axes = pyplot.subplots(
        n_rows, n_columns, figsize=(2.7 * n_columns, 1.4 * n_rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, curves.items()):
        axis.plot(values, linewidth=1.5, drawstyle="steps-post")
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(args: argparse.Namespace) -> int:
    """Show the schedules asked for; the exit status."""
    for name in args.names:
        if name not in EXAMPLES:
            raise CommandError(f"NAME: expected any of {', '.join(EXAMPLES)}, got {name!r}")
    shown = {name: EXAMPLES[name](args.steps) for name in args.names or EXAMPLES}
    curves = {name: [schedule(step) for step in range(args.steps + 1)] for name, schedule in shown.items()}
    places = sorted({args.steps * quarter // 4 for quarter in range(5)})
    print(f"{'step':34}", *(f"{place:>9}" for place in places))
    for name, values in curves.items():
        print(f"{name:34}", *(f"{values[place]:9.3g}" for place in places))
    if args.plot:
        plot(curves, args.plot)
        print(f"picture in {args.plot}")
    return 0
