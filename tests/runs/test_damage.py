"""What a disk, a copy or a failed read does to a run's events is noticed, said, and told again by a resume; and a run
whose folder is taken away leaves nothing."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from pages.ui.app_state.server import Follower
from tests import ROOT, story, tiny
from tests.runs.test_resume import OFTEN, Killed, config_of, go, told
from trsp_core.cli import run_figures
from trsp_core.errors import TrspError
from trsp_core.experiments import plan_results, plans
from trsp_core.export import checkpoint, curves_csv, html_report
from trsp_core.pruning import engine
from trsp_core.runs import recorder, resume, retention
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events, run_state

pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def lines_of(run):
    return run.events_file.read_bytes().splitlines(keepends=True)


def flip(run, number):
    story.damage(run, number)


def hole(run, number):
    """Zeros over two lines and a half, their ends among them, as after the power went."""
    lines = lines_of(run)
    start = sum(map(len, lines[:number])) + len(lines[number]) // 2
    end = start + len(lines[number]) + len(lines[number + 1])
    data = run.events_file.read_bytes()
    run.events_file.write_bytes(data[:start] + bytes(end - start) + data[end:])


def cut_out(run, number):
    lines = lines_of(run)
    run.events_file.write_bytes(b"".join(lines[:number] + lines[number + 2 :]))


def strange_ends(run, number):
    """Characters at which Python, but not this file, ends a line."""
    lines = lines_of(run)
    lines[number] = lines[number][:20] + b"\r\x0b\x0c" + lines[number][20:]
    run.events_file.write_bytes(b"".join(lines))


@pytest.mark.parametrize("harm", [flip, hole, cut_out, strange_ends])
def test_a_finished_run_with_events_missing_is_finished_nowhere(harm, store):
    run = story.write(store, "finished")
    whole = len(run.read()[0])
    harm(run, 12)
    folded = run.state()
    assert run.status() == run.summary()["ended"] == "damaged"
    assert folded.count == whole, "the missing ones are counted"
    assert folded.missing[0].first == 12
    note = next(note for note in folded.notes if note.startswith("Event"))
    assert "cannot be read" in note
    assert note in html_report.html(run)
    assert "damaged" in html_report.html(run)
    assert "\ncannot be read,,,12,number of the event," in curves_csv.table(run.config(), folded)
    assert "events cannot be read" in run_figures.account({"run": run.id, "status": run.status(), **run.summary()})
    assert plans.finished(store.runs()) == {}
    assert resume.can(folded, run.status())
    with pytest.raises(TrspError, match="damaged"):
        list(checkpoint.export(run))


def test_a_damaged_run_is_no_evidence(store):
    name = "20260101-000000-ablation-trsp-12345678"
    run = store.create(story.CONFIG, store.root / name)
    recorder.record(run, story.tell())
    plan = plans.read("ablation")
    assert plan_results.gather(plan, plans.earlier_ends(plan, store.runs())).rows
    flip(run, 12)
    with pytest.raises(TrspError, match="No run of the plan"):
        plan_results.gather(plan, plans.earlier_ends(plan, store.runs()))


def test_any_flipped_bit_of_a_line_is_seen():
    line = events.to_line(events.StageOneStepped(3, 1, 3.25, 4.5, [1.0, 0.5]), 7, 1.5).encode()
    for place in range(len(line)):
        for bit in range(8):
            changed = line[:place] + bytes([line[place] ^ 1 << bit]) + line[place + 1 :]
            try:
                read = events.from_line(changed.decode())
            except (TrspError, UnicodeDecodeError):
                continue
            assert read == events.from_line(line.decode()), changed


def test_runs_of_older_versions_are_read_without_a_sum(store, tmp_path):
    run = Run(Path(shutil.copytree(ROOT / "assets" / "demo_run", tmp_path / "older")))
    lines = run.events_file.read_text("utf-8")
    run.events_file.write_text(re.sub(r', "crc": "\w+"}$', "}", lines, flags=re.MULTILINE), "utf-8")
    assert b'"crc"' not in run.events_file.read_bytes()
    assert run.state().missing == []
    assert run.state().ended == "finished"


def test_a_failed_read_tells_nothing_twice(store, monkeypatch):
    run = story.create(store)
    story.append(run, 30)
    follower = Follower(run)
    assert follower.look().count == 30
    real = os.fstat

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fstat", fail)
    assert follower.look().count == 30
    monkeypatch.setattr(os, "fstat", real)
    story.append(run, 40)
    now = follower.look()
    assert now.count == 40
    assert now == run.state()
    run.events_file.rename(run.folder / "away")
    assert follower.look().count == 40
    (run.folder / "away").rename(run.events_file)
    story.append(run, None)
    assert follower.look() == run.state()


def test_another_file_in_its_place_is_read_anew(store):
    run, other = story.create(store), story.create(store)
    story.append(run, 40)
    follower = Follower(run)
    follower.look()
    story.append(other, 25)
    os.truncate(run.events_file, 0)
    assert follower.look() == run_state.RunState()
    shutil.copy(other.events_file, run.events_file)
    assert follower.look() == run.state()
    assert follower.look().count == 25
    story.append(run, None)  # longer than what was read before
    recorder.add(run, events.Noted("more"))
    assert follower.look() == run.state()
    lines = lines_of(run)
    run.events_file.write_bytes(b"".join(lines[:10] + lines[20:]))
    assert follower.look() == run.state()


def test_a_gap_under_a_follower_is_what_a_reader_sees(store):
    run = story.create(store)
    story.append(run, 20)
    follower = Follower(run)
    follower.look()
    story.append(run, None)
    flip(run, 25)
    assert follower.look() == run.state()
    assert follower.look().ended == "damaged"


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An undisturbed run that keeps points to resume from."""
    run = Store(tmp_path_factory.mktemp("whole")).create(config_of(text, resume_minutes=OFTEN, save_model=False))
    go(run)
    return run


