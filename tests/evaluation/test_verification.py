"""What a run keeps is loaded by stock transformers in a fresh process, and is the model of the run, before the run says
that it has finished."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests import tiny, zoo
from trsp_core import machine
from trsp_core.evaluation import saving, stock_process, verification
from trsp_core.perf import budget
from trsp_core.preparation import forecast
from trsp_core.pruning import engine, validate
from trsp_core.runs import recorder
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev

SMALL = {
    "block_length": 16,
    "measure_length": 16,
    "measure_blocks": 2,
    "calibration_blocks": 8,
    "probe_blocks": 0,
    "stage1_steps": 1,
    "stage2_steps": 2,
    "ratio": 0.4,
    "speed_repeats": 0,
    "sample_tokens": 0,
    "kl_blocks": 0,
    "importance_blocks": 0,
    "threads": 1,
    "save_model": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(tiny.text(600), "utf-8")
    return file


@pytest.fixture
def run(tmp_path, tiny_model, text) -> Run:
    return made(tmp_path, tiny_model, text)


def made(root: Path, model: Path, text: Path, **settings) -> Run:
    values = {"model": str(model), "text": str(text), "heldout": str(text), **SMALL, **settings}
    return Store(root / "runs").create(validate.from_values(values))


def recorded(run: Run, watch=None):
    return recorder.record(run, engine.execute(run.config(), run.folder), watch)


def spoil_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_family"}))


def spoil_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "which", "said"),
    [
        (spoil_weights, "model", "logits differ"),
        (spoil_weights, "trained-model", "logits differ"),
        (spoil_config, "model", "could not load"),
        (spoil_tokenizer, "model", "tokenizer cuts the text otherwise"),
    ],
)
def test_a_model_that_comes_back_otherwise_is_not_kept_and_the_run_has_failed(
    spoil, which, said, tmp_path, tiny_model, text, monkeypatch
):
    plain = saving.save

    def spoiled(config, stack, tokenizer, target, *others):
        size = plain(config, stack, tokenizer, target, *others)
        if target.name == f"unproved-{which}":
            spoil(target)
        return size

    monkeypatch.setattr(saving, "save", spoiled)
    run = made(tmp_path, tiny_model, text, save_trained=which == "trained-model")
    state = recorded(run)
    assert state.ended == "failed"
    assert said in state.failure.message
    assert state.failure.trace == ""
    assert "--save-model" in state.failure.remedy
    assert not (run.folder / which).exists()
    assert (run.folder / f"unproved-{which}").is_dir()
    assert state.perplexity["pruned"].keys() == {"calibration", "heldout"}, "what was measured stays"
    assert not any(isinstance(event, ev.ModelSaved) for _, _, event in state.lines)


def test_a_model_that_was_proved_lies_in_its_place_with_what_it_computed(tmp_path, tiny_model, text):
    run = made(tmp_path, tiny_model, text, save_trained=True)
    state = recorded(run)
    assert state.ended == "finished"
    assert sorted(part.name for part in run.folder.iterdir() if "model" in part.name) == ["model", "trained-model"]
    assert verification.check(run.model_folder, run.proof_file).problems == []
    told = [event for _, _, event in state.lines]
    begun = told.index(ev.PhaseStarted("save", 4))
    assert [event.done for event in told[begun:] if isinstance(event, ev.Progressed)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("falcon_h1", {"num_hidden_layers": 5}), ("mamba2", {"num_hidden_layers": 2}), ("llama", {"languages": [1] * 8})],
)
def test_odd_families_are_kept_and_proved(model_type, fields, tmp_path, text):
    zoo.build(model_type, **fields).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    run = made(tmp_path, tmp_path / "model", text, method="last", stage2_steps=0, ratio=0.5)
    state = recorded(run)
    assert state.ended == "finished", state.failure
    assert (run.model_folder / "model.safetensors").is_file()


def children() -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if any("stock_process.py" in word for word in child.cmdline())]


def test_a_run_is_stopped_while_its_model_is_proved(run):
    def stop() -> None:
        while not children():
            time.sleep(0.01)
        run.cancel()

    asked = threading.Thread(target=stop)
    asked.start()
    state = recorded(run)
    asked.join()
    assert state.ended == "cancelled"
    assert children() == []
    assert not list(run.folder.glob("*model*"))
    assert not list(run.folder.glob(".*partial"))


def test_the_fresh_process_ends_with_whoever_asked_it(tiny_model, tmp_path):
    """A parent that is killed can end nobody: its child sees stdin end."""
    child = subprocess.Popen(
        [sys.executable, "-I", stock_process.__file__, str(tiny_model), str(tmp_path / "logits")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    question = {"text": "The river", "tokens": 4, "new_tokens": 10**6, "device": "cpu", "threads": 1}
    child.stdin.write(json.dumps(question) + "\n")
    child.stdin.close()
    assert child.wait(60) == 1


def test_a_fresh_process_that_was_killed_for_memory_says_so(run, monkeypatch):
    def kill(state, event) -> None:
        if isinstance(event, ev.Progressed) and state.phase == "save":
            threading.Thread(target=end).start()

    def end() -> None:
        while not (found := children()):
            time.sleep(0.01)
        found[0].kill()

    state = recorded(run, kill)
    assert state.ended == "failed"
    assert "ran out of memory" in state.failure.message
    assert "resuming" in state.failure.remedy


def test_memory_that_is_gone_by_then_is_told_before_the_fresh_process_starts(run, monkeypatch):
    def take(state, event) -> None:
        if isinstance(event, ev.PhaseStarted) and event.name == "save":
            monkeypatch.setattr(machine, "available_memory", lambda: 10**8)

    state = recorded(run, take)
    assert state.ended == "failed"
    assert "100 MB are free" in state.failure.message
    assert (run.folder / "unproved-model").is_dir()


def test_the_forecast_counts_the_fresh_process(tiny_model):
    from trsp_core.models import catalog

    facts = catalog.facts(str(tiny_model))
    direct = validate.from_values({"stage2_steps": 0, "method": "random", "save_model": True, "measure_length": 16})
    without = validate.from_values({"stage2_steps": 0, "method": "random", "save_model": False, "measure_length": 16})
    assert forecast.peak_bytes(direct, facts) >= forecast.peak_bytes(without, facts) + 0.9 * budget.PROCESS_BYTES
    assert forecast.forecast(direct, facts, 100.0).seconds > forecast.forecast(without, facts, 100.0).seconds + 4
