"""The process that waits for a run with everything loaded: it runs what it is given, and never outlives its use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from trsp_core.runs import warm_worker
from trsp_core.runs.queue import Jobs
from trsp_core.runs.store import Store
from trsp_core.runs.warm_worker import Spare
from trsp_core.schema.config import RunConfig


def until(truth, seconds=120):
    end = time.monotonic() + seconds
    while not (found := truth()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


@pytest.fixture
def ready(monkeypatch):
    monkeypatch.setattr(warm_worker, "AFTER", 0.0)
    monkeypatch.setattr(warm_worker, "ROOM", 0)


def lives(child):
    return child is not None and child.poll() is None


def test_a_run_goes_on_in_the_process_that_waited(ready, tmp_path, tiny_model):
    queue = Jobs(Store(tmp_path / "runs"))
    queue.prepare()
    child = until(lambda: queue._spare._child)
    settings = {"block_length": 16, "measure_blocks": 4, "calibration_blocks": 4, "stage1_steps": 1, "stage2_steps": 1}
    run = queue.submit(RunConfig(model=str(tiny_model), speed_repeats=0, importance_blocks=0, kl_blocks=2, **settings))
    until(lambda: run.id in queue._children)
    assert queue._children[run.id] is child
    assert until(lambda: run.state().ended) == "finished", (run.folder / "stderr.log").read_text()
    assert child.wait(60) == 0
    assert (run.folder / "stderr.log").exists()
    assert queue._spare._child is None, "nobody has the form open"


def test_what_the_run_says_goes_into_its_folder(ready, tmp_path):
    """A run that cannot start tells why where it is looked for, as any other."""
    queue = Jobs(Store(tmp_path / "runs"))
    queue.prepare()
    until(lambda: queue._spare._child)
    run = queue.submit(RunConfig(model=str(tmp_path / "no-such-model")))
    until(lambda: (run.folder / "exit.json").exists())
    assert run.status() == "failed"
    assert "There is no model" in (run.folder / "stderr.log").read_text()


def test_one_that_died_is_replaced_by_an_ordinary_start(ready, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        "trsp_core.runs.process.start", lambda run: started.append(run.id) or subprocess.Popen(["true"])
    )
    queue = Jobs(Store(tmp_path / "runs"))
    queue.prepare()
    child = until(lambda: queue._spare._child)
    child.kill()
    child.wait()
    queue._spare._since = 0.0
    run = queue.submit(RunConfig())
    until(lambda: started == [run.id])


def test_it_ends_with_its_server(tmp_path):
    code = (
        "import sys, time; from trsp_core.runs import warm_worker; warm_worker.AFTER = warm_worker.ROOM = 0\n"
        "from trsp_core.runs.queue import Jobs; from trsp_core.runs.store import Store; from pathlib import Path\n"
        f"queue = Jobs(Store(Path({str(tmp_path)!r}))); queue.prepare()\n"
        "while not queue._spare._child: time.sleep(0.02)\n"
        "print(queue._spare._child.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        waits = psutil.Process(int(server.stdout.readline()))
        assert waits.is_running()
        os.kill(server.pid, signal.SIGKILL)
    until(lambda: not waits.is_running() or waits.status() == psutil.STATUS_ZOMBIE)


def test_it_is_made_when_nothing_is_at_work_and_let_go_when_nobody_asks(ready, monkeypatch):
    made = Spare()
    made.attend(busy=False)
    assert made._child is None, "nobody has the form open"
    made.prepare()
    made.attend(busy=True)
    assert made._child is None, "a run is at work"
    made.attend(busy=False)
    child = made._child
    assert lives(child)
    made.prepare()
    made.attend(busy=False)
    assert made._child is child, "one is enough"
    monkeypatch.setattr(warm_worker, "IDLE", -1.0)
    made.attend(busy=False)
    assert made._child is None
    assert child.wait(60) == 0
    monkeypatch.setattr(warm_worker, "IDLE", 600.0)
    monkeypatch.setattr(warm_worker, "ROOM", 10**18)
    made.prepare()
    made.attend(busy=False)
    assert made._child is None, "there is no room for one"
