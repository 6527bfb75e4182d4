"""Where the knowledge went: what each layer was worth before stage 2, and after it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import streamlit as st

from pages.ui.charts import drawing, importance_bars
from pages.ui.run import start
from pages.ui.run.subjects import Subject
from pages.ui.style import theme, words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState
from trsp_core.workbench import weighing
from trsp_core.workbench.weighing import Weighing, with_importance


def section(subject: Subject) -> None:
    """The picture and what it says; or why there is none."""
    config, state = subject.config, subject.state
    stored = _weighing(subject)
    if stored:
        state = with_importance(state, stored)
    before, after = state.importance.get("dense"), state.importance.get("trained")
    if before is None or after is None:
        st.info(_why_not(config, state), icon=":material/info:")
        if config.stage2_steps and not config.importance_blocks and not config.deletes_first and state.ended:
            label = "Run it again, and weigh the layers"
            if st.button(label, icon=":material/replay:", key="run-weighing"):
                start.start(dataclasses.replace(config, importance_blocks=1))
        return
    st.markdown(sentence(before.rises, after.rises, state.chosen))
    description = f"Rise of the loss without each of {len(before.rises)} layers, before and after stage 2."
    drawing.show(importance_bars.spec(theme.mode()), importance_bars.frame(state), "chart-knowledge", description)
    if stored:
        st.caption(
            "How much the loss rises when a layer alone is left out, all others of its model there: of the dense model "
            "before, of the pruned one after, where the removed layers are gone. The mean of a block of each domain "
            f"({before.tokens} predicted tokens). A root axis keeps small rises apart."
        )
        return
    text = words.plain(words.TEXTS.get(before.text, before.text))
    st.caption(
        f"How much the loss rises when a layer alone is left out, on {before.blocks} measured "
        f"{'block' if before.blocks == 1 else 'blocks'} of the calibration domain ({text}, "
        f"{before.tokens} predicted tokens), all others there. A root axis keeps small rises apart."
    )


def _weighing(subject: Subject) -> Weighing | None:
    """What is stored with the run: for those that ship, and for those whose events do not tell it."""
    if subject.run is None or "trained" in subject.state.importance:
        return None
    try:
        return weighing.read(subject.run, subject.state)
    except TrspError as error:
        st.warning(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/broken_image:")
        return None


def _why_not(config: RunConfig, state: RunState) -> str:
    if config.deletes_first:
        return (
            "This run deleted first, so it did not weigh its layers on the way. The recorded run's are here, and those "
            "of runs with the transfer of the paper."
        )
    if not config.stage2_steps:
        return (
            "This run had no stage 2, so no knowledge was asked to move. Change its steps of stage 2, and run it again."
        )
    if not config.importance_blocks:
        return "This run did not weigh its layers (“Blocks to weigh each layer on” was 0)."
    if not state.ended:
        return "The layers are weighed again after stage 2; the picture comes then."
    return "This run ended before its layers were weighed a second time. Run it again to see them."


def sentence(before: Sequence[float], after: Sequence[float], chosen: Sequence[int]) -> str:
    """Whether the chosen layers' importance fell and the others' rose, in numbers."""
    removed = [i for i in chosen if i < len(before)]
    rest = [i for i in range(len(before)) if i not in set(removed)]

    def part(layers: list[int], who: str) -> str:
        layers = [i for i in layers if math.isfinite(before[i]) and math.isfinite(after[i])]
        if not layers:
            return f"the {who} layers' importance is not a number"
        old, new = (statistics.fmean(v[i] for i in layers) for v in (before, after))
        way = "fell" if new < old else "rose"
        count = sum((after[i] < before[i]) == (new < old) for i in layers)
        change = (
            f"from {formatting.nats(old)} to {formatting.nats(new)} nats in the mean ({count} of {len(layers)} {way})"
        )
        return f"the {who} layers' importance **{way}** {change}"

    gone = bool(removed) and not any(math.isfinite(after[i]) for i in removed)
    parts = [part(removed, "chosen")] if removed and not gone else []
    parts += [part(rest, "kept" if gone else "other")] if rest else []
    text = "; ".join(parts) + "."
    return text[:1].upper() + text[1:]
