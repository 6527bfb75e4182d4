"""Threads that serve others: what goes wrong in one turn is told, and the next turn comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE = 1.0  # seconds after a turn that went wrong


def serve(turn: Callable[[], None], closed: Callable[[], bool]) -> None:
    """Call `turn` again and again until `closed`, whatever it raises."""
    while not closed():
        if not take(turn):
            time.sleep(PAUSE)


def take(turn: Callable[[], object]) -> bool:
    """Call `turn`; whether it went well. What it raises is a bug: its trace is told as that of a thread that dies of
    it, but this one goes on."""
    try:
        turn()
    except Exception as error:
        tell(error)
        return False
    return True


def tell(error: Exception) -> None:
    """Tell of an error in this thread that has nobody else to be told to."""
    here = threading.current_thread()
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, here)))
