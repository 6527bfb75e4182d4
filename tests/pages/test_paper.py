"""The paper page: what it names exists, and what it says in numbers comes from the records."""

from __future__ import annotations

import ast
import re

import pytest

from pages.ui.app_state import session
from pages.ui.evidence import faq
from pages.ui.paper import departures, equations
from tests import story
from tests.pages.test_pages import ROOT, open_page, texts
from trsp_core import formatting
from trsp_core.experiments import grid_results
from trsp_core.pruning import validate
from trsp_core.runs.store import Store
from trsp_core.schema import config
from trsp_core.schema.config import KNOBS


@pytest.fixture(autouse=True)
def store(page_store) -> Store:
    return page_store


def test_every_knob_that_the_paper_speaks_of_stands_at_an_equation():
    shown = {name for equation in equations.EQUATIONS for name in equation.knobs}
    assert shown <= set(KNOBS)
    of_the_method = {n for n, k in KNOBS.items() if (k.paper and k.group in ("stage 1", "stage 2")) or "lambda" in n}
    assert of_the_method - {"stage1_weight_lr"} <= shown


def test_the_code_that_an_equation_names_is_there():
    for equation in equations.EQUATIONS:
        for file, call in equation.code:
            tree = ast.parse((ROOT / "trsp_core" / file).read_text("utf-8"))
            names = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            assert call in names, (file, call)


def test_the_table_of_departures_tells_the_defaults_as_they_are():
    assert [name for _, name, *_ in departures.ROWS if name not in KNOBS] == []
    here = dict(zip([r[1] for r in departures.ROWS], departures.table()["Here"], strict=True))
    assert here["gate"] == KNOBS["gate"].default
    assert here["anneal"] == f"{config.PRESETS['two-stage']['anneal']:g}"


def test_each_literal_run_is_a_config_and_comes_back_from_its_link():
    for settings in departures.RUNS.values():
        values, problems = session.read_settings(session.as_parameters(dict(session.START) | dict(settings)))
        assert problems == []
        made = validate.from_values(values)
        assert validate.check(made, n_layers=30, max_length=8192) == []
        assert {k: getattr(made, k) for k in settings} == dict(settings)


def test_every_answer_is_made_from_a_record():
    said = faq.answers(faq.shipped())
    assert len(said) == len(faq.QUESTIONS)
    for question, sentences in said:
        text = " ".join(sentences)
        assert re.search(r"\d", text), question
        assert "is not here" not in text, question


def test_an_answer_changes_with_its_record():
    found = faq.shipped()
    sweep = found.sweeps["choice"]
    before = faq.gates(found)
    value = grid_results.perplexity(sweep.of("output"), "heldout").value
    assert formatting.perplexity(value) in " ".join(before)
    for losses in sweep.of("output")[0].losses.values():
        losses[:] = [loss + 1 for loss in losses]
    try:
        assert faq.gates(found) != before
    finally:
        faq.shipped.cache_clear()


def test_without_records_each_question_says_what_to_do():
    for _, sentences in faq.answers(faq.Evidence({}, {})):
        assert "page Evidence" in sentences[0]
    assert "buttons below" in faq.gates(faq.Evidence({}, {}))[0]


@pytest.mark.parametrize("there", [False, True])
def test_the_page_leads_to_a_run(store, there):
    run = story.write(store, "finished") if there else None
    app = open_page("paper")
    shown = texts(app)
    for equation in equations.EQUATIONS:
        assert equation.title in shown
    links = {link.proto.label: link.proto for link in app.get("page_link")}
    assert ("See it in the newest run" in links) == there
    if run:
        assert run.id in links["See it in the newest run"].query_string
    assert "gate=output" in links["The gate as drawn"].query_string
    assert shown.count("mathcal") >= 2
    assert not re.search(r"\b(nan|None)\b", shown)
