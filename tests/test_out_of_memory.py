"""Every allocation of every operation fails once, in C, Cython, NumPy and Python: an error, and nothing has changed.

The file is also the program that runs in an interpreter whose malloc is that of failing_malloc.c.
"""

import ctypes
import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs

HERE = Path(__file__).parent


def make(backend):
    """An optimizer after a step, gradients, and a state dict that differs."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((6, 4)).astype(np.float16).T[::2],
        "c": rng.standard_normal(7),
    }
    grads = {name: rng.standard_normal(p.shape).astype(p.dtype) for name, p in params.items()}
    opt = fs.Adam(params, backend=backend, clip_norm=1.0, weight_decay=0.1)
    opt.step(grads)
    other = opt.state_dict()
    other["step"] = 5
    other["param_groups"][0]["lr"] = 0.5
    for own in other["state"].values():
        for array in own.values():
            array += 1
    return opt, grads, other


def bind(opt, grads, other):
    opt.bind({name: g.copy() for name, g in grads.items()})
    opt.step()


def edit(opt, grads, other):
    opt.param_groups[0]["amsgrad"] = True
    opt.step(grads)


def skip(opt, grads, other):
    opt.nonfinite = "skip"
    assert not opt.step({**grads, "c": np.full(7, np.nan)}).applied


def refuse(opt, grads, other):
    try:
        opt.step({**grads, "c": np.full(7, np.nan)})
    except fs.NonFiniteGradientError:
        pass


def kernel(opt, grads, other):
    own = opt.state["b"]
    fs.kernels.adam(opt.param_groups[0]["params"][1], grads["b"], own["exp_avg"], own["exp_avg_sq"], step=2)


OPERATIONS = {
    "make": lambda opt, grads, other: fs.Adagrad(opt.param_groups[0]["params"], backend=opt.backend),
    "step": lambda opt, grads, other: opt.step(grads),
    "step with other gradients": lambda opt, grads, other: opt.step({name: g.copy() for name, g in grads.items()}),
    "step and clear": lambda opt, grads, other: opt.step(grads, zero_grads=True),
    "bind": bind,
    "edit": edit,
    "skip": skip,
    "refuse": refuse,
    "state_dict": lambda opt, grads, other: opt.state_dict(),
    "load_state_dict": lambda opt, grads, other: opt.load_state_dict(other),
    "norm": lambda opt, grads, other: fs.global_norm(grads),
    "clip": lambda opt, grads, other: fs.clip_by_global_norm(grads, 0.1),
    "kernel": kernel,
    "SAM": lambda opt, grads, other: fs.SAM(opt).step(lambda: grads),
}


def everything(opt, grads, params_of_edit):
    """All that may change; not the array that `edit` brings, which is all 0 until the step."""
    states = [a for own in opt.state.values() for key, a in own.items() if key != "max_exp_avg_sq" or a.any()]
    groups = [{k: v for k, v in group.items() if k not in ("params", *params_of_edit)} for group in opt.param_groups]
    return [a.tobytes() for a in (*opt._params.arrays, *states, *grads.values())], opt.steps, groups, opt.nonfinite


def main(backend):
    library = ctypes.CDLL(None)
    library.fail_after.argtypes = [ctypes.c_long]
    library.allocations_left.restype = ctypes.c_long

    def stop_failing():
        rest = -1
        while True:
            try:
                rest = max(rest, library.allocations_left())
                library.fail_after(-1)
                return rest
            except (MemoryError, ctypes.ArgumentError):  # ctypes allocates, too
                pass

    for name, operation in OPERATIONS.items():
        if name == "kernel" and backend == "reference":
            continue
        edited = ("amsgrad",) if name == "edit" else ()
        n_allocations = n_errors = 0
        n = enough = 10**6
        while n == enough or n <= n_allocations:
            opt, grads, other = make(backend)
            if name == "skip":
                opt.nonfinite = "skip"
            before = everything(opt, grads, edited)
            error = None
            try:
                library.fail_after(n)
                operation(opt, grads, other)
            except (MemoryError, SystemError, RuntimeError) as caught:
                # SystemError: some places in NumPy forget to set an exception; RuntimeError: so says threading.Lock.
                error = caught
            rest = stop_failing()
            if n == enough:
                assert error is None
                n_allocations, n = enough - rest, -1
            if error is not None:
                n_errors += 1
                assert everything(opt, grads, edited) == before, f"{name}, allocation {n}: torn after {error!r}"
            opt.nonfinite = "zero"
            assert opt.step(grads).applied  # it goes on
            n += 1
        print(f"{name}: {n_errors} errors in {n_allocations} allocations")
        assert n_errors > 0


@functools.cache
def failing_malloc(folder):
    library = folder / "failing_malloc.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing_malloc.c"], check=True)
    return library


@pytest.mark.skipif(sys.platform != "linux", reason="the interposed malloc is that of Linux")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another malloc is preloaded")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python itself crashes: github.com/python/cpython/issues/151763")
@pytest.mark.parametrize("backend", ["c", "reference"])
def test_every_allocation_fails_once(backend, tmp_path):
    environment = {**os.environ, "LD_PRELOAD": str(failing_malloc(tmp_path)), "PYTHONMALLOC": "malloc"}
    done = subprocess.run([sys.executable, __file__, backend], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "load_state_dict: " in done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
