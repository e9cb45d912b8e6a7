"""Checkpoints: an optimizer, its parameters and what the user adds, in one safetensors file.

The file's metadata holds ``format``, ``version``, ``content`` (JSON: the state dict without its arrays, versions, extra)
and ``sha256``, over the content and all arrays. Its tensors are ``params/NAME`` and ``state/NAME/STATE NAME``.
"""

from __future__ import annotations

import importlib
import operator
import os
import re
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _arrays, trees
from ._arrays import Change, assign
from ._version import __version__
from .optimizer import Optimizer
from .saving import live_state_dict, loading
from .wrappers import Wrapper, settled

if TYPE_CHECKING:
    from pathlib import Path

# json, pathlib and shutil are imported where they are used: they take a quarter of the time that this package does.

Array = NDArray[Any]

FORMAT = "fusedstep checkpoint"
VERSION = 1


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    params: dict[str, Array]
    """The parameters by name."""
    state_dict: dict[str, Any]
    """For :meth:`Optimizer.load_state_dict`."""
    extra: Any
    """What was given to :func:`save` as such."""


def save(path: str | os.PathLike[str], opt: Optimizer | Wrapper, params: Any = None, extra: Any = None) -> None:
    """Write a checkpoint.

    The file is whole or not there: it is written under another name, synced to the disk, and renamed. Whatever happens
    meanwhile, `path` is the old checkpoint or the new one. Steps of other threads wait.

    Parameters
    ----------
    path : str or path
        The file; replaced if it exists.
    opt : Optimizer, Lookahead or SAM
        Saved are its state, step number, and all hyper-parameters that are not callables.
    params : array, or (nested) sequence or mapping of arrays, optional
        The parameters to save, by default those of the optimizer; ``{}`` for none.
    extra : optional
        Anything JSON has: None, bool, int, float, str, and dicts (with keys of type str), lists or tuples of these. Tuples
        come back as lists.

    Raises
    ------
    ImportError
        If the safetensors library is not there.
    TypeError
        If an argument is not what it should be.
    OSError
        If the file cannot be written. An older file at `path` is still there then.
    RuntimeError
        If called within a step of the same thread, by a schedule or a signal handler. A handler that is to save should set a
        flag to look at after the step.

    Notes
    -----
    Schedules are functions and not saved. What has a state dict of its own, :class:`fusedstep.schedules.ReduceOnPlateau` or
    :class:`fusedstep.DynamicLossScaler`, goes into `extra`: ``extra={"plateau": plateau.state_dict()}``. Gradients that
    :meth:`Optimizer.accumulate` has added up are not saved: save between steps.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(3)
    >>> opt = fs.Adam({"w": w}, lr=0.5)
    >>> _ = opt.step({"w": np.ones(3)})
    >>> fs.save("model.safetensors", opt, extra={"epoch": 1})
    >>> other = np.zeros(3)
    >>> fs.load("model.safetensors", fs.Adam({"w": other})).extra
    {'epoch': 1}
    >>> other
    array([0.5, 0.5, 0.5])
    """
    import json

    target = as_path(path)
    opt = as_optimizer(opt)
    with opt._lock:
        state_dict = live_state_dict(opt)
        arrays = named_arrays(params, opt)
        tensors = {f"params/{name}": array for name, array in arrays}
        tensors |= {f"state/{n}/{key}": a for n, own in state_dict.pop("state").items() for key, a in own.items()}
        tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
        content = {
            "fusedstep": __version__,
            "numpy": np.__version__,
            "params": [name for name, _ in arrays],
            "state_dict": state_dict,
            "extra": as_json(extra, "extra"),
        }
        text = json.dumps(content, default=plain)
        metadata = {"format": FORMAT, "version": str(VERSION), "content": text, "sha256": digest(text, tensors)}
        write(target, tensors, metadata)


def load(
    path: str | os.PathLike[str], opt: Optimizer | Wrapper | None = None, params: Any = None, *, strict: bool = True
) -> Checkpoint:
    """Read a checkpoint, into an optimizer and its parameters if given.

    Everything is checked before anything changes: the whole file by its SHA-256, then names, shapes, dtypes, rule and
    convention.

    Parameters
    ----------
    path : str or path
        A file that :func:`save` has written.
    opt : Optimizer, Lookahead or SAM, optional
        Goes on from the checkpoint: gets its state, step number, and hyper-parameters but for those that are callables here.
    params : array, or (nested) sequence or mapping of arrays, optional
        Overwritten in place by the parameters of the same names; by default those of the optimizer. For none of them,
        ``{}`` with ``strict=False``.
    strict : bool
        Whether the names must be the same on both sides; else those on both sides are loaded.

    Returns
    -------
    Checkpoint
        The parameters, state dict and extra, as new objects.

    Raises
    ------
    ImportError
        If the safetensors library is not there.
    OSError
        If the file cannot be read.
    TypeError, ValueError
        If it is damaged, no checkpoint, or does not fit. Nothing has changed then.

    Examples
    --------
    >>> import numpy as np, fusedstep as fs
    >>> opt = fs.SGD({"w": np.ones(2)}, lr=1.0, momentum=0.5)
    >>> _ = opt.step({"w": np.ones(2)})
    >>> fs.save("model.safetensors", opt)
    >>> params = {"w": np.ones(2)}
    >>> opt = fs.SGD(params, momentum=0.5)
    >>> checkpoint = fs.load("model.safetensors", opt)
    >>> params["w"], opt.steps, opt.param_groups[0]["lr"]
    (array([0., 0.]), 1, 1.0)
    >>> fs.load("model.safetensors").params    # to look at
    {'w': array([0., 0.])}
    """
    source = as_path(path)
    opt = None if opt is None else as_optimizer(opt)
    checkpoint = read(source)
    if opt is None and params is None:
        return checkpoint
    try:
        changes = param_changes(checkpoint.params, named_arrays(params, opt), strict)
        if opt is None:
            assign(changes)
        else:
            with opt._lock:
                assign(changes + loading(opt, checkpoint.state_dict, strict))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{source}: {error}") from None
    return checkpoint


