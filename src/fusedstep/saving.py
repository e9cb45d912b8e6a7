"""What is saved of an optimizer and loaded again: its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _hyper, state
from ._arrays import Change

if TYPE_CHECKING:
    from .optimizer import Optimizer

Array = NDArray[Any]

VERSION = 1
OPTIONS = ("clip_norm", "seed", "nonfinite")  # of the whole optimizer; groups save theirs


def live_state_dict(opt: Optimizer) -> dict[str, Any]:
    """An optimizer's :meth:`Optimizer.state_dict` with the state arrays themselves."""
    steps = opt._plan.steps
    opt._prepare_plan(opt._resolve(opt.param_groups, steps), steps)  # state that fits edited hyper-parameters
    return {
        "version": VERSION,
        "rule": type(opt).__name__,
        "convention": opt.convention,
        "step": steps,
        "options": {key: value for key in OPTIONS if not _hyper.has_callable(value := getattr(opt, key))},
        "state": {name: dict(own) for name, own in opt.state.items()},
        "shapes": {name: list(param.shape) for name, param in opt._params.items()},
        "memory_axes": {name: opt._axes(param) for name, param in opt._params.items()},
        "param_groups": [
            {"names": list(names)} | {key: group[key] for key in opt._group_defaults if not _hyper.has_callable(group[key])}
            for (names, _), group in zip(opt._params.groups, opt.param_groups)
        ],
    }


def loading(opt: Optimizer, state_dict: Mapping[str, Any], strict: bool) -> list[Change]:
    """What to assign for an optimizer to go on from a state dict, which is checked."""
    label = "state_dict"
    opt._check_not_shown(label)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{label}: expected a mapping, got {type(state_dict).__name__}")
    for key in ("version", "rule", "convention", "step", "options", "state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{label}[{key!r}]: expected a value, got none")
    for key, wanted in (
        ("version", VERSION), ("rule", type(opt).__name__), ("convention", opt.convention),
    ):  # fmt: skip
        if not isinstance(state_dict[key], (str, int)) or state_dict[key] != wanted:
            raise ValueError(f"{label}[{key!r}]: expected {wanted!r}, got {state_dict[key]!r}")
    step = state_dict["step"]
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step < 2**53:
        raise ValueError(f"{label}['step']: expected a whole number from 0 to 2**53, got {step!r}")
    options = loaded_options(opt, state_dict["options"])
    groups = loaded_groups(opt, state_dict["param_groups"], strict)
    values = opt._resolve(groups, int(step))
    kernels, part_of = [opt._kernel(part) for part in opt._parts(values)], opt._places(values)
    specs = opt._specs(kernels, part_of)
    loaded = loaded_states(opt, state_dict["state"], state_dict.get("memory_axes", {}), specs, strict)
    check_shapes(opt, state_dict.get("shapes", {}))
    owned = opt._completed(specs)
    plan = opt._make_plan(kernels, part_of, owned, int(step), options.get("seed", opt.seed))
    changes: list[Change] = [(opt.__dict__, key, value) for key, value in options.items()]
    changes += opt._adoption(plan, kernels, part_of, owned)
    changes += [(group, key, new[key]) for group, new in zip(opt.param_groups, groups) for key in new]
    changes.append((opt.__dict__, "_sums", None))
    return changes + [(owned[name][key], ..., array) for name, own in loaded.items() for key, array in own.items()]


def loaded_options(opt: Optimizer, loaded: Any) -> dict[str, Any]:
    """The loaded options but those that are callables here, checked."""
    label = "state_dict['options']"
    if not isinstance(loaded, Mapping) or not set(loaded) <= set(OPTIONS):
        raise ValueError(f"{label}: expected a mapping with keys among {', '.join(OPTIONS)}, got {loaded!r}")
    if "clip_norm" in loaded:
        _hyper.resolve("clip_norm", loaded["clip_norm"], 0, f"{label}['clip_norm']")
    if "seed" in loaded:
        loaded = {**loaded, "seed": _hyper.seed(loaded["seed"], f"{label}['seed']")}
    if "nonfinite" in loaded:
        _hyper.choice("nonfinite", loaded["nonfinite"], f"{label}['nonfinite']")
    return {key: value for key, value in loaded.items() if not _hyper.has_callable(getattr(opt, key))}


