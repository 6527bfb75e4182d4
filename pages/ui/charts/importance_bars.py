"""What each layer was worth before stage 2, and after it: a frame and a spec. Pure."""

from __future__ import annotations

from functools import lru_cache

import altair as alt
import pandas as pd

from trsp_core import formatting
from trsp_core.charts.frames import fates
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import BOXES, Spec, finish
from trsp_core.schema.run_state import RunState

BEFORE, AFTER = "dense", "after stage 2"


def frame(state: RunState) -> pd.DataFrame:
    """Two rows a layer."""
    fate = fates(state)
    rows = [
        (i, float("nan") if rise is None else rise, when, fate[i])
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
            alt.Tooltip("rise:Q", title="Rise, nats", format=formatting.D3_NATS),
            "fate:N",
        ],
    )
    return finish(base.mark_bar(), height=300)
