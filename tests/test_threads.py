"""Threads, forks, environment: each in a process of its own where the process is what matters."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import fusedstep as fs
from fusedstep import _core, _threads

N = 400_000  # enough for several threads


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_number_of_threads():
    before = fs.get_num_threads()
    assert before >= 1
    with fs.threads(3):
        assert fs.get_num_threads() == (3 if _core.openmp() else 1)
        with fs.threads(None):
            assert fs.get_num_threads() == before
    assert fs.get_num_threads() == before
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="^n: expected"):
            fs.set_num_threads(bad)
    assert fs.get_num_threads() == before


@pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP: always one thread")
@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({"OMP_NUM_THREADS": "1"}, "1"), ({"OMP_NUM_THREADS": "3"}, "3"), ({"FUSEDSTEP_NUM_THREADS": "4"}, "4")],
)
def test_environment(environment, wanted):
    done = python("import fusedstep as fs; print(fs.get_num_threads())", **environment)
    assert done.returncode == 0, done.stderr
    quota = _threads.cgroup_cpus()
    assert done.stdout.strip() == (str(min(int(wanted), quota)) if quota and "OMP_NUM_THREADS" in environment else wanted)


@pytest.mark.parametrize("value", ["0", "-1", "x", ""])
def test_bad_thread_environment(value):
    done = python("import fusedstep", FUSEDSTEP_NUM_THREADS=value)
    assert f"ValueError: FUSEDSTEP_NUM_THREADS: expected a whole number >= 1, got {value!r}" in done.stderr


@pytest.mark.parametrize("name", [name for name, _, available in _core.levels() if available])
def test_forced_level(name):
    done = python("from fusedstep import _core; print(_core.get_level())", FUSEDSTEP_CPU_LEVEL=name)
    assert done.stdout.strip() == name


def test_unknown_level_is_an_error():
    done = python("import fusedstep", FUSEDSTEP_CPU_LEVEL="avx3")
    assert "ValueError: FUSEDSTEP_CPU_LEVEL: expected baseline, avx2, avx512, got 'avx3'" in done.stderr


def test_unavailable_level_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSEDSTEP_CPU_LEVEL", "avx2")
    monkeypatch.setattr(_core, "levels", lambda: [("baseline", True, True), ("avx2", True, False)])
    with pytest.raises(
        ValueError, match=r"^FUSEDSTEP_CPU_LEVEL: expected a level of this machine \(baseline\), got 'avx2'$"
    ):
        _threads._start()


def test_forked_child():
    """libgomp hangs in a forked child after a parallel region in the parent."""
    done = python(
        f"""
        import faulthandler, os, sys
        import numpy as np, fusedstep as fs
        faulthandler.dump_traceback_later(60, exit=True)
        fs.set_num_threads(4)
        p, g = np.ones({N}), np.ones({N})
        opt = fs.Adam([p])
        opt.step([g])
        child = os.fork()
        opt.step([g])
        if child == 0:
            assert fs.get_num_threads() == 1
            sys.stdout.write(p.tobytes().hex()[:64])
            os._exit(0) if sys.stdout.flush() is None else None
        _, status = os.waitpid(child, 0)
        assert status == 0 and fs.get_num_threads() == 4
        print()
        print(p.tobytes().hex()[:64])
        """
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second


WORK = f"""
import numpy as np, fusedstep as fs
def work(seed):
    p = np.random.default_rng(seed).standard_normal({N})
    opt = fs.Adam([p])
    for _ in range(3):
        opt.step([np.ones({N})])
    return p[:10].tolist()
