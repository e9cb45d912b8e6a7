"""The public surface: structures, names, groups, schedules, reports, and every refusal with its message."""

import array as array_module
import copy
import doctest
import inspect
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import setting_id, snapshot

import fusedstep as fs
from fusedstep import database, kernels, reference
from fusedstep._hyper import OPTION_DEFAULTS

BACKENDS = ["c", "reference"]


def ones(*shape):
    return np.ones(shape, np.float32)


# ---- Structures and names ----


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (ones(3), ["0"]),
        ([ones(3), ones(2)], ["0", "1"]),
        ((ones(3), ones(2)), ["0", "1"]),
        ({"w": ones(3), "b": ones(2)}, ["w", "b"]),
        ({"a": {"w": ones(3), "b": ones(2)}, "c": [ones(1), ones(4)]}, ["a.w", "a.b", "c.0", "c.1"]),
        ([{"params": [ones(3), ones(2)], "lr": 0.1}, {"params": [ones(4)]}], ["0", "1", "2"]),
        ([{"params": {"w": ones(3)}}, {"params": {"b": ones(2)}, "weight_decay": 0.5}], ["w", "b"]),
        ([{"params": ones(3)}, {"params": ones(2)}], ["0", "1"]),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_structures(params, names, backend):
    opt = fs.Adam(params, backend=backend)
    assert list(opt.state) == names
    assert [name for group in opt.param_groups for name in group["names"]] == names
    # Gradients of the same structure: here the parameters' own copies.
    copied = copy_tree(params)
    assert opt.step(copied) == (1, True, opt.step(copied).grad_norm, 1.0, {}, None)


def copy_tree(tree):
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, dict):
        return {k: copy_tree(v) for k, v in tree.items() if k not in ("lr", "weight_decay")}
    return type(tree)(copy_tree(v) for v in tree)


class Layer(NamedTuple):
    w: Any
    b: Any


def test_named_tuples():
    """Parameters have the names of their fields; gradients correspond by place."""
    params = {"first": Layer(ones(3), ones(2)), "last": Layer(w=ones(1), b=ones(4))}
    opt = fs.SGD(params, lr=1.0)
    assert list(opt.state) == ["first.w", "first.b", "last.w", "last.b"]
    for grads in copy_layers(params), {"first": (ones(3), ones(2)), "last": [ones(1), ones(4)]}:
        opt.step(grads)
    assert (params["first"].b == -1).all()
    assert (params["last"].w == -1).all()
    with pytest.raises(ValueError, match=r"^grads\['last'\]: expected 2 arrays, got 1$"):
        opt.step({"first": Layer(ones(3), ones(2)), "last": (ones(1),)})
    with pytest.raises(ValueError, match=r"^grads\['last.b'\]: expected shape \(4,\), got \(1,\)$"):
        opt.step({"first": Layer(ones(3), ones(2)), "last": Layer(w=ones(1), b=ones(1))})


