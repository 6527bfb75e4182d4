"""A process that loads torch and transformers before it is told its run: that takes half of the time to a first step.
There is one at most, made while somebody has the form open, and it ends with its server.

    python -m trsp_core.runs.warm_worker      waits for the folder of a run on stdin, and runs it
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from trsp_core import machine, paths
from trsp_core.runs.store import Run

AFTER = 2.0  # seconds after the form was drawn: the page goes first
IDLE = 600.0  # seconds for which nobody has drawn a form, after which it is let go
ROOM = 3_000_000_000  # bytes of memory that have to be free for one: it holds some 400 MB


class WarmWorker:
    """Keeps one such process, `child`. Its owner calls all of this in one thread, but for `prepare`."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._last_form = 0.0  # when a form was drawn last, by the steady clock
        self.wanted_since = 0.0  # and when for the first time since the last process was taken

    def prepare(self) -> None:
        """Somebody may start a run soon."""
        self._last_form = time.monotonic()
        self.wanted_since = self.wanted_since or self._last_form

    def attend(self, busy: bool) -> None:
        """Make one if it is wanted, and let go of one that nobody needs. Call it now and then.

        Args:
            busy: something is at work on this machine, which a start would disturb.
        """
        now = time.monotonic()
        if self._last_form and now - self._last_form > IDLE:
            self.close()
        elif self.wanted_since and now - self.wanted_since > AFTER and not busy and not self._lives():
            with contextlib.suppress(OSError):  # then a run loads what it needs itself
                if machine.available_memory() > ROOM:
                    self.child = _spawn()

    def take(self, run: Run) -> subprocess.Popen[bytes] | None:
        """The process, which goes on as the one of `run`; None where there is none.

        Raises:
            OSError: the run's folder cannot be written.
        """
        (run.folder / "stderr.log").open("ab").close()
        child, self.wanted_since = self.child if self._lives() else None, 0.0
        self.child = None
        if child is None or child.stdin is None:
            return None
        try:
            child.stdin.write(os.fsencode(run.folder.absolute()) + b"\n")
            child.stdin.close()
        except OSError:  # it died a moment ago
            return None
        return child

    def close(self) -> None:
        """Let go of it: it ends when its input does."""
        self.wanted_since = self._last_form = 0.0
        child, self.child = self.child, None
        if child is not None and child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)

    def _lives(self) -> bool:
        return self.child is not None and self.child.poll() is None


def environment() -> dict[str, str]:
    """What a child of this process starts with, wherever that is."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(paths.ROOT), os.environ.get("PYTHONPATH", "")])}


def _spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "trsp_core.runs.warm_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,  # as `process.start`
        env=environment(),
    )


def main() -> int:
    """Load, wait, run. Without a folder it ends."""
    from transformers.models.llama import modeling_llama  # noqa: F401 - with it comes what every family needs

    from trsp_core.pruning import engine
    from trsp_core.runs import worker  # noqa: F401

    folder = sys.stdin.buffer.readline().removesuffix(b"\n")
    if not folder:
        return 0
    with (Path(os.fsdecode(folder)) / "stderr.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    return worker.main(os.fsdecode(folder))


if __name__ == "__main__":
    sys.exit(main())
