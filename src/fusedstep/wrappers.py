"""What goes around an optimizer of any rule: more than one set of parameters, or more than one gradient for a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _extension, _hyper, state
from ._arrays import Change, assign
from .clipping import global_norm
from .optimizer import Optimizer, StepReport
from .reference import stages, storage

Array = NDArray[Any]


@dataclass(frozen=True)
class SlowDecay:
    """The `ema_decay` that makes averages slow weights: they move every k steps, and stay as they are in between."""

    k: int
    alpha: float

    def __call__(self, steps: int) -> float:
        return 1.0 if (steps + 1) % self.k else 1.0 - self.alpha


class Wrapper:
    """Base of what goes around an optimizer and has another :meth:`step`; all else is done with the optimizer, ``opt``."""

    opt: Optimizer | Wrapper
    step: Callable[..., StepReport]

    @property
    def steps(self) -> int:
        """Number of steps applied."""
        return self.opt.steps

    @property
    def nonfinite(self) -> str:
        """What the optimizer does about inf and nan in gradients."""
        return self.opt.nonfinite

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer: a wrapper has no state but what is in there."""
        return self._settled().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Go on from a :meth:`state_dict`; see :meth:`Optimizer.load_state_dict`."""
        self._settled().load_state_dict(state_dict, strict)

    def _settled(self) -> Optimizer:
        """The optimizer itself, with nothing left to do that an interrupt has put off."""
        return settled(self.opt)


def settled(opt: Optimizer | Wrapper) -> Optimizer:
    return opt._settled() if isinstance(opt, Wrapper) else opt


class Lookahead(Wrapper):
    r"""Lookahead: every `k` steps, parameters go back towards where they were `k` steps ago.

    .. math::

        \phi_t &= \phi_{t-1} + \alpha (\theta_t - \phi_{t-1}) \\
        \theta_t &= \phi_t

    in the steps :math:`t = k, 2k, \ldots` of the optimizer; in between only the fast weights :math:`\theta`, which are the
    parameters, change.

    Parameters
    ----------
    opt : Optimizer
        Of any rule, without `ema_decay`: the slow weights :math:`\phi` are its averages, ``opt.averages``, and a schedule of
        `ema_decay` moves them. They are kept in the type parameters are computed in, saved and loaded with its state, and
        ``with opt.averaged():`` has them in the arrays. Everything but :meth:`step` is done with `opt` as without Lookahead.
    k : int
        Applied steps between two moves; those that are skipped do not count.
    alpha : float
        :math:`\alpha` in (0, 1].

    Notes
    -----
    A step and the exchange after it are each whole or not begun. Should an interrupt come between them, then ``steps``
    counts the step, and the exchange comes first thing in the next, in :meth:`state_dict`, or in :func:`fusedstep.save` of
    the Lookahead.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Lookahead(fs.SGD({"w": w}, lr=1.0), k=3, alpha=0.5)
    >>> for _ in range(4):
    ...     report = opt.step({"w": np.array([-1.0, 2.0])})
    ...     print(w)
    [ 1. -2.]
    [ 2. -4.]
    [ 1.5 -3. ]
    [ 2.5 -5. ]
    >>> opt.opt.averages["w"]
    array([ 1.5, -3. ])

    References
    ----------
    As ``optax.lookahead`` without ``reset_state``; Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (2019).
    """

    def __init__(self, opt: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"opt: expected an optimizer, got {type(opt).__name__}")
        k = _hyper.whole_number(k, "k", 1)
        alpha = _hyper.number(alpha, "alpha", "a number in (0, 1]", lambda x: 0 < x <= 1)
        for group in opt.param_groups:
            if group["ema_decay"] is not None:
                raise ValueError(f"opt: expected an optimizer without ema_decay, got one with {group['ema_decay']!r}")
        self.opt: Optimizer = opt
        self._decay = SlowDecay(k, alpha)
        self._exchange_at: int | None = None  # the number of steps after which slow weights become the parameters
        self._lock = _extension.make_lock()
        with opt._lock:
            groups = [{**group, "ema_decay": self._decay} for group in opt.param_groups]
            opt._prepare_plan(opt._resolve(groups, opt.steps), opt.steps)
            assign([(group, "ema_decay", self._decay) for group in opt.param_groups])

    @property
    def k(self) -> int:
        """Applied steps between two moves."""
        return self._decay.k

    @property
    def alpha(self) -> float:
        """How much of the way to the parameters the slow weights move."""
        return self._decay.alpha

    def step(self, grads: Any = None, *, grad_scale: float = 1.0, zero_grads: bool = False) -> StepReport:
        """Update the parameters in place: :meth:`Optimizer.step`, and if it is due the exchange with the slow weights.

        Parameters
        ----------
        grads, grad_scale, zero_grads
            As for :meth:`Optimizer.step`.

        Returns
        -------
        StepReport
            That of the optimizer.

        Raises
        ------
        NonFiniteGradientError, TypeError, ValueError
            As :meth:`Optimizer.step` does. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.zeros(1)
        >>> opt = fs.Lookahead(fs.SGD(w, lr=1.0), k=2, alpha=0.5)
        >>> for _ in range(2):
        ...     _ = opt.step(np.array([-1.0]))
        ...     print(w)
        [1.]
        [1.]
        """
        with self._lock:
            self._exchange_if_due()
            next_step = self.opt.steps + 1
            self._exchange_at = None if next_step % self.k else next_step
            try:
                report = self.opt.step(grads, grad_scale=grad_scale, zero_grads=zero_grads)
            finally:
                if self.opt.steps != next_step:
                    self._exchange_at = None
            self._exchange_if_due()
        return report

    def _settled(self) -> Optimizer:
        with self._lock:
            self._exchange_if_due()
        return self.opt

    def _exchange_if_due(self) -> None:
        opt = self.opt
        if opt.steps != self._exchange_at:
            return
        with opt._lock:
            opt._check_writeable(False)
            changes: list[Change] = [(self.__dict__, "_exchange_at", None)]
            for name, param, part in zip(opt._params.names, opt._params.arrays, opt._part_of):
                own = state.operands_of(opt._kernels[part], opt.state[name], param, opt.low_precision)
                slow, residual = own.average, own.residual
                if slow is None:
                    continue  # ema_decay was edited to be None: this group has none any more
                if not state.is_low_precision(param):
                    changes.append((param, ..., slow))
                    continue
                rounded, rest = param.copy(), None if residual is None else residual.copy()
                storage.part(slow, rounded, own.low_precision, rest, None)
                changes += [(param, ..., rounded), *([] if residual is None else [(residual, ..., rest)])]
            assign(changes)

    def __repr__(self) -> str:
        return f"Lookahead({self.opt!r}, k={self.k}, alpha={self.alpha})"


class SAM(Wrapper):
    r"""Sharpness-aware minimisation: steps with the gradient from nearby, where the loss is larger.

    .. math::

        \hat{p} = p + \rho \frac{g(p)}{\lVert g(p) \rVert} \quad \text{or, adaptive,} \quad
        \hat{p} = p + \rho \frac{|p|^2 g(p)}{\lVert |p| g(p) \rVert}

    and then a step of the optimizer from :math:`p` with :math:`g(\hat{p})`. Norms are of all arrays together.

    Parameters
    ----------
    opt : Optimizer or Lookahead
        Of any rule. Everything but :meth:`step` is done with it as without SAM.
    rho : float
        :math:`\rho`, how far away; ten times as much or more if adaptive.
    adaptive : bool
        Distances relative to the size of each parameter (ASAM, with its normalisation by element and no :math:`\eta`).

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([3.0, 4.0])
    >>> sam = fs.SAM(fs.SGD(w, lr=0.5), rho=0.5)
    >>> sam.step(lambda: w.copy()).applied                              # the gradient of half the square of w
    True
    >>> w                                                               # the second was at [3.3, 4.4]
    array([1.35, 1.8 ])

    References
    ----------
    As ``optax.contrib.sam`` with a normalised ``optax.sgd(rho)``; Foret et al., "Sharpness-Aware Minimization for
    Efficiently Improving Generalization" (2021); Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization" (2021).
    """

    def __init__(self, opt: Optimizer | Lookahead, rho: float = 0.05, adaptive: bool = False) -> None:
        if not isinstance(opt, (Optimizer, Lookahead)):
            raise TypeError(f"opt: expected an optimizer, got {type(opt).__name__}")
        self.opt = opt
        self.rho = _hyper.at_least_0(rho, "rho")
        self.adaptive = _hyper.boolean(adaptive, "adaptive")

    def step(self, closure: Callable[[], Any], *, grad_scale: float = 1.0, zero_grads: bool = False) -> StepReport:
        """Update the parameters in place.

        Parameters
        ----------
        closure : callable
            ``() -> gradients`` at the values that the parameters' arrays then hold, as :meth:`Optimizer.step` takes them;
            both times of the same examples. It is called twice, the second time with the arrays changed: no steps, and no
            saving, until it returns. However it ends, they are then what they were, bit for bit.
        grad_scale, zero_grads
            As for :meth:`Optimizer.step`.

        Returns
        -------
        StepReport
            Of the second gradients; or of the first, if the step was skipped for them.

        Raises
        ------
        NonFiniteGradientError
            If a gradient of one or the other call holds inf or nan and the optimizer has ``nonfinite="raise"``.
        TypeError, ValueError
            If a gradient is not what it should be. Nothing has changed then.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0])
        >>> opt = fs.SAM(fs.SGD(w, lr=0.25), rho=0.5)
        >>> opt.step(lambda: 2 * w).grad_norm    # of w**2, at 1.5
        3.0
        >>> w
        array([0.25])
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a callable that returns gradients, got {closure!r}")
        opt = self._settled()
        grads = self._gradients(closure)
        restore = None
        try:
            with opt._lock:
                perturbed = self._perturbed(opt, grads)
                if perturbed is not None:
                    show, restore = opt._showing("others (within the closure of SAM.step)", perturbed)
                    show()
            if restore is not None:
                grads = self._gradients(closure)
        finally:
            if restore is not None and opt._shown is not None:
                restore()
        return self.opt.step(grads, grad_scale=grad_scale, zero_grads=zero_grads)

    @staticmethod
    def _gradients(closure: Callable[[], Any]) -> Any:
        grads = closure()
        if grads is None:  # which stands for those that are bound
            raise TypeError("closure: expected one that returns gradients, got None from it")
        return grads

    def _perturbed(self, opt: Optimizer, grads: Any) -> list[tuple[Array, Array]] | None:
        """The parameters with their values nearby; None if the optimizer would not go there, for inf or nan."""
        zero = opt.nonfinite == "zero"
        gradients = [
            stages.load_gradient(grad, storage.compute_dtype(param.dtype), zero_nonfinite=zero).reshape(param.shape)
            for grad, param in zip(opt._params.as_gradients(opt._params.collected(grads)), opt._params.arrays)
        ]
        if opt.nonfinite in ("raise", "skip") and not all(np.isfinite(g).all() for g in gradients):
            return None
        with np.errstate(all="ignore"):
            exact = [param.astype(g.dtype) for param, g in zip(opt._params.arrays, gradients)]
            if self.adaptive:
                for g, p in zip(gradients, exact):
                    g *= np.abs(p)
            norm = global_norm(gradients)
            for g, p, group in zip(gradients, exact, opt._params.group_of):
                if norm == 0:
                    break
                g /= norm
                g *= -self.rho if opt.param_groups[group]["maximize"] else self.rho
                if self.adaptive:
                    g *= np.abs(p)
                p += g
            return [(param, p.astype(param.dtype)) for param, p in zip(opt._params.arrays, exact)]

    def __repr__(self) -> str:
        return f"SAM({self.opt!r}, rho={self.rho}, adaptive={self.adaptive})"
