"""The optimizers: one thin class for each rule, with its equations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import _hyper, reference
from ._hyper import Hyper
from .optimizer import REQUIRED, Array, Optimizer, Part

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


__all__ = [
    "ASGD",
    "FTRL",
    "LAMB",
    "LARS",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "Lion",
    "Muon",
    "NAdam",
    "NovoGrad",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Signum",
    "Yogi",
]


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


class Adafactor(Optimizer):
    r"""Adafactor: of a matrix's variance only the means of rows and columns are kept, whose product stands for it.

    .. math::

        \beta_t &= 1 - t^\tau \\
        r_t &= \beta_t r_{t-1} + (1 - \beta_t) \, \text{mean of the rows of } g_t^2, \qquad
        c_t \text{ likewise of the columns} \\
        v_t &= r_t c_t / \max(\text{mean of } r_t, \epsilon_1) \\
        u_t &= g_t / \max(\sqrt{v_t}, \epsilon_1) \\
        p_t &= (1 - \gamma \lambda) p_{t-1} -
               \frac{\max(\epsilon_2, \text{rms}(p_{t-1})) \min(\gamma, 1 / \sqrt{t})}{\max(1, \text{rms}(u_t) / d)} u_t

    The last two axes are matrices. Arrays of less than two dimensions, and of small matrices if so asked, keep all of
    :math:`v`, with :math:`v_t = \beta_t v_{t-1} + (1 - \beta_t) g_t^2`.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        :math:`\gamma`: relative to the root mean square of the parameter, and a limit of what else falls with the steps. In
        "optax" the latter does not fall: there is :math:`\gamma` in place of the minimum.
    beta2_decay : float
        :math:`\tau`, at most 0, of the states ``row_var`` (:math:`r`, of shape ``(..., rows, 1)``) and ``col_var``
        (:math:`c`, ``(..., 1, columns)``), or of ``variance``.
    eps : pair of float
        :math:`\epsilon_1`, None for the machine epsilon of the type it is computed in; and :math:`\epsilon_2`. In "keras"
        and "optax", :math:`\epsilon_1` is added to the squares of gradients and nowhere else.
    d : float
        Limits the root mean square of what is made of a gradient.
    min_dim_size_to_factor : int
        Matrices with fewer rows or columns keep all of :math:`v`. State of the other kind that a change of it calls for
        starts from 0. In "optax" it is the two largest axes that make matrices: arrays that have them elsewhere than last
        are refused, since views of them may have them there.

    Notes
    -----
    ``weight_decay``, :math:`\lambda`, is decoupled unless another kind is asked for, and in "optax" not multiplied by the
    learning rate. State of a matrix, ``rows + columns`` elements, is in the compute type whatever `state_dtype` is. A step
    reads gradients three times, and parameters twice.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones((2, 3))
    >>> opt = fs.Adafactor({"w": w}, lr=0.5)
    >>> _ = opt.step({"w": np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])})
    >>> w
    array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]])
    >>> opt.state["w"]["row_var"].shape, opt.nbytes
    ((2, 1), {'row_var': 16, 'col_var': 24})

    References
    ----------
    As ``torch.optim.Adafactor``; Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018).
    """

    _rule = staticmethod(reference.adafactor)
    _is_scaled = True
    _has_others = True
    _deciding = ("min_dim_size_to_factor",)
    _non_negative_states = ("variance",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "eps": (1e-30, 1e-3), "decoupled_weight_decay": True},
        "optax": {"lr": 1.0, "eps": (1e-30, 1e-3), "min_dim_size_to_factor": 128},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        beta2_decay: Hyper = -0.8,
        eps: tuple[Hyper | None, Hyper] = (None, 1e-3),
        d: Hyper = 1.0,
        min_dim_size_to_factor: int = 0,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, min_dim_size_to_factor=min_dim_size_to_factor)
        super().__init__(params, hyper, options)

    @staticmethod
    def _is_own(param: Array, hyper: Mapping[str, Any], label: str = "param") -> bool:
        shape = param.shape
        axes: Sequence[int] = range(len(shape))
        if hyper["convention"] == "optax":
            axes = sorted(axes, key=shape.__getitem__)
        is_own = len(shape) >= 2 and min(shape[axes[-2]], shape[axes[-1]]) >= hyper["min_dim_size_to_factor"]
        if is_own and min(axes[-2:]) < len(shape) - 2:
            raise ValueError(
                f"{label}: expected a view with the two largest axes last, of which optax makes rows and columns, "
                f"got shape {shape}"
            )
        return is_own

    @classmethod
    def _others(cls, hyper: Mapping[str, Any]) -> Part:
        return Part(cls, {**hyper, "factored": False})

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("row_var", "col_var") if hyper.get("factored", True) else ("variance",)

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # There is nothing to save.
        return ("row_var", "col_var")

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        return "adafactor" if states == ("row_var", "col_var") else "adafactor_of_vectors"


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
    eps_root : float, optional
        Added to the corrected :math:`v`, inside the root; only in "optax".
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
        eps_root: Hyper | None = None,
        amsgrad: bool = False,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root, amsgrad=amsgrad), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if hyper["amsgrad"] else ()))

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        return "adam_amsgrad" if "max_exp_avg_sq" in states else "adam"


class AdamW(Adam):
    r"""Adam with decoupled weight decay: :math:`p \leftarrow (1 - \gamma \lambda) p` before each update.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma \lambda) p_{t-1} - \frac{\gamma}{1 - \beta_1^t} \,
               \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Parameters
    ----------
    lr, betas, eps, amsgrad, eps_root
        As :class:`Adam` has them.
    weight_decay : float
        :math:`\lambda`, decoupled unless another `decay_mode` is given.

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


