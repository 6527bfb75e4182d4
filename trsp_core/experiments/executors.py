"""Who runs the runs of a plan: this process, one after the other; the queue of a server; or the workers of a Dask
cluster that share the folder of runs. Each run is a child process of its own and writes its own folder. No torch.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trsp_core import paths
from trsp_core.errors import TrspError
from trsp_core.preparation import preflight
from trsp_core.runs import process
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Run
from trsp_core.schema.config import RunConfig


class Executor(Protocol):
    """Runs runs. It is a context manager; leaving it stops what is still at work, in writing."""

    def __enter__(self) -> Executor: ...
    def __exit__(self, *raised: object) -> None: ...

    @property
    def slots(self) -> int:
        """How many runs it takes at once."""
        ...

    def refuse(self, config: RunConfig) -> None:
        """Raise TrspError where a run with these settings cannot be done; called before its folder is made."""
        ...

    def start(self, run: Run) -> None:
        """Begin a run, now or as soon as there is someone free."""
        ...

    def ended(self, seconds: float) -> Sequence[Run]:
        """Those that ended since it was asked last; waits for one, `seconds` at most.

        Raises:
            TrspError: the executor cannot work.
        """
        ...


class LocalExecutor:
    """One child process of this one at a time."""

    slots = 1

    def __init__(self) -> None:
        self._children: dict[Run, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *raised: object) -> None:
        for run in self._children:
            _stop(run)
        for child in self._children.values():
            child.wait()

    def refuse(self, config: RunConfig) -> None:
        pass

    def start(self, run: Run) -> None:
        self._children[run] = process.start(run)

    def ended(self, seconds: float) -> Sequence[Run]:
        end = time.monotonic() + seconds
        while not (done := [run for run, child in self._children.items() if child.poll() is not None]):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        for run in done:
            del self._children[run]
        return done


class QueueExecutor:
    """The queue of a server, one run at a time, in turn with whatever else waits there. Leaving it stops nothing."""

    slots = 1

    def __init__(self, run_queue: RunQueue) -> None:
        self._run_queue = run_queue
        self._runs: list[Run] = []

    def __enter__(self) -> QueueExecutor:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def refuse(self, config: RunConfig) -> None:
        preflight.preflight(config)
        self._run_queue.refuse(config)

    def start(self, run: Run) -> None:
        self._run_queue.enqueue(run)
        self._runs.append(run)

    def ended(self, seconds: float) -> Sequence[Run]:
        """Does not wait: its caller looks again and again."""
        for run in self._runs:
            if trouble := self._run_queue.start_failure(run.id):
                raise TrspError(f"Run {run.id} could not be started.", trouble)
        ended = [run for run in self._runs if not run.waits_or_runs()]
        self._runs = [run for run in self._runs if run not in ended]
        return ended


# What a worker is sent: the scheduler reads it too, and need not have this program.
_TASK = """
import sys
sys.path.append(root)
from trsp_core.experiments import executors
executors.attend(folder)
"""


class DaskExecutor:
    """Workers of a Dask scheduler. A worker takes as many runs at once as it has threads: start it with one
    (`dask worker ADDRESS --nthreads 1`). This program and the folder of runs have the same path on all of them."""

    def __init__(self, address: str):
        """Raises TrspError: no scheduler answers at `address`, or `distributed` is not installed."""
        try:
            import distributed  # loaded where it is asked for
        except ImportError as error:
            raise TrspError("Dask is not installed.", "pip install -r requirements.txt") from error
        self._dask: Any = distributed
        try:
            self._client = distributed.Client(address, timeout=10)
        except (OSError, ValueError, TypeError) as error:
            raise TrspError(
                f"No Dask scheduler answers at {address[:80]!r}.", "Start one with: dask scheduler"
            ) from error
        self._futures: dict[Run, Any] = {}

    def __enter__(self) -> DaskExecutor:
        return self

    def __exit__(self, *raised: object) -> None:
        for run, future in self._futures.items():
            _stop(run)
            if future.status == "pending":
                future.cancel()  # one that waits is never begun; one at work ends by its cancel file
        while any(run.held() for run in self._futures):
            time.sleep(0.1)
        self._client.close()

    @property
    def slots(self) -> int:
        """One each thread of its workers, and one that waits for the next that is free."""
        threads: Any = self._client.nthreads()
        return max(1, sum(threads.values())) + 1

    def refuse(self, config: RunConfig) -> None:
        pass

    def start(self, run: Run) -> None:
        variables = {"root": str(paths.ROOT), "folder": str(run.folder)}
        self._futures[run] = self._client.submit(exec, _TASK, variables, key=run.id, pure=False, retries=0)

    def ended(self, seconds: float) -> Sequence[Run]:
        if not self._futures:
            return []
        try:
            self._dask.wait(list(self._futures.values()), timeout=seconds, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return []
        done = [run for run, future in self._futures.items() if future.done()]
        for run in done:
            error = self._futures.pop(run).exception()
            if error is not None and not run.events_file.exists():
                raise TrspError(
                    f"A worker could not begin run {run.id}: {type(error).__name__} {str(error)[:200]}.",
                    "Give all workers this program and the folder of runs (TRSP_RUNS) under the same path.",
                )
        return done


def _stop(run: Run) -> None:
    with contextlib.suppress(TrspError):  # its folder is gone, and so it ends at its next event; the others end too
        run.cancel()


def attend(folder: str) -> None:
    """On a worker: execute the run from where it is, in a process of its own, and wait for its end."""
    run = Run(Path(folder))
    while run.held():  # a worker died over it, and the scheduler asks another: its child may live on
        time.sleep(1)
    if not run.cancelled() and not run.state().ended:
        process.finish(run)
