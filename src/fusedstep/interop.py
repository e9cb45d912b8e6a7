"""State to and from PyTorch, Keras and optax: begin a run there and go on here, and back.

    opt.load_state_dict(fs.interop.from_torch(opt, torch_opt.state_dict()))
    torch_opt.load_state_dict(fs.interop.to_torch(opt))

What comes from elsewhere becomes a state dict of `opt`, which :meth:`Optimizer.load_state_dict` checks whole before anything
changes. `opt` needs the convention of the other library; the parameters themselves are for the user to copy. What only `opt`
has (averages, what is kept of 16-bit parameters, ``l1``, hyper-parameters that are callables) stays when state comes in;
going out, what would change the equations there is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _arrays, _hyper, reference
from .optimizer import Optimizer, Part
from .state import AVERAGE, FACTORS, NUMBER, RESIDUAL_NAMES, SCALE, shape_of

Array = NDArray[Any]
Arrays = dict[str, dict[str, Array]]
Hypers = dict[str, dict[str, Any]]
"""Hyper-parameters by the name of a parameter."""
Change = Callable[[str, str, str, Any], Any]
"""Of a leaf of an optax state, given its label, the state it is here, the name of the parameter, and itself."""

LIBRARIES = {"torch": "PyTorch", "keras": "Keras", "optax": "optax"}

TORCH_RULES = {
    **dict.fromkeys(("SGD", "Adagrad", "Adadelta", "Adafactor", "RMSprop", "Adamax", "ASGD"), ("coupled",)),
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam"), ("coupled", "decoupled")),
    "Muon": ("decoupled",),
    "Rprop": (),
}
"""Those whose states and hyper-parameters have the names they have here, with the kinds of weight decay they know."""

TORCH_UNCOUNTED = ("SGD", "Muon")
"""Rules that do not count steps there."""

KERAS_STATES = {
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
KERAS_STATES["AdamW"] = KERAS_STATES["Adam"]
"""Names of states by how the names of variables end, or where these have no names by the attribute that lists them."""

KERAS_NUMBERS: dict[str, Callable[[int, float], dict[str, float]]] = {
    "ScheduleFreeAdamW": lambda step, lr: {"weight_sum": step, "lr_max": lr},
}
"""Numbers for each array that follow there from the number of steps and the learning rate."""

CONSTANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("torch", "Adafactor"): {"min_dim_size_to_factor": 0},
    ("torch", "Muon"): {"maximize": False},
    ("keras", "Adafactor"): {"min_dim_size_to_factor": 0},
    ("keras", "NAdam"): {"momentum_decay": 1.0},
    ("keras", "Muon"): {"eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"},
}
"""Hyper-parameters here that are constants there."""

CONSTANTS_FOR_KERAS = {"learning_rate_power": -0.5, "rms_rate": 0.2}
"""Those there that are constants here."""

NONE_FOR_KERAS = (
    "use_ema", "loss_scale_factor", "gradient_accumulation_steps", "l2_shrinkage_regularization_strength", "warmup_steps",
)  # fmt: skip
"""Those there that have nothing to do with the rule here, or that it does not have."""

KERAS_HYPER = {
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

OPTAX_STATES = {
    "SGD": {"TraceState": {"trace": "momentum_buffer"}},
    "Adagrad": {"ScaleByRssState": {"sum_of_squares": "sum"}},
    "Adadelta": {"ScaleByAdaDeltaState": {"e_g": "square_avg", "e_x": "acc_delta"}},
    "Adafactor": {"FactoredState": {"v_row": "row_var", "v_col": "col_var", "v": "variance"}},
    "RMSprop": {
        "ScaleByRmsState": {"nu": "square_avg"},
        "ScaleByRStdDevState": {"nu": "square_avg", "mu": "grad_avg"},
        "TraceState": {"trace": "momentum_buffer"},
    },
    "Adam": {
        "ScaleByAdamState": {"mu": "exp_avg", "nu": "exp_avg_sq"},
        "ScaleByAmsgradState": {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"},
    },
    "LARS": {"TraceState": {"trace": "momentum_buffer"}},
    "Adamax": {"ScaleByAdamState": {"mu": "exp_avg", "nu": "exp_inf"}},
    "Lion": {"ScaleByLionState": {"mu": "exp_avg"}},
    "Signum": {"EmaState": {"ema": "momentum_buffer"}},
    "AdaBelief": {"ScaleByBeliefState": {"mu": "exp_avg", "nu": "exp_avg_var"}},
    "Yogi": {"ScaleByAdamState": {"mu": "exp_avg", "nu": "exp_avg_sq"}},
    "Rprop": {"ScaleByRpropState": {"prev_updates": "prev", "step_sizes": "step_size"}},
    "Adan": {"ScaleByAdanState": {"m": "exp_avg", "v": "exp_avg_diff", "n": "exp_avg_sq", "g": "pre_grad"}},
    "NovoGrad": {"ScaleByNovogradState": {"mu": "exp_avg", "nu": "exp_avg_sq"}},
    "Prodigy": {
        "ProdigyState": {
            "exp_avg": "exp_avg",
            "exp_avg_sq": "exp_avg_sq",
            "grad_sum": "s",
            "params0": "p0",
            "estim_lr": "d",
            "numerator_weighted": "d_numerator",
        }
    },
    "Muon": {
        "MuonState": {"mu": "momentum_buffer"},
        "ScaleByAdamState": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    },
    "ScheduleFreeSGD": {"ScheduleFreeState": {"z": "z", "weight_sum": "weight_sum", "max_lr": "lr_max"}},
    "ScheduleFreeAdamW": {
        "ScheduleFreeState": {"z": "z", "weight_sum": "weight_sum", "max_lr": "lr_max"},
        "ScaleByRmsWithCountState": {"nu": "exp_avg_sq"},
    },
}
OPTAX_STATES |= dict.fromkeys(("AdamW", "NAdam", "RAdam", "LAMB"), OPTAX_STATES["Adam"])
"""Names of states by the class and field that hold them."""

OPTAX_WRAPPERS = ("EmptyState", "ScaleByScheduleState", "MaskedState", "PartitionState", "InjectStatefulHyperparamsState")
"""Other classes in a chain, which hold a count, further states, or nothing."""

OPTAX_INNER = ("inner_state", "inner_states", "base_optimizer_state")
"""Fields with further states."""

OPTAX_COUNTS = {"count": 0, "t": 0, "step_count": 1}
"""Fields with a number of steps, and what they start from."""

DECAYS = ("weight_decay", "adamw_weight_decay")
"""Those of a rule's own arrays, and of others."""

