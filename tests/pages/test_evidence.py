"""The evidence page: sentences that follow from the figures, charts over any record, the page with and without one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.ui.charts import intervals_chart
from pages.ui.evidence import published, sentences
from tests import ROOT
from trsp_core.experiments import plan_results, plans
from trsp_core.experiments.plan_results import Record, Row

SPEEDS = {"prefill": [100.0, 90.0, 110.0], "decode": [10.0, 9.0, 11.0]}


def losses(level: float, seed: int = 0) -> list[float]:
    """Twelve blocks around `level` that go up and down together."""
    draw = random.Random(seed)
    return [level + 0.3 * draw.random() for _ in range(12)]


def row(name: str, home: float, away: float, **more) -> Row:
    removed = [] if name == "dense" else [1, 2]
    both = {"calibration": losses(home), "heldout": losses(away)}
    return Row(name, f"Title of {name}", "", removed, 8, 1000, both, {"calibration": 0.5}, **more)


def record(plan: str = "ablation", **levels: tuple[float, float]) -> Record:
    rows = [row("dense", 2.8, 3.4), *(row(name, *both, steps=30) for name, both in levels.items())]
    return Record(plan, "A plan", "tiny", "2026-01-01", {"calibration": "a: 12 blocks", "heldout": "b"}, rows)


def test_the_control_is_said_to_win_where_it_does():
    first, *_ = sentences.sentences(record(trsp=(3.7, 4.4), equal_time=(3.4, 4.2), delete_first=(9.0, 9.0)))
    assert first.startswith("After 30 steps")
    assert "35\u00a0% higher" in first
    assert "does not earn its name" in first


def test_trsp_is_said_to_win_where_it_does_and_where_only_at_home():
    assert "TRSP wins in both" in sentences.sentences(record(trsp=(3.3, 4.0), equal_time=(3.4, 4.2)))[0]
    assert "calibration domain alone" in sentences.sentences(record(trsp=(3.3, 4.3), equal_time=(3.4, 4.2)))[0]


def test_what_the_blocks_cannot_tell_apart_is_not_claimed():
    found = record(trsp=(3.4, 4.2), equal_time=(3.4, 4.2))
    for domain in ("calibration", "heldout"):
        found.row("trsp").losses[domain] = [v + (-1) ** n * 0.1 for n, v in enumerate(losses(3.4))]
        found.row("equal_time").losses[domain] = losses(3.4)
    said = sentences.sentences(found)[0]
    assert "not certainly different" in said
    assert "do not tell the two apart" in said


def test_methods_are_ranked_in_each_domain():
    home, away = sentences.sentences(record("methods", trsp=(3.5, 4.0), sleb=(3.4, 4.2), last=(9.0, 9.0)))
    assert "Title of sleb leaves the lowest perplexity of 3" in home
    assert "TRSP comes second" in home
    assert "Title of trsp leaves the lowest" in away
    assert "is certainly worse" in away


@pytest.mark.parametrize("levels", [{}, {"trsp": (3.0, 3.0)}, {"other": (3.0, 3.0)}])
@pytest.mark.parametrize("plan", ["ablation", "methods", "mine"])
def test_a_record_without_the_rows_for_a_claim_makes_none(plan, levels):
    (said,) = sentences.sentences(record(plan, **levels))
    assert "no" in said


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_charts_fields_are_columns_of_its_frame(mode):
    found = record(trsp=(3.0, 20.0), direct=(800.0, 900.0))
    found.rows[1].speed.update(SPEEDS)
    found.rows[1].dense_speed.update(SPEEDS)
    frames = {
        intervals_chart.ladder: intervals_chart.rungs(found, "calibration"),
        intervals_chart.domains: intervals_chart.both(found),
        intervals_chart.speed: intervals_chart.speeds(found),
    }
    for spec, frame in frames.items():
        text = json.dumps(spec(mode))
        assert "datasets" not in text
        for layer in spec(mode)["layer"]:
            for channel in layer["encoding"].values():
                for part in channel if isinstance(channel, list) else [channel]:
                    if "field" in part:
                        assert part["field"] in frame.columns
        assert len(frame)
        assert not frame.isin([float("inf")]).any().any()
    speeds = intervals_chart.speeds(found)
    assert set(speeds["ceiling"]) == {1.333}
    assert (speeds["possible"] <= speeds["ceiling"]).all()
    assert not speeds["label"].str.endswith("in part noise").any()
    found.rows[1].speed.update({kind: tuple(1.5 * v for v in figures) for kind, figures in SPEEDS.items()})
    speeds = intervals_chart.speeds(found)
    assert (speeds["possible"] == speeds["ceiling"]).all()
    assert set(speeds["label"]) == {"1.50 times, in part noise"}
    assert len(intervals_chart.table(found)) == 3


def test_published_figures_are_apart_and_name_their_source():
    assert published.table()["Source"].notna().all()
    assert "mixes transfer with training" in published.SOURCE


def test_records_that_ship_can_be_read_and_repeated():
    for file in (ROOT / "assets" / "evidence").glob("*.json"):
        found = plan_results.load(file)
        known = {v.name for v in plans.read(found.plan).variations}
        assert {r.name for r in found.rows} - {"dense"} <= known
        assert sentences.sentences(found)
        assert file.stat().st_size < 200_000
        assert all(len(r.losses["calibration"]) == len(found.rows[0].losses["calibration"]) for r in found.rows)


@pytest.mark.parametrize("shipped", [True, False])
def test_the_page_with_and_without_records(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    st.cache_resource.clear()

    def place(plan: str) -> Path:
        return tmp_path / f"{plan}.json"

    monkeypatch.setattr(plan_results, "shipped", place)
    if shipped:
        for plan in plans.built_in():
            place(plan).write_text(plan_results.to_json(record(plan, trsp=(3.5, 4.0), direct=(3.9, 4.6))))
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    app.query_params["evidence-part"] = "Does the knowledge move?"
    app.switch_page("pages/views/evidence.py")
    app.run()
    assert not app.exception, [e.value for e in app.exception]
    shown = "\n".join(e.value for kind in ("markdown", "info", "code", "caption") for e in app.get(kind))
    assert "python -m trsp_core compare --plan ablation" in shown
    assert ("Nothing has been measured yet" in shown) != shipped
    assert ("12 blocks" in shown) == shipped
