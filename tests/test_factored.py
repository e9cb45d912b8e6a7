"""States that hold one number for each row and each column of a matrix in place of one for each element."""

import numpy as np
import pytest
from conftest import SETTINGS, assert_same_bits, run, setting_id

import fusedstep as fs
from fusedstep import reference
from fusedstep.state import FACTORS

FACTORED = [
    (entry.optimizer, settings)
    for entry, settings in SETTINGS
    if FACTORS.keys() & set(entry.optimizer(np.ones((2, 2)), **settings).state["0"])
]
factored = pytest.mark.parametrize(("optimizer", "settings"), FACTORED, ids=setting_id)

# Around a chunk of 32 rows, a block of 1,024 columns, and what a run has room for; and with no elements.
SHAPES = [
    (1, 1), (1, 1025), (1025, 1), (2, 3), (31, 33), (32, 32), (33, 31), (65, 1030), (100, 2049), (3, 5000), (700, 13),
    (257, 512), (97, 513), (2, 3, 4), (3, 1, 70), (2, 40, 1100), (2, 1, 3, 33, 5), (0, 3), (3, 0), (2, 0, 3),
]  # fmt: skip


def test_there_are_some():
    assert FACTORED


def problem(shape, dtype, n_steps=3, layout="C"):
    rng = np.random.default_rng(1)

    def laid_out(values):
        if layout == "F":
            return np.asfortranarray(values)
        if layout == "strided":
            room = np.zeros([2 * n for n in values.shape], dtype)
            room[tuple(slice(None, None, 2) for _ in shape)] = values
            return room[tuple(slice(None, None, 2) for _ in shape)]
        return values

    start = laid_out(rng.standard_normal(shape).astype(dtype))
    return start, [laid_out(rng.standard_normal(shape).astype(dtype)) for _ in range(n_steps)]


def both(optimizer, shape, dtype, layout="C", grad_layout="C", **settings):
    start, _ = problem(shape, dtype, layout=layout)
    _, grads = problem(shape, dtype, layout=grad_layout)
    results = []
    for backend in ("c", "reference"):
        param = start.copy(order="K")
        found, _ = run(optimizer, [param], [[g] for g in grads], **settings, backend=backend)
        results.append(found)
    return results


@factored
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(optimizer, settings, shape, dtype, level):
    assert_same_bits(*both(optimizer, shape, dtype, **settings))


@factored
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1025), (33, 31), (65, 1030), (2, 40, 1100), (3, 5000)], ids=str)
def test_threads(optimizer, settings, shape, num_threads, all_threads):
    assert_same_bits(*both(optimizer, shape, np.float32, **settings, num_threads=num_threads))


@factored
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
@pytest.mark.parametrize("grad_layout", ["C", "F", "strided"])
@pytest.mark.parametrize("shape", [(33, 31), (65, 1030), (2, 40, 33)], ids=str)
def test_layouts(optimizer, settings, shape, layout, grad_layout):
    assert_same_bits(*both(optimizer, shape, np.float32, layout, grad_layout, **settings))


@factored
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.5, "weight_decay": 0.1, "l1": 0.01, "maximize": True},
        {"clip_adaptive": 0.1, "max_norm": 3.0, "unit_axes": -1, "bounds": (-1, 1), "ema_decay": 0.9, "stats": True},
        {"clip_value": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "decay_mode": "decoupled_after", "clip_norm_per_array": 0.1, "state_dtype": "int8"},
    ],
    ids=str,
)
def test_options(optimizer, settings, options):
    assert_same_bits(*both(optimizer, (40, 1030), np.float32, **{**settings, **options}))


@factored
def test_one_element_decides(optimizer, settings):
    """A gradient that is not finite spoils its row and column, as it should, and the same way in both backends."""
    results = []
    for backend in ("c", "reference"):
        param, grad = np.ones((40, 50), np.float32), np.ones((40, 50), np.float32)
        grad[3, 7] = np.nan
        opt = optimizer(param, **settings, nonfinite="propagate", backend=backend)
        opt.step(grad)
        results.append([param, *opt.state["0"].values()])
        assert np.isnan(opt.state["0"]["row_var"]).sum() == np.isnan(opt.state["0"]["col_var"]).sum() == 1
    assert_same_bits(*results)


