"""Reads a study: the record of a grid with a `seed` axis, every row of it on every split. A seed deals other articles
to calibrate and to measure, and another order, so one value of that axis is one split.

What is said of a row is a mean over splits, with Student's t interval over splits. Two rows are compared within each
split, on the same measured blocks: the interval is that of the mean of the logarithms of those ratios. The blocks of
one split share its calibration texts and its choice of layers, so they are never counted as if they were
independent. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trsp_core import formatting
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import grids
from trsp_core.experiments.grid_results import Point, Sweep
from trsp_core.experiments.grids import Contest
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS

AXIS = "seed"
LEAST_SPLITS = 2
BROKEN = 10.0  # times the dense model's perplexity: a treatment that is above it has broken the model
_DOMAINS = {"calibration": "calibration domain", "heldout": "held-out domain"}
_WAYS = {  # settings by which two rows of the same layers may differ and still be a pair: how the layers' work is moved
    "method", "layers", "transfer", "control", "ridge", "lambda_2", "anneal", "penalty", "penalty_reach",
    "lambda_2_schedule", "output_rate", "cycles",
}  # fmt: skip


@dataclass(frozen=True)
class StudyRow:
    """One treatment on every split: an arm at one value of each axis but the splits'.

    Attributes:
        at: the value on each axis of the arm but `seed`.
        points: by split, that is by seed; `settings`: all those of their runs.
    """

    arm: str
    title: str
    at: Mapping[str, Any]
    points: Mapping[int, Point]
    settings: Mapping[int, Mapping[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the other rows."""
        return self.arm, *sorted(self.at.items())

    @property
    def deletes_first(self) -> bool:
        """Whether its layers are deleted, and nothing is moved before that: a control."""
        return all(v["control"] == "delete_first" or v["transfer"] == "none" for v in self.settings.values())

    @property
    def chooses(self) -> bool:
        """Whether its runs choose their layers, and do not take over those of others."""
        return all(v["method"] != "manual" for v in self.settings.values()) and all(
            p.removed for p in self.points.values()
        )

    @property
    def ratio(self) -> float | None:
        """Of layers that go; None where the grid has no axis for it."""
        return next(iter(self.settings.values()))["ratio"] if "ratio" in self.at else None

    @property
    def steps(self) -> int:
        """Of stage 2; the least of the splits."""
        return min(p.steps for p in self.points.values())

    @property
    def seconds(self) -> float:
        """Of the repair and of stage 2: the median of the splits."""
        return statistics.median(p.repairing + p.seconds for p in self.points.values())

    @property
    def kl(self) -> dict[str, float]:
        """By domain, nats a token from the dense model: the mean of the splits. A domain that one lacks is left out."""
        points = self.points.values()
        return {d: statistics.fmean(p.kl[d] for p in points) for d in DOMAINS if all(d in p.kl for p in points)}

    @property
    def choosing(self) -> float:
        """Seconds of the choice: the median of the splits."""
        return statistics.median(p.choosing for p in self.points.values())


@dataclass(frozen=True)
class SplitFigure:
    """A perplexity, or a ratio of two.

    Attributes:
        by_split: the figure of each split.
        interval: their geometric mean, with the t interval over splits; without ends where there is one split alone.
    """

    by_split: Mapping[int, float]
    interval: Interval

    @property
    def sign(self) -> int:
        """Of a ratio: -1 if the interval lies below 1, 1 if above, else 0."""
        return -1 if self.interval.high < 1 else 1 if self.interval.low > 1 else 0


@dataclass(frozen=True)
class RowPair:
    """Two rows to be set beside each other. For `equal` see `grids.Contest`; "" where nothing is said to be."""

    row: StudyRow
    other: StudyRow
    equal: str


@dataclass(frozen=True)
class ChoiceSpread:
    """How far a choice of layers depends on the split.

    Attributes:
        counts: of each of the L layers, on how many splits it goes.
        agreement: mean over pairs of splits of |A and B| / |A or B| (Jaccard), 0 to 1; not-a-number for one split.
        rounds: those of stage 1 whose noise is known; `close`: how many of them were decided by a margin within it.
    """

    row: StudyRow
    counts: list[int]
    agreement: float
    rounds: int
    close: int