class Muon(Optimizer):
    r"""Muon: momentum of matrices with all singular values made about equal; :class:`AdamW` for all other arrays.

    .. math::

        b_t &= b_{t-1} + (1 - \mu) (g_t - b_{t-1}) \\
        d_t &= b_t \quad \text{or, Nesterov,} \quad g_t + \mu (b_t - g_t) \\
        x_0 &= d_t / \max(\lVert d_t \rVert, \epsilon) \\
        x_{i+1} &= a x_i + (b \, x_i x_i^T + c \, (x_i x_i^T)^2) x_i \\
        p_t &= (1 - \gamma \lambda) p_{t-1} - \gamma \sqrt{\max(1, \text{rows} / \text{columns})} \, x_k

    Newton and Schulz's iteration takes the smaller of :math:`x x^T` and :math:`x^T x`. In "keras"
    :math:`b_t = \mu b_{t-1} + g_t` and, Nesterov, :math:`d_t = g_t + \mu b_t`; in "optax" averages are corrected:
    :math:`d_t = b_t / (1 - \mu^t)` or :math:`\mu b_t / (1 - \mu^{t+1}) + (1 - \mu) g_t / (1 - \mu^t)`. Both divide by
    :math:`\lVert d_t \rVert + \epsilon`.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. Arrays of two dimensions are matrices; embeddings and the
        last layer are better left to another optimizer. ``weight_decay`` is 0.1 and ``decoupled_weight_decay`` True unless
        given.
    lr : float
        Learning rate :math:`\gamma`.
    momentum : float
        :math:`\mu` in [0, 1), of the state ``momentum_buffer``.
    nesterov : bool
        As above.
    ns_coefficients : three floats
        :math:`a, b, c`.
    ns_steps : int
        :math:`k`, at most 99.
    eps : float
        :math:`\epsilon`.
    adjust_lr_fn : {None, "original", "match_rms_adamw"}
        The factor of the step: None and "original" as above, but in "optax", where inputs come first, with columns / rows;
        or :math:`0.2 \sqrt{\max(\text{rows}, \text{columns})}`, with which learning rates are about those of AdamW. Keras
        has only the latter here, its ``rms_rate=0.2``; optax calls it ``consistent_rms=0.2``.
    adamw_lr_ratio : float
        The learning rate of other arrays is as many times `lr`.
    adamw_betas, adamw_eps, adamw_weight_decay
        ``betas``, ``eps`` and ``weight_decay`` of other arrays; they have the states of AdamW.

    Notes
    -----
    In "keras" decoupled decay of other arrays is by `lr`, without their ratio. In "optax" other arrays know `nesterov`, too:
    then they have the steps of :class:`NAdam`, with this decay. There are no other kinds of preconditioning there, nor
    coefficients for each iteration.

    PyTorch rounds matrices to bfloat16 for the iteration; here it is done in the type parameters are computed in, with
    NumPy's products by both backends. Their bits are the same on one machine, for one BLAS and its number of threads, and
    not promised beyond: they are the one thing here that is left to a BLAS. With the compiled kernels each matrix has a
    work array of its size, which is not saved, beside its momentum.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> params = {"w": np.zeros((2, 3)), "b": np.zeros(2)}
    >>> opt = fs.Muon(params, lr=0.5)
    >>> _ = opt.step({"w": np.array([[5.0, 0.0, 0.0], [0.0, 4.0, 3.0]]), "b": np.ones(2)})
    >>> np.linalg.svd(params["w"])[1].round(2)
    array([0.55, 0.55])
    >>> list(opt.state["w"]), list(opt.state["b"])
    (['momentum_buffer'], ['exp_avg', 'exp_avg_sq'])

    References
    ----------
    As ``torch.optim.Muon``; Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al.,
    "Muon is Scalable for LLM Training" (2025). ``adamw_lr_ratio`` is the ``adam_lr_ratio`` of ``keras.optimizers.Muon``.
    """

    _rule = staticmethod(reference.muon)
    _direction = staticmethod(reference.rules.muon_direction)
    _has_others = True
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 4e-3, "adamw_eps": 1e-7, "adamw_weight_decay": 4e-3},
        "optax": {"lr": REQUIRED, "eps": 1e-8, "weight_decay": 0.0, "adamw_weight_decay": 0.0},
    }
    _option_defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.1, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        momentum: Hyper = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[Hyper, Hyper, Hyper] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        eps: Hyper = 1e-7,
        adjust_lr_fn: str | None = None,
        adamw_lr_ratio: Hyper = 1.0,
        adamw_betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        adamw_eps: Hyper = 1e-8,
        adamw_weight_decay: Hyper = 1e-2,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            ns_steps=ns_steps,
            eps=eps,
            adjust_lr_fn=adjust_lr_fn,
            adamw_lr_ratio=adamw_lr_ratio,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
        )
        super().__init__(params, hyper, options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        _hyper.from_0_below_1(values["momentum"], "momentum")

    @staticmethod
    def _is_own(param: Array, hyper: Mapping[str, Any], label: str = "param") -> bool:
        return param.ndim == 2

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    @classmethod
    def _others(cls, hyper: Mapping[str, Any]) -> Part:
        own = {
            "lr": hyper["lr"] * hyper["adamw_lr_ratio"],
            "betas": hyper["adamw_betas"],
            "eps": hyper["adamw_eps"],
            "eps_root": None,
            "weight_decay": hyper["adamw_weight_decay"],
        }
        if hyper["convention"] == "keras" and _hyper.decay_mode(hyper) == "decoupled":
            own |= {"weight_decay": hyper["lr"] * hyper["adamw_weight_decay"], "decay_mode": "independent"}
        if hyper["convention"] == "optax" and hyper["nesterov"]:
            return Part(NAdam, {**hyper, **own, "momentum_decay": 0.0})
        return Part(AdamW, {**hyper, **own, "amsgrad": False})


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
    eps_root : float, optional
        Added to the corrected :math:`v`, inside the root; only in "optax".
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
        eps_root: Hyper | None = None,
        momentum_decay: Hyper = 4e-3,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root, momentum_decay=momentum_decay)
        super().__init__(params, hyper, options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class LAMB(Optimizer):
    r"""LAMB: steps in Adam's direction, of the learning rate times the norm of the parameter; for large batches.

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
    eps_root : float, optional
        Added to the corrected :math:`v`, inside the root; only in "optax".

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
        eps_root: Hyper | None = None,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class LARS(Optimizer):
    r"""LARS: momentum of steps of the learning rate times the norm of the parameter; for large batches.

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


class Adamax(Optimizer):
    r"""Adamax: Adam with the largest gradient, slowly forgotten, in place of the root of the mean square.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t| + \epsilon) \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_inf`` (:math:`u`).
    eps : float
        :math:`\epsilon`, beside the magnitude of the gradient.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Adamax([w], lr=0.5, eps=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w
    array([-0.5,  0.5])

    References
    ----------
    As ``torch.optim.Adamax``; Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7.1.
    """

    _rule = staticmethod(reference.adamax)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {"lr": REQUIRED},
        "tf": {"lr": 1e-3, "eps": 1e-7},
    }
    _non_negative_states = ("exp_inf",)

    def __init__(
        self,
        params: Any,
        lr: Hyper = 2e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_inf")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # The other one has more magnitudes, being positive: the quotient of what is rounded up here would be large.
        return ("exp_avg",)


class RAdam(Optimizer):
    r"""RAdam: Adam that starts without the denominator, and then rectifies its variance while it is an average of few.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_t &= \rho - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad \rho = \frac{2}{1 - \beta_2} - 1 \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t} m_t \, \begin{cases}
               r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ 1 & \text{else}\end{cases} \\
        r_t^2 &= \frac{(\rho_t - 4) (\rho_t - 2) \rho}{(\rho - 4) (\rho - 2) \rho_t}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).
    eps : float
        :math:`\epsilon`, outside the uncorrected root.
    eps_root : float, optional
        Added to the corrected :math:`v`, inside the root; only in "optax".

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.RAdam([w], lr=0.5)
    >>> _ = opt.step([np.array([3.0, -0.25])])
    >>> w
    array([-1.5  ,  0.125])

    References
    ----------
    As ``torch.optim.RAdam``; Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020).
    """

    _rule = staticmethod(reference.radam)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "optax": {"lr": REQUIRED},
        "thinc": {"clip_norm_per_array": 1.0, "decay_mode": "decoupled_after"},
    }
    _non_negative_states = ("exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        eps_root: Hyper | None = None,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


class Lion(Optimizer):
    r"""Lion: steps of one size, in the direction of the sign of a momentum that looks ahead.

    .. math::

        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        p_t &= p_{t-1} - \gamma \operatorname{sign}(c_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. ``decoupled_weight_decay`` is True unless given, as in
        the paper, whose :math:`p - \gamma (\operatorname{sign}(c) + \lambda p)` is that but for rounding.
    lr : float
        Learning rate :math:`\gamma`: the size of each step. The authors advise a third to a tenth of AdamW's, and 3 to 10
        times its weight decay.
    betas : pair of float
        :math:`\beta_1, \beta_2`; the state is ``exp_avg`` (:math:`m`).

    Notes
    -----
    The sign of 0 is 0: where there never was a gradient, nothing moves.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(3)
    >>> opt = fs.Lion([w], lr=0.5)
    >>> _ = opt.step([np.array([3.0, -0.1, 0.0])])
    >>> w
    array([-0.5,  0.5,  0. ])

    References
    ----------
    Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2, and its defaults; ``optax.lion``.
    """

    _rule = staticmethod(reference.lion)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"lr": 1e-3, "weight_decay": 0.0},
        "optax": {"lr": REQUIRED, "weight_decay": 1e-3},
    }
    _option_defaults: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-4,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.99),
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)


