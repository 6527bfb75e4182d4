"""The whole idea in one figure: the stack of layers, and beside it what taking some of them out does to the model.

It is drawn on a plane of 100 by 100, the stack on the left and perplexity on the right. The frame holds every position,
so that the spec stays the same from the first event to the last.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import altair as alt
import pandas as pd

from pages.ui.charts.stack_pictures import width_left
from pages.ui.style import words
from trsp_core.charts import frames
from trsp_core.charts.palette import FATES, PALETTES
from trsp_core.charts.specs import Spec, finish
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

ALT = (
    "The stack of layers with a bar for the weight of each, chosen layers crossed out and, in the end, gone; beside it "
    "perplexity in multiples of the dense model's: with the layers deleted at once, and if they were deleted now. In a "
    "repair, the bar of each kept layer is how near it comes to the dense model's state, what it gained in green."
)
COLUMNS = ["kind", "x", "x2", "y", "y2", "fate", "label", "opacity", "path"]
HEADS = ("1  Find", "2  Move", "3  Delete")
LEFT, RIGHT, LOW, HIGH = 2.0, 37.0, 3.0, 82.0  # the stack's edges
FROM, TO, TOP = 48.0, 97.0, 75.0  # the curve's
FADED = 0.5  # how much of a chosen layer's bar is seen: its weight stays as it was, while the others sink on
FLIGHT = 9.0  # how far a layer moves aside as it leaves
HEIGHT = 385  # pixels
REPAIR = 0.6  # where the curve's training begins behind a repair, as a share of its width
MODELS = ("dense", "deleted at once", "deleted now")


def frame(state: RunState, config: RunConfig) -> pd.DataFrame:
    """All marks of the figure, as the run stands."""
    rows = [*_heads(state), *_stack(state), *_curve(state, config)]
    return pd.DataFrame(rows, columns=COLUMNS)


def stage(state: RunState) -> int:
    """1, 2 or 3: what the run is at; 0 before."""
    if state.removed:
        return 3
    if state.gap_steps or state.refits or state.phase in ("repair", "repaired", "transfer", "trained"):
        return 2
    return 1 if state.weight_steps or state.chosen or state.phase == "choose" else 0


def leaving(state: RunState) -> float:
    """How far the deleted layers are on their way out, 0 to 1: as far as the model without them is measured."""
    if not state.removed:
        return 0.0
    if state.ended or state.phase not in ("trained", "pruned"):
        return 1.0
    return min(state.done / state.units, 1.0) if state.phase == "pruned" and state.units else 0.0


def _row(kind: str, x: float, y: float, label: str = "", fate: str = "kept", **more: float) -> tuple:
    values = {"x2": x, "y2": y, "opacity": 1.0, "path": 0} | more
    return (kind, x, values["x2"], y, values["y2"], fate, label, values["opacity"], values["path"])


def _heads(state: RunState) -> list[tuple]:
    now = stage(state)
    rows = [_row("head" if n == now else "other", LEFT + 31 * (n - 1), 96, name) for n, name in enumerate(HEADS, 1)]
    depth = state.model.n_layers if state.model else 0
    heading = ["The model's layers", "A weight for each layer", "What each still does", "What is left"][now]
    if now == 1 and frames.chosen_at(state):
        heading = "Faded: weight when chosen"
    if state.narrowed:
        heading = "Every layer is narrower"
    if state.refits or frames.repairing(state) is not None:
        heading = ["", "", "Green: regained", "Left; green: regained"][now]
    return [*rows, _row("note", LEFT, 87, heading if now or not depth else f"{depth} layers, input at the bottom")]


def _stack(state: RunState) -> list[tuple]:
    fates, departure, rows, new_number = frames.fates(state), leaving(state), [], 0
    out, down = min(2 * departure, 1.0), max(2 * departure - 1, 0.0)  # first the layers leave, then the others close up
    spacing = (HIGH - LOW) / max(len(fates), 1)
    wide = RIGHT - LEFT
    frozen = frames.chosen_at(state) if stage(state) < 2 else {}
    repaired, at_work = {refit.layer: refit for refit in state.refits}, frames.repairing(state)
    for i, (fate, length) in enumerate(zip(fates, _lengths(state), strict=True)):
        gone = fate == "removed"
        low = LOW + spacing * (i if gone else i + (new_number - i) * down)
        new_number += not gone
        aside, opacity = (FLIGHT * out, 1 - out) if gone else (0.0, 1.0)
        y, y2 = low + 0.12 * spacing, low + 0.88 * spacing
        start = LEFT + aside
        rows.append(_row("slot", start, y, x2=start + wide, y2=y2, opacity=0.0 if i in frozen else opacity))
        faded = FADED if i in frozen or (at_work is not None and i in state.repair_layers) else 1.0
        if i in repaired:
            had, has = (wide * _nearness(far) for far in (repaired[i].before, repaired[i].after))
            rows.append(_row("bar", start, y, fate=fate, x2=start + min(had, has), y2=y2))
            rows.append(_row("bar", start + min(had, has), y, fate="deleted now", x2=start + has, y2=y2))
        else:
            rows.append(_row("bar", start, y, fate=fate, x2=start + wide * length, y2=y2, opacity=opacity * faded))
        if i == at_work:
            rows.append(_row("now", start, y, x2=start + wide, y2=y2))
            rows.append(_row("layer", start + wide + 1.8, (y + y2) / 2, f"{i} · {frames.NOW}"))
        if fate == "chosen":
            rows.append(_row("strike", start - 1, (y + y2) / 2, x2=start + wide + 1, opacity=opacity, path=i))
        if fate != "kept":
            label = f"{i} · {words.ordinal(state.chosen.index(i) + 1)}" if i in frozen else str(i)
            rows.append(_row("layer", start + wide + 1.8, (y + y2) / 2, label, opacity=opacity))
    if (count := len(fates) - new_number) and down:
        top = LOW + spacing * new_number
        rows.append(_row("gone", LEFT, top + 0.3 * spacing, fate="removed", x2=RIGHT, y2=HIGH, opacity=down))
        fewer = f"{count} layers fewer" if count > 1 else "1 layer fewer"
        rows.append(_row("fewer", (LEFT + RIGHT) / 2, (top + HIGH) / 2, fewer, opacity=down))
    return rows


def _nearness(distance: float) -> float:
    """The share of the dense model's state that a layer hands on, 0 to 1, from its distance as a share of that."""
    return min(max(1 - distance, 0.0), 1.0) if math.isfinite(distance) else 0.0


