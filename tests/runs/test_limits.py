"""A demo's limits hold at the entries themselves, whatever a page would draw; the open mode limits nothing. The
removal of old runs takes what is due, and nothing that somebody needs."""

import contextlib
import dataclasses
import io
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pages.ui.app_state import uploads
from tests import story
from tests.runs.test_queue import go, runs, until  # noqa: F401 - a fixture
from tests.pages.test_pages import open_page
from trsp_core import paths
from trsp_core.errors import TrspError
from trsp_core.experiments.plan_queue import PlanQueue
from trsp_core.export import checkpoint
from trsp_core.export.export_queue import ExportQueue
from trsp_core.models import download
from trsp_core.models.download import Downloads
from trsp_core.paths import runs_root
from trsp_core.pruning import validate
from trsp_core.runs import limits, retention
from trsp_core.runs.limits import DEMO, OPEN
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Run, Store
from trsp_core.schema import messages as an
from trsp_core.schema.config import RunConfig
from trsp_core.workbench import worker
from trsp_core.workbench.client import Workbench


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setenv("TRSP_DEMO", "1")


def settings(**changed):
    return dataclasses.replace(validate.from_values({}, "quick"), **changed)


def test_one_setting_turns_the_demo_on(monkeypatch):
    for value, wanted in {"1": DEMO, "true": DEMO, "0": OPEN, "": OPEN}.items():
        monkeypatch.setenv("TRSP_DEMO", value)
        assert limits.current() is wanted
    monkeypatch.delenv("TRSP_DEMO")
    assert limits.current() is OPEN
    assert OPEN.in_words() == ""


def test_the_open_mode_refuses_nothing(tmp_path):
    assert OPEN.check_run(settings(model="./any", text="/any/file.txt", stage2_steps=100_000), tmp_path) == []
    OPEN.refuse_hub("any/thing")
    OPEN.refuse_push()
    OPEN.refuse_plans()
    OPEN.refuse_run(100)
    assert not OPEN.deletes_runs


@pytest.mark.parametrize("preset", ["quick", "standard", "two-stage"])
def test_a_demo_takes_its_presets(preset, tmp_path):
    config = validate.from_values({}, preset)
    assert [p.message for p in DEMO.check_run(config, tmp_path)] == []


BEYOND = {
    **{name: {name: type(getattr(RunConfig(), name))(most + 1)} for name, most in DEMO.highest.items()},
    "a model of the hub": {"model": "owner/name"},
    "a folder": {"model": "/tmp/model"},
    "a text of the hub": {"text": "c4"},
    "a local file": {"text": "/etc/passwd"},
    "a path out of the uploads": {"heldout": "uploads/../secret.txt"},
    "long steps": {"batch_blocks": 4, "block_length": 257},
    "a long prompt": {"prompt": "x" * 1001},
}


@pytest.mark.parametrize("case", BEYOND)
def test_the_queue_of_a_demo_refuses_what_is_beyond_its_limits(case, runs, demo):  # noqa: F811
    queue = RunQueue(runs)
    with pytest.raises(TrspError) as refused:
        queue.submit(settings(**BEYOND[case]))
    assert refused.value.remedy
    assert runs.runs() == []


def test_a_model_that_is_too_large_is_refused(tmp_path, tiny_model):
    bounds = dataclasses.replace(DEMO, models=(str(tiny_model),), parameters=1000)
    assert [p.knob for p in bounds.check_run(settings(model=str(tiny_model)), tmp_path)] == ["model"]


def test_a_demo_reads_texts_that_were_brought_to_it_alone(tmp_path):
    (tmp_path / "uploads").mkdir()
    brought = tmp_path / "uploads" / "0123.txt"
    assert DEMO.check_run(settings(text=str(brought)), tmp_path) == []
    (tmp_path / "uploads" / "link.txt").symlink_to("/etc/passwd")
    for path in (tmp_path / "uploads" / "link.txt", tmp_path / "uploads" / ".." / "a.txt", tmp_path / "a.txt"):
        assert DEMO.check_run(settings(text=str(path)), tmp_path), path


