"""Loss scaling, for gradients that would vanish or overflow in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _hyper
from .optimizer import Optimizer, StepReport
from .wrappers import Wrapper

# What `Optimizer.step` takes as grad_scale.
SMALLEST, LARGEST = 2.0**-120, 2.0**120


class DynamicLossScaler:
    """A loss scale that grows as long as gradients stay finite, and shrinks when they do not.

    Multiply the loss by :attr:`scale` before going backward, and take steps through :meth:`step`: it divides the gradients
    by the scale again, skips the step if any is inf or nan, and then changes the scale.

    Parameters
    ----------
    init_scale : float
        The first scale. Powers of two cost no precision.
    growth_factor : float
        What the scale is multiplied by after `growth_interval` steps in a row without inf or nan; more than 1.
    backoff_factor : float
        What it is multiplied by after a skipped step; less than 1.
    growth_interval : int
        As above.

    Attributes
    ----------
    scale : float
        The present scale.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(2, np.float16)
    >>> opt, scaler = fs.SGD(w, lr=0.5, nonfinite="skip"), fs.DynamicLossScaler(init_scale=1024.0)
    >>> scaler.step(opt, np.array([0.25, 0.5], np.float16) * np.float16(scaler.scale)).applied
    True
    >>> w
    array([0.875, 0.75 ], dtype=float16)
    >>> scaler.step(opt, np.array([np.inf, 0], np.float16)).applied, scaler.scale
    (False, 512.0)

    References
    ----------
    As ``torch.amp.GradScaler``; Keras' ``LossScaleOptimizer`` has the same rule and starts at 2**15. Micikevicius et al.,
    "Mixed Precision Training" (2018).
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = _hyper.grad_scale(init_scale, "init_scale")
        self.growth_factor = _hyper.number(growth_factor, "growth_factor", "a finite number > 1", lambda x: x > 1)
        self.backoff_factor = _hyper.number(backoff_factor, "backoff_factor", "a number in (0, 1)", lambda x: 0 < x < 1)
        self.growth_interval = _hyper.whole_number(growth_interval, "growth_interval", 1)
        self._good_steps = 0  # since the scale last changed

    def step(
        self, opt: Optimizer | Wrapper, grads: Any = None, *, grad_scale: float = 1.0, zero_grads: bool = False
    ) -> StepReport:
        """Take a step with gradients of the scaled loss, and change the scale.

        Parameters
        ----------
        opt : Optimizer, Lookahead or SAM
            With ``nonfinite="skip"``.
        grads, zero_grads
            As its ``step`` takes them.
        grad_scale : float
            Gradients are divided by this, too.

        Raises
        ------
        TypeError, ValueError
            If it is no optimizer, or one with another policy. Nothing has changed then, as with all errors of
            :meth:`Optimizer.step`.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.zeros(2)
        >>> opt, scaler = fs.SGD(w, lr=1.0, nonfinite="skip"), fs.DynamicLossScaler(8.0, growth_interval=1)
        >>> scaler.step(opt, scaler.scale * np.array([3.0, 4.0])).grad_norm
        5.0
        >>> w, scaler.scale
        (array([-3., -4.]), 16.0)
        """
        if not isinstance(opt, (Optimizer, Wrapper)):
            raise TypeError(f"opt: expected an optimizer, got {type(opt).__name__}")
        if opt.nonfinite != "skip":
            raise ValueError(f"opt: expected an optimizer with nonfinite='skip', got {opt.nonfinite!r}")
        grad_scale = _hyper.grad_scale(grad_scale, "grad_scale")
        report = opt.step(grads, grad_scale=self.scale * grad_scale, zero_grads=zero_grads)
        if not report.applied:
            self.scale = max(SMALLEST, self.scale * self.backoff_factor)
            self._good_steps = 0
        elif self._good_steps + 1 >= self.growth_interval:
            self.scale = min(LARGEST, self.scale * self.growth_factor)
            self._good_steps = 0
        else:
            self._good_steps += 1
        return report

    def __repr__(self) -> str:
        return f"DynamicLossScaler(scale={self.scale}, {self._good_steps} of {self.growth_interval} good steps)"

    def state_dict(self) -> dict[str, float]:
        """What is needed to go on later."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"scale", "good_steps"}:
            raise ValueError(f"state_dict: expected a mapping with scale and good_steps, got {state_dict!r}")
        scale, good_steps = state_dict["scale"], state_dict["good_steps"]
        scale = _hyper.grad_scale(scale, "state_dict['scale']")
        good_steps = _hyper.whole_number(good_steps, "state_dict['good_steps']", 0, self.growth_interval - 1)
        self.scale, self._good_steps = scale, good_steps
