"""The rules themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _hyper
from .stages import Stages, operands
from .sums import ldexp, norm, pairwise_sum, scaled_sum_squares, sum_of, sum_squares, sum_squares_of_columns

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = NDArray[Any]

__all__ = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "asgd",
    "ftrl",
    "lamb",
    "lars",
    "lion",
    "muon",
    "nadam",
    "novograd",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "signum",
    "yogi",
]

OverAll = Callable[[float, float], tuple[float, float]]
"""What makes sums over all arrays of two sums over one."""


def require_buffer(momentum_buffer: Array | None, momentum: float) -> None:
    """Momentum without a buffer would silently be none."""
    if momentum_buffer is None and momentum != 0:
        raise ValueError(f"momentum_buffer: expected an array for momentum={momentum}, got none")


def sgd(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Gradient descent, with momentum if ``momentum_buffer`` is given; see :class:`fusedstep.SGD`."""
    require_buffer(momentum_buffer, momentum)
    with operands(param, grad, momentum_buffer, lr=lr, **stages) as (p, g, *buffer):
        if not buffer:
            p -= lr * g
            return
        (b,) = buffer
        inside, outside = (1 - dampening if step > 1 else 1.0), lr
        if convention in ("keras", "tf", "sklearn"):
            inside, outside = lr, 1.0
        b[:] = momentum * b + inside * g
        p -= outside * (inside * g + momentum * b if nesterov else b)