def same(run, whole):
    """Whether `run` came to the same end, each loss of each block among it, which no other weights would give."""
    return run.status() == "finished" and told(run) == told(whole)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("harm", "share", "ended"),
    [
        (flip, 0.7, False),
        (hole, 0.45, True),
        *(
            pytest.param(harm, share, ended, marks=SLOW)
            for harm in (flip, hole)
            for share in (0.05, 0.2, 0.5, 0.8, 0.95)
            for ended in (True, False)
        ),
    ],
)
def test_a_resume_goes_back_before_what_cannot_be_read(harm, share, ended, store, text, whole):
    run = store.create(whole.config())
    count = len(told(whole))
    if ended:
        go(run)
    else:
        with pytest.raises(Killed):
            go(run, int(count * 0.97))
    number = max(int(count * share) - 3, 1)
    harm(run, number)
    assert run.status() == ("damaged" if ended else "lost")
    assert "It goes on" in resume.outlook(run)
    past = resume.reopen(run)
    assert past.next_event <= number
    assert run.state().missing == []
    go(run)
    assert same(run, whole)


def test_stage_1_goes_on_behind_its_last_round_and_says_so(store, text):
    settings = {"ratio": 0.6, "stage1_steps": 3, "resume_minutes": OFTEN, "save_model": False}
    whole, run = (store.create(config_of(text, **settings)) for _ in range(2))
    go(whole)
    middle = next(n for n, _, e in whole.read()[0] if isinstance(e, events.StageOneStepped) and e.step == 8)
    with pytest.raises(Killed):
        go(run, middle + 1)
    assert "behind round 2 of stage 1; computed again: 2 steps of stage 1." in resume.outlook(run)
    assert resume.reopen(run).round == 2
    now = run.state()
    assert (len(now.chosen), now.done, now.phase) == (2, 6, "choose"), "not “0 of 9” again"
    go(run)
    assert same(run, whole)
    assert not run.rounds_file.exists()


def test_what_a_resume_repeats_is_said_before(store, text):
    run = store.create(config_of(text, ratio=0.6, stage1_steps=3, learn_weights=True, save_model=False))
    story_of = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()))
    with pytest.raises(Killed):
        recorder.record(run, story_of, killed_when(lambda folded: len(folded.weight_steps) == 5))
    said = resume.outlook(run)
    assert "at the beginning of the choice of layers" in said
    assert "of stage 1" in said
    assert "5 steps of stage 1, 1 chosen layer" in said


def killed_when(truth):
    def watch(folded, event):
        if truth(folded):
            raise Killed

    return watch


def test_a_run_that_was_stopped_and_then_killed_was_stopped(store):
    run = story.create(store)
    story.append(run, 30)
    run.cancel("Its time was over.")
    (run.folder / "exit.json").write_text('{"returncode": -9}')
    assert run.status() == "cancelled"
    resume.reopen(run)
    assert run.status() == "lost"


