"""A run's stack of layers, before and after."""

from __future__ import annotations

from functools import lru_cache

import altair as alt
import pandas as pd

from trsp_core import formatting
from trsp_core.charts.frames import choice, chosen_at, fates, weights_at_choice
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import BOXES, Spec, fate_colour, finish
from trsp_core.schema.run_state import RunState

COLUMNS = ["kind", "x", "x2", "y", "y2", "fate", "label", "path"]


def before_after(state: RunState) -> pd.DataFrame:
    """The stack as it came and as it is left, a box a layer, input at the bottom, lines from old to new numbers."""
    fate, weights = fates(state), weights_at_choice(state)
    rows, new_number, right = [], 0, 1.6 + width_left(state)
    for i, what in enumerate(fate):
        note = choice(state, i)
        if not note and state.weight_steps and weights[i] is not None:
            note = formatting.weight(abs(weights[i]))
        weight = f"  ·  {note}" if note else ""
        rows.append(("box", 0.0, 1.0, i + 0.08, i + 0.92, what, "", i))
        rows.append(("name", 0.5, 0, i + 0.5, 0, what, f"{i}{weight}", i))
        if what == "removed" or (what == "chosen" and not state.removed):
            continue
        rows += [("link", 1.0, 0, i + 0.5, 0, what, "", i), ("link", 1.6, 0, new_number + 0.5, 0, what, "", i)]
        rows.append(("box", 1.6, right, new_number + 0.08, new_number + 0.92, what, "", i))
        rows.append(
            (
                "name",
                (1.6 + right) / 2,
                0,
                new_number + 0.5,
                0,
                what,
                f"{new_number}" if new_number == i else f"{new_number}  (was {i})",
                i,
            )
        )
        new_number += 1
    return pd.DataFrame(rows, columns=COLUMNS)


def caption(state: RunState) -> str:
    """What the numbers on the boxes are."""
    text = "The input is at the bottom."
    if not chosen_at(state):
        return text
    return (
        f"{text} Each round takes the least weight of those left: a chosen layer has its number and its weight of that "
        "moment, the others that of the end, after more rounds of sinking."
    )


def width_left(state: RunState) -> float:
    """The share of their parameters that layers which got narrower have left; 1 where none did."""
    if not (state.narrowed and state.removed and state.model):
        return 1.0
    gone = state.removed.parameters_before - state.removed.parameters
    return 1 - gone / sum(state.model.layer_parameters)


@lru_cache(maxsize=64)
def stacks(theme: str, n_layers: int) -> Spec:
    """The spec of the two stacks of a model of `n_layers` layers."""
    palette = PALETTES[theme]
    base = alt.Chart().encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, 2.6], nice=False)),
        y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[0, n_layers], nice=False)),
    )
    inside = "white" if theme == "light" else "#101418"
    marks = {
        "link": base.mark_line(strokeWidth=1.5, color=palette.faint).encode(detail="path:N"),
        "box": base.mark_rect(cornerRadius=3).encode(x2="x2:Q", y2="y2:Q", color=fate_colour(theme, BOXES)),
        "name": base.mark_text(fontSize=12, fontWeight="bold", color=inside).encode(text="label:N"),
    }
    layers = [chart.transform_filter(f"datum.kind == '{kind}'") for kind, chart in marks.items()]
    return finish(*layers, height=max(240, min(22 * n_layers, 1600)))
