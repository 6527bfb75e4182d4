"""What the runs of a grid say together: one point a run, with its losses on each measured block in both domains, small
enough to ship. Points that were measured on the same blocks can be compared block by block. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import plan_results
from trsp_core.experiments.grids import Grid
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

SCHEMA = 1
DIGITS = 4
Losses = dict[str, list[float]]  # by domain, mean nats a token of each measured block


@dataclass(frozen=True)
class Point:
    """One run of a grid.

    Attributes:
        arm, at: where in the grid it stands: the arm, and the value on each axis of the arm.
        settings: what differs from the defaults, less what all points share.
        removed: the layers that went.
        weights: |s| of the L layers: of a chosen one when it was chosen, of the others at the end of stage 1; empty
            where no weights were learnt.
        blocks: by domain, fingerprint of the measured blocks: equal ones can be paired.
        losses, direct: of the pruned model, and of the same layers deleted at once.
        kl: by domain, mean nats a token from the dense model.
        steps, seconds: of stage 2, probes left out.
        gap: sum of the chosen layers' relative gaps at the first and at the last step of stage 2; empty without one.
    """

    name: str
    title: str
    arm: str
    at: dict[str, Any]
    settings: dict[str, Any]
    removed: list[int]
    weights: list[float]
    blocks: dict[str, str]
    losses: dict[str, list[float]]
    direct: dict[str, list[float]]
    kl: dict[str, float]
    seed: int
    steps: int
    seconds: float
    gap: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """The finished points of a grid, in its order.

    Attributes:
        planned: how many points the grid has.
        shared: what all points have that differs from the defaults.
        axes: knob to its values; `arms`: name to title.
        dense: losses of the model as it came, by fingerprint of the blocks.
        continues: the sweep that these points belong to as well; see `joined`.
    """

    name: str
    title: str
    model: str
    made: str
    planned: int
    protocol: dict[str, str]
    shared: dict[str, Any]
    axes: dict[str, list[Any]]
    arms: dict[str, str]
    dense: dict[str, list[float]]
    points: list[Point]
    continues: str = ""

    def of(self, arm: str) -> list[Point]:
        return [p for p in self.points if p.arm == arm]

    def command(self, point: Point) -> str:
        """Repeats the run."""
        return RunConfig(**self.shared, **point.settings).as_command()


def gather(grid: Grid, finished: Mapping[str, tuple[Run, RunState]]) -> Sweep:
    """The record of the runs that have finished, by name of their variation.

    Raises:
        TrspError: none has.
    """
    order = [v for v in grid.plan.variations if v.name in finished]
    if not order:
        raise TrspError(f"No point of {grid.plan.name} has finished.", "Run the sweep again, and look at its failures.")
    points, dense = [], {}
    for variation in order:
        run, state = finished[variation.name]
        place = grid.places[variation.name]
        points.append(_point(variation.name, variation.title, place.arm, dict(place.at), run.config(), state))
        for domain, losses in _losses(state, "dense").items():
            dense[points[-1].blocks[domain]] = losses
    first_run, first = finished[order[0].name]
    shared = {k: v for k, v in points[0].settings.items() if all(p.settings.get(k) == v for p in points)}
    for point in points:
        for knob in shared:
            del point.settings[knob]
    return Sweep(
        name=grid.plan.name,
        title=grid.plan.title,
        model=first_run.config().model,
        made=time.strftime("%Y-%m-%d", time.localtime(max(r.folder.stat().st_mtime for r, _ in finished.values()))),
        planned=len(grid.plan.variations),
        protocol=plan_results.protocol(first),
        shared=shared,
        axes=dict(grid.axes),
        arms=dict(grid.arms),
        dense=dense,
        points=points,
        continues=grid.continues,
    )


def _point(name: str, title: str, arm: str, at: dict[str, Any], config: RunConfig, state: RunState) -> Point:
    values, defaults = config.as_dict(), RunConfig().as_dict()
    gaps = [sum(step.gaps) for step in (state.gap_steps[0], state.gap_steps[-1])] if state.gap_steps else []
    direct = _losses(state, "direct")
    return Point(
        name=name,
        title=title,
        arm=arm,
        at=at,
        settings={k: v for k, v in values.items() if v != defaults[k]},
        removed=state.removed.removed if state.removed else [],
        weights=_weights(state),
        blocks={t.domain: t.fingerprint[:16] for t in state.texts if t.role == "measure"},
        losses=_losses(state, "pruned"),
        direct=direct,
        kl={d: round(v, DIGITS) for d, v in state.divergence.get("pruned", {}).items()},
        seed=config.seed,
        steps=len(state.gap_steps),
        seconds=round(math.fsum(state.step_times), 2),
        gap=[round(g, DIGITS) for g in gaps if g],
    )


def _weights(state: RunState) -> list[float]:
    if not state.weight_steps:
        return []
    weights = list(state.weight_steps[-1].weights)
    for chosen in state.rounds:
        if chosen.score is not None and chosen.layer < len(weights):
            weights[chosen.layer] = chosen.score
    return [round(abs(w), DIGITS) for w in weights]


def _losses(state: RunState, which: str) -> Losses:
    return {m.domain: [round(v, DIGITS) for v in m.losses] for m in state.measured if m.state == which}


def to_json(sweep: Sweep) -> str:
    """The record, a line a point."""
    head = codec.encode_document(dataclasses.replace(sweep, points=[]), SCHEMA)
    points = ",\n".join(map(codec.encode, sweep.points))
    return head.replace('"points": []', f'"points": [\n{points}\n]') + "\n"


def write(sweep: Sweep, path: Path) -> None:
    """Raises TrspError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(sweep))
    except OSError as error:
        raise TrspError(f"{path} cannot be written: {error.strerror}.", "Name another file with --out.") from error


