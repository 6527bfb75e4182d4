"""Every transfer: the contract that all share, planted redundancy, and closed forms against a direct solve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tests import tiny, zoo
from tests.pruning.test_methods import drain
from trsp_core.errors import TrspError
from trsp_core.evaluation import perplexity
from trsp_core.pruning import engine, transfers, validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.transfers import magnitude, refit
from trsp_core.schema import events
from trsp_core.schema.config import TRANSFERS
from trsp_core.surgery import discovery, removal, training

DEPTH = 6
CHOSEN = [1, 2, 4]
REPAIRS = [name for name in transfers.names() if transfers.get(name).repair]
CLOSED_FORMS = ["refit", "linear_map"]
LEAST = 1e-6  # the smallest ridge


def lab_of(model=None, blocks=None, **settings):
    config = validate.from_values(
        {"method": "manual", "layers": "1,2,4", "block_length": 16, "stage2_steps": 0, **settings}
    )
    return Lab(
        discovery.find(model or tiny.build(n_layers=DEPTH)), tiny.ids(24, 16) if blocks is None else blocks, config
    )


def repaired(lab, name, chosen):
    return drain(transfers.get(name).repair(lab, lab.config, chosen))


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tiny.ids() if ids is None else ids, use_cache=False).logits


def test_the_config_names_every_file():
    assert transfers.names() == TRANSFERS
    for transfer in transfers.all_transfers().values():
        assert transfer.title
        assert transfer.summary.endswith(".")
        assert transfer.equation
        assert transfer.name in TRANSFERS
    with pytest.raises(TrspError, match="There is no transfer"):
        transfers.get("hope")


@pytest.mark.parametrize("name", REPAIRS)
def test_where_no_layer_goes_nothing_changes(name):
    assert repaired(lab_of(), name, [])[1] == {}


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("chosen", [CHOSEN, [0], [5], [0, 5], [1, 2, 3, 4]])
def test_it_leaves_the_model_as_it_was_and_changes_layers_that_stay(name, chosen):
    lab = lab_of()
    before = logits(lab.model)
    _, edits = repaired(lab, name, chosen)
    assert torch.equal(logits(lab.model), before)
    gone = {id(p) for i in chosen for p in lab.stack.layers[i].parameters()}
    assert not gone & {id(p) for p in edits}
    assert all(value.shape == p.shape and value.isfinite().all() for p, value in edits.items())


@pytest.mark.parametrize("name", REPAIRS)
def test_closed_at_any_event_it_leaves_the_model_as_it_was(name):
    lab = lab_of()
    before, stop = logits(lab.model), 0
    while True:
        stop += 1
        story = transfers.get(name).repair(lab, lab.config, CHOSEN)
        told = [event for event, _ in zip(story, range(stop), strict=False)]
        story.close()
        assert torch.equal(logits(lab.model), before)
        if len(told) < stop:
            break
    assert stop > 2


def planted(scale):
    """A tiny model whose layer 3 can take over what layer 4 does: layer 4's attention writes nothing, and its MLP reads
    what layer 3's does and differs from it by a linear map of its output. Layer 3 itself writes `scale` times as much
    as layer 4, so little that layer 4's norm hardly sees it."""
    torch.manual_seed(3)
    model = tiny.build(n_layers=DEPTH)
    third, fourth = model.model.layers[3], model.model.layers[4]
    with torch.no_grad():
        fourth.self_attn.o_proj.weight.zero_()
        fourth.post_attention_layernorm.weight.copy_(third.post_attention_layernorm.weight)
        for name in ("gate_proj", "up_proj"):
            getattr(fourth.mlp, name).weight.copy_(getattr(third.mlp, name).weight)
        width = third.mlp.down_proj.weight.shape[0]
        base = third.mlp.down_proj.weight.clone()
        fourth.mlp.down_proj.weight.copy_(torch.linalg.qr(torch.randn(width, width)).Q @ base)
        third.mlp.down_proj.weight.copy_(scale * base)
    return model


@pytest.mark.parametrize(("name", "scale"), [("refit", 0.0), ("linear_map", 1e-4), ("refit", 1e-4)])
def test_what_a_linear_map_of_a_neighbour_can_do_is_recovered(name, scale):
    model = planted(scale)
    lab = lab_of(model, torch.randint(0, tiny.V, (60, 16)), ridge=LEAST)
    dense = logits(model)
    with removal.removed(lab.stack, [4]):
        off = (logits(model) - dense).norm()
    told, edits = repaired(lab, name, [4])
    with training.rewritten(edits), removal.removed(lab.stack, [4]):
        left = (logits(model) - dense).norm()
    assert left < 2e-3 * off
    first = next(e for e in told if isinstance(e, events.LayerRefitted))
    assert first.layer == 3
    assert first.after < 2e-3 * first.before


