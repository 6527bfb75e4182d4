"""What the length of stage 2 does: each arm of a sweep against the control that deletes first, at each number of steps,
as a chart and in sentences made from the figures. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import altair as alt
import pandas as pd

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.charts.frames import apart
from trsp_core.charts.palette import PALETTES
from trsp_core.charts.specs import Spec, finish
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import grid_results
from trsp_core.experiments.grid_results import Point, Sweep
from trsp_core.schema.events import DOMAINS

STEPS = "stage2_steps"
ROLES = ("dense", "deleted at once", "TRSP", "control")
ALT = "Lines of the perplexity against the length of stage 2, one an arm; bars: the paired interval beside the control."
ROOM = 0.62  # of the lines' reach: to the right of them, for their names
ACROSS = {"steps": "Steps of stage 2 (log)", "seconds": "Seconds of stage 2 (log)"}


@dataclass(frozen=True)
class Duel:
    """The best arm of TRSP and the best control after so many steps.

    Attributes:
        differences: by domain, TRSP's perplexity less the control's, in points.
        home: whether TRSP's gain holds in the calibration domain alone.
    """

    steps: int
    trsp: str
    control: str
    differences: dict[str, Interval]
    home: bool


def at(points: list[Point], steps: int) -> list[Point]:
    return [p for p in points if p.at.get(STEPS) == steps]


def is_control(points: list[Point], sweep: Sweep) -> bool:
    """Whether an arm deletes first."""
    return bool(points) and all({**sweep.shared, **p.settings}.get("control") == "delete_first" for p in points)


def arms(sweep: Sweep) -> dict[str, list[Point]]:
    """The arms that were trained for several lengths."""
    trained = {arm: [p for p in sweep.of(arm) if p.steps and STEPS in p.at] for arm in sweep.arms}
    return {arm: points for arm, points in trained.items() if len({p.at[STEPS] for p in points}) > 1}


def both_sides(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Arms of TRSP, and controls."""
    there = arms(sweep)
    controls = [arm for arm, points in there.items() if is_control(points, sweep)]
    return [arm for arm in there if arm not in controls], controls


def duels(sweep: Sweep) -> list[Duel]:
    """At each length the best of TRSP's arms and of the controls, by the held-out domain, shortest first."""
    there, (ours, controls) = arms(sweep), both_sides(sweep)
    results = []
    for steps in sorted({p.at[STEPS] for points in there.values() for p in points}):
        one, other = (_best({arm: at(there[arm], steps) for arm in side}) for side in (ours, controls))
        if not one or not other:
            continue
        pairs = {d: grid_results.paired(at(there[one], steps), at(there[other], steps), d) for d in DOMAINS}
        if all(a for a, _ in pairs.values()):
            home = intervals.only_at_home({d: a for d, (a, _) in pairs.items()}, {d: b for d, (_, b) in pairs.items()})
            differences = {d: intervals.points(*pair) for d, pair in pairs.items()}
            results.append(Duel(steps, sweep.arms[one], sweep.arms[other], differences, home))
    return results


def _best(sides: dict[str, list[Point]]) -> str | None:
    there = {arm: grid_results.perplexity(points, "heldout").value for arm, points in sides.items() if points}
    there = {arm: value for arm, value in there.items() if not math.isnan(value)}
    return min(there, key=lambda arm: there[arm]) if there else None


def sentence(contests: list[Duel], domain: str) -> str:
    """What these figures support in one domain; changes when they do."""
    if not contests:
        return "There is no length at which both TRSP and a control were measured, so nothing can be said of it."
    signs = [duel.differences[domain].sign for duel in contests]
    first = contests[0]
    start = f"After {first.steps} steps {_who(first.differences[domain])}"
    if len(contests) == 1:
        return f"{start} in the {words.DOMAINS[domain]}."
    return f"{start} in the {words.DOMAINS[domain]}; {_ending(signs, [d.steps for d in contests])}."