def test_one_run_at_a_time_for_a_visitor_and_the_next_visitor_waits_behind(runs, demo):  # noqa: F811
    queue = RunQueue(runs)
    first = queue.submit(settings())
    until(lambda: first.status() == "running")
    with pytest.raises(TrspError, match="one at a time"):
        queue.submit(settings(), own_ids=[first.id])
    other = queue.submit(settings(), own_ids=["20260101-000000-ffffffffffffffff"])
    assert queue.position(other.id) == 1
    go(first)
    until(lambda: other.status() == "running")
    queue.cancel(other.id)
    until(lambda: other.status() == "cancelled")
    until(lambda: (other.folder / "exit.json").exists())
    with pytest.raises(TrspError):
        queue.resume(other.id + "0")
    third = queue.submit(settings(), own_ids=[first.id, other.id])
    until(lambda: third.status() == "running")
    with pytest.raises(TrspError, match="one at a time"):
        queue.resume(other.id, own_ids=[third.id])
    go(third)


def test_a_run_beyond_the_limits_cannot_be_resumed_in_a_demo(runs, demo):  # noqa: F811
    run = story.write(runs, "cancelled", settings(stage2_steps=5000))
    with pytest.raises(TrspError, match="5000"):
        RunQueue(runs).resume(run.id)


def test_a_run_whose_time_is_over_is_stopped_and_says_so(runs):  # noqa: F811
    queue = RunQueue(runs, bounds=dataclasses.replace(OPEN, minutes=0.01))
    run = queue.submit(RunConfig())
    until(lambda: run.status() == "cancelled")
    assert "Its time was over" in run.state().stopped_why


def test_a_demo_asks_no_hub_and_pushes_nothing(demo, runs):  # noqa: F811
    for asked in (
        lambda: download.search("llama", limits.current()),
        lambda: download.look("owner/name", limits.current()),
    ):
        with pytest.raises(TrspError, match="only the models"):
            asked()
    fetches = Downloads(limits.current())
    fetches.start("owner/name")
    until(lambda: not fetches.look("owner/name").running)
    assert "only the models" in fetches.look("owner/name").refusal.message
    with pytest.raises(TrspError, match="uploads nothing"):
        next(iter(checkpoint.export(story.write(runs, "finished"), push="owner/name", token="t")))
    with pytest.raises(TrspError, match="no plans"):
        PlanQueue(runs, RunQueue(runs)).start("ablation")


