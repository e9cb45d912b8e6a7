"""What the exchange with all libraries has in common."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _hyper
from ..optimizer import Optimizer, Part
from ..reference import storage
from ..state import AVERAGE, FACTORS, NUMBER, RESIDUAL_NAMES, SCALE, shape_of

Array = NDArray[Any]
Arrays = dict[str, dict[str, Array]]
Hypers = dict[str, dict[str, Any]]
"""Hyper-parameters by the name of a parameter."""

LIBRARIES = {"torch": "PyTorch", "keras": "Keras", "optax": "optax"}

DECAYS = ("weight_decay", "adamw_weight_decay")
"""Those of a rule's own arrays, and of others."""

OWN = {AVERAGE, *RESIDUAL_NAMES}
"""States that only fusedstep has."""

OF_OTHER_SIGN = {
    ("keras", "SGD", "momentum_buffer"),
    ("optax", "RMSprop", "momentum_buffer"),
    ("optax", "LARS", "momentum_buffer"),
}
"""Velocities that are added to the parameters there, and subtracted here."""


def imported(
    opt: Optimizer, step: int, states: Mapping[str, Mapping[str, Any]], hypers: Hypers, options: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict of `opt` with these in the place of its own."""
    saved = opt.state_dict()
    params = dict(opt._params.items())
    resolved = opt._resolve(opt.param_groups, saved["step"])
    for i, group in enumerate(saved["param_groups"]):
        new: dict[str, Any] = {}
        for name in group["names"]:
            for key, value in hypers.get(name, {}).items():
                if key in group and new.setdefault(key, value) != value:
                    label = f"{key} of param_groups[{i}]"
                    raise ValueError(f"{label}: expected one value for {group['names']}, got {new[key]!r} and {value!r}")
        group.update(new)
        resolved[i] = {**resolved[i], **new}
    parts = parts_of(opt, resolved)
    for name, own in states.items():
        here = {key: array for key, array in saved["state"].get(name, {}).items() if key in OWN}
        if step == 0 and name in parts:  # some libraries make their state in the first step
            here |= initial_states(parts[name], params[name])
        theirs = {key: as_state(opt, key, value, name, params.get(name)) for key, value in own.items()}
        saved["state"][name] = here | theirs
    saved["step"] = step
    saved["options"] |= options
    return saved


def parts_of(opt: Optimizer, resolved: list[dict[str, Any]]) -> dict[str, Part]:
    """Rule and hyper-parameters of each parameter."""
    return dict(zip(opt._params.names, map(opt._parts(resolved).__getitem__, opt._places(resolved))))


def initial_states(part: Part, param: Array) -> dict[str, Array]:
    """What the rule's states and numbers of a parameter hold before the first step."""
    rule, hyper = part
    dtype = storage.compute_dtype(param.dtype)
    states = {name: (shape_of(name, param.shape), rule._initial_state(name, hyper)) for name in rule._states(hyper)}
    arrays = {name: np.full(shape, param if fill is None else fill, dtype) for name, (shape, fill) in states.items()}
    return arrays | {name: np.full_like(NUMBER, rule._initial_state(name, hyper)) for name in rule._numbers}


def exported(opt: Optimizer) -> tuple[int, list[dict[str, Any]], Arrays]:
    """Number of steps, hyper-parameters of each group, and copies of the rule's states as the other library has them."""
    saved = opt.state_dict()
    resolved = opt._resolve(opt.param_groups, saved["step"])
    params = dict(opt._params.items())
    states: Arrays = {}
    for group in opt.param_groups:
        for name in group["names"]:
            own, axes, dtype = saved["state"][name], saved["memory_axes"][name], storage.compute_dtype(params[name].dtype)
            keys = [key for key in own if key not in OWN and not key.endswith(SCALE)]
            exact = {key: storage.load_state(own[key], own.get(key + SCALE), axes, dtype) for key in keys}
            states[name] = {key: as_there(opt, key, array) for key, array in exact.items()}
    return saved["step"], resolved, states


def as_state(opt: Optimizer, key: str, value: Any, name: str, param: Array | None) -> Array:
    """A copy of a state from elsewhere, in the type it has here if that includes its own: the rest is load_state_dict's."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # unknown to NumPy
            value = value.float()
    array = np.asarray(value) if hasattr(value, "__array__") else _arrays.as_array(value, f"{key} of params[{name!r}]")
    dtype = array.dtype if param is None else storage.compute_dtype(param.dtype)
    if key in opt._numbers:
        dtype = NUMBER.dtype
    if key in FACTORS and opt.convention != "torch":
        array = np.expand_dims(array, FACTORS[key])
    return signed(opt, key, array.astype(dtype if np.can_cast(array.dtype, dtype) else array.dtype))


def as_there(opt: Optimizer, key: str, array: Array) -> Array:
    """A state as the other library has it: means of rows and of columns without an axis for the latter and the former."""
    if key in FACTORS and opt.convention != "torch":
        array = array.squeeze(FACTORS[key])
    return signed(opt, key, array)


def signed(opt: Optimizer, key: str, array: Array) -> Array:
    return np.asarray(-array) if (opt.convention, type(opt).__name__, key) in OF_OTHER_SIGN else array


def as_numbers(value: Any) -> Any:
    """A hyper-parameter as numbers of Python, which may have been tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(map(as_numbers, value))
    return value.item() if hasattr(value, "item") else value


def the_step(counts: Mapping[str, float], step: int | None, label: str, least: int = 0) -> int:
    """The number of steps that all counts, and the argument, agree on; least is 1 if something uncounted took steps."""
    if step is not None:
        counts = {"step": _hyper.whole_number(step, "step", least), **counts}
    elif not counts or least:
        raise ValueError(f"step: expected the number of steps taken, got none, and {label} does not tell it")
    first, wanted = next(iter(counts.items()))
    for name, count in counts.items():
        if count != wanted or not float(count).is_integer():
            raise ValueError(f"{name}: expected the same whole number of steps as {first}, {wanted}, got {count}")
    return int(wanted)


def in_order(names: Sequence[str] | None, own: list[str]) -> list[str]:
    """The names given, which are to be these; these if none are given."""
    if names is not None and (len(names) != len(own) or set(names) != set(own)):
        raise ValueError(f"names: expected {own} in some order, got {names!r}")
    return list(own if names is None else names)


def by_groups(opt: Optimizer) -> list[str]:
    return [name for group in opt.param_groups for name in group["names"]]


def check_rule(opt: Any, convention: str, rules: Mapping[str, Any]) -> None:
    """Refuse optimizers that the library does not have, or has with other equations."""
    rule, library = type(opt).__name__, LIBRARIES[convention]
    if rule not in rules:
        raise TypeError(f"opt: expected one of {', '.join(rules)} for {library}, got {rule}")
    if opt.convention != convention:
        raise ValueError(f"opt: expected convention={convention!r} for the equations of {library}, got {opt.convention!r}")


def check_same(values: Mapping[str, Any], wanted: Mapping[str, Any], label: str, convention: str) -> None:
    """Refuse hyper-parameters that are others in the other library, or that it does not have."""
    for key, value in wanted.items():
        if values[key] != value:
            raise ValueError(f"{key} of {label}: expected {value!r} as in {LIBRARIES[convention]}, got {values[key]!r}")


def check_decay(values: Mapping[str, Any], label: str, convention: str, kinds: tuple[str, ...]) -> str:
    """The kind of weight decay, which the other library has to know if there is any."""
    decay = _hyper.decay_mode(values)
    if any(values.get(key, 0) != 0 for key in DECAYS) and decay not in kinds:
        wanted = " or ".join(map(repr, kinds)) or "no weight_decay"
        raise ValueError(f"decay_mode of {label}: expected {wanted} as in {LIBRARIES[convention]}, got {decay!r}")
    return decay


def check_shape(array: Array, shape: Any, label: str) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"{label}: expected shape {array.shape}, got {tuple(shape)}")


def library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"fs.interop needs {package} for this ({error}): pip install {package}") from None
