"""What this process asks of the C library and the system for its memory. Where they cannot do it, nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

MMAP_THRESHOLD, ARENA_MAX = -3, -8  # as malloc.h calls them, after M_
DONTNEED = 4  # as mman.h calls it, after MADV_


def hold_steady() -> None:
    """Take every block of 64 kB or more from the system, which gets it back as soon as it is free, and share
    heaps: a page's charts come and go, and would leave holes of their size. For a server; a training step would pay."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
    share_heaps()


def share_heaps() -> None:
    """All threads to come take their memory from two heaps: passes side by side leave holes in
    each heap that they use, and each time they are others."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 2)


def give_back() -> None:
    """Return the memory that was freed in small pieces to the system."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go_of_files(ending: str) -> None:
    """Mapped files whose names end so take no memory of this process any more, until it reads them again. For private
    mappings that nobody has written to."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, *_ = line.split()
            if line.endswith(ending) and access.endswith("p"):
                start, end = (int(address, 16) for address in span.split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
