"""What a run looks like so far: `RunState`, folded from its events. Pages, the shell and summaries read only this."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

from trsp_core.schema import codec, events, turns
from trsp_core.schema.config import layers_to_remove
from trsp_core.schema.events import Event

ENDED = ("finished", "cancelled", "failed", "damaged")
Line = tuple[int, float, Event]  # n, seconds since the run began, event
RESUMED = "This run was interrupted and went on later; what had been lost by that was computed again."


@dataclass
class RunState:
    """The fold of a run's events; empty before the first one.

    Attributes:
        count: events so far, those that cannot be read included: the number of the next one.
        at, between: seconds at the last event, and between the last two.
        ended: `finished`, `cancelled`, `failed`, or "" while there is no ending; `damaged`: it had finished, but events
            before that cannot be read any more.
        missing: the stretches of events that cannot be read; a run that is resumed tells them again.
        phase, done, units: where the run is; `phases` is the forecast of all, `phase_number` the index in it, or -1.
        weights: the L layer weights after the latest step of stage 1.
        weight_steps: one `StageOneStepped` each step; `gap_steps` the same for stage 2, `step_times` their seconds.
        rounds: one `LayerChosen` each choice.
        repair_layers: those that the repair goes through, in order; [] before it says so, and in older runs.
        refits: one `LayerRefitted` each layer that was solved.
        turns: the knobs that were turned while it ran, in order: then it is no evidence.
        paused: it waits for somebody to let it go on. `paused_seconds`: how long it has; no phase counts them.
        requests: of steer.jsonl, the last line that was taken.
        repair_probes: in both domains.
        probes, probes_elsewhere: in the calibration and in the held-out domain.
        perplexity: `[state][domain]`; `measured` holds the whole events. `divergence` the same for KL.
        speed, importance, samples: by state.
        lines: the events that count, in order: all but those that `Resumed` has overtaken.
        reopened: number of the event that the run was resumed at, while none has come since.
    """

    count: int = 0
    at: float = 0.0
    between: float = 0.0
    ended: str = ""
    missing: list[events.EventsMissing] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    phase: str = ""
    phase_number: int = -1
    phase_began: float = 0.0
    done: int = 0
    units: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    forecast_bytes: int = 0
    peak_bytes: int = 0
    model: events.ModelLoaded | None = None
    texts: list[events.TextPrepared] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    weight_steps: list[events.StageOneStepped] = field(default_factory=list)
    rounds: list[events.LayerChosen] = field(default_factory=list)
    scores: events.LayersScored | None = None
    chosen: list[int] = field(default_factory=list)
    gap_steps: list[events.StageTwoStepped] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    probes: list[events.DeletionProbed] = field(default_factory=list)
    probes_elsewhere: list[events.DeletionProbed] = field(default_factory=list)
    repair_layers: list[int] = field(default_factory=list)
    refits: list[events.LayerRefitted] = field(default_factory=list)
    turns: list[events.KnobTurned] = field(default_factory=list)
    paused: bool = False
    paused_seconds: float = 0.0
    requests: int = 0
    repair_probes: list[events.RepairProbed] = field(default_factory=list)
    removed: events.LayersRemoved | None = None
    narrowed: events.LayersNarrowed | None = None
    measured: list[events.PerplexityMeasured] = field(default_factory=list)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    divergence: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: dict[str, events.SpeedMeasured] = field(default_factory=dict)
    importance: dict[str, events.ImportanceMeasured] = field(default_factory=dict)
    samples: dict[str, events.TextGenerated] = field(default_factory=dict)
    saved_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    failure: events.RunFailed | None = None
    stopped_why: str = ""
    lines: list[Line] = field(default_factory=list, compare=False, repr=False)  # the rest follows from it
    reopened: int | None = None

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step of stage 2, probes left out; None before the third."""
        return statistics.median(self.step_times) if len(self.step_times) > 2 else None

    def figures(self, domain: str) -> dict[str, float]:
        """Perplexity in `domain` by state of the model, as far as it is measured."""
        return {name: by[domain] for name, by in self.perplexity.items() if domain in by}

    @property
    def fraction(self) -> float:
        """Share of the forecast seconds that is done, 0 to 1."""
        total = sum(p["seconds"] for p in self.phases)
        if self.ended == "finished":
            return 1.0
        return min(max(self._seconds_done / total, 0.0), 0.999) if total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left, from the forecast of each phase and the speed so far; None before that, and after the end."""
        total = sum(p["seconds"] for p in self.phases)
        if self.ended or not total:
            return None
        done = self._seconds_done
        pace = (self.at - self.paused_seconds) / done if done > 0.03 * total and done > 1 else 1.0
        return max(total - done, 0.0) * pace

    @property
    def _seconds_done(self) -> float:
        """Forecast seconds of all that is done."""
        if self.phase_number < 0:
            return 0.0
        before, now = self.phases[: self.phase_number], self.phases[self.phase_number]
        share = min(max(self.done / self.units, 0.0), 1.0) if self.units else 0.0
        return sum(p["seconds"] for p in before) + now["seconds"] * share

    @property
    def ceiling(self) -> float | None:
        """L / (L - K), the most that removing K of L equal layers can speed a model up; None before removal, and where
        the layers got narrower instead."""
        if self.removed is None or self.narrowed:
            return None
        return (len(self.removed.kept) + len(self.removed.removed)) / max(len(self.removed.kept), 1)


def fold(state: RunState, lines: Iterable[Line]) -> RunState:
    """Add `lines` to `state`, in place, and return it."""
    for n, at, event in lines:
        state.count += event.count if isinstance(event, events.EventsMissing) else 1
        state.between, state.at = at - state.at, at
        if state.paused:
            state.paused_seconds += state.between
            state.phase_began += state.between
        if isinstance(event, events.Resumed):
            _go_back(state, at, event)
            continue
        state.lines.append((n, at, event))
        state.reopened = None
        _add(event, state)
    return state


def _go_back(state: RunState, at: float, event: events.Resumed) -> None:
    """Make `state` what it was when the run came to `event.place`; the time that was lost counts for no phase."""
    earlier = fold(RunState(), [line for line in state.lines if line[0] < event.place])
    lost_seconds = at - earlier.at
    earlier.count, earlier.at, earlier.between, earlier.reopened = state.count, at, 0.0, event.place
    earlier.phase_began += lost_seconds
    earlier.paused, earlier.requests = False, max(earlier.requests, state.requests)
    earlier.notes = list(dict.fromkeys([*earlier.notes, RESUMED]))
    vars(state).update(vars(earlier))


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    dense: int
    pruned: int


@dataclass(frozen=True)
class Failure:
    """Why a run could not go on, and what to do."""

    message: str
    remedy: str


@dataclass(frozen=True)
class Summary:
    """The figures of a run, as `summary.json` holds them.

    Attributes:
        perplexity, kl: by domain, then by state of the model.
        speed: by state of the model, tokens a second; `ceiling` is `RunState.ceiling`.
        seconds: `total`, and by phase.
        missing_events: how many cannot be read; older versions did not count them.
        turns: the knobs that were turned while it ran: then its figures are no evidence.
    """

    ended: str
    model: str | None
    n_layers: int | None
    chosen: list[int]
    removed: list[int]
    kept: list[int]
    narrowed: events.LayersNarrowed | None
    parameters: Sizes | None
    perplexity: dict[str, dict[str, float]]
    kl: dict[str, dict[str, float]]
    speed: dict[str, Any]
    seconds: dict[str, float]
    peak_bytes: int
    failure: Failure | None
    missing_events: int = 0
    turns: list[events.KnobTurned] = field(default_factory=list)


def summary(state: RunState) -> dict[str, Any]:
    """`Summary` in the types of JSON: what `run --json` prints and a list of runs shows."""
    removed, model = state.removed, state.model
    speed: dict[str, Any] = {
        name: {"prefill": m.prefill, "decode": m.decode, "unit": "tokens/s"} for name, m in state.speed.items()
    }
    figures = Summary(
        ended=state.ended,
        model=model.model if model else None,
        n_layers=model.n_layers if model else None,
        chosen=state.chosen,
        removed=removed.removed if removed else [],
        kept=removed.kept if removed else [],
        narrowed=state.narrowed,
        parameters=Sizes(removed.parameters_before, removed.parameters) if removed else None,
        perplexity={domain: state.figures(domain) for domain in events.DOMAINS},
        kl={domain: {s: by[domain] for s, by in state.divergence.items() if domain in by} for domain in events.DOMAINS},
        speed=speed | ({"ceiling": state.ceiling} if speed and state.ceiling else {}),
        seconds={"total": round(state.at, 1), **{k: round(v, 1) for k, v in state.phase_seconds.items()}},
        peak_bytes=state.peak_bytes,
        failure=Failure(state.failure.message, state.failure.remedy) if state.failure else None,
        missing_events=sum(stretch.count for stretch in state.missing),
        turns=state.turns,
    )
    return codec.plain(figures)


def read_summary(text: str) -> dict[str, Any]:
    """The summary of a run that has ended, from the text of its `summary.json`.

    Raises:
        ValueError: it is damaged, or of a run that has not ended.
    """
    figures = codec.decode(text, Summary)
    for name, rates in figures.speed.items():
        if name != "ceiling":
            codec.build(_Rates, rates)
    if figures.ended not in ENDED or not set(figures.perplexity) == set(figures.kl) == set(events.DOMAINS):
        raise ValueError("it has not ended, or a domain is missing")
    if "total" not in figures.seconds or not all(map(math.isfinite, figures.seconds.values())):
        raise ValueError("a time is missing")
    return codec.plain(figures)


@dataclass(frozen=True)
class _Rates:
    """Tokens a second of one state of the model."""

    prefill: float
    decode: float
    unit: str


@singledispatch
def _add(event: Event, state: RunState) -> None:
    raise TypeError(f"run_state.py does not know {type(event).__name__}")


@_add.register
def _(event: events.RunPlanned, state: RunState) -> None:
    phases = [
        p for p in event.phases
        if isinstance(p.get("name"), str) and isinstance(p.get("seconds"), (int, float)) and 0 <= p["seconds"] < 1e12
    ]  # fmt: skip
    state.phases, state.forecast_bytes = phases, event.peak_bytes


@_add.register
def _(event: events.PhaseStarted, state: RunState) -> None:
    _close_phase(state)
    state.phase, state.units, state.done, state.phase_began = event.name, event.units, 0, state.at
    later = [i for i, p in enumerate(state.phases) if p["name"] == event.name and i > state.phase_number]
    state.phase_number = later[0] if later else -1  # a phase may come again


@_add.register
def _(event: events.Progressed, state: RunState) -> None:
    state.done = event.done


@_add.register
def _(event: events.ModelLoaded, state: RunState) -> None:
    state.model = event
    state.weights = [1.0] * len(event.layer_parameters)


@_add.register
def _(event: events.TextPrepared, state: RunState) -> None:
    state.texts.append(event)


@_add.register
def _(event: events.PerplexityMeasured, state: RunState) -> None:
    state.measured.append(event)
    state.perplexity.setdefault(event.state, {})[event.domain] = event.perplexity


@_add.register
def _(event: events.DivergenceMeasured, state: RunState) -> None:
    state.divergence.setdefault(event.state, {})[event.domain] = event.kl


@_add.register
def _(event: events.SpeedMeasured, state: RunState) -> None:
    state.speed[event.state] = event


@_add.register
def _(event: events.ImportanceMeasured, state: RunState) -> None:
    state.importance[event.state] = event


@_add.register
def _(event: events.TextGenerated, state: RunState) -> None:
    state.samples[event.state] = event


@_add.register
def _(event: events.StageOneStepped, state: RunState) -> None:
    state.weight_steps.append(event)
    state.weights = event.weights
    state.done += 1


@_add.register
def _(event: events.LayerChosen, state: RunState) -> None:
    state.rounds.append(event)
    state.chosen = [*state.chosen, event.layer]


@_add.register
def _(event: events.LayersScored, state: RunState) -> None:
    state.scores = event


@_add.register
def _(event: events.LayersChosen, state: RunState) -> None:
    state.chosen = event.layers


@_add.register
def _(event: events.StageTwoStepped, state: RunState) -> None:
    state.gap_steps.append(event)
    state.step_times.append(state.between)
    state.done += 1


@_add.register
def _(event: events.DeletionProbed, state: RunState) -> None:
    (state.probes if event.domain == "calibration" else state.probes_elsewhere).append(event)


@_add.register
def _(event: events.RepairPlanned, state: RunState) -> None:
    state.repair_layers = event.layers


@_add.register
def _(event: events.LayerRefitted, state: RunState) -> None:
    state.refits.append(event)


@_add.register
def _(event: events.RepairProbed, state: RunState) -> None:
    state.repair_probes.append(event)


@_add.register
def _(event: events.KnobTurned, state: RunState) -> None:
    state.requests = max(state.requests, event.request)
    if event.name == turns.PAUSE:
        state.paused = event.after > 0
    elif event.name in turns.STAGE_OF:
        state.turns.append(event)
        _reckon_anew(event, state)


def _reckon_anew(event: events.KnobTurned, state: RunState) -> None:
    """Let the forecast and what the phase counts up to follow from steps or layers that were turned."""
    name = "transfer" if turns.STAGE_OF[event.name] == 2 else "choose"
    units = state.units if state.phase == name else 0
    before, after = event.before, event.after
    if event.name == "ratio" and state.model and 0 <= before <= 1 and 0 <= after <= 1:
        chosen = len(state.chosen) if units else 0
        before, after = (layers_to_remove(ratio, state.model.n_layers) - chosen for ratio in (before, after))
    elif event.name not in ("stage1_steps", "stage2_steps"):
        return
    scale = after / before if before > 0 else 1.0
    if not 0 <= scale < 1e6:  # a damaged record
        return
    behind = _steps_of_rounds(state) if units and name == "choose" else 0
    if units:
        state.units = behind + round((units - behind) * scale)
        scale = state.units / units
    state.phases = [p | {"seconds": p["seconds"] * scale} if p["name"] == name else p for p in state.phases]


def _steps_of_rounds(state: RunState) -> int:
    """How many steps of stage 1 belong to rounds that are over."""
    last = state.rounds[-1].round if state.rounds else None
    return sum(step.round <= last for step in state.weight_steps) if last is not None else 0


@_add.register
def _(event: events.LayersRemoved, state: RunState) -> None:
    state.removed = event


@_add.register
def _(event: events.LayersNarrowed, state: RunState) -> None:
    state.narrowed = event


@_add.register
def _(event: events.ModelSaved, state: RunState) -> None:
    state.saved_bytes = event.bytes


@_add.register
def _(event: events.Noted, state: RunState) -> None:
    state.notes.append(event.message)


@_add.register
def _(event: events.EventsMissing, state: RunState) -> None:
    state.missing.append(event)
    state.notes.append(event.sentence)


@_add.register
def _(event: events.RunFinished, state: RunState) -> None:
    _close_phase(state)
    state.ended, state.peak_bytes = "damaged" if state.missing else "finished", event.peak_bytes


@_add.register
def _(event: events.RunCancelled, state: RunState) -> None:
    _close_phase(state)
    state.ended, state.stopped_why = "cancelled", event.reason


@_add.register
def _(event: events.RunFailed, state: RunState) -> None:
    _close_phase(state)
    state.ended, state.failure = "failed", event


def _close_phase(state: RunState) -> None:
    if state.phase:
        earlier_seconds = state.phase_seconds.get(state.phase, 0.0)
        state.phase_seconds[state.phase] = earlier_seconds + state.at - state.phase_began