def copy_layers(params):
    return {name: Layer(*(a.copy() for a in layer)) for name, layer in params.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_and_strings_of_numpy(backend):
    p = ones(2)
    opt = fs.SGD(
        p, lr=np.float32(0.5), nonfinite=np.str_("zero"), bounds=(np.array(-np.inf), np.float16(0.75)), backend=backend
    )
    for _ in range(2):
        opt.step(np.array([1.0, np.nan], np.float32))
    assert p.tolist() == [0.0, 0.75]


@pytest.mark.parametrize("optimizer", [fs.SGD, fs.AdamW])
def test_arguments_without_names(optimizer):
    name = optimizer.__name__
    with pytest.raises(TypeError, match=f"^{name}: expected all but params and lr by name, got 3 without$"):
        optimizer(ones(3), 0.1, 0.9)


def test_iterators_as_params_and_grads():
    params = {"w": ones(3), "b": ones(2)}
    opt = fs.SGD(params.values(), lr=1.0)
    opt.step(iter([ones(3), ones(2)]))
    assert not params["w"].any()
    assert not params["b"].any()


def test_iterators_that_have_given_all():
    params = iter([ones(3)])
    fs.SGD(params)
    with pytest.raises(ValueError, match="^params: expected arrays, got none from an iterator, which gives them once only$"):
        fs.SGD(params)
    with pytest.raises(ValueError, match=r"^params\['a'\]: expected arrays, got none from an iterator"):
        fs.SGD({"a": params, "b": ones(2)})
    assert fs.SGD([]).step([]).applied  # which says that there are none


def test_the_base_is_no_rule():
    with pytest.raises(TypeError, match="abstract class Optimizer"):
        fs.Optimizer(ones(3))


def test_groups_have_their_own_hyperparameters():
    a, b = ones(3), ones(3)
    opt = fs.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "momentum": 0.9}], lr=0.25)
    opt.step([[ones(3)], [ones(3)]])
    assert a[0] == 0.5
    assert b[0] == 0.75
    assert list(opt.state["0"]) == []
    assert list(opt.state["1"]) == ["momentum_buffer"]
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[1]["lr"] = 0.0
    opt.step([{"params": [ones(3)]}, {"params": [ones(3)]}])
    assert a[0] == 0.5
    assert b[0] == 0.75


def test_momentum_switched_on_between_steps():
    p = ones(3)
    opt = fs.SGD([p], lr=0.5)
    opt.step([ones(3)])
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([ones(3)])
    assert p[0] == 0.0
    opt.step([ones(3)])
    assert p[0] == -0.75
    assert opt.steps == 3


def test_edited_hyperparameters_count_from_the_next_step():
    p = ones(2)
    opt = fs.SGD([p], lr=np.array(0.5), momentum=0.0)
    opt.step([ones(2)])
    opt.param_groups[0]["lr"][...] = 0.25  # in place
    opt.step([ones(2)])
    assert p[0] == 0.25
    opt.param_groups[0]["lr"] = np.array([1.0, 2.0])
    with pytest.raises(TypeError, match=r"^lr: expected a finite number >= 0, got array\(\[1., 2.\]\)$"):
        opt.step([ones(2)])
    betas = [0.5, 0.5]
    q, wanted = ones(2), ones(2)
    opt, other = fs.Adam([q], betas=betas), fs.Adam([wanted], betas=(0.5, 0.5))
    for o in (opt, other):
        o.step([ones(2)])
    betas[0] = 0.9
    other.param_groups[0]["betas"] = (0.9, 0.5)
    for o in (opt, other):
        o.step([ones(2) * 3])
    np.testing.assert_array_equal(q, wanted)


# ---- Hyper-parameters as functions of the step ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_callable_hyperparameters(backend):
    seen = []

    def lr(step):
        seen.append(step)
        return 0.5**step

    p = ones(2)
    opt = fs.SGD([p], lr=lr, clip_norm=lambda step: 10.0, backend=backend)
    for _ in range(3):
        opt.step([ones(2)])
    assert p[0] == 1 - 1 - 0.5 - 0.25
    assert sorted(set(seen)) == [0, 1, 2]
    q = ones(2)
    fs.Adam([q], betas=(lambda step: 0.9, 0.999), backend=backend).step([ones(2)])
    fixed = ones(2)
    fs.Adam([fixed], backend=backend).step([ones(2)])
    np.testing.assert_array_equal(q, fixed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), -1.0, "x"])
def test_callable_that_returns_nonsense_changes_nothing(backend, value):
    p = ones(2)
    opt = fs.Adam([p], lr=lambda step: 0.1 if step == 0 else value, backend=backend)
    opt.step([ones(2)])
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match="^lr: expected a finite number >= 0, got"):
        opt.step([ones(2)])
    assert snapshot(opt) == before


def test_callable_that_raises_changes_nothing():
    p = ones(2)
    opt = fs.Adam([p], lr=lambda step: 0.1 if step == 0 else 1 / 0)
    opt.step([ones(2)])
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step([ones(2)])
    assert snapshot(opt) == before


