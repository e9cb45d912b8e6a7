"""What an optimizer keeps beside each parameter: which arrays, of what type, where they lie, and how they change type."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _arrays
from .reference import storage

Array = NDArray[Any]
State = Mapping[str, Mapping[str, Array]]
Allocate = Callable[[str, tuple[int, ...], Any], Any]

FLOAT32 = np.dtype(np.float32)
SCALE = "_scale"  # ends the name of the array that goes with an 8-bit state
AVERAGE = "average"


NUMBER = np.zeros(())
"""What the numbers that a rule keeps for each array are like."""


class Need(NamedTuple):
    """A state array that each parameter of a group is to have."""

    name: str
    type: str
    """Name of a dtype; "compute" for that the parameter is computed in, "param" for that it has; or "number" for a single
    one, in double whatever the parameter's type."""
    fill: float | None = 0.0
    """What it holds at first; None for the parameter's values."""


RESIDUALS = {
    "nearest": None,
    "stochastic": None,
    "kahan": Need("compensation", "param"),
    "split": Need("remainder", "int16"),
    "master": Need("master", "float32", None),
}
"""By the option `low_precision`, what is kept of the digits that a parameter of 16 bits has no room for."""

RESIDUAL_NAMES = {need.name for need in RESIDUALS.values() if need is not None}
FACTORS = {"row_var": -1, "col_var": -2}
"""States of factored rules, with the axis along which there is only one of each."""
PACKED = RESIDUAL_NAMES | FACTORS.keys()


class Kernel(NamedTuple):
    """A compiled rule, the states and numbers it works on in its order, and all that parameters need for a step."""

    rule: Any
    """The optimizer class."""
    name: str
    states: tuple[str, ...]
    numbers: tuple[str, ...]
    needs: tuple[Need, ...]
    has_units: bool
    unit_axes: tuple[int, ...] | None


class Operands(NamedTuple):
    """What goes with a parameter into a plan."""

    states: tuple[Array, ...] = ()
    """In the rule's order."""
    scales: tuple[Array | None, ...] = ()
    """Of states of 8 bits; empty if there are none."""
    average: Array | None = None
    low_precision: str = "nearest"
    residual: Array | None = None
    unit_axes: tuple[int, ...] | None = None
    """The axes that count its units; None if it needs none."""
    numbers: tuple[Array, ...] = ()
    """In the rule's order."""

    def and_state(self, array: Array) -> Operands:
        """The same with another state, of the compute type."""
        return self._replace(states=(*self.states, array), scales=(*self.scales, None) if self.scales else ())


class Spec(NamedTuple):
    """What a state array of a parameter is to be."""

    like: Array
    """Of its shape, and lying to cache lines as it does."""
    axes: list[int]
    """In the order in which they lie in memory."""
    dtype: np.dtype[Any]
    fill: float | Array


def has_units(hyper: Mapping[str, Any]) -> bool:
    """Whether norms of units are limited."""
    return hyper["clip_adaptive"] is not None or hyper["max_norm"] is not None


def is_low_precision(param: Array) -> bool:
    """Whether a parameter has 16 bits."""
    return param.dtype.itemsize == 2


