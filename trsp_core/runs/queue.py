"""The queue of runs: each in a child process of its own, a few at a time. Knows no page and no model."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Collection
from functools import partial

import psutil

from trsp_core.runs import retention, limits, recorder, resume
from trsp_core import formatting, malloc, supervision
from trsp_core.schema import codec
from trsp_core.schema.config import RunConfig
from trsp_core.errors import TrspError, refuse
from trsp_core.schema.events import RunCancelled, RunFailed
from trsp_core.files import write_atomic
from trsp_core.runs.limits import Limits
from trsp_core.runs import process
from trsp_core.runs.warm_worker import WarmWorker
from trsp_core.runs.store import Exit, Run, Store

RETENTION_EVERY = 600.0  # seconds between looks for runs to delete
GIVE_BACK_EVERY = 30.0  # seconds after which a server of many tabs gives back what it has freed
WATCHED_FOR = 60.0  # seconds after a look for which a run counts as watched
SHUTDOWN_TIME = 8.0  # seconds that a server which is told to end gives its runs: a container is killed after ten
GRACE = 20.0  # seconds a run may take to stop by itself before its process is told to, and again before it is made to


class RunQueue:
    """Starts queued runs in order, some at a time; one a server. It holds to the limits itself, whatever a page asks.

    A child outlives the server: it is a session of its own, and its lock says that it lives. The next server counts it
    as its own.

    Args:
        workers, capacity: how many run at once and may wait, instead of what `bounds` says.
        bounds: those of this process where None is given.
    """

    def __init__(
        self, store: Store, workers: int | None = None, capacity: int | None = None, bounds: Limits | None = None
    ):
        self.limits = limits.current() if bounds is None else bounds
        self.store = store
        self.workers = self.limits.workers if workers is None else workers
        self.capacity = self.limits.queue_capacity if capacity is None else capacity
        self._start_times: dict[str, float] = {}  # run to the time at which it was started
        self._watch_times: dict[str, float] = {}  # run to the time at which somebody looked at it
        self._last_retention, self._last_give_back = -RETENTION_EVERY, 0.0
        self._waiting: deque[str] = deque()
        self.children: dict[str, subprocess.Popen[bytes] | AdoptedProcess] = {}
        self._failures: dict[str, str] = {}  # run to why it could not be started, where its folder could not be told
        self._marks: dict[str, str] = {}  # run to who put it into the queue, as `_mark` says it
        self._stop_times: dict[str, float] = {}  # run to the time at which it was told to stop
        self._changed, self._closed, self.warm_worker = threading.Condition(), False, WarmWorker()
        self._adopt()
        self._thread = threading.Thread(target=self._serve, name="run queue", daemon=True)
        self._thread.start()

    def prepare(self) -> None:
        """Somebody may start a run soon."""
        self.warm_worker.prepare()

    def submit(self, config: RunConfig, name: str = "", own_ids: Collection[str] = (), visitor: str = "") -> Run:
        """Queue a new run, in a folder of this name where one is given.

        Args:
            config: which `preflight` has let pass.
            own_ids: ids of the runs of whoever asks.
            visitor: who asks, to the limits; "" for the server itself.

        Raises:
            TrspError: it is beyond the limits, all places are taken, or the folder cannot be written.
        """
        with self._changed:
            self.refuse(config)
            self.limits.refuse_run(self._active(own_ids, visitor))
            run = self.store.create(config, self.store.root / name if name else None)
            self._enqueue(run, visitor)
            self._changed.notify()
        return run

    def refuse(self, config: RunConfig) -> None:
        """Raise TrspError where such a run is beyond the limits, or all places are taken."""
        refuse(self.limits.check_run(config, self.store.root))
        if len(self._waiting) >= self.capacity:
            raise TrspError(f"All {self.capacity} places in the queue are taken.", "Try again in a few minutes.")

    def enqueue(self, run: Run) -> None:
        """Queue a run of the server itself, whose folder is there and which has not ended."""
        with self._changed:
            self._failures.pop(run.id, None)
            self._enqueue(run)
            self._changed.notify()

    def _enqueue(self, run: Run, visitor: str = "") -> None:
        """Put a run behind the others; `queued` in its folder tells a later server so, and whose it is."""
        if visitor:
            self._marks[run.id] = _mark(run.id, visitor)
        if visitor or not (run.folder / "queued").exists():
            (run.folder / "queued").write_text(_mark(run.id, visitor), "utf-8")
        self._waiting.append(run.id)

    def _active(self, own_ids: Collection[str], visitor: str, except_id: str = "") -> int:
        """How many runs wait or run, `except_id` aside, that are among `own_ids` or that this visitor has queued."""
        active = {*self._waiting, *self.children} - {except_id}
        self._marks = {run_id: mark for run_id, mark in self._marks.items() if run_id in active}
        return sum(run_id in own_ids or (bool(visitor) and self._is_of(run_id, visitor)) for run_id in active)

    def _is_of(self, run_id: str, visitor: str) -> bool:
        """The file `queued` is gone once a run is at work; a run that an earlier server began is nobody's."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self._marks.setdefault(run_id, (self.store.root / run_id / "queued").read_text("utf-8"))
        return self._marks.get(run_id) == _mark(run_id, visitor)

    def goes_first(self) -> bool:
        """Whether the workbench has to yield to a run that is at work."""
        return self.limits.workbench_yields and bool(self.children)

    def start_failure(self, run_id: str) -> str:
        """Why a run that still seems to wait could not be started: a sentence or two; else nothing."""
        return self._failures.get(run_id, "")

    def watch(self, run_id: str) -> None:
        """Somebody looks at this run: it is not deleted."""
        self._watch_times[run_id] = time.monotonic()

    def resume(self, run_id: str, own_ids: Collection[str] = (), visitor: str = "") -> Run:
        """Queue a run that was stopped, lost or failed, to go on where it can.

        Raises:
            TrspError: no such run, it has finished or is at work, it is beyond the limits, or all places are taken.
        """
        run = self.store.get(run_id)
        with self._changed:
            self.refuse(run.config())
            self.limits.refuse_run(self._active(own_ids, visitor, except_id=run_id))
            if run_id in self._waiting or (
                run_id in self.children and run.busy()
            ):  # one that ends goes on behind that
                raise TrspError(f"Run {run_id} is running already.", "Wait for it, or stop it.")
            self._reopen(run, visitor)
            self._changed.notify()
        return run

    def _reopen(self, run: Run, visitor: str = "") -> None:
        resume.reopen(run)
        self._failures.pop(run.id, None)
        self._enqueue(run, visitor)

    def position(self, run_id: str) -> int:
        """Runs ahead of this one, itself included; 0 when it does not wait."""
        with self._changed:
            return self._waiting.index(run_id) + 1 if run_id in self._waiting else 0

    def cancel(self, run_id: str) -> None:
        """Stop the run, or take it out of the queue.

        Raises:
            TrspError: no such run, or its folder cannot be written.
        """
        run = self.store.get(run_id)
        run.cancel()
        with self._changed:
            if run_id in self._waiting:
                self._waiting.remove(run_id)
                try:
                    recorder.record(run, (e for e in [RunCancelled("queued")]))
                except OSError as error:
                    raise TrspError(
                        f"The folder of run {run_id} cannot be written: {error.strerror}.", "Free some space."
                    ) from error
            elif run_id in self.children or run.held():  # whoever started it
                if run_id not in self.children:
                    self._join(run)
                self._stop_times.setdefault(run_id, time.monotonic())

    def _adopt(self) -> None:
        """Take over what an earlier server left: what runs on, what waits, and what was stopped because it had to end
        itself."""
        for run in reversed(self.store.runs()):
            with contextlib.suppress(OSError):  # a folder that cannot be read: it is shown as what it is
                self._take_over(run)

    def _take_over(self, run: Run) -> None:
        if run.held():
            holder = run.holder()
            if holder and holder.queued:
                self._join(run)
        elif (run.folder / "queued").exists() and not run.state().ended:
            self._waiting.append(run.id)
        elif (mark := run.folder / "interrupted").exists():
            with contextlib.suppress(TrspError, OSError):  # it had finished by then, or cannot be read any more
                self._reopen(run)
            mark.unlink(missing_ok=True)

    def _join(self, run: Run) -> None:
        """Count a run that another process has started as at work."""
        holder = run.holder()
        self.children[run.id] = AdoptedProcess(run)
        self._start_times[run.id] = time.monotonic() - max(time.time() - holder.began if holder else 0.0, 0.0)

    def interrupt(self, seconds: float = SHUTDOWN_TIME) -> None:
        """The machine goes down: stop what runs at its next event, for the next server to go on with. Returns when all
        have stopped, or after `seconds`."""
        with self._changed:
            self._closed = True
            children = {Run(self.store.root / i): child for i, child in self.children.items() if self._answers_for(i)}
        for run in children:
            with contextlib.suppress(TrspError, OSError):  # a folder that is gone, or cannot be written
                if not run.cancelled():
                    (run.folder / "interrupted").touch()
                    run.cancel()
        end = time.monotonic() + seconds
        while any(child.poll() is None for child in children.values()) and time.monotonic() < end:
            time.sleep(0.05)

    def close(self) -> None:
        """Start no more runs. What waits stays in the queue, for the next server; what runs goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        supervision.serve(self._turn, lambda: self._closed)
        self.warm_worker.close()

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait(timeout=0.5)
            for run_id in list(self.children):
                supervision.take(partial(self._attend, run_id))
            while len(self.children) < self.workers and not self._closed:
                run_id = next((i for i in self._waiting if i not in self.children), None)
                if run_id is None:
                    break
                self._waiting.remove(run_id)
                self._begin(Run(self.store.root / run_id))
            self.warm_worker.attend(bool(self.children))
        self._keep_house()

    def _begin(self, run: Run) -> None:
        """Start a run whose turn it is. Where that fails, the run says so, and others have their turn."""
        try:
            if run.held():
                self._join(run)  # another server or a shell has taken it up
            elif (run.folder / "queued").exists():  # else it is deleted, or was taken up and has ended
                self.children[run.id] = self.warm_worker.take(run) or process.start(run)
                self._start_times[run.id] = time.monotonic()
        except OSError as error:
            message = f"Its process could not be started: {error.strerror or error}."
            self._not_started(
                run, RunFailed(message, "Free memory or disk, see that its folder can be written; resume.", "")
            )
        except Exception as error:
            self._not_started(run, recorder.bug(error))

    def _not_started(self, run: Run, failure: RunFailed) -> None:
        try:
            with run.hold():
                recorder.add(run, failure)
        except (TrspError, OSError):
            self._failures[run.id] = f"{failure.message} {failure.remedy}"

    def _keep_house(self) -> None:
        """Delete what is due, and give memory back, now and then."""
        now = time.monotonic()
        if now - self._last_give_back > GIVE_BACK_EVERY:
            self._last_give_back = now
            malloc.give_back()
        if now - self._last_retention < RETENTION_EVERY:
            return
        self._last_retention = now
        for run_id, at in list(self._watch_times.items()):  # whose tabs write into it meanwhile
            if now - at >= WATCHED_FOR:
                self._watch_times.pop(run_id, None)
        with contextlib.suppress(OSError):
            retention.delete_due(self.store, self.limits, list(self._watch_times))

    def _attend(self, run_id: str) -> None:
        """Hold a run at work to its time, make one end that was told to, and clear up behind one that has ended."""
        child, run = self.children[run_id], Run(self.store.root / run_id)
        if child.poll() is None:
            now = time.monotonic()
            if now - self._start_times.get(run_id, now) > self.limits.minutes * 60 and self._answers_for(run_id):
                self._overdue(run)
            stop_wait = now - self._stop_times.get(run_id, now)
            if stop_wait > 2 * GRACE:
                child.kill()
            elif stop_wait > GRACE:
                child.send_signal(signal.SIGTERM)
            return
        self._stop_times.pop(run_id, None)
        self._start_times.pop(run_id, None)
        try:
            if run_id not in self._waiting:  # as one that was stopped and is to go on
                _settle(run, child.returncode)
        except OSError:
            pass  # a deleted run's folder is gone, or the disk is full: then nothing tells how it ended
        finally:
            if run.held():
                self._join(run)  # another process was quicker
            else:
                del self.children[run_id]  # last: until then it counts as at work

    def _answers_for(self, run_id: str) -> bool:
        """Whether a run at work is this server's, and not that of another one that lives, or of a shell."""
        child = self.children[run_id]
        return not isinstance(child, AdoptedProcess) or child.orphaned()

    def _overdue(self, run: Run) -> None:
        if run.id not in self._stop_times:
            self._stop_times[run.id] = time.monotonic()
            with contextlib.suppress(TrspError):  # where its folder cannot be written, its process is told
                run.cancel(f"Its time was over: {formatting.setting(self.limits.minutes)} minutes are possible here.")


