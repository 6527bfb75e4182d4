"""How far a run that broke off has come."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from trsp_core.schema.events import Event

T = TypeVar("T")

STEP, ROUND = "step", "round"  # entries in the metadata of the files that a run resumes from


@dataclass(frozen=True)
class Past:
    """How far a run that broke off has come, and so what need not be done again. The default is a run that begins.

    Attributes:
        next_event: number of the first event that has not been told; 0 for a run that begins.
        done: names of the phases that were begun before it, without a repair that `refits` is in. All of them are
            complete, but for the transfer that `step` is in.
        choices: P after each cycle's choice.
        layer_weights: those after the last step of stage 1; [] before any.
        removed: whether `LayersRemoved` has been told.
        step: how many steps of stage 2 the weights in `checkpoint` have behind them; 0 without such a file.
        checkpoint: the file of stage 2; None where there is none.
        round: how many rounds of stage 1 the layer weights in `rounds` have behind them, in the choice that broke off;
            0 where that choice is made anew.
        rounds: the file of stage 1; None where there is none.
        refits: behind how many layers of the repair that broke off the run goes on; 0 where the repair is begun anew,
            and where it is complete.
    """

    next_event: int = 0
    done: frozenset[str] = frozenset()
    choices: tuple[list[int], ...] = ()
    removed: bool = False
    step: int = 0
    checkpoint: Path | None = None
    round: int = 0
    rounds: Path | None = None
    layer_weights: list[float] = field(default_factory=list)
    refits: int = 0


def fresh_events(fresh: bool, story: Generator[Event, None, T]) -> Generator[Event, None, T]:
    """Run `story` and return its value. Its events are passed on if it is `fresh`: an earlier run has not told them."""
    with contextlib.closing(story):
        while True:
            try:
                event = next(story)
            except StopIteration as end:
                return end.value
            if fresh:
                yield event
