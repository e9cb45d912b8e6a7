"""The rules on single arrays, compiled: for libraries that keep their own state and loop.

One function per rule, with the signature of its namesake in :mod:`fusedstep.reference` and the same bits.

* ``param`` and the state arrays change in place, all others stay. An optional state array can be left out if the
  hyper-parameters do not call for it.
* ``param`` and ``grad`` are arrays of one shape and of any layout, each of float32, float64, float16 or bfloat16. States
  have that shape, too, but those of factored rules have an axis of length 1; their dtype is float64 if that of ``param``
  is, else float32. What a rule keeps for a whole array is a float64 of shape ``()``.
* What is written shares memory with none of the others.
* ``step`` counts from 1. Callers keep it, and begin with the states that the optimizer of the rule begins with.
* Elements of ``grad`` that are not finite go into ``param`` and the states, unless ``zero_nonfinite=True``.
* TypeError and ValueError name the argument that is wrong; they come before anything is written.

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
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _arrays, _extension, _hyper, rules
from .optimizer import Optimizer
from .reference import stages, storage
from .reference.plan import keywords
from .state import NUMBER, Operands, has_units, must_be_packed, shape_of

MAX_STEP = 2**53  # what a double counts to

STAGE_DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(stages.operands).parameters.items()
    if name in stages.Stages.__annotations__
}


def compiled(optimizer: type[Optimizer]) -> Callable[..., None]:
    """The compiled namesake of an optimizer's reference function."""
    rule = optimizer._rule
    signature = inspect.signature(rule)
    names = list(signature.parameters)
    array_names = names[: names.index("step")]
    state_names = array_names[2:]
    hyper_names = [name for name in names[names.index("step") + 1 :] if name != "stages"]
    known = [*hyper_names, *STAGE_DEFAULTS]
    lengths = optimizer._lengths
    required = {name for name, p in signature.parameters.items() if p.default is p.empty and name != "stages"}
    hyper_defaults = {name: signature.parameters[name].default for name in hyper_names if name not in required}
    # Checked and converted once; a call then looks at what it is given.
    defaults = {name: p.default for name, p in inspect.signature(optimizer).parameters.items() if name in _hyper.CHECKS}
    for name, default in (STAGE_DEFAULTS | optimizer._option_defaults | hyper_defaults).items():
        defaults[name] = _hyper.resolve(name, default, 0, name, lengths.get(name))

    @functools.wraps(rule)
    def kernel(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(array_names, args))
        is_clear = len(args) == len(given) and given.keys().isdisjoint(kwargs)
        given |= kwargs
        if not is_clear or not given.keys() >= required:
            refuse(signature, rule.__name__, args, kwargs)
        values = defaults.copy()
        for name, value in kwargs.items():
            if name in known:
                if _hyper.has_callable(value):
                    raise TypeError(f"{name}: expected no schedule, which only optimizers follow, got {value!r}")
                values[name] = _hyper.resolve(name, value, 0, name, lengths.get(name))
            elif name not in array_names and name != "step":
                raise TypeError(f"{rule.__name__}: unknown option {name!r}; it has {', '.join(known)}")
        optimizer._check_convention(values.get("convention", "torch"))
        _hyper.check_known(values)
        optimizer._check_hyper(values)
        step = as_step(given["step"])
        param = _arrays.as_writeable(given["param"], "param")
        states = tuple(name for name in state_names if given.get(name) is not None)
        parts = optimizer._parts([values])
        part = parts[-1]  # which is for any array
        if part.rule._states(part.hyper) != states and optimizer._is_own(param, values):
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
        real = storage.compute_dtype(param.dtype)
        for name, array in zip(states, arrays):
            if name in optimizer._numbers:
                _arrays.check_state(array, NUMBER.shape, NUMBER.dtype, name)
            else:
                _arrays.check_state(array, shape_of(name, param.shape), real, name)
            if not array.flags.c_contiguous and must_be_packed(name, array.dtype):
                raise ValueError(f"{name}: expected a C-contiguous array, got strides {array.strides}")
        # Most often even the address ranges are apart, which is told sooner than which arrays share what.
        if any(np.may_share_memory(*pair) for pair in itertools.combinations([param, *arrays, grad], 2)):
            written = list(zip(["param", *states], [param, *arrays]))
            _arrays.check_overlaps(written)
            _arrays.check_overlaps(written, [("grad", grad)])

        n = len(states) - len(optimizer._numbers)
        unit_axes = stages.axes_of_units(param.shape, values["unit_axes"]) if has_units(values) else None
        operands = Operands(arrays[:n], unit_axes=unit_axes, numbers=arrays[n:])
        if optimizer._direction is not None:
            hyper = {name: value for name, value in values.items() if name in keywords(optimizer._direction)}
            operands = operands.and_state(optimizer._direction(param, grad, *arrays, step=step, **hyper))
        plan = _extension.require_core().Plan([param], [operands], [0], [optimizer._kernel_name(states[:n], values)])
        plan.steps = step - 1
        plan.bind([grad])
        plan.set_group(0, values)
        plan.measure(
            grad_scale=values["grad_scale"],
            clip_factor=values["clip_factor"],
            nonfinite="zero" if values["zero_nonfinite"] else "propagate",
        )
        plan.update(True, False)

    kernel.__doc__ = documentation(optimizer, signature, state_names, hyper_names, defaults)
    return kernel


