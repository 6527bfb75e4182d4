"""The record of a plan: a row a run, all measured on the same blocks. Gathered from run folders, or read from a file;
both show alike. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import records
from trsp_core.experiments.plans import Ends, Plan
from trsp_core.runs.store import Run
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.run_state import RunState


@dataclass(frozen=True)
class Row:
    """One run's end.

    Attributes:
        name, title: of the variation; "dense" is the model as it came.
        command: repeats the run.
        removed, n_layers: which layers went, of how many.
        parameters: of the model that is left.
        losses: by domain, mean nats a token of each measured block.
        kl: by domain, mean nats a token from the dense model.
        steps, seconds: of stage 2: how many, and the median of one; 0 without training.
        choosing: seconds until the layers were chosen.
        speed: by "prefill" and "decode", tokens a second [median, lowest, highest]; empty where it was not timed.
            `dense_speed` is the dense model's, timed in turn with it.
        narrowed: what became of the layers where they got narrower and none went, in words.
    """

    name: str
    title: str
    command: str
    removed: list[int]
    n_layers: int
    parameters: int
    losses: dict[str, list[float]]
    kl: dict[str, float]
    steps: int = 0
    seconds: float = 0.0
    choosing: float = 0.0
    speed: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    dense_speed: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    narrowed: str = ""


@dataclass(frozen=True)
class Record:
    """Rows that were measured on the same blocks of the same texts; the first is the dense model.

    Attributes:
        protocol: by domain, a sentence: text, blocks, tokens, number format.
        made: day of the newest run.
    """

    plan: str
    title: str
    model: str
    made: str
    protocol: dict[str, str]
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def gather(plan: Plan, ends: Ends) -> Record:
    """The record of the runs that have finished, in the order of the plan.

    Raises:
        TrspError: there is none; or they were not measured on the same blocks.
    """
    order = [v for v in plan.variations if v.name in ends]
    if not order:
        raise TrspError(
            f"No run of the plan {plan.name!r} has finished here.",
            f"Run it: python -m trsp_core compare --plan {plan.name}",
        )
    first_run, first = ends[order[0].name]
    if any(records.fingerprints(ends[v.name][1]) != records.fingerprints(first) for v in order):
        raise TrspError(
            "These runs were not measured on the same blocks.", "Run the plan again, with the same texts and seed."
        )
    rows = [_dense(first), *(_row(v.name, v.title, *ends[v.name]) for v in order)]
    return Record(
        plan=plan.name,
        title=plan.title,
        model=first_run.config().model,
        made=records.day(ends[v.name][0] for v in order),
        protocol=records.protocol(first),
        rows=rows,
    )


def _dense(state: RunState) -> Row:
    model = state.model
    assert model is not None
    losses = records.losses(state, "dense")
    return Row("dense", "Dense, as it came", "", [], model.n_layers, model.parameters, losses, {})


def _row(name: str, title: str, run: Run, state: RunState) -> Row:
    removed = state.removed
    assert removed is not None
    return Row(
        name=name,
        title=title,
        command=run.config().as_command(),
        removed=removed.removed,
        n_layers=len(removed.removed) + len(removed.kept),
        parameters=removed.parameters,
        losses=records.losses(state, "pruned"),
        kl=records.divergence(state),
        steps=len(state.gap_steps),
        seconds=round(state.step_seconds or 0.0, 3),
        choosing=round(state.phase_seconds.get("choose", 0.0), 1),
        speed=_speed(state, "pruned"),
        dense_speed=_speed(state, "dense"),
        narrowed=state.narrowed.sentence if state.narrowed else "",
    )


def _speed(state: RunState, which: str) -> dict[str, list[float]]:
    timed = state.speed.get(which)
    if timed is None:
        return {}
    pairs = {"prefill": (timed.prefill, timed.prefill_range), "decode": (timed.decode, timed.decode_range)}
    return {kind: [round(v, 1) for v in (middle, *ends)] for kind, (middle, ends) in pairs.items()}


def to_json(record: Record) -> str:
    """The record, a line a row."""
    return records.to_json(record, "rows")


def shipped(plan: str) -> Path:
    """Where the record of a built-in plan that ships with the app lies, if there is one."""
    return paths.ASSETS / "evidence" / f"{plan}.json"


def load(path: Path) -> Record:
    """A recorded file.

    Raises:
        TrspError: it cannot be read.
    """
    return records.read(path, "runs", Record, _check)


def _check(record: Record) -> None:
    for row in record.rows:
        _check_row(row)
    if len({tuple(len(row.losses[d]) for d in DOMAINS) for row in record.rows}) != 1:
        raise ValueError("rows that were not measured on the same blocks")


def _check_row(row: Row) -> None:
    """Raise ValueError unless one can reckon with the figures of `row`; a loss may be what is not a number."""
    if not 0 <= len(row.removed) <= row.n_layers or row.parameters < 0 or row.steps < 0:
        raise ValueError("sizes below nothing")
    if not set(DOMAINS) <= set(row.losses):
        raise ValueError("a domain is missing")
    for speed in (row.speed, row.dense_speed):
        if any(len(rates) != 3 or not min(rates) > 0 or math.isnan(sum(rates)) for rates in speed.values()):
            raise ValueError("a speed without its range")
    if math.isnan(row.seconds + row.choosing):
        raise ValueError("a time is missing")
    records.check_losses(row.losses)


def compared(record: Record, one: str, other: str) -> dict[str, Interval] | None:
    """By domain, the perplexity of row `one` as a multiple of row `other`'s; None where a row is missing."""
    a, b = record.row(one), record.row(other)
    if a is None or b is None:
        return None
    return {d: intervals.factor(a.losses[d], b.losses[d]) for d in DOMAINS}


def only_at_home(record: Record, row: Row, other: str) -> bool:
    """Whether `row`'s gain over row `other` holds in the calibration domain alone."""
    base = record.row(other)
    return base is not None and base is not row and intervals.only_at_home(row.losses, base.losses)


def cells(record: Record) -> list[list[str]]:
    """A table for a shell: each row's figures with their intervals."""
    lines = [["", "layers", "calibration domain", "held-out domain", "KL", "removed"]]
    for row in record.rows:
        figures = [records.with_interval(intervals.perplexity(row.losses[d])) for d in DOMAINS]
        kl = " / ".join(formatting.nats(row.kl[d]) for d in DOMAINS if d in row.kl)
        layers = f"{row.n_layers - len(row.removed)} of {row.n_layers}"
        lines.append([row.title, layers, *figures, kl, ",".join(map(str, row.removed)) or row.narrowed or "none"])
    return lines
