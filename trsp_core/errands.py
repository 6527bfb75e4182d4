"""Short work that a page leaves to a child process: asked once, as JSON on stdin, answered in steps, a JSON line each.

So the server imports no torch, and what is secret stands in no list of processes and in no environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_core.errors import TrspError

GRACE = 10.0  # seconds that a child which is not wanted any more has to clear up


@dataclass(frozen=True)
class Step:
    """How far the work is: a sentence, and the share that is done, 0 to 1."""

    message: str
    fraction: float


def run(module: str, **asked: Any) -> Iterator[Step]:
    """Let `python -m trsp_core.MODULE` do what is `asked`, and pass on its steps. Closing the iterator stops it.

    Raises:
        TrspError: as the child raised it, or that it ended without a word.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", f"trsp_core.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
    )
    assert child.stdin
    assert child.stdout
    assert child.stderr
    last: dict[str, Any] = {}
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asked))
            child.stdin.close()
        for line in child.stdout:
            last = json.loads(line)
            if "message" in last:
                yield Step(last["message"], float(last["fraction"]))
        child.wait()
    finally:
        _end(child)
    if "error" in last:
        raise TrspError(last["error"], last["remedy"])
    if child.returncode:
        said = child.stderr.read().strip()[-500:]
        why = said or "it was stopped, most likely because the machine ran out of memory"
        raise TrspError(f"The work ended with code {child.returncode}: {why}.", "Try again.")


def serve(work: Callable[..., Iterator[Step]]) -> int:
    """The child's side: do what stdin asks; 0, or 1 with the refusal as the last line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = json.loads(sys.stdin.read())
    try:
        for step in work(**asked):
            _tell(message=step.message, fraction=step.fraction)
    except TrspError as error:
        _tell(error=error.message, remedy=error.remedy)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _tell(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
