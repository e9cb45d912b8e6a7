"""The exceptions of fusedstep."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds inf or nan and ``nonfinite="raise"``; nothing has been changed.

    Attributes
    ----------
    names : tuple of str
        Names of the arrays concerned.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self.names = tuple(counts)
        listed = ", ".join(f"grads[{name!r}] ({count} elements)" for name, count in list(counts.items())[:5])
        more = f" and {len(counts) - 5} more arrays" if len(counts) > 5 else ""
        super().__init__(f"expected finite gradients, got inf or nan in {listed}{more}")
