"""Norms and clipping of gradients by themselves, for loops that keep their own step."""

from __future__ import annotations

from typing import Any

from . import _arrays, _backends, _hyper
from .errors import NonFiniteGradientError
from .state import Operands


class Gradients:
    """Named gradient arrays, bound to a plan without a rule."""

    def __init__(self, grads: Any, *, writeable: bool, **clipping: float) -> None:
        structure = _arrays.Structure(grads)
        self.names = structure.names
        check = _arrays.as_writeable if writeable else _arrays.as_gradient
        labels = [f"grads[{name!r}]" for name in self.names]
        arrays = [check(leaf, label) for label, leaf in zip(labels, structure.leaves)]
        if writeable:
            _arrays.check_overlaps(zip(labels, arrays))
        make = _backends.ReferencePlan if _backends.core is None else _backends.core.Plan
        self.plan: Any = make(arrays, [Operands()] * len(arrays), [0] * len(arrays), [None])
        self.plan.bind(arrays)
        self.plan.set_group(0, clipping)

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
