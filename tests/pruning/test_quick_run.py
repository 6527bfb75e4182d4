"""The Quick preset on the real default model, from the shell: what docs/results.md claims of it."""

import json
import statistics
import subprocess
import sys

import pytest
import torch

from trsp_core.data import blocks as data
from trsp_core.evaluation import perplexity
from trsp_core.models import loading
from trsp_core.pruning import validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.methods import get
from trsp_core.runs.store import Run
from trsp_core.surgery import discovery, hooks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished Quick run: its folder and the summary that the shell printed."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    command = [sys.executable, "-m", "trsp_core", "run", "--preset", "quick", "--json", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Run(folder), json.loads(done.stdout)


def test_the_summary_has_every_figure(quick):
    run, summary = quick
    assert len(summary["removed"]) == 8
    assert sorted(summary["removed"] + summary["kept"]) == list(range(30))
    assert summary["parameters"]["pruned"] < 0.83 * summary["parameters"]["dense"]
    for domain in ("calibration", "heldout"):
        assert set(summary["perplexity"][domain]) == {"dense", "direct", "repaired", "pruned"}
    assert summary["speed"]["ceiling"] == pytest.approx(30 / 22)
    assert summary["seconds"]["total"] > 0
    assert summary["peak_bytes"] <= 3 * 2**30
    assert run.status() == "finished"


def test_refit_and_training_help_in_both_domains(quick):
    _, summary = quick
    for domain, by in summary["perplexity"].items():
        assert by["dense"] < by["pruned"] < by["repaired"] < by["direct"], domain


def test_the_choice_beats_chance(quick):
    """Direct deletion of TRSP's choice against the mean of three random choices, on the same blocks."""
    run, summary = quick
    config = run.config()
    model, tokenizer = loading.load(config.model)
    stack = discovery.find(model)
    texts = data.prepare(config, tokenizer)
    lab = Lab(stack, texts.calibration, config)
    chance = []
    for seed in range(3):
        chooser = get("random").choose(lab, validate.from_values({"method": "random", "seed": seed}), 8)
        with pytest.raises(StopIteration) as end:
            next(chooser)
        with hooks.skipped(stack, end.value.value):
            losses = [loss for part in perplexity.block_losses(model, texts.measure["calibration"]) for loss in part]
        chance.append(perplexity.perplexity(losses))
    assert summary["perplexity"]["calibration"]["direct"] < statistics.fmean(chance)


def test_the_layer_weights_have_parted(quick):
    run, _ = quick
    last = run.state().weight_steps[-1].weights
    left = [w for w in last if w != 0]
    assert max(left) - min(left) > 0.1


def test_the_child_needs_no_more_memory_than_was_forecast_before_it_started(quick):
    """About 2.1 GB: adapters need no copy of the weights, and a repair holds the states of its blocks."""
    run, summary = quick
    assert summary["peak_bytes"] < run.state().forecast_bytes < 2.5e9


def test_the_pruned_model_reloads_with_the_measured_perplexity(quick):
    run, summary = quick
    model, tokenizer = loading.load(str(run.model_folder))
    assert model.config.num_hidden_layers == 22
    blocks = data.prepare(run.config(), tokenizer).measure["heldout"]
    losses = [loss for part in perplexity.block_losses(model, blocks) for loss in part]
    assert perplexity.perplexity(losses) == pytest.approx(summary["perplexity"]["heldout"]["pruned"], rel=1e-4)
    ids = tokenizer("The river", return_tensors="pt").input_ids
    how = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))
