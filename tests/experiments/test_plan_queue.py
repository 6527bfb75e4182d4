"""Plans that a server works through: each run once, one after the other, whatever becomes of tabs and servers; and the
button for it on the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.ui.app_state import server
from tests import ROOT, story, tiny
from tests.runs.test_queue import CHILD
from trsp_core.errors import TrspError
from trsp_core.experiments import plan_queue, plans
from trsp_core.experiments.plan_queue import PlanQueue
from trsp_core.models import catalog
from trsp_core.models.inspection import Facts
from trsp_core.preparation import preflight
from trsp_core.runs import process, recorder
from trsp_core.runs.queue import RunQueue
from trsp_core.runs.store import Store

NAMES = [v["name"] for v in plans.built_in()["ablation"]["variations"]]


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """Runs that are written at once, in a fresh folder."""
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    facts = Facts("tiny", tmp_path, "LlamaForCausalLM", story.L, 32, 128, 512, 50_000, [8_000] * story.L, 200_000)
    monkeypatch.setattr(catalog, "facts", lambda name: facts)
    monkeypatch.setattr(preflight, "preflight", lambda config: None)
    monkeypatch.setattr(plan_queue, "PAUSE", 0.05)
    monkeypatch.setattr(process, "start", tell)
    st.cache_resource.clear()
    return Store()


def tell(run):
    recorder.record(run, story.tell())
    return story.no_child(run)


def fail(run):
    recorder.record(run, story.failing())
    return story.no_child(run)


def wait_for_go(run):
    """A real child that runs until it is told to end, or to stop."""
    child = CHILD.replace("    yield events.RunFinished(1)", "    yield from told.tell()")
    child = "from tests import story as told\n" + child
    return subprocess.Popen([sys.executable, "-c", child, str(run.folder)], start_new_session=True, cwd=ROOT)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ran(store) -> list[str]:
    return [name for run in reversed(store.runs()) if (name := (plans.belongs(run) or ("", ""))[1])]


def test_a_plan_is_worked_through_and_pressing_twice_does_nothing_twice(store):
    book = PlanQueue(store, RunQueue(store))
    assert book.standing("ablation").done == 0
    book.start("ablation")
    book.start("ablation")
    until(lambda: book.standing("ablation").done == len(NAMES))
    until(lambda: not book.standing("ablation").active)
    book.start("ablation")
    until(lambda: not book.standing("ablation").active)
    assert sorted(ran(store)) == sorted(NAMES)
    assert {run.config().layers for run in store.runs() if run.config().method == "manual"} == {"2,3"}


def test_stop_ends_the_run_at_hand_and_the_missing_ones_can_be_run_later(store, monkeypatch):
    monkeypatch.setattr(process, "start", wait_for_go)
    book = PlanQueue(store, RunQueue(store))
    book.start("ablation")
    until(lambda: store.runs() and store.runs()[0].status() == "running")
    now = book.standing("ablation")
    assert (now.active, now.done, now.total, now.title) == (True, 0, len(NAMES), "TRSP")
    assert now.seconds_left
    book.stop("ablation")
    until(lambda: store.runs()[0].status() == "cancelled")
    time.sleep(0.5)
    assert not book.standing("ablation").active
    assert ran(store) == ["trsp"]
    monkeypatch.setattr(process, "start", tell)
    book.start("ablation")
    until(lambda: book.standing("ablation").done == len(NAMES))
    assert sorted(ran(store)) == sorted(NAMES), "the stopped one went on, and was not begun anew"


def test_a_run_that_fails_takes_the_plan_off_the_agenda_with_its_reason(store, monkeypatch):
    monkeypatch.setattr(process, "start", fail)
    book = PlanQueue(store, RunQueue(store))
    book.start("ablation")
    until(lambda: book.standing("ablation").trouble)
    now = book.standing("ablation")
    assert not now.active
    assert "“TRSP” did not finish" in now.trouble
    assert now.trouble.endswith("Bring at least [384] tokens.")
    time.sleep(0.3)
    assert ran(store) == ["trsp"]


def test_the_next_server_goes_on(store, monkeypatch):
    monkeypatch.setattr(process, "start", wait_for_go)
    first = RunQueue(store)
    book = PlanQueue(store, first)
    book.start("ablation")
    until(lambda: store.runs() and store.runs()[0].status() == "running")
    book.close()  # the old server is gone
    first.workers = 0
    monkeypatch.setattr(process, "start", tell)
    again = PlanQueue(store, RunQueue(store))
    assert again.standing("ablation").at_hand == store.runs()[0]
    (store.runs()[0].folder / "go").touch()
    until(lambda: again.standing("ablation").done == len(NAMES))
    until(lambda: not again.standing("ablation").active)
    assert sorted(ran(store)) == sorted(NAMES)


def test_a_plan_that_cannot_begin_is_refused_at_once(store, monkeypatch):
    def refuse(config):
        raise TrspError("There is no room.", "Make some.")

    monkeypatch.setattr(preflight, "preflight", refuse)
    book = PlanQueue(store, RunQueue(store))
    with pytest.raises(TrspError, match="no room"):
        book.start("ablation")
    with pytest.raises(TrspError):
        book.start("unheard")
    assert not book.standing("ablation").active


def open_page() -> AppTest:
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.query_params["evidence-part"] = "Does the knowledge move?"
    app.switch_page("pages/views/evidence.py")
    app.run()
    assert not app.exception, [e.value for e in app.exception]
    return app


def shown(app) -> str:
    kinds = ("markdown", "caption", "error", "info")
    return "\n".join([*(e.value for kind in kinds for e in app.get(kind)), *(b.label for b in app.button)])


def test_the_button_on_the_page_runs_the_plan_and_shows_how_it_stands(store, monkeypatch):
    monkeypatch.setattr(process, "start", wait_for_go)
    app = open_page()
    assert f"Run all {len(NAMES)}" in shown(app)
    app.get_by_key("run-plan-ablation").click().run()
    assert not app.exception
    until(lambda: server.plan_queue().standing("ablation").at_hand)
    app = open_page()
    assert app.get_by_key("stop-plan-ablation") is not None
    assert any("At hand: TRSP" in str(e.proto) for e in app.get("page_link"))
    app.get_by_key("stop-plan-ablation").click().run()
    until(lambda: store.runs()[0].status() == "cancelled")
    app = open_page()
    assert f"0 of {len(NAMES)} runs are on this machine" in shown(app)
    monkeypatch.setattr(process, "start", tell)
    app.get_by_key("run-plan-ablation").click().run()
    until(lambda: server.plan_queue().standing("ablation").done == len(NAMES))
    until(lambda: not server.plan_queue().standing("ablation").active)
    assert f"All {len(NAMES)} runs of this plan are on this machine" in shown(open_page())
    assert sorted(ran(store)) == sorted(NAMES)


def test_the_page_says_why_a_plan_cannot_begin(store, monkeypatch):
    def refuse(config):
        raise TrspError("There is no room.", "Make some.")

    monkeypatch.setattr(preflight, "preflight", refuse)
    app = open_page()
    app.get_by_key("run-plan-ablation").click().run()
    assert "There is no room" in shown(app)
    assert store.runs() == []


@pytest.mark.slow
def test_a_plan_of_real_runs_on_a_tiny_model(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(1200), "utf-8")
    small = {k: json.loads(v) for k, v in story.SMALL.items()} | {"threads": 1, "ratio": 0.4, "kl_blocks": 1}
    small |= {"model": str(tiny_model), "text": str(text), "heldout": str(text), "sample_tokens": 0}
    document = plans.built_in()["ablation"]
    document["base"] |= small | {"importance_blocks": 0, "speed_repeats": 0}
    document["variations"] = [v for v in document["variations"] if v["name"] in ("trsp", "delete_first")]
    monkeypatch.setattr(plans, "built_in", lambda: {"ablation": document})
    store = Store()
    book = PlanQueue(store, RunQueue(store))
    book.start("ablation")
    until(lambda: book.standing("ablation").done == 2, seconds=300)
    trsp, control = reversed(store.runs())
    assert control.config().layers == ",".join(map(str, sorted(trsp.state().chosen)))
