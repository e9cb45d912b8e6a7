"""The command line, as a person would use it."""

import argparse
import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import __main__, _core, _extension, check, database
from fusedstep.demo import data, train
from fusedstep.demo.mlp import MLP


def fusedstep(capsys, *arguments):
    try:
        status = __main__.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out + out.err


def test_info(capsys):
    status, text = fusedstep(capsys, "info")
    assert status == 0
    for word in ("fusedstep", "compiler", "flags", "openmp", "cpu levels compiled", "cpu level chosen", "threads"):
        assert word in text


def test_check(capsys, monkeypatch):
    monkeypatch.setattr(check, "sizes", lambda thorough: [0, 1, 17, 1025])
    monkeypatch.setattr(database, "ENTRIES", database.ENTRIES[:1])
    status, text = fusedstep(capsys, "check")
    assert status == 0
    assert " 0 differ" in text
    for name, _, available in _core.levels():
        assert (f"\n{name} " in text) == available


def test_check_notices_one_differing_bit(capsys, monkeypatch):
    """A check that cannot fail is none."""
    update = _core.Plan.update

    class Plan(_core.Plan):
        def __init__(self, params, *others):
            self.first = params[-1]

        def update(self, apply, clear_grads, used=None, stats=None):
            update(self, apply, clear_grads, used, stats)
            self.first[-1:] = np.nextafter(self.first[-1:], self.first.dtype.type(9))

    monkeypatch.setattr(check, "sizes", lambda thorough: [1, 17])
    monkeypatch.setattr(check, "dtype_pairs", lambda: [(np.float32, np.float32)])
    monkeypatch.setattr(database, "ENTRIES", database.ENTRIES[:1])
    monkeypatch.setattr(_extension.core, "Plan", Plan)
    status, text = fusedstep(capsys, "check")
    assert status == 1
    assert "FAILED SGD() float32, gradients float32; baseline, 1 threads: 1 of 18 differ" in text


def digests(text):
    return [line for line in text.splitlines() if "SHA-256" in line]


def test_train_digests_are_the_references(capsys, tmp_path):
    plot = tmp_path / "curves.png"
    quick = ["--epochs", "2", "--hidden", "16", "--plot", str(plot)]
    status, text = fusedstep(capsys, "train", "--rule", "all", *quick)
    assert status == 0
    assert len(digests(text)) == len(database.TRAIN) == len(set(digests(text)))
    assert plot.read_bytes().startswith(b"\x89PNG")
    status, other = fusedstep(capsys, "train", "--rule", "all", "--backend", "reference", *quick)
    assert digests(other) == digests(text)


def test_train_reaches_97_percent(capsys):
    status, text = fusedstep(capsys, "train")
    assert status == 0
    accuracy = next(line for line in text.splitlines() if line.startswith("adam")).split()[4]
    assert float(accuracy.rstrip("%")) >= 97


@pytest.mark.parametrize(
    "flags",
    [
        "--precision float64",
        "--precision bfloat16 --low-precision stochastic --state-dtype int8",
        "--precision bfloat16 --low-precision split --ema 0.9",
        "--precision float16 --low-precision kahan",
        "--precision float16 --low-precision master --clip 1",
    ],
)
def test_train_in_any_precision(capsys, flags):
    status, text = fusedstep(capsys, "train", "--rule", "adamw", "--epochs", "10", *flags.split())
    assert status == 0
    accuracy = next(line for line in text.splitlines() if line.startswith("adamw ")).split()[4]
    assert float(accuracy.rstrip("%")) >= 96


def test_train_accumulates(capsys):
    """The mean of micro-batches is that of the batch, up to rounding."""
    losses = []
    for flags in ([], ["--accumulate", "4"]):
        _, text = fusedstep(capsys, "train", "--rule", "sgd", "--precision", "float64", "--epochs", "3", *flags)
        losses.append(next(line for line in text.splitlines() if line.startswith("sgd ")).split()[3])
    assert losses[0] == losses[1]


def test_train_shows_statistics(capsys, tmp_path):
    quick = ["--epochs", "2", "--hidden", "8", "--plot", str(tmp_path / "x.png")]
    status, text = fusedstep(capsys, "train", "--rule", "sgd", "--stats", *quick)
    assert status == 0
    assert "sgd, last step:" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("w0", "b0", "w1", "b1", "all"))] == [
        "w0", "b0", "w1", "b1", "all",
    ]  # fmt: skip
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    _, text = fusedstep(capsys, "train", "--rule", "sgd", "--stats", "--lr", "1e-12", *quick)
    assert "warning: w0: the update is " in text


