"""All optimizers with settings that work, settings that must not, and settings to train with.

Drives the tests, ``fusedstep check`` and ``fusedstep train``: whoever adds a rule adds one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import rules


@dataclass(frozen=True)
class Entry:
    """What there is to know about one optimizer class."""

    optimizer: type[Any]
    settings: list[dict[str, Any]]
    """Hyper-parameters that between them reach every kernel of the rule."""
    invalid: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)
    """Hyper-parameters that are refused, with the exception and its exact message."""
    train: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that suit ``fusedstep train``, by the name of the rule there."""
    torch_name: str | None = None
    """The optimizer of PyTorch that has the same equations and arguments."""


ENTRIES = [
    Entry(
        rules.SGD,
        settings=[
            {},
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        ],
        invalid=[
            ({"momentum": -0.1}, ValueError, "momentum: expected a finite number >= 0, got -0.1"),
            ({"dampening": float("inf")}, ValueError, "dampening: expected a finite number, got inf"),
            ({"nesterov": 1}, TypeError, "nesterov: expected True or False, got 1"),
            (
                {"nesterov": True},
                ValueError,
                "nesterov: expected momentum > 0 and dampening = 0 with it, got momentum=0.0, dampening=0.0",
            ),
        ],
        train={
            "sgd": {"lr": 0.1},
            "momentum": {"lr": 0.05, "momentum": 0.9},
            "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        },
        torch_name="SGD",
    ),
    Entry(
        rules.Adagrad,
        settings=[{}, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-6}],
        invalid=[
            ({"lr_decay": -1}, ValueError, "lr_decay: expected a finite number >= 0, got -1"),
            (
                {"initial_accumulator_value": -0.5},
                ValueError,
                "initial_accumulator_value: expected a finite number >= 0, got -0.5",
            ),
        ],
        train={"adagrad": {"lr": 0.03}},
        torch_name="Adagrad",
    ),
    Entry(
        rules.Adadelta,
        settings=[{}, {"lr": 0.5, "rho": 0.95, "eps": 1e-4}],
        invalid=[({"rho": 1.5}, ValueError, "rho: expected a number in [0, 1], got 1.5")],
        train={"adadelta": {"lr": 1.0}},
        torch_name="Adadelta",
    ),
    Entry(
        rules.Adafactor,
        settings=[
            {},
            {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-3, 0.1), "d": 1.5, "weight_decay": 0.1},
            {"min_dim_size_to_factor": 3},
        ],
        invalid=[
            ({"beta2_decay": 0.8}, ValueError, "beta2_decay: expected a finite number <= 0, got 0.8"),
            ({"eps": (-1.0, 1e-3)}, ValueError, "eps[0]: expected a finite number >= 0 or None, got -1.0"),
            ({"eps": (1e-30, None)}, TypeError, "eps[1]: expected a finite number >= 0, got None"),
            ({"d": 0.5}, ValueError, "d: expected a finite number >= 1, got 0.5"),
            ({"min_dim_size_to_factor": -1}, ValueError, "min_dim_size_to_factor: expected at least 0, got -1"),
            ({"min_dim_size_to_factor": 2.0}, TypeError, "min_dim_size_to_factor: expected a whole number, got 2.0"),
        ],
        train={"adafactor": {"lr": 0.03}},
        torch_name="Adafactor",
    ),
    Entry(
        rules.RMSprop,
        settings=[
            {},
            {"momentum": 0.9},
            {"centered": True, "eps": 1e-3},
            {"alpha": 0.9, "centered": True, "eps": 1e-3, "momentum": 0.5},
        ],
        invalid=[
            ({"alpha": -0.5}, ValueError, "alpha: expected a number in [0, 1], got -0.5"),
            ({"centered": None}, TypeError, "centered: expected True or False, got None"),
        ],
        train={"rmsprop": {"lr": 1e-3}},
        torch_name="RMSprop",
    ),
    Entry(
        rules.Adam,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}, {"amsgrad": True}],
        invalid=[
            ({"betas": (0.9, 1.0)}, ValueError, "betas[1]: expected a number in [0, 1), got 1.0"),
            ({"betas": 0.9}, TypeError, "betas: expected a pair of numbers, got 0.9"),
            ({"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
            ({"amsgrad": "no"}, TypeError, "amsgrad: expected True or False, got 'no'"),
        ],
        train={"adam": {"lr": 3e-3}, "amsgrad": {"lr": 3e-3, "amsgrad": True}},
        torch_name="Adam",
    ),
    Entry(
        rules.AdamW,
        settings=[{}, {"weight_decay": 0.1, "amsgrad": True}],
        train={"adamw": {"lr": 3e-3}},
        torch_name="AdamW",
    ),
    Entry(
        rules.NAdam,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "momentum_decay": 0.5}],
        invalid=[({"momentum_decay": -1}, ValueError, "momentum_decay: expected a finite number >= 0, got -1")],
        train={"nadam": {"lr": 3e-3}},
        torch_name="NAdam",
    ),
    Entry(
        rules.LAMB,
        settings=[{}, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.01}],
        train={"lamb": {"lr": 0.002}},
    ),
    Entry(
        rules.LARS,
        settings=[{}, {"lr": 1.0, "trust_coefficient": 0.1, "eps": 1e-3, "weight_decay": 0.01, "nesterov": True}],
        invalid=[
            ({"trust_coefficient": -1}, ValueError, "trust_coefficient: expected a finite number >= 0, got -1"),
            ({"nesterov": 0}, TypeError, "nesterov: expected True or False, got 0"),
        ],
        train={"lars": {"lr": 0.1, "trust_coefficient": 0.02}},
    ),
    Entry(
        rules.Adamax,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.5), "eps": 1e-3}],
        invalid=[({"betas": (-0.5, 0.9)}, ValueError, "betas[0]: expected a number in [0, 1), got -0.5")],
        train={"adamax": {"lr": 5e-3}},
        torch_name="Adamax",
    ),
    Entry(
        rules.RAdam,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}],
        invalid=[({"betas": (0.9, 1.0)}, ValueError, "betas[1]: expected a number in [0, 1), got 1.0")],
        train={"radam": {"lr": 3e-3}},
        torch_name="RAdam",
    ),
    Entry(
        rules.Lion,
        settings=[{}, {"lr": 0.01, "betas": (0.5, 0.75), "weight_decay": 0.1}],
        invalid=[({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas: expected a pair of numbers, got (0.9, 0.99, 0.999)")],
        train={"lion": {"lr": 3e-4}},
    ),
    Entry(
        rules.Signum,
        settings=[{}, {"momentum": 0.0}],
        invalid=[({"momentum": 1.0}, ValueError, "momentum: expected a number in [0, 1), got 1.0")],
        train={"signum": {"lr": 3e-4}, "signsgd": {"lr": 1e-3, "momentum": 0.0}},
    ),
    Entry(
        rules.Muon,
        settings=[
            {},
            {"lr": 0.1, "momentum": 0.5, "nesterov": False, "ns_steps": 2, "adjust_lr_fn": "match_rms_adamw"},
        ],
        invalid=[
            ({"momentum": 1.0}, ValueError, "momentum: expected a number in [0, 1), got 1.0"),
            ({"ns_coefficients": (2, -1)}, TypeError, "ns_coefficients: expected 3 numbers, got (2, -1)"),
            ({"ns_steps": 5.0}, TypeError, "ns_steps: expected a whole number, got 5.0"),
            ({"ns_steps": 10**400}, ValueError, "ns_steps: expected at most 99, got a larger number"),
            (
                {"adjust_lr_fn": "keras"},
                ValueError,
                "adjust_lr_fn: expected one of None, 'original', 'match_rms_adamw', got 'keras'",
            ),
            ({"adamw_betas": (0.9, 1.0)}, ValueError, "adamw_betas[1]: expected a number in [0, 1), got 1.0"),
            (
                {"convention": "keras", "adjust_lr_fn": None},
                ValueError,
                "adjust_lr_fn: expected 'match_rms_adamw' for convention='keras', got None",
            ),
        ],
        train={"muon": {"lr": 0.02, "adamw_lr_ratio": 0.15}},
    ),
    Entry(
        rules.AdaBelief,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}],
        invalid=[({"eps": -1e-8}, ValueError, "eps: expected a finite number >= 0, got -1e-08")],
        train={"adabelief": {"lr": 3e-3}},
    ),
    Entry(
        rules.Yogi,
        settings=[{}, {"lr": 0.1, "betas": (0.8, 0.5), "initial_accumulator_value": 0.1}],
        invalid=[
            (
                {"initial_accumulator_value": -1},
                ValueError,
                "initial_accumulator_value: expected a finite number >= 0, got -1",
            )
        ],
        train={"yogi": {"lr": 1e-2}},
    ),
    Entry(
        rules.Rprop,
        settings=[{}, {"lr": 0.1, "etas": (0.75, 1.5), "step_sizes": (0.05, 0.2)}],
        invalid=[
            ({"etas": (0.5, 0.9)}, ValueError, "etas: expected a pair of numbers below and above 1, got (0.5, 0.9)"),
            ({"etas": (0.0, 1.2)}, ValueError, "etas[0]: expected a finite number > 0, got 0.0"),
            ({"etas": 1.2}, TypeError, "etas: expected a pair of numbers, got 1.2"),
            (
                {"step_sizes": (1.0, 0.5)},
                ValueError,
                "step_sizes: expected a pair of numbers, the lower first, got (1.0, 0.5)",
            ),
        ],
        train={"rprop": {"lr": 1e-3, "etas": (0.8, 1.2), "step_sizes": (1e-6, 3e-3)}},
        torch_name="Rprop",
    ),
    Entry(
        rules.ASGD,
        settings=[{}, {"lr": 0.1, "lambd": 0.01, "alpha": 0.5, "t0": 0.0}],
        invalid=[
            ({"lambd": -1}, ValueError, "lambd: expected a finite number >= 0, got -1"),
            ({"t0": float("inf")}, ValueError, "t0: expected a finite number >= 0, got inf"),
        ],
        train={"asgd": {"lr": 0.2}},
        torch_name="ASGD",
    ),
    Entry(
        rules.FTRL,
        settings=[
            {},
            {"lr": 0.1, "beta": 1.0, "l1_regularization_strength": 0.5, "l2_regularization_strength": 0.1},
        ],
        invalid=[
            ({"lr": 0.0}, ValueError, "lr: expected a finite number > 0, got 0.0"),
            ({"beta": -1}, ValueError, "beta: expected a finite number >= 0, got -1"),
            (
                {"l1_regularization_strength": -0.1},
                ValueError,
                "l1_regularization_strength: expected a finite number >= 0, got -0.1",
            ),
        ],
        train={"ftrl": {"lr": 0.05, "initial_accumulator_value": 0.0}},
    ),
    Entry(
        rules.Adan,
        settings=[{}, {"lr": 0.01, "betas": (0.9, 0.5, 0.75), "eps": 1e-6, "weight_decay": 0.1}],
        invalid=[
            ({"betas": (0.9, 0.999)}, TypeError, "betas: expected 3 numbers, got (0.9, 0.999)"),
            ({"betas": (0.9, 0.9, 1.5)}, ValueError, "betas[2]: expected a number in [0, 1), got 1.5"),
        ],
        train={"adan": {"lr": 5e-3}},
    ),
    Entry(
        rules.NovoGrad,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.5), "eps": 1e-3, "weight_decay": 0.1}],
        invalid=[({"betas": (0.9, 1.0)}, ValueError, "betas[1]: expected a number in [0, 1), got 1.0")],
        train={"novograd": {"lr": 1e-2}},
    ),
    Entry(
        rules.Prodigy,
        settings=[
            {},
            {
                "lr": 0.5,
                "betas": (0.8, 0.95),
                "beta3": 0.9,
                "eps": 1e-6,
                "d0": 1e-3,
                "d_coef": 2.0,
                "use_bias_correction": True,
                "safeguard_warmup": True,
                "weight_decay": 0.1,
            },
        ],
        invalid=[
            ({"beta3": 1.0}, ValueError, "beta3: expected a number in [0, 1) or None, got 1.0"),
            ({"d0": 0.0}, ValueError, "d0: expected a finite number > 0, got 0.0"),
            ({"d_coef": -1}, ValueError, "d_coef: expected a finite number > 0, got -1"),
            ({"use_bias_correction": 1}, TypeError, "use_bias_correction: expected True or False, got 1"),
            ({"safeguard_warmup": None}, TypeError, "safeguard_warmup: expected True or False, got None"),
            (
                {"convention": "optax", "use_bias_correction": False},
                ValueError,
                "use_bias_correction: expected True for convention='optax', got False",
            ),
        ],
        train={"prodigy": {"lr": 1.0}},
    ),
    Entry(
        rules.ScheduleFreeSGD,
        settings=[{}, {"lr": 0.1, "momentum": 0.75, "r": 1.5, "weight_lr_power": 1.0}],
        invalid=[
            ({"momentum": 0.0}, ValueError, "momentum: expected a number in (0, 1), got 0.0"),
            ({"momentum": 1}, ValueError, "momentum: expected a number in (0, 1), got 1.0"),
            ({"r": -1}, ValueError, "r: expected a finite number >= 0, got -1"),
            ({"weight_lr_power": -2}, ValueError, "weight_lr_power: expected a finite number >= 0, got -2"),
            ({"convention": "optax", "r": 1.0}, ValueError, "r: expected 0 for convention='optax', got 1.0"),
        ],
        train={"sf-sgd": {"lr": 1.0}},
    ),
    Entry(
        rules.ScheduleFreeAdamW,
        settings=[{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "r": 0.5, "weight_decay": 0.1}],
        invalid=[
            ({"betas": (0.0, 0.999)}, ValueError, "betas[0]: expected a number in (0, 1), got 0.0"),
            ({"convention": "keras", "r": 0.5}, ValueError, "r: expected 0 for convention='keras', got 0.5"),
            (
                {"convention": "keras", "weight_lr_power": 2.0},
                ValueError,
                "weight_lr_power: expected 0 for convention='keras', got 2.0",
            ),
        ],
        train={"sf-adamw": {"lr": 0.01}},
    ),
]

