"""The embedding level: single arrays, the caller's own state."""

import ml_dtypes
import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, setting_id

import fusedstep as fs
from fusedstep import kernels, reference

STAGES = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "decay_mode": "independent"},
    {"grad_scale": 3.0, "maximize": True, "clip_factor": 0.3, "clip_value": 0.1, "weight_decay": 0.2, "l1": 0.1},
    {"zero_nonfinite": True},
    {"grad_scale": 3.0, "clip_factor": 2.0, "clip_adaptive": 0.01, "maximize": True, "max_norm": 2.0, "bounds": (-0.3, 1.0)},
]


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("stages", STAGES, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_kernels_are_the_reference(entry, settings, stages, dtype, level, rng):
    """And both are the optimizer."""
    name = entry.optimizer._rule.__name__
    shape = (19, 7)
    start = rng.standard_normal(shape).astype(dtype)
    opt = entry.optimizer([start.copy()], **settings)
    results = []
    for module in (kernels, reference):
        arrays = {"param": start.copy()} | {k: v.copy() for k, v in opt.state["0"].items()}
        of_state = ("amsgrad", "centered", "initial_accumulator_value", "min_dim_size_to_factor")
        values = {k: v for k, v in settings.items() if k not in of_state}
        for step in (1, 2, 3):
            grad = np.random.default_rng(step).standard_normal(shape).astype(dtype)
            if "zero_nonfinite" in stages:
                grad[::7, 3] = np.nan
            getattr(module, name)(grad=grad, step=step, **arrays, **(values | stages))
        results.append(list(arrays.values()))
    assert_same_bits(*results)
    assert (results[0][0] != start).any()
    if not stages:
        for step in (1, 2, 3):
            opt.step([np.random.default_rng(step).standard_normal(shape).astype(dtype)])
        assert_same_bits([opt.param_groups[0]["params"][0], *opt.state["0"].values()], results[0])


def ones(n=3, dtype=np.float32):
    return np.ones(n, dtype)


READ_ONLY = ones()
READ_ONLY.flags.writeable = False

BAD = [
    (dict(step=0), ValueError, "step: expected a whole number >= 1, got 0"),
    (dict(step=1.5), ValueError, "step: expected a whole number >= 1, got 1.5"),
    (dict(step=10**5000), ValueError, f"step: expected a whole number <= {2**53}, got a larger one"),
    (dict(lr=-1), ValueError, "lr: expected a finite number >= 0, got -1"),
    (dict(lr=float), TypeError, "lr: expected no schedule, which only optimizers follow, got <class 'float'>"),
    (
        dict(betas=(0.9, float)),
        TypeError,
        "betas: expected no schedule, which only optimizers follow, got (0.9, <class 'float'>)",
    ),
    (dict(betas=(0.9,)), TypeError, "betas: expected a pair of numbers, got (0.9,)"),
    (dict(param=READ_ONLY), ValueError, "param: expected a writeable array, got a read-only one"),
    (dict(exp_avg=READ_ONLY), ValueError, "exp_avg: expected a writeable array, got a read-only one"),
    (dict(exp_avg=ones(4)), ValueError, "exp_avg: expected shape (3,), got (4,)"),
    (dict(exp_avg=ones(3, np.float64)), TypeError, "exp_avg: expected dtype float32, got float64"),
    (dict(grad=ones(4)), ValueError, "grad: expected shape (3,), got (4,)"),
    (dict(grad=[1.0]), TypeError, "grad: expected an array, got list"),
    (
        dict(clip=1),
        TypeError,
        "adam: unknown option 'clip'; it has lr, betas, eps, eps_root, convention, grad_scale, zero_nonfinite, maximize, "
        "clip_factor, clip_adaptive, clip_value, weight_decay, decoupled_weight_decay, decay_mode, l1, max_norm, bounds, unit_axes",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_refusals(change, error, message):
    arguments = dict(param=ones(), grad=ones(), exp_avg=ones(), exp_avg_sq=ones(), step=1) | change
    before = {k: np.array(v) for k, v in arguments.items()}
    with pytest.raises(error) as caught:
        kernels.adam(**arguments)
    assert str(caught.value) == message
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {}, "sgd() missing a required argument: 'step'"),
        ((None, 1), {"step": 1}, "sgd() too many positional arguments"),
        ((), {"param": ones(), "step": 1}, "sgd() multiple values for argument 'param'"),
    ],
)
def test_arguments_are_pythons(args, options, message):
    with pytest.raises(TypeError) as caught:
        kernels.sgd(ones(), ones(), *args, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("module", [kernels, reference])
def test_momentum_without_buffer(module):
    with pytest.raises(ValueError, match="^momentum_buffer: expected an array"):
        module.sgd(ones(), ones(), step=1, momentum=0.9)
    with pytest.raises(ValueError, match="^momentum_buffer: expected an array"):
        module.rmsprop(ones(), ones(), ones(), step=1, momentum=0.9)


def test_aliasing():
    same = ones()
    with pytest.raises(ValueError, match="^exp_avg and exp_avg_sq: expected separate arrays"):
        kernels.adam(ones(), ones(), same, same, step=1)
    with pytest.raises(ValueError, match="^param and grad: expected separate arrays"):
        kernels.sgd(same, same, step=1)


def test_in_place_on_a_view():
    base = np.ones((4, 4), np.float32)
    kernels.sgd(base[::2, 1], ones(2), step=1, lr=0.5)
    assert base.sum() == 15
    assert fs.kernels is kernels
