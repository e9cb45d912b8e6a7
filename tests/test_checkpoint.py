"""Checkpoint files: bit-exact resume, refusal of anything damaged, whole whatever happens while saving."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import SETTINGS, setting_id, snapshot
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fusedstep as fs
from fusedstep import checkpoint

KILLS = 500


def make(optimizer=fs.AdamW, dtype=np.float32, **settings):
    """An optimizer after three steps, over parameters of all layouts."""
    rng = np.random.default_rng(0)
    params = {
        "w": rng.standard_normal((5, 7)).astype(dtype),
        "layers": [np.asfortranarray(rng.standard_normal((4, 6)).astype(dtype)), rng.standard_normal(9).astype(dtype)[::-2]],
        "scalar": np.full((), 0.5, dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    opt = optimizer(params, **settings)
    for _ in range(3):
        opt.step(gradients(params, rng))
    return params, opt


def gradients(params, rng):
    def like(p):
        return rng.standard_normal(p.shape).astype(p.dtype)

    return {"w": like(params["w"]), "layers": [like(p) for p in params["layers"]], "scalar": like(params["scalar"]),
            "empty": like(params["empty"])}  # fmt: skip


def blank(params):
    """The same parameters in another layout, all 9."""
    return {"w": np.full((7, 5), 9, params["w"].dtype).T, "layers": [np.full_like(p, 9) for p in params["layers"]],
            "scalar": np.full_like(params["scalar"], 9), "empty": params["empty"].copy()}  # fmt: skip


@pytest.mark.parametrize(("entry", "settings"), SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_resume(entry, settings, dtype, tmp_path):
    params, opt = make(entry.optimizer, dtype, **settings, clip_norm=3.0, nonfinite="skip")
    fs.save(tmp_path / "a", opt, extra={"epoch": 3})
    others = blank(params)
    other = entry.optimizer(others, lr=0.123)
    found = fs.load(tmp_path / "a", other)
    assert found.extra == {"epoch": 3}
    assert list(found.params) == opt._params.names
    assert other.steps == opt.steps == 3
    assert (other.clip_norm, other.nonfinite) == (3.0, "skip")
    rng = np.random.default_rng(1)
    for _ in range(3):
        assert snapshot(other) == snapshot(opt)
        grads = gradients(params, rng)
        opt.step(grads)
        other.step(grads)


def test_resume_in_a_new_process(tmp_path):
    """Train 10 = train 5, save, load in a new process, train 5; the position in the data is in `extra`."""
    code = """
        import sys, numpy as np, fusedstep as fs
        n_before, n_after, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        rng = np.random.default_rng(7)
        w = rng.standard_normal((30, 70)).astype(np.float32)
        opt = fs.AdamW({"w": w}, lr=lambda step: 0.1 / (1 + step), clip_norm=1.0, amsgrad=True)
        if n_before == 0:
            w[...] = 0
            rng.bit_generator.state = fs.load(path, opt).extra["rng"]
        for _ in range(n_before + n_after):
            opt.step({"w": rng.standard_normal(w.shape)})
        if n_after == 0:
            fs.save(path, opt, extra={"rng": rng.bit_generator.state})
        print(opt.steps, w.tobytes().hex())
        """

    def run(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments), str(tmp_path / "a")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    whole = run(5, 5)
    assert run(5, 0) != whole
    assert run(0, 5) == whole


@pytest.mark.parametrize("version", [1])
def test_older_versions_load(version):
    """These files are kept as the fusedstep of their time wrote them: by `write_kept_file`, below."""
    params, opt = make(amsgrad=True, clip_norm=0.5)
    others = blank(params)
    other = fs.AdamW(others)
    found = fs.load(Path(__file__).parent / "data" / f"checkpoint_v{version}.safetensors", other)
    assert found.extra == {"note": "kept", "numbers": [1, 2.5, None, True]}
    assert snapshot(other) == snapshot(opt)


def write_kept_file():
    """Run once for each version: python -c "import test_checkpoint; test_checkpoint.write_kept_file()" """
    path = Path(__file__).parent / "data" / f"checkpoint_v{checkpoint.VERSION}.safetensors"
    fs.save(path, make(amsgrad=True, clip_norm=0.5)[1], extra={"note": "kept", "numbers": (1, 2.5, None, True)})


def test_which_parameters(tmp_path):
    path = tmp_path / "a"
    _, opt = make()
    fs.save(path, opt, params={"other": np.arange(3.0)})
    assert list(fs.load(path).params) == ["other"]
    into = {"other": np.zeros(3)}
    fs.load(path, params=into)
    np.testing.assert_array_equal(into["other"], np.arange(3.0))
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"a: params\['other'\]: expected a parameter to load it into, got none$"):
        fs.load(path, opt)
    with pytest.raises(ValueError, match=r"a: params\['x'\]: expected a parameter in the file, got none$"):
        fs.load(path, opt, params={"other": np.zeros(3), "x": np.zeros(3)})
    fs.load(path, opt, strict=False)
    assert snapshot(opt) == before
    fs.save(path, opt, params={})
    assert fs.load(path, opt, params={}).params == {}


def test_messages(tmp_path, monkeypatch):
    path = tmp_path / "a"
    _, opt = make()
    fs.save(path, opt)
    before = snapshot(opt)

    def refused(call, error, message):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message
        assert snapshot(opt) == before

    kinds = "None, bool, int, float, str, dict, list or tuple"
    refused(lambda: fs.save(3, opt), TypeError, "path: expected a path, got 3")
    refused(lambda: fs.load(None, opt), TypeError, "path: expected a path, got None")
    refused(lambda: fs.save(path, "x"), TypeError, "opt: expected an optimizer, got str")
    refused(lambda: fs.load(path, 1), TypeError, "opt: expected an optimizer, got int")
    refused(lambda: fs.save(path, opt, extra={1: 2}), TypeError, "extra: expected keys of type str, got 1")
    refused(
        lambda: fs.save(path, opt, extra={"a": [np.ones(2)]}), TypeError, f"extra['a'][0]: expected {kinds}, got ndarray"
    )
    refused(lambda: fs.save(path, opt, params=[3]), TypeError, "params['0']: expected an array, got int")
    refused(lambda: fs.load(path, fs.SGD(make()[0])), ValueError, f"{path}: state_dict['rule']: expected 'SGD', got 'AdamW'")
    target = {**make()[0], "w": np.ones((5, 7))}
    refused(lambda: fs.load(path, params=target), TypeError, f"{path}: params['w']: expected dtype float64, got float32")
    target["w"] = np.ones((5, 6), np.float32)
    refused(lambda: fs.load(path, params=target), ValueError, f"{path}: params['w']: expected shape (5, 6), got (5, 7)")
    target["w"] = np.broadcast_to(np.float32(1), (5, 7))
    refused(lambda: fs.load(path, params=target), ValueError,
            f"{path}: params['w']: expected a writeable array, got a read-only one")  # fmt: skip
    with pytest.raises(FileNotFoundError):
        fs.load(tmp_path / "b")
    with pytest.raises(IsADirectoryError):
        fs.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        fs.save(tmp_path / "nowhere" / "a", opt)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: fs.save(path, opt), lambda: fs.load(path)):
        with pytest.raises(
            ImportError, match=r'^fs.save and fs.load need safetensors .*: pip install "fusedstep\[checkpoint\]"$'
        ):
            call()


# ---- Damaged, foreign and hostile files ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a"
    fs.save(path, make()[1], extra=[1])
    return path.read_bytes()


def check_refused(path, content, reason=""):
    """The file is refused, naming it, and nothing changes."""
    params, opt = make()
    before = snapshot(opt)
    path.write_bytes(content)
    with pytest.raises((TypeError, ValueError)) as caught:
        fs.load(path, opt)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert snapshot(opt) == before
    assert opt.param_groups[0]["params"][0] is params["w"]


def test_truncated(whole, tmp_path):
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        check_refused(tmp_path / "b", whole[:length], "expected a checkpoint of fusedstep, got a damaged or foreign file")
    check_refused(tmp_path / "b", whole + b"\0", "damaged or foreign")


def test_every_byte_counts(whole, tmp_path):
    """Outside the header's padding, a change of any byte is noticed: here one in five, and all in the numbers."""
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = header - len(whole[:header].rstrip(b" "))
    for at in [*range(0, header - padding, 5), *range(header, len(whole))]:
        check_refused(tmp_path / "b", whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])


