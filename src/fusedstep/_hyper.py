"""Hyper-parameters: what each may be, and its value at a step."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Union

import numpy as np

Hyper = Union[float, Callable[[int], float]]
"""A number, or a function of the number of steps taken so far (0 at the first step)."""


class Options(TypedDict, total=False):
    """Keyword options that every rule has."""

    weight_decay: Hyper
    decoupled_weight_decay: bool
    decay_mode: str | None
    l1: Hyper
    maximize: bool
    clip_norm: Hyper | None
    clip_value: Hyper | None
    clip_norm_per_array: Hyper | None
    clip_adaptive: Hyper | None
    max_norm: Hyper | None
    unit_axes: int | tuple[int, ...] | None
    bounds: tuple[float | None, float | None] | None
    ema_decay: Hyper | None
    state_dtype: str | None
    low_precision: str
    accumulate_dtype: str | None
    seed: int
    stats: bool
    nonfinite: str
    convention: str
    backend: str
    num_threads: int | None
    allocate_state: Callable[[str, tuple[int, ...], Any], Any] | None


CONVENTIONS = ("torch", "keras", "optax", "tf", "sklearn", "thinc")
"""Whose equations and defaults there are; C counts them in this order."""

OPTION_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "decay_mode": None,
    "l1": 0.0,
    "maximize": False,
    "clip_norm": None,
    "clip_value": None,
    "clip_norm_per_array": None,
    "clip_adaptive": None,
    "max_norm": None,
    "unit_axes": None,
    "bounds": None,
    "ema_decay": None,
    "state_dtype": None,
    "low_precision": "nearest",
    "accumulate_dtype": None,
    "seed": 0,
    "stats": False,
    "nonfinite": "raise",
    "convention": "torch",
    "backend": "c",
    "num_threads": None,
    "allocate_state": None,
}

# Options of the whole optimizer; the others may differ between parameter groups.
GLOBAL_OPTIONS = (
    "clip_norm", "state_dtype", "low_precision", "accumulate_dtype", "seed", "stats", "nonfinite", "convention", "backend",
    "num_threads", "allocate_state",
)  # fmt: skip

CHOICES = {
    "decay_mode": (None, "coupled", "decoupled", "independent", "decoupled_after"),
    "state_dtype": (None, "float32", "bfloat16", "int8"),
    "low_precision": ("nearest", "stochastic", "kahan", "split", "master"),
    "accumulate_dtype": (None, "float32", "bfloat16"),
    "nonfinite": ("raise", "skip", "zero", "propagate"),
    "convention": CONVENTIONS,
    "backend": ("c", "reference"),
}


def is_real(value: Any) -> bool:
    """Whether a value is a real number as far as its type says."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.ndim == 0 and value.dtype.kind not in "bcmMSU"  # bool, complex, time, text
    return hasattr(value, "__float__") and not isinstance(value, bool)


