"""Muon: the orthogonalisation by its polynomial, the rest against PyTorch, and other arrays against AdamW."""

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bits, setting_id, snapshot

import fusedstep as fs
from fusedstep import database, kernels, reference

BACKENDS = ["c", "reference"]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 1), (5, 5), (3, 40), (40, 3), (1, 7), (7, 1), (64, 65)]
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def by_singular_values(matrix, coefficients, n_steps, eps=1e-7):
    """The polynomial on each singular value, in float64."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / max(np.linalg.norm(matrix.astype(np.float64)), eps)
    a, b, c = coefficients
    for _ in range(n_steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (1.5, -0.5, 0.0)])
@pytest.mark.parametrize("n_steps", [0, 1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_orthogonalized(shape, coefficients, n_steps, dtype, tolerance, rng):
    """At worst 6e-15 in float64 and 3e-6 in float32 were seen, of directions of size 1."""
    for size in (1.0, 1e-5, 1e5):
        matrix = (size * rng.standard_normal(shape)).astype(dtype)
        found = reference.rules.orthogonalized(matrix, coefficients, n_steps, 1e-7)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, by_singular_values(matrix, coefficients, n_steps), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_orthogonalized_zeros(shape):
    assert not reference.rules.orthogonalized(np.zeros(shape), COEFFICIENTS, 5, 1e-7).any()


def in_full(grad, ns_coefficients, ns_steps, eps):
    """PyTorch's orthogonalisation without its rounding to bfloat16."""
    a, b, c = ns_coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "momentum": 0.5, "weight_decay": 0.0},
        {"adjust_lr_fn": "original", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1, "eps": 1e2},
    ],
    ids=setting_id,
)
def test_as_in_torch(settings, is_rounded, monkeypatch, rng):
    """To 1e-13 of the largest parameter, 6e-15 seen, in float64 throughout.

    With PyTorch's rounding of the iteration to bfloat16, to a tenth of a step's length; 5 % were seen.
    """
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch.optim._muon")
    if not is_rounded:
        monkeypatch.setattr(module, "_zeropower_via_newtonschulz", in_full)
    starts = [rng.standard_normal(shape) for shape in SHAPES]
    ours, theirs = [start.copy() for start in starts], [torch.tensor(start) for start in starts]
    opt, their_opt = fs.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(1 if is_rounded else 20):
        grads = [rng.standard_normal(shape) for shape in SHAPES]
        for tensor, grad in zip(theirs, grads):
            tensor.grad = torch.tensor(grad)
        opt.step(grads)
        their_opt.step()
    for our, their, start in zip(ours, theirs, starts):
        difference = np.linalg.norm(our - their.numpy())
        limit = 0.1 * np.linalg.norm(our - start) if is_rounded else 1e-13 * np.abs(our).max()
        assert difference <= limit, (our.shape, difference / limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_arrays_are_those_of_adamw(backend, rng):
    shapes = {"a": (5,), "b": (2, 3, 4), "c": (), "d": (0,)}
    starts = {name: np.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    others, ours = ({name: start.copy() for name, start in starts.items()} for _ in range(2))
    matrix = rng.standard_normal((3, 4))
    adamw = fs.AdamW(others, lr=lambda step: 0.05 / (step + 1), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    muon = fs.Muon(
        {**ours, "matrix": matrix},
        lr=lambda step: 0.1 / (step + 1),
        adamw_lr_ratio=0.5,
        adamw_betas=(0.8, 0.95),
        adamw_eps=1e-6,
        adamw_weight_decay=0.2,
        backend=backend,
    )
    for _ in range(4):
        grads = {name: np.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
        adamw.step(grads)
        muon.step({**grads, "matrix": rng.standard_normal((3, 4))})
    for name in shapes:
        assert_same_bits([ours[name], *muon.state[name].values()], [others[name], *adamw.state[name].values()])
        assert list(muon.state[name]) == list(adamw.state[name])


def matrices(rng, dtype):
    """Of many layouts, and what is no matrix."""
    big = rng.standard_normal((40, 60)).astype(dtype)
    return {
        "c": big[:5, :7].copy(),
        "f": big[:7, :5].copy(order="F"),
        "strided": big[::3, ::-2],
        "transposed": big[1:40:3, 1:10:2].T,
        "large": rng.standard_normal((50, 33)).astype(dtype),
        "empty": np.zeros((3, 0), dtype),
        "vector": rng.standard_normal(700).astype(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_by_both_backends(dtype, level):
    for options in [*database.OPTIONS, *database.low_precision_options(dtype)]:
        found = []
        for backend in BACKENDS:
            rng = np.random.default_rng(0)
            params = matrices(rng, dtype)
            opt = fs.Muon(params, lr=0.1, **options, backend=backend)
            for step in range(3):
                grads = {name: rng.standard_normal(p.shape).astype(dtype) for name, p in params.items()}
                if options.get("nonfinite") in ("zero", "propagate"):
                    grads["large"][step, step] = np.inf
                opt.step(grads, grad_scale=3.0)
            found.append([*params.values(), *(a for own in opt.state.values() for a in own.values())])
        assert_same_bits(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_do_not_matter(backend):
    rng = np.random.default_rng(0)
    params = matrices(rng, np.float64)
    plain = {name: p.copy() for name, p in params.items()}
    opts = [fs.Muon(each, lr=0.1, backend=backend) for each in (params, plain)]
    for _ in range(3):
        grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
        for opt in opts:
            opt.step(grads)
    assert_same_bits(list(params.values()), list(plain.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumes_and_accumulates(backend, rng):
    def make():
        params = matrices(np.random.default_rng(1), np.float32)
        return params, fs.Muon(params, lr=0.1, clip_norm=1.0, state_dtype="int8", backend=backend)

    params, opt = make()
    grads = [{name: rng.standard_normal(p.shape) for name, p in params.items()} for _ in range(6)]
    for pair in zip(grads[::2], grads[1::2]):
        for each in pair:
            opt.accumulate(each)
        opt.step()
    resumed_params, resumed = make()
    first_params, first = make()
    for i, pair in enumerate(zip(grads[::2], grads[1::2])):
        if i == 1:
            for name, p in first_params.items():
                resumed_params[name][...] = p
            resumed.load_state_dict(first.state_dict())
            first = resumed
        for each in pair:
            first.accumulate(each)
        first.step()
    assert_same_bits(list(resumed_params.values()), list(params.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups(backend, rng):
    """Each group has matrices and others; hyper-parameters may be edited."""
    start, grads = matrices(rng, np.float64), matrices(rng, np.float64)
    params = {name: p.copy() for name, p in start.items()}
    opt = fs.Muon(
        fs.group(params, {"c": {"lr": 0.5}, "f": None, "vector": {"lr": 0.25}}), lr=0.0, weight_decay=0.0, backend=backend
    )
    opt.step({name: g for name, g in grads.items() if name != "f"})
    for name in ("f", "strided", "large"):
        assert_same_bits([params[name]], [start[name]])
    lengths = np.linalg.svd(start["c"] - params["c"])[1]
    assert (lengths > 0.3).all()
    assert (lengths < 0.6).all()
    np.testing.assert_allclose(np.abs(params["vector"] - start["vector"] * (1 - 0.25 * 0.01)), 0.25, rtol=1e-4)
    next(group for group in opt.param_groups if "large" in group["names"])["lr"] = 0.1
    opt.step({name: g for name, g in grads.items() if name != "f"})
    assert all((params[name] != start[name]).any() for name in ("strided", "large"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_or_nothing(backend, monkeypatch, rng):
    params = matrices(rng, np.float32)
    opt = fs.Muon(params, lr=0.1, backend=backend)
    grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    opt.step(grads)
    before = snapshot(opt)

    def orthogonalized(matrix, *settings):
        if matrix.shape == params["large"].shape:
            raise MemoryError
        return whole(matrix, *settings)

    whole = reference.rules.orthogonalized
    with monkeypatch.context() as patch:
        patch.setattr(reference.rules, "orthogonalized", orthogonalized)
        with pytest.raises(MemoryError):
            opt.step(grads, zero_grads=True)
    assert snapshot(opt) == before
    assert grads["c"].all()
    grads["vector"][3] = np.nan
    with pytest.raises(fs.NonFiniteGradientError, match="'vector'"):
        opt.step(grads)
    assert snapshot(opt) == before
    grads["vector"][3] = 0.0
    assert opt.step(grads).applied


@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "eps": 0.5}], ids=setting_id)
@pytest.mark.parametrize("convention", ["torch", "keras", "optax"])
def test_conventions_of_the_function(convention, settings, rng):
    """It has PyTorch's defaults in all of them."""
    start, grads = rng.standard_normal((5, 3)), [rng.standard_normal((5, 3)) for _ in range(3)]
    settings = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw", **settings}
    wanted = start.copy()
    opt = fs.Muon({"w": wanted}, convention=convention, **settings)
    for grad in grads:
        opt.step({"w": grad})
    for module in (kernels, reference):
        found, buffer = start.copy(), np.zeros((5, 3))
        for step, grad in enumerate(grads, 1):
            module.muon(found, grad, buffer, step=step, convention=convention, **settings)
        assert_same_bits([found, buffer], [wanted, opt.state["w"]["momentum_buffer"]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nesterov_may_be_edited_where_others_know_it(backend, rng):
    """In optax that changes their rule, which goes on with their state."""
    start, grads = rng.standard_normal(5), [rng.standard_normal(5) for _ in range(3)]
    wanted, found = start.copy(), start.copy()
    m, v = np.zeros(5), np.zeros(5)
    opt = fs.Muon({"w": found}, 0.1, convention="optax", backend=backend)
    for step, (grad, rule) in enumerate(zip(grads, [kernels.nadam, kernels.adam, kernels.nadam]), 1):
        opt.param_groups[0]["nesterov"] = rule is kernels.nadam
        opt.step({"w": grad})
        rule(wanted, grad, m, v, step=step, lr=0.1, convention="optax")
    assert_same_bits([found], [wanted])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("decay_mode", "wanted"),
    [
        (None, {"weight_decay": 0.1 * 0.25, "decay_mode": "independent"}),
        ("coupled", {"weight_decay": 0.25, "decay_mode": "coupled"}),
    ],
)
def test_decay_of_other_arrays_in_keras(decay_mode, wanted, backend, rng):
    """By `lr` without their ratio, if it is decoupled as there."""
    found, grad = rng.standard_normal(5), rng.standard_normal(5)
    own = found.copy()
    settings = {"adamw_lr_ratio": 0.5, "adamw_weight_decay": 0.25, "decay_mode": decay_mode}
    fs.Muon({"w": found}, 0.1, convention="keras", **settings, backend=backend).step({"w": grad})
    kernels.adam(own, grad, np.zeros(5), np.zeros(5), step=1, lr=0.05, eps=1e-7, convention="keras", **wanted)
    assert_same_bits([found], [own])


@pytest.mark.parametrize("module", [kernels, reference])
def test_the_function_takes_matrices_alone(module):
    p = np.ones(3)
    with pytest.raises(ValueError) as caught:
        module.muon(p, np.ones(3), np.zeros(3), step=1)
    assert str(caught.value) == "param: expected a matrix, got shape (3,)"
    assert (p == 1).all()


def test_state_is_saved_without_the_work_array(tmp_path):
    opt = fs.Muon({"w": np.ones((2, 3)), "b": np.ones(3)})
    opt.step({"w": np.ones((2, 3)), "b": np.ones(3)})
    assert {name: list(own) for name, own in opt.state_dict()["state"].items()} == {
        "w": ["momentum_buffer"],
        "b": ["exp_avg", "exp_avg_sq"],
    }
    fs.save(tmp_path / "checkpoint", opt)
    other = fs.Muon({"w": np.zeros((2, 3)), "b": np.zeros(3)})
    fs.load(tmp_path / "checkpoint", other)
    assert snapshot(other) == snapshot(opt)
    assert opt.nbytes["momentum_buffer"] == 48
