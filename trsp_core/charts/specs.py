"""The charts of a run as Vega-Lite specs, built once with Altair and cached; the data come from `frames`.

A spec holds no data and nothing that depends on data: a browser that gets the byte-identical spec again swaps the rows
in place, without flicker. Pages show them live, a report holds them as pictures.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import altair as alt

from trsp_core import formatting
from trsp_core.charts.frames import LANGUAGE
from trsp_core.charts.palette import FATES, PALETTES

HEIGHT = 320
_LEGEND = {"orient": "top", "title": None, "labelFontSize": 13}
LINES = alt.Legend(symbolType="stroke", symbolStrokeWidth=4, symbolSize=200, **_LEGEND)
BOXES = alt.Legend(symbolType="square", symbolStrokeWidth=0, symbolSize=140, **_LEGEND)
Spec = dict[str, Any]

# What a chart shows, for those who do not see it. As constant as the spec: the browser takes it for a part of that.
ALT = {
    "weights": "Lines of the layer weights over the steps of stage 1, one a layer; dots where a layer is chosen.",
    "stack": "Bars of the layer weights, one a layer, coloured by fate; of a chosen one when it was chosen, outlined.",
    "scores": "Bars of the method's score of each layer, coloured by fate.",
    "loss-1": "Lines of the two parts of the loss over the steps of stage 1.",
    "loss-2": "Lines of the two parts of the loss over the steps of stage 2.",
    "gaps": "Lines of the relative gap of each chosen layer over the steps of stage 2.",
    "refits": "Bars of each kept layer's distance from the dense model's state, before and after it was solved for.",
    "repair-probes": "Line of the perplexity if the repair stopped here, over its layers, times the dense one.",
    "probes": "Line of the perplexity if deleted now in stage 2, times the dense one, and a level of direct deletion.",
}


@lru_cache
def weights(theme: str) -> Spec:
    """Layer weights over the steps of stage 1."""
    colour = fate_colour(theme, LINES)
    base = alt.Chart().encode(x=_steps("Step of stage 1"), y=alt.Y("weight:Q", title="Layer weight |s|"))
    lines = base.mark_line(strokeWidth=2, interpolate="monotone").encode(
        color=colour,
        detail="layer:N",
        opacity=alt.condition("datum.fate == 'kept'", alt.value(0.55), alt.value(1.0)),
        tooltip=_tips("layer:N", "step:Q", "weight:Q"),
    )
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=colour, tooltip=_tips("layer:N", "step:Q", "weight:Q")
    )
    names = base.mark_text(dy=17, fontSize=13, fontWeight="bold", color=PALETTES[theme].ink).encode(text="layer:N")
    return finish(
        _frame(base),
        lines.transform_filter("datum.kind == 'line'"),
        dots.transform_filter("datum.kind == 'mark'"),
        names.transform_filter("datum.kind == 'mark'"),
        *_turns(theme, "Step of stage 1"),
        height=420,
    )


@lru_cache
def stack(theme: str) -> Spec:
    """The layers as bars, the input at the bottom."""
    y = alt.Y(
        "layer:O",
        sort="descending",
        title="Layer (0 is next to the input)",
        axis=alt.Axis(labelFontSize=11, labelOverlap=True),
    )
    base = alt.Chart().encode(y=y, x=alt.X("weight:Q", title="Layer weight |s|", axis=alt.Axis(tickCount=4)))
    bars = base.mark_bar(cornerRadiusEnd=2, minBandSize=2).encode(
        color=fate_colour(theme, BOXES),
        tooltip=_tips("layer:N", "weight:Q", "fate:N", "label:N"),
        **set_apart(fate_scale(theme)),
    )
    ink = PALETTES[theme].ink
    names = base.mark_text(align="left", dx=5, fontSize=10, fontWeight="bold", color=ink).encode(
        x=alt.datum(0), text="label:N"
    )
    return finish(
        _frame(base),
        bars.transform_filter("datum.kind == 'bar'"),
        names.transform_filter("datum.frozen"),
        _now(base, theme, align="left", dx=6).transform_filter("datum.kind == 'now'"),
        height=420,
    )


@lru_cache
def scores(theme: str) -> Spec:
    """A method's score of each layer; the lowest goes first."""
    base = alt.Chart().encode(x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)))
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        y=alt.Y("score:Q", title="Score"),
        color=fate_colour(theme, BOXES),
        tooltip=_tips("layer:N", "score:Q", "fate:N"),
    )
    return finish(bars, height=420)