def adagrad(
    param: Array,
    grad: Array,
    sum: Array,
    *,
    step: int,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adagrad; see :class:`fusedstep.Adagrad`."""
    with operands(param, grad, sum, lr=lr, **stages) as (p, g, s):
        s += g * g
        eps_inside, eps_outside = (eps, 0.0) if convention in ("keras", "optax") else (0.0, eps)
        p -= lr / (1 + (step - 1) * lr_decay) * g / (np.sqrt(s + eps_inside) + eps_outside)


def adadelta(
    param: Array,
    grad: Array,
    square_avg: Array,
    acc_delta: Array,
    *,
    step: int,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    **stages: Unpack[Stages],
) -> None:
    """Adadelta; see :class:`fusedstep.Adadelta`."""
    with operands(param, grad, square_avg, acc_delta, lr=lr, **stages) as (p, g, v, u):
        v[:] = rho * v + (1 - rho) * g * g
        delta = np.sqrt(u + eps) / np.sqrt(v + eps) * g
        u[:] = rho * u + (1 - rho) * delta * delta
        p -= lr * delta


def rmsprop(
    param: Array,
    grad: Array,
    square_avg: Array,
    grad_avg: Array | None = None,
    momentum_buffer: Array | None = None,
    *,
    step: int,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """RMSprop, centered if ``grad_avg``, with momentum if ``momentum_buffer`` is given; see :class:`fusedstep.RMSprop`."""
    require_buffer(momentum_buffer, momentum)
    with operands(param, grad, square_avg, grad_avg, momentum_buffer, lr=lr, **stages) as (p, g, v, *others):
        v[:] = alpha * v + (1 - alpha) * g * g
        variance = v
        if grad_avg is not None:
            m = others.pop(0)
            m += (1 - alpha) * (g - m)
            variance = v - m * m
            variance[variance < 0] = 0  # rounding; a NaN stays a NaN
        eps_inside, eps_outside, inside, outside = 0.0, eps, 1.0, lr
        if convention in ("keras", "optax", "tf"):
            inside, outside = lr, 1.0
            if convention != "tf" or momentum != 0:
                eps_inside, eps_outside = eps, 0.0
        direction = g / (np.sqrt(variance + eps_inside) + eps_outside)
        if momentum_buffer is None:
            p -= lr * direction
        else:
            (b,) = others
            b[:] = momentum * b + inside * direction
            p -= outside * b


def adam(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adam, or AMSGrad if ``max_exp_avg_sq`` is given; see :class:`fusedstep.Adam`."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    corrects_root = convention in ("torch", "optax")
    step_size = lr / correction1 if corrects_root else lr * math.sqrt(correction2) / correction1
    with operands(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, lr=lr, **stages) as (p, g, m, v, *v_max):
        m += (1 - beta1) * (g - m)
        v[:] = beta2 * v + (1 - beta2) * g * g
        if v_max:
            v = v * (1 / correction2) if convention == "optax" else v
            v_max[0][:] = v = np.where(v_max[0] > v, v_max[0], v)
        if v_max and convention == "optax":
            root = np.sqrt(v + or_else(eps_root, 0.0))
        else:
            root = corrected_root(v, beta2, step, eps_root) if corrects_root else np.sqrt(v)
        p -= step_size * m / (root + eps)


def corrected_root(v: Array, beta2: float, step: int, eps_root: float | None = None) -> Array:
    """The root of a second moment, corrected for its start from 0; and of ``eps_root`` with it."""
    correction2 = 1 - beta2**step
    root: Array = np.sqrt(v + or_else(eps_root, 0.0) * correction2) * (1 / math.sqrt(correction2))
    return root


def or_else(x: float | None, otherwise: float) -> float:
    """A hyper-parameter, or what stands for it where it is not given."""
    return otherwise if x is None else x


def at_most_largest(x: Any, dtype: Any) -> Any:
    """No more than the largest number of a type: what is finite stays so when it becomes one of that type."""
    return np.minimum(x, float(np.finfo(dtype).max))


def adamw(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adam with decoupled weight decay of 0.01 unless given; see :class:`fusedstep.AdamW`."""
    stages.setdefault("weight_decay", 1e-2)
    stages.setdefault("decoupled_weight_decay", True)
    hyper = dict(lr=lr, betas=betas, eps=eps, eps_root=eps_root, convention=convention)
    adam(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step=step, **hyper, **stages)  # type: ignore[arg-type]


def muon(
    param: Array,
    grad: Array,
    momentum_buffer: Array,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Muon of a matrix with decoupled weight decay of 0.1 unless given; see :class:`fusedstep.Muon`."""
    hyper = (momentum, nesterov, ns_coefficients, ns_steps, eps, adjust_lr_fn, convention)
    with operands(param, grad, momentum_buffer, lr=lr, **muon_stages(stages)) as (p, g, b):
        p -= lr * muon_along(g, b, param.shape, step, *hyper)


def muon_direction(
    param: Array,
    grad: Array,
    momentum_buffer: Array,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> Array:
    """What :func:`muon` would take a step along; nothing changes."""
    hyper = (momentum, nesterov, ns_coefficients, ns_steps, eps, adjust_lr_fn, convention)
    with operands(param.copy(), grad, momentum_buffer.copy(), lr=lr, **muon_stages(stages)) as (_, g, b):
        return muon_along(g, b, param.shape, step, *hyper).reshape(param.shape)


def muon_stages(stages: Stages) -> Stages:
    return {"weight_decay": 0.1, "decoupled_weight_decay": True, **stages}


def muon_along(
    g: Array,
    b: Array,
    shape: tuple[int, ...],
    step: int,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    convention: str,
) -> Array:
    """Move the flat buffer; return the flat direction."""
    if len(shape) != 2:
        raise ValueError(f"param: expected a matrix, got shape {shape}")
    weight = 1.0 if convention == "keras" else 1 - momentum
    b[:] = momentum * b + weight * g
    correction = next_correction = 1.0
    if convention == "optax":
        correction, next_correction = 1 - momentum**step, 1 - momentum ** (step + 1)
    ahead = momentum / next_correction * b + weight / correction * g if nesterov else 1 / correction * b
    n_outputs, n_inputs = reversed(shape) if convention == "optax" else shape
    ratio = math.sqrt(max(1, n_outputs / max(1, n_inputs)))
    if adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(shape))
    return ratio * orthogonalized(ahead.reshape(shape), ns_coefficients, ns_steps, eps, convention).reshape(-1)


def orthogonalized(
    matrix: Array, coefficients: tuple[float, float, float], n_steps: int, eps: float, convention: str = "torch"
) -> Array:
    """A matrix with its singular values moved towards 1, by steps of Newton and Schulz.

    Its products are NumPy's, and so their bits those of its BLAS.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    total, exponent = scaled_sum_squares(matrix.reshape(-1))
    size = ldexp(math.sqrt(total), exponent)
    x = x / (max(size, eps) if convention == "torch" else size + eps)
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def nadam(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float | None = None,
    momentum_decay: float = 4e-3,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adam with Nesterov's momentum; see :class:`fusedstep.NAdam`."""
    beta1, beta2 = betas
    with operands(param, grad, exp_avg, exp_avg_sq, lr=lr, **stages) as (p, g, m, v):
        m += (1 - beta1) * (g - m)
        v[:] = beta2 * v + (1 - beta2) * g * g
        if convention == "optax":
            on_grad = lr * (1 - beta1) / (1 - beta1**step)
            on_average = lr * beta1 / (1 - beta1 ** (step + 1.0))
        else:
            product = nadam_product(step, beta1, momentum_decay)
            mu, next_mu = (nadam_mu(s, beta1, momentum_decay) for s in (step, step + 1))
            on_grad = lr * (1 - mu) / (1 - product)
            on_average = lr * next_mu / (1 - product * next_mu)
        p -= (on_grad * g + on_average * m) / (corrected_root(v, beta2, step, eps_root) + eps)


def nadam_mu(step: int, beta1: float, momentum_decay: float) -> float:
    """NAdam's momentum at a step."""
    return float(beta1 * (1 - 0.5 * math.pow(0.96, step * momentum_decay)))


@functools.lru_cache(16)
def nadam_product(step: int, beta1: float, momentum_decay: float) -> float:
    """That of all steps so far, multiplied one by one."""
    product = 1.0
    for s in range(1, step + 1):
        if product == 0:
            break
        product *= nadam_mu(s, beta1, momentum_decay)
    return product


def power(x: float, exponent: float) -> float:
    """``x**exponent``, inf where that is too large."""
    try:
        return math.pow(x, exponent)
    except OverflowError:
        return math.inf


def rule_decay(stages: Stages) -> float:
    """The weight decay that is part of a rule's direction, taken out of what comes before the rule."""
    return stages.pop("weight_decay", 0.0) if _hyper.decay_mode(stages) == "coupled" else 0.0


def lamb(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    eps_root: float | None = None,
    **stages: Unpack[Stages],
) -> None:
    """Adam's direction, of lr times the norm of the parameter; see :class:`fusedstep.LAMB`."""
    beta1, beta2 = betas
    weight_decay = rule_decay(stages)
    with operands(param, grad, exp_avg, exp_avg_sq, lr=lr, **stages) as (p, g, m, v):
        m += (1 - beta1) * (g - m)
        v[:] = beta2 * v + (1 - beta2) * g * g
        below = corrected_root(v, beta2, step, eps_root) + eps
        direction = 1 / (1 - beta1**step) * m / below + weight_decay * p
        param_norm, direction_norm, rate = norm(p), norm(direction), lr
        if param_norm != 0 and direction_norm != 0:
            rate = float(at_most_largest(lr * (param_norm / direction_norm), p.dtype))
        p -= rate * direction


def lars(
    param: Array,
    grad: Array,
    momentum_buffer: Array,
    *,
    step: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    **stages: Unpack[Stages],
) -> None:
    """Momentum of steps of lr times the norm of the parameter; see :class:`fusedstep.LARS`."""
    weight_decay = rule_decay(stages)
    with operands(param, grad, momentum_buffer, lr=lr, **stages) as (p, g, b):
        direction = g + weight_decay * p
        param_norm, direction_norm, rate = norm(p), norm(direction), lr
        if param_norm != 0 and direction_norm != 0:
            rate = float(at_most_largest(lr * (trust_coefficient * param_norm / (direction_norm + eps)), p.dtype))
        b[:] = momentum * b + rate * direction
        p -= momentum * b + rate * direction if nesterov else b


def adafactor(
    param: Array,
    grad: Array,
    row_var: Array | None = None,
    col_var: Array | None = None,
    variance: Array | None = None,
    *,
    step: int,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adafactor with a variance by the rows and columns of matrices, or with all of it; see :class:`fusedstep.Adafactor`."""
    weight_decay = rule_decay(stages)
    with operands(param, grad, variance, lr=lr, **stages) as (p, g, *own):
        least = float(np.finfo(g.dtype).eps) if eps[0] is None else eps[0]
        inside, least = (0.0, least) if convention == "torch" else (least, 0.0)
        limit, relative_decay = 1 / math.sqrt(step), lr * weight_decay
        if convention == "optax":
            limit, relative_decay = math.inf, weight_decay
        weight = step**beta2_decay
        for v in own:
            v[:] = at_most_largest(v + weight * ((g * g + inside) - v), v.dtype)
        v = own[0] if own else factored_variance(g, param.shape, row_var, col_var, weight, inside, least)
        smallest = g.dtype.type(max(least * least, float(np.finfo(g.dtype).tiny)))  # 0 / 0 would be nan
        direction = g / np.sqrt(np.where(v < smallest, smallest, v))
        root = math.sqrt(max(1, p.size))
        rate = max(norm(p) / root, eps[1]) * min(lr, limit) / max(norm(direction) / root / d, 1.0)
        p[:] = (1 - relative_decay) * p - rate * direction


def factored_variance(
    g: Array,
    shape: tuple[int, ...],
    row_var: Array | None,
    col_var: Array | None,
    weight: float,
    inside: float,
    least: float,
) -> Array:
    """Move the means of rows and columns of squares plus ``inside``; return the flat variance they make."""
    if row_var is None or col_var is None:
        raise ValueError(f"{'row_var' if row_var is None else 'col_var'}: expected an array, got none")
    if len(shape) < 2:
        raise ValueError(f"param: expected at least 2 dimensions, got shape {shape}")
    if not g.size:
        return g
    matrices = g.reshape(-1, *shape[-2:])
    _, n_rows, n_columns = matrices.shape
    sums = (row_var, sum_squares(matrices), n_columns), (col_var, sum_squares_of_columns(matrices), n_rows)
    for state, total, n in sums:
        before = state.astype(np.float64).reshape(total.shape)
        moved = at_most_largest(before + weight * ((total / n + inside) - before), state.dtype)
        state[...] = moved.reshape(state.shape)
    rows, columns = row_var.reshape(-1, n_rows), col_var.reshape(-1, n_columns)
    mean = at_most_largest(pairwise_sum(rows.astype(np.float64)) / n_rows, np.float64)
    rows = (rows / np.where(mean < least, least, mean)[:, None]).astype(g.dtype)
    return (rows[:, :, None] * columns[:, None, :]).reshape(-1)


def novograd(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    eps_root: float | None = None,
    **stages: Unpack[Stages],
) -> None:
    """NovoGrad; ``exp_avg_sq`` is a single number; see :class:`fusedstep.NovoGrad`."""
    beta1, beta2 = betas[0], betas[1] if step > 1 else 0.0
    weight_decay = rule_decay(stages)
    with operands(param, grad, exp_avg, lr=lr, **stages) as (p, g, m):
        size = norm(g)
        exp_avg_sq[...] = beta2 * exp_avg_sq + (1 - beta2) * (size * size)
        m[:] = beta1 * m + (g / (math.sqrt(exp_avg_sq + or_else(eps_root, 0.0)) + eps) + weight_decay * p)
        p -= lr * m


def prodigy(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    s: Array,
    p0: Array,
    d: Array,
    d_numerator: Array,
    *,
    step: int,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    **stages: Unpack[Stages],
) -> None:
    """Prodigy of an array that is all there is; ``d`` and ``d_numerator`` are numbers; see :class:`fusedstep.Prodigy`."""
    hyper = dict(lr=lr, betas=betas, beta3=beta3, eps=eps, d0=d0, d_coef=d_coef)
    hyper |= dict(use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup)
    states = exp_avg, exp_avg_sq, s, p0, d, d_numerator
    prodigy_of_all(lambda *own: own, param, grad, *states, step=step, **hyper, **stages)  # type: ignore[arg-type]


def prodigy_of_all(
    over_all: OverAll,
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    s: Array,
    p0: Array,
    d: Array,
    d_numerator: Array,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    beta3: float | None,
    eps: float,
    d0: float,
    d_coef: float,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    **stages: Unpack[Stages],
) -> None:
    """:func:`prodigy` of one array among all of which ``over_all`` has the sums."""
    beta1, beta2 = betas
    beta3 = math.sqrt(beta2) if beta3 is None else beta3
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if use_bias_correction else 1.0
    weight_decay = rule_decay(stages)
    before = float(d)
    dlr = before * (lr * correction)
    rate = before / d0 * dlr
    s_rate = before / d0 * before if safeguard_warmup else rate
    with operands(param, grad, exp_avg, exp_avg_sq, s, p0, lr=lr, **stages) as (p, g, m, v, along, start):
        scaled = before * g
        m[:] = beta1 * m + (1 - beta1) * scaled
        v[:] = beta2 * v + (1 - beta2) * scaled * scaled
        along[:] = beta3 * along + s_rate * g
        numerator, denominator = over_all(float(sum_of(rate * g * (start - p))), float(sum_of(np.abs(along))))
        numerator += beta3 * float(d_numerator)
        estimate = d_coef * numerator / denominator if denominator != 0 else math.nan
        d[...] = estimate if math.isfinite(estimate) and estimate > before else before
        d_numerator[...] = numerator
        p -= dlr * weight_decay * p + dlr * m / (np.sqrt(v) + float(d) * eps)


def adamax(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_inf: Array,
    *,
    step: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adamax; see :class:`fusedstep.Adamax`."""
    beta1, beta2 = betas
    with operands(param, grad, exp_avg, exp_inf, lr=lr, **stages) as (p, g, m, u):
        m += (1 - beta1) * (g - m)
        eps_inside, eps_outside = (0.0, eps) if convention in ("keras", "tf") else (eps, 0.0)
        before, now = beta2 * u, np.abs(g) + eps_inside
        u[:] = np.where(before > now, before, now)
        p -= lr / (1 - beta1**step) * m / (u + eps_outside)


def radam(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Rectified Adam; see :class:`fusedstep.RAdam`."""
    beta1, beta2 = betas
    if convention == "thinc":
        step += 1
    power2 = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * power2 / (1 - power2)
    with operands(param, grad, exp_avg, exp_avg_sq, lr=lr, **stages) as (p, g, m, v):
        m += (1 - beta1) * (g - m)
        v[:] = beta2 * v + (1 - beta2) * g * g
        step_size = lr / (1 - beta1**step)
        if length > 5 or (length == 5 and convention != "torch"):
            square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step_size *= math.sqrt(square)
            if convention == "optax":
                p -= step_size * m / (corrected_root(v, beta2, step, eps_root) + eps)
            else:
                p -= step_size * math.sqrt(1 - power2) * m / (np.sqrt(v) + eps)
        else:
            p -= step_size * m


def lion(
    param: Array,
    grad: Array,
    exp_avg: Array,
    *,
    step: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    **stages: Unpack[Stages],
) -> None:
    """Lion; weight decay is decoupled unless given; see :class:`fusedstep.Lion`."""
    beta1, beta2 = betas
    stages.setdefault("decoupled_weight_decay", True)
    with operands(param, grad, exp_avg, lr=lr, **stages) as (p, g, m):
        p -= lr * np.sign(beta1 * m + (1 - beta1) * g)
        m[:] = beta2 * m + (1 - beta2) * g


def signum(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    step: int,
    lr: float = 1e-2,
    momentum: float = 0.9,
    **stages: Unpack[Stages],
) -> None:
    """signSGD, with momentum if ``momentum_buffer`` is given; see :class:`fusedstep.Signum`."""
    require_buffer(momentum_buffer, momentum)
    with operands(param, grad, momentum_buffer, lr=lr, **stages) as (p, g, *buffer):
        direction = g
        if buffer:
            (b,) = buffer
            b[:] = direction = momentum * b + (1 - momentum) * g
        p -= lr * np.sign(direction)


def adabelief(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_var: Array,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    eps_root: float | None = None,
    **stages: Unpack[Stages],
) -> None:
    """AdaBelief; see :class:`fusedstep.AdaBelief`."""
    beta1, beta2 = betas
    with operands(param, grad, exp_avg, exp_avg_var, lr=lr, **stages) as (p, g, m, s):
        m += (1 - beta1) * (g - m)
        surprise = g - m
        s[:] = beta2 * s + (1 - beta2) * surprise * surprise + or_else(eps_root, eps)
        p -= lr / (1 - beta1**step) * m / (corrected_root(s, beta2, step) + eps)


def yogi(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    step: int,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    **stages: Unpack[Stages],
) -> None:
    """Yogi; see :class:`fusedstep.Yogi`."""
    beta1, beta2 = betas
    with operands(param, grad, exp_avg, exp_avg_sq, lr=lr, **stages) as (p, g, m, v):
        square = g * g
        m += (1 - beta1) * (g - m)
        v -= (1 - beta2) * np.sign(v - square) * square
        p -= lr / (1 - beta1**step) * m / (corrected_root(v, beta2, step) + eps)


def rprop(
    param: Array,
    grad: Array,
    prev: Array,
    step_size: Array,
    *,
    step: int,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Rprop; ``step_size`` starts with ``lr``, which does nothing else; see :class:`fusedstep.Rprop`."""
    shrink, grow = etas
    with operands(param, grad, prev, step_size, lr=lr, **stages) as (p, g, before, s):
        smallest, largest = p.dtype.type(step_sizes[0]), p.dtype.type(step_sizes[1])
        direction = np.sign(g)
        same = direction * before
        is_late = convention == "optax"
        moved = s * np.where(same > 0, grow, np.where(same < 0, shrink, 1)).astype(s.dtype)
        bounded = np.where(moved < smallest, smallest, np.where(moved > largest, largest, moved))  # a NaN stays one
        s[:] = np.where(same == 0, s, bounded) if is_late else bounded
        now = np.where(same < 0, 0, direction) * s
        p -= np.where(same < 0, 0, before) if is_late else now
        before[:] = now if is_late else np.where(same < 0, 0, g)


def asgd(
    param: Array,
    grad: Array,
    ax: Array,
    *,
    step: int,
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    **stages: Unpack[Stages],
) -> None:
    """Averaged gradient descent; see :class:`fusedstep.ASGD`."""
    eta = lr / (1 + lambd * lr * (step - 1)) ** alpha
    mu = 1 / max(1, step - 1 - t0)
    with operands(param, grad, ax, lr=lr, **stages) as (p, g, average):
        p *= 1 - lambd * eta
        p -= eta * g
        average[:] = average + mu * (p - average) if mu < 1 else p


def ftrl(
    param: Array,
    grad: Array,
    accumulator: Array,
    linear: Array,
    *,
    step: int,
    lr: float = 1e-3,
    beta: float = 0.0,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    **stages: Unpack[Stages],
) -> None:
    """FTRL-Proximal; see :class:`fusedstep.FTRL`."""
    rate, l1 = 1 / lr, l1_regularization_strength
    l2 = beta / lr + 2 * l2_regularization_strength
    with operands(param, grad, accumulator, linear, lr=lr, **stages) as (p, g, n, z):
        before = np.sqrt(n)
        n += g * g
        root = np.sqrt(n)
        z += g - (root - before) * rate * p
        beyond = np.clip(z, -l1, l1) - z
        p[:] = np.where(beyond == 0, 0, beyond / (root * rate + l2))


def adan(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_diff: Array,
    exp_avg_sq: Array,
    pre_grad: Array,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    eps_root: float | None = None,
    convention: str = "torch",
    **stages: Unpack[Stages],
) -> None:
    """Adan; weight decay is decoupled unless given; see :class:`fusedstep.Adan`."""
    beta1, beta2, beta3 = betas
    on_diff = 1 - beta2 if convention == "optax" else beta2
    stages.setdefault("decoupled_weight_decay", True)
    states = exp_avg, exp_avg_diff, exp_avg_sq, pre_grad
    with operands(param, grad, *states, lr=lr, **stages) as (p, g, m, v, n, before):
        diff = g - before if step > 1 else np.zeros_like(g)
        ahead = g + on_diff * diff
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (diff - v)
        n[:] = beta3 * n + (1 - beta3) * ahead * ahead
        before[:] = g
        step_size = lr / (1 - beta1**step)
        diff_step_size = lr * on_diff / (1 - beta2**step)
        p -= (step_size * m + diff_step_size * v) / (corrected_root(n, beta3, step, eps_root) + eps)


def schedule_free_weight(weight_sum: Array, lr_max: Array, step: int, lr: float, r: float, weight_lr_power: float) -> float:
    """The weight of this step in the average of all so far; the numbers are updated."""
    largest = lr if lr > lr_max else float(lr_max)
    weight = power(step, r) * power(largest, weight_lr_power)
    total = float(weight_sum) + weight
    lr_max[...], weight_sum[...] = largest, total
    return weight / total if total != 0 else 0.0


def schedule_free_sgd(
    param: Array,
    grad: Array,
    z: Array,
    weight_sum: Array,
    lr_max: Array,
    *,
    step: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    **stages: Unpack[Stages],
) -> None:
    """Schedule-Free SGD; see :class:`fusedstep.ScheduleFreeSGD`."""
    weight = schedule_free_weight(weight_sum, lr_max, step, lr, r, weight_lr_power)
    with operands(param, grad, z, lr=lr, **stages) as (y, g, fast):
        y += weight * (fast - y)
        y -= lr * (1 - momentum * (1 - weight)) * g
        fast -= lr * g


def schedule_free_adamw(
    param: Array,
    grad: Array,
    z: Array,
    exp_avg_sq: Array,
    weight_sum: Array,
    lr_max: Array,
    *,
    step: int,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    **stages: Unpack[Stages],
) -> None:
    """Schedule-Free AdamW; see :class:`fusedstep.ScheduleFreeAdamW`."""
    beta1, beta2 = betas
    weight_decay = rule_decay(stages)
    weight = schedule_free_weight(weight_sum, lr_max, step, lr, r, weight_lr_power)
    with operands(param, grad, z, exp_avg_sq, lr=lr, **stages) as (y, g, fast, v):
        v[:] = beta2 * v + (1 - beta2) * g * g
        direction = g / (corrected_root(v, beta2, step) + eps) + weight_decay * y
        y += weight * (fast - y)
        y -= lr * (1 - beta1 * (1 - weight)) * direction
        fast -= lr * direction
