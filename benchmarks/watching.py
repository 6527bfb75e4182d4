"""What one watching page costs a run: the time of its steps with somebody on its page, over that without. Real server.
Once as on one's own machine, with a real Chromium that draws on the same cores (playwright, a development package); and
once as with a browser on another machine: the page is asked for by the server's own protocol, and nothing is drawn.
Three runs of each kind in turn."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import Row, row
from benchmarks._web import PATIENCE, ROOT, chromium, server
from benchmarks.load import Visitor
from trsp_core import events as ev
from trsp_core.store import Run

PORT, TIMES = 8597, 3
Child = subprocess.Popen[bytes]
FLAGS = ["--preset", "quick", "--stage1-steps", "3", "--stage2-steps", "0", "--speed-repeats", "0"]
FLAGS += ["--sample-tokens", "0", "--save-model", "false", "--measure-blocks", "4", "--importance-blocks", "0"]


def run() -> Iterator[Row]:
    """Medians of stage 1's steps; the triples give the spread."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), PORT) as (address, _), chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        _steps(Path(folder) / "warm", lambda child: child.wait())
        here, elsewhere = [], []
        for n in range(TIMES):
            alone = _steps(Path(folder) / f"alone{n}", lambda child: child.wait())
            drawn = _steps(Path(folder) / f"drawn{n}", _drawn(tab, f"{address}/run?run=drawn{n}"))
            asked = _steps(Path(folder) / f"asked{n}", _asked(f"run?run=asked{n}"))
            here.append(drawn / alone)
            elsewhere.append(asked / alone)
    yield row("one watching page: a run's steps over those of an unwatched one", here, 1.03, "lower", runs=2 * TIMES)
    yield row("the same, its browser on another machine", elsewhere, 1.03, "lower", runs=2 * TIMES)


def _steps(folder: Path, stay: Callable[[Child], Any]) -> float:
    """Median seconds of a step of a new run; `stay` gets its process, and returns when that has ended."""
    command = [sys.executable, "-m", "trsp_core", "run", *FLAGS, "--out", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while not (folder / "events.jsonl").exists() and child.poll() is None:
            time.sleep(0.1)
        stay(child)
    at = [t for _, t, event in Run(folder).read()[0] if isinstance(event, ev.StageOneStepped)]
    return statistics.median(b - a for a, b in itertools.pairwise(at))


def _drawn(tab: Any, address: str) -> Callable[[Child], None]:
    def stay(child: Child) -> None:
        tab.goto(address)
        while child.poll() is None:
            tab.wait_for_timeout(200)
        tab.goto("about:blank")

    return stay


def _asked(address: str) -> Callable[[Child], None]:
    async def visit(child: Child) -> None:
        visitor = Visitor(address)
        watching = asyncio.create_task(visitor.visit(PORT, float("inf"), random.Random(0)))  # noqa: S311
        while child.poll() is None:
            await asyncio.sleep(0.2)
        watching.cancel()
        if visitor.lost or not visitor.ticks:
            raise RuntimeError(f"nobody watched: {visitor.lost}")

    def stay(child: Child) -> None:
        with ThreadPoolExecutor(1) as thread:  # this one's event loop is the browser's
            thread.submit(lambda: asyncio.run(visit(child))).result()

    return stay
