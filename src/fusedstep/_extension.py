"""The extension module with the compiled kernels, if there is one."""

from __future__ import annotations

import importlib
import threading
from typing import Any

core: Any = None
core_error: ImportError | None = None
try:
    core = importlib.import_module("fusedstep._core")
except ImportError as error:
    core_error = error


def require_core() -> Any:
    """The extension module, or an error that says what to do."""
    if core is None:
        raise RuntimeError(
            f"the compiled kernels of fusedstep are not available here ({core_error}); reinstall with a C compiler, or use "
            'backend="reference"'
        ) from core_error
    return core


def make_lock() -> Any:
    """A lock of an optimizer's; that of the extension module raises where waiting would never end."""
    return threading.Lock() if core is None else core.Lock()
