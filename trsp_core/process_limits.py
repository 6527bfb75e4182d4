"""Starts child processes that die with their parent, and that have bounds of memory and processor time.

Such settings survive when a process becomes another program (exec). So a command is started through this file, run as a
script, which makes the settings and then becomes the command:

    python -I -S process_limits.py PARENT BYTES SECONDS COMMAND...

It imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
FIRST = "500"  # of at most 1000: where memory runs out, such a child goes before its parent


def held(command: Sequence[str], most_bytes: int = 0, cpu_seconds: int = 0) -> list[str]:
    """The command line that starts `command` within these bounds, for `subprocess.Popen` in this process. The child
    dies when the thread that started it does; elsewhere than on Linux it has to notice by itself that its pipes are
    closed. For `end`, start it with `process_group=0`.

    Args:
        most_bytes: of memory of its own that it may take: beyond that the system gives it none; 0 for no bound.
        cpu_seconds: of processor time, after which SIGXCPU kills it; 0 for no bound.
    """
    bounds = [str(os.getpid()), str(most_bytes), str(cpu_seconds)]
    return [sys.executable, "-I", "-S", __file__, *bounds, *command]


def end(child: subprocess.Popen, grace: float = 0.0) -> None:
    """End a child that leads its process group, and all processes that it has started, and wait until it is gone.

    Args:
        grace: seconds between SIGTERM, which lets it clear up, and SIGKILL; 0 kills at once.
    """
    if grace and child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def main(words: Sequence[str]) -> None:
    """Make the settings of this process, then become the command.

    Args:
        words: PARENT, BYTES, SECONDS and the command, as in the line above.
    """
    parent, most_bytes, cpu_seconds = (int(word) for word in words[:3])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before that
            sys.exit(1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write(FIRST)
    if most_bytes or cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    if cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    os.execvp(words[3], list(words[3:]))  # noqa: S606  # nosec B606 - a fixed list of arguments, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