class AdoptedProcess:
    """The process of a run that this server did not start, with the part of `Popen`'s interface that the
    queue uses. Another server did, which may be gone, or a shell. How it ends is not known."""

    returncode = None

    def __init__(self, run: Run):
        self._run = run

    def poll(self) -> int | None:
        """None while it lives."""
        return None if self._run.held() else 0

    def orphaned(self) -> bool:
        """Whether a server started it that is this one, or has gone."""
        holder = self._run.holder()
        if holder is None or not holder.queued:
            return False
        try:
            return holder.parent == os.getpid() or holder.process.ppid() != holder.parent
        except psutil.Error:  # it has just ended
            return False

    def send_signal(self, number: int) -> None:
        holder = self._run.holder()
        with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
            if holder:
                holder.process.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _settle(run: Run, code: int | None) -> None:
    """Write down how the process of `run` ended, and clear up behind it, unless another is at the run by now."""
    with run.at_rest() as free:
        if free:
            if code is not None:
                write_atomic(run.folder / "exit.json", codec.encode(Exit(code)))
            (run.folder / "queued").unlink(missing_ok=True)
            run.tidy()


def _mark(run_id: str, visitor: str) -> str:
    """A digest by which a run is known to be a visitor's, and which does not name him."""
    return hashlib.sha256(f"{run_id} {visitor}".encode()).hexdigest() if visitor else ""
