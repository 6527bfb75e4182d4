"""The record of a grid: a point a run, small enough to ship. No torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import records
from trsp_core.experiments.grids import Contest, Grid
from trsp_core.experiments.plans import Ends
from trsp_core.pruning.methods import trsp
from trsp_core.schema import codec
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import DOMAINS
from trsp_core.schema.run_state import RunState

MOST_LAYERS = 1000  # of a model; more are drawn by no picture


@dataclass(frozen=True)
class ChoiceRound:
    """A layer that stage 1 chose, and how narrowly.

    Attributes:
        margin: |s| of the runner-up less |s| of the layer, when it was chosen.
        noise: how far chance would have moved that in the steps of the round; `pruning.methods.trsp.noise`.
    """

    layer: int
    margin: float
    noise: float


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
        choosing, repairing: seconds that the choice took, and the repair.
        rounds: of stage 1, where their steps are known; in the order of choice.
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
    choosing: float = 0.0
    repairing: float = 0.0
    rounds: list[ChoiceRound] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """The finished points of a grid, in its order.

    Attributes:
        planned: how many points the grid has.
        shared: what all points have that differs from the defaults.
        axes: knob to its values; `arms`: name to title.
        dense: losses of the model as it came, by fingerprint of the blocks.
        continues: the sweep that these points belong to as well; see `joined`.
        n_layers: of the model as it came; 0 in older records.
        contests: which arms are to be set beside which.
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
    n_layers: int = 0
    contests: list[Contest] = field(default_factory=list)

    def of(self, arm: str) -> list[Point]:
        return [p for p in self.points if p.arm == arm]

    def command(self, point: Point) -> str:
        """Repeats the run."""
        return RunConfig(**self.shared, **point.settings).as_command()


def gather(grid: Grid, finished: Ends) -> Sweep:
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
        point = grid.points[variation.name]
        points.append(_point(variation.name, variation.title, point.arm, dict(point.at), run.config(), state))
        for domain, losses in records.losses(state, "dense").items():
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
        made=records.day(run for run, _ in finished.values()),
        planned=len(grid.plan.variations),
        protocol=records.protocol(first),
        shared=shared,
        axes=dict(grid.axes),
        arms=dict(grid.arms),
        dense=dense,
        points=points,
        continues=grid.continues,
        n_layers=first.model.n_layers if first.model else 0,
        contests=list(grid.contests),
    )


def _point(name: str, title: str, arm: str, at: dict[str, Any], config: RunConfig, state: RunState) -> Point:
    values, defaults = config.as_dict(), RunConfig().as_dict()
    gaps = [sum(step.gaps) for step in (state.gap_steps[0], state.gap_steps[-1])] if state.gap_steps else []
    return Point(
        name=name,
        title=title,
        arm=arm,
        at=at,
        settings={k: v for k, v in values.items() if v != defaults[k]},
        removed=state.removed.removed if state.removed else [],
        weights=_weights(state),
        blocks={domain: digest[:16] for domain, digest in records.fingerprints(state).items()},
        losses=records.losses(state, "pruned"),
        direct=records.losses(state, "direct"),
        kl=records.divergence(state),
        seed=config.seed,
        steps=len(state.gap_steps),
        seconds=round(math.fsum(state.step_times), 2),
        gap=[round(g, records.DIGITS) for g in gaps if g],
        choosing=round(state.phase_seconds.get("choose", 0.0), 1),
        repairing=round(state.phase_seconds.get("repair", 0.0), 1),
        rounds=_rounds(state, config),
    )


def _weights(state: RunState) -> list[float]:
    if not state.weight_steps:
        return []
    weights = list(state.weight_steps[-1].weights)
    for chosen in state.rounds:
        if chosen.score is not None and chosen.layer < len(weights):
            weights[chosen.layer] = chosen.score
    return [round(abs(w), records.DIGITS) for w in weights]


def _rounds(state: RunState, config: RunConfig) -> list[ChoiceRound]:
    """Those of stage 1 that were decided by weights and had somebody to beat, and steps enough to tell the noise."""
    histories: dict[int, list[list[float]]] = {}
    for step in state.weight_steps:
        histories.setdefault(step.round, []).append(step.weights)
    rounds = []
    for chosen in state.rounds:
        history, runner_up = histories.get(chosen.round, []), chosen.runner_up
        layers = range(min(map(len, history), default=0))
        if chosen.margin is None or runner_up is None or not {runner_up, chosen.layer} <= {*layers}:
            continue
        weights = trsp.averaged(history, config.stage1_average)
        noise = trsp.noise(history, chosen.layer, runner_up)
        margin = abs(weights[runner_up]) - abs(weights[chosen.layer])
        if math.isfinite(noise) and math.isclose(margin, chosen.margin, abs_tol=1e-9):  # else others decided
            rounds.append(ChoiceRound(chosen.layer, float(formatting.figure(margin)), float(formatting.figure(noise))))
    return rounds


