"""Settings and requests for this process's memory, made to the C library and the system (Linux with glibc). Where they
do not know them, nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

MMAP_THRESHOLD, ARENA_MAX = -3, -8  # as malloc.h calls them, after M_
DONTNEED = 4  # as mman.h calls it, after MADV_


def hold_steady() -> None:
    """Keep the memory of a server from growing: blocks of 64 kB or more, such as a page's charts, come straight from
    the system and go back to it when freed, instead of leaving holes in a heap; and heaps are shared. Not for training,
    which would get slower by it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
    share_heaps()


def share_heaps() -> None:
    """Let all threads that start from now on share two heaps. By default nearly each thread has a heap of its own, and
    passes that run side by side leave holes in ever more of them."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 2)


def give_back() -> None:
    """Return freed memory to the system, as far as it lies in heaps."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go_of_files(ending: str) -> None:
    """Drop from this process's memory the pages of mapped files whose names end in `ending`; they are read from the
    file again when needed. Only for private mappings that nobody has written to: what was written would be lost."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, *_ = line.split()
            if line.endswith(ending) and access.endswith("p"):
                start, end = (int(address, 16) for address in span.split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
