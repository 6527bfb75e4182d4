"""Finished runs that differ in the removed layers alone: which they are, and who of them is ahead. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from pages.ui.style import words
from pages.ui.what_if.history import YOU
from trsp_core import formatting
from trsp_core.evaluation import intervals
from trsp_core.pruning import methods
from trsp_core.runs.store import Run
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.run_state import RunState

SAME = (
    *("model", "text", "lambda_2", "measure_blocks", "measure_length", "seed", "precision"),
    *(name for name, knob in KNOBS.items() if knob.group in ("stage 2", "text")),
)


@dataclass(frozen=True)
class Rival:
    """A finished run. `losses` of its pruned model by domain, mean nats a token of each block; `times` its perplexity
    over the dense model's, in the geometric mean of both domains."""

    who: str
    run: str
    removed: list[int]
    losses: dict[str, list[float]]
    times: float

    @property
    def subject(self) -> str:
        return f"{self.who} are" if self.who == YOU else f"{self.who} is"


def alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether both runs would do the same with the same layers, and both teach before they delete."""
    return one.stage2_steps > 0 and all(getattr(one, name) == getattr(other, name) for name in SAME)


def rival(run: Run, config: RunConfig, state: RunState, like: RunState | None = None) -> Rival | None:
    """What `run` came to; None where it has not finished, was steered, gave no numbers, or was measured on other
    blocks than `like`."""
    pruned, dense = ({m.domain: m.losses for m in state.measured if m.state == s} for s in ("pruned", "dense"))
    if (
        state.ended != "finished"
        or state.turns
        or not state.removed
        or any(d not in pruned or d not in dense for d in DOMAINS)
    ):
        return None
    if like is not None and _blocks(state) != _blocks(like):
        return None
    if any(loss is None for losses in (*pruned.values(), *dense.values()) for loss in losses):
        return None
    rise = statistics.fmean(statistics.fmean(pruned[d]) - statistics.fmean(dense[d]) for d in DOMAINS)
    method = methods.all_methods().get(config.method)
    who = YOU if config.method == "manual" else method.title if method else config.method
    return Rival(who, run.id, state.removed.removed, pruned, math.exp(min(rise, 700)))


def table(field: Iterable[Rival]) -> pd.DataFrame:
    """A row a run."""
    rows = [
        (
            r.who,
            words.layers(r.removed),
            len(r.removed),
            r.times,
            *(_perplexity(r.losses[d]) for d in DOMAINS),
            f"run?run={r.run}",
        )
        for r in field
    ]
    return pd.DataFrame(rows, columns=["Who", "Removed", "Layers", "Times dense", "Calibration", "Held out", "Run"])


def verdict(field: Sequence[Rival], count: int) -> str:
    """Who is ahead among the runs that removed `count` layers, and how surely: a sentence, or ""."""
    level = [r for r in field if len(r.removed) == count]
    best = min(level, key=lambda r: r.times, default=None)
    second = min((r for r in level if best and r.who != best.who), key=lambda r: r.times, default=None)
    if best is None or second is None:
        return ""
    factors = {d: intervals.factor(best.losses[d], second.losses[d]) for d in DOMAINS}
    parts = [
        f"{formatting.interval(f.value, f.low, f.high, formatting.ratio)} in the {words.DOMAINS[d]}"
        for d, f in factors.items()
    ]
    whose = "yours" if second.who == YOU else f"{second.who}'s"
    sure = all(f.high < 1 for f in factors.values())
    doubt = "" if sure else " An interval reaches 1 or beyond, or is missing, so this is no clear lead."
    return (
        f"**{best.subject} ahead** with {count} layers removed: perplexity {' and '.join(parts)} as a multiple of "
        f"{whose} (95 % intervals over blocks).{doubt}"
    )


def _blocks(state: RunState) -> dict[str, str]:
    return {t.domain: t.fingerprint for t in state.texts if t.role == "measure"}


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700))
