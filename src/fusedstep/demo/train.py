"""``fusedstep train``: any rule on real data, with a table and a plot."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _hyper, database
from ..arguments import CommandError, checked, picture, whole
from ..errors import NonFiniteGradientError
from ..optimizer import Optimizer
from ..progress import progress
from ..scaling import DynamicLossScaler
from ..schedules import cosine_decay_schedule, ema_warmup
from ..state import is_low_precision, require_bfloat16
from ..telemetry import Stats
from .data import Dataset, load
from .mlp import MLP

Array = NDArray[Any]


@dataclass
class Run:
    """How the training with one rule went."""

    rule: str
    losses: list[float] = field(default_factory=list)  # before training, then after each epoch
    steps: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0
    train_loss: float = math.nan
    test_accuracy: float = math.nan
    average_accuracy: float | None = None
    state_bytes: int = 0
    skipped: int = 0
    last_stats: Stats | None = None
    stats: list[Stats] = field(default_factory=list)  # of the last step of each epoch, with --stats
    digest: str = ""
    stopped: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rules = ", ".join(database.TRAIN)
    parser.add_argument("--rule", default="adam", metavar="NAME", help=f"all, or one of {rules} (default: adam)")
    parser.add_argument("--data", metavar="DIR", help="folder of IDX files like MNIST's (default: the UCI digits)")
    parser.add_argument("--epochs", type=whole(1), default=40, metavar="N", help="passes over the data (default: 40)")
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=32,
        metavar="N",
        help="examples in a step: 1 is stochastic, 'full' is batch gradient descent (default: 32)",
    )
    parser.add_argument(
        "--lr", type=checked(float, _hyper.at_least_0), help="learning rate (default: one that suits the rule)"
    )
    parser.add_argument(
        "--schedule",
        choices=["constant", "cosine"],
        default="constant",
        help="of the learning rate: as it is, or down to 0 over all steps along half a cosine",
    )
    parser.add_argument(
        "--target-loss",
        type=checked(float, _hyper.finite),
        metavar="LOSS",
        help="stop when the training loss is at most this",
    )
    parser.add_argument("--hidden", type=whole(1), nargs="*", default=[128], metavar="N", help="sizes of hidden layers")
    parser.add_argument(
        "--precision",
        choices=["float64", "float32", "bfloat16", "float16"],
        default="float32",
        help="of parameters and gradients; what is of 16 bits computes in float32, float16 with a loss scale",
    )
    parser.add_argument(
        "--low-precision",
        choices=_hyper.CHOICES["low_precision"],
        default="nearest",
        help="what becomes of the digits that parameters of 16 bits have no room for",
    )
    parser.add_argument("--state-dtype", choices=_hyper.CHOICES["state_dtype"][1:], help="what optimizer state is kept in")
    parser.add_argument("--accumulate", type=whole(1), default=1, metavar="N", help="micro-batches that make a batch")
    parser.add_argument("--accumulate-dtype", choices=_hyper.CHOICES["accumulate_dtype"][1:], help="what they add up in")
    parser.add_argument("--stats", action="store_true", help="table and plot of the norms of gradients and updates by array")
    parser.add_argument("--clip", type=checked(float, _hyper.above_0), metavar="NORM", help="clip the norm of all gradients")
    parser.add_argument(
        "--ema", type=checked(float, _hyper.from_0_to_1), metavar="DECAY", help="test the average of the parameters, too"
    )
    parser.add_argument("--backend", choices=["c", "reference"], default="c", help="compiled or NumPy: the same bits")
    parser.add_argument("--threads", type=checked(int, _hyper.check_num_threads), metavar="N", help="threads of a step")
    parser.add_argument(
        "--seed",
        type=checked(int, _hyper.seed),
        default=0,
        metavar="N",
        help="of the initial weights and the order (default: 0)",
    )
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="FILE",
        help="picture of the curves (default with --rule all or --stats: loss-curves.png)",
    )


def batch_size(text: str) -> int | None:
    return None if text == "full" else whole(1)(text)


class Loop:
    """One model, its optimizer, and what both have been through."""

    def __init__(self, args: argparse.Namespace, data: Dataset, rule: str) -> None:
        optimizer, settings = database.TRAIN[rule]
        if args.lr is not None:
            settings = {**settings, "lr": args.lr}
        self.args, self.data = args, data
        self.lr = settings["lr"]
        n = len(data.train_x)
        self.batch_size = n if args.batch_size is None else min(args.batch_size, n)
        if args.schedule == "cosine":
            settings = {**settings, "lr": cosine_decay_schedule(self.lr, args.epochs * -(-n // self.batch_size))}
        self.model = MLP([data.train_x.shape[1], *args.hidden, data.n_classes], dtype_of(args.precision), args.seed)
        self.scaler = DynamicLossScaler() if args.precision == "float16" else None
        self.opt: Optimizer = optimizer(
            self.model.params,
            **settings,
            clip_norm=args.clip,
            ema_decay=args.ema and ema_warmup(args.ema),
            low_precision=args.low_precision,
            accumulate_dtype=args.accumulate_dtype,
            state_dtype=args.state_dtype,
            stats=args.stats,
            nonfinite="raise" if self.scaler is None else "skip",
            backend=args.backend,
            num_threads=args.threads,
            seed=args.seed,
        )
        self.opt.bind(self.model.grads)
        self.rng = np.random.default_rng(args.seed)
        self.run = Run(rule, losses=[self.loss()])

    def loss(self) -> float:
        return self.model.loss(self.data.train_x, self.data.train_y)

    def without_effect(self) -> list[str]:
        """What was asked for and changes nothing."""
        found = []
        kept_in = {array.dtype.name.removeprefix("u") for own in self.opt.state.values() for array in own.values()}
        if self.args.state_dtype is not None and self.args.state_dtype not in kept_in:
            found.append(
                f"--state-dtype {self.args.state_dtype} changes nothing: this rule has no state that may be rounded"
            )
        if self.args.low_precision != "nearest" and not any(map(is_low_precision, self.model.params.values())):
            found.append(f"--low-precision {self.args.low_precision} changes nothing: no parameters of 16 bits")
        return found

    def step(self, micro_batches: list[Array]) -> None:
        """A step with the mean of the micro-batches' mean gradients."""
        scale = 1.0 if self.scaler is None else self.scaler.scale
        for batch in micro_batches:
            self.model.backward(self.data.train_x[batch], self.data.train_y[batch], scale)
            before = time.perf_counter()
            if len(micro_batches) > 1:
                self.opt.accumulate()
            self.run.step_seconds += time.perf_counter() - before
        before = time.perf_counter()
        report = self.opt.step() if self.scaler is None else self.scaler.step(self.opt)
        self.run.step_seconds += time.perf_counter() - before
        self.run.skipped += not report.applied
        self.run.last_stats = report.stats or self.run.last_stats

    def epoch(self) -> None:
        """A pass over the data; its loss goes to the others, nan if gradients were not finite."""
        n, size = len(self.data.train_x), self.batch_size
        order = self.rng.permutation(n)
        micro = -(-size // self.args.accumulate)
        try:
            for first in range(0, n, size):
                batch = order[first : first + size]
                self.step([batch[i : i + micro] for i in range(0, len(batch), micro)])
        except NonFiniteGradientError:
            self.run.losses.append(math.nan)
        else:
            self.run.losses.append(self.loss())
        if self.run.last_stats is not None:
            self.run.stats.append(self.run.last_stats)

    def finish(self) -> Run:
        """What has come of it."""
        run, data = self.run, self.data
        run.steps = self.opt.steps
        run.train_loss = run.losses[-1]
        run.test_accuracy = self.model.accuracy(data.test_x, data.test_y)
        run.digest = self.model.digest()
        run.state_bytes = sum(self.opt.nbytes.values())
        if self.opt.averages:
            with self.opt.averaged():
                run.average_accuracy = self.model.accuracy(data.test_x, data.test_y)
        return run


def train(loop: Loop) -> Run:
    """Train one model with one rule."""
    args, run = loop.args, loop.run
    start = time.perf_counter()
    bar: Any = progress(range(args.epochs), desc=f"{run.rule:9}", unit="epoch")
    for epoch in bar:
        loop.epoch()
        if not math.isfinite(run.losses[-1]):
            run.stopped = f"the loss is no longer finite in epoch {epoch + 1} with lr={loop.lr}: try a smaller --lr"
            break
        if args.target_loss is not None and run.losses[-1] <= args.target_loss:
            run.stopped = f"target loss reached after epoch {epoch + 1}"
            break
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"loss {run.losses[-1]:.4f}")
    run.seconds = time.perf_counter() - start
    return loop.finish()


