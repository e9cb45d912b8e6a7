"""State to and from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import _hyper, reference
from ..groups import is_groups
from ..optimizer import Optimizer
from .common import (
    Hypers,
    as_numbers,
    by_groups,
    check_decay,
    check_rule,
    check_same,
    exported,
    imported,
    in_order,
    library,
    parts_of,
    the_step,
)

RULES = {
    **dict.fromkeys(("SGD", "Adagrad", "Adadelta", "Adafactor", "RMSprop", "Adamax", "ASGD"), ("coupled",)),
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam"), ("coupled", "decoupled")),
    "Muon": ("decoupled",),
    "Rprop": (),
}
"""Those whose states and hyper-parameters have the names they have here, with the kinds of weight decay they know."""

UNCOUNTED = ("SGD", "Muon")
"""Rules that do not count steps there."""

CONSTANTS: dict[str, dict[str, Any]] = {"Adafactor": {"min_dim_size_to_factor": 0}, "Muon": {"maximize": False}}
"""Hyper-parameters here that are constants there."""


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
    check_rule(opt, "torch", RULES)
    label = "state_dict"
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"{label}: expected optimizer.state_dict() of PyTorch, got a {type(state_dict).__name__} without its keys"
        )
    groups = state_dict["param_groups"]
    if not is_groups(groups):
        raise TypeError(f"{label}['param_groups']: expected a list of dicts with 'params', got {groups!r}")
    ordered = in_order(names, by_groups(opt))
    sizes, own_sizes = [len(group["params"]) for group in groups], [len(group["names"]) for group in opt.param_groups]
    if sum(sizes) != len(ordered):
        raise ValueError(f"{label}['param_groups']: expected parameters for {ordered}, got {sum(sizes)}")
    if names is None and sizes != own_sizes:
        raise ValueError(
            f"names: expected the order of PyTorch, whose groups have {sizes} parameters, not {own_sizes}; got none"
        )
    unknown = set(state_dict["state"]).difference(*(group["params"] for group in groups))
    if unknown:
        raise ValueError(f"{label}['state']: expected keys among the groups' params, got {sorted(unknown, key=str)}")
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
    check_rule(opt, "torch", RULES)
    torch = library("torch")
    rule = type(opt).__name__
    kinds = RULES[rule]
    ordered = in_order(names, by_groups(opt))
    number = {name: i for i, name in enumerate(ordered)}
    step, hypers, states = exported(opt)
    for (name, part), param in zip(parts_of(opt, hypers).items(), opt._params.arrays):
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
    if rule in UNCOUNTED:
        return {}
    if rule == "NAdam":
        return {"step": step, "mu_product": reference.rules.nadam_product(step, hyper["betas"][0], hyper["momentum_decay"])}
    if rule == "ASGD":  # of the next step
        eta = hyper["lr"] / (1 + hyper["lambd"] * hyper["lr"] * step) ** hyper["alpha"]
        return {"step": step, "eta": eta, "mu": 1 / max(1, step - hyper["t0"])}
    return {"step": step}


def torch_keys(opt: Optimizer) -> list[str]:
    """The hyper-parameters that are called the same in a group of PyTorch, and always there."""
    decay = ["weight_decay"] if RULES[type(opt).__name__] else []
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


def constants(opt: Optimizer) -> dict[str, Any]:
    return CONSTANTS.get(type(opt).__name__, {})
