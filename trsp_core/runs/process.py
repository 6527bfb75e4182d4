"""A run's child process: started, and asked to end."""

from __future__ import annotations

import subprocess
import sys

from trsp_core.runs.warm_worker import environment
from trsp_core.runs.store import Run


def finish(run: Run) -> None:
    """Run `run` in a process of its own and wait for its end; an interruption stops it and is passed on."""
    with start(run) as child:
        try:
            child.wait()
        except KeyboardInterrupt:
            run.cancel()
            child.wait()
            raise


def start(run: Run) -> subprocess.Popen[bytes]:
    """Run `run` in a process of its own: `python -m trsp_core.runs.worker FOLDER`."""
    with (run.folder / "stderr.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trsp_core.runs.worker", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            process_group=0,  # an interrupt from the keyboard is the server's to handle
            env=environment(),
        )
