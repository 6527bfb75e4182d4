"""Exports and reports: one at a time, each made once, found again, stopped at a click, gone with the server, tidied."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT, story, tiny
from tests.export.test_export import pruned
from trsp_core import subprocesses
from trsp_core.errors import TrspError
from trsp_core.export import checkpoint
from trsp_core.export.export_queue import ExportQueue
from trsp_core.runs import limits, retention
from trsp_core.runs.limits import OPEN
from trsp_core.runs.store import Store
from trsp_core.subprocesses import Progress

SERVER = """
import sys, time
from pathlib import Path
from trsp_core.export.export_queue import ExportQueue
from trsp_core.runs.store import Run
run, name = Run(Path(sys.argv[1])), sys.argv[2]
asked = {"target": str(run.exports_folder / name), "dtype": "", "push": "", "token": ""}
ExportQueue().start(run, name, "trsp_core.export.checkpoint", **asked)
print("up", flush=True)
time.sleep(600)
"""


def until(condition, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def child(monkeypatch):
    """Instead of a child process: work that goes on until it is let go; what was begun, and the most at once."""
    begun: list[str] = []
    go, most, now = threading.Event(), [0], [0]

    def run(module, seconds, **asked):
        begun.append(Path(asked["target"]).name)
        now[0] += 1
        most[0] = max(most[0], now[0])
        try:
            while not go.is_set():
                yield Progress("At it", 0.5)
                time.sleep(0.01)
            Path(asked["target"]).parent.mkdir(exist_ok=True)
            Path(asked["target"]).write_text("made")
            yield Progress("Done", 1.0)
        finally:
            now[0] -= 1

    monkeypatch.setattr(subprocesses, "run", run)
    return begun, go, most


def ask(queue: ExportQueue, run, name: str, **more) -> None:
    queue.start(run, name, "trsp_core.export.html_report", target=str(run.exports_folder / name), **more)


def test_one_at_a_time_in_the_order_in_which_they_were_asked_for(store, child):
    begun, go, most = child
    runs, queue = [story.write(store, "finished") for _ in range(3)], ExportQueue()
    for run in runs:
        for name in ("report.html", "model.zip"):
            ask(queue, run, name)
    until(lambda: begun)
    mine = [errand for run in runs for errand in queue.of(run)]
    assert [queue.place(errand) for errand in mine] == [0, 2, 3, 4, 5, 6]
    until(lambda: mine[0].progress.message == "At it")
    go.set()
    until(lambda: not any(errand.running for errand in mine))
    assert begun == ["report.html", "model.zip"] * 3
    assert most == [1]
    assert all(errand.done and errand.refusal is None for errand in mine)


def test_what_is_asked_for_twice_is_made_once(store, child):
    begun, go, _ = child
    run, queue = story.write(store, "finished"), ExportQueue()
    for _ in range(4):  # four tabs
        ask(queue, run, "report.html")
    until(lambda: begun)
    ask(queue, run, "report.html")
    (errand,) = queue.of(run)
    go.set()
    until(lambda: errand.done)
    ask(queue, run, "report.html")  # from a tab that was drawn before it was there
    assert queue.of(run) == [errand]
    assert begun == ["report.html"]


def test_places_are_bounded_and_a_demo_uploads_nothing(store, child):
    runs = [story.write(store, "finished") for _ in range(4)]
    queue = ExportQueue(dataclasses.replace(OPEN, export_capacity=2))
    ask(queue, runs[0], "report.html")
    until(lambda: child[0])
    ask(queue, runs[1], "report.html")
    ask(queue, runs[2], "report.html")
    with pytest.raises(TrspError, match="2 places"):
        ask(queue, runs[3], "report.html")
    with pytest.raises(TrspError, match="uploads nothing"):
        ask(ExportQueue(limits.DEMO), runs[3], "model.zip", push="owner/name", token="t")


def test_one_that_waits_or_goes_on_is_stopped_and_can_be_asked_for_again(store, child):
    begun, go, _ = child
    first, second, queue = story.write(store, "finished"), story.write(store, "finished"), ExportQueue()
    ask(queue, first, "report.html")
    ask(queue, second, "report.html")
    until(lambda: begun)
    (at_work,), (waiting,) = queue.of(first), queue.of(second)
    queue.stop(waiting)
    assert not waiting.running
    queue.stop(at_work)
    until(lambda: not at_work.running)
    assert not at_work.done
    assert begun == ["report.html"], "what waited was never begun"
    go.set()
    ask(queue, first, "report.html")
    until(lambda: (first.exports_folder / "report.html").is_file())


def test_a_failure_is_told_where_it_belongs_and_the_next_one_is_served(store, monkeypatch):
    def run(module, seconds, **asked):
        yield Progress("At it", 0.1)
        if asked["target"].endswith("refused.zip"):
            raise TrspError("There is no room.", "Make some.")
        if asked["target"].endswith("bug.zip"):
            raise KeyError("a bug")

    monkeypatch.setattr(subprocesses, "run", run)
    made, queue = story.write(store, "finished"), ExportQueue()
    for name in ("refused.zip", "bug.zip", "sound.zip"):
        ask(queue, made, name, token="a-secret")
    found = {errand.name: errand for errand in queue.of(made)}
    until(lambda: not any(errand.running for errand in found.values()))
    assert found["refused.zip"].refusal.message == "There is no room."
    assert "KeyError" in found["bug.zip"].refusal.message
    assert found["sound.zip"].done
    assert "a-secret" not in repr([vars(errand) for errand in found.values()])


def test_an_errand_whose_time_is_over_is_ended(store):
    before = psutil.Process().children()
    run, queue = story.write(store, "finished"), ExportQueue(dataclasses.replace(OPEN, export_minutes=0.0005))
    ask(queue, run, "report.html")
    (errand,) = queue.of(run)
    until(lambda: not errand.running)
    assert "more than 0.0005 minutes" in errand.refusal.message
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_a_report_is_made_by_a_real_child(store):
    run, queue = story.write(store, "finished"), ExportQueue()
    queue.start(run, "report.html", "trsp_core.export.html_report", target=str(run.exports_folder / "report.html"))
    (errand,) = queue.of(run)
    until(lambda: not errand.running, 120)
    assert errand.refusal is None
    assert "<svg" in (run.exports_folder / "report.html").read_text("utf-8")
    assert [file.name for file in run.exports_folder.iterdir()] == ["report.html"]


def test_a_child_that_complains_at_length_is_not_held_up(tmp_path, monkeypatch):
    (tmp_path / "trsp_core").mkdir()
    code = "import json, sys; sys.stderr.write('x' * 1_000_000); print(json.dumps({'message': 'Done', 'fraction': 1}))"
    monkeypatch.setattr("trsp_core.process_limits.held", lambda *_: [sys.executable, "-c", code])
    assert [step.message for step in subprocesses.run("trsp_core.export.html_report", 60)] == ["Done"]


# -- what is killed leaves nothing


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tiny_model):
    text = tmp_path_factory.mktemp("texts") / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    how = {"method": "manual", "layers": "1,3", "stage2_steps": 0}
    return pruned(tmp_path_factory.mktemp("kept"), tiny_model, text, **how)


def below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("where", ["server", "child", "stopped"])
def test_a_killed_export_takes_its_processes_along_and_its_parts_are_tidied(kept, where):
    store, name = Store(kept.folder.parent), checkpoint.archive(kept, "float32").name
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(kept.folder), name], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        parent, found = psutil.Process(server.pid), []

        def proving() -> bool:
            found[:] = below(parent)
            return any("stock_process.py" in word for process in found for word in process.cmdline())

        until(proving, 120)
        parts = list(kept.exports_folder.glob(".*.partial"))
        assert len(parts) == 1
        retention.clear_up(store)
        assert parts[0].is_dir(), "a living process is at it"
        assert kept.busy()
        with pytest.raises(TrspError, match="being exported"):
            store.delete(kept.id)
        if where == "stopped":
            os.kill(found[0].pid, signal.SIGTERM)
            until(lambda: all(map(is_gone, found)), 10)
        else:
            (server if where == "server" else found[0]).send_signal(signal.SIGKILL)
            until(lambda: all(map(is_gone, found)), 5)
        if where != "server":  # which tidies up by itself
            until(lambda: not kept.exported())
            until(lambda: list(kept.exports_folder.iterdir()) == [], 10)
        else:
            assert parts[0].is_dir()
            retention.clear_up(store)
        assert list(kept.exports_folder.iterdir()) == []
        assert not kept.busy()
    finally:
        server.kill()
        server.wait()
