"""What a step found out about its arrays on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class ArrayStats(NamedTuple):
    """What a step found out about one array, or about all together."""

    size: int
    """Number of elements."""
    grad_norm: float
    """Norm of the gradient, divided by the grad_scale, before clipping."""
    param_norm: float
    """Norm of the parameter after the step."""
    update_norm: float
    """Norm of what the step changed the parameter by."""
    clip_factor: float
    """What the gradient was multiplied by to clip its norm; of all arrays the smallest."""
    n_zero: int
    """Number of elements of the gradient that were 0."""
    n_nonfinite: int
    """Number of elements of the gradient that were inf or nan."""

    @property
    def update_ratio(self) -> float:
        """Norm of the update over that of the parameter: 0.001 is usual, nan where both are 0."""
        return self.update_norm / self.param_norm if self.param_norm else math.nan if not self.update_norm else math.inf


def array_stats(size: int, row: Any) -> ArrayStats:
    grad_norm, param_norm, update_norm, clip_factor, n_zero, n_nonfinite = row
    return ArrayStats(
        size, float(grad_norm), float(param_norm), float(update_norm), float(clip_factor), int(n_zero), int(n_nonfinite)
    )


class Stats(Mapping[str, ArrayStats]):
    """Of each array by name, and of all together in `total`.

    Norms of different arrays are sums over fixed blocks in C order: the same bits for any number of threads, CPU level and
    memory layout. Squares of float64 values above 1e154 overflow.
    """

    def __init__(self, places: dict[str, int], sizes: list[int]) -> None:
        self._places = places
        self._sizes = sizes
        self.rows: NDArray[Any] = np.zeros((len(sizes), 6))  # filled by the step

    def __getitem__(self, name: str) -> ArrayStats:
        place = self._places[name]
        return array_stats(self._sizes[place], self.rows[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def total(self) -> ArrayStats:
        """Of all arrays together."""
        norms = [math.hypot(*column) for column in self.rows[:, :3].T.tolist()]
        factor = float(self.rows[:, 3].min(initial=1.0))
        return array_stats(sum(self._sizes), [*norms, factor, *self.rows[:, 4:].sum(axis=0)])

    def warnings(self, vanishing: float = 1e-7, exploding: float = 0.1) -> list[str]:
        """What looks wrong, a sentence each, the arrays by name.

        Parameters
        ----------
        vanishing : float
            Ratio of update to parameter below which an array hardly learns.
        exploding : float
            Ratio above which a step changes an array beyond recognition.

        Examples
        --------
        >>> import numpy as np, fusedstep as fs
        >>> params = {"w": np.ones(4), "b": np.ones(2)}
        >>> opt = fs.SGD(params, lr=0.1, stats=True)
        >>> report = opt.step({"w": np.full(4, 9.0), "b": np.zeros(2)})
        >>> for sentence in report.stats.warnings():
        ...     print(sentence)
        w: the update is 9 times the parameter
        b: the gradient is 0 in all 2 elements
        >>> report.stats["w"].grad_norm, report.stats.total.n_zero
        (18.0, 2)
        """
        found = []
        for name, own in self.items():
            if own.n_nonfinite:
                found.append(f"{name}: the gradient is inf or nan in {own.n_nonfinite} of {own.size} elements")
            if own.size and own.n_zero == own.size:
                found.append(f"{name}: the gradient is 0 in all {own.size} elements")
            elif own.param_norm and not vanishing <= own.update_ratio <= exploding:
                found.append(f"{name}: the update is {own.update_ratio:.3g} times the parameter")
        return found

    def __repr__(self) -> str:
        lines = [f"{'array':16} {'elements':>10} {'gradient':>10} {'parameter':>10} {'update':>10} {'ratio':>8} {'zero':>7}"]
        for name, own in [*self.items(), ("all", self.total)]:
            lines.append(
                f"{name:16} {own.size:10,} {own.grad_norm:10.3g} {own.param_norm:10.3g} {own.update_norm:10.3g} "
                f"{own.update_ratio:8.1e} {own.n_zero / max(own.size, 1):7.1%}"
            )
        return "\n".join(lines)