REQUESTS = {
    "a folder": an.Generate([an.Variant("/etc")], "a"),
    "a base": an.Generate([an.Variant("smollm2-135m", base="owner/name")], "a"),
    "a hub id": an.WhatIf("owner/name", [1]),
    "a file": an.WhatIf("smollm2-135m", [1], text="/etc/passwd"),
    "another file": an.Importance(an.Variant("smollm2-135m"), heldout="/etc/passwd"),
    "a long prompt": an.Generate([an.Variant("smollm2-135m")], "a" * 1001),
    "a long text": an.Trace([an.Variant("smollm2-135m")], "a", "b" * 1001),
    "a long answer": an.Generate([an.Variant("smollm2-135m")], "a", new_tokens=129),
    "out of the runs": an.Generate([an.Variant("{root}/x/../../y")], "a"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_the_workbench_of_a_demo_refuses_the_same(case, demo, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path))
    bench = Workbench(command=("false",))
    try:
        with pytest.raises(TrspError):
            bench.ask(REQUESTS[case])
        inside = an.Generate([an.Variant(str(tmp_path / "run" / "model"), base="smollm2-135m")], "a")
        assert bench.ask(inside)
    finally:
        bench.close()


# Removing old runs


def aged(run, days):
    """`run` as if its last event were so old."""
    for file in (run.events_file, run.folder / "config.json"):
        if file.exists():
            at = file.stat().st_mtime - days * retention.DAY
            os.utime(file, (at, at))
    return run


def test_old_runs_go_and_those_that_somebody_needs_stay(tmp_path):
    store, bounds = Store(tmp_path), dataclasses.replace(OPEN, days=7)
    old, fresh, kept, watched, orphan, waiting = (
        story.write(store, s) for s in ("finished", "finished", "finished", "failed", "lost", "queued")
    )
    for run in (old, kept, watched, orphan, waiting):
        aged(run, 8)
    kept.keep(True)
    with story.running(store) as live:
        aged(live, 8)
        assert set(retention.delete_due(store, bounds, {watched.id})) == {old.id, orphan.id}
    assert {r.id for r in store.runs()} == {fresh.id, kept.id, watched.id, waiting.id, live.id}
    kept.keep(False)
    assert kept.id in retention.delete_due(store, bounds)


def test_a_full_quota_takes_the_oldest_first_and_stops_when_it_is_enough(tmp_path):
    store = Store(tmp_path)
    many = [aged(story.write(store, "finished"), 5 - n) for n in range(5)]
    for run in many:
        (run.folder / "weights").write_bytes(b"x" * 100_000)
    many[0].keep(True)
    assert retention.delete_due(store, dataclasses.replace(OPEN, disk_bytes=360_000)) == [many[1].id, many[2].id]


def test_the_open_mode_deletes_no_run(tmp_path):
    store = Store(tmp_path)
    run = aged(story.write(store, "finished"), 5000)
    assert retention.delete_due(store, OPEN) == []
    assert store.runs() == [run]


def test_a_clock_that_jumps_back_removes_nothing(tmp_path):
    store = Store(tmp_path)
    run = aged(story.write(store, "finished"), -400)
    assert retention.delete_due(store, DEMO) == []
    assert store.runs() == [run]


def test_what_killed_processes_left_is_cleared_up(tmp_path):
    store = Store(tmp_path)
    run = story.write(store, "lost")
    (tmp_path / ".deleted-20260101-000000-aaaaaaaaaaaaaaaa").mkdir()
    (run.folder / ".reserve").write_bytes(b"x")
    (run.folder / ".model.partial").mkdir()
    (run.folder / ".resume.safetensors.partial").write_bytes(b"x")
    (run.folder / ".tmpab12CD").write_bytes(b"x")  # of safetensors
    retention.delete_due(store, OPEN)
    assert list(tmp_path.glob(".*")) == list(run.folder.glob(".*")) == []


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no such policy")
def test_the_workbench_of_a_demo_takes_what_a_run_leaves(monkeypatch):
    for demo, policy in (("0", os.SCHED_OTHER), ("1", os.SCHED_IDLE)):
        monkeypatch.setenv("TRSP_DEMO", demo)
        before, workbench = psutil.Process().children(), Workbench()
        try:
            workbench.wait(workbench.ask(an.Generate([an.Variant(DEMO.models[0])], "A prompt", new_tokens=1)), 60)
            (process,) = [child for child in psutil.Process().children() if child not in before]  # it lives on
            assert os.sched_getscheduler(process.pid) == policy
            assert os.getsid(process.pid) == os.getsid(0), (
                "a kernel that groups by session heeds the policy within one alone"
            )
        finally:
            workbench.close()


def test_a_run_goes_first_while_it_is_at_work(runs):  # noqa: F811
    for stands_back in (False, True):
        queue = RunQueue(runs, bounds=dataclasses.replace(OPEN, workbench_yields=stands_back))
        assert not queue.goes_first()
        run = queue.submit(RunConfig())
        until(lambda run=run: run.status() == "running")
        assert queue.goes_first() == stands_back
        go(run)
        until(lambda queue=queue: not queue.children)
        assert not queue.goes_first()


@pytest.mark.parametrize(("second", "rests"), [(True, 1), (False, 0)])
def test_an_answer_that_had_to_wait_is_followed_by_a_rest(monkeypatch, second, rests):
    rested: list[float] = []
    here, sleep = threading.get_ident(), time.sleep  # other threads of this process sleep on
    monkeypatch.setattr(worker.time, "sleep", lambda s: rested.append(s) if threading.get_ident() == here else sleep(s))
    waiting = threading.Event()

    class Handler(worker.RequestHandler):
        def answer(self, request):
            sum(range(2_000_000))  # had the cores to itself
            yield None
            waiting.wait(0.3)  # had not
            yield None

    loop = worker.Loop(Handler(), io.StringIO(), io.StringIO(), second)
    assert isinstance(loop.respond("ticket", an.WhatIf("any", [])), an.Answered)
    assert len([s for s in rested if s > worker.REST * 0.25]) == rests


class OneStep(worker.RequestHandler):
    def answer(self, request):
        yield an.TokenGenerated(0, 1, "done", 0.1)
        raise AssertionError("it was stopped")


def test_what_was_done_when_the_cancel_came_is_told():
    out = io.StringIO()
    loop = worker.Loop(OneStep(), io.StringIO(), out)
    loop.cancel("ticket")
    assert isinstance(loop.respond("ticket", an.WhatIf("any", [])), an.Stopped)
    assert an.unpack(out.getvalue())[1] == an.TokenGenerated(0, 1, "done", 0.1)


# Visitors, however many tabs they open


def test_nine_tabs_of_one_address_do_not_fill_the_queue(runs, demo):  # noqa: F811
    queue = RunQueue(runs)
    first = queue.submit(settings(), visitor="203.0.113.9")
    for _ in range(8):
        with pytest.raises(TrspError, match="your network address"):
            queue.submit(settings(), visitor="203.0.113.9")
    others = [queue.submit(settings(), visitor=f"198.51.100.{n}") for n in range(3)]
    assert [queue.position(run.id) for run in others[-1:]] == [3]
    until(lambda: first.status() == "running")
    with pytest.raises(TrspError, match="your network address"):  # at work it counts as before
        queue.submit(settings(), visitor="203.0.113.9")
    go(first)
    later: list[Run] = []

    def submitted() -> bool:
        with contextlib.suppress(TrspError):
            later.append(queue.submit(settings(), visitor="203.0.113.9"))
        return bool(later)

    until(submitted)
    for run in (*others, *later):
        queue.cancel(run.id)


def test_a_queue_knows_its_visitors_after_a_restart_and_names_none(runs, demo):  # noqa: F811
    queue = RunQueue(runs)
    working, waiting = (queue.submit(settings(), visitor=f"203.0.113.{n}") for n in range(2))
    until(lambda: working.status() == "running")
    queue.close()
    assert "203.0.113" not in (waiting.folder / "queued").read_text("utf-8")
    later = RunQueue(runs)
    with pytest.raises(TrspError, match="your network address"):
        later.submit(settings(), visitor="203.0.113.1")
    later.cancel(waiting.id)
    go(working)


def test_a_run_that_goes_on_counts_for_who_resumes_it(runs, demo):  # noqa: F811
    stopped = story.write(runs, "cancelled", settings())
    queue = RunQueue(runs)
    queue.resume(stopped.id, visitor="203.0.113.7")
    with pytest.raises(TrspError, match="your network address"):
        queue.submit(settings(), visitor="203.0.113.7")
    queue.cancel(stopped.id)


def test_a_visitor_leaves_places_at_the_workbench_and_among_errands(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path))
    bench_ = Workbench(command=(sys.executable, "-c", "import sys; sys.stdin.read()"))  # answers nothing
    request = an.Generate([an.Variant(DEMO.models[0])], "a")
    try:
        first = bench_.ask(request, visitor="a")
        until(lambda: bench_.read(first).place == 0)  # it is worked on
        for n in range(DEMO.requests_per_visitor):  # equal ones would be one
            bench_.ask(dataclasses.replace(request, seed=n + 1), visitor="a")
        with pytest.raises(TrspError, match="your network address"):
            bench_.ask(request, visitor="a")
        assert bench_.ask(request, visitor="b")
    finally:
        bench_.close()
    held, run = threading.Event(), story.write(Store(tmp_path), "finished")

    def blocked(*_, **__):
        held.wait(60)
        yield from ()

    monkeypatch.setattr("trsp_core.subprocesses.run", blocked)
    errands = ExportQueue()
    try:
        errands.start(run, "0.html", "report", "a")
        until(lambda: errands.place(errands.of(run)[0]) == 0)
        for n in range(1, DEMO.exports_per_visitor + 1):
            errands.start(run, f"{n}.html", "report", "a")
        with pytest.raises(TrspError, match="your network address"):
            errands.start(run, "9.html", "report", "a")
        errands.start(run, "8.html", "report", "b")
    finally:
        for errand in errands.of(run):
            errands.stop(errand)
        held.set()
        errands.close()


