"""A child process that dies with its parent, and within bounds of memory and processor time where some are given.

The system keeps such settings when a process becomes another program. So a command is started through this file, run as
a script of its own, which sets them and becomes the command. Imports nothing of ours.

    python -I -S process_limits.py PARENT BYTES SECONDS COMMAND...
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
    """`command`, to be started by this process so that it dies when the thread that started it does (on Linux;
    elsewhere a child has to notice that its pipes are closed). Who wants to `end` it starts it with `process_group=0`.

    Args:
        most_bytes: of memory of its own that it may take; 0 for no bound. Beyond it, it gets no more.
        cpu_seconds: of processor time, after which it is killed by SIGXCPU; 0 for no bound.
    """
    bounds = [str(os.getpid()), str(most_bytes), str(cpu_seconds)]
    return [sys.executable, "-I", "-S", __file__, *bounds, *command]


def end(child: subprocess.Popen, grace: float = 0.0) -> None:
    """End a child that leads its process group, and all that it has started.

    Args:
        grace: seconds that it has to clear up after it was asked to end; 0 asks nothing.
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
    """Set what is to be set and become the command."""
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