@dataclass(frozen=True)
class SplitStudy:
    """A sweep by its rows, in the order of the grid: arms, and of each arm its values on the other axes."""

    sweep: Sweep
    rows: list[StudyRow]

    @property
    def splits(self) -> list[int]:
        """The seeds that anything was measured with."""
        return sorted({seed for row in self.rows for seed in row.points})

    @property
    def depth(self) -> int:
        """L, the number of layers; in an older record as many as its points show."""
        lengths = [max([len(p.weights), *(i + 1 for i in p.removed)]) for p in self.sweep.points]
        return self.sweep.n_layers or max(lengths, default=0)

    @cached_property
    def pairs(self) -> list[RowPair]:
        """Rows that isolate one thing: those that the grid sets beside each other, and each transfer beside the control
        that deletes the same layers and trains for as many steps."""
        pairs = []
        for row in self.rows:
            contests = [c for c in self.sweep.contests if c.arm == row.arm]
            pairs += [RowPair(row, other, c.equal) for c in contests for other in self.rows if _meets(c, row, other)]
            if not any(contest.equal == "steps" for contest in contests):
                pairs += [RowPair(row, other, "steps") for other in self.rows if _is_control(row, other)][:1]
        return pairs

    @property
    def reference(self) -> StudyRow | None:
        """The row that all others are set beside where there are no pairs: the first one."""
        return None if self.pairs or len(self.rows) < 2 else self.rows[0]

    @property
    def contests(self) -> list[RowPair]:
        """The pairs, or each row beside the reference."""
        first = self.reference
        others = [row for row in self.rows[1:] if first and row.at == first.at]
        return [RowPair(row, first, "") for row in others] if first else self.pairs

    @property
    def of_choices(self) -> bool:
        """Whether its rows differ in how layers are chosen."""
        return self.reference is not None and sum(row.chooses for row in self.rows) > 1

    @cached_property
    def spreads(self) -> list[ChoiceSpread]:
        """Of each row that chooses its layers, how far the choice depends on the split."""
        return [_spread(row, self.depth) for row in self.rows if row.chooses]


def read(sweep: Sweep) -> SplitStudy | None:
    """The study that a record holds; None where nothing was measured on several splits."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in sweep.points:
        if AXIS in point.at:
            coordinates = tuple(sorted((k, v) for k, v in point.at.items() if k != AXIS))
            groups.setdefault((point.arm, *coordinates), []).append(point)
    order = list(sweep.arms)
    rows = []
    for (arm, *coordinates), points in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        title = ", ".join([sweep.arms[arm], *(f"{grids.label(k)} {v}" for k, v in coordinates)])
        settings = {p.seed: RunConfig(**{**sweep.shared, **p.settings}).as_dict() for p in points}
        rows.append(StudyRow(arm, title, dict(coordinates), {p.seed: p for p in points}, settings))
    return SplitStudy(sweep, rows) if any(len(row.points) >= LEAST_SPLITS for row in rows) else None


def _meets(contest: Contest, row: StudyRow, other: StudyRow) -> bool:
    return contest.other == other.arm and other.at.items() <= row.at.items()


def _is_control(row: StudyRow, other: StudyRow) -> bool:
    """Whether the two differ in how the work of the same layers is moved, in the same steps, and `other` moves none."""
    shared = row.points.keys() & other.points.keys()
    if not shared or row.deletes_first or not other.deletes_first:
        return False
    for seed in shared:
        one, rival = row.points[seed], other.points[seed]
        if one.removed != rival.removed or one.steps != rival.steps:
            return False
        if any(row.settings[seed][k] != v for k, v in other.settings[seed].items() if k not in _WAYS):
            return False
    return True


def perplexity(row: StudyRow, domain: str) -> SplitFigure:
    """Of a row, on the blocks of each split."""
    return _figure({seed: statistics.fmean(p.losses[domain]) for seed, p in row.points.items()})


def over_dense(study: SplitStudy, row: StudyRow, domain: str) -> SplitFigure | None:
    """Perplexity as a multiple of the dense model's on the same blocks; None where that was not measured."""
    dense = {seed: study.sweep.dense.get(p.blocks[domain]) for seed, p in row.points.items()}
    logs = {
        seed: statistics.fmean(row.points[seed].losses[domain]) - statistics.fmean(losses)
        for seed, losses in dense.items()
        if losses
    }
    return _figure(logs) if logs else None


