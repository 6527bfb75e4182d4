"""The driver of plans, for the shell and the server. It runs what is missing of a plan, each run once, as many at a
time as its executor takes.

    with executors.LocalExecutor() as executor:
        for event in runner.work(plan, Store(), executor): ...

A run that was stopped or lost goes on where it can, one that failed is run again, a finished one never, whichever plan
asked for it first. Where one fails the others go on; only what needed its layers is left out. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from trsp_core.errors import TrspError
from trsp_core.experiments import plans
from trsp_core.experiments.executors import Executor
from trsp_core.experiments.plans import Plan, Variation
from trsp_core.models import catalog
from trsp_core.preparation import forecast
from trsp_core.pruning import validate
from trsp_core.runs import resume
from trsp_core.runs.store import Run, Store
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState

TICK = 2.0  # seconds between looks at the runs under way


@dataclass(frozen=True)
class PlanEvent:
    """Something happened to a variation of the plan.

    Attributes:
        kind: begun, going (a look at it meanwhile), found (it had finished before), or how it ended: finished, failed,
            cancelled, lost, damaged; steered: it finished, but somebody turned its knobs; left out: what it needs has
            not finished.
        number: of the variation in the plan, from 1.
        seconds_left: until all are done; None where it is not known.
    """

    kind: str
    number: int
    variation: Variation
    run: Run | None
    state: RunState | None
    seconds_left: float | None


Numbered = tuple[int, Variation]  # from 1
BUSY = ("queued", "running")
BAD = ("failed", "cancelled", "lost", "damaged", "steered", "left out")


def work(plan: Plan, store: Store, executor: Executor) -> Iterator[PlanEvent]:
    """Run what is missing, and tell of each variation. Leaving the executor stops what is at work, in writing.

    Raises:
        TrspError: a run cannot be begun at all: settings that cannot be used here, a folder that cannot be written, a
            cluster that is gone.
    """
    waiting = {v.name: (n, v) for n, v in enumerate(plan.variations, 1)}
    finished, states, missing = plans.finished(store.runs()), dict[str, RunState](), set[str]()
    at_work: dict[Run, Numbered] = {}
    elsewhere: set[Run] = set()  # those of `at_work` that another process has begun
    clock = Clock(plan, executor.slots)
    while waiting or at_work:
        for name, numbered in list(waiting.items()):
            needed = plans.needs(plan, numbered[1])
            if needed & missing:
                del waiting[name]
                missing.add(name)
                yield PlanEvent("left out", *numbered, None, None, clock.gone(name))
            elif needed <= set(states):
                config = plans.config_of(plan, numbered[1], states)
                state = finished[config].state() if config in finished else RunState()
                if state.ended == "finished":  # and its record has not been damaged since
                    del waiting[name]
                    states[name] = state
                    yield PlanEvent("found", *numbered, finished[config], state, clock.gone(name))
                elif len(at_work) < executor.slots and config not in {r.config() for r in at_work}:  # a twin is found
                    run = _claim(store, plan, numbered[1], config, executor)
                    del waiting[name]
                    at_work[run] = numbered
                    if run.status() in BUSY or run.status() == "finished":
                        elsewhere.add(run)
                    else:
                        executor.start(run)
                    yield PlanEvent("begun", *numbered, run, None, clock.seconds_left())
        for run in _ended(executor, at_work, elsewhere):
            numbered, state = at_work.pop(run), run.state()
            elsewhere.discard(run)
            status, name = run.status(state.ended), numbered[1].name
            status = "steered" if status == "finished" and state.turns else status
            if status == "finished":
                states[name] = state
                finished[run.config()] = run
                clock.learn(name, state)
            else:
                missing.add(name)
            yield PlanEvent(status, *numbered, run, state, clock.gone(name))
        for run, numbered in at_work.items():
            state = run.state()
            yield PlanEvent("going", *numbered, run, state, clock.look(numbered[1].name, state))


def _ended(executor: Executor, at_work: Mapping[Run, Numbered], elsewhere: set[Run]) -> list[Run]:
    """Those that ended; waits a while for one, if any is at work."""
    if len(at_work) > len(elsewhere):
        own = list(executor.ended(TICK))
    else:
        own = []
        time.sleep(0.5 if elsewhere else 0.0)
    return [*own, *(run for run in elsewhere if not run.waits_or_runs())]


def _claim(store: Store, plan: Plan, variation: Variation, config: RunConfig, executor: Executor) -> Run:
    """The run of this variation. One that is queued, at work or finished is left to whoever began it; one that was
    stopped or lost goes on; one that failed is deleted for a new one."""
    earlier = plans.find(store, plan, variation, config)
    status = earlier.status() if earlier else ""
    if earlier and (status in BUSY or status == "finished"):
        return earlier
    executor.refuse(config)
    if earlier:
        if resume.take_up(earlier):
            return earlier
        store.delete(earlier.id)
    return plans.create(store, plan, variation, config)


class Clock:
    """Time left for all variations: forecasts, corrected by what those that have run took."""

    def __init__(self, plan: Plan, slots: int):
        self._expected = {v.name: _expected(plan, v) for v in plan.variations}
        self._fractions: dict[str, float] = {}
        self._took, self._forecast_seconds, self._slots = 0.0, 0.0, slots

    def learn(self, name: str, state: RunState) -> None:
        """A variation has finished, and took so long."""
        self._took += state.at
        self._forecast_seconds += self._expected.get(name) or state.at

    def look(self, name: str, state: RunState) -> float | None:
        """A variation has come so far; returns `seconds_left`."""
        self._fractions[name] = state.fraction
        return self.seconds_left()

    def gone(self, name: str) -> float | None:
        """A variation takes no time any more; returns `seconds_left`."""
        self._expected.pop(name, None)
        return self.seconds_left()

    def seconds_left(self) -> float | None:
        """Until all are done; None where nothing is known of the model on this machine."""
        if None in self._expected.values():
            return None
        parts = [(part or 0.0) * (1 - self._fractions.get(name, 0.0)) for name, part in self._expected.items()]
        pace = self._took / self._forecast_seconds if self._forecast_seconds else 1.0
        return pace * sum(parts) / max(1, min(self._slots, len(parts)))


def _expected(plan: Plan, variation: Variation) -> float | None:
    """Forecast of a variation in seconds, before the layers that it takes over are known."""
    by_name = {v.name: v for v in plan.variations}
    timed = by_name.get(variation.as_long_as, variation)
    try:
        config = validate.from_values({**plan.base, **timed.settings}, plan.preset)
        if variation.layers_of:
            source = by_name[variation.layers_of]
            theirs = validate.from_values({**plan.base, **source.settings}, plan.preset)
            method = theirs.method if theirs.method == "manual" else "random"  # costs nothing to choose
            config = replace(config, method=method, layers=theirs.layers, ratio=theirs.ratio)
        return forecast.forecast(config, catalog.facts(config.model)).seconds
    except TrspError:
        return None
