"""A study over splits as charts: rows with a dot a split, ratios paired within a split, perplexity against the ratio of
layers that go, and how often each layer goes. Pure; frames and specifications."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import altair as alt
import pandas as pd

from trsp_core import formatting
from trsp_core.charts.frames import apart
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import Spec, finish
from trsp_core.evaluation import intervals
from trsp_core.experiments import studies
from trsp_core.experiments.studies import RowPair, SplitFigure, SplitStudy, StudyRow

ALT = {
    "levels": "Rows of dots, one dot a split and a larger one for their mean with its 95 % interval: perplexity.",
    "pairs": "Rows of dots, one dot a split and a larger one for their mean with its 95 % interval: perplexity as a "
    "multiple of the control's, with a line at 1.",
    "ratios": "Lines of the perplexity as a multiple of the dense model's against the ratio of layers that go, one a "
    "treatment, with a dot a split and a line at ten times.",
    "strip": "A strip of cells for each choice, one a layer: the darker, the more splits the layer goes on.",
}
ROLES = ("dense", "deleted at once", "control", "transfer")
SIDES = ("transfer", "neither", "control")  # which is better for sure; in a study of choices TRSP, or the other method
LOWER = f"Perplexity ({intervals.direction('perplexity')})"
TIMES = "Times the perplexity of the other (below 1 is better)"
HIGHEST = 1e7  # perplexity drawn at most
_COLUMNS = ["kind", "order", "title", "role", "value", "low", "high", "label", "split"]


def role(study: SplitStudy, row: StudyRow) -> str:
    """What a row's colour stands for. In a study of choices TRSP's is set apart from the others'."""
    if study.of_choices:
        method = next(iter(row.settings.values()))["method"]
        return "transfer" if method == "trsp" else "control"
    if not row.deletes_first:
        return "transfer"
    return "control" if row.steps else "deleted at once"


def levels(study: SplitStudy, domain: str) -> pd.DataFrame:
    """Perplexity of the dense model and of each row: a line of the frame for each split (`kind` "split") and one for
    their mean."""
    lines: list[tuple] = []
    dense = studies.dense_perplexity(study, domain)
    if dense:
        lines += _figures(0, "Dense, as it came", "dense", dense, formatting.perplexity)
    for n, row in enumerate(study.rows, 1):
        lines += _figures(n, row.title, role(study, row), studies.perplexity(row, domain), formatting.perplexity)
    return _frame(lines)


def pairs(study: SplitStudy, domain: str) -> pd.DataFrame:
    """Ratios within each split: a line of the frame for each split, and one for their mean."""
    lines: list[tuple] = []
    sides = SIDES[::-1] if study.of_choices else SIDES
    for n, pair in enumerate(study.contests):
        figure = studies.ratio(pair.row, pair.other, domain)
        if figure:
            lines += _figures(n, headline(pair), sides[figure.sign + 1], figure, formatting.ratio)
    return _frame(lines)


def headline(pair: RowPair) -> str:
    """What stands beside what, over a row of the chart; where all stand beside one row, only what."""
    if not pair.equal:
        return pair.row.title
    return f"{pair.row.title} / {pair.other.title}" + (" (equal time)" if pair.equal == "time" else "")


def _figures(order: int, title: str, kind: str, figure: SplitFigure, write: Any) -> list[tuple]:
    value, low, high = (_on_axis(v) for v in (figure.interval.value, figure.interval.low, figure.interval.high))
    mean = ("mean", order, title, kind, value, low, high, studies.in_words(figure, write), "mean of the splits")
    dots = [
        ("split", order, title, kind, _on_axis(v), None, None, "", f"seed {split}")
        for split, v in figure.by_split.items()
    ]
    return [*dots, mean]


def _on_axis(value: float) -> float | None:
    """What a log axis can hold."""
    return None if math.isnan(value) else min(max(value, 1 / HIGHEST), HIGHEST)