def specs_of(kernel: Kernel, param: Array, axes: list[int]) -> dict[str, Spec]:
    """The state arrays of a parameter by name."""
    types = {"compute": storage.compute_dtype(param.dtype), "param": param.dtype}
    specs: dict[str, Spec] = {}
    for name, type, fill in kernel.needs:
        if name in RESIDUAL_NAMES and not is_low_precision(param):
            continue
        if type == "number":
            specs[name] = Spec(NUMBER, [], NUMBER.dtype, 0.0 if fill is None else fill)
            continue
        dtype = types.get(type) or np.dtype(type)
        specs[name] = Spec(param, axes, dtype, param if fill is None else fill)
        if name in FACTORS:
            specs[name] = Spec(np.empty(shape_of(name, param.shape), dtype), list(range(param.ndim)), dtype, 0.0)
        if dtype in storage.LEAST:
            specs[name + SCALE] = Spec(np.empty(-(-param.size // storage.SCALED), np.float32), [0], FLOAT32, 0.0)
    return specs


def shape_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the state with this name of a parameter with this one."""
    if name not in FACTORS:
        return shape
    axis = len(shape) + FACTORS[name]
    return tuple(1 if a == axis else size for a, size in enumerate(shape))


def operands_of(
    kernel: Kernel, own: Mapping[str, Array], param: Array, low_precision: str, unit_axes: tuple[int, ...] | None = None
) -> Operands:
    """A parameter's state arrays by their roles."""
    low_precision = low_precision if is_low_precision(param) else "nearest"
    residual = RESIDUALS[low_precision]
    return Operands(
        tuple(own[name] for name in kernel.states),
        tuple(own.get(name + SCALE) for name in kernel.states),
        own.get(AVERAGE),
        low_precision,
        own.get(residual.name) if residual is not None else None,
        unit_axes,
        tuple(own[name] for name in kernel.numbers),
    )


def exact(param: Array, own: Mapping[str, Array], low_precision: str) -> Array:
    """A parameter in the compute type, with what is kept beside it."""
    residual = RESIDUALS[low_precision]
    if not is_low_precision(param):
        return param
    return storage.join(param, low_precision, own.get(residual.name) if residual is not None else None)


def labels(state: State) -> list[tuple[str, Array]]:
    return [(f"state[{name!r}][{key!r}]", array) for name, own in state.items() for key, array in own.items()]


def require_bfloat16() -> None:
    try:
        importlib.import_module("ml_dtypes")  # which tells NumPy of the type
    except ImportError as error:
        raise ImportError(f"bfloat16 needs ml_dtypes ({error}): pip install ml_dtypes") from None


# ---- New arrays ---------------------------------------------------------------------------------------------------------


def completed(specs: dict[str, dict[str, Spec]], state: State, allocate: Allocate | None) -> dict[str, dict[str, Array]]:
    """The state arrays of each parameter: those there, and new ones for the others, some with values of another type."""
    there = {(name, key): array for name, own in state.items() for key, array in own.items()}
    wanted = [(name, key, spec) for name, own in specs.items() for key, spec in own.items()]
    missing = [w for w in wanted if w[:2] not in there or there[w[:2]].dtype != w[2].dtype]
    new = allocated([(f"{name}.{key}", spec) for name, key, spec in missing], allocate)
    there.update(zip([(name, key) for name, key, _ in missing], new))
    result = {name: {key: there[name, key] for key in own} for name, own in specs.items()}
    if allocate is not None:
        for array in new:
            array[...] = 0
    for name, key, (param, axes, dtype, fill) in missing:
        if key in state[name]:  # in another type
            as_wanted = converted(key, state[name], axes, specs[name], f"state[{name!r}][{key!r}]")
            for k, array in as_wanted.items():
                result[name][k][...] = array
        elif dtype in storage.LEAST and np.any(fill):
            storage.store_state(np.full_like(param, fill, FLOAT32), result[name][key], result[name][key + SCALE], axes)
        elif np.any(fill):
            result[name][key][...] = fill
    return result


def allocated(wanted: list[tuple[str, Spec]], allocate: Allocate | None) -> list[Array]:
    """Arrays for these names and specs, of zeros unless the user allocates them."""
    if allocate is None:
        return _arrays.zeros_together((spec.like, spec.axes, spec.dtype) for _, spec in wanted)
    arrays = []
    for name, (like, axes, dtype, _) in wanted:
        label = f"allocate_state({name!r})"
        is_float = _arrays.is_supported(dtype)
        array = _arrays.as_writeable(allocate(name, like.shape, dtype), label, any_dtype=not is_float)
        _arrays.check_state(array, like.shape, dtype, label)
        if must_be_packed(name, dtype):
            check_packed(array, axes, label)
        arrays.append(array)
    return arrays


def check_packed(array: Array, axes: list[int], label: str) -> None:
    if not array.transpose(axes).flags.c_contiguous:
        order = "C order" if axes == sorted(axes) else f"the order {axes} of its axes"
        raise ValueError(f"{label}: expected an array in {order}, without gaps, got strides {array.strides}")
    if not array.flags.aligned:
        raise ValueError(f"{label}: expected an array aligned to its items, got one that begins at an odd address")


def must_be_packed(name: str, dtype: np.dtype[Any]) -> bool:
    """Whether a state array has to lie in an order of its axes, most often that of its parameter in memory, without gaps."""
    key = name.rsplit(".", 1)[-1]
    return key in PACKED or key.endswith(SCALE) or storage.is_small(dtype)


# ---- Loaded arrays ------------------------------------------------------------------------------------------------------


def loaded(given: Iterable[tuple[str, Any]], specs: dict[str, Spec], axes: list[int], label: str) -> dict[str, Array]:
    """A parameter's state arrays from elsewhere, where they lay in an order of its axes, checked and in the types wanted."""
    own = {key: _arrays.as_array(array, f"{label}[{key!r}]") for key, array in given}
    wanted = {key for key in specs if not key.endswith(SCALE)}
    scales = {key + SCALE for key in wanted if key in own and own[key].dtype in storage.LEAST}
    if set(own) != wanted | scales:
        raise ValueError(f"{label}: expected {sorted(wanted | scales)}, got {sorted(own, key=str)}")
    result: dict[str, Array] = {}
    for key in sorted(wanted):
        result |= converted(key, own, axes, specs, f"{label}[{key!r}]")
    return result


def converted(key: str, own: Mapping[str, Array], axes: list[int], specs: dict[str, Spec], label: str) -> dict[str, Array]:
    """A state, and its scales if it is of 8 bits, as a parameter wants it; from another type to the nearest."""
    array, scales, (param, wanted_axes, wanted, _) = own[key], own.get(key + SCALE), specs[key]
    real = storage.compute_dtype(param.dtype)
    from_float = array.dtype == real or storage.is_small(array.dtype)
    to_float = wanted == real or storage.is_small(wanted)
    _arrays.check_state(array, param.shape, array.dtype if from_float and to_float else wanted, label)
    if scales is not None:
        _arrays.check_state(scales, (-(-param.size // storage.SCALED),), FLOAT32, label + SCALE)
    if array.dtype == wanted and (scales is None or axes == wanted_axes):
        return {key: array} if scales is None else {key: array, key + SCALE: scales}
    exact = storage.load_state(array, scales, axes, real)
    if wanted not in storage.LEAST:
        return {key: exact.astype(wanted)}
    codes, new_scales = np.empty(param.shape, wanted), np.empty(specs[key + SCALE].like.shape, np.float32)
    storage.store_state(exact, codes, new_scales, wanted_axes)
    return {key: codes, key + SCALE: new_scales}
