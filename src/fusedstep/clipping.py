"""Norms and clipping of gradients by themselves, for loops that keep their own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from . import _arrays, _extension, _hyper, trees
from .errors import NonFiniteGradientError
from .reference import stages, storage
from .reference.plan import ReferencePlan
from .state import Operands

Array = NDArray[Any]


class Gradients:
    """Named gradient arrays, bound to a plan without a rule, alone or beside their parameters."""

    def __init__(
        self,
        grads: Any,
        *,
        writeable: bool,
        params: Any = None,
        unit_axes: Callable[[tuple[int, ...], str], tuple[int, ...]] | None = None,
        **clipping: float,
    ) -> None:
        structure = trees.Structure(grads if params is None else params)
        self.names = structure.names
        check = _arrays.as_writeable if writeable else _arrays.as_gradient
        labels = [f"grads[{name!r}]" for name in self.names]
        leaves = structure.leaves if params is None else structure.collect(grads)
        arrays = [check(leaf, label) for label, leaf in zip(labels, leaves)]
        if writeable:
            _arrays.check_overlaps(zip(labels, arrays))
        beside = arrays if params is None else self.beside(structure.leaves, list(zip(labels, arrays)))
        make = ReferencePlan if _extension.core is None else _extension.core.Plan
        operands = [Operands()] * len(arrays)
        if unit_axes is not None:
            operands = [Operands(unit_axes=unit_axes(array.shape, name)) for name, array in zip(self.names, arrays)]
        self.plan: Any = make(beside, operands, [0] * len(arrays), [None])
        self.plan.bind(arrays)
        self.plan.set_group(0, clipping)

    def beside(self, leaves: list[Any], grads: list[tuple[str, Array]]) -> list[Array]:
        """Parameters that these gradients may be clipped by."""
        labels = [f"params[{name!r}]" for name in self.names]
        params = [_arrays.as_gradient(leaf, label) for label, leaf in zip(labels, leaves)]
        for param, (label, grad) in zip(params, grads):
            if grad.shape != param.shape:
                raise ValueError(f"{label}: expected shape {param.shape}, got {grad.shape}")
            real = storage.compute_dtype(param.dtype)
            if storage.compute_dtype(grad.dtype) != real:
                raise TypeError(f"{label}: expected a dtype computed in {real} as its parameter's, got {grad.dtype}")
        _arrays.check_overlaps(grads, zip(labels, params))
        return params

    def clip(self, **options: Any) -> Any:
        applied, grad_norm, _, bad = self.plan.measure(**options)
        if not applied:
            raise NonFiniteGradientError({self.names[i]: count for i, count in bad})
        self.plan.clip()
        return grad_norm


def global_norm(grads: Any) -> float:
    """The Euclidean norm of all gradients together.

    Summed in double in a fixed order: the same bits for any number of threads, CPU and memory layout. No finite input
    overflows on the way.

    Parameters
    ----------
    grads : array, or (nested) sequence or mapping of arrays
        Of float32, float64, float16 or bfloat16; unchanged.

    Returns
    -------
    float
        nan or inf if a gradient is.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> fs.global_norm([np.array([3.0]), np.array([[4.0]])])
    5.0
    """
    norm: float = Gradients(grads, writeable=False).plan.measure()[1]
    return norm


def clip_by_global_norm(grads: Any, max_norm: float) -> float:
    """Scale all gradients in place by ``min(1, max_norm / (norm + 1e-6))``, where norm is that of all of them together.

    Parameters
    ----------
    grads : array, or (nested) sequence or mapping of arrays
        Writeable; changed in place.
    max_norm : float
        Above 0.

    Returns
    -------
    float
        The norm before.

    Raises
    ------
    NonFiniteGradientError
        If a gradient holds inf or nan; nothing has changed then.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> g = np.array([3.0, 4.0], dtype=np.float32)
    >>> fs.clip_by_global_norm([g], 1.0)
    5.0
    >>> g
    array([0.5999999 , 0.79999983], dtype=float32)

    References
    ----------
    As ``torch.nn.utils.clip_grad_norm_``; Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
    networks" (2013).
    """
    max_norm = _hyper.above_0(max_norm, "max_norm")
    return float(Gradients(grads, writeable=True).clip(clip_norm=max_norm))


def clip_by_norm(grads: Any, max_norm: float) -> float:
    """Scale each gradient in place by ``min(1, max_norm / (norm + 1e-6))`` with its own norm.

    Parameters
    ----------
    grads : array, or (nested) sequence or mapping of arrays
        Writeable; changed in place.
    max_norm : float
        Above 0.

    Returns
    -------
    float
        The norm of all gradients together before.

    Raises
    ------
    NonFiniteGradientError
        If a gradient holds inf or nan; nothing has changed then.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> g = [np.array([3.0, 4.0]), np.array([0.5])]
    >>> _ = fs.clip_by_norm(g, 1.0)
    >>> g[1]
    array([0.5])
    """
    max_norm = _hyper.above_0(max_norm, "max_norm")
    return float(Gradients(grads, writeable=True, clip_norm_per_array=max_norm).clip())


def adaptive_grad_clip(
    grads: Any, params: Any, clipping: float, *, unit_axes: int | tuple[int, ...] | None = None, convention: str = "torch"
) -> float:
    """Scale the gradients of each unit in place by ``max_norm / max(norm, 1e-6)`` where they have a norm above `max_norm`.

    That is ``clipping * max(norm of the unit, 1e-3)``: what optimizers do with ``clip_adaptive``.

    Parameters
    ----------
    grads : array, or (nested) sequence or mapping of arrays
        Writeable; changed in place. Of the parameters' shapes; float64 where these are.
    params : same structure as `grads`
        Unchanged.
    clipping : float
        Above 0.
    unit_axes : int or tuple of int, optional
        The axes that count the units; see :class:`Optimizer`.
    convention : {"torch", "keras", "optax", "tf", "sklearn", "thinc"}
        Whose units to take by default.

    Returns
    -------
    float
        The norm of all gradients together before.

    Raises
    ------
    NonFiniteGradientError
        If a gradient holds inf or nan; nothing has changed then.
    TypeError, ValueError
        If an argument is not what it should be. Nothing has changed then.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([[3.0, 4.0], [0.0, 0.0]])
    >>> g = np.array([[0.25, 0.0], [0.25, 0.0]])
    >>> norm = fs.adaptive_grad_clip(g, w, 0.5)
    >>> g
    array([[0.25  , 0.    ],
           [0.0005, 0.    ]])

    References
    ----------
    Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization" (2021); as
    ``optax.adaptive_grad_clip``.
    """
    clipping = _hyper.above_0(clipping, "clipping")
    axes = _hyper.unit_axes(unit_axes, "unit_axes")
    _hyper.choice("convention", convention)

    def of_array(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        return stages.axes_of_units(shape, axes, convention, name=name)

    return float(Gradients(grads, writeable=True, params=params, unit_axes=of_array, clip_adaptive=clipping).clip())


def clip_by_value(grads: Any, max_value: float) -> None:
    """Bound each element of the gradients to ``[-max_value, max_value]`` in place; nan stays nan.

    Parameters
    ----------
    grads : array, or (nested) sequence or mapping of arrays
        Writeable; changed in place.
    max_value : float
        Above 0.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> g = np.array([3.0, -0.5, -np.inf])
    >>> fs.clip_by_value(g, 1.0)
    >>> g
    array([ 1. , -0.5, -1. ])
    """
    max_value = _hyper.above_0(max_value, "max_value")
    Gradients(grads, writeable=True, clip_value=max_value).clip(nonfinite="propagate")