def loaded_groups(opt: Optimizer, loaded: Any, strict: bool) -> list[dict[str, Any]]:
    """The present groups with the hyper-parameters of the loaded ones."""
    label = "state_dict['param_groups']"
    if not isinstance(loaded, (list, tuple)) or not all(isinstance(group, Mapping) for group in loaded):
        raise TypeError(f"{label}: expected a list of mappings, got {loaded!r}")
    names = [own for own, _ in opt._params.groups]
    loaded_names = [group.get("names") for group in loaded]
    are_names = all(isinstance(own, (list, tuple)) and all(isinstance(n, str) for n in own) for own in loaded_names)
    if not are_names or (strict and names != list(map(list, loaded_names))):
        raise ValueError(f"{label}: expected the names {names}, got {loaded_names}")
    groups = [dict(group) for group in opt.param_groups]
    for i, group in enumerate(groups):
        found: dict[str, Any] = {}
        for j, given in enumerate(loaded):
            if not (i == j if strict else set(names[i]) & set(loaded_names[j])):
                continue
            for key, value in given.items():
                if key != "names" and key not in opt._group_defaults:
                    raise ValueError(f"{label}: expected hyper-parameters of {type(opt).__name__}, got {key!r}")
                if found.setdefault(key, value) is not value and key != "names" and found[key] != value:
                    raise ValueError(f"{label}: expected one {key} for {names[i]}, got {found[key]!r} and {value!r}")
        group.update({key: value for key, value in found.items() if key != "names" and not _hyper.has_callable(group[key])})
    return groups


def is_whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, (int, np.integer)) for v in value)


def check_shapes(opt: Optimizer, loaded: Any) -> None:
    """Of parameters: some rules have no state whose shapes would tell."""
    if not isinstance(loaded, Mapping):
        raise TypeError(f"state_dict['shapes']: expected a mapping, got {loaded!r}")
    for name, param in opt._params.items():
        if name in loaded and not (is_whole_numbers(loaded[name]) and list(loaded[name]) == list(param.shape)):
            raise ValueError(f"state_dict['shapes'][{name!r}]: expected {list(param.shape)}, got {loaded[name]!r}")


def loaded_states(
    opt: Optimizer, loaded: Any, memory_axes: Any, specs: dict[str, dict[str, state.Spec]], strict: bool
) -> dict[str, dict[str, Array]]:
    """The loaded state arrays, checked, in the types they have here."""
    if not isinstance(memory_axes, Mapping):
        raise TypeError(f"state_dict['memory_axes']: expected a mapping, got {memory_axes!r}")
    if not isinstance(loaded, Mapping) or not all(isinstance(own, Mapping) for own in loaded.values()):
        raise TypeError(f"state_dict['state']: expected a mapping of mappings, got {loaded!r}")
    states: dict[str, dict[str, Array]] = {}
    for name in loaded:
        if strict and name not in opt.state:
            raise ValueError(f"state_dict['state'][{name!r}]: expected a parameter's name, got a name that none has")
    for name, param in opt._params.items():
        if name not in loaded:
            if strict:
                raise ValueError(f"state_dict['state'][{name!r}]: expected state arrays, got none")
            continue
        axes = memory_axes.get(name, opt._axes(param))
        if not is_whole_numbers(axes) or sorted(axes) != list(range(param.ndim)):
            raise ValueError(f"state_dict['memory_axes'][{name!r}]: expected an order of the axes, got {axes!r}")
        states[name] = state.loaded(loaded[name].items(), specs[name], list(axes), f"state_dict['state'][{name!r}]")
    return states
