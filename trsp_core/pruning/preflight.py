"""All that can be known of a run before a model is loaded."""

from __future__ import annotations

from trsp_core.data import text_check
from trsp_core.errors import refuse
from trsp_core.models.catalog import facts
from trsp_core.models.inspection import refuse_family
from trsp_core.pruning import forecast, validate
from trsp_core.pruning.forecast import Forecast
from trsp_core.schema.config import RunConfig


def preflight(config: RunConfig) -> Forecast:
    """All that can be known before a model is loaded: whether the run can be done, how long it takes, what it holds.

    The page, the shell and the engine ask this one place. It imports no torch.

    Raises:
        TrspError: the model or a text cannot be used, settings do not fit the model, or memory is short.
    """
    refuse(validate.check(config))
    known = facts(config.model)
    refuse(validate.check(config, known.n_layers, known.max_length))
    refuse_family(known)
    text_check.check(known, config)
    expected = forecast.forecast(config, known)
    if not forecast.on_gpu(config):
        forecast.check_memory(expected)
    return expected
