"""How the settings matter: sentences that change with the figures, charts over any record of a sweep, the tab with and
without one."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.ui.charts import grid_maps, training_lengths
from tests import ROOT
from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results
from trsp_core.experiments.grid_results import Point, Sweep

DOMAINS = ("calibration", "heldout")


def losses(level: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [round(level + 0.3 * draw.random(), 4) for _ in range(12)]


def point(arm: str, at: dict, home: float, away: float, **more) -> Point:
    seed = at.get("seed", 0)
    values = {
        "name": f"{arm}-{at}", "title": f"{arm} {at}", "arm": arm, "at": at, "settings": {}, "removed": [1, 2],
        "weights": [], "blocks": {d: f"{d}-{seed}" for d in DOMAINS}, "kl": {"heldout": 0.5}, "seed": seed,
        "losses": {"calibration": losses(home, seed), "heldout": losses(away, seed)},
        "direct": {d: losses(5.0, seed) for d in DOMAINS}, "steps": at.get("stage2_steps", 60), "seconds": 9.0,
    }  # fmt: skip
    return Point(**values | more)


def sweep(found: list[Point], **axes) -> Sweep:
    arms = dict.fromkeys(p.arm for p in found)
    dense = {f"{d}-{seed}": losses(3.0, seed) for d in DOMAINS for seed in (0, 1)}
    protocol = {"calibration": "wikipedia: 12 blocks", "heldout": "news: 12 blocks"}
    titles = {arm: f"Title of {arm}" for arm in arms}
    return Sweep("mine", "A sweep", "tiny", "2026-01-01", len(found), protocol, {}, axes, titles, dense, found)


def long(levels: dict[int, tuple[float, float]], control: float = 4.0) -> Sweep:
    """TRSP at these levels (calibration, held out) after so many steps, beside a control at 4.0 nats, two seeds."""
    found = []
    for seed in (0, 1):
        for steps, (home, away) in levels.items():
            at = {"stage2_steps": steps, "seed": seed}
            found.append(point("trsp", at, home, away, gap=[2.0, 1.0]))
            found.append(point("delete", at, control, control, settings={"control": "delete_first"}))
    return sweep(found, stage2_steps=list(levels), seed=[0, 1])


def test_a_sweep_that_continues_another_is_part_of_it():
    first, more = long({60: (4.1, 4.1), 240: (4.0, 4.0)}), long({600: (3.9, 3.9)})
    first = replace(first, shared={"threads": 1, "ratio": 0.3})
    more = replace(more, name="longer", shared={"threads": 1, "batch_blocks": 2}, continues="mine")
    alone = grid_results.joined([more])
    assert alone == {"longer": more}, "what it continues is not there"
    (whole,) = grid_results.joined([more, first]).values()
    assert whole.name == "mine"
    assert whole.axes["stage2_steps"] == [60, 240, 600]
    assert whole.planned == len(whole.points) == 12
    assert "TRSP wins from 600 steps on" in training_lengths.sentence(training_lengths.duels(whole), "heldout")
    for sweep_, found in ((first, first.points), (more, more.points)):
        there = {p.name: whole.command(p) for p in whole.points}
        assert all(there[p.name] == sweep_.command(p) for p in found), "each is still the run that it was"


def said(levels: dict[int, tuple[float, float]], domain: str = "heldout") -> str:
    return training_lengths.sentence(training_lengths.duels(long(levels)), domain)


def test_the_sentence_follows_the_figures():
    assert said({60: (4.2, 4.3), 120: (4.1, 4.2), 240: (3.9, 3.9)}).startswith(
        "After 60 steps the control is better by"
    )
    assert "TRSP wins from 240 steps on" in said({60: (4.2, 4.3), 120: (4.1, 4.2), 240: (3.9, 3.9)})
    assert "it wins at every length" in said({60: (4.2, 4.3), 240: (4.1, 4.1)})
    assert "TRSP wins at every length" in said({60: (3.9, 3.9), 240: (3.8, 3.8)})
    assert said({60: (3.9, 3.9), 240: (3.8, 3.8)}).startswith("After 60 steps TRSP is better by")
    assert "TRSP wins after 60 steps alone" in said({60: (3.9, 3.9), 240: (4.1, 4.1)})
    assert "at no length that was measured, 60 to 240 steps" in said({60: (4.1, 4.1), 240: (4.0, 4.0)})
    assert "from 240 steps on the two cannot be told apart" in said({60: (4.1, 4.1), 240: (4.0, 4.0)})
    assert "do not tell TRSP and the control apart" in said({60: (4.0, 4.0), 240: (4.0, 4.0)})
    assert "nothing can be said" in training_lengths.sentence([], "heldout")


def test_the_points_in_the_sentence_are_those_of_the_losses():
    (first, *_) = training_lengths.duels(long({60: (4.2, 4.3), 120: (4.1, 4.2)}))
    both = [[statistics.fmean(losses(level, seed)) for seed in (0, 1)] for level in (4.3, 4.0)]
    found = intervals.points(*both)
    assert first.differences["heldout"] == found
    assert f"{found.value:.1f} points" in training_lengths.sentence([first], "heldout")
    exact = intervals.perplexity(both[0]).value - intervals.perplexity(both[1]).value
    assert found.value == pytest.approx(exact)
    assert found.low < found.value < found.high
    assert found.sign == 1


def test_a_gain_at_home_alone_is_marked():
    duels = training_lengths.duels(long({60: (3.8, 4.1), 120: (3.8, 3.8)}))
    assert [d.home for d in duels] == [True, False]


def test_the_best_of_each_side_meet():
    found = long({60: (4.2, 4.2), 120: (4.2, 4.2)})
    better = [point("local", p.at, 4.1, 4.1) for p in found.of("trsp")]
    harder = [point("distilled", p.at, 3.9, 3.9, settings={"control": "delete_first"}) for p in found.of("trsp")]
    duels = training_lengths.duels(sweep([*found.points, *better, *harder], **found.axes))
    assert {(d.trsp, d.control) for d in duels} == {("Title of local", "Title of distilled")}


@pytest.mark.parametrize("by", ["steps", "seconds"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_charts_fields_are_columns_of_its_frame(mode, by):
    wide = grid_of(map_points())
    lines = training_lengths.curves(long({60: (4.2, 4.2), 120: (4.1, 99.0)}), "heldout", by)
    frames = [
        (training_lengths.length(mode, by, training_lengths.ticks(lines, by)), lines),
        (
            grid_maps.heat(mode, "lambda_1", "lambda_2"),
            grid_maps.cells(wide.of("trsp"), "lambda_1", "lambda_2", "heldout"),
        ),
        (grid_maps.paths(mode, (0.005, 0.05)), grid_maps.path(grid_maps.path_points(wide))),
    ]
    for spec, frame in frames:
        assert "datasets" not in json.dumps(spec)
        assert len(frame)
        for layer in spec["layer"]:
            for channel in layer["encoding"].values():
                for part in channel if isinstance(channel, list) else [channel]:
                    if "field" in part:
                        assert part["field"] in frame.columns


def map_points() -> list[Point]:
    found = []
    for n, lambda_1 in enumerate((0.005, 0.05, 0.5)):
        weights = [0.9, 0.5 / (n + 1), 0.6 / (n + 1), 0.8]
        found.append(point("choice", {"lambda_1": lambda_1}, 5, 5, weights=weights, removed=[1, 2] if n else [1, 3]))
        found += [point("trsp", {"lambda_1": lambda_1, "lambda_2": x}, 4 + n / 10, 4 + x / 10) for x in (0, 1, 10)]
    return [*found, point("delete", {}, 3.9, 3.9, settings={"control": "delete_first"})]


def grid_of(found: list[Point]) -> Sweep:
    return sweep(found, lambda_1=[0.005, 0.05, 0.5], lambda_2=[0, 1, 10])


def test_the_map_marks_the_best_cell_and_names_the_control():
    wide = grid_of(map_points())
    assert grid_maps.mappable(wide) == {"trsp": "Title of trsp"}
    frame = grid_maps.cells(wide.of("trsp"), "lambda_1", "lambda_2", "calibration")
    assert len(frame) == 9
    assert frame["good"].min() == 0
    assert set(frame[frame["best"]]["x"]) == {0.005}
    assert grid_maps.best(frame)["good"] == 1
    said = grid_maps.caption(wide, "trsp", "calibration", frame)
    assert "calibration domain" in said
    assert "The control “Title of delete”" in said
    alone = grid_of([p for p in map_points() if p.arm == "trsp"])
    assert "no control beside it" in grid_maps.caption(alone, "trsp", "heldout", frame)


def test_cells_of_several_seeds_are_one():
    found = [point("t", {"lambda_1": 1, "lambda_2": 2, "seed": s}, 4, 4) for s in (0, 1)]
    frame = grid_maps.cells(found, "lambda_1", "lambda_2", "heldout")
    assert len(frame) == 1
    assert frame["good"].tolist() == [1]


def test_the_path_has_a_line_a_layer_and_names_the_chosen_ones():
    frame = grid_maps.path(grid_maps.path_points(grid_of(map_points())))
    lines = frame[frame["kind"] == "line"]
    assert lines.groupby("layer").size().tolist() == [3] * 4
    assert set(lines[lines["fate"] == "chosen"]["layer"]) == {1, 2}
    assert set(frame[frame["kind"] == "name"]["layer"]) == {1, 2}
    assert len(frame[frame["kind"] == "dot"]) == 6
    assert grid_maps.path_points(long({60: (4, 4), 120: (4, 4)})) == []


def test_a_diverged_point_breaks_no_picture():
    found = long({60: (4.2, 4.2), 120: (4.1, 4.1)})
    bad = replace(found.points[0], losses={d: [float("nan")] * 12 for d in DOMAINS})
    broken = replace(found, points=[bad, *found.points[1:]])
    assert training_lengths.sentence(training_lengths.duels(broken), "heldout")
    assert len(training_lengths.curves(broken, "heldout", "steps"))
    assert len(grid_maps.table(broken)) == len(broken.points)


def test_sweeps_that_ship_can_be_read_and_repeated():
    for file in grid_results.shipped().glob("*.json"):
        found = grid_results.load(file)
        assert file.stat().st_size < 400_000
        assert grid_maps.table(found) is not None
        assert all(found.command(p).startswith("python -m trsp_core run") for p in found.points)


@pytest.mark.parametrize("records", [0, 1, 2])
def test_the_tab_with_and_without_records(records, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid_results, "shipped", lambda: tmp_path / "shipped")
    st.cache_resource.clear()
    if records:
        grid_results.write(
            replace(long({60: (4.2, 4.3), 240: (3.9, 3.9)}), name="length"), grid_results.shipped() / "length.json"
        )
    if records > 1:
        grid_results.write(
            replace(grid_of(map_points()), title="A map"), grid_results.local(tmp_path / "runs") / "map.json"
        )
        (grid_results.shipped() / "bad.json").write_text("{}")
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.query_params["evidence-part"] = "How the settings matter"
    app.switch_page("pages/views/evidence.py")
    app.run()
    assert not app.exception, [e.value for e in app.exception]
    shown = "\n".join(e.value for kind in ("markdown", "info", "code", "caption") for e in app.get(kind))
    assert "python -m trsp_core sweep --grid FILE" in shown
    assert ("No sweep has been recorded yet" in shown) == (not records)
    assert ("TRSP wins from 240 steps on" in shown) == bool(records)
    if records > 1:
        app.get_by_key("sweep").set_value("mine").run()
        assert not app.exception, [e.value for e in app.exception]
        shown = "\n".join(e.value for kind in ("markdown", "caption") for e in app.get(kind))
        assert "regularisation path" in shown
        assert "Best:" in shown
        app.get_by_key("domain-mine").set_value("calibration").run()
        assert not app.exception
