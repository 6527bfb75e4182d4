"""Who is ahead after stage 2: runs that differ in the layers alone, compared on the same blocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from pages.ui.app_state import server
from pages.ui.style import words
from pages.ui.what_if.history import YOU
from trsp_core.errors import TrspError
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
MOST = 8  # runs beside this one


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


def section(run: Run, config: RunConfig, state: RunState) -> None:
    """The table and its sentence; nothing while there is no rival."""
    found = rivals(run, config, state)
    if len(found) < 2:
        return
    st.markdown("#### After stage 2")
    if told := verdict(found, len(state.chosen)):
        st.markdown(told)
    st.caption(
        "Finished runs with the same texts, stage 2 settings and seed as this one, as deep first, best first, on all "
        "measured blocks."
    )
    number = st.column_config.NumberColumn(format="%.2f")
    columns = {
        **dict.fromkeys(("Times dense", "Calibration", "Held out"), number),
        "Run": st.column_config.LinkColumn(display_text="Open"),
    }
    alt = "Runs that differ in the removed layers, with the perplexities of their pruned models."
    st.dataframe(table(found), hide_index=True, key="rivals", alt=alt, column_config=columns)


def rivals(run: Run, config: RunConfig, state: RunState) -> list[Rival]:
    """This run and the newest others that differ from it in the layers alone: as deep first, best first."""
    others = [(other, _config(other)) for other in server.runs() if other.id != run.id]
    near = [(other, settings) for other, settings in others if settings and alike(config, settings)][:MOST]
    found = [rival(run, config, state)]
    found += [rival(other, settings, server.look(other)[0], state) for other, settings in near]
    depth = len(state.chosen)
    return sorted((r for r in found if r), key=lambda r: (abs(len(r.removed) - depth), len(r.removed), r.times))


def alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether both runs would do the same with the same layers, and both teach before they delete."""
    return one.stage2_steps > 0 and all(getattr(one, name) == getattr(other, name) for name in SAME)


def rival(run: Run, config: RunConfig, state: RunState, like: RunState | None = None) -> Rival | None:
    """What `run` came to; None where it has not finished, gave no numbers, or was measured on other blocks than
    `like`."""
    pruned, dense = ({m.domain: m.losses for m in state.measured if m.state == s} for s in ("pruned", "dense"))
    if state.ended != "finished" or not state.removed or any(d not in pruned or d not in dense for d in DOMAINS):
        return None
    if like is not None and _blocks(state) != _blocks(like):
        return None
    if any(loss is None for losses in (*pruned.values(), *dense.values()) for loss in losses):
        return None
    rise = statistics.fmean(statistics.fmean(pruned[d]) - statistics.fmean(dense[d]) for d in DOMAINS)
    known = methods.all_methods().get(config.method)
    who = YOU if config.method == "manual" else known.title if known else config.method
    return Rival(who, run.id, state.removed.removed, pruned, math.exp(min(rise, 700)))


def table(found: Iterable[Rival]) -> pd.DataFrame:
    """A row a run."""
    rows = [
        (
            r.who,
            words.layers(r.removed),
            len(r.removed),
            r.times,
            *(_perplexity(r.losses[d]) for d in DOMAINS),
            _link(r),
        )
        for r in found
    ]
    return pd.DataFrame(rows, columns=["Who", "Removed", "Layers", "Times dense", "Calibration", "Held out", "Run"])


def verdict(found: Sequence[Rival], count: int) -> str:
    """Who is ahead among the runs that removed `count` layers, and how surely: a sentence, or ""."""
    level = [r for r in found if len(r.removed) == count]
    best = min(level, key=lambda r: r.times, default=None)
    second = min((r for r in level if best and r.who != best.who), key=lambda r: r.times, default=None)
    if best is None or second is None:
        return ""
    factors = {d: intervals.factor(best.losses[d], second.losses[d]) for d in DOMAINS}
    parts = [f"{f.value:.2f} [{f.low:.2f}, {f.high:.2f}] in the {words.DOMAINS[d]}" for d, f in factors.items()]
    whose = "yours" if second.who == YOU else f"{second.who}'s"
    sure = all(f.high < 1 for f in factors.values())
    doubt = "" if sure else " An interval reaches 1 or beyond, so this is no clear lead."
    return (
        f"**{best.subject} ahead** with {count} layers removed: perplexity {' and '.join(parts)} as a multiple of "
        f"{whose} (95 % intervals over blocks).{doubt}"
    )


def _blocks(state: RunState) -> dict[str, str]:
    return {t.domain: t.fingerprint for t in state.texts if t.role == "measure"}


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700))


def _link(found: Rival) -> str:
    return f"run?run={found.run}"


def _config(run: Run) -> RunConfig | None:
    try:
        return run.config()
    except TrspError:
        return None