# ---- Steps ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_report(backend):
    opt = fs.SGD([np.zeros(2)], lr=1.0, clip_norm=1.0, backend=backend)
    report = opt.step([np.array([3.0, 4.0])])
    assert report.step == 1
    assert report.applied
    assert report.grad_norm == 5.0
    assert report.clip_factor == 1 / (5 + 1e-6)
    assert fs.SGD([np.zeros(2)], nonfinite="propagate", backend=backend).step([np.ones(2)]).grad_norm is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_never_changed(backend, rng):
    for options in database.OPTIONS:
        grad = rng.standard_normal(50)
        before = grad.copy()
        fs.Adam([rng.standard_normal(50)], backend=backend, **options).step([grad], grad_scale=2.0)
        np.testing.assert_array_equal(grad, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_grads(backend):
    p, g = ones(3), ones(3)
    opt = fs.SGD([p], lr=0.5, nonfinite="skip", backend=backend)
    for bad in ("no", 1, np.array([1, 0])):
        with pytest.raises(TypeError, match="^zero_grads: expected True or False, got "):
            opt.step([g], zero_grads=bad)
    opt.step([g], zero_grads=True)
    with pytest.raises(TypeError, match="^zero_grads: expected True or False, got 'no'$"):
        opt.step([g], zero_grads="no")
    assert p[0] == 0.5
    assert not g.any()
    g[1] = np.nan
    assert not opt.step([g], zero_grads=True).applied
    assert not g.any()
    g.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"^grads\['0'\]: expected a writeable array for zero_grads=True, got a read-only one$"
    ):
        opt.step([g], zero_grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bind(backend):
    p, g = ones(3), np.zeros(3, np.float32)
    opt = fs.SGD({"w": p}, lr=0.5, backend=backend)
    with pytest.raises(ValueError, match="^grads: expected gradients, got none, and none are bound$"):
        opt.step()
    opt.bind({"w": g})
    g[...] = 1
    opt.step()
    assert p[0] == 0.5
    g[...] = 0
    opt.step()
    assert p[0] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scale_divides(backend):
    for scale in (3.0, 1024.0):
        p, q = np.ones(100), np.ones(100)
        g = np.linspace(-1, 1, 100)
        fs.SGD([p], lr=0.1, backend=backend).step([g], grad_scale=scale)
        fs.SGD([q], lr=0.1, backend=backend).step([g / scale])
        np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_no_arrays(backend):
    for params in ([], {}, [np.zeros((0, 3))], [np.zeros(())]):
        opt = fs.Adam(params, backend=backend, clip_norm=1.0)
        grads = {} if isinstance(params, dict) else [np.zeros_like(p) for p in params]
        assert opt.step(grads).grad_norm == 0.0


# ---- Anything that is a view ----


def test_array_likes():
    buffer = array_module.array("f", [1.0, 2.0])
    opt = fs.SGD([buffer], lr=1.0)
    opt.step([array_module.array("f", [1.0, 1.0])])
    assert list(buffer) == [0.0, 1.0]

    base = ones(2)
    interface = SimpleNamespace(__array_interface__=base.__array_interface__, keep=base)
    fs.SGD([interface], lr=1.0).step([ones(2)])
    assert not base.any()

    zero_d = np.array(1.0, np.float32)
    fs.SGD([zero_d], lr=1.0).step([np.float32(0.5)])
    assert zero_d == 0.5


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    p = torch.ones(3)
    fs.SGD([p], lr=0.5).step([torch.ones(3)])
    assert p[0] == 0.5
    with pytest.raises(TypeError, match=r"^params\['0'\]: expected an array, got Parameter that cannot be viewed as one"):
        fs.SGD([torch.nn.Parameter(p)])


# ---- Refusals ----

READ_ONLY = ones(3)
READ_ONLY.flags.writeable = False
SHARED = ones(10)

BAD_PARAMS = [
    ({"w1": READ_ONLY}, ValueError, "params['w1']: expected a writeable array, got a read-only one"),
    ([1.0], TypeError, "params['0']: expected an array, got float"),
    ([[1.0]], TypeError, "params['0.0']: expected an array, got float"),
    ([np.float32(1)], TypeError, "params['0']: expected an array, got float32"),
    (["w"], TypeError, "params['0']: expected an array, got str"),
    (None, TypeError, "params['0']: expected an array, got NoneType"),
    (
        [np.zeros(3, int)],
        TypeError,
        "params['0']: expected dtype float32, float64, float16 or bfloat16, got int64",
    ),
    (
        [np.zeros(3, complex)],
        TypeError,
        "params['0']: expected dtype float32, float64, float16 or bfloat16, got complex128",
    ),
    ([np.zeros(3, ">f4")], TypeError, "params['0']: expected native byte order, got >f4"),
    ([np.ma.zeros(3)], TypeError, "params['0']: expected an array without a mask, got a masked array"),
    (
        {"a": SHARED[:6], "b": SHARED[5:]},
        ValueError,
        "params['a'] and params['b']: expected separate arrays, got arrays that share memory",
    ),
    (
        [SHARED, SHARED],
        ValueError,
        "params['0'] and params['1']: expected separate arrays, got arrays that share memory",
    ),
    (
        [np.lib.stride_tricks.as_strided(SHARED, (5, 3), (4, 4))],
        ValueError,
        "params['0']: expected elements of their own, got an array whose elements share memory",
    ),
    ({1: ones(1), "1": ones(1)}, ValueError, "params: expected names of their own, got some twice in [1, '1']"),
    ([{"params": {"w": ones(1)}}, {"params": {"w": ones(1)}}], ValueError, "params['w']: expected names of their own, got one name twice"),
    (
        [{"params": ones(1), "learning_rate": 1}],
        TypeError,
        "param_groups[0]: unknown key 'learning_rate'; a group has params, lr, momentum, dampening, nesterov, weight_decay, "
        "decoupled_weight_decay, decay_mode, l1, maximize, clip_value, clip_norm_per_array, clip_adaptive, "
        "max_norm, unit_axes, bounds, ema_decay",
    ),
    ([{"params": ones(1), "lr": -1}], ValueError, "param_groups[0].lr: expected a finite number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMS, ids=[message[:40] for _, _, message in BAD_PARAMS])
def test_bad_params(params, error, message):
    with pytest.raises(error) as caught:
        fs.SGD(params)
    assert str(caught.value) == message


def test_interleaved_views_are_separate():
    base = np.zeros(10)
    fs.SGD([base[::2], base[1::2]], lr=1.0).step([np.ones(5), np.ones(5) * 2])
    np.testing.assert_array_equal(base, [-1, -2] * 5)
    strange = np.lib.stride_tricks.as_strided(base, (2, 2), (24, 16))  # offsets 0, 2, 3, 5: interleaved, not shared
    fs.SGD([strange], lr=1.0).step([np.ones((2, 2))])
    np.testing.assert_array_equal(base, [-2, -2, -2, -3, -1, -3, -1, -2, -1, -2])


BAD_GRADS = [
    (lambda p: None, ValueError, "grads: expected gradients, got none, and none are bound"),
    (lambda p: [ones(3), ones(2)], TypeError, "grads: expected a mapping like the parameters', got list"),
    (lambda p: {"w": ones(3)}, ValueError, "grads['b']: expected a gradient, got none"),
    (
        lambda p: {"w": ones(3), "b": ones(2), "c": ones(1)},
        ValueError,
        "grads['c']: expected a parameter's name, got a name that none has",
    ),
    (lambda p: {"w": ones(3), "b": ones(3)}, ValueError, "grads['b']: expected shape (2,), got (3,)"),
    (lambda p: {"w": ones(3, 1), "b": ones(2)}, ValueError, "grads['w']: expected shape (3,), got (3, 1)"),
    (lambda p: {"w": ones(3), "b": None}, TypeError, "grads['b']: expected an array, got NoneType"),
    (
        lambda p: {"w": ones(3), "b": np.ones(2, np.int32)},
        TypeError,
        "grads['b']: expected dtype float32, float64, float16 or bfloat16, got int32",
    ),
    (lambda p: {"w": ones(3).astype(">f4"), "b": ones(2)}, TypeError, "grads['w']: expected native byte order, got >f4"),
    (
        lambda p: {"w": p["w"], "b": ones(2)},
        ValueError,
        "params['w'] and grads['w']: expected separate arrays, got arrays that share memory",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "error", "message"), BAD_GRADS, ids=[message[:40] for _, _, message in BAD_GRADS])
def test_bad_grads(make, error, message, backend):
    params = {"w": ones(3), "b": ones(2)}
    opt = fs.Adam(params, backend=backend)
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.step(make(params))
    assert str(caught.value) == message
    assert snapshot(opt) == before
    assert opt.step({"w": ones(3), "b": ones(2)}).step == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_gradients_leave_the_bound_ones(backend):
    p = ones(3)
    opt = fs.SGD([p], lr=0.5, backend=backend)
    opt.bind([ones(3)])
    with pytest.raises(ValueError, match="shape"):
        opt.step([ones(4)])
    with pytest.raises(ValueError, match="share memory"):
        opt.step([p])
    opt.step()
    assert p[0] == 0.5


def test_moved_gradient_is_checked_again():
    """A view that begins where the last one did, but reaches into the parameter."""
    base = np.zeros(20)
    opt = fs.SGD([base[10:]], lr=1.0)
    opt.step([base[:10]])
    with pytest.raises(ValueError, match="share memory"):
        opt.step([base[::2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_made_read_only_later(backend):
    p = ones(3)
    opt = fs.SGD({"w": p}, backend=backend)
    p.flags.writeable = False
    with pytest.raises(ValueError, match=r"^params\['w'\]: expected a writeable array, got a read-only one$"):
        opt.step({"w": ones(3)})
    assert p[0] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_of_ndarray(backend, tmp_path):
    class Special(np.ndarray):
        pass

    base = np.ones((3, 4), np.float32)
    fs.SGD([base.view(Special)], lr=0.5, backend=backend).step([np.ones_like(base).view(Special)])
    assert (base == 0.5).all()
    mapped = np.memmap(tmp_path / "p", np.float32, "w+", shape=(5,))
    fs.SGD([mapped], lr=1.0, backend=backend).step([np.ones(5)])
    assert (mapped == -1).all()
    with pytest.raises(TypeError, match=r"^grads\['0'\]: expected an array without a mask, got a masked array$"):
        fs.SGD([mapped], backend=backend).step([np.ma.ones(5)])


def test_policy_edited_to_nonsense():
    p = ones(2)
    opt = fs.SGD([p])
    opt.nonfinite = "ignore"
    with pytest.raises(ValueError, match="^nonfinite: expected one of 'raise', 'skip', 'zero', 'propagate', got 'ignore'$"):
        opt.step([ones(2)])


def test_no_copies():
    with pytest.raises(
        TypeError, match=r"^Adam belongs to its arrays and cannot be copied or pickled: use its state_dict\(\)$"
    ):
        copy.deepcopy(fs.Adam([ones(2)]))


def test_gradient_that_is_state():
    opt = fs.SGD([np.ones(3)], momentum=0.9)
    with pytest.raises(ValueError, match="share memory"):
        opt.step([opt.state["0"]["momentum_buffer"]])


def test_wrong_gradient_count():
    opt = fs.SGD([ones(3), ones(2)])
    with pytest.raises(ValueError, match="^grads: expected 2 arrays, got 1$"):
        opt.step([ones(3)])


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), 1e-300, "1", True])
def test_bad_grad_scale(bad):
    p = ones(2)
    with pytest.raises((TypeError, ValueError), match=r"^grad_scale: expected a number in \[1e-37, 1e37\], got"):
        fs.SGD([p]).step([ones(2)], grad_scale=bad)
    assert p[0] == 1


INVALID = [(e, *case) for e in database.ENTRIES for case in [*e.invalid, *database.INVALID]]


@pytest.mark.parametrize(("entry", "settings", "error", "message"), INVALID, ids=setting_id)
def test_invalid_settings(entry, settings, error, message):
    with pytest.raises(error) as caught:
        entry.optimizer([ones(2)], **settings)
    assert str(caught.value) == message


def test_unknown_option():
    with pytest.raises(
        TypeError, match="^Adam: unknown option 'learning_rate'; it has lr, betas, eps, eps_root, amsgrad, weight_decay, "
    ):
        fs.Adam([ones(2)], learning_rate=0.1)


# ---- Signatures ----


@pytest.mark.parametrize("entry", database.ENTRIES, ids=setting_id)
def test_every_rule_has_every_option(entry):
    parameters = inspect.signature(entry.optimizer).parameters
    assert set(OPTION_DEFAULTS) <= set(parameters)
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["params", "lr"]


def test_kernels_have_the_references_signatures():
    names = list(reference.__all__)
    assert sorted(kernels.__all__) == sorted(names)
    assert sorted({entry.optimizer._rule.__name__ for entry in database.ENTRIES}) == sorted(names)
    for name in names:
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(reference, name))
        assert getattr(kernels, name).__doc__.startswith(getattr(reference, name).__doc__)


@pytest.mark.parametrize("name", kernels.__all__)
def test_kernels_are_documented(name):
    kernel = getattr(kernels, name)
    described = kernel.__doc__[: kernel.__doc__.index("Raises\n")]
    for parameter in inspect.signature(kernel).parameters:
        assert any(before + parameter in described for before in ("\n    ", "\n    **", ", "))
    example = doctest.DocTestParser().get_doctest(kernel.__doc__, {}, name, None, 0)
    assert doctest.DocTestRunner().run(example) == (0, 5)  # failed, of so many


def test_wrong_number_of_groups():
    w, b = np.ones(2), np.ones(3)
    opt = fs.SGD([{"params": [w]}, {"params": [b], "lr": 0.1}])
    with pytest.raises(ValueError, match="^grads: expected 2 groups, got 1$"):
        opt.step([[np.ones(2)]])
    assert (w == 1).all()


def test_overlap_that_is_too_hard_to_decide(monkeypatch):
    """np.shares_memory gives up after a bounded effort: then arrays count as overlapping."""
    a = np.zeros(100)
    p, q = a[::2], a[1::2]
    fs.SGD([p, q])

    def give_up(*_, **options):
        assert options == {"max_work": 100_000}
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", give_up)
    with pytest.raises(
        ValueError, match=r"^params\['0'\] and params\['1'\]: expected separate arrays, got arrays that share memory$"
    ):
        fs.SGD([p, q])


def test_state_is_one_block_laid_out_like_the_parameters():
    room = np.zeros(1000, np.float32)
    params = {
        "a": room[3:103],
        "b": room[200:320].reshape(10, 12).T,
        "half": np.zeros((5, 7), np.float16),
        "odd": np.frombuffer(bytearray(41), np.float64, 5, offset=1),
        "empty": np.zeros((0, 3)),
        "scalar": np.zeros(()),
        "backwards": room[900:600:-2],
        "pages": np.zeros(4096 + 77, np.float32)[77:],
        "half pages": np.zeros(4096 + 99, np.float16)[99:],
        "short of that": np.zeros(4095 + 55, np.float32)[55:],
    }
    opt = fs.Adam(params)
    arrays = [(params[name], state) for name, own in opt.state.items() for state in own.values()]
    assert len(arrays) == 20
    assert len({id(state.base) for _, state in arrays}) == 1
    for param, state in arrays:
        wanted = np.zeros_like(param, state.dtype)
        assert state.shape == wanted.shape
        assert not state.any()
        assert state.strides == wanted.strides or not state.size
        low = min(
            param.ctypes.data, param.ctypes.data + sum(s * (n - 1) for s, n in zip(param.strides, param.shape) if s < 0)
        )
        unit = 4096 if state.nbytes >= 4 * 4096 else 64
        assert not state.size or (state.ctypes.data - low // state.itemsize * state.itemsize) % unit == 0
    assert not any(np.shares_memory(a, b) for i, (_, a) in enumerate(arrays) for _, b in arrays[:i])


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda groups: groups[0].pop("lr"), ValueError, "param_groups[0]['lr']: expected a value, got none"),
        (lambda groups: groups[0].update(learning_rate=5.0), TypeError, "param_groups[0]: unknown key 'learning_rate'"),
        (lambda groups: groups.append(dict(groups[0])), ValueError, "param_groups: expected 1 as at first, got 2"),
        (lambda groups: groups.clear(), ValueError, "param_groups: expected 1 as at first, got 0"),
        (lambda groups: groups.__setitem__(0, None), TypeError, "param_groups: expected a list of dicts, got [None]"),
    ],
    ids=["without lr", "unknown", "another", "none", "no dict"],
)
def test_edits_that_are_none_of_a_hyper_parameter(backend, edit, error, message):
    w = np.ones(2)
    opt = fs.SGD({"w": w}, lr=0.5, backend=backend)
    opt.step({"w": np.ones(2)})
    edit(opt.param_groups)
    with pytest.raises(error, match=re.escape(message)):
        opt.step({"w": np.ones(2)})
    assert opt.steps == 1
    np.testing.assert_array_equal(w, [0.5, 0.5])


