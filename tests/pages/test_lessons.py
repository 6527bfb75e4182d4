"""Lesson files: every good one comes back, by file and by link; a bad one is told all that is wrong with it."""

import base64
import contextlib
import dataclasses
import json
import zlib

import pytest
import streamlit
from hypothesis import example, given
from hypothesis import strategies as st

from pages.ui.tour import lessons
from pages.ui.tour.lessons import Lesson, Step
from tests.pages.test_pages import ROOT, open_page
from tests.schema.test_config import JSON, settings
from trsp_core.errors import TrspError
from trsp_core.pruning import validate
from trsp_core.schema import config

LETTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00")


def words(most: int, least: int = 1):
    return st.text(LETTERS, min_size=least, max_size=most).map(str.strip).filter(lambda text: len(text) >= least)


@st.composite
def usable(draw):
    chosen = draw(settings())
    with contextlib.suppress(TrspError):
        made = validate.from_values(chosen, "two-stage")
        return {name: getattr(made, name) for name in chosen}
    return {}


steps = st.builds(
    Step,
    title=words(80),
    text=words(200),
    page=st.sampled_from(lessons.PAGES),
    settings=usable(),
    prompt=st.text(LETTERS, max_size=60),
    look_at=st.text(LETTERS, max_size=60),
)
made_up = st.builds(
    Lesson,
    title=words(80),
    minutes=st.integers(1, 600) | st.floats(0.5, 600),
    steps=st.lists(steps, min_size=1, max_size=4).map(tuple),
)


def minimal(**changes):
    return {"title": "A", "minutes": 5, "steps": [{"title": "B", "text": "C", "page": "run"}]} | changes


@given(made_up)
def test_a_lesson_comes_back_from_its_file_and_from_its_link(lesson):
    assert lessons.load(lessons.to_json(lesson)) == lesson
    assert lessons.load(lessons.to_json(lesson, indent=None).encode("utf-8-sig")) == lesson
    try:
        word = lessons.pack(lesson)
    except TrspError:
        with pytest.raises(TrspError, match="too long for a link"):
            lessons.pack(lesson)
        return
    assert lessons.find(word) == lesson
    assert word.replace(".", "").replace("-", "").replace("_", "").isalnum(), "a link may hold it as it is"


@example('{"title": "A", "minutes": 1e999, "steps": [1]}')
@example('{"title": "A", "minutes": -1' + "0" * 400 + ', "steps": [1]}')
@example("[" * 5000)
@example('{"title": "\\ud800", "minutes": ' + "9" * 5000 + ', "steps": {}}')
@given(st.text() | JSON.map(json.dumps) | JSON.map(lambda v: json.dumps({"title": "A", "minutes": 2, "steps": v})))
def test_a_hostile_file_is_refused_and_nothing_else(text):
    with contextlib.suppress(TrspError):
        assert isinstance(lessons.load(text), Lesson)


@given(st.binary(max_size=300) | st.text().map(str.encode))
def test_hostile_bytes_and_links_are_refused_and_nothing_else(given_bytes):
    for read in (lambda: lessons.load(given_bytes), lambda: lessons.find(given_bytes.decode("utf-8", "ignore"))):
        with pytest.raises(TrspError):
            read()
    with pytest.raises(TrspError):
        lessons.find(lessons.PACKED + base64.urlsafe_b64encode(given_bytes).decode())


@given(made_up, st.data())
def test_a_link_that_was_cut_or_changed_never_becomes_another_lesson(lesson, data):
    try:
        word = lessons.pack(lesson)
    except TrspError:
        return
    with pytest.raises(TrspError, match="cut short or changed"):
        lessons.find(word[: data.draw(st.integers(2, len(word) - 1))])


def test_a_link_that_unfolds_to_gigabytes_is_refused():
    bomb = zlib.compress(b'{"title": "' + b"A" * 3_000_000 + b'"}', 9)
    word = lessons.PACKED + base64.urlsafe_b64encode(bomb).decode()
    assert len(word) < lessons.MOST_IN_LINK
    with pytest.raises(TrspError, match="cannot be read"):
        lessons.find(word)


