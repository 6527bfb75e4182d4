"""Drawings of stacks of layers: the three schematic ones of Home, and a run's stack before and after."""

from __future__ import annotations

from functools import lru_cache

import altair as alt
import pandas as pd

from pages.ui.charts import BOXES, Spec, fate_colour, finish
from pages.ui.theme import PALETTES
from trsp_core.series import chosen_at, fates
from trsp_core.state import RunState

_WEIGHTS = (1.0, 0.92, 0.8, 0.3, 0.75, 0.16, 0.24, 0.85, 0.95, 1.0)  # of the schematic stack; the smallest three go
_CHOSEN = (3, 5, 6)
_MOVES = ((3, 2), (3, 4), (5, 4), (6, 7))
COLUMNS = ["kind", "x", "x2", "y", "y2", "fate", "label", "path"]


def stage(name: str) -> pd.DataFrame:
    """The schematic stack in one of three stages: `find`, `move`, `delete`."""
    rows = []
    for i, weight in enumerate(_WEIGHTS):
        if name == "delete":
            continue
        length = weight if name == "find" else 1.0
        rows.append(("box", 0.0, length, i + 0.1, i + 0.9, "chosen" if i in _CHOSEN else "kept", "", 0))
    if name == "find":
        rows += [("text", _WEIGHTS[i] + 0.05, 0, i + 0.5, 0, "chosen", f"weight {_WEIGHTS[i]:.1f}", 0) for i in _CHOSEN]
    if name == "move":
        for n, (a, b) in enumerate(_MOVES):
            start, end, out = a + 0.5 + 0.2 * (b - a), b + 0.5, 1.08 + 0.05 * (n % 2)
            rows += [
                ("path", x, 0, y, 0, "chosen", "", n) for x, y in ((1.0, start), (out, start), (out, end), (1.04, end))
            ]
            rows.append(("head", 1.03, 0, end, 0, "chosen", "", n))
    if name == "delete":
        kept = [i for i in range(len(_WEIGHTS)) if i not in _CHOSEN]
        rows += [("box", 0.0, 1.0, j + 0.1, j + 0.9, "kept", "", 0) for j in range(len(kept))]
        rows.append(("gone", 0.0, 1.0, len(kept) + 0.1, len(_WEIGHTS) - 0.1, "removed", "", 0))
        rows.append(("text", 0.06, 0, 8.5, 0, "removed", "3 layers fewer", 0))
    return pd.DataFrame(rows, columns=COLUMNS)


@lru_cache
def schematic(theme: str) -> Spec:
    """The spec of all three schematic stacks."""
    return finish(*_boxes(theme, [0, 1.25], [0, 10], None), height=230)


def before_after(state: RunState) -> pd.DataFrame:
    """The stack as it came and as it is left, a box a layer, input at the bottom, lines from old to new places."""
    fate, ends = fates(state), chosen_at(state)
    weights = list(state.weights)
    for layer, n in ends.items():
        weights[layer] = state.weight_steps[n - 1].weights[layer]
    rows, place, right = [], 0, 1.6 + width_left(state)
    for i, what in enumerate(fate):
        weight = f"  ·  {abs(weights[i]):.2f}" if state.weight_steps and weights[i] is not None else ""
        rows.append(("box", 0.0, 1.0, i + 0.08, i + 0.92, what, "", i))
        rows.append(("name", 0.5, 0, i + 0.5, 0, what, f"{i}{weight}", i))
        if what == "removed" or (what == "chosen" and not state.removed):
            continue
        rows += [("link", 1.0, 0, i + 0.5, 0, what, "", i), ("link", 1.6, 0, place + 0.5, 0, what, "", i)]
        rows.append(("box", 1.6, right, place + 0.08, place + 0.92, what, "", i))
        rows.append(
            ("name", (1.6 + right) / 2, 0, place + 0.5, 0, what, f"{place}" if place == i else f"{place}  (was {i})", i)
        )
        place += 1
    return pd.DataFrame(rows, columns=COLUMNS)


def width_left(state: RunState) -> float:
    """The share of their parameters that layers which got narrower have left; 1 where none did."""
    if not (state.narrowed and state.removed and state.model):
        return 1.0
    gone = state.removed.parameters_before - state.removed.parameters
    return 1 - gone / sum(state.model.layer_parameters)


@lru_cache(maxsize=64)
def stacks(theme: str, n_layers: int) -> Spec:
    """The spec of the two stacks of a model of `n_layers` layers."""
    return finish(*_boxes(theme, [0, 2.6], [0, n_layers], BOXES), height=max(240, min(22 * n_layers, 1600)))


def _boxes(theme: str, width: list[float], depth: list[float], legend: alt.Legend | None) -> list[alt.Chart]:
    palette = PALETTES[theme]
    base = alt.Chart().encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=width, nice=False)),
        y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=depth, nice=False)),
    )
    colour = fate_colour(theme, legend)
    inside = "white" if theme == "light" else "#101418"
    drawn = {
        "link": base.mark_line(strokeWidth=1.5, color=palette.faint).encode(detail="path:N"),
        "box": base.mark_rect(cornerRadius=3).encode(x2="x2:Q", y2="y2:Q", color=colour),
        "gone": base.mark_rect(cornerRadius=3, filled=False, strokeDash=[5, 4], strokeWidth=1.5).encode(
            x2="x2:Q", y2="y2:Q", color=colour
        ),
        "path": base.mark_line(strokeWidth=2.5)
        .encode(color=colour, detail="path:N", order="row:Q")
        .transform_window(row="row_number()"),
        "head": base.mark_point(shape="triangle-left", filled=True, size=110, opacity=1).encode(color=colour),
        "text": base.mark_text(align="left", fontSize=17, fontWeight="bold", color=palette.ink).encode(text="label:N"),
        "name": base.mark_text(fontSize=12, fontWeight="bold", color=inside).encode(text="label:N"),
    }
    return [chart.transform_filter(f"datum.kind == '{kind}'") for kind, chart in drawn.items()]