def test_foreign(tmp_path):
    path = tmp_path / "b"
    safetensors.numpy.save_file({"params/w": np.ones(3)}, path)
    check_refused(path, path.read_bytes(), "its format is None")
    safetensors.numpy.save_file({"w": np.ones(3)}, path, metadata={"format": "pt"})
    check_refused(path, path.read_bytes(), "its format is 'pt'")
    check_refused(path, b"cos\nsystem\n(S'echo harm'\ntR.", "damaged or foreign")
    metadata = {"format": "fusedstep checkpoint", "version": "2", "content": "{}", "sha256": ""}
    safetensors.numpy.save_file({}, path, metadata=metadata)
    check_refused(path, path.read_bytes(), "its format version is '2', this fusedstep reads '1'")


def forge(path, whole, change_content=lambda content: None, tensors=None, text=None):
    """A file with a valid checksum."""
    path.write_bytes(whole)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    change_content(content)
    metadata["content"] = json.dumps(content) if text is None else text
    own.update(tensors or {})
    metadata["sha256"] = checkpoint.digest(metadata["content"], own)
    safetensors.numpy.save_file(own, path, metadata=metadata)
    return path.read_bytes()


def in_group(key, value):
    return lambda content: content["state_dict"]["param_groups"][0].update({key: value})


