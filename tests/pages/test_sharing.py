"""A link shows what its sender saw: every control is in the address, and comes back from it."""

from __future__ import annotations

import urllib.parse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pages.ui.app_state import session, url_state
from pages.ui.tour import classroom, lessons
from tests import story
from tests.pages.test_pages import open_page, texts
from tests.schema.test_config import settings
from trsp_core.runs.store import Store
from trsp_core.schema.config import KNOBS, PRESETS


@pytest.fixture(autouse=True)
def store(page_store) -> Store:
    return page_store


def word(app, name: str) -> str | None:
    """What the address says under this name."""
    given_words = app.query_params.get(name)
    return given_words[-1] if isinstance(given_words, list) else given_words


def through_a_link(values: dict) -> tuple[dict, list]:
    """Settings as the next visitor's form has them, by way of a real address."""
    query = urllib.parse.urlencode(session.as_parameters(values))
    return session.read_settings(dict(urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=True)))


@example({})
@example({"lambda_1": 0.1 + 0.2, "prompt": "", "layers": "3&ratio=0.9#x?"})
@given(settings())
def test_every_setting_comes_back_from_a_link_exactly(chosen):
    values = session.START | chosen
    assert through_a_link(values) == (values, [])


@pytest.mark.parametrize("name", list(KNOBS))
def test_each_knob_alone_comes_back(name):
    knob = KNOBS[name]
    other = {bool: not knob.default, str: "a + b = c"}.get(knob.kind, knob.low)
    values = session.START | {name: knob.choices[-1] if knob.choices else other}
    assert through_a_link(values) == (values, [])


@given(settings(), st.sampled_from([n for n, k in KNOBS.items() if k.kind is not str or k.choices]))
def test_a_bad_value_is_told_and_nothing_else_is_lost(chosen, bad):
    given_words = session.as_parameters(session.START | chosen) | {bad: "no such thing"}
    values, problems = session.read_settings(given_words)
    assert [p.knob for p in problems] == [bad]
    assert "no such thing" in problems[0].message
    assert problems[0].remedy
    assert values == session.START | chosen | {bad: KNOBS[bad].default}


def test_a_misspelt_setting_is_told_and_foreign_words_are_none_of_ours():
    link = {"stage2-steps": "5", "ratoi": "0.1", "utm_source": "x", "__theme": "dark", "lesson": "own", "seed": "3"}
    values, problems = session.read_settings(link)
    assert {p.knob: p.remedy for p in problems} == {
        "stage2-steps": "Did the link mean stage2_steps?",
        "ratoi": "Did the link mean ratio?",
    }
    assert values["seed"] == 3


def test_a_link_may_name_a_preset():
    assert session.read_settings({}) == (session.START, [])
    values, problems = session.read_settings({"preset": "paper", "ratio": "0.1"})
    assert (values["gate"], values["ratio"], problems) == ("output", 0.1, [])
    assert session.read_settings({"preset": "quick", "lambda_1": "0"})[0] == session.START | {"lambda_1": 0.0}
    values, problems = session.read_settings({"preset": "hasty"})
    assert values == session.START
    assert all(name in problems[0].remedy for name in PRESETS)


def test_a_name_that_is_no_setting_is_told_on_the_form():
    app = open_page("run", ratio="0.1", colour="red")
    assert [w.value for w in app.warning] == [
        "Left out of the address: There is no setting 'colour'\\. The rest of the link is used\\."
    ]
    assert app.session_state["form"]["ratio"] == 0.1
    many = {f"name{n}": "1" for n in range(100)}
    assert len(session.read_settings(many)[1]) == session.MOST_UNKNOWN


def test_the_form_says_what_a_link_could_not_set():
    app = open_page("run", ratio="7", lambda_1="0.5", gates="output")
    said = [w.value for w in app.warning]
    assert len(said) == 2
    assert any("0 to 1" in w for w in said)
    assert any("Did the link mean gate" in w for w in said)
    assert word(app, "lambda_1") == "0.5"


def test_controls_of_the_evidence_are_in_the_address():
    link = {"evidence-part": "How the settings matter", "sweep": "map", "domain-map": "calibration"}
    app = open_page("evidence", **link)
    assert app.get_by_key("sweep").value == "map"
    assert app.get_by_key("domain-map").value == "calibration"
    app.get_by_key("domain-map").set_value("heldout").run()
    assert (word(app, "sweep"), word(app, "domain-map")) == ("map", None)