def _who(difference: Interval) -> str:
    if difference.sign > 0:
        ends = formatting.ends(difference.low, difference.high, formatting.points)
        return f"the control is better by **{formatting.points(difference.value)} points** {ends}"
    if difference.sign < 0:
        ends = formatting.ends(-difference.high, -difference.low, formatting.points)
        return f"TRSP is better by **{formatting.points(-difference.value)} points** {ends}"
    signed = formatting.ends(difference.low, difference.high, formatting.signed_points)
    return f"these blocks do not tell TRSP and the control apart {signed}"


def _ending(signs: list[int], steps: list[int]) -> str:
    wins = [n for n, sign in zip(steps, signs, strict=True) if sign < 0]
    losses = [n for n, sign in zip(steps, signs, strict=True) if sign > 0]
    if len(wins) == len(steps):
        return "TRSP wins at every length that was measured"
    if wins and wins == steps[-len(wins) :]:
        return f"TRSP wins from {wins[0]} steps on"
    if wins:
        return f"TRSP wins after {_listed(wins)} steps alone"
    measured = f"at no length that was measured, {steps[0]} to {steps[-1]} steps, does TRSP win"
    if len(losses) == len(steps):
        return f"it wins at every length that was measured, up to {steps[-1]} steps"
    if losses and losses == steps[: len(losses)]:
        return f"{measured}, and from {steps[len(losses)]} steps on the two cannot be told apart"
    return measured


def _listed(numbers: list[int]) -> str:
    head = ", ".join(map(str, numbers[:-1]))
    return f"{head} and {numbers[-1]}" if head else str(numbers[-1])


def curves(sweep: Sweep, domain: str, by: str) -> pd.DataFrame:
    """A line an arm, level lines of the dense model and of deletion at once, and a name at the end of each. `low`,
    `high` of TRSP's points: the paired interval of the difference from the best control at that length, set upon the
    control's value: a bar that does not reach the control's line is a difference for sure.

    Args:
        by: `steps`, or `seconds` (of all of stage 2, the mean of the seeds).
    """
    there, (ours, controls) = arms(sweep), both_sides(sweep)
    rows: list[tuple] = []
    ends: list[tuple[float, str, str]] = []  # value, role, title of each line at its right end
    for arm, points in there.items():
        role, side = ("control", controls) if arm in controls else ("TRSP", ours)
        for steps in sorted({p.at[STEPS] for p in points}):
            several = at(points, steps)
            value = grid_results.perplexity(several, domain).value
            rival = _best({c: at(there[c], steps) for c in controls})
            low, high = _bar(several, at(there[rival], steps), domain) if role == "TRSP" and rival else (None, None)
            x = steps if by == "steps" else sum(p.seconds for p in several) / len(several)
            rows.append(("line", role, str(side.index(arm) % 4), x, value, low, high, sweep.arms[arm]))
        ends.append((rows[-1][4], role, sweep.arms[arm]))
    first, last = min(r[3] for r in rows), max(r[3] for r in rows)
    for role, level in _levels(sweep, there, domain).items():
        rows += [("level", role, "0", x, level, None, None, role) for x in (first, last)]
        ends.append((level, role, role))
    rows += [("name", role, "0", last, value, None, None, title) for value, role, title in _apart(ends)]
    rows.append(("frame", "dense", "0", last * (last / first) ** ROOM, rows[0][4], None, None, ""))
    columns = ["kind", "role", "order", "x", "value", "low", "high", "title"]
    return pd.DataFrame(rows, columns=columns).astype({"low": float, "high": float}).round(2)


