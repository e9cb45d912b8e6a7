"""What follows the backward pass, beside PyTorch: GPT-2 small's 148 arrays, AdamW.

    python bench/epilogue.py

Ratios of neighbouring runs in one process, taken in turn; medians. Ours with nonfinite="propagate".
"""

import statistics
import time

import ml_dtypes
import numpy as np
import torch

import fusedstep as fs
from fusedstep import config
from fusedstep.bench.works import gpt2_small
from fusedstep.progress import progress

ROUNDS = 9
BFLOAT16 = ml_dtypes.bfloat16
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = gpt2_small()
    grads = [(rng.standard_normal(shape, np.float32) * 0.01).astype(dtype) for shape in shapes]
    return [np.full(shape, 0.1, dtype) for shape in shapes], grads


def ours(dtype=np.float32, **options):
    params, grads = arrays(dtype)
    zero_grads, grad_scale = options.pop("zero_grads", False), options.pop("grad_scale", 1.0)
    opt = fs.AdamW(params, nonfinite="propagate", **SETTINGS, **options)
    return lambda: opt.step(grads, zero_grads=zero_grads, grad_scale=grad_scale)


def theirs(clip=False, chain=False):
    params, grads = ([torch.from_numpy(a) for a in own] for own in arrays())
    for p, g in zip(params, grads):
        p.grad = g
    opt = torch.optim.AdamW(params, fused=True, **SETTINGS)
    averages = [p.clone() for p in params] if chain else []

    @torch.no_grad()
    def step():
        if chain:
            torch._foreach_div_(grads, 1024.0)
        if clip or chain:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if chain:
            torch._foreach_lerp_(averages, params, 0.001)
            opt.zero_grad(set_to_none=False)

    return step


# Name, ours, and what it is compared with.
PAIRS = [
    ("AdamW", ours, theirs),
    ("clip + AdamW", lambda: ours(clip_norm=1.0), lambda: theirs(clip=True)),
    (
        "unscale + clip + AdamW + average + clear",
        lambda: ours(clip_norm=1.0, ema_decay=0.999, zero_grads=True, grad_scale=1024.0),
        lambda: theirs(chain=True),
    ),
    ("state in bfloat16, beside our float32", lambda: ours(state_dtype="bfloat16"), ours),
    ("state in 8 bits, beside our float32", lambda: ours(state_dtype="int8"), ours),
    ("with stats, beside our float32", lambda: ours(stats=True), ours),
    ("bfloat16", lambda: ours(BFLOAT16), theirs),
    (
        "bfloat16, stochastic, state in 8 bits",
        lambda: ours(BFLOAT16, low_precision="stochastic", state_dtype="int8"),
        theirs,
    ),
    ("bfloat16, kahan", lambda: ours(BFLOAT16, low_precision="kahan"), theirs),
    ("bfloat16, split", lambda: ours(BFLOAT16, low_precision="split"), theirs),
    ("bfloat16, master", lambda: ours(BFLOAT16, low_precision="master"), theirs),
]


def timed(step):
    step()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    for name, value in config.config().items():
        print(f"{name}: {value}")
    print(f"torch: {torch.__version__}\n")
    for name, make, make_other in progress(PAIRS):
        pair = make(), make_other()
        times = [[timed(step) for step in pair] for _ in range(ROUNDS)]
        ratio = statistics.median(a / b for a, b in times)
        mine, other = (statistics.median(column) * 1e3 for column in zip(*times))
        print(f"{name:42} {mine:7.1f} ms, {ratio:.2f} of {other:.1f} ms")


if __name__ == "__main__":
    main()
