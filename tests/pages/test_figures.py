"""What figures and pictures say is so: one label has one sample, what is not measured yet is no bad number, and a
chosen layer is shown as it was when it was chosen."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics

import pytest

from pages.ui.charts import layer_rows, overview, stack_pictures
from pages.ui.run import importance, results, stages
from pages.ui.style import words
from pages.ui.tour import player
from tests import ROOT, story
from tests.pages.test_pages import open_page, texts
from trsp_core import formatting
from trsp_core.charts import frames
from trsp_core.evaluation.intervals import Interval
from trsp_core.experiments import records
from trsp_core.export import html_report
from trsp_core.runs import replay
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState, fold

RECORDED = Run(replay.FOLDER)
TILES = tuple(  # the recorded run's, of all its measured blocks
    formatting.perplexity(RECORDED.state().perplexity[name]["calibration"]) for name in ("dense", "direct", "pruned")
)


@pytest.fixture(autouse=True)
def store(page_store) -> Store:
    return page_store


def cut(told: list[ev.Event], after: type[ev.Event], **fields) -> list[ev.Event]:
    """The story up to the first event of this kind with these fields."""
    end = next(
        n for n, e in enumerate(told) if isinstance(e, after) and all(getattr(e, k) == v for k, v in fields.items())
    )
    return told[: end + 1]


def folded(told: list[ev.Event]) -> RunState:
    return fold(RunState(), [(n, n * 0.5, event) for n, event in enumerate(told)])


# -- one label, one sample


def test_pictures_of_stage_2_are_multiples_of_the_dense_model_on_the_same_blocks():
    """Of the recorded run by hand: its probes are of the first two of its eight measured blocks."""
    state, config = RECORDED.state(), RECORDED.config()
    first = {m.state: m.losses[:2] for m in state.measured if m.domain == "calibration"}
    levels, probes = frames.times_dense(state, config)
    for name in ("direct", "pruned"):
        rise = statistics.fmean(first[name]) - statistics.fmean(first["dense"])
        assert levels[name] == pytest.approx(math.exp(rise), rel=1e-3)
    assert levels["dense"] == 1.0
    begin = "repaired" if config.repairs else "direct"
    assert probes[0][1] == pytest.approx(levels[begin], rel=1e-3), "the curve begins at the model that training meets"
    assert probes[-1][1] == pytest.approx(levels["pruned"], rel=1e-3), "and ends at the pruned model"
    assert (frames.compared(state, config), frames.sample(state, config)) == ((2, 8), "2 of the 8 measured blocks")


def test_no_picture_has_a_figure_that_looks_like_one_of_all_blocks():
    state, config = RECORDED.state(), RECORDED.config()
    shown = [*overview.frame(state, config)["label"], *frames.probes(state, config)["label"]]
    numbers = [label for label in shown if re.search(r"\d\.\d", label)]
    assert len(numbers) == 3
    assert all(label.endswith("×") for label in numbers), numbers
    assert not [label for label in shown if any(tile in label for tile in TILES)]
    assert "times dense, on 2 of 8 blocks" in shown


def test_home_says_what_its_curves_are_of(store):
    app = open_page("home")
    app.get_by_key("player-moment").set_value(36.0).run()
    shown = texts(app)
    assert "multiples of the dense model's perplexity on 2 of the 8 measured blocks" in shown
    assert "as a multiple of the dense model's, on 2 of the 8 measured blocks" in shown
    assert {m.value for m in app.metric} >= set(TILES)
    assert "Perplexity went from {} to {}; deleted at once, {}".format(*(TILES[n] for n in (0, 2, 1))) in shown


def test_the_tile_of_a_probe_is_no_perplexity_of_all_blocks(store):
    told = cut(list(story.tell()), ev.DeletionProbed, step=3)
    with story.running(store, len(told)) as run:
        (tile,) = [m for m in open_page("run", run=run.id).metric if m.label.startswith("If deleted now")]
    assert (tile.label, tile.value) == ("If deleted now, on 2 of 8 blocks", "4.05 × dense")  # 81 beside 20


def test_a_repair_shows_what_stopping_here_would_give(store):
    told = cut(list(story.tell_repair()), ev.RepairProbed, layers=2, domain="heldout")
    with story.running(store, len(told), story.REPAIR, story.tell_repair) as run:
        app = open_page("run", run=run.id)
        (tile,) = [m for m in app.metric if m.label.startswith("If it stopped")]
    assert (tile.label, tile.value) == ("If it stopped here, on 2 of 8 blocks", "3.50 × dense")  # 70 beside 20
    shown = texts(app).replace("\u00a0", " ")
    assert "Layer 4's output was 50 % off the dense model's state, and is 40 % off now" in shown
    assert "2 of 3 layers are repaired. Now layer 5." in shown
    state = folded(told)
    points = frames.repair_probes(state, story.REPAIR).query("kind == 'line'")
    assert points[["step", "times"]].values.tolist() == [[0, 4.5], [1, 4.0], [2, 3.5]]
    for frame in (frames.refits(state, story.REPAIR), frames.stack(state)):
        assert frame.query("kind == 'now'")["layer"].tolist() == [5]


def test_the_path_of_a_repair_begins_at_deletion_and_ends_at_the_repaired_model():
    for steps, name in ((4, "repaired"), (0, "pruned")):
        config = dataclasses.replace(story.REPAIR, stage2_steps=steps)
        state = folded(list(story.tell_repair(config)))
        levels, points = frames.times_dense_in_repair(state, config)
        assert [n for n, _ in points] == [0, 1, 2, 3]
        assert (points[0][1], points[-1][1]) == (levels["direct"], levels[name])


def test_an_older_run_with_a_repair_is_drawn_without_what_it_did_not_tell():
    told = [e for e in story.tell_repair() if not isinstance(e, ev.RepairPlanned | ev.RepairProbed)]
    state = folded(cut(told, ev.LayerRefitted, layer=4))
    assert frames.repair_layers(state) == list(story.REPAIRED)
    assert frames.repairing(state) is None
    assert "now" not in set(overview.frame(state, story.REPAIR)["kind"])
    assert len(frames.repair_probes(state, story.REPAIR).query("kind == 'line'")) == 1
    assert html_report.charts(story.REPAIR, folded(told))
    assert list(frames.layer_table(folded(told)).columns) == ["Layer", "Fate", "Weight", "Size, M"], "no gap was told"


def test_a_run_without_probes_is_drawn_from_all_blocks():
    config = RunConfig(stage2_steps=0)
    state = folded(cut(list(story.tell()), ev.LayersChosen))
    assert frames.compared(state, config) == (8, 8)
    assert frames.sample(state, config) == "all 8 measured blocks"
    assert "times dense, on all 8 blocks" in set(overview.frame(state, config)["label"])


def test_in_cycles_no_first_probe_passes_for_deletion_at_once():
    """It is without the first cycle's layers alone, and the others are deleted later."""
    told = [e for e in story.tell() if getattr(e, "state", "") != "direct"]
    frame = frames.probes(folded(told), dataclasses.replace(story.CONFIG, cycles=2))
    assert set(frame["model"]) == {"dense", "deleted now"}


