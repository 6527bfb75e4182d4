"""The replay shows what a live run showed; a head plays, pauses and is moved; Home draws it."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import streamlit as st
from hypothesis import given
from hypothesis import strategies as some

from benchmarks.recording import demo_run
from pages.ui.charts import overview
from pages.ui.tour import player
from tests import story
from tests.pages.test_pages import ROOT, chart_specs, open_page, texts
from trsp_core.pruning import validate
from trsp_core.runs import replay
from trsp_core.runs.recorder import record
from trsp_core.runs.replay import Playhead
from trsp_core.runs.store import Run, Store
from trsp_core.schema import codec, run_state
from trsp_core.schema import events as ev
from trsp_core.schema.config import KNOBS
from trsp_core.schema.run_state import RunState, fold
from trsp_core.workbench import weighing

RECORDED = Run(replay.FOLDER)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    st.cache_resource.clear()
    return Store()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that the replay reads, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr("pages.ui.tour.player.clock", lambda: now[0])
    return now


def test_the_recorded_run_is_whole_small_and_names_no_machine():
    files = sorted(p.name for p in replay.FOLDER.iterdir() if p.is_file() and p.name != weighing.FILE)
    assert files == ["config.json", "env.json", "events.jsonl", "summary.json"]
    assert RECORDED.size() < 600_000
    words = "\n".join(p.read_text("utf-8") for p in replay.FOLDER.rglob("*.json*"))
    assert not re.search(r"/(home|root|tmp|Users|mnt|work)\b|localhost|@[\w-]+\.", words)
    told = RECORDED.state()
    assert told.ended == "finished"
    assert codec.plain(run_state.summary(told)) == json.loads((replay.FOLDER / "summary.json").read_text("utf-8"))


def test_the_recorded_run_has_every_part_and_is_what_its_command_makes():
    assert demo_run.missing(RECORDED) == []
    command = [*demo_run.FLAGS, "--out", "folder"]
    values = dict(zip((flag[2:].replace("-", "_") for flag in command[::2]), command[1::2], strict=True))
    preset, _ = values.pop("preset"), values.pop("out")
    read = {name: KNOBS[name].parse(text)[0] for name, text in values.items()}
    assert RECORDED.config() == validate.from_values(read, preset)


def test_a_moment_of_the_replay_is_the_live_run_at_that_event(store):
    """What each event left behind while the recorder wrote it, against the fold up to there."""
    live: list[RunState] = []
    run = store.create(story.CONFIG)
    record(run, story.tell(), lambda seen, _: live.append(copy.deepcopy(seen)))
    timeline = replay.timeline(run)
    assert len(live) == len(timeline.lines) > 50
    for moment in timeline.times:
        shown, then = timeline.state(moment), live[timeline.count(moment) - 1]
        assert replace(shown, at=0, between=0) == replace(then, **_rounded(shown, then), at=0, between=0)


def _rounded(shown: RunState, then: RunState) -> dict:
    """A file holds milliseconds; the recorder's own state had more digits."""
    times = ("phase_began", "phase_seconds", "step_times")
    assert shown.phase_began == pytest.approx(then.phase_began, abs=2e-3)
    assert shown.step_times == pytest.approx(then.step_times, abs=2e-3)
    return {name: getattr(shown, name) for name in times}


def test_a_run_cut_anywhere_folds_to_what_the_replay_shows_there(tmp_path):
    """The recorded run's file, cut behind each event, is read as a page reads a live one."""
    timeline, raw = replay.timeline(RECORDED), RECORDED.events_file.read_bytes().splitlines(keepends=True)
    half = Run(tmp_path)
    for moment in timeline.times[::3]:
        half.events_file.write_bytes(b"".join(raw[: timeline.count(moment)]))
        assert half.state() == timeline.state(moment)


def test_the_clock_is_squeezed_to_half_a_minute_and_keeps_the_order():
    timeline = replay.timeline(RECORDED)
    assert timeline.seconds == pytest.approx(replay.SECONDS)
    assert timeline.times == sorted(timeline.times)
    first = next(
        m for m, (_, _, e) in zip(timeline.times, timeline.lines, strict=True) if isinstance(e, ev.StageOneStepped)
    )
    assert first < 2.0, "something has to move at once"
    assert max(b - a for a, b in zip(timeline.times, timeline.times[1:], strict=False)) < 1.0, "a pause was left in"


