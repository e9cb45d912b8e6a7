"""State to and from Keras 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _hyper, reference
from ..optimizer import Optimizer
from ..state import FACTORS, NUMBER
from .common import DECAYS, Hypers, check_decay, check_rule, check_same, check_shape, exported, imported, in_order, parts_of

STATES = {
    "SGD": {"momentum": "momentum_buffer"},
    "Adagrad": {"accumulator": "sum"},
    "Adadelta": {"accumulated_grad": "square_avg", "accumulated_delta_var": "acc_delta"},
    "Adafactor": {"_r": "row_var", "_c": "col_var", "_v": "variance"},
    "RMSprop": {"velocity": "square_avg", "average_gradient": "grad_avg", "momentum": "momentum_buffer"},
    "Adam": {"momentum": "exp_avg", "velocity": "exp_avg_sq", "velocity_hat": "max_exp_avg_sq"},
    "NAdam": {"momentum": "exp_avg", "velocity": "exp_avg_sq"},
    "LAMB": {"momentum": "exp_avg", "velocity": "exp_avg_sq"},
    "Adamax": {"momentum": "exp_avg", "norm": "exp_inf"},
    "Lion": {"momentum": "exp_avg"},
    "FTRL": {"accumulator": "accumulator", "linear": "linear"},
    "Muon": {"momentum": "momentum_buffer"},  # other arrays have those of AdamW
    "ScheduleFreeAdamW": {"momentum": "z", "velocity": "exp_avg_sq"},
}
STATES["AdamW"] = STATES["Adam"]
"""Names of states by how the names of variables end, or where these have no names by the attribute that lists them."""

NUMBERS: dict[str, Callable[[int, float], dict[str, float]]] = {
    "ScheduleFreeAdamW": lambda step, lr: {"weight_sum": step, "lr_max": lr},
}
"""Numbers for each array that follow there from the number of steps and the learning rate."""

CONSTANTS: dict[str, dict[str, Any]] = {
    "Adafactor": {"min_dim_size_to_factor": 0},
    "NAdam": {"momentum_decay": 1.0},
    "Muon": {"eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"},
}
"""Hyper-parameters here that are constants there."""

CONSTANTS_HERE = {"learning_rate_power": -0.5, "rms_rate": 0.2}
"""Those there that are constants here."""

NONE_HERE = (
    "use_ema", "loss_scale_factor", "gradient_accumulation_steps", "l2_shrinkage_regularization_strength", "warmup_steps",
)  # fmt: skip
"""Those there that have nothing to do with the rule here, or that it does not have."""

HYPER = {
    "lr": ("learning_rate",),
    "betas": ("beta_1", "beta_2"),
    "eps": ("epsilon", "epsilon_1", "epsilon_2"),
    "alpha": ("rho",),
    "beta2_decay": ("beta_2_decay",),
    "d": ("clip_threshold",),
    "ns_coefficients": ("muon_a", "muon_b", "muon_c"),
    "adamw_lr_ratio": ("adam_lr_ratio",),
    "adamw_betas": ("adam_beta_1", "adam_beta_2"),
    "adamw_eps": ("epsilon",),
    "adamw_weight_decay": ("adam_weight_decay",),
    "clip_norm_per_array": ("clipnorm",),
    "clip_value": ("clipvalue",),
}
"""Those that have other names there, or are several numbers."""


def from_keras(opt: Optimizer, keras_optimizer: Any, *, names: Sequence[str] | None = None) -> dict[str, Any]:
    """A state dict for `opt` with what an optimizer of Keras 3 holds.

    Parameters
    ----------
    opt : Optimizer
        Of the same rule, with ``convention="keras"``. It is not changed.
    keras_optimizer : keras.optimizers.Optimizer
        Built; on any backend.
    names : sequence of str, optional
        The names that the variables of Keras have in `opt`, in the order it was built with; by default that of `opt`.

    Returns
    -------
    dict
        For ``opt.load_state_dict``. Hyper-parameters are those of Keras, clipping included; the learning rate too, unless it
        is a schedule there: it has to be one here then, and stays.

    Raises
    ------
    TypeError, ValueError
        If rule or number of variables differ, or Keras accumulates, averages or scales, or its Muon takes other arrays for
        matrices. All else ``opt.load_state_dict`` checks.

    Examples
    --------
    >>> import fusedstep as fs
    >>> opt.load_state_dict(fs.interop.from_keras(opt, model.optimizer))     # doctest: +SKIP

    References
    ----------
    ``keras.src.optimizers``; a velocity of its SGD is minus the ``momentum_buffer`` here.
    """
    _, variables, hypers = keras_parts(opt, keras_optimizer, names)
    step, rate = int(np.asarray(keras_optimizer.iterations)), float(np.asarray(keras_optimizer.learning_rate))
    numbers = NUMBERS[type(opt).__name__](step, rate) if opt._numbers else {}
    states = {
        name: {key: np.asarray(value, NUMBER.dtype) for key, value in numbers.items()}
        | {key: np.asarray(variable) for key, variable in own.items()}
        for name, own in variables.items()
    }
    if not has_constant_rate(keras_optimizer):
        for i, group in enumerate(opt.param_groups):
            if not callable(group["lr"]):
                raise ValueError(f"param_groups[{i}]['lr']: expected a schedule like that of Keras, got {group['lr']!r}")
    decay = {"decoupled_weight_decay": True, "decay_mode": None}
    hypers = {name: {**own, **decay} for name, own in hypers.items()}
    return imported(opt, step, states, hypers, {"clip_norm": keras_optimizer.global_clipnorm or None})


def to_keras(opt: Optimizer, keras_optimizer: Any, *, names: Sequence[str] | None = None) -> None:
    """Assign the state of `opt` to the variables of an optimizer of Keras 3.

    Parameters
    ----------
    opt : Optimizer
        With ``convention="keras"``.
    keras_optimizer : keras.optimizers.Optimizer
        Of the same rule and with the same hyper-parameters, built. Its variables are changed in place: the iterations, the
        states, and the learning rate unless it is a schedule there.
    names : sequence of str, optional
        The names that the variables of Keras have in `opt`, in the order it was built with; by default that of `opt`.

    Raises
    ------
    TypeError, ValueError
        If rule, variables or hyper-parameters differ, or `opt` uses what Keras does not have: ``l1``, ``bounds``,
        ``maximize``, other kinds of weight decay. Nothing has changed then.

    Examples
    --------
    >>> import fusedstep as fs
    >>> fs.interop.to_keras(opt, model.optimizer)                            # doctest: +SKIP

    References
    ----------
    ``keras.src.optimizers``.
    """
    ordered, variables, theirs = keras_parts(opt, keras_optimizer, names)
    step, hypers, states = exported(opt)
    ours: Hypers = {}
    for i, (group, values) in enumerate(zip(opt.param_groups, hypers)):
        check_same(values, {"l1": 0.0, "bounds": None, "maximize": False}, f"param_groups[{i}]", "keras")
        check_decay(values, f"param_groups[{i}]", "keras", ("decoupled",))
        ours |= dict.fromkeys(group["names"], values)
    clip_norm = _hyper.resolve("clip_norm", opt.clip_norm, step, "clip_norm")
    check_same({"clip_norm": clip_norm}, {"clip_norm": keras_optimizer.global_clipnorm or None}, "opt", "keras")
    changes: list[tuple[Any, Any]] = [(keras_optimizer.iterations, step)]
    for name in ordered:
        # What accumulators started with has become part of them.
        same = {key: value for key, value in theirs[name].items() if key not in ("lr", "initial_accumulator_value")}
        check_same(ours[name], same, f"params[{name!r}]", "keras")
        for key, array in states[name].items():
            if key in opt._numbers:
                continue
            check_shape(array, variables[name][key].shape, f"keras_optimizer: {key} of params[{name!r}]")
            changes.append((variables[name][key], array))
    if has_constant_rate(keras_optimizer):
        rates = sorted({values["lr"] for values in hypers})
        if len(rates) != 1:
            raise ValueError(f"lr: expected one for all groups as in Keras, got {rates}")
        keras_optimizer.learning_rate = rates[0]
    if hasattr(keras_optimizer, "_u_product"):  # of Nadam
        beta1, _ = hypers[0]["betas"]
        changes.append((keras_optimizer._u_product, reference.rules.nadam_product(step, beta1, hypers[0]["momentum_decay"])))
    for variable, value in changes:
        variable.assign(value)


def keras_parts(
    opt: Optimizer, keras_optimizer: Any, names: Sequence[str] | None
) -> tuple[list[str], dict[str, dict[str, Any]], Hypers]:
    """Names in the order of Keras; its variables and hyper-parameters by what they are called here."""
    check_rule(opt, "keras", STATES)
    rule, label = type(opt).__name__, "keras_optimizer"
    if rule.lower() not in [kind.__name__.lower() for kind in type(keras_optimizer).__mro__]:
        raise TypeError(f"{label}: expected an optimizer {rule} of Keras, got {type(keras_optimizer).__name__}")
    if not keras_optimizer.built:
        raise ValueError(f"{label}: expected one that is built, got one without variables")
    config = keras_optimizer.get_config()
    for key in NONE_HERE:
        if config.get(key):
            raise ValueError(f"{label}: expected no {key}, got {config[key]!r}")
    for key, wanted in CONSTANTS_HERE.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{label}: expected {key}={wanted}, got {config[key]!r}")
    trained = keras_optimizer._trainable_variables
    ordered = in_order(names, opt._params.names)
    if len(trained) != len(ordered):
        raise ValueError(f"{label}: expected variables for {ordered}, got {len(trained)}")
    resolved = opt._resolve(opt.param_groups, opt.steps)
    parts = parts_of(opt, resolved)
    tables = {name: STATES[parts[name].rule.__name__] for name in ordered}
    suffixes = {suffix for part in opt._parts(resolved) for suffix in STATES[part.rule.__name__]}
    variables: dict[str, dict[str, Any]] = {name: {} for name in ordered}
    for suffix in sorted(suffixes):
        if suffix.startswith("_"):
            found = [variable for variable in getattr(keras_optimizer, suffix, ()) if variable is not None]
        else:
            found = [variable for variable in keras_optimizer.variables if variable.name.endswith(f"_{suffix}")]
        owners = [name for name in ordered if suffix in tables[name]]
        if found and len(found) != len(owners):
            raise ValueError(f"{label}: expected one {suffix} for each of {owners}, got {len(found)}")
        for name, variable in zip(owners, found):
            variables[name][tables[name][suffix]] = variable
    for name, variable in zip(ordered, trained):
        if FACTORS.keys() & variables[name].keys():  # without placeholders, and what rows and columns make
            is_matrix = len(variable.shape) >= 2
            variables[name] = {key: each for key, each in variables[name].items() if (key in FACTORS) == is_matrix}
    for key in ("clipnorm", "clipvalue"):
        config[key] = config[key] or None  # 0 is none
    known: dict[str, Any] = {}
    for key in opt._group_defaults:
        values = [config[theirs] for theirs in HYPER.get(key, (key,)) if theirs in config]
        if values:
            known[key] = values[0] if len(values) == 1 else tuple(values)
    known |= CONSTANTS.get(rule, {})
    own, others = (known.pop(key, None) or 0.0 for key in DECAYS)
    hypers: Hypers = {}
    for name, variable in zip(ordered, trained):
        key, decay = (DECAYS[0], own) if parts[name].rule is type(opt) else (DECAYS[1], others)
        hypers[name] = {**known, key: decay if keras_optimizer._use_weight_decay(variable) else 0.0}
    return ordered, variables, hypers


def has_constant_rate(keras_optimizer: Any) -> bool:
    return isinstance(keras_optimizer.get_config()["learning_rate"], float)