def in_state_dict(key, value):
    return lambda content: content["state_dict"].update({key: value})


HOSTILE = {
    "nothing": dict(text="null"),
    "deep": dict(text="[" * 100_000),
    "long number": dict(text="9" * 100_000),
    "not JSON": dict(text="{,}"),
    "lr": dict(change_content=in_group("lr", float("nan"))),
    "huge lr": dict(change_content=in_group("lr", 10**400)),
    "lr of another kind": dict(change_content=in_group("lr", {"a": 1})),
    "betas": dict(change_content=in_group("betas", [0.9])),
    "unknown key": dict(change_content=in_group("__class__", 1)),
    "params key": dict(change_content=in_group("params", [])),
    "names": dict(change_content=in_group("names", 3)),
    "names of another kind": dict(change_content=in_group("names", [[]])),
    "name of no parameter": dict(change_content=in_group("names", ["w"])),
    "groups": dict(change_content=in_state_dict("param_groups", 7)),
    "group": dict(change_content=in_state_dict("param_groups", [7])),
    "no groups": dict(change_content=in_state_dict("param_groups", [])),
    "step": dict(change_content=in_state_dict("step", -1)),
    "huge step": dict(change_content=in_state_dict("step", 10**30)),
    "step of another kind": dict(change_content=in_state_dict("step", "5")),
    "rule": dict(change_content=in_state_dict("rule", "Optimizer")),
    "convention": dict(change_content=in_state_dict("convention", None)),
    "options": dict(change_content=in_state_dict("options", {"_lock": None})),
    "option": dict(change_content=in_state_dict("options", {"clip_norm": -1})),
    "nonfinite": dict(change_content=in_state_dict("options", {"nonfinite": []})),
    "state dict": dict(change_content=lambda content: content.update(state_dict=[])),
    "no extra": dict(change_content=lambda content: content.pop("extra")),
    "shape": dict(tensors={"params/w": np.ones((7, 5), np.float32)}),
    "dtype": dict(tensors={"params/w": np.ones((5, 7))}),
    "integers": dict(tensors={"params/w": np.ones((5, 7), int)}),
    "state shape": dict(tensors={"state/w/exp_avg": np.ones(35, np.float32)}),
    "state dtype": dict(tensors={"state/w/exp_avg": np.ones((5, 7))}),
    "foreign state": dict(tensors={"state/w/sum": np.ones((5, 7), np.float32)}),
    "state of none": dict(tensors={"state/x/exp_avg": np.ones((5, 7), np.float32)}),
    "stray tensor": dict(tensors={"w": np.ones(3)}),
    "stray parameter": dict(tensors={"params/x": np.ones(3)}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(whole, tmp_path, case):
    check_refused(tmp_path / "b", forge(tmp_path / "b", whole, **HOSTILE[case]))


def test_forged_well(whole, tmp_path):
    """The forger's tools do not break the file themselves."""
    (tmp_path / "b").write_bytes(forge(tmp_path / "b", whole, in_group("lr", 0.25)))
    _, opt = make()
    fs.load(tmp_path / "b", opt)
    assert opt.param_groups[0]["lr"] == 0.25


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_fuzzed(whole, tmp_path, data):
    """Any splice of the file, or any JSON with a valid checksum: refused with nothing changed, or the same content."""
    path = tmp_path / "b"
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, min(len(whole), start + 40)))
        content = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    else:
        leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        anything = st.recursive(
            leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
        )
        key = data.draw(st.sampled_from(["step", "rule", "convention", "options", "param_groups", "version", "lr", "betas",
                                         "names", "amsgrad", "clip_value", "new"]))  # fmt: skip
        change = data.draw(st.sampled_from([in_group, in_state_dict]))(key, data.draw(anything))
        content = forge(path, whole, change)
    path.write_bytes(content)
    params, opt = make()
    before, groups = snapshot(opt), {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    try:
        fs.load(path, opt)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
        assert snapshot(opt) == before
        assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == groups
    opt.step(gradients(params, np.random.default_rng(0)))


# ---- Whole whatever happens ----


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    _, opt = make()
    fs.save(path, opt, extra="old")
    for target, name in [(os, "replace"), (checkpoint, "sync"), (safetensors.numpy, "save_file")]:
        for error in (OSError("disk full"), KeyboardInterrupt()):

            def fail(*_, error=error, **__):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(target, name, fail)
                with pytest.raises(type(error)):
                    fs.save(path, opt, extra="new")
            assert fs.load(path).extra == "old"
            assert os.listdir(tmp_path) == ["a"]


def test_full_disk(tmp_path, monkeypatch):
    """What the library reports becomes an OSError that names the file."""

    def fail(*_, **__):
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match=r"a: cannot be written: no space left on device$"):
        fs.save(tmp_path / "a", make()[1])
    assert os.listdir(tmp_path) == []


