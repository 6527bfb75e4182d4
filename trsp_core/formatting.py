"""Numbers and tables as a terminal, a card and a report show them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from trsp_core import escaping


def clock(seconds: float) -> str:
    """`1:32`, or `2:01:32`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None) -> str:
    """Three or four figures of a perplexity or a rate; what has no finite value is said so."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "beyond measure"
    return f"{value:,.1f}" if abs(value) < 10_000 else f"{value:.2e}"


def millions(count: int | None) -> str:
    """A number of parameters: `135 M`."""
    return f"{count / 1e6:,.0f} M" if count and count >= 1e6 else f"{count:,}" if count else ""


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