def _lengths(state: RunState) -> list[float]:
    """How long each layer's bar is, 0 to 1: its weight in stage 1, of a chosen one when it was chosen; from stage 2
    on all run again, and a chosen one is as long as its gap, beside that at the first step, until it leaves."""
    if state.narrowed:
        return [width_left(state)] * len(frames.fates(state))
    if stage(state) < 2 and state.weight_steps:
        weights = frames.stack(state).query("kind == 'bar'")["weight"]
        return [min(w, 1.0) if math.isfinite(w) else 0.0 for w in weights]
    lengths = [1.0] * len(frames.fates(state))
    if state.gap_steps and not state.removed:
        first, last = state.gap_steps[0].gaps, state.gap_steps[-1].gaps
        for layer, begun, now in zip(state.chosen, first, last, strict=False):
            if begun and math.isfinite(now / begun) and layer < len(lengths):
                lengths[layer] = min(now / begun, 1.0)
    return lengths


def _curve(state: RunState, config: RunConfig) -> list[tuple]:
    """Levels of the dense model and of deletion at once, and the curve of deletion now, on a logarithmic height: in
    multiples of the dense model's perplexity on the same blocks, which are few beside those of the run's figures."""
    blocks, whole = frames.compared(state, config)
    sample = f"{blocks} of {whole}" if blocks < whole else f"all {whole}"
    rows = [
        _row("note", FROM, 87, "Perplexity (lower is better),"),
        _row("note", FROM, 82, f"times dense, on {sample} blocks"),
    ]
    levels, _ = frames.times_dense(state, config)
    direct, pruned = levels.get("direct"), levels.get("pruned")
    if not levels:
        return rows
    now = [(share, value) for share, value in _path(state, config) if math.isfinite(value)]
    if config.repairs and config.stage2_steps:
        rows += [_row("note", FROM, 1, "Repair"), _row("note", FROM + REPAIR * (TO - FROM), 1, "then training")]
    low, high = math.log(0.8), math.log(max([6, 1.2 * (direct or 0), *(1.1 * value for _, value in now)]))

    def height(value: float) -> float:
        return LOW + (TOP - LOW) * (math.log(value) - low) / (high - low)

    named_levels = [("dense", 1.0, "As it came 1 ×")]
    if direct:
        named_levels.append(("deleted at once", direct, f"Deleted at once {words.times(direct)}"))
    for name, value, label in named_levels:
        y = height(value)
        rows += [_row("level", x, y, fate=name) for x in (FROM, TO)]
        rows.append(_row("level-name", FROM, y, label, fate=name))
    for step, label in frames.marks(state, 2) if state.gap_steps else ():
        x = FROM + (TO - FROM) * _trained(step, state, config)
        rows += [_row("turn", x, LOW, x2=x, y2=TOP), _row("turn-name", x, LOW, label)]
    spots = [(FROM + (TO - FROM) * share, height(value)) for share, value in now]
    rows += [_row("curve", x, y, fate="deleted now", path=n) for n, (x, y) in enumerate(spots)]
    if spots:
        x, y = spots[-1]
        when = "Pruned" if pruned else "If stopped here" if config.repairs else "If deleted now"
        label = f"{when} {words.times(now[-1][1])}"
        rows.append(_row("dot", x, y, fate="deleted now"))
        at_end = x > FROM + 0.63 * (TO - FROM)  # on a phone there is no room for it between the two
        rows.append(_row("now-right" if at_end else "now-left", x if at_end else min(x, FROM + 12), y, label))
    return rows


