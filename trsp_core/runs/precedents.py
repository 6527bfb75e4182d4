"""Which layers would go: what earlier runs chose with the same settings, or with settings that differ in little."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trsp_core.schema.config import KNOBS, RunConfig

MOST_DIFFERENCES = 2  # settings in which a run may differ and still be a hint
_ALWAYS = ("model", "text", "method")
_CHOICE = ("protect_first", "protect_last", "no_neighbours", "score_blocks", "block_length", "batch_blocks",
           "calibration_blocks", "seed", "precision")  # fmt: skip
_LEARNED = ("lambda_1", *(name for name, knob in KNOBS.items() if knob.group == "stage 1"))
LEARNING = ("trsp", "masks")  # methods that learn layer weights
NESTED = ("trsp", "sleb", "shortgpt")  # methods whose first layers are those that fewer layers would be


@dataclass(frozen=True)
class Precedent:
    """A run that chose layers: `chosen` in the order in which they were chosen."""

    run_id: str
    config: RunConfig
    chosen: tuple[int, ...]

    def serves(self, count: int) -> bool:
        """Whether it tells which `count` layers would go."""
        config = self.config
        nested = config.method in NESTED and not config.one_shot and config.cycles == 1
        return len(self.chosen) == count or (nested and len(self.chosen) > count)


@dataclass(frozen=True)
class Hint:
    """The layers that would go, as far as a run tells; `differences` are the settings in which it differs."""

    precedent: Precedent
    layers: tuple[int, ...]
    differences: tuple[str, ...]


def nearest(config: RunConfig, count: int, precedents: Iterable[Precedent]) -> Hint | None:
    """What the nearest of `precedents` says of `count` layers under `config`: the one with the fewest differences, of
    several the one of the nearest lambda_1, of these the first. None where each differs in too much."""
    hints = [
        Hint(precedent, precedent.chosen[:count], differences(config, precedent.config))
        for precedent in precedents
        if precedent.serves(count) and all(getattr(config, n) == getattr(precedent.config, n) for n in _ALWAYS)
    ]
    near = [hint for hint in hints if len(hint.differences) <= MOST_DIFFERENCES]

    def distance(hint: Hint) -> tuple[int, float]:
        return len(hint.differences), abs(hint.precedent.config.lambda_1 - config.lambda_1)

    return min(near, key=distance, default=None)


def differences(one: RunConfig, other: RunConfig) -> tuple[str, ...]:
    """Settings that decide over the choice of layers, and in which the two differ."""
    names = (*_CHOICE, *(_LEARNED if one.method in LEARNING else ()))
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))
