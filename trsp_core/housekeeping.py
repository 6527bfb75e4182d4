"""Which runs a server deletes by itself: those that ended long ago, and the oldest where the disk gets short. Never one
that waits or runs, that somebody watches, or that is kept. Only where `Limits` says so: the open mode deletes none."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from trsp_core.errors import TrspError
from trsp_core.limits import Limits
from trsp_core.store import Run, Store

DAY = 86400.0  # seconds
MMAP_THRESHOLD, ARENA_MAX = -3, -8  # as malloc.h calls them, after M_
DONTNEED = 4  # as mman.h calls it, after MADV_


def hold_memory_steady() -> None:
    """Take every block of 64 kB or more from the system, which gets it back as soon as it is free, and let all threads
    share two heaps, where the C library can: a page's charts come and go, and would leave holes of their size. For a
    server; a training step would pay."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
        ctypes.CDLL(None).mallopt(ARENA_MAX, 2)


def give_memory_back() -> None:
    """Return the memory that was freed in small pieces to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go_of_files(ending: str) -> None:
    """Mapped files whose names end so take no memory of this process any more, until it reads them again. For private
    mappings that nobody has written to; where the system does not tell of them nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, *_ = line.split()
            if line.endswith(ending) and access.endswith("p"):
                start, end = (int(address, 16) for address in span.split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)


def sweep(store: Store, limits: Limits, watched: Collection[str] = (), now: float | None = None) -> list[str]:
    """Delete what is due; returns the ids.

    Args:
        watched: ids of runs that somebody looks at.
        now: seconds since the epoch, for tests.
    """
    clear_up(store)
    if not limits.sweeps:
        return []
    now = time.time() if now is None else now
    free = [run for run in store.runs() if run.id not in watched and not run.kept() and not run.busy()]
    oldest = sorted(free, key=lambda run: (run.touched(), run.id))
    gone = [run for run in oldest if now - run.touched() > limits.days * DAY and _delete(store, run)]
    used = sum(run.size() for run in store.runs())
    for run in oldest:
        if used <= limits.disk_bytes:
            break
        size = run.size() if run not in gone else 0
        if size and _delete(store, run):
            used -= size
            gone.append(run)
    return [run.id for run in gone]


def clear_up(store: Store) -> None:
    """Remove what processes that were killed have left: half-deleted runs, half-written files of runs at rest."""
    if not store.root.is_dir():
        return
    for part in store.root.glob(".deleted-*"):
        shutil.rmtree(part, ignore_errors=True)
    for run in store.runs():
        with contextlib.suppress(OSError):
            if not run.busy():
                run.tidy()


def _delete(store: Store, run: Run) -> bool:
    try:
        store.delete(run.id)
    except (TrspError, OSError):
        return False
    return True
