"""Executes a run: checks and forecasts it, then lets the engine do it. Torch is loaded in between."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from trsp_core.errors import TrspError
from trsp_core.preparation.preflight import RunSetup, preflight
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event, RunPlanned
from trsp_core.training.progress import Past
from trsp_core.training.steering import Steering


def execute(
    config: RunConfig,
    folder: Path | None = None,
    loaded: tuple[Any, Any] | None = None,
    past: Past | None = None,
    setup: RunSetup | None = None,
    steering: Steering | None = None,
) -> Generator[Event, None, None]:
    """Prune as `config` says, and yield each event of the run; the first is the forecast.

    Args:
        folder: the run folder, for the pruned model and for what to resume from; None keeps nothing.
        loaded: a model and its tokenizer to work on, instead of loading `config.model`; they end as they were, and
            nothing is forecast.
        past: how far a run that broke off has come: its events are not told again, its work is repeated only if needed.
        setup: the answer of `preflight` to `config`, where it has been asked already.
        steering: whoever reads the events may turn knobs with it in between.

    Raises:
        TrspError: the run cannot be done, or `setup` is of another config; the message says why and what to do.
    """
    past = past or Past()
    if setup and setup.config != config:
        raise TrspError("The setup is of another config.", "Call preflight with this one.")
    if loaded is None:
        setup = setup or preflight(config)
        if not past.next_event:
            yield RunPlanned(list(setup.forecast.phases), setup.forecast.peak_bytes)
    from trsp_core.pruning import engine  # torch comes in here

    yield from engine.execute(config, folder, loaded, past, setup.facts if setup else None, steering)
