"""Short work that a page leaves to a child process: asked once, as JSON on stdin, answered in steps, a JSON line each.

So the server imports no torch, and what is secret stands in no list of processes and in no environment. A server does
one errand at a time (`Errands`), and each goes on whichever tab is closed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from trsp_core import subprocesses
from trsp_core.errors import TrspError
from trsp_core.runs import limits
from trsp_core.runs.limits import Limits
from trsp_core.runs.store import Run
from trsp_core.subprocesses import Progress

KEPT = 64  # errands that have ended and are still told of


@dataclass(eq=False)
class Errand:
    """Something that was asked for, and how far it is.

    Attributes:
        name: of what is made, among the run's exports.
        done: it has ended well. An errand that neither goes on nor is done was stopped, or ended by its `refusal`.
    """

    run: Run
    name: str
    module: str
    asked: dict[str, Any] = field(repr=False)  # it may hold a token, until the errand has ended
    step: Progress = Progress("Waiting", 0.0)
    running: bool = True
    stopping: bool = False
    done: bool = False
    refusal: TrspError | None = None
    visitor: str = ""


class Errands:
    """The errands of one server, in the order in which they were asked for, one at a time. They go on whichever tab is
    closed, and end with the server.

    Args:
        bounds: how many may wait, and how long one may take; those of this process where None is given.
    """

    def __init__(self, bounds: Limits | None = None):
        self.limits = limits.current() if bounds is None else bounds
        self._all: OrderedDict[tuple[str, str], Errand] = OrderedDict()
        self._waiting: deque[Errand] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="errands", daemon=True)
        self._thread.start()

    def start(self, run: Run, name: str, module: str, visitor: str = "", **asked: Any) -> None:
        """Have `name` made for `run`, unless it is there, or somebody has asked for it before.

        Args:
            visitor: who asks, to the limits.
            asked: of `python -m MODULE`, beside the folder of the run.

        Raises:
            TrspError: all places are taken, or those of this visitor, or this server uploads nothing.
        """
        if asked.get("push"):
            self.limits.refuse_push()
        elif (run.exports_folder / name).is_file():
            return
        key = str(run.folder), name
        with self._changed:
            now = self._all.get(key)
            if now and now.running and not now.stopping:
                return
            if len(self._waiting) >= self.limits.errands:
                raise TrspError(f"All {self.limits.errands} places in the queue are taken.", "Try again in a minute.")
            self.limits.refuse_takeaway(sum(errand.visitor == visitor for errand in self._waiting))
            self._all[key] = Errand(run, name, module, {"run": str(run.folder), **asked}, visitor=visitor)
            self._all.move_to_end(key)
            self._waiting.append(self._all[key])
            self._forget()
            self._changed.notify_all()

    def of(self, run: Run) -> list[Errand]:
        """Those of a run that go on or have ended lately, in the order in which they were asked for."""
        with self._changed:
            return [errand for errand in self._all.values() if errand.run == run]

    def place(self, errand: Errand) -> int:
        """Errands ahead of this one, itself included; 0 once it is worked on, or has ended."""
        with self._changed:
            ahead = any(e.running and e not in self._waiting for e in self._all.values())
            return self._waiting.index(errand) + 1 + ahead if errand in self._waiting else 0

    def stop(self, errand: Errand) -> None:
        """Take it out of the queue, or end it, within a second or two and the time that it needs to clear up."""
        with self._changed:
            errand.stopping = True
            if errand in self._waiting:
                self._waiting.remove(errand)
                errand.running = False

    def close(self) -> None:
        """End the errand at hand, and begin no more."""
        with self._changed:
            self._closed = True
            for errand in [*self._all.values()]:
                errand.stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                errand = self._waiting.popleft()
            try:
                self._work(errand)
            except TrspError as error:
                errand.refusal = error
            except Exception as error:  # a bug, and nobody else to tell of it
                errand.refusal = TrspError(f"It failed: {type(error).__name__}: {error}", "Please report this.")
            finally:
                errand.asked.clear()
                errand.running = False

    def _work(self, errand: Errand) -> None:
        steps = subprocesses.run(errand.module, self.limits.errand_minutes * 60, **errand.asked)
        try:
            with contextlib.closing(steps):
                for errand.step in steps:
                    if errand.stopping:
                        return
            errand.done = True
        finally:
            errand.run.tidy_exports()

    def _forget(self) -> None:
        ended = [key for key, errand in self._all.items() if not errand.running]
        for key in ended[:-KEPT]:
            del self._all[key]