def test_the_solve_is_the_minimum_of_its_equation():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 7, 5) for _ in range(3)]
    errors = [torch.randn(2, 7, 4) for _ in range(3)]
    weights = [torch.rand(2, 7, 1) + 0.1 for _ in range(3)]
    h, e, w = (torch.cat([x.flatten(0, 1) for x in parts]).double() for parts in (inputs, errors, weights))
    for ridge in (1e-6, 0.3, 10.0):
        pull = (ridge * (h * w).square().sum(0).mean()).sqrt() * torch.eye(5, dtype=torch.float64)
        rows = torch.cat([h * w, pull])
        expected = torch.linalg.lstsq(rows, torch.cat([e * w, torch.zeros(5, 4)])).solution
        assert torch.allclose(refit.solved(inputs, errors, weights, ridge).double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_each_fitted_layer_comes_nearer_to_the_dense_state(name):
    told, edits = repaired(lab_of(ridge=0.01), name, CHOSEN)
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]
    assert [e.layer for e in fits] == ([0, 3, 5] if name == "refit" else [0, 3])
    assert all(e.after < e.before for e in fits)
    assert len(edits) == (2 if name == "refit" else 1) * len(
        fits
    )  # attention's and the MLP's projection, or the latter


def test_fitting_attention_too_comes_nearer_than_the_mlp_alone():
    distances = {}
    for part in ("all", "mlp"):
        told, edits = repaired(lab_of(ridge=0.01, refit=part), "refit", CHOSEN)
        distances[part] = [e.after for e in told if isinstance(e, events.LayerRefitted)]
        assert len(edits) == len(distances[part]) * (2 if part == "all" else 1)
    assert all(both < alone for both, alone in zip(distances["all"], distances["mlp"], strict=True))


@pytest.mark.parametrize("chosen", [CHOSEN, [0], [0, 3], [0, 5], [0, 1, 2], [5], [1, 2, 3, 4]])
def test_a_layer_is_fitted_on_what_those_below_it_really_give(chosen):
    """The events' distances are those of the model that is left: measured on it afterwards, at the last layer."""
    lab = lab_of(ridge=0.1)
    targets = [lab.states(ids)[DEPTH] for ids in lab.pool()]
    told, edits = repaired(lab, "refit", chosen)
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]

    def far():
        with removal.removed(lab.stack, chosen):
            states = [lab.states(ids)[-1] for ids in lab.pool()]
        pairs = zip(targets, states, strict=True)
        return torch.cat([((t - x).norm(dim=-1) / t.norm(dim=-1)).flatten() for t, x in pairs]).mean().item()

    before = far()
    with lab.rewritten(edits):
        after = far()
    assert after == pytest.approx(fits[-1].after, rel=1e-4)
    assert after < 0.95 * before


def test_magnitude_is_the_ratio_of_mean_sizes():
    lab = lab_of()
    before, after = (torch.cat([lab.states(ids)[i].flatten(0, 1) for ids in lab.pool()]) for i in (3, 5))
    alpha = (after.abs().mean(0) / before.abs().mean(0)).mean()
    _, edits = repaired(lab, "magnitude", [3, 4])
    ids, model = tiny.ids(), lab.model
    state, head_of = lab.entering(3, ids), logits(model)
    with lab.rewritten(edits):
        assert torch.allclose(lab.entering(3, ids), alpha * state, rtol=1e-2, atol=1e-3 * float(state.abs().max()))
        embedding = model.get_input_embeddings().weight
    assert torch.allclose(edits[embedding], alpha * embedding, rtol=1e-4)
    assert torch.equal(logits(model), head_of)


@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_whole_run_ends_and_keeps_what_it_measured(name, steps, tmp_path, unproved):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(800), "utf-8")
    values = {"model": "tiny", "block_length": 16, "measure_length": 24, "measure_blocks": 2, "calibration_blocks": 8,
              "probe_blocks": 1, "importance_blocks": 0, "kl_blocks": 1, "stage1_steps": 1, "speed_repeats": 0,
              "sample_tokens": 3, "threads": 1, "ratio": 0.4}  # fmt: skip
    config = validate.from_values(
        {**values, "text": str(text), "heldout": str(text), "transfer": name, "stage2_steps": steps}
    )
    model = tiny.build(n_layers=DEPTH)
    before = logits(model)
    told = list(engine.execute(config, tmp_path, (model, tiny.tokenizer())))
    assert isinstance(told[-1], events.RunFinished)
    assert torch.equal(logits(model), before)
    states = [e.state for e in told if isinstance(e, events.PerplexityMeasured) and e.domain == "calibration"]
    repairs = name in REPAIRS
    assert ("repaired" in states) == (repairs and steps > 0)
    assert ("trained" in states) == (name == "penalty" and steps > 0)
    assert sorted({*states} & {"dense", "direct", "pruned"}) == ["dense", "direct", "pruned"]
    figures = {
        e.state: e.losses for e in told if isinstance(e, events.PerplexityMeasured) and e.domain == "calibration"
    }
    assert (figures["direct"] == figures["pruned"]) == (not repairs and not steps)
    phases = [e.name for e in told if isinstance(e, events.PhaseStarted)]
    assert ("repair" in phases) == repairs
    from transformers import AutoModelForCausalLM

    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    removed = next(e for e in told if isinstance(e, events.LayersRemoved))
    assert perplexity.parameter_bytes(kept)[0] == removed.parameters


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "bloom", "opt", "mamba", "qwen3", "phi"])
def test_families_that_add_what_the_mlp_writes_are_refitted(model_type):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    told, edits = repaired(lab, "refit", [1, 4])
    assert edits
    assert all(e.after < e.before for e in told if isinstance(e, events.LayerRefitted))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_families_that_do_not_are_refused_with_the_reason(model_type, name):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    before = logits(lab.model)
    with pytest.raises(TrspError, match="does not end in one linear map") as refusal:
        repaired(lab, name, [1, 4])
    assert "--transfer" in refusal.value.remedy
    assert torch.equal(logits(lab.model), before)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "mamba"])