def test_a_report_says_it_as_the_page_does(store):
    text = html_report.html(story.write(store, "finished"))
    assert "as a multiple of the dense model&#39;s, on 2 of the 8 measured blocks" in text
    assert "λ₂ acts in all 10 steps of stage 2" in text
    assert "as it was when its round took it" in text
    assert "KL is of the first 2 of the blocks" in text
    assert "Measured in the calibration domain: wikipedia, 8 blocks" in html_report.html(
        story.write(store, "cancelled")
    )


# -- not yet measured is no bad number


def test_a_live_run_says_what_is_being_measured_at_every_moment(store):
    told, seen = list(story.tell()), set()
    with story.running(store, 1) as run:
        for n in range(len(cut(told, ev.LayersRemoved)), len(told) - 1):
            story.append(run, n)
            shown = texts(open_page("run", run=run.id))
            assert "not a number" not in shown, n
            assert "not measured" not in shown, n
            seen.add("the dense model's perplexity: 20.0; the pruned model's: being measured" in shown)
    assert seen == {True, False}


@pytest.mark.parametrize("domain", ["calibration", "heldout"])
def test_a_run_that_broke_off_measures_nothing_any_more(store, domain):
    told = cut(list(story.tell()), ev.PerplexityMeasured, state="pruned", domain="calibration")
    run = story.create(store)
    story.append(run, len(told) - (domain == "calibration"))
    shown = texts(open_page("run", run=run.id))
    assert run.status() == "lost"
    assert "the pruned model's: not measured" in shown
    assert "being measured" not in shown
    assert "not a number" not in shown


def test_the_tile_of_a_phase_that_is_on_says_so(store):
    told = cut(list(story.tell()), ev.PhaseStarted, name="dense")
    with story.running(store, len(told)) as run:
        tiles = {m.label: m.value for m in open_page("run", run=run.id).metric}
    assert (tiles["Perplexity, dense"], tiles["Layers deleted at once"]) == ("being measured", "–")


def test_what_was_measured_and_is_no_number_still_says_so(store):
    told = [
        dataclasses.replace(e, perplexity=None) if getattr(e, "state", "") == "pruned" and hasattr(e, "losses") else e
        for e in story.tell()
    ]
    run = story.create(store)
    record(run, (event for event in told))
    assert "perplexity went from 20.0 to **not a number**" in texts(open_page("run", run=run.id))
    assert "not a number" in results.table(run.state(), run.config(), live=True).iloc[-1].tolist()


def test_no_figure_reads_nan():
    assert words.perplexity_or_wait({"dense": None}, "dense", live=True) == "not a number"
    assert words.perplexity_or_wait({}, "dense", live=True) == "being measured"
    assert words.perplexity_or_wait({}, "dense", live=False) == "not measured"
    assert formatting.perplexity(math.nan) == formatting.perplexity(math.inf) == "not a number"
    assert records.with_interval(Interval(math.nan, math.nan, math.nan)) == "not a number"
    assert "nan" not in importance.sentence([0.1, math.nan, 0.3], [0.2, 0.1, 0.1], [1])
    assert "nan" not in importance.sentence([0.1, math.nan, 0.3], [0.2, 0.1, math.nan], [0, 1])