def test_stopped_is_said_when_its_process_has_let_go(store):
    run, seen = story.create(store), []

    def watch(folded, event):
        if len(folded.gap_steps) == 3:
            run.cancel()
        seen.append((folded.ended, run.status()))

    recorder.record(run, story.tell(), watch)
    assert seen[-1] == ("cancelled", "running")
    assert run.status() == "cancelled"


@pytest.mark.parametrize("moment", range(5, 70, 9))
def test_a_run_whose_folder_is_taken_away_stops_and_leaves_nothing(moment, store):
    run, closed = story.create(store), []

    def tell():
        try:
            for n, event in enumerate(story.tell()):
                if n == moment:
                    shutil.rmtree(run.folder)
                    (run.folder / ".model.partial").mkdir(parents=True)  # as `save_pretrained` does
                    (run.folder / "model").mkdir()
                yield event
        finally:
            closed.append(True)

    with pytest.raises(TrspError, match="deleted"):
        recorder.record(run, tell())
    assert closed == [True]
    assert list(store.root.iterdir()) == []


def test_what_is_not_the_runs_stays_when_its_folder_is_taken_away(store):
    run = story.create(store)

    def tell():
        yield events.PhaseStarted("load")
        shutil.rmtree(run.folder)
        run.folder.mkdir()
        (run.folder / "letter.txt").write_text("mine")
        yield events.PhaseStarted("text")

    with pytest.raises(TrspError, match="deleted"):
        recorder.record(run, tell())
    assert [p.name for p in run.folder.iterdir()] == ["letter.txt"]


def test_points_to_resume_from_of_a_finished_run_go(store):
    """As of one that was killed between its last event and their removal."""
    run, other = story.write(store, "finished"), story.write(store, "lost")
    for each in (run, other):
        each.checkpoint_file.touch()
        each.rounds_file.touch()
    retention.clear_up(store)
    assert not run.checkpoint_file.exists()
    assert not run.rounds_file.exists()
    assert other.checkpoint_file.exists()


def test_a_copy_that_was_never_completed_goes(store):
    old, new = store.root / ".new-recorded-1", store.root / ".new-recorded-2"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    retention.clear_up(store)
    assert not old.exists()
    assert new.exists()


class Disk:
    """What of a folder is on the disk: of each file what it held when it was synced last, of each folder the names that
    it had then; by inode."""

    def __init__(self, monkeypatch):
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self.sync)

    def sync(self, descriptor):
        self._sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.names[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir()}
        else:
            self.contents[os.fstat(descriptor).st_ino] = path.read_bytes()

    def lose_power(self, folder: Path):
        """Leave of `folder` what is on the disk."""
        here = folder.stat().st_ino
        shutil.rmtree(folder)
        self._restore(folder, here)
        self.contents.clear()  # inodes are used again
        self.names.clear()

    def _restore(self, folder: Path, here: int):
        folder.mkdir()
        for name, inode in self.names.get(here, {}).items():
            if inode in self.names:
                self._restore(folder / name, inode)
            else:
                (folder / name).write_bytes(self.contents.get(inode, b""))  # a name alone, where that was not synced


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=SLOW)])
def test_the_power_may_go_at_any_moment(times, store, whole, monkeypatch):
    disk, dice = Disk(monkeypatch), random.Random(times)
    for stop in sorted(dice.sample(range(2, len(told(whole))), times)):
        run = store.create(whole.config())
        with pytest.raises(Killed):
            go(run, stop)
        before = run.state()
        disk.lose_power(run.folder)
        left = run.state()
        assert left.missing == []
        begun = [n for n, _, e in before.lines if isinstance(e, events.PhaseStarted)]
        assert left.count > begun[-1], f"after event {stop}: whole phases were lost"
        if left.count:
            resume.reopen(run)
        go(run)
        assert same(run, whole), f"after event {stop}"


def test_a_model_is_on_the_disk_before_it_is_said_to_be_saved(store, text, monkeypatch):
    disk = Disk(monkeypatch)
    run = store.create(config_of(text, save_trained=True))
    story_of = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()))
    with pytest.raises(Killed):
        recorder.record(run, story_of, killed_when(lambda folded: folded.saved_bytes))
    assert run.state().saved_bytes
    held = {p.relative_to(run.folder): p.read_bytes() for p in run.folder.rglob("*model*/*")}
    proof = run.proof_file.read_bytes()
    disk.lose_power(run.folder)
    assert run.state().saved_bytes
    assert held == {p.relative_to(run.folder): p.read_bytes() for p in run.folder.rglob("*model*/*")}
    assert run.proof_file.read_bytes() == proof
    assert len(held) > 6
