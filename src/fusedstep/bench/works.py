"""What is timed: rules, on arrays of these shapes."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _hyper, database

Array = NDArray[Any]
Shapes = list[tuple[int, ...]]


def gpt2_small() -> Shapes:
    """The 148 arrays of GPT-2 small, 124 million parameters."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*norm, *attention, *norm, *perceptron]
    return [(50257, width), (1024, width), *(12 * block), *norm]


SHAPES: dict[str, Shapes] = {
    "1 k": [(1_000,)],
    "10 k": [(10_000,)],
    "100 k": [(100_000,)],
    "1 M": [(1_000_000,)],
    "10 M": [(10_000_000,)],
    "32 M": [(32_000_000,)],
    "64 M": [(64_000_000,)],
    "MLP, 6 arrays": [(64, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
    "100 x 1 k": [(1_000,) for _ in range(100)],
    "1000 x 100": [(100,) for _ in range(1_000)],
    "GPT-2 small": gpt2_small(),
}

RULES = [rule for rule, (optimizer, _) in database.TRAIN.items() if optimizer._direction is None]
"""Those whose steps are passes over memory."""

READ_FIRST = {"lamb": 4, "lars": 2, "novograd": 1, "prodigy": 4, "adafactor": 3}
"""Arrays as large as the parameter that a rule reads once before its step, for what it has to know of them as a whole."""

READ_ONLY = {"prodigy": 1}
"""State arrays that are read then, and have no part in the step itself."""


@functools.cache
def settings_of(rule: str) -> dict[str, Any]:
    """All hyper-parameters of a rule: the defaults, which are PyTorch's, and what makes it this rule."""
    optimizer, settings = database.TRAIN[rule]
    parameters = inspect.signature(optimizer).parameters.values()
    return {p.name: p.default for p in parameters if p.name in _hyper.CHECKS} | settings


@functools.cache
def n_states_of(rule: str) -> int:
    optimizer, settings = database.TRAIN[rule]
    states = optimizer([np.zeros(1)], **settings).state["0"].values()
    n_states: int = sum(array.shape == (1,) for array in states)
    return n_states - READ_ONLY.get(rule, 0)


class Work(NamedTuple):
    """One line of the table."""

    rule: str
    """A name that ``fusedstep train`` knows, too."""
    size: str
    """A key of SHAPES."""
    dtype: str = "float32"
    clip_norm: float | None = None
    threads: int | None = None
    """None for all there are."""

    @property
    def shapes(self) -> Shapes:
        return SHAPES[self.size]

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.rule)

    @property
    def n_states(self) -> int:
        """State arrays that are read and written."""
        return n_states_of(self.rule)

    @property
    def n_read_first(self) -> int:
        """Arrays that are read once before, of which the first is the gradient."""
        return (self.clip_norm is not None) + READ_FIRST.get(self.rule, 0)

    @property
    def n_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes_per_element(self) -> int:
        """Read and written: the gradient is read; the others are read and written."""
        item = np.dtype(self.dtype).itemsize
        return item * (self.n_read_first + 3 + 2 * self.n_states)

    def params(self) -> list[Array]:
        rng = np.random.default_rng(0)
        return [rng.standard_normal(shape, np.dtype(self.dtype).type) for shape in self.shapes]

    def grads(self) -> list[Array]:
        """From 0.1 to 1.1 in size, so that it hardly matters where eps stands."""
        rng = np.random.default_rng(1)
        grads = [2 * rng.random(shape, np.dtype(self.dtype).type) - 1 for shape in self.shapes]
        for grad in grads:
            grad += np.copysign(grad.dtype.type(0.1), grad)
        return grads

    def __str__(self) -> str:
        parts = [self.rule, self.dtype, self.size]
        parts += ["clip_norm"] if self.clip_norm is not None else []
        parts += [f"{self.threads} thread"] if self.threads is not None else []
        return ", ".join(parts)


def works(quick: bool) -> list[Work]:
    """The sizes with AdamW; then other types, thread counts, clipping and rules at some of them."""
    if quick:
        return [Work("adamw", size) for size in ("1 k", "MLP, 6 arrays", "100 x 1 k", "100 k", "1 M")]
    sizes = ["1 k", "10 k", "100 k", "1 M", "10 M", "64 M", "MLP, 6 arrays", "100 x 1 k", "1000 x 100", "GPT-2 small"]
    found = [Work("adamw", size) for size in sizes]
    found += [Work("adamw", size, clip_norm=1.0) for size in ("MLP, 6 arrays", "1 M", "GPT-2 small")]
    found += [Work("adamw", size, threads=1) for size in ("100 k", "1 M", "64 M")]
    found += [Work("adamw", size, dtype="float64") for size in ("1 k", "100 k", "1 M", "32 M")]
    found += [Work(rule, size) for rule in ("momentum", "rmsprop", "adam") for size in ("1 k", "100 k", "1 M")]
    found += [Work(rule, "32 M") for rule in RULES]
    return found
