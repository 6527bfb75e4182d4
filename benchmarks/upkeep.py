"""What stands around the method: writing events, starting the app, starting a run, long lists and long charts."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import Row, row
from trsp_core.pruning import validate
from trsp_core.runs import process as process_module
from trsp_core.runs import warm_worker
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "assets" / "demo_run"
RUNS, STEPS, REPEATS = 1000, 20_000, 7
LOADING = 12.0  # seconds that a waiting process is given to load
START = {
    "importance_blocks": 0,
    "sample_tokens": 0,
    "speed_repeats": 0,
    "stage1_steps": 1,
    "stage2_steps": 0,
    "measure_blocks": 1,
    "probe_blocks": 1,
    "kl_blocks": 1,
    "save_model": False,
}


def run() -> Iterator[Row]:
    """One row each."""
    yield recording()
    yield imports()
    yield from child()
    yield from pages()


def recording() -> Row:
    """Time that the recorder takes for all events of the recorded run, in percent of that run's."""
    lines, _ = Run(RECORDED).read()
    whole, shares = lines[-1][1], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            made = Store(Path(folder)).create(RunConfig())
            began = time.perf_counter()
            record(made, (event for _, _, event in lines))
            shares.append(100 * (time.perf_counter() - began) / whole)
    return row("recording events: percent of a run's time", shares, 1.0, "lower", events=len(lines), seconds=whole)


def imports() -> Row:
    """Seconds of importing app.py's parts and all pages' parts in a fresh process, Python's own start left out."""
    files = [file for file in (ROOT / "pages" / "ui").rglob("*.py") if file.stem != "__init__"]
    parts = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    code = (
        "import time, sys, importlib; began = time.perf_counter()\n"
        f"for name in ['streamlit', *{parts!r}]: importlib.import_module(name)\n"
        "print(time.perf_counter() - began); assert 'torch' not in sys.modules"
    )
    seconds = [float(_output([sys.executable, "-c", code]).split()[-1]) for _ in range(REPEATS)]
    return row("server: seconds to import app and pages", seconds[1:], 1.0, "lower", modules=len(parts))


def child() -> Iterator[Row]:
    """Seconds from starting a run to the end of its first step; it measures a block of each text before. What it would
    measure in full is its own affair. By the process that waits while the form is open, and by one of its own."""
    for ready in (True, False):
        seconds, loaded = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                made = Store(Path(folder)).create(validate.from_values(START, "quick"))
                waits = warm_worker.Spare()
                if ready:
                    waits.prepare()
                    time.sleep(warm_worker.AFTER)
                    waits.attend(busy=False)
                    time.sleep(LOADING)
                began = time.time()
                process = waits.take(made) if ready else process_module.start(made)
                if process is None or process.wait():
                    raise RuntimeError((made.folder / "stderr.log").read_text("utf-8"))
                lines, _ = made.read()
                first = (made.folder / "env.json").stat().st_mtime - began  # written as recording begins
                at = {type(e): t for _, t, e in reversed(lines)}
                seconds.append(first + at[ev.StageOneStepped])
                loaded.append(first + at[ev.ModelLoaded])
        facts = {"seconds_to_loaded_model": round(statistics.median(loaded), 2)}
        name = "run started from the form" if ready else "run with a process of its own"
        yield row(f"{name}: seconds to its first step", seconds, 5.0 if ready else None, "lower", **facts)


def pages() -> Iterator[Row]:
    """Milliseconds of a rerun of the Runs page with many runs, and of a Run page with many steps, both warm."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRSP_RUNS"] = folder
        store = Store(Path(folder))
        for _ in range(RUNS):
            record(store.create(RunConfig()), (e for e in [ev.RunPlanned([], 0), ev.RunFinished(0)]))
        yield _reruns("runs", {}, f"run list with {RUNS:,} runs: ms a rerun")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRSP_RUNS"] = folder
        made = Store(Path(folder)).create(RunConfig(stage2_steps=STEPS))
        if record(made, long_run()).ended != "finished":
            raise RuntimeError("the long run was not told to its end")
        yield _reruns("run", {"run": made.id}, f"run of {STEPS:,} steps: ms a rerun")


def long_run() -> Any:
    """The recorded run, its second stage stretched to many steps."""
    lines, _ = Run(RECORDED).read()
    steps = [event for _, _, event in lines if isinstance(event, ev.StageTwoStepped)]
    stretched = False
    for _, _, event in lines:
        if not isinstance(event, ev.StageTwoStepped):
            yield event
        elif not stretched:
            stretched = True
            for n in range(STEPS):
                like = steps[n * len(steps) // STEPS]
                yield dataclasses.replace(like, step=n + 1)


def _reruns(page: str, query: dict[str, str], name: str) -> Row:
    code = (
        "import json, sys, time\n"
        "from streamlit.testing.v1 import AppTest\n"
        f"app = AppTest.from_file({str(ROOT / 'app.py')!r}, default_timeout=300)\n"
        f"app.query_params.update({ {k: [v] for k, v in query.items()}!r})\n"
        f"app.switch_page('pages/views/{page}.py')\n"
        "began = time.perf_counter(); app.run(); told = [time.perf_counter() - began]\n"
        "assert not app.exception\n"
        f"for _ in range({REPEATS + 1}):\n"
        "    began = time.perf_counter(); app.run(); told.append(time.perf_counter() - began)\n"
        "print(json.dumps(told))\n"
    )
    first, _, *told = json.loads(_output([sys.executable, "-c", code]).splitlines()[-1])
    return row(name, [1000 * t for t in told], 150, "lower", first_ms=round(1000 * first))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout
