"""The rules on single arrays, compiled: for libraries that keep their own state and loop.

One function per rule, with the signature of its namesake in :mod:`fusedstep.reference` and the same bits. Each updates
``param`` and the state arrays in place. ``step`` counts from 1. Arrays are checked before anything is written.

>>> import numpy as np, fusedstep as fs
>>> w, g = np.ones(3, np.float32), np.full(3, 0.5, np.float32)
>>> m, v = np.zeros_like(w), np.zeros_like(w)
>>> fs.kernels.adam(w, g, m, v, step=1, lr=0.25, eps=0.0)
>>> w
array([0.75, 0.75, 0.75], dtype=float32)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _arrays, _backends, _hyper, reference, rules
from .optimizer import Optimizer
from .state import NUMBER, Operands, has_units, must_be_packed, shape_of

STAGE_DEFAULTS = {
    "grad_scale": 1.0,
    "zero_nonfinite": False,
    "maximize": False,
    "clip_factor": 1.0,
    "clip_adaptive": None,
    "clip_value": None,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "decay_mode": None,
    "l1": 0.0,
    "max_norm": None,
    "bounds": None,
    "unit_axes": None,
}


def compiled(optimizer: type[Optimizer]) -> Callable[..., None]:
    """The compiled namesake of an optimizer's reference function."""
    rule = optimizer._rule
    signature = inspect.signature(rule)
    names = list(signature.parameters)
    state_names = names[2 : names.index("step")]
    hyper_names = [name for name in names[names.index("step") + 1 :] if name != "stages"]
    known = [*hyper_names, *STAGE_DEFAULTS]
    defaults = {name: p.default for name, p in inspect.signature(optimizer).parameters.items() if name in _hyper.CHECKS}

    @functools.wraps(rule)
    def kernel(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        values = STAGE_DEFAULTS | optimizer._option_defaults | {name: given[name] for name in hyper_names} | given["stages"]
        for name, value in values.items():
            if name not in known:
                raise TypeError(f"{rule.__name__}: unknown option {name!r}; it has {', '.join(known)}")
            values[name] = _hyper.resolve(name, value, 0, name, optimizer._lengths.get(name))
        optimizer._check_convention(values.get("convention", "torch"))
        _hyper.check_known(values)
        optimizer._check_hyper(values)
        if isinstance(given["step"], bool) or not isinstance(given["step"], (int, np.integer)) or given["step"] < 1:
            raise ValueError(f"step: expected a whole number >= 1, got {given['step']!r}")
        param = _arrays.as_writeable(given["param"], "param")
        states = tuple(name for name in state_names if given[name] is not None)
        parts = optimizer._parts([defaults | values])
        part = parts[-1]  # which is for any array
        if part.rule._states(part.hyper) != states and optimizer._is_own(param, defaults | values):
            part = parts[0]
        if part.rule is not optimizer:
            raise ValueError(f"param: expected a matrix, got shape {param.shape}")
        for name in optimizer._states(part.hyper):
            if name not in states:
                raise ValueError(f"{name}: expected an array, got none")

        grad = _arrays.as_gradient(given["grad"], "grad")
        arrays = tuple(_arrays.as_writeable(given[name], name) for name in states)
        if grad.shape != param.shape:
            raise ValueError(f"grad: expected shape {param.shape}, got {grad.shape}")
        for name, array in zip(states, arrays):
            if name in optimizer._numbers:
                _arrays.check_state(array, NUMBER.shape, NUMBER.dtype, name)
            else:
                _arrays.check_state(array, shape_of(name, param.shape), reference.compute_dtype(param.dtype), name)
            if must_be_packed(name, array.dtype) and not array.flags.c_contiguous:
                raise ValueError(f"{name}: expected a C-contiguous array, got strides {array.strides}")
        written = list(zip(["param", *states], [param, *arrays]))
        _arrays.check_overlaps(written)
        _arrays.check_overlaps(written, [("grad", grad)])

        n = len(states) - len(optimizer._numbers)
        unit_axes = reference.axes_of_units(param.shape, values["unit_axes"]) if has_units(values) else None
        operands = Operands(arrays[:n], unit_axes=unit_axes, numbers=arrays[n:])
        if optimizer._direction is not None:
            hyper = {name: value for name, value in values.items() if name in _backends.keywords(optimizer._direction)}
            operands = operands.and_state(optimizer._direction(param, grad, *arrays, step=given["step"], **hyper))
        plan = _backends.require_core().Plan([param], [operands], [0], [optimizer._kernel_name(states[:n], values)])
        plan.steps = given["step"] - 1
        plan.bind([grad])
        plan.set_group(0, values)
        plan.measure(
            grad_scale=values["grad_scale"],
            clip_factor=values["clip_factor"],
            nonfinite="zero" if values["zero_nonfinite"] else "propagate",
        )
        plan.update(True, False)

    return kernel


__all__ = []
for _optimizer in rules.__all__:
    _kernel = compiled(getattr(rules, _optimizer))
    globals()[_kernel.__name__] = _kernel
    __all__.append(_kernel.__name__)
