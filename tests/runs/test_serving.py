"""A server goes on serving: whatever cannot be started, found or written is told where it belongs, and the next one has
its turn. Runs that another server left are treated as its own, and those of one that lives are left alone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import ROOT, story
from tests.experiments.test_plan_queue import tell, until
from tests.runs.test_queue import CHILD
from trsp_core.experiments import plan_queue, plans
from trsp_core.experiments.plan_queue import PlanQueue
from trsp_core.models import catalog, download
from trsp_core.models.download import Downloads
from trsp_core.models.inspection import Facts
from trsp_core.preparation import preflight
from trsp_core.runs import process as process_module
from trsp_core.runs import queue as run_queue
from trsp_core.runs.limits import OPEN, Limits
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Store
from trsp_core.schema import messages as an
from trsp_core.schema.config import RunConfig
from trsp_core.subprocesses import Progress
from trsp_core.workbench import client

DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD.replace(
    "record.record(run, story())", "with run.hold():\n    print('held', flush=True)\n    time.sleep(600)"
)
SERVER = """
import subprocess, sys, time
from pathlib import Path
from trsp_core.runs import process, queue as waiting
from trsp_core.schema.config import RunConfig
from trsp_core.runs.store import Store
def start(run):
    return subprocess.Popen([sys.executable, "-c", sys.argv[2], str(run.folder)], start_new_session=True)
