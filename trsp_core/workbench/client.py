"""The server's end of the workbench: one child process that holds models and answers requests in turn. No torch here.

    ticket = workbench.ask(Generate(...))
    reading = workbench.read(ticket)        # as often as one likes, from any session that knows the ticket

The child starts with the first request and ends after ten idle minutes, which gives its memory back. When it dies, the
request that it was working on is answered by `Broken`, and the next request starts a new one.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from trsp_core import formatting, supervision
from trsp_core.errors import TrspError
from trsp_core.paths import runs_root
from trsp_core.runs import limits
from trsp_core.schema import messages
from trsp_core.schema.messages import Answer, Request
from trsp_core.subprocesses import Child, ChildFailed

COMMAND = (sys.executable, "-m", "trsp_core", "workbench")
LOOK = 0.25  # seconds without an answer after which a request may turn out to be overdue
GRACE = 20.0  # seconds that a request may take to stop before its process is killed
PATIENT = 6  # times that, where the process gets only what a run leaves of the cores
LONGEST = 600.0  # seconds that a request may take in all
KEPT, KEPT_SECONDS = 48, 3600.0  # ended requests whose answers can still be read, and for how long
AGAIN = "It starts again with your next request."


@dataclass
class _Enquiry:
    ticket: str
    request: Request
    answers: list[Answer] = field(default_factory=list)
    ended: float | None = None  # time.monotonic() of the ending
    begun: float | None = None
    stop_asked: float | None = None
    visitor: str = ""


@dataclass(frozen=True)
class Reading:
    """What has been answered so far.

    Attributes:
        place: requests ahead of this one, itself included; 0 once it is worked on.
        answers: in order. `ending` is the last one, if it is an ending.
    """

    request: Request
    place: int
    answers: list[Answer]
    ending: Answer | None


class Workbench:
    """Requests of many sessions, answered in turn by one child process.

    Args:
        command: starts the child.
        places: requests that may wait at once.
        idle: seconds without a request after which the child is let go.
    """

    def __init__(self, command: tuple[str, ...] = COMMAND, places: int = 16, idle: float = 600.0):
        self.command, self.places, self.idle = command, places, idle
        self._enquiries: OrderedDict[str, _Enquiry] = OrderedDict()
        self._waiting: deque[_Enquiry] = deque()
        self._working: _Enquiry | None = None
        self._child: Child | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="workbench", daemon=True)
        self._thread.start()

    def ask(self, request: Request, instead: str = "", visitor: str = "") -> str:
        """Queue `request`; returns its ticket, which nobody can guess.

        Args:
            instead: ticket of an earlier request, which is cancelled; where that one still waits, this one takes its
                place, so that who changes his mind does not go back to the end of the queue.
            visitor: who asks, to the limits.

        Raises:
            TrspError: the request is beyond a limit, or all places are taken, or those of this visitor.
        """
        messages.check(request)
        limits.current().check_request(request, runs_root())
        enquiry = _Enquiry(secrets.token_urlsafe(16), request, visitor=visitor)
        with self._changed:
            if self._closed:
                raise TrspError("The workbench is closed.", "Restart the app.")
            before = self._enquiries.get(instead)
            at = self._waiting.index(before) if before in self._waiting else len(self._waiting)
            self.cancel(instead)
            if len(self._waiting) >= self.places:
                raise TrspError(f"All {self.places} places at the workbench are taken.", "Try again in a minute.")
            limits.current().refuse_request(sum(waiting.visitor == visitor for waiting in self._waiting))
            self._forget()
            self._enquiries[enquiry.ticket] = enquiry
            self._waiting.insert(at, enquiry)
            self._changed.notify_all()
        return enquiry.ticket

    def read(self, ticket: str) -> Reading:
        """What has been answered to the request with `ticket` so far.

        Raises:
            TrspError: no such request, or it was asked too long ago.
        """
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is None:
                raise TrspError("These answers are no longer kept.", "Ask again.")
            place = self._waiting.index(enquiry) + 1 if enquiry in self._waiting else 0
            answers = list(enquiry.answers)
        return Reading(enquiry.request, place, answers, answers[-1] if enquiry.ended is not None else None)

    def wait(self, ticket: str, timeout: float) -> Reading:
        """`read`, after the ending or after `timeout` seconds."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is not None:
                self._changed.wait_for(lambda: enquiry.ended is not None, timeout)
        return self.read(ticket)

    def follow(self, ticket: str, count: int, timeout: float) -> Reading:
        """`read`, once there are more than `count` answers, or after `timeout` seconds."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is not None:
                self._changed.wait_for(lambda: len(enquiry.answers) > count, timeout)
        return self.read(ticket)

    def cancel(self, ticket: str) -> None:
        """Stop the request with `ticket`; one that has ended, or is not known, is left as it is."""
        with self._changed:
            enquiry = self._enquiries.get(ticket)
            if enquiry is None or enquiry.ended is not None:
                return
            if enquiry in self._waiting:
                self._waiting.remove(enquiry)
                self._add(enquiry, messages.Stopped())
            elif enquiry.stop_asked is None:
                enquiry.stop_asked = time.monotonic()
                if self._child:
                    self._child.send(messages.pack(ticket, messages.Cancel()))

    def close(self) -> None:
        """Let the child go; whatever waits is answered by `Stopped`."""
        with self._changed:
            self._closed = True
            for enquiry in [*self._waiting, *([self._working] if self._working else [])]:
                if enquiry.ended is None:
                    self._add(enquiry, messages.Stopped())
            self._waiting.clear()
            self._changed.notify_all()
            child = self._child
        if child:
            child.end()

    def _serve(self) -> None:
        supervision.serve(self._turn, lambda: self._closed)

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, self.idle)
            self._working = self._waiting.popleft() if self._waiting else None
        if self._working is None:
            self._let_go()
            return
        try:
            self._work(self._working)
        except OSError as error:
            why = f"The workbench process could not be started or reached: {error.strerror or error}."
            self._add(self._working, messages.Broken(why, AGAIN))
            self._let_go()
        except Exception as error:  # a bug here must not leave a reader waiting
            trace = "".join(traceback.format_exception(error))[-20_000:]
            self._add(self._working, messages.Broken(f"{type(error).__name__}: {error}", "Please report this.", trace))
            self._let_go()
        finally:
            with self._changed:
                self._working = None

    def _work(self, enquiry: _Enquiry) -> None:
        child = self._ready()
        enquiry.begun = time.monotonic()
        child.send(messages.pack(enquiry.ticket, enquiry.request))
        if enquiry.stop_asked is not None:
            child.send(messages.pack(enquiry.ticket, messages.Cancel()))
        while enquiry.ended is None:
            try:
                line = child.read(LOOK)
            except TimeoutError:
                if reason := _overdue(enquiry):
                    self._let_go()
                    self._add(enquiry, _died(reason))
                continue
            except ChildFailed as failure:
                self._let_go()
                self._add(enquiry, _died(failure.ending))
                return
            if line is None:
                failure = self._let_go()
                self._add(enquiry, _died(failure.ending, failure.stderr[-4000:]))
                return
            ticket, answer = messages.unpack(line)
            if ticket == enquiry.ticket and isinstance(answer, Answer):
                self._add(enquiry, answer)
                if isinstance(answer, messages.SetMeasured) and self._waiting and limits.current().workbench_yields:
                    self.cancel(ticket)  # others' figures before its sample of text

    def _ready(self) -> Child:
        if self._child is None or not self._child.alive:
            self._let_go()
            with self._changed:
                self._child = Child(self.command)
        return self._child

    def _add(self, enquiry: _Enquiry, answer: Answer) -> None:
        with self._changed:
            if enquiry.ended is not None:
                return
            enquiry.answers.append(answer)
            if isinstance(answer, messages.ENDINGS):
                enquiry.ended = time.monotonic()
            self._changed.notify_all()

    def _let_go(self) -> ChildFailed:
        """End the child, if there is one. For the thread that reads its answers."""
        with self._changed:
            child, self._child = self._child, None
        return child.close() if child else ChildFailed(0)

    def _forget(self) -> None:
        """Drop the answers of requests that ended long ago, oldest first."""
        ended = [e for e in self._enquiries.values() if e.ended is not None]
        for n, enquiry in enumerate(ended):
            if len(ended) - n > KEPT or time.monotonic() - (enquiry.ended or 0) > KEPT_SECONDS:
                del self._enquiries[enquiry.ticket]


def _died(how: str, stderr: str = "") -> messages.Broken:
    return messages.Broken(f"The workbench process ended: {how}.", AGAIN, stderr)


def _overdue(enquiry: _Enquiry) -> str:
    """Why the child should be killed now; "" while it should not."""
    now = time.monotonic()
    grace = GRACE * (PATIENT if limits.current().workbench_yields else 1)
    if enquiry.stop_asked is not None and now - enquiry.stop_asked > grace:
        return f"it did not stop within {formatting.duration(grace)}"
    if now - (enquiry.begun or now) > LONGEST:
        return f"a request took more than {formatting.duration(LONGEST)}"
    return ""
