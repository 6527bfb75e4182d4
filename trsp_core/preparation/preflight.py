"""All that can be known of a run before a model is loaded. No torch."""

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
    """A run that can be done. It is made once a run, and handed on to whoever needs a part of it.

    Attributes:
        config: it holds no contradiction, and fits the model and the texts.
        facts: of its model, from the headers of the checkpoint.
        forecast: time and memory.
    """

    config: RunConfig
    facts: Facts
    forecast: Forecast


def preflight(config: RunConfig) -> RunSetup:
    """Check all of a run. The page and the shell ask it before there is a folder. It imports no torch.

    Raises:
        TrspError: the model or a text cannot be used, settings do not fit the model, or memory is short.
    """
    facts = catalog.facts(config.model)
    refuse(validate.check(config, facts.n_layers, facts.max_length))
    refuse_family(facts)
    text_check.check(facts, config)
    return _in_free_memory(config, facts)


def recheck(config: RunConfig) -> RunSetup:
    """What can have changed since `preflight` has let this config pass, in another process: whether the model is here,
    and the free memory.

    Raises:
        TrspError: the model cannot be read, or memory is short.
    """
    return _in_free_memory(config, catalog.facts(config.model))


def _in_free_memory(config: RunConfig, facts: Facts) -> RunSetup:
    expected = forecast.forecast(config, facts)
    if not forecast.on_gpu(config):
        forecast.check_memory(expected)
    return RunSetup(config, facts, expected)
