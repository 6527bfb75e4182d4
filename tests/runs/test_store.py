"""Run folders: names, half-written files, torn lines, locks, deletion; and the recorder that writes them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT
from trsp_core import files
from trsp_core.errors import TrspError
from trsp_core.runs import recorder
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events
from trsp_core.schema.config import RunConfig

HOLD = "import sys, time; from pathlib import Path; from trsp_core.runs.store import Run\n"
HOLD += "with Run(Path(sys.argv[1])).hold():\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def runs(tmp_path):
    return Store(tmp_path / "runs")


@pytest.fixture
def run(runs):
    return runs.create(RunConfig())


def told(run, *many):
    """`run` after `many` events were recorded."""
    return recorder.record(run, (event for event in many))


def test_a_run_can_be_found_again_with_its_config(runs, run):
    assert runs.get(run.id).config() == RunConfig()
    assert [r.id for r in runs.runs()] == [run.id]


@given(st.text() | st.sampled_from(["..", ".", "../x", "/etc/passwd", "a/../../b", "x" * 500, "run\x00", "-rf", "~"]))
def test_no_name_leads_out_of_the_folder(name):
    with pytest.raises(TrspError):
        Store(ROOT / "tests").get(name)


def test_a_link_is_no_run(runs, run, tmp_path):
    run.folder.rename(tmp_path / "elsewhere")
    (runs.root / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrspError):
        runs.get("linked")
    assert runs.runs() == []


def test_names_are_unguessable_and_sort_by_time(runs):
    names = [runs.create(RunConfig()).id for _ in range(5)]
    assert len(set(names)) == 5
    assert all(len(name.rpartition("-")[2]) == 16 for name in names)


def test_a_folder_with_a_run_is_not_overwritten(runs, run):
    with pytest.raises(TrspError, match="holds a run already"):
        runs.create(RunConfig(), run.folder)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrspError, match="cannot be written"):
        Store(tmp_path / "file" / "runs").create(RunConfig())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}'])
def test_a_damaged_config_is_a_refusal(run, content):
    (run.folder / "config.json").write_bytes(content)
    with pytest.raises(TrspError):
        run.config()


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.write_atomic(file, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        files.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(st.integers(1, 400))
def test_a_torn_last_line_waits_for_its_end(tmp_path_factory, cut):
    run = Run(tmp_path_factory.mktemp("torn"))
    lines = "".join(events.to_line(events.Noted(f"nøte {n}"), n, n) + "\n" for n in range(6)).encode()
    cut = min(cut, len(lines))
    run.events_file.write_bytes(lines[:cut])
    first, offset = run.read()
    assert len(first) == lines[:cut].count(b"\n")
    run.events_file.write_bytes(lines)
    rest, offset = run.read(offset)
    assert [n for n, _, _ in first + rest] == list(range(6))
    assert run.read(offset) == ([], offset)


def test_a_line_that_is_no_event_is_left_out(run):
    first, second = (events.to_line(events.Noted("a"), n, 0.0).encode() + b"\n" for n in (0, 1))
    run.events_file.write_bytes(first + b"\xff\xfe\n{}\n" + second)
    assert len(run.read()[0]) == 2


def test_a_run_without_events_reads_as_empty(run):
    assert run.read() == ([], 0)
    assert run.state().count == 0
    assert run.summary()["ended"] == ""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (events.RunFinished(1), "finished"),
        (events.RunCancelled("choose"), "cancelled"),
        (events.RunFailed("a", "b", ""), "failed"),
        (events.Noted("no ending"), "lost"),
    ],
)
def test_the_status_is_read_off_the_last_event(run, ending, status):
    told(run, ending)
    assert run.status() == status
    assert run.summary()["ended"] == ("" if status == "lost" else status)


def test_queued_running_and_lost_are_told_apart_by_the_lock(run):
    (run.folder / "queued").touch()
    assert run.status() == "queued"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        assert run.status() == "running"
        with pytest.raises(TrspError, match="running already"), run.hold():
            pass
        with pytest.raises(TrspError, match="Stop it first"):
            Store(run.folder.parent).delete(run.id)
    finally:
        child.kill()
        child.wait()
    assert run.status() == "lost"
    assert "without a word" in run.hint()
    (run.folder / "exit.json").write_text('{"returncode": -9}')
    assert "memory" in run.hint()
    (run.folder / "exit.json").write_text('{"returncode": 7}')
    assert "code 7" in run.hint()


def test_a_run_that_is_cleared_up_does_not_count_as_running_and_cannot_begin(run):
    with run.at_rest() as free:
        assert free
        assert run.status() == "lost"
        with pytest.raises(TrspError, match="running already"), run.hold():
            pass
    with run.hold(), run.at_rest() as free:
        assert not free


def test_a_deleted_run_is_gone_and_others_stay(runs, run):
    other = runs.create(RunConfig())
    (run.model_folder / "deep").mkdir(parents=True)
    runs.delete(run.id)
    assert [r.id for r in runs.runs()] == [other.id]
    assert [p.name for p in runs.root.iterdir()] == [other.id]
    with pytest.raises(TrspError):
        runs.delete(run.id)


def test_what_was_recorded_is_what_is_read(run):
    told(run, events.PhaseStarted("load", 2), events.Progressed(1), events.RunFinished(5))
    lines, _ = run.read()
    assert [type(event).__name__ for _, _, event in lines] == ["PhaseStarted", "Progressed", "RunFinished"]
    assert [n for n, _, _ in lines] == [0, 1, 2]
    assert json.loads((run.folder / "env.json").read_text())["python"] == sys.version.split()[0]
    assert run.summary() == json.loads((run.folder / "summary.json").read_text())


def test_a_watcher_sees_each_event_with_the_state_so_far(run):
    seen = []
    recorder.record(run, (events.Noted(str(n)) for n in range(3)), lambda now, event: seen.append((now.count, event)))
    assert seen == [(n + 1, events.Noted(str(n))) for n in range(3)]


def failing(error):
    yield events.PhaseStarted("choose")
    raise error


def test_a_refusal_ends_a_run_without_a_trace(run):
    recorder.record(run, failing(TrspError("No.", "Do this.")))
    failure = run.state().failure
    assert (failure.message, failure.remedy, failure.trace) == ("No.", "Do this.", "")
    assert run.status() == "failed"


def test_a_bug_ends_a_run_with_its_trace(run):
    recorder.record(run, failing(ZeroDivisionError("oh")))
    failure = run.state().failure
    assert "ZeroDivisionError: oh" in failure.message
    assert "in failing" in failure.trace


def test_short_memory_and_a_full_disk_end_a_run_with_a_remedy(runs):
    for error, said in ((MemoryError(), "out of memory"), (OSError(errno.ENOSPC, "No space left on device"), "disk")):
        run = runs.create(RunConfig())
        run.model_folder.mkdir()
        recorder.record(run, failing(error))
        failure = run.state().failure
        assert said in failure.message
        assert failure.remedy
        assert not failure.trace
    assert not run.model_folder.exists()


def test_a_cancel_file_closes_the_generator_and_ends_in_writing(run):
    closed = []

    def endless():
        try:
            yield events.PhaseStarted("choose")
            run.cancel()
            while True:
                yield events.Noted("step")
        finally:
            closed.append(True)

    recorder.record(run, endless())
    assert closed == [True]
    assert [type(e).__name__ for _, _, e in run.read()[0]] == ["PhaseStarted", "Noted", "RunCancelled"]
    assert run.state().phase == "choose"


def test_a_cancel_that_comes_too_late_changes_nothing(run):
    run.cancel()
    told(run, events.RunFinished(1))
    assert [type(e).__name__ for _, _, e in run.read()[0]] == ["RunFinished"]


def test_an_interrupt_ends_in_writing(run):
    recorder.record(run, failing(KeyboardInterrupt()))
    assert run.status() == "cancelled"


def test_infinite_perplexity_leaves_a_readable_summary(run):
    event = events.PerplexityMeasured("dense", "heldout", float("inf"), [1.0], "news", 1, 8, 7, "float32")
    told(run, event, events.RunFinished(0))
    text = (run.folder / "summary.json").read_text()
    assert "Infinity" not in text
    assert run.summary()["perplexity"]["heldout"]["dense"] is None
