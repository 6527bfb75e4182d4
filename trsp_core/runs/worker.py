"""The process that executes a run: `python -m trsp_core.runs.worker FOLDER`, and what the shell does for `run`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

from trsp_core import malloc
from trsp_core.preparation import execution, preflight
from trsp_core.preparation.preflight import RunSetup
from trsp_core.runs import recorder, resume, steering
from trsp_core.errors import TrspError
from trsp_core.schema.events import Event, Noted
from trsp_core.schema.run_state import RunState
from trsp_core.runs.store import Run

CODES = {"finished": 0, "failed": 3, "damaged": 3, "cancelled": 130}  # exit codes by how a run ended; 2 is bad input


def drive(
    run: Run,
    watch: Callable[[RunState, Event], None] = lambda state, event: None,
    setup: RunSetup | None = None,
) -> RunState:
    """Execute the config in a run folder and record it; what has broken off there goes on. A first signal stops it at
    the next event, a second one at once.

    Args:
        setup: of this config, where this process has asked `preflight` already.

    Raises:
        TrspError: the run has ended, or another process is at it.
    """
    before = run.state()
    if before.ended:
        raise TrspError(f"Run {run.id} has ended.", f"To go on: python -m trsp_core resume {run.folder}")
    if before.count and before.reopened is None:
        resume.reopen(run)
    notes = _look_at_points(run)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop(run))
    # A server has asked `preflight` before it queued the run; one that goes on may have lain for days.
    checked = (run.folder / "queued").exists() and not before.count
    return recorder.record(run, _execute(run, notes, setup, checked), watch)


def _look_at_points(run: Run) -> list[str]:
    """Drop damaged files that a run would resume from, so that their stage starts over; sentences that say so."""
    past = resume.find(run)
    if past.checkpoint or past.rounds:
        from trsp_core.training import checkpointing  # torch comes in here

        if sentence := checkpointing.without_damage(past):
            resume.reopen(run, anew=True)
            return [sentence]
    return []


def _execute(run: Run, notes: Sequence[str], setup: RunSetup | None, checked: bool) -> Generator[Event, None, None]:
    malloc.share_heaps()
    past = resume.find(run)  # as long as nothing new is told
    yield from map(Noted, notes)
    config = setup.config if setup else run.config()
    setup = preflight.recheck(config) if checked else setup
    execute = partial(execution.execute, config, run.folder, None, past, setup)
    yield from steering.steered(run, config, execute)


def _stop(run: Run) -> None:
    """A signal handler: end the run at its next event, so that the step at hand is whole; at a second signal, now."""
    if run.cancelled():
        raise KeyboardInterrupt
    try:
        run.cancel()
    except TrspError as error:  # nothing can be left in the folder to be found at the next event
        raise KeyboardInterrupt from error


def main(folder: str) -> int:
    """Execute the run in `folder`; what it fails of goes to stderr too. The exit code is as the shell's."""
    try:
        ended = drive(Run(Path(folder)))
    except TrspError as error:
        sys.stderr.write(f"{error.message} {error.remedy}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if ended.failure:
        sys.stderr.write(f"{ended.failure.message} {ended.failure.remedy}\n{ended.failure.trace}\n")
    return CODES[ended.ended]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
