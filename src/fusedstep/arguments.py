"""What the commands' arguments may be."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import _hyper


class CommandError(Exception):
    """What was asked for cannot be done; the message says why."""


def checked(read: Callable[[str], Any], check: Callable[[Any, str], object]) -> Callable[[str], Any]:
    """A type for argparse: what `read` makes of the text, if `check`, which gets the value and its name, does not raise."""

    def parse(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = text  # the check says what it expected instead
        try:
            check(value, "value")
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("value: ")) from error
        return value

    return parse


def whole(least: int, most: float = math.inf) -> Callable[[str], Any]:
    """Whole numbers from one to another."""
    return checked(int, lambda value, label: _hyper.whole_number(value, label, least, most))


def check_cpus(value: Any, label: str) -> None:
    """From 1 to the CPUs that this process may use."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _hyper.whole_number(value, label, 1) > n_cpus:
        raise ValueError(f"{label}: expected at most {n_cpus}, the number of CPUs, got {value}")


def output(text: str) -> Path:
    """A file that can be written, as far as one can tell before there is anything to write."""
    path = Path(text)
    folder = path.parent
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def picture(text: str) -> Path:
    """Such a file, of a kind that matplotlib writes."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise argparse.ArgumentTypeError("it needs matplotlib, pip install 'fusedstep[demo]'") from error
    path = output(text)
    kinds = [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
    if path.suffix.lower() not in kinds:
        raise argparse.ArgumentTypeError(f"expected a name that ends in one of {', '.join(kinds)}, got {text!r}")
    return path
