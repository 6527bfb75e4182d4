"""A run's curves as CSV, for other programs to draw: one long table, a row for each point."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from trsp_core import escaping
from trsp_core.schema import schedules, turns
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.run_state import RunState

HEAD = ("curve", "domain", "layer", "x", "x_unit", "value", "value_unit")
Row = tuple[str, str, Any, int, str, Any, str]
STAGE_1, STAGE_2 = "step of stage 1", "step of stage 2"


def table(config: RunConfig, state: RunState) -> str:
    """CSV with a header line. `layer` is empty for a curve of the whole model, `value` for what was not a number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    writer.writerows(map(escaping.csv, row) for row in _rows(config, state))
    return text.getvalue()


def _rows(config: RunConfig, state: RunState) -> Iterator[Row]:
    lambdas = turns.course(config, state.turns, "lambda_1", len(state.weight_steps))
    for step, lambda_1 in zip(state.weight_steps, lambdas, strict=True):
        yield "language-modelling loss", "calibration", "", step.step, STAGE_1, step.lm_loss, "nats per token"
        pull = lambda_1 * step.l1
        yield "l1 times lambda_1", "calibration", "", step.step, STAGE_1, pull, "nats per token"
        for layer, weight in enumerate(step.weights):
            yield "layer weight", "calibration", layer, step.step, STAGE_1, weight, "1"
    for refit in state.refits:
        for when, far in (("before", refit.before), ("after", refit.after)):
            yield f"distance from the dense state, {when}", "calibration", refit.layer, 0, "none", far, "1"
    for probe in state.repair_probes:
        curve = f"perplexity if the repair stopped here, first {probe.blocks} blocks"
        yield curve, probe.domain, "", probe.layers, "repaired layers", probe.perplexity, "1"
    for step in state.gap_steps:
        yield "language-modelling loss", "calibration", "", step.step, STAGE_2, step.lm_loss, "nats per token"
        pull = step.lambda_2 * step.penalty
        yield "penalty times lambda_2", "calibration", "", step.step, STAGE_2, pull, "nats per token"
        acts = schedules.penalty_acts(config, step.step)  # older runs recorded lambda_2 where it did not
        yield "lambda_2", "", "", step.step, STAGE_2, step.lambda_2 if acts else 0.0, "1"
        yield "learning rate", "", "", step.step, STAGE_2, step.learning_rate, "1"
        for layer, gap in zip(state.chosen, step.gaps, strict=False):
            yield "relative gap", "calibration", layer, step.step, STAGE_2, gap, "1"
    for domain, probes in zip(DOMAINS, (state.probes, state.probes_elsewhere), strict=True):
        for probe in probes:
            curve = f"perplexity if deleted now, first {probe.blocks} blocks"
            yield curve, domain, "", probe.step, STAGE_2, probe.perplexity, "1"
    for name, scores in state.importance.items():
        for layer, rise in enumerate(scores.rises):
            yield f"loss without the layer, {name}", "calibration", layer, 0, "none", rise, "nats per token"
    for measurement in state.measured:
        for block, loss in enumerate(measurement.losses):
            yield f"loss, {measurement.state}", measurement.domain, "", block, "measured block", loss, "nats per token"
    for turn in state.turns:
        yield f"turned: {turn.name}", "", "", turn.step, STAGE_1 if turn.stage == 1 else STAGE_2, turn.after, "1"
    for stretch in state.missing:
        yield "cannot be read", "", "", stretch.first, "number of the event", stretch.count, "events"
