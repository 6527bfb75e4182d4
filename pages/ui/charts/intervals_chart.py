"""Records of several runs as charts: rows with their intervals, the two domains against each other, speed against its
ceiling. Pure; frames and specs."""

from __future__ import annotations

import math
from functools import lru_cache

import altair as alt
import pandas as pd

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.charts.frames import apart
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import Spec, finish
from trsp_core.evaluation import intervals
from trsp_core.experiments.plan_results import Record, Row
from trsp_core.schema.events import DOMAINS

ROLES = ("dense", "TRSP", "other")
ALT = {
    "ladder": "A dot a model with its 95 % interval: perplexity on the measured blocks.",
    "domains": "A dot a model, with its number in the list above: perplexity in the calibration domain across, in the "
    "held-out domain upwards.",
    "speed": "Bars: how many times as fast as the dense model the pruned one is, with a line at the ceiling.",
}
LOWER = f"Perplexity ({intervals.direction('perplexity')})"
ACROSS, UPWARDS = "Perplexity, calibration domain", "Perplexity, held-out domain"
TIMES = f"Times as fast as the dense model ({intervals.direction('speed')})"
HIGHEST = 1e7  # perplexity drawn at most


def rungs(record: Record, domain: str) -> pd.DataFrame:
    """A row a model: perplexity in one domain with its interval."""
    rows = []
    for n, row in enumerate(record.rows):
        estimate = intervals.perplexity(row.losses[domain])
        value, low, high = (min(v, HIGHEST) for v in (estimate.value, estimate.low, estimate.high))
        rows.append((numbered(record, row), n, role(row), value, low, high, f"{formatting.perplexity(estimate.value)}"))
    return pd.DataFrame(rows, columns=["model", "order", "role", "value", "low", "high", "label"]).round(2)


@lru_cache
def ladder(theme: str) -> Spec:
    """Perplexity of each model, best read from the top down."""
    y = alt.Y(
        "model:N", title=None, sort=alt.EncodingSortField("order"), axis=alt.Axis(labelLimit=260, labelFontSize=13)
    )
    x = alt.X("value:Q", title=LOWER, scale=alt.Scale(type="log", nice=False, padding=34))
    base = alt.Chart().encode(y=y, color=_roles(theme))
    reach = base.mark_rule(strokeWidth=3, opacity=0.6).encode(x=alt.X("low:Q", title=LOWER), x2="high:Q")
    tips = [
        alt.Tooltip("model:N"),
        *(alt.Tooltip(f"{f}:Q", format=formatting.D3_FIGURE) for f in ("value", "low", "high")),
    ]
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(x=x, tooltip=tips)
    names = base.mark_text(dy=-11, fontSize=12).encode(x="value:Q", text="label:N")
    return finish(reach, dots, names, height=alt.Step(38))


def both(record: Record) -> pd.DataFrame:
    """A row a model: perplexity in both domains with their intervals, and where its number stands."""
    rows = []
    for n, row in enumerate(record.rows, 1):
        estimates = [intervals.perplexity(row.losses[d]) for d in DOMAINS]
        figures = [min(v, HIGHEST) for f in estimates for v in (f.value, f.low, f.high)]
        rows.append((f"{n}", numbered(record, row), role(row), *figures))
    names = ["x", "x_low", "x_high", "y", "y_low", "y_high"]
    frame = pd.DataFrame(rows, columns=["number", "model", "role", *names]).sort_values("y", ignore_index=True)
    heights = [math.log10(y) for y in frame["y"]]
    least = 0.05 * max(heights[-1] - heights[0], 0.1)
    frame["label_y"] = [10**height for height in apart(heights, least)]  # numbers stay legible where dots meet
    least, most = frame[["x", "x_low"]].min().min(), frame[["x", "x_high"]].max().max()
    frame["label_x"] = most * (most / least) ** 0.08
    return frame.round(2)


@lru_cache
def domains(theme: str) -> Spec:
    """Calibration domain against held-out domain: a gain in one alone lies off the others' line. The numbers are those
    of the ladder, in a column of their own, each tied to its dot."""
    log = alt.Scale(type="log", nice=False, padding=24)
    axis = alt.Axis(labelFlush=True)
    x = alt.X("x:Q", title=ACROSS, scale=log, axis=axis)
    y = alt.Y("y:Q", title=UPWARDS, scale=log, axis=axis)
    base = alt.Chart().encode(color=_roles(theme))
    across = base.mark_rule(opacity=0.4).encode(x=alt.X("x_low:Q", title=ACROSS, axis=axis), x2="x_high:Q", y="y:Q")
    up = base.mark_rule(opacity=0.4).encode(x="x:Q", y=alt.Y("y_low:Q", title=UPWARDS, axis=axis), y2="y_high:Q")
    tips = [
        alt.Tooltip("model:N"),
        alt.Tooltip("x:Q", format=formatting.D3_FIGURE),
        alt.Tooltip("y:Q", format=formatting.D3_FIGURE),
    ]
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, tooltip=tips)
    label_x, label_y = alt.X("label_x:Q", title=ACROSS, axis=axis), alt.Y("label_y:Q", title=UPWARDS, axis=axis)
    ties = base.mark_rule(strokeDash=[2, 3], opacity=0.7).encode(x=x, x2="label_x:Q", y=y, y2="label_y:Q")
    names = base.mark_text(align="left", dx=5, fontSize=14, fontWeight="bold")
    names = names.encode(x=label_x, y=label_y, text="number:N", tooltip=tips)
    return finish(ties, across, up, dots, names, height=420)


