"""Exports and reports that pages leave to child processes: a queue for each server, one job at a time.

A job's request goes to its child on stdin, so a token stands in no list of processes and in no environment. The server
itself imports no torch. Jobs go on when their tab is closed.
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

MOST_ENDED = 64  # jobs that have ended and are still listed


@dataclass(eq=False)
class ExportJob:
    """An export or a report of a run, and how far it is.

    Attributes:
        name: of the file or folder, among the run's exports.
        module: its child process is `python -m MODULE`.
        request: what the child reads on stdin. It may hold a token, so it is emptied when the job ends.
        running: waiting or at work. A job that is neither running nor done was stopped, or ended by its `refusal`.
        done: it has ended well.
    """

    run: Run
    name: str
    module: str
    request: dict[str, Any] = field(repr=False)
    progress: Progress = Progress("Waiting", 0.0)
    running: bool = True
    stopping: bool = False
    done: bool = False
    refusal: TrspError | None = None
    visitor: str = ""


class ExportQueue:
    """The jobs of one server, one at a time, first come first served. They end with the server.

    Args:
        bounds: how many may wait, and how long one may take; None takes those of this process.
    """

    def __init__(self, bounds: Limits | None = None):
        self.limits = limits.current() if bounds is None else bounds
        self._all: OrderedDict[tuple[str, str], ExportJob] = OrderedDict()
        self._waiting: deque[ExportJob] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="exports", daemon=True)
        self._thread.start()

    def start(self, run: Run, name: str, module: str, visitor: str = "", **request: Any) -> None:
        """Queue a job, unless its file is there or the same job is running.

        Args:
            name: of the file or folder, among the run's exports.
            visitor: whose share of the queue it takes.
            request: for `python -m MODULE`; the folder of the run is added.

        Raises:
            TrspError: all places are taken, or those of this visitor, or this server uploads nothing.
        """
        if request.get("push"):
            self.limits.refuse_push()
        elif (run.exports_folder / name).is_file():
            return
        key = str(run.folder), name
        with self._changed:
            earlier = self._all.get(key)
            if earlier and earlier.running and not earlier.stopping:
                return
            if len(self._waiting) >= self.limits.export_capacity:
                raise TrspError(
                    f"All {self.limits.export_capacity} places in the queue are taken.", "Try again in a minute."
                )
            self.limits.refuse_export(sum(job.visitor == visitor for job in self._waiting))
            self._all[key] = ExportJob(run, name, module, {"run": str(run.folder), **request}, visitor=visitor)
            self._all.move_to_end(key)
            self._waiting.append(self._all[key])
            self._forget()
            self._changed.notify_all()

    def of(self, run: Run) -> list[ExportJob]:
        """The jobs of a run that are running or have ended lately, oldest first."""
        with self._changed:
            return [job for job in self._all.values() if job.run == run]

    def place(self, job: ExportJob) -> int:
        """The place of a job in the queue, from 1; 0 once it is at work or has ended."""
        with self._changed:
            at_work = any(other.running and other not in self._waiting for other in self._all.values())
            return self._waiting.index(job) + 1 + at_work if job in self._waiting else 0

    def stop(self, job: ExportJob) -> None:
        """Take a job out of the queue, or end it: within two seconds and the time that it needs to clear up."""
        with self._changed:
            job.stopping = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.running = False

    def close(self) -> None:
        """End the job at work, and begin no more."""
        with self._changed:
            self._closed = True
            for job in [*self._all.values()]:
                job.stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
            try:
                self._work(job)
            except TrspError as error:
                job.refusal = error
            except Exception as error:  # a bug, and nobody else to tell of it
                job.refusal = TrspError(f"It failed: {type(error).__name__}: {error}", "Please report this.")
            finally:
                job.request.clear()
                job.running = False

    def _work(self, job: ExportJob) -> None:
        news = subprocesses.run(job.module, self.limits.export_minutes * 60, **job.request)
        try:
            with contextlib.closing(news):
                for job.progress in news:
                    if job.stopping:
                        return
            job.done = True
        finally:
            job.run.tidy_exports()

    def _forget(self) -> None:
        ended = [key for key, job in self._all.items() if not job.running]
        for key in ended[:-MOST_ENDED]:
            del self._all[key]