"""


POOLS = {
    **{method: f"in_processes('{method}')" for method in ("spawn", "forkserver", "fork")},
    **{
        f"joblib {backend}": f"Parallel(2, backend='{backend}', timeout=60)(delayed(work)(seed) for seed in range(4))"
        for backend in ("loky", "multiprocessing", "threading")
    },
}


@pytest.mark.parametrize("pool", POOLS)
def test_pools_of_workers(pool, tmp_path):
    """After parallel steps in the parent; libgomp hangs in a forked child."""
    (tmp_path / "worker.py").write_text(WORK)
    done = python(
        f"""
        import warnings
        from multiprocessing import get_context
        from joblib import Parallel, delayed
        from worker import work
        warnings.simplefilter("ignore")
        def in_processes(method):
            with get_context(method).Pool(2) as pool:  # dropped by a thread of its own, a pool may wait for itself
                return pool.map_async(work, range(4)).get(60)
        if __name__ == "__main__":
            here = [work(seed) for seed in range(4)]
            assert {POOLS[pool]} == here
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_threadpoolctl_limits():
    before = fs.get_num_threads()
    with threadpoolctl.threadpool_limits(1):
        assert fs.get_num_threads() == 1
        with fs.threads(2):  # asked for by name
            assert fs.get_num_threads() == (2 if _core.openmp() else 1)
    assert fs.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity():
    done = python(
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "import fusedstep as fs; print(fs.get_num_threads())"
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_of_the_team_stays():
    """A thread woken on the CPU of the one that waits for it moves away; after that it may run everywhere again."""
    done = python(
        f"""
        import os, time
        import numpy as np, fusedstep as fs
        opt = fs.Adam([np.ones({N})], num_threads=4)
        for _ in range(50):
            time.sleep(1e-3)    # asleep before each step
            opt.step([np.ones({N})])
        allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
        assert len(allowed) >= (4 if fs._core.openmp() else 1) and all(mask == allowed[0] for mask in allowed), allowed
        """,
        OMP_WAIT_POLICY="passive",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(files, wanted, tmp_path, monkeypatch):
    """A container's share of the processors, rounded up, in both versions of cgroups."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_threads, "CGROUP", tmp_path)
    assert _threads.cgroup_cpus() == wanted


@pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP: always one thread")
def test_the_quota_limits_the_default(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000")
    code = f"""
        import fusedstep as fs
        from fusedstep import _threads
        _threads.CGROUP = {str(tmp_path)!r}
        _threads._start()
        print(fs.get_num_threads())
        """
    for environment, wanted in (({"OMP_NUM_THREADS": "5"}, "2"), ({"FUSEDSTEP_NUM_THREADS": "5"}, "5")):
        assert python(code, **environment).stdout.strip() == wanted


def test_beside_scikit_learn_and_torch():
    """Several OpenMP runtimes in one process, in turn and at the same time; each library works, and the bits are the same."""
    done = python(
        f"""
        import concurrent.futures, importlib.util, warnings
        import numpy as np
        warnings.simplefilter("ignore")
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2000, 20)).astype(np.float32)
        jobs = []
        if importlib.util.find_spec("torch"):
            import torch
            def by_torch():
                p = torch.ones({N}, requires_grad=True)
                p.grad = torch.ones({N})
                torch.optim.AdamW([p], fused=True).step()
                return float(p.detach()[0])
            jobs.append(by_torch)
        from sklearn.cluster import KMeans
        from sklearn.ensemble import HistGradientBoostingClassifier
        jobs.append(lambda: KMeans(5, n_init=1, random_state=0).fit(x).inertia_)
        jobs.append(lambda: HistGradientBoostingClassifier(max_iter=3).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0))
        import fusedstep as fs
        def by_fusedstep():
            p = np.ones({N})
            opt = fs.AdamW([p], clip_norm=1.0)
            for _ in range(20):
                opt.step([np.ones({N})])
            return p.tobytes()
        jobs.append(by_fusedstep)
        alone = [job() for job in jobs]
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            for _ in range(3):
                together = [future.result(60) for future in [pool.submit(job) for job in jobs]]
                assert together[-1] == alone[-1]
                assert np.allclose(together[:-1], alone[:-1])
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_two_optimizers_run_at_the_same_time():
    """Two threads step two optimizers, a third sees both of them at work: so nobody has the GIL."""
    n = 2_000_000
    opts = [fs.Adam([np.ones(n)], num_threads=1) for _ in range(2)]
    grad, done = np.ones(n), threading.Event()

    def work(opt):
        while not done.is_set():
            opt.step([grad])

    def state(worker):  # "R": running, or would if a processor were free; "S": waiting, for the GIL
        return Path(f"/proc/self/task/{worker.native_id}/stat").read_text().rpartition(")")[2].split()[0]

    workers = [threading.Thread(target=work, args=(opt,)) for opt in opts]
    for worker in workers:
        worker.start()
    seen = []
    for _ in range(200):
        time.sleep(0.002)
        seen.append("".join(state(worker) for worker in workers))
    done.set()
    for worker in workers:
        worker.join()
    assert seen.count("RR") > 100, seen


