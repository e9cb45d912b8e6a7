"""Parameter groups by patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from . import _arrays, _hyper, schedules, trees
from ._hyper import Hyper


class Groups(tuple[dict[str, Any], ...]):
    """Groups, as optimizers take them, of the arrays of one tree, whose structure gradients are to have."""

    structure: trees.Structure

    def __new__(cls, groups: Iterable[dict[str, Any]], structure: trees.Structure) -> Groups:
        self = super().__new__(cls, groups)
        self.structure = structure
        return self


def is_groups(params: Any) -> bool:
    """Whether `params` is a sequence of groups."""
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(item, Mapping) and "params" in item for item in params)
    )


def group(
    params: Any, patterns: Mapping[str, Mapping[str, Any] | None] | None = None, *, no_decay_on_1d: bool = False
) -> Groups:
    """Parameter groups for an optimizer: which arrays have hyper-parameters of their own, by their names.

    Gradients keep the structure of `params`: after ``opt = fs.AdamW(fs.group(params, ...))`` it is ``opt.step(grads)`` as
    after ``fs.AdamW(params)``. So are the names of the arrays, their order, and the bits of norms over all of them.

    Parameters
    ----------
    params : array, sequence or mapping of arrays (nested too)
        As optimizers take them, but not in groups.
    patterns : mapping of str to mapping, optional
        For patterns as in a shell (``*``, ``?``, ``[ab]``) of whole names, the hyper-parameters of the arrays that match, or
        schedules of them. Names of nested parameters are their paths, as ``"encoder.0.bias"``; a ``*`` matches dots, too. Of
        several patterns that match, all count; where they differ, the last. None in place of hyper-parameters leaves the
        arrays out, whatever else matches: they do not change and have no state, and their gradients may be missing (in a
        sequence: be None) and are not looked at.
    no_decay_on_1d : bool
        Have ``weight_decay=0`` for arrays of at most one dimension, as biases and scales are, unless a pattern has another.

    Returns
    -------
    Groups
        A tuple of dicts with ``"params"``, arrays by name, and the hyper-parameters that are not the optimizer's.

    Raises
    ------
    ValueError
        If a pattern matches no name, or no array is left.
    TypeError
        If an argument is not what it should be.

    Notes
    -----
    An optimizer saves the arrays it changes; ``fs.save(path, opt, params)`` saves those left out, too. Steps are quickest
    with gradients in dicts, lists and tuples like the parameters', and without those of arrays left out.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> params = {"embed": np.ones(4), "layers": [{"w": np.ones((2, 2)), "b": np.ones(2)} for _ in range(2)]}
    >>> groups = fs.group(params, {"embed": None, "layers.1.*": {"lr": 0.5}}, no_decay_on_1d=True)
    >>> opt = fs.SGD(groups, lr=0.25, weight_decay=0.5)
    >>> for g in opt.param_groups:
    ...     print(g["names"], g["lr"], g["weight_decay"])
    ['layers.0.w'] 0.25 0.5
    ['layers.0.b'] 0.25 0.0
    ['layers.1.w'] 0.5 0.5
    ['layers.1.b'] 0.5 0.0
    >>> opt.step({"layers": [{"w": np.ones((2, 2)), "b": np.ones(2)} for _ in range(2)]}).step
    1
    >>> params["embed"], params["layers"][0]["b"], params["layers"][1]["b"]
    (array([1., 1., 1., 1.]), array([0.75, 0.75]), array([0.5, 0.5]))
    """
    if is_groups(params):
        raise TypeError("params: expected arrays, or sequences or mappings of them, got groups")
    structure = trees.Structure(params)
    trees.check_names(structure.names)
    patterns = {} if patterns is None else patterns
    check_patterns(patterns, structure.names)
    _hyper.boolean(no_decay_on_1d, "no_decay_on_1d")
    groups: dict[Any, dict[str, Any]] = {}
    left_out = set()
    for name, leaf in zip(structure.names, structure.leaves):
        matching = tuple(pattern for pattern in patterns if fnmatchcase(name, pattern))
        own = [hyper for pattern in matching if (hyper := patterns[pattern]) is not None]
        if len(own) < len(matching):
            left_out.add(name)
            continue
        no_decay = no_decay_on_1d and _arrays.as_array(leaf, f"params[{name!r}]").ndim <= 1
        merged = {"weight_decay": 0.0} if no_decay else {}
        for hyper in own:
            merged |= hyper
        groups.setdefault((matching, no_decay), {"params": {}, **merged})["params"][name] = leaf
    if not groups:
        raise ValueError("params: expected some arrays to be in groups, got none")
    structure.leave_out(left_out)
    return Groups(groups.values(), structure)


def check_patterns(patterns: Any, names: list[str]) -> None:
    if not isinstance(patterns, Mapping):
        raise TypeError(f"patterns: expected a mapping of patterns to hyper-parameters, got {patterns!r}")
    for pattern, hyper in patterns.items():
        label = f"patterns[{pattern!r}]"
        if not isinstance(pattern, str):
            raise TypeError(f"{label}: expected a pattern of type str, got {pattern!r}")
        if hyper is not None and not isinstance(hyper, Mapping):
            raise TypeError(f"{label}: expected a mapping of hyper-parameters, or None to leave arrays out, got {hyper!r}")
        if hyper is not None and "params" in hyper:
            raise ValueError(f"{label}: expected hyper-parameters, got 'params'")
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{label}: expected to match a parameter's name, got none among {some}")


def layer_decay(patterns: Sequence[str], lr: Hyper, decay: float) -> dict[str, dict[str, Hyper]]:
    """Learning rates that fall with the distance from the output, ``lr * decay**distance``, for :func:`group`.

    Parameters
    ----------
    patterns : list of str
        Of the names of each layer's arrays, from input to output; the last has `lr` itself.
    lr : float or callable
        May be a schedule.
    decay : float
        In (0, 1].

    Returns
    -------
    dict
        The patterns, each with its ``{"lr": ...}``; others may be added: ``fs.layer_decay(...) | {"*.b": {"l1": 0.1}}``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be.

    Examples
    --------
    >>> import fusedstep as fs
    >>> fs.layer_decay(["embed", "layers.0.*", "layers.1.*"], lr=1.0, decay=0.5)
    {'embed': {'lr': 0.25}, 'layers.0.*': {'lr': 0.5}, 'layers.1.*': {'lr': 1.0}}

    References
    ----------
    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018); Clark et al., "ELECTRA" (2020).
    """
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"patterns: expected a list of patterns of type str, got {patterns!r}")
    decay = _hyper.number(decay, "decay", "a number in (0, 1]", lambda x: 0 < x <= 1)
    factors = [decay**distance for distance in reversed(range(len(patterns)))]
    if callable(lr):
        rates: list[Hyper] = [schedules.multiply_schedules([lr, factor]) for factor in factors]
    else:
        rates = [_hyper.at_least_0(lr, "lr") * factor for factor in factors]
    return {pattern: {"lr": rate} for pattern, rate in zip(patterns, rates)}