def test_classes_derived_from_a_rule():
    class Fast(fs.Adam):
        def __init__(self, params, lr=0.5, betas=(0.5, 0.5)):
            super().__init__(params, lr, betas=betas)

    class Variadic(fs.Adam):
        def __init__(self, *args, **options):
            super().__init__(args[0], lr=args[1], betas=args[2], **options)

    p, q, r = ones(2), ones(2), ones(2)
    for opt in Fast(p, 0.5, (0.5, 0.75)), Variadic(q, 0.5, (0.5, 0.75)), fs.Adam(r, lr=0.5, betas=(0.5, 0.75)):
        opt.step(ones(2))
        opt.step(ones(2) * 3)
    np.testing.assert_array_equal(p, r)
    np.testing.assert_array_equal(q, r)
    with pytest.raises(TypeError, match="^Fast: expected all but params and lr and betas by name, got 4 without$"):
        Fast(p, 0.5, (0.5, 0.5), 1e-8)


def test_attributes_that_would_have_no_effect():
    opt = fs.SGD(np.ones(2), lr=0.5)
    for name, value in ("stats", True), ("seed", 3), ("backend", "reference"), ("state_dtype", "int8"):
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed any more"):
            setattr(opt, name, value)
    with pytest.raises(AttributeError, match=re.escape("lr: expected to be set for a group: opt.param_groups[0]['lr']")):
        opt.lr = 0.1


@pytest.mark.parametrize("value", [0, -3, 2**17, 2**80, "x", 1.5])
def test_number_of_threads(value):
    """Wherever it is given, before anything changes."""
    error = ValueError if isinstance(value, int) else TypeError
    opt = fs.SGD(np.ones(2), lr=0.5)
    opt.num_threads = value
    before = fs.get_num_threads()
    for call in (
        lambda: opt.step(np.ones(2)),
        lambda: fs.SGD(np.ones(2), lr=0.5, num_threads=value),
    ):
        with pytest.raises(error, match="^num_threads: expected"):
            call()
    with pytest.raises(error, match="^n: expected"):
        fs.set_num_threads(value)
    with fs.threads(1):
        pass
    assert opt.steps == 0
    assert fs.get_num_threads() == before