@lru_cache
def losses(theme: str, pull: str) -> Spec:
    """The parts of the loss; a symmetric log axis shows a term that starts at nought beside a large one.

    Args:
        pull: what the part beside language modelling is called.
    """
    palette = PALETTES[theme]
    scale = alt.Scale(domain=[LANGUAGE, pull], range=[palette.dense, palette.pull])
    ticks = [0, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 300, 1000, 10000, 100000]
    y = alt.Y(
        "value:Q",
        title="Loss, nats a token",
        scale=alt.Scale(type="symlog"),
        axis=alt.Axis(values=ticks, labelExpr="datum.value"),
    )
    base = alt.Chart().encode(x=_steps("Step"), y=y)
    lines = base.mark_line(strokeWidth=2.5).encode(
        color=alt.Color("part:N", scale=scale, legend=LINES), tooltip=_tips("part:N", "step:Q", "value:Q")
    )
    return finish(_frame(base), lines.transform_filter("datum.kind == 'line'"), *_turns(theme, "Step"))


@lru_cache
def gaps(theme: str) -> Spec:
    """What the chosen layers still do, over the steps of stage 2."""
    y = alt.Y("gap:Q", title="Relative gap")
    base = alt.Chart().encode(x=_steps("Step of stage 2"), y=y)
    lines = base.mark_line(strokeWidth=2).encode(
        color=fate_colour(theme, LINES), detail="layer:N", tooltip=_tips("layer:N", "step:Q", "gap:Q")
    )
    names = base.mark_text(dx=12, fontSize=12, fontWeight="bold", color=PALETTES[theme].ink).encode(text="layer:N")
    return finish(
        _frame(base),
        lines.transform_filter("datum.kind == 'line'"),
        names.transform_filter("datum.kind == 'mark'"),
        *_turns(theme, "Step of stage 2"),
    )