process.start = start
queue = waiting.RunQueue(Store(Path(sys.argv[1])))
print(queue.submit(RunConfig()).id, flush=True)
time.sleep(600)
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@pytest.fixture
def processes():
    """Started in a test; none is left behind it."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def begin(monkeypatch, processes):
    """Children that run `CHILD`; the first ones what is in the list instead: a program, or an error to raise."""
    instead: list[str | Exception] = []

    def start(run):
        what = instead.pop(0) if instead else CHILD
        if isinstance(what, Exception):
            raise what
        processes.append(
            subprocess.Popen([sys.executable, "-c", what, str(run.folder)], cwd=ROOT, start_new_session=True)
        )
        return processes[-1]

    monkeypatch.setattr(process_module, "start", start)
    return instead


def go(run):
    (run.folder / "go").touch()


def server(store, processes, program=CHILD):
    """Another server, at whose run `program` is; the server and the run."""
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(store.root), program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    processes.append(child)
    assert child.stdout
    run = store.get(child.stdout.readline().strip())
    until(lambda: run.status() == "running")
    until(run.holder)
    return child, run


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EACCES])
def test_a_run_that_cannot_be_started_says_so_and_the_next_has_its_turn(number, store, begin):
    begin.append(OSError(number, os.strerror(number)))
    queue = RunQueue(store)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: second.status() == "running")
    assert first.status() == "failed"
    assert os.strerror(number) in first.state().failure.message
    assert first.state().failure.remedy
    go(second)
    queue.resume(first.id)
    until(lambda: first.status() == "running")
    go(first)


def test_a_bug_at_a_start_shows_its_trace_in_the_run(store, begin):
    begin.append(ZeroDivisionError("oh"))
    queue = RunQueue(store)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: second.status() == "running")
    assert "ZeroDivisionError: oh" in first.state().failure.message
    assert "test_serving" in first.state().failure.trace
    go(second)


def test_what_cannot_even_be_told_in_its_folder_is_told_by_the_server(store, begin):
    begin.append(OSError(errno.EACCES, "Permission denied"))
    queue = RunQueue(store)
    queue.workers = 0
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    (first.folder / "lock").mkdir()
    queue.workers = 1
    until(lambda: second.status() == "running")
    assert first.status() == "queued"
    assert "Permission denied" in queue.start_failure(first.id)
    assert queue.start_failure(second.id) == ""
    go(second)


def test_a_folder_in_the_place_of_the_log_is_told(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    queue = RunQueue(store)
    queue.workers = 0
    first, second = (queue.submit(RunConfig(model="nowhere")) for _ in range(2))
    (first.folder / "stderr.log").mkdir()
    queue.workers = 1
    until(lambda: second.status() == "failed")
    assert "could not be started" in first.state().failure.message
    assert "no model 'nowhere'" in second.state().failure.message


def test_looks_at_runs_while_old_ones_are_removed_stop_nothing(store, begin, monkeypatch):
    monkeypatch.setattr(run_queue, "RETENTION_EVERY", -1.0)
    monkeypatch.setattr(run_queue, "WATCHED_FOR", 0.0)
    queue, over = RunQueue(store), threading.Event()

    def look(tab):
        n = 0
        while not over.is_set():
            queue.watch(f"{tab}-{n % 5000}")
            n += 1

    tabs = [threading.Thread(target=look, args=(tab,)) for tab in range(3)]
    for tab in tabs:
        tab.start()
    time.sleep(2.0)
    over.set()
    for tab in tabs:
        tab.join()
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    go(run)


def test_a_turn_that_fails_is_told_and_the_next_one_comes(store, begin, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda given: told.append(given.exc_value))
    monkeypatch.setattr("trsp_core.supervision.PAUSE", 0.01)
    monkeypatch.setattr(run_queue, "GIVE_BACK_EVERY", -1.0)
    monkeypatch.setattr(run_queue.malloc, "give_back", lambda: 1 / 0)
    queue = RunQueue(store)
    until(lambda: told)
    assert isinstance(told[0], ZeroDivisionError)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    go(run)


@pytest.fixture
def planned(store, monkeypatch, tmp_path):
    facts = Facts("tiny", tmp_path, "LlamaForCausalLM", story.L, 32, 128, 512, 50_000, [8_000] * story.L, 200_000)
    monkeypatch.setattr(catalog, "facts", lambda name: facts)
    monkeypatch.setattr(preflight, "preflight", lambda config: None)
    monkeypatch.setattr(plan_queue, "PAUSE", 0.05)
    monkeypatch.setattr(process_module, "start", tell)
    return PlanQueue(store, RunQueue(store))


@pytest.mark.parametrize("error", [KeyError("lost"), OSError(errno.EACCES, "Permission denied")])
def test_a_plan_that_fails_says_why_and_the_others_go_on(error, planned, monkeypatch):
    told, real = [], plans.find
    monkeypatch.setattr(threading, "excepthook", lambda given: told.append(given.exc_value))

    def find(store, plan, variation, config):
        if plan.name == "methods":
            raise error
        return real(store, plan, variation, config)

    planned.start("methods")
    monkeypatch.setattr(plans, "find", find)
    planned.start("ablation")
    until(lambda: planned.standing("ablation").done == planned.standing("ablation").total)
    monkeypatch.setattr(plans, "find", real)
    now = planned.standing("methods")
    assert not now.active
    assert ("lost" if isinstance(error, KeyError) else "Permission denied") in now.trouble
    assert told == ([error] if isinstance(error, KeyError) else [])
    planned.start("methods")
    until(lambda: planned.standing("methods").done > 0)


def test_a_plan_whose_trouble_cannot_be_written_is_given_up_all_the_same(planned, store, monkeypatch):
    """A folder in the place of its file: not even the super-user can replace it."""

    asked = []

    def fail(config):
        asked.append(config)
        if len(asked) == 2:  # the first look is that of `start`
            (store.root / "agenda" / "ablation.json").unlink()
            (store.root / "agenda" / "ablation.json").mkdir()
            raise KeyError("lost")

    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    monkeypatch.setattr(preflight, "preflight", fail)
    planned.start("ablation")
    until(lambda: planned.standing("ablation").trouble)
    assert not planned.standing("ablation").active
    (store.root / "agenda" / "ablation.json").rmdir()
    planned.start("ablation")
    until(lambda: planned.standing("ablation").done)


def test_a_fetch_whose_end_goes_wrong_has_ended(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    monkeypatch.setattr(download, "fetch", lambda name, accepted: (Progress("Ready.", 1.0) for _ in range(1)))
    fetches = Downloads(OPEN, broken)
    fetches.start("tiny")
    until(lambda: not fetches.look("tiny").running)
    fetches.start("tiny")
    until(lambda: not fetches.look("tiny").running)


def test_a_workbench_that_cannot_start_its_process_answers_and_goes_on(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    bench = client.Workbench()
    try:
        for _ in range(2):
            ticket = bench.ask(an.Generate([an.Variant("smollm2-135m")], "The river"))
            ending = bench.wait(ticket, 30).ending
            assert isinstance(ending, an.Broken)
            assert "could not be started" in ending.message
            assert "Cannot allocate memory" in ending.message
    finally:
        bench.close()


def test_a_run_that_outlived_its_server_counts_and_can_be_stopped(store, begin, processes, monkeypatch):
    monkeypatch.setattr(run_queue, "GRACE", 0.3)
    other, run = server(store, processes, DEAF)
    other.kill()
    other.wait()
    queue = RunQueue(store)
    second = queue.submit(RunConfig())
    time.sleep(1.2)
    assert (run.status(), second.status()) == ("running", "queued")
    holder = run.holder().process
    queue.cancel(run.id)
    until(lambda: run.status() == "cancelled")
    until(lambda: not holder.is_running() or holder.status() == "zombie", 5)
    until(lambda: second.status() == "running")
    go(second)


def test_a_run_that_outlived_its_server_is_held_to_its_time(store, begin, processes):
    other, run = server(store, processes)
    other.kill()
    other.wait()
    RunQueue(store, bounds=Limits(minutes=0.0001))
    until(lambda: run.status() == "cancelled")
    assert "Its time was over" in run.state().stopped_why


def test_a_server_that_ends_stops_what_outlived_another_and_leaves_what_has_one(store, begin, processes):
    other, run = server(store, processes)
    second = RunQueue(store, bounds=Limits(minutes=0.0001))
    time.sleep(1.2)
    second.interrupt(0.5)
    assert run.status() == "running"
    assert not run.cancelled()
    assert not (run.folder / "interrupted").exists()
    other.kill()
    other.wait()
    third = RunQueue(store)
    until(lambda: third.position(run.id) == 0)
    third.interrupt()
    assert run.status() == "cancelled"
    assert (run.folder / "interrupted").exists()


def test_what_another_process_is_at_is_left_alone_and_waited_for(store, begin):
    """A child that ends without its run does not tidy or judge the one that somebody else is at."""
    begin.append(
        f"import subprocess, sys\ncommand = [sys.executable, '-c', {DEAF!r}, sys.argv[1]]\n"
        "subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()\nsys.exit(7)"
    )
    queue = RunQueue(store)
    run, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    (run.folder / ".model.partial").mkdir()
    until(run.holder)
    time.sleep(2.0)
    assert (run.status(), second.status()) == ("running", "queued")
    assert (run.folder / ".model.partial").is_dir()
    assert not (run.folder / "exit.json").exists()
    run.holder().process.kill()
    until(lambda: second.status() == "running")
    assert not (run.folder / ".model.partial").exists()
    go(second)


def test_what_a_shell_takes_out_of_the_queue_is_not_started_twice(store, begin, processes):
    queue = RunQueue(store, workers=0)
    run, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    processes.append(subprocess.Popen([sys.executable, "-c", CHILD, str(run.folder)], cwd=ROOT))
    until(lambda: run.status() == "running")
    queue.workers = 1
    time.sleep(1.5)
    assert (len(processes), second.status()) == (1, "queued")
    go(run)
    until(lambda: second.status() == "running")
    assert run.status() == "finished"
    go(second)


def test_a_number_that_is_another_process_now_is_never_killed(store, processes):
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    processes.append(innocent)
    with story.running(store, 30) as run:
        told = {"pid": innocent.pid, "parent": 1, "queued": True, "began": 0.0}
        (run.folder / "lock").write_text(json.dumps(told))
        assert run.held()
        assert run.holder() is None
        queue = RunQueue(store)
        queue.cancel(run.id)
        run_queue.AdoptedProcess(run).send_signal(signal.SIGKILL)
        time.sleep(0.2)
        assert innocent.poll() is None


def test_a_run_that_has_stopped_goes_on_though_its_process_is_still_ending(store, begin, processes):
    begin.append(CHILD + "\ntime.sleep(4)")
    queue = RunQueue(store)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    queue.cancel(run.id)
    until(lambda: run.status() == "cancelled")
    assert processes[0].poll() is None
    queue.resume(run.id)
    until(lambda: run.status() == "running")
    assert processes[0].poll() is not None, "one process at a time is at a run"
    go(run)
    until(lambda: run.status() == "finished")
    assert [type(e).__name__ for _, _, e in run.read()[0]].count("Resumed") == 1


def test_a_folder_that_is_deleted_under_the_queue_leaves_nothing(store, begin):
    queue = RunQueue(store)
    first, second = queue.submit(RunConfig()), queue.submit(RunConfig())
    until(lambda: first.status() == "running")
    subprocess.run(["rm", "-rf", str(first.folder)], check=False)
    until(lambda: second.status() == "running")
    assert [p.name for p in store.root.iterdir()] == [second.id]
    go(second)


def test_a_cancelled_event_is_not_needed_to_resume(store, begin):
    """Stopped, then killed: what the page offers works."""
    begin.append(DEAF)
    queue = RunQueue(store)
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "running")
    queue.cancel(run.id)
    run.holder().process.kill()
    until(lambda: run.status() == "cancelled")
    until(lambda: (run.folder / "exit.json").exists())
    queue.resume(run.id)
    until(lambda: run.status() == "running")
    go(run)
    until(lambda: run.status() == "finished")
