"""Nested sequences and mappings of arrays: the names of their leaves, and others of the same structure."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from typing import Any

import numpy as np


def branches(tree: Any, first_index: int = 0) -> dict[str, Any] | None:
    """The named parts of a mapping or sequence; None for anything else, which is a leaf."""
    if isinstance(tree, np.ndarray):  # asked first: abstract classes take their time to answer
        return None
    if isinstance(tree, Mapping):
        parts = {str(key): value for key, value in tree.items()}
        if len(parts) < len(tree):
            raise ValueError(f"params: expected names of their own, got some twice in {list(tree)}")
        return parts
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return dict(zip(tree._fields, tree))
    if isinstance(tree, (list, tuple, ValuesView, Iterator)):
        return {str(index): value for index, value in enumerate(tree, first_index)}
    return None


class Structure:
    """The shape of a parameter tree, to take apart gradients that have the same.

    Leaves are named by their path: ``{"a": [x, y]}`` has the names ``a.0`` and ``a.1``, a single array has the name ``0``.
    Parts of sequences correspond by their places, whatever their names.
    """

    __slots__ = ("is_left_out", "is_mapping", "leaves", "names", "parts", "path")

    def __init__(self, tree: Any, first_index: int = 0, path: str = "") -> None:
        self.path = path
        parts = branches(tree, first_index)
        self.is_mapping = parts is not None and isinstance(tree, Mapping)
        if parts is None:
            self.parts = None
            self.names, self.leaves = [path or str(first_index)], [tree]
        elif not parts and isinstance(tree, Iterator):
            label = f"params[{path!r}]" if path else "params"
            raise ValueError(f"{label}: expected arrays, got none from an iterator, which gives them once only")
        else:
            self.parts = {key: Structure(value, path=f"{path}.{key}" if path else key) for key, value in parts.items()}
            self.names = [name for part in self.parts.values() for name in part.names]
            self.leaves = [leaf for part in self.parts.values() for leaf in part.leaves]
        self.is_left_out = False

    def leave_out(self, names: set[str]) -> None:
        """Have no gradients for these leaves: what is in their place, if anything, is not looked at."""
        self.is_left_out = bool(self.names) and names.issuperset(self.names)
        for part in (self.parts or {}).values():
            part.leave_out(names)

    def spec(self) -> Any:
        """The same as a tree of dictionaries and lists, with None for leaves; what is left out is not there, or empty."""
        if self.is_left_out:
            return {}
        if self.parts is None:
            return None
        if self.is_mapping:
            return {key: part.spec() for key, part in self.parts.items() if not part.is_left_out}
        return [part.spec() for part in self.parts.values()]

    def collect(self, tree: Any) -> list[Any]:
        """The leaves of a tree with this structure, in this order."""
        if self.is_left_out:
            return []
        if self.parts is None:
            return [tree]
        label = f"grads[{self.path!r}]" if self.path else "grads"
        given = branches(tree)
        if given is None or isinstance(tree, Mapping) != self.is_mapping:
            kind = "a mapping" if self.is_mapping else "a sequence"
            raise TypeError(f"{label}: expected {kind} like the parameters', got {type(tree).__name__}")
        if not self.is_mapping:
            if len(given) != len(self.parts):
                raise ValueError(f"{label}: expected {len(self.parts)} arrays, got {len(given)}")
            given = dict(zip(self.parts, given.values()))
        prefix = f"{self.path}." if self.path else ""
        for key, part in self.parts.items():
            if key not in given and not part.is_left_out:
                raise ValueError(f"grads[{prefix + key!r}]: expected a gradient, got none")
        for key in given:
            if key not in self.parts:
                raise ValueError(f"grads[{prefix + key!r}]: expected a parameter's name, got a name that none has")
        return [leaf for key, part in self.parts.items() for leaf in part.collect(given.get(key))]


def check_names(names: Iterable[str]) -> None:
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"params[{repeated[0]!r}]: expected names of their own, got one name twice")
