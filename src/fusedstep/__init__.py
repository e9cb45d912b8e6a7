"""fusedstep: the optimizer step for NumPy arrays.

    >>> import numpy as np, fusedstep as fs
    >>> w = np.ones(3, dtype=np.float32)
    >>> opt = fs.AdamW({"w": w}, lr=0.1, clip_norm=1.0)
    >>> report = opt.step({"w": np.array([0.5, -0.5, 0.0], dtype=np.float32)})
    >>> w
    array([0.899, 1.099, 0.999], dtype=float32)

The rules are the classes of :mod:`fusedstep.rules`, from SGD to AdamW; :class:`Optimizer` describes what they share.
:mod:`fusedstep.interop` exchanges state with PyTorch, Keras and optax;
:mod:`fusedstep.kernels` has the rules on single arrays, :mod:`fusedstep.reference` their specification in NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import reference, rules, schedules
from ._threads import get_num_threads, set_num_threads, threads
from ._version import __version__
from .checkpoint import Checkpoint, load, save
from .clipping import adaptive_grad_clip, clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from .config import show_config
from .errors import NonFiniteGradientError
from .groups import group, layer_decay
from .optimizer import Optimizer, StepReport
from .rules import *  # noqa: F403
from .rules import conventions
from .scaling import DynamicLossScaler
from .telemetry import ArrayStats, Stats
from .wrappers import SAM, Lookahead

if TYPE_CHECKING:
    from . import interop, kernels

__all__ = [
    "SAM",
    "ArrayStats",
    "Checkpoint",
    "DynamicLossScaler",
    "Lookahead",
    "NonFiniteGradientError",
    "Optimizer",
    "Stats",
    "StepReport",
    "__version__",
    "adaptive_grad_clip",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "conventions",
    "get_num_threads",
    "global_norm",
    "group",
    "interop",
    "kernels",
    "layer_decay",
    "load",
    "reference",
    "save",
    "schedules",
    "set_num_threads",
    "show_config",
    "threads",
]
__all__ += rules.__all__


def __getattr__(name: str) -> Any:
    """The modules that most programs never use are imported when they are."""
    if name in ("interop", "kernels"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
