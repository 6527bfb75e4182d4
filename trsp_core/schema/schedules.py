"""Stage 2's schedules: which steps a cycle takes, what the penalty and the rate are multiplied by, and how far the gate
stands open. No torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from trsp_core import formatting
from trsp_core.schema.config import RunConfig

REPAIR_PROBES = 6


@dataclass(frozen=True)
class Span:
    """The part of stage 2's steps that one cycle takes: `steps` of them, after `done`."""

    done: int
    steps: int


def shared_out(steps: int, parts: int) -> list[Span]:
    """`steps` in `parts` spans as equal as can be, one after the other."""
    return [Span(begin, end - begin) for begin, end in itertools.pairwise(ends(steps, parts))]


def lambda_2(config: RunConfig, step: int, span: Span | None = None) -> float:
    """What the penalty is multiplied by at `step` of stage 2 (from 1), in the cycle that takes `span`; 0 where there is
    none."""
    if not penalty_acts(config, step, span):
        return 0.0
    return config.lambda_2 * ramp(step, config.stage2_steps, config.lambda_2_schedule)


def penalty_acts(config: RunConfig, step: int, span: Span | None = None) -> bool:
    """Whether the chosen layers still change anything at `step`: not behind a gate that is shut, nor once deleted."""
    spans = [span] if span else shared_out(config.stage2_steps, config.cycles)
    now = next((s for s in spans if step <= s.done + s.steps), spans[-1])
    return not config.deletes_first and opening(step - now.done, config.anneal * now.steps) > 0


def acting(config: RunConfig) -> tuple[int, float]:
    """The number of steps of stage 2 in which lambda_2 acts, and its highest value."""
    if config.deletes_first or not config.lambda_2:
        return 0, 0.0
    count, last = 0, 0
    for span in shared_out(config.stage2_steps, config.cycles):
        closing = config.anneal * span.steps
        open_for = min(math.ceil(closing) - 1, span.steps) if closing else span.steps
        count += open_for
        last = span.done + open_for if open_for else last
    return count, config.lambda_2 * ramp(last, config.stage2_steps, config.lambda_2_schedule) if count else 0.0


def lambda_2_in_words(config: RunConfig) -> str:
    """For how many steps lambda_2 acts, in a sentence."""
    steps = config.stage2_steps
    if not steps:
        return "λ₂ does nothing: stage 2 has no steps."
    if not config.lambda_2:
        return "λ₂ is 0: stage 2 is plain training."
    if config.deletes_first:
        return "λ₂ does nothing: the layers are deleted before stage 2."
    count, highest = acting(config)
    if not count:
        return "λ₂ does nothing: the gate on the chosen layers is shut from the first step on."
    if count == steps:
        return f"λ₂ acts in all {steps} steps of stage 2."
    reach = (
        f", and rises to {formatting.figure(highest)} of {formatting.setting(config.lambda_2)}"
        if config.lambda_2_schedule == "ramp"
        else ""
    )
    when = "shut in each cycle" if config.cycles > 1 else "shut"
    return f"λ₂ acts in {count} of {steps} steps of stage 2, until the gate on the chosen layers is {when}{reach}."


def probe_due(config: RunConfig, step: int) -> bool:
    """Whether deletion is probed after `step` of stage 2 (from 1)."""
    return step % config.probe_every == 0 or step == config.stage2_steps


def repair_probes(config: RunConfig, layers: int) -> list[int]:
    """Behind how many of a repair's `layers` it is probed: at most `REPAIR_PROBES` times, spread evenly, never behind
    the last, after which the model is measured anyway. All probes together take a tenth at most of three passes over
    the calibration blocks, which is about what `refit` takes with its sums and solves; with few blocks they are
    fewer."""
    read_by_repair = 3 * config.calibration_blocks * config.block_length
    read_by_probe = 2 * config.probe_blocks * config.measure_length  # both domains
    if not read_by_probe:
        return []
    count = min(REPAIR_PROBES, read_by_repair // (10 * read_by_probe), max(layers - 1, 0))
    return [round(layers * n / (count + 1)) for n in range(1, count + 1)]


def opening(step: float, closing: float) -> float:
    """How far the gate of the chosen layers stands open at `step` (from 1) when it closes over `closing` steps; 1 where
    it never does."""
    return max(0.0, 1 - step / closing) if closing else 1.0


def ramp(step: int, steps: int, schedule: str) -> float:
    """Factor on lambda_2 at `step` of `steps` (from 1)."""
    return step / steps if schedule == "ramp" else 1.0


def rate_factor(step: int, steps: int, schedule: str) -> float:
    """Factor on the learning rate at `step` of `steps` (from 1): cosine has a warm-up of a tenth and ends at a
    tenth."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 10)
    if step <= warm:
        return step / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def ends(steps: int, parts: int) -> list[int]:
    """0, and the last step of each of `parts` spans of `steps`, which are as equal as can be."""
    return [steps * n // parts for n in range(parts + 1)]
