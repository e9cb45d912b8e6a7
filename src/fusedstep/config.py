"""What this installation is made of."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np

from . import _extension
from ._threads import cgroup_cpus, get_num_threads
from ._version import __version__


def config() -> dict[str, Any]:
    """Versions, build and machine, as ``fusedstep info`` shows them."""
    core = _extension.core
    facts: dict[str, Any] = {
        "fusedstep": __version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if core is None:
        return facts | {"compiled kernels": f"none ({_extension.core_error})", "threads": 1}
    levels = core.levels()
    return facts | {
        "compiler": core.COMPILER,
        "flags": core.FLAGS,
        "openmp": f"yes ({core.OPENMP_VERSION})" if core.openmp() else "no: one thread only",
        "cpu levels compiled": ", ".join(name for name, compiled, _ in levels if compiled),
        "cpu levels available": ", ".join(name for name, _, available in levels if available),
        "cpu level chosen": core.get_level(),
        "threads": get_num_threads(),
        "cpu quota": cgroup_cpus() or "none",
    }


def show_config() -> None:
    """Print versions, compiler, flags, OpenMP, CPU levels and threads."""
    facts = config()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
