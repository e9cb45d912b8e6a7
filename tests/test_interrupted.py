"""Interrupts, and work that is larger than memory: a step is whole or has not begun."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import fusedstep as fs


def python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_keyboard_interrupt(backend):
    """Ctrl-C at random moments of steps: the number of steps tells exactly what the arrays hold."""
    code = """
        import os, random, signal, sys, threading, time
        import numpy as np, fusedstep as fs
        signal.signal(signal.SIGINT, signal.default_int_handler)    # some shells have the signal ignored
        backend, n = sys.argv[1], 300_000
        params = {"a": np.zeros(n), "b": np.zeros((300, 1000))[:, ::2]}
        opt = fs.SGD(params, lr=1.0, momentum=0.5, backend=backend)
        start = time.perf_counter()
        grads = {name: np.ones(p.shape) for name, p in params.items()}
        opt.step(grads, zero_grads=True)
        duration = time.perf_counter() - start

        history = [(0.0, 0.0)]

        me, caught, in_step = threading.main_thread().ident, 0, 0
        go, stop = threading.Event(), threading.Event()

        def interrupt():
            while True:
                go.wait()
                go.clear()
                if stop.is_set():
                    return
                time.sleep(random.random() * 2 * duration)
                signal.pthread_kill(me, signal.SIGINT)
                sent.set()

        sent = threading.Event()
        worker = threading.Thread(target=interrupt, daemon=True)
        worker.start()
        random.seed(0)
        for _ in range(60):
            sent.clear()
            stepping = False
            try:
                go.set()
                while not sent.is_set():
                    for g in grads.values():
                        g[...] = 1.0
                    stepping = True
                    opt.step(grads, zero_grads=True)
                    stepping = False
                time.sleep(1)    # it comes
            except KeyboardInterrupt:
                caught += 1
                in_step += stepping
            while len(history) <= opt.steps:
                p, b = history[-1]
                history.append((p - (0.5 * b + 1.0), 0.5 * b + 1.0))
            p, b = history[opt.steps]
            for name, param in params.items():
                assert (param == p).all() and (opt.state[name]["momentum_buffer"] == b).all(), (name, opt.steps)
            cleared = {float(x) for g in grads.values() for x in (g.min(), g.max())} if stepping else set()
            assert len(cleared) < 2, "gradients half cleared"
            sent.wait()
        stop.set()
        go.set()
        worker.join()
        assert caught == 60 and in_step > 10, (caught, in_step)
        """
    done = python(code, backend)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_larger_than_memory(tmp_path):
    """Parameters, gradients and state in files: no array is ever copied into memory as a whole."""
    code = """
        import resource, sys
        import numpy as np, fusedstep as fs
        folder, n, limit = sys.argv[1], 16_000_000, 32 * 2**20

        def on_disk(name, shape, dtype):
            return np.memmap(f"{folder}/{name}", dtype, "w+", shape=shape)

        def heap():
            for line in open("/proc/self/status"):
                if line.startswith("VmData"):
                    return 1024 * int(line.split()[1])

        fs.Adam([np.ones(100_000)]).step([np.ones(100_000)])    # threads have their stacks now
        resource.setrlimit(resource.RLIMIT_DATA, (heap() + limit, heap() + limit))
        try:
            np.ones(n, np.float32)
        except MemoryError:
            pass
        else:
            raise SystemExit("the limit does not hold")
        w, g = on_disk("w", (4000, n // 4000), np.float32), on_disk("g", (n // 4000, 4000), np.float16).T
        for row in g.T:
            row[...] = 0.5
        opt = fs.AdamW({"w": w}, lr=0.125, eps=0.0, weight_decay=0.0, clip_norm=1e9, allocate_state=on_disk)
        opt.step({"w": g})
        report = opt.step({"w": g}, zero_grads=True)
        assert report.grad_norm == 2000.0
        for first, second, row in zip(opt.state["w"]["exp_avg"], opt.state["w"]["exp_avg_sq"], w):
            assert (np.abs(first - 0.095) < 1e-6).all() and (second > 0).all() and (np.abs(row + 0.25) < 1e-5).all()
        assert not any(row.any() for row in g)
        fs.kernels.adam(w, g, opt.state["w"]["exp_avg"], opt.state["w"]["exp_avg_sq"], step=3)
        fs.save(f"{folder}/checkpoint", opt)
        """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint").stat().st_size > 3 * 64_000_000
    for name in ("w", "g", "w.exp_avg", "w.exp_avg_sq"):
        assert (tmp_path / name).stat().st_size >= 32_000_000
        (tmp_path / name).unlink()


def test_allocate_state():
    made = {}

    def allocate(name, shape, dtype):
        made[name] = np.full(shape[::-1], 7, dtype).T
        return made[name]

    w, v = np.ones((2, 3), np.float16), np.ones(4)
    plain = fs.Adagrad({"w": w.copy(), "v": v.copy()}, initial_accumulator_value=0.5)
    opt = fs.Adagrad({"w": w, "v": v}, initial_accumulator_value=0.5, allocate_state=allocate)
    assert list(made) == ["w.sum", "v.sum"]
    assert opt.state["w"]["sum"] is made["w.sum"]
    assert (made["w.sum"] == 0.5).all()
    for _ in range(2):
        for o in (opt, plain):
            o.step({"w": np.ones((2, 3)), "v": np.ones(4)})
    np.testing.assert_array_equal(made["w.sum"], plain.state["w"]["sum"])
    opt.load_state_dict(plain.state_dict())
    assert opt.state["w"]["sum"] is made["w.sum"]


@pytest.mark.parametrize(
    ("allocate", "error", "message"),
    [
        (3, TypeError, "allocate_state: expected a callable or None, got 3"),
        (lambda *_: None, TypeError, "allocate_state('w.sum'): expected an array, got NoneType"),
        (lambda n, s, d: np.zeros(5, d), ValueError, "allocate_state('w.sum'): expected shape (3,), got (5,)"),
        (lambda n, s, d: np.zeros(s, int), TypeError,
         "allocate_state('w.sum'): expected dtype float32, float64, float16 or bfloat16, got int64"),
        (lambda n, s, d: np.zeros(s, np.float32), TypeError, "allocate_state('w.sum'): expected dtype float64, got float32"),
        (lambda n, s, d: np.broadcast_to(1.0, s), ValueError,
         "allocate_state('w.sum'): expected a writeable array, got a read-only one"),
    ],
)  # fmt: skip
def test_bad_allocate_state(allocate, error, message):
    with pytest.raises(error) as caught:
        fs.Adagrad({"w": np.ones(3)}, allocate_state=allocate)
    assert str(caught.value) == message


def test_allocated_state_of_its_own():
    same = np.zeros(3)
    w = np.ones(3)
    for allocate, message in [
        (lambda *_: same, r"^state\['w'\]\['exp_avg'\] and state\['w'\]\['exp_avg_sq'\]: expected separate arrays"),
        (lambda *_: w, r"^params\['w'\] and state\['w'\]\['exp_avg'\]: expected separate arrays"),
    ]:
        with pytest.raises(ValueError, match=message):
            fs.Adam({"w": w}, allocate_state=allocate)


def test_state_cannot_be_exchanged():
    """A state array that the step would not use is a trap."""
    opt = fs.Adam({"w": np.ones(3)})
    with pytest.raises(TypeError):
        opt.state["w"]["exp_avg"] = np.zeros(3)
    with pytest.raises(TypeError):
        opt.state["w"] = {}


class InterruptedLock:
    """Ctrl-C as it is released."""

    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise KeyboardInterrupt


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_interrupt_when_averages_are_shown(backend):
    """The parameters are in their arrays again, wherever it comes."""
    w = np.zeros(2)
    opt = fs.SGD({"w": w}, lr=1.0, ema_decay=0.5, backend=backend)
    opt.step({"w": np.ones(2)})
    lock, opt._lock = opt._lock, InterruptedLock()
    with pytest.raises(KeyboardInterrupt), opt.averaged():
        pass
    opt._lock = lock
    np.testing.assert_array_equal(w, [-1.0, -1.0])
    assert opt.step({"w": np.ones(2)}).step == 2
