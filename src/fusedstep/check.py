"""``fusedstep check``: the compiled kernels against the reference, on this machine, bit for bit."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _extension, database
from .config import show_config
from .progress import progress
from .reference.plan import ReferencePlan
from .state import Operands

Array = NDArray[Any]

STEPS = 3


def dtype_pairs() -> list[tuple[Any, Any]]:
    """Types of parameters and gradients to compare."""
    pairs: list[tuple[Any, Any]] = [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float16),
        (np.float32, np.float64),
    ]
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return pairs
    return [*pairs, (bfloat16, bfloat16), (np.float32, bfloat16)]


def sizes(thorough: bool) -> list[int]:
    """Odd sizes around vectors, blocks and the share of a thread."""
    if thorough:
        return [*range(131), 1023, 1024, 1025, 5003, 200_003]
    return [0, 1, 3, 7, 16, 17, 33, 65, 127, 1023, 1025, 5003, 20_011]


def lay_out(values: Array, layout: int) -> Array:
    """A copy of a 1-d array: contiguous, offset, strided, reversed or transposed."""
    n = values.size
    if layout % 5 == 4 and n % 3 == 0:
        view = np.zeros((3, n // 3), values.dtype).T
    else:
        room = np.zeros(3 * n + 3, values.dtype)
        view = (room[:n], room[3 : 3 + n], room[: 3 * n : 3], room[n:0:-1], room[1 : 1 + n])[layout % 5]
    view[...] = values.reshape(view.shape)
    return view


def gradients(rng: np.random.Generator, shape: list[int], dtype: Any, nonfinite: str) -> list[Array]:
    """Random gradients, with zeros of both signs and subnormals; with inf and nan where the policy takes them."""
    special = [0.0, -0.0, 1e-42, 5e-324]
    if nonfinite in ("zero", "propagate"):
        special += [np.inf, -np.inf, np.nan]
    grads = []
    for layout, n in enumerate(shape):
        values = rng.standard_normal(n)
        if n > 2 and layout % 2:
            values[rng.integers(n)] = rng.choice(special)
        grads.append(lay_out(values.astype(dtype), layout))
    return grads


def differing(a: Array, b: Array) -> int:
    """How many elements have other bits, where nan equals nan."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    same_bits = np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)
    return int(a.size - np.count_nonzero(same_bits | (np.isnan(a) & np.isnan(b)).reshape(same_bits.shape)))


class Case:
    """One rule with one setting, option set and pair of dtypes: made once with the reference, compared many times."""

    def __init__(self, entry: database.Entry, hyper: dict[str, Any], dtypes: tuple[Any, Any], shape: list[int]) -> None:
        rng = np.random.default_rng(0)
        self.optimizer, self.hyper, self.dtypes = entry.optimizer, hyper, dtypes
        self.params = [rng.standard_normal(n).astype(dtypes[0]) for n in shape]
        nonfinite = hyper.get("nonfinite", "raise")
        self.grads = [gradients(rng, shape, dtypes[1], nonfinite) for _ in range(STEPS)]
        self.wanted = self.run("reference")

    def run(self, backend: str, num_threads: int | None = None) -> list[Array]:
        """Parameters and state after some steps."""
        params = [lay_out(values, layout) for layout, values in enumerate(self.params)]
        opt = self.optimizer(params, **self.hyper, backend=backend, num_threads=num_threads)
        for grads in self.grads:
            opt.step(grads, grad_scale=3.0)
        return [*params, *(array for own in opt.state.values() for array in own.values())]

    def __str__(self) -> str:
        hyper = ", ".join(f"{key}={value!r}" for key, value in self.hyper.items())
        return f"{self.optimizer.__name__}({hyper}) {np.dtype(self.dtypes[0])}, gradients {np.dtype(self.dtypes[1])}"

    def compare(self, num_threads: int) -> tuple[int, int]:
        """How many elements were compared, and how many differ."""
        found = self.run("c", num_threads)
        return sum(a.size for a in found), sum(differing(a, b) for a, b in zip(found, self.wanted))


def check_norms(shape: list[int]) -> tuple[int, int]:
    """Norms of extreme gradients, by both ways."""
    core = _extension.require_core()
    rng = np.random.default_rng(1)
    compared = different = 0
    for dtype, scale in [(np.float32, 1e30), (np.float64, 1e300), (np.float64, 1e-300), (np.float64, 0), (np.float16, 1)]:
        grads = [lay_out((rng.standard_normal(n) * scale).astype(dtype), layout) for layout, n in enumerate(shape)]
        norms = []
        for make in (core.Plan, ReferencePlan):
            plan = make(grads, [Operands()] * len(grads), [0] * len(grads), [None])
            plan.bind(grads)
            plan.set_group(0, {})
            norms.append(np.array([plan.measure()[1]]))
        compared += 1
        different += differing(*norms)
    return compared, different


def combinations(thorough: bool) -> list[tuple[database.Entry, dict[str, Any], tuple[Any, Any]]]:
    """Every rule, setting, option set and pair of dtypes; for the rarer pairs, unless thorough, only some option sets."""
    cases = []
    for entry, dtypes in itertools.product(database.ENTRIES, dtype_pairs()):
        common = thorough or dtypes in [(np.float32, np.float32), (np.float64, np.float64)]
        option_sets = database.OPTIONS if common else database.OPTIONS[::10] + database.low_precision_options(dtypes[0])
        for settings, options in itertools.product(entry.settings, option_sets):
            cases.append((entry, {**settings, **options}, dtypes))
    return cases


def main(thorough: bool = False) -> int:
    """Compare everything; the exit status."""
    core = _extension.require_core()
    show_config()
    print()
    start = time.perf_counter()
    levels = [name for name, _, available in core.levels() if available]
    threads = [1, 2, 3, 5] if thorough else [1, 2]
    shape = sizes(thorough)
    cases = combinations(thorough)
    compared = {(level, n): 0 for level in levels for n in threads}
    different = dict(compared)
    failures = []
    chosen = core.get_level()
    core.insist_on_threads(True)
    try:
        for entry, hyper, dtypes in progress(cases, desc="checking", unit="case"):
            case = Case(entry, hyper, dtypes, shape)
            for level, n in compared:
                core.set_level(level)
                n_compared, n_different = case.compare(n)
                compared[level, n] += n_compared
                different[level, n] += n_different
                if n_different:
                    failures.append(f"{case}; {level}, {n} threads: {n_different} of {n_compared} differ")
        for level, n in compared:
            core.set_level(level)
            n_compared, n_different = check_norms(shape)
            compared[level, n] += n_compared
            different[level, n] += n_different
    finally:
        core.set_level(chosen)
        core.insist_on_threads(False)

    print(f"{len(cases)} combinations of rule, setting, option and dtype, {STEPS} steps each")
    print(f"{'CPU level':10} {'threads':>7} {'compared':>14} {'differ':>8}")
    for level, n in compared:
        print(f"{level:10} {n:7} {compared[level, n]:14,} {different[level, n]:8,}")
    total = sum(different.values())
    print(
        f"{sum(compared.values()):,} elements compared with the NumPy reference, {total:,} differ "
        f"({time.perf_counter() - start:.1f} s)"
    )
    for failure in failures[:20]:
        print("FAILED", failure)
    return 1 if total else 0
