"""TRSP, Two-Stage Regularization-Based Structured Pruning (arXiv:2505.18232), as a library of events.

    for event in trsp_core.prune("smollm2-135m", ratio=0.25): ...

What stands in `__all__` is the public interface; each name is loaded when it is asked for, and torch with `prune` and
`execute` alone. Which package may import which is in docs/architecture.md, and a test.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trsp_core.errors import TrspError
    from trsp_core.preparation.execution import execute
    from trsp_core.pruning.validate import from_values
    from trsp_core.runs.recorder import record
    from trsp_core.runs.store import Run, Store
    from trsp_core.schema.config import RunConfig
    from trsp_core.schema.events import Event

__all__ = ["Run", "RunConfig", "Store", "TrspError", "execute", "from_values", "prune", "record"]
__version__ = "0.1.0"

# Threads that wait for each other sleep instead of spinning: where two processes share the cores (a run and the app, or
# two visitors), products are five to ten times faster; alone a product loses some 50 microseconds, which counts for
# the smallest (see `evaluation.generation`). OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULES = {
    "RunConfig": "schema.config",
    "Run": "runs.store",
    "Store": "runs.store",
    "TrspError": "errors",
    "execute": "preparation.execution",
    "from_values": "pruning.validate",
    "record": "runs.recorder",
}


def prune(
    model: str,
    ratio: float | None = None,
    preset: str | None = None,
    folder: str | Path | None = None,
    loaded: tuple[Any, Any] | None = None,
    **settings: Any,
) -> Generator[Event]:
    """Prune a model and tell each event; closing the generator leaves a model that was passed in as it was.

    Args:
        model: of the catalogue, of the hub, or a folder of this machine.
        ratio: share of the layers that go; the preset's, or its default, where it is not given.
        preset: "quick", "paper" or another of `schema.config.PRESETS`.
        folder: where the pruned model goes; None keeps nothing.
        loaded: a model with its tokenizer to work on, instead of loading `model`.
        settings: names of flags with underscores, such as `stage2_steps=60`.

    Raises:
        TrspError: a setting, the model or a text cannot be used; the message says why and what to do.
    """
    from trsp_core.preparation.execution import execute
    from trsp_core.pruning.validate import from_values

    chosen = {"model": model, **({} if ratio is None else {"ratio": ratio}), **settings}
    config = from_values(chosen, preset)
    return execute(config, None if folder is None else Path(folder), loaded)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