def test_leftovers_of_the_dead_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".a.{pid}.1.tmp").mkdir()
        (tmp_path / f".a.{pid}.1.tmp" / "a").write_bytes(b"half")
    fs.save(tmp_path / "a", make()[1])
    assert sorted(os.listdir(tmp_path)) == [f".a.{os.getppid()}.1.tmp", "a"]


def test_leftovers_of_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = [".b.{0}.1.tmp", ".?.{0}.1.1.tmp", ".?.\u00b2.1.tmp", ".?." + "9" * 30 + ".1.tmp", ".?.{0}.tmp"]
    others = sorted(name.format(dead.pid) for name in others)
    for name in others:
        (tmp_path / name).mkdir()
    fs.save(tmp_path / "?", make()[1])
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "?"])


def test_whole_numbers_of_numpy_come_back(tmp_path):
    w = np.ones((2, 3))
    opt = fs.Adafactor({"w": w}, min_dim_size_to_factor=np.int64(2), unit_axes=(np.int32(1),), max_norm=np.float32(9))
    opt.step({"w": w.copy()})
    fs.save(tmp_path / "a", opt)
    other = fs.Adafactor({"w": w.copy()})
    fs.load(tmp_path / "a", other)
    group = other.param_groups[0]
    assert (group["min_dim_size_to_factor"], group["unit_axes"], group["max_norm"]) == (2, (1,), 9.0)


def test_no_such_folder(tmp_path):
    path = tmp_path / "none" / "a"
    with pytest.raises(FileNotFoundError, match=f"^{path}: expected a folder to put it into, got none$"):
        fs.save(path, make()[1])


def test_names_given_twice(tmp_path):
    opt = make()[1]
    with pytest.raises(ValueError, match=r"^params\['a.b'\]: expected names of their own, got one name twice$"):
        fs.save(tmp_path / "a", opt, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)})
    assert not (tmp_path / "a").exists()


