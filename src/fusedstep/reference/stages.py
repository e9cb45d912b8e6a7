"""What comes before and after every rule: the gradient prepared, the parameter bounded and averaged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from .. import _hyper
from .storage import compute_dtype
from .sums import clip_factor, ldexp, scaled_sums

Array = NDArray[Any]


class Stages(TypedDict, total=False):
    """What can be done to a gradient before the rule, in this order, and to the parameter; the same for every rule."""

    grad_scale: float
    """Divide the gradient by this (default 1)."""
    zero_nonfinite: bool
    """Then count inf and nan as 0 (default False)."""
    maximize: bool
    """Then negate (default False)."""
    clip_factor: float
    """Then multiply by this (default 1)."""
    clip_adaptive: float | None
    """Then bound the norm of each unit to this many times that of the parameter's, or 1e-3 (default None: no bound)."""
    clip_value: float | None
    """Then bound every element to ``[-clip_value, clip_value]`` (default None: no bound)."""
    weight_decay: float
    """Then add ``weight_decay * param``; or, if decoupled, ``param *= 1 - lr * weight_decay`` (default 0)."""
    decoupled_weight_decay: bool
    """See ``weight_decay`` (default False)."""
    decay_mode: str | None
    """``"coupled"`` or ``"decoupled"`` in place of that; or ``"independent"`` of lr: ``param *= 1 - weight_decay``; or
    ``"decoupled_after"`` the rule."""
    l1: float
    """Then add ``l1 * sign(param)`` (default 0)."""
    max_norm: float | None
    """After the rule, bound the norm of each unit of the parameter to this (default None: no bound)."""
    bounds: tuple[float, float] | None
    """Then bound every element of the parameter to ``[lower, upper]`` (default None: no bounds)."""
    unit_axes: tuple[int, ...] | None
    """The axes that count units: one for each index along these, with the elements along all others. By default the first;
    arrays of at most one dimension are one unit each."""


def load_gradient(grad: Array, real: np.dtype[Any], grad_scale: float = 1.0, zero_nonfinite: bool = False) -> Array:
    """A flat copy of the gradient in the compute type, as the norm sees it."""
    g = grad.astype(real).reshape(-1)
    if grad_scale != 1:
        g /= grad_scale
    if zero_nonfinite:
        g[~np.isfinite(g)] = 0
    return g


def clip(g: Array, clip_factor: float | Array, clip_value: float | None) -> None:
    """Scale and bound a gradient in place."""
    if isinstance(clip_factor, np.ndarray) or clip_factor != 1:
        g *= clip_factor
    if clip_value is not None:
        np.clip(g, -clip_value, clip_value, out=g)


def axes_of_units(
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None = None,
    convention: str = "torch",
    label: str = "unit_axes",
    name: str | None = None,
) -> tuple[int, ...]:
    """The axes that count the units of an array of this shape, in order.

    By default those of the outputs: in torch and thinc the first of a weight; where inputs come first, what optax takes.
    """
    n = len(shape)
    if n <= 1:
        return ()
    if axes is not None:
        counting = sorted({axis % n for axis in axes})
        if len(counting) < len(axes) or not all(-n <= axis < n for axis in axes):
            what = "param" if name is None else f"params[{name!r}]"
            raise ValueError(f"{label}: expected different axes of {what}, which has {n} dimensions, got {axes}")
        return tuple(counting)
    if convention in ("torch", "thinc"):
        return (0,)
    if sum(size != 1 for size in shape) <= 1:
        return ()
    return tuple(range(1, n)) if n <= 3 else (n - 1,)


