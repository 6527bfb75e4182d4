"""What a study over splits supports, in sentences made from its figures. Pure; nothing is ranked that no interval over
splits ranks, and each sentence says of how many splits it speaks."""

from __future__ import annotations

import math

from pages.ui.evidence import sentences
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.experiments import studies
from trsp_core.experiments.studies import ChoiceSpread, RowPair, SplitStudy, StudyRow
from trsp_core.schema.events import DOMAINS

MOST = 6  # sentences of pairs
ALIKE = 1.5  # times: seconds that are further apart are not called about the same


def lines(study: SplitStudy) -> list[str]:
    """The most important first."""
    if any(row.ratio is not None for row in study.rows):
        return _ratios(study)
    return [_ranking(study, domain) for domain in DOMAINS] if study.of_choices else _transfers(study)


def spreads(study: SplitStudy) -> list[str]:
    """How far each choice of layers depends on the split."""
    return [_spread(spread) for spread in study.spreads]


def count(number: int) -> str:
    """`5 splits`, `one split`."""
    return "one split" if number == 1 else f"{number} splits"


def _transfers(study: SplitStudy) -> list[str]:
    """Pairs at equal time first, then those after the most steps."""
    ordered = sorted(study.contests, key=lambda pair: (pair.equal != "time", -pair.row.steps))
    return [_pair(pair) for pair in ordered[:MOST]]


def _pair(pair: RowPair) -> str:
    start = "Nothing trained" if pair.equal else "As measured"
    if pair.equal == "time":
        seconds = pair.row.seconds, pair.other.seconds
        claim = (
            "In about the same time (" if max(seconds) < ALIKE * min(seconds) else "Meant as equal in time (measured: "
        )
        start = f"{claim}{_clock(pair.row)} against {_clock(pair.other)})"
    elif pair.equal and pair.row.steps:
        start = f"After the same {pair.row.steps} steps"
    figures = {d: studies.ratio(pair.row, pair.other, d) for d in DOMAINS}
    ratios = {d: figure for d, figure in figures.items() if figure}
    splits = min((len(figure.by_split) for figure in ratios.values()), default=0)
    rows = f"“{words.plain(pair.row.title)}” against “{words.plain(pair.other.title)}”"
    if splits < studies.LEAST_SPLITS:
        return f"{start}: {rows} {'shares no split' if not splits else 'was measured on one split'}; nothing follows."
    changes = " and ".join(
        f"{sentences.change(figure.interval)} in the {words.DOMAINS[d]}" for d, figure in ratios.items()
    )
    return f"{start}, over {count(splits)}: {rows}, {changes}."


def _clock(row: StudyRow) -> str:
    return formatting.duration(row.seconds)


def _ranking(study: SplitStudy, domain: str) -> str:
    """Who is first, if anybody is."""
    order = studies.ranked(study.rows, domain)
    where = f"Over {count(len(study.splits))}, in the {words.DOMAINS[domain]}"
    if order.best is None:
        return f"{where}: no perplexity is a number."
    best = words.plain(order.best.title)
    mean = formatting.perplexity(studies.perplexity(order.best, domain).interval.value)
    if not order.level:
        return f"{where}, **{best} is first**: its perplexity, {mean}, is certainly lower than each other's."
    behind = f" {_listed(order.behind)} {'is' if len(order.behind) == 1 else 'are'} certainly behind."
    return (
        f"{where}, **nobody is first**: {best} has the lowest mean, {mean}, and {_listed(order.level)} cannot be told "
        f"apart from it.{behind if order.behind else ''}"
    )


def _listed(rows: list[StudyRow]) -> str:
    titles = [words.plain(row.title) for row in rows]
    head = ", ".join(titles[:-1])
    return f"{head} and {titles[-1]}" if head else titles[-1]


def _ratios(study: SplitStudy) -> list[str]:
    """Where each treatment breaks; the held-out domain, which is the harder one, decides."""
    arms = {arm: title for arm, title in study.sweep.arms.items() if studies.by_ratio(study, arm)}
    texts = [f"“{words.plain(title)}” {_breaks(study, arm)}" for arm, title in arms.items()]
    return [
        f"Where each treatment breaks, over {count(len(study.splits))}",
        f"Broken: more than {formatting.setting(studies.BROKEN)} times the dense model's perplexity in the "
        f"{words.DOMAINS['heldout']}, "
        f"by the ratio of layers that go. {'; '.join(texts)}.",
        *_beside_by_ratio(study),
    ]


def _breaks(study: SplitStudy, arm: str) -> str:
    if studies.breaking_ratio(study, arm, "heldout") == (None, None):
        return f"holds up to {formatting.setting(max(studies.by_ratio(study, arm)))}, the largest that was measured"
    return f"breaks {studies.breaks(study, arm, 'heldout')}"


def _beside_by_ratio(study: SplitStudy) -> list[str]:
    """Of each treatment and its control, at which ratios the held-out domain tells them apart for sure."""
    groups: dict[tuple[str, str], list[RowPair]] = {}
    for pair in study.pairs:
        groups.setdefault((pair.row.arm, pair.other.arm), []).append(pair)
    texts = []
    for (arm, other), contests in groups.items():
        signs: dict[int, list[str]] = {-1: [], 0: [], 1: []}
        for pair in contests:
            figure = studies.ratio(pair.row, pair.other, "heldout")
            if figure and pair.row.ratio is not None:
                signs[figure.sign].append(formatting.setting(pair.row.ratio))
        verdicts = [
            f"{verdict} at {', '.join(signs[sign])}"
            for sign, verdict in ((-1, "certainly better"), (1, "certainly worse"), (0, "not told apart"))
            if signs[sign]
        ]
        titles = f"“{words.plain(study.sweep.arms[arm])}” against “{words.plain(study.sweep.arms[other])}”"
        texts.append(f"{titles}, in the {words.DOMAINS['heldout']}: {'; '.join(verdicts)}.")
    return texts


def _spread(spread: ChoiceSpread) -> str:
    splits = len(spread.row.points)
    every = sum(n == splits for n in spread.counts)
    some = sum(n > 0 for n in spread.counts)
    text = f"{words.plain(spread.row.title)}: {every} of the {some} layers that go at all go on each of {count(splits)}"
    if not math.isnan(spread.agreement):
        text += f"; two splits share {formatting.percent(spread.agreement)} of what either removes"
    if spread.rounds:
        text += f"; {spread.close} of {spread.rounds} rounds were decided by a margin within the noise of their steps"
    return f"{text}."
