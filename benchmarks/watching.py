"""What one watching page costs a run: the time of its steps while somebody is on its page, over those without, of one
and the same process, a few steps in turn (other runs would differ by more than a page costs). Real server.

Once as on one's own machine, with a real Chromium that draws on the same cores (playwright, a development package); and
once as with a browser on another machine: the page is asked for by the server's own protocol, and nothing is drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import Row, row
from benchmarks._web import PATIENCE, ROOT, chromium, server
from benchmarks.load import Visitor
from trsp_core.runs.store import Run
from trsp_core.schema import events as ev

PORT = 8597
TURNS, STEPS = 5, 7  # visits, and steps of each, and of the time before and after each
FLAGS = ["--preset", "quick", "--stage1-steps", "20", "--stage2-steps", "0", "--measure-blocks", "4"]
FLAGS += ["--sample-tokens", "0", "--importance-blocks", "0"]
FLAGS += ["--speed-repeats", "0", "--save-model", "false"]
Visit = Callable[[], AbstractContextManager[None]]


def run() -> Iterator[Row]:
    """A ratio a visit: the median of its steps over those before and after it."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), PORT) as (address, _), chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        here = _ratios(Path(folder) / "drawn", lambda: _drawn(tab, f"{address}/run?run=drawn"))
        elsewhere = _ratios(Path(folder) / "asked", lambda: _asked("run?run=asked"))
    facts = {"visits": TURNS, "steps_of_each": STEPS}
    yield row("one watching page: a run's steps over those of an unwatched one", here, 1.03, "lower", **facts)
    yield row("the same, its browser on another machine", elsewhere, 1.03, "lower", **facts)


def _ratios(folder: Path, visit: Visit) -> list[float]:
    """Of the steps of a new run, visited now and then."""
    command = [sys.executable, "-m", "trsp_core", "run", *FLAGS, "--out", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            _after(folder, STEPS)  # the first ones are slower
            alone, watched = [_pace(folder)], []
            for _ in range(TURNS):
                with visit():
                    watched.append(_pace(folder))
                alone.append(_pace(folder))
        finally:
            child.terminate()
    between = [(before + after) / 2 for before, after in itertools.pairwise(alone)]
    return [found / usual for found, usual in zip(watched, between, strict=True)]


def _pace(folder: Path) -> float:
    """The median of the seconds that the next steps take, but for the one that is under way."""
    first = len(_steps(folder)) + 1
    times = _after(folder, first + STEPS)[first:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _after(folder: Path, count: int) -> list[float]:
    """When the first steps ended, once there are `count`."""
    while len(found := _steps(folder)) < count:
        time.sleep(1)
    return found[:count]


def _steps(folder: Path) -> list[float]:
    if not (folder / "events.jsonl").exists():
        return []
    return [at for _, at, event in Run(folder).read()[0] if isinstance(event, ev.StageOneStepped)]


@contextlib.contextmanager
def _drawn(tab: Any, address: str) -> Iterator[None]:
    tab.goto(address)
    tab.get_by_text("The stack now").wait_for()
    yield
    tab.goto("about:blank")


@contextlib.contextmanager
def _asked(address: str) -> Iterator[None]:
    """Its event loop in a thread of its own: this one's is the browser's."""
    visitor, over = Visitor(address), threading.Event()

    async def visit() -> None:
        watching = asyncio.create_task(visitor.visit(PORT, float("inf"), random.Random(0)))  # noqa: S311
        while not over.is_set():
            await asyncio.sleep(0.2)
        watching.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(visit()))
    thread.start()
    try:
        while not visitor.ticks and not visitor.lost:
            time.sleep(0.2)
        yield
    finally:
        over.set()
        thread.join()
    if visitor.lost:
        raise RuntimeError(f"nobody watched: {visitor.lost}")
