"""A run as its own process executes it: the preflight, then the engine's story. Torch is loaded in between."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from trsp_core.preparation.preflight import RunSetup, preflight
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event, RunPlanned
from trsp_core.training.progress import Past


def execute(
    config: RunConfig,
    folder: Path | None = None,
    loaded: tuple[Any, Any] | None = None,
    past: Past | None = None,
    setup: RunSetup | None = None,
) -> Generator[Event, None, None]:
    """Prune as `config` says and tell each event; the first is the forecast.

    Args:
        folder: the run folder, where the pruned model goes; None keeps nothing.
        loaded: a model and its tokenizer to work on, instead of loading `config.model`: then nothing is forecast. It is
            left as it was.
        past: of a run that broke off: what is settled is not told again, and done again only where it has to be.
        setup: of `config`, where `preflight` has been asked already.

    Raises:
        TrspError: the run cannot be done; the message says why and what to do.
    """
    past = past or Past()
    if loaded is None:
        setup = setup or preflight(config)
        if not past.next_event:
            yield RunPlanned(list(setup.forecast.phases), setup.forecast.peak_bytes)
    from trsp_core.pruning import engine  # torch comes in here

    yield from engine.execute(config, folder, loaded, past, setup.facts if setup else None)