def dense_perplexity(study: SplitStudy, domain: str) -> SplitFigure | None:
    """Of the model as it came, on the blocks of each split; None where that was not measured."""
    blocks = {seed: p.blocks[domain] for row in study.rows for seed, p in row.points.items()}
    losses = {seed: study.sweep.dense.get(digest) for seed, digest in blocks.items()}
    logs = {seed: statistics.fmean(values) for seed, values in losses.items() if values}
    return _figure(logs) if logs else None


def ratio(row: StudyRow, other: StudyRow, domain: str) -> SplitFigure | None:
    """Perplexity of `row` as a multiple of `other`'s, paired within each split; None where they share none. A split
    counts where both were measured on the same blocks."""
    logs = {}
    for seed, point in row.points.items():
        rival = other.points.get(seed)
        if rival and rival.blocks[domain] == point.blocks[domain]:
            logs[seed] = statistics.fmean(point.losses[domain]) - statistics.fmean(rival.losses[domain])
    return _figure(logs) if logs else None


def _figure(logs: Mapping[int, float]) -> SplitFigure:
    """Of the logarithm in each split."""
    by_split = {seed: intervals.perplexity([log]).value for seed, log in sorted(logs.items())}
    return SplitFigure(by_split, intervals.perplexity(list(logs.values())))


def _spread(row: StudyRow, depth: int) -> ChoiceSpread:
    choices = [set(p.removed) for p in row.points.values()]
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(choices, 2)]
    rounds = [r for p in row.points.values() for r in p.rounds]
    return ChoiceSpread(
        row=row,
        counts=[sum(layer in choice for choice in choices) for layer in range(depth)],
        agreement=statistics.fmean(overlaps) if overlaps else math.nan,
        rounds=len(rounds),
        close=sum(r.margin <= r.noise for r in rounds),
    )


@dataclass(frozen=True)
class Ranking:
    """What the intervals say of the order of rows in one domain.

    Attributes:
        best: the row of the lowest mean; None where no mean is a number.
        level: rows that cannot be told apart from it. Where there are none, it is first.
        behind: rows that are certainly worse than it.
    """

    best: StudyRow | None
    level: list[StudyRow]
    behind: list[StudyRow]


def ranked(there: Sequence[StudyRow], domain: str) -> Ranking:
    """The order of `there` as far as paired intervals over splits hold it up. To be first a row has to be certainly
    better than each of the others; among equal ones that comes to pass in fewer than 5 % of studies."""
    means = {n: perplexity(row, domain).interval.value for n, row in enumerate(there)}
    finite = {n: mean for n, mean in means.items() if not math.isnan(mean)}
    if not finite:
        return Ranking(None, list(there), [])
    best = there[min(finite, key=finite.__getitem__)]
    level, behind = [], []
    for row in there:
        if row is not best:
            beside = ratio(row, best, domain)
            (behind if beside and beside.sign > 0 else level).append(row)
    return Ranking(best, level, behind)


def by_ratio(study: SplitStudy, arm: str) -> dict[float, StudyRow]:
    """The rows of an arm by the ratio of layers that go, ascending; none where the grid has no axis for it."""
    rows = [(row.ratio, row) for row in study.rows if row.arm == arm]
    return dict(sorted(((r, row) for r, row in rows if r is not None), key=lambda pair: pair[0]))


def breaking_ratio(study: SplitStudy, arm: str, domain: str) -> tuple[float | None, float | None]:
    """The smallest ratio of layers at which a treatment leaves more than `BROKEN` times the dense perplexity: on some
    split, and on every split. None where it does not at any ratio that was measured."""
    some, every = None, None
    for value, row in by_ratio(study, arm).items():
        times = over_dense(study, row, domain)
        broken = [not v <= BROKEN for v in times.by_split.values()] if times else [False]
        some = value if some is None and any(broken) else some
        every = value if every is None and all(broken) else every
    return some, every


