"""How many threads steps use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import _extension, _hyper


def get_num_threads() -> int:
    """Threads a step uses at most; small ones use fewer.

    What was set by :func:`set_num_threads` or ``FUSEDSTEP_NUM_THREADS``; by default OpenMP's number for the calling thread
    (``OMP_NUM_THREADS``, the CPU affinity and threadpoolctl's limits count), within the container's CPU quota. 1 in a forked
    child process, without OpenMP and without the compiled kernels.

    Examples
    --------
    >>> import fusedstep as fs
    >>> with fs.threads(1):
    ...     fs.get_num_threads()
    1
    """
    return 1 if _extension.core is None else int(_extension.core.get_num_threads())


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the whole process; None for the default.

    Examples
    --------
    >>> import fusedstep as fs
    >>> fs.set_num_threads(1)
    >>> fs.set_num_threads(None)
    """
    global _chosen
    if n is not None:
        _hyper.check_num_threads(n, "n")
    if _extension.core is not None:
        _extension.core.set_num_threads(n or 0)
    _chosen = n


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Set the number of threads for the whole process within a ``with`` block.

    Parameters
    ----------
    n : int or None
        As for :func:`set_num_threads`.

    Raises
    ------
    TypeError, ValueError
        If it is no such number. Nothing has changed then.

    Examples
    --------
    >>> import fusedstep as fs
    >>> with fs.threads(1):
    ...     fs.get_num_threads()
    1
    """
    before = _chosen
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


_chosen: int | None = None

CGROUP = "/sys/fs/cgroup"


def read(name: str) -> str:
    with open(os.path.join(CGROUP, name)) as file:  # pathlib would be a tenth of what importing this package takes
        return file.read()


def cgroup_cpus() -> int | None:
    """CPUs this process's container may use, rounded up; None if there is no quota."""
    try:
        quota, period = read("cpu.max").split()[:2]
    except (OSError, ValueError):
        try:
            quota = read("cpu/cpu.cfs_quota_us")
            period = read("cpu/cpu.cfs_period_us")
        except OSError:
            return None
    try:
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except ValueError:  # "max"
        return None


def _start() -> None:
    """Take over the environment's wishes, once, at import."""
    if _extension.core is not None:
        _extension.core.limit_num_threads(cgroup_cpus() or 0)
    wanted = os.environ.get("FUSEDSTEP_NUM_THREADS")
    if wanted is not None:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ValueError(f"FUSEDSTEP_NUM_THREADS: expected a whole number >= 1, got {wanted!r}")
        _hyper.check_num_threads(int(wanted), "FUSEDSTEP_NUM_THREADS")
        set_num_threads(int(wanted))
    level = os.environ.get("FUSEDSTEP_CPU_LEVEL")
    if level is not None and _extension.core is not None:
        levels = _extension.core.levels()
        usable = [name for name, _, available in levels if available]
        if level not in [name for name, _, _ in levels]:
            raise ValueError(f"FUSEDSTEP_CPU_LEVEL: expected {', '.join(name for name, _, _ in levels)}, got {level!r}")
        if level not in usable:
            raise ValueError(f"FUSEDSTEP_CPU_LEVEL: expected a level of this machine ({', '.join(usable)}), got {level!r}")
        _extension.core.set_level(level)


_start()
