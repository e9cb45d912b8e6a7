"""The optimizers: one thin class for each rule, with its equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from . import _hyper, reference
from ._hyper import Hyper
from .optimizer import REQUIRED, Optimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


def conventions() -> dict[str, dict[str, dict[str, Any]]]:
    """Whose equations there are of each rule, with the defaults that differ from PyTorch's.

    Returns
    -------
    dict
        ``conventions()[rule][convention][hyper-parameter]``; what has no default there is said to be REQUIRED. README has a
        table of how the equations differ.

    Examples
    --------
    >>> import fusedstep as fs
    >>> fs.conventions()["RMSprop"]["keras"]
    {'lr': 0.001, 'alpha': 0.9, 'eps': 1e-07, 'decoupled_weight_decay': True}
    >>> list(fs.conventions()["AdamW"])
    ['torch', 'keras', 'optax']
    """
    return {name: {own: dict(values) for own, values in globals()[name]._conventions.items()} for name in __all__}


__all__ = ["LAMB", "LARS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RMSprop"]


class SGD(Optimizer):
    r"""Stochastic gradient descent, plain or with momentum.

    .. math::

        b_t &= \mu b_{t-1} + (1 - \tau) g_t \qquad (b_1 = g_1) \\
        p_t &= p_{t-1} - \gamma \, d_t

    with :math:`d = g` without momentum, :math:`d = b` with momentum and :math:`d = g + \mu b` with Nesterov momentum. With
    all examples in each gradient this is batch gradient descent, with some of them mini-batch, with one stochastic.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`, outside the velocity.
    momentum : float
        :math:`\mu`; 0 keeps no state, anything else the state ``momentum_buffer``.
    dampening : float
        :math:`\tau`; the first step does not dampen.
    nesterov : bool
        Needs momentum and no dampening.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([1.0, -2.0], dtype=np.float32)
    >>> opt = fs.SGD([w], lr=0.5, momentum=0.9)
    >>> opt.step([w.copy()]).step
    1
    >>> w
    array([ 0.5, -1. ], dtype=float32)

    References
    ----------
    As ``torch.optim.SGD``; Polyak (1964); Sutskever et al., "On the importance of initialization and momentum in deep
    learning" (2013).
    """

    _rule = staticmethod(reference.sgd)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-2, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED},
        "tf": {"lr": 1e-2},
        "sklearn": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "thinc": {"lr": REQUIRED, "clip_norm_per_array": 1.0, "decay_mode": "decoupled_after"},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        momentum: Hyper = 0.0,
        dampening: Hyper = 0.0,
        nesterov: bool = False,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        _hyper.check_only("dampening", values, 0, "torch")
        _hyper.check_only("momentum", values, 0, "torch", "keras", "optax", "tf", "sklearn")
        if values["nesterov"] and not (values["momentum"] > 0 and values["dampening"] == 0):
            raise ValueError("nesterov: expected momentum > 0 and dampening = 0 with it, got "
                             f"momentum={values['momentum']}, dampening={values['dampening']}")  # fmt: skip

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if hyper["momentum"] != 0 else ()

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        if not states:
            return "sgd"
        return "sgd_nesterov" if hyper["nesterov"] else "sgd_momentum"


class Adagrad(Optimizer):
    r"""Adagrad: steps shrink with the sum of squared gradients, element by element.

    .. math::

        s_t &= s_{t-1} + g_t^2 \\
        p_t &= p_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{s_t} + \epsilon}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    lr_decay : float
        :math:`\eta`.
    initial_accumulator_value : float
        What the state ``sum`` starts with.
    eps : float
        :math:`\epsilon`, outside the root.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([1.0, -2.0])
    >>> opt = fs.Adagrad([w], lr=0.5)
    >>> _ = opt.step([np.array([3.0, -1.0])])
    >>> w
    array([ 0.5, -1.5])

    References
    ----------
    As ``torch.optim.Adagrad``; Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization" (2011).
    """

    _rule = staticmethod(reference.adagrad)
    _non_negative_states = ("sum",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "initial_accumulator_value": 0.1, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED, "initial_accumulator_value": 0.1, "eps": 1e-7},
        "tf": {"lr": 1e-3, "initial_accumulator_value": 0.1, "eps": 1e-7},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        lr_decay: Hyper = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: Hyper = 1e-10,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps)
        super().__init__(params, hyper, options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        _hyper.check_only("lr_decay", values, 0, "torch")

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float:
        return float(hyper["initial_accumulator_value"])


class Adadelta(Optimizer):
    r"""Adadelta: steps scaled by the ratio of the running sizes of past steps and gradients.

    .. math::

        v_t &= \rho v_{t-1} + (1 - \rho) g_t^2 \\
        \Delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t \\
        u_t &= \rho u_{t-1} + (1 - \rho) \Delta_t^2 \\
        p_t &= p_{t-1} - \gamma \Delta_t

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        :math:`\gamma`; 1 in the paper and in PyTorch, 0.001 in Keras.
    rho : float
        :math:`\rho`, of the states ``square_avg`` (:math:`v`) and ``acc_delta`` (:math:`u`).
    eps : float
        :math:`\epsilon`, inside both roots.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Adadelta([w], eps=1.0, rho=0.0)
    >>> _ = opt.step([np.array([0.0, 1e9])])
    >>> w
    array([ 0., -1.])

    References
    ----------
    As ``torch.optim.Adadelta``; Zeiler, "ADADELTA: An Adaptive Learning Rate Method" (2012).
    """

    _rule = staticmethod(reference.adadelta)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {},
        "tf": {"lr": 1e-3, "rho": 0.95, "eps": 1e-7},
    }
    _non_negative_states = ("square_avg", "acc_delta")

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1.0,
        *,
        rho: Hyper = 0.9,
        eps: Hyper = 1e-6,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, rho=rho, eps=eps), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")


class RMSprop(Optimizer):
    r"""RMSprop: gradients divided by the root of their running mean square.

    .. math::

        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        m_t &= m_{t-1} + (1 - \alpha) (g_t - m_{t-1}) \qquad \text{(centered)} \\
        d_t &= \frac{g_t}{\sqrt{v_t} + \epsilon} \quad \text{or, centered,} \quad
               \frac{g_t}{\sqrt{\max(v_t - m_t^2, 0)} + \epsilon} \\
        b_t &= \mu b_{t-1} + d_t \qquad \text{(momentum)} \\
        p_t &= p_{t-1} - \gamma d_t \quad \text{or} \quad p_{t-1} - \gamma b_t

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`, outside the momentum buffer.
    alpha : float
        :math:`\alpha`, of the states ``square_avg`` and, centered, ``grad_avg``.
    eps : float
        :math:`\epsilon`, outside the root.
    momentum : float
        :math:`\mu`; with the state ``momentum_buffer`` unless 0.
    centered : bool
        Divide by the running standard deviation instead.

    Notes
    -----
    A variance :math:`v - m^2` that rounding makes negative, where PyTorch gives nan, counts as 0. The step is then as large
    as `eps` allows: choose `eps` not too small with ``centered=True``.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.RMSprop([w], lr=0.5, alpha=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w
    array([-0.5       ,  0.49999995])

    References
    ----------
    As ``torch.optim.RMSprop``; Tieleman and Hinton, lecture 6.5 (2012); centered: Graves, "Generating Sequences With
    Recurrent Neural Networks" (2013).
    """

    _rule = staticmethod(reference.rmsprop)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED, "alpha": 0.9},
        "tf": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7},
    }
    _non_negative_states = ("square_avg",)

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        alpha: Hyper = 0.99,
        eps: Hyper = 1e-8,
        momentum: Hyper = 0.0,
        centered: bool = False,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered), options)

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # Their difference, the variance, may be much smaller than they are.
        return ("square_avg", "grad_avg") if hyper["centered"] else ()

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if hyper["centered"] else ()
        momentum = ("momentum_buffer",) if hyper["momentum"] != 0 else ()
        return ("square_avg", *centered, *momentum)

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        centered = "_centered" if "grad_avg" in states else ""
        momentum = "_momentum" if "momentum_buffer" in states else ""
        return "rmsprop" + centered + momentum


class Adam(Optimizer):
    r"""Adam, and AMSGrad.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t}
               \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    AMSGrad divides by the root of the largest :math:`v` so far.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).
    eps : float
        :math:`\epsilon`, outside the corrected root.
    amsgrad : bool
        AMSGrad, with the further state ``max_exp_avg_sq``: the maximum of the uncorrected :math:`v`.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Adam([w], lr=0.5, eps=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w
    array([-0.5,  0.5])

    References
    ----------
    As ``torch.optim.Adam``; Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015); Reddi, Kale and Kumar, "On
    the Convergence of Adam and Beyond" (2018).
    """

    _rule = staticmethod(reference.adam)
    _non_negative_states = ("exp_avg_sq", "max_exp_avg_sq")
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED},
        "tf": {"eps": 1e-7},
        "sklearn": {},
        "thinc": {"clip_norm_per_array": 1.0, "decay_mode": "decoupled_after"},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        amsgrad: bool = False,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, amsgrad=amsgrad), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        _hyper.check_only("amsgrad", values, False, "torch", "keras", "optax", "tf")

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if hyper["amsgrad"] else ()))

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        return "adam_amsgrad" if "max_exp_avg_sq" in states else "adam"


class AdamW(Adam):
    r"""Adam with decoupled weight decay: :math:`p \leftarrow (1 - \gamma \lambda) p` before each update.

    The parameters are those of :class:`Adam`; ``weight_decay`` is 0.01 and ``decoupled_weight_decay`` True unless given.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(2)
    >>> opt = fs.AdamW({"w": w}, lr=0.5, weight_decay=0.25)
    >>> _ = opt.step({"w": np.zeros(2)})
    >>> w
    array([0.875, 0.875])

    References
    ----------
    As ``torch.optim.AdamW``; Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """

    _rule = staticmethod(reference.adamw)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"weight_decay": 4e-3, "eps": 1e-7},
        "optax": {"lr": REQUIRED, "weight_decay": 1e-4},
    }
    _option_defaults: ClassVar[dict[str, Any]] = {"weight_decay": 1e-2, "decoupled_weight_decay": True}


class NAdam(Optimizer):
    r"""NAdam: Adam with Nesterov's momentum, which grows over time.

    .. math::

        \mu_t &= \beta_1 \left(1 - \tfrac{1}{2} 0.96^{t \psi}\right) \\
        p_t &= p_{t-1} - \gamma \left(\frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i} g_t +
               \frac{\mu_{t+1}}{1 - \prod_{i \le t + 1} \mu_i} m_t\right) \Big/
               \left(\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon\right)

    with :math:`m` and :math:`v` as in :class:`Adam`.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).
    eps : float
        :math:`\epsilon`, outside the corrected root.
    momentum_decay : float
        :math:`\psi`; 0.004 in PyTorch, 1 in Keras.

    Notes
    -----
    The product is that of the present :math:`\beta_1` for all steps so far. optax has :math:`\beta_1` in place of
    :math:`\mu_t`.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.NAdam([w], lr=0.5, betas=(0.0, 0.0), eps=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w
    array([-0.5,  0.5])

    References
    ----------
    As ``torch.optim.NAdam``; Dozat, "Incorporating Nesterov Momentum into Adam" (2016).
    """

    _rule = staticmethod(reference.nadam)
    _non_negative_states = ("exp_avg_sq",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "eps": 1e-7, "momentum_decay": 1.0, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED},
        "tf": {"lr": 1e-3, "eps": 1e-7},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 2e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        momentum_decay: Hyper = 4e-3,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, momentum_decay=momentum_decay), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class LAMB(Optimizer):
    r"""LAMB: steps in Adam's direction, as long as the array is times the learning rate; for large batches.

    .. math::

        d_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \gamma \frac{\|p_{t-1}\|}{\|d_t\|} d_t

    with :math:`m` and :math:`v` as in :class:`Adam`; the ratio is 1 where either norm is 0.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. Each array has its own ratio.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).
    eps : float
        :math:`\epsilon`, outside the corrected root.

    Notes
    -----
    ``weight_decay``, :math:`\lambda`, is part of the direction unless it is decoupled (as in Keras). A step reads
    everything twice. Gradients are not clipped unless you say so (apex does, to a norm of 1).

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([3.0, -4.0])
    >>> opt = fs.LAMB([w], lr=0.2, eps=0.0)
    >>> _ = opt.step([np.array([0.1, 0.1])])
    >>> w
    array([ 2.29289322, -4.70710678])

    References
    ----------
    As ``optax.lamb``; You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020).
    """

    _rule = staticmethod(reference.lamb)
    _non_negative_states = ("exp_avg_sq",)
    _is_scaled = True
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-6,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class LARS(Optimizer):
    r"""LARS: momentum with steps as long as the array is times the learning rate; for large batches.

    .. math::

        d_t &= g_t + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + \gamma \frac{\tau \|p_{t-1}\|}{\|d_t\| + \epsilon} d_t \\
        p_t &= p_{t-1} - b_t

    The ratio is 1 where either norm is 0.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. Each array has its own ratio.
    lr : float
        Learning rate :math:`\gamma`, inside the state ``momentum_buffer``.
    momentum : float
        :math:`\mu`.
    nesterov : bool
        Step by :math:`\mu b_t` and the last summand of :math:`b_t`.
    trust_coefficient : float
        :math:`\tau`.
    eps : float
        :math:`\epsilon`, beside the norm of the direction.

    Notes
    -----
    ``weight_decay``, :math:`\lambda`, is part of the direction unless it is decoupled. A step reads everything twice.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([3.0, -4.0])
    >>> opt = fs.LARS([w], lr=1.0, trust_coefficient=0.2)
    >>> _ = opt.step([np.array([0.0, 8.0])])
    >>> w
    array([ 3., -5.])

    References
    ----------
    As ``optax.lars``; You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017).
    """

    _rule = staticmethod(reference.lars)
    _is_scaled = True
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1.0,
        *,
        momentum: Hyper = 0.9,
        nesterov: bool = False,
        trust_coefficient: Hyper = 1e-3,
        eps: Hyper = 0.0,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, momentum=momentum, nesterov=nesterov, trust_coefficient=trust_coefficient, eps=eps)
        super().__init__(params, hyper, options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        return "lars_nesterov" if hyper["nesterov"] else "lars"
