"""Texts token by token, as charts: what each model would have said at every position. Pure; frames and specs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import altair as alt
import pandas as pd

from trsp_core import formatting
from trsp_core.charts.palette import PALETTES, Palette
from trsp_core.charts.specs import Spec, finish
from trsp_core.schema.messages import TextTraced
from trsp_core.workbench.transcript import Comparison

WIDE, NARROW = 110, 44  # characters in a line
LINE = 30  # pixels
FULL = 3.0  # nats of KL at which a token is fully coloured


def frame(comparison: Comparison, text: int, reader: int, width: int) -> pd.DataFrame:
    """The tokens of text number `text` in lines of `width` characters, with what each model makes of them.

    `kl` is the divergence of model `reader` from the first; `m0`, `m1`, `m2` say it in words, a column a model.
    """
    own = comparison.traces[text, text]
    by = {n: comparison.traces.get((text, n)) for n in range(len(comparison.columns))}
    trace_of_reader, parting = by.get(reader), comparison.parting(reader) if reader else None
    rows, x, y = [], 0, 0
    for i, piece in enumerate(own.pieces):
        label = piece.replace("\n", "⏎").replace("\t", "→") or "·"
        bare = label.strip() or "␣"  # a drawing drops spaces at the ends: the text is put behind those in front
        lead = len(label) - len(label.lstrip()) if label.strip() else 0
        if x and x + len(label) > width:
            x, y = 0, y + 1
        kl = trace_of_reader.kl[i] if trace_of_reader and i < len(trace_of_reader.kl) else 0.0
        sayings = [in_words(trace, i) if trace else "" for trace in by.values()]
        end = x + min(len(label), width)
        rows.append((i + 1, label, bare, x, end, x + lead, y, min(kl / FULL, 1.0), kl, i == parting, *sayings))
        x, y = (0, y + 1) if piece.endswith("\n") else (x + len(label), y)
    positions = ["x", "x2", "at", "y"]
    columns = ["token", "piece", "bare", *positions, "strength", "kl", "parting", *(f"m{n}" for n in by)]
    return pd.DataFrame(rows, columns=columns)


def in_words(trace: TextTraced, position: int) -> str:
    """`41 %; likeliest: the 41 %, a 20 %, ...`."""
    pairs = zip(trace.alternatives[position], trace.alternative_probabilities[position], strict=True)
    likeliest = ", ".join(f"{_visible(piece)} {_percent(p)}" for piece, p in pairs)
    return f"{_percent(trace.probabilities[position])}; likeliest: {likeliest}"


def alternatives(comparison: Comparison, text: int, position: int) -> pd.DataFrame:
    """What each model would have said at one position: a row a model."""
    rows = {}
    for n, column in enumerate(comparison.columns):
        trace = comparison.traces.get((text, n))
        if trace and position < len(trace.pieces):
            pairs = zip(trace.alternatives[position], trace.alternative_probabilities[position], strict=True)
            likeliest = [f"{_visible(piece)}  {_percent(p)}" for piece, p in pairs]
            rows[column.label] = [_percent(trace.probabilities[position]), *likeliest]
    names = ["This token", *(f"Likeliest {n}" for n in range(1, 6))]
    width = max((len(row) for row in rows.values()), default=1)
    return pd.DataFrame.from_dict(rows, orient="index", columns=names[:width])


def divergence(comparison: Comparison, text: int) -> pd.DataFrame:
    """KL to the first model along the text, a line a model."""
    rows = [
        (i + 1, kl, comparison.columns[n].label, _visible(comparison.traces[text, n].pieces[i]))
        for n in range(1, len(comparison.columns))
        if (text, n) in comparison.traces
        for i, kl in enumerate(comparison.traces[text, n].kl)
    ]
    return pd.DataFrame(rows, columns=["token", "kl", "model", "piece"])


@lru_cache
def spec(theme: str, labels: tuple[str, ...], width: int) -> Spec:
    """The text as marks: a background whose strength is the divergence, the tokens upon it."""
    palette = PALETTES[theme]
    x = alt.X("x:Q", scale=alt.Scale(domain=[0, width], nice=False), axis=None)
    y = alt.Y("y:O", axis=None, scale=alt.Scale(paddingInner=0.15, paddingOuter=0.1))
    tips = [alt.Tooltip("token:Q", title="Token"), alt.Tooltip("piece:N", title="Text")]
    tips += [alt.Tooltip(f"m{n}:N", title=label) for n, label in enumerate(labels)]
    tips.append(alt.Tooltip("kl:Q", title="KL to the first, nats", format=formatting.D3_NATS))
    base = alt.Chart().encode(x=x, y=y, tooltip=tips)
    back = base.mark_rect(color=palette.removed, cornerRadius=3).encode(
        x2="x2:Q", opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.03, 0.6]), legend=None)
    )
    ring = base.mark_rect(filled=False, stroke=palette.chosen, strokeWidth=3, cornerRadius=3, fillOpacity=0)
    ring = ring.encode(x2="x2:Q").transform_filter("datum.parting")
    size = alt.ExprRef(f"min(20, 1.62 * width / {width})")  # a letter of this font is 0.6 of its size wide
    text = base.mark_text(align="left", font="monospace", fontSize=size, color=palette.ink)
    text = text.encode(x=alt.X("at:Q", scale=alt.Scale(domain=[0, width], nice=False), axis=None), text="bare:N")
    return finish(back, ring, text, height=LINE)


@lru_cache
def divergence_spec(theme: str, labels: tuple[str, ...]) -> Spec:
    """KL along the text."""
    palette = PALETTES[theme]
    scale = alt.Scale(domain=list(labels), range=colours(palette, labels))
    base = alt.Chart().encode(
        x=alt.X("token:Q", title="Token of the text", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("kl:Q", title="KL to the first model (nats)"),
        color=alt.Color("model:N", scale=scale, legend=alt.Legend(orient="top", title=None)),
        tooltip=["token:Q", "piece:N", "model:N", alt.Tooltip("kl:Q", format=formatting.D3_NATS)],
    )
    line = base.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=30, filled=True))
    return finish(line, height=270)


def height(rows: pd.DataFrame) -> int:
    """Pixels of the text chart."""
    return LINE * (int(max(rows["y"], default=0)) + 1)


def colour(palette: Palette, label: str) -> str:
    """Of a column, by what its model is."""
    named = {"Dense": palette.dense, "Deleted at once": palette.removed, "Pruned": palette.pruned}
    named["Before deletion"] = palette.kept
    return named.get(label, palette.pull)


def colours(palette: Palette, labels: Sequence[str]) -> list[str]:
    """Of several columns: a second model of another run gets a colour of its own."""
    shades = [colour(palette, label) for label in labels]
    return [palette.chosen if c in shades[:n] else c for n, c in enumerate(shades)]


def summary(comparison: Comparison, text: int, readers: Sequence[int]) -> str:
    """The divergence in a sentence, for people who do not see the chart."""
    parts = []
    for n in readers:
        trace = comparison.traces.get((text, n))
        if trace and trace.kl:
            parts.append(
                f"{comparison.columns[n].label}: mean {formatting.nats(sum(trace.kl) / len(trace.kl))}, most "
                f"{formatting.nats(max(trace.kl))}"
            )
    return "KL to the first model along the text, in nats. " + "; ".join(parts)


def _percent(p: float) -> str:
    return formatting.percent(p) if p >= 0.001 else "under 0.1 %"


def _visible(piece: str) -> str:
    """A token so that its spaces can be seen."""
    return "“" + piece.replace("\n", "⏎").replace("\t", "→") + "”"