class Signum(Optimizer):
    r"""Signum, signSGD with momentum: steps of one size, in the direction of the sign of the momentum.

    .. math::

        b_t &= \mu b_{t-1} + (1 - \mu) g_t \\
        p_t &= p_{t-1} - \gamma \operatorname{sign}(b_t)

    Without momentum this is signSGD: :math:`p_t = p_{t-1} - \gamma \operatorname{sign}(g_t)`.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`: the size of each step.
    momentum : float
        :math:`\mu`; 0 keeps no state, anything else the state ``momentum_buffer``.

    Notes
    -----
    The sign of 0 is 0.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(3)
    >>> opt = fs.Signum([w], lr=0.5, momentum=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1, 0.0])])
    >>> w
    array([-0.5,  0.5,  0. ])

    References
    ----------
    Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (2018); defaults as
    ``mxnet.optimizer.Signum``, its authors' implementation; ``optax.signum`` and ``optax.sign_sgd``.
    """

    _rule = staticmethod(reference.signum)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        momentum: Hyper = 0.9,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        if not values["momentum"] < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {values['momentum']}")

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if hyper["momentum"] != 0 else ()

    @classmethod
    def _kernel_name(cls, states: tuple[str, ...], hyper: Mapping[str, Any]) -> str:
        return "signum" if states else "signsgd"


