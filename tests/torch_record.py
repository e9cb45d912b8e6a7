"""What PyTorch's optimizers give for every setting in the database, recorded for tests that need no PyTorch.

``python tests/torch_record.py`` records anew, which a new setting or version calls for.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from fusedstep import database

FILE = Path(__file__).parent / "data" / "torch.json"
STEPS, SIZE = 20, 16

COMMON: list[dict[str, Any]] = [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}]


def wanted() -> list[tuple[str, dict[str, Any]]]:
    """Rules and settings to be recorded, of which PyTorch's class may not have all."""
    settings = [(entry.torch_name, own) for entry in database.ENTRIES if entry.torch_name for own in entry.settings]
    return [(rule, {"lr": 0.01, **own, **common}) for rule, own in settings for common in COMMON]


def arguments(torch: Any, rule: str) -> dict[str, Any]:
    """Those of PyTorch's class, with their defaults."""
    return {
        name: p.default for name, p in inspect.signature(getattr(torch.optim, rule)).parameters.items() if name != "params"
    }


def params_after(torch: Any, rule: str, settings: dict[str, Any], start: Any, grads: Any) -> Any:
    """Where PyTorch ends."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # scalars like ASGD's step size have that
    try:
        param = torch.nn.Parameter(torch.tensor(start))
        opt = getattr(torch.optim, rule)([param], **settings)
        for grad in grads:
            param.grad = torch.tensor(grad)
            opt.step()
    finally:
        torch.set_default_dtype(before)
    return param.detach().numpy()


def recorded() -> Any:
    """The record: version, start, grads, defaults and cases, each with rule, settings, own settings and params."""
    record = json.loads(FILE.read_text())
    for settings in [*record["defaults"].values(), *(case["settings"] for case in record["cases"])]:
        settings.update({name: tuple(value) for name, value in settings.items() if isinstance(value, list)})
    return record


def main() -> None:
    import torch

    rng = np.random.default_rng(12345)
    start, grads = rng.standard_normal(SIZE).tolist(), rng.standard_normal((STEPS, SIZE)).tolist()
    cases, defaults = [], {rule: arguments(torch, rule) for rule, _ in wanted()}
    for rule, asked in wanted():
        settings = {name: value for name, value in asked.items() if name in defaults[rule]}
        params = params_after(torch, rule, settings, start, grads).tolist()
        case = {"rule": rule, "settings": settings, "params": params}
        if case not in cases:
            cases.append(case)
    record = {"version": torch.__version__, "start": start, "grads": grads, "defaults": defaults, "cases": cases}
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
