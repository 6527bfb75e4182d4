"""Work through a plan: run what is missing of it, each run once, as far as its crew reaches at a time. Told as events.

    with crew.Here() as workers:
        for told in sweep.work(plan, Store(), workers): ...

A run that was stopped or lost goes on where it can, one that failed is run again, a finished one never, whichever plan
asked for it first. Where one fails the others go on; only what needed its layers is left out. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from trsp_core.errors import TrspError
from trsp_core.experiments import plans
from trsp_core.experiments.executors import Crew
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
class Told:
    """Something happened to a point of the plan.

    Attributes:
        what: begun, going (a look at it meanwhile), found (it had finished before), or how it ended: finished, failed,
            cancelled, lost, damaged; left out: what it needs has not finished.
        number: of the point in the plan, from 1.
        seconds_left: until all points are done; None where it is not known.
    """

    what: str
    number: int
    variation: Variation
    run: Run | None
    state: RunState | None
    seconds_left: float | None


Place = tuple[int, Variation]  # number in the plan, from 1
BAD = ("failed", "cancelled", "lost", "damaged", "left out")


def work(plan: Plan, store: Store, crew: Crew) -> Iterator[Told]:
    """Run what is missing, and tell of each point. Leaving the crew stops what is at work, in writing.

    Raises:
        TrspError: a run cannot be begun at all: a folder that cannot be written, a cluster that is gone.
    """
    waiting = {v.name: (n, v) for n, v in enumerate(plan.variations, 1)}
    known, done, missing = plans.finished(store), dict[str, RunState](), set[str]()
    at_work: dict[Run, Place] = {}
    elsewhere: set[Run] = set()  # those of `at_work` that another process is at
    clock = Clock(plan, crew.places)
    while waiting or at_work:
        for name, place in list(waiting.items()):
            needed = plans.needs(plan, place[1])
            if needed & missing:
                del waiting[name]
                missing.add(name)
                yield Told("left out", *place, None, None, clock.gone(name))
            elif needed <= set(done):
                config = plans.config_of(plan, place[1], done)
                there = known[config].state() if config in known else RunState()
                if there.ended == "finished":  # and its record has not been damaged since
                    del waiting[name]
                    done[name] = there
                    yield Told("found", *place, known[config], done[name], clock.gone(name))
                elif len(at_work) < crew.places and config not in {run.config() for run in at_work}:  # a twin is found
                    del waiting[name]
                    run = _claim(store, plan, place[1], config)
                    at_work[run] = place
                    if run.status() in ("running", "finished"):
                        elsewhere.add(run)
                    else:
                        crew.start(run)
                    yield Told("begun", *place, run, None, clock.left())
        for run in _ended(crew, at_work, elsewhere):
            place, state = at_work.pop(run), run.state()
            elsewhere.discard(run)
            status = run.status(state.ended)
            if status == "finished":
                done[place[1].name] = state
                known[run.config()] = run
                clock.learn(place[1].name, state)
            else:
                missing.add(place[1].name)
            yield Told(status, *place, run, state, clock.gone(place[1].name))
        for run, place in at_work.items():
            state = run.state()
            yield Told("going", *place, run, state, clock.look(place[1].name, state))


def _ended(crew: Crew, at_work: Mapping[Run, Place], elsewhere: set[Run]) -> list[Run]:
    """Those that ended; waits a while for one, if any is at work."""
    if len(at_work) > len(elsewhere):
        mine = list(crew.ended(TICK))
    else:
        mine = []
        time.sleep(0.5 if elsewhere else 0.0)
    return [*mine, *(run for run in elsewhere if not run.held())]


def _claim(store: Store, plan: Plan, variation: Variation, config: RunConfig) -> Run:
    """The run that another process is at or has just finished, or that goes on, or a new one in place of one that
    failed."""
    there = plans.find(store, plan, variation, config)
    if there and (there.status() in ("running", "finished") or resume.take_up(there)):
        return there
    if there:
        store.delete(there.id)
    return plans.create(store, plan, variation, config)


class Clock:
    """Time left over all points: forecasts, corrected by what those that have run took."""

    def __init__(self, plan: Plan, places: int):
        self._expected = {v.name: _expected(plan, v) for v in plan.variations}
        self._fractions: dict[str, float] = {}
        self._took, self._planned, self._places = 0.0, 0.0, places

    def learn(self, name: str, state: RunState) -> None:
        """A point has finished, and took so long."""
        self._took += state.at
        self._planned += self._expected.get(name) or state.at

    def look(self, name: str, state: RunState) -> float | None:
        """A point is so far."""
        self._fractions[name] = state.fraction
        return self.left()

    def gone(self, name: str) -> float | None:
        """A point takes no time any more."""
        self._expected.pop(name, None)
        return self.left()

    def left(self) -> float | None:
        """Seconds; None where nothing is known of the model on this machine."""
        if None in self._expected.values():
            return None
        parts = [(part or 0.0) * (1 - self._fractions.get(name, 0.0)) for name, part in self._expected.items()]
        pace = self._took / self._planned if self._planned else 1.0
        return pace * sum(parts) / max(1, min(self._places, len(parts)))


def _expected(plan: Plan, variation: Variation) -> float | None:
    """Forecast of a point in seconds, before the layers that it takes over are known."""
    by_name = {v.name: v for v in plan.variations}
    timed = by_name.get(variation.as_long_as, variation)
    try:
        config = validate.from_values({**plan.base, **timed.settings}, plan.preset)
        if variation.layers_of:
            source = by_name[variation.layers_of]
            theirs = validate.from_values({**plan.base, **source.settings}, plan.preset)
            named = theirs.method if theirs.method == "manual" else "random"  # costs nothing to choose
            config = replace(config, method=named, layers=theirs.layers, ratio=theirs.ratio)
        return forecast.forecast(config, catalog.facts(config.model)).seconds
    except TrspError:
        return None
