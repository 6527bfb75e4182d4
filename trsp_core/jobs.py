"""Runs as child processes, a few at a time, from a bounded queue. Knows no page and no model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from trsp_core import record
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError
from trsp_core.events import RunCancelled
from trsp_core.store import Run, Store, write_atomic

GRACE = 20.0  # seconds a run may take to stop by itself before its process is told to, and again before it is made to


class Jobs:
    """Starts queued runs in order, `workers` at a time; one a server.

    A child outlives the server: it is a session of its own, and its lock says that it lives.
    """

    def __init__(self, store: Store, workers: int = 1, places: int = 8):
        self.store, self.workers, self.places = store, workers, places
        self._waiting: deque[str] = deque()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: dict[str, float] = {}  # run to the time at which it was told to stop
        self._changed, self._closed = threading.Condition(), False
        self._adopt()
        self._thread = threading.Thread(target=self._serve, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, config: RunConfig, name: str = "") -> Run:
        """Queue a new run, in a folder of this name where one is given.

        Raises:
            TrspError: all places are taken, or the folder cannot be written.
        """
        with self._changed:
            if len(self._waiting) >= self.places:
                raise TrspError(f"All {self.places} places in the queue are taken.", "Try again in a few minutes.")
            run = self.store.create(config, self.store.root / name if name else None)
            (run.folder / "queued").touch()
            self._waiting.append(run.id)
            self._changed.notify()
        return run

    def place(self, run_id: str) -> int:
        """Runs ahead of this one, itself included; 0 when it does not wait."""
        with self._changed:
            return self._waiting.index(run_id) + 1 if run_id in self._waiting else 0

    def cancel(self, run_id: str) -> None:
        """Stop the run, or take it out of the queue.

        Raises:
            TrspError: no such run.
        """
        run = self.store.get(run_id)
        run.cancel()
        with self._changed:
            if run_id in self._waiting:
                self._waiting.remove(run_id)
                record.record(run, (e for e in [RunCancelled("queued")]))
            elif run_id in self._children:
                self._asked.setdefault(run_id, time.monotonic())

    def _adopt(self) -> None:
        """Take over what an earlier server left waiting."""
        for run in reversed(self.store.runs()):
            if (run.folder / "queued").exists() and not run.held() and not run.events_file.exists():
                self._waiting.append(run.id)

    def close(self) -> None:
        """Start no more runs. What waits stays in the queue, for the next server; what runs goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait(timeout=0.5)
                self._reap()
                while self._waiting and len(self._children) < self.workers and not self._closed:
                    run = Run(self.store.root / self._waiting.popleft())
                    if run.folder.is_dir():
                        self._children[run.id] = start(run)

    def _reap(self) -> None:
        for run_id, child in list(self._children.items()):
            if child.poll() is None:
                asked = time.monotonic() - self._asked.get(run_id, time.monotonic())
                if asked > 2 * GRACE:
                    child.kill()
                elif asked > GRACE:
                    child.send_signal(signal.SIGTERM)
                continue
            del self._children[run_id]
            self._asked.pop(run_id, None)
            folder = self.store.root / run_id
            with contextlib.suppress(OSError):  # a deleted run's folder is gone
                write_atomic(folder / "exit.json", json.dumps({"returncode": child.returncode}))
                (folder / "queued").unlink(missing_ok=True)


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
    """Run `run` in a process of its own: `python -m trsp_core run --folder ...`."""
    here = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    with (run.folder / "stderr.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trsp_core", "run", "--folder", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
