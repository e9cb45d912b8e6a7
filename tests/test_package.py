"""The package as installed: documented, typed, importable without its extension, clean to the linker."""

import doctest
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fusedstep
from fusedstep import _core, kernels

MODULES = sorted(module.name for module in pkgutil.walk_packages(fusedstep.__path__, "fusedstep."))
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", ["fusedstep", *MODULES])
def test_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(README), module_relative=False)
    assert results.attempted > 3
    assert results.failed == 0


@pytest.mark.parametrize("name", fusedstep.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fusedstep, name)
    assert thing.__doc__
    if inspect.isclass(thing) and issubclass(thing, fusedstep.Optimizer) and thing is not fusedstep.Optimizer:
        for section in ("Examples", "References"):
            assert f"\n{section}\n---" in inspect.getdoc(thing)
        assert "lr" in str(inspect.signature(thing))


WITHOUT_EXAMPLE = {"show_config", "DynamicLossScaler.load_state_dict", "DynamicLossScaler.state_dict"}
"""Plain calls, and what examples of others show."""


def public_functions():
    for name in fusedstep.__all__:
        thing = getattr(fusedstep, name)
        if inspect.isfunction(thing):
            yield pytest.param(thing, id=name)
        elif inspect.isclass(thing):
            methods = inspect.getmembers(thing, inspect.isfunction)
            own = [(key, method) for key, method in methods if key in vars(thing) and not key.startswith("_")]
            yield from (pytest.param(method, id=f"{name}.{key}") for key, method in own)


@pytest.mark.parametrize("function", [*public_functions()])
def test_public_functions_have_examples(function):
    name = function.__qualname__
    assert ("\n>>> " in inspect.getdoc(function)) != (name in WITHOUT_EXAMPLE)


def test_without_the_extension():
    """backend="reference" and everything around it work where the extension could not be built."""
    code = """
        import sys
        sys.modules["fusedstep._core"] = None
        import numpy as np, fusedstep as fs
        p, g = np.ones(3), np.ones(3)
        fs.Adam([p], backend="reference", clip_norm=1.0).step([g])
        fs.reference.sgd(p, g, step=1)
        assert fs.global_norm([g]) == 3**0.5
        assert fs.clip_by_global_norm([g], 1.0) == 3**0.5
        fs.clip_by_norm([g], 0.5), fs.clip_by_value([g], 0.1)
        assert g.max() <= 0.1
        fs.set_num_threads(2)
        assert fs.get_num_threads() == 1
        fs.show_config()
        for call in (lambda: fs.Adam([p]), lambda: fs.kernels.sgd(p, g, step=1)):
            try:
                call()
            except RuntimeError as error:
                assert "the compiled kernels of fusedstep are not available here" in str(error)
            else:
                raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_modules_imported_where_they_are_used():
    code = """
        import sys, fusedstep as fs
        assert {"interop", "kernels", "AdamW"} <= set(dir(fs))
        assert not {"fusedstep.interop", "fusedstep.kernels"} & set(sys.modules)
        fs.kernels.sgd, fs.interop.from_torch
        from fusedstep import *
        assert kernels is fs.kernels
        try:
            fs.kernel
        except AttributeError as error:
            assert str(error) == "module 'fusedstep' has no attribute 'kernel'"
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_clip_functions_are_their_references(monkeypatch, rng):
    from fusedstep import _extension, clipping

    arrays = [rng.standard_normal(n).astype(dtype) for n, dtype in [(5, np.float32), (2000, np.float64), (70, np.float16)]]
    for clip, limit in [(clipping.clip_by_global_norm, 1.0), (clipping.clip_by_norm, 0.5), (clipping.clip_by_value, 0.1)]:
        found, wanted = [a.copy() for a in arrays], [a.copy() for a in arrays]
        result = clip(found, limit)
        with monkeypatch.context() as patch:
            patch.setattr(_extension, "core", None)
            assert clip(wanted, limit) == result
        for a, b in zip(found, wanted):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_only_the_module_entry_is_exported():
    symbols = subprocess.run(["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if not name.startswith("_")] == ["PyInit__core"]


def test_importing_leaves_the_gil_off():
    """On free-threaded interpreters an extension that is not declared switches it on for everybody."""
    check = getattr(sys, "_is_gil_enabled", None)
    if check is None:
        source = Path(__file__).parent.parent / "setup.py"
        assert '"freethreading_compatible": True' in source.read_text()
    else:
        assert check() == ("t" not in sys.abiflags)


def test_typed():
    folder = Path(fusedstep.__file__).parent
    assert (folder / "py.typed").exists()
    assert set(dir(_core)) >= {"Plan", "levels", "RULES"}
    assert (Path(kernels.__file__).with_suffix(".pyi")).exists()