OWN = {AVERAGE, *RESIDUAL_NAMES}
"""States that only fusedstep has."""

OF_OTHER_SIGN = {
    ("keras", "SGD", "momentum_buffer"),
    ("optax", "RMSprop", "momentum_buffer"),
    ("optax", "LARS", "momentum_buffer"),
}
"""Velocities that are added to the parameters there, and subtracted here."""


# ---- PyTorch ------------------------------------------------------------------------------------------------------------


def from_torch(
    opt: Optimizer, state_dict: Mapping[str, Any], *, names: Sequence[str] | None = None, step: int | None = None
) -> dict[str, Any]:
    """A state dict for `opt` with what a state dict of ``torch.optim`` holds.

    Parameters
    ----------
    opt : Optimizer
        Of the same rule, with ``convention="torch"``. It is not changed.
    state_dict : mapping
        Of the optimizer of PyTorch: ``"state"`` and ``"param_groups"``. Its tensors may be on any device, of any type that
        the type of the state here includes, or NumPy arrays.
    names : sequence of str, optional
        The names that PyTorch's parameters have in `opt`, in PyTorch's order. By default both have the same parameters in
        the same groups and in the same order.
    step : int, optional
        Number of steps taken. Needed for SGD and Muon, which do not count them in PyTorch.

    Returns
    -------
    dict
        For ``opt.load_state_dict``. Hyper-parameters are PyTorch's; clipping, which is not the optimizer's there, and what
        PyTorch does not have are those of `opt`.

    Raises
    ------
    TypeError, ValueError
        If number or groups of the parameters differ, they have not all taken the same number of steps, or hyper-parameters
        of the rule are missing. All else ``opt.load_state_dict`` checks.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(2)
    >>> opt = fs.SGD({"w": w}, lr=0.1, momentum=0.9)
    >>> group = {"lr": 0.5, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0]}
    >>> theirs = {"state": {0: {"momentum_buffer": np.array([1.0, 2.0])}}, "param_groups": [group]}
    >>> opt.load_state_dict(fs.interop.from_torch(opt, theirs, step=3))
    >>> opt.step({"w": np.zeros(2)}).step
    4
    >>> w
    array([0.55, 0.1 ])

    References
    ----------
    ``torch.optim.Optimizer.state_dict``.
    """
    check_rule(opt, "torch", TORCH_RULES)
    label = "state_dict"
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"{label}: expected that of an optimizer of PyTorch, got a {type(state_dict).__name__} without its keys"
        )
    groups = state_dict["param_groups"]
    ordered = in_order(names, by_groups(opt))
    sizes, own_sizes = [len(group["params"]) for group in groups], [len(group["names"]) for group in opt.param_groups]
    if sum(sizes) != len(ordered):
        raise ValueError(f"{label}['param_groups']: expected parameters for {ordered}, got {sum(sizes)}")
    if names is None and sizes != own_sizes:
        raise ValueError(
            f"names: expected the order of PyTorch, whose groups have {sizes} parameters, not {own_sizes}; got none"
        )
    left = iter(ordered)
    counts: dict[str, float] = {}
    hypers: Hypers = {}
    states: dict[str, dict[str, Any]] = {}
    has_uncounted = False
    for i, group in enumerate(groups):
        hyper = torch_hyper(opt, group, f"{label}['param_groups'][{i}]")
        for number, name in zip(group["params"], left):
            own = {key: value for key, value in state_dict["state"].get(number, {}).items() if value is not None}
            scalars = {key: own.pop(key) for key in torch_scalars(opt, 0, hyper) if key in own}
            if "step" in scalars:
                counts[f"params[{name!r}]"] = float(scalars["step"])
            elif own:
                has_uncounted = True  # the first step of SGD has made its buffer
            elif opt._states(hyper):
                counts[f"params[{name!r}]"] = 0
            hypers[name], states[name] = hyper, own
    return imported(opt, the_step(counts, step, label, least=int(has_uncounted)), states, hypers, {})


