"""Faults: the run's child, the server's queue and the workbench are killed at random moments, fifty times each. What
was written is there, the run is shown as what it is, and resumed it ends as an undisturbed run, with nothing left over.

The children are real processes that run the real shell, forked by `tests.zygote` and not started anew; the server is a
process that holds the real queue. The seed is printed; `TRSP_FAULT_SEED` repeats one.
"""

import os
import random
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.numpy import load_file

from tests import ROOT, tiny, zygote
from tests.runs.test_resume import TINY
from trsp_core.pruning import validate
from trsp_core.runs import process as process_module
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Store
from trsp_core.schema import events
from trsp_core.schema import messages as an
from trsp_core.workbench import client

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("TRSP_FAULTS", "50"))
SEED = int(os.environ.get("TRSP_FAULT_SEED", random.randrange(10**6)))
SERVER = """
import sys, time
from pathlib import Path
from tests import zygote
from trsp_core.runs import process, queue
from trsp_core.runs.store import Store
process.start = lambda run: zygote.start_run(sys.argv[2], run)
queue.RunQueue(Store(Path(sys.argv[1])))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """The socket of a zygote."""
    with zygote.started(tmp_path_factory.mktemp("z")) as socket:
        yield socket


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    text = folder / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    model = tiny.save(folder / "model")
    changed = {"model": str(model), "text": str(text), "heldout": str(text), "resume_minutes": 1e-9, "device": "cpu"}
    return validate.from_values({**TINY, **changed, "stage2_steps": 12})


@pytest.fixture(scope="module")
def whole(where, config, tmp_path_factory):
    """What counts of an undisturbed run, its weights, and how many lines it wrote."""
    run = Store(tmp_path_factory.mktemp("whole")).create(config)
    assert zygote.start_run(where, run).wait() == 0, (run.folder / "stderr.log").read_text()
    return told(run), weights(run), len(lines(run))


def told(run):
    return [events.stable(e) for _, _, e in run.state().lines]


def weights(run):
    return {name: value.tobytes() for name, value in load_file(run.model_folder / "model.safetensors").items()}


def lines(run):
    return run.events_file.read_bytes().splitlines() if run.events_file.exists() else []


def wait_for(condition, seconds=60.0, pause=0.001):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def readable(run):
    """Every whole line is an event, and their numbers leave none out."""
    data = run.events_file.read_bytes() if run.events_file.exists() else b""
    numbers = [n for n, _, _ in run.read()[0]]
    return len(numbers) >= data.count(b"\n") and numbers == list(range(len(numbers)))  # a child may write on


def at_its_end(run, whole):
    assert run.status() == "finished", (run.status(), run.state().failure)
    assert told(run) == whole[0]
    assert weights(run) == whole[1]
    assert not run.held()
    left = [p.name for p in run.folder.iterdir() if p.name.startswith(".")]
    assert left == []
    assert not run.checkpoint_file.exists()
    assert not run.rounds_file.exists()


def test_the_child_is_killed_and_the_run_resumed(where, config, whole, tmp_path, monkeypatch, capsys):
    dice, store, counts = random.Random(SEED), Store(tmp_path), {"injected": 0, "ended before": 0, "survived": 0}
    monkeypatch.setattr(process_module, "start", lambda run: zygote.start_run(where, run))
    queue = RunQueue(store)
    for _ in range(TIMES):
        run = queue.submit(config)
        for _ in range(dice.choice((1, 1, 2))):  # some are killed again after they were resumed
            target = len(lines(run)) + dice.randrange(1, whole[2])
            wait_for(lambda: len(lines(run)) >= target or run.status() == "finished")  # noqa: B023
            child = queue.children.get(run.id)
            if child:
                child.kill()
            wait_for(lambda: run.id not in queue.children, pause=0.01)  # noqa: B023
            if run.status() == "finished":
                counts["ended before"] += 1
                break
            counts["injected"] += 1
            assert run.status() == "lost"
            assert "killed" in run.hint()
            assert readable(run)
            before = run.events_file.read_bytes()
            queue.resume(run.id)
            assert run.events_file.read_bytes().startswith(before)
        wait_for(lambda: run.status() == "finished" and run.id not in queue.children, pause=0.01)  # noqa: B023
        at_its_end(run, whole)
        counts["survived"] += 1
        store.delete(run.id)
    queue.close()
    with capsys.disabled():
        print(f"\nchild killed, seed {SEED}: {counts}, lost 0")
    assert counts["injected"] >= TIMES // 2


def test_the_server_is_killed_and_the_next_one_goes_on(where, config, whole, tmp_path, capsys):
    dice, store, counts = random.Random(SEED + 1), Store(tmp_path), {"injected": 0, "runs finished": 0}
    active = []
    for _ in range(TIMES):
        while len(active) < 2:  # one that runs, and one that waits
            run = store.create(config)
            (run.folder / "queued").touch()
            active.append(run)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path), where], cwd=ROOT, stdout=subprocess.PIPE
        )
        server.stdout.readline()
        written = sum(len(lines(run)) for run in active)
        target = written + dice.randrange(1, whole[2])
        wait_for(lambda: sum(len(lines(r)) for r in active) >= target or all(r.state().ended for r in active))  # noqa: B023
        server.kill()
        server.wait()
        counts["injected"] += 1
        assert all(readable(run) for run in active)
        assert all(run.status() in ("queued", "running", "finished") for run in active), [r.status() for r in active]
        for run in list(active):  # a child outlives its server
            if run.status() != "queued":
                wait_for(lambda: not run.held(), pause=0.01)  # noqa: B023
            if run.status() == "finished":
                at_its_end(run, whole)
                counts["runs finished"] += 1
                active.remove(run)
                store.delete(run.id)
    with capsys.disabled():
        print(f"\nserver killed, seed {SEED + 1}: {counts}, lost 0")
    assert counts["runs finished"] >= TIMES // 3


def test_the_workbench_is_killed_and_answers_the_next_request(where, config, monkeypatch, capsys):
    dice, counts, pids = (
        random.Random(SEED + 2),
        {"injected": 0, "told": 0, "answered before": 0, "next answered": 0},
        [],
    )

    def popen(command, **given):
        child = zygote.piped(where, ["workbench"])
        pids.append(child.pid)
        return child

    monkeypatch.setattr(subprocess, "Popen", popen)
    bench = client.Workbench()
    request = an.Generate([an.Variant(config.model)], "The river", new_tokens=24, trace=True)
    try:
        expected = bench.read(ticket := bench.ask(request))
        wait_for(lambda: bench.read(ticket).ending is not None)
        expected = bench.read(ticket)
        assert isinstance(expected.ending, an.Answered), expected.ending
        for _ in range(TIMES):
            ticket, enough = bench.ask(request), dice.randrange(0, len(expected.answers))
            wait_for(lambda: len(bench.read(ticket).answers) >= enough)  # noqa: B023
            os.kill(pids[-1], 9)
            counts["injected"] += 1
            wait_for(lambda: bench.read(ticket).ending is not None)  # noqa: B023
            ending = bench.read(ticket).ending
            assert isinstance(ending, an.Broken | an.Answered), ending
            counts["told" if isinstance(ending, an.Broken) else "answered before"] += 1
            ticket = bench.ask(request)
            wait_for(lambda: bench.read(ticket).ending is not None)  # noqa: B023
            again = bench.read(ticket)
            if isinstance(again.ending, an.Broken):  # asked before the death was seen
                ticket = bench.ask(request)
                wait_for(lambda: bench.read(ticket).ending is not None)  # noqa: B023
                again = bench.read(ticket)
            assert [a.token for a in again.answers if isinstance(a, an.TokenGenerated)] == [
                a.token for a in expected.answers if isinstance(a, an.TokenGenerated)
            ]
            counts["next answered"] += 1
    finally:
        bench.close()
    wait_for(lambda: not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids))
    with capsys.disabled():
        print(f"\nworkbench killed, seed {SEED + 2}: {counts}, processes left 0")
    assert counts["next answered"] == counts["injected"]
