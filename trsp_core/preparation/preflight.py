"""All that can be known of a run before a model is loaded."""

from __future__ import annotations

from trsp_core.data import text_check
from trsp_core.errors import refuse
from trsp_core.models.catalog import facts
from trsp_core.models.inspection import refuse_family
from trsp_core.preparation import forecast
from trsp_core.preparation.forecast import Forecast
from trsp_core.pruning import validate
from trsp_core.schema.config import RunConfig


def preflight(config: RunConfig) -> Forecast:
    """Whether the run can be done, how long it takes, and what memory it holds. The page, the shell and the run's own
    process ask this one function. It imports no torch.

    Raises:
        TrspError: the model or a text cannot be used, settings do not fit the model, or memory is short.
    """
    model = facts(config.model)
    refuse(validate.check(config, model.n_layers, model.max_length))
    refuse_family(model)
    text_check.check(model, config)
    expected = forecast.forecast(config, model)
    if not forecast.on_gpu(config):
        forecast.check_memory(expected)
    return expected