def beside(study: SplitStudy) -> dict[str, list[RowPair]]:
    """By the head of a column, which rows are set beside which."""
    heads = {equal: f"beside the control, equal {equal}" for equal in grids.EQUALS}
    if study.reference:
        heads = {"": f"beside {study.reference.title}"}
    columns = {head: [pair for pair in study.contests if pair.equal == equal] for equal, head in heads.items()}
    return {head: chosen for head, chosen in columns.items() if chosen}


def cells(study: SplitStudy) -> list[list[str]]:
    """A table for a shell and for the docs: of each row the mean over splits, and its ratio to what it is beside. Two
    ratios in a cell are of the calibration and of the held-out domain."""
    columns = beside(study)
    clock = "seconds to choose" if study.of_choices else "seconds"
    kl = ["KL, nats a token"] if any(row.kl for row in study.rows) else []
    lines = [["", "splits", *(_DOMAINS[d] for d in DOMAINS), "times dense", *columns, *kl, clock]]
    for row in study.rows:
        figures = [in_words(perplexity(row, d), formatting.perplexity) for d in DOMAINS]
        ratios = [_both([over_dense(study, row, d) for d in DOMAINS])]
        for contests in columns.values():
            other = next((pair.other for pair in contests if pair.row.key == row.key), None)
            ratios.append(_both([ratio(row, other, d) for d in DOMAINS]) if other else "")
        seconds = row.choosing if study.of_choices else row.seconds
        time = formatting.duration(seconds) if seconds else ""
        divergence = [" / ".join(map(formatting.nats, row.kl.values()))] if kl else []
        lines.append([row.title, str(len(row.points)), *figures, *ratios, *divergence, time])
    return lines


def _both(figures: Sequence[SplitFigure | None]) -> str:
    return ", ".join(in_words(figure, formatting.ratio) for figure in figures if figure)


def in_words(figure: SplitFigure, kind: Callable[[float], str]) -> str:
    """A figure with its interval over splits: `0.82 [0.77, 0.88]`; `0.82 (one split)`. For `kind` see `formatting`."""
    interval = figure.interval
    if len(figure.by_split) < LEAST_SPLITS:
        return f"{kind(interval.value)} (one split)"
    return formatting.interval(interval.value, interval.low, interval.high, kind)


def spread_cells(study: SplitStudy) -> list[list[str]]:
    """A table of how far each choice depends on the split."""
    lines = [["", "splits", "agreement", "rounds within the noise", "layers that go on every split", "on some"]]
    for spread in study.spreads:
        splits_ = len(spread.row.points)
        every = [str(layer) for layer, count in enumerate(spread.counts) if count == splits_]
        some = [f"{layer} ({count})" for layer, count in enumerate(spread.counts) if 0 < count < splits_]
        alike = "" if math.isnan(spread.agreement) else formatting.ratio(spread.agreement)
        close = f"{spread.close} of {spread.rounds}" if spread.rounds else ""
        lines.append([spread.row.title, str(splits_), alike, close, ", ".join(every), ", ".join(some)])
    return lines


def ratio_cells(study: SplitStudy) -> list[list[str]]:
    """A table of each treatment's perplexity as a multiple of the dense model's, in the calibration and in the held-out
    domain, by the ratio of layers that go."""
    arms = {arm: by_ratio(study, arm) for arm in study.sweep.arms}
    values = sorted({value for rows in arms.values() for value in rows})
    lines = [
        [
            "",
            *(formatting.setting(value) for value in values),
            f"over {formatting.setting(BROKEN)} times dense, held out",
        ]
    ]
    for arm, rows in arms.items():
        cells = {
            value: " / ".join(formatting.ratio(t.interval.value) for d in DOMAINS if (t := over_dense(study, row, d)))
            for value, row in rows.items()
        }
        if rows:
            lines.append([study.sweep.arms[arm], *(cells.get(v, "") for v in values), breaks(study, arm, "heldout")])
    return lines


def breaks(study: SplitStudy, arm: str, domain: str) -> str:
    """`breaking_ratio` in words: `at 0.4`."""
    some, every = breaking_ratio(study, arm, domain)
    if some is None:
        return "at no ratio measured"
    if some == every:
        return f"at {formatting.setting(some)}"
    return f"at {formatting.setting(some)} on some split, " + (
        "nowhere on all" if every is None else f"at {formatting.setting(every)} on all"
    )
