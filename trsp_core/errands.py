"""Short work that a page leaves to a child process: asked once, as JSON on stdin, answered in steps, a JSON line each.

So the server imports no torch, and what is secret stands in no list of processes and in no environment. A server does
one errand at a time (`Errands`), and each goes on whichever tab is closed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp_core import leash, limits
from trsp_core.errors import TrspError
from trsp_core.limits import Limits
from trsp_core.store import Run

GRACE = 10.0  # seconds that a child which is not wanted any more has to clear up
AGAIN = 1.0  # seconds after which a step is told again, so that whoever reads it gets a chance to stop
KEPT = 64  # errands that have ended and are still told of


@dataclass(frozen=True)
class Step:
    """How far the work is: a sentence, and the share that is done, 0 to 1."""

    message: str
    fraction: float


class Ended(Exception):
    """A child ended badly.

    Attributes:
        code: its exit code; `complaint` is the end of its stderr.
        late: its time was over.
    """

    def __init__(self, code: int, complaint: str, late: bool):
        super().__init__(f"code {code}")
        self.code, self.complaint, self.late = code, complaint, late


def lines(
    module: str, *arguments: str, asked: str = "", seconds: float = math.inf, grace: float = 0.0
) -> Iterator[dict[str, Any]]:
    """What `python -m trsp_core.MODULE ARGUMENTS...` says, an object a line. Closing the iterator ends it.

    Args:
        asked: what it reads on stdin.
        seconds: after which it is ended, and what it has started with it.
        grace: seconds that it has to clear up where it is closed.

    Raises:
        Ended: it ended badly.
    """
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        child = subprocess.Popen(
            leash.held([sys.executable, "-m", f"trsp_core.{module}", *arguments]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
        )
        assert child.stdin
        assert child.stdout

        def end_late() -> None:
            late.set()
            leash.end(child)

        clock = threading.Timer(seconds, end_late)
        clock.daemon = True
        if math.isfinite(seconds):
            clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(asked)
                child.stdin.close()
            for line in child.stdout:
                yield json.loads(line)
            child.wait()
        finally:
            clock.cancel()
            leash.end(child, grace)
            child.stdout.close()
        if child.returncode:
            complaints.seek(0)
            raise Ended(child.returncode, complaints.read().strip()[-500:], late.is_set())


def run(module: str, seconds: float = math.inf, **asked: Any) -> Generator[Step]:
    """Let `python -m trsp_core.MODULE` do what is `asked`, and pass on its steps, some of them several times. Closing
    the iterator stops it.

    Args:
        seconds: that it may take.

    Raises:
        TrspError: as the child raised it, that its time was over, or that it ended without a word.
    """
    last: dict[str, Any] = {}
    try:
        for last in lines(module, asked=json.dumps(asked), seconds=seconds, grace=GRACE):
            if "message" in last:
                yield Step(last["message"], float(last["fraction"]))
    except Ended as ended:
        if ended.late:
            raise TrspError(
                f"It took more than {seconds / 60:g} minutes, and was ended.", "Try again when less goes on here."
            ) from ended
        if "error" in last:
            raise TrspError(last["error"], last["remedy"]) from ended
        why = ended.complaint or "it was stopped, most likely because the machine ran out of memory"
        raise TrspError(f"The work ended with code {ended.code}: {why}.", "Try again.") from ended


def serve(work: Callable[..., Iterator[Step]]) -> int:
    """The child's side: do what stdin asks; 0, or 1 with the refusal as the last line. What a library prints goes to
    stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    last: dict[str, Any] = {}
    writing, done = threading.Lock(), threading.Event()

    def tell(**values: Any) -> None:
        with writing:
            last.update(values)
            out.write(json.dumps(values) + "\n")
            out.flush()

    def repeat() -> None:
        while not done.wait(AGAIN):
            if last:
                tell(**last)

    teller = threading.Thread(target=repeat, daemon=True)
    teller.start()
    refusal: dict[str, str] = {}
    try:
        for step in work(**json.loads(sys.stdin.read())):
            tell(message=step.message, fraction=step.fraction)
    except TrspError as error:
        refusal = {"error": error.message, "remedy": error.remedy}
    except KeyboardInterrupt:
        return 130
    finally:
        done.set()
        teller.join()
    if refusal:
        tell(**refusal)
    return 1 if refusal else 0


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
    step: Step = Step("Waiting", 0.0)
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
            asked: of `python -m trsp_core.MODULE`, beside the folder of the run.

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
        steps = run(errand.module, self.limits.errand_minutes * 60, **errand.asked)
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
