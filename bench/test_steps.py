"""Time per step, rule by rule: compiled kernels, the NumPy reference and PyTorch side by side.

    pytest bench --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

Each group compares ways to make the same step; that they agree is checked before anything is timed. ``extra_info`` in the
saved JSON has the bytes a step must move and the rate reached. bench/ratios.py compares more carefully, in turn.
"""

import numpy as np
import pytest

from fusedstep import _core, database

SETTINGS = [(entry, settings) for entry in database.ENTRIES for settings in entry.settings[:2]]
SIZES = [1_000, 100_000, 1_000_000]


def label(entry, settings):
    return f"{entry.optimizer.__name__}({','.join(f'{k}={v}' for k, v in settings.items())})"


def make_fusedstep(entry, settings, start, grad, backend="c"):
    param = start.copy()
    opt = entry.optimizer([param], **settings, nonfinite="propagate", backend=backend)
    opt.bind([grad])
    return param, opt.step, opt


def make_torch(entry, settings, start, grad):
    torch = pytest.importorskip("torch")
    param = torch.from_numpy(start.copy())
    param.grad = torch.from_numpy(grad.copy())
    fused = {"fused": True} if entry.torch_name in ("SGD", "Adagrad", "Adam", "AdamW") else {}
    opt = getattr(torch.optim, entry.torch_name)([param], **({"lr": 1e-3} | settings | fused))
    return param.numpy(), opt.step


@pytest.mark.parametrize("peer", ["fusedstep", "reference", "torch"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=lambda value: "")
def test_step(benchmark, entry, settings, dtype, size, peer):
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal(size).astype(dtype), rng.standard_normal(size).astype(dtype)
    settings = {"lr": 1e-3, **settings}
    wanted, step, opt = make_fusedstep(entry, settings, start, grad, "reference")
    step()
    n_states = len(opt.state["0"])
    if peer == "torch":
        param, step = make_torch(entry, settings, start, grad)
        step()
        np.testing.assert_allclose(param, wanted, rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-7)
    else:
        param, step, _ = make_fusedstep(entry, settings, start, grad, "c" if peer == "fusedstep" else "reference")
        step()
        np.testing.assert_array_equal(param, wanted)

    benchmark.group = f"{label(entry, settings)} {dtype} {size:,}"
    benchmark(step)
    n_bytes = size * np.dtype(dtype).itemsize * (3 + 2 * n_states)  # reads all arrays, writes all but the gradient
    benchmark.extra_info.update(peer=peer, bytes=n_bytes, cpu_level=_core.get_level(), threads=_core.get_num_threads())
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(n_bytes / benchmark.stats["median"] / 1e9, 2)