def test_two_threads_on_one_optimizer():
    """Every step is whole: the result is that of the same number of steps, one after the other."""
    p, q = np.ones(N), np.ones(N)
    opt, serial = fs.SGD([p], lr=1e-3, momentum=0.9), fs.SGD([q], lr=1e-3, momentum=0.9)
    grad = np.ones(N)

    def work():
        for _ in range(20):
            opt.step([grad])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for _ in range(40):
        serial.step([grad])
    assert opt.steps == 40
    np.testing.assert_array_equal(p, q)


def test_gil_is_released():
    """Another thread goes on while a long step runs."""
    opt = fs.Adam([np.ones(20_000_000, np.float32)], num_threads=1)
    grad = np.ones(20_000_000, np.float32)
    opt.step([grad])
    ticks, running = 0, True

    def count():
        nonlocal ticks
        while running:
            ticks += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    before = ticks
    opt.step([grad])
    during = ticks - before
    running = False
    counter.join()
    assert during > 10


def test_beside_blas(rng):
    """NumPy's threaded BLAS and a parallel step in turn."""
    p, g = np.ones(N), np.ones(N)
    opt = fs.Adam([p])
    a = rng.standard_normal((300, 300))
    for _ in range(5):
        a @ a
        opt.step([g])
    assert opt.steps == 5


@pytest.mark.parametrize("call", [lambda opt: opt.averages, lambda opt: opt.state_dict(), lambda opt: opt.step(np.ones(2))])
def test_calls_from_within_a_call(call):
    """By a schedule, or a signal handler meanwhile: waiting for oneself would never end."""
    opt = fs.SGD(np.ones(2), lr=0.5)
    opt.param_groups[0]["lr"] = lambda step: call(opt) and 0.1
    with pytest.raises(RuntimeError, match="this thread is within a call of the same optimizer"):
        opt.step(np.ones(2))
    opt.param_groups[0]["lr"] = 0.5
    assert opt.step(np.ones(2)).step == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_while_another_thread_steps():
    """Nobody will ever finish that step in the child: an error there, no endless wait."""
    done = python(
        """
        import os, threading, numpy as np, fusedstep as fs
        started, go_on = threading.Event(), threading.Event()
        opt, other = fs.SGD(np.ones(2), lr=0.5), fs.SGD(np.ones(2), lr=0.5)

        def slow(step):
            started.set()
            go_on.wait()
            return 0.5

        opt.param_groups[0]["lr"] = slow
        thread = threading.Thread(target=opt.step, args=[np.ones(2)])
        thread.start()
        started.wait()
        child = os.fork()
        if child == 0:
            other.step(np.ones(2))
            try:
                opt.step(np.ones(2))
            except RuntimeError as error:
                os._exit(0 if "forked while another thread" in str(error) else 1)
            os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go_on.set()
        thread.join()
        assert (status, opt.steps) == (0, 1)
        """
    )
    assert done.returncode == 0, done.stderr