# ---- Arguments ----------------------------------------------------------------------------------------------------------


def as_path(path: Any) -> Path:
    from pathlib import Path

    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {path!r}")
    return Path(path)


def as_optimizer(opt: Any) -> Optimizer:
    if not isinstance(opt, (Optimizer, Wrapper)):
        raise TypeError(f"opt: expected an optimizer, got {type(opt).__name__}")
    return settled(opt)


def named_arrays(params: Any, opt: Optimizer | None) -> list[tuple[str, Array]]:
    if params is None and opt is not None:
        return opt._params.items()
    structure = trees.Structure(params)
    trees.check_names(structure.names)
    arrays = [(name, _arrays.as_array(leaf, f"params[{name!r}]")) for name, leaf in zip(structure.names, structure.leaves)]
    for name, array in arrays:
        _arrays.check_dtype(array, f"params[{name!r}]")
    return arrays


def plain(number: Any) -> int | float:
    """A hyper-parameter of another type than Python's own."""
    try:
        return operator.index(number)
    except TypeError:
        return float(number)


def as_json(value: Any, label: str) -> Any:
    """The same value, if JSON keeps it."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{label}: expected keys of type str, got {key!r}")
        return {key: as_json(item, f"{label}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, f"{label}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kinds = "None, bool, int, float, str, dict, list or tuple"
    raise TypeError(f"{label}: expected {kinds}, got {type(value).__name__}")


def param_changes(loaded: dict[str, Array], targets: list[tuple[str, Array]], strict: bool) -> list[Change]:
    changes: list[Change] = []
    names = [name for name, _ in targets]
    for name in loaded:
        if strict and name not in names:
            raise ValueError(f"params[{name!r}]: expected a parameter to load it into, got none")
    for name, target in targets:
        label = f"params[{name!r}]"
        _arrays.as_writeable(target, label)
        if name not in loaded:
            if strict:
                raise ValueError(f"{label}: expected a parameter in the file, got none")
            continue
        if target.dtype != loaded[name].dtype:
            raise TypeError(f"{label}: expected dtype {target.dtype}, got {loaded[name].dtype}")
        if target.shape != loaded[name].shape:
            raise ValueError(f"{label}: expected shape {target.shape}, got {loaded[name].shape}")
        changes.append((target, ..., loaded[name]))
    return changes


# ---- The file -----------------------------------------------------------------------------------------------------------


def safetensors() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(f'fs.save and fs.load need safetensors ({error}): pip install "fusedstep[checkpoint]"') from None


def digest(text: str, tensors: dict[str, Array]) -> str:
    """SHA-256 of everything in the file that counts."""
    import hashlib  # here, because it loads OpenSSL, a quarter of what importing fusedstep would take

    sha256 = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        sha256.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def write(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    import shutil

    library = safetensors()
    path = path.resolve()  # where a link points to
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file or nothing there, got a directory, device or pipe")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to put it into, got none")
    remove_leftovers(path)
    # A folder, because the library may make temporary files of its own.
    folder = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary = folder / path.name
    try:
        folder.mkdir()
        try:
            library.numpy.save_file(tensors, temporary, metadata=metadata)
        except library.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        shutil.copymode(path if path.exists() else new_file(folder / "mode"), temporary)
        sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_file(path: Path) -> Path:
    """A file with the permissions that the user's new files have; the library's are private."""
    path.touch()
    return path


def sync(path: Path) -> None:
    """Have the disk hold what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what processes left that were killed while they saved here."""
    import shutil

    for leftover in path.parent.glob(".*.tmp"):
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.([0-9]{{1,9}})\.[0-9]+\.tmp", leftover.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def read(path: Path) -> Checkpoint:
    import json

    library = safetensors()
    open(path, "rb").close()  # for Python's own errors if that cannot be done
    try:
        with library.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            if metadata["version"] != str(VERSION):
                raise ValueError(f"its format version is {metadata['version']!r}, this fusedstep reads {str(VERSION)!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if digest(metadata["content"], tensors) != metadata["sha256"]:
                raise ValueError("its content does not match its SHA-256")
            return unpacked(json.loads(metadata["content"]), tensors)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or hostile file leads to
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"{path}: expected a checkpoint of fusedstep, got a damaged or foreign file: {reason}") from error


def unpacked(content: dict[str, Any], tensors: dict[str, Array]) -> Checkpoint:
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "names" else value for key, value in group.items()}
        for group in content["state_dict"]["param_groups"]
    ]
    params = {name: tensors.pop(f"params/{name}") for name in content["params"]}
    state: dict[str, dict[str, Array]] = {name: {} for group in groups for name in group["names"]}
    for label, array in tensors.items():
        name, key = label.removeprefix("state/").rsplit("/", 1)
        state[name][key] = array
    return Checkpoint(params, {**content["state_dict"], "param_groups": groups, "state": state}, content["extra"])
