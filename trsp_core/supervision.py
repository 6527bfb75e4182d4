"""Keeps threads alive that serve others: an error in one turn is reported, and the next turn comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE = 1.0  # seconds to wait after a turn that failed


def serve(turn: Callable[[], None], closed: Callable[[], bool]) -> None:
    """Call `turn` again and again until `closed()` is true, whatever `turn` raises."""
    while not closed():
        if not take(turn):
            time.sleep(PAUSE)


def take(turn: Callable[[], object]) -> bool:
    """Call `turn` once, and return whether it raised nothing. An error is a bug: its trace is reported as Python
    reports that of a dying thread, but this thread goes on."""
    try:
        turn()
    except Exception as error:
        tell(error)
        return False
    return True


def tell(error: Exception) -> None:
    """Report `error` of this thread through `threading.excepthook`, which by default writes its trace to stderr."""
    here = threading.current_thread()
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, here)))