class AdaBelief(Optimizer):
    r"""AdaBelief: Adam that divides by how far gradients are from their average: large steps where they are as expected.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t}
               \frac{m_t}{\sqrt{s_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_var`` (:math:`s`).
    eps : float
        :math:`\epsilon`, as in the paper in both places: added to :math:`s` in each step, and outside the corrected root.
        It adds up: with gradients as expected :math:`s` tends to :math:`\epsilon / (1 - \beta_2)`. The default is that of
        the authors' implementation and of optax.
    eps_root : float, optional
        What is added to :math:`s` instead; only in "optax".

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.AdaBelief([w], lr=0.5, betas=(0.5, 0.5), eps=0.0)
    >>> _ = opt.step([np.array([3.0, -0.25])])
    >>> w
    array([-1.,  1.])

    References
    ----------
    Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients" (2020), algorithm 2;
    ``optax.adabelief``.
    """

    _rule = staticmethod(reference.adabelief)
    _non_negative_states = ("exp_avg_var",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED, "eps_root": 1e-16}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-16,
        eps_root: Hyper | None = None,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_var")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # What it differs from the gradient by may be much smaller than it is.
        return ("exp_avg",)


class Yogi(Optimizer):
    r"""Yogi: Adam whose mean square shrinks no faster than it grows, however large it has been.

    .. math::

        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        v_t &= v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - g_t^2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t}
               \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

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
    initial_accumulator_value : float
        What the state ``exp_avg_sq`` starts with, and in "optax" ``exp_avg``, too.

    Notes
    -----
    The corrections of the start, which the paper leaves out, are optax's. As ``exp_avg`` does not start from 0 there,
    parameters move that have no gradient.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Yogi([w], lr=0.5, eps=0.0, initial_accumulator_value=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w
    array([-0.5,  0.5])

    References
    ----------
    Zaheer et al., "Adaptive Methods for Nonconvex Optimization" (2018), algorithm 2; ``optax.yogi``.
    """

    _rule = staticmethod(reference.yogi)
    _non_negative_states = ("exp_avg_sq",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-3,
        initial_accumulator_value: float = 1e-6,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, betas=betas, eps=eps, initial_accumulator_value=initial_accumulator_value)
        super().__init__(params, hyper, options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float:
        starts = name == "exp_avg_sq" or hyper["convention"] == "optax"
        return float(hyper["initial_accumulator_value"]) if starts else 0.0


class Rprop(Optimizer):
    r"""Rprop: a step size for each element, which grows as long as the sign of its gradient stays, and else shrinks.

    .. math::

        c_t &= \operatorname{sign}(g_t) \, g_{t-1} \\
        s_t &= s_{t-1} \begin{cases} \eta_+ & c_t > 0 \\ \eta_- & c_t < 0 \\ 1 & c_t = 0 \end{cases}
               \quad \text{bounded to } [s_{\min}, s_{\max}] \\
        g_t &\leftarrow 0 \quad \text{where } c_t < 0 \\
        p_t &= p_{t-1} - \operatorname{sign}(g_t) s_t

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        What the state ``step_size`` (:math:`s`) starts with; later values do nothing, but for decoupled weight decay.
    etas : pair of float
        :math:`\eta_-, \eta_+`, below and above 1.
    step_sizes : pair of float
        :math:`s_{\min}, s_{\max}`.

    Notes
    -----
    For full batches: the signs of mini-batches change too often. The state ``prev`` has the gradient of the step before.
    PyTorch takes the sign of the product :math:`g_t g_{t-1}`, which vanishes where both are small. optax is a step late: it
    takes that of :math:`g_{t-1}` and :math:`s_{t-1}`, which is in ``prev``, and none where :math:`c_t < 0`.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Rprop([w], lr=0.5, etas=(0.5, 1.5))
    >>> for g in ([3.0, 3.0], [0.1, -0.1]):
    ...     _ = opt.step([np.array(g)])
    >>> w
    array([-1.25, -0.5 ])

    References
    ----------
    As ``torch.optim.Rprop``; Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm" (1993).
    """

    _rule = staticmethod(reference.rprop)
    _non_negative_states = ("step_size",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        etas: tuple[Hyper, Hyper] = (0.5, 1.2),
        step_sizes: tuple[Hyper, Hyper] = (1e-6, 50),
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, etas=etas, step_sizes=step_sizes), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        if not values["etas"][0] < 1 < values["etas"][1]:
            raise ValueError(f"etas: expected a pair of numbers below and above 1, got {values['etas']}")
        if not values["step_sizes"][0] <= values["step_sizes"][1]:
            raise ValueError(f"step_sizes: expected a pair of numbers, the lower first, got {values['step_sizes']}")

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("prev", "step_size")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # Rounded at random, what is small would be 0 and have no sign, and step sizes would wander.
        return ("prev", "step_size")

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float:
        return float(hyper["lr"]) if name == "step_size" else 0.0


class ASGD(Optimizer):
    r"""Averaged stochastic gradient descent: with steps and weights that shrink, and the mean of the parameters.

    .. math::

        \eta_t &= \frac{\gamma}{(1 + \lambda \gamma (t - 1))^\alpha} \\
        p_t &= (1 - \lambda \eta_t) p_{t-1} - \eta_t g_t \\
        a_t &= a_{t-1} + \mu_t (p_t - a_{t-1}), \qquad \mu_t = \frac{1}{\max(1, t - 1 - t_0)}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma` of the first step.
    lambd : float
        :math:`\lambda`, which decays both learning rate and parameters.
    alpha : float
        :math:`\alpha`, how fast the learning rate decays; 0.75 in the paper on averaging, 1 without averaging.
    t0 : float
        :math:`t_0`, the step after which the state ``ax`` (:math:`a`) begins to average; it is the parameter until then.

    Notes
    -----
    PyTorch computes :math:`\eta` and :math:`\mu` a step ahead, in float32 unless its default is float64; with an `lr` that
    changes, its steps have the `lr` of the step before. For averages that follow `bounds`, and can be swapped in, see
    `ema_decay` and ``fusedstep.schedules.equal_average``.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(1)
    >>> opt = fs.ASGD({"w": w}, lr=1.0, lambd=0.0, t0=0)
    >>> for g in (-1.0, -1.0, -1.0):
    ...     _ = opt.step({"w": np.array([g])})
    >>> w, opt.state["w"]["ax"]
    (array([3.]), array([2.5]))

    References
    ----------
    As ``torch.optim.ASGD``; Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992).
    """

    _rule = staticmethod(reference.asgd)

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        *,
        lambd: Hyper = 1e-4,
        alpha: Hyper = 0.75,
        t0: Hyper = 1e6,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, lambd=lambd, alpha=alpha, t0=t0), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("ax",)

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # It is a result, not a means, as averages of parameters are.
        return ("ax",)


