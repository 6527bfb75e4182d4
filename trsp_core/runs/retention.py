"""Which runs a server deletes by itself: those that ended long ago, and the oldest where the disk gets short. Never one
that waits or runs, that somebody watches, or that is kept. Only where `Limits` says so: the open mode deletes none.
Uploaded texts go in both modes, once no run reads them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Iterator

from trsp_core.errors import TrspError
from trsp_core.runs.limits import Limits
from trsp_core.runs.store import Run, Store

HOUR, DAY = 3600.0, 86400.0  # seconds
HALF_MADE = HOUR  # after which nobody is at a copy of a run any more


def delete_due(store: Store, limits: Limits, watched: Collection[str] = (), now: float | None = None) -> list[str]:
    """Delete what is due; returns the ids.

    Args:
        watched: ids of runs that somebody looks at.
        now: seconds since the epoch, for tests.
    """
    clear_up(store)
    now = time.time() if now is None else now
    clear_uploads(store, limits.unread_hours * HOUR, now)
    if not limits.deletes_runs:
        return []
    free = [run for run in store.runs() if run.id not in watched and not run.is_kept() and not run.busy()]
    oldest = sorted(free, key=lambda run: (run.touched(), run.id))
    deleted = [run for run in oldest if now - run.touched() > limits.days * DAY and _delete(store, run)]
    total = sum(run.size() for run in store.runs())
    for run in oldest:
        if total <= limits.disk_bytes:
            break
        size = run.size() if run not in deleted else 0
        if size and _delete(store, run):
            total -= size
            deleted.append(run)
    return [run.id for run in deleted]


def clear_up(store: Store) -> None:
    """Remove what processes that were killed have left: half-deleted runs, half-written files of runs at rest."""
    if not store.root.is_dir():
        return
    for part in store.root.glob(".deleted-*"):
        shutil.rmtree(part, ignore_errors=True)
    for part in store.root.glob(".new-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > HALF_MADE:
                shutil.rmtree(part, ignore_errors=True)
    for run in store.runs():
        with contextlib.suppress(OSError):
            run.tidy_exports()
            if not run.busy() and run.litter():
                with run.at_rest() as free:
                    if free:
                        run.tidy()


def clear_uploads(store: Store, age: float, now: float) -> None:
    """Remove the texts that were uploaded more than `age` seconds ago and that no run reads."""
    folder = store.root / "uploads"
    with contextlib.suppress(OSError):  # there is none, or another server is at it
        old = [file for file in folder.iterdir() if file.is_file() and now - file.stat().st_mtime > age]
        texts_in_use = set(_texts(store)) if old else set()
        for file in old:
            if str(file) not in texts_in_use:
                file.unlink(missing_ok=True)


def _texts(store: Store) -> Iterator[str]:
    """What the runs read, by the names in their settings."""
    for run in store.runs():
        with contextlib.suppress(TrspError, OSError):  # settings that cannot be read name no text
            config = run.config()
            yield from (config.text, config.heldout)


def _delete(store: Store, run: Run) -> bool:
    try:
        store.delete(run.id)
    except (TrspError, OSError):
        return False
    return True
