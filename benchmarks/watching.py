"""What one watching page costs a run: the time of its steps with a browser on its page, over that without. Two runs of
each kind in turn, real server, real Chromium (playwright, a development package)."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import Row, row
from benchmarks._web import PATIENCE, ROOT, chromium, server
from trsp_core import events as ev
from trsp_core.store import Run

PORT = 8597
FLAGS = ["--preset", "quick", "--stage1-steps", "3", "--stage2-steps", "0", "--speed-repeats", "0"]
FLAGS += ["--sample-tokens", "0", "--save-model", "false", "--measure-blocks", "4", "--importance-blocks", "0"]


def run() -> Iterator[Row]:
    """Medians of stage 1's steps; the pairs give the spread."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), PORT) as (address, _), chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        _steps(Path(folder) / "warm", None, tab)
        pairs = []
        for n in range(2):
            alone = _steps(Path(folder) / f"alone{n}", None, tab)
            watched = _steps(Path(folder) / f"watched{n}", f"{address}/run?run=watched{n}", tab)
            pairs.append(watched / alone)
    yield row("one watching page: a run's steps over those of an unwatched one", pairs, 1.03, "lower", runs=2 * 2)


def _steps(folder: Path, page: str | None, tab: Any) -> float:
    """Median seconds of a step; the page, where one is named, is open all the while."""
    command = [sys.executable, "-m", "trsp_core", "run", *FLAGS, "--out", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while page and not (folder / "events.jsonl").exists() and child.poll() is None:
            tab.wait_for_timeout(100)
        tab.goto(page or "about:blank")
        while child.poll() is None:
            tab.wait_for_timeout(200)
    at = [t for _, t, event in Run(folder).read()[0] if isinstance(event, ev.StageOneStepped)]
    return statistics.median(b - a for a, b in itertools.pairwise(at))
