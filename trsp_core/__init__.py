"""TRSP, Two-Stage Regularization-Based Structured Pruning (arXiv:2505.18232), as a library of events.

    for event in trsp_core.prune("smollm2-135m", ratio=0.25): ...

`__all__` is the public interface. Each name is loaded at its first use. Torch is loaded only when a run begins: when
the first events of `prune` or `execute` are read. Which package may import which stands in docs/architecture.md, and is
tested.
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

# Events tell how far a run is, so the bars of other libraries stay out of stderr: those of huggingface_hub, of
# transformers, which follows it, and of datasets. They read this when they are loaded; 0 brings them back.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

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
    """Prune a model, and yield the events of the run. Closing the generator restores a model that was passed in.

    Args:
        model: a name of the catalogue, a hub id, or a folder of this machine.
        ratio: share of the layers to remove, 0 to 1; None takes the preset's, or the default.
        preset: "quick", "paper" or another of `schema.config.PRESETS`; None for the defaults.
        folder: the run folder, in which the pruned model is saved; None saves nothing.
        loaded: a model and its tokenizer to work on, instead of loading `model`. They end as they were.
        settings: any other setting, named as its flag with underscores, such as `stage2_steps=60`.

    Raises:
        TrspError: a setting, the model or a text cannot be used; the message says why and what to do.
    """
    from trsp_core.preparation.execution import execute
    from trsp_core.pruning.validate import from_values

    values = {"model": model, **({} if ratio is None else {"ratio": ratio}), **settings}
    config = from_values(values, preset)
    return execute(config, None if folder is None else Path(folder), loaded)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
