"""The guide walks a lesson across the pages; the cards set the knobs; the recorded run is there for both."""

from __future__ import annotations

import re
import threading

import pytest
from streamlit.testing.v1 import AppTest

from pages.ui.tour import glossary, guide, lessons
from pages.ui.tour.lessons import Lesson, Step
from tests.pages.test_pages import open_page, texts
from trsp_core.errors import TrspError
from trsp_core.runs import replay
from trsp_core.runs.store import Store


@pytest.fixture(autouse=True)
def store(page_store, monkeypatch) -> Store:
    monkeypatch.setattr(
        "pages.ui.what_if.requests._ask", lambda name, request: True
    )  # no workbench: no process of its own
    return page_store


def at(app: AppTest) -> tuple[str, str]:
    """Lesson and step in the address."""
    one = {k: v if isinstance(v, str) else v[0] for k, v in app.query_params.items()}
    return one.get("lesson", ""), one.get("step", "")


def press(app: AppTest, key: str) -> None:
    app.get_by_key(key).click().run()
    assert not app.exception, [e.value for e in app.exception]


def title(step: Step) -> str:
    return re.sub(r"\W+", "", step.title)


@pytest.mark.parametrize("name", ["two-minutes", "twenty-minutes"])
def test_a_tour_is_walked_forth_and_back_from_home_to_its_end(name):
    steps = lessons.shipped()[name].steps
    assert 6 <= len(steps) <= 8
    app = open_page("home")
    press(app, f"tour-{name}")
    for n, step in enumerate(steps):
        assert at(app) == (name, str(n + 1))
        shown = re.sub(r"\W+", "", texts(app))
        assert f"{n + 1}of{len(steps)}{title(step)}" in shown
        assert not [b for b in app.button if b.key == "guide-here"], f"step {n + 1} opened another page than its own"
        if step.page == "run":
            for knob, value in step.settings.items():
                assert app.get_by_key(f"knob-{knob}").value == value
        if step.page == "layers" and step.settings:
            assert app.query_params["off"] in ("0", ["0"])
            assert app.get_by_key("as-dense"), "the part with the buttons is not open"
        if step.page == "compare" and step.prompt:
            assert app.get_by_key("compare-prompt").value == step.prompt
        if n + 1 < len(steps):
            press(app, "guide-next")
    press(app, "guide-back")
    assert at(app) == (name, str(len(steps) - 1))
    press(app, "guide-next")
    assert app.get_by_key("guide-next").label == "Finish"
    press(app, "guide-next")
    assert at(app) == ("", "")
    assert not [b for b in app.button if b.key == "guide-next"]


def test_a_step_survives_a_refresh_and_a_change_of_page():
    app = open_page("evidence", lesson="two-minutes", step="3")
    assert at(app) == ("two-minutes", "3")
    assert "Go to Home" in texts(app)
    app.switch_page("pages/views/runs.py").run()
    assert at(app) == ("two-minutes", "3")
    press(app, "guide-here")
    assert "Move what they knew" in texts(app)
    assert not [b for b in app.button if b.key == "guide-here"]
    press(app, "guide-leave")
    app.switch_page("pages/views/runs.py").run()
    assert at(app) == ("", "")


def test_a_link_to_a_lesson_opens_its_first_step_on_its_page():
    lesson = Lesson("Mine", 5, (Step("Ask for a fifth", "Press Start.", "run", {"ratio": 0.2}), Step("B", "C", "runs")))
    app = open_page("home", lesson=lessons.pack(lesson))
    assert "1 of 2" in texts(app)
    assert app.get_by_key("knob-ratio").value == 0.2
    assert at(app) == (lessons.pack(lesson), "1")
    press(app, "guide-next")
    assert at(app)[1] == "2"


@pytest.mark.parametrize("word", ["no-such-lesson", "1.cutshort", guide.OWN, "../../etc"])
def test_a_lesson_that_cannot_be_read_is_told_and_left(word):
    app = open_page("runs", lesson=word, step="2")
    assert app.warning[0].value
    assert at(app) == ("", "")
    assert not [b for b in app.button if b.key == "guide-next"]


@pytest.mark.parametrize("step", ["0", "99", "-1", "x", "1e3", "99999999999"])
def test_a_step_that_does_not_exist_is_the_nearest_or_the_first(step):
    app = open_page("home", lesson="two-minutes", step=step)
    assert at(app)[1] in ("1", str(len(lessons.shipped()["two-minutes"].steps)))


def test_each_experiment_opens_its_page_with_its_settings():
    for n, step in enumerate(lessons.shipped()["experiments"].steps):
        app = open_page("home")
        press(app, f"experiment-go-{n}")
        if step.page == "run":
            for knob, value in step.settings.items():
                assert app.get_by_key(f"knob-{knob}").value == value
        else:
            assert app.query_params["off"] in (step.settings["layers"], [step.settings["layers"]])


def test_a_set_of_an_experiment_replaces_the_one_that_was_tried_before():
    app = open_page("home")
    press(app, "experiment-go-0")
    app.switch_page("pages/views/home.py").run()
    press(app, "experiment-go-1")
    assert app.query_params["off"] in ("13,14,15,16", ["13,14,15,16"])
    assert "~~13~~" in texts(app)
    assert "~~0~~" not in texts(app)


def test_the_recorded_run_is_adopted_once_by_however_many_and_comes_back_if_deleted(store):
    found = []
    threads = [threading.Thread(target=lambda: found.append(_adopted(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {run.id for run in found} == {replay.RECORDED}
    assert [run.id for run in store.runs()] == [replay.RECORDED]
    assert [p.name for p in store.root.iterdir()] == [replay.RECORDED], "a half copy was left"
    assert found[0].state() == _adopted(store).state()
    assert found[0].status() == "finished"
    store.delete(replay.RECORDED)
    assert _adopted(store).status() == "finished"
    shown = open_page("layers", run=replay.RECORDED)
    assert "22 of 30 layers stay" in texts(shown)


def _adopted(store: Store):
    return store.adopt(replay.FOLDER, replay.RECORDED)


def test_a_full_disk_is_told_when_the_recorded_run_is_wanted(store, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(TrspError, match="No space left"):
        _adopted(store)
    assert "No space left" in open_page("run", run=replay.RECORDED).warning[0].value


def test_the_glossary_explains_the_words_of_the_field():
    wanted = [
        "layer",
        "block",
        "perplexity",
        "calibration",
        "held",
        "lambda",
        "gate",
        "gap",
        "pruning",
        "kl",
        "distillation",
    ]
    told = " ".join(glossary.TERMS).lower()
    assert [word for word in wanted if word not in told] == []
    assert "wavers between" in texts(open_page("home"))
