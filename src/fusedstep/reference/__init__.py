"""The specification: every rule in plain NumPy.

Each function updates ``param`` and its state arrays in place. The functions of :mod:`fusedstep.kernels` have the same
signatures and, by contract, give the same bits; ``fusedstep check`` compares them on your machine.

Three conventions make equal bits possible:

* Arithmetic is done in the compute type (float64 for float64 parameters, else float32), in the order written here.
* Per-step scalars are computed in Python floats (double) and rounded once, when they meet an array.
* Sums run in double over fixed blocks and lanes, combined pairwise: see :func:`fusedstep.reference.sums.sum_of`.
"""

from .rules import *  # noqa: F403
from .rules import __all__ as __all__