def test_edited_names_are_not_saved(tmp_path):
    opt = make()[1]
    names = list(opt.param_groups[0]["names"])
    opt.param_groups[0]["names"][0] = "other"
    fs.save(tmp_path / "a", opt)
    other = make()[1]
    fs.load(tmp_path / "a", other)
    assert other.param_groups[0]["names"] == names


def test_permissions(tmp_path):
    """Those of any new file, or of the one that is replaced."""
    opt = make()[1]
    (tmp_path / "new").touch()
    fs.save(tmp_path / "a", opt)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode
    (tmp_path / "a").chmod(0o640)
    fs.save(tmp_path / "a", opt)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_saving_through_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    fs.save(tmp_path / "link", make()[1], extra=1)
    assert (tmp_path / "link").is_symlink()
    assert fs.load(tmp_path / "folder" / "a").extra == 1


def test_steps_of_other_threads_wait(tmp_path):
    """Parameters and state in the file are of the same step."""
    n = 50_000
    w = np.zeros(n)
    opt = fs.SGD([w], lr=1.0, momentum=0.5, nonfinite="propagate")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            opt.step([np.ones(n)])

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(20):
            fs.save(tmp_path / "a", opt)
            params, state_dict, _ = fs.load(tmp_path / "a")
            again, other = np.zeros(1), None
            other = fs.SGD([again], lr=1.0, momentum=0.5)
            for _ in range(state_dict["step"]):
                other.step([np.ones(1)])
            assert (params["0"] == again[0]).all()
            assert (state_dict["state"]["0"]["momentum_buffer"] == other.state["0"]["momentum_buffer"][0]).all()
    finally:
        stop.set()
        worker.join()


def test_killed_while_saving(tmp_path):
    """SIGKILL at random moments: there is always a whole checkpoint, the newest or the one before."""
    code = f"""
        import os, random, signal, sys, time
        import numpy as np, fusedstep as fs
        path = sys.argv[1]
        w = np.zeros(3000)
        opt = fs.SGD([w], lr=1.0, momentum=0.0)
        grad = [np.full(3000, -1.0)]
        fs.save(path, opt)
        random.seed(int(sys.argv[2]))
        durations = []
        for _ in range(5):
            start = time.perf_counter()
            fs.save(path, opt)
            durations.append(time.perf_counter() - start)
        steps, moments = 0, set()
        for kill in range({KILLS}):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                while True:    # one step, one checkpoint
                    opt.step(grad)
                    fs.save(path, opt, extra=opt.steps)
                    os.write(writer, b"x")
            os.read(reader, 1)    # it is at work
            time.sleep(random.random() * 3 * min(durations))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(writer)
            finished = 1 + len(os.read(reader, 10**6))
            os.close(reader)
            extra = fs.load(path, opt).extra
            assert extra == opt.steps and (w == opt.steps).all(), "torn"
            assert opt.steps in (steps + finished, steps + finished + 1), (steps, finished, opt.steps)
            moments.add((opt.steps - steps - finished, bool([n for n in os.listdir(os.path.dirname(path)) if ".tmp" in n])))
            steps = opt.steps
        print(len(os.listdir(os.path.dirname(path))), sorted(moments))
        """
    seed = os.environ.get("FUSEDSTEP_SEED", "0")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a"), seed], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    n_files, moments = done.stdout.split(" ", 1)
    assert int(n_files) <= 2  # at most the last one's leftover
    assert "(0, True)" in moments  # killed while the file was being written


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_nothing_but_files_is_replaced(tmp_path):
    """Saving to /dev/null, as root, would put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="expected a file or nothing there, got a directory, device or pipe"):
        fs.save(pipe, fs.SGD(np.ones(2), lr=0.1))
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_nothing_is_loaded_while_averages_are_shown(tmp_path):
    """Parameters would be what they were before, and state and steps those of the file."""
    w = np.ones(2)
    opt = fs.SGD({"w": w}, lr=0.5, ema_decay=0.5)
    fs.save(tmp_path / "a", opt)
    opt.step({"w": np.ones(2)})
    with opt.averaged(), pytest.raises(RuntimeError, match="expected the parameters in their arrays, got their averages"):
        fs.load(tmp_path / "a", opt)
    assert opt.steps == 1
    np.testing.assert_array_equal(w, [0.5, 0.5])
