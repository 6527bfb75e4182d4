"""Runs as child processes: order, places, cancelling, a server that goes and comes back. The children are real."""

import json
import subprocess
import sys
import time

import pytest

from tests import story
from trsp_core.errors import TrspError
from trsp_core.runs import process, recorder
from trsp_core.runs import queue as jobs
from trsp_core.runs.queue import Jobs
from trsp_core.runs.store import Store
from trsp_core.schema import events
from trsp_core.schema.config import RunConfig

# What a child does instead of pruning: it waits for a file `go`, or to be cancelled, then ends in writing.
CHILD = """
import sys, time
from pathlib import Path
from trsp_core.schema import events
from trsp_core.runs import recorder
from trsp_core.runs.store import Run
run = Run(Path(sys.argv[1]))
def story():
    yield events.PhaseStarted("choose")
    while not (run.folder / "go").exists():
        yield events.Noted("waiting")
        time.sleep(0.02)
    yield events.RunFinished(1)
recorder.record(run, story())
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    children = []

    def start(run, program=CHILD):
        child = subprocess.Popen([sys.executable, "-c", program, str(run.folder)], start_new_session=True)
        children.append(child)
        return child

    monkeypatch.setattr(process, "start", start)
    yield Store(tmp_path)
    for child in children:
        child.kill()
        child.wait()


def until(condition, seconds=30.0):
    """Wait for `condition()` to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def go(run):
    (run.folder / "go").touch()


def test_runs_go_one_at_a_time_in_order(runs):
    queue = Jobs(runs)
    first, second, third = (queue.submit(RunConfig()) for _ in range(3))
    until(lambda: first.status() == "running")
    assert (second.status(), third.status()) == ("queued", "queued")
    assert [queue.place(r.id) for r in (first, second, third)] == [0, 1, 2]
    go(first)
    until(lambda: second.status() == "running")
    assert first.status() == "finished"
    assert third.status() == "queued"
    go(second)
    go(third)
    until(lambda: third.status() == "finished")
    until(lambda: (third.folder / "exit.json").exists())
    assert json.loads((third.folder / "exit.json").read_text()) == {"returncode": 0}


def test_as_many_run_at_once_as_there_are_workers(runs):
    queue = Jobs(runs, workers=2)
    many = [queue.submit(RunConfig()) for _ in range(3)]
    until(lambda: [r.status() for r in many] == ["running", "running", "queued"])
    for run in many:
        go(run)
    until(lambda: all(r.status() == "finished" for r in many))


def test_places_in_the_queue_are_bounded(runs):
    queue = Jobs(runs, places=2)
    first = queue.submit(RunConfig())
    until(lambda: first.status() == "running")
    queue.submit(RunConfig())
    queue.submit(RunConfig())
    with pytest.raises(TrspError, match="All 2 places"):
        queue.submit(RunConfig())
    assert len(runs.runs()) == 3


def test_a_waiting_run_that_is_cancelled_never_starts(runs):
    queue = Jobs(runs)
    first, second, third = (queue.submit(RunConfig()) for _ in range(3))
    until(lambda: first.status() == "running")
    queue.cancel(second.id)
    assert second.status() == "cancelled"
    assert queue.place(third.id) == 1
    go(first)
    until(lambda: third.status() == "running")
    assert [type(e).__name__ for _, _, e in second.read()[0]] == ["RunCancelled"]
    go(third)


def test_a_running_run_stops_at_its_next_event(runs):
    queue = Jobs(runs)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    queue.cancel(run.id)
    until(lambda: run.status() == "cancelled")
    with pytest.raises(TrspError):
        queue.cancel("nothing-here")


def test_a_run_that_does_not_stop_is_made_to(runs, monkeypatch):
    deaf = CHILD.replace("record.record(run, story())", "exec(DEAF)").replace("import sys", "DEAF = '''\n"
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with run.hold():\n    time.sleep(600)\n'''\nimport sys", 1)  # fmt: skip
    original = process.start
    monkeypatch.setattr(process, "start", lambda run: original(run, deaf))
    monkeypatch.setattr(jobs, "GRACE", 0.3)
    queue = Jobs(runs)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    queue.cancel(run.id)
    until(lambda: (run.folder / "exit.json").exists())
    assert run.status() == "cancelled", "a person stopped it: no machine ran out of memory"


def test_a_child_that_dies_at_once_leaves_a_lost_run_and_the_queue_goes_on(runs, monkeypatch):
    original = process.start
    programs = iter(["raise SystemExit(7)", CHILD])
    monkeypatch.setattr(process, "start", lambda run: original(run, next(programs)))
    queue = Jobs(runs)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: first.status() == "lost")
    assert "code 7" in first.hint()
    until(lambda: second.status() == "running")
    go(second)


def test_a_new_server_takes_over_what_waits_and_leaves_what_runs(runs):
    queue = Jobs(runs)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: first.status() == "running")
    queue.workers = 0  # the old server is gone: it starts nothing any more
    again = Jobs(runs)
    time.sleep(1.5)
    assert first.status() == "running"
    assert again.place(second.id) == 1, "what runs counts: one at a time is what this machine was given for"
    go(first)
    until(lambda: second.status() == "running")
    assert again.place(second.id) == 0
    go(second)
    until(lambda: second.status() == "finished")


def test_a_deleted_run_in_the_queue_is_skipped(runs):
    queue = Jobs(runs)
    first, second, third = (queue.submit(RunConfig()) for _ in range(3))
    until(lambda: first.status() == "running")
    runs.delete(second.id)
    go(first)
    until(lambda: third.status() == "running")
    go(third)


def test_the_real_child_runs_the_shell_and_ends_bad_input_in_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    run = Store(tmp_path / "runs").create(RunConfig(model="nowhere"))
    assert process.start(run).wait() == 3
    assert "There is no model 'nowhere'" in run.state().failure.message
    assert run.status() == "failed"


def test_what_ended_is_not_started_again(runs):
    run = runs.create(RunConfig())
    (run.folder / "queued").touch()
    recorder.record(run, (e for e in [events.RunFinished(0)]))
    again = Jobs(runs)
    assert again.place(run.id) == 0
    assert run.status() == "finished"


def test_a_closed_queue_starts_nothing_and_the_next_one_takes_over(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(process, "start", lambda run: started.append(run.id) or story.no_child(run))
    store = Store(tmp_path)
    first = Jobs(store)
    first.close()
    run = first.submit(story.CONFIG)
    assert not started
    assert run.status() == "queued"
    Jobs(store)
    deadline = time.monotonic() + 20
    while not started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started == [run.id]


def test_a_stopped_run_is_queued_again_and_goes_on_in_its_folder(runs):
    queue = Jobs(runs)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    queue.cancel(run.id)
    until(lambda: run.status() == "cancelled")
    until(lambda: (run.folder / "exit.json").exists())
    queue.resume(run.id)
    until(lambda: run.status() == "running")
    go(run)
    until(lambda: run.status() == "finished")
    with pytest.raises(TrspError):
        queue.resume(run.id)


def test_a_server_that_has_to_end_stops_its_runs_and_the_next_goes_on_with_them(runs):
    queue = Jobs(runs)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: first.status() == "running")
    queue.interrupt()
    assert (first.status(), second.status()) == ("cancelled", "queued")
    queue.close()
    Jobs(runs)
    until(lambda: "running" in (first.status(), second.status()))
    assert {first.status(), second.status()} == {"running", "queued"}
    go(first)
    go(second)
    until(lambda: first.status() == second.status() == "finished")
    assert not (first.folder / "interrupted").exists()