def test_train_says_when_steps_were_skipped(capsys, monkeypatch):
    monkeypatch.setattr(train, "DynamicLossScaler", lambda: fs.DynamicLossScaler(init_scale=2.0**20))
    status, text = fusedstep(capsys, "train", "--rule", "sgd", "--epochs", "1", "--precision", "float16")
    assert status == 0
    assert "steps skipped, because gradients overflowed" in text


def test_schedule_of_train():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    digits = data.load(None, np.float32)
    loop = train.Loop(parser.parse_args(["--schedule", "cosine", "--lr", "0.5", "--epochs", "2"]), digits, "sgd")
    lr = loop.opt.param_groups[0]["lr"]
    assert [lr(0), lr(45), lr(90)] == pytest.approx([0.5, 0.25, 0.0], abs=1e-15)  # 45 batches of 32
    train.train(loop)
    assert loop.opt.steps == 90
    loop = train.Loop(parser.parse_args(["--lr", "0.5"]), digits, "sgd")
    assert loop.opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("batch_size", ["1", "64", "full"])
def test_batch_sizes(capsys, batch_size):
    status, text = fusedstep(capsys, "train", "--rule", "sgd", "--epochs", "1", "--batch-size", batch_size)
    assert status == 0
    steps = next(line for line in text.splitlines() if line.startswith("sgd")).split()[2]
    assert int(steps.replace(",", "")) == {"1": 1437, "64": 23, "full": 1}[batch_size]


def test_train_stops_at_target_loss(capsys):
    status, text = fusedstep(capsys, "train", "--target-loss", "0.5")
    assert status == 0
    assert "target loss reached after epoch" in text


def test_train_says_when_the_loss_is_no_longer_finite(capsys):
    status, text = fusedstep(capsys, "train", "--rule", "sgd", "--lr", "1e30")
    assert status == 1
    assert "sgd: the loss is no longer finite in epoch 1 with lr=1e+30: try a smaller --lr" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rule", "adm"], "--rule: expected all or one of sgd, momentum,"),
        (["train", "--data", "nowhere"], "nowhere: expected a folder of IDX files, got none there"),
        (["train", "--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (["train", "--batch-size", "x"], "argument --batch-size: "),
        (["train", "--lr", "-1"], "lr: expected a finite number >= 0, got -1.0"),
        (["train", "--epochs", "1e3"], "argument --epochs: expected a whole number, got '1e3'"),
        (["train", "--seed", "-1"], "argument --seed: expected a whole number in [0, 2**64), got -1"),
        (["train", "--seed", "9" * 26], "argument --seed: expected a whole number in [0, 2**64), got 999"),
        (["train", "--threads", "100000"], "argument --threads: expected at most "),
        (["train", "--target-loss", "nan"], "argument --target-loss: expected a finite number, got nan"),
        (["train", "--clip", "x"], "argument --clip: expected a finite number > 0, got 'x'"),
        (["train", "--precision", "float16", "--low-precision", "split"], 'expected bfloat16 for low_precision="split"'),
        (["bench", "--clip-norm", "-1"], "argument --clip-norm: expected a finite number > 0, got -1.0"),
        (["bench", "--clip-norm", "nan"], "argument --clip-norm: expected a finite number > 0, got nan"),
        (["bench", "--threads", "0"], "argument --threads: expected at least 1, got 0"),
        (["bench", "--threads", "-3"], "argument --threads: expected at least 1, got -3"),
        (["bench", "--threads", "100000"], "argument --threads: expected at most "),
        (["bench", "--seconds", "0"], "argument --seconds: expected a finite number > 0, got 0.0"),
        (["bench", "--seconds", "-1"], "argument --seconds: expected a finite number > 0, got -1.0"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_mistakes(capsys, arguments, message):
    status, text = fusedstep(capsys, *arguments)
    assert status == 2
    assert message in text
    assert "Traceback" not in text


def test_version(capsys):
    assert fusedstep(capsys, "--version") == (0, f"fusedstep {fs.__version__}\n")


# ---- Output ----


@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [
        ("train", "--plot", ".png"),
        ("schedules", "--plot", ".svg"),
        ("bench", "--plot", ".pdf"),
        ("bench", "--json", ".json"),
    ],
)
def test_output_is_tried_before_the_work(capsys, monkeypatch, tmp_path, command, option, suffix):
    monkeypatch.setattr(getattr(__main__, command), "main", lambda args: 0)
    assert fusedstep(capsys, command, option, str(tmp_path / f"new{suffix}")) == (0, "")
    folder, locked = tmp_path / f"folder{suffix}", tmp_path / f"locked{suffix}"
    folder.mkdir()
    locked.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)  # root may write to all files
    wrong = {
        folder: f"expected a file, got the folder '{folder}'",
        tmp_path / "none" / f"x{suffix}": "expected a file in a folder that exists, got ",
        locked / f"x{suffix}": "expected a file in a folder that exists, got ",
        locked: f"expected a file that can be written, got '{locked}'",
    }
    if option == "--plot":
        wrong[tmp_path / "x.docx"] = wrong[tmp_path / "x"] = "expected a name that ends in one of "
    for path, message in wrong.items():
        status, text = fusedstep(capsys, command, option, str(path))
        assert status == 2
        assert f"argument {option}: {message}" in text
    assert sorted(tmp_path.iterdir()) == [folder, locked]


def test_training_goes_on_without_a_picture_nobody_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("loss-curves.png").mkdir()
    status, text = fusedstep(capsys, "train", "--stats", "--epochs", "1")
    assert status == 0
    assert "no plot: expected a file, got the folder 'loss-curves.png'" in text
    assert len(digests(text)) == 1


def in_shell(command, **environment):
    """Status and stderr of a pipeline; ``fusedstep`` is the command."""
    command = f'set -o pipefail; fusedstep() {{ "{sys.executable}" -m fusedstep "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **environment})
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("command", ["info | true", "schedules | head -1", "schedules --help | true"])
def test_a_closed_pipe_ends_it_quietly(command):
    status, errors = in_shell(f"fusedstep {command}")
    assert status in (0, 1)  # 0 if all was written before
    assert errors == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_full_disk_takes_one_line():
    status, errors = in_shell("fusedstep info > /dev/full")
    assert status == 1
    assert errors == "fusedstep: [Errno 28] No space left on device\n"


def test_ascii_takes_what_it_can(tmp_path):
    out = tmp_path / "out"
    status, _ = in_shell(f"fusedstep train --epochs 1 > '{out}'", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert status == 0
    assert " ?s " in out.read_text("ascii")
    assert len(digests(out.read_text("ascii"))) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rule rprop --state-dtype int8", "rprop: --state-dtype int8 changes nothing"),
        ("--rule sgd --low-precision split", "sgd: --low-precision split changes nothing"),
        ("--rule adam --state-dtype int8", None),
        ("--rule adam --state-dtype bfloat16", None),
        ("--rule adam --precision float16 --low-precision kahan", None),
    ],
)
def test_train_says_what_changes_nothing(capsys, flags, message):
    status, text = fusedstep(capsys, "train", "--epochs", "1", *flags.split())
    assert status == 0
    assert (message in text) if message else ("changes nothing" not in text)


# ---- IDX files ----


def write_idx(path, array):
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path, rng):
    for part, n in (("train", 60), ("t10k", 20)):
        labels = rng.integers(3, size=n).astype(np.uint8)
        images = np.zeros((n, 4, 4), np.uint8)
        images[np.arange(n), labels, labels] = 255
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    return tmp_path


def test_train_on_idx_files(capsys, folder):
    status, text = fusedstep(capsys, "train", "--data", str(folder), "--epochs", "30", "--batch-size", "10")
    assert status == 0
    assert "60 training and 20 test examples" in text
    assert "100.00%" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "train-labels-idx1-ubyte").unlink(), "expected a file train-labels-idx1-ubyte or"),
        (lambda d: (d / "train-labels-idx1-ubyte").write_bytes(b"hello"), "expected an IDX file of unsigned bytes"),
        (lambda d: (d / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bxx"), "t10k-images-idx3-ubyte.gz: "),
        (lambda d: write_idx(d / "train-labels-idx1-ubyte", np.zeros(59, np.uint8)), "expected as many train labels as"),
        (
            lambda d: (d / "train-labels-idx1-ubyte").write_bytes((d / "train-labels-idx1-ubyte").read_bytes()[:-1]),
            "expected 60 bytes for shape (60,), got 59",
        ),
    ],
)
def test_damaged_idx_files(capsys, folder, spoil, message):
    spoil(folder)
    status, text = fusedstep(capsys, "train", "--data", str(folder))
    assert status == 2
    assert message in text


# ---- The model ----


def test_gradients_are_derivatives(rng):
    model = MLP([5, 7, 6, 3], np.float64, seed=1)
    x, y = rng.standard_normal((11, 5)), rng.integers(3, size=11)
    model.backward(x, y)
    for name, param in model.params.items():
        for index in np.ndindex(param.shape):
            old, h = param[index], 1e-6
            param[index] = old + h
            above = model.loss(x, y)
            param[index] = old - h
            below = model.loss(x, y)
            param[index] = old
            assert model.grads[name][index] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-8)


def test_digits_are_split_without_overlap():
    digits = data.digits(np.float32)
    train, test = {row.tobytes() for row in digits.train_x}, {row.tobytes() for row in digits.test_x}
    assert (len(digits.train_x), len(digits.test_x)) == (1437, 360)
    assert not train & test
    assert digits.n_classes == 10
