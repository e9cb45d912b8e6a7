"""The command ``fusedstep``, also ``python -m fusedstep``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from . import check
from ._version import __version__
from .arguments import CommandError
from .bench import command as bench
from .config import show_config
from .demo import schedules, train


def run(arguments: Sequence[str] | None) -> int:
    """Do what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(prog="fusedstep", description="Fused optimizer steps for NumPy arrays.")
    parser.add_argument("--version", action="version", version=f"fusedstep {__version__}")
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
    except (CommandError, RuntimeError) as error:  # the latter without compiled kernels
        print(f"fusedstep {args.command}: {error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The same, whatever becomes of the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not to lose results for a "µ" that it has no room for
    try:
        try:
            return run(arguments)
        finally:
            print(end="", flush=True)  # here, and not at exit, where nothing catches what it may raise
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whose reader has seen enough
            print(f"fusedstep: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python flushes at exit
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
