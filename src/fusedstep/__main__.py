"""The command ``fusedstep``, also ``python -m fusedstep``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import check
from .bench import command as bench
from .config import show_config
from .demo import schedules, train


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusedstep", description="Fused optimizer steps for NumPy arrays.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, compiler, OpenMP, CPU levels, threads")
    check_parser = commands.add_parser("check", help="compare the compiled kernels with the NumPy reference, bit for bit")
    check_parser.add_argument("--thorough", action="store_true", help="more sizes, types and threads")
    train_parser = commands.add_parser("train", help="train a perceptron on real data with any rule")
    train.add_arguments(train_parser)
    bench_parser = commands.add_parser("bench", help="time steps beside those of the other libraries installed here")
    bench.add_arguments(bench_parser)
    schedules_parser = commands.add_parser("schedules", help="values and a picture of every schedule of hyper-parameters")
    schedules.add_arguments(schedules_parser)
    args = parser.parse_args(arguments)
    try:
        if args.command == "info":
            show_config()
            return 0
        if args.command == "check":
            return check.main(args.thorough)
        if args.command == "bench":
            return bench.main(args)
        if args.command == "schedules":
            return schedules.main(args)
        return train.main(args)
    except RuntimeError as error:  # no compiled kernels
        print(f"fusedstep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