def to_json(sweep: Sweep) -> str:
    """The record, a line a point."""
    return records.to_json(sweep, "points")


def write(sweep: Sweep, path: Path) -> None:
    """Raises TrspError: it cannot be written."""
    records.write(path, to_json(sweep))


def load(path: Path) -> Sweep:
    """A recorded file.

    Raises:
        TrspError: it cannot be read.
    """
    return records.read(path, "a sweep", Sweep, _check)


def _check(sweep: Sweep) -> None:
    """Raise ValueError unless one can reckon with the figures; a loss may be what is not a number."""
    if not 0 <= sweep.n_layers <= MOST_LAYERS:
        raise ValueError("no number of layers")
    if any(p.arm not in sweep.arms or not set(p.at) <= set(sweep.axes) for p in sweep.points):
        raise ValueError("a point outside the grid")
    if any(not isinstance(v, (str, int, float)) for p in sweep.points for v in p.at.values()):
        raise ValueError("a point at no plain value")
    for point in sweep.points:
        codec.build(RunConfig, {**sweep.shared, **point.settings})
        if not set(DOMAINS) <= set(point.losses) & set(point.blocks):
            raise ValueError("a domain is missing")
        records.check_losses(point.losses)
        records.check_losses(point.direct)
        if math.isnan(sum([*point.weights, *point.gap, *point.kl.values(), point.seconds])):
            raise ValueError("a figure that is not a number")
        figures = [point.choosing, point.repairing, *(v for r in point.rounds for v in (r.margin, r.noise))]
        if not all(map(math.isfinite, figures)):
            raise ValueError("a round or a time without its figures")
        if min(point.steps, point.seed) < 0:
            raise ValueError("a number below nothing")
        if not set(point.removed) <= set(range(sweep.n_layers or MOST_LAYERS)):
            raise ValueError("a layer that no model has")


def shipped() -> Path:
    """The folder of the records that ship with the app."""
    return paths.ASSETS / "evidence" / "sweeps"


def local(root: Path) -> Path:
    """The folder of the records that were made on this machine, under the folder of runs."""
    return root / "sweeps"


def joined(sweeps: Iterable[Sweep]) -> dict[str, Sweep]:
    """Sweeps by name. One that continues another of them joins that one, and is not listed by itself."""
    by_name = {sweep.name: sweep for sweep in sweeps}
    whole = {name: s for name, s in by_name.items() if s.continues not in by_name or s.continues == name}
    for sweep in by_name.values():
        if sweep.name not in whole and sweep.continues in whole:
            whole[sweep.continues] = _with(whole[sweep.continues], sweep)
    return whole


def _with(first: Sweep, more: Sweep) -> Sweep:
    """`first` with the points of `more` behind its own. What they do not share becomes settings of the points."""
    shared = {k: v for k, v in first.shared.items() if more.shared.get(k) == v}

    def points(sweep: Sweep) -> list[Point]:
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
        n_layers=first.n_layers or more.n_layers,
        contests=list(dict.fromkeys([*first.contests, *more.contests])),
        points=[*points(first), *points(more)],
    )


def perplexity(points: list[Point], domain: str) -> Interval:
    """The perplexity of several points together: of one split with its interval over blocks, of several over splits."""
    return intervals.perplexity(_independent([p.losses[domain] for p in points]))


def paired(ones: list[Point], others: list[Point], domain: str) -> tuple[list[float], list[float]]:
    """Losses of both on the blocks that they share: for each point of `ones`, that point of `others` which was
    measured on the same ones. Of one split the losses of its blocks, of several the mean of each."""
    pairs = []
    for one in ones:
        other = next((o for o in others if o.blocks[domain] == one.blocks[domain] and o.seed == one.seed), None)
        if other is not None:
            pairs.append((one.losses[domain], other.losses[domain]))
    return _independent([losses for losses, _ in pairs]), _independent([losses for _, losses in pairs])


def _independent(by_split: list[list[float]]) -> list[float]:
    """What may be counted as independent: the blocks of one split, or the means of several, since the blocks of a split
    share its calibration texts and its choice of layers."""
    return by_split[0] if len(by_split) == 1 else [statistics.fmean(losses) for losses in by_split]


def cells(sweep: Sweep) -> list[list[str]]:
    """A table for a shell: each point's perplexity with its interval."""
    lines = [["", "calibration domain", "held-out domain", "gap", "seconds", "removed"]]
    for p in sweep.points:
        figures = [records.with_interval(intervals.perplexity(p.losses[d])) for d in DOMAINS]
        gap = " to ".join(map(formatting.nats, p.gap))
        seconds = formatting.duration(p.seconds) if p.steps else ""
        lines.append([p.title, *figures, gap, seconds, ",".join(map(str, p.removed))])
    return lines
