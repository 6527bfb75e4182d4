"""Who is ahead after stage 2: only runs that differ in the layers are compared, on the same blocks, with intervals."""

import dataclasses
import math

import pytest

from pages.ui.what_if import rivals
from pages.ui.what_if.rivals import Rival
from tests import story
from tests.pages.test_compare import open_page, script, texts  # noqa: F401 - a fixture
from trsp_core.runs.store import Store
from trsp_core.schema.run_state import fold

BY_HAND = dataclasses.replace(story.CONFIG, method="manual", layers="2,3")


def rival(who, level, removed=(1, 2), spread=0.0):
    losses = [math.log(level) + spread * n for n in (-1, 0, 1, 0, -1, 1)]
    return Rival(who, f"run-{who}", list(removed), {"calibration": losses, "heldout": losses}, level)


def test_a_clear_lead_is_told_with_its_interval():
    told = rivals.verdict([rival("TRSP", 60.0), rival("You", 54.0)], 2)
    assert told.startswith("**You are ahead** with 2 layers removed: perplexity 0.90 [0.90, 0.90]")
    assert "TRSP's" in told
    assert "no clear lead" not in told
    assert rivals.verdict([rival("You", 60.0), rival("TRSP", 54.0)], 2).startswith("**TRSP is ahead**")


def test_a_lead_within_the_noise_is_called_so():
    assert "no clear lead" in rivals.verdict([rival("TRSP", 60.0), rival("You", 59.0, spread=0.3)], 2)


def test_runs_of_another_depth_are_no_match():
    assert rivals.verdict([rival("TRSP", 60.0), rival("You", 54.0, removed=(1,))], 2) == ""


@pytest.mark.parametrize("change", [{"stage2_steps": 11}, {"lambda_2": 3.0}, {"seed": 1}, {"calibration_blocks": 9}])
def test_runs_of_other_settings_are_left_out(change):
    assert rivals.alike(story.CONFIG, BY_HAND)
    assert not rivals.alike(story.CONFIG, dataclasses.replace(BY_HAND, **change))


def test_runs_without_a_stage_2_do_not_compete():
    bare = dataclasses.replace(story.CONFIG, stage2_steps=0)
    assert not rivals.alike(bare, bare)


def test_runs_measured_on_other_blocks_are_left_out(tmp_path):
    run = story.write(Store(tmp_path), "finished", BY_HAND)
    state, other = run.state(), run.state()
    assert rivals.rival(run, BY_HAND, state, other)
    other.texts = [dataclasses.replace(t, fingerprint="another") for t in other.texts]
    assert rivals.rival(run, BY_HAND, state, other) is None
    assert rivals.rival(run, BY_HAND, fold(type(state)(), run.read()[0][:-1])) is None  # not finished


def test_the_page_shows_the_table_once_there_is_a_rival(script):  # noqa: F811
    run = story.write(Store(), "finished")
    assert "After stage 2" not in texts(open_page("layers", run=run.id, off="1"))
    other = story.write(Store(), "finished", BY_HAND)
    app = open_page("layers", run=run.id, off="1")
    assert "After stage 2" in texts(app)
    table = next(d.value for d in app.dataframe if "Run" in d.value.columns)
    assert set(table["Who"]) == {"TRSP", "You"}
    assert f"run?run={other.id}" in set(table["Run"])