class FTRL(Optimizer):
    r"""FTRL-Proximal, "follow the regularized leader": gradient descent with exact zeros, for sparse linear models.

    .. math::

        z_t &= z_{t-1} + g_t - \frac{\sqrt{n_{t-1} + g_t^2} - \sqrt{n_{t-1}}}{\gamma} p_{t-1} \\
        n_t &= n_{t-1} + g_t^2 \\
        p_t &= \begin{cases} 0 & |z_t| \le \lambda_1 \\
               - \dfrac{z_t - \lambda_1 \operatorname{sign}(z_t)}{(\beta + \sqrt{n_t}) / \gamma + 2 \lambda_2} &
               \text{else} \end{cases}

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`, above 0.
    initial_accumulator_value : float
        What the state ``accumulator`` (:math:`n`) starts with.
    beta : float
        :math:`\beta`, which makes the first steps smaller.
    l1_regularization_strength : float
        :math:`\lambda_1`: parameters whose state ``linear`` (:math:`z`) stays within it are exactly 0.
    l2_regularization_strength : float
        :math:`\lambda_2`, as in Keras half of the paper's.

    Notes
    -----
    Parameters follow from the state: they should start from 0, for other values are soon forgotten unless
    `initial_accumulator_value` is 0. The common options `l1` and `weight_decay` change the gradient, which makes parameters
    small, not 0. Keras' ``learning_rate_power`` is -1/2 here, as in the paper: other powers are not rounded in the same way
    everywhere. Where there never was a gradient, and `initial_accumulator_value` and `beta` are 0, parameters are 0, and nan
    in Keras.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.FTRL([w], lr=0.5, initial_accumulator_value=0.0, l1_regularization_strength=1.0)
    >>> _ = opt.step([np.array([4.0, 0.75])])
    >>> w
    array([-0.375,  0.   ])

    References
    ----------
    McMahan et al., "Ad Click Prediction: a View from the Trenches" (2013), algorithm 1; as ``keras.optimizers.Ftrl``.
    """

    _rule = staticmethod(reference.ftrl)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "keras": {"decoupled_weight_decay": True}, "tf": {}}
    _non_negative_states = ("accumulator",)

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        initial_accumulator_value: float = 0.1,
        beta: Hyper = 0.0,
        l1_regularization_strength: Hyper = 0.0,
        l2_regularization_strength: Hyper = 0.0,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(
            lr=lr,
            initial_accumulator_value=initial_accumulator_value,
            beta=beta,
            l1_regularization_strength=l1_regularization_strength,
            l2_regularization_strength=l2_regularization_strength,
        )
        super().__init__(params, hyper, options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        if values["lr"] == 0:
            raise ValueError(f"lr: expected a finite number > 0, got {values['lr']}")

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("accumulator", "linear")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # Roots of the one are subtracted from each other, and parameters are as exact as both.
        return ("accumulator", "linear")

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float:
        return float(hyper["initial_accumulator_value"]) if name == "accumulator" else 0.0


class Adan(Optimizer):
    r"""Adan: Adam with Nesterov momentum, by an average of how gradients change.

    .. math::

        d_t &= g_t - g_{t-1} \qquad (d_1 = 0) \\
        m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
        v_t &= v_{t-1} + (1 - \beta_2) (d_t - v_{t-1}) \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        p_t &= p_{t-1} - \gamma \left(\frac{m_t}{1 - \beta_1^t} + \frac{\beta_2 v_t}{1 - \beta_2^t}\right) \bigg/
               \left(\frac{\sqrt{n_t}}{\sqrt{1 - \beta_3^t}} + \epsilon\right)

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. ``decoupled_weight_decay`` is True unless given: the
        authors' ``no_prox=True``, and to first order their :math:`p / (1 + \gamma \lambda)` after the step.
    lr : float
        Learning rate :math:`\gamma`.
    betas : three floats
        :math:`\beta_1, \beta_2, \beta_3`, of the states ``exp_avg`` (:math:`m`), ``exp_avg_diff`` (:math:`v`) and
        ``exp_avg_sq`` (:math:`n`); as in the authors' implementation, in the paper these are :math:`1 - \beta`.
    eps : float
        :math:`\epsilon`, outside the corrected root.
    eps_root : float, optional
        Added to the corrected :math:`n`, inside the root; only in "optax".

    Notes
    -----
    The state ``pre_grad`` has the gradient of the step before. In optax :math:`(1 - \beta_2) d_t` stands where the paper and
    its implementation have, in this notation, :math:`\beta_2 d_t`, and so with :math:`v_t`.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Adan([w], lr=0.5, eps=0.0)
    >>> _ = opt.step([np.array([3.0, -0.1])])
    >>> w.round(12)
    array([-0.5,  0.5])

    References
    ----------
    Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models" (2022), algorithm 1.
    """

    _rule = staticmethod(reference.adan)
    _option_defaults: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": True}
    _non_negative_states = ("exp_avg_sq",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"lr": REQUIRED, "eps_root": 1e-8}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper, Hyper] = (0.98, 0.92, 0.99),
        eps: Hyper = 1e-8,
        eps_root: Hyper | None = None,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # What it differs from the next gradient by may be much smaller than it is.
        return ("pre_grad",)


