"""All layers, a row each: what a run, ShortGPT and a person make of each. Pure; a frame and a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import altair as alt
import pandas as pd

from trsp_core import formatting
from trsp_core.charts import frames
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import BOXES, Spec, finish, set_apart
from trsp_core.schema.run_state import RunState

FATES = ("kept", "protected", "removed")


def frame(state: RunState, trial_fates: Sequence[str], influence: Mapping[int, float]) -> pd.DataFrame:
    """A row a layer: the run's weight, its block influence where it is known, its size, its fate in this trial,
    one of `FATES`."""
    sizes = state.model.layer_parameters if state.model else []
    weights = (
        frames.stack(state).query("kind == 'bar'")["weight"].tolist() if state.weight_steps else [None] * len(sizes)
    )
    frozen = frames.chosen_at(state)
    rows = [
        (
            i,
            weights[i],
            influence.get(i),
            round(size / 1e6, 2),
            trial_fates[i],
            f"as {choice}" if (choice := frames.choice(state, i)) else "no",
            i in frozen,
        )
        for i, size in enumerate(sizes)
    ]
    return pd.DataFrame(rows, columns=["layer", "weight", "influence", "size", "fate", "chosen", "frozen"]).astype(
        {"weight": float, "influence": float}
    )


@lru_cache
def spec(theme: str) -> Spec:
    """Bars for the weights, dots for the influence; a root scale keeps small influences apart."""
    palette = PALETTES[theme]
    fates = alt.Scale(domain=list(FATES), range=[palette.kept, palette.dense, palette.removed])
    colour = alt.Color("fate:N", scale=fates, legend=BOXES)
    tips = [
        alt.Tooltip("layer:O", title="Layer"),
        alt.Tooltip("fate:N", title="In this trial"),
        alt.Tooltip("chosen:N", title="Chosen by the run"),
        alt.Tooltip("weight:Q", title="Weight |s|", format=formatting.D3_WEIGHT),
        alt.Tooltip("influence:Q", title="Block influence", format=formatting.D3_NATS),
        alt.Tooltip("size:Q", title="Million parameters", format=formatting.D3_MILLIONS),
    ]
    scale = alt.Scale(type="sqrt", domain=[0, 1], clamp=True)
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="Layer (0 is next to the input)", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        tooltip=tips,
    )
    bars = base.mark_bar(cornerRadiusEnd=2, opacity=0.55).encode(
        y=alt.Y(
            "weight:Q", scale=scale, title="Weight (bar), influence (dot)", axis=alt.Axis(values=[0, 0.05, 0.2, 0.5, 1])
        ),
        color=colour,
        **set_apart(fates),
    )
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(y=alt.Y("influence:Q", scale=scale), color=colour)
    hover = base.mark_bar(opacity=0).encode(y=alt.datum(1), y2=alt.datum(0))
    return finish(bars, dots, hover, height=230)