@given(some.lists(some.floats(0, 1e5), min_size=1, max_size=40))
def test_no_run_is_told_slower_than_it_happened_nor_longer_than_the_limit(gaps):
    class Told(Run):
        def read(self, offset=0):
            at, lines = 0.0, []
            for n, gap in enumerate(gaps):
                at += gap
                lines.append((n, at, ev.Progressed(n)))
            return lines, 0

    timeline = replay.timeline(Told(replay.FOLDER))
    assert timeline.times == sorted(timeline.times)
    assert timeline.seconds <= min(replay.SECONDS, sum(gaps)) + 1e-6
    assert timeline.count(timeline.seconds) == len(gaps)


def test_a_head_plays_stops_at_the_end_and_plays_again():
    head = Playhead(10.0).look(50.0)
    assert (head.at, head.playing) == (0.0, True)
    assert head.look(51.0).at == pytest.approx(1.0)
    assert head.at_speed(4.0).look(51.0).at == pytest.approx(4.0)
    assert head.pause().look(60.0).at == 0.0
    assert head.look(500.0).at == replay.LONGEST_LOOK, "a tab in the background watches nothing"
    done = replace(head, at=9.9).look(51.0)
    assert (done.at, done.playing) == (10.0, False)
    assert (done.play().at, done.play().playing) == (0.0, True)
    assert replace(head, at=4.0, playing=False).play().look(99.0).at == 4.0, "the pause counts as watched"
    assert Playhead(0.0).look(1.0).playing is False


def test_a_slow_browsers_echo_is_no_wish_to_go_back():
    head = Playhead(36.0)
    for second in range(6):
        head = head.look(50.0 + second)
    assert head.seek(head.recent[0]) is head
    sought = head.seek(3.0)
    assert (sought.at, sought.playing) == (3.0, False)
    assert head.seek(99.0).at == 36.0
    assert all(p * 100 % 1 for p in head.recent[:-1] if p), "a slider's own positions are never taken for echoes"


@pytest.mark.parametrize("folder", ["recorded", "story", "narrow", "repair", "repair alone"])
def test_the_figure_has_one_spec_and_whole_frames_at_every_moment(store, folder):
    run, config = RECORDED, RECORDED.config()
    if folder != "recorded":
        alone = replace(story.REPAIR, stage2_steps=0)
        config, tell = {
            "story": (story.CONFIG, story.tell),
            "narrow": (story.NARROW, story.tell_narrow),
            "repair": (story.REPAIR, story.tell_repair),
            "repair alone": (alone, partial(story.tell_repair, alone)),
        }[folder]
        run = store.create(config)
        story.append(run, None, tell)
    known = set(re.findall(r"datum\.kind == '([\w-]+)'", json.dumps(overview.spec("light"))))
    seen, timeline = set(), replay.timeline(run)
    for moment in timeline.times:
        frame = overview.frame(timeline.state(moment), config)
        assert list(frame.columns) == overview.COLUMNS
        assert frame[["x", "x2", "y", "y2", "opacity"]].notna().all().all()
        assert frame["opacity"].between(0, 1).all()
        assert frame["y"].between(0, 100).all()
        seen |= set(frame["kind"])
    assert seen <= known
    if "repair" in folder:
        assert "now" in seen
    if folder == "recorded":
        assert seen == known - {"turn", "turn-name"}, "a mark that no run ever shows"
        assert "8 layers fewer" in set(frame["label"])
        assert (frame["kind"] == "bar").sum() == 30 + len(timeline.state(timeline.times[-1]).refits)


def test_home_plays_at_once_pauses_and_is_scrubbed(clock):
    app = open_page("home")
    assert app.get_by_key("player-play").label == "Pause"
    assert "stack of layers" in texts(app)
    specs = chart_specs(app)
    for _ in range(8):
        clock[0] += 1.0
        app.run()
    assert "Stage 1" in texts(app)
    assert app.get_by_key("player-moment").value == pytest.approx(8.001)
    app.get_by_key("player-play").click().run()
    assert app.get_by_key("player-play").label == "Play"
    clock[0] += 1.0
    app.run()
    assert app.get_by_key("player-moment").value == pytest.approx(8.001), "a paused replay moved"
    app.get_by_key("player-moment").set_value(36.0).run()
    assert "8 of 30 layers are gone" in texts(app)
    assert app.get_by_key("player-play").label == "Play again"
    text = RECORDED.state().samples["pruned"].text.strip()[:40]
    assert text in texts(app), "the text that the pruned model wrote"
    assert chart_specs(app) == specs, "a chart would be drawn anew"
    app.get_by_key("player-restart").click().run()
    assert app.get_by_key("player-play").label == "Pause"
    assert text not in texts(app)
    app.get_by_key("player-moment").set_value(20.0).run()
    assert "Stage 2" in texts(app)
    assert app.get_by_key("player-play").label == "Play"


def test_speed_counts(clock):
    app = open_page("home")
    app.get_by_key("player-speed").set_value(4.0).run()
    clock[0] += 1.0
    app.run()
    assert app.get_by_key("player-moment").value == pytest.approx(4.001)


