"""Plans that a server works through, one run after the other, in turn with whatever else waits in its queue.

A plan at work is a small file under the folder of runs, so it outlives the tab that asked for it, and the server: the
next one goes on with it. That ends when all is done, when a run of it does not finish, or when it is stopped. No torch.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_core import supervision
from trsp_core.errors import TrspError
from trsp_core.experiments import plans, runner
from trsp_core.experiments.executors import QueueExecutor
from trsp_core.experiments.plans import Plan
from trsp_core.experiments.runner import PlanEvent
from trsp_core.files import write_atomic
from trsp_core.preparation import preflight
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Run, Store
from trsp_core.schema.run_state import RunState

PAUSE = 1.0  # seconds between looks at the run at hand


@dataclass(frozen=True)
class PlanStatus:
    """How a plan stands.

    Attributes:
        active: it is being worked through.
        done, total: its runs that have finished, and all.
        at_hand: its run that is queued or running, with its title.
        seconds_left: until all are done; None where it is not known.
        trouble: why it was given up before it was done.
    """

    active: bool
    done: int
    total: int
    at_hand: Run | None = None
    title: str = ""
    seconds_left: float | None = None
    trouble: str = ""


class PlanQueue:
    """The plans of one server. Its thread takes them through `runner.work`, one run of each at a time in the queue."""

    def __init__(self, store: Store, run_queue: RunQueue):
        self.store, self.run_queue = store, run_queue
        self._folder = store.root / "agenda"
        self._lock = threading.Lock()
        self._work: dict[str, Iterator[PlanEvent]] = {}  # by plan
        self._done: dict[
            str, tuple[Any, dict[str, RunState]]
        ] = {}  # by plan: fingerprint of the runs, states of its own
        self._troubles: dict[str, str] = {}  # plan to why it was given up, whether or not that could be written
        self._changed, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="plans", daemon=True)
        self._thread.start()

    def start(self, name: str) -> None:
        """Begin a built-in plan; one that is being worked through stays as it is.

        Raises:
            TrspError: no such plan, or its first run cannot be done on this machine.
        """
        self.run_queue.limits.refuse_plans()
        plan = plans.read(name)
        with self._lock:
            if self._active(name):
                return
            preflight.preflight(plans.config_of(plan, plan.variations[0], {}))
            self._write(name, {"active": True})
            self._troubles.pop(name, None)
        self._changed.set()

    def stop(self, name: str) -> None:
        """Stop a plan, and its run at hand."""
        with self._lock:
            if not self._active(name):
                return
            self._write(name, {"active": False})
            run = self._look(plans.read(name))[1]
            if run:
                with contextlib.suppress(TrspError):  # it was deleted meanwhile
                    self.run_queue.cancel(run[1].id)

    def standing(self, name: str) -> PlanStatus:
        """How the plan `name` stands. Raises TrspError: no such plan."""
        plan = plans.read(name)
        done, run = self._look(plan)
        clock = runner.Clock(plan, 1)
        seconds_left: float | None = None
        for variation, state in done.items():
            clock.learn(variation, state)
            seconds_left = clock.gone(variation)
        seconds_left = clock.look(run[0], run[1].state()) if run else clock.seconds_left()
        titles = {v.name: v.title for v in plan.variations}
        return PlanStatus(
            active=self._active(name),
            done=len(done),
            total=len(plan.variations),
            at_hand=run[1] if run else None,
            title=titles[run[0]] if run else "",
            seconds_left=seconds_left,
            trouble=self._troubles.get(name) or str(self._read(name).get("trouble", "")),
        )

    def close(self) -> None:
        """Begin no more runs. Plans go on with the next server."""
        self._closed = True
        self._changed.set()
        self._thread.join()

    def _serve(self) -> None:
        supervision.serve(self._turn, lambda: self._closed)

    def _turn(self) -> None:
        self._changed.wait(timeout=PAUSE)
        self._changed.clear()
        for name in plans.built_in():
            with self._lock:
                if not self._active(name) or self._closed:
                    self._work.pop(name, None)
                    continue
                try:
                    self._advance(name)
                except TrspError as error:
                    self._give_up(name, str(error))
                except OSError as error:
                    self._give_up(name, f"The folder of runs cannot be used: {error}. Run the plan again when it can.")
                except Exception as error:
                    self._give_up(name, f"{type(error).__name__}: {error}. Please report this.")
                    supervision.tell(error)

    def _advance(self, name: str) -> None:
        """Take a plan as far as it goes without waiting."""
        if name not in self._work:
            self._work[name] = runner.work(plans.read(name), self.store, QueueExecutor(self.run_queue))
        for event in self._work[name]:
            if event.kind == "going":
                return
            if event.kind in runner.BAD:
                failure = event.state.failure if event.state else None
                remedy = "Open it to see why, then run the missing ones again."
                raise TrspError(
                    f"“{event.variation.title}” did not finish.",
                    f"{failure.message} {failure.remedy}" if failure else remedy,
                )
        self._write(name, {"active": False})

    def _give_up(self, name: str, trouble: str) -> None:
        self._troubles[name] = trouble
        self._work.pop(name, None)
        with contextlib.suppress(TrspError):  # a full disk: then only this server knows
            self._write(name, {"active": False, "trouble": trouble})

    def _look(self, plan: Plan) -> tuple[dict[str, RunState], tuple[str, Run] | None]:
        """States of the finished runs by variation, and the variation and run that is queued or running."""
        runs = self.store.runs()
        fingerprint = plans.fingerprint(runs)
        earlier, done = self._done.get(plan.name, (None, {}))
        if earlier != fingerprint:
            done = {name: state for name, (_, state) in plans.ends(plan, runs).items()}
            self._done[plan.name] = fingerprint, done
        missing = {v.name for v in plan.variations} - set(done)
        for run in runs:
            name, variation = plans.belongs(run) or ("", "")
            if name == plan.name and variation in missing and run.status() in runner.BUSY:
                return done, (variation, run)
        return done, None

    def _active(self, name: str) -> bool:
        return name not in self._troubles and bool(self._read(name).get("active"))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, object]:
        try:
            document = json.loads(self._file(name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    def _write(self, name: str, values: dict[str, object]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(name), json.dumps(values))
        except OSError as error:
            raise TrspError("The folder of runs cannot be written.", "Free some space, and try again.") from error
