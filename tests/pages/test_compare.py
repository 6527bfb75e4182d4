"""Compare and what-if pages over a workbench that answers from a script: every state, and no text as markup."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.ui.compare.prompts import PROMPTS
from pages.ui.run import importance, subjects
from pages.ui.what_if import history
from pages.ui.what_if.history import Choice, Trials
from tests import ROOT, story
from trsp_core.errors import TrspError
from trsp_core.runs import replay
from trsp_core.runs.store import Run, Store
from trsp_core.schema import messages as an
from trsp_core.workbench import transcript, weighing
from trsp_core.workbench.client import Reading
from trsp_core.workbench.weighing import Weighing

NASTY = "<b>*x*</b> $1"


class Script:
    """Stands in for the workbench: every request is answered by `answers`, or waits at `place`."""

    def __init__(self):
        self.asked: dict[str, an.Request] = {}
        self.cancelled: list[str] = []
        self.prepared: list[an.Prepare] = []
        self.place = self.others = 0
        self.ending: an.Answer | None = an.Answered(0.1)

    def prepare(self, request):
        self.prepared.append(request)

    def ask(self, request, instead="", visitor="", listens=None):
        an.check(request)
        if instead:
            self.cancel(instead)
        self.asked[f"ticket{len(self.asked)}"] = request
        return f"ticket{len(self.asked) - 1}"

    def read(self, ticket):
        if ticket not in self.asked:
            raise TrspError("These answers are no longer kept.", "Ask again.")
        request = self.asked[ticket]
        if self.place:
            return Reading(request, self.place, [], None, self.others, an.Prepare("a model"))
        told = list(_answers(request))
        return Reading(request, 0, [*told, self.ending] if self.ending else told, self.ending)

    def follow(self, ticket, seen, timeout):
        return self.read(ticket)

    def cancel(self, ticket):
        self.cancelled.append(ticket)

    def close(self):
        pass


def _answers(request):
    if isinstance(request, an.Influence):
        yield from (an.LayerRated(i, 0.1 * (i + 1)) for i in range(story.L))
    elif isinstance(request, an.WhatIf):
        level = 20.0 * (1 + len(request.removed))
        off, both = sorted(request.removed), {"calibration": level, "heldout": 2 * level}
        dense, kl = {"calibration": 20.0, "heldout": 40.0}, {"calibration": 0.1, "heldout": 0.2}
        size = 60_000 - 8_000 * len(off)
        yield an.SetMeasured(off, story.L, both, dense, kl, 255, size, 60_000, 1.2, 4, False, 0.2)
        yield an.TokenGenerated(0, 5, f" {NASTY}", 0.1)
    elif isinstance(request, an.Generate):
        texts = [[" a", " b", " c"], [" a", f" {NASTY}", " b b b b b b"], [" a", " b", " c"]][: len(request.columns)]
        for n, pieces in enumerate(texts):
            yield an.PromptRead(n, 4, False)
            for i, piece in enumerate(pieces):
                yield an.TokenGenerated(n, hash(piece) % 1000, piece, 0.1 * (i + 1))
            yield an.ColumnFinished(n, 3, "length", 100.0, 10.0 * (n + 1))
        for t, pieces in enumerate(texts):
            for n in range(len(texts)):
                two = [["x", "y"]] * 3
                kl = [0.0, 1.5, 0.2] if n else [0.0] * 3
                yield an.TextTraced(t, n, [1, 2, 3], pieces, [0.5] * 3, two, [[0.5, 0.1]] * 3, kl, 6.0)


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trsp_core.runs.process.start", story.no_child)
    st.cache_resource.clear()
    made = Script()
    monkeypatch.setattr("pages.ui.app_state.workbench.Workbench", lambda: made)
    yield made
    st.cache_resource.clear()


def open_page(name, **query):
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    app.query_params.update({k: [v] for k, v in query.items()})
    app.switch_page(f"pages/views/{name}.py")
    return shown(app.run())


def shown(app):
    assert not app.exception, [e.value for e in app.exception]
    return app


def texts(app):
    kinds = ("title", "header", "markdown", "caption", "error", "warning", "info", "code")
    return "\n".join(str(e.value) for kind in kinds for e in app.get(kind))


def query(app, name):
    value = app.query_params[name]
    return value if isinstance(value, str) else value[0]


def press(app, key):
    return shown(app.button(key=key).click().run())


def test_without_any_run_the_default_model_can_be_asked_and_is_loaded_ahead(script):
    app = open_page("compare")
    assert script.prepared == [an.Prepare("smollm2-135m")]
    assert not Store().runs()  # nothing was copied
    press(app, "write")
    (request,) = script.asked.values()
    assert [c.label for c in request.columns] == ["Dense", "Deleted at once"]
    assert request.columns[1].removed == sorted(subjects.shipped().state.chosen)


def test_recorded_texts_are_there_at_once_and_are_written_again(script, tmp_path, monkeypatch):
    folder, clock = tmp_path / "demo_run", [100.0]
    shutil.copytree(replay.FOLDER, folder, ignore=shutil.ignore_patterns("comparisons"))
    monkeypatch.setattr(replay, "FOLDER", folder)
    monkeypatch.setattr("pages.ui.compare.recorded_texts.time", SimpleNamespace(monotonic=lambda: clock[0]))
    columns = [an.Variant("a model", label=label) for label in ("Dense", "Deleted at once", "Pruned")]
    request = an.Generate(columns, PROMPTS["Story"])
    transcript.keep(Run(folder), request, list(_answers(request)))
    app = open_page("compare")
    assert "**Recorded**" in texts(app)
    assert "Leaves Dense at token 2" in texts(app)
    assert "Token by token" in texts(app)
    assert not script.asked
    clock[0] += 5
    app = press(app, "replay-texts")
    assert "Token by token" not in texts(app)
    clock[0] += 0.25  # two of three tokens of each
    assert "Leaves Dense at token 2" in texts(shown(app.run()))
    clock[0] += 5
    assert "Token by token" in texts(shown(app.run()))
    app.text_area(key="compare-prompt").set_value("Something else").run()
    assert "**Recorded**" not in texts(app)


def test_without_any_run_layers_of_the_default_model_can_be_taken_out(script):
    app = open_page("layers")
    assert "as it came" in texts(app)
    assert script.prepared == [an.Prepare("smollm2-135m", "wikipedia", "news")]
    app = press(app, "layer-29")
    assert query(app, "off") == "29"
    app = press(app, "as-run")
    assert query(app, "off") == ",".join(map(str, sorted(subjects.shipped().state.chosen)))
    press(app, "run-manual")
    (run,) = Store().runs()
    assert run.config().method == "manual"


def test_a_run_or_the_model_as_it_came_is_picked(script):
    story.write(Store(), "finished")
    app = open_page("layers")
    assert "as it came" not in texts(app)
    app = shown(app.selectbox(key="chosen-run").set_value("default").run())
    assert "as it came" in texts(app)


def test_a_prompt_is_asked_of_the_chosen_models(script):
    run = story.write(Store(), "finished")
    app = open_page("compare", run=run.id)
    assert "did not keep its pruned model" in texts(app)
    app = press(app, "write")
    (request,) = script.asked.values()
    assert [c.label for c in request.columns] == ["Dense", "Deleted at once"]
    assert request.columns[1].removed == sorted(story.CHOSEN)
    assert query(app, "ask") == "ticket0"
    assert "Leaves Dense at token 2" in texts(app)
    assert "repeats itself: 36 %" in texts(app).replace("\\", "").replace("\u00a0", " ")
    assert "reads like gibberish" in texts(app)
    assert "**20 tokens/s**" in texts(app)


def test_a_text_is_shown_letter_by_letter(script):
    app = press(open_page("compare", run=story.write(Store(), "finished").id), "write")
    marked = next(m.value for m in app.markdown if "orange-background" in m.value)
    assert r"\<b\>\*x\*\</b\> \$1" in marked
    assert not any(NASTY in str(h.proto) for h in app.get("html"))


def test_a_pruned_model_that_was_kept_is_offered(script):
    run = story.write(Store(), "finished")
    run.model_folder.mkdir()
    (run.model_folder / "config.json").write_text("{}")
    press(open_page("compare", run=run.id), "write")
    (request,) = script.asked.values()
    pruned = request.columns[1]
    assert (pruned.label, pruned.kept) == ("Pruned", [0, 1, 4, 5])
    assert pruned.model == str(run.model_folder)


def test_the_model_before_deletion_is_offered_where_it_was_kept_and_missed_in_words_where_not(script):
    run = story.write(Store(), "finished")
    assert "measured, but not kept" in texts(open_page("compare", run=run.id))
    for folder in (run.trained_folder, run.model_folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    app = open_page("compare", run=run.id)
    assert "measured, but not kept" not in texts(app)
    app.multiselect(key="compare-models").set_value(["Dense", "Before deletion", "Pruned"]).run()
    press(app, "write")
    (request,) = script.asked.values()
    before, pruned = request.columns[1:]
    assert (before.model, before.kept) == (str(run.trained_folder), list(range(story.L)))
    assert (pruned.base, pruned.kept) == (str(run.trained_folder), [0, 1, 4, 5])


def test_a_model_without_a_chat_template_is_named(script):
    app = open_page("compare", run=story.write(Store(), "finished").id)
    app.toggle(key="compare-chat").set_value(True).run()
    assert texts(press(app, "write")).count("no chat template") == 2


def test_a_refresh_finds_text_and_form_again(script):
    run = story.write(Store(), "finished")
    app = open_page("compare", run=run.id)
    app.text_area(key="compare-prompt").set_value("My own prompt").run()
    press(app, "write")
    again = open_page("compare", run=run.id, ask="ticket0")
    assert again.text_area(key="compare-prompt").value == "My own prompt"
    assert "Leaves Dense at token 2" in texts(again)


def test_a_busy_workbench_tells_the_cause_and_can_be_left(script):
    run = story.write(Store(), "finished")
    script.place = 3
    app = press(open_page("compare", run=run.id), "write")
    assert "This comes next: the model is being loaded." in texts(app)
    script.others = 2
    assert "2 questions of other visitors come first." in texts(shown(app.run()))
    press(app, "stop-writing")
    assert script.cancelled == ["ticket0"]


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (an.Broken("The workbench process ended.", "It starts again with your next request."), "starts again"),
        (an.Refused("Too long.", "Write less."), "Write less"),
        (an.Stopped(), "Stopped"),
    ],
)
def test_bad_endings_say_what_to_do_and_keep_the_text(script, ending, words):
    script.ending = ending
    app = press(open_page("compare", run=story.write(Store(), "finished").id), "write")
    assert words in texts(app)
    assert "Leaves Dense" in texts(app)


def test_answers_that_are_gone_are_told(script):
    app = open_page("compare", run=story.write(Store(), "finished").id, ask="long-gone")
    assert "no longer kept" in texts(app)


def test_answers_of_another_page_are_told_apart(script):
    script.asked["ticket0"] = an.Influence("a model", "a text")
    app = open_page("compare", run=story.write(Store(), "finished").id, ask="ticket0")
    assert "belong to another page" in texts(app)
    assert not app.exception


def test_a_comparison_is_kept_linked_and_copied(script):
    run = story.write(Store(), "finished")
    app = press(press(open_page("compare", run=run.id), "write"), "keep")
    (name,) = transcript.comparisons(run)
    assert query(app, "kept") == name
    again = open_page("compare", run=run.id, kept=name)
    assert "Kept comparison" in texts(again)
    assert "Leaves Dense" in texts(again)
    assert any(NASTY in c.value for c in again.code)
    assert "There is no comparison" in texts(open_page("compare", run=run.id, kept="0" * 12))
    assert "There is no comparison" in texts(open_page("compare", run=run.id, kept="../../x"))


def test_kept_files_that_are_damaged_are_refused(script):
    run = story.write(Store(), "finished")
    (run.folder / "comparisons").mkdir()
    for n, text in enumerate(("", "{", "[]", "[1]", json.dumps([{"ticket": "", "kind": "Stopped"}]))):
        (run.folder / "comparisons" / f"{n:012x}.json").write_text(text)
        with pytest.raises(TrspError):
            transcript.read(run, f"{n:012x}")
    open_page("compare", run=run.id)


def test_markdown_cannot_be_broken_out_of():
    request = an.Generate([an.Variant("", label="Dense")], "a\n```\n# b", new_tokens=8)
    text = transcript.markdown(transcript.gather(request, [an.TokenGenerated(0, 1, "````", 0.1)]))
    assert "````text\na\n```\n# b\n````" in text
    assert "`````text\n````\n`````" in text


# Layers by hand


def try_it(run, **query):
    app = open_page("layers", run=run.id, **{"off": "0", **query})
    return app


def metrics(app):
    return {m.label: m.value for m in app.metric}


def test_a_click_measures_the_set_and_puts_it_into_the_address(script):
    app = press(try_it(story.write(Store(), "finished")), "layer-3")
    asked = [r for r in script.asked.values() if isinstance(r, an.WhatIf)]
    assert asked[-1].removed == [0, 3]
    assert query(app, "off") == "0,3"
    assert metrics(app)["Perplexity of one block, calibration"] == "60.0"
    assert "255 predicted tokens" in texts(app)
    assert any(r"\<b\>" in m.value for m in app.markdown)


def test_undo_redo_presets_and_protection(script):
    app = press(try_it(story.write(Store(), "finished")), "layer-3")
    app = press(app, "undo")
    assert query(app, "off") == "0"
    app = press(app, "redo")
    assert query(app, "off") == "0,3"
    app = press(app, "as-run")
    assert query(app, "off") == ",".join(map(str, sorted(story.CHOSEN)))
    app = press(app, "as-shortgpt")
    assert query(app, "off") == "0,1"
    app.segmented_control(key="what-if-mode").set_value("Protects").run()
    app = press(app, "layer-0")
    app = press(app, "as-shortgpt")
    assert query(app, "off") == "1,2"
    app = press(app, "as-dense")
    assert "off" not in app.query_params
    assert "ahead" in texts(press(app, "as-run"))


def test_a_set_in_the_address_is_measured_at_once(script):
    app = open_page("layers", run=story.write(Store(), "finished").id, off="1,3")
    assert [r.removed for r in script.asked.values() if isinstance(r, an.WhatIf)] == [[1, 3]]
    assert metrics(app)["Perplexity of one block, calibration"] == "60.0"
    script.asked.clear()
    open_page("layers", run=story.write(Store(), "finished").id, off="0,1,2,3,4,5")  # all of them: no set at all
    open_page("layers", run=story.write(Store(), "finished").id, off="99")
    assert not script.asked


def test_protected_layers_stay_whatever_a_preset_says(script):
    run = story.write(Store(), "finished")
    app = open_page("layers", run=run.id, off="0")
    app.segmented_control(key="what-if-mode").set_value("Protects").run()
    app = press(press(app, f"layer-{story.CHOSEN[0]}"), "as-run")
    assert query(app, "off") == str(story.CHOSEN[1])
    assert history.board(app.session_state[f"what-if-trials-{run.id}"])["Who"][0] == "You"  # it is not TRSP's set


def test_who_chose_a_set_is_kept_through_undo(script):
    run = story.write(Store(), "finished")
    app = press(press(try_it(run), "as-run"), "layer-5")
    tried = press(app, "undo").session_state[f"what-if-trials-{run.id}"].measured_sets
    assert {who for key, (who, _) in tried.items() if key == frozenset(story.CHOSEN)} == {"TRSP"}


@pytest.mark.parametrize("key", ["as-run", "as-shortgpt", "layer-3"])
def test_a_full_workbench_is_told_on_the_page(script, key, monkeypatch):
    def full(request, instead="", visitor="", listens=None):
        raise TrspError("All 16 places at the workbench are taken.", "Try again in a minute.")

    app = open_page("layers", run=story.write(Store(), "finished").id)
    app.session_state["layers-part"] = "Try it yourself"
    app = shown(app.run())
    monkeypatch.setattr(script, "ask", full)
    assert "16 places" in texts(press(app, key))


def test_an_earlier_question_is_dropped_for_a_later_one(script):
    app = press(try_it(story.write(Store(), "finished")), "layer-3")
    press(app, "layer-4")
    first = next(t for t, r in script.asked.items() if isinstance(r, an.WhatIf))
    assert first in script.cancelled


def test_figures_that_come_after_the_next_click_count_too(script):
    run = story.write(Store(), "finished")
    script.place = 1
    app = press(try_it(run), "layer-3")
    assert "Perplexity of one block, calibration" not in metrics(app)
    script.place = 0
    tried = press(app, "layer-4").session_state[f"what-if-trials-{run.id}"].measured_sets
    assert {frozenset({0, 3}), frozenset({0, 3, 4})} <= set(tried)


def test_a_sample_that_others_cut_short_says_so(script):
    script.ending = an.Stopped()
    assert "others wait" in texts(open_page("layers", run=story.write(Store(), "finished").id, off="1"))


def test_a_page_says_that_a_run_goes_first(script, monkeypatch):
    script.place = 2
    run = story.write(Store(), "finished")
    assert "goes first" not in texts(open_page("layers", run=run.id, off="1"))
    monkeypatch.setattr("trsp_core.runs.queue.RunQueue.goes_first", lambda self: True)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "A run is using both cores and goes first." in texts(open_page("layers", run=run.id, off="1"))


def test_stage_2_can_be_run_on_the_set(script):
    store = Store()
    app = press(try_it(story.write(store, "finished")), "layer-3")
    press(app, "run-manual")
    made = next(r for r in store.runs() if r.config().method == "manual")
    assert made.config().layers == "0,3"
    assert made.config().stage2_steps == story.CONFIG.stage2_steps


def test_where_the_knowledge_went_is_told_in_numbers():
    text = importance.sentence([1.0, 0.4, 0.2], [1.5, 0.1, 0.1], [1, 2])
    assert "chosen layers' importance **fell** from 0.30 to 0.10" in text
    assert "(2 of 2 fell)" in text
    assert "other layers' importance **rose** from 1.00 to 1.50" in text


def test_layers_weighed_in_the_pruned_model_are_told_of_those_that_are_left(script):
    run = story.write(Store(), "finished", dataclasses.replace(story.CONFIG, control="delete_first"))
    weighing.keep(run, Weighing([1.0, 0.5, 0.1, 0.1, 0.5, 1.0], [1.5, 0.4, 0.6, 1.5]))
    app = open_page("layers", run=run.id)
    app.session_state["layers-part"] = "Where the knowledge went"
    assert "The kept layers' importance **rose** from 0.75 to 1.00 nats in the mean (3 of 4 rose)." in texts(
        shown(app.run())
    )


def test_a_run_that_weighed_nothing_says_why_and_can_be_run_again(script):
    run = story.write(Store(), "finished", dataclasses.replace(story.CONFIG, importance_blocks=0))
    app = open_page("layers", run=run.id)
    app.session_state["layers-part"] = "Where the knowledge went"
    app = shown(app.run())
    assert "did not weigh" in texts(app)
    press(app, "run-weighing")
    assert max(r.config().importance_blocks for r in Store().runs()) == 1


def test_trials_are_ordered_by_size_then_by_what_they_cost():
    def measured(removed, level):
        both = {"calibration": level, "heldout": level}
        return an.SetMeasured(removed, 6, both, {"calibration": 10.0, "heldout": 10.0}, {}, 9, 1, 2, 1.0, 1, False, 0.1)

    now = Trials()
    for removed, level, who in (([1, 2], 30.0, "You"), ([3], 12.0, "You"), ([4, 5], 20.0, "TRSP"), ([], 10.0, "Dense")):
        now = now.choose(Choice(frozenset(removed), who=who)).add(measured(removed, level))
    now = now.choose(Choice(frozenset({1, 2})))
    assert history.board(now)["Who"].tolist()[:2] == ["TRSP", "You"]
    assert history.ordered_sets(now)[0] == frozenset({4, 5})
    assert history.verdict(now).startswith("**TRSP is ahead** with 2 layers removed: 2.00 times")
    assert math.isnan(history.times_dense(an.SetMeasured([], 1, {}, {}, {}, 1, 1, 1, 1.0, 1, False, 0.1)))