def test_it_stops_at_the_end_by_itself(clock):
    app = open_page("home")
    for _ in range(30):
        clock[0] += 1.4
        app.run()
    assert app.get_by_key("player-play").label == "Play again"
    assert "8 of 30 layers are gone" in texts(app)


def test_a_repair_is_told_layer_by_layer(store, clock):
    """What it is in a sentence, the layer at hand, what each layer regained, and where stopping would leave it."""
    run = store.create(story.REPAIR)
    story.append(run, None, story.tell_repair)
    states = [replay.timeline(run).state(moment) for moment in replay.timeline(run).times]
    told = [e for _, _, e in run.read()[0]]
    second = next(n for n, e in enumerate(told) if isinstance(e, ev.LayerRefitted) and e.layer == 1) + 4
    state = fold(RunState(), run.read()[0][:second])
    assert player.sentence(state) == (
        "Stage 2. Each layer that stays is solved to hand on what the whole model had there. Now layer 4."
    )
    assert overview.stage(state) == 2
    frame = overview.frame(state, story.REPAIR)
    assert {"4 · now", "Green: regained", "Repair", "then training"} <= set(frame["label"])
    assert (frame["kind"] == "now").sum() == 1
    (gain,) = frame[frame["fate"].eq("deleted now") & frame["kind"].eq("bar")].itertuples()
    wide = overview.RIGHT - overview.LEFT
    assert (gain.x2 - gain.x) == pytest.approx(wide * 0.1)  # 0.4 off before, 0.3 after
    assert "If stopped here 4.00 ×" in set(frame["label"])  # 80 beside 20
    assert {player.sentence(s) for s in states} >= {
        "Stage 2. All layers that stay are repaired. How well do they predict, before any training?",
        "Stage 2. The repaired layers go on learning together, step by step.",
    }
    app = open_page("home", replay=run.id)
    app.get_by_key("player-moment").set_value(replay.timeline(run).seconds).run()
    assert not app.exception
    assert "3 of 3 layers are repaired" in texts(app)


def test_two_visitors_have_their_own_heads(clock):
    first, second = open_page("home"), open_page("home")
    first.get_by_key("player-moment").set_value(30.0).run()
    clock[0] += 1.0
    second.run()
    assert second.get_by_key("player-moment").value == pytest.approx(1.001)
    assert second.get_by_key("player-play").label == "Pause"
    first.run()
    assert first.get_by_key("player-moment").value == pytest.approx(30.001)


@pytest.mark.parametrize("status", ["finished", "cancelled", "failed"])
def test_any_run_is_replayed_the_same_way(store, clock, status):
    run = story.write(store, status)
    told = run.read()[0]  # by a recorder in no time; a real run has half a second and more between its events
    run.events_file.write_text("".join(ev.to_line(event, n, n / 2) + "\n" for n, _, event in told), "utf-8")
    app = open_page("home", replay=run.id)
    app.get_by_key("player-moment").set_value(replay.timeline(run).seconds).run()
    assert not app.exception
    wanted = "2 of 6 layers are gone" if status == "finished" else "This run ended here"
    assert wanted in texts(app)


def test_a_run_that_cannot_be_replayed_gives_way_to_the_recorded_one_and_says_so(store):
    gone, empty = open_page("home", replay="no-such-run"), open_page("home", replay=story.write(store, "queued").id)
    assert "Here is the run that comes with the app" in gone.warning[0].value
    assert "Here is the run that comes with the app" in empty.info[0].value
    for app in (gone, empty):
        assert "SmolLM2 135M" in texts(app)


def test_the_run_page_offers_its_replay(store):
    run = story.write(store, "finished")
    (link,) = [p.proto for p in open_page("run", run=run.id).get("page_link") if p.proto.label == "Replay it"]
    assert link.query_string == f"replay={run.id}"


def test_home_without_a_run_says_the_next_step_and_a_failed_or_lost_one_too(store):
    empty = {link.proto.label for link in open_page("home").get("page_link")}
    assert {"Start one", "Open the recorded run", "All runs"} <= empty
    for name in ("layers", "compare"):
        (link,) = [p.proto for p in open_page(name).get("page_link") if p.proto.label == "Open the recorded run"]
        assert link.query_string == f"run={replay.RECORDED}"
    failed, lost = story.write(store, "failed"), story.write(store, "lost")
    shown = texts(open_page("home"))
    assert re.sub(r"\W", "", failed.state().failure.remedy) in re.sub(r"\W", "", shown)
    assert "Open it to go on with it or to run it again" in shown
    assert lost.status() == "lost"
