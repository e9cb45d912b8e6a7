"""The two ways to make a step: the compiled kernels, and the reference."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from . import _arrays, reference
from ._arrays import Change, assign

Array = NDArray[Any]

# Whether the step was applied, norm of the gradients or None, smallest clip factor, and for each array with non-finite
# gradients its index and the number of such elements.
Outcome = tuple[bool, Union[float, None], float, list[tuple[int, int]]]

core: Any = None
core_error: ImportError | None = None
try:
    core = importlib.import_module("fusedstep._core")
except ImportError as error:
    core_error = error


def require_core() -> Any:
    """The extension module, or an error that says what to do."""
    if core is None:
        raise RuntimeError(
            f"the compiled kernels of fusedstep are not available here ({core_error}); reinstall with a C compiler, or use "
            'backend="reference"'
        ) from core_error
    return core


class ReferencePlan:
    """`_core.Plan` on the NumPy reference: the same interface, the same bits."""

    def __init__(
        self,
        params: list[Array],
        states: list[tuple[Array, ...]],
        groups: list[int],
        rules: list[Any],
        averages: list[Array | None] | None = None,
        scales: list[tuple[Array | None, ...]] | None = None,
        seed: int = 0,
    ) -> None:
        self.params, self.states, self.groups, self.rules = params, states, groups, rules
        self.averages = averages or [None] * len(params)
        self.scales = scales or [(None,) * len(own) for own in states]
        self.seed = seed
        self.grads: Any = None  # a list of arrays, once any are bound
        self.values: list[dict[str, Any]] = [{} for _ in rules]
        self.stages: list[dict[str, Any]] = []
        self._steps = np.zeros((), np.int64)

    @property
    def steps(self) -> int:
        return int(self._steps)

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps[...] = value

    def look_at(self, grads: list[Any]) -> tuple[int, bool]:
        for i, (param, grad) in enumerate(zip(self.params, grads)):
            supported = type(grad) is np.ndarray and _arrays.is_supported(grad.dtype) and grad.dtype.isnative
            if not supported or grad.shape != param.shape:
                return i, True
        return -1, True

    def bind(self, grads: list[Array]) -> None:
        self.grads = grads

    def unbind(self) -> None:
        self.grads = None

    def first_read_only(self) -> int:
        return next((i for i, param in enumerate(self.params) if not param.flags.writeable), -1)

    def first_moved(self) -> int:
        return -1  # arrays are read and written through NumPy, wherever they are

    def remember(self, *settings: Any) -> None:
        pass

    def forget(self) -> None:
        pass

    def repeat(self, *arguments: Any) -> None:
        return None

    def set_group(self, index: int, values: dict[str, Any]) -> None:
        self.values[index] = values

    def measure(
        self,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        nonfinite: str = "raise",
        num_threads: int | None = None,
        clear_grads: bool = False,
    ) -> Outcome:
        applied, grad_norm, factors, bad = self._measure(grad_scale, clip_norm, nonfinite)
        self.stages = [
            {"grad_scale": grad_scale, "clip_factor": factor, "zero_nonfinite": nonfinite == "zero"} for factor in factors
        ]
        return applied, grad_norm, smallest(factors), bad

    def update(self, apply: bool, clear_grads: bool, used: ReferencePlan | None = None) -> None:
        changes: list[Change] = [(used._steps, ..., 0)] if used is not None else []
        if apply:
            for i, (param, states) in enumerate(zip(self.params, self.states)):
                scales = [own for own in self.scales[i] if own is not None]
                new = [param.copy(), *(array.copy() for array in [*states, *scales])]
                self._update(i, *new)
                changes += zip([param, *states, *scales], itertools.repeat(...), new)
                average = self.averages[i]
                if average is not None:
                    new_average = average.copy()
                    reference.move_average(new_average, new[0], self.values[self.groups[i]]["ema_decay"])
                    changes.append((average, ..., new_average))
            changes.append((self._steps, ..., self._steps + 1))
        if clear_grads:
            changes += [(grad, ..., np.zeros_like(grad)) for grad in self.grads]
        assign(changes)

    def clip(self) -> None:
        changes: list[Change] = []
        for grad, stages, group in zip(self.grads, self.stages, self.groups):
            g = reference.load_gradient(grad, reference.compute_dtype(grad.dtype))
            reference.clip(g, stages["clip_factor"], self.values[group].get("clip_value"))
            changes.append((grad, ..., g.reshape(grad.shape).astype(grad.dtype)))
        assign(changes)

    def _update(self, i: int, param: Array, *states_and_scales: Array) -> None:
        rule, state_names = self.rules[self.groups[i]]
        values = {k: v for k, v in self.values[self.groups[i]].items() if k in keywords(rule)}
        stored, rest = states_and_scales[: len(state_names)], iter(states_and_scales[len(state_names) :])
        pairs = [(state, None if old is None else next(rest)) for state, old in zip(stored, self.scales[i])]
        axes, real = reference.memory_axes(self.params[i]), reference.compute_dtype(param.dtype)
        states = [reference.load_state(state, scales, axes, real) for state, scales in pairs]
        rule(param, self.grads[i], **dict(zip(state_names, states)), step=self.steps + 1, **self.stages[i], **values)
        for number, (values_of, (state, scales)) in enumerate(zip(states, pairs)):
            if reference.is_small(state):
                random = reference.random_halves(self.seed, self.steps + 1, i, number, param.size)
                reference.store_state(values_of, state, scales, axes, random)

    def _measure(
        self, grad_scale: float, clip_norm: float | None, nonfinite: str
    ) -> tuple[bool, float | None, list[float], list[tuple[int, int]]]:
        """Whether to go on, norm of all gradients, clip factor of each, and where how many elements are not finite."""
        limits = [self.values[group].get("clip_norm_per_array") for group in self.groups]
        if nonfinite == "propagate" and clip_norm is None and not any(limits):
            return True, None, [1.0] * len(self.params), []
        sums, bad = [], []
        with np.errstate(all="ignore"):
            for i, (param, grad) in enumerate(zip(self.params, self.grads)):
                g = reference.load_gradient(grad, reference.compute_dtype(param.dtype), grad_scale)
                n_bad = g.size - int(np.isfinite(g).sum())
                if n_bad:
                    bad.append((i, n_bad))
                    if nonfinite == "zero":
                        g[~np.isfinite(g)] = 0
                sums.append(reference.scaled_sum_squares(g))
        root, exponent = reference.combine(sums)
        grad_norm = reference.ldexp(root, exponent)
        factors = [reference.clip_factor(math.sqrt(total), e, limit) for (total, e), limit in zip(sums, limits)]
        if any(limits):
            root, exponent = reference.combine_clipped(sums, factors)
        factor = reference.clip_factor(root, exponent, clip_norm)
        applied = not bad or nonfinite not in ("raise", "skip")
        return applied, grad_norm, [f * factor for f in factors], bad


@functools.cache
def keywords(rule: Callable[..., None]) -> set[str]:
    """The hyper-parameters and options that a reference function takes."""
    return {*inspect.signature(rule).parameters, *reference.Stages.__annotations__}


def smallest(factors: list[float]) -> float:
    """The smallest factor, at most 1; nan if one is."""
    return math.nan if any(math.isnan(f) for f in factors) else min(factors, default=1.0)