def dtype_of(precision: str) -> Any:
    """The NumPy type of this name."""
    if precision == "bfloat16":
        require_bfloat16()
    return np.dtype(precision)


def print_table(runs: list[Run]) -> None:
    of_average = any(run.average_accuracy is not None for run in runs)
    print(
        f"{'rule':10} epochs {'steps':>7} train loss test accuracy {'step time':>10} {'per step':>10} {'state':>12}"
        + (" test accuracy of average" if of_average else "")
    )
    for run in runs:
        per_step = run.step_seconds / run.steps * 1e6 if run.steps else math.nan
        print(
            f"{run.rule:10} {len(run.losses) - 1:6} {run.steps:7,} {run.train_loss:10.4f} {run.test_accuracy:12.2%}  "
            f"{run.step_seconds:8.3f} s {per_step:7.1f} µs {run.state_bytes:10,} B"
            + (f" {run.average_accuracy:24.2%}" if run.average_accuracy is not None else "")
        )


def plot(runs: list[Run], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"training loss (cross-entropy)": {run.rule: run.losses for run in runs}}
    for label, quantity in (("norm of gradient", "grad_norm"), ("norm of update / parameter", "update_ratio")):
        curves = {
            f"{run.rule} {name}": [math.nan, *(getattr(stats[name], quantity) for stats in run.stats)]
            for run in runs
            for name in run.last_stats or ()
        }
        if curves:
            panels[label] = curves
    figure, axes = plt.subplots(len(panels), figsize=(8, 1 + 4 * len(panels)), layout="constrained", squeeze=False)
    for ax, (label, curves) in zip(axes[:, 0], panels.items()):
        for name, values in curves.items():
            ax.plot(range(len(values)), values, label=name, linewidth=1.5)
        ax.set(xlabel="epoch", ylabel=label, yscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.legend(ncols=2)
    axes[0, 0].set_title(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def default_plot() -> Path | None:
    """The picture that nobody asked for by name, without which training goes on."""
    try:
        return picture("loss-curves.png")
    except argparse.ArgumentTypeError as error:
        print(f"no plot: {error}")
        return None


def main(args: argparse.Namespace) -> int:
    """Train as asked; the exit status."""
    rules = list(database.TRAIN) if args.rule == "all" else [args.rule]
    if args.rule != "all" and args.rule not in database.TRAIN:
        raise CommandError(f"--rule: expected all or one of {', '.join(database.TRAIN)}, got {args.rule!r}")
    try:
        data = load(args.data, np.result_type(dtype_of(args.precision), np.float32))
        loops = [Loop(args, data, rule) for rule in rules]
    except (ImportError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    path = args.plot or (default_plot() if args.rule == "all" or args.stats else None)
    batch = "all examples" if args.batch_size is None else f"batches of {args.batch_size}"
    layers = "-".join(str(size) for size in [data.train_x.shape[1], *args.hidden, data.n_classes])
    print(f"{data.name}: {len(data.train_x):,} training and {len(data.test_x):,} test examples")
    print(f"perceptron {layers} in {args.precision}, {batch}, backend {args.backend}\n")
    for loop in loops:
        for sentence in loop.without_effect():
            print(f"{loop.run.rule}: {sentence}")
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite is reported in words
        runs = [train(loop) for loop in loops]
    print_table(runs)
    print()
    for run in runs:
        if run.stopped:
            print(f"{run.rule}: {run.stopped}")
        if run.skipped:
            print(f"{run.rule}: {run.skipped} steps skipped, because gradients overflowed: the loss scale has shrunk since")
        if run.last_stats is not None:
            print(f"{run.rule}, last step:\n{run.last_stats}")
            for sentence in run.last_stats.warnings():
                print(f"warning: {sentence}")
        print(f"SHA-256 of the final parameters ({run.rule}): {run.digest}")
    if path is not None:
        plot(runs, f"{data.name}, perceptron {layers}", path)
        print(f"loss curves: {path}")
    return 0 if all(math.isfinite(run.train_loss) for run in runs) else 1
