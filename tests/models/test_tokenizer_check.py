"""Tokenizers from strangers are run in a bounded child before anything opens them; ids have a row, or are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as kinds

from tests import ROOT, tiny
from trsp_core import process_limits
from trsp_core.cli import main
from trsp_core.data import text_check
from trsp_core.errors import TrspError
from trsp_core.models import catalog, libraries, loading, tokenizer_check
from trsp_core.preparation import preflight
from trsp_core.pruning import engine, validate
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import config
from trsp_core.schema import messages as an
from trsp_core.workbench import model_cache, side_by_side

SMALL = {"block_length": 16, "measure_length": 16, "measure_blocks": 2, "calibration_blocks": 4, "method": "manual"}
SMALL |= {
    "layers": "1",
    "stage2_steps": 0,
    "kl_blocks": 1,
    "importance_blocks": 0,
    "speed_repeats": 0,
    "probe_blocks": 0,
}


def plain() -> Tokenizer:
    return Tokenizer(kinds.BPE(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[], unk_token="<unk>"))


def normalized(*steps) -> str:
    made = plain()
    made.normalizer = normalizers.Sequence(list(steps))
    return made.to_str()


def split(pattern: str) -> str:
    made = plain()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return made.to_str()


SLOW = [normalizers.Replace(Regex(one), other) for one, other in (("a", "b"), ("b", "a"))] * 400
HOSTILE = {
    "it grows": (normalized(*[normalizers.Replace("a", "a" * 100)] * 5), "of memory"),
    "it backtracks": (split("(a+)+$"), "breaks down"),
    "it backtracks before that": (normalized(normalizers.Replace(Regex("(a+)+$"), "b")), "breaks down"),
    "it takes long": (normalized(normalizers.Replace("a", "a" * 20_000), *SLOW), "computes for more than"),
    "it nests": ('{"model": ' + "[" * 200_000, "cannot be used"),
    "it is nothing": ("{}", "cannot be used"),
    "it is no JSON": ("\x00" * 100, "cannot be used"),
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of a model that loads, to be given another tokenizer."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(tiny.text(400), "utf-8")
    return file


def settings(model, text, **more) -> config.RunConfig:
    return validate.from_values({"model": str(model), "text": str(text), "heldout": str(text), **SMALL, **more})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_within_bounds_and_the_server_goes_on(name, model, text, monkeypatch):
    content, said = HOSTILE[name]
    (model / "tokenizer.json").write_text(content)
    monkeypatch.setattr(tokenizer_check, "CPU_SECONDS", 1)
    refused: list[TrspError] = []

    def check() -> None:
        with pytest.raises(TrspError, match="The tokenizer of") as caught:
            preflight.preflight(settings(model, text))
        refused.append(caught.value)

    process, began = psutil.Process(), time.monotonic()
    before, others, beats = process.memory_info().rss, process.children(), [began]
    thread = threading.Thread(target=check)
    thread.start()
    while thread.is_alive():
        time.sleep(0.01)
        beats.append(time.monotonic())
    assert refused, "it passed"
    assert said in refused[0].message
    assert refused[0].remedy
    assert time.monotonic() - began < 60
    assert max(b - a for a, b in itertools.pairwise(beats)) < 3, "other threads were held up"
    assert process.memory_info().rss - before < 50e6
    assert process.children() == others
    with pytest.raises(TrspError, match="The tokenizer of"):
        loading.load(str(model))


def test_one_that_never_ends_is_ended_by_the_clock(model, monkeypatch):
    (model / "tokenizer.json").write_text(HOSTILE["it takes long"][0])
    monkeypatch.setattr(tokenizer_check, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(TrspError, match=r"takes more than"):
        tokenizer_check.check(catalog.facts(str(model)))
    assert time.monotonic() - began < 5


def test_what_has_passed_is_not_run_again_until_a_file_changes(model, text, monkeypatch):
    started = []
    monkeypatch.setattr(
        process_limits, "held", lambda *given, held=process_limits.held: started.append(1) or held(*given)
    )
    for _ in range(3):
        preflight.preflight(settings(model, text))
    assert len(started) == 1
    os.utime(model / "tokenizer.json", (1, 1))
    preflight.preflight(settings(model, text))
    assert len(started) == 2
    text.write_text(tiny.text(300), "utf-8")
    preflight.preflight(settings(model, text))
    assert len(started) == 3


def test_the_child_opens_a_tokenizer_without_torch(model):
    question = {"name": "a", "folder": str(model), "rows": tiny.V}
    code = (
        "import sys; from pathlib import Path; from trsp_core.models import tokenizer_check as check;"
        "check.answering(lambda question: check.tokens_of(question['name'], Path(question['folder'])));"
        "print([m for m in ('torch', 'transformers', 'gensim') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(question), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("{}\n", "[]\n")


def test_a_bug_of_ours_is_no_refusal(model, monkeypatch):
    facts = dataclasses.replace(catalog.facts(str(model)), vocabulary=None)
    with pytest.raises(RuntimeError, match="TypeError"):
        text_check.check(facts, settings(model, "news"))


# -- ids beyond the embedding


@pytest.fixture
def grown(tiny_model, tmp_path):
    """A model whose tokenizer was given a token that its embedding has no row for."""
    folder = shutil.copytree(tiny_model, tmp_path / "grown")
    tokenizer = libraries.load_tokenizer(folder)
    assert tokenizer.add_tokens([AddedToken("Zanzibar")]) == 1
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(file: Path, **changes) -> None:
    before = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps(before | changes), "utf-8")


BESIDE = {
    "added_tokens.json": {"Zanzibar": tiny.V},
    "tokenizer_config.json": {"extra_special_tokens": ["Zanzibar"]},
    "tokenizer_config.json, by id": {"added_tokens_decoder": {str(tiny.V): {"content": "Zanzibar", "special": False}}},
}


@pytest.mark.parametrize("place", BESIDE)
def test_a_token_that_is_added_beside_the_tokenizer_counts(place, model, text):
    rewrite(model / place.partition(",")[0], **BESIDE[place])
    assert libraries.load_tokenizer(model)("Zanzibar").input_ids == [tiny.V]
    assert preflight.preflight(settings(model, text)).forecast.seconds > 0
    with pytest.raises(TrspError, match=f"token id {tiny.V}"):
        preflight.preflight(settings(model, text, prompt="From Zanzibar to"))  # a text spells special tokens out


def with_the_word(text: Path) -> Path:
    """The text with the added token in the midst of each paragraph."""
    other = text.with_name("other.txt")
    other.write_text(text.read_text("utf-8").replace("city", "Zanzibar"), "utf-8")
    return other


@pytest.mark.usefixtures("unproved")
def test_an_added_token_that_nothing_uses_is_no_matter(grown, text, tmp_path):
    asked = settings(grown, text)
    assert preflight.preflight(asked).forecast.seconds > 0
    run = Store(tmp_path / "runs").create(asked)
    assert recorder.record(run, engine.execute(asked, run.folder)).ended == "finished"


@pytest.mark.parametrize("where", ["text", "prompt"])
def test_the_shell_refuses_an_id_without_a_row_before_any_work(where, grown, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    source = with_the_word(text) if where == "text" else text
    more = {"prompt": "From Zanzibar to"} if where == "prompt" else {}
    flags = [f"{config.KNOBS[name].flag}={value}" for name, value in settings(grown, source, **more).as_dict().items()]
    assert main.main(["run", *flags]) == 2
    said = capsys.readouterr().err
    assert f"token id {tiny.V}" in said
    assert f"{tiny.V} rows" in said
    assert not (tmp_path / "runs").exists()


def test_a_run_that_nobody_looked_at_before_ends_before_anything_is_measured(grown, text):
    """As where a tokenizer cannot be read ahead: what it gives is looked at once the texts are cut."""
    asked = settings(grown, with_the_word(text))
    told, loaded = [], loading.load(str(grown))
    with pytest.raises(TrspError, match=f"token id {tiny.V}"):
        told += engine.execute(asked, loaded=loaded)
    assert "PerplexityMeasured" not in {type(event).__name__ for event in told}


def test_eval_refuses_it_too(grown, tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    line = {"query": "The river", "choices": ["crosses", "finds"], "gold": 0}
    file.write_text(json.dumps(line) + "\n")
    assert main.main(["eval", str(grown), "--task", str(file)]) == 0
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"choices": ["a", "Zanzibar"]}) + "\n")
    capsys.readouterr()
    assert main.main(["eval", str(grown), "--task", str(file)]) == 2
    said = capsys.readouterr()
    assert f"Question 2 holds token id {tiny.V}" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "request_",
    [
        an.Generate([an.Variant("")], "From Zanzibar", new_tokens=2),
        an.Trace([an.Variant("")], "The river", " crosses Zanzibar"),
    ],
)
def test_compare_refuses_it_too(request_, grown):
    asked = dataclasses.replace(request_, columns=[an.Variant(str(grown))])
    work = side_by_side.stream if isinstance(asked, an.Generate) else side_by_side.trace
    with pytest.raises(TrspError, match=f"token id {tiny.V}"):
        list(work(asked, model_cache.ModelCache()))


def test_a_text_is_not_read_by_a_model_that_lacks_a_row_for_it(grown, tmp_path):
    """Two models of one tokenizer, one of them with a row for its every token."""
    wide = tmp_path / "wide"
    tiny.build(vocab_size=tiny.V + 8).save_pretrained(wide)
    libraries.load_tokenizer(grown).save_pretrained(wide)
    asked = an.Trace([an.Variant(str(wide)), an.Variant(str(grown))], "The river", " crosses Zanzibar")
    told = [a.column for a in side_by_side.trace(asked, model_cache.ModelCache()) if isinstance(a, an.TextTraced)]
    assert told == [0]
