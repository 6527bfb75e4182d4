"""Checks a run before its model is loaded: settings, model, texts and memory. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from trsp_core.data import text_check
from trsp_core.errors import refuse
from trsp_core.models import catalog
from trsp_core.models.inspection import Facts, refuse_family
from trsp_core.preparation import forecast
from trsp_core.preparation.forecast import Forecast
from trsp_core.pruning import validate
from trsp_core.schema.config import RunConfig


@dataclass(frozen=True)
class RunSetup:
    """What is known of a run that can be done. `preflight` makes it once, and it is handed on from there.

    Attributes:
        config: the settings, which hold no contradiction and fit the model and the texts.
        facts: of the model, from its config and the headers of its weight files.
        forecast: the time and memory that the run will take.
    """

    config: RunConfig
    facts: Facts
    forecast: Forecast


def preflight(config: RunConfig) -> RunSetup:
    """Check all of a run that can be checked without its model. The page and the shell ask this before there is a run
    folder. The texts are cut in a child process; this one loads no torch.

    Raises:
        TrspError: the model or a text cannot be used, settings do not fit the model, or memory is short.
    """
    facts = catalog.facts(config.model)
    refuse(validate.check(config, facts.n_layers, facts.max_length))
    refuse_family(facts)
    text_check.check(facts, config)
    return _in_free_memory(config, facts)


def recheck(config: RunConfig) -> RunSetup:
    """Check again what can have changed since `preflight` let this config pass in another process: whether the model is
    here, and whether the free memory is enough.

    Raises:
        TrspError: the model cannot be read, or memory is short.
    """
    return _in_free_memory(config, catalog.facts(config.model))


def _in_free_memory(config: RunConfig, facts: Facts) -> RunSetup:
    expected = forecast.forecast(config, facts)
    if not forecast.on_gpu(config):
        forecast.check_memory(expected)
    return RunSetup(config, facts, expected)