def _path(state: RunState, config: RunConfig) -> list[tuple[float, float]]:
    """How far stage 2 is, 0 to 1, and the perplexity of the model as it would be then, in multiples of the dense one's:
    first over the layers of a repair, then over the steps of training. The last one is of the pruned model."""
    levels, probes = frames.times_dense(state, config)
    _, repair = frames.times_dense_in_repair(state, config)
    layers, end = len(frames.repair_layers(state)) or 1, _trained(0, state, config)
    path = [(end * done / layers, value) for done, value in repair]
    path += [(_trained(step, state, config), value) for step, value in probes if step or not path]
    pruned = levels.get("pruned")
    if pruned is None:
        return path
    return [*(path if config.stage2_steps and not probes else path[:-1]), (1.0, pruned)]


def _trained(step: int, state: RunState, config: RunConfig) -> float:
    """How far a run is, 0 to 1, once it has taken `step` steps of training: what comes before them is a repair."""
    begin = (REPAIR if config.stage2_steps else 1.0) if config.repairs else 0.0
    return begin + (1 - begin) * min(step / frames.expected_steps(state, config, 2), 1.0)


@lru_cache
def spec(theme: str) -> Spec:
    """The figure's spec; nothing in it depends on a run."""
    palette = PALETTES[theme]
    base = alt.Chart().encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, 100], nice=False)),
        y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[0, 100], nice=False)),
        opacity=alt.Opacity("opacity:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0, 1])),
        tooltip=alt.value(None),
    )
    colours = [palette.kept, palette.chosen, palette.removed, palette.dense, palette.removed, palette.pruned]
    colour = alt.Color("fate:N", scale=alt.Scale(domain=[*FATES, *MODELS], range=colours), legend=None)
    marks = {
        "slot": base.mark_rect(cornerRadius=2, color=palette.faint).encode(x2="x2:Q", y2="y2:Q"),
        "gone": base.mark_rect(cornerRadius=4, filled=False, strokeDash=[6, 5], strokeWidth=1.5).encode(
            x2="x2:Q", y2="y2:Q", color=colour
        ),
        "bar": base.mark_rect(cornerRadius=2).encode(x2="x2:Q", y2="y2:Q", color=colour),
        "now": base.mark_rect(cornerRadius=2, filled=False, stroke=palette.ink, strokeWidth=2).encode(
            x2="x2:Q", y2="y2:Q"
        ),
        "strike": base.mark_rule(strokeWidth=2.5, color=palette.ink).encode(x2="x2:Q", detail="path:N"),
        "layer": _text(base, palette.ink, 12, align="left").encode(text="label:N"),
        "fewer": _text(base, palette.ink, 18).encode(text="label:N"),
        "level": base.mark_line(strokeWidth=2.5, strokeDash=[7, 5]).encode(color=colour, detail="fate:N"),
        "level-name": _text(base, palette.ink, 15, align="left", dy=-11).encode(text="label:N"),
        "turn": base.mark_rule(strokeWidth=1.5, strokeDash=[2, 3], color=palette.ink).encode(x2="x2:Q", y2="y2:Q"),
        "turn-name": _text(base, palette.ink, 13, align="left", weight="normal", dx=5, dy=-4).encode(text="label:N"),
        "curve": base.mark_line(strokeWidth=4, interpolate="monotone").encode(color=colour, order="path:Q"),
        "dot": base.mark_point(filled=True, size=190).encode(color=colour),
        "now-left": _text(base, palette.ink, 17, align="left", dy=24).encode(text="label:N"),
        "now-right": _text(base, palette.ink, 17, align="right", dy=24).encode(text="label:N"),
        "head": _text(base, palette.ink, 22, align="left").encode(text="label:N"),
        "other": _text(base, palette.dense, 22, align="left", weight="normal").encode(text="label:N"),
        "note": _text(base, palette.dense, 13, align="left", weight="normal").encode(text="label:N"),
    }
    return finish(*[c.transform_filter(f"datum.kind == '{kind}'") for kind, c in marks.items()], height=HEIGHT)


def _text(base: alt.Chart, colour: str, size: int, weight: Literal["bold", "normal"] = "bold", **how) -> alt.Chart:
    return base.mark_text(fontSize=size, fontWeight=weight, color=colour, **how)