@lru_cache
def refits(theme: str) -> Spec:
    """How far each kept layer's output is from the dense model's state, before and after it was solved for."""
    palette = PALETTES[theme]
    x = alt.X("layer:O", title="Kept layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    base = alt.Chart().encode(x=x, tooltip=_tips("layer:N", "before:Q", "after:Q", "label:N"))
    scale = alt.Scale(domain=["before", "solved for"], range=[palette.removed, palette.pruned])
    legend = alt.Legend(symbolType="square", symbolStrokeWidth=0, symbolSize=140, symbolOpacity=0.8, **_LEGEND)

    def bars(field: str, name: str, opacity: float) -> alt.Chart:
        colour = alt.Color("which:N", scale=scale, legend=legend)
        bar = base.transform_calculate(which=f"'{name}'").mark_bar(cornerRadiusEnd=2, opacity=opacity)
        y = alt.Y(f"{field}:Q", title="Distance from the dense state", axis=alt.Axis(format=formatting.D3_PERCENT))
        return bar.encode(y=y, color=colour)

    return finish(
        _frame(base.encode(y="before:Q")),
        bars("before", "before", 0.5).transform_filter("datum.kind == 'bar'"),
        bars("after", "solved for", 1.0).transform_filter("datum.kind == 'bar'"),
        _now(base.encode(y="before:Q"), theme, angle=270, align="left", dx=6).transform_filter("datum.kind == 'now'"),
    )


@lru_cache
def probes(theme: str) -> Spec:
    """Perplexity if the chosen layers were deleted now, between the dense model and deletion at once."""
    return _between(theme, "Step of stage 2", "deleted now")


@lru_cache
def repair_probes(theme: str) -> Spec:
    """Perplexity if the repair stopped here, between the same levels."""
    return _between(theme, "Layers repaired", "stopped here")


def _between(theme: str, title: str, line: str) -> Spec:
    """The `line` between the two levels, over an axis with this `title`."""
    palette = PALETTES[theme]
    scale = alt.Scale(domain=["dense", "deleted at once", line], range=[palette.dense, palette.removed, palette.pruned])
    y = alt.Y(
        "times:Q",
        title="Perplexity, times dense (lower is better)",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(values=[1, 1.5, 2, 3, 4, 6, 10, 20, 50, 100, 300, 1e3, 1e4, 1e5, 1e6, 1e8], labelOverlap=True),
    )
    base = alt.Chart().encode(x=_steps(title), y=y)
    colour = alt.Color("model:N", scale=scale, legend=LINES)
    curve = base.mark_line(strokeWidth=3, point=alt.OverlayMarkDef(size=70, filled=True)).encode(
        color=colour, tooltip=_tips("step:Q", "times:Q")
    )
    levels = base.mark_line(strokeWidth=2, strokeDash=[6, 4]).encode(color=colour, detail="model:N")
    names = base.mark_text(align="right", dy=-9, fontSize=13, color=palette.ink).encode(text="label:N")
    return finish(
        levels.transform_filter("datum.kind == 'level'"),
        curve.transform_filter("datum.kind == 'line'"),
        names.transform_filter("datum.kind == 'name'"),
        *_turns(theme, "Step of stage 2"),
    )


def fate_colour(theme: str, legend: alt.Legend | None) -> alt.Color:
    """The colour of a layer's fate."""
    return alt.Color("fate:N", scale=fate_scale(theme), legend=legend)


def fate_scale(theme: str) -> alt.Scale:
    palette = PALETTES[theme]
    return alt.Scale(domain=list(FATES), range=[palette.kept, palette.chosen, palette.removed])


def set_apart(scale: alt.Scale) -> dict[str, Any]:
    """Encodings that leave little but the outline of a bar that is `frozen`: the weight of a chosen layer, which stays
    as it was while the others sink on."""
    return {
        "stroke": alt.Stroke("fate:N", scale=scale, legend=None),
        "strokeWidth": alt.condition("datum.frozen", alt.value(1.5), alt.value(0)),
        "fillOpacity": alt.condition("datum.frozen", alt.value(0.25), alt.value(1)),
    }


def _turns(theme: str, title: str) -> list[alt.Chart]:
    """A line at each step after which a knob was turned, and what it was turned to at its top."""
    base = alt.Chart().encode(x=_steps(title), tooltip=_tips("turn:N", "step:Q"))
    rule = base.mark_rule(strokeWidth=1.5, strokeDash=[2, 3], color=PALETTES[theme].ink)
    words = base.mark_text(align="left", baseline="top", dx=5, fontSize=12, color=PALETTES[theme].ink)
    words = words.encode(y=alt.value(2), text="turn:N")
    return [layer.transform_filter("datum.kind == 'turn'") for layer in (rule, words)]


def _steps(title: str) -> alt.X:
    return alt.X(
        "step:Q", title=title, axis=alt.Axis(tickMinStep=1, tickCount=6, grid=False), scale=alt.Scale(nice=False)
    )


def _tips(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f, format=formatting.D3_FIGURE) if f.endswith(":Q") else alt.Tooltip(f) for f in fields]


def _now(base: alt.Chart, theme: str, **how: Any) -> alt.Chart:
    """The mark at the layer that a repair is at."""
    ink = PALETTES[theme].ink
    return base.mark_text(fontSize=13, fontWeight="bold", color=ink, tooltip=None, **how).encode(text="label:N")


def _frame(base: alt.Chart) -> alt.Chart:
    """Invisible points that span the axes."""
    return base.mark_point(opacity=0, tooltip=None).transform_filter("datum.kind == 'frame'")


def finish(*layers: alt.Chart, height: int | alt.Step = HEIGHT) -> Spec:
    """The layers as one spec without data."""
    spec = alt.layer(*layers).properties(height=height).to_dict(validate=False)
    for name in ("$schema", "data", "datasets"):
        spec.pop(name, None)
    for layer in spec["layer"]:
        layer.pop("data", None)
    spec["config"] = {
        "axis": {"labelFontSize": 12, "titleFontSize": 13},
        "view": {"stroke": None},
        "mark": {"aria": False},  # a chart is described as a whole; each of its marks, for a screen reader, is noise
    }
    return spec