def to_torch(opt: Optimizer, *, names: Sequence[str] | None = None) -> dict[str, Any]:
    """A state dict for ``load_state_dict`` of the same optimizer in ``torch.optim``.

    Parameters
    ----------
    opt : Optimizer
        With ``convention="torch"``.
    names : sequence of str, optional
        The names that PyTorch's parameters have in `opt`, in PyTorch's order; by default it has the same groups and order.

    Returns
    -------
    dict
        With copies of all state as tensors. Hyper-parameters are the present ones. Clipping and averages, which are not the
        optimizer's in PyTorch, are left out, as are its own settings like ``fused``: loaded, they get their defaults.

    Raises
    ------
    ImportError
        If there is no PyTorch.
    ValueError
        If `opt` uses what PyTorch's equations do not have: ``l1``, ``bounds``, other kinds of weight decay.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> opt = fs.Adam({"w": np.ones(2)})
    >>> fs.interop.to_torch(opt)["state"][0]["exp_avg"]                      # doctest: +SKIP
    tensor([0., 0.], dtype=torch.float64)

    References
    ----------
    ``torch.optim.Optimizer.load_state_dict``.
    """
    check_rule(opt, "torch", TORCH_RULES)
    torch = library("torch")
    rule = type(opt).__name__
    kinds = TORCH_RULES[rule]
    ordered = in_order(names, by_groups(opt))
    number = {name: i for i, name in enumerate(ordered)}
    step, hypers, states = exported(opt)
    for (name, part), param in zip(parts_of(opt, hypers).items(), opt._params):
        if part.rule is not type(opt):
            raise ValueError(f"params[{name!r}]: expected a matrix for {rule} of PyTorch, got shape {param.shape}")
    groups = []
    for i, (group, values) in enumerate(zip(opt.param_groups, hypers)):
        check_same(values, {"l1": 0.0, "bounds": None, **constants(opt)}, f"param_groups[{i}]", "torch")
        decay = check_decay(values, f"param_groups[{i}]", "torch", kinds)
        known = {key: values[key] for key in torch_keys(opt)}
        if len(kinds) > 1:
            known["decoupled_weight_decay"] = decay == "decoupled"
        groups.append({**known, "params": sorted(number[name] for name in group["names"])})
    groups.sort(key=lambda group: group["params"])
    if [n for group in groups for n in group["params"]] != list(range(len(ordered))):
        raise ValueError(f"names: expected those of each group together, as PyTorch has them, got {ordered}")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    result: dict[int, dict[str, Any]] = {}
    for group in groups:
        scalars = torch_scalars(opt, step, group)
        for n in group["params"]:
            own = {key: torch.from_numpy(array) for key, array in states[ordered[n]].items()}
            if not scalars and step == 0:
                own = {}  # no buffer yet: the first step does not dampen
            result[n] = {**{key: torch.tensor(float(value), dtype=dtype) for key, value in scalars.items()}, **own}
    return {"state": result, "param_groups": groups}