def speeds(record: Record) -> pd.DataFrame:
    """How many times as fast as the dense model, prefill and decode, with the spread of the repeats and the ceiling
    L / (L - K). Of several timed rows the one without training counts: it has the same shapes, and the most repeats.
    One whose layers got narrower has no such ceiling."""
    timed = [row for row in record.rows if row.speed and row.name != "dense" and not row.narrowed]
    row = next((r for r in timed if not r.steps), timed[0] if timed else None)
    rows = []
    for kind, (middle, low, high) in row.speed.items() if row else ():
        assert row is not None
        base = row.dense_speed[kind][0]
        ceiling = row.n_layers / (row.n_layers - len(row.removed))
        what = f"{READS[kind]}, {row.n_layers - len(row.removed)} of {row.n_layers} layers"
        times = middle / base
        label = f"{formatting.ratio(times)} times" + (", in part noise" if times > ceiling else "")
        rows.append((what, times, min(times, ceiling), low / base, high / base, ceiling, label))
    return pd.DataFrame(rows, columns=["what", "times", "possible", "low", "high", "ceiling", "label"]).round(3)


READS = {"prefill": "Reading a prompt", "decode": "Writing"}


@lru_cache
def speed(theme: str) -> Spec:
    """Measured speed against its ceiling; the part of a bar beyond that, which can only be noise, is drawn hollow."""
    palette = PALETTES[theme]
    y = alt.Y("what:N", title=None, sort=None, axis=alt.Axis(labelLimit=260, labelFontSize=13))
    # anchored at its end, the title has room on a phone too
    x = alt.X("possible:Q", title=TIMES, scale=alt.Scale(zero=True), axis=alt.Axis(titleAnchor="end", titleFontSize=12))
    base = alt.Chart().encode(y=y)
    bars = base.mark_bar(color=palette.pruned, opacity=0.85).encode(x=x)
    beyond = base.mark_bar(filled=False, color=palette.pruned, strokeWidth=1.5, strokeDash=[3, 2])
    noise = beyond.encode(x=alt.X("possible:Q", title=TIMES), x2="times:Q")
    reach = base.mark_rule(strokeWidth=2, color=palette.ink).encode(x=alt.X("low:Q", title=TIMES), x2="high:Q")
    top = base.mark_tick(thickness=3, size=34, color=palette.removed).encode(x="ceiling:Q")
    inside = "white" if theme == "light" else "#101418"
    names = base.mark_text(align="left", dx=8, fontSize=14, fontWeight="bold", color=inside).encode(
        x=alt.value(0), text="label:N"
    )
    return finish(bars, noise, reach, top, names, height=alt.Step(44))


def table(record: Record) -> pd.DataFrame:
    """Every figure of every row."""
    rows = []
    for row in record.rows:
        cells = [_figure(intervals.perplexity(row.losses[d])) for d in DOMAINS]
        kl = [row.kl.get(d, math.nan) for d in DOMAINS]
        train = f"{row.steps} × {formatting.seconds(row.seconds)}" if row.steps else "–"
        size = row.parameters / 1e6
        rows.append((numbered(record, row), size, row.narrowed or words.layers(row.removed), *cells, *kl, train))
    columns = ["Model", "Million parameters", "Layers gone", "Perplexity, calibration", "Perplexity, held out"]
    columns += ["KL, calibration", "KL, held out", "Training"]
    return pd.DataFrame(rows, columns=columns).round({"Million parameters": 1, "KL, calibration": 3, "KL, held out": 3})


def numbered(record: Record, row: Row) -> str:
    """A row's title behind its number, by which it is found in every picture."""
    return f"{record.rows.index(row) + 1}  {row.title}"


def role(row: Row) -> str:
    return "dense" if row.name == "dense" else "TRSP" if row.name == "trsp" else "other"


def _figure(estimate: intervals.Interval) -> str:
    return formatting.interval(estimate.value, estimate.low, estimate.high, formatting.perplexity)


def _roles(theme: str) -> alt.Color:
    palette = PALETTES[theme]
    scale = alt.Scale(domain=list(ROLES), range=[palette.dense, palette.pruned, palette.kept])
    return alt.Color("role:N", scale=scale, legend=None)
