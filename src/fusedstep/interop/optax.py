"""State to and from optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..optimizer import Optimizer
from ..saving import live_state_dict
from ..state import FACTORS
from .common import check_rule, check_shape, exported, imported, library, the_step

Change = Callable[[str, str, str, Any], Any]
"""Of a leaf of an optax state, given its label, the state it is here, the name of the parameter, and itself."""

STATES = {
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
STATES |= dict.fromkeys(("AdamW", "NAdam", "RAdam", "LAMB"), STATES["Adam"])
"""Names of states by the class and field that hold them."""

WRAPPERS = ("EmptyState", "ScaleByScheduleState", "MaskedState", "PartitionState", "InjectStatefulHyperparamsState")
"""Other classes in a chain, which hold a count, further states, or nothing."""

INNER = ("inner_state", "inner_states", "base_optimizer_state")
"""Fields with further states."""

COUNTS = {"count": 0, "t": 0, "step_count": 1}
"""Fields with a number of steps, and what they start from."""


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
    check_rule(opt, "optax", STATES)
    counts: dict[str, float] = {}
    states: dict[str, dict[str, Any]] = {name: {} for name in opt._params.names}

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
    check_rule(opt, "optax", STATES)
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
    kinds = STATES[type(opt).__name__]
    if kind not in (*kinds, *WRAPPERS):
        raise TypeError(f"{label}: expected one of {', '.join((*kinds, *WRAPPERS))}, got {kind}")
    tree = library("jax.tree_util")
    new = {}
    for field, value in zip(node._fields, node):
        own = f"{label}.{field}"
        if field in INNER:
            new[field] = with_changes(opt, value, own, change)
        elif field in COUNTS:
            first = COUNTS[field]
            new[field] = change(own, "step", "", value - first) + first
        elif field in kinds.get(kind, {}):
            key = kinds[kind][field]
            leaves, structure = tree.tree_flatten_with_path(value)
            if key in opt._numbers and [path for path, _ in leaves] == [()]:  # one for all arrays
                changed = [change(own, key, name, value) for name in opt._params.names]
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
    shapes: dict[str, tuple[int, ...]] = {name: param.shape for name, param in opt._params.items()}
    with opt._lock:
        states = live_state_dict(opt)["state"]

    def change_leaf(label: str, key: str, name: str, leaf: Any) -> Any:
        *_, n_rows, n_columns = 0, 0, *shapes.get(name, ())
        if key in FACTORS and n_rows > n_columns:
            (key,) = FACTORS.keys() - {key}
        is_placeholder = name in shapes and key not in states[name] and leaf.shape == (1,)
        return leaf if is_placeholder else change(label, key, name, leaf)

    return change_leaf
