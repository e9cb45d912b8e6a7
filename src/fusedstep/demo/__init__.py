"""The ``fusedstep train`` command: a multilayer perceptron in NumPy on real data."""