def _frame(lines: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(lines, columns=_COLUMNS)
    return frame.astype({"value": float, "low": float, "high": float}).round(4)


@lru_cache
def rows(theme: str, what: str) -> Spec:
    """Rows with a dot a split, the mean and its interval; the first row on top.

    Args:
        what: "levels" or "pairs".
    """
    palette = PALETTES[theme]
    if what == "levels":
        names, colours, title = ROLES, [palette.dense, palette.removed, palette.kept, palette.pruned], LOWER
    else:
        names, colours, title = SIDES, [palette.pruned, palette.dense, palette.kept], TIMES
    scale = alt.Scale(domain=list(names), range=colours)
    y = alt.Y("order:O", title=None, axis=None)
    axis = alt.Axis(format=formatting.D3_AXIS, tickCount=6, labelFontSize=13, titleFontSize=13)
    across = alt.Scale(type="log", nice=False, padding=18)
    base = alt.Chart().encode(y=y, color=alt.Color("role:N", scale=scale, legend=None))
    x = alt.X("value:Q", title=title, scale=across, axis=axis)
    reach = base.mark_rule(strokeWidth=4, opacity=0.5).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    dots = base.mark_point(filled=True, size=36, opacity=0.55).encode(
        x=x, tooltip=["title:N", "split:N", _tip("value")]
    )
    tips = ["title:N", *(_tip(field) for field in ("value", "low", "high"))]
    means = base.mark_point(filled=True, size=120, opacity=1).encode(x=x, tooltip=tips)
    titles = base.mark_text(align="left", dy=-15, fontSize=12.5, color=palette.ink).encode(
        x=alt.value(2), text="title:N", color=alt.value(palette.ink)
    )
    labels = base.mark_text(dy=15, fontSize=12, fontWeight="bold").encode(x=x, text="label:N")
    marks = [
        reach.transform_filter("datum.kind == 'mean' && isValid(datum.low)"),
        dots.transform_filter("datum.kind == 'split'"),
        means.transform_filter("datum.kind == 'mean'"),
        titles.transform_filter("datum.kind == 'mean'"),
        labels.transform_filter("datum.kind == 'mean'"),
    ]
    if what == "pairs":
        level = alt.Chart().mark_rule(strokeWidth=1.5, color=palette.faint).encode(x=alt.datum(1.0))
        marks.insert(0, level)
    return finish(*marks, height=alt.Step(58))


def _tip(field: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", format=formatting.D3_FIGURE)


def ratios(study: SplitStudy, domain: str) -> pd.DataFrame:
    """Perplexity over dense of each treatment at each ratio: a point of its line, a dot for each split, and its name at
    the right end. `order` tells treatments of one colour apart."""
    lines: list[tuple] = []
    ends: list[tuple[float, str, str, float]] = []
    orders: dict[str, int] = {}
    for arm, title in study.sweep.arms.items():
        by_ratio = studies.by_ratio(study, arm)
        if not by_ratio:
            continue
        kind = role(study, next(iter(by_ratio.values())))
        order = orders[kind] = orders.get(kind, -1) + 1
        for value, row in by_ratio.items():
            times = studies.over_dense(study, row, domain)
            level = _on_axis(times.interval.value) if times else None
            if times and level is not None:
                lines += [("split", kind, order, value, _on_axis(v), title) for v in times.by_split.values()]
                lines.append(("line", kind, order, value, level, title))
        if lines:
            ends.append((lines[-1][4], title, kind, lines[-1][3]))
    ends.sort()
    logs = [math.log(end[0]) for end in ends]
    spacing = (max(logs) - min(min(logs), 0.0)) / 15 if logs else 0.0
    for height, (_, title, kind, value) in zip(apart(logs, spacing), ends, strict=True):
        lines.append(("name", kind, 0, value, math.exp(height), title))
    if ends:
        span = max(end[3] for end in ends)
        lines.append(("room", "dense", 0, span * 1.95, math.exp(logs[0]), ""))
    return pd.DataFrame(lines, columns=["kind", "role", "order", "ratio", "times", "title"]).round(4)


@lru_cache
def ratio_lines(theme: str, numbers: tuple[float, ...]) -> Spec:
    """Perplexity over dense against the ratio; `numbers` stand at the axis."""
    palette = PALETTES[theme]
    colours = [palette.dense, palette.removed, palette.kept, palette.pruned]
    scale = alt.Scale(domain=list(ROLES), range=colours)
    dash = alt.Scale(domain=[0, 1, 2, 3], range=[[1, 0], [8, 4], [2, 3], [10, 3, 2, 3]])
    axis = alt.Axis(values=list(numbers), format=formatting.D3_AXIS, grid=False, labelFontSize=14, titleFontSize=14,
                    titleAnchor="start")  # fmt: skip
    x = alt.X(
        "ratio:Q", title="Ratio of layers that go", axis=axis, scale=alt.Scale(nice=False, zero=False, padding=12)
    )
    title = "Times the dense model's perplexity (log)"
    side = alt.Axis(format=formatting.D3_FIGURE, tickCount=6, labelFontSize=13, titleFontSize=13)
    y = alt.Y("times:Q", title=title, axis=side, scale=alt.Scale(type="log", nice=False, padding=12))
    base = alt.Chart().encode(x=x, y=y, color=alt.Color("role:N", scale=scale, legend=None))
    tips = ["title:N", "ratio:Q", _tip("times")]
    lines = base.mark_line(strokeWidth=3).encode(
        detail="title:N", strokeDash=alt.StrokeDash("order:O", scale=dash, legend=None)
    )
    dots = base.mark_point(filled=True, size=40, opacity=0.6).encode(tooltip=tips)
    names = base.mark_text(align="left", dx=8, fontSize=12, fontWeight="bold", limit=170).encode(text="title:N")
    room = base.mark_point(opacity=0, tooltip=None)
    broken = (
        alt.Chart().mark_rule(strokeDash=[5, 4], color=palette.ink, opacity=0.7).encode(y=alt.datum(studies.BROKEN))
    )
    return finish(
        room.transform_filter("datum.kind == 'room'"),
        broken,
        lines.transform_filter("datum.kind == 'line'"),
        dots.transform_filter("datum.kind == 'split'"),
        names.transform_filter("datum.kind == 'name'"),
        height=420,
    )


def strip(study: SplitStudy) -> pd.DataFrame:
    """A row a layer of each choice: on how many splits it goes, and that as a share."""
    lines = [
        (n, spread.row.title, layer, count, len(spread.row.points), count / len(spread.row.points))
        for n, spread in enumerate(study.spreads)
        for layer, count in enumerate(spread.counts)
    ]
    return pd.DataFrame(lines, columns=["order", "title", "layer", "splits", "of", "share"]).round(4)


@lru_cache
def strips(theme: str) -> Spec:
    """How often each layer goes."""
    palette = PALETTES[theme]
    axis = alt.Axis(labelAngle=0, labelOverlap=True, labelFontSize=12, titleFontSize=13)
    x = alt.X("layer:O", title="Layer (0 is next to the input)", axis=axis)
    base = alt.Chart().encode(x=x, y=alt.Y("order:O", title=None, axis=None))
    scale = alt.Scale(domain=[0, 1], range=[palette.faint, palette.chosen], interpolate="rgb")
    cells = base.mark_rect(cornerRadius=2, stroke=None, height=18).encode(
        color=alt.Color("share:Q", scale=scale, legend=None),
        tooltip=["title:N", "layer:O", "splits:Q", "of:Q"],
    )
    names = base.mark_text(align="left", dy=-18, fontSize=12.5, color=palette.ink).encode(
        x=alt.value(2), text="title:N"
    )
    return finish(cells, names.transform_filter("datum.layer == 0"), height=alt.Step(46))


def ticks(study: SplitStudy) -> tuple[float, ...]:
    """The ratios that were measured."""
    return tuple(sorted({row.ratio for row in study.rows if row.ratio is not None}))


def table(cells: list[list[str]]) -> pd.DataFrame:
    """Cells whose first row is their head, as a frame."""
    heads, *lines = cells
    return pd.DataFrame(lines, columns=[head[:1].upper() + head[1:] or "Row" for head in heads])
