"""What a record of runs supports, in sentences made from its figures. Pure; nothing is said that an interval does not
hold up."""

from __future__ import annotations

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import plan_results
from trsp_core.experiments.plan_results import Record, Row
from trsp_core.schema.events import DOMAINS

RIVALS = ("equal_time", "delete_first")  # the first that is there is what stage 2 has to beat


def sentences(record: Record) -> list[str]:
    """Two or three sentences, the most important first."""
    return {"methods": _methods, "transfers": _transfers}.get(record.plan, _ablation)(record)


def _ablation(record: Record) -> list[str]:
    trsp = record.row("trsp")
    rival = next((record.row(name) for name in RIVALS if record.row(name)), None)
    if trsp is None or rival is None:
        return ["This plan has no run of TRSP beside a control, so it supports no claim about stage 2."]
    lines = [f"After {trsp.steps} steps, {against(record, trsp, rival)} {_winner(record, trsp, rival)}"]
    for name, before in (("direct", "Stage 2 against deleting at once"), ("no_penalty", "The penalty itself")):
        other = record.row(name)
        if other:
            lines.append(f"{before}: {against(record, trsp, other)}")
    return lines


def _methods(record: Record) -> list[str]:
    trsp = record.row("trsp")
    rows = [row for row in record.rows if row.name != "dense"]
    if trsp is None or len(rows) < 2:
        return ["This plan has no two methods to compare."]
    lines = []
    for domain in DOMAINS:
        ranked = sorted(rows, key=lambda row: sum(row.losses[domain]))
        best, rank = ranked[0], ranked.index(trsp) + 1
        start = f"In the {words.DOMAINS[domain]}, {words.plain(best.title)} leaves the lowest perplexity"
        if best is trsp:
            second = intervals.factor(trsp.losses[domain], ranked[1].losses[domain])
            lines.append(f"{start}; the next, {words.plain(ranked[1].title)}, {_tie(second)}.")
        else:
            factor = intervals.factor(trsp.losses[domain], best.losses[domain])
            lines.append(f"{start} of {len(rows)}; TRSP comes {_ordinal(rank)}, {change(factor)}.")
    return lines


def _transfers(record: Record) -> list[str]:
    """The pairs that isolate one thing each, as far as they are there."""
    pairs = (
        ("After the same steps", "refit_30", "none_30"),
        ("In the same time", "refit_10", "none_90"),
        ("Nothing trained", "refit", "direct"),
        ("Solving against training", "refit", "none_30"),
        ("Beside the paper's transfer", "refit_30", "penalty_30"),
    )
    rows = [(start, record.row(one), record.row(other)) for start, one, other in pairs]
    lines = [
        f"{start}: “{words.plain(one.title)}” against “{words.plain(other.title)}”, {_changes(record, one, other)}."
        for start, one, other in rows
        if one and other
    ]
    return lines or ["This plan has no two transfers to compare."]


def against(record: Record, one: Row, other: Row) -> str:
    """How the perplexity of row `one` stands beside row `other`'s, in both domains."""
    beside = f"beside “{words.plain(other.title)}”"
    return f"{words.plain(one.title)}'s perplexity is {_changes(record, one, other)}, {beside}."


def _changes(record: Record, one: Row, other: Row) -> str:
    factors = plan_results.compared(record, one.name, other.name) or {}
    return " and ".join(f"{change(factors[d])} in the {words.DOMAINS[d]}" for d in DOMAINS if d in factors)


def _winner(record: Record, one: Row, other: Row) -> str:
    factors = plan_results.compared(record, one.name, other.name) or {}
    signs = [_sign(factors[d]) for d in DOMAINS]
    if all(sign < 0 for sign in signs):
        return "TRSP wins in both domains."
    if all(sign > 0 for sign in signs):
        return "The control wins in both domains: here stage 2 does not earn its name."
    if not any(signs):
        return "These blocks do not tell the two apart."
    if intervals.only_at_home(one.losses, other.losses):
        return "TRSP's gain holds in the calibration domain alone."
    return "Neither wins in both domains."


def change(factor: Interval) -> str:
    """`12 % lower (8 % to 16 %)`, or that the interval holds no difference."""
    ends = sorted(abs(v - 1) for v in (factor.low, factor.high))
    if _sign(factor) == 0:
        return f"not certainly different {formatting.ends(factor.low - 1, factor.high - 1, _signed)}"
    if factor.low > 3:
        return f"**{formatting.count(factor.value)} times as high**"
    word = "lower" if factor.value < 1 else "higher"
    return (
        f"**{formatting.percent(abs(factor.value - 1))} {word}** ({formatting.percent(ends[0])} to "
        f"{formatting.percent(ends[1])})"
    )


def _tie(factor: Interval) -> str:
    return "is not certainly worse" if _sign(factor) == 0 else "is certainly worse"


def _sign(factor: Interval) -> int:
    """Of a factor: below 1, above 1, or neither for sure."""
    return -1 if factor.high < 1 else 1 if factor.low > 1 else 0


def _signed(share: float) -> str:
    return ("−" if share < 0 else "+") + formatting.percent(abs(share))


def _ordinal(rank: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(rank, f"{rank}th")
