"""Over splits on the Evidence page: sentences that follow from intervals over splits, charts over any study, the tab
with and without one, and nothing read twice."""

from __future__ import annotations

import dataclasses
import json

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.ui.charts import splits_charts
from pages.ui.evidence import split_sentences
from tests import ROOT, story, studies
from trsp_core.experiments import grid_results, plans, records
from trsp_core.experiments import studies as reader
from trsp_core.experiments.grids import Contest
from trsp_core.runs.store import Store

TIME = Contest("refit_10", "none_90", "time")
STUDIES = {
    "transfers": studies.transfers(contests=[TIME]),
    "choices": studies.choices(),
    "ratios": studies.ratios(),
    "noisy": studies.transfers(noise=0.5),
}


def study(name: str) -> reader.SplitStudy:
    read = reader.read(STUDIES[name])
    assert read
    return read


def test_transfers_are_said_to_be_better_where_the_intervals_over_splits_say_so():
    time, ten, penalty, bare = split_sentences.lines(study("transfers"))
    assert time.startswith("In about the same time (1 min 45 s against 1 min 55 s), over 5 splits:")
    assert time.count("not certainly different") == 2
    assert ten.startswith("After the same 10 steps, over 5 splits: “Title of refit\\_10” against")
    assert ten.count("% lower**") == 2
    assert penalty.count("% higher**") == 2
    assert bare.startswith("Nothing trained, over 5 splits")
    assert "lower**" not in "".join(split_sentences.lines(study("noisy")))
    sweep = STUDIES["transfers"]
    bare = [p for p in sweep.points if p.arm in ("direct", "refit_10")]
    (line,) = split_sentences.lines(reader.read(dataclasses.replace(sweep, points=bare)))
    assert line.startswith("As measured, over 5 splits: “Title of refit\\_10” against “Title of direct”, **")


def test_nobody_is_first_where_two_cannot_be_told_apart():
    for line in split_sentences.lines(study("choices")):
        assert "Over 5 splits" in line
        assert "**nobody is first**" in line
        assert "Title of last is certainly behind" in line
    sweep = STUDIES["choices"]
    points = [p for p in sweep.points if p.arm != "sleb"]
    (home, _) = split_sentences.lines(reader.read(dataclasses.replace(sweep, points=points)))
    assert "**Title of trsp is first**" in home


def test_where_treatments_break_is_said_with_the_splits():
    head, breaks, pair = split_sentences.lines(study("ratios"))
    assert head == "Where each treatment breaks, over 2 splits"
    assert "“Title of direct” breaks at 0.4; “Title of refit” breaks at 0.6 on some split, nowhere on all" in breaks
    assert pair.startswith("“Title of refit” against “Title of direct”, in the held-out domain:")


def test_how_far_a_choice_depends_on_the_split_is_said():
    (said,) = split_sentences.spreads(study("transfers"))
    assert "1 of the 3 layers that go at all go on each of 5 splits" in said
    assert "two splits share 73\u00a0% of what either removes" in said
    assert "5 of 10 rounds were decided by a margin within the noise of their steps" in said


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_charts_fields_are_columns_of_its_frame(name, mode):
    of = study(name)
    charts = [(splits_charts.strips(mode), splits_charts.strip(of))]
    charts += [(splits_charts.rows(mode, "levels"), splits_charts.levels(of, "heldout"))]
    charts += [(splits_charts.rows(mode, "pairs"), splits_charts.pairs(of, "heldout"))]
    if splits_charts.ticks(of):
        charts += [(splits_charts.ratio_lines(mode, splits_charts.ticks(of)), splits_charts.ratios(of, "heldout"))]
    for spec, frame in charts:
        assert len(frame)
        assert not frame.isin([float("inf")]).any().any()
        for layer in spec["layer"]:
            fields = [c["field"] for c in layer["encoding"].values() if isinstance(c, dict) and "field" in c]
            assert set(fields) <= set(frame.columns)


def test_a_dot_is_a_split_and_the_colour_is_that_of_the_one_that_is_better():
    frame = splits_charts.pairs(study("transfers"), "heldout")
    assert set(frame.groupby("order")["kind"].apply(lambda kinds: (kinds == "split").sum())) == {5}
    roles = dict(zip(frame["title"], frame["role"], strict=True))
    assert roles["Title of refit_10 / Title of none_90 (equal time)"] == "neither"
    assert roles["Title of refit_10 / Title of none_10"] == "transfer"
    assert roles["Title of penalty_10 / Title of none_10"] == "control"
    roles = dict(zip(*(splits_charts.pairs(study("choices"), "heldout")[c] for c in ("title", "role")), strict=True))
    assert roles == {"Title of sleb": "neither", "Title of last": "transfer"}, "TRSP is better than the last layers"


def open_tab(**query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.query_params.update(query)
    app.switch_page("pages/views/evidence.py")
    app.run()
    assert not app.exception, [e.value for e in app.exception]
    return app


def texts(app: AppTest) -> str:
    return "\n".join(e.value for kind in ("markdown", "info", "code", "caption") for e in app.get(kind))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An empty folder in place of the shipped records, and one of runs."""
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid_results, "shipped", lambda: tmp_path / "shipped")
    st.cache_resource.clear()
    return tmp_path / "shipped"


def test_the_tab_with_and_without_studies(shipped):
    assert "No study has been recorded yet" in texts(open_tab())
    for name in ("transfers", "choices", "ratios"):
        grid_results.write(STUDIES[name], shipped / f"{name}.json")
    shown = texts(open_tab())
    assert "After the same 10 steps, over 5 splits" in shown
    assert "5 splits (seeds 0, 1, 2, 3, 4)" in shown
    assert "nobody is first" in texts(open_tab(study="choices"))
    assert "Where each treatment breaks, over 2 splits" in texts(open_tab(study="ratios"))
    settings = open_tab(**{"evidence-part": "How the settings matter"})
    assert "No sweep has been recorded yet" in texts(settings), "studies without another picture stand over splits"


def test_a_rerun_of_the_page_reads_no_record_and_no_run_again(shipped, monkeypatch):
    grid_results.write(STUDIES["transfers"], shipped / "transfers.json")
    story.write(Store(), "finished")
    app = open_tab()
    plan = open_tab(**{"evidence-part": "Does the knowledge move?"})

    def refuse(*args, **more):
        raise AssertionError("read again")

    monkeypatch.setattr(records, "read", refuse)
    monkeypatch.setattr(plans, "ends", refuse)
    monkeypatch.setattr(plans, "earlier_ends", refuse)
    for shown in (app, plan):
        shown.run()
        assert not shown.exception, [e.value for e in shown.exception]
    assert json.loads((shipped / "transfers.json").read_text("utf-8"))["name"] == "splits"
