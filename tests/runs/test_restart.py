"""The real server is told to end, as a container is: its run stops in writing, and the next server goes on with it,
though nobody has opened a page."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT, tiny
from tests.runs.test_resume import TINY
from trsp_core.pruning import validate
from trsp_core.runs.store import Store

pytestmark = pytest.mark.slow


def serve(runs, home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    environment = {**os.environ, "TRSP_RUNS": str(runs), "TRSP_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_server_that_is_told_to_end_stops_its_run_and_the_next_goes_on(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    changed = {"model": str(tiny_model), "text": str(text), "heldout": str(text), "stage2_steps": 3000}
    store = Store(tmp_path / "runs")
    run = store.create(validate.from_values({**TINY, **changed, "probe_every": 1, "resume_minutes": 1e-9}))
    (run.folder / "queued").touch()
    first = serve(store.root, tmp_path)
    try:
        until(lambda: len(run.state().gap_steps) > 5)
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) is not None
    finally:
        first.kill()
    assert run.status() == "cancelled"
    steps = len(run.state().gap_steps)
    second = serve(store.root, tmp_path)
    try:
        until(lambda: run.status() == "running" and len(run.state().gap_steps) > steps)
        folded = run.state()
        assert [s.step for s in folded.gap_steps] == list(range(1, len(folded.gap_steps) + 1))
        assert not (run.folder / "interrupted").exists()
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(30)
        second.kill()
    until(lambda: not run.held())
    assert run.status() == "cancelled"