class ScheduleFree(Optimizer):
    """What the two below share: the arrays hold y, the state ``z`` is a parameter, too, and x, the result, is an average."""

    _numbers = ("weight_sum", "lr_max")

    @staticmethod
    @abstractmethod
    def _momentum(hyper: Mapping[str, Any]) -> float:
        """How much of the average is in y."""

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("z",)

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float | None:
        return None if name == "z" else 0.0

    @classmethod
    def _average(cls, param: Array, own: Mapping[str, Array], hyper: Mapping[str, Any]) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(param + (1 - 1 / cls._momentum(hyper)) * (own["z"] - param))


class ScheduleFreeSGD(ScheduleFree):
    r"""Schedule-Free SGD: an average of fast steps takes the place of a schedule that ends somewhere.

    .. math::

        z_t &= z_{t-1} - \gamma \, g_t \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t, \qquad
               c_t = \frac{w_t}{\sum_{s \le t} w_s}, \quad w_t = t^r \big(\max_{s \le t} \gamma_s\big)^k \\
        y_t &= (1 - \mu) z_t + \mu x_t

    During training the arrays hold :math:`y`, for which gradients are to be computed. The result is :math:`x`, in
    :attr:`averages`; ``with opt.averaged():`` has it in the arrays.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. The state ``z`` starts from their present values.
    lr : float
        Learning rate :math:`\gamma`: constant, or with a warm-up (``fs.schedules.warmup_constant_schedule``), but no decay.
    momentum : float
        :math:`\mu`, between 0 and 1 and best the same throughout.
    r : float
        :math:`r`, to have later steps count more.
    weight_lr_power : float
        :math:`k`, to have those of a warm-up count less.

    Notes
    -----
    :math:`x` is computed from :math:`y` and :math:`z` when it is asked for. The sum of the weights and the largest learning
    rate are the states ``weight_sum`` and ``lr_max``, numbers for each array. `weight_decay` and `l1` take :math:`y` for the
    parameter; other kinds of decay and `bounds` change it alone. With an `ema_decay` the averages are those that it makes of
    :math:`y`. optax has no `r`, and with a schedule weighs each step by the learning rates up to that of the next one, which
    here are those up to its own.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(1)
    >>> opt = fs.ScheduleFreeSGD({"w": w}, lr=1.0, momentum=0.5)
    >>> for g in (-1.0, -1.0, -1.0):
    ...     _ = opt.step({"w": np.array([g])})
    >>> opt.state["w"]["z"], opt.averages["w"], w
    (array([3.]), array([2.]), array([2.5]))
    >>> with opt.averaged():
    ...     print(w)
    [2.]

    References
    ----------
    Defazio et al., "The Road Less Scheduled" (2024), and its authors' implementation; ``optax.contrib.schedule_free_sgd``.
    """

    _rule = staticmethod(reference.schedule_free_sgd)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1.0,
        *,
        momentum: Hyper = 0.9,
        r: Hyper = 0.0,
        weight_lr_power: Hyper = 2.0,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, r=r, weight_lr_power=weight_lr_power), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        if not 0 < values["momentum"] < 1:
            raise ValueError(f"momentum: expected a number in (0, 1), got {values['momentum']}")

    @staticmethod
    def _momentum(hyper: Mapping[str, Any]) -> float:
        return float(hyper["momentum"])

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("z",)


class ScheduleFreeAdamW(ScheduleFree):
    r"""Schedule-Free AdamW: an average of fast steps takes the place of momentum, and of a schedule that ends somewhere.

    .. math::

        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        z_t &= z_{t-1} - \gamma \left(\frac{g_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon} + \lambda y_{t-1}\right)

    and with it :math:`x` and :math:`y` as in :class:`ScheduleFreeSGD`, for :math:`\mu = \beta_1`: the arrays hold :math:`y`
    and :attr:`averages` is :math:`x`.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. The state ``z`` starts from their present values.
    lr : float
        Learning rate :math:`\gamma`: constant, or with a warm-up (``fs.schedules.warmup_constant_schedule``), but no decay.
    betas : pair of float
        :math:`\beta_1`, above 0 and best the same throughout, and :math:`\beta_2`, of the state ``exp_avg_sq`` (:math:`v`).
    eps : float
        :math:`\epsilon`, outside the corrected root.
    r : float
        To have later steps count more.
    weight_lr_power : float
        To have those of a warm-up count less.

    Notes
    -----
    See :class:`ScheduleFreeSGD`. ``weight_decay``, :math:`\lambda`, is part of the direction, which is its authors' way to
    decouple it, unless another kind is asked for. Keras, too, has no `r`, and no `weight_lr_power`: all steps have the same
    weight.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.ScheduleFreeAdamW({"w": w}, lr=0.5, betas=(0.5, 0.999), eps=0.0)
    >>> for _ in range(2):
    ...     _ = opt.step({"w": np.array([3.0, -0.1])})
    >>> opt.state["w"]["z"].round(12), opt.averages["w"].round(12), w.round(12)
    (array([-1.,  1.]), array([-0.75,  0.75]), array([-0.875,  0.875]))

    References
    ----------
    Defazio et al., "The Road Less Scheduled" (2024), and its authors' implementation; ``optax.contrib.schedule_free_adamw``.
    """

    _rule = staticmethod(reference.schedule_free_adamw)
    _non_negative_states = ("exp_avg_sq",)
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "keras": {"weight_lr_power": 0.0, "decoupled_weight_decay": True},
        "optax": {},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 2.5e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        r: Hyper = 0.0,
        weight_lr_power: Hyper = 2.0,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, r=r, weight_lr_power=weight_lr_power), options)

    @staticmethod
    def _check_hyper(values: Mapping[str, Any]) -> None:
        if not values["betas"][0] > 0:
            raise ValueError(f"betas[0]: expected a number in (0, 1), got {values['betas'][0]}")

    @staticmethod
    def _momentum(hyper: Mapping[str, Any]) -> float:
        return float(hyper["betas"][0])

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("z", "exp_avg_sq")


