"""AdamW against PyTorch's fused step, the NumPy reference and the roofline: ratios, in one process, taken in turn.

    python bench/ratios.py [--sizes 1000 100000 1000000 64000000] [--dtype float32] [--threads N]

The roofline is a loop in the library that reads and writes the same arrays, with one addition each. Every way is warmed up
again in its turn. Medians; the ratio of two ways is the median of the ratios of neighbouring runs.
"""

import argparse
import statistics
import time

import numpy as np

import fusedstep as fs
from fusedstep import _core, config
from fusedstep.progress import progress

SECONDS = 5.0  # for one size
SETTINGS = dict(lr=1e-3, weight_decay=0.01)


def roofline(start, grad):
    param, states = start.copy(), tuple(np.zeros_like(start) for _ in range(2))
    plan = _core.Plan([param], [states], [0], ["roofline2"])
    plan.bind([grad])
    plan.set_group(0, {"lr": 0.0})

    def step():
        plan.measure(nonfinite="propagate")
        plan.update(True, False)

    return param, step


def fusedstep(start, grad, backend="c"):
    param = start.copy()
    opt = fs.AdamW([param], **SETTINGS, nonfinite="propagate", backend=backend)
    opt.bind([grad])
    return param, opt.step


def torch_fused(start, grad):
    import torch

    param = torch.from_numpy(start.copy())
    param.grad = torch.from_numpy(grad.copy())
    opt = torch.optim.AdamW([param], **SETTINGS, fused=True)
    return param.numpy(), opt.step


def timed(step, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure(size, dtype, with_torch):
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal(size, dtype), rng.standard_normal(size, dtype)
    made = {"fusedstep": fusedstep(start, grad), "roofline": roofline(start, grad)}
    if with_torch:
        made["torch fused"] = torch_fused(start, grad)
    if size <= 1_000_000:
        made["reference"] = fusedstep(start, grad, "reference")
    for _, step in made.values():
        step()
    for name, (param, _) in made.items():
        if name != "roofline":
            np.testing.assert_allclose(param, made["fusedstep"][0], rtol=1e-4, atol=1e-7, err_msg=name)
    repeats = {name: max(1, round(2e-3 / timed(step, 3))) for name, (_, step) in made.items()}
    times = {name: [] for name in made}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["fusedstep"]) < 7:
        for name, (_, step) in made.items():
            timed(step, repeats[name])  # until the threads of the one before, of another OpenMP runtime, no longer spin
            times[name].append(timed(step, repeats[name]))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000, 64_000_000])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        torch = None
    fs.set_num_threads(args.threads)
    if torch is not None:
        torch.set_num_threads(fs.get_num_threads())
    for name, value in config.config().items():
        print(f"{name}: {value}")
    print(f"torch: {torch.__version__ if torch else 'not installed'}\n")
    item = np.dtype(args.dtype).itemsize
    print(f"{'elements':>11} {'fusedstep':>12} {'GB/s':>6} {'of roofline':>11} {'torch fused /':>14} {'reference /':>12}")
    for size in progress(args.sizes, desc="sizes"):
        times = measure(size, np.dtype(args.dtype), torch is not None)
        median = statistics.median(times["fusedstep"])
        ratio = {
            name: statistics.median(a / b for a, b in zip(values, times["fusedstep"])) for name, values in times.items()
        }
        print(
            f"{size:11,} {median * 1e6:9.1f} µs {7 * item * size / median / 1e9:6.1f} {ratio['roofline']:11.3f} "
            f"{ratio.get('torch fused', float('nan')):14.2f} {ratio.get('reference', float('nan')):12.2f}"
        )


if __name__ == "__main__":
    main()
