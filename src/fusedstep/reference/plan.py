"""Steps of an optimizer by the reference: what `_core.Plan` does with compiled kernels."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from .. import _arrays
from .._arrays import Change, assign
from ..state import Operands
from .stages import Stages, adaptive_factors, clip, load_gradient, move_average
from .storage import FOR_PARAM, FOR_STATES, compute_dtype, is_small, join, load_state, part, random_fractions, store_state
from .sums import clip_factor, combine, combine_clipped, ldexp, pairwise_sum, scaled_sum_squares, sum_squares

Array = NDArray[Any]

# Whether the step was applied, norm of the gradients or None, smallest clip factor, and for each array with non-finite
# gradients its index and the number of such elements.
Outcome = tuple[bool, Union[float, None], float, list[tuple[int, int]]]


class Rule(NamedTuple):
    """A rule of the reference, and the names of its states and numbers in order."""

    alone: Callable[..., None]
    states: tuple[str, ...]
    of_all: Callable[..., None] | None = None
    """The same of one array among all, if it depends on sums over them."""


class ReferencePlan:
    """`_core.Plan` on the NumPy reference: the same interface, the same bits."""

    def __init__(
        self,
        params: list[Array],
        operands: list[Operands],
        groups: list[int],
        rules: list[Any],  # Rule, or None for a plan that only measures or clips
        seed: int = 0,
        has_stats: bool = False,
        in_c_order: bool = False,
    ) -> None:
        self.params, self.operands, self.groups, self.rules = params, operands, groups, rules
        self.seed, self.has_stats, self.in_c_order = seed, has_stats, in_c_order
        self.grads: Any = None  # a list of arrays, once any are bound
        self.values: list[dict[str, Any]] = [{} for _ in rules]
        self.stages: list[dict[str, Any]] = []
        self.norms = np.zeros(len(params))
        self.n_nonfinite = np.zeros(len(params))
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
        clip_eps: float = 1e-6,
        nonfinite: str = "raise",
        num_threads: int | None = None,
        clear_grads: bool = False,
        squares_divisor: float = 0.0,
        sums: ReferencePlan | None = None,
    ) -> Outcome:
        applied, grad_norm, factors, bad = self._measure(grad_scale, clip_norm, clip_eps, nonfinite)
        self.stages = [
            {"grad_scale": grad_scale, "clip_factor": factor, "zero_nonfinite": nonfinite == "zero"} for factor in factors
        ]
        return applied, grad_norm, smallest(factors), bad

    def update(self, apply: bool, clear_grads: bool, used: ReferencePlan | None = None, stats: Array | None = None) -> None:
        changes: list[Change] = [(used._steps, ..., 0)] if used is not None else []
        if apply:
            totals = self._totals()
            for i in range(len(self.params)):
                updated, found = self._updated(i, lambda *own: totals)
                changes += updated
                if stats is not None:
                    changes.append((stats, i, found))
            changes.append((self._steps, ..., self._steps + 1))
        if clear_grads:
            changes += [(grad, ..., np.zeros_like(grad)) for grad in self.grads]
        assign(changes)

    def clip(self) -> None:
        changes: list[Change] = []
        for param, grad, stages, group, own in zip(self.params, self.grads, self.stages, self.groups, self.operands):
            values, factor = self.values[group], stages["clip_factor"]
            g = load_gradient(grad, compute_dtype(grad.dtype))
            if values.get("clip_adaptive") is not None:
                p = load_gradient(param, g.dtype)
                factor = adaptive_factors(p, g, values["clip_adaptive"], factor, param.shape, own.unit_axes)
            clip(g, factor, values.get("clip_value"))
            changes.append((grad, ..., g.reshape(grad.shape).astype(grad.dtype)))
        assign(changes)

    def _totals(self) -> tuple[float, ...]:
        """The sums over all arrays that rules ask for, which take the step once to find their own."""
        sums = np.zeros((2, len(self.params)))
        for i, group in enumerate(self.groups):
            if self.rules[group].of_all is not None:

                def note(*own: float, i: int = i) -> tuple[float, ...]:
                    sums[:, i] = own
                    return own

                self._applied(i, note)
        with np.errstate(all="ignore"):
            return tuple(pairwise_sum(sums).tolist())

    def _axes(self, i: int) -> list[int]:
        """The order in which small states and residuals of an array lie."""
        return list(range(self.params[i].ndim)) if self.in_c_order else _arrays.memory_axes(self.params[i])

    def _applied(self, i: int, over_all: Callable[..., Any]) -> tuple[Array, Array, list[Array], list[Array]]:
        """A parameter before and after its rule, its states and its numbers; nothing changes."""
        operands, rule, values = self.operands[i], self.rules[self.groups[i]], self.values[self.groups[i]]
        before, states = loaded(self.params[i], operands, self._axes(i))
        after, numbers = before.copy(), [number.copy() for number in operands.numbers]
        hyper = {k: v for k, v in values.items() if k in keywords(rule.alone)} | {"unit_axes": operands.unit_axes}
        own = dict(zip(rule.states, [*states, *numbers]))
        apply = rule.alone if rule.of_all is None else functools.partial(rule.of_all, over_all)
        apply(after, self.grads[i], **own, step=self.steps + 1, **self.stages[i], **hyper)
        return before, after, states, numbers

    def _updated(self, i: int, over_all: Callable[..., Any]) -> tuple[list[Change], Any]:
        """What is to be assigned to a parameter and what goes with it; and its statistics, if they are asked for."""
        param, operands = self.params[i], self.operands[i]
        states, scales, average, low_precision, residual, _, numbers = operands
        values = self.values[self.groups[i]]
        real = compute_dtype(param.dtype)
        axes, step = self._axes(i), self.steps + 1

        def random(use: int) -> Array:
            return random_fractions(self.seed, step, i, use, param.size)

        before, exact, exact_states, new_numbers = self._applied(i, over_all)
        new_param, new_residual = param.copy(), None if residual is None else residual.copy()
        bits = _arrays.shaped(random(FOR_PARAM), param.shape, axes) if low_precision == "stochastic" else None
        part(exact, new_param, low_precision, new_residual, bits)
        changes: list[Change] = [(param, ..., new_param), *((old, ..., new) for old, new in zip(numbers, new_numbers))]
        if residual is not None:
            changes.append((residual, ..., new_residual))
        for state, own_scales, new in zip(states, scales or (None,) * len(states), exact_states):
            if is_small(state.dtype):
                new_state, new_scales = state.copy(), None if own_scales is None else own_scales.copy()
                store_state(new, new_state, new_scales, axes, random(FOR_STATES))
                changes += [(state, ..., new_state), *([] if own_scales is None else [(own_scales, ..., new_scales)])]
            else:
                changes.append((state, ..., new))
        after = join(new_param, low_precision, new_residual) if residual is not None else new_param.astype(real)
        if average is not None and values["ema_decay"] != 1:
            new_average = average.copy()
            is_copy = step == 1 and values["convention"] == "keras"
            move_average(new_average, after, 0.0 if is_copy else values["ema_decay"])
            changes.append((average, ..., new_average))
        return changes, self._stats(i, before, after) if self.has_stats else None

    def _stats(self, i: int, before: Array, after: Array) -> tuple[float, ...]:
        with np.errstate(all="ignore"):
            norms = [math.sqrt(sum_squares(a.reshape(-1))) for a in (after, after - before)]
            n_zero = np.count_nonzero(self.grads[i].astype(before.dtype) == 0)
        return self.norms[i], *norms, self.stages[i]["clip_factor"], n_zero, self.n_nonfinite[i]

    def _measure(
        self, grad_scale: float, clip_norm: float | None, clip_eps: float, nonfinite: str
    ) -> tuple[bool, float | None, list[float], list[tuple[int, int]]]:
        """Whether to go on, norm of all gradients, clip factor of each, and where how many elements are not finite."""
        limits = [self.values[group].get("clip_norm_per_array") for group in self.groups]
        if nonfinite == "propagate" and clip_norm is None and not any(limits) and not self.has_stats:
            return True, None, [1.0] * len(self.params), []
        sums, bad = [], []
        with np.errstate(all="ignore"):
            for i, (param, grad) in enumerate(zip(self.params, self.grads)):
                g = load_gradient(grad, compute_dtype(param.dtype), grad_scale)
                n_bad = g.size - int(np.isfinite(g).sum())
                self.n_nonfinite[i] = n_bad
                if n_bad:
                    bad.append((i, n_bad))
                    if nonfinite == "zero":
                        g[~np.isfinite(g)] = 0
                sums.append(scaled_sum_squares(g))
        self.norms[:] = [ldexp(math.sqrt(total), e) for total, e in sums]
        root, exponent = combine(sums)
        grad_norm = ldexp(root, exponent)
        factors = [clip_factor(math.sqrt(total), e, limit, clip_eps) for (total, e), limit in zip(sums, limits)]
        if any(limits):
            root, exponent = combine_clipped(sums, factors)
        factor = clip_factor(root, exponent, clip_norm, clip_eps)
        applied = not bad or nonfinite not in ("raise", "skip")
        return applied, grad_norm, [f * factor for f in factors], bad


def loaded(param: Array, operands: Operands, axes: list[int]) -> tuple[Array, list[Array]]:
    """A parameter and its states as their rule sees them: copies in the compute type."""
    states, scales, residual = operands.states, operands.scales, operands.residual
    real = compute_dtype(param.dtype)
    exact = join(param, operands.low_precision, residual) if residual is not None else param.astype(real)
    pairs = zip(states, scales or (None,) * len(states))
    return exact, [load_state(*pair, axes, real).copy() for pair in pairs]


@functools.cache
def keywords(rule: Callable[..., Any]) -> set[str]:
    """The hyper-parameters and options that a reference function takes."""
    return {*inspect.signature(rule).parameters, *Stages.__annotations__}


def smallest(factors: list[float]) -> float:
    """The smallest factor, at most 1; nan if one is."""
    return math.nan if any(math.isnan(f) for f in factors) else min(factors, default=1.0)