DOCUMENTATION = """{summary}

    Parameters
    ----------
    param : ndarray
        Changed in place. Of float32, float64, float16 or bfloat16, in any layout.
    grad : ndarray
        Of the same shape, and any of these types.
    {states}
    step : int
        The number of this step, from 1.
    {hyper}
        As those of :class:`fusedstep.{optimizer}`, but numbers.
    **stages
        What comes before and after the rule: :class:`fusedstep.reference.stages.Stages` has their names, and says what they
        do in which order.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be: see :mod:`fusedstep.kernels`. Nothing has changed then.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w, g = np.ones((2, 3)), np.full((2, 3), 0.5)
    >>> states = {{{example}}}
    >>> fs.kernels.{name}(w, g, **states, step=1, lr=0.25)
    >>> bool(w.max() < 1)
    True
    """
SHAPES = {
    (2, 3): "of the shape of `param`, float64 if that is, else float32",
    (2, 1): "of the shape of `param` with a last axis of length 1, float64 if that is, else float32",
    (1, 3): "of the shape of `param` with a last but one axis of length 1, float64 if that is, else float32",
    (): "a float64 of shape ()",
}


def documentation(
    optimizer: type[Optimizer], signature: inspect.Signature, states: list[str], hyper: list[str], defaults: dict[str, Any]
) -> str:
    """The docstring of a kernel."""
    lines, example = [], []
    needed = (*optimizer._states(defaults), *optimizer._numbers)
    for name in states:
        shape = () if name in optimizer._numbers else shape_of(name, (2, 3))
        optional = ", optional" if signature.parameters[name].default is None else ""
        lines += [f"{name} : ndarray{optional}", f"    State, changed in place: {SHAPES[shape]}."]
        if name in needed:
            fill = optimizer._initial_state(name, defaults)
            example.append(f'"{name}": ' + ("w.copy()" if fill is None else f"np.full({shape}, {fill})"))
    return DOCUMENTATION.format(
        summary=optimizer._rule.__doc__,
        states="\n    ".join(lines),
        hyper=", ".join(hyper),
        optimizer=optimizer.__name__,
        example=", ".join(example),
        name=optimizer._rule.__name__,
    )


def refuse(signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say what is wrong with the arguments of a call."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def as_step(value: Any) -> int:
    """The number of a step."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"step: expected a whole number >= 1, got {value!r}")
    if value > MAX_STEP:  # of maybe more digits than Python shows
        raise ValueError(f"step: expected a whole number <= {MAX_STEP}, got a larger one")
    return int(value)


__all__ = []
for _optimizer in rules.__all__:
    _kernel = compiled(getattr(rules, _optimizer))
    globals()[_kernel.__name__] = _kernel
    __all__.append(_kernel.__name__)
