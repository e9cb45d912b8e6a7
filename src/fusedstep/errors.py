"""The exceptions of fusedstep."""

from __future__ import annotations

from typing import Any


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds inf or nan and ``nonfinite="raise"``; nothing has been changed.

    Attributes
    ----------
    names : tuple of str
        Names of the arrays concerned.
    counts : dict of str to int
        How many such elements each has.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(2)
    >>> try:
    ...     fs.SGD({"w": w}).step({"w": np.array([np.nan, 1.0])})
    ... except fs.NonFiniteGradientError as error:
    ...     print(error, error.counts, w)
    expected finite gradients, got inf or nan in grads['w'] (1 elements) {'w': 1} [1. 1.]
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self.names = tuple(counts)
        self.counts = counts
        listed = ", ".join(f"grads[{name!r}] ({count} elements)" for name, count in list(counts.items())[:5])
        more = f" and {len(counts) - 5} more arrays" if len(counts) > 5 else ""
        super().__init__(f"expected finite gradients, got inf or nan in {listed}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.counts,)  # the message alone, which is what exceptions are made of again, will not do