def _bar(ones: list[Point], others: list[Point], domain: str) -> tuple[float | None, float | None]:
    one, other = grid_results.paired(ones, others, domain)
    if not one:
        return None, None
    level, gap = intervals.perplexity(other).value, intervals.points(one, other)
    return level + gap.low, level + gap.high


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Names moved up and down, on the log axis, until they are legible beside each other."""
    ends = sorted((end for end in ends if 0 < end[0] < math.inf), key=lambda end: end[0])
    logs = [math.log(value) for value, *_ in ends]
    spacing = (logs[-1] - logs[0]) / 17 if ends else 0.0
    heights = apart(logs, spacing)
    return [(math.exp(height), role, title) for height, (_, role, title) in zip(heights, ends, strict=True)]


def ticks(frame: pd.DataFrame, by: str) -> tuple[float, ...]:
    """Where the axis has its numbers: the lengths themselves, or round seconds within them."""
    lengths = sorted(set(frame[frame["kind"] == "line"]["x"]))
    if by == "steps":
        return tuple(lengths)
    return tuple(n * 10.0**e for e in range(-1, 7) for n in (1, 2, 5) if lengths[0] <= n * 10.0**e <= lengths[-1])


def _levels(sweep: Sweep, there: dict[str, list[Point]], domain: str) -> dict[str, float]:
    """Perplexity of the dense model, and of the layers deleted at once, on the blocks of the trained points."""
    points = next(iter(there.values()))
    dense = [loss for blocks in {p.blocks[domain] for p in points} for loss in sweep.dense.get(blocks, [])]
    direct = [loss for p in points for loss in p.direct.get(domain, [])]
    levels = {"dense": dense, "deleted at once": direct}
    return {name: intervals.perplexity(losses).value for name, losses in levels.items() if losses}


@lru_cache
def length(theme: str, by: str, numbers: tuple[float, ...]) -> Spec:
    """Perplexity against the length of stage 2; `numbers` stand at the axis."""
    palette = PALETTES[theme]
    log = alt.Scale(type="log", nice=False, padding=18)
    axis = alt.Axis(
        labelFontSize=14,
        titleFontSize=15,
        values=list(numbers),
        format=formatting.D3_AXIS,
        grid=False,
        titleAnchor="start",
    )
    x = alt.X("x:Q", title=ACROSS[by], scale=log, axis=axis)
    side = alt.Axis(labelFontSize=14, titleFontSize=15, tickCount=5, format=formatting.D3_AXIS)
    title = f"Perplexity ({intervals.direction('perplexity')})"
    y = alt.Y("value:Q", title=title, scale=log, axis=side)
    scale = alt.Scale(domain=list(ROLES), range=[palette.dense, palette.removed, palette.pruned, palette.kept])
    dash = alt.Scale(domain=["0", "1", "2", "3"], range=[[1, 0], [8, 4], [2, 3], [10, 3, 2, 3]])
    base = alt.Chart().encode(x=x, color=alt.Color("role:N", scale=scale, legend=None))
    frame = base.mark_point(opacity=0, tooltip=None).encode(y=y)
    levels = base.mark_line(strokeWidth=1.5, strokeDash=[6, 5], opacity=0.8).encode(y=y, detail="title:N")
    lines = base.mark_line(strokeWidth=3).encode(
        y=y, detail="title:N", strokeDash=alt.StrokeDash("order:N", scale=dash, legend=None)
    )
    bars = base.mark_rule(strokeWidth=7, opacity=0.35).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    tips = [
        alt.Tooltip("title:N"),
        *(alt.Tooltip(f"{f}:Q", format=formatting.D3_FIGURE) for f in ("x", "value", "low", "high")),
    ]
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(y=y, tooltip=tips)
    names = base.mark_text(align="left", dx=10, fontSize=13, fontWeight="bold", limit=190).encode(y=y, text="title:N")
    return finish(
        frame.transform_filter("datum.kind == 'frame'"),
        levels.transform_filter("datum.kind == 'level'"),
        bars.transform_filter("datum.kind == 'line' && datum.low != null"),
        lines.transform_filter("datum.kind == 'line'"),
        dots.transform_filter("datum.kind == 'line'"),
        names.transform_filter("datum.kind == 'name'"),
        height=420,
    )


def legend(sweep: Sweep) -> str:
    """How to read the chart."""
    ours, controls = both_sides(sweep)
    text = (
        "Green: TRSP, trained with all its layers, then deleted. Blue: delete, then train. Bars: the 95 % interval of "
        "the difference from the best control at that length, paired block by block (split by split, where there are "
        "several), and set upon the control's value; a bar that does not reach the blue line is a difference for sure."
    )
    if len(ours) > 1 or len(controls) > 1:
        arms_, rivals = _count(len(ours), "arm"), _count(len(controls), "control")
        text += (
            f" The sentence sets the best of {arms_} of TRSP against the best of {rivals} at each length, both picked "
            "by the held-out domain itself, which flatters both a little."
        )
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