def load(path: Path) -> Sweep:
    """A recorded file.

    Raises:
        TrspError: it cannot be read.
    """
    try:
        sweep = codec.decode_document(path.read_bytes(), SCHEMA, Sweep)
        if any(p.arm not in sweep.arms or not set(p.at) <= set(sweep.axes) for p in sweep.points):
            raise ValueError("a point outside the grid")
        for point in sweep.points:
            _check(point)
            codec.build(RunConfig, {**sweep.shared, **point.settings})
        return sweep
    except (OSError, ValueError) as error:
        raise TrspError(f"{path.name} is no record of a sweep.", "Leave it out, or record it again.") from error


def _check(point: Point) -> None:
    """Raise ValueError unless one can reckon with the figures of `point`; a loss may be what is not a number."""
    if not set(ev.DOMAINS) <= set(point.losses) & set(point.blocks):
        raise ValueError("a point without a domain")
    plan_results.check_losses(point.losses)
    plan_results.check_losses(point.direct)
    if math.isnan(sum([*point.weights, *point.gap, *point.kl.values(), point.seconds])):
        raise ValueError("a figure is missing")
    if min(point.steps, point.seed) < 0:
        raise ValueError("a number below nothing")


def shipped() -> Path:
    """The folder of the records that ship with the app."""
    return paths.ASSETS / "evidence" / "sweeps"


def local(root: Path) -> Path:
    """The folder of the records that were made on this machine, under the folder of runs."""
    return root / "sweeps"


def joined(found: Iterable[Sweep]) -> dict[str, Sweep]:
    """By name. A sweep that continues another one that is there is part of that one, and no sweep of its own."""
    there = {sweep.name: sweep for sweep in found}
    whole = {name: s for name, s in there.items() if s.continues not in there or s.continues == name}
    for sweep in there.values():
        if sweep.name not in whole and sweep.continues in whole:
            whole[sweep.continues] = _with(whole[sweep.continues], sweep)
    return whole


def _with(first: Sweep, more: Sweep) -> Sweep:
    """`first` with the points of `more` behind its own; what not all of them share becomes settings of theirs."""
    shared = {k: v for k, v in first.shared.items() if more.shared.get(k) == v}

    def told(sweep: Sweep) -> list[Point]:
        rest = {k: v for k, v in sweep.shared.items() if k not in shared}
        return [dataclasses.replace(p, settings={**rest, **p.settings}) for p in sweep.points]

    axes = {k: [*v, *(new for new in more.axes.get(k, []) if new not in v)] for k, v in first.axes.items()}
    return dataclasses.replace(
        first,
        made=max(first.made, more.made),
        planned=first.planned + more.planned,
        shared=shared,
        axes={**more.axes, **axes},
        arms={**more.arms, **first.arms},
        dense={**more.dense, **first.dense},
        points=[*told(first), *told(more)],
    )


def perplexity(points: list[Point], domain: str) -> Interval:
    """Of several points, over all their blocks."""
    return intervals.perplexity([loss for p in points for loss in p.losses[domain]])


def paired(ones: list[Point], others: list[Point], domain: str) -> tuple[list[float], list[float]]:
    """Losses of both on the blocks that they share: for each point of `ones`, that point of `others` which was
    measured on the same ones. Several seeds give several pairs, one after the other."""
    left, right = [], []
    for one in ones:
        other = next((o for o in others if o.blocks[domain] == one.blocks[domain] and o.seed == one.seed), None)
        if other is not None:
            left += one.losses[domain]
            right += other.losses[domain]
    return left, right


def cells(sweep: Sweep) -> list[list[str]]:
    """A table for a shell: each point's perplexity with its interval."""
    lines = [["", "calibration domain", "held-out domain", "gap", "seconds", "removed"]]
    for p in sweep.points:
        figures = [plan_results.with_interval(intervals.perplexity(p.losses[d])) for d in ev.DOMAINS]
        gap = " to ".join(f"{formatting.nats(g)}" for g in p.gap)
        lines.append(
            [p.title, *figures, gap, formatting.duration(p.seconds) if p.steps else "", ",".join(map(str, p.removed))]
        )
    return lines
