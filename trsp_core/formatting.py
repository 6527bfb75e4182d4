"""How a quantity looks to people: one function for each kind, for the shell, tables, cards, reports and pages alike.

Settings are no quantities: they are shown as one types them, `1e-05`, by `setting`. Charts and tables in the browser
format there, by the patterns at the end.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from trsp_core import escaping

NOT_A_NUMBER = "not a number"


def perplexity(value: float | None) -> str:
    """`41.7`, `1,240`, `20,000`, `3.9e+05`; None stands for what is not a number."""
    if value is None or not math.isfinite(value):
        return NOT_A_NUMBER
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def ratio(value: float) -> str:
    """One quantity as a multiple of another: `0.96`, `2.41`, `34.5`, `10,603`."""
    return f"{value:.2f}" if abs(value) < 10 else perplexity(value)


def nats(value: float) -> str:
    """A divergence, a gap or a change of the loss: `1.31`, `0.31`, `0.031`."""
    if not math.isfinite(value):
        return NOT_A_NUMBER
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3f}"


def figure(value: float) -> str:
    """What is of no kind above or below, to three digits: `12.3`, `0.00031`, `3.1e-07`."""
    return f"{value:.3g}"


def points(value: float) -> str:
    """A difference of perplexities: `1.2`."""
    return f"{value:,.1f}"


def signed_points(value: float) -> str:
    """`+1.2`, `−0.4`."""
    return f"{'−' if value < 0 else '+'}{points(abs(value))}"


def weight(value: float) -> str:
    """A layer weight: `0.74`."""
    return f"{value:.2f}" if math.isfinite(value) else NOT_A_NUMBER


def margin(value: float) -> str:
    """A difference of layer weights: `0.012`."""
    return "less than 0.001" if value < 0.001 else f"{value:.3f}"


def percent(share: float) -> str:
    """`18 %` of 0.18, `2.5 %` of 0.025; the space does not break."""
    return f"{_percentage(share)}\u00a0%"


def signed_percent(share: float) -> str:
    """`+18 %`, `−2.5 %`."""
    return f"{'−' if share < 0 else '+'}{percent(abs(share))}"


def _percentage(share: float) -> str:
    digits = 1 if 0 < abs(share) < 0.0995 else 0
    return f"{100 * share:.{digits}f}"


def interval(value: float, low: float, high: float, kind: Callable[[float], str]) -> str:
    """A figure with its 95 % interval: `61.2 [58.0, 64.9]`; `kind` is a function of this module, such as `ratio`."""
    return kind(value) if math.isnan(value) else f"{kind(value)} {ends(low, high, kind)}"


def ends(low: float, high: float, kind: Callable[[float], str]) -> str:
    """The interval alone: `[58.0, 64.9]`. Ends that are no numbers say that there were too few blocks for one."""
    return "[too few blocks]" if math.isnan(low + high) else f"[{kind(low)}, {kind(high)}]"


def status(name: str) -> str:
    """How a run stands, as people are told: what a run folder calls `cancelled` is stopped."""
    return "stopped" if name == "cancelled" else name


def count(value: float) -> str:
    """`20,000`."""
    return f"{value:,.0f}"


def parameters(value: float | None) -> str:
    """`134.5 million`, `1.24 billion`; nothing where it is not known."""
    if value is None:
        return ""
    if value >= 1e9:
        return f"{value / 1e9:.2f} billion"
    return f"{value / 1e6:.1f} million" if value >= 1e6 else count(value)


def size(value: float) -> str:
    """Bytes: `540 MB`, `1.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:,.0f} {unit}"
    return f"{value:.0f} bytes"


def rate(value: float) -> str:
    """Tokens a second, without the unit: `1,160`, `18.5`, `0.42`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A measured time: `0.42 s`, `3.2 s`; from ten seconds on as `duration`."""
    return duration(value) if value >= 10 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def duration(seconds: float) -> str:
    """A time that is awaited, to the second: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    total = max(round(seconds), 0)
    if total < 90:
        return f"{total} s"
    if total < 5400:
        minutes, rest = divmod(5 * round(total / 5), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(total / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def clock(seconds: float) -> str:
    """Time left, in a line that is written over: `1:32`, `2:01:32`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress(share: float) -> str:
    """The same width from the first to the last: ` 42%`."""
    return f"{share:4.0%}"


def setting(value: float) -> str:
    """A setting or a bound, as it may be typed again: `0.05`, `1e-05`, `20000`."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def table(rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """Left-aligned columns; the last one is wrapped to `width`."""
    if not rows:
        return ""
    rows = [[escaping.line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for row in rows:
        head = "".join(cell.ljust(w) + "  " for cell, w in zip(row, widths, strict=False))
        body = textwrap.wrap(row[-1], max(width - indent, 30)) or [""]
        lines += [head + body[0], *(" " * indent + more for more in body[1:])]
    return "\n".join(line.rstrip() for line in lines)


# Patterns of d3, which charts and tables in the browser format with.
D3_FIGURE = ",.4~g"  # perplexity, ratios, counts
D3_AXIS = "~g"
D3_NATS = ".3f"
D3_WEIGHT = ".2f"
D3_MILLIONS = ",.1f"
D3_PERCENT = ".0%"
# And those of C, which controls and tables of Streamlit format with.
C_FIGURE = "%.2f"
C_WHOLE = "%.0f"
C_SETTING = "%.6g"