# The allow-list is asked before the disk


@pytest.fixture
def no_disk(monkeypatch):
    """The disk tells nothing: whoever asks it about a stranger's path fails."""
    asked: list[str] = []
    plain = {name: getattr(os, name) for name in ("stat", "lstat", "open", "scandir", "listdir", "readlink")}

    def told(name):
        def ask(path, *rest, **how):
            if "secret" in str(path):
                asked.append(f"{name} {path}")
            return plain[name](path, *rest, **how)

        return ask

    for name in plain:
        monkeypatch.setattr(os, name, told(name))
    return asked


PATHS = [
    "/srv/secret/model",
    "~/secret",
    "./secret",
    "secret/name",
    "{there}/secret",
    "/tmp/x\x00secret",
    "/secret" * 100,
]


@pytest.mark.parametrize("path", PATHS)
def test_a_demo_does_not_tell_what_is_on_its_disk(path, demo, no_disk, page_store, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}", "utf-8")
    path = path.format(there=tmp_path)
    for knob in ("model", "text", "heldout"):
        if "\x00" in path:
            continue
        app = open_page("run", **{knob: path, "ratio": "9" if knob == "model" else "0.3"})
        assert app.error, knob
        config = settings(**{knob: path})
        assert DEMO.check_run(config, page_store.root)
    for request in (an.WhatIf(path, [1]), an.WhatIf("smollm2-135m", [1], text=path),
                    an.Generate([an.Variant(path)], "a")):  # fmt: skip
        with pytest.raises(TrspError):
            DEMO.check_request(request, page_store.root)
    assert no_disk == []


