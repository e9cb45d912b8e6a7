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
        w, variance = np.ones((2, 3)), np.zeros((2, 3))
        module.adafactor(w, np.full((2, 3), 3.0), variance=variance, step=1, lr=0.5)
        np.testing.assert_array_equal(w, 0.5)
        np.testing.assert_array_equal(variance, 9.0)
    with pytest.raises(ValueError, match="^row_var: expected a C-contiguous array"):
        fs.kernels.adafactor(np.ones((2, 3)), np.ones((2, 3)), np.zeros((4, 1))[::2], np.zeros((1, 3)), step=1)
    with pytest.raises(ValueError, match="^variance: expected an array, got none"):
        fs.kernels.adafactor(np.ones(3), np.ones(3), np.zeros((1, 1)), np.zeros((1, 3)), step=1)
    with pytest.raises(ValueError, match="^param: expected a view with the two largest axes last"):
        fs.kernels.adafactor(np.ones((3, 1, 2)), np.ones((3, 1, 2)), convention="optax", step=1)
    with pytest.raises(ValueError, match=r"^col_var: expected shape \(1, 3\), got \(3,\)"):
        fs.kernels.adafactor(np.ones((2, 3)), np.ones((2, 3)), np.zeros((2, 1)), np.zeros(3), step=1)


KINDS = {"row_var", "col_var"}, {"variance"}


@pytest.mark.parametrize("convention", ["torch", "keras", "optax"])
def test_small_matrices(convention):
    shapes = [(5, 5), (5, 4), (4, 5), (4, 9, 9), (3, 4, 9), (2, 2, 5, 6), (9,), (), (0, 9)]
    params = {str(shape): np.ones(shape) for shape in shapes}
    opt = fs.Adafactor(params, 0.1, min_dim_size_to_factor=5, convention=convention)
    factored = {name for name, own in opt.state.items() if own.keys() == KINDS[0]}
    assert all(own.keys() in KINDS for own in opt.state.values())
    assert factored == {"(5, 5)", "(4, 9, 9)", "(2, 2, 5, 6)"}
    assert all(own["variance"].shape == params[name].shape for name, own in opt.state.items() if name not in factored)
    if convention != "optax":
        assert fs.Adafactor(np.ones((0, 9)), convention=convention).state["0"].keys() == KINDS[0]  # as in PyTorch


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("is_schedule", [False, True])
def test_min_dim_size_that_changes(backend, is_schedule):
    """States of the other kind begin anew: these steps are those of an optimizer that begins then, but for their number."""
    sizes = [1, 1, 4, 4, 1]
    start, grads = problem((3, 5), np.float64, len(sizes))
    param = start.copy()
    opt = fs.Adafactor(
        {"w": param, "v": np.ones(3)}, min_dim_size_to_factor=sizes.__getitem__ if is_schedule else sizes[0], backend=backend
    )
    v = opt.state["v"]["variance"]
    own = {}
    for i, (size, grad) in enumerate(zip(sizes, grads)):
        if not is_schedule:
            opt.param_groups[0]["min_dim_size_to_factor"] = size
        before = param.copy()
        assert opt.step({"w": grad, "v": np.ones(3)}).applied
        if i == 0 or sizes[i - 1] != size:
            own = {"row_var": np.zeros((3, 1)), "col_var": np.zeros((1, 5))} if size == 1 else {"variance": np.zeros((3, 5))}
        reference.adafactor(before, grad, **own, step=i + 1)
        assert_same_bits([param, *opt.state["w"].values()], [before, *own.values()])
        assert opt.state["w"].keys() == own.keys()
        assert opt.state["v"]["variance"] is v


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_min_dim_size_comes_with_a_state_dict(backend, tmp_path):
    start, grads = problem((3, 5), np.float32, 4)

    def make(size):
        param = start.copy()
        return param, fs.Adafactor({"w": param}, min_dim_size_to_factor=size, backend=backend)

    for size, other_size in [(1, 4), (4, 1)]:
        p, opt = make(size)
        q, other = make(other_size)
        for g in grads[:2]:
            opt.step({"w": g})
            other.step({"w": g})
        q[...] = p
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["min_dim_size_to_factor"] == size
        for g in grads[2:]:
            opt.step({"w": g})
            other.step({"w": g})
        assert_same_bits([q, *other.state["w"].values()], [p, *opt.state["w"].values()])
        saved = opt.state_dict()
        saved["param_groups"][0]["min_dim_size_to_factor"] = other_size
        before = [a.copy() for a in other.state["w"].values()]
        with pytest.raises(
            ValueError, match=r"^state_dict\['state'\]\['w'\]: expected \['(variance|col_var', 'row_var)'\], got"
        ):
            other.load_state_dict(saved)
        assert_same_bits(list(other.state["w"].values()), before)
        assert other.param_groups[0]["min_dim_size_to_factor"] == size


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("convention", ["torch", "keras", "optax"])
def test_rows_and_columns_without_gradients(convention, dtype, backend):
    """Where they meet, their product is too small for float32; PyTorch and Keras make it 0 / 0."""
    w, grad = np.ones((3, 4), dtype), np.ones((3, 4), dtype)
    grad[1] = grad[:, 2] = 0
    opt = fs.Adafactor(w, 0.5, eps=(1e-30, 1e-3), min_dim_size_to_factor=0, convention=convention, backend=backend)
    opt.step(grad)
    assert (w == np.where(grad == 0, 1, w[0, 0])).all()
    assert w[0, 0] == pytest.approx(0.5, rel=1e-6)