def torch_scalars(opt: Optimizer, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
    """What PyTorch keeps as numbers for each parameter, and here follows from the number of steps."""
    rule = type(opt).__name__
    if rule in TORCH_UNCOUNTED:
        return {}
    if rule == "NAdam":
        return {"step": step, "mu_product": reference.nadam_product(step, hyper["betas"][0], hyper["momentum_decay"])}
    if rule == "ASGD":  # of the next step
        eta = hyper["lr"] / (1 + hyper["lambd"] * hyper["lr"] * step) ** hyper["alpha"]
        return {"step": step, "eta": eta, "mu": 1 / max(1, step - hyper["t0"])}
    return {"step": step}


def torch_keys(opt: Optimizer) -> list[str]:
    """The hyper-parameters that are called the same in a group of PyTorch, and always there."""
    decay = ["weight_decay"] if TORCH_RULES[type(opt).__name__] else []
    left_out = {*_hyper.OPTION_DEFAULTS, *constants(opt)}
    own = [key for key in opt._group_defaults if key not in left_out and _hyper.is_known(key, "torch")]
    return [*(key for key in own if not key.startswith("adamw_")), *decay, "maximize"]


def torch_hyper(opt: Optimizer, group: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Hyper-parameters of a group of PyTorch as they are called here."""
    for key in torch_keys(opt):
        if key not in group and key != "maximize":
            raise ValueError(f"{label}[{key!r}]: expected a hyper-parameter of {type(opt).__name__}, got none")
    # What older versions of PyTorch had no key for, and some of its rules have none for today.
    theirs = {**_hyper.OPTION_DEFAULTS, **opt._option_defaults, **group}
    known = (*torch_keys(opt), "weight_decay", "decoupled_weight_decay")
    return {**{key: as_numbers(theirs[key]) for key in known}, **constants(opt), "decay_mode": None}


# ---- Keras --------------------------------------------------------------------------------------------------------------


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
    numbers = KERAS_NUMBERS[type(opt).__name__](step, rate) if opt._numbers else {}
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
        changes.append((keras_optimizer._u_product, reference.nadam_product(step, beta1, hypers[0]["momentum_decay"])))
    for variable, value in changes:
        variable.assign(value)


def keras_parts(
    opt: Optimizer, keras_optimizer: Any, names: Sequence[str] | None
) -> tuple[list[str], dict[str, dict[str, Any]], Hypers]:
    """Names in the order of Keras; its variables and hyper-parameters by what they are called here."""
    check_rule(opt, "keras", KERAS_STATES)
    rule, label = type(opt).__name__, "keras_optimizer"
    if rule.lower() not in [kind.__name__.lower() for kind in type(keras_optimizer).__mro__]:
        raise TypeError(f"{label}: expected an optimizer {rule} of Keras, got {type(keras_optimizer).__name__}")
    if not keras_optimizer.built:
        raise ValueError(f"{label}: expected one that is built, got one without variables")
    config = keras_optimizer.get_config()
    for key in NONE_FOR_KERAS:
        if config.get(key):
            raise ValueError(f"{label}: expected no {key}, got {config[key]!r}")
    for key, wanted in CONSTANTS_FOR_KERAS.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{label}: expected {key}={wanted}, got {config[key]!r}")
    trained = keras_optimizer._trainable_variables
    ordered = in_order(names, opt._names)
    if len(trained) != len(ordered):
        raise ValueError(f"{label}: expected variables for {ordered}, got {len(trained)}")
    resolved = opt._resolve(opt.param_groups, opt.steps)
    parts = parts_of(opt, resolved)
    tables = {name: KERAS_STATES[parts[name].rule.__name__] for name in ordered}
    suffixes = {suffix for part in opt._parts(resolved) for suffix in KERAS_STATES[part.rule.__name__]}
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
        values = [config[theirs] for theirs in KERAS_HYPER.get(key, (key,)) if theirs in config]
        if values:
            known[key] = values[0] if len(values) == 1 else tuple(values)
    known |= constants(opt)
    own, others = (known.pop(key, None) or 0.0 for key in DECAYS)
    hypers: Hypers = {}
    for name, variable in zip(ordered, trained):
        key, decay = (DECAYS[0], own) if parts[name].rule is type(opt) else (DECAYS[1], others)
        hypers[name] = {**known, key: decay if keras_optimizer._use_weight_decay(variable) else 0.0}
    return ordered, variables, hypers


def has_constant_rate(keras_optimizer: Any) -> bool:
    return isinstance(keras_optimizer.get_config()["learning_rate"], float)


# ---- optax --------------------------------------------------------------------------------------------------------------


def from_optax(opt: Optimizer, opt_state: Any, *, step: int | None = None) -> dict[str, Any]:
    """A state dict for `opt` with what a state of optax holds.

    Parameters
    ----------
    opt : Optimizer
        With ``convention="optax"``, and parameters of the same structure: they are matched by name. It is not changed.
    opt_state : tree
        Of the optimizer of optax with the equations of `opt`, also in chains, masked, partitioned, or with injected
        hyper-parameters. Several share a kind of state: whose it is, it does not say.
    step : int, optional
        Number of steps taken. Needed if nothing in `opt_state` counts them.

    Returns
    -------
    dict
        For ``opt.load_state_dict``. Hyper-parameters are those of `opt`: optax does not keep them in its state.

    Raises
    ------
    ImportError
        If there is no JAX.
    TypeError, ValueError
        If there is a state of another kind in `opt_state`, or counts differ. All else ``opt.load_state_dict`` checks.

    Examples
    --------
    >>> import fusedstep as fs
    >>> opt.load_state_dict(fs.interop.from_optax(opt, opt_state))           # doctest: +SKIP

    References
    ----------
    ``optax.transforms``; a velocity of its ``rmsprop`` is minus the ``momentum_buffer`` here.
    """
    check_rule(opt, "optax", OPTAX_STATES)
    counts: dict[str, float] = {}
    states: dict[str, dict[str, Any]] = {name: {} for name in opt._names}

    def take(label: str, key: str, name: str, leaf: Any) -> Any:
        if key == "step":
            counts[label] = int(leaf)
        elif key in states.setdefault(name, {}):
            raise ValueError(f"{label}: expected one {key} of params[{name!r}], got a second")
        else:
            states[name][key] = np.asarray(leaf)
        return leaf

    with_changes(opt, opt_state, "opt_state", take)
    return imported(opt, the_step(counts, step, "opt_state"), states, {}, {})


def to_optax(opt: Optimizer, opt_state: Any) -> Any:
    """A state of optax with the arrays and counts of `opt`.

    Parameters
    ----------
    opt : Optimizer
        With ``convention="optax"``. Hyper-parameters are for the user to give to optax.
    opt_state : tree
        A state of the optax optimizer to go on with, for parameters of the same structure. It is not changed.

    Returns
    -------
    tree
        A state of the same structure and types.

    Raises
    ------
    ImportError
        If there is no JAX.
    TypeError, ValueError
        If there is a state of another kind in `opt_state`, or one too many or missing, or shapes differ.

    Examples
    --------
    >>> import fusedstep as fs
    >>> opt_state = fs.interop.to_optax(opt, optimizer.init(params))         # doctest: +SKIP

    References
    ----------
    ``optax.transforms``.
    """
    check_rule(opt, "optax", OPTAX_STATES)
    step, _, states = exported(opt)
    numpy = library("jax.numpy")

    def put(label: str, key: str, name: str, leaf: Any) -> Any:
        if key == "step":
            return numpy.asarray(step, leaf.dtype)
        if key not in states.get(name, {}):
            raise ValueError(f"{label}: expected no {key} of params[{name!r}], which opt does not have, got one")
        array = states[name].pop(key)
        check_shape(array, leaf.shape, f"{label}: {key} of params[{name!r}]")
        return numpy.asarray(array, leaf.dtype)

    result = with_changes(opt, opt_state, "opt_state", put)
    for name, left in states.items():
        for key in left:
            raise ValueError(f"opt_state: expected a place for {key} of params[{name!r}], got none")
    return result


def with_changes(opt: Optimizer, node: Any, label: str, change: Change) -> Any:
    """An optax state in which ``change(label, key, name, leaf)`` has replaced counts and the states of parameters."""
    kind = type(node).__name__
    if isinstance(node, dict):
        return {key: with_changes(opt, child, f"{label}[{key!r}]", change) for key, child in node.items()}
    if kind in ("tuple", "list"):
        return type(node)(with_changes(opt, child, f"{label}[{i}]", change) for i, child in enumerate(node))
    kinds = OPTAX_STATES[type(opt).__name__]
    if kind not in (*kinds, *OPTAX_WRAPPERS):
        raise TypeError(f"{label}: expected one of {', '.join((*kinds, *OPTAX_WRAPPERS))}, got {kind}")
    tree = library("jax.tree_util")
    new = {}
    for field, value in zip(node._fields, node):
        own = f"{label}.{field}"
        if field in OPTAX_INNER:
            new[field] = with_changes(opt, value, own, change)
        elif field in OPTAX_COUNTS:
            first = OPTAX_COUNTS[field]
            new[field] = change(own, "step", "", value - first) + first
        elif field in kinds.get(kind, {}):
            key = kinds[kind][field]
            leaves, structure = tree.tree_flatten_with_path(value)
            if key in opt._numbers and [path for path, _ in leaves] == [()]:  # one for all arrays
                changed = [change(own, key, name, value) for name in opt._names]
                if any(number != changed[0] for number in changed):
                    raise ValueError(f"{own}: expected the same {key} of all arrays, got {[float(x) for x in changed]}")
                new[field] = changed[0] if changed else value
                continue
            named = [(tree.keystr(path, simple=True, separator=".") or "0", leaf) for path, leaf in leaves]
            change_leaf = of_factors(opt, change) if kind == "FactoredState" else change
            new[field] = structure.unflatten([change_leaf(own, key, name, leaf) for name, leaf in named])
    return node._replace(**new)


def of_factors(opt: Optimizer, change: Change) -> Change:
    """The same change where rows are along the longer axis of a matrix, and there are placeholders of one element."""
    shapes: dict[str, tuple[int, ...]] = {name: param.shape for name, param in zip(opt._names, opt._params)}
    with opt._lock:
        states = opt._state_dict()["state"]

    def change_leaf(label: str, key: str, name: str, leaf: Any) -> Any:
        *_, n_rows, n_columns = 0, 0, *shapes.get(name, ())
        if key in FACTORS and n_rows > n_columns:
            (key,) = FACTORS.keys() - {key}
        is_placeholder = name in shapes and key not in states[name] and leaf.shape == (1,)
        return leaf if is_placeholder else change(label, key, name, leaf)

    return change_leaf


# ---- What all have in common --------------------------------------------------------------------------------------------


def imported(
    opt: Optimizer, step: int, states: Mapping[str, Mapping[str, Any]], hypers: Hypers, options: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict of `opt` with these in the place of its own."""
    saved = opt.state_dict()
    params = dict(zip(opt._names, opt._params))
    resolved = opt._resolve(opt.param_groups, saved["step"])
    for i, group in enumerate(saved["param_groups"]):
        new: dict[str, Any] = {}
        for name in group["names"]:
            for key, value in hypers.get(name, {}).items():
                if key in group and new.setdefault(key, value) != value:
                    label = f"{key} of param_groups[{i}]"
                    raise ValueError(f"{label}: expected one value for {group['names']}, got {new[key]!r} and {value!r}")
        group.update(new)
        resolved[i] = {**resolved[i], **new}
    parts = parts_of(opt, resolved)
    for name, own in states.items():
        here = {key: array for key, array in saved["state"].get(name, {}).items() if key in OWN}
        if step == 0 and name in parts:  # some libraries make their state in the first step
            here |= initial_states(parts[name], params[name])
        theirs = {key: as_state(opt, key, value, name, params.get(name)) for key, value in own.items()}
        saved["state"][name] = here | theirs
    saved["step"] = step
    saved["options"] |= options
    return saved


def parts_of(opt: Optimizer, resolved: list[dict[str, Any]]) -> dict[str, Part]:
    """Rule and hyper-parameters of each parameter."""
    return dict(zip(opt._names, map(opt._parts(resolved).__getitem__, opt._places(resolved))))


def initial_states(part: Part, param: Array) -> dict[str, Array]:
    """What the rule's states and numbers of a parameter hold before the first step."""
    rule, hyper = part
    dtype = reference.compute_dtype(param.dtype)
    states = {name: (shape_of(name, param.shape), rule._initial_state(name, hyper)) for name in rule._states(hyper)}
    arrays = {name: np.full(shape, param if fill is None else fill, dtype) for name, (shape, fill) in states.items()}
    return arrays | {name: np.full_like(NUMBER, rule._initial_state(name, hyper)) for name in rule._numbers}


def exported(opt: Optimizer) -> tuple[int, list[dict[str, Any]], Arrays]:
    """Number of steps, hyper-parameters of each group, and copies of the rule's states as the other library has them."""
    saved = opt.state_dict()
    resolved = opt._resolve(opt.param_groups, saved["step"])
    params = dict(zip(opt._names, opt._params))
    states: Arrays = {}
    for group in opt.param_groups:
        for name in group["names"]:
            own, axes, dtype = saved["state"][name], saved["memory_axes"][name], reference.compute_dtype(params[name].dtype)
            keys = [key for key in own if key not in OWN and not key.endswith(SCALE)]
            exact = {key: reference.load_state(own[key], own.get(key + SCALE), axes, dtype) for key in keys}
            states[name] = {key: as_there(opt, key, array) for key, array in exact.items()}
    return saved["step"], resolved, states


def as_state(opt: Optimizer, key: str, value: Any, name: str, param: Array | None) -> Array:
    """A copy of a state from elsewhere, in the type it has here if that includes its own: the rest is load_state_dict's."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # unknown to NumPy
            value = value.float()
    array = np.asarray(value) if hasattr(value, "__array__") else _arrays.as_array(value, f"{key} of params[{name!r}]")
    dtype = array.dtype if param is None else reference.compute_dtype(param.dtype)
    if key in opt._numbers:
        dtype = NUMBER.dtype
    if key in FACTORS and opt.convention != "torch":
        array = np.expand_dims(array, FACTORS[key])
    return signed(opt, key, array.astype(dtype if np.can_cast(array.dtype, dtype) else array.dtype))


def as_there(opt: Optimizer, key: str, array: Array) -> Array:
    """A state as the other library has it: means of rows and of columns without an axis for the latter and the former."""
    if key in FACTORS and opt.convention != "torch":
        array = array.squeeze(FACTORS[key])
    return signed(opt, key, array)


def signed(opt: Optimizer, key: str, array: Array) -> Array:
    return np.asarray(-array) if (opt.convention, type(opt).__name__, key) in OF_OTHER_SIGN else array


def constants(opt: Optimizer) -> dict[str, Any]:
    return CONSTANTS.get((opt.convention, type(opt).__name__), {})


def as_numbers(value: Any) -> Any:
    """A hyper-parameter as numbers of Python, which may have been tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(map(as_numbers, value))
    return value.item() if hasattr(value, "item") else value


def the_step(counts: Mapping[str, float], step: int | None, label: str, least: int = 0) -> int:
    """The number of steps that all counts, and the argument, agree on; least is 1 if something uncounted took steps."""
    if step is not None:
        counts = {"step": _hyper.whole_number(step, "step", least), **counts}
    elif not counts or least:
        raise ValueError(f"step: expected the number of steps taken, got none, and {label} does not tell it")
    first, wanted = next(iter(counts.items()))
    for name, count in counts.items():
        if count != wanted or not float(count).is_integer():
            raise ValueError(f"{name}: expected the same whole number of steps as {first}, {wanted}, got {count}")
    return int(wanted)


def in_order(names: Sequence[str] | None, own: list[str]) -> list[str]:
    """The names given, which are to be these; these if none are given."""
    if names is not None and (len(names) != len(own) or set(names) != set(own)):
        raise ValueError(f"names: expected {own} in some order, got {names!r}")
    return list(own if names is None else names)


def by_groups(opt: Optimizer) -> list[str]:
    return [name for group in opt.param_groups for name in group["names"]]


def check_rule(opt: Any, convention: str, rules: Mapping[str, Any]) -> None:
    """Refuse optimizers that the library does not have, or has with other equations."""
    rule, library = type(opt).__name__, LIBRARIES[convention]
    if rule not in rules:
        raise TypeError(f"opt: expected one of {', '.join(rules)} for {library}, got {rule}")
    if opt.convention != convention:
        raise ValueError(f"opt: expected convention={convention!r} for the equations of {library}, got {opt.convention!r}")


def check_same(values: Mapping[str, Any], wanted: Mapping[str, Any], label: str, convention: str) -> None:
    """Refuse hyper-parameters that are others in the other library, or that it does not have."""
    for key, value in wanted.items():
        if values[key] != value:
            raise ValueError(f"{key} of {label}: expected {value!r} as in {LIBRARIES[convention]}, got {values[key]!r}")


def check_decay(values: Mapping[str, Any], label: str, convention: str, kinds: tuple[str, ...]) -> str:
    """The kind of weight decay, which the other library has to know if there is any."""
    decay = _hyper.decay_mode(values)
    if any(values.get(key, 0) != 0 for key in DECAYS) and decay not in kinds:
        wanted = " or ".join(map(repr, kinds)) or "no weight_decay"
        raise ValueError(f"decay_mode of {label}: expected {wanted} as in {LIBRARIES[convention]}, got {decay!r}")
    return decay


def check_shape(array: Array, shape: Any, label: str) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"{label}: expected shape {array.shape}, got {tuple(shape)}")


def library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"fs.interop needs {package} for this ({error}): pip install {package}") from None
