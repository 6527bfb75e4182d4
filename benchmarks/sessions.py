"""Ten sessions at once on the default model: all are answered or told their place, nothing is mixed up, memory stays
bounded.

Each session asks in turn for a text and for a what-if of its own. Its answers are held against those it gets alone,
from a process that has kept nothing of the first.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from benchmarks import Row, row
from trsp_core.schema import messages as an
from trsp_core.workbench.client import Workbench

MODEL = "smollm2-135m"
SESSIONS, NEW = 10, 24
TOPICS = ("sea", "moon", "king", "train", "forest", "bridge", "storm", "market", "school", "winter")
LONG = 600.0  # seconds


@dataclass
class Session:
    """What one session saw: its answers to each request, the seconds until each ended, and the places it was told."""

    answers: list[tuple] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    places: set[int] = field(default_factory=set)


def requests(number: int) -> list[an.Request]:
    """Of session `number`, unlike any other session's."""
    text = an.Generate([an.Variant(MODEL)], f"A short story about the {TOPICS[number]}:", new_tokens=NEW, trace=False)
    return [text, an.WhatIf(MODEL, [number, number + 10], sample_tokens=0)]


def visit(bench: Workbench, number: int, seen: Session) -> None:
    """Ask, and watch until the ending, as a page does."""
    for request in requests(number):
        began, ticket = time.perf_counter(), bench.ask(request)
        while (reading := bench.wait(ticket, 0.05)).ending is None:
            if time.perf_counter() - began > LONG:
                raise TimeoutError(f"session {number} was not answered within {LONG:.0f} s")
            seen.places.add(reading.place)
        seen.seconds.append(time.perf_counter() - began)
        seen.answers.append((type(reading.ending).__name__, told(reading.answers)))


def told(answers: list[an.Answer]) -> list:
    """What must not depend on who else asks: tokens, and figures without their times."""
    tokens = [a.token for a in answers if isinstance(a, an.TokenGenerated)]
    figures = [(a.removed, a.perplexity, a.kl) for a in answers if isinstance(a, an.SetMeasured)]
    sets = [(gone, *(f"{v:.4g}" for by in both for v in by.values())) for gone, *both in figures]
    return [tokens, sets]


def sit(at_once: bool) -> tuple[list[Session], int]:
    """All sessions at a new workbench; what they saw, and the most bytes that its process held."""
    bench, seen, most = Workbench(), [Session() for _ in range(SESSIONS)], 0
    threads = [threading.Thread(target=visit, args=(bench, n, session)) for n, session in enumerate(seen)]
    try:
        for thread in threads:
            thread.start()
            while thread.is_alive() and not at_once:
                most = max(most, resident())
                time.sleep(0.05)
        while any(thread.is_alive() for thread in threads):
            most = max(most, resident())
            time.sleep(0.05)
    finally:
        bench.close()
    return seen, most


def run() -> Iterator[Row]:
    """All at once, then one session after the other."""
    together, most = sit(at_once=True)
    alone, before = sit(at_once=False)
    same = [float(mine.answers == own.answers) for mine, own in zip(together, alone, strict=True)]
    waits = [s for seen in together for s in seen.seconds]
    facts = {
        "sessions": SESSIONS,
        "requests": sum(len(seen.answers) for seen in together),
        "answered": sum(a[0] == "Answered" for seen in together for a in seen.answers),
        "sessions_told_a_place": sum(any(seen.places) for seen in together),
        "farthest_place_told": max(max(seen.places, default=0) for seen in together),
        "seconds_median": round(statistics.median(waits), 2),
        "seconds_longest": round(max(waits), 2),
        "resident_mb_alone": round(before / 1e6),
        "resident_mb_most": round(most / 1e6),
    }
    yield row("sessions_answered_as_alone", same, 1.0, "higher", **facts)
    yield row("sessions_memory_over_alone", [most / before], 1.25, "lower", **facts)


def resident() -> int:
    """Bytes of the workbench's process, the only child of this one; 0 while there is none."""
    return sum(child.memory_info().rss for child in psutil.Process().children())