@factored
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_state(optimizer, settings, dtype, tmp_path):
    """Its shapes; whether it goes on after a checkpoint; and where else it may lie."""
    pytest.importorskip("safetensors")
    start, grads = problem((7, 5), dtype, 4, layout="F")
    p, q = start.copy(order="K"), start.copy(order="K")
    opt = optimizer({"w": p}, **settings)
    room = {}

    def allocate(name, shape, dtype):
        room[name] = np.full(shape, np.nan, dtype)
        return room[name]

    other = optimizer({"w": q}, **settings, allocate_state=allocate)
    own = opt.state["w"]
    assert {key: (a.shape, a.dtype.name) for key, a in own.items()} == {
        "row_var": ((7, 1), np.dtype(dtype).name), "col_var": ((1, 5), np.dtype(dtype).name),
    }  # fmt: skip
    assert opt.nbytes == {"row_var": 7 * p.itemsize, "col_var": 5 * p.itemsize}
    for g in grads[:2]:
        opt.step({"w": g})
        other.step({"w": g})
    assert_same_bits(list(other.state["w"].values()), list(own.values()))
    assert other.state["w"]["row_var"] is room["w.row_var"]
    fs.save(tmp_path / "x.safetensors", opt)
    for g in grads[2:]:
        opt.step({"w": g})
    fs.load(tmp_path / "x.safetensors", other)
    for g in grads[2:]:
        other.step({"w": g})
    assert_same_bits([q, *other.state["w"].values()], [p, *own.values()])


@factored
def test_refusals(optimizer, settings):
    with pytest.raises(ValueError, match=r"^allocate_state\('w.row_var'\): expected an array in C order"):
        optimizer({"w": np.ones((4, 6))}, allocate_state=lambda name, shape, dtype: np.zeros((*shape, 2), dtype)[..., 0])
    opt = optimizer({"w": np.ones((4, 6))}, **settings)
    saved = opt.state_dict()
    saved["state"]["w"]["row_var"] = np.ones((4, 6))
    with pytest.raises(ValueError, match=r"row_var'\]: expected shape \(4, 1\), got \(4, 6\)"):
        opt.load_state_dict(saved)


def test_kernel_alone():
    """Of a matrix, and of a vector."""
    for module in (fs.kernels, reference):
        w, g = np.ones((2, 3)), np.ones((2, 3))
        with pytest.raises(ValueError, match="^row_var: expected an array, got none"):
            module.adafactor(w, g, step=1)
        assert (w == 1).all()
        module.adafactor(w, g, np.zeros((2, 1)), np.zeros((1, 3)), step=1, lr=0.5)
        np.testing.assert_array_equal(w, 0.5)
        v, variance = np.ones(4), np.zeros(4)
        module.adafactor(v, np.full(4, 3.0), variance=variance, step=1, lr=0.5)
        np.testing.assert_array_equal(v, 0.5)
        np.testing.assert_array_equal(variance, 9.0)
    with pytest.raises(ValueError, match="^row_var: expected a C-contiguous array"):
        fs.kernels.adafactor(np.ones((2, 3)), np.ones((2, 3)), np.zeros((4, 1))[::2], np.zeros((1, 3)), step=1)
    with pytest.raises(ValueError, match=r"^col_var: expected shape \(1, 3\), got \(3,\)"):
        fs.kernels.adafactor(np.ones((2, 3)), np.ones((2, 3)), np.zeros((2, 1)), np.zeros(3), step=1)


def test_against_optax(rng):
    """Where PyTorch's equations are the same as its: eps beside squares alone, and a learning rate that does not fall."""
    import jax
    import optax

    with jax.enable_x64(True):
        start, lr = rng.standard_normal((6, 8)), 0.01
        param, theirs = start.copy(), jax.numpy.asarray(start)
        ours = fs.Adafactor(param, lr=lr, eps=(1e-30, 1e-3), convention="keras")
        opt = optax.adafactor(lr, min_dim_size_to_factor=1)
        state = opt.init(theirs)
        for _ in range(50):
            grad = rng.standard_normal((6, 8))
            ours.step(grad)
            updates, state = opt.update(jax.numpy.asarray(grad), state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        # Its count, and what that is raised to, are float32. Worst seen: 2.8e-9.
        np.testing.assert_allclose(param, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_rows_and_columns_without_gradients(convention, dtype, backend):
    """Where they meet, their product is too small for float32; PyTorch and Keras make it 0 / 0."""
    w, grad = np.ones((3, 4), dtype), np.ones((3, 4), dtype)
    grad[1] = grad[:, 2] = 0
    opt = fs.Adafactor(w, 0.5, eps=(1e-30, 1e-3), convention=convention, backend=backend)
    opt.step(grad)
    assert (w == np.where(grad == 0, 1, w[0, 0])).all()
    assert w[0, 0] == pytest.approx(0.5, rel=1e-6)
