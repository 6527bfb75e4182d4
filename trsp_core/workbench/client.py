"""The server's end of the workbench: one child process that holds models and answers requests in turn. No torch here.

    ticket = workbench.ask(Generate(...))
    reading = workbench.read(ticket)        # as often as one likes, from any session that knows the ticket

The child starts with the first request and ends after ten idle minutes, which gives its memory back. When it dies, the
request that it was working on is answered by `Broken`, and the next request starts a new one.

Nothing is done twice, nor for nobody: what ships recorded is answered without the child (`recorded`); equal requests
are one task with several tickets; and a task for which nobody listens any more is dropped.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from trsp_core import formatting, supervision
from trsp_core.errors import TrspError
from trsp_core.paths import runs_root
from trsp_core.runs import limits
from trsp_core.schema import messages
from trsp_core.schema.messages import Answer, Request
from trsp_core.subprocesses import Child, ChildFailed
from trsp_core.workbench import recorded

COMMAND = (sys.executable, "-m", "trsp_core", "workbench")
LOOK = 0.25  # seconds without an answer after which a request may turn out to be overdue
GRACE = 20.0  # seconds that a request may take to stop before its process is killed
PATIENT = 6  # times that, where the process gets only what a run leaves of the cores
LONGEST = 600.0  # seconds that a request may take in all
KEPT, KEPT_SECONDS = 48, 3600.0  # ended requests whose answers can still be read, and for how long
UNREAD = 30.0  # seconds without a look from whoever has left: a refresh comes back sooner
AGAIN = "It starts again with your next request."


@dataclass(eq=False)
class _Task:
    """Work for the child, asked for by one ticket or, where equal requests met, by several. Times are of
    `time.monotonic`."""

    request: Request
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # to the child
    answers: list[Answer] = field(default_factory=list)
    ended: float | None = None
    begun: float | None = None
    stop_asked: float | None = None
    enquiries: list[_Enquiry] = field(default_factory=list)

    def wanted(self) -> bool:
        """Whether somebody still listens, or has looked a moment ago."""
        now = time.monotonic()
        return any(enquiry.listens() or now - enquiry.last_look < UNREAD for enquiry in self.enquiries)


@dataclass(eq=False)
class _Enquiry:
    """One ticket: what was asked, and the task that answers it.

    Attributes:
        recorded: answers that ship with the app; those of the task follow.
        count: how many answers of the task had come when this ticket was cancelled, while others waited on for it; None
            where it was not.
    """

    request: Request
    task: _Task
    recorded: list[Answer]
    visitor: str
    listens: Callable[[], bool]
    last_look: float = field(default_factory=time.monotonic)
    count: int | None = None

    def answers(self) -> list[Answer]:
        if self.count is not None:
            return [*self.recorded, *self.task.answers[: self.count], messages.Stopped()]
        return [*self.recorded, *self.task.answers]

    @property
    def over(self) -> bool:
        """Whether there is an ending."""
        return self.count is not None or self.task.ended is not None


@dataclass(frozen=True)
class Reading:
    """What has been answered so far.

    Attributes:
        place: requests ahead of this one, itself included; 0 once it is worked on.
        answers: in order. `ending` is the last one, if it is an ending.
        others: how many of the requests ahead, the one at work among them, are other visitors'.
        at_work: the request that is worked on now.
    """

    request: Request
    place: int
    answers: list[Answer]
    ending: Answer | None
    others: int = 0
    at_work: Request | None = None


def _always() -> bool:
    return True


class Workbench:
    """Requests of many sessions, answered in turn by one child process.

    Args:
        command: starts the child.
        places: tasks that may wait at once.
        idle: seconds without a request after which the child is let go.
    """

    def __init__(self, command: tuple[str, ...] = COMMAND, places: int = 16, idle: float = 600.0):
        self.command, self.places, self.idle = command, places, idle
        self._enquiries: OrderedDict[str, _Enquiry] = OrderedDict()
        self._waiting: deque[_Task] = deque()
        self._working: _Task | None = None
        self._prepared: set[Request] = set()
        self._child: Child | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="workbench", daemon=True)
        self._thread.start()

    def ask(self, request: Request, instead: str = "", visitor: str = "", listens: Callable[[], bool] = _always) -> str:
        """Queue `request`, or what the record leaves of it; returns its ticket, which nobody can guess.

        Args:
            instead: ticket of an earlier request, which is cancelled; where that one still waits, this one takes its
                place, so that who changes his mind does not go back to the end of the queue.
            visitor: who asks, to the limits.
            listens: whether whoever asks is still there; once nobody is, the request is dropped.

        Raises:
            TrspError: the request is beyond a limit, or all places are taken, or those of this visitor.
        """
        messages.check(request)
        limits.current().check_request(request, runs_root())
        known, rest = recorded.answers(request)
        with self._changed:
            if self._closed:
                raise TrspError("The workbench is closed.", "Restart the app.")
            self._forget()
            if rest is None:
                now = time.monotonic()
                task = _Task(request, answers=[messages.Answered(0.0)], begun=now, ended=now)
            else:
                task = self._task(rest, instead, visitor)
            ticket = secrets.token_urlsafe(16)
            self._enquiries[ticket] = enquiry = _Enquiry(request, task, known, visitor, listens)
            task.enquiries.append(enquiry)
            self.cancel(instead)
            self._changed.notify_all()
        return ticket

    def prepare(self, request: messages.Prepare) -> None:
        """Have the child load a model, unless it has done so already or is asked to; whatever a person asks goes first.
        What forbids it is no news to anybody: the question that needs the model will say so."""
        with self._changed:
            if request not in self._prepared and not self._closed:
                with contextlib.suppress(TrspError):
                    self.ask(request)
                self._prepared.add(request)

    def read(self, ticket: str) -> Reading:
        """What has been answered to the request with `ticket` so far.

        Raises:
            TrspError: no such request, or it was asked too long ago.
        """
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is None:
                raise TrspError("These answers are no longer kept.", "Ask again.")
            enquiry.last_look, answers = time.monotonic(), enquiry.answers()
            waits = enquiry.task in self._waiting and not enquiry.over
            ahead = list(self._waiting)[: self._waiting.index(enquiry.task)] if waits else []
            before = [*([self._working] if self._working else []), *ahead] if waits else []
            others = sum(all(e.visitor != enquiry.visitor for e in task.enquiries) for task in before)
            at_work = self._working.request if self._working else None
        ending = answers[-1] if enquiry.over else None
        return Reading(enquiry.request, len(ahead) + 1 if waits else 0, answers, ending, others, at_work)

    def wait(self, ticket: str, timeout: float) -> Reading:
        """`read`, after the ending or after `timeout` seconds."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is not None:
                self._changed.wait_for(lambda: enquiry.over, timeout)
        return self.read(ticket)

    def follow(self, ticket: str, count: int, timeout: float) -> Reading:
        """`read`, once there are more than `count` answers, or after `timeout` seconds."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is not None:
                self._changed.wait_for(lambda: len(enquiry.answers()) > count, timeout)
        return self.read(ticket)

    def cancel(self, ticket: str) -> None:
        """Stop the request with `ticket`; one that has ended, or is not known, is left as it is. Where others wait for
        the same answers, their task goes on."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is None or enquiry.over:
                return
            task = enquiry.task
            if len(task.enquiries) > 1:
                task.enquiries.remove(enquiry)
                enquiry.count = len(task.answers)
                self._changed.notify_all()
            else:
                self._stop(task)

    def close(self) -> None:
        """Let the child go; whatever waits is answered by `Stopped`."""
        with self._changed:
            self._closed = True
            for task in [*self._waiting, *([self._working] if self._working else [])]:
                if task.ended is None:
                    self._add(task, messages.Stopped())
            self._waiting.clear()
            self._changed.notify_all()
            child = self._child
        if child:
            child.end()

    def _task(self, request: Request, instead: str, visitor: str) -> _Task:
        """The task of an equal request that is not answered yet; else a new one, among those that wait: in the place of
        `instead`, at the end, and before what is only prepared."""
        under_way = [*([self._working] if self._working else []), *self._waiting]
        same = [t for t in under_way if t.request == request and t.ended is None and t.stop_asked is None]
        before = self._enquiries.get(instead)
        replaced = before.task if before and len(before.task.enquiries) == 1 else None
        counted = [task for task in under_way if task is not replaced and (task in self._waiting or task in same)]
        limits.current().refuse_request(sum(e.visitor == visitor for task in counted for e in task.enquiries))
        if same:
            return same[0]
        if len(self._waiting) - (replaced in self._waiting) >= self.places:
            raise TrspError(f"All {self.places} places at the workbench are taken.", "Try again in a minute.")
        at = len(self._waiting)
        if replaced in self._waiting:
            at = self._waiting.index(replaced)
        elif not isinstance(request, messages.Prepare):
            places = [n for n, task in enumerate(self._waiting) if not isinstance(task.request, messages.Prepare)]
            at = places[-1] + 1 if places else 0
        task = _Task(request)
        self._waiting.insert(at, task)
        return task

    def _stop(self, task: _Task) -> None:
        """End a task that waits, and ask the child to stop one that it works on."""
        if task in self._waiting:
            self._waiting.remove(task)
            self._add(task, messages.Stopped())
        elif task.stop_asked is None and task.ended is None:
            task.stop_asked = time.monotonic()
            if self._child:
                self._child.send(messages.pack(task.name, messages.Cancel()))

    def _serve(self) -> None:
        supervision.serve(self._turn, lambda: self._closed)

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, self.idle)
            task = self._waiting.popleft() if self._waiting else None
            if task and not task.wanted():
                self._add(task, messages.Stopped())
                return
            self._working = task
        if task is None:
            self._let_go()
            return
        try:
            self._work(task)
        except OSError as error:
            why = f"The workbench process could not be started or reached: {error.strerror or error}."
            self._add(task, messages.Broken(why, AGAIN))
            self._let_go()
        except Exception as error:  # a bug here must not leave a reader waiting
            trace = "".join(traceback.format_exception(error))[-20_000:]
            self._add(task, messages.Broken(f"{type(error).__name__}: {error}", "Please report this.", trace))
            self._let_go()
        finally:
            with self._changed:
                self._working = None

    def _work(self, task: _Task) -> None:
        child = self._ready()
        task.begun = time.monotonic()
        child.send(messages.pack(task.name, task.request))
        if task.stop_asked is not None:
            child.send(messages.pack(task.name, messages.Cancel()))
        while task.ended is None:
            try:
                line = child.read(LOOK)
            except TimeoutError:
                if reason := _overdue(task):
                    self._let_go()
                    self._add(task, _died(reason))
                self._drop_unwanted(task)
                continue
            except ChildFailed as failure:
                self._let_go()
                self._add(task, _died(failure.ending))
                return
            if line is None:
                failure = self._let_go()
                self._add(task, _died(failure.ending, failure.stderr[-4000:]))
                return
            name, answer = messages.unpack(line)
            if name == task.name and isinstance(answer, Answer):
                self._add(task, answer)
                self._drop_unwanted(task)
                if isinstance(answer, messages.SetMeasured) and limits.current().workbench_yields:
                    self._let_others_first(task)

    def _drop_unwanted(self, task: _Task) -> None:
        with self._changed:
            if not task.wanted():
                self._stop(task)

    def _let_others_first(self, task: _Task) -> None:
        """Stop `task`, whose sample of text is still to come, where others wait for their figures."""
        with self._changed:
            if any(not isinstance(other.request, messages.Prepare) for other in self._waiting):
                self._stop(task)

    def _ready(self) -> Child:
        if self._child is None or not self._child.alive:
            self._let_go()
            with self._changed:
                self._child = Child(self.command)
        return self._child

    def _add(self, task: _Task, answer: Answer) -> None:
        with self._changed:
            if task.ended is not None:
                return
            task.answers.append(answer)
            if isinstance(answer, messages.ENDINGS):
                task.ended = time.monotonic()
            self._changed.notify_all()

    def _let_go(self) -> ChildFailed:
        """End the child, if there is one. For the thread that reads its answers."""
        with self._changed:
            child, self._child = self._child, None
            if child:
                self._prepared.clear()
        return child.close() if child else ChildFailed(0)

    def _forget(self) -> None:
        """Drop the answers of requests that ended long ago, oldest first."""
        ended = [(ticket, enquiry.task) for ticket, enquiry in self._enquiries.items() if enquiry.over]
        for n, (ticket, task) in enumerate(ended):
            if len(ended) - n > KEPT or time.monotonic() - (task.ended or time.monotonic()) > KEPT_SECONDS:
                del self._enquiries[ticket]


def _died(how: str, stderr: str = "") -> messages.Broken:
    return messages.Broken(f"The workbench process ended: {how}.", AGAIN, stderr)


def _overdue(task: _Task) -> str:
    """Why the child should be killed now; "" while it should not."""
    now = time.monotonic()
    grace = GRACE * (PATIENT if limits.current().workbench_yields else 1)
    if task.stop_asked is not None and now - task.stop_asked > grace:
        return f"it did not stop within {formatting.duration(grace)}"
    if now - (task.begun or now) > LONGEST:
        return f"a request took more than {formatting.duration(LONGEST)}"
    return ""