# -- a layer at the moment of its choice


def test_a_chosen_layer_keeps_its_number_and_weight_and_is_set_apart():
    """The first one was taken early, at a high weight; others that stay have sunk below that in the end."""
    state = RECORDED.state()
    bars = frames.stack(state).query("kind == 'bar'").set_index("layer")
    first, low = state.rounds[0].layer, bars[~bars["frozen"]]["weight"].idxmin()
    label = f"no. 1 at {state.rounds[0].score:.2f}"
    assert bars.loc[first, "label"] == label
    assert bars.loc[low, "weight"] < bars.loc[first, "weight"]
    assert sorted(bars.index[bars["frozen"]]) == sorted(state.chosen)
    assert [bars.loc[i, "label"] for i in state.chosen] == [
        f"no. {n} at {c.score:.2f}" for n, c in enumerate(state.rounds, 1)
    ]
    assert set(bars[~bars["frozen"]]["label"]) == {""}
    names = set(stack_pictures.before_after(state)["label"])
    assert {f"{first}  ·  {label}", f"{low}  ·  {bars.loc[low, 'weight']:.2f}"} <= names
    strip = layer_rows.frame(state, ["kept"] * len(state.model.layer_parameters), {}).set_index("layer")
    assert (strip.loc[first, "chosen"], bool(strip.loc[first, "frozen"])) == (f"as {label}", True)
    assert (strip.loc[low, "chosen"], bool(strip.loc[low, "frozen"])) == ("no", False)


def test_the_captions_say_whether_a_chosen_weight_was_the_least_of_those_left():
    """What the captions say, of the recorded run, at every choice of the replay."""
    timeline, seen, kinds = replay.timeline(RECORDED), 0, set()
    for moment in timeline.times:
        state = timeline.state(moment)
        if len(state.rounds) == seen or state.phase != "choose":
            continue
        seen = len(state.rounds)
        layer, now = state.rounds[-1].layer, state.weights
        left = [abs(w) for i, w in enumerate(now) if i not in state.chosen]
        why = f"Of the layers left, {layer} has sunk furthest"
        text = f"No. {seen}: layer {layer} had the smallest weight of those left"
        if abs(now[layer]) > min(left):  # of a shortlist the loss decides
            why = f"Of those that have sunk furthest, {layer} is missed least"
            text = f"No. {seen}: of the smallest weights, layer {layer} at "
        kinds.add(why[:9])
        assert player.sentence(state) == f"Stage 1. {why}: crossed out as no. {seen} at {now[layer]:.2f}."
        assert text in stages.winner(state)
        rows = overview.frame(state, RECORDED.config())
        assert f"{layer} · {words.ordinal(seen)}" in set(rows["label"])
        faded = rows[(rows["kind"] == "bar") & (rows["opacity"] == overview.FADED)]
        assert len(faded) == seen
    assert seen == 8
    assert len(kinds) == 2, "the recorded run shows one of both only"


def test_a_method_without_weights_claims_none():
    """Numbers drawn by lot say nothing of what a text needs."""
    told = [e for e in story.tell() if not isinstance(e, ev.StageOneStepped)]
    state = folded(cut(told, ev.LayerChosen))
    assert player.sentence(state) == "Stage 1. Layer 3 is chosen as no. 1: it is crossed out."
    assert not frames.stack(state)["frozen"].any()
    assert "weight" not in stages.winner(state)


def test_on_deep_models_bars_are_too_thin_for_text():
    state = story.long_state(4, frames.MOST_LABELS + 1)
    chosen = folded([e for _, _, e in state.lines] + [ev.LayerChosen(0, 5, 1.0)])
    assert set(frames.stack(chosen)["label"]) == {""}
    assert frames.stack(chosen)["frozen"].sum() == 1


def test_no_words_call_a_chosen_weight_near_nought():
    written = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "assets" / "lessons").glob("*.json")]
    files = [*(ROOT / "pages").rglob("*.py"), *written]
    assert not [f.name for f in files if re.search(r"near (0|zero|nought)", f.read_text("utf-8"))]


def test_numbers_in_words():
    assert [words.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th")
    ]
    assert words.times(2.44) == "2.44 ×"


# -- lambda_2, on form and page


def test_the_form_and_the_run_say_how_long_lambda_2_acts(store):
    assert "λ₂ does nothing: the layers are deleted before stage 2." in texts(open_page("run"))
    app = open_page("run", preset="two-stage")
    shown = "λ₂ acts in 7 of 30 steps of stage 2, until the gate on the chosen layers is shut, and rises to 2.33 of 10."
    assert shown in texts(app)
    app = open_page("run", preset="paper")
    assert "λ₂ acts in all 128 steps of stage 2." in texts(app)
    quick = dataclasses.replace(story.CONFIG, anneal=0.25)
    run = story.write(store, "finished", quick)
    assert "λ₂ acts in 2 of 10 steps of stage 2" in texts(open_page("run", run=run.id))
    assert json.loads((run.folder / "config.json").read_text())["settings"]["anneal"] == 0.25
