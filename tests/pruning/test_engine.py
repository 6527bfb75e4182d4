"""A whole run on a tiny model: the event grammar, equal runs for equal seeds, a model untouched at any close."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from trsp_core.data import blocks as data
from trsp_core.errors import TrspError
from trsp_core.pruning import engine, methods, validate
from trsp_core.pruning.lab import Lab
from trsp_core.runs import recorder
from trsp_core.runs.store import Store
from trsp_core.schema import events, run_state
from trsp_core.surgery import discovery, removal

pytestmark = pytest.mark.usefixtures("unproved")


def config_of(text, **settings):
    return validate.from_values({**tiny.SETTINGS, "text": text, "heldout": text, "model": "tiny", **settings})


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.ids(), use_cache=False).logits


def run(config, model=None, folder=None):
    return list(engine.execute(config, folder, (model or tiny.build(), tiny.tokenizer())))


def test_a_run_tells_its_whole_story_in_order(text, tmp_path, tiny_model):
    told = run(config_of(text), folder=tmp_path)
    folded = run_state.fold(run_state.RunState(), [(i, float(i), e) for i, e in enumerate(told)])
    phases = [e.name for e in told if isinstance(e, events.PhaseStarted)]
    first = ["load", "text", "dense", "importance", "choose", "direct", "transfer", "trained"]
    assert phases == [*first, "importance after", "pruned", "speed", "save"]
    assert {(m.state, m.domain) for m in folded.measured} == {
        (s, d) for s in events.STATES if s != "repaired" for d in events.DOMAINS
    }
    assert [p.step for p in folded.probes] == [0, 2, 3]
    assert folded.ended == "finished"
    assert sorted(folded.chosen) == folded.removed.removed
    assert folded.removed.removed + folded.removed.kept != []
    assert sorted(folded.removed.removed + folded.removed.kept) == list(range(tiny.L))
    assert set(folded.samples) == {"dense", "direct", "pruned"}
    assert set(folded.speed) == {"dense", "pruned"}
    assert folded.ceiling == pytest.approx(5 / 3)
    assert folded.fraction == 1.0
    assert phases == tiny.planned(config_of(text), tiny_model)


def test_every_event_survives_the_file(text):
    for n, event in enumerate(run(config_of(text))):
        assert events.from_line(events.to_line(event, n, 0.5)) == (n, 0.5, event)


def test_same_seed_same_events_but_for_times(text):
    config = config_of(text)
    one, two = ([events.stable(e) for e in run(config)] for _ in range(2))
    assert one == two
    other = [events.stable(e) for e in run(config_of(text, seed=1))]
    assert one != other


def test_direct_deletion_equals_the_model_without_the_layers(text):
    """With no stage 2 the pruned model is the direct deletion, and both are told, with the same losses."""
    folded = run_state.fold(run_state.RunState(), [(0, 0.0, e) for e in run(config_of(text, stage2_steps=0))])
    by = {(m.state, m.domain): m.losses for m in folded.measured}
    assert by["direct", "calibration"] == by["pruned", "calibration"]
    assert "trained" not in folded.perplexity
    assert folded.gap_steps == []


def test_the_probe_says_what_deletion_would_give(text):
    """The probe of the last step is measured by skipping; deletion for real gives the same on the same blocks."""
    folded = run_state.fold(run_state.RunState(), [(0, 0.0, e) for e in run(config_of(text))])
    pruned = next(m for m in folded.measured if (m.state, m.domain) == ("pruned", "calibration"))
    expected = torch.tensor(pruned.losses[:2]).mean().exp().item()
    assert folded.probes[-1].perplexity == pytest.approx(expected, rel=1e-5)


def test_closing_at_every_event_leaves_the_model_bit_identical(text):
    model = tiny.build()
    before, flags = logits(model), [p.requires_grad for p in model.parameters()]
    config = config_of(text, learn_weights=True, speed_repeats=1)
    total = len(run(config, model))
    assert torch.equal(logits(model), before), "a finished run must leave it as well"
    for stop in range(1, total):
        generator = engine.execute(config, None, (model, tiny.tokenizer()))
        for _ in range(stop):
            next(generator)
        generator.close()
        assert torch.equal(logits(model), before), f"after event {stop}"
        assert [p.requires_grad for p in model.parameters()] == flags
        assert len(model.model.layers) == model.config.num_hidden_layers == tiny.L


@pytest.mark.parametrize("family", [name for name in tiny.CONFIGS if name != "llama"])
def test_closing_leaves_every_family_bit_identical(text, family):
    """In the middle of whatever changes the model: gates, learning weights, skipped and removed layers."""
    small = {"stage1_steps": 1, "stage2_steps": 1, "importance_blocks": 0, "sample_tokens": 0, "speed_repeats": 0}
    config = config_of(text, learn_weights=True, **small)
    model = tiny.build(family)
    before, settings = logits(model), discovery.find(model).text_config.to_dict()
    told = run(config, model)
    stops = {(type(e), getattr(e, "state", "")): n for n, e in enumerate(told[:-1], start=1)}
    middle = (events.StageOneStepped, events.DeletionProbed, events.StageTwoStepped, events.LayersRemoved)
    assert {kind for kind, _ in stops}.issuperset(middle)
    for stop in [len(told), *(n for (kind, _), n in stops.items() if kind in (*middle, events.PerplexityMeasured))]:
        generator = engine.execute(config, None, (model, tiny.tokenizer()))
        for _ in range(stop):
            next(generator)
        generator.close()
        assert torch.equal(logits(model), before), f"after event {stop}: {told[stop - 1]}"
        assert discovery.find(model).text_config.to_dict() == settings


def test_the_saved_model_reloads_and_has_the_measured_perplexity(text, tmp_path):
    told = run(config_of(text, save_model=True), folder=tmp_path)
    removed = next(e for e in told if isinstance(e, events.LayersRemoved))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True).eval()
    assert sum(p.numel() for p in model.parameters()) == removed.parameters
    assert model.config.num_hidden_layers == len(removed.kept)
    assert not list(tmp_path.glob(".*")), "temporary files are left over"
    assert not [p for p in (tmp_path / "model").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_model_before_deletion_is_kept_where_it_is_asked_for(text, tmp_path):
    told = run(config_of(text, save_model=True, save_trained=True), folder=tmp_path)
    gone = next(e for e in told if isinstance(e, events.LayersRemoved)).removed
    whole, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / f).eval() for f in ("trained-model", "model"))
    assert whole.config.num_hidden_layers == tiny.L
    ids = tiny.ids()
    with torch.inference_mode(), removal.removed(discovery.find(whole), gone):
        assert torch.equal(whole(input_ids=ids).logits, pruned(input_ids=ids).logits)
    saved = next(e for e in told if isinstance(e, events.ModelSaved))
    assert saved.bytes == sum(p.stat().st_size for f in ("trained-model", "model") for p in (tmp_path / f).iterdir())
    (tmp_path / "none").mkdir()
    for without in ({"stage2_steps": 0}, {"control": "delete_first"}):
        run(config_of(text, save_trained=True, **without), folder=tmp_path / "none")
        assert not (tmp_path / "none" / "trained-model").exists()


@pytest.mark.parametrize("method", [m.name for m in methods.all_methods().values() if not m.narrow])
def test_the_contract_of_every_method(method, text):
    """The right number of distinct layers, none of them protected, the weights untouched, the same again."""
    layers = "1,3" if method == "manual" else ""
    config = config_of(text, method=method, layers=layers, protect_first=1, stage2_steps=0, speed_repeats=0)
    model = tiny.build()
    before = logits(model)
    chosen = [next(e for e in run(config, model) if isinstance(e, events.LayersChosen)).layers for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == len(chosen[0]) == 2
    assert 0 not in chosen[0]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.05}, "rounds to none"),
        ({"ratio": 0.95}, "removes them all"),
        ({"method": "manual", "layers": "7"}, "Layer 7 does not exist"),
        ({"method": "manual", "layers": "0-4"}, "All 5 layers"),
        ({"protect_first": 3, "protect_last": 2}, "only 0 are sure to be free"),
        ({"block_length": 1024}, "reads at most 512"),
    ],
)
def test_what_this_model_cannot_do_is_refused_with_a_remedy(settings, message, text):
    with pytest.raises(TrspError, match=message) as caught:
        run(config_of(text, **settings))
    assert caught.value.remedy


def test_a_recorded_run_folds_to_what_was_told_live(text, tmp_path):
    run_folder = Store(tmp_path).create(config_of(text))
    live = []
    generator = engine.execute(config_of(text), run_folder.folder, (tiny.build(), tiny.tokenizer()))
    recorder.record(run_folder, generator, lambda folded, event: live.append(event))
    lines, offset = run_folder.read()
    assert [e for _, _, e in lines] == live
    assert offset == run_folder.events_file.stat().st_size
    assert run_folder.status() == "finished"
    kept = json.loads((run_folder.folder / "summary.json").read_text())
    assert kept == json.loads(json.dumps(run_state.summary(run_folder.state())))


def test_a_cancel_between_events_ends_the_run_in_writing(text, tmp_path):
    run_folder = Store(tmp_path).create(config_of(text))
    model = tiny.build()
    before = logits(model)

    def stop_in_stage_two(folded, event):
        if isinstance(event, events.StageTwoStepped):
            run_folder.cancel()

    generator = engine.execute(config_of(text), run_folder.folder, (model, tiny.tokenizer()))
    folded = recorder.record(run_folder, generator, stop_in_stage_two)
    assert folded.ended == run_folder.status() == "cancelled"
    assert len(folded.gap_steps) == 1
    assert torch.equal(logits(model), before)


def test_a_broken_model_ends_the_run_failed_with_the_step_named(text, tmp_path):
    run_folder = Store(tmp_path).create(config_of(text))
    model = tiny.build()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
    generator = engine.execute(config_of(text), run_folder.folder, (model, tiny.tokenizer()))
    folded = recorder.record(run_folder, generator)
    assert folded.ended == "failed"
    assert "step 1 of stage 1" in folded.failure.message
    assert folded.failure.trace == ""
    assert run_folder.read()[0], "what was recorded before is kept"


def test_numbers_count_up_and_times_do_not_go_back(text, tmp_path):
    run_folder = Store(tmp_path).create(config_of(text))
    recorder.record(run_folder, engine.execute(config_of(text), None, (tiny.build(), tiny.tokenizer())))
    lines, _ = run_folder.read()
    assert [n for n, _, _ in lines] == list(range(len(lines)))
    assert all(a[1] <= b[1] for a, b in pairwise(lines))


def test_importance_is_the_rise_of_the_loss_without_each_layer_alone(text):
    model, config = tiny.build(), config_of(text, importance_blocks=2)
    before, after = (e for e in run(config, model) if isinstance(e, events.ImportanceMeasured))
    assert (before.state, after.state, len(before.rises)) == ("dense", "trained", tiny.L)
    blocks = data.prepare(config, tiny.tokenizer()).measure["calibration"][:2]
    lab = Lab(discovery.find(model), blocks, config)
    for layer, rise in enumerate(before.rises):
        assert rise == pytest.approx(lab.loss_without([layer], blocks) - lab.loss_without([], blocks), abs=1e-5)
    assert after.rises != before.rises


def test_a_run_leaves_the_process_its_threads(text):
    torch.set_num_threads(2)
    story = engine.execute(config_of(text, threads=1), None, (tiny.build(), tiny.tokenizer()))
    next(event for event in story if isinstance(event, events.ModelLoaded))
    assert torch.get_num_threads() == 1
    story.close()
    assert torch.get_num_threads() == 2
