"""The arrays that an optimizer changes, and gradients in the form of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from . import _arrays
from .groups import Groups, is_groups
from .trees import Structure, branches, check_names

Array = NDArray[Any]


class Parameters:
    """The arrays of a tree, or of several as groups, in the order of their gradients."""

    def __init__(self, params: Any) -> None:
        self.is_grouped = is_groups(params)
        self.groups: list[tuple[list[str], list[Array]]] = []
        """Names and arrays of each."""
        self._structures: list[Structure] = []
        for tree in [group["params"] for group in params] if self.is_grouped else [params]:
            structure = Structure(tree, first_index=sum(len(names) for names, _ in self.groups))
            leaves = zip(structure.names, structure.leaves)
            self.groups.append((structure.names, [_arrays.as_writeable(leaf, f"params[{name!r}]") for name, leaf in leaves]))
            self._structures.append(structure)
        members = [(name, array, i) for i, group in enumerate(self.groups) for name, array in zip(*group)]
        # Gradients come as one tree, whose order arrays then have, or as a list with one for each group.
        self._tree = None if self.is_grouped else self._structures[0]
        if isinstance(params, Groups):
            self._tree = params.structure
            place = {name: i for i, name in enumerate(params.structure.names)}
            members.sort(key=lambda member: place[member[0]])
        self.names = [name for name, _, _ in members]
        self.arrays = [array for _, array, _ in members]
        self.group_of = [i for _, _, i in members]
        check_names(self.names)
        _arrays.check_overlaps(self.labelled("params"))

    @property
    def spec(self) -> Any:
        """A tree like that of gradients, of dictionaries and lists, with None for arrays."""
        return [structure.spec() for structure in self._structures] if self._tree is None else self._tree.spec()

    def items(self) -> list[tuple[str, Array]]:
        return list(zip(self.names, self.arrays))

    def labelled(self, what: str, arrays: list[Array] | None = None) -> list[tuple[str, Array]]:
        """These arrays, or others that belong to them, with names for messages."""
        return [(f"{what}[{name!r}]", array) for name, array in zip(self.names, self.arrays if arrays is None else arrays)]

    def collected(self, grads: Any) -> list[Any]:
        """The gradients of a tree that has the structure of the parameters, in their order."""
        if self._tree is not None:
            return self._tree.collect(grads)
        groups = {"0": grads} if isinstance(grads, Mapping) else branches(grads)
        if groups is None:
            raise TypeError(f"grads: expected a sequence with the gradients of each group, got {type(grads).__name__}")
        if len(groups) != len(self._structures):
            raise ValueError(f"grads: expected {len(self._structures)} groups, got {len(groups)}")
        parts = [g["params"] if isinstance(g, Mapping) and set(g) == {"params"} else g for g in groups.values()]
        return [leaf for structure, part in zip(self._structures, parts) for leaf in structure.collect(part)]

    def as_gradients(self, grads: list[Any]) -> list[Array]:
        """Gradients as arrays of the parameters' shapes."""
        arrays = [_arrays.as_gradient(grad, label) for label, grad in self.labelled("grads", grads)]
        for (label, grad), param in zip(self.labelled("grads", arrays), self.arrays):
            if grad.shape != param.shape:
                raise ValueError(f"{label}: expected shape {param.shape}, got {grad.shape}")
        return arrays
