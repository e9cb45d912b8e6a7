"""What several test files share."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from typing import Any

import hypothesis
import numpy as np
import pytest

import fusedstep as fs
from fusedstep import _core, check, database

# pytest --hypothesis-profile=long, for hours of fuzzing; what has its own number of examples keeps it.
hypothesis.settings.register_profile("default", max_examples=100, stateful_step_count=30, deadline=None, print_blob=True)
hypothesis.settings.register_profile("long", max_examples=100_000, stateful_step_count=100, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports it; in NumPy it computes in float32

LEVELS = [name for name, _, available in _core.levels() if available]

SETTINGS = [(entry, settings) for entry in database.ENTRIES for settings in entry.settings]


def storage_settings() -> list[tuple[database.Entry, dict[str, Any]]]:
    """Two settings for each number of states, and of scaled rules: all that tiles and layouts, which know no rules, can see."""
    found: dict[Any, list[tuple[database.Entry, dict[str, Any]]]] = {}
    for entry, settings in SETTINGS:
        opt = entry.optimizer(np.ones((1, 1)), **settings)
        found.setdefault((len(opt.state["0"]), entry.optimizer._is_scaled), []).append((entry, settings))
    return [case for cases in found.values() for case in cases[:: max(1, len(cases) - 1)]]


STORAGE_SETTINGS = storage_settings()


def setting_id(value: Any) -> str | None:
    """Readable test ids for entries and settings."""
    if isinstance(value, database.Entry):
        return value.optimizer.__name__
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "default"
    if isinstance(value, type):
        return value.__name__
    return None


@pytest.fixture(params=LEVELS)
def level(request):
    """Each CPU level of this machine in turn."""
    before = _core.get_level()
    _core.set_level(request.param)
    yield request.param
    _core.set_level(before)


@pytest.fixture
def all_threads():
    """As many threads as asked for, even for small arrays."""
    _core.insist_on_threads(True)
    yield
    _core.insist_on_threads(False)


@pytest.fixture
def rng():
    return np.random.default_rng(12345)


def float64_in_jax():
    """A context; JAX for Python 3.10 has it elsewhere."""
    jax = pytest.importorskip("jax")
    return (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64(True)


@pytest.fixture
def keras(monkeypatch):
    """Keras in float64, with means and norms, for which it goes to float32."""
    jax = pytest.importorskip("jax")
    with float64_in_jax(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras = pytest.importorskip("keras", minversion="3.15")  # older ones have not all rules, or others; so Python 3.10
        keras.config.set_floatx("float64")
        for name, exact in ("mean", jax.numpy.mean), ("norm", jax.numpy.linalg.norm):
            of_arrays = lambda x, exact=exact, **axes: exact(jax.numpy.asarray(x), **axes)  # noqa: E731
            monkeypatch.setattr(sys.modules["keras.src.ops"], name, of_arrays)
        yield keras
        keras.config.set_floatx("float32")


@pytest.fixture
def exact_decay(monkeypatch):
    """The decay of Adafactor in optax in the type of the parameters; by default it is computed in float32."""
    module = pytest.importorskip("optax._src.factorized")
    exact = functools.partial(module.scale_by_factored_rms, decay_rate_fn=lambda i, exponent: 1.0 - (i + 1.0) ** -exponent)
    monkeypatch.setattr(module, "scale_by_factored_rms", exact)


def run(optimizer, params, grads_of_steps, **settings):
    """Parameters and state after some steps, as one flat list; and the last report."""
    opt = optimizer(params, **settings)
    report = None
    for grads in grads_of_steps:
        report = opt.step(grads)
    return [*params, *(a for own in opt.state.values() for a in own.values())], report


def assert_same_bits(found, wanted):
    """Equal element by element; nan equals nan, 0.0 is not -0.0."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if check.differing(a, b):
            np.testing.assert_array_equal(a, b)
            raise AssertionError(f"zeros of other signs, or nan: {a!r}, {b!r}")


def snapshot(opt: fs.Optimizer, *arrays: np.ndarray) -> list[bytes]:
    """Everything a step may change."""
    states = [a.tobytes() for own in opt.state.values() for a in own.values()]
    return [*(a.tobytes() for a in opt._params.arrays), *states, str(opt.steps).encode(), *(a.tobytes() for a in arrays)]
