"""Writes quantities for people: one function for each kind, for the shell, tables, model cards, reports and pages
alike.

Settings are not quantities: `setting` writes them as one types them, `1e-05`. Charts and tables that format in the
browser use the patterns at the end.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from trsp_core import escaping

NOT_A_NUMBER = "not a number"


def perplexity(value: float | None) -> str:
    """A perplexity: `41.7`, `1,240`, `170,000`, `790 million`, to three digits from 10,000 on; "not a number" for None,
    infinity and not-a-number."""
    if value is None or not math.isfinite(value):
        return NOT_A_NUMBER
    if abs(value) < 999.95:
        return f"{value:.1f}"
    rounded = value if abs(value) < 9999.5 else float(f"{value:.2e}")
    if abs(rounded) < 1e6:
        return f"{rounded:,.0f}"
    scales = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))
    scale, name = next((scale, name) for scale, name in scales if abs(rounded) >= scale)
    return f"{rounded / scale:,.3g} {name}" if abs(rounded) < 1e15 else f"10^{math.floor(math.log10(abs(rounded)))}"


def ratio(value: float) -> str:
    """One quantity as a multiple of another: `0.96`, `2.41`, `34.5`, `10,600`."""
    return f"{value:.2f}" if abs(value) < 10 else perplexity(value)


def fine_ratio(value: float) -> str:
    """A multiple that is near to another one: `1.008`."""
    return f"{value:.3f}"


def nats(value: float) -> str:
    """A divergence, a gap or a change of the loss: `1.31`, `0.31`, `0.031`."""
    if not math.isfinite(value):
        return NOT_A_NUMBER
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3f}"


def figure(value: float) -> str:
    """A number for which no other function here is made, to three digits: `12.3`, `0.00031`, `3.1e-07`."""
    return f"{value:.3g}"


def points(value: float) -> str:
    """A difference of perplexities: `1.2`."""
    return f"{value:,.1f}"


def signed_points(value: float) -> str:
    """A difference of perplexities with its sign: `+1.2`, `−0.4`."""
    return f"{'−' if value < 0 else '+'}{points(abs(value))}"


def weight(value: float) -> str:
    """A layer weight: `0.74`."""
    return f"{value:.2f}" if math.isfinite(value) else NOT_A_NUMBER


def margin(value: float) -> str:
    """A difference of layer weights, at least 0: `0.012`, `less than 0.001`."""
    return "less than 0.001" if value < 0.001 else f"{value:.3f}"


def percent(share: float) -> str:
    """A share as a percentage: 0.18 gives `18 %`, 0.025 gives `2.5 %`. No line breaks at the space."""
    return f"{_percentage(share)}\u00a0%"


def signed_percent(share: float) -> str:
    """A share as a percentage with its sign: `+18 %`, `−2.5 %`."""
    return f"{'−' if share < 0 else '+'}{percent(abs(share))}"


def _percentage(share: float) -> str:
    digits = 1 if 0 < abs(share) < 0.0995 else 0
    return f"{100 * share:.{digits}f}"


def interval(value: float, low: float, high: float, kind: Callable[[float], str]) -> str:
    """A figure with its 95 % interval: `61.2 [58.0, 64.9]`.

    Args:
        low, high: the ends; not-a-number where there were too few blocks for an interval.
        kind: writes one number: a function of this module, such as `ratio`.
    """
    return kind(value) if math.isnan(value) else f"{kind(value)} {ends(low, high, kind)}"


def ends(low: float, high: float, kind: Callable[[float], str]) -> str:
    """An interval alone: `[58.0, 64.9]`; `[too few blocks]` where an end is not-a-number. For `kind` see `interval`."""
    return "[too few blocks]" if math.isnan(low + high) else f"[{kind(low)}, {kind(high)}]"


def status(name: str) -> str:
    """A run's status in the words that people read: what a run folder calls `cancelled` is `stopped`."""
    return "stopped" if name == "cancelled" else name


def count(value: float) -> str:
    """A number of things: `20,000`."""
    return f"{value:,.0f}"


def parameters(value: float | None) -> str:
    """A number of parameters: `134.5 million`, `1.24 billion`; "" for None, where it is not known."""
    if value is None:
        return ""
    if value >= 1e9:
        return f"{value / 1e9:.2f} billion"
    return f"{value / 1e6:.1f} million" if value >= 1e6 else count(value)


def size(value: float) -> str:
    """A number of bytes: `540 MB`, `1.2 GB` (1 GB is 10^9 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:,.0f} {unit}"
    return f"{value:.0f} bytes"


def rate(value: float) -> str:
    """Tokens a second, without the unit: `1,160`, `18.5`, `0.42`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A measured time, given in seconds: `0.42 s`, `3.2 s`; from ten seconds on as `duration`."""
    return duration(value) if value >= 10 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def duration(seconds: float) -> str:
    """An expected time, given in seconds: `40 s`, `3 min 20 s` (to five seconds), `2 h 5 min`."""
    total = max(round(seconds), 0)
    if total < 90:
        return f"{total} s"
    if total < 5400:
        minutes, rest = divmod(5 * round(total / 5), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(total / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def clock(seconds: float) -> str:
    """Time left, given in seconds, for a progress line: `1:32`, `2:01:32`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress(share: float) -> str:
    """A share of work that is done, 0 to 1, always four characters wide: ` 42%`."""
    return f"{share:4.0%}"


def setting(value: float) -> str:
    """A setting or a bound, in a form that can be typed in again: `0.05`, `1e-05`, `20000`."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def table(rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """`rows` as text in left-aligned columns, without a head of its own; no line is much wider than `width` characters,
    since the last column is wrapped. Steering characters are spelled out."""
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


# Patterns of d3, by which charts in the browser format.
D3_FIGURE = ",.4~r"  # perplexity, ratios, counts: without exponents
D3_AXIS = ",.4~r"
D3_NATS = ".3f"
D3_WEIGHT = ".2f"
D3_MILLIONS = ",.1f"
D3_PERCENT = ".0%"
# Patterns of C, by which controls and tables of Streamlit format.
C_FIGURE = "%.2f"
C_WHOLE = "%.0f"
C_SETTING = "%.6g"
