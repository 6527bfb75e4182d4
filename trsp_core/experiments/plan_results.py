"""What several runs say together: one row a run, with its losses on each measured block, so that any two rows can be
compared block by block. Gathered from run folders, or read from a recorded file; both show alike. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import plans
from trsp_core.experiments.plans import Plan
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

SCHEMA = 1
MOST_NATS = 1e6  # a token; more is no loss


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


def gather(plan: str, runs: Iterable[Run], known: Plan | None = None) -> Record:
    """The newest finished run of each variation of the plan called `plan`, in the order of `known`.

    Args:
        known: the plan itself, for titles and order; a built-in one is found by its name.

    Raises:
        TrspError: there is none; or they were not measured on the same blocks.
    """
    found: dict[str, tuple[Run, RunConfig, RunState]] = {}
    for run in runs:
        mine = plans.belongs(run)
        if mine and mine[0] == plan and mine[1] not in found:
            state = run.state()
            if state.ended == "finished":
                found[mine[1]] = (run, run.config(), state)
    if not found:
        raise TrspError(
            f"No run of the plan {plan!r} has finished here.", f"Run it: python -m trsp_core compare --plan {plan}"
        )
    known = known or (plans.read(plan) if plan in plans.built_in() else None)
    titles = {v.name: v.title for v in known.variations} if known else {}
    order = [name for name in titles if name in found] + sorted(set(found) - set(titles))
    first = found[order[0]]
    same = [name for name in order if _fingerprints(found[name][2]) == _fingerprints(first[2])]
    if len(same) < len(order):
        raise TrspError(
            "These runs were not measured on the same blocks.", "Run the plan again, with the same texts and seed."
        )
    rows = [_dense(first[2]), *(_row(name, titles.get(name, name), *found[name][1:]) for name in order)]
    return Record(
        plan=plan,
        title=known.title if known else plan,
        model=first[1].model,
        made=time.strftime("%Y-%m-%d", time.localtime(max(r.folder.stat().st_mtime for r, _, _ in found.values()))),
        protocol=protocol(first[2]),
        rows=rows,
    )


def _dense(state: RunState) -> Row:
    model = state.model
    assert model is not None
    losses = _losses(state, "dense")
    return Row("dense", "Dense, as it came", "", [], model.n_layers, model.parameters, losses, {})


def _row(name: str, title: str, config: RunConfig, state: RunState) -> Row:
    removed = state.removed
    assert removed is not None
    return Row(
        name=name,
        title=title,
        command=config.as_command(),
        removed=removed.removed,
        n_layers=len(removed.removed) + len(removed.kept),
        parameters=removed.parameters,
        losses=_losses(state, "pruned"),
        kl={d: round(v, 4) for d, v in state.divergence.get("pruned", {}).items()},
        steps=len(state.gap_steps),
        seconds=round(state.step_seconds or 0.0, 3),
        choosing=round(state.phase_seconds.get("choose", 0.0), 1),
        speed=_speed(state, "pruned"),
        dense_speed=_speed(state, "dense"),
        narrowed=state.narrowed.sentence if state.narrowed else "",
    )


def _losses(state: RunState, which: str) -> dict[str, list[float]]:
    return {m.domain: [round(v, 5) for v in m.losses] for m in state.measured if m.state == which}


def _speed(state: RunState, which: str) -> dict[str, list[float]]:
    timed = state.speed.get(which)
    if timed is None:
        return {}
    pairs = {"prefill": (timed.prefill, timed.prefill_range), "decode": (timed.decode, timed.decode_range)}
    return {kind: [round(v, 1) for v in (middle, *ends)] for kind, (middle, ends) in pairs.items()}


def _fingerprints(state: RunState) -> dict[str, str]:
    return {t.domain: t.fingerprint for t in state.texts if t.role == "measure"}


def protocol(state: RunState) -> dict[str, str]:
    """By domain, a sentence: text, blocks, tokens, number format."""
    return {
        m.domain: f"{m.text}: {m.blocks} blocks of {m.block_length} tokens ({formatting.count(m.tokens)} predicted), "
        f"{m.dtype}"
        for m in state.measured
        if m.state == "dense"
    }


def to_json(record: Record) -> str:
    return codec.encode_document(record, SCHEMA, indent=1)


def shipped(plan: str) -> Path:
    """Where the record of a built-in plan that ships with the app lies, if there is one."""
    return paths.ASSETS / "evidence" / f"{plan}.json"


def load(path: Path) -> Record:
    """A recorded file.

    Raises:
        TrspError: it cannot be read.
    """
    try:
        record = codec.decode_document(path.read_bytes(), SCHEMA, Record)
        for row in record.rows:
            _check(row)
        if len({tuple(len(row.losses[d]) for d in ev.DOMAINS) for row in record.rows}) != 1:
            raise ValueError("rows that were not measured on the same blocks")
        return record
    except (OSError, ValueError) as error:
        raise TrspError(f"{path.name} is no record of runs.", "Leave it out, or record it again.") from error


def _check(row: Row) -> None:
    """Raise ValueError unless one can reckon with the figures of `row`; a loss may be what is not a number."""
    if not 0 <= len(row.removed) <= row.n_layers or row.parameters < 0 or row.steps < 0:
        raise ValueError("sizes below nothing")
    if not set(ev.DOMAINS) <= set(row.losses):
        raise ValueError("a domain is missing")
    for speed in (row.speed, row.dense_speed):
        if any(len(rates) != 3 or not min(rates) > 0 or math.isnan(sum(rates)) for rates in speed.values()):
            raise ValueError("a speed without its range")
    if math.isnan(row.seconds + row.choosing):
        raise ValueError("a time is missing")
    check_losses(row.losses)


def check_losses(losses: Mapping[str, list[float]]) -> None:
    """Raise ValueError: a domain has none, or they are not in nats a token."""
    if any(not values or any(abs(v) > MOST_NATS for v in values) for values in losses.values()):
        raise ValueError("no losses")


def compared(record: Record, one: str, other: str) -> dict[str, Interval] | None:
    """By domain, the perplexity of row `one` as a multiple of row `other`'s; None where a row is missing."""
    a, b = record.row(one), record.row(other)
    if a is None or b is None:
        return None
    return {d: intervals.factor(a.losses[d], b.losses[d]) for d in ev.DOMAINS}


def only_at_home(record: Record, row: Row, other: str) -> bool:
    """Whether `row`'s gain over row `other` holds in the calibration domain alone."""
    base = record.row(other)
    return base is not None and base is not row and intervals.only_at_home(row.losses, base.losses)


def cells(record: Record) -> list[list[str]]:
    """A table for a shell: each row's figures with their intervals."""
    lines = [["", "layers", "calibration domain", "held-out domain", "KL", "removed"]]
    for row in record.rows:
        figures = [with_interval(intervals.perplexity(row.losses[d])) for d in ev.DOMAINS]
        kl = " / ".join(f"{formatting.nats(row.kl[d])}" for d in ev.DOMAINS if d in row.kl)
        left = f"{row.n_layers - len(row.removed)} of {row.n_layers}"
        lines.append([row.title, left, *figures, kl, ",".join(map(str, row.removed)) or row.narrowed or "none"])
    return lines


def with_interval(interval: Interval) -> str:
    """A perplexity with its interval: `61.2 [58.0, 64.9]`."""
    return formatting.interval(interval.value, interval.low, interval.high, formatting.perplexity)