def as_float(value: Any, label: str, wanted: str) -> float:
    if not is_real(value):
        raise TypeError(f"{label}: expected {wanted}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of very many digits, for example
        raise TypeError(f"{label}: expected {wanted}, got {value!r}") from None


def number(value: Any, label: str, wanted: str, accept: Callable[[float], bool]) -> float:
    result = as_float(value, label, wanted)
    if not (math.isfinite(result) and accept(result)):
        raise ValueError(f"{label}: expected {wanted}, got {value!r}")
    return result


def whole_number(value: Any, label: str, least: float = -math.inf, most: float = math.inf) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise TypeError(f"{label}: expected a whole number, got {value!r}")
    if whole < least:
        raise ValueError(f"{label}: expected at least {least}, got {value}")
    if whole > most:
        raise ValueError(f"{label}: expected at most {most}, got a larger number")  # of maybe more digits than Python shows
    return whole


def real(wanted: str, accept: Callable[[float], bool] = math.isfinite) -> Callable[[Any, str], float]:
    """A check for finite numbers of this kind."""
    return functools.partial(number, wanted=wanted, accept=accept)


def real_or_none(wanted: str, accept: Callable[[float], bool]) -> Callable[[Any, str], float | None]:
    check = real(f"{wanted} or None", accept)
    return lambda value, label: None if value is None else check(value, label)


finite = real("a finite number")
at_least_0 = real("a finite number >= 0", lambda x: x >= 0)
at_least_0_or_none = real_or_none("a finite number >= 0", lambda x: x >= 0)
at_least_1 = real("a finite number >= 1", lambda x: x >= 1)
at_most_0 = real("a finite number <= 0", lambda x: x <= 0)
above_0 = real("a finite number > 0", lambda x: x > 0)
above_0_or_none = real_or_none("a finite number > 0", lambda x: x > 0)
from_0_below_1 = real("a number in [0, 1)", lambda x: 0 <= x < 1)
from_0_below_1_or_none = real_or_none("a number in [0, 1)", lambda x: 0 <= x < 1)
from_0_to_1 = real("a number in [0, 1]", lambda x: 0 <= x <= 1)
from_0_to_1_or_none = real_or_none("a number in [0, 1]", lambda x: 0 <= x <= 1)
grad_scale = real("a number in [1e-37, 1e37]", lambda x: 1e-37 <= x <= 1e37)
"""Neither it nor its inverse may leave float32's range."""


def bounds(value: Any, label: str) -> tuple[float, float] | None:
    if value is None:
        return None
    wanted = "a pair of numbers or None, the lower first"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{label}: expected {wanted}, got {value!r}")
    no_bounds = (-math.inf, math.inf)
    lower, upper = (
        none if x is None or (is_real(x) and x == none) else finite(x, f"{label}[{i}]")
        for i, (x, none) in enumerate(zip(value, no_bounds))
    )
    if not lower <= upper:
        raise ValueError(f"{label}: expected {wanted}, got {value!r}")
    return lower, upper


def unit_axes(value: Any, label: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    axes = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(axis, (int, np.integer)) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"{label}: expected an axis, several as a tuple, or None, got {value!r}")
    return tuple(int(axis) for axis in axes)


def boolean(value: Any, label: str) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{label}: expected True or False, got {value!r}")
    return value


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "lr": at_least_0,
    "momentum": at_least_0,
    "momentum_decay": at_least_0,
    "r": at_least_0,
    "weight_lr_power": at_least_0,
    "trust_coefficient": at_least_0,
    "dampening": finite,
    "nesterov": boolean,
    "lr_decay": at_least_0,
    "initial_accumulator_value": at_least_0,
    "eps": at_least_0,
    "eps[0]": at_least_0_or_none,
    "eps_root": at_least_0_or_none,
    "beta2_decay": at_most_0,
    "d": at_least_1,
    "min_dim_size_to_factor": lambda value, label: whole_number(value, label, 0),
    "rho": from_0_to_1,
    "etas": above_0,
    "step_sizes": at_least_0,
    "lambd": at_least_0,
    "t0": at_least_0,
    "beta": at_least_0,
    "l1_regularization_strength": at_least_0,
    "l2_regularization_strength": at_least_0,
    "alpha": from_0_to_1,
    "centered": boolean,
    "amsgrad": boolean,
    "betas": from_0_below_1,
    "beta3": from_0_below_1_or_none,
    "d0": above_0,
    "d_coef": above_0,
    "use_bias_correction": boolean,
    "safeguard_warmup": boolean,
    "ns_coefficients": finite,
    "ns_steps": lambda value, label: whole_number(value, label, 0, 99),  # as in PyTorch
    "adjust_lr_fn": lambda value, label: one_of(value, (None, "original", "match_rms_adamw"), label),
    "adamw_lr_ratio": at_least_0,
    "adamw_betas": from_0_below_1,
    "adamw_eps": at_least_0,
    "adamw_weight_decay": at_least_0,
    "weight_decay": at_least_0,
    "decoupled_weight_decay": boolean,
    "decay_mode": lambda value, label: choice("decay_mode", value, label),
    "l1": at_least_0,
    "maximize": boolean,
    "convention": lambda value, label: choice("convention", value, label),
    "grad_scale": grad_scale,
    "clip_factor": at_least_0,
    "zero_nonfinite": boolean,
    "clip_norm": above_0_or_none,
    "clip_value": above_0_or_none,
    "clip_norm_per_array": above_0_or_none,
    "clip_adaptive": above_0_or_none,
    "max_norm": above_0_or_none,
    "unit_axes": unit_axes,
    "bounds": bounds,
    "ema_decay": from_0_to_1_or_none,
}

