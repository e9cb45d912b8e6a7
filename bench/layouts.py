"""What other layouts and storage types cost: AdamW at a million elements, each beside the contiguous float32 step.

    python bench/layouts.py [--threads N]

Ratios of neighbouring runs in one process, taken in turn; medians. State is laid out as the library chooses.
"""

import argparse
import statistics
import time

import numpy as np

import fusedstep as fs
from fusedstep import config
from fusedstep.progress import progress

SHAPES = [(1000, 1000), (1024, 1024), (65536, 16), (16, 65536)]
ROUNDS = 100


def values(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def with_gap(shape):
    return values((shape[0], shape[1] + 3))[:, 3:]


# What makes a parameter, and a gradient, of some shape.
LAYOUTS = {
    "contiguous": (values, values),
    "Fortran order": (lambda s: np.asfortranarray(values(s)), lambda s: np.asfortranarray(values(s))),
    "Fortran order, gradient in C order": (lambda s: np.asfortranarray(values(s)), values),
    "C order, gradient in Fortran order": (values, lambda s: np.asfortranarray(values(s))),
    "gap after each row": (with_gap, values),
    "every other row": (lambda s: values((2 * s[0], s[1]))[::2], values),
    "float16": (lambda s: values(s).astype(np.float16), lambda s: values(s).astype(np.float16)),
    "float64": (lambda s: values(s).astype(np.float64), lambda s: values(s).astype(np.float64)),
}


def timed(opt, grad):
    opt.step([grad])
    start = time.perf_counter()
    opt.step([grad])
    opt.step([grad])
    return time.perf_counter() - start


def ratio(shape, layout, nonfinite):
    """Time of a step in this layout over that of the contiguous one."""
    pairs = []
    for make_param, make_grad in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        pairs.append((fs.AdamW([make_param(shape)], nonfinite=nonfinite), make_grad(shape)))
    times = [[timed(opt, grad) for opt, grad in pairs] for _ in range(ROUNDS)]
    return statistics.median(other / contiguous for contiguous, other in times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    fs.set_num_threads(parser.parse_args().threads)
    for name, value in config.config().items():
        print(f"{name}: {value}")
    for nonfinite in ("propagate", "raise"):
        print(f"\nnonfinite={nonfinite!r}{'':32}" + "".join(f"{shape!s:>15}" for shape in SHAPES))
        for layout in progress(list(LAYOUTS), desc=nonfinite):
            print(f"{layout:52}" + "".join(f"{ratio(shape, layout, nonfinite):15.2f}" for shape in SHAPES))


if __name__ == "__main__":
    main()