def test_controls_of_compare_are_in_the_address(store):
    run = story.write(store, "finished")
    link = {"compare-prompt": "Say & do?", "compare-drawn": "Drawn", "compare-seed": "7", "compare-length": "9999"}
    app = open_page("compare", run=run.id, **link)
    assert app.get_by_key("compare-prompt").value == "Say & do?"
    assert app.get_by_key("compare-seed").value == 7
    assert app.get_by_key("compare-length").value == 64
    assert r"compare\-length\=9999" in texts(app), "a bad value is told beside its control"
    app.get_by_key("compare-temperature").set_value(1.5).run()
    assert word(app, "compare-temperature") == "1.5"
    assert word(app, "compare-prompt") == "Say & do?"
    app.get_by_key("compare-length").set_value(32).run()
    assert "9999" not in texts(app)


def test_layers_shows_the_part_and_the_sets_of_its_link(store):
    run = story.write(store, "finished")
    app = open_page("layers", run=run.id, off="1,2", safe="0,5", **{"what-if-mode": "Protects"})
    assert app.get_by_key("what-if-mode").value == "Protects"
    trials = app.session_state[f"what-if-trials-{run.id}"]
    assert (trials.now.removed, trials.now.protected) == ({1, 2}, {0, 5})


def test_a_lesson_stays_in_the_address_whatever_run_is_looked_at(store):
    run = story.write(store, "finished")
    app = open_page("run", run=run.id, lesson="two-minutes", step="3")
    app.get_by_key("new").click().run()
    assert "run" not in app.query_params
    assert (word(app, "lesson"), word(app, "step")) == ("two-minutes", "3")
    app = open_page("run", lesson="two-minutes", step="3", ratio="0.4")
    assert "lesson" in app.query_params


def test_a_rung_of_a_ladder_fills_the_form_and_keeps_model_and_text():
    app = open_page("run", seed="5", ratio="0.1", stage1_steps="77")
    rung = next(n for n, s in enumerate(lessons.shipped()["lambda-1"].steps) if s.settings.get("lambda_1") == 1.0)
    app.get_by_key(f"class-lambda-1-{rung}").click().run()
    form = app.session_state["form"]
    assert (form["lambda_1"], form["stage2_steps"], form["stage1_steps"]) == (1.0, 0, PRESETS["quick"]["stage1_steps"])
    assert (form["seed"], form["ratio"]) == (5, 0.1)
    for name in classroom.LADDERS:
        assert any(s.page == "run" for s in lessons.shipped()[name].steps)


@given(st.lists(st.text(), min_size=1))
def test_hostile_words_are_no_value(given_words):
    readers = [
        url_state.one_of(["a", 1, True]),
        url_state.some_of(["a"], 1),
        url_state.within(0, 9),
        url_state.within(0, 9, int),
        url_state.text(5),
    ]
    for read in readers:
        try:
            value = read(given_words)
        except ValueError:
            continue
        assert (
            value in ("a", 1, True, ["a"]) or (isinstance(value, (int, float)) and 0 <= value <= 9) or len(value) <= 5
        )


def test_a_link_that_is_followed_later_sets_a_form_that_is_there_already():
    app = open_page("run", ratio="0.1")
    app.get_by_key(session.widget("lambda_1")).set_value(0.7).run()
    app.query_params.clear()
    app.query_params["gate"] = "output"
    app.run()
    assert (app.session_state["form"]["gate"], app.session_state["form"]["lambda_1"]) == ("output", 0.05)
    assert app.get_by_key(session.widget("gate")).value == "output"


def test_a_browser_that_lags_behind_takes_no_typed_setting_back():
    app = open_page("run", ratio="0.1")
    app.get_by_key(session.widget("lambda_1")).set_value(0.7).run()
    app.query_params.clear()
    app.query_params["ratio"] = "0.1"  # as it was before the change
    app.get_by_key(session.widget("lambda_2")).set_value(3.0).run()
    form = app.session_state["form"]
    assert (form["ratio"], form["lambda_1"], form["lambda_2"]) == (0.1, 0.7, 3.0)
