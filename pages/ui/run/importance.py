"""Where the knowledge went: what each layer was worth before stage 2, and after it. Frames, a spec, and the words."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

import altair as alt
import pandas as pd
import streamlit as st

from pages.ui.charts import drawing
from pages.ui.charts.drawing import BOXES, Spec, finish
from pages.ui.run import start
from pages.ui.style import theme, words
from pages.ui.style.theme import PALETTES
from trsp_core.charts.frames import fates
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

BEFORE, AFTER = "dense", "after stage 2"


def section(config: RunConfig, state: RunState) -> None:
    """The picture and what it says; or why there is none."""
    before, after = state.importance.get("dense"), state.importance.get("trained")
    if before is None or after is None:
        st.info(_why_not(config, state), icon=":material/info:")
        if config.stage2_steps and not config.importance_blocks and state.ended:
            label = "Run it again, and weigh the layers"
            if st.button(label, icon=":material/replay:", key="run-weighing"):
                start.start(dataclasses.replace(config, importance_blocks=1))
        return
    st.markdown(told(before.rises, after.rises, state.chosen))
    description = f"Rise of the loss without each of {len(before.rises)} layers, before and after stage 2."
    drawing.show(spec(theme.mode()), frame(state), "chart-knowledge", description)
    text = words.plain(words.TEXTS.get(before.text, before.text))
    st.caption(
        f"How much the loss rises when a layer alone is left out, on {before.blocks} measured "
        f"{'block' if before.blocks == 1 else 'blocks'} of the calibration domain ({text}, "
        f"{before.tokens} predicted tokens), all others there. A root axis keeps small rises apart."
    )


def _why_not(config: RunConfig, state: RunState) -> str:
    if config.control == "delete_first":
        return "This run deleted first, with nothing left to weigh before and after. Open one without that control."
    if not config.stage2_steps:
        return (
            "This run had no stage 2, so no knowledge was asked to move. Change its steps of stage 2, and run it again."
        )
    if not config.importance_blocks:
        return "This run did not weigh its layers (“Blocks to weigh each layer on” was 0)."
    if not state.ended:
        return "The layers are weighed again after stage 2; the picture comes then."
    return "This run ended before its layers were weighed a second time. Run it again to see them."


def told(before: Sequence[float], after: Sequence[float], chosen: Sequence[int]) -> str:
    """Whether the chosen layers' importance fell and the others' rose, in numbers."""
    gone = [i for i in chosen if i < len(before)]
    rest = [i for i in range(len(before)) if i not in set(gone)]

    def part(layers: list[int], who: str) -> str:
        layers = [i for i in layers if math.isfinite(_value(before[i])) and math.isfinite(_value(after[i]))]
        if not layers:
            return f"the {who} layers' importance is not a number"
        old, new = (statistics.fmean(_value(v[i]) for i in layers) for v in (before, after))
        way = "fell" if new < old else "rose"
        moved = sum((_value(after[i]) < _value(before[i])) == (new < old) for i in layers)
        change = f"from {old:.3f} to {new:.3f} nats in the mean ({moved} of {len(layers)} {way})"
        return f"the {who} layers' importance **{way}** {change}"

    parts = ([part(gone, "chosen")] if gone else []) + ([part(rest, "other")] if rest else [])
    text = "; ".join(parts) + "."
    return text[:1].upper() + text[1:]


def frame(state: RunState) -> pd.DataFrame:
    """Two rows a layer."""
    fate = fates(state)
    rows = [
        (i, _value(rise), when, fate[i])
        for when, name in ((BEFORE, "dense"), (AFTER, "trained"))
        for i, rise in enumerate(state.importance[name].rises if name in state.importance else [])
    ]
    return pd.DataFrame(rows, columns=["layer", "rise", "when", "fate"])


@lru_cache
def spec(theme_name: str) -> Spec:
    """Two bars a layer, on a root scale that takes negative rises too."""
    palette = PALETTES[theme_name]
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="Layer (0 is next to the input)", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        xOffset=alt.XOffset("when:N", sort=[BEFORE, AFTER]),
        y=alt.Y(
            "rise:Q",
            title="Rise of the loss (nats)",
            scale=alt.Scale(type="pow", exponent=0.5),
            axis=alt.Axis(tickCount=6),
        ),
        color=alt.Color(
            "fate:N",
            scale=alt.Scale(
                domain=["kept", "chosen", "removed"], range=[palette.kept, palette.chosen, palette.removed]
            ),
            legend=BOXES,
        ),
        opacity=alt.Opacity(
            "when:N",
            scale=alt.Scale(domain=[BEFORE, AFTER], range=[0.35, 1.0]),
            legend=alt.Legend(orient="top", title=None, symbolType="square", symbolFillColor=palette.ink),
        ),
        tooltip=[
            alt.Tooltip("layer:O", title="Layer"),
            "when:N",
            alt.Tooltip("rise:Q", title="Rise, nats", format=".3f"),
            "fate:N",
        ],
    )
    return finish(base.mark_bar(), height=300)


def _value(rise: float | None) -> float:
    return float("nan") if rise is None else rise