def test_every_family_can_be_rebuilt_beside_its_cuts(model_type):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (64, 16)), lab_of().config)
    told, edits = repaired(lab, "rebuild", [0, 3, 4])
    fits = [e for e in told if isinstance(e, events.LayerRefitted)]
    assert [e.layer for e in fits] == [1, 2]
    assert all(e.after < e.before for e in fits)
    own = {id(p) for i in (1, 2) for p in lab.stack.layers[i].parameters()}
    assert {id(p) for p in edits} == own


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "olmo2", "gemma2"])
@pytest.mark.parametrize("chosen", [[1, 4], [0, 5]])
def test_a_scale_that_is_not_handed_on_is_refused(model_type, chosen):
    lab = Lab(discovery.find(zoo.build(model_type)), torch.randint(0, 30, (16, 16)), lab_of().config)
    with pytest.raises(TrspError, match="not handed on"):
        repaired(lab, "magnitude", chosen)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen3"])
def test_a_scaled_embedding_leaves_the_head_its_own(model_type):
    """With a head that is the embedding; Gemma's norms multiply by 1 + w."""
    model = zoo.build(model_type)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    lab = Lab(discovery.find(model), torch.randint(0, 30, (16, 16)), lab_of().config)
    ids, last = torch.randint(0, 30, (2, 8)), lab.n_layers - 1
    before = logits(model, ids)
    edits = magnitude.scaled(lab, [last], {(last, last): 1.7})  # all but the last layer: its own part is a little less
    with lab.rewritten(edits), lab.skipped([last]):
        scaled = logits(model, ids)
    with lab.skipped([last]):
        assert torch.allclose(logits(model, ids), scaled, rtol=1e-2, atol=2e-2 * float(before.abs().max()))


@pytest.mark.parametrize(("model_type", "name"), [("gemma2", "refit"), ("mixtral", "linear_map"), ("opt", "magnitude")])
def test_a_model_that_cannot_be_repaired_is_refused_before_any_work(model_type, name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(400), "utf-8")
    values = {**tiny.SETTINGS, "text": str(text), "heldout": str(text), "transfer": name, "model": "tiny"}
    story = engine.execute(validate.from_values(values), None, (zoo.build(model_type), tiny.tokenizer()))
    phases = []
    with pytest.raises(TrspError, match=r"--transfer|closed form|handed on"):
        for event in story:
            phases += [event.name] if isinstance(event, events.PhaseStarted) else []
    assert set(phases) <= {"load", "text"}


def test_equations_that_are_singular_to_rounding_are_refused_with_the_way_out():
    rows = [torch.full((1, 4, 3), float("nan"))]
    with pytest.raises(ArithmeticError, match="ridge of"):
        refit.solved(rows, rows, [torch.ones(1, 4, 1)], LEAST)

    def solve(module, inputs, errors, weights):
        raise ArithmeticError("singular")

    with pytest.raises(TrspError) as refusal:
        lab = lab_of()
        drain(refit.fitted_in_order(lab, [2], [1], lambda layer: [refit.output_projection(lab, layer)], solve))
    assert "--ridge" in refusal.value.remedy


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "laco", "layers": "", "control": "delete_first"}, "changes the weights that stay"),
        ({"method": "width", "layers": ""}, "removes no layer"),
        ({"precision": "nf4", "adapter_rank": 4}, "packed as nf4"),
        ({"cycles": 2, "method": "trsp", "layers": "", "stage2_steps": 4}, "Cycles"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, word):
    config = dataclasses.replace(lab_of().config, transfer="refit", **settings)
    assert any(word in problem.message for problem in validate.check(config))


def test_biases_are_kept():
    lab = Lab(discovery.find(zoo.build("opt")), torch.randint(0, 30, (16, 16)), lab_of().config)
    module = refit.output_projection(lab, 0)
    assert isinstance(module, nn.Linear)
    assert module.bias is not None
    _, edits = repaired(lab, "refit", [1])
    assert module.weight in edits
    assert module.bias not in edits
