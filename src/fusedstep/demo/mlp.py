"""A multilayer perceptron with ReLU and softmax cross-entropy, in NumPy."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class MLP:
    """Fully connected layers of these sizes; ``params`` and ``grads`` map ``w0, b0, w1, ...`` to arrays of this type.

    What is of 16 bits is computed in float32, and its gradients are of `scale` times the loss, for them not to vanish.

    Hidden layers start with He's normal distribution, the last one with Xavier's (Glorot's) uniform one.
    """

    def __init__(self, sizes: list[int], dtype: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.compute = np.result_type(dtype, np.float32)
        self.n_layers = len(sizes) - 1
        self.params: dict[str, Array] = {}
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            if i < self.n_layers - 1:
                weights = rng.normal(0.0, np.sqrt(2 / n_in), (n_in, n_out))
            else:
                bound = np.sqrt(6 / (n_in + n_out))
                weights = rng.uniform(-bound, bound, (n_in, n_out))
            self.params[f"w{i}"] = weights.astype(dtype)
            self.params[f"b{i}"] = np.zeros(n_out, dtype)
        self.grads = {name: np.zeros_like(array) for name, array in self.params.items()}

    def weights(self, i: int) -> Array:
        return self.params[f"w{i}"].astype(self.compute, copy=False)

    def forward(self, x: Array) -> list[Array]:
        """Activations of all layers, the input first, the logits last."""
        activations = [x]
        for i in range(self.n_layers):
            x = x @ self.weights(i) + self.params[f"b{i}"].astype(self.compute, copy=False)
            if i < self.n_layers - 1:
                np.maximum(x, 0, out=x)
            activations.append(x)
        return activations

    def loss(self, x: Array, y: Array) -> float:
        """Mean cross-entropy."""
        log_p = log_softmax(self.forward(x)[-1])
        return float(-log_p[np.arange(len(y)), y].mean())

    def accuracy(self, x: Array, y: Array) -> float:
        return float((self.forward(x)[-1].argmax(axis=1) == y).mean())

    def backward(self, x: Array, y: Array, scale: float = 1.0) -> None:
        """Fill ``grads`` with the gradients of `scale` times the loss."""
        activations = self.forward(x)
        delta = np.exp(log_softmax(activations[-1]))
        delta[np.arange(len(y)), y] -= 1
        delta *= scale / len(y)
        for i in reversed(range(self.n_layers)):
            self.grads[f"w{i}"][...] = activations[i].T @ delta
            self.grads[f"b{i}"][...] = delta.sum(axis=0)
            if i > 0:
                delta = (delta @ self.weights(i).T) * (activations[i] > 0)

    def digest(self) -> str:
        """SHA-256 of all parameters."""
        sha = hashlib.sha256()
        for array in self.params.values():
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_p