class NovoGrad(Optimizer):
    r"""NovoGrad: momentum of gradients divided by the root of their running mean square, which is one number for each array.

    .. math::

        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \|g_t\|^2 \qquad (v_1 = \|g_1\|^2) \\
        m_t &= \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \gamma m_t

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options.
    lr : float
        Learning rate :math:`\gamma`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`, of shape ``()``).
    eps : float
        :math:`\epsilon`, outside the root.
    eps_root : float, optional
        Added to :math:`v`, inside the root; only in "optax".

    Notes
    -----
    ``weight_decay``, :math:`\lambda`, is part of the momentum unless it is decoupled. The norm is that of the gradient after
    clipping and all else that comes before the rule. A step reads everything twice.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.NovoGrad({"w": w}, lr=0.5, eps=0.0)
    >>> _ = opt.step({"w": np.array([3.0, -4.0])})
    >>> w, opt.state["w"]["exp_avg_sq"]
    (array([-0.3,  0.4]), array(25.))

    References
    ----------
    Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks" (2019),
    algorithm 1; ``optax.novograd``, with other defaults.
    """

    _rule = staticmethod(reference.novograd)
    _numbers = ("exp_avg_sq",)
    _is_scaled = True
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {
        "torch": {},
        "optax": {"lr": REQUIRED, "betas": (0.9, 0.25), "eps": 1e-6},
    }

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        *,
        betas: tuple[Hyper, Hyper] = (0.95, 0.98),
        eps: Hyper = 1e-8,
        eps_root: Hyper | None = None,
        **options: Unpack[_hyper.Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root), options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)


class Prodigy(Optimizer):
    r"""Prodigy: Adam that finds its learning rate, from how far the gradients have led away from the start.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_{t-1} g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) (d_{t-1} g_t)^2 \\
        s_t &= \beta_3 s_{t-1} + \frac{d_{t-1}}{d_0} \gamma_t g_t, \qquad
               r_t = \beta_3 r_{t-1} + \frac{d_{t-1}}{d_0} \sum \gamma_t g_t (p_0 - p_{t-1}) \\
        d_t &= \max\left(d_{t-1}, c \frac{r_t}{\sum |s_t|}\right) \\
        p_t &= p_{t-1} - \gamma_t \left(\frac{m_t}{\sqrt{v_t} + d_t \epsilon} + \lambda p_{t-1}\right), \qquad
               \gamma_t = d_{t-1} \gamma

    where sums go over all elements of all arrays, and :math:`p_0` is where they started.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or sequence of groups
        See :class:`Optimizer`, as for all further keyword options. The state ``p0`` starts from their present values.
    lr : float
        :math:`\gamma`, which the learning rate found is multiplied by: 1, or a schedule that goes from there to 0. Groups
        may have their own; but they should have the same :math:`\beta`, `d0` and `d_coef`.
    betas : pair of float
        :math:`\beta_1, \beta_2`, of the states ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).
    beta3 : float, optional
        :math:`\beta_3`, of the state ``s``; the root of :math:`\beta_2` by default.
    eps : float
        :math:`\epsilon`, outside the root.
    d0 : float
        What :math:`d` starts from, above 0: less than any learning rate that may be found.
    d_coef : float
        :math:`c`, above 0, to have larger or smaller learning rates found.
    use_bias_correction : bool
        Multiply :math:`\gamma_t` by Adam's :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`; always in optax.
    safeguard_warmup : bool
        Have :math:`d_{t-1}` in place of :math:`\gamma_t` in :math:`s`, for warm-ups of `lr`.

    Notes
    -----
    ``opt.state[name]["d"]`` is the learning rate found, a number that is the same for all arrays, and ``d_numerator`` is
    :math:`r`. :math:`d` stays where the quotient is no finite number. Gradients are those after clipping and all else that
    comes before the rule. ``weight_decay``, :math:`\lambda`, is part of the step, the authors' ``decouple=True``, unless
    another kind is asked for: that knows `lr` alone. There is no ``growth_rate``. In optax `d0` and `d_coef` are
    ``estim_lr0`` and ``estim_lr_coef``. A step reads everything twice. With parameters of 16 bits, `low_precision` should be
    other than "nearest": that loses steps of the size of `d0`, and :math:`d` is found from what they do.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.Prodigy({"w": w})
    >>> for _ in range(300):
    ...     _ = opt.step({"w": w - [3.0, -4.0]})
    >>> w.round(5), float(opt.state["w"]["d"].round(5))
    (array([ 3., -4.]), 1.53037)

    References
    ----------
    Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (2023), and its authors'
    implementation, ``prodigyopt``; ``optax.contrib.prodigy``.
    """

    _rule = staticmethod(reference.prodigy)
    _of_all = staticmethod(reference.rules.prodigy_of_all)
    _numbers = ("d", "d_numerator")
    _non_negative_states = ("exp_avg_sq",)
    _is_scaled = True
    _conventions: ClassVar[dict[str, dict[str, Any]]] = {"torch": {}, "optax": {"use_bias_correction": True}}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1.0,
        *,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        beta3: Hyper | None = None,
        eps: Hyper = 1e-8,
        d0: Hyper = 1e-6,
        d_coef: Hyper = 1.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        **options: Unpack[_hyper.Options],
    ) -> None:
        hyper = dict(lr=lr, betas=betas, beta3=beta3, eps=eps, d0=d0, d_coef=d_coef)
        hyper |= dict(use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup)
        super().__init__(params, hyper, options)

    @staticmethod
    def _states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "s", "p0")

    @staticmethod
    def _exact_states(hyper: Mapping[str, Any]) -> tuple[str, ...]:
        # The parameter is subtracted from it.
        return ("p0",)

    @staticmethod
    def _initial_state(name: str, hyper: Mapping[str, Any]) -> float | None:
        return None if name == "p0" else float(hyper["d0"]) if name == "d" else 0.0