def test_all_faults_are_told_at_once_with_step_and_field():
    bad = {
        "title": " ",
        "minutes": True,
        "author": "x",
        "steps": [
            {"title": "B", "text": "C", "page": "run"},
            {"title": "B", "text": 5, "page": "front", "settings": {"ratio": 2, "nonsense": 1}, "when": "now"},
            "walk about",
        ],
    }
    with pytest.raises(TrspError) as caught:
        lessons.parse(bad)
    assert [p.knob for p in caught.value.problems] == [
        "title",
        "minutes",
        "'author'",
        "Step 2, text",
        "Step 2, page",
        "Step 2, settings, ratio",
        "Step 2, settings, nonsense",
        "Step 2, 'when'",
        "Step 3",
    ]
    assert all(p.remedy and p.message.startswith(p.knob[:1].upper() + p.knob[1:]) for p in caught.value.problems)
    assert "9 things in this lesson" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": []}, "at least one step"),
        ({"steps": [minimal()["steps"][0]] * 31}, "at most 30 steps"),
        ({"minutes": 0}, "out of range"),
        ({"minutes": 601}, "out of range"),
        ({"title": "A" * 81}, "too many"),
        ({"steps": [minimal()["steps"][0] | {"text": "A" * 1201}]}, "too many"),
        ({"steps": [minimal()["steps"][0] | {"settings": {"method": "manual"}}]}, "needs the layers"),
    ],
)
def test_bounds(changes, said):
    with pytest.raises(TrspError) as caught:
        lessons.parse(minimal(**changes))
    assert said in str(caught.value)


def test_a_file_that_is_no_json_says_where():
    with pytest.raises(TrspError, match="line 2, column"):
        lessons.load('{"title": "A",\n "minutes" 3}')
    with pytest.raises(TrspError, match="too long"):
        lessons.load("[" + " " * lessons.MOST_BYTES)
    with pytest.raises(TrspError, match="UTF-8"):
        lessons.load(b"\xff\xfe\x00")


def test_what_ships_can_be_used_named_and_put_into_a_link():
    there = lessons.shipped()
    assert {"two-minutes", "twenty-minutes", "ratio-ladder", "lambda-1", "literal-gate"} <= set(there)
    for name, lesson in there.items():
        assert lessons.find(name) == lesson
        assert lessons.find(lessons.pack(lesson)) == lesson
        for step in lesson.steps:
            assert validate.check(validate.from_values(step.form()), n_layers=30, max_length=8192) == [], (
                name,
                step.title,
            )
    for tour in ("two-minutes", "twenty-minutes"):
        assert 6 <= len(there[tour].steps) <= 8


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(TrspError, match="two-minutes"):
        lessons.find("three-minutes")


def test_home_takes_a_lesson_tells_its_faults_and_gives_its_link(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    streamlit.cache_resource.clear()
    app = open_page("home")
    upload = app.get_by_key("lesson-file")
    good = lessons.parse(minimal())
    upload.set_value(("mine.json", lessons.to_json(good).encode(), "application/json")).run()
    assert not app.exception
    assert [c.value for c in app.code if lessons.pack(good) in c.value]
    app.get_by_key("lesson-file").set_value(("bad.json", b'{"title": "A"}', "application/json")).run()
    said = " ".join(e.value for e in app.error)
    assert "Minutes" in said
    assert "at least one step" in said
    app.get_by_key("lesson-file").set_value(("worse.json", b"{", "application/json")).run()
    assert "no JSON" in app.error[0].value


def test_a_step_fills_the_whole_form():
    step = lessons.parse(minimal()).steps[0]
    changed = dataclasses.replace(step, settings={"lambda_1": 0.5})
    assert set(changed.form()) == set(config.KNOBS)
    assert changed.form() == step.form() | {"lambda_1": 0.5}
    assert validate.from_values(step.form()) == validate.from_values({}, "two-stage")