def by_unit(run: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The units of a flat array as rows, each in C order."""
    moved = np.moveaxis(run.reshape(shape), axes, range(len(axes)))
    return moved.reshape(math.prod(shape[axis] for axis in axes), -1) if run.size else run.reshape(0, 1)


def of_units(factors: list[float], run: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The factor of its unit for each element of a flat array, in its type."""
    if not run.size:
        return run
    sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    return np.broadcast_to(np.array(factors, run.dtype).reshape(sizes), shape).reshape(-1)


def unit_factor(root: float, exponent: int, limit: float, least: float = 0.0) -> float:
    """``limit / max(norm, least)`` where ``norm = root * 2**exponent`` is above the limit, else 1."""
    norm = ldexp(root, exponent)
    if norm <= limit:
        return 1.0
    return limit / least if norm < least else clip_factor(root, exponent, limit, 0.0)


def adaptive_factors(
    p: Array, g: Array, clipping: float, factor: float, shape: tuple[int, ...], unit_axes: tuple[int, ...] | None
) -> Array:
    """What to multiply the elements of a flat gradient by, all of which are to be scaled by a factor first."""
    factors, axes = [], axes_of_units(shape, unit_axes)
    sums = zip(scaled_sums(by_unit(p, shape, axes)), scaled_sums(by_unit(g, shape, axes)))
    for (p_squares, p_exponent), (g_squares, g_exponent) in sums:
        limit = clipping * max(ldexp(math.sqrt(p_squares), p_exponent), 1e-3)
        factors.append(factor * unit_factor(math.sqrt(g_squares) * factor, g_exponent, limit, 1e-6))
    return of_units(factors, g, shape, axes)


def max_norm_factors(p: Array, max_norm: float, shape: tuple[int, ...], unit_axes: tuple[int, ...] | None) -> Array:
    """What to multiply the elements of a flat parameter by."""
    axes = axes_of_units(shape, unit_axes)
    sums = scaled_sums(by_unit(p, shape, axes))
    return of_units([unit_factor(math.sqrt(squares), exponent, max_norm) for squares, exponent in sums], p, shape, axes)


@contextmanager
def operands(
    param: Array,
    grad: Array,
    *states: Array | None,
    lr: float,
    grad_scale: float = 1.0,
    zero_nonfinite: bool = False,
    maximize: bool = False,
    clip_factor: float = 1.0,
    clip_adaptive: float | None = None,
    clip_value: float | None = None,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    decay_mode: str | None = None,
    l1: float = 0.0,
    max_norm: float | None = None,
    bounds: tuple[float, float] | None = None,
    unit_axes: tuple[int, ...] | None = None,
) -> Iterator[list[Array]]:
    """Flat arrays ``[p, g, *states]`` in the compute type for a rule to work on; what it leaves there is stored."""
    real = compute_dtype(param.dtype)
    stored = [param, *(state for state in states if state is not None)]
    with np.errstate(all="ignore"):
        p, *s = (array.astype(real).reshape(-1) for array in stored)
        g = load_gradient(grad, real, grad_scale, zero_nonfinite)
        if maximize:
            g = -g
        factor: Any = clip_factor
        if clip_adaptive is not None:
            factor = adaptive_factors(p, g, clip_adaptive, clip_factor, param.shape, unit_axes)
        clip(g, factor, clip_value)
        mode = _hyper.decay_mode({"decay_mode": decay_mode, "decoupled_weight_decay": decoupled_weight_decay})
        if mode == "coupled" and weight_decay != 0:
            g += weight_decay * p
        if l1 != 0:
            g += l1 * np.sign(p)
        if mode == "independent":
            p *= 1 - weight_decay
        elif mode == "decoupled":
            p *= 1 - lr * weight_decay
        yield [p, g, *s]
        if mode == "decoupled_after":
            p *= 1 - lr * weight_decay
        if max_norm is not None:
            p *= max_norm_factors(p, max_norm, param.shape, unit_axes)
        if bounds is not None:
            lower, upper = p.dtype.type(bounds[0]), p.dtype.type(bounds[1])
            p = np.where(p < lower, lower, np.where(p > upper, upper, p))  # a NaN stays one
        for array, run in zip(stored, [p, *s]):
            array[...] = run.reshape(array.shape)


def move_average(average: Array, param: Array, ema_decay: float) -> None:
    """Move an average towards a parameter, both in the compute type: ``average += (1 - ema_decay) * (param - average)``."""
    with np.errstate(all="ignore"):
        average += (1 - ema_decay) * (param - average)
