"""What of a run that broke off need not be done again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STEP, ROUND = "step", "round"  # entries of the metadata of what a run leaves to resume from


@dataclass(frozen=True)
class Past:
    """What need not be done again.

    Attributes:
        next_event: number of the first event that is to be told; 0 begins anew.
        done: names of the phases before it; all of them are complete, but for the transfer that `step` is in.
        choices: P as it was after each cycle's choice.
        removed: `LayersRemoved` is told.
        step: steps of stage 2 that `checkpoint` holds the weights after; 0 where the weights are those of the model.
        round: rounds of stage 1 that `rounds` holds the layer weights after, in the choice that broke off; 0 where that
            is to be made anew.
    """

    next_event: int = 0
    done: frozenset[str] = frozenset()
    choices: tuple[list[int], ...] = ()
    removed: bool = False
    step: int = 0
    checkpoint: Path | None = None
    round: int = 0
    rounds: Path | None = None
