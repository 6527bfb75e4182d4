"""Work that is left to a child process: asked once, as JSON on stdin, answered in steps, a JSON line each."""

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
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from trsp_core import formatting, paths, process_limits
from trsp_core.errors import TrspError

GRACE = 10.0  # seconds that a child which is not wanted any more has to clear up
AGAIN = 1.0  # seconds after which a step is told again, so that whoever reads it gets a chance to stop


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
    """What `python -m MODULE ARGUMENTS...` says, an object a line. Closing the iterator ends it.

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
            process_limits.held([sys.executable, "-m", module, *arguments]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(paths.ROOT), *sys.path])},
        )
        assert child.stdin
        assert child.stdout

        def end_late() -> None:
            late.set()
            process_limits.end(child)

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
            process_limits.end(child, grace)
            child.stdout.close()
        if child.returncode:
            complaints.seek(0)
            raise Ended(child.returncode, complaints.read().strip()[-500:], late.is_set())


def run(module: str, seconds: float = math.inf, **asked: Any) -> Generator[Step]:
    """Let `python -m MODULE` do what is `asked`, and pass on its steps, some of them several times. Closing
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
                f"It took more than {formatting.setting(seconds / 60)} minutes, and was ended.",
                "Try again when less goes on here.",
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
