"""The record of a grid of runs as a map over two settings, and as the path of the layer weights along λ₁: frames and
specifications."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import altair as alt
import pandas as pd

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.charts.frames import apart
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import LINES, Spec, finish
from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results
from trsp_core.experiments.grid_results import Point, Sweep
from trsp_core.experiments.grids import label
from trsp_core.schema import config
from trsp_core.schema.events import DOMAINS

ALT = {
    "map": "A map over two settings: each cell says the perplexity, the greener the lower; the best has a frame.",
    "path": "A line a layer: its weight at the end of stage 1 against λ₁, coloured by whether it was chosen.",
}
BESIDE = ("seed", "stage2_steps")  # axes that are no side of a map
PATH_AXIS = "lambda_1"


def sides(sweep: Sweep, arm: str) -> tuple[str, str] | None:
    """The two settings that a map of `arm` can be drawn over: λ₁ and λ₂ where they are there."""
    points = sweep.of(arm)
    varied = [a for a in sweep.axes if a not in BESIDE and len({p.at.get(a) for p in points if a in p.at}) > 1]
    first = [a for a in ("lambda_1", "lambda_2") if a in varied]
    two = [*first, *(a for a in varied if a not in first)][:2]
    return (two[0], two[1]) if len(two) == 2 else None


def mappable(sweep: Sweep) -> dict[str, str]:
    """Arms, name to title, that a map can be drawn of."""
    return {arm: title for arm, title in sweep.arms.items() if sides(sweep, arm)}


def cells(points: list[Point], across: str, up: str, domain: str) -> pd.DataFrame:
    """A row a cell: perplexity over all blocks of its points, which differ in seed alone. `good`: 0 for the highest
    perplexity to 1 for the lowest, on a log scale."""
    groups: dict[tuple[Any, Any], list[Point]] = {}
    for point in points:
        groups.setdefault((point.at[across], point.at[up]), []).append(point)
    rows = []
    for (x, y), several in groups.items():
        value = grid_results.perplexity(several, domain)
        rows.append((x, y, value.value, value.low, value.high))
    frame = pd.DataFrame(rows, columns=["x", "y", "value", "low", "high"])
    logs = [math.log(min(value, 1e9)) for value in frame["value"]]
    numbers = [value for value in logs if not math.isnan(value)]
    top = max(numbers, default=0.0)
    spread = top - min(numbers, default=0.0)
    frame["good"] = [round((top - value) / spread if spread else value * 0 + 1, 4) for value in logs]
    frame["best"] = frame["value"] == frame["value"].min()
    frame["label"] = [formatting.perplexity(v) for v in frame["value"]]
    return frame.round({"value": 2, "low": 2, "high": 2})


@lru_cache
def heat(theme: str, across: str, up: str) -> Spec:
    """Perplexity over two settings."""
    palette = PALETTES[theme]
    axis = alt.Axis(labelAngle=0, labelFontSize=14, titleFontSize=15, grid=False, domain=False, ticks=False)
    x = alt.X("x:O", title=title_of(across), axis=axis)
    y = alt.Y("y:O", title=title_of(up), axis=axis, sort="descending")
    base = alt.Chart().encode(x=x, y=y)
    scale = alt.Scale(domain=[0, 1], range=[palette.faint, palette.pruned], interpolate="rgb")
    tips = [alt.Tooltip(f"{f}:Q", format=formatting.D3_FIGURE) for f in ("value", "low", "high")]
    boxes = base.mark_rect(cornerRadius=3, stroke=None).encode(
        color=alt.Color("good:Q", scale=scale, legend=None), tooltip=tips
    )
    frame = base.mark_rect(fillOpacity=0, stroke=palette.ink, strokeWidth=3, cornerRadius=3).transform_filter(
        "datum.best"
    )
    dark, green = "#14181D", 0.6 if theme == "dark" else 0.45  # letters on a cell, from so much green on
    names = base.mark_text(fontSize=16).encode(
        text="label:N",
        color=alt.condition(f"datum.good > {green}", alt.value(dark), alt.value(palette.ink)),
    )
    bold = base.mark_text(fontSize=16, fontWeight="bold", color=dark).encode(text="label:N")
    return finish(
        boxes, frame, names.transform_filter("!datum.best"), bold.transform_filter("datum.best"), height=alt.Step(54)
    )


def best(frame: pd.DataFrame) -> Mapping[str, Any]:
    """The row of the lowest perplexity."""
    return frame.loc[frame["value"].idxmin()].to_dict()


def path_points(sweep: Sweep) -> list[Point]:
    """Points whose layer weights were learnt under several λ₁ above 0, all else being equal: those of the first such
    arm, at the first value of every other axis."""
    for arm in sweep.arms:
        points = [p for p in sweep.of(arm) if p.weights and p.at.get(PATH_AXIS, 0) > 0]
        if not points:
            continue
        rest = {k: v for k, v in points[0].at.items() if k != PATH_AXIS}
        points = [p for p in points if rest.items() <= p.at.items()]
        if len(points) > 1:
            return sorted(points, key=lambda p: p.at[PATH_AXIS])
    return []


def path(points: list[Point]) -> pd.DataFrame:
    """A line a layer: |s| against λ₁. `fate`: of a line, whether the layer is chosen under most values; of a dot,
    whether it is chosen under this one."""
    depth = len(points[0].weights)
    often = [sum(i in p.removed for p in points) * 2 > len(points) for i in range(depth)]
    rows: list[tuple] = []
    for point in points:
        for i, weight in enumerate(point.weights):
            rows.append(("line", point.at[PATH_AXIS], weight, i, "chosen" if often[i] else "kept"))
            if i in point.removed:
                rows.append(("dot", point.at[PATH_AXIS], weight, i, "chosen"))
    last = points[-1]
    ends = sorted((i for i in range(depth) if often[i] or i in last.removed), key=lambda i: last.weights[i])
    reach = max(max(p.weights) for p in points)
    heights = apart([last.weights[i] for i in ends], 0.05 * reach, floor=0.0)
    for i, height in zip(ends, heights, strict=True):
        rows.append(("name", last.at[PATH_AXIS], height, i, "chosen" if often[i] else "kept"))
    return pd.DataFrame(rows, columns=["kind", "lambda_1", "weight", "layer", "fate"]).round({"weight": 4})


@lru_cache
def paths(theme: str, numbers: tuple[float, ...]) -> Spec:
    """Layer weights against λ₁; `numbers` stand at the axis."""
    palette = PALETTES[theme]
    scale = alt.Scale(domain=["kept", "chosen"], range=[palette.kept, palette.chosen])
    lines_, dots_ = (alt.Color("fate:N", scale=scale, legend=legend) for legend in (LINES, None))
    x = alt.X(
        "lambda_1:Q",
        title=f"{title_of(PATH_AXIS)} (log)",
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(grid=False, values=list(numbers), format=formatting.D3_AXIS, labelFontSize=14, titleFontSize=15),
    )
    axis = alt.Axis(labelFontSize=14, titleFontSize=15)
    base = alt.Chart().encode(x=x, y=alt.Y("weight:Q", title="Layer weight |s|", axis=axis))
    lines = base.mark_line(strokeWidth=2.5).encode(
        color=lines_,
        detail="layer:N",
        opacity=alt.condition("datum.fate == 'kept'", alt.value(0.35), alt.value(1.0)),
        tooltip=["layer:N", alt.Tooltip("lambda_1:Q"), alt.Tooltip("weight:Q", format=formatting.D3_FIGURE)],
    )
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(color=dots_, detail="layer:N")
    names = base.mark_text(dx=14, fontSize=13, fontWeight="bold", color=palette.ink).encode(text="layer:N")
    return finish(
        lines.transform_filter("datum.kind == 'line'"),
        dots.transform_filter("datum.kind == 'dot'"),
        names.transform_filter("datum.kind == 'name'"),
        height=420,
    )


def title_of(knob: str) -> str:
    """What a setting is called on an axis."""
    declaration = config.KNOBS.get(knob)
    return declaration.label if declaration else label(knob)


def direction() -> str:
    return intervals.direction("perplexity")


def caption(sweep: Sweep, arm: str, domain: str, frame: pd.DataFrame) -> str:
    """What the map shows, its best cell, and what the control reaches beside it."""
    across, up = sides(sweep, arm) or ("", "")
    top = best(frame)
    text = (
        f"Perplexity in the {words.DOMAINS[domain]} ({direction()}). Best: {top['label']} at {label(across)} "
        f"{_plain(top['x'])}, {label(up)} {_plain(top['y'])}."
    )
    controls = {
        other: grid_results.perplexity(sweep.of(other), domain)
        for other in sweep.arms
        if other != arm and any("control" in p.settings or "control" in sweep.shared for p in sweep.of(other))
    }
    for other, estimate in controls.items():
        figure = formatting.interval(estimate.value, estimate.low, estimate.high, formatting.perplexity)
        text += f" The control “{words.plain(sweep.arms[other])}”: {figure}."
    return text if controls else f"{text} This sweep has no control beside it."


def _plain(value: Any) -> str:
    return formatting.setting(value) if isinstance(value, float) else str(value)


def table(sweep: Sweep) -> pd.DataFrame:
    """Every figure of every point."""
    rows = []
    for p in sweep.points:
        figures = [formatting.perplexity(grid_results.perplexity([p], d).value) for d in DOMAINS]
        gap = " → ".join(f"{formatting.nats(g)}" for g in p.gap) or None
        kl = [p.kl.get(d) for d in DOMAINS]
        rows.append((p.title, *figures, *kl, p.steps, p.seconds, gap, words.layers(p.removed)))
    columns = ["Point", "Perplexity, calibration", "Perplexity, held out", "KL, calibration", "KL, held out"]
    return pd.DataFrame(rows, columns=[*columns, "Steps", "Seconds", "Gap", "Layers gone"]).round(3)
