"""Loss scaling."""

import numpy as np
import pytest

import fusedstep as fs


def outcomes(n, seed):
    return np.random.default_rng(seed).random(n) < 0.9


def gradient(finite):
    return np.array([0.5 if finite else np.inf, 1.0], np.float32)


@pytest.mark.parametrize("options", [{}, {"growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 5}], ids=str)
def test_scale_of_torch(options):
    torch = pytest.importorskip("torch")
    ours = fs.DynamicLossScaler(64.0, **({"growth_interval": 3} | options))
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, **({"growth_interval": 3} | options))
    opt = fs.SGD(np.zeros(2, np.float32), nonfinite="skip")
    w = torch.zeros(2, requires_grad=True)
    their_opt = torch.optim.SGD([w], lr=0.1)
    theirs.scale(torch.zeros(1))
    for finite in outcomes(200, seed=0):
        np.testing.assert_allclose(ours.scale, theirs.get_scale(), rtol=1e-5)  # theirs is a float32
        assert ours.step(opt, gradient(finite)).applied == finite
        w.grad = torch.from_numpy(gradient(finite))
        theirs.step(their_opt)
        theirs.update()


def test_scale_of_keras():
    # keras.optimizers.LossScaleOptimizer, by its equations: a counter of finite steps, factors of 2.
    scaler, opt = fs.DynamicLossScaler(2.0**15, growth_interval=4), fs.SGD(np.zeros(2, np.float32), nonfinite="skip")
    scale, counter = 2.0**15, 0
    for finite in outcomes(200, seed=1):
        scaler.step(opt, gradient(finite))
        if not finite:
            scale, counter = scale / 2, 0
        elif counter + 1 == 4:
            scale, counter = scale * 2, 0
        else:
            counter += 1
        assert scaler.scale == scale


def test_the_step_is_that_of_unscaled_gradients():
    w, v = np.ones(2, np.float32), np.ones(2, np.float32)
    scaled, plain = fs.Adam(w, nonfinite="skip"), fs.Adam(v)
    scaler = fs.DynamicLossScaler(1024.0)
    for k in range(1, 4):
        grads = np.array([0.5, -0.25], np.float32) * np.float32(k)
        scaler.step(scaled, grads * np.float32(scaler.scale) * 4, grad_scale=4.0)
        plain.step(grads)
        np.testing.assert_array_equal(w, v)


def test_half_precision_needs_it():
    # Gradients of 1e-8 are 0 in float16; scaled, they arrive.
    w, v = np.zeros(1, np.float32), np.zeros(1, np.float32)
    fs.SGD(w, lr=1.0).step(np.array([1e-8], np.float16))
    scaler = fs.DynamicLossScaler()
    scaler.step(fs.SGD(v, lr=1.0, nonfinite="skip"), np.array([1e-8 * scaler.scale], np.float16))
    assert w == 0
    np.testing.assert_allclose(v, -1e-8, rtol=1e-3)


def test_it_goes_on_after_loading():
    scaler, opt = fs.DynamicLossScaler(growth_interval=3), fs.SGD(np.zeros(2, np.float32), nonfinite="skip")
    scaler.step(opt, gradient(True))
    scaler.step(opt, gradient(True))
    other = fs.DynamicLossScaler(2.0, growth_interval=3)
    other.load_state_dict(scaler.state_dict())
    other.step(opt, gradient(True))
    assert other.scale == 2.0**17
    assert other.state_dict() == {"scale": 2.0**17, "good_steps": 0}


def test_an_interval_made_shorter():
    opt, scaler = fs.SGD(np.zeros(2, np.float32), nonfinite="skip"), fs.DynamicLossScaler(1.0, growth_interval=9)
    for _ in range(5):
        scaler.step(opt, gradient(True))
    scaler.growth_interval = 3
    scaler.step(opt, gradient(True))
    assert scaler.scale == 2.0


def test_the_scale_stays_in_range():
    opt = fs.SGD(np.zeros(2, np.float32), nonfinite="skip")
    for finite, backoff, growth in ((True, 0.5, 1e30), (False, 1e-30, 2.0)):
        scaler = fs.DynamicLossScaler(1.0, growth_interval=1, growth_factor=growth, backoff_factor=backoff)
        for _ in range(5):
            scaler.step(opt, gradient(finite))
        assert scaler.scale == (2.0**120 if finite else 2.0**-120)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init_scale": 0}, ValueError, "init_scale: expected a number in [1e-37, 1e37], got 0"),
        ({"growth_factor": 1.0}, ValueError, "growth_factor: expected a finite number > 1, got 1.0"),
        ({"backoff_factor": 1}, ValueError, "backoff_factor: expected a number in (0, 1), got 1"),
        ({"growth_interval": 0}, ValueError, "growth_interval: expected at least 1, got 0"),
        ({"growth_interval": 1.5}, TypeError, "growth_interval: expected a whole number, got 1.5"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error) as caught:
        fs.DynamicLossScaler(**options)
    assert str(caught.value) == message


def test_bad_use():
    scaler = fs.DynamicLossScaler()
    with pytest.raises(ValueError, match="opt: expected an optimizer with nonfinite='skip', got 'raise'"):
        scaler.step(fs.SGD(np.zeros(2)), np.zeros(2))
    for bad, error in (
        ({}, ValueError),
        ({"scale": 1.0, "good_steps": 2000}, ValueError),
        ({"scale": 1.0, "good_steps": 0.5}, TypeError),
        ({"scale": 0.0, "good_steps": 0}, ValueError),
    ):
        with pytest.raises(error, match="^state_dict"):
            scaler.load_state_dict(bad)
    assert scaler.scale == 2.0**16
    scaler.load_state_dict({"scale": np.float32(8.0), "good_steps": np.int64(1999)})  # as other formats give them back
    assert scaler.state_dict() == {"scale": 8.0, "good_steps": 1999}


def test_arguments_in_the_wrong_order():
    scaler = fs.DynamicLossScaler()
    with pytest.raises(TypeError, match="^opt: expected an optimizer, got list"):
        scaler.step([np.ones(2)], fs.SGD([np.ones(2)], lr=0.5, nonfinite="skip"))
    assert repr(scaler) == "DynamicLossScaler(scale=65536.0, 0 of 2000 good steps)"
