"""Figures that ship: answered without a child, as long as model and texts are those that were measured."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.recording import demo_run
from benchmarks.recording import what_if as recording
from tests import tiny
from trsp_core.data import blocks
from trsp_core.errors import TrspError
from trsp_core.models import catalog, libraries
from trsp_core.pruning import engine, validate
from trsp_core.runs import recorder
from trsp_core.runs.store import Run, Store
from trsp_core.schema import codec
from trsp_core.schema import messages as an
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.messages import WhatIf
from trsp_core.workbench import recorded, transcript, weighing
from trsp_core.workbench.client import Workbench
from trsp_core.workbench.worker import RequestHandler

DEFAULT = str(KNOBS["model"].default)


@pytest.fixture(scope="module")
def request_(tiny_model, text):
    return WhatIf(str(tiny_model), [], text=text, heldout=text, prompt="The river", sample_tokens=4)


@pytest.fixture(scope="module")
def file(request_, tmp_path_factory):
    """A record of the tiny model."""
    path = tmp_path_factory.mktemp("record") / "what_if.json"
    path.write_text(codec.encode_document(recording.record(request_, [1, 2]), recorded.SCHEMA), "utf-8")
    return path


def test_a_record_answers_what_the_child_would(request_, file):
    depth = len(recorded.read(file).layer_parameters)
    handler = RequestHandler()
    for removed in ([], [0], [depth - 1], [1, 2]):
        request = dataclasses.replace(request_, removed=removed)
        known, rest = recorded.answers(request, file)
        assert rest is None
        measured = next(a for a in handler.answer(request) if isinstance(a, an.SetMeasured))
        assert known[0].recorded
        for name in ("perplexity", "dense", "kl"):
            assert getattr(known[0], name) == pytest.approx(getattr(measured, name), rel=1e-6, abs=1e-7)
        fields = ("removed", "n_layers", "tokens", "parameters", "parameters_dense", "ceiling")
        assert [getattr(known[0], f) for f in fields] == [getattr(measured, f) for f in fields]
        text = "".join(a.piece for a in handler.answer(request) if isinstance(a, an.TokenGenerated))
        assert known[1].piece == text
    rated = recorded.answers(an.Influence(an.Variant(request_.model), request_.text, request_.heldout), file)[0]
    assert [a.layer for a in rated] == list(range(depth))


def test_figures_that_are_known_are_not_measured_again_for_another_sample(request_, file):
    request = dataclasses.replace(request_, removed=[1], prompt="A garden")
    known, rest = recorded.answers(request, file)
    assert [type(a) for a in known] == [an.SetMeasured]
    assert rest == dataclasses.replace(request, figures=False)
    answers = list(RequestHandler().answer(rest))
    assert not any(isinstance(a, an.SetMeasured) for a in answers)
    assert any(isinstance(a, an.TokenGenerated) for a in answers)
    assert recorded.answers(dataclasses.replace(request, sample_tokens=0), file)[1] is None


@pytest.mark.parametrize("change", [{"removed": [0, 3]}, {"seed": 1}, {"text": "news"}, {"model": "gemma3-270m"}])
def test_what_was_not_recorded_is_asked(request_, file, change):
    request = dataclasses.replace(request_, **change)
    assert recorded.answers(request, file) == ([], request)


def test_another_model_under_the_same_name_is_measured(request_, file, tmp_path):
    record = dataclasses.replace(recorded.read(file), model_fingerprint="0" * 16)
    other = tmp_path / "other.json"
    other.write_text(codec.encode_document(record, recorded.SCHEMA), "utf-8")
    assert recorded.answers(request_, other) == ([], request_)


def test_the_record_that_ships_is_whole_small_and_of_these_texts(monkeypatch, tmp_path):
    record = recorded.read()
    assert [entry.measured.removed for entry in record.sets[:31]] == [[], *([i] for i in range(30))]
    assert record.covers(DEFAULT, "wikipedia", "news", 0)
    assert len(record.influence) == len(record.layer_parameters) == 30
    assert recorded.FILE.stat().st_size < 25_000
    monkeypatch.setenv("TRSP_HOME", str(tmp_path))  # no model here yet
    assert recorded.holds(record)


def test_the_record_that_ships_is_of_the_blocks_that_are_measured_now():
    """Else it is time for `python -m benchmarks.recording what-if`."""
    tokenizer = libraries.load_tokenizer(catalog.locate(DEFAULT))
    config = RunConfig(measure_blocks=1, measure_length=an.QUICK_TOKENS, calibration_blocks=1, block_length=8)
    texts = blocks.prepare(config, tokenizer)
    now = {domain: blocks.fingerprint(ids.tolist()) for domain, ids in texts.measure.items()}
    assert now == recorded.read().block_fingerprints


def test_the_first_click_on_the_default_model_needs_no_child():
    bench = Workbench(command=("/bin/false",))
    try:
        reading = bench.read(bench.ask(WhatIf(DEFAULT, [7])))
        assert isinstance(reading.ending, an.Answered)
        (measured,) = (a for a in reading.answers if isinstance(a, an.SetMeasured))
        assert (measured.removed, measured.recorded) == ([7], True)
        assert measured.perplexity["heldout"] > measured.dense["heldout"]
    finally:
        bench.close()


def _proved(folder, kept):
    yield from ()
    return SimpleNamespace(problems=[])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, tiny_model):
    """A record made from a run of the tiny model, named as one that ships would be: by no path of this machine."""
    place = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(tiny_model, "tiny")
        Path("text.txt").write_text(tiny.text(1200), "utf-8")
        patch.setattr("trsp_core.evaluation.verification.checking", _proved)
        values = tiny.SETTINGS | {"model": "tiny", "text": "text.txt", "heldout": "text.txt", "transfer": "none"}
        run = Store(place / "runs").create(validate.from_values(values | {"save_model": True}))
        assert recorder.record(run, engine.execute(run.config(), run.folder)).ended == "finished"
        report = demo_run.record(str(run.folder), [], place / "demo_run")
        yield Run(place / "demo_run"), report


def test_what_ships_of_a_run_has_every_part(shipped):
    run, report = shipped
    assert demo_run.missing(run) == []
    assert "comparisons" in report
    assert len(transcript.comparisons(run)) == 5
    request, answers = transcript.read(run, transcript.comparisons(run)[0])
    whole = transcript.gather(request, answers)
    assert [c.label for c in whole.columns] == list(demo_run.LABELS)
    assert request.columns[2].model == ""
    state = run.state()
    stored = weighing.read(run, state)
    rises = weighing.with_importance(state, stored).importance
    assert [math.isnan(v) for v in rises["trained"].rises] == [i in state.chosen for i in range(tiny.L)]


def test_texts_come_as_they_were_written(shipped):
    request, answers = transcript.read(shipped[0], transcript.comparisons(shipped[0])[0])
    tokens = [a for a in answers if isinstance(a, an.TokenGenerated)]
    assert transcript.until(answers, tokens[-1].seconds) == answers
    early = transcript.until(answers, tokens[3].seconds - 1e-6)
    assert 0 < sum(len(c.tokens) for c in transcript.gather(request, early).columns) <= 3
    assert not any(isinstance(a, an.TextTraced | an.ColumnFinished) for a in early)


def test_a_run_that_kept_nothing_is_refused(shipped, tmp_path):
    with pytest.raises(TrspError, match="its model"):
        demo_run.record(str(shipped[0].folder), [], tmp_path / "demo_run")
    assert not (tmp_path / "demo_run").exists()
