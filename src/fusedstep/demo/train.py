"""``fusedstep train``: any rule on real data, with a table and a plot."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import database
from .._hyper import above_0, at_least_0, from_0_to_1
from ..errors import NonFiniteGradientError
from ..progress import progress
from ..schedules import ema_warmup
from .data import DataError, Dataset, load
from .mlp import MLP


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
    digest: str = ""
    stopped: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rules = ", ".join(database.TRAIN)
    parser.add_argument("--rule", default="adam", metavar="NAME", help=f"all, or one of {rules} (default: adam)")
    parser.add_argument("--data", metavar="DIR", help="folder of IDX files like MNIST's (default: the UCI digits)")
    parser.add_argument("--epochs", type=positive, default=40, metavar="N", help="passes over the data (default: 40)")
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=32,
        metavar="N",
        help="examples in a step: 1 is stochastic, 'full' is batch gradient descent (default: 32)",
    )
    parser.add_argument("--lr", type=learning_rate, help="learning rate (default: one that suits the rule)")
    parser.add_argument("--target-loss", type=float, metavar="LOSS", help="stop when the training loss is at most this")
    parser.add_argument("--hidden", type=positive, nargs="*", default=[128], metavar="N", help="sizes of hidden layers")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "int8"], help="what optimizer state is kept in")
    parser.add_argument("--clip", type=limit, metavar="NORM", help="clip the norm of all gradients")
    parser.add_argument("--ema", type=decay, metavar="DECAY", help="test the average of the parameters, too")
    parser.add_argument("--backend", choices=["c", "reference"], default="c", help="compiled or NumPy: the same bits")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of a step")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights and the order (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the loss curves (default with --rule all: loss-curves.png)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def checked(check: Callable[[Any, str], float], text: str) -> float:
    try:
        return check(float(text), "value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("value: ")) from error


def learning_rate(text: str) -> float:
    return checked(at_least_0, text)


def limit(text: str) -> float:
    return checked(above_0, text)


def decay(text: str) -> float:
    return checked(from_0_to_1, text)


def batch_size(text: str) -> int | None:
    return None if text == "full" else positive(text)


def train(args: argparse.Namespace, data: Dataset, rule: str) -> Run:
    """Train one model with one rule."""
    optimizer, settings = database.TRAIN[rule]
    if args.lr is not None:
        settings = {**settings, "lr": args.lr}
    model = MLP([data.train_x.shape[1], *args.hidden, data.n_classes], data.train_x.dtype, args.seed)
    options = {"backend": args.backend, "num_threads": args.threads, "state_dtype": args.state_dtype, "clip_norm": args.clip}
    opt = optimizer(model.params, ema_decay=args.ema and ema_warmup(args.ema), **options, **settings)
    opt.bind(model.grads)
    rng = np.random.default_rng(args.seed)
    n = len(data.train_x)
    size = n if args.batch_size is None else min(args.batch_size, n)
    run = Run(rule, losses=[model.loss(data.train_x, data.train_y)])
    start = time.perf_counter()
    bar: Any = progress(range(args.epochs), desc=f"{rule:9}", unit="epoch")
    for epoch in bar:
        order = rng.permutation(n)
        try:
            for first in range(0, n, size):
                batch = order[first : first + size]
                model.backward(data.train_x[batch], data.train_y[batch])
                before = time.perf_counter()
                opt.step()
                run.step_seconds += time.perf_counter() - before
        except NonFiniteGradientError:
            run.losses.append(math.nan)
        else:
            run.losses.append(model.loss(data.train_x, data.train_y))
        if not math.isfinite(run.losses[-1]):
            run.stopped = f"the loss is no longer finite in epoch {epoch + 1} with lr={settings['lr']}: try a smaller --lr"
            break
        if args.target_loss is not None and run.losses[-1] <= args.target_loss:
            run.stopped = f"target loss reached after epoch {epoch + 1}"
            break
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"loss {run.losses[-1]:.4f}")
    run.seconds = time.perf_counter() - start
    run.steps = opt.steps
    run.train_loss = run.losses[-1]
    run.test_accuracy = model.accuracy(data.test_x, data.test_y)
    run.digest = model.digest()
    run.state_bytes = sum(opt.nbytes.values())
    if args.ema is not None:
        with opt.averaged():
            run.average_accuracy = model.accuracy(data.test_x, data.test_y)
    return run


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


def plot(runs: list[Run], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        axes.plot(range(len(run.losses)), run.losses, label=run.rule, linewidth=1.5)
    axes.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    """Train as asked; the exit status."""
    rules = list(database.TRAIN) if args.rule == "all" else [args.rule]
    if args.rule != "all" and args.rule not in database.TRAIN:
        print(f"fusedstep train: --rule: expected all or one of {', '.join(database.TRAIN)}, got {args.rule!r}")
        return 2
    try:
        data = load(args.data, args.dtype)
    except DataError as error:
        print(f"fusedstep train: {error}")
        return 2
    batch = "all examples" if args.batch_size is None else f"batches of {args.batch_size}"
    layers = "-".join(str(size) for size in [data.train_x.shape[1], *args.hidden, data.n_classes])
    print(f"{data.name}: {len(data.train_x):,} training and {len(data.test_x):,} test examples")
    print(f"perceptron {layers} in {args.dtype}, {batch}, backend {args.backend}\n")
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite is reported in words
        runs = [train(args, data, rule) for rule in rules]
    print_table(runs)
    print()
    for run in runs:
        if run.stopped:
            print(f"{run.rule}: {run.stopped}")
        print(f"SHA-256 of the final parameters ({run.rule}): {run.digest}")
    path = args.plot or ("loss-curves.png" if args.rule == "all" else None)
    if path is not None:
        try:
            plot(runs, f"{data.name}, perceptron {layers}", path)
        except ImportError:
            print("no plot: it needs matplotlib, pip install 'fusedstep[demo]'")
        else:
            print(f"loss curves: {path}")
    return 0 if all(math.isfinite(run.train_loss) for run in runs) else 1