def test_a_demo_says_the_same_of_a_path_that_is_and_of_one_that_is_not(demo, page_store, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}", "utf-8")
    for knob in ("model", "text", "heldout"):
        told = []
        for name in ("there", "gone"):
            app = open_page("run", **{knob: str(tmp_path / name)})
            told.append([e.value.replace(name, "") for e in app.error])
        assert told[0] == told[1]
        assert told[0]


# Texts that were brought


def test_texts_that_no_run_reads_are_swept(tmp_path):
    store, folder = Store(tmp_path), tmp_path / "uploads"
    folder.mkdir()
    for name in ("read.txt", "heldout.txt", "unread.txt", "fresh.txt", ".half.partial"):
        (folder / name).write_text("x", "utf-8")
        if name != "fresh.txt":
            os.utime(folder / name, (1, time.time() - 3 * 3600))
    story.write(store, "finished", settings(text=str(folder / "read.txt")))
    story.write(store, "queued", settings(heldout=str(folder / "heldout.txt")))
    (tmp_path / "20260101-000000-aaaa").mkdir()
    (tmp_path / "20260101-000000-aaaa" / "config.json").write_text("not a config", "utf-8")
    retention.delete_due(store, OPEN)
    assert len(list(folder.iterdir())) == 5, "in the open mode they have a day"
    retention.delete_due(store, DEMO)
    assert sorted(f.name for f in folder.iterdir()) == ["fresh.txt", "heldout.txt", "read.txt"]


def test_one_visitor_does_not_fill_the_space_for_texts(tmp_path, demo):
    def bring(n, visitor):
        return uploads.keep(f"{n} ".encode() + b"x" * 1_900_000, "a.txt", tmp_path, visitor)

    stored = [bring(n, "a") for n in range(5)]
    with pytest.raises(TrspError, match="Your share"):
        bring(5, "a")
    assert bring(0, "a") == stored[0], "what is there may be brought again"
    assert bring(6, "b").is_file()
    for file in stored:
        file.unlink()
    assert bring(7, "a").is_file()


def test_a_text_that_is_brought_again_is_not_swept_as_an_old_one(tmp_path):
    file = uploads.keep(b"some text", "a.txt", tmp_path)
    os.utime(file, (1, 1))
    assert uploads.keep(b"some text", "a.txt", tmp_path) == file
    retention.clear_uploads(Store(tmp_path), 3600, time.time())
    assert file.is_file()


def test_an_empty_name_of_a_folder_is_none(monkeypatch):
    for name in ("TRSP_RUNS", "TRSP_HOME"):
        monkeypatch.setenv(name, "")
    assert runs_root() == Path("runs").absolute()
    assert paths.home() != Path.cwd()