KNOWN_TO: dict[str, tuple[tuple[str, ...], Any]] = {
    "dampening": (("torch",), 0),
    "momentum": (("torch", "keras", "optax", "tf", "sklearn"), 0),
    "lr_decay": (("torch",), 0),
    "amsgrad": (("torch", "keras", "optax", "tf"), False),
    "eps_root": (("optax",), None),
    "adjust_lr_fn": (("torch", "optax"), "match_rms_adamw"),
    "use_bias_correction": (("torch",), True),
    "r": (("torch",), 0),
    "weight_lr_power": (("torch", "optax"), 0),
}
"""Hyper-parameters that not all conventions of their rules know, and what they are in the others."""

UNKNOWN_TO = {
    convention: {name: otherwise for name, (conventions, otherwise) in KNOWN_TO.items() if convention not in conventions}
    for convention in CONVENTIONS
}
"""The same by convention."""


def decay_mode(values: Mapping[str, Any]) -> str:
    """The kind of weight decay that `decay_mode`, or `decoupled_weight_decay` in its absence, asks for."""
    mode: str | None = values.get("decay_mode")
    return mode or ("decoupled" if values.get("decoupled_weight_decay") else "coupled")


def has_callable(value: Any) -> bool:
    """Whether a hyper-parameter, or one of its numbers, is a schedule."""
    return callable(value) or (isinstance(value, (tuple, list)) and any(callable(v) for v in value))


def resolve(name: str, value: Any, step: int, label: str, length: int | None = None) -> Any:
    """The value of a hyper-parameter after `step` steps, checked; of one that is `length` numbers, each, in a way of its own
    if there is one."""
    if callable(value):
        value = value(step)
    if length is None:
        return CHECKS[name](value, label)
    if not isinstance(value, (tuple, list)) or len(value) != length:
        raise TypeError(f"{label}: expected {'a pair of' if length == 2 else length} numbers, got {value!r}")
    checks = [CHECKS.get(f"{name}[{i}]", CHECKS[name]) for i in range(length)]
    return tuple(check(v(step) if callable(v) else v, f"{label}[{i}]") for i, (check, v) in enumerate(zip(checks, value)))


def is_known(name: str, convention: str) -> bool:
    """Whether a convention has this hyper-parameter of one of its rules."""
    return name not in KNOWN_TO or convention in KNOWN_TO[name][0]


def check_known(values: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that the convention does not know."""
    convention = values.get("convention", "torch")
    for name, otherwise in UNKNOWN_TO[convention].items():
        if values.get(name, otherwise) != otherwise:
            raise ValueError(f"{name}: expected {otherwise!r} for convention={convention!r}, got {values[name]!r}")


def one_of(value: Any, choices: tuple[Any, ...], label: str) -> Any:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{label}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def choice(name: str, value: Any, label: str | None = None) -> Any:
    return one_of(value, CHOICES[name], label or name)


def seed(value: Any, label: str = "seed") -> int:
    whole = whole_number(value, label)
    if not 0 <= whole < 2**64:
        raise ValueError(f"{label}: expected a whole number in [0, 2**64), got {value}")
    return whole


MAX_THREADS = 2**16


def check_num_threads(value: Any, label: str = "num_threads") -> None:
    whole_number(value, label, 1, MAX_THREADS)