# Refused for every rule.
INVALID = [
    ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0, got -1.0"),
    ({"lr": float("nan")}, ValueError, "lr: expected a finite number >= 0, got nan"),
    ({"lr": "fast"}, TypeError, "lr: expected a finite number >= 0, got 'fast'"),
    ({"lr": np.array([0.1])}, TypeError, "lr: expected a finite number >= 0, got array([0.1])"),
    ({"lr": np.array(True)}, TypeError, "lr: expected a finite number >= 0, got array(True)"),
    ({"lr": np.array(1j)}, TypeError, "lr: expected a finite number >= 0, got array(0.+1.j)"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a finite number >= 0, got -0.1"),
    ({"decoupled_weight_decay": 0}, TypeError, "decoupled_weight_decay: expected True or False, got 0"),
    (
        {"decay_mode": "l2"},
        ValueError,
        "decay_mode: expected one of None, 'coupled', 'decoupled', 'independent', 'decoupled_after', got 'l2'",
    ),
    ({"l1": float("inf")}, ValueError, "l1: expected a finite number >= 0, got inf"),
    ({"maximize": "yes"}, TypeError, "maximize: expected True or False, got 'yes'"),
    ({"clip_norm": 0}, ValueError, "clip_norm: expected a finite number > 0 or None, got 0"),
    ({"clip_value": -1}, ValueError, "clip_value: expected a finite number > 0 or None, got -1"),
    ({"clip_norm_per_array": 0.0}, ValueError, "clip_norm_per_array: expected a finite number > 0 or None, got 0.0"),
    ({"clip_adaptive": -0.01}, ValueError, "clip_adaptive: expected a finite number > 0 or None, got -0.01"),
    ({"max_norm": 0}, ValueError, "max_norm: expected a finite number > 0 or None, got 0"),
    ({"unit_axes": "rows"}, TypeError, "unit_axes: expected an axis, several as a tuple, or None, got 'rows'"),
    ({"unit_axes": (0, True)}, TypeError, "unit_axes: expected an axis, several as a tuple, or None, got (0, True)"),
    ({"bounds": 1.0}, TypeError, "bounds: expected a pair of numbers or None, the lower first, got 1.0"),
    ({"bounds": (1, -1)}, ValueError, "bounds: expected a pair of numbers or None, the lower first, got (1, -1)"),
    ({"bounds": (None, float("nan"))}, ValueError, "bounds[1]: expected a finite number, got nan"),
    ({"bounds": (float("inf"), None)}, ValueError, "bounds[0]: expected a finite number, got inf"),
    ({"bounds": (np.zeros(2), 1)}, TypeError, "bounds[0]: expected a finite number, got array([0., 0.])"),
    ({"bounds": ("a", None)}, TypeError, "bounds[0]: expected a finite number, got 'a'"),
    ({"ema_decay": 1.5}, ValueError, "ema_decay: expected a number in [0, 1] or None, got 1.5"),
    (
        {"state_dtype": "int4"},
        ValueError,
        "state_dtype: expected one of None, 'float32', 'bfloat16', 'int8', got 'int4'",
    ),
    (
        {"low_precision": "exact"},
        ValueError,
        "low_precision: expected one of 'nearest', 'stochastic', 'kahan', 'split', 'master', got 'exact'",
    ),
    (
        {"accumulate_dtype": "float16"},
        ValueError,
        "accumulate_dtype: expected one of None, 'float32', 'bfloat16', got 'float16'",
    ),
    ({"stats": 1}, TypeError, "stats: expected True or False, got 1"),
    ({"seed": -1}, ValueError, "seed: expected a whole number in [0, 2**64), got -1"),
    ({"seed": 0.5}, TypeError, "seed: expected a whole number, got 0.5"),
    (
        {"nonfinite": "ignore"},
        ValueError,
        "nonfinite: expected one of 'raise', 'skip', 'zero', 'propagate', got 'ignore'",
    ),
    (
        {"convention": "caffe"},
        ValueError,
        "convention: expected one of 'torch', 'keras', 'optax', 'tf', 'sklearn', 'thinc', got 'caffe'",
    ),
    (
        {"convention": ["torch"]},
        ValueError,
        "convention: expected one of 'torch', 'keras', 'optax', 'tf', 'sklearn', 'thinc', got ['torch']",
    ),
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'c', 'reference', got 'cuda'"),
    ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
    ({"num_threads": 2.0}, TypeError, "num_threads: expected a whole number, got 2.0"),
]

# Option sets that between them reach every stage of the engine, with any rule.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.001, "decay_mode": "independent"},
    {"weight_decay": 0.1, "decay_mode": "decoupled_after", "bounds": (-1, 1)},
    {"l1": 0.01, "weight_decay": 1.5, "decay_mode": "independent"},  # turns signs over: l1 is to see them before
    {"maximize": True},
    {"clip_norm": 0.5},
    {"clip_norm_per_array": 0.25},
    {"clip_value": 0.1},
    {"nonfinite": "zero"},
    {"nonfinite": "propagate"},
    {"bounds": (-0.5, 0.75)},
    {"ema_decay": 0.9},
    {"state_dtype": "int8", "seed": 3},
    {"state_dtype": "float32"},
    {"stats": True},
    {"clip_adaptive": 0.01},
    {"max_norm": 0.9},
    {
        "clip_adaptive": 0.5,
        "max_norm": 5.0,
        "unit_axes": -1,
        "clip_norm_per_array": 0.5,
        "weight_decay": 0.1,
        "decay_mode": "decoupled_after",
        "maximize": True,
        "bounds": (-0.75, 1.0),
        "ema_decay": 0.9,
        "state_dtype": "int8",
        "stats": True,
        "nonfinite": "zero",
    },
    {
        "weight_decay": 0.1,
        "l1": 0.01,
        "maximize": True,
        "clip_norm": 0.5,
        "clip_norm_per_array": 0.25,
        "clip_value": 0.1,
        "bounds": (0.0, None),
        "ema_decay": 0.75,
        "nonfinite": "zero",
    },
]

# The same for parameters of 16 bits alone.
LOW_PRECISION: list[dict[str, Any]] = [
    {"low_precision": "stochastic", "seed": 5, "state_dtype": "int8"},
    {"low_precision": "kahan", "stats": True, "max_norm": 1.0, "clip_adaptive": 0.1},
    {"low_precision": "master", "ema_decay": 0.9},
    {"low_precision": "split", "ema_decay": 0.9, "clip_norm": 0.5},
]


def low_precision_options(dtype: Any) -> list[dict[str, Any]]:
    """Those of them that parameters of this type take."""
    if np.dtype(dtype).itemsize > 2:
        return []
    return [options for options in LOW_PRECISION if options["low_precision"] != "split" or dtype != np.float16]


TRAIN: dict[str, tuple[type[Any], dict[str, Any]]] = {
    name: (entry.optimizer, settings) for entry in ENTRIES for name, settings in entry.train.items()
}
