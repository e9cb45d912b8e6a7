"""The ``fusedstep bench`` command: steps of this library beside those of others, as ratios."""
